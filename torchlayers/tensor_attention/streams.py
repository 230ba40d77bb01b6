"""What travels round the ring in tensor attention: keys and values of two sets, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._attention import Window
from .._backend import import_kernels
from .._ring import Work, agree, resolve
from .._sequence import SequenceLayout
from .chunked import chunked_backward, chunked_forward
from .tour import Call, Span, calls_of, plan_tour

_kernels = import_kernels("tensor_attention")


class Ring:
    """One rank's view of a call: its place, the tour, and the block of attention at each stop."""

    def __init__(self, q: Tensor, layout: str, group: str, *options: Any) -> None:
        self.scale, window1, window2, self.form, self.symmetric, self.triton = options
        self.windows: tuple[Window, Window] = ((window1[0], window1[1]), (window2[0], window2[1]))
        self.layout = SequenceLayout.from_key(layout)
        self.channel = resolve(group)
        self.rank, self.world = self.channel.rank, self.channel.size
        self.plan = plan_tour(self.layout, *self.windows, self.symmetric)
        self.dtype = torch.promote_types(q.dtype, torch.float32)

    def agree(self, q: Tensor, k1: Tensor, v1: Tensor, check: str) -> None:
        """See that all ranks make this call, where ``check`` wants it."""
        (batch, heads, _, d), kv_heads, dv = q.shape, k1.shape[1], v1.shape[3]
        shapes = f"batch {batch}, heads {heads}, kv_heads {kv_heads}, d {d}, dv {dv}, {q.dtype}"
        options = f"scale {self.scale}, windows {self.windows}, form {self.form}, symmetric {self.symmetric}"
        call = f"ring_tensor_attention({shapes}, layout {self.layout.key}, {options}, check {check})"
        agree(self.channel, call, q.device, check=check)

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

    def calls(self, streams: Sequence[_Stream]) -> Iterator[Call]:
        keys1, keys2 = (stream.runs for stream in streams)
        return calls_of(self.layout, self.layout.runs(self.rank), keys1, keys2, *self.windows)

    def weight(self, streams: Sequence[_Stream]) -> int:
        """How many pairs of blocks this visit stands for."""
        return 2 if self.symmetric and streams[0].at != streams[1].at else 1

    def operands(self, q: Tensor, streams: Sequence[_Stream]) -> list[Tensor]:
        """q, k1, k2, v1, v2 of a visit. Plain torch gets them wide, and so returns wide; kernels widen inside."""
        (k1, v1), (k2, v2) = (stream.held for stream in streams)
        return [x if self.triton else x.to(self.dtype) for x in (q, k1, k2, v1, v2)]

    def forward(self, operands: Sequence[Tensor], call: Call) -> tuple[Tensor, Tensor]:
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
        call: Call,
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

    def __init__(self, ring: Ring, tag: int, tensors: Sequence[Tensor], halo: Window | None) -> None:
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


class Gradients:
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
