"""A tensorized Fourier neural operator on Burgers' equation: from a velocity on a circle to a later one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_int
from ..data import burgers
from ..tfno import TFNO, H1Loss, LpLoss
from ..training import Config, Data, DataConfig, Task, TensorSet, key, register
from ..training.plots import new_figure


@dataclass
class Model:
    factorization: str = key("tucker", "of the spectral weights: dense, cp, tucker or tt")
    rank: float = key(0.1, "parameters of the factorized weights per those of the dense ones")
    joint_factorization: bool = key(False, "one factorized tensor for all layers (not for dense)")
    n_modes: int = key(24, "frequencies kept")
    hidden_channels: int = key(24, "width")
    n_layers: int = key(4, "Fourier layers")

    def __post_init__(self) -> None:
        check_choice("model.factorization", self.factorization, ("dense", "cp", "tucker", "tt"))


@dataclass
class BurgersData(DataConfig):
    resolution: int = key(64, "points of the training samples")
    test_resolutions: list[int] = field(
        default_factory=lambda: [64, 128], metadata={"help": "points of the test sets, which hold the same flows"}
    )
    train_samples: int = key(400, "training samples")
    test_samples: int = key(100, "test samples")
    viscosity: float = key(0.01, "viscosity, for a circle of length 1")
    time: float = key(1.0, "between input and output")
    dt: float = key(2e-3, "time step of the solver")
    seed: int = key(0, "of the flows, apart from the run's seed: runs compare on the same data")
    cache: str | None = key("runs/data", "folder that generated data are kept in; null for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.seed", self.seed, minimum=0)


@dataclass
class TFNOBurgers(Config):
    model: Model = field(default_factory=Model)
    data: BurgersData = field(default_factory=BurgersData)
    loss: str = key("l2", "training loss: h1 or l2, relative")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, ("h1", "l2"))


class BurgersTask(Task):
    config: TFNOBurgers

    def __init__(self, config: TFNOBurgers):
        super().__init__(config)
        self.l2 = LpLoss(d=1, reduction="sum")
        self.training_loss = H1Loss(d=1, reduction="sum") if config.loss == "h1" else self.l2

    def build_model(self) -> nn.Module:
        model = self.config.model
        dense = model.factorization == "dense"
        return TFNO(
            [model.n_modes],
            in_channels=1,
            out_channels=1,
            hidden_channels=model.hidden_channels,
            n_layers=model.n_layers,
            factorization=None if dense else model.factorization,
            rank=model.rank,
            joint_factorization=model.joint_factorization and not dense,
            # The equation is the same everywhere on the circle.
            positional_embedding=None,
        )

    def build_data(self) -> Data:
        data = self.config.data

        def flows(count: int, resolution: int, stream: int) -> TensorSet:
            x, y = burgers.generate(
                count,
                resolution,
                viscosity=data.viscosity,
                time=data.time,
                dt=data.dt,
                seed=2 * data.seed + stream,
                cache=data.cache,
                progress=self.config.trainer.progress,
            )
            return TensorSet(x, y)

        test = {str(n): flows(data.test_samples, n, 1) for n in data.test_resolutions}
        return Data(flows(data.train_samples, data.resolution, 0), test)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.fno_blocks.convs)  # type: ignore[union-attr,arg-type]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return self.training_loss(model(x), y), len(x)

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> dict[str, tuple[Tensor, int]]:
        x, y = batch
        return {f"l2_{name}": (self.l2(model(x), y), len(x))}

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        like = next(p for p in model.parameters() if p.is_floating_point())
        for name, dataset in data.test.items():
            x, y = (t[:6] for t in dataset.tensors)  # type: ignore[attr-defined]
            prediction = model(x.to(like)).to(y)
            figure = new_figure(11.0, 6.5)
            trained = self.config.data.resolution
            zero_shot = "" if int(name) == trained else f", trained at {trained} only"
            figure.suptitle(f"Burgers' equation, test samples at {name} points{zero_shot}")
            position = torch.arange(int(name)) / int(name)
            axes = figure.subplots(2, 3, sharex=True).flat
            for i, ax in enumerate(axes):
                if i >= len(x):
                    ax.set_axis_off()
                    continue
                error = float(self.l2(prediction[i : i + 1], y[i : i + 1]))
                ax.plot(position, x[i, 0], color="0.7", label="input")
                ax.plot(position, y[i, 0], color="tab:blue", linewidth=3, alpha=0.5, label="truth")
                ax.plot(position, prediction[i, 0], color="tab:red", linewidth=1, label="prediction")
                ax.set_title(f"sample {i}, relative L² {error:.3f}", fontsize="medium")
                ax.grid(alpha=0.3)
                if i >= 3:
                    ax.set_xlabel("x")
                if i % 3 == 0:
                    ax.set_ylabel("velocity")
                if i == 0:
                    ax.legend(frameon=False, fontsize="small")
            figure.savefig(folder / f"burgers_{name}.png", dpi=120)


register("tfno_burgers", TFNOBurgers, task=BurgersTask)
