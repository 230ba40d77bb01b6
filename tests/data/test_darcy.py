"""The shipped Darcy set is the published one bit for bit; the generator solves the equation it says."""

import hashlib
import math

import numpy as np
import pytest
import torch

from torchlayers.data import darcy

# Of the tensors in the wheel neuraloperator==0.3.0: samples, sum of x, float64 sum of y, SHA-256 of x as bytes and of
# y as little-endian float32, both row-major.
PUBLISHED = {
    ("train", 16): (
        1000,
        127858,
        98896.79700605004,
        "f4534fbdfe40b9cdb6e22bc1f74a4df6b2f7531de3f0def249411220fe6db068",
        "2cddaae46a94fa0fcda19120fc46cc88c1d40170dcb1c719df42b9e4d5d233f1",
    ),
    ("test", 16): (
        50,
        6298,
        5100.886766330243,
        "a4de80cd3ea26199c973ab644feb657361407afd4e8e8c9c5e4b2aaa49b88178",
        "5546468917e6930b781ed1e41974a3082220c3d81543457a16ec166ad129001b",
    ),
    ("test", 32): (
        50,
        25237,
        20574.893969744626,
        "e29e5fb99c994e1eeda78386d9a6a443310b46e288de332a565f254c2ab1499a",
        "02ab58b64b1df0b5c59e764f08e13423983a22835aadcb4d026e708a3af034ea",
    ),
}


def grid(m):
    s = torch.linspace(0, 1, m + 1, dtype=torch.float64)
    return torch.meshgrid(s, s, indexing="ij")


def media(m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(m + 1, m + 1, generator=generator) > 0.5, 12.0, 3.0).double()


# ---- the shipped set


@pytest.mark.parametrize(("split", "resolution"), PUBLISHED)
def test_shipped_set_is_the_published_one(split, resolution):
    samples, sum_x, sum_y, hash_x, hash_y = PUBLISHED[split, resolution]
    x, y = darcy.load(split, resolution)
    assert x.shape == y.shape == (samples, 1, resolution, resolution)
    assert x.dtype == y.dtype == torch.float32
    assert x.double().sum().item() == sum_x
    assert y.double().sum().item() == pytest.approx(sum_y, rel=1e-14)
    assert hashlib.sha256(x.numpy().astype("u1").tobytes()).hexdigest() == hash_x
    assert hashlib.sha256(y.numpy().astype("<f4").tobytes()).hexdigest() == hash_y


def test_shipped_grid_and_equation_are_as_documented():
    (x16, y16), (x, y) = darcy.load("test", 16), darcy.load("test", 32)
    assert torch.equal(x16, x[..., ::2, ::2]) and torch.equal(y16, y[..., ::2, ::2])
    neighbours = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    curvature = (4 * y[..., 1:-1, 1:-1] - neighbours)[..., 1:-1, 1:-1] * 32**2
    share = torch.nn.functional.avg_pool2d(x, 5, 1)
    for phase, a in ((0, 0.02), (1, 0.36)):
        assert curvature[share == phase].median().item() == pytest.approx(1 / a, rel=5e-3)


def test_shipped_solutions_solve_the_documented_equation():
    x, y = darcy.load("test", 32)
    fine = ((torch.arange(4 * 32 + 1) + 2) // 4).clamp(max=31)  # each phase fills the square around its point
    for phase, expected in zip(x[:3, 0], y[:3, 0].double(), strict=True):
        u = darcy.solve(0.02 + 0.34 * phase.double()[fine][:, fine])[:-1:4, :-1:4]
        assert (u - expected).norm() / expected.norm() < 0.05


def test_loaded_tensors_belong_to_the_caller():
    first, _ = darcy.load("test", 16)
    first.zero_()
    assert darcy.load("test", 16)[0].sum() > 0


# ---- neuraloperator's own files


def save(folder, name="darcy_train_8.pt", **change):
    content = {"x": torch.rand(5, 8, 8) > 0.5, "y": torch.randn(5, 8, 8)} | change
    content = {key: value for key, value in content.items() if value is not None}
    torch.save(content, folder / name)
    return content


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "path"])
def test_load_reads_published_files(tmp_path, as_path):
    content = save(tmp_path)
    x, y = darcy.load("train", 8, root=as_path(tmp_path))
    assert x.dtype == y.dtype == torch.float32 and x.is_contiguous()
    assert torch.equal(x[:, 0], content["x"].float()) and torch.equal(y[:, 0], content["y"])


def test_root_is_read_even_where_the_set_is_shipped(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"darcy_test_16\.pt"):
        darcy.load("test", 16, root=tmp_path)


def test_load_accepts_a_channel_dimension_and_floating_phases(tmp_path):
    content = save(tmp_path, x=(torch.rand(3, 1, 8, 8) > 0.5).double(), y=torch.randn(3, 1, 8, 8).double())
    x, y = darcy.load("train", 8, root=tmp_path)
    assert torch.equal(x, content["x"].float()) and torch.equal(y, content["y"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, r"tensors 'x' and 'y', got the keys \['x'\]"),
        ({"y": [1.0]}, "tensors 'x' and 'y'"),
        ({"y": torch.randn(5, 8, 7)}, r"shape \(samples, 8, 8\), got \(5, 8, 8\) and \(5, 8, 7\)"),
        ({"x": torch.ones(4, 8, 8)}, r"got \(4, 8, 8\) and \(5, 8, 8\)"),
        ({"x": torch.ones(5, 16, 16), "y": torch.ones(5, 16, 16)}, r"got \(5, 16, 16\)"),
        ({"x": torch.full((5, 8, 8), 3.0)}, r"phases x that are 0 or 1, got values from 3\.0 to 3\.0"),
        ({"x": torch.full((5, 8, 8), math.nan)}, "phases x that are 0 or 1"),
        ({"y": torch.full((5, 8, 8), math.nan)}, "finite floating-point"),
        ({"y": torch.ones(5, 8, 8, dtype=torch.int64)}, "finite floating-point"),
    ],
)
def test_load_refuses_other_content(tmp_path, change, message):
    save(tmp_path, **change)
    with pytest.raises(ValueError, match=message) as caught:
        darcy.load("train", 8, root=tmp_path)
    assert "darcy_train_8.pt" in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x,y\n1,2\n"])
def test_load_names_an_unreadable_file(tmp_path, damage):
    save(tmp_path)
    path = tmp_path / "darcy_train_8.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"darcy_train_8\.pt must be a tensor file"):
        darcy.load("train", 8, root=tmp_path)


def test_load_runs_no_code_of_a_file(tmp_path):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"x": Payload(), "y": 0}, tmp_path / "darcy_test_8.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        darcy.load("test", 8, root=tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damage_to_the_shipped_file_is_noticed(tmp_path, monkeypatch, damage):
    content = bytearray(darcy._ARCHIVE.read_bytes())
    content[5000] ^= 1
    copy = tmp_path / "darcy.zip"
    copy.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    monkeypatch.setattr(darcy, "_ARCHIVE", copy)
    with pytest.raises(ValueError, match=r"darcy\.zip must be the data file of this package"):
        darcy.load("train", 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("trian", 16), ValueError, "did you mean 'train'"),
        (("train", 32), ValueError, r"shipped for split 'train' \(16\), got 32; .*root="),
        (("test", 64), ValueError, r"shipped for split 'test' \(16, 32\), got 64; .*darcy_test_64\.pt"),
        (("test", 16.0), TypeError, "resolution must be an int"),
        (("test", 0), ValueError, "resolution must be at least 1"),
    ],
)
def test_load_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        darcy.load(*arguments)


# ---- the solver


def order(errors, sizes):
    return math.log(errors[0] / errors[-1]) / math.log(sizes[-1] / sizes[0])


@pytest.mark.parametrize("varying", [0.0, 1.0], ids=["constant a", "smooth a"])
def test_solver_converges_with_order_two(varying):
    sizes, errors = (8, 16, 33), []
    for m in sizes:
        s, t = grid(m)
        a = 2 + varying * s * t
        u = torch.sin(math.pi * s) * torch.sin(2 * math.pi * t)
        gradient_a_u = (
            varying
            * math.pi
            * (
                t * torch.cos(math.pi * s) * torch.sin(2 * math.pi * t)
                + 2 * s * torch.sin(math.pi * s) * torch.cos(2 * math.pi * t)
            )
        )
        f = 5 * math.pi**2 * a * u - gradient_a_u
        errors.append((darcy.solve(a, f) - u).abs().max().item())
    assert 1.9 < order(errors, sizes) < 2.2


def test_solver_keeps_the_flux_over_a_jump():
    """u = p(s) sin(pi t) with a p' = 1 - c s: the flux is continuous, p has a kink where a jumps from 1 to 10."""
    a1, a2 = 1.0, 10.0
    c = 4 * (1 / a1 + 1 / a2) / (1 / a1 + 3 / a2)  # so that p(1) = 0
    sizes, errors = (9, 17, 33, 65), []  # odd, so that the jump at 1/2 lies between two points
    for m in sizes:
        s, t = grid(m)
        left = s < 0.5
        a = torch.where(left, a1, a2).double()
        integral = s - c * s**2 / 2
        middle = 0.5 - c / 8
        p = torch.where(left, integral / a1, middle / a1 + (integral - middle) / a2)
        u = p * torch.sin(math.pi * t)
        f = (c + math.pi**2 * a * p) * torch.sin(math.pi * t)
        errors.append((darcy.solve(a, f) - u).abs().max().item())
    assert errors[-1] < 1e-4
    assert order(errors, sizes) > 1.9


def test_solver_agrees_with_a_dense_matrix_from_the_energy():
    """The solution minimises the sum over edges of a_edge (du)^2 / 2 - f u / m^2; the matrix is that Hessian."""
    m = 6
    a, f = media(m), torch.randn(m + 1, m + 1, dtype=torch.float64)

    def energy(inner):
        u = torch.nn.functional.pad(inner.reshape(m - 1, m - 1), (1, 1, 1, 1))
        edges = 0.0
        for b, v in ((a, u), (a.T, u.T)):
            edges = edges + (2 / (1 / b[1:] + 1 / b[:-1]) * (v[1:] - v[:-1]) ** 2).sum() / 2
        return edges - (f * u).sum() / m**2

    zero = torch.zeros((m - 1) ** 2, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(energy, zero)
    gradient = torch.autograd.functional.jacobian(energy, zero)
    expected = torch.linalg.solve(hessian, -gradient).reshape(m - 1, m - 1)
    torch.testing.assert_close(darcy.solve(a, f)[1:-1, 1:-1], expected, rtol=1e-12, atol=1e-14)


def test_solver_obeys_the_maximum_principle():
    a = media(20)
    u = darcy.solve(a, torch.rand(21, 21))
    assert (u[1:-1, 1:-1] > 0).all()
    assert u[0].abs().sum() + u[-1].abs().sum() + u[:, 0].abs().sum() + u[:, -1].abs().sum() == 0
    around = torch.stack([u[:-2, 1:-1], u[2:, 1:-1], u[1:-1, :-2], u[1:-1, 2:]])
    assert (u[1:-1, 1:-1] > around.min(0).values).all()  # a source everywhere: no local minimum


@pytest.mark.parametrize("turn", [lambda v: v.T, lambda v: v.flip(0), lambda v: torch.rot90(v)])
def test_solver_commutes_with_the_symmetries_of_the_square(turn):
    a, f = media(13), torch.randn(14, 14, dtype=torch.float64)
    torch.testing.assert_close(darcy.solve(turn(a), turn(f)), turn(darcy.solve(a, f)), rtol=1e-11, atol=1e-14)


def test_solver_is_linear_in_f_and_inverse_in_a():
    a, f = media(9), torch.randn(10, 10, dtype=torch.float64)
    torch.testing.assert_close(darcy.solve(3 * a, 2 * f), darcy.solve(a, f) * 2 / 3, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(darcy.solve(a), darcy.solve(a, torch.ones(10, 10)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 5),), r"shape \(m \+ 1, m \+ 1\), m >= 2, got \(4, 5\)"),
        ((torch.ones(2, 2),), "m >= 2"),
        (([[1.0]],), "got list"),
        ((torch.zeros(4, 4),), "positive"),
        ((torch.full((4, 4), math.nan),), "positive"),
        ((torch.ones(4, 4), torch.ones(3, 3)), r"f must be .*\(4, 4\), got \(3, 3\)"),
    ],
)
def test_solver_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        darcy.solve(*arguments)


# ---- the generator


def test_generate_is_the_solution_of_its_medium():
    x, y = darcy.generate(2, 9, solve_resolution=9, progress=False)
    assert x.shape == y.shape == (2, 1, 9, 9) and x.dtype == y.dtype == torch.float32
    assert ((x == 0) | (x == 1)).all() and (y[..., 1:, 1:] > 0).all()
    phase = darcy._medium(0, 1, 9)
    assert torch.equal(x[1, 0], phase[:-1, :-1].float())
    assert torch.equal(y[1, 0], darcy.solve(torch.where(phase, 12.0, 3.0))[:-1, :-1].float())


def test_a_sample_depends_on_its_seed_and_index_alone():
    x, y = darcy.generate(3, 8, seed=5, solve_resolution=16, progress=False)
    x2, y2 = darcy.generate(2, 8, seed=5, solve_resolution=16, progress=False)
    assert torch.equal(x[:2], x2) and torch.equal(y[:2], y2)
    other, _ = darcy.generate(3, 8, seed=6, solve_resolution=16, progress=False)
    drawn = torch.cat([x, other]).flatten(1)
    assert len(drawn.unique(dim=0)) == 6


def test_generation_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    darcy.generate(1, 4, solve_resolution=4, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resolution_is_every_second_point_of_the_next():
    coarse, fine = (darcy.generate(2, n, solve_resolution=24, progress=False) for n in (6, 12))
    for c, f in zip(coarse, fine, strict=True):
        assert torch.equal(c, f[..., ::2, ::2])


def test_media_are_the_same_on_every_grid():
    assert torch.equal(darcy._medium(3, 0, 15), darcy._medium(3, 0, 45)[::3, ::3])


def test_default_grid_is_fine_and_odd_resolutions_work():
    x, y = darcy.generate(1, 11, progress=False)
    _, finer = darcy.generate(1, 11, solve_resolution=11 * 30, progress=False)
    assert x.shape == (1, 1, 11, 11)
    assert (y - finer).norm() / finer.norm() < 0.01


def test_coefficients_scale_the_solution():
    _, y = darcy.generate(1, 8, solve_resolution=16, progress=False)
    _, scaled = darcy.generate(1, 8, coefficients=(6, 24), solve_resolution=16, progress=False)
    torch.testing.assert_close(scaled, y / 2)


def test_media_follow_the_gaussian_law():
    """For a centred Gaussian field two points share a phase with probability 1/2 + asin(correlation) / pi."""
    points, count = [(2, 3), (2, 4), (3, 5), (8, 1), (0, 0)], 600
    phases = torch.stack([darcy._medium(1, i, 8) for i in range(count)])
    k = np.arange(128)
    variance = 1.0 / (np.pi**2 * (k[:, None] ** 2 + k**2) + 9) ** 2
    variance[0, 0] = 0
    norm = np.where(k == 0, 1.0, 2.0)

    def covariance(p, q):
        along = [norm * np.cos(np.pi * k * i / 8) * np.cos(np.pi * k * j / 8) for i, j in zip(p, q, strict=True)]
        return along[0] @ variance @ along[1]

    for p in points:
        for q in points:
            if p == q:
                expected = 0.5
                share = phases[:, p[0], p[1]].double().mean().item()
            else:
                correlation = covariance(p, q) / math.sqrt(covariance(p, p) * covariance(q, q))
                expected = 0.5 + math.asin(correlation) / math.pi
                share = (phases[:, p[0], p[1]] == phases[:, q[0], q[1]]).double().mean().item()
            assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count), (p, q)


def test_cache_returns_the_same_without_solving_again(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    first = darcy.generate(2, 6, solve_resolution=12, cache=folder, progress=False)
    assert len(list(folder.iterdir())) == 1
    plain = darcy.generate(2, 6, solve_resolution=12, progress=False)
    monkeypatch.setattr(darcy, "solve", None)
    again = darcy.generate(2, 6, solve_resolution=12, cache=folder, progress=False)
    for a, b, c in zip(first, plain, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.dtype == c.dtype


def test_cache_tells_all_arguments_apart(tmp_path):
    base = {"n_samples": 1, "resolution": 4, "seed": 0, "coefficients": (3, 12), "solve_resolution": 8}
    changes = {"n_samples": 2, "resolution": 8, "seed": 1, "coefficients": (3, 13), "solve_resolution": 16}
    for change in ({}, *({key: value} for key, value in changes.items())):
        darcy.generate(**base | change, cache=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 1 + len(changes)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other content"])
def test_damaged_cache_is_made_again(tmp_path, damage):
    first = darcy.generate(2, 4, solve_resolution=8, cache=tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "other content":
        torch.save({"x": torch.ones(1, 1, 4, 4), "y": torch.ones(1, 1, 4, 4)}, path)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.warns(UserWarning, match="cannot be used and is made again"):
        again = darcy.generate(2, 4, solve_resolution=8, cache=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert path.stat().st_size == len(content)


def test_interrupted_generation_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        darcy.generate(1, 4, solve_resolution=8, cache=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_samples": 0}, ValueError, "n_samples must be at least 1"),
        ({"resolution": 1}, ValueError, "resolution must be at least 2"),
        ({"resolution": "16"}, TypeError, "resolution must be an int"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"solve_resolution": 20}, ValueError, "multiple of resolution = 16, got 20"),
        ({"coefficients": (3, 0)}, ValueError, "coefficients must be positive"),
        ({"coefficients": (3, math.nan)}, ValueError, "coefficients must be positive"),
        ({"coefficients": 3}, ValueError, "coefficients must be two numbers"),
        ({"coefficients": (1, 2, 3)}, ValueError, "coefficients must be two numbers"),
    ],
)
def test_generate_refuses_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        darcy.generate(**{"n_samples": 1, "resolution": 16, "progress": False} | change)
