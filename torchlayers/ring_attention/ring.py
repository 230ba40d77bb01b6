"""The ring: queries stay, keys and values travel, the softmax is kept as a running state.

Forward and backward are one plain loop each over :func:`circulate`, inside an operation that finds its group by name,
so that ``torch.compile`` sees one node.

Forward, hop by hop: the next keys and values are posted, the block runs on those in hand, then the post is awaited.
Backward: keys and values travel once more. The gradients of a rank's keys and values are born on the next rank,
collect each rank's part while they follow their keys one hop behind, and go home from the last; the rank's own part
waits there. All blocks use the LSE and the output of the whole softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .._attention import Window, no_autocast
from .._ring import Channel, agree, resolve
from .._sequence import SequenceLayout
from .blocks import Gradients, Mask, Options, Tokens, make_block, mask_between, wide

__all__ = ["SCHEDULES", "circulate", "passes", "ring"]

# (direction, distance): the keys in hand come from as many ranks back in that direction.
Step = tuple[int, int]

_KV, _GRADIENTS = 0, 1  # tags

SCHEDULES = ("ring", "allgather")


# The schedule


@lru_cache(maxsize=64)
def passes(q_layout: str, kv_layout: str, window: Window, documents: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """How keys and values travel, as (direction, hops): once round the ring, or on contiguous layouts as far as a
    window or documents need, from the left and from the right."""
    queries, keys = SequenceLayout.from_key(q_layout), SequenceLayout.from_key(kv_layout)
    world = queries.world
    if queries.kind != "contiguous" or keys.kind != "contiguous" or (window[0] < 0 and not documents):
        return ((1, world - 1),) if world > 1 else ()
    shards = [(Tokens(queries.runs(rank)), Tokens(keys.runs(rank))) for rank in range(world)]
    needed = {
        (rank - owner) % world
        for rank, (own, _) in enumerate(shards)
        for owner, (_, theirs) in enumerate(shards)
        if not Mask(own, theirs, window, documents).empty
    }
    # The first `left` distances come from the left; what is further comes from the right, if that is shorter.
    split = [(left + max((world - d for d in needed if d > left), default=0), -left) for left in sorted(needed | {0})]
    hops, left = min(split)
    return tuple((direction, n) for direction, n in ((1, -left), (-1, hops + left)) if n > 0)


def _steps(travel: Sequence[tuple[int, int]]) -> list[Step]:
    return [(1, 0)] + [(direction, hop) for direction, hops in travel for hop in range(1, hops + 1)]


def circulate(
    channel: Channel, home: Sequence[Tensor], steps: Sequence[Step], like: Callable[[int], list[Tensor]]
) -> Iterator[Sequence[Tensor]]:
    """The tensors in hand at each step, the own ones (``home``, contiguous) first.

    Those of the next step are under way while the caller works: two sets are held beside the own. ``like(owner)``
    makes the tensors into which those of a rank are received.
    """
    hand: Sequence[Tensor] = home
    for n in range(len(steps)):
        if n + 1 == len(steps):
            yield hand
            return
        direction, distance = steps[n + 1]
        coming = like((channel.rank - direction * distance) % channel.size)
        work = channel.hop(home if distance == 1 else hand, coming, direction, _KV)
        yield hand
        work.wait()
        hand = coming


# One call


class _Call:
    """The arguments of the operations, taken apart."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, group: str, layout: str, kv_layout: str,
        documents: Sequence[int], left: int, right: int, scale: float, dropout_p: float, head_offset: int, heads: int,
        schedule: str, block: str, check: str,
    ) -> None:  # fmt: skip
        self.channel = resolve(group)
        self.rank = self.channel.rank
        self.keys = SequenceLayout.from_key(kv_layout)
        self.home = [k.contiguous(), v.contiguous()] if self.channel.size > 1 else [k, v]
        self.gathers = schedule == "allgather" and self.channel.size > 1
        self.block = make_block(block, Options(scale, dropout_p, seed, head_offset, heads))
        documents = tuple(documents)
        if self.gathers:
            self.masks = [mask_between(layout, self.rank, kv_layout, None, (left, right), documents)]
            return
        self.passes = passes(layout, kv_layout, (left, right), documents)
        self.steps = _steps(self.passes)
        self.masks = [
            mask_between(layout, self.rank, kv_layout, self.owner(step), (left, right), documents)
            for step in self.steps
        ]

    def owner(self, step: Step) -> int:
        return (self.rank - step[0] * step[1]) % self.channel.size

    def like(self, owner: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Empty tensors for a rank's keys and values."""
        n = self.keys.length(owner)
        return [x.new_empty((*x.shape[:2], n, x.shape[3]), dtype=dtype) for x in self.home]

    def hands(self) -> Iterator[Sequence[Tensor]]:
        """The keys and values of each mask of ``masks``."""
        return iter([self.gathered()]) if self.gathers else circulate(self.channel, self.home, self.steps, self.like)

    def gathered(self) -> list[Tensor]:
        """All keys and values, in order of position."""
        shards = [self.like(rank) for rank in range(self.channel.size)]
        for x, parts in zip(self.home, zip(*shards, strict=True), strict=True):
            self.channel.all_gather(x, parts)
        return [self.keys.unshard(parts, 2) for parts in zip(*shards, strict=True)]


def _text(
    q: Tensor, k: Tensor, v: Tensor, layout: str, kv_layout: str, documents: Sequence[int], left: int, right: int,
    scale: float, dropout_p: float, head_offset: int, heads: int, schedule: str, block: str, check: str,
) -> str:  # fmt: skip
    """What must be the same on all ranks."""
    shapes = f"batch {q.shape[0]}, heads {q.shape[1]} on {k.shape[1]}, channels {q.shape[3]} and {v.shape[3]}"
    return (
        f"ring_attention of {str(q.dtype).removeprefix('torch.')}, {shapes}, window {left, right}, scale {scale}, "
        f"dropout_p {dropout_p}, heads {heads}, schedule {schedule}, backend {block}, check {check}, layouts {layout} "
        f"and {kv_layout}, documents {list(documents)}"
    )


@torch.library.custom_op("torchlayers::ring_attention_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, group: str, layout: str, kv_layout: str,
    documents: Sequence[int], left: int, right: int, scale: float, dropout_p: float, head_offset: int, heads: int,
    schedule: str, block: str, check: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (
        layout, kv_layout, documents, left, right, scale, dropout_p, head_offset, heads, schedule, block, check,
    )  # fmt: skip
    agree(resolve(group), lambda: _text(q, k, v, *options), q.device, check=check)
    call = _Call(q, k, v, seed, group, *options)
    seen = [n for n, mask in enumerate(call.masks) if not mask.empty]
    with no_autocast(q):
        state = call.block.start(q, v.shape[3])
        for n, hand in enumerate(call.hands()):
            if n in seen:
                call.block.forward(q, hand[0], hand[1], state, call.masks[n], last=n == seen[-1])
        return call.block.finish(state)


@torch.library.custom_op("torchlayers::ring_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    seed: Tensor | None, group: str, layout: str, kv_layout: str, documents: Sequence[int], left: int, right: int,
    scale: float, dropout_p: float, head_offset: int, heads: int, schedule: str, block: str, check: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call(
        q, k, v, seed, group, layout, kv_layout, documents, left, right, scale, dropout_p, head_offset, heads,
        schedule, block, check,
    )  # fmt: skip
    with no_autocast(q):
        grads = call.block.start_backward(q, out, lse, grad_out, grad_lse)
        dk, dv = (_gathered_backward if call.gathers else _ring_backward)(call, q, grads)
        return grads.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _part(call: _Call, q: Tensor, hand: Sequence[Tensor], grads: Gradients, mask: Mask) -> list[Tensor] | None:
    """This rank's part of the gradients of the keys and values in hand."""
    return None if mask.empty else list(call.block.backward(q, hand[0], hand[1], grads, mask))


def _ring_backward(call: _Call, q: Tensor, grads: Gradients) -> list[Tensor]:
    channel, kind = call.channel, wide(q.dtype)
    hops = dict(call.passes)
    home: list[Tensor] = []
    arrivals = []  # of the own gradients, one a pass
    coming, work = None, None  # the sum over the ranks before this one
    for (direction, distance), mask, hand in zip(call.steps, call.masks, call.hands(), strict=True):
        part = _part(call, q, hand, grads, mask)
        if distance == 0:
            home = part or [torch.zeros_like(x, dtype=kind) for x in call.home]
            continue
        if distance > 1:
            assert coming is not None and work is not None
            work.wait()
            part = coming if part is None else [own.add_(x) for own, x in zip(part, coming, strict=True)]
        elif part is None:
            part = [torch.zeros_like(x, dtype=kind) for x in hand]
        last = distance == hops[direction]
        coming = call.like(channel.rank if last else call.owner((direction, distance + 1)), kind)
        work = channel.hop(part, coming, -direction * distance if last else direction, _GRADIENTS)
        if last:
            arrivals.append((work, coming, part))
    for work, coming, _ in arrivals:
        work.wait()
        for x, arrived in zip(home, coming, strict=True):
            x += arrived
    return home


def _gathered_backward(call: _Call, q: Tensor, grads: Gradients) -> list[Tensor]:
    hand = call.gathered()
    part = _part(call, q, hand, grads, call.masks[0])
    if part is None:
        part = [torch.zeros_like(x, dtype=wide(q.dtype)) for x in hand]
    ranks = range(call.channel.size)
    return [call.channel.reduce_scatter([call.keys.shard(x, 2, r).contiguous() for r in ranks]) for x in part]


@_forward_op.register_fake
def _(q, k, v, *options):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@_backward_op.register_fake
def _(grad_out, grad_lse, out, lse, q, k, v, *options):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output) -> None:
    q, k, v, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _backward_op(grad_out, grad_lse, out, lse, q, k, v, seed, *ctx.options)
    return (*grads, None, *(None for _ in ctx.options))


_forward_op.register_autograd(_backward, setup_context=_setup)


@_forward_op.register_vmap
def _(*_):
    raise NotImplementedError("ring attention does not run under vmap: ranks exchange tensors; use its batch dimension")


# What the family's functions call


def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: str | None,
    layout: SequenceLayout,
    kv_layout: SequenceLayout | None = None,
    window: Window = (-1, -1),
    documents: tuple[int, ...] = (),
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    head_offset: int = 0,
    heads: int | None = None,
    schedule: str = "ring",
    block: str = "torch",
    check: str = "first",
) -> tuple[Tensor, Tensor]:
    """:func:`torchlayers.functional.ring_attention` without its checks; with one rank, attention in one piece.

    Args:
        q, k, v: this rank's shards, (B, Hq, length, d), (B, Hkv, kv length, d), (B, Hkv, kv length, dv).
        group: name of the group; None for one rank.
        layout, kv_layout: of the queries and, where another, of the keys.
        window: (left, right), -1 for unlimited; causal is right = 0.
        documents: borders of packed documents, () for one.
        seed: int64, one element, where there is dropout.
        head_offset, heads: of ``heads`` query heads in all these are those from ``head_offset`` on; dropout sees it.
        block: "torch", "triton", "flash" or "cudnn".

    Returns:
        out (B, Hq, length, dv), lse (B, Hq, length), with autograd.
    """
    key = layout.key
    return _forward_op(
        q, k, v, seed, group or "", key, key if kv_layout is None else kv_layout.key, documents, window[0], window[1],
        scale, dropout_p, head_offset, q.shape[1] if heads is None else heads, schedule, block, check,
    )  # fmt: skip
