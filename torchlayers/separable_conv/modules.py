"""Convolutions whose kernels are sums of products of one-way filters, in the clothes of ``torch.nn.Conv1d/2d/3d``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from .._backend import BACKENDS
from .._checks import check_choice, check_dtype, check_int
from ..factorized import balanced_svd
from . import decompose
from .functional import _check_input, separable_conv, separable_conv_transpose
from .reference import chain_weight, kernelwise_weight

__all__ = [
    "LazySeparableConv1d",
    "LazySeparableConv2d",
    "LazySeparableConv3d",
    "SeparableConv1d",
    "SeparableConv2d",
    "SeparableConv3d",
    "SeparableConvTranspose2d",
]

FORMATS = ("seq", "cp", "kernelwise", "depthwise")
# How the axes are called, outermost first: depth, vertical, horizontal.
_AXES = {1: "h", 2: "vh", 3: "dvh"}
Rank = int | float | str | tuple[int, int] | None
ConvT = TypeVar("ConvT", bound="_SeparableConv")


class _SeparableConv(nn.Module):
    """What the separable convolutions share; see :class:`SeparableConv2d`."""

    _dense_class: ClassVar[type[nn.Module]]
    _dims: ClassVar[int]
    _method = "auto"
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank = None,
        format: str = "seq",
        order: str | None = None,
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        # torch's own layer checks its own arguments.
        geometry = (stride, padding, dilation, groups, False, padding_mode, "meta")
        dense: Any = self._dense_class(in_channels, out_channels, kernel_size, *geometry)
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, dense.kernel_size
        self.groups, self.padding_mode = groups, padding_mode
        self._configure(rank, format, order, recompute, backend, dtype)
        self._build(bias, device=device, dtype=dtype)

    def _configure(
        self,
        rank: Rank,
        format: str,
        order: str | None,
        recompute: bool,
        backend: str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_choice("format", format, FORMATS)
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating-point dtype, got {dtype}")
        axes = _AXES[self._dims]
        order = axes if order is None else order
        if not isinstance(order, str) or sorted(order) != sorted(axes):
            raise ValueError(f"order must be a permutation of {axes!r}, got {order!r}")
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute must be a bool, got {recompute!r} ({type(recompute).__name__})")
        self.format, self.order, self.recompute, self.backend, self._asked = format, order, recompute, backend, rank

    def _build(self, bias: bool, **factory: Any) -> None:
        self.rank = self._resolve(self._asked)
        for name, shape in self._shapes(self.rank).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
        self.register_parameter("bias", nn.Parameter(torch.empty(self.out_channels, **factory)) if bias else None)
        self._warn()
        self.reset_parameters()

    def _warn(self) -> None:
        count = self._count(self.rank)
        if count > self._dense_count:
            warnings.warn(
                f"rank={self.rank} costs more than the dense layer ({count:,} weights against "
                f"{self._dense_count:,}); {self.format!r} breaks even at rank {self.break_even_rank}",
                UserWarning,
                stacklevel=4,
            )

    # Ranks and shapes

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def _dense_count(self) -> int:
        return math.prod(self._dense_shape)

    @property
    def _stages(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and axes of each filter, in the order of application."""
        axes = _AXES[self._dims]
        along: list[tuple[str, tuple[int, ...]]] = [(f"weight_{a}", (axes.index(a),)) for a in self.order]
        if self.format == "cp":
            return [("weight_in", ()), *along, ("weight_out", ())]
        if self.format == "depthwise":
            return [("weight_depth", tuple(range(self._dims))), ("weight_out", ())]
        if self.format == "seq" and self._dims == 1:
            return [*along, ("weight_out", ())]
        return along

    def _shapes(self, rank: int | tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        g, (out, inside, *kernel) = self.groups, self._dense_shape
        ones = (1,) * self._dims

        def along(axis: int) -> tuple[int, ...]:
            return tuple(k if a == axis else 1 for a, k in enumerate(kernel))

        if self.format == "kernelwise":
            return {name: (out, inside, int(rank), kernel[axis]) for name, (axis,) in self._stages}  # type: ignore[arg-type]
        if self.format == "depthwise":
            wide = inside * g * int(rank)  # type: ignore[arg-type]
            return {"weight_depth": (wide, 1, *kernel), "weight_out": (out, wide // g, *ones)}
        if self.format == "cp":
            r = int(rank)  # type: ignore[arg-type]
            shapes: dict[str, tuple[int, ...]] = {"weight_in": (g * r, inside, *ones)}
            shapes |= {name: (g * r, 1, *along(own[0])) for name, own in self._stages[1:-1]}
            return shapes | {"weight_out": (out, r, *ones)}
        ranks = rank if isinstance(rank, tuple) else (rank,) * (len(self._stages) - 1)
        widths = [inside, *ranks, out // g]
        return {
            name: (g * after, before, *(along(own[0]) if own else ones))
            for (name, own), before, after in zip(self._stages, widths, widths[1:], strict=False)
        }

    def _count(self, rank: int | tuple[int, ...]) -> int:
        return sum(map(math.prod, self._shapes(rank).values()))

    @property
    def full_rank(self) -> int | tuple[int, int]:
        """The rank at which every dense kernel is within reach, per group; of ``seq`` in 3-D a pair."""
        out, inside = self._dense_shape[0] // self.groups, self._dense_shape[1]
        kernel, size = [self.kernel_size[_AXES[self._dims].index(a)] for a in self.order], self.kernel_size
        if self.format == "cp":
            return math.prod((out, inside, *size)) // max(out, inside, *size)
        if self.format == "kernelwise":
            return math.prod(size) // max(size) if self._dims > 1 else 1
        if self.format == "depthwise":
            return min(out, math.prod(size))
        if self._dims == 1:
            return min(inside * size[0], out)
        if self._dims == 2:
            return min(inside * kernel[0], kernel[1] * out)
        a, b, c = kernel
        return min(inside * a, b * c * out), min(inside * a * b, c * out)

    @property
    def break_even_rank(self) -> int:
        """The largest rank with no more weights than the dense layer (in 3-D: both ranks alike), or 1."""
        return self._largest(self._dense_count)

    def _largest(self, budget: float) -> int:
        full = self.full_rank
        top, low = max(full) if isinstance(full, tuple) else full, 1
        while low < top:
            middle = (low + top + 1) // 2
            low, top = (middle, top) if self._count(self._clip(middle)) <= budget else (low, middle - 1)
        return low

    def _clip(self, rank: int) -> int | tuple[int, ...]:
        full = self.full_rank
        return tuple(min(rank, f) for f in full) if isinstance(full, tuple) else rank

    def _resolve(self, rank: Rank) -> int | tuple[int, ...]:
        full = self.full_rank
        if rank is None:
            return self._clip(self._largest(self._dense_count / 2))
        if isinstance(rank, float):
            if not 0 < rank <= 1:
                raise ValueError(f"rank must be a fraction of the full rank in (0, 1] or a whole number, got {rank}")
            if isinstance(full, tuple):
                return tuple(max(1, math.ceil(rank * f)) for f in full)
            return max(1, math.ceil(rank * full))
        if isinstance(rank, (tuple, list)):
            if not isinstance(full, tuple) or len(rank) != 2:
                raise ValueError(f"rank may be a pair only of format='seq' in three dimensions, got {rank!r}")
            pair = tuple(check_int("rank", r) for r in rank)
            if any(r > f for r, f in zip(pair, full, strict=True)):
                raise ValueError(f"rank must be at most the full rank {full}, got {pair}")
            return pair
        check_int("rank", rank)
        if rank > (max(full) if isinstance(full, tuple) else full):  # type: ignore[operator]
            raise ValueError(f"rank must be at most the full rank {full}, got {rank}")
        return self._clip(rank)  # type: ignore[arg-type]

    # Weights

    @property
    def factors(self) -> list[Tensor]:
        """The filters, in the order of application."""
        return [getattr(self, name) for name, _ in self._stages]

    def equivalent_weight(self) -> Tensor:
        """The kernel of the dense layer that computes the same, in its shape; differentiable."""
        if self.format != "kernelwise":
            return chain_weight(self.factors, self._dense_shape[1] * self.groups, self.groups)
        axes = _AXES[self._dims]
        return kernelwise_weight([getattr(self, f"weight_{a}") for a in axes])

    @torch.no_grad()
    def load_dense_(self, weight: Tensor, *, keep_norm: bool = False) -> _SeparableConv:
        """Set the filters to the decomposition of a dense kernel at the layer's rank.

        Of ``seq`` it is the best there is in one and two dimensions (its error is the tail of the singular values), of
        ``cp`` the best of a few alternating least squares, of ``kernelwise`` and ``depthwise`` a (nested) truncated SVD
        each.

        Args:
            weight: (O, C / groups, ``*kernel``).
            keep_norm: scale the result to the norm of ``weight``.

        Raises:
            ValueError: another shape, or entries that are not finite.
            TypeError: not real.
        """
        check_dtype("weight", weight, kind="real")
        if tuple(weight.shape) != self._dense_shape:
            raise ValueError(f"weight must have shape {self._dense_shape}, got {tuple(weight.shape)}")
        if not bool(weight.isfinite().all()):
            raise ValueError("weight must be finite to be decomposed, got NaN or infinite entries")
        work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        for (name, _), factor in zip(self._stages, self._decomposed(work), strict=True):
            getattr(self, name).copy_(factor.reshape(getattr(self, name).shape))
        if keep_norm:
            size = self.equivalent_weight().norm()
            if float(size) > 0:
                scale = (work.norm() / size) ** (1 / len(self._stages))
                for factor in self.factors:
                    factor.mul_(scale)
        return self

    def _decomposed(self, weight: Tensor) -> list[Tensor]:
        g = self.groups
        if self.format == "kernelwise":
            by_axis = dict(zip(_AXES[self._dims], decompose.kernelwise_factors(weight, int(self.rank)), strict=True))  # type: ignore[arg-type]
            return [by_axis[a] for a in self.order]
        blocks = weight.unflatten(0, (g, -1))  # (g, O, C, *kernel)
        if self.format == "depthwise":
            left, right = balanced_svd(blocks.transpose(1, 2).flatten(3), int(self.rank))  # type: ignore[arg-type]
            return [right, left.transpose(1, 2)]  # (g, C, R, K) and (g, O, C, R)
        if self.format == "cp":
            parts = [self._cp_of(block) for block in blocks]
            return [torch.cat([part[i] for part in parts]) for i in range(len(self._stages))]
        axes = [2 + 1 + _AXES[self._dims].index(a) for a in self.order]
        rest = blocks.permute(0, 2, *axes, 1)  # (g, C, *kernel in order, O)
        if self._dims == 1:
            rest = rest.unsqueeze(-2)
        out: list[Tensor] = []
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        for r in ranks:
            # (g, before, k, ...) cut between k and what follows.
            before, k = rest.shape[1], rest.shape[2]
            left, right = balanced_svd(rest.flatten(1, 2).flatten(2), r)
            out.append(left.transpose(1, 2).unflatten(-1, (before, k)))  # (g, R, before, k)
            rest = right.unflatten(-1, rest.shape[3:])
        last = rest  # (g, R, k, O)
        out.append(last.permute(0, 3, 1, 2))
        return out

    def _cp_of(self, block: Tensor) -> list[Tensor]:
        exact = self.rank == self.full_rank
        terms = decompose.unit_terms(block) if exact else decompose.cp_als(block, int(self.rank))  # type: ignore[arg-type]
        out, inside, *along = terms
        by_axis = dict(zip(_AXES[self._dims], along, strict=True))
        return [inside.mT, *(by_axis[a].mT for a in self.order), out]

    def reset_parameters(self) -> None:
        """Start with the variance that the dense layer starts with.

        ``cp`` draws its factors independently, which keeps the variance of the kernel; the others draw the kernel that
        ``torch.nn`` draws, decompose it in balance and scale it to its norm. (A default start of each filter would
        divide the variance by three a filter.) The bias is drawn as ``torch.nn`` draws it.
        """
        fan_in = math.prod(self._dense_shape[1:])
        if not self.factors[0].is_meta:
            if self.format == "cp":
                with torch.no_grad():
                    for name, own in self._stages:
                        factor = getattr(self, name)
                        width = self.kernel_size[own[0]] if own else factor.shape[1]
                        nn.init.normal_(factor, std=math.sqrt(1 / (3 * width if name == "weight_out" else width)))
            else:
                like = self.factors[0]
                work = torch.promote_types(like.dtype, torch.float32)
                dense = torch.empty(self._dense_shape, device=like.device, dtype=work)
                nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
                self.load_dense_(dense, keep_norm=True)
        if self.bias is not None and fan_in:
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(self.bias, -bound, bound)

    # Calls

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ``*size``) or (C, ``*size``) to (N, O, ``*out``) or (O, ``*out``), as the dense layer."""
        _check_input(input, self._dims, self.in_channels)
        if self.format == "kernelwise":  # a sum of products for each pair of channels is no chain
            factors, axes = [self.equivalent_weight()], [tuple(range(self._dims))]
        else:
            factors, axes = self.factors, [own for _, own in self._stages]
        return separable_conv(
            input,
            factors,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            axes=axes,
            padding_mode=self.padding_mode,
            method=self._method,
            recompute=self.recompute,
            backend=self.backend,
        )

    # To and from dense layers

    @classmethod
    def from_conv(
        cls: type[ConvT],
        conv: nn.Module,
        rank: Rank = None,
        format: str = "seq",
        *,
        order: str | None = None,
        init: str = "decomposed",
        backend: str | None = None,
    ) -> ConvT:
        """The layer that stands in for ``conv``, with its options, device, dtype and mode.

        Args:
            conv: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, as the class.
            rank, format, order, backend: as in the constructor.
            init: "decomposed" takes the weights over as well as the rank allows; "fresh" draws new ones.

        Raises:
            TypeError: ``conv`` is another layer.
            ValueError: it has no weights yet (lazy), or an option is bad.
        """
        check_choice("init", init, ("decomposed", "fresh"))
        if not isinstance(conv, cls._dense_class):
            raise TypeError(f"conv must be an nn.{cls._dense_class.__name__}, got {type(conv).__name__}")
        source: Any = conv
        if is_lazy(source.weight):
            raise ValueError("conv must be initialized, got a lazy layer: call it once first")
        chosen: dict[str, Any] = {"rank": rank, "format": format, "order": order, "backend": backend}
        layer: Any = cls(**_arguments(source), **chosen, device="meta", dtype=source.weight.dtype)
        layer.to_empty(device=source.weight.device)
        if source.weight.is_meta:
            return layer.train(conv.training)
        if init == "fresh":
            layer.reset_parameters()
        else:
            layer.load_dense_(source.weight)
            if source.bias is not None:
                with torch.no_grad():
                    layer.bias.copy_(source.bias)
        return layer.train(conv.training)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The ``torch.nn`` layer that computes the same, with weights of its own."""
        weight = self.equivalent_weight()
        dense: Any = self._dense_class(**_arguments(self), device="meta", dtype=weight.dtype)
        dense.to_empty(device=weight.device)
        dense.weight.copy_(weight)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def macs(self, *size: int) -> int:
        """Multiply-accumulates for one sample of spatial ``size``: the fewer of the filters' and the dense layer's.

        What runs may be the other one, where that is expected to take less time.
        """
        if self.format == "kernelwise":
            return self._dense_macs(*size)
        current, total, ends = list(size), 0, self._output_size(size)
        for factor, (_, own) in zip(self.factors, self._stages, strict=True):
            current = [ends[a] if a in own else n for a, n in enumerate(current)]
            total += factor.numel() * math.prod(current)
        return min(total, self._dense_macs(*size))

    def _dense_macs(self, *size: int) -> int:
        return self._dense_count * math.prod(self._output_size(size))

    def _output_size(self, size: Sequence[int]) -> list[int]:
        if isinstance(self.padding, str):
            same = self.padding == "same"
            pads = [same * d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        else:
            pads = [2 * p for p in self.padding]
        geometry = zip(size, pads, self.dilation, self.kernel_size, self.stride, strict=True)
        return [(n + p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in geometry]

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, plain in (("padding", (0,) * self._dims), ("dilation", (1,) * self._dims), ("groups", 1)):
            if getattr(self, name) != plain:
                text += f", {name}={getattr(self, name)!r}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        if self.bias is None:
            text += ", bias=False"
        share = self._count(self.rank) / self._dense_count if self._dense_count else 1.0
        return f"{text}, format={self.format!r}, rank={self.rank}, weights={share:.1%} of dense"


def _arguments(conv: Any) -> dict[str, Any]:
    """What a convolution, dense or separable, was made with."""
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if isinstance(conv, (nn.ConvTranspose2d, SeparableConvTranspose2d)):
        names.append("output_padding")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


class SeparableConv1d(_SeparableConv):
    """A convolution over one axis whose kernel is a product of a filter from C to R channels and a mixing to O.

    Reads as :class:`torch.nn.Conv1d`; ``format`` and ``rank`` are those of :class:`SeparableConv2d`. There is no second
    axis to separate: ``seq`` is W[o, c, i] = sum_r P[o, r] V[r, c, i].

    Shape:
        - input: (N, C, L) or (C, L); output (N, O, L') or (O, L').

    Raises:
        ValueError, TypeError: as :class:`SeparableConv2d`.

    Source: arXiv 2304.04964; in one dimension the chain of Jin, Dundar and Culurciello, arXiv 1412.5474.

    Example:
        >>> layer = SeparableConv1d(16, 32, 5, padding="same", rank=8)
        >>> layer(torch.randn(4, 16, 100)).shape
        torch.Size([4, 32, 100])
    """

    _dense_class, _dims = nn.Conv1d, 1


class SeparableConv2d(_SeparableConv):
    r"""A convolution over two axes by one-way filters, fewer weights from the start of training on.

    Reads as :class:`torch.nn.Conv2d`, with every option of it exact: the same as the dense layer with the kernel
    :meth:`equivalent_weight`, in any padding mode, with strides, dilation and groups. There is neither bias nor
    activation between the filters.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in :class:`torch.nn.Conv2d`.
        rank: how many terms the kernel has, per group: a whole number up to :attr:`full_rank`; a float in (0, 1] as a
            fraction of it, rounded up; by default the largest with half of the dense layer's weights.
        format: which sum of products the kernel is (C, O per group, k_v × k_h the kernel):

            ============  =========================================  ==============================  ================
            format        W[o, c, i, j]                              weights                         full rank
            ============  =========================================  ==============================  ================
            "seq"         sum_r H[o, r, j] V[r, c, i]                R (k_v C + k_h O)               min(k_v C, k_h O)
            "cp"          sum_r P[o, r] A[r, i] B[r, j] Q[r, c]      R (C + k_v + k_h + O)           all but one mode
            "kernelwise"  sum_r A[o, c, r, i] B[o, c, r, j]          R O C (k_v + k_h)               min(k_v, k_h)
            "depthwise"   sum_r P[o, c, r] D[c, r, i, j]             R C (k_v k_h + O)               min(k_v k_h, O)
            ============  =========================================  ==============================  ================

            "kernelwise" saves weights, not multiplications: it runs as one dense convolution.
        order: which filter of "seq" and "cp" comes first, "vh" or "hv" (v: along the height).
        recompute: compute what lies between the filters again in the backward pass instead of keeping it, so that the
            layer keeps as much as the dense one: its input. An attribute, which may be set at any time.
        backend: see :func:`torchlayers.backend`. The kernel holds "seq" without groups, with ranks up to 64, and never
            keeps what lies between the filters. Plain torch takes the filters one after the other, or the dense
            convolution with their kernel where that is expected to take less time (:func:`separable_conv`).

    Shape:
        - input: (N, C, H, W) or (C, H, W); output (N, O, H', W') or (O, H', W'), as of :class:`torch.nn.Conv2d`.

    Raises:
        ValueError: as :class:`torch.nn.Conv2d`; a rank of 0 or above the full one; an unknown format or order. Wrong
            channels or dimensions of the input raise one that is a RuntimeError too, as that layer's.
        TypeError: input that is no floating-point tensor; a complex ``dtype``.

    A rank that costs more weights than the dense layer warns, naming the break-even.

    Source: arXiv 2304.04964 (one-way filters before training); arXiv 1405.3866, scheme 2 ("seq"); arXiv 1412.6553
    ("cp"); the variance-preserving start is ours.

    Example:
        >>> layer = SeparableConv2d(64, 64, 5, padding=2, rank=32)
        >>> layer(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 64, 32, 32])
        >>> round(sum(p.numel() for p in layer.parameters()) / (64 * 64 * 25 + 64), 2)
        0.2
    """

    _dense_class, _dims = nn.Conv2d, 2


class SeparableConv3d(_SeparableConv):
    """A convolution over three axes by one-way filters, as in :class:`SeparableConv2d`.

    Reads as :class:`torch.nn.Conv3d`. ``seq`` is a chain of three filters and has two ranks,
    W[o, c, h, i, j] = sum_rs H[o, s, j] V[s, r, i] D[r, c, h]: ``rank`` is one number for both (each at most its full
    rank), a fraction or a pair. ``order`` is a permutation of "dvh".

    Shape:
        - input: (N, C, D, H, W) or (C, D, H, W); output (N, O, D', H', W') or (O, D', H', W').

    Raises:
        ValueError, TypeError: as :class:`SeparableConv2d`.

    Source: arXiv 2304.04964 (one-way filters of 3-way kernels).

    Example:
        >>> layer = SeparableConv3d(8, 8, 3, padding=1, rank=(6, 6))
        >>> layer(torch.randn(2, 8, 5, 6, 7)).shape
        torch.Size([2, 8, 5, 6, 7])
    """

    _dense_class, _dims = nn.Conv3d, 3


class SeparableConvTranspose2d(_SeparableConv):
    """A transposed convolution by one-way filters: the transpose of :class:`SeparableConv2d`, with all its formats.

    Reads as :class:`torch.nn.ConvTranspose2d`, and equals it with the kernel :meth:`equivalent_weight`, (C, O / groups,
    k_v, k_h). The filters are those of the convolution from O to C channels that is transposed, and so is the rank;
    ``order`` names the first filter of that one.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: as in :class:`torch.nn.ConvTranspose2d`.
        rank, format, order, recompute, backend: as in :class:`SeparableConv2d`.

    Shape:
        - input: (N, C, H, W) or (C, H, W); output (N, O, H', W') or (O, H', W').

    Raises:
        ValueError, TypeError: as :class:`torch.nn.ConvTranspose2d` and :class:`SeparableConv2d`.

    With the "seq" of the convolution that is transposed, W[c, o, i, j] = sum_r H[c, r, j] V[r, o, i].

    Source: arXiv 2304.04964, transposed.

    Example:
        >>> layer = SeparableConvTranspose2d(16, 8, 4, stride=2, padding=1, rank=6)
        >>> layer(torch.randn(2, 16, 10, 12)).shape
        torch.Size([2, 8, 20, 24])
    """

    _dense_class, _dims = nn.ConvTranspose2d, 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank = None,
        format: str = "seq",
        order: str | None = None,
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        geometry: tuple[Any, ...] = (stride, padding, output_padding, groups, False, dilation, padding_mode, "meta")
        dense = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, *geometry)
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation
        self.output_padding = dense.output_padding
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, dense.kernel_size
        self.groups, self.padding_mode = groups, padding_mode
        self._configure(rank, format, order, recompute, backend, dtype)
        self._build(bias, device=device, dtype=dtype)

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As of :class:`torch.nn.ConvTranspose2d`, ``output_size`` included."""
        more = self.output_padding
        if output_size is not None:
            own: Any = nn.ConvTranspose2d._output_padding
            more = own(self, input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        if self.format == "kernelwise":
            factors, axes = [self.equivalent_weight()], [(0, 1)]
        else:
            factors, axes = self.factors, [a for _, a in self._stages]  # type: ignore[misc]
        return separable_conv_transpose(
            input,
            factors,
            self.bias,
            self.stride,
            self.padding,
            tuple(more),
            self.dilation,
            out_channels=self.out_channels,
            axes=axes,
            method=self._method,
            recompute=self.recompute,
            backend=self.backend,
        )

    def _output_size(self, size: Sequence[int]) -> list[int]:
        geometry = zip(
            size, self.padding, self.output_padding, self.dilation, self.kernel_size, self.stride, strict=True
        )
        return [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, p, o, d, k, s in geometry]

    def _dense_macs(self, *size: int) -> int:
        return self._dense_count * math.prod(size)

    def macs(self, *size: int) -> int:
        """As of :class:`SeparableConv2d`; each filter meets each point that it reads once."""
        if self.format == "kernelwise":
            return self._dense_macs(*size)
        current, total, ends = list(size), 0, self._output_size(size)
        for factor, (_, own) in zip(reversed(self.factors), reversed(self._stages), strict=True):
            total += factor.numel() * math.prod(current)
            current = [ends[a] if a in own else n for a, n in enumerate(current)]
        return min(total, self._dense_macs(*size))


class _LazySeparableConv(nn.modules.lazy.LazyModuleMixin, _SeparableConv):
    """A separable convolution that takes ``in_channels`` from its first input; see :class:`SeparableConv2d`."""

    def __init__(self, out_channels: int, kernel_size: int | tuple[int, ...], *args: Any, **options: Any) -> None:
        # One channel a group stands in until the first call; the filters are not allocated before it.
        groups = options.get("groups", args[3] if len(args) > 3 else 1)
        super().__init__(groups if isinstance(groups, int) else 1, out_channels, kernel_size, *args, **options)
        self.in_channels = 0

    def _build(self, bias: bool, **factory: Any) -> None:
        for name, _ in self._stages:
            setattr(self, name, UninitializedParameter(**factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(self.out_channels, **factory)) if bias else None)
        self.rank = 0

    def reset_parameters(self) -> None:
        if self.in_channels:
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor) -> None:
        """Make the filters for the channels of ``input``."""
        if self.in_channels:
            return
        if input.ndim not in (self._dims + 1, self._dims + 2):
            raise RuntimeError(
                f"Expected {self._dims + 1}D (unbatched) or {self._dims + 2}D (batched) input, got {tuple(input.shape)}"
            )
        channels = input.shape[-self._dims - 1]
        if not channels or channels % self.groups:
            raise ValueError(f"in_channels must be divisible by groups ({self.groups}), got input with {channels}")
        self.in_channels = channels
        self.rank = self._resolve(self._asked)
        if not self.has_uninitialized_params():  # loaded before the first call
            return
        for name, shape in self._shapes(self.rank).items():
            getattr(self, name).materialize(shape)
        self._warn()
        self.reset_parameters()

    def extra_repr(self) -> str:
        if not self.has_uninitialized_params():
            return super().extra_repr()
        return f"{self.out_channels}, kernel_size={self.kernel_size}, format={self.format!r}, rank={self._asked}"


class LazySeparableConv1d(_LazySeparableConv, SeparableConv1d):
    """:class:`SeparableConv1d` that takes ``in_channels`` from its first input, as :class:`torch.nn.LazyConv1d`."""

    cls_to_become = SeparableConv1d


class LazySeparableConv2d(_LazySeparableConv, SeparableConv2d):
    """:class:`SeparableConv2d` that takes ``in_channels`` from its first input, as :class:`torch.nn.LazyConv2d`."""

    cls_to_become = SeparableConv2d


class LazySeparableConv3d(_LazySeparableConv, SeparableConv3d):
    """:class:`SeparableConv3d` that takes ``in_channels`` from its first input, as :class:`torch.nn.LazyConv3d`."""

    cls_to_become = SeparableConv3d
