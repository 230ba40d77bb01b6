"""The transforms' kernels, in Triton's interpreter or on a GPU, against torch.fft and the definition in float64."""

import pytest
import torch

from torchlayers.kernels import tdft
from torchlayers.kernels._lib import TARGETS, target_of
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

# (B, C, N1, N2, k1, k2): one element; nothing a multiple of a tile, k1 odd; several tiles of k1, k2, rows and columns;
# more modes than the inverse kernel's tiles hold at once.
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 3, 17, 13, 5, 4), (1, 3, 37, 35, 33, 17), (1, 2, 9, 7, 3, 50)]


def _complex(planes: torch.Tensor) -> torch.Tensor:
    return torch.complex(*planes.double())


def forward_definition(x, f1, f2, conj=False):
    modes = torch.einsum("kh,bchw,wl->klbc", _complex(f1), x.to(torch.complex128), _complex(f2))
    return torch.stack((modes.real, -modes.imag if conj else modes.imag))


def inverse_definition(y, g1, g2, conj=False):
    modes = _complex(y).conj() if conj else _complex(y)
    return torch.einsum("hk,klbc,lw->bchw", _complex(g1), modes, _complex(g2)).real


def line_forward_definition(x, f, conj=False):
    modes = torch.einsum("bcw,wl->lbc", x.to(torch.complex128), _complex(f))
    return torch.stack((modes.real, -modes.imag if conj else modes.imag))


def line_inverse_definition(y, g, conj=False):
    modes = _complex(y).conj() if conj else _complex(y)
    return torch.einsum("lbc,lw->bcw", modes, _complex(g)).real


def make(shape, device):
    b, c, n1, n2, k1, k2 = shape
    x = torch.randn(b, c, n1, n2, device=device)
    y = torch.randn(2, k1, k2, b, c, device=device)
    first = torch.randn(2, k1, n1, device=device)
    second = torch.randn(2, n2, k2, device=device)
    return x, y, first, second


@pytest.mark.parametrize("conj", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, conj, device):
    x, y, first, second = make(shape, device)
    with nan_empty():
        modes = tdft.tdft2_forward(x, first, second, conj=conj)
        # Transposed views: the bases' strides are arguments.
        planes = tdft.tdft2_inverse(y, first.transpose(1, 2), second.transpose(1, 2), conj=conj)
    assert modes.dtype == planes.dtype == torch.float32
    assert modes.is_contiguous() and planes.is_contiguous()
    assert_close_rel(modes, forward_definition(x, first, second, conj))
    assert_close_rel(planes, inverse_definition(y, first.transpose(1, 2), second.transpose(1, 2), conj))


@pytest.mark.parametrize(("n1", "n2", "k1"), [(16, 12, 6), (15, 13, 5)])
def test_agrees_with_torch_fft(n1, n2, k1, device):
    k2 = n2 // 2 + 1
    rows = torch.arange(n1, dtype=torch.float64)
    columns = torch.arange(n2, dtype=torch.float64)
    signed = torch.arange(k1, dtype=torch.float64) - k1 // 2
    e1 = torch.exp(-2j * torch.pi * torch.outer(signed, rows) / n1)
    e2 = torch.exp(-2j * torch.pi * torch.outer(columns, torch.arange(k2, dtype=torch.float64)) / n2)
    f1, f2 = (torch.stack((e.real, e.imag)).float().to(device) for e in (e1, e2))
    x = torch.randn(2, 2, n1, n2, device=device)
    full = torch.fft.rfft2(x.double())[:, :, signed.long().to(device) % n1]
    expected = torch.view_as_real(full).permute(4, 2, 3, 0, 1)
    assert_close_rel(tdft.tdft2_forward(x, f1, f2), expected)

    # One-sided modes count twice, but for the mean and, on an even grid, the highest frequency.
    twice = torch.full((k2,), 2.0, dtype=torch.float64)
    twice[0] = 1
    if n2 % 2 == 0:
        twice[-1] = 1
    g1 = torch.stack((e1.real, -e1.imag)).transpose(1, 2).float().to(device)
    g2 = (torch.stack((e2.real, -e2.imag)) * twice / (n1 * n2)).transpose(1, 2).float().to(device)
    spectrum = torch.zeros_like(torch.fft.rfft2(x.double()))
    spectrum[:, :, signed.long().to(device) % n1] = full
    # The definition of the real transform: what is not Hermitian in the first column has no real part.
    expected = torch.fft.irfft(torch.fft.ifft(spectrum, dim=2), n=n2, dim=3)
    modes = torch.view_as_real(full).permute(4, 2, 3, 0, 1).float()
    assert_close_rel(tdft.tdft2_inverse(modes, g1, g2), expected, rtol=4e-6)


@pytest.mark.parametrize("few", [False, True])
def test_every_launch_configuration(few, device):
    """All that the autotuner may take on this GPU; in the interpreter, all that it may take on any."""
    shape = (1, 3, 35, 18, 33, 18)
    x, y, first, second = make(shape, device)
    g1, g2 = first.transpose(1, 2), second.transpose(1, 2)
    targets = [target_of(device)] if device.type == "cuda" else TARGETS.values()
    forward, inverse = [], []
    for target in targets:
        forward += [c for c in tdft._forward_candidates(*shape[2:], few, target) if c not in forward]
        inverse += [c for c in tdft._inverse_candidates(*shape[2:], few, target) if c not in inverse]
    expected_modes, expected_planes = forward_definition(x, first, second), inverse_definition(y, g1, g2)
    with nan_empty():
        for candidate in forward:
            assert_close_rel(tdft._launch_forward(x, first, second, candidates=[candidate]), expected_modes)
        for candidate in inverse:
            assert_close_rel(tdft._launch_inverse(y, g1, g2, candidates=[candidate]), expected_planes)


@pytest.mark.parametrize("kind", ["transposed", "channels_last", "expanded", "window"])
def test_strided_input_is_read_in_place(kind, device):
    shape = (2, 3, 12, 10, 4, 3)
    x, _, first, second = make(shape, device)
    if kind == "transposed":
        x = torch.randn(2, 3, 10, 12, device=device).transpose(2, 3)
    elif kind == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif kind == "expanded":
        x = x[:1, :, :, :1].expand(2, 3, 12, 10)
    else:  # what lies around the window is NaN: an entry read beyond the bounds would show
        around = torch.full((4, 5, 17, 16), float("nan"), device=device)
        x = around[1:3, 1:4, 2:14, 3:13].copy_(x)
    assert not x.is_contiguous()
    assert_close_rel(tdft.tdft2_forward(x, first, second), forward_definition(x, first, second))


def test_modes_may_be_strided(device):
    _, y, first, second = make((2, 3, 6, 5, 4, 3), device)
    g1, g2 = first.transpose(1, 2), second.transpose(1, 2)
    strided = y.transpose(3, 4).contiguous().transpose(3, 4)
    assert not strided.is_contiguous()
    assert torch.equal(tdft.tdft2_inverse(strided, g1, g2), tdft.tdft2_inverse(y, g1, g2))


@pytest.mark.parametrize("empty", ["B", "C", "k1", "k2", "N1", "N2"])
def test_empty(empty, device):
    names = ["B", "C", "N1", "N2", "k1", "k2"]
    shape = [0 if name == empty else size for name, size in zip(names, (2, 3, 6, 5, 4, 3), strict=True)]
    x, y, first, second = make(shape, device)
    x.requires_grad_()
    b, c, n1, n2, k1, k2 = shape
    modes = tdft.tdft2_forward(x, first, second)
    planes = tdft.tdft2_inverse(y, first.transpose(1, 2), second.transpose(1, 2))
    assert modes.shape == (2, k1, k2, b, c) and not modes.any()
    assert planes.shape == (b, c, n1, n2) and not planes.any()
    (gradient,) = torch.autograd.grad(modes.sum(), x)
    assert gradient.shape == x.shape and not gradient.any()


def test_gradients_to_third_order(device):
    """Against autograd of the definition in float64, through a loss in which no order of derivative is zero."""
    x, _, first, second = make((2, 2, 7, 6, 3, 4), device)
    g1, g2 = first.transpose(1, 2), second.transpose(1, 2)

    def derivatives(x, forward, inverse):
        y = forward(x, first, second).pow(3)
        value = inverse(y, g1, g2).pow(2).mean()
        found = [value]
        for _ in range(3):
            (gradient,) = torch.autograd.grad(found[-1].pow(2).mean().sqrt(), x, create_graph=True)
            found.append(gradient)
        return found

    x = x / 16
    ours = derivatives(x.requires_grad_(), tdft.tdft2_forward, tdft.tdft2_inverse)
    exact = derivatives(x.detach().double().requires_grad_(), forward_definition, inverse_definition)
    for order, (a, r) in enumerate(zip(ours, exact, strict=True)):
        assert r.abs().max() > 0
        assert_close_rel(a, r, rtol=4e-6 * 4**order)


def test_each_is_the_adjoint_of_the_other(device):
    x, y, first, second = make((2, 3, 11, 9, 5, 4), device)
    left = (tdft.tdft2_forward(x, first, second).double() * y.double()).sum()
    back = tdft.tdft2_inverse(y, first.transpose(1, 2), second.transpose(1, 2), conj=True)
    right = (x.double() * back.double()).sum()
    assert_close_rel(left, right, rtol=1e-5)


def test_writes_stay_inside(monkeypatch, device):
    shape = (1, 3, 19, 21, 5, 3)
    x, y, first, second = make(shape, device)
    buffers = []

    def guarded(size, *, dtype, device):
        count, margin = torch.Size(size).numel(), 4096
        buffer = torch.full((count + 2 * margin,), 7.0, dtype=dtype, device=device)
        buffers.append((buffer, margin))
        return buffer[margin : margin + count].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        modes = tdft._launch_forward(x, first, second)
        planes = tdft._launch_inverse(y, first.transpose(1, 2), second.transpose(1, 2))
    assert len(buffers) == 2
    for buffer, margin in buffers:
        assert (buffer[:margin] == 7).all() and (buffer[-margin:] == 7).all()
    assert_close_rel(modes, forward_definition(x, first, second))
    assert_close_rel(planes, inverse_definition(y, first.transpose(1, 2), second.transpose(1, 2)))


def test_repeated_runs_agree_bit_for_bit(device):
    x, y, first, second = make((2, 3, 20, 18, 5, 4), device)
    for run in (
        lambda: tdft.tdft2_forward(x, first, second),
        lambda: tdft.tdft2_inverse(y, first.transpose(1, 2), second.transpose(1, 2)),
    ):
        expected = run()
        assert all(torch.equal(run(), expected) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit(dtype, device):
    """In the interpreter this says that 16-bit loads and stores are right; its products are in float32 there."""
    x, y, first, second = make((2, 3, 17, 13, 5, 4), device)
    x = x.to(dtype).requires_grad_()
    modes = tdft.tdft2_forward(x, first, second)
    assert modes.dtype == torch.float32
    assert_close_rel(modes, forward_definition(x, first, second), dtype=dtype)
    (gradient,) = torch.autograd.grad((modes * y).sum(), x)
    g1, g2 = first.transpose(1, 2), second.transpose(1, 2)
    expected = inverse_definition(y, g1, g2, conj=True)
    assert gradient.dtype == dtype
    assert_close_rel(gradient, expected)
    planes = tdft.tdft2_inverse(y, g1, g2, dtype)
    assert planes.dtype == dtype
    assert_close_rel(planes, inverse_definition(y, g1, g2))


def test_a_basis_that_requires_a_gradient_is_refused(device):
    x, _, first, second = make((1, 1, 4, 4, 2, 2), device)
    modes = tdft.tdft2_forward(x, first.requires_grad_(), second)
    with pytest.raises(ValueError, match="must not require gradients"):
        modes.sum().backward()


# Lines: the same in one dimension. (B, C, N, k)
LINES = [(1, 1, 1, 1), (2, 3, 37, 5), (3, 23, 70, 33)]


def make_lines(shape, device):
    b, c, n, k = shape
    return (
        torch.randn(b, c, n, device=device),
        torch.randn(2, k, b, c, device=device),
        torch.randn(2, n, k, device=device),
    )


@pytest.mark.parametrize("conj", [False, True])
@pytest.mark.parametrize("shape", LINES, ids=str)
def test_lines(shape, conj, device):
    x, y, f = make_lines(shape, device)
    with nan_empty():
        modes = tdft.tdft1_forward(x.transpose(0, 1).contiguous().transpose(0, 1), f, conj=conj)
        lines = tdft.tdft1_inverse(y, f.transpose(1, 2), conj=conj)
    assert modes.is_contiguous() and lines.is_contiguous()
    assert_close_rel(modes, line_forward_definition(x, f, conj))
    assert_close_rel(lines, line_inverse_definition(y, f.transpose(1, 2), conj))


def test_few_lines_share_out_their_points(device, monkeypatch):
    """The shares are summed in a fixed order; the last one is shorter."""
    monkeypatch.setattr(tdft._lib, "multiprocessors", lambda device: 8)
    x, _, f = make_lines((1, 3, 300, 6), device)
    with nan_empty():
        modes = tdft.tdft1_forward(x, f)
    assert_close_rel(modes, line_forward_definition(x, f))
    assert torch.equal(modes, tdft.tdft1_forward(x, f))


def test_every_launch_configuration_of_lines(device):
    x, y, f = make_lines((2, 35, 70, 33), device)
    skip = torch.randn_like(x)
    with nan_empty():
        for few in (False, True):
            for meta in tdft._line_candidates(70, 33, few, True):
                assert_close_rel(tdft._launch_forward(x, f, candidates=[meta]), line_forward_definition(x, f))
            for meta in tdft._line_candidates(70, 33, few, False):
                lines = tdft._launch_inverse(y, f.mT, skip=skip, activation="relu", candidates=[meta])
                assert_close_rel(lines, (line_inverse_definition(y, f.mT) + skip).relu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lines_of_sixteen_bits(dtype, device):
    x, y, f = make_lines((2, 3, 37, 5), device)
    x = x.to(dtype)
    assert_close_rel(tdft.tdft1_forward(x, f), line_forward_definition(x, f), dtype=dtype)
    lines = tdft.tdft1_inverse(y, f.mT, dtype)
    assert lines.dtype == dtype
    assert_close_rel(lines, line_inverse_definition(y, f.mT))


@pytest.mark.parametrize("empty", range(4))
def test_empty_lines(empty, device):
    shape = [2, 3, 6, 4]
    shape[empty] = 0
    x, y, f = make_lines(shape, device)
    modes, lines = tdft.tdft1_forward(x.requires_grad_(), f), tdft.tdft1_inverse(y, f.mT, activation="gelu")
    assert modes.shape == y.shape and not modes.any()
    assert lines.shape == x.shape and not lines.any()
    (gradient,) = torch.autograd.grad(modes.sum(), x)
    assert gradient.shape == x.shape and not gradient.any()


# The epilogue


def _epilogue_case(d, device):
    if d == 1:
        x, y, f = make_lines((2, 3, 19, 5), device)
        return x, y, (f.mT,), tdft.tdft1_inverse, line_inverse_definition
    x, y, first, second = make((2, 3, 9, 11, 4, 3), device)
    return x, y, (first.mT, second.mT), tdft.tdft2_inverse, inverse_definition


def _activated(p, activation):
    return p if activation is None else getattr(torch.nn.functional, activation)(p)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("with_skip", [True, False])
@pytest.mark.parametrize("d", [1, 2])
def test_epilogue_and_its_gradients(d, with_skip, activation, device):
    """First derivatives through the kernel, second ones through the operations that it is made of."""
    x, y, bases, inverse, definition = _epilogue_case(d, device)
    # Strided: channels innermost.
    skip = x.movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_() if with_skip else None
    inputs = [t for t in (y.requires_grad_(), skip) if t is not None]
    with nan_empty():
        value = inverse(y, *bases, skip=skip, activation=activation)
        # An expanded gradient: all strides are 0.
        ones = torch.autograd.grad(value.sum(), inputs, retain_graph=True)
    first = torch.autograd.grad(value.square().sum(), inputs, retain_graph=True)
    graph = torch.autograd.grad(value.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(3).sum() for g in graph), inputs)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    p = definition(exact[0], *bases)
    expected = _activated(p + exact[1] if with_skip else p, activation)
    assert_close_rel(value, expected)
    for ours, wanted in zip(ones, torch.autograd.grad(expected.sum(), exact, retain_graph=True), strict=True):
        assert_close_rel(ours, wanted, rtol=5e-6)
    wanted_graph = torch.autograd.grad(expected.square().sum(), exact, create_graph=True)
    wanted_second = torch.autograd.grad(sum(g.pow(3).sum() for g in wanted_graph), exact)
    for ours, again, wanted in zip(first, graph, wanted_graph, strict=True):
        assert_close_rel(ours, wanted, rtol=5e-6)
        assert_close_rel(again, wanted, rtol=5e-6)
    for ours, wanted in zip(second, wanted_second, strict=True):
        assert_close_rel(ours, wanted, rtol=2e-5)


def test_epilogue_of_sixteen_bits(device):
    x, y, bases, inverse, definition = _epilogue_case(2, device)
    skip = x.bfloat16().requires_grad_()
    value = inverse(y.requires_grad_(), *bases, torch.float16, skip=skip, activation="gelu")
    assert value.dtype == torch.float16
    exact = _activated(definition(y, *bases) + skip.double(), "gelu")
    assert_close_rel(value, exact)
    grad_y, grad_skip = torch.autograd.grad(value, (y, skip), torch.ones_like(value))
    assert grad_skip.dtype == torch.bfloat16
    exact_y, exact_skip = torch.autograd.grad(exact, (y, skip), torch.ones_like(exact))
    assert_close_rel(grad_y, exact_y, dtype=torch.float16)
    assert_close_rel(grad_skip, exact_skip)


def test_nothing_of_the_fields_size_is_saved_but_the_skip(device):
    x, y, bases, inverse, _ = _epilogue_case(2, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        inverse(y.requires_grad_(), *bases, activation="gelu")
        assert saved and max(t.numel() for t in saved) < x.numel()
        saved.clear()
        inverse(y, *bases, skip=x, activation="gelu")
    large = [t for t in saved if t.shape == x.shape]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


def test_nan_passes_the_epilogue(device):
    _, y, bases, inverse, _ = _epilogue_case(2, device)
    y[0, 0, 0, 0, 0] = float("nan")
    for activation in ("relu", "gelu"):
        field = inverse(y, *bases, activation=activation)
        assert field[0, 0].isnan().all() and field[1].isfinite().all()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "activation must be one of None, 'relu', 'gelu', got 'tanh'", {"activation": "tanh"}),
        (ValueError, r"skip must have the result's shape \(2, 3, 9, 11\)", {"skip": torch.zeros(2, 3, 9, 10)}),
        (TypeError, "skip must be float32, float16 or bfloat16", {"skip": torch.zeros(2, 3, 9, 11).double()}),
    ],
)
def test_epilogue_refuses(error, message, options, device):
    _, y, bases, inverse, _ = _epilogue_case(2, device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        inverse(y, *bases, **options)
