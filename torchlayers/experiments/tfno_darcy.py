"""A tensorized Fourier neural operator on Darcy flow: from the medium of a porous square to the pressure in it.

Trained on neuraloperator's published 16 × 16 samples, tested on others at 16 × 16 and, without training there, at
32 × 32 (arXiv 2310.00120: a low-rank operator generalises better than a dense one where data is scarce).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice
from ..data import darcy
from ..tfno import TFNO, H1Loss, LpLoss
from ..training import Config, Data, DataConfig, Task, TensorSet, group, key, register
from ..training.plots import field_panels


@dataclass
class Model:
    factorization: str = key("tucker", "of the spectral weights: dense, cp, tucker or tt")
    rank: float = key(0.1, "parameters of the factorized weights per those of the dense ones")
    joint_factorization: bool = key(False, "one factorized tensor for all layers")
    n_modes: list[int] = key([16, 16], "frequencies kept of each axis")
    hidden_channels: int = key(32, "width")
    n_layers: int = key(4, "Fourier layers")
    domain_padding: float = key(0.0, "zero padding of each end of each axis, as a fraction of its size")

    def __post_init__(self) -> None:
        check_choice("model.factorization", self.factorization, ("dense", "cp", "tucker", "tt"))


@dataclass
class DarcyData(DataConfig):
    resolution: int = key(16, "points a side of the training samples")
    test_resolutions: list[int] = key([16, 32], "points a side of the test sets")
    root: str | None = key(None, "folder with neuraloperator's own downloads, for other resolutions")
    samples: int | None = key(None, "training samples to use (all by default)")
    transposed: bool = key(True, "train on each sample's transpose too: both axes are alike in this problem")


@dataclass
class TFNODarcy(Config):
    model: Model = group(Model)
    data: DarcyData = group(DarcyData)
    loss: str = key("h1", "training loss: h1 or l2, relative to the standardised solution")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, ("h1", "l2"))


class StandardizedOutput(nn.Module):
    """``network(x) * std + mean``: the network works in units of the training set's spread, its user in physical ones.

    Shape: x (B, 1, n, n), the phase of the medium -> (B, 1, n, n), the solution.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * self.std + self.mean


class DarcyTask(Task):
    config: TFNODarcy

    def __init__(self, config: TFNODarcy):
        super().__init__(config)
        # The grid leaves out the far wall, one spacing beyond its last point, where the pressure is 0 as it is at index
        # 0: differences that wrap around find the right neighbour.
        h1 = H1Loss(d=2, periodic=True, reduction="sum")
        self.training_loss = h1 if config.loss == "h1" else LpLoss(d=2, reduction="sum")
        self.l2 = LpLoss(d=2, reduction="sum")

    def build_model(self) -> nn.Module:
        model = self.config.model
        network = TFNO(
            model.n_modes,
            in_channels=1,
            out_channels=1,
            hidden_channels=model.hidden_channels,
            n_layers=model.n_layers,
            factorization=None if model.factorization == "dense" else model.factorization,
            rank=model.rank,
            joint_factorization=model.joint_factorization,
            domain_padding=model.domain_padding or None,
        )
        return StandardizedOutput(network)

    def build_data(self) -> Data:
        data = self.config.data
        x, y = (t[: data.samples] for t in darcy.load("train", data.resolution, root=data.root))
        if data.transposed:
            x, y = (torch.cat([t, t.mT]) for t in (x, y))
        test = {str(n): TensorSet(*darcy.load("test", n, root=data.root)) for n in data.test_resolutions}
        return Data(TensorSet(x, y), test)

    def prepare(self, model: nn.Module, data: Data) -> None:
        y = data.train.tensors[1].double()  # type: ignore[attr-defined]
        self.mean, self.std = float(y.mean()), float(y.std())
        model.mean.fill_(self.mean)  # type: ignore[operator]
        model.std.fill_(self.std)  # type: ignore[operator]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.network.fno_blocks.convs)  # type: ignore[union-attr,arg-type]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return self.training_loss((model(x) - self.mean) / self.std, (y - self.mean) / self.std), len(x)

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> dict[str, tuple[Tensor, int]]:
        x, y = batch
        return {f"l2_{name}": (self.l2(model(x), y), len(x))}

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        device = next(model.parameters()).device
        for name, dataset in data.test.items():
            x, y = (t[:3].to(device) for t in dataset.tensors)  # type: ignore[attr-defined]
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            prediction = model(x.to(dtype))
            rows = []
            for i in range(len(x)):
                error = float(self.l2(prediction[i : i + 1], y[i : i + 1].to(dtype)))
                rows.append((f"sample {i}\nrelative L² {error:.3f}", x[i, 0], y[i, 0], prediction[i, 0]))
            trained = self.config.data.resolution
            zero_shot = "" if int(name) == trained else f", trained at {trained} × {trained} only"
            field_panels(
                rows,
                folder / f"darcy_{name}.png",
                title=f"Darcy flow, test samples at {name} × {name}{zero_shot}",
                quantity="pressure",
            )


register("tfno_darcy", TFNODarcy, task=DarcyTask)
