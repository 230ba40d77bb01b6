"""The Fourier tables against the harmonics on the torus, integrals over the sphere and the product."""

from __future__ import annotations

import math

import pytest
import torch

from torchlayers.gaunt.fourier import fourier_to_sh, sh_to_fourier
from torchlayers.gaunt.irreps import e3nn_o3
from torchlayers.gaunt.reference import gaunt_tensor_product
from torchlayers.gaunt.sphere import gauss_legendre


@pytest.mark.parametrize("L", [0, 1, 2, 5])
def test_series_equal_e3nns_harmonics(L):
    theta = torch.rand(30, dtype=torch.float64) * math.pi
    phi = torch.rand(30, dtype=torch.float64) * 2 * math.pi
    points = torch.stack((theta.sin() * phi.sin(), theta.cos(), theta.sin() * phi.cos()), dim=-1)
    expected = e3nn_o3().spherical_harmonics(list(range(L + 1)), points, False, normalization="integral")
    frequency = torch.arange(-L, L + 1, dtype=torch.float64)
    wave_theta, wave_phi = torch.exp(1j * theta[:, None] * frequency), torch.exp(1j * phi[:, None] * frequency)
    series = torch.einsum("kuv,pu,pv->pk", sh_to_fourier(L), wave_theta, wave_phi)
    torch.testing.assert_close(series.real, expected, rtol=0, atol=1e-13)
    assert series.imag.abs().max() < 1e-13


@pytest.mark.parametrize("L", [0, 1, 3, 6])
def test_way_back_is_the_integral_over_the_sphere(L):
    """By quadrature in θ itself, where e^{iuθ} is smooth: many nodes, since it is no polynomial in cos θ."""
    nodes, weights = gauss_legendre(60)
    theta, weight = (nodes + 1) * (math.pi / 2), weights * (math.pi / 2)
    count = 2 * L + 1
    phi = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    t, p = theta[:, None], phi[None]
    points = torch.stack((t.sin() * p.sin(), t.cos().expand(60, count), t.sin() * p.cos()), dim=-1)
    harmonics = e3nn_o3().spherical_harmonics(list(range(L + 1)), points, False, normalization="integral")
    frequency = torch.arange(-L, L + 1, dtype=torch.float64)
    wave_theta, wave_phi = torch.exp(1j * theta[:, None] * frequency), torch.exp(1j * phi[:, None] * frequency)
    measure = (weight * theta.sin())[:, None] * (2 * math.pi / count)
    expected = torch.einsum("tpk,tu,pv->kuv", measure[..., None] * harmonics + 0j, wave_theta, wave_phi)
    torch.testing.assert_close(fourier_to_sh(L), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("L", [0, 1, 4, 14])
def test_there_and_back_is_the_identity(L):
    product = torch.einsum("kuv,luv->kl", sh_to_fourier(L), fourier_to_sh(L))
    assert product.dtype == torch.complex128
    torch.testing.assert_close(product, torch.eye((L + 1) ** 2, dtype=torch.complex128), rtol=0, atol=1e-13)


def test_only_orders_of_the_harmonic_are_nonzero():
    L = 4
    for series in (sh_to_fourier(L), fourier_to_sh(L)):
        for ell in range(L + 1):
            for m in range(-ell, ell + 1):
                columns = series[ell * ell + ell + m].abs().amax(0).nonzero().flatten() - L
                assert columns.tolist() == sorted({-abs(m), abs(m)})


@pytest.mark.parametrize(("lmax1", "lmax2"), [(0, 2), (1, 1), (3, 2), (4, 4)])
def test_zero_padded_convolution_is_the_product(lmax1, lmax2):
    generator = torch.Generator().manual_seed(lmax1)
    x = torch.randn(3, (lmax1 + 1) ** 2, dtype=torch.float64, generator=generator)
    y = torch.randn(3, (lmax2 + 1) ** 2, dtype=torch.float64, generator=generator)
    f = torch.einsum("ck,kuv->cuv", x + 0j, sh_to_fourier(lmax1))
    g = torch.einsum("ck,kuv->cuv", y + 0j, sh_to_fourier(lmax2))
    padded = (2 * (lmax1 + lmax2) + 1,) * 2
    convolved = torch.fft.ifft2(torch.fft.fft2(f, padded) * torch.fft.fft2(g, padded))
    z = torch.einsum("cuv,kuv->ck", convolved, fourier_to_sh(lmax1 + lmax2))
    torch.testing.assert_close(z.real, gaunt_tensor_product(x, y, lmax1, lmax2), rtol=0, atol=1e-12)
    assert z.imag.abs().max() < 1e-12


def test_tables_are_the_callers_own():
    sh_to_fourier(1).zero_()
    assert sh_to_fourier(1).any()


@pytest.mark.parametrize("function", [sh_to_fourier, fourier_to_sh])
def test_bad_degree(function):
    with pytest.raises(ValueError, match="L must be at least 0"):
        function(-1)
    with pytest.raises(TypeError, match="L must be an int"):
        function(1.5)
