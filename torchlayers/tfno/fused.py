"""The spectral path through the Triton kernels: transforms and mixing of planes (2, K, B, C), K = k1 ... kd modes.

Real fields in any number of dimensions. A kernel transforms the last two axes (or the only one), where the whole field
is read or written. An axis before them meets k_{d-1} k_d of N_{d-1} N_d entries, for 16 modes on 128^3 two in a hundred
of the field: one real matrix product of torch's an axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._backend import import_kernels
from .._tables import table
from . import weights
from .weights import SpectralWeight, choose_implementation, complex_einsum, complex_matmul

__all__ = ["DTYPES", "forward", "inverse", "mix", "operation"]

_tdft = import_kernels("tdft")
_mixing = import_kernels("spectral_mix")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operation(n_dim: int) -> str:
    """The name of the kernel that transforms fields of ``n_dim`` axes."""
    return f"tdft{min(n_dim, 2)}_forward"


def _basis(size: int, k: int, one_sided: int, inverse: int, device: torch.device) -> Tensor:
    return table("spectral_planes", size, k, one_sided, inverse, dtype=torch.float32, device=device)


def forward(x: Tensor, modes: tuple[int, ...], precision: str | None = None) -> Tensor:
    """The kept frequencies of the real ``x`` (B, C, N1, ..., Nd), norm "forward", as (2, K, B, C) in float32."""
    assert _tdft is not None
    batch, grid = x.shape[:2], x.shape[2:]
    last = _basis(grid[-1], modes[-1], 1, 0, x.device).transpose(1, 2)
    if len(grid) == 1:
        return _tdft.tdft1_forward(x, last, precision)
    first = _basis(grid[-2], modes[-2], 0, 0, x.device)
    y = _tdft.tdft2_forward(x.flatten(1, -3), first, last, precision)
    for axis in range(len(grid) - 3, -1, -1):
        n, k = grid[axis], modes[axis]
        blocks = table("spectral_blocks", n, k, dtype=torch.float32, device=x.device).view(2, k, n, 2)
        y = y.view(2, math.prod(modes[axis + 1 :]), math.prod((*batch, *grid[:axis])), n)
        y = torch.einsum("qknp,pfbn->qkfb", blocks, y).contiguous()
    return y.view(2, math.prod(modes), *batch)


def inverse(
    y: Tensor,
    modes: tuple[int, ...],
    size: tuple[int, ...],
    dtype: torch.dtype,
    precision: str | None = None,
    skip: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """act(field + skip) in ``dtype``, (B, C, M1, ..., Md), of the field whose kept frequencies are ``y``."""
    assert _tdft is not None
    batch = tuple(y.shape[2:])
    last = _basis(size[-1], modes[-1], 1, 1, y.device).transpose(1, 2)
    if len(size) == 1:
        return _tdft.tdft1_inverse(y, last, dtype, precision, False, skip, activation)
    first = _basis(size[-2], modes[-2], 0, 1, y.device)
    for axis in range(len(size) - 2):
        n, k = size[axis], modes[axis]
        blocks = table("spectral_blocks_inverse", n, k, dtype=torch.float32, device=y.device).view(n, 2, 2, k)
        y = y.reshape(2, k, math.prod(modes[axis + 1 :]), math.prod((*batch, *size[:axis])))
        y = torch.einsum("nqpk,pkfb->qfbn", blocks, y)
    y = y.reshape(2, *modes[-2:], batch[0], math.prod((*batch[1:], *size[:-2])))
    skip = None if skip is None else skip.flatten(1, -3)
    return _tdft.tdft2_inverse(y, first, last, dtype, precision, False, skip, activation).view(*batch, *size)


def mix(x: Tensor, w: SpectralWeight, *, separable: bool, implementation: str) -> Tensor:
    """Mix (2, K, B, Ci) by the cropped weight; gives (2, K, B, Co) in the dtype of ``x``.

    Dense weights, and Tucker and CP ones as factors, have kernels. What is left is torch's: products with the channel
    factors (one matrix for all modes), tensor trains, separable weights (elementwise), and W multiplied out, which is
    laid out as a batched product wants it.
    """
    assert _mixing is not None
    if not separable:
        if implementation == "auto":
            batch = weights.NOMINAL_BATCH if torch.compiler.is_compiling() else x.shape[2]
            implementation = choose_implementation(w, batch, tiled=w.kind in ("cp", "tucker"))
        if w.kind == "dense":
            s = w.parts[0]
            return _mixing.spectral_mix(x, s.reshape(*s.shape[:2], -1, *s.shape[-2:]))
        if implementation == "factorized" and w.kind == "cp":
            u, v, *outer, d = w.factors
            a = w.parts[0][None]
            for factor in outer:
                a = complex_einsum("mr,xr->mxr", a, factor).flatten(0, 1)
            return _mixing.spectral_mix_cp(x, u, a, d, v)
        if implementation == "factorized" and w.kind == "tucker":
            u, v, *outer, d = w.factors
            h = w.parts[0]
            for axis, factor in enumerate(outer, 2):
                h = complex_einsum("r...,xr->...x", h.movedim(axis, 0), factor).movedim(-2, axis)
            h = h.reshape(*h.shape[:2], -1, *h.shape[-2:])
            y = _mixing.spectral_mix_tucker(_channels(x, u), h, d)
            return _channels(y, v.transpose(0, 1))
    y = weights.mix(x.transpose(0, 1), w.to(x.dtype), separable=separable, implementation=implementation)
    return y.transpose(0, 1)


def _channels(x: Tensor, factor: Tensor) -> Tensor:
    """(2, K, B, C) by the complex matrix (C, r, 2), the same for all modes."""
    y = complex_matmul(x.flatten(1, 2), factor.movedim(-1, 0).to(x.dtype))
    return y.view(*x.shape[:3], factor.shape[1])
