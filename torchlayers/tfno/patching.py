"""Multi-grid domain decomposition: a field as a batch of patches that carry a halo and coarse views of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_dtype, check_int, check_ints, check_ndim
from .._tables import register_table, table

__all__ = ["MultiGridPatching"]

_MODES = ("circular", "replicate", "reflect", "zeros")
_AXES = {1: "W", 2: "H, W", 3: "D, H, W"}


@register_table(
    "tfno_patch_windows",
    shape=lambda size, stride, patches, halo, mode, *cells: (len(cells), size // patches + 2 * halo),
)
def _windows(size: int, stride: int, patches: int, halo: int, mode: int, *cells: int) -> Tensor:
    """Along one axis: which pixels of the field subsampled by ``stride`` the patches ``cells`` see."""
    side, coarse = size // patches, size // stride
    a = torch.tensor(cells, dtype=torch.int64)
    start = a * side // stride - side * (stride - 1) // (2 * stride) - halo
    i = start[:, None] + torch.arange(side + 2 * halo)
    if _MODES[mode] == "circular":
        i = i % coarse
    elif _MODES[mode] == "replicate":
        i = i.clamp(0, coarse - 1)
    elif _MODES[mode] == "reflect":  # the even extension about the outermost pixels, however far out
        period = max(2 * (coarse - 1), 1)
        i = i % period
        i = torch.minimum(i, period - i).clamp(max=coarse - 1)
    else:  # one past the end, where `_gather` puts a zero
        i = torch.where((i >= 0) & (i < coarse), i, coarse)
    return i.double()


@register_table("tfno_patch_lowpass", shape=lambda size: (size // 2, size))
def _lowpass(size: int) -> Tensor:
    """Every second sample of a periodic signal's part with frequencies strictly below size / 4, as a matrix."""
    i = torch.arange(size)
    f = torch.arange(1, (size // 2 + 1) // 2)  # 0 < f < (size / 2) / 2
    # The product is reduced before it becomes an angle, so that the cosine's argument is exact.
    waves = torch.cos(2 * math.pi * (f[:, None] * i % size).double() / size)
    kernel = (1 + 2 * waves.sum(0)) / size
    return kernel[(2 * i[: size // 2, None] - i) % size]


@register_table("tfno_patch_coordinates", shape=lambda size: (size,))
def _coordinates(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64) / size


class MultiGridPatching(nn.Module):
    r"""Cut a field into patches with a halo, and give every patch coarse views of its surroundings as channels.

    With ``levels`` = L, an axis of N pixels in n patches of P = N / n, and a halo of p pixels, patch ``a`` sees along
    that axis, at u = 0 … P + 2p − 1,

    .. math::

        \text{level } l:\quad x_l[(\lfloor aP/s \rfloor - \lfloor (P - P/s)/2 \rfloor - p + u) \bmod N/s],
        \qquad s = 2^l,\; x_l = x[::s],

    so level 0 is the patch with its halo, and level l a window of as many pixels around the same place that covers s
    times the length. The levels are concatenated as channels, finest first: C becomes ``channels(C)``. Patches go into
    the batch: row-major within a sample, samples outermost. What a model makes of them, on the same pixels,
    :meth:`unpatch` crops to the P inner pixels and puts back together.

    A model sees a patch as if it were the whole domain: normalisation takes the patch's statistics, a Fourier layer
    wraps the patch around (the halo keeps that out of the inner pixels only as far as it reaches), and a grid of
    coordinates made inside the model is the patch's own (``append_coords`` gives those of the domain).

    The object keeps nothing between calls: :meth:`unpatch` knows everything from the patches' shape and the
    configuration, also when resolutions take turns.

    Args:
        levels: number of coarse levels, L ≥ 0.
        n_dim: number of spatial axes: 1, 2 or 3.
        padding: halo p in pixels of each level, an int or one per axis.
        padding_fraction: the halo as a fraction in [0, 1] of the whole axis instead, p = round(fraction · N), a
            number or one per axis.
        padding_mode: what lies outside the domain: ``"circular"`` (periodic), ``"replicate"``, ``"reflect"``
            (about the outermost pixel, as often as needed) or ``"zeros"``. Periodic is wrong for Darcy-like problems.
        patches: patches per axis, an int or one per axis; 2^levels by default.
        antialias: take the coarse fields from the frequencies strictly below their Nyquist frequency (spectral
            truncation, which takes the field as periodic and rings where it is not) instead of by plain
            subsampling, which is the paper's choice and aliases.
        append_coords: append to x, before patching, one channel per axis with the coordinate in [0, 1) of the whole
            domain, i / N, end point excluded; the filter leaves these alone.

    Shapes:
        - x: (B, C, N_1, …, N_d), any dtype (floating where ``antialias`` or ``append_coords``), real or complex; each N
          divisible by its number of patches and by 2^levels
        - patches: (B · num_patches, channels(C), P_1 + 2 p_1, …, P_d + 2 p_d)

    Raises:
        ValueError, TypeError: bad configuration; a field of another rank, of a size that cannot be cut (the message
            names the nearest sizes that can), or smaller than the halo; patches that this object would not make.

    Source: Kossaifi et al., "Multi-Grid Tensorized Fourier Neural Operator for High-Resolution PDEs"
    (arXiv 2310.00120): its multi-grid domain decomposition.

    Example:

        >>> patching = MultiGridPatching(levels=1, padding=4)
        >>> x = torch.randn(2, 3, 32, 32)
        >>> patching.patch(x).shape
        torch.Size([8, 6, 24, 24])
        >>> torch.equal(patching.unpatch(patching.patch(x)[:, :3]), x)
        True
    """

    def __init__(
        self,
        levels: int,
        *,
        n_dim: int = 2,
        padding: int | Sequence[int] = 0,
        padding_fraction: float | Sequence[float] | None = None,
        padding_mode: str = "circular",
        patches: int | Sequence[int] | None = None,
        antialias: bool = False,
        append_coords: bool = False,
    ) -> None:
        super().__init__()
        check_choice("n_dim", n_dim, (1, 2, 3))
        check_choice("padding_mode", padding_mode, _MODES)
        self.levels = check_int("levels", levels, minimum=0)
        self.n_dim = n_dim
        self.padding = check_ints("padding", padding, n_dim, minimum=0)
        self.padding_fraction = _check_fractions(padding_fraction, n_dim)
        if self.padding_fraction is not None and any(self.padding):
            raise ValueError(
                f"padding and padding_fraction exclude each other, got padding={padding!r} and "
                f"padding_fraction={padding_fraction!r}"
            )
        self.padding_mode = padding_mode
        self.patches = check_ints("patches", 2**levels if patches is None else patches, n_dim)
        self.antialias = antialias
        self.append_coords = append_coords

    @property
    def num_patches(self) -> int:
        """Patches per sample."""
        return math.prod(self.patches)

    def channels(self, channels: int) -> int:
        """Channels of the patches of a field with ``channels`` channels: (C + coordinates) · (levels + 1)."""
        return (channels + self.n_dim * self.append_coords) * (self.levels + 1)

    def forward(self, x: Tensor) -> Tensor:
        """The same as :meth:`patch`."""
        return self.patch(x)

    def patch(self, x: Tensor, indices: Iterable[int] | None = None) -> Tensor:
        """The patches of x, (B · K, channels(C), P + 2p per axis).

        Args:
            x: field (B, C, N_1, …, N_d).
            indices: which of a sample's patches to make, by row-major number and in this order; all by default.
                Only these are ever built, so that ranks can share a field's patches.
        """
        sizes = self._check_field("x", x)
        halo = self._halo(sizes)
        cells = self._cells(indices)
        if self.antialias or self.append_coords:
            check_dtype("x", x, kind="inexact")
        channels = x.shape[1]
        if self.append_coords:
            grid = torch.meshgrid(
                *(table("tfno_patch_coordinates", n, dtype=x.dtype, device=x.device) for n in sizes), indexing="ij"
            )
            x = torch.cat([x, torch.stack(grid).expand(x.shape[0], *(-1,) * (self.n_dim + 1))], 1)
        blocks = [self._gather(x, sizes, 1, halo, cells)]
        for level in range(1, self.levels + 1):
            x = self._coarsen(x, channels)
            blocks.append(self._gather(x, sizes, 2**level, halo, cells))
        return torch.cat(blocks, 2).flatten(0, 1)

    def patch_target(self, y: Tensor, indices: Iterable[int] | None = None) -> Tensor:
        """What :meth:`crop` of the model's patches should equal: y in patches without halo or coarse views.

        Args:
            y: field (B, C, N_1, …, N_d), any C.
            indices: as for :meth:`patch`.

        Returns:
            (B · K, C, P_1, …, P_d).
        """
        sizes = self._check_field("y", y)
        return self._gather(y, sizes, 1, (0,) * self.n_dim, self._cells(indices)).flatten(0, 1)

    def unpatch(self, y: Tensor) -> Tensor:
        """The field (B, C, N_1, …, N_d) of the patches y, (B · num_patches, C, P + 2p per axis), any C."""
        return self.stitch(self.crop(y))

    def crop(self, y: Tensor) -> Tensor:
        """The inner P pixels per axis of patches (…, P_1 + 2 p_1, …, P_d + 2 p_d)."""
        check_ndim("y", y, self.n_dim + 2, self._layout("patches"))
        for axis in range(self.n_dim):
            halo = self._halo_of_patch(axis, y.shape[2 + axis])
            y = y.narrow(2 + axis, halo, y.shape[2 + axis] - 2 * halo)
        return y

    def stitch(self, y: Tensor) -> Tensor:
        """The field of patches that are cropped already, (B · num_patches, C, P_1, …, P_d)."""
        check_ndim("y", y, self.n_dim + 2, self._layout("patches"))
        if y.shape[0] % self.num_patches:
            raise ValueError(
                f"y must have a batch divisible by the {self.num_patches} patches of a sample, got {y.shape[0]}: "
                f"shape {tuple(y.shape)}"
            )
        batch, channels, side = y.shape[0] // self.num_patches, y.shape[1], y.shape[2:]
        # (B, n_1, …, n_d, C, P_1, …, P_d) -> (B, C, n_1, P_1, …, n_d, P_d)
        d = self.n_dim
        order = [0, 1 + d, *(axis for k in range(d) for axis in (1 + k, 2 + d + k))]
        y = y.reshape(batch, *self.patches, channels, *side).permute(order)
        return y.reshape(batch, channels, *(n * p for n, p in zip(self.patches, side, strict=True)))

    def extra_repr(self) -> str:
        halo = (
            f"padding={self.padding}" if self.padding_fraction is None else f"padding_fraction={self.padding_fraction}"
        )
        text = f"levels={self.levels}, n_dim={self.n_dim}, patches={self.patches}, {halo}, mode={self.padding_mode!r}"
        return text + ", antialias=True" * self.antialias + ", append_coords=True" * self.append_coords

    def _layout(self, batch: str) -> str:
        return f"({batch}, channels, {_AXES[self.n_dim]})"

    def _check_field(self, name: str, x: Tensor) -> tuple[int, ...]:
        check_ndim(name, x, self.n_dim + 2, self._layout("batch"))
        for axis, (size, patches) in enumerate(zip(x.shape[2:], self.patches, strict=True)):
            unit = math.lcm(patches, 2**self.levels)
            if size < unit or size % unit:
                below = size // unit * unit
                near = f"{below} and {below + unit}" if below else f"{unit}"
                raise ValueError(
                    f"{name} must have a size divisible by {unit} along spatial axis {axis} (patches={patches}, "
                    f"levels={self.levels}), got {size}; nearest valid: {near}"
                )
        return tuple(x.shape[2:])

    def _halo(self, sizes: Sequence[int]) -> tuple[int, ...]:
        if self.padding_fraction is not None:
            return tuple(round(f * n) for f, n in zip(self.padding_fraction, sizes, strict=True))
        for axis, (halo, size) in enumerate(zip(self.padding, sizes, strict=True)):
            if halo > size:
                raise ValueError(
                    f"padding must not exceed the domain, got {halo} pixels at spatial axis {axis} of size {size}"
                )
        return self.padding

    def _halo_of_patch(self, axis: int, width: int) -> int:
        """The halo in a patch of ``width`` pixels: the p of width = P + 2p, which grows strictly with P."""
        if self.padding_fraction is None:
            halo = self.padding[axis]
            if width > 2 * halo:
                return halo
        else:
            share = self.padding_fraction[axis] * self.patches[axis]
            guess = round(width / (1 + 2 * share))
            for side in range(max(guess - 2, 1), guess + 3):
                halo = round(self.padding_fraction[axis] * (self.patches[axis] * side))
                if side + 2 * halo == width:
                    return halo
        raise ValueError(
            f"y must have the patches' size (inner pixels and twice the halo) along spatial axis {axis}, got {width}, "
            f"which no field gives with {self.extra_repr()}"
        )

    def _cells(self, indices: Iterable[int] | None) -> list[tuple[int, ...]]:
        """Per axis, the coordinate in the grid of patches of each patch asked for."""
        numbers = range(self.num_patches) if indices is None else tuple(indices)
        cells = []
        for i in numbers:
            if not 0 <= i < self.num_patches:
                raise ValueError(f"indices must lie in [0, {self.num_patches}), got {i}")
        for axis in range(self.n_dim):
            inner = math.prod(self.patches[axis + 1 :])
            cells.append(tuple(i // inner % self.patches[axis] for i in numbers))
        return cells

    def _gather(
        self, x: Tensor, sizes: Sequence[int], stride: int, halo: Sequence[int], cells: Sequence[Sequence[int]]
    ) -> Tensor:
        """(B, K, C, P + 2p per axis) from the field x that ``stride`` was taken from."""
        d = self.n_dim
        if self.padding_mode == "zeros" and (stride > 1 or any(halo)):
            x = nn.functional.pad(x, (0, 1) * d)
        mode = _MODES.index(self.padding_mode)
        index = []
        for k in range(d):
            rows = table(
                "tfno_patch_windows",
                *(sizes[k], stride, self.patches[k], halo[k], mode, *cells[k]),
                dtype=torch.int64,
                device=x.device,
            )
            index.append(rows.unflatten(1, (*(1,) * k, -1, *(1,) * (d - 1 - k))))
        return x[(slice(None), slice(None), *index)].transpose(1, 2)

    def _coarsen(self, x: Tensor, channels: int) -> Tensor:
        """Half the resolution; ``channels`` of x are the field's, coordinates come after them."""
        every_second = (slice(None), slice(None), *(slice(None, None, 2),) * self.n_dim)
        if not self.antialias:
            return x[every_second]
        field, coordinates = x[:, :channels], x[:, channels:][every_second]
        with torch.autocast(x.device.type, enabled=False):
            for axis in range(2, 2 + self.n_dim):
                matrix = table("tfno_patch_lowpass", x.shape[axis], dtype=x.dtype, device=x.device)
                field = (field.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
        return torch.cat([field, coordinates], 1)


def _check_fractions(value: object, n_dim: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    values: tuple[Any, ...] = (value,) * n_dim
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = tuple(value)
    if len(values) != n_dim:
        raise ValueError(f"padding_fraction must have {n_dim} entries, got {len(values)}: {values}")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise TypeError(f"padding_fraction must be a number or one per axis, got {v!r} ({type(v).__name__})")
        if not 0 <= v <= 1:
            raise ValueError(f"padding_fraction must lie in [0, 1] (a halo within the domain), got {v!r}")
    return tuple(float(v) for v in values)
