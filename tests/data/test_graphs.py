"""Graphs: networkx's own where it has them, parameters of strongly regular graphs, files written here, bad pickles."""

import io
import itertools
import pickle
import warnings

import numpy
import pytest
import torch

from torchlayers.data import graphs

networkx = pytest.importorskip("networkx")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torch_geometric.data")


def to_networkx(graph):
    made = networkx.Graph()
    made.add_nodes_from(range(graph.num_nodes))
    made.add_edges_from(graph.edge_index.T.tolist())
    return made


def adjacency(graph):
    dense = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.int64)
    dense[graph.edge_index[0], graph.edge_index[1]] = 1
    return dense


def parameters(graph):
    """(n, k, λ, μ), each one number or the graph is not strongly regular."""
    a = adjacency(graph)
    common, n = a @ a, len(a)
    sets = (a.sum(0), common[a == 1], common[(a == 0) & ~torch.eye(n, dtype=torch.bool)])
    values = [set(s.tolist()) for s in sets]
    assert all(len(v) == 1 for v in values), values
    return (n, *(v.pop() for v in values))


def complete_subgraphs(graph, size):
    return sum(len(clique) == size for clique in networkx.enumerate_all_cliques(to_networkx(graph)))


def test_small_graphs_are_those_of_networkx():
    two_triangles = networkx.disjoint_union(networkx.cycle_graph(3), networkx.cycle_graph(3))
    line_of_complete = networkx.line_graph(networkx.complete_graph(5))
    for ours, theirs in (
        (graphs.cycle_graph(6), networkx.cycle_graph(6)),
        (graphs.disjoint_union(graphs.cycle_graph(3), graphs.cycle_graph(3)), two_triangles),
        (graphs.csl_graph(3, 13), networkx.circulant_graph(13, [1, 3])),
        (graphs.rook_graph(3), networkx.line_graph(networkx.complete_bipartite_graph(3, 3))),
        (graphs.triangular_graph(5), line_of_complete),
        (graphs.permuted(graphs.csl_graph(4, 11), seed=3), networkx.circulant_graph(11, [1, 4])),
    ):
        assert networkx.is_isomorphic(to_networkx(ours), theirs)


def test_edges_are_sorted_in_both_directions_and_each_once():
    graph = graphs.graph_from_edges(4, [(2, 0), (0, 2), (3, 2), (2, 0)])
    assert graph.edge_index.tolist() == [[0, 2, 2, 3], [2, 0, 3, 2]] and graph.num_nodes == 4
    empty = graphs.graph_from_edges(0, [])
    assert empty.edge_index.shape == (2, 0) and empty.num_nodes == 0


def test_strongly_regular_graphs():
    assert parameters(graphs.shrikhande_graph()) == parameters(graphs.rook_graph(4)) == (16, 6, 2, 2)
    assert [complete_subgraphs(g, 4) for g in (graphs.shrikhande_graph(), graphs.rook_graph(4))] == [0, 8]
    family = [graphs.triangular_graph(8), *(graphs.chang_graph(i) for i in (1, 2, 3))]
    assert {parameters(g) for g in family} == {(28, 12, 6, 4)}
    assert [complete_subgraphs(g, 4) for g in family] == [280, 248, 240, 240]
    for one, two in itertools.combinations(family, 2):
        assert not networkx.is_isomorphic(to_networkx(one), to_networkx(two))


def test_no_two_classes_of_csl_are_isomorphic():
    classes = [graphs.csl_graph(skip) for skip in graphs.CSL_SKIPS]
    assert len(classes) == 10
    assert all(g.num_nodes == 41 and set(adjacency(g).sum(0).tolist()) == {4} for g in classes)
    # Closed walks of up to 8 steps, which are enough (as the traces of the powers of circulants).
    powers = [[int(torch.linalg.matrix_power(adjacency(g), k).trace()) for k in range(3, 9)] for g in classes]
    assert len({tuple(p) for p in powers}) == 10 and len({tuple(p[:5]) for p in powers}) == 9


def test_a_permuted_copy_is_another_order_of_the_same_graph():
    graph = graphs.shrikhande_graph()
    one, again, other = (graphs.permuted(graph, seed) for seed in (0, 0, 1))
    assert torch.equal(one.edge_index, again.edge_index) and not torch.equal(one.edge_index, other.edge_index)
    assert not torch.equal(one.edge_index, graph.edge_index)
    assert networkx.is_isomorphic(to_networkx(one), to_networkx(graph))


def test_graph6_files(tmp_path):
    path = tmp_path / "sr16622.g6"
    family = [graphs.rook_graph(4), graphs.shrikhande_graph()]
    path.write_bytes(b"".join(networkx.to_graph6_bytes(to_networkx(g), header=i == 0) for i, g in enumerate(family)))
    found = graphs.load_graph6(path)
    assert [torch.equal(a.edge_index, b.edge_index) for a, b in zip(found, family, strict=True)] == [True, True]
    path.write_bytes(b"O\x01\x02\n")
    with pytest.raises(ValueError, match=r"line 1 of .*graph6"):
        graphs.load_graph6(path)
    with pytest.raises(FileNotFoundError, match="graph6 file"):
        graphs.load_graph6(tmp_path / "none.g6")


def brec_lines(copies):
    """Cycles whose length says which pair and which graph of it they are."""
    lines = []
    for pair in range(400 * (2 if copies == "both" else 1)):
        for _ in range(1 if copies == 1 else 32):
            for side in range(2):
                cycle = networkx.cycle_graph(3 + (2 * pair + side) % 55)
                lines.append(networkx.to_graph6_bytes(cycle, header=False).strip())
    return lines


@pytest.mark.parametrize("dtype", ["object", "bytes"])
def test_brec_from_a_folder(tmp_path, dtype):
    (tmp_path / "raw").mkdir()
    lines = numpy.array(brec_lines(1), dtype=object if dtype == "object" else None)
    numpy.save(tmp_path / "raw" / "brec_v3.npy", lines, allow_pickle=True)
    found = list(graphs.load_brec(tmp_path))
    assert len(found) == 400
    assert [f[0] for f in found].count("CFI") == 100 and found[-1][0] == "Distance_Regular"
    for pair, (_, one, two) in enumerate(found):
        assert (one.num_nodes, two.num_nodes) == (3 + 2 * pair % 55, 3 + (2 * pair + 1) % 55)


def test_of_the_copies_of_a_pair_in_brec_the_first_is_read(tmp_path):
    whole = [b"A_"] * (400 * 128)  # two nodes and an edge
    whole[64 * 399], whole[64 * 399 + 1] = b"Bw", b"C~"
    numpy.save(tmp_path / "brec_v3.npy", numpy.array(whole, dtype=object), allow_pickle=True)
    found = list(graphs.load_brec(tmp_path))
    assert len(found) == 400 and [g.num_nodes for g in found[-1][1:]] == [3, 4]
    assert {g.num_nodes for f in found[:-1] for g in f[1:]} == {2}


class Hostile:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_files_that_are_no_brec(tmp_path):
    path = tmp_path / "brec_v3.npy"
    with pytest.raises(FileNotFoundError, match="brec_v3"):
        list(graphs.load_brec(tmp_path))
    numpy.save(path, numpy.array([b"A_"] * 10))
    with pytest.raises(ValueError, match="800, 25600 or 51200 graphs, got 10"):
        list(graphs.load_brec(tmp_path))
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read"):
        list(graphs.load_brec(tmp_path))
    content = io.BytesIO()
    numpy.lib.format.write_array_header_1_0(content, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    path.write_bytes(content.getvalue() + pickle.dumps([Hostile()]))
    with pytest.raises(ValueError, match=r"asks for builtins\.eval"):
        list(graphs.load_brec(tmp_path))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: graphs.cycle_graph(2), "length must be at least 3"),
        (lambda: graphs.csl_graph(21), "skip must be below"),
        (lambda: graphs.csl_graph(1), "skip must be at least 2"),
        (lambda: graphs.chang_graph(4), "number must be 1, 2 or 3"),
        (lambda: graphs.graph_from_edges(3, [(0, 3)]), "nodes from 0 to 2"),
        (lambda: graphs.rook_graph(0), "size must be at least 1"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
