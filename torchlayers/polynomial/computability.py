"""What a network can compute: which patterns its bank of tensor operations reaches, and which it misses.

A network computes the polynomial of a pattern if some order of summing over the black nodes uses only operations that
its layers have (Puny et al. 2023, arXiv 2302.11556, section 4). Message passing sums over nodes with one neighbour: its
patterns are forests. A product of matrices sums over nodes with two: its patterns are those of treewidth 2. So the
least degree of a missed pattern measures expressive power, and the missed patterns are what to give to the network as
features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from .._checks import check_choice, check_int
from .patterns import Pattern

__all__ = ["BANKS", "Bank", "is_computable"]

# Nodes still to be summed over; pairs (row, column) that carry a matrix; results on one node, by their form.
_State: TypeAlias = tuple[frozenset[int], frozenset[tuple[int, int]], frozenset[tuple[str, int]]]


@dataclass(frozen=True)
class Bank:
    """The tensor operations of a family of networks, as far as they decide which patterns it computes.

    Args:
        neighbours: a black node can be summed over while it has at most so many neighbours, that is, other nodes that
            share an arc or an intermediate result with it. 1: results lie on nodes (message passing); 2: on pairs
            (matrix products); k: on k-tuples (k-dimensional folklore Weisfeiler-Leman).
        transpose: arcs can be read against their direction. Without it, a node bank sends messages along ``source ->
            target`` only (the convention of PyTorch Geometric), and a matrix bank cannot form a transposed matrix.
            Undirected patterns do without.
        parallel: entries of X for the same pair of different nodes can be multiplied with one another, as a learned
            message function of edge features does; a sum of neighbours weighted by X cannot. Matrix banks always can.
        loops: a network can tell the diagonal from the rest, by node features or an identity channel, and so use the
            factors ``X[a, a]``.

    Raises:
        ValueError: for ``neighbours < 1``; without ``parallel`` for more than one neighbour, without ``transpose`` or
            ``loops`` for more than two (a network on tuples can permute and compare their entries).
    """

    neighbours: int
    transpose: bool = True
    parallel: bool = True
    loops: bool = True

    def __post_init__(self) -> None:
        check_int("neighbours", self.neighbours)
        for name, most in (("parallel", 1), ("transpose", 2), ("loops", 2)):
            if self.neighbours > most and not getattr(self, name):
                raise ValueError(f"{name} must be True for neighbours > {most}, got neighbours={self.neighbours}")


_SUM = Bank(1, transpose=False, parallel=False)
_MESSAGE = Bank(1, transpose=False)

BANKS: Mapping[str, Bank] = MappingProxyType(
    {
        # The two prototypes.
        "node": Bank(1),
        "edge": Bank(2),
        # Sums of neighbours, with X the matrix that the layer propagates with: edge weights enter linearly.
        "gcn": _SUM,
        "sage": _SUM,
        "graphconv": _SUM,
        "gin": _SUM,
        "gat": _SUM,
        # The same along and against the arcs, each with weights of its own.
        "dir_gnn": Bank(1, parallel=False),
        # Messages that are learned functions of edge features.
        "mpnn": _MESSAGE,
        "gine": _MESSAGE,
        "nnconv": _MESSAGE,
        "gatedgcn": _MESSAGE,
        "transformer": _MESSAGE,
        # Matrix products.
        "ppgn": Bank(2, transpose=False, loops=False),
        "ppgn++": Bank(2),
    }
)
"""Preset banks by name.

``"node"`` and ``"edge"`` are the prototypes. ``"gcn"``, ``"sage"``, ``"graphconv"``, ``"gin"`` and ``"gat"`` are sums
of neighbours without edge features, ``"dir_gnn"`` the same in both directions; ``"mpnn"``, ``"gine"``, ``"nnconv"``,
``"gatedgcn"`` and ``"transformer"`` have edge features. ``"ppgn"`` has matrix products of functions of X, ``"ppgn++"``
also the transpose and the identity. On simple graphs all node banks compute the same patterns, and both PPGN do. A bank
is a bound for layers of any width and number; where neighbours are averaged or normalised (``"gcn"``, ``"sage"``,
``"gat"``, ``"transformer"``), it holds for the normalised X."""


def as_bank(bank: str | int | Bank) -> Bank:
    """The bank that a name of :data:`BANKS` or a number of neighbours stands for."""
    if isinstance(bank, Bank):
        return bank
    if isinstance(bank, str):
        check_choice("bank", bank, BANKS)
        return BANKS[bank]
    return Bank(check_int("bank", bank))


def is_computable(pattern: Pattern, bank: str | int | Bank) -> bool:
    """Whether some order of summing over the black nodes of ``pattern`` uses only operations of ``bank``.

    For a bank with all options that is ``pattern.treewidth <= bank.neighbours``: the outputs stay to the end and count
    as neighbours of one another. A pattern with outputs ``(0, 0)`` counts as one with a single output. The neighbours
    are always those in the graph that earlier sums have left, with the pairs that they joined.

    Args:
        pattern: any pattern.
        bank: a name of :data:`BANKS`, a :class:`Bank`, or an int for the bank with so many neighbours.

    Example:
        >>> [is_computable(Pattern.clique(4), bank) for bank in ("gin", "ppgn++", 3)]
        [False, False, True]
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern, got {pattern!r} ({type(pattern).__name__})")
    bank = as_bank(bank)
    if pattern.treewidth > bank.neighbours:
        return False
    arcs = [edge[:2] for edge in pattern.edges if edge[0] != edge[1]]
    looped = len(arcs) < pattern.degree
    if not bank.parallel and len({frozenset(arc) for arc in arcs}) < len(arcs):
        return False
    transpose = bank.transpose or not pattern.directed
    if transpose and (bank.loops or not looped):
        return True
    if bank.neighbours == 1:
        return (bank.loops or not looped) and all(_along_arcs(part) for part, _ in pattern.components())
    order = len(set(pattern.outputs))
    return all(_by_products(part, places, order, transpose, bank.loops) for part, places in pattern.components())


def _along_arcs(part: Pattern) -> bool:
    """A directed tree by messages along the arcs: all lead towards the outputs, or to some node if there are none.

    Between two outputs only arcs from the first to the second are read. Without transposes a tree is enough: arcs both
    ways between two nodes never lead towards one of them only.
    """
    neighbours = part.neighbours()
    arcs = {(edge[0], edge[1]) for edge in part.edges}

    def towards(roots: list[int]) -> bool:
        seen, queue = set(roots), list(roots)
        for parent in queue:
            for child in neighbours[parent] - seen:
                if (parent, child) in arcs:
                    return False
                seen.add(child)
                queue.append(child)
        return True

    outputs = list(dict.fromkeys(part.outputs))
    if len(outputs) == 2 and (outputs[1], outputs[0]) in arcs:
        return False
    return towards(outputs) if outputs else any(towards([root]) for root in range(part.num_nodes))


def _by_products(part: Pattern, positions: tuple[int, ...], order: int, transpose: bool, loops: bool) -> bool:
    """A connected part of a pattern by products of matrices, where transposes or the diagonal are out of reach.

    A result on the pair (a, b) is a matrix with rows a and columns b, multiplied entry by entry with matrices of the
    same orientation only. A result on one node a is a matrix that is constant along its rows or along its columns, or
    one of which only the diagonal counts. Without the identity these are not turned into one another, and a diagonal
    serves at the end only: in a vector, or in the value of a scalar. All orders of summing are searched.

    Args:
        part, positions: a component and the outputs that it carries, of a pattern with ``order`` output nodes.
    """
    arcs = {(edge[0], edge[1]) for edge in part.edges}
    first_pairs = {(u, v) for u, v in arcs if u != v}
    if transpose:
        first_pairs |= {(v, u) for u, v in first_pairs}
    first_values = set() if loops else {("diagonal", u) for u, v in arcs if u == v}
    outputs = tuple(dict.fromkeys(part.outputs))
    first: _State = (
        frozenset(range(part.num_nodes)).difference(outputs),
        frozenset(first_pairs),
        frozenset(first_values),
    )

    def successors(state: _State) -> Iterator[_State]:
        black, pairs, values = state
        for b in black:
            into, out = {u for u, v in pairs if v == b}, {v for u, v in pairs if u == b}
            near = sorted(into | out)
            if len(near) > 2 or (("diagonal", b) in values and (near or order)):
                continue
            left = {pair for pair in pairs if b not in pair}
            kept = {value for value in values if value[1] != b}
            if len(near) == 2:
                if transpose:
                    left |= {(near[0], near[1]), (near[1], near[0])}
                elif len(into) == len(out) == 1:  # both neighbours, one each way
                    left.add((min(into), min(out)))
                else:
                    continue
            elif near and not transpose and not loops:
                kept.add(("diagonal" if into and out else "row" if into else "column", near[0]))
            yield black - {b}, frozenset(left), frozenset(kept)

    # Forms that a matrix on (first output, second output) can be multiplied with; all end on a diagonal otherwise.
    fitting = {(("row", "column")[p], v) for p, v in zip(positions, part.outputs, strict=True)}

    def readable(pairs: frozenset[tuple[int, int]], values: frozenset[tuple[str, int]]) -> bool:
        return order < 2 or (values <= fitting and (transpose or pairs <= {outputs}))

    seen, stack = {first}, [first]
    while stack:
        state = stack.pop()
        if not state[0]:
            if readable(state[1], state[2]):
                return True
            continue
        for successor in successors(state):
            if successor not in seen:
                seen.add(successor)
                stack.append(successor)
    return False
