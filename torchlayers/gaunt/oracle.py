"""The potential's products by e3nn: blocks of the same parameters' form that the Gaunt ones are compared with."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Device
from .convolution import EdgeOrder
from .irreps import FlatIrreps, Part, e3nn_o3
from .sphere import spherical_harmonics


class _E3nnProduct(nn.Module):
    """An e3nn ``TensorProduct`` of all paths between the irreps, whose coefficients are exact in every dtype."""

    def __init__(
        self,
        irreps1: Any,
        irreps2: Any,
        irreps_out: Any,
        connection: str,
        *,
        own_weights: bool,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        paths = [
            (i, j, k, connection, True)
            for i, (_, first) in enumerate(irreps1)
            for j, (_, second) in enumerate(irreps2)
            for k, (_, third) in enumerate(irreps_out)
            if third in first * second
        ]
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # e3nn makes its coefficients in it
        try:
            with warnings.catch_warnings(), torch.device("cpu"):  # e3nn compiles by means that torch calls deprecated
                warnings.simplefilter("ignore")
                self.product = e3nn_o3().TensorProduct(
                    irreps1,
                    irreps2,
                    irreps_out,
                    paths,
                    internal_weights=own_weights,
                    shared_weights=own_weights,
                )
        finally:
            torch.set_default_dtype(default)
        self._exact = {name: table.clone() for name, table in self.product.named_buffers()}
        self.weight_numel: int = self.product.weight_numel
        self.to(device=device, dtype=dtype or default)

    def _apply(self, fn: Any, recurse: bool = True) -> _E3nnProduct:
        super()._apply(fn, recurse)
        for name, table in self.product.named_buffers():
            if not table.is_meta:
                table.copy_(self._exact[name])
        return self

    def reset_parameters(self) -> None:
        """Draw the weights, where it has its own."""
        if self.product.internal_weights:
            nn.init.normal_(self.product.weight)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.product(x, y, weight)


class OracleConv(nn.Module):
    """:class:`GauntConv` with a free weight for each path: e3nn's 'uvu' product and a sum over edges."""

    def __init__(
        self,
        irreps_in: Any,
        lmax_filter: int,
        irreps_out: Any,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        o3 = e3nn_o3()
        self.lmax_filter = lmax_filter
        self.product = _E3nnProduct(
            o3.Irreps(irreps_in),
            o3.Irreps.spherical_harmonics(lmax_filter),
            o3.Irreps(irreps_out),
            "uvu",
            own_weights=False,
            device=device,
            dtype=dtype,
        )
        self.weight_numel = self.product.weight_numel

    def forward(self, x: Tensor, edge_vec: Tensor, edges: EdgeOrder, weight: Tensor) -> Tensor:
        harmonics = math.sqrt(4 * math.pi) * spherical_harmonics(self.lmax_filter, edge_vec)
        messages = self.product(x[edges.source], harmonics, weight)
        return messages.new_zeros(len(x), messages.shape[1]).index_add(0, edges.target, messages)


class OracleContraction(nn.Module):
    """:class:`GauntSymmetricContraction` with free weights of paths: nested 'uuu' products of e3nn."""

    def __init__(
        self,
        irreps_in: Any,
        irreps_out: Any,
        correlation: int,
        num_elements: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._in, self._out = FlatIrreps("irreps_in", irreps_in), FlatIrreps("irreps_out", irreps_out)
        channels = self._in.channels()
        o3 = e3nn_o3()
        lmax, lmax_out = self._in.irreps.lmax, self._out.irreps.lmax
        self.products = nn.ModuleList()
        self._powers = [self._in]
        for order in range(2, correlation + 1):
            first = self._powers[-1].irreps
            # What a later product can still bring down to lmax_out.
            bound = lmax_out + (correlation - order) * lmax
            reached = {ir for _, a in first for _, b in self._in.irreps for ir in a * b if ir.l <= bound}
            irreps = o3.Irreps([(channels, ir) for ir in sorted(reached, key=lambda ir: (ir.l, ir.p))])
            self.products.append(
                _E3nnProduct(first, self._in.irreps, irreps, "uuu", own_weights=True, device=device, dtype=dtype)
            )
            self._powers.append(FlatIrreps("power", irreps))
        self.terms = [
            (i, part) for i, power in enumerate(self._powers) for part in self._out.muls if part in power.muls
        ]
        self.weight = nn.Parameter(torch.empty(num_elements, len(self.terms), channels, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_()
        for product in self.products:
            product.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        flat = self._in.join(self._in.split_components(x))
        powers, power = [self._in.split(flat)], flat
        for product, irreps in zip(self.products, self._powers[1:], strict=True):
            power = product(power, flat)
            powers.append(irreps.split(power))
        weight = self.weight[y]
        count = {part: sum(p == part for _, p in self.terms) for part in self._out.muls}
        total: dict[Part, Tensor] = {}
        for number, (i, part) in enumerate(self.terms):
            value = powers[i][part] * (weight[:, number, :, None] / math.sqrt(count[part]))
            total[part] = total[part] + value if part in total else value
        return self._out.join(total)
