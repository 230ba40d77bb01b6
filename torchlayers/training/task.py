"""What an experiment says about its model and data; the loop does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Data", "Sums", "Task", "TensorSet"]

# A sum and the weight that it belongs to: their quotient over all batches and ranks is what is reported.
Sums = tuple[torch.Tensor, "torch.Tensor | float"]


class TensorSet(torch.utils.data.Dataset):
    """A data set of tensors with a common first dimension; a batch is indexed at once, a tuple of tensors."""

    def __init__(self, *tensors: torch.Tensor):
        if len({len(t) for t in tensors}) != 1:
            raise ValueError(f"tensors must share their first dimension, got {[tuple(t.shape) for t in tensors]}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        return tuple(t[indices] for t in self.tensors)

    @staticmethod
    def collate(batch: Any) -> Any:
        return batch


@dataclass
class Data:
    """The training set and any number of named test sets, as map-style data sets.

    A sample must be a function of its index: randomness belongs into :meth:`Task.loss`, whose random state is part of
    the checkpoint. A data set may bring its own ``collate(samples)``.
    """

    train: torch.utils.data.Dataset
    test: Mapping[str, torch.utils.data.Dataset] = field(default_factory=dict)


class Task:
    """Model, data, loss and metrics of an experiment. ``config`` is the experiment's config object.

    Losses and metrics are sums with weights, never means: the loop adds both over micro-batches and ranks and divides
    once, so that a partial batch counts for what it holds.
    """

    def __init__(self, config: Any):
        self.config = config

    def build_model(self) -> nn.Module:
        """A new model, without reading any data: this is also how a trained one is loaded."""
        raise NotImplementedError

    def build_data(self) -> Data:
        """The data sets. Rank 0 calls this before the others do, so it may fill a cache."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, data: Data) -> None:
        """Set what the model takes from the training data, such as a normaliser's buffers. Called on each start."""

    def shard_batch(self, batch: Any, mesh: DeviceMesh) -> Any:
        """This rank's part of a batch; the ranks of one sp or mp group get the same batch to cut."""
        return batch

    def loss(self, model: nn.Module, batch: Any) -> Sums:
        """The sum of the loss over the batch's samples (tokens, ...) and their number."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> Mapping[str, Sums]:
        """Metrics of a batch of the test set ``name``; ``{"l2_16": (sum, weight)}`` is reported as ``test/l2_16``."""
        return {}

    def final(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Further final metrics of the run, made of those of its last evaluation, under names of their own."""
        return {}

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks, each run by its own ``forward``: what is sharded, and recomputed, one by one."""
        return []

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        """Draw what the trained model does into ``folder``. Called on rank 0, at the end."""
