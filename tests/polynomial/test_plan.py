"""Contraction plans: exponents against treewidth and opt_einsum, sharing against the note's hand-derived plan."""

import itertools
import math
import random

import pytest
import torch

from torchlayers.polynomial.enumeration import missing_patterns
from torchlayers.polynomial.evaluation import evaluate
from torchlayers.polynomial.patterns import Pattern
from torchlayers.polynomial.plan import Plan, contraction_plan
from torchlayers.polynomial.reference import polynomial

# Compared with the paper's equations in test_computability.py.
MISSING = missing_patterns("ppgn++", 6)


def connected_simple(degree):
    """All connected simple graphs with ``degree`` edges and every choice of up to two outputs."""
    graphs = {Pattern([(0, 1)])}
    for _ in range(degree - 1):
        graphs = {
            Pattern([*g.edges, (a, b)])
            for g in graphs
            for a, b in itertools.combinations(range(g.num_nodes + 1), 2)
            if (a, b) not in g.edges and a < g.num_nodes
        }
    return sorted(
        {
            Pattern(g.edges, outputs)
            for g in graphs
            for k in range(3)
            for outputs in itertools.permutations(range(g.num_nodes), k)
        }
    )


def random_adj(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randint(0, 2, (n, n), generator=generator).triu(1)
    return upper + upper.mT


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_time_is_one_more_than_treewidth(degree):
    patterns = connected_simple(degree)
    # Of the note's table: connected graphs, with one output, with two in order.
    counts = {1: (1, 1, 1), 2: (1, 2, 3), 3: (3, 5, 10), 4: (5, 13, 35), 5: (12, 37, 125)}[degree]
    assert tuple(sum(p.order == k for p in patterns) for k in range(3)) == counts
    for pattern in patterns:
        plan = contraction_plan(pattern)
        assert plan.time_exponent == pattern.treewidth + 1, pattern
        assert plan.memory_exponent <= max(pattern.treewidth, pattern.order), pattern


def test_time_is_one_more_than_treewidth_at_degree_six_and_seven():
    patterns = random.Random(0).sample(connected_simple(6), 60)
    assert max(p.treewidth for p in connected_simple(6)) == 3
    more = [Pattern([*p.edges, (0, p.num_nodes)], p.outputs) for p in patterns]  # a pendant: degree 7
    for pattern in patterns + more:
        plan = contraction_plan(pattern)
        assert plan.time_exponent == pattern.treewidth + 1 <= 4, pattern
        assert plan.memory_exponent <= 3, pattern


@pytest.mark.parametrize("pattern", MISSING, ids=Pattern.equation)
def test_no_path_of_opt_einsum_scales_better(pattern):
    opt_einsum = pytest.importorskip("opt_einsum", reason="needs opt_einsum")
    plan, equation = contraction_plan(pattern), pattern.equation()
    n = 64
    shapes = [(n, n)] * pattern.degree
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal", memory_limit=n**3)
    assert plan.time_exponent <= max(info.scale_list)
    assert n**plan.memory_exponent == n**3 <= info.largest_intermediate
    _, free = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    assert plan.time_exponent == max(free.scale_list)


def test_the_twelve_missing_polynomials_are_four_products_of_matrices():
    plan = contraction_plan(MISSING)
    heavy = [s for s in plan.steps if s.time_exponent == 4]
    assert len(heavy) == 4 and all(s.memory_exponent == 2 for s in heavy)
    assert (plan.time_exponent, plan.memory_exponent) == (4, 3)
    alone = sum(contraction_plan(p).multiplications(38) for p in MISSING)
    assert plan.multiplications(38) < 4.2 * 38**4 < alone / 2.5
    # The note's three tensors of n^3 numbers, and matrices.
    assert plan.peak(38) < 3.2 * 38**3


def test_equal_parts_are_computed_once():
    triangle = Pattern.cycle(3, (0, 1))
    tail = Pattern([(0, 1), (1, 2), (2, 0), (2, 3)], (0, 1))
    assert len(contraction_plan([triangle, triangle]).steps) == len(contraction_plan(triangle).steps) == 2
    transposed = contraction_plan([tail, tail.transpose()])
    assert len(transposed.steps) == len(contraction_plan(tail).steps)
    # The node and scalar forms are sums of the matrix.
    one = contraction_plan([Pattern.clique(4, out) for out in ((0, 1), (0,), ())])
    assert len(one.steps) == len(contraction_plan(Pattern.clique(4, (0, 1))).steps) + 2


def test_a_plan_counts_what_it_does():
    plan = contraction_plan(Pattern.cycle(3))  # X², then its product with X, then a sum over both
    assert [s.time_exponent for s in plan.steps] == [3, 2]
    assert plan.multiplications(10) == 10**3 + 10**2
    assert plan.peak(10) == 10**2 + 1
    assert str(plan).count("\n") == 1 and "X[" in str(plan)
    walk = contraction_plan(Pattern.path(4))
    assert (walk.time_exponent, walk.memory_exponent) == (2, 1)
    outer = contraction_plan(Pattern([(0, 1), (2, 3)], (0, 2)))
    assert (outer.time_exponent, outer.memory_exponent) == (2, 2)
    for nothing in (Pattern([], (0, 1), num_nodes=2), Pattern([])):
        plan = contraction_plan(nothing)
        assert plan.steps == () and plan.time_exponent == plan.memory_exponent == nothing.order
        assert plan.peak(5) == plan.multiplications(5) == 0


def test_plans_are_cached_and_take_lists():
    assert contraction_plan(Pattern.cycle(5)) is contraction_plan(Pattern([(4, 0), (0, 2), (2, 1), (1, 3), (3, 4)]))
    plan = contraction_plan(p for p in (Pattern.cycle(5), Pattern.cycle(4)))
    assert isinstance(plan, Plan) and plan.patterns == (Pattern.cycle(5), Pattern.cycle(4))
    assert contraction_plan([]).steps == ()


def test_steps_say_what_they_are():
    """Every intermediate is the polynomial of its own arcs, over its own axes; a support has all terms that count."""
    adj = random_adj(5)
    supported = 0
    plan = contraction_plan(MISSING)
    tensors = [adj]
    for step in plan.steps:
        operands = [x for number, names in step.inputs for x in (tensors[number], list(names))]
        tensors.append(torch.einsum(*operands, list(step.output)))
        arcs = [x for r, s, _ in step.arcs for x in (adj, [r, s])]
        assert torch.equal(tensors[-1], torch.einsum(*arcs, list(step.output)))
        if step.support is not None:
            number, names = step.support
            masked = torch.einsum(*operands, tensors[number].sign(), list(names), list(step.output))
            assert torch.equal(masked, tensors[-1])
            supported += 1
    assert supported >= 4


@pytest.mark.parametrize(
    ("pattern", "time", "memory"),
    [
        (Pattern.clique(5), 5, 4),
        (Pattern.cycle(12), 3, 2),
        (Pattern.star(11, (0,)), 2, 1),
        (Pattern([(i, (i + 1) % 5) for i in range(5)] + [(i, i + 5) for i in range(5)]
                 + [(5 + i, 5 + (i + 2) % 5) for i in range(5)]), 5, 4),  # the Petersen graph
        (Pattern([(0, 1)] * 11, (0, 1)), 2, 2),
    ],
)  # fmt: skip
def test_more_arcs_than_are_searched_exhaustively(pattern, time, memory):
    plan = contraction_plan(pattern)
    assert (plan.time_exponent, plan.memory_exponent) == (time, memory)
    adj = random_adj(3) + torch.diag(torch.tensor([1, 0, 2]))
    small = pattern.num_nodes <= 10
    if small:
        assert torch.equal(evaluate(pattern, adj), polynomial(pattern, adj))
    if pattern == Pattern.cycle(12):
        assert int(evaluate(pattern, adj)) == int(torch.linalg.matrix_power(adj, 12).trace())


def test_memory_order_trades_memory_for_time():
    pattern = Pattern.clique(4)
    assert contraction_plan(pattern, memory_order=3).memory_exponent == 3
    assert contraction_plan(pattern, memory_order=6).time_exponent == 4
    with pytest.raises(ValueError, match="memory_order must be at least 3"):
        contraction_plan(pattern, memory_order=2)


def test_bad_input():
    with pytest.raises(TypeError, match="pattern must be a Pattern, got 'ab'"):
        contraction_plan(["ab"])
    with pytest.raises(TypeError, match=r"pattern\[1\] must be a Pattern"):
        contraction_plan([Pattern.cycle(3), 3])
    with pytest.raises(TypeError, match="memory_order must be an int"):
        contraction_plan(Pattern.cycle(3), memory_order=2.0)
    with pytest.raises(ValueError, match="n must be at least 0"):
        contraction_plan(Pattern.cycle(3)).peak(-1)


def test_a_long_list_is_planned_in_reasonable_time_and_right():
    patterns = connected_simple(4)
    adj = random_adj(5)
    assert len(patterns) == 53
    plan = contraction_plan(patterns)
    assert len(plan.steps) < sum(len(contraction_plan(p).steps) for p in patterns) / 3
    for pattern, value in zip(patterns, evaluate(patterns, adj), strict=True):
        assert torch.equal(value, polynomial(pattern, adj))
    assert math.prod(value.numel() > 0 for value in evaluate(patterns, adj))
