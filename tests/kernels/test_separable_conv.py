"""The fused pair of one-way filters, in Triton's interpreter or on a GPU, against one dense convolution in float64."""

import pytest
import torch
import torch.nn.functional as F

import torchlayers
from torchlayers.functional import separable_conv, separable_conv_transpose
from torchlayers.kernels import separable_conv as kernels
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
# (N, C, O, R), image, kernel, stride, padding, dilation: one element; tiles of channels, rank and points, none full;
# rows shared by some of the marched ones, by all, by none, and in phases.
PROBLEMS = {
    "one": ((1, 1, 1, 1), (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    "plain": ((2, 5, 7, 6), (4, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    "blocks": ((1, 17, 34, 18), (3, 4), (2, 3), (1, 1), (1, 1), (1, 1)),
    "tiles": ((1, 2, 3, 2), (5, 36), (3, 4), (1, 1), (1, 3), (1, 1)),
    "strided": ((2, 3, 2, 4), (7, 6), (3, 4), (2, 3), (1, 2), (1, 1)),
    "far": ((1, 3, 2, 2), (4, 7), (2, 1), (3, 2), (0, 1), (1, 1)),
    "dilated": ((1, 2, 3, 2), (7, 8), (3, 2), (1, 1), (4, 0), (2, 3)),
    "phases": ((1, 2, 3, 2), (8, 9), (3, 3), (3, 2), (2, 3), (2, 3)),
}


def make(problem, across, device, dtype=torch.float32, *, last=False, bias=True):
    """Tensors that require gradients, and the options of the operation."""
    (n, c, o, r), image, kernel, stride, padding, dilation = PROBLEMS[problem]
    k1, k2 = kernel if across == 0 else kernel[::-1]
    shapes = [(n, c, *image), (r, c, k1), (o, r, k2), (o,)][: 3 + bias]
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    if last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    size = [
        (m + 2 * p - d * (k - 1) - 1) // s + 1
        for m, p, d, k, s in zip(image, padding, dilation, kernel, stride, strict=True)
    ]
    tensors = [t.requires_grad_() for t in tensors] + [None] * (not bias)
    return tensors, (across, stride, padding, dilation, size)


def exact(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def definition(x, first, second, bias, across, stride, padding, dilation, size, activation=None):
    """One convolution with the dense kernel of the pair, over an image with zeros around."""
    weight = torch.einsum("orb,rca->ocab" if across == 0 else "orb,rca->ocba", second, first)
    around = []
    for axis in (1, 0):
        reach = (size[axis] - 1) * stride[axis] + dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        around += [padding[axis], reach - padding[axis] - x.shape[2 + axis]]
    return ACTIVATIONS[activation](F.conv2d(F.pad(x, around), weight, bias, stride, 0, dilation))


def gradients(y, tensors, g):
    return torch.autograd.grad(y, [t for t in tensors if t is not None], g)


@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_values_and_gradients(problem, across, device):
    tensors, options = make(problem, across, device, last=across == 1, bias=problem != "plain")
    with nan_empty():
        y = kernels.separable_conv(*tensors, *options)
        g = torch.randn_like(y)
        found = gradients(y, tensors, g)
    wide = exact(tensors)
    wanted = definition(*wide, *options)
    assert_close_rel(y, wanted)
    for ours, reference in zip(found, gradients(wanted, wide, g.double()), strict=True):
        assert ours.dtype == y.dtype
        assert_close_rel(ours, reference)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations(activation, device):
    tensors, options = make("plain", 0, device)
    y = kernels.separable_conv(*tensors, *options, activation)
    wide = exact(tensors)
    wanted = definition(*wide, *options, activation)
    assert_close_rel(y, wanted)
    g = torch.randn_like(y)
    for ours, reference in zip(gradients(y, tensors, g), gradients(wanted, wide, g.double()), strict=True):
        assert_close_rel(ours, reference)


def test_relu_lets_nan_through(device):
    tensors, options = make("plain", 0, device)
    tensors = [t.detach() for t in tensors]
    tensors[0][0, 0, 0, 0] = float("nan")
    y = kernels.separable_conv(*tensors, *options, "relu")
    assert torch.equal(y.isnan(), definition(*exact(tensors), *options).isnan()) and y.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, device):
    """No worse than two convolutions in that dtype, forward and backward."""
    tensors, options = make("plain", 0, device, dtype)
    x, first, second, bias = tensors
    y = kernels.separable_conv(*tensors, *options)
    plain = F.conv2d(F.conv2d(x, first.unsqueeze(3), padding=(1, 0)), second.unsqueeze(2), bias, padding=(0, 1))
    wide = exact(tensors)
    wanted = definition(*wide, *options)
    assert y.dtype == dtype
    assert_close_rel(y, wanted, baseline=plain)
    g = torch.randn_like(y)
    every = (gradients(y, tensors, g), gradients(wanted, wide, g.double()), gradients(plain, tensors, g))
    for ours, reference, baseline in zip(*every, strict=True):
        assert ours.dtype == dtype
        assert_close_rel(ours, reference, baseline=baseline)


def test_any_strides_and_the_format_of_the_input(device):
    tensors, options = make("plain", 0, device)
    x, first, second, bias = (t.detach() for t in tensors)
    wanted = definition(*exact(tensors), *options)
    odd = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    flipped = first.flip(2).transpose(0, 1).contiguous().transpose(0, 1).flip(2)
    y = kernels.separable_conv(odd, flipped, second.mT.contiguous().mT, bias.repeat_interleave(2)[::2], *options)
    assert y.is_contiguous()
    assert_close_rel(y, wanted)
    wide = kernels.separable_conv(x[:1].expand(3, -1, -1, -1), first, second, bias, *options)
    assert_close_rel(wide, wanted[:1].expand(3, -1, -1, -1))
    last = kernels.separable_conv(x.contiguous(memory_format=torch.channels_last), first, second, bias, *options)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()


@pytest.mark.parametrize("hold", [False, True], ids=["loaded", "held"])
def test_every_launch_configuration(hold, device):
    tensors, (across, stride, padding, dilation, size) = make("blocks", 0, device)
    wanted = definition(*exact(tensors), across, stride, padding, dilation, size)
    tensors = [t.detach() for t in tensors]
    x, first, second, _ = tensors
    c, r, o, k2 = x.shape[1], first.shape[0], second.shape[0], second.shape[2]
    taps = tuple(kernels._forth(*of) for of in zip(stride, padding, dilation, strict=True))
    target = kernels._lib.target_of(device)
    for meta in kernels._candidates(c, r, o, k2, False, target):
        if hold:
            meta |= {"HOLD": True, "BC": 32, "C_BLOCKS": 1, "BO": 64, "O_BLOCKS": 1}
        with nan_empty():
            y = kernels._march(*tensors, across, taps, size, None, candidates=[meta])
        assert_close_rel(y, wanted)
    g = torch.randn_like(y)
    back = kernels._Taps(1, stride[1], -dilation[1], padding[1])
    wide = exact(tensors)
    (second_wanted,) = torch.autograd.grad(
        definition(*wide, across, stride, padding, dilation, size), wide[2], g.double()
    )
    for meta in kernels._filter_candidates(c, r, o, k2, False, target):
        sums = kernels._filter_sums(x, first, g, 0, taps[0], back, (g.shape[2], x.shape[3]), k2, candidates=[meta])
        assert_close_rel(sums.permute(1, 2, 0), second_wanted)


def test_strips_and_splits(device, monkeypatch):
    """As many programs as a large GPU gets: short strips, few pixels each."""
    monkeypatch.setattr(kernels._lib, "multiprocessors", lambda _: 4)
    tensors, options = make("tiles", 1, device)
    wide = exact(tensors)
    wanted = definition(*wide, *options)
    with nan_empty():
        y = kernels.separable_conv(*tensors, *options)
        g = torch.randn_like(y)
        found = gradients(y, tensors, g)
    assert_close_rel(y, wanted)
    for ours, reference in zip(found, gradients(wanted, wide, g.double()), strict=True):
        assert_close_rel(ours, reference)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_second_derivatives(activation, device):
    tensors, options = make("one", 0, device)
    tensors, options = make("far", 1, device) if activation is None else (tensors, options)

    def second(y, tensors):
        first = torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    wide = exact(tensors)
    wanted = second(definition(*wide, *options, activation), wide)
    for ours, reference in zip(
        second(kernels.separable_conv(*tensors, *options, activation), tensors), wanted, strict=True
    ):
        assert_close_rel(ours, reference, rtol=1e-5)


@pytest.mark.parametrize("wants", range(1, 16))
def test_some_gradients(wants, device):
    """Whatever needs no gradient gets none, and the others are the same."""
    tensors, options = make("one", 0, device)
    every = torch.autograd.grad(kernels.separable_conv(*tensors, *options).square().sum(), tensors)
    some = [t.detach().requires_grad_(bool(wants >> i & 1)) for i, t in enumerate(tensors)]
    kernels.separable_conv(*some, *options).square().sum().backward()
    for t, wanted in zip(some, every, strict=True):
        assert (t.grad is None) == (not t.requires_grad)
        if t.requires_grad:
            assert_close_rel(t.grad, wanted.double())


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_only_the_input_is_kept(activation, device):
    """Neither what lies between the filters nor what the activation was given."""
    tensors, options = make("plain", 0, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.separable_conv(*tensors, *options, activation)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("empty", ["batch", "channels", "rank", "outputs", "image"])
def test_empty(empty, device):
    n, c, r, o, h = (0 if empty == name else 2 for name in ("batch", "channels", "rank", "outputs", "image"))
    shapes = ((n, c, h, 3), (r, c, 3), (o, r, 1), (o,))
    tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    with nan_empty():
        y = kernels.separable_conv(*tensors, 0, (1, 1), (1, 0), (1, 1), (h, 3))
        found = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == (n, o, h, 3)
    if 0 in (c, r):
        assert torch.equal(y, tensors[3][:, None, None].expand_as(y))
    for gradient, t in zip(found, tensors, strict=True):
        assert gradient.shape == t.shape and gradient.isfinite().all()
    assert torch.equal(found[3], torch.full_like(tensors[3], n * h * 3))


def test_repeated_runs_agree_bit_for_bit(device):
    tensors, options = make("plain", 0, device)

    def once():
        y = kernels.separable_conv(*tensors, *options)
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_sizes_of_the_image_are_no_specialisation():
    if not kernels.INTERPRET:  # there, a kernel is not compiled and has no parameters to specialise on
        free = {p.name for p in kernels.separable_conv_kernel.params if p.do_not_specialize}
        assert {"tiles", "strips", "steps", "across", "rows", "x_across", "x_rows"} <= free
        free = {p.name for p in kernels.separable_filter_kernel.params if p.do_not_specialize}
        assert {"pixels", "chunk", "U", "V", "x_size", "y_size"} <= free


@pytest.mark.parametrize("order", ["vh", "hv"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_the_public_function_takes_the_kernel(order, padding_mode, device):
    """Also without a batch, with one more zero behind than before, and transposed."""
    kernel = (2, 4)
    first, second = (kernel[0], 1), (1, kernel[1])
    axes = [(0,), (1,)]
    if order == "hv":
        first, second, axes = second, first, axes[::-1]
    factors = [torch.randn(3, 2, *first, device=device), torch.randn(4, 3, *second, device=device)]
    x, bias = torch.randn(2, 5, 6, device=device), torch.randn(4, device=device)
    options = {"axes": axes, "padding": "same", "padding_mode": padding_mode, "activation": "gelu"}
    y = separable_conv(x, factors, bias, **options, backend="triton")
    assert torchlayers.last_dispatch() == "triton: separable_conv"
    wanted = separable_conv(x.double(), [f.double() for f in factors], bias.double(), **options, backend="torch")
    assert_close_rel(y, wanted)

    options = {"axes": axes, "out_channels": 2, "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)}
    bias = bias[:2]
    x = torch.randn(2, 4, 3, 2, device=device)
    y = separable_conv_transpose(x, factors, bias, **options, backend="triton")
    assert torchlayers.last_dispatch() == "triton: separable_conv_input"
    wanted = separable_conv_transpose(x.double(), [f.double() for f in factors], bias.double(), **options)
    assert_close_rel(y, wanted)


def test_the_public_function_names_what_the_kernel_lacks(device):
    def call(x, factors, axes=((0,), (1,)), **options):
        separable_conv(x, factors, axes=axes, backend="triton", **options)

    x = torch.randn(1, 4, 6, 6, device=device)
    pair = [torch.randn(2, 4, 3, 1, device=device), torch.randn(4, 2, 1, 3, device=device)]
    with pytest.raises(torchlayers.BackendError, match="float64"):
        call(x.double(), [f.double() for f in pair])
    with pytest.raises(torchlayers.BackendError, match="groups, got 2"):
        call(x, [torch.randn(2, 2, 3, 1, device=device), torch.randn(4, 1, 1, 3, device=device)])
    with pytest.raises(torchlayers.BackendError, match="ranks above 64, got 65"):
        call(x, [torch.randn(65, 4, 3, 1, device=device), torch.randn(4, 65, 1, 3, device=device)])
    with pytest.raises(torchlayers.BackendError, match="rank of 60 with filters of 7 taps"):
        call(x, [torch.randn(60, 4, 7, 1, device=device), torch.randn(4, 60, 1, 3, device=device)])
    with pytest.raises(torchlayers.BackendError, match="a vertical and a horizontal filter"):
        call(x, [torch.randn(4, 4, 3, 3, device=device)], axes=[(0, 1)])
    with pytest.raises(torchlayers.BackendError, match="method='chain'"):
        call(x, pair, method="chain")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x must have shape \(N, 3, H, W\), got \(2, 3, 4\)"),
        ({"x": torch.zeros(2, 4, 5, 5)}, ValueError, r"x must have shape \(N, 3, H, W\), got \(2, 4, 5, 5\)"),
        ({"x": torch.zeros(2, 3, 5, 5).double()}, TypeError, "x must be float32, float16 or bfloat16, got.*float64"),
        ({"first": torch.zeros(2, 3)}, ValueError, r"first must have shape \(out, in, taps\), got \(2, 3\)"),
        ({"second": torch.zeros(4, 3, 3)}, ValueError, r"second must have shape \(O, 2, k\), got \(4, 3, 3\)"),
        ({"second": torch.zeros(4, 2, 3).half()}, TypeError, "second must be torch.float32, the dtype of x"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4,\)"),
        ({"across": 2}, ValueError, "across must be 0 or 1, got 2"),
        ({"stride": (0, 1)}, ValueError, "stride, padding, dilation must be pairs of positive numbers"),
        ({"activation": "tanh"}, ValueError, "activation must be one of None, 'relu', 'gelu', 'silu', got 'tanh'"),
    ],
)  # fmt: skip
def test_refuses(change, error, message, device):
    inputs = {"x": torch.zeros(2, 3, 5, 5), "first": torch.zeros(2, 3, 3), "second": torch.zeros(4, 2, 3)}
    inputs |= {"bias": torch.zeros(4), "across": 0, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (inputs | change).items()}
    with pytest.raises(error, match=message):
        kernels.separable_conv(**inputs, size=(5, 5))
