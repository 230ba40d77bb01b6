"""The unrolled sparse contraction, in Triton's interpreter or on a GPU, against dense coefficients in float64."""

import pytest
import torch

import torchlayers
from torchlayers.gaunt import sparse
from torchlayers.gaunt.sparse import SparseSpec, gaunt_spec
from torchlayers.kernels import sparse_product as kernels
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

# Blocks that several paths share, unused components between them, paths in no order, more of them than a group of
# weights holds, factors, and a block of y of every degree.
SPECS = {
    "gaunt": gaunt_spec(2, 1, 2),
    "bracket": gaunt_spec(2, 2, 1, antisymmetric=True),
    "one number": SparseSpec(1, 1, 1, [(0, 0, 0, 0, 0, 0, "cg", -1.5)]),
    "mixed": SparseSpec(
        9, 12, 13,
        [
            (1, 1, 0, 0, 1, 1, "cg", 0.5), (0, 0, 3, 2, 8, 2, "cg", 1.0), (5, 1, 9, 1, 4, 1, "bracket", -2.0),
            (1, 1, 9, 1, 0, 0, "gaunt", 3.0), (5, 1, 0, 0, 1, 1, "cg", 0.25), (5, 1, 9, 1, 4, 1, "cg", 1.0),
            (1, 1, 9, 1, 8, 2, "cg", 1.0), (0, 0, 0, 0, 0, 0, "cg", 1.0), (0, 0, 9, 1, 4, 1, "cg", 0.7),
            (1, 1, 3, 2, 4, 1, "cg", 1.1), (5, 1, 3, 2, 8, 2, "bracket", 0.4),
        ],
    ),
}  # fmt: skip
SHAPES = [(1, 1), (35, 3), (2, 40)]


@pytest.fixture(autouse=True)
def _numbers():
    sparse._teach_kernels()


def make(spec, shape, common, weights, device, dtype=torch.float64):
    batch, channels = shape
    sizes = [(batch, channels, spec.n1), (batch, 1 if common else channels, spec.n2)]
    if weights is not None:
        sizes.append((*((batch,) if weights == "each" else ()), channels, len(spec.paths)))
    tensors = [torch.randn(size, dtype=torch.float64).to(device, dtype).requires_grad_() for size in sizes]
    return tensors if weights is not None else [*tensors, None]


def definition(x, y, w, spec):
    table = sparse._paths_table(*spec.code).to(x).view(len(spec.paths), spec.n3, spec.n1, spec.n2)
    each = torch.einsum("bci,bcj,pkij->bcpk", x, y.expand(-1, x.shape[1], -1), table)
    return each.sum(2) if w is None else (each * w[..., None]).sum(2)


def derivatives(function, tensors, g=None):
    """Value, first derivatives, and second ones of something that bends every first one."""
    inputs = [t for t in tensors if t is not None]
    z = function(*tensors)
    g = torch.linspace(-1, 2, z.numel(), dtype=torch.float64).view_as(z).to(z) if g is None else g
    g = g.detach().requires_grad_()
    first = torch.autograd.grad(z, inputs, g, create_graph=True)
    bent = [(torch.linspace(1, 3, t.numel(), dtype=torch.float64).view_as(t).to(t) * t * t).sum() for t in first]
    return z, *first, *torch.autograd.grad(sum(bent), [*inputs, g])


def check(spec, tensors, rtol=None):
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    with nan_empty():
        ours = derivatives(lambda x, y, w: kernels.sparse_product(x, y, w, spec.key), tensors)
    wanted = derivatives(lambda x, y, w: definition(x, y, w, spec), exact)
    for mine, reference in zip(ours, wanted, strict=True):
        assert mine.dtype == tensors[0].dtype and mine.shape == reference.shape
        assert_close_rel(mine, reference, rtol=rtol)


@pytest.mark.parametrize("weights", [None, "shared", "each"], ids=str)
@pytest.mark.parametrize("common", [False, True], ids=["uuu", "uvu"])
@pytest.mark.parametrize(("spec", "shape"), [("mixed", (3, 5)), *[("gaunt", shape) for shape in SHAPES]], ids=str)
def test_values_and_two_derivatives(spec, shape, common, weights, device):
    check(SPECS[spec], make(SPECS[spec], shape, common, weights, device))


@pytest.mark.parametrize("weights", [None, "each"], ids=str)
@pytest.mark.parametrize("spec", ["bracket", "one number"])
def test_other_specifications(spec, weights, device):
    check(SPECS[spec], make(SPECS[spec], (5, 6), False, weights, device))


@pytest.mark.parametrize(("common", "weights"), [(False, None), (False, "shared"), (True, "each")], ids=str)
def test_float32(common, weights, device):
    check(SPECS["gaunt"], make(SPECS["gaunt"], (7, 20), common, weights, device, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, device):
    spec = SPECS["gaunt"]
    tensors = make(spec, (4, 6), True, "each", device, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    z, wanted = kernels.sparse_product(*tensors, spec.key), definition(*exact, spec)
    assert z.dtype == dtype
    assert_close_rel(z, wanted)
    g = torch.randn_like(z)
    every = zip(torch.autograd.grad(z, tensors, g), torch.autograd.grad(wanted, exact, g.double()), strict=True)
    for mine, reference in every:
        assert mine.dtype == dtype
        assert_close_rel(mine, reference)


def test_degree_three(device):
    spec = SparseSpec(7, 12, 10, [(0, 3, 0, 3, 3, 3, "cg"), (0, 3, 7, 2, 0, 1, "cg")])
    check(spec, make(spec, (2, 3), False, "shared", device))


@pytest.mark.parametrize("common", [False, True], ids=["uuu", "uvu"])
def test_any_strides(common, device):
    """Components or channels last, every other sample, a gradient expanded from one number."""
    spec, batch, channels = SPECS["mixed"], 4, 6
    x, y, w = make(spec, (batch, channels), common, "each", device)
    plain = [t.detach().clone() for t in (x, y, w)]
    strided = [
        plain[0].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        plain[1].repeat_interleave(2, 0)[::2],
        plain[2].transpose(1, 2).contiguous().transpose(1, 2),
    ]
    results = []
    for tensors in (plain, strided):
        tensors = [t.requires_grad_() for t in tensors]
        z = kernels.sparse_product(*tensors, spec.key)
        results.append((z, *torch.autograd.grad(z.sum(), tensors)))
    for mine, reference in zip(*results, strict=True):
        assert torch.equal(mine, reference)
    wanted = definition(x, y, w, spec)
    for mine, reference in zip(results[0], (wanted, *torch.autograd.grad(wanted.sum(), (x, y, w))), strict=True):
        assert_close_rel(mine, reference)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some(wanted, device):
    spec = SPECS["gaunt"]
    tensors = [t.detach() for t in make(spec, (5, 6), True, "shared", device)]
    inputs = [tensors[n].requires_grad_() for n in wanted]
    reference = torch.autograd.grad(definition(*tensors, spec).square().sum(), inputs)
    for mine, other in zip(
        torch.autograd.grad(kernels.sparse_product(*tensors, spec.key).square().sum(), inputs), reference, strict=True
    ):
        assert_close_rel(mine, other)


def test_derivatives_of_any_order(device):
    spec = SparseSpec(4, 4, 4, [(1, 1, 1, 1, 1, 1, "cg"), (0, 0, 1, 1, 1, 1, "cg"), (1, 1, 1, 1, 0, 0, "gaunt")])
    tensors = make(spec, (2, 3), True, "each", device)
    results = []
    for function in (lambda *t: kernels.sparse_product(*t, spec.key), lambda *t: definition(*t, spec)):
        values = [function(*tensors)]
        for _ in range(3):
            bent = sum((value * value * value).sum() for value in values)
            values = torch.autograd.grad(bent, tensors, create_graph=True)
        results.append(values)
    for mine, reference in zip(*results, strict=True):
        assert_close_rel(mine, reference)


def test_nothing_to_do(device):
    for shape in ((0, 3), (3, 0)):
        tensors = make(SPECS["gaunt"], shape, False, "each", device)
        z = kernels.sparse_product(*tensors, SPECS["gaunt"].key)
        assert z.shape == (*shape, 9)
        for gradient, tensor in zip(torch.autograd.grad(z.sum(), tensors), tensors, strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()
    x, y, _ = make(SPECS["gaunt"], (2, 3), False, None, device)
    z = kernels.sparse_product(x, y, None, "9,4,5")
    assert z.shape == (2, 3, 5) and not z.any()
    assert not any(g.any() for g in torch.autograd.grad(z.sum(), (x, y)))


def test_the_function_takes_the_kernel(device):
    spec = SPECS["gaunt"]
    x, y, w = make(spec, (3, 4), True, "each", device)
    z = sparse.sparse_product(x, y, w, spec, backend="triton")
    assert torchlayers.last_dispatch() == "triton: sparse_product"
    assert_close_rel(z, definition(x, y, w, spec))


def test_products_of_too_many_terms_are_refused(device):
    spec = gaunt_spec(6, 6, 6)
    x, y, _ = make(spec, (1, 1), False, None, device)
    with pytest.raises(torchlayers.BackendError, match=r"does not support \d+ terms, 6000 at most"):
        sparse.sparse_product(x, y, None, spec, backend="triton")


def test_one_digest_for_equal_numbers():
    spec = SPECS["gaunt"]
    again = kernels.plan.__wrapped__(spec.key)
    assert again == kernels.plan(spec.key) and hash(again) == hash(kernels.plan(spec.key))
    other = SparseSpec(spec.n1, spec.n2, spec.n3, [(*spec.paths[0][:7], 2.0), *spec.paths[1:]])
    assert kernels.plan(other.key) != again and repr(kernels.plan(other.key)) != repr(again)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 9)}, ValueError, r"x must have shape \(B, C, n1\) = \(\*, \*, 9\), got \(3, 9\)"),
        ({"x": torch.zeros(3, 2, 9, dtype=torch.complex64)}, TypeError, "x must be float64.*complex64"),
        ({"y": torch.zeros(3, 3, 4)}, ValueError, r"y must have shape \(3, 2, 4\) or \(3, 1, 4\), got \(3, 3, 4\)"),
        ({"y": torch.zeros(3, 2, 4).double()}, TypeError, "y must be torch.float32, the dtype of x"),
        ({"w": torch.zeros(3, 2, 5)}, ValueError, r"w must have shape \(3, 2, 7\) or \(2, 7\), got \(3, 2, 5\)"),
        ({"spec": "1,1,1;0,0,0,0,0,0,mine,0x1p+0"}, ValueError, "spec names the coefficients 'mine', known are"),
    ],
)
def test_refuses(change, error, message, device):
    args = {"x": torch.zeros(3, 2, 9), "y": torch.zeros(3, 1, 4), "w": torch.zeros(2, 7)} | change
    spec = args.pop("spec", SPECS["gaunt"].key)
    if "spec" in change:
        args = {"x": torch.zeros(2, 2, 1), "y": torch.zeros(2, 2, 1), "w": None}
    args = {k: t if t is None else t.to(device) for k, t in args.items()}
    with pytest.raises(error, match=message):
        kernels.sparse_product(**args, spec=spec)
