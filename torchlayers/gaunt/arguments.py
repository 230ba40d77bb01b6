"""What the family's functions make of their arguments alike: which degree is kept, which dtype is computed in."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_int

__all__ = ["Device", "common_dtype", "kept_degree"]

Device = torch.device | str | None


def kept_degree(lmax_out: int | None, highest: int, what: str) -> int:
    """``lmax_out``, by default ``highest``, after a check that it is no more.

    Raises:
        TypeError: no int.
        ValueError: below 0 or above ``highest``, which the message calls ``what``.
    """
    if lmax_out is None:
        return highest
    if check_int("lmax_out", lmax_out, minimum=0) > highest:
        raise ValueError(f"lmax_out must be at most {what} = {highest}, got {lmax_out}")
    return lmax_out


def common_dtype(**tensors: Tensor) -> tuple[list[Tensor], torch.dtype]:
    """The tensors in one dtype, and the dtype of the result; the first one's, or under autocast float32 for both.

    16-bit harmonics would cost 1 % of accuracy, so autocast does not lower the family's functions; float64 it leaves
    alone. A caller widens 16-bit tensors where its implementation needs that.

    Raises:
        TypeError: dtypes that differ outside autocast, or float64 among others.
    """
    (first, x), *others = tensors.items()
    wide = any(t.dtype == torch.float64 for t in tensors.values())
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and not wide:
        return [t.float() for t in tensors.values()], torch.float32
    for name, tensor in others:
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {x.dtype}, got {tensor.dtype}")
    return list(tensors.values()), x.dtype
