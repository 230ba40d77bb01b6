"""Truncated discrete Fourier transforms as matrix products: the two transforms of a spectral convolution.

``tdft2_forward``: X = F1 x F2, ``tdft2_inverse``: y = act(Re(G1 Y G2) + skip), for real planes x, y of size N1 x N2
and k1 x k2 modes. The bases come from the caller and carry scale, truncation and the doubling of one-sided modes, so
that nothing is shifted, padded, cropped or copied, and each operation (the inverse without its epilogue) is the other's
adjoint with transposed, conjugated bases. ``tdft1_forward`` and ``tdft1_inverse`` are the same on lines of N points,
where each is one matrix product. Further axes are the caller's: a leading axis meets the spectrum of the last two,
k1 k2 / (N1 N2) of the field, a plain product that no kernel makes faster.

The epilogue saves nothing of a field's size but ``skip``: its derivative needs p = Re(G1 Y G2) + skip, which
``tdft2_inverse_backward`` computes anew from the modes, to write act'(p) g in one pass. That is one field less to write
and as much memory as an unfused activation, which keeps p; less, if there is no skip or another operation keeps it.

How the kernels multiply complex numbers: with real and imaginary part as neighbours on both sides of a product,
columns (k2, q) of the second basis and rows (k1, p) of the first, the four real products are one real matrix product.
The forward kernel combines them once, behind its loops; the inverse kernel puts the signs into the operand it loads.

Each program handles ``GROUP`` neighbouring (batch, channel) planes at once. Modes are stored modes-major,
(2, k1, k2, B, C), which makes the mixing of channels that follows a plain batched product; but one plane's modes lie
B*C elements apart, and writing them spends a 32-byte sector on 4 bytes. With GROUP planes it is 4 * GROUP bytes. The
planes also fill the 64 rows that a warpgroup's matrix instruction wants where a block has fewer.
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
    Target,
    append_tile,
    bucket,
    cdiv,
    custom_op,
    dot_float32,
    dot_precision,
    register_defaults,
    register_reference,
    zero_tiles,
)

# Shapes in comments: R = BH * GROUP rows (h, g), g fastest; W2 = 2 * width columns (k2, q), q fastest.


@triton.jit
def _load_stacked_columns(f, stride_p, stride_n, stride_k, n, n_end, k_start, k_end, WIDTH: tl.constexpr):
    """[n, (k2, q)] of a basis (2, n, k2): real and imaginary part of a mode as neighbouring columns."""
    j = tl.arange(0, 2 * WIDTH)
    k = k_start + j // 2
    offsets = ((j % 2) * stride_p + k * stride_k)[None, :] + (n * stride_n)[:, None]
    return tl.load(f + offsets, mask=(n < n_end)[:, None] & (k < k_end)[None, :], other=0.0)


@triton.jit
def _store_modes(
    out, acc, k1_start, k2_start, bc, K1, K2, B, C, CONJ: tl.constexpr,
    WIDTH: tl.constexpr, BK1: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Combine acc[(k1, p), (g, k2, q)], the products of part p of one basis with part q of the rows, and store."""
    real_cols, imag_cols = acc.reshape(BK1, 2, GROUP * WIDTH, 2).split()
    rr, ir = real_cols.permute(0, 2, 1).split()
    ri, ii = imag_cols.permute(0, 2, 1).split()
    re = (rr - ii).reshape(BK1, GROUP, WIDTH).permute(0, 2, 1)
    im = (ri + ir).reshape(BK1, GROUP, WIDTH).permute(0, 2, 1)
    if CONJ:  # conj(F1) x conj(F2) = conj(F1 x F2), since x is real
        im = -im
    k1 = (k1_start + tl.arange(0, BK1))[:, None, None]
    k2 = (k2_start + tl.arange(0, WIDTH))[None, :, None]
    planes = B.to(tl.int64) * C
    mask = (k1 < K1) & (k2 < K2) & (bc < B * C)[None, None, :]
    pointers = out + (k1 * K2 + k2) * planes + bc[None, None, :]
    tl.store(pointers, re, mask=mask)
    tl.store(pointers + planes * K1 * K2, im, mask=mask)


@triton.jit(do_not_specialize=["B"])
def tdft2_forward_kernel(
    x, f1, f2, out,
    B, C, N1, N2, K1, K2,
    stride_xb, stride_xc, stride_xh, stride_xw,
    stride_1p, stride_1k, stride_1n,
    stride_2p, stride_2n, stride_2k,
    CONJ: tl.constexpr, PRECISION: tl.constexpr, LOW_DOT: tl.constexpr,
    GROUP: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK1: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out = F1 x F2. A program: GROUP planes, BK1 rows of modes, TILES * WIDTH columns of modes, all of x's planes."""
    tiles_k1 = tl.cdiv(K1, BK1)
    tiles_k2 = tl.cdiv(K2, WIDTH * TILES)
    # The tiles of one group of planes are neighbours, so that the second of them finds x in the L2 cache.
    pid = tl.program_id(0)
    k2_start = (pid % tiles_k2) * (WIDTH * TILES)
    k1_start = (pid // tiles_k2 % tiles_k1) * BK1
    bc_start = (pid // (tiles_k2 * tiles_k1)).to(tl.int64) * GROUP

    row = tl.arange(0, BH * GROUP)
    row_h = row // GROUP
    row_bc = bc_start + row % GROUP
    row_base = (row_bc // C) * stride_xb + (row_bc % C) * stride_xc
    row_inside = row_bc < B * C
    i = tl.arange(0, 2 * BK1)  # rows (k1, p) of the first basis
    f1_rows = (i % 2) * stride_1p + (k1_start + i // 2) * stride_1k
    f1_inside = k1_start + i // 2 < K1
    LOW: tl.constexpr = LOW_DOT and x.dtype.element_ty == tl.bfloat16

    # A tuple of accumulators, a tile of WIDTH columns of modes each.
    acc = zero_tiles(2 * BK1, GROUP * 2 * WIDTH, TILES)
    for h_start in range(0, N1, BH):
        h = h_start + row_h
        row_pointers = x + row_base + h.to(tl.int64) * stride_xh
        row_mask = row_inside & (h < N1)
        rows = zero_tiles(BH * GROUP, 2 * WIDTH, TILES)
        for w_start in range(0, N2, BW):
            w = w_start + tl.arange(0, BW)
            block = tl.load(
                row_pointers[:, None] + w.to(tl.int64)[None, :] * stride_xw,
                mask=row_mask[:, None] & (w < N2)[None, :],
                other=0.0,
            )
            if not LOW:
                block = block.to(tl.float32)
            summed = ()
            for t in tl.static_range(TILES):
                k2 = k2_start + t * WIDTH
                basis = _load_stacked_columns(f2, stride_2p, stride_2n, stride_2k, w, N2, k2, K2, WIDTH)
                if LOW:
                    summed = append_tile(summed, tl.dot(block, basis.to(tl.bfloat16), rows[t]))
                else:
                    summed = append_tile(summed, dot_float32(block, basis, rows[t], PRECISION))
            rows = summed
        n = h_start + tl.arange(0, BH)
        left = tl.load(
            f1 + (f1_rows[:, None] + n[None, :] * stride_1n), mask=f1_inside[:, None] & (n < N1)[None, :], other=0.0
        )
        summed = ()
        for t in tl.static_range(TILES):
            # [(h, g), (k2, q)] -> [h, (g, k2, q)]: the planes become columns.
            summed = append_tile(summed, dot_float32(left, rows[t].reshape(BH, GROUP * 2 * WIDTH), acc[t], PRECISION))
        acc = summed

    bc = bc_start + tl.arange(0, GROUP)
    for t in tl.static_range(TILES):
        _store_modes(out, acc[t], k1_start, k2_start + t * WIDTH, bc, K1, K2, B, C, CONJ, WIDTH, BK1, GROUP)


@triton.jit
def _columns(
    y, g1, n, n_end, k2_start, bc, K1, K2, B, C, stride_1p, stride_1n, stride_1k,
    CONJ: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    GROUP: tl.constexpr, BH: tl.constexpr, BK1: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Z = G1 Y for the rows n and k2_start + [0, TILES * WIDTH) of GROUP planes: tiles [(h, g), (k2, q)]."""
    planes = B.to(tl.int64) * C
    i = tl.arange(0, 2 * BK1)  # contraction index (k1, p)
    j = tl.arange(0, 2 * WIDTH)
    # Zr = G1r Yr - G1i Yi and Zi = G1r Yi + G1i Yr: part p of G1 and part q of Z meet plane p xor q of Y.
    part = (i % 2)[:, None] ^ (j % 2)[None, :]
    sign = tl.where((part == 1) & ((i % 2) == (0 if CONJ else 1))[:, None], -1.0, 1.0)
    y_parts = y + part * (planes * K1 * K2)
    z = zero_tiles(BH, GROUP * 2 * WIDTH, TILES)
    for k1_start in range(0, K1, BK1):
        k1 = k1_start + i // 2
        left = tl.load(
            g1 + (((i % 2) * stride_1p + k1 * stride_1k)[None, :] + (n * stride_1n)[:, None]),
            mask=(n < n_end)[:, None] & (k1 < K1)[None, :],
            other=0.0,
        )
        summed = ()
        for t in tl.static_range(TILES):
            k2 = k2_start + t * WIDTH + j // 2
            pointers = y_parts + (k1[:, None] * K2 + k2[None, :]) * planes
            inside = (k1 < K1)[:, None] & (k2 < K2)[None, :]
            right = tl.load(
                pointers[:, :, None] + bc[None, None, :],
                mask=inside[:, :, None] & (bc < planes)[None, None, :],
                other=0.0,
            )
            right = (right * sign[:, :, None]).permute(0, 2, 1).reshape(2 * BK1, GROUP * 2 * WIDTH)
            summed = append_tile(summed, dot_float32(left, right, z[t], PRECISION))
        z = summed
    tiles = ()
    for t in tl.static_range(TILES):
        tile = z[t].reshape(BH * GROUP, 2 * WIDTH)
        tiles = append_tile(tiles, tile.to(tl.bfloat16) if LOW else tile)
    return tiles


@triton.jit
def _add_rows(
    acc, tiles, g2, stride_p, stride_k, stride_n, k_start, K2, n, n_end,
    PRECISION: tl.constexpr, LOW: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """acc + Re(Z G2) for the columns n: Zr G2r - Zi G2i, with the rows (k2, q) of G2 negated where q = 1."""
    j = tl.arange(0, 2 * WIDTH)
    for t in tl.static_range(TILES):
        k = k_start + t * WIDTH + j // 2
        offsets = ((j % 2) * stride_p + k * stride_k)[:, None] + (n * stride_n)[None, :]
        basis = tl.load(g2 + offsets, mask=(k < K2)[:, None] & (n < n_end)[None, :], other=0.0)
        basis = tl.where((j % 2 == 1)[:, None], -basis, basis)
        if LOW:
            acc = tl.dot(tiles[t], basis.to(tl.bfloat16), acc)
        else:
            acc = dot_float32(tiles[t], basis, acc, PRECISION)
    return acc


@triton.jit
def _finish(acc, skip, skip_offsets, grad, grad_offsets, mask, ACTIVATION: tl.constexpr):
    """act(acc + skip), or act'(acc + skip) grad where there is a ``grad``."""
    if skip is not None:
        acc += tl.load(skip + skip_offsets, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        twice_cdf = 1 + tl.erf(acc * 0.7071067811865476)
    if grad is None:
        if ACTIVATION == "gelu":
            acc = 0.5 * acc * twice_cdf
        elif ACTIVATION == "relu":
            acc = tl.where(acc < 0, 0.0, acc)  # NaN stays NaN
    else:
        slope = tl.where(acc > 0, 1.0, 0.0)
        if ACTIVATION == "gelu":
            slope = 0.5 * twice_cdf + acc * tl.exp(-0.5 * acc * acc) * 0.3989422804014327
        acc = slope * tl.load(grad + grad_offsets, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["B", "w_chunk"])
def tdft2_inverse_kernel(
    y, g1, g2, skip, grad, out,
    B, C, N1, N2, K1, K2,
    stride_1p, stride_1n, stride_1k,
    stride_2p, stride_2k, stride_2n,
    stride_sb, stride_sc, stride_sh, stride_sw,
    stride_gb, stride_gc, stride_gh, stride_gw,
    w_chunk,
    ACTIVATION: tl.constexpr, CONJ: tl.constexpr, PRECISION: tl.constexpr, LOW_DOT: tl.constexpr,
    GROUP: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK1: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, COVERED: tl.constexpr,
):  # fmt: skip
    """out = act(Re(G1 Y G2) + skip). A program: BH rows of GROUP planes, w_chunk columns (a multiple of BW), all modes.

    With ``grad``: out = act'(Re(G1 Y G2) + skip) grad.
    """
    chunks = tl.cdiv(N2, w_chunk)
    tiles_h = tl.cdiv(N1, BH)
    # The row blocks of one group of planes are neighbours: they read the same modes.
    pid = tl.program_id(0)
    w_first = (pid % chunks) * w_chunk
    h_start = (pid // chunks % tiles_h) * BH
    bc_start = (pid // (chunks * tiles_h)).to(tl.int64) * GROUP
    n = h_start + tl.arange(0, BH)
    bc = bc_start + tl.arange(0, GROUP)

    row = tl.arange(0, BH * GROUP)
    row_h = h_start + row // GROUP
    row_bc = bc_start + row % GROUP
    row_pointers = out + (row_bc * N1 + row_h) * N2
    row_mask = (row_bc < B * C) & (row_h < N1)
    skip_rows = row_bc // C * stride_sb + row_bc % C * stride_sc + row_h.to(tl.int64) * stride_sh
    grad_rows = row_bc // C * stride_gb + row_bc % C * stride_gc + row_h.to(tl.int64) * stride_gh
    LOW: tl.constexpr = LOW_DOT and out.dtype.element_ty == tl.bfloat16

    if COVERED:  # the tiles hold all of k2: Z once for all columns of the program
        tiles = _columns(
            y, g1, n, N1, 0, bc, K1, K2, B, C, stride_1p, stride_1n, stride_1k,
            CONJ, PRECISION, LOW, GROUP, BH, BK1, WIDTH, TILES,
        )  # fmt: skip
    for w_start in range(w_first, min(w_first + w_chunk, N2), BW):
        w = w_start + tl.arange(0, BW)
        acc = tl.zeros((BH * GROUP, BW), tl.float32)
        if COVERED:
            acc = _add_rows(acc, tiles, g2, stride_2p, stride_2k, stride_2n, 0, K2, w, N2, PRECISION, LOW, WIDTH, TILES)
        else:
            for k2 in range(0, K2, TILES * WIDTH):
                tiles = _columns(
                    y, g1, n, N1, k2, bc, K1, K2, B, C, stride_1p, stride_1n, stride_1k,
                    CONJ, PRECISION, LOW, GROUP, BH, BK1, WIDTH, TILES,
                )  # fmt: skip
                acc = _add_rows(
                    acc, tiles, g2, stride_2p, stride_2k, stride_2n, k2, K2, w, N2, PRECISION, LOW, WIDTH, TILES
                )
        mask = row_mask[:, None] & (w < N2)[None, :]
        skip_offsets = skip_rows[:, None] + w.to(tl.int64)[None, :] * stride_sw
        grad_offsets = grad_rows[:, None] + w.to(tl.int64)[None, :] * stride_gw
        acc = _finish(acc, skip, skip_offsets, grad, grad_offsets, mask, ACTIVATION)
        tl.store(row_pointers[:, None] + w[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "n_chunk"])
def tdft1_forward_kernel(
    x, f, out,
    B, C, N, K,
    stride_xb, stride_xc, stride_xn,
    stride_p, stride_n, stride_k,
    n_chunk,
    CONJ: tl.constexpr, PRECISION: tl.constexpr, LOW_DOT: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[chunk] = x F over a chunk of points. A program: BP lines (b, c), WIDTH modes, n_chunk (BN times) points."""
    chunks = tl.cdiv(N, n_chunk)
    tiles_k = tl.cdiv(K, WIDTH)
    pid = tl.program_id(0)
    k_start = (pid % tiles_k) * WIDTH
    chunk = pid // tiles_k % chunks
    lines = B.to(tl.int64) * C
    bc = (pid // (tiles_k * chunks)).to(tl.int64) * BP + tl.arange(0, BP)
    inside = bc < lines
    base = x + (bc // C) * stride_xb + (bc % C) * stride_xc
    LOW: tl.constexpr = LOW_DOT and x.dtype.element_ty == tl.bfloat16

    acc = tl.zeros((BP, 2 * WIDTH), tl.float32)
    n_end = min((chunk + 1) * n_chunk, N)
    for n_start in range(chunk * n_chunk, n_end, BN):
        n = n_start + tl.arange(0, BN)
        pointers = base[:, None] + n.to(tl.int64)[None, :] * stride_xn
        block = tl.load(pointers, mask=inside[:, None] & (n < n_end)[None, :], other=0.0)
        basis = _load_stacked_columns(f, stride_p, stride_n, stride_k, n, n_end, k_start, K, WIDTH)
        if LOW:
            acc = tl.dot(block, basis.to(tl.bfloat16), acc)
        else:
            acc = dot_float32(block.to(tl.float32), basis, acc, PRECISION)
    re, im = acc.reshape(BP, WIDTH, 2).split()
    if CONJ:
        im = -im
    k = k_start + tl.arange(0, WIDTH)
    mask = inside[:, None] & (k < K)[None, :]
    pointers = out + (2 * chunk * K + k)[None, :] * lines + bc[:, None]
    tl.store(pointers, re, mask=mask)
    tl.store(pointers + K * lines, im, mask=mask)


@triton.jit(do_not_specialize=["B"])
def tdft1_inverse_kernel(
    y, g, skip, grad, out,
    B, C, N, K,
    stride_p, stride_k, stride_n,
    stride_sb, stride_sc, stride_sn,
    stride_gb, stride_gc, stride_gn,
    ACTIVATION: tl.constexpr, CONJ: tl.constexpr, PRECISION: tl.constexpr, LOW_DOT: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = act(Re(Y G) + skip), or act'(Re(Y G) + skip) grad. A program: BP lines (b, c), BN points, all modes."""
    tiles_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    n = (pid % tiles_n) * BN + tl.arange(0, BN)
    lines = B.to(tl.int64) * C
    bc = (pid // tiles_n).to(tl.int64) * BP + tl.arange(0, BP)
    j = tl.arange(0, 2 * WIDTH)  # (k, q)
    sign = tl.where((j % 2 == 1) & CONJ, -1.0, 1.0)
    LOW: tl.constexpr = LOW_DOT and out.dtype.element_ty == tl.bfloat16

    acc = tl.zeros((BP, BN), tl.float32)
    for k_start in range(0, K, WIDTH):
        k = k_start + j // 2
        pointers = y + ((j % 2) * K + k)[None, :] * lines + bc[:, None]
        modes = tl.load(pointers, mask=(bc < lines)[:, None] & (k < K)[None, :], other=0.0) * sign[None, :]
        tiles = (modes.to(tl.bfloat16) if LOW else modes,)
        acc = _add_rows(acc, tiles, g, stride_p, stride_k, stride_n, k_start, K, n, N, PRECISION, LOW, WIDTH, 1)
    mask = (bc < lines)[:, None] & (n < N)[None, :]
    n = n.to(tl.int64)[None, :]
    skip_offsets = (bc // C * stride_sb + bc % C * stride_sc)[:, None] + n * stride_sn
    grad_offsets = (bc // C * stride_gb + bc % C * stride_gc)[:, None] + n * stride_gn
    acc = _finish(acc, skip, skip_offsets, grad, grad_offsets, mask, ACTIVATION)
    tl.store(out + bc[:, None] * N + n, acc.to(out.dtype.element_ty), mask=mask)


# Configurations. A candidate is a dict of the kernel's tile constexprs, num_warps and num_stages. Tiles of 16 columns
# of modes: k2 = m // 2 + 1 is a power of two plus one for the usual m, and 33 shall cost 48 columns, not 64.


def _extent(n: int, most: int) -> int:
    """The tile for a dimension of size n: a power of two, at least the 16 that ``tl.dot`` wants."""
    return min(max(16, bucket(n)), most)


def _forward_tiles(k2: int) -> int:
    """Tiles of 16 columns a program takes: a further pass over x costs about half a tile."""
    return min((3, 2, 1), key=lambda tiles: cdiv(k2, 16 * tiles) * (tiles + 0.5))


def _warpgroup(target: Target) -> bool:
    """Whether the target multiplies by warpgroups of 4 warps and has 227 KB of shared memory: sm_90 and sm_100."""
    return target[0] == "cuda" and 90 <= int(target[1]) < 120


def _forward_candidates(n1: int, n2: int, k1: int, k2: int, few: bool, target: Target) -> list[dict[str, Any]]:
    """Launch configurations of the forward kernel, the default first; ``few``: too few planes to fill the GPU."""
    tensor_memory = target[0] == "cuda" and 100 <= int(target[1]) < 120  # its 512 columns do not hold more accumulators
    bk1 = _extent(k1, 32 if few or tensor_memory else 64)
    tiles = 1 if few else _forward_tiles(k2)
    shapes: tuple[tuple[int, int, int, int], ...]  # GROUP, BH, BW, TILES
    if few:
        shapes = ((1, 64, 16, 1), (1, 32, 32, 1), (2, 32, 32, 1))
    else:
        shapes = ((2, 32, 16, tiles), (1, 64, 16, tiles), (2, 32, 32, min(tiles, 2)), (4, 16, 16, 1), (4, 32, 32, 1))
    found: list[dict[str, Any]] = []
    for group, bh, bw, count in shapes:
        bh = _extent(n1, bh)
        candidate = {
            "GROUP": group if few else max(group, 64 // bh),
            "BH": bh,
            "BW": _extent(n2, bw),
            "BK1": bk1,
            "WIDTH": 16,
            "TILES": count,
            "num_warps": 8 if bk1 == 64 else 4,
            "num_stages": 2,
        }
        if candidate not in found:
            found.append(candidate)
    return found


def _inverse_candidates(n1: int, n2: int, k1: int, k2: int, few: bool, target: Target) -> list[dict[str, Any]]:
    """Launch configurations of the inverse kernel, the default first."""
    tiles = cdiv(k2, 16)
    covered = tiles <= (5 if _warpgroup(target) else 3)
    shapes: tuple[tuple[int, int, int, int], ...]  # GROUP, BH, BW, num_warps
    if few:
        shapes = ((1, 64, 32, 8), (2, 32, 32, 8), (1, 32, 32, 4))
    elif _warpgroup(target):  # the larger tile keeps Z in shared memory, up to 200 KB of it
        shapes = ((2, 64, 32, 8), (2, 32, 32, 8), (4, 32, 32, 8), (1, 64, 32, 8))
    else:
        shapes = ((2, 32, 32, 8), (4, 16, 32, 8), (1, 64, 32, 8))
    found: list[dict[str, Any]] = []
    for group, bh, bw, warps in shapes:
        bh = _extent(n1, bh)
        candidate = {
            "GROUP": group if few else max(group, 64 // bh),
            "BH": bh,
            "BW": _extent(n2, bw),
            "BK1": 16,
            "WIDTH": 16,
            "TILES": tiles if covered else 3,
            "COVERED": covered,
            "num_warps": warps,
            "num_stages": 2,
        }
        if candidate not in found:
            found.append(candidate)
    return found


def _line_candidates(n: int, k: int, few: bool, forward: bool) -> list[dict[str, Any]]:
    """Launch configurations of the 1-D kernels, the default first."""
    width = _extent(k, 32 if forward else 16)
    shapes = ((64, 32), (128, 32)) if forward else ((64, 64), (128, 64), (64, 128))  # BP, BN
    found: list[dict[str, Any]] = []
    for bp, bn in shapes[:1] if few else shapes:
        candidate = {"BP": bp, "BN": _extent(n, bn), "WIDTH": width, "num_warps": bp // 16, "num_stages": 2}
        if candidate not in found:
            found.append(candidate)
    return found


# Launchers. Bases come as a tuple: (f,) in one dimension, (f1, f2) in two.

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "relu", "gelu")


def _check_basis(
    name: str, basis: torch.Tensor, shape: tuple[int | None, ...], layout: str, device: torch.device
) -> None:
    if basis.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {basis.dtype}")
    if basis.ndim != 3 or any(want not in (None, got) for want, got in zip(shape, basis.shape, strict=True)):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {layout} = ({wanted}), got {tuple(basis.shape)}")
    if basis.device != device:
        raise ValueError(f"{name} must be on {device}, got {basis.device}")
    span = sum(stride * (size - 1) for stride, size in zip(basis.stride(), basis.shape, strict=True))
    if span >= 2**31:  # the kernels address bases, and only them, by 32-bit offsets
        raise ValueError(f"{name} must span less than 2^31 elements of memory, got {span}: pass a contiguous copy")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def _check_forward(x: torch.Tensor, bases: tuple[torch.Tensor, ...]) -> None:
    _check_dtype("x", x.dtype)
    d = len(bases)
    if x.ndim != d + 2:
        raise ValueError(f"x must have shape {'(B, C, N)' if d == 1 else '(B, C, N1, N2)'}, got {tuple(x.shape)}")
    if d == 1:
        _check_basis("f", bases[0], (2, x.shape[2], None), "(2, N, k)", x.device)
    else:
        _check_basis("f1", bases[0], (2, None, x.shape[2]), "(2, k1, N1)", x.device)
        _check_basis("f2", bases[1], (2, x.shape[3], None), "(2, N2, k2)", x.device)


def _check_inverse(
    y: torch.Tensor,
    bases: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    skip: torch.Tensor | None = None,
    activation: str | None = None,
) -> None:
    if y.dtype != torch.float32:
        raise TypeError(f"y must be float32, got {y.dtype}")
    _check_dtype("dtype", dtype)
    d = len(bases)
    if y.ndim != d + 3 or y.shape[0] != 2:
        raise ValueError(f"y must have shape {'(2, k, B, C)' if d == 1 else '(2, k1, k2, B, C)'}, got {tuple(y.shape)}")
    if d == 1:
        _check_basis("g", bases[0], (2, y.shape[1], None), "(2, k, N)", y.device)
    else:
        _check_basis("g1", bases[0], (2, None, y.shape[1]), "(2, N1, k1)", y.device)
        _check_basis("g2", bases[1], (2, y.shape[2], None), "(2, k2, N2)", y.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if skip is not None:
        _check_field("skip", skip, y, bases)


def _check_field(name: str, field: torch.Tensor, y: torch.Tensor, bases: tuple[torch.Tensor, ...]) -> None:
    _check_dtype(name, field.dtype)
    if field.shape != _field_shape(y, bases):
        raise ValueError(f"{name} must have the result's shape {_field_shape(y, bases)}, got {tuple(field.shape)}")
    if field.device != y.device:
        raise ValueError(f"{name} must be on {y.device}, got {field.device}")


def _modes_shape(x: torch.Tensor, bases: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    modes = (bases[0].shape[2],) if len(bases) == 1 else (bases[0].shape[1], bases[1].shape[2])
    return (2, *modes, x.shape[0], x.shape[1])


def _field_shape(y: torch.Tensor, bases: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    grid = (bases[0].shape[2],) if len(bases) == 1 else (bases[0].shape[1], bases[1].shape[2])
    return (*y.shape[-2:], *grid)


def _precision(target: Target, requested: str | None, dtype: torch.dtype) -> str:
    """That of the products; "low" is what fields of 16 bits get, whatever the dtype."""
    low = requested == "low"
    return dot_precision(target, None if low else requested, low=low or dtype != torch.float32)


def _launch_forward(x, *bases, precision=None, conj=False, candidates=None) -> torch.Tensor:
    """Run a forward kernel; ``candidates`` overrides the launch configurations (tests go through all of them)."""
    _check_forward(x, bases)
    out = torch.empty(_modes_shape(x, bases), dtype=torch.float32, device=x.device)
    if out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    target = _lib.target_of(x.device)
    precision = _precision(target, precision, x.dtype)
    units = _lib.multiprocessors(x.device)
    fixed = {"CONJ": conj, "PRECISION": precision, "LOW_DOT": not INTERPRET}
    planes = x.shape[0] * x.shape[1]
    strides = [stride for basis in bases for stride in basis.stride()]
    sizes: tuple[int, ...]
    if len(bases) == 1:
        n, k = x.shape[2], out.shape[1]
        few = cdiv(planes, 64) < units

        def launch(meta: dict[str, Any]) -> None:
            # Too few lines to fill the GPU: share out the points too, and sum the shares in a fixed order.
            tiles = cdiv(planes, meta["BP"]) * cdiv(k, meta["WIDTH"])
            n_chunk = cdiv(cdiv(n, cdiv(units, tiles)), 4 * meta["BN"]) * 4 * meta["BN"]
            chunks = cdiv(n, n_chunk)
            parts = out if chunks == 1 else out.new_empty((chunks, *out.shape))
            tdft1_forward_kernel[(tiles * chunks,)](
                x, bases[0], parts, *x.shape, k, *x.stride(), *strides, n_chunk, **fixed, **meta
            )
            if chunks > 1:
                torch.sum(parts, 0, out=out)

        name, sizes, default = "tdft1_forward", (bucket(n), k), _line_candidates(n, k, few, True)
    else:
        (n1, n2), (k1, k2) = x.shape[2:], out.shape[1:3]
        few = cdiv(planes, 2) * cdiv(k2, 48) * cdiv(k1, 64) < units

        def launch(meta: dict[str, Any]) -> None:
            tiles = cdiv(k1, meta["BK1"]) * cdiv(k2, meta["WIDTH"] * meta["TILES"])
            tdft2_forward_kernel[(cdiv(planes, meta["GROUP"]) * tiles,)](
                x, *bases, out, *x.shape, k1, k2, *x.stride(), *strides, **fixed, **meta
            )

        name, sizes = "tdft2_forward", (bucket(n1), bucket(n2), k1, k2)
        default = _forward_candidates(n1, n2, k1, k2, few, target)
    with _lib.device_guard(x):
        launch(_lib.pick(name, (x.dtype, *sizes, few, precision), candidates or default, launch, x.device))
    return out


def _launch_inverse(
    y, *bases, dtype=torch.float32, precision=None, conj=False, skip=None, activation=None, grad=None, candidates=None
) -> torch.Tensor:
    """Run an inverse kernel, with ``grad`` the one of the epilogue's derivative; ``candidates`` as above."""
    _check_inverse(y, bases, dtype, skip, activation)
    if grad is not None:
        _check_field("grad", grad, y, bases)
    out = torch.empty(_field_shape(y, bases), dtype=dtype, device=y.device)
    if out.numel() == 0:
        return out
    y = y.contiguous()  # modes are few, and neighbouring planes are read as vectors
    target = _lib.target_of(y.device)
    precision = _precision(target, precision, dtype)
    units = _lib.multiprocessors(y.device)
    fixed = {"ACTIVATION": activation, "CONJ": conj, "PRECISION": precision, "LOW_DOT": not INTERPRET}
    planes = out.shape[0] * out.shape[1]
    strides = [stride for basis in bases for stride in basis.stride()]
    for field in (skip, grad):
        strides += [0] * out.ndim if field is None else field.stride()
    sizes: tuple[int, ...]
    if len(bases) == 1:
        n, k = out.shape[2], y.shape[1]
        few = cdiv(planes, 64) * cdiv(n, 64) < units

        def launch(meta: dict[str, Any]) -> None:
            grid = (cdiv(planes, meta["BP"]) * cdiv(n, meta["BN"]),)
            tdft1_inverse_kernel[grid](y, *bases, skip, grad, out, *out.shape, k, *strides, **fixed, **meta)

        name, sizes, default = "tdft1_inverse", (bucket(n), k), _line_candidates(n, k, few, False)
    else:
        (n1, n2), (k1, k2) = out.shape[2:], y.shape[1:3]
        few = cdiv(planes, 2) * cdiv(n1, 64) < units

        def launch(meta: dict[str, Any]) -> None:
            tiles = cdiv(planes, meta["GROUP"]) * cdiv(n1, meta["BH"])
            # Too few programs still: share out the columns too, at the price of computing Z once for each share.
            chunks = min(cdiv(units, tiles), cdiv(n2, meta["BW"]))
            w_chunk = cdiv(cdiv(n2, chunks), meta["BW"]) * meta["BW"]
            tdft2_inverse_kernel[(tiles * cdiv(n2, w_chunk),)](
                y, *bases, skip, grad, out, *out.shape, k1, k2, *strides, w_chunk, **fixed, **meta
            )

        name, sizes = "tdft2_inverse", (bucket(n1), bucket(n2), k1, k2)
        default = _inverse_candidates(n1, n2, k1, k2, few, target)
    key = (dtype, *sizes, few, precision, skip is not None, activation, grad is not None)
    with _lib.device_guard(y):
        launch(_lib.pick(name, key, candidates or default, launch, y.device))
    return out


# Plain torch


def _forward_reference(x, *bases, precision=None, conj=False) -> torch.Tensor:
    _check_forward(x, bases)
    _precision(("cpu", ""), precision, x.dtype)
    equation = "bcw,wl->lbc" if len(bases) == 1 else "kh,bchw,wl->klbc"
    first = [torch.complex(*basis) for basis in bases]
    modes = torch.einsum(equation, *first[:-1], x.to(torch.complex64), first[-1])
    return torch.stack((modes.real, -modes.imag if conj else modes.imag))


def _activate(p: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation == "gelu":
        return torch.nn.functional.gelu(p)
    return p.relu() if activation == "relu" else p


def _slope(p: torch.Tensor, activation: str | None) -> torch.Tensor:
    """act'(p)."""
    if activation is None:
        return torch.ones_like(p)
    if activation == "relu":
        return (p > 0).to(p.dtype)
    return 0.5 * (1 + torch.erf(p / math.sqrt(2))) + p * torch.exp(-0.5 * p * p) / math.sqrt(2 * math.pi)


def _inverse_reference(
    y, *bases, dtype=torch.float32, precision=None, conj=False, skip=None, activation=None, grad=None
) -> torch.Tensor:
    _check_inverse(y, bases, dtype, skip, activation)
    _precision(("cpu", ""), precision, dtype)
    modes = torch.complex(y[0], -y[1] if conj else y[1])
    equation = "lbc,lw->bcw" if len(bases) == 1 else "hk,klbc,lw->bchw"
    first = [torch.complex(*basis) for basis in bases]
    p = torch.einsum(equation, *first[:-1], modes, first[-1]).real
    if skip is not None:
        p = p + skip
    if grad is None:
        return _activate(p, activation).to(dtype).contiguous()
    return (_slope(p, activation) * grad).to(dtype).contiguous()


# Operations: for one and for two dimensions, which differ in their bases only


def _tdft1_forward(x: torch.Tensor, f: torch.Tensor, precision: str | None = None, conj: bool = False) -> torch.Tensor:
    return _launch_forward(x, f, precision=precision, conj=conj)


def _tdft2_forward(
    x: torch.Tensor, f1: torch.Tensor, f2: torch.Tensor, precision: str | None = None, conj: bool = False
) -> torch.Tensor:
    return _launch_forward(x, f1, f2, precision=precision, conj=conj)


def _tdft1_inverse(
    y: torch.Tensor,
    g: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    conj: bool = False,
    skip: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    return _launch_inverse(y, g, dtype=dtype, precision=precision, conj=conj, skip=skip, activation=activation)


def _tdft2_inverse(
    y: torch.Tensor,
    g1: torch.Tensor,
    g2: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    conj: bool = False,
    skip: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    return _launch_inverse(y, g1, g2, dtype=dtype, precision=precision, conj=conj, skip=skip, activation=activation)


def _tdft1_inverse_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    g: torch.Tensor,
    precision: str | None,
    conj: bool,
    skip: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    return _launch_inverse(
        y, g, dtype=grad.dtype, precision=precision, conj=conj, skip=skip, activation=activation, grad=grad
    )


def _tdft2_inverse_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    g1: torch.Tensor,
    g2: torch.Tensor,
    precision: str | None,
    conj: bool,
    skip: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    return _launch_inverse(
        y, g1, g2, dtype=grad.dtype, precision=precision, conj=conj, skip=skip, activation=activation, grad=grad
    )


_forward_ops = {1: custom_op("tdft1_forward", _tdft1_forward), 2: custom_op("tdft2_forward", _tdft2_forward)}
_inverse_ops = {1: custom_op("tdft1_inverse", _tdft1_inverse), 2: custom_op("tdft2_inverse", _tdft2_inverse)}
_backward_ops = {
    1: custom_op("tdft1_inverse_backward", _tdft1_inverse_backward),
    2: custom_op("tdft2_inverse_backward", _tdft2_inverse_backward),
}


def _forward_setup(ctx, inputs, output) -> None:
    x, *bases, ctx.precision, ctx.conj = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*bases)


def _forward_backward(ctx, grad):
    bases = ctx.saved_tensors
    _no_basis_gradient(ctx, len(bases))
    back = [basis.transpose(1, 2) for basis in bases]
    grad_x = _inverse_ops[len(bases)](grad, *back, ctx.dtype, ctx.precision, not ctx.conj)
    return grad_x, *(None,) * (len(bases) + 2)


def _inverse_setup(ctx, inputs, output) -> None:
    y, *bases, _, ctx.precision, ctx.conj, skip, ctx.activation = inputs
    kept = () if ctx.activation is None else (y,) if skip is None else (y, skip)
    ctx.skip_dtype = None if skip is None else skip.dtype
    ctx.n_bases = len(bases)
    ctx.save_for_backward(*bases, *kept)


def _inverse_backward(ctx, grad):
    d = ctx.n_bases
    _no_basis_gradient(ctx, d)
    bases, kept = ctx.saved_tensors[:d], ctx.saved_tensors[d:]
    if kept:
        y, skip = kept[0], kept[1] if len(kept) == 2 else None
        if torch.is_grad_enabled():  # to be differentiated again: every step an operation that can be
            p = _inverse_ops[d](y, *bases, torch.float32, ctx.precision, ctx.conj)
            p = p if skip is None else p + skip
            grad = _slope(p, ctx.activation) * grad
        else:
            grad = _backward_ops[d](grad, y, *bases, ctx.precision, ctx.conj, skip, ctx.activation)
    grad_y = grad_skip = None
    if ctx.needs_input_grad[0]:
        back = [basis.transpose(1, 2) for basis in bases]
        grad_y = _forward_ops[d](grad, *back, ctx.precision, not ctx.conj)
    # Arguments behind the last one that was given have no entry in needs_input_grad.
    if ctx.skip_dtype is not None and ctx.needs_input_grad[d + 4]:
        grad_skip = grad.to(ctx.skip_dtype)
    return grad_y, *(None,) * (d + 3), grad_skip, None


def _no_basis_gradient(ctx, d: int) -> None:
    if any(ctx.needs_input_grad[1 : d + 1]):
        raise ValueError("the bases of a transform must not require gradients: they are tables")


_FORWARD_OPTIONS: dict[str, Any] = {"precision": None, "conj": False}
_BACKWARD_OPTIONS: dict[str, Any] = _FORWARD_OPTIONS | {"skip": None, "activation": None}
_INVERSE_OPTIONS: dict[str, Any] = {"dtype": torch.float32} | _BACKWARD_OPTIONS


def _register_operations(d: int) -> None:
    forward, inverse, backward = _forward_ops[d], _inverse_ops[d], _backward_ops[d]

    def split(defaults: dict[str, Any], rest: tuple) -> tuple[tuple, dict[str, Any]]:
        """The bases, and the options by name: the dispatcher leaves out what has its default value."""
        return rest[:d], defaults | dict(zip(defaults, rest[d:], strict=False))

    def forward_reference(x, *rest):
        bases, options = split(_FORWARD_OPTIONS, rest)
        return _forward_reference(x, *bases, **options)

    def inverse_reference(y, *rest):
        bases, options = split(_INVERSE_OPTIONS, rest)
        return _inverse_reference(y, *bases, **options)

    def backward_reference(grad, y, *rest):
        bases, options = split(_BACKWARD_OPTIONS, rest)
        return _inverse_reference(y, *bases, **options, dtype=grad.dtype, grad=grad)

    register_reference(forward, forward_reference)
    register_reference(inverse, inverse_reference)
    register_reference(backward, backward_reference)

    @forward.register_fake
    def _(x, *rest):
        return x.new_empty(_modes_shape(x, rest[:d]), dtype=torch.float32)

    @inverse.register_fake
    def _(y, *rest):
        bases, options = split(_INVERSE_OPTIONS, rest)
        return y.new_empty(_field_shape(y, bases), dtype=options["dtype"])

    @backward.register_fake
    def _(grad, y, *rest):
        return grad.new_empty(grad.shape)

    forward.register_autograd(_forward_backward, setup_context=_forward_setup)
    inverse.register_autograd(_inverse_backward, setup_context=_inverse_setup)


_register_operations(1)
_register_operations(2)


def tdft1_forward(x: torch.Tensor, f: torch.Tensor, precision: str | None = None, conj: bool = False) -> torch.Tensor:
    """The truncated spectrum X = x F of each real line, differentiable in ``x`` to any order.

    Args:
        x: (B, C, N), float32, float16 or bfloat16, any strides.
        f: (2, N, k) float32, real and imaginary part of F, any strides; no gradient.
        precision, conj: as in :func:`tdft2_forward`.

    Returns:
        (2, k, B, C) float32, contiguous.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit, an unknown precision.
    """
    return _forward_ops[1](x, f, precision, conj)


def tdft1_inverse(
    y: torch.Tensor,
    g: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    conj: bool = False,
    skip: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The real lines act(Re(Y G) + skip) of truncated spectra, differentiable in ``y`` and ``skip`` to any order.

    Args:
        y: (2, k, B, C) float32, real and imaginary part.
        g: (2, k, N) float32, real and imaginary part of G, any strides; no gradient.
        dtype, precision, conj, skip, activation: as in :func:`tdft2_inverse`; ``skip`` is (B, C, N).

    Returns:
        (B, C, N) in ``dtype``, contiguous.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit, an unknown precision or activation.
    """
    return _inverse_ops[1](y, g, dtype, precision, conj, skip, activation)


def tdft2_forward(
    x: torch.Tensor, f1: torch.Tensor, f2: torch.Tensor, precision: str | None = None, conj: bool = False
) -> torch.Tensor:
    """The truncated spectrum X = F1 x F2 of each real plane, differentiable in ``x`` to any order.

    Args:
        x: (B, C, N1, N2), float32, float16 or bfloat16, any strides.
        f1: (2, k1, N1) float32, real and imaginary part of F1, any strides; no gradient.
        f2: (2, N2, k2) float32, likewise.
        precision: ``input_precision`` of the float32 products: ``"ieee"``, ``"tf32x3"``, ``"bf16x6"``, ``"tf32"``;
            ``"low"``: what fields of 16 bits have in any case; None follows torch's matmul precision, with float32
            accuracy by default.
        conj: use the conjugates of both bases.

    Returns:
        (2, k1, k2, B, C) float32, contiguous: real and imaginary part of X, modes-major.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit, an unknown precision.
    """
    return _forward_ops[2](x, f1, f2, precision, conj)


def tdft2_inverse(
    y: torch.Tensor,
    g1: torch.Tensor,
    g2: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    conj: bool = False,
    skip: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The real planes act(Re(G1 Y G2) + skip) of truncated spectra, differentiable in ``y``, ``skip`` to any order.

    For a first derivative nothing of the planes' size is kept but ``skip``; higher ones make act's argument anew.

    Args:
        y: (2, k1, k2, B, C) float32, real and imaginary part, modes-major.
        g1: (2, N1, k1) float32, real and imaginary part of G1, any strides; no gradient.
        g2: (2, k2, N2) float32, likewise.
        dtype: of the result: float32, float16 or bfloat16. What is before the rounding to it is float32.
        precision, conj: as in :func:`tdft2_forward`.
        skip: (B, C, N1, N2), float32, float16 or bfloat16, any strides, or None.
        activation: "gelu" (by erf), "relu" or None.

    Returns:
        (B, C, N1, N2) in ``dtype``, contiguous.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit, an unknown precision or activation.
    """
    return _inverse_ops[2](y, g1, g2, dtype, precision, conj, skip, activation)


# Production configurations, for grids N x N with m modes an axis, contiguous, with channels in sixteens.

_NOTE = (
    "mma.sync takes both operands from registers: what spills on sm_80 are addresses that LLVM moves out of the loops, "
    "reloaded once for a block of rows; on sm_100 it is two of them, or four. With 16 modes an axis or less, the "
    "forward kernel's second product has 32 rows (k1, p), and with few planes either kernel's products may have less "
    "than the 64 that wgmma and tcgen05 want."
)


def _add(name: str, kernel, default, signature: dict[str, str], constexprs: dict[str, Any]) -> None:
    register_defaults(
        kernel, name, signature, constexprs, default, spill_budget={"sm_80": 256, "sm_100": 16}, note=_NOTE
    )  # fmt: skip


def _register(n: int, m: int, dtype: str, few: bool = False) -> None:
    k1, k2 = m, m // 2 + 1
    low = dtype != "fp32"
    pointer, table = f"*{dtype}:16", "*fp32:16"
    sizes = {"B": "i32", "C": "i32:16", "N1": "i32:16", "N2": "i32:16", "K1": "i32:16", "K2": "i32"}
    fixed = {"CONJ": False, "PRECISION": lambda target: dot_precision(target, low=low), "LOW_DOT": True}
    forward = {"x": pointer, "f1": table, "f2": table, "out": table} | sizes
    forward |= {"stride_xb": "i32:16", "stride_xc": "i32:16", "stride_xh": "i32:16"}
    forward |= {"stride_1p": "i32:16", "stride_1k": "i32:16", "stride_2p": "i32:16", "stride_2n": "i32"}
    inverse = {"y": table, "g1": table, "g2": table, "out": pointer} | sizes | {"w_chunk": "i32"}
    inverse |= {"stride_1p": "i32:16", "stride_1n": "i32:16", "stride_2p": "i32:16", "stride_2k": "i32:16"}
    skip = {"skip": pointer} | {f"stride_s{axis}": "i32:16" for axis in "bch"}
    grad = {"grad": pointer} | {f"stride_g{axis}": "i32:16" for axis in "bch"}
    none: dict[str, Any] = {"skip": None, "grad": None, "ACTIVATION": None}
    none |= {f"stride_{field}{axis}": 0 for field in "sg" for axis in "bchw"}
    skipped = none | {"stride_sw": 1, "ACTIVATION": "gelu"}

    def add(name: str, kernel, candidates, signature: dict[str, str], constexprs: dict[str, Any]) -> None:
        _add(
            f"tdft2_{name}[{dtype},N{n},m{m}{',few' if few else ''}]",
            kernel,
            lambda target: candidates(n, n, k1, k2, few, target)[0],
            signature,
            {k: v for k, v in (constexprs | fixed).items() if k not in signature},
        )

    ones = {"stride_xw": 1, "stride_1n": 1, "stride_2k": 1}
    add("forward", tdft2_forward_kernel, _forward_candidates, forward, ones)
    ones = {"stride_1k": 1, "stride_2n": 1}
    add("inverse", tdft2_inverse_kernel, _inverse_candidates, inverse, none | ones)
    if (n, dtype) == (128, "fp32"):
        backward = skipped | ones | {"stride_gw": 1}
        add("inverse+gelu'", tdft2_inverse_kernel, _inverse_candidates, inverse | skip | grad, backward)


_register(64, 16, "fp32", few=True)
for _n, _m, _dtype in ((64, 16, "fp32"), (128, 32, "fp32"), (256, 64, "fp32"), (128, 32, "bf16")):
    _register(_n, _m, _dtype)


def _register_lines(n: int, k: int) -> None:
    table = "*fp32:16"
    sizes = {"B": "i32", "C": "i32:16", "N": "i32:16", "K": "i32", "stride_p": "i32:16"}
    fixed = {"CONJ": False, "PRECISION": dot_precision, "LOW_DOT": True}
    forward = {"x": table, "f": table, "out": table} | sizes | {"n_chunk": "i32"}
    forward |= {"stride_xb": "i32:16", "stride_xc": "i32:16", "stride_n": "i32"}
    inverse = {"y": table, "g": table, "skip": table, "out": table} | sizes
    inverse |= {"stride_sb": "i32:16", "stride_sc": "i32:16", "stride_k": "i32:16"}
    ones = {"stride_xn": 1, "stride_k": 1} | fixed
    _add(
        f"tdft1_forward[fp32,N{n},k{k}]",
        tdft1_forward_kernel,
        lambda target: _line_candidates(n, k, False, True)[0],
        forward,
        ones,
    )
    ones = {"stride_n": 1, "stride_sn": 1, "grad": None, "ACTIVATION": "gelu"} | fixed
    _add(
        f"tdft1_inverse+gelu[fp32,N{n},k{k}]",
        tdft1_inverse_kernel,
        lambda target: _line_candidates(n, k, False, False)[0],
        inverse,
        ones | dict.fromkeys(("stride_gb", "stride_gc", "stride_gn"), 0),
    )


_register_lines(4096, 33)
