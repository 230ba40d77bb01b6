"""Low-rank convolutions, in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_int, check_ints, check_ndim, check_size
from .base import Device, LowRankLayer, Rank, check_source, converted, init_bias
from .functional import low_rank_conv

ConvT = TypeVar("ConvT", bound="_LowRankConv")


class _LowRankConv(LowRankLayer):
    """What the convolutions share; the number of grid axes is the subclass's."""

    _n_dim: ClassVar[int]
    _dense_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        max_rank: int | None = None,
    ):
        super().__init__()
        n = self._n_dim
        self.in_channels, self.out_channels = (
            check_int("in_channels", in_channels),
            check_int("out_channels", out_channels),
        )
        self.groups = check_int("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"groups must divide {name} = {channels}, got {groups}")
        self.kernel_size = check_ints("kernel_size", kernel_size, n)
        self.stride = check_ints("stride", stride, n)
        self.dilation = check_ints("dilation", dilation, n)
        check_choice("padding_mode", padding_mode, ("zeros", "reflect", "replicate", "circular"))
        self.padding_mode = padding_mode
        spans = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        self.padding: tuple[int, ...] | str
        if isinstance(padding, str):
            check_choice("padding", padding, ("same", "valid"))
            if padding == "same" and max(self.stride) > 1:
                raise ValueError(f"padding must not be 'same' where a stride is above 1, got stride {self.stride}")
            self.padding = padding
            sides = [(s // 2, s - s // 2) if padding == "same" else (0, 0) for s in spans]
        else:
            self.padding = check_ints("padding", padding, n, minimum=0)
            sides = [(p, p) for p in self.padding]
        # Zeros on both sides alike are the convolution's own business; all else is padded before it.
        inside = padding_mode == "zeros" and all(left == right for left, right in sides)
        self._inner = tuple(left for left, _ in sides) if inside else (0,) * n
        self._outer = None if inside else [p for side in reversed(sides) for p in side]
        columns = in_channels * math.prod(self.kernel_size)
        self._build(out_channels, columns, max_rank, bias, device=device, dtype=dtype)

    @classmethod
    def from_conv(
        cls: type[ConvT], conv: nn.Module, max_rank: int | None = None, *, gram: Tensor | None = None
    ) -> ConvT:
        """The layer that computes what ``conv`` does, or with a lower ``max_rank`` its best approximation.

        Args:
            conv: a ``torch.nn`` convolution of as many grid axes; left as it is.
            max_rank: of each group, min(out_channels / groups, in_channels / groups · Π kernel_size) by default.
            gram: E[x xᵀ] of the patches, see :meth:`load_dense_`.

        Raises:
            TypeError: ``conv`` is of another class, or complex.
            ValueError: its weight is parametrised, uninitialised or not finite, or ``max_rank`` does not fit.
        """
        check_source("conv", conv, cls._dense_class)
        c: Any = conv
        arguments = (c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups)
        return converted(cls, c, gram, *arguments, c.bias is not None, c.padding_mode, max_rank=max_rank)

    def forward(self, x: Tensor, rank: Rank = None) -> Tensor:
        """The convolution at ``rank``, or at the rank in force."""
        n = self._n_dim
        check_ndim("x", x, (n + 1, n + 2), "(batch, channels, *grid) or (channels, *grid)")
        batched = x if x.ndim == n + 2 else x[None]
        check_size("x", batched, 1, self.in_channels, "in_channels")
        if self._outer is not None:
            self._check_padding(x)
            batched = F.pad(batched, self._outer, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        rank = self._rank_of_call(rank)
        geometry = (self.kernel_size, self.stride, self._inner, self.dilation, self.groups)
        y = low_rank_conv(batched, self.weight_in, self.weight_out, self.bias, rank, *geometry)
        return y if x.ndim == n + 2 else y[0]

    def _check_padding(self, x: Tensor) -> None:
        """Reflected and wrapped points must exist."""
        short = {"reflect": 1, "circular": 0}.get(self.padding_mode)
        if short is None or self._outer is None:
            return
        for axis in range(1, self._n_dim + 1):
            most = max(self._outer[2 * axis - 2 : 2 * axis])
            if x.shape[-axis] < most + short:
                raise ValueError(
                    f"x must have at least {most + short} points at dimension {x.ndim - axis} to be padded by {most} "
                    f"({self.padding_mode}), got shape {tuple(x.shape)}"
                )

    @property
    def _groups(self) -> int:
        return self.groups

    def _matrix_of(self, dense: Tensor) -> Tensor:
        return dense.flatten(1).unflatten(0, (self.groups, -1))

    def _dense_of(self, matrix: Tensor) -> Tensor:
        return matrix.flatten(0, 1).unflatten(1, (self.in_channels // self.groups, *self.kernel_size))

    def _init_dense(self, dense: Tensor) -> None:
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        init_bias(self.bias, dense[0].numel())

    def _dense_module(self, **factory: Any) -> nn.Module:
        make: Callable[..., nn.Module] = self._dense_class
        arguments = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.bias is not None)
        return make(self.in_channels, self.out_channels, *arguments, self.padding_mode, **factory)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        usual = {"padding": (0,) * self._n_dim, "dilation": (1,) * self._n_dim, "groups": 1, "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join([*parts, super().extra_repr()])


_CONV_DOC = """A {n}-D convolution through a bottleneck of ordered ranks, whose prefixes are convolutions of their own::

        h[j] = Σ_c V[j, c] ⋆ x[c], j < b            y[o] = Σ_(j < b) U[o, j] h[j] + bias[o]

    A convolution with the kernel's extent, stride, padding and dilation from in_channels to b channels, then a
    pointwise one. Reads as :class:`torch.nn.Conv{n}d`, and starts as one: a kernel drawn as that layer draws it, read
    as a matrix (out_channels, in_channels · Π kernel_size) and decomposed as P S Qᵀ into U = P √S and V = √S Qᵀ. With
    g groups each is a matrix of its own, and all have rank b.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for :class:`torch.nn.Conv{n}d`.
        max_rank: r, by default min(out_channels, in_channels · Π kernel_size) / g, where every convolution is within
            reach.

    Shape: x (batch, in_channels, {grid}) or (in_channels, {grid}) -> the same with out_channels and the grid of
    :class:`torch.nn.Conv{n}d`. ``layer(x, rank=b)`` runs the prefix b, an int from 0 (the bias alone) to
    ``layer.rank``, or a tensor of ints (batch,) with one for each sample.

    Attributes:
        weight_in: (r, in_channels · Π kernel_size): row j holds the j-th filter of each group, one after another.
        weight_out: (out_channels, r).
        bias: (out_channels,) or None.
        rank, max_rank: the terms in force and those that the factors hold.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call.

    Source: arXiv 2308.14929, section 3; one spatial and one pointwise convolution, as its released code has it.

    Example:

        >>> layer = LowRankConv{n}d(8, 16, 3, padding=1)
        >>> layer(torch.randn(2, 8, {sizes}), rank=4).shape
        torch.Size([2, 16, {sizes}])
        >>> layer.to_dense()
        Conv{n}d(8, 16, kernel_size={kernel}, stride={stride}, padding={stride})
    """


def _conv_doc(n: int) -> str:
    return _CONV_DOC.format(
        n=n,
        grid=", ".join(("depth", "height", "width")[-n:]) if n > 1 else "length",
        sizes=", ".join(["6"] * n),
        kernel=(3,) * n,
        stride=(1,) * n,
    )


class LowRankConv1d(_LowRankConv):
    __doc__ = _conv_doc(1)
    _n_dim, _dense_class = 1, nn.Conv1d


class LowRankConv2d(_LowRankConv):
    __doc__ = _conv_doc(2)
    _n_dim, _dense_class = 2, nn.Conv2d


class LowRankConv3d(_LowRankConv):
    __doc__ = _conv_doc(3)
    _n_dim, _dense_class = 3, nn.Conv3d
