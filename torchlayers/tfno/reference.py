"""The spectral convolution as the paper defines it, frequency by frequency: the oracle, differentiable."""

from __future__ import annotations

import math

import torch

__all__ = ["kept_modes", "signed_frequencies", "spectral_conv"]


def signed_frequencies(k: int) -> range:
    """The ``k`` frequencies around zero in ascending order: -(k // 2), ..., (k - 1) // 2."""
    return range(-(k // 2), k - k // 2)


def kept_modes(n_modes, weight_modes, in_size, out_size, complex_data: bool = False) -> tuple[int, ...]:
    """How many frequencies of each axis take part: what ``n_modes``, the weight and both grids have in common.

    ``n_modes`` are totals; the last axis of real data keeps the non-negative frequencies only, as the weight does.
    """
    kept = [min(sizes) for sizes in zip(n_modes, weight_modes, in_size, out_size, strict=True)]
    if not complex_data:
        kept[-1] = min(n_modes[-1] // 2 + 1, weight_modes[-1], in_size[-1] // 2 + 1, out_size[-1] // 2 + 1)
    return tuple(kept)


def spectral_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    n_modes,
    *,
    bias: torch.Tensor | None = None,
    output_shape=None,
    separable: bool = False,
    complex_data: bool = False,
) -> torch.Tensor:
    """Spectral convolution of ``x`` (B, Ci, N1, ..., Nd) with the complex ``weight`` (Ci, Co, w1, ..., wd)::

        X[b,i,f] = 1/(N1...Nd) Σ_n x[b,i,n] exp(-2πi Σ_j f_j n_j / N_j)
        Y[b,o,f] = Σ_i X[b,i,f] W[i,o,f]                             (separable: Y = X W, channel by channel)
        y[b,o,n] = Re Σ_f c(f_d) Y[b,o,f] exp(2πi Σ_j f_j n_j / M_j) + bias[o]

    over the kept signed frequencies f. Entry w // 2 of an axis of W is frequency 0; on the last axis of real data the
    entries are 0, 1, 2, ... and stand for ±f: c = 1 for f_d = 0 and f_d = M_d / 2, else 2. Complex data has c = 1
    and no real part taken. Source: arXiv 2310.00120, section 3, in the form that holds for odd grids too.

    Returns:
        (B, Co, M1, ..., Md), M = ``output_shape`` or the grid of ``x``.
    """
    grid = tuple(x.shape[2:])
    size = grid if output_shape is None else tuple(output_shape)
    dims = tuple(range(2, x.ndim))
    weight_modes = tuple(weight.shape[-len(grid) :])
    kept = kept_modes(n_modes, weight_modes, grid, size, complex_data)

    spectrum = torch.fft.fftn(x, dim=dims, norm="forward")
    scale = torch.ones((), dtype=x.real.dtype, device=x.device)
    places = []
    for axis, (k, w, n, m) in enumerate(zip(kept, weight_modes, grid, size, strict=True)):
        one_sided = not complex_data and axis == len(grid) - 1
        frequencies = torch.tensor(range(k) if one_sided else signed_frequencies(k), device=x.device)
        spectrum = spectrum.index_select(2 + axis, frequencies % n)
        first = weight.ndim - len(grid) + axis
        weight = weight.index_select(first, frequencies if one_sided else frequencies + w // 2)
        places.append(frequencies % m)
        if one_sided:
            scale = torch.where((frequencies == 0) | (2 * frequencies == m), 1.0, 2.0).to(x.real.dtype)

    equation = "bi...,i...->bi..." if separable else "bi...,io...->bo..."
    mixed = torch.einsum(equation, spectrum, weight) * scale
    embedded = mixed.new_zeros(*mixed.shape[:2], *size)
    index = torch.meshgrid(*places, indexing="ij")
    everything = slice(None)
    embedded[(everything, everything, *index)] = mixed  # type: ignore[index]
    y = torch.fft.ifftn(embedded, dim=dims, norm="backward") * math.prod(size)
    if not complex_data:
        y = y.real
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * len(grid))
    return y
