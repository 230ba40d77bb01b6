"""Edges as sorted lists, and the product of two matrices that live on edges, at the edges alone.

    out_uv = Σ_w a_uw b_wv        for the edges (u, v)

is A B masked to the edges. What it adds up are the triangles (u, w, v): with the nodes in an order in which each has
few later neighbours, a triangle is found once, from the first of its nodes, by looking up whether the two others are
joined. That takes about edges × degeneracy look-ups, and no memory beyond the edges and a chunk of candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._attention import no_autocast
from .._backend import import_kernels, is_traced, use_triton
from .._checks import check_int, check_ndim, check_same_device, check_size

__all__ = ["EdgeSupport", "edge_support", "masked_product"]

# Imported here, not when it is first used: torch.compile cannot trace an import.
_kernels = import_kernels("masked_product")

# Candidates at a time: what stays in a core's cache, while torch's time per call hardly counts.
CHUNK = 2**18
# Triangles are kept for the next product where they are no more than so many to an edge.
_KEPT = 4


class EdgeSupport(NamedTuple):
    """Edges, each with its reverse, sorted by source and then by target: what :func:`edge_support` makes.

    The edges and their reverses are the *entries*, S of them. All tensors are int32.

    Attributes:
        row, col: (S,), source and target of each entry.
        offsets: (N + 1,), where the entries of each source begin.
        reverse: (S,), for the entry (u, v) the number of (v, u).
        entry: (E,), the entry that each given edge is.
        loops: (N,), the entry (u, u) of each node, S where there is none; None where no node has one.
        triangles: (3, T), the entries (x, y), (x, z), (y, z) of each triangle of three nodes, once; None where there
            are more than four triangles to an entry: they are then found anew each time.
    """

    row: Tensor
    col: Tensor
    offsets: Tensor
    reverse: Tensor
    entry: Tensor
    loops: Tensor | None
    triangles: Tensor | None

    @property
    def num_nodes(self) -> int:
        return self.offsets.shape[0] - 1


# ------------------------------------------------------------------------------------------------ sorted lists


class Places:
    """Looks pairs of nodes up among the entries of a support, or any numbers in an ascending list of them."""

    def __init__(self, keys: Tensor):
        self.keys = keys
        # Bisection misses the cache at each step. A table of hashes tells nearly all absent numbers beforehand.
        self.bits = max(4, (8 * keys.shape[0]).bit_length())
        self.table = torch.zeros(1 << self.bits, dtype=torch.bool, device=keys.device)
        self.table[self._hashes(keys)] = True

    @classmethod
    def of(cls, support: EdgeSupport) -> Places:
        return cls(support.row.long() * support.num_nodes + support.col)

    def _hashes(self, numbers: Tensor) -> Tensor:
        # The golden ratio's odd multiple of 2^64, as a signed number; the upper bits of the product are the mixed ones.
        return (numbers * -7046029254386353131 >> (64 - self.bits)) & ((1 << self.bits) - 1)

    def find(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``wanted`` are in the list, as ascending indices, and where in the list these are."""
        which = self.table.index_select(0, self._hashes(wanted)).nonzero().flatten()
        wanted = wanted.index_select(0, which)
        place = torch.searchsorted(self.keys, wanted).clamp_(max=max(0, self.keys.shape[0] - 1))
        found = (self.keys.index_select(0, place) == wanted).nonzero().flatten()
        return which.index_select(0, found), place.index_select(0, found)


def pieces(counts: Tensor, limit: int) -> Iterator[slice]:
    """Consecutive slices whose ``counts`` add up to at most ``limit``, or which are one item long."""
    ends = counts.cumsum(0)
    start, done, size = 0, 0, counts.shape[0]
    while start < size:
        stop = size
        if int(ends[-1]) - done > limit:
            stop = max(start + 1, int(torch.searchsorted(ends, done + limit, right=True)))
        yield slice(start, stop)
        start, done = stop, int(ends[stop - 1])


def ranges(first: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each i the numbers first_i, first_i + 1, …, ``counts``_i of them, and beside each its i."""
    owner = torch.repeat_interleave(counts)
    begin = counts.cumsum(0).sub_(counts)
    within = torch.arange(owner.shape[0], device=owner.device)
    return within.add_((first - begin).index_select(0, owner)), owner


def add_at(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``out[index] += values`` along the first dimension, in place; indices may repeat."""
    if out.ndim == 1:
        return out.index_add_(0, index, values)
    # On a CPU, index_add_ goes row by row.
    return out.scatter_add_(0, index.long()[:, None].expand_as(values), values)


# --------------------------------------------------------------------------------------------------- triangles


def _ranks(row: Tensor, col: Tensor, num_nodes: int) -> Tensor:
    """(N,), an order of the nodes in which each has at most three times the degeneracy of later neighbours.

    In rounds: all nodes of at most 1.5 × the mean degree go, a third of them at least, lowest degree first. The mean
    degree of what remains is at most twice the degeneracy of the whole.
    """
    key = row.new_zeros(num_nodes, dtype=torch.int64)
    alive = torch.ones(num_nodes, dtype=torch.bool, device=row.device)
    level = 0
    while row.shape[0]:
        degree = torch.bincount(row, minlength=num_nodes)
        leaving = alive & (degree * (2 * alive.sum()) <= 3 * row.shape[0])
        key = torch.where(leaving, degree + level * num_nodes, key)
        alive &= ~leaving
        rest = alive.index_select(0, row) & alive.index_select(0, col)
        row, col, level = row[rest], col[rest], level + 1
    key = torch.where(alive, level * num_nodes, key)
    rank = torch.empty_like(key)
    rank[torch.sort(key, stable=True).indices] = torch.arange(num_nodes, device=key.device)
    return rank


def _find_triangles(row: Tensor, col: Tensor, num_nodes: int) -> Iterator[Tensor]:
    """Chunks (3, t) of :attr:`EdgeSupport.triangles`."""
    apart = row != col
    rank = _ranks(row[apart], col[apart], num_nodes)
    first, second = rank.index_select(0, row), rank.index_select(0, col)
    entry = (first < second).nonzero().flatten()
    keys, order = torch.sort(first.index_select(0, entry) * num_nodes + second.index_select(0, entry))
    entry = entry.index_select(0, order).to(torch.int32)
    first, second = keys // num_nodes, keys % num_nodes
    # The later entries of the same node: each pair of them is two sides of what may be a triangle.
    own = torch.arange(1, keys.shape[0] + 1, device=keys.device)
    ends = torch.bincount(first, minlength=num_nodes).cumsum(0)
    counts = ends.index_select(0, first) - own
    places = Places(keys)
    for piece in pieces(counts, CHUNK):
        j, i = ranges(own[piece], counts[piece])
        i += piece.start
        which, third = places.find(second.index_select(0, i) * num_nodes + second.index_select(0, j))
        sides = i.index_select(0, which), j.index_select(0, which), third
        yield torch.stack([entry.index_select(0, side) for side in sides])


def triangle_chunks(support: EdgeSupport) -> Iterator[Tensor]:
    """All triangles, in chunks (3, t) as :attr:`EdgeSupport.triangles` has them."""
    if support.triangles is None:
        yield from _find_triangles(support.row, support.col, support.num_nodes)
        return
    yield from support.triangles.split(CHUNK, dim=1)


def ordered_triangles(triangles: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries (u, v), (u, w), (w, v) of the six orders (u, v, w) of each triangle: three tensors (6 t,)."""
    xy, xz, yz = triangles
    yx, zx, zy = reverse.index_select(0, triangles.flatten()).view(3, -1)
    return torch.cat([xy, yx, xz, zx, yz, zy]), torch.cat([xz, yz, xy, zy, yx, zx]), torch.cat([zy, zx, yz, yx, xz, xy])


# ----------------------------------------------------------------------------------------------------- support


def check_edges(edge_index: object, num_nodes: int) -> None:
    check_ndim("edge_index", edge_index, 2, "(2, edges)")
    assert isinstance(edge_index, Tensor)
    check_size("edge_index", edge_index, 0, 2, "(source, target)")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index must be int64 or int32, got {edge_index.dtype}")
    if edge_index.shape[1] and not is_traced():
        low, high = (int(v) for v in edge_index.aminmax())
        if low < 0 or high >= num_nodes:
            raise ValueError(f"edge_index must have entries from 0 to {num_nodes - 1}, got {low} to {high}")


def _sorted_both_ways(source: Tensor, target: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
    """Source and target of the entries, their reverses, and the entry of each edge."""
    each = torch.arange(source.shape[0], device=source.device)
    key = source * num_nodes + target
    if bool((key[1:] > key[:-1]).all()):
        # Sorted edges, by target and then by source: where each has its reverse, that is their transpose.
        column, reverse = torch.sort(target, stable=True)
        if torch.equal(column, source) and torch.equal(source.index_select(0, reverse), target):
            return source, target, reverse, each
    keys, order = torch.sort(torch.cat([key, target * num_nodes + source]))
    new = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=new[1:])
    place = torch.empty_like(keys).index_copy_(0, order, new.cumsum(0) - 1)
    keys, divisor = keys[new], max(1, num_nodes)
    row, col = keys // divisor, keys % divisor
    return row, col, torch.sort(col, stable=True).indices, place[: source.shape[0]]


def build_support(edge_index: Tensor, num_nodes: int) -> EdgeSupport:
    """:func:`edge_support` of edges that have been checked; repeated ones share an entry."""
    source, target = edge_index.long().unbind()
    row, col, reverse, entry = _sorted_both_ways(source, target, num_nodes)
    size = row.shape[0]
    if size >= 2**31:
        raise ValueError(f"edge_index must have less than 2^31 edges, reverses included, got {size}")
    offsets = torch.zeros(num_nodes + 1, dtype=torch.int32, device=row.device)
    offsets[1:] = torch.bincount(row, minlength=num_nodes).cumsum(0)
    loop = (row == col).nonzero().flatten()
    loops: Tensor | None = None
    if loop.shape[0]:
        loops = torch.full_like(offsets[1:], size).index_copy_(0, row[loop], loop.to(torch.int32))
    row, col, reverse, entry = (t.to(torch.int32) for t in (row, col, reverse, entry))
    chunks, found = [row.new_empty(3, 0)], 0
    for chunk in _find_triangles(row, col, num_nodes):
        chunks.append(chunk)
        found += chunk.shape[1]
        if found > _KEPT * size:
            break
    triangles = torch.cat(chunks, dim=1) if found <= _KEPT * size else None
    return EdgeSupport(row, col, offsets, reverse, entry, loops, triangles)


def edge_support(edge_index: Tensor, num_nodes: int) -> EdgeSupport:
    """Sort edges and their reverses, and find the triangles, for :func:`masked_product`.

    ``masked_product`` does that at each call. Where several calls share their edges, make it once and pass it instead.

    Args:
        edge_index: (2, E), int64 or int32, rows (source, target), in any order, entries from 0 to ``num_nodes`` - 1;
            loops and one-way edges are allowed, an edge that is given twice is not.
        num_nodes: N.

    Raises:
        TypeError: ``edge_index`` is not of integers, ``num_nodes`` no int.
        ValueError: shapes that do not fit, entries out of range, repeated edges.
    """
    check_int("num_nodes", num_nodes, minimum=0)
    check_edges(edge_index, num_nodes)
    support = build_support(edge_index, num_nodes)
    if not is_traced():
        repeated = torch.bincount(support.entry, minlength=1) > 1
        if bool(repeated.any()):
            e = int(repeated.nonzero()[0])
            edge = int(support.row[e]), int(support.col[e])
            raise ValueError(f"edge_index must not have an edge twice, got {edge} {int((support.entry == e).sum())} ×")
    return support


# --------------------------------------------------------------------------------------------- the masked product


def _add_loops(out: Tensor, a: Tensor, b: Tensor, support: EdgeSupport) -> Tensor:
    """The terms of ``out`` in which two of the nodes u, v, w are the same."""
    loops, row, col = support.loops, support.row, support.col
    assert loops is not None
    has = loops < row.shape[0]
    at = loops.clamp(max=max(0, row.shape[0] - 1))
    shape = (-1, *(1,) * (a.ndim - 1))
    a_loop, b_loop = (t.index_select(0, at) * has.view(shape) for t in (a, b))
    apart = (row != col).view(shape)
    out = out + a_loop.index_select(0, row) * b * apart + a * b_loop.index_select(0, col)
    back = a * b.index_select(0, support.reverse) * apart
    around = add_at(out.new_zeros(support.num_nodes, *a.shape[1:]), row, back)
    return out + around.index_select(0, row) * ~apart


def composed(a: Tensor, b: Tensor, support: EdgeSupport) -> Tensor:
    """The masked product of values on the entries, from triangles found before: torch's operations alone."""
    assert support.triangles is not None
    uv, uw, wv = ordered_triangles(support.triangles, support.reverse)
    terms = a.index_select(0, uw) * b.index_select(0, wv)
    index = uv.long() if a.ndim == 1 else uv.long()[:, None].expand_as(terms)
    out = torch.zeros_like(a).scatter_add(0, index, terms)
    return out if support.loops is None else _add_loops(out, a, b, support)


def _turned(values: Tensor, support: EdgeSupport, transpose: bool) -> Tensor:
    return values.index_select(0, support.reverse) if transpose else values


class MaskedProduct(torch.autograd.Function):
    """out_uv = Σ_w a'_uw b'_wv over the entries, of which a' and b' are a and b or their transposes.

    Its derivatives are the same product of other arguments: with A' B' masked to the entries, that by A' is G B'ᵀ
    masked to them, that by B' is A'ᵀ G.
    """

    @staticmethod
    def forward(a, b, transpose_a, transpose_b, support):
        a, b = _turned(a, support, transpose_a), _turned(b, support, transpose_b)
        out = torch.zeros_like(a)
        for chunk in triangle_chunks(support):
            uv, uw, wv = ordered_triangles(chunk, support.reverse)
            add_at(out, uv, a.index_select(0, uw).mul_(b.index_select(0, wv)))
        return out if support.loops is None else _add_loops(out, a, b, support)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, ctx.transpose_a, ctx.transpose_b, ctx.support = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = MaskedProduct.apply(*gradient_a(grad, b, ctx.transpose_a, ctx.transpose_b), ctx.support)
        if ctx.needs_input_grad[1]:
            grad_b = MaskedProduct.apply(*gradient_b(grad, a, ctx.transpose_a, ctx.transpose_b), ctx.support)
        return grad_a, grad_b, None, None, None


def gradient_a(grad: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> tuple[Tensor, Tensor, bool, bool]:
    """The product that is the derivative by a: G B'ᵀ, or its transpose B' Gᵀ where a' is aᵀ."""
    return (b, grad, transpose_b, True) if transpose_a else (grad, b, False, not transpose_b)


def gradient_b(grad: Tensor, a: Tensor, transpose_a: bool, transpose_b: bool) -> tuple[Tensor, Tensor, bool, bool]:
    """The product that is the derivative by b: A'ᵀ G, or its transpose Gᵀ A' where b' is bᵀ."""
    return (grad, a, True, transpose_a) if transpose_b else (a, grad, not transpose_a, False)


def multiply(a: Tensor, b: Tensor, support: EdgeSupport, backend: str | None = None) -> Tensor:
    """The masked product of values (S,) or (S, C) on the entries, checked, of one dtype."""
    unsupported = None if _kernels is None else _kernels.unsupported(a.dtype)
    if use_triton("masked_product", a, backend, unsupported):
        assert _kernels is not None
        return _kernels.masked_product(a, b, support.row, support.col, support.offsets, support.reverse)
    if torch.compiler.is_compiling():
        if support.triangles is not None:
            return composed(a, b, support)
        if _kernels is not None:
            return _kernels.masked_product(a, b, support.row, support.col, support.offsets, support.reverse)
    return MaskedProduct.apply(a, b, False, False, support)


def masked_product(
    a: Tensor, b: Tensor, edges: Tensor | EdgeSupport, num_nodes: int | None = None, *, backend: str | None = None
) -> Tensor:
    """Multiply two matrices that have their entries on the edges of a graph, and keep the product on the edges alone:

        out_uv = Σ_w a_uw b_wv        for each edge (u, v), w over the nodes with edges (u, w) and (w, v)

    With ones for ``a`` and ``b`` and every edge given both ways, that is the number of triangles of each edge. Channels
    are products of their own. Neither A B nor the list of triangles is made where they are larger than the edges.

    Differentiable in ``a`` and ``b`` any number of times. The kernel sums in one order, the same at each run; so does
    plain torch on a CPU.

    Args:
        a, b: (E,) or (E, C), one number or C channels for each edge, in the order of the edges; real or int64.
        edges: (2, E), int64 or int32, rows (source, target), in any order, none twice, loops allowed; or what
            :func:`edge_support` made of it, which saves most of the time where edges are used again, and which
            ``torch.compile`` needs.
        num_nodes: N, with an ``edge_index``; by default its largest entry and one more.
        backend: see :func:`torchlayers.backend`.

    Returns:
        Like ``a``: 16-bit tensors are summed in float32, the others in their own dtype.

    Raises:
        TypeError: dtypes that differ, complex tensors, integers other than int64; ``edges`` not of integers.
        ValueError: shapes or devices that do not fit; an edge twice or out of range; ``num_nodes`` beside an
            ``EdgeSupport`` of another number.

    Example:
        >>> edge_index = torch.tensor([[0, 1, 1, 2, 0, 2], [1, 0, 2, 1, 2, 0]])
        >>> ones = torch.ones(6, dtype=torch.int64)
        >>> masked_product(ones, ones, edge_index)
        tensor([1, 1, 1, 1, 1, 1])
    """
    check_ndim("a", a, (1, 2), "(edges,) or (edges, channels)")
    check_ndim("b", b, a.ndim, "like a")
    for name, tensor in (("a", a), ("b", b)):
        if not tensor.dtype.is_floating_point and tensor.dtype != torch.int64:
            raise TypeError(f"{name} must have a real floating-point dtype or int64, got {tensor.dtype}")
    if b.dtype != a.dtype:
        raise TypeError(f"b must be {a.dtype}, the dtype of a, got {b.dtype}")
    if isinstance(edges, EdgeSupport):
        support = edges
        if num_nodes is not None and num_nodes != support.num_nodes:
            raise ValueError(f"num_nodes must be {support.num_nodes}, that of edges, got {num_nodes}")
    else:
        check_ndim("edges", edges, 2, "(2, edges)")
        if num_nodes is None:
            num_nodes = int(edges.max()) + 1 if edges.numel() else 0
        support = edge_support(edges, num_nodes)
    for name, tensor in (("a", a), ("b", b)):
        check_size(name, tensor, 0, support.entry.shape[0], "the number of edges")
        check_same_device(name, tensor, "edges", support.entry)
    if a.ndim == 2:
        check_size("b", b, 1, a.shape[1], "the channels of a")
    dtype = torch.promote_types(a.dtype, torch.float32) if a.dtype.is_floating_point else a.dtype
    with no_autocast(a):
        spread = [on_entries(t.to(dtype), support) for t in (a, b)]
        return multiply(spread[0], spread[1], support, backend).index_select(0, support.entry).to(a.dtype)


def on_entries(values: Tensor, support: EdgeSupport) -> Tensor:
    """Values of the given edges on the entries, zero on reverses that were not given."""
    out = values.new_zeros(support.row.shape[0], *values.shape[1:])
    return out.index_copy(0, support.entry.long(), values)
