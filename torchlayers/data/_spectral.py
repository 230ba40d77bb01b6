"""What the pseudo-spectral solvers share: wavenumbers, dealiasing, truncation, and time stepping.

Fields are periodic with period 1 along their last axes; index i of n stands for the point i / n.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._checks import check_int

__all__ = ["Grid", "check_field", "check_positive", "integrate", "snapshot_times", "truncate"]

# The stability limit of the four stages on the imaginary axis: rates times steps beyond it grow without bound.
_REACH = 2 * math.sqrt(2)


def check_field(name: str, w: object, n_dim: int) -> Tensor:
    """``w`` is a finite float32 or float64 tensor whose last ``n_dim`` axes have the same size, at least 4."""
    layout = "(..., " + ", ".join("n" * n_dim) + ")"
    if not isinstance(w, Tensor) or w.dtype not in (torch.float32, torch.float64):
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"{name} must be a tensor {layout} in float64 (or float32), got {got}")
    if w.ndim < n_dim or len(set(w.shape[w.ndim - n_dim :])) != 1 or w.shape[-1] < 4:
        raise ValueError(f"{name} must have shape {layout}, n at least 4, got {tuple(w.shape)}")
    if not w.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return w


def check_positive(name: str, value: object, *, zero: bool = False) -> float:
    """``value`` is a finite number over 0 (or 0, where ``zero``)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not (0 < value < math.inf or (zero and value == 0)):
        raise ValueError(f"{name} must be finite and {'at least' if zero else 'over'} 0, got {value}")
    return float(value)


class Grid:
    """The wavenumbers 2πk of the real FFT of a field of n points an axis, and the 2/3 rule.

    Attributes:
        k: the 2πk along each axis, in shapes that broadcast over the spectrum.
        square: Σ (2πk)².
        kept: 1 at |k| < n/3 along every axis, else 0: products of two fields of such waves are free of aliases there.
        largest: the largest 2πk that is kept.
    """

    def __init__(self, n: int, n_dim: int, like: Tensor):
        def along(axis: int, values: Tensor) -> Tensor:
            return values.to(like).view([-1 if a == axis else 1 for a in range(n_dim)])

        signed = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
        signed = [signed] * (n_dim - 1) + [torch.arange(n // 2 + 1, dtype=torch.float64)]
        self.n, self.axes = n, tuple(range(-n_dim, 0))
        self.k = [along(axis, 2 * math.pi * values) for axis, values in enumerate(signed)]
        self.square = torch.zeros((), dtype=torch.float64, device=like.device)
        self.kept = torch.ones((), dtype=like.dtype, device=like.device)
        for axis, values in enumerate(signed):
            self.square = self.square + self.k[axis].double() ** 2
            self.kept = self.kept * along(axis, 3 * values.abs() < n)
        self.largest = 2 * math.pi * ((n - 1) // 3)

    # MKL takes no empty batch.
    def forward(self, w: Tensor) -> Tensor:
        if not w.numel():
            return w.new_empty(*w.shape[:-1], self.n // 2 + 1, dtype=w.dtype.to_complex())
        return torch.fft.rfftn(w, dim=self.axes)

    def inverse(self, v: Tensor) -> Tensor:
        if not v.numel():
            return v.new_empty(*v.shape[:-1], self.n, dtype=v.dtype.to_real())
        return torch.fft.irfftn(v, s=(self.n,) * len(self.axes), dim=self.axes)


def truncate(w: Tensor, n: int, n_dim: int) -> Tensor:
    """The part of ``w`` with wavenumbers |k| < n/2 along its last axes (one or two), on a grid of n points each."""
    size = w.shape[-1]
    if n > size:
        raise ValueError(f"n must be at most the field's {size} points, got {n}")
    axes = tuple(range(-n_dim, 0))
    v = torch.fft.rfftn(w, dim=axes, norm="forward")
    positive = (n + 1) // 2  # wavenumbers from 0 on; all but 0 have a negative one
    out = v.new_zeros(*w.shape[: w.ndim - n_dim], *(n,) * (n_dim - 1), n // 2 + 1)
    if n_dim == 1:
        out[..., :positive] = v[..., :positive]
    else:
        rows = torch.arange(1 - positive, positive)
        out[..., rows % n, :positive] = v[..., rows % size, :positive]
    return torch.fft.irfftn(out, s=(n,) * n_dim, dim=axes, norm="forward")


def integrate(
    v: Tensor,
    linear: Tensor,
    nonlinear: Callable[[Tensor], tuple[Tensor, Tensor]],
    times: Sequence[float],
    dt: float,
) -> list[Tensor]:
    """Solutions of ``v' = linear v + nonlinear(v)`` at ``times``, from ``v`` at time 0.

    Exponential time differencing with four Runge-Kutta stages (Cox & Matthews, J. Comput. Phys. 176, 2002, section
    3.3): the linear part is exact, the rest of fourth order.

    Args:
        v: complex.
        linear: real, at most 0, float64, of shapes that broadcast with v.
        nonlinear: the rest, and with it the largest rate (a 0-d tensor, in radians a unit of time) at which it turns
            any wave.
        times: increasing.
        dt: the longest step. Each interval is cut into the fewest equal steps that are no longer.

    Raises:
        ValueError: dt is too long for a rate that came up, or the solution is not finite.
    """
    found, now, coefficients, length = [], 0.0, None, -1.0
    for time in times:
        steps = max(1, math.ceil((time - now) / dt - 1e-9))
        step = (time - now) / steps
        if coefficients is None or not math.isclose(step, length, rel_tol=1e-12):
            coefficients, length = _coefficients(linear, step, v), step
        half, whole, stage, first, middle, last = coefficients
        for i in range(steps):
            n0, rate = nonlinear(v)
            if not float(rate) * step <= _REACH:
                fastest = float(rate)
                wanted = f"at most {0.995 * _REACH / fastest:.3g}" if math.isfinite(fastest) else "shorter"
                raise ValueError(
                    f"dt must be {wanted} for the flow at time {now + i * step:.4g}, got steps of {step:.3g}"
                )
            v_half = half * v
            a = v_half + stage * n0
            na = nonlinear(a)[0]
            nb = nonlinear(v_half + stage * na)[0]
            nc = nonlinear(half * a + stage * (2 * nb - n0))[0]
            v = whole * v + first * n0 + middle * (na + nb) + last * nc
        now = time
        if not v.abs().isfinite().all():
            raise ValueError(
                f"dt must be shorter: the solution at time {now:.4g} is not finite, got steps of {step:.3g}"
            )
        found.append(v)
    return found


def _coefficients(linear: Tensor, h: float, like: Tensor) -> tuple[Tensor, ...]:
    """The scheme's e^{z/2}, e^z and weights at z = h · linear, in the real dtype of ``like``.

    The weights have removable singularities at z = 0, so each is taken as its mean over a circle around z (Kassam &
    Trefethen, SIAM J. Sci. Comput. 26, 2005), of which conjugate points need only one half.
    """
    z = h * linear
    stage, first, middle, last = (torch.zeros_like(z) for _ in range(4))
    points = 16
    for j in range(points):
        r = z + cmath.exp(1j * math.pi * (j + 0.5) / points)
        e = torch.exp(r)
        stage += (torch.expm1(r / 2) / r).real
        first += ((-4 - r + e * (4 - 3 * r + r**2)) / r**3).real
        middle += ((2 + r + e * (r - 2)) / r**3).real
        last += ((-4 - 3 * r - r**2 + e * (4 - r)) / r**3).real
    weights = (h / points * stage, h / points * first, 2 * h / points * middle, h / points * last)
    return tuple(t.to(like.real.dtype) for t in (torch.exp(z / 2), torch.exp(z), *weights))


def snapshot_times(time: float, snapshots: int | None) -> list[float]:
    """The times of the snapshots, or ``time`` alone."""
    if snapshots is None:
        return [time]
    check_int("snapshots", snapshots)
    return [time * (j + 1) / snapshots for j in range(snapshots)]
