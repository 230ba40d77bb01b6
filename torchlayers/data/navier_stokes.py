"""Forced two-dimensional flow on the unit torus, by its vorticity: a pseudo-spectral solver and a generator.

For the vorticity ``w`` and the velocity ``(u, v)`` on [0, 1)², periodic,

    ∂w/∂t + u ∂w/∂x + v ∂w/∂y = ν Δw + f,    u = ∂ψ/∂y,  v = -∂ψ/∂x,  -Δψ = w.

Index [i, j] of a field of n × n points stands for the point (x, y) = (i/n, j/n). The mean of w has no velocity.

The problem of Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations" (ICLR 2021, section
5.3), and of the multi-grid tensorized operator (arXiv 2310.00120).
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from .._checks import check_int
from ._common import cached, chunks, standard_normal
from ._spectral import Grid, check_field, check_positive, integrate, snapshot_times, truncate

__all__ = ["forcing", "generate", "random_vorticity", "solve", "spectra", "velocity"]


def solve(
    w0: Tensor,
    forcing: Tensor | None,
    viscosity: float,
    time: float,
    dt: float,
    *,
    snapshots: int | None = None,
) -> Tensor:
    """The vorticity at ``time`` of flows that start from ``w0``.

    Pseudo-spectral: waves of |k| < n/3 along both axes move each other, without aliases (the 2/3 rule), so that the
    flow without viscosity and forcing keeps its energy and enstrophy; what w0 has beyond that only diffuses. In time
    the diffusion is exact and the rest of fourth order.

    Args:
        w0: vorticity at time 0, (..., n, n), float64. float32 is taken too, and gives its precision.
        forcing: f, constant in time, of a shape that broadcasts to w0's and in its dtype; None for none.
        viscosity: ν, at least 0.
        time: when to stop, over 0.
        dt: the longest step: the time (each interval between snapshots) is cut into the fewest equal steps that are
            no longer. A step for which the flow is too fast is an error, not a wrong result.
        snapshots: None for the vorticity at ``time``; a number m for those at time/m, 2·time/m, ..., time.

    Returns:
        (..., n, n), or (..., m, n, n) with snapshots, in the dtype and on the device of w0.

    Raises:
        ValueError: shapes, numbers out of range, NaN; or dt too long somewhere on the way, with what would do there.
        TypeError: other types, or forcing of another dtype than w0.

    Example:

        >>> s = torch.arange(32, dtype=torch.float64) / 32
        >>> w0 = 2 * torch.cos(2 * torch.pi * s)[:, None] * torch.cos(2 * torch.pi * s)  # Taylor & Green
        >>> w = solve(w0, None, viscosity=0.01, time=1.0, dt=0.1)
        >>> torch.allclose(w, w0 * math.exp(-8 * torch.pi**2 * 0.01))
        True
    """
    check_field("w0", w0, 2)
    viscosity = check_positive("viscosity", viscosity, zero=True)
    time, dt = check_positive("time", time), check_positive("dt", dt)
    times = snapshot_times(time, snapshots)
    grid = Grid(w0.shape[-1], 2, w0)
    source = _source(forcing, w0, grid)
    to_velocity = [factor * grid.kept for factor in _velocity_factors(grid)]
    kx, ky = grid.k
    # u·∇w is the curl of div(u ⊗ u): two products, uv and v² - u², take four transforms, u ∂w/∂x + v ∂w/∂y five.
    shear, stretch = (kx**2 - ky**2) * grid.kept, kx * ky * grid.kept

    def nonlinear(w: Tensor) -> tuple[Tensor, Tensor]:
        u, v = (grid.inverse(factor * w) for factor in to_velocity)
        rate = grid.largest * (u.abs() + v.abs()).amax() if w.numel() else torch.zeros(())
        out = shear * grid.forward(u * v) + stretch * grid.forward(v**2 - u**2)
        return (out if source is None else out + source), rate

    found = integrate(grid.forward(w0), -viscosity * grid.square, nonlinear, times, dt)
    fields = [grid.inverse(v) for v in found]
    return fields[0] if snapshots is None else torch.stack(fields, -3)


def velocity(w: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity (u, v), each (..., n, n), of the vorticity ``w`` (..., n, n); its mean is 0."""
    check_field("w", w, 2)
    grid = Grid(w.shape[-1], 2, w)
    spectrum = grid.forward(w)
    return tuple(grid.inverse(factor * spectrum) for factor in _velocity_factors(grid))  # type: ignore[return-value]


def spectra(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energy and enstrophy by wavenumber.

    Shell k = 0, 1, ..., n // 2 - 1 gathers the waves with k - 1/2 ≤ |k| < k + 1/2, and the corners of the spectrum
    beyond the last shell are left out; over all waves the sums would be ``mean(u² + v²) / 2`` and ``mean(w²) / 2``.

    Args:
        w: vorticity (..., n, n).

    Returns:
        ``(k, energy, enstrophy)``: (n // 2,), and (..., n // 2) each.
    """
    check_field("w", w, 2)
    n = w.shape[-1]
    k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=w.device)
    square = k[:, None] ** 2 + k**2
    density = (torch.fft.fft2(w, norm="forward").abs() ** 2 / 2).flatten(-2)
    shell = (square.sqrt() + 0.5).long().flatten()
    inside = shell < n // 2
    index = shell[inside].expand(*w.shape[:-2], -1)
    enstrophy, energy = (
        w.new_zeros(*w.shape[:-2], n // 2).scatter_add(-1, index, density[..., inside] * weight.to(w.dtype))
        for weight in (torch.ones_like(square).flatten()[inside], _inverse(4 * math.pi**2 * square).flatten()[inside])
    )
    return torch.arange(n // 2, device=w.device), energy, enstrophy


def forcing(resolution: int) -> Tensor:
    """The forcing of Li et al., ``0.1 (sin 2π(x + y) + cos 2π(x + y))``: float64, (n, n)."""
    n = check_int("resolution", resolution)
    i = torch.arange(n)
    angle = 2 * math.pi * ((i[:, None] + i) % n).double() / n
    return 0.1 * (angle.sin() + angle.cos())


# Waves of a random field, so many along each axis and no more: it is then one function at every resolution.
_WAVES = 64


def random_vorticity(index: int, resolution: int, *, seed: int = 0) -> Tensor:
    """Sample ``index`` of a Gaussian random field: float64, (n, n), of mean 0.

        w = Σ_k a_k exp(2πi k·(x, y)),    E |a_k|² = 2 · 7³ (4π² |k|² + 49)^(-5/2),    0 < |k|, and |k_j| < min(64, n/3)

    with independent complex normals a_k (and a_-k their conjugates): what the data generator of Li et al. draws (their
    text has 7^(3/2) for 2 · 7³). Of standard deviation 0.27, with velocities up to 0.1. It
    depends on (seed, index) alone, but for n/3.
    """
    n, m = check_int("resolution", resolution, minimum=4), _WAVES
    z = torch.view_as_complex(standard_normal(seed, index, (2 * m - 1, m, 2))) * math.sqrt(0.5)
    # Rows are the k of the first axis from 1 - m to m - 1. In the column 0 of the second, -k is the conjugate.
    z[: m - 1, 0] = z[m:, 0].flip(0).conj()
    z[m - 1, 0] = 0
    k = torch.arange(m, dtype=torch.float64)
    rows = torch.cat((-k[1:].flip(0), k))
    z *= math.sqrt(2) * 7**1.5 * (4 * math.pi**2 * (rows[:, None] ** 2 + k**2) + 49) ** -1.25
    top = min(m, -(-n // 3))  # the first wavenumber that is left out
    spectrum = torch.zeros(n, n // 2 + 1, dtype=torch.complex128)
    kept = torch.arange(1 - top, top)
    spectrum[kept % n, :top] = z[m - top : m - 1 + top, :top]
    return torch.fft.irfft2(spectrum, s=(n, n), norm="forward")


def generate(
    n_samples: int,
    resolution: int,
    *,
    reynolds: float = 500.0,
    time: float = 3.0,
    dt: float = 0.02,
    seed: int = 0,
    solve_resolution: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Random vorticities, and what they become under :func:`forcing` after ``time``.

    Solved on a finer grid in float64, from :func:`random_vorticity`, and truncated in the spectrum (|k| < n/2). Sample
    i depends on (seed, i) alone: more samples extend a set.

    Args:
        n_samples: samples.
        resolution: points a side, n.
        reynolds: 1/ν on a torus of side 2π, which is ν = 1/(4π² reynolds) on ours.
        time: between input and output.
        dt: the longest step, see :func:`solve`; 0.02 is short enough for a grid of 256² points.
        seed: a non-negative int.
        solve_resolution: points a side of the grid that it is solved on, at least ``resolution``; 2 n, but at least 64,
            by default.
        cache: a folder to keep the result in, under a name made of all arguments; a second call reads it from there.
        progress: a progress bar (none where standard error is no terminal).
        device: where it is solved. Another device changes the last digits, and the name in the cache does not say it.

    Returns:
        ``(x, y)``, float32 of shape (n_samples, 1, n, n), on the CPU: the vorticity at time 0 and at ``time``.

    Raises:
        ValueError, TypeError: an argument out of range; dt too long for the flow.
        ImportError: numpy or tqdm is missing; the message names the extra that brings them.
    """
    check_int("n_samples", n_samples)
    n = check_int("resolution", resolution, minimum=4)
    check_int("seed", seed, minimum=0)
    reynolds, time, dt = (
        check_positive(name, value) for name, value in (("reynolds", reynolds), ("time", time), ("dt", dt))
    )
    fine = check_int("solve_resolution", max(2 * n, 64) if solve_resolution is None else solve_resolution)
    if fine < n:
        raise ValueError(f"solve_resolution must be at least resolution = {n}, got {fine}")

    def make() -> tuple[Tensor, Tensor]:
        x = torch.empty(n_samples, 1, n, n)
        y = torch.empty_like(x)
        f = forcing(fine).to(device)
        # A core's cache holds a few fields; a GPU wants many.
        at_once = max(1, (2**16 if f.device.type == "cpu" else 2**23) // fine**2)
        for part in chunks(n_samples, at_once, what=f"Navier-Stokes {n}", progress=progress):
            w0 = torch.stack([random_vorticity(i, fine, seed=seed) for i in part]).to(device)
            w = solve(w0, f, 1 / (4 * math.pi**2 * reynolds), time, dt)
            rows = slice(part.start, part.stop)
            x[rows, 0], y[rows, 0] = (truncate(field, n, 2).cpu().float() for field in (w0, w))
        return x, y

    key = {
        "n_samples": n_samples,
        "resolution": n,
        "reynolds": reynolds,
        "time": time,
        "dt": dt,
        "seed": seed,
        "solve_resolution": fine,
        "waves": _WAVES,
    }
    return cached(cache, f"navier_stokes_{n_samples}x{n}", key, (n_samples, 1, n, n), make)


def _source(f: Tensor | None, w0: Tensor, grid: Grid) -> Tensor | None:
    if f is None:
        return None
    if not isinstance(f, Tensor) or f.dtype != w0.dtype:
        got = f.dtype if isinstance(f, Tensor) else type(f).__name__
        raise TypeError(f"forcing must be a tensor of the dtype of w0, {w0.dtype}, or None, got {got}")
    if f.device != w0.device:
        raise ValueError(f"forcing must be on the device of w0 ({w0.device}), got {f.device}")
    try:
        fits = f.shape[-2:] == w0.shape[-2:] and torch.broadcast_shapes(f.shape, w0.shape) == w0.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"forcing must have n x n points and a shape that broadcasts to that of w0, {tuple(w0.shape)}, got "
            f"{tuple(f.shape)}"
        )
    if not f.isfinite().all():
        raise ValueError("forcing must be finite, got NaN or infinity")
    return grid.forward(f)


def _velocity_factors(grid: Grid) -> tuple[Tensor, Tensor]:
    """What multiplies the spectrum of w to give those of u and v. The unpaired wave of an even grid has none."""
    kx, ky = grid.k
    inverse = _inverse(grid.square).to(kx.dtype)
    if grid.n % 2 == 0:
        paired = [k.abs() < math.pi * grid.n * (1 - 1e-6) for k in (kx, ky)]
        inverse = inverse * paired[0] * paired[1]
    return 1j * ky * inverse, -1j * kx * inverse


def _inverse(square: Tensor) -> Tensor:
    """1 / square, and 0 for 0."""
    return torch.where(square > 0, 1 / square.clamp(min=1e-300), 0.0)
