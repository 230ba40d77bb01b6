"""The sparse product in plain torch against e3nn's coefficients, with all its derivatives, and its specification."""

import pytest
import torch

import torchlayers
from torchlayers.gaunt import sparse
from torchlayers.gaunt.coefficients import bracket_scale, gaunt_scale, paths
from torchlayers.gaunt.sparse import SparseSpec, gaunt_spec, sparse_product
from torchlayers.testing import assert_close_rel, nan_empty, relative_error


def all_paths(lmax1, lmax2, lmax3, kind="cg"):
    triples = paths(lmax1, lmax2, lmax3, antisymmetric="both")
    blocks = [(a * a, a, b * b, b, c * c, c, kind, 0.5 + n % 3) for n, (a, b, c) in enumerate(triples)]
    return SparseSpec((lmax1 + 1) ** 2, (lmax2 + 1) ** 2, (lmax3 + 1) ** 2, blocks)


SPECS = {
    "degree 1": all_paths(1, 1, 1),
    "degree 2": all_paths(2, 1, 2),
    "unsorted": SparseSpec(9, 9, 9, all_paths(2, 2, 2).paths[::-1]),
    # A block of y that overlaps another, components that nothing uses, the same path twice, outputs that overlap.
    "irregular": SparseSpec(
        11, 12, 13,
        [
            (8, 1, 0, 0, 1, 1, "cg", 0.5), (0, 2, 2, 2, 5, 2, "cg", 1.0), (8, 1, 3, 1, 9, 1, "bracket", -2.0),
            (0, 2, 2, 2, 5, 2, "gaunt", 1.0), (8, 1, 3, 1, 0, 0, "gaunt", 2.0), (7, 0, 0, 0, 12, 0, "cg", 3.0),
        ],
    ),
    "irregular, degree 1": SparseSpec(
        5, 4, 6, [(2, 1, 1, 1, 1, 1, "bracket"), (2, 1, 1, 1, 3, 1, "cg"), (0, 0, 1, 1, 2, 1, "cg")]
    ),
    "degree 4": SparseSpec(9, 16, 9, [(0, 4, 0, 3, 0, 4, "cg"), (0, 4, 9, 3, 1, 3, "cg"), (0, 4, 7, 0, 0, 4, "cg")]),
}  # fmt: skip


def make(spec, batch, channels, common, weights, dtype=torch.float64):
    sizes = [(batch, channels, spec.n1), (batch, 1 if common else channels, spec.n2)]
    if weights is not None:
        sizes.append((*((batch,) if weights == "each" else ()), channels, len(spec.paths)))
    tensors = [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]
    return tensors if weights is not None else [*tensors, None]


def dense(spec):
    """T[p, i, j, k] from e3nn's coefficients."""
    pytest.importorskip("e3nn", reason="the oracle is e3nn")
    from torchlayers.gaunt.irreps import e3nn_o3

    o3 = e3nn_o3()
    table = torch.zeros(len(spec.paths), spec.n1, spec.n2, spec.n3, dtype=torch.float64)
    for p, path in enumerate(spec.paths):
        degrees = path.l1, path.l2, path.l3
        scale = {"cg": lambda *_: 1.0, "gaunt": gaunt_scale, "bracket": bracket_scale}[path.kind](*degrees)
        block = o3.wigner_3j(*degrees, dtype=torch.float64)
        spans = (
            slice(o, o + 2 * d + 1) for o, d in zip((path.offset1, path.offset2, path.offset3), degrees, strict=True)
        )
        table[(p, *spans)] += path.scale * scale * block
    return table


def definition(x, y, w, table):
    each = torch.einsum("bci,bcj,pijk->bcpk", x, y.expand(-1, x.shape[1], -1), table)
    return each.sum(2) if w is None else (each * w[..., None]).sum(2)


def derivatives(function, tensors, third=False):
    inputs = [t for t in tensors if t is not None]
    z = function(*tensors)
    g = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view_as(z).requires_grad_()
    first = torch.autograd.grad(z, inputs, g, create_graph=True)
    bent = sum((t**3).sum() for t in first)
    second = torch.autograd.grad(bent, [*inputs, g], create_graph=third)
    if not third:
        return z, *first, *second
    return z, *first, *second, *torch.autograd.grad(sum((t**2).sum() for t in second), [*inputs, g])


@pytest.mark.parametrize("third", [False, True], ids=["two derivatives", "three"])
@pytest.mark.parametrize("weights", [None, "shared", "each"], ids=str)
@pytest.mark.parametrize("common", [False, True], ids=["uuu", "uvu"])
@pytest.mark.parametrize("name", SPECS)
def test_values_and_derivatives(name, common, weights, third, monkeypatch):
    monkeypatch.setattr(sparse, "_CHUNK", 500)  # several pieces, the last one smaller
    spec = SPECS[name]
    tensors, table = make(spec, 7, 3, common, weights), dense(spec)
    with nan_empty():
        ours = derivatives(lambda *t: sparse_product(*t, spec), tensors, third)
    wanted = derivatives(lambda *t: definition(*t, table), tensors, third)
    for mine, reference in zip(ours, wanted, strict=True):
        assert_close_rel(mine, reference, rtol=1e-13)


@pytest.mark.parametrize("weights", [None, "shared", "each"], ids=str)
@pytest.mark.parametrize("common", [False, True], ids=["uuu", "uvu"])
def test_every_way_of_multiplying_is_the_same(common, weights, monkeypatch):
    spec = all_paths(2, 2, 3)
    tensors = make(spec, 4, 5, common, weights)
    monkeypatch.setattr(sparse, "_LARGEST_FOLD", 0)
    for function in (sparse._by_pairs, sparse_product):
        assert_close_rel(function(*tensors, spec), definition(*tensors, dense(spec)), rtol=1e-13)


@pytest.mark.parametrize("weights", [None, "shared", "each"], ids=str)
@pytest.mark.parametrize("common", [False, True], ids=["uuu", "uvu"])
@pytest.mark.parametrize("name", ["degree 1", "degree 2", "degree 4"])
def test_vmap_of_values_and_derivatives(name, common, weights):
    """Every argument alone, and all of them, with a dimension of vmap's; gradients, and theirs by what is mapped."""
    spec, table = SPECS[name], dense(SPECS[name])
    tensors = [t.detach() for t in make(spec, 4, 2, common, weights) if t is not None]
    mapped = [torch.stack([t, torch.randn_like(t), t.roll(1, 0)], 1) for t in tensors]

    def both(function):
        def value(*t):
            return function(t[0], t[1], t[2] if len(t) > 2 else None)

        def slope(*t):
            gradients = torch.func.grad(lambda *t: value(*t).sin().sum(), tuple(range(len(t))))(*t)
            return sum((g**3).sum() for g in gradients)

        return value, slope, torch.func.grad(slope, tuple(range(len(tensors))))

    ours, wanted = both(lambda *t: sparse_product(*t, spec)), both(lambda *t: definition(*t, table))
    for chosen in [{n} for n in range(len(tensors))] + [set(range(len(tensors)))]:
        arguments = [mapped[n] if n in chosen else t for n, t in enumerate(tensors)]
        dims = tuple(1 if n in chosen else None for n in range(len(tensors)))
        for mine, reference in zip(ours, wanted, strict=True):
            found, expected = (torch.vmap(f, dims)(*arguments) for f in (mine, reference))
            for a, b in zip(*((t,) if torch.is_tensor(t) else t for t in (found, expected)), strict=True):
                assert_close_rel(a, b, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 4)], ids=str)
def test_one_sample_or_channel(shape):
    spec = all_paths(2, 1, 2)
    for common in (False, True):
        for weights in (None, "shared", "each"):
            tensors = make(spec, *shape, common, weights)
            assert_close_rel(sparse_product(*tensors, spec), definition(*tensors, dense(spec)), rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision(dtype):
    spec = gaunt_spec(3, 3, 3)
    tensors = make(spec, 20, 6, True, "each", dtype)
    z = sparse_product(*tensors, spec)
    assert z.dtype == dtype
    assert_close_rel(z, definition(*(t.detach().double() for t in tensors), dense(spec)))


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_gaunt_specification_has_every_path_of_a_parity(antisymmetric):
    spec = gaunt_spec(2, 3, 4, antisymmetric=antisymmetric)
    assert (spec.n1, spec.n2, spec.n3) == (9, 16, 25)
    assert [(p.l1, p.l2, p.l3) for p in spec.paths] == paths(2, 3, 4, antisymmetric=antisymmetric)
    assert {(p.kind, p.scale) for p in spec.paths} == {("bracket" if antisymmetric else "gaunt", 1.0)}


def test_a_specification_is_its_string():
    spec = SparseSpec(4, 4, 1, [(1, 1, 1, 1, 0, 0, "cg", 1 / 3), (0, 0, 0, 0, 0, 0, "gaunt", -1e-300)])
    again = SparseSpec.parse(spec.key)
    assert again == spec and hash(again) == hash(spec) and again.paths == spec.paths and again.code == spec.code
    assert spec != SparseSpec(4, 4, 1, spec.paths[:1]) and spec != spec.key
    assert torch.equal(sparse._paths_table(*spec.code)[1, 0, 0], -1e-300 * sparse.gaunt_coefficients(0, 0, 0)[0, 0, 0])


def test_nothing_to_do():
    spec = all_paths(2, 2, 2)
    for weights in (None, "shared", "each"):
        for common in (False, True):
            for batch, channels in ((0, 3), (3, 0)):
                tensors = make(spec, batch, channels, common, weights)
                z = sparse_product(*tensors, spec)
                assert z.shape == (batch, channels, 9)
                inputs = [t for t in tensors if t is not None]
                for g, t in zip(torch.autograd.grad(z.sum(), inputs), inputs, strict=True):
                    assert g.shape == t.shape and not g.any()
    x, y, _ = make(SparseSpec(4, 9, 5, []), 2, 3, False, None)
    z = sparse_product(x, y, None, SparseSpec(4, 9, 5, []))
    assert z.shape == (2, 3, 5) and not z.any()
    assert not any(g.any() for g in torch.autograd.grad(z.sum(), (x, y)))


def test_dispatch_and_autocast():
    spec = gaunt_spec(1, 1, 1)
    x, y, w = (t.detach() for t in make(spec, 3, 2, True, "each", torch.float32))
    z = sparse_product(x, y, w, spec)
    assert torchlayers.last_dispatch() == "torch: tensors on the CPU"
    with torch.autocast("cpu", torch.bfloat16):
        same = sparse_product(x, y, w, spec)
        mixed = sparse_product(x.bfloat16(), y, w, spec)
    assert torch.equal(same, z) and mixed.dtype == torch.float32
    assert relative_error(mixed, z) < 1e-2


@pytest.mark.parametrize("weights", [None, "shared", "each"], ids=str)
def test_one_graph_for_any_batch(weights):
    spec = gaunt_spec(2, 2, 2)

    def loss(*tensors):
        return sparse_product(*tensors, spec).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 7):
        tensors = make(spec, batch, 3, weights == "each", weights)
        inputs = [t for t in tensors if t is not None]
        results = [torch.autograd.grad(f(*tensors), inputs) for f in (loss, compiled)]
        for mine, reference in zip(results[1], results[0], strict=True):
            assert_close_rel(mine, reference, rtol=1e-13)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 2, 5)}, ValueError, "x must have n1 = 4 at dimension 2, got 5"),
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must have 3 dimensions \(B, C, n1\)"),
        ({"x": torch.zeros(3, 2, 4, dtype=torch.complex64)}, TypeError, "x must have a real floating-point dtype"),
        ({"x": torch.zeros(3, 2, 4, dtype=torch.int64)}, TypeError, "x must have a real floating-point dtype"),
        ({"y": torch.zeros(3, 3, 4)}, ValueError, r"y must have C \(or 1\) = 2 at dimension 1, got 3"),
        ({"y": torch.zeros(4, 2, 4)}, ValueError, "y must have B = 3 at dimension 0, got 4"),
        (
            {"y": torch.zeros(3, 2, 4).double()},
            TypeError,
            "y must have the dtype of x, torch.float32, got torch.float64",
        ),
        ({"y": torch.zeros(3, 2, 4, device="meta")}, ValueError, "y must be on the device of x"),
        ({"weight": torch.zeros(2, 3)}, ValueError, "weight must have P = 4 at dimension -1, got 3"),
        ({"weight": torch.zeros(3, 4)}, ValueError, "weight must have C = 2 at dimension -2, got 3"),
        ({"weight": torch.zeros(1, 2, 4)}, ValueError, "weight must have B = 3 at dimension 0, got 1"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_refuses_tensors(change, error, message):
    args = {"x": torch.zeros(3, 2, 4), "y": torch.zeros(3, 2, 4), "weight": torch.zeros(2, 4)} | change
    with pytest.raises(error, match=message):
        sparse_product(spec=gaunt_spec(1, 1, 1), **args)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, 4, 4, [(2, 1, 1, 1, 1, 1)]), ValueError, r"paths\[0\] must lie within n1 = 4 components, got degree 1"),
        (
            (4, 4, 4, [(1, 1, 1, 1, 1, 1, "dense")]),
            ValueError,
            r"paths\[0\]\.kind must be one of 'gaunt'",
        ),
        ((4, 4, 9, [(0, 0, 1, 1, 4, 2)]), ValueError, r"paths\[0\] must couple.*got \(0, 1, 2\)"),
        ((4, 4, 4, [(1, 1, 1, 1, 0, 0, "cg", float("inf"))]), ValueError, r"paths\[0\]\.scale must be finite"),
        ((4, 4, 4, [(1, -1, 1, 1, 0, 0)]), ValueError, r"paths\[0\]\.l1 must be at least 0"),
        ((4.0, 4, 4, []), TypeError, "n1 must be an int"),
    ],
)
def test_refuses_specifications(arguments, error, message):
    with pytest.raises(error, match=message):
        SparseSpec(*arguments)
