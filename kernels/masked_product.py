"""The product of two sparse matrices at the places of a third, all three with entries on the edges of one graph.

    out[uv, c] = Σ_w a'[uw, c] b'[wv, c]        over the w that are neighbours of u and of v

The edges come as sorted lists (CSR), each edge with its reverse, so that N(u) are rows and columns alike; a' and b' are
a and b, or their transposes, which are read through the list of reverses. With that choice the map is closed under
differentiation: the derivatives of A B masked to the edges are G Bᵀ and Aᵀ G, masked to the edges.

A program takes an edge and a block of channels. It goes through the shorter of the two lists of neighbours, a tile of w
at a time, looks each w up in the longer one by bisection, and adds the channels of those that are in both, in the order
of w: no atomics, and no memory for intermediate matrices or for triangles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _lib
from ._lib import KernelConfig, Target, bucket, cdiv, custom_op, register_config, register_reference

__all__ = ["masked_product", "unsupported"]

# 16-bit numbers and float32 are summed in float32.
_SUMS = {
    torch.float32: tl.float32,
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float64: tl.float64,
    torch.int64: tl.int64,
}


@triton.jit(do_not_specialize=["S"])
def masked_product_kernel(
    a, b, row, col, offsets, reverse, out,
    S, C, stride_as, stride_ac, stride_bs, stride_bc,
    TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr, SUM: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[e] for e = (u, v). A program: one e, BC channels."""
    blocks = tl.cdiv(C, BC)
    # The channels of one edge are neighbours: they read the same lists.
    pid = tl.program_id(0)
    e = pid // blocks
    c = pid % blocks * BC + tl.arange(0, BC)
    inside = c < C
    u, v = tl.load(row + e), tl.load(col + e)
    begin_u, end_u = tl.load(offsets + u), tl.load(offsets + u + 1)
    begin_v, end_v = tl.load(offsets + v), tl.load(offsets + v + 1)
    swap = end_u - begin_u > end_v - begin_v
    short, short_end = tl.where(swap, begin_v, begin_u), tl.where(swap, end_v, end_u)
    long, long_end = tl.where(swap, begin_u, begin_v), tl.where(swap, end_u, end_v)
    acc = tl.zeros((BC,), SUM)
    for first in range(short, short_end, BW):
        i = first + tl.arange(0, BW)
        listed = i < short_end
        w = tl.load(col + i, mask=listed, other=-1)
        # The last place of the longer list that is not beyond w.
        low = tl.full((BW,), 0, tl.int32) + long
        left = long_end - long
        while left > 1:
            half = left // 2
            low = tl.where(tl.load(col + low + half) <= w, low + half, low)
            left -= half
        found = listed & (tl.load(col + low) == w)
        if tl.max(found.to(tl.int32), 0) > 0:
            at_u, at_v = tl.where(swap, low, i), tl.where(swap, i, low)
            # (u, w) and (v, w) are what the lists have: b'[wv] is at the reverse of (v, w) in b, and there in bᵀ.
            if TRANSPOSE_A:
                at_u = tl.load(reverse + at_u, mask=found, other=0)
            if not TRANSPOSE_B:
                at_v = tl.load(reverse + at_v, mask=found, other=0)
            mask = found[:, None] & inside[None, :]
            left_hand = a + at_u.to(tl.int64)[:, None] * stride_as + c[None, :] * stride_ac
            right_hand = b + at_v.to(tl.int64)[:, None] * stride_bs + c[None, :] * stride_bc
            terms = tl.load(left_hand, mask=mask, other=0).to(SUM) * tl.load(right_hand, mask=mask, other=0).to(SUM)
            acc += tl.sum(terms, 0)
    tl.store(out + e.to(tl.int64) * C + c, acc.to(out.dtype.element_ty), mask=inside)


# Launching


def unsupported(dtype: torch.dtype) -> str | None:
    """What of values of this dtype the kernel does not support, in words."""
    return None if dtype in _SUMS else str(dtype).removeprefix("torch.")


def _candidates(channels: int, target: Target) -> list[dict[str, Any]]:
    """Launch configurations, the default first: tiles of neighbours by channels, and warps."""
    shapes: tuple[tuple[int, int, int], ...] = ((32, 1, 1), (64, 1, 2), (16, 1, 1))
    if channels > 1:
        shapes = ((16, 32, 2), (16, 16, 1), (32, 32, 4), (16, 64, 4), (8, 128, 4))
    if target[0] == "interpreter":
        shapes = ((4, min(4, bucket(channels)), 1),)
    widest = max(16, bucket(channels))
    fitting = [s for s in shapes if s[1] <= widest] or list(shapes[:1])
    return [{"BW": bw, "BC": bc, "num_warps": warps, "num_stages": 1} for bw, bc, warps in fitting]


_Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _check(a: torch.Tensor, b: torch.Tensor, lists: _Lists) -> None:
    row = lists[0]
    if a.dtype not in _SUMS:
        raise TypeError(f"a must be float64, float32, float16, bfloat16 or int64, got {a.dtype}")
    if b.dtype != a.dtype:
        raise TypeError(f"b must be {a.dtype}, the dtype of a, got {b.dtype}")
    if a.ndim not in (1, 2) or row.ndim != 1 or a.shape[0] != row.shape[0]:
        raise ValueError(
            f"a must have shape (S,) or (S, C) with row of shape (S,), got {tuple(a.shape)} and {tuple(row.shape)}"
        )
    if b.shape != a.shape:
        raise ValueError(f"b must have the shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
    for name, tensor in zip(("row", "col", "offsets", "reverse"), lists, strict=True):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if name == "offsets":
            if tensor.ndim != 1 or tensor.shape[0] < 1:
                raise ValueError(f"offsets must have shape (nodes + 1,), got {tuple(tensor.shape)}")
        elif tensor.shape != row.shape:
            raise ValueError(f"{name} must have shape {tuple(row.shape)}, got {tuple(tensor.shape)}")
    for name, tensor in zip(("b", "row", "col", "offsets", "reverse"), (b, *lists), strict=True):
        if tensor.device != a.device:
            raise ValueError(f"{name} must be on {a.device}, where a is, got {tensor.device}")


def _launch(
    a: torch.Tensor,
    b: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    offsets: torch.Tensor,
    reverse: torch.Tensor,
    transpose_a: bool,
    transpose_b: bool,
) -> torch.Tensor:
    _check(a, b, (row, col, offsets, reverse))
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    channels = 1 if a.ndim == 1 else a.shape[1]
    strides = [stride for t in (a, b) for stride in (t.stride(0), t.stride(1) if t.ndim == 2 else 1)]
    arguments = {
        "a": a, "b": b, "row": row.contiguous(), "col": col.contiguous(), "offsets": offsets.contiguous(),
        "reverse": reverse.contiguous(), "out": out, "S": row.shape[0], "C": channels,
        **dict(zip(("stride_as", "stride_ac", "stride_bs", "stride_bc"), strides, strict=True)),
        "TRANSPOSE_A": transpose_a, "TRANSPOSE_B": transpose_b, "SUM": _SUMS[a.dtype],
    }  # fmt: skip

    def launch(meta: dict[str, Any]) -> None:
        masked_product_kernel[(row.shape[0] * cdiv(channels, meta["BC"]),)](**arguments, **meta)

    mean_degree = cdiv(row.shape[0], max(1, offsets.shape[0] - 1))
    key = (bucket(channels), bucket(mean_degree), a.dtype, transpose_a, transpose_b)
    candidates = _candidates(channels, _lib.target_of(a.device))
    with _lib.device_guard(a):
        launch(_lib.pick("masked_product", key, candidates, launch, a.device))
    return out


# Plain torch

_CHUNK = 2**18  # pairs of neighbours at a time


def _reference(
    a: torch.Tensor,
    b: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    offsets: torch.Tensor,
    reverse: torch.Tensor,
    transpose_a: bool,
    transpose_b: bool,
) -> torch.Tensor:
    """Each w of each u, looked up among the neighbours of v, some edges at a time."""
    _check(a, b, (row, col, offsets, reverse))
    out = torch.zeros(a.shape, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    nodes = offsets.shape[0] - 1
    keys = row.long() * nodes + col
    degrees = offsets.diff().long().index_select(0, row)
    total = degrees.cumsum(0)
    start = done = 0
    while start < row.shape[0]:
        stop = max(start + 1, int(torch.searchsorted(total, done + _CHUNK, right=True)))
        counts = degrees[start:stop]
        edge = torch.repeat_interleave(counts)
        at_u = (
            torch.arange(edge.shape[0], device=a.device)
            - (counts.cumsum(0) - counts)[edge]
            + offsets[row[start:stop]][edge]
        )
        wanted = col[start:stop].long()[edge] * nodes + col[at_u]
        at_v = torch.searchsorted(keys, wanted).clamp(max=keys.shape[0] - 1)
        found = keys[at_v] == wanted
        at_u, at_v, edge = at_u[found], at_v[found], edge[found] + start
        at_u = reverse[at_u] if transpose_a else at_u
        at_v = at_v if transpose_b else reverse[at_v]
        terms = a[at_u] * b[at_v]
        out.scatter_add_(0, edge if a.ndim == 1 else edge[:, None].expand_as(terms), terms)
        start, done = stop, int(total[stop - 1])
    return out


# Operations

_op = custom_op("masked_product", _launch)
register_reference(_op, _reference)


@_op.register_fake
def _(a, b, row, col, offsets, reverse, transpose_a, transpose_b):
    return a.new_empty(a.shape)


def _setup(ctx, inputs, output) -> None:
    a, b, *lists, ctx.transpose_a, ctx.transpose_b = inputs
    ctx.save_for_backward(a, b, *lists)


def _backward(ctx, grad):
    a, b, *lists = ctx.saved_tensors
    turn_a, turn_b = ctx.transpose_a, ctx.transpose_b
    grad_a = grad_b = None
    # A' B' = out: by A' G B'ᵀ, by B' A'ᵀ G; the transposes of these where A' = Aᵀ or B' = Bᵀ.
    if ctx.needs_input_grad[0]:
        grad_a = _op(b, grad, *lists, turn_b, True) if turn_a else _op(grad, b, *lists, False, not turn_b)
    if ctx.needs_input_grad[1]:
        grad_b = _op(grad, a, *lists, True, turn_a) if turn_b else _op(a, grad, *lists, not turn_a, False)
    return grad_a, grad_b, *[None] * 6


_op.register_autograd(_backward, setup_context=_setup)


def masked_product(
    a: torch.Tensor,
    b: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    offsets: torch.Tensor,
    reverse: torch.Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> torch.Tensor:
    """out[uv, c] = Σ_w a'[uw, c] b'[wv, c], over the w that are neighbours of u and of v.

    Differentiable in a and b to any order. What is kept for the backward pass are the arguments.

    Args:
        a, b: (S,) or (S, C), float64, float32, float16, bfloat16 or int64, any strides: values on the edges.
        row, col: (S,), int32: the edges (u, v), each with its reverse, sorted by u and then by v, none twice.
        offsets: (N + 1,), int32: where the edges of each u begin.
        reverse: (S,), int32: the number of (v, u), for each edge (u, v).
        transpose_a, transpose_b: take a'[uw] = a[wu], b'[wv] = b[vw].

    Returns:
        Like a, contiguous; 16-bit numbers are summed in float32.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit. The lists' entries are not checked.
    """
    return _op(a, b, row, col, offsets, reverse, transpose_a, transpose_b)


# Production configurations: counts, one weight an edge, and 64 channels, forward and backward.


def _register(label: str, dtype: torch.dtype, kind: str, channels: int, transpose_a: bool, transpose_b: bool) -> None:
    wide = channels > 1
    stride = f"i32{':16' if wide else ''}"
    signature = dict.fromkeys(("a", "b", "out"), f"*{kind}:16")
    signature |= dict.fromkeys(("row", "col", "offsets", "reverse"), "*i32:16") | {"S": "i32"}
    signature |= {"C": "i32:16", "stride_as": stride, "stride_bs": stride} if wide else {}
    default = _candidates(channels, ("cuda", "90"))[0]
    options = {name: default[name] for name in ("num_warps", "num_stages")}
    constants: dict[str, Any] = {"stride_ac": 1, "stride_bc": 1, "SUM": _SUMS[dtype], "BW": default["BW"]}
    constants |= {} if wide else {"C": 1, "stride_as": 1, "stride_bs": 1}
    constants |= {"BC": default["BC"], "TRANSPOSE_A": transpose_a, "TRANSPOSE_B": transpose_b}
    register_config(
        KernelConfig(
            kernel=masked_product_kernel,
            name=f"masked_product[{label}]",
            signature=signature,
            constexprs=constants,
            tensor_cores=False,
            **options,
        )
    )


_register("counts", torch.int64, "i64", 1, False, False)
_register("fp32", torch.float32, "fp32", 1, False, False)
_register("fp32,back_a", torch.float32, "fp32", 1, False, True)
_register("fp32,back_b", torch.float32, "fp32", 1, True, False)
_register("fp32,C64", torch.float32, "fp32", 64, False, False)
_register("fp32,C64,back_a", torch.float32, "fp32", 64, False, True)
_register("fp32,C64,back_b", torch.float32, "fp32", 64, True, False)
_register("bf16,C64", torch.bfloat16, "bf16", 64, False, False)
