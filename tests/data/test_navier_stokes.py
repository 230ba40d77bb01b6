"""The vorticity solver against exact solutions, invariants, and a NumPy solver that shares nothing with it."""

import itertools
import math

import numpy as np
import pytest
import torch

from torchlayers.data import navier_stokes as ns

NU = 2e-4


def grid(n):
    s = torch.arange(n, dtype=torch.float64) / n
    return torch.meshgrid(s, s, indexing="ij")


def flows(count, n, seed=0):
    return torch.stack([ns.random_vorticity(i, n, seed=seed) for i in range(count)])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def moments(w):
    u, v = ns.velocity(w)
    return (u**2 + v**2).mean((-2, -1)) / 2, (w**2).mean((-2, -1)) / 2


# ---- exact solutions


@pytest.mark.parametrize(("n", "dt"), [(16, 0.3), (33, 0.05)])
def test_taylor_green_decays(n, dt):
    x, y = grid(n)
    w0 = 2 * torch.cos(2 * math.pi * x) * torch.cos(2 * math.pi * y)
    w = ns.solve(w0, None, viscosity=0.01, time=1.0, dt=dt)
    assert relative(w, w0 * math.exp(-8 * math.pi**2 * 0.01)) < 1e-13


def test_forced_shear_approaches_its_steady_state():
    x, y = grid(16)
    f = 0.1 * torch.sin(2 * math.pi * (x + 2 * y))  # a shear flow: it does not advect itself
    rate = 0.01 * 4 * math.pi**2 * 5
    w = ns.solve(torch.zeros(16, 16, dtype=torch.float64), f, viscosity=0.01, time=0.7, dt=0.1)
    assert relative(w, f / rate * (1 - math.exp(-0.7 * rate))) < 1e-12


def test_a_travelling_pair_of_waves_turns_as_computed_by_hand():
    # w = a cos X + b cos Y with X = 2πx·1, Y = 2πy·2: u·∇w at time 0 is known, and the first change with it.
    x, y = grid(24)
    k, q = 2 * math.pi, 4 * math.pi
    w0 = 0.3 * torch.cos(k * x) + 0.5 * torch.cos(q * y)
    # ψ = a cos X / k² + b cos Y / q²: u = -b sin Y / q, v = a sin X / k
    change = -(
        (-0.5 * torch.sin(q * y) / q) * (-0.3 * k * torch.sin(k * x))
        + (0.3 * torch.sin(k * x) / k) * (-0.5 * q * torch.sin(q * y))
    )
    step = 1e-5
    w = ns.solve(w0, None, 0.0, time=step, dt=step)
    assert relative((w - w0) / step, change) < 1e-5


# ---- an independent solver


def numpy_rate(w, f, nu):
    """dw/dt in NumPy: advective form, products on a grid of twice the points, no rule of thirds."""
    n = w.shape[0]
    k = np.fft.fftfreq(n, 1 / n)
    kx, ky = np.meshgrid(2 * np.pi * k, 2 * np.pi * k, indexing="ij")
    square = kx**2 + ky**2
    spectrum = np.fft.fft2(w)
    psi = spectrum / np.where(square == 0, 1, square)
    psi[0, 0] = 0

    def fine(s):
        big = np.zeros((2 * n, 2 * n), dtype=complex)
        rows = k.astype(int)
        big[np.ix_(rows, rows)] = s
        return np.fft.ifft2(big).real * 4

    product = fine(1j * ky * psi) * fine(1j * kx * spectrum) + fine(-1j * kx * psi) * fine(1j * ky * spectrum)
    rows = k.astype(int)
    advection = np.fft.fft2(product)[np.ix_(rows, rows)] / 4
    kept = (3 * np.abs(k) < n)[:, None] & (3 * np.abs(k) < n)
    return np.fft.ifft2(-advection * kept - nu * square * spectrum).real + f


@pytest.mark.parametrize("n", [15, 18])
def test_equals_an_independent_solver(n):
    w0, f, nu = flows(1, n)[0], ns.forcing(n), 1e-3
    w, h = w0.numpy(), 0.01
    for _ in range(100):  # the classical Runge-Kutta method
        a = numpy_rate(w, f.numpy(), nu)
        b = numpy_rate(w + h / 2 * a, f.numpy(), nu)
        c = numpy_rate(w + h / 2 * b, f.numpy(), nu)
        d = numpy_rate(w + h * c, f.numpy(), nu)
        w = w + h / 6 * (a + 2 * b + 2 * c + d)
    assert relative(ns.solve(w0, f, nu, time=1.0, dt=0.01), torch.from_numpy(w)) < 1e-9


# ---- invariants and symmetries


def test_order_of_convergence_is_four():
    w0, f = flows(2, 32), ns.forcing(32)
    reference = ns.solve(w0, f, NU, time=2.0, dt=0.01)
    errors = [relative(ns.solve(w0, f, NU, time=2.0, dt=dt), reference) for dt in (0.2, 0.1, 0.05)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[0] < 1e-4
    assert min(orders) > 3.6


def test_energy_and_enstrophy_are_kept_without_viscosity():
    w0 = flows(2, 32)
    w = ns.solve(w0, None, 0.0, time=2.0, dt=0.05)
    assert relative(w, w0) > 0.3  # it moved
    for before, after in zip(moments(w0), moments(w), strict=True):
        assert torch.allclose(after, before, rtol=1e-6)


def test_energy_and_enstrophy_balance():
    w0, f = flows(2, 32), ns.forcing(32)
    w = torch.cat([w0[:, None], ns.solve(w0, f, 1e-3, time=1.0, dt=0.01, snapshots=40)], 1)
    energy, enstrophy = moments(w)
    gradient = torch.stack(ns.velocity(w))  # |∇w|² by Parseval: that of -Δ the energy's way
    k = 2 * math.pi * torch.fft.fftfreq(32, 1 / 32, dtype=torch.float64)
    square = k[:, None] ** 2 + k**2
    palinstrophy = (square * torch.fft.fft2(w, norm="forward").abs() ** 2).sum((-2, -1))
    force = torch.stack(ns.velocity(f.expand_as(w)))
    power, supply = (force * gradient).sum(0).mean((-2, -1)), (f * w).mean((-2, -1))
    weights = torch.tensor([1.0, *[4.0, 2.0] * 19, 4.0, 1.0], dtype=torch.float64) / 120  # Simpson's rule
    for quantity, rate in ((energy, power - 2e-3 * enstrophy), (enstrophy, supply - 1e-3 * palinstrophy)):
        assert torch.allclose(quantity[:, -1] - quantity[:, 0], rate @ weights, rtol=1e-6)


def test_mean_vorticity_is_conserved():
    w = ns.solve(flows(2, 24) + 0.3, ns.forcing(24), NU, time=1.0, dt=0.1)
    assert (w.mean((-2, -1)) - 0.3).abs().max() < 1e-14


def turned(w):
    """By a quarter: the value at (x, y) goes to (-y, x). Vorticity is a scalar under rotations."""
    return w.transpose(-2, -1).flip(-2).roll(1, -2)


def mirrored(w):
    """x to -x, which turns the sense of rotation."""
    return -w.flip(-2).roll(1, -2)


@pytest.mark.parametrize("n", [20, 21])
@pytest.mark.parametrize(
    "move", [turned, mirrored, lambda w: w.roll((3, -5), (-2, -1))], ids=["turn", "mirror", "shift"]
)
def test_equivariance(move, n):
    w0, f = flows(1, n)[0], flows(1, n, seed=1)[0]
    w = ns.solve(w0, f, NU, time=1.0, dt=0.1)
    assert relative(w, w0) > 0.3
    assert relative(ns.solve(move(w0), move(f), NU, time=1.0, dt=0.1), move(w)) < 1e-12


def test_batches_broadcasting_snapshots_and_restarts():
    w0, f = flows(4, 16).reshape(2, 2, 16, 16), flows(2, 16, seed=1)
    w = ns.solve(w0, f, NU, time=0.6, dt=0.1, snapshots=3)
    assert w.shape == (2, 2, 3, 16, 16) and w.dtype == torch.float64
    one = ns.solve(w0[1, 0], f[0], NU, time=0.4, dt=0.1)
    assert relative(w[1, 0, 1], one) < 1e-13
    assert relative(w[1, 0, 2], ns.solve(one, f[0], NU, time=0.2, dt=0.1)) < 1e-13
    assert relative(ns.solve(w0, f, NU, time=0.6, dt=0.1), w[:, :, 2]) < 1e-12
    assert ns.solve(w0[:0], None, NU, time=0.6, dt=0.1).shape == (0, 2, 16, 16)


def test_dt_is_the_longest_step():
    w0 = flows(1, 16)
    assert torch.equal(ns.solve(w0, None, NU, time=1.0, dt=0.3), ns.solve(w0, None, NU, time=1.0, dt=0.25))
    assert torch.equal(ns.solve(w0, None, NU, time=0.1, dt=3.0), ns.solve(w0, None, NU, time=0.1, dt=0.1))


def test_waves_beyond_the_rule_of_thirds_only_diffuse():
    x, _ = grid(18)
    high = torch.cos(2 * math.pi * 7 * x)
    low = flows(1, 18)[0]
    w = ns.solve(low + high, None, 1e-3, time=0.5, dt=0.1)
    expected = ns.solve(low, None, 1e-3, time=0.5, dt=0.1) + high * math.exp(-1e-3 * (14 * math.pi) ** 2 * 0.5)
    assert relative(w, expected) < 1e-12


def test_float32_gives_its_precision():
    w0, f = flows(2, 24), ns.forcing(24)
    w = ns.solve(w0.float(), f.float(), NU, time=1.0, dt=0.1)
    assert w.dtype == torch.float32
    assert relative(w.double(), ns.solve(w0, f, NU, time=1.0, dt=0.1)) < 3e-6


# ---- velocity and spectra


def test_velocity_by_hand():
    x, y = grid(12)
    u, v = ns.velocity(torch.cos(2 * math.pi * (x + 2 * y)))
    # ψ = w / (20 π²): u = ∂ψ/∂y, v = -∂ψ/∂x
    expected = torch.sin(2 * math.pi * (x + 2 * y)) / (20 * math.pi**2) * 2 * math.pi
    assert torch.allclose(u, -2 * expected, atol=1e-15)
    assert torch.allclose(v, expected, atol=1e-15)


@pytest.mark.parametrize("n", [16, 17])
def test_spectra_sum_to_the_moments(n):
    w = ns.truncate(flows(3, 2 * n), n, 2)
    # Keep what lies inside the last whole shell.
    k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    inside = (k[:, None] ** 2 + k**2).sqrt() < n // 2 - 0.5
    w = torch.fft.ifft2(torch.fft.fft2(w) * inside).real
    k, energy, enstrophy = ns.spectra(w)
    assert k.tolist() == list(range(n // 2))
    for spectrum, total in zip((energy, enstrophy), moments(w), strict=True):
        assert torch.allclose(spectrum.sum(-1), total, rtol=1e-12)


def test_spectrum_of_one_wave():
    x, y = grid(16)
    _, energy, enstrophy = ns.spectra(torch.cos(2 * math.pi * (3 * x + 4 * y)))
    assert enstrophy[5].item() == pytest.approx(0.25)
    assert energy[5].item() == pytest.approx(0.25 / (4 * math.pi**2 * 25))
    assert enstrophy.sum().item() == pytest.approx(0.25)


# ---- random fields and data sets


def test_random_vorticity_has_the_documented_law():
    z = torch.fft.fft2(flows(400, 24), norm="forward")
    for k in ((0, 1), (1, 0), (-2, 0), (3, -2)):
        variance = 2 * 7**3 * (4 * math.pi**2 * (k[0] ** 2 + k[1] ** 2) + 49) ** -2.5
        assert (z[:, k[0], k[1]].abs() ** 2).mean().item() == pytest.approx(variance, rel=0.2)
        assert (z[:, k[0], k[1]] ** 2).mean().abs().item() < 0.2 * variance  # no direction in the complex plane
    assert z[:, 0, 0].abs().max() < 1e-15
    assert z[:, 8:-7].abs().max() < 1e-15 and z[:, :, 8:-7].abs().max() < 1e-15


def test_a_random_field_is_one_function_at_every_resolution():
    fine = ns.random_vorticity(3, 192, seed=5)
    assert relative(ns.random_vorticity(3, 384, seed=5)[::2, ::2], fine) < 1e-14
    assert relative(ns.random_vorticity(3, 48, seed=5), fine[::4, ::4]) < 0.05  # but for its highest waves
    assert relative(ns.random_vorticity(4, 192, seed=5), fine) > 0.5
    assert relative(ns.random_vorticity(3, 192, seed=6), fine) > 0.5


def test_forcing_is_that_of_the_paper():
    x, y = (s.numpy() for s in grid(10))
    expected = 0.1 * (np.sin(2 * np.pi * (x + y)) + np.cos(2 * np.pi * (x + y)))
    np.testing.assert_allclose(ns.forcing(10).numpy(), expected, atol=1e-15)


ARGUMENTS = {"reynolds": 100.0, "time": 0.4, "dt": 0.1, "solve_resolution": 24, "progress": False}


def test_generate_gives_truncated_pairs():
    x, y = ns.generate(3, 12, seed=2, **ARGUMENTS)
    assert x.shape == y.shape == (3, 1, 12, 12) and x.dtype == y.dtype == torch.float32
    w0 = flows(3, 24, seed=2)
    w = ns.solve(w0, ns.forcing(24), 1 / (4 * math.pi**2 * 100), 0.4, 0.1)
    for found, field in ((x, w0), (y, w)):
        k = torch.fft.fftfreq(24, 1 / 24)
        low = (k.abs() < 6)[:, None] & (k.abs() < 6)
        expected = torch.fft.ifft2(torch.fft.fft2(field) * low).real[:, ::2, ::2]
        assert relative(found[:, 0].double(), expected) < 1e-6
    more, _ = ns.generate(5, 12, seed=2, **ARGUMENTS)
    assert torch.equal(more[:3], x)


def test_generate_keeps_its_result(tmp_path):
    x, y = ns.generate(2, 12, cache=tmp_path, **ARGUMENTS)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = ns.generate(2, 12, cache=tmp_path, **ARGUMENTS)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    assert file.stat().st_mtime_ns == before
    ns.generate(2, 12, cache=tmp_path, **{**ARGUMENTS, "time": 0.3})
    assert len(list(tmp_path.iterdir())) == 2
    file.write_bytes(file.read_bytes()[:300])
    with pytest.warns(UserWarning, match="cannot be used and is made again"):
        again = ns.generate(2, 12, cache=tmp_path, **ARGUMENTS)
    assert torch.equal(again[1], y)


# ---- bad input


W = torch.zeros(8, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w0": W[:, :6]}, ValueError, r"w0 must have shape \(..., n, n\).*got \(8, 6\)"),
        ({"w0": W.long()}, TypeError, "w0 must be a tensor.*got torch.int64"),
        ({"w0": [[0.0]]}, TypeError, "got list"),
        ({"w0": W + math.nan}, ValueError, "w0 must be finite"),
        ({"forcing": W[:4, :4]}, ValueError, r"forcing must have n x n points.*got \(4, 4\)"),
        ({"forcing": W.expand(3, 8, 8)}, ValueError, "broadcasts to that of w0"),
        ({"forcing": W.float()}, TypeError, "forcing must be a tensor of the dtype of w0"),
        ({"forcing": W / 0}, ValueError, "forcing must be finite"),
        ({"viscosity": -1.0}, ValueError, "viscosity must be finite and at least 0, got -1.0"),
        ({"viscosity": "thick"}, TypeError, "viscosity must be a number"),
        ({"time": 0.0}, ValueError, "time must be finite and over 0"),
        ({"dt": math.inf}, ValueError, "dt must be finite and over 0"),
        ({"snapshots": 0}, ValueError, "snapshots must be at least 1"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"w0": W, "forcing": None, "viscosity": 0.1, "time": 1.0, "dt": 0.1} | change
    with pytest.raises(error, match=message):
        ns.solve(**arguments)


def test_a_step_that_is_too_long_is_named_with_one_that_would_do():
    w0 = 100 * flows(1, 32)
    with pytest.raises(ValueError, match=r"dt must be at most .* at time 0, got steps of 0.05") as stop:
        ns.solve(w0, None, NU, time=0.1, dt=0.05)
    longest = float(str(stop.value).split("at most ")[1].split()[0])
    assert ns.solve(w0, None, NU, time=longest, dt=longest).isfinite().all()
    f = 1e3 * ns.forcing(32)  # fast enough only later
    with pytest.raises(ValueError, match=r"dt must be at most .* at time 0\.\d*[1-9]"):
        ns.solve(flows(1, 32), f, NU, time=1.0, dt=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"resolution": 3}, "resolution must be at least 4"),
        ({"reynolds": 0.0}, "reynolds must be finite and over 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"solve_resolution": 8}, "solve_resolution must be at least resolution = 12, got 8"),
    ],
)
def test_bad_data_set_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ns.generate(**({"n_samples": 1, "resolution": 12, **ARGUMENTS} | change))
