"""Attention functions for transformers' registry that know a mask as an interval of positions, not as a tensor.

transformers makes a layer's mask by a function that the attention's name has in its mask registry, from a composition
of small functions of indices. Ours reads that composition and passes on what it says (causal, window, documents); what
it cannot read it refuses, so that no part of a mask is lost.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._checks import require
from ._placement import placement, spoken
from ._ring import place, refuse
from ._sequence import SequenceLayout, document_bounds

__all__ = ["register_attention", "set_attention", "transformers_models"]


class IntervalMask(NamedTuple):
    """What a layer's queries see: all documents' masks are the layout's.

    Attributes:
        is_causal: no later keys.
        window_size: the last w keys where causal, (left, right) otherwise, or None.
    """

    is_causal: bool
    window_size: int | tuple[int, int] | None


Attend = Callable[..., Tensor]


def register_attention(name: str, attend: Attend, *, alone: str | None = None) -> str:
    """Give transformers an attention called ``name``; again is of no effect but for the function.

    Args:
        name: for ``attn_implementation=name`` and ``model.set_attn_implementation(name)``.
        attend: ``attend(q, k, v, layout=, group=, is_causal=, window_size=, dropout_p=, scale=)`` of this rank's shards
            (B, H, c, d), k and v with their own number of heads -> (B, H, c, d).
        alone: transformers' attention that stands in where sequences are whole; None: ``attend``, with layout None.

    Returns:
        ``name``.
    """
    require("transformers", extra="transformers")
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        layout, group = _placement(name)
        if layout is None and alone is not None:
            others |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "sliding_window": sliding_window}
            return AttentionInterface()[alone](module, query, key, value, attention_mask, **others)
        for option in ("softcap", "s_aux", "position_bias", "head_mask"):
            if others.get(option) is not None:
                raise NotImplementedError(f"{name} does not support {option}, which this model uses")
        if key.shape[2] != query.shape[2]:
            raise NotImplementedError(
                f"{name} attends within one sequence, without a cache: {query.shape[2]} queries and {key.shape[2]} keys"
            )
        if attention_mask is None:  # the model makes none
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            attention_mask = IntervalMask(bool(causal), sliding_window)
        elif not isinstance(attention_mask, IntervalMask):
            raise NotImplementedError(
                f"{name} takes no mask tensors, got one of shape {tuple(attention_mask.shape)}: pack sequences"
            )
        if layout is not None:
            _check_positions(others.get("position_ids"), layout, group)
        out = attend(
            query,
            key,
            value,
            layout=layout,
            group=group,
            is_causal=attention_mask.is_causal,
            window_size=attention_mask.window_size,
            dropout_p=dropout,
            scale=scaling,
        )
        return out.transpose(1, 2).contiguous(), None

    def mask(*, mask_function: Callable | None = None, attention_mask: Tensor | None = None, **others: Any) -> Any:
        layout, _ = _placement(name)
        if layout is None and alone is not None:
            given = {} if mask_function is None else {"mask_function": mask_function}
            return AttentionMaskInterface()[alone](attention_mask=attention_mask, **given, **others)
        read = IntervalMask(True, None) if mask_function is None else _read(name, mask_function, layout)
        if attention_mask is not None:
            _check_padding(name, attention_mask, read)
        return read

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def transformers_models(model: nn.Module) -> list[Any]:
    """The transformers models within ``model``, or itself; of those in one another the outermost."""
    transformers = sys.modules.get("transformers")  # without it there is none
    if transformers is None:
        return []
    if isinstance(model, transformers.PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in transformers_models(child)]


def set_attention(model: Any, name: str) -> None:
    """Make a transformers model use the attention called ``name``.

    Raises:
        ValueError: the model, or one within it, does not go through transformers' registry.
    """
    model.set_attn_implementation(name)
    for inner in model.modules():
        used = getattr(getattr(inner, "config", None), "_attn_implementation", name)
        if used != name:
            raise ValueError(
                f"model must take its attention from transformers' registry, got {type(inner).__name__}, which stays "
                f"with {used!r}"
            )


def _placement(name: str) -> tuple[SequenceLayout | None, str | None]:
    if not spoken() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"layout must be in force for the attention {name!r} on more than one process (shard_batch and use_layout "
            "see to that; use_layout(None) where sequences are whole), got none"
        )
    layout, group = placement(None, None)
    # On one rank without documents a layout says nothing.
    return (None, None) if layout is not None and group is None and layout.cu_seqlens is None else (layout, group)


# Reading masks


def _read(name: str, mask_function: Callable, layout: SequenceLayout | None) -> IntervalMask:
    """The composition of transformers' mask functions as an interval."""
    causal, full, window = False, False, None
    for part, free in _parts(mask_function):
        if part == "causal_mask_function":
            causal = True
        elif part == "bidirectional_mask_function":
            full = True
        elif part == "sliding_window_overlay.<locals>.inner_mask":
            window = free["sliding_window"]
        elif part == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
            window = (free["sliding_window"],) * 2
        elif part != "packed_sequence_mask_function.<locals>.inner_mask":
            raise NotImplementedError(f"{name} does not support this model's attention mask, which has {part!r}")
        elif layout is None:  # which would know the documents
            raise NotImplementedError(
                f"{name} knows documents by the layout alone, and position_ids start again: cut the batch by "
                "shard_batch, on one rank too"
            )
    if causal == full:
        raise NotImplementedError(f"{name} does not support this model's attention mask: neither causal nor full")
    return IntervalMask(causal, window)


def _parts(function: Callable) -> Iterator[tuple[str, dict[str, Any]]]:
    part = getattr(function, "__qualname__", repr(function))
    cells = getattr(function, "__closure__", None) or ()
    free = {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, cells, strict=True)} if cells else {}
    if part == "and_masks.<locals>.and_mask":
        for inner in free["mask_functions"]:
            yield from _parts(inner)
    elif part == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        yield from _parts(free["mask_function"])
    else:
        yield part, free


def _check_padding(name: str, mask: Tensor, read: IntervalMask) -> None:
    """Padding on the right is not seen by causal attention; no other is allowed."""
    if torch.compiler.is_compiling() or mask.all():
        return
    if not read.is_causal or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise NotImplementedError(
            f"attention_mask must be 1, or 0 at the end of rows and attention causal, for {name}: pack sequences"
        )


_checked: weakref.ref[Tensor] | None = None


def _check_positions(position_ids: object, layout: SequenceLayout, group: str | None) -> None:
    """Positions are those in the whole sequence, or in its document. Looked at once a forward pass."""
    global _checked
    if torch.compiler.is_compiling() or not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return
    if _checked is not None and _checked() is position_ids:
        return
    positions = layout.positions(place(group)[0], position_ids.device)
    right = position_ids == positions
    if layout.cu_seqlens is not None:
        first, _ = document_bounds(layout.cu_seqlens, position_ids.device)
        right |= position_ids == positions - first[positions]
    if not right.all():
        # Numbers of the model's own making are its affair, but for two: positions of this rank's tokens as if they
        # were the whole sequence, and documents that the layout does not know.
        local = torch.arange(len(positions), device=position_ids.device)
        fault = None
        if (position_ids == local).all():
            fault = "position_ids must be those of shard_batch, got positions in this rank's shard"
        elif (position_ids[:, 1:] <= position_ids[:, :-1]).any():
            fault = "position_ids must start again where the layout's documents do alone, got other documents"
        if fault is not None:  # other ranks may find nothing wrong with theirs
            refuse(ValueError(fault), group, None)
    _checked = weakref.ref(position_ids)
