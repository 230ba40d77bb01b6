"""Darcy flow on the unit square: neuraloperator's small set, shipped with this package, and a generator.

The flow through a porous medium of two phases, ``-div(a grad u) = f`` with ``u = 0`` on the walls: the standard test
of neural operators (Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021,
section 5.2).

Index ``i`` of ``n`` stands for the point ``i / n``: index 0 lies on a wall, and the opposite wall is one spacing
beyond the last index, so that every second point of resolution 2n is resolution n.

What can be verified of the shipped set, whose publication says little of how it was made:

- The 16 x 16 test samples are every second point of the 32 x 32 ones, exactly.
- Where one phase fills a neighbourhood, the five-point ``-lap y`` at spacing 1/32 is 50.07 (median) in phase 0 and
  2.780 in phase 1: it solves the equation with ``f = 1``, ``a = 0.02`` in phase 0 and ``a = 0.36`` in phase 1.
  Solving with these on the phases shown gives ``y`` back within 4 %, the phases between the points being a guess.
- Values at index 0 are small (mean 0.003) but not 0: the original grid starts about a thousandth inside the wall.
- A few samples (12 of 1000 training ones, 1 of 50 test ones) dip below 0 at single points, down to -0.43, which the
  equation excludes. They are kept, since published numbers include them.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._checks import check_choice, check_int, require
from ._common import cached, chunks, standard_normal

__all__ = ["generate", "load", "solve"]

# (split, resolution) -> samples
_SHIPPED = {("train", 16): 1000, ("test", 16): 50, ("test", 32): 50}
_ARCHIVE = Path(__file__).parent / "files" / "darcy.zip"


def load(
    split: str, resolution: int = 16, *, root: str | os.PathLike[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Media and solutions of Darcy flow, as published with neuraloperator.

    Args:
        split: "train" or "test".
        resolution: points a side, n. Shipped with this package: 16 (1000 training and 50 test samples) and, for
            zero-shot super-resolution, 32 (50 test samples).
        root: None for the shipped set; else a folder with neuraloperator's own downloads, files named
            ``darcy_<split>_<n>.pt`` (https://zenodo.org/records/12784353 has 16, 32, 64, 128 and 421), and nothing
            but that folder is read.

    Returns:
        ``(x, y)``, float32 of shape (samples, 1, n, n): the phase of the medium at each point, 0 or 1 (the more
        permeable one), and the solution there.

    Raises:
        ValueError: no such split; a resolution that is not shipped; a file that is damaged or holds something else.
        FileNotFoundError: ``root`` has no such file.
    """
    check_choice("split", split, ("train", "test"))
    check_int("resolution", resolution)
    if root is not None:
        return _read_published(Path(root) / f"darcy_{split}_{resolution}.pt", resolution)
    if (split, resolution) not in _SHIPPED:
        shipped = ", ".join(str(n) for s, n in _SHIPPED if s == split)
        raise ValueError(
            f"resolution must be one of those shipped for split {split!r} ({shipped}), got {resolution}; for others "
            f"give root=, a folder with neuraloperator's darcy_{split}_{resolution}.pt, or use generate()"
        )
    if not _ARCHIVE.is_file():
        raise FileNotFoundError(f"{_ARCHIVE} must be there as part of this package; install it again")
    shape = (_SHIPPED[split, resolution], 1, resolution, resolution)
    try:
        with zipfile.ZipFile(_ARCHIVE) as archive:  # checks each member's CRC
            x, y = (archive.read(f"{split}_{resolution}/{key}") for key in "xy")
        return _unpack_bits(x).reshape(shape), _join_byte_planes(y).reshape(shape)
    except Exception as error:  # a damaged zip file fails in many ways
        raise ValueError(f"{_ARCHIVE} must be the data file of this package, got a damaged one: {error}") from error


# tools/pack_darcy.py writes what these two read.
def _unpack_bits(content: bytes) -> torch.Tensor:
    packed = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().float()


def _join_byte_planes(content: bytes) -> torch.Tensor:
    planes = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(4, -1).int()
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32)[:, None]
    return (planes << shifts).sum(0, dtype=torch.int32).view(torch.float32)


def _read_published(path: Path, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"root must hold {path.name} (neuraloperator's Darcy set, https://zenodo.org/records/12784353), got none "
            f"at {path}"
        )
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, not a zip file, a pickle that asks for more than tensors, ...
        raise ValueError(f"{path} must be a tensor file of torch.save, got one that cannot be read: {error}") from error
    return _checked_pair(data, path, resolution)


def _checked_pair(data: Any, path: Path, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of the dict ``data`` that ``path`` held, as float32 (samples, 1, n, n)."""
    if not isinstance(data, dict) or not all(isinstance(data.get(key), torch.Tensor) for key in "xy"):
        got = f"the keys {sorted(map(str, data))}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ValueError(f"{path} must hold a dict with the tensors 'x' and 'y', got {got}")
    x, y = data["x"], data["y"]
    if x.ndim == y.ndim == 3:
        x, y = x.unsqueeze(1), y.unsqueeze(1)
    if x.ndim != 4 or x.shape != y.shape or x.shape[1:] != (1, resolution, resolution):
        raise ValueError(
            f"{path} must hold x and y of shape (samples, {resolution}, {resolution}), got "
            f"{tuple(data['x'].shape)} and {tuple(data['y'].shape)}"
        )
    if not ((x == 0) | (x == 1)).all():
        raise ValueError(f"{path} must hold phases x that are 0 or 1, got values from {x.min()} to {x.max()}")
    if not y.dtype.is_floating_point or not y.isfinite().all():
        raise ValueError(f"{path} must hold finite floating-point solutions y, got {y.dtype}, NaN or infinity")
    return x.float().contiguous(), y.float().contiguous()


# The cosines that make up a medium. Independent of the resolution, so that a medium is one function of the plane.
_MODES = 128
# Intervals a side that are fine enough: the solution is within 1 % of that on 512, for a jump of 4 and one of 18.
_FINE = 128


def generate(
    n_samples: int,
    resolution: int,
    *,
    seed: int = 0,
    coefficients: Sequence[float] = (3.0, 12.0),
    solve_resolution: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random two-phase media and their Darcy flow for ``f = 1``, at any resolution.

    The medium is a Gaussian random field ``g ~ N(0, (-lap + 9)^-2)`` with zero normal derivative at the walls,

        g = sum_{k,l < 128} z_kl / (pi^2 (k^2 + l^2) + 9) c_k(s) c_l(t),   c_0 = 1, c_k(s) = sqrt(2) cos(pi k s),

    with independent normal ``z`` and no constant (``z_00 = 0``), cut at 0: phase 1 where ``g >= 0``, phase 0
    elsewhere. The flow is solved on a finer grid by :func:`solve` and read at every so many points. Sample i depends
    on (seed, i) alone: more samples extend a set, and a seed gives the same media at every resolution.

    With the default coefficients of the paper, 3 and 12, the solutions are of order 0.01. The shipped set
    (:func:`load`) has a jump of 18 instead of 4 and is of order 0.4: ``coefficients=(0.02, 0.36)`` gives its scale,
    with media that are alike but not drawn from quite the same law (its phases change a little more often).

    Args:
        n_samples: samples.
        resolution: points a side, n, at least 2.
        seed: a non-negative int.
        coefficients: ``a`` in phase 0 and in phase 1, positive.
        solve_resolution: intervals a side of the grid that the flow is solved on, a multiple of ``resolution``; None
            takes the smallest multiple that is at least 128. Time and memory grow with its square and a little more:
            35 ms a sample at 128, 0.8 s at 421, on one core.
        cache: a folder to keep the result in, under a name made of all arguments; a second call reads it from there.
            A file there that is damaged is made again, with a warning.
        progress: a progress bar (none where standard error isn't a terminal).

    Returns:
        ``(x, y)``, float32 of shape (n_samples, 1, n, n), as :func:`load` gives them.

    Raises:
        ValueError, TypeError: an argument is out of range.
        ImportError: scipy or tqdm is missing; the message names the extra that brings them.
    """
    check_int("n_samples", n_samples)
    check_int("resolution", resolution, minimum=2)
    check_int("seed", seed, minimum=0)
    low, high = _check_coefficients(coefficients)
    if solve_resolution is None:
        solve_resolution = resolution * math.ceil(_FINE / resolution)
    check_int("solve_resolution", solve_resolution, minimum=2)
    if solve_resolution % resolution:
        raise ValueError(f"solve_resolution must be a multiple of resolution = {resolution}, got {solve_resolution}")

    key = {
        "seed": seed,
        "coefficients": [low, high],
        "solve_resolution": solve_resolution,
        "modes": _MODES,
    }
    shape = (n_samples, 1, resolution, resolution)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        x, y = torch.empty(shape), torch.empty(shape)
        step = solve_resolution // resolution
        for (i,) in chunks(n_samples, 1, what=f"Darcy {resolution}", progress=progress):
            phase = _medium(seed, i, solve_resolution)
            u = solve(torch.where(phase, high, low))
            x[i, 0], y[i, 0] = phase[:-1:step, :-1:step], u[:-1:step, :-1:step]
        return x, y

    return cached(cache, f"darcy_{n_samples}x{resolution}", key, shape, make)


def solve(a: torch.Tensor, f: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Solve ``-div(a grad u) = f`` on the unit square, ``u = 0`` on the walls, in float64.

    Five-point finite differences on a grid of m x m intervals; the coefficient between two points is the harmonic
    mean of theirs, which keeps the flux continuous over a jump. The error falls as ``1/m^2`` where ``a`` is smooth. The
    matrix is symmetric and an M-matrix, so that ``f >= 0`` gives ``u >= 0``. A sparse direct solve.

    Args:
        a: the coefficient at the grid points, walls included, shape (m + 1, m + 1), positive, m >= 2.
        f: the source, a number or a tensor of the same shape.

    Returns:
        u at the grid points, float64 of the same shape, 0 on the walls.
    """
    if not isinstance(a, torch.Tensor) or a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 3:
        got = tuple(a.shape) if isinstance(a, torch.Tensor) else type(a).__name__
        raise ValueError(f"a must be a tensor of shape (m + 1, m + 1), m >= 2, got {got}")
    if not ((a > 0) & (a < math.inf)).all():
        raise ValueError(f"a must be positive and finite, got values from {a.min()} to {a.max()}")
    if isinstance(f, torch.Tensor) and f.ndim and f.shape != a.shape:
        raise ValueError(f"f must be a number or of the shape of a, {tuple(a.shape)}, got {tuple(f.shape)}")
    scipy_sparse = require("scipy.sparse", extra="data")
    splu = require("scipy.sparse.linalg", extra="data").splu

    a = a.detach().to("cpu", torch.float64)
    source = torch.as_tensor(f).detach().to("cpu", torch.float64).expand(a.shape)
    m = len(a) - 1
    down = 2 * a[1:] * a[:-1] / (a[1:] + a[:-1])  # between (i, j) and (i + 1, j)
    right = 2 * a[:, 1:] * a[:, :-1] / (a[:, 1:] + a[:, :-1])
    diagonal = (down[1:] + down[:-1])[:, 1:-1] + (right[:, 1:] + right[:, :-1])[1:-1]
    to_right = right[1:-1, 1:].clone()
    to_right[:, -1] = 0  # the wall: no coupling from a row's end to the next row's start
    east, south = -to_right.flatten()[:-1].numpy(), -down[1:-1, 1:-1].flatten().numpy()
    matrix = scipy_sparse.diags_array(
        [diagonal.flatten().numpy(), east, east, south, south],
        offsets=[0, 1, -1, m - 1, 1 - m],
        format="csc",
    )
    # Symmetric and positive definite: the ordering may be that of the graph, and no pivot is needed.
    factors = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    u = torch.zeros_like(a)
    inner = factors.solve((source[1:-1, 1:-1] / m**2).flatten().numpy())
    u[1:-1, 1:-1] = torch.from_numpy(inner).reshape(m - 1, m - 1)
    return u


def _check_coefficients(coefficients: Sequence[float]) -> tuple[float, float]:
    try:
        low, high = map(float, coefficients)
    except (TypeError, ValueError):
        raise ValueError(f"coefficients must be two numbers, got {coefficients!r}") from None
    if not (0 < low < math.inf and 0 < high < math.inf):
        raise ValueError(f"coefficients must be positive and finite, got {coefficients!r}")
    return low, high


def _medium(seed: int, index: int, m: int) -> torch.Tensor:
    """The phase, bool, at the (m + 1)^2 grid points, walls included."""
    z = standard_normal(seed, index, (_MODES, _MODES))
    z[0, 0] = 0
    k = torch.arange(_MODES, dtype=torch.float64)
    z /= math.pi**2 * (k[:, None] ** 2 + k**2) + 9
    # Whole numbers modulo the period first: cosines of large arguments would differ between m and 2m in the last bits.
    turns = torch.arange(m + 1)[:, None] * torch.arange(_MODES) % (2 * m)
    basis = torch.cos(math.pi * turns.double() / m)
    basis[:, 1:] *= math.sqrt(2)
    return basis @ z @ basis.T >= 0
