"""AddPolynomialFeatures against networkx, PyG's random walks and einsum; batches, files, large graphs, mistakes."""

import pickle
import warnings

import pytest
import torch

pytest.importorskip("networkx")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torch_geometric.data")

import networkx
import torch_geometric.transforms as T
from torch_geometric.data import Batch, Data, HeteroData, InMemoryDataset

from torchlayers.data import graphs
from torchlayers.polynomial import AddPolynomialFeatures, Pattern, enumerate_patterns, transforms

TRIANGLE, CHERRY = Pattern.cycle(3, outputs=(0,)), Pattern.star(2, outputs=(0,))


def random_graph(n=9, p=0.5, seed=0):
    return networkx.gnp_random_graph(n, p, seed=seed)


def to_data(graph, **attributes):
    return Data(**attributes, **graphs.graph_from_edges(graph.number_of_nodes(), graph.edges()).to_dict())


def adjacency(data):
    dense = torch.zeros(data.num_nodes, data.num_nodes, dtype=torch.int64)
    dense[data.edge_index[0], data.edge_index[1]] = 1
    return dense


def test_the_default_is_what_ppgn_misses():
    transform = AddPolynomialFeatures()
    counts = (transform.num_graph_features, transform.num_node_features, transform.num_pair_features)
    assert counts == (1, 1, 10) and all(p.degree in (5, 6) for p in transform.patterns)
    found = transform(graphs.rook_graph(4))
    assert found.poly_graph.shape == (1, 1) and found.poly_node.shape == (16, 1)
    assert found.poly_pair.shape == (256, 10) and found.poly_edge.shape == (96, 10)
    # A rook's graph has 8 complete subgraphs of 4 nodes, each the image of 24 maps, two at each node.
    assert found.poly_graph.item() == 192 and found.poly_node.flatten().tolist() == [12.0] * 16
    assert transform(graphs.shrikhande_graph()).poly_graph.item() == 0


def test_values_are_those_of_networkx_and_einsum():
    graph = random_graph()
    data, a = to_data(graph), adjacency(to_data(graph))
    pairs = [Pattern.path(2, outputs=(0, 2)), Pattern([(0, 1), (0, 2), (1, 2)], outputs=(0, 1))]
    found = AddPolynomialFeatures([TRIANGLE, *pairs, CHERRY, Pattern.cycle(4)])(data)
    triangles, degrees = networkx.triangles(graph), dict(graph.degree)
    assert found.poly_node.tolist() == [[2.0 * triangles[v], float(degrees[v] ** 2)] for v in range(9)]
    assert found.poly_graph.item() == torch.linalg.matrix_power(a, 4).trace()
    expected = torch.stack([a @ a, a * (a @ a)], dim=-1).float()
    assert torch.equal(found.poly_pair, expected.reshape(81, 2))
    assert torch.equal(found.poly_edge, expected[data.edge_index[0], data.edge_index[1]])


def test_cycles_of_random_walks_are_pygs_walk_encoding():
    data = to_data(networkx.connected_watts_strogatz_graph(12, 4, 0.4, seed=1))
    degree = torch.zeros(12).index_add(0, data.edge_index[0], torch.ones(data.num_edges))
    data.step = 1 / degree[data.edge_index[0]].double()
    cycles = [Pattern.cycle(k, outputs=(0,), directed=True) for k in range(1, 7)]
    found = AddPolynomialFeatures(cycles, weight_attr="step", pair_attr=False)(data).poly_node
    expected = T.AddRandomWalkPE(6)(data).random_walk_pe
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_weights_and_colours():
    torch.manual_seed(3)
    data = to_data(random_graph(7))
    a = torch.rand(7, 7).double()
    a = a + a.T
    one = torch.zeros(7, 7).double()
    one[data.edge_index[0], data.edge_index[1]] = 1.0
    a = a * one
    data.weight = a[data.edge_index[0], data.edge_index[1]]
    wedge = Pattern([(0, 1), (0, 1), (1, 2)], outputs=(0, 2))
    found = AddPolynomialFeatures([wedge], weight_attr="weight", edge_attr=False)(data).poly_pair
    torch.testing.assert_close(found.reshape(7, 7).double(), (a * a) @ a, rtol=1e-6, atol=1e-7)
    # Two colours, of which the second is the square of the first.
    data.bonds = torch.stack([data.weight, data.weight**2], dim=1)
    mixed = Pattern([(0, 1, 0), (1, 2, 1)], outputs=(0, 2))
    found = AddPolynomialFeatures([mixed], weight_attr="bonds", edge_attr=False)(data).poly_pair
    torch.testing.assert_close(found.reshape(7, 7).double(), a @ (a * a), rtol=1e-6, atol=1e-7)
    single = AddPolynomialFeatures([Pattern([(0, 1, 0), (1, 2, 0)], outputs=(0, 2))], weight_attr="weight")(data)
    torch.testing.assert_close(single.poly_pair.reshape(7, 7).double(), a @ a, rtol=1e-6, atol=1e-7)
    enumerated = AddPolynomialFeatures(degree=2, exclude=None, weight_attr="weight", pair_attr=False, graph_attr=False)
    assert enumerated.kind == "weighted" and any(not p.is_simple for p in enumerated.patterns)


def test_directed_graphs():
    data = Data(edge_index=torch.tensor([[0, 1, 2, 0], [1, 2, 0, 3]]), num_nodes=4)
    ring, path = Pattern.cycle(3, outputs=(0,), directed=True), Pattern.path(2, outputs=(0, 2), directed=True)
    found = AddPolynomialFeatures([ring, path], edge_attr=False)(data)
    assert found.poly_node.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]
    pairs = torch.zeros(4, 4)
    pairs[0, 2] = pairs[1, 0] = pairs[2, 1] = pairs[2, 3] = 1
    assert torch.equal(found.poly_pair.reshape(4, 4), pairs)
    with pytest.raises(ValueError, match=r"each edge in both directions .* got 0 to 1"):
        AddPolynomialFeatures()(data)


def test_neither_the_order_of_edges_nor_copies_of_them_matter():
    data = graphs.rook_graph(3)
    transform = AddPolynomialFeatures([TRIANGLE, Pattern.path(2, outputs=(0, 2))])
    plain = transform(data)
    order = torch.randperm(data.num_edges, generator=torch.Generator().manual_seed(0))
    order = torch.cat([order, order[:5]])
    shuffled = transform(Data(edge_index=data.edge_index[:, order], num_nodes=9))
    assert torch.equal(shuffled.poly_node, plain.poly_node) and torch.equal(shuffled.poly_pair, plain.poly_pair)
    assert torch.equal(shuffled.poly_edge, plain.poly_edge[order])
    # And with the nodes in another order, features go with their nodes.
    nodes = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    moved = transform(graphs.graph_from_edges(9, nodes[data.edge_index].T.tolist()))
    assert torch.equal(moved.poly_node[nodes], plain.poly_node)
    assert torch.equal(moved.poly_pair.reshape(9, 9)[nodes][:, nodes], plain.poly_pair.reshape(9, 9))


@pytest.mark.parametrize("order", range(2))
def test_batches_hold_each_graph_as_it_was(order):
    sizes = [(5, 0.6), (1, 0.0), (8, 0.4), (2, 1.0)]
    data = [to_data(random_graph(n, p, seed=n)) for n, p in sizes]
    transform = AddPolynomialFeatures(degree=4, exclude="mpnn")
    made = [transform(d) for d in data][:: -1 if order else 1]
    batch = Batch.from_data_list(made)
    assert batch.poly_graph.shape == (4, transform.num_graph_features)
    assert batch.poly_pair.shape == (25 + 1 + 64 + 4, transform.num_pair_features)
    assert batch.poly_node.shape == (16, transform.num_node_features)
    for one, back in zip(made, batch.to_data_list(), strict=True):
        for name in ("poly_graph", "poly_node", "poly_edge", "poly_pair"):
            assert torch.equal(one[name], back[name])


def test_packed_pairs_are_those_of_the_pair_batch():
    pairs = pytest.importorskip("torchlayers.polynomial.pairs")
    transform = AddPolynomialFeatures(degree=5, edge_attr=False)
    data = [transform(to_data(random_graph(n, 0.7, seed=n))) for n in (4, 6)]
    packed = pairs.PairBatch.from_data_list(data, pair_attr="poly_pair", adjacency=False)
    for one, part in zip(data, packed.unbatch(), strict=True):
        n = one.num_nodes
        assert torch.equal(part, one.poly_pair.reshape(n, n, -1))


def test_empty_graphs_and_single_nodes():
    transform = AddPolynomialFeatures(exclude="mpnn", degree=4)
    for n in (0, 1, 3):
        found = transform(Data(edge_index=torch.zeros(2, 0, dtype=torch.int64), num_nodes=n))
        assert found.poly_node.shape == (n, transform.num_node_features) and not found.poly_node.any()
        assert found.poly_pair.shape[0] == n * n and found.poly_edge.shape[0] == 0
        assert found.poly_graph.shape == (1, transform.num_graph_features) and not found.poly_graph.any()


def test_features_go_behind_what_a_graph_has():
    data = to_data(random_graph(6))
    data.x, data.edge_attr = torch.arange(6), torch.ones(data.num_edges, 2)
    patterns = [TRIANGLE, CHERRY, Pattern.path(2, outputs=(0, 2))]
    found = AddPolynomialFeatures(patterns, node_attr=None, edge_attr=None, pair_attr=False)(data)
    alone = AddPolynomialFeatures(patterns)(data)
    assert torch.equal(found.x, torch.cat([torch.arange(6.0)[:, None], alone.poly_node], dim=1))
    assert torch.equal(found.edge_attr[:, 2:], alone.poly_edge) and "poly_pair" not in found
    assert data.x.ndim == 1  # what was given is left alone
    bare = AddPolynomialFeatures([TRIANGLE], node_attr=None)(to_data(random_graph(6)))
    assert torch.equal(bare.x, alone.poly_node[:, :1])


def test_normalizations():
    data = to_data(random_graph(8, 0.8))
    patterns = [TRIANGLE, CHERRY, Pattern.cycle(3)]
    plain = AddPolynomialFeatures(patterns)(data)
    logs = AddPolynomialFeatures(patterns, normalize="log1p")(data)
    torch.testing.assert_close(logs.poly_node, plain.poly_node.log1p())
    torch.testing.assert_close(logs.poly_graph, plain.poly_graph.log1p())
    unit = AddPolynomialFeatures(patterns, normalize="l2")(data)
    rows = torch.nn.functional.normalize(plain.poly_node, dim=1)
    torch.testing.assert_close(unit.poly_node, torch.nn.functional.normalize(rows, dim=0))
    assert unit.poly_graph.tolist() == [[1.0]]
    silent = AddPolynomialFeatures(patterns, normalize="l2")(to_data(networkx.empty_graph(4)))
    assert silent.poly_node.tolist() == [[0.0, 0.0]] * 4


def test_counts_are_exact_before_they_are_rounded():
    star = to_data(networkx.star_graph(5000))
    transform = AddPolynomialFeatures([Pattern.star(4, outputs=(0,))], normalize="log1p")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = transform(star).poly_node
    finally:
        torch.set_default_dtype(before)
    assert found[0].item() == torch.tensor(5000.0**4, dtype=torch.float64).log1p().item()
    assert found.dtype == torch.float64 and transform(star).poly_node.dtype == torch.float32


def test_what_never_fires_in_training_is_left_out():
    train = [to_data(networkx.cycle_graph(5)), to_data(networkx.path_graph(4))]
    test = to_data(networkx.complete_graph(5))
    patterns = [Pattern.cycle(k, outputs=(0,)) for k in (3, 4, 5)] + [Pattern.clique(4), Pattern.cycle(5)]
    transform = AddPolynomialFeatures(patterns, drop_inactive=True)
    assert "not fitted" in repr(transform)
    with pytest.raises(RuntimeError, match="fit"):
        transform(test)
    assert transform.fit(train) is transform
    assert transform.patterns == (patterns[1], patterns[2], patterns[4])
    assert transform(test).poly_node.shape == (5, 2) and transform(test).poly_graph.shape == (1, 1)
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(test).poly_node, transform(test).poly_node)
    assert transform.fit([test]).patterns == tuple(patterns)  # a new fit forgets the old one
    assert AddPolynomialFeatures(patterns).fit([]).patterns == tuple(patterns)
    assert transform.fit([]).patterns == () and "poly_node" not in transform(test)


def test_as_pre_transform_of_a_data_set(tmp_path):
    class Three(InMemoryDataset):
        raw_file_names, processed_file_names = (), ("three.pt",)

        def process(self):
            made = [to_data(random_graph(n, 0.6, seed=n)) for n in (4, 6, 5)]
            self.save([self.pre_transform(d) for d in made], self.processed_paths[0])

        def __init__(self, root, **options):
            super().__init__(root, log=False, **options)
            self.load(self.processed_paths[0])

    transform = AddPolynomialFeatures(degree=3, exclude="mpnn")
    found = Three(tmp_path, pre_transform=transform)
    for n, data in zip((4, 6, 5), found, strict=True):
        expected = transform(to_data(random_graph(n, 0.6, seed=n)))
        assert all(torch.equal(data[name], expected[name]) for name in ("poly_node", "poly_pair", "poly_graph"))
    composed = T.Compose([T.ToUndirected(), transform])
    assert composed(Data(edge_index=torch.tensor([[0, 1, 2], [1, 2, 0]]), num_nodes=3)).poly_graph.any()


def test_large_graphs_have_edges_and_nodes_without_a_dense_matrix():
    graph = networkx.barabasi_albert_graph(3000, 4, seed=0)
    data = to_data(graph)
    transform = AddPolynomialFeatures(
        [TRIANGLE, Pattern.clique(4), Pattern.path(2, outputs=(0, 2)), Pattern.star(3)], pair_attr=False
    )
    found = transform(data)
    triangles = networkx.triangles(graph)
    assert found.poly_node.flatten().tolist() == [2.0 * triangles[v] for v in range(3000)]
    cliques = sum(len(c) == 4 for c in networkx.enumerate_all_cliques(graph))
    degrees = torch.tensor([d for _, d in sorted(graph.degree)])
    assert found.poly_graph.tolist() == [[24.0 * cliques, float((degrees**3).sum())]]
    common = [len(list(networkx.common_neighbors(graph, u, v))) for u, v in data.edge_index[:, :200].T.tolist()]
    assert found.poly_edge[:200].flatten().tolist() == [float(c) for c in common]
    with pytest.raises(ValueError, match=r"pair_attr must be False .* for 3000 nodes"):
        AddPolynomialFeatures()(data)


@pytest.mark.parametrize("case", ["simple", "weighted", "loops", "directed", "directed, weighted", "coloured"])
def test_edges_without_a_dense_matrix_have_the_same_values(monkeypatch, case):
    generator = torch.Generator().manual_seed(5)
    a = torch.randint(0, 4, (9, 9), generator=generator) * (torch.rand(9, 9, generator=generator) < 0.4)
    a = a if case.startswith("directed") else a + a.T
    if case not in ("loops", "directed, weighted"):
        a.fill_diagonal_(0)
    edge_index = a.nonzero().T
    data = Data(edge_index=edge_index[:, torch.randperm(edge_index.shape[1], generator=generator)], num_nodes=9)
    weight_attr = None if case in ("simple", "directed") else "w"
    data.w = a[data.edge_index[0], data.edge_index[1]].double()
    directed = case.startswith("directed")
    patterns = [p for d in (1, 2, 3) for o in range(3) for p in enumerate_patterns(d, o, kind="directed")][::5]
    if not directed:
        patterns = [Pattern(p.edges, p.outputs, num_nodes=p.num_nodes) for p in patterns]
    if case == "coloured":
        data.w = torch.stack([data.w, data.w**2], dim=1)
        patterns = [Pattern([(*e, i % 2) for i, e in enumerate(p.edges)], p.outputs) for p in patterns if p.degree > 1]
    transform = AddPolynomialFeatures(patterns, weight_attr=weight_attr, pair_attr=False)
    dense = transform(data)
    monkeypatch.setattr(transforms, "_DENSE_NODES", 0)
    monkeypatch.setattr(transforms, "evaluate", lambda *_: pytest.fail("it was dense"))
    sparse = transform(data)
    for name in ("poly_graph", "poly_node", "poly_edge"):
        assert dense[name].any()
        torch.testing.assert_close(sparse[name], dense[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"normalize": "log"}, ValueError, "normalize must be one of .* did you mean 'log1p'"),
        ({"degree": 0}, ValueError, "degree must be at least 1"),
        ({"degree": 9}, ValueError, "degree must be at most 8"),
        ({"exclude": "gnn"}, ValueError, "bank must be one of"),
        ({"kind": "sparse"}, ValueError, "kind must be one of"),
        ({"pair_attr": None}, ValueError, "pair_attr must be the name of an attribute or False, got None"),
        ({"node_attr": "poly_index"}, ValueError, "no meaning when it collates, got 'poly_index'"),
        ({"node_attr": True}, ValueError, "node_attr must be the name of an attribute, None to append, or False"),
        ({"node_attr": "same", "edge_attr": "same"}, ValueError, "different names"),
        ({"patterns": []}, ValueError, "patterns must have at least one"),
        ({"patterns": [TRIANGLE], "node_attr": False}, ValueError, "patterns must have at least one"),
        ({"patterns": ["triangle"]}, TypeError, "Pattern objects"),
        ({"patterns": [Pattern([(0, 1, 0)], outputs=(0,))]}, ValueError, "weight_attr must name"),
        (dict.fromkeys(("node_attr", "edge_attr", "pair_attr", "graph_attr"), False), ValueError, "not all False"),
    ],
)
def test_mistakes_in_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        AddPolynomialFeatures(**options)


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (HeteroData(), {}, TypeError, "must be a torch_geometric.data.Data, got HeteroData"),
        (Batch.from_data_list([graphs.cycle_graph(3)] * 2), {}, ValueError, "before batching"),
        (Data(num_nodes=3), {}, ValueError, "must have edge_index"),
        (Data(edge_index=torch.tensor([[0, 1], [1, 1]]), num_nodes=2), {}, ValueError, "no loops .* node 1"),
        (Data(edge_index=torch.tensor([[0], [1]]), num_nodes=2), {}, ValueError, "got 0 to 1: use ToUndirected"),
        (Data(edge_index=torch.tensor([[0, 5], [5, 0]]), num_nodes=3), {}, ValueError, "nodes from 0 to 2, got 0 to 5"),
        (graphs.cycle_graph(3), {"weight_attr": "w"}, ValueError, r"data.w must be a tensor \(E,\) .* got None"),
    ],
)
def test_mistakes_in_data_are_named(data, options, error, words):
    with pytest.raises(error, match=words):
        AddPolynomialFeatures(degree=3, exclude=None, **options)(data)


def test_weights_must_be_unambiguous_and_symmetric():
    edges = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])
    transform = AddPolynomialFeatures([TRIANGLE], weight_attr="w")
    with pytest.raises(ValueError, match="2 copies of 0 to 1"):
        transform(Data(edge_index=edges, w=torch.ones(4), num_nodes=2))
    with pytest.raises(ValueError, match="one column for patterns without colours, got 2"):
        transform(Data(edge_index=edges[:, :2], w=torch.ones(2, 2), num_nodes=2))
    with pytest.raises(ValueError, match="equal weights"):
        transform(Data(edge_index=edges[:, :2], w=torch.tensor([1.0, 2.0]), num_nodes=2))
