"""Channel by channel, the product of two stacks of matrices that belong to graphs of different sizes.

    y[g, i, k, c] = n_g^-power Σ_j a[g, i, j, c] b[g, j, k, c]

**Layout** (shared with ``pair_mlp.py``). All pairs of all graphs lie in one tensor (T, C), T = Σ n_g²: pair (i, j) of
graph g is row ``pair_ptr[g] + i n_g + j``, and ``node_ptr[g + 1] - node_ptr[g]`` is n_g. Both pointers have G + 1
entries, int32 or int64, start at 0, and their last entries are Σ n_g and T; they stay on the device, no size is read
back. Rows may be further apart than C numbers: what these kernels return has rows of a multiple of 16 numbers, (T, C)
being a view of them, so that every row is aligned. Pass such views on as they are; ``.contiguous()`` would undo it.

A launch reaches all tiles of all graphs by one number: graph g owns the tile numbers from S(g) up to S(g + 1), S a
bound that follows from the two pointers and leaves room for all its tiles, and a program finds its graph by bisection.
No table is made, no host waits, and batches of any sizes run in one compiled kernel and in a CUDA graph.

Either factor may be transposed, (i, j) read as (j, i), which costs nothing since the channels of a pair are neighbours:
the gradients are g bᵀ and aᵀ g, the same operation, and it can be differentiated to any order. Sums are in float32.
16-bit numbers go to the matrix units with the channels as a batch, which takes a fifth of the instructions; float32 is
multiplied and added as it is: three products on the matrix units would take about as many.

Source: arXiv 2302.11556 (the matrix product of PPGN++ blocks).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from . import _lib
from ._lib import INTERPRET, Target, bucket, cdiv, custom_op, register_defaults, register_reference

__all__ = ["segment_matmul"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ALIGNED = 16  # rows are stored in multiples of so many numbers


# Rows of pairs


@triton.jit
def _graph_of(
    number, node_ptr, pair_ptr, G, steps,
    PER_NODE: tl.constexpr, PER_GRAPH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """S(g) and the last g with S(g) = ⌊(pair_ptr[g] + PER_NODE node_ptr[g] + PER_GRAPH g) / SIZE⌋ <= number >= 0."""
    low = number * 0
    high = low + G
    first = low
    for _ in range(steps):
        middle = (low + high) // 2
        share = tl.load(pair_ptr + middle).to(tl.int64)
        if SIZE > 1:
            share = (share + PER_NODE * tl.load(node_ptr + middle).to(tl.int64) + PER_GRAPH * middle) // SIZE
        below = share <= number
        first = tl.where(below, share, first)
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return first, low


def padded_rows(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised, of this shape, rows a multiple of 16 numbers apart; device and dtype those of ``like``."""
    wide = cdiv(shape[-1], _ALIGNED) * _ALIGNED
    return like.new_empty((*shape[:-1], wide), dtype=dtype)[..., : shape[-1]]


def reach(*tensors: torch.Tensor) -> int:
    """How many numbers of each row may be read: the width, or the next multiple of 16 where all are stored like that.

    A mask at a multiple of 16 leaves loads of aligned rows in one piece.
    """
    width = tensors[0].shape[1]
    wide = cdiv(width, _ALIGNED) * _ALIGNED
    for t in tensors:
        last = t.storage_offset() + (t.shape[0] - 1) * t.stride(0) + wide
        if t.stride(1) != 1 or t.stride(0) < wide or last * t.element_size() > t.untyped_storage().nbytes():
            return width
    return wide


def check_pointers(rows: torch.Tensor, node_ptr: torch.Tensor, pair_ptr: torch.Tensor) -> None:
    """What can be said of the pointers without reading them."""
    for name, ptr in (("node_ptr", node_ptr), ("pair_ptr", pair_ptr)):
        if ptr.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {ptr.dtype}")
        if ptr.ndim != 1 or ptr.shape[0] < 1 or ptr.shape != node_ptr.shape:
            raise ValueError(
                f"{name} must have shape (graphs + 1,), node_ptr and pair_ptr alike, got {tuple(ptr.shape)}"
            )
        if ptr.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device}, where the pairs are, got {ptr.device}")
    if node_ptr.shape[0] == 1 and rows.shape[0] > 0:
        raise ValueError(f"pair_ptr must have an entry for each graph and one more, got 1 entry for {len(rows)} pairs")


def pointers(node_ptr: torch.Tensor, pair_ptr: torch.Tensor) -> dict[str, Any]:
    """The arguments that find a row's graph."""
    graphs = node_ptr.shape[0] - 1
    return {
        "node_ptr": node_ptr.contiguous(), "pair_ptr": pair_ptr.contiguous(),
        "G": graphs, "steps": graphs.bit_length(),
    }  # fmt: skip


# Kernel


@triton.jit
def _add_products(
    acc, a, b, i, k, c, n, reach, stride_am, stride_ac, stride_bm, stride_bc,
    TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr,
):  # fmt: skip
    """acc[i, k, c] + Σ_j a[i, j, c] b[j, k, c], one j after the other."""
    inside = (c < reach)[None, :]
    for j in range(n):
        row_a = j * n + i if TRANSPOSE_A else i * n + j
        row_b = k * n + j if TRANSPOSE_B else j * n + k
        column = tl.load(a + (row_a * stride_am)[:, None] + (c * stride_ac)[None, :], (i < n)[:, None] & inside, 0.0)
        row = tl.load(b + (row_b * stride_bm)[:, None] + (c * stride_bc)[None, :], (k < n)[:, None] & inside, 0.0)
        acc += column.to(tl.float32)[:, None, :] * row.to(tl.float32)[None, :, :]
    return acc


@triton.jit
def _add_dots(
    acc, a, b, i, k, c, n, reach, stride_am, stride_ac, stride_bm, stride_bc,
    TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr, LOW: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """acc[c, i, k] + Σ_j a[i, j, c] b[j, k, c], BJ at a time."""
    inside = (c < reach)[None, None, :]
    for first in range(0, n, BJ):
        j = first + tl.arange(0, BJ).to(tl.int64)
        row_a = j[None, :] * n + i[:, None] if TRANSPOSE_A else i[:, None] * n + j[None, :]
        row_b = k[None, :] * n + j[:, None] if TRANSPOSE_B else j[:, None] * n + k[None, :]
        mask_a = ((i < n)[:, None] & (j < n)[None, :])[:, :, None] & inside
        mask_b = ((j < n)[:, None] & (k < n)[None, :])[:, :, None] & inside
        left = tl.load(a + (row_a * stride_am)[:, :, None] + (c * stride_ac)[None, None, :], mask_a, 0.0)
        right = tl.load(b + (row_b * stride_bm)[:, :, None] + (c * stride_bc)[None, None, :], mask_b, 0.0)
        left, right = tl.permute(left, 2, 0, 1), tl.permute(right, 2, 0, 1)
        if LOW:
            acc = tl.dot(left, right, acc)
        else:
            acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["G", "steps", "power"])
def segment_matmul_kernel(
    a, b, y, node_ptr, pair_ptr,
    G, steps, power, reach, width, stride_am, stride_ac, stride_bm, stride_bc,
    TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr, LOW: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BI × BK pairs of one graph, BC channels; BJ = 0: without matrix units. Rows of y have ``width`` numbers."""
    blocks = tl.cdiv(width, BC)
    # The channels of one tile are neighbours: they share what is read around their ends.
    pid = tl.program_id(0).to(tl.int64)
    number = pid // blocks
    first, g = _graph_of(number, node_ptr, pair_ptr, G, steps, BI + BK - 2, (BI - 1) * (BK - 1), BI * BK)
    n = tl.load(node_ptr + g + 1).to(tl.int64) - tl.load(node_ptr + g).to(tl.int64)
    tile = number - first
    across = tl.cdiv(n, BK)
    if tile < tl.cdiv(n, BI) * across:
        start = tl.load(pair_ptr + g).to(tl.int64)
        i = tile // across * BI + tl.arange(0, BI)
        k = tile % across * BK + tl.arange(0, BK)
        c = pid % blocks * BC + tl.arange(0, BC)
        a += start * stride_am
        b += start * stride_bm
        if BJ > 0:
            acc = _add_dots(
                tl.zeros((BC, BI, BK), tl.float32), a, b, i, k, c, n, reach,
                stride_am, stride_ac, stride_bm, stride_bc, TRANSPOSE_A, TRANSPOSE_B, LOW, BJ,
            )  # fmt: skip
            acc = tl.permute(acc, 1, 2, 0)
        else:
            acc = _add_products(
                tl.zeros((BI, BK, BC), tl.float32), a, b, i, k, c, n, reach,
                stride_am, stride_ac, stride_bm, stride_bc, TRANSPOSE_A, TRANSPOSE_B,
            )  # fmt: skip
        acc *= tl.exp2(-power * tl.log2(n.to(tl.float32)))
        rows = start + i[:, None] * n + k[None, :]
        mask = ((i < n)[:, None] & (k < n)[None, :])[:, :, None] & (c < width)[None, None, :]
        pointers = y + (rows * width)[:, :, None] + c[None, None, :]
        tl.store(pointers, acc.to(y.dtype.element_ty), mask=mask)


# Launching

# (BI, BK, BJ, BC, warps, stages) by the root of the mean number of pairs, up to 8, up to 40 and beyond, the default
# first.
_Shape = tuple[int, int, int, int, int, int]
_TINY: tuple[_Shape, ...] = ((8, 8, 0, 64, 4, 2), (8, 8, 0, 32, 4, 2), (8, 8, 0, 32, 2, 2))
_LOW: tuple[tuple[_Shape, ...], ...] = (
    (*_TINY, (16, 16, 16, 32, 4, 2)),
    ((16, 16, 16, 32, 4, 2), (16, 16, 16, 16, 4, 2), (16, 16, 16, 32, 8, 2), (16, 16, 0, 32, 4, 2)),
    ((32, 32, 16, 16, 8, 2), (32, 16, 16, 16, 4, 2), (16, 16, 16, 32, 4, 3)),
)
_FLOAT32: tuple[tuple[_Shape, ...], ...] = (
    _TINY,
    ((16, 16, 0, 32, 4, 2), (16, 16, 0, 32, 8, 2), (8, 8, 0, 64, 4, 2)),
    ((32, 32, 0, 16, 8, 2), (16, 16, 0, 32, 4, 2), (16, 32, 0, 32, 8, 2)),
)
_INTERPRETED: tuple[tuple[_Shape, ...], ...] = (((4, 8, 0, 16, 4, 1),), ((16, 16, 16, 16, 4, 1),))


def _candidates(rows: int, graphs: int, low: bool, target: Target) -> list[dict[str, Any]]:
    """Launch configurations for graphs of a mean size, the default first."""
    interpreted = target[0] == "interpreter"
    table = _INTERPRETED if interpreted else _LOW if low else _FLOAT32
    size = (rows > 64 * graphs) + (rows > 1600 * graphs)
    names = ("BI", "BK", "BJ", "BC", "num_warps", "num_stages")
    return [dict(zip(names, shape, strict=True)) for shape in table[min(size, len(table) - 1)]]


def _tiles(rows: int, graphs: int, meta: dict[str, Any]) -> int:
    """A bound on the last tile number: Σ n_g, which the host does not know, is at most √(graphs Σ n_g²)."""
    nodes = math.isqrt(rows * graphs)
    bi, bk = meta["BI"], meta["BK"]
    return (rows + (bi + bk - 2) * nodes + (bi - 1) * (bk - 1) * graphs) // (bi * bk)


def _check(a: torch.Tensor, b: torch.Tensor, node_ptr: torch.Tensor, pair_ptr: torch.Tensor) -> None:
    if a.dtype not in DTYPES:
        raise TypeError(f"a must be float32, float16 or bfloat16, got {a.dtype}")
    if b.dtype != a.dtype:
        raise TypeError(f"b must be {a.dtype}, the dtype of a, got {b.dtype}")
    if a.ndim != 2:
        raise ValueError(f"a must have shape (pairs, channels), got {tuple(a.shape)}")
    if b.shape != a.shape:
        raise ValueError(f"b must have shape {tuple(a.shape)}, that of a, got {tuple(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"b must be on {a.device}, where a is, got {b.device}")
    check_pointers(a, node_ptr, pair_ptr)


def _launch(
    a: torch.Tensor,
    b: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    transpose_a: bool,
    transpose_b: bool,
    power: float,
    candidates: list[dict[str, Any]] | None = None,
) -> torch.Tensor:
    """``candidates`` overrides the launch configurations."""
    _check(a, b, node_ptr, pair_ptr)
    (rows, channels), graphs = a.shape, node_ptr.shape[0] - 1
    y = padded_rows(a, rows, channels)
    if y.numel() == 0:
        return y
    low = a.dtype != torch.float32
    if candidates is None:
        candidates = _candidates(rows, graphs, low, _lib.target_of(a.device))
    width = y.stride(0)
    arguments = {
        "a": a, "b": b, "y": y, **pointers(node_ptr, pair_ptr), "power": power, "reach": reach(a, b), "width": width,
        "stride_am": a.stride(0), "stride_ac": a.stride(1), "stride_bm": b.stride(0), "stride_bc": b.stride(1),
        "TRANSPOSE_A": transpose_a, "TRANSPOSE_B": transpose_b, "LOW": low and not INTERPRET,
    }  # fmt: skip

    def launch(meta: dict[str, Any]) -> None:
        segment_matmul_kernel[(_tiles(rows, graphs, meta) * cdiv(width, meta["BC"]),)](**arguments, **meta)

    unit = a.stride(1) == 1, b.stride(1) == 1
    key = (bucket(cdiv(rows, graphs)), bucket(channels), a.dtype, transpose_a, transpose_b, unit)
    with _lib.device_guard(a):
        launch(_lib.pick("segment_matmul", key, candidates, launch, a.device))
    return y


# Plain torch


def _reference(
    a: torch.Tensor,
    b: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    transpose_a: bool,
    transpose_b: bool,
    power: float,
) -> torch.Tensor:
    """Graph by graph."""
    _check(a, b, node_ptr, pair_ptr)
    y = padded_rows(a, *a.shape)
    for n, start in zip(node_ptr.diff().tolist(), pair_ptr.tolist(), strict=False):
        left, right = (t[start : start + n * n].float().view(n, n, a.shape[1]).permute(2, 0, 1) for t in (a, b))
        product = (left.mT if transpose_a else left) @ (right.mT if transpose_b else right)
        y[start : start + n * n] = (product * max(n, 1) ** -power).permute(1, 2, 0).reshape(n * n, a.shape[1])
    return y


# Operation


def _matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    transpose_a: bool,
    transpose_b: bool,
    power: float,
) -> torch.Tensor:
    return _launch(a, b, node_ptr, pair_ptr, transpose_a, transpose_b, power)


_op = custom_op("segment_matmul", _matmul)
register_reference(_op, _reference)


@_op.register_fake
def _(a, b, node_ptr, pair_ptr, transpose_a, transpose_b, power):
    return padded_rows(a, *a.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.transpose_a, ctx.transpose_b, ctx.power = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    a, b, *ptr = ctx.saved_tensors
    turned_a, turned_b = ctx.transpose_a, ctx.transpose_b
    grad_a = grad_b = None
    # The gradient by a transposed factor is the other's, transposed: (g bᵀ)ᵀ = b gᵀ.
    if ctx.needs_input_grad[0]:
        factors = (b, grad, *ptr, turned_b, True) if turned_a else (grad, b, *ptr, False, not turned_b)
        grad_a = _op(*factors, ctx.power)
    if ctx.needs_input_grad[1]:
        factors = (grad, a, *ptr, True, turned_a) if turned_b else (a, grad, *ptr, not turned_a, False)
        grad_b = _op(*factors, ctx.power)
    return grad_a, grad_b, *[None] * 5


_op.register_autograd(_backward, setup_context=_setup)


def segment_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    node_ptr: torch.Tensor,
    pair_ptr: torch.Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    power: float = 0.0,
) -> torch.Tensor:
    """y[g, i, k, c] = n_g^-power Σ_j a[g, i, j, c] b[g, j, k, c] over packed pairs.

    Differentiable in a and b to any order. What is kept for the backward pass are the arguments.

    Args:
        a, b: (T, C), float32, float16 or bfloat16, of one dtype, any strides.
        node_ptr, pair_ptr: (G + 1,), int32 or int64.
        transpose_a, transpose_b: read a[g, j, i, c] for a[g, i, j, c], b[g, k, j, c] for b[g, j, k, c].
        power: 0 sums, 1 divides by the size of the graph, 0.5 by its root.

    Returns:
        (T, C) in the dtype of ``a``, rows of a multiple of 16 numbers.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices that do not fit. The entries of the pointers are not
            checked.
    """
    return _op(a, b, node_ptr, pair_ptr, transpose_a, transpose_b, power)


# Production configurations: 95 channels in rows of 96, the default of each target.

_NOTE = (
    "Products with a batch of channels are mma.sync on every CUDA target; float32, and graphs of up to 8 nodes, go "
    "without matrix units. What spills for large graphs is addresses, outside the loop."
)


def _register(label: str, size: int, dtype: torch.dtype, turned: tuple[bool, bool] = (False, False)) -> None:
    low, kind = dtype != torch.float32, "*fp32:16" if dtype == torch.float32 else "*bf16:16"
    signature = dict.fromkeys(("a", "b", "y"), kind) | dict.fromkeys(("node_ptr", "pair_ptr"), "*i64:16")
    signature |= dict.fromkeys(("G", "steps"), "i32") | {"power": "fp32"}
    signature |= dict.fromkeys(("reach", "width", "stride_am", "stride_bm"), "i32:16")
    constants = {"stride_ac": 1, "stride_bc": 1, "TRANSPOSE_A": turned[0], "TRANSPOSE_B": turned[1], "LOW": low}
    register_defaults(
        segment_matmul_kernel,
        f"segment_matmul[{label}]",
        signature,
        constants,
        lambda target: _candidates(size * size, 1, low, target)[0],
        tensor_cores=False,
        spill_budget={"sm_80": 16, "sm_90": 16} if low and size > 40 else None,
        note=_NOTE,
    )


for _name, _dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
    _register(f"{_name},n8", 8, _dtype)
    _register(f"{_name},n32", 32, _dtype)
    _register(f"{_name},n32,back_a", 32, _dtype, (False, True))
    _register(f"{_name},n32,back_b", 32, _dtype, (True, False))
    _register(f"{_name},n128", 128, _dtype)
