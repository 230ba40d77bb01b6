"""The spectral convolution against oracles of this file: loops over signed frequencies, plane waves, neuraloperator."""

import itertools
import math

import numpy as np
import pytest
import torch

from torchlayers.factorized import FactorizedTensor
from torchlayers.testing import assert_close_rel, assert_equivariant
from torchlayers.tfno import (
    JointSpectralWeights,
    SpectralConv,
    spectral_conv,
    spectral_resample,
    transforms,
    truncated_irfftn,
    truncated_rfftn,
)
from torchlayers.tfno.reference import spectral_conv as definition

METHODS = ["fft", "dft", "mixed"]


def signed(k):
    return range(-(k // 2), k - k // 2)


def by_frequencies(x, w, modes, out, complex_data=False, separable=False):
    """One frequency at a time, each by its own exponential sum, in NumPy."""
    x, w = x.numpy(), w.numpy()
    grid, d = x.shape[2:], x.ndim - 2
    axes, places = [], []
    for axis, (m, n, size, stored) in enumerate(zip(modes, grid, out, w.shape[-d:], strict=True)):
        if axis == d - 1 and not complex_data:
            kept = [f for f in range(m // 2 + 1) if f < stored and 2 * f <= n and 2 * f <= size]
            places.append({f: f for f in kept})
        else:
            fits = [set(signed(k)) for k in (m, n, size, stored)]
            kept = sorted(set.intersection(*fits))
            places.append({f: f + stored // 2 for f in kept})
        axes.append(kept)
    y = np.zeros((x.shape[0], w.shape[0 if separable else 1], *out), dtype=complex)
    for f in itertools.product(*axes):
        analysis, synthesis = np.ones(grid, complex), np.ones(out, complex)
        for axis, (freq, n, m) in enumerate(zip(f, grid, out, strict=True)):
            shape = [1] * d
            shape[axis] = -1
            analysis = analysis * np.exp(-2j * np.pi * freq * np.arange(n) / n).reshape(shape)
            synthesis = synthesis * np.exp(2j * np.pi * freq * np.arange(m) / m).reshape(shape)
        coefficient = (x * analysis).sum(axis=tuple(range(2, 2 + d))) / math.prod(grid)
        entry = w[(..., *(places[axis][freq] for axis, freq in enumerate(f)))]
        mixed = coefficient * entry if separable else coefficient @ entry
        both_signs = 1 if complex_data or f[-1] == 0 or 2 * f[-1] == out[-1] else 2
        y += both_signs * mixed.reshape(*mixed.shape, *(1,) * d) * synthesis
    return torch.from_numpy(y if complex_data else y.real)


# Axes are taken from the right, so that 1-D, 2-D and 3-D each see odd and even grids, modes and outputs.
CASES = [
    ((6, 9, 8), (4, 5, 4), None),
    ((5, 8, 7), (3, 4, 6), (6, 5, 9)),  # odd, even and fewer points than modes
    ((4, 5, 6), (4, 8, 8), (5, 12, 5)),
    ((4, 6, 8), (4, 6, 8), None),  # all modes, with the unpaired ones
    ((4, 6, 8), (4, 6, 8), (6, 4, 12)),  # the input's Nyquist column is none of the output's
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize(("d", "complex_data"), [(1, False), (2, False), (3, False), (1, True), (2, True), (3, True)])
def test_equals_the_loop_over_signed_frequencies(d, complex_data, case, method):
    grid, modes, out = (None if part is None else part[-d:] for part in CASES[case])
    out = out or grid
    stored = modes if complex_data else (*modes[:-1], modes[-1] // 2 + 1)
    x = torch.randn(2, 3, *grid, dtype=torch.complex128 if complex_data else torch.float64)
    for separable in (False, True):
        w = torch.randn(*((3,) if separable else (3, 2)), *stored, dtype=torch.complex128)
        expected = by_frequencies(x, w, modes, out, complex_data, separable)
        options = {"output_shape": out, "complex_data": complex_data, "separable": separable}
        assert_close_rel(spectral_conv(x, w, modes, method=method, **options), expected, rtol=1e-13)
        assert_close_rel(definition(x, w, modes, **options), expected, rtol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_plane_waves_have_the_closed_form(method):
    n, m = 12, 15
    h, w = torch.meshgrid(torch.arange(n).double(), torch.arange(m).double(), indexing="ij")
    tau = 2 * math.pi

    def phase(f1, f2):
        return tau * (f1 * h / n + f2 * w / m)

    def conv(weight, field):
        return spectral_conv(field[None, None], weight, (8, 8), method=method)[0, 0]

    weight = torch.zeros(1, 1, 8, 5, dtype=torch.complex128)
    weight[0, 0, 4 + 2, 3] = 2 + 1j
    theta = phase(2, 3)
    torch.testing.assert_close(conv(weight, theta.cos()), 2 * theta.cos() - theta.sin())
    torch.testing.assert_close(conv(weight, phase(-2, 3).cos()), torch.zeros(n, m, dtype=torch.float64))

    # On the column f_d = 0 the weight acts through its Hermitian part only.
    weight = torch.zeros(1, 1, 8, 5, dtype=torch.complex128)
    weight[0, 0, 4 - 2, 0] = 1
    torch.testing.assert_close(conv(weight, phase(2, 0).cos()), 0.5 * phase(2, 0).cos())
    weight = torch.zeros(1, 1, 8, 5, dtype=torch.complex128)
    weight[0, 0, 0, 0] = 1
    torch.testing.assert_close(conv(weight, phase(4, 0).cos()), 0.5 * phase(4, 0).cos())
    weight[0, 0, 0, 0], weight[0, 0, 4, 0] = 0, 1j
    torch.testing.assert_close(conv(weight, torch.ones_like(h)), torch.zeros_like(h))


@pytest.mark.parametrize("grid", [(16, 16), (16, 17), (24, 10)])
@pytest.mark.parametrize("factorization", [None, "cp", "tucker", "tt"])
def test_equals_neuraloperator_on_even_grids_of_unchanged_size(grid, factorization):
    neuralop = pytest.importorskip("neuralop.layers.spectral_convolution")
    peer = neuralop.SpectralConv(3, 4, (8, 6), factorization=factorization, rank=0.4, max_n_modes=(10, 6))
    ours = SpectralConv(3, 4, (8, 6), factorization=factorization, rank=0.4, max_n_modes=(10, 6))
    assert ours.n_modes == peer.n_modes and ours.max_n_modes == list(peer.max_n_modes)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, *grid)
    assert_close_rel(ours(x), peer(x), rtol=1e-6)
    # Back again: what ours saves, neuraloperator loads.
    torch.nn.init.normal_(ours.bias)
    peer.load_state_dict(ours.state_dict())
    assert_close_rel(ours(x), peer(x), rtol=1e-6)
    ours.n_modes = peer.n_modes = (6, 4)
    assert_close_rel(ours(x), peer(x), rtol=1e-6)


def test_float32_is_as_accurate_as_asked():
    for method, (n, modes) in itertools.product(METHODS, [(64, 16), (96, 32)]):
        layer = SpectralConv(4, 4, (modes, modes), method=method)
        x = torch.randn(1, 4, n, n)
        exact = definition(x.double(), layer.weight.to_tensor().to(torch.complex128), (modes, modes))
        exact = exact + layer.bias.double()
        assert_close_rel(layer(x), exact, rtol=1e-6)


@pytest.mark.parametrize("factorization", ["dense", "cp", "tucker", "tt"])
@pytest.mark.parametrize("separable", [False, True])
def test_factors_give_what_the_full_tensor_gives(factorization, separable):
    channels = (4,) if separable else (4, 3)
    weight = FactorizedTensor((*channels, 6, 5, 4), factorization, 0.4, complex=True, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 6, 9, dtype=torch.float64)
    for modes in [(6, 5, 6), (3, 4, 4)]:
        expected = definition(x, weight.to_tensor(), modes, separable=separable)
        wanted = torch.autograd.grad(expected.square().sum(), list(weight.parameters()))
        for implementation in ("auto", "reconstructed", "factorized"):
            y = spectral_conv(x, weight, modes, separable=separable, implementation=implementation)
            assert_close_rel(y, expected, rtol=1e-12)
            grads = torch.autograd.grad(y.square().sum(), list(weight.parameters()))
            for grad, reference in zip(grads, wanted, strict=True):
                assert_close_rel(grad, reference, rtol=1e-11)


@pytest.mark.parametrize("factorization", ["dense", "cp", "tucker", "tt"])
def test_joint_weights_are_the_layers_of_one_tensor(factorization):
    joint = JointSpectralWeights(3, 4, 5, (4, 6), factorization=factorization, rank=0.4, dtype=torch.float64)
    full = joint.to_tensor()
    assert full.shape == (3, 4, 5, 4, 4) == joint.shape
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for layer in (0, 2, -1):
        assert_close_rel(joint[layer].to_tensor(), full[layer], rtol=1e-12)
        for implementation in ("reconstructed", "factorized"):
            y = spectral_conv(x, joint[layer], (4, 6), implementation=implementation)
            assert_close_rel(y, definition(x, full[layer], (4, 6)), rtol=1e-12)
    with pytest.raises(IndexError, match="index must be in"):
        joint[3]


def test_auto_avoids_the_flops_and_the_memory(monkeypatch):
    from torchlayers.tfno import weights

    def choice(factorization, rank, batch):
        w = FactorizedTensor((64, 64, 64, 33), factorization, rank, complex=True, device="meta")
        return weights.choose_implementation(weights.SpectralWeight.of(w), batch)

    # 120 times the FLOPs of a dense product and a gigabyte between the factors, where the ordinary rank is 3845.
    assert choice("cp", 0.1, 16) == "reconstructed"
    assert choice("cp", 0.001, 16) == "factorized"
    assert choice("tucker", 0.01, 16) == "factorized"
    assert choice("tucker", 0.5, 256) == "reconstructed"
    monkeypatch.setattr(weights, "MEMORY_CAP", 2**20)
    assert choice("cp", 0.01, 1000) == "reconstructed"


@pytest.mark.parametrize("factorization", [None, "cp", "tucker", "tt"])
def test_initial_scale_is_that_of_the_dense_weight(factorization):
    layer = SpectralConv(12, 20, (12, 12), factorization=factorization, rank=0.3)
    rms = [layer.weight.to_tensor().abs().square().mean()]
    for _ in range(15):
        layer.reset_parameters()
        rms.append(layer.weight.to_tensor().abs().square().mean())
    assert abs(torch.stack(rms).mean().sqrt().item() / 0.25 - 1) < 0.05


def test_translation_equivariance_by_any_pixel_shift():
    layer = SpectralConv(2, 3, (5, 6), dtype=torch.float64)
    x = torch.randn(1, 2, 11, 14, dtype=torch.float64)
    assert_equivariant(layer, x, lambda t: torch.roll(t, (3, -5), (2, 3)), tol=1e-12)


@pytest.mark.parametrize(("grid", "size"), [((16, 16), (32, 48)), ((15, 17), (30, 34)), ((15, 16), (45, 32))])
def test_a_band_limited_field_is_the_same_function_at_every_resolution(grid, size):
    spectrum = torch.randn(1, 2, 5, 4, dtype=torch.complex128)
    coarse, fine = truncated_irfftn(spectrum, grid), truncated_irfftn(spectrum, size)
    steps = tuple(m // n for n, m in zip(grid, size, strict=True))
    subsampled = (..., slice(None, None, steps[0]), slice(None, None, steps[1]))
    torch.testing.assert_close(fine[subsampled], coarse)
    layer = SpectralConv(2, 2, (7, 6), dtype=torch.float64)
    torch.testing.assert_close(layer(fine)[subsampled], layer(coarse))
    torch.testing.assert_close(layer(coarse, output_shape=size), layer(fine))
    torch.testing.assert_close(layer(fine, output_shape=grid), layer(coarse))
    torch.testing.assert_close(layer.transform(coarse, size), fine)
    torch.testing.assert_close(spectral_resample(fine, grid), coarse)
    scaled = SpectralConv(2, 2, (7, 6), resolution_scaling_factor=[2, 0.5], dtype=torch.float64)
    assert scaled(coarse).shape[2:] == scaled.transform(coarse).shape[2:] == (2 * grid[0], round(grid[1] / 2))


@pytest.mark.parametrize(("n", "m"), [(8, 12), (8, 13), (9, 12), (12, 8), (13, 8), (12, 9)])
def test_resampling_equals_scipys_rule(n, m):
    signal = pytest.importorskip("scipy.signal")
    x = torch.randn(3, n, dtype=torch.float64)
    expected = torch.from_numpy(signal.resample(x.numpy(), m, axis=-1))
    torch.testing.assert_close(spectral_resample(x, (m,)), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("complex_data", [False, True])
def test_transforms_and_their_adjoints(method, complex_data):
    dtype = torch.complex128 if complex_data else torch.float64
    x = torch.randn(2, 6, 7, 10, dtype=dtype, requires_grad=True)
    X = truncated_rfftn(x, (4, 5, 6), method=method)
    full = torch.fft.fftn(x.detach(), dim=(1, 2, 3), norm="forward")
    last = list(signed(6)) if complex_data else [0, 1, 2, 3]
    torch.testing.assert_close(X, full[:, list(signed(4))][:, :, list(signed(5))][..., last])
    # <X(x), G> = <x, X^T G> with the real inner product; the derivative of a linear map is its adjoint.
    g = torch.randn_like(X)
    (adjoint,) = torch.autograd.grad(X, x, g)
    torch.testing.assert_close((X * g.conj()).real.sum(), (x * adjoint.conj()).real.sum())
    y = truncated_irfftn(X, (6, 7, 10), complex_data=complex_data, method=method)
    again = truncated_irfftn(truncated_rfftn(y, (4, 5, 6), method=method), (6, 7, 10), complex_data=complex_data)
    if complex_data:  # of real fields the unpaired mode -m/2 comes back halved
        torch.testing.assert_close(again, y)
    assert truncated_rfftn(x[:0], (4, 5, 6), method=method).shape == (0, *X.shape[1:])
    assert truncated_irfftn(X[:0], (6, 7, 10), complex_data=complex_data).shape == (0, 6, 7, 10)


def test_truncated_irfftn_of_all_modes_is_irfftn():
    Y = torch.randn(3, 6, 5, dtype=torch.complex128)
    shifted = torch.fft.ifftshift(Y, dim=1)
    columns = torch.fft.ifft(shifted, dim=1, norm="forward")  # then C2R, whose rule for the outer columns is the one
    torch.testing.assert_close(truncated_irfftn(Y, (6, 8)), torch.fft.irfft(columns, n=8, norm="forward"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func's own import
@pytest.mark.parametrize(
    ("method", "large_buffer"), [("fft", 2**25), ("mixed", 2**25), ("dft", 2**25), ("auto", 2**25), ("auto", 0)]
)
def test_functional_transforms(method, large_buffer, monkeypatch):
    """torch.func's gradient, jvp and vmap, and second derivatives; "auto" as it chooses for small and large fields."""
    monkeypatch.setattr(transforms, "_LARGE_BUFFER", large_buffer)
    x = torch.randn(3, 2, 8, 9, dtype=torch.float64)
    weight = torch.randn(2, 2, 4, 3, dtype=torch.complex128)

    def energy(x):
        return spectral_conv(x, weight, method=method).square().sum()

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(energy(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(energy)(x), grad)
    tangent = torch.randn_like(x)
    torch.testing.assert_close(torch.func.jvp(energy, (x,), (tangent,))[1], (grad * tangent).sum())
    mapped = torch.vmap(lambda sample: spectral_conv(sample[None], weight, method=method)[0])(x)
    torch.testing.assert_close(mapped, spectral_conv(x, weight, method=method))
    assert torch.autograd.gradgradcheck(energy, (leaf,), fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("implementation", ["reconstructed", "factorized"])
def test_gradients(method, implementation):
    layer = SpectralConv(
        2, 2, (3, 4), factorization="tucker", rank=0.6, implementation=implementation, method=method,
        dtype=torch.float64,
    )  # fmt: skip
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def f(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, (6, 4)))

    assert torch.autograd.gradcheck(f, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *values), fast_mode=True)


def test_saves_the_kept_modes_only():
    layer = SpectralConv(4, 4, (6, 6), method="fft")
    x = torch.randn(2, 4, 64, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sum(saved) < x.numel() / 4


def test_dtypes():
    layer = SpectralConv(2, 2, (4, 4), factorization="cp")
    x = torch.randn(1, 2, 8, 8)
    y = layer(x)
    for low in (torch.bfloat16, torch.float16):
        z = layer(x.to(low))
        assert z.dtype == low
        assert_close_rel(z, layer(x.to(low).float()), dtype=low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close_rel(layer(x), y, rtol=1e-6)
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.weight.to_tensor().dtype == torch.complex128


def test_inside_neuraloperators_own_model():
    models = pytest.importorskip("neuralop.models")
    theirs = models.FNO((8, 8), 2, 1, 8, n_layers=2, factorization="tucker", rank=0.3)
    with_ours = models.FNO((8, 8), 2, 1, 8, n_layers=2, factorization="tucker", rank=0.3, conv_module=SpectralConv)
    with_ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 2, 16, 18)
    assert_close_rel(with_ours(x), theirs(x), rtol=1e-6)
    theirs.n_modes = with_ours.n_modes = (6, 6)
    assert_close_rel(with_ours(x), theirs(x), rtol=1e-6)
    assert with_ours(x, output_shape=(20, 22)).shape == (2, 1, 20, 22)


def test_noncontiguous_and_meta():
    layer = SpectralConv(2, 3, (4, 4))
    x = torch.randn(8, 9, 2, 3).permute(3, 2, 0, 1)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert SpectralConv(2, 3, (4, 4), device="meta")(x.to("meta")).shape == (3, 3, 8, 9)


def test_incremental_modes():
    layer = SpectralConv(2, 2, (4, 4), max_n_modes=(8, 5))
    assert layer.weight.shape == (2, 2, 8, 5) and layer.n_modes == [4, 3]
    layer.n_modes = (8, 8)
    assert layer.n_modes == [8, 5]
    for too_many in [(9, 8), (8, 10)]:
        with pytest.raises(ValueError, match=r"n_modes.* at most max_n_modes"):
            layer.n_modes = too_many


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "in_channels must be at least 1", {"in_channels": 0}),
        (TypeError, "out_channels must be an int", {"out_channels": 2.5}),
        (ValueError, r"n_modes\[1\] must be at least 1", {"n_modes": (4, 0)}),
        (TypeError, r"n_modes\[0\] must be an int", {"n_modes": ("4", 4)}),
        (ValueError, "n_modes must have at least one entry", {"n_modes": ()}),
        (ValueError, "max_n_modes must have 2 entries", {"max_n_modes": (4, 4, 4)}),
        (ValueError, "at most max_n_modes", {"max_n_modes": (2, 4)}),
        (ValueError, "out_channels must equal in_channels", {"separable": True, "out_channels": 3}),
        (ValueError, "factorization must be one of", {"factorization": "tuker"}),
        (ValueError, "rank must be positive", {"factorization": "cp", "rank": -0.5}),
        (ValueError, "implementation must be one of", {"implementation": "fast"}),
        (ValueError, "fno_block_precision must be one of", {"fno_block_precision": "ful"}),
        (ValueError, "fft_norm must be one of", {"fft_norm": "none"}),
        (ValueError, "method must be one of", {"method": "gemm"}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
        (ValueError, "resolution_scaling_factor must have 2 entries", {"resolution_scaling_factor": [2, 2, 2]}),
        (ValueError, "resolution_scaling_factor must be positive", {"resolution_scaling_factor": -1}),
        (ValueError, "init_std must be one of", {"init_std": "automatic"}),
        (TypeError, "dtype must be a real floating-point dtype", {"dtype": torch.complex64}),
    ],
)
def test_bad_constructor_arguments(error, match, options):
    arguments = {"in_channels": 2, "out_channels": 2, "n_modes": (4, 4), **options}
    with pytest.raises(error, match=match):
        SpectralConv(**arguments)


@pytest.mark.parametrize(
    ("error", "match", "x"),
    [
        (TypeError, "x must be a tensor", np.zeros((1, 2, 8, 8))),
        (ValueError, "x must have 4 dimensions", torch.zeros(1, 2, 8)),
        (ValueError, "x must have in_channels = 2 at dimension 1, got 3", torch.zeros(1, 3, 8, 8)),
        (TypeError, "x must have a floating dtype, got torch.int64", torch.zeros(1, 2, 8, 8, dtype=torch.int64)),
        (TypeError, "x must be real", torch.zeros(1, 2, 8, 8, dtype=torch.complex64)),
        (TypeError, "x must have the precision of weight", torch.zeros(1, 2, 8, 8, dtype=torch.float64)),
        (ValueError, "without empty axes", torch.zeros(1, 2, 0, 8)),
        (ValueError, "x must be on the device of weight", torch.zeros(1, 2, 8, 8, device="meta")),
    ],
)
def test_bad_input(error, match, x):
    with pytest.raises(error, match=match):
        SpectralConv(2, 2, (4, 4))(x)


def test_bad_calls():
    x, w = torch.zeros(1, 2, 8, 8), torch.zeros(2, 2, 4, 3, dtype=torch.complex64)
    layer = SpectralConv(2, 2, (4, 4))
    with pytest.raises(ValueError, match="output_shape must have 2 entries"):
        layer(x, output_shape=(8,))
    with pytest.raises(TypeError, match="output_shape must be a sequence of ints"):
        layer(x, output_shape=8.0)
    assert layer(x, output_shape=6).shape == spectral_conv(x, w, (4, 4), output_shape=6).shape == (1, 2, 6, 6)
    with pytest.raises(ValueError, match=r"n_modes\[0\] must be at most 4"):
        spectral_conv(x, w, (6, 4))
    with pytest.raises(TypeError, match="weight must have a complex dtype"):
        spectral_conv(x, w.real, (4, 4))
    with pytest.raises(TypeError, match="weight must be a complex tensor"):
        spectral_conv(x, None, (4, 4))
    with pytest.raises(ValueError, match="bias must have out_channels = 2 entries"):
        spectral_conv(x, w, (4, 4), bias=torch.zeros(3))
    with pytest.raises(TypeError, match="bias must be a tensor"):
        spectral_conv(x, w, (4, 4), bias=[0.0, 0.0])
    with pytest.raises(TypeError, match="bias must have a real floating-point dtype"):  # not its real part taken
        spectral_conv(x, w, (4, 4), bias=torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="bias must be on the device of x"):
        spectral_conv(x, w, (4, 4), bias=torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="weight must be given"):
        SpectralConv(2, 2, (4, 4), has_weight=False)(x)
    with pytest.raises(ValueError, match="backend='triton' was asked for"):
        spectral_conv(x.double(), w.to(torch.complex128), (4, 4), backend="triton")
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        truncated_rfftn(torch.zeros(4, 4), (2, 2, 2))
    with pytest.raises(TypeError, match="Y must have a complex dtype"):
        truncated_irfftn(torch.zeros(4, 4), (4, 4))


def test_dispatch_is_told():
    import torchlayers

    SpectralConv(2, 2, (4, 4), backend="torch")(torch.zeros(1, 2, 8, 8))
    assert torchlayers.last_dispatch() == "torch: backend is 'torch'"
    SpectralConv(2, 2, (4, 4), backend="auto")(torch.zeros(1, 2, 8, 8))
    assert torchlayers.last_dispatch().startswith("torch: ")


def test_public_functions_are_gathered():
    import torchlayers.functional as functional

    assert functional.spectral_conv is spectral_conv
    assert functional.truncated_rfftn is truncated_rfftn and "truncated_irfftn" in dir(functional)
    with pytest.raises(AttributeError, match="no attribute 'spectral'"):
        functional.spectral  # noqa: B018
