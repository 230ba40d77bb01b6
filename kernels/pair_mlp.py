"""The pointwise parts of a PPGN++ block over packed pairs of nodes: two MLPs in one kernel, and the layer that follows.

With x of pair (i, j) a row x[p], pᵀ the row of (j, i) in the same graph and 1[i = j] the identity channel,

    m1[p] = relu(W1b relu(W1a [x[p], 1, x[pᵀ], 1] + b1a) + b1b)        m2[p] = relu(W2b relu(W2a [x[p], 1] + b2a) + b2b)
    out[p] = W [x[p], 1, y[p]] + b                                     y = segment_matmul(m1, m2)

and without the identity channel and the transpose in PPGN's block (``plus=False``): m1 = MLP1(x), m2 = MLP2(x),
out = W [x, y] + b. The layout of pairs, and of their rows, is that of ``segment_matmul.py``.

Neither concatenation nor transposed copy exists in memory. The row pᵀ is computed from the pointers and read where it
lies, next to p in the cache; the identity channel is a column that a tile of x gets in the registers, behind the last
channel. The hidden layers stay in registers, h[p] being as wide as the tile of a program; a backward pass makes them
again and writes what reaches the first layers, d1 and d2 (T, H). From these come, in a kernel each, the gradient of x,

    d1[p] U + d1[pᵀ] V + d2[p] W          W1a = [U, ., V, .], W2a = [W, .]

which is a layer over rows and transposed rows again, and those of W1a and W2a and their biases, sums over all pairs of
d[p] [x[p], 1[i = j], 1]ᵀ: identity and bias are columns here too. Sums over pairs are split in as many parts as keep
the processors busy, each summed in one order by one program, and the parts are added by torch: no atomics.

Sums are in float32; what a layer passes to the next is rounded to the dtype of x, as layers in that dtype do.

Source: arXiv 2302.11556; the order of the channels is that of its official code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _lib
from ._lib import (
    INTERPRET,
    Target,
    bucket,
    cdiv,
    custom_op,
    dot,
    dot_precision,
    register_defaults,
    register_reference,
)
from .segment_matmul import DTYPES, _graph_of, check_pointers, padded_rows, pointers, reach

__all__ = ["MAX_HIDDEN", "pair_linear", "pair_mlp", "unsupported"]

# (weight of the first layer, its bias, weight of the second layer, its bias)
_MLP = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

MAX_HIDDEN = 128  # the widest hidden layer that a program holds in registers


# Pieces of kernels. Arguments named ``width`` count channels; ``reach`` numbers of a row that may be read, of which
# those behind the channels mean nothing.


@triton.jit
def _pair(p, T, node_ptr, pair_ptr, G, steps):
    """The rows pᵀ, and which p are on a diagonal."""
    start, g = _graph_of(tl.minimum(p, T - 1), node_ptr, pair_ptr, G, steps, 0, 0, 1)
    # The last graph that starts at or before a row is not empty: n > 0. Numbers of 32 bits divide faster, and hold n².
    n = (tl.load(node_ptr + g + 1) - tl.load(node_ptr + g)).to(tl.int32)
    own = (tl.minimum(p, T - 1) - start).to(tl.int32)
    i, j = own // n, own % n
    return start + j * n + i, i == j


@triton.jit
def _relu(x):
    """NaN stays NaN."""
    return tl.where(x < 0, tl.zeros_like(x), x)


@triton.jit
def _signal(x, rows, inside, diagonal, k, width, reach, stride_m, stride_c, IDENTITY: tl.constexpr):
    """[row, k] of x, with the identity channel behind the last, and zeros behind that."""
    pointers = x + (rows * stride_m)[:, None] + (k.to(tl.int64) * stride_c)[None, :]
    tile = tl.load(pointers, mask=inside[:, None] & (k < reach)[None, :], other=0.0)
    other = tl.zeros_like(tile)
    if IDENTITY:
        own = (diagonal & inside)[:, None] & (k == width)[None, :]
        other = own.to(tl.float32).to(tile.dtype)
    return tl.where((k < width)[None, :], tile, other)


@triton.jit
def _first_layer(
    x, w, b, p, other, inside, diagonal, width, reach, entries, hidden, stride_xm, stride_xc, stride_wn, stride_wk,
    PLUS: tl.constexpr, TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """relu(w [x[p], 1, x[pᵀ], 1] + b): PLUS has the identity channel, TRANSPOSE the second half of so many entries."""
    h = tl.arange(0, BH)
    acc = tl.zeros((BM, BH), tl.float32)
    rows = p
    # Half after half: with both in one loop each has operands of its own in the tensor memory of sm_100.
    for _ in tl.static_range(2 if TRANSPOSE else 1):
        for start in range(0, entries, BK):
            k = start + tl.arange(0, BK)
            tile = _signal(x, rows, inside, diagonal, k, width, reach, stride_xm, stride_xc, PLUS)
            mask = (k < entries)[:, None] & (h < hidden)[None, :]
            weights = tl.load(w + (k * stride_wk)[:, None] + (h * stride_wn)[None, :], mask=mask, other=0.0)
            acc = dot(tile, weights, acc, PRECISION, LOW)
        rows = other
        w += entries * stride_wk
    acc += tl.load(b + h, mask=h < hidden, other=0.0).to(tl.float32)[None, :]
    return _relu(acc)


# Kernels


@triton.jit(do_not_specialize=["T", "G", "steps"])
def pair_mlp_kernel(
    x, wa, ba, wb, bb, m, node_ptr, pair_ptr,
    T, G, steps, width, reach, entries, hidden,
    stride_xm, stride_xc, stride_mm, stride_an, stride_ak, stride_bn, stride_bk,
    PLUS: tl.constexpr, TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One MLP at BM pairs."""
    p = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = p < T
    other, diagonal = p, inside
    if PLUS:
        other, diagonal = _pair(p, T, node_ptr, pair_ptr, G, steps)
    inner = _first_layer(
        x, wa, ba, p, other, inside, diagonal, width, reach, entries, hidden,
        stride_xm, stride_xc, stride_an, stride_ak, PLUS, TRANSPOSE, PRECISION, LOW, BM, BK, BH,
    ).to(m.dtype.element_ty)  # fmt: skip
    h = tl.arange(0, BH)
    # To the end of a row: zeros behind the last channel.
    for start in range(0, stride_mm, BN):
        n = start + tl.arange(0, BN)
        mask = (h < hidden)[:, None] & (n < hidden)[None, :]
        weights = tl.load(wb + (h * stride_bk)[:, None] + (n * stride_bn)[None, :], mask=mask, other=0.0)
        acc = dot(inner, weights, tl.zeros((BM, BN), tl.float32), PRECISION, LOW)
        acc += tl.load(bb + n, mask=n < hidden, other=0.0).to(tl.float32)[None, :]
        pointers = m + (p * stride_mm)[:, None] + n[None, :]
        tl.store(pointers, _relu(acc).to(m.dtype.element_ty), mask=inside[:, None] & (n < stride_mm)[None, :])


@triton.jit
def _masked_gradient(g, m, p, h, inside, hidden, stride_gm, stride_gc, stride_mm, stride_mc):
    """[row, h] of the gradient before the second ReLU, whose result is m."""
    mask = inside[:, None] & (h < hidden)[None, :]
    result = tl.load(m + (p * stride_mm)[:, None] + (h * stride_mc)[None, :], mask=mask, other=0.0)
    grad = tl.load(g + (p * stride_gm)[:, None] + (h.to(tl.int64) * stride_gc)[None, :], mask=mask, other=0.0)
    return tl.where(result <= 0, tl.zeros_like(grad), grad)


@triton.jit(do_not_specialize=["T", "G", "steps", "share"])
def pair_mlp_backward_kernel(
    g, m, x, wa, ba, wb, d, grad_w, grad_b, node_ptr, pair_ptr,
    T, G, steps, share, width, reach, entries, hidden, stride_gm, stride_gc, stride_mm, stride_mc, stride_xm, stride_xc,
    stride_d, stride_w, stride_an, stride_ak, stride_bn, stride_bk,
    PLUS: tl.constexpr, TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """d of ``share`` pairs of one MLP, and their parts of the second layer's gradients."""
    part = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BH)
    low_type = d.dtype.element_ty
    acc = tl.zeros((BH, BH), tl.float32)
    bias = tl.zeros((BH,), tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, T), BM):
        p = start + tl.arange(0, BM)
        inside = p < T
        other, diagonal = p, inside
        if PLUS:
            other, diagonal = _pair(p, T, node_ptr, pair_ptr, G, steps)
        inner = _first_layer(
            x, wa, ba, p, other, inside, diagonal, width, reach, entries, hidden,
            stride_xm, stride_xc, stride_an, stride_ak, PLUS, TRANSPOSE, PRECISION, LOW, BM, BK, BH,
        ).to(low_type)  # fmt: skip
        grad = _masked_gradient(g, m, p, h, inside, hidden, stride_gm, stride_gc, stride_mm, stride_mc)
        bias += tl.sum(grad.to(tl.float32), 0)
        acc = dot(tl.trans(grad), inner, acc, PRECISION, LOW)
        # Read again, piece by piece: a tile of the weight that is as wide as it is high would not leave room for acc.
        back = tl.zeros((BM, BH), tl.float32)
        for first in range(0, hidden, BK):
            k = first + tl.arange(0, BK)
            piece = _masked_gradient(g, m, p, k, inside, hidden, stride_gm, stride_gc, stride_mm, stride_mc)
            mask = (k < hidden)[:, None] & (h < hidden)[None, :]
            weights = tl.load(wb + (k * stride_bn)[:, None] + (h * stride_bk)[None, :], mask=mask, other=0.0)
            back = dot(piece, weights, back, PRECISION, LOW)
        back = back.to(low_type)
        back = tl.where(inner <= 0, tl.zeros_like(back), back)
        mask = inside[:, None] & (h < stride_d)[None, :]
        tl.store(d + (p * stride_d)[:, None] + h[None, :], back, mask=mask)
    grad_w += part * hidden * stride_w
    tl.store(grad_w + (h * stride_w)[:, None] + h[None, :], acc, mask=(h < hidden)[:, None] & (h < stride_w)[None, :])
    tl.store(grad_b + part * stride_w + h, bias, mask=h < hidden)


@triton.jit
def _add_layer(
    acc, a, w, rows, inside, diagonal, n, width, reach, entries, out_reach, stride_am, stride_ac, stride_wn, stride_wk,
    IDENTITY: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc + w [a[rows], 1]."""
    for start in range(0, entries, BK):
        k = start + tl.arange(0, BK)
        tile = _signal(a, rows, inside, diagonal, k, width, reach, stride_am, stride_ac, IDENTITY)
        mask = (k < entries)[:, None] & (n < out_reach)[None, :]
        pointers = w + (k * stride_wk)[:, None] + (n * stride_wn)[None, :]
        acc = dot(tile, tl.load(pointers, mask=mask, other=0.0), acc, PRECISION, LOW)
    return acc


@triton.jit(do_not_specialize=["T", "G", "steps"])
def pair_linear_kernel(
    a, b, w_a, w_t, w_b, bias, out, node_ptr, pair_ptr,
    T, G, steps, width_a, reach_a, entries, width_b, reach_b, outputs, out_reach,
    stride_am, stride_ac, stride_bm, stride_bc, stride_om, stride_an, stride_ak, stride_bn, stride_bk,
    IDENTITY: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[p] = w_a [a[p], 1] + w_t a[pᵀ] + w_b b[p] + bias of BM pairs and BN outputs; w_t, w_b, bias may be None.

    The weights have ``outputs`` outputs, of which there may be fewer than ``out_reach`` if more lie behind them that
    may be read: these go to the ends of the rows of ``out``.
    """
    p = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = p < T
    other, diagonal = p, inside
    if IDENTITY or w_t is not None:
        other, diagonal = _pair(p, T, node_ptr, pair_ptr, G, steps)
    acc = _add_layer(
        tl.zeros((BM, BN), tl.float32), a, w_a, p, inside, diagonal, n, width_a, reach_a, entries, out_reach,
        stride_am, stride_ac, stride_an, stride_ak, IDENTITY, PRECISION, LOW, BK,
    )  # fmt: skip
    if w_t is not None:
        acc = _add_layer(
            acc, a, w_t, other, inside, diagonal, n, width_a, reach_a, width_a, out_reach,
            stride_am, stride_ac, stride_an, stride_ak, False, PRECISION, LOW, BK,
        )  # fmt: skip
    if w_b is not None:
        acc = _add_layer(
            acc, b, w_b, p, inside, diagonal, n, width_b, reach_b, width_b, out_reach,
            stride_bm, stride_bc, stride_bn, stride_bk, False, PRECISION, LOW, BK,
        )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    pointers = out + (p * stride_om)[:, None] + n[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside[:, None] & (n < stride_om)[None, :])


@triton.jit(do_not_specialize=["T", "G", "steps", "share"])
def pair_outer_kernel(
    d, r, part, node_ptr, pair_ptr,
    T, G, steps, share, height, reach_d, width, reach_r, columns, stride_p,
    stride_dj, stride_dm, stride_dc, stride_rm, stride_rc,
    PLUS: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """part[s, job, n, c] = Σ_p d[p, n] [r[p], 1[i = j], 1][c] over the ``share`` pairs of part s.

    Jobs: 0 with d[0] and r[p]; with PLUS 1 with d[0] and r[pᵀ], 2 with d[1] and r[p]; without it 1 with d[1] and r[p],
    and no identity column. A job has ``columns`` columns, in rows of ``stride_p`` numbers.
    """
    blocks = tl.cdiv(columns, BN)
    n = tl.program_id(1) // blocks * BH + tl.arange(0, BH)
    c = tl.program_id(1) % blocks * BN + tl.arange(0, BN)
    job = tl.program_id(2)
    split = tl.program_id(0).to(tl.int64)
    d += (job // 2 if PLUS else job) * stride_dj
    acc = tl.zeros((BH, BN), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, T), BM):
        p = start + tl.arange(0, BM)
        inside = p < T
        rows, diagonal = p, inside
        if PLUS:
            other, diagonal = _pair(p, T, node_ptr, pair_ptr, G, steps)
            rows = tl.where(job == 1, other, p)
        pointers = d + (p * stride_dm)[:, None] + (n.to(tl.int64) * stride_dc)[None, :]
        left = tl.load(pointers, mask=inside[:, None] & (n < reach_d)[None, :], other=0.0)
        right = _signal(r, rows, inside, diagonal, c, width, reach_r, stride_rm, stride_rc, PLUS)
        right = tl.where((c == columns - 1)[None, :], inside.to(tl.float32).to(right.dtype)[:, None], right)
        acc = dot(tl.trans(left), right, acc, PRECISION, LOW)
    part += (split * tl.num_programs(2) + job) * height * stride_p
    tl.store(part + (n * stride_p)[:, None] + c[None, :], acc, mask=(n < height)[:, None] & (c < stride_p)[None, :])


# Launching

# (pairs, warps, stages) of a program by kernel, the default first: on GPUs whose warps multiply in groups (sm_90 and
# sm_100), which wants 64 rows, and on others; for 16-bit numbers, and for float32, whose operands are held as halves.
_Shapes = dict[str, tuple[tuple[tuple[int, int, int], ...], ...]]
_GROUPS: _Shapes = {
    "mlp": (((64, 4, 3), (128, 8, 3), (64, 8, 2)), ((64, 8, 2), (64, 4, 2))),
    "backward": (((64, 8, 2), (64, 8, 3), (32, 8, 2)), ((32, 8, 1), (64, 8, 1))),
    "linear": (((64, 4, 2), (64, 8, 2), (64, 4, 3), (128, 8, 3)), ((64, 8, 2), (32, 4, 2))),
    "outer": (((64, 8, 3), (32, 8, 3), (128, 8, 2)), ((32, 8, 2), (64, 8, 2))),
}
_WARPS: _Shapes = {
    "mlp": (((64, 4, 2), (64, 4, 3), (64, 8, 2)), ((64, 8, 2), (32, 4, 2))),
    "backward": (((32, 8, 1), (16, 8, 1), (64, 8, 1)), ((16, 8, 1), (32, 8, 1))),
    "linear": (((64, 4, 2), (64, 4, 3), (64, 8, 2)), ((64, 8, 2), (32, 4, 2))),
    "outer": (((64, 8, 2), (32, 8, 3), (32, 8, 2)), ((16, 8, 2), (32, 8, 2))),
}
_HIP = _WARPS | {"backward": (((16, 8, 1), (32, 8, 1)), ((16, 8, 1), (32, 8, 1)))}
_TILES = {"mlp": {"BK": 32, "BN": 32}, "backward": {"BK": 32}, "linear": {"BK": 32}, "outer": {}}
_SPLITS = 2  # programs for a processor where each keeps its sum


def unsupported(hidden: int, dtype: torch.dtype) -> str | None:
    """What of MLPs of this width and dtype the kernels do not support, in words."""
    if dtype not in DTYPES:
        return str(dtype).removeprefix("torch.")
    return f"hidden layers wider than {MAX_HIDDEN}, got {hidden}" if hidden > MAX_HIDDEN else None


def _tile(size: int) -> int:
    return max(16, min(128, bucket(size)))


def _candidates(kernel: str, low: bool, target: Target, **tiles: int) -> list[dict[str, Any]]:
    """Launch configurations, the default first; ``tiles``: those that the problem sets."""
    if target[0] == "interpreter":
        shapes: tuple[tuple[int, int, int], ...] = ((32, 4, 1),)
        tiles = dict.fromkeys(_TILES[kernel], 16) | tiles
    else:
        table = _HIP if target[0] == "hip" else _GROUPS if 90 <= int(target[1]) < 120 else _WARPS
        shapes = table[kernel][0 if low else 1]
        tiles = _TILES[kernel] | tiles
    return [{"BM": bm, "num_warps": warps, "num_stages": stages, **tiles} for bm, warps, stages in shapes]


def _precision(x: torch.Tensor) -> dict[str, Any]:
    low = x.dtype != torch.float32
    # The interpreter's time goes by operations: one product for each instead of three.
    precision = dot_precision(_lib.target_of(x.device), "ieee" if INTERPRET else None, low=low)
    return {"PRECISION": precision, "LOW": low and not INTERPRET}


def _run(kernel: str, launch, key: tuple, x: torch.Tensor, **tiles: int) -> None:
    """Pick a configuration of ``kernel`` and launch it."""
    candidates = _candidates(kernel, x.dtype != torch.float32, _lib.target_of(x.device), **tiles)
    full_key = (x.dtype, _precision(x)["PRECISION"], *key, *tiles.values())
    with _lib.device_guard(x):
        launch(_lib.pick(f"pair_{kernel}", full_key, candidates, launch, x.device))


def _split(x: torch.Tensor, rows: int, size: int, tiles: int = 1) -> tuple[int, int]:
    """In how many parts ``rows`` are summed, and the rows of each, a multiple of ``size``."""
    most = max(1, _SPLITS * _lib.multiprocessors(x.device) // tiles)
    share = cdiv(cdiv(rows, size), most) * size
    return cdiv(rows, share), share


def _strides(name: str, t: torch.Tensor, *axes: str) -> dict[str, int]:
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, t.stride(), strict=True)}


def _launch_linear(
    a: torch.Tensor,
    b: torch.Tensor | None,
    weights: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    bias: torch.Tensor | None,
    ptr: dict[str, Any],
    outputs: int,
    identity: bool = False,
    out_reach: int | None = None,
) -> torch.Tensor:
    """out[p] = w_a [a[p], 1] + w_t a[pᵀ] + w_b b[p] + bias; ``weights`` are (out, in), w_a and w_t of equal strides."""
    w_a, w_t, w_b = weights
    rows = a.shape[0]
    out = padded_rows(a, rows, outputs)
    other = a if b is None else b
    arguments = {
        "a": a, "b": b, "w_a": w_a, "w_t": w_t, "w_b": w_b, "bias": bias, "out": out, **ptr, "T": rows,
        "width_a": a.shape[1], "reach_a": reach(a), "entries": a.shape[1] + identity,
        "width_b": other.shape[1], "reach_b": reach(other),
        "outputs": outputs, "out_reach": out_reach or outputs, "stride_om": out.stride(0),
        **_strides("a", a, "m", "c"), **_strides("b", other, "m", "c"), **_strides("a", w_a, "n", "k"),
        **_strides("b", w_a if w_b is None else w_b, "n", "k"), "IDENTITY": identity, **_precision(a),
    }  # fmt: skip

    def launch(meta: dict[str, Any]) -> None:
        pair_linear_kernel[(cdiv(rows, meta["BM"]), cdiv(out.stride(0), meta["BN"]))](**arguments, **meta)

    what = identity, w_t is None, w_b is None
    units = tuple(t is None or t.stride(1) == 1 for t in (a, b, w_a, w_b))
    _run("linear", launch, (bucket(a.shape[1]), *what, *units), a, BN=_tile(outputs))
    return out


def _launch_outer(d: torch.Tensor, r: torch.Tensor, ptr: dict[str, Any], jobs: int, plus: bool) -> torch.Tensor:
    """(jobs, height, columns) in float32, see :func:`pair_outer_kernel`; d (1 or 2, T, height)."""
    (rows, width), height = r.shape, d.shape[2]
    columns = width + (2 if plus else 1)
    part = r.new_empty(0)
    arguments = {
        "d": d, "r": r, **ptr, "T": rows, "height": height, "reach_d": min(map(reach, d)), "width": width,
        "reach_r": reach(r), "columns": columns, **_strides("d", d[0], "m", "c"), **_strides("r", r, "m", "c"),
        # Of a single d it may be anything, and a kernel is compiled for whether 16 divides it.
        "stride_dj": d.stride(0) if len(d) > 1 else 0,
        "PLUS": plus, **_precision(r),
    }  # fmt: skip
    bh, bn = _tile(height), _tile(columns)
    tiles = cdiv(height, bh) * cdiv(columns, bn)

    def launch(meta: dict[str, Any]) -> None:
        nonlocal part
        parts, share = _split(r, rows, meta["BM"], tiles * jobs)
        part = padded_rows(r, parts, jobs, height, columns, dtype=torch.float32)
        pair_outer_kernel[(parts, tiles, jobs)](**arguments, part=part, stride_p=part.stride(2), share=share, **meta)

    _run("outer", launch, (plus, d.stride(2) == 1, r.stride(1) == 1), r, BH=bh, BN=bn)
    return part.sum(0)


def _check_floats(x: torch.Tensor, shapes: dict[str, tuple[torch.Tensor, tuple[int, ...], str]]) -> None:
    """``shapes``: name -> (tensor, its shape, that shape in words)."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"x must have shape (pairs, channels), got {tuple(x.shape)}")
    for name, (tensor, shape, words) in shapes.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype}, the dtype of x, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {words} = {shape}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, where x is, got {tensor.device}")


def _check_mlp(x, node_ptr, pair_ptr, w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b, plus) -> None:
    hidden, channels = b1a.shape[0] if b1a.ndim == 1 else -1, x.shape[1] if x.ndim == 2 else -1
    widths = (2 * (channels + 1), channels + 1) if plus else (channels, channels)
    words = ("(H, 2 (C + 1))", "(H, C + 1)") if plus else ("(H, C)", "(H, C)")
    shapes: dict[str, tuple[torch.Tensor, tuple[int, ...], str]] = {}
    for i, (first, second) in enumerate((((w1a, b1a), (w1b, b1b)), ((w2a, b2a), (w2b, b2b)))):
        shapes |= {
            f"mlp{i + 1}[0]": (first[0], (hidden, widths[i]), words[i]),
            f"mlp{i + 1}[1]": (first[1], (hidden,), "(H,)"),
            f"mlp{i + 1}[2]": (second[0], (hidden, hidden), "(H, H)"),
            f"mlp{i + 1}[3]": (second[1], (hidden,), "(H,)"),
        }
    _check_floats(x, shapes)
    if hidden > MAX_HIDDEN:
        raise ValueError(f"mlp1[1] must have at most {MAX_HIDDEN} entries, got {hidden}")
    check_pointers(x, node_ptr, pair_ptr)


def _check_linear(x, y, node_ptr, pair_ptr, weight, bias, plus) -> None:
    outputs, words = bias.shape[0] if bias.ndim == 1 else -1, "(O, C + 1 + H)" if plus else "(O, C + H)"
    _check_floats(x, {})
    if y.ndim != 2 or y.shape[0] != x.shape[0]:
        raise ValueError(f"y must have shape (pairs, H) = ({x.shape[0]}, *), got {tuple(y.shape)}")
    columns = x.shape[1] + plus + y.shape[1]
    shapes = {
        "y": (y, tuple(y.shape), "(pairs, H)"),
        "weight": (weight, (outputs, columns), words),
        "bias": (bias, (outputs,), "(O,)"),
    }
    _check_floats(x, shapes)
    check_pointers(x, node_ptr, pair_ptr)


def _mlp(
    x: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    w1a: torch.Tensor,
    b1a: torch.Tensor,
    w1b: torch.Tensor,
    b1b: torch.Tensor,
    w2a: torch.Tensor,
    b2a: torch.Tensor,
    w2b: torch.Tensor,
    b2b: torch.Tensor,
    plus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_mlp(x, node_ptr, pair_ptr, w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b, plus)
    (rows, channels), hidden = x.shape, b1a.shape[0]
    results = padded_rows(x, rows, hidden), padded_rows(x, rows, hidden)
    if results[0].numel() == 0:
        return results
    shared = {
        "x": x, **pointers(node_ptr, pair_ptr), "T": rows, "width": channels, "reach": reach(x),
        "entries": channels + plus, "hidden": hidden, **_strides("x", x, "m", "c"), "PLUS": plus, **_precision(x),
    }  # fmt: skip
    for mlp, (m, wa, ba, wb, bb) in enumerate(
        zip(results, (w1a, w2a), (b1a, b2a), (w1b, w2b), (b1b, b2b), strict=True)
    ):
        arguments = shared | {
            "wa": wa, "ba": ba.contiguous(), "wb": wb, "bb": bb.contiguous(), "m": m, "stride_mm": m.stride(0),
            **_strides("a", wa, "n", "k"), **_strides("b", wb, "n", "k"), "TRANSPOSE": plus and mlp == 0,
        }  # fmt: skip

        def launch(meta: dict[str, Any], arguments=arguments) -> None:
            pair_mlp_kernel[(cdiv(rows, meta["BM"]),)](**arguments, **meta)

        units = tuple(t.stride(1) == 1 for t in (x, wa, wb))
        _run("mlp", launch, (bucket(channels), plus, mlp, *units), x, BH=_tile(hidden))
    return results


def _mlp_backward(
    g1: torch.Tensor,
    g2: torch.Tensor,
    m1: torch.Tensor,
    m2: torch.Tensor,
    x: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    w1a: torch.Tensor,
    b1a: torch.Tensor,
    w1b: torch.Tensor,
    b1b: torch.Tensor,
    w2a: torch.Tensor,
    b2a: torch.Tensor,
    w2b: torch.Tensor,
    b2b: torch.Tensor,
    plus: bool,
    wants_x: bool,
) -> list[torch.Tensor]:
    """The gradients of x (empty where it is not wanted) and of the eight parameters."""
    (rows, channels), hidden = x.shape, b1a.shape[0]
    parameters = w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b
    if m1.numel() == 0:
        return [padded_rows(x, rows if wants_x else 0, channels).zero_(), *(x.new_zeros(t.shape) for t in parameters)]
    ptr = pointers(node_ptr, pair_ptr)
    d = padded_rows(x, 2, rows, hidden)
    seconds = []
    for mlp, (g, m, wa, ba, wb) in enumerate(((g1, m1, w1a, b1a, w1b), (g2, m2, w2a, b2a, w2b))):
        parts: tuple[torch.Tensor, ...] = ()
        arguments = {
            "g": g, "m": m, "x": x, "wa": wa, "ba": ba.contiguous(), "wb": wb, "d": d[mlp], **ptr, "T": rows,
            "width": channels, "reach": reach(x), "entries": channels + plus, "hidden": hidden,
            **_strides("g", g, "m", "c"), **_strides("m", m, "m", "c"), **_strides("x", x, "m", "c"),
            "stride_d": d.stride(1), **_strides("a", wa, "n", "k"), **_strides("b", wb, "n", "k"),
            "PLUS": plus, "TRANSPOSE": plus and mlp == 0, **_precision(x),
        }  # fmt: skip

        def launch(meta: dict[str, Any], arguments=arguments) -> None:
            nonlocal parts
            count, share = _split(x, rows, meta["BM"])
            sizes = (count, hidden, hidden), (count, hidden)
            parts = tuple(padded_rows(x, *size, dtype=torch.float32) for size in sizes)
            grads = dict(zip(("grad_w", "grad_b"), parts, strict=True))
            pair_mlp_backward_kernel[(count,)](**arguments, **grads, stride_w=parts[0].stride(1), share=share, **meta)

        units = tuple(t.stride(1) == 1 for t in (g, m, x, wa, wb))
        _run("backward", launch, (bucket(channels), plus, mlp, *units), x, BH=_tile(hidden))
        seconds += [part.sum(0).to(x.dtype) for part in parts]

    if wants_x:
        # The identity's column of the weights, which may be read, fills up a row that is one channel short of it.
        out_reach = channels + 1 if plus and channels % 16 == 15 else channels
        turned = w1a.t()[channels + 1 :] if plus else None
        grad_x = _launch_linear(d[0], d[1], (w1a.t(), turned, w2a.t()), None, ptr, channels, out_reach=out_reach)
    else:
        grad_x = padded_rows(x, 0, channels)
    jobs = 3 if plus else 2
    sums = _launch_outer(d, x, ptr, jobs, plus).to(x.dtype)
    entries = channels + plus
    grads = torch.cat([*sums[: jobs - 1, :, :entries]], 1), sums[0, :, -1], sums[-1, :, :entries], sums[-1, :, -1]
    # Copies, not views: what an operation returns shares no memory.
    w1, b1, w2, b2 = (grad.clone(memory_format=torch.contiguous_format) for grad in grads)
    return [grad_x, w1, b1, *seconds[:2], w2, b2, *seconds[2:]]


def _linear(
    x: torch.Tensor,
    y: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    plus: bool,
) -> torch.Tensor:
    _check_linear(x, y, node_ptr, pair_ptr, weight, bias, plus)
    if x.shape[0] == 0 or bias.shape[0] == 0:
        return padded_rows(x, x.shape[0], bias.shape[0])
    weights = weight[:, : x.shape[1] + plus], None, weight[:, x.shape[1] + plus :]
    return _launch_linear(x, y, weights, bias.contiguous(), pointers(node_ptr, pair_ptr), bias.shape[0], identity=plus)


def _linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    weight: torch.Tensor,
    plus: bool,
    wants_x: bool,
) -> list[torch.Tensor]:
    """The gradients of x (empty where it is not wanted), y, the weight and the bias."""
    (rows, channels), (outputs, _) = x.shape, weight.shape
    if rows == 0 or outputs == 0:
        grads = [padded_rows(x, rows if wants_x else 0, channels), padded_rows(y, *y.shape)]
        return [*(g.zero_() for g in grads), x.new_zeros(weight.shape), x.new_zeros(outputs)]
    ptr = pointers(node_ptr, pair_ptr)
    of_x, of_y = weight[:, : channels + plus].t(), weight[:, channels + plus :].t()
    out_reach = channels + 1 if plus and channels % 16 == 15 else channels
    if wants_x:
        grad_x = _launch_linear(grad, None, (of_x, None, None), None, ptr, channels, out_reach=out_reach)
    else:
        grad_x = padded_rows(x, 0, channels)
    grad_y = _launch_linear(grad, None, (of_y, None, None), None, ptr, y.shape[1])
    by_x = _launch_outer(grad[None], x, ptr, 1, plus)[0]
    by_y = _launch_outer(grad[None], y, ptr, 1, False)[0]
    grad_weight = torch.cat([by_x[:, :-1], by_y[:, :-1]], 1).to(weight.dtype)
    return [grad_x, grad_y, grad_weight, by_x[:, -1].contiguous().to(weight.dtype)]


# Plain torch


def _padded(t: torch.Tensor) -> torch.Tensor:
    return padded_rows(t, *t.shape).copy_(t)


def _turned(rows: int, node_ptr: torch.Tensor, pair_ptr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows pᵀ, and which p are on a diagonal."""
    p = torch.arange(rows, device=pair_ptr.device)
    g = torch.searchsorted(pair_ptr.long().contiguous(), p, right=True) - 1
    start, n = pair_ptr.long()[g], node_ptr.long().diff()[g]
    i, j = (p - start) // n, (p - start) % n
    return start + j * n + i, i == j


def _inputs(x, node_ptr, pair_ptr, plus) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the two MLPs see, and pᵀ."""
    if not plus:
        return x, x, None
    turned, diagonal = _turned(x.shape[0], node_ptr, pair_ptr)
    own = torch.cat([x, diagonal[:, None].to(x.dtype)], 1)
    return torch.cat([own, own[turned]], 1), own, turned


def _reference_mlp(x, node_ptr, pair_ptr, w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b, plus):
    _check_mlp(x, node_ptr, pair_ptr, w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b, plus)
    both, own, _ = _inputs(x, node_ptr, pair_ptr, plus)
    m1 = F.linear(F.linear(both, w1a, b1a).relu(), w1b, b1b).relu()
    m2 = F.linear(F.linear(own, w2a, b2a).relu(), w2b, b2b).relu()
    return _padded(m1), _padded(m2)


def _reference_mlp_backward(
    g1, g2, m1, m2, x, node_ptr, pair_ptr, w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b, plus, wants_x
):
    *inputs, turned = _inputs(x, node_ptr, pair_ptr, plus)
    grad_x, grads, channels = torch.zeros_like(x), [], x.shape[1]
    for inp, g, m, wa, ba, wb in zip(
        inputs, (g1, g2), (m1, m2), (w1a, w2a), (b1a, b2a), (w1b, w2b), strict=True
    ):  # fmt: skip
        inner = F.linear(inp, wa, ba).relu()
        g = torch.where(m <= 0, 0, g)
        d = torch.where(inner <= 0, 0, g @ wb)
        grads += [d.t() @ inp, d.sum(0), g.t() @ inner, g.sum(0)]
        back = d @ wa
        grad_x = grad_x + back[:, :channels]
        if back.shape[1] > channels + 1:
            grad_x = grad_x + back[turned, channels + 1 : -1]
    return [_padded(grad_x if wants_x else grad_x[:0]), *grads]


def _reference_linear(x, y, node_ptr, pair_ptr, weight, bias, plus):
    _check_linear(x, y, node_ptr, pair_ptr, weight, bias, plus)
    own = _inputs(x, node_ptr, pair_ptr, plus)[1]
    return _padded(F.linear(torch.cat([own, y], 1), weight, bias))


def _reference_linear_backward(grad, x, y, node_ptr, pair_ptr, weight, plus, wants_x):
    own, channels = _inputs(x, node_ptr, pair_ptr, plus)[1], x.shape[1]
    back = grad @ weight
    grad_x = back[:, :channels] if wants_x else back[:0, :channels]
    return [
        _padded(grad_x), _padded(back[:, channels + plus :]), grad.t() @ torch.cat([own, y], 1), grad.sum(0)
    ]  # fmt: skip


# Operations

_mlp_op = custom_op("pair_mlp", _mlp)
_mlp_backward_op = custom_op("pair_mlp_backward", _mlp_backward)
_linear_op = custom_op("pair_linear", _linear)
_linear_backward_op = custom_op("pair_linear_backward", _linear_backward)
register_reference(_mlp_op, _reference_mlp)
register_reference(_mlp_backward_op, _reference_mlp_backward)
register_reference(_linear_op, _reference_linear)
register_reference(_linear_backward_op, _reference_linear_backward)


@_mlp_op.register_fake
def _(x, node_ptr, pair_ptr, w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b, plus):
    return tuple(padded_rows(x, x.shape[0], b1a.shape[0]) for _ in range(2))


@_mlp_backward_op.register_fake
def _(g1, g2, m1, m2, x, node_ptr, pair_ptr, w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b, plus, wants_x):
    parameters = w1a, b1a, w1b, b1b, w2a, b2a, w2b, b2b
    return [padded_rows(x, x.shape[0] if wants_x else 0, x.shape[1]), *(x.new_empty(t.shape) for t in parameters)]


@_linear_op.register_fake
def _(x, y, node_ptr, pair_ptr, weight, bias, plus):
    return padded_rows(x, x.shape[0], bias.shape[0])


@_linear_backward_op.register_fake
def _(grad, x, y, node_ptr, pair_ptr, weight, plus, wants_x):
    grads = padded_rows(x, x.shape[0] if wants_x else 0, x.shape[1]), padded_rows(y, *y.shape)
    return [*grads, x.new_empty(weight.shape), x.new_empty(weight.shape[:1])]


def _setup_mlp(ctx, inputs, output) -> None:
    *tensors, ctx.plus = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward_mlp(ctx, g1, g2):
    wants_x = ctx.needs_input_grad[0]
    grad_x, *grads = _mlp_backward_op(g1, g2, *ctx.saved_tensors, ctx.plus, wants_x)
    return grad_x if wants_x else None, None, None, *grads, None


def _setup_linear(ctx, inputs, output) -> None:
    *tensors, _, ctx.plus = inputs
    ctx.save_for_backward(*tensors)


def _backward_linear(ctx, grad):
    wants_x = ctx.needs_input_grad[0]
    grad_x, grad_y, *grads = _linear_backward_op(grad, *ctx.saved_tensors, ctx.plus, wants_x)
    return grad_x if wants_x else None, grad_y, None, None, *grads, None


_mlp_op.register_autograd(_backward_mlp, setup_context=_setup_mlp)
_linear_op.register_autograd(_backward_linear, setup_context=_setup_linear)


def pair_mlp(
    x: torch.Tensor, node_ptr: torch.Tensor, pair_ptr: torch.Tensor, mlp1: _MLP, mlp2: _MLP, *, plus: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """m1 and m2: at each pair two MLPs of two layers, ReLU after both; once differentiable in x and all parameters.

    Kept for the backward pass: the arguments, m1 and m2. The hidden layers are computed again.

    Args:
        x: (T, C), float32, float16 or bfloat16, any strides.
        node_ptr, pair_ptr: (G + 1,), int32 or int64, see ``segment_matmul.py``.
        mlp1: weight (H, 2 (C + 1)) with columns [x, identity, x transposed, identity], or (H, C) where ``plus`` is
            False; bias (H,); weight (H, H); bias (H,); in the dtype of ``x``, any strides. H is at most 128.
        mlp2: weight (H, C + 1) with columns [x, identity], or (H, C); bias (H,); weight (H, H); bias (H,).
        plus: whether there are a transpose and an identity channel.

    Returns:
        two (T, H) in the dtype of ``x``, rows of a multiple of 16 numbers.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit. The entries of the pointers are not
            checked.
    """
    return _mlp_op(x, node_ptr, pair_ptr, *mlp1, *mlp2, plus)


def pair_linear(
    x: torch.Tensor,
    y: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    plus: bool = True,
) -> torch.Tensor:
    """out[p] = W [x[p], 1[i = j], y[p]] + b, a linear layer; once differentiable in x, y, W and b.

    Args:
        x, y: (T, C) and (T, H), float32, float16 or bfloat16, any strides.
        node_ptr, pair_ptr: (G + 1,), int32 or int64, see ``segment_matmul.py``.
        weight: (O, C + 1 + H) with columns [x, identity, y], or (O, C + H) where ``plus`` is False; any strides.
        bias: (O,).
        plus: whether there is an identity channel.

    Returns:
        (T, O) in the dtype of ``x``, rows of a multiple of 16 numbers. C, H and O are of any size.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit.
    """
    return _linear_op(x, y, node_ptr, pair_ptr, weight, bias, plus)


# Production configurations: 95 channels in rows of 96, hidden layers of 95 likewise, the default of each target.

_NOTE = (
    "What spills is addresses, around the loops, in the backward kernel, whose sums take half of the registers, and on "
    "sm_80 halves of the hidden layer, which float32 on matrix units multiplies by."
)
# (kernel, numbers) -> target -> bytes.
_BUDGETS = {
    ("mlp", "fp32"): {"sm_80": 112},
    ("backward", "bf16"): {"sm_90": 32, "sm_100": 40},
    ("backward", "fp32"): {"sm_80": 8},
    ("linear", "bf16"): {"sm_100": 8},
}
_ENDS = {"node_ptr": "*i64:16", "pair_ptr": "*i64:16", "T": "i32", "G": "i32", "steps": "i32"}


def _register(
    kernel: Any,
    kind: str,
    label: str,
    dtype: torch.dtype,
    signature: dict[str, str],
    constants: dict[str, Any],
    tiles: dict[str, int],
) -> None:
    """``signature``: "*" stands for a pointer to numbers of ``dtype``."""
    low, number = dtype != torch.float32, "fp32" if dtype == torch.float32 else "bf16"
    budget = _BUDGETS.get((kind, number))
    register_defaults(
        kernel,
        f"pair_mlp{'' if kind == 'mlp' else '_' + kind}[{number}{label}]",
        _ENDS | {name: f"*{number}:16" if type_ == "*" else type_ for name, type_ in signature.items()},
        constants | {"LOW": low, "PRECISION": lambda target: dot_precision(target, low=low)},
        lambda target: _candidates(kind, low, target, **tiles)[0],
        spill_budget=budget,
        note=_NOTE if budget else "",
    )


def _ints(*names: str, aligned: bool = True) -> dict[str, str]:
    return dict.fromkeys(names, "i32:16" if aligned else "i32")


def _register_all(dtype: torch.dtype) -> None:
    hidden = {"BH": _tile(95)}
    for label, transpose in ((",mlp1", True), (",mlp2", False)):
        _register(
            pair_mlp_kernel, "mlp", label, dtype,
            dict.fromkeys(("x", "wa", "ba", "wb", "bb", "m"), "*")
            | _ints("reach", "entries", "stride_xm", "stride_mm", "stride_an")
            | _ints("width", "hidden", "stride_bn", aligned=False),
            dict.fromkeys(("stride_xc", "stride_ak", "stride_bk"), 1) | {"PLUS": True, "TRANSPOSE": transpose},
            hidden,
        )  # fmt: skip
        _register(
            pair_mlp_backward_kernel, "backward", label, dtype,
            dict.fromkeys(("g", "m", "x", "wa", "ba", "wb", "d"), "*")
            | {"grad_w": "*fp32:16", "grad_b": "*fp32:16", "share": "i32"}
            | _ints("reach", "entries", "stride_gm", "stride_mm", "stride_xm", "stride_d", "stride_w", "stride_an")
            | _ints("width", "hidden", "stride_bn", aligned=False),
            dict.fromkeys(("stride_gc", "stride_mc", "stride_xc", "stride_ak", "stride_bk"), 1)
            | {"PLUS": True, "TRANSPOSE": transpose},
            hidden,
        )  # fmt: skip
    units = dict.fromkeys(("stride_ac", "stride_bc", "stride_ak", "stride_bk"), 1)
    rows = _ints("reach_a", "reach_b", "stride_am", "stride_bm", "stride_om")
    sizes = _ints("width_a", "width_b", "outputs", aligned=False)
    _register(
        pair_linear_kernel, "linear", "", dtype,
        dict.fromkeys(("a", "b", "w_a", "w_b", "bias", "out"), "*") | rows | sizes | _ints("entries")
        | _ints("out_reach", "stride_an", "stride_bn", aligned=False),
        units | {"w_t": None, "IDENTITY": True}, {"BN": _tile(95)},
    )  # fmt: skip
    turned = dict.fromkeys(("stride_ac", "stride_bc", "stride_an", "stride_bn"), 1)
    _register(
        pair_linear_kernel, "linear", ",back", dtype,
        dict.fromkeys(("a", "b", "w_a", "w_t", "w_b", "out"), "*") | rows | sizes | _ints("entries", aligned=False)
        | _ints("out_reach", "stride_ak", "stride_bk"),
        turned | {"bias": None, "IDENTITY": False}, {"BN": _tile(95)},
    )  # fmt: skip
    _register(
        pair_outer_kernel, "outer", "", dtype,
        dict.fromkeys(("d", "r"), "*") | {"part": "*fp32:16", "share": "i32"}
        | _ints("reach_d", "reach_r", "stride_dj", "stride_dm", "stride_rm", "stride_p")
        | _ints("height", "width", "columns", aligned=False),
        {"stride_dc": 1, "stride_rc": 1, "PLUS": True}, {"BH": _tile(95), "BN": _tile(97)},
    )  # fmt: skip


_register_all(torch.bfloat16)
_register_all(torch.float32)
