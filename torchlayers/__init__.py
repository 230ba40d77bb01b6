"""Layers of recent papers as PyTorch modules, with Triton kernels for their hot paths.

Modules import from here (``torchlayers.SpectralConv``), functions from :mod:`torchlayers.functional`, and both from
their family (:mod:`torchlayers.tfno`). Families load on first use, so that ``import torchlayers`` stays fast and
needs no optional dependency.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a source checkout the kernels lie beside this package, in an installed one inside it (pyproject.toml maps them).
_root = os.path.dirname(__path__[0])
if not os.path.isdir(os.path.join(__path__[0], "kernels")) and os.path.isfile(
    os.path.join(_root, "kernels", "_lib.py")
):
    __path__.append(_root)
del _root

from ._backend import BackendError, backend, last_dispatch  # noqa: E402

if TYPE_CHECKING:
    from . import functional as functional
    from . import gaunt as gaunt
    from . import maestro as maestro
    from . import polynomial as polynomial
    from . import ring_attention as ring_attention
    from . import separable_conv as separable_conv
    from . import tensor_attention as tensor_attention
    from . import testing as testing
    from . import tfno as tfno
    from . import training as training
    from ._surgery import convert as convert
    from .factorized import FactorizedTensor as FactorizedTensor
    from .gaunt import ExactTensorProduct as ExactTensorProduct
    from .gaunt import GauntConv as GauntConv
    from .gaunt import GauntPotential as GauntPotential
    from .gaunt import GauntSelfInteraction as GauntSelfInteraction
    from .gaunt import GauntSymmetricContraction as GauntSymmetricContraction
    from .gaunt import GauntTensorProduct as GauntTensorProduct
    from .gaunt import SelfMix as SelfMix
    from .maestro import LowRankConv1d as LowRankConv1d
    from .maestro import LowRankConv2d as LowRankConv2d
    from .maestro import LowRankConv3d as LowRankConv3d
    from .maestro import LowRankEmbedding as LowRankEmbedding
    from .maestro import LowRankLinear as LowRankLinear
    from .maestro import LowRankMultiheadAttention as LowRankMultiheadAttention
    from .polynomial import PPGN as PPGN
    from .polynomial import AddPolynomialFeatures as AddPolynomialFeatures
    from .polynomial import PairBatch as PairBatch
    from .polynomial import Pattern as Pattern
    from .polynomial import PolynomialConv as PolynomialConv
    from .polynomial import PPGNBlock as PPGNBlock
    from .polynomial import PPGNConv as PPGNConv
    from .ring_attention import LoopbackWorld as LoopbackWorld
    from .ring_attention import RingMultiheadAttention as RingMultiheadAttention
    from .ring_attention import SequenceLayout as SequenceLayout
    from .ring_attention import sequence_parallel as sequence_parallel
    from .separable_conv import LazySeparableConv1d as LazySeparableConv1d
    from .separable_conv import LazySeparableConv2d as LazySeparableConv2d
    from .separable_conv import LazySeparableConv3d as LazySeparableConv3d
    from .separable_conv import SeparableConv1d as SeparableConv1d
    from .separable_conv import SeparableConv2d as SeparableConv2d
    from .separable_conv import SeparableConv3d as SeparableConv3d
    from .separable_conv import SeparableConvTranspose2d as SeparableConvTranspose2d
    from .tensor_attention import RingTensorAttention as RingTensorAttention
    from .tensor_attention import TensorAttention as TensorAttention
    from .tensor_attention import TensorTransformerBlock as TensorTransformerBlock
    from .tfno import TFNO as TFNO
    from .tfno import FNOBlocks as FNOBlocks
    from .tfno import H1Loss as H1Loss
    from .tfno import JointSpectralWeights as JointSpectralWeights
    from .tfno import LpLoss as LpLoss
    from .tfno import MultiGridParallel as MultiGridParallel
    from .tfno import MultiGridPatching as MultiGridPatching
    from .tfno import MultigridPatching2D as MultigridPatching2D
    from .tfno import SpectralConv as SpectralConv

# Public name -> the submodule it comes from. The imports above say the same to editors; a test compares the two
# with each family's __all__.
_LAZY = {
    "AddPolynomialFeatures": "polynomial",
    "ExactTensorProduct": "gaunt",
    "FNOBlocks": "tfno",
    "FactorizedTensor": "factorized",
    "GauntConv": "gaunt",
    "GauntPotential": "gaunt",
    "GauntSelfInteraction": "gaunt",
    "GauntSymmetricContraction": "gaunt",
    "GauntTensorProduct": "gaunt",
    "H1Loss": "tfno",
    "JointSpectralWeights": "tfno",
    "LazySeparableConv1d": "separable_conv",
    "LazySeparableConv2d": "separable_conv",
    "LazySeparableConv3d": "separable_conv",
    "LoopbackWorld": "ring_attention",
    "LowRankConv1d": "maestro",
    "LowRankConv2d": "maestro",
    "LowRankConv3d": "maestro",
    "LowRankEmbedding": "maestro",
    "LowRankLinear": "maestro",
    "LowRankMultiheadAttention": "maestro",
    "LpLoss": "tfno",
    "MultiGridParallel": "tfno",
    "MultiGridPatching": "tfno",
    "MultigridPatching2D": "tfno",
    "PPGN": "polynomial",
    "PPGNBlock": "polynomial",
    "PPGNConv": "polynomial",
    "PairBatch": "polynomial",
    "Pattern": "polynomial",
    "PolynomialConv": "polynomial",
    "RingMultiheadAttention": "ring_attention",
    "RingTensorAttention": "tensor_attention",
    "SelfMix": "gaunt",
    "SeparableConv1d": "separable_conv",
    "SeparableConv2d": "separable_conv",
    "SeparableConv3d": "separable_conv",
    "SeparableConvTranspose2d": "separable_conv",
    "SequenceLayout": "ring_attention",
    "SpectralConv": "tfno",
    "TFNO": "tfno",
    "TensorAttention": "tensor_attention",
    "TensorTransformerBlock": "tensor_attention",
    "convert": "_surgery",
    "sequence_parallel": "ring_attention",
}
_SUBMODULES = (
    "data",
    "experiments",
    "factorized",
    "functional",
    "gaunt",
    "kernels",
    "maestro",
    "polynomial",
    "ring_attention",
    "separable_conv",
    "tensor_attention",
    "testing",
    "tfno",
    "training",
)

__all__ = [
    "PPGN",
    "TFNO",
    "AddPolynomialFeatures",
    "BackendError",
    "ExactTensorProduct",
    "FNOBlocks",
    "FactorizedTensor",
    "GauntConv",
    "GauntPotential",
    "GauntSelfInteraction",
    "GauntSymmetricContraction",
    "GauntTensorProduct",
    "H1Loss",
    "JointSpectralWeights",
    "LazySeparableConv1d",
    "LazySeparableConv2d",
    "LazySeparableConv3d",
    "LoopbackWorld",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankEmbedding",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LpLoss",
    "MultiGridParallel",
    "MultiGridPatching",
    "MultigridPatching2D",
    "PPGNBlock",
    "PPGNConv",
    "PairBatch",
    "Pattern",
    "PolynomialConv",
    "RingMultiheadAttention",
    "RingTensorAttention",
    "SelfMix",
    "SeparableConv1d",
    "SeparableConv2d",
    "SeparableConv3d",
    "SeparableConvTranspose2d",
    "SequenceLayout",
    "SpectralConv",
    "TensorAttention",
    "TensorTransformerBlock",
    "backend",
    "convert",
    "last_dispatch",
    "sequence_parallel",
]


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})
