"""Which samples a rank reads in which step: a function of seed and step alone, so nothing of it needs saving."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["Sampler", "load"]


class Sampler:
    """Cuts batches over the dp ranks and micro-batches.

    Args:
        size: samples in the data set.
        batch_size: samples in a step, over all ranks; the last batch of an epoch holds what remains.
        part: this rank's place among the dp ranks; the ranks of one sp or mp group share theirs.
        parts: dp ranks.
        accumulate: micro-batches in a step.
        seed: of the order; None for that of the data set.
    """

    def __init__(
        self, size: int, batch_size: int, part: int = 0, parts: int = 1, accumulate: int = 1, seed: int | None = None
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.part, self.parts, self.accumulate = part, parts, accumulate

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-self.size // self.batch_size)

    def order(self, epoch: int) -> list[int]:
        if self.seed is None:
            return list(range(self.size))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.size, generator=generator).tolist()

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """The whole batches of an epoch, from the one numbered ``start``."""
        order = self.order(epoch)
        for first in range(start * self.batch_size, self.size, self.batch_size):
            yield order[first : first + self.batch_size]

    def micro_batches(self, batch: Sequence[int]) -> list[tuple[list[int], bool]]:
        """This rank's micro-batches of a batch, and whether each counts.

        Where there are fewer samples than ranks and micro-batches, the batch's first sample stands in, and does not
        count: every rank runs the model equally often, as collectives inside it need.
        """
        mine = _cut(batch, self.parts)[self.part]
        return [(part, True) if part else (list(batch[:1]), False) for part in _cut(mine, self.accumulate)]


def _cut(items: Sequence[int], parts: int) -> list[list[int]]:
    """Consecutive parts whose sizes differ by at most one."""
    small, larger = divmod(len(items), parts)
    bounds = [i * small + min(i, larger) for i in range(parts + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(bounds)]


def load(
    dataset: Any, sampler: Sampler, *, epoch: int = 0, start: int = 0, workers: int = 0, pin: bool = False
) -> Iterator[tuple[list[int], list[tuple[Any, bool]]]]:
    """Step by step: the whole batch's indices, and this rank's micro-batches with whether each counts."""
    steps = [(batch, sampler.micro_batches(batch)) for batch in sampler.batches(epoch, start)]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[indices for _, parts in steps for indices, _ in parts],
        num_workers=workers,
        pin_memory=pin,
        collate_fn=getattr(dataset, "collate", None),
        # Its own generator: the loader draws a base seed, which must not move the program's random state.
        generator=torch.Generator().manual_seed(epoch),
    )
    batches = iter(loader)
    for batch, parts in steps:
        yield batch, [(next(batches), counts) for _, counts in parts]
