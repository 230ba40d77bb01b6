"""Functions of distances, and the mixing of channels, that a potential's layers are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .arguments import Device


def polynomial_cutoff(r: Tensor, cutoff: float, p: int = 6) -> Tensor:
    """A function that falls from 1 at 0 to 0 at ``cutoff``, with two continuous derivatives, and is 0 beyond.

        1 - (p + 1)(p + 2)/2 u^p + p (p + 2) u^(p+1) - p (p + 1)/2 u^(p+2),    u = r / cutoff

    (Gasteiger et al., arXiv 2003.03123, equation 8.)
    """
    u = r / cutoff
    value = 1 - u**p * ((p + 1) * (p + 2) / 2 - p * (p + 2) * u + p * (p + 1) / 2 * u**2)
    return torch.where(u < 1, value, 0)


def bessel_basis(r: Tensor, cutoff: float, size: int) -> Tensor:
    """√(2 / cutoff) sin(n π r / cutoff) / r for n = 1 … size, finite at 0: (...) -> (..., size).

    (Gasteiger et al., arXiv 2003.03123, equation 7.)
    """
    n = torch.arange(1, size + 1, dtype=r.dtype, device=r.device)
    return math.sqrt(2 / cutoff) * (math.pi / cutoff) * n * torch.sinc(r[..., None] / cutoff * n)


class RadialNetwork(nn.Module):
    """Weights of an edge from its length: a perceptron without biases on Bessel functions under a polynomial cutoff.

    It vanishes at the cutoff and beyond with two continuous derivatives, whatever its weights.

    Args:
        cutoff: in Å.
        out_features: weights of an edge.
        num_basis: Bessel functions.
        hidden: widths of the hidden layers.
        device, dtype: of the parameters.

    Shape: r (E,) -> (E, out_features).
    """

    # Second moment of SiLU under a standard normal.
    _SILU = 0.3558

    def __init__(
        self,
        cutoff: float,
        out_features: int,
        *,
        num_basis: int = 8,
        hidden: Sequence[int] = (32, 32),
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.cutoff, self.num_basis = cutoff, num_basis
        sizes = [num_basis, *hidden, out_features]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=False, device=device, dtype=dtype) for a, b in itertools.pairwise(sizes)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights so that variance passes through."""
        for number, layer in enumerate(self.layers):
            moment = self._SILU if number else 1.0
            layer.weight.normal_(0, 1 / math.sqrt(layer.in_features * moment))  # type: ignore[operator]

    def forward(self, r: Tensor) -> Tensor:
        x = bessel_basis(r, self.cutoff, self.num_basis) * polynomial_cutoff(r, self.cutoff)[..., None]
        for number, layer in enumerate(self.layers):
            x = layer(nn.functional.silu(x) if number else x)
        return x

    def extra_repr(self) -> str:
        return f"cutoff={self.cutoff}, num_basis={self.num_basis}"


class ChannelMix(nn.Module):
    """A linear map of channels for each irrep, the only kind that is equivariant: ``z_p = W_p x_p / √C``.

    Args:
        num_parts: irreps.
        channels: C, of input and output.
        device, dtype: of the parameter.

    Shape: parts, ``num_parts`` tensors (N, C, 2l + 1) -> as many, of the same shapes.
    """

    def __init__(self, num_parts: int, channels: int, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_parts, channels, channels, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_()

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        weight = self.weight / math.sqrt(self.weight.shape[-1])
        return [torch.einsum("dc,ncm->ndm", w, x) for w, x in zip(weight.unbind(), parts, strict=True)]

    def extra_repr(self) -> str:
        return "num_parts={}, channels={}".format(*self.weight.shape[:2])
