"""Values of patterns: brute force over all assignments, numbers of the note, networkx, and exactness in integers."""

import itertools
import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlayers.polynomial import evaluation
from torchlayers.polynomial.evaluation import evaluate, hom_count, inj_count
from torchlayers.polynomial.patterns import Pattern
from torchlayers.polynomial.reference import polynomial
from torchlayers.testing import assert_close_rel

MISSING = [
    "ab,ac,ad,bc,cd->bd",
    "ab,ac,ad,bc,bd,cd->", "ab,ac,ad,bc,bd,cd->a", "ab,ac,ad,bc,bd,cd->ab",
    "ab,bc,bd,be,cd,ce->de",
    "ab,bd,be,cd,ce,de->ac", "ab,bd,be,cd,ce,de->ca", "ab,bd,be,cd,ce,de->bc", "ab,bd,be,cd,ce,de->cb",
    "ab,ad,ae,bc,cd,de->be", "ab,ad,ae,bc,cd,de->eb",
    "ac,ad,ae,bc,bd,be->cd",
]  # fmt: skip


def parsed(equation, directed=False):
    operands, outputs = equation.split("->")
    return Pattern(
        [(ord(a) - 97, ord(b) - 97) for a, b in operands.split(",")], [ord(c) - 97 for c in outputs], directed
    )


def adjacency(graph, dtype=torch.int64):
    return torch.tensor(nx.to_numpy_array(graph, weight=None)).to(dtype)


def shrikhande():
    steps = [(0, 1), (0, 3), (1, 0), (3, 0), (1, 1), (3, 3)]
    nodes = list(itertools.product(range(4), repeat=2))
    return nx.Graph([(v, ((v[0] + a) % 4, (v[1] + b) % 4)) for v in nodes for a, b in steps])


GRAPHS = {
    "petersen": nx.petersen_graph,
    "shrikhande": shrikhande,
    "rook": lambda: nx.line_graph(nx.complete_bipartite_graph(4, 4)),
    "karate": nx.karate_club_graph,
    "les mis": nx.les_miserables_graph,
    "dodecahedron": nx.dodecahedral_graph,
    "T8": lambda: nx.line_graph(nx.complete_graph(8)),
}


def general_patterns(degree, order):
    """All directed patterns by set partitions of the arcs' ends and the outputs."""

    def growth(length):
        if length == 0:
            yield ()
            return
        for word in growth(length - 1):
            for block in range(max(word, default=-1) + 2):
                yield (*word, block)

    found = set()
    for word in growth(2 * degree + order):
        arcs = [(word[2 * i], word[2 * i + 1]) for i in range(degree)]
        found.add(Pattern(arcs, word[2 * degree :], directed=True, num_nodes=max(word, default=-1) + 1))
    return sorted(found)


# ---------------------------------------------------------------- against all assignments


def test_the_reference_is_the_sum_that_python_writes():
    """The definition, against loops without tensors."""
    n, generator = 3, torch.Generator().manual_seed(0)
    adj = torch.randint(-3, 4, (2, n, n), generator=generator)
    pattern = Pattern([(0, 1, 0), (1, 2, 1), (2, 2, 0), (0, 1, 1)], (0, 2), directed=True)
    expected = [[0] * n for _ in range(n)]
    for j in itertools.product(range(n), repeat=pattern.num_nodes):
        term = 1
        for r, s, c in pattern.edges:
            term *= int(adj[c, j[r], j[s]])
        a, b = pattern.outputs
        expected[j[a]][j[b]] += term
    assert polynomial(pattern, adj).tolist() == expected
    mask = torch.tensor([True, False, True])
    kept = adj[:, mask][:, :, mask]
    assert torch.equal(polynomial(pattern, adj, mask)[mask][:, mask], polynomial(pattern, kept))


# Of the note's table: general input, k = 0, 1, 2.
COUNTS = {0: (1, 1, 2), 1: (2, 5, 15), 2: (11, 32, 117), 3: (52, 199, 877)}


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_all_patterns_of_up_to_three_arcs(degree, order):
    """Loops, parallel arcs, both directions, disconnected ones, equal outputs: on weights that are not symmetric."""
    patterns = general_patterns(degree, order)
    assert len(patterns) == COUNTS[degree][order]
    adj = torch.randint(-3, 4, (2, 3, 3))
    for pattern, value in zip(patterns, evaluate(patterns, adj), strict=True):
        assert value.dtype == torch.int64
        assert torch.equal(value, polynomial(pattern, adj)), pattern
    # Each by its own plan.
    for pattern in patterns[:: 1 + len(patterns) // 40]:
        assert torch.equal(evaluate(pattern, adj), polynomial(pattern, adj)), pattern


@pytest.mark.parametrize("directed", [True, False])
def test_coloured_patterns(directed):
    generator = torch.Generator().manual_seed(1)
    adj = torch.randint(-2, 4, (2, 3, 4, 4), generator=generator)
    adj = adj if directed else adj + adj.mT
    colourings = list(itertools.product(range(3), repeat=3))
    patterns = set()
    for i, pattern in enumerate(p for order in range(3) for p in general_patterns(3, order)[::3]):
        arcs = [(*arc, c) for arc, c in zip(pattern.edges, colourings[i % 27], strict=True)]
        patterns.add(Pattern(arcs, pattern.outputs, directed, num_nodes=pattern.num_nodes))
    patterns = sorted(patterns)
    assert len(patterns) > 150
    for pattern, value in zip(patterns, evaluate(patterns, adj), strict=True):
        assert torch.equal(value, polynomial(pattern, adj)), pattern


def test_weighted_undirected_patterns():
    adj = torch.randint(-3, 4, (2, 4, 4))
    adj = adj + adj.mT
    patterns = sorted(
        {Pattern(p.edges, p.outputs, num_nodes=p.num_nodes) for k in range(3) for p in general_patterns(3, k)}
    )
    # Of the note's table: symmetric input with a diagonal.
    assert len(patterns) == 23 + 69 + 266
    for pattern, value in zip(patterns, evaluate(patterns, adj), strict=True):
        assert torch.equal(value, polynomial(pattern, adj)), pattern


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_patterns(data):
    """Larger ones: values against the definition, and exact equivariance under a permutation of the nodes."""
    nodes = data.draw(st.integers(1, 5))
    node = st.integers(0, nodes - 1)
    arcs = data.draw(st.lists(st.tuples(node, node), min_size=1, max_size=7))
    used = sorted({v for arc in arcs for v in arc})
    names = {v: i for i, v in enumerate(used)}
    outputs = data.draw(st.lists(st.sampled_from(used), max_size=2))
    directed = data.draw(st.booleans())
    pattern = Pattern([(names[a], names[b]) for a, b in arcs], [names[v] for v in outputs], directed)
    n = data.draw(st.integers(0, 4))
    adj = torch.tensor(data.draw(st.lists(st.integers(-4, 4), min_size=n * n, max_size=n * n))).reshape(n, n).long()
    adj = adj if directed else adj + adj.T
    value = evaluate(pattern, adj)
    assert torch.equal(value, polynomial(pattern, adj))
    order = torch.tensor(data.draw(st.permutations(range(n))), dtype=torch.long)
    moved = evaluate(pattern, adj[order][:, order])
    for dim in range(value.ndim):
        value = value.index_select(dim, order)
    assert torch.equal(moved, value)


# ---------------------------------------------------------------- the note's numbers


def test_homomorphism_counts():
    k4, diamond = Pattern.clique(4), Pattern([(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
    k23 = Pattern([(i, j) for i in range(2) for j in range(2, 5)])
    table = {
        "petersen": [30, 0, 150, 120, 990, 0, 330, 0],
        "shrikhande": [96, 192, 1536, 7680, 47616, 384, 5376, 0],
        "rook": [96, 192, 1536, 7680, 47616, 384, 5376, 192],
        "karate": [156, 270, 3500, 14330, 119694, 874, None, 264],
        "les mis": [508, 2802, 33116, 328010, 3713596, 20978, None, 15336],
        "dodecahedron": [60, 0, 300, 120, 1740, 0, None, 0],
        "T8": [336, 2016, 22848, 255360, 3015936, 12096, None, 6720],
    }
    patterns = [Pattern.path(1), *(Pattern.cycle(k) for k in (3, 4, 5, 6)), diamond, k23, k4]
    for name, row in table.items():
        graph = GRAPHS[name]()
        for pattern, want, value in zip(patterns, row, evaluate(patterns, adjacency(graph)), strict=True):
            assert want is None or int(value) == want, (name, pattern)
        assert int(evaluate(Pattern.cycle(3), adjacency(graph))) == 2 * sum(nx.triangles(graph).values())
        cliques = sum(len(c) == 4 for c in nx.enumerate_all_cliques(graph))
        assert hom_count(k4, graph) == 24 * cliques
    petersen, les_mis = nx.petersen_graph(), nx.les_miserables_graph()
    assert hom_count(Pattern.path(2), petersen) == 90 and hom_count(Pattern.cycle(7), petersen) == 1680
    assert hom_count(Pattern.cycle(7), shrikhande()) == 279552
    assert hom_count(Pattern.cycle(7), les_mis) == 41578950  # past what float32 can count
    assert hom_count(Pattern.cycle(8), les_mis) == 481289244


def test_the_twelve_missing_polynomials():
    patterns = [parsed(e) for e in MISSING]
    sums = {
        name: [int(v.sum()) for v in evaluate(patterns, adjacency(GRAPHS[name]()))]
        for name in ("petersen", "shrikhande", "rook")
    }
    assert sums["petersen"] == [0] * 11 + [330]
    assert sums["shrikhande"] == [384, 0, 0, 0, *[2304] * 5, 3072, 3072, 5376]
    assert sums["rook"] == [384, 192, 192, 192, *[2304] * 5, 3072, 3072, 5376]


@pytest.mark.parametrize("n", [13, 38])
def test_the_twelve_missing_polynomials_against_einsum(n):
    upper = torch.randn(2, n, n, dtype=torch.float64).triu()
    adj = upper + upper.mT
    patterns = [parsed(e) for e in MISSING]
    for pattern, value in zip(patterns, evaluate(patterns, adj), strict=True):
        einsum = torch.stack([torch.einsum(pattern.equation(), *[a] * pattern.degree) for a in adj])
        assert_close_rel(value, einsum, rtol=1e-12)


@pytest.mark.parametrize("name", ["petersen", "dodecahedron", "les mis"])
def test_terms_that_are_zero_are_skipped_and_the_rest_is_not(name):
    """Sparse graphs: exact counts, where zero terms are left out of the sums, against float64, where none is."""
    adj = adjacency(GRAPHS[name]())
    adj = adj * (1 + (torch.arange(len(adj)) + torch.arange(len(adj))[:, None]) % 3)
    patterns = [parsed(e, directed) for e in MISSING for directed in (False, True)]
    for chosen in (patterns[::2], patterns[1::2]):
        exact, real = evaluate(chosen, adj), evaluate(chosen, adj.double())
        assert any(v.any() for v in exact)
        for pattern, e, r in zip(chosen, exact, real, strict=True):
            assert torch.equal(e.double(), r), pattern


def test_what_separates_strongly_regular_graphs():
    patterns = [Pattern.clique(4), Pattern([*itertools.combinations(range(4), 2), (0, 4)])]
    two, one = (evaluate(patterns, adjacency(GRAPHS[g]())) for g in ("shrikhande", "rook"))
    assert [int(v) for v in two] == [0, 0] and [int(v) for v in one] == [192, 1152]
    # Switching T(8) by a perfect matching of K8, an 8-cycle, a triangle and a 5-cycle gives the Chang graphs.
    t8 = nx.line_graph(nx.complete_graph(8))
    sets = [
        [(2 * i, 2 * i + 1) for i in range(4)],
        [tuple(sorted((i, (i + 1) % 8))) for i in range(8)],
        [(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (5, 6), (6, 7), (3, 7)],
    ]
    counts = [hom_count(Pattern.clique(4), t8) // 24]
    for chosen in sets:
        inside = torch.tensor([tuple(sorted(v)) in chosen for v in t8.nodes])
        flip = inside[:, None] ^ inside[None, :]
        adj = torch.where(flip, 1 - adjacency(t8), adjacency(t8))
        assert set(adj.sum(-1).tolist()) == {12}
        counts.append(hom_count(Pattern.clique(4), adj) // 24)
    assert counts == [280, 248, 240, 240]


def test_identities():
    adj = torch.randint(-2, 3, (5, 5))
    power = torch.linalg.matrix_power
    assert torch.equal(evaluate(Pattern.path(3, (0, 3), directed=True), adj), power(adj, 3))
    assert torch.equal(evaluate(Pattern.cycle(4, directed=True), adj), power(adj, 4).trace())
    assert torch.equal(evaluate(Pattern.cycle(4, (0,), directed=True), adj), power(adj, 4).diagonal())
    assert torch.equal(evaluate(Pattern.star(3, (0,), directed=True), adj), adj.sum(-1) ** 3)
    assert torch.equal(evaluate(Pattern([(1, 0)], (0,), directed=True), adj), adj.sum(-2))
    assert torch.equal(evaluate(Pattern([(0, 2), (1, 2)], (0, 1), directed=True), adj), adj @ adj.mT)
    # Degree 0: the identity and all ones; outputs that no arc joins give outer products.
    assert torch.equal(evaluate(Pattern([], (0, 0), num_nodes=1), adj + adj.T), torch.eye(5).long())
    assert torch.equal(evaluate(Pattern([], (0, 1), num_nodes=2), adj + adj.T), torch.ones(5, 5).long())
    assert torch.equal(evaluate(Pattern([(0, 0)], (0, 0), directed=True), adj), adj.diagonal().diag())
    rows = adj.sum(-1)
    assert torch.equal(evaluate(Pattern([(0, 1), (2, 3)], (0, 2), directed=True), adj), rows[:, None] * rows)
    # Disjoint patterns multiply; sums over outputs; transposes.
    cycle, star = Pattern.cycle(3, directed=True), Pattern.star(2, directed=True)
    both = Pattern([*cycle.edges, *((a + 3, b + 3) for a, b in star.edges)], directed=True)
    assert torch.equal(evaluate(both, adj), evaluate(cycle, adj) * evaluate(star, adj))
    matrix, flipped, vector, scalar = evaluate(
        [Pattern([(0, 1), (1, 2), (0, 2), (2, 3)], out, directed=True) for out in ((0, 3), (3, 0), (0,), ())], adj
    )
    assert torch.equal(flipped, matrix.mT) and torch.equal(matrix.sum(-1), vector) and vector.sum() == scalar


def test_closed_walks_are_pygs_random_walk_encoding():
    transforms = pytest.importorskip("torch_geometric.transforms", reason="needs torch_geometric")
    from torch_geometric.utils import from_networkx

    data = from_networkx(nx.les_miserables_graph())
    walks = transforms.AddRandomWalkPE(6, attr_name="pe")(data).pe
    adj = adjacency(nx.les_miserables_graph(), torch.float64)
    walk = adj / adj.sum(-1, keepdim=True)
    values = evaluate([Pattern.cycle(k, (0,), directed=True) for k in range(1, 7)], walk)
    assert_close_rel(torch.stack(values, -1).float(), walks, rtol=1e-5)


# ---------------------------------------------------------------- exactness


def closed_walks(n, k):
    """tr (J − I)^k on n nodes, in Python's integers."""
    return (n - 1) ** k + (n - 1) * (-1) ** k


@pytest.mark.parametrize("k", range(2, 10))
def test_integers_are_exact_up_to_63_bits(k):
    adj = 1 - torch.eye(100, dtype=torch.int64)
    want = closed_walks(100, k)
    if want < 2**63:  # k = 8 is past 2^53
        assert int(evaluate(Pattern.cycle(k), adj)) == want
    else:
        with pytest.raises(OverflowError, match=r"below 2\^63 on the way to Pattern\(.*\(0, 1\)"):
            evaluate(Pattern.cycle(k), adj)
        assert float(evaluate(Pattern.cycle(k), adj.double())) == pytest.approx(want, rel=1e-12)
    assert (want >= 2**53) == (k >= 8) and (want >= 2**63) == (k >= 10)


def test_overflow_names_the_pattern_that_has_it():
    adj = 1 - torch.eye(100, dtype=torch.int64)
    with pytest.raises(OverflowError, match=r"way to Pattern\(.*\(0, 10\)"):
        evaluate([Pattern.cycle(4), Pattern.star(10)], adj)
    # A product of parts overflows, too.
    star = Pattern.star(5).edges
    double = Pattern([*star, *((a + 6, b + 6) for a, b in star)])
    assert int(evaluate(Pattern.star(5), adj)) == 100 * 99**5
    with pytest.raises(OverflowError):
        evaluate(double, adj)


def test_the_estimate_alone_refuses_nothing():
    """One node of large degree: the bound by the largest degree passes 2^63, the counts do not."""
    n = 1600
    adj = torch.zeros(n, n, dtype=torch.int64)
    adj[0, 1:] = adj[1:, 0] = 1
    edges = n - 1
    assert n * edges**5 > 2**63  # what n Δ^5 would say
    assert int(evaluate(Pattern.path(5), adj)) == 2 * edges**3
    assert 2**53 < int(evaluate(Pattern.star(5), adj)) == edges**5 + edges


def test_large_weights():
    big = 2**31
    adj = torch.tensor([[0, big], [big, 0]])
    assert int(evaluate(Pattern.path(1), adj)) == 2**32
    assert evaluate(Pattern.path(2, (0, 2)), adj).tolist() == [[2**62, 0], [0, 2**62]]
    with pytest.raises(OverflowError):
        evaluate(Pattern.path(2), adj)  # 2 · 2^62
    lowest = torch.tensor([[-(2**63)]])
    with pytest.raises(OverflowError):
        evaluate(Pattern([(0, 0)]), lowest)
    # Signs cancel in the result and not on the way.
    signed = torch.tensor([[0, big, -big], [big, 0, 0], [-big, 0, 0]])
    assert evaluate(Pattern.path(1, (0,)), signed).tolist() == [0, big, -big]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_all_integer_dtypes_count_in_int64(dtype):
    adj = adjacency(nx.complete_graph(12), dtype)
    value = evaluate(Pattern.cycle(6), adj)
    assert value.dtype == torch.int64 and int(value) == closed_walks(12, 6)
    assert evaluate(Pattern.cycle(6), adj, dtype=torch.float32).dtype == torch.float32


def test_counts_stay_exact_where_float32_products_are_not():
    adj = 1 - torch.eye(60, dtype=torch.int64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not evaluation._float32_is_exact(torch.device("cpu"))
        assert int(evaluate(Pattern.cycle(4), adj)) == closed_walks(60, 4)
    finally:
        torch.set_float32_matmul_precision(before)
    assert evaluation._float32_is_exact(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert int(evaluate(Pattern.cycle(4), adj)) == closed_walks(60, 4)
        assert evaluate(Pattern.cycle(4), adj.float()).dtype == torch.float32


# ---------------------------------------------------------------- batches, masks, dtypes


def batch(sizes=(3, 7, 1, 0, 5), n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adj = torch.randint(0, 2, (len(sizes), n, n), generator=generator)
    adj = adj.triu(1) + adj.triu(1).mT
    mask = torch.arange(n) < torch.tensor(sizes)[:, None]
    return adj, mask


SOME = [
    parsed("ab,ac,ad,bc,cd->bd"),
    Pattern.clique(4, (0,)),
    Pattern.cycle(5),
    Pattern([(0, 1)], (2,), num_nodes=3),
    Pattern([], (0, 1), num_nodes=2),
    Pattern([], (0, 0), num_nodes=1),
    Pattern([]),
]


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_a_padded_batch_is_its_graphs(chunk_bytes, monkeypatch):
    monkeypatch.setattr(evaluation, "CPU_CHUNK_BYTES", chunk_bytes)
    adj, mask = batch()
    filled = torch.where(mask[:, :, None] & mask[:, None, :], adj.double(), torch.nan)
    exact, rounded = evaluate(SOME, adj, mask), evaluate(SOME, filled, mask)
    for i, size in enumerate(mask.sum(-1).tolist()):
        alone = evaluate(SOME, adj[i, :size, :size])
        for pattern, e, r, a in zip(SOME, exact, rounded, alone, strict=True):
            padding = [0, 7 - size] * pattern.order
            assert torch.equal(e[i], torch.nn.functional.pad(a, padding) if padding else a)
            assert torch.equal(r[i], e[i].double())


def test_leading_dimensions_and_strides():
    adj, _ = batch((7,) * 6)
    grouped = adj.reshape(2, 3, 7, 7)
    strided = grouped.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    for pattern in SOME:
        flat = evaluate(pattern, adj)
        for x in (grouped, strided):
            value = evaluate(pattern, x)
            assert value.shape == (2, 3, *[7] * pattern.order)
            assert torch.equal(value, flat.reshape(value.shape))
        assert evaluate(pattern, adj[0]).shape == (7,) * pattern.order


@pytest.mark.parametrize("shape", [(0, 4, 4), (0, 0), (3, 0, 0), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_empty_and_single_node_graphs(shape, dtype):
    adj = torch.zeros(shape, dtype=dtype)
    for pattern, value in zip(SOME, evaluate(SOME, adj), strict=True):
        assert torch.equal(value, polynomial(pattern, adj))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
def test_dtypes(dtype):
    adj = torch.rand(2, 6, 6).double()
    adj = (adj + adj.mT).to(dtype)
    value = evaluate(Pattern.cycle(4, (0,)), adj)
    assert value.dtype == dtype
    wide = adj if dtype.is_complex else adj.double()
    assert_close_rel(value, torch.linalg.matrix_power(wide, 4).diagonal(dim1=-2, dim2=-1), dtype=dtype)
    wider = torch.complex128 if dtype.is_complex else torch.float64
    assert evaluate(Pattern.cycle(4), adj, dtype=wider).dtype == wider


@pytest.mark.parametrize("directed", [True, False])
def test_gradients(directed):
    patterns = [Pattern(parsed(e).edges, parsed(e).outputs, directed) for e in (MISSING[0], MISSING[2], MISSING[7])]
    patterns.append(Pattern([(0, 0), (0, 1), (0, 1)], (1,), directed))
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(x):
        return evaluate(patterns, x if directed else x + x.mT)

    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_gradients_at_zeros_of_the_adjacency():
    """An absent edge has a derivative, although no term with it counts."""
    adj = adjacency(nx.cycle_graph(6), torch.float64).requires_grad_()
    patterns = [parsed(e, directed=True) for e in MISSING]
    total = sum(v.sum() for v in evaluate(patterns, adj))
    (got,) = torch.autograd.grad(total, adj)
    (want,) = torch.autograd.grad(sum(polynomial(p, adj).sum() for p in patterns), adj)
    assert_close_rel(got, want) if want.any() else pytest.fail("the test needs a derivative")


def test_compiles_to_one_graph():
    patterns = [parsed(MISSING[0]), Pattern.clique(4, (0,)), Pattern.cycle(4)]
    compiled = torch.compile(lambda x, m: evaluate(patterns, x, m), fullgraph=True, backend="aot_eager")
    adj, mask = batch((5, 7, 2))
    adj = adj.double()
    for got, want in zip(compiled(adj, mask), evaluate(patterns, adj, mask), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_on_a_gpu(device):
    adj = 1 - torch.eye(100, dtype=torch.int64, device=device)
    patterns = [Pattern.cycle(k) for k in (4, 6, 8)]  # the last is past 2^53
    values = evaluate(patterns, adj.expand(3, 100, 100))
    assert all(v.device == adj.device for v in values)
    assert [v.tolist() for v in values] == [[closed_walks(100, k)] * 3 for k in (4, 6, 8)]
    small, mask = (t.to(device) for t in batch())
    for got, want in zip(evaluate(SOME, small, mask), evaluate(SOME, *batch()), strict=True):
        assert torch.equal(got.cpu(), want)


def test_sparse_adjacency():
    """Large graphs come sparse; what is evaluated is the same. More of this in the tests of the sparse part."""
    adj = adjacency(nx.les_miserables_graph())
    sparse = adj.to_sparse_coo()
    patterns = [Pattern.clique(4, (0, 1)), Pattern.cycle(5, (0,)), Pattern.star(3)]
    for pattern, value, want in zip(patterns, evaluate(patterns, sparse), evaluate(patterns, adj), strict=True):
        assert value.dtype == torch.int64
        assert torch.equal(value.to_dense() if pattern.order == 2 else value, want)
    one = evaluate(Pattern.cycle(3), sparse.double(), dtype=torch.float32)
    assert one.dtype == torch.float32 and int(one) == 2802
    assert hom_count(Pattern.cycle(5), sparse) == 328010
    assert inj_count(Pattern.cycle(4), sparse) == inj_count(Pattern.cycle(4), adj)
    with pytest.raises(ValueError, match="mask must be None for a sparse adj"):
        evaluate(patterns, sparse, torch.ones(77, dtype=torch.bool))
    with pytest.raises(TypeError, match="must be a Pattern"):
        evaluate("ab", sparse)


# ---------------------------------------------------------------- counts


def injective(pattern, adj):
    """The sum over injective maps, by listing them."""
    n = adj.shape[-1]
    total = torch.zeros([n] * pattern.order, dtype=adj.dtype)
    for j in itertools.permutations(range(n), pattern.num_nodes):
        term = math.prod(int(adj[j[r], j[s]]) for r, s in pattern.edges)
        total[tuple(j[v] for v in pattern.outputs)] += term
    return total


@pytest.mark.parametrize("pattern", [
    Pattern.cycle(4), Pattern.path(3, (0,)), Pattern.star(3, (1, 2)), Pattern.clique(4, (0, 1)),
    Pattern([(0, 1), (0, 1), (1, 1)], (0,), directed=True), Pattern([(0, 1), (1, 2), (0, 2)], (0, 2), directed=True),
    Pattern([(0, 0)]), Pattern([(0, 1), (2, 3)], (0,)), Pattern([(0, 1)], (0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("weighted", [True, False])
def test_injective_counts(pattern, weighted):
    adj = torch.randint(-2, 3, (5, 5)) if weighted else torch.randint(0, 2, (5, 5)).triu(1)
    adj = adj if pattern.directed else adj + adj.T
    value, want = inj_count(pattern, adj), injective(pattern, adj)
    assert torch.equal(torch.as_tensor(value), want)
    assert isinstance(value, int) == (pattern.order == 0)
    real = inj_count(pattern, adj.double())
    assert_close_rel(torch.as_tensor(real, dtype=torch.float64), want.double(), rtol=1e-12)


def test_injective_counts_of_known_graphs():
    petersen = nx.petersen_graph()
    assert [inj_count(Pattern.cycle(k), petersen) for k in (3, 4, 5, 6)] == [0, 0, 12 * 10, 10 * 12]
    for name in ("petersen", "rook", "T8"):
        graph = GRAPHS[name]()
        c4, p3, k2 = (hom_count(p, graph) for p in (Pattern.cycle(4), Pattern.path(2), Pattern.path(1)))
        assert inj_count(Pattern.cycle(4), graph) == c4 - 2 * p3 + k2
    karate = nx.karate_club_graph()
    found = nx.algorithms.isomorphism.GraphMatcher(karate, nx.complete_graph(4)).subgraph_monomorphisms_iter()
    assert inj_count(Pattern.clique(4), karate) == sum(1 for _ in found) == 264


def test_graphs_of_every_kind():
    directed = nx.DiGraph([(0, 1), (1, 2), (2, 0), (2, 2)])
    assert hom_count(Pattern.cycle(3, directed=True), directed) == 4
    assert hom_count(Pattern.cycle(3, directed=True), directed.reverse()) == 4
    assert hom_count(Pattern([(0, 1)], (0,), directed=True), directed).tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match="adj must be symmetric"):
        hom_count(Pattern.cycle(3), directed)
    weighted = nx.Graph()
    weighted.add_edge("a", "b", weight=7)
    assert hom_count(Pattern.path(1), weighted) == 2
    assert hom_count(Pattern.path(1), nx.MultiGraph([(0, 1), (0, 1)])) == 4
    assert hom_count(Pattern.path(1), torch.tensor([[0.0, 0.5], [0.5, 0.0]])) == 1.0
    data = pytest.importorskip("torch_geometric.data", reason="needs torch_geometric")
    graph = data.Data(edge_index=torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]]), num_nodes=4)
    assert hom_count(Pattern.cycle(3), graph) == inj_count(Pattern.cycle(3), graph) == 6
    assert hom_count(Pattern.path(1, (0,)), graph).tolist() == [2, 2, 2, 0]
    twice = data.Data(edge_index=torch.tensor([[0, 1, 0], [1, 0, 1]]), num_nodes=2)
    with pytest.raises(ValueError, match=r"no edge twice in edge_index, got \(0, 1\) 2 times"):
        hom_count(Pattern.cycle(3), twice)
    with pytest.raises(TypeError, match="graph must be an adjacency tensor"):
        hom_count(Pattern.cycle(3), [[0, 1], [1, 0]])


# ---------------------------------------------------------------- errors


def test_bad_input():
    cycle, two = Pattern.cycle(3), Pattern([(0, 1, 0), (1, 2, 1)])
    adj, one = torch.zeros(2, 4, 4), torch.tensor(1)
    with pytest.raises(ValueError, match=r"adj must be square \(\.\.\., N, N\), got shape \(2, 4, 3\)"):
        evaluate(cycle, adj[..., :3])
    with pytest.raises(ValueError, match="adj must have 2 dimensions"):
        evaluate(cycle, adj[0, 0])
    with pytest.raises(TypeError, match="adj must be a tensor"):
        evaluate(cycle, [[0.0]])
    with pytest.raises(ValueError, match=r"different entries at \(1, 2\) and \(2, 1\)"):
        evaluate(cycle, torch.stack([adj[0], torch.zeros(4, 4).index_put((one, 2 * one), one.float())]))
    with pytest.raises(ValueError, match="at least C = 2 colours"):
        evaluate(two, adj[:1])
    with pytest.raises(ValueError, match="colours on all arcs or on none"):
        evaluate([two, cycle], adj)
    with pytest.raises(ValueError, match="adj must have 3 dimensions"):
        evaluate(two, adj[0])
    with pytest.raises(TypeError, match=r"pattern must be a Pattern or several, got 3"):
        evaluate(3, adj)
    with pytest.raises(TypeError, match=r"pattern must be a Pattern, got 'a'"):
        evaluate("a", adj)
    with pytest.raises(TypeError, match=r"adj must be integer for dtype=torch\.int64, got torch\.float32"):
        evaluate(cycle, adj, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"adj must be real for dtype=torch\.float32"):
        evaluate(cycle, adj.cfloat(), dtype=torch.float32)
    with pytest.raises(TypeError, match="mask must be bool"):
        evaluate(cycle, adj, torch.ones(2, 4))
    with pytest.raises(ValueError, match="mask must have N = 4 at dimension -1, got 3"):
        evaluate(cycle, adj, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"leading dimensions \(2,\) of adj"):
        evaluate(cycle, adj, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must have 2 dimensions"):
        evaluate(cycle, adj, torch.ones(4, dtype=torch.bool))
    assert evaluate([], adj) == []


def test_rounded_symmetry_is_symmetry():
    adj = adjacency(nx.les_miserables_graph(), torch.float32)
    scale = adj.sum(-1).rsqrt()
    normal = (adj * scale[:, None]) * scale
    normal = normal + torch.rand_like(normal) * 1e-8 * (normal > 0)
    assert not torch.equal(normal, normal.mT)
    assert evaluate(Pattern.cycle(4), normal).isfinite()
