"""Polynomials on the sphere, in Triton's interpreter or on a GPU, against integrals over a whole grid in float64."""

import math

import pytest
import torch

from torchlayers._tables import table
from torchlayers.gaunt.sphere import sphere_quadrature, spherical_harmonics
from torchlayers.kernels import sphere_product as kernels
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

# (rows, channels of x, channels of y), (L1, L2, L3): one row, no full tile, several tiles, y or x for all channels.
CASES = [
    ((1, 1, 1), (2, 1, 3)),
    ((70, 1, 1), (2, 1, 3)),
    ((1, 70, 70), (1, 2, 2)),
    ((7, 5, 5), (0, 0, 0)),
    ((5, 3, 1), (3, 3, 6)),
    ((2, 1, 37), (1, 3, 2)),
    ((5, 4, 4), (4, 0, 4)),
    ((2, 1, 1), (5, 1, 6)),
]


def signal(batch, channels, degree, device, dtype=torch.float32):
    return torch.randn(batch, channels, (degree + 1) ** 2, device=device).to(dtype).requires_grad_()


def pair(shape, degrees, device, dtype=torch.float32):
    return [signal(shape[0], c, degree, device, dtype) for c, degree in zip(shape[1:], degrees, strict=False)]


def tables(kind, degrees, device, dtype=torch.float32):
    """Of a half sphere that is fine enough: for two signals and a result."""
    total = sum(degrees)
    names = ["gaunt_harmonics" if kind == "product" else "gaunt_tangent"] * 2 + ["gaunt_harmonics"]
    found = [table(name, n, total, dtype=dtype, device=device) for name, n in zip(names, degrees, strict=True)]
    return [*found, table("gaunt_weights", total, dtype=dtype, device=device)]


def power_tables(degree, result, highest, device, dtype=torch.float32):
    total = highest * degree + result
    found = [table("gaunt_harmonics", n, total, dtype=dtype, device=device) for n in (degree, result)]
    return [*found, table("gaunt_weights", total, dtype=dtype, device=device)]


def whole_grid(total, *degrees):
    """Harmonics of each degree at all points of a Gauss–Legendre grid, and its weights."""
    points, weights = sphere_quadrature(total + 2)
    return [spherical_harmonics(degree, points) for degree in degrees], weights, points


def exact(tensors):
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


def product(x, y, degrees):
    (first, second, third), weights, _ = whole_grid(sum(degrees), *degrees)
    return (x @ first.T) * (y @ second.T) * weights @ third


def slopes(degree, points):
    """∇Y (points, 3, n) by autograd: the part along r is arbitrary, and of no consequence below."""
    points = points.clone().requires_grad_()
    values = spherical_harmonics(degree, points)
    # The value at a point depends on no other point. Y_0 on none at all: the zero makes it differentiable.
    columns = [(c + 0 * points[:, 0]).sum() for c in values.unbind(1)]
    return torch.stack([torch.autograd.grad(c, points, retain_graph=True)[0] for c in columns], dim=2)


def bracket(x, y, degrees):
    """r · (∇X × ∇Y), projected."""
    (third,), weights, points = whole_grid(sum(degrees), degrees[2])
    along = [
        torch.einsum("bcn,gin->bcgi", f, slopes(degree, points)) for f, degree in zip((x, y), degrees[:2], strict=True)
    ]
    return (torch.linalg.cross(*torch.broadcast_tensors(*along)) * points).sum(-1) * weights @ third


def power(x, degree, result, nu):
    (first, third), weights, _ = whole_grid(nu * degree + result, degree, result)
    return (x @ first.T) ** nu * weights @ third


OPERATIONS = {
    "product": (kernels.sphere_product, product),
    "bracket": (kernels.sphere_bracket, bracket),
}


def grad(y, tensors, g, **options):
    return torch.autograd.grad(y, tensors, g, **options)


def check_derivatives(ours, wanted, tensors, wide):
    """Gradients by all tensors, and those of a random combination of these by all tensors and the cotangents."""
    cotangents = [torch.randn_like(z).requires_grad_() for z in ours]
    wide_cotangents = exact(cotangents)
    with nan_empty():
        first = grad(ours, tensors, cotangents, create_graph=True)
        directions = [torch.randn_like(g) for g in first]
        second = grad(first, [*tensors, *cotangents], directions, allow_unused=True)
    wide_first = grad(wanted, wide, wide_cotangents, create_graph=True)
    wide_second = grad(wide_first, [*wide, *wide_cotangents], exact(directions), allow_unused=True)
    for found, reference in zip((*first, *second), (*wide_first, *wide_second), strict=True):
        if reference is None or not reference.any():
            assert found is None or not found.any()
            continue
        assert found.dtype == ours[0].dtype
        assert_close_rel(found, reference)


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize(("shape", "degrees"), CASES, ids=str)
def test_values_and_two_derivatives(shape, degrees, kind, device):
    ours, definition = OPERATIONS[kind]
    tensors = pair(shape, degrees, device)
    wide = exact(tensors)
    with nan_empty():
        z = ours(*tensors, *tables(kind, degrees, device))
    wanted = definition(*wide, degrees)
    assert z.shape == (shape[0], max(shape[1:]), (degrees[2] + 1) ** 2) and z.is_contiguous()
    if kind == "bracket" and 0 in degrees[:2]:  # of a constant
        assert not z.any()
        return
    assert_close_rel(z, wanted)
    check_derivatives([z], [wanted], tensors, wide)


@pytest.mark.parametrize("powers", [(1,), (2,), (3,), (2, 3), (1, 4, 2)], ids=str)
@pytest.mark.parametrize(("shape", "degrees"), [((1, 1), (2, 3)), ((5, 14), (1, 2)), ((3, 3), (3, 0))], ids=str)
def test_powers(shape, degrees, powers, device):
    (x,) = pair((*shape,), degrees, device)
    (wide,) = exact([x])
    with nan_empty():
        z = kernels.sphere_power(x, *power_tables(*degrees, max(powers), device), powers)
    wanted = [power(wide, *degrees, nu) for nu in powers]
    assert len(z) == len(powers)
    for found, reference in zip(z, wanted, strict=True):
        if reference.any():
            assert_close_rel(found, reference)
    check_derivatives(z, wanted, [x], [wide])


def test_third_derivatives(device):
    """Of three powers: more signals than the kernel takes, so that it is plain torch at last."""
    (x,) = pair((2, 3), (1, 2), device)
    (wide,) = exact([x])

    def third(x, powers):
        for _ in range(3):
            value = sum(z.sum() for z in powers) if isinstance(powers, tuple) else powers.square().sum()
            (powers,) = torch.autograd.grad(value, x, create_graph=True)
        return powers

    ours = third(x, kernels.sphere_power(x, *power_tables(1, 2, 4, device), (2, 3, 4)))
    assert_close_rel(ours, third(wide, tuple(power(wide, 1, 2, nu) for nu in (2, 3, 4))), rtol=1e-5)


@pytest.mark.parametrize("meta", [(16, 16), (32, 32), (128, 64)], ids=str)
def test_tiles(meta, device):
    """Any tile, with sums over channels and without; on a GPU the configurations that are chosen from as well."""
    plan = kernels._sizes(kernels._parse(kernels._PRODUCT), *([torch.empty(1, 1, 9)] * 2,), [torch.empty(1, 9)] * 3)
    options = [dict(zip(("BR", "BG"), meta, strict=True), num_warps=4, num_stages=1)]
    options += kernels._candidates(plan, kernels._lib.target_of(device))
    x, y = (t.detach() for t in pair((3, 19, 19), (2, 2, 2), device))
    *bases, weights = tables("product", (2, 2, 2), device)
    wanted = product(x.double().cpu(), y.double().cpu(), (2, 2, 2))
    for option in options:
        for reduce in (False, True):
            with nan_empty():
                (z,) = kernels._launch([x, y], bases, weights, kernels._PRODUCT, 19, [reduce], candidates=[option])
            assert_close_rel(z, wanted.sum(1, keepdim=True) if reduce else wanted)


@pytest.mark.parametrize("kind", OPERATIONS)
def test_strided(kind, device):
    """Components before channels, rows far apart, one signal for the whole batch, tables read backwards."""
    degrees = (2, 1, 3)
    x = torch.randn(9, 4, 11, device=device).permute(2, 1, 0)[::2].requires_grad_()
    y = torch.randn(1, 4, 8, device=device)[..., ::2].expand(6, 4, 4).requires_grad_()
    assert not x.is_contiguous() and not y.is_contiguous()
    ours, definition = OPERATIONS[kind]
    every = [t.flip(-2).transpose(-1, -2).contiguous().transpose(-1, -2) for t in tables(kind, degrees, device)[:3]]
    weights = tables(kind, degrees, device)[3].flip(0)
    wide = exact([x, y])
    z = ours(x, y, *every, weights)
    wanted = definition(*wide, degrees)
    assert_close_rel(z, wanted)
    check_derivatives([z], [wanted], [x, y], wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, device):
    """Sums are in float32: only what is stored is rounded."""
    degrees = (2, 1, 3)
    x, y = pair((6, 7, 1), degrees, device, dtype)
    wide = exact([x, y])
    z = kernels.sphere_product(x, y, *tables("product", degrees, device))
    wanted = product(*wide, degrees)
    assert z.dtype == dtype
    assert_close_rel(z, wanted)
    g = torch.randn_like(z)
    for found, reference in zip(grad(z, (x, y), g), grad(wanted, wide, g.double().cpu()), strict=True):
        assert found.dtype == dtype
        assert_close_rel(found, reference)


@pytest.mark.parametrize("kind", OPERATIONS)
def test_float64_is_exact_and_passes_gradgradcheck(kind, device):
    degrees = (2, 1, 3)
    ours, definition = OPERATIONS[kind]
    x, y = (t.detach().double().requires_grad_() for t in pair((2, 2, 1), degrees, device))
    constants = tables(kind, degrees, device, torch.float64)
    assert_close_rel(ours(x, y, *constants), definition(*exact([x, y]), degrees), rtol=1e-13)
    assert torch.autograd.gradcheck(lambda x, y: ours(x, y, *constants), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: ours(x, y, *constants), (x, y))


def test_what_the_kernel_leaves_to_plain_torch(device):
    assert kernels.unsupported((4, 4), (8,), torch.float32) is None
    assert kernels.unsupported((8, 8), (16,), torch.bfloat16) is None
    assert kernels.unsupported((4, 4), (4,), torch.float64) == "float64"
    assert "too many components" in kernels.unsupported((16, 16), (32,), torch.float32)
    assert "7 signals" in kernels.unsupported((1,) * 7, (1,), torch.float32)
    degrees = (16, 1, 17)
    assert kernels.unsupported(degrees[:2], degrees[2:], torch.float32) is not None
    x, y = (t.detach() for t in pair((1, 2, 1), degrees, device))
    z = kernels.sphere_product(x, y, *tables("product", degrees, device))
    assert_close_rel(z, product(*exact([x, y]), degrees))


@pytest.mark.parametrize("wants", [(True, False), (False, True)], ids=str)
def test_some_gradients(wants, device):
    degrees = (2, 1, 3)
    tensors = pair((3, 2, 1), degrees, device)
    constants = tables("product", degrees, device)
    every = torch.autograd.grad(kernels.sphere_product(*tensors, *constants).square().sum(), tensors)
    some = [t.detach().requires_grad_(want) for t, want in zip(tensors, wants, strict=True)]
    kernels.sphere_product(*some, *constants).square().sum().backward()
    for t, wanted in zip(some, every, strict=True):
        assert (t.grad is None) == (not t.requires_grad)
        if t.requires_grad:
            assert_close_rel(t.grad, wanted.double())


def test_a_derivative_reads_only_what_it_needs():
    """The gradient of a product by x: y and the cotangent, not x. All at once: one plan, with two results."""
    found = kernels._derivative(kernels._PRODUCT, (True,), (True, False))
    assert found.signals == (1, 2) and found.results == (0,) and found.tables == (0, 1, 2)
    plan = kernels._parse(found.text)
    assert plan.projections == ((0, 0, ((1, (1, 1)),)),)
    both = kernels._derivative(kernels._PRODUCT, (True,), (True, True))
    assert both.signals == (0, 1, 2) and both.results == (0, 1)
    assert kernels._derivative(kernels._PRODUCT, (False,), (True, True)) is None
    # d/dx of ⟨g, x³⟩ is 3x²g.
    cubic = kernels._parse(kernels._derivative(kernels._power((3,)), (True,), (True,)).text)
    assert cubic.projections == ((0, 0, ((3, (2, 1)),)),)


def test_large_results_are_launched_apart(device, monkeypatch):
    degrees = (2, 1, 3)
    tensors = pair((3, 2, 1), degrees, device)
    constants = tables("bracket", degrees, device)
    counts, original = [], kernels._check
    monkeypatch.setattr(kernels, "_check", lambda *a: counts.append(len(a[-1])) or original(*a))
    every = []
    for limit in (10**6, 0):
        monkeypatch.setattr(kernels, "_MAX_SHARED_LOAD", limit)
        every.append(torch.autograd.grad(kernels.sphere_bracket(*tensors, *constants).square().sum(), tensors))
    # Forward and both gradients; then again, with one launch for each gradient.
    assert counts == [1, 2, 1, 2, 1, 1]
    for apart, together in zip(*every, strict=True):
        assert_close_rel(apart, together.double())


def test_rows_do_not_touch(device):
    degrees = (2, 1, 3)
    x, y = (t.detach() for t in pair((9, 5, 5), degrees, device))
    constants = tables("product", degrees, device)
    clean = kernels.sphere_product(x, y, *constants)
    x[4, 2], y[7, 1, 0] = float("nan"), float("nan")
    z = kernels.sphere_product(x, y, *constants)
    hit = torch.zeros(9, 5, dtype=torch.bool, device=device)
    hit[4, 2] = hit[7, 1] = True
    assert not z[hit].isfinite().any(-1).any() and torch.equal(z[~hit], clean[~hit])


@pytest.mark.parametrize("shape", [(0, 3, 3), (4, 0, 0), (4, 0, 1), (0, 3, 1)], ids=str)
@pytest.mark.parametrize("kind", OPERATIONS)
def test_empty(shape, kind, device):
    tensors = pair(shape, (2, 1, 3), device)
    with nan_empty():
        z = OPERATIONS[kind][0](*tensors, *tables(kind, (2, 1, 3), device))
        found = torch.autograd.grad(z.sum(), tensors)
    assert z.shape == (shape[0], min(shape[1:]) if 0 in shape[1:] else shape[1], 16)
    for gradient, t in zip(found, tensors, strict=True):
        assert gradient.shape == t.shape and not gradient.any()


def test_repeated_runs_agree_bit_for_bit(device):
    degrees = (2, 2, 2)
    x, y = pair((1, 37, 1), degrees, device)
    constants = tables("bracket", degrees, device)

    def once():
        z = kernels.sphere_bracket(x, y, *constants)
        return z, *torch.autograd.grad(z.square().sum(), (x, y))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_full_graph_with_a_dynamic_batch(device):
    degrees = (2, 1, 3)
    constants = tables("product", degrees, device)

    def loss(x, y):
        return kernels.sphere_product(x, y, *constants).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        tensors = pair((batch, 2, 1), degrees, device)
        every = [torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss)]
        for found, reference in zip(*every, strict=True):
            assert_close_rel(found, reference.double())


def test_the_bracket_of_coordinates_is_a_rotation(device):
    """{Y_1i, Y_1j} = √(3 / 4π) ε_ijk Y_1k, cyclic in x, y, z."""
    x, y = torch.zeros(2, 1, 3, 4, device=device)
    for i in range(3):
        x[0, i, 1 + i] = y[0, i, 1 + (i + 1) % 3] = 1
    z = kernels.sphere_bracket(x, y, *tables("bracket", (1, 1, 2), device))
    wanted = torch.zeros(1, 3, 9)
    for i in range(3):
        wanted[0, i, 1 + (i + 2) % 3] = math.sqrt(3 / (4 * math.pi))
    assert_close_rel(z, wanted.double())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 9)}, ValueError, r"x must have shape \(B, C, n\), got \(2, 9\)"),
        ({"x": torch.zeros(3, 3, 9)}, ValueError, r"signals must have shape \(B, C or 1, n\) = \(3, 3 or 1, \*\)"),
        ({"y": torch.zeros(2, 2, 4)}, ValueError, r"\(2, 3 or 1, \*\), got \(2, 2, 4\) for signal 1"),
        ({"x": torch.zeros(2, 3, 8)}, ValueError, r"signals must have \(L \+ 1\)² components, got 8 for signal 0"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "tables must have the components of their signals, got 9 for 4"),
        ({"y": torch.zeros(2, 3, 4).half()}, TypeError, "signals must share a dtype"),
        ({"x": torch.zeros(2, 3, 9, dtype=torch.int32)}, TypeError, "signals must be float32.*got torch.int32"),
        ({"basis2": torch.zeros(5, 4)}, ValueError, r"tables must have shape \(H, n\) = \(13, \*\), got \(5, 4\)"),
        ({"projection": torch.zeros(13, 15)}, ValueError, r"tables must have \(L \+ 1\)² components"),
        ({"basis1": torch.zeros(13, 9).double()}, TypeError, "tables and weights must be torch.float32"),
        ({"weights": torch.zeros(13, 1)}, ValueError, r"weights must have shape \(H,\), got \(13, 1\)"),
    ],
)
def test_refuses(change, error, message, device):
    sizes = {"x": (2, 3, 9), "y": (2, 3, 4), "basis1": (13, 9), "basis2": (13, 4), "projection": (13, 16)}
    inputs = {k: torch.zeros(size) for k, size in (sizes | {"weights": (13,)}).items()} | change
    with pytest.raises(error, match=message):
        kernels.sphere_product(**{k: t.to(device) for k, t in inputs.items()})


def test_refuses_gradients_of_tables_and_wrong_powers(device):
    constants = power_tables(1, 1, 2, device)
    (x,) = pair((2, 3), (1, 1), device)
    learned = constants[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="tables and weights must not require gradients"):
        kernels.sphere_power(x, learned, *constants[1:], (2,))[0].sum().backward()
    for powers in ((), (2, 0)):
        with pytest.raises(ValueError, match="powers must be one or more numbers from 1 on"):
            kernels.sphere_power(x, *constants, powers)
    with pytest.raises(ValueError, match=r"tangent1 must have shape \(2, H, n\)"):
        kernels.sphere_bracket(x, x, constants[0], constants[0], *constants[1:])
