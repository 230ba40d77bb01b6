"""Waves by finite elements: against exact modes, products of one-dimensional elements, and their invariants."""

import itertools
import math
import sys

import pytest
import torch

from torchlayers.data import wave

np = pytest.importorskip("numpy", reason="numpy is not installed")
pytest.importorskip("skfem", reason="scikit-fem is not installed")


def points(n):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def smooth(n):
    """An initial displacement without symmetry, and a speed."""
    x, y = points(n)[:, None], points(n)
    u0 = torch.exp(-((x - 0.35) ** 2 + (y - 0.6) ** 2) / 0.02) * x * (1 - x) * y * (1 - y) * 16
    return u0, 1 + 0.3 * torch.sin(2 * x + 1) * torch.cos(3 * y)


# ---- the scheme


def test_modes_converge_with_order_two():
    errors = []
    for n in (17, 33, 65):
        mode = torch.sin(math.pi * points(n))[:, None] * torch.sin(math.pi * points(n))
        u = wave.simulate(mode, 1.0, steps=2 * (n - 1))  # until time 1
        errors.append(relative(u[-1] - mode * math.cos(math.sqrt(2) * math.pi) + mode, mode))
    assert errors[0] < 0.02
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2], abs=0.03)


def test_waves_in_a_varying_medium_converge_with_order_two():
    ends = []
    for n in (17, 33, 65, 129):
        u0, speed = smooth(n)
        u = wave.simulate(u0, speed, steps=n - 1, dt=0.5 / (n - 1))
        ends.append(u[-1, :: (n - 1) // 16, :: (n - 1) // 16])
    gaps = [(a - b).norm().item() for a, b in itertools.pairwise(ends)]
    assert [math.log2(a / b) for a, b in itertools.pairwise(gaps)] == pytest.approx([2, 2], abs=0.25)


def elements(n, weight):
    """Stiffness and mass of linear elements on [0, 1] with a weight, by Gauss's rule of six points."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    h = 1 / (n - 1)
    stiffness, mass = np.zeros((2, n, n))
    for e in range(n - 1):
        t = (nodes + 1) / 2
        shapes, values = np.stack([1 - t, t]), weight((e + t) * h) * weights * h / 2
        slopes = np.array([[-1.0], [1.0]]) / h * np.ones_like(t)
        part = slice(e, e + 2)
        stiffness[part, part] += (slopes * values) @ slopes.T
        mass[part, part] += (shapes * values) @ shapes.T
    return stiffness, mass


def test_equals_leapfrog_of_kronecker_products_in_a_layered_medium():
    # The speed varies along the first axis only: the two-dimensional elements are products of one-dimensional ones.
    n, steps, dt = 12, 40, 0.04
    k, m = elements(n, lambda s: np.ones_like(s))
    k_c, m_c = elements(n, lambda s: (1 + 0.8 * s) ** 2)
    inner = np.arange(n * n).reshape(n, n)[1:-1, 1:-1].ravel()
    matrix = ((np.kron(k_c, m) + np.kron(m_c, k)) * (n - 1) ** 2)[np.ix_(inner, inner)]
    values, vectors = np.linalg.eigh(matrix)
    u0 = np.random.default_rng(0).standard_normal((n, n))
    # Modes oscillate with the frequencies of leapfrog, cos θ = 1 - dt² λ / 2.
    angles = np.arccos(1 - dt**2 * values / 2)
    modes = vectors.T @ u0.ravel()[inner]
    expected = np.cos(np.arange(steps + 1)[:, None] * angles) * modes @ vectors.T
    speed = (1 + 0.8 * points(n))[:, None].expand(n, n)
    found = wave.simulate(torch.from_numpy(u0), speed, steps=steps, dt=dt)
    assert np.abs(found[:, 1:-1, 1:-1].flatten(1).numpy() - expected).max() < 1e-11
    assert found[:, 0].abs().max() == found[:, :, -1].abs().max() == 0
    assert wave.simulate(torch.from_numpy(u0), speed, steps=2).shape == (3, n, n)


def test_energy_is_that_of_the_continuum_and_is_kept():
    n = 65
    mode = torch.sin(math.pi * points(n))[:, None] * torch.sin(math.pi * points(n))
    found = wave.energy(wave.simulate(mode, 2.0, steps=30), 2.0)
    assert found.shape == (30,)
    assert found[0].item() == pytest.approx(4 * math.pi**2 / 4, rel=1e-3)  # ½ ∫ c² |grad u|²
    u0, speed = smooth(17)
    for fraction in (0.3, 0.99):  # of the CFL bound
        dt = fraction / 16 / speed.max().item()
        values = wave.energy(wave.simulate(u0, speed, steps=400, dt=dt), speed, dt=dt)
        assert ((values - values[0]).abs().max() / values[0]).item() < 1e-12


def test_the_cfl_bound_is_stable_and_sharp():
    n = 17
    noise = torch.randn(n, n, dtype=torch.float64)
    bound = 1 / 16 / 1.25
    stable = wave.simulate(noise, 1.25, steps=2000, dt=bound)
    assert stable.abs().max() < 100 * noise.abs().max()
    with pytest.raises(ValueError, match=r"dt must be at most h / max speed = 0\.05 \(the CFL bound\), got 0\.0505"):
        wave.simulate(noise, 1.25, steps=1, dt=1.01 * bound)
    speed = torch.ones(n, n)
    speed[3, 5] = 1.25
    with pytest.raises(ValueError, match="CFL"):
        wave.simulate(noise, speed, steps=1, dt=1.01 * bound)
    # Just over the largest eigenvalue's limit the scheme does blow up: the bound is not a cautious one.
    mass, stiffness = wave._matrices(torch.full((n, n), 1.25, dtype=torch.float64))
    inner = wave._inner(n)
    top = np.linalg.eigvalsh(stiffness.toarray()[np.ix_(inner, inner)] / mass[inner][0])[-1]
    assert bound <= 2 / math.sqrt(top) < 1.03 * bound


def test_default_step_is_half_the_bound():
    u0, speed = smooth(9)
    dt = 0.5 / 8 / speed.max().item()
    assert torch.equal(wave.simulate(u0, speed, steps=5), wave.simulate(u0, speed, steps=5, dt=dt))
    # Steps that scale with the speed make a uniform medium's snapshots the same for every speed.
    assert relative(wave.simulate(u0, 3.0, steps=20), wave.simulate(u0, 1.0, steps=20)) < 1e-13


def test_symmetries_of_the_square():
    u0, speed = smooth(13)
    u = wave.simulate(u0, speed, steps=25)
    assert relative(wave.simulate(u0.T, speed.T, steps=25), u.mT) < 1e-13
    assert relative(wave.simulate(u0.flip(0), speed.flip(0), steps=25), u.flip(1)) < 1e-13
    assert relative(wave.simulate(-2 * u0, speed, steps=25), -2 * u) < 1e-13
    assert relative(u.mT, u) > 0.1


def test_dtype_and_walls_are_those_of_the_docstring():
    u0, speed = smooth(9)
    u = wave.simulate(u0.float() + 1, speed.float(), steps=4)
    assert u.dtype == torch.float32
    assert torch.equal(u[0, 1:-1, 1:-1], (u0.float() + 1)[1:-1, 1:-1])
    assert u[:, 0].abs().max() == u[:, -1].abs().max() == u[:, :, 0].abs().max() == 0
    assert wave.simulate(u0, 1, steps=0).shape == (1, 9, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u0": torch.zeros(4, 5)}, ValueError, r"u0 must have n x n points, n >= 3, got shape \(4, 5\)"),
        ({"u0": torch.zeros(2, 2)}, ValueError, "n >= 3"),
        ({"u0": torch.zeros(1, 5, 5)}, ValueError, "u0 must have 2 dimensions"),
        ({"u0": [[0.0]]}, TypeError, "u0 must be a tensor"),
        ({"u0": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "u0 must have a real floating-point dtype"),
        ({"u0": torch.full((5, 5), math.nan)}, ValueError, "u0 must be finite"),
        ({"speed": 0.0}, ValueError, "speed must be finite and over 0"),
        ({"speed": "fast"}, TypeError, "speed must be a number"),
        ({"speed": torch.ones(5, 4)}, ValueError, r"points of u0, \(5, 5\), got \(5, 4\)"),
        ({"speed": torch.zeros(5, 5)}, ValueError, "speed must be finite and over 0, got values from 0"),
        ({"speed": torch.ones(5, 5, dtype=torch.complex64)}, TypeError, "speed must have a real"),
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 2.0}, TypeError, "steps must be an int"),
        ({"dt": 0.0}, ValueError, "dt must be finite and over 0"),
        ({"dt": math.nan}, ValueError, "dt must be finite"),
        ({"dt": 0.3}, ValueError, "CFL"),
    ],
)
def test_bad_input_of_the_solver(change, error, message):
    arguments = {"u0": torch.zeros(5, 5), "speed": 1.0, "steps": 1} | change
    with pytest.raises(error, match=message):
        wave.simulate(arguments.pop("u0"), arguments.pop("speed"), **arguments)


def test_bad_input_of_the_energy():
    with pytest.raises(ValueError, match="u must have at least 2 snapshots, got 1"):
        wave.energy(torch.zeros(1, 5, 5), 1.0)
    with pytest.raises(ValueError, match="u must have 3 dimensions"):
        wave.energy(torch.zeros(5, 5), 1.0)


@pytest.mark.parametrize("module", ["skfem", "tqdm"])
def test_what_is_missing_names_its_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    wave._elements.cache_clear()
    with pytest.raises(ImportError, match=rf"{module} is needed here and not installed: pip install"):
        wave.WaveDataset("train", trajectories=1, resolution=7, snapshots=3)


# ---- the data set


def small(split="train", trajectories=2, seed=0, **options):
    options = {"resolution": 11, "snapshots": 7, "progress": False} | options
    return wave.WaveDataset(split, trajectories=trajectories, seed=seed, **options)


def test_is_bitwise_reproducible_and_extends():
    first, again, longer = small(), small(), small(trajectories=4)
    assert torch.equal(first.waves, again.waves) and torch.equal(first.speed, again.speed)
    assert torch.equal(first.waves, longer.waves[:2]) and torch.equal(first.speed, longer.speed[:2])
    assert not torch.equal(first.waves, small(seed=1).waves)


def test_no_two_trajectories_of_any_split_are_alike():
    sets = [small(split, trajectories=3) for split in wave.SPLITS]
    for part in ("waves", "speed"):
        fields = torch.cat([getattr(s, part) for s in sets]).flatten(1)
        gaps = torch.cdist(fields, fields) + torch.eye(9) * 1e9
        assert gaps.min() > 1e-2


def test_samples_are_windows_of_simulated_trajectories():
    data = small(history=3, horizon=2, every=3)
    assert len(data) == 2 * (7 - 5 + 1)
    dt = data.time_step / 3
    assert dt == pytest.approx(0.5 / 10 / 1.5)
    for index in range(len(data)):
        trajectory, start = divmod(index, 3)
        u0, speed = wave.random_trajectory("train", trajectory, 11)
        u = wave.simulate(u0, speed, steps=18, dt=dt)[::3].float()
        x, y = data[index]
        assert x.shape == (4, 11, 11) and y.shape == (2, 11, 11)
        assert torch.equal(x, torch.cat([u[start : start + 3], speed[None].float()]))
        assert torch.equal(y, u[start + 3 : start + 5])
    assert torch.equal(data[-1][0], data[len(data) - 1][0])
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match="index must be in"):
            data[index]
    x, y = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert x.shape == (4, 4, 11, 11) and y.shape == (4, 2, 11, 11)


def test_random_trajectories_follow_their_law():
    found = [wave.random_trajectory("val", i, 33) for i in range(60)]
    waves, speeds = (torch.stack(parts) for parts in zip(*found, strict=True))
    assert waves[:, 0].abs().max() < 1e-12 and waves[:, :, -1].abs().max() < 1e-12
    assert 0.1 < waves.abs().amax((1, 2)).median() < 1
    assert (waves.amax((1, 2)) > 0.1).any() and (waves.amin((1, 2)) < -0.1).any()
    assert speeds.min() >= 1 and speeds.max() <= 1.5
    # An interface in each: both media are there.
    assert (speeds.amax((1, 2)) - speeds.amin((1, 2))).min() > 0.3
    for coarse, fine in zip(wave.random_trajectory("val", 3, 17), found[3], strict=True):
        torch.testing.assert_close(coarse, fine[::2, ::2], rtol=0, atol=1e-13)


def test_cache_is_read_and_a_damaged_one_made_again(tmp_path):
    first = small(cache=tmp_path)
    (path,) = tmp_path.iterdir()
    # The speed is kept once, not once a snapshot.
    assert path.stat().st_size < 1.5 * (first.waves.numel() + first.speed.numel()) * 4 + 4096
    written = path.stat().st_mtime_ns
    again = small(cache=tmp_path)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(first.waves, again.waves) and torch.equal(first.speed, again.speed)
    small(cache=tmp_path, split="test")
    small(cache=tmp_path, every=1)
    assert len(list(tmp_path.iterdir())) == 3
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be used and is made again"):
        assert torch.equal(small(cache=tmp_path).waves, first.waves)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "trian"}, ValueError, "split must be one of .* did you mean 'train'"),
        ({"trajectories": 0}, ValueError, "trajectories must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"resolution": 2}, ValueError, "resolution must be at least 3"),
        ({"horizon": 6}, ValueError, r"at most snapshots = 7, got 2 \+ 6: no window fits"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"history": 0}, ValueError, "history must be at least 1"),
    ],
)
def test_bad_input_of_the_data_set(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)
