"""The convolution by a chain of one-way filters: checks, and the choice of implementation.

Fewer weights are not less time. A chain may be run as it stands, as one dense convolution with its kernel, or (two
filters in two dimensions, on a GPU) as one kernel that keeps the channels in between on the chip; which of them is
expected to be the fastest follows from the filters and the strides alone (:func:`_fastest`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _backend
from .._attention import autocast
from .._backend import BACKENDS, import_kernels, note_dispatch, use_triton
from .._checks import check_choice, check_dtype, check_int, check_ints
from .reference import chain_weight

__all__ = ["separable_conv", "separable_conv_transpose"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
METHODS = ("auto", "chain", "dense")

_kernels = import_kernels("separable_conv")


def separable_conv(
    input: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    *,
    axes: Sequence[Sequence[int]],
    padding_mode: str = "zeros",
    activation: str | None = None,
    method: str = "auto",
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""A convolution whose kernel is a product of one-way filters::

        y = act(f_n * ( ... f_2 * (f_1 * x)) + bias)

    Before the activation it equals ``torch.nn.functional.conv{1,2,3}d`` with the dense kernel of the chain: each filter
    takes the stride, the padding and the dilation of its own axes, and what is linear along one axis commutes with what
    is linear along another, whatever the padding mode. There is no bias between the filters.

    Args:
        input: (N, C, ``*size``) or (C, ``*size``), one to three axes.
        factors: the filters in the order of application, (out, in / groups, ``*kernel``) each, 1 along the axes that it
            leaves alone. How many groups one has follows from the channels that reach it.
        bias: (O,) or None.
        stride, dilation: as in ``torch.nn.functional.conv2d``.
        padding: likewise; also "same" (stride 1 only) and "valid".
        axes: for each filter, which axes are its own, counted from 0 for the first axis after the channels. An axis
            belongs to one filter at most; one that belongs to none is neither strided nor padded, and has kernel 1.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        activation: None, "relu", "gelu" (by erf) or "silu".
        method: of plain torch: "chain" filters one after the other, "dense" makes the chain's kernel and convolves
            once, "auto" takes what is expected to be the faster one.
        recompute: what lies between the filters is not kept for the backward pass but computed again in it, so that as
            much is kept as by a dense layer: ``input``. That costs all but the last filter a second time, with an
            activation that one too. The Triton kernel and "dense" never keep what lies between, whatever is said here.
        backend: see :func:`torchlayers.backend`. "auto" takes the kernel where it is expected to beat both methods; it
            holds two ungrouped filters in two dimensions, in float32, float16 or bfloat16, of ranks up to 64.
            ``torchlayers.last_dispatch()`` says what ran.

    Returns:
        (N, O, ``*out``) or (O, ``*out``).

    Raises:
        ValueError: bad options; ``padding="same"`` with a stride.
        ValueError: dimensions or channels that do not fit; it is a RuntimeError as well, which torch's layers raise.
        TypeError: no tensor, or no floating-point one.
        BackendError: ``backend="triton"`` with what the kernel does not support.

    Source: arXiv 2304.04964; arXiv 1405.3866, scheme 2.
    """
    dims = factors[0].ndim - 2
    stride, dilation = _tuple("stride", stride, dims), _tuple("dilation", dilation, dims)
    check_choice("padding_mode", padding_mode, _PADDING_MODES)
    if activation is not None:
        check_choice("activation", activation, _ACTIVATIONS)
    kernel, owned = [1] * dims, [False] * dims
    for factor, own in zip(factors, axes, strict=True):
        for axis in own:
            kernel[axis], owned[axis] = factor.shape[2 + axis], True
    pads = [pair if own else (0, 0) for pair, own in zip(_pads(padding, kernel, stride, dilation), owned, strict=True)]
    stride = tuple(s if own else 1 for s, own in zip(stride, owned, strict=True))
    _check_input(input, dims)
    channels = input.shape[-dims - 1]
    groups = _groups(factors, channels)
    shapes = [tuple(factor.shape) for factor in factors]

    choice = _choose("separable_conv", input, shapes, channels, groups, stride, axes, method, backend)
    geometry: tuple[Any, ...] = (stride, pads, dilation, padding_mode, activation)
    if choice == "fused":
        return _fused(input, factors, bias, axes[0][0], *geometry)
    if choice == "dense" and len(factors) > 1:
        factors, axes = [chain_weight(factors, channels, math.gcd(*groups))], [tuple(range(dims))]
        groups = [math.gcd(*groups)]
    return _run(functools.partial(_chain, input, bias, geometry, groups, axes), factors, recompute)


def _run(chain: Callable[..., Tensor], factors: Sequence[Tensor], recompute: bool) -> Tensor:
    if recompute and len(factors) > 1 and torch.is_grad_enabled():
        return checkpoint(chain, *factors, use_reentrant=False, preserve_rng_state=False)
    return chain(*factors)


def _choose(
    operation: str,
    input: Tensor,
    shapes: Sequence[tuple[int, ...]],
    channels: int,
    groups: Sequence[int],
    stride: Sequence[int],
    axes: Sequence[Sequence[int]],
    method: str,
    backend: str | None,
) -> str:
    """ "fused", "chain" or "dense", noted for ``last_dispatch``; ``channels`` and ``stride`` are the chain's own."""
    check_choice("method", method, METHODS)
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    name = _backend._current if backend is None else backend
    choice, lack = method, None
    if method == "auto":
        kind = "cuda" if input.is_cuda else "cpu"
        choice = _fastest(shapes, channels, math.gcd(*groups), stride, axes, kind, False)
    if name == "triton" or (name == "auto" and input.is_cuda):
        dtype = autocast(input)[0].dtype
        lack = _lacking(shapes, groups, axes, dtype)
        if lack is None and method != "auto":
            lack = f"method={method!r}"
        low = dtype.itemsize == 2
        if lack is None and name == "auto" and _fastest(shapes, channels, 1, stride, axes, "cuda", low) != "fused":
            lack = f"such filters any faster than method={choice!r}"
    if use_triton(operation, input, backend, lack):
        return "fused"
    note_dispatch(f"{_backend.last_dispatch()}, method={choice!r}")
    return choice


def _chain(
    x: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    groups: Sequence[int],
    axes: Sequence[Sequence[int]],
    *factors: Tensor,
) -> Tensor:
    """Filter by filter."""
    stride, pads, dilation, padding_mode, activation = geometry
    dims = len(stride)
    for index, (factor, own) in enumerate(zip(factors, axes, strict=True)):
        mine = [pads[a] if a in own else (0, 0) for a in range(dims)]
        symmetric = padding_mode == "zeros" and all(left == right for left, right in mine)
        if not symmetric:
            x = _pad(x, mine, padding_mode)
        x = _CONV[dims](
            x,
            factor,
            bias if index == len(factors) - 1 else None,
            [stride[a] if a in own else 1 for a in range(dims)],
            [left for left, _ in mine] if symmetric else 0,
            [dilation[a] if a in own else 1 for a in range(dims)],
            groups[index],
        )
    return x if activation is None else _ACTIVATIONS[activation](x)


def _fused(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    across: int,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    padding_mode: str,
    activation: str | None,
) -> Tensor:
    """Both filters in one kernel; ``across`` is the axis of the first."""
    assert _kernels is not None
    if padding_mode != "zeros":
        x, pads = _pad(x, pads, padding_mode), [(0, 0)] * 2
    x, *weights = autocast(x, *factors, *(() if bias is None else (bias,)))
    first, second = weights[0].squeeze(3 - across), weights[1].squeeze(2 + across)
    taps = (first.shape[2], second.shape[2]) if across == 0 else (second.shape[2], first.shape[2])
    size = [
        (n + sum(pad) - d * (k - 1) - 1) // s + 1
        for n, pad, d, k, s in zip(x.shape[-2:], pads, dilation, taps, stride, strict=True)
    ]
    if x.shape[-3] != first.shape[1]:
        raise _InputError(f"input must have {first.shape[1]} channels, got shape {tuple(x.shape)}")
    if min(size) < 1:
        raise _InputError(f"input must be at least as large as the filters, got shape {tuple(x.shape)}")
    before = [pad[0] for pad in pads]
    options = (across, list(stride), before, list(dilation), size, activation)
    image = x if x.ndim == 4 else x.unsqueeze(0)
    y = _kernels.separable_conv(image, first, second, weights[2] if bias is not None else None, *options)
    return y if x.ndim == 4 else y.squeeze(0)


def _pad(x: Tensor, pads: Sequence[tuple[int, int]], mode: str) -> Tensor:
    if not any(map(any, pads)):
        return x
    flat = [p for pair in reversed(pads) for p in pair]
    return F.pad(x, flat, mode="constant" if mode == "zeros" else mode)


def _groups(factors: Sequence[Tensor], channels: int) -> list[int]:
    """The groups of each filter, by the channels that reach it."""
    groups = []
    for factor in factors:
        groups.append(max(1, channels // factor.shape[1]))
        channels = factor.shape[0]
    return groups


# Choosing. Times are per output pixel, in bytes of memory traffic: an operation costs the larger of what it moves and
# what it multiplies, at so many floating-point operations a byte. These are of an H100 (989 TFLOP/s in 16 bits, 495 in
# tf32, 3.35 TB/s): two thirds of the peak for a library's convolution, half of it for the fused kernel, which has not
# been measured and so is taken only where it promises a fifth.
_LIBRARY = {2: 190.0, 4: 95.0, 8: 13.0}
_FUSED = 150.0
_PROMISE = 0.8
# On a CPU all of it is arithmetic, and one-way filters reach less of the peak than dense kernels do: they broke even at
# shares of the dense multiplications from 0.7 to beyond 0.95, over five layers with 16 to 128 channels (one thread).
_CPU_SHARE = 0.7


def _fastest(
    shapes: Sequence[tuple[int, ...]],
    channels: int,
    groups: int,
    stride: Sequence[int],
    axes: Sequence[Sequence[int]],
    device: str,
    low: bool,
) -> str:
    """ "chain", "dense" or "fused" (16 bits on a GPU): a pure function of the filters and the strides.

    Sizes of the image do not enter, so that a compiled graph holds for all of them.
    """
    out, itemsize, library = shapes[-1][0], 2 if low else 4, _LIBRARY[2 if low else 4]
    ahead = math.prod(stride)  # pixels for one of the output
    moved = itemsize * (channels * ahead + out)
    taps = math.prod([math.prod(shape[2:]) for shape in shapes])
    dense_macs = out * (channels // max(groups, 1)) * taps
    chain_macs, chain = 0, 0.0
    for shape, own in zip(shapes, axes, strict=True):
        before, ahead = ahead, ahead // math.prod([stride[a] for a in own])
        macs = math.prod(shape) * ahead
        chain_macs += macs
        chain += max(itemsize * (channels * before + shape[0] * ahead), 2 * macs / library)
        channels = shape[0]
    if device == "cpu":
        return "chain" if chain_macs < _CPU_SHARE * dense_macs else "dense"
    dense = max(moved, 2 * dense_macs / library)
    if low and max(moved, 2 * chain_macs / _FUSED) <= _PROMISE * min(dense, chain):
        return "fused"
    return "chain" if chain < dense else "dense"


def _lacking(
    shapes: Sequence[tuple[int, ...]], groups: Sequence[int], axes: Sequence[Sequence[int]], dtype: torch.dtype
) -> str | None:
    """What of such filters the kernel does not support, in words, or None."""
    if _kernels is None:
        return "anything: triton is not installed"
    if len(shapes) != 2 or len(shapes[0]) != 4 or sorted(map(tuple, axes)) != [(0,), (1,)]:
        return "other chains than a vertical and a horizontal filter in two dimensions"
    if max(groups) > 1:
        return f"groups, got {max(groups)}"
    (r, c, *_), (out, *_) = shapes
    taps = shapes[0][2 + axes[0][0]], shapes[1][2 + axes[1][0]]
    return _kernels.unsupported(c, r, out, taps, dtype)


def separable_conv_transpose(
    input: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    *,
    out_channels: int,
    axes: Sequence[Sequence[int]],
    method: str = "auto",
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The transpose of :func:`separable_conv` with the same ``factors`` and ``axes``, and a bias of its own.

    It equals ``torch.nn.functional.conv_transpose{1,2,3}d`` with the dense kernel of the chain, whose last filter is
    transposed first.

    Args:
        input: (N, C, ``*size``) or (C, ``*size``), C the channels that the chain *ends* with.
        factors, stride, padding, dilation, axes: those of the convolution that is transposed; its padding is zeros.
        bias: (O,) or None.
        out_channels: O, the channels that the chain begins with.
        output_padding: as in ``torch.nn.functional.conv_transpose2d``.
        method, recompute, backend: as in :func:`separable_conv`.

    Returns:
        (N, O, ``*out``) or (O, ``*out``).

    Raises:
        ValueError, TypeError, BackendError: as there.
    """
    dims = factors[0].ndim - 2
    strides, dilations = _tuple("stride", stride, dims), _tuple("dilation", dilation, dims)
    pads, more = _tuple("padding", padding, dims, 0), _tuple("output_padding", output_padding, dims, 0)
    _check_input(input, dims, factors[-1].shape[0])
    groups, shapes = _groups(factors, out_channels), [tuple(factor.shape) for factor in factors]
    owned = [any(a in own for own in axes) for a in range(dims)]
    strides = tuple(s if own else 1 for s, own in zip(strides, owned, strict=True))
    pads = tuple(p if own else 0 for p, own in zip(pads, owned, strict=True))
    more = tuple(m if own else 0 for m, own in zip(more, owned, strict=True))
    # Transposed, a chain multiplies and moves what it does forth.
    choice = _choose("separable_conv_input", input, shapes, out_channels, groups, strides, axes, method, backend)
    geometry = (strides, pads, more, dilations)
    if choice == "fused":
        return _fused_transpose(input, factors, bias, axes[0][0], *geometry)
    if choice == "dense" and len(factors) > 1:
        factors, axes = [chain_weight(factors, out_channels, math.gcd(*groups))], [tuple(range(dims))]
        groups = [math.gcd(*groups)]
    return _run(functools.partial(_transposed_chain, input, bias, geometry, groups, axes), factors, recompute)


def _transposed_chain(
    x: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    groups: Sequence[int],
    axes: Sequence[Sequence[int]],
    *factors: Tensor,
) -> Tensor:
    stride, pads, more, dilation = geometry
    dims = len(stride)
    for index in reversed(range(len(factors))):
        own = axes[index]
        x = _TRANSPOSED[dims](
            x,
            factors[index],
            bias if index == 0 else None,
            [stride[a] if a in own else 1 for a in range(dims)],
            [pads[a] if a in own else 0 for a in range(dims)],
            [more[a] if a in own else 0 for a in range(dims)],
            groups[index],
            [dilation[a] if a in own else 1 for a in range(dims)],
        )
    return x


def _fused_transpose(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    across: int,
    stride: Sequence[int],
    pads: Sequence[int],
    more: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Both filters in one kernel; ``across`` is the axis of the first of the chain, which comes last."""
    assert _kernels is not None
    x, *weights = autocast(x, *factors)
    first, second = weights[0].squeeze(3 - across), weights[1].squeeze(2 + across)
    taps = (first.shape[2], second.shape[2]) if across == 0 else (second.shape[2], first.shape[2])
    geometry = zip(x.shape[-2:], pads, more, dilation, taps, stride, strict=True)
    size = [(n - 1) * s - 2 * p + d * (k - 1) + m + 1 for n, p, m, d, k, s in geometry]
    if min(size) < 1:
        raise _InputError(f"input must give at least one point, got shape {tuple(x.shape)} for a size of {size}")
    image = x if x.ndim == 4 else x.unsqueeze(0)
    y = _kernels.separable_conv_input(image, first, second, across, list(stride), list(pads), list(dilation), size)
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None, None]
    return y if x.ndim == 4 else y.squeeze(0)


class _InputError(ValueError, RuntimeError):
    """Wrong dimensions or channels: ``torch.nn`` raises RuntimeError there, this package ValueError; caught as both."""


def _check_input(input: Tensor, dims: int, channels: int | None = None) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    check_dtype("input", input, kind="real")
    if input.ndim not in (dims + 1, dims + 2):
        layout = ("L", "H, W", "D, H, W")[dims - 1]
        raise _InputError(f"input must be (N, C, {layout}) or (C, {layout}), got shape {tuple(input.shape)}")
    if channels is not None and input.shape[-dims - 1] != channels:
        raise _InputError(f"input must have {channels} channels, got shape {tuple(input.shape)}")


def _tuple(name: str, value: int | tuple[int, ...], dims: int, minimum: int = 1) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)):
        return check_ints(name, value, dims, minimum=minimum)
    return (check_int(name, value, minimum=minimum),) * dims


def _pads(
    padding: int | str | tuple[int, ...], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) along each axis."""
    if isinstance(padding, str):
        check_choice("padding", padding, ("same", "valid"))
        if padding == "valid":
            return [(0, 0)] * len(kernel)
        if any(s != 1 for s in stride):
            raise ValueError(f"padding='same' needs stride 1, got stride={tuple(stride)}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in _tuple("padding", padding, len(kernel), minimum=0)]
