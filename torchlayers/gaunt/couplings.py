"""Which parts of features a product couples, and the weights that lift parts to signals and lower them again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backend import BACKENDS
from .._checks import check_choice, check_dtype, check_size
from .coefficients import bracket_scale, gaunt_scale
from .functional import METHODS
from .irreps import FlatIrreps, Part, constants, e3nn_o3, join_degrees, split_degrees, spread_over_degrees


@dataclass(frozen=True)
class Coupling:
    """One product of two signals.

    Attributes:
        antisymmetric: the Poisson bracket rather than the pointwise product.
        sign1, sign2, sign_out: 1 for a true signal, -1 for a pseudo-signal.
        degrees1, degrees2, degrees_out: the degrees that have a path here.
        variances: for each of ``degrees_out`` the variance of a component, summed over its paths, where the factors'
            components and the paths' weights have variance 1.
    """

    antisymmetric: bool
    sign1: int
    sign2: int
    degrees1: tuple[int, ...]
    degrees2: tuple[int, ...]
    degrees_out: tuple[int, ...]
    variances: tuple[float, ...]

    @property
    def sign_out(self) -> int:
        return -self.sign1 * self.sign2 if self.antisymmetric else self.sign1 * self.sign2

    @property
    def lmax1(self) -> int:
        return self.degrees1[-1]

    @property
    def lmax2(self) -> int:
        return self.degrees2[-1]

    @property
    def lmax_out(self) -> int:
        return self.degrees_out[-1]


def couplings_of(
    first: Mapping[int, Sequence[int]],
    second: Mapping[int, Sequence[int]],
    out: Mapping[int, Sequence[int]],
    antisymmetric: bool,
    squared: bool = False,
) -> list[Coupling]:
    """All couplings between signals, given as sign -> degrees. ``squared``: both factors are the same features."""
    found = []
    for sign1, degrees1 in first.items():
        for sign2, degrees2 in second.items():
            if squared and sign1 < sign2:  # the pair in the other order is the same product
                continue
            for odd in (False, True) if antisymmetric else (False,):
                degrees3 = out.get(-sign1 * sign2 if odd else sign1 * sign2, ())
                scale = bracket_scale if odd else gaunt_scale
                variance: dict[tuple[int, int, int], float] = {}
                for path in ((l1, l2, l3) for l1 in degrees1 for l2 in degrees2 for l3 in degrees3):
                    size = scale(*path) ** 2 / (2 * path[2] + 1)
                    if squared and sign1 == sign2 and path[0] == path[1]:
                        # x against itself: the product counts each pair twice, the bracket cancels.
                        size *= 0 if odd else 2
                    if size:
                        variance[path] = size
                if variance:
                    used1, used2, used3 = (tuple(sorted({path[i] for path in variance})) for i in range(3))
                    sums = tuple(sum(v for path, v in variance.items() if path[2] == l3) for l3 in used3)
                    found.append(Coupling(odd, sign1, sign2, used1, used2, used3, sums))
    return found


def signals_of(flat: FlatIrreps) -> dict[int, tuple[int, ...]]:
    return {sign: flat.degrees(sign) for sign in flat.signs}


def reachable_irreps(couplings: Iterable[Coupling], multiplicity: int) -> Any:
    parts = {(degree, c.sign_out * (-1) ** degree) for c in couplings for degree in c.degrees_out}
    o3 = e3nn_o3()
    return o3.Irreps([(multiplicity, o3.Irrep(*part)) for part in sorted(parts)])


def path_scales(out: FlatIrreps, couplings: Sequence[Coupling], because: str) -> dict[Part, float]:
    """part of the output -> what brings its components to variance 1.

    Raises:
        ValueError: a part that no coupling reaches, by name.
    """
    variance = dict.fromkeys(out.muls, 0.0)
    for coupling in couplings:
        for degree, value in zip(coupling.degrees_out, coupling.variances, strict=True):
            variance[coupling.sign_out, degree] += value
    check_reached(out, [part for part, value in variance.items() if value == 0], because)
    return {part: 1 / math.sqrt(value) for part, value in variance.items()}


def check_reached(out: FlatIrreps, unreached: Sequence[Part], because: str) -> None:
    if unreached:
        names = ", ".join(str(e3nn_o3().Irrep(degree, sign * (-1) ** degree)) for sign, degree in unreached)
        raise ValueError(f"{out.name} must hold only what {because} reaches, got {out.irreps} with {names}")


# --------------------------------------------------------------------------------------------------------- weights


def parts_of(sign: int, degrees: Sequence[int], signal: Tensor) -> dict[Part, Tensor]:
    pieces = split_degrees(signal)
    return {(sign, degree): pieces[degree] for degree in degrees}


def add_to(total: dict[Part, Tensor], parts: Mapping[Part, Tensor]) -> None:
    for key, part in parts.items():
        total[key] = total[key] + part if key in total else part


class DegreeWeights:
    """A number a channel and degree, for each of ``rank`` terms: (rank, channels, degrees)."""

    def __init__(self, sign: int, degrees: tuple[int, ...], rank: int, channels: int, scales: Sequence[float] = ()):
        self.sign, self.degrees, self.scales = sign, degrees, tuple(scales)
        self.shape = (rank, channels, len(degrees))
        self.numel = math.prod(self.shape)

    def view(self, weight: Tensor) -> Tensor:
        return weight.unflatten(-1, self.shape)

    def lift(self, weight: Tensor, parts: Mapping[Part, Tensor]) -> Tensor:
        """parts (..., C or 1, 2l + 1) -> the weighted signal (..., rank, C, n)."""
        signal = join_degrees({degree: parts[self.sign, degree] for degree in self.degrees}, self.degrees[-1])
        return signal.unsqueeze(-3) * spread_over_degrees(self.view(weight), self.degrees)

    def lower(self, weight: Tensor, signal: Tensor) -> dict[Part, Tensor]:
        """(..., rank, C, n) -> weighted parts (..., C, 2l + 1), summed over the terms."""
        z = signal * spread_over_degrees(self.view(weight) * constants(self.scales, weight), self.degrees)
        z = z.squeeze(-3) if self.shape[0] == 1 else z.sum(-3)
        return parts_of(self.sign, self.degrees, z)


class MixingWeights:
    """A matrix between channels and multiplicity a degree, for each term: one degree after the other."""

    def __init__(
        self, sign: int, degrees: tuple[int, ...], rank: int, channels: int, scales: Sequence[float], flat: FlatIrreps
    ):
        self.sign, self.degrees, self.scales = sign, degrees, tuple(scales)
        self.inner = (rank, channels)
        self.muls = tuple(flat.muls[sign, degree] for degree in degrees)
        self.numel = rank * channels * sum(self.muls)

    def view(self, weight: Tensor) -> list[Tensor]:
        """For each degree (..., rank, channels, mul)."""
        pieces = weight.split([self.inner[0] * self.inner[1] * mul for mul in self.muls], dim=-1)
        return [piece.unflatten(-1, (*self.inner, mul)) for piece, mul in zip(pieces, self.muls, strict=True)]

    def lift(self, weight: Tensor, parts: Mapping[Part, Tensor]) -> Tensor:
        mixed: dict[int, Tensor] = {}
        for degree, scale, matrix in zip(self.degrees, self.scales, self.view(weight), strict=True):
            part = parts[self.sign, degree]
            product = (matrix.flatten(-3, -2) * scale) @ part
            mixed[degree] = product.unflatten(-2, self.inner)
        return join_degrees(mixed, self.degrees[-1])

    def lower(self, weight: Tensor, signal: Tensor) -> dict[Part, Tensor]:
        parts = parts_of(self.sign, self.degrees, signal)
        weights = zip(parts.items(), self.scales, self.view(weight), strict=True)
        return {
            key: (matrix.flatten(-3, -2) * scale).mT @ part.flatten(-3, -2) for (key, part), scale, matrix in weights
        }


CouplingWeights = DegreeWeights | MixingWeights


class WeightView(NamedTuple):
    """The weights of one coupling: on its two factors and on its result.

    Each is (..., rank, channels, degrees), or where channels are mixed a list with (..., rank, channels, mul) for each
    degree; the degrees are the coupling's.
    """

    coupling: Coupling
    in1: Tensor | list[Tensor]
    in2: Tensor | list[Tensor]
    out: Tensor | list[Tensor]


def draw_weights_(weight: Tensor) -> None:
    """Independent signs times magnitudes √u, u uniform in [3/4, 5/4]: variance 1, and a narrow spread of squares.

    Path weights are products of three of these. Normal factors would leave most channels near zero and a few far out.
    """
    magnitude = torch.rand_like(weight).mul_(0.5).add_(0.75).sqrt_()
    weight.copy_(torch.where(torch.rand_like(weight) < 0.5, -magnitude, magnitude))


def check_features(name: str, x: object, flat: FlatIrreps) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor (..., {flat.dim}), got {type(x).__name__}")
    check_dtype(name, x, kind="real")
    if x.ndim == 0:
        raise ValueError(f"{name} must have shape (..., {flat.dim}), got a tensor without dimensions")
    check_size(name, x, -1, flat.dim, f"{flat.name}.dim")


def check_leading(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    try:
        torch.broadcast_shapes(x.shape[:-1], other.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} must have leading dimensions that broadcast with those of {other_name}, "
            f"{tuple(other.shape[:-1])}, got shape {tuple(x.shape)}"
        ) from None


def check_module_options(method: str, backend: str | None, dtype: torch.dtype | None) -> None:
    check_choice("method", method, METHODS)
    check_backend(backend)
    check_parameter_dtype(dtype)


def check_backend(backend: str | None) -> None:
    if backend is not None:
        check_choice("backend", backend, BACKENDS)


def check_parameter_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating-point dtype, got {dtype}")
