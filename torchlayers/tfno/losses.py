"""Relative errors of fields, per sample: what neural operators are trained on and measured by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_dtype, check_int

__all__ = ["H1Loss", "LpLoss"]


class _RelativeLoss(nn.Module):
    """‖pred - target‖ / (‖target‖ + eps) for each sample, then reduced over the batch."""

    def __init__(self, d: int, reduction: str, eps: float):
        super().__init__()
        self.d = check_int("d", d)
        check_choice("reduction", reduction, ["mean", "sum", "none"])
        self.reduction = reduction
        self.eps = float(eps)

    def norm(self, u: Tensor) -> Tensor:
        """(B, ..., N1, ..., Nd) -> (B,)."""
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        for name, u in (("pred", pred), ("target", target)):
            if not isinstance(u, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(u).__name__}")
            if u.ndim < self.d + 1:
                raise ValueError(
                    f"{name} must have a batch and {self.d} grid dimensions (B, ..., N1, ..., Nd), "
                    f"got shape {tuple(u.shape)}"
                )
            check_dtype(name, u, kind="inexact")
        if pred.shape != target.shape:
            raise ValueError(
                f"pred must have the shape of target, {tuple(target.shape)}, got {tuple(pred.shape)}: "
                "nothing is broadcast in a loss"
            )
        # Sums of many squares in half precision lose their small terms.
        low = (torch.float16, torch.bfloat16)
        pred = pred.float() if pred.dtype in low else pred
        target = target.float() if target.dtype in low else target
        values = self.norm(pred - target) / (self.norm(target) + self.eps)
        if self.reduction == "none":
            return values
        if self.reduction == "sum" or values.shape[0] == 0:
            return values.sum()
        return values.mean()


class LpLoss(_RelativeLoss):
    """Relative L^p error per sample, mean over the batch::

        ‖u - v‖_p / (‖v‖_p + eps),    ‖u‖_p = (Σ_{c,n} |u[c,n]|^p)^(1/p)

    (The quadrature weights of a regular grid cancel in the ratio.) The mean does not depend on how a data set is cut
    into batches of one size, unlike a sum over the batch.

    Args:
        d: grid dimensions, the last ones. What lies between them and the batch, such as channels, belongs to the
            sample.
        p: the exponent, at least 1; ``math.inf`` for the largest error.
        reduction: "mean" or "sum" over the batch, or "none" for the values of the samples.
        eps: keeps a zero target from dividing by zero.

    Shape: pred, target (B, ..., N1, ..., Nd) -> scalar, or (B,) for "none". Half precisions are summed in float32.

    Raises:
        TypeError, ValueError: no tensors, different shapes, too few dimensions, ``p`` below 1.

    Example:

        >>> loss = LpLoss(d=2)
        >>> loss(torch.full((3, 1, 8, 8), 1.1), torch.ones(3, 1, 8, 8))
        tensor(0.1000)
    """

    def __init__(self, d: int = 2, p: float = 2, *, reduction: str = "mean", eps: float = 1e-8):
        super().__init__(d, reduction, eps)
        if isinstance(p, bool) or not isinstance(p, (int, float)):
            raise TypeError(f"p must be a number, got {p!r} ({type(p).__name__})")
        if not p >= 1:
            raise ValueError(f"p must be at least 1, got {p}")
        self.p = p

    def norm(self, u: Tensor) -> Tensor:
        return torch.linalg.vector_norm(u.flatten(1), self.p, dim=1)

    def extra_repr(self) -> str:
        return f"d={self.d}, p={self.p}, reduction={self.reduction!r}"


class H1Loss(_RelativeLoss):
    """Relative H¹ (Sobolev) error per sample, mean over the batch::

        ‖u - v‖ / (‖v‖ + eps),    ‖u‖² = Σ_{c,n} ( |u|² + Σ_j |∂_j u|² )

    on the unit cube, with central differences ∂_j u = (u[n_j + 1] - u[n_j - 1]) / (2 h_j), h_j = 1 / N_j. An axis that
    is not periodic has second-order one-sided differences at its two ends.

    Args:
        d: grid dimensions, the last ones.
        periodic: whether the field is periodic: one flag, or one an axis.
        reduction, eps: as in :class:`LpLoss`.

    Shape: pred, target (B, ..., N1, ..., Nd) -> scalar, or (B,) for "none".

    Raises:
        TypeError, ValueError: as :class:`LpLoss`; flags that are no bools or not one an axis; fewer than 3 points
            on an axis.

    Source: arXiv 2310.00120, section 4 (training on H¹ lowers the L² error too).

    Example:

        >>> loss = H1Loss(d=2, periodic=False)
        >>> round(loss(1.5 * torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).item(), 6)
        0.5
    """

    def __init__(
        self, d: int = 2, periodic: bool | Sequence[bool] = True, *, reduction: str = "mean", eps: float = 1e-8
    ):
        super().__init__(d, reduction, eps)
        flags = tuple(periodic) if isinstance(periodic, Sequence) else (periodic,) * d
        if not all(isinstance(flag, bool) for flag in flags):
            raise TypeError(f"periodic must be a bool or one an axis, got {periodic!r}")
        if len(flags) != d:
            raise ValueError(f"periodic must have d = {d} entries, got {len(flags)}: {flags}")
        self.periodic = flags

    def norm(self, u: Tensor) -> Tensor:
        terms = [u]
        for axis, periodic in enumerate(self.periodic, u.ndim - self.d):
            terms.append(_derivative(u, axis, periodic))
        norms = [torch.linalg.vector_norm(term.flatten(1), dim=1) for term in terms]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def extra_repr(self) -> str:
        return f"d={self.d}, periodic={self.periodic}, reduction={self.reduction!r}"


def _derivative(u: Tensor, axis: int, periodic: bool) -> Tensor:
    n = u.shape[axis]
    if n < 3:
        raise ValueError(f"pred must have at least 3 points on each axis, got {n}: shape {tuple(u.shape)}")
    if periodic:
        difference = torch.roll(u, -1, axis) - torch.roll(u, 1, axis)
    else:

        def at(i: int) -> Tensor:
            return u.narrow(axis, i % n, 1)

        inner = u.narrow(axis, 2, n - 2) - u.narrow(axis, 0, n - 2)
        first = -3 * at(0) + 4 * at(1) - at(2)
        last = 3 * at(-1) - 4 * at(-2) + at(-3)
        difference = torch.cat((first, inner, last), axis)
    return difference * (n / 2)
