"""Handwritten digits by one low-rank network that is trained once and cut to every size.

scikit-learn's 1797 images of 8 × 8 pixels, a perceptron with two hidden layers. Its hidden layers are low-rank and
ordered by Maestro's ordered dropout (arXiv 2308.14929); beside it stand, at an equal number of passes over the data,
the dense network (with an SVD of its weights after training), low-rank layers without an order, and low-rank layers
that were trained at a small rank from the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .._checks import check_int, check_ints, require
from ..training import Data, DataConfig, TensorSet, group, key, register
from ._maestro import LowRankTask, MaestroConfig


@dataclass
class Model:
    hidden: list[int] = key([128, 128], "channels of the hidden layers")

    def __post_init__(self) -> None:
        check_ints("model.hidden", self.hidden)


@dataclass
class DigitsData(DataConfig):
    batch_size: int = key(64, "images in an optimizer step, over all ranks and micro-batches")
    test_samples: int = key(397, "images that are kept for the test, of 1797")
    seed: int = key(0, "of the division into training and test, apart from the run's seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.test_samples", self.test_samples)
        check_int("data.seed", self.seed, minimum=0)
        if self.test_samples > 1796:
            raise ValueError(f"data.test_samples must leave an image of 1797 to train on, got {self.test_samples}")


@dataclass
class MaestroDigits(MaestroConfig):
    model: Model = group(Model)
    data: DigitsData = group(DigitsData)


def digits(test_samples: int, seed: int) -> tuple[TensorSet, TensorSet]:
    """Training and test images (N, 64) with their classes (N,): over training, pixels of mean 0, all of variance 1."""
    found = require("sklearn.datasets", extra="data").load_digits()
    x = torch.from_numpy(found.data).float()
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:test_samples], order[test_samples:]
    x = x - x[train].mean(0)
    x = x / x[train].square().mean().sqrt()
    return TensorSet(x[train], y[train]), TensorSet(x[test], y[test])


class DigitsTask(LowRankTask):
    config: MaestroDigits

    def __init__(self, config: MaestroDigits):
        super().__init__(config)
        # Ten classes need nine terms of the ten that the last layer has.
        self.skip = (f"{2 * len(config.model.hidden)}",)

    def network(self) -> nn.Module:
        layers: list[nn.Module] = []
        width = 64
        for hidden in self.config.model.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, 10))

    def build_data(self) -> Data:
        data = self.config.data
        train, test = digits(data.test_samples, data.seed)
        return Data(train, {"digits": test})


register("maestro_digits", MaestroDigits, task=DigitsTask)
