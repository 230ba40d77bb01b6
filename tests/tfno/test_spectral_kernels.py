"""The spectral convolution through the Triton kernels, forward and all gradients, against the float64 definition."""

import pytest
import torch

import torchlayers
from torchlayers.factorized import FactorizedTensor
from torchlayers.testing import assert_close_rel
from torchlayers.tfno import FNOBlocks, SpectralConv, spectral_conv
from torchlayers.tfno.reference import spectral_conv as definition

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

SHAPES = [
    # (B, Ci, Co, grid, n_modes, output_shape)
    (2, 3, 2, (12, 10), (5, 6), None),
    (1, 2, 3, (9, 11), (4, 4), (12, 7)),
    (3, 1, 1, (6, 8), (8, 8), None),
]


@pytest.mark.parametrize(("batch", "ci", "co", "grid", "modes", "size"), SHAPES)
def test_forward_and_gradients(device, batch, ci, co, grid, modes, size):
    x = torch.randn(batch, ci, *grid, device=device, requires_grad=True)
    w = torch.randn(ci, co, modes[0], modes[1] // 2 + 1, dtype=torch.complex64, device=device, requires_grad=True)
    bias = torch.randn(co, device=device, requires_grad=True)
    y = spectral_conv(x, w, modes, bias=bias, output_shape=size, backend="triton")
    assert torchlayers.last_dispatch() == "triton: tdft2_forward"
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, w, bias), g)

    double = (x.double(), w.to(torch.complex128), bias.double())
    exact = [t.detach().requires_grad_() for t in double]
    reference = definition(exact[0], exact[1], modes, bias=exact[2], output_shape=size)
    wanted = torch.autograd.grad(reference, exact, g.double())
    assert_close_rel(y, reference, rtol=2e-6)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close_rel(grad, want, rtol=2e-6)


@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt"])
@pytest.mark.parametrize("implementation", ["reconstructed", "factorized"])
def test_factorized_layers(device, factorization, implementation):
    layer = SpectralConv(
        2, 3, (4, 4), factorization=factorization, rank=0.5, implementation=implementation, backend="triton",
        device=device,
    )  # fmt: skip
    x = torch.randn(2, 2, 10, 9, device=device)
    full = layer.weight.to_tensor().to(torch.complex128)
    assert_close_rel(layer(x), definition(x.double(), full, (4, 4), bias=layer.bias.double()), rtol=2e-6)


def test_half_precision_fields_and_separable(device):
    weight = FactorizedTensor((3, 4, 3), complex=True, device=device)
    x = torch.randn(2, 3, 8, 8, device=device).half()
    y = spectral_conv(x, weight, (4, 4), separable=True, backend="triton")
    assert y.dtype == torch.float16
    exact = definition(x.double(), weight.to_tensor().to(torch.complex128), (4, 4), separable=True)
    assert_close_rel(y, exact, rtol=2e-3)


def test_second_derivatives(device):
    layer = SpectralConv(2, 2, (4, 4), backend="triton", device=device)
    x = torch.randn(1, 2, 8, 6, device=device, requires_grad=True)

    def second(layer, x):
        (g,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *layer.parameters()])

    triton = second(layer, x)
    plain = SpectralConv(2, 2, (4, 4), device=device, dtype=torch.float64, backend="torch")
    plain.load_state_dict({k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in
                           layer.state_dict().items()})  # fmt: skip
    for ours, wanted in zip(triton, second(plain, x.detach().double().requires_grad_()), strict=True):
        assert_close_rel(ours, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("what", "shape", "dtype", "options"),
    [
        ("float64", (1, 2, 8, 8), torch.float64, {}),
        ("complex data", (1, 2, 8, 8), torch.complex64, {"complex_data": True}),
        ("method='fft'", (1, 2, 8, 8), torch.float32, {"method": "fft"}),
    ],
)
def test_what_the_kernels_lack_raises(device, what, shape, dtype, options):
    d = len(shape) - 2
    real = dtype.to_real() if dtype.is_complex else dtype
    layer = SpectralConv(2, 2, (4,) * d, backend="triton", device=device, dtype=real, **options)
    with pytest.raises(torchlayers.BackendError, match=f"does not support {what}"):
        layer(torch.zeros(shape, dtype=dtype, device=device))


def test_empty_batch(device):
    layer = SpectralConv(2, 3, (4, 4), backend="triton", device=device)
    assert layer(torch.zeros(0, 2, 8, 8, device=device)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("grid", "modes", "size", "activation"),
    [
        ((13,), (5,), (9,), "gelu"),
        ((7, 6), (4, 4), None, "relu"),
        ((5, 6, 7), (3, 4, 4), None, "gelu"),
        ((2, 3, 4, 5), (2, 2, 4, 3), (3, 3, 4, 4), None),
    ],
)
def test_every_dimension_with_the_whole_epilogue(device, grid, modes, size, activation):
    x = torch.randn(2, 2, *grid, device=device, requires_grad=True)
    w = torch.randn(2, 3, *modes[:-1], modes[-1] // 2 + 1, dtype=torch.complex64, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    skip = torch.randn(2, 3, *(size or grid), device=device, requires_grad=True)
    inputs = (x, w, bias, skip)
    options = {"output_shape": size, "skip": skip, "activation": activation}
    y = spectral_conv(x, w, modes, bias=bias, backend="triton", **options)
    assert torchlayers.last_dispatch() == f"triton: tdft{min(len(grid), 2)}_forward"
    assert_close_rel(spectral_conv(x, w, modes, bias=bias, backend="torch", **options), y, rtol=4e-6)
    g = torch.randn_like(y)
    exact = [t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_() for t in inputs]
    expected = definition(exact[0], exact[1], modes, bias=exact[2], output_shape=size) + exact[3]
    if activation is not None:
        expected = getattr(torch.nn.functional, activation)(expected)
    assert_close_rel(y, expected)
    wanted = torch.autograd.grad(expected, exact, g.double())
    for ours, reference in zip(torch.autograd.grad(y, inputs, g), wanted, strict=True):
        assert_close_rel(ours, reference, rtol=4e-6)


@pytest.mark.parametrize("factorization", ["dense", "cp", "tucker", "tt"])
@pytest.mark.parametrize(("grid", "modes"), [((9,), (6,)), ((4, 5, 6), (4, 3, 4))])
def test_factorized_layers_in_one_and_three_dimensions(device, factorization, grid, modes):
    """Kept modes are a window of the weight's."""
    layer = SpectralConv(
        3, 2, [m - 1 for m in modes], max_n_modes=[*modes[:-1], modes[-1] // 2 + 1], factorization=factorization,
        rank=0.7, implementation="factorized", backend="triton", device=device,
    )  # fmt: skip
    x = torch.randn(2, 3, *grid, device=device, requires_grad=True)
    y = layer(x)
    inputs = (x, *layer.parameters())
    g = torch.randn_like(y)
    plain = SpectralConv(
        3, 2, [m - 1 for m in modes], max_n_modes=[*modes[:-1], modes[-1] // 2 + 1], factorization=factorization,
        rank=0.7, implementation="reconstructed", backend="torch", device=device, dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
            theirs.copy_(ours)
    z = x.detach().double().requires_grad_()
    expected = plain(z)
    assert_close_rel(y, expected)
    wanted = torch.autograd.grad(expected, (z, *plain.parameters()), g.double())
    for ours, reference in zip(torch.autograd.grad(y, inputs, g), wanted, strict=True):
        assert_close_rel(ours, reference, rtol=5e-6)


@pytest.mark.parametrize(
    ("preactivation", "non_linearity"),
    [(False, torch.nn.functional.gelu), (True, torch.relu), (False, torch.tanh)],
)
def test_blocks_fuse_skip_and_activation(device, preactivation, non_linearity):
    def blocks(**options):
        return FNOBlocks(2, 2, (4, 4), n_layers=2, preactivation=preactivation, non_linearity=non_linearity, **options)

    ours = blocks(device=device, backend="triton", factorization="tucker", rank=0.5)
    plain = blocks(device=device, backend="torch", factorization="tucker", rank=0.5, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            b.copy_(a)
    x = torch.randn(2, 2, 8, 7, device=device)
    y, expected = ours(ours(x, 0), 1), plain(plain(x.double(), 0), 1)
    assert_close_rel(y, expected)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, list(ours.parameters()), g)
    for a, b in zip(found, torch.autograd.grad(expected, list(plain.parameters()), g.double()), strict=True):
        assert_close_rel(a, b, rtol=5e-6)


def test_the_result_is_promoted_with_the_skip(device):
    x, w = torch.randn(1, 2, 6, 5, device=device), torch.randn(2, 3, 4, 3, dtype=torch.complex64, device=device)
    skip = torch.randn(1, 3, 6, 5, device=device)
    for backend in ("triton", "torch"):
        assert spectral_conv(x.half(), w, skip=skip, backend=backend).dtype == torch.float32
        assert spectral_conv(x.half(), w, skip=skip.half(), backend=backend).dtype == torch.float16
        assert spectral_conv(x, w, skip=skip.half(), backend=backend).dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "dtype", "factorization"),
    [
        ("half", torch.float32, "dense"),
        ("half", torch.float16, "tt"),
        ("half", torch.bfloat16, "cp"),
        ("mixed", torch.float32, "tucker"),
        ("mixed", torch.bfloat16, "dense"),
    ],
)
def test_half_precision(device, precision, dtype, factorization):
    """The error is that of rounding the modes to 16 bits: there, and no more than a few times that."""
    weight = FactorizedTensor((3, 2, 4, 3), factorization, 0.8, complex=True, device=device)
    x = torch.randn(2, 3, 8, 9, device=device).tanh().to(dtype).requires_grad_()
    y = spectral_conv(x, weight, backend="triton", precision=precision, implementation="factorized")
    assert y.dtype == dtype
    exact = x.detach().double().requires_grad_()
    expected = definition(exact, weight.to_tensor().to(torch.complex128), (4, 4))
    low = torch.float16 if dtype == torch.float32 else dtype
    assert assert_close_rel(y, expected, dtype=low) > 1e-5
    g = torch.randn_like(y)
    (gradient,), (wanted,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, exact, g.double())
    assert_close_rel(gradient, wanted, dtype=low)
    full = spectral_conv(x.detach().float(), weight, backend="triton")
    assert_close_rel(full, expected)


def test_half_precision_saves_modes_of_sixteen_bits(device):
    x = torch.randn(2, 3, 8, 9, device=device, requires_grad=True)
    w = torch.randn(3, 2, 4, 3, dtype=torch.complex64, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spectral_conv(x, w, backend="triton", precision="half", activation=None)
    modes = [t for t in saved if t.shape == (2, 12, 2, 3)]
    assert modes and all(t.dtype == torch.float16 for t in modes)
    assert max(t.numel() for t in saved) < x.numel()


def test_full_graph_through_the_kernels(device):
    """Transforms, mixing, skip and activation trace into one graph, forward and backward."""
    blocks = FNOBlocks(2, 2, (4, 4), n_layers=2, factorization="tucker", rank=0.5, device=device, backend="triton")
    x = torch.randn(1, 2, 6, 5, device=device, requires_grad=True)
    compiled = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    inputs = (x, *blocks.parameters())
    y, expected = compiled(x, 0), blocks(x, 0)
    assert_close_rel(y, expected)
    used = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(y.square().sum(), used, allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), used, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close_rel(a, b, rtol=5e-6)
