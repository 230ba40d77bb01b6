"""One hop of ring attention: a rank's queries against the keys it holds for the moment, forward and backward.

::

    s_ij = scale · q_i · k_j      m' ≥ max(m, max_j s_ij)      l' = l exp(m - m') + Σ_j exp(s_ij - m')
    acc' = acc exp(m - m') + Σ_j exp(s_ij - m') v_j            last hop: out = acc / l, lse = m + log l

The forward kernel loads and stores the running state (m, l, acc), so that hops merge inside of it and only the last one
rounds. m is kept a multiple of log 2, at or up to log 2 above the largest logit: all factors between references are
powers of two, and carrying a state over any number of hops costs no rounding. The first hop reads no state, the last
one writes none.

Positions in a shard ascend, and every mask is an interval of key positions that moves on with the query. So a query
sees an interval of the shard's own indices, and a key is seen by one: :func:`_seen` gives them, in closed form where
positions are base + step · i in up to two runs (contiguous, striped and zigzag layouts), from two int32 tables of the
launcher's where they are not (documents). From those of a tile's first and last row follow the tiles that are walked
without a test, those that test their entries, and that nothing needs to be done.

Backward takes the LSE and the row sums Σ_c dO ∘ O - dLSE of the whole softmax: one kernel for dK and dV, summed over
the query heads of a group, and one for dQ. Every number has one writer: no atomics, and the same bits each time.

The launchers run inside of one registered operation, which holds the whole ring, and are not registered themselves.

Sources: arXiv 2310.01889 (the ring), 2311.09431 (striped), 2307.08691 (the tiles).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _lib
from ._attention import LN2, LOG2E, load_tile, padded, peel, place, signature_of, unit
from ._lib import INTERPRET, Target, bucket, cdiv, dot, dot_precision, register_defaults

# In comments and docstrings: ROWS of a program and COLS of a step; D and DV channels padded to a power of two. A side,
# queries or keys, has its positions as runs (base0, split, base1, step): see _position.


@triton.jit
def _position(i, runs, table, inside):
    """Where local index i is: base0 + step · i for i < split, base1 + step · (i - split) from there on."""
    if table is not None:
        return tl.load(table + i, mask=inside, other=0)
    else:
        base0, split, base1, step = runs
        return tl.where(i < split, base0 + step * i, base1 + step * (i - split))


@triton.jit
def _before(x, runs, n):
    """How many of n local indices are at positions below x."""
    base0, split, base1, step = runs
    head = tl.minimum((tl.maximum(x - base0, 0) + step - 1) // step, split)
    tail = tl.minimum((tl.maximum(x - base1, 0) + step - 1) // step, n - split)
    return head + tail


@triton.jit
def _seen(i, runs, others, n, lower, upper, start, stop, inside):
    """[first, end): the indices of the other side, of n, at positions p + lower ... p + upper, p that of index i."""
    if start is not None:
        return tl.load(start + i, mask=inside, other=0), tl.load(stop + i, mask=inside, other=0)
    else:
        p = _position(i, runs, None, inside)
        return _before(p + lower, others, n), _before(p + upper + 1, others, n)


@triton.jit
def _walk(block, n_own, runs, others, n, lower, upper, start, stop, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The columns [lo, ...) of ROWS rows, as tiles before, wholly within, and after what all rows see."""
    i_first = block * ROWS
    i_last = tl.minimum(i_first + ROWS, n_own) - 1
    lo, full_hi = _seen(i_first, runs, others, n, lower, upper, start, stop, True)
    full_lo, hi = _seen(i_last, runs, others, n, lower, upper, start, stop, True)
    left, full, right = peel(lo, hi, full_lo, full_hi, COLS)
    return lo, left, full, right


@triton.jit
def _kept(seed, p, counter, q_at, k_at):
    """What dropout keeps, from positions alone."""
    word, _, _, _ = tl.philox(seed, counter, q_at, k_at, k_at * 0)
    return tl.uint_to_uniform_float(word) >= p


@triton.jit
def _forward_step(
    a, m, mass, acc, k, v, k_table, n, nk, first, end, q_at, k_runs, counter, seed, scale, dropout_p,
    stride_kn, stride_vn,
    EDGE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One tile of keys: a step of online softmax in units of log2, the reference a whole number of them."""
    exists = n < nk
    keys = load_tile(k, n.to(tl.int64) * stride_kn, exists, DIM, D, 0, EDGE)
    x = dot(a, keys.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    if EDGE:
        x = tl.where((n[None, :] >= first[:, None]) & (n[None, :] < end[:, None]), x, float("-inf"))
    m_next = tl.maximum(m, tl.ceil(tl.max(x, 1) * scale))
    m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
    alpha = tl.exp2(m - m_safe)
    p = tl.exp2(x * scale - m_safe[:, None])
    mass = mass * alpha + tl.sum(p, 1)
    if DROPOUT:
        k_at = _position(n, k_runs, k_table, exists)
        kept = _kept(seed, dropout_p, counter, q_at[:, None], k_at[None, :])
        p = tl.where(kept, p * (1.0 / (1.0 - dropout_p)), 0.0)
    values = load_tile(v, n.to(tl.int64) * stride_vn, exists, DIM_V, DV, 0, EDGE)
    acc = dot(p.to(values.dtype), values, acc * alpha[:, None], PRECISION, LOW)
    return m_next, mass, acc


_SIZES = ["blocks", "planes", "heads", "all_heads", "head_offset", "nq", "nk", "lower", "upper"]
_SIZES += ["q_base0", "q_split", "q_base1", "q_step", "k_base0", "k_split", "k_base1", "k_step"]


@triton.jit(do_not_specialize=_SIZES)
def ring_forward_kernel(
    q, k, v, acc, m, l, out, lse, seed, q_table, k_table, start, stop,  # noqa: E741
    blocks, planes, heads, all_heads, head_offset, nq, nk, lower, upper,
    q_base0, q_split, q_base1, q_step, k_base0, k_split, k_base1, k_step, scale, dropout_p,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ab, stride_ah, stride_an, stride_ob, stride_oh, stride_on,
    FIRST: tl.constexpr, SIGN: tl.constexpr, ORDER: tl.constexpr, GROUP: tl.constexpr, DROPOUT: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The state of ROWS queries of one head after these keys, or out and lse where they are given: the last hop.

    start, stop: int32 (nq,), the keys of each query; None: in closed form. m, l and lse are contiguous (B, Hq, nq).
    ``scale`` is positive, SIGN that of the caller's.
    """
    block, plane = place(tl.program_id(0), blocks, planes, ORDER)
    q_runs = (q_base0, q_split, q_base1, q_step)
    k_runs = (k_base0, k_split, k_base1, k_step)
    lo, left, full, right = _walk(block, nq, q_runs, k_runs, nk, lower, upper, start, stop, ROWS, COLS)
    if not FIRST and out is None and left + full + right == 0:
        return
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + (h // GROUP) * stride_kh
    v += b * stride_vb + (h // GROUP) * stride_vh
    i = block * ROWS + tl.arange(0, ROWS)
    inside = i < nq
    rows = i.to(tl.int64)
    stats = plane.to(tl.int64) * nq + i
    columns = tl.arange(0, COLS)
    log2_scale = scale * LOG2E
    key, counter, q_at = 0, 0, i
    if DROPOUT:
        key = tl.load(seed)
        counter = (b * all_heads + head_offset + h).to(tl.int32)
        q_at = _position(i, q_runs, q_table, inside)

    a = load_tile(q, rows * stride_qn, inside, DIM, D)
    if SIGN != 1:
        a = (a.to(tl.float32) * SIGN).to(a.dtype)
    if FIRST:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, DV), tl.float32)
    else:
        # Rounding gives back the whole number of which m is the product with log 2.
        top = tl.floor(tl.load(m + stats, mask=inside, other=float("-inf")) * LOG2E + 0.5)
        mass = tl.load(l + stats, mask=inside, other=0.0)
        total = load_tile(acc + b * stride_ab + h * stride_ah, rows * stride_an, inside, DIM_V, DV)
    for s in range(0, full):
        top, mass, total = _forward_step(
            a, top, mass, total, k, v, k_table, lo + (left + s) * COLS + columns, nk, i, i, q_at, k_runs,
            counter, key, log2_scale, dropout_p, stride_kn, stride_vn,
            False, DROPOUT, PRECISION, LOW, DIM, D, DIM_V, DV,
        )  # fmt: skip
    first, end = _seen(i, q_runs, k_runs, nk, lower, upper, start, stop, inside)
    for s in range(0, left + right):
        top, mass, total = _forward_step(
            a, top, mass, total, k, v, k_table, lo + (s + tl.where(s < left, 0, full)) * COLS + columns, nk, first,
            end, q_at, k_runs, counter, key, log2_scale, dropout_p, stride_kn, stride_vn,
            True, DROPOUT, PRECISION, LOW, DIM, D, DIM_V, DV,
        )  # fmt: skip

    c = tl.arange(0, DV)
    mask = inside[:, None] & (c < DIM_V)[None, :]
    if out is None:
        tl.store(m + stats, top * LN2, mask=inside)
        tl.store(l + stats, mass, mask=inside)
        tl.store(acc + b * stride_ab + h * stride_ah + (rows * stride_an)[:, None] + c[None, :], total, mask=mask)
    else:
        nothing = mass == 0.0
        mass = tl.where(nothing, 1.0, mass)
        tl.store(lse + stats, tl.where(nothing, float("-inf"), (top + tl.log2(mass)) * LN2), mask=inside)
        total = (total * (1.0 / mass)[:, None]).to(out.dtype.element_ty)
        tl.store(out + b * stride_ob + h * stride_oh + (rows * stride_on)[:, None] + c[None, :], total, mask=mask)


@triton.jit
def _log2_lse(lse, rows, inside, MASKED: tl.constexpr):
    """LSE in units of log2, +inf where there is no query or nothing was allowed: P is 0 there."""
    if MASKED:
        found = tl.load(lse + rows, mask=inside, other=float("-inf"))
    else:
        found = tl.load(lse + rows)
    return tl.where(found == float("-inf"), float("inf"), found * LOG2E)


@triton.jit
def _add(x, rows, inside, value, FIRST: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    """Add ``value`` [ROWS, D] to rows of x, or put it there."""
    c = tl.arange(0, D)
    if not FIRST:
        value += load_tile(x, rows, inside, DIM, D)
    tl.store(x + rows[:, None] + c[None, :], value, mask=inside[:, None] & (c < DIM)[None, :])


@triton.jit
def _query_step(
    a, w, row_lse, row_delta, total, k, v, k_table, n, nk, first, end, q_at, k_runs, counter, seed, scale, dropout_p,
    stride_kn, stride_vn,
    EDGE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One tile of keys: total + dS K."""
    exists = n < nk
    keys = load_tile(k, n.to(tl.int64) * stride_kn, exists, DIM, D, 0, EDGE)
    x = dot(a, keys.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    x = x * scale - row_lse[:, None]
    if EDGE:
        x = tl.where((n[None, :] >= first[:, None]) & (n[None, :] < end[:, None]), x, float("-inf"))
    p = tl.exp2(x)
    values = load_tile(v, n.to(tl.int64) * stride_vn, exists, DIM_V, DV, 0, EDGE)
    dp = dot(w, values.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    if DROPOUT:
        k_at = _position(n, k_runs, k_table, exists)
        kept = _kept(seed, dropout_p, counter, q_at[:, None], k_at[None, :])
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    ds = p * (dp - row_delta[:, None])
    return dot(ds.to(keys.dtype), keys, total, PRECISION, LOW)


@triton.jit(do_not_specialize=_SIZES)
def ring_query_grad_kernel(
    q, k, v, grad_out, lse, delta, grad_q, seed, q_table, k_table, start, stop,
    blocks, planes, heads, all_heads, head_offset, nq, nk, lower, upper,
    q_base0, q_split, q_base1, q_step, k_base0, k_split, k_base1, k_step, scale, dropout_p,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_xb, stride_xh, stride_xn,
    FIRST: tl.constexpr, ORDER: tl.constexpr, GROUP: tl.constexpr, DROPOUT: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dQ of ROWS queries of one head: the forward kernel's walk with P recomputed from the LSE of all hops."""
    block, plane = place(tl.program_id(0), blocks, planes, ORDER)
    q_runs = (q_base0, q_split, q_base1, q_step)
    k_runs = (k_base0, k_split, k_base1, k_step)
    lo, left, full, right = _walk(block, nq, q_runs, k_runs, nk, lower, upper, start, stop, ROWS, COLS)
    if not FIRST and left + full + right == 0:
        return
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + (h // GROUP) * stride_kh
    v += b * stride_vb + (h // GROUP) * stride_vh
    grad_out += b * stride_gb + h * stride_gh
    i = block * ROWS + tl.arange(0, ROWS)
    inside = i < nq
    rows = i.to(tl.int64)
    stats = plane.to(tl.int64) * nq + i
    columns = tl.arange(0, COLS)
    log2_scale = scale * LOG2E
    key, counter, q_at = 0, 0, i
    if DROPOUT:
        key = tl.load(seed)
        counter = (b * all_heads + head_offset + h).to(tl.int32)
        q_at = _position(i, q_runs, q_table, inside)

    a = load_tile(q, rows * stride_qn, inside, DIM, D)
    w = load_tile(grad_out, rows * stride_gn, inside, DIM_V, DV)
    row_lse = _log2_lse(lse, stats, inside, True)
    row_delta = tl.load(delta + stats, mask=inside, other=0.0)
    total = tl.zeros((ROWS, D), tl.float32)
    for s in range(0, full):
        total = _query_step(
            a, w, row_lse, row_delta, total, k, v, k_table, lo + (left + s) * COLS + columns, nk, i, i, q_at,
            k_runs, counter, key, log2_scale, dropout_p, stride_kn, stride_vn,
            False, DROPOUT, PRECISION, LOW, DIM, D, DIM_V, DV,
        )  # fmt: skip
    first, end = _seen(i, q_runs, k_runs, nk, lower, upper, start, stop, inside)
    for s in range(0, left + right):
        total = _query_step(
            a, w, row_lse, row_delta, total, k, v, k_table, lo + (s + tl.where(s < left, 0, full)) * COLS + columns,
            nk, first, end, q_at, k_runs, counter, key, log2_scale, dropout_p, stride_kn, stride_vn,
            True, DROPOUT, PRECISION, LOW, DIM, D, DIM_V, DV,
        )  # fmt: skip
    _add(grad_q + b * stride_xb + h * stride_xh, rows * stride_xn, inside, total * scale, FIRST, DIM, D)


@triton.jit
def _key_step(
    a, w, total, total_v, q, grad_out, lse, delta, q_table, g, n, nq, first, end, k_at, q_runs, counter, seed, scale,
    dropout_p, stride_qh, stride_qn, stride_gh, stride_gn,
    EDGE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One tile of queries of head g of the group: total + dSᵀ Q and total_v + Pᵀ dO."""
    exists = n < nq
    stats = g.to(tl.int64) * nq + n
    queries = load_tile(q + g.to(tl.int64) * stride_qh, n.to(tl.int64) * stride_qn, exists, DIM, D, 0, EDGE)
    x = dot(a, queries.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    x = x * scale - _log2_lse(lse, stats, exists, EDGE)[None, :]
    if EDGE:
        x = tl.where((n[None, :] >= first[:, None]) & (n[None, :] < end[:, None]), x, float("-inf"))
    p = tl.exp2(x)
    grads = load_tile(grad_out + g.to(tl.int64) * stride_gh, n.to(tl.int64) * stride_gn, exists, DIM_V, DV, 0, EDGE)
    dp = dot(w, grads.T, tl.zeros((a.shape[0], n.shape[0]), tl.float32), PRECISION, LOW)
    dropped = p
    if DROPOUT:
        q_at = _position(n, q_runs, q_table, exists)
        kept = _kept(seed, dropout_p, counter + g, q_at[None, :], k_at[:, None])
        dropped = tl.where(kept, p * (1.0 / (1.0 - dropout_p)), 0.0)
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    total_v = dot(dropped.to(grads.dtype), grads, total_v, PRECISION, LOW)
    if EDGE:
        minus = tl.load(delta + stats, mask=exists, other=0.0)
    else:
        minus = tl.load(delta + stats)
    ds = p * (dp - minus[None, :])
    return dot(ds.to(queries.dtype), queries, total, PRECISION, LOW), total_v


@triton.jit(do_not_specialize=_SIZES)
def ring_key_grad_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, seed, q_table, k_table, start, stop,
    blocks, planes, heads, all_heads, head_offset, nq, nk, lower, upper,
    q_base0, q_split, q_base1, q_step, k_base0, k_split, k_base1, k_step, scale, dropout_p,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_xb, stride_xh, stride_xn, stride_yb, stride_yh, stride_yn,
    FIRST: tl.constexpr, ORDER: tl.constexpr, GROUP: tl.constexpr, DROPOUT: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dK and dV of ROWS keys of one head, summed over the GROUP query heads that read it.

    start, stop: int32 (nk,), the queries of each key; lower and upper from a key's position to those of its queries.
    """
    block, plane = place(tl.program_id(0), blocks, planes, ORDER)
    q_runs = (q_base0, q_split, q_base1, q_step)
    k_runs = (k_base0, k_split, k_base1, k_step)
    lo, left, full, right = _walk(block, nk, k_runs, q_runs, nq, lower, upper, start, stop, ROWS, COLS)
    if not FIRST and left + full + right == 0:
        return
    kv_heads = heads // GROUP
    b = (plane // kv_heads).to(tl.int64)
    h = (plane % kv_heads).to(tl.int64)
    q += b * stride_qb + h * GROUP * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    grad_out += b * stride_gb + h * GROUP * stride_gh
    lse += (b * heads + h * GROUP) * nq
    delta += (b * heads + h * GROUP) * nq
    j = block * ROWS + tl.arange(0, ROWS)
    inside = j < nk
    rows = j.to(tl.int64)
    columns = tl.arange(0, COLS)
    log2_scale = scale * LOG2E
    key, counter, k_at = 0, 0, j
    if DROPOUT:
        key = tl.load(seed)
        counter = (b * all_heads + head_offset + h * GROUP).to(tl.int32)
        k_at = _position(j, k_runs, k_table, inside)

    a = load_tile(k, rows * stride_kn, inside, DIM, D)
    w = load_tile(v, rows * stride_vn, inside, DIM_V, DV)
    total = tl.zeros((ROWS, D), tl.float32)
    total_v = tl.zeros((ROWS, DV), tl.float32)
    for t in range(0, GROUP * full):
        total, total_v = _key_step(
            a, w, total, total_v, q, grad_out, lse, delta, q_table, t // full,
            lo + (left + t % full) * COLS + columns, nq, j, j, k_at, q_runs, counter, key, log2_scale,
            dropout_p, stride_qh, stride_qn, stride_gh, stride_gn,
            False, DROPOUT, PRECISION, LOW, DIM, D, DIM_V, DV,
        )  # fmt: skip
    first, end = _seen(j, k_runs, q_runs, nq, lower, upper, start, stop, inside)
    edges = left + right
    for t in range(0, GROUP * edges):
        s = t % edges
        total, total_v = _key_step(
            a, w, total, total_v, q, grad_out, lse, delta, q_table, t // edges,
            lo + (s + tl.where(s < left, 0, full)) * COLS + columns, nq, first, end, k_at, q_runs, counter, key,
            log2_scale, dropout_p, stride_qh, stride_qn, stride_gh, stride_gn,
            True, DROPOUT, PRECISION, LOW, DIM, D, DIM_V, DV,
        )  # fmt: skip
    _add(grad_k + b * stride_xb + h * stride_xh, rows * stride_xn, inside, total * scale, FIRST, DIM, D)
    _add(grad_v + b * stride_yb + h * stride_yh, rows * stride_yn, inside, total_v, FIRST, DIM_V, DV)


# Configurations. A candidate is a dict of the kernel's tile constexprs, num_warps and num_stages; what is said of the
# tiles of kernels/tensor_attention.py holds here, where nothing is fused and one more accumulator fits. A hop moves
# 8 bytes of state for each entry of acc, beside 4 nk FLOP.

_FORWARD, _QUERY, _KEY = "forward", "query", "key"
_Shape = tuple[int, int, int, int]  # rows, columns, num_warps, num_stages

# For 64, 128 and 256 padded channels, the default first.
_WARPGROUP: dict[str, tuple[tuple[_Shape, ...], ...]] = {
    _FORWARD: (
        ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
        ((128, 128, 8, 2), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3)),
        ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    ),
    _QUERY: (
        ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)),
        ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (64, 32, 4, 3)),
        ((64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    ),
    _KEY: (
        ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)),
        ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (64, 128, 8, 2)),
        ((64, 32, 8, 2), (32, 64, 8, 2), (32, 64, 4, 1)),
    ),
}
_MMA_SYNC: dict[str, tuple[tuple[_Shape, ...], ...]] = {
    _FORWARD: (
        ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
        ((128, 64, 8, 2), (128, 32, 4, 3), (128, 32, 8, 3), (64, 64, 4, 2)),
        ((64, 32, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
    ),
    _QUERY: (
        ((64, 64, 4, 2), (128, 64, 8, 2), (32, 64, 4, 3)),
        ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
        ((32, 64, 8, 2), (32, 32, 4, 2)),
    ),
    _KEY: (
        ((64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3)),
        ((64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
        ((32, 64, 8, 2), (32, 32, 8, 2)),
    ),
}
_HIP: tuple[tuple[_Shape, ...], ...] = (
    ((128, 64, 4, 1), (128, 32, 4, 1), (64, 64, 4, 1)),
    ((64, 32, 4, 1), (128, 32, 4, 1), (64, 64, 4, 1)),
    ((32, 32, 4, 1), (64, 32, 4, 1)),
)
_HIP_FLOAT32: tuple[tuple[_Shape, ...], ...] = (
    ((64, 32, 4, 1), (32, 32, 4, 1)),
    ((32, 32, 4, 1), (32, 16, 4, 1)),
    ((16, 16, 4, 1), (16, 32, 4, 1)),
)
_FLOAT32: dict[str, tuple[tuple[_Shape, ...], ...]] = {
    _FORWARD: (
        ((32, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
        ((32, 64, 8, 1), (32, 32, 8, 2), (16, 32, 4, 2)),
        ((16, 32, 8, 1), (16, 32, 4, 1)),
    ),
    _QUERY: (
        ((32, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
        ((32, 32, 8, 1), (32, 64, 8, 1), (16, 32, 4, 1)),
        ((16, 32, 8, 1), (16, 16, 4, 1)),
    ),
    _KEY: (
        ((32, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
        ((32, 32, 8, 1), (32, 64, 8, 1), (16, 32, 4, 1)),
        ((16, 32, 8, 1), (16, 16, 4, 1)),
    ),
}
# wgmma and tcgen05 take float32 where the accumulators of 64 rows leave room.
_FLOAT32_WARPGROUP: dict[str, _Shape] = {_FORWARD: (128, 32, 8, 2), _QUERY: (64, 32, 4, 2), _KEY: (64, 32, 4, 2)}


def _candidates(kind: str, low: bool, d: int, target: Target) -> list[dict[str, Any]]:
    """Launch configurations that suit ``d`` padded channels, the default first."""
    size = 0 if d <= 64 else 1 if d <= 128 else 2
    warpgroup = target[0] == "cuda" and 90 <= int(target[1]) < 120
    if target[0] == "interpreter":
        shapes: tuple[_Shape, ...] = ((32, 16, 4, 1),)
    elif target[0] == "hip":
        shapes = _HIP[size] if low else _HIP_FLOAT32[size]
    elif low:
        shapes = (_WARPGROUP if warpgroup else _MMA_SYNC)[kind][size]
    else:
        shapes = _FLOAT32[kind][size]
        if warpgroup and size == 0:
            shapes = (_FLOAT32_WARPGROUP[kind], *shapes)
    return [dict(zip(("ROWS", "COLS", "num_warps", "num_stages"), shape, strict=True)) for shape in shapes]


# Launchers

_UNLIMITED = 2**30
_MOST_POSITIONS = 2**29  # so that a position and an unlimited window make an int32
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_CHANNELS = 256

Runs = tuple[int, int, int, int]


class _Side(NamedTuple):
    """Where the queries or the keys are: position i by ``runs``, or in ``table`` where there is one."""

    length: int
    runs: Runs
    table: torch.Tensor | None

    def positions(self, device: torch.device) -> torch.Tensor:
        """int64 (length,)."""
        if self.table is not None:
            return self.table.long()
        base0, split, base1, step = self.runs
        i = torch.arange(self.length, device=device)
        return torch.where(i < split, base0 + step * i, base1 + step * (i - split))


@dataclass(frozen=True)
class _Hop:
    """Checked arguments, as the kernels see them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    queries: _Side
    keys: _Side
    doc_first: torch.Tensor | None
    doc_last: torch.Tensor | None
    window: tuple[int, int]
    scale: float
    dropout_p: float
    seed: torch.Tensor | None
    head_offset: int
    heads: int
    precision: str

    @functools.cached_property
    def spans(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """int32 (nq,): the keys start ≤ j < stop that each query sees. None where the kernels have them in closed form.

        Both ascend, since positions and the borders of documents do.
        """
        tensors = (self.queries.table, self.keys.table, self.doc_first, self.doc_last)
        if all(x is None for x in tensors):
            return None, None
        at, keys = (side.positions(self.q.device) for side in (self.queries, self.keys))
        left, right = self.window
        first = at - (2**40 if left < 0 else left)
        last = at + (2**40 if right < 0 else right)
        if self.doc_first is not None:
            first = torch.maximum(first, self.doc_first)
        if self.doc_last is not None:
            last = torch.minimum(last, self.doc_last)
        start = torch.searchsorted(keys, first, out_int32=True)
        return start, torch.searchsorted(keys, last, right=True, out_int32=True)

    @functools.cached_property
    def spans_of_keys(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """int32 (nk,): the queries start ≤ i < stop that see each key."""
        start, stop = self.spans
        if start is None or stop is None:
            return None, None
        j = torch.arange(self.keys.length, device=self.q.device, dtype=torch.int32)
        first = torch.searchsorted(stop, j, right=True, out_int32=True)
        return first, torch.searchsorted(start, j, right=True, out_int32=True)

    @property
    def low(self) -> bool:
        return self.q.dtype != torch.float32

    def order(self, of_queries: bool) -> int:
        """1: early blocks are heavier, -1: late ones are, 0: all the same."""
        left, right = (side < 0 for side in self.window)
        return 0 if left == right else (-1 if left else 1) * (1 if of_queries else -1)


def ring_block_supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """What of these tensors the kernels do not support, in words, or None."""
    if q.dtype not in _DTYPES:
        return str(q.dtype).removeprefix("torch.")
    channels = max(q.shape[3], v.shape[3])
    if channels > _MOST_CHANNELS:
        return f"head dimension {channels}"
    if max(q.shape[2], k.shape[2]) >= _MOST_POSITIONS:
        return f"{max(q.shape[2], k.shape[2])} tokens on a rank"
    return None


def _check_tensor(
    name: str, x: torch.Tensor, q: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype, rows: bool = False
) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device}, got {x.device}")
    if rows and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} is written in place and must have neighbouring channels, got strides {x.stride()}")


def _check_statistic(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    _check_tensor(name, x, q, tuple(q.shape[:3]), torch.float32)
    if not x.is_contiguous():
        raise ValueError(f"{name} is written in place and must be contiguous, got strides {x.stride()}")


def _side(name: str, q: torch.Tensor, length: int, runs: Runs, table: torch.Tensor | None) -> _Side:
    if table is not None:
        _check_tensor(f"{name}_positions", table, q, (length,), torch.int32)
        return _Side(length, (0, length, 0, 1), table.contiguous())
    base0, split, base1, step = runs
    if not (0 <= split <= length and 1 <= step < _MOST_POSITIONS):
        raise ValueError(f"{name}_runs must have split in 0 ... {length} and a stride of at least 1, got {tuple(runs)}")
    parts = [range(base, base + step * n, step) for base, n in ((base0, split), (base1, length - split)) if n]
    ascending = all(one[-1] < other[0] for one, other in itertools.pairwise(parts))
    if parts and not (ascending and parts[0][0] >= 0 and parts[-1][-1] < _MOST_POSITIONS):
        raise ValueError(f"{name}_runs must have ascending positions from 0 to 2^29, got {tuple(runs)} for {length}")
    return _Side(length, (base0, split, base1, step), None)


def _hop(
    q, k, v, *, q_runs, k_runs, q_positions=None, k_positions=None, doc_first=None, doc_last=None, window=(-1, -1),
    scale, dropout_p=0.0, seed=None, head_offset=0, heads=None, precision=None,
) -> _Hop:  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise TypeError(f"{name} must be float32, float16 or bfloat16 as q is ({q.dtype}), got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape (B, H, n, channels), got {tuple(x.shape)}")
        if not 1 <= x.shape[3] <= _MOST_CHANNELS:
            raise ValueError(f"{name} must have 1 to {_MOST_CHANNELS} channels, got {x.shape[3]}")
    batch, own_heads, nq, d = q.shape
    kv_heads, nk, dv = k.shape[1], k.shape[2], v.shape[3]
    _check_tensor("k", k, q, (batch, kv_heads, nk, d), q.dtype)
    _check_tensor("v", v, q, (batch, kv_heads, nk, dv), q.dtype)
    if own_heads % max(kv_heads, 1) or (kv_heads == 0 and own_heads):
        raise ValueError(f"q must have a multiple of the {kv_heads} heads of k, got {own_heads}")
    if max(nq, nk) >= _MOST_POSITIONS:
        raise ValueError(f"a rank must have fewer than 2^29 tokens, got {nq} queries and {nk} keys")
    for name, x in (("doc_first", doc_first), ("doc_last", doc_last)):
        if x is not None:
            _check_tensor(name, x, q, (nq,), torch.int32)
    if len(window) != 2 or min(window) < -1:
        raise ValueError(f"window must be (left, right), each at least -1 (unlimited), got {tuple(window)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0:
        if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError("seed must be an int64 tensor with one element where dropout_p > 0")
        seed = seed.to(q.device)
    else:
        seed = None
    heads = own_heads if heads is None else heads
    if not 0 <= head_offset <= heads - own_heads:
        raise ValueError(f"head_offset must be in 0 ... {heads - own_heads} for {own_heads} of {heads} heads, got "
                         f"{head_offset}")  # fmt: skip
    low = q.dtype != torch.float32
    if precision is None and INTERPRET:
        precision = "ieee"  # one product for each instead of three: the interpreter's time goes by operations
    return _Hop(
        unit(q), unit(k), unit(v), _side("q", q, nq, q_runs, q_positions), _side("k", q, nk, k_runs, k_positions),
        doc_first, doc_last, (window[0], window[1]), scale, dropout_p, seed, head_offset, heads,
        dot_precision(_lib.target_of(q.device), precision, low=low),
    )  # fmt: skip


def _strides(name: str, x: torch.Tensor | None) -> dict[str, int]:
    return {f"stride_{name}{axis}": 0 if x is None else x.stride(a) for a, axis in enumerate("bhn")}


def _arguments(kind: str, hop: _Hop) -> dict[str, Any]:
    """What all three kernels take, but for results and the grid."""
    h = hop
    left, right = (min(_UNLIMITED if side < 0 else side, _UNLIMITED) for side in h.window)
    start, stop = h.spans_of_keys if kind == _KEY else h.spans
    dropped = h.dropout_p > 0.0
    arguments: dict[str, Any] = {
        "q": h.q, "k": h.k, "v": h.v, "seed": h.seed, "start": start, "stop": stop,
        # Positions enter dropout; who sees whom is in start and stop.
        "q_table": h.queries.table if dropped else None, "k_table": h.keys.table if dropped else None,
        "heads": h.q.shape[1], "all_heads": h.heads, "head_offset": h.head_offset,
        "nq": h.queries.length, "nk": h.keys.length,
        "lower": -right if kind == _KEY else -left, "upper": left if kind == _KEY else right,
        "scale": h.scale, "dropout_p": h.dropout_p,
    }  # fmt: skip
    for name, side in (("q", h.queries), ("k", h.keys)):
        arguments |= zip((f"{name}_{x}" for x in ("base0", "split", "base1", "step")), side.runs, strict=True)
    for name, x in (("q", h.q), ("k", h.k), ("v", h.v)):
        arguments |= _strides(name, x)
    if kind == _FORWARD:  # wants a scale above 0: a maximum commutes with it
        arguments |= {"scale": abs(h.scale) or 1.0, "SIGN": (h.scale > 0) - (h.scale < 0)}
    return arguments


def _constants(kind: str, hop: _Hop) -> dict[str, Any]:
    h = hop
    dim, dim_v = h.q.shape[3], h.v.shape[3]
    return {
        "ORDER": h.order(kind != _KEY), "GROUP": h.q.shape[1] // h.k.shape[1], "DROPOUT": h.dropout_p > 0.0,
        "DIM": dim, "D": padded(dim), "DIM_V": dim_v, "DV": padded(dim_v),
        "PRECISION": h.precision, "LOW": h.low and not INTERPRET,
    }  # fmt: skip


def _run(
    kind: str, hop: _Hop, arguments: dict[str, Any], updated: tuple[str, ...],
    candidates: list[dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Launch one of the kernels; ``candidates`` overrides the launch configurations (tests go through all of them).

    ``updated``: arguments that are added to. Measuring configurations works on copies of them.
    """
    h = hop
    length, heads = (h.keys.length, h.k.shape[1]) if kind == _KEY else (h.queries.length, h.q.shape[1])
    planes = h.q.shape[0] * heads
    if length * planes == 0:
        return
    constants = _constants(kind, h)
    arguments = _arguments(kind, h) | constants | arguments | {"planes": planes}

    @functools.cache
    def copies() -> dict[str, torch.Tensor]:
        return {name: arguments[name].clone() for name in updated}

    def launch(meta: dict[str, Any], **other: torch.Tensor) -> None:
        blocks = cdiv(length, meta["ROWS"])
        passed = arguments | {"blocks": blocks} | meta | other
        grid = (blocks * planes,)
        if kind == _FORWARD:
            ring_forward_kernel[grid](**passed)
        elif kind == _QUERY:
            ring_query_grad_kernel[grid](**passed)
        else:
            ring_key_grad_kernel[grid](**passed)

    if candidates is None:
        d = max(constants["D"], constants["DV"])
        candidates = _candidates(kind, h.low, d, _lib.target_of(h.q.device))
    tables = (arguments["start"] is not None, arguments["q_table"] is not None, arguments["k_table"] is not None)
    key = (h.q.dtype, *sorted(constants.items()), tables, bucket(h.queries.length), bucket(h.keys.length))
    with _lib.device_guard(h.q):
        launch(_lib.pick(f"ring_{kind}", key, candidates, lambda meta: launch(meta, **copies()), h.q.device))


def ring_block_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    acc: torch.Tensor | None,
    m: torch.Tensor | None,
    l: torch.Tensor | None,  # noqa: E741
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    *,
    first: bool,
    q_runs: Runs,
    k_runs: Runs,
    q_positions: torch.Tensor | None = None,
    k_positions: torch.Tensor | None = None,
    doc_first: torch.Tensor | None = None,
    doc_last: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    head_offset: int = 0,
    heads: int | None = None,
    precision: str | None = None,
) -> None:
    """Let the queries see the keys of one hop, in place.

    Args:
        q: (B, Hq, nq, d), float32, float16 or bfloat16, d from 1 to 256; any strides, read in place where channels
            are neighbours.
        k, v: (B, Hkv, nk, d) and (B, Hkv, nk, dv), likewise; query head h reads head h // (Hq / Hkv).
        acc, m, l: the running state, float32 (B, Hq, nq, dv), and (B, Hq, nq) contiguous: m a reference exponent in
            natural units, l = Σ exp(s - m), acc = Σ exp(s - m) v, dropout in acc alone. Written by the hops before and
            by nobody else. None where this hop is the first and the last.
        out, lse: on the last hop: out = acc / l (B, Hq, nq, dv) in the dtype of ``q`` or float32, lse = m + log l
            float32 (B, Hq, nq) contiguous, natural logarithm; 0 and -inf where nothing was allowed. The state is not
            updated then. None on all other hops.
        first: nothing is read of the state.
        q_runs, k_runs: (base0, split, base1, stride): index i is at position base0 + stride · i for i < split, at
            base1 + stride · (i - split) from there on. Positions ascend, and are below 2^29.
        q_positions, k_positions: int32 (nq,) and (nk,), ascending; instead of the runs.
        doc_first, doc_last: int32 (nq,), ascending: the first and last position of each query's document.
        window: (left, right): a query at p sees p - left ... p + right, -1 is unlimited; causal is right = 0.
        scale: of the logits; any float32, 0 and below included.
        dropout_p, seed: probability, and int64, one element: dropout by counter on (b · heads + head_offset + h, query
            position, key position), see ``torchlayers._attention.keep_mask``.
        head_offset, heads: of ``heads`` query heads in all, the call's are those from ``head_offset`` on.
        precision: of float32 products, see ``kernels/_lib.py``.

    Raises:
        TypeError: a dtype. ValueError: shapes, devices, strides of what is written, or options that do not fit.
    """
    hop = _hop(
        q, k, v, q_runs=q_runs, k_runs=k_runs, q_positions=q_positions, k_positions=k_positions, doc_first=doc_first,
        doc_last=doc_last, window=window, scale=scale, dropout_p=dropout_p, seed=seed, head_offset=head_offset,
        heads=heads, precision=precision,
    )  # fmt: skip
    _launch_forward(hop, acc, m, l, out, lse, first)


def _launch_forward(hop: _Hop, acc, m, l, out, lse, first: bool, candidates=None) -> None:  # noqa: E741
    q, shape = hop.q, (*hop.q.shape[:3], hop.v.shape[3])
    if (out is None) != (lse is None):
        raise ValueError(f"out and lse must both be given or both be None, got {'lse' if out is None else 'out'} alone")
    alone = first and out is not None
    for name, x in (("m", m), ("l", l)):
        if x is not None:
            _check_statistic(name, x, q)
        elif not alone:
            raise ValueError(f"{name} must be given but on a hop that is the first and the last, got None")
    if acc is not None:
        _check_tensor("acc", acc, q, shape, torch.float32, rows=True)
    elif not alone:
        raise ValueError("acc must be given but on a hop that is the first and the last, got None")
    if out is not None:
        _check_tensor("out", out, q, shape, q.dtype, torch.float32, rows=True)
        _check_statistic("lse", lse, q)
    state = {"acc": None, "m": None, "l": None} if alone else {"acc": acc, "m": m, "l": l}
    results = state | {"out": out, "lse": lse, "FIRST": first} | _strides("a", state["acc"]) | _strides("o", out)
    _run(_FORWARD, hop, results, () if first or out is not None else ("acc", "m", "l"), candidates)


def ring_block_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    first_q: bool,
    first_kv: bool,
    q_runs: Runs,
    k_runs: Runs,
    q_positions: torch.Tensor | None = None,
    k_positions: torch.Tensor | None = None,
    doc_first: torch.Tensor | None = None,
    doc_last: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    head_offset: int = 0,
    heads: int | None = None,
    precision: str | None = None,
) -> None:
    """Add to dq, dk and dv what comes through the pairs of one hop.

    Args:
        grad_out: (B, Hq, nq, dv), the dtype of ``q``, any strides.
        lse, delta: float32 (B, Hq, nq), of the softmax over all hops: delta = Σ_c grad_out · out - grad_lse.
        dq, dk, dv: float32, shapes of q, k and v, neighbouring channels.
        first_q, first_kv: ``dq``, or ``dk`` and ``dv``, are written, every entry, and not added to.
        q, k, v and all others: as for :func:`ring_block_forward`.

    Raises:
        TypeError: a dtype. ValueError: shapes, devices, strides of what is written, or options that do not fit.
    """
    hop = _hop(
        q, k, v, q_runs=q_runs, k_runs=k_runs, q_positions=q_positions, k_positions=k_positions, doc_first=doc_first,
        doc_last=doc_last, window=window, scale=scale, dropout_p=dropout_p, seed=seed, head_offset=head_offset,
        heads=heads, precision=precision,
    )  # fmt: skip
    _launch_backward(hop, grad_out, lse, delta, dq, dk, dv, first_q, first_kv)


def _launch_backward(
    hop: _Hop, grad_out, lse, delta, dq, dk, dv, first_q: bool, first_kv: bool, query_candidates=None,
    key_candidates=None,
) -> None:  # fmt: skip
    q = hop.q
    _check_tensor("grad_out", grad_out, q, (*q.shape[:3], hop.v.shape[3]), q.dtype)
    for name, x in (("lse", lse), ("delta", delta)):
        _check_tensor(name, x, q, tuple(q.shape[:3]), torch.float32)
    for name, x, like in (("dq", dq, q), ("dk", dk, hop.k), ("dv", dv, hop.v)):
        _check_tensor(name, x, q, tuple(like.shape), torch.float32, rows=True)
    grad_out = unit(grad_out)
    given = {"grad_out": grad_out, "lse": lse.contiguous(), "delta": delta.contiguous(), **_strides("g", grad_out)}
    of_queries = {"grad_q": dq, "FIRST": first_q, **_strides("x", dq)}
    of_keys = {"grad_k": dk, "grad_v": dv, "FIRST": first_kv, **_strides("x", dk), **_strides("y", dv)}
    _run(_QUERY, hop, given | of_queries, () if first_q else ("grad_q",), query_candidates)
    _run(_KEY, hop, given | of_keys, () if first_kv else ("grad_k", "grad_v"), key_candidates)


# Production configurations: what the launchers pass for tensors of a shape, read off their own arguments.

_NOTE = "What rests in local memory does so across the loops over tiles: on sm_80 and sm_90 these hold none of it."


def _example(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, *, documents: bool = False, dropout_p: float = 0.0
) -> _Hop:
    """A causal hop without data, in the layout (B, n, H, d) that a projection leaves."""
    q, k = (torch.empty((2, 4096, h, d), dtype=dtype, device="meta").transpose(1, 2) for h in (heads, kv_heads))
    table = torch.empty(4096, dtype=torch.int32, device="meta") if documents else None
    runs = (0, 2048, 8192, 1)
    return _hop(
        q, k, k, q_runs=runs, k_runs=runs, q_positions=table, k_positions=table, doc_first=table, doc_last=table,
        window=(-1, 0), scale=d**-0.5, dropout_p=dropout_p, seed=torch.empty(1, dtype=torch.int64, device="meta"),
    )  # fmt: skip


def _register(
    kind: str, label: str, hop: _Hop, budget: dict[str, int], *, alone: bool = False
) -> None:  # fmt: skip
    """The default configuration of one kernel, an entry for the targets that share it; ``alone``: the only hop."""
    stats = torch.empty(hop.q.shape[:3], dtype=torch.float32, device="meta")
    arguments: dict[str, Any] = {"blocks": 1, "planes": 1, "lse": stats, "FIRST": alone}
    wide = {name: x.contiguous().float() for name, x in (("q", hop.q), ("k", hop.k), ("v", hop.v))}
    if kind == _FORWARD:
        kernel = ring_forward_kernel
        state = dict.fromkeys(("acc", "m", "l")) if alone else {"acc": wide["q"], "m": stats, "l": stats}
        out = hop.q if alone else None
        arguments |= state | {"out": out, "lse": stats if alone else None}
        arguments |= _strides("a", state["acc"]) | _strides("o", out)
    else:
        arguments |= {"grad_out": hop.q, "delta": stats, **_strides("g", hop.q)}
        if kind == _QUERY:
            kernel = ring_query_grad_kernel
            arguments |= {"grad_q": wide["q"], **_strides("x", wide["q"])}
        else:
            kernel = ring_key_grad_kernel
            arguments |= {"grad_k": wide["k"], "grad_v": wide["v"]}
            arguments |= _strides("x", wide["k"]) | _strides("y", wide["v"])
    signature, fixed = signature_of(_arguments(kind, hop) | arguments, _SIZES, ("FIRST", "SIGN"))
    constants = _constants(kind, hop) | {"LOW": hop.low} | fixed
    constants["PRECISION"] = lambda target: dot_precision(target, low=hop.low)
    d = max(constants["D"], constants["DV"])
    register_defaults(
        kernel, f"ring_{kind}[{label}]", signature, constants,
        lambda target: _candidates(kind, hop.low, d, target)[0], spill_budget=budget, note=_NOTE,
    )  # fmt: skip


_GQA = _example(torch.bfloat16, 32, 8, 128)
_MHA32 = _example(torch.float32, 8, 8, 64)
_PACKED = _example(torch.bfloat16, 8, 8, 64, documents=True, dropout_p=0.1)
_WIDE = _example(torch.float16, 8, 8, 256)
_register(_FORWARD, "bf16,d128,g4", _GQA, {"sm_80": 96})
_register(_FORWARD, "bf16,d128,g4,alone", _GQA, {}, alone=True)
_register(_QUERY, "bf16,d128,g4", _GQA, {})
_register(_KEY, "bf16,d128,g4", _GQA, {"sm_90": 160})
_register(_FORWARD, "fp32,d64", _MHA32, {})
_register(_QUERY, "fp32,d64", _MHA32, {})
_register(_KEY, "fp32,d64", _MHA32, {"sm_80": 32})
_register(_FORWARD, "bf16,d64,documents,dropout", _PACKED, {"sm_80": 128})
_register(_KEY, "bf16,d64,documents,dropout", _PACKED, {"sm_80": 32})
_register(_FORWARD, "fp16,d256", _WIDE, {"sm_90": 288, "sm_100": 224})
_register(_KEY, "fp16,d256", _WIDE, {"sm_90": 224})
