"""A sparse equivariant product with all its terms unrolled, its gradients and their derivatives.

    z[b,c,k] = Σ_p w[b,c,p] Σ_ij T_p[i,j,k] x[b,c,i] y[b,c,j]

A path p joins a block of degree l1 of x and one of degree l2 of y to a block of degree l3 of z; its coefficients T_p
are nearly all zeros. A thread takes a row (b, c): x, y and z are its registers, the coefficients are constants in the
code, and what moves is each row once. Paths between the same two blocks follow each other, so that the products
x_i y_j that they share live no longer than these.

The form Σ w T x y g is linear in each of x, y, w and g. One kernel gives its derivative by g, the product; the other
those by x, y and w, in one pass over the terms: with u_p = Σ_k T_p[i,j,k] g_k for each (i, j),

    t = Σ_p w_p u_p        g_x[i] += t y_j        g_y[j] += t x_i        g_w[p] += u_p x_i y_j

Both also give the derivative of what they compute along a direction (hx, hy, hw), which is all that a backward pass
through a backward pass asks for. A y common to all channels, or weights common to all samples, are read with a stride
of zero; their gradients are summed within a program, and over programs afterwards, in a fixed order.

Which product it is, a string says (the launchers' ``spec``)::

    "n1,n2,n3;offset1,l1,offset2,l2,offset3,l3,kind,scale;..."        one part a path, scale as float.hex() writes it

and :func:`register_coefficients` who knows the numbers of a kind.

Source: Luo et al., arXiv 2401.10216 (the Gaunt product).
"""

# The kernels' tuples grow, and Triton compiles no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _lib
from ._lib import KernelConfig, cdiv, custom_op, register_config, register_reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Weights are loaded, and their gradients stored, for so many neighbouring paths at once. More would hold registers
# longer; fewer are more memory operations, to which the time of Triton's coalescing pass is proportional.
_GROUP = 8

# What the unrolled code is made of


class _Path(NamedTuple):
    """A path within its pair of blocks; every term is (index, coefficient)."""

    number: int
    offset: int
    size: int
    by_output: tuple[tuple[tuple[int, float], ...], ...]  # [k] -> terms over i * size2 + j
    by_input: tuple[tuple[tuple[int, float], ...], ...]  # [i * size2 + j] -> terms over offset + k


class _Pair(NamedTuple):
    """Two blocks, of x and of y, and all paths between them."""

    offset1: int
    size1: int
    offset2: int
    size2: int
    paths: tuple[_Path, ...]


class Plan:
    """A product as the kernels read it, a constant of their code.

    It compares, and names compiled kernels, by a digest of all its numbers.
    """

    def __init__(self, n1: int, n2: int, n3: int, num_paths: int, pairs: tuple[_Pair, ...]):
        self.n1, self.n2, self.n3, self.num_paths, self.pairs = n1, n2, n3, num_paths, pairs
        # Of each group of weights: the path that the code comes to first, and the last pair.
        places = [(path.number // _GROUP, path.number, q) for q, pair in enumerate(pairs) for path in pair.paths]
        self.order = []
        for group in range(cdiv(num_paths, _GROUP)):
            members = [(number, q) for of, number, q in places if of == group]
            self.order.append((members[0][0], members[-1][1]))
        self.digest = hashlib.sha256(repr((n1, n2, n3, num_paths, pairs)).encode()).hexdigest()[:24]

    def __repr__(self) -> str:
        return f"Plan({self.digest})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


_COEFFICIENTS: dict[str, Callable[[int, int, int], Any]] = {}


def register_coefficients(kind: str, coefficients: Callable[[int, int, int], Any]) -> None:
    """Say where the numbers of ``kind`` come from: a function (l1, l2, l3) -> float64 tensor of three dimensions."""
    _COEFFICIENTS[kind] = coefficients


@functools.lru_cache(maxsize=1024)
def _sizes(spec: str) -> tuple[int, int, int, int]:
    """n1, n2, n3 and the number of paths."""
    head, *paths = spec.split(";")
    n1, n2, n3 = map(int, head.split(","))
    return n1, n2, n3, len(paths)


@functools.lru_cache(maxsize=1024)
def plan(spec: str) -> Plan:
    """The plan of a specification."""
    n1, n2, n3, num_paths = _sizes(spec)
    pairs: dict[tuple[int, int, int, int], list[_Path]] = {}
    for number, text in enumerate(spec.split(";")[1:]):
        *ints, kind, scale = text.split(",")
        offset1, l1, offset2, l2, offset3, l3 = map(int, ints)
        if kind not in _COEFFICIENTS:
            raise ValueError(f"spec names the coefficients {kind!r}, known are {', '.join(_COEFFICIENTS) or 'none'}")
        block = (float.fromhex(scale) * _COEFFICIENTS[kind](l1, l2, l3)).flatten(0, 1)
        by_output = tuple(tuple((ij, v) for ij, v in enumerate(row) if v) for row in block.T.tolist())
        by_input = tuple(tuple((offset3 + k, v) for k, v in enumerate(row) if v) for row in block.tolist())
        path = _Path(number, offset3, 2 * l3 + 1, by_output, by_input)
        pairs.setdefault((offset1, 2 * l1 + 1, offset2, 2 * l2 + 1), []).append(path)
    return Plan(n1, n2, n3, num_paths, tuple(_Pair(*blocks, tuple(paths)) for blocks, paths in pairs.items()))


# What a kernel asks of a plan while it is compiled. A variable of a kernel holds no constant, so each asks for one.


@triton.constexpr_function
def _pairs(plan):
    return len(plan.pairs)


@triton.constexpr_function
def _x_offset(plan, q):
    return plan.pairs[q].offset1


@triton.constexpr_function
def _x_size(plan, q):
    return plan.pairs[q].size1


@triton.constexpr_function
def _y_offset(plan, q):
    return plan.pairs[q].offset2


@triton.constexpr_function
def _y_size(plan, q):
    return plan.pairs[q].size2


@triton.constexpr_function
def _paths(plan, q):
    return len(plan.pairs[q].paths)


@triton.constexpr_function
def _number(plan, q, p):
    return plan.pairs[q].paths[p].number


@triton.constexpr_function
def _z_offset(plan, q, p):
    return plan.pairs[q].paths[p].offset


@triton.constexpr_function
def _z_size(plan, q, p):
    return plan.pairs[q].paths[p].size


@triton.constexpr_function
def _output_terms(plan, q, p, k):
    return len(plan.pairs[q].paths[p].by_output[k])


@triton.constexpr_function
def _output_index(plan, q, p, k, t):
    return plan.pairs[q].paths[p].by_output[k][t][0]


@triton.constexpr_function
def _output_value(plan, q, p, k, t):
    return plan.pairs[q].paths[p].by_output[k][t][1]


@triton.constexpr_function
def _input_terms(plan, q, p, i, j):
    return len(plan.pairs[q].paths[p].by_input[i * plan.pairs[q].size2 + j])


@triton.constexpr_function
def _input_index(plan, q, p, i, j, t):
    return plan.pairs[q].paths[p].by_input[i * plan.pairs[q].size2 + j][t][0]


@triton.constexpr_function
def _input_value(plan, q, p, i, j, t):
    return plan.pairs[q].paths[p].by_input[i * plan.pairs[q].size2 + j][t][1]


@triton.constexpr_function
def _first_path(plan, q, i, j):
    """The first path of a pair with a term at (i, j); their number where there is none."""
    paths = plan.pairs[q].paths
    return next((p for p, path in enumerate(paths) if path.by_input[i * plan.pairs[q].size2 + j]), len(paths))


# Paths go in groups of neighbouring numbers, named by the first.


@triton.constexpr_function
def _loads(plan, q, p):
    """Whether the path is the first of its group that the code comes to."""
    number = plan.pairs[q].paths[p].number
    return number == plan.order[number // _GROUP][0]


@triton.constexpr_function
def _group(plan, q, p):
    return plan.pairs[q].paths[p].number // _GROUP * _GROUP


@triton.constexpr_function
def _group_size(plan, q, p):
    return min(_GROUP, plan.num_paths - plan.pairs[q].paths[p].number // _GROUP * _GROUP)


@triton.constexpr_function
def _step(plan):
    return _GROUP


@triton.constexpr_function
def _size_from(plan, start):
    return min(_GROUP, plan.num_paths - start)


@triton.constexpr_function
def _finishes(plan, q, start):
    """Whether the pair is the last with a path of the group."""
    return plan.order[start // _GROUP][1] == q


@triton.constexpr_function
def _width(n):
    return max(1, 1 << (n - 1).bit_length())


@triton.constexpr_function
def _levels(n):
    return (n - 1).bit_length()


# Tiles (ROWS, n) and their columns


@triton.jit
def _load_columns(pointers, inside, stride, N: tl.constexpr, DTYPE: tl.constexpr):
    """The N entries of each row, a tensor (ROWS,) each."""
    i = tl.arange(0, _width(N))
    mask = inside[:, None] & (i < N)[None, :]
    tile = tl.load(pointers[:, None] + i.to(tl.int64)[None, :] * stride, mask=mask, other=0.0).to(DTYPE)
    parts = (tile,)
    for level in tl.static_range(_levels(N)):  # from the lowest bit of the column's number to the highest
        zeros = ()
        ones = ()
        for part in tl.static_range(1 << level):
            zero, one = parts[part].reshape(tile.shape[0], _width(N) >> (level + 1), 2).split()
            zeros = zeros + (zero,)
            ones = ones + (one,)
        parts = zeros + ones
    columns = ()
    for n in tl.static_range(N):
        columns = columns + (parts[n].reshape(tile.shape[0]),)
    return columns


@triton.jit
def _joined(columns, N: tl.constexpr):
    """The inverse: a tile (ROWS, width) with zeros behind the N columns."""
    parts = columns + _zeros(columns[0], _width(N) - N)
    for level in tl.static_range(_levels(N)):  # from the highest bit to the lowest
        wide = ()
        for n in tl.static_range(_width(N) >> (level + 1)):
            both = tl.join(parts[n], parts[n + (_width(N) >> (level + 1))])
            wide = wide + (both.reshape(columns[0].shape[0], 2 << level),)
        parts = wide
    return parts[0].reshape(columns[0].shape[0], _width(N))


@triton.jit
def _zeros(x, N: tl.constexpr):
    columns = ()
    for _ in tl.static_range(N):
        columns = columns + (tl.zeros_like(x),)
    return columns


@triton.jit
def _load_group(weights, pointers, inside, stride, START: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of each path (ROWS,), those of SIZE paths from START on read."""
    read = _load_columns(pointers + START * stride, inside, stride, SIZE, DTYPE)
    return weights[:START] + read + weights[START + SIZE :]


@triton.jit
def _store_rows(out, columns, row, inside, N: tl.constexpr):
    i = tl.arange(0, _width(N))
    tile = _joined(columns, N).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * N + i[None, :], tile, mask=inside[:, None] & (i < N)[None, :])


# The kernels


@triton.jit
def _rows(B, C, BB: tl.constexpr, BC: tl.constexpr):
    """Sample, channel and mask of the BB * BC rows of a program, channels fastest."""
    r = tl.arange(0, BB * BC)
    tiles_c = tl.cdiv(C, BC)
    b = (tl.program_id(0) // tiles_c).to(tl.int64) * BB + r // BC
    c = (tl.program_id(0) % tiles_c) * BC + r % BC
    return b, c.to(tl.int64), (b < B) & (c < C)


@triton.jit(do_not_specialize=["B"])
def sparse_product_kernel(
    x, y, w, hx, hy, hw, z,
    B, C,
    stride_xb, stride_xc, stride_xn, stride_yb, stride_yc, stride_yn, stride_wb, stride_wc, stride_wp,
    stride_hxb, stride_hxc, stride_hxn, stride_hyb, stride_hyc, stride_hyn, stride_hwb, stride_hwc, stride_hwp,
    PLAN: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PATHS: tl.constexpr,
    DTYPE: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """z, the product of x, y and w; with hx, hy (and hw): its derivative along (hx, hy, hw)."""
    b, c, inside = _rows(B, C, BB, BC)
    xs = _load_columns(x + b * stride_xb + c * stride_xc, inside, stride_xn, N1, DTYPE)
    ys = _load_columns(y + b * stride_yb + c * stride_yc, inside, stride_yn, N2, DTYPE)
    if hx is not None:
        hxs = _load_columns(hx + b * stride_hxb + c * stride_hxc, inside, stride_hxn, N1, DTYPE)
        hys = _load_columns(hy + b * stride_hyb + c * stride_hyc, inside, stride_hyn, N2, DTYPE)
    weights = _zeros(xs[0], PATHS)
    slopes = weights
    zs = _zeros(xs[0], N3)
    for q in tl.static_range(_pairs(PLAN)):
        products = ()
        moved = ()
        for i in tl.static_range(_x_size(PLAN, q)):
            xi = xs[_x_offset(PLAN, q) + i]
            for j in tl.static_range(_y_size(PLAN, q)):
                yj = ys[_y_offset(PLAN, q) + j]
                products = products + (xi * yj,)
                if hx is not None:
                    moved = moved + (hxs[_x_offset(PLAN, q) + i] * yj + xi * hys[_y_offset(PLAN, q) + j],)
        if hx is None:
            moved = products
        for p in tl.static_range(_paths(PLAN, q)):
            if w is not None and _loads(PLAN, q, p):
                start = b * stride_wb + c * stride_wc
                weights = _load_group(
                    weights, w + start, inside, stride_wp, _group(PLAN, q, p), _group_size(PLAN, q, p), DTYPE
                )
                if hw is not None:
                    start = b * stride_hwb + c * stride_hwc
                    slopes = _load_group(
                        slopes, hw + start, inside, stride_hwp, _group(PLAN, q, p), _group_size(PLAN, q, p), DTYPE
                    )
            block = ()
            for k in tl.static_range(_z_size(PLAN, q, p)):
                zk = zs[_z_offset(PLAN, q, p) + k]
                if _output_terms(PLAN, q, p, k) > 0:
                    total = _output_value(PLAN, q, p, k, 0) * moved[_output_index(PLAN, q, p, k, 0)]
                    for t in tl.static_range(1, _output_terms(PLAN, q, p, k)):
                        total += _output_value(PLAN, q, p, k, t) * moved[_output_index(PLAN, q, p, k, t)]
                    zk += total if w is None else weights[_number(PLAN, q, p)] * total
                    if hw is not None:
                        total = _output_value(PLAN, q, p, k, 0) * products[_output_index(PLAN, q, p, k, 0)]
                        for t in tl.static_range(1, _output_terms(PLAN, q, p, k)):
                            total += _output_value(PLAN, q, p, k, t) * products[_output_index(PLAN, q, p, k, t)]
                        zk += slopes[_number(PLAN, q, p)] * total
                block = block + (zk,)
            zs = zs[: _z_offset(PLAN, q, p)] + block + zs[_z_offset(PLAN, q, p) + _z_size(PLAN, q, p) :]
    _store_rows(z, zs, b * C + c, inside, N3)


@triton.jit(do_not_specialize=["B"])
def sparse_product_gradients_kernel(
    g, x, y, w, hx, hy, hw, gx, gy, gw,
    B, C,
    stride_gb, stride_gc, stride_gn,
    stride_xb, stride_xc, stride_xn, stride_yb, stride_yc, stride_yn, stride_wb, stride_wc, stride_wp,
    stride_hxb, stride_hxc, stride_hxn, stride_hyb, stride_hyc, stride_hyn, stride_hwb, stride_hwc, stride_hwp,
    stride_gwb, stride_gwc, stride_gwp,
    PLAN: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PATHS: tl.constexpr,
    COMMON_Y: tl.constexpr, COMMON_W: tl.constexpr, DTYPE: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients gx, gy, gw (those that are not None); with hx, hy (and hw): their derivative along (hx, hy, hw).

    COMMON_Y: one y for all channels, gy is (tiles of channels, B, N2); COMMON_W: one w for all samples, the first
    dimension of gw counts tiles of samples. Each is a sum over the program's rows.
    """
    b, c, inside = _rows(B, C, BB, BC)
    tile_b = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
    tile_c = (tl.program_id(0) % tl.cdiv(C, BC)).to(tl.int64)
    gs = _load_columns(g + b * stride_gb + c * stride_gc, inside, stride_gn, N3, DTYPE)
    xs = _load_columns(x + b * stride_xb + c * stride_xc, inside, stride_xn, N1, DTYPE)
    ys = _load_columns(y + b * stride_yb + c * stride_yc, inside, stride_yn, N2, DTYPE)
    if hx is not None:
        hxs = _load_columns(hx + b * stride_hxb + c * stride_hxc, inside, stride_hxn, N1, DTYPE)
        hys = _load_columns(hy + b * stride_hyb + c * stride_hyc, inside, stride_hyn, N2, DTYPE)
    weights = _zeros(xs[0], PATHS)
    slopes = weights
    gws = weights
    gxs = _zeros(xs[0], N1)
    gys = _zeros(xs[0], N2)
    for q in tl.static_range(_pairs(PLAN)):
        if w is not None:
            for p in tl.static_range(_paths(PLAN, q)):
                if _loads(PLAN, q, p):
                    start = b * stride_wb + c * stride_wc
                    weights = _load_group(
                        weights, w + start, inside, stride_wp, _group(PLAN, q, p), _group_size(PLAN, q, p), DTYPE
                    )
                    if hw is not None:
                        start = b * stride_hwb + c * stride_hwc
                        slopes = _load_group(
                            slopes, hw + start, inside, stride_hwp, _group(PLAN, q, p), _group_size(PLAN, q, p), DTYPE
                        )
        gx_block = ()
        gy_block = gys[_y_offset(PLAN, q) : _y_offset(PLAN, q) + _y_size(PLAN, q)]
        for i in tl.static_range(_x_size(PLAN, q)):
            xi = xs[_x_offset(PLAN, q) + i]
            gxi = gxs[_x_offset(PLAN, q) + i]
            gy_row = ()
            for j in tl.static_range(_y_size(PLAN, q)):
                yj = ys[_y_offset(PLAN, q) + j]
                gyj = gy_block[j]
                if _first_path(PLAN, q, i, j) < _paths(PLAN, q):
                    if hx is None:
                        xy = xi * yj
                    else:
                        hxi = hxs[_x_offset(PLAN, q) + i]
                        hyj = hys[_y_offset(PLAN, q) + j]
                        xy = hxi * yj + xi * hyj
                    for p in tl.static_range(_first_path(PLAN, q, i, j), _paths(PLAN, q)):
                        if _input_terms(PLAN, q, p, i, j) > 0:
                            u = _input_value(PLAN, q, p, i, j, 0) * gs[_input_index(PLAN, q, p, i, j, 0)]
                            for t in tl.static_range(1, _input_terms(PLAN, q, p, i, j)):
                                u += _input_value(PLAN, q, p, i, j, t) * gs[_input_index(PLAN, q, p, i, j, t)]
                            if gw is not None:
                                summed = (gws[_number(PLAN, q, p)] + u * xy,)
                                gws = gws[: _number(PLAN, q, p)] + summed + gws[_number(PLAN, q, p) + 1 :]
                            share = u if w is None else weights[_number(PLAN, q, p)] * u
                            if p == _first_path(PLAN, q, i, j):
                                total = share
                            else:
                                total += share
                            if hw is not None:
                                if p == _first_path(PLAN, q, i, j):
                                    bent = slopes[_number(PLAN, q, p)] * u
                                else:
                                    bent += slopes[_number(PLAN, q, p)] * u
                    if hx is None:
                        gxi += total * yj
                        gyj += total * xi
                    else:
                        gxi += total * hyj
                        gyj += total * hxi
                        if hw is not None:
                            gxi += bent * yj
                            gyj += bent * xi
                gy_row = gy_row + (gyj,)
            gy_block = gy_row
            gx_block = gx_block + (gxi,)
        gxs = gxs[: _x_offset(PLAN, q)] + gx_block + gxs[_x_offset(PLAN, q) + _x_size(PLAN, q) :]
        gys = gys[: _y_offset(PLAN, q)] + gy_block + gys[_y_offset(PLAN, q) + _y_size(PLAN, q) :]
        if gw is not None:
            for start in tl.static_range(0, PATHS, _step(PLAN)):
                if _finishes(PLAN, q, start):
                    _store_group(
                        gw, gws[start : start + _size_from(PLAN, start)], b, c, tile_b, tile_c, inside, C,
                        stride_gwb, stride_gwc, stride_gwp, start, _size_from(PLAN, start), COMMON_W, BB, BC,
                    )  # fmt: skip
    if gx is not None:
        _store_rows(gx, gxs, b * C + c, inside, N1)
    if gy is not None:
        if COMMON_Y:
            sample = tile_b * BB + tl.arange(0, BB)
            i = tl.arange(0, _width(N2))
            summed = tl.sum(_joined(gys, N2).reshape(BB, BC, _width(N2)), 1)
            mask = (sample < B)[:, None] & (i < N2)[None, :]
            tl.store(gy + (tile_c * B + sample)[:, None] * N2 + i[None, :], summed, mask=mask)
        else:
            _store_rows(gy, gys, b * C + c, inside, N2)


@triton.jit
def _store_group(
    gw, columns, b, c, tile_b, tile_c, inside, C, stride_b, stride_c, stride_p,
    START: tl.constexpr, SIZE: tl.constexpr, COMMON_W: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, _width(SIZE))
    offsets = (START + i).to(tl.int64)[None, :] * stride_p
    tile = _joined(columns, SIZE)
    if COMMON_W:
        channel = tile_c * BC + tl.arange(0, BC)
        pointers = gw + tile_b * stride_b + (channel * stride_c)[:, None] + offsets
        summed = tl.sum(tile.reshape(BB, BC, _width(SIZE)), 0)
        tl.store(pointers, summed, mask=(channel < C)[:, None] & (i < SIZE)[None, :])
    else:
        pointers = gw + (b * stride_b + c * stride_c)[:, None] + offsets
        tl.store(pointers, tile.to(gw.dtype.element_ty), mask=inside[:, None] & (i < SIZE)[None, :])


# Launching

# Rows of a program: one a thread. With one warp, tiles change hands by shuffles, and nobody waits at a barrier.
_WARP = {"hip": 64, "interpreter": 128}


def _tile(C: int, target: _lib.Target, *, over_samples: bool) -> tuple[int, int]:
    """(BB, BC), samples and channels of a program; ``over_samples``: it sums over its samples."""
    rows = _WARP.get(target[0], 32)
    widest = 4 if over_samples else rows
    # Of the tiles that pad the channels least, the widest.
    widths = [1 << n for n in range(widest.bit_length())]
    channels = min(widths, key=lambda width: (cdiv(C, width) * width, -width))
    if cdiv(C, widest) * widest <= 1.25 * C:
        channels = widest
    return rows // channels, channels


def _strides(tensor: torch.Tensor | None, batch: int, channels: int) -> tuple[int | None, int | None, int | None]:
    """Strides over samples, channels and components, of a tensor that may have one for all."""
    if tensor is None:
        return None, None, None
    if tensor.ndim == 2:
        return 0, tensor.stride(0), tensor.stride(1)
    b, c, n = tensor.stride()
    return (b if batch > 1 else 0), (c if tensor.shape[1] == channels else 0), n


def _arguments(made: Plan, tensors: dict[str, torch.Tensor | None], like: torch.Tensor) -> dict[str, Any]:
    batch, channels = like.shape[:2]
    arguments: dict[str, Any] = {"B": batch, "C": channels, "PLAN": made, "N1": made.n1, "N2": made.n2, "N3": made.n3}
    arguments |= {"PATHS": made.num_paths, "DTYPE": tl.float64 if like.dtype == torch.float64 else tl.float32}
    for name, tensor in tensors.items():
        last = "p" if name.endswith("w") else "n"
        arguments[name] = tensor
        names = (f"stride_{name}b", f"stride_{name}c", f"stride_{name}{last}")
        arguments |= zip(names, _strides(tensor, batch, channels), strict=True)
    return arguments


def _launch_product(x, y, w, hx, hy, hw, spec: str) -> torch.Tensor:
    made, target = plan(spec), _lib.target_of(x.device)
    batch, channels = x.shape[:2]
    z = x.new_empty(batch, channels, made.n3)
    if z.numel() == 0:
        return z
    bb, bc = _tile(channels, target, over_samples=False)
    arguments = _arguments(made, {"x": x, "y": y, "w": w, "hx": hx, "hy": hy, "hw": hw}, x)
    with _lib.device_guard(x):
        grid = (cdiv(batch, bb) * cdiv(channels, bc),)
        sparse_product_kernel[grid](**arguments, z=z, BB=bb, BC=bc, num_warps=1)
    return z


def _launch_gradients(g, x, y, w, hx, hy, hw, spec: str, wants: list[bool]) -> tuple[torch.Tensor | None, ...]:
    """gx, gy and gw, None where not wanted."""
    made, target = plan(spec), _lib.target_of(x.device)
    batch, channels = x.shape[:2]
    wants = [*wants[:2], wants[2] and w is not None]
    if x.numel() == 0 or g.numel() == 0 or y.numel() == 0:
        return tuple(torch.zeros_like(t) if want else None for t, want in zip((x, y, w), wants, strict=True))
    common_y, common_w = y.shape[1] == 1 < channels, w is not None and w.ndim == 2
    bb, bc = _tile(channels, target, over_samples=common_w and wants[2])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants[0] else None
    gy = gw = None
    if wants[1]:
        shape = (cdiv(channels, bc), batch, made.n2) if common_y else (batch, channels, made.n2)
        gy = torch.empty(shape, dtype=wide if common_y else y.dtype, device=x.device)
    if wants[2]:
        shape = (cdiv(batch, bb) if common_w else batch, made.num_paths, channels)
        gw = torch.empty(shape, dtype=wide if common_w else w.dtype, device=x.device).transpose(1, 2)
    tensors = {"g": g, "x": x, "y": y, "w": w, "hx": hx, "hy": hy, "hw": hw}
    arguments = _arguments(made, tensors, x)
    strides = (None, None, None) if gw is None else gw.stride()
    arguments |= zip(("stride_gwb", "stride_gwc", "stride_gwp"), strides, strict=True)
    with _lib.device_guard(x):
        grid = (cdiv(batch, bb) * cdiv(channels, bc),)
        sparse_product_gradients_kernel[grid](
            **arguments, gx=gx, gy=gy, gw=gw, COMMON_Y=common_y, COMMON_W=common_w, BB=bb, BC=bc, num_warps=1
        )
    if gy is not None and common_y:
        gy = gy.sum(0)[:, None].to(y.dtype)
    if gw is not None and common_w:
        gw = gw.sum(0).to(w.dtype)
    return gx, gy, gw


def _check(x, y, w, spec: str, **others: torch.Tensor | None) -> None:
    """Shapes and dtypes; ``others`` are like the tensor that their last letter names, g like the product."""
    n1, n2, n3, num_paths = _sizes(spec)
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim != 3 or x.shape[2] != n1:
        raise ValueError(f"x must have shape (B, C, n1) = (*, *, {n1}), got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    allowed = {
        "x": ((batch, channels, n1),),
        "y": ((batch, channels, n2), (batch, 1, n2)),
        "w": ((batch, channels, num_paths), (channels, num_paths)),
        "g": ((batch, channels, n3),),
    }
    for name, tensor in {"x": x, "y": y, "w": w, **others}.items():
        if tensor is None:
            continue
        shapes = allowed[name[-1]]
        if name in ("hy", "hw"):
            shapes = (tuple((y if name == "hy" else w).shape),)
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype}, the dtype of x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, where x is, got {tensor.device}")


# Plain torch


@functools.lru_cache(maxsize=64)
def _dense(made: Plan) -> torch.Tensor:
    """T[p, i, j, k]."""
    with torch.no_grad(), torch.device("cpu"):
        dense = torch.zeros(made.num_paths, made.n1, made.n2, made.n3, dtype=torch.float64)
        for pair in made.pairs:
            for path in pair.paths:
                for ij, terms in enumerate(path.by_input):
                    i, j = divmod(ij, pair.size2)
                    for k, value in terms:
                        dense[path.number, pair.offset1 + i, pair.offset2 + j, k] = value
    return dense


def _constants(x: torch.Tensor, spec: str) -> torch.Tensor:
    return _dense(plan(spec)).to(dtype=x.dtype, device=x.device)


def _plain_product(x, y, w, spec: str) -> torch.Tensor:
    y = y.expand(-1, x.shape[1], -1)
    if w is None:
        return torch.einsum("bci,bcj,ijk->bck", x, y, _constants(x, spec).sum(0))
    return (torch.einsum("bci,bcj,pijk->bcpk", x, y, _constants(x, spec)) * w[..., None]).sum(2)


def _plain_gradients(g, x, y, w, spec: str, wants: list[bool]) -> tuple[torch.Tensor | None, ...]:
    wide, channels = y.expand(-1, x.shape[1], -1), x.shape[1]
    u = torch.einsum("bck,pijk->bcpij", g, _constants(x, spec))
    total = u.sum(2) if w is None else (u * w[..., None, None]).sum(2)
    gx = gy = gw = None
    if wants[0]:
        gx = torch.einsum("bcij,bcj->bci", total, wide)
    if wants[1]:
        gy = torch.einsum("bcij,bci->bcj", total, x)
        gy = gy.sum(1, keepdim=True) if y.shape[1] == 1 < channels else gy
    if wants[2] and w is not None:
        gw = torch.einsum("bcpij,bci,bcj->bcp", u, x, wide)
        gw = gw.sum(0) if w.ndim == 2 else gw
    return gx, gy, gw


def _accumulate(sums: list[torch.Tensor | None], parts: Sequence[torch.Tensor | None]) -> None:
    for n, part in enumerate(parts):
        so_far = sums[n]
        if part is not None:
            sums[n] = part if so_far is None else so_far + part


def _plain_second(g, x, y, w, hx, hy, hw, spec: str, wants: list[bool]) -> tuple[torch.Tensor | None, ...]:
    """The product rule: one argument at a time gives way to its direction."""
    sums: list[torch.Tensor | None] = [None] * 4
    for slot, direction in enumerate((hx, hy, hw)):
        if direction is None:
            continue
        moved = [direction if n == slot else tensor for n, tensor in enumerate((x, y, w))]
        others = [want and slot != n for n, want in enumerate(wants[1:])]
        first = _plain_product(moved[0], moved[1], moved[2], spec) if wants[0] else None
        _accumulate(sums, (first, *_plain_gradients(g, moved[0], moved[1], moved[2], spec, others)))
    return tuple(
        torch.zeros_like(like) if want and part is None and like is not None else part
        for part, want, like in zip(sums, wants, (g, x, y, w), strict=True)
    )


# Operations. Tensors that nobody wants come out empty, since an operation has as many outputs as its schema says.


def _all(parts: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(like.new_empty(0) if part is None else part for part in parts)


def _product(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None, spec: str) -> torch.Tensor:
    _check(x, y, w, spec)
    return _launch_product(x, y, w, None, None, None, spec)


def _product_reference(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None, spec: str) -> torch.Tensor:
    _check(x, y, w, spec)
    return _plain_product(x, y, w, spec)


_product_op = custom_op("sparse_product", _product)
register_reference(_product_op, _product_reference)


@_product_op.register_fake
def _(x, y, w, spec):
    return x.new_empty((x.shape[0], x.shape[1], _sizes(spec)[2]))


def _gradients(
    g: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None, spec: str, wants: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, y, w, spec, g=g)
    return _all(_launch_gradients(g, x, y, w, None, None, None, spec, wants), x)  # type: ignore[return-value]


def _gradients_reference(
    g: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None, spec: str, wants: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, y, w, spec, g=g)
    return _all(_plain_gradients(g, x, y, w, spec, wants), x)  # type: ignore[return-value]


_gradients_op = custom_op("sparse_product_gradients", _gradients)
register_reference(_gradients_op, _gradients_reference)


def _fake_like(like: torch.Tensor | None, want: bool, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(like.shape) if want and like is not None else x.new_empty(0)


@_gradients_op.register_fake
def _(g, x, y, w, spec, wants):
    return tuple(_fake_like(like, want, x) for like, want in zip((x, y, w), wants, strict=True))


def _second(
    g: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor | None,
    hx: torch.Tensor | None,
    hy: torch.Tensor | None,
    hw: torch.Tensor | None,
    spec: str,
    wants: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, y, w, spec, g=g, hx=hx, hy=hy, hw=hw)
    zero = x.new_zeros(())
    hx = zero.expand(x.shape) if hx is None else hx
    hy = zero.expand(y.shape) if hy is None else hy
    hw = zero.expand(w.shape) if hw is None and w is not None else hw
    first = _launch_product(x, y, w, hx, hy, hw, spec) if wants[0] else None
    rest = (None, None, None)
    if any(wants[1:]):
        rest = _launch_gradients(g, x, y, w, hx, hy, hw, spec, wants[1:])
    return _all((first, *rest), x)  # type: ignore[return-value]


def _second_reference(
    g: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor | None,
    hx: torch.Tensor | None,
    hy: torch.Tensor | None,
    hw: torch.Tensor | None,
    spec: str,
    wants: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, y, w, spec, g=g, hx=hx, hy=hy, hw=hw)
    return _all(_plain_second(g, x, y, w, hx, hy, hw, spec, wants), x)  # type: ignore[return-value]


_second_op = custom_op("sparse_product_second", _second)
register_reference(_second_op, _second_reference)


@_second_op.register_fake
def _(g, x, y, w, hx, hy, hw, spec, wants):
    return tuple(_fake_like(like, want, x) for like, want in zip((g, x, y, w), wants, strict=True))


def _wanted(parts: tuple[torch.Tensor, ...], wants: list[bool]) -> tuple[torch.Tensor | None, ...]:
    return tuple(part if want else None for part, want in zip(parts, wants, strict=True))


def _setup_product(ctx, inputs, output) -> None:
    x, y, w, ctx.spec = inputs
    ctx.save_for_backward(x, y, w)


def _backward_product(ctx, grad):
    wants = list(ctx.needs_input_grad[:3])
    return *_wanted(_gradients_op(grad, *ctx.saved_tensors, ctx.spec, wants), wants), None


_product_op.register_autograd(_backward_product, setup_context=_setup_product)


def _setup_gradients(ctx, inputs, output) -> None:
    g, x, y, w, ctx.spec, ctx.wants = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(g, x, y, w)


def _backward_gradients(ctx, *directions):
    """Without a graph of its own, two launches; else the product rule, in operations that have derivatives again."""
    tensors, spec = ctx.saved_tensors, ctx.spec
    wants = list(ctx.needs_input_grad[:4])
    directions = [h if want else None for h, want in zip(directions, ctx.wants, strict=True)]
    if all(h is None for h in directions):
        return (None,) * 6
    if not torch.is_grad_enabled():
        return *_wanted(_second_op(*tensors, *directions, spec, wants), wants), None, None
    g, *arguments = tensors
    sums: list[torch.Tensor | None] = [None] * 4
    for slot, direction in enumerate(directions):
        if direction is None:
            continue
        moved = [direction if n == slot else tensor for n, tensor in enumerate(arguments)]
        others = [want and n != slot for n, want in enumerate(wants[1:])]
        parts = [_product_op(*moved, spec) if wants[0] else None]
        parts += _wanted(_gradients_op(g, *moved, spec, others), others) if any(others) else [None] * 3
        _accumulate(sums, parts)
    return *sums, None, None


_gradients_op.register_autograd(_backward_gradients, setup_context=_setup_gradients)


def sparse_product(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None, spec: str) -> torch.Tensor:
    """z[b,c,k] = Σ_p w[b,c,p] Σ_ij T_p[i,j,k] x[b,c,i] y[b,c,j], with the paths p of ``spec``.

    Differentiable to any order; the backward pass keeps x, y and w. A specification is compiled once for each
    combination of gradients and kinds of weights, which takes seconds where degrees reach 4.

    Args:
        x: (B, C, n1), float64, float32, float16 or bfloat16, any strides.
        y: (B, C, n2), or (B, 1, n2), one for all channels.
        w: (B, C, P), or (C, P), one for all samples, or None for ones. Fastest with neighbouring channels in
            neighbouring places of memory.
        spec: sizes and paths, see the head of this file.

    Returns:
        (B, C, n3), contiguous, in the dtype of x; sums are in float32, for float64 in float64.

    Raises:
        TypeError: another dtype. ValueError: shapes, devices or a specification that do not fit.
    """
    return _product_op(x, y, w, spec)


# Production configurations, 128 channels: signals of degree 4, and a convolution of degree 2 along its edges (one y for
# all channels, weights of each sample) with the derivatives that training on forces takes.


def _pattern(l1: int, l2: int, l3: int) -> torch.Tensor:
    """Made-up coefficients at the places that the selection rules of real harmonics leave: all that a budget sees."""
    m1, m2, m3 = (torch.arange(-degree, degree + 1) for degree in (l1, l2, l3))
    m1, m2, m3 = torch.meshgrid(m1, m2, m3, indexing="ij")
    sums = (m3.abs() == m1.abs() + m2.abs()) | (m3.abs() == (m1.abs() - m2.abs()).abs())
    signs = ((m1 < 0).int() + (m2 < 0).int() + (m3 < 0).int()) % 2 == (l1 + l2 + l3) % 2
    values = 1 / torch.arange(2, 2 + m1.numel(), dtype=torch.float64)
    return values.view(m1.shape) * (sums & signs)


def _pattern_spec(degree: int, parities: tuple[int, ...]) -> str:
    degrees, n = range(degree + 1), (degree + 1) ** 2
    triples = [(a, b, c) for a in degrees for b in degrees for c in degrees if abs(a - b) <= c <= a + b]
    paths = [
        f"{a * a},{a},{b * b},{b},{c * c},{c},pattern,0x1p+0" for a, b, c in triples if (a + b + c) % 2 in parities
    ]
    return ";".join([f"{n},{n},{n}", *paths])


def _register(label: str, degree: int, *, gradients: bool, edges: bool, budget: dict[str, int], note: str = "") -> None:
    """``edges``: weights, one y for all channels and a direction; else two signals without weights."""
    spec = _pattern_spec(degree, (0, 1) if edges else (0,))
    n, _, _, num_paths = _sizes(spec)
    inputs = ("x", "y", "w", "hx", "hy", "hw", *["g"] * gradients)
    outputs = ("gx", "gy", "gw") if gradients else ("z",)
    missing = () if edges else ("w", "hx", "hy", "hw", *["gw"] * gradients)
    signature = {"B": "i32", "C": "i32:16"}
    constants: dict[str, Any] = {}
    for name in (*inputs, *outputs):
        strides = [f"stride_{name}{axis}" for axis in ("b", "c", "p" if name.endswith("w") else "n")]
        strides = strides if name in inputs or name == "gw" else []
        if name in missing:
            constants |= dict.fromkeys((name, *strides))
            continue
        signature[name] = "*fp32:16"
        if not strides:
            continue
        signature[strides[0]] = "i32:16"
        if name.endswith("w"):
            constants[strides[1]], signature[strides[2]] = 1, "i32:16"
        else:
            constants[strides[2]] = 1
            signature[strides[1]] = "i32:16" if n % 16 == 0 or (edges and name.endswith("y")) else "i32"
    constants |= {"N1": n, "N2": n, "N3": n, "PATHS": num_paths, "DTYPE": tl.float32, "BB": 1}
    constants["BC"] = lambda target: _tile(128, target, over_samples=False)[1]
    constants["PLAN"] = lambda target: plan(spec)  # made when it is compiled, not on import
    if gradients:
        constants |= {"COMMON_Y": edges, "COMMON_W": False}
    register_config(
        KernelConfig(
            kernel=sparse_product_gradients_kernel if gradients else sparse_product_kernel,
            name=f"sparse_product{'_gradients' * gradients}[fp32,{label}]",
            signature=signature,
            constexprs=constants,
            num_warps=1,
            tensor_cores=False,
            spill_budget=budget,
            note=note,
        )
    )


register_coefficients("pattern", _pattern)
_register("signals,L4", 4, gradients=False, edges=False, budget={})
_register(
    "signals,L4",
    4,
    gradients=True,
    edges=False,
    budget={"gfx942": 512},
    note="A row's x, y, g and gradients are 125 registers; what gfx942 spills are coefficients and products besides.",
)
_register("edges,L2,along", 2, gradients=False, edges=True, budget={})
_register("edges,L2,along", 2, gradients=True, edges=True, budget={})
