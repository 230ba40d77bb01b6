"""The spectral convolution, float32: ours, neuraloperator's, and FFT paths written by hand.

With dense weights, with Tucker and CP factors, and as a Fourier layer, whose skip connection and activation our
convolution takes along.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ._harness import BOTH, FORWARD, Built, Case

TOLERANCE = 1e-5


class Inputs(NamedTuple):
    """x and g (B, C, N, N); weight (C, C, k1, k2) complex, mode rows in ascending signed order; bias (C, 1, 1)."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    g: torch.Tensor


def make_inputs(batch: int, channels: int, n: int, modes: int, device: torch.device) -> Inputs:
    """Random inputs.

    The weight of the self-conjugate columns (frequency 0, and N/2 where it is kept) is Hermitian and its unpaired
    frequencies have no imaginary part or no weight: there cuFFT's fused complex-to-real transform is undefined, and a
    peer that uses it would have no defined result to check. Speed does not depend on it.
    """
    generator = torch.Generator(device).manual_seed(0)
    k2 = modes // 2 + 1
    std = math.sqrt(1 / channels)
    x, g = (torch.randn(batch, channels, n, n, generator=generator, device=device) for _ in range(2))
    kind = {"dtype": torch.complex64, "generator": generator, "device": device}
    weight = std * torch.randn(channels, channels, modes, k2, **kind)
    frequencies = torch.arange(-(modes // 2), modes - modes // 2)
    rows = {int(f) % n: i for i, f in enumerate(frequencies)}
    for column in {0, k2 - 1} if 2 * (k2 - 1) == n else {0}:
        values = weight[:, :, :, column].clone()
        for f, i in rows.items():
            partner = rows.get(-f % n)
            weight[:, :, i, column] = 0 if partner is None else (values[:, :, i] + values[:, :, partner].conj()) / 2
    bias = torch.randn(channels, 1, 1, generator=generator, device=device)
    return Inputs(x, weight, bias, g)


def reference(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Output and gradients of x, weight, bias in float64, by the matrices of the truncated transform.

    X = F1 x F2 / N², Y[o] = Σ_i X[i] W[i, o], y = Re(G1 Y G2) + bias: the last axis holds one side of the spectrum,
    so that its frequencies count twice, but for 0 and N/2. Sample by sample, to bound the memory.
    """
    n, (modes, k2) = inputs.x.shape[-1], inputs.weight.shape[2:]
    device = inputs.x.device
    grid = torch.arange(n, device=device)

    def phases(frequencies: torch.Tensor) -> torch.Tensor:  # (frequency, grid); the integer product is exact
        angle = (2 * math.pi / n) * ((frequencies[:, None] * grid) % n).double()
        return torch.polar(torch.ones_like(angle), -angle)

    rows = phases(torch.arange(-(modes // 2), modes - modes // 2, device=device))
    columns = phases(torch.arange(k2, device=device))
    twice = torch.full((k2, 1), 2.0, dtype=torch.float64, device=device)
    twice[0] = 1
    if 2 * (k2 - 1) == n:
        twice[-1] = 1
    weight = inputs.weight.to(torch.complex128).requires_grad_()
    bias = inputs.bias.double().requires_grad_()
    outputs, x_gradients = [], []
    for sample, cotangent in zip(inputs.x, inputs.g, strict=True):
        x = sample.double().requires_grad_()
        spectrum = rows @ (x.to(torch.complex128) @ columns.T) / n**2
        mixed = torch.einsum("ikl,iokl->okl", spectrum, weight)
        y = (rows.mH @ mixed @ (twice * columns.conj())).real + bias
        y.backward(cotangent.double())
        outputs.append(y.detach())
        x_gradients.append(x.grad)
    return torch.stack(outputs), torch.stack(x_gradients), weight.grad, bias.grad


def make_inputs_3d(batch: int, channels: int, n: int, modes: int, device: torch.device) -> Inputs:
    """As :func:`make_inputs` in three dimensions, n > modes; the self-conjugate column (frequency 0) has no weight."""
    generator = torch.Generator(device).manual_seed(0)
    x, g = (torch.randn(batch, channels, n, n, n, generator=generator, device=device) for _ in range(2))
    shape = (channels, channels, modes, modes, modes // 2 + 1)
    weight = torch.randn(shape, dtype=torch.complex64, generator=generator, device=device) / math.sqrt(channels)
    weight[..., 0] = 0
    return Inputs(x, weight, torch.randn(channels, 1, 1, 1, generator=generator, device=device), g)


def reference_3d(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Output and gradients of x, weight, bias in float64, by the whole transform; sample by sample."""
    n, (modes, _, k2) = inputs.x.shape[-1], inputs.weight.shape[2:]
    rows = torch.arange(-(modes // 2), modes - modes // 2, device=inputs.x.device) % n
    kept = (slice(None), rows[:, None, None], rows[:, None], torch.arange(k2, device=inputs.x.device))
    weight = inputs.weight.to(torch.complex128).requires_grad_()
    bias = inputs.bias.double().requires_grad_()
    outputs, x_gradients = [], []
    for sample, cotangent in zip(inputs.x, inputs.g, strict=True):
        x = sample.double().requires_grad_()
        mixed = torch.einsum("iklm,ioklm->oklm", torch.fft.rfftn(x, dim=(1, 2, 3), norm="forward")[kept], weight)
        spectrum = mixed.new_zeros(len(bias), n, n, n // 2 + 1).index_put(
            (torch.arange(len(bias), device=x.device)[:, None, None, None], *kept[1:]), mixed
        )
        y = torch.fft.irfftn(spectrum, s=(n, n, n), dim=(1, 2, 3), norm="forward") + bias
        y.backward(cotangent.double())
        outputs.append(y.detach())
        x_gradients.append(x.grad)
    return torch.stack(outputs), torch.stack(x_gradients), weight.grad, bias.grad


# ---------------------------------------------------------------- factorized weights


class FactorizedInputs(NamedTuple):
    """As :class:`Inputs`, the weight as the parts of its state dict: "core" or "weights", "factors.factor_0", ..."""

    x: torch.Tensor
    parts: dict[str, torch.Tensor]
    bias: torch.Tensor
    g: torch.Tensor
    factorization: str
    rank: float


def make_factorized_inputs(
    batch: int, channels: int, n: int, modes: int, factorization: str, rank: float, device: torch.device
) -> FactorizedInputs:
    """Random factors; the self-conjugate column (frequency 0) has no weight, for the reason in :func:`make_inputs`."""
    from torchlayers import FactorizedTensor

    generator = torch.Generator(device).manual_seed(0)
    x, g = (torch.randn(batch, channels, n, n, generator=generator, device=device) for _ in range(2))
    shape = (channels, channels, modes, modes // 2 + 1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        std = math.sqrt(1 / channels)
        weight = FactorizedTensor(shape, factorization, rank, complex=True, init_std=std, device=device)
    parts = {name: part.clone() for name, part in weight.state_dict().items()}
    parts["factors.factor_3"][0] = 0
    return FactorizedInputs(
        x, parts, torch.randn(channels, 1, 1, generator=generator, device=device), g, factorization, rank
    )


def factorized_reference(inputs: FactorizedInputs) -> tuple[torch.Tensor, ...]:
    """:func:`reference` of the product of the factors, whose gradient is taken on to each of them."""
    parts = [part.to(torch.complex128).requires_grad_() for part in inputs.parts.values()]
    if inputs.factorization == "cp":
        weight = torch.einsum("r,ir,or,kr,lr->iokl", *parts)
    else:
        weight = torch.einsum("abcd,ia,ob,kc,ld->iokl", *parts)
    y, gx, g_weight, g_bias = reference(Inputs(inputs.x, weight.detach(), inputs.bias, inputs.g))
    return y, gx, *torch.autograd.grad(weight, parts, g_weight), g_bias


def _factorized_module(layer: torch.nn.Module, inputs: FactorizedInputs) -> Built:
    layer.load_state_dict({f"weight.{name}": part for name, part in inputs.parts.items()} | {"bias": inputs.bias})
    parameters = dict(layer.named_parameters())
    x = inputs.x.detach().requires_grad_()
    leaves = [x, *(parameters[f"weight.{name}"] for name in inputs.parts), parameters["bias"]]
    return Built(lambda: layer(x), leaves, inputs.g)


def _factorized_arguments(inputs: FactorizedInputs) -> dict[str, Any]:
    channels, modes = inputs.x.shape[1], inputs.parts["factors.factor_2"].shape[0]
    options = {"factorization": inputs.factorization, "rank": inputs.rank, "device": inputs.x.device}
    return {"in_channels": channels, "out_channels": channels, "n_modes": (modes, modes), **options}


def ours_factorized(inputs: FactorizedInputs) -> Built:
    import torchlayers

    return _factorized_module(torchlayers.SpectralConv(**_factorized_arguments(inputs)), inputs)


def neuraloperator_factorized(inputs: FactorizedInputs, implementation: str) -> Built:
    from neuralop.layers.spectral_convolution import SpectralConv

    layer = SpectralConv(**_factorized_arguments(inputs), implementation=implementation)
    return _factorized_module(layer.to(inputs.x.device), inputs)


FACTORIZED_PEERS = {
    f"neuraloperator, {implementation}": functools.partial(neuraloperator_factorized, implementation=implementation)
    for implementation in ("factorized", "reconstructed")
}


# ---------------------------------------------------------------- a Fourier layer


class LayerInputs(NamedTuple):
    """:class:`Inputs`, and the skip connection's matrix (C, C, 1)."""

    conv: Inputs
    skip: torch.Tensor


def make_layer_inputs(batch: int, channels: int, n: int, modes: int, device: torch.device) -> LayerInputs:
    generator = torch.Generator(device).manual_seed(1)
    skip = torch.randn(channels, channels, 1, generator=generator, device=device) / math.sqrt(channels)
    return LayerInputs(make_inputs(batch, channels, n, modes, device), skip)


def layer_reference(inputs: LayerInputs) -> tuple[torch.Tensor, ...]:
    """gelu(conv(x) + skip x) and the gradients of x, weight, bias, skip, in float64."""
    conv, skip = inputs.conv, inputs.skip[..., 0].double()
    x = conv.x.double()
    h = (reference(conv)[0] + torch.einsum("oi,bixy->boxy", skip, x)).requires_grad_()
    out = torch.nn.functional.gelu(h)
    (g,) = torch.autograd.grad(out, h, conv.g.double())
    _, gx, g_weight, g_bias = reference(conv._replace(g=g))
    gx = gx + torch.einsum("oi,boxy->bixy", skip, g)
    return out.detach(), gx, g_weight, g_bias, torch.einsum("boxy,bixy->oi", g, x)[..., None]


def _layer(conv: Any, inputs: LayerInputs, forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Built:
    """``forward`` of x and the skip connection's result."""
    conv.load_state_dict({"weight.tensor": inputs.conv.weight, "bias": inputs.conv.bias})
    conv.to(inputs.skip.device)
    parameters = dict(conv.named_parameters())
    x, matrix = (t.detach().requires_grad_() for t in (inputs.conv.x, inputs.skip))

    def layer() -> torch.Tensor:
        skip = torch.nn.functional.conv1d(x.flatten(2), matrix).view_as(x)
        return forward(x, skip)

    return Built(layer, [x, parameters["weight.tensor"], parameters["bias"], matrix], inputs.conv.g)


def _fused(inputs: LayerInputs) -> Built:
    import torchlayers

    channels, _, modes = _shape(inputs.conv)
    conv = torchlayers.SpectralConv(channels, channels, (modes, modes))
    return _layer(conv, inputs, lambda x, skip: conv(x, skip=skip, activation="gelu"))


def _unfused(inputs: LayerInputs, theirs: bool) -> Built:
    """The sum and the activation left to torch, around our convolution or neuraloperator's."""
    if theirs:
        from neuralop.layers.spectral_convolution import SpectralConv
    else:
        from torchlayers import SpectralConv
    channels, _, modes = _shape(inputs.conv)
    conv = SpectralConv(channels, channels, (modes, modes))
    return _layer(conv, inputs, lambda x, skip: torch.nn.functional.gelu(conv(x) + skip))


LAYER_PEERS = {
    "torchlayers, not fused": functools.partial(_unfused, theirs=False),
    "neuraloperator": functools.partial(_unfused, theirs=True),
}


# ---------------------------------------------------------------- dense weights


def _module(layer: torch.nn.Module, inputs: Inputs) -> Built:
    layer.load_state_dict({"weight.tensor": inputs.weight, "bias": inputs.bias})
    parameters = dict(layer.named_parameters())
    x = inputs.x.detach().requires_grad_()
    return Built(lambda: layer(x), [x, parameters["weight.tensor"], parameters["bias"]], inputs.g)


def _shape(inputs: Inputs) -> tuple[int, int, int]:
    return inputs.x.shape[1], inputs.x.shape[-1], inputs.weight.shape[2]


def ours(inputs: Inputs) -> Built:
    import torchlayers

    channels, _, modes = _shape(inputs)
    layer = torchlayers.SpectralConv(channels, channels, (modes,) * (inputs.x.ndim - 2))
    return _module(layer.to(inputs.x.device), inputs)


def neuraloperator(inputs: Inputs) -> Built:
    from neuralop.layers.spectral_convolution import SpectralConv

    channels, _, modes = _shape(inputs)
    layer = SpectralConv(channels, channels, (modes,) * (inputs.x.ndim - 2))
    return _module(layer.to(inputs.x.device), inputs)


class _ByHand(torch.autograd.Function):
    """The FFT path with as few launches and as little saved state as plain torch calls allow, backward by hand.

    ``pruned`` transforms only the kept columns along the first axis.
    """

    @staticmethod
    def analyse(x: torch.Tensor, modes: int, k2: int, pruned: bool, norm: str) -> torch.Tensor:
        """The kept modes, rows in ascending signed order."""
        negative = modes // 2
        if pruned:
            spectrum = torch.fft.fft(torch.fft.rfft(x, norm=norm)[..., :k2], dim=-2, norm=norm)
        else:
            spectrum = torch.fft.rfft2(x, norm=norm)[..., :k2]
        return torch.cat([spectrum[:, :, x.shape[-2] - negative :], spectrum[:, :, : modes - negative]], dim=2)

    @staticmethod
    def synthesise(kept: torch.Tensor, n: int, pruned: bool, norm: str) -> torch.Tensor:
        """The field of the kept modes."""
        batch, channels, modes, k2 = kept.shape
        negative = modes // 2
        out = kept.new_zeros(batch, channels, n, k2 if pruned else n // 2 + 1)
        out[:, :, n - negative :, :k2] = kept[:, :, :negative]
        out[:, :, : modes - negative, :k2] = kept[:, :, negative:]
        if pruned:
            return torch.fft.irfft(torch.fft.ifft(out, dim=-2, norm=norm), n=n, norm=norm)
        return torch.fft.irfft2(out, s=(n, n), norm=norm)

    @staticmethod
    def forward(ctx, x, weight, bias, pruned):
        modes, k2 = weight.shape[2:]
        kept = _ByHand.analyse(x, modes, k2, pruned, "forward")
        ctx.save_for_backward(kept, weight)
        ctx.pruned = pruned
        return _ByHand.synthesise(torch.einsum("bikl,iokl->bokl", kept, weight), x.shape[-1], pruned, "forward") + bias

    @staticmethod
    def backward(ctx, g):
        kept, weight = ctx.saved_tensors
        modes, k2 = weight.shape[2:]
        n = g.shape[-1]
        # The inverse transform doubles one-sided columns, and so does the gradient of its input; the gradient of the
        # forward transform halves them again, so that only the weight's gradient sees the factor.
        g_kept = _ByHand.analyse(g, modes, k2, ctx.pruned, "backward")
        g_weight = torch.einsum("bikl,bokl->iokl", kept.conj(), g_kept)
        g_weight[..., 1 : (n + 1) // 2] *= 2
        g_input = torch.einsum("bokl,iokl->bikl", g_kept, weight.conj())
        return _ByHand.synthesise(g_input, n, ctx.pruned, "backward"), g_weight, g.sum((0, 2, 3))[:, None, None], None


def _by_hand(inputs: Inputs, pruned: bool) -> Built:
    x, weight, bias = (t.detach().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias))
    return Built(lambda: _ByHand.apply(x, weight, bias, pruned), [x, weight, bias], inputs.g)


PEERS = {
    "neuraloperator": neuraloperator,
    "FFT by hand": lambda inputs: _by_hand(inputs, pruned=False),
    "FFT by hand, columns pruned": lambda inputs: _by_hand(inputs, pruned=True),
}


def least_bytes(batch: int, channels: int, n: int, modes: int, entries: int | None = None) -> dict[str, dict[str, int]]:
    """Memory traffic that the operation needs when only fields, kept modes and weights cross device memory.

    The weight is dense, or has ``entries`` complex numbers.

    Forward: x in, y out, each of X and Y out and in, the weight in. Backward: g in, the gradient of x out, its two
    spectra out and in, the saved X in, the weight in and its gradient out.
    """
    field = 4 * batch * channels * n * n
    spectrum = 8 * batch * channels * modes * (modes // 2 + 1)
    weight = 8 * (channels * channels * modes * (modes // 2 + 1) if entries is None else entries)
    forward = 2 * field + 4 * spectrum + weight
    return {FORWARD: {"bytes": forward}, BOTH: {"bytes": forward + 2 * field + 5 * spectrum + 2 * weight}}


def _case(batch: int, channels: int, n: int, modes: int, *, headline: bool, quick: bool) -> Case:
    return Case(
        labels={"B": batch, "C": channels, "N": n, "modes": modes},
        inputs=lambda device: make_inputs(batch, channels, n, modes, device),
        reference=reference,
        ours=ours,
        peers=PEERS,
        tolerance=TOLERANCE,
        work=least_bytes(batch, channels, n, modes),
        scale="N",
        headline=headline,
        quick=quick,
    )


def _case_3d(batch: int, channels: int, n: int, modes: int) -> Case:
    """Three dimensions, where memory is the point."""
    return Case(
        labels={"B": batch, "C": channels, "grid": f"{n}³", "modes": modes},
        inputs=lambda device: make_inputs_3d(batch, channels, n, modes, device),
        reference=reference_3d,
        ours=ours,
        peers={"neuraloperator": neuraloperator},
        tolerance=TOLERANCE,
        headline=True,
    )


def _factorized_case(
    batch: int, channels: int, n: int, modes: int, factorization: str, rank: float, *, headline: bool, quick: bool
) -> Case:
    shape = (channels, channels, modes, modes // 2 + 1)
    return Case(
        labels={"B": batch, "C": channels, "N": n, "modes": modes, "weight": f"{factorization} {rank:g}"},
        inputs=lambda device: make_factorized_inputs(batch, channels, n, modes, factorization, rank, device),
        reference=factorized_reference,
        ours=ours_factorized,
        peers=FACTORIZED_PEERS,
        tolerance=TOLERANCE,
        work=least_bytes(batch, channels, n, modes, round(rank * math.prod(shape))),
        headline=headline,
        quick=quick,
    )


def _layer_case(batch: int, channels: int, n: int, modes: int, *, headline: bool, quick: bool) -> Case:
    return Case(
        labels={"B": batch, "C": channels, "N": n, "modes": modes, "layer": "with skip and GELU"},
        inputs=lambda device: make_layer_inputs(batch, channels, n, modes, device),
        reference=layer_reference,
        ours=_fused,
        peers=LAYER_PEERS,
        tolerance=TOLERANCE,
        headline=headline,
        quick=quick,
    )


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        yield _case_3d(1, 32, 128, 16)
        for n, modes in ((128, 32), (256, 64)):
            for factorization, rank in (("tucker", 0.1), ("cp", 0.1), ("cp", 0.01)):
                quick = (n, rank) == (128, 0.1)
                yield _factorized_case(4, 64, n, modes, factorization, rank, headline=n == 256, quick=quick)
            yield _layer_case(16, 64, n, modes, headline=n == 256, quick=n == 128)
        for batch in (4, 16):
            for modes in (32, 64):
                for n in (128, 256, 512):
                    headline = (batch, modes) in ((16, 64), (4, 32))
                    yield _case(batch, 64, n, modes, headline=headline, quick=batch == 4 and n == 128)
        return
    for n in (32, 64, 128, 256):
        for modes in (16, 32, 64):
            if modes <= n:
                headline = (n, modes) in ((64, 16), (128, 16), (128, 32), (256, 16), (256, 32))
                yield _case(4, 32, n, modes, headline=headline, quick=n == 32)
    yield _case(16, 64, 256, 32, headline=True, quick=False)
    for n, modes in ((32, 8), (128, 16)):
        for factorization in ("tucker", "cp"):
            yield _factorized_case(4, 32, n, modes, factorization, 0.1, headline=n == 128, quick=n == 32)
        yield _layer_case(4, 32, n, modes, headline=False, quick=n == 32)
