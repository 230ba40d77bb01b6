"""MG-TFNO: tensorized Fourier neural operators (arXiv 2310.00120).

:class:`SpectralConv` and its function :func:`spectral_conv`, weights dense or in CP, Tucker or tensor-train form, one
a layer or one joint tensor for all (:class:`JointSpectralWeights`); the backbone :class:`TFNO` with its
:class:`FNOBlocks`; relative losses; and :func:`from_neuralop` for models trained with neuraloperator.
"""

from ..factorized import FactorizedTensor, validate_rank
from .blocks import TFNO, FNOBlocks
from .convert import from_neuralop
from .functional import spectral_conv, spectral_resample, truncated_irfftn, truncated_rfftn
from .losses import H1Loss, LpLoss
from .modules import SpectralConv
from .parallel import MultiGridParallel, MultigridPatching2D
from .patching import MultiGridPatching
from .precision import PrecisionSchedule
from .weights import JointSpectralWeights

__all__ = [
    "TFNO",
    "FNOBlocks",
    "FactorizedTensor",
    "H1Loss",
    "JointSpectralWeights",
    "LpLoss",
    "MultiGridParallel",
    "MultiGridPatching",
    "MultigridPatching2D",
    "PrecisionSchedule",
    "SpectralConv",
    "from_neuralop",
    "spectral_conv",
    "spectral_resample",
    "truncated_irfftn",
    "truncated_rfftn",
    "validate_rank",
]
