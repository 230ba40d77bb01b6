"""What the attention kernels share: tiles of rows, where a program works, what Triton makes of their arguments.

In comments and docstrings: R rows, D channels padded to a power of two.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl

from ._lib import bucket

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    x, rows, inside, DIM: tl.constexpr, D: tl.constexpr,
    SHIFT: tl.constexpr = 0, MASKED: tl.constexpr = True, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """[R, D] of rows with unit channel stride, 0 outside; channel c is c + SHIFT within its chunk of three.

    AGAIN: a tile that the program has read before. The modifier, the default's own name, keeps the compiler from
    taking the two reads for one and holding the tile in registers, across loops that leave none.
    """
    c = tl.arange(0, D)
    source = c
    if SHIFT > 0:
        source = c - c % 3 + (c + SHIFT) % 3
    pointers = x + rows[:, None] + source[None, :]
    modifier: tl.constexpr = ".ca" if AGAIN else ""
    if DIM == D:
        if MASKED:
            return tl.load(pointers, mask=inside[:, None], other=0.0, cache_modifier=modifier)
        else:
            return tl.load(pointers, cache_modifier=modifier)
    else:
        if MASKED:
            return tl.load(pointers, mask=inside[:, None] & (c < DIM)[None, :], other=0.0, cache_modifier=modifier)
        else:
            return tl.load(pointers, mask=(c < DIM)[None, :], other=0.0, cache_modifier=modifier)


@triton.jit
def peel(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Cut [lo, hi) into tiles: how many before, wholly within, and after those within [full_lo, full_hi)."""
    left = tl.cdiv(tl.maximum(tl.minimum(full_lo, hi) - lo, 0), BLOCK)
    full = tl.maximum(tl.minimum(full_hi, hi) - lo - left * BLOCK, 0) // BLOCK
    right = tl.cdiv(tl.maximum(hi - lo - (left + full) * BLOCK, 0), BLOCK)
    return left, full, right


@triton.jit
def place(pid, blocks, planes, ORDER: tl.constexpr):
    """(block, plane): neighbours share keys where blocks cost the same (0); else heavy blocks of all planes first."""
    if ORDER == 0:
        block = pid % blocks
        plane = pid // blocks
    else:
        block = pid // planes
        plane = pid % planes
        if ORDER < 0:
            block = blocks - 1 - block
    return block, plane


def unit(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbouring channels: any strides but the last one's are read in place."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(channels: int) -> int:
    """The channels of a tile: a power of two, and as many as a product takes at least."""
    return max(16, bucket(channels))


_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def signature_of(
    arguments: dict[str, Any], sizes: Collection[str], constants: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, Any]]:
    """What Triton makes of a launcher's arguments: types, and constants where there is nothing to pass.

    Args:
        arguments: name -> value, as they are launched with.
        sizes: those that Triton is told not to specialise on.
        constants: those that are constexprs whatever their value.
    """
    signature: dict[str, str] = {}
    fixed: dict[str, Any] = {}
    for name, value in arguments.items():
        if value is None or name in constants:
            fixed[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"{_TYPES[value.dtype]}:16"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name in sizes or value % 16 else "i32:16"
    return signature, fixed
