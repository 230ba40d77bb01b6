"""Products of matrices that belong to graphs, in Triton's interpreter or on a GPU, against matmul in float64."""

import pytest
import torch

import torchlayers
from torchlayers.functional import segment_matmul
from torchlayers.kernels import segment_matmul as kernels
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

# Sizes of graphs, channels, transposes: one of everything; empty graphs first, between and last; tiles of nodes and of
# channels that are not full; small graphs before a larger one.
CASES = [
    ([1], 1, False, False),
    ([0, 3, 0, 5, 1, 2, 0], 7, False, False),
    ([0, 3, 0, 5, 1, 2, 0], 7, False, True),
    ([0, 3, 0, 5, 1, 2, 0], 7, True, False),
    ([0, 3, 0, 5, 1, 2, 0], 7, True, True),
    ([9, 2], 17, False, True),
    ([1, 1, 1, 1, 6], 16, True, False),
]


def pointers(sizes, device, dtype=torch.int64):
    n = torch.tensor([0, *sizes], dtype=dtype, device=device)
    return n.cumsum(0).to(dtype), n.square().cumsum(0).to(dtype)


def make(sizes, channels, device, dtype=torch.float32):
    rows = sum(n * n for n in sizes)
    return [torch.randn(rows, channels, device=device).to(dtype).requires_grad_() for _ in range(2)]


def definition(a, b, sizes, transpose_a=False, transpose_b=False, power=0.0):
    """Graph by graph, channel by channel."""
    products = []
    for left, right in zip(*(t.split([n * n for n in sizes]) for t in (a, b)), strict=True):
        n = round(len(left) ** 0.5)
        left, right = (t.reshape(n, n, a.shape[1]).permute(2, 0, 1) for t in (left, right))
        product = (left.mT if transpose_a else left) @ (right.mT if transpose_b else right)
        products.append((product / max(n, 1) ** power).permute(1, 2, 0).reshape(n * n, a.shape[1]))
    return torch.cat(products)


def wide(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize(("sizes", "channels", "transpose_a", "transpose_b"), CASES, ids=str)
def test_value_and_both_derivatives(sizes, channels, transpose_a, transpose_b, derivatives, device):
    tensors, ptr = make(sizes, channels, device), pointers(sizes, device)
    turned = {"transpose_a": transpose_a, "transpose_b": transpose_b, "power": 0.5}
    with nan_empty():
        found, along = derivatives(lambda a, b: kernels.segment_matmul(a, b, *ptr, **turned), tensors)
    wanted, _ = derivatives(lambda a, b: definition(a, b, sizes, **turned), wide(tensors), along)
    assert found[0].dtype == torch.float32 and found[0].stride(0) % 16 == 0
    for ours, exact in zip(found, wanted, strict=True):
        assert_close_rel(ours, exact)


@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(False, True), (True, False)])
def test_plain_implementation(transpose_a, transpose_b, device):
    """What CPU tensors get outside the interpreter."""
    sizes = [3, 0, 2]
    a, b = (t.detach() for t in make(sizes, 4, device))
    y = kernels._reference(a, b, *pointers(sizes, device), transpose_a, transpose_b, 1.0)
    assert_close_rel(y, definition(a.double(), b.double(), sizes, transpose_a, transpose_b, 1.0))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_powers_of_the_size(power, device):
    sizes = [3, 1, 6]
    a, b = (t.detach() for t in make(sizes, 4, device))
    y = kernels.segment_matmul(a, b, *pointers(sizes, device), power=power)
    assert_close_rel(y, definition(a.double(), b.double(), sizes, power=power))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[2, 5], [11], [18]], ids=str)
def test_sixteen_bits(sizes, dtype, device):
    """No worse than matmul in float32 whose result is rounded, forward and backward."""
    tensors, ptr = make(sizes, 5, device, dtype), pointers(sizes, device)
    y = kernels.segment_matmul(*tensors, *ptr, power=1.0)
    exact, plain = wide(tensors), [t.detach().float().requires_grad_() for t in tensors]
    wanted, rounded = definition(*exact, sizes, power=1.0), definition(*plain, sizes, power=1.0)
    assert y.dtype == dtype
    assert_close_rel(y, wanted, baseline=rounded.to(dtype))
    g = torch.randn_like(y)
    every = (
        torch.autograd.grad(y, tensors, g),
        torch.autograd.grad(wanted, exact, g.double()),
        torch.autograd.grad(rounded, plain, g.float()),
    )
    for ours, reference, baseline in zip(*every, strict=True):
        assert ours.dtype == dtype
        assert_close_rel(ours, reference, baseline=baseline.to(dtype))


def test_sums_are_in_float32(device):
    """2048 and 39 ones: in float16 each one would be rounded away."""
    n = 40
    ones, ptr = torch.ones(n * n, 1, dtype=torch.float16, device=device), pointers([n], device)
    a = ones.clone()
    a[::n] = 2048
    for power in (0.0, 1.0):
        y = kernels.segment_matmul(a, ones, *ptr, power=power)
        assert torch.equal(y, torch.full_like(ones, 2087 / n**power))


SHAPES = sorted({*kernels._TINY, *(shape for group in (*kernels._LOW, *kernels._FLOAT32) for shape in group)})


@pytest.mark.parametrize("tiles", sorted({shape[:4] for shape in SHAPES}), ids=str)
def test_every_launch_configuration(tiles, device):
    """All of them on graphs for which they are not meant: what they reach does not depend on it."""
    sizes = [1, 0, 17, 2]
    a, b = (t.detach() for t in make(sizes, 17, device))
    expected = definition(a.double(), b.double(), sizes)
    for shape in [shape for shape in SHAPES if shape[:4] == tiles][: 1 if kernels.INTERPRET else None]:
        meta = dict(zip(("BI", "BK", "BJ", "BC", "num_warps", "num_stages"), shape, strict=True))
        with nan_empty():
            y = kernels._launch(a, b, *pointers(sizes, device), False, False, 0.0, candidates=[meta])
        assert_close_rel(y, expected)
    if not kernels.INTERPRET:  # there, a kernel is not compiled and has no parameters to specialise on
        free = {p.name for p in kernels.segment_matmul_kernel.params if p.do_not_specialize}
        assert free == {"G", "steps", "power"}


@pytest.mark.parametrize("sizes", [[5] * 9, [1] * 40, [1] * 30 + [40], [40] + [1] * 30, [0] * 50 + [17], [23, 0, 9]])
def test_the_launch_reaches_every_tile(sizes):
    """A graph's tile numbers hold its tiles, and the grid all numbers, though the host knows only Σ n² and a count."""
    for bi, bk in {shape[:2] for shape in SHAPES}:
        rows, first = 0, [0]
        for g in range(len(sizes)):
            rows += sizes[g] ** 2
            nodes = sum(sizes[: g + 1])
            first.append((rows + (bi + bk - 2) * nodes + (bi - 1) * (bk - 1) * (g + 1)) // (bi * bk))
            assert first[-1] - first[-2] >= -(-sizes[g] // bi) * -(-sizes[g] // bk)
        assert kernels._tiles(rows, len(sizes), {"BI": bi, "BK": bk}) >= first[-1]


def test_rows_are_read_where_they_lie(device):
    """Rows apart with NaN between, channels apart, expanded factors, pointers of 32 bits."""
    sizes, channels = [3, 6, 1], 5
    (a, b), ptr = (t.detach() for t in make(sizes, channels, device)), pointers(sizes, device)
    expected = kernels.segment_matmul(a, b, *ptr)
    apart = torch.full((len(a), 16), float("nan"), device=device)
    apart[:, :channels] = a
    assert kernels.reach(apart[:, :channels]) == 16 and kernels.reach(a) == channels
    assert kernels.reach(apart[:, :channels], a) == kernels.reach(apart[:, 1:6]) == channels
    columns = b.T.contiguous().T
    assert torch.equal(kernels.segment_matmul(apart[:, :channels], b, *ptr), expected)
    for left, pointer in ((apart[:, :channels], ptr), (a, pointers(sizes, device, torch.int32))):
        assert_close_rel(kernels.segment_matmul(left, columns, *pointer), expected.double())
    ones = torch.ones(1, 1, device=device).expand(len(a), channels)
    assert_close_rel(kernels.segment_matmul(a, ones, *ptr), definition(a.double(), ones.double(), sizes))


def test_slack_behind_rows_of_both_factors_is_not_summed(device):
    sizes = [4, 2]
    stored = torch.full((20, 32), float("nan"), device=device)
    stored[:, :19] = torch.randn(20, 19, device=device)
    y = kernels.segment_matmul(stored[:, :19], stored[:, :19], *pointers(sizes, device))
    plain = stored[:, :19].contiguous()
    assert torch.equal(y, kernels.segment_matmul(plain, plain, *pointers(sizes, device)))


@pytest.mark.parametrize(("sizes", "channels"), [([], 3), ([0, 0], 3), ([2, 1], 0)], ids=str)
def test_empty(sizes, channels, device):
    tensors = make(sizes, channels, device)
    y = kernels.segment_matmul(*tensors, *pointers(sizes, device))
    assert y.shape == tensors[0].shape
    for gradient in torch.autograd.grad(y.sum(), tensors):
        assert gradient.shape == y.shape


def test_one_gradient_alone(device):
    sizes = [3, 2]
    ptr = pointers(sizes, device)
    for which in (0, 1):
        tensors = make(sizes, 4, device)
        every = torch.autograd.grad(kernels.segment_matmul(*tensors, *ptr).square().sum(), tensors)
        tensors[1 - which].requires_grad_(False)
        kernels.segment_matmul(*tensors, *ptr).square().sum().backward()
        assert tensors[1 - which].grad is None and torch.equal(tensors[which].grad, every[which])


def test_runs_in_a_cuda_graph(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    sizes = [5, 20, 1]
    a, b = (t.detach() for t in make(sizes, 19, device))
    ptr = pointers(sizes, device)
    expected = kernels.segment_matmul(a, b, *ptr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.segment_matmul(a, b, *ptr)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_the_public_function_takes_the_kernel(device):
    """Graphs of one size in a dense batch, and of several with a layout."""
    a, b = (torch.randn(2, 3, 3, 4, device=device) for _ in range(2))
    y = segment_matmul(a, b, scale="sqrt_n", backend="triton")
    assert torchlayers.last_dispatch() == "triton: segment_matmul"
    assert_close_rel(y, torch.einsum("bijc,bjkc->bikc", a.double(), b.double()) / 3**0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(13)}, ValueError, r"a must have shape \(pairs, channels\), got \(13,\)"),
        ({"a": torch.zeros(13, 4).double()}, TypeError, "a must be float32, float16 or bfloat16, got torch.float64"),
        ({"b": torch.zeros(13, 4).half()}, TypeError, "b must be torch.float32, the dtype of a, got torch.float16"),
        ({"b": torch.zeros(13, 5)}, ValueError, r"b must have shape \(13, 4\), that of a, got \(13, 5\)"),
        ({"node_ptr": torch.zeros(3)}, TypeError, "node_ptr must be int32 or int64, got torch.float32"),
        ({"pair_ptr": torch.zeros(2, dtype=torch.int64)}, ValueError, r"pair_ptr must have shape \(graphs \+ 1,\)"),
        (
            dict.fromkeys(("node_ptr", "pair_ptr"), torch.zeros(1, dtype=torch.int64)),
            ValueError,
            "1 entry for 13 pairs",
        ),
    ],
)
def test_refuses(change, error, message, device):
    arguments = dict(zip(("a", "b"), (t.detach() for t in make([2, 3], 4, device)), strict=True))
    arguments |= dict(zip(("node_ptr", "pair_ptr"), pointers([2, 3], device), strict=True))
    with pytest.raises(error, match=message):
        kernels.segment_matmul(**arguments | {name: t.to(device) for name, t in change.items()})
