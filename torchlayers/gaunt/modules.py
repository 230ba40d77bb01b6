"""Equivariant layers on e3nn's irreps whose product is that of signals on the sphere.

A layer splits its irreps into a true and a pseudo-signal and multiplies pairs of signals, pointwise (paths of even
l1 + l2 + l3) or by the Poisson bracket (odd, flips the parity). Such a pair is a :class:`Coupling`. Weights act on the
two factors and on the result, a number or a matrix for each degree, and their products are the weights of the paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .._attention import no_autocast
from .._backend import BACKENDS
from .._checks import check_choice, check_dtype, check_int, check_ndim, check_same_device, check_size
from .coefficients import bracket_scale, gaunt_scale
from .convolution import EdgeOrder
from .functional import METHODS, gaunt_convolution, gaunt_many_body, gaunt_tensor_product
from .irreps import FlatIrreps, Part, constants, e3nn_o3, join_degrees, split_degrees, spread_over_degrees
from .sphere import sphere_quadrature, spherical_harmonics

__all__ = [
    "Coupling",
    "GauntConv",
    "GauntSelfInteraction",
    "GauntSymmetricContraction",
    "GauntTensorProduct",
    "WeightView",
]

CONNECTIONS = ("uuu", "uvu", "uvw")

Device = torch.device | str | None


# ------------------------------------------------------------------------------------------------------- couplings


@dataclass(frozen=True)
class Coupling:
    """One product of two signals.

    Attributes:
        antisymmetric: the Poisson bracket rather than the pointwise product.
        sign1, sign2, sign_out: 1 for a true signal, -1 for a pseudo-signal.
        degrees1, degrees2, degrees_out: the degrees that have a path here.
        variances: for each of ``degrees_out`` the variance of a component, summed over its paths, where the factors'
            components and the paths' weights have variance 1.
    """

    antisymmetric: bool
    sign1: int
    sign2: int
    degrees1: tuple[int, ...]
    degrees2: tuple[int, ...]
    degrees_out: tuple[int, ...]
    variances: tuple[float, ...]

    @property
    def sign_out(self) -> int:
        return -self.sign1 * self.sign2 if self.antisymmetric else self.sign1 * self.sign2

    @property
    def lmax1(self) -> int:
        return self.degrees1[-1]

    @property
    def lmax2(self) -> int:
        return self.degrees2[-1]

    @property
    def lmax_out(self) -> int:
        return self.degrees_out[-1]


def _couplings(
    first: Mapping[int, Sequence[int]],
    second: Mapping[int, Sequence[int]],
    out: Mapping[int, Sequence[int]],
    antisymmetric: bool,
    squared: bool = False,
) -> list[Coupling]:
    """All couplings between signals, given as sign -> degrees. ``squared``: both factors are the same features."""
    found = []
    for sign1, degrees1 in first.items():
        for sign2, degrees2 in second.items():
            if squared and sign1 < sign2:  # the pair in the other order is the same product
                continue
            for odd in (False, True) if antisymmetric else (False,):
                degrees3 = out.get(-sign1 * sign2 if odd else sign1 * sign2, ())
                scale = bracket_scale if odd else gaunt_scale
                variance: dict[tuple[int, int, int], float] = {}
                for path in ((l1, l2, l3) for l1 in degrees1 for l2 in degrees2 for l3 in degrees3):
                    size = scale(*path) ** 2 / (2 * path[2] + 1)
                    if squared and sign1 == sign2 and path[0] == path[1]:
                        # x against itself: the product counts each pair twice, the bracket cancels.
                        size *= 0 if odd else 2
                    if size:
                        variance[path] = size
                if variance:
                    used1, used2, used3 = (tuple(sorted({path[i] for path in variance})) for i in range(3))
                    sums = tuple(sum(v for path, v in variance.items() if path[2] == l3) for l3 in used3)
                    found.append(Coupling(odd, sign1, sign2, used1, used2, used3, sums))
    return found


def _signals(flat: FlatIrreps) -> dict[int, tuple[int, ...]]:
    return {sign: flat.degrees(sign) for sign in flat.signs}


def _reachable_irreps(couplings: Iterable[Coupling], multiplicity: int) -> Any:
    parts = {(degree, c.sign_out * (-1) ** degree) for c in couplings for degree in c.degrees_out}
    o3 = e3nn_o3()
    return o3.Irreps([(multiplicity, o3.Irrep(*part)) for part in sorted(parts)])


def _scales(out: FlatIrreps, couplings: Sequence[Coupling], because: str) -> dict[Part, float]:
    """part of the output -> what brings its components to variance 1.

    Raises:
        ValueError: a part that no coupling reaches, by name.
    """
    variance = dict.fromkeys(out.muls, 0.0)
    for coupling in couplings:
        for degree, value in zip(coupling.degrees_out, coupling.variances, strict=True):
            variance[coupling.sign_out, degree] += value
    _check_reached(out, [part for part, value in variance.items() if value == 0], because)
    return {part: 1 / math.sqrt(value) for part, value in variance.items()}


def _check_reached(out: FlatIrreps, unreached: Sequence[Part], because: str) -> None:
    if unreached:
        names = ", ".join(str(e3nn_o3().Irrep(degree, sign * (-1) ** degree)) for sign, degree in unreached)
        raise ValueError(f"{out.name} must hold only what {because} reaches, got {out.irreps} with {names}")


# --------------------------------------------------------------------------------------------------------- weights


def _parts(sign: int, degrees: Sequence[int], signal: Tensor) -> dict[Part, Tensor]:
    pieces = split_degrees(signal)
    return {(sign, degree): pieces[degree] for degree in degrees}


def _add_to(total: dict[Part, Tensor], parts: Mapping[Part, Tensor]) -> None:
    for key, part in parts.items():
        total[key] = total[key] + part if key in total else part


class _DegreeWeights:
    """A number a channel and degree, for each of ``rank`` terms: (rank, channels, degrees)."""

    def __init__(self, sign: int, degrees: tuple[int, ...], rank: int, channels: int, scales: Sequence[float] = ()):
        self.sign, self.degrees, self.scales = sign, degrees, tuple(scales)
        self.shape = (rank, channels, len(degrees))
        self.numel = math.prod(self.shape)

    def view(self, weight: Tensor) -> Tensor:
        return weight.unflatten(-1, self.shape)

    def lift(self, weight: Tensor, parts: Mapping[Part, Tensor]) -> Tensor:
        """parts (..., C or 1, 2l + 1) -> the weighted signal (..., rank, C, n)."""
        signal = join_degrees({degree: parts[self.sign, degree] for degree in self.degrees}, self.degrees[-1])
        return signal.unsqueeze(-3) * spread_over_degrees(self.view(weight), self.degrees)

    def lower(self, weight: Tensor, signal: Tensor) -> dict[Part, Tensor]:
        """(..., rank, C, n) -> weighted parts (..., C, 2l + 1), summed over the terms."""
        z = signal * spread_over_degrees(self.view(weight) * constants(self.scales, weight), self.degrees)
        z = z.squeeze(-3) if self.shape[0] == 1 else z.sum(-3)
        return _parts(self.sign, self.degrees, z)


class _MixingWeights:
    """A matrix between channels and multiplicity a degree, for each term: one degree after the other."""

    def __init__(
        self, sign: int, degrees: tuple[int, ...], rank: int, channels: int, scales: Sequence[float], flat: FlatIrreps
    ):
        self.sign, self.degrees, self.scales = sign, degrees, tuple(scales)
        self.inner = (rank, channels)
        self.muls = tuple(flat.muls[sign, degree] for degree in degrees)
        self.numel = rank * channels * sum(self.muls)

    def view(self, weight: Tensor) -> list[Tensor]:
        """For each degree (..., rank, channels, mul)."""
        pieces = weight.split([self.inner[0] * self.inner[1] * mul for mul in self.muls], dim=-1)
        return [piece.unflatten(-1, (*self.inner, mul)) for piece, mul in zip(pieces, self.muls, strict=True)]

    def lift(self, weight: Tensor, parts: Mapping[Part, Tensor]) -> Tensor:
        mixed: dict[int, Tensor] = {}
        for degree, scale, matrix in zip(self.degrees, self.scales, self.view(weight), strict=True):
            part = parts[self.sign, degree]
            product = (matrix.flatten(-3, -2) * scale) @ part
            mixed[degree] = product.unflatten(-2, self.inner)
        return join_degrees(mixed, self.degrees[-1])

    def lower(self, weight: Tensor, signal: Tensor) -> dict[Part, Tensor]:
        parts = _parts(self.sign, self.degrees, signal)
        weights = zip(parts.items(), self.scales, self.view(weight), strict=True)
        return {
            key: (matrix.flatten(-3, -2) * scale).mT @ part.flatten(-3, -2) for (key, part), scale, matrix in weights
        }


_Weights = _DegreeWeights | _MixingWeights


class WeightView(NamedTuple):
    """The weights of one coupling: on its two factors and on its result.

    Each is (..., rank, channels, degrees), or where channels are mixed a list with (..., rank, channels, mul) for each
    degree; the degrees are the coupling's.
    """

    coupling: Coupling
    in1: Tensor | list[Tensor]
    in2: Tensor | list[Tensor]
    out: Tensor | list[Tensor]


def _draw_weights_(weight: Tensor) -> None:
    """Independent signs times magnitudes √u, u uniform in [3/4, 5/4]: variance 1, and a narrow spread of squares.

    Path weights are products of three of these. Normal factors would leave most channels near zero and a few far out.
    """
    magnitude = torch.rand_like(weight).mul_(0.5).add_(0.75).sqrt_()
    weight.copy_(torch.where(torch.rand_like(weight) < 0.5, -magnitude, magnitude))


def _check_features(name: str, x: object, flat: FlatIrreps) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor (..., {flat.dim}), got {type(x).__name__}")
    check_dtype(name, x, kind="real")
    if x.ndim == 0:
        raise ValueError(f"{name} must have shape (..., {flat.dim}), got a tensor without dimensions")
    check_size(name, x, -1, flat.dim, f"{flat.name}.dim")


def _check_leading(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    try:
        torch.broadcast_shapes(x.shape[:-1], other.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} must have leading dimensions that broadcast with those of {other_name}, "
            f"{tuple(other.shape[:-1])}, got shape {tuple(x.shape)}"
        ) from None


def _check_module_options(method: str, backend: str | None, dtype: torch.dtype | None) -> None:
    check_choice("method", method, METHODS)
    _check_backend(backend)
    _check_parameter_dtype(dtype)


def _check_backend(backend: str | None) -> None:
    if backend is not None:
        check_choice("backend", backend, BACKENDS)


def _check_parameter_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating-point dtype, got {dtype}")


# -------------------------------------------------------------------------------------------------------- products


class _WeightedProduct(nn.Module):
    """What products of two features share: couplings, their weights, the way from flat tensors and back."""

    weight: nn.Parameter | None

    def _build(
        self,
        first: FlatIrreps,
        second: FlatIrreps,
        irreps_out: Any,
        *,
        connection: str,
        rank: int,
        antisymmetric: bool,
        internal_weights: bool,
        shared_weights: bool,
        method: str,
        backend: str | None,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        _check_module_options(method, backend, dtype)
        if internal_weights and not shared_weights:
            raise ValueError("shared_weights must be True where internal_weights is, got False: one set is kept")
        self.rank = check_int("rank", rank)
        self.antisymmetric = bool(antisymmetric)
        self.internal_weights, self.shared_weights = bool(internal_weights), bool(shared_weights)
        self.method, self.backend = method, backend
        self._squared = first is second
        why = f" for connection {connection!r}"
        if connection == "uvw":
            channels = max(first.muls.values())
        else:
            channels = first.channels(None, why)
        if connection == "uuu":
            second.channels(channels, f"{why}, that of {first.name}")
        inputs = (_signals(first), _signals(second))
        if irreps_out is None:
            lmax = max(degree for _, degree in first.muls) + max(degree for _, degree in second.muls)
            everything = {sign: range(lmax + 1) for sign in (1, -1)}
            reached = _couplings(*inputs, everything, self.antisymmetric, self._squared)
            irreps_out = _reachable_irreps(reached, channels)
        out = FlatIrreps("irreps_out", irreps_out, first.layout)
        if connection == "uvw":
            channels = max(out.muls.values())
        else:
            out.channels(channels, f"{why}, that of {first.name}")
        self.channels = channels
        self.couplings = tuple(_couplings(*inputs, _signals(out), self.antisymmetric, self._squared))
        self._first, self._second, self._out = first, second, out
        paths = "the product or the bracket" if antisymmetric else "the product (antisymmetric=False)"
        factors = str(first) if self._squared else f"{first} and {second}"
        scales = _scales(out, self.couplings, f"{paths} of {factors}")

        size = (self.rank, channels)
        self._weights: list[tuple[_Weights, _Weights, _Weights]] = []
        for c in self.couplings:
            factors_in: list[_Weights] = []
            for flat, sign, degrees in ((first, c.sign1, c.degrees1), (second, c.sign2, c.degrees2)):
                muls = [flat.muls[sign, degree] for degree in degrees]
                mixes = connection == "uvw" or (connection == "uvu" and flat is second and max(muls) > 1)
                if mixes:
                    fan_in = [1 / math.sqrt(mul) for mul in muls]
                    factors_in.append(_MixingWeights(sign, degrees, *size, fan_in, flat))
                else:
                    factors_in.append(_DegreeWeights(sign, degrees, *size))
            terms = self.rank * (channels if connection == "uvw" else 1)
            scale = [scales[c.sign_out, degree] / math.sqrt(terms) for degree in c.degrees_out]
            result: _Weights
            if connection == "uvw":
                result = _MixingWeights(c.sign_out, c.degrees_out, *size, scale, out)
            else:
                result = _DegreeWeights(c.sign_out, c.degrees_out, *size, scale)
            self._weights.append((factors_in[0], factors_in[1], result))
        self.weight_numel = sum(w.numel for weights in self._weights for w in weights)
        weight = nn.Parameter(torch.empty(self.weight_numel, device=device, dtype=dtype)) if internal_weights else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights: independent, symmetric about 0, of variance 1."""
        if self.weight is not None:
            _draw_weights_(self.weight)

    def _own_or(self, weight: object) -> Tensor:
        if weight is None:
            if self.weight is None:
                raise ValueError("weight must be given with the call where internal_weights is False, got None")
            return self.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor (..., {self.weight_numel}), got {type(weight).__name__}")
        check_dtype("weight", weight, kind="real")
        if self.shared_weights:
            check_ndim("weight", weight, 1, "(weight_numel,)")
        elif weight.ndim == 0:
            raise ValueError(f"weight must have shape (..., {self.weight_numel}), got a tensor without dimensions")
        check_size("weight", weight, -1, self.weight_numel, "weight_numel")
        return weight

    def _pieces(self, weight: Tensor) -> Iterator[tuple[Coupling, tuple[_Weights, ...], tuple[Tensor, ...]]]:
        pieces = weight.split([w.numel for weights in self._weights for w in weights], dim=-1)
        for i, (coupling, weights) in enumerate(zip(self.couplings, self._weights, strict=True)):
            yield coupling, weights, pieces[3 * i : 3 * i + 3]

    def weight_views(self, weight: Tensor | None = None) -> list[WeightView]:
        """The flat weights as what they act on, one entry a coupling: views, so that writing to them sets weights.

        Without an argument those of the module.
        """
        source = self._own_or(weight)
        return [
            WeightView(coupling, *(w.view(piece) for w, piece in zip(weights, pieces, strict=True)))
            for coupling, weights, pieces in self._pieces(source)
        ]

    def _multiply(self, x: Tensor, y: Tensor, weight: object) -> Tensor:
        """The product of checked features with the weights of the call, or the module's own."""
        weight = self._own_or(weight)
        if weight.ndim > 1:
            _check_leading("weight", weight, "x", x)
        check_same_device("weight", weight, "x", x)
        with no_autocast(x):
            return self._product(x, y, weight)

    def _product(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), weight.dtype)
        x, y, weight = x.to(dtype), y.to(dtype), weight.to(dtype)
        first, second = self._first.split(x), self._second.split(y)
        total: dict[Part, Tensor] = {}
        for c, (in1, in2, out), pieces in self._pieces(weight):
            z = gaunt_tensor_product(
                in1.lift(pieces[0], first),
                in2.lift(pieces[1], second),
                c.lmax1,
                c.lmax2,
                c.lmax_out,
                antisymmetric=c.antisymmetric,
                method=self.method,
                backend=self.backend,
            )
            _add_to(total, out.lower(pieces[2], z))
        return self._out.join(total)

    def _options_repr(self) -> str:
        text = f", rank={self.rank}, antisymmetric={self.antisymmetric}"
        if not self.internal_weights:
            text += f", internal_weights=False, shared_weights={self.shared_weights}"
        if self._first.layout != "mul_ir":
            text += f", layout={self._first.layout!r}"
        return f"{text}, weight_numel={self.weight_numel}"


class GauntTensorProduct(_WeightedProduct):
    r"""The tensor product of two features by multiplying them as functions on the sphere, in O(L³)::

        z_{l3} = α_{l3} Σ_r c_{r,l3} ( (a_r x) · (b_r y) )_{l3}

    where (a_r x) is x with the irrep of degree l multiplied by a_{r,l}, and · the product of functions on the sphere
    X(r) = Σ_lm x_lm Y_lm(r). In e3nn's terms the path (l1, l2, l3) has the weight Σ_r a_{r,l1} b_{r,l2} c_{r,l3}, up to
    constants, where :class:`e3nn.o3.TensorProduct` has a free one: ``rank=1`` is the paper's layer, ``rank = L`` has
    been found to give all even paths of degrees up to L free weights (up to L = 5).

    The pointwise product has the paths of even l1 + l2 + l3 only. ``antisymmetric=True`` adds those of odd sum, the
    cross product among them, by the Poisson bracket r · (∇X × ∇Y), with weights of their own. Irreps of mixed parity
    are multiplied as true and pseudo-signals (0e, 1o, 2e, ... and 0o, 1e, 2o, ...), each pair with its own weights.

    Args:
        irreps_in1, irreps_in2: ``e3nn.o3.Irreps`` or what makes them, each irrep at most once, by ascending degree.
        irreps_out: by default all that the paths reach.
        connection: how channels meet. "uuu": each with its like; one multiplicity C throughout. "uvu": channels of
            ``irreps_in1`` and ``irreps_out`` with its like, each with its own mix of the channels of ``irreps_in2``,
            whose multiplicities are free; with one channel there (spherical harmonics of edges) it is e3nn's 'uvu'.
            "uvw": linear maps among the channels before and after a 'uuu' product of as many channels as the largest
            multiplicity of ``irreps_out``; all multiplicities are free. This is not e3nn's 'uvw', which has a weight
            for each triple of channels.
        rank: R, the number of products that are summed.
        antisymmetric: add the paths of odd l1 + l2 + l3.
        internal_weights: keep the weights as a parameter; otherwise they are given with each call.
        shared_weights: one set of weights for all samples, (weight_numel,); False, with ``internal_weights=False``
            only, takes one for each sample, (..., weight_numel).
        layout: order within an irrep of the flat tensors, "mul_ir" (mul, 2l + 1) as in e3nn or "ir_mul" (2l + 1, mul).
        device, dtype: of the parameter.
        method, backend: see :func:`torchlayers.functional.gaunt_tensor_product`.

    Shape: x (..., irreps_in1.dim), y (..., irreps_in2.dim), leading dimensions broadcast -> (..., irreps_out.dim).

    Attributes:
        irreps_in1, irreps_in2, irreps_out: ``e3nn.o3.Irreps``.
        weight_numel: the number of weights: for each coupling (true or pseudo with true or pseudo, product or bracket)
            those of the first factor, the second, the result; see :meth:`weight_views`.
        weight: (weight_numel,), or None.
        couplings: the products that are computed.

    The constants α give each output component variance 1 where the components of x and y are independent with variance
    1 ("component" normalisation) and so are the weights, as they are at the start.

    Raises:
        ValueError: irreps that come twice or unsorted, multiplicities that the connection does not allow, outputs that
            no path reaches or of the wrong parity, by name; shapes that do not fit at the call.
        TypeError: inputs that are no real floating-point tensors.
        ImportError: e3nn is not installed.

    Source: Luo et al., arXiv 2401.10216, section 3; the bracket: Bochkarev et al., arXiv 2605.15073.

    Example::

        import torch
        from torchlayers.gaunt import GauntTensorProduct

        product = GauntTensorProduct("8x0e+8x1o+8x2e", "8x0e+8x1o+8x2e", "8x0e+8x1o+8x1e+8x2e", antisymmetric=True)
        x, y = product.irreps_in1.randn(5, -1), product.irreps_in2.randn(5, -1)
        z = product(x, y)
        assert z.shape == (5, product.irreps_out.dim)
    """

    def __init__(
        self,
        irreps_in1: Any,
        irreps_in2: Any,
        irreps_out: Any = None,
        *,
        connection: str = "uuu",
        rank: int = 1,
        antisymmetric: bool = False,
        internal_weights: bool = True,
        shared_weights: bool = True,
        layout: str = "mul_ir",
        device: Device = None,
        dtype: torch.dtype | None = None,
        method: str = "auto",
        backend: str | None = None,
    ):
        super().__init__()
        check_choice("connection", connection, CONNECTIONS)
        self.connection = connection
        self._build(
            FlatIrreps("irreps_in1", irreps_in1, layout),
            FlatIrreps("irreps_in2", irreps_in2, layout),
            irreps_out,
            connection=connection,
            rank=rank,
            antisymmetric=antisymmetric,
            internal_weights=internal_weights,
            shared_weights=shared_weights,
            method=method,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.irreps_in1, self.irreps_in2 = self._first.irreps, self._second.irreps
        self.irreps_out = self._out.irreps

    @classmethod
    def from_e3nn(cls, tensor_product: nn.Module) -> nn.Module:
        """A module that computes exactly what an ``e3nn.o3.TensorProduct`` of 'uuu' or of 'uvu' paths does.

        Its weights are free for each path, so the result is an :class:`~torchlayers.gaunt.ExactTensorProduct`, with the
        same irreps, the same weights in the same order, and a copy of their values.

        Raises:
            TypeError: not an ``e3nn.o3.TensorProduct``.
            ValueError: other kinds of paths, by name.
        """
        from .take_over import ExactTensorProduct

        return ExactTensorProduct.from_e3nn(tensor_product)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """(..., irreps_in1.dim), (..., irreps_in2.dim) -> (..., irreps_out.dim)."""
        _check_features("x", x, self._first)
        _check_features("y", y, self._second)
        _check_leading("y", y, "x", x)
        check_same_device("y", y, "x", x)
        return self._multiply(x, y, weight)

    def extra_repr(self) -> str:
        connection = f", connection={self.connection!r}"
        return f"{self.irreps_in1} x {self.irreps_in2} -> {self.irreps_out}{connection}{self._options_repr()}"


class GauntSelfInteraction(_WeightedProduct):
    r"""The product of a feature with itself as functions on the sphere, channel by channel::

        z_{l3} = α_{l3} Σ_r c_{r,l3} ( (a_r x) · (b_r x) )_{l3}

    with a, b and c a number for each channel and degree, as :class:`GauntTensorProduct` has them. The bracket of a
    signal with itself is zero, but not that of two differently weighted ones.

    Args:
        irreps_in: ``e3nn.o3.Irreps`` or what makes them, of one multiplicity C, each irrep at most once, by ascending
            degree.
        irreps_out: by default ``irreps_in``.
        rank, antisymmetric, internal_weights, shared_weights, layout, device, dtype, method, backend: as for
            :class:`GauntTensorProduct`.

    Shape: x (..., irreps_in.dim) -> (..., irreps_out.dim).

    Attributes:
        irreps_in, irreps_out: ``e3nn.o3.Irreps``.
        weight, weight_numel, couplings: as for :class:`GauntTensorProduct`.

    Each output component has variance 1 where those of x are normal with variance 1; a scalar has a mean beside it.

    Raises:
        ValueError: irreps that come twice or unsorted, multiplicities that differ, outputs that no path reaches or of
            the wrong parity, by name; shapes that do not fit at the call.
        TypeError: an input that is no real floating-point tensor.
        ImportError: e3nn is not installed.

    Source: Luo et al., arXiv 2401.10216, section 3, "equivariant feature interaction".

    Example::

        import torch
        from torchlayers.gaunt import GauntSelfInteraction

        layer = GauntSelfInteraction("8x0e+8x1o+8x2e")
        assert layer(layer.irreps_in.randn(5, -1)).shape == (5, 72)
    """

    def __init__(
        self,
        irreps_in: Any,
        irreps_out: Any = None,
        *,
        rank: int = 1,
        antisymmetric: bool = False,
        internal_weights: bool = True,
        shared_weights: bool = True,
        layout: str = "mul_ir",
        device: Device = None,
        dtype: torch.dtype | None = None,
        method: str = "auto",
        backend: str | None = None,
    ):
        super().__init__()
        flat = FlatIrreps("irreps_in", irreps_in, layout)
        self._build(
            flat,
            flat,
            flat.irreps if irreps_out is None else irreps_out,
            connection="uuu",
            rank=rank,
            antisymmetric=antisymmetric,
            internal_weights=internal_weights,
            shared_weights=shared_weights,
            method=method,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.irreps_in, self.irreps_out = self._first.irreps, self._out.irreps

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """(..., irreps_in.dim) -> (..., irreps_out.dim)."""
        _check_features("x", x, self._first)
        return self._multiply(x, x, weight)

    def extra_repr(self) -> str:
        return f"{self.irreps_in} -> {self.irreps_out}{self._options_repr()}"


# ----------------------------------------------------------------------------------------------------- convolution


class GauntConv(nn.Module):
    r"""Message passing: each edge multiplies its source's feature by a filter along the edge, targets sum up::

        z_t = Σ_{e: s → t} α ( X_s · F_e )        F_e(r) = Σ_l w_{e,l} Y_l(r̂_e) · Y_l(r)

    What e3nn does by ``TensorProduct`` ('uvu') with ``o3.spherical_harmonics`` of the edge and a scatter, here without
    the harmonics of edges, without rotations to a pole, and without messages in memory where the kernel runs. The path
    (l1, l2, l3) has the weight w_{e,l2}; weights of l1 and l3 are those of linear layers before and after. Weights
    come with the call, from a network of the edge's length, so the module has no parameters.

    Args:
        irreps_in: of the nodes' features, of one multiplicity C, each irrep at most once, by ascending degree.
        lmax_filter: the filter's highest degree.
        irreps_out: of the result, multiplicity C.
        antisymmetric: add the paths of odd l1 + l2 + l3 by the Poisson bracket, with filters of their own. They change
            the parity: true features to pseudo-features (such as 1e) and back.
        layout: "mul_ir" or "ir_mul", as for :class:`GauntTensorProduct`.
        backend: see :func:`torchlayers.backend`.

    Shape: x (N, irreps_in.dim), edge_vec (E, 3), edge_index (2, E) int64 = (source, target), weight (E, weight_numel)
    -> (N, irreps_out.dim). ``edge_index`` may also be what :func:`torchlayers.gaunt.edge_order` made of it, once for
    several layers. Only the direction of ``edge_vec`` counts, and it points from source to target or the other way as
    the caller has it throughout; an edge of length zero contributes its filter's degree 0 alone, with a gradient of 0.

    Attributes:
        irreps_in, irreps_out: ``e3nn.o3.Irreps``.
        weight_numel: for each coupling (true or pseudo-feature, product or bracket) channels × degrees of its filter,
            in this order; ``couplings`` says which.

    The constants α give a component of a message variance 1 where those of x and the weights have it; a sum over k
    edges then has variance k.

    Raises:
        ValueError: irreps that come twice or unsorted, multiplicities that differ, outputs that no path reaches or of
            the wrong parity, by name; shapes that do not fit at the call.
        TypeError: inputs that are no real floating-point tensors, an ``edge_index`` that is not of integers.
        ImportError: e3nn is not installed.

    Source: Luo et al., arXiv 2401.10216, section 3, "equivariant convolution"; sums on the grid: arXiv 2605.15073.

    Example::

        import torch
        from torchlayers.gaunt import GauntConv

        conv = GauntConv("8x0e+8x1o", 2, "8x0e+8x1o+8x2e")
        edge_index = torch.tensor([[0, 1, 2, 0], [1, 0, 0, 2]])
        weight = torch.randn(4, conv.weight_numel)
        z = conv(conv.irreps_in.randn(3, -1), torch.randn(4, 3), edge_index, weight)
        assert z.shape == (3, conv.irreps_out.dim)
    """

    def __init__(
        self,
        irreps_in: Any,
        lmax_filter: int,
        irreps_out: Any,
        *,
        antisymmetric: bool = False,
        layout: str = "mul_ir",
        backend: str | None = None,
    ):
        super().__init__()
        self.lmax_filter = check_int("lmax_filter", lmax_filter, minimum=0)
        self.antisymmetric = bool(antisymmetric)
        _check_backend(backend)
        self.backend = backend
        self._in = FlatIrreps("irreps_in", irreps_in, layout)
        self._out = FlatIrreps("irreps_out", irreps_out, layout)
        self.channels = self._in.channels()
        self._out.channels(self.channels, ", that of irreps_in")
        harmonics = {1: range(lmax_filter + 1)}
        self.couplings = tuple(_couplings(_signals(self._in), harmonics, _signals(self._out), self.antisymmetric))
        paths = "the product or the bracket" if antisymmetric else "the product (antisymmetric=False)"
        scales = _scales(self._out, self.couplings, f"{paths} of {self._in} with a filter up to degree {lmax_filter}")
        # Orthonormal harmonics of a random direction have variance 1 / 4π.
        self._scale = {part: scale * math.sqrt(4 * math.pi) for part, scale in scales.items()}
        self._sizes = [self.channels * len(c.degrees2) for c in self.couplings]
        self.weight_numel = sum(self._sizes)
        self.irreps_in, self.irreps_out = self._in.irreps, self._out.irreps

    def reset_parameters(self) -> None:
        """Nothing to draw: the weights come with the call."""

    def forward(self, x: Tensor, edge_vec: Tensor, edge_index: Tensor | EdgeOrder, weight: Tensor) -> Tensor:
        """(N, irreps_in.dim), (E, 3), (2, E), (E, weight_numel) -> (N, irreps_out.dim)."""
        _check_features("x", x, self._in)
        check_ndim("x", x, 2, "(nodes, irreps_in.dim)")
        check_ndim("edge_vec", edge_vec, 2, "(edges, 3)")
        check_dtype("edge_vec", edge_vec, kind="real")
        check_ndim("weight", weight, 2, "(edges, weight_numel)")
        check_dtype("weight", weight, kind="real")
        check_size("weight", weight, 1, self.weight_numel, "weight_numel")
        check_size("weight", weight, 0, edge_vec.shape[0], "edges")
        with no_autocast(x):
            dtype = torch.promote_types(torch.promote_types(x.dtype, edge_vec.dtype), weight.dtype)
            parts = self._in.split(x.to(dtype))
            pieces = weight.to(dtype).split(self._sizes, dim=-1)
            total: dict[Part, Tensor] = {}
            for c, piece in zip(self.couplings, pieces, strict=True):
                signal = gaunt_convolution(
                    join_degrees({d: parts[c.sign1, d] for d in c.degrees1}, c.lmax1),
                    edge_vec.to(dtype),
                    self._filter(c, piece),
                    edge_index,
                    lmax=c.lmax1,
                    lmax_filter=c.lmax2,
                    lmax_out=c.lmax_out,
                    antisymmetric=c.antisymmetric,
                    backend=self.backend,
                )
                _add_to(total, _parts(c.sign_out, c.degrees_out, signal))
            return self._out.join({part: value * self._scale[part] for part, value in total.items()})

    def _filter(self, coupling: Coupling, piece: Tensor) -> Tensor:
        """(E, channels × degrees) -> (E, channels, lmax + 1), zero for degrees without a path."""
        weights = piece.unflatten(-1, (self.channels, len(coupling.degrees2)))
        if len(coupling.degrees2) == coupling.lmax2 + 1:
            return weights
        columns = dict(zip(coupling.degrees2, weights.unbind(-1), strict=True))
        none = torch.zeros_like(weights[..., 0])
        return torch.stack([columns.get(degree, none) for degree in range(coupling.lmax2 + 1)], dim=-1)

    def extra_repr(self) -> str:
        text = f"{self.irreps_in} -> {self.irreps_out}, lmax_filter={self.lmax_filter}"
        if self._in.layout != "mul_ir":
            text += f", layout={self._in.layout!r}"
        return f"{text}, antisymmetric={self.antisymmetric}, weight_numel={self.weight_numel}"


# ------------------------------------------------------------------------------------------------------- many-body


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

    Example::

        import torch
        from torchlayers.gaunt import GauntSymmetricContraction

        contraction = GauntSymmetricContraction("8x0e+8x1o+8x2e", "8x0e+8x1o", correlation=3, num_elements=2)
        x, y = torch.randn(5, 8, 9), torch.eye(2)[torch.tensor([0, 1, 1, 0, 1])]
        assert contraction(x, y).shape == (5, contraction.irreps_out.dim)
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
        _check_backend(backend)
        _check_parameter_dtype(dtype)
        self.backend = backend
        self._in = FlatIrreps("irreps_in", irreps_in, layout)
        self._out = FlatIrreps("irreps_out", irreps_out, layout)
        self.channels = self._in.channels()
        self._out.channels(self.channels, ", that of irreps_in")
        self.irreps_in, self.irreps_out = self._in.irreps, self._out.irreps
        variances = _power_variances(_signals(self._in), correlation, _signals(self._out))
        count = {part: sum(term[1:] == part for term in variances) for part in self._out.muls}
        _check_reached(
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
        _draw_weights_(self.weight)

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
            powers: dict[int, Tensor] = {}
            previous = 0
            for (order, sign, degrees), piece in zip(self._groups, pieces, strict=True):
                if order != previous:
                    lmax_out = max(d for nu, _, several in self._groups for d in several if nu == order)
                    powers, previous = self._powers(parts, order, lmax_out), order
                signal = powers[sign][..., : (degrees[-1] + 1) ** 2] * spread_over_degrees(piece.mT, degrees)
                _add_to(total, _parts(sign, degrees, signal))
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

    def _powers(self, parts: Mapping[Part, Tensor], order: int, lmax_out: int) -> dict[int, Tensor]:
        """sign -> that part of X^order, up to ``lmax_out``."""
        lmax = max(degree for _, degree in parts)
        signals = {s: join_degrees({d: parts[s, d] for d in self._in.degrees(s)}, lmax) for s in self._in.signs}
        if order == 1:
            return signals

        def power(signal: Tensor) -> Tensor:
            return gaunt_many_body(signal, lmax, order, min(lmax_out, order * lmax), backend=self.backend)

        if len(signals) == 1:
            ((sign, signal),) = signals.items()
            return {sign**order: power(signal)}
        plus, minus = power(signals[1] + signals[-1]), power(signals[1] - signals[-1])
        return {1: (plus + minus) / 2, -1: (plus - minus) / 2}

    def extra_repr(self) -> str:
        text = f"{self.irreps_in} -> {self.irreps_out}, correlation={self.correlation}"
        if self._in.layout != "mul_ir":
            text += f", layout={self._in.layout!r}"
        return f"{text}, num_elements={self.num_elements}"
