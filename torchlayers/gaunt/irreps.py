"""Between flat tensors of e3nn's irreps and signals on the sphere, (..., channels, (lmax + 1)²).

A signal carries one irrep of each degree: a true one with parity (-1)^l under inversion (0e, 1o, 2e, ...), a
pseudo-signal with the opposite (0o, 1e, 2o, ...). Irreps of mixed parity are two signals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, require
from .._tables import as_bits, from_bits, register_table, table

__all__ = [
    "LAYOUTS",
    "FlatIrreps",
    "Part",
    "constants",
    "e3nn_o3",
    "join_degrees",
    "split_degrees",
    "spread_over_degrees",
]

LAYOUTS = ("mul_ir", "ir_mul")

Part = tuple[int, int]
"""An irrep by the signal it belongs to and its degree: (1, l) of a true signal, (-1, l) of a pseudo-signal."""


def e3nn_o3() -> ModuleType:
    """The module ``e3nn.o3``, imported without the deprecation warnings that its own code causes.

    Raises:
        ImportError: e3nn is not installed; the message names the extra.
    """
    require("e3nn", extra="gaunt", quiet=True)
    return require("e3nn.o3", extra="gaunt", quiet=True)


class FlatIrreps:
    """How a flat tensor (..., dim) of irreps reads as signals.

    Args:
        name: the argument's name, for messages.
        irreps: an ``e3nn.o3.Irreps`` or what makes one ("8x0e+8x1o"): each irrep at most once, by ascending degree.
        layout: "mul_ir" (e3nn: each irrep as (mul, 2l + 1)) or "ir_mul" (cuEquivariance: as (2l + 1, mul)).

    Attributes:
        irreps: the ``e3nn.o3.Irreps``, without irreps of multiplicity 0.
        dim: length of the flat tensor.
        muls: part (sign, degree) -> multiplicity, in the order of the irreps.

    Raises:
        ValueError: no irreps, irreps that come twice or are not sorted, an unknown layout.
        ImportError: e3nn is not installed.
    """

    def __init__(self, name: str, irreps: Any, layout: str = "mul_ir"):
        check_choice("layout", layout, LAYOUTS)
        self.name, self.layout = name, layout
        try:
            self.irreps = e3nn_o3().Irreps(irreps).remove_zero_multiplicities()
        except (ValueError, AssertionError, TypeError) as error:
            raise ValueError(f"{name} must be irreps such as '8x0e+8x1o', got {irreps!r}") from error
        if not self.irreps:
            raise ValueError(f"{name} must hold at least one irrep, got {irreps!r}")
        degrees = [ir.l for _, ir in self.irreps]
        if degrees != sorted(degrees):
            raise ValueError(f"{name} must be sorted by degree, got {self.irreps}")
        if len({ir for _, ir in self.irreps}) < len(self.irreps):
            raise ValueError(f"{name} must hold each irrep once (see Irreps.simplify), got {self.irreps}")
        self.muls: dict[Part, int] = {(ir.p * (-1) ** ir.l, ir.l): mul for mul, ir in self.irreps}
        self.dim: int = self.irreps.dim

    @property
    def signs(self) -> tuple[int, ...]:
        """The signals that occur: 1 for the true one, -1 for the pseudo-signal."""
        return tuple(s for s in (1, -1) if any(sign == s for sign, _ in self.muls))

    def degrees(self, sign: int) -> tuple[int, ...]:
        """The degrees that the signal ``sign`` holds, ascending."""
        return tuple(degree for s, degree in self.muls if s == sign)

    def channels(self, expected: int | None = None, why: str = "") -> int:
        """The multiplicity that all irreps share.

        Raises:
            ValueError: they share none, or it is not ``expected``; ``why`` ends the message.
        """
        found = set(self.muls.values())
        if len(found) > 1 or (expected is not None and found != {expected}):
            wanted = "equal multiplicities" if expected is None else f"multiplicity {expected} throughout"
            raise ValueError(f"{self.name} must have {wanted}{why}, got {self.irreps}")
        return found.pop()

    def split(self, x: Tensor) -> dict[Part, Tensor]:
        """(..., dim) -> part -> (..., mul, 2l + 1), views of ``x``."""
        pieces = x.split([mul * (2 * degree + 1) for (_, degree), mul in self.muls.items()], dim=-1)
        found = {}
        for (part, mul), piece in zip(self.muls.items(), pieces, strict=True):
            width = 2 * part[1] + 1
            if self.layout == "mul_ir":
                found[part] = piece.unflatten(-1, (mul, width))
            else:
                found[part] = piece.unflatten(-1, (width, mul)).transpose(-1, -2)
        return found

    def split_components(self, x: Tensor) -> dict[Part, Tensor]:
        """(..., C, sum of 2l + 1), as MACE keeps its features -> part -> (..., C, 2l + 1), views of ``x``."""
        pieces = x.split([2 * degree + 1 for _, degree in self.muls], dim=-1)
        return dict(zip(self.muls, pieces, strict=True))

    def join(self, parts: Mapping[Part, Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        pieces = (parts[part] if self.layout == "mul_ir" else parts[part].transpose(-1, -2) for part in self.muls)
        return torch.cat([piece.flatten(-2) for piece in pieces], dim=-1)

    def __str__(self) -> str:
        return str(self.irreps)


def join_degrees(parts: Mapping[int, Tensor], lmax: int) -> Tensor:
    """The signal (..., C, (lmax + 1)²) of parts (..., C, 2l + 1), by degree l; degrees without one are zero."""
    like = next(iter(parts.values()))
    pieces = []
    for degree in range(lmax + 1):
        part = parts.get(degree)
        pieces.append(like.new_zeros(*like.shape[:-1], 2 * degree + 1) if part is None else part)
    return pieces[0] if lmax == 0 else torch.cat(pieces, dim=-1)


def split_degrees(signal: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
    """(..., (lmax + 1)²) by degree: (..., 2l + 1) for l = 0 ... lmax, views; ``dim`` is the one of the components."""
    return signal.split([2 * degree + 1 for degree in range(math.isqrt(signal.shape[dim]))], dim=dim)


def spread_over_degrees(weight: Tensor, degrees: Sequence[int]) -> Tensor:
    """One number a degree, repeated over its components: (..., len(degrees)) -> (..., (degrees[-1] + 1)²).

    What stands at degrees that are not listed has no meaning.
    """
    mask = sum(1 << degree for degree in degrees)
    places = table("gaunt_degree_places", mask, dtype=torch.int64, device=weight.device)
    return weight.index_select(-1, places)


@register_table("gaunt_degree_places", shape=lambda mask: (mask.bit_length() ** 2,))
def _degree_places(mask: int) -> Tensor:
    """The place of each component's degree among the degrees whose bits are set in ``mask``; 0 for the others."""
    listed = [degree for degree in range(mask.bit_length()) if mask >> degree & 1]
    places = [listed.index(d) if d in listed else 0 for d in range(mask.bit_length()) for _ in range(2 * d + 1)]
    return torch.tensor(places, dtype=torch.float64)


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """``values`` as a tensor of the dtype and on the device of ``like``, a cached table that stands in no graph."""
    return table("gaunt_constants", *as_bits(values), dtype=like.dtype, device=like.device)


@register_table("gaunt_constants", shape=lambda *bits: (len(bits),))
def _constants(*bits: int) -> Tensor:
    """The float64 numbers with these bits."""
    return torch.tensor(from_bits(bits), dtype=torch.float64)
