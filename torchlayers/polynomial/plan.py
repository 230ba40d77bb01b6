"""In which order to contract a pattern, alone or with others that share parts of it.

A set of arcs of a pattern is itself a pattern: its axes are the nodes that arcs outside of it touch too, and the
pattern's outputs; the other nodes are summed over. So an intermediate is one more homomorphism sum, with as many
outputs as it has axes, and two intermediates are the same tensor exactly if they are isomorphic. A plan is a list of
steps that each make one such tensor from one or two others:

- two of them, split by arcs: parallel arcs merge by a Hadamard product, a black node that they share and nothing else
  touches is eliminated by a matrix product (several at once, where that is cheaper);
- one of them: a loop is the diagonal of its input, a node that one arc alone touches is summed out.

All ways to split are compared (up to 8 arcs; above, the ways to eliminate one node after another): the smallest
possible memory exponent first, then the smallest time exponent, then the modelled time, in which a tensor that exists
already, for this pattern or for another of the list, is free. The time exponent is one more than the treewidth of the
pattern with an edge between its outputs (Puny et al., arXiv 2302.11556; Markov and Shi, arXiv quant-ph/0511069).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .._checks import check_int
from .patterns import Pattern, canonical_labelling

__all__ = ["Plan", "Step", "contraction_plan"]

Arc = tuple[int, int, int]  # source, target, colour
# A tensor, up to the names of its nodes: arcs over the nodes 0, 1, ..., of which the first `axes` are its axes, and
# whether arcs have no direction.
Key = tuple[tuple[Arc, ...], int, bool]
# How a tensor is made: its operands and, for each, what nodes of the result's key its axes are.
Recipe = tuple[tuple[Key, tuple[int, ...]], ...]

# All splits of the arcs are tried up to here: 3^8 in all.
EXHAUSTIVE = 8
# The size at which times are modelled, and the model: multiply-adds in a matrix product count 1, entries that an
# elementwise pass goes over 16 (it waits for memory), and starting an operation 2e5.
NOMINAL, PASS, START = 32, 16, 200_000


# ---------------------------------------------------------------- what tensors are


@functools.lru_cache(maxsize=1 << 17)
def _canonical(arcs: tuple[Arc, ...], axes: tuple[int, ...], symmetric: bool) -> tuple[Key, tuple[int, ...]]:
    """The key of arcs with axes (in any order), and the axes in the key's order."""
    nodes = sorted(_nodes(arcs) | set(axes))
    place = {v: i for i, v in enumerate(nodes)}
    marks = tuple((0,) if v in axes else () for v in nodes)
    labels, form = canonical_labelling(marks, [(place[r], place[s], c) for r, s, c in arcs], not symmetric)
    return (form, len(axes), symmetric), tuple(sorted(axes, key=lambda v: labels[place[v]]))


def _is_input(key: Key) -> bool:
    arcs, axes, _ = key
    return axes == 2 and len(arcs) == 1 and arcs[0][0] != arcs[0][1]


def _input(colour: int, symmetric: bool) -> Key:
    return ((0, 1, colour),), 2, symmetric


def _nodes(arcs: Iterable[Arc]) -> set[int]:
    return {v for r, s, _ in arcs for v in (r, s)}


def _connected(arcs: Sequence[Arc]) -> bool:
    reached, rest = set(arcs[0][:2]), list(arcs[1:])
    while rest:
        left = [a for a in rest if a[0] not in reached and a[1] not in reached]
        if len(left) == len(rest):
            return False
        reached |= _nodes(a for a in rest if a not in left)
        rest = left
    return True


def _open(part: Iterable[Arc], axes: int, other: Iterable[Arc]) -> tuple[int, ...]:
    """The axes of a part: its nodes that are axes of the whole or are touched by the other part."""
    return tuple(sorted(_nodes(part) & (set(range(axes)) | _nodes(other))))


def _all_splits(arcs: Sequence[Arc]) -> Iterator[tuple[tuple[Arc, ...], tuple[Arc, ...]]]:
    """All ways to split the arcs in two connected parts."""
    first, rest = arcs[0], arcs[1:]
    for bits in range(2 ** len(rest) - 1):
        one = (first, *(a for i, a in enumerate(rest) if bits >> i & 1))
        two = tuple(a for i, a in enumerate(rest) if not bits >> i & 1)
        if _connected(one) and _connected(two):
            yield one, two


def _splits_by_elimination(arcs: Sequence[Arc], axes: int) -> Iterator[tuple[tuple[Arc, ...], tuple[Arc, ...]]]:
    """For each black node a first split of what is there once all the other black nodes are eliminated.

    That is one part for each connected set of the others, and the arcs that touch none of them. Split off is the one
    that leaves the rest with the fewest axes. Where there is only one part, nothing is left to split.
    """
    black = {v for v in _nodes(arcs) if v >= axes}
    for last in sorted(black) or [-1]:
        others = black - {last}
        groups: list[set[int]] = []
        for arc in arcs:
            if ends := others & set(arc[:2]):
                joined = [g for g in groups if g & ends]
                groups = [g for g in groups if g not in joined] + [ends.union(*joined)]
        parts = [tuple(a for a in arcs if g & set(a[:2])) for g in groups]
        parts += [(a,) for a in arcs if not others & set(a[:2])]
        if len(parts) == 1:
            continue
        splits = [(part, tuple(a for p in parts if p is not part for a in p)) for part in parts]
        splits = [(part, rest) for part, rest in splits if _connected(rest)]
        yield min(splits, key=lambda split: [len(_open(one, axes, other)) for one, other in (split[::-1], split)])


@functools.lru_cache(maxsize=1 << 16)
def _recipes(key: Key) -> tuple[Recipe, ...]:
    """How to make the tensor from others of fewer arcs or more axes, or from an input."""
    arcs, axes, symmetric = key
    if len(arcs) == 1:
        (r, s, colour) = arcs[0]
        return (((_input(colour, symmetric), (r, s)),),)
    found: dict[Recipe, None] = {}
    for split in _all_splits(arcs) if len(arcs) <= EXHAUSTIVE else _splits_by_elimination(arcs, axes):
        one, two = (
            _canonical(part, _open(part, axes, other), symmetric)
            for part, other in zip(split, reversed(split), strict=True)
        )
        found[min((one, two), (two, one))] = None
    if not found:  # whichever black node goes last, it is left alone with all that the others gave
        return tuple(recipe for recipe in _openings(key) if recipe[0][0][1] == axes + 1)
    return tuple(found)


@functools.lru_cache(maxsize=1 << 12)
def _same_tensor(key: Key, one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    """Whether the tensor with its axes in the order ``one`` is the same, number by number, as in the order ``two``."""
    if one == two:
        return True
    arcs, axes, symmetric = key
    colours = 1 + max(c for *_, c in arcs)

    def ordered(order: tuple[int, ...]) -> Key:  # a loop of a colour of its own tells each axis from the others
        marked = (*arcs, *((v, v, colours + i) for i, v in enumerate(order)))
        return _canonical(marked, tuple(range(axes)), symmetric)[0]

    return ordered(one) == ordered(two)


@functools.lru_cache(maxsize=1 << 16)
def _openings(key: Key) -> tuple[Recipe, ...]:
    """The tensors with one or two more axes of which this one is the sum over those."""
    arcs, axes, symmetric = key
    black = sorted(v for v in _nodes(arcs) if v >= axes)
    more = [(v,) for v in black] + (list(itertools.combinations(black, 2)) if axes == 0 else [])
    return tuple((_canonical(arcs, (*range(axes), *vs), symmetric),) for vs in more)


def _names(recipe: Recipe) -> set[int]:
    return {v for _, names in recipe for v in names}


@functools.lru_cache(maxsize=1 << 16)
def _widths(key: Key) -> frozenset[tuple[int, int]]:
    """The (memory, time) exponents within which the tensor can be made; none of them is below another in both."""
    if _is_input(key):
        return frozenset({(0, 0)})
    found: set[tuple[int, int]] = set()
    for recipe in _recipes(key):
        time = len(_names(recipe))
        for widths in itertools.product(*(_widths(operand) for operand, _ in recipe)):
            found.add((max(key[1], *(m for m, _ in widths)), max(time, *(t for _, t in widths))))
    return frozenset(w for w in found if not any(o != w and o[0] <= w[0] and o[1] <= w[1] for o in found))


@functools.lru_cache(maxsize=1 << 16)
def _cost(key: Key, recipe: Recipe) -> int:
    """The modelled time of one step, in multiply-adds of a matrix product."""
    size = NOMINAL ** len(_names(recipe))
    if len(recipe) == 1:
        return START + PASS * size
    one, two = (set(names) for _, names in recipe)
    batch, summed = one & two & set(range(key[1])), (one & two) - set(range(key[1]))
    if not summed:
        return START + PASS * size
    if not (one - two) and not (two - one):
        return START + 2 * PASS * size  # a product and a sum, elementwise
    if not (one - two) or not (two - one):
        return START + (PASS if batch else PASS // 4) * size  # matrix times vector
    return START + (2 if batch else 1) * size


# ---------------------------------------------------------------- the search


class _Search:
    """Recipes for a list of tensors, sharing what they can."""

    def __init__(self, roots: Sequence[Key], limits: Sequence[tuple[int, int]]):
        self.recipes: dict[Key, Recipe] = {}
        self.roots, self.limits = list(roots), list(limits)

    def needed(self, roots: Iterable[Key]) -> dict[Key, None]:
        """What making the roots makes, each after its operands."""
        done: dict[Key, None] = {}

        def visit(key: Key) -> None:
            if key in done or _is_input(key):
                return
            for operand, _ in self.recipes[key]:
                visit(operand)
            done[key] = None

        for root in roots:
            visit(root)
        return done

    def total(self) -> int:
        return sum(_cost(key, self.recipes[key]) for key in self.needed(self.roots))

    def solve(self, root: Key, limits: tuple[int, int], available: dict[Key, None]) -> dict[Key, Recipe]:
        """The cheapest recipes for ``root`` and what it needs, within (memory, time) ``limits``."""
        memory, time = limits
        nothing: frozenset[Key] = frozenset()
        made: dict[Key, frozenset[Key]] = {}
        recipes: dict[Key, Recipe] = {}
        costs: dict[Key, int] = {}

        def fits(key: Key) -> bool:
            return any(m <= memory and t <= time for m, t in _widths(key))

        def best(key: Key) -> frozenset[Key]:
            if key in available or _is_input(key):
                return nothing
            if key in made:
                return made[key]
            lowest: tuple[int, int, Recipe, frozenset[Key]] | None = None
            for recipe in _recipes(key):
                if len(_names(recipe)) > time or not all(fits(operand) for operand, _ in recipe):
                    continue
                below = nothing.union(*(best(operand) for operand, _ in recipe))
                own = _cost(key, recipe)
                total = own + sum(costs[k] for k in below)
                if lowest is None or total < lowest[0]:
                    lowest = total, own, recipe, below
            for recipe in _openings(key):
                own = _cost(key, recipe)
                if recipe[0][0] in available and (lowest is None or own < lowest[0]):
                    lowest = own, own, recipe, nothing
            assert lowest is not None
            _, costs[key], recipes[key], below = lowest
            made[key] = below | {key}
            return made[key]

        return {key: recipes[key] for key in best(root)}

    def run(self, order: Sequence[int], passes: int) -> None:
        """Greedily in ``order``; then each once more given all others, while that helps."""
        for done, i in enumerate(order):
            available = self.needed(self.roots[j] for j in order[:done])
            self.recipes |= self.solve(self.roots[i], self.limits[i], available)
        lowest = self.total()
        for _ in range(passes):
            before = lowest
            for i in order:
                others = self.needed(r for j, r in enumerate(self.roots) if j != i)
                kept = dict(self.recipes)
                self.recipes |= self.solve(self.roots[i], self.limits[i], others)
                total = self.total()
                if total < lowest:
                    lowest = total
                else:
                    self.recipes = kept
            if lowest == before:
                return


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Step:
    """One operation: the sum over the names that ``output`` lacks of the product of the inputs.

    Args:
        inputs: one or two tensors, each as its number and the names of its axes. Tensors 0 .. num_colours − 1 are the
            adjacency by colours, num_colours + i is the result of step i. A name twice in one input is its diagonal.
        output: the names of the result's axes, in order.
        arcs: the pattern that the result is, over the same names: the sum over all names but ``output`` of the
            product of X_colour[source, target].
        support: where a matrix product sums over two names, a tensor over these two, as its number and their order,
            that is a factor of one of the inputs: terms at which it is 0 are 0. None where there is no such thing.
    """

    inputs: tuple[tuple[int, tuple[int, ...]], ...]
    output: tuple[int, ...]
    arcs: tuple[Arc, ...]
    support: tuple[int, tuple[int, ...]] | None = None

    @property
    def time_exponent(self) -> int:
        """The number of nested loops over the nodes."""
        return len({v for _, names in self.inputs for v in names})

    @property
    def memory_exponent(self) -> int:
        """The number of axes of the result."""
        return len(self.output)


@dataclass(frozen=True)
class Result:
    """One pattern's value: the product of its connected parts, as tensor numbers with the names of their axes.

    An output that no part has is a factor 1 on each node; one that stands twice in ``outputs`` lies on the diagonal.
    """

    parts: tuple[tuple[int, tuple[int, ...]], ...]
    outputs: tuple[int, ...]

    @property
    def time_exponent(self) -> int:
        return len(set(self.outputs))


@dataclass(frozen=True, eq=False)
class Plan:
    """What to compute, in order, for a list of patterns; made by :func:`contraction_plan`.

    Attributes:
        patterns: whose values the plan gives.
        steps: the operations, each after its inputs.
        results: how each pattern's value is put together from the steps' results.
        num_colours: how many adjacency matrices go in, one for each colour up to the highest that an arc has.
        symmetric: whether the plan counts on a symmetric adjacency (some pattern is undirected).
        last_use: for each step, the last step that reads it, or None where a result does.
    """

    patterns: tuple[Pattern, ...]
    steps: tuple[Step, ...]
    results: tuple[Result, ...]
    num_colours: int
    symmetric: bool
    last_use: tuple[int | None, ...]

    @property
    def time_exponent(self) -> int:
        """t: the plan takes O(n^t) operations."""
        return max([0, *(s.time_exponent for s in self.steps), *(r.time_exponent for r in self.results)])

    @property
    def memory_exponent(self) -> int:
        """m: intermediates and results take O(n^m) numbers, the adjacency itself aside."""
        return max([0, *(s.memory_exponent for s in self.steps), *(len(r.outputs) for r in self.results)])

    def multiplications(self, n: int) -> int:
        """How many products of two numbers the plan takes on n nodes."""
        n = check_int("n", n, minimum=0)
        steps = sum(n**s.time_exponent for s in self.steps if len(s.inputs) == 2)
        return steps + sum(n**r.time_exponent * max(len(r.parts) - 1, 0) for r in self.results)

    def peak(self, n: int) -> int:
        """How many numbers of intermediates are alive at once on n nodes, at most."""
        n = check_int("n", n, minimum=0)
        return max((sum(n**axes for axes in alive) for alive in self._alive), default=0)

    @functools.cached_property
    def _alive(self) -> tuple[tuple[int, ...], ...]:
        """After each step, the numbers of axes of the steps' results that are still needed; no moment twice."""
        last = [len(self.steps) if i is None else i for i in self.last_use]
        moments = (
            tuple(sorted(s.memory_exponent for s, end in zip(self.steps[: i + 1], last, strict=False) if end >= i))
            for i in range(len(self.steps))
        )
        return tuple(dict.fromkeys(moments))

    def __str__(self) -> str:
        """The steps, one a line: ``t3[a,c,d] = t1[a,d] t2[c,d]``, inputs as X (or X0, X1, ... by colour)."""
        letters = "abcdefghijklmnopqrstuvwxyz"

        def tensor(number: int, names: Sequence[int]) -> str:
            word = f"t{number - self.num_colours}" if number >= self.num_colours else "X"
            word += str(number) if word == "X" and self.num_colours > 1 else ""
            return f"{word}[{','.join(letters[v] if v < 26 else str(v) for v in names)}]"

        lines = [
            f"{tensor(self.num_colours + i, s.output)} = {' '.join(tensor(*x) for x in s.inputs)}"
            for i, s in enumerate(self.steps)
        ]
        return "\n".join(lines)


def _arcs(pattern: Pattern) -> tuple[Arc, ...]:
    return tuple((int(a[0]), int(a[1]), int(a[2]) if len(a) == 3 else 0) for a in pattern.edges)


def _within(key: Key, memory_order: int | None) -> tuple[int, int]:
    """The limits to plan in: least memory, then least time; or least time in the memory allowed."""
    widths = _widths(key)
    if memory_order is None:
        return min(widths)
    allowed = [(m, t) for m, t in widths if m <= memory_order]
    if not allowed:
        raise ValueError(
            f"memory_order must be at least {min(m for m, _ in widths)} for this pattern, got {memory_order}"
        )
    memory, time = min(allowed, key=lambda w: (w[1], w[0]))
    return memory, time


@functools.lru_cache(maxsize=1024)
def _plan(patterns: tuple[Pattern, ...], memory_order: int | None) -> Plan:
    symmetric = any(not p.directed for p in patterns)
    parts: list[list[tuple[Key, tuple[int, ...]]]] = []
    for pattern in patterns:
        found = []
        for part, positions in pattern.components():
            if part.edges:
                key, axes = _canonical(_arcs(part), tuple(sorted(set(part.outputs))), symmetric)
                output_of = dict(zip(part.outputs, (pattern.outputs[p] for p in positions), strict=True))
                found.append((key, tuple(output_of[v] for v in axes)))
        parts.append(found)

    limits: dict[Key, tuple[int, int]] = {}
    for found in parts:
        for key, _ in found:
            if key not in limits and not _is_input(key):
                limits[key] = _within(key, memory_order)
    roots = list(limits)
    # Sums of a tensor come for free once it is there, so patterns with many axes and many arcs go first; the other
    # way round, small patterns are parts of large ones.
    by_size = sorted(range(len(roots)), key=lambda i: (-len(roots[i][0]), -roots[i][1], roots[i]))
    searches = []
    for order in (by_size, by_size[::-1]):
        search = _Search(roots, [limits[r] for r in roots])
        search.run(order, passes=3 if len(roots) <= 64 else 0)
        searches.append(search)
    search = min(searches, key=_Search.total)
    return _assembled(patterns, parts, search, symmetric)


def _assembled(
    patterns: tuple[Pattern, ...],
    parts: list[list[tuple[Key, tuple[int, ...]]]],
    search: _Search,
    symmetric: bool,
) -> Plan:
    """Number the tensors and choose the order of their axes."""
    num_colours = max((p.num_colours for p in patterns), default=1)
    keys = list(search.needed(search.roots))
    # The order that the costliest matrix product reads without a copy: shared axes, then summed, then its own.
    wanted: dict[Key, tuple[int, tuple[int, ...]]] = {}
    for key in keys:
        recipe = search.recipes[key]
        if len(recipe) != 2:
            continue
        common = set(recipe[0][1]) & set(recipe[1][1])
        if not any(v >= key[1] for v in common):
            continue
        for operand, names in recipe:
            rank = {v: (v not in common, v >= key[1], v) for v in names}
            order = tuple(sorted(range(len(names)), key=lambda i: rank[names[i]]))
            wanted[operand] = max(wanted.get(operand, (0, order)), (_cost(key, recipe), order), key=lambda w: w[0])

    numbers: dict[Key, int] = {}
    layouts: dict[Key, tuple[int, ...]] = {}

    def tensor(key: Key, names: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """A tensor's number, and the names of its axes in the order in which they lie."""
        if _is_input(key):
            return key[0][0][2], (names[0], names[1])
        return numbers[key], tuple(names[i] for i in layouts[key])

    steps: list[Step] = []

    def support(
        key: Key, inputs: list[tuple[int, tuple[int, ...]]], output: tuple[int, ...]
    ) -> tuple[int, tuple[int, ...]] | None:
        summed = {v for _, names in inputs for v in names} - set(output)
        if len(inputs) < 2 or len(summed) != 2 or set(inputs[0][1]) & set(inputs[1][1]) != summed:
            return None
        for r, s, colour in key[0]:
            if {r, s} == summed:
                return colour, (r, s)
        for number, names in inputs:
            if number < num_colours:
                continue
            made = steps[number - num_colours]
            name_of = dict(zip(layouts[keys[number - num_colours]], names, strict=True))
            for factor, axes in made.inputs if set(made.output) == {v for _, x in made.inputs for v in x} else ():
                if len(axes) == 2 and {name_of[v] for v in axes} == summed:
                    return factor, tuple(name_of[v] for v in axes)
        return None

    for key in keys:
        recipe = search.recipes[key]
        inputs = [tensor(*operand) for operand in recipe]
        target = wanted[key][1] if key in wanted else tuple(range(key[1]))
        if len(inputs) == 1:
            output = tuple(v for v in dict.fromkeys(inputs[0][1]) if v < key[1])
        else:
            one, two = (names for _, names in inputs)
            summed = [v for v in one if v in two and v >= key[1]]
            if summed:
                batch = [v for v in one if v in two and v < key[1]]
                first, second = [v for v in one if v not in two], [v for v in two if v not in one]
                output = (*batch, *first, *second)
                if output != target and (*batch, *second, *first) == target:
                    inputs.reverse()
                    output = target
            else:
                # Elementwise, entries come to lie as they do in the operand that has all axes.
                output = next((names for names in (one, two) if len(set(names)) == key[1]), target)
                output = output if _same_tensor(key, output, target) else target
        numbers[key] = num_colours + len(steps)
        layouts[key] = target if _same_tensor(key, output, target) else output
        steps.append(Step(tuple(inputs), output, key[0], support(key, inputs, output)))

    results = tuple(
        Result(tuple(tensor(key, names) for key, names in found), tuple(pattern.outputs))
        for pattern, found in zip(patterns, parts, strict=True)
    )
    kept = {number for r in results for number, _ in r.parts}
    last: list[int | None] = [None] * len(steps)
    for i, step in enumerate(steps):
        for number, _ in (*step.inputs, *([step.support] if step.support else [])):
            if number >= num_colours and number not in kept:
                last[number - num_colours] = i
    return Plan(patterns, tuple(steps), results, num_colours, symmetric, tuple(last))


def contraction_plan(pattern: Pattern | Iterable[Pattern], *, memory_order: int | None = None) -> Plan:
    """How to evaluate a pattern, or several at once with what they have in common computed once.

    The exponents are exact up to 8 arcs: the least memory exponent that any sequence of contractions of two tensors
    has, and the least time exponent among those. Plans are cached.

    Args:
        pattern: a :class:`Pattern`, or several.
        memory_order: let intermediates have up to this many axes, and take the least time; by default the least
            memory comes first.

    Returns:
        A :class:`Plan`; ``plan.time_exponent`` and ``plan.memory_exponent`` say how it scales, ``print(plan)`` shows
        its steps.

    Raises:
        TypeError: something else than a Pattern is among ``pattern``.
        ValueError: no contraction keeps to ``memory_order``.

    Source: Puny et al., "Equivariant Polynomials for Graph Neural Networks", arXiv 2302.11556, section 4.

    Example::

        >>> from torchlayers.polynomial import Pattern, contraction_plan
        >>> plan = contraction_plan(Pattern.clique(4))
        >>> plan.time_exponent, plan.memory_exponent
        (4, 3)
    """
    patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
    for i, p in enumerate(patterns):
        if not isinstance(p, Pattern):
            name = "pattern" if len(patterns) == 1 else f"pattern[{i}]"
            raise TypeError(f"{name} must be a Pattern, got {p!r} ({type(p).__name__})")
    if memory_order is not None:
        check_int("memory_order", memory_order, minimum=0)
    return _plan(patterns, memory_order)
