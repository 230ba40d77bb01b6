"""The families' functions in one place, as :mod:`torch.nn.functional` has torch's. Families load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tensor_attention import nth_order_attention as nth_order_attention
    from .tensor_attention import polynomial_nth_order_attention as polynomial_nth_order_attention
    from .tensor_attention import polynomial_tensor_attention as polynomial_tensor_attention
    from .tensor_attention import tensor_attention as tensor_attention
    from .tfno import spectral_conv as spectral_conv
    from .tfno import spectral_resample as spectral_resample
    from .tfno import truncated_irfftn as truncated_irfftn
    from .tfno import truncated_rfftn as truncated_rfftn

# Public name -> the family it comes from; the imports above say the same to editors and type checkers.
_LAZY = {
    "nth_order_attention": "tensor_attention",
    "polynomial_nth_order_attention": "tensor_attention",
    "polynomial_tensor_attention": "tensor_attention",
    "spectral_conv": "tfno",
    "spectral_resample": "tfno",
    "tensor_attention": "tensor_attention",
    "truncated_irfftn": "tfno",
    "truncated_rfftn": "tfno",
}

__all__ = [
    "nth_order_attention",
    "polynomial_nth_order_attention",
    "polynomial_tensor_attention",
    "spectral_conv",
    "spectral_resample",
    "tensor_attention",
    "truncated_irfftn",
    "truncated_rfftn",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __package__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
