"""Many-body features: powers of a node's features, weighted by its element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .._attention import no_autocast
from .._checks import check_dtype, check_int, check_same_device, check_size
from .arguments import Device
from .couplings import (
    add_to,
    check_backend,
    check_parameter_dtype,
    check_reached,
    draw_weights_,
    parts_of,
    signals_of,
)
from .functional import many_body_powers
from .irreps import FlatIrreps, Part, constants, join_degrees, spread_over_degrees
from .sphere import sphere_quadrature, spherical_harmonics


def _power_variances(
    signals: Mapping[int, Sequence[int]], correlation: int, out: Mapping[int, Sequence[int]]
) -> dict[tuple[int, int, int], float]:
    """(ν, sign, degree) -> the variance of a component of X^ν, where those of X are normal with variance 1.

    X = U + V, of a true and a pseudo-signal, is a Gaussian field; the part of X^ν that is even (odd) in V is half the
    sum (difference) of (U + V)^ν and (U - V)^ν. Two such fields of variance s and covariance κ have

        Cov(A^ν, B^ν) = Σ_{k ≥ 1, k ≡ ν mod 2} (ν choose k)² k! ((ν - k - 1)!!)² s^(ν-k) κ^k

    and a zonal covariance has the variance of its Legendre coefficient (Funk–Hecke). Vanishing ones are left out.
    """
    lmax = max(max(degrees) for degrees in signals.values())
    lmax_out = max(max(degrees) for degrees in out.values())
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        points, weights = sphere_quadrature(correlation * lmax + lmax_out)
        zonal = spherical_harmonics(max(lmax, lmax_out), points)
        legendre = [zonal[:, d * d + d] * math.sqrt(4 * math.pi / (2 * d + 1)) for d in range(max(lmax, lmax_out) + 1)]
        covariance = {sign: torch.zeros_like(weights) for sign in (1, -1)}
        spread = 0.0
        for sign, degrees in signals.items():
            for degree in degrees:
                covariance[sign] += (2 * degree + 1) / (4 * math.pi) * legendre[degree]
                spread += (2 * degree + 1) / (4 * math.pi)
        found = {}
        for order in range(1, correlation + 1):
            sums = []
            for kappa in (covariance[1] + covariance[-1], covariance[1] - covariance[-1]):
                total = torch.zeros_like(kappa)
                for k in range(order, 0, -2):
                    pairings = math.prod(range(order - k - 1, 0, -2))
                    factor = math.comb(order, k) ** 2 * math.factorial(k) * pairings**2
                    total += factor * spread ** (order - k) * kappa**k
                sums.append(total)
            largest = float((weights * (sums[0].abs() + sums[1].abs())).sum())
            for sign, degrees in out.items():
                part = (sums[0] + sign * sums[1]) / 2
                for degree in degrees:
                    value = float((weights * part * legendre[degree]).sum())
                    if value > 1e-10 * largest:
                        found[order, sign, degree] = value
    return found


class GauntSymmetricContraction(nn.Module):
    r"""Powers of a feature as functions on the sphere, weighted by chemical element: MACE's many-body features::

        z_{n,l} = Σ_{ν=1..correlation} α_{ν,l} w_{z_n,ν,l} ( X_n^ν )_l

    channel by channel. Reads as ``mace.modules.SymmetricContraction``, with one weight for each order ν and output
    irrep where that has one for each way to couple ν irreps to it. No power is cut off before the last product. There
    is no constant term.

    Features of mixed parity are X = U + V, of a true and a pseudo-signal; terms with an even number of V are true.

    Args:
        irreps_in: of one multiplicity C, each irrep at most once, by ascending degree.
        irreps_out: of the result, multiplicity C.
        correlation: the highest power.
        num_elements: Z, the number of elements.
        layout: of the result, "mul_ir" (mul, 2l + 1) as MACE has it or "ir_mul".
        device, dtype: of the parameter.
        backend: see :func:`torchlayers.backend`.

    Shape: x (N, C, Σ (2l + 1)), the components in the order of ``irreps_in``; y (N, Z), one-hot (or weights of the
    elements), or (N,) integers -> (N, irreps_out.dim). Any number of leading dimensions stands for N.

    Attributes:
        irreps_in, irreps_out: ``e3nn.o3.Irreps``.
        weight: (Z, terms, C). ``terms`` lists (ν, sign, degree) of each term, sign 1 for a true irrep.

    The constants α give each output component variance 1 where those of x are normal with variance 1, as far as the
    weights, which start with variance 1; scalars of even order have a mean beside it.

    Raises:
        ValueError: irreps that come twice or unsorted, multiplicities that differ, outputs that no power reaches, by
            name; shapes that do not fit at the call, elements out of range.
        TypeError: an ``x`` that is no real floating-point tensor.
        ImportError: e3nn is not installed.

    Source: Luo et al., arXiv 2401.10216, section 3, "equivariant many-body interaction"; Batatia et al., MACE.

    Example:

        >>> import torch
        >>> from torchlayers.gaunt import GauntSymmetricContraction
        >>> contraction = GauntSymmetricContraction("8x0e+8x1o+8x2e", "8x0e+8x1o", correlation=3, num_elements=2)
        >>> x, element = torch.randn(5, 8, 9), torch.tensor([0, 1, 1, 0, 1])
        >>> contraction(x, element).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        irreps_in: Any,
        irreps_out: Any,
        correlation: int,
        num_elements: int,
        *,
        layout: str = "mul_ir",
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self.correlation = check_int("correlation", correlation)
        self.num_elements = check_int("num_elements", num_elements)
        check_backend(backend)
        check_parameter_dtype(dtype)
        self.backend = backend
        self._in = FlatIrreps("irreps_in", irreps_in, layout)
        self._out = FlatIrreps("irreps_out", irreps_out, layout)
        self.channels = self._in.channels()
        self._out.channels(self.channels, ", that of irreps_in")
        self.irreps_in, self.irreps_out = self._in.irreps, self._out.irreps
        variances = _power_variances(signals_of(self._in), correlation, signals_of(self._out))
        count = {part: sum(term[1:] == part for term in variances) for part in self._out.muls}
        check_reached(
            self._out, [part for part, n in count.items() if n == 0], f"a power up to {correlation} of {self._in}"
        )
        self.terms = tuple(variances)
        self._scales = [1 / math.sqrt(value * count[term[1:]]) for term, value in variances.items()]
        kinds = dict.fromkeys(term[:2] for term in self.terms)
        self._groups = [(*kind, tuple(term[2] for term in self.terms if term[:2] == kind)) for kind in kinds]
        self.num_components = sum(2 * degree + 1 for _, degree in self._in.muls)
        shape = (num_elements, len(self.terms), self.channels)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights: independent, symmetric about 0, of variance 1."""
        draw_weights_(self.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., C, Σ (2l + 1)), (..., Z) or (...) -> (..., irreps_out.dim)."""
        if not isinstance(x, Tensor) or x.ndim < 2:
            came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor (..., channels, components), got {came}")
        check_dtype("x", x, kind="real")
        check_size("x", x, -2, self.channels, "channels")
        check_size("x", x, -1, self.num_components, "components")
        with no_autocast(x):
            dtype = torch.promote_types(x.dtype, self.weight.dtype)
            weight = self._weight_of(y, x, dtype)
            parts = self._in.split_components(x.to(dtype))
            total: dict[Part, Tensor] = {}
            pieces = weight.split([len(degrees) for *_, degrees in self._groups], dim=-2)
            powers = self._powers(parts)
            for (order, sign, degrees), piece in zip(self._groups, pieces, strict=True):
                signal = powers[order, sign][..., : (degrees[-1] + 1) ** 2] * spread_over_degrees(piece.mT, degrees)
                add_to(total, parts_of(sign, degrees, signal))
            return self._out.join(total)

    def _weight_of(self, y: object, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of each sample's element, (..., terms, C)."""
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a tensor (..., num_elements) or of integers (...), got {type(y).__name__}")
        check_same_device("y", y, "x", x)
        weight = self.weight.to(dtype)
        weight = weight * constants(self._scales, weight)[:, None]
        if y.shape == x.shape[:-2] and not y.dtype.is_floating_point:
            if y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
                low, high = (int(v) for v in y.aminmax())
                if low < 0 or high >= self.num_elements:
                    raise ValueError(f"y must have elements from 0 to {self.num_elements - 1}, got {low} to {high}")
            return weight[y.long()]
        if y.shape != (*x.shape[:-2], self.num_elements):
            raise ValueError(
                f"y must be one-hot, {(*x.shape[:-2], self.num_elements)}, or integers, {tuple(x.shape[:-2])}, as x "
                f"has shape {tuple(x.shape)}; got shape {tuple(y.shape)}, {y.dtype}"
            )
        return (y.to(dtype) @ weight.flatten(1)).unflatten(-1, weight.shape[1:])

    def _powers(self, parts: Mapping[Part, Tensor]) -> dict[tuple[int, int], Tensor]:
        """(ν, sign) -> that part of X^ν, up to the highest degree that is wanted of X^ν."""
        lmax = max(degree for _, degree in parts)
        signals = {s: join_degrees({d: parts[s, d] for d in self._in.degrees(s)}, lmax) for s in self._in.signs}
        found = {(1, sign): signal for sign, signal in signals.items()}
        highest: dict[int, int] = {}
        for order, _, degrees in self._groups:
            if order > 1:
                highest[order] = min(max(highest.get(order, 0), *degrees), order * lmax)

        def powers(signal: Tensor) -> dict[int, Tensor]:
            return many_body_powers(signal, lmax, highest, backend=self.backend)

        if len(signals) == 1:
            ((sign, signal),) = signals.items()
            return found | {(order, sign**order): power for order, power in powers(signal).items()}
        plus, minus = powers(signals[1] + signals[-1]), powers(signals[1] - signals[-1])
        for order in highest:
            found[order, 1] = (plus[order] + minus[order]) / 2
            found[order, -1] = (plus[order] - minus[order]) / 2
        return found

    def extra_repr(self) -> str:
        text = f"{self.irreps_in} -> {self.irreps_out}, correlation={self.correlation}"
        if self._in.layout != "mul_ir":
            text += f", layout={self._in.layout!r}"
        return f"{text}, num_elements={self.num_elements}"
