"""The message-passing layer with polynomials as edge weights, against dense matrices."""

import copy
import pickle

import pytest
import torch

networkx = pytest.importorskip("networkx", reason="needs the extra 'graphs'")
geometric = pytest.importorskip("torch_geometric", reason="needs the extra 'graphs'")

from torch_geometric.data import Batch, Data  # noqa: E402
from torch_geometric.nn import Sequential  # noqa: E402

from torchlayers.polynomial.conv import PolynomialConv, default_patterns  # noqa: E402
from torchlayers.polynomial.patterns import Pattern  # noqa: E402
from torchlayers.polynomial.sparse import edge_polynomials  # noqa: E402
from torchlayers.testing import assert_close_rel  # noqa: E402


def karate() -> tuple[torch.Tensor, torch.Tensor]:
    """Edges in a random order, and the dense matrix."""
    graph = networkx.karate_club_graph()
    dense = torch.from_numpy(networkx.to_numpy_array(graph, weight=None))
    edges = dense.nonzero().T
    return edges[:, torch.randperm(edges.shape[1])], dense


def test_against_dense_matrices():
    """The default patterns by products of dense matrices: A², and common neighbours that are joined."""
    edges, a = karate()
    conv = PolynomialConv(5, 4, dtype=torch.float64)
    torch.nn.init.normal_(conv.gate.bias)
    x = torch.randn(34, 5, dtype=torch.float64)
    triangles = a * (a @ a)
    rims = [a * (a @ triangles), a * (triangles @ a)]
    cliques = a * torch.einsum("uw,vw,ux,vx,wx->uv", a, a, a, a, a)
    values = torch.stack([triangles, *rims, cliques], -1)
    # The rims' names: the first output has two neighbours, or the second.
    found = edge_polynomials(default_patterns(), edges)
    order = [0, 1, 2, 3] if torch.equal(found.double(), values[tuple(edges)]) else [0, 2, 1, 3]
    values = values[..., order]
    assert torch.equal(found.double(), values[tuple(edges)])
    gate = 1 + values.log1p() @ conv.gate.weight.T + conv.gate.bias
    wanted = torch.einsum("ji,jic,jc->ic", a, gate, x @ conv.lin.weight.T) + conv.lin_root(x)
    assert_close_rel(conv(x, edges), wanted)


def test_counts_as_they_are_and_one_way_edges():
    edges = (torch.rand(8, 8) < 0.5).nonzero().T
    patterns = [Pattern([(0, 1), (1, 2), (2, 0)], (0, 1), directed=True), Pattern.path(2, (0, 2), directed=True)]
    conv = PolynomialConv(3, 2, patterns, normalize="none", edge_dim=4, bias=False, dtype=torch.float64)
    x, e = torch.randn(8, 3, dtype=torch.float64), torch.randn(edges.shape[1], 4, dtype=torch.float64)
    a = torch.zeros(8, 8, dtype=torch.float64).index_put(tuple(edges), torch.ones(1, dtype=torch.float64))
    values = torch.stack([a * (a @ a).T, a @ a], -1)[tuple(edges)]
    gate = 1 + values @ conv.gate.weight.T + e @ conv.lin_edge.weight.T
    messages = gate * (x @ conv.lin.weight.T)[edges[0]]
    wanted = x @ conv.lin_root.weight.T
    assert_close_rel(conv(x, edges, e), wanted.index_add(0, edges[1], messages))


def test_the_other_flow_is_the_other_way_round():
    edges, _ = karate()
    conv, other = PolynomialConv(3, 4), PolynomialConv(3, 4, flow="target_to_source")
    other.load_state_dict(conv.state_dict())
    x, poly = torch.randn(34, 3), torch.randn(edges.shape[1], 4)
    assert_close_rel(other(x, edges.flip(0), poly=poly), conv(x, edges, poly=poly))


@pytest.mark.parametrize("aggr", ["add", "mean", "max"])
def test_permutations_and_batches(aggr):
    edges, _ = karate()
    conv, x, moved = (
        PolynomialConv(3, 4, aggr=aggr, dtype=torch.float64),
        torch.randn(34, 3).double(),
        torch.randperm(34),
    )
    out = conv(x, edges)
    turned = conv(torch.empty_like(x).index_copy(0, moved, x), moved[edges])
    assert_close_rel(turned[moved], out)
    ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
    small = Data(x=torch.randn(3, 3, dtype=torch.float64), edge_index=torch.cat([ring, ring.flip(0)], 1))
    alone = Data(x=torch.randn(1, 3, dtype=torch.float64), edge_index=torch.zeros(2, 0, dtype=torch.int64))
    batch = Batch.from_data_list([small, Data(x=x, edge_index=edges), alone])
    parts = [conv(data.x, data.edge_index) for data in (small, Data(x=x, edge_index=edges), alone)]
    assert_close_rel(conv(batch.x, batch.edge_index), torch.cat(parts))


def test_it_sees_what_message_passing_does_not():
    """A ring of six nodes and two triangles: all nodes of both have two neighbours."""
    ring, triangles = networkx.cycle_graph(6), networkx.disjoint_union(*[networkx.cycle_graph(3)] * 2)
    first, second = (torch.tensor(list(g.to_directed().edges)).T for g in (ring, triangles))
    conv, x = PolynomialConv(2, 3), torch.ones(6, 2)
    assert (conv(x, first) - conv(x, second)).abs().min() > 1e-3
    blind = PolynomialConv(2, 3, [Pattern.path(1, (0, 1))])
    assert_close_rel(blind(x, first), blind(x, second))


def test_pairs_of_nodes():
    """Two kinds of nodes, and what a sampler gives: targets first among the sources."""
    edges = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 0]])
    conv, poly = PolynomialConv((3, 5), 4), torch.randint(0, 5, (4, 4))
    source, target = torch.randn(3, 3), torch.randn(2, 5)
    out = conv((source, target), edges, poly=poly)
    assert out.shape == (2, 4)
    alone = conv((source, None), edges, poly=poly, size=(3, 2))
    assert_close_rel(out - target @ conv.lin_root.weight.T, alone)
    with pytest.raises(ValueError, match="poly must be given where x is a pair"):
        conv((source, target), edges)
    with pytest.raises(ValueError, match="x must be one tensor for flow='target_to_source'"):
        PolynomialConv((3, 5), 4, flow="target_to_source")((source, target), edges.flip(0), poly=poly)


def test_cached():
    edges, _ = karate()
    conv, plain = PolynomialConv(3, 4, cached=True), PolynomialConv(3, 4)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(34, 3)
    assert torch.equal(conv(x, edges), plain(x, edges))
    assert torch.equal(conv(x.flip(0), edges), plain(x.flip(0), edges))
    assert conv._cached_poly is not None and "cached=True" in repr(conv)
    with pytest.raises(ValueError, match="edge_index must have the number of edges in the cache = 156"):
        conv(x, edges[:, 1:])
    conv.reset_parameters()
    assert conv._cached_poly is None
    poly = torch.zeros(156, 4)
    conv(x, edges, poly=poly)
    assert conv._cached_poly is None  # only what it made itself


def test_in_a_model_it_trains_copies_and_compiles():
    edges, _ = karate()
    model = Sequential(
        "x, edge_index",
        [(PolynomialConv(3, 8), "x, edge_index -> x"), torch.nn.ReLU(), (PolynomialConv(8, 1), "x, edge_index -> x")],
    )
    x = torch.randn(34, 3)
    loss = model(x, edges).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    conv = PolynomialConv(3, 4)
    out = conv(x, edges)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x, edges), out)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert_close_rel(compiled(x, edges), out)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close_rel(conv(x, edges), out, rtol=2e-2)
    assert_close_rel(conv.bfloat16()(x.bfloat16(), edges), out, rtol=2e-2)
    meta = PolynomialConv(3, 4, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert meta(x, edges).isfinite().all()


def test_exported_for_graphs_of_any_size():
    edges, _ = karate()
    conv, free = PolynomialConv(3, 4), torch.export.Dim.AUTO
    exported = torch.export.export(conv, (torch.randn(34, 3), edges), dynamic_shapes=({0: free}, {1: free})).module()
    ring = torch.tensor([[0, 1, 2, 0, 3], [1, 2, 0, 3, 0]])
    x, edges = torch.randn(5, 3), torch.cat([ring[:, :3], ring[:, :3].flip(0), ring[:, 3:]], 1)
    assert_close_rel(exported(x, edges), conv(x, edges))


def test_derivatives():
    edges = torch.tensor([[0, 1, 1, 2, 0, 2, 2, 3], [1, 0, 2, 1, 2, 0, 3, 2]])
    conv = PolynomialConv(2, 2, edge_dim=1, dtype=torch.float64)
    x, e = (torch.randn(n, c, dtype=torch.float64, requires_grad=True) for n, c in ((4, 2), (8, 1)))
    poly = torch.rand(8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: conv(t[0], edges, *t[1:]), (x, e, poly))


def test_refuses():
    edges = torch.tensor([[0, 1], [1, 0]])
    conv, x = PolynomialConv(3, 4), torch.randn(2, 3)

    def refuses(error, message, *arguments, layer=conv, **options):
        with pytest.raises(error, match=message):
            layer(*arguments, **options)

    refuses(ValueError, "x must have in_channels = 3 at dimension 1, got 4", torch.randn(2, 4), edges)
    refuses(ValueError, "x must have 2 dimensions", torch.randn(2, 2, 3), edges)
    refuses(TypeError, "edge_index must be a dense tensor of integers", x, edges.float())
    refuses(ValueError, r"edge_index must have \(source, target\) = 2", x, edges[:1])
    refuses(ValueError, "edge_index must have entries from 0 to 1", x, edges + 1)
    refuses(ValueError, "adj must be symmetric for an undirected pattern", x, edges[:, :1])
    refuses(ValueError, "edge_attr must not be given, edge_dim is None", x, edges, torch.ones(2, 1))
    refuses(ValueError, "poly must have the number of patterns = 4", x, edges, poly=torch.ones(2, 3))
    with_attr = PolynomialConv(3, 4, edge_dim=2)
    refuses(ValueError, "edge_attr must be given, edge_dim is 2", x, edges, layer=with_attr)
    refuses(ValueError, "edge_attr must have edge_dim = 2", x, edges, torch.ones(2, 1), layer=with_attr)
    for error, message, arguments in (
        (ValueError, "out_channels must be at least 1", {"out_channels": 0}),
        (TypeError, r"in_channels\[1\] must be an int", {"in_channels": (3, 1.5)}),
        (ValueError, r"patterns\[0\] must have two outputs", {"patterns": [Pattern.clique(3)]}),
        (ValueError, "patterns must be at least one, got none", {"patterns": []}),
        (ValueError, "patterns must have no colours", {"patterns": [Pattern([(0, 1, 0)], (0, 1))]}),
        (ValueError, "normalize must be one of 'log1p', 'none', got 'log'", {"normalize": "log"}),
        (TypeError, "edge_dim must be an int", {"edge_dim": "2"}),
    ):
        with pytest.raises(error, match=message):
            PolynomialConv(**{"in_channels": 3, "out_channels": 4} | arguments)
