"""Where a rank's queries go in ring tensor attention, and in which calls: from the layout and the windows alone."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from torch import Tensor

from .._attention import Window
from .._sequence import SequenceLayout


class _Plan(NamedTuple):
    """``halos``: for each stream the tokens (before, after) that a rank takes of its neighbours, in place of hops;
    ``visits``: pairs of offsets."""

    halos: tuple[Window | None, Window | None]
    visits: tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def plan_tour(layout: SequenceLayout, window1: Window, window2: Window, symmetric: bool) -> _Plan:
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


class Call(NamedTuple):
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


def calls_of(
    layout: SequenceLayout,
    queries: Sequence[range],
    keys1: Sequence[range],
    keys2: Sequence[range],
    window1: Window,
    window2: Window,
) -> Iterator[Call]:
    """The calls that a visit takes; those in which nothing is seen are left out."""
    rows, columns1, columns2 = (_pieces(layout, runs) for runs in (queries, keys1, keys2))
    for document, pieces in rows.items():
        for (i, q), (j, a), (k, b) in product(pieces, columns1[document], columns2[document]):
            band1, band2 = _band(q, a, window1), _band(q, b, window2)
            if band1 is not None and band2 is not None:
                (seen1, shift1), (seen2, shift2) = band1, band2
                start = max(shift1, shift2, 0)
                offsets = (start, start - shift1, start - shift2)
                yield Call((i, len(q)), (j, len(a)), (k, len(b)), seen1, seen2, offsets)


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
