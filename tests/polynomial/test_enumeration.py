"""Lists of patterns and their counts, against set partitions, networkx's atlas, orbits and ranks of evaluations."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest
import torch

from torchlayers.polynomial.enumeration import count_patterns, enumerate_patterns
from torchlayers.polynomial.patterns import Pattern

# Degrees 0 to 6, orders 0 to 2, on a large graph.
TABLE = [
    (
        "directed",
        {},
        [
            [1, 2, 11, 52, 296, 1724, 11060],
            [1, 5, 32, 199, 1323, 9094, 65729],
            [2, 15, 117, 877, 6719, 52505, 422824],
        ],
    ),
    (
        "directed",
        {"loops": False, "parallel": False},
        [
            [1, 1, 5, 17, 80, 365, 1981],
            [1, 3, 15, 71, 382, 2138, 12976],
            [2, 10, 59, 343, 2120, 13615, 92094],
        ],
    ),
    (
        "weighted",
        {},
        [
            [1, 2, 7, 23, 79, 274, 1003],
            [1, 4, 17, 69, 281, 1147, 4784],
            [2, 11, 56, 266, 1238, 5714, 26554],
        ],
    ),
    (
        "weighted",
        {"loops": False},
        [
            [1, 1, 3, 8, 23, 66, 212],
            [1, 2, 7, 23, 79, 274, 1003],
            [2, 6, 24, 92, 360, 1421, 5787],
        ],
    ),
    (
        "simple",
        {},
        [
            [1, 1, 2, 5, 11, 26, 68],
            [1, 2, 5, 14, 38, 107, 318],
            [2, 6, 18, 57, 179, 574, 1906],
        ],
    ),
]
ids = [f"{kind}-{'-'.join(options) or 'all'}" for kind, options, _ in TABLE]


@pytest.mark.parametrize(("kind", "options", "rows"), TABLE, ids=ids)
def test_counts_of_the_whole_basis(kind, options, rows):
    assert [[count_patterns(d, k, kind, **options) for d in range(7)] for k in range(3)] == rows


@pytest.mark.parametrize(("kind", "options", "rows"), TABLE, ids=ids)
def test_the_whole_list_is_as_long_as_the_count(kind, options, rows):
    top = {"directed": 3, "weighted": 4, "simple": 6}[kind]
    for order, row in enumerate(rows):
        for degree in range(top + 1):
            patterns = enumerate_patterns(degree, order, kind=kind, connected=False, diagonal=True, **options)
            assert len(patterns) == len(set(patterns)) == row[degree]
            assert patterns == sorted(patterns)
            for p in patterns:
                assert (p.degree, p.order, p.directed) == (degree, order, kind == "directed")
                # Parts that were put together are in the form that the constructor would give them.
                assert Pattern(p.edges, p.outputs, p.directed, num_nodes=p.num_nodes) == p


@pytest.mark.parametrize(
    ("order", "counts"),
    [(0, [1, 1, 3, 5, 12, 30, 79]), (1, [1, 2, 5, 13, 37, 114, 367]), (2, [1, 3, 10, 35, 125, 460, 1747])],
)
def test_counts_of_connected_simple_patterns(order, counts):
    lists = [enumerate_patterns(degree, order) for degree in range(1, 8)]
    assert [len(patterns) for patterns in lists] == counts
    assert all(p.is_connected and p.is_simple for patterns in lists for p in patterns)


def test_connected_simple_patterns_are_those_of_the_atlas():
    atlas: dict[int, set[Pattern]] = {}
    for graph in nx.graph_atlas_g():
        if 1 <= graph.number_of_edges() <= 6 and nx.is_connected(graph):
            atlas.setdefault(graph.number_of_edges(), set()).add(Pattern.from_networkx(graph))
    for degree, expected in atlas.items():
        assert set(enumerate_patterns(degree, 0)) == expected
        with_outputs = {
            Pattern(p.edges, outputs)
            for p in expected
            for outputs in itertools.permutations(range(p.num_nodes), 2)
            if degree <= 5
        }
        if degree <= 5:
            assert set(enumerate_patterns(degree, 2)) == with_outputs


def partitions(size):
    """Set partitions as restricted growth strings."""
    strings = [()]
    for _ in range(size):
        strings = [(*s, i) for s in strings for i in range(max(s, default=-1) + 2)]
    return strings


@pytest.mark.parametrize("order", [0, 1, 2])
def test_general_patterns_are_the_set_partitions_of_arc_ends_and_outputs(order):
    for degree in range(4):
        expected = set()
        for string in partitions(2 * degree + order):
            arcs = [(string[2 * i], string[2 * i + 1]) for i in range(degree)]
            outputs = string[2 * degree :]
            expected.add(Pattern(arcs, outputs, directed=True, num_nodes=max(string, default=-1) + 1))
        found = enumerate_patterns(degree, order, kind="directed", connected=False, diagonal=True)
        assert set(found) == expected


@pytest.mark.parametrize("kind", ["simple", "weighted", "directed"])
@pytest.mark.parametrize("num_colours", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_counts_on_few_nodes_are_orbits_of_permutations(kind, num_colours, n):
    """All monomials with output indices on n nodes, sorted into orbits one by one."""
    entries = [
        (i, j, c)
        for i in range(n)
        for j in range(n)
        for c in range(num_colours)
        if (kind == "directed" or i <= j) and (kind != "simple" or i != j)
    ]
    choose = itertools.combinations if kind == "simple" else itertools.combinations_with_replacement
    permutations = list(itertools.permutations(range(n)))
    for degree, order in [(0, 2), (1, 1), (1, 2), (2, 0), (2, 2), (3, 0)]:
        orbits = set()
        for monomial in choose(entries, degree):
            for outputs in itertools.product(range(n), repeat=order):
                images = []
                for g in permutations:
                    moved = [(g[i], g[j], c) for i, j, c in monomial]
                    if kind != "directed":
                        moved = [(min(i, j), max(i, j), c) for i, j, c in moved]
                    images.append((sorted(moved), [g[o] for o in outputs]))
                orbits.add(str(min(images)))
        assert count_patterns(degree, order, kind, n, num_colours=num_colours) == len(orbits)


def test_counts_on_few_nodes_of_general_input():
    assert [[count_patterns(2, k, "directed", n) for k in range(3)] for n in (2, 3, 4)] == [
        [6, 10, 20],
        [10, 25, 70],
        [11, 31, 107],
    ]
    assert [count_patterns(d, 2, "directed", 3) for d in range(5)] == [2, 14, 70, 250, 750]
    assert [count_patterns(d, 2, "directed", 4) for d in range(5)] == [2, 15, 107, 590, 2702]


def evaluated(pattern, adj):
    """A pattern on a batch of matrices (B, n, n), by einsum over all nodes at once; (B, n ** order)."""
    n = adj.shape[-1]
    letters = [chr(ord("a") + v) for v in range(pattern.num_nodes)]
    operands = [adj] * pattern.degree + [torch.ones(n, dtype=adj.dtype)] * pattern.num_nodes
    terms = [f"z{letters[u]}{letters[v]}" for u, v in pattern.edges] + letters
    out = torch.einsum(f"{','.join(terms)}->{'z' if pattern.degree else ''}{''.join(letters)}", *operands)
    if not pattern.degree:
        out = out.expand(adj.shape[0], *out.shape)
    nodes = tuple(dict.fromkeys(pattern.outputs))
    summed = [1 + v for v in range(pattern.num_nodes) if v not in nodes]
    out = out.sum(summed) if summed else out
    if pattern.outputs == (0, 0):
        out = torch.diag_embed(out)
    return out.reshape(adj.shape[0], -1)


@pytest.mark.parametrize(("degree", "order", "n"), [(1, 2, 3), (2, 0, 3), (2, 1, 3), (2, 2, 3), (2, 2, 4)])
def test_the_patterns_span_as_many_dimensions_as_counted(degree, order, n):
    """Rank of all patterns evaluated on random matrices; on few nodes they are linearly dependent."""
    adj = torch.randn(60, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patterns = enumerate_patterns(degree, order, kind="directed", connected=False, diagonal=True)
    matrix = torch.stack([evaluated(p, adj).flatten() for p in patterns])
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    assert torch.linalg.matrix_rank(matrix, rtol=1e-9) == count_patterns(degree, order, "directed", n)


def test_colours():
    for kind, degree, order in [("directed", 2, 2), ("weighted", 2, 1), ("simple", 3, 1), ("simple", 2, 2)]:
        patterns = enumerate_patterns(degree, order, kind=kind, connected=False, diagonal=True, num_colours=2)
        assert len(patterns) == len(set(patterns)) == count_patterns(degree, order, kind, num_colours=2)
        assert all(p.is_coloured for p in patterns)
    # Exchanging the colours maps the list onto itself.
    patterns = enumerate_patterns(2, 1, num_colours=2)
    swapped = {Pattern([(u, v, 1 - c) for u, v, c in p.edges], p.outputs) for p in patterns}
    assert swapped == set(patterns)
    single = enumerate_patterns(2, 2, kind="directed", num_colours=1)
    assert [tuple(e[:2] for e in p.edges) for p in single] == [
        p.edges for p in enumerate_patterns(2, 2, kind="directed")
    ]


def test_degree_zero():
    assert enumerate_patterns(0, 0) == []
    assert enumerate_patterns(0, 0, connected=False) == [Pattern([])]
    assert enumerate_patterns(0, 1) == [Pattern([], (0,), num_nodes=1)]
    assert enumerate_patterns(0, 2) == []
    identity, ones = Pattern([], (0, 0), num_nodes=1), Pattern([], (0, 1), num_nodes=2)
    assert enumerate_patterns(0, 2, connected=False, diagonal=True) == [identity, ones]
    assert enumerate_patterns(0, 2, connected=False) == [ones]
    assert enumerate_patterns(0, 2, diagonal=True) == [identity]


def test_both_orders_of_two_outputs_are_listed():
    patterns = set(enumerate_patterns(4, 2))
    assert all(p.transpose() in patterns for p in patterns)
    assert any(p.transpose() != p for p in patterns)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: enumerate_patterns(9, 0), ValueError, "degree must be at most 8 .*force.*, got 9"),
        (lambda: enumerate_patterns(-1, 0), ValueError, "degree must be at least 0, got -1"),
        (lambda: enumerate_patterns(2, 3), ValueError, "order must be 0, 1 or 2, got 3"),
        (lambda: enumerate_patterns(2, 1, kind="directd"), ValueError, "did you mean 'directed'"),
        (lambda: enumerate_patterns(2.0, 1), TypeError, "degree must be an int"),
        (lambda: enumerate_patterns(2, 1, exclude="ppgn+"), ValueError, "bank must be one of"),
        (lambda: enumerate_patterns(2, 1, num_colours=0), ValueError, "num_colours must be at least 1"),
        (lambda: count_patterns(2, 1, n=-1), ValueError, "n must be at least 0"),
        (lambda: count_patterns(2, 4), ValueError, "order must be 0, 1 or 2, got 4"),
        (lambda: count_patterns(2, 1, "general"), ValueError, "kind must be one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_force_allows_higher_degrees():
    # Without cycles: trees with 9 arcs are the 106 trees on 10 nodes.
    trees = [p for p in enumerate_patterns(9, 0, force=True) if p.num_nodes == 10]
    assert len(trees) == sum(1 for _ in nx.nonisomorphic_trees(10))
