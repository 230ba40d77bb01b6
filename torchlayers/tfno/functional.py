"""The family's functions: arguments are checked here, once, and the implementation is picked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._attention import no_autocast
from .._backend import use_triton
from .._checks import check_choice, check_dtype, check_ints, check_same_device, check_size
from .._tables import table
from ..factorized import FactorizedSlice, FactorizedTensor
from . import fused, transforms
from .precision import PRECISIONS, low_dtype
from .reference import kept_modes
from .weights import IMPLEMENTATIONS, SpectralWeight, mix

__all__ = ["spectral_conv", "spectral_resample", "truncated_irfftn", "truncated_rfftn"]

METHODS = ("auto", *transforms.METHODS)
ACTIVATIONS = ("gelu", "relu")


def _widened(x: Tensor) -> Tensor:
    """Half precisions to float32, in which spectral arithmetic is done."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _method(method: str, x: Tensor) -> str:
    check_choice("method", method, METHODS)
    return transforms.choose_method(x) if method == "auto" else method


def _check_grid(name: str, x: object, n_dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {x!r} ({type(x).__name__})")
    check_dtype(name, x, kind="inexact")
    if x.ndim < n_dim:
        raise ValueError(f"{name} must have at least {n_dim} dimensions, one for each mode axis, got {x.ndim}")
    if 0 in x.shape[x.ndim - n_dim :]:
        raise ValueError(f"{name} must have a grid without empty axes, got shape {tuple(x.shape)}")


def truncated_rfftn(x: Tensor, n_modes: Sequence[int], *, method: str = "auto") -> Tensor:
    """The low frequencies of ``x`` over its last ``d = len(n_modes)`` axes, norm "forward"::

        X[..., f] = 1/(N1...Nd) Σ_n x[..., n] exp(-2πi Σ_j f_j n_j / N_j)

    Args:
        x: (..., N1, ..., Nd), real or complex. Half precisions are transformed in float32.
        n_modes: frequencies kept of each axis, in total. Those of an axis are -(m // 2), ..., (m - 1) // 2, in
            ascending order, and of the last axis of real data 0, ..., m // 2. An axis of fewer points keeps what
            it has.
        method: "fft", "dft" (matrix products), "mixed" (a matrix product on the last axis) or "auto".

    Returns:
        (..., k1, ..., kd), complex; kd = m_d // 2 + 1 for real data.

    Raises:
        TypeError: ``x`` is no floating-point or complex tensor, ``n_modes`` are no ints.
        ValueError: fewer axes than modes, an empty grid axis, modes below 1.
    """
    modes = check_ints("n_modes", n_modes)
    _check_grid("x", x, len(modes))
    d = len(modes)
    x = _widened(x)
    batch, grid = x.shape[:-d], tuple(x.shape[-d:])
    full = modes if x.is_complex() else (*modes[:-1], modes[-1] // 2 + 1)
    kept = kept_modes(modes, full, grid, grid, x.is_complex())
    with no_autocast(x):
        method = _method(method, x)
        y = transforms.spectrum(x.reshape(math.prod(batch), 1, *grid), kept, method)
    return y.reshape(*batch, *kept)


def truncated_irfftn(Y: Tensor, size: Sequence[int], *, complex_data: bool = False, method: str = "auto") -> Tensor:
    """The field on a grid of ``size`` whose low frequencies are ``Y``; the inverse of :func:`truncated_rfftn`::

        y[..., n] = Re Σ_f c(f_d) Y[..., f] exp(2πi Σ_j f_j n_j / M_j)

    c is 1 for f_d = 0 and f_d = M_d / 2, and 2 else, since a one-sided mode stands for ±f. So on those two columns
    only the Hermitian part of ``Y`` counts.

    Args:
        Y: (..., k1, ..., kd) complex, ordered as :func:`truncated_rfftn` does; ``d = len(size)``.
        size: the grid (M1, ..., Md). Frequencies that it cannot represent are dropped.
        complex_data: ``Y`` is two-sided on the last axis too; c = 1, and the result is complex.
        method: as for :func:`truncated_rfftn`.

    Returns:
        (..., M1, ..., Md), real, or complex with ``complex_data``.

    Raises:
        TypeError: ``Y`` is not complex, ``size`` no ints.
        ValueError: fewer axes than sizes, an empty mode axis, sizes below 1.
    """
    size = check_ints("size", size)
    _check_grid("Y", Y, len(size))
    check_dtype("Y", Y, kind="complex")
    d = len(size)
    batch, modes = Y.shape[:-d], tuple(Y.shape[-d:])
    totals = modes if complex_data else (*modes[:-1], 2 * modes[-1] - 1)
    kept = kept_modes(totals, modes, totals, size, complex_data)
    for axis, (k, m) in enumerate(zip(kept, modes, strict=True), Y.ndim - d):
        one_sided = not complex_data and axis == Y.ndim - 1
        Y = Y.narrow(axis, 0 if one_sided else m // 2 - k // 2, k)
    with no_autocast(Y):
        method = _method(method, Y)
        y = transforms.synthesis(Y.reshape(math.prod(batch), 1, *kept).resolve_conj(), size, method, complex_data)
    return y.reshape(*batch, *size)


def spectral_resample(x: Tensor, size: Sequence[int]) -> Tensor:
    """``x`` (..., N1, ..., Nd) on a grid of ``size``: exact where ``x`` is periodic and band-limited to both grids.

    The frequencies that both grids represent are carried over. Where an axis shrinks or grows from or to an even size
    the unpaired frequency ±N/2 is shared out between its two signs, so that real data stay real. Linear, and the
    identity for an unchanged size.

    Args:
        x: (..., N1, ..., Nd), real or complex; ``d = len(size)``.
        size: the grid (M1, ..., Md).

    Returns:
        (..., M1, ..., Md) in the dtype of ``x``.

    Raises:
        TypeError, ValueError: as :func:`truncated_rfftn`.
    """
    size = check_ints("size", size)
    _check_grid("x", x, len(size))
    y = _widened(x)
    with no_autocast(x):
        for axis, (n, m) in enumerate(zip(x.shape[-len(size) :], size, strict=True), x.ndim - len(size)):
            if n != m:
                basis = table("spectral_resample", n, m, dtype=y.real.dtype, device=y.device)
                y = torch.movedim(torch.movedim(y, axis, -1) @ basis.to(y.dtype), -1, axis)
    return y.to(x.dtype)


def spectral_conv(
    x: Tensor,
    weight: Tensor | FactorizedTensor | FactorizedSlice | SpectralWeight,
    n_modes: Sequence[int] | None = None,
    *,
    bias: Tensor | None = None,
    output_shape: Sequence[int] | None = None,
    separable: bool = False,
    complex_data: bool = False,
    implementation: str = "auto",
    method: str = "auto",
    backend: str | None = None,
    skip: Tensor | None = None,
    activation: str | None = None,
    precision: str = "full",
) -> Tensor:
    """Spectral convolution: keep the low frequencies of ``x``, mix channels frequency by frequency, go back::

        X = truncated_rfftn(x, n_modes)                 Y[b,o,f] = Σ_i X[b,i,f] W[i,o,f]
        y = truncated_irfftn(Y, output_shape) + bias    y = activation(y + skip)

    Frequencies carry their sign, so grids may be odd and the output grid may differ from the input's: a band-limited
    field gives the same function at any resolution. Where a grid has fewer frequencies than the weight, the middle of
    the weight (its low frequencies) is used.

    Args:
        x: (B, Ci, N1, ..., Nd). Half precisions are computed in float32.
        weight: W (Ci, Co, w1, ..., wd), or (C, w1, ..., wd) if ``separable``: a complex tensor, a complex
            :class:`~torchlayers.FactorizedTensor`, or a layer of :class:`~torchlayers.JointSpectralWeights`. Entry
            w // 2 of a mode axis is frequency 0; the last axis of real data holds the frequencies 0, 1, ....
        n_modes: totals to keep, at most what the weight has; the last is halved, m // 2 + 1, for real data. None
            keeps all.
        bias: (Co,) or (Co, 1, ..., 1), real.
        output_shape: grid of the result (M1, ..., Md); None is that of ``x``.
        separable: Y[b,c,f] = X[b,c,f] W[c,f].
        complex_data: complex ``x`` and result; no axis is halved. Real ``x`` is taken as complex.
        implementation: "reconstructed" multiplies the factors out to W first, "factorized" applies them to X one by
            one, "auto" takes the one with fewer FLOPs whose intermediates fit
            :data:`torchlayers.tfno.weights.MEMORY_CAP`.
        method: of the plain-torch transforms: "fft", "dft", "mixed" or "auto", see :func:`truncated_rfftn`.
        backend: see :func:`torchlayers.backend`. The Triton kernels take real float32, bfloat16 and float16 on grids of
            any dimension; complex data is plain torch's.
        skip: added to the result, which it has the shape of; the kernels do so, and apply the activation, while they
            write it, and save neither the sum nor the activation's argument for the backward pass.
        activation: "gelu", "relu" or None; for real data.
        precision: "full": products as accurate as float32's, also where fields have 16 bits. "mixed": modes are mixed
            in 16 bits, those of ``x`` or else float16, with sums in float32. "half": the kernels' transforms too
            multiply numbers of 11 significant bits (tf32, which has float32's range, or bfloat16 for fields of that
            type); plain torch's stay float32, since an FFT in 16 bits takes powers of two only. Both are for GPUs, and
            for fields bounded by ``tanh`` or a norm: a mode beyond 65504 is infinite in float16. Arithmetic as
            arXiv 2307.15034 has it, section 4.

    Returns:
        (B, Co, M1, ..., Md) in the dtype of ``x``, promoted with that of ``skip``.

    Raises:
        TypeError: complex ``x`` for real data, an integer ``x``, a real weight, dtypes of different precision.
        ValueError: dimensions, channels, modes or devices that do not fit; a precision other than "full" on a CPU or
            for float64; an activation of complex data.
        BackendError: ``backend="triton"`` with what the kernels do not support.

    Source: arXiv 2310.00120, section 3; the definition is :func:`torchlayers.tfno.reference.spectral_conv`.
    """
    w = SpectralWeight.of(weight)
    lead = 1 if separable else 2
    d = len(w.shape) - lead
    if d < 1:
        raise ValueError(f"weight must have {lead} channel axes and at least one of modes, got shape {w.shape}")
    _check_input(x, w, d, complex_data)
    grid = tuple(x.shape[2:])
    size = grid if output_shape is None else check_ints("output_shape", output_shape, d)
    stored = w.shape[lead:]
    totals = stored if complex_data else (*stored[:-1], 2 * stored[-1] - 1)
    if n_modes is not None:
        n_modes = check_ints("n_modes", n_modes, d)
        for axis, (m, limit) in enumerate(zip(n_modes, totals, strict=True)):
            if m > limit:
                raise ValueError(f"n_modes[{axis}] must be at most {limit}, which the weight has, got {m}")
        totals = n_modes
    kept = kept_modes(totals, stored, grid, size, complex_data)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if bias is not None:
        _check_bias(bias, x, w.shape[lead - 1])
    check_choice("precision", precision, PRECISIONS)
    check_choice("activation", activation, [*ACTIVATIONS, None])
    if activation is not None and complex_data:
        raise ValueError(f"activation must be None for complex data, got {activation!r}")
    if skip is not None:
        _check_skip(skip, x, (x.shape[0], w.shape[lead - 1], *size), complex_data)

    compute = torch.promote_types(_widened(x).real.dtype, torch.float32)
    starts = [m // 2 - k // 2 for m, k in zip(stored, kept, strict=True)]
    zero = [k // 2 for k in kept]
    if not complex_data:
        starts[-1] = zero[-1] = 0
    with no_autocast(x):
        w = w.to(compute).crop(starts, kept)
        if complex_data and not x.is_complex():
            x = torch.complex(_widened(x), torch.zeros_like(_widened(x)))
        # An empty batch needs no kernel.
        unsupported = _unsupported(x, complex_data, method)
        triton = x.shape[0] > 0 and use_triton(fused.operation(d), x, backend, unsupported)
        _check_precision(precision, x, triton)
        out_dtype = x.dtype if skip is None else torch.promote_types(x.dtype, skip.dtype)
        if triton:
            transform = "low" if precision == "half" else None
            planes = fused.forward(x, kept, transform)
            if precision != "full":
                planes = planes.to(low_dtype(x))
            y = fused.mix(planes, w, separable=separable, implementation=implementation).float()
            y = _add_bias(y.transpose(0, 1), bias, zero, kept).transpose(0, 1)
            return fused.inverse(y, kept, size, out_dtype, transform, skip, activation)

        field_dtype, low = x.dtype, low_dtype(x)
        x = _widened(x)
        method = _method(method, x)
        modes = transforms.forward(x, kept, method)
        if precision == "full":
            y = mix(modes, w, separable=separable, implementation=implementation)
        else:  # as planes: there are no products of 16-bit complex numbers
            planes = torch.view_as_real(modes).movedim(-1, 1) if modes.is_complex() else modes
            y = mix(planes.to(low), w.to(low), separable=separable, implementation=implementation).float()
            if modes.is_complex():
                y = torch.view_as_complex(y.movedim(1, -1).contiguous())
        y = _add_bias(y, bias, zero, kept)
        y = transforms.inverse(y, kept, size, method, complex_data).to(field_dtype)
        if skip is not None:
            y = y + skip
        return y if activation is None else getattr(torch.nn.functional, activation)(y)


def _check_precision(precision: str, x: Tensor, triton: bool) -> None:
    if precision == "full":
        return
    if x.dtype in (torch.float64, torch.complex128):
        raise ValueError(f"precision must be 'full' for {x.dtype}, got {precision!r}")
    if x.device.type == "cpu" and not triton:
        raise ValueError(
            f"precision (fno_block_precision) must be 'full' on a CPU, got {precision!r}: 16-bit products are for GPUs"
        )


def _check_bias(bias: Tensor, x: Tensor, channels: int) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or None, got {bias!r} ({type(bias).__name__})")
    check_dtype("bias", bias, kind="real")
    if bias.numel() != channels:
        raise ValueError(f"bias must have out_channels = {channels} entries, got shape {tuple(bias.shape)}")
    check_same_device("bias", bias, "x", x)


def _check_skip(skip: Tensor, x: Tensor, shape: tuple[int, ...], complex_data: bool) -> None:
    if not isinstance(skip, Tensor):
        raise TypeError(f"skip must be a tensor or None, got {skip!r} ({type(skip).__name__})")
    check_dtype("skip", skip, kind="complex" if complex_data else "real")
    if tuple(skip.shape) != shape:
        raise ValueError(f"skip must have the result's shape {shape}, got {tuple(skip.shape)}")
    check_same_device("skip", skip, "x", x)


def _check_input(x: Tensor, w: SpectralWeight, d: int, complex_data: bool) -> None:
    _check_grid("x", x, d)
    if x.ndim != d + 2:
        raise ValueError(
            f"x must have {d + 2} dimensions (batch, channels, {d} grid axes), got {x.ndim}: shape {tuple(x.shape)}"
        )
    if x.is_complex() and not complex_data:
        raise TypeError(f"x must be real, since complex_data is False, got {x.dtype}")
    check_size("x", x, 1, w.shape[0], "in_channels")
    part = w.parts[0]
    check_same_device("x", x, "weight", part)
    if _widened(x).real.dtype != _widened(part).dtype:
        raise TypeError(f"x must have the precision of weight, {part.dtype.to_complex()}, got {x.dtype}")


def _add_bias(y: Tensor, bias: Tensor | None, zero: Sequence[int], kept: Sequence[int]) -> Tensor:
    """The bias is a constant field: added to frequency 0 of the modes, (K, B, Co) or planes, not to the whole field."""
    if bias is not None:
        row = 0
        for z, k in zip(zero, kept, strict=True):
            row = row * k + z
        real = y[row] if y.is_complex() else y[row, 0]
        real += bias.flatten().to(y.dtype)
    return y


def _unsupported(x: Tensor, complex_data: bool, method: str) -> str | None:
    if complex_data:
        return "complex data"
    if x.dtype not in fused.DTYPES:
        return str(x.dtype).removeprefix("torch.")
    if method != "auto":
        return f"method={method!r}"
    return None
