"""The spectral convolution layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._backend import BACKENDS
from .._checks import check_choice, check_ints
from ..factorized import FactorizedTensor
from .functional import METHODS, spectral_conv, spectral_resample
from .precision import PRECISIONS
from .weights import IMPLEMENTATIONS, SpectralWeight, auto_std, channel_axes, mode_totals, stored_modes

__all__ = ["SpectralConv"]


class SpectralConv(nn.Module):
    """Spectral convolution with a dense or factorized weight, the linear operator of a Fourier layer::

        X = truncated_rfftn(x, n_modes)                 Y[b,o,f] = Σ_i X[b,i,f] W[i,o,f]
        y = truncated_irfftn(Y, output_shape) + bias

    in 1, 2, 3 or more dimensions, on any grid: weights live at signed frequencies, so a trained layer applies at every
    resolution, odd sizes included. Arguments, attributes and state-dict keys are those of neuraloperator 2.0.0's
    layer of the same name, for which it stands in: ``neuralop.models.FNO(conv_module=SpectralConv)``.

    Args:
        in_channels, out_channels: Ci, Co.
        n_modes: frequencies kept of each axis, in total: -(m // 2), ..., (m - 1) // 2. The last axis of real data
            keeps 0, ..., m // 2. An int for 1-D.
        complex_data: complex fields; then the last axis is treated as the others are.
        max_n_modes: sizes of the weight's mode axes, where ``n_modes`` shall be able to grow up to them. As in
            neuraloperator they are taken as they are: the last one is not halved.
        bias: add a bias per output channel.
        separable: Ci == Co, Y[b,c,f] = X[b,c,f] W[c,f].
        resolution_scaling_factor: output size per input size, a number or one an axis; the product is rounded.
        fno_block_precision: "full", or on a GPU "half" or "mixed": ``precision`` of
            :func:`torchlayers.functional.spectral_conv`. May be set later, as :class:`PrecisionSchedule` does.
        rank, factorization, fixed_rank_modes: of the weight, see :class:`torchlayers.FactorizedTensor`;
            ``factorization`` is None or "dense", "cp", "tucker", "tt".
        implementation: "auto", "reconstructed" or "factorized", see :func:`torchlayers.functional.spectral_conv`.
        decomposition_kwargs: taken for the sake of the signature; nothing is decomposed at construction.
        init_std: standard deviation of the entries of W (whatever its factorization) and of the bias; "auto" is
            √(2 / (Ci + Co)).
        fft_norm: "forward", "backward" or "ortho". The layer's result is that of "forward" for each: the others give
            the same where input and output grid are equal, and depend on the resolution elsewhere.
        device, dtype: of the parameters; dtype is real, and W's parts have it.
        method, backend: how transforms are computed, see :func:`torchlayers.functional.spectral_conv`.
        has_weight: False leaves the weight out; it then comes with each call, as a jointly factorized model does.

    Shape: x (B, Ci, N1, ..., Nd) -> (B, Co, M1, ..., Md), in the dtype of x; M = N, N scaled, or ``output_shape``.

    Attributes:
        weight: :class:`~torchlayers.FactorizedTensor` of shape (Ci, Co, modes...) or, if separable, (C, modes...).
        bias: (Co, 1, ..., 1) or None.
        n_modes: what is kept, a list whose last entry reads halved, m // 2 + 1, for real data. It is set by totals.

    Raises:
        TypeError, ValueError: at construction, at setting ``n_modes`` beyond ``max_n_modes``, and at the call as
            :func:`torchlayers.functional.spectral_conv`.

    Source: arXiv 2310.00120, section 3.

    Example:

        >>> layer = SpectralConv(4, 8, (12, 12), factorization="tucker", rank=0.2)
        >>> layer(torch.randn(2, 4, 32, 32)).shape
        torch.Size([2, 8, 32, 32])
        >>> layer(torch.randn(2, 4, 21, 32), output_shape=(40, 33)).shape
        torch.Size([2, 8, 40, 33])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_modes: Sequence[int] | int,
        complex_data: bool = False,
        max_n_modes: Sequence[int] | int | None = None,
        bias: bool = True,
        separable: bool = False,
        resolution_scaling_factor: float | Sequence[float] | None = None,
        fno_block_precision: str = "full",
        rank: float | int | Sequence[int] = 0.5,
        factorization: str | None = None,
        implementation: str = "auto",
        fixed_rank_modes: Sequence[int] | bool | None = False,
        decomposition_kwargs: dict[str, Any] | None = None,
        init_std: float | str = "auto",
        fft_norm: str = "forward",
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        method: str = "auto",
        backend: str | None = None,
        has_weight: bool = True,
    ):
        super().__init__()
        channels = channel_axes(in_channels, out_channels, separable)
        check_choice("fno_block_precision", fno_block_precision, PRECISIONS)
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        check_choice("fft_norm", fft_norm, ["forward", "backward", "ortho"])
        check_choice("method", method, METHODS)
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating-point dtype, got {dtype}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.complex_data = bool(complex_data)
        self.separable = bool(separable)
        stored = stored_modes(n_modes, self.complex_data)
        self.order = len(stored)
        if max_n_modes is None:
            self.max_n_modes = list(stored)
        else:
            self.max_n_modes = list(check_ints("max_n_modes", max_n_modes, self.order))
        self.n_modes = n_modes
        self.resolution_scaling_factor = scaling_factors(resolution_scaling_factor, self.order)
        self.fno_block_precision = fno_block_precision
        self.rank = rank
        self.factorization = factorization
        self.implementation = implementation
        self.fft_norm = fft_norm
        self.method = method
        self.backend = backend
        self.init_std = auto_std(init_std, in_channels, out_channels)
        self.weight: FactorizedTensor | None = None
        if has_weight:
            self.weight = FactorizedTensor(
                (*channels, *self.max_n_modes),
                factorization,
                rank,
                complex=True,
                init_std=self.init_std,
                fixed_rank_modes=fixed_rank_modes,
                device=device,
                dtype=dtype,
            )
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, *(1,) * self.order, device=device, dtype=dtype))
        self._reset_bias()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, with the standard deviation ``init_std``."""
        if self.weight is not None:
            self.weight.reset_parameters()
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            nn.init.normal_(self.bias, std=self.init_std)

    @property
    def n_modes(self) -> list[int]:
        """Kept entries of the weight's mode axes; set by totals, so the last one reads halved for real data."""
        return list(self._n_modes)

    @n_modes.setter
    def n_modes(self, n_modes: Sequence[int] | int) -> None:
        stored = stored_modes(n_modes, self.complex_data)
        if len(stored) != self.order:
            raise ValueError(f"n_modes must have {self.order} entries, got {len(stored)}: {n_modes}")
        for axis, (m, limit) in enumerate(zip(stored, self.max_n_modes, strict=True)):
            if m > limit:
                raise ValueError(
                    f"n_modes[{axis}] must keep at most max_n_modes[{axis}] = {limit} frequencies, got {m} "
                    f"(n_modes = {n_modes})"
                )
        self._n_modes, self._totals = stored, mode_totals(n_modes)

    def _output_shape(self, grid: Sequence[int], output_shape: Sequence[int] | None) -> tuple[int, ...]:
        if output_shape is not None:
            return check_ints("output_shape", output_shape, self.order)
        return scaled_size(grid, self.resolution_scaling_factor)

    def forward(
        self,
        x: Tensor,
        output_shape: Sequence[int] | None = None,
        *,
        weight: SpectralWeight | Tensor | None = None,
        skip: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """(B, Ci, N1, ..., Nd) -> (B, Co, M1, ..., Md); ``weight`` where the layer has none of its own.

        ``skip`` is added to the result, then ``activation`` ("gelu", "relu") applied, on a GPU in the same kernel.
        """
        own = self.weight if weight is None else weight
        if own is None:
            raise ValueError("weight must be given with the call, since the layer was made with has_weight=False")
        if isinstance(x, Tensor) and x.ndim == self.order + 2:
            output_shape = self._output_shape(x.shape[2:], output_shape)
        return spectral_conv(
            x,
            own,
            self._totals,
            bias=self.bias,
            output_shape=output_shape,
            separable=self.separable,
            complex_data=self.complex_data,
            implementation=self.implementation,
            method=self.method,
            backend=self.backend,
            skip=skip,
            activation=activation,
            precision=self.fno_block_precision,
        )

    def transform(self, x: Tensor, output_shape: Sequence[int] | None = None) -> Tensor:
        """``x`` on the grid that the layer's output would have, for skip connections: a spectral interpolation."""
        size = self._output_shape(x.shape[2:], output_shape)
        return x if size == tuple(x.shape[2:]) else spectral_resample(x, size)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kept={tuple(self._n_modes)}"
        if self._n_modes != tuple(self.max_n_modes):
            text += f" of {tuple(self.max_n_modes)}"
        for name in ("complex_data", "separable"):
            if getattr(self, name):
                text += f", {name}=True"
        if self.resolution_scaling_factor is not None:
            text += f", resolution_scaling_factor={self.resolution_scaling_factor}"
        if self.weight is None:
            text += ", weight given with the call"
        if self.bias is None:
            text += ", bias=False"
        return text + f", implementation={self.implementation!r}"


# --- what the backbone needs too --------------------------------------------------------------------------------


def scaled_size(grid: Sequence[int], factors: Sequence[float] | None) -> tuple[int, ...]:
    """round(r N), at least 1, of each axis; ``grid`` itself without factors."""
    if factors is None:
        return tuple(grid)
    return tuple(max(1, round(n * r)) for n, r in zip(grid, factors, strict=True))


def scaling_factors(factor: float | Sequence[float] | None, n_dim: int) -> list[float] | None:
    """One factor an axis; None stays None."""
    if factor is None:
        return None
    factors = [factor] * n_dim if isinstance(factor, (int, float)) else list(factor)
    if len(factors) != n_dim:
        raise ValueError(f"resolution_scaling_factor must have {n_dim} entries, got {len(factors)}: {factor}")
    for r in factors:
        if isinstance(r, bool) or not isinstance(r, (int, float)):
            raise TypeError(f"resolution_scaling_factor must be made of numbers, got {factor!r}")
        if not (r > 0 and math.isfinite(r)):
            raise ValueError(f"resolution_scaling_factor must be positive and finite, got {factor}")
    return [float(r) for r in factors]
