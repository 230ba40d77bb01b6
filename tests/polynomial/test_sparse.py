"""Polynomials of sparse graphs and masked products, against definitions, networkx and counts known by formula."""

import math

import networkx
import pytest
import torch

import torchlayers
from torchlayers.polynomial import edges, sparse
from torchlayers.polynomial.edges import EdgeSupport, edge_support, masked_product
from torchlayers.polynomial.enumeration import enumerate_patterns
from torchlayers.polynomial.patterns import Pattern
from torchlayers.polynomial.reference import polynomial
from torchlayers.polynomial.sparse import edge_polynomials, evaluate_sparse
from torchlayers.testing import assert_close_rel

# torch says once a process that sparse tensors are not checked, and that CSR is in beta.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse :UserWarning")


@pytest.fixture
def pieces(monkeypatch):
    """A few candidates at a time, and no triangles kept: what large graphs are worked off with."""
    for module in (sparse, edges):
        monkeypatch.setattr(module, "CHUNK", 5)
    monkeypatch.setattr(edges, "_KEPT", 0)


def edges_of(graph) -> torch.Tensor:
    return torch.tensor(list(networkx.convert_node_labels_to_integers(graph).to_directed().edges)).T


def adjacency(graph, layout=torch.sparse_csr) -> torch.Tensor:
    edges, n = edges_of(graph), graph.number_of_nodes()
    adj = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1], dtype=torch.int64), (n, n)).coalesce()
    return adj if layout == torch.sparse_coo else adj.to_sparse_csr()


def dense_random(*lead, n=5, directed=False, loops=False):
    x = torch.randint(-2, 3, (*lead, n, n)) * (torch.rand(*lead, n, n) < 0.6)
    x = x if loops else x * (1 - torch.eye(n, dtype=torch.int64))
    return x if directed else x + x.mT


# ------------------------------------------------------------------------------------------------------ values

KARATE, MISERABLES = "karate_club_graph", "les_miserables_graph"
DIAMOND = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [
        (KARATE, Pattern.cycle(3), 270),
        (KARATE, Pattern.cycle(4), 3500),
        (KARATE, Pattern.cycle(5), 14330),
        (KARATE, Pattern.cycle(6), 119694),
        (KARATE, Pattern(DIAMOND), 874),
        (KARATE, Pattern.clique(4), 264),
        (MISERABLES, Pattern.cycle(3), 2802),
        (MISERABLES, Pattern.cycle(4), 33116),
        (MISERABLES, Pattern.cycle(5), 328010),
        (MISERABLES, Pattern(DIAMOND), 20978),
        (MISERABLES, Pattern.clique(4), 15336),
        ("petersen_graph", Pattern.cycle(6), 990),
        ("petersen_graph", Pattern([(i, 2 + j) for i in (0, 1) for j in range(3)]), 330),
        ("dodecahedral_graph", Pattern.cycle(6), 1740),
    ],
)
def test_known_homomorphism_counts(name, pattern, count):
    assert int(evaluate_sparse(pattern, adjacency(getattr(networkx, name)()))) == count


def test_triangles_and_cliques_of_networkx():
    graph = networkx.powerlaw_cluster_graph(200, 6, 0.7, seed=1)
    triangle, four, five = (Pattern.clique(size, (0,)) for size in (3, 4, 5))
    nodes = evaluate_sparse([triangle, four, five], adjacency(graph))
    assert (nodes[0] // 2).tolist() == list(networkx.triangles(graph).values())
    sizes = [len(c) for c in networkx.enumerate_all_cliques(graph)]
    assert [int(v.sum()) for v in nodes] == [math.factorial(k) * sizes.count(k) for k in (3, 4, 5)]
    # At each edge: the common neighbours, and the edges among them.
    found = edge_polynomials([Pattern.clique(3, (0, 1)), Pattern.clique(4, (0, 1))], edges_of(graph))
    for edge, values in zip(edges_of(graph).T.tolist(), found.tolist(), strict=True):
        common = list(networkx.common_neighbors(graph, *edge))
        assert values == [len(common), 2 * graph.subgraph(common).number_of_edges()]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_all_simple_patterns(order, small, request):
    if small:
        request.getfixturevalue("pieces")
    patterns = [p for degree in range(1, 5 if small else 6) for p in enumerate_patterns(degree, order)]
    patterns += enumerate_patterns(6, order, exclude="ppgn")
    patterns = [p for p in patterns if len(set(p.outputs)) == order and p.num_nodes <= 6][:: 2 if small else 1]
    graph = networkx.gnp_random_graph(6, 0.6, seed=2)
    dense = torch.from_numpy(networkx.to_numpy_array(graph, dtype=int))
    every = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    found = evaluate_sparse(patterns, adjacency(graph), edge_index=every)
    assert len(patterns) > 5 or small
    for pattern, values in zip(patterns, found, strict=True):
        assert torch.equal(values, polynomial(pattern, dense).flatten() if order == 2 else polynomial(pattern, dense))


# Cycles of one and two nodes, parallel arcs, several parts, one-way arcs against each other, isolated outputs.
ODD = [
    ([(0, 0), (0, 1), (0, 1), (1, 2)], (0,), None),
    ([(0, 1), (1, 0), (1, 2), (2, 0)], (0, 1), None),
    ([(0, 1), (2, 3), (3, 4), (4, 2)], (0,), None),
    ([(0, 1), (2, 3)], (0, 2), None),
    ([(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 1)], (0, 3), None),
    ([(0, 1), (1, 2), (2, 3), (3, 0), (1, 0)], (), None),
    ([(0, 1), (1, 0), (0, 2), (1, 2), (2, 3), (3, 1), (0, 3)], (1,), None),
    ([(0, 1), (1, 2), (2, 0)], (0, 0), None),
    ([(0, 1)], (2,), 3),
    ([], (0, 1), 2),
    ([(0, 1)], (0, 2), 3),
]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("coloured", [False, True])
def test_weights_loops_colours_and_directions(directed, coloured, small, request):
    if small:
        request.getfixturevalue("pieces")
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T[:, torch.randperm(16)]
    for loops in (False, True):
        x = dense_random(2, n=4, directed=directed, loops=loops)
        x = x if coloured else x[0]
        for arcs, outputs, num_nodes in ODD:
            edges = [(*arc, (3 * i + arc[0]) % 2) for i, arc in enumerate(arcs)] if coloured else arcs
            pattern = Pattern(edges, outputs, directed, num_nodes=num_nodes)
            wanted = polynomial(pattern, x if pattern.edges or not coloured else x[0])
            for pairs in (every, every[:, :5]):
                found = evaluate_sparse(pattern, x.to_sparse_coo(), edge_index=pairs)
                assert found.dtype == torch.int64
                assert torch.equal(found, wanted[tuple(pairs)] if len(outputs) == 2 else wanted), (pattern, x)


def test_large_graphs_without_nodes_squared():
    """A ring of 30 000 nodes, 30 001 with a hub that is joined to all of them, by formula."""
    n = 30000
    ring = edges_of(networkx.cycle_graph(n))
    adj = torch.sparse_coo_tensor(ring, torch.ones(2 * n, dtype=torch.int64), (n, n))
    patterns = [Pattern.cycle(4), Pattern.cycle(6, (0,)), Pattern.cycle(4, (0, 1)), Pattern.clique(3, (0, 1))]
    four, six, edge, triangle = evaluate_sparse(patterns, adj)
    assert int(four) == math.comb(4, 2) * n and bool((six == math.comb(6, 3)).all())
    assert bool((edge.values() == 3).all()) and not triangle.values().any()
    spokes = torch.stack([torch.full((n,), n), torch.arange(n)])
    wheel = torch.cat([ring, spokes, spokes.flip(0)], 1)
    found = edge_polynomials([Pattern.clique(3, (0, 1)), Pattern.clique(4, (0, 1))], wheel)
    assert bool((found[:, 0] == torch.where((wheel == n).any(0), 2, 1)).all()) and not found[:, 1].any()


def test_numbering_does_not_matter():
    graph = networkx.gnp_random_graph(12, 0.5, seed=4)
    patterns = [Pattern.clique(4, (0, 1)), Pattern.cycle(5, (0, 1)), Pattern(DIAMOND, (0, 1)), Pattern(DIAMOND, (0, 3))]
    edges, moved = edges_of(graph), torch.randperm(12)
    shuffled = torch.randperm(edges.shape[1])
    found = edge_polynomials(patterns, edges, 12)
    assert torch.equal(edge_polynomials(patterns, moved[edges[:, shuffled]], 12), found[shuffled])
    # In the other direction along an edge: the pattern with its outputs exchanged.
    turned = edge_polynomials([p.transpose() for p in patterns], edges.flip(0), 12)
    assert torch.equal(turned, found)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_results_are_like_the_adjacency(layout):
    graph = networkx.karate_club_graph()
    adj = adjacency(graph, layout)
    scalar, node, edge = evaluate_sparse([Pattern.clique(3, range(order)) for order in range(3)], adj, torch.float32)
    assert scalar.shape == () and node.shape == (34,) and edge.layout == layout and edge.shape == (34, 34)
    assert {t.dtype for t in (scalar, node, edge)} == {torch.float32}
    assert torch.equal(edge.to_dense().sum(1), node) and float(node.sum()) == float(scalar) == 270
    entries = "col_indices" if layout == torch.sparse_csr else "indices"
    assert torch.equal(getattr(edge, entries)(), getattr(adj, entries)())
    for empty in (adj.new_empty, None):
        none = torch.sparse_coo_tensor(torch.zeros(2, 0), torch.zeros(0), (3 if empty else 0,) * 2)
        values = evaluate_sparse([Pattern.clique(4, range(order)) for order in range(3)], none)
        assert [tuple(v.shape) for v in values] == [(), none.shape[:1], tuple(none.shape)]
        assert not any(v.to_dense().any() for v in values)
    assert evaluate_sparse([], adj) == []


def test_booleans_count_and_repeated_entries_add_up():
    index = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])
    adj = torch.sparse_coo_tensor(index, torch.tensor([1, 2, 3, 2]), (2, 2))
    assert int(evaluate_sparse(Pattern.path(1), adj)) == 8
    flags = torch.sparse_coo_tensor(index[:, :2], torch.ones(2, dtype=torch.bool), (2, 2))
    found = evaluate_sparse(Pattern.star(3, (0,)), flags)
    assert found.dtype == torch.int64 and found.tolist() == [1, 1]


def test_exact_up_to_int64_and_no_further():
    star = adjacency(networkx.star_graph(300))
    assert int(evaluate_sparse(Pattern.star(7), star)) == 300**7 + 300
    with pytest.raises(OverflowError, match=r"below 2\^63.*got up to 6.56e\+19"):
        evaluate_sparse(Pattern.star(8), star)
    assert_close_rel(evaluate_sparse(Pattern.star(8), star.double()), torch.tensor(300.0**8 + 300, dtype=torch.float64))
    # The estimate is far above 2^63, the values are not; what cancels passes 2^63 on the way.
    index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    large = torch.sparse_coo_tensor(index, torch.full((4,), 2**30), (3, 3))
    assert int(evaluate_sparse(Pattern.clique(3), large)) == 0
    assert evaluate_sparse(Pattern.path(2, (0,)), large).tolist() == [2**61, 2**61, 2**61]


# --------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("small", [False, True])
def test_gradients_of_weights(small, request):
    if small:
        request.getfixturevalue("pieces")
    index = torch.tensor([[0, 0, 0, 1, 1, 2, 3], [1, 2, 3, 2, 3, 3, 3]])
    index = torch.cat([index, index[:, :-1].flip(0)], 1)
    patterns = [
        Pattern([(0, 1), (1, 2), (2, 3), (3, 0)], (0, 1), directed=True),
        Pattern([(0, 1), (1, 2), (2, 0), (0, 3), (1, 3), (3, 2)], (0, 1), directed=True),
        Pattern([(0, 1), (1, 2)], (0, 2), directed=True),
    ]
    weight = torch.randn(13, dtype=torch.float64, requires_grad=True)
    found = edge_polynomials(patterns, index, 4, weight)
    dense = torch.zeros(4, 4, dtype=torch.float64).index_put(tuple(index), weight)
    wanted = torch.stack([polynomial(p, dense)[tuple(index)] for p in patterns], -1)
    assert_close_rel(found, wanted)
    along = torch.randn_like(found)
    ours, exact = (torch.autograd.grad(v, weight, along, retain_graph=True)[0] for v in (found, wanted))
    assert_close_rel(ours, exact, rtol=1e-13)
    with torch.no_grad():
        weight[[0, 5]] = 0  # has a derivative, though what it multiplies is zero
    assert torch.autograd.gradcheck(lambda w: edge_polynomials(patterns, index, 4, w), weight)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_gradients_of_a_sparse_tensor(layout):
    dense = dense_random(n=5, directed=True).double().requires_grad_()
    adj = dense.to_sparse_csr() if layout == torch.sparse_csr else dense.to_sparse_coo()
    pattern = Pattern.cycle(4, (0,), directed=True)
    found = evaluate_sparse(pattern, adj)
    (ours,) = torch.autograd.grad(found.square().sum(), dense)
    ours = ours.to_dense() if ours.layout != torch.strided else ours
    (exact,) = torch.autograd.grad(polynomial(pattern, dense).square().sum(), dense)
    assert_close_rel(ours, exact * (dense != 0), rtol=1e-13)


# ----------------------------------------------------------------------------------------------- bad input


def test_refuses():
    adj = adjacency(networkx.path_graph(3))
    triangle = Pattern.clique(3)

    def refuses(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            evaluate_sparse(*arguments, **options)

    refuses(TypeError, r"adj must be a sparse tensor.*a dense tensor of shape \(3, 3\)", triangle, adj.to_dense())
    refuses(TypeError, "adj must be a sparse tensor.*got list", triangle, [[0]])
    refuses(TypeError, r"patterns\[1\] must be a Pattern, got str", [triangle, "C4"], adj)
    refuses(ValueError, r"adj must be square, got shape \(2, 3\)", triangle, torch.zeros(2, 3).to_sparse_coo())
    refuses(ValueError, "adj must have 2 or 3 dimensions", triangle, torch.zeros(3).to_sparse_coo())
    refuses(TypeError, "adj must be real", triangle, adj.to(torch.complex64))
    refuses(TypeError, "dtype must be floating", triangle, adj.double(), torch.int64)
    refuses(ValueError, r"edge_index must have entries from 0 to 2", triangle, adj, edge_index=torch.tensor([[0], [3]]))
    refuses(ValueError, "an arc from the first to the second.*edge_index", Pattern.path(2, (0, 2)), adj)
    refuses(ValueError, "two outputs must be two nodes.*diagonal", Pattern.path(2, (0, 0)), adj)
    against = Pattern([(1, 0)], (0, 1), directed=True)
    refuses(ValueError, "an arc from the first to the second", against, adj)
    one_way = torch.tensor([[0, 1], [0, 0]]).to_sparse_coo()
    refuses(ValueError, "adj must be symmetric for an undirected pattern", triangle, one_way)
    coloured = Pattern([(0, 1, 2)])
    refuses(ValueError, "arcs must not have a colour", coloured, adj)
    refuses(ValueError, "arcs must have a colour", triangle, torch.zeros(2, 3, 3).to_sparse_coo())
    refuses(ValueError, "adj must have a colour 2", coloured, torch.ones(2, 3, 3).to_sparse_coo())
    refuses(ValueError, "sparse dimensions alone", triangle, torch.ones(3, 3, 1).to_sparse(2))


def test_rounded_weights_are_symmetric_enough():
    """D^-1/2 A D^-1/2, as it comes out of two multiplications, against the trace of its power."""
    graph = networkx.karate_club_graph()
    dense = torch.from_numpy(networkx.to_numpy_array(graph, weight=None)).float()
    scale = dense.sum(0).rsqrt()
    walk = (scale[:, None] * dense) * scale
    walk[0, 1] *= 1 + 2**-23
    found = evaluate_sparse(Pattern.cycle(3), walk.to_sparse_csr())
    assert_close_rel(found, walk.double().matrix_power(3).trace())


# ------------------------------------------------------------------------------------------- edge polynomials


def test_edges_given_twice_count_once_and_get_their_value_twice():
    index = torch.tensor([[0, 1, 1, 2, 0, 2, 0], [1, 0, 2, 1, 2, 0, 1]])
    patterns = [Pattern.clique(3, (0, 1)), Pattern.path(3, (0, 3))]
    found = edge_polynomials(patterns, index)
    assert torch.equal(found, torch.tensor([[1, 3]] * 7))
    with pytest.raises(ValueError, match=r"edge_index must not have an edge twice, got \(0, 1\) 2 ×"):
        edge_polynomials(patterns, index, 3, torch.ones(7))


def test_edge_polynomials_under_compile():
    index = edges_of(networkx.karate_club_graph())
    patterns = [Pattern.clique(4, (0, 1)), Pattern(DIAMOND, (0, 3), directed=True)]
    weight = torch.randint(1, 3, (index.shape[1],)).double()
    compiled = torch.compile(lambda e, w: edge_polynomials(patterns[1:], e, 34, w), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index, weight), edge_polynomials(patterns[1:], index, 34, weight))
    compiled = torch.compile(lambda e: edge_polynomials(patterns, e, 34), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), edge_polynomials(patterns, index, 34))
    assert edge_polynomials([], index).shape == (156, 0)


def test_edge_polynomials_refuse():
    index = torch.tensor([[0, 1], [1, 0]])
    triangle = Pattern.clique(3, (0, 1))
    with pytest.raises(ValueError, match=r"patterns\[0\] must have two outputs"):
        edge_polynomials(Pattern.clique(3, (0,)), index)
    with pytest.raises(TypeError, match=r"patterns\[0\] must be a Pattern, got int"):
        edge_polynomials([3], index)
    with pytest.raises(TypeError, match="edge_index must be int64 or int32"):
        edge_polynomials(triangle, index.float(), 2)
    with pytest.raises(ValueError, match="edge_weight must have the number of edges = 2"):
        edge_polynomials(triangle, index, 2, torch.ones(3))
    with pytest.raises(TypeError, match="edge_weight must be real"):
        edge_polynomials(triangle, index, 2, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="adj must be symmetric"):
        edge_polynomials(triangle, index[:, :1], 2)


# --------------------------------------------------------------------------------------------- masked products


def definition(a, b, index, n):
    """Dense matrices, channel by channel."""

    def dense(values):
        columns = values[:, None] if values.ndim == 1 else values
        return values.new_zeros(n, n, columns.shape[1]).index_put(tuple(index), columns)

    out = torch.einsum("uwc,wvc->uvc", dense(a), dense(b))[tuple(index)]
    return out[:, 0] if a.ndim == 1 else out


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("channels", [None, 3])
def test_masked_product_of_one_way_edges_and_loops(channels, small, request):
    if small:
        request.getfixturevalue("pieces")
    for n in (1, 2, 7):
        index = (torch.rand(n, n) < 0.7).nonzero().T
        index = index[:, torch.randperm(index.shape[1])].to(torch.int32 if small else torch.int64)
        shape = (index.shape[1],) if channels is None else (index.shape[1], channels)
        a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        found = masked_product(a, b, index, n)
        assert torchlayers.last_dispatch() == "torch: tensors on the CPU"
        assert torch.allclose(found, definition(a, b, index, n), atol=1e-12)
        assert torch.equal(masked_product(a, b, edge_support(index, n)), found)


@pytest.mark.parametrize("small", [False, True])
def test_masked_product_has_all_derivatives(small, request):
    if small:
        request.getfixturevalue("pieces")
    index = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 3], [1, 2, 0, 2, 0, 2, 0, 2]])
    support = edge_support(index, 4)
    assert (support.triangles is None) == small
    a, b = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: masked_product(x, y, support), (a, b))
    assert torch.autograd.gradgradcheck(lambda x, y: masked_product(x, y, support), (a, b))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float16])
def test_masked_product_dtypes(dtype):
    index = edges_of(networkx.karate_club_graph())
    a, b = ((3 * torch.randn(index.shape[1])).to(dtype) for _ in range(2))
    found, wanted = masked_product(a, b, index), definition(a.double(), b.double(), index, 34)
    assert found.dtype == dtype
    assert torch.equal(found.double(), wanted) if dtype == torch.int64 else assert_close_rel(found, wanted) >= 0


@pytest.mark.parametrize("small", [False, True])
def test_masked_product_under_compile(small, request):
    """From the triangles that were kept, or by the registered operation."""
    if small:
        request.getfixturevalue("pieces")
    index = edges_of(networkx.karate_club_graph())
    support = edge_support(torch.cat([index, torch.tensor([[3], [3]])], 1), 34)
    a, b = (torch.randn(support.entry.shape[0], 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    compiled = torch.compile(masked_product, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(a, b, support), masked_product(a, b, support)
    assert_close_rel(ours, plain)
    along = torch.randn_like(ours)
    for x, y in zip(torch.autograd.grad(ours, (a, b), along), torch.autograd.grad(plain, (a, b), along), strict=True):
        assert_close_rel(x, y)


def test_support_is_what_it_says():
    index = torch.cat([edges_of(networkx.karate_club_graph())[:, ::3], torch.tensor([[7, 9], [7, 9]])], 1)
    support = edge_support(index, 40)
    row, col = support.row.long(), support.col.long()
    keys = row * 40 + col
    assert bool((keys[1:] > keys[:-1]).all()) and set(keys.tolist()) == {
        i * 40 + j for u, v in index.T.tolist() for i, j in ((u, v), (v, u))
    }
    assert torch.equal(torch.stack([row, col])[:, support.entry.long()], index)
    assert torch.equal(row[support.reverse.long()], col) and torch.equal(col[support.reverse.long()], row)
    assert torch.equal(torch.repeat_interleave(support.offsets.diff().long()), row)
    loops = {node: int(entry) for node, entry in enumerate(support.loops) if entry < len(row)}
    assert loops.keys() == {7, 9} and all(row[e] == col[e] == node for node, e in loops.items())
    corners = [frozenset((*row[t].tolist(), *col[t].tolist())) for t in support.triangles.T.long()]
    graph = networkx.Graph([edge for edge in index.T.tolist() if edge[0] != edge[1]])
    assert len(set(corners)) == len(corners) == sum(networkx.triangles(graph).values()) // 3
    assert edge_support(edges_of(networkx.path_graph(3)), 3).loops is None


@pytest.mark.parametrize("graph", [networkx.barabasi_albert_graph(300, 4, seed=0), networkx.complete_graph(9)])
def test_few_later_neighbours(graph):
    """In the order that triangles are found by, at most three times the degeneracy."""
    row, col = edges_of(graph)
    rank = edges._ranks(row, col, graph.number_of_nodes())
    assert sorted(rank.tolist()) == list(range(graph.number_of_nodes()))
    later = torch.bincount(row[rank[row] < rank[col]])
    assert int(later.max()) <= 3 * max(networkx.core_number(graph).values())


def test_masked_product_refuses():
    index = torch.tensor([[0, 1], [1, 0]])
    a = torch.ones(2)

    def refuses(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            masked_product(*arguments, **options)

    refuses(TypeError, "a must be a tensor", [1.0], a, index)
    refuses(ValueError, "b must have 1 dimensions like a", a, a[:, None], index)
    refuses(TypeError, "a must have a real floating-point dtype or int64, got torch.int32", a.int(), a.int(), index)
    refuses(TypeError, "b must be torch.float32, the dtype of a", a, a.double(), index)
    refuses(ValueError, r"b must have the channels of a = 2", torch.ones(2, 2), torch.ones(2, 3), index)
    refuses(ValueError, "a must have the number of edges = 2", torch.ones(3), torch.ones(3), index)
    refuses(TypeError, "edges must be a tensor", a, a, "edges")
    refuses(ValueError, "edge_index must have entries from 0 to 0, got 0 to 1", a, a, index, 1)
    refuses(ValueError, "num_nodes must be 2, that of edges, got 3", a, a, edge_support(index, 2), 3)
    refuses(ValueError, r"not have an edge twice, got \(0, 1\) 2 ×", a, a, index[:, [0, 0]])
    refuses(torchlayers.BackendError, "tensors on the CPU", a, a, index, backend="triton")
    with pytest.raises(ValueError, match=r"edge_index must have \(source, target\) = 2"):
        edge_support(index[:1], 2)
    assert isinstance(edge_support(index[:, :0], 0), EdgeSupport)
