"""An interaction of a node's feature with itself, in the layout of EquiformerV2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._attention import no_autocast
from .._checks import check_dtype, check_int, check_size
from .coefficients import bracket_scale, gaunt_scale
from .functional import gaunt_tensor_product
from .irreps import split_degrees

__all__ = ["SelfMix"]


class SelfMix(nn.Module):
    r"""Equivariant feature interaction beside the feed-forward blocks of EquiformerV2 and its kin, with a residual::

        y = x + W₃ ( (W₁ n(x)) · (W₂ n(x)) )        n(x)_l = x_l / √( mean over l of ⟨|x_l|² / (2l + 1)⟩ )

    W₁, W₂ and W₃ mix channels, a matrix for each degree, as EquiformerV2's ``SO3_Linear`` does; the product is that of
    functions on the sphere, channel by channel; n makes the block insensitive to the feature's size. W₃ starts at 0,
    so that the block put into a trained model changes nothing until it is trained.

    EquiformerV2's features carry no parity: with ``antisymmetric=True`` the Poisson bracket of the factors is added,
    which makes all Clebsch–Gordan paths reachable and the block equivariant to rotations alone.

    Args:
        lmax: highest degree, L.
        channels: C.
        antisymmetric: add the paths of odd l1 + l2 + l3.
        eps: added to the mean square under the root.
        device, dtype: of the parameters.
        method, backend: see :func:`torchlayers.gaunt.gaunt_tensor_product`.

    Shape: x (..., (L + 1)², C), components as e3nn orders them -> the same. C comes last, as in EquiformerV2.

    Raises:
        ValueError: shapes that do not fit. TypeError: x that is no real floating-point tensor.

    Source: Luo et al., arXiv 2401.10216, section 4 and appendix ("Selfmix" in EquiformerV2).

    Example:

        >>> import torch
        >>> from torchlayers.gaunt import SelfMix
        >>> block = SelfMix(lmax=4, channels=16)
        >>> x = torch.randn(10, 25, 16)
        >>> torch.equal(block(x), x)
        True
    """

    def __init__(
        self,
        lmax: int,
        channels: int,
        *,
        antisymmetric: bool = False,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        method: str = "auto",
        backend: str | None = None,
    ):
        super().__init__()
        self.lmax, self.channels = check_int("lmax", lmax, minimum=0), check_int("channels", channels)
        self.antisymmetric, self.eps, self.method, self.backend = antisymmetric, eps, method, backend
        shape = (lmax + 1, channels, channels)
        self.weight_first = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.weight_second = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.weight_out = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        degrees = range(lmax + 1)
        # Of a component of each kind of product, where components of the factors have variance 1.
        variance = {
            kind: [sum(scale(a, b, c) ** 2 for a in degrees for b in degrees) / (2 * c + 1) for c in degrees]
            for kind, scale in ((False, gaunt_scale), (True, bracket_scale))
            if antisymmetric or not kind
        }
        kinds = [sum(v[c] > 0 for v in variance.values()) for c in degrees]
        self._scales = {
            kind: [1 / math.sqrt(v[c] * kinds[c]) if v[c] else 0.0 for c in degrees] for kind, v in variance.items()
        }
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Factors of variance 1, and no result."""
        self.weight_first.normal_(0, 1 / math.sqrt(self.channels))
        self.weight_second.normal_(0, 1 / math.sqrt(self.channels))
        self.weight_out.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim < 2:
            came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor (..., (lmax + 1)², channels), got {came}")
        check_dtype("x", x, kind="real")
        check_size("x", x, -2, (self.lmax + 1) ** 2, "(lmax + 1)²")
        check_size("x", x, -1, self.channels, "channels")
        with no_autocast(x):
            dtype = torch.promote_types(x.dtype, self.weight_out.dtype)
            z = self._normalized(x.to(dtype))
            first, second = (self._mix(w.to(dtype), z).mT for w in (self.weight_first, self.weight_second))
            products = [self._product(first, second, kind) for kind in self._scales]
            total = products[0] if len(products) == 1 else products[0] + products[1]
            return x + self._mix(self.weight_out.to(dtype), total.mT).to(x.dtype)

    def _product(self, first: Tensor, second: Tensor, antisymmetric: bool) -> Tensor:
        z = gaunt_tensor_product(
            first,
            second,
            self.lmax,
            self.lmax,
            self.lmax,
            antisymmetric=antisymmetric,
            method=self.method,
            backend=self.backend,
        )
        pieces = split_degrees(z)
        return torch.cat([p * scale for p, scale in zip(pieces, self._scales[antisymmetric], strict=True)], dim=-1)

    def _normalized(self, x: Tensor) -> Tensor:
        squares = [piece.square().mean((-2, -1), keepdim=True) for piece in split_degrees(x, -2)]
        return x * (torch.stack(squares).mean(0) + self.eps).rsqrt()

    def _mix(self, weight: Tensor, x: Tensor) -> Tensor:
        pieces = split_degrees(x, -2)
        return torch.cat([piece @ w for piece, w in zip(pieces, weight.unbind(), strict=True)], dim=-2)

    def extra_repr(self) -> str:
        return f"lmax={self.lmax}, channels={self.channels}, antisymmetric={self.antisymmetric}"
