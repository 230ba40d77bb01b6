"""Tables (bases, quadratures, coefficients): built in float64, cast once, kept in one cache.

A family registers a builder, ``@register_table("name", shape=...)``, and reads it by :func:`table`. In eager mode
that is a dictionary look-up. Under ``torch.compile``, ``torch.export`` and dispatch modes it is one opaque operation,
``torchlayers::table``, so that a builder is never traced and a fake tensor never enters the cache.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import torch

from ._backend import is_traced

__all__ = ["as_bits", "from_bits", "register_table", "table"]

_BUILDERS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., tuple[int, ...]]]] = {}
_CACHE: dict[tuple, torch.Tensor] = {}
_LIMIT = 256  # tables; the oldest goes first


def register_table(name: str, *, shape: Callable[..., tuple[int, ...]]):
    """Register the decorated builder: ``builder(*ints)`` gives a float64 CPU tensor of ``shape(*ints)``."""

    def register(builder: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if name in _BUILDERS:
            raise ValueError(f"name must be new to the table registry, got {name!r}")
        _BUILDERS[name] = (builder, shape)
        return builder

    return register


def table(
    name: str, *args: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The table ``name`` for the integers ``args``; read it, never write to it."""
    device = torch.device(device)
    if is_traced():
        return _table_op(name, list(args), dtype, device)
    return _lookup(name, args, dtype, device)


def _lookup(name: str, args: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    key = (name, args, dtype, device)
    found = _CACHE.get(key)
    if found is None:
        builder, shape = _BUILDERS[name]
        # An inference tensor in the cache could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            built = builder(*args)
            if built.dtype != torch.float64:
                raise TypeError(f"table {name!r} must be built in float64, got {built.dtype}")
            if tuple(built.shape) != tuple(shape(*args)):
                raise ValueError(f"table {name!r} must have shape {tuple(shape(*args))}, got {tuple(built.shape)}")
            found = built.to(device=device, dtype=dtype)
        if len(_CACHE) >= _LIMIT:
            _CACHE.pop(next(iter(_CACHE)), None)
        _CACHE[key] = found
    return found


@torch.library.custom_op("torchlayers::table", mutates_args=())
def _table_op(name: str, args: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A copy: inductor may reuse an operation's output as memory for another.
    return _lookup(name, tuple(args), dtype, device).clone()


@_table_op.register_fake
def _(name: str, args: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(_BUILDERS[name][1](*args), dtype=dtype, device=device)


def as_bits(values: Iterable[float]) -> tuple[int, ...]:
    """Float64 numbers as the ints that have their bits: a table is named by ints alone."""
    values = tuple(values)
    return struct.unpack(f"<{len(values)}q", struct.pack(f"<{len(values)}d", *values))


def from_bits(bits: Iterable[int]) -> tuple[float, ...]:
    """The inverse of :func:`as_bits`."""
    bits = tuple(bits)
    return struct.unpack(f"<{len(bits)}d", struct.pack(f"<{len(bits)}q", *bits))
