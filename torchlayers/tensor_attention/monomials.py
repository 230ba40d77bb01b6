"""All products of up to a degree of the channels of queries and keys, and the tables that belong to them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from .._tables import register_table


def product_of(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.mul, tensors)


def monomials_of(x: Tensor, degree: int) -> Tensor:
    """All monomials of up to ``degree`` in the d entries of each column: (..., d, n) to (..., C(d + degree, d), n).

    Ordered by degree, and within a degree by the first variable: the monomials of degree t with first variable c are
    x_c times those of degree t - 1 in the variables from c on, which stand together at that block's end. Slices, not
    gathers: their gradient is deterministic.
    """
    d = x.shape[-2]
    block = torch.ones_like(x[..., :1, :])
    blocks = [block]
    for t in range(1, degree + 1):
        size = block.shape[-2]
        block = torch.cat(
            [x[..., c : c + 1, :] * block[..., size - math.comb(d - c + t - 2, t - 1) :, :] for c in range(d)], -2
        )
        blocks.append(block)
    return torch.cat(blocks, -2)


def _exponents(d: int, degree: int) -> list[tuple[int, ...]]:
    """The multi-indices in the order of :func:`monomials_of`, each as the sorted tuple of its variables."""
    block: list[tuple[int, ...]] = [()]
    found = list(block)
    for _ in range(degree):
        block = [(c, *rest) for c in range(d) for rest in block if not rest or rest[0] >= c]
        found += block
    return found


@register_table("tensor_attention_monomials", shape=lambda d, degree: (3, math.comb(d + degree, degree)))
def _monomial_table(d: int, degree: int) -> Tensor:
    """For each monomial α: 1/α!, |α|!/α! and |α|."""
    rows = []
    for variables in _exponents(d, degree):
        factorial = math.prod(math.factorial(variables.count(c)) for c in set(variables))
        rows.append((1 / factorial, math.factorial(len(variables)) / factorial, len(variables)))
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


@register_table("tensor_attention_chebyshev", shape=lambda degree: (degree + 1, degree + 1))
def _chebyshev_table(degree: int) -> Tensor:
    """Row k holds the coefficients of T_k, those of k >= 1 doubled as in exp(M y) = I_0(M) + 2 Σ_k I_k(M) T_k(y)."""
    rows = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
    rows[0, 0] = 1.0
    for k in range(1, degree + 1):
        rows[k, 1:] = rows[k - 1, :-1] * (1 if k == 1 else 2)
        if k > 1:
            rows[k] -= rows[k - 2]
    rows[1:] *= 2
    return rows
