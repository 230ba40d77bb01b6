"""Waves on a membrane with an interface between two media: a finite-element solver and a data set of trajectories.

On the unit square, held at its walls and released at rest,

    ∂²u/∂t² = div(c² grad u),    u = 0 on the walls,    u = u0 and ∂u/∂t = 0 at time 0.

Index [i, j] of a field of n × n points, walls included, stands for the point (x, y) = (i h, j h), h = 1/(n - 1).

Space: bilinear elements (Q1) on the squares of the raster, assembled by scikit-fem, with the mass lumped onto the
nodes, so that a step solves no system. Time: leapfrog. Both are of second order.

The problem of arXiv 2304.04964, whose data are not public: fields of waves from random sources, of which a surrogate
learns to forecast the next ones.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_dtype, check_int, check_ndim, require
from ._common import cached, chunks
from ._spectral import check_positive

__all__ = ["SPLITS", "WaveDataset", "energy", "random_trajectory", "simulate"]

SPLITS = ("train", "val", "test")
# Default time step as a fraction of the longest stable one.
_COURANT = 0.5


def simulate(u0: Tensor, speed: float | Tensor, *, steps: int, dt: float | None = None) -> Tensor:
    r"""The wave that starts from ``u0`` at rest, at the times 0, dt, ..., steps · dt.

    Leapfrog, with the lumped mass M and the stiffness K of the bilinear elements::

        u_1 = u_0 - dt²/2 M⁻¹ K u_0,    u_{k+1} = 2 u_k - u_{k-1} - dt² M⁻¹ K u_k,    K_ab = ∫ c² grad φ_a · grad φ_b

    It keeps :func:`energy` to rounding. No element has an eigenvalue over 4 c² / h², hence neither has M⁻¹ K: the
    scheme is stable where dt ≤ h / max c (the CFL bound).

    Args:
        u0: the displacement at time 0, (n, n), n ≥ 3, real and finite. Its values on the walls don't count: the
            membrane is held at 0 there.
        speed: c > 0: a number, or its values at the points, (n, n), bilinear between them.
        steps: time steps, at least 0.
        dt: time step; 0.5 h / max c by default.

    Returns:
        (steps + 1, n, n), the displacement in the dtype and on the device of ``u0``; computed in float64 on the CPU.

    Raises:
        ValueError: shapes; numbers out of range, NaN; dt over the CFL bound.
        TypeError: other types.
        ImportError: scikit-fem is missing; the message names the extra that brings it.

    Example:

        >>> s = torch.linspace(0, 1, 33, dtype=torch.float64)
        >>> mode = torch.sin(math.pi * s)[:, None] * torch.sin(math.pi * s)
        >>> u = simulate(mode, 1.0, steps=64)  # dt = 1/64: until time 1
        >>> bool((u[-1] - mode * math.cos(math.sqrt(2) * math.pi)).abs().max() < 5e-3)
        True
    """
    check_ndim("u0", u0, 2, "(n, n)")
    c = _check_speed("u0", u0, speed)
    check_int("steps", steps, minimum=0)
    dt = _check_dt(dt, c)
    mass, stiffness = _matrices(c)
    rate = stiffness.multiply(dt**2 / mass[:, None]).tocsr()
    n = len(u0)
    u = torch.zeros(steps + 1, n, n, dtype=torch.float64)
    u[0, 1:-1, 1:-1] = u0.detach()[1:-1, 1:-1]
    held = u.flatten(1).numpy()  # a view
    inner = _inner(n)
    for k in range(steps):
        force = (rate @ held[k])[inner]
        if k == 0:
            held[1, inner] = held[0, inner] - force / 2
        else:
            held[k + 1, inner] = 2 * held[k, inner] - held[k - 1, inner] - force
    return u.to(u0)


def energy(u: Tensor, speed: float | Tensor, *, dt: float | None = None) -> Tensor:
    """The energy of a wave between its snapshots, ½ vᵀ M v + ½ u_{k+1}ᵀ K u_k with v = (u_{k+1} - u_k) / dt.

    It approximates ½ ∫ (∂u/∂t)² + c² |grad u|², and :func:`simulate` keeps it to rounding.

    Args:
        u: successive snapshots, (m, n, n), m ≥ 2.
        speed, dt: as in :func:`simulate`.

    Returns:
        (m - 1,), float64.

    Raises:
        ValueError, TypeError, ImportError: as :func:`simulate`.
    """
    check_ndim("u", u, 3, "(snapshots, n, n)")
    if len(u) < 2:
        raise ValueError(f"u must have at least 2 snapshots, got {len(u)}")
    c = _check_speed("u", u, speed)
    dt = _check_dt(dt, c)
    mass, stiffness = _matrices(c)
    held = u.detach().to("cpu", torch.float64).flatten(1).numpy()
    kinetic = ((held[1:] - held[:-1]) / dt) ** 2 @ mass
    potential = (held[1:].T * (stiffness @ held[:-1].T)).sum(0)
    return torch.from_numpy((kinetic + potential) / 2)


def random_trajectory(split: str, index: int, resolution: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Trajectory ``index`` of a split: its displacement at time 0 and its speed of waves.

    Sources: one to three Gaussian pulses, of width σ in [0.04, 0.08], amplitude in [-1, 1] and centre in [0.2, 0.8]²,
    times ``16 x (1 - x) y (1 - y)``, which brings them to 0 at the walls. Media: ``c = 1.25 + 0.25 tanh(d / 0.05)``,
    from 1 to 1.5, d the distance from a line through a point of [0.25, 0.75]² in any direction. All uniform.

    A trajectory depends on (seed, split, index) alone, and is one pair of functions at every resolution.

    Returns:
        ``(u0, speed)``, float64, (n, n) each.
    """
    check_choice("split", split, SPLITS)
    check_int("index", index, minimum=0)
    check_int("resolution", resolution, minimum=3)
    check_int("seed", seed, minimum=0)
    # NumPy's seeding keeps the streams of (seed, split, index) apart.
    generator = require("numpy", extra="wave").random.default_rng((seed, SPLITS.index(split), index))
    s = torch.linspace(0, 1, resolution, dtype=torch.float64)
    x, y = s[:, None], s
    u0 = torch.zeros(resolution, resolution, dtype=torch.float64)
    for _ in range(int(generator.integers(1, 4))):
        a, b = generator.uniform(0.2, 0.8, 2).tolist()
        width, height = generator.uniform(0.04, 0.08), generator.uniform(-1, 1)
        u0 += height * torch.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * width**2))
    u0 *= 16 * x * (1 - x) * y * (1 - y)
    angle = generator.uniform(0, 2 * math.pi)
    a, b = generator.uniform(0.25, 0.75, 2).tolist()
    distance = (x - a) * math.cos(angle) + (y - b) * math.sin(angle)
    return u0, 1.25 + 0.25 * torch.tanh(distance / 0.05)


class WaveDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Windows of the trajectories of random waves: some snapshots and the speed, and the snapshots that follow.

    The trajectories of :func:`random_trajectory`, solved by :func:`simulate`. The splits share no trajectory, whatever
    their sizes; trajectory i of a split depends on (seed, i) alone: more trajectories extend a set.

    A sample is ``(x, y)``: x of shape (history + 1, n, n), the snapshots t - history + 1, ..., t and after them the
    speed; y of shape (horizon, n, n), the snapshots t + 1, ..., t + horizon. Samples go trajectory by trajectory.

    Args:
        split: "train", "val" or "test".
        trajectories: how many.
        seed: a non-negative int.
        resolution: points a side, n, walls included.
        snapshots: kept of each trajectory, the one at time 0 included.
        every: time steps of the solver between snapshots, of 0.5 h / 1.5 each (1.5 being the largest speed of all).
        history, horizon: snapshots that a sample has before and after the present.
        cache: a folder to keep the trajectories in, under a name made of all arguments that they depend on; a second
            call reads them from there. A file there that is damaged is made again, with a warning.
        progress: a progress bar (none where standard error is no terminal).

    Attributes:
        waves: (trajectories, snapshots, n, n), float32.
        speed: (trajectories, n, n), float32.
        time_step: between snapshots.

    Raises:
        ValueError, TypeError: an argument out of range; a window that is longer than a trajectory.
        ImportError: scikit-fem, numpy or tqdm is missing; the message names the extra that brings it.

    Example:

        >>> data = WaveDataset("train", trajectories=2, resolution=17, snapshots=6)
        >>> len(data), *(tuple(t.shape) for t in data[0])
        (8, (3, 17, 17), (1, 17, 17))
    """

    def __init__(
        self,
        split: str = "train",
        trajectories: int = 32,
        seed: int = 0,
        *,
        resolution: int = 33,
        snapshots: int = 24,
        every: int = 2,
        history: int = 2,
        horizon: int = 1,
        cache: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ):
        check_choice("split", split, SPLITS)
        check_int("resolution", resolution, minimum=3)
        check_int("seed", seed, minimum=0)
        for name, value in (("trajectories", trajectories), ("snapshots", snapshots), ("every", every)):
            check_int(name, value)
        self.history, self.horizon = check_int("history", history), check_int("horizon", horizon)
        self.windows = snapshots - history - horizon + 1
        if self.windows < 1:
            raise ValueError(
                f"history + horizon must be at most snapshots = {snapshots}, got {history} + {horizon}: no window fits"
            )
        # One time step for all, that of the fastest medium: a surrogate learns one map.
        dt = _COURANT / (resolution - 1) / 1.5
        self.time_step = every * dt
        shape = (trajectories, snapshots, resolution, resolution)

        def make() -> tuple[Tensor, Tensor]:
            waves, speeds = torch.empty(shape), torch.empty(trajectories, 1, resolution, resolution)
            for (i,) in chunks(trajectories, 1, what=f"waves {split}", progress=progress):
                u0, speed = random_trajectory(split, i, resolution, seed=seed)
                waves[i] = simulate(u0, speed, steps=every * (snapshots - 1), dt=dt)[::every]
                speeds[i, 0] = speed
            return waves, speeds.expand(shape)  # in the shape of the waves for the cache, without its size

        key = {"split": split, "seed": seed, "every": every, "dt": dt, "law": 1}
        name = f"wave_{split}_{'x'.join(map(str, shape[:3]))}"
        self.waves, speeds = cached(cache, name, key, shape, make)
        self.speed = speeds[:, 0].contiguous()

    def __len__(self) -> int:
        return len(self.waves) * self.windows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
        trajectory, start = divmod(index % len(self), self.windows)
        past, future = self.waves[trajectory, start : start + self.history + self.horizon].split(
            [self.history, self.horizon]
        )
        return torch.cat([past, self.speed[trajectory, None]]), future.clone()


def _check_speed(name: str, u: Tensor, speed: float | Tensor) -> Tensor:
    """The speed at the points, float64 on the CPU, after checks of it and of the fields ``u`` (..., n, n)."""
    check_dtype(name, u, kind="real")
    points = u.shape[-2:]
    if points[0] != points[1] or points[0] < 3:
        raise ValueError(f"{name} must have n x n points, n >= 3, got shape {tuple(u.shape)}")
    if not bool(u.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if not isinstance(speed, Tensor):
        speed = torch.tensor(check_positive("speed", speed), dtype=torch.float64)
    check_dtype("speed", speed, kind="real")
    if speed.shape not in (points, ()):
        raise ValueError(
            f"speed must be a number or have the points of {name}, {tuple(points)}, got {tuple(speed.shape)}"
        )
    c = speed.detach().to("cpu", torch.float64).expand(points)
    if not bool(((c > 0) & (c < math.inf)).all()):
        raise ValueError(f"speed must be finite and over 0, got values from {c.min()} to {c.max()}")
    return c


def _check_dt(dt: float | None, c: Tensor) -> float:
    bound = 1 / (len(c) - 1) / float(c.max())
    if dt is None:
        return _COURANT * bound
    dt = check_positive("dt", dt)
    if dt > bound * (1 + 1e-12):
        raise ValueError(f"dt must be at most h / max speed = {bound:.6g} (the CFL bound), got {dt:.6g}")
    return dt


def _inner(n: int) -> Any:
    """The numbers of the points off the walls, in the order of the raster."""
    return torch.arange(n * n).reshape(n, n)[1:-1, 1:-1].flatten().numpy()


@functools.lru_cache(maxsize=4)
def _elements(n: int) -> tuple[Any, Any, Any]:
    """The finite-element space on n × n points, its degrees of freedom in the order of the raster, the lumped mass."""
    numpy, skfem = require("numpy", extra="wave"), require("skfem", extra="wave")
    s = numpy.linspace(0, 1, n)
    basis = skfem.Basis(skfem.MeshQuad.init_tensor(s, s), skfem.ElementQuad1())
    # scikit-fem promises no order of its degrees of freedom, only their places.
    i, j = numpy.rint(basis.doflocs * (n - 1)).astype(int)
    order = numpy.argsort(i * n + j)
    # The sum of a row of the mass matrix: the test function against the sum of all others, which is 1.
    mass = skfem.LinearForm(lambda v, w: v).assemble(basis)[order]
    return basis, order, mass


def _matrices(c: Tensor) -> tuple[Any, Any]:
    """Lumped mass (n²,) and stiffness (n², n²), sparse, walls included, in the order of the raster."""
    numpy, skfem = require("numpy", extra="wave"), require("skfem", extra="wave")
    dot, grad = (getattr(require("skfem.helpers", extra="wave"), name) for name in ("dot", "grad"))
    basis, order, mass = _elements(len(c))
    nodal = numpy.empty(c.numel())
    nodal[order] = c.flatten().numpy()
    form = skfem.BilinearForm(lambda u, v, w: w["speed"] ** 2 * dot(grad(u), grad(v)))
    stiffness = form.assemble(basis, speed=basis.interpolate(nodal)).tocsr()
    return mass, stiffness[order][:, order]
