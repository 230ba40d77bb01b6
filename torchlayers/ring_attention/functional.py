"""The family's functions. Arguments are checked here, once, and the block is picked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .. import _backend
from .._attention import autocast, check_dropout, check_scale, merge_attention, seed_tensor
from .._backend import use_triton
from .._checks import check_choice
from .._ring import CHECKS, group_name, place, refuse
from .._sequence import SequenceLayout
from .arguments import check_layouts, check_masking, check_tensors, pick_block
from .ring import SCHEDULES, ring
from .rsa import linformer_attention, ring_self_attention
from .ulysses import ulysses_attention, usp_attention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .._ring import Group, LoopbackMesh

__all__ = [
    "linformer_attention",
    "merge_attention",
    "ring_attention",
    "ring_self_attention",
    "ulysses_attention",
    "usp_attention",
]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    kv_layout: SequenceLayout | None = None,
    group: Group | None = None,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    schedule: str = "ring",
    attn_mask: None = None,
    return_lse: bool = False,
    backend: str | None = None,
    check: str = "first",
) -> Tensor | tuple[Tensor, Tensor]:
    """``scaled_dot_product_attention`` over a sequence that is sharded over ranks: each keeps its queries, and keys
    and values travel round the ring::

        S[i,j] = scale · Σ_c q[i,c] k[j,c]      P[i,·] = softmax of S[i,·] over the keys, of all ranks, that i sees
        out[i,c] = Σ_j P[i,j] v[j,c]            lse[i] = log Σ_j exp S[i,j]

    i and j are positions in the whole sequence. The softmax is kept as a running state in float32 (float64 for
    float64), so that the error does not grow with the number of ranks. The next keys and values are under way while
    those in hand are computed on; memory is O(length), and backward keeps q, k, v, out and lse of the own shard.
    Every rank sends (P-1)·M forward and (P-1)·(M + M₃₂) backward: M the bytes of a rank's k and v with their Hkv
    heads, M₃₂ those in float32. With a window or documents and contiguous layouts fewer hops are enough. A query that
    sees no key has out = 0, lse = -inf and zero gradients.

    Every rank of the group calls this, in the same order, forward and backward. On one rank without a group it is
    ``scaled_dot_product_attention`` itself wherever that has what is asked. It compiles with ``fullgraph=True``, once
    for each layout and set of borders. Activation checkpointing sends keys and values once more; a selective one that
    saves ``torch.ops.torchlayers.ring_attention_forward`` does not.

    Args:
        q: this rank's queries, (B, Hq, layout.length(rank), d), with positions ``layout.positions(rank)``.
        k, v: (B, Hkv, n, d) and (B, Hkv, n, dv), with n and positions of ``kv_layout``.
        layout: which rank holds which tokens. Causal: "zigzag" or "striped"; full or with a window: "contiguous".
        kv_layout: for cross-attention, where keys and values are; by default ``layout``.
        group: a process group, or a group of a :class:`LoopbackWorld`.
        mesh: in place of a group a mesh, of one dimension or with one called "sp".
        is_causal: query i sees the keys j ≤ i.
        window_size: with ``is_causal`` an int w: i - w < j ≤ i. A pair (left, right) in any case:
            i - left ≤ j ≤ i + right, -1 for unlimited; with ``is_causal`` right is 0.
        cu_seqlens: borders of packed documents over the whole sequence, 0 first: tokens see their own document. By
            default the layout's.
        dropout_p: probability with which an entry of P is dropped after the softmax; the others are divided by
            1 - dropout_p. A function has no training mode: pass 0 for inference.
        dropout_seed: an int, or an int64 tensor of one element. What is dropped is a function of the seed, the batch
            entry, the head and the positions of i and j alone: the same for any number of ranks and any layout, where
            all ranks give one seed. None draws one on each rank from torch's generator.
        scale: d^-1/2 by default.
        enable_gqa: Hq may be a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        schedule: "ring", or "allgather": all keys and values are gathered at once, with O(seq_len) memory, and their
            gradients reduced and scattered; as many bytes, one block, nothing overlaps.
        attn_mask: refused, see below.
        return_lse: also return the log-sum-exp, a natural logarithm. It is differentiable.
        backend: see :func:`torchlayers.backend`; besides, "flash" and "cudnn" take torch's own attention kernels for
            each hop, without windows, documents and dropout, and merge their rounded outputs.
        check: whether ranks compare their arguments before the "first" call of the group, "always" or "never". If
            these differ, or one rank refuses its own, all ranks raise and nothing was sent.

    Returns:
        out (B, Hq, length, dv) in the dtype of ``q`` (under autocast, in autocast's), and with ``return_lse`` a pair
        with lse (B, Hq, length), float32, or float64 for float64.

    Raises:
        TypeError: dtypes that differ or are not floating; arguments of another type.
        ValueError: lengths that are not the layout's, heads that do not fit, a layout of another number of ranks than
            the group, dropout_p outside [0, 1), an int window without ``is_causal``, a window with a zigzag layout,
            causal, window or documents between sequences of two lengths, borders that are not the layout's, ranks
            that do not make the same call.
        NotImplementedError: an ``attn_mask``, a call under ``vmap``.
        BackendError: a backend that was asked for and does not support the call.

    Source: arXiv 2105.13120 (sequence parallelism), 2310.01889 (one pass with a running softmax), 2311.09431 (stripes).

    Example:

        >>> import torch
        >>> from torchlayers import LoopbackWorld, SequenceLayout
        >>> from torchlayers.functional import ring_attention
        >>> q, k, v = torch.randn(3, 1, 4, 64, 32)
        >>> layout = SequenceLayout(64, world=4, kind="zigzag")
        >>> def attend(rank, group):
        ...     shards = (layout.shard(x, 2, rank) for x in (q, k, v))
        ...     return ring_attention(*shards, layout=layout, group=group, is_causal=True)
        >>> out = layout.unshard(LoopbackWorld(4).run(attend), 2)
        >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.testing.assert_close(out, expected)
    """
    try:
        check_choice("check", check, CHECKS)
        check_choice("schedule", schedule, SCHEDULES)
        check_layouts(layout, kv_layout)
        name = group_name(group, mesh, layout.world, "sp")
        rank, _ = place(name)
        check_tensors(q, k, v, layout, kv_layout, rank, enable_gqa)
        window, documents = check_masking(layout, kv_layout, is_causal, window_size, cu_seqlens, attn_mask)
        dropout_p = check_dropout("dropout_p", dropout_p)
        q, k, v = autocast(q, k, v)
        real_scale = check_scale(scale, q.shape[3])
        seed = seed_tensor("dropout_seed", dropout_seed, q.device) if dropout_p > 0.0 else None
        asked = _backend._current if backend is None else backend
        one_rank = name is None and not return_lse and not documents and dropout_p == 0.0
        if one_rank and window in ((-1, -1), (-1, 0)) and asked in ("auto", "torch"):
            use_triton("ring_block_forward", q, "torch")
            return F.scaled_dot_product_attention(q, k, v, is_causal=window[1] == 0, scale=scale, enable_gqa=enable_gqa)
        block = pick_block(q, k, v, window, documents, dropout_p, backend)
    except (TypeError, ValueError, NotImplementedError) as error:
        refuse(error, group, mesh, "sp", check)
    out, lse = ring(
        q, k, v, group=name, layout=layout, kv_layout=kv_layout, window=window, documents=documents,
        scale=real_scale, dropout_p=dropout_p, seed=seed, schedule=schedule, block=block, check=check,
    )  # fmt: skip
    return (out, lse) if return_lse else out
