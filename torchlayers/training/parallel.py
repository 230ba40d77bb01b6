"""The model over the mesh: sharding, gradient reduction, clipping, moving averages.

Every rank back-propagates the plain sum of its losses. The mean over the ranks, which DDP and FSDP2 take, times
(ranks / sum of weights over all ranks) is then the gradient of the mean loss, whatever the shares of the ranks were;
:meth:`Parallel.finish_gradients` applies that factor, together with the clipping's, after the last micro-batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from .config import Trainer
from .errors import ConfigError
from .runtime import Runtime

__all__ = ["MovingAverage", "Parallel", "state_tensors"]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank (a collective where it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Parallel:
    """``module`` prepared for the mesh.

    Attributes:
        module: the module itself (sharded in place under fsdp2): its parameters, for optimizer and checkpoints.
        model: what a training step calls (the module, or DDP around it).
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], trainer: Trainer, runtime: Runtime):
        self.module = self.model = module
        self.runtime = runtime
        self.grad_clip = trainer.grad_clip
        mesh = runtime.mesh
        # Modules that reduce their gradients over sp and mp themselves; what remains to be done is a mean over dp.
        own = [m for m in module.modules() if getattr(m, "reduces_gradients", False)]
        own_ids = {id(p) for m in own for p in m.parameters()}
        if trainer.activation_checkpointing:
            if not blocks:
                raise ConfigError("trainer.activation_checkpointing=true, but this experiment's task names no blocks")
            for block in blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if trainer.compile:
            module.compile()
        self._own: list[nn.Parameter] = []
        if trainer.strategy == "fsdp2":
            everyone = mesh[("dp", "sp", "mp")]._flatten("everyone")
            for block in [*own, *blocks]:
                if not isinstance(block, FSDPModule):
                    within = any(block is m for o in own for m in o.modules())
                    fully_shard(block, mesh=mesh["dp"] if within else everyone, reshard_after_forward=True)
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=everyone, reshard_after_forward=True)
        elif runtime.world > 1:
            self._own = [p for p in module.parameters() if id(p) in own_ids and p.requires_grad]
            if own_ids:
                names = [n for n, p in module.named_parameters() if id(p) in own_ids]
                nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
                for parameter in self._own:
                    dist.broadcast(parameter.data, src=0)
            if any(p.requires_grad and id(p) not in own_ids for p in module.parameters()):
                self.model = nn.parallel.DistributedDataParallel(module)
        self._parameters = list(module.parameters())

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of a micro-batch; gradients are exchanged in the last one of a step."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            yield
        elif isinstance(self.model, nn.parallel.DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
        else:
            yield
        if last and self._own:
            group = self.runtime.mesh.get_group("dp")
            for parameter in self._own:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=group)
                    parameter.grad /= group.size()

    def finish_gradients(self, weight: float) -> float | None:
        """From the ranks' mean of summed losses to the gradient of the mean loss, clipped; its norm where clipped."""
        factor = self.runtime.world / weight
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = None
        if self.grad_clip is not None:
            norm = factor * self._norm(gradients)
            factor *= min(1.0, self.grad_clip / (norm + 1e-6))
        if factor != 1.0 and gradients:
            torch._foreach_mul_([local(g) for g in gradients], factor)
        return norm

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        # Tensors of different meshes (or none) cannot be stacked, so each mesh's norm is taken by itself.
        by_mesh: dict[Any, list[torch.Tensor]] = {}
        for gradient in gradients:
            by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
        norms = [full(nn.utils.get_total_norm(group)) for group in by_mesh.values()]
        return sum(float(n) ** 2 for n in norms) ** 0.5


def state_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, as they are stored: real, and sharded where the module is.

    Not ``state_dict()``, whose hooks present some parameters as complex.
    """
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in child._non_persistent_buffers_set:
                tensors[name] = buffer
    return {name: tensor.detach() for name, tensor in tensors.items()}


class MovingAverage:
    """An exponential moving average of the parameters, which :meth:`applied` puts in their place for a while."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {n: p.detach() for n, p in module.named_parameters() if p.is_floating_point()}
        self.average = {n: p.clone() for n, p in self.parameters.items()}

    def update(self) -> None:
        torch._foreach_lerp_(*self._pairs(), 1.0 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        average, parameters = self._pairs()
        kept = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, average)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, kept)

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [local(a) for a in self.average.values()], [local(p) for p in self.parameters.values()]
