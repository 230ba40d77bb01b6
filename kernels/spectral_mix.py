"""Mixing of channels mode by mode, Y[f,b,s] = Σ_r X[f,b,r] W[r,s,f], complex, with W dense, Tucker or CP.

``spectral_mix``: W itself. ``spectral_mix_tucker``: W[r,s,(m,n)] = Σ_q H[r,s,m,q] D[n,q], the core contracted with all
factors but that of the last mode axis. ``spectral_mix_cp``: W[i,o,(m,n)] = Σ_r U[i,r] A[m,r] D[n,r] V[o,r]. Modes are
f = m N + n, the last mode axis n and all others m.

X and Y are planes (2, modes, B, channels), as the transforms write and read them; weights have a trailing (re, im), as
parameters do. A batch is small and W large (8 Ci Co K bytes against 8 B (Ci + Co) K), so what counts is to move W once.
It is stored with the modes innermost, where a product mode by mode wants channels innermost. Transposed in memory it
would move three times; here a program takes F neighbouring modes, reads runs of F complex numbers (64 bytes for F = 8:
whole sectors), transposes them in shared memory, and multiplies F small matrices at once. The gradient of W is written
in the same way. Tucker differs only in where the tile of W comes from: a product of H and D, in registers.

A CP weight is diagonal in between, (X U) S V^T with S[f,r] = A[m,r] D[n,r], and its rank may be in the thousands. The
kernels go through r in tiles: product, scale, product, so that no (modes, B, R) is ever in memory. Its gradients go
through the same tiles again; only that of S, (modes, R) without the batch, is written on the way.

For the backward pass X and the weights are kept, nothing else. All sums have a fixed order. Planes of 16 bits are
multiplied as single tf32 products: it holds their mantissas, and its range is that of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from . import _lib
from ._lib import (
    KernelConfig,
    Target,
    bucket,
    cdiv,
    custom_op,
    dot_float32,
    dot_precision,
    register_config,
    register_reference,
)


@triton.jit
def _complex_dot(ar, ai, br, bi, cr, ci, PRECISION: tl.constexpr):
    """c + a @ b of complex tiles, batched where they have three dimensions."""
    cr = dot_float32(ar, br, cr, PRECISION)
    cr = dot_float32(-ai, bi, cr, PRECISION)
    ci = dot_float32(ar, bi, ci, PRECISION)
    ci = dot_float32(ai, br, ci, PRECISION)
    return cr, ci


@triton.jit
def _load_pairs(pointer, row_offsets, row_inside, column_offsets, column_inside):
    """Complex [rows, columns] of a matrix whose entries are neighbouring (re, im)."""
    pair = tl.arange(0, 2)
    offsets = row_offsets[:, None] + column_offsets[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    return tl.load(pointer + offsets[:, :, None] + pair[None, None, :], mask=inside[:, :, None], other=0.0).split()


@triton.jit
def _store_pairs(pointer, re, im, row_offsets, row_inside, column_offsets, column_inside):
    pair = tl.arange(0, 2)
    offsets = row_offsets[:, None] + column_offsets[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(pointer + offsets[:, :, None] + pair[None, None, :], tl.join(re, im), mask=inside[:, :, None])


@triton.jit
def _load_planes(pointer, offsets, plane, inside):
    re = tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    im = tl.load(pointer + plane + offsets, mask=inside, other=0.0).to(tl.float32)
    return re, im


# Dense and Tucker


@triton.jit
def _core_tile(h, r_start, s_start, q, R, S, Q, stride_r, stride_s, stride_q, BR: tl.constexpr, BS: tl.constexpr):
    """[(r, s), q] of one slice H[:, :, m, :]."""
    i = tl.arange(0, BR * BS)
    r = r_start + i // BS
    s = s_start + i % BS
    rows = r.to(tl.int64) * stride_r + s.to(tl.int64) * stride_s
    return _load_pairs(h, rows, (r < R) & (s < S), q * stride_q, q < Q)


@triton.jit
def _weight_tile(
    w, d, r_start, s_start, n, R, S, N, Q, stride_r, stride_s, stride_q, stride_dn, stride_dq,
    FACTORED: tl.constexpr, PRECISION: tl.constexpr,
    F: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """W[n, r, s] of one m, complex [F, BR, BS]."""
    if FACTORED:
        re = tl.zeros((BR * BS, F), tl.float32)
        im = tl.zeros((BR * BS, F), tl.float32)
        for q_start in range(0, Q, BQ):
            q = q_start + tl.arange(0, BQ)
            hr, hi = _core_tile(w, r_start, s_start, q, R, S, Q, stride_r, stride_s, stride_q, BR, BS)
            dr, di = _load_pairs(d, q * stride_dq, q < Q, n * stride_dn, n < N)
            re, im = _complex_dot(hr, hi, dr, di, re, im, PRECISION)
        re = re.reshape(BR, BS, F)
        im = im.reshape(BR, BS, F)
    else:
        r = r_start + tl.arange(0, BR)
        s = s_start + tl.arange(0, BS)
        rows = r.to(tl.int64)[:, None] * stride_r + s.to(tl.int64)[None, :] * stride_s
        inside = ((r < R)[:, None] & (s < S)[None, :])[:, :, None] & (n < N)[None, None, :]
        offsets = rows[:, :, None] + (n * stride_q)[None, None, :]
        pair = tl.arange(0, 2)
        pointers = w + offsets[:, :, :, None] + pair[None, None, None, :]
        re, im = tl.load(pointers, mask=inside[:, :, :, None], other=0.0).split()
    return re.permute(2, 0, 1), im.permute(2, 0, 1)


@triton.jit(do_not_specialize=["B"])
def spectral_mix_kernel(
    x, w, d, out,
    B, R, S, M, N, Q,
    stride_r, stride_s, stride_m, stride_q, stride_dn, stride_dq,
    FACTORED: tl.constexpr, CONJ: tl.constexpr, PRECISION: tl.constexpr,
    F: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """out = x W, or x conj(W). A program: F modes, BB samples, BS columns of W."""
    tiles_b = tl.cdiv(B, BB)
    tiles_s = tl.cdiv(S, BS)
    tiles_n = tl.cdiv(N, F)
    # Programs that read the same modes of W or of x are neighbours.
    pid = tl.program_id(0)
    b = (pid % tiles_b) * BB + tl.arange(0, BB)
    s_start = (pid // tiles_b % tiles_s) * BS
    n = (pid // (tiles_b * tiles_s) % tiles_n) * F + tl.arange(0, F)
    m = (pid // (tiles_b * tiles_s * tiles_n)).to(tl.int64)
    row = (m * N + n)[:, None] * B + b[None, :]
    inside = (n < N)[:, None] & (b < B)[None, :]
    rows = B.to(tl.int64) * M * N
    w += m * stride_m

    yr = tl.zeros((F, BB, BS), tl.float32)
    yi = tl.zeros((F, BB, BS), tl.float32)
    for r_start in range(0, R, BR):
        r = r_start + tl.arange(0, BR)
        offsets = (row * R)[:, :, None] + r[None, None, :]
        xr, xi = _load_planes(x, offsets, rows * R, inside[:, :, None] & (r < R)[None, None, :])
        wr, wi = _weight_tile(
            w, d, r_start, s_start, n, R, S, N, Q, stride_r, stride_s, stride_q, stride_dn, stride_dq,
            FACTORED, PRECISION, F, BR, BS, BQ,
        )  # fmt: skip
        if CONJ:
            wi = -wi
        yr, yi = _complex_dot(xr, xi, wr, wi, yr, yi, PRECISION)
    s = s_start + tl.arange(0, BS)
    pointers = out + (row * S)[:, :, None] + s[None, None, :]
    mask = inside[:, :, None] & (s < S)[None, None, :]
    tl.store(pointers, yr.to(out.dtype.element_ty), mask=mask)
    tl.store(pointers + rows * S, yi.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _outer_tile(
    x, g, m, n, r_start, s_start, B, R, S, M, N, PRECISION: tl.constexpr,
    F: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Σ_b conj(x[f,b,r]) g[f,b,s], complex [F, BR, BS]."""
    r = r_start + tl.arange(0, BR)
    s = s_start + tl.arange(0, BS)
    rows = B.to(tl.int64) * M * N
    re = tl.zeros((F, BR, BS), tl.float32)
    im = tl.zeros((F, BR, BS), tl.float32)
    for b_start in range(0, B, BB):
        b = b_start + tl.arange(0, BB)
        row = (m * N + n)[:, None] * B + b[None, :]
        inside = ((n < N)[:, None] & (b < B)[None, :])[:, :, None]
        xr, xi = _load_planes(x, (row * R)[:, :, None] + r[None, None, :], rows * R, inside & (r < R)[None, None, :])
        gr, gi = _load_planes(g, (row * S)[:, :, None] + s[None, None, :], rows * S, inside & (s < S)[None, None, :])
        re, im = _complex_dot(xr.permute(0, 2, 1), -xi.permute(0, 2, 1), gr, gi, re, im, PRECISION)
    return re, im


@triton.jit(do_not_specialize=["B"])
def spectral_mix_outer_kernel(
    x, g, out,
    B, R, S, M, N,
    CONJ: tl.constexpr, PRECISION: tl.constexpr,
    F: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out[r,s,m,n] = Σ_b conj(x) g, or its conjugate: the gradient of a dense weight. A program: F modes, BR x BS."""
    tiles_s = tl.cdiv(S, BS)
    tiles_r = tl.cdiv(R, BR)
    tiles_n = tl.cdiv(N, F)
    pid = tl.program_id(0)
    s_start = (pid % tiles_s) * BS
    r_start = (pid // tiles_s % tiles_r) * BR
    n = (pid // (tiles_s * tiles_r) % tiles_n) * F + tl.arange(0, F)
    m = (pid // (tiles_s * tiles_r * tiles_n)).to(tl.int64)
    re, im = _outer_tile(x, g, m, n, r_start, s_start, B, R, S, M, N, PRECISION, F, BB, BR, BS)
    if CONJ:
        im = -im
    pairs = tl.join(re.permute(1, 2, 0), im.permute(1, 2, 0))  # neighbouring modes are neighbours in memory
    r = r_start + tl.arange(0, BR)
    s = s_start + tl.arange(0, BS)
    offsets = ((r.to(tl.int64)[:, None] * S + s[None, :]) * M + m)[:, :, None] * N + n[None, None, :]
    inside = ((r < R)[:, None] & (s < S)[None, :])[:, :, None] & (n < N)[None, None, :]
    pair = tl.arange(0, 2)
    tl.store(out + 2 * offsets[:, :, :, None] + pair[None, None, None, :], pairs, mask=inside[:, :, :, None])


@triton.jit(do_not_specialize=["B"])
def spectral_mix_core_kernel(
    x, g, d, out,
    B, R, S, M, N, Q,
    stride_dn, stride_dq,
    PRECISION: tl.constexpr,
    F: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """out[r,s,m,q] = Σ_n gW[r,s,m,n] conj(D[n,q]), gW = Σ_b conj(x) g: the gradient of H. A program: one m."""
    tiles_q = tl.cdiv(Q, BQ)
    tiles_s = tl.cdiv(S, BS)
    tiles_r = tl.cdiv(R, BR)
    pid = tl.program_id(0)
    q = (pid % tiles_q) * BQ + tl.arange(0, BQ)
    s_start = (pid // tiles_q % tiles_s) * BS
    r_start = (pid // (tiles_q * tiles_s) % tiles_r) * BR
    m = (pid // (tiles_q * tiles_s * tiles_r)).to(tl.int64)
    re = tl.zeros((BR * BS, BQ), tl.float32)
    im = tl.zeros((BR * BS, BQ), tl.float32)
    for n_start in range(0, N, F):
        n = n_start + tl.arange(0, F)
        gr, gi = _outer_tile(x, g, m, n, r_start, s_start, B, R, S, M, N, PRECISION, F, BB, BR, BS)
        gr = gr.permute(1, 2, 0).reshape(BR * BS, F)
        gi = gi.permute(1, 2, 0).reshape(BR * BS, F)
        dr, di = _load_pairs(d, n * stride_dn, n < N, q * stride_dq, q < Q)
        re, im = _complex_dot(gr, gi, dr, -di, re, im, PRECISION)
    i = tl.arange(0, BR * BS)
    r = r_start + i // BS
    s = s_start + i % BS
    rows = ((r.to(tl.int64) * S + s) * M + m) * (2 * Q)
    _store_pairs(out, re, im, rows, (r < R) & (s < S), 2 * q, q < Q)


@triton.jit(do_not_specialize=["B"])
def spectral_mix_factor_kernel(
    x, g, h, out,
    B, R, S, M, N, Q,
    stride_r, stride_s, stride_m, stride_q,
    PRECISION: tl.constexpr,
    F: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """out[m,n,q] = Σ_rs gW[r,s,m,n] conj(H[r,s,m,q]): the gradient of D, a share for each m. A program: F modes n."""
    tiles_q = tl.cdiv(Q, BQ)
    tiles_n = tl.cdiv(N, F)
    pid = tl.program_id(0)
    q = (pid % tiles_q) * BQ + tl.arange(0, BQ)
    n = (pid // tiles_q % tiles_n) * F + tl.arange(0, F)
    m = (pid // (tiles_q * tiles_n)).to(tl.int64)
    h += m * stride_m
    # A small product for each r, so that warps have one each; summed over r at the end.
    re = tl.zeros((BR, F, BQ), tl.float32)
    im = tl.zeros((BR, F, BQ), tl.float32)
    for r_start in range(0, R, BR):
        for s_start in range(0, S, BS):
            gr, gi = _outer_tile(x, g, m, n, r_start, s_start, B, R, S, M, N, PRECISION, F, BB, BR, BS)
            hr, hi = _core_tile(h, r_start, s_start, q, R, S, Q, stride_r, stride_s, stride_q, BR, BS)
            hr = hr.reshape(BR, BS, BQ)
            hi = hi.reshape(BR, BS, BQ)
            re, im = _complex_dot(gr.permute(1, 0, 2), gi.permute(1, 0, 2), hr, -hi, re, im, PRECISION)
    re = tl.sum(re, axis=0)
    im = tl.sum(im, axis=0)
    _store_pairs(out, re, im, (m * N + n) * (2 * Q), n < N, 2 * q, q < Q)


# CP


@triton.jit
def _inner(
    x, u, row, rows, r, C, R, stride_c, stride_r, CONJ: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x U, or x conj(U), of the rows (f, b): complex [BM, BR]."""
    tr = tl.zeros((BM, BR), tl.float32)
    ti = tl.zeros((BM, BR), tl.float32)
    for c_start in range(0, C, BC):
        c = c_start + tl.arange(0, BC)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        xr, xi = _load_planes(x, row[:, None] * C + c[None, :], rows * C, inside)
        ur, ui = _load_pairs(u, c * stride_c, c < C, r * stride_r, r < R)
        if CONJ:
            ui = -ui
        tr, ti = _complex_dot(xr, xi, ur, ui, tr, ti, PRECISION)
    return tr, ti


@triton.jit
def _diagonal(a, d, row, rows, r, B, N, R, stride_am, stride_ar, stride_dn, stride_dr):
    """S[f, r] = A[m, r] D[n, r] of the rows (f, b), f = (m, n)."""
    f = row // B
    ar, ai = _load_pairs(a, (f // N) * stride_am, row < rows, r * stride_ar, r < R)
    dr, di = _load_pairs(d, (f % N) * stride_dn, row < rows, r * stride_dr, r < R)
    return ar * dr - ai * di, ar * di + ai * dr


@triton.jit(do_not_specialize=["B"])
def spectral_mix_cp_kernel(
    x, u, a, d, v, out,
    B, CI, CO, M, N, R,
    stride_ui, stride_ur, stride_am, stride_ar, stride_dn, stride_dr, stride_vo, stride_vr,
    CONJ: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out = (x U) S V^T, or that of the conjugates. A program: BM rows (f, b), BO output channels, all r."""
    rows = B.to(tl.int64) * M * N
    tiles_o = tl.cdiv(CO, BO)
    pid = tl.program_id(0)
    o = (pid % tiles_o) * BO + tl.arange(0, BO)
    row = (pid // tiles_o).to(tl.int64) * BM + tl.arange(0, BM)
    yr = tl.zeros((BM, BO), tl.float32)
    yi = tl.zeros((BM, BO), tl.float32)
    for r_start in range(0, R, BR):
        r = r_start + tl.arange(0, BR)
        tr, ti = _inner(x, u, row, rows, r, CI, R, stride_ui, stride_ur, CONJ, PRECISION, BM, BC, BR)
        sr, si = _diagonal(a, d, row, rows, r, B, N, R, stride_am, stride_ar, stride_dn, stride_dr)
        vr, vi = _load_pairs(v, r * stride_vr, r < R, o * stride_vo, o < CO)
        if CONJ:
            si = -si
            vi = -vi
        yr, yi = _complex_dot(tr * sr - ti * si, tr * si + ti * sr, vr, vi, yr, yi, PRECISION)
    mask = (row < rows)[:, None] & (o < CO)[None, :]
    pointers = out + row[:, None] * CO + o[None, :]
    tl.store(pointers, yr.to(out.dtype.element_ty), mask=mask)
    tl.store(pointers + rows * CO, yi.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "row_chunk"])
def spectral_mix_cp_channels_kernel(
    x, u, a, d, other, out,
    B, CI, CO, M, N, R,
    stride_ui, stride_ur, stride_am, stride_ar, stride_dn, stride_dr,
    row_chunk,
    CONJ: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[chunk,o,r] = Σ_row conj(x U S)[row,r] other[row,o], the gradient of V with other = g.

    With CONJ: Σ_row (x conj(U) conj(S))[row,r] conj(other)[row,o], that of U where x = g, U = V and other is X.
    A program: BO channels, BR ranks, row_chunk rows.
    """
    rows = B.to(tl.int64) * M * N
    tiles_o = tl.cdiv(CO, BO)
    tiles_r = tl.cdiv(R, BR)
    pid = tl.program_id(0)
    o = (pid % tiles_o) * BO + tl.arange(0, BO)
    r = (pid // tiles_o % tiles_r) * BR + tl.arange(0, BR)
    chunk = (pid // (tiles_o * tiles_r)).to(tl.int64)
    re = tl.zeros((BO, BR), tl.float32)
    im = tl.zeros((BO, BR), tl.float32)
    for row_start in range(chunk * row_chunk, min((chunk + 1) * row_chunk, rows), BM):
        row = row_start + tl.arange(0, BM)
        tr, ti = _inner(x, u, row, rows, r, CI, R, stride_ui, stride_ur, CONJ, PRECISION, BM, BC, BR)
        sr, si = _diagonal(a, d, row, rows, r, B, N, R, stride_am, stride_ar, stride_dn, stride_dr)
        inside = (row < rows)[:, None] & (o < CO)[None, :]
        vr, vi = _load_planes(other, row[:, None] * CO + o[None, :], rows * CO, inside)
        if CONJ:
            si = -si
            vi = -vi
            pr = tr * sr - ti * si
            pi = tr * si + ti * sr
        else:
            pr = tr * sr - ti * si
            pi = -(tr * si + ti * sr)
        re, im = _complex_dot(vr.permute(1, 0), vi.permute(1, 0), pr, pi, re, im, PRECISION)
    _store_pairs(out, re, im, (chunk * CO + o) * (2 * R), o < CO, 2 * r, r < R)


@triton.jit(do_not_specialize=["B"])
def spectral_mix_cp_diagonal_kernel(
    x, u, g, v, out,
    B, CI, CO, M, N, R,
    stride_ui, stride_ur, stride_vo, stride_vr,
    PRECISION: tl.constexpr,
    F: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[f,r] = Σ_b conj(x U)[f,b,r] (g conj(V))[f,b,r], the gradient of S. A program: F modes, BR ranks."""
    modes = tl.cast(M * N, tl.int64)
    rows = modes * B
    tiles_r = tl.cdiv(R, BR)
    pid = tl.program_id(0)
    r = (pid % tiles_r) * BR + tl.arange(0, BR)
    f_start = (pid // tiles_r).to(tl.int64) * F
    i = tl.arange(0, F * BB)
    re = tl.zeros((F, BR), tl.float32)
    im = tl.zeros((F, BR), tl.float32)
    for b_start in range(0, B, BB):
        f = f_start + i // BB
        b = b_start + i % BB
        row = tl.where((f < modes) & (b < B), f * B + b, rows)  # beyond the last row: reads as zero
        tr, ti = _inner(x, u, row, rows, r, CI, R, stride_ui, stride_ur, False, PRECISION, F * BB, BC, BR)
        qr, qi = _inner(g, v, row, rows, r, CO, R, stride_vo, stride_vr, True, PRECISION, F * BB, BC, BR)
        re += tl.sum((tr * qr + ti * qi).reshape(F, BB, BR), axis=1)
        im += tl.sum((tr * qi - ti * qr).reshape(F, BB, BR), axis=1)
    f = f_start + tl.arange(0, F)
    _store_pairs(out, re, im, f * (2 * R), f < modes, 2 * r, r < R)


# Configurations


def _extent(n: int, most: int) -> int:
    """The tile for a dimension of size n: a power of two, at least 16."""
    return min(max(16, bucket(n)), most)


def _mix_candidates(b: int, s: int, q: int | None) -> list[dict[str, Any]]:
    """Launch configurations of the dense and, with a rank q, the Tucker kernel; the default first."""
    shapes = ((8, 32, 8), (16, 16, 8), (8, 16, 4)) if q is None else ((16, 8, 8), (8, 16, 8))  # F, BS, num_warps
    return [
        {
            "F": f,
            "BB": _extent(b, 32),
            "BR": 16,
            "BS": min(_extent(s, 32), bs),
            "BQ": 16,
            "num_warps": warps,
            "num_stages": 2,
        }
        for f, bs, warps in shapes
    ]


_OUTER = {"F": 8, "BB": 16, "BR": 16, "BS": 32, "num_warps": 8, "num_stages": 2}
_CORE = {"F": 16, "BB": 16, "BR": 16, "BS": 8, "BQ": 32, "num_warps": 8, "num_stages": 1}
_FACTOR = {"F": 16, "BB": 16, "BR": 8, "BS": 16, "BQ": 16, "num_warps": 8, "num_stages": 1}
_CP_CHANNELS = {"BM": 32, "BC": 16, "BO": 64, "BR": 16, "num_warps": 4, "num_stages": 2}
_CP_DIAGONAL = {"F": 4, "BB": 16, "BC": 16, "BR": 32, "num_warps": 4, "num_stages": 2}


def _cp_meta(target: Target) -> dict[str, Any]:
    tensor_memory = target[0] == "cuda" and 100 <= int(target[1]) < 120  # 512 columns hold no wider accumulators
    return {"BM": 64, "BC": 16, "BO": 32 if tensor_memory else 64, "BR": 16, "num_warps": 4, "num_stages": 2}


# Launchers

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check_planes(name: str, x: torch.Tensor, shape: tuple[int | None, ...], layout: str) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    _check_shape(name, x, shape, layout)


def _check_shape(name: str, x: torch.Tensor, shape: tuple[int | None, ...], layout: str) -> None:
    if x.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {layout} = ({wanted}), got {tuple(x.shape)}")


def _check_weight(name: str, w: torch.Tensor, shape: tuple[int | None, ...], layout: str, like: torch.Tensor) -> None:
    if w.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {w.dtype}")
    _check_shape(name, w, shape, layout)
    if w.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {w.device}")


def _pairs(w: torch.Tensor) -> torch.Tensor:
    """``w`` with real and imaginary parts as neighbours: itself, unless an odd view came."""
    return w if w.stride(-1) == 1 or w.numel() == 0 else w.contiguous()


def _check_mix(x: torch.Tensor, w: torch.Tensor, d: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    """(R, S, M, N, Q)."""
    _check_planes("x", x, (2, None, None, None), "(2, modes, B, R)")
    if d is None:
        _check_weight("w", w, (x.shape[3], None, None, None, 2), "(R, S, M, N, 2)", x)
        r, s, m, n, _ = w.shape
        q = 1
    else:
        _check_weight("h", w, (x.shape[3], None, None, None, 2), "(R, S, M, Q, 2)", x)
        r, s, m, q, _ = w.shape
        _check_weight("d", d, (None, q, 2), "(N, Q, 2)", x)
        n = d.shape[0]
    if m * n != x.shape[1]:
        raise ValueError(f"x must have M N = {m * n} modes, which the weight has, got {x.shape[1]}")
    return r, s, m, n, q


def _precision(x: torch.Tensor) -> str:
    return dot_precision(_lib.target_of(x.device), low=x.dtype != torch.float32)


def _launch_mix(x, w, d=None, conj=False, candidates=None) -> torch.Tensor:
    """Run the dense kernel, or the Tucker one where there is a ``d``; ``candidates`` overrides the configurations."""
    r, s, m, n, q = _check_mix(x, w, d)
    _, k, b, _ = x.shape
    out = torch.empty((2, k, b, s), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or r * q == 0:
        return out.zero_()
    x, w = x.contiguous(), _pairs(w)
    if d is None and w.stride(2) == n * w.stride(3):  # one run of modes: no tile is cut short at the end of an axis
        m, n = 1, m * n
    d = None if d is None else _pairs(d)
    strides = (*w.stride()[:4], *((0, 0) if d is None else d.stride()[:2]))
    precision = _precision(x)
    fixed = {"FACTORED": d is not None, "CONJ": conj, "PRECISION": precision}

    def launch(meta: dict[str, Any]) -> None:
        tiles = cdiv(b, meta["BB"]) * cdiv(s, meta["BS"]) * cdiv(n, meta["F"])
        spectral_mix_kernel[(m * tiles,)](x, w, d, out, b, r, s, m, n, q, *strides, **fixed, **meta)

    default = _mix_candidates(b, s, None if d is None else q)
    key = (x.dtype, bucket(m * n), r, s, q, d is not None, default[0]["BB"], precision)
    with _lib.device_guard(x):
        launch(_lib.pick("spectral_mix", key, candidates or default, launch, x.device))
    return out


def _launch_outer(x, g, last, conj=False) -> torch.Tensor:
    _check_planes("x", x, (2, None, None, None), "(2, modes, B, R)")
    _check_planes("g", g, (*x.shape[:3], None), "(2, modes, B, S)")
    (_, k, b, r), s = x.shape, g.shape[3]
    _check_last(k, last)
    out = torch.empty((r, s, k // max(last, 1), last, 2), dtype=torch.float32, device=x.device)
    if out.numel() == 0 or b == 0:
        return out.zero_()
    x, g, meta = x.contiguous(), g.contiguous(), _OUTER
    grid = (cdiv(r, meta["BR"]) * cdiv(s, meta["BS"]) * cdiv(k, meta["F"]),)
    with _lib.device_guard(x):
        spectral_mix_outer_kernel[grid](x, g, out, b, r, s, 1, k, CONJ=conj, PRECISION=_precision(x), **meta)
    return out


def _check_last(k: int, last: int) -> None:
    if last < 0 or (k % last if last else k):
        raise ValueError(f"last must divide the number of modes, {k}, got {last}")


def _launch_tucker_backward(grad, x, h, d) -> tuple[torch.Tensor, torch.Tensor]:
    r, s, m, n, q = _check_mix(x, h, d)
    _check_planes("grad", grad, (*x.shape[:3], s), "(2, modes, B, S)")
    b = x.shape[2]
    grad_h = torch.empty((r, s, m, q, 2), dtype=torch.float32, device=x.device)
    parts = torch.empty((m, n, q, 2), dtype=torch.float32, device=x.device)
    if r * s * m * n * q * b == 0:
        return grad_h.zero_(), parts.zero_().sum(0)
    x, grad, h, d, precision = x.contiguous(), grad.contiguous(), _pairs(h), _pairs(d), _precision(x)
    with _lib.device_guard(x):
        meta = _CORE
        grid = (m * cdiv(r, meta["BR"]) * cdiv(s, meta["BS"]) * cdiv(q, meta["BQ"]),)
        spectral_mix_core_kernel[grid](
            x, grad, d, grad_h, b, r, s, m, n, q, *d.stride()[:2], PRECISION=precision, **meta
        )
        meta = _FACTOR
        grid = (m * cdiv(n, meta["F"]) * cdiv(q, meta["BQ"]),)
        spectral_mix_factor_kernel[grid](
            x, grad, h, parts, b, r, s, m, n, q, *h.stride()[:4], PRECISION=precision, **meta
        )
    return grad_h, parts.sum(0)


def _check_cp(x, u, a, d, v) -> tuple[int, int, int, int, int]:
    """(I, O, M, N, R)."""
    _check_planes("x", x, (2, None, None, None), "(2, modes, B, I)")
    _check_weight("u", u, (x.shape[3], None, 2), "(I, R, 2)", x)
    rank = u.shape[1]
    for name, factor, layout in (("a", a, "(M, R, 2)"), ("d", d, "(N, R, 2)"), ("v", v, "(O, R, 2)")):
        _check_weight(name, factor, (None, rank, 2), layout, x)
    if a.shape[0] * d.shape[0] != x.shape[1]:
        raise ValueError(f"x must have M N = {a.shape[0] * d.shape[0]} modes, got {x.shape[1]}")
    return x.shape[3], v.shape[0], a.shape[0], d.shape[0], rank


def _launch_cp(x, u, a, d, v, conj=False) -> torch.Tensor:
    i, o, m, n, rank = _check_cp(x, u, a, d, v)
    (_, k, b, _) = x.shape
    out = torch.empty((2, k, b, o), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or rank * i == 0:
        return out.zero_()
    x, (u, a, d, v), meta = x.contiguous(), map(_pairs, (u, a, d, v)), _cp_meta(_lib.target_of(x.device))
    strides = [stride for factor in (u, a, d, v) for stride in factor.stride()[:2]]
    grid = (cdiv(k * b, meta["BM"]) * cdiv(o, meta["BO"]),)
    with _lib.device_guard(x):
        spectral_mix_cp_kernel[grid](
            x, u, a, d, v, out, b, i, o, m, n, rank, *strides, CONJ=conj, PRECISION=_precision(x), **meta
        )
    return out


def _launch_cp_backward(grad, x, u, a, d, v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    i, o, m, n, rank = _check_cp(x, u, a, d, v)
    _check_planes("grad", grad, (*x.shape[:3], o), "(2, modes, B, O)")
    (_, k, b, _) = x.shape
    if k * b * i * o * rank == 0:
        return tuple(factor.new_zeros(factor.shape) for factor in (u, a, d, v))
    x, grad, (u, a, d, v) = x.contiguous(), grad.contiguous(), map(_pairs, (u, a, d, v))
    precision = _precision(x)
    units = _lib.multiprocessors(x.device)

    def channels(x, u, other, conj) -> torch.Tensor:
        meta = _CP_CHANNELS
        inner, outer = x.shape[3], other.shape[3]
        tiles = cdiv(outer, meta["BO"]) * cdiv(rank, meta["BR"])
        row_chunk = cdiv(cdiv(k * b, cdiv(2 * units, tiles)), 4 * meta["BM"]) * 4 * meta["BM"]
        chunks = cdiv(k * b, row_chunk)
        parts = torch.empty((chunks, outer, rank, 2), dtype=torch.float32, device=x.device)
        strides = [stride for factor in (u, a, d) for stride in factor.stride()[:2]]
        spectral_mix_cp_channels_kernel[(tiles * chunks,)](
            x, u, a, d, other, parts, b, inner, outer, m, n, rank, *strides, row_chunk,
            CONJ=conj, PRECISION=precision, **meta,
        )  # fmt: skip
        return parts[0] if chunks == 1 else parts.sum(0)

    with _lib.device_guard(x):
        grad_v = channels(x, u, grad, False)
        grad_u = channels(grad, v, x, True)
        diagonal = torch.empty((m, n, rank, 2), dtype=torch.float32, device=x.device)
        meta = _CP_DIAGONAL
        grid = (cdiv(k, meta["F"]) * cdiv(rank, meta["BR"]),)
        spectral_mix_cp_diagonal_kernel[grid](
            x, u, grad, v, diagonal, b, i, o, m, n, rank, *u.stride()[:2], *v.stride()[:2], PRECISION=precision, **meta
        )
        s = torch.view_as_complex(diagonal)
        grad_a = torch.view_as_real((s * _weight(d, True)).sum(1))
        grad_d = torch.view_as_real((s * _weight(a, True)[:, None]).sum(0))
    return grad_u, grad_a, grad_d, grad_v


# Plain torch, also what second derivatives of the factorized operations go through


def _complex(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(*x.float().unbind(0))


def _weight(w: torch.Tensor, conj: bool) -> torch.Tensor:
    return torch.complex(w[..., 0], -w[..., 1] if conj else w[..., 1])


def _conj(z: torch.Tensor) -> torch.Tensor:
    # Not z.conj(): its lazy conjugation is lost inside an operation that compiled code calls.
    return torch.complex(z.real, -z.imag)


def _as_planes(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.stack((y.real, y.imag)).to(like.dtype)


def _mix_reference(x, w, conj=False) -> torch.Tensor:
    _check_mix(x, w, None)
    return _as_planes(torch.einsum("kbr,rsk->kbs", _complex(x), _weight(w, conj).flatten(2)), x)


def _outer_reference(x, g, last, conj=False) -> torch.Tensor:
    _check_last(x.shape[1], last)
    w = torch.einsum("kbr,kbs->rsk", _conj(_complex(x)), _complex(g))
    w = torch.stack((w.real, -w.imag if conj else w.imag), -1)
    return w.reshape(*w.shape[:2], w.shape[2] // max(last, 1), last, 2)


def _tucker_reference(x, h, d, conj=False) -> torch.Tensor:
    _check_mix(x, h, d)
    w = torch.einsum("rsmq,nq->rsmn", _weight(h, conj), _weight(d, conj)).flatten(2)
    return _as_planes(torch.einsum("kbr,rsk->kbs", _complex(x), w), x)


def _cp_reference(x, u, a, d, v, conj=False) -> torch.Tensor:
    _check_cp(x, u, a, d, v)
    u, a, d, v = (_weight(factor, conj) for factor in (u, a, d, v))
    s = (a[:, None] * d).flatten(0, 1)
    return _as_planes(((_complex(x) @ u) * s[:, None]) @ v.mT, x)


def _trailing(w: torch.Tensor) -> torch.Tensor:
    return torch.stack((w.real, w.imag), -1)


def _tucker_backward_reference(grad, x, h, d):
    r, s, m, n, _ = _check_mix(x, h, d)
    w = torch.einsum("kbr,kbs->rsk", _conj(_complex(x)), _complex(grad)).reshape(r, s, m, n)
    grad_h = torch.einsum("rsmn,nq->rsmq", w, _weight(d, True))
    return _trailing(grad_h), _trailing(torch.einsum("rsmn,rsmq->nq", w, _weight(h, True)))


def _cp_backward_reference(grad, x, u, a, d, v):
    _, _, m, n, rank = _check_cp(x, u, a, d, v)
    conj_a, conj_d = _weight(a, True), _weight(d, True)
    s = (conj_a[:, None] * conj_d).flatten(0, 1)[:, None]
    x, grad = _complex(x), _complex(grad)
    t, q = _conj(x @ _weight(u, False)), grad @ _weight(v, True)
    grad_u = torch.einsum("kbi,kbr->ir", _conj(x), q * s)
    grad_v = torch.einsum("kbr,kbo->or", t * s, grad)
    diagonal = (t * q).sum(1).reshape(m, n, rank)
    return tuple(map(_trailing, (grad_u, (diagonal * conj_d).sum(1), (diagonal * conj_a[:, None]).sum(0), grad_v)))


# Operations


def _mix(x: torch.Tensor, w: torch.Tensor, conj: bool = False) -> torch.Tensor:
    return _launch_mix(x, w, None, conj)


def _outer(x: torch.Tensor, g: torch.Tensor, last: int, conj: bool = False) -> torch.Tensor:
    return _launch_outer(x, g, last, conj)


def _tucker(x: torch.Tensor, h: torch.Tensor, d: torch.Tensor, conj: bool = False) -> torch.Tensor:
    return _launch_mix(x, h, d, conj)


def _tucker_backward(
    grad: torch.Tensor, x: torch.Tensor, h: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_tucker_backward(grad, x, h, d)


def _cp(
    x: torch.Tensor, u: torch.Tensor, a: torch.Tensor, d: torch.Tensor, v: torch.Tensor, conj: bool = False
) -> torch.Tensor:
    return _launch_cp(x, u, a, d, v, conj)


def _cp_backward(
    grad: torch.Tensor, x: torch.Tensor, u: torch.Tensor, a: torch.Tensor, d: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _launch_cp_backward(grad, x, u, a, d, v)


_mix_op = custom_op("spectral_mix", _mix)
_outer_op = custom_op("spectral_mix_outer", _outer)
_tucker_op = custom_op("spectral_mix_tucker", _tucker)
_tucker_backward_op = custom_op("spectral_mix_tucker_backward", _tucker_backward)
_cp_op = custom_op("spectral_mix_cp", _cp)
_cp_backward_op = custom_op("spectral_mix_cp_backward", _cp_backward)
register_reference(_mix_op, _mix_reference)
register_reference(_outer_op, _outer_reference)
register_reference(_tucker_op, _tucker_reference)
register_reference(_tucker_backward_op, _tucker_backward_reference)
register_reference(_cp_op, _cp_reference)
register_reference(_cp_backward_op, _cp_backward_reference)


@_mix_op.register_fake
def _(x, w, conj=False):
    return x.new_empty((*x.shape[:3], w.shape[1]))


@_outer_op.register_fake
def _(x, g, last, conj=False):
    return x.new_empty((x.shape[3], g.shape[3], x.shape[1] // max(last, 1), last, 2), dtype=torch.float32)


@_tucker_op.register_fake
def _(x, h, d, conj=False):
    return x.new_empty((*x.shape[:3], h.shape[1]))


@_tucker_backward_op.register_fake
def _(grad, x, h, d):
    return h.new_empty(h.shape), d.new_empty(d.shape)


@_cp_op.register_fake
def _(x, u, a, d, v, conj=False):
    return x.new_empty((*x.shape[:3], v.shape[0]))


@_cp_backward_op.register_fake
def _(grad, x, u, a, d, v):
    return tuple(factor.new_empty(factor.shape) for factor in (u, a, d, v))


# Dense: the two operations are each other's derivatives, to any order.


def _mix_setup(ctx, inputs, output) -> None:
    x, w, ctx.conj = inputs
    ctx.save_for_backward(x, w)


def _mix_backward(ctx, grad):
    x, w = ctx.saved_tensors
    grad_x = _mix_op(grad, w.transpose(0, 1), not ctx.conj) if ctx.needs_input_grad[0] else None
    grad_w = None
    if ctx.needs_input_grad[1]:  # without modes, N = 0 leaves M open
        grad_w = _outer_op(x, grad, w.shape[3], ctx.conj).view(w.shape)
    return grad_x, grad_w, None


def _outer_setup(ctx, inputs, output) -> None:
    x, g, _, ctx.conj = inputs
    ctx.save_for_backward(x, g)


def _outer_backward(ctx, grad):
    x, g = ctx.saved_tensors
    grad_x = _mix_op(g, grad.transpose(0, 1), not ctx.conj) if ctx.needs_input_grad[0] else None
    grad_g = _mix_op(x, grad, ctx.conj) if ctx.needs_input_grad[1] else None
    return grad_x, grad_g, None, None


_mix_op.register_autograd(_mix_backward, setup_context=_mix_setup)
_outer_op.register_autograd(_outer_backward, setup_context=_outer_setup)


# Tucker and CP: first derivatives have kernels; a derivative to be differentiated again goes through plain torch.


def _plain_gradients(plain: Callable, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor) -> tuple:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            inputs = tuple(t.detach() for t in inputs)
        inputs = tuple(t if t.requires_grad else t.detach().requires_grad_() for t in inputs)
        return torch.autograd.grad(plain(*inputs), inputs, grad, create_graph=create_graph)


def _factorized_setup(ctx, inputs, output) -> None:
    *inputs, ctx.conj = inputs
    ctx.save_for_backward(*inputs)


def _tucker_op_backward(ctx, grad):
    x, h, d = ctx.saved_tensors
    if torch.is_grad_enabled() or ctx.conj:
        grads = _plain_gradients(lambda x, h, d: _tucker_reference(x, h, d, ctx.conj), (x, h, d), grad)
        return *grads, None
    grad_x = grad_h = grad_d = None
    if ctx.needs_input_grad[0]:
        grad_x = _tucker_op(grad, h.transpose(0, 1), d, True)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_h, grad_d = _tucker_backward_op(grad, x, h, d)
    return grad_x, grad_h, grad_d, None


def _cp_op_backward(ctx, grad):
    x, u, a, d, v = ctx.saved_tensors
    if torch.is_grad_enabled() or ctx.conj:
        inputs = (x, u, a, d, v)
        grads = _plain_gradients(lambda x, u, a, d, v: _cp_reference(x, u, a, d, v, ctx.conj), inputs, grad)
        return *grads, None
    grad_x = _cp_op(grad, v, a, d, u, True) if ctx.needs_input_grad[0] else None
    grads = (None,) * 4
    if any(ctx.needs_input_grad[1:5]):
        grads = _cp_backward_op(grad, x, u, a, d, v)
    return grad_x, *grads, None


_tucker_op.register_autograd(_tucker_op_backward, setup_context=_factorized_setup)
_cp_op.register_autograd(_cp_op_backward, setup_context=_factorized_setup)


def spectral_mix(x: torch.Tensor, w: torch.Tensor, conj: bool = False) -> torch.Tensor:
    """Y[f,b,s] = Σ_r X[f,b,r] W[r,s,f], differentiable in both to any order.

    Args:
        x: (2, modes, B, R), real and imaginary part, float32, float16 or bfloat16.
        w: (R, S, M, N, 2) float32 with M N = modes, any strides.
        conj: use the conjugate of W.

    Returns:
        (2, modes, B, S) in the dtype of ``x``, contiguous; sums are in float32.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit.
    """
    return _mix_op(x, w, conj)


def spectral_mix_tucker(x: torch.Tensor, h: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """:func:`spectral_mix` with W[r,s,m,n] = Σ_q H[r,s,m,q] D[n,q], which is never in memory.

    Differentiable to any order; derivatives beyond the first, and only those, do form W.

    Args:
        x: (2, M N, B, R), real and imaginary part, float32, float16 or bfloat16.
        h: (R, S, M, Q, 2) float32, any strides.
        d: (N, Q, 2) float32, any strides.

    Returns:
        (2, M N, B, S) in the dtype of ``x``, contiguous.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit.
    """
    return _tucker_op(x, h, d)


def spectral_mix_cp(
    x: torch.Tensor, u: torch.Tensor, a: torch.Tensor, d: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """:func:`spectral_mix` with W[i,o,m,n] = Σ_r U[i,r] A[m,r] D[n,r] V[o,r], rank by rank: no (modes, B, R) in memory.

    Differentiable to any order; derivatives beyond the first, and only those, do form (modes, B, R).

    Args:
        x: (2, M N, B, I), real and imaginary part, float32, float16 or bfloat16.
        u, a, d, v: (I, R, 2), (M, R, 2), (N, R, 2), (O, R, 2) float32, any strides.

    Returns:
        (2, M N, B, O) in the dtype of ``x``, contiguous.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit.
    """
    return _cp_op(x, u, a, d, v)


# Production configurations: B = 16 samples, 64 channels, modes 64 x 33; Tucker ranks 36, 36, 19, CP rank 384.

_NOTE = (
    "Batched products (F modes at once) are mma.sync on sm_90 and sm_100: wgmma and tcgen05 take two dimensions, and "
    "64 rows, more than a batch has. A mode's product is bound by the weight's bytes. Where 255 registers do not do, a "
    "few addresses or halves of operands are spilled."
)
_SPILLS = {"sm_80": 256, "sm_100": 16}


def _add(
    name: str, kernel, signature: dict[str, str], constexprs: dict[str, Any], meta: dict[str, Any], **more
) -> None:
    options = {k: meta[k] for k in ("num_warps", "num_stages")}
    tiles = {k: meta[k] for k in meta if k not in options}
    constexprs = {"PRECISION": dot_precision} | constexprs | tiles
    more = {"spill_budget": _SPILLS, "note": _NOTE} | more
    register_config(
        KernelConfig(kernel=kernel, name=name, signature=signature, constexprs=constexprs, **options, **more)
    )


def _register() -> None:
    pointer = "*fp32:16"
    sizes = {"B": "i32", "R": "i32:16", "S": "i32:16", "M": "i32", "N": "i32"}
    fixed: dict[str, Any] = {"CONJ": False}
    batched: dict[str, Any] = {"tensor_cores": False}
    dense = {"x": pointer, "w": pointer, "out": pointer} | {k: v for k, v in sizes.items() if k != "M"}
    dense |= {"stride_r": "i32:16", "stride_s": "i32", "stride_m": "i32"}
    ones = {"d": None, "M": 1, "Q": 1, "stride_q": 2, "stride_dn": 0, "stride_dq": 0, "FACTORED": False} | fixed
    meta = _mix_candidates(16, 64, None)[0]
    _add("spectral_mix[fp32,C64]", spectral_mix_kernel, dense, ones, meta, **batched)
    signature = {"x": pointer, "g": pointer, "out": pointer} | {k: v for k, v in sizes.items() if k != "M"}
    _add("spectral_mix_outer[fp32,C64]", spectral_mix_outer_kernel, signature, {"M": 1} | fixed, _OUTER, **batched)

    sizes = dict.fromkeys(("B", "R", "S", "M", "N", "Q"), "i32")
    core = dict.fromkeys(("stride_r", "stride_s", "stride_m"), "i32")
    ones = fixed | {"stride_q": 2, "stride_dq": 2}
    signature = {"x": pointer, "w": pointer, "d": pointer, "out": pointer} | sizes | core | {"stride_dn": "i32"}
    meta = _mix_candidates(16, 36, 19)[0]
    _add(
        "spectral_mix_tucker[fp32,r36]",
        spectral_mix_kernel,
        signature,
        {"FACTORED": True} | ones,
        meta,
        **batched,
    )
    signature = {"x": pointer, "g": pointer, "d": pointer, "out": pointer} | sizes | {"stride_dn": "i32"}
    _add("spectral_mix_core[fp32,r36]", spectral_mix_core_kernel, signature, {"stride_dq": 2}, _CORE, **batched)
    signature = {"x": pointer, "g": pointer, "h": pointer, "out": pointer} | sizes | core
    _add("spectral_mix_factor[fp32,r36]", spectral_mix_factor_kernel, signature, {"stride_q": 2}, _FACTOR, **batched)

    sizes = {"B": "i32", "CI": "i32:16", "CO": "i32:16", "M": "i32", "N": "i32", "R": "i32:16"}
    rows = {"stride_ui": "i32:16", "stride_am": "i32:16", "stride_dn": "i32:16"}
    ones = {"stride_ur": 2, "stride_ar": 2, "stride_dr": 2} | fixed
    tables = dict.fromkeys(("x", "u", "a", "d", "out"), pointer)
    signature = tables | {"v": pointer} | sizes | rows | {"stride_vo": "i32:16"}
    for where, targets in (("", ("sm_80", "sm_90", "gfx942")), ("@sm_100", ("sm_100",))):
        meta = _cp_meta(_lib.TARGETS[targets[0]])
        name = "spectral_mix_cp[fp32,C64]" + where
        _add(name, spectral_mix_cp_kernel, signature, ones | {"stride_vr": 2}, meta, targets=targets)
    signature = tables | {"other": pointer} | sizes | rows | {"row_chunk": "i32"}
    _add("spectral_mix_cp_channels[fp32,C64]", spectral_mix_cp_channels_kernel, signature, ones, _CP_CHANNELS)
    signature = dict.fromkeys(("x", "u", "g", "v", "out"), pointer) | sizes
    signature |= {"stride_ui": "i32:16", "stride_vo": "i32:16"}
    ones = {"stride_ur": 2, "stride_vr": 2}
    _add("spectral_mix_cp_diagonal[fp32,C64]", spectral_mix_cp_diagonal_kernel, signature, ones, _CP_DIAGONAL)


_register()
