"""Convolutions by one-way filters, before training (arXiv 2304.04964): layers, functions, and the way from a CNN."""

from .convert import SeparableConfig, convert
from .functional import separable_conv, separable_conv_transpose
from .modules import (
    LazySeparableConv1d,
    LazySeparableConv2d,
    LazySeparableConv3d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
    SeparableConvTranspose2d,
)

__all__ = [
    "LazySeparableConv1d",
    "LazySeparableConv2d",
    "LazySeparableConv3d",
    "SeparableConfig",
    "SeparableConv1d",
    "SeparableConv2d",
    "SeparableConv3d",
    "SeparableConvTranspose2d",
    "convert",
    "separable_conv",
    "separable_conv_transpose",
]
