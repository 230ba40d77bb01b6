"""Values of patterns on graphs: dense batches by a shared contraction plan, exactly where the input is integer.

The definition is :func:`torchlayers.polynomial.reference.polynomial`; what is computed here is the same sum in the
order that :func:`torchlayers.polynomial.contraction_plan` found.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._backend import is_traced
from .._checks import check_ndim, check_same_device, check_size
from .patterns import Pattern
from .plan import Plan, Result, Step, contraction_plan

if TYPE_CHECKING:
    import networkx

__all__ = ["evaluate", "hom_count", "inj_count"]

# A batch is cut so that the intermediates of a chunk stay in a core's second cache, or within what a GPU can spare.
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 1 << 20, 1 << 31


# ---------------------------------------------------------------- running a plan
# What a step does is data, worked out once from the names of its axes: torch.compile can take that as a constant.


class _View(NamedTuple):
    """The axes of a tensor (G, ...) permuted (None: as they are), and axes of size 1 put in at ``missing``."""

    permutation: tuple[int, ...] | None
    missing: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[int], order: Sequence[int]) -> _View:
        """From axes by ``names`` to axes in ``order``."""
        permutation = (0, *(1 + list(names).index(v) for v in order if v in names))
        missing = tuple(1 + i for i, v in enumerate(order) if v not in names)
        return cls(None if permutation == tuple(sorted(permutation)) else permutation, missing)


def _viewed(x: torch.Tensor, view: _View) -> torch.Tensor:
    permutation, missing = view
    if permutation is not None:
        x = x.permute(permutation)
    for dim in missing:
        x = x.unsqueeze(dim)
    return x


class _Unary(NamedTuple):
    """The diagonal of a tensor where ``loop``, summed over ``dims``."""

    loop: bool
    dims: tuple[int, ...]


class _Hadamard(NamedTuple):
    """The product of two tensors with aligned axes, summed over ``dims``."""

    one: _View
    two: _View
    dims: tuple[int, ...]


class _Product(NamedTuple):
    """A product of matrices: ``one`` as (batch, rows, summed), ``two`` as (batch, summed, columns), by axis counts.

    ``turned`` where an operand has its two last groups the other way round: its transpose needs no copy. ``support``
    where the sum is over two nodes and its terms are 0 where some tensor is: the number of that, and whether its axes
    are in the other order.
    """

    one: _View
    two: _View
    one_turned: bool
    two_turned: bool
    batch: int
    rows: int
    summed: int
    columns: int
    support: tuple[int, bool] | None


_Operation = _Unary | _Hadamard | _Product


def _operation(step: Step) -> _Operation:
    if len(step.inputs) == 1:
        ((_, names),) = step.inputs
        loop = len(names) == 2 and names[0] == names[1]
        left = names[:1] if loop else names
        return _Unary(loop, tuple(1 + i for i, v in enumerate(left) if v not in step.output))
    (_, one), (_, two) = step.inputs
    summed = [v for v in one if v in two and v not in step.output]
    if not summed:
        return _Hadamard(_View.of(one, step.output), _View.of(two, step.output), ())
    batch = [v for v in one if v in two and v in step.output]
    rows, columns = [v for v in one if v not in two], [v for v in two if v not in one]
    if not rows and not columns:
        dims = tuple(range(1 + len(batch), 1 + len(batch) + len(summed)))
        return _Hadamard(_View.of(one, batch + summed), _View.of(two, batch + summed), dims)
    one_turned = bool(rows) and list(one) == batch + summed + rows
    two_turned = bool(columns) and list(two) == batch + columns + summed
    support = None if step.support is None else (step.support[0], step.support[1] != tuple(summed))
    return _Product(
        _View.of(one, batch + (summed + rows if one_turned else rows + summed)),
        _View.of(two, batch + (columns + summed if two_turned else summed + columns)),
        one_turned, two_turned, len(batch), len(rows), len(summed), len(columns), support,
    )  # fmt: skip


class _Terms(NamedTuple):
    """Some of the pairs (i, j) of nodes, and i n + j."""

    flat: torch.Tensor
    i: torch.Tensor
    j: torch.Tensor

    def of(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The entries of one graph's tensor at these places of the axes ``dim`` and ``dim`` + 1, as one axis."""
        if x.is_contiguous():
            return x.flatten(dim, dim + 1).index_select(dim, self.flat)
        index: tuple[Any, ...] = (*[slice(None)] * dim, self.i, self.j)
        return x[index]


def _support(x: torch.Tensor, turned: bool) -> _Terms | None:
    """Where a tensor (1, n, n) is not 0, if that is seldom enough for taking it out to be worth while."""
    flat = (x[0].mT if turned else x[0]).reshape(-1).nonzero().squeeze(1)
    if 4 * len(flat) >= x.numel():
        return None
    return _Terms(flat, flat.div(x.shape[-1], rounding_mode="floor"), flat % x.shape[-1])


def _applied(operation: _Operation, operands: Sequence[torch.Tensor], terms: _Terms | None = None) -> torch.Tensor:
    """One step; ``terms`` are those of a product's sum over two nodes that are not 0, or None for all."""
    if isinstance(operation, _Unary):
        (x,) = operands
        x = x.diagonal(dim1=1, dim2=2) if operation.loop else x
        return x.sum(operation.dims) if operation.dims else x
    x, y = operands
    n, graphs = x.shape[-1], x.shape[0]
    x, y = _viewed(x, operation.one), _viewed(y, operation.two)
    if isinstance(operation, _Hadamard):
        return (x * y).sum(operation.dims) if operation.dims else x * y
    b, k = graphs * n**operation.batch, n**operation.summed
    r, c = n**operation.rows, n**operation.columns
    if terms is not None:
        k = len(terms.flat)
        x = terms.of(x, 1 if operation.one_turned else 1 + operation.rows)
        y = terms.of(y, 1 + operation.columns if operation.two_turned else 1)
    x = x.reshape(b, k, r).mT if operation.one_turned else x.reshape(b, r, k)
    y = y.reshape(b, c, k).mT if operation.two_turned else y.reshape(b, k, c)
    return torch.bmm(x, y).reshape([graphs] + [n] * (operation.batch + operation.rows + operation.columns))


class _Value(NamedTuple):
    """A pattern's value: the product of its connected parts and of ``there``, once for each view beyond them."""

    views: tuple[_View, ...]
    diagonal: bool

    @classmethod
    def of(cls, result: Result) -> _Value:
        names = tuple(dict.fromkeys(result.outputs))
        covered = {v for _, axes in result.parts for v in axes}
        factors = [axes for _, axes in result.parts] + [(v,) for v in names if v not in covered]
        return cls(tuple(_View.of(axes, names) for axes in factors), len(result.outputs) > len(names))


def _valued(value: _Value, parts: Sequence[torch.Tensor], there: torch.Tensor) -> torch.Tensor:
    """The value, (G,), (G, N) or (G, N, N); ``there`` (G, N) is 1 for nodes that are there."""
    if not value.views:
        return there.new_ones(there.shape[0])
    operands = [*parts, *[there] * (len(value.views) - len(parts))]
    product = _viewed(operands[0], value.views[0])
    for x, view in zip(operands[1:], value.views[1:], strict=True):
        product = product * _viewed(x, view)
    return torch.diag_embed(product) if value.diagonal else product


@dataclass(frozen=True, eq=False)
class _Program:
    """A plan as operations.

    Attributes:
        plan: the plan.
        steps: for each step the numbers of its inputs, the operation, and which tensors nobody needs after it.
        results: for each pattern the numbers of its parts and how they make its value.
        powers: exponents (a, b, c) such that all values and partial sums are at most the largest of n^a Δ^b M^c, with
            n nodes, Δ the largest absolute row or column sum and M the largest absolute entry, all of them at least 1.
    """

    plan: Plan
    steps: tuple[tuple[tuple[int, ...], _Operation, tuple[int, ...]], ...]
    results: tuple[tuple[tuple[int, ...], _Value], ...]
    powers: tuple[tuple[int, ...], ...]


def _powers(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """See :class:`_Program`.

    A connected pattern with an axis has a forest that joins each summed node to an axis: one factor Δ for each summed
    node, and one factor M for each other arc. Without an axis, n times that of the pattern with one more.
    """
    found: list[tuple[int, ...]] = [(0, 0, 1)] * plan.num_colours
    for step in plan.steps:
        scalar = int(not step.output)
        joined = len({v for arc in step.arcs for v in arc[:2]}) - len(step.output) - scalar
        found.append((scalar, joined, len(step.arcs) - joined))
    for result in plan.results:
        parts = [found[number] for number, _ in result.parts]
        found.append(tuple(sum(part[i] for part in parts) for i in range(3)))
    powers = set(found)
    return tuple(p for p in powers if not any(p != q and all(map(int.__le__, p, q)) for q in powers))


@functools.lru_cache(maxsize=1024)
def _program(patterns: tuple[Pattern, ...]) -> _Program:
    plan = contraction_plan(patterns)
    steps = []
    for i, step in enumerate(plan.steps):
        done = tuple(plan.num_colours + j for j, last in enumerate(plan.last_use) if last == i)
        steps.append((tuple(j for j, _ in step.inputs), _operation(step), done))
    results = tuple((tuple(j for j, _ in r.parts), _Value.of(r)) for r in plan.results)
    return _Program(plan, tuple(steps), results, _powers(plan))


def _tensors(
    program: _Program, x: torch.Tensor, *, skip_zeros: bool = False, sizes: list[int] | None = None
) -> list[Any]:
    """The plan's tensors on ``x`` (G, C, N, N): the colours, then the steps' results; None for what is used up.

    ``skip_zeros``: leave out terms that are 0, for one graph. ``sizes`` is given the largest absolute entry of each.
    """
    tensors: list[Any] = list(x.unbind(1)[: program.plan.num_colours])
    supports: dict[tuple[int, bool], _Terms | None] = {}
    for numbers, operation, done in program.steps:
        terms = None
        if skip_zeros and isinstance(operation, _Product) and operation.support is not None:
            number, turned = operation.support
            if operation.support not in supports:
                supports[operation.support] = _support(tensors[number], turned)
            terms = supports[operation.support]
        tensors.append(_applied(operation, [tensors[j] for j in numbers], terms))
        if sizes is not None:
            sizes.append(_largest(tensors[-1]))
        for j in done:
            tensors[j] = None
    return tensors


def _chunks(program: _Program, x: torch.Tensor) -> int:
    """How many graphs of ``x`` (G, C, N, N) to take at once."""
    limit = CPU_CHUNK_BYTES if x.device.type == "cpu" else GPU_CHUNK_BYTES
    return max(1, limit // max(1, program.plan.peak(x.shape[-1]) * x.dtype.itemsize))


def _piece(program: _Program, x: torch.Tensor, there: torch.Tensor, constant: bool) -> list[torch.Tensor]:
    skip_zeros = constant and x.shape[0] == 1 and x.device.type == "cpu"
    tensors, ones = _tensors(program, x, skip_zeros=skip_zeros), there.to(x.dtype)
    return [_valued(value, [tensors[j] for j in numbers], ones) for numbers, value in program.results]


def _run(program: _Program, x: torch.Tensor, there: torch.Tensor, constant: bool = False) -> list[torch.Tensor]:
    """The values of the plan's patterns on (G, C, N, N), in the dtype of ``x``, chunk by chunk of the batch.

    ``constant`` where nobody differentiates by ``x``, so that terms that are 0 need not be looked at.
    """
    # A compiled graph takes the batch at once: a chunk's size would tie it to this n.
    if is_traced() or x.shape[0] <= 1 or x.shape[0] <= (chunk := _chunks(program, x)):
        return _piece(program, x, there, constant)
    pieces = [_piece(program, a, b, constant) for a, b in zip(x.split(chunk), there.split(chunk), strict=True)]
    return [torch.cat(values) for values in zip(*pieces, strict=True)]


# torch.compile takes the program as a constant of these patterns and traces its operations, not the planner.
@torch.compiler.assume_constant_result
def _program_of(*patterns: Pattern) -> _Program:
    return _program(patterns)


# ---------------------------------------------------------------- exact integers


def _largest(x: torch.Tensor) -> int:
    """The largest absolute value, as an int that is not below it."""
    if x.numel() == 0:
        return 0
    value = float(x.abs().max())
    if not math.isfinite(value):
        return 1 << 1023
    return int(value) if value < 2.0**52 else math.ceil(value * (1 + 1e-6))


def _estimate(program: _Program, x: torch.Tensor) -> int:
    """A bound of the absolute values of all tensors and partial sums, from the sizes of ``x`` (float64) alone."""
    size = x.abs()
    n, most = max(1, x.shape[-1]), max(1, _largest(size))
    row = max(1, _largest(size.sum(-1)))
    row = row if program.plan.symmetric else max(row, _largest(size.sum(-2)))
    return max((n**a * row**b * most**c for a, b, c in program.powers), default=1)


def _measured(program: _Program, x: torch.Tensor) -> list[int]:
    """For each pattern such a bound, by carrying the plan out on the absolute values of ``x`` (float64)."""
    plan, sizes = program.plan, [0] * len(program.plan.steps)
    for piece in x.abs().split(_chunks(program, x)):
        own: list[int] = []
        _tensors(program, piece, sizes=own)
        sizes = list(map(max, sizes, own))
    bounds = [max(1, _largest(x))] * plan.num_colours + sizes
    below = list(bounds)
    for i, step in enumerate(plan.steps, plan.num_colours):
        below[i] = max(below[i], *(below[number] for number, _ in step.inputs))
    return [
        max([1, math.prod(bounds[number] for number, _ in r.parts), *(below[number] for number, _ in r.parts)])
        for r in plan.results
    ]


def _float32_is_exact(device: torch.device) -> bool:
    """Whether products of float32 matrices keep 24 bits here: no tf32 or bf16 on the way."""
    return device.type == "cpu" and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


@torch.compiler.disable
def _run_exact(program: _Program, x: torch.Tensor, there: torch.Tensor) -> list[torch.Tensor]:
    """The values on an integer ``x`` as int64, in the fastest arithmetic that has room for every partial sum."""
    wide = x.double()
    highest = _estimate(program, wide)
    if highest >= 2**53:
        bounds = _measured(program, wide)
        highest = max(bounds)
        if highest >= 2**63:
            pattern = next(p for p, bound in zip(program.plan.patterns, bounds, strict=True) if bound >= 2**63)
            raise OverflowError(
                f"adj must have counts below 2^63 on the way to {pattern!r}, got one that can pass it "
                "(float64 takes any, rounded)"
            )
    if highest < 2**24 and _float32_is_exact(x.device):
        return [v.long() for v in _run(program, x.float(), there, constant=True)]
    if highest < 2**53:
        return [v.long() for v in _run(program, wide, there, constant=True)]
    # Integer matrix products exist on the CPU only.
    values = _run(program, x.long().cpu(), there.cpu(), constant=True)
    return [v.to(x.device) for v in values]


# ---------------------------------------------------------------- the public function


def _patterns(pattern: Pattern | Iterable[Pattern]) -> tuple[Pattern, ...]:
    patterns = (pattern,) if isinstance(pattern, Pattern) else pattern
    if not isinstance(patterns, Iterable):
        raise TypeError(f"pattern must be a Pattern or several, got {pattern!r} ({type(pattern).__name__})")
    return tuple(patterns)


def _check_adj(patterns: Sequence[Pattern], adj: torch.Tensor) -> torch.Tensor:
    """``adj`` as (..., C, N, N)."""
    coloured = any(p.is_coloured for p in patterns)
    layout = "(..., C, N, N)" if coloured else "(..., N, N)"
    if not isinstance(adj, torch.Tensor) or adj.ndim < (3 if coloured else 2):
        check_ndim("adj", adj, 3 if coloured else 2, layout)
    if adj.shape[-1] != adj.shape[-2]:
        raise ValueError(f"adj must be square {layout}, got shape {tuple(adj.shape)}")
    if not coloured:
        return adj.unsqueeze(-3)
    plain = next((p for p in patterns if not p.is_coloured and p.edges), None)
    if plain is not None:
        raise ValueError(f"pattern must have colours on all arcs or on none, got {plain!r} among coloured ones")
    needed = max(p.num_colours for p in patterns)
    if adj.shape[-3] < needed:
        raise ValueError(f"adj must have at least C = {needed} colours {layout}, got {adj.shape[-3]}")
    return adj


def _check_symmetric(adj: torch.Tensor, patterns: Sequence[Pattern]) -> None:
    difference = adj != adj.mT
    if not difference.any():
        return
    if adj.dtype.is_floating_point or adj.dtype.is_complex:
        # Products of rounded factors, D^-1/2 A D^-1/2 say, differ from their transpose by rounding.
        slack = 16 * torch.finfo(adj.dtype).eps * adj.abs().max()
        difference = (adj - adj.mT).abs() > slack
        if not difference.any():
            return
    *_, i, j = difference.nonzero()[0].tolist()
    pattern = next(p for p in patterns if not p.directed)
    raise ValueError(
        f"adj must be symmetric for the undirected {pattern!r} (directed=True takes any), "
        f"got different entries at ({i}, {j}) and ({j}, {i})"
    )


def evaluate(
    pattern: Pattern | Iterable[Pattern],
    adj: torch.Tensor,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The polynomial of a pattern, or of each of several, on a batch of graphs: sums over homomorphisms.

    ``P[i_out] = Σ over maps j: nodes -> [N] with j = i on the outputs of Π over arcs (r, s, c) of X[c, j_r, j_s]``:
    nodes of the pattern may coincide. With an adjacency of 0 and 1 it counts homomorphisms. Several patterns are
    evaluated together, and what they have in common is computed once.

    Integers and bools are computed exactly, in float32, float64 or int64, whichever is the fastest that has room for
    every partial sum. Floating-point input is computed in its own dtype (half precision in float32), and can be
    differentiated. Autocast has no effect.

    Args:
        pattern: a :class:`Pattern`, or several.
        adj: (..., N, N), or (..., C, N, N) where the patterns' arcs have colours; any leading dimensions. Symmetric
            (to rounding) where a pattern is undirected. Or one large graph as a sparse tensor, (N, N) CSR or COO, or
            (C, N, N) COO: then no N × N tensor is made, and what has two outputs comes as a sparse tensor with the
            entries of ``adj`` (see :func:`torchlayers.polynomial.sparse.evaluate_sparse`).
        mask: (..., N) bool, which nodes are there: the others are on no assignment and get 0. NaN there is harmless.
        dtype: of the result: by default that of ``adj``, int64 for integers and bools. Floating-point input is cast
            to it first, exact integers afterwards.

    Returns:
        A tensor (...,), (..., N) or (..., N, N) for 0, 1 or 2 outputs; a list of them where several patterns came.

    Raises:
        ValueError: ``adj`` or ``mask`` have a wrong shape; ``adj`` is not symmetric and a pattern is undirected
            (not looked at under ``torch.compile``); fewer colours than a pattern has.
        TypeError: ``dtype`` is an integer and ``adj`` is not; ``mask`` is not bool.
        OverflowError: an exact count, or one on the way to it, can pass 2^63; the message names the pattern.

    Source: Puny et al., "Equivariant Polynomials for Graph Neural Networks", arXiv 2302.11556, sections 3 and 4.

    Example::

        >>> import torch
        >>> from torchlayers.polynomial import Pattern, evaluate
        >>> adj = 1 - torch.eye(4, dtype=torch.int64)
        >>> evaluate(Pattern.cycle(3), adj)  # closed walks of length 3 in K4
        tensor(24)
        >>> triangles, squares = evaluate([Pattern.cycle(3, (0,)), Pattern.cycle(4)], adj)
        >>> triangles
        tensor([6, 6, 6, 6])
    """
    patterns = _patterns(pattern)
    exact = isinstance(adj, torch.Tensor) and not adj.dtype.is_floating_point and not adj.dtype.is_complex
    if dtype is not None and not exact and isinstance(adj, torch.Tensor):
        integer = not dtype.is_floating_point and not dtype.is_complex
        if integer or (adj.dtype.is_complex and not dtype.is_complex):
            raise TypeError(f"adj must be {'integer' if integer else 'real'} for dtype={dtype}, got {adj.dtype}")
    if isinstance(adj, torch.Tensor) and adj.layout is not torch.strided:
        from .sparse import evaluate_sparse

        if mask is not None:
            raise ValueError("mask must be None for a sparse adj, which is one graph without padding")
        values = list(evaluate_sparse(patterns, adj, dtype))
        return values[0] if isinstance(pattern, Pattern) else values

    program = _program_of(*patterns)
    x = _check_adj(patterns, adj)
    lead, n = x.shape[:-3], x.shape[-1]
    if mask is None:
        there = torch.ones(1, n, dtype=torch.bool, device=x.device).expand(math.prod(lead), n)
    else:
        check_ndim("mask", mask, len(lead) + 1, "(..., N)")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        check_size("mask", mask, -1, n, "N")
        if mask.shape[:-1] != lead:
            raise ValueError(f"mask must have the leading dimensions {tuple(lead)} of adj, got {tuple(mask.shape)}")
        check_same_device("mask", mask, "adj", adj)
        x = x.masked_fill(~(mask[..., :, None] & mask[..., None, :]).unsqueeze(-3), 0)
        there = mask.reshape(-1, n)
    if program.plan.symmetric and not is_traced():
        _check_symmetric(x, patterns)
    x = x.reshape(math.prod(lead), *x.shape[-3:])

    with torch.autocast(x.device.type, enabled=False):
        if exact:
            values = _run_exact(program, x, there)
            values = [v if dtype is None else v.to(dtype) for v in values]
        else:
            result = x.dtype if dtype is None else dtype
            half = result.is_floating_point and result.itemsize <= 2
            values = [v.to(result) for v in _run(program, x.to(torch.float32 if half else result), there)]
    if not lead:
        values = [v.squeeze(0) for v in values]
    elif len(lead) > 1:
        values = [v.reshape((*lead, *v.shape[1:])) for v in values]
    return values[0] if isinstance(pattern, Pattern) else values


# ---------------------------------------------------------------- counts


def _adjacency(graph: Any) -> torch.Tensor:
    """The adjacency of a tensor, a networkx graph or PyG Data: 0 and 1, unless it came as a tensor."""
    if isinstance(graph, torch.Tensor):
        return graph
    if hasattr(graph, "edge_index") and hasattr(graph, "num_nodes"):
        edges, n = graph.edge_index.cpu(), int(graph.num_nodes)
        adj = torch.zeros(n, n, dtype=torch.int64)
        adj.index_put_((edges[0], edges[1]), torch.ones(edges.shape[1], dtype=torch.int64), accumulate=True)
        if adj.numel() and int(adj.max()) > 1:
            i, j = (adj > 1).nonzero()[0].tolist()
            raise ValueError(f"graph must have no edge twice in edge_index, got ({i}, {j}) {int(adj[i, j])} times")
        return adj
    if hasattr(graph, "edges") and hasattr(graph, "is_directed") and hasattr(graph, "nodes"):
        index = {v: i for i, v in enumerate(graph.nodes)}
        adj = torch.zeros(len(index), len(index), dtype=torch.int64)
        for u, v in graph.edges():
            adj[index[u], index[v]] += 1
            if u != v and not graph.is_directed():
                adj[index[v], index[u]] += 1
        return adj
    raise TypeError(
        f"graph must be an adjacency tensor, a networkx graph or torch_geometric Data, got {type(graph).__name__}"
    )


def _counted(values: Any) -> Any:
    """A scalar count as a Python number."""
    return values.item() if values.ndim == 0 else values


def hom_count(pattern: Pattern, graph: torch.Tensor | networkx.Graph | Any) -> Any:
    """The number of homomorphisms of a pattern into one graph: maps of nodes that take arcs to edges.

    Args:
        pattern: with outputs, the homomorphisms are counted for each choice of what the outputs go to.
        graph: an adjacency tensor (N, N), dense or sparse, whose entries multiply where they are not 0 and 1 (its
            dtype decides what is exact, as in :func:`evaluate`); or a networkx graph (edge weights are not looked at,
            parallel edges count), or torch_geometric Data (``edge_index`` alone is looked at).

    Returns:
        An int (for a floating-point tensor a float) without outputs, a tensor (N,) or (N, N) with them.

    Raises:
        ValueError: ``edge_index`` has an edge twice, or the graph is directed and the pattern is not.
        TypeError: ``graph`` is something else.
        OverflowError: the count, or one on the way to it, can pass 2^63.

    Example::

        >>> import torch
        >>> from torchlayers.polynomial import Pattern, hom_count, inj_count
        >>> square = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]])
        >>> hom_count(Pattern.cycle(4), square), inj_count(Pattern.cycle(4), square)
        (32, 8)
    """
    return _counted(evaluate(pattern, _adjacency(graph)))


def _partitions(n: int) -> Iterator[list[int]]:
    """The set partitions of range(n), as the block of each element, blocks numbered by their first element."""
    if n == 0:
        yield []
        return
    for blocks in _partitions(n - 1):
        for block in range(max(blocks, default=-1) + 2):
            yield [*blocks, block]


@functools.lru_cache(maxsize=256)
def _quotients(pattern: Pattern, loops: bool, parallel: bool) -> tuple[tuple[Pattern, int], ...]:
    """The patterns whose homomorphism sums, with these factors, add up to the sum over injective maps.

    Möbius inversion over the partitions of the nodes: Π over blocks of (−1)^(size − 1) (size − 1)!. Without ``loops``
    the graph has none, and neither have the quotients; without ``parallel`` its entries are 0 and 1, and parallel arcs
    are one.
    """
    total: Counter[Pattern] = Counter()
    for blocks in _partitions(pattern.num_nodes):
        arcs = [(blocks[a[0]], blocks[a[1]], *a[2:]) for a in pattern.edges]
        if not loops and any(a[0] == a[1] for a in arcs):
            continue
        if not parallel:
            arcs = list({a if pattern.directed else (min(a[:2]), max(a[:2]), *a[2:]) for a in arcs})
        sizes = Counter(blocks).values()
        outputs = [blocks[v] for v in pattern.outputs]
        quotient = Pattern(arcs, outputs, pattern.directed, num_nodes=len(sizes))
        total[quotient] += math.prod((-1) ** (size - 1) * math.factorial(size - 1) for size in sizes)
    return tuple((quotient, factor) for quotient, factor in sorted(total.items()) if factor)


def inj_count(pattern: Pattern, graph: torch.Tensor | networkx.Graph | Any) -> Any:
    """The number of injective homomorphisms of a pattern into one graph: its copies, times its automorphisms.

    With weights it is the sum over injective maps of the product over arcs, the orbit basis. It is computed from
    homomorphism sums of the pattern's quotients: ``inj(H) = Σ over partitions θ of μ(θ) hom(H / θ)``.

    Arguments, results and errors are those of :func:`hom_count`. Exact counts are added up without overflow; a sparse
    tensor must be able to give every quotient's sum.

    Source: Lovász, "Large networks and graph limits", section 5.2.3.
    """
    adj = _adjacency(graph)
    if adj.layout is torch.strided:
        own = any(a[0] == a[1] for a in pattern.edges)
        loops = own or adj.ndim < 2 or bool((adj.diagonal(dim1=-2, dim2=-1) != 0).any())
        parallel = bool(((adj != 0) & (adj != 1)).any())
    else:
        loops = parallel = True
    quotients = _quotients(pattern, loops, parallel)
    values = evaluate([q for q, _ in quotients], adj)
    if values[0].dtype.is_floating_point or values[0].dtype.is_complex:
        return _counted(sum(factor * v for (_, factor), v in zip(quotients, values, strict=True)))
    if pattern.order == 0 and values[0].ndim == 0:
        return sum(factor * int(v) for (_, factor), v in zip(quotients, values, strict=True))
    if sum(abs(factor) * _largest(v) for (_, factor), v in zip(quotients, values, strict=True)) >= 2**63:
        raise OverflowError(f"graph must have counts whose alternating sum stays below 2^63 for {pattern!r}, got more")
    return sum(factor * v for (_, factor), v in zip(quotients, values, strict=True))
