"""Burgers' equation against Cole and Hopf's exact solution."""

import itertools
import math

import pytest
import torch

from torchlayers.data import burgers


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def cole_hopf(u0, mean, nu, t, n):
    """The exact solution at n points: heat flow of θ = exp(-∫u/2ν) by a long Fourier series on a fine grid.

    ``u0(x)``: the initial velocity without its ``mean``, which only carries the solution along.
    """
    m = 4096
    x = torch.arange(m, dtype=torch.float64) / m
    k = torch.fft.fftfreq(m, 1 / m, dtype=torch.float64) * 2 * math.pi
    spectrum = torch.fft.fft(u0(x))
    integral = torch.fft.ifft(torch.where(k == 0, 0, spectrum / (1j * torch.where(k == 0, 1, k)))).real
    theta = torch.fft.fft(torch.exp(-(integral - integral.min()) / (2 * nu)))
    theta = theta * torch.exp(-nu * k**2 * t - 1j * k * mean * t)
    value, slope = torch.fft.ifft(theta).real, torch.fft.ifft(1j * k * theta).real
    return (mean - 2 * nu * slope / value)[:: m // n]


def wave(x):
    return torch.sin(2 * math.pi * x) + 0.4 * torch.cos(6 * math.pi * x)


@pytest.mark.parametrize(("nu", "t", "mean", "n"), [(0.05, 0.3, 0.0, 64), (0.02, 1.0, 0.3, 256), (0.01, 0.5, 0.0, 512)])
def test_equals_the_exact_solution(nu, t, mean, n):
    u0 = wave(torch.arange(n, dtype=torch.float64) / n) + mean
    u = burgers.solve(u0, nu, t, dt=1e-3)
    assert u.dtype == torch.float64
    assert relative(u, cole_hopf(wave, mean, nu, t, n)) < 1e-8


def test_order_of_convergence_is_four():
    exact = cole_hopf(wave, 0.0, 0.05, 0.5, 128)
    u0 = wave(torch.arange(128, dtype=torch.float64) / 128)
    errors = [relative(burgers.solve(u0, 0.05, 0.5, dt), exact) for dt in (6.25e-3, 3.125e-3, 1.5625e-3)]
    assert errors[0] < 1e-3
    assert min(math.log2(a / b) for a, b in itertools.pairwise(errors)) > 3.5


def test_momentum_is_kept_and_energy_falls():
    u0 = torch.stack([burgers.random_velocity(i, 128) for i in range(3)]) + 0.2
    u = burgers.solve(u0, 0.02, 0.5, dt=1e-3, snapshots=5)
    assert u.shape == (3, 5, 128)
    assert (u.mean(-1) - 0.2).abs().max() < 1e-14
    assert ((u**2).mean(-1).diff(dim=1) < 0).all()
    assert relative(u[:, -1], burgers.solve(u0, 0.02, 0.5, dt=1e-3)) < 1e-12


@pytest.mark.parametrize("n", [64, 65])
def test_equivariance(n):
    u0 = burgers.random_velocity(0, n)

    def run(u):
        return burgers.solve(u, 0.05, 0.2, dt=2e-3)

    u = run(u0)
    assert relative(u, u0) > 0.3
    assert relative(run(u0.roll(7)), u.roll(7)) < 1e-12
    assert relative(run(-u0.flip(0).roll(1)), -u.flip(0).roll(1)) < 1e-12  # x to -x


def test_random_velocity_has_the_documented_law():
    u = torch.stack([burgers.random_velocity(i, 24) for i in range(1000)])
    z = torch.fft.fft(u, norm="forward")
    for k in (1, 2, 5):
        variance = (25 / (4 * math.pi**2 * k**2 + 25)) ** 2
        assert (z[:, k].abs() ** 2).mean().item() == pytest.approx(variance, rel=0.15)
    assert z[:, 0].abs().max() < 1e-15 and z[:, 8:-7].abs().max() < 1e-15
    assert relative(burgers.random_velocity(3, 384)[::2], burgers.random_velocity(3, 192)) < 1e-14


def test_generate(tmp_path):
    arguments = {"viscosity": 0.05, "time": 0.2, "dt": 2e-3, "solve_resolution": 96, "progress": False}
    arguments["cache"] = tmp_path
    x, y = burgers.generate(3, 32, seed=1, **arguments)
    assert x.shape == y.shape == (3, 1, 32) and x.dtype == y.dtype == torch.float32
    u0 = torch.stack([burgers.random_velocity(i, 96, seed=1) for i in range(3)])
    low = torch.fft.rfftfreq(96, 1 / 96) < 16
    for found, field in ((x, u0), (y, burgers.solve(u0, 0.05, 0.2, 2e-3))):
        expected = torch.fft.irfft(torch.fft.rfft(field) * low, n=96)[:, ::3]
        assert relative(found[:, 0].double(), expected) < 1e-6
    assert torch.equal(burgers.generate(3, 32, seed=1, **arguments)[1], y)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u0": torch.zeros(3)}, ValueError, r"u0 must have shape \(..., n\), n at least 4, got \(3,\)"),
        ({"u0": torch.zeros(8, dtype=torch.complex128)}, TypeError, "u0 must be a tensor"),
        ({"viscosity": 0.0}, ValueError, "viscosity must be finite and over 0"),
        ({"time": -1.0}, ValueError, "time must be finite and over 0"),
        ({"u0": 1e3 * torch.ones(16, dtype=torch.float64)}, ValueError, "dt must be at most .* at time 0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"u0": torch.zeros(8, dtype=torch.float64), "viscosity": 0.1, "time": 1.0, "dt": 0.1} | change
    with pytest.raises(error, match=message):
        burgers.solve(**arguments)


def test_bad_data_set_arguments_are_named():
    with pytest.raises(ValueError, match="solve_resolution must be at least resolution = 64, got 32"):
        burgers.generate(1, 64, solve_resolution=32)
