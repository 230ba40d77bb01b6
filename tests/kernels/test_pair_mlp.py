"""MLPs and linear layers over pairs of nodes, in Triton's interpreter or on a GPU, against F.linear in float64."""

import pytest
import torch
import torch.nn.functional as F

import torchlayers
from torchlayers.functional import pair_linear, pair_mlp
from torchlayers.kernels import pair_mlp as kernels
from torchlayers.kernels.segment_matmul import padded_rows
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

# Sizes of graphs, channels, width of the MLPs, with identity and transpose: one of everything; empty graphs first,
# between and last; a row that the identity channel fills up, a tile of rows that is not full; channels and widths that
# need two tiles; none of what PPGN++ adds.
CASES = [
    ([1], 1, 1, True),
    ([0, 3, 0, 5, 1, 2, 0], 7, 5, True),
    ([4, 2], 15, 16, True),
    ([3, 1], 16, 33, True),
    ([1, 4], 3, 2, False),
    ([3], 17, 4, False),
]
LINEAR = [(sizes, channels, hidden, 2 * hidden - 1, plus) for sizes, channels, hidden, plus in CASES]


def pointers(sizes, device, dtype=torch.int64):
    n = torch.tensor([0, *sizes], dtype=dtype, device=device)
    return n.cumsum(0).to(dtype), n.square().cumsum(0).to(dtype)


def randn(*shapes, device, dtype=torch.float32):
    return [(torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype).requires_grad_() for shape in shapes]


def make(sizes, channels, hidden, plus, device, dtype=torch.float32):
    """x and the parameters of two MLPs."""
    widths = (2 * channels + 2, channels + 1) if plus else (channels, channels)
    shapes = [(sum(n * n for n in sizes), channels)]
    for width in widths:
        shapes += [(hidden, width), (hidden,), (hidden, hidden), (hidden,)]
    return randn(*shapes, device=device, dtype=dtype)


def make_linear(sizes, channels, hidden, outputs, plus, device, dtype=torch.float32):
    rows = sum(n * n for n in sizes)
    shapes = (rows, channels), (rows, hidden), (outputs, channels + plus + hidden), (outputs,)
    return randn(*shapes, device=device, dtype=dtype)


def mlp(x, *parameters, ptr, plus=True):
    return kernels.pair_mlp(x, *ptr, parameters[:4], parameters[4:], plus=plus)


def with_identity(x, sizes):
    """[x, 1[i = j]] and its transpose within each graph, by matrices (n, n, C) of graphs."""
    own, turned = [], []
    for part in x.split([n * n for n in sizes]):
        n = round(len(part) ** 0.5)
        grid = part.reshape(n, n, x.shape[1])
        grid = torch.cat([grid, torch.eye(n, dtype=x.dtype, device=x.device)[..., None]], 2)
        own.append(grid.reshape(n * n, -1) if n else grid.new_empty(0, x.shape[1] + 1))
        turned.append(grid.transpose(0, 1).reshape(n * n, -1) if n else own[-1])
    return torch.cat(own), torch.cat(turned)


def definition(x, *parameters, sizes, plus=True):
    first = second = x
    if plus:
        second, turned = with_identity(x, sizes)
        first = torch.cat([second, turned], 1)
    results = []
    for h, (wa, ba, wb, bb) in ((first, parameters[:4]), (second, parameters[4:])):
        results.append(F.linear(F.linear(h, wa, ba).relu(), wb, bb).relu())
    return tuple(results)


def linear_definition(x, y, weight, bias, sizes, plus=True):
    own = with_identity(x, sizes)[0] if plus else x
    return F.linear(torch.cat([own, y], 1), weight, bias)


def wide(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def gradients(results, tensors, grads):
    return torch.autograd.grad(results, tensors, [g.to(r.dtype) for g, r in zip(grads, results, strict=True)])


@pytest.mark.parametrize(("sizes", "channels", "hidden", "plus"), CASES, ids=str)
def test_mlp(sizes, channels, hidden, plus, device):
    """Values and gradients of x and all eight parameters; nothing that was not written is read."""
    tensors, ptr = make(sizes, channels, hidden, plus, device), pointers(sizes, device)
    with nan_empty():
        found = mlp(*tensors, ptr=ptr, plus=plus)
        grads = [torch.randn_like(m) for m in found]
        found += gradients(found, tensors, grads)
    exact = wide(tensors)
    wanted = definition(*exact, sizes=sizes, plus=plus)
    wanted += gradients(wanted, exact, grads)
    assert all(m.dtype == torch.float32 and m.stride(0) % 16 == 0 for m in found[:3])
    for ours, reference in zip(found, wanted, strict=True):
        assert_close_rel(ours, reference)


@pytest.mark.parametrize(("sizes", "channels", "hidden", "outputs", "plus"), LINEAR, ids=str)
def test_linear(sizes, channels, hidden, outputs, plus, device):
    tensors, ptr = make_linear(sizes, channels, hidden, outputs, plus, device), pointers(sizes, device)
    x, y, weight, bias = tensors
    with nan_empty():
        found = (kernels.pair_linear(x, y, *ptr, weight, bias, plus=plus),)
        grads = [torch.randn_like(found[0])]
        found += gradients(found, tensors, grads)
    exact = wide(tensors)
    wanted = (linear_definition(*exact, sizes, plus),)
    wanted += gradients(wanted, exact, grads)
    assert all(t.dtype == torch.float32 and t.stride(0) % 16 == 0 for t in found[:3])
    for ours, reference in zip(found, wanted, strict=True):
        assert_close_rel(ours, reference)


@pytest.mark.parametrize("plus", [True, False])
def test_plain_implementations(plus, device):
    """What CPU tensors get outside the interpreter; their backward passes are written out."""
    sizes = [3, 0, 2]
    ptr = pointers(sizes, device)
    tensors = make(sizes, 4, 5, plus, device)
    linear = make_linear(sizes, 4, 5, 3, plus, device)
    exact, exact_linear = wide(tensors), wide(linear)
    results = definition(*exact, sizes=sizes, plus=plus)
    out = linear_definition(*exact_linear, sizes, plus)
    grads = [torch.randn_like(m) for m in (*results, out)]
    wanted = (*results, out, *gradients(results, exact, grads[:2]), *gradients((out,), exact_linear, grads[2:]))
    x, *parameters = (t.detach() for t in tensors)
    a, b, weight, bias = (t.detach() for t in linear)
    found = kernels._reference_mlp(x, *ptr, *parameters, plus)
    grads = [g.float() for g in grads]
    found += (kernels._reference_linear(a, b, *ptr, weight, bias, plus),)
    found += tuple(kernels._reference_mlp_backward(*grads[:2], *found[:2], x, *ptr, *parameters, plus, True))
    found += tuple(kernels._reference_linear_backward(grads[2], a, b, *ptr, weight, plus, True))
    for ours, reference in zip(found, wanted, strict=True):
        assert_close_rel(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, device):
    """No worse than the same layers by torch in that dtype, forward and backward."""
    sizes = [5, 3]
    ptr = pointers(sizes, device)
    tensors = make(sizes, 9, 12, True, device, dtype)
    runs = []
    for inputs in (tensors, wide(tensors), [t.detach().requires_grad_() for t in tensors]):
        ours = inputs is tensors
        results = mlp(*inputs, ptr=ptr) if ours else definition(*inputs, sizes=sizes)
        grads = [torch.ones_like(m) for m in results]
        runs.append((*results, *gradients(results, inputs, grads)))
    tensors = make_linear(sizes, 9, 12, 7, True, device, dtype)
    for i, inputs in enumerate((tensors, wide(tensors), [t.detach().requires_grad_() for t in tensors])):
        x, y, weight, bias = inputs
        out = linear_definition(*inputs, sizes) if i else kernels.pair_linear(x, y, *ptr, weight, bias)
        runs[i] += (out, *gradients((out,), inputs, [torch.ones_like(out)]))
    for ours, reference, baseline in zip(*runs, strict=True):
        assert ours.dtype == dtype
        assert_close_rel(ours, reference, baseline=baseline)


def test_the_transpose_is_read_and_not_assumed(device):
    """A first layer that passes on nothing but x[j, i] of one channel."""
    sizes, channels = [3, 2], 4
    x, *parameters = (t.detach() for t in make(sizes, channels, channels, True, device))
    x = x.abs()
    parameters = [torch.zeros_like(p) for p in parameters]
    parameters[0][1, channels + 1 + 2] = 1
    parameters[2].fill_diagonal_(1)
    m1, m2 = mlp(x, *parameters, ptr=pointers(sizes, device))
    turned = torch.cat([part.reshape(n, n, channels).transpose(0, 1).reshape(-1, channels)
                        for n, part in zip(sizes, x.split([9, 4]), strict=True)])  # fmt: skip
    assert torch.equal(m1[:, 1], turned[:, 2]) and not m1[:, [0, 2, 3]].any() and not m2.any()


def test_nan_stays_nan(device):
    x, *parameters = (t.detach() for t in make([2], 3, 4, True, device))
    x[1, 0] = float("nan")
    m1, m2 = mlp(x, *parameters, ptr=pointers([2], device))
    assert m1.isnan().all(1).tolist() == [False, True, True, False]  # the pair and its transpose
    assert m2.isnan().all(1).tolist() == [False, True, False, False]


def test_one_graph_does_not_see_another(device):
    """A batch is its graphs, bit for bit: what is behind a graph's last row is not summed."""
    sizes = [2, 4, 1]
    x, *parameters = (t.detach() for t in make(sizes, 5, 6, True, device))
    together = mlp(x, *parameters, ptr=pointers(sizes, device))
    for n, part, *ours in zip(sizes, *(t.split([4, 16, 1]) for t in (x, *together)), strict=True):
        alone = mlp(part.contiguous(), *parameters, ptr=pointers([n], device))
        assert all(torch.equal(a, b) for a, b in zip(alone, ours, strict=True))


def elsewhere(t):
    """The same numbers, none next to each other in a row."""
    t = t.detach()
    return (t.repeat_interleave(2)[::2] if t.ndim == 1 else t.T.contiguous().T).requires_grad_()


def apart(t):
    """The same numbers in rows of 16, with NaN behind."""
    stored = torch.full((len(t), 16), float("nan"), device=t.device)
    stored[:, : t.shape[1]] = t.detach()
    return stored[:, : t.shape[1]].requires_grad_()


def test_rows_are_read_where_they_lie(device):
    """Wherever inputs, weights and gradients lie, and with pointers of 32 bits."""
    sizes = [3, 2]
    ptr = pointers(sizes, device)
    x, *parameters = make(sizes, 5, 6, True, device)
    linear = make_linear(sizes, 5, 6, 4, True, device)

    def run(x, parameters, linear, ptr, one):
        results = (*mlp(x, *parameters, ptr=ptr), kernels.pair_linear(*linear[:2], *ptr, *linear[2:]))
        return results + gradients(results, [x, *parameters, *linear], [one.expand_as(m) for m in results])

    one = torch.ones(1, 1, device=device)
    expected = run(x, parameters, linear, ptr, one)
    turned = [elsewhere(t) for t in parameters], [elsewhere(t) for t in linear]
    other = run(apart(x), turned[0], [apart(linear[0]), *turned[1][1:]], ptr, one)
    for ours, plain in zip(other, expected, strict=True):
        assert_close_rel(ours, plain.double())
    other = run(elsewhere(x), *turned, pointers(sizes, device, torch.int32), torch.ones(13, 1, device=device))
    for ours, plain in zip(other, expected, strict=True):
        assert_close_rel(ours, plain.double())


def test_repeated_runs_agree_bit_for_bit_and_sums_are_split(device, monkeypatch):
    """However many programs share the sums over pairs."""
    sizes = [6, 2]
    tensors, ptr = make(sizes, 3, 4, True, device), pointers(sizes, device)
    exact, every = wide(tensors), []
    for splits in (2, 2, 1):
        monkeypatch.setattr(kernels, "_SPLITS", splits)
        results = mlp(*tensors, ptr=ptr)
        every.append(gradients(results, tensors, [torch.ones_like(m) for m in results]))
    assert all(torch.equal(a, b) for a, b in zip(*every[:2], strict=True))
    results = definition(*exact, sizes=sizes)
    for ours, reference in zip(every[2], gradients(results, exact, [torch.ones_like(m) for m in results]), strict=True):
        assert_close_rel(ours, reference)


def test_parts_of_sums_hold_all_rows(device):
    x = torch.empty(0, device=device)
    for rows in (1, 31, 32, 33, 1000, 70_000):
        for tiles in (1, 3, 500):
            parts, share = kernels._split(x, rows, 32, tiles)
            assert share % 32 == 0 and (parts - 1) * share < rows <= parts * share


def test_some_gradients(device):
    """Where x needs none, the parameters' are the same; an unused result counts as one with a gradient of zero."""
    sizes = [3, 1]
    tensors, ptr = make(sizes, 4, 5, True, device), pointers(sizes, device)
    every = torch.autograd.grad(mlp(*tensors, ptr=ptr)[0].sum(), tensors)
    assert not any(g.any() for g in every[5:])
    frozen = [tensors[0].detach(), *tensors[1:]]
    some = torch.autograd.grad(mlp(*frozen, ptr=ptr)[0].sum(), frozen[1:])
    assert all(torch.equal(a, b) for a, b in zip(some, every[1:], strict=True))
    linear = make_linear(sizes, 4, 5, 3, True, device)
    every = torch.autograd.grad(kernels.pair_linear(*linear[:2], *ptr, *linear[2:]).sum(), linear)
    frozen = [linear[0].detach(), *linear[1:]]
    some = torch.autograd.grad(kernels.pair_linear(*frozen[:2], *ptr, *frozen[2:]).sum(), frozen[1:])
    assert all(torch.equal(a, b) for a, b in zip(some, every[1:], strict=True))


@pytest.mark.parametrize("sizes", [[], [0, 0]], ids=str)
def test_empty(sizes, device):
    tensors, ptr = make(sizes, 4, 5, True, device), pointers(sizes, device)
    results = mlp(*tensors, ptr=ptr)
    assert [tuple(m.shape) for m in results] == [(0, 5), (0, 5)]
    for gradient, t in zip(torch.autograd.grad(results[0].sum(), tensors), tensors, strict=True):
        assert gradient.shape == t.shape and not gradient.any()
    linear = make_linear(sizes, 4, 5, 3, True, device)
    out = kernels.pair_linear(*linear[:2], *ptr, *linear[2:])
    assert out.shape == (0, 3)
    for gradient, t in zip(torch.autograd.grad(out.sum(), linear), linear, strict=True):
        assert gradient.shape == t.shape and not gradient.any()


def test_launch_configurations():
    """Every kernel has some on every target; tiles are wide enough for what has to fit into one."""
    for target in (*kernels._lib.TARGETS.values(), ("interpreter", "")):
        for kernel in kernels._TILES:
            for low in (True, False):
                for meta in kernels._candidates(kernel, low, target, BH=16):
                    assert meta["BM"] >= 16 and meta["BH"] == 16
    assert all(kernels._tile(hidden) >= hidden for hidden in range(1, kernels.MAX_HIDDEN + 1))
    if not kernels._lib.INTERPRET:  # there, a kernel is not compiled and has no parameters to specialise on
        every = kernels.pair_mlp_kernel, kernels.pair_mlp_backward_kernel, kernels.pair_linear_kernel
        free = [{p.name for p in k.params if p.do_not_specialize} for k in (*every, kernels.pair_outer_kernel)]
        plain = {"T", "G", "steps"}
        assert free == [plain, plain | {"share"}, plain, plain | {"share"}]


def test_padded_rows_have_no_say(device):
    rows = padded_rows(torch.empty(0, device=device), 2, 3, 17)
    assert rows.shape == (2, 3, 17) and rows.stride() == (96, 32, 1)


def test_runs_in_a_cuda_graph(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    sizes = [5, 20, 1]
    tensors, ptr = make(sizes, 19, 23, True, device), pointers(sizes, device)

    def step():
        results = mlp(*tensors, ptr=ptr)
        return results + gradients(results, tensors, [torch.ones_like(m) for m in results])

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_public_functions_take_the_kernels(device):
    sizes = [3, 3]
    tensors = make(sizes, 4, 5, True, device)
    x, *parameters = (t.detach() for t in tensors)
    layers = [tuple(parameters[i : i + 2]) for i in range(0, 8, 2)]
    found = pair_mlp(x.view(2, 3, 3, 4), layers[:2], layers[2:], backend="triton")
    assert torchlayers.last_dispatch() == "triton: pair_mlp"
    for ours, reference in zip(found, definition(*wide(tensors), sizes=sizes), strict=True):
        assert_close_rel(ours.reshape(18, 5), reference)
    linear = make_linear(sizes, 4, 5, 3, True, device)
    x, y, weight, bias = (t.detach() for t in linear)
    out = pair_linear(x.view(2, 3, 3, 4), y.view(2, 3, 3, 5), weight, bias, backend="triton")
    assert torchlayers.last_dispatch() == "triton: pair_linear"
    assert_close_rel(out.reshape(18, 3), linear_definition(*wide(linear), sizes))


def test_the_public_function_names_what_the_kernel_lacks(device):
    x, *parameters = (t.detach() for t in make([2], 3, 129, False, device))
    layers = [tuple(parameters[i : i + 2]) for i in range(0, 8, 2)]
    with pytest.raises(torchlayers.BackendError, match="hidden layers wider than 128, got 129"):
        pair_mlp(x.view(2, 2, 3), layers[:2], layers[2:], plus=False, backend="triton")
    assert kernels.unsupported(5, torch.float64) == "float64"
    assert kernels.unsupported(128, torch.bfloat16) is None


NAMES = ("x", "w1a", "b1a", "w1b", "b1b", "w2a", "b2a", "w2b", "b2b")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"x must have shape \(pairs, channels\), got \(4,\)"),
        ({"x": torch.zeros(4, 3).double()}, TypeError, "x must be float32, float16 or bfloat16, got torch.float64"),
        (
            {"w1a": torch.zeros(5, 7)},
            ValueError,
            r"mlp1\[0\] must have shape \(H, 2 \(C \+ 1\)\) = \(5, 8\), got",
        ),
        ({"w2a": torch.zeros(5, 3)}, ValueError, r"mlp2\[0\] must have shape \(H, C \+ 1\) = \(5, 4\), got \(5, 3\)"),
        ({"w1b": torch.zeros(4, 5)}, ValueError, r"mlp1\[2\] must have shape \(H, H\) = \(5, 5\), got \(4, 5\)"),
        (
            {"b2b": torch.zeros(5).half()},
            TypeError,
            r"mlp2\[3\] must be torch.float32, the dtype of x, got",
        ),
        ({"ptr": (torch.zeros(2), torch.zeros(2))}, TypeError, "node_ptr must be int32 or int64"),
    ],
)
def test_mlp_refuses(change, error, message, device):
    arguments = dict(zip(NAMES, (t.detach() for t in make([2], 3, 5, True, device)), strict=True))
    arguments |= {"ptr": pointers([2], device)} | change
    ptr = [t.to(device) for t in arguments.pop("ptr")]
    with pytest.raises(error, match=message):
        mlp(*(t.to(device) for t in arguments.values()), ptr=ptr)


def test_wide_layers_are_refused(device):
    x, *parameters = (t.detach() for t in make([2], 3, 129, True, device))
    with pytest.raises(ValueError, match=r"mlp1\[1\] must have at most 128 entries, got 129"):
        mlp(x, *parameters, ptr=pointers([2], device))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"x must have shape \(pairs, channels\), got \(4,\)"),
        ({"y": torch.zeros(3, 5)}, ValueError, r"y must have shape \(pairs, H\) = \(4, \*\), got \(3, 5\)"),
        ({"y": torch.zeros(4, 5).half()}, TypeError, "y must be torch.float32, the dtype of x, got torch.float16"),
        (
            {"weight": torch.zeros(2, 8)},
            ValueError,
            r"weight must have shape \(O, C \+ 1 \+ H\) = \(2, 9\), got",
        ),
        ({"bias": torch.zeros(2, 1)}, ValueError, r"weight must have shape"),
    ],
)
def test_linear_refuses(change, error, message, device):
    names = ("x", "y", "weight", "bias")
    arguments = dict(zip(names, (t.detach() for t in make_linear([2], 3, 5, 2, True, device)), strict=True))
    x, y, weight, bias = (t.to(device) for t in (arguments | change).values())
    with pytest.raises(error, match=message):
        kernels.pair_linear(x, y, *pointers([2], device), weight, bias)
