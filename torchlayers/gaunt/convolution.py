"""The edge convolution: signals of neighbours times zonal filters along the edges, summed over the edges of a node.

    Z_t = Σ_{e: s → t} X_s F_e        F_e = Σ_l h_{e,l} Σ_m Y_lm(r̂_e) Y_lm        (or the bracket {X_s, F_e})

A quadrature of Γ points makes both forms sums of products, z = Σ_γ p_γ (a_γ·x)(b_γ·f), f_lm = h_l Y_lm(r̂), with three
tables a, b, p: harmonics for the product, tangential derivatives for the bracket. Nothing is rotated, so no edge
direction is special. Signals go to the grid once a node, edges multiply and add there, and each node comes back once.

The map is linear in x, in the harmonics y of the edges and in h: every derivative of any order is the map itself with
other arguments, summed over the edges of a target or of a source (:func:`gather_sum`), or its adjoint on the edges
(:func:`filter_gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._attention import no_autocast
from .._backend import import_kernels, is_traced, use_triton
from .._checks import check_dtype, check_int, check_ndim, check_same_device, check_size
from .._tables import register_table, table
from .arguments import common_dtype, kept_degree
from .sphere import grid_size, spherical_harmonics

__all__ = ["EdgeOrder", "convolve", "edge_order", "gaunt_convolution"]

# Imported here, not when it is first used: torch.compile cannot trace an import.
_kernels = import_kernels("sphere_convolution")

# --------------------------------------------------------------------------------------------------- tables


def _size(lmax: int) -> int:
    return (lmax + 1) ** 2


def _mirrored(lmax: int) -> Tensor:
    """(-1)^l for each component: what a signal at -r is made of."""
    return torch.cat([torch.full((2 * l + 1,), (-1.0) ** l, dtype=torch.float64) for l in range(lmax + 1)])  # noqa: E741


# Rows at least, of zeros where the quadrature has fewer points: torch multiplies stacks of smaller matrices one number
# at a time, which takes six times as long.
_LEAST = 8


def _rows(degree: int, antisymmetric: int) -> int:
    return max(_LEAST, 2 * grid_size(degree) * (2 if antisymmetric else 1))


def _filled(rows: Tensor) -> Tensor:
    return pad(rows, (0, 0, 0, max(0, _LEAST - rows.shape[0])))


@register_table(
    "gaunt_convolution_signal",
    shape=lambda lmax, degree, antisymmetric: (_rows(degree, antisymmetric), _size(lmax)),
)
def _signal_table(lmax: int, degree: int, antisymmetric: int) -> Tensor:
    """Rows a_γ: harmonics at ± the half sphere's points; for the bracket D₁ there, then D₂."""
    sign = _mirrored(lmax)
    if not antisymmetric:
        half = table("gaunt_harmonics", lmax, degree)
        return _filled(torch.cat((half, half * sign)))
    # The derivative along a tangent vector that is the same at r and -r: L Y_l has the parity of Y_l.
    first, second = table("gaunt_tangent", lmax, degree)
    return _filled(torch.cat((first, first * sign, second, second * sign)))


@register_table(
    "gaunt_convolution_filter",
    shape=lambda lmax, degree, antisymmetric: (_rows(degree, antisymmetric), _size(lmax)),
)
def _filter_table(lmax: int, degree: int, antisymmetric: int) -> Tensor:
    """Rows b_γ: as for the signal; for the bracket D₂, then -D₁."""
    rows = _signal_table(lmax, degree, antisymmetric)
    if not antisymmetric:
        return rows
    points = 2 * grid_size(degree)
    return _filled(torch.cat((rows[points : 2 * points], -rows[:points])))


@register_table(
    "gaunt_convolution_project",
    shape=lambda lmax, degree, antisymmetric: (_rows(degree, antisymmetric), _size(lmax)),
)
def _project_table(lmax: int, degree: int, antisymmetric: int) -> Tensor:
    """Rows p_γ: weights times harmonics; for the bracket twice, and with the sign of r at the mirrored points."""
    half = table("gaunt_harmonics", lmax, degree) * (table("gaunt_weights", degree)[:, None] / 2)
    mirrored = half * _mirrored(lmax)
    if not antisymmetric:
        return _filled(torch.cat((half, mirrored)))
    # {A, B} = r·(LA × LB): the frame (e₁, e₂) is left-handed about -r.
    return _filled(torch.cat((half, -mirrored)).repeat(2, 1))


@register_table(
    "gaunt_convolution_points",
    shape=lambda degree, antisymmetric: (3, _rows(degree, 1) // 2, 3) if antisymmetric else (1, _rows(degree, 0), 3),
)
def _points_table(degree: int, antisymmetric: int) -> Tensor:
    """The points ±r_γ of the rows; for the bracket, whose rows have them twice, also e₁ and e₂ with the sign of ±r."""
    half = table("gaunt_points", degree)[None]
    if not antisymmetric:
        return _filled(torch.cat((half, -half), dim=1)[0])[None]
    half = torch.cat((half, table("gaunt_frame", degree)))
    return torch.cat((half, -half), dim=1)


# ---------------------------------------------------------------------------------------------------- edges


class EdgeOrder(NamedTuple):
    """Edges sorted both ways: what :func:`edge_order` makes of ``edge_index``. All tensors are int32.

    Attributes:
        source, target: (E,), the rows of ``edge_index``.
        by_target: (E,), the numbers of the edges, sorted by target, stable; ``target_offsets`` (N + 1,): where those of
            each target begin.
        by_source, source_offsets: the same by source.
    """

    source: Tensor
    by_target: Tensor
    target_offsets: Tensor
    target: Tensor
    by_source: Tensor
    source_offsets: Tensor


def _check_edges(edge_index: Tensor, num_nodes: int) -> None:
    check_ndim("edge_index", edge_index, 2, "(2, edges)")
    check_size("edge_index", edge_index, 0, 2, "(source, target)")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index must be int64 or int32, got {edge_index.dtype}")
    if is_traced():
        return
    if edge_index.device.type == "cpu" and edge_index.shape[1]:
        low, high = (int(v) for v in edge_index.aminmax())
        if low < 0 or high >= num_nodes:
            raise ValueError(f"edge_index must have entries from 0 to {num_nodes - 1}, got {low} to {high}")
    elif edge_index.is_cuda:
        torch._assert_async(((edge_index >= 0) & (edge_index < num_nodes)).all())


def _sorted_by(node: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    ordered, order = torch.sort(node, stable=True)
    first = torch.arange(num_nodes + 1, dtype=torch.int32, device=node.device)
    return order.to(torch.int32), torch.searchsorted(ordered, first, out_int32=True)


def _sorted_both_ways(edge_index: Tensor, num_nodes: int) -> EdgeOrder:
    source, target = edge_index.to(torch.int32).unbind()
    return EdgeOrder(source, *_sorted_by(target, num_nodes), target, *_sorted_by(source, num_nodes))


def edge_order(edge_index: Tensor, num_nodes: int) -> EdgeOrder:
    """Sort edges by target and by source, for :func:`gaunt_convolution`; without waiting for the device.

    The kernels need that order, and ``gaunt_convolution`` makes it at each call. Where several calls share their edges,
    as the layers of a model do, make it once and pass it as ``edge_index``.

    Args:
        edge_index: (2, E), int64 or int32, rows (source, target), in any order, entries from 0 to ``num_nodes`` - 1.
        num_nodes: N.

    Returns:
        What ``edge_index`` may be in :func:`gaunt_convolution` and :class:`GauntConv`: the edges and the two orders.

    Raises:
        TypeError, ValueError: shape or dtype that don't fit, and on a CPU entries out of range. On a GPU those end in
            a device-side assertion, and in a compiled graph they are not looked at.
    """
    check_int("num_nodes", num_nodes, minimum=0)
    _check_edges(edge_index, num_nodes)
    return _sorted_both_ways(edge_index, num_nodes)


def _ordered(edge_index: Tensor | EdgeOrder | None, x: Tensor) -> EdgeOrder:
    if isinstance(edge_index, EdgeOrder):
        return edge_index
    if edge_index is not None:
        return _sorted_both_ways(edge_index, x.shape[0])
    # Each row of x is the source of an edge to a target of its own.
    each = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device)
    own = each[:-1]
    return EdgeOrder(own, own, each, own, own, each)


def directions(edge_vec: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors r̂ (E, 3) of ``edge_vec``, zero with a derivative of zero where that is; and |r̂|² (E, 1), 1 or 0.

    Harmonics, as homogeneous polynomials, make of r̂ = 0 what e3nn makes of a zero vector: degree 0 alone stays.
    """
    # A direction has no scale: with the largest entry divided out, as a constant, nothing under- or overflows.
    scale = edge_vec.detach().abs().amax(-1, keepdim=True)
    zero = scale == 0
    scaled = edge_vec / scale.masked_fill(zero, math.inf)
    unit = scaled * (scaled.square().sum(-1, keepdim=True) + zero).rsqrt()
    return unit, (~zero).to(edge_vec.dtype)


def zonal_filters(lmax: int, degree: int, antisymmetric: bool, edge_vec: Tensor) -> Tensor:
    """q (E, lmax + 1, Γ): b_γ·f = Σ_l h_l q_lγ, by the addition theorem: (2l + 1) / 4π P_l(r̂·r_γ).

    For the bracket D₂ and -D₁ of those, (2l + 1) / 4π P_l'(r̂·r_γ) times r̂·e₁ and r̂·e₂.
    """
    unit, squared = directions(edge_vec)
    points = table("gaunt_convolution_points", degree, int(antisymmetric), dtype=unit.dtype, device=unit.device)
    cosine, *along = (unit @ vectors.T for vectors in points)
    # Legendre's recurrence, of polynomials that have the factor in them.
    zonal = [torch.full_like(cosine, 1 / (4 * math.pi)), cosine * (3 / (4 * math.pi))]
    for l in range(1, lmax):  # noqa: E741
        lower = zonal[-2] * (squared * (-l * (2 * l + 3) / ((l + 1) * (2 * l - 1))))
        zonal.append(torch.addcmul(lower, cosine, zonal[-1], value=(2 * l + 3) / (l + 1)))
    if not antisymmetric:
        return torch.stack(zonal[: lmax + 1], dim=1)
    slope = [torch.zeros_like(cosine), torch.full_like(cosine, 3 / (4 * math.pi))]
    for l in range(1, lmax):  # noqa: E741
        slope.append(torch.add(slope[-2] * ((2 * l + 3) / (2 * l - 1)), zonal[l], alpha=2 * l + 3))
    slopes = torch.stack(slope[: lmax + 1], dim=1)
    return torch.cat([slopes * component[:, None] for component in along], dim=-1)


# ---------------------------------------------------------------------------------------------- plain torch

# Numbers on the grid of a chunk of edges: what stays in a core's cache, while torch's time per call hardly counts. A
# GPU without kernels (float64) gets 64 times as much at once.
CHUNK = 2**18


class _Chunks:
    """Slices of the edges, and two grids to work on, the same memory for every slice."""

    def __init__(self, q: Tensor, x: Tensor):
        self.num_edges, size = q.shape[0], x.shape[1] * x.shape[2]
        most = CHUNK if x.device.type == "cpu" else 64 * CHUNK
        self.step = min(self.num_edges, max(1, most // max(1, size)))
        self.scratch = x.new_empty(2, self.step, *x.shape[1:])

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        start = 0
        while start < self.num_edges:
            chunk = slice(start, min(start + self.step, self.num_edges))
            yield chunk, *self.scratch[:, : chunk.stop - start]
            start = chunk.stop


def _gathered(grid: Tensor, index: Tensor | None, chunk: slice, out: Tensor) -> Tensor:
    return grid[chunk] if index is None else torch.index_select(grid, 0, index[chunk], out=out)


def composed(x: Tensor, source: Tensor | None, target: Tensor | None, num_targets: int, q: Tensor, h: Tensor) -> Tensor:
    """:class:`GatherSum` in torch's operations, all edges at once: a compiler decides what to fuse and to keep."""
    messages = (q.mT @ h) * (x if source is None else x.index_select(0, source))
    if target is None:
        return messages
    return messages.new_zeros(num_targets, *x.shape[1:]).index_add(0, target, messages)


class GatherSum(torch.autograd.Function):
    """out_t = Σ_{e: s → t} x_s Σ_l q_{e,l} h_{e,l}, on the grid; several pairs (q, h) add up.

    x (N, Γ, C), q (E, L + 1, Γ), h (E, L + 1, C), source and target (E,), or None where each edge has its own.
    """

    @staticmethod
    def forward(x, source, target, num_targets, *pairs):
        out = x.new_zeros(num_targets, *x.shape[1:])
        for chunk, filters, signals in _Chunks(pairs[0], x):
            torch.bmm(pairs[0][chunk].mT, pairs[1][chunk], out=filters)
            for q, h in zip(pairs[2::2], pairs[3::2], strict=True):
                filters.baddbmm_(q[chunk].mT, h[chunk])
            filters.mul_(_gathered(x, source, chunk, signals))
            if target is None:
                out[chunk] = filters
            else:
                out.index_add_(0, target[chunk], filters)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.source, ctx.target, _, *pairs = inputs
        ctx.save_for_backward(x, *pairs)

    @staticmethod
    def backward(ctx, grad):
        x, *pairs = ctx.saved_tensors
        grad_x, grads = None, [None] * len(pairs)
        if ctx.needs_input_grad[0]:
            grad_x = GatherSum.apply(grad, ctx.target, ctx.source, x.shape[0], *pairs)
        for i in range(0, len(pairs), 2):
            if any(ctx.needs_input_grad[4 + i : 6 + i]):
                grads[i : i + 2] = FilterGradients.apply(x, grad, ctx.source, ctx.target, *pairs[i : i + 2])
        return grad_x, None, None, None, *grads


class FilterGradients(torch.autograd.Function):
    """The gradients of ``grad``·:class:`GatherSum` by q and by h: Σ_c h x_s grad_t and Σ_γ q x_s grad_t."""

    @staticmethod
    def forward(x, grad, source, target, q, h):
        grad_q, grad_h = torch.empty_like(q), torch.empty_like(h)
        for chunk, first, second in _Chunks(q, x):
            signals = _gathered(x, source, chunk, first)
            product = torch.mul(signals, _gathered(grad, target, chunk, second), out=first)
            torch.bmm(h[chunk], product.mT, out=grad_q[chunk])
            torch.bmm(q[chunk], product, out=grad_h[chunk])
        return grad_q, grad_h

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, grad, ctx.source, ctx.target, q, h = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, grad, q, h)

    @staticmethod
    def backward(ctx, along_q, along_h):
        x, grad, q, h = ctx.saved_tensors
        source, target = ctx.source, ctx.target
        pairs = () if along_q is None else (along_q, h)
        pairs += () if along_h is None else (q, along_h)
        grad_x = grad_grad = grad_q = grad_h = None
        if pairs and ctx.needs_input_grad[0]:
            grad_x = GatherSum.apply(grad, target, source, x.shape[0], *pairs)
        if pairs and ctx.needs_input_grad[1]:
            grad_grad = GatherSum.apply(x, source, target, grad.shape[0], *pairs)
        if pairs and any(ctx.needs_input_grad[4:]):
            # The gradient by q comes of along_h alone, that by h of along_q alone.
            along_q = torch.zeros_like(q) if along_q is None else along_q
            along_h = torch.zeros_like(h) if along_h is None else along_h
            grad_q, grad_h = FilterGradients.apply(x, grad, source, target, along_q, along_h)
        return grad_x, grad_grad, None, None, grad_q, grad_h


# ---------------------------------------------------------------------------------------------- entry points


def convolve(
    x: Tensor,
    edge_vec: Tensor,
    filter_coeff: Tensor,
    edge_index: Tensor | EdgeOrder | None,
    *,
    lmax: int,
    lmax_filter: int,
    lmax_out: int,
    antisymmetric: bool = False,
    backend: str | None = None,
) -> Tensor:
    """:func:`gaunt_convolution` of arguments that have been checked, in float32 or float64."""
    degree, which = lmax + lmax_filter + lmax_out, int(antisymmetric)

    def rows(name: str, size: int) -> Tensor:
        return table(f"gaunt_convolution_{name}", size, degree, which, dtype=x.dtype, device=x.device)

    signal, project = rows("signal", lmax), rows("project", lmax_out)
    unsupported = None if _kernels is None else _kernels.unsupported((lmax, lmax_filter, lmax_out), x.dtype)
    if use_triton("sphere_convolution", x, backend, unsupported):
        assert _kernels is not None
        harmonics = spherical_harmonics(lmax_filter, directions(edge_vec)[0])
        edges = _ordered(edge_index, x)
        return _kernels.sphere_convolution(
            x, harmonics, filter_coeff, (signal, rows("filter", lmax_filter), project), edges
        )
    source: Tensor | None = None
    target: Tensor | None = None
    if isinstance(edge_index, EdgeOrder):
        source, target = edge_index.source, edge_index.target
    elif edge_index is not None:
        source, target = edge_index.unbind()
    q, h = zonal_filters(lmax_filter, degree, antisymmetric, edge_vec), filter_coeff.mT.contiguous()
    gather_sum = composed if torch.compiler.is_compiling() else GatherSum.apply
    return gather_sum(signal @ x.mT, source, target, x.shape[0], q, h).mT @ project


def gaunt_convolution(
    x: Tensor,
    edge_vec: Tensor,
    filter_coeff: Tensor,
    edge_index: Tensor | EdgeOrder | None = None,
    *,
    lmax: int,
    lmax_filter: int,
    lmax_out: int | None = None,
    antisymmetric: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Signals of source nodes times zonal filters along the edges, summed over the edges into each target:

        Z_t(r) = Σ_{e: s → t} X_s(r) F_e(r)        F_e(r) = Σ_l h_{e,l} Σ_m Y_lm(r̂_e) Y_lm(r)

    or, ``antisymmetric``, of the Poisson brackets {X_s, F_e} = r·(∇X_s × ∇F_e), which reach the Clebsch–Gordan paths
    of odd l1 + l2 + l3. Coefficients refer to orthonormal real spherical harmonics in e3nn's convention: polar axis +y,
    component l² + l + m. F_e is symmetric about the edge, and so is found on a grid by Legendre polynomials in r̂_e·r:
    nothing is rotated, and no direction is singular (Luo et al., arXiv 2401.10216, the equivariant convolution; the
    grid: 2506.13523; the bracket: 2605.15073).

    Differentiable any number of times in ``x``, ``edge_vec`` and ``filter_coeff``. The kernels add the edges of a node
    in one order, the same at each run; so does plain torch on a CPU. Nothing of the size of edges × channels × grid is
    kept, forward or backward.

    Args:
        x: (N, C, (lmax + 1)²), or, without ``edge_index``, (E, C, (lmax + 1)²), a row for each edge.
        edge_vec: (E, 3), from source to target or the other way, of any length: only the direction counts. A vector of
            zero has no direction: of its filter the constant alone remains, as in e3nn, and its gradient is zero.
        filter_coeff: (E, C, lmax_filter + 1), h: one coefficient for each degree, edge and channel.
        edge_index: (2, E), int64 or int32, rows (source, target), in any order, or what :func:`edge_order` made of it;
            None: out is per edge.
        lmax, lmax_filter: the highest degrees of ``x`` and of the filters.
        lmax_out: the highest degree kept, at most and by default ``lmax + lmax_filter``.
        antisymmetric: the brackets alone, instead of the products.
        backend: see :func:`torchlayers.backend`. The kernels take float32 and degrees up to 7.

    Returns:
        (N, C, (lmax_out + 1)²), zero for nodes without an incoming edge; without ``edge_index`` (E, C, …). In the dtype
        of ``x``; 16-bit tensors are computed in float32, and under autocast the result is float32.

    Raises:
        TypeError: complex or integer tensors, or dtypes that differ; ``edge_index`` not of integers.
        ValueError: shapes or devices that do not fit, ``lmax_out`` above ``lmax + lmax_filter``, and entries of
            ``edge_index`` out of range (see :func:`edge_order`).

    Example:

        >>> x = torch.randn(4, 8, 9)                              # 4 nodes, 8 channels, degrees 0, 1, 2
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 1]])
        >>> edge_vec, h = torch.randn(3, 3), torch.randn(3, 8, 3)
        >>> gaunt_convolution(x, edge_vec, h, edge_index, lmax=2, lmax_filter=2, lmax_out=1).shape
        torch.Size([4, 8, 4])
    """
    check_int("lmax", lmax, minimum=0)
    check_int("lmax_filter", lmax_filter, minimum=0)
    lmax_out = kept_degree(lmax_out, lmax + lmax_filter, "lmax + lmax_filter")
    check_ndim("x", x, 3, "(nodes, channels, components)")
    check_ndim("edge_vec", edge_vec, 2, "(edges, 3)")
    check_ndim("filter_coeff", filter_coeff, 3, "(edges, channels, lmax_filter + 1)")
    tensors = {"x": x, "edge_vec": edge_vec, "filter_coeff": filter_coeff}
    for name, tensor in tensors.items():
        check_dtype(name, tensor, kind="real")
        check_same_device(name, tensor, "x", x)
    check_size("x", x, 2, (lmax + 1) ** 2, "(lmax + 1)²")
    check_size("edge_vec", edge_vec, 1, 3, "x, y and z")
    check_size("filter_coeff", filter_coeff, 0, edge_vec.shape[0], "the edges of edge_vec")
    check_size("filter_coeff", filter_coeff, 1, x.shape[1], "the channels of x")
    check_size("filter_coeff", filter_coeff, 2, lmax_filter + 1, "lmax_filter + 1")
    if isinstance(edge_index, EdgeOrder):
        check_size("edge_index", edge_index.source, 0, edge_vec.shape[0], "the edges of edge_vec")
        check_size("edge_index", edge_index.target_offsets, 0, x.shape[0] + 1, "the nodes of x, and one more,")
        check_same_device("edge_index", edge_index.source, "x", x)
    elif edge_index is not None:
        _check_edges(edge_index, x.shape[0])
        check_size("edge_index", edge_index, 1, edge_vec.shape[0], "the edges of edge_vec")
        check_same_device("edge_index", edge_index, "x", x)
    else:
        check_size("x", x, 0, edge_vec.shape[0], "the edges of edge_vec")

    found, dtype = common_dtype(**tensors)
    x, edge_vec, filter_coeff = (t.to(torch.promote_types(dtype, torch.float32)) for t in found)
    sizes = {"lmax": lmax, "lmax_filter": lmax_filter, "lmax_out": lmax_out}
    with no_autocast(x):
        z = convolve(x, edge_vec, filter_coeff, edge_index, **sizes, antisymmetric=bool(antisymmetric), backend=backend)
    return z.to(dtype)
