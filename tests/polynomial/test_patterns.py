"""Patterns against networkx's isomorphism, torch.einsum, and elimination in every order."""

from __future__ import annotations

import copy
import itertools
import pickle
import random

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlayers.polynomial.patterns import Pattern


@st.composite
def parts(draw, max_nodes=5, max_arcs=6, coloured=None):
    """Arguments of a pattern without isolated black nodes."""
    directed = draw(st.booleans())
    coloured = draw(st.booleans()) if coloured is None else coloured
    node = st.integers(0, max_nodes - 1)
    arc = st.tuples(node, node, st.integers(0, 1)) if coloured else st.tuples(node, node)
    edges = draw(st.lists(arc, max_size=max_arcs))
    outputs = draw(st.lists(node, max_size=2))
    used = sorted({v for edge in edges for v in edge[:2]} | set(outputs))
    index = {v: i for i, v in enumerate(used)}
    edges = [(index[edge[0]], index[edge[1]], *edge[2:]) for edge in edges]
    return edges, tuple(index[v] for v in outputs), directed, len(used)


def build(arguments):
    edges, outputs, directed, num_nodes = arguments
    return Pattern(edges, outputs, directed, num_nodes=num_nodes)


def relabelled(arguments, seed):
    edges, outputs, directed, n = arguments
    rng = random.Random(seed)
    new = list(range(n))
    rng.shuffle(new)
    edges = [(new[edge[0]], new[edge[1]], *edge[2:]) for edge in edges]
    if not directed:
        edges = [(e[1], e[0], *e[2:]) if rng.random() < 0.5 else e for e in edges]
    rng.shuffle(edges)
    return edges, tuple(new[v] for v in outputs), directed, n


def as_networkx(arguments):
    edges, outputs, directed, n = arguments
    graph = nx.MultiDiGraph() if directed else nx.MultiGraph()
    for v in range(n):
        graph.add_node(v, output=tuple(p for p, o in enumerate(outputs) if o == v))
    for source, target, *colour in edges:
        graph.add_edge(source, target, colour=tuple(colour))
    return graph


def isomorphic(a, b):
    """networkx's answer, with outputs, colours and multiplicities."""
    return a[2] == b[2] and nx.is_isomorphic(
        as_networkx(a),
        as_networkx(b),
        node_match=lambda x, y: x["output"] == y["output"],
        edge_match=lambda x, y: sorted(e["colour"] for e in x.values()) == sorted(e["colour"] for e in y.values()),
    )


def brute_force(pattern, adj):
    """The sum over all assignments, with adj (n, n) or (colours, n, n)."""
    n = adj.shape[-1]
    out = torch.zeros((n,) * pattern.order, dtype=adj.dtype)
    for assignment in itertools.product(range(n), repeat=pattern.num_nodes):
        value = 1
        for source, target, *colour in pattern.edges:
            value = value * adj[(*colour, assignment[source], assignment[target])]
        out[tuple(assignment[v] for v in pattern.outputs)] += value
    return out


@settings(max_examples=120, deadline=None)
@given(parts(), st.integers(0, 1000))
def test_a_pattern_does_not_depend_on_the_names_of_its_nodes_nor_the_order_of_its_arcs(arguments, seed):
    a, b = build(arguments), build(relabelled(arguments, seed))
    assert a == b and hash(a) == hash(b) and repr(a) == repr(b)
    assert isomorphic(arguments, (a.edges, a.outputs, a.directed, a.num_nodes))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_patterns_are_equal_exactly_if_networkx_finds_them_isomorphic(data):
    a = data.draw(parts(max_nodes=4, max_arcs=4, coloured=False))
    edges, outputs, directed, n = relabelled(a, data.draw(st.integers(0, 9)))
    edges = list(edges)
    if edges and data.draw(st.booleans()):
        i = data.draw(st.integers(0, len(edges) - 1))
        edges[i] = (edges[i][1], data.draw(st.integers(0, n - 1)))
    used = {v for edge in edges for v in edge} | set(outputs)
    b = (edges, outputs, directed, n) if used == set(range(n)) else a
    assert (build(a) == build(b)) == isomorphic(a, b)


def test_regular_graphs_that_refinement_cannot_tell_apart():
    prism = nx.circular_ladder_graph(3)
    bipartite = nx.complete_bipartite_graph(3, 3)
    assert Pattern.from_networkx(prism) != Pattern.from_networkx(bipartite)
    cube = nx.hypercube_graph(3)
    moebius = nx.circulant_graph(8, [1, 4])
    assert Pattern.from_networkx(cube) != Pattern.from_networkx(moebius)
    shuffled = nx.relabel_nodes(cube, dict(zip(cube, random.Random(0).sample(list(cube), 8), strict=True)))
    assert Pattern.from_networkx(cube) == Pattern.from_networkx(shuffled)


def test_symmetric_graphs_take_no_time():
    """A tree with 2^31 symmetries, a star with 40!, and a Petersen graph."""
    tree = nx.balanced_tree(2, 5)
    shuffled = nx.relabel_nodes(tree, dict(zip(tree, random.Random(1).sample(list(tree), 63), strict=True)))
    assert Pattern.from_networkx(tree) == Pattern.from_networkx(shuffled)
    assert Pattern.from_networkx(nx.star_graph(40)) == Pattern.star(40)
    edges = [(9 - u, 9 - v) for u, v in nx.petersen_graph().edges]
    assert Pattern(edges) == Pattern.from_networkx(nx.petersen_graph())


def test_outputs_come_first_and_are_ordered():
    assert Pattern([(3, 2), (2, 1), (1, 0)], outputs=(2,)).outputs == (0,)
    a_to_b = Pattern([(0, 1), (1, 2)], outputs=(0, 1))
    b_to_a = Pattern([(0, 1), (1, 2)], outputs=(1, 0))
    assert a_to_b.outputs == b_to_a.outputs == (0, 1)
    assert a_to_b != b_to_a and a_to_b.transpose() == b_to_a and b_to_a.transpose() == a_to_b
    assert Pattern([(0, 1), (1, 2)], outputs=(1, 1)).outputs == (0, 0)
    path = Pattern.path(3, (0, 3))
    assert path.transpose() == path
    directed = Pattern.path(3, (0, 3), directed=True)
    assert directed.transpose() != directed
    assert Pattern.star(2, (0,)).transpose() == Pattern.star(2, (0,))


def test_direction_and_colours_tell_patterns_apart():
    assert Pattern([(0, 1)], (0,), directed=True) != Pattern([(1, 0)], (0,), directed=True)
    assert Pattern([(0, 1)], (0,)) == Pattern([(1, 0)], (0,))
    assert Pattern([(0, 1)]) != Pattern([(0, 1)], directed=True)
    assert Pattern([(0, 1, 0)]) != Pattern([(0, 1, 1)])
    assert Pattern([(0, 1, 0), (1, 2, 1)], (0,)) != Pattern([(0, 1, 1), (1, 2, 0)], (0,))
    assert Pattern([(0, 1), (0, 1)]) != Pattern([(0, 1)])


def test_properties():
    pattern = Pattern([(0, 1, 0), (1, 2, 3), (1, 1, 1)], outputs=(2, 0))
    assert (pattern.degree, pattern.order, pattern.num_nodes, pattern.num_colours) == (3, 2, 3, 4)
    assert pattern.is_coloured and pattern.is_connected and not pattern.is_simple
    assert Pattern.cycle(5).is_simple and not Pattern([(0, 1), (0, 1)]).is_simple
    assert Pattern([(0, 1), (1, 0)], directed=True).is_simple
    assert Pattern([(0, 1), (2, 3)]).is_connected is False
    assert Pattern([]).degree == 0 and not Pattern([]).is_connected and Pattern([]).components() == ()
    assert Pattern([], (0,), num_nodes=1).is_connected
    assert not Pattern([(0, 1)], (0, 2), num_nodes=3).is_connected
    assert Pattern.cycle(4).num_colours == 1 and not Pattern.cycle(4).is_coloured


@settings(max_examples=60, deadline=None)
@given(parts(max_nodes=4, max_arcs=5))
def test_components_multiply_to_the_pattern(arguments):
    pattern = build(arguments)
    adj = torch.randint(-2, 3, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    if not pattern.directed:
        adj = adj + adj.mT
    adj = adj if pattern.is_coloured else adj[0]
    product = torch.ones((), dtype=torch.int64)
    shape = [1] * pattern.order
    for part, positions in pattern.components():
        assert part.is_connected and part.order == len(positions)
        value = brute_force(part, adj)
        product = product * value.reshape([3 if p in positions else 1 for p in range(len(shape))])
    expected = brute_force(pattern, adj)
    assert torch.equal(product.expand(expected.shape), expected)


def test_components_say_which_outputs_they_carry():
    pattern = Pattern([(0, 1), (2, 3), (3, 4), (5, 6)], outputs=(2, 0))
    found = {positions: part for part, positions in pattern.components()}
    assert found == {
        (0,): Pattern([(0, 1), (1, 2)], outputs=(0,)),
        (1,): Pattern([(0, 1)], outputs=(0,)),
        (): Pattern([(0, 1)]),
    }


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern.path(3, (0, 3), directed=True),
        Pattern.cycle(4, (0, 2), directed=True),
        Pattern.cycle(3, (1,), directed=True),
        Pattern([(0, 1), (1, 0), (1, 1), (2, 1)], (2, 0), directed=True),
        Pattern([(0, 1), (2, 3)], (1, 2), directed=True),
        Pattern.star(3, (0,), directed=True),
    ],
    ids=repr,
)
def test_equation_is_the_polynomial(pattern):
    adj = torch.randint(-3, 4, (4, 4), generator=torch.Generator().manual_seed(1))
    out = torch.einsum(pattern.equation(), *[adj] * pattern.degree)
    assert torch.equal(out, brute_force(pattern, adj))


def test_named_patterns():
    adj = torch.randint(-3, 4, (4, 4), generator=torch.Generator().manual_seed(2))
    power = torch.linalg.matrix_power

    def value(pattern):
        return torch.einsum(pattern.equation(), *[adj] * pattern.degree)

    for k in (1, 2, 3, 4):
        assert value(Pattern.cycle(k, directed=True)) == power(adj, k).trace()
        assert torch.equal(value(Pattern.path(k, (0, k), directed=True)), power(adj, k))
        assert torch.equal(value(Pattern.star(k, (0,), directed=True)), adj.sum(1) ** k)
    assert torch.equal(torch.diagonal(power(adj, 3)), value(Pattern.cycle(3, (0, 0), directed=True)))
    graph = torch.from_numpy(nx.to_numpy_array(nx.karate_club_graph(), weight=None)).long()
    triangles = sum(nx.triangles(nx.karate_club_graph()).values()) // 3
    assert torch.einsum(Pattern.clique(3).equation(), *[graph] * 3) == 6 * triangles
    assert Pattern.clique(3) == Pattern.cycle(3)
    assert Pattern.clique(2) == Pattern.path(1) == Pattern.star(1)


def eliminated_width(pattern, order):
    graph = {v: set(row) for v, row in enumerate(pattern.neighbours())}
    if len(set(pattern.outputs)) == 2:
        graph[0].add(1)
        graph[1].add(0)
    width = 0
    for v in order:
        around = graph.pop(v)
        width = max(width, len(around))
        for u in around:
            graph[u] = (graph[u] | around) - {u, v}
    return width


@settings(max_examples=100, deadline=None)
@given(parts(max_nodes=6, max_arcs=12, coloured=False))
def test_treewidth_is_the_least_over_all_elimination_orders(arguments):
    pattern = build(arguments)
    orders = itertools.permutations(range(pattern.num_nodes))
    assert pattern.treewidth == min(eliminated_width(pattern, order) for order in orders)


def test_known_treewidths():
    known = [
        (nx.path_graph(6), 1),
        (nx.cycle_graph(9), 2),
        (nx.complete_graph(6), 5),
        (nx.complete_bipartite_graph(3, 4), 3),
        (nx.grid_2d_graph(3, 4), 3),
        (nx.grid_2d_graph(4, 4), 4),
        (nx.hypercube_graph(3), 3),
        (nx.petersen_graph(), 4),
        (nx.octahedral_graph(), 4),
        (nx.icosahedral_graph(), 6),
    ]
    for graph, width in known:
        assert Pattern.from_networkx(graph).treewidth == width
    assert Pattern.path(4, (0, 4)).treewidth == 2
    assert Pattern([], (0, 1), num_nodes=2).treewidth == 1
    assert Pattern([]).treewidth == 0


@settings(max_examples=50, deadline=None)
@given(parts())
def test_round_trips(arguments):
    pattern = build(arguments)
    assert eval(repr(pattern)) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == copy.deepcopy(pattern) == pattern
    graph = pattern.to_networkx()
    outputs = sorted((p, v) for v, places in graph.nodes(data="output") for p in places)
    colour = "colour" if pattern.is_coloured else None
    assert Pattern.from_networkx(graph, [v for _, v in outputs], colour=colour) == pattern
    assert Pattern(pattern.edges, pattern.outputs, pattern.directed, num_nodes=pattern.num_nodes) == pattern


def test_from_networkx_takes_any_node_names_and_ignores_weights():
    graph = nx.Graph()
    graph.add_edge("a", "b", weight=3.5)
    graph.add_edge("b", "c", weight=0.1)
    assert Pattern.from_networkx(graph, ["c", "a"]) == Pattern.path(2, (0, 2))
    graph.add_node("d")
    assert Pattern.from_networkx(graph, ["d"]) == Pattern([(0, 1), (1, 2)], (3,), num_nodes=4)
    assert Pattern.from_networkx(nx.DiGraph([(0, 1)]), [1]) == Pattern([(0, 1)], (1,), directed=True)
    assert Pattern.from_networkx(nx.MultiGraph([(0, 1), (0, 1)])).degree == 2


def test_patterns_sort_by_order_degree_and_size():
    patterns = [Pattern.clique(4), Pattern.path(2, (0,)), Pattern.path(1), Pattern.cycle(3), Pattern.path(3)]
    ordered = sorted(patterns)
    assert ordered == [Pattern.path(1), Pattern.cycle(3), Pattern.path(3), Pattern.clique(4), Pattern.path(2, (0,))]
    assert all(sorted(shuffled) == ordered for shuffled in itertools.permutations(patterns))
    with pytest.raises(TypeError):
        _ = Pattern.path(1) < 3


def test_a_pattern_cannot_be_changed():
    with pytest.raises(AttributeError):
        Pattern.path(1).directed = True


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (([(0, 1)], (2,)), {}, ValueError, "nodes of the pattern, got 2.*num_nodes"),
        (([(0, 1)], (0, 1, 0)), {}, ValueError, "at most two nodes, got 3"),
        (([(0, 2)],), {}, ValueError, "every node must be on an arc or an output, got node 1"),
        (([(0, 1)],), {"num_nodes": 3}, ValueError, "got node 2"),
        (([(0, 1)], (3,)), {"num_nodes": 3}, ValueError, "below num_nodes = 3, got node 3"),
        (([(0, 4)],), {"num_nodes": 3}, ValueError, "below num_nodes = 3, got node 4"),
        (([(0, -1)],), {}, ValueError, r"edges\[0\]\[1\] must be at least 0, got -1"),
        (([(0, 1.0)],), {}, TypeError, r"edges\[0\]\[1\] must be an int"),
        (([(0, 1), (1,)],), {}, ValueError, r"edges\[1\] must be \(source, target\)"),
        (([(0, 1), (1, 2, 0)],), {}, ValueError, "all pairs or all triples"),
        (([(0, 1)], (0.5,)), {}, TypeError, r"outputs\[0\] must be an int"),
        ((["ab"],), {}, ValueError, r"edges\[0\] must be"),
        ((5,), {}, TypeError, "edges must be a sequence"),
        (([(0, 1)], "01"), {}, TypeError, "outputs must be a sequence of ints"),
    ],
)
def test_bad_patterns(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        Pattern(*arguments, **keywords)


def test_other_bad_input():
    with pytest.raises(ValueError, match="length must be at least 1"):
        Pattern.cycle(0)
    with pytest.raises(ValueError, match="size must be at least 2"):
        Pattern.clique(1)
    with pytest.raises(ValueError, match="outputs must be nodes of graph, got 7"):
        Pattern.from_networkx(nx.path_graph(3), [7])
    with pytest.raises(ValueError, match="einsum"):
        Pattern([(0, 1)], (2,), num_nodes=3).equation()
    with pytest.raises(ValueError, match="52 nodes"):
        Pattern.path(60).equation()
