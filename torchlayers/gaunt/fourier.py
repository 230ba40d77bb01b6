"""Signals on the sphere as trigonometric polynomials on the torus: the tables of the paper's Fourier route.

The parametrisation r(θ, φ) = (sin θ sin φ, cos θ, sin θ cos φ) continues every harmonic of degree up to L from
0 ≤ θ ≤ π to the torus, where it is a trigonometric polynomial of degree L in each angle. Products of signals then are
convolutions of their coefficients, and the way back integrates over the sphere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_int
from .._tables import register_table, table
from .sphere import spherical_harmonics

__all__ = ["fourier_to_sh", "sh_to_fourier"]


def _polar_series(lmax: int) -> Tensor:
    """Coefficients of e^{iuθ}, u = -L … L, of the polar factor of each harmonic: (n, 2L + 1) complex128.

    The meridian φ = 0 goes through θ > π at negative sin θ, so that the polar factors of odd order change their sign
    there as the harmonics themselves do.
    """
    size = 2 * lmax + 1
    theta = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    meridian = torch.stack((torch.zeros_like(theta), theta.cos(), theta.sin()), dim=-1)
    # cos mφ = 1 there and sin mφ = 0: the component m > 0 is the polar factor of both.
    of_order = [ell * ell + ell + abs(m) for ell in range(lmax + 1) for m in range(-ell, ell + 1)]
    values = spherical_harmonics(lmax, meridian)[:, of_order]
    return torch.fft.fftshift(torch.fft.fft(values, dim=0, norm="forward"), dim=0).T


def _azimuth_series(lmax: int) -> Tensor:
    """Coefficients of e^{ivφ}, v = -L … L, of cos mφ (m ≥ 0) and sin |m|φ (m < 0): (n, 2L + 1) complex128."""
    series = torch.zeros((lmax + 1) ** 2, 2 * lmax + 1, dtype=torch.complex128)
    for ell in range(lmax + 1):
        for m in range(-ell, ell + 1):
            plus = 0.5 if m >= 0 else -0.5j
            series[ell * ell + ell + m, lmax + abs(m)] += plus
            series[ell * ell + ell + m, lmax - abs(m)] += plus if m >= 0 else -plus
    return series


@register_table("gaunt_sh_to_fourier", shape=lambda lmax: ((lmax + 1) ** 2, 2 * lmax + 1, 2 * lmax + 1, 2))
def _sh_to_fourier(lmax: int) -> Tensor:
    return torch.view_as_real(_polar_series(lmax)[:, :, None] * _azimuth_series(lmax)[:, None, :])


@register_table("gaunt_fourier_to_sh", shape=lambda lmax: ((lmax + 1) ** 2, 2 * lmax + 1, 2 * lmax + 1, 2))
def _fourier_to_sh(lmax: int) -> Tensor:
    # ∫ sin θ e^{ikθ} dθ over [0, π] is 2 / (1 - k²) for even k, ±iπ/2 for k = ±1 and 0 for other odd k.
    frequency = torch.arange(-lmax, lmax + 1, dtype=torch.float64)
    k = frequency[:, None] + frequency
    real = torch.where(k % 2 == 0, 2 / (1 - k * k), 0.0)
    imag = torch.where(k.abs() == 1, k * (math.pi / 2), 0.0)
    polar = _polar_series(lmax) @ torch.complex(real, imag)
    # ∫ e^{ivφ} f(φ) dφ over [0, 2π) is 2π times the coefficient of f at -v.
    azimuth = 2 * math.pi * _azimuth_series(lmax).flip(-1)
    return torch.view_as_real(polar[:, :, None] * azimuth[:, None, :])


def sh_to_fourier(L: int) -> Tensor:
    """Fourier coefficients on the torus of the real orthonormal harmonics of degree up to ``L``::

        Y_lm(r(θ, φ)) = Σ_uv table[l² + l + m, L + u, L + v] e^{i(uθ + vφ)},    |u|, |v| ≤ L

    Only v = ±m are nonzero. Source: arXiv 2401.10216, section 3.

    Returns:
        ((L + 1)², 2L + 1, 2L + 1), complex128.

    Raises:
        TypeError, ValueError: ``L`` is no int, or negative.
    """
    return torch.view_as_complex(table("gaunt_sh_to_fourier", check_int("L", L, minimum=0)).clone())


def fourier_to_sh(L: int) -> Tensor:
    """Integrals over the sphere of the Fourier basis against the real orthonormal harmonics of degree up to ``L``.

        table[l² + l + m, L + u, L + v] = ∫_0^π ∫_0^2π e^{i(uθ + vφ)} Y_lm(r(θ, φ)) sin θ dφ dθ

    so that Σ_uv f_uv table[k, u, v] are the coefficients of the signal with Fourier coefficients f. A signal of higher
    degree is projected: the product of degrees L1 and L2 takes ``fourier_to_sh(L1 + L2)``, of which the first
    (L3 + 1)² rows are the degrees up to L3. The integrals are in closed form. Source: arXiv 2401.10216, section 3.

    Returns:
        ((L + 1)², 2L + 1, 2L + 1), complex128.

    Raises:
        TypeError, ValueError: ``L`` is no int, or negative.
    """
    return torch.view_as_complex(table("gaunt_fourier_to_sh", check_int("L", L, minimum=0)).clone())
