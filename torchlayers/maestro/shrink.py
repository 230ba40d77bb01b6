"""What happens between epochs: dropping the terms that training has emptied, and refreshing batch norm's statistics."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import check_int
from .layers import LowRankLayer
from .ordered import low_rank_layers, unwrapped
from .regularization import AXES, Factor, check_finite, factors, mesh_of, reshard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["progressive_shrink", "recalibrate_bn"]

DDP = nn.parallel.DistributedDataParallel


# Progressive shrinking


@torch.no_grad()
def progressive_shrink(
    model: nn.Module,
    threshold: float,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    physical: bool = False,
    group: ProcessGroup | None = None,
) -> dict[str, tuple[int, int]]:
    """Drop the last terms of each layer whose importance has fallen below ``threshold``::

        rank <- #{b : ‖U[:, b:]‖_F ‖V[:, b:]‖_F ≥ threshold}

    Call it after an epoch of training with the hierarchical group lasso. A rank may become 0; such a layer gives its
    bias. Layers that share a factor keep the largest of their ranks.

    Logically, the dropped terms become zero and stay allocated: optimizer, DDP and FSDP2 go on as they are. Physically,
    the factors are cut to new parameters, together with what was dropped before: memory is freed. The ``optimizer``
    that is given then gets the new parameters in the place of the old ones, with their state and gradients cut
    likewise; without it, make a new one. Of a model under DDP pass the wrapper, which is built anew around the cut
    parameters. Training goes on the same either way.

    In a process group, the ranks of ``model`` decide together: the first rank's decision counts, so all must call.

    Args:
        model: has low-rank layers; may be wrapped for data parallelism or compilation.
        threshold: ≥ 0; one of the order of 1e-7 to 1e-3, above the floor that gradient descent leaves (``hgl_prox_``
            leaves none). 0 drops nothing.
        optimizer: whose state follows the factors. Logically, its momenta of dropped terms become zero.
        physical: cut the parameters. Not for sharded ones.
        group: the ranks that decide together, by default those of the DDP wrapper, else all.

    Returns:
        name -> (old rank, new rank), of every low-rank layer.

    Raises:
        ValueError: ``threshold`` is negative or not finite; ``model`` has no low-rank layer, or weights that are not
            finite; ``physical`` with sharded parameters or mixed-precision DDP; ``optimizer`` does not hold a factor,
            or has a state that cannot be cut. ``model`` is then as it was.
        TypeError: arguments of another kind.

    Source: arXiv 2308.14929, section 3.3.

    Example:

        >>> import torch
        >>> from torchlayers.maestro import LowRankLinear, progressive_shrink
        >>> layer = LowRankLinear.from_linear(torch.nn.Linear(8, 6))
        >>> with torch.no_grad():
        ...     _ = layer.weight_in[4:].zero_()
        >>> progressive_shrink(layer, 1e-5)
        {'': (6, 4)}
    """
    layers = low_rank_layers(model)
    check_finite("threshold", threshold)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    reshard(model)
    old = {name: layer.rank for name, layer in layers.items()}
    new = _agreed({name: _kept(name, layer, threshold) for name, layer in layers.items()}, model, group)
    _keep_tied_equal(layers, new)
    if physical:
        changed = [name for name, layer in layers.items() if new[name] < layer.max_rank]
    else:
        changed = [name for name in layers if new[name] < old[name]]
    touched = factors(layers[name] for name in changed)
    if physical:
        _check_can_cut(model, touched)
    if optimizer is not None:
        _check_state(optimizer, touched)

    cuts: dict[int, nn.Parameter] = {}
    for name in changed:
        if physical:
            _cut(layers[name], new[name], cuts)
        else:
            layers[name].truncate_(new[name])
    if optimizer is not None:
        ranks = {id(p): rank for p, _, rank in factors(layers[name] for name in changed)}
        for factor in touched:
            cut = cuts.get(id(factor.parameter))
            if cut is not None:
                _move_state(optimizer, factor, cut)
            else:
                _zero_state(optimizer, factor, ranks[id(factor.parameter)])
    if cuts and (wrapper := _ddp(model)) is not None:
        _rebuild(wrapper)
    return {name: (old[name], new[name]) for name in layers}


def _kept(name: str, layer: LowRankLayer, threshold: float) -> int:
    importance = layer.importance()
    if not bool(importance.isfinite().all()):
        raise ValueError(f"model must have finite weights, got NaN or infinite entries in {name or 'the model'}")
    return int((importance >= threshold).sum())


def _agreed(ranks: dict[str, int], model: nn.Module, group: ProcessGroup | None) -> dict[str, int]:
    """The decision of the group's first rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return ranks
    if group is None and (wrapper := _ddp(model)) is not None:
        group = wrapper.process_group
    message = [ranks]
    dist.broadcast_object_list(message, group=group, group_src=0)
    return message[0]


def _keep_tied_equal(layers: Mapping[str, LowRankLayer], ranks: dict[str, int]) -> None:
    """Raise ranks until layers with a common factor agree."""
    users: dict[int, list[str]] = {}
    for name, layer in layers.items():
        for key in AXES:
            users.setdefault(id(getattr(layer, key)), []).append(name)
    tied = [names for names in users.values() if len(names) > 1]
    while any(len({ranks[n] for n in names}) > 1 for names in tied):
        for names in tied:
            ranks.update(dict.fromkeys(names, max(ranks[n] for n in names)))


def _check_can_cut(model: nn.Module, touched: Iterable[Factor]) -> None:
    if any(mesh_of(f.parameter) is not None for f in touched):
        raise ValueError("physical must be False where parameters are sharded: cut the model, then shard it")
    if getattr(_ddp(model), "mixed_precision", None) is not None:
        raise ValueError("physical must be False under DDP with mixed_precision, which keeps copies of the parameters")


def _cut(layer: LowRankLayer, rank: int, cuts: dict[int, nn.Parameter]) -> None:
    """Cut the factors; those that are tied stay so, through ``cuts``, which has the new ones by the old ones' ids."""
    old = {key: getattr(layer, key) for key in AXES}
    layer.truncate_(rank, physical=True)
    for key, parameter in old.items():
        if parameter.grad is not None:
            getattr(layer, key).grad = parameter.grad.narrow(AXES[key], 0, rank).clone()
        setattr(layer, key, cuts.setdefault(id(parameter), getattr(layer, key)))


# The optimizer


def _check_state(optimizer: torch.optim.Optimizer, touched: Iterable[Factor]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for factor in touched:
        p = factor.parameter
        if id(p) not in held:
            if p.requires_grad:
                raise ValueError(f"optimizer must hold the model's factors, got none of shape {tuple(p.shape)}")
            continue
        for key, value in optimizer.state.get(p, {}).items():
            plain = value is None or isinstance(value, (bool, int, float))
            if not plain and not (isinstance(value, Tensor) and (value.numel() == 1 or value.ndim == p.ndim)):
                raise ValueError(
                    f"optimizer must keep its state entry by entry or in numbers, got {key!r} of "
                    f"{type(optimizer).__name__} for a parameter of shape {tuple(p.shape)}"
                )


def _follows(value: Any, factor: Factor) -> bool:
    """Whether a value of the optimizer's state has an entry, or a row, for each term."""
    size = factor.parameter.shape[factor.axis]
    return isinstance(value, Tensor) and value.ndim == factor.parameter.ndim and value.shape[factor.axis] == size


def _move_state(optimizer: torch.optim.Optimizer, factor: Factor, cut: nn.Parameter) -> None:
    old, axis = factor.parameter, factor.axis
    for group in optimizer.param_groups:
        group["params"] = [cut if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[cut] = {
            key: value.narrow(axis, 0, cut.shape[axis]).clone() if _follows(value, factor) else value
            for key, value in optimizer.state.pop(old).items()
        }


def _zero_state(optimizer: torch.optim.Optimizer, factor: Factor, rank: int) -> None:
    """Forget the momenta of dropped terms, which would bring them back."""
    size = factor.parameter.shape[factor.axis]
    for value in optimizer.state.get(factor.parameter, {}).values():
        if not _follows(value, factor):
            continue
        live = torch.arange(size, device=value.device) < rank
        live = (live[:, None] if factor.axis == 0 else live).expand(value.shape)
        if (mesh := mesh_of(value)) is not None:
            from torch.distributed.tensor import DTensor, Replicate

            live = DTensor.from_local(live.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        value.masked_fill_(~live, 0)


# Data parallelism

_DDP_ARGUMENTS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "skip_all_reduce_unused_params",
    "batched_grad_copy",
)


def _ddp(model: nn.Module) -> DDP | None:
    """The DDP wrapper that is given, itself or compiled."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, DDP) else None


def _rebuild(model: DDP) -> None:
    """Construct the wrapper anew in its place, with the arguments, hooks and mode that it has."""
    known = inspect.signature(DDP.__init__).parameters
    arguments = {name: getattr(model, name) for name in _DDP_ARGUMENTS if name in known}
    # torch 2.13 renames this one, and warns of the old name.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    arguments[buffers] = getattr(model, buffers)
    if not getattr(model, "bucket_bytes_cap_default", True):
        arguments["bucket_cap_mb"] = model.bucket_bytes_cap / 2**20
    own = {key: model.__dict__[key] for key in vars(nn.Module()) if key not in ("_parameters", "_buffers", "_modules")}
    communication = list(model._comm_hooks)
    DDP.__init__(model, model.module, **arguments)
    model.__dict__.update(own)
    for hook, state in communication:
        model.register_comm_hook(state, hook)


# Batch norm


@torch.no_grad()
def recalibrate_bn(
    model: nn.Module,
    loader: Iterable[Any],
    num_batches: int | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Take batch norm's running statistics anew, as plain means over the batches of ``loader``.

    A submodel has other activations than the model whose training set the statistics. Batch norm layers run in
    training mode, everything else in evaluation, without gradients; modes, momenta and everything but the statistics
    are afterwards as before, also after an error, which brings back the statistics too.

    Where data-parallel ranks each have their share of the data, the statistics become those of one process with all of
    the batches: under a DDP wrapper or FSDP2, or over ``group`` where it is given; all its ranks must then call.

    Args:
        model: its batch norm layers that track statistics are recalibrated; without any, nothing is done.
        loader: batches of training data: inputs, or (inputs, ...), or mappings of keyword arguments. Tensors are moved
            to the model's device.
        num_batches: how many of them, all by default.
        forward: ``forward(model, batch)`` runs a batch of another kind.
        group: the ranks whose statistics are averaged.

    Raises:
        ValueError: ``loader`` has no batch.
        TypeError: ``model`` is no module.

    Example:

        >>> import torch
        >>> from torchlayers.maestro import recalibrate_bn
        >>> norm = torch.nn.BatchNorm1d(1).eval()
        >>> recalibrate_bn(norm, [torch.tensor([[1.0], [3.0]])])
        >>> norm.running_mean.item(), norm.running_var.item()
        (2.0, 2.0)
    """
    module = unwrapped(model)
    if num_batches is not None:
        check_int("num_batches", num_batches)
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    if group is None:
        group = _replicas(model)
    with _recalibrating(module, norms):
        batches = 0
        # The module itself: DDP would put the first rank's statistics in the place of the others' at each call.
        for batch in loader:
            (_run if forward is None else forward)(module, batch)
            batches += 1
            if batches == num_batches:
                break
        _average(norms, batches, group)


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{key: _moved(value, model) for key, value in batch.items()})
    return model(_moved(batch[0] if isinstance(batch, (tuple, list)) else batch, model))


def _moved(value: Any, model: nn.Module) -> Any:
    if not isinstance(value, Tensor):
        return value
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    return value.to(device, non_blocking=True)


@contextlib.contextmanager
def _recalibrating(module: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        # Attributes, not train(): models override it to keep batch norm frozen.
        for m, _ in modes:
            m.training = False
        for norm in norms:
            norm.training = True
            norm.momentum = None  # the mean over all batches since the reset
            norm.reset_running_stats()
        yield
    except BaseException:
        for norm, values in zip(norms, statistics, strict=True):
            for buffer, value in zip(norm.buffers(), values, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for m, training in modes:
            m.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _replicas(model: nn.Module) -> ProcessGroup | None:
    """The group over whose ranks the model is known to be replicated or sharded."""
    if (wrapper := _ddp(model)) is not None:
        return wrapper.process_group
    if any(mesh_of(p) is not None for p in model.parameters()):
        return dist.group.WORLD
    return None


def _average(norms: list[_BatchNorm], batches: int, group: ProcessGroup | None) -> None:
    """The mean of the ranks' statistics, each weighted by its number of batches."""
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
    weighted = torch.cat([s.double().flatten() * batches for s in statistics] + [statistics[0].new_full((1,), batches)])
    if group is not None:
        dist.all_reduce(weighted, group=group)
    *means, total = weighted.split([s.numel() for s in statistics] + [1])
    if total == 0:
        raise ValueError("loader must have at least one batch, got none")
    if group is not None:
        for statistic, mean in zip(statistics, means, strict=True):
            statistic.copy_((mean / total).view_as(statistic))
        for norm in norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(int(total))
