"""Multi-grid tensorized Fourier neural operators on two-dimensional turbulence: from a vorticity to a later one.

One config, three switches, and with them the comparison of arXiv 2310.00120: ``model.factorization`` (dense: FNO; else
TFNO, of one joint tensor), ``model.levels`` (0: the whole field; 1 and more: patches that carry a halo and coarse views
of their surroundings, MG-TFNO), and ``model.context`` (false: the same patches with the coarse views zeroed, the
ablation). Patches are stitched before the loss, in training too; under a mesh with ``mesh.mp`` above 1 the ranks of an
mp group share a field's patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_int
from ..data import navier_stokes
from ..tfno import TFNO, H1Loss, LpLoss
from ..tfno.parallel import MultiGridParallel
from ..tfno.patching import MultiGridPatching
from ..training import Config, ConfigError, Context, Data, DataConfig, Task, TensorSet, key, register
from ..training.plots import new_figure

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Model:
    factorization: str = key("tucker", "of the spectral weights: dense, cp, tucker or tt")
    rank: float = key(0.2, "parameters of the factorized spectral weights per those of the dense ones")
    joint_factorization: bool = key(True, "one factorized tensor for all layers (not for dense)")
    levels: int = key(1, "coarse levels of the multi-grid patches; 0 for the whole field, without patches")
    padding: int = key(4, "halo of a patch in pixels (not for levels=0)")
    context: bool = key(True, "false: the coarse views are zeroed")
    n_modes: list[int] = field(
        default_factory=lambda: [12, 12], metadata={"help": "frequencies kept of each axis (of a patch)"}
    )
    hidden_channels: int = key(16, "width")
    n_layers: int = key(4, "Fourier layers")

    def __post_init__(self) -> None:
        check_choice("model.factorization", self.factorization, ("dense", "cp", "tucker", "tt"))
        check_int("model.levels", self.levels, minimum=0)
        if not (self.levels or self.context):
            raise ValueError("model.context=false needs patches, got model.levels=0")


@dataclass
class FlowData(DataConfig):
    resolution: int = key(32, "points a side")
    train_samples: int = key(256, "training samples")
    test_samples: int = key(64, "test samples")
    reynolds: float = key(200.0, "1 / viscosity, for a torus of side 2π")
    time: float = key(3.0, "between input and output")
    dt: float = key(0.05, "time step of the solver")
    solve_resolution: int | None = key(None, "points a side of the solver's grid (twice the resolution by default)")
    seed: int = key(0, "of the flows, apart from the run's seed: runs compare on the same data")
    cache: str | None = key("runs/data", "folder that generated data are kept in; null for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.seed", self.seed, minimum=0)


@dataclass
class MGTFNONavierStokes(Config):
    model: Model = field(default_factory=Model)
    data: FlowData = field(default_factory=FlowData)
    loss: str = key("h1", "training loss: h1 or l2, relative")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, ("h1", "l2"))


class WithoutContext(nn.Module):
    """A network on patches that is shown their finest level alone: the coarse views, its other inputs, are zero."""

    def __init__(self, network: nn.Module, channels: int):
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, x: Tensor) -> Tensor:
        return self.network(torch.cat([x[:, : self.channels], torch.zeros_like(x[:, self.channels :])], 1))


class PatchwiseOperator(nn.Module):
    """``network`` on the patches of a field, stitched, in units of the training set's spread.

    Shape: x (B, 1, n, n) -> (B, 1, n, n), the vorticity before and after.
    """

    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, network: nn.Module, patching: MultiGridPatching):
        super().__init__()
        self.network, self.patching = network, patching
        self._parallel: list[MultiGridParallel] = []
        self.register_buffer("input_scale", torch.ones(1))
        self.register_buffer("output_scale", torch.ones(1))

    def share_patches(self, mesh: DeviceMesh) -> None:
        """Give this rank its part of each field's patches. The trainer averages the gradients."""
        # In a list, so that it is no child: its parameters are the network's.
        self._parallel = [MultiGridParallel(self.network, self.patching, mesh, reduces_gradients=False)]

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.input_scale
        if self._parallel:
            y = self._parallel[0](x)
        else:
            y = self.patching.unpatch(self.network(self.patching.patch(x)))
        return y * self.output_scale


class FlowTask(Task):
    config: MGTFNONavierStokes

    def __init__(self, config: MGTFNONavierStokes, mesh: DeviceMesh | None = None):
        super().__init__(config)
        self.mesh = mesh
        h1 = H1Loss(d=2, reduction="sum")
        self.metrics = {"l2": LpLoss(d=2, reduction="sum"), "h1": h1}

    def patching(self) -> MultiGridPatching:
        model = self.config.model
        if model.levels == 0:
            return MultiGridPatching(0)
        # The forcing is fixed in space, so a patch must know where it lies.
        return MultiGridPatching(model.levels, padding=model.padding, append_coords=True)

    def build_model(self) -> nn.Module:
        model = self.config.model
        patching = self.patching()
        dense = model.factorization == "dense"
        joint = model.joint_factorization and not dense
        network: nn.Module = TFNO(
            model.n_modes,
            in_channels=patching.channels(1),
            out_channels=1,
            hidden_channels=model.hidden_channels,
            n_layers=model.n_layers,
            factorization=None if dense else model.factorization,
            rank=model.rank,
            joint_factorization=joint,
            # The layers of a Tucker tensor stay apart, however small the rank: only what they hold is compressed.
            fixed_rank_modes=[0] if joint and model.factorization == "tucker" else False,
        )
        if not model.context:
            network = WithoutContext(network, patching.channels(1) // (model.levels + 1))
        return PatchwiseOperator(network, patching)

    def build_data(self) -> Data:
        data, cuda = self.config.data, torch.cuda.is_available() and self.config.trainer.device != "cpu"
        # A field that cannot be cut is an error before it is made.
        self.patching().patch(torch.empty(0, 1, data.resolution, data.resolution))

        def flows(count: int, stream: int) -> TensorSet:
            x, y = navier_stokes.generate(
                count,
                data.resolution,
                reynolds=data.reynolds,
                time=data.time,
                dt=data.dt,
                seed=2 * data.seed + stream,
                solve_resolution=data.solve_resolution,
                cache=data.cache,
                progress=self.config.trainer.progress,
                device="cuda" if cuda else "cpu",
            )
            return TensorSet(x, y)

        return Data(flows(data.train_samples, 0), {"flows": flows(data.test_samples, 1)})

    def prepare(self, model: nn.Module, data: Data) -> None:
        x, y = data.train.tensors  # type: ignore[attr-defined]
        model.input_scale.fill_(float(x.double().std()))  # type: ignore[operator]
        model.output_scale.fill_(float(y.double().std()))  # type: ignore[operator]
        if self.mesh is not None and self.mesh["mp"].size() > 1:
            try:
                model.share_patches(self.mesh)  # type: ignore[operator]
            except ValueError as error:
                raise ConfigError(f"mesh.mp={self.mesh['mp'].size()} cannot share the patches: {error}") from error

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [m for name, m in model.named_modules() if name.rpartition(".")[0].endswith("fno_blocks.convs")]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return self.metrics[self.config.loss](model(x), y), len(x)

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> dict[str, tuple[Tensor, int]]:
        x, y = batch
        prediction = model(x)
        return {metric: (loss(prediction, y), len(x)) for metric, loss in self.metrics.items()}

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        x, y = data.test["flows"].tensors  # type: ignore[attr-defined]
        like = next(p for p in model.parameters() if p.is_floating_point())
        prediction = torch.cat([model(part.to(like)).to(y) for part in x.split(self.config.data.batch_size)])
        error = LpLoss(d=2, reduction="none")(prediction, y)
        rows = [
            (f"sample {i}\nrelative L² {error[i]:.3f}", x[i, 0], y[i, 0], prediction[i, 0])
            for i in range(min(3, len(x)))
        ]
        time = self.config.data.time
        draw_vorticity(
            rows, folder / "vorticity.png", title=f"Vorticity of test samples, input and after time {time:g}"
        )
        draw_spectra(
            {"input": x[:, 0], "truth": y[:, 0], "prediction": prediction[:, 0], "error": (prediction - y)[:, 0]},
            folder / "spectra.png",
        )


def draw_vorticity(rows: Sequence[tuple[str, Tensor, Tensor, Tensor]], path: Path, *, title: str) -> None:
    """A row a sample (label, input, truth, prediction) and the error, on one scale of colours, symmetric about 0."""
    top = max(float(values.abs().max()) for _, *fields in rows for values in fields)
    figure = new_figure(12.0, 2.55 * len(rows) + 0.5)
    figure.suptitle(title)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    image = None
    for line, (label, given, truth, prediction) in zip(axes, rows, strict=True):
        panels = {"input": given, "truth": truth, "prediction": prediction, "prediction − truth": prediction - truth}
        for ax, (name, values) in zip(line, panels.items(), strict=True):
            # x, the first axis, to the right, y upwards.
            image = ax.imshow(values.T.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r", vmin=-top, vmax=top)
            ax.set(xticks=(0, 1), yticks=(0, 1))
            if ax in axes[0]:
                ax.set_title(name)
        line[0].set_ylabel(label)
    figure.colorbar(image, ax=axes, shrink=0.7, label="vorticity")
    figure.savefig(path, dpi=110)


def draw_spectra(fields: dict[str, Tensor], path: Path) -> None:
    """Energy and enstrophy by wavenumber, means over the samples of fields (samples, n, n)."""
    figure = new_figure(10.0, 4.2)
    figure.suptitle("Spectra, means over the test samples")
    for place, (ax, quantity) in enumerate(zip(figure.subplots(1, 2), ("energy", "enstrophy"), strict=True)):
        top = 0.0
        for number, (name, values) in enumerate(fields.items()):
            k, *both = navier_stokes.spectra(values.double())
            mean = both[place].mean(0)[1:]
            top = max(top, float(mean.max()))
            style = {"input": ":", "error": "--"}.get(name, "-")
            ax.loglog(k[1:], mean, style, color=f"C{number}", label=name)
        ax.set_ylim(1e-9 * top, 3 * top)  # what float32 can tell apart
        ax.set(xlabel="wavenumber |k|", ylabel=f"{quantity} in a shell of width 1", title=quantity.capitalize())
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    figure.savefig(path, dpi=130)


@register("mg_tfno_navier_stokes", MGTFNONavierStokes, task=FlowTask)
def run(context: Context) -> dict[str, float]:
    return context.fit(FlowTask(context.config, context.mesh))
