"""The edge convolution of signals on the sphere: gather, multiply by a filter, and sum over the edges of a node.

    z[t] = Σ_{e: s → t} P(x[s], f[e])        f[e, c, j] = h[e, c, l(j)] y[e, j]        l(j) = ⌊√j⌋

where P is any bilinear map that is a sum of products, P(x, f)_k = Σ_γ p[γ, k] (a[γ]·x) (b[γ]·f), by the tables that
the caller passes: for signals in spherical harmonics, values at the points of a quadrature (the pointwise product) or
tangential derivatives there (the Poisson bracket). y holds the harmonics of an edge's direction, h its coefficients.

The map is linear in x, in y and in h, and so two operations close under differentiation:

``sphere_convolution``: the sum above over the edges of each target. The gradient by x is the same operation with a and
p exchanged and over the edges of each source; a second pair (y, h), added to the first, makes it the directional
derivative of f that a second differentiation needs.

``sphere_convolution_filter``: the gradients by y and h, edge by edge.

A program sums, in one order, the edges of one node for a block of channels: edges come sorted by node as offsets into a
list, no atomics. x, f and z are in harmonics wherever they touch memory; the grid is made of them by matrix products
with the tables, tile by tile, and lives in registers for as long as the node's edges take.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from . import _lib
from ._lib import (
    INTERPRET,
    KernelConfig,
    Target,
    append_tile,
    bucket,
    cdiv,
    custom_op,
    dot_float32,
    dot_precision,
    register_config,
    register_reference,
    zero_tiles,
)

__all__ = ["sphere_convolution", "sphere_convolution_filter"]

# Shapes in comments: a program's channels (c), components of a signal (i), of a filter (j), of a result (k), points of
# a tile (γ).


@triton.jit
def _degrees(j, DEGREE: tl.constexpr):
    """The degree l(j) of components j, DEGREE beyond the last."""
    degree = tl.zeros_like(j)
    for l in tl.static_range(1, DEGREE + 1):  # noqa: E741
        degree += (j >= l * l).to(tl.int32)
    return degree


@triton.jit
def _load_table(
    table, first, SIZE: tl.constexpr, POINTS: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr
):
    """Tiles [component, γ] of a table (POINTS, SIZE), transposed, from the point ``first`` on; zero beyond."""
    i = tl.arange(0, WIDE)
    tiles = ()
    for t in tl.static_range(TILES):
        g = first + t * WIDTH + tl.arange(0, WIDTH)
        mask = (i < SIZE)[:, None] & (g < POINTS)[None, :]
        tiles = append_tile(tiles, tl.load(table + g[None, :] * SIZE + i[:, None], mask=mask, other=0.0))
    return tiles


@triton.jit
def _load_signal(x, node, c, inside, stride_n, stride_c, stride_i, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """[c, i] of one node's signals (node, c, i)."""
    i = tl.arange(0, WIDE)
    pointers = x + node.to(tl.int64) * stride_n + (c.to(tl.int64) * stride_c)[:, None] + (i * stride_i)[None, :]
    return tl.load(pointers, mask=inside[:, None] & (i < SIZE)[None, :], other=0.0)


@triton.jit
def _load_coefficients(h, edge, c, inside, C, DEGREE: tl.constexpr, WIDE: tl.constexpr):
    """[c, j]: the coefficient of each component's degree."""
    j = tl.arange(0, WIDE)
    pointers = h + (edge.to(tl.int64) * C + c)[:, None] * (DEGREE + 1) + _degrees(j, DEGREE)[None, :]
    return tl.load(pointers, mask=inside[:, None] & (j < (DEGREE + 1) * (DEGREE + 1))[None, :], other=0.0)


@triton.jit
def _load_harmonics(y, edge, DEGREE: tl.constexpr, WIDE: tl.constexpr):
    j = tl.arange(0, WIDE)
    SIZE: tl.constexpr = (DEGREE + 1) * (DEGREE + 1)
    return tl.load(y + edge.to(tl.int64) * SIZE + j, mask=j < SIZE, other=0.0)


@triton.jit
def sphere_convolution_kernel(
    x, y, h, y2, h2, a, b, p, node, order, offsets, out,
    C, stride_n, stride_c, stride_i,
    DEGREE: tl.constexpr, FILTER: tl.constexpr, RESULT: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, BC: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
    WIDE_X: tl.constexpr, WIDE_F: tl.constexpr, WIDE_Z: tl.constexpr,
):  # fmt: skip
    """out[t] over the edges offsets[t] .. offsets[t + 1] of the list ``order``. A program: one t, BC channels."""
    blocks = tl.cdiv(C, BC)
    # The channels of one node are neighbours: they read the same edges.
    pid = tl.program_id(0)
    t = pid // blocks
    c = pid % blocks * BC + tl.arange(0, BC)
    inside = c < C
    SIZE_X: tl.constexpr = (DEGREE + 1) * (DEGREE + 1)
    SIZE_F: tl.constexpr = (FILTER + 1) * (FILTER + 1)
    SIZE_Z: tl.constexpr = (RESULT + 1) * (RESULT + 1)
    begin, end = tl.load(offsets + t), tl.load(offsets + t + 1)
    z = tl.zeros((BC, WIDE_Z), tl.float32)
    for first in range(0, POINTS, WIDTH * TILES):
        to_x = _load_table(a, first, SIZE_X, POINTS, WIDE_X, WIDTH, TILES)
        to_f = _load_table(b, first, SIZE_F, POINTS, WIDE_F, WIDTH, TILES)
        acc = zero_tiles(BC, WIDTH, TILES)
        for i in range(begin, end):
            e = tl.load(order + i)
            signal = _load_signal(x, tl.load(node + e), c, inside, stride_n, stride_c, stride_i, SIZE_X, WIDE_X)
            zonal = _load_coefficients(h, e, c, inside, C, FILTER, WIDE_F)
            zonal *= _load_harmonics(y, e, FILTER, WIDE_F)[None, :]
            if y2 is not None:
                more = _load_coefficients(h2, e, c, inside, C, FILTER, WIDE_F)
                zonal += more * _load_harmonics(y2, e, FILTER, WIDE_F)[None, :]
            summed = ()
            for n in tl.static_range(TILES):
                zero = tl.zeros((BC, WIDTH), tl.float32)
                on_grid = dot_float32(signal, to_x[n], zero, PRECISION) * dot_float32(zonal, to_f[n], zero, PRECISION)
                summed = append_tile(summed, acc[n] + on_grid)
            acc = summed
        k = tl.arange(0, WIDE_Z)
        for n in tl.static_range(TILES):
            g = first + n * WIDTH + tl.arange(0, WIDTH)
            mask = (g < POINTS)[:, None] & (k < SIZE_Z)[None, :]
            back = tl.load(p + g[:, None] * SIZE_Z + k[None, :], mask=mask, other=0.0)
            z = dot_float32(acc[n], back, z, PRECISION)
    k = tl.arange(0, WIDE_Z)
    pointers = out + (t.to(tl.int64) * C + c)[:, None] * SIZE_Z + k[None, :]
    tl.store(pointers, z, mask=inside[:, None] & (k < SIZE_Z)[None, :])


@triton.jit
def _add_pulled_back(
    acc, signal, grads, to_x, b, first,
    SIZE_F: tl.constexpr, POINTS: tl.constexpr, PRECISION: tl.constexpr,
    BC: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, WIDE_F: tl.constexpr,
):  # fmt: skip
    """acc[c, j] + Σ_γ (signal on the grid)(grad on the grid) b[γ, j] over the tiles from ``first`` on."""
    j = tl.arange(0, WIDE_F)
    for n in tl.static_range(TILES):
        on_grid = dot_float32(signal, to_x[n], tl.zeros((BC, WIDTH), tl.float32), PRECISION) * grads[n]
        g = first + n * WIDTH + tl.arange(0, WIDTH)
        mask = (g < POINTS)[:, None] & (j < SIZE_F)[None, :]
        back = tl.load(b + g[:, None] * SIZE_F + j[None, :], mask=mask, other=0.0)
        acc = dot_float32(on_grid, back, acc, PRECISION)
    return acc


@triton.jit
def _on_grid(
    signal, table, PRECISION: tl.constexpr, BC: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    tiles = ()
    for n in tl.static_range(TILES):
        zero = tl.zeros((BC, WIDTH), tl.float32)
        tiles = append_tile(tiles, dot_float32(signal, table[n], zero, PRECISION))
    return tiles


@triton.jit(do_not_specialize=["E"])
def sphere_convolution_filter_kernel(
    x, grad, y, h, a, b, p, node, order, offsets, grad_y, grad_h,
    E, C, stride_xn, stride_xc, stride_xi, stride_gn, stride_gc, stride_gi,
    DEGREE: tl.constexpr, FILTER: tl.constexpr, RESULT: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, BC: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
    WIDE_X: tl.constexpr, WIDE_F: tl.constexpr, WIDE_Z: tl.constexpr,
):  # fmt: skip
    """grad_h[e] and grad_y[block of channels, e] of the edges into t. A program: one t, BC channels."""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    t = pid // blocks
    block = pid % blocks
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    SIZE_X: tl.constexpr = (DEGREE + 1) * (DEGREE + 1)
    SIZE_F: tl.constexpr = (FILTER + 1) * (FILTER + 1)
    SIZE_Z: tl.constexpr = (RESULT + 1) * (RESULT + 1)
    GROUP: tl.constexpr = WIDTH * TILES
    j = tl.arange(0, WIDE_F)
    begin, end = tl.load(offsets + t), tl.load(offsets + t + 1)
    pulled = _load_signal(grad, t, c, inside, stride_gn, stride_gc, stride_gi, SIZE_Z, WIDE_Z)
    if POINTS <= GROUP:  # the node's gradient goes to the grid once for all edges
        to_x = _load_table(a, 0, SIZE_X, POINTS, WIDE_X, WIDTH, TILES)
        table = _load_table(p, 0, SIZE_Z, POINTS, WIDE_Z, WIDTH, TILES)
        grads = _on_grid(pulled, table, PRECISION, BC, WIDTH, TILES)
    for i in range(begin, end):
        e = tl.load(order + i)
        signal = _load_signal(x, tl.load(node + e), c, inside, stride_xn, stride_xc, stride_xi, SIZE_X, WIDE_X)
        acc = tl.zeros((BC, WIDE_F), tl.float32)
        if POINTS <= GROUP:
            acc = _add_pulled_back(
                acc, signal, grads, to_x, b, 0, SIZE_F, POINTS, PRECISION, BC, WIDTH, TILES, WIDE_F
            )  # fmt: skip
        else:
            for first in range(0, POINTS, GROUP):
                to_x = _load_table(a, first, SIZE_X, POINTS, WIDE_X, WIDTH, TILES)
                table = _load_table(p, first, SIZE_Z, POINTS, WIDE_Z, WIDTH, TILES)
                grads = _on_grid(pulled, table, PRECISION, BC, WIDTH, TILES)
                acc = _add_pulled_back(
                    acc, signal, grads, to_x, b, first, SIZE_F, POINTS, PRECISION, BC, WIDTH, TILES, WIDE_F
                )  # fmt: skip
        coefficients = _load_coefficients(h, e, c, inside, C, FILTER, WIDE_F)
        pointers = grad_y + (block.to(tl.int64) * E + e) * SIZE_F + j
        tl.store(pointers, tl.sum(acc * coefficients, 0), mask=j < SIZE_F)
        acc *= _load_harmonics(y, e, FILTER, WIDE_F)[None, :]
        pointers = grad_h + (e.to(tl.int64) * C + c) * (FILTER + 1)
        for l in tl.static_range(FILTER + 1):  # noqa: E741
            own = (j >= l * l) & (j < (l + 1) * (l + 1))
            tl.store(pointers + l, tl.sum(tl.where(own[None, :], acc, 0.0), 1), mask=inside)


# Launching

MAX_DEGREE = 7  # the highest of a signal, a filter or a result: 64 components
_WIDTH = 16  # points of a tile

# By the tile for the components: the most tiles of points that a program holds at once, as operands of its products
# together with the signals, and (channels, warps, stages), the default first. Where there are more points, a program
# goes over its node's edges again, which it then finds in the cache.
_SHAPES: dict[int, tuple[int, tuple[tuple[int, int, int], ...]]] = {
    16: (6, ((64, 4, 2), (32, 2, 2), (32, 4, 2), (64, 4, 3), (32, 2, 3), (16, 1, 2))),
    32: (2, ((64, 8, 2), (32, 4, 2), (32, 8, 2), (16, 2, 2))),
    64: (1, ((32, 8, 2), (16, 4, 2))),
}
_INTERPRETED = ((16, 4, 1),)


def unsupported(degrees: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """What of signals, filters and results of these degrees the kernels do not support, in words."""
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    return f"degrees above {MAX_DEGREE}, got {max(degrees)}" if max(degrees) > MAX_DEGREE else None


def _candidates(channels: int, points: int, degrees: tuple[int, ...], target: Target) -> list[dict[str, Any]]:
    """Launch configurations, the default first."""
    most, shapes = _SHAPES[max(map(_wide, degrees))]
    tiles = cdiv(cdiv(points, _WIDTH), cdiv(points, _WIDTH * most))
    if target[0] == "interpreter":
        shapes = _INTERPRETED
    fitting = [s for s in shapes if s[0] <= max(16, bucket(channels))] or shapes[-1:]
    return [{"BC": bc, "num_warps": w, "num_stages": s, "WIDTH": _WIDTH, "TILES": tiles} for bc, w, s in fitting]


def _wide(degree: int) -> int:
    """The tile for the components of a signal: a power of two, at least the 16 that ``tl.dot`` wants."""
    return max(16, bucket((degree + 1) ** 2))


def _degree(name: str, size: int) -> int:
    degree = math.isqrt(size) - 1
    if size < 1 or (degree + 1) ** 2 != size or degree > MAX_DEGREE:
        raise ValueError(f"{name} must have (degree + 1)² components, degree at most {MAX_DEGREE}, got {size}")
    return degree


_Edges = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_EDGES = ("source", "by_target", "target_offsets", "target", "by_source", "source_offsets")


def _check(
    x: torch.Tensor,
    grad: torch.Tensor | None,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    edges: _Edges,
) -> tuple[int, int, int]:
    """The degrees of signals, filters and results."""
    (y, h), (a, b, p) = pairs[0], tables
    floats = {"x": x, "y": y, "h": h, "a": a, "b": b, "p": p} | ({} if grad is None else {"grad": grad})
    if len(pairs) > 1:
        floats |= {"y2": pairs[1][0], "h2": pairs[1][1]}
    ints = dict(zip(_EDGES, edges, strict=True))
    for name, tensor in (floats | ints).items():
        wanted = torch.int32 if name in ints else torch.float32
        if tensor.dtype != wanted:
            raise TypeError(f"{name} must be {str(wanted).removeprefix('torch.')}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, where x is, got {tensor.device}")
    for name in ("a", "b", "p"):
        if floats[name].ndim != 2 or floats[name].shape[0] != a.shape[0] or a.shape[0] < 1:
            raise ValueError(
                f"{name} must have shape (points, components), as many points as a, got {tuple(floats[name].shape)}"
            )
    if x.ndim != 3:
        raise ValueError(f"x must have shape (nodes, channels, components), got {tuple(x.shape)}")
    if y.ndim != 2:
        raise ValueError(f"y must have shape (edges, components), got {tuple(y.shape)}")
    for name in ("target_offsets", "source_offsets"):
        if ints[name].ndim != 1 or ints[name].shape[0] < 1:
            raise ValueError(f"{name} must have shape (nodes + 1,), got {tuple(ints[name].shape)}")
    num_edges, channels = y.shape[0], x.shape[1]
    degrees = _degree("a", a.shape[1]), _degree("b", b.shape[1]), _degree("p", p.shape[1])
    shapes = {
        "x": (ints["source_offsets"].shape[0] - 1, channels, a.shape[1]),
        "grad": (ints["target_offsets"].shape[0] - 1, channels, p.shape[1]),
        "y": (num_edges, b.shape[1]),
        "h": (num_edges, channels, degrees[1] + 1),
    }
    shapes |= {"y2": shapes["y"], "h2": shapes["h"]} | dict.fromkeys(_EDGES, (num_edges,))
    for name, tensor in (floats | ints).items():
        if name in shapes and not name.endswith("offsets") and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}")
    return degrees


def _constants(degrees: tuple[int, int, int], points: int, precision: str) -> dict[str, Any]:
    constants: dict[str, Any] = dict(zip(("DEGREE", "FILTER", "RESULT"), degrees, strict=True))
    constants |= dict(zip(("WIDE_X", "WIDE_F", "WIDE_Z"), map(_wide, degrees), strict=True))
    return constants | {"POINTS": points, "PRECISION": precision}


def _precision(target: Target) -> str:
    # The interpreter's time goes by operations: one product for each instead of three.
    return dot_precision(target, "ieee" if INTERPRET else None)


def _pairs(y, h, y2, h2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(y, h)] if y2 is None else [(y, h), (y2, h2)]


def _convolve(
    x: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    y2: torch.Tensor | None,
    h2: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    p: torch.Tensor,
    source: torch.Tensor,
    by_target: torch.Tensor,
    target_offsets: torch.Tensor,
    target: torch.Tensor,
    by_source: torch.Tensor,
    source_offsets: torch.Tensor,
) -> torch.Tensor:
    edges = source, by_target, target_offsets, target, by_source, source_offsets
    degrees = _check(x, None, _pairs(y, h, y2, h2), (a, b, p), edges)
    nodes, channels, points = target_offsets.shape[0] - 1, x.shape[1], a.shape[0]
    out = torch.empty(nodes, channels, p.shape[1], dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    machine = _lib.target_of(x.device)
    precision = _precision(machine)
    # Who calls makes these contiguous: nothing is copied.
    y, h, a, b, p = (t.contiguous() for t in (y, h, a, b, p))
    arguments = {
        "x": x, "y": y, "h": h, "y2": None if y2 is None else y2.contiguous(),
        "h2": None if h2 is None else h2.contiguous(), "a": a, "b": b, "p": p,
        "node": source.contiguous(), "order": by_target.contiguous(), "offsets": target_offsets.contiguous(),
        "out": out, "C": channels, "stride_n": x.stride(0), "stride_c": x.stride(1), "stride_i": x.stride(2),
        **_constants(degrees, points, precision),
    }  # fmt: skip

    def launch(meta: dict[str, Any]) -> None:
        sphere_convolution_kernel[(nodes * cdiv(channels, meta["BC"]),)](**arguments, **meta)

    key = (*degrees, points, bucket(channels), precision, y2 is None, x.stride(2) == 1)
    candidates = _candidates(channels, points, degrees, machine)
    with _lib.device_guard(x):
        launch(_lib.pick("sphere_convolution", key, candidates, launch, x.device))
    return out


def _filter_gradients(
    x: torch.Tensor,
    grad: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    p: torch.Tensor,
    source: torch.Tensor,
    by_target: torch.Tensor,
    target_offsets: torch.Tensor,
    target: torch.Tensor,
    by_source: torch.Tensor,
    source_offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    edges = source, by_target, target_offsets, target, by_source, source_offsets
    degrees = _check(x, grad, [(y, h)], (a, b, p), edges)
    nodes, points, (num_edges, channels, _) = target_offsets.shape[0] - 1, a.shape[0], h.shape
    grad_h = torch.empty(h.shape, dtype=x.dtype, device=x.device)
    if num_edges == 0 or channels == 0:
        return torch.zeros(y.shape, dtype=x.dtype, device=x.device), grad_h
    machine = _lib.target_of(x.device)
    precision = _precision(machine)
    y, h, a, b, p = (t.contiguous() for t in (y, h, a, b, p))
    arguments = {
        "x": x, "grad": grad, "y": y, "h": h, "a": a, "b": b, "p": p,
        "node": source.contiguous(), "order": by_target.contiguous(), "offsets": target_offsets.contiguous(),
        "grad_h": grad_h, "E": num_edges, "C": channels,
        "stride_xn": x.stride(0), "stride_xc": x.stride(1), "stride_xi": x.stride(2),
        "stride_gn": grad.stride(0), "stride_gc": grad.stride(1), "stride_gi": grad.stride(2),
        **_constants(degrees, points, precision),
    }  # fmt: skip
    partial = grad_h.new_empty(0)  # a part of y's gradient from each block of channels

    def launch(meta: dict[str, Any]) -> None:
        nonlocal partial
        blocks = cdiv(channels, meta["BC"])
        partial = torch.empty(blocks, *y.shape, dtype=x.dtype, device=x.device)
        sphere_convolution_filter_kernel[(nodes * blocks,)](**arguments, grad_y=partial, **meta)

    key = (*degrees, points, bucket(channels), precision, x.stride(2) == 1, grad.stride(2) == 1)
    candidates = _candidates(channels, points, degrees, machine)
    with _lib.device_guard(x):
        launch(_lib.pick("sphere_convolution_filter", key, candidates, launch, x.device))
    return partial.sum(0), grad_h


# Plain torch


def _spread(h: torch.Tensor) -> torch.Tensor:
    """(E, C, degree + 1) -> (E, C, (degree + 1)²)."""
    parts = [h[..., l : l + 1].expand(*h.shape[:-1], 2 * l + 1) for l in range(h.shape[-1])]  # noqa: E741
    return torch.cat(parts, dim=-1)


def _reference(
    x, y, h, y2, h2, a, b, p, source, by_target, target_offsets, target, by_source, source_offsets
) -> torch.Tensor:
    edges = source, by_target, target_offsets, target, by_source, source_offsets
    pairs = _pairs(y, h, y2, h2)
    _check(x, None, pairs, (a, b, p), edges)
    zonal = sum(_spread(second) * first[:, None] for first, second in pairs)
    on_grid = (x @ a.T).index_select(0, source) * (zonal @ b.T)
    total = on_grid.new_zeros(target_offsets.shape[0] - 1, *on_grid.shape[1:])
    return total.index_add_(0, target, on_grid) @ p


def _reference_filter(
    x, grad, y, h, a, b, p, source, by_target, target_offsets, target, by_source, source_offsets
) -> tuple[torch.Tensor, torch.Tensor]:
    edges = source, by_target, target_offsets, target, by_source, source_offsets
    _check(x, grad, [(y, h)], (a, b, p), edges)
    pulled = ((x @ a.T).index_select(0, source) * (grad @ p.T).index_select(0, target)) @ b
    blocks = (pulled * y[:, None]).split([2 * l + 1 for l in range(h.shape[2])], -1)  # noqa: E741
    return (pulled * _spread(h)).sum(1), torch.stack([block.sum(-1) for block in blocks], dim=-1)


# Operations

_op = custom_op("sphere_convolution", _convolve)
register_reference(_op, _reference)
_filter_op = custom_op("sphere_convolution_filter", _filter_gradients)
register_reference(_filter_op, _reference_filter)


@_op.register_fake
def _(x, y, h, y2, h2, a, b, p, source, by_target, target_offsets, target, by_source, source_offsets):
    return x.new_empty((target_offsets.shape[0] - 1, x.shape[1], p.shape[1]))


@_filter_op.register_fake
def _(x, grad, y, h, a, b, p, source, by_target, target_offsets, target, by_source, source_offsets):
    return x.new_empty(y.shape), x.new_empty(h.shape)


def _turned(edges):
    """The edges with sources and targets exchanged."""
    return *edges[3:], *edges[:3]


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, y, h, y2, h2, a, b, p, *edges = ctx.saved_tensors
    grad_x, grads, wants = None, [None] * 4, ctx.needs_input_grad
    if wants[0]:
        grad_x = _op(grad, y, h, y2, h2, p, b, a, *_turned(edges))
    if wants[1] or wants[2]:
        grads[:2] = _filter_op(x, grad, y, h, a, b, p, *edges)
    if wants[3] or wants[4]:
        grads[2:] = _filter_op(x, grad, y2, h2, a, b, p, *edges)
    return grad_x, *grads, *[None] * 9


def _setup_filter(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward_filter(ctx, along_y, along_h):
    x, grad, y, h, a, b, p, *edges = ctx.saved_tensors
    wants = ctx.needs_input_grad
    pairs = [pair for pair in ((along_y, h), (y, along_h)) if pair[0] is not None and pair[1] is not None]
    grad_x = grad_grad = grad_y = grad_h = None
    if pairs:
        flat = [t for pair in pairs for t in pair] + [None] * (4 - 2 * len(pairs))
        if wants[0]:
            grad_x = _op(grad, *flat, p, b, a, *_turned(edges))
        if wants[1]:
            grad_grad = _op(x, *flat, a, b, p, *edges)
        if wants[2] or wants[3]:
            # The gradient by y comes of along_h alone, that by h of along_y alone.
            along_y = torch.zeros_like(y) if along_y is None else along_y
            along_h = torch.zeros_like(h) if along_h is None else along_h
            grad_y, grad_h = _filter_op(x, grad, along_y, along_h, a, b, p, *edges)
    return grad_x, grad_grad, grad_y, grad_h, *[None] * 9


_op.register_autograd(_backward, setup_context=_setup)
_filter_op.register_autograd(_backward_filter, setup_context=_setup_filter)


def sphere_convolution(
    x: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    edges: _Edges,
) -> torch.Tensor:
    """z[t, c, k] = Σ_{e: s → t} Σ_γ p[γ, k] (Σ_i a[γ, i] x[s, c, i]) (Σ_j b[γ, j] h[e, c, l(j)] y[e, j]), l(j) = ⌊√j⌋.

    Differentiable in x, y and h to any order. What is kept for the backward pass are the arguments.

    Args:
        x: (N, C, n), float32, any strides.
        y: (E, m), float32: the harmonics of each edge's direction.
        h: (E, C, √m), float32: the coefficient of each degree.
        tables: a (Γ, n), b (Γ, m), p (Γ, k), float32; constants. n, m and k are squares of at most 64.
        edges: six int32 tensors: source (E,), by_target (E,), target_offsets (T + 1,), target (E,), by_source (E,),
            source_offsets (N + 1,). The edges into t are those that ``by_target`` lists from ``target_offsets[t]`` up
            to ``target_offsets[t + 1]``; likewise those out of s. They are summed in the order of the list.

    Returns:
        (T, C, k), float32, contiguous.

    Raises:
        TypeError: another dtype. ValueError: shapes, degrees or devices that do not fit. The entries of ``edges`` are
            not checked.
    """
    return _op(x, y, h, None, None, *tables, *edges)


def sphere_convolution_filter(
    x: torch.Tensor,
    grad: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    edges: _Edges,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``(grad * sphere_convolution(x, y, h, tables, edges)).sum()`` by y and by h.

    Differentiable in x, grad, y and h to any order. ``grad`` is (T, C, k), float32, any strides; the rest as for
    :func:`sphere_convolution`.
    """
    return _filter_op(x, grad, y, h, *tables, *edges)


# Production configurations: 128 channels, the default of each target.

_NOTE = (
    "What spills is halves of the tables, which float32 on matrix units multiplies by, beside those of the signals; "
    "they are read back once an edge."
)


def _register(
    label: str,
    degrees: tuple[int, int, int],
    points: int,
    budget: dict[str, int] | None = None,
    *,
    pairs: int = 1,
    back: bool = False,
) -> None:
    floats = ("x", "y", "h", "a", "b", "p", *(("grad", "grad_y", "grad_h") if back else ("out",)))
    strides = {"stride_x": degrees[0], "stride_g": degrees[2]} if back else {"stride_": degrees[0]}
    signature = dict.fromkeys(floats, "*fp32:16") | dict.fromkeys(("node", "order", "offsets"), "*i32:16")
    signature |= {"C": "i32:16"} | ({"E": "i32"} if back else {})
    for prefix, degree in strides.items():
        signature |= {f"{prefix}n": "i32:16", f"{prefix}c": "i32:16" if (degree + 1) % 4 == 0 else "i32"}
    constants = _constants(degrees, points, "") | {f"{prefix}i": 1 for prefix in strides}
    constants["PRECISION"] = dot_precision
    if not back:
        if pairs == 2:
            signature |= dict.fromkeys(("y2", "h2"), "*fp32:16")
        else:
            constants |= {"y2": None, "h2": None}
    default = _candidates(128, points, degrees, ("cuda", "90"))[0]
    options = {k: default[k] for k in ("num_warps", "num_stages")}
    register_config(
        KernelConfig(
            kernel=sphere_convolution_filter_kernel if back else sphere_convolution_kernel,
            name=f"sphere_convolution{'_filter' if back else ''}[{label}]",
            signature=signature,
            constexprs=constants | {k: default[k] for k in default if k not in options},
            spill_budget=budget or {},
            note=_NOTE if budget else "",
            **options,
        )
    )


# Signals and filters of degree L, to degree L, by Lebedev's points; the bracket has twice as many rows.
_register("L1", (1, 1, 1), 8)
_register("L1", (1, 1, 1), 8, back=True)
_register("L2", (2, 2, 2), 26, {"sm_100": 8})
_register("L2", (2, 2, 2), 26, back=True)
_register("L3", (3, 3, 3), 38)
_register("L3", (3, 3, 3), 38, back=True)
_register("L3,pairs", (3, 3, 3), 38, pairs=2)
_register("L3,bracket", (3, 3, 3), 76, {"sm_80": 88})
_register("L3,bracket", (3, 3, 3), 76, back=True)
_register("L4", (4, 4, 4), 86, {"sm_80": 160})
_register("L4", (4, 4, 4), 86, back=True)
