"""Tensor attention over a sequence that lies on several ranks: two streams of keys and values go round one ring.

A rank keeps its queries and must see all pairs of shards (a, b): keys of set 1 on a, keys of set 2 on b. All ranks make
the same tour: a visit (o1, o2) is the pair of shards of the ranks o1 and o2 before this one, and between two visits one
stream hops. What each visit gives is merged by its log-sum-exp, in float32 or float64. Backward, the same tour is made
with the log-sum-exp of the whole, and sums of gradients follow the shards that they belong to.

A shard is a few runs of equally spaced positions, and so a visit is cut into calls on one run each of queries, keys 1
and keys 2: there masks by position are masks by index, whatever the layout.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._attention import (
    Window,
    autocast,
    check_qkv,
    check_scale,
    merge_attention,
    mha_inputs,
    mha_output,
    normalize_window,
)
from .._backend import BACKENDS, import_kernels, use_triton
from .._checks import check_choice, check_size
from .._placement import check_layout, placement, sequence_group
from .._ring import Work, agree, group_name, place, refuse, resolve
from .._sequence import SequenceLayout
from .chunked import chunked_backward, chunked_forward
from .functional import FORMS, _unsupported, tensor_attention
from .modules import TensorAttention, TensorAttentionCache

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .._ring import Group, LoopbackMesh

__all__ = ["RingTensorAttention", "ring_tensor_attention"]

_kernels = import_kernels("tensor_attention")


def ring_tensor_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    layout: SequenceLayout,
    group: Group | None = None,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    is_causal: bool = False,
    window1: int | tuple[int, int] | None = None,
    window2: int | tuple[int, int] | None = None,
    symmetric: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "trilinear",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`tensor_attention` over a sequence that lies on the ranks of a group, each with its shard of all tensors.

    Queries stay, keys and values travel: beside its own shard of a set a rank holds the one at hand and the one on its
    way, or what its windows reach of its neighbours'. With P ranks, c tokens on each and M = B Hkv c (d + dv) elements:

    - without windows P² visits, and P² - 1 hops of M elements a rank, posted before and awaited after compute;
    - with ``symmetric`` P (P + 1) / 2 visits, and P (P + 1) / 2 - 1 + ⌊(P - 1) / 2⌋ hops;
    - a set with windows of at most c tokens to either side, on the contiguous layout, makes no hops: each rank gets
      the tokens that it needs of its neighbours at once. Longer windows hop as far as any rank needs.

    Backward the shards travel once more, and their gradients with them in float32 (float64 for float64): the own
    shard's stay at home, the others' visit all ranks and end there.

    Causal attention over pairs has work as the square of the position. The striped layout balances that; of four
    ranks the busiest does 2.3 times the mean on the contiguous layout, and 1.3 times on zigzag.

    Args:
        q: this rank's shard, (B, Hq, layout.length(rank), d).
        k1, k2: (B, Hkv, layout.length(rank), d).
        v1, v2: (B, Hkv, layout.length(rank), dv).
        layout: which rank holds which tokens; a layout with documents keeps attention within them.
        group, mesh: the ranks, in the layout's order: a process group, or a mesh of one dimension or with one called
            "sp". May be left out for one rank.
        is_causal: a query sees pairs of tokens up to its own.
        window1, window2: what of each set a query sees, in tokens of the whole sequence: an int w for i - w < j <= i
            where causal and |i - j| < w otherwise, or a pair (left, right), -1 for unlimited.
        symmetric: k2 is k1 and v2 is v1, as tensors or entry by entry, with equal windows: a pair and the same pair
            exchanged are computed once. Pass the same tensor twice; others are compared, which waits for a GPU and
            cannot be traced. Not for the determinant form, whose logits change sign.
        scale, enable_gqa, form: as for :func:`tensor_attention`.
        return_lse: also return the log-sum-exp, a natural logarithm. It is differentiable.
        backend: see :func:`torchlayers.backend`.

    Returns:
        this rank's shard of the output (B, Hq, layout.length(rank), dv) in the dtype of ``q`` (under autocast, in
        autocast's), and with ``return_lse`` a pair with lse (B, Hq, layout.length(rank)), float32 or float64.

    Raises:
        TypeError, ValueError: bad arguments of this rank, or of another, or calls that differ between ranks, which are
            found before the first call over a group; nothing is sent then, and the group stays usable.
        BackendError: ``backend="triton"`` with what the kernels do not support.
        RuntimeError: a second derivative.
        NotImplementedError: under vmap.

    Source: the ring of arXiv 2310.01889, for the operation of 2310.04064.

    Example::

        layout = SequenceLayout(4096, world=8, kind="striped")
        out = ring_tensor_attention(q, k1, k2, v1, v2, layout=layout, group=group, is_causal=True)
    """
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    try:
        check_layout("layout", layout)
        if layout is None:
            raise TypeError("layout must be a SequenceLayout, got None")
        name = group_name(group, mesh, layout.world, "sp")
        _check_tensors(tensors, layout, name, enable_gqa)
        check_choice("form", form, FORMS)
        if form == "determinant" and q.shape[3] % 3:
            raise ValueError(f"q must have a multiple of 3 channels for form='determinant', got {q.shape[3]}")
        windows = [normalize_window(f"window{t + 1}", w, is_causal) for t, w in enumerate((window1, window2))]
        scale = check_scale(scale, q.shape[3])
        if symmetric:
            _check_symmetric(tensors, windows, form)
        check_choice("backend", backend, (None, *BACKENDS))
        unsupported = _unsupported(q, v1, 1, 1) if q.numel() else None  # an empty shard is no matter for its rank
        triton = use_triton("tensor_attention_forward", q, backend, unsupported)
    except (TypeError, ValueError) as error:
        refuse(error, group, mesh, "sp")
    if name is None and layout.cu_seqlens is None:
        return tensor_attention(
            q, k1, k2, v1, v2, is_causal=is_causal, window1=window1, window2=window2, scale=scale,
            enable_gqa=enable_gqa, form=form, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    out, lse = _forward_op(
        *autocast(q, k1, k2, v1, v2), layout.key, name or "", scale, list(windows[0]), list(windows[1]), form,
        symmetric, triton,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_tensors(tensors: dict[str, Tensor], layout: SequenceLayout, group: str | None, enable_gqa: bool) -> None:
    q, k1, k2, v1, v2 = tensors.values()
    check_qkv({"q": q}, {"k1": k1, "k2": k2}, {"v1": v1, "v2": v2}, enable_gqa)
    rank, _ = place(group)
    for name, x in tensors.items():
        check_size(name, x, 2, layout.length(rank), f"length of rank {rank} in the layout")
    check_size("v2", v2, 3, v1.shape[3], "the channels of v1")


def _check_symmetric(tensors: dict[str, Tensor], windows: list[Window], form: str) -> None:
    if form == "determinant":
        raise ValueError("symmetric must be False with form='determinant', whose logits change sign, got True")
    if windows[0] != windows[1]:
        raise ValueError(f"symmetric must be False where the windows differ, got True with {windows[0]}, {windows[1]}")
    for first, second in (("k1", "k2"), ("v1", "v2")):
        x, y = tensors[first], tensors[second]
        if x is y:
            continue
        if torch.compiler.is_compiling():
            raise ValueError(f"symmetric must come with {second} the same tensor as {first} under torch.compile")
        if x.shape != y.shape or not torch.equal(x, y):
            raise ValueError(f"symmetric must be False unless {second} equals {first}, got True and another {second}")


# The tour: the same on all ranks, from layout and windows alone.


class _Plan(NamedTuple):
    """``halos``: for each stream the tokens (before, after) that a rank takes of its neighbours, in place of hops;
    ``visits``: pairs of offsets."""

    halos: tuple[Window | None, Window | None]
    visits: tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def _plan(layout: SequenceLayout, window1: Window, window2: Window, symmetric: bool) -> _Plan:
    first, second = _offsets(layout, window1), _offsets(layout, window2)
    if symmetric:  # each unordered pair once; (b, b) is followed by (b + 1, b + 1) where rows meet
        rows = [[(a, b) for a in first[: t + 1]] for t, b in enumerate(first)]
    else:
        rows = [[(a, b) for a in first] for b in second]
    visits = [visit for t, row in enumerate(rows) for visit in (row if t % 2 == int(symmetric) else row[::-1])]
    return _Plan((_halo(layout, window1), _halo(layout, window2)), tuple(visits))


def _halo(layout: SequenceLayout, window: Window) -> Window | None:
    """What a stream takes of its neighbours, where that is all that its queries see: it makes no hops then."""
    near = min(window) >= 0 and max(window) <= layout.seq_len // layout.world  # the shortest shard
    return window if layout.kind == "contiguous" and layout.world > 1 and near else None


def _offsets(layout: SequenceLayout, window: Window) -> list[int]:
    """How far a stream comes: offsets at which some rank sees something, its own block first."""
    if _halo(layout, window) is not None:
        return [0]
    world = layout.world
    if layout.kind != "contiguous":
        return list(range(world))

    def needed(offset: int) -> bool:
        pairs = ((layout.runs(r), layout.runs((r - offset) % world)) for r in range(world))
        return any(_band(q, k, window) for queries, keys in pairs for q, k in product(queries, keys))

    return [0, *filter(needed, range(1, world))]


# A visit in calls on runs of equally spaced positions.

Span = tuple[int, int]  # (start, length) within a shard


class _Call(NamedTuple):
    """One call of the operation on a part of a visit: which queries and keys, and how they lie to each other."""

    queries: Span
    keys1: Span
    keys2: Span
    window1: list[int]
    window2: list[int]
    offsets: tuple[int, int, int]

    def cut(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """What it takes of q, k1, k2, v1, v2."""
        spans = (self.queries, self.keys1, self.keys2, self.keys1, self.keys2)
        return [x.narrow(2, *span) for x, span in zip(operands, spans, strict=True)]

    def options(self, scale: float, form: str) -> tuple:
        """What follows the tensors: masks, seed, scale, dropout, windows, is_causal, form, offsets."""
        return (None, None, None, scale, 0.0, self.window1, self.window2, False, form, *self.offsets)


def _calls(
    layout: SequenceLayout,
    queries: Sequence[range],
    keys1: Sequence[range],
    keys2: Sequence[range],
    window1: Window,
    window2: Window,
) -> Iterator[_Call]:
    """The calls that a visit takes; those in which nothing is seen are left out."""
    rows, columns1, columns2 = (_pieces(layout, runs) for runs in (queries, keys1, keys2))
    for document, pieces in rows.items():
        for (i, q), (j, a), (k, b) in product(pieces, columns1[document], columns2[document]):
            band1, band2 = _band(q, a, window1), _band(q, b, window2)
            if band1 is not None and band2 is not None:
                (seen1, shift1), (seen2, shift2) = band1, band2
                start = max(shift1, shift2, 0)
                offsets = (start, start - shift1, start - shift2)
                yield _Call((i, len(q)), (j, len(a)), (k, len(b)), seen1, seen2, offsets)


def _pieces(layout: SequenceLayout, runs: Sequence[range]) -> dict[int, list[tuple[int, range]]]:
    """Runs cut where documents end: document -> (index in the shard, positions)."""
    borders = layout.cu_seqlens or (0, layout.seq_len)
    pieces: dict[int, list[tuple[int, range]]] = defaultdict(list)
    index = 0
    for run in runs:
        while run:
            document = bisect_right(borders, run[0]) - 1
            inside = run[: -(-(borders[document + 1] - run[0]) // run.step)]
            pieces[document].append((index, inside))
            index += len(inside)
            run = run[len(inside) :]
    return pieces


def _band(queries: range, keys: range, window: Window) -> tuple[list[int], int] | None:
    """A window of positions in terms of indices: (window, position of query 0 less that of key 0); None: nothing seen.

    Key j is seen by query i where low <= j - i <= high. Since -1 is unlimited, the limits that the functions take are
    not negative: the shift makes them so.
    """
    step, ahead = queries.step, queries.start - keys.start
    lowest, highest = 1 - len(queries), len(keys) - 1
    low = lowest if window[0] < 0 else max(lowest, -((window[0] - ahead) // step))
    high = highest if window[1] < 0 else min(highest, (window[1] + ahead) // step)
    if low > high:
        return None
    if high < highest:
        return [-1 if low == lowest else high - low, 0], high
    return ([0, -1], low) if low > lowest else ([-1, -1], 0)


# What travels


class _Ring:
    """One rank's view of a call: its place, the tour, and the block of attention at each stop."""

    def __init__(self, q: Tensor, layout: str, group: str, *options: Any) -> None:
        self.scale, window1, window2, self.form, self.symmetric, self.triton = options
        self.windows: tuple[Window, Window] = ((window1[0], window1[1]), (window2[0], window2[1]))
        self.layout = SequenceLayout.from_key(layout)
        self.channel = resolve(group)
        self.rank, self.world = self.channel.rank, self.channel.size
        self.plan = _plan(self.layout, *self.windows, self.symmetric)
        self.dtype = torch.promote_types(q.dtype, torch.float32)

    def agree(self, q: Tensor, k1: Tensor, v1: Tensor) -> None:
        """See that all ranks make this call, before the first one over a group."""
        (batch, heads, _, d), kv_heads, dv = q.shape, k1.shape[1], v1.shape[3]
        shapes = f"batch {batch}, heads {heads}, kv_heads {kv_heads}, d {d}, dv {dv}, {q.dtype}"
        options = f"scale {self.scale}, windows {self.windows}, form {self.form}, symmetric {self.symmetric}"
        agree(self.channel, f"ring_tensor_attention({shapes}, layout {self.layout.key}, {options})", q.device)

    def shift(self, send: Sequence[Tensor], distance: int, length: int, tag: int) -> tuple[Work, list[Tensor]]:
        """Send to the rank ``distance`` further on, receive as many tensors of ``length`` tokens."""
        sent = [x.contiguous() for x in send]
        received = [x.new_empty((*x.shape[:2], length, x.shape[3])) for x in send]
        work = self.channel.hop(sent, received, distance, tag)

        def wait() -> None:
            work.wait()
            sent.clear()  # alive until here

        return Work(wait), received

    def hop(self, send: Sequence[Tensor], at: int, to: int, tag: int) -> tuple[Work, list[Tensor]]:
        """Send on what belongs to the rank at offset ``at``, receive what belongs to the one at offset ``to``."""
        return self.shift(send, (to - at) % self.world, self.length(to), tag)

    def length(self, offset: int) -> int:
        return self.layout.length((self.rank - offset) % self.world)

    def streams(self, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> tuple[_Stream, _Stream]:
        streams = _Stream(self, 0, [k1, v1], self.plan.halos[0]), _Stream(self, 1, [k2, v2], self.plan.halos[1])
        for stream in streams:
            stream.wait()
        return streams

    def tour(self, streams: Sequence[_Stream]) -> Iterator[tuple[int, int]]:
        """Make all visits. Yields, with the blocks of one at hand, the offsets of the next; after the last home's."""
        visits = self.plan.visits
        for following in visits[1:]:
            for stream, to in zip(streams, following, strict=True):
                stream.post(to)
            yield following
            for stream in streams:
                stream.wait()
        yield (0, 0)

    def calls(self, streams: Sequence[_Stream]) -> Iterator[_Call]:
        keys1, keys2 = (stream.runs for stream in streams)
        return _calls(self.layout, self.layout.runs(self.rank), keys1, keys2, *self.windows)

    def weight(self, streams: Sequence[_Stream]) -> int:
        """How many pairs of blocks this visit stands for."""
        return 2 if self.symmetric and streams[0].at != streams[1].at else 1

    def operands(self, q: Tensor, streams: Sequence[_Stream]) -> list[Tensor]:
        """q, k1, k2, v1, v2 of a visit. Plain torch gets them wide, and so returns wide; kernels widen inside."""
        (k1, v1), (k2, v2) = (stream.held for stream in streams)
        return [x if self.triton else x.to(self.dtype) for x in (q, k1, k2, v1, v2)]

    def forward(self, operands: Sequence[Tensor], call: _Call) -> tuple[Tensor, Tensor]:
        arguments = (*call.cut(operands), *call.options(self.scale, self.form))
        if self.triton:
            assert _kernels is not None
            return _kernels.tensor_attention_forward_op(*arguments)
        return chunked_forward(*arguments)

    def backward(
        self,
        grads: tuple[Tensor, Tensor | None],
        operands: Sequence[Tensor],
        results: tuple[Tensor, Tensor],
        call: _Call,
    ) -> tuple[Tensor, ...]:
        grad_out, grad_lse, out, lse = (None if x is None else x.narrow(2, *call.queries) for x in (*grads, *results))
        arguments = (grad_out, grad_lse, *call.cut(operands), out, lse, *call.options(self.scale, self.form))
        if self.triton:
            assert _kernels is not None
            return _kernels.tensor_attention_backward_op(*arguments)
        return chunked_backward(*arguments)


class _Stream:
    """Keys and values of one set on their way: ``held`` those of the rank ``at`` places before this one.

    With a halo they do not go round: held are the own ones between what the neighbours have of use.
    """

    def __init__(self, ring: _Ring, tag: int, tensors: Sequence[Tensor], halo: Window | None) -> None:
        self.ring, self.tag, self.at, self.to = ring, tag, 0, 0
        self.before, self.after = halo or (0, 0)
        first, last = ring.rank == 0, ring.rank == ring.world - 1
        # At the ends of the sequence nothing is taken or given. Messages without tokens are sent all the same, so that
        # all ranks post as many.
        self.taken = (0 if first else self.before, 0 if last else self.after)
        self.given = (0 if first else self.after, 0 if last else self.before)
        self.held = [x.contiguous() for x in tensors]
        self._works: list[Work] = []
        self._coming = [self.held]
        if self.before:
            last_tokens = [x.narrow(2, x.shape[2] - self.given[1], self.given[1]) for x in tensors]
            work, received = ring.shift(last_tokens, 1, self.taken[0], tag)
            self._works, self._coming = [work], [received, self.held]
        if self.after:
            first_tokens = [x.narrow(2, 0, self.given[0]) for x in tensors]
            work, received = ring.shift(first_tokens, -1, self.taken[1], tag)
            self._works, self._coming = [*self._works, work], [*self._coming, received]

    @property
    def runs(self) -> Sequence[range]:
        """The positions of what is held."""
        runs = self.ring.layout.runs((self.ring.rank - self.at) % self.ring.world)
        return [range(run.start - self.taken[0], run.stop + self.taken[1], run.step) for run in runs]

    def post(self, to: int) -> None:
        """Let the next block come."""
        if to != self.at:
            work, received = self.ring.hop(self.held, self.at, to, self.tag)
            self.to, self._works, self._coming = to, [work], [received]

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self.at, self._works = self.to, []
        pieces = list(zip(*self._coming, strict=True))
        self.held = [torch.cat(piece, 2) if len(piece) > 1 else piece[0] for piece in pieces]
        self._coming = [self.held]


class _Gradients:
    """Sums of gradients for what a stream holds: those of the own block stay at home, the others' go where it goes.

    While a sum is under way, ``held`` has what this rank adds to it.
    """

    def __init__(self, stream: _Stream) -> None:
        self.stream, self.at = stream, 0
        self.home = [torch.zeros_like(x, dtype=stream.ring.dtype) for x in stream.held]
        self.held = self.home
        self._arriving: tuple[Work, list[Tensor]] | None = None

    def add(self, grads: Sequence[Tensor], span: Span, weight: int) -> None:
        for mine, grad in zip(self.held, grads, strict=True):
            mine.narrow(2, *span).add_(grad, alpha=weight)

    def move(self, to: int) -> None:
        """Follow the block: send its sum on, and hold this rank's part of the next one's."""
        if to == self.at:
            return
        ring, sent = self.stream.ring, self.held
        if self.at != 0:
            self._arriving = ring.hop(sent, self.at, to, self.stream.tag + 2)
        n = ring.length(to)
        self.held = self.home if to == 0 else [x.new_zeros((*x.shape[:2], n, x.shape[3])) for x in sent]
        self.at = to

    def settle(self) -> None:
        """Take in the sum that was under way."""
        if self._arriving is not None:
            work, received = self._arriving
            work.wait()
            for mine, arrived in zip(self.held, received, strict=True):
                mine.add_(arrived)
            self._arriving = None

    def own(self) -> list[Tensor]:
        """The own block's gradients, with what the neighbours have for it as their halo."""
        stream, ring = self.stream, self.stream.ring
        own = [x.narrow(2, stream.taken[0], x.shape[2] - sum(stream.taken)) for x in self.home]
        arriving = []
        if stream.before:
            back = [x.narrow(2, 0, stream.taken[0]) for x in self.home]
            arriving.append((*ring.shift(back, -1, stream.given[1], stream.tag + 2), True))
        if stream.after:
            back = [x.narrow(2, x.shape[2] - stream.taken[1], stream.taken[1]) for x in self.home]
            arriving.append((*ring.shift(back, 1, stream.given[0], stream.tag + 2), False))
        for work, received, at_end in arriving:
            work.wait()
            for mine, part in zip(own, received, strict=True):
                n = part.shape[2]
                mine.narrow(2, mine.shape[2] - n if at_end else 0, n).add_(part)
        return own


# The operation


@torch.library.custom_op("torchlayers::ring_tensor_attention_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    layout: str,
    group: str,
    scale: float,
    window1: list[int],
    window2: list[int],
    form: str,
    symmetric: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    ring = _Ring(q, layout, group, scale, window1, window2, form, symmetric, triton)
    ring.agree(q, k1, v1)
    out = torch.zeros((*q.shape[:3], v1.shape[3]), dtype=ring.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=ring.dtype, device=q.device)
    streams = ring.streams(k1, k2, v1, v2)
    for _ in ring.tour(streams):
        operands = ring.operands(q, streams)
        for call in ring.calls(streams):
            more, more_lse = ring.forward(operands, call)
            mine, mine_lse = (x.narrow(2, *call.queries) for x in (out, lse))
            merged = merge_attention(mine, mine_lse, more, more_lse + math.log(ring.weight(streams)))
            mine.copy_(merged[0])
            mine_lse.copy_(merged[1])
    return out.to(q.dtype), lse


@torch.library.custom_op("torchlayers::ring_tensor_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: str,
    group: str,
    scale: float,
    window1: list[int],
    window2: list[int],
    form: str,
    symmetric: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ring = _Ring(q, layout, group, scale, window1, window2, form, symmetric, triton)
    dq = torch.zeros(q.shape, dtype=ring.dtype, device=q.device)
    streams = ring.streams(k1, k2, v1, v2)
    sums = [_Gradients(stream) for stream in streams]
    for following in ring.tour(streams):
        operands, weight = ring.operands(q, streams), ring.weight(streams)
        for call in ring.calls(streams):
            dq_, dk1, dk2, dv1, dv2 = ring.backward((grad_out, grad_lse), operands, (out, lse), call)
            dq.narrow(2, *call.queries).add_(dq_, alpha=weight)
            sums[0].add((dk1, dv1), call.keys1, weight)
            sums[1].add((dk2, dv2), call.keys2, weight)
        for sum_, to in zip(sums, following, strict=True):
            sum_.settle()
            sum_.move(to)
    for sum_ in sums:
        sum_.settle()
    (dk1, dv1), (dk2, dv2) = (sum_.own() for sum_ in sums)
    if symmetric:  # the pairs that were left out have the two roles exchanged
        dk1, dv1 = (dk1 + dk2) / 2, (dv1 + dv2) / 2
        dk2, dv2 = dk1.clone(), dv1.clone()
    dq, dk1, dk2, dv1, dv2 = (x.to(q.dtype).contiguous() for x in (dq, dk1, dk2, dv1, dv2))
    return dq, dk1, dk2, dv1, dv2


@_forward_op.register_fake
def _(q, k1, k2, v1, v2, *options):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v1.shape[3])), q.new_empty(q.shape[:3], dtype=dtype)


@_backward_op.register_fake
def _(grad_out, grad_lse, q, k1, k2, v1, v2, *options):
    return tuple(x.new_empty(x.shape) for x in (q, k1, k2, v1, v2))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    # A rank whose output nobody uses takes part all the same: the others wait for its hops.
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return *_backward_op(grad_out, grad_lse, *tensors, out, lse, *ctx.options), *(None,) * len(ctx.options)


def _refuse(ctx, *grads):
    raise RuntimeError("ring_tensor_attention is differentiable once; tensor_attention has backend='dense' for twice")


_forward_op.register_autograd(_backward, setup_context=_setup)
_backward_op.register_autograd(_refuse)


@_forward_op.register_vmap
def _(*_):
    raise NotImplementedError("ring_tensor_attention does not run under vmap: ranks exchange tensors; use its batch")


# The module


class RingTensorAttention(TensorAttention):
    """:class:`TensorAttention` whose sequences are shared out over ranks, by :func:`ring_tensor_attention`.

    Parameters, their names and what is computed are those of :class:`TensorAttention`, so that either loads the other's
    checkpoint, whatever the number of ranks. The projections are local, keys and values travel, and ``rotary`` turns
    by positions in the whole sequence.

    How sequences are cut is, in this order, what the call says, what the constructor says, or what is in force
    (:class:`torchlayers.ring_attention.use_layout`). Where nothing was said, and on one rank, sequences are whole and
    this is :class:`TensorAttention`.

    Args:
        args, options: those of :class:`TensorAttention`, but for what would not be the same on any number of ranks:
            ``dropout`` must be 0, ``approx`` None, and ``backend`` another than "dense".
        layout: how sequences are cut.
        group, mesh: the ranks that share a sequence; of a mesh its dimension "sp", or its only one.

    Shape: query (N, c, E), key (N, c, kdim), value (N, c, vdim) with ``batch_first``, else (c, N, E) and so on, or
    without a batch (c, E); c the length of this rank's shards -> (output, None), output in the shape of query.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call; see :class:`TensorAttention`. Where
            sequences are cut, a ``key_padding_mask`` (pack them: ``cu_seqlens`` of the layout) and a ``cache`` too.

    Source: arXiv 2310.04064, over the ring of 2310.01889.

    Example:

        >>> layer = RingTensorAttention(64, 4, batch_first=True, is_causal=True)  # one rank: plain tensor attention
        >>> output, _ = layer(torch.randn(2, 20, 64))
        >>> output.shape
        torch.Size([2, 20, 64])
        >>> layer.load_state_dict(TensorAttention(64, 4).state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        *args: Any,
        layout: SequenceLayout | None = None,
        group: Group | None = None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(*args, device=device, dtype=dtype, **options)  # type: ignore[misc]
        self._set_place(layout, group, mesh)

    def _set_place(
        self, layout: SequenceLayout | None, group: Group | None, mesh: DeviceMesh | LoopbackMesh | None
    ) -> None:
        if self.dropout > 0:
            raise ValueError(f"dropout must be 0: what is dropped would depend on the ranks, got {self.dropout}")
        if self.approx is not None:
            raise ValueError(f"approx must be None: over ranks attention is exact, got {self.approx!r}")
        if self.backend == "dense":
            raise ValueError("backend must be 'auto', 'triton' or 'torch' over ranks, got 'dense'")
        check_layout("layout", layout)
        self.layout, self.group = layout, sequence_group(group, mesh, layout)

    @classmethod
    def from_tensor_attention(
        cls,
        layer: TensorAttention,
        *,
        layout: SequenceLayout | None = None,
        group: Group | None = None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
    ) -> RingTensorAttention:
        """``layer`` over ranks: with its parameters themselves, not copies.

        Raises:
            TypeError: ``layer`` is no :class:`TensorAttention`.
            ValueError: it has what the constructor refuses.
        """
        if not isinstance(layer, TensorAttention):
            raise TypeError(f"layer must be a TensorAttention, got {type(layer).__name__}")
        ring = cls.__new__(cls)
        nn.Module.__init__(ring)
        ring.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        ring._set_place(layout, group, mesh)
        return ring

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: TensorAttentionCache | None = None,
        layout: SequenceLayout | None = None,
        group: Group | None = None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query, key, value: this rank's shards, see the class; key is query by default, and value is key.
            key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, cache: as for
                :class:`TensorAttention`; mask and cache only where sequences are whole.
            layout, group, mesh: instead of the constructor's.

        Returns:
            (output, None).
        """
        check_layout("layout", layout)
        name = self.group if group is None and mesh is None else sequence_group(group, mesh)
        own, name = placement(self.layout if layout is None else layout, name)
        if own is None or (own.world == 1 and own.cu_seqlens is None):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
                cache=cache,
            )  # fmt: skip
        ndim = query.ndim if isinstance(query, Tensor) else 0
        try:
            for what, given in (("key_padding_mask", key_padding_mask), ("cache", cache)):
                if given is not None:
                    raise ValueError(f"{what} must be None where sequences are cut over ranks or packed, got one")
            query, key, value, _ = mha_inputs(
                query,
                key,
                value,
                embed_dim=self.embed_dim,
                kdim=self.kdim,
                vdim=self.vdim,
                batch_first=self.batch_first,
                need_weights=need_weights,
                attn_mask=None if is_causal else attn_mask,
            )
        except (TypeError, ValueError) as error:
            refuse(error, name, None)
        start: int | Tensor = 0
        if self.rotary:  # what is added to a token's index to give its position
            positions = own.positions(place(name)[0], query.device)
            start = positions - torch.arange(positions.shape[0], device=query.device)
        out = ring_tensor_attention(
            *self._project(query, key, value, start),
            layout=own,
            group=name,
            is_causal=self.is_causal or bool(is_causal),
            window1=self.window1,
            window2=self.window2,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
            form=self.form,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return mha_output(self.out_proj(out.transpose(1, 2).flatten(-2)), ndim=ndim, batch_first=self.batch_first), None

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("layout", "group"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text
