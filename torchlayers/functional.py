"""The families' functions in one place, as :mod:`torch.nn.functional` has torch's. Families load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gaunt import gaunt_convolution as gaunt_convolution
    from .gaunt import gaunt_many_body as gaunt_many_body
    from .gaunt import gaunt_tensor_product as gaunt_tensor_product
    from .maestro import low_rank_linear as low_rank_linear
    from .polynomial import masked_product as masked_product
    from .polynomial import pair_linear as pair_linear
    from .polynomial import pair_mlp as pair_mlp
    from .polynomial import pair_readout as pair_readout
    from .polynomial import segment_matmul as segment_matmul
    from .ring_attention import linformer_attention as linformer_attention
    from .ring_attention import merge_attention as merge_attention
    from .ring_attention import ring_attention as ring_attention
    from .ring_attention import ring_self_attention as ring_self_attention
    from .ring_attention import ulysses_attention as ulysses_attention
    from .ring_attention import usp_attention as usp_attention
    from .separable_conv import separable_conv as separable_conv
    from .separable_conv import separable_conv_transpose as separable_conv_transpose
    from .tensor_attention import nth_order_attention as nth_order_attention
    from .tensor_attention import polynomial_nth_order_attention as polynomial_nth_order_attention
    from .tensor_attention import polynomial_tensor_attention as polynomial_tensor_attention
    from .tensor_attention import ring_tensor_attention as ring_tensor_attention
    from .tensor_attention import tensor_attention as tensor_attention
    from .tfno import spectral_conv as spectral_conv
    from .tfno import spectral_resample as spectral_resample
    from .tfno import truncated_irfftn as truncated_irfftn
    from .tfno import truncated_rfftn as truncated_rfftn

# Public name -> the family it comes from; the imports above say the same to editors and type checkers.
_LAZY = {
    "gaunt_convolution": "gaunt",
    "gaunt_many_body": "gaunt",
    "gaunt_tensor_product": "gaunt",
    "linformer_attention": "ring_attention",
    "low_rank_linear": "maestro",
    "masked_product": "polynomial",
    "merge_attention": "ring_attention",
    "nth_order_attention": "tensor_attention",
    "pair_linear": "polynomial",
    "pair_mlp": "polynomial",
    "pair_readout": "polynomial",
    "polynomial_nth_order_attention": "tensor_attention",
    "polynomial_tensor_attention": "tensor_attention",
    "ring_attention": "ring_attention",
    "ring_self_attention": "ring_attention",
    "ring_tensor_attention": "tensor_attention",
    "segment_matmul": "polynomial",
    "separable_conv": "separable_conv",
    "separable_conv_transpose": "separable_conv",
    "spectral_conv": "tfno",
    "spectral_resample": "tfno",
    "tensor_attention": "tensor_attention",
    "truncated_irfftn": "tfno",
    "truncated_rfftn": "tfno",
    "ulysses_attention": "ring_attention",
    "usp_attention": "ring_attention",
}

__all__ = [
    "gaunt_convolution",
    "gaunt_many_body",
    "gaunt_tensor_product",
    "linformer_attention",
    "low_rank_linear",
    "masked_product",
    "merge_attention",
    "nth_order_attention",
    "pair_linear",
    "pair_mlp",
    "pair_readout",
    "polynomial_nth_order_attention",
    "polynomial_tensor_attention",
    "ring_attention",
    "ring_self_attention",
    "ring_tensor_attention",
    "segment_matmul",
    "separable_conv",
    "separable_conv_transpose",
    "spectral_conv",
    "spectral_resample",
    "tensor_attention",
    "truncated_irfftn",
    "truncated_rfftn",
    "ulysses_attention",
    "usp_attention",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __package__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
