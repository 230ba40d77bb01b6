"""The Gaunt operations as the paper defines them, over dense coefficient tables: the oracle, differentiable twice.

Signals are coefficients (…, C, (L + 1)²) of real orthonormal harmonics, index l² + l + m. Source: arXiv 2401.10216.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import dense_coefficients
from .sphere import spherical_harmonics

__all__ = ["gaunt_convolution", "gaunt_many_body", "gaunt_tensor_product"]


def gaunt_tensor_product(
    x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int | None = None, *, antisymmetric: bool = False
) -> Tensor:
    """Coefficients up to ``lmax_out`` (None: lmax1 + lmax2) of the product XY, or of the bracket r·(∇X × ∇Y):

    z_k = Σ_ij G_ijk x_i y_j,    G_ijk = ∫ Y_i Y_j Y_k    or    ∫ r·(∇Y_i × ∇Y_j) Y_k
    """
    lmax_out = lmax1 + lmax2 if lmax_out is None else lmax_out
    coefficients = dense_coefficients(
        lmax1, lmax2, lmax_out, antisymmetric=antisymmetric, dtype=x.dtype, device=x.device
    )
    return torch.einsum("...i,...j,ijk->...k", x, y, coefficients)


def gaunt_many_body(x: Tensor, lmax: int, correlation: int, lmax_out: int) -> Tensor:
    """Coefficients up to ``lmax_out`` of X^correlation, by nested products of which only the last is truncated."""
    if correlation == 1:
        return x[..., : (lmax_out + 1) ** 2]
    power = x
    for order in range(1, correlation - 1):
        power = gaunt_tensor_product(power, x, order * lmax, lmax)
    return gaunt_tensor_product(power, x, (correlation - 1) * lmax, lmax, lmax_out)


def gaunt_convolution(
    x: Tensor,
    edge_vec: Tensor,
    filter_coeff: Tensor,
    edge_index: Tensor | None = None,
    *,
    lmax: int,
    lmax_filter: int,
    lmax_out: int | None = None,
    antisymmetric: bool = False,
) -> Tensor:
    """Product (or bracket) of each source's signal with the filter F(r) = Σ_lm h_l Y_lm(edge) Y_lm(r) of its edge.

    x is (N, C, n), edge_vec (E, 3) of any length, filter_coeff h (E, C, lmax_filter + 1), edge_index (2, E) = (source,
    target). The result (N, C, n_out) sums over each target's edges; without ``edge_index`` x is (E, C, n) and the
    result is per edge. An edge of length zero has no direction: its filter is the constant h_0 Y_00², its gradient 0.
    """
    squared = edge_vec.square().sum(-1, keepdim=True)
    directed = squared > 0
    unit = torch.where(directed, edge_vec / torch.where(directed, squared, 1.0).sqrt(), 0.0)
    degree_of = [ell for ell in range(lmax_filter + 1) for _ in range(2 * ell + 1)]
    zonal = filter_coeff[..., degree_of] * spherical_harmonics(lmax_filter, unit)[:, None]

    source = x if edge_index is None else x[edge_index[0]]
    message = gaunt_tensor_product(source, zonal, lmax, lmax_filter, lmax_out, antisymmetric=antisymmetric)
    if edge_index is None:
        return message
    return message.new_zeros(x.shape[0], *message.shape[1:]).index_add(0, edge_index[1], message)
