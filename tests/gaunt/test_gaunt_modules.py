"""The modules compute what e3nn's Clebsch–Gordan coefficients say, with weights, scales and errors as documented."""

import itertools
import math
import warnings

import pytest
import torch

from torchlayers.gaunt.coefficients import bracket_scale, gaunt_scale
from torchlayers.gaunt.convolution import edge_order
from torchlayers.gaunt.irreps import FlatIrreps, e3nn_o3
from torchlayers.gaunt.modules import (
    GauntConv,
    GauntSelfInteraction,
    GauntSymmetricContraction,
    GauntTensorProduct,
)
from torchlayers.gaunt.sphere import sphere_quadrature
from torchlayers.testing import assert_close_rel

F64 = torch.float64


@pytest.fixture
def float64_default():
    """e3nn makes its constants in the default dtype and never again."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


def e3nn_product(*args, **options):
    """An ``o3.TensorProduct``, which e3nn builds through TorchScript, deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return e3nn_o3().TensorProduct(*args, **options)


def couples(antisymmetric, l1, l2, l3):
    return abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == antisymmetric


def path_scale(antisymmetric, *path):
    return (bracket_scale if antisymmetric else gaunt_scale)(*path)


def variances(couplings, squared=False):
    """(sign, l3) -> the sum over paths of the variance of a component, by definition."""
    found = {}
    for c in couplings:
        for path in itertools.product(c.degrees1, c.degrees2, c.degrees_out):
            if couples(c.antisymmetric, *path):
                key = (c.sign_out, path[2])
                found[key] = found.get(key, 0) + path_scale(c.antisymmetric, *path) ** 2 / (2 * path[2] + 1)
    return found


def lifted(part, weight, place, channels):
    """A weighted factor (B, R, C, 2l + 1) by the module's documented weights."""
    if isinstance(weight, list):
        return torch.einsum("rcm,bmi->brci", weight[place], part) / math.sqrt(part.shape[1])
    return weight[:, :, place, None] * part[:, None].expand(-1, -1, channels, -1)


def by_clebsch_gordan(module, x, y):
    """What the docstring promises, path by path with e3nn's coefficients."""
    o3 = e3nn_o3()
    layout = module._out.layout
    parts1 = FlatIrreps("", module.irreps_in1, layout).split(x)
    parts2 = FlatIrreps("", module.irreps_in2, layout).split(y)
    variance, total = variances(module.couplings), {}
    for c, in1, in2, out in module.weight_views():
        for (i, l1), (j, l2), (k, l3) in itertools.product(*map(enumerate, (c.degrees1, c.degrees2, c.degrees_out))):
            if not couples(c.antisymmetric, l1, l2, l3):
                continue
            a = lifted(parts1[c.sign1, l1], in1, i, module.channels)
            b = lifted(parts2[c.sign2, l2], in2, j, module.channels)
            z = path_scale(c.antisymmetric, l1, l2, l3) * torch.einsum(
                "brci,brcj,ijk->brck", a, b, o3.wigner_3j(l1, l2, l3, dtype=F64)
            )
            terms = module.rank * (module.channels if isinstance(out, list) else 1)
            if isinstance(out, list):
                z = torch.einsum("rcm,brck->bmk", out[k], z)
            else:
                z = torch.einsum("rc,brck->bck", out[:, :, k], z)
            key = (c.sign_out, l3)
            total[key] = total.get(key, 0) + z / math.sqrt(variance[key] * terms)
    return FlatIrreps("", module.irreps_out, layout).join(total)


@pytest.mark.parametrize("layout", ["mul_ir", "ir_mul"])
@pytest.mark.parametrize(
    ("irreps", "options"),
    [
        (("3x0e+3x1o+3x2e", "3x0e+3x1o+3x2e", "3x0e+3x1o+3x2e"), {}),
        (("3x0e+3x1o+3x2e", "3x0e+3x1o+3x3o", None), {"antisymmetric": True}),
        (("3x0o+3x1o+3x1e", "3x0e+3x1e+3x2e", None), {"antisymmetric": True, "rank": 2}),
        (("3x0e+3x1o+3x1e", "1x0e+1x1o+1x2e", "3x1o+3x1e+3x2e"), {"antisymmetric": True, "connection": "uvu"}),
        (("3x0e+3x1o", "2x0e+4x1o+1x1e", "3x0e+3x1o+3x1e"), {"connection": "uvu", "rank": 2}),
        (("3x0e+2x1o", "2x0e+4x1o+1x1e", "5x0e+4x1o+2x1e"), {"connection": "uvw", "rank": 2, "antisymmetric": True}),
    ],
    ids=str,
)
def test_product_is_the_sum_over_clebsch_gordan_paths(irreps, options, layout):
    module = GauntTensorProduct(*irreps, **options, layout=layout, dtype=F64)
    x, y = (i.randn(4, -1, dtype=F64) for i in (module.irreps_in1, module.irreps_in2))
    assert_close_rel(module(x, y), by_clebsch_gordan(module, x, y), rtol=1e-12)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_default_output_is_every_irrep_that_paths_reach(antisymmetric):
    irreps = "2x0e+2x1o+2x1e"
    module = GauntTensorProduct(irreps, irreps, antisymmetric=antisymmetric)
    full = e3nn_o3().FullTensorProduct(irreps, irreps)
    every = {ir for _, ir in full.irreps_out}
    # Of the odd paths only 1 x 1 -> 1 is there, and even paths lead to no other irrep of degree 1 than 1o and 1e.
    assert {ir for _, ir in module.irreps_out} == every
    vectors = GauntTensorProduct("2x1o", "2x1o", antisymmetric=antisymmetric)
    assert str(vectors.irreps_out) == ("2x0e+2x1e+2x2e" if antisymmetric else "2x0e+2x2e")


def factorised(table, paths, rank, lmax):
    """Factors (3, rank, lmax + 1) whose products, summed over the rank, are ``table`` at ``paths``: damped Newton."""
    index = torch.tensor(paths).T

    def products(factors):
        a, b, c = (f[:, i] for f, i in zip(factors.view(3, rank, lmax + 1), index, strict=True))
        return (a * b * c).sum(0)

    for start in range(20):
        factors = torch.randn(3 * rank * (lmax + 1), dtype=F64, generator=torch.Generator().manual_seed(start))
        for _ in range(100):
            misfit = products(factors) - table
            if misfit.norm() < 1e-13 * table.norm():
                return factors.view(3, rank, lmax + 1)
            step = torch.linalg.pinv(torch.autograd.functional.jacobian(products, factors)) @ misfit
            factors = factors - step * min(1.0, float(1 / step.norm()))
    raise AssertionError(f"no factors of rank {rank} found")


@pytest.mark.parametrize("lmax", [1, 2, 3])
def test_a_rank_of_l_gives_even_paths_free_weights(float64_default, lmax):
    """Factors of a table of random path weights reproduce e3nn's product with those weights."""
    o3 = e3nn_o3()
    channels = 2
    irreps = o3.Irreps([(channels, ir) for _, ir in o3.Irreps.spherical_harmonics(lmax)])
    paths = [p for p in itertools.product(range(lmax + 1), repeat=3) if couples(False, *p)]
    free = torch.rand(channels, len(paths)) + 0.5
    module = GauntTensorProduct(irreps, irreps, irreps, rank=lmax)
    variance = variances(module.couplings)
    scale = torch.tensor([gaunt_scale(*p) / math.sqrt(variance[1, p[2]] * lmax) for p in paths])
    (view,) = module.weight_views()
    with torch.no_grad():
        for u in range(channels):
            for own, factor in zip(view[1:], factorised(free[u] / scale, paths, lmax, lmax), strict=True):
                own[:, u] = factor
    theirs = e3nn_product(
        irreps, irreps, irreps, [(*p, "uuu", True) for p in paths],
        irrep_normalization="none", path_normalization="none",
    )  # fmt: skip
    with torch.no_grad():
        theirs.weight.copy_(free.T.flatten())
    x, y = irreps.randn(5, -1), irreps.randn(5, -1)
    assert_close_rel(module(x, y), theirs(x, y), rtol=1e-10)


def test_weights_for_each_sample():
    options = {"internal_weights": False, "antisymmetric": True}
    irreps = ("3x0e+3x1o", "1x0e+1x1o+1x2e", "3x0e+3x1o+3x1e")
    for connection in ("uvu", "uvw"):
        each = GauntTensorProduct(*irreps, connection=connection, shared_weights=False, **options)
        one = GauntTensorProduct(*irreps, connection=connection, **options)
        assert not list(each.parameters()) and not each.state_dict()
        x, y = each.irreps_in1.randn(4, -1), each.irreps_in2.randn(4, -1)
        weight = torch.randn(4, each.weight_numel)
        loop = torch.stack([one(*sample) for sample in zip(x, y, weight, strict=True)])
        assert_close_rel(each(x, y, weight), loop)
        with pytest.raises(ValueError, match="weight must be given"):
            each(x, y)
        with pytest.raises(ValueError, match="weight must have 1 dimension"):
            one(x, y, weight)


def test_given_weights_stand_in_for_the_own_ones():
    module = GauntTensorProduct("3x0e+3x1o", "3x0e+3x1o", "3x0e+3x1o")
    x, y = module.irreps_in1.randn(4, -1), module.irreps_in2.randn(4, -1)
    weight = torch.randn(module.weight_numel)
    given = module(x, y, weight)
    assert not torch.allclose(given, module(x, y))
    module.load_state_dict({"weight": weight})
    assert torch.equal(given, module(x, y))


def test_leading_dimensions_broadcast():
    module = GauntTensorProduct("3x0e+3x1o", "1x0e+1x1o", "3x0e+3x1o", connection="uvu")
    x, y = module.irreps_in1.randn(4, 5, -1), module.irreps_in2.randn(5, -1)
    assert_close_rel(module(x, y), torch.stack([module(row, y) for row in x]))


def part_variances(module, z):
    return torch.stack([z[:, place].var(0).mean() for place in module.irreps_out.slices()])


MIXED = "64x0e+64x0o+64x1o+64x1e+64x2e"


@pytest.mark.parametrize(
    ("build", "tolerance"),
    [
        (lambda: GauntTensorProduct(MIXED, MIXED, antisymmetric=True), 0.15),
        (lambda: GauntTensorProduct(MIXED, "0e+1o+2e", MIXED, connection="uvu", antisymmetric=True), 0.15),
        (lambda: GauntTensorProduct(MIXED, "8x0e+8x1o", MIXED, connection="uvw", antisymmetric=True), 0.2),
        # Terms that interfere spread the variance over channels, which 64 of them average less well.
        (lambda: GauntTensorProduct(MIXED, MIXED, MIXED, rank=3), 0.4),
        (lambda: GauntSelfInteraction(MIXED, antisymmetric=True), 0.15),
        (lambda: GauntSymmetricContraction(MIXED, MIXED, 3, 2), 0.3),
    ],
    ids=["uuu", "uvu", "uvw", "rank", "self", "contraction"],
)
def test_outputs_have_unit_variance(build, tolerance):
    module = build()
    if isinstance(module, GauntTensorProduct):
        args = (module.irreps_in1.randn(400, -1), module.irreps_in2.randn(400, -1))
    elif isinstance(module, GauntSelfInteraction):
        args = (module.irreps_in.randn(1000, -1),)
    else:
        args = (torch.randn(1000, 64, 13), torch.zeros(1000, dtype=torch.int64))
    with torch.no_grad():
        found = part_variances(module, module(*args))
    assert (found - 1).abs().max() < tolerance, found


def test_messages_have_unit_variance():
    module = GauntConv(MIXED, 2, MIXED, antisymmetric=True)
    count = 400
    edge_index = torch.stack((torch.randint(count, (count,)), torch.randperm(count)))
    args = (module.irreps_in.randn(count, -1), torch.randn(count, 3), edge_index)
    found = part_variances(module, module(*args, torch.randn(count, module.weight_numel)))
    assert (found - 1).abs().max() < 0.15, found


def test_self_interaction_is_the_product_with_itself():
    layer = GauntSelfInteraction("3x0e+3x1o+3x2e", dtype=F64)
    product = GauntTensorProduct("3x0e+3x1o+3x2e", "3x0e+3x1o+3x2e", "3x0e+3x1o+3x2e", dtype=F64)
    product.load_state_dict(layer.state_dict())
    x = layer.irreps_in.randn(5, -1, dtype=F64)
    z = FlatIrreps("", layer.irreps_out).split(layer(x))
    want = FlatIrreps("", layer.irreps_out).split(product(x, x))
    # Up to the normalisation, which knows that the factors are one: of scalars every path is a degree with itself.
    assert_close_rel(z[1, 0] * math.sqrt(2), want[1, 0], rtol=1e-12)
    for part, value in z.items():
        ratio = (value / want[part]).flatten()
        assert 0.7 < ratio[0] < 1.01 and torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-9)


def test_self_interaction_has_no_bracket_of_a_part_with_itself():
    with pytest.raises(ValueError, match=r"irreps_out.*1e"):
        GauntSelfInteraction("2x1o", "2x1e", antisymmetric=True)
    assert GauntSelfInteraction("2x1o+2x2e", "2x2o", antisymmetric=True).weight_numel


# ------------------------------------------------------------------------------------------------------ convolution


def conv_inputs(module, nodes, edges, dtype=F64):
    edge_index = torch.randint(nodes, (2, edges))
    return (
        module.irreps_in.randn(nodes, -1, dtype=dtype),
        torch.randn(edges, 3, dtype=dtype),
        edge_index,
        torch.randn(edges, module.weight_numel, dtype=dtype),
    )


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_conv_is_e3nn_with_spherical_harmonics_and_a_scatter(float64_default, antisymmetric):
    o3 = e3nn_o3()
    irreps, lmax_filter, channels = "3x0e+3x1o+3x1e", 2, 3
    module = GauntConv(irreps, lmax_filter, irreps, antisymmetric=antisymmetric)
    x, edge_vec, edge_index, weight = conv_inputs(module, 5, 12)

    variance = variances(module.couplings)
    place = {(ir.p * (-1) ** ir.l, ir.l): i for i, (_, ir) in enumerate(module.irreps_in)}
    instructions, columns, begin = [], [], 0
    for c in module.couplings:
        of_coupling = weight[:, begin : begin + channels * len(c.degrees2)].unflatten(1, (channels, -1))
        begin += channels * len(c.degrees2)
        for (j, l2), l1, l3 in itertools.product(enumerate(c.degrees2), c.degrees1, c.degrees_out):
            if couples(c.antisymmetric, l1, l2, l3):
                instructions.append((place[c.sign1, l1], l2, place[c.sign_out, l3], "uvu", True))
                size = path_scale(c.antisymmetric, l1, l2, l3) / math.sqrt(variance[c.sign_out, l3])
                columns.append(of_coupling[:, :, j] * size)
    assert begin == module.weight_numel

    harmonics = o3.Irreps.spherical_harmonics(lmax_filter)
    theirs = e3nn_product(
        irreps, harmonics, irreps, instructions, shared_weights=False,
        irrep_normalization="none", path_normalization="none",
    )  # fmt: skip
    y = o3.spherical_harmonics(harmonics, edge_vec, normalize=True, normalization="component")
    messages = theirs(x[edge_index[0]], y, torch.cat(columns, dim=1))
    want = torch.zeros(5, messages.shape[1], dtype=F64).index_add(0, edge_index[1], messages)
    assert_close_rel(module(x, edge_vec, edge_index, weight), want, rtol=1e-12)


def test_conv_takes_edges_in_order_and_another_layout():
    irreps = "3x0e+3x1o"
    module, other = GauntConv(irreps, 1, irreps), GauntConv(irreps, 1, irreps, layout="ir_mul")
    x, edge_vec, edge_index, weight = conv_inputs(module, 5, 12)
    z = module(x, edge_vec, edge_index, weight)
    assert torch.equal(module(x, edge_vec, edge_order(edge_index, 5), weight), z)
    flat, turned = FlatIrreps("", irreps), FlatIrreps("", irreps, "ir_mul")
    again = other(turned.join(flat.split(x)), edge_vec, edge_index, weight)
    assert_close_rel(again, turned.join(flat.split(z)))


def test_conv_with_edges_along_the_poles_and_without_length():
    module = GauntConv("3x0e+3x1o", 2, "3x0e+3x1o+3x1e+3x2e", antisymmetric=True)
    x, _, _, weight = conv_inputs(module, 3, 3)
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
    edge_vec = torch.tensor([[0, 1, 0], [0, -2, 0], [0, 0, 0]], dtype=F64, requires_grad=True)
    z = module(x, edge_vec, edge_index, weight)
    (gradient,) = torch.autograd.grad(z.square().sum(), edge_vec, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), edge_vec)
    assert z.isfinite().all() and gradient.isfinite().all() and second.isfinite().all()
    assert gradient[:2].any() and not gradient[2].any()


def test_conv_exports_with_any_number_of_nodes_and_edges():
    module = GauntConv("2x0e+2x1o", 1, "2x0e+2x1o")
    nodes, edges = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes = ({0: nodes}, {0: edges}, {1: edges}, {0: edges})
    program = torch.export.export(module, conv_inputs(module, 4, 7, torch.float32), dynamic_shapes=shapes)
    args = conv_inputs(module, 6, 9, torch.float32)
    assert_close_rel(program.module()(*args), module(*args))


# -------------------------------------------------------------------------------------------------------- many-body


def powers_by_quadrature(x, irreps, out, correlation):
    """(order, Irrep of ``out``) -> (N, C, 2l + 1): powers at the points of a fine grid, split by their parity in the
    pseudo-signal, projected on e3nn's harmonics."""
    o3 = e3nn_o3()
    points, weights = sphere_quadrature(correlation * irreps.lmax + out.lmax + 4)

    def harmonics(degree):
        return o3.spherical_harmonics([degree], points, normalize=True, normalization="integral").to(F64)

    field = {1: 0, -1: 0}
    for (_, ir), place in zip(irreps, irreps.slices(), strict=True):
        field[ir.p * (-1) ** ir.l] = field[ir.p * (-1) ** ir.l] + x[..., place] @ harmonics(ir.l).T
    found = {}
    for order in range(1, correlation + 1):
        for _, ir in out:
            odd = int(ir.p * (-1) ** ir.l < 0)
            value = sum(
                math.comb(order, k) * field[1] ** (order - k) * field[-1] ** k for k in range(odd, order + 1, 2)
            )
            found[order, ir] = (value * weights) @ harmonics(ir.l)
    return found


@pytest.mark.parametrize("irreps", ["2x0e+2x1o+2x2e", "2x0e+2x0o+2x1e+2x1o", "2x0o+2x1e"])
def test_contraction_is_weighted_powers_on_the_sphere(irreps):
    o3 = e3nn_o3()
    out = o3.Irreps(irreps)
    components = o3.Irreps([(1, ir) for _, ir in out])
    module = GauntSymmetricContraction(irreps, irreps, 3, 4, dtype=F64)
    x, elements = torch.randn(5, 2, components.dim, dtype=F64), torch.tensor([0, 3, 1, 1, 2])
    powers = powers_by_quadrature(x, components, out, 3)
    want = []
    for _, ir in out:
        total = 0
        for term, (order, sign, degree) in enumerate(module.terms):
            if (degree, sign * (-1) ** degree) == (ir.l, ir.p):
                power = powers[order, ir]
                total = total + module.weight[elements, term, :, None] * power * module._scales[term]
        want.append(total.flatten(1))
    assert_close_rel(module(x, elements), torch.cat(want, dim=1), rtol=1e-12)


def test_contraction_takes_elements_one_hot_or_as_integers():
    module = GauntSymmetricContraction("2x0e+2x1o", "2x0e", 2, 3)
    x, elements = torch.randn(4, 2, 4), torch.tensor([2, 0, 1, 2])
    one_hot = torch.nn.functional.one_hot(elements, 3)
    assert_close_rel(module(x, elements), module(x, one_hot))
    assert torch.equal(module(x, one_hot), module(x, one_hot.float()))


def test_contraction_has_no_constant_term_and_only_terms_that_exist():
    module = GauntSymmetricContraction("2x1o", "2x0e+2x1o", 3, 1)
    assert module.terms == ((1, 1, 1), (2, 1, 0), (3, 1, 1))
    assert not module(torch.zeros(3, 2, 3), torch.zeros(3, dtype=torch.int64)).any()
    with pytest.raises(ValueError, match=r"irreps_out.*1e"):
        GauntSymmetricContraction("2x0e+2x1o", "2x0e+2x1e", 3, 1)


# --------------------------------------------------------------------------------------------------- taking over e3nn


def test_from_e3nn_computes_the_same(float64_default):
    theirs = e3nn_product(
        "4x0e+4x1o", "1x0e+1x1o", "4x0e+4x1o+4x1e",
        [(0, 0, 0, "uvu", True), (1, 1, 0, "uvu", True), (1, 0, 1, "uvu", True), (1, 1, 2, "uvu", True)],
    )  # fmt: skip
    ours = GauntTensorProduct.from_e3nn(theirs)
    x, y = theirs.irreps_in1.randn(3, -1, dtype=F64), theirs.irreps_in2.randn(3, -1, dtype=F64)
    assert (ours.irreps_out, ours.weight_numel) == (theirs.irreps_out, theirs.weight_numel)
    assert_close_rel(ours(x, y), theirs(x, y), rtol=1e-12)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GauntTensorProduct("2x1o", "2x1o", "2x1e"), r"irreps_out.*antisymmetric=False.*with 1e"),
        (lambda: GauntTensorProduct("2x1o", "2x1o", "2x0e+2x2o+2x3o"), r"irreps_out.*with 2o, 3o"),
        (lambda: GauntTensorProduct("2x1o", "2x0e+3x1o"), r"irreps_in2.*multiplicity 2.*'uuu'.*2x0e\+3x1o"),
        (lambda: GauntTensorProduct("2x0e+3x1o", "0e", connection="uvu"), r"irreps_in1.*equal multip.*2x0e\+3x1o"),
        (lambda: GauntTensorProduct("2x1o", "2x1o", "3x0e"), r"irreps_out.*multiplicity 2.*3x0e"),
        (lambda: GauntConv("2x1o", 0, "2x0e"), r"irreps_out.*with 0e"),
    ],
)
def test_what_cannot_be_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_shapes_that_do_not_fit_are_named():
    module = GauntTensorProduct("2x0e+2x1o", "2x0e", "2x0e+2x1o")
    x, y = torch.randn(4, 8), torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"x must have irreps_in1.dim = 8"):
        module(y, y)
    with pytest.raises(ValueError, match=r"y must have leading dimensions that broadcast with those of x"):
        module(x, y[:3])
    with pytest.raises(TypeError, match="y must have a real floating-point dtype"):
        module(x, y.to(torch.complex64))
    with pytest.raises(ValueError, match="weight must have weight_numel"):
        module(x, y, torch.randn(3))
