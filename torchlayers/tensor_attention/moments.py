"""Sums over keys in polynomial attention, and what queries read from them: all keys, or windows that move along."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._attention import Window, allowed
from .._tables import table
from .bounds import KEYS
from .monomials import monomials_of, product_of


def _moment(monomials: Tensor, value: Tensor, wide: bool) -> Tensor:
    """Σ_j v_j (k_j)^α for every channel of v and every α: (B, Hk, r, n) and (B, Hk, c, n) to (B, Hk, c, r).

    ``wide`` sums in float64. Without, a key that leaves in other company than it came in would leave rounding behind.
    """
    return value.double() @ monomials.double().mT if wide else value @ monomials.mT


def recomputing(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """``function(*tensors)``, of which the backward pass keeps the tensors alone."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def key_moments(key: Tensor, value: Tensor, degree: int, *, wide: bool) -> Tensor:
    """:func:`_moment` over all keys, in parts that are summed in float64."""

    def moment(key: Tensor, value: Tensor) -> Tensor:
        return _moment(monomials_of(key, degree), value, wide)

    total = key.new_zeros(*value.shape[:-1], math.comb(key.shape[-2] + degree, degree), dtype=torch.float64)
    # A few keys are not worth a second computation.
    apply = moment if key.shape[-1] <= KEYS // 2 else functools.partial(recomputing, moment)
    # Split, not sliced: the gradient of each slice is as long as the whole, which adds up to a square.
    for k, v in zip(key.split(KEYS, -1), value.split(KEYS, -1), strict=True):
        total = total + apply(k, v)
    return total


def query_features(query: Tensor, weights: Tensor, degree: int) -> Tensor:
    """φ(q): (B, Hk, d, N) to (B, Hk, r, N). ``weights`` are (r, 1), or (B, Hk, g + 1, N) coefficients of each query."""
    d = query.shape[-2]
    if weights.ndim == 4:
        numbers = table("tensor_attention_monomials", d, degree, dtype=query.dtype, device=query.device)
        places = table("tensor_attention_monomials", d, degree, dtype=torch.int64, device=query.device)[2]
        weights = weights.index_select(-2, places) * numbers[1][:, None]
    return monomials_of(query, degree) * weights


def _quotient(sums: Tensor, count: Tensor) -> Tensor:
    """Numerators over the denominator, the last entry of axis -2; 0 where no tuple is allowed (count 0)."""
    some = count > 0.5
    return torch.where(some, sums[..., :-1, :] / torch.where(some, sums[..., -1:, :], 1.0), 0.0)


def read_moments(query: Tensor, weights: Tensor, state: Tensor, degree: int) -> Tensor:
    """Outputs (B, Hk, dv, N) of queries (B, Hk, d, N) that all see the same keys, of which ``state`` (B, Hk, dv+1, r)
    holds the product of the moments."""
    return _quotient(state @ query_features(query, weights, degree), state[..., -1:, :1])


def _fixed(number: int) -> int:
    """``number`` as a plain int also where a compiler would keep it symbolic: the loops over blocks depend on it."""
    return range(number).stop


@dataclass(frozen=True)
class _Plan:
    """Which keys of one set a block of queries sees: all of them [low, high), and each some of the ranges ``edges``."""

    low: int
    high: int
    edges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, window: Window, first: int, last: int, keys: int) -> _Plan:
        """For queries at positions ``first`` to ``last``, counted from the set's first key."""

        def clipped(x: int) -> int:
            return min(max(x, 0), keys)

        left, right = window
        begin = 0 if left < 0 else clipped(first - left)
        end = keys if right < 0 else clipped(last + right + 1)
        low = 0 if left < 0 else clipped(last - left)
        high = keys if right < 0 else clipped(first + right + 1)
        if low >= high:
            return cls(begin, begin, ((begin, end),) if begin < end else ())
        return cls(low, high, tuple(e for e in ((begin, low), (high, end)) if e[0] < e[1]))


def _changes(old: _Plan, new: _Plan) -> tuple[bool, list[tuple[int, int, int]]]:
    """How moments over [old.low, old.high) become those over [new.low, new.high): whether they are dropped first, and
    which ranges of keys come (+1) and go (-1). The new range is empty, or neither end moves back."""
    if new.low >= old.high or new.low == new.high:
        return True, [(new.low, new.high, 1)] if new.low < new.high else []
    ranges = [(old.high, new.high, 1), (old.low, new.low, -1)]
    return False, [r for r in ranges if r[0] < r[1]]


class _Span:
    """Keys of one set that a segment of queries touches, in stretches of neighbours, with their monomials.

    ``ranges`` are those that will be asked for. ``keys`` and ``values`` are (B, Hk, c, n) in pieces of ``size``, which
    are joined where needed: the gradient of a slice of the whole would be as long as the whole.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        size: int,
        degree: int,
    ):
        merged: list[tuple[int, int]] = []
        for low, high in sorted(ranges, key=operator.itemgetter(0)):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        self.stretches = []
        for low, high in merged:
            first = low // size
            whole = slice(first, (high - 1) // size + 1)
            cut = slice(low - first * size, high - first * size)
            key, value = (torch.cat(list(pieces[whole]), -1)[..., cut] for pieces in (keys, values))
            self.stretches.append((low, high, monomials_of(key, degree), value))

    def get(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Monomials and values of the keys ``low`` to ``high``, a part of one of the ranges."""
        for begin, end, monomials, value in self.stretches:
            if begin <= low and high <= end:
                return monomials[..., low - begin : high - begin], value[..., low - begin : high - begin]
        raise IndexError(f"no stretch holds the keys {low} to {high}")


def banded_attention(
    query: Tensor,
    weights: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    windows: Sequence[Window],
    offsets: Sequence[int],
    degree: int,
) -> Tensor:
    """Outputs (B, Hk, dv, G, n) where each query sees its own keys. ``query`` is (B, Hk, d, G, n).

    Blocks of queries in order: what all queries of a block see comes from moments that are carried along, gaining the
    keys that enter and losing those that leave; the few keys at the edges are added for each query by a product with
    their mask. ``offsets`` are the position of query 0, then that of key 0 of each set.
    """
    sets, per_query = range(len(keys)), weights.ndim == 5
    n, lengths, offsets = _fixed(query.shape[-1]), [_fixed(k.shape[-1]) for k in keys], [_fixed(o) for o in offsets]
    windows = [(_fixed(left), _fixed(right)) for left, right in windows]
    block = 128 if query.is_cuda else 32
    # A segment is recomputed as a whole in the backward pass, from the moments at its start: about √n in length, so
    # that all starts together take no more memory than one segment.
    segment = max(2 * block, 2 ** round(math.log2(n) / 2))
    key_pieces, value_pieces = ([x.split(segment, -1) for x in xs] for xs in (keys, values))

    def plans(a: int) -> list[_Plan]:
        first, last = offsets[0] + a, offsets[0] + min(a + block, n) - 1
        places = zip(windows, offsets[1:], lengths, strict=True)
        return [_Plan.of(w, first - o, last - o, length) for w, o, length in places]

    def segment_of(begin: int, end: int, before: list[_Plan]) -> Callable[..., tuple[Tensor, ...]]:
        """What computes the outputs of the queries ``begin`` to ``end``, and the moments after them."""
        steps = []
        ranges: list[list[tuple[int, int]]] = [[] for _ in sets]
        for a in range(begin, end, block):
            here = plans(a)
            changes = [_changes(before[t], here[t]) for t in sets]
            for t in sets:
                ranges[t] += [*here[t].edges, *((low, high) for low, high, _ in changes[t][1])]
            steps.append((a - begin, min(a + block, end) - begin, here, changes))
            before = here

        def attend(query: Tensor, weights: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            moments, outputs = list(states), []
            spans = [_Span(ranges[t], key_pieces[t], value_pieces[t], segment, degree) for t in sets]
            features = query_features(query.flatten(-2), weights.flatten(-2) if per_query else weights, degree)
            features = features.unflatten(-1, query.shape[-2:])
            for a, b, here, changes in steps:
                seen = []
                for t in sets:
                    dropped, moves = changes[t]
                    if dropped:
                        moments[t] = torch.zeros_like(moments[t])
                    for low, high, sign in moves:
                        moments[t] = moments[t] + sign * _moment(*spans[t].get(low, high), wide=True)
                    total = moments[t].to(query.dtype)[:, :, None]  # (B, Hk, queries, dv + 1, r)
                    position = torch.arange(a, b, device=query.device) + (begin + offsets[0] - offsets[1 + t])
                    for low, high in here[t].edges:
                        ok = allowed(position, torch.arange(low, high, device=query.device), windows[t])
                        monomials, value = spans[t].get(low, high)
                        masked = (value.unsqueeze(2) * ok[:, None].to(query.dtype)).flatten(2, 3)
                        total = total + (masked @ monomials.mT).unflatten(2, (b - a, -1))
                    seen.append(total)
                product = product_of(seen)
                part = features[..., a:b].permute(0, 1, 4, 2, 3)  # (B, Hk, queries, r, G)
                outputs.append(_quotient(product @ part, product[..., -1:, :1]).permute(0, 1, 3, 4, 2))
            return torch.cat(outputs, -1), *moments

        return attend

    before = plans(0)
    states = [
        key_moments(keys[t][..., p.low : p.high], values[t][..., p.low : p.high], degree, wide=True)
        for t, p in enumerate(before)
    ]
    outputs = []
    for index, part in enumerate(query.split(segment, -1)):
        begin = index * segment
        end = min(begin + segment, n)
        weight = weights[..., begin:end] if per_query else weights
        output, *states = recomputing(segment_of(begin, end, before), part, weight, *states)
        before = plans(begin + (end - begin - 1) // block * block)
        outputs.append(output)
    return torch.cat(outputs, -1)
