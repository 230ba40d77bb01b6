"""E(3)-equivariant products of features as functions on the sphere (arXiv 2401.10216).

Conventions are e3nn's throughout. Modules take and give flat Irreps tensors; functions take coefficients of
integral-normalised real spherical harmonics, (..., C, (L + 1)²).
"""

from typing import TYPE_CHECKING, Any

from .coefficients import bracket_coefficients, clebsch_gordan, gaunt_coefficients, paths
from .convolution import EdgeOrder, edge_order
from .fourier import fourier_to_sh, sh_to_fourier
from .functional import gaunt_convolution, gaunt_many_body, gaunt_tensor_product
from .modules import GauntConv, GauntSelfInteraction, GauntSymmetricContraction, GauntTensorProduct
from .potential import GauntPotential
from .selfmix import SelfMix
from .sphere import sphere_quadrature, spherical_harmonics
from .take_over import ExactTensorProduct

if TYPE_CHECKING:
    from .calculator import GauntCalculator

__all__ = [
    "EdgeOrder",
    "ExactTensorProduct",
    "GauntCalculator",
    "GauntConv",
    "GauntPotential",
    "GauntSelfInteraction",
    "GauntSymmetricContraction",
    "GauntTensorProduct",
    "SelfMix",
    "bracket_coefficients",
    "clebsch_gordan",
    "edge_order",
    "fourier_to_sh",
    "gaunt_coefficients",
    "gaunt_convolution",
    "gaunt_many_body",
    "gaunt_tensor_product",
    "paths",
    "sh_to_fourier",
    "sphere_quadrature",
    "spherical_harmonics",
]


def __getattr__(name: str) -> Any:
    if name != "GauntCalculator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Its base class is ASE's.
    from .calculator import GauntCalculator

    return GauntCalculator


def __dir__() -> list[str]:
    return sorted({*globals(), "GauntCalculator"})
