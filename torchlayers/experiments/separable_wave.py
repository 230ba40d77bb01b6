"""Surrogates of a wave equation by convolutions of one-way filters: from some snapshots of a membrane to the next.

The problem of arXiv 2304.04964 on data of our own (:mod:`torchlayers.data.wave`). ``model.format`` is the comparison:
dense convolutions, their kernels as sums of products of one-way filters from the start of training on (``seq``, ``cp``,
``kernelwise``), or a tensorized Fourier operator (``tfno``). ``model.block`` above 1 forecasts so many snapshots at
once, by convolutions over time and space.

Where the medium is at rest in time, the wave equation is the same forwards and backwards, and ``u(t + s) + u(t - s)``
depends on ``u(t)`` alone. So the network gets the mirror image of the past and corrects ``2 u(t) - u(t - s)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_int, require
from ..data.wave import WaveDataset
from ..separable_conv import SeparableConv2d, SeparableConv3d
from ..tfno import TFNO
from ..training import Config, Data, DataConfig, Task, group, key, register
from ..training.plots import field_panels, new_figure
from ._timing import seconds

FORMATS = ("dense", "seq", "cp", "kernelwise", "tfno")


@dataclass
class Model:
    format: str = key("seq", "of the convolutions: dense, seq, cp or kernelwise; tfno for a Fourier operator instead")
    rank: int = key(8, "terms of a separable kernel (fewer where they would cost more than the dense layer)")
    block: int = key(1, "snapshots that are forecast at once; above 1 by convolutions over time and space")
    channels: int = key(16, "width")
    layers: int = key(3, "convolutions, or Fourier layers")
    kernel_size: int = key(5, "points a side of the kernels, odd; along time at most 2 block - 1")
    n_modes: int = key(16, "tfno: frequencies kept of each axis of space")
    tfno_rank: float = key(0.05, "tfno: parameters of its spectral weights per those of dense ones")

    def __post_init__(self) -> None:
        check_choice("model.format", self.format, FORMATS)
        for name in ("rank", "block", "channels", "layers", "kernel_size", "n_modes"):
            check_int(f"model.{name}", getattr(self, name))
        if self.kernel_size % 2 == 0:
            raise ValueError(f"model.kernel_size must be odd, got {self.kernel_size}")


@dataclass
class WaveData(DataConfig):
    batch_size: int = key(16, "windows in an optimizer step, over all ranks and micro-batches")
    trajectories: int = key(32, "to train on")
    val_trajectories: int = key(8, "by which rates are chosen")
    test_trajectories: int = key(8, "to test on")
    resolution: int = key(33, "points a side, walls included")
    snapshots: int = key(24, "of a trajectory")
    every: int = key(2, "time steps of the solver between snapshots")
    rollout: int = key(8, "snapshots over which the surrogate is fed its own forecasts when it is evaluated")
    seed: int = key(0, "of the trajectories, apart from the run's seed: runs compare on the same data")
    cache: str | None = key("runs/data", "folder that generated data are kept in; null for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.rollout", self.rollout)


@dataclass
class SeparableWave(Config):
    model: Model = group(Model)
    data: WaveData = group(WaveData)


class Surrogate(nn.Module):
    """Forecasts the next T snapshots of a wave from the last T + 1 and the speed.

    ``2 u(t) - u(t - s) + scale * network(u(t - s), u(t), speed)`` for s = 1, ..., T: the network sees the past mirrored
    at the present, on T × n × n points (n × n where T is 1), all in units of the training set's spread.

    Shape: x (B, T + 2, n, n), snapshots and after them the speed -> (B, T, n, n).
    """

    mean: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, block: int):
        super().__init__()
        self.network, self.block = network, block
        # Of the network's three channels, and of its output.
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("spread", torch.ones(3))
        self.register_buffer("scale", torch.ones(1))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the network gets, (B, 3, T, n, n) and not yet in units, and what it corrects, (B, T, n, n)."""
        past, now, speed = x[:, :-2].flip(1), x[:, -2:-1], x[:, -1:]
        return torch.stack([past, now.expand_as(past), speed.expand_as(past)], 1), 2 * now - past

    def forward(self, x: Tensor) -> Tensor:
        fields, mirrored = self.parts(x)
        channels = (-1, 1, 1, 1)
        fields = (fields - self.mean.view(channels)) / self.spread.view(channels)
        found = self.network(fields if self.block > 1 else fields.squeeze(2))
        return mirrored + self.scale * found.reshape(mirrored.shape)

    def rollout(self, x: Tensor, steps: int) -> Tensor:
        """``steps`` snapshots, (B, steps, n, n), of which each block is made from the forecasts before it."""
        waves, speed = x[:, :-1], x[:, -1:]
        known = waves.shape[1]
        while waves.shape[1] < known + steps:
            waves = torch.cat([waves, self(torch.cat([waves[:, -known:], speed], 1))], 1)
        return waves[:, known : known + steps]


def convolution(model: Model, inputs: int, outputs: int) -> nn.Module:
    """A convolution that keeps the size, of the format that ``model`` names."""
    k = model.kernel_size
    kernel = (k, k) if model.block == 1 else (min(k, 2 * model.block - 1), k, k)
    if model.format == "dense":
        return (nn.Conv2d if model.block == 1 else nn.Conv3d)(inputs, outputs, kernel, padding="same")  # type: ignore[arg-type]
    layer: Any = SeparableConv2d if model.block == 1 else SeparableConv3d

    def make(rank: int, **options: Any) -> Any:
        return layer(inputs, outputs, kernel, padding="same", rank=rank, format=model.format, **options)

    return make(min(model.rank, make(1, device="meta").break_even_rank))


def build_network(model: Model) -> nn.Module:
    """From three channels to one, on n × n or block × n × n points."""
    if model.format == "tfno":
        modes = [model.n_modes] * 2
        return TFNO(
            modes if model.block == 1 else [model.block, *modes],
            in_channels=3,
            out_channels=1,
            hidden_channels=model.channels,
            n_layers=model.layers,
            rank=model.tfno_rank,
            # Waves are reflected at the walls and do not come out on the other side.
            domain_padding=0.1 if model.block == 1 else [0.0, 0.1, 0.1],
        )
    layers: list[nn.Module] = []
    width = 3
    for _ in range(model.layers - 1):
        layers += [convolution(model, width, model.channels), nn.GELU()]
        width = model.channels
    return nn.Sequential(*layers, convolution(model, width, 1))


def relative_errors(prediction: Tensor, truth: Tensor, dims: tuple[int, ...] = (-2, -1)) -> Tensor:
    """‖prediction − truth‖ / ‖truth‖ over the axes ``dims``."""
    norm = torch.linalg.vector_norm
    return norm(prediction - truth, dim=dims) / norm(truth, dim=dims)


class WaveTask(Task):
    """Metrics of the test set, means over all windows.

    ``one_step``: relative L² error of the first snapshot that is forecast; ``rollout``: that of the last of
    ``data.rollout`` snapshots, forecast from forecasts; both for the validation set too, with ``val_`` before the name.
    What a batch costs: ``step_ms`` of a training step's two passes and ``predict_ms`` of a forecast, in processor time
    on a CPU, so that other programs do not count; ``saved_mib``, the memory that is held between the two passes.
    """

    config: SeparableWave

    def __init__(self, config: SeparableWave):
        super().__init__(config)
        self._costs: dict[str, float] | None = None

    def build_model(self) -> nn.Module:
        return Surrogate(build_network(self.config.model), self.config.model.block)

    def build_data(self) -> Data:
        data, block = self.config.data, self.config.model.block

        def windows(split: str, trajectories: int, horizon: int) -> WaveDataset:
            return WaveDataset(
                split,
                trajectories,
                data.seed,
                resolution=data.resolution,
                snapshots=data.snapshots,
                every=data.every,
                history=block + 1,
                horizon=horizon,
                cache=data.cache,
                progress=self.config.trainer.progress,
            )

        test = {"val": data.val_trajectories, "test": data.test_trajectories}
        return Data(
            windows("train", data.trajectories, block),
            {split: windows(split, number, data.rollout) for split, number in test.items()},
        )

    def prepare(self, model: nn.Module, data: Data) -> None:
        train: Any = data.train
        surrogate: Any = model
        x, y = (torch.stack(parts).double() for parts in zip(*(train[i] for i in range(len(train))), strict=True))
        fields, mirrored = surrogate.parts(x)
        surrogate.mean.copy_(fields.mean((0, 2, 3, 4)))
        surrogate.spread.copy_(fields.std((0, 2, 3, 4)))
        surrogate.scale.fill_((y - mirrored).std())

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        network: Any = model.network
        if isinstance(network, TFNO):
            return list(network.fno_blocks.convs)
        return [layer for layer in network if not isinstance(layer, nn.GELU)]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return relative_errors(model(x), y, (-3, -2, -1)).sum(), len(x)

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> dict[str, tuple[Tensor, float]]:
        x, y = batch
        surrogate: Any = model
        errors = relative_errors(surrogate.rollout(x, y.shape[1]), y).sum(0)
        prefix = "" if name == "test" else f"{name}_"
        found: dict[str, tuple[Tensor, float]] = {
            f"{prefix}one_step": (errors[0], len(x)),
            f"{prefix}rollout": (errors[-1], len(x)),
        }
        if name == "test":
            if self._costs is None:
                self._costs = self.costs(x, y[:, : self.config.model.block])
            found |= {metric: (torch.tensor(value), 1.0) for metric, value in self._costs.items()}
        return found

    def costs(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """What the batch costs a new model: weights do not matter, and no wrapper of the trained one is in the way."""
        model = self.build_model().to(x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        own = {p.untyped_storage().data_ptr() for p in parameters}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        def step() -> None:
            torch.autograd.grad(self.loss(model, (x, y))[0], parameters)

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
        with torch.enable_grad():
            step_ms = _milliseconds(step, x.device)
        predict_ms = _milliseconds(lambda: model(x), x.device)
        return {"step_ms": step_ms, "predict_ms": predict_ms, "saved_mib": sum(saved.values()) / 2**20}

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        surrogate: Any = model
        test: Any = data.test["test"]
        known, like = self.config.model.block + 1, surrogate.scale
        waves, speed = test.waves.to(like), test.speed.to(like)
        truth = waves[:, known:]
        prediction = surrogate.rollout(torch.cat([waves[:, :known], speed[:, None]], 1), truth.shape[1])
        errors = relative_errors(prediction, truth)
        shown = self.config.data.rollout - 1
        # x, the first axis, to the right, y upwards.
        rows = [
            (
                f"trajectory {i}\nrelative L² {errors[i, shown]:.3f}",
                *(fields.T for fields in (waves[i, known - 1], truth[i, shown], prediction[i, shown])),
            )
            for i in range(min(3, len(waves)))
        ]
        field_panels(
            rows,
            folder / "waves.png",
            title=f"Waves of the test set, {shown + 1} snapshots after the last known one (input)",
            quantity="displacement",
        )
        past, now = waves[:, known - 2, None], waves[:, known - 1, None]
        ahead = torch.arange(1, truth.shape[1] + 1, device=waves.device).view(1, -1, 1, 1)
        curves = {
            "surrogate": errors,
            "linear extrapolation": relative_errors(now + ahead * (now - past), truth),
            "last known snapshot": relative_errors(now.expand_as(truth), truth),
        }
        draw_rollout({name: values.mean(0).cpu() for name, values in curves.items()}, folder / "rollout.png")
        animate(truth[0].cpu(), prediction[0].cpu(), folder / "rollout.gif")


def _milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least of some calls' times: the processor's on a CPU, the clock's elsewhere."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return seconds(device)

    call()
    found = []
    for _ in range(repeats):
        start = now()
        call()
        found.append(now() - start)
    return 1e3 * min(found)


def draw_rollout(curves: dict[str, Tensor], path: Path) -> None:
    """Relative L² errors against the number of snapshots forecast from forecasts."""
    figure = new_figure(6.5, 4.2)
    ax = figure.subplots()
    for name, values in curves.items():
        ax.semilogy(range(1, len(values) + 1), values.float().numpy(), marker="o", markersize=3, label=name)
    ax.set(xlabel="snapshots ahead", ylabel="relative L² error", title="Rollout, mean over the test trajectories")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=130)


def animate(truth: Tensor, prediction: Tensor, path: Path) -> None:
    """A GIF of truth, prediction and their difference, (steps, n, n) each, on one scale of colours."""
    writer = require("matplotlib.animation", extra="train").PillowWriter(fps=6)
    panels = {"truth": truth, "prediction": prediction, "prediction − truth": prediction - truth}
    top = float(truth.abs().max())
    figure = new_figure(9.0, 3.2)
    images = []
    for ax, name in zip(figure.subplots(1, 3), panels, strict=True):
        # x, the first axis, to the right, y upwards.
        style: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -top, "vmax": top}
        blank = torch.zeros(truth.shape[1:]).numpy()
        images.append(ax.imshow(blank, origin="lower", extent=(0, 1, 0, 1), **style))
        ax.set(xticks=(0, 1), yticks=(0, 1), title=name)
    figure.colorbar(images[-1], ax=figure.axes, shrink=0.8, label="displacement")
    with writer.saving(figure, str(path), dpi=80):
        for step in range(len(truth)):
            for image, values in zip(images, panels.values(), strict=True):
                image.set_data(values[step].T.float().numpy())
            figure.suptitle(f"{step + 1} snapshots after the last known one")
            writer.grab_frame()


register("separable_wave", SeparableWave, task=WaveTask)
