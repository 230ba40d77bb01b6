"""Heads for tokens: attention of some heads over the whole sequence, and the two-dimensional hybrid with the ring.

An all-to-all takes every rank from all heads of its tokens to its heads of all tokens of the group, and another takes
the output back. What lies between is plain attention, or, over a second group, the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .. import _backend
from .._attention import autocast, check_dropout, check_scale, seed_tensor
from .._backend import use_triton
from .._checks import check_choice
from .._ring import CHECKS, group_name, place, refuse
from .._ring_ops import all_to_all_heads, all_to_all_sequence
from .._sequence import SequenceLayout
from .arguments import check_layouts, check_masking, check_tensors, pick_block
from .ring import SCHEDULES, ring

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .._ring import Group, LoopbackMesh

__all__ = ["ulysses_attention", "usp_attention"]


def ulysses_attention(
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
    attn_mask: None = None,
    return_lse: bool = False,
    backend: str | None = None,
    check: str = "first",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`ring_attention` by all-to-alls in place of the ring: each rank attends with Hq / P of the heads over the
    whole sequence.

    A rank sends (P-1)/P of its q, k, v and of its output, each way of differentiation: 1/P of what the ring sends at
    the same sequence. Nothing of it hides behind compute, and P is limited by the number of heads. Memory is that of
    the whole sequence in Hq / P heads. Any layout goes, also zigzag with a window: they are all the same work here.

    Args:
        q: this rank's queries, (B, Hq, length, d), P a divisor of Hq.
        k, v: (B, Hkv, n, d) and (B, Hkv, n, dv); P is a divisor of Hkv, or Hkv one of P: P / Hkv ranks then receive
            the same head, and their gradients of it are summed.
        layout, kv_layout, group, mesh, is_causal, window_size, cu_seqlens, dropout_p, dropout_seed, scale, enable_gqa,
            attn_mask, return_lse, check: as for :func:`ring_attention`; with one seed the same entries are dropped.
        backend: likewise; where it leaves plain torch the choice, attention is ``scaled_dot_product_attention`` if
            that has what is asked.

    Returns:
        out (B, Hq, length, dv) in the dtype of ``q``, and with ``return_lse`` a pair with lse (B, Hq, length).

    Raises:
        TypeError, ValueError, NotImplementedError, BackendError: as :func:`ring_attention`; heads that P ranks cannot
            share out.

    Source: DeepSpeed Ulysses, arXiv 2309.14509.

    Example:

        >>> import torch
        >>> from torchlayers import LoopbackWorld, SequenceLayout
        >>> from torchlayers.functional import ulysses_attention
        >>> q, k, v = torch.randn(3, 1, 4, 64, 32)
        >>> layout = SequenceLayout(64, world=4)
        >>> def attend(rank, group):
        ...     shards = (layout.shard(x, 2, rank) for x in (q, k, v))
        ...     return ulysses_attention(*shards, layout=layout, group=group, is_causal=True)
        >>> out = layout.unshard(LoopbackWorld(4).run(attend), 2)
        >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.testing.assert_close(out, expected)
    """
    try:
        check_layouts(layout, kv_layout)
        name = group_name(group, mesh, layout.world, "sp")
    except (TypeError, ValueError) as error:
        refuse(error, group, mesh, "sp", check)
    return _attention(
        q, k, v, "ulysses_attention", name, None, layout=layout, kv_layout=kv_layout, is_causal=is_causal,
        window_size=window_size, cu_seqlens=cu_seqlens, dropout_p=dropout_p, dropout_seed=dropout_seed, scale=scale,
        enable_gqa=enable_gqa, attn_mask=attn_mask, return_lse=return_lse, backend=backend, check=check,
    )  # fmt: skip


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    kv_layout: SequenceLayout | None = None,
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
    """Ulysses within the ring: with a mesh of R × U ranks, U ranks exchange heads for tokens, and R parts of the
    sequence go round rings, each with Hq / U of the heads.

    Dimension "ulysses" belongs where links are fast, inside a machine; "ring", whose traffic hides behind compute,
    across. U is limited by the number of heads, R by nothing.

    Args:
        q, k, v: as for :func:`ulysses_attention`, with U in place of P.
        layout: over R · U ranks; the one at (r, u) of the mesh holds what the layout gives rank r · U + u. The ring
            runs on ``layout.merged(U)``, which for "zigzag" is zigzag again, so that causal work is as even as ever.
        mesh: with dimensions called "ring" and "ulysses", among others or not. May be left out for one rank.
        window_size: not with "zigzag", unless R is 1.
        kv_layout, is_causal, cu_seqlens, dropout_p, dropout_seed, scale, enable_gqa, attn_mask, return_lse, backend,
            check: as for :func:`ulysses_attention`.
        schedule: of the ring, as for :func:`ring_attention`.

    Returns:
        out (B, Hq, length, dv) in the dtype of ``q``, and with ``return_lse`` a pair with lse (B, Hq, length).

    Raises:
        TypeError, ValueError, NotImplementedError, BackendError: as :func:`ulysses_attention`; a mesh without the two
            dimensions, or a layout over another number of ranks. A call that one rank refuses is refused on the whole
            mesh.

    Source: USP, arXiv 2405.07719; LoongTrain, arXiv 2406.18485.

    Example:

        >>> import torch
        >>> from torchlayers import LoopbackWorld, SequenceLayout
        >>> from torchlayers.functional import usp_attention
        >>> q, k, v = torch.randn(3, 1, 4, 64, 32)
        >>> layout, world = SequenceLayout(64, world=4, kind="zigzag"), LoopbackWorld(4)
        >>> def attend(rank, group):
        ...     mesh = world.mesh(rank, (2, 2), ("ring", "ulysses"))  # torch: init_device_mesh("cuda", (2, 2), ...)
        ...     shards = (layout.shard(x, 2, rank) for x in (q, k, v))
        ...     return usp_attention(*shards, layout=layout, mesh=mesh, is_causal=True)
        >>> out = layout.unshard(world.run(attend), 2)
        >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.testing.assert_close(out, expected)
    """
    ring_group = heads_group = None
    if mesh is not None or not isinstance(layout, SequenceLayout) or layout.world > 1:
        names = getattr(mesh, "mesh_dim_names", None) or ()
        if "ring" not in names or "ulysses" not in names:
            raise ValueError(f"mesh must have dimensions 'ring' and 'ulysses', got {type(mesh).__name__} with {names}")
        ring_group, heads_group = (group_name(None, mesh, None, dim) for dim in ("ring", "ulysses"))
    return _attention(
        q, k, v, "usp_attention", heads_group, ring_group, layout=layout, kv_layout=kv_layout, is_causal=is_causal,
        window_size=window_size, cu_seqlens=cu_seqlens, dropout_p=dropout_p, dropout_seed=dropout_seed, scale=scale,
        enable_gqa=enable_gqa, schedule=schedule, attn_mask=attn_mask, return_lse=return_lse, backend=backend,
        check=check,
    )  # fmt: skip


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    what: str,
    heads_group: str | None,
    ring_group: str | None,
    *,
    layout: SequenceLayout,
    kv_layout: SequenceLayout | None,
    is_causal: bool,
    window_size: int | tuple[int, int] | None,
    cu_seqlens: Sequence[int] | Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    schedule: str = "ring",
    attn_mask: None,
    return_lse: bool,
    backend: str | None,
    check: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Heads for tokens over one group, the ring over the other; None for a group of one rank."""
    try:
        check_choice("check", check, CHECKS)
        check_choice("schedule", schedule, SCHEDULES)
        check_layouts(layout, kv_layout)
        (rank, ways), (part, parts) = place(heads_group), place(ring_group)
        if layout.world != parts * ways:
            raise ValueError(f"layout must be over the {parts} × {ways} ranks of the mesh, got {layout.world}")
        first = part * ways
        check_tensors(q, k, v, layout, kv_layout, first + rank, enable_gqa)
        heads, kv_heads = q.shape[1], k.shape[1]
        _check_heads(heads, kv_heads, ways)
        whole = layout.merged(ways)
        kv_whole = None if kv_layout is None else kv_layout.merged(ways)
        window, documents = check_masking(whole, kv_whole, is_causal, window_size, cu_seqlens, attn_mask)
        dropout_p = check_dropout("dropout_p", dropout_p)
        q, k, v = autocast(q, k, v)
        real_scale = check_scale(scale, q.shape[3])
        seed = seed_tensor("dropout_seed", dropout_seed, q.device) if dropout_p > 0.0 else None
        asked = _backend._current if backend is None else backend
        plain = ring_group is None and not return_lse and not documents and dropout_p == 0.0
        plain = plain and window in ((-1, -1), (-1, 0)) and asked in ("auto", "torch")
        if not plain:
            n, kv_n = _length(layout, first, ways), _length(kv_layout or layout, first, ways)
            own_heads, own_kv_heads = heads // ways, max(1, kv_heads // ways)
            block = pick_block(
                _shaped(q, own_heads, n), _shaped(k, own_kv_heads, kv_n), _shaped(v, own_kv_heads, kv_n),
                window, documents, dropout_p, backend,
            )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        for name in (heads_group, ring_group):
            try:
                refuse(error, name, None, check=check)
            except type(error):
                continue  # raised below, once both groups know of it
        raise
    call = (
        f"{what} of heads {heads} on {kv_heads}, window {window}, scale {real_scale}, dropout_p {dropout_p}, schedule "
        f"{schedule}, backend {'sdpa' if plain else block}, check {check}, layouts {layout.key} and "
        f"{(kv_layout or layout).key}, documents {documents}"
    )
    if kv_layout is None:
        q, k, v = all_to_all_heads([q, k, v], layout, heads_group, first, call, ring_group, check)
    else:
        (q,) = all_to_all_heads([q], layout, heads_group, first, call, ring_group, check)
        k, v = all_to_all_heads([k, v], kv_layout, heads_group, first)
    if plain:
        use_triton("ring_block_forward", q, "torch")
        out = F.scaled_dot_product_attention(q, k, v, is_causal=window[1] == 0, scale=scale, enable_gqa=enable_gqa)
    else:
        out, lse = ring(
            q, k, v, group=ring_group, layout=whole, kv_layout=kv_whole, window=window, documents=documents,
            scale=real_scale, dropout_p=dropout_p, seed=seed, head_offset=rank * q.shape[1], heads=heads,
            schedule=schedule, block=block, check=check,
        )  # fmt: skip
    (out,) = all_to_all_sequence([out], [heads], layout, heads_group, first)
    if not return_lse:
        return out
    (lse,) = all_to_all_sequence([lse[..., None]], [heads], layout, heads_group, first)
    return out, lse[..., 0]


def _length(layout: SequenceLayout, first: int, ways: int) -> int:
    """How many tokens that many ranks hold, from ``first`` on."""
    return sum(layout.length(rank) for rank in range(first, first + ways))


def _check_heads(heads: int, kv_heads: int, ways: int) -> None:
    if heads % ways:
        raise ValueError(f"q must have a multiple of {ways} heads, one or more for each rank, got {heads}")
    if kv_heads % ways and ways % kv_heads:
        raise ValueError(f"k must have a multiple of {ways} heads or a divisor of it, got {kv_heads}")


def _shaped(x: Tensor, heads: int, length: int) -> Tensor:
    """What ``x`` will be like after the exchange; no memory."""
    return x.new_empty(()).expand(x.shape[0], heads, length, x.shape[3])
