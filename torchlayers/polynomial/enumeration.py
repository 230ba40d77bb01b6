"""All patterns of a degree, listed and counted: the basis of the equivariant polynomials of a graph.

The list is grown arc by arc and told apart by canonical forms; the count comes, independently, from Burnside's lemma.
Both hold for the data that ``kind`` names:

==============  =======================================  =========================================
``kind``        input X                                  patterns
==============  =======================================  =========================================
``"simple"``    0/1, symmetric, zero diagonal            undirected, no loops, no parallel arcs
``"weighted"``  symmetric                                undirected, with loops and parallel arcs
``"directed"``  any                                      directed, with loops and parallel arcs
==============  =======================================  =========================================

``loops=False`` is for a zero diagonal, ``parallel=False`` for entries 0 and 1, since there ``X * X = X``: so the kind
``"directed"`` without both is for directed 0/1 graphs, ``"weighted"`` without loops for weighted ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from itertools import combinations_with_replacement, product
from typing import Any, Literal

from .._checks import check_choice, check_int
from .computability import Bank, as_bank, is_computable
from .patterns import Form, Pattern, assemble, canonical_form, component_key

__all__ = ["count_patterns", "enumerate_patterns", "missing_patterns"]

Kind = Literal["simple", "weighted", "directed"]
_Family = tuple[bool, bool, bool, int]  # directed, loops, parallel, number of colours

_KINDS = {"simple": (False, False, False), "weighted": (False, True, True), "directed": (True, True, True)}
_MAX_DEGREE = 8


def _family(kind: str, loops: bool | None, parallel: bool | None) -> tuple[bool, bool, bool]:
    check_choice("kind", kind, _KINDS)
    directed, default_loops, default_parallel = _KINDS[kind]
    return (
        directed,
        default_loops if loops is None else bool(loops),
        default_parallel if parallel is None else bool(parallel),
    )


def enumerate_patterns(
    degree: int,
    order: int,
    *,
    kind: Kind = "simple",
    connected: bool = True,
    exclude: str | int | Bank | None = None,
    loops: bool | None = None,
    parallel: bool | None = None,
    diagonal: bool = False,
    num_colours: int | None = None,
    force: bool = False,
) -> list[Pattern]:
    """All patterns with exactly ``degree`` arcs and ``order`` outputs, sorted.

    Args:
        degree: number of arcs, 0 or more. Degree 7 of kind ``"simple"`` takes seconds; the general kinds grow fast.
        order: number of outputs: 0, 1 or 2.
        kind: what the input X is known to be, see the module's table.
        connected: only patterns with one component. The others are products of these (``Pattern.components``), so
            that the connected ones generate all polynomials but are no basis. ``False``: the whole basis.
        exclude: leave out what the bank computes: a name of :data:`BANKS` such as ``"mpnn"`` or ``"ppgn"``, or
            what else :func:`is_computable` takes.
        loops, parallel: override what ``kind`` says.
        diagonal: with order 2, also those whose two outputs are one node: matrices that are zero off the diagonal,
            with the values of an order 1 pattern there. With them and ``connected=False`` the list is as long as
            :func:`count_patterns` says.
        num_colours: number of channels of X; the arcs are then triples ``(source, target, colour)``.
        force: allow a degree over 8.

    Raises:
        ValueError: for a degree over 8 without ``force``, an order over 2, an unknown kind or bank.

    Example:
        >>> [pattern.equation() for pattern in enumerate_patterns(3, 0)]
        ['ab,ac,bc->', 'ac,bd,cd->', 'ad,bd,cd->']
    """
    check_int("degree", degree, minimum=0)
    _check_order(order)
    if degree > _MAX_DEGREE and not force:
        raise ValueError(f"degree must be at most {_MAX_DEGREE} (force=True lifts this), got {degree}")
    if num_colours is not None:
        check_int("num_colours", num_colours)
    directed, loops, parallel = _family(kind, loops, parallel)
    family = (directed, loops, parallel, num_colours or 1)
    forms: Iterable[Form]
    if not connected:
        forms = _all(degree, order, diagonal, family)
    elif degree or order:
        forms = _one_component(degree, order, diagonal, family)
    else:
        forms = ()  # a black node alone is no pattern, and the empty pattern has no component
    patterns = sorted(Pattern._from_form(form, num_colours is not None, directed) for form in forms)
    if exclude is None:
        return patterns

    bank = as_bank(exclude)
    return [pattern for pattern in patterns if not is_computable(pattern, bank)]


@functools.lru_cache(maxsize=256)
def _connected(
    degree: int, order: int, directed: bool, loops: bool, parallel: bool, num_colours: int
) -> frozenset[Form]:
    """Forms with one component; two outputs are on two nodes. Degree 0 without outputs is one (black) node."""
    family: _Family = (directed, loops, parallel, num_colours)
    out: set[Form] = set()
    if order:
        # Each output in turn on each node that has none: the positions are filled from the first.
        for marks, arcs in _connected(degree, order - 1, *family):
            for v, mark in enumerate(marks):
                if not mark:
                    out.add(canonical_form((*marks[:v], (order - 1,), *marks[v + 1 :]), arcs, directed))
        return frozenset(out)
    if degree == 0:
        return frozenset({(((),), ())})
    # Every connected form with an arc has one that can go: an arc of a cycle, a loop, or one to a leaf (with the leaf).
    for marks, arcs in _connected(degree - 1, 0, *family):
        n = len(marks)
        present = set(arcs)
        for u, v in product(range(n + 1), repeat=2):
            if (u == n and v == n) or (u == v and not loops) or (u > v and not directed):
                continue
            for colour in range(num_colours):
                arc = (u, v, colour)
                if parallel or arc not in present:
                    new = ((),) * (n + (n in (u, v)))
                    out.add(canonical_form(new, (*arcs, arc), directed))
    return frozenset(out)


def _one_component(degree: int, order: int, diagonal: bool, family: _Family) -> Iterator[Form]:
    yield from _connected(degree, order, *family)
    if order == 2 and diagonal:
        yield from (_with_mark(form, (0, 1)) for form in _connected(degree, 1, *family))


def _with_mark(form: Form, positions: tuple[int, ...]) -> Form:
    """A form with one output, which now fills ``positions``."""
    return tuple(positions if mark else () for mark in form[0]), form[1]


def _all(degree: int, order: int, diagonal: bool, family: _Family) -> Iterator[Form]:
    """Components that carry the outputs, times multisets of components that carry none."""
    for rest in range(degree + 1):
        for outer in _with_outputs(degree - rest, order, diagonal, family):
            for inner in _multisets(rest, family):
                yield assemble(sorted((*outer, *inner), key=component_key), family[0])


def _with_outputs(degree: int, order: int, diagonal: bool, family: _Family) -> Iterator[tuple[Form, ...]]:
    if order == 0:
        if degree == 0:
            yield ()
        return
    yield from ((form,) for form in _one_component(degree, order, diagonal, family))
    if order == 2:
        for first in range(degree + 1):
            for a, b in product(_connected(first, 1, *family), _connected(degree - first, 1, *family)):
                yield a, _with_mark(b, (1,))


def _multisets(degree: int, family: _Family, largest: int | None = None) -> Iterator[list[Form]]:
    """All multisets of connected forms without outputs of ``degree`` arcs in all, none with more than ``largest``."""
    if degree == 0:
        yield []
        return
    for size in range(min(degree, largest or degree), 0, -1):
        forms = sorted(_connected(size, 0, *family))
        for times in range(1, degree // size + 1):
            for some in combinations_with_replacement(forms, times):
                left = degree - size * times
                if left == 0:
                    yield list(some)
                elif size > 1:
                    yield from ([*some, *more] for more in _multisets(left, family, size - 1))


def missing_patterns(
    bank: str | int | Bank,
    degree: int,
    order: int | Iterable[int] = (0, 1, 2),
    kind: Kind = "simple",
    **options: Any,
) -> list[Pattern]:
    """The connected patterns of degree at most ``degree`` that ``bank`` does not compute, sorted: features to add.

    With these, a network computes every polynomial of that degree (the others are products). For ``"ppgn++"`` and
    degree 6 they are 12, the features of the paper's PPGN++ (6).

    Args:
        bank: as for :func:`is_computable`.
        degree: the largest degree.
        order: numbers of outputs, one or several of 0, 1 and 2.
        kind, options: as for :func:`enumerate_patterns`.

    Example:
        >>> [pattern.equation() for pattern in missing_patterns("ppgn++", 6, order=0)]
        ['ab,ac,ad,bc,bd,cd->']
    """
    check_int("degree", degree, minimum=0)
    bank = as_bank(bank)
    orders = (order,) if isinstance(order, int) else tuple(order)
    return sorted(
        pattern
        for each in orders
        for d in range(degree + 1)
        for pattern in enumerate_patterns(d, each, kind=kind, exclude=bank, **options)
    )


def count_patterns(
    degree: int,
    order: int,
    kind: Kind = "simple",
    n: int | None = None,
    *,
    loops: bool | None = None,
    parallel: bool | None = None,
    num_colours: int = 1,
) -> int:
    """Dimension of the homogeneous equivariant polynomials of ``degree`` with ``order`` outputs.

    That is the number of patterns of exactly this degree, connected or not, with order 2 including those whose two
    outputs are one node (``count_patterns(degree, 1, ...)`` of them). It is the number of orbits of the permutations
    of ``n`` nodes on monomials with output indices, counted by Burnside's lemma over cycle types; nothing is listed.

    Args:
        degree, order, kind, loops, parallel, num_colours: as for :func:`enumerate_patterns`.
        n: number of nodes of the graph. ``None``: any number from ``2 * degree + order`` on, where the polynomials
            of different patterns are linearly independent. On fewer nodes they are not, and the dimension is smaller.

    Example:
        >>> [count_patterns(1, order, "directed") for order in (0, 1, 2)]  # the Bell numbers B(2), B(3), B(4)
        [2, 5, 15]
    """
    check_int("degree", degree, minimum=0)
    _check_order(order)
    check_int("num_colours", num_colours)
    n = 2 * degree + order if n is None else check_int("n", n, minimum=0)
    directed, loops, parallel = _family(kind, loops, parallel)
    total = 0
    for cycles in _partitions(n):
        fixed = cycles.count(1) ** order
        if fixed:
            positions = _position_cycles(cycles, directed, loops)
            total += fixed * _class_size(cycles) * _coefficient(positions, num_colours, parallel, degree)
    return total // math.factorial(n)


def _check_order(order: int) -> None:
    if check_int("order", order, minimum=0) > 2:
        raise ValueError(f"order must be 0, 1 or 2, got {order}")


def _partitions(n: int, largest: int | None = None) -> Iterator[list[int]]:
    if n == 0:
        yield []
    for part in range(min(n, largest or n), 0, -1):
        yield from ([part, *rest] for rest in _partitions(n - part, part))


def _class_size(cycles: list[int]) -> int:
    """Number of permutations with these cycle lengths."""
    centraliser = math.prod(length**times * math.factorial(times) for length, times in _multiplicities(cycles).items())
    return math.factorial(sum(cycles)) // centraliser


def _multiplicities(values: list[int]) -> dict[int, int]:
    return {value: values.count(value) for value in set(values)}


def _position_cycles(cycles: list[int], directed: bool, loops: bool) -> dict[int, int]:
    """Cycle lengths, with multiplicity, of the permutation's action on the entries of X that can differ."""
    out: dict[int, int] = {}

    def add(length: int, times: int) -> None:
        if times:
            out[length] = out.get(length, 0) + times

    for i, a in enumerate(cycles):
        if loops:
            add(a, 1)
        if directed:
            add(a, a - 1)
        else:
            add(a, (a - 1) // 2)
            if a % 2 == 0:
                add(a // 2, 1)  # the pairs of opposite nodes come back after half a turn
        for b in cycles[:i]:
            add(math.lcm(a, b), math.gcd(a, b) * (2 if directed else 1))
    return out


def _coefficient(positions: dict[int, int], num_colours: int, parallel: bool, degree: int) -> int:
    """Number of fixed monomials: the coefficient of t^degree in the product of 1 / (1 - t^l), or of 1 + t^l."""
    series = [1] + [0] * degree
    for length, times in positions.items():
        times *= num_colours
        powers = [math.comb(times + i - 1 if parallel else times, i) for i in range(degree // length + 1)]
        series = [sum(powers[i] * series[d - i * length] for i in range(d // length + 1)) for d in range(degree + 1)]
    return series[degree]
