"""The penalties that empty a factorisation from its end, and the exact proximal step of the hierarchical one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layers import LowRankLayer
from .ordered import low_rank_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["group_lasso", "hgl_prox_", "hierarchical_group_lasso"]

# Which dimension of each factor counts the terms.
AXES = {"weight_in": 0, "weight_out": 1}


class Factor(NamedTuple):
    """A factor of a low-rank layer: the parameter, the dimension that counts its terms, and how many are in force."""

    parameter: nn.Parameter
    axis: int
    rank: int


def factors(layers: Iterable[LowRankLayer]) -> list[Factor]:
    """The factors of layers, one that several share once, with the largest of their ranks."""
    found: dict[int, Factor] = {}
    for layer in layers:
        for name, axis in AXES.items():
            parameter, rank = getattr(layer, name), layer.rank
            if (other := found.get(id(parameter))) is not None:
                rank = max(rank, other.rank)
            found[id(parameter)] = Factor(parameter, axis, rank)
    return list(found.values())


def hierarchical_group_lasso(model: nn.Module, eps: float = 0.0) -> Tensor:
    """The sum of the norms of all tails of all factors, over the terms in force::

        Σ_layers Σ_{b=1..rank} ( ‖U[:, b:]‖_F + ‖V[:, b:]‖_F )        b: stands for columns b, b + 1, ..., rank

    Term b is in b groups, each within the one before, so that late terms are penalised more, and zeros fill the factors
    from the end. Biases and other parameters are not penalised; a factor that layers share counts once. Where a tail is
    zero its gradient is, too.

    Computed in float32, or float64 for float64 parameters. Of sharded factors (FSDP2) only the norms are exchanged; all
    ranks must call, and the gradient is the mean over the ranks of what each asks for, as for the rest of the loss.

    Args:
        model: has low-rank layers; may be wrapped for data parallelism or compilation.
        eps: √(‖·‖² + eps²) in place of the norms, which is smooth for eps > 0.

    Returns:
        A scalar tensor, to be added to the loss times a weight λ.

    Raises:
        ValueError: ``model`` has no low-rank layer; ``eps`` is negative or not finite.

    Source: arXiv 2308.14929, section 3.2.

    Example:

        >>> import torch
        >>> from torchlayers.maestro import LowRankLinear, hierarchical_group_lasso
        >>> layer = LowRankLinear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight_in.copy_(torch.eye(2)), layer.weight_out.zero_()
        >>> round(hierarchical_group_lasso(layer).item(), 4)  # √(1 + 1) + √1
        2.4142
    """
    check_finite("eps", eps)
    return _penalty(model, lambda squares: _root(_tails(squares), eps))


def group_lasso(model: nn.Module, eps: float = 0.0) -> Tensor:
    """The sum of the norms of all columns of all factors, Σ_layers Σ_b ( ‖u_b‖ + ‖v_b‖ ).

    Terms are emptied wherever they stand: it orders nothing. Otherwise as :func:`hierarchical_group_lasso`.
    """
    check_finite("eps", eps)
    return _penalty(model, lambda squares: _root(squares, eps))


@torch.no_grad()
def hgl_prox_(model: nn.Module, tau: float) -> nn.Module:
    """Replace all factors by the proximal point of tau times the hierarchical group lasso, in place::

        argmin_W  ½ ‖W − W_0‖² + tau · hierarchical_group_lasso(W)

    Exact, in one pass from the last term to the first: with m_{r+1} = 0, the norm of tail b becomes
    m_b = max(0, √(‖w_b‖² + m_{b+1}²) − tau), and column b shrinks by the product of the factors of its b groups. Whole
    tails become exactly zero, where gradient descent on the penalty leaves a floor.

    Call it after each optimizer step, with tau = learning rate × λ, instead of adding the penalty to the loss. The
    norms of all factors go to the CPU in one transfer. Of sharded factors (FSDP2) only norms are exchanged; all ranks
    must call.

    Args:
        model: has low-rank layers; may be wrapped for data parallelism or compilation.
        tau: ≥ 0.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no low-rank layer; ``tau`` is negative or not finite; weights are not finite.

    Source: Jenatton et al., Proximal Methods for Hierarchical Sparse Coding (2011), for groups that form a chain.

    Example:

        >>> import torch
        >>> from torchlayers.maestro import LowRankLinear, hgl_prox_
        >>> layer = hgl_prox_(LowRankLinear(8, 8), 10.0)
        >>> layer.weight_in.count_nonzero().item()
        0
    """
    check_finite("tau", tau)
    layers = low_rank_layers(model)
    reshard(model)  # before factors: it frees the gathered parameters
    found = factors(layers.values())
    norms = [column_squares(f, torch.float64) for f in found]
    values = iter(torch.cat([n.to(norms[0].device) for n in norms]).tolist())
    # All factors before the first is changed: an error leaves the model as it was.
    scales = [_prox_scales([next(values) for _ in range(f.rank)], tau) for f in found]
    for factor, scale in zip(found, scales, strict=True):
        _scale_(factor, scale)
    return model


def _prox_scales(squares: list[float], tau: float) -> list[float]:
    """What each column is multiplied with, from the squared column norms."""
    tail, shrunk = 0.0, []
    for square in reversed(squares):
        norm = math.sqrt(square + tail * tail)
        if not math.isfinite(norm):
            raise ValueError("model must have finite weights, got NaN or infinite entries in a low-rank layer")
        tail = max(0.0, norm - tau)
        shrunk.append(tail / norm if norm > 0 else 0.0)
    scale, scales = 1.0, []
    for factor in reversed(shrunk):
        scale *= factor
        scales.append(scale)
    return scales


def _scale_(factor: Factor, scales: list[float]) -> None:
    w = factor.parameter
    scales += [1.0] * (w.shape[factor.axis] - factor.rank)
    scale: Any = torch.tensor(scales, dtype=torch.float64).to(w.device, w.dtype)
    if (mesh := mesh_of(w)) is not None:
        from torch.distributed.tensor import DTensor, Replicate

        scale = DTensor.from_local(scale, mesh, [Replicate()] * mesh.ndim, run_check=False)
    w.mul_(scale.unsqueeze(1) if factor.axis == 0 else scale)


# What sharded and plain factors have in common


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh that a sharded tensor lies on; None for a plain one."""
    return getattr(tensor, "device_mesh", None)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters of FSDP2 modules: what is to be changed are the shards."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def column_squares(factor: Factor, dtype: torch.dtype) -> Tensor:
    """The squared norms of the terms in force, (rank,), whole on every rank; differentiable."""
    squares = factor.parameter.to(dtype).square().sum(1 - factor.axis)
    if mesh_of(squares) is not None:
        squares = squares.full_tensor()  # type: ignore[attr-defined]
    return squares[: factor.rank]


def _penalty(model: nn.Module, norms: Any) -> Tensor:
    found = factors(low_rank_layers(model).values())
    device = found[0].parameter.device
    wide = torch.float64 if any(f.parameter.dtype == torch.float64 for f in found) else torch.float32
    # Sharded factors mesh by mesh: the gradient is averaged over the ranks of each.
    sums: dict[DeviceMesh | None, list[Tensor]] = {}
    for factor in found:
        sums.setdefault(mesh_of(factor.parameter), []).append(norms(column_squares(factor, wide)).sum().to(device))
    total = torch.zeros((), dtype=wide, device=device)
    for mesh, parts in sums.items():
        part = torch.stack(parts).sum()
        if mesh is not None and part.requires_grad:
            _average_gradient(part, mesh)
        total = total + part
    return total


def _average_gradient(scalar: Tensor, mesh: DeviceMesh) -> None:
    """Average what arrives at ``scalar`` in backward over the ranks of ``mesh``, all of which hold the same scalar.

    Gradients of shards stay where they are; those of the rest of the loss, which FSDP2 averages, they now match.
    """

    def average(grad: Tensor) -> Tensor:
        grad = grad.clone()
        for dim in range(mesh.ndim):
            dist.all_reduce(grad, group=mesh.get_group(dim))
        return grad / mesh.size()

    scalar.register_hook(average)


def _tails(squares: Tensor) -> Tensor:
    return squares.flip(0).cumsum(0).flip(0)


def _root(squares: Tensor, eps: float) -> Tensor:
    """√(squares + eps²), with a derivative of zero at zero."""
    squares = squares + eps * eps
    positive = squares > 0
    # The root must not see the zeros, whose infinite derivative the mask would turn into NaN.
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def check_finite(name: str, value: object) -> float:
    """``value`` is a number, finite and not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    return number
