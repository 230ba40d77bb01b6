"""What low-rank layers of every kind share: factors of ordered ranks, their current rank, a dense weight's way in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .._checks import check_dtype, check_int, check_ndim
from . import reference

Device = torch.device | str | None
Rank = int | Tensor | None


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
            zero_where(self.weight_in, dead[:, None])
            zero_where(self.weight_out, dead)
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


def zero_where(parameter: Tensor, mask: Tensor) -> None:
    if _is_sharded(parameter):
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        mask = distribute_tensor(mask.expand(parameter.shape).contiguous(), mesh, [Replicate()] * mesh.ndim)
    parameter.masked_fill_(mask, 0)


def init_bias(bias: Tensor | None, fan_in: int) -> None:
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


def check_source(name: str, module: object, kind: type[nn.Module]) -> None:
    if not isinstance(module, kind):
        raise TypeError(f"{name} must be a torch.nn.{kind.__name__}, got {type(module).__name__}")
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        raise ValueError(f"{name} must have a plain weight, got a parametrised one: remove the parametrization first")
    if is_lazy(weight):
        raise ValueError(f"{name} must be initialised, got a lazy module that has not run yet")
    check_dtype(f"{name}.weight", weight, kind="real")


def converted(cls: Any, module: Any, gram: Tensor | None, *arguments: Any, **options: Any) -> Any:
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
