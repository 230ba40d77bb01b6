"""Moving a sharded sequence over the ranks of a group, differentiably: the patterns beside the ring itself.

Each is a registered operation that finds its group by name, so that it compiles, and its adjoint is one too. Gradients
are those of the sum of all ranks' losses. :func:`ring_pass` and :func:`ring_sum` are loops for use inside operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._ring import Channel, agree, group_name, resolve
from ._sequence import SequenceLayout

if TYPE_CHECKING:
    from ._ring import Group

__all__ = [
    "agree_all",
    "all_reduce",
    "all_to_all_heads",
    "all_to_all_sequence",
    "gather_sequence",
    "ring_pass",
    "ring_sum",
    "scatter_sequence",
]

Shape = tuple[int, ...]


def agree_all(groups: Sequence[str], call: Callable[[], str], device: torch.device, check: str) -> None:
    """:func:`torchlayers._ring.agree` over several groups of this rank, in the same order on all ranks: what one group
    refuses the others refuse as well, so that with the dimensions of a mesh every rank of it does."""
    refused = None
    for group in groups:
        try:
            agree(resolve(group), call, device, refused, check)
        except ValueError as error:
            refused = error
    if refused is not None:
        raise refused


# Loops


def ring_pass(channel: Channel, layout: SequenceLayout, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """All ranks' shards of a tensor in turn, as (rank, shard), the own first; ``x`` (…, length, channels) is the own.

    The next shard is under way while the caller works on the one it was given.
    """
    rank, world = channel.rank, channel.size
    held = x.contiguous()
    for hop in range(world):
        source = (rank - hop) % world
        if hop == world - 1:
            yield source, held
            return
        received = x.new_empty((*x.shape[:-2], layout.length((source - 1) % world), x.shape[-1]))
        work = channel.hop([held], [received])
        yield source, held
        work.wait()
        held = received


def ring_sum(channel: Channel, layout: SequenceLayout, part: Callable[[int], Tensor]) -> Tensor:
    """The sum over all ranks of what they have for this one: a reduce-scatter that holds one shard at a time.

    ``part(r)`` (…, length of r, channels) is what this rank has for rank r. A sum visits all ranks and ends at home;
    each computes its part of it while it is under way.
    """
    rank, world = channel.rank, channel.size
    total = part((rank - 1) % world).contiguous()
    for hop in range(2, world + 1):
        home = (rank - hop) % world
        received = total.new_empty((*total.shape[:-2], layout.length(home), total.shape[-1]))
        work = channel.hop([total], [received])
        own = part(home)
        work.wait()
        total = received.add_(own)
    return total


# All ranks' tokens


def gather_sequence(x: Tensor, layout: SequenceLayout, dim: int, group: Group | None) -> Tensor:
    """The whole sequence, in order, from every rank's shard.

    Args:
        x: this rank's shard, (…, length of the rank at ``dim``, …).
        layout: which rank holds what.
        dim: the dimension of the tokens.
        group: over which; None for a layout of one rank.

    Returns:
        (…, seq_len, …). Backward, every rank gets what all ranks' gradients say of its shard (a reduce-scatter).
    """
    name = group_name(group, None, layout.world)
    return x if name is None else _gather_op(x, layout.key, dim % x.ndim, name, False)


def scatter_sequence(x: Tensor, layout: SequenceLayout, dim: int, group: Group | None) -> Tensor:
    """This rank's shard of a sequence that all ranks hold as one and the same.

    The gradient is gathered: whole, and the same on all ranks. Where what came before is to be summed over the ranks
    anyway, as parameters' gradients are, that counts it world times: take ``layout.shard``, whose gradient is the own
    shard's alone.
    """
    name = group_name(group, None, layout.world)
    return x if name is None else _scatter_op(x, layout.key, dim % x.ndim, name)


def all_reduce(x: Tensor, group: str | None, call: str = "", check: str = "first") -> Tensor:
    """The sum of all ranks' ``x``, on all of them; its adjoint is the same sum of the gradients.

    ``call``: what the caller was asked for, on which, and on the shape, ranks agree first; "" for no agreement.
    """
    return x if group is None else _all_reduce_op(x, group, call, check)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]))


@torch.library.custom_op("torchlayers::gather_sequence", mutates_args=())
def _gather_op(x: Tensor, layout: str, dim: int, group: str, replicated: bool) -> Tensor:
    whole = SequenceLayout.from_key(layout)
    shards = [_resized(x, dim, whole.length(r)) for r in range(whole.world)]
    resolve(group).all_gather(x.contiguous(), shards)
    return whole.unshard(shards, dim)


@torch.library.custom_op("torchlayers::scatter_sequence", mutates_args=())
def _scatter_op(x: Tensor, layout: str, dim: int, group: str) -> Tensor:
    return SequenceLayout.from_key(layout).shard(x, dim, resolve(group).rank).clone()


@torch.library.custom_op("torchlayers::reduce_scatter_sequence", mutates_args=())
def _reduce_scatter_op(x: Tensor, layout: str, dim: int, group: str) -> Tensor:
    whole, channel = SequenceLayout.from_key(layout), resolve(group)
    parts = [whole.shard(x, dim, r).contiguous() for r in range(whole.world)]
    received = [torch.empty_like(parts[channel.rank]) for _ in parts]
    channel.all_to_all(parts, received)
    return torch.stack(received).sum(0)  # rounded once, also where the parts are of half precision


@torch.library.custom_op("torchlayers::all_reduce", mutates_args=())
def _all_reduce_op(x: Tensor, group: str, call: str, check: str) -> Tensor:
    if call:
        agree(resolve(group), lambda: f"{call}, {_dtype(x)}, sums of {tuple(x.shape)}", x.device, check=check)
    return resolve(group).all_reduce(x)


@_gather_op.register_fake
def _(x, layout, dim, group, replicated):
    return _resized(x, dim, SequenceLayout.from_key(layout).seq_len)


@_scatter_op.register_fake
@_reduce_scatter_op.register_fake
def _(x, layout, dim, group):
    return _resized(x, dim, SequenceLayout.from_key(layout).length(resolve(group).rank))


@_all_reduce_op.register_fake
def _(x, group, call, check):
    return x.new_empty(x.shape)


def _keep_options(ctx, inputs, output) -> None:
    ctx.options = inputs[1:]


def _gather_backward(ctx, grad):
    *options, replicated = ctx.options
    return (_scatter_op if replicated else _reduce_scatter_op)(grad, *options), None, None, None, None


_gather_op.register_autograd(_gather_backward, setup_context=_keep_options)
_scatter_op.register_autograd(
    lambda ctx, grad: (_gather_op(grad, *ctx.options, True), None, None, None), setup_context=_keep_options
)
_reduce_scatter_op.register_autograd(
    lambda ctx, grad: (_gather_op(grad, *ctx.options, False), None, None, None), setup_context=_keep_options
)
_all_reduce_op.register_autograd(
    lambda ctx, grad: (_all_reduce_op(grad, ctx.options[0], "", ""), None, None, None), setup_context=_keep_options
)


# Heads for tokens


def all_to_all_heads(
    tensors: Sequence[Tensor],
    layout: SequenceLayout,
    group: str | None,
    first: int = 0,
    call: str = "",
    also: str | None = None,
    check: str = "first",
) -> list[Tensor]:
    """From all heads of the own tokens to the own heads of all tokens; one message a pair of ranks.

    Args:
        tensors: each (B, H, length of this rank, channels), of one dtype; H a multiple of the ranks of the group, or
            a divisor, and then size / H ranks share a head.
        layout: which rank holds which tokens.
        group: name of the group: the ranks ``first``, ``first + 1``, … of the layout.
        call, also, check: what the caller was asked for, on which, and on shapes, the ranks of ``group`` and of group
            ``also`` agree first, see :func:`agree_all`; "" for no agreement.

    Returns:
        each (B, H / size or 1, tokens of the group's ranks, channels), tokens in order of position.
    """
    tensors = list(tensors)
    return tensors if group is None else _heads_op(tensors, layout.key, group, first, call, also, check)


def all_to_all_sequence(
    tensors: Sequence[Tensor], heads: Sequence[int], layout: SequenceLayout, group: str | None, first: int = 0
) -> list[Tensor]:
    """The adjoint of :func:`all_to_all_heads`, and its inverse where no rank shares a head: each of ``tensors`` goes
    back to all ``heads`` of it of the own tokens, the sum over those ranks that share one."""
    tensors = list(tensors)
    return tensors if group is None else _sequence_op(tensors, list(heads), layout.key, group, first)


def _own_heads(heads: int, rank: int, world: int) -> slice:
    return slice(rank * heads // world, -(-(rank + 1) * heads // world))


def _shapes(tensors: list[Tensor]) -> str:
    return " and ".join(f"({b}, {h}, …, {c})" for b, h, _, c in (x.shape for x in tensors))


def _lengths(layout: SequenceLayout, channel: Channel, first: int) -> list[int]:
    return [layout.length(first + r) for r in range(channel.size)]


def _order(layout: SequenceLayout, channel: Channel, first: int, device: torch.device) -> Tensor | None:
    """Which place the tokens of all ranks of the group have, ranks one after the other; None: their own."""
    if layout.kind == "contiguous":
        return None
    return torch.cat([layout.positions(first + r, device) for r in range(channel.size)]).argsort()


def _packed(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _unpacked(packed: Tensor, shapes: list[Shape]) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [x.view(shape) for x, shape in zip(packed.split(sizes), shapes, strict=True)]


def _exchange(channel: Channel, send: list[list[Tensor]], shapes: list[list[Shape]]) -> list[list[Tensor]]:
    """Lists of tensors to each rank, for lists of tensors of the given shapes from each."""
    packed = [_packed(tensors) for tensors in send]
    like = packed[0]
    received = [like.new_empty(sum(torch.Size(shape).numel() for shape in of_rank)) for of_rank in shapes]
    channel.all_to_all(packed, received)
    return [_unpacked(x, of_rank) for x, of_rank in zip(received, shapes, strict=True)]


@torch.library.custom_op("torchlayers::all_to_all_heads", mutates_args=())
def _heads_op(
    tensors: list[Tensor], layout: str, group: str, first: int, call: str, also: str | None, check: str
) -> list[Tensor]:
    if call:
        groups = [group] if also is None else [group, also]
        agree_all(groups, lambda: f"{call}, {_dtype(tensors[0])} {_shapes(tensors)}", tensors[0].device, check)
    whole, channel = SequenceLayout.from_key(layout), resolve(group)
    world = channel.size
    send = [[x[:, _own_heads(x.shape[1], r, world)] for x in tensors] for r in range(world)]
    own = [x.shape for x in send[channel.rank]]
    coming: list[list[Shape]] = [[(b, h, n, c) for b, h, _, c in own] for n in _lengths(whole, channel, first)]
    received = _exchange(channel, send, coming)
    order = _order(whole, channel, first, tensors[0].device)
    joined = [torch.cat(parts, 2) for parts in zip(*received, strict=True)]
    return joined if order is None else [x.index_select(2, order) for x in joined]


@torch.library.custom_op("torchlayers::all_to_all_sequence", mutates_args=())
def _sequence_op(tensors: list[Tensor], heads: list[int], layout: str, group: str, first: int) -> list[Tensor]:
    whole, channel = SequenceLayout.from_key(layout), resolve(group)
    world, lengths = channel.size, _lengths(whole, channel, first)
    order = _order(whole, channel, first, tensors[0].device)
    if order is not None:
        tensors = [x.index_select(2, order.argsort()) for x in tensors]
    send = [list(parts) for parts in zip(*(x.split(lengths, 2) for x in tensors), strict=True)]
    shape: list[Shape] = [(x.shape[0], x.shape[1], lengths[channel.rank], x.shape[3]) for x in tensors]
    received = _exchange(channel, send, [shape] * world)
    joined = [torch.cat(parts, 1) for parts in zip(*received, strict=True)]
    return [x if x.shape[1] == h else x.unflatten(1, (h, -1)).sum(2) for x, h in zip(joined, heads, strict=True)]


@_heads_op.register_fake
def _(tensors, layout, group, first, *agreement):
    channel = resolve(group)
    n = sum(_lengths(SequenceLayout.from_key(layout), channel, first))
    return [x.new_empty((x.shape[0], max(1, x.shape[1] // channel.size), n, x.shape[3])) for x in tensors]


@_sequence_op.register_fake
def _(tensors, heads, layout, group, first):
    n = SequenceLayout.from_key(layout).length(first + resolve(group).rank)
    return [x.new_empty((x.shape[0], h, n, x.shape[3])) for x, h in zip(tensors, heads, strict=True)]


def _heads_setup(ctx, inputs, output) -> None:
    ctx.heads, ctx.options = [x.shape[1] for x in inputs[0]], inputs[1:4]


def _sequence_setup(ctx, inputs, output) -> None:
    ctx.options = inputs[2:]


_heads_op.register_autograd(
    lambda ctx, grads: (_sequence_op(list(grads), ctx.heads, *ctx.options), *(None,) * 6),
    setup_context=_heads_setup,
)
_sequence_op.register_autograd(
    lambda ctx, grads: (_heads_op(list(grads), *ctx.options, "", None, ""), *(None,) * 4), setup_context=_sequence_setup
)


def _refuse_vmap(*_):
    raise NotImplementedError("ranks exchange tensors, which does not run under vmap: use the batch dimension")


for _op in (_gather_op, _scatter_op, _reduce_scatter_op, _all_reduce_op, _heads_op, _sequence_op):
    _op.register_vmap(_refuse_vmap)
