"""Burgers' equation on the unit circle: a pseudo-spectral solver and a generator.

    ∂u/∂t + u ∂u/∂x = ν ∂²u/∂x²,   x in [0, 1), periodic

Waves steepen into fronts of width ν / |u|, which then decay: Li et al., "Fourier Neural Operator for Parametric Partial
Differential Equations" (ICLR 2021, section 5.1). Index i of n stands for the point i/n.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from .._checks import check_int
from ._common import cached, chunks, standard_normal
from ._spectral import Grid, check_field, check_positive, integrate, snapshot_times, truncate

__all__ = ["generate", "random_velocity", "solve"]


def solve(u0: Tensor, viscosity: float, time: float, dt: float, *, snapshots: int | None = None) -> Tensor:
    """The velocity at ``time`` from ``u0``.

    Pseudo-spectral with the 2/3 rule; in time the diffusion is exact and the rest of fourth order. The grid must
    resolve the fronts: without enough viscosity the solution rings.

    Args:
        u0: velocity at time 0, (..., n), float64. float32 is taken too, and gives its precision.
        viscosity: ν, over 0.
        time: when to stop, over 0.
        dt: the longest step: the time (each interval between snapshots) is cut into the fewest equal steps that are
            no longer. A step for which the flow is too fast is an error, not a wrong result.
        snapshots: None for the velocity at ``time``; a number m for those at time/m, 2·time/m, ..., time.

    Returns:
        (..., n), or (..., m, n) with snapshots, in the dtype and on the device of u0.

    Raises:
        ValueError: shapes, numbers out of range, NaN; or dt too long somewhere on the way, with what would do there.
        TypeError: other types.

    Example:

        >>> u0 = torch.sin(2 * torch.pi * torch.arange(128, dtype=torch.float64) / 128)
        >>> solve(u0, viscosity=0.05, time=0.5, dt=0.005).shape
        torch.Size([128])
    """
    check_field("u0", u0, 1)
    viscosity = check_positive("viscosity", viscosity)
    time, dt = check_positive("time", time), check_positive("dt", dt)
    times = snapshot_times(time, snapshots)
    grid = Grid(u0.shape[-1], 1, u0)
    slope = -0.5j * grid.k[0] * grid.kept  # of u²/2

    def nonlinear(v: Tensor) -> tuple[Tensor, Tensor]:
        u = grid.inverse(grid.kept * v)
        rate = grid.largest * u.abs().amax() if v.numel() else torch.zeros(())
        return slope * grid.forward(u**2), rate

    found = integrate(grid.forward(u0), -viscosity * grid.square, nonlinear, times, dt)
    fields = [grid.inverse(v) for v in found]
    return fields[0] if snapshots is None else torch.stack(fields, -2)


# Waves of a random field, so many and no more: it is then one function at every resolution.
_WAVES = 64


def random_velocity(index: int, resolution: int, *, seed: int = 0) -> Tensor:
    """Sample ``index`` of the Gaussian random field N(0, 625 (-∂²/∂x² + 25)^-2) of Li et al.: float64, (n,), mean 0.

        u = Σ_k a_k exp(2πi k x),    E |a_k|² = (25 / (4π² k² + 25))²,    0 < |k| < min(64, n/3)

    with independent complex normals a_k (and a_-k their conjugates). Of standard deviation 0.6. It depends on
    (seed, index) alone, but for n/3.
    """
    n = check_int("resolution", resolution, minimum=4)
    z = torch.view_as_complex(standard_normal(seed, index, (_WAVES, 2))) * math.sqrt(0.5)
    z[0] = 0
    z *= 25 / (4 * math.pi**2 * torch.arange(_WAVES, dtype=torch.float64) ** 2 + 25)
    top = min(_WAVES, -(-n // 3))
    spectrum = torch.zeros(n // 2 + 1, dtype=torch.complex128)
    spectrum[:top] = z[:top]
    return torch.fft.irfft(spectrum, n=n, norm="forward")


def generate(
    n_samples: int,
    resolution: int,
    *,
    viscosity: float = 0.01,
    time: float = 1.0,
    dt: float = 1e-3,
    seed: int = 0,
    solve_resolution: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Random velocities, and what they become after ``time``.

    Solved on a finer grid in float64, from :func:`random_velocity`, and truncated in the spectrum (|k| < n/2). Sample
    i depends on (seed, i) alone: more samples extend a set.

    Args:
        n_samples: samples.
        resolution: points, n.
        viscosity: ν, over 0.
        time: between input and output.
        dt: the longest step, see :func:`solve`.
        seed: a non-negative int.
        solve_resolution: points of the grid that it is solved on, at least ``resolution``; by default ``resolution``,
            but at least 256.
        cache: a folder to keep the result in, under a name made of all arguments; a second call reads it from there.
        progress: a progress bar (none where standard error is no terminal).

    Returns:
        ``(x, y)``, float32 of shape (n_samples, 1, n): the velocity at time 0 and at ``time``.

    Raises:
        ValueError, TypeError: an argument out of range; dt too long for the flow.
        ImportError: numpy or tqdm is missing; the message names the extra that brings them.
    """
    check_int("n_samples", n_samples)
    n = check_int("resolution", resolution, minimum=4)
    check_int("seed", seed, minimum=0)
    viscosity, time, dt = (
        check_positive(name, value) for name, value in (("viscosity", viscosity), ("time", time), ("dt", dt))
    )
    fine = check_int("solve_resolution", max(n, 256) if solve_resolution is None else solve_resolution)
    if fine < n:
        raise ValueError(f"solve_resolution must be at least resolution = {n}, got {fine}")

    def make() -> tuple[Tensor, Tensor]:
        x = torch.empty(n_samples, 1, n)
        y = torch.empty_like(x)
        for part in chunks(n_samples, max(1, 2**16 // fine), what=f"Burgers {n}", progress=progress):
            u0 = torch.stack([random_velocity(i, fine, seed=seed) for i in part])
            u = solve(u0, viscosity, time, dt)
            rows = slice(part.start, part.stop)
            x[rows, 0], y[rows, 0] = (truncate(field, n, 1).float() for field in (u0, u))
        return x, y

    key = {
        "n_samples": n_samples,
        "resolution": n,
        "viscosity": viscosity,
        "time": time,
        "dt": dt,
        "seed": seed,
        "solve_resolution": fine,
        "waves": _WAVES,
    }
    return cached(cache, f"burgers_{n_samples}x{n}", key, (n_samples, 1, n), make)
