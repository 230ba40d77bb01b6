"""Low-rank layers whose ranks are ordered: a prefix of the factors is a layer of its own.

:class:`LowRankLayer` is what they share: the factors, the rank in force, its importance, truncation and the way back to
a dense layer. Each kind adds its call, how its dense weight reads as a matrix, and its conversion from ``torch.nn``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .._backend import BACKENDS
from .._checks import check_choice, check_dtype, check_int, check_ints, check_ndim, check_size
from . import reference
from .functional import low_rank_conv, low_rank_embedding, low_rank_linear

__all__ = ["LowRankConv1d", "LowRankConv2d", "LowRankConv3d", "LowRankEmbedding", "LowRankLayer", "LowRankLinear"]

Device = torch.device | str | None
Rank = int | Tensor | None
ConvT = TypeVar("ConvT", bound="_LowRankConv")


class LowRankLayer(nn.Module):
    """What the low-rank layers share: a dense map W = U V, of which the first ``rank`` terms are in force.

    Attributes:
        weight_in: V, (max_rank, in).
        weight_out: U, (out, max_rank).
        bias: (out,) or None.
        rank: how many terms are in force, an int from 0 to ``max_rank``. The state dict holds it as ``rank``, int64
            (1,); :meth:`truncate_` and loading a state dict change it.
        max_rank: how many terms the factors hold.

    A call runs at the rank that it is given, else at the one that ``sampled_ranks`` has set for the moment, else at
    ``rank``. None of these is read from a GPU, and in a graph made by ``torch.compile`` a rank is an input: one graph
    serves all ranks in training, and one more a truncated layer in evaluation.
    """

    weight_in: nn.Parameter
    weight_out: nn.Parameter
    bias: nn.Parameter | None

    def _build(self, rows: int, columns: int, max_rank: int | None, bias: bool, **factory: Any) -> None:
        """Make the parameters of g matrices (rows / g, columns / g) and fill them."""
        full_rank = min(rows, columns) // self._groups
        r = full_rank if max_rank is None else check_int("max_rank", max_rank)
        if r > full_rank:
            raise ValueError(f"max_rank must be at most {full_rank}, where every dense map is within reach, got {r}")
        if factory["dtype"] is not None and not factory["dtype"].is_floating_point:
            raise TypeError(f"dtype must be a real floating-point dtype, got {factory['dtype']}")
        self.weight_in = nn.Parameter(torch.empty(r, columns, **factory))
        self.weight_out = nn.Parameter(torch.empty(rows, r, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(rows, **factory)) if bias else None)
        # Not by register_buffer: the name is that of the property, which gives the int without asking a GPU.
        self._buffers["rank"] = torch.empty(1, dtype=torch.int64, device=self.weight_in.device)
        self.reset_parameters()

    # The rank in force

    @property
    def max_rank(self) -> int:
        """How many terms the factors hold."""
        return self.weight_in.shape[0]

    @property
    def rank(self) -> int:
        """How many terms are in force."""
        if not torch.compiler.is_compiling():
            # Whoever writes into the buffer itself (torch.distributed.checkpoint, DDP) is noticed here; a call to the
            # layer does not look, since reading the buffer waits for the GPU.
            buffer = self._rank_buffer
            if not buffer.is_meta and _version(buffer) != self._rank_version:
                self._take_rank(int(buffer))
        return self._rank

    def state_written(self) -> None:
        """To be called after the state was written in place, other than by ``load_state_dict``: the rank may have
        changed. The trainer does so when it resumes."""
        self._take_rank(self.rank)

    @property
    def _rank_buffer(self) -> Tensor:
        buffer = self._buffers["rank"]
        assert buffer is not None
        return buffer

    def _set_rank(self, rank: int) -> None:
        with torch.no_grad():
            self._rank_buffer.fill_(rank)
        self._take_rank(rank)

    def _take_rank(self, rank: int) -> None:
        changed = rank != self.__dict__.get("_rank")
        self._rank = rank
        self._rank_version = _version(self._rank_buffer)
        self._truncated = rank < self.max_rank
        if changed:  # DDP writes buffers at each forward, also while a rank is sampled
            self._sampled = None

    @property
    def _sampled(self) -> Rank:
        """The rank of calls that name none, for the moment: an int, a tensor with one a sample, None for ``rank``."""
        return self._sample

    @_sampled.setter
    def _sampled(self, rank: Rank) -> None:
        if rank is not None and not isinstance(rank, Tensor):
            self._check_rank(rank)
        self._sample = rank
        self._pinned = rank is not None
        self._sample_per_row = rank if isinstance(rank, Tensor) else None
        if not isinstance(rank, Tensor):
            # What a compiled graph reads, a new tensor each time: a graph may have kept the last one for its backward.
            with torch.inference_mode(False):
                self._rank_input = torch.tensor([self._rank if rank is None else rank], device="cpu")

    def _check_rank(self, rank: object) -> None:
        check_int("rank", rank, minimum=0)
        if rank > self._rank:  # type: ignore[operator]
            raise ValueError(f"rank must be at most {self._rank}, the layer's, got {rank}")

    def _rank_of_call(self, rank: Rank) -> Rank:
        traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if rank is not None:
            # A traced rank is held against max_rank alone: the rank in force would become part of the graph. Columns
            # between the two are zero.
            if not isinstance(rank, Tensor) and not traced:
                self._check_rank(rank)
            return rank
        if self._sample_per_row is not None:
            return self._sample_per_row
        if traced:
            return self._rank_input if self.training or self._truncated or self._pinned else None
        return self._rank if self._sample is None else self._sample

    # The dense map

    def _matrix_of(self, dense: Tensor) -> Tensor:
        """The dense weight of the ``torch.nn`` layer as (groups, out / groups, in / groups)."""
        raise NotImplementedError

    def _dense_of(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`_matrix_of`."""
        raise NotImplementedError

    def _init_dense(self, dense: Tensor) -> None:
        """Fill ``dense`` as the ``torch.nn`` layer fills its weight, and the bias likewise."""
        raise NotImplementedError

    @property
    def _groups(self) -> int:
        return 1

    def dense_weight(self, rank: int | None = None) -> Tensor:
        """The weight of the dense layer with the same map at ``rank`` (by default at the one in force); differentiable.

        The product is computed in float32 at least.
        """
        if rank is not None:
            self._check_rank(rank)
        elif isinstance(self._sample, Tensor):
            raise ValueError("rank must be given where each sample has a rank of its own, got None")
        else:
            rank = self._rank if self._sample is None else self._sample
        b, g = rank, self._groups
        dtype = torch.promote_types(self.weight_in.dtype, torch.float32)
        left = _full(self.weight_out)[:, :b].to(dtype).unflatten(0, (g, self.weight_out.shape[0] // g))
        right = _full(self.weight_in)[:b].to(dtype).unflatten(1, (g, self.weight_in.shape[1] // g)).transpose(0, 1)
        return self._dense_of(left @ right).to(self.weight_in.dtype)

    @property
    def weight(self) -> Tensor:
        """:meth:`dense_weight`, for code that reads the weight of a layer that it takes for a dense one.

        ``nn.TransformerEncoderLayer`` does, in evaluation. Writing into it changes nothing.
        """
        return self.dense_weight()

    @torch.no_grad()
    def load_dense_(self, weight: Tensor, gram: Tensor | None = None) -> LowRankLayer:
        """Set the factors to the balanced factorisation of a dense weight, cut at the rank in force.

        Args:
            weight: the weight of the dense layer, in its shape.
            gram: E[x xᵀ] of the inputs, up to a factor, for the factorisation whose *outputs* are best at every rank
                (reduced-rank regression), (in, in) or its diagonal (in,); of a convolution with g groups also
                (g, in / g, in / g). The inputs of a convolution are its patches in the order of
                ``torch.nn.functional.unfold``, those of an embedding one-hot, so that the diagonal counts entries.

        Raises:
            ValueError: shapes that do not fit, entries that are not finite.
            TypeError: no real tensors.
        """
        check_ndim("weight", weight, (2, 3, 4, 5), "in the dense layer's shape")
        check_dtype("weight", weight, kind="real")
        if not bool(weight.isfinite().all()):
            raise ValueError("weight must be finite to be decomposed, got NaN or infinite entries")
        matrices = self._matrix_of(weight)
        g, (rows, columns) = self._groups, (self.weight_out.shape[0], self.weight_in.shape[1])
        if tuple(matrices.shape) != (g, rows // g, columns // g):
            raise ValueError(f"weight must have the dense layer's shape, got {tuple(weight.shape)}")
        grams = _gram_blocks(gram, g, columns)
        factors = [reference.balanced_factors(m, self.max_rank, c) for m, c in zip(matrices, grams, strict=True)]
        weight_in = torch.cat([v for v, _ in factors], dim=1)
        weight_out = torch.cat([u for _, u in factors])
        weight_in[self._rank :], weight_out[:, self._rank :] = 0, 0
        _assign(self.weight_in, weight_in)
        _assign(self.weight_out, weight_out)
        return self

    def reset_parameters(self) -> None:
        """Draw the weight that the ``torch.nn`` layer would draw, and factorise it; all terms come into force."""
        self._set_rank(self.max_rank)
        g, w = self._groups, self.weight_in
        matrix = torch.empty(g, self.weight_out.shape[0] // g, w.shape[1] // g, device=w.device, dtype=w.dtype)
        dense = self._dense_of(matrix).contiguous()
        if not dense.is_meta:
            self._init_dense(dense)
            self.load_dense_(dense)

    def _dense_module(self, **factory: Any) -> nn.Module:
        """The ``torch.nn`` layer of the same arguments, uninitialised."""
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The ``torch.nn`` layer that computes the same at the rank in force, with parameters of its own."""
        weight = self.dense_weight()
        dense: Any = self._dense_module(device="meta", dtype=weight.dtype).to_empty(device=weight.device)
        dense.weight.copy_(weight)
        dense.weight.requires_grad_(self.weight_in.requires_grad or self.weight_out.requires_grad)
        if self.bias is not None:
            dense.bias.copy_(_full(self.bias))
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    # Order and truncation

    @torch.no_grad()
    def importance(self, hierarchical: bool = True) -> Tensor:
        """What each term in force is worth: ‖U[:, b:]‖ ‖V[b:]‖ over the terms b, b + 1, ... in force.

        Args:
            hierarchical: False takes the terms one by one, ‖u_b‖ ‖v_b‖.

        Returns:
            (rank,), float64, on the parameters' device; with ``hierarchical`` it never increases.

        Source: arXiv 2308.14929, section 3.2, as its released code has it.
        """
        b = self.rank
        return reference.importance(_full(self.weight_in)[:b], _full(self.weight_out)[:, :b], hierarchical)

    @torch.no_grad()
    def truncate_(self, rank: int, *, physical: bool = False) -> LowRankLayer:
        """Keep the first ``rank`` terms for good.

        Logically: the others become zero and stay allocated, so that optimizers and wrappers go on as they are.
        Physically: the factors are cut and become new parameters, of which an optimizer must be told; it also cuts what
        was truncated logically before.

        Args:
            rank: from 0 to the rank in force.
            physical: cut the parameters.

        Raises:
            ValueError: the rank is outside that range, or the parameters are sharded and to be cut.
        """
        b = self.rank
        if check_int("rank", rank, minimum=0) > b:
            raise ValueError(f"rank must be at most {b}, the layer's, got {rank}")
        if physical:
            if _is_sharded(self.weight_in):
                raise ValueError("physical must be False where parameters are sharded: cut the model, then shard it")
            self.weight_in = nn.Parameter(self.weight_in[:rank].clone(), self.weight_in.requires_grad)
            self.weight_out = nn.Parameter(self.weight_out[:, :rank].clone(), self.weight_out.requires_grad)
        elif rank < self.max_rank:
            dead = torch.arange(self.max_rank, device=self.weight_in.device) >= rank
            _zero_where(self.weight_in, dead[:, None])
            _zero_where(self.weight_out, dead)
        self._set_rank(rank)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        saved = state_dict.get(prefix + "rank")
        if not isinstance(saved, Tensor) or saved.is_meta:
            return
        factor = state_dict.get(prefix + "weight_in")
        if isinstance(factor, Tensor) and factor.ndim == 2 and factor.shape[0] < self.max_rank:
            cut = factor.shape[0]
            errors.append(
                f"{prefix}weight_in was cut to rank {cut}: {tuple(factor.shape)} in the checkpoint, in this model "
                f"{tuple(self.weight_in.shape)}, which truncate_({cut}, physical=True) cuts likewise"
            )
        elif saved.numel() != 1 or not 0 <= int(saved) <= self.max_rank:
            errors.append(f"{prefix}rank must be from 0 to {self.max_rank}, got {saved.tolist()} in the checkpoint")
        if len(errors) > before:
            self._set_rank(self._rank)
        else:
            self._take_rank(int(saved))

    def extra_repr(self) -> str:
        return f"rank={self._rank}, max_rank={self.max_rank}"


class LowRankLinear(LowRankLayer):
    r"""A linear map through a bottleneck of ordered ranks, whose prefixes are maps of their own::

        y = (x V_bᵀ) U_bᵀ + bias            V_b = weight_in[:b], U_b = weight_out[:, :b]

    Reads as :class:`torch.nn.Linear`, and starts as one: a weight drawn as that layer draws it, decomposed as
    P S Qᵀ into U = P √S and V = √S Qᵀ. It has r (in + out) parameters beside the bias, and costs b (in + out)
    multiplications a row.

    Args:
        in_features, out_features: channels of input and output.
        bias: add a learned bias.
        device, dtype: of the parameters.
        max_rank: r, by default min(in_features, out_features), where every linear map is within reach.
        backend: see :func:`torchlayers.backend`.

    Shape: x (..., in_features) -> (..., out_features). ``layer(x, rank=b)`` runs the prefix b, an int from 0 (the bias
    alone) to ``layer.rank``, or a tensor of ints with one for each sample, (x.shape[0],).

    Attributes:
        weight_in, weight_out, bias: (r, in_features), (out_features, r), (out_features,) or None.
        rank, max_rank: the terms in force and those that the factors hold.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call.

    Source: arXiv 2308.14929, section 3.

    Example:

        >>> layer = LowRankLinear.from_linear(nn.Linear(64, 32))
        >>> x = torch.randn(5, 64)
        >>> layer(x).shape, layer(x, rank=4).shape
        (torch.Size([5, 32]), torch.Size([5, 32]))
        >>> layer.truncate_(8)
        LowRankLinear(in_features=64, out_features=32, bias=True, rank=8, max_rank=32)
        >>> layer.to_dense()
        Linear(in_features=64, out_features=32, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        max_rank: int | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self.in_features = check_int("in_features", in_features)
        self.out_features = check_int("out_features", out_features)
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        self.backend = backend
        self._build(out_features, in_features, max_rank, bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, max_rank: int | None = None, *, gram: Tensor | None = None
    ) -> LowRankLinear:
        """The layer that computes what ``linear`` does, or with a lower ``max_rank`` its best approximation.

        Args:
            linear: left as it is.
            max_rank: min(in, out) by default.
            gram: E[x xᵀ] of the inputs, see :meth:`load_dense_`.

        Raises:
            TypeError: ``linear`` is no :class:`torch.nn.Linear`, or complex.
            ValueError: its weight is parametrised, uninitialised or not finite, or ``max_rank`` does not fit.
        """
        _check_source("linear", linear, nn.Linear)
        return _converted(
            cls, linear, gram, linear.in_features, linear.out_features, linear.bias is not None, max_rank=max_rank
        )

    def forward(self, x: Tensor, rank: Rank = None) -> Tensor:
        """The map at ``rank``, or at the rank in force."""
        rank = self._rank_of_call(rank)
        return low_rank_linear(x, self.weight_in, self.weight_out, self.bias, rank, backend=self.backend)

    def _matrix_of(self, dense: Tensor) -> Tensor:
        return dense[None]

    def _dense_of(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0)

    def _init_dense(self, dense: Tensor) -> None:
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        _init_bias(self.bias, self.in_features)

    def _dense_module(self, **factory: Any) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **factory)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {super().extra_repr()}"


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
        _check_source("conv", conv, cls._dense_class)
        c: Any = conv
        arguments = (c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups)
        return _converted(cls, c, gram, *arguments, c.bias is not None, c.padding_mode, max_rank=max_rank)

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
        _init_bias(self.bias, dense[0].numel())

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


class LowRankEmbedding(LowRankLayer):
    r"""An embedding table of ordered ranks, whose prefixes are tables of their own::

        y = V_b[:, index]ᵀ U_bᵀ            V_b = weight_in[:b], U_b = weight_out[:, :b]

    Reads as :class:`torch.nn.Embedding`, and starts as one: a table drawn as that layer draws it, decomposed as
    P S Qᵀ into U = P √S and V = √S Qᵀ. It has r (num_embeddings + embedding_dim) parameters.

    Args:
        num_embeddings, embedding_dim: entries and channels of the table.
        padding_idx: an entry that starts at zero and whose own part gets no gradient, so that it stays zero.
        max_norm, norm_type, scale_grad_by_freq, sparse: must be left alone: entries share ``weight_out``, so that none
            can be renormalised, scaled or updated by itself; here for the signature's sake.
        device, dtype: of the parameters.
        max_rank: r, by default min(num_embeddings, embedding_dim).

    Shape: index, ints (...) -> (..., embedding_dim). ``layer(index, rank=b)`` runs the prefix b, an int from 0 (zeros)
    to ``layer.rank``, or a tensor of ints with one for each sample, (index.shape[0],).

    Attributes:
        weight_in, weight_out: (r, num_embeddings), (embedding_dim, r).
        rank, max_rank: the terms in force and those that the factors hold.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call. An index outside the table is torch's
            IndexError, and on a GPU its assertion.

    Source: arXiv 2308.14929, section 3, whose ordered factorisation it applies to the table.

    Example:

        >>> layer = LowRankEmbedding(1000, 64, max_rank=16)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    bias: None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        max_rank: int | None = None,
    ):
        super().__init__()
        self.num_embeddings = check_int("num_embeddings", num_embeddings)
        self.embedding_dim = check_int("embedding_dim", embedding_dim)
        if padding_idx is not None:
            check_int("padding_idx", padding_idx, minimum=-num_embeddings)
            if padding_idx >= num_embeddings:
                raise ValueError(f"padding_idx must be below num_embeddings = {num_embeddings}, got {padding_idx}")
            padding_idx %= num_embeddings
        self.padding_idx = padding_idx
        for name, value, left in (
            ("max_norm", max_norm, None),
            ("scale_grad_by_freq", scale_grad_by_freq, False),
            ("sparse", sparse, False),
        ):
            if value:
                raise ValueError(f"{name} must be {left}, since the entries share weight_out, got {value!r}")
        self._build(embedding_dim, num_embeddings, max_rank, False, device=device, dtype=dtype)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, max_rank: int | None = None, *, gram: Tensor | None = None
    ) -> LowRankEmbedding:
        """The layer that computes what ``embedding`` does, or with a lower ``max_rank`` its best approximation.

        Args:
            embedding: left as it is.
            max_rank: min(num_embeddings, embedding_dim) by default.
            gram: how often each entry occurs, (num_embeddings,), so that frequent ones are kept best.

        Raises:
            TypeError: ``embedding`` is no :class:`torch.nn.Embedding`, or complex.
            ValueError: its weight is parametrised or not finite, ``max_rank`` does not fit, or it renormalises, scales
                by frequency or has sparse gradients.
        """
        _check_source("embedding", embedding, nn.Embedding)
        e = embedding
        arguments = (e.num_embeddings, e.embedding_dim, e.padding_idx)
        options = (e.max_norm, e.norm_type, e.scale_grad_by_freq, e.sparse)
        return _converted(cls, e, gram, *arguments, *options, max_rank=max_rank)

    def forward(self, index: Tensor, rank: Rank = None) -> Tensor:
        """The rows of the table at ``rank``, or at the rank in force."""
        return low_rank_embedding(index, self.weight_in, self.weight_out, self._rank_of_call(rank), self.padding_idx)

    def _matrix_of(self, dense: Tensor) -> Tensor:
        return dense.t()[None]

    def _dense_of(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0).t()

    def _init_dense(self, dense: Tensor) -> None:
        nn.init.normal_(dense)
        if self.padding_idx is not None:
            with torch.no_grad():
                dense[self.padding_idx].zero_()

    @torch.no_grad()
    def load_dense_(self, weight: Tensor, gram: Tensor | None = None) -> LowRankLayer:
        super().load_dense_(weight, gram)
        if self.padding_idx is not None and not bool(weight[self.padding_idx].any()):
            # The decomposition leaves a rounding error where the padding entry must give zeros.
            at_padding = torch.arange(self.num_embeddings, device=self.weight_in.device) == self.padding_idx
            _zero_where(self.weight_in, at_padding)
        return self

    def _dense_module(self, **factory: Any) -> nn.Module:
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, **factory)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{super().extra_repr()}"


# Small things


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _full(tensor: Tensor) -> Tensor:
    """A sharded tensor (a DTensor) from all its shards; a plain one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _assign(parameter: Tensor, value: Tensor) -> None:
    value = value.to(parameter.dtype)
    if _is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)


def _zero_where(parameter: Tensor, mask: Tensor) -> None:
    if _is_sharded(parameter):
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        mask = distribute_tensor(mask.expand(parameter.shape).contiguous(), mesh, [Replicate()] * mesh.ndim)
    parameter.masked_fill_(mask, 0)


def _init_bias(bias: Tensor | None, fan_in: int) -> None:
    if bias is not None:
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(bias, -bound, bound)


def _gram_blocks(gram: Tensor | None, groups: int, columns: int) -> Sequence[Tensor | None]:
    """The Gram matrix, or its diagonal, of each group's inputs."""
    if gram is None:
        return [None] * groups
    check_ndim("gram", gram, (1, 2, 3), "(in, in), (in,) or (groups, in / groups, in / groups)")
    check_dtype("gram", gram, kind="real")
    size = columns // groups
    if tuple(gram.shape) not in {(columns,), (columns, columns), (groups, size, size)}:
        raise ValueError(
            f"gram must have shape {(columns, columns)}, {(columns,)} or {(groups, size, size)}, "
            f"got {tuple(gram.shape)}"
        )
    if not bool(gram.isfinite().all()):
        raise ValueError("gram must be finite, got NaN or infinite entries")
    if gram.ndim == 1:
        return gram.split(size)
    if gram.ndim == 3:
        return gram.unbind()
    return [gram[i : i + size, i : i + size] for i in range(0, columns, size)]


def _check_source(name: str, module: object, kind: type[nn.Module]) -> None:
    if not isinstance(module, kind):
        raise TypeError(f"{name} must be a torch.nn.{kind.__name__}, got {type(module).__name__}")
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        raise ValueError(f"{name} must have a plain weight, got a parametrised one: remove the parametrization first")
    if is_lazy(weight):
        raise ValueError(f"{name} must be initialised, got a lazy module that has not run yet")
    check_dtype(f"{name}.weight", weight, kind="real")


def _converted(cls: Any, module: Any, gram: Tensor | None, *arguments: Any, **options: Any) -> Any:
    """``cls(*arguments, **options)`` with the map of ``module``, on its device, in its dtype and mode."""
    layer = cls(*arguments, **options, device="meta", dtype=module.weight.dtype)
    if module.weight.is_meta:
        return layer.train(module.training)
    layer.to_empty(device=module.weight.device)
    layer._set_rank(layer.max_rank)
    layer.load_dense_(module.weight, gram)
    layer.weight_in.requires_grad_(module.weight.requires_grad)
    layer.weight_out.requires_grad_(module.weight.requires_grad)
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(module.bias)
        layer.bias.requires_grad_(module.bias.requires_grad)
    return layer.train(module.training)
