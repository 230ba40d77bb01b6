"""Packed pairs: what is where, against PyTorch Geometric's dense adjacency and against loops."""

import pickle

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchlayers.polynomial.pairs import PairBatch, PairLayout, to_pair_batch


class Graph:
    """What is read of a PyG Data."""

    def __init__(self, num_nodes, edge_index, **attributes):
        self.num_nodes, self.edge_index = num_nodes, torch.tensor(edge_index, dtype=torch.int64).reshape(2, -1)
        self.__dict__.update(attributes)


def random_graph(n, seed, directed=True):
    generator = torch.Generator().manual_seed(seed)
    adjacency = torch.rand(n, n, generator=generator) < 0.4
    adjacency.fill_diagonal_(False)
    edge_index = (adjacency if directed else adjacency & adjacency.T).nonzero().T
    e = edge_index.shape[1]
    return Graph(
        n,
        edge_index.tolist(),
        x=torch.randn(n, 2, generator=generator),
        edge_attr=torch.randn(e, 3, generator=generator),
        pair_attr=torch.randn(n * n, 2, generator=generator),
        poly=torch.randn(1, 4, generator=generator),
        label=torch.arange(n),
    )


SIZES = (4, 1, 5, 0, 4)


def test_layout_is_where_each_pair_is():
    layout = PairLayout.from_sizes(SIZES)
    index = layout.index()
    assert layout.node_ptr.tolist() == [0, 4, 5, 10, 10, 14]
    assert layout.pair_ptr.tolist() == [0, 16, 17, 42, 42, 58]
    assert (layout.num_graphs, layout.num_nodes, layout.num_pairs, layout.max_nodes) == (5, 14, 58, 5)
    row, diagonal = 0, []
    for g, n in enumerate(SIZES):
        start = row
        for i in range(n):
            for j in range(n):
                assert index.graph[row] == g
                assert index.transpose[row] == start + j * n + i
                assert index.padded[row] == (g * 5 + i) * 5 + j
                if i == j:
                    diagonal.append(row)
                row += 1
    assert index.diagonal.tolist() == diagonal
    assert layout.index() is index


@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 0], [3, 3]])
def test_layouts_at_the_edge(sizes):
    layout = PairLayout.from_sizes(sizes)
    assert layout.sizes.tolist() == sizes
    assert layout.num_pairs == sum(n * n for n in sizes)
    batch = PairBatch(torch.randn(layout.num_pairs, 2), layout)
    x, mask = batch.to_dense()
    assert x.shape == (len(sizes), max(sizes, default=0), max(sizes, default=0), 2)
    assert torch.equal(PairBatch.from_dense(x, mask).x, batch.x)
    assert [tuple(part.shape) for part in batch.unbatch()] == [(n, n, 2) for n in sizes]
    assert PairLayout.from_sizes(torch.tensor(sizes, dtype=torch.int64)).pair_ptr.tolist() == layout.pair_ptr.tolist()


def test_channels_against_dense_adjacency_of_pyg():
    utils = pytest.importorskip("torch_geometric.utils")
    graphs = [random_graph(n, seed) for seed, n in enumerate(SIZES) if n]
    pairs = PairBatch.from_data_list(graphs, graph_attr="poly")
    dense, mask = pairs.to_dense()
    starts = torch.tensor([0, *[g.num_nodes for g in graphs]]).cumsum(0)
    edge_index = torch.cat([g.edge_index + s for g, s in zip(graphs, starts, strict=False)], 1)
    vector = torch.repeat_interleave(torch.tensor([g.num_nodes for g in graphs]))
    options = {"batch": vector, "batch_size": len(graphs), "max_num_nodes": 5}
    want = torch.cat(
        [
            utils.to_dense_adj(edge_index, **options)[..., None],
            utils.to_dense_adj(edge_index, edge_attr=torch.cat([g.edge_attr for g in graphs]), **options),
        ],
        dim=-1,
    )
    assert dense.shape[-1] == 4 + 2 + 1 + 3 + 2
    assert torch.equal(dense[..., 6:10], want)
    nodes, want_mask = utils.to_dense_batch(torch.cat([g.x for g in graphs]), vector, batch_size=len(graphs))
    assert torch.equal(mask, want_mask)
    assert torch.equal(dense[..., 10:], torch.diag_embed(nodes.mT).movedim(1, -1))
    for number, graph in enumerate(graphs):
        n = graph.num_nodes
        assert torch.equal(dense[number, :n, :n, 4:6], graph.pair_attr.view(n, n, 2))
        assert torch.equal(dense[number, :n, :n, :4], graph.poly.expand(n, n, 4))
        assert not dense[number, n:].any() and not dense[number, :, n:].any()


def test_a_pyg_batch_gives_what_its_graphs_give():
    data = pytest.importorskip("torch_geometric.data")
    graphs = [random_graph(n, seed) for seed, n in enumerate(SIZES)]
    fields = ("edge_index", "x", "edge_attr", "pair_attr", "poly")
    of_pyg = [data.Data(num_nodes=g.num_nodes, **{name: getattr(g, name) for name in fields}) for g in graphs]
    names = {"x": ("x",), "pair_attr": "pair_attr", "graph_attr": ["poly"]}
    want = PairBatch.from_data_list(graphs, **names)
    for got in (
        PairBatch.from_data(data.Batch.from_data_list(of_pyg), **names),
        PairBatch.from_data_list(of_pyg, **names),
    ):
        assert torch.equal(got.x, want.x)
        assert got.sizes.tolist() == list(SIZES)
    one = PairBatch.from_data(of_pyg[0])
    assert torch.equal(one.x, want.x[:16, 4:])


def test_function_reads_single_columns_ints_and_a_batch_vector():
    edge_index = torch.tensor([[0, 1, 3], [1, 0, 2]])
    pairs = to_pair_batch(
        edge_index,
        torch.tensor([0, 0, 2, 2]),
        edge_attr=torch.tensor([5, 6, 7]),
        x=torch.tensor([1.5, 2.5, 3.5, 4.5], dtype=torch.float64),
        num_graphs=4,
    )
    assert pairs.sizes.tolist() == [2, 0, 2, 0]
    assert pairs.x.dtype == torch.float64
    first, _, second, _ = pairs.unbatch()
    assert first[..., 0].tolist() == [[0, 1], [1, 0]] and second[..., 0].tolist() == [[0, 0], [1, 0]]
    assert first[..., 1].tolist() == [[0, 5], [6, 0]] and second[..., 1].tolist() == [[0, 0], [7, 0]]
    assert first[..., 2].tolist() == [[1.5, 0], [0, 2.5]] and second[..., 2].tolist() == [[3.5, 0], [0, 4.5]]
    without = to_pair_batch(edge_index, edge_attr=torch.ones(3), adjacency=False, num_nodes=5)
    assert without.x.shape == (25, 1) and without.x.sum() == 3
    assert to_pair_batch(edge_index).x.shape == (16, 1)
    assert to_pair_batch(torch.empty(2, 0, dtype=torch.int64)).x.shape == (0, 1)


def test_channels_do_not_depend_on_the_order_of_edges():
    graph = random_graph(5, 0)
    order = torch.randperm(graph.edge_index.shape[1])
    a = to_pair_batch(graph.edge_index, edge_attr=graph.edge_attr, num_nodes=5)
    b = to_pair_batch(graph.edge_index[:, order], edge_attr=graph.edge_attr[order], num_nodes=5)
    assert torch.equal(a.x, b.x)


def test_dense_and_back_with_nodes_in_any_place():
    x = torch.randn(3, 4, 4, 2)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    pairs = PairBatch.from_dense(x, mask)
    assert pairs.sizes.tolist() == [3, 0, 1]
    first, _, last = pairs.unbatch()
    keep = [0, 2, 3]
    assert torch.equal(first, x[0][keep][:, keep]) and torch.equal(last, x[2, 1:2, 1:2])
    dense, compact = pairs.to_dense(fill=float("nan"))
    assert compact.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert torch.equal(dense.isnan()[..., 0], ~(compact[:, :, None] & compact[:, None, :]))
    assert torch.equal(PairBatch.from_dense(dense, compact).x, pairs.x)


def test_moved_pickled_flattened():
    batch = PairBatch(torch.randn(13, 2), PairLayout.from_sizes([2, 3]))
    batch.layout.index()
    there = batch.to("meta")
    assert there.x.is_meta and there.node_ptr.is_meta and there.layout.index().transpose.is_meta
    assert batch.to("cpu").layout is batch.layout
    leaves, spec = tree_flatten(batch)
    assert len(leaves) == 3
    for other in (pickle.loads(pickle.dumps(batch)), tree_unflatten(leaves, spec), batch.with_x(batch.x)):
        assert torch.equal(other.x, batch.x) and other.layout.num_pairs == 13
        assert torch.equal(other.layout.index().transpose, batch.layout.index().transpose)
    assert tree_unflatten([None] * 3, spec).x is None


def with_(**attributes):
    graph = random_graph(3, 0)
    graph.__dict__.update(attributes)
    return graph


EDGES = torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("edge_index", lambda: to_pair_batch([[0], [1]])),
        ("edge_index", lambda: to_pair_batch(EDGES.float())),
        ("edge_index", lambda: to_pair_batch(torch.zeros(3, 2, dtype=torch.int64))),
        ("0 to 1, got 0 to 5", lambda: to_pair_batch(torch.tensor([[0], [5]]), x=torch.ones(2))),
        ("got -1 to 0", lambda: to_pair_batch(torch.tensor([[0], [-1]]), x=torch.ones(2))),
        ("(1, 0) more often", lambda: to_pair_batch(torch.tensor([[1, 0, 1], [0, 1, 0]]))),
        ("one graph, got the edge (1, 0)", lambda: to_pair_batch(EDGES[:, 1:], torch.tensor([0, 1]))),
        ("batch", lambda: to_pair_batch(EDGES, torch.tensor([1, 0]))),
        ("batch", lambda: to_pair_batch(EDGES, torch.tensor([0.0, 0.0]))),
        ("batch", lambda: to_pair_batch(EDGES, torch.tensor([0, 0]), num_nodes=3)),
        ("num_graphs", lambda: to_pair_batch(EDGES, torch.tensor([0, 3]), num_graphs=3)),
        ("num_graphs", lambda: to_pair_batch(EDGES, num_graphs=3)),
        ("x must have one row per node, 2", lambda: to_pair_batch(EDGES, x=torch.ones(3, 1), num_nodes=2)),
        ("edge_attr", lambda: to_pair_batch(EDGES, edge_attr=torch.ones(3))),
        ("pair_attr must have one row per pair", lambda: to_pair_batch(EDGES, pair_attr=torch.ones(3, 1))),
        ("graph_attr", lambda: to_pair_batch(EDGES, graph_attr=torch.ones(3, 1))),
        ("x must be a tensor", lambda: to_pair_batch(EDGES, num_nodes=2, x=[1, 2])),
        ("x must be real", lambda: to_pair_batch(EDGES, x=torch.ones(2, dtype=torch.complex64))),
        ("adjacency", lambda: to_pair_batch(EDGES, adjacency=False)),
        ("data_list", lambda: PairBatch.from_data_list([])),
        ("'color'", lambda: PairBatch.from_data_list([random_graph(3, 0)], x="color")),
        ("edge_index", lambda: PairBatch.from_data_list([with_(edge_index=None)])),
        ("edge_index", lambda: PairBatch.from_data(with_(edge_index=None))),
        ("pair_attr must have one row per pair", lambda: PairBatch.from_data_list([with_(pair_attr=torch.ones(8, 2))])),
        ("x must have the same", lambda: PairBatch.from_data_list([random_graph(3, 0), with_(x=torch.ones(3, 1))])),
        ("x must have one row", lambda: PairBatch.from_data_list([with_(x=torch.ones(n, 1)) for n in (2, 4)])),
        ("sizes", lambda: PairLayout.from_sizes([2, -1])),
        ("sizes", lambda: PairLayout.from_sizes([2.5])),
        ("x must have the layout's 4", lambda: PairBatch(torch.ones(3, 1), PairLayout.from_sizes([2]))),
        ("x must have 2", lambda: PairBatch(torch.ones(4), PairLayout.from_sizes([2]))),
        ("layout", lambda: PairBatch(torch.ones(4, 1), [2])),
        ("mask", lambda: PairBatch.from_dense(torch.ones(2, 3, 3, 1), torch.ones(2, 3))),
        ("mask", lambda: PairBatch.from_dense(torch.ones(2, 3, 3, 1), torch.ones(2, 2).bool())),
        ("square", lambda: PairBatch.from_dense(torch.ones(2, 3, 2, 1))),
        ("x must have 4", lambda: PairBatch.from_dense(torch.ones(3, 3, 1))),
    ],
)
def test_bad_input_is_named(name, call):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert name in str(error.value)
