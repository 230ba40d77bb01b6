"""What banks compute, against the closure of their operations: everything that they build, built."""

from __future__ import annotations

import itertools

import pytest

from torchlayers.polynomial import BANKS, Bank, is_computable, missing_patterns
from torchlayers.polynomial.enumeration import enumerate_patterns
from torchlayers.polynomial.patterns import Pattern


def glue(first, second, pairs, outputs, directed):
    """The union of two patterns with the pairs (node of first, node of second) made one; outputs are (which, node).

    Black nodes on no arc are dropped: they only multiply by the number of nodes.
    """
    name = {}
    for a, b in pairs:
        name[0, a] = name[1, b] = name.get((0, a), name.get((1, b), (0, a)))
    edges, used = [], []
    for which, pattern in enumerate((first, second)):
        for edge in pattern.edges:
            edges.append(tuple(name.get((which, v), (which, v)) for v in edge))
    outputs = [name.get(node, node) for node in outputs]
    used = sorted({v for edge in edges for v in edge} | set(outputs))
    index = {v: i for i, v in enumerate(used)}
    arcs = [(index[u], index[v]) for u, v in edges]
    return Pattern(arcs, [index[v] for v in outputs], directed, num_nodes=len(used))


def closure(seeds, binary, unary, degree):
    """All patterns of at most this degree that the operations make of the seeds; binary ones of each pair once."""
    found, known = list(seeds), set(seeds)
    for i, p in enumerate(found):  # grows while it is read
        made = {result for operation in unary for result in operation(p)}
        for q in found[: i + 1]:
            if p.degree + q.degree <= degree:
                made |= {operation(p, q) for operation in binary}
        fresh = [r for r in made if r not in known and r.degree <= degree]
        known.update(fresh)
        found += fresh
    return known


def merged(p, first, second):
    """Two nodes of a pattern made one, which is the only output."""
    nodes = [first if v == second else v for v in range(p.num_nodes)]
    arcs = [(nodes[u], nodes[v]) for u, v in p.edges]
    used = sorted({v for arc in arcs for v in arc} | {first})
    index = {v: i for i, v in enumerate(used)}
    return Pattern([(index[u], index[v]) for u, v in arcs], [index[first]], p.directed, num_nodes=len(used))


def without_outputs(p):
    used = sorted({v for arc in p.edges for v in arc})
    index = {v: i for i, v in enumerate(used)}
    return Pattern([(index[u], index[v]) for u, v in p.edges], (), p.directed)


def matrix_closure(degree, directed, transpose, identity):
    """Scalars, vectors and matrices made of X and the matrix of ones by matrix and entrywise products, and as given by
    the transpose and the identity; vectors are diagonals, scalars products of sums of the entries and of traces."""

    def matmul(p, q):
        return glue(p, q, [(p.outputs[1], q.outputs[0])], [(0, p.outputs[0]), (1, q.outputs[1])], directed)

    def hadamard(p, q):
        both = list(zip(p.outputs, q.outputs, strict=True))
        if len(set(p.outputs)) == 2 and len(set(q.outputs)) == 2:
            return glue(p, q, both, [(0, p.outputs[0]), (0, p.outputs[1])], directed)
        # One is a diagonal: so is the product.
        p, q = (x if len(set(x.outputs)) == 1 else merged(x, *x.outputs) for x in (p, q))
        return glue(p, q, [(0, 0)], [(0, 0), (0, 0)], directed)

    seeds = [Pattern([(0, 1)], (0, 1), directed), Pattern([], (0, 1), directed, num_nodes=2)]
    if identity:
        seeds.append(Pattern([], (0, 0), directed, num_nodes=1))
    binary = [matmul, lambda p, q: matmul(q, p), hadamard]
    matrices = closure(seeds, binary, [lambda p: [p.transpose()]] if transpose else [], degree)
    vectors = {merged(p, *p.outputs) if len(set(p.outputs)) == 2 else merged(p, 0, 0) for p in matrices}
    sums = {without_outputs(p) for p in (*matrices, *vectors)}
    scalars = closure(sums, [lambda p, q: glue(p, q, [], [], directed)], [], degree)
    return scalars, vectors, matrices


MATRIX_BANKS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("transpose", "identity"), MATRIX_BANKS)
@pytest.mark.parametrize("kind", ["directed", "weighted"])
def test_matrix_banks_are_the_closure_of_their_operations(kind, transpose, identity):
    degree = 2 if kind == "directed" and transpose and identity else 3
    bank = Bank(2, transpose=transpose, loops=identity)
    sets = matrix_closure(degree, kind == "directed", transpose or kind == "weighted", identity)
    for order, made in enumerate(sets):
        for d in range(degree + 1):
            patterns = enumerate_patterns(d, order, kind=kind, connected=False)
            assert {p for p in patterns if is_computable(p, bank)} == made.intersection(patterns)


def test_matrix_banks_on_simple_graphs_are_the_closure_of_their_operations():
    """Up to degree 4 they reach everything; the first polynomial that they miss has degree 5."""
    _, vectors, matrices = matrix_closure(4, False, False, False)
    for d in range(5):
        assert matrices.issuperset(enumerate_patterns(d, 2, connected=False))
        assert vectors.issuperset(enumerate_patterns(d, 1, connected=False))


def vector_closure(degree, directed, transpose, parallel):
    """Scalars, vectors and values on pairs by message passing: sums over neighbours, entrywise products, sums."""

    def through(arcs):
        """Sum over b of the product of entries between b and a, times f[b]."""
        message = Pattern(arcs, (0, 1), directed)  # a = 0, b = 1

        def operation(f):
            return glue(f, message, [(f.outputs[0], message.outputs[1])], [(1, message.outputs[0])], directed)

        return operation

    bundles = [[(1, 0)]] + ([[(0, 1)]] if transpose else [])
    if parallel:
        bundles = [
            list(bundle)
            for size in range(1, degree + 1)
            for bundle in itertools.combinations_with_replacement([(1, 0), (0, 1)] if transpose else [(1, 0)], size)
        ]
    steps = [through(bundle) for bundle in bundles]
    node = Pattern([], (0,), directed, num_nodes=1)
    loop = Pattern([(0, 0)], (0,), directed)

    def product(p, q):
        return glue(p, q, [(p.outputs[0], q.outputs[0])], [(0, p.outputs[0])], directed)

    def broadcast(p, q):
        return glue(p, without_outputs(q), [], [(0, p.outputs[0])], directed)

    binary = [product, broadcast, lambda p, q: broadcast(q, p)]
    vectors = closure([node, loop], binary, [lambda f: [step(f) for step in steps]], degree)
    scalars = {without_outputs(p) for p in vectors}
    scalars = closure(scalars, [lambda p, q: glue(p, q, [], [], directed)], [], degree)
    pairs = {
        glue(p, q, [], [(0, p.outputs[0]), (1, q.outputs[0])], directed)
        for p in vectors
        for q in vectors
        if p.degree + q.degree <= degree
    }
    entries = [Pattern([(0, 1)], (0, 1), directed)]
    if transpose:
        entries.append(Pattern([(1, 0)], (0, 1), directed))
    multiply = [lambda p, q: glue(p, q, [(0, 0), (1, 1)], [(0, 0), (0, 1)], directed)]
    if parallel:
        powers = closure(entries, multiply, [], degree)
    else:
        powers = set(entries)
    pairs |= {multiply[0](p, q) for p in pairs for q in powers if p.degree + q.degree <= degree}
    return scalars, vectors, pairs


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("kind", ["directed", "weighted"])
def test_node_banks_are_the_closure_of_their_operations(kind, transpose, parallel):
    degree = 3
    bank = Bank(1, transpose=transpose, parallel=parallel)
    sets = vector_closure(degree, kind == "directed", transpose or kind == "weighted", parallel)
    for order, made in enumerate(sets):
        for d in range(degree + 1):
            patterns = enumerate_patterns(d, order, kind=kind, connected=False)
            assert {p for p in patterns if is_computable(p, bank)} == made.intersection(patterns)


@pytest.mark.parametrize(
    ("bank", "order", "counts"),
    [
        (1, 0, [0, 0, 1, 2, 6, 19]),
        (1, 1, [0, 0, 1, 4, 17, 66]),
        (2, 0, [0, 0, 0, 0, 0, 1, 2]),
        (2, 1, [0, 0, 0, 0, 0, 1, 6]),
        (2, 2, [0, 0, 0, 0, 1, 9, 69]),
    ],
)
def test_numbers_of_simple_patterns_out_of_reach(bank, order, counts):
    """At degree 7 a test that looks at neighbours in the pattern itself, not in what is left of it, finds 65."""
    found = [len(enumerate_patterns(d, order, exclude=bank)) for d in range(1, len(counts) + 1)]
    assert found == counts


def from_equation(equation):
    terms, outputs = equation.split("->")
    nodes = {letter: i for i, letter in enumerate(sorted({c for c in terms if c != ","}))}
    return Pattern([(nodes[t[0]], nodes[t[1]]) for t in terms.split(",")], [nodes[c] for c in outputs])


def test_the_twelve_polynomials_that_ppgn_misses_up_to_degree_six():
    clique = "ab,ac,ad,bc,bd,cd->"
    equations = ["ab,ac,ad,bc,cd->bd", clique, clique + "a", clique + "ab", "ab,bc,bd,be,cd,ce->de"]
    equations += ["ab,bd,be,cd,ce,de->" + outputs for outputs in ("ac", "ca", "bc", "cb")]
    equations += ["ab,ad,ae,bc,cd,de->" + outputs for outputs in ("be", "eb")]
    equations += ["ac,ad,ae,bc,bd,be->cd"]
    missing = missing_patterns("ppgn++", 6)
    assert len(missing) == 12
    assert set(missing) == {from_equation(e) for e in equations}
    assert missing == sorted(missing)
    assert missing == missing_patterns("ppgn", 6) == missing_patterns("edge", 6) == missing_patterns(2, 6)
    assert missing_patterns("ppgn++", 6, order=(0, 1)) == [Pattern.clique(4), Pattern.clique(4, (0,))]
    assert missing_patterns("ppgn++", 5) == [from_equation("ac,ad,bc,bd,cd->ab")]


def test_first_misses_of_message_passing():
    assert missing_patterns("gin", 3, order=(0, 1)) == [Pattern.cycle(3), Pattern.cycle(3, (0,))]
    cycles = [Pattern.cycle(k, (0,)) for k in range(3, 9)]
    assert not any(is_computable(p, name) for p in cycles for name in ("gin", "gat", "mpnn", "gine", "node"))
    assert all(is_computable(p, "ppgn") for p in cycles)
    assert all(is_computable(Pattern.star(k, (0,)), "gin") for k in range(1, 6))
    assert missing_patterns("gin", 2, order=2) == [Pattern.path(2, (0, 2))]


def test_node_banks_agree_on_simple_graphs_and_matrix_banks_too():
    patterns = [p for d in range(6) for k in range(3) for p in enumerate_patterns(d, k)]
    for name, bank in BANKS.items():
        like = "node" if bank.neighbours == 1 else "edge"
        assert [is_computable(p, name) for p in patterns] == [is_computable(p, like) for p in patterns]


def test_direction_and_weights_tell_banks_apart():
    into, out = Pattern([(1, 0)], (0,), directed=True), Pattern([(0, 1)], (0,), directed=True)
    squared = Pattern([(1, 0), (1, 0)], (0,), directed=True)
    both_ways = Pattern([(1, 0), (0, 1)], (0,), directed=True)
    table = {
        "gin": (True, False, False, False),
        "dir_gnn": (True, True, False, False),
        "mpnn": (True, False, True, False),
        "node": (True, True, True, True),
        "ppgn": (True, True, True, True),
    }
    for name, expected in table.items():
        assert tuple(is_computable(p, name) for p in (into, out, squared, both_ways)) == expected
    # The transpose and what it takes part in: sum over j of X[i, j] X[k, j].
    transposed = Pattern([(1, 0)], (0, 1), directed=True)
    gram = Pattern([(0, 2), (1, 2)], (0, 1), directed=True)
    product = Pattern([(0, 2), (2, 1)], (0, 1), directed=True)
    assert [is_computable(p, "ppgn") for p in (transposed, gram, product)] == [False, False, True]
    assert all(is_computable(p, "ppgn++") for p in (transposed, gram, product))


def test_folklore_weisfeiler_leman():
    for size in range(2, 7):
        assert [is_computable(Pattern.clique(size), k) for k in range(1, 7)] == [size - 1 <= k for k in range(1, 7)]
    assert is_computable(Pattern.clique(4), Bank(3))


def test_products_of_computable_patterns_are_computable():
    for order in range(3):
        for pattern in enumerate_patterns(5, order, connected=False):
            for bank in ("gin", "ppgn"):
                parts = [is_computable(part, bank) for part, _ in pattern.components()]
                assert is_computable(pattern, bank) == all(parts)


def test_options_go_to_the_enumeration():
    found = missing_patterns("mpnn", 2, order=1, kind="directed", loops=False)
    assert found == [
        p
        for d in range(3)
        for p in enumerate_patterns(d, 1, kind="directed", loops=False)
        if not is_computable(p, "mpnn")
    ]
    assert Pattern([(0, 1)], (0,), directed=True) in found


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: is_computable(Pattern.path(1), "gni"), ValueError, "did you mean 'gin'"),
        (lambda: is_computable(Pattern.path(1), 0), ValueError, "bank must be at least 1, got 0"),
        (lambda: is_computable(Pattern.path(1), 1.5), TypeError, "bank must be an int"),
        (lambda: is_computable([(0, 1)], "gin"), TypeError, "pattern must be a Pattern"),
        (lambda: Bank(0), ValueError, "neighbours must be at least 1"),
        (lambda: Bank(3, transpose=False), ValueError, "transpose must be True for neighbours > 2"),
        (lambda: Bank(2, parallel=False), ValueError, "parallel must be True for neighbours > 1"),
        (lambda: missing_patterns("gin", 9, order=0), ValueError, "degree must be at most 8"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
