"""The Fourier layers around the spectral convolution, and the model made of them.

Constructor names and state-dict keys are those of neuraloperator 2.0.0, so that weights go both ways.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_dtype, check_int, check_ints, check_ndim, check_size
from .modules import SpectralConv, scaled_size, scaling_factors
from .precision import PRECISIONS
from .weights import JointSpectralWeights, mode_totals

__all__ = ["TFNO", "FNOBlocks"]

Activation = Callable[[Tensor], Tensor]
# What a spectral convolution applies itself, see its ``activation``.
FUSED: dict[Any, str] = {F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}
SKIPS = ("linear", "soft-gating", "identity")
NORMS = ("ada_in", "group_norm", "instance_norm", "batch_norm")


def _on_parts(function: Activation, x: Tensor) -> Tensor:
    """``function`` of the real and of the imaginary part; of ``x`` itself if that is real."""
    return torch.complex(function(x.real), function(x.imag)) if x.is_complex() else function(x)


def _reset(module: nn.Module) -> None:
    """Call ``reset_parameters`` of each descendant that has one."""
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            _reset(child)


def _check_double(x: Tensor, module: nn.Module) -> None:
    """float64 goes with float64; the rest is autocast's and FSDP's to cast."""
    parameter = next(module.parameters(), None)
    if parameter is not None and (x.real.dtype == torch.float64) != (parameter.dtype == torch.float64):
        raise TypeError(f"x must have the precision of the parameters, {parameter.dtype}, got {x.dtype}")


# --- parts ------------------------------------------------------------------------------------------------------


class PointwiseLinear(nn.Module):
    """A linear map of the channels at every point, without bias: the skip connection "linear"."""

    def __init__(self, in_channels: int, out_channels: int, **factory: Any):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(2)).unflatten(2, x.shape[2:])


class SoftGating(nn.Module):
    """A factor for each channel, 1 at initialisation: the skip connection "soft-gating"."""

    def __init__(self, channels: int, n_dim: int, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, channels, *(1,) * n_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ChannelMLP(nn.Module):
    """The same MLP on the channels of every point."""

    def __init__(
        self,
        sizes: Sequence[int],
        non_linearity: Activation = F.gelu,
        dropout: float = 0.0,
        **factory: Any,
    ):
        super().__init__()
        self.non_linearity = non_linearity
        self.fcs = nn.ModuleList(nn.Conv1d(i, o, 1, **factory) for i, o in itertools.pairwise(sizes))
        self.dropout = nn.ModuleList(nn.Dropout(dropout) for _ in self.fcs) if dropout > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        x = x.flatten(2)
        for i, fc in enumerate(self.fcs):
            x = fc(x)
            if i < len(self.fcs) - 1:
                x = self.non_linearity(x)
            if self.dropout is not None:
                x = self.dropout[i](x)
        return x.unflatten(2, grid)


class InstanceNorm(nn.Module):
    """Each channel of each sample to mean 0 and variance 1; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x) if x.shape[0] else x


class BatchNorm(nn.Module):
    """Batch normalization over the grid, whatever its dimension."""

    def __init__(self, channels: int, n_dim: int, **factory: Any):
        super().__init__()
        kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(n_dim, nn.BatchNorm1d)
        self.norm = kind(channels, **factory)
        self.n_dim = n_dim

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:  # no statistics to take
            shape = (1, -1, *(1,) * self.n_dim)
            return x * self.norm.weight.view(shape) + self.norm.bias.view(shape)
        return self.norm(x.flatten(2)).unflatten(2, x.shape[2:]) if self.n_dim > 3 else self.norm(x)


class AdaIN(nn.Module):
    """Instance normalization whose scale and shift an MLP makes of an embedding, set by :meth:`set_embedding`."""

    def __init__(self, features: int, channels: int, **factory: Any):
        super().__init__()
        self.features, self.channels = features, channels
        self.mlp = nn.Sequential(
            nn.Linear(features, 512, **factory), nn.GELU(), nn.Linear(512, 2 * channels, **factory)
        )
        self.embedding: Tensor | None = None

    def set_embedding(self, embedding: Tensor) -> None:
        if embedding.numel() != self.features:
            raise ValueError(f"embedding must have {self.features} entries, got shape {tuple(embedding.shape)}")
        self.embedding = embedding.reshape(self.features)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is None:
            raise ValueError("the AdaIN embedding must be set before the call, by set_ada_in_embeddings")
        scale, shift = self.mlp(self.embedding).split(self.channels)
        return F.group_norm(x, self.channels, scale, shift)


class ComplexValued(nn.Module):
    """A complex-linear version of a real module: (fr + i fi)(x)."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.fr, self.fi = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        re, im = x.real, x.imag
        return torch.complex(self.fr(re) - self.fi(im), self.fr(im) + self.fi(re))


def _skip(kind: str, in_channels: int, out_channels: int, n_dim: int, **factory: Any) -> nn.Module:
    if kind == "linear":
        return PointwiseLinear(in_channels, out_channels, **factory)
    if in_channels != out_channels:
        raise ValueError(
            f"out_channels must equal in_channels = {in_channels} for skip connection {kind!r}, got {out_channels}"
        )
    return SoftGating(in_channels, n_dim, **factory) if kind == "soft-gating" else nn.Identity()


def _norm(kind: str, channels: int, n_dim: int, ada_in_features: int | None, **factory: Any) -> nn.Module:
    if kind == "instance_norm":
        return InstanceNorm()
    if kind == "group_norm":
        return nn.GroupNorm(1, channels, **factory)
    if kind == "batch_norm":
        return BatchNorm(channels, n_dim, **factory)
    return AdaIN(check_int("ada_in_features", ada_in_features), channels, **factory)


def _layer_factors(factor: Any, n_dim: int, n_layers: int) -> list[list[float] | None]:
    """``resolution_scaling_factor`` for each layer: one number, one a layer, or for each layer one an axis."""
    if factor is None:
        return [None] * n_layers
    factors = [factor] * n_layers if isinstance(factor, (int, float)) else list(factor)
    if len(factors) != n_layers:
        raise ValueError(
            f"resolution_scaling_factor must have n_layers = {n_layers} entries, got {len(factors)}: {factor}"
        )
    return [scaling_factors(f, n_dim) for f in factors]


def _per_axis(name: str, value: Any, n_dim: int) -> list[float]:
    values = [value] * n_dim if isinstance(value, (int, float)) else list(value)
    if len(values) != n_dim:
        raise ValueError(f"{name} must have {n_dim} entries, got {len(values)}: {value}")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise TypeError(f"{name} must be made of numbers, got {value!r}")
        if not (v >= 0 and math.isfinite(v)):
            raise ValueError(f"{name} must not be negative, got {value}")
    return [float(v) for v in values]


# --- the blocks -------------------------------------------------------------------------------------------------


class FNOBlocks(nn.Module):
    """A sequence of Fourier layers, called layer by layer: ``blocks(x, index)``.

    Post-activation (the default), with s and m the two skip connections, both taken from the block's input x::

        h = act(norm_1(conv(tanh?(x))) + s(x))         h = act(norm_2(mlp(h) + m(x)))

    where the last layer has no activations. With ``preactivation`` x is first replaced by norm_1(act(x)), then
    h = act(conv(tanh?(x)) + s(x)), h = mlp(norm_2(h)) + m(x), and only the last layer lacks its inner activation.

    Args:
        in_channels, out_channels: of each layer; they differ only where there is one layer.
        n_modes, max_n_modes, complex_data, separable, factorization, rank, fixed_rank_modes, implementation,
            decomposition_kwargs, fno_block_precision: of the convolutions, see :class:`SpectralConv`.
        resolution_scaling_factor: a number for all layers, one a layer, or for each layer one an axis.
        n_layers: number of layers.
        use_channel_mlp, channel_mlp_dropout, channel_mlp_expansion: the MLP C -> round(expansion C) -> C, whose
            hidden width is at least 1.
        non_linearity: act; complex data has GELU on both parts.
        stabilizer: "tanh" before each convolution, or None.
        norm: "instance_norm", "group_norm", "batch_norm", "ada_in" (with ``ada_in_features``) or None.
        preactivation: see above.
        fno_skip, channel_mlp_skip: "linear", "soft-gating", "identity" or None. Where the layer changes the
            resolution, a skip does so by spectral interpolation, exact on band-limited fields.
        conv_module: class of the convolutions, with the constructor of :class:`SpectralConv`.
        joint_factorization: hold the weights of all layers as one tensor, :class:`JointSpectralWeights`.
        method, backend, device, dtype: as in :class:`SpectralConv`.

    Shape: x (B, Ci, N1, ..., Nd) -> (B, Co, M1, ..., Md).

    Raises:
        TypeError, ValueError: wrong names, counts or shapes; wrong channels at the call.

    Source: arXiv 2310.00120, section 3.3.

    Example:

        >>> blocks = FNOBlocks(8, 8, (6, 6), n_layers=2, norm="group_norm")
        >>> blocks(blocks(torch.randn(1, 8, 16, 16), 0), 1).shape
        torch.Size([1, 8, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_modes: Sequence[int] | int,
        resolution_scaling_factor: Any = None,
        n_layers: int = 1,
        max_n_modes: Sequence[int] | int | None = None,
        fno_block_precision: str = "full",
        use_channel_mlp: bool = True,
        channel_mlp_dropout: float = 0,
        channel_mlp_expansion: float = 0.5,
        non_linearity: Activation = F.gelu,
        stabilizer: str | None = None,
        norm: str | None = None,
        ada_in_features: int | None = None,
        preactivation: bool = False,
        fno_skip: str | None = "linear",
        channel_mlp_skip: str | None = "soft-gating",
        complex_data: bool = False,
        separable: bool = False,
        factorization: str | None = None,
        rank: float | int | Sequence[int] = 1.0,
        conv_module: type[nn.Module] = SpectralConv,
        fixed_rank_modes: Sequence[int] | bool | None = False,
        implementation: str = "auto",
        decomposition_kwargs: dict[str, Any] | None = None,
        *,
        joint_factorization: bool = False,
        method: str = "auto",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        check_int("in_channels", in_channels)
        check_int("out_channels", out_channels)
        check_int("n_layers", n_layers)
        if n_layers > 1 and in_channels != out_channels:
            raise ValueError(
                f"out_channels must equal in_channels = {in_channels} for n_layers = {n_layers}, got {out_channels}"
            )
        check_choice("fno_block_precision", fno_block_precision, PRECISIONS)
        for name, skip in (("fno_skip", fno_skip), ("channel_mlp_skip", channel_mlp_skip)):
            check_choice(name, skip, [*SKIPS, None])
        check_choice("norm", norm, [*NORMS, None])
        check_choice("stabilizer", stabilizer, ["tanh", None])
        modes = mode_totals(n_modes)
        self._n_modes = modes
        self.n_dim = len(modes)
        self.in_channels, self.out_channels, self.n_layers = in_channels, out_channels, n_layers
        self.resolution_scaling_factor = _layer_factors(resolution_scaling_factor, self.n_dim, n_layers)
        self.use_channel_mlp, self.preactivation = bool(use_channel_mlp), bool(preactivation)
        self.complex_data, self.stabilizer = bool(complex_data), stabilizer
        self.joint_factorization = bool(joint_factorization)
        self.non_linearity = F.gelu if complex_data else non_linearity

        ours = isinstance(conv_module, type) and issubclass(conv_module, SpectralConv)
        if joint_factorization and not ours:
            raise ValueError(f"conv_module must be SpectralConv for a joint factorization, got {conv_module!r}")
        extra: dict[str, Any] = {}
        if ours:
            extra = {"method": method, "backend": backend, "has_weight": not joint_factorization, **factory}
        self.convs = nn.ModuleList(
            conv_module(
                in_channels,
                out_channels,
                modes,
                resolution_scaling_factor=factors,
                max_n_modes=max_n_modes,
                rank=rank,
                fixed_rank_modes=fixed_rank_modes if not joint_factorization else None,
                implementation=implementation,
                separable=separable,
                factorization=factorization,
                fno_block_precision=fno_block_precision,
                decomposition_kwargs=decomposition_kwargs,
                complex_data=complex_data,
                **extra,
            )
            for factors in self.resolution_scaling_factor
        )
        self.joint_weights: JointSpectralWeights | None = None
        if joint_factorization:
            stored: Any = self.convs[0].max_n_modes
            self.joint_weights = JointSpectralWeights(
                n_layers,
                in_channels,
                out_channels,
                # Taken as they are; only complex data does so.
                stored,
                complex_data=True,
                rank=rank,
                factorization=factorization,
                fixed_rank_modes=fixed_rank_modes,
                separable=separable,
                **factory,
            )

        def each(make: Callable[[], nn.Module], count: int = n_layers) -> nn.ModuleList:
            return nn.ModuleList(ComplexValued(make) if complex_data else make() for _ in range(count))

        def skips(kind: str) -> nn.ModuleList:
            return each(lambda: _skip(kind, in_channels, out_channels, self.n_dim, **factory))

        self.fno_skips = skips(fno_skip) if fno_skip else None
        self.channel_mlp = self.channel_mlp_skips = None
        if use_channel_mlp:
            width = out_channels * channel_mlp_expansion
            if not (math.isfinite(width) and round(width) >= 1):
                raise ValueError(
                    "channel_mlp_expansion must be finite and leave at least one hidden channel for "
                    f"out_channels = {out_channels}, got {channel_mlp_expansion}"
                )
            sizes = (out_channels, round(width), out_channels)
            self.channel_mlp = each(lambda: ChannelMLP(sizes, dropout=channel_mlp_dropout, **factory))
            self.channel_mlp_skips = skips(channel_mlp_skip) if channel_mlp_skip else None
        self.norm = None
        if norm is not None:
            self.norm = each(
                lambda: _norm(norm, out_channels, self.n_dim, ada_in_features, **factory), count=2 * n_layers
            )

    def reset_parameters(self) -> None:
        """Initialise all descendants anew."""
        _reset(self)

    @property
    def n_modes(self) -> tuple[int, ...]:
        """Totals; setting them sets those of each convolution."""
        return self._n_modes

    @n_modes.setter
    def n_modes(self, n_modes: Sequence[int] | int) -> None:
        conv: Any
        for conv in self.convs:
            conv.n_modes = n_modes
        self._n_modes = mode_totals(n_modes)

    def set_ada_in_embeddings(self, *embeddings: Tensor) -> None:
        """Set the embeddings of the "ada_in" norms: one for all, or one each (two a layer)."""
        norms = [m for m in self.modules() if isinstance(m, AdaIN)]
        if len(embeddings) not in (1, len(norms)):
            raise ValueError(f"embeddings must be 1 or {len(norms)}, got {len(embeddings)}")
        for i, norm in enumerate(norms):
            norm.set_embedding(embeddings[i if len(embeddings) > 1 else 0])

    def forward(self, x: Tensor, index: int = 0, output_shape: Sequence[int] | None = None) -> Tensor:
        """Layer ``index`` of ``x``, on a grid of ``output_shape`` where given."""
        check_ndim("x", x, self.n_dim + 2, f"(batch, channels, {self.n_dim} grid axes)")
        check_dtype("x", x, kind="complex" if self.complex_data else "real")
        check_size("x", x, 1, self.in_channels, "in_channels")
        _check_double(x, self)
        if not -self.n_layers <= index < self.n_layers:
            raise ValueError(f"index must be in [{-self.n_layers}, {self.n_layers}), got {index}")
        index = index % self.n_layers
        conv: Any = self.convs[index]
        last = index == self.n_layers - 1
        first_norm, second_norm = (None, None) if self.norm is None else self.norm[2 * index : 2 * index + 2]

        def act(h: Tensor) -> Tensor:
            return _on_parts(self.non_linearity, h)

        def skipped(skips: nn.ModuleList | None) -> Tensor | None:
            return None if skips is None else conv.transform(skips[index](x), output_shape=output_shape)

        if self.preactivation:
            x = act(x)
            if first_norm is not None:
                x = first_norm(x)
        fno_skip, mlp_skip = skipped(self.fno_skips), skipped(self.channel_mlp_skips)

        h = _on_parts(torch.tanh, x) if self.stabilizer == "tanh" else x
        options: dict[str, Any] = {"output_shape": output_shape}
        if self.joint_weights is not None:
            options["weight"] = self.joint_weights[index]
        normed = first_norm is not None and not self.preactivation
        if isinstance(conv, SpectralConv) and not normed and not self.complex_data:
            fused = None if last else FUSED.get(self.non_linearity)
            h = conv(h, skip=fno_skip, activation=fused, **options)
            fno_skip = None
        else:
            fused = None
            h = conv(h, **options)
        if normed:
            assert first_norm is not None
            h = first_norm(h)
        if fno_skip is not None:
            h = h + fno_skip
        if not last and fused is None:
            h = act(h)
        if second_norm is not None and self.preactivation:
            h = second_norm(h)
        if self.channel_mlp is not None:
            h = self.channel_mlp[index](h)
            if mlp_skip is not None:
                h = h + mlp_skip
        if not self.preactivation:
            if second_norm is not None:
                h = second_norm(h)
            if not last:
                h = act(h)
        return h

    def extra_repr(self) -> str:
        return f"n_modes={self._n_modes}, n_layers={self.n_layers}, preactivation={self.preactivation}"


# --- the model --------------------------------------------------------------------------------------------------


class GridEmbedding(nn.Module):
    """Appends the coordinates of each point as channels: n / N on [0, 1), one channel an axis."""

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        channels = [x]
        for axis, n in enumerate(grid):
            # In 16 bits the numbers of the points would be rounded or infinite.
            wide = torch.promote_types(x.dtype, torch.float32)
            coordinate = (torch.arange(n, device=x.device).to(wide) / n).to(x.dtype)
            shape = [1] * x.ndim
            shape[2 + axis] = n
            channels.append(coordinate.view(shape).expand(x.shape[0], 1, *grid))
        return torch.cat(channels, 1)


class TFNO(nn.Module):
    """Tensorized Fourier neural operator: lifting, Fourier layers with factorized weights, projection.

    With ``factorization=None`` it is the dense FNO. All arguments are those of neuraloperator 2.0.0's ``FNO``, in its
    order, with the defaults of its ``TFNO`` (Tucker, rank 0.1). State dicts go both ways;
    :func:`torchlayers.tfno.from_neuralop` takes over a model or a checkpoint. Where they differ in value: odd grids,
    complex data and changes of resolution, which neuraloperator 2.0.0 has wrong (see :class:`SpectralConv`).

    Args:
        n_modes: frequencies kept of each axis, in total; their number is the number of grid axes.
        in_channels, out_channels: of the field.
        hidden_channels: width of the Fourier layers.
        n_layers: number of Fourier layers.
        lifting_channel_ratio, projection_channel_ratio: hidden width of the lifting and projection MLPs per
            ``hidden_channels``. A lifting ratio of 0 gives a linear lifting.
        positional_embedding: "grid" appends the coordinates in [0, 1) to the channels; a module is called; or None.
        non_linearity, norm, complex_data, use_channel_mlp, channel_mlp_dropout, channel_mlp_expansion,
            channel_mlp_skip, fno_skip, resolution_scaling_factor, fno_block_precision, stabilizer, max_n_modes,
            factorization, rank, fixed_rank_modes, implementation, decomposition_kwargs, separable, preactivation,
            conv_module: of the layers, see :class:`FNOBlocks` and :class:`SpectralConv`.
        domain_padding: zero padding at both ends of each axis after the lifting, as a fraction of its size: a number
            or one an axis, for domains that are not periodic. It is cut off before the projection, also where layers
            change the resolution, and has no part in the size of the result.
        ada_in_features: size of the embedding, for ``norm="ada_in"``.
        joint_factorization: one factorized tensor for the weights of all layers, of shape (layers, hidden, hidden,
            modes...): the global parametrisation of the paper. ``model.fno_blocks.joint_weights`` holds it.
        method, backend, device, dtype: as in :class:`SpectralConv`.

    Shape: x (B, in_channels, N1, ..., Nd) -> (B, out_channels, M1, ..., Md). M = N; a layer with the scaling factor r
        makes it round(r M).

    Raises:
        TypeError, ValueError: wrong names, counts or shapes at construction; wrong channels or dimensions at the
            call; complex input to a real model.

    Source: arXiv 2310.00120.

    Example:

        >>> model = TFNO((12, 12), in_channels=1, out_channels=1, hidden_channels=16, n_layers=2)
        >>> model(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 1, 32, 32])
        >>> model(torch.randn(2, 1, 45, 64)).shape
        torch.Size([2, 1, 45, 64])
    """

    def __init__(
        self,
        n_modes: Sequence[int],
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        n_layers: int = 4,
        lifting_channel_ratio: float = 2,
        projection_channel_ratio: float = 2,
        positional_embedding: str | nn.Module | None = "grid",
        non_linearity: Activation = F.gelu,
        norm: str | None = None,
        complex_data: bool = False,
        use_channel_mlp: bool = True,
        channel_mlp_dropout: float = 0,
        channel_mlp_expansion: float = 0.5,
        channel_mlp_skip: str | None = "soft-gating",
        fno_skip: str | None = "linear",
        resolution_scaling_factor: Any = None,
        domain_padding: float | Sequence[float] | None = None,
        fno_block_precision: str = "full",
        stabilizer: str | None = None,
        max_n_modes: Sequence[int] | int | None = None,
        factorization: str | None = "Tucker",
        rank: float | int | Sequence[int] = 0.1,
        fixed_rank_modes: Sequence[int] | bool | None = False,
        implementation: str = "auto",
        decomposition_kwargs: dict[str, Any] | None = None,
        separable: bool = False,
        preactivation: bool = False,
        conv_module: type[nn.Module] = SpectralConv,
        *,
        ada_in_features: int | None = None,
        joint_factorization: bool = False,
        method: str = "auto",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.hidden_channels = check_int("hidden_channels", hidden_channels)
        self.n_layers = check_int("n_layers", n_layers)
        self.complex_data = bool(complex_data)
        modes = mode_totals(n_modes)
        self.n_dim = len(modes)
        padding = None if domain_padding is None else _per_axis("domain_padding", domain_padding, self.n_dim)
        self.domain_padding = padding if padding and any(padding) else None

        if positional_embedding is None or isinstance(positional_embedding, nn.Module):
            self.positional_embedding = positional_embedding
        else:
            check_choice("positional_embedding", positional_embedding, ["grid", None])
            self.positional_embedding = GridEmbedding()
        lifted = in_channels + (0 if positional_embedding is None else self.n_dim)

        self.fno_blocks = FNOBlocks(
            hidden_channels,
            hidden_channels,
            modes,
            resolution_scaling_factor,
            n_layers,
            max_n_modes,
            fno_block_precision,
            use_channel_mlp,
            channel_mlp_dropout,
            channel_mlp_expansion,
            non_linearity,
            stabilizer,
            norm,
            ada_in_features,
            preactivation,
            fno_skip,
            channel_mlp_skip,
            complex_data,
            separable,
            factorization,
            rank,
            conv_module,
            fixed_rank_modes,
            implementation,
            decomposition_kwargs,
            joint_factorization=joint_factorization,
            method=method,
            backend=backend,
            **factory,
        )

        def mlp(name: str, *sizes: float) -> nn.Module:
            for size in sizes:
                check_int(f"{name} channels", int(size))
            widths = [int(size) for size in sizes]
            if complex_data:
                return ComplexValued(lambda: ChannelMLP(widths, non_linearity, **factory))
            return ChannelMLP(widths, non_linearity, **factory)

        lifting = int(lifting_channel_ratio * hidden_channels)
        self.lifting = mlp("lifting", lifted, *([lifting] if lifting else []), hidden_channels)
        self.projection = mlp("projection", hidden_channels, projection_channel_ratio * hidden_channels, out_channels)
        self.register_load_state_dict_pre_hook(_drop_metadata)

    def reset_parameters(self) -> None:
        """Initialise all descendants anew."""
        _reset(self)

    @property
    def n_modes(self) -> tuple[int, ...]:
        """Totals; setting them, up to ``max_n_modes``, sets those of each layer."""
        return self.fno_blocks.n_modes

    @n_modes.setter
    def n_modes(self, n_modes: Sequence[int] | int) -> None:
        self.fno_blocks.n_modes = n_modes

    def forward(self, x: Tensor, output_shape: Sequence[int] | Sequence[Sequence[int] | None] | None = None) -> Tensor:
        """The operator applied to ``x``.

        Args:
            x: (B, in_channels, N1, ..., Nd).
            output_shape: grid of the result, which the last layer changes to; or for each layer its grid or None.
        """
        check_ndim("x", x, self.n_dim + 2, f"(batch, channels, {self.n_dim} grid axes)")
        check_size("x", x, 1, self.in_channels, "in_channels")
        check_dtype("x", x, kind="complex" if self.complex_data else "real")
        _check_double(x, self.lifting)
        shapes = self._layer_shapes(output_shape)
        grid = tuple(x.shape[2:])
        if self.positional_embedding is not None:
            x = self.positional_embedding(x)
        x = self.lifting(x)
        if self.domain_padding is None:
            for index, shape in enumerate(shapes):
                x = self.fno_blocks(x, index, output_shape=shape)
            return self.projection(x)
        # The domain changes its size as it does without padding, and the padding follows.
        pads = self._padding(grid, grid)
        x = F.pad(x, [p for pad in reversed(pads) for p in (pad, pad)])
        size: Sequence[int] = grid
        for index, shape in enumerate(shapes):
            size = scaled_size(size, self.fno_blocks.resolution_scaling_factor[index]) if shape is None else shape
            pads = self._padding(grid, size)
            x = self.fno_blocks(x, index, output_shape=[m + 2 * p for m, p in zip(size, pads, strict=True)])
        for axis, (m, pad) in enumerate(zip(size, pads, strict=True), 2):
            x = x.narrow(axis, pad, m)
        return self.projection(x)

    def _layer_shapes(self, output_shape: Any) -> list[Any]:
        if output_shape is None:
            return [None] * self.n_layers
        if isinstance(output_shape, int) or all(isinstance(m, (int, torch.SymInt)) for m in output_shape):
            return [None] * (self.n_layers - 1) + [check_ints("output_shape", output_shape, self.n_dim)]
        if len(output_shape) != self.n_layers:
            raise ValueError(f"output_shape must have {self.n_layers} entries, one a layer, got {len(output_shape)}")
        return [
            None if shape is None else check_ints(f"output_shape[{i}]", shape, self.n_dim)
            for i, shape in enumerate(output_shape)
        ]

    def _padding(self, grid: Sequence[int], size: Sequence[int]) -> list[int]:
        """Points of padding at either end of the axes of ``size``, which show the domain that ``grid`` does."""
        assert self.domain_padding is not None
        return [
            round(round(fraction * n) * m / n) for fraction, n, m in zip(self.domain_padding, grid, size, strict=True)
        ]

    @classmethod
    def from_neuralop(cls, source: Any, **overrides: Any) -> TFNO:
        """See :func:`torchlayers.tfno.from_neuralop`."""
        from .convert import from_neuralop

        model = from_neuralop(source, **overrides)
        if not isinstance(model, TFNO):
            raise TypeError(f"source must be an FNO or TFNO, got {type(source).__name__}")
        return model

    def extra_repr(self) -> str:
        text = f"n_modes={self.n_modes}, in_channels={self.in_channels}, out_channels={self.out_channels}"
        return text if self.domain_padding is None else f"{text}, domain_padding={self.domain_padding}"


def _drop_metadata(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """neuraloperator puts the constructor's arguments into the state dict, under a key that is no tensor."""
    state_dict.pop(prefix + "_metadata", None)


#: The constructor's names that neuraloperator knows too.
NEURALOP_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(TFNO.__init__).parameters.items()
    if name != "self" and parameter.kind is not inspect.Parameter.KEYWORD_ONLY
)
