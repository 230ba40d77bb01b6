"""From a dense kernel to the factors of a format.

``seq`` is decomposed optimally in two dimensions (a truncated SVD, whose error is the tail of the singular values) and
by successive SVDs in three; ``kernelwise`` and ``depthwise`` likewise, kernel by kernel and channel by channel; ``cp``
by alternating least squares from several starts, as it has no closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..factorized import balanced_svd

__all__ = ["cp_als", "kernelwise_factors", "unit_terms"]


def kernelwise_factors(weight: Tensor, rank: int) -> list[Tensor]:
    """Factors (O, C, R, k_axis) of each kernel of ``weight`` (O, C, ``*kernel``) by nested SVDs, largest first."""
    kernel = weight.shape[2:]
    if len(kernel) == 1:
        return [weight.unsqueeze(2)]
    u, rest = balanced_svd(weight.flatten(3), min(kernel[0], math.prod(kernel[1:])))
    factors = [u.transpose(2, 3)]  # (O, C, q, k0)
    if len(kernel) == 2:
        factors.append(rest)
    else:
        inner = rest.unflatten(-1, kernel[1:])  # (O, C, q, k1, k2)
        a, b = balanced_svd(inner, min(kernel[1:]))  # (O, C, q, k1, s), (O, C, q, s, k2)
        terms = a.shape[-1]
        factors = [
            factors[0].repeat_interleave(terms, dim=2),
            a.transpose(3, 4).flatten(2, 3),
            b.flatten(2, 3),
        ]
    size = torch.stack([f.norm(dim=-1) for f in factors]).prod(0)
    keep = size.argsort(dim=-1, descending=True, stable=True)[..., :rank]
    return [f.gather(2, keep.unsqueeze(-1).expand(*keep.shape, f.shape[-1])).contiguous() for f in factors]


def unit_terms(tensor: Tensor) -> list[Tensor]:
    """An exact sum of outer products with one term for each entry of all modes but the longest: factors (size, R)."""
    longest = max(range(tensor.ndim), key=lambda d: tensor.shape[d])
    others = [d for d in range(tensor.ndim) if d != longest]
    grid = torch.cartesian_prod(*(torch.arange(tensor.shape[d]) for d in others)).reshape(-1, len(others))
    factors: list[Tensor] = [tensor] * tensor.ndim
    for column, d in enumerate(others):
        eye = torch.eye(tensor.shape[d], dtype=tensor.dtype, device=tensor.device)
        factors[d] = eye[:, grid[:, column].to(tensor.device)]
    factors[longest] = tensor.movedim(longest, 0).reshape(tensor.shape[longest], -1)
    return factors


def cp_als(tensor: Tensor, rank: int, *, restarts: int = 3, iterations: int = 300, seed: int = 0) -> list[Tensor]:
    """A sum of ``rank`` outer products close to ``tensor``: factors (size, rank), one a mode, of equal norms per term.

    Alternating least squares from ``restarts`` starts (the first from the singular vectors of each unfolding), in
    float64, with a slight ridge while terms cancel one another; the best of all is returned. There is no guarantee of
    optimality: the best approximation may not exist.

    Source: Kolda and Bader, SIAM Review 51 (2009), section 3.4.
    """
    t = tensor.double()
    norm = t.norm().clamp_min(torch.finfo(torch.float64).tiny)
    generator = torch.Generator().manual_seed(seed)
    unfolded = [t.movedim(d, 0).flatten(1) for d in range(t.ndim)]
    best: list[Tensor] = []
    best_error = math.inf
    for start in range(restarts):
        factors = [_start(m, rank, generator, singular=start == 0) for m in unfolded]
        previous = math.inf
        for step in range(iterations):
            for d in range(t.ndim):
                others = [factors[e] for e in range(t.ndim) if e != d]
                gram = torch.stack([f.mT @ f for f in others]).prod(0)
                ridge = 1e-12 * gram.diagonal().mean().clamp_min(1e-300)
                gram = gram + ridge * torch.eye(rank, dtype=gram.dtype, device=gram.device)
                factors[d] = torch.linalg.solve(gram, (unfolded[d] @ _khatri_rao(others)).mT).mT
                if d < t.ndim - 1:
                    size = factors[d].norm(dim=0).clamp_min(1e-300)
                    factors[d] = factors[d] / size
            if step % 5 == 4:
                error = float((unfolded[-1] - factors[-1] @ _khatri_rao(factors[:-1]).mT).norm() / norm)
                if error < 1e-12 or previous - error < 1e-8 * previous:
                    break
                previous = error
        error = float((unfolded[-1] - factors[-1] @ _khatri_rao(factors[:-1]).mT).norm() / norm)
        if error < best_error:
            best, best_error = list(factors), error
        if best_error < 1e-10:
            break
    sizes = torch.stack([f.norm(dim=0).clamp_min(1e-300) for f in best])
    level = sizes.log().mean(0).exp()
    return [(f / s * level).to(tensor.dtype) for f, s in zip(best, sizes, strict=True)]


def _start(matrix: Tensor, rank: int, generator: torch.Generator, *, singular: bool) -> Tensor:
    drawn = torch.randn(matrix.shape[0], rank, dtype=torch.float64, generator=generator).to(matrix.device)
    if singular:
        u = torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
        drawn[:, : u.shape[1]] = u
    return drawn / drawn.norm(dim=0)


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Columnwise Kronecker product, the last factor's index fastest: (prod of sizes, rank)."""
    total = factors[0]
    for factor in factors[1:]:
        total = (total.unsqueeze(1) * factor.unsqueeze(0)).flatten(0, 1)
    return total
