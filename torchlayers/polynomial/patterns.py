"""Patterns: the basis elements of the equivariant polynomials of a graph.

A pattern is a small multigraph H whose nodes are black (summed over) or outputs (at most two, ordered), up to
isomorphism. It names the polynomial

    P_H(X)[i_out...] = sum over all maps j: nodes -> {0, ..., n-1} that agree with the output indices
                       of the product over the arcs (r, s) of X[j_r, j_s],

a homomorphism sum: indices may coincide. The polynomials of all patterns of degree at most D span the equivariant
polynomials of degree at most D (Puny, Lim, Kiani, Maron and Lipman, "Equivariant Polynomials for Graph Neural
Networks", ICML 2023, arXiv 2302.11556, section 3), with 0, 1 or 2 outputs for scalars, vectors and matrices.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._checks import check_int, check_ints, require

if TYPE_CHECKING:
    import networkx

__all__ = ["Pattern"]

_Arc = tuple[int, int, int]  # source, target, colour
_Marks = tuple[tuple[int, ...], ...]  # per node the output positions that it fills
Form = tuple[_Marks, tuple[_Arc, ...]]


@functools.total_ordering
@dataclass(frozen=True, init=False, repr=False, eq=True)
class Pattern:
    """An isomorphism class of directed or undirected multigraphs with up to two ordered output nodes.

    It is stored as one canonical representative, so that two patterns are equal, and hash alike, exactly if an
    isomorphism takes arcs to arcs (with direction, colour and multiplicity) and each output to the output of the
    same position. In the representative the outputs come first: ``outputs`` is ``()``, ``(0,)``, ``(0, 1)``, or
    ``(0, 0)`` for a matrix that is zero off its diagonal.

    Args:
        edges: the arcs as pairs ``(source, target)``, each standing for a factor ``X[source, target]``, or all as
            triples ``(source, target, colour)`` for input with several channels. Repeated arcs and loops count.
        outputs: the nodes that are not summed over, none, one or two, in order.
        directed: whether ``(a, b)`` differs from ``(b, a)``. An undirected pattern is for symmetric input.
        num_nodes: number of nodes. Needed only where an output is on no arc.

    Attributes:
        edges: the arcs of the representative, sorted, pairs or triples as they were given; for an undirected pattern
            ``source <= target``.
        outputs, directed, num_nodes: as above, for the representative.

    Raises:
        ValueError: for more than two outputs, an output that is not in the pattern, a black node on no arc.
        TypeError: for nodes or colours that are not ints.

    Example:
        >>> Pattern([(0, 1), (1, 2)], outputs=(0,)) == Pattern([(1, 2), (0, 1)], outputs=(2,))
        True
        >>> Pattern.clique(4).treewidth
        3
    """

    edges: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    directed: bool
    num_nodes: int

    def __init__(
        self,
        edges: Iterable[Sequence[int]],
        outputs: Sequence[int] = (),
        directed: bool = False,
        *,
        num_nodes: int | None = None,
    ) -> None:
        arcs, coloured = _check_edges(edges)
        on_arcs = {node for source, target, _ in arcs for node in (source, target)}
        outputs = check_ints("outputs", outputs, minimum=0)
        if len(outputs) > 2:
            raise ValueError(f"outputs must be at most two nodes, got {len(outputs)}: {outputs}")
        if num_nodes is None:
            missing = [node for node in outputs if node not in on_arcs]
            if missing:
                raise ValueError(
                    f"outputs must be nodes of the pattern, got {missing[0]}, which is on no arc "
                    "(pass num_nodes to have an output on no arc)"
                )
            num_nodes = max(on_arcs, default=-1) + 1
        else:
            num_nodes = check_int("num_nodes", num_nodes, minimum=0)
            outside = [node for node in (*on_arcs, *outputs) if node >= num_nodes]
            if outside:
                raise ValueError(f"edges and outputs must be below num_nodes = {num_nodes}, got node {outside[0]}")
        for node in range(num_nodes):
            if node not in on_arcs and node not in outputs:
                raise ValueError(
                    f"every node must be on an arc or an output, got node {node}, which is neither "
                    "(summed over, it would only multiply by the number of nodes)"
                )
        marks = tuple(tuple(p for p, node in enumerate(outputs) if node == v) for v in range(num_nodes))
        self._set(_canonical(marks, arcs, bool(directed)), coloured, bool(directed))

    def _set(self, form: Form, coloured: bool, directed: bool) -> None:
        marks, arcs = form
        filled = {position: node for node, mark in enumerate(marks) for position in mark}
        object.__setattr__(self, "edges", arcs if coloured else tuple((u, v) for u, v, _ in arcs))
        object.__setattr__(self, "outputs", tuple(filled[position] for position in range(len(filled))))
        object.__setattr__(self, "directed", directed)
        object.__setattr__(self, "num_nodes", len(marks))

    @classmethod
    def _from_form(cls, form: Form, coloured: bool, directed: bool) -> Pattern:
        """The pattern whose canonical form is known already."""
        pattern = cls.__new__(cls)
        pattern._set(form, coloured, directed)
        return pattern

    @classmethod
    def cycle(cls, length: int, outputs: Sequence[int] = (), *, directed: bool = False) -> Pattern:
        """The cycle ``0 -> 1 -> ... -> length - 1 -> 0`` of ``length`` arcs; without outputs the trace of X^length."""
        check_int("length", length)
        return cls([(i, (i + 1) % length) for i in range(length)], outputs, directed)

    @classmethod
    def path(cls, length: int, outputs: Sequence[int] = (), *, directed: bool = False) -> Pattern:
        """The path ``0 -> 1 -> ... -> length`` of ``length`` arcs; with outputs ``(0, length)`` the power X^length."""
        check_int("length", length)
        return cls([(i, i + 1) for i in range(length)], outputs, directed)

    @classmethod
    def clique(cls, size: int, outputs: Sequence[int] = ()) -> Pattern:
        """The complete graph on ``size >= 2`` nodes."""
        check_int("size", size, minimum=2)
        return cls([(i, j) for i in range(size) for j in range(i + 1, size)], outputs)

    @classmethod
    def star(cls, leaves: int, outputs: Sequence[int] = (), *, directed: bool = False) -> Pattern:
        """Node 0 with arcs to the nodes ``1, ..., leaves``; with output 0 the row sums to the power ``leaves``."""
        check_int("leaves", leaves)
        return cls([(0, i + 1) for i in range(leaves)], outputs, directed)

    @classmethod
    def from_networkx(
        cls, graph: networkx.Graph, outputs: Sequence[Hashable] = (), *, colour: str | None = None
    ) -> Pattern:
        """The pattern of a networkx graph, directed or not, multigraph or not.

        Args:
            graph: its edges become arcs; weights are not looked at.
            outputs: nodes of ``graph``, which may be on no edge.
            colour: name of the edge attribute that holds the arcs' colours; without it they have none.
        """
        index = {node: i for i, node in enumerate(graph.nodes)}
        for node in outputs:
            if node not in index:
                raise ValueError(f"outputs must be nodes of graph, got {node!r}")
        if colour is None:
            edges: list[tuple[int, ...]] = [(index[u], index[v]) for u, v in graph.edges()]
        else:
            edges = [(index[u], index[v], c) for u, v, c in graph.edges(data=colour)]
        return cls(edges, [index[node] for node in outputs], graph.is_directed(), num_nodes=len(index))

    def to_networkx(self) -> networkx.Graph:
        """The representative as a networkx (Di)Graph, or Multi(Di)Graph where arcs are parallel.

        Node attribute ``output``: the tuple of output positions of the node. Edge attribute ``colour`` where the
        pattern is coloured.
        """
        nx = require("networkx", extra="graphs")
        parallel = len({edge[:2] for edge in self.edges}) < self.degree
        kind = {
            (False, False): nx.Graph,
            (False, True): nx.DiGraph,
            (True, False): nx.MultiGraph,
            (True, True): nx.MultiDiGraph,
        }[parallel, self.directed]
        graph = kind()
        for node in range(self.num_nodes):
            graph.add_node(node, output=tuple(p for p, v in enumerate(self.outputs) if v == node))
        for source, target, *rest in self.edges:
            graph.add_edge(source, target, **({"colour": rest[0]} if rest else {}))
        return graph

    @property
    def degree(self) -> int:
        """Degree of the polynomial: the number of arcs, with multiplicity."""
        return len(self.edges)

    @property
    def order(self) -> int:
        """Number of outputs: 0 for a scalar, 1 for a value per node, 2 for one per ordered pair of nodes."""
        return len(self.outputs)

    @property
    def is_coloured(self) -> bool:
        """Whether the arcs carry colours (triples): the input then has a dimension for them."""
        return bool(self.edges) and len(self.edges[0]) == 3

    @property
    def num_colours(self) -> int:
        """Smallest number of channels of an input: one more than the largest colour, 1 without colours."""
        return 1 + max((edge[2] for edge in self.edges), default=0) if self.is_coloured else 1

    @property
    def is_connected(self) -> bool:
        """Whether there is exactly one component (the empty pattern, the constant 1, has none)."""
        return len(self._components) == 1

    @property
    def is_simple(self) -> bool:
        """Whether there are no loops and no parallel arcs, all that 0/1 input with a zero diagonal needs."""
        return len(set(self.edges)) == self.degree and all(edge[0] != edge[1] for edge in self.edges)

    @functools.cached_property
    def treewidth(self) -> int:
        """Exact treewidth of the pattern with one more edge between its outputs.

        Summing black nodes one at a time in the best order takes ``n ** (treewidth + 1)`` time; with ``k >=
        max(order - 1, 1)`` it is at most ``k`` exactly if each sum can be over a node with at most ``k`` neighbours.
        """
        neighbours = self.neighbours()
        if len(set(self.outputs)) == 2:
            a, b = self.outputs
            neighbours[a].add(b)
            neighbours[b].add(a)
        return _treewidth(neighbours)

    def neighbours(self) -> list[set[int]]:
        """For each node the set of the other nodes that it shares an arc with, in either direction."""
        neighbours: list[set[int]] = [set() for _ in range(self.num_nodes)]
        for source, target, *_ in self.edges:
            if source != target:
                neighbours[source].add(target)
                neighbours[target].add(source)
        return neighbours

    def components(self) -> tuple[tuple[Pattern, tuple[int, ...]], ...]:
        """The connected components, each with the positions of the outputs that it carries.

        The polynomial is the product of theirs: ``P[i_0, i_1] = product over (Q, positions) of Q[i_p, p in
        positions]``. Components with outputs come first.
        """
        coloured = self.is_coloured
        parts = []
        for marks, arcs in self._components:
            positions = tuple(sorted(p for mark in marks for p in mark))
            rank = {p: i for i, p in enumerate(positions)}
            local = tuple(tuple(rank[p] for p in mark) for mark in marks)
            parts.append((Pattern._from_form((local, arcs), coloured, self.directed), positions))
        return tuple(parts)

    @functools.cached_property
    def _components(self) -> tuple[Form, ...]:
        marks = tuple(tuple(p for p, v in enumerate(self.outputs) if v == node) for node in range(self.num_nodes))
        arcs = tuple((e[0], e[1], e[2] if len(e) == 3 else 0) for e in self.edges)
        return _canonical_components(marks, arcs, self.directed)

    def transpose(self) -> Pattern:
        """The pattern with its outputs swapped: its matrix is the transpose. Itself with fewer than two outputs."""
        return Pattern(self.edges, self.outputs[::-1], self.directed, num_nodes=self.num_nodes)

    def equation(self) -> str:
        """The polynomial as an einsum equation, with one operand per arc in the order of ``edges``: ``"ab,bc->ac"``.

        For outputs ``(0, 0)`` it is that of the diagonal.

        Raises:
            ValueError: if an output is on no arc (einsum has no word for that), and for more than 52 nodes.
        """
        letters = string.ascii_letters
        if self.num_nodes > len(letters):
            raise ValueError(f"an equation has letters for 52 nodes, got a pattern with {self.num_nodes}")
        on_arcs = {node for edge in self.edges for node in edge[:2]}
        if not on_arcs.issuperset(self.outputs):
            raise ValueError(f"an einsum equation needs each output on an arc, got {self!r}")
        operands = ",".join(letters[edge[0]] + letters[edge[1]] for edge in self.edges)
        return f"{operands}->{''.join(letters[v] for v in dict.fromkeys(self.outputs))}"

    def __repr__(self) -> str:
        arguments = [repr(list(self.edges))]
        if self.outputs:
            arguments.append(f"outputs={self.outputs}")
        if self.directed:
            arguments.append("directed=True")
        if not {node for edge in self.edges for node in edge[:2]}.issuperset(self.outputs):
            arguments.append(f"num_nodes={self.num_nodes}")
        return f"Pattern({', '.join(arguments)})"

    def _sort_key(self) -> tuple[Any, ...]:
        return self.order, self.degree, self.num_nodes, self.outputs, self.directed, self.edges

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        return self._sort_key() < other._sort_key()


def _check_edges(edges: Iterable[Sequence[int]]) -> tuple[list[_Arc], bool]:
    if not isinstance(edges, Iterable):
        raise TypeError(f"edges must be a sequence of arcs, got {edges!r} ({type(edges).__name__})")
    arcs, lengths = [], set()
    for i, edge in enumerate(edges):
        if isinstance(edge, (str, Mapping)) or not isinstance(edge, Sequence) or len(edge) not in (2, 3):
            raise ValueError(f"edges[{i}] must be (source, target) or (source, target, colour), got {edge!r}")
        source, target, *rest = (check_int(f"edges[{i}][{j}]", v, minimum=0) for j, v in enumerate(edge))
        arcs.append((source, target, rest[0] if rest else 0))
        lengths.add(len(edge))
    if len(lengths) > 1:
        raise ValueError("edges must be all pairs or all triples with a colour, got both")
    return arcs, lengths == {3}


def _canonical(marks: _Marks, arcs: Sequence[_Arc], directed: bool) -> Form:
    """The canonical representative: outputs first, by position, then the components one after the other."""
    return assemble(_canonical_components(marks, arcs, directed), directed)


def assemble(components: Sequence[Form], directed: bool) -> Form:
    """The canonical form of the disjoint union of components that are canonical and in canonical order."""
    offset, nodes = 0, []
    for part_marks, _ in components:
        nodes += [(mark, offset + i) for i, mark in enumerate(part_marks)]
        offset += len(part_marks)
    order = sorted(nodes, key=lambda item: (not item[0], item))
    label = {node: i for i, (_, node) in enumerate(order)}
    offset, out = 0, []
    for part_marks, part_arcs in components:
        out += [_arc(label[offset + u], label[offset + v], c, directed) for u, v, c in part_arcs]
        offset += len(part_marks)
    return tuple(mark for mark, _ in order), tuple(sorted(out))


def _canonical_components(marks: _Marks, arcs: Sequence[_Arc], directed: bool) -> tuple[Form, ...]:
    """The components in canonical order, each in canonical form by itself."""
    root = list(range(len(marks)))

    def find(v: int) -> int:
        while root[v] != v:
            root[v] = v = root[root[v]]
        return v

    for source, target, _ in arcs:
        root[find(source)] = find(target)
    members: dict[int, list[int]] = {}
    for v in range(len(marks)):
        members.setdefault(find(v), []).append(v)
    arcs_of: dict[int, list[_Arc]] = {r: [] for r in members}
    for arc in arcs:
        arcs_of[find(arc[0])].append(arc)
    parts = []
    for r, nodes in members.items():
        local = {v: i for i, v in enumerate(nodes)}
        local_arcs = [(local[u], local[v], c) for u, v, c in arcs_of[r]]
        parts.append(canonical_form(tuple(marks[v] for v in nodes), local_arcs, directed))
    return tuple(sorted(parts, key=component_key))


def component_key(form: Form) -> tuple[bool, Form]:
    """The order of components: those with outputs first."""
    return not any(form[0]), form


def _arc(source: int, target: int, colour: int, directed: bool) -> _Arc:
    return (source, target, colour) if directed or source <= target else (target, source, colour)


def canonical_form(marks: _Marks, arcs: Sequence[_Arc], directed: bool) -> Form:
    """Canonical form of a connected graph: marks and arcs under its :func:`canonical_labelling`."""
    labels, form = canonical_labelling(marks, arcs, directed)
    return tuple(marks[v] for v in sorted(range(len(marks)), key=labels.__getitem__)), form


def canonical_labelling(marks: _Marks, arcs: Sequence[_Arc], directed: bool) -> tuple[list[int], tuple[_Arc, ...]]:
    """Labels of the nodes of a connected graph, marked ones first, and its arcs under them: of the labellings that
    refinement leaves, one with the smallest sorted arc list.

    Nodes are told apart by their marks and, again and again, by the multiset of their neighbours' classes and of the
    arcs to them. Where that leaves a class of several nodes, each in turn is set apart and the refinement goes on;
    of nodes that a mere exchange takes into one another, one is enough, and so is one of the class in a tree, where
    refinement leaves no others together than those that a symmetry exchanges.
    """
    n = len(marks)
    bonds: list[dict[int, list[int]]] = [{} for _ in range(n)]
    for source, target, colour in arcs:
        # Low bits: neither direction, or leaving, or arriving.
        bonds[source].setdefault(target, []).append(4 * colour + (1 if directed else 0))
        if source != target or directed:
            bonds[target].setdefault(source, []).append(4 * colour + (2 if directed else 0))
    relations = [{u: tuple(sorted(bond)) for u, bond in row.items()} for row in bonds]
    rank = {r: i for i, r in enumerate(sorted({r for row in relations for r in row.values()}))}
    links = [{u: rank[r] for u, r in row.items()} for row in relations]
    stride = len(rank) + 1

    def refine(classes: list[int]) -> list[int]:
        count = len(set(classes))
        while True:
            signatures = [
                (classes[v], tuple(sorted([classes[u] * stride + r for u, r in links[v].items()]))) for v in range(n)
            ]
            ranks = {s: i for i, s in enumerate(sorted(set(signatures)))}
            classes = [ranks[s] for s in signatures]
            if len(ranks) == count:
                return classes
            count = len(ranks)

    def exchangeable(u: int, v: int) -> bool:
        if links[u].get(v) != links[v].get(u):
            return False
        others = (links[u].keys() | links[v].keys()) - {u, v}
        return all(links[u].get(w) == links[v].get(w) for w in others)

    tree = sum(len(row.keys() - {v}) for v, row in enumerate(links)) == 2 * (n - 1)
    best: tuple[_Arc, ...] | None = None
    best_classes: list[int] = []
    stack = [refine([1 + i for i in _ranks([(not mark, mark) for mark in marks])])]
    while stack:
        classes = stack.pop()
        cells: dict[int, list[int]] = {}
        for v, c in enumerate(classes):
            cells.setdefault(c, []).append(v)
        cell = min((c for c in cells if len(cells[c]) > 1), default=None)
        if cell is None:
            labelled = tuple(sorted([_arc(classes[u], classes[v], c, directed) for u, v, c in arcs]))
            if best is None or labelled < best:
                best, best_classes = labelled, classes
            continue
        tried: list[int] = []
        for v in cells[cell][:1] if tree else cells[cell]:
            if not any(exchangeable(u, v) for u in tried):
                tried.append(v)
                stack.append(refine([2 * c + (u != v) for u, c in enumerate(classes)]))
    assert best is not None
    return best_classes, best


def _ranks(keys: list[Any]) -> list[int]:
    ranks = {key: i for i, key in enumerate(sorted(set(keys)))}
    return [ranks[key] for key in keys]


def _treewidth(neighbours: list[set[int]]) -> int:
    """Exact treewidth: the least k for which some order eliminates every node at k neighbours or fewer."""
    if not neighbours:
        return 0
    k = 1 if any(neighbours) else 0
    while not _eliminates(neighbours, k):
        k += 1
    return k


def _eliminates(neighbours: list[set[int]], k: int) -> bool:
    """Whether nodes can be eliminated one by one, each joining its neighbours (at most k) to a clique."""
    failed: set[frozenset[int]] = set()

    def search(graph: dict[int, frozenset[int]]) -> bool:
        while len(graph) > k + 1:
            candidates = [v for v in graph if len(graph[v]) <= k]
            # A node whose neighbours are a clique already adds nothing: it goes first in some best order.
            free = next((v for v in candidates if all(graph[v] - {u} <= graph[u] for u in graph[v])), None)
            if free is None and k <= 2 and candidates:
                free = candidates[0]  # series reduction: the result is a minor
            if free is None:
                left = frozenset(graph)
                if left in failed:
                    return False
                if any(search(_eliminate(graph, v)) for v in candidates):
                    return True
                failed.add(left)
                return False
            graph = _eliminate(graph, free)
        return True

    return search({v: frozenset(row) for v, row in enumerate(neighbours)})


def _eliminate(graph: dict[int, frozenset[int]], v: int) -> dict[int, frozenset[int]]:
    around = graph[v]
    return {u: (row | around) - {u, v} if u in around else row for u, row in graph.items() if u != v}
