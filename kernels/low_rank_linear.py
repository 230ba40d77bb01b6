"""A prefix of a factorised linear map, y = (x V_bᵀ) U_bᵀ + bias, and its gradients, in one kernel.

V_b is the first b rows of V (r, in), U_b the first b columns of U (out, r). What it costs to move x and y outweighs the
products for every rank up to a few hundred, so what counts is to read x once and write y once: a program takes BM rows
through both products, with h = x V_bᵀ, (BM, BR), in its registers in between. The gradient of x is the same kernel with
the factors' roles exchanged, g ↦ (g U_b) V_b; those of U and V, gᵀ h and (g U_b)ᵀ x, sum over the rows, where the
library's split products are at home. They take h and g U_b, b numbers a row, as the kernel has had them on the chip.

The rank is a number at run time: only the width of the tile, BR = 16, 32, ..., 256, is compiled in. Loads from the
factors are masked by it, so that nothing beyond the prefix is read. Neighbouring entries of U's rows are its columns,
hence a mask that ends anywhere would split its vector loads: where the rank is a multiple of 16 the mask says so, in a
branch of its own. Each run of rows may also have a rank of its own, below the common one.

Sums are in float32; h is rounded to the dtype of x before it is multiplied, as two products in that dtype do.

Source: arXiv 2308.14929 (the map and its prefixes).
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

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 256  # the widest h that a program holds in registers
_SLICE = 16  # h is stored in multiples of so many columns


@triton.jit
def _run_rows(
    x, v, u, bias, y, h, m, own, live, M, K, N, width,
    stride_xm, stride_xk, stride_vr, stride_vk, stride_un, stride_ur,
    PRECISION: tl.constexpr, LOW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The rows ``m`` through both products, with the entries ``live`` of the inner dimension."""
    r = tl.arange(0, BR)
    r_wide = r.to(tl.int64)
    rows = m < M
    inner = tl.zeros((BM, BR), tl.float32)
    for k_start in range(0, K, BK):
        k = k_start + tl.arange(0, BK)
        k_wide = k.to(tl.int64)
        pointers = x + (m * stride_xm)[:, None] + (k_wide * stride_xk)[None, :]
        xs = tl.load(pointers, mask=rows[:, None] & (k < K)[None, :], other=0.0)
        pointers = v + (k_wide * stride_vk)[:, None] + (r_wide * stride_vr)[None, :]
        vs = tl.load(pointers, mask=(k < K)[:, None] & live[None, :], other=0.0)
        inner = dot(xs, vs, inner, PRECISION, LOW)

    inner = inner.to(y.dtype.element_ty)
    if own is not None:
        inner = tl.where(r[None, :] < own[:, None], inner, tl.zeros_like(inner))
    if h is not None:
        tl.store(h + (m * width)[:, None] + r[None, :], inner, mask=rows[:, None] & (r < width)[None, :])

    for n_start in range(0, N, BN):
        n = n_start + tl.arange(0, BN)
        n_wide = n.to(tl.int64)
        pointers = u + (r_wide * stride_ur)[:, None] + (n_wide * stride_un)[None, :]
        us = tl.load(pointers, mask=live[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(inner, us, tl.zeros((BM, BN), tl.float32), PRECISION, LOW)
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        pointers = y + (m * N)[:, None] + n[None, :]
        tl.store(pointers, acc.to(y.dtype.element_ty), mask=rows[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M", "rank", "run"])
def low_rank_linear_kernel(
    x, v, u, bias, ranks, y, h,
    M, K, N, rank, run,
    stride_xm, stride_xk, stride_vr, stride_vk, stride_un, stride_ur,
    PRECISION: tl.constexpr, LOW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BM rows. y (M, N), h (M, rank in multiples of 16) and bias are contiguous; row m has the rank ranks[m // run]."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    top = rank
    own = None
    if ranks is not None:
        own = tl.load(ranks + m // run, mask=m < M, other=0)
        own = tl.minimum(tl.maximum(own, 0), rank)
        top = tl.max(own, 0)
    width = (rank + 15) // 16 * 16
    if top % 16 == 0:
        _run_rows(
            x, v, u, bias, y, h, m, own, r < top // 16 * 16, M, K, N, width,
            stride_xm, stride_xk, stride_vr, stride_vk, stride_un, stride_ur, PRECISION, LOW, BM, BK, BN, BR,
        )  # fmt: skip
    else:
        _run_rows(
            x, v, u, bias, y, h, m, own, r < top, M, K, N, width,
            stride_xm, stride_xk, stride_vr, stride_vk, stride_un, stride_ur, PRECISION, LOW, BM, BK, BN, BR,
        )  # fmt: skip


# Launching

# (BM, BK, BN, warps, stages) by the width of the tile, the default first.
_Shape = tuple[int, int, int, int, int]
_LOW_NVIDIA: dict[int, tuple[_Shape, ...]] = {
    64: ((64, 128, 128, 4, 3), (64, 64, 64, 4, 4), (128, 64, 128, 8, 4), (128, 64, 64, 4, 4)),
    128: ((64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (128, 64, 64, 8, 4), (128, 64, 128, 8, 3)),
    256: ((64, 64, 64, 8, 2), (64, 64, 64, 8, 3), (128, 64, 64, 8, 3)),
}
_LOW_HIP: dict[int, tuple[_Shape, ...]] = {
    64: ((64, 64, 64, 4, 2), (128, 64, 64, 8, 2)),
    128: ((64, 64, 64, 4, 2), (128, 32, 64, 8, 2)),
    256: ((64, 32, 32, 8, 2),),
}
# A product of float32 holds h in registers twice, as the halves of its numbers: wide ones leave room for 16 rows only.
_FLOAT32: dict[int, tuple[_Shape, ...]] = {
    64: ((64, 32, 32, 4, 2),),
    128: ((64, 32, 32, 8, 2),),
    256: ((16, 16, 32, 4, 1),),
}
_INTERPRETED: dict[int, tuple[_Shape, ...]] = {256: ((32, 16, 16, 4, 1), (16, 32, 64, 4, 1))}


def _tile_width(rank: int) -> int:
    return max(16, bucket(rank))


def _candidates(rank: int, low: bool, target: Target, *, few_rows: bool = False) -> list[dict[str, Any]]:
    """Launch configurations for a rank, the default first; ``few_rows``: tiles of 128 would leave processors idle."""
    if target[0] == "interpreter":
        table = _INTERPRETED
    elif low:
        table = _LOW_HIP if target[0] == "hip" else _LOW_NVIDIA
    else:
        table = _FLOAT32
    shapes = table[min(width for width in table if width >= rank)]
    meta = [dict(zip(("BM", "BK", "BN", "num_warps", "num_stages"), shape, strict=True)) for shape in shapes]
    return [m | {"BR": _tile_width(rank)} for m in meta if not few_rows or m["BM"] < 128]


def fuses(rows: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether the fused kernel is expected to take no longer than two matrix products; a pure function.

    Every program reads both factors again, rank (in + out) numbers for 64 rows or more, from the second-level cache:
    beyond rank 128 that outweighs the rows themselves. Fewer than 4096 rows leave half of a large GPU's processors
    without a program, where the library splits its sums. Float32 products are not bound by memory.
    """
    low = dtype in (torch.float16, torch.bfloat16)
    return low and 0 < rank <= 128 and rows >= 4096 and min(in_features, out_features) >= 64


def _launch(
    x: torch.Tensor,
    weight_in: torch.Tensor,
    weight_out: torch.Tensor,
    bias: torch.Tensor | None,
    rank: int,
    ranks: torch.Tensor | None,
    run: int,
    keep: bool,
    candidates: list[dict[str, Any]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and h; ``candidates`` overrides the launch configurations."""
    _check(x, weight_in, weight_out, bias, rank, ranks, run)
    rows, k, n = x.shape[0], x.shape[1], weight_out.shape[0]
    if rows == 0 or k == 0 or n == 0 or rank == 0:
        y = x.new_zeros(rows, n)
        return (y if bias is None else y + bias), x.new_zeros(_inner_shape(rows, rank, keep))
    low = x.dtype != torch.float32
    target = _lib.target_of(x.device)
    few_rows = cdiv(rows, 128) < _lib.multiprocessors(x.device)
    if candidates is None:
        candidates = _candidates(rank, low, target, few_rows=few_rows)
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    h = torch.empty(_inner_shape(rows, rank, keep), dtype=x.dtype, device=x.device)
    # The interpreter's time goes by operations: one product for each instead of three.
    precision = dot_precision(target, "ieee" if INTERPRET else None, low=low)
    arguments = {
        "x": x, "v": weight_in, "u": weight_out, "bias": None if bias is None else bias.contiguous(),
        "ranks": None if ranks is None else ranks.contiguous(), "y": y, "h": h if keep else None,
        "M": rows, "K": k, "N": n, "rank": rank, "run": run,
        "stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_vr": weight_in.stride(0),
        "stride_vk": weight_in.stride(1), "stride_un": weight_out.stride(0), "stride_ur": weight_out.stride(1),
        "PRECISION": precision, "LOW": low and not INTERPRET,
    }  # fmt: skip

    def launch(meta: dict[str, Any]) -> None:
        low_rank_linear_kernel[(cdiv(rows, meta["BM"]),)](**arguments, **meta)

    unit = tuple(t.stride(1) == 1 for t in (x, weight_in, weight_out))
    key = (bucket(k), bucket(n), _tile_width(rank), x.dtype, precision, few_rows, unit, keep)
    with _lib.device_guard(x):
        launch(_lib.pick("low_rank_linear", key, candidates, launch, x.device))
    return y, h


def _inner_shape(rows: int, rank: int, keep: bool) -> tuple[int, int]:
    return (rows if keep else 0, (rank + _SLICE - 1) // _SLICE * _SLICE)


def _check(x, weight_in, weight_out, bias, rank, ranks, run) -> None:
    named = {"x": x, "weight_in": weight_in, "weight_out": weight_out, "bias": bias}
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype}, the dtype of x, got {tensor.dtype}")
    if x.ndim != 2:
        raise ValueError(f"x must have shape (rows, in), got {tuple(x.shape)}")
    if weight_in.ndim != 2 or weight_in.shape[1] != x.shape[1]:
        raise ValueError(f"weight_in must have shape (r, in) = (*, {x.shape[1]}), got {tuple(weight_in.shape)}")
    if weight_out.ndim != 2 or weight_out.shape[1] != weight_in.shape[0]:
        raise ValueError(
            f"weight_out must have shape (out, r) = (*, {weight_in.shape[0]}), got {tuple(weight_out.shape)}"
        )
    if bias is not None and bias.shape != weight_out.shape[:1]:
        raise ValueError(f"bias must have shape (out,) = ({weight_out.shape[0]},), got {tuple(bias.shape)}")
    most = min(weight_in.shape[0], MAX_RANK)
    if not 0 <= rank <= most:
        raise ValueError(f"rank must be from 0 to {most}, got {rank}")
    if ranks is not None:
        if run < 1:
            raise ValueError(f"run must be at least 1, got {run}")
        if ranks.dtype != torch.int32:
            raise TypeError(f"ranks must be int32, got {ranks.dtype}")
        if ranks.shape != (cdiv(x.shape[0], run),):
            raise ValueError(
                f"ranks must have shape ({cdiv(x.shape[0], run)},), one entry for every {run} of {x.shape[0]} rows, "
                f"got {tuple(ranks.shape)}"
            )
    for name, tensor in (named | {"ranks": ranks}).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, where x is, got {tensor.device}")


# Plain torch


def _masked(h: torch.Tensor, rank: int, ranks: torch.Tensor | None, run: int) -> torch.Tensor:
    """``h`` (rows, rank) with zeros from the row's own rank on."""
    if ranks is None:
        return h
    own = ranks.repeat_interleave(run)[: h.shape[0]] if run > 1 else ranks
    return torch.where(torch.arange(rank, device=h.device) < own[:, None], h, torch.zeros_like(h))


def _reference(
    x: torch.Tensor,
    weight_in: torch.Tensor,
    weight_out: torch.Tensor,
    bias: torch.Tensor | None,
    rank: int,
    ranks: torch.Tensor | None,
    run: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight_in, weight_out, bias, rank, ranks, run)
    h = _masked(F.linear(x, weight_in[:rank]), rank, ranks, run)
    shape = _inner_shape(x.shape[0], rank, keep)
    kept = F.pad(h, (0, shape[1] - rank)) if keep else x.new_empty(shape)
    return F.linear(h, weight_out[:, :rank], bias), kept


# Operation


def _linear(
    x: torch.Tensor,
    weight_in: torch.Tensor,
    weight_out: torch.Tensor,
    bias: torch.Tensor | None,
    rank: int,
    ranks: torch.Tensor | None,
    run: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x, weight_in, weight_out, bias, rank, ranks, run, keep)


_op = custom_op("low_rank_linear_forward", _linear)
register_reference(_op, _reference)


@_op.register_fake
def _(x, weight_in, weight_out, bias, rank, ranks, run, keep):
    y = x.new_empty((x.shape[0], weight_out.shape[0]))
    return y, x.new_empty(_inner_shape(x.shape[0], rank, keep))


def _setup(ctx, inputs, output) -> None:
    x, weight_in, weight_out, _, ctx.rank, ranks, ctx.run, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight_in, weight_out, ranks, output[1])


def _backward(ctx, grad, grad_h):
    """The second output is an output like the first, so that a backward pass can be differentiated: it uses both."""
    x, weight_in, weight_out, ranks, h = ctx.saved_tensors
    rank, rest = ctx.rank, weight_in.shape[0] - ctx.rank
    wants_x, wants_in, wants_out, wants_bias = ctx.needs_input_grad[:4]
    grad_x = grad_in = grad_out = grad_bias = None
    if grad is not None and grad_h is None and wants_x:
        grad_x, inner = _op(grad, weight_out.t(), weight_in.t(), None, rank, ranks, ctx.run, wants_in)
        inner = inner[:, :rank]
    elif wants_x or wants_in:
        inner = None if grad is None else grad @ weight_out[:, :rank]
        if grad_h is not None:
            inner = grad_h[:, :rank] if inner is None else inner + grad_h[:, :rank]
        if inner is not None:
            inner = _masked(inner, rank, ranks, ctx.run)
            grad_x = inner @ weight_in[:rank] if wants_x else None
    else:
        inner = None
    if wants_in and inner is not None:
        grad_in = F.pad(inner.t() @ x, (0, 0, 0, rest))
    if wants_out and grad is not None:
        grad_out = F.pad(grad.t() @ h[:, :rank], (0, rest))
    if wants_bias and grad is not None:
        grad_bias = grad.sum(0)
    return grad_x, grad_in, grad_out, grad_bias, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def low_rank_linear_forward(
    x: torch.Tensor,
    weight_in: torch.Tensor,
    weight_out: torch.Tensor,
    bias: torch.Tensor | None,
    rank: int,
    ranks: torch.Tensor | None = None,
    run: int = 1,
) -> torch.Tensor:
    """y = (x V_bᵀ) U_bᵀ + bias with V_b = ``weight_in[:rank]``, U_b = ``weight_out[:, :rank]``.

    Differentiable to any order. Entries of the factors beyond the rank are not read, and get gradients of zero. For the
    backward pass x, the factors and h = x V_bᵀ (in the dtype of x, columns in multiples of 16) are kept.

    Args:
        x: (rows, in), float32, float16 or bfloat16, any strides.
        weight_in, weight_out: (r, in) and (out, r) in the dtype of ``x``, any strides.
        bias: (out,) in the dtype of ``x``, or None.
        rank: b, from 0 to r and at most 256.
        ranks: int32 (⌈rows / run⌉,), or None: row m has the rank ranks[m // run], taken into 0..``rank``. Columns that
            a row does not use, but another one of its tile does, are multiplied by zero and must be finite.
        run: how many neighbouring rows share an entry of ``ranks``.

    Returns:
        (rows, out) in the dtype of ``x``, contiguous; sums are in float32.

    Raises:
        TypeError: another dtype. ValueError: shapes, a rank or devices that do not fit.
    """
    keep = torch.is_grad_enabled() and weight_out.requires_grad
    return _op(x, weight_in, weight_out, bias, rank, ranks, run, keep)[0]


# Production configurations: 1024 channels in and out, the default of each target.

_NOTE = (
    "Ranks that are multiples of 16 and others have code of their own; the larger need of the two is what counts. "
    "Where float32 spills, it is parts of h, whose halves are operands of the second product. Tiles of 16 rows, for "
    "float32 at ranks above 128, are mma.sync on every CUDA target."
)


def _register(label: str, dtype: torch.dtype, rank: int, budget: dict[str, int], *, back: bool = False) -> None:
    """Forward as it trains (h is kept, there is a bias); ``back``: the gradient of x, with ranks of its own per run."""
    low, kind = dtype != torch.float32, "*fp32:16" if dtype == torch.float32 else "*bf16:16"
    signature = dict.fromkeys(("x", "v", "u", "y", "h"), kind) | {"M": "i32", "K": "i32:16", "N": "i32:16"}
    signature |= {"rank": "i32", "run": "i32", "stride_xm": "i32:16"}
    constants: dict[str, Any] = {"stride_xk": 1, "LOW": low}
    constants["PRECISION"] = lambda target: dot_precision(target, low=low)
    if back:
        signature |= {"ranks": "*i32:16", "stride_vk": "i32:16", "stride_ur": "i32:16"}
        constants |= {"bias": None, "stride_vr": 1, "stride_un": 1}
    else:
        signature |= {"bias": kind, "stride_vr": "i32:16", "stride_un": "i32:16"}
        constants |= {"ranks": None, "stride_vk": 1, "stride_ur": 1}
    register_defaults(
        low_rank_linear_kernel,
        f"low_rank_linear[{label}]",
        signature,
        constants,
        lambda target: _candidates(rank, low, target)[0],
        tensor_cores=lambda meta: meta["BM"] >= 64,
        spill_budget=budget,
        note=_NOTE,
    )


_register("bf16,r64", torch.bfloat16, 64, {})
_register("bf16,r128", torch.bfloat16, 128, {})
_register("bf16,r128,back", torch.bfloat16, 128, {}, back=True)
_register("bf16,r256,back", torch.bfloat16, 256, {}, back=True)
_register("fp32,r64", torch.float32, 64, {})
_register("fp32,r128,back", torch.float32, 128, {"sm_80": 224, "sm_90": 104}, back=True)
_register("fp32,r256,back", torch.float32, 256, {"sm_90": 16, "sm_100": 112}, back=True)
