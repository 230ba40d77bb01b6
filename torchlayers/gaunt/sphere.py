"""Real spherical harmonics and quadratures on the sphere, of any degree, from float64 recurrences.

Conventions are e3nn's: the polar axis is +y, r = (sin θ sin φ, cos θ, sin θ cos φ), the component of degree l and
order m = -l … l has index l² + l + m, and m < 0 goes with sin |m|φ, m > 0 with cos mφ. The harmonics are orthonormal
("integral" normalisation).

The tables of the family live on half spheres. Y_l(-r) = (-1)^l Y_l(r), so one point of each antipodal pair knows
the whole signal if even and odd degrees are kept apart: with E and O the even- and odd-degree part of a signal at
the half sphere's points, and Z = weights × harmonics,

    product    z_even = Zᵀ(E₁E₂ + O₁O₂)         z_odd = Zᵀ(E₁O₂ + O₁E₂)
    bracket    z_even = Zᵀ([E₁,O₂] + [O₁,E₂])   z_odd = Zᵀ([E₁,E₂] + [O₁,O₂])

where [x, y] = (D₁x)(D₂y) - (D₂x)(D₁y) is the Poisson bracket r·(∇X × ∇Y).
"""

from __future__ import annotations

import importlib.metadata
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._checks import check_choice, check_dtype, check_int, require
from .._tables import register_table, table

__all__ = [
    "even_degrees",
    "grid_size",
    "half_sphere",
    "odd_degrees",
    "sphere_quadrature",
    "spherical_harmonics",
]


# ------------------------------------------------------------------------------------------------ harmonics


@register_table("gaunt_recurrence", shape=lambda lmax: (3, lmax + 1, lmax + 1))
def _recurrence(lmax: int) -> Tensor:
    """Coefficients of the orthonormal Legendre recurrence, and of the derivative in the polar coordinate.

    With Q_lm(y) = Θ_lm / sin^m θ, Θ_lm the polar factor of Y_l±m:

        Q_lm = a_lm (y Q_{l-1,m} - b_lm Q_{l-2,m})   for m < l,        Q_ll = a_ll,        ∂Q_lm/∂y = c_lm Q_{l,m+1}
    """
    a, b, c = torch.zeros(3, lmax + 1, lmax + 1, dtype=torch.float64).unbind()
    top = 1 / (4 * math.pi)
    for ell in range(lmax + 1):
        top *= (2 * ell + 1) / (2 * ell) if ell else 1.0
        a[ell, ell] = math.sqrt(top * (2 if ell else 1))
        for m in range(ell):
            a[ell, m] = math.sqrt((4 * ell * ell - 1) / (ell * ell - m * m))
            b[ell, m] = math.sqrt(((ell - 1) ** 2 - m * m) / (4 * (ell - 1) ** 2 - 1)) if ell > 1 else 0.0
            c[ell, m] = math.sqrt((ell - m) * (ell + m + 1) / (1 if m else 2))
    return torch.stack((a, b, c))


def _factors(lmax: int, points: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Q_l (…, l + 1) for each l, and the real and imaginary part of (z + ix)^m (…, lmax + 1): Y = Q × one of them."""
    a, b, _ = table("gaunt_recurrence", lmax, dtype=points.dtype, device=points.device).unbind()
    x, y, z = points.unbind(-1)
    squared = points.square().sum(-1, keepdim=True)
    real, imag = [torch.ones_like(y)], [torch.zeros_like(y)]
    for _ in range(lmax):
        real.append(z * real[-1] - x * imag[-1])
        imag.append(z * imag[-1] + x * real[-2])
    ones = torch.ones_like(y)[..., None]
    polar = [a[0, :1] * ones]
    for ell in range(1, lmax + 1):
        lower = y[..., None] * polar[-1]
        if ell > 1:
            lower = lower - b[ell, :ell] * squared * pad(polar[-2], (0, 1))
        polar.append(torch.cat((a[ell, :ell] * lower, a[ell, ell : ell + 1] * ones), dim=-1))
    return polar, torch.stack(real, dim=-1), torch.stack(imag, dim=-1)


def _assemble(polar: list[Tensor], real: Tensor, imag: Tensor) -> Tensor:
    blocks = []
    for ell, q in enumerate(polar):
        blocks += [(q[..., 1:] * imag[..., 1 : ell + 1]).flip(-1), q * real[..., : ell + 1]]
    return torch.cat(blocks, dim=-1)


def spherical_harmonics(lmax: int, points: Tensor) -> Tensor:
    """Real orthonormal spherical harmonics of all degrees up to ``lmax``, e3nn's ``normalization="integral"``.

    Args:
        lmax: highest degree, any size (e3nn's own stop at 12).
        points: (…, 3), real floating point, unit vectors (x, y, z). Other vectors r give the solid harmonics
            ``|r|^l Y_lm(r/|r|)``, homogeneous polynomials.

    Returns:
        (…, (lmax + 1)²), index l² + l + m, in the dtype of ``points``. Polynomials in the Cartesian components:
        no angles, hence differentiable everywhere, the poles included.

    Raises:
        TypeError: ``lmax`` is no int or ``points`` no real floating-point tensor.
        ValueError: ``lmax`` is negative or the last dimension of ``points`` is not 3.
    """
    check_int("lmax", lmax, minimum=0)
    if not isinstance(points, Tensor):
        raise TypeError(f"points must be a tensor (..., 3), got {type(points).__name__}")
    check_dtype("points", points, kind="real")
    if points.ndim == 0 or points.shape[-1] != 3:
        raise ValueError(f"points must have shape (..., 3), got {tuple(points.shape)}")
    return _assemble(*_factors(lmax, points))


def _directional(lmax: int, points: Tensor, direction: Tensor) -> Tensor:
    """Derivative of the harmonics at unit vectors ``points`` along the tangent vectors ``direction``."""
    slope = table("gaunt_recurrence", lmax, dtype=points.dtype, device=points.device)[2]
    polar, real, imag = _factors(lmax, points)
    u, v, w = direction[..., None].unbind(-2)
    order = torch.arange(lmax + 1, dtype=points.dtype, device=points.device)
    before_real, before_imag = pad(real[..., :-1], (1, 0)), pad(imag[..., :-1], (1, 0))
    turned = order * (w * before_real - u * before_imag), order * (w * before_imag + u * before_real)
    steeper = [v * slope[ell, : ell + 1] * pad(q[..., 1:], (0, 1)) for ell, q in enumerate(polar)]
    return _assemble(steeper, real, imag) + _assemble(polar, *turned)


def even_degrees(lmax: int) -> tuple[int, ...]:
    """Indices of the components of even degree within (lmax + 1)²."""
    return tuple(i for ell in range(0, lmax + 1, 2) for i in range(ell * ell, (ell + 1) ** 2))


def odd_degrees(lmax: int) -> tuple[int, ...]:
    """Indices of the components of odd degree within (lmax + 1)²."""
    return tuple(i for ell in range(1, lmax + 1, 2) for i in range(ell * ell, (ell + 1) ** 2))


# ----------------------------------------------------------------------------------------------- quadratures

# Points of the Lebedev rule of each order that scipy has, less 13, 25 and 27, whose negative weights cost precision.
_LEBEDEV = {
    **{3: 6, 5: 14, 7: 26, 9: 38, 11: 50, 15: 86, 17: 110, 19: 146, 21: 170, 23: 194, 29: 302, 31: 350},
    **{35: 434, 41: 590, 47: 770, 53: 974, 59: 1202, 65: 1454, 71: 1730, 77: 2030, 83: 2354, 89: 2702},
    **{95: 3074, 101: 3470, 107: 3890, 113: 4334, 119: 4802, 125: 5294, 131: 5810},
}


def _scipy_has_lebedev() -> bool:
    try:
        major, minor = importlib.metadata.version("scipy").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (1, 15)


# Settled at import, so that the size of a grid is a constant to a compiler.
_HAS_LEBEDEV = _scipy_has_lebedev()


def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes (ascending, in (-1, 1)) and weights (sum 2) of the Gauss–Legendre rule, float64; exact to 2·nodes - 1."""
    n = check_int("nodes", nodes)
    x = -torch.cos(math.pi * (torch.arange(n, dtype=torch.float64) + 0.75) / (n + 0.5))
    for _ in range(8):  # Newton from Tricomi's guess: quadratic from an error of 1e-2 or less
        before, value = torch.ones_like(x), x
        for k in range(2, n + 1):
            before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
        slope = n * (before - x * value) / (1 - x * x)
        x = x - value / slope
        x = (x - x.flip(0)) / 2
    weights = 2 / ((1 - x * x) * slope * slope)
    return x, (weights + weights.flip(0)) / 2


def _ring(y: Tensor, azimuth: Tensor) -> Tensor:
    """Points (…, 3) at polar coordinate ``y`` and azimuth, which broadcast."""
    radius = (1 - y * y).clamp_min(0).sqrt()
    return torch.stack(torch.broadcast_tensors(radius * azimuth.sin(), y, radius * azimuth.cos()), dim=-1)


def _lebedev(degree: int) -> tuple[Tensor, Tensor]:
    order = next((o for o in _LEBEDEV if o >= degree), None)
    if order is None:
        raise ValueError(f"degree must be at most {max(_LEBEDEV)} for kind='lebedev', got {degree}")
    integrate = require("scipy.integrate", extra="gaunt")
    if not _HAS_LEBEDEV:
        raise ImportError("kind='lebedev' needs scipy >= 1.15: pip install -e '.[gaunt]'")
    points, weights = integrate.lebedev_rule(order)
    return torch.from_numpy(points.T.copy()), torch.from_numpy(weights.copy())


def sphere_quadrature(degree: int, kind: str = "gauss_legendre") -> tuple[Tensor, Tensor]:
    """A quadrature of the sphere that is exact for polynomials up to ``degree``.

    The product of signals of degree L1 and L2, projected on degree L3, needs degree L1 + L2 + L3.

    Args:
        degree: highest polynomial degree (that of a spherical harmonic) integrated exactly, at least 0.
        kind: "gauss_legendre": ⌊degree / 2⌋ + 1 rings, Gauss–Legendre in cos θ, of degree + 1 equispaced azimuths, ring
            after ring from -y to +y. "lebedev": about two thirds of those points, octahedral symmetry, degree ≤ 131,
            needs scipy ≥ 1.15 (extra ``gaunt``); the rules with negative weights are passed over.

    Returns:
        points (G, 3), unit vectors, and weights (G,), positive, sum 4π; float64.

    Raises:
        ValueError: negative degree, unknown kind, or a degree beyond the Lebedev rules.
        ImportError: kind="lebedev" without scipy.

    Example:

        >>> points, weights = sphere_quadrature(4)
        >>> harmonics = spherical_harmonics(2, points)
        >>> torch.allclose(harmonics.T @ (weights[:, None] * harmonics), torch.eye(9, dtype=torch.float64))
        True
    """
    check_int("degree", degree, minimum=0)
    check_choice("kind", kind, ("gauss_legendre", "lebedev"))
    if kind == "lebedev":
        return _lebedev(degree)
    y, weights = gauss_legendre(degree // 2 + 1)
    azimuth = torch.arange(degree + 1, dtype=torch.float64) * (2 * math.pi / (degree + 1))
    points = _ring(y[:, None], azimuth).flatten(0, 1)
    return points, (weights * (2 * math.pi / (degree + 1))).repeat_interleave(degree + 1)


def grid_size(degree: int) -> int:
    """Number of points of :func:`half_sphere`, without building it."""
    if _HAS_LEBEDEV and degree <= max(_LEBEDEV):
        return next(points for order, points in _LEBEDEV.items() if order >= degree) // 2
    even = degree - degree % 2
    rings = even // 2 + 1
    return rings // 2 * (even + 1) + rings % 2 * (even // 2 + 1)


def half_sphere(degree: int) -> tuple[Tensor, Tensor]:
    """One point of each antipodal pair of a quadrature exact up to ``degree``, for integrands of even parity.

    The rule of fewest points with positive weights: Lebedev's where scipy has one, else Gauss–Legendre rings, the ring
    at -y turned by π against that at +y, so that the whole is its own mirror image. An antipodal rule integrates
    odd parts exactly by symmetry, so that its rings serve the largest even number up to ``degree``.

    Returns:
        points (H, 3) and weights (H,), doubled (sum 4π); float64, H = grid_size(degree).
    """
    check_int("degree", degree, minimum=0)
    if _HAS_LEBEDEV and degree <= max(_LEBEDEV):
        points, weights = _lebedev(degree)
        x, y, z = points.where(points.abs() > 1e-9, 0.0).sign().unbind(-1)
        upper = (4 * y + 2 * z + x) > 0
        return points[upper], 2 * weights[upper]
    even = degree - degree % 2
    y, weights = gauss_legendre(even // 2 + 1)
    rings, doubled = [], []
    for height, weight in zip(y.tolist(), weights.tolist(), strict=True):
        if height < 0:
            continue
        # The equator is its own mirror image: an even number of azimuths, of which half are kept.
        full = even + 1 if height else even + 2
        kept = full if height else full // 2
        azimuth = torch.arange(kept, dtype=torch.float64) * (2 * math.pi / full)
        rings.append(_ring(torch.tensor(height, dtype=torch.float64), azimuth))
        doubled.append(torch.full((kept,), 4 * math.pi * weight / full, dtype=torch.float64))
    return torch.cat(rings), torch.cat(doubled)


# ---------------------------------------------------------------------------------------------------- tables


@register_table("gaunt_points", shape=lambda degree: (grid_size(degree), 3))
def _points(degree: int) -> Tensor:
    """Points of the half sphere."""
    return half_sphere(degree)[0]


@register_table("gaunt_weights", shape=lambda degree: (grid_size(degree),))
def _weights(degree: int) -> Tensor:
    """Weights of the half sphere, doubled."""
    return half_sphere(degree)[1]


@register_table("gaunt_harmonics", shape=lambda lmax, degree: (grid_size(degree), (lmax + 1) ** 2))
def _harmonics(lmax: int, degree: int) -> Tensor:
    """Harmonics up to ``lmax`` at the points of the half sphere."""
    return spherical_harmonics(lmax, half_sphere(degree)[0])


def tangent_frame(points: Tensor) -> tuple[Tensor, Tensor]:
    """Unit tangent vectors e₁ and e₂ = r × e₁ at unit vectors (…, 3), right-handed with r."""
    axis = torch.nn.functional.one_hot(points.abs().argmin(dim=-1), 3).to(points.dtype)
    first = torch.linalg.cross(axis, points)
    first = first / first.norm(dim=-1, keepdim=True)
    return first, torch.linalg.cross(points, first)


def tangent_harmonics(lmax: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """D₁ = e₁·L Y and D₂ = e₂·L Y (…, (lmax + 1)²) at unit vectors, L = r × ∇, in the frame of ``tangent_frame``."""
    first, second = tangent_frame(points)
    # e·(r × ∇) is the derivative along e × r.
    return -_directional(lmax, points, second), _directional(lmax, points, first)


@register_table("gaunt_frame", shape=lambda degree: (2, grid_size(degree), 3))
def _frame(degree: int) -> Tensor:
    """``tangent_frame`` at the points of the half sphere."""
    return torch.stack(tangent_frame(half_sphere(degree)[0]))


@register_table("gaunt_tangent", shape=lambda lmax, degree: (2, grid_size(degree), (lmax + 1) ** 2))
def _tangent(lmax: int, degree: int) -> Tensor:
    """``tangent_harmonics`` at the points of the half sphere."""
    return torch.stack(tangent_harmonics(lmax, half_sphere(degree)[0]))
