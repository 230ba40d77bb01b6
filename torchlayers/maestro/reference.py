"""The definitions in plain torch: prefixes of a factorised map, and the factorisations they start from.

A low-rank map is W = U V with V ``weight_in`` (r, in) and U ``weight_out`` (out, r); its submodel of rank b keeps the
first b of the r terms (arXiv 2308.14929, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..factorized import balanced_svd

__all__ = ["balanced_factors", "importance", "low_rank_conv", "low_rank_embedding", "low_rank_linear"]

_CONV = (F.conv1d, F.conv2d, F.conv3d)

# Matrices of more entries are decomposed in float32.
DOUBLE_LIMIT = 4096**2


def _keep(h: Tensor, ranks: Tensor, dim: int) -> Tensor:
    """``h`` with zeros from entry ``ranks[i]`` on, along ``dim``; ``ranks`` counts along the first dimensions of h."""
    live = torch.arange(h.shape[dim], device=h.device) < ranks.reshape(
        *ranks.shape, *(1,) * (h.ndim - ranks.ndim - 1), 1
    )
    return torch.where(live.movedim(-1, dim), h, torch.zeros((), dtype=h.dtype, device=h.device))


def low_rank_linear(
    x: Tensor, weight_in: Tensor, weight_out: Tensor, bias: Tensor | None = None, rank: int | Tensor | None = None
) -> Tensor:
    """y = (x V_bᵀ) U_bᵀ + bias with V_b = ``weight_in[:b]``, U_b = ``weight_out[:, :b]``.

    Args:
        x: (..., in).
        weight_in, weight_out, bias: (r, in), (out, r), (out,) or None.
        rank: b, from 0 to r; None is r. A tensor of ints (n1, ..., nk) has one for each entry of the first k dimensions
            of ``x``, k < x.ndim.
    """
    if isinstance(rank, Tensor):
        return F.linear(_keep(F.linear(x, weight_in), rank, -1), weight_out, bias)
    return F.linear(F.linear(x, weight_in[:rank]), weight_out[:, :rank], bias)


def low_rank_conv(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias: Tensor | None,
    rank: int | Tensor | None,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """A convolution c_in → g b with the kernel's extent, then a pointwise one g b → c_out, both of g groups.

    Args:
        x: (N, c_in, *grid).
        weight_in: (r, c_in · Π kernel_size): row j holds the j-th filter of every group, one group after another.
        weight_out: (c_out, r).
        bias: (c_out,) or None.
        rank: b, from 0 to r, for all groups; None is r; a tensor of ints (N,) has one for each sample.
        kernel_size, stride, padding, dilation: one int a grid axis.
        groups: g.
    """
    b = weight_in.shape[0] if rank is None or isinstance(rank, Tensor) else rank
    if b == 0:
        grid = conv_grid(tuple(x.shape[2:]), kernel_size, stride, padding, dilation)
        # The sums over nothing keep x and both factors in the graph, with gradients of zero.
        zero = x[:0].sum() + weight_in[:0].sum() + weight_out[:, :0].sum()
        y = zero if bias is None else bias.reshape(-1, *(1,) * len(grid)) + zero
        return y.expand(x.shape[0], weight_out.shape[0], *grid).contiguous()
    conv = _CONV[len(kernel_size) - 1]
    h = conv(x, conv_filters(weight_in[:b], kernel_size, groups), None, stride, padding, dilation, groups)
    if isinstance(rank, Tensor):
        h = _keep(h.unflatten(1, (groups, b)), rank, 2).flatten(1, 2)
    pointwise = weight_out[:, :b].reshape(-1, b, *(1,) * len(kernel_size))
    return conv(h, pointwise, bias, groups=groups)


def conv_filters(weight_in: Tensor, kernel_size: tuple[int, ...], groups: int) -> Tensor:
    """``weight_in`` (b, c_in · Π kernel_size) as the filters (g b, c_in / g, *kernel_size) of a grouped convolution."""
    filters = weight_in.reshape(weight_in.shape[0], groups, -1, *kernel_size)
    return filters.transpose(0, 1).flatten(0, 1)


def conv_grid(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """The grid that a convolution gives: floor((n + 2 p - d (k - 1) - 1) / s) + 1 along each axis."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(grid, kernel_size, stride, padding, dilation, strict=True)
    )


def low_rank_embedding(
    index: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    rank: int | Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """y = V_b[:, index]ᵀ U_bᵀ: rows of the table (U Vᵀ)ᵀ.

    Args:
        index: ints (...).
        weight_in, weight_out: (r, entries), (channels, r).
        rank: as for :func:`low_rank_linear`, along the dimensions of ``index``.
        padding_idx: the entry whose column of ``weight_in`` gets no gradient.

    Returns:
        (..., channels).
    """
    if isinstance(rank, Tensor):
        h = F.embedding(index, weight_in.t(), padding_idx)
        return F.linear(_keep(h, rank, -1), weight_out)
    return F.linear(F.embedding(index, weight_in[:rank].t(), padding_idx), weight_out[:, :rank])


def tails(squares: Tensor) -> Tensor:
    """√Σ_{j≥b} s_j for every b: the norms of the nested groups of columns b, b+1, ..., from squared column norms."""
    return squares.flip(0).cumsum(0).flip(0).sqrt()


def importance(weight_in: Tensor, weight_out: Tensor, hierarchical: bool = True) -> Tensor:
    """What each of the r terms is worth: ‖U[:, b:]‖ ‖V[b:]‖, (r,), float64.

    ``hierarchical=False`` takes the terms one by one, ‖u_b‖ ‖v_b‖. The first form never increases in b.
    """
    square_in, square_out = weight_in.double().square().sum(1), weight_out.double().square().sum(0)
    if hierarchical:
        return tails(square_in) * tails(square_out)
    return (square_in * square_out).sqrt()


def balanced_factors(weight: Tensor, max_rank: int | None = None, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors (V, U), (r, in) and (out, r), of a matrix (out, in), with U V = ``weight`` at the rank min(out, in).

    Both factors of a term have the same norm. Without ``gram`` they come from the singular value decomposition P S Qᵀ,
    as P √S and √S Qᵀ, whose prefixes are the best approximations of the weight. With the Gram matrix C = E[x xᵀ] of the
    inputs, prefix b is P_b P_bᵀ W, P the left singular vectors of W C^½: the best approximation of the *outputs* on
    such inputs (reduced-rank regression). Directions that the inputs never take are ordered as without ``gram``.

    Args:
        weight: (out, in), real.
        max_rank: how many terms to keep, min(out, in) by default.
        gram: (in, in), symmetric positive semi-definite up to a factor, or its diagonal (in,).

    Returns:
        The factors in float64, or float32 where the weight has more than 4096² entries.
    """
    dtype = torch.float64 if weight.numel() <= DOUBLE_LIMIT else torch.float32
    if gram is None:
        left, right = balanced_svd(weight.detach().to(dtype), max_rank)
        return right, left
    u, s, vh = torch.linalg.svd(weight.detach().to(dtype), full_matrices=False)
    right = s[:, None] * vh
    # Within the span of u the rotation q is square, so that u q qᵀ right is the weight itself, whatever C's rank.
    gram = gram.detach().to(dtype)
    if gram.ndim == 1:
        values, whitened = gram, right
    else:
        values, vectors = torch.linalg.eigh((gram + gram.t()) / 2)
        whitened = right @ vectors
    values = values.clamp(min=0)
    ridge = torch.finfo(dtype).eps ** 0.75 * values.mean()
    q = torch.linalg.svd(whitened * (values + ridge).sqrt(), full_matrices=False)[0]
    left, right = (u @ q)[:, :max_rank], (q.t() @ right)[:max_rank]
    norms = right.norm(dim=1)
    root = torch.where(norms > 0, norms, torch.ones_like(norms)).sqrt()[:, None]
    return right / root, left * root.t()
