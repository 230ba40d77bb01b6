"""Checks that the family's functions share, and the choice of the block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .._attention import Window, check_qkv, normalize_window
from .._backend import BackendError, note_dispatch, use_triton
from .._checks import check_choice, check_size
from .._sequence import SequenceLayout, check_cu_seqlens
from .blocks import unsupported

__all__ = ["Masking", "check_layouts", "check_masking", "check_tensors", "pick_block"]

BLOCKS = ("auto", "torch", "triton", "flash", "cudnn")


class Masking(NamedTuple):
    """What :func:`check_masking` made of the arguments: (left, right) and the borders of documents, () for one."""

    window: Window
    documents: tuple[int, ...]


def check_layouts(layout: object, kv_layout: object) -> None:
    """Both are layouts over the same number of ranks; ``kv_layout`` may be None."""
    for name, x in (("layout", layout), ("kv_layout", kv_layout)):
        if not isinstance(x, SequenceLayout) and not (name == "kv_layout" and x is None):
            raise TypeError(f"{name} must be a SequenceLayout, got {type(x).__name__}")
    worlds = {x.world for x in (layout, kv_layout) if isinstance(x, SequenceLayout)}
    if len(worlds) > 1:
        raise ValueError(f"kv_layout must have as many ranks as layout, got worlds {sorted(worlds)}")


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    kv_layout: SequenceLayout | None,
    rank: int,
    enable_gqa: bool,
) -> None:
    """The tensors are this rank's shards."""
    check_qkv({"q": q}, {"k": k}, {"v": v}, enable_gqa)
    check_size("q", q, 2, layout.length(rank), f"length of rank {rank} in the layout")
    kv_length = (layout if kv_layout is None else kv_layout).length(rank)
    for name, x in (("k", k), ("v", v)):
        check_size(name, x, 2, kv_length, f"length of rank {rank} in the layout")


def check_masking(
    layout: SequenceLayout,
    kv_layout: SequenceLayout | None,
    is_causal: bool,
    window_size: int | tuple[int, int] | None,
    cu_seqlens: Sequence[int] | Tensor | None,
    attn_mask: object = None,
) -> Masking:
    """Which keys queries see, from the arguments of :func:`ring_attention`, all of which say something of that."""
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask must be None: keys travel, and a mask over pairs would have to as well. Use ring_self_attention "
            "(attn_bias), cu_seqlens (packed documents), window_size or is_causal"
        )
    if isinstance(window_size, int) and not isinstance(window_size, bool) and not is_causal:
        raise ValueError(
            f"window_size must be a pair (left, right) unless is_causal, since an int is ambiguous, got {window_size}"
        )
    window = normalize_window("window_size", window_size, is_causal)
    keys = layout if kv_layout is None else kv_layout
    given = {"layout": layout.cu_seqlens, "kv_layout": keys.cu_seqlens}
    if cu_seqlens is not None:
        given["cu_seqlens"] = check_cu_seqlens(cu_seqlens, layout.seq_len)
    borders = {name: x for name, x in given.items() if x is not None}
    if len(set(borders.values())) > 1:
        raise ValueError(f"{' and '.join(borders)} must have the same borders of documents, got different ones")
    documents = next(iter(borders.values()), ())
    if keys.seq_len != layout.seq_len:
        for what, here in (("is_causal", is_causal), ("window_size", window != (-1, -1)), ("cu_seqlens", documents)):
            if here:
                raise ValueError(
                    f"{what} must come with queries and keys of one sequence, got lengths {layout.seq_len} and "
                    f"{keys.seq_len}"
                )
    for x in (layout, keys):
        if x.kind == "zigzag" and x.world > 1 and (window[0] >= 0 or window[1] > 0):
            raise ValueError(
                f"window_size must come with a contiguous, striped or documents layout, got {window} with zigzag, "
                "which has what is near on distant ranks"
            )
    return Masking(window, documents)


def pick_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    documents: tuple[int, ...],
    dropout_p: float,
    backend: str | None,
) -> str:
    """The block to run: "torch", "triton", "flash" or "cudnn".

    Raises:
        BackendError: the one that was asked for does not support the call.
    """
    check_choice("backend", backend, (None, *BLOCKS))
    if backend not in ("flash", "cudnn"):
        reason = unsupported("triton", q, k, v, window, bool(documents), dropout_p > 0.0)
        return "triton" if use_triton("ring_block_forward", q, backend, reason) else "torch"
    reason = unsupported(backend, q, k, v, window, bool(documents), dropout_p > 0.0)
    if reason is not None:
        raise BackendError(
            f"backend={backend!r} was asked for, but it does not support {reason}; backend='triton' (on a GPU) and "
            "'torch' do windows, documents, dropout and lse"
        )
    note_dispatch(f"{backend}: ring_attention")
    return backend
