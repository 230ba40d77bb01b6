"""Polynomials of large sparse graphs: nothing of the size of nodes² is made.

Values live on nodes, (N,), and on edges, (S,), aligned with the sorted entries of an
:class:`~torchlayers.polynomial.edges.EdgeSupport`. Two ideas evaluate a pattern:

1. A part that hangs on the rest at one node, or at two nodes that an arc joins, is summed out to values on nodes or on
   edges, and these are factors of what remains. A part of one node is a sparse matrix times a vector, or a
   :func:`~torchlayers.polynomial.edges.masked_product`. Forests need no more, nor do patterns in which
   every such node lies on an arc: triangles, diamonds, fans.
2. What does not come apart so, a cycle of four or a clique of four, is joined: assignments of some of its nodes to the
   graph are listed with their values; another node is added by going through the neighbours of one that is placed
   (that with the fewest) and looking up the others; a node whose arcs are all done is dropped, and assignments that
   have become equal add up. Lists are worked off in pieces, so that what is held at once does not grow with the graph.

Equal parts of several patterns are evaluated once.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._attention import no_autocast
from .._backend import is_traced
from .._checks import check_int, check_ndim, check_same_device, check_size
from .edges import (
    CHUNK,
    EdgeSupport,
    Places,
    add_at,
    build_support,
    check_edges,
    edge_support,
    multiply,
    ordered_triangles,
    pieces,
    ranges,
    triangle_chunks,
)
from .patterns import Pattern

__all__ = ["edge_polynomials", "evaluate_sparse"]


class _Values(NamedTuple):
    """Values on nodes (N,), on entries (S,), or a number (); equal ``key``, equal values."""

    key: int
    value: Tensor


_Pair = tuple[int, int]
_Arc = tuple[int, int, int]  # source, target, colour


class _Network:
    """A pattern in work: factors on its nodes and on its pairs of nodes, None where they are all ones.

    A pair (u, v) has u < v and its values on the entries (j_u, j_v); being in ``pairs`` means that only edges count.
    """

    def __init__(
        self, nodes: dict[int, _Values | None], pairs: dict[_Pair, _Values | None], outputs: tuple[int, ...]
    ) -> None:
        self.nodes, self.pairs, self.outputs = nodes, pairs, outputs

    def neighbours(self, node: int) -> set[int]:
        return {u if v == node else v for u, v in self.pairs if node in (u, v)}

    def without(self, separator: Iterable[int]) -> list[set[int]]:
        """The connected parts that remain when ``separator`` is taken away."""
        rest, parts = set(self.nodes) - set(separator), []
        while rest:
            part, front = set(), {min(rest)}
            while front:
                part |= front
                front = {n for node in front for n in self.neighbours(node)} & rest - part
            parts.append(part)
            rest -= part
        return parts

    def hanging(self) -> tuple[tuple[int, ...], set[int]] | None:
        """A separator, and the smallest part without outputs that hangs on it; None where summing none out helps."""
        found = []
        for separator in [(node,) for node in sorted(self.nodes)] + sorted(self.pairs):
            for part in self.without(separator):
                if not part.isdisjoint(self.outputs):
                    continue
                whole = len(part) + len(separator) == len(self.nodes)
                if whole and set(separator) == set(self.outputs):
                    continue
                # Of a whole that does not come apart, a larger output is a detour, except where all is joined anyway.
                size = len(self.nodes)
                if whole and len(part) > 1 and len(self.pairs) < size * (size - 1) // 2:
                    continue
                found.append((len(part), len(separator), separator, part))
        return min(found)[2:] if found else None

    def part(self, separator: tuple[int, ...], inside: set[int]) -> _Network:
        """What hangs on ``separator``, without the factors there."""
        nodes = {node: self.nodes[node] if node in inside else None for node in sorted((*separator, *inside))}
        pairs = {
            pair: factor if not inside.isdisjoint(pair) else None
            for pair, factor in self.pairs.items()
            if set(pair) <= nodes.keys()
        }
        return _Network(nodes, pairs, separator)

    def remove(self, inside: set[int]) -> None:
        self.nodes = {node: factor for node, factor in self.nodes.items() if node not in inside}
        self.pairs = {pair: factor for pair, factor in self.pairs.items() if inside.isdisjoint(pair)}


# --------------------------------------------------------------------------------------------- order of a join


class _Step(NamedTuple):
    """Place ``node`` next to ``bound``, which are placed already; then drop the nodes of ``done``, keep ``kept``."""

    node: int
    bound: tuple[int, ...]
    done: frozenset[int]
    kept: tuple[int, ...]


# A graph to estimate by, where triangles are as frequent as edges.
_NODES, _DEGREE = 2.0**14, 2.0**4


@functools.lru_cache(maxsize=1024)
def _join_order(size: int, pairs: frozenset[_Pair], outputs: tuple[int, ...]) -> tuple[_Step, ...]:
    """The order in which to place connected nodes 0 .. size - 1, by what the listed candidates are estimated at."""
    near = {node: frozenset(u if v == node else v for u, v in pairs if node in (u, v)) for node in range(size)}
    apart = {node: _distances(node, near) for node in range(size)}

    def at_most(kept: frozenset[int]) -> float:
        """How many assignments of ``kept`` there are: walks along a tree that spans them."""
        if not kept:
            return 1.0
        todo, length = set(kept), 0
        reached = {todo.pop()}
        while todo:
            distance, node = min((min(apart[node][other] for other in reached), node) for node in todo)
            length += distance
            reached.add(node)
            todo.remove(node)
        return _NODES * _DEGREE**length

    best: tuple[float, tuple[_Step, ...]] = (float("inf"), ())

    def search(
        steps: tuple[_Step, ...], placed: frozenset[int], kept: frozenset[int], held: float, cost: float
    ) -> None:
        nonlocal best
        if cost >= best[0]:
            return
        if len(placed) == size:
            best = cost, steps
            return
        for node in range(size):
            bound = tuple(sorted(near[node] & placed))
            if node in placed or (placed and not bound):
                continue
            listed = held * _DEGREE if placed else _NODES
            now, holding = placed | {node}, kept | {node}
            done = frozenset(n for n in holding if near[n] <= now and n not in outputs)
            left = holding - done
            step = _Step(node, bound, done, tuple(sorted(left)))
            fewer = min(listed / _DEGREE ** max(0, len(bound) - 1), at_most(left))
            search((*steps, step), now, left, fewer, cost + listed * max(1, len(bound)))

    search((), frozenset(), frozenset(), 1.0, 0.0)
    return best[1]


def _distances(start: int, near: dict[int, frozenset[int]]) -> dict[int, int]:
    found, front = {start: 0}, [start]
    for node in front:
        for other in near[node] - found.keys():
            found[other] = found[node] + 1
            front.append(other)
    return found


# --------------------------------------------------------------------------------------------------- evaluation


class _Evaluator:
    """Evaluates networks on one graph; ``weights`` are a matrix for each colour, None for ones on all entries."""

    def __init__(self, support: EdgeSupport, weights: Sequence[Tensor | None], dtype: torch.dtype):
        self.support, self.weights, self.dtype = support, weights, dtype
        self.row, self.col = support.row.long(), support.col.long()
        self.num_nodes, self.num_entries = support.num_nodes, support.row.shape[0]
        # Zeros are left out of a join, except where they may have a gradient.
        self.prune = not any(w is not None and w.requires_grad for w in weights)
        self.keys: dict[tuple, int] = {}
        self.known: dict[int, Tensor] = {}

    @functools.cached_property
    def places(self) -> Places:
        return Places.of(self.support)

    @functools.cached_property
    def degrees(self) -> Tensor:
        return self.support.offsets.diff().long()

    @functools.cached_property
    def begins(self) -> Tensor:
        return self.support.offsets[:-1].long()

    def once(self, what: tuple, make: Callable[[], Tensor]) -> _Values:
        key = self.keys.setdefault(what, len(self.keys))
        if key not in self.known:
            self.known[key] = make()
        return _Values(key, self.known[key])

    def times(self, first: _Values | None, second: _Values | None) -> _Values | None:
        if first is None or second is None:
            return first if second is None else second
        return self.once(("times", *sorted((first.key, second.key))), lambda: first.value * second.value)

    def turned(self, values: _Values | None) -> _Values | None:
        """Values on (u, v) as values on (v, u)."""
        if values is None:
            return None
        return self.once(("turned", values.key), lambda: values.value.index_select(0, self.support.reverse))

    def weight(self, colour: int) -> _Values | None:
        weight = self.weights[colour]
        return None if weight is None else self.once(("weight", colour), lambda: weight)

    def diagonal(self, colour: int) -> _Values:
        def make() -> Tensor:
            weight, loops = self.weights[colour], self.support.loops
            if loops is None:
                return torch.zeros(self.num_nodes, dtype=self.dtype, device=self.row.device)
            padded = torch.cat([self.ones(self.num_entries) if weight is None else weight, self.row.new_zeros(1)])
            return padded.to(self.dtype).index_select(0, loops)

        return self.once(("diagonal", colour), make)

    def ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self.dtype, device=self.row.device)

    # Building and taking apart

    def network(self, arcs: Iterable[_Arc], outputs: tuple[int, ...], size: int) -> _Network:
        nodes: dict[int, _Values | None] = dict.fromkeys(range(size))
        pairs: dict[_Pair, _Values | None] = {}
        for u, v, colour in arcs:
            if u == v:
                nodes[u] = self.times(nodes[u], self.diagonal(colour))
                continue
            pair, weight = (u, v), self.weight(colour)
            if u > v:
                pair, weight = (v, u), self.turned(weight)
            pairs[pair] = self.times(pairs.get(pair), weight)
        return _Network(nodes, pairs, tuple(dict.fromkeys(outputs)))

    def evaluate(self, network: _Network) -> _Values | None:
        """A number, values on nodes, or on the entries (j_a, j_b) for outputs a < b; None for ones.

        The network is connected, and of two outputs a pair: parts that are not are what :meth:`total` multiplies.
        """
        while (found := network.hanging()) is not None:
            separator, inside = found
            value = self.evaluate(network.part(separator, inside))
            network.remove(inside)
            if len(separator) == 1:
                network.nodes[separator[0]] = self.times(network.nodes[separator[0]], value)
            else:
                network.pairs[separator] = self.times(network.pairs[separator], value)  # type: ignore[index]
        nodes, pairs, outputs = network.nodes, network.pairs, network.outputs
        black = sorted(nodes.keys() - outputs)
        if not black:
            if len(outputs) == 1:
                return nodes[outputs[0]]
            a, b = outputs
            value = pairs[(a, b)]
            return self.times(self.times(value, self._on_entries(nodes[a], "row")), self._on_entries(nodes[b], "col"))
        if len(black) == 1 and len(nodes) == len(outputs) + 1:
            found_value = self._sum_one(network, black[0])
            rest = _Network(
                {n: nodes[n] for n in outputs}, {p: f for p, f in pairs.items() if black[0] not in p}, outputs
            )
            return found_value if not outputs else self._with_factors(found_value, rest)
        return self._join_once(network)

    def _on_entries(self, factor: _Values | None, end: Literal["row", "col"]) -> _Values | None:
        """Values on nodes as values on the entries that begin there, or end."""
        if factor is None:
            return None
        return self.once((end, factor.key), lambda: factor.value.index_select(0, getattr(self.support, end)))

    def _with_factors(self, value: _Values, rest: _Network) -> _Values | None:
        """``value``, of the outputs, times the factors that they have themselves."""
        if len(rest.outputs) == 1:
            return self.times(value, rest.nodes[rest.outputs[0]])
        rest.pairs[rest.outputs] = self.times(rest.pairs[rest.outputs], value)  # type: ignore[index]
        return self.evaluate(rest)

    def _oriented(self, network: _Network, u: int, v: int) -> _Values | None:
        """The factor of a pair, on the entries (j_u, j_v)."""
        return network.pairs[(u, v)] if u < v else self.turned(network.pairs[(v, u)])

    def _sum_one(self, network: _Network, node: int) -> _Values:
        """Sum over the one black node: all there is, or next to one output, or next to two."""
        factor, outputs = network.nodes[node], network.outputs
        key = None if factor is None else factor.key
        if not outputs:
            return self.once(
                ("sum", key), lambda: (self.ones(self.num_nodes) if factor is None else factor.value).sum()
            )
        if len(outputs) == 1:
            sent = self.times(self._oriented(network, outputs[0], node), self._on_entries(factor, "col"))

            def gather() -> Tensor:
                value = self.ones(self.num_entries) if sent is None else sent.value
                return add_at(value.new_zeros(self.num_nodes), self.support.row, value)

            return self.once(("gather", None if sent is None else sent.key), gather)
        first, second = self._oriented(network, outputs[0], node), self._oriented(network, node, outputs[1])
        first = self.times(first, self._on_entries(factor, "col"))
        keys = tuple(None if t is None else t.key for t in (first, second))

        def product() -> Tensor:
            a, b = (self.ones(self.num_entries) if t is None else t.value for t in (first, second))
            return multiply(a, b, self.support)

        return self.once(("product", *keys), product)

    # Joining

    def _join_once(self, network: _Network) -> _Values:
        number = {node: i for i, node in enumerate(sorted(network.nodes))}
        nodes = tuple(network.nodes[node] for node in number)
        pairs = {(number[u], number[v]): factor for (u, v), factor in sorted(network.pairs.items())}
        outputs = tuple(number[node] for node in network.outputs)
        key = (
            "join", outputs, tuple(None if f is None else f.key for f in nodes),
            tuple((pair, None if f is None else f.key) for pair, f in pairs.items()),
        )  # fmt: skip
        return self.once(key, lambda: _Join(self, nodes, pairs, outputs).run())

    def total(self, arcs: Sequence[_Arc], outputs: tuple[int, ...], size: int) -> _Values | None:
        """The polynomial; see :meth:`evaluate` for where its values are."""
        whole = self.network(arcs, outputs, size)
        value: _Values | None = None
        for part in whole.without(()):
            own = tuple(sorted(set(whole.outputs) & part))
            nodes = {node: whole.nodes[node] for node in sorted(part)}
            pairs = {pair: factor for pair, factor in whole.pairs.items() if pair[0] in part}
            value = self.times(value, self.evaluate(_Network(nodes, pairs, own)))
        return value


class _Join:
    """One network that does not come apart, with its nodes numbered from 0 on, summed over all assignments."""

    def __init__(
        self,
        evaluator: _Evaluator,
        nodes: tuple[_Values | None, ...],
        pairs: dict[_Pair, _Values | None],
        outputs: tuple[int, ...],
    ) -> None:
        self.graph, self.nodes, self.pairs, self.outputs = evaluator, nodes, pairs, outputs
        self.steps = _join_order(len(nodes), frozenset(pairs), outputs)
        shape = ((), (evaluator.num_nodes,), (evaluator.num_entries,))[len(outputs)]
        self.out = torch.zeros(shape, dtype=evaluator.dtype, device=evaluator.row.device)

    def run(self) -> Tensor:
        graph = self.graph
        u, v, w = (step.node for step in self.steps[:3])
        # With loops, the three nodes of a triangle need not be three.
        if set(self.steps[2].bound) == {u, v} and graph.support.loops is None:
            for chunk in triangle_chunks(graph.support):
                uv, uw, wv = ordered_triangles(chunk, graph.support.reverse)
                columns = {u: graph.row[uv], v: graph.col[uv], w: graph.col[uw]}
                values = self._weigh(None, columns, (u, v, w), {(u, v): uv, (u, w): uw, (w, v): wv})
                done = self.steps[1].done | self.steps[2].done
                self._settle(2, {n: c for n, c in columns.items() if n not in done}, values, bool(done))
        else:
            for start in range(0, graph.num_entries, CHUNK):
                entry = torch.arange(start, min(start + CHUNK, graph.num_entries), device=graph.row.device)
                columns = {u: graph.row[entry], v: graph.col[entry]}
                self._settle(1, columns, self._weigh(None, columns, (u, v), {(u, v): entry}), False)
        return self.out

    def _weigh(
        self,
        values: Tensor | None,
        columns: dict[int, Tensor],
        nodes: tuple[int, ...],
        entries: dict[_Pair, Tensor],
    ) -> Tensor:
        """``values`` times the factors of ``nodes`` and of pairs whose entries are given."""
        factors = [f.value.index_select(0, columns[node]) for node in nodes if (f := self.nodes[node]) is not None]
        for (u, v), entry in entries.items():
            if (pair := self.pairs[(min(u, v), max(u, v))]) is not None:
                at = entry if u < v else self.graph.support.reverse.index_select(0, entry)
                factors.append(pair.value.index_select(0, at))
        for factor in factors:
            values = factor if values is None else values * factor
        return self.graph.ones(columns[nodes[0]].shape[0]) if values is None else values

    def _settle(self, step: int, columns: dict[int, Tensor], values: Tensor, fewer: bool) -> None:
        """Go on from the assignments after ``step``; ``fewer``: nodes were dropped, and some may be equal."""
        if self.graph.prune:
            kept = values.nonzero().flatten()
            if kept.shape[0] < values.shape[0]:
                columns = {node: column.index_select(0, kept) for node, column in columns.items()}
                values = values.index_select(0, kept)
        if step + 1 == len(self.steps):
            self._finish(columns, values)
        elif values.shape[0]:
            if fewer:
                columns, values = self._coalesce(columns, values)
            self._place(step + 1, columns, values)

    def _finish(self, columns: dict[int, Tensor], values: Tensor) -> None:
        if not self.outputs:
            self.out += values.sum()
        elif len(self.outputs) == 1:
            self.out.index_add_(0, columns[self.outputs[0]], values)
        else:
            a, b = (columns[node] for node in self.outputs)
            which, entry = self.graph.places.find(a * self.graph.num_nodes + b)
            self.out.index_add_(0, entry, values.index_select(0, which))

    def _coalesce(self, columns: dict[int, Tensor], values: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Add up the values of equal assignments."""
        limit, bound, key = self.graph.num_nodes, 1, torch.zeros_like(next(iter(columns.values())))
        for column in columns.values():
            if bound * limit >= 2**62:
                key = torch.unique(key, return_inverse=True)[1]
                bound = key.shape[0]
            key, bound = key * limit + column, bound * limit
        key, order = torch.sort(key)
        new = torch.ones_like(key, dtype=torch.bool)
        torch.ne(key[1:], key[:-1], out=new[1:])
        first = order[new]
        summed = values.new_zeros(first.shape[0]).index_add_(0, new.cumsum(0) - 1, values.index_select(0, order))
        return {node: column.index_select(0, first) for node, column in columns.items()}, summed

    def _place(self, step: int, columns: dict[int, Tensor], values: Tensor) -> None:
        """Extend each assignment by the candidates for the node of ``step``, a piece of the list at a time."""
        graph, (node, bound, done, kept) = self.graph, self.steps[step]
        places = torch.stack([columns[n] for n in bound])
        degrees, order = graph.degrees[places].sort(dim=0)
        places = places.gather(0, order)
        # Entries come by degree and go back to the order of ``bound``.
        order = order.argsort(dim=0)
        for piece in pieces(degrees[0], CHUNK):
            entry, owner = ranges(graph.begins[places[0, piece]], degrees[0, piece])
            owner += piece.start
            placed, entries = graph.col.index_select(0, entry), [entry]
            for others in places[1:]:
                which, place = graph.places.find(others.index_select(0, owner) * graph.num_nodes + placed)
                owner, placed = owner.index_select(0, which), placed.index_select(0, which)
                entries = [*(e.index_select(0, which) for e in entries), place]
            sorted_back = torch.stack(entries).gather(0, order.index_select(1, owner))
            found = {(n, node): e for n, e in zip(bound, sorted_back, strict=True)}
            extended = self._weigh(values.index_select(0, owner), {node: placed}, (node,), found)
            if done == {node}:
                # Back to the assignments they come from, of which no two are equal.
                here, place = torch.unique_consecutive(owner, return_inverse=True)
                extended = extended.new_zeros(here.shape[0]).index_add_(0, place, extended)
                self._settle(step, {n: columns[n].index_select(0, here) for n in kept}, extended, False)
                continue
            moved = {n: placed if n == node else columns[n].index_select(0, owner) for n in kept}
            self._settle(step, moved, extended, bool(done))


# ------------------------------------------------------------------------------------------------ entry points


def polynomials_on(
    patterns: Sequence[Pattern],
    support: EdgeSupport,
    weights: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    wanted: Tensor | bool = False,
) -> list[Tensor]:
    """Polynomials of the graph whose colours have ``weights`` (S,) on the entries, None for ones on all of them.

    Args:
        dtype: that of the weights, int64 or floating. Integers are exact, or an OverflowError.
        wanted: the entries at which polynomials with two outputs are wanted: (S,) bool, or True for all; False: those
            without an arc from output to output are refused.

    Returns:
        For each pattern a number (), values on the nodes (N,), or on the entries (S,).
    """
    if wanted is not False:
        # One more colour, and an arc of it between outputs without one.
        weights = [*weights, wanted.to(dtype) if isinstance(wanted, Tensor) else None]
    evaluator = _Evaluator(support, weights, dtype)
    largest = functools.cache(lambda: _sizes(support, weights))
    absolute = functools.cache(
        lambda: _Evaluator(support, [None if w is None else w.abs().double() for w in weights], torch.float64)
    )
    results = []
    for pattern in patterns:
        arcs = [(arc[0], arc[1], arc[2] if len(arc) == 3 else 0) for arc in pattern.edges]
        if len(set(pattern.outputs)) == 2 and not _on_edges(pattern):
            if wanted is False:
                raise ValueError(
                    f"two outputs must have an arc from the first to the second, got {pattern!r}: without, the result "
                    "is not zero away from the edges, and has nodes² entries; pass edge_index= for some of them"
                )
            arcs.append((*pattern.outputs, len(weights) - 1))  # type: ignore[arg-type]
        if dtype == torch.int64 and _bound(arcs, pattern.num_nodes, support.num_nodes, *largest()) >= 2.0**63:
            sums = _values(arcs, pattern, absolute())
            if sums.numel() and float(sums.max()) >= 2.0**63 * (1 - 1e-9):
                raise OverflowError(
                    f"values must stay below 2^63 to be exact in int64, got up to {float(sums.max()):.3g} for "
                    f"{pattern!r} (float64 weights take any)"
                )
        # Where sums of absolute values stay below 2^63, so does the result, and what wraps around on the way to it
        # wraps back.
        results.append(_values(arcs, pattern, evaluator))
    return results


def _on_edges(pattern: Pattern) -> bool:
    """Whether the values at two outputs are zero wherever there is no edge from the first to the second."""
    pairs = {arc[:2] for arc in pattern.edges}
    a, b = pattern.outputs
    return (a, b) in pairs or (not pattern.directed and (b, a) in pairs)


def _sizes(support: EdgeSupport, weights: Sequence[Tensor | None]) -> tuple[float, float]:
    """The largest absolute weight, and the largest sum of them over the entries of a node; at least 1."""
    if support.row.shape[0] == 0:
        return 1.0, 1.0
    most = sums = 1.0
    for weight in weights:
        if weight is None:
            sums = max(sums, float(support.offsets.diff().max()))
            continue
        absolute = weight.double().abs()
        most = max(most, float(absolute.max()))
        zero = absolute.new_zeros(support.num_nodes)
        sums = max(sums, *(float(zero.index_add(0, at, absolute).max()) for at in (support.row, support.col)))
    return most, sums


def _bound(arcs: Sequence[_Arc], size: int, num_nodes: int, most: float, sums: float) -> float:
    """What no value exceeds: choose a node for each part, go on along a tree, and weigh the other arcs."""
    pairs: dict[_Pair, _Values | None] = {(min(u, v), max(u, v)): None for u, v, _ in arcs if u != v}
    parts = len(_Network(dict.fromkeys(range(size)), pairs, ()).without(()))
    tree = size - parts
    return max(1.0, float(num_nodes)) ** parts * sums**tree * most ** (len(arcs) - tree)


def _values(arcs: Sequence[_Arc], pattern: Pattern, evaluator: _Evaluator) -> Tensor:
    found = evaluator.total(arcs, pattern.outputs, pattern.num_nodes)
    shape = ((), (evaluator.num_nodes,), (evaluator.num_entries,))[len(set(pattern.outputs))]
    value = evaluator.ones(1)[0] if found is None else found.value
    value = value.expand(shape)
    if len(set(pattern.outputs)) < len(pattern.outputs):  # on the diagonal
        return value.index_select(0, evaluator.row) * (evaluator.row == evaluator.col)
    return value


class _Adjacency(NamedTuple):
    """A sparse tensor's own entries, its colours on them, and how to make a tensor like it."""

    edges: Tensor
    colours: list[Tensor]
    rebuild: Callable[[Tensor], Tensor]


def _read(adj: Tensor) -> _Adjacency:
    if not isinstance(adj, Tensor) or adj.layout == torch.strided:
        what = f"a dense tensor of shape {tuple(adj.shape)}" if isinstance(adj, Tensor) else type(adj).__name__
        raise TypeError(f"adj must be a sparse tensor, CSR or COO, got {what}")
    check_ndim(
        "adj", adj, (2, 3) if adj.layout == torch.sparse_coo else 2, "(nodes, nodes), or COO (colours, nodes, nodes)"
    )
    if adj.dense_dim():
        raise ValueError(f"adj must have sparse dimensions alone, got {adj.dense_dim()} dense ones")
    if adj.shape[-1] != adj.shape[-2]:
        raise ValueError(f"adj must be square, got shape {tuple(adj.shape)}")
    if adj.dtype.is_complex:
        raise TypeError(f"adj must be real, got {adj.dtype}")
    nodes = adj.shape[-1]
    if adj.layout == torch.sparse_csr:
        crow, col = adj.crow_indices(), adj.col_indices()
        row = torch.repeat_interleave(crow.diff().long())

        def rebuild_csr(values: Tensor) -> Tensor:
            return torch.sparse_csr_tensor(crow, col, values, (nodes, nodes), check_invariants=False)

        return _Adjacency(torch.stack([row, col.long()]), [adj.values()], rebuild_csr)
    adj = adj.to_sparse_coo().coalesce()
    index, values = adj.indices(), adj.values()
    colours = [values]
    if adj.ndim == 3:
        # All colours on the edges of any.
        keys, place = torch.unique(index[1] * nodes + index[2], return_inverse=True)
        zero = values.new_zeros(keys.shape[0])
        own = [(index[0] == colour).nonzero().flatten() for colour in range(adj.shape[0])]
        colours = [zero.index_copy(0, place[which], values[which]) for which in own]
        index = torch.stack([keys // max(1, nodes), keys % max(1, nodes)])

    def rebuild_coo(values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(index, values, (nodes, nodes), is_coalesced=True, check_invariants=False)

    return _Adjacency(index, colours, rebuild_coo)


def evaluate_sparse(
    patterns: Pattern | Sequence[Pattern],
    adj: Tensor,
    dtype: torch.dtype | None = None,
    edge_index: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """Evaluate the polynomials of patterns on a sparse graph, without ever making a matrix of nodes × nodes:

        P_H(X)[i_out...] = Σ_j Π_{(r, s) in H} X[j_r, j_s]        j: nodes of H -> nodes of the graph, j_out = i_out

    (Puny et al., arXiv 2302.11556, section 3). Parts with at most two neighbours that an arc joins are sums over edges
    or triangles; what is left, such as cycles and cliques of four and more, is a join of edge lists in pieces. Memory
    is of the order of the edges (where a gradient is asked for, of what is summed); time is that of listing what the
    pattern's hardest part maps onto, such as triangles for a clique of four and paths for a cycle of four.

    Differentiable in the values of a floating ``adj``.

    Args:
        patterns: one pattern, or several, which share what they have in common. Patterns that are not directed need a
            symmetric ``adj``.
        adj: (N, N), ``torch.sparse_csr`` or ``torch.sparse_coo``, or, for patterns with colours, COO (colours, N, N).
            Integers and bools are counted with in int64, exactly; entries that a COO tensor has twice add up.
        dtype: that of the result. By default int64 for integers and bools, else that of ``adj``. Floating values are
            cast to it first (16-bit ones are computed in float32), exact integers afterwards.
        edge_index: (2, E), the pairs of nodes at which polynomials with two outputs are wanted, any pairs.

    Returns:
        For a pattern without output a number (); with one output (N,), dense; with two outputs, (E,), the values at
        ``edge_index``, or, without that, a sparse tensor with the layout and the entries of ``adj``, which is where the
        polynomial is not zero. A list of these for several patterns.

    Raises:
        TypeError: ``adj`` is dense or complex, or floating with an integer ``dtype``; ``patterns`` are no patterns.
        ValueError: ``adj`` is not square, or not symmetric for an undirected pattern, or has fewer colours than a
            pattern; without ``edge_index``, two outputs without an arc from the first to the second, or the same node
            twice: the result has entries elsewhere than on edges.
        OverflowError: an integer result does not fit int64.

    Example:
        >>> edges = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 3], [1, 2, 0, 2, 0, 1, 3, 2]])
        >>> adj = torch.sparse_coo_tensor(edges, torch.ones(8, dtype=torch.int64), (4, 4))
        >>> evaluate_sparse(Pattern.clique(3, outputs=(0,)), adj)
        tensor([2, 2, 2, 0])
        >>> evaluate_sparse(Pattern.clique(3, outputs=(0, 1)), adj).to_dense()[0]
        tensor([0, 1, 1, 0])
    """
    single = isinstance(patterns, Pattern)
    chosen = [patterns] if isinstance(patterns, Pattern) else list(patterns)
    for i, pattern in enumerate(chosen):
        if not isinstance(pattern, Pattern):
            raise TypeError(f"patterns[{i}] must be a Pattern, got {type(pattern).__name__}")
    index, colours, rebuild = _read(adj)
    num_nodes, num_edges = adj.shape[-1], index.shape[1]
    exact = not adj.dtype.is_floating_point
    if dtype is None:
        dtype = torch.int64 if exact else adj.dtype
    if not exact and not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating for an adj of {adj.dtype}, got {dtype}")
    if edge_index is not None:
        check_edges(edge_index, num_nodes)
        check_same_device("edge_index", edge_index, "adj", index)
        index = torch.cat([index, edge_index.long()], dim=1)
    else:
        for pattern in chosen:
            if len(pattern.outputs) == 2 and len(set(pattern.outputs)) == 1:
                raise ValueError(
                    f"two outputs must be two nodes, got {pattern!r}: its values are on the diagonal, not on edges; "
                    "take one output, or pass edge_index="
                )
    support = build_support(index, num_nodes)
    mine, asked = support.entry[:num_edges], None if edge_index is None else support.entry[num_edges:]
    with no_autocast(adj):
        values = _weighted(chosen, support, mine, colours, dtype, asked, adj.ndim == 3)
    results = []
    for pattern, value in zip(chosen, values, strict=True):
        if len(pattern.outputs) == 2:
            value = value.index_select(0, mine if asked is None else asked).to(dtype)
            results.append(rebuild(value) if asked is None else value)
        else:
            results.append(value.to(dtype, copy=True))
    return results[0] if single else results


def polynomials_of_edges(
    patterns: Sequence[Pattern], edge_index: Tensor, num_nodes: int, edge_weight: Tensor | None = None
) -> list[Tensor]:
    """Polynomials of the graph that ``edge_index`` (2, E) gives, at its nodes and edges: (), (N,) or (E,) a pattern.

    Args:
        edge_weight: (E,), or (E, colours) for patterns with colours; int64 and bool are exact, floating ones come back
            in their dtype. None: ones, in int64, and an edge given twice counts once.

    Raises:
        As :func:`evaluate_sparse` does; ValueError also for an edge given twice with weights.
    """
    if edge_weight is None:
        support = build_support(edge_index, num_nodes)
        # Each entry once, however often it is given.
        weight = torch.zeros(support.row.shape[0], dtype=torch.int64, device=edge_index.device)
        mine = torch.arange(support.row.shape[0], device=edge_index.device)
        colours = [weight.index_fill(0, support.entry.long(), 1)]
    else:
        support = edge_support(edge_index, num_nodes)
        mine = support.entry
        colours = [edge_weight] if edge_weight.ndim == 1 else list(edge_weight.unbind(1))
    dtype = colours[0].dtype if colours[0].dtype.is_floating_point else torch.int64
    coloured = edge_weight is not None and edge_weight.ndim == 2
    with no_autocast(colours[0]):
        values = _weighted(patterns, support, mine, colours, dtype, support.entry, coloured)
    values = [
        v.index_select(0, support.entry) if len(p.outputs) == 2 else v for p, v in zip(patterns, values, strict=True)
    ]
    return [value.to(dtype, copy=True) for value in values]


def _weighted(
    patterns: Sequence[Pattern],
    support: EdgeSupport,
    mine: Tensor,
    colours: Sequence[Tensor],
    dtype: torch.dtype,
    asked: Tensor | None,
    coloured: bool,
) -> list[Tensor]:
    """:func:`polynomials_on` of weights on the entries ``mine``, wanted at the entries ``asked``."""
    compute = torch.promote_types(dtype, torch.float32) if colours[0].dtype.is_floating_point else torch.int64
    zero = torch.zeros(support.row.shape[0], dtype=compute, device=support.row.device)
    weights = [zero.index_add(0, mine, colour.to(compute)) for colour in colours]
    _check_patterns(patterns, weights, support, coloured)
    wanted: Tensor | bool = False
    if asked is not None:
        wanted = torch.zeros_like(zero, dtype=torch.bool).index_fill(0, asked.long(), True)
        wanted = True if bool(wanted.all()) else wanted
    # Ones on all entries need not be multiplied by.
    plain = [None if not w.requires_grad and bool((w == 1).all()) else w for w in weights]
    return polynomials_on(patterns, support, plain, compute, wanted=wanted)


def _is_symmetric(weight: Tensor, support: EdgeSupport) -> bool:
    back = weight.index_select(0, support.reverse)
    if torch.equal(weight, back) or not weight.dtype.is_floating_point:
        return torch.equal(weight, back)
    # Products of rounded factors, D^-1/2 A D^-1/2 say, differ from their transpose by rounding.
    return bool(((weight - back).abs() <= 16 * torch.finfo(weight.dtype).eps * weight.abs().max()).all())


def _check_patterns(
    patterns: Sequence[Pattern], weights: Sequence[Tensor], support: EdgeSupport, coloured: bool
) -> None:
    symmetric = functools.cache(lambda colour: _is_symmetric(weights[colour].detach(), support))
    for pattern in patterns:
        if any(len(arc) == 3 for arc in pattern.edges) != coloured and pattern.edges:
            shape = "(nodes, nodes)" if not coloured else "(colours, nodes, nodes)"
            raise ValueError(
                f"arcs must {'' if coloured else 'not '}have a colour for an adj of {shape}, got {pattern!r}"
            )
        colours = {arc[2] if len(arc) == 3 else 0 for arc in pattern.edges}
        if colours and max(colours) >= len(weights):
            raise ValueError(f"adj must have a colour {max(colours)} for {pattern!r}, got {len(weights)} colours")
        if not pattern.directed and not all(symmetric(colour) for colour in colours):
            raise ValueError(
                f"adj must be symmetric for an undirected pattern, got one that is not, and {pattern!r}; "
                "Pattern(..., directed=True) takes any"
            )


def _stacked(patterns: Sequence[Pattern], edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int) -> Tensor:
    columns = polynomials_of_edges(patterns, edge_index, num_nodes, edge_weight)
    if columns:
        return torch.stack(columns, dim=-1)
    dtype = edge_weight.dtype if edge_weight is not None and edge_weight.dtype.is_floating_point else torch.int64
    return torch.zeros(edge_index.shape[1], 0, dtype=dtype, device=edge_index.device)


@torch.library.custom_op("torchlayers::edge_polynomials", mutates_args=())
def _op(edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int, patterns: str) -> Tensor:
    return _stacked(_decoded(patterns), edge_index, edge_weight, num_nodes)


@_op.register_fake
def _(edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int, patterns: str) -> Tensor:
    dtype = edge_weight.dtype if edge_weight is not None and edge_weight.dtype.is_floating_point else torch.int64
    return edge_index.new_empty((edge_index.shape[1], len(ast.literal_eval(patterns))), dtype=dtype)


def encoded(patterns: Sequence[Pattern]) -> str:
    """Patterns as a string, for an operation's schema."""
    return repr([(p.edges, p.outputs, p.directed, p.num_nodes) for p in patterns])


@functools.lru_cache(maxsize=256)
def _decoded(patterns: str) -> tuple[Pattern, ...]:
    parts = ast.literal_eval(patterns)
    return tuple(Pattern(edges, outputs, directed, num_nodes=size) for edges, outputs, directed, size in parts)


def check_edge_patterns(patterns: object) -> tuple[Pattern, ...]:
    """``patterns`` as a tuple, each of which has two outputs."""
    chosen = (patterns,) if isinstance(patterns, Pattern) else tuple(patterns)  # type: ignore[arg-type]
    for i, pattern in enumerate(chosen):
        if not isinstance(pattern, Pattern):
            raise TypeError(f"patterns[{i}] must be a Pattern, got {type(pattern).__name__}")
        if len(pattern.outputs) != 2:
            raise ValueError(f"patterns[{i}] must have two outputs, source and target of an edge, got {pattern!r}")
    return chosen


def edge_polynomials(
    patterns: Pattern | Sequence[Pattern],
    edge_index: Tensor,
    num_nodes: int | None = None,
    edge_weight: Tensor | None = None,
) -> Tensor:
    """Values of polynomials with two outputs at the edges of a graph: channels of edge features.

    They are those of the matrix with ``edge_weight``, or ones, at the edges: see :func:`evaluate_sparse`, which this
    is for edge lists. Differentiable in a floating ``edge_weight``, outside of ``torch.compile``.

    Args:
        patterns: F patterns with two outputs, the source and the target of an edge, with or without an arc between
            them. Those that are not directed need every edge in both directions, with equal weights.
        edge_index: (2, E), int64 or int32, rows (source, target), in any order. Without weights an edge may be given
            twice, and counts once.
        num_nodes: N; by default the largest entry and one more. ``torch.compile`` needs it.
        edge_weight: (E,), or (E, colours) for patterns with colours.

    Returns:
        (E, F), int64 and exact for integer weights or none, else in the dtype of ``edge_weight``.

    Raises:
        TypeError: what should be patterns or integers is not.
        ValueError: shapes that do not fit, entries out of range, an edge twice with weights, a pattern without two
            outputs, one-way edges with a pattern that is not directed.
        OverflowError: an integer result does not fit int64.

    Example:
        >>> edge_index = torch.tensor([[0, 1, 1, 2, 0, 2, 2, 3], [1, 0, 2, 1, 2, 0, 3, 2]])
        >>> edge_polynomials([Pattern.clique(3, outputs=(0, 1)), Pattern.path(2, outputs=(0, 2))], edge_index).T
        tensor([[1, 1, 1, 1, 1, 1, 0, 0],
                [1, 1, 1, 1, 1, 1, 0, 0]])
    """
    chosen = check_edge_patterns(patterns)
    check_ndim("edge_index", edge_index, 2, "(2, edges)")
    if num_nodes is None:
        num_nodes = int(edge_index.max()) + 1 if edge_index.numel() else 0
    check_int("num_nodes", num_nodes, minimum=0)
    check_edges(edge_index, num_nodes)
    if edge_weight is not None:
        check_ndim("edge_weight", edge_weight, (1, 2), "(edges,) or (edges, colours)")
        check_size("edge_weight", edge_weight, 0, edge_index.shape[1], "the number of edges")
        check_same_device("edge_weight", edge_weight, "edge_index", edge_index)
        if edge_weight.dtype.is_complex:
            raise TypeError(f"edge_weight must be real, got {edge_weight.dtype}")
    if is_traced():
        return _op(edge_index, edge_weight, num_nodes, encoded(chosen))
    return _stacked(chosen, edge_index, edge_weight, num_nodes)
