"""Tensor (2-simplicial) attention: softmax over all pairs of keys (j, k) of a trilinear logit, and its gradient.

::

    S[i,j,k] = scale · f(q_i, k1_j) · k2_k     P = softmax_{jk} S     out_i = Σ_jk P[i,j,k] v1_j ∘ v2_k

How a kernel sees it: two of the three indices are fused into the rows of a tile, ``a = f(q_i, k1_j)``, and what is left
is ordinary attention of these rows over the third. A row tile is a product of owners, slots and heads: each owner's
rows are SLOTS values of the fused index, walked in passes, and the results of the slots are merged. With BQ owners
(queries) and one slot that is tiling over the sequence; with one owner and all query heads of a group in the rows it
is packed grouped-query attention, where nothing is wasted on a window's edge; the launcher takes the product that
computes the fewest entries outside of the windows (:func:`_query_rows`, :func:`_key_rows`). What belongs to the fused
index (k1_j, v1_j and the accumulator that v1_j multiplies) is touched once a pass, so that a tile costs what a tile
of FlashAttention does: two products forward, four for (dK1, dV1), three for dQ.

- forward: rows (i, j, head), columns k; the key set with the larger window is the column axis.
- dK, dV of one set: rows (j, k) of that set and the other, columns (i, head); called once for each set.
- dQ: rows (i, j, head), columns k.

Every output has one writer: no atomics, and the same bits each time. Memory is O(n d): out and LSE forward, one float32
number a query backward. Rows that are not there (beyond an end, outside a window, padded) have bias -inf, columns of
queries that are not there have LSE +inf: neither costs an instruction in a tile, and only tiles on the edge of a window
test their entries.

Sources: arXiv 2310.04064 (the operation), 2405.16411 (its gradient in closed form), 2507.02754 (windows, determinant),
2501.19215 (strassen form).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _lib
from ._attention import LN2, LOG2E, load_tile, padded, peel, place, signature_of, unit
from ._lib import (
    INTERPRET,
    KernelConfig,
    Target,
    bucket,
    cdiv,
    custom_op,
    dot,
    dot_precision,
    register_config,
    register_defaults,
)

FORMS = ("trilinear", "determinant", "strassen")

# Shapes in comments: R rows, D and DV channels padded to a power of two. Offsets of rows are int64, in elements.


@triton.jit
def _fuse(x, x_rows, x_in, y, y_rows, y_in, FORM: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    """f(x, y) [R, D] and the bias [R] with which the logit of a third z is f(x, y) · z + bias, in float32."""
    if FORM == "determinant":  # det[x, y, z] = (x × y) · z in each chunk of three channels
        x1 = load_tile(x, x_rows, x_in, DIM, D, 1).to(tl.float32)
        x2 = load_tile(x, x_rows, x_in, DIM, D, 2).to(tl.float32)
        y1 = load_tile(y, y_rows, y_in, DIM, D, 1).to(tl.float32)
        y2 = load_tile(y, y_rows, y_in, DIM, D, 2).to(tl.float32)
        return x1 * y2 - x2 * y1, x_rows.to(tl.float32) * 0
    else:
        xs = load_tile(x, x_rows, x_in, DIM, D).to(tl.float32)
        ys = load_tile(y, y_rows, y_in, DIM, D).to(tl.float32)
        if FORM == "strassen":
            return xs + ys, tl.sum(xs * ys, 1)
        else:
            return xs * ys, x_rows.to(tl.float32) * 0


@triton.jit
def _unfuse(t, total, y, y_rows, y_in, FORM: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    """Gradient of x in f(x, y) · z + bias, from t [R, D] = Σ dS z and total [R] = Σ dS."""
    if FORM == "determinant":  # y × t; t is permuted in registers
        c = tl.arange(0, D)
        after = tl.where(c < DIM, c - c % 3 + (c + 1) % 3, c)
        before = tl.where(c < DIM, c - c % 3 + (c + 2) % 3, c)
        t1 = tl.gather(t, tl.broadcast_to(after[None, :], t.shape), 1)
        t2 = tl.gather(t, tl.broadcast_to(before[None, :], t.shape), 1)
        y1 = load_tile(y, y_rows, y_in, DIM, D, 1, True, True).to(tl.float32)
        y2 = load_tile(y, y_rows, y_in, DIM, D, 2, True, True).to(tl.float32)
        return y1 * t2 - y2 * t1
    else:
        ys = load_tile(y, y_rows, y_in, DIM, D, 0, True, True).to(tl.float32)
        if FORM == "strassen":
            return t + total[:, None] * ys
        else:
            return t * ys


@triton.jit
def _sum_slots(x, OWNERS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr):
    """[(owner, slot, head), D] -> [(owner, head), D]."""
    if SLOTS == 1:
        return x
    else:
        D: tl.constexpr = x.shape[1]
        return tl.sum(x.reshape(OWNERS, SLOTS, HEADS, D), 1).reshape(OWNERS * HEADS, D)


@triton.jit
def _kept(seed, p, head, i, j, k, SWAPPED: tl.constexpr):
    """What dropout keeps, from positions alone; SWAPPED: j and k are those of the second and the first set."""
    if SWAPPED:
        word, _, _, _ = tl.philox(seed, head, i, k, j)
    else:
        word, _, _, _ = tl.philox(seed, head, i, j, k)
    return tl.uint_to_uniform_float(word) >= p


@triton.jit
def _query_tile(
    pid, blocks, planes, nq, n1, n2, lower1, upper1, lower2, upper2,
    ORDER: tl.constexpr, GROUP: tl.constexpr, MASK2: tl.constexpr,
    BQ: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Where a program with rows (query, slot of j, head) works: the forward and the dQ kernel's first lines."""
    block, plane = place(pid, blocks, planes, ORDER)
    pieces: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    r = tl.arange(0, BQ * SLOTS * HEADS)
    i_first = block * BQ
    i_last = tl.minimum(i_first + BQ, nq) - 1
    i = i_first + r // (SLOTS * HEADS)
    slot = r // HEADS % SLOTS
    g = (plane % pieces) * HEADS + r % HEADS
    inside = (i < nq) & (g < GROUP)
    # Slots count from the first j of each query's own window, so that no slot is spent outside of it.
    j_first = tl.maximum(i + lower1, 0)
    count = tl.where(inside, tl.minimum(i + upper1 + 1, n1) - j_first, 0)
    passes = tl.cdiv(tl.maximum(tl.max(count, 0), 0), SLOTS)
    k_lo = tl.maximum(i_first + lower2, 0)
    k_hi = tl.minimum(i_last + upper2 + 1, n2)
    full_lo = tl.maximum(i_last + lower2, 0)
    full_hi = tl.minimum(i_first + upper2 + 1, n2)
    if MASK2:  # every tile tests its entries
        full_hi = full_lo
    left, full, right = peel(k_lo, k_hi, full_lo, full_hi, BK)
    return (
        i_first, plane // pieces, plane % pieces, i, slot, g, inside, j_first, count, passes,
        k_lo, k_hi, left, full, right,
    )  # fmt: skip


@triton.jit
def _columns(
    n, i, k_hi, lower2, upper2, mask2, stride_m2n, HAS_MASK2: tl.constexpr,
):  # fmt: skip
    """Of key columns n: which exist, and which entries (row, column) are allowed."""
    exists = n < k_hi
    if HAS_MASK2:
        exists = exists & tl.load(mask2 + n.to(tl.int64) * stride_m2n, mask=exists, other=0)
    ok = (n[None, :] >= (i + lower2)[:, None]) & (n[None, :] <= (i + upper2)[:, None]) & exists[None, :]
    return exists, ok


@triton.jit
def _forward_step(
    a, bias, m, mass, inner, k2, v2, mask2, n, i, j, head, seed, k_hi, lower2, upper2, q_start, start1, start2, scale,
    dropout_p, stride_k2n, stride_v2n, stride_m2n,
    EDGE: tl.constexpr, HAS_MASK2: tl.constexpr, DROPOUT: tl.constexpr, SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr, LOW: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One tile of columns: a step of online softmax, in units of log2."""
    exists, ok = _columns(n, i, k_hi, lower2, upper2, mask2, stride_m2n, EDGE and HAS_MASK2)
    keys = load_tile(k2, n.to(tl.int64) * stride_k2n, exists, DIM, D, 0, EDGE)
    x = dot(a, keys.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    if EDGE:
        x = tl.where(ok, x, float("-inf"))
    m_next = tl.maximum(m, tl.max(x, 1) * scale + bias)
    m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
    alpha = tl.exp2(m - m_safe)
    p = tl.exp2(x * scale + (bias - m_safe)[:, None])
    mass = mass * alpha + tl.sum(p, 1)
    if DROPOUT:
        kept = _kept(
            seed,
            dropout_p,
            head[:, None],
            (q_start + i)[:, None],
            (start1 + j)[:, None],
            (start2 + n)[None, :],
            SWAPPED,
        )
        p = tl.where(kept, p, 0.0)
    values = load_tile(v2, n.to(tl.int64) * stride_v2n, exists, DIM_V, DV, 0, EDGE)
    inner = dot(p.to(values.dtype), values, inner * alpha[:, None], PRECISION, LOW)
    return m_next, mass, inner


_SIZES = ["blocks", "planes", "heads", "nq", "n1", "n2", "lower1", "upper1", "lower2", "upper2"]
_SIZES += ["q_start", "start1", "start2"]


@triton.jit(do_not_specialize=_SIZES)
def tensor_attention_forward_kernel(
    q, k1, k2, v1, v2, mask1, mask2, seed, out, lse,
    blocks, planes, heads, nq, n1, n2, lower1, upper1, lower2, upper2, q_start, start1, start2,
    scale, sign, dropout_p,
    stride_qb, stride_qh, stride_qn, stride_k1b, stride_k1h, stride_k1n, stride_k2b, stride_k2h, stride_k2n,
    stride_v1b, stride_v1h, stride_v1n, stride_v2b, stride_v2h, stride_v2n,
    stride_m1b, stride_m1n, stride_m2b, stride_m2n,
    ORDER: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr, SWAPPED: tl.constexpr, DROPOUT: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr, BQ: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out and LSE of BQ queries and HEADS query heads of one group. out (B, Hq, nq, dv) and lse are contiguous."""
    HAS_MASK2: tl.constexpr = mask2 is not None
    (
        i_first, plane, piece, i, slot, g, inside, j_first, count, passes, k_lo, k_hi, left, full, right
    ) = _query_tile(
        tl.program_id(0), blocks, planes, nq, n1, n2, lower1, upper1, lower2, upper2,
        ORDER, GROUP, HAS_MASK2, BQ, SLOTS, HEADS, BK,
    )  # fmt: skip
    kv_heads = heads // GROUP
    b = (plane // kv_heads).to(tl.int64)
    h = (plane % kv_heads).to(tl.int64)
    q += b * stride_qb
    k1 += b * stride_k1b + h * stride_k1h
    k2 += b * stride_k2b + h * stride_k2h
    v1 += b * stride_v1b + h * stride_v1h
    v2 += b * stride_v2b + h * stride_v2h
    if mask2 is not None:
        mask2 += b * stride_m2b
    q_rows = (h * GROUP + g) * stride_qh + i.to(tl.int64) * stride_qn
    head = (b * heads + h * GROUP + g).to(tl.int32)
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    log2_scale = scale * LOG2E
    columns = tl.arange(0, BK)

    m = tl.full((BQ * SLOTS * HEADS,), float("-inf"), tl.float32)
    mass = tl.zeros((BQ * SLOTS * HEADS,), tl.float32)
    acc = tl.zeros((BQ * SLOTS * HEADS, DV), tl.float32)
    for t in tl.range(0, passes, disable_licm=True, num_stages=1):
        j = j_first + t * SLOTS + slot
        ok = inside & (t * SLOTS + slot < count)
        if mask1 is not None:
            ok = ok & tl.load(mask1 + b * stride_m1b + j.to(tl.int64) * stride_m1n, mask=ok, other=0)
        a, bias = _fuse(q, q_rows, ok, k1, j.to(tl.int64) * stride_k1n, ok, FORM, DIM, D)
        a = (a * sign).to(k2.dtype.element_ty)
        bias = tl.where(ok, bias * sign * log2_scale, float("-inf"))
        before = m
        inner = tl.zeros((BQ * SLOTS * HEADS, DV), tl.float32)
        for s in range(0, full):
            m, mass, inner = _forward_step(
                a, bias, m, mass, inner, k2, v2, mask2, k_lo + (left + s) * BK + columns, i, j, head, key, k_hi,
                lower2, upper2, q_start, start1, start2, log2_scale, dropout_p, stride_k2n, stride_v2n, stride_m2n,
                False, HAS_MASK2, DROPOUT, SWAPPED, PRECISION, LOW, DIM, D, DIM_V, DV,
            )  # fmt: skip
        for s in range(0, left + right):
            n = k_lo + (s + tl.where(s < left, 0, full)) * BK + columns
            m, mass, inner = _forward_step(
                a, bias, m, mass, inner, k2, v2, mask2, n, i, j, head, key, k_hi,
                lower2, upper2, q_start, start1, start2, log2_scale, dropout_p, stride_k2n, stride_v2n, stride_m2n,
                True, HAS_MASK2, DROPOUT, SWAPPED, PRECISION, LOW, DIM, D, DIM_V, DV,
            )  # fmt: skip
        alpha = tl.exp2(before - tl.where(m == float("-inf"), 0.0, m))
        values = load_tile(v1, j.to(tl.int64) * stride_v1n, ok, DIM_V, DV).to(tl.float32)
        acc = acc * alpha[:, None] + inner * values

    if SLOTS > 1:  # each slot has its own maximum
        top = tl.max(m.reshape(BQ, SLOTS, HEADS), 1)
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(m.reshape(BQ, SLOTS, HEADS) - safe[:, None, :]).reshape(BQ * SLOTS * HEADS)
        acc = _sum_slots(acc * weight[:, None], BQ, SLOTS, HEADS)
        mass = tl.sum((mass * weight).reshape(BQ, SLOTS, HEADS), 1).reshape(BQ * HEADS)
        m = top.reshape(BQ * HEADS)
    o = tl.arange(0, BQ * HEADS)
    i_out = i_first + o // HEADS
    g_out = piece * HEADS + o % HEADS
    rows = (b * heads + h * GROUP + g_out) * nq + i_out
    ok = (i_out < nq) & (g_out < GROUP)
    some = mass > 0.0
    mass = tl.where(some, mass, 1.0)
    tl.store(lse + rows, tl.where(some, (m + tl.log2(mass)) * LN2, float("-inf")), mask=ok)
    factor = 1.0 / mass
    if DROPOUT:
        factor = factor / (1.0 - dropout_p)
    c = tl.arange(0, DV)
    tl.store(
        out + rows[:, None] * DIM_V + c[None, :],
        (acc * factor[:, None]).to(out.dtype.element_ty),
        mask=ok[:, None] & (c < DIM_V)[None, :],
    )


@triton.jit(do_not_specialize=["heads", "nq", "rows"])
def tensor_attention_delta_kernel(
    grad_out, out, grad_lse, delta, heads, nq, rows,
    stride_gb, stride_gh, stride_gn, stride_ob, stride_oh, stride_on,
    DIM_V: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = Σ_c dO ∘ O - dLSE, in float32: what is subtracted from dP. Contiguous (B, Hq, nq), as is grad_lse."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    i, h, b = r % nq, r // nq % heads, r // nq // heads
    grad = load_tile(grad_out, b * stride_gb + h * stride_gh + i * stride_gn, inside, DIM_V, DV).to(tl.float32)
    o = load_tile(out, b * stride_ob + h * stride_oh + i * stride_on, inside, DIM_V, DV).to(tl.float32)
    total = tl.sum(grad * o, 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + r, mask=inside, other=0.0)
    tl.store(delta + r, total, mask=inside)


@triton.jit
def _log2_lse(lse, rows, inside):
    """LSE in units of log2, +inf where there is no query or nothing was allowed: P is 0 there."""
    found = tl.load(lse + rows, mask=inside, other=float("-inf"))
    return tl.where(found == float("-inf"), float("inf"), found * LOG2E)


@triton.jit
def _query_step(
    a, w, shift, delta, acc, total, k2, v2, mask2, n, i, j, head, seed, k_hi, lower2, upper2,
    q_start, start1, start2, scale, dropout_p, stride_k2n, stride_v2n, stride_m2n,
    EDGE: tl.constexpr, HAS_MASK2: tl.constexpr, DROPOUT: tl.constexpr, SWAPPED: tl.constexpr, FORM: tl.constexpr,
    PRECISION: tl.constexpr, LOW: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One tile of columns k: acc + dS K2 and the row sums of dS."""
    exists, ok = _columns(n, i, k_hi, lower2, upper2, mask2, stride_m2n, EDGE and HAS_MASK2)
    keys = load_tile(k2, n.to(tl.int64) * stride_k2n, exists, DIM, D, 0, EDGE)
    x = dot(a, keys.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    p = tl.exp2(x * scale + shift[:, None])
    if EDGE:
        p = tl.where(ok, p, 0.0)
    values = load_tile(v2, n.to(tl.int64) * stride_v2n, exists, DIM_V, DV, 0, EDGE)
    dp = dot(w, values.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    if DROPOUT:
        kept = _kept(
            seed,
            dropout_p,
            head[:, None],
            (q_start + i)[:, None],
            (start1 + j)[:, None],
            (start2 + n)[None, :],
            SWAPPED,
        )
        dp = tl.where(kept, dp / (1.0 - dropout_p), 0.0)
    ds = p * (dp - delta[:, None])
    if FORM == "strassen":
        total += tl.sum(ds, 1)
    acc = dot(ds.to(keys.dtype), keys, acc, PRECISION, LOW)
    return acc, total


@triton.jit(do_not_specialize=_SIZES)
def tensor_attention_query_grad_kernel(
    q, k1, k2, v1, v2, mask1, mask2, seed, grad_out, lse, delta, grad_q,
    blocks, planes, heads, nq, n1, n2, lower1, upper1, lower2, upper2, q_start, start1, start2,
    scale, sign, dropout_p,
    stride_qb, stride_qh, stride_qn, stride_k1b, stride_k1h, stride_k1n, stride_k2b, stride_k2h, stride_k2n,
    stride_v1b, stride_v1h, stride_v1n, stride_v2b, stride_v2h, stride_v2n,
    stride_m1b, stride_m1n, stride_m2b, stride_m2n, stride_gb, stride_gh, stride_gn,
    ORDER: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr, SWAPPED: tl.constexpr, DROPOUT: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr, BQ: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dQ of BQ queries and HEADS heads of one group: the forward kernel's walk with P recomputed from LSE."""
    HAS_MASK2: tl.constexpr = mask2 is not None
    (
        i_first, plane, piece, i, slot, g, inside, j_first, count, passes, k_lo, k_hi, left, full, right
    ) = _query_tile(
        tl.program_id(0), blocks, planes, nq, n1, n2, lower1, upper1, lower2, upper2,
        ORDER, GROUP, HAS_MASK2, BQ, SLOTS, HEADS, BK,
    )  # fmt: skip
    kv_heads = heads // GROUP
    b = (plane // kv_heads).to(tl.int64)
    h = (plane % kv_heads).to(tl.int64)
    q += b * stride_qb
    k1 += b * stride_k1b + h * stride_k1h
    k2 += b * stride_k2b + h * stride_k2h
    v1 += b * stride_v1b + h * stride_v1h
    v2 += b * stride_v2b + h * stride_v2h
    grad_out += b * stride_gb
    if mask2 is not None:
        mask2 += b * stride_m2b
    q_rows = (h * GROUP + g) * stride_qh + i.to(tl.int64) * stride_qn
    grad_rows = (h * GROUP + g) * stride_gh + i.to(tl.int64) * stride_gn
    head = (b * heads + h * GROUP + g).to(tl.int32)
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    log2_scale = scale * LOG2E
    columns = tl.arange(0, BK)
    stats = (b * heads + h * GROUP + g) * nq + i
    row_lse = _log2_lse(lse, stats, inside)
    row_delta = tl.load(delta + stats, mask=inside, other=0.0)

    acc = tl.zeros((BQ * HEADS, D), tl.float32)
    for t in tl.range(0, passes, disable_licm=True, num_stages=1):
        j = j_first + t * SLOTS + slot
        ok = inside & (t * SLOTS + slot < count)
        if mask1 is not None:
            ok = ok & tl.load(mask1 + b * stride_m1b + j.to(tl.int64) * stride_m1n, mask=ok, other=0)
        k1_rows = j.to(tl.int64) * stride_k1n
        a, bias = _fuse(q, q_rows, ok, k1, k1_rows, ok, FORM, DIM, D)
        a = (a * sign).to(k2.dtype.element_ty)
        w, _ = _fuse(grad_out, grad_rows, ok, v1, j.to(tl.int64) * stride_v1n, ok, "trilinear", DIM_V, DV)
        w = w.to(v2.dtype.element_ty)
        shift = tl.where(ok, bias * sign * log2_scale - row_lse, float("-inf"))
        inner = tl.zeros((BQ * SLOTS * HEADS, D), tl.float32)
        total = tl.zeros((BQ * SLOTS * HEADS,), tl.float32)
        for s in range(0, full):
            inner, total = _query_step(
                a, w, shift, row_delta, inner, total, k2, v2, mask2, k_lo + (left + s) * BK + columns, i, j, head,
                key, k_hi, lower2, upper2, q_start, start1, start2, log2_scale, dropout_p,
                stride_k2n, stride_v2n, stride_m2n,
                False, HAS_MASK2, DROPOUT, SWAPPED, FORM, PRECISION, LOW, DIM, D, DIM_V, DV,
            )  # fmt: skip
        for s in range(0, left + right):
            n = k_lo + (s + tl.where(s < left, 0, full)) * BK + columns
            inner, total = _query_step(
                a, w, shift, row_delta, inner, total, k2, v2, mask2, n, i, j, head,
                key, k_hi, lower2, upper2, q_start, start1, start2, log2_scale, dropout_p,
                stride_k2n, stride_v2n, stride_m2n,
                True, HAS_MASK2, DROPOUT, SWAPPED, FORM, PRECISION, LOW, DIM, D, DIM_V, DV,
            )  # fmt: skip
        acc += _sum_slots(_unfuse(inner, total, k1, k1_rows, ok, FORM, DIM, D), BQ, SLOTS, HEADS)

    o = tl.arange(0, BQ * HEADS)
    i_out = i_first + o // HEADS
    g_out = piece * HEADS + o % HEADS
    rows = (b * heads + h * GROUP + g_out) * nq + i_out
    c = tl.arange(0, D)
    tl.store(
        grad_q + rows[:, None] * DIM + c[None, :],
        (acc * (scale * sign)).to(grad_q.dtype.element_ty),
        mask=((i_out < nq) & (g_out < GROUP))[:, None] & (c < DIM)[None, :],
    )


@triton.jit
def _key_step(
    a, w, bias, inner, inner_v, total, q, grad_out, lse, delta, n, n_end, first, last, j, k, head, seed, nq,
    q_start, start1, start2, scale, dropout_p, stride_qh, stride_qn, stride_gh, stride_gn,
    EDGE: tl.constexpr, DROPOUT: tl.constexpr, SWAPPED: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, LOW: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One tile of columns n = (query i, head g): inner + dS Q, inner_v + P dO and the row sums of dS."""
    exists = n < n_end
    i = n // GROUP
    g = (n % GROUP).to(tl.int64)
    stats = g * nq + i
    queries = load_tile(q, g * stride_qh + i.to(tl.int64) * stride_qn, exists, DIM, D, 0, EDGE)
    x = dot(a, queries.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    p = tl.exp2(x * scale + bias[:, None] - _log2_lse(lse, stats, exists)[None, :])
    if EDGE:
        p = tl.where((i[None, :] >= first[:, None]) & (i[None, :] <= last[:, None]), p, 0.0)
    grads = load_tile(grad_out, g * stride_gh + i.to(tl.int64) * stride_gn, exists, DIM_V, DV, 0, EDGE)
    dp = dot(w, grads.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    dropped = p
    if DROPOUT:
        kept = _kept(
            seed, dropout_p, (head + g.to(tl.int32))[None, :], (q_start + i)[None, :], (start1 + j)[:, None],
            (start2 + k)[:, None], SWAPPED,
        )  # fmt: skip
        dropped = tl.where(kept, p / (1.0 - dropout_p), 0.0)
        dp = tl.where(kept, dp / (1.0 - dropout_p), 0.0)
    inner_v = dot(dropped.to(grads.dtype), grads, inner_v, PRECISION, LOW)
    ds = p * (dp - tl.load(delta + stats, mask=exists, other=0.0)[None, :])
    if FORM == "strassen":
        total += tl.sum(ds, 1)
    inner = dot(ds.to(queries.dtype), queries, inner, PRECISION, LOW)
    return inner, inner_v, total


@triton.jit(do_not_specialize=_SIZES)
def tensor_attention_key_grad_kernel(
    q, k1, k2, v1, v2, mask1, mask2, seed, grad_out, lse, delta, grad_k1, grad_v1,
    blocks, planes, heads, nq, n1, n2, lower1, upper1, lower2, upper2, q_start, start1, start2,
    scale, sign, dropout_p,
    stride_qb, stride_qh, stride_qn, stride_k1b, stride_k1h, stride_k1n, stride_k2b, stride_k2h, stride_k2n,
    stride_v1b, stride_v1h, stride_v1n, stride_v2b, stride_v2h, stride_v2n,
    stride_m1b, stride_m1n, stride_m2b, stride_m2n, stride_gb, stride_gh, stride_gn,
    ORDER: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr, SWAPPED: tl.constexpr, DROPOUT: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr, RELATIVE: tl.constexpr, BJ: tl.constexpr, SLOTS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dK1 and dV1 of BJ keys of one group, summed over its heads. RELATIVE: slots count from each key's own first k."""
    block, plane = place(tl.program_id(0), blocks, planes, ORDER)
    kv_heads = heads // GROUP
    b = (plane // kv_heads).to(tl.int64)
    h = (plane % kv_heads).to(tl.int64)
    q += b * stride_qb + h * GROUP * stride_qh
    k1 += b * stride_k1b + h * stride_k1h
    k2 += b * stride_k2b + h * stride_k2h
    v1 += b * stride_v1b + h * stride_v1h
    v2 += b * stride_v2b + h * stride_v2h
    grad_out += b * stride_gb + h * GROUP * stride_gh
    head = (b * heads + h * GROUP).to(tl.int32)
    lse += (b * heads + h * GROUP) * nq
    delta += (b * heads + h * GROUP) * nq
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    log2_scale = scale * LOG2E
    columns = tl.arange(0, BC)

    r = tl.arange(0, BJ * SLOTS)
    slot = r % SLOTS
    j_a = block * BJ
    j_b = tl.minimum(j_a + BJ, n1) - 1
    j = j_a + r // SLOTS
    inside = j < n1
    if mask1 is not None:
        inside = inside & tl.load(mask1 + b * stride_m1b + j.to(tl.int64) * stride_m1n, mask=inside, other=0)
    # Key k meets key j where some query sees both: i in [j - upper1, j - lower1] and in [k - upper2, k - lower2].
    # These bounds grow with j and with k, so that the first and the last row of the tile bound all others.
    k_first_a = tl.maximum(tl.maximum(j_a - upper1, 0) + lower2, 0)
    k_first_b = tl.maximum(tl.maximum(j_b - upper1, 0) + lower2, 0)
    k_last_b = tl.minimum(tl.minimum(j_b - lower1, nq - 1) + upper2, n2 - 1)
    if RELATIVE:
        k_first = tl.maximum(tl.maximum(j - upper1, 0) + lower2, 0)
        count = tl.minimum(tl.minimum(j - lower1, nq - 1) + upper2, n2 - 1) - k_first + 1
        longest = tl.max(tl.where(j < n1, count, 0), 0)
    else:
        k_first = j * 0 + k_first_a
        k_first_b = k_first_a
        longest = k_last_b - k_first_a + 1
        count = j * 0 + longest
    passes = tl.cdiv(tl.maximum(longest, 0), SLOTS)

    acc = tl.zeros((BJ, D), tl.float32)
    acc_v = tl.zeros((BJ, DV), tl.float32)
    for t in tl.range(0, passes, disable_licm=True, num_stages=1):
        k = k_first + t * SLOTS + slot
        ok = inside & (t * SLOTS + slot < count)
        if mask2 is not None:
            ok = ok & tl.load(mask2 + b * stride_m2b + k.to(tl.int64) * stride_m2n, mask=ok, other=0)
        k2_rows = k.to(tl.int64) * stride_k2n
        v2_rows = k.to(tl.int64) * stride_v2n
        a, bias = _fuse(k1, j.to(tl.int64) * stride_k1n, ok, k2, k2_rows, ok, FORM, DIM, D)
        a = (a * sign).to(q.dtype.element_ty)
        w, _ = _fuse(v1, j.to(tl.int64) * stride_v1n, ok, v2, v2_rows, ok, "trilinear", DIM_V, DV)
        w = w.to(grad_out.dtype.element_ty)
        bias = tl.where(ok, bias * sign * log2_scale, float("-inf"))

        k_a = k_first_a + t * SLOTS
        k_b = tl.minimum(tl.minimum(k_first_b + t * SLOTS + SLOTS - 1, k_last_b), n2 - 1)
        lo = tl.maximum(tl.maximum(j_a - upper1, k_a - upper2), 0) * GROUP
        hi = tl.maximum(tl.minimum(tl.minimum(j_b - lower1, k_b - lower2), nq - 1) + 1, 0) * GROUP
        full_lo = tl.maximum(tl.maximum(j_b - upper1, k_b - upper2), 0) * GROUP
        full_hi = tl.maximum(tl.minimum(tl.minimum(j_a - lower1, k_a - lower2), nq - 1) + 1, 0) * GROUP
        left, full, right = peel(lo, hi, full_lo, full_hi, BC)
        first = tl.maximum(j - upper1, k - upper2)
        last = tl.minimum(j - lower1, k - lower2)
        inner = tl.zeros((BJ * SLOTS, D), tl.float32)
        inner_v = tl.zeros((BJ * SLOTS, DV), tl.float32)
        total = tl.zeros((BJ * SLOTS,), tl.float32)
        for s in range(0, full):
            inner, inner_v, total = _key_step(
                a, w, bias, inner, inner_v, total, q, grad_out, lse, delta, lo + (left + s) * BC + columns, hi,
                first, last, j, k, head, key, nq, q_start, start1, start2, log2_scale, dropout_p,
                stride_qh, stride_qn, stride_gh, stride_gn,
                False, DROPOUT, SWAPPED, FORM, GROUP, PRECISION, LOW, DIM, D, DIM_V, DV,
            )  # fmt: skip
        for s in range(0, left + right):
            n = lo + (s + tl.where(s < left, 0, full)) * BC + columns
            inner, inner_v, total = _key_step(
                a, w, bias, inner, inner_v, total, q, grad_out, lse, delta, n, hi,
                first, last, j, k, head, key, nq, q_start, start1, start2, log2_scale, dropout_p,
                stride_qh, stride_qn, stride_gh, stride_gn,
                True, DROPOUT, SWAPPED, FORM, GROUP, PRECISION, LOW, DIM, D, DIM_V, DV,
            )  # fmt: skip
        acc += _sum_slots(_unfuse(inner, total, k2, k2_rows, ok, FORM, DIM, D), BJ, SLOTS, 1)
        acc_v += _sum_slots(inner_v * load_tile(v2, v2_rows, ok, DIM_V, DV, 0, True, True).to(tl.float32), BJ, SLOTS, 1)

    j_out = j_a + tl.arange(0, BJ)
    rows = plane.to(tl.int64) * n1 + j_out
    c = tl.arange(0, D)
    tl.store(
        grad_k1 + rows[:, None] * DIM + c[None, :],
        (acc * (scale * sign)).to(grad_k1.dtype.element_ty),
        mask=(j_out < n1)[:, None] & (c < DIM)[None, :],
    )
    c_v = tl.arange(0, DV)
    tl.store(
        grad_v1 + rows[:, None] * DIM_V + c_v[None, :],
        acc_v.to(grad_v1.dtype.element_ty),
        mask=(j_out < n1)[:, None] & (c_v < DIM_V)[None, :],
    )


# Configurations. A candidate is a dict of the kernel's tile constexprs, num_warps and num_stages. What a program holds
# are float32 accumulators of its rows, of all channels: two while it walks the columns, so that 64 rows of 128 channels
# take 128 registers of each thread of 4 warps. wgmma and tcgen05 lay 4 warps along 64 rows, and more warps than rows
# have room for would repeat each other's work. mma.sync lays all warps along the columns where those are more than the
# rows: 32 rows by 64 columns is what has room for 256 channels, and for float32.
#
# What to expect of the forward kernel on an H100, by arithmetic alone, for 128 rows, 64 columns and 128 channels in
# bfloat16: a tile is 4.2 MFLOP, 1024 cycles of an SM's tensor cores; its 8192 exponentials are 512 cycles of the
# special function units, beside them, and its 440 instructions a warp 880 cycles of the schedulers. With two groups of
# warps at different points of their tiles these overlap in part; without any overlap the tensor cores would be busy
# 54 % of the time. A tile brings 32 KB from L2, one byte for 128 FLOP: 3.5 TB/s at 450 TFLOP/s, which is why a group
# of 64 heads takes two keys j at once rather than 64 rows. The start of a pass (fusing, the pipeline's first loads) is
# shared by w2 / 64 tiles. The key kernel moves a byte for 128 FLOP with 64 rows, in two programs an SM; the dQ kernel
# one for 192.

_FORWARD, _QUERY, _KEY = "forward", "query", "key"
_Shape = tuple[int, int, int, int]  # rows, columns, num_warps, num_stages

# For 64, 128 and 256 padded channels, the default first.
_WARPGROUP: dict[str, tuple[tuple[_Shape, ...], ...]] = {
    _FORWARD: (
        ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        ((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)),
        ((32, 64, 8, 2), (32, 64, 4, 2)),
    ),
    _QUERY: (
        ((64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2)),
        ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)),
        ((32, 64, 8, 2), (32, 64, 4, 2)),
    ),
    _KEY: (
        ((64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2)),
        ((64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
        ((32, 64, 8, 2), (32, 64, 4, 1)),
    ),
}
_MMA_SYNC: dict[str, tuple[tuple[_Shape, ...], ...]] = {
    _FORWARD: (
        ((128, 64, 8, 2), (64, 64, 4, 3), (32, 64, 4, 3)),
        ((128, 32, 8, 3), (64, 32, 4, 3), (32, 64, 4, 2)),
        ((32, 64, 8, 2), (16, 64, 4, 2)),
    ),
    _QUERY: (
        ((64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3)),
        ((64, 128, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
        ((32, 64, 8, 2), (16, 64, 4, 2)),
    ),
    _KEY: (
        ((64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2)),
        ((64, 128, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
        ((32, 64, 8, 2), (16, 64, 4, 2)),
    ),
}
_HIP: tuple[tuple[_Shape, ...], ...] = (
    ((128, 32, 4, 1), (64, 64, 4, 1), (64, 32, 4, 2)),
    ((64, 32, 4, 1), (128, 32, 4, 1), (64, 64, 4, 1)),
    ((32, 32, 4, 1), (64, 32, 4, 1)),
)
_HIP_FLOAT32: tuple[tuple[_Shape, ...], ...] = (
    ((32, 32, 4, 1), (64, 32, 4, 1)),
    ((32, 32, 4, 1), (32, 16, 4, 1)),
    ((16, 16, 4, 1), (16, 32, 4, 1)),
)
_FLOAT32: tuple[tuple[_Shape, ...], ...] = (
    ((32, 64, 8, 2), (32, 64, 4, 2)),
    ((32, 64, 8, 1), (16, 32, 4, 2)),
    ((16, 32, 4, 1),),
)


def _tiles(kind: str, low: bool, d: int, target: Target) -> tuple[_Shape, ...]:
    """The tiles that suit ``d`` padded channels."""
    if target[0] == "interpreter":
        return ((32, 16, 4, 1),)
    size = 0 if d <= 64 else 1 if d <= 128 else 2
    warpgroup = target[0] == "cuda" and 90 <= int(target[1]) < 120
    if target[0] == "hip":
        return _HIP[size] if low else _HIP_FLOAT32[size]
    if not low:
        # The other kernels' accumulators would not fit the tensor memory of sm_100 so.
        return ((64, 32, 4, 2), *_FLOAT32[0]) if warpgroup and size == 0 and kind == _FORWARD else _FLOAT32[size]
    return (_WARPGROUP if warpgroup else _MMA_SYNC)[kind][size]


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to the first that holds ``most``."""
    return [1 << e for e in range(bucket(max(most, 1)).bit_length())]


def _round(n: int, multiple: int) -> int:
    return cdiv(n, multiple) * multiple


_PASS = 32  # what a pass costs beside its tiles (loading, fusing, merging), in columns


def _query_rows(rows: int, columns: int, group: int, nq: int, span1: int, span2: int) -> dict[str, int]:
    """BQ · SLOTS · HEADS = ``rows`` with the least computed for each query and head.

    Args:
        rows, columns: the tile.
        group: query heads a key head.
        nq, span1, span2: queries, and keys of either set that a query sees at most.
    """
    best, cost = (rows, 1, 1), math.inf
    for heads in _powers(group):
        for slots in _powers(span1):
            bq = rows // (heads * slots)
            if bq == 0:
                continue
            work = _round(group, heads) / group * _round(max(nq, 1), bq) / max(nq, 1)
            work *= _round(span1, slots) * (_round(span2 + bq - 1, columns) + _PASS)
            # Merging slots and smaller runs of heads cost a little: they must earn it.
            work *= 1.0 + 0.01 * math.log2(slots) + 0.002 * math.log2(bq)
            if work < cost:
                best, cost = (bq, slots, heads), work
    return dict(zip(("BQ", "SLOTS", "HEADS"), best, strict=True))


def _key_rows(rows: int, columns: int, group: int, span1: int, span2: int, nq: int, n2: int) -> dict[str, Any]:
    """BJ · SLOTS = ``rows`` with the least computed for each key, of set 1, and whether slots are RELATIVE to it.

    Key j meets span1 + span2 - 1 keys of set 2, and with each of them the queries that see both.
    """
    best, cost = (1, rows, True), math.inf
    for bj in _powers(rows):
        slots = rows // bj
        for relative in (False, True):
            others = min(span1 + span2 - 1 + (0 if relative else bj - 1), n2)
            queries = min(span1 + bj - 1, span2 + slots - 1 + (bj - 1 if relative else 0), nq)
            work = float(_round(others, slots) * (_round(queries * group, columns) + _PASS))
            work *= 1.0 + 0.01 * math.log2(slots) + 0.01 * relative
            if work < cost:
                best, cost = (bj, slots, relative), work
    return dict(zip(("BJ", "SLOTS", "RELATIVE"), best, strict=True))


# Launchers


class _Keys(NamedTuple):
    """One of the two sets of keys. Query i (an index) sees keys i + lower ... i + upper (indices)."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    lower: int
    upper: int
    start: int

    @property
    def length(self) -> int:
        return self.key.shape[2]

    @property
    def span(self) -> int:
        return max(min(self.length, self.upper - self.lower + 1), 1)


@dataclass(frozen=True)
class _Problem:
    """Checked arguments, as the kernels see them."""

    q: torch.Tensor
    first: _Keys
    second: _Keys
    seed: torch.Tensor | None
    scale: float
    dropout_p: float
    form: str
    start: int
    swapped: bool = False

    def swap(self) -> _Problem:
        """The same problem with the roles of the two sets exchanged; a determinant changes its sign."""
        scale = -self.scale if self.form == "determinant" else self.scale
        return replace(self, first=self.second, second=self.first, scale=scale, swapped=not self.swapped)

    @property
    def empty(self) -> bool:
        return self.q.numel() == 0 or self.first.key.numel() == 0 or self.second.key.numel() == 0

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.first.key.shape[1]

    @property
    def dim(self) -> int:
        return self.q.shape[3]

    @property
    def dim_v(self) -> int:
        return self.first.value.shape[3]

    @property
    def low(self) -> bool:
        return self.q.dtype != torch.float32

    def order(self, of_queries: bool) -> int:
        """1: early blocks are heavier, -1: late ones are, 0: all the same."""
        sets = (self.first, self.second)
        left = any(s.lower <= -_UNLIMITED // 2 for s in sets)
        right = any(s.upper >= _UNLIMITED // 2 for s in sets)
        return 0 if left == right else (-1 if left else 1) * (1 if of_queries else -1)


_UNLIMITED = 2**30
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_CHANNELS = 256


def _bounds(name: str, window: list[int], is_causal: bool, shift: int) -> tuple[int, int]:
    """(lower, upper) in indices: ``shift`` is the position of query 0 less that of key 0."""
    if len(window) != 2 or min(window) < -1:
        raise ValueError(f"{name} must be (left, right), each at least -1 (unlimited), got {tuple(window)}")
    left, right = window[0], 0 if is_causal else window[1]
    lower = -_UNLIMITED if left < 0 else max(shift - left, -_UNLIMITED)
    upper = _UNLIMITED if right < 0 else min(shift + right, _UNLIMITED)
    return min(lower, _UNLIMITED), max(upper, -_UNLIMITED)


def _word(n: int) -> int:
    """The low 32 bits of a position, as the int32 that has them."""
    return (n + 2**31) % 2**32 - 2**31


def _check(q, k1, k2, v1, v2, mask1, mask2, seed, dropout_p, form) -> None:
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape (B, H, N, channels), got {tuple(x.shape)}")
        if not 1 <= x.shape[3] <= _MOST_CHANNELS:
            raise ValueError(f"{name} must have 1 to {_MOST_CHANNELS} channels, got {x.shape[3]}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, got {x.device}")
    b, heads, nq, d = q.shape
    kv_heads, dv = k1.shape[1], v1.shape[3]
    for name, x, length, channels in (
        ("k1", k1, k1.shape[2], d),
        ("k2", k2, k2.shape[2], d),
        ("v1", v1, k1.shape[2], dv),
        ("v2", v2, k2.shape[2], dv),
    ):
        if x.shape != (b, kv_heads, length, channels):
            raise ValueError(f"{name} must have shape {(b, kv_heads, length, channels)}, got {tuple(x.shape)}")
    if heads % max(kv_heads, 1) or (kv_heads == 0 and heads):
        raise ValueError(f"q must have a multiple of the {kv_heads} heads of k1, got {heads}")
    if max(nq * max(heads // max(kv_heads, 1), 1), k1.shape[2], k2.shape[2]) >= _UNLIMITED:
        raise ValueError(f"lengths times heads of a group must be below 2^30, got {nq}, {k1.shape[2]}, {k2.shape[2]}")
    for name, mask, x in (("mask1", mask1, k1), ("mask2", mask2, k2)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, True = keep, got {mask.dtype}")
        if mask.shape != (b, x.shape[2]) or mask.device != q.device:
            raise ValueError(
                f"{name} must have shape {(b, x.shape[2])} on {q.device}, got {tuple(mask.shape)} on {mask.device}"
            )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    if form == "determinant" and d % 3:
        raise ValueError(f"q must have a multiple of 3 channels for form='determinant', got {d}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError("seed must be an int64 tensor with one element where dropout_p > 0")


def _problem(
    q, k1, k2, v1, v2, mask1, mask2, seed, scale, dropout_p, window1, window2, is_causal, form,
    q_offset, k1_offset, k2_offset,
) -> _Problem:  # fmt: skip
    _check(q, k1, k2, v1, v2, mask1, mask2, seed, dropout_p, form)
    sets = []
    for name, key, value, mask, window, offset in (
        ("window1", k1, v1, mask1, window1, k1_offset),
        ("window2", k2, v2, mask2, window2, k2_offset),
    ):
        bounds = _bounds(name, window, is_causal, q_offset - offset)
        sets.append(_Keys(unit(key), unit(value), mask, *bounds, offset))
    seed = seed.to(q.device) if dropout_p > 0.0 else None
    return _Problem(unit(q), sets[0], sets[1], seed, scale, dropout_p, form, q_offset)


def _arguments(problem: _Problem) -> dict[str, Any]:
    """What all three large kernels take, but for pointers of results and the grid."""
    p, one, two = problem, problem.first, problem.second
    arguments: dict[str, Any] = {
        "q": p.q, "k1": one.key, "k2": two.key, "v1": one.value, "v2": two.value,
        "mask1": one.mask, "mask2": two.mask, "seed": p.seed,
        "heads": p.q.shape[1], "nq": p.q.shape[2], "n1": one.length, "n2": two.length,
        "lower1": one.lower, "upper1": one.upper, "lower2": two.lower, "upper2": two.upper,
        "q_start": _word(p.start), "start1": _word(one.start), "start2": _word(two.start),
        # The kernels want a scale above 0: a maximum commutes with it.
        "scale": abs(p.scale) or 1.0, "sign": float((p.scale > 0) - (p.scale < 0)), "dropout_p": p.dropout_p,
    }  # fmt: skip
    for name, x in (("q", p.q), ("k1", one.key), ("k2", two.key), ("v1", one.value), ("v2", two.value)):
        arguments |= {f"stride_{name}{axis}": x.stride(a) for a, axis in enumerate("bhn")}
    for name, mask in (("m1", one.mask), ("m2", two.mask)):
        strides = (0, 0) if mask is None else mask.stride()
        arguments |= {f"stride_{name}{axis}": stride for axis, stride in zip("bn", strides, strict=True)}
    return arguments


def _constants(problem: _Problem, precision: str, of_queries: bool) -> dict[str, Any]:
    p = problem
    return {
        "ORDER": p.order(of_queries), "GROUP": p.group, "FORM": p.form, "SWAPPED": p.swapped,
        "DROPOUT": p.dropout_p > 0.0, "DIM": p.dim, "D": padded(p.dim), "DIM_V": p.dim_v, "DV": padded(p.dim_v),
        "PRECISION": precision, "LOW": p.low and not INTERPRET,
    }  # fmt: skip


def _query_candidates(kind: str, problem: _Problem, target: Target) -> list[dict[str, Any]]:
    """Launch configurations of the forward and the dQ kernel, the default first."""
    p = problem
    found: list[dict[str, Any]] = []
    for rows, columns, warps, stages in _tiles(kind, p.low, max(padded(p.dim), padded(p.dim_v)), target):
        split = _query_rows(rows, columns, p.group, p.q.shape[2], p.first.span, p.second.span)
        found.append(split | {"BK": columns, "num_warps": warps, "num_stages": stages})
    return found


def _key_candidates(problem: _Problem, target: Target) -> list[dict[str, Any]]:
    """Launch configurations of the dK, dV kernel, the default first."""
    p = problem
    found: list[dict[str, Any]] = []
    for rows, columns, warps, stages in _tiles(_KEY, p.low, max(padded(p.dim), padded(p.dim_v)), target):
        split = _key_rows(rows, columns, p.group, p.first.span, p.second.span, p.q.shape[2], p.second.length)
        found.append(split | {"BC": columns, "num_warps": warps, "num_stages": stages})
    return found


def _run(kind: str, problem: _Problem, outputs: dict[str, Any], candidates: list[dict[str, Any]] | None = None) -> None:
    """Launch one of the three large kernels; ``candidates`` overrides the launch configurations."""
    p = problem
    target = _lib.target_of(p.q.device)
    if candidates is None:
        candidates = _key_candidates(p, target) if kind == _KEY else _query_candidates(kind, p, target)
    # The interpreter's time goes by operations: one product for each instead of three.
    precision = dot_precision(target, "ieee" if INTERPRET else None, low=p.low)
    arguments = _arguments(p) | outputs
    constants = _constants(p, precision, kind != _KEY)

    def launch(meta: dict[str, Any]) -> None:
        planes = p.first.key.shape[0] * p.first.key.shape[1]
        if kind == _KEY:
            blocks = cdiv(p.first.length, meta["BJ"])
        else:
            blocks, planes = cdiv(p.q.shape[2], meta["BQ"]), planes * cdiv(p.group, meta["HEADS"])
        passed = arguments | {"blocks": blocks, "planes": planes} | constants | meta
        grid = (blocks * planes,)
        if kind == _FORWARD:
            tensor_attention_forward_kernel[grid](**passed)
        elif kind == _QUERY:
            tensor_attention_query_grad_kernel[grid](**passed)
        else:
            tensor_attention_key_grad_kernel[grid](**passed)

    masks = (p.first.mask is not None, p.second.mask is not None)
    sizes = tuple(bucket(n) for n in (p.first.span, p.second.span, p.q.shape[2]))
    key = (p.q.dtype, *sorted((k, v) for k, v in constants.items() if k != "SWAPPED"), masks, sizes)
    with _lib.device_guard(p.q):
        launch(_lib.pick(f"tensor_attention_{kind}", key, candidates, launch, p.q.device))


def _inner_larger(problem: _Problem) -> _Problem:
    """The problem with the larger window second: that is walked in tiles."""
    return problem.swap() if problem.second.span < problem.first.span else problem


def _launch_forward(problem: _Problem, candidates=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel; ``candidates`` overrides the launch configurations (tests go through all of them)."""
    p = problem
    b, heads, nq, _ = p.q.shape
    out = torch.empty((b, heads, nq, p.dim_v), dtype=p.q.dtype, device=p.q.device)
    lse = torch.empty((b, heads, nq), dtype=torch.float32, device=p.q.device)
    if p.empty:
        return out.zero_(), lse.fill_(float("-inf"))
    _run(_FORWARD, _inner_larger(p), {"out": out, "lse": lse}, candidates)
    return out, lse


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(a) for a, axis in enumerate("bhn")}


def _launch_backward(
    problem: _Problem, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    query_candidates=None, key_candidates=None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Run the kernels for dQ, for dK1 and dV1, and again with the sets exchanged for dK2 and dV2."""
    p = problem
    b, heads, nq, _ = p.q.shape
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (p.q, p.first.key, p.second.key, p.first.value, p.second.value)
    ]
    if p.empty:
        return tuple(grad.zero_() for grad in grads)
    grad_out, out, lse = unit(grad_out), unit(out), lse.contiguous()
    delta = torch.empty((b, heads, nq), dtype=torch.float32, device=p.q.device)
    rows = 16 if INTERPRET else 32
    with _lib.device_guard(p.q):
        tensor_attention_delta_kernel[(cdiv(delta.numel(), rows),)](
            grad_out, out, None if grad_lse is None else grad_lse.contiguous(), delta, heads, nq, delta.numel(),
            *grad_out.stride()[:3], *out.stride()[:3], DIM_V=p.dim_v, DV=padded(p.dim_v), ROWS=rows,
        )  # fmt: skip
    shared = {"grad_out": grad_out, "lse": lse, "delta": delta, **_strides("g", grad_out)}
    _run(_QUERY, _inner_larger(p), shared | {"grad_q": grads[0]}, query_candidates)
    _run(_KEY, p, shared | {"grad_k1": grads[1], "grad_v1": grads[3]}, key_candidates)
    _run(_KEY, p.swap(), shared | {"grad_k1": grads[2], "grad_v1": grads[4]}, key_candidates)
    return tuple(grads)


# Operations


def _tensor_attention_forward(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    mask1: torch.Tensor | None,
    mask2: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    window1: list[int],
    window2: list[int],
    is_causal: bool,
    form: str,
    q_offset: int,
    k1_offset: int,
    k2_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_forward(
        _problem(
            q, k1, k2, v1, v2, mask1, mask2, seed, scale, dropout_p, window1, window2, is_causal, form,
            q_offset, k1_offset, k2_offset,
        )
    )  # fmt: skip


def _tensor_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask1: torch.Tensor | None,
    mask2: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    window1: list[int],
    window2: list[int],
    is_causal: bool,
    form: str,
    q_offset: int,
    k1_offset: int,
    k2_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    problem = _problem(
        q, k1, k2, v1, v2, mask1, mask2, seed, scale, dropout_p, window1, window2, is_causal, form,
        q_offset, k1_offset, k2_offset,
    )  # fmt: skip
    dq, dk1, dk2, dv1, dv2 = _launch_backward(problem, grad_out, grad_lse, out, lse)
    return dq, dk1, dk2, dv1, dv2


tensor_attention_forward_op = custom_op("tensor_attention_forward", _tensor_attention_forward)
tensor_attention_backward_op = custom_op("tensor_attention_backward", _tensor_attention_backward)


@tensor_attention_forward_op.register_fake
def _(q, k1, k2, v1, v2, *rest):
    shape = (*q.shape[:3], v1.shape[3])
    return q.new_empty(shape), q.new_empty(shape[:3], dtype=torch.float32)


@tensor_attention_backward_op.register_fake
def _(grad_out, grad_lse, q, k1, k2, v1, v2, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k1, k2, v1, v2))


def _setup(ctx, inputs, output) -> None:
    *tensors, scale, dropout_p, window1, window2, is_causal, form, q_offset, k1_offset, k2_offset = inputs
    ctx.options = (scale, dropout_p, window1, window2, is_causal, form, q_offset, k1_offset, k2_offset)
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k1, k2, v1, v2, mask1, mask2, seed, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = tensor_attention_backward_op(
        grad_out, grad_lse, q, k1, k2, v1, v2, out, lse, mask1, mask2, seed, *ctx.options
    )
    return *grads, *(None,) * 12


def _no_second_order(ctx, *grads):
    raise RuntimeError(
        "tensor_attention_backward is not differentiable: for second derivatives of tensor_attention use "
        "backend='dense' (plain torch)"
    )


tensor_attention_forward_op.register_autograd(_backward, setup_context=_setup)
tensor_attention_backward_op.register_autograd(_no_second_order)


def tensor_attention_forward(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    mask1: torch.Tensor | None = None,
    mask2: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    window1: list[int] | tuple[int, int] = (-1, -1),
    window2: list[int] | tuple[int, int] = (-1, -1),
    is_causal: bool = False,
    form: str = "trilinear",
    q_offset: int = 0,
    k1_offset: int = 0,
    k2_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensor attention and its log-sum-exp, differentiable once, through both results.

    Args:
        q: (B, Hq, nq, d), float32, float16 or bfloat16, d from 1 to 256; any strides, read in place where channels
            are neighbours.
        k1, v1: (B, Hk, n1, d) and (B, Hk, n1, dv), Hq a multiple of Hk; likewise.
        k2, v2: (B, Hk, n2, d) and (B, Hk, n2, dv); likewise.
        mask1, mask2: bool (B, n1) and (B, n2), True = keep, or None.
        seed: int64, one element, where ``dropout_p`` > 0.
        scale: of the logits; any float32, 0 and below included.
        dropout_p: probability of dropping an entry of P, by counter on (seed, batch and head, positions i, j, k).
        window1, window2: (left, right): position p sees i - left <= p <= i + right, -1 is unlimited.
        is_causal: right = 0 in both.
        form: ``"trilinear"``, ``"determinant"`` (d a multiple of 3) or ``"strassen"``.
        q_offset, k1_offset, k2_offset: position of the first query and the first key of each set.

    Returns:
        out (B, Hq, nq, dv) in the dtype of ``q`` and lse (B, Hq, nq) in float32, natural logarithm, both contiguous;
        0 and -inf where nothing is allowed.

    Raises:
        TypeError: another dtype, or dtypes that differ. ValueError: shapes, devices or options that do not fit.
        RuntimeError: a second derivative.
    """
    return tensor_attention_forward_op(
        q, k1, k2, v1, v2, mask1, mask2, seed, scale, dropout_p, list(window1), list(window2), is_causal, form,
        q_offset, k1_offset, k2_offset,
    )  # fmt: skip


def tensor_attention_backward(
    grad_out, grad_lse, q, k1, k2, v1, v2, out, lse, mask1=None, mask2=None, seed=None, scale=1.0, dropout_p=0.0,
    window1=(-1, -1), window2=(-1, -1), is_causal=False, form="trilinear", q_offset=0, k1_offset=0, k2_offset=0,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients (dq, dk1, dk2, dv1, dv2) of :func:`tensor_attention_forward`, from its arguments and results.

    Args:
        grad_out: (B, Hq, nq, dv) in the dtype of ``q``. grad_lse: (B, Hq, nq) float32, or None for zero.
        out, lse: what the forward operation returned; for a part of the keys of a larger attention (a ring), those of
            the whole: P is recomputed from lse.

    Returns:
        contiguous gradients in the dtype of the inputs, summed over the query heads of a group.
    """
    return tensor_attention_backward_op(
        grad_out, grad_lse, q, k1, k2, v1, v2, out, lse, mask1, mask2, seed, scale, dropout_p, list(window1),
        list(window2), is_causal, form, q_offset, k1_offset, k2_offset,
    )  # fmt: skip


# Production configurations: what the launchers pass for tensors of a shape, read off their own arguments.

_NOTE = (
    "What rests in local memory does so between passes: the owners' accumulators and the addresses of rows, and for "
    "the determinant the permuted tiles. The loops over columns hold none of it on sm_90, but for up to six words in "
    "the key kernel's. With less than 64 rows, products are mma.sync on sm_90 and sm_100."
)


def _example(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, window1: int = -1, window2: int = -1,
    form: str = "trilinear",
) -> _Problem:  # fmt: skip
    """A causal problem without data, in the layout (B, N, H, d) that a projection leaves."""
    q, k = (torch.empty((4, 4096, h, d), dtype=dtype, device="meta").transpose(1, 2) for h in (heads, kv_heads))
    return _problem(
        q, k, k, k, k, None, None, None, d**-0.5, 0.0, [window1, -1], [window2, -1], True, form, 0, 0, 0
    )  # fmt: skip


def _register(kind: str, label: str, problem: _Problem, budget: dict[str, int], *, cores: bool = True) -> None:
    """The default configuration of one kernel, an entry for the targets that share it."""
    p = problem
    stats = torch.empty(p.q.shape[:3], dtype=torch.float32, device="meta")
    outputs: dict[str, Any] = {"blocks": 1, "planes": 1, "lse": stats}
    if kind != _KEY:
        p = _inner_larger(p)
    if kind == _FORWARD:
        kernel, outputs = tensor_attention_forward_kernel, outputs | {"out": p.q}
    else:
        outputs |= {"grad_out": p.q, "delta": stats, **_strides("g", p.q)}
        if kind == _QUERY:
            kernel, outputs = tensor_attention_query_grad_kernel, outputs | {"grad_q": p.q}
        else:
            kernel, outputs = tensor_attention_key_grad_kernel, outputs | {"grad_k1": p.q, "grad_v1": p.q}
    signature, constants = signature_of(_arguments(p) | outputs, _SIZES)
    low = p.low
    constants |= _constants(p, "", kind != _KEY) | {"LOW": low}
    constants["PRECISION"] = lambda target: dot_precision(target, low=low)

    def default(target: Target) -> dict[str, Any]:
        return (_key_candidates(p, target) if kind == _KEY else _query_candidates(kind, p, target))[0]

    name = f"tensor_attention_{kind}[{label}]"
    register_defaults(
        kernel, name, signature, constants, default, tensor_cores=cores, spill_budget=budget, note=_NOTE
    )  # fmt: skip


_GQA = _example(torch.bfloat16, 64, 1, 128, 31, 511)
_MHA = _example(torch.bfloat16, 8, 8, 64)
_MHA32 = _example(torch.float32, 8, 8, 64)
_DET = _example(torch.bfloat16, 8, 8, 96, 127, 127, "determinant")
_register(_FORWARD, "bf16,d128,g64,w32x512", _GQA, {"sm_80": 64})
_register(_QUERY, "bf16,d128,g64,w32x512", _GQA, {"sm_90": 32})
_register(_KEY, "bf16,d128,g64,w32x512", _GQA, {"sm_80": 32, "sm_90": 512, "sm_100": 320})
_register(_FORWARD, "bf16,d64", _MHA, {"sm_80": 32})
_register(_FORWARD, "fp32,d64", _MHA32, {"sm_80": 32, "sm_90": 64, "sm_100": 64})
_register(_KEY, "fp32,d64", _MHA32, {"sm_80": 32, "sm_90": 32, "sm_100": 32}, cores=False)
_register(_QUERY, "bf16,d96,det,w128x128", _DET, {"sm_80": 512, "sm_90": 1408, "sm_100": 1408})
register_config(
    KernelConfig(
        kernel=tensor_attention_delta_kernel,
        name="tensor_attention_delta[bf16,d128]",
        signature={"grad_out": "*bf16:16", "out": "*bf16:16", "delta": "*fp32:16", "heads": "i32", "nq": "i32"}
        | {"rows": "i32"} | {f"stride_{x}{axis}": "i32:16" for x in "go" for axis in "bhn"},
        constexprs={"grad_lse": None, "DIM_V": 128, "DV": 128, "ROWS": 32},
        tensor_cores=False,
    )
)  # fmt: skip
