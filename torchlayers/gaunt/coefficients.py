"""Coupling coefficients of real spherical harmonics: Gaunt, Poisson bracket and Clebsch–Gordan, in float64.

For C = ``e3nn.o3.wigner_3j(l1, l2, l3)`` (Frobenius norm 1), with integrals over the sphere,

    ∫ Y₁ Y₂ Y₃        = g(l1, l2, l3) C   where l1 + l2 + l3 is even, and 0 elsewhere    (Gaunt)
    ∫ {Y₁, Y₂} Y₃     = p(l1, l2, l3) C   where l1 + l2 + l3 is odd, and 0 elsewhere     (bracket {A, B} = r·(∇A × ∇B))

    g = sqrt((2l1+1)(2l2+1)(2l3+1) / 4π) |3j(l1 l2 l3; 0 0 0)|
    p = sqrt((2l1+1)(2l2+1)(2l3+1) / 4π) sqrt(l1(l1+1) l2(l2+1)) |3j(l1 l2 l3; 1 -1 0)|

so that the pointwise product and the bracket together reach every Clebsch–Gordan path (Luo et al., arXiv 2401.10216;
the bracket: Bochkarev et al., arXiv 2605.15073).
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .._checks import check_int
from .._tables import register_table, table
from .sphere import half_sphere, spherical_harmonics, tangent_harmonics

__all__ = [
    "bracket_coefficients",
    "bracket_scale",
    "clebsch_gordan",
    "dense_coefficients",
    "gaunt_coefficients",
    "gaunt_scale",
    "paths",
]


def _check_degrees(l1: int, l2: int, l3: int) -> None:
    for name, value in (("l1", l1), ("l2", l2), ("l3", l3)):
        check_int(name, value, minimum=0)


def _couples(l1: int, l2: int, l3: int) -> bool:
    return abs(l1 - l2) <= l3 <= l1 + l2


def _three_j(l1: int, l2: int, l3: int, m: int) -> float:
    """|3j(l1 l2 l3; m -m 0)| by Racah's sum in exact integers."""
    f = math.factorial
    first, last = max(0, l2 - l3 - m, l1 - l3 - m), min(l1 + l2 - l3, l1 - m, l2 - m)
    total = Fraction(0)
    for t in range(first, last + 1):
        rest = f(l1 + l2 - l3 - t) * f(l1 - t - m) * f(l2 - t - m)
        total += Fraction((-1) ** t, f(t) * f(l3 - l2 + t + m) * f(l3 - l1 + t + m) * rest)
    triangle = Fraction(f(l1 + l2 - l3) * f(l1 - l2 + l3) * f(-l1 + l2 + l3), f(l1 + l2 + l3 + 1))
    orders = f(l1 + m) * f(l1 - m) * f(l2 + m) * f(l2 - m) * f(l3) ** 2
    return math.sqrt(total**2 * triangle * orders)


def gaunt_scale(l1: int, l2: int, l3: int) -> float:
    """g(l1, l2, l3), the Frobenius norm of :func:`gaunt_coefficients`; 0 where that block vanishes."""
    _check_degrees(l1, l2, l3)
    if not _couples(l1, l2, l3) or (l1 + l2 + l3) % 2:
        return 0.0
    return math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1) / (4 * math.pi)) * _three_j(l1, l2, l3, 0)


def bracket_scale(l1: int, l2: int, l3: int) -> float:
    """p(l1, l2, l3), the Frobenius norm of :func:`bracket_coefficients`; 0 where that block vanishes."""
    _check_degrees(l1, l2, l3)
    if not _couples(l1, l2, l3) or (l1 + l2 + l3) % 2 == 0:
        return 0.0
    size = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1) / (4 * math.pi))
    return size * math.sqrt(l1 * (l1 + 1) * l2 * (l2 + 1)) * _three_j(l1, l2, l3, 1)


def _constant(build):
    """Cache the tensors of ``build``: plain CPU tensors, whatever modes the first call happens under."""

    @functools.cache
    def cached(*args):
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return build(*args)

    return cached


@_constant
def _grid(lmax: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Harmonics, D₁, D₂ and weighted harmonics up to ``lmax`` on a half sphere that integrates three of them."""
    points, weights = half_sphere(3 * lmax)
    harmonics = spherical_harmonics(lmax, points)
    return harmonics, *tangent_harmonics(lmax, points), weights[:, None] * harmonics


@_constant
def _block(l1: int, l2: int, l3: int) -> Tensor:
    """The integral of two harmonics' product (even l1 + l2 + l3) or bracket (odd) times the third; they must couple."""
    y, d1, d2, z = _grid(max(l1, l2, l3))
    first, second, third = (slice(ell * ell, (ell + 1) ** 2) for ell in (l1, l2, l3))
    if (l1 + l2 + l3) % 2 == 0:
        pairs = y[:, first, None] * y[:, None, second]
    else:
        pairs = d1[:, first, None] * d2[:, None, second] - d2[:, first, None] * d1[:, None, second]
    block = torch.einsum("gij,gk->ijk", pairs, z[:, third])
    # What selection rules forbid comes out as rounding error; an exact zero lets sparse contractions skip it.
    return block.where(block.abs() > 1e-13 * block.abs().max(), 0.0)


def gaunt_coefficients(l1: int, l2: int, l3: int) -> Tensor:
    """The Gaunt coefficients ∫ Y_{l1 m1} Y_{l2 m2} Y_{l3 m3} over the sphere, of real orthonormal harmonics.

    Returns:
        (2 l1 + 1, 2 l2 + 1, 2 l3 + 1), float64, = ``gaunt_scale(l1, l2, l3) * e3nn.o3.wigner_3j(l1, l2, l3)`` where
        l1 + l2 + l3 is even; zero where it is odd or ``|l1 - l2| ≤ l3 ≤ l1 + l2`` fails. Entries that selection rules
        forbid are exactly 0. Built once by an exact quadrature, then a copy each call.

    Raises:
        TypeError, ValueError: a degree that is no int, or negative.
    """
    _check_degrees(l1, l2, l3)
    if not _couples(l1, l2, l3) or (l1 + l2 + l3) % 2:
        return torch.zeros(2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1, dtype=torch.float64)
    return _block(l1, l2, l3).clone()


def bracket_coefficients(l1: int, l2: int, l3: int) -> Tensor:
    """The coefficients ∫ {Y_{l1 m1}, Y_{l2 m2}} Y_{l3 m3} of the Poisson bracket {A, B} = r·(∇A × ∇B).

    Returns:
        (2 l1 + 1, 2 l2 + 1, 2 l3 + 1), float64, = ``bracket_scale(l1, l2, l3) * e3nn.o3.wigner_3j(l1, l2, l3)`` where
        l1 + l2 + l3 is odd; zero where it is even or ``|l1 - l2| ≤ l3 ≤ l1 + l2`` fails. Antisymmetric under exchange
        of any two of its factors.

    Raises:
        TypeError, ValueError: a degree that is no int, or negative.
    """
    _check_degrees(l1, l2, l3)
    if not _couples(l1, l2, l3) or (l1 + l2 + l3) % 2 == 0:
        return torch.zeros(2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1, dtype=torch.float64)
    return _block(l1, l2, l3).clone()


def clebsch_gordan(l1: int, l2: int, l3: int) -> Tensor:
    """Real Clebsch–Gordan coefficients of Frobenius norm 1, with the signs of ``e3nn.o3.wigner_3j``.

    The Gaunt block over g where l1 + l2 + l3 is even, the bracket's over p where it is odd.

    Returns:
        (2 l1 + 1, 2 l2 + 1, 2 l3 + 1), float64.

    Raises:
        TypeError: a degree that is no int.
        ValueError: a negative degree, or degrees that don't couple: ``|l1 - l2| ≤ l3 ≤ l1 + l2`` fails.
    """
    _check_degrees(l1, l2, l3)
    if not _couples(l1, l2, l3):
        raise ValueError(f"l3 must lie within |l1 - l2| = {abs(l1 - l2)} and l1 + l2 = {l1 + l2}, got {l3}")
    scale = bracket_scale if (l1 + l2 + l3) % 2 else gaunt_scale
    return _block(l1, l2, l3) / scale(l1, l2, l3)


def paths(
    lmax1: int, lmax2: int, lmax3: int, *, antisymmetric: bool | Literal["both"] = False
) -> list[tuple[int, int, int]]:
    """All (l1, l2, l3) up to the given degrees that couple, in ascending order.

    ``antisymmetric=False`` gives those of the pointwise product (even l1 + l2 + l3), ``True`` those of the bracket
    (odd), ``"both"`` every Clebsch–Gordan path.
    """
    return [
        (l1, l2, l3)
        for l1 in range(lmax1 + 1)
        for l2 in range(lmax2 + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, lmax3) + 1)
        if antisymmetric == "both" or (l1 + l2 + l3) % 2 == antisymmetric
    ]


@register_table("gaunt_dense", shape=lambda l1, l2, l3, antisymmetric: ((l1 + 1) ** 2, (l2 + 1) ** 2, (l3 + 1) ** 2))
def _dense(lmax1: int, lmax2: int, lmax3: int, antisymmetric: int) -> Tensor:
    """All Gaunt (``antisymmetric`` 0) or bracket (1) blocks in one tensor (n1, n2, n3)."""
    dense = torch.zeros((lmax1 + 1) ** 2, (lmax2 + 1) ** 2, (lmax3 + 1) ** 2, dtype=torch.float64)
    for l1, l2, l3 in paths(lmax1, lmax2, lmax3, antisymmetric=bool(antisymmetric)):
        first, second, third = (slice(ell * ell, (ell + 1) ** 2) for ell in (l1, l2, l3))
        dense[first, second, third] = _block(l1, l2, l3)
    return dense


def dense_coefficients(
    lmax1: int,
    lmax2: int,
    lmax3: int,
    *,
    antisymmetric: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The table of all Gaunt or bracket blocks, ((lmax1 + 1)², (lmax2 + 1)², (lmax3 + 1)²); never write to it."""
    return table("gaunt_dense", lmax1, lmax2, lmax3, int(antisymmetric), dtype=dtype, device=device)
