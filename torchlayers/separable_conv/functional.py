"""The convolution by a chain of one-way filters: checks, and the choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .._checks import check_choice, check_dtype, check_int, check_ints

__all__ = ["separable_conv", "separable_conv_transpose"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


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
) -> Tensor:
    r"""A convolution whose kernel is a product of one-way filters, computed filter by filter::

        y = f_n * ( ... f_2 * (f_1 * x)) + bias

    It equals ``torch.nn.functional.conv{1,2,3}d`` with the dense kernel of the chain: each filter takes the stride, the
    padding and the dilation of its own axes, and what is linear along one axis commutes with what is linear along
    another, whatever the padding mode. There is no bias between the filters.

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

    Returns:
        (N, O, ``*out``) or (O, ``*out``).

    Raises:
        ValueError: bad options; ``padding="same"`` with a stride.
        ValueError: dimensions or channels that do not fit; it is a RuntimeError as well, which torch's layers raise.
        TypeError: no tensor, or no floating-point one.

    Source: arXiv 2304.04964; arXiv 1405.3866, scheme 2.
    """
    dims = factors[0].ndim - 2
    stride, dilation = _tuple("stride", stride, dims), _tuple("dilation", dilation, dims)
    check_choice("padding_mode", padding_mode, _PADDING_MODES)
    kernel = [1] * dims
    for factor, own in zip(factors, axes, strict=True):
        for axis in own:
            kernel[axis] = factor.shape[2 + axis]
    pads = _pads(padding, kernel, stride, dilation)
    _check_input(input, dims)
    channel_axis = input.ndim - dims - 1
    x = input
    for index, (factor, own) in enumerate(zip(factors, axes, strict=True)):
        mine = [pads[a] if a in own else (0, 0) for a in range(dims)]
        symmetric = padding_mode == "zeros" and all(left == right for left, right in mine)
        if not symmetric and any(map(any, mine)):
            flat = [p for pair in reversed(mine) for p in pair]
            x = F.pad(x, flat, mode="constant" if padding_mode == "zeros" else padding_mode)
        groups = max(1, x.shape[channel_axis] // factor.shape[1])
        x = _CONV[dims](
            x,
            factor,
            bias if index == len(factors) - 1 else None,
            [stride[a] if a in own else 1 for a in range(dims)],
            [left for left, _ in mine] if symmetric else 0,
            [dilation[a] if a in own else 1 for a in range(dims)],
            groups,
        )
    return x


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

    Returns:
        (N, O, ``*out``) or (O, ``*out``).

    Raises:
        ValueError, TypeError: as there.
    """
    dims = factors[0].ndim - 2
    strides, dilations = _tuple("stride", stride, dims), _tuple("dilation", dilation, dims)
    pads, more = _tuple("padding", padding, dims, 0), _tuple("output_padding", output_padding, dims, 0)
    _check_input(input, dims, factors[-1].shape[0])
    x = input
    for index in reversed(range(len(factors))):
        factor, own = factors[index], axes[index]
        channels = factors[index - 1].shape[0] if index else out_channels
        x = _TRANSPOSED[dims](
            x,
            factor,
            bias if index == 0 else None,
            [strides[a] if a in own else 1 for a in range(dims)],
            [pads[a] if a in own else 0 for a in range(dims)],
            [more[a] if a in own else 0 for a in range(dims)],
            max(1, channels // factor.shape[1]),
            [dilations[a] if a in own else 1 for a in range(dims)],
        )
    return x


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
