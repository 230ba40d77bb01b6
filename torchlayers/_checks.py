"""Argument checks that every family shares, so that the same mistake reads the same everywhere.

Each raises ``ValueError`` or ``TypeError`` with a message of one form: the argument, what was expected, what came.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch

__all__ = [
    "check_choice",
    "check_dtype",
    "check_int",
    "check_ints",
    "check_ndim",
    "check_same_device",
    "check_size",
    "require",
]


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """``value`` is one of ``choices``; the message names the nearest one."""
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def check_int(name: str, value: object, *, minimum: int = 1) -> int:
    """``value`` is an int (no bool) of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {_describe(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value  # type: ignore[return-value]


def check_ints(name: str, value: object, length: int | None = None, *, minimum: int = 1) -> tuple[int, ...]:
    """``value`` is a sequence of ints, of ``length`` where given; an int stands for ``length`` equal ones."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,) * (length or 1)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of ints, got {_describe(value)}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must have {length} entries, got {len(value)}: {tuple(value)}")
    return tuple(check_int(f"{name}[{i}]", v, minimum=minimum) for i, v in enumerate(value))


def check_ndim(name: str, x: object, ndim: int | tuple[int, ...], layout: str) -> None:
    """``x`` is a tensor with ``ndim`` dimensions; ``layout`` spells them out, such as ``"(batch, channels, H, W)"``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {_describe(x)}")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if x.ndim not in allowed:
        dims = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have {dims} dimensions {layout}, got {x.ndim}: shape {tuple(x.shape)}")


def check_size(name: str, x: torch.Tensor, dim: int, size: int, what: str) -> None:
    """Dimension ``dim`` of ``x`` has ``size`` entries; ``what`` names it, such as ``"in_channels"``."""
    if x.shape[dim] != size:
        raise ValueError(
            f"{name} must have {what} = {size} at dimension {dim}, got {x.shape[dim]}: shape {tuple(x.shape)}"
        )


def check_dtype(name: str, x: torch.Tensor, *, kind: str) -> None:
    """``x`` is of ``kind`` "real" (floating point), "complex", or "inexact" (either)."""
    real, is_complex = x.dtype.is_floating_point, x.dtype.is_complex
    if not {"real": real, "complex": is_complex, "inexact": real or is_complex}[kind]:
        words = {"real": "a real floating-point dtype", "complex": "a complex dtype", "inexact": "a floating dtype"}
        raise TypeError(f"{name} must have {words[kind]}, got {x.dtype}")


def check_same_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """``x`` lies where ``other`` does."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {x.device}")


def require(module: str, *, extra: str, quiet: bool = False) -> ModuleType:
    """Import an optional dependency, or say which extra of this package brings it.

    ``quiet`` hides the warnings that importing it gives, for packages that use what torch calls deprecated.
    """
    try:
        with warnings.catch_warnings() if quiet else contextlib.nullcontext():
            if quiet:
                warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here and not installed: pip install -e '.[{extra}]'") from error
