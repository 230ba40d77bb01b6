"""Equivariant layers on e3nn's irreps whose product is that of signals on the sphere.

A layer splits its irreps into a true and a pseudo-signal and multiplies pairs of signals, pointwise (paths of even
l1 + l2 + l3) or by the Poisson bracket (odd, flips the parity). Such a pair is a :class:`Coupling`. Weights act on the
two factors and on the result, a number or a matrix for each degree, and their products are the weights of the paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._attention import no_autocast
from .._checks import check_choice, check_dtype, check_int, check_ndim, check_same_device, check_size
from .arguments import Device
from .contraction import GauntSymmetricContraction
from .convolution import EdgeOrder
from .couplings import (
    Coupling,
    CouplingWeights,
    DegreeWeights,
    MixingWeights,
    WeightView,
    add_to,
    check_backend,
    check_features,
    check_leading,
    check_module_options,
    couplings_of,
    draw_weights_,
    parts_of,
    path_scales,
    reachable_irreps,
    signals_of,
)
from .functional import gaunt_convolution, gaunt_tensor_product
from .irreps import FlatIrreps, Part, join_degrees

__all__ = [
    "Coupling",
    "GauntConv",
    "GauntSelfInteraction",
    "GauntSymmetricContraction",
    "GauntTensorProduct",
    "WeightView",
]

CONNECTIONS = ("uuu", "uvu", "uvw")


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
        check_module_options(method, backend, dtype)
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
        inputs = (signals_of(first), signals_of(second))
        if irreps_out is None:
            lmax = max(degree for _, degree in first.muls) + max(degree for _, degree in second.muls)
            everything = {sign: range(lmax + 1) for sign in (1, -1)}
            reached = couplings_of(*inputs, everything, self.antisymmetric, self._squared)
            irreps_out = reachable_irreps(reached, channels)
        out = FlatIrreps("irreps_out", irreps_out, first.layout)
        if connection == "uvw":
            channels = max(out.muls.values())
        else:
            out.channels(channels, f"{why}, that of {first.name}")
        self.channels = channels
        self.couplings = tuple(couplings_of(*inputs, signals_of(out), self.antisymmetric, self._squared))
        self._first, self._second, self._out = first, second, out
        paths = "the product or the bracket" if antisymmetric else "the product (antisymmetric=False)"
        factors = str(first) if self._squared else f"{first} and {second}"
        scales = path_scales(out, self.couplings, f"{paths} of {factors}")

        size = (self.rank, channels)
        self._weights: list[tuple[CouplingWeights, CouplingWeights, CouplingWeights]] = []
        for c in self.couplings:
            factors_in: list[CouplingWeights] = []
            for flat, sign, degrees in ((first, c.sign1, c.degrees1), (second, c.sign2, c.degrees2)):
                muls = [flat.muls[sign, degree] for degree in degrees]
                mixes = connection == "uvw" or (connection == "uvu" and flat is second and max(muls) > 1)
                if mixes:
                    fan_in = [1 / math.sqrt(mul) for mul in muls]
                    factors_in.append(MixingWeights(sign, degrees, *size, fan_in, flat))
                else:
                    factors_in.append(DegreeWeights(sign, degrees, *size))
            terms = self.rank * (channels if connection == "uvw" else 1)
            scale = [scales[c.sign_out, degree] / math.sqrt(terms) for degree in c.degrees_out]
            result: CouplingWeights
            if connection == "uvw":
                result = MixingWeights(c.sign_out, c.degrees_out, *size, scale, out)
            else:
                result = DegreeWeights(c.sign_out, c.degrees_out, *size, scale)
            self._weights.append((factors_in[0], factors_in[1], result))
        self.weight_numel = sum(w.numel for weights in self._weights for w in weights)
        weight = nn.Parameter(torch.empty(self.weight_numel, device=device, dtype=dtype)) if internal_weights else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights: independent, symmetric about 0, of variance 1."""
        if self.weight is not None:
            draw_weights_(self.weight)

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

    def _pieces(self, weight: Tensor) -> Iterator[tuple[Coupling, tuple[CouplingWeights, ...], tuple[Tensor, ...]]]:
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
            check_leading("weight", weight, "x", x)
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
            add_to(total, out.lower(pieces[2], z))
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

    Example:

        >>> import torch
        >>> from torchlayers.gaunt import GauntTensorProduct
        >>> product = GauntTensorProduct("8x0e+8x1o+8x2e", "8x0e+8x1o+8x2e", "8x0e+8x1o+8x1e+8x2e", antisymmetric=True)
        >>> x, y = torch.randn(5, 72), torch.randn(5, 72)
        >>> product(x, y).shape
        torch.Size([5, 96])
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
        check_features("x", x, self._first)
        check_features("y", y, self._second)
        check_leading("y", y, "x", x)
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

    Example:

        >>> import torch
        >>> from torchlayers.gaunt import GauntSelfInteraction
        >>> layer = GauntSelfInteraction("8x0e+8x1o+8x2e")
        >>> layer(torch.randn(5, 72)).shape
        torch.Size([5, 72])
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
        check_features("x", x, self._first)
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

    Example:

        >>> import torch
        >>> from torchlayers.gaunt import GauntConv
        >>> conv = GauntConv("8x0e+8x1o", 2, "8x0e+8x1o+8x2e")
        >>> edge_index = torch.tensor([[0, 1, 2, 0], [1, 0, 0, 2]])
        >>> x, edge_vec, weight = torch.randn(3, 32), torch.randn(4, 3), torch.randn(4, conv.weight_numel)
        >>> conv(x, edge_vec, edge_index, weight).shape
        torch.Size([3, 72])
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
        check_backend(backend)
        self.backend = backend
        self._in = FlatIrreps("irreps_in", irreps_in, layout)
        self._out = FlatIrreps("irreps_out", irreps_out, layout)
        self.channels = self._in.channels()
        self._out.channels(self.channels, ", that of irreps_in")
        harmonics = {1: range(lmax_filter + 1)}
        self.couplings = tuple(couplings_of(signals_of(self._in), harmonics, signals_of(self._out), self.antisymmetric))
        paths = "the product or the bracket" if antisymmetric else "the product (antisymmetric=False)"
        scales = path_scales(
            self._out, self.couplings, f"{paths} of {self._in} with a filter up to degree {lmax_filter}"
        )
        # Orthonormal harmonics of a random direction have variance 1 / 4π.
        self._scale = {part: scale * math.sqrt(4 * math.pi) for part, scale in scales.items()}
        self._sizes = [self.channels * len(c.degrees2) for c in self.couplings]
        self.weight_numel = sum(self._sizes)
        self.irreps_in, self.irreps_out = self._in.irreps, self._out.irreps

    def reset_parameters(self) -> None:
        """Nothing to draw: the weights come with the call."""

    def forward(self, x: Tensor, edge_vec: Tensor, edge_index: Tensor | EdgeOrder, weight: Tensor) -> Tensor:
        """(N, irreps_in.dim), (E, 3), (2, E), (E, weight_numel) -> (N, irreps_out.dim)."""
        check_features("x", x, self._in)
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
                add_to(total, parts_of(c.sign_out, c.degrees_out, signal))
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
