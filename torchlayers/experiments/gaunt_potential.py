"""An interatomic potential of Gaunt products beside the same architecture of e3nn's Clebsch–Gordan products.

Trained on energies and forces of a hot alloy under ASE's effective medium theory, of which the last part of each
trajectory is kept for the test; or on 3BPA or OC20 from a local folder. Reported are errors of forces and energies, the
processor time of a training step, and how far the energy drifts in molecular dynamics with the trained model.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_int, require
from ..data import atoms as atomic_data
from ..data.atoms import Frames
from ..gaunt.potential import GauntPotential, neighbor_list, reference_energies
from ..training import Config, Data, DataConfig, Task, group, key, register
from ..training.plots import new_figure
from ..training.task import Sums
from ._timing import seconds

# Frames that the constants of the model are taken from.
_STATISTICS = 1000


@dataclass
class Model:
    product: str = key("gaunt", "gaunt, or oracle: e3nn's Clebsch–Gordan products with a free weight for each path")
    species: list[str] = key(["Cu", "Au"], "elements; those of the data, which the EMT alloy is made of")
    cutoff: float = key(4.5, "of the neighbours, in Å")
    lmax: int = key(2, "highest degree of features and filters")
    channels: int = key(16, "of each irrep")
    num_layers: int = key(2, "rounds of messages")
    correlation: int = key(3, "highest power of a message")
    antisymmetric: bool = key(False, "also paths of odd l1 + l2 + l3, and features of both parities")
    radial_hidden: list[int] = key([32, 32], "widths of the radial networks")

    def __post_init__(self) -> None:
        check_choice("model.product", self.product, ("gaunt", "oracle"))
        for name in ("channels", "num_layers", "correlation"):
            check_int(f"model.{name}", getattr(self, name))


@dataclass
class AtomsData(DataConfig):
    batch_size: int = key(4, "frames in an optimizer step, over all ranks and micro-batches")
    source: str = key("emt", "emt (generated here), 3bpa or oc20")
    root: str | None = key(None, "folder with the files of 3bpa; for oc20 with a folder for each split")
    train_split: str = key("train_300K", "of 3bpa or oc20")
    test_splits: list[str] = key(["test_300K", "test_600K", "test_1200K"], "of 3bpa or oc20")
    trajectories: int = key(4, "of emt: random alloys")
    frames: int = key(40, "of emt: frames of each trajectory, 20 fs apart")
    test_fraction: float = key(0.25, "of emt: the last part of each trajectory that is for the test")
    repeat: int = key(2, "of emt: cubic cells a side, 4 atoms in each")
    temperature: float = key(800.0, "of emt, in K")
    equilibration: int = key(100, "of emt: steps of 2 fs before the first frame")
    seed: int = key(0, "of emt, apart from the run's seed: runs compare on the same data")
    cache: str | None = key("runs/data", "folder that generated data are kept in; null for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.source", self.source, ("emt", "3bpa", "oc20"))
        check_int("data.seed", self.seed, minimum=0)
        if self.source != "emt" and self.root is None:
            raise ValueError(f"data.root must name a folder for data.source={self.source}, got null")


@dataclass
class Dynamics:
    steps: int = key(500, "steps of molecular dynamics with the trained model; 0 for none")
    timestep: float = key(2.0, "in fs")
    temperature: float = key(300.0, "of the velocities at the start, in K")

    def __post_init__(self) -> None:
        check_int("dynamics.steps", self.steps, minimum=0)


@dataclass
class GauntPotentialConfig(Config):
    model: Model = group(Model)
    data: AtomsData = group(AtomsData)
    dynamics: Dynamics = group(Dynamics)
    energy_weight: float = key(100.0, "of the squared error of the energy per atom, against that of a force component")


class PotentialTask(Task):
    config: GauntPotentialConfig

    def __init__(self, config: GauntPotentialConfig):
        super().__init__(config)
        numbers = require("ase.data", extra="atoms").atomic_numbers
        unknown = [s for s in config.model.species if s not in numbers]
        if unknown:
            raise ValueError(f"model.species must be chemical symbols, got {unknown}")
        self.species = [numbers[s] for s in config.model.species]
        self.trace: dict[str, list[float]] | None = None
        self._clock: list[float] = []

    def build_model(self) -> nn.Module:
        model = self.config.model
        return GauntPotential(
            self.species,
            model.cutoff,
            model.lmax,
            model.channels,
            model.num_layers,
            correlation=model.correlation,
            antisymmetric=model.antisymmetric,
            product=model.product,
            radial_hidden=model.radial_hidden,
        )

    def build_data(self) -> Data:
        data = self.config.data
        tests: dict[str, Any]
        if data.source == "emt":
            frames = atomic_data.generate(
                data.trajectories,
                data.frames,
                symbols=self.config.model.species,
                repeat=data.repeat,
                temperature=data.temperature,
                equilibration=data.equilibration,
                seed=data.seed,
                cache=data.cache,
            )
            train, test = frames.split_in_time(data.test_fraction)
            tests = {"emt": test}
        elif data.source == "3bpa":
            isolated = atomic_data.isolated_energies(str(data.root))
            splits = [_without(atomic_data.load_3bpa(str(data.root), s), isolated) for s in self._splits()]
            train, tests = splits[0], dict(zip(data.test_splits, splits[1:], strict=True))
        else:
            sets = [atomic_data.load_oc20(Path(str(data.root)) / s) for s in self._splits()]
            train, tests = sets[0], dict(zip(data.test_splits, sets[1:], strict=True))  # type: ignore[assignment]
        if self.config.dynamics.steps:
            tests["nve"] = Frames([next(iter(tests.values()))[0]])
        return Data(train, tests)

    def _splits(self) -> list[str]:
        return [self.config.data.train_split, *self.config.data.test_splits]

    def prepare(self, model: nn.Module, data: Data) -> None:
        frames = [data.train[i] for i in range(min(len(data.train), _STATISTICS))]  # type: ignore[arg-type]
        forces = torch.cat([f.forces for f in frames])
        edges = sum(neighbor_list(f.pos, self.config.model.cutoff, cell=f.cell, pbc=f.pbc)[0].shape[1] for f in frames)
        model.set_statistics(  # type: ignore[operator]
            reference_energies(frames, self.species),
            forces.square().mean().sqrt(),
            max(1.0, edges / len(forces)),
        )
        self.scale = float(model.energy_scale)  # type: ignore[arg-type]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        self._clock.append(seconds(batch.pos.device))
        found = model(batch)
        count = torch.bincount(batch.batch, minlength=batch.num_graphs)
        energy = ((found["energy"] - batch.energy) / count / self.scale).square()
        force = ((found["forces"] - batch.forces) / self.scale).square().mean(1)
        force = torch.zeros_like(energy).index_add(0, batch.batch, force) / count
        return (self.config.energy_weight * energy + force).sum(), batch.num_graphs

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> dict[str, Sums]:
        if name == "nve":
            self.trace = dynamics(model, batch, self.config.dynamics, self.config.data.seed)
            drift = abs(_slope(self.trace["time"], self.trace["total"]))
            return {"nve_drift_mev": (torch.tensor(drift), 1)}
        found = model(batch)
        count = torch.bincount(batch.batch, minlength=batch.num_graphs)
        force = 1000 * (found["forces"] - batch.forces).abs().sum(), 3 * len(batch.z)
        energy = 1000 * ((found["energy"] - batch.energy).abs() / count).sum(), batch.num_graphs
        metrics: dict[str, Sums] = {"force_mae_mev": force, "energy_mae_mev": energy}
        if self.config.data.source != "emt":
            metrics |= {f"{metric}_{name}": value for metric, value in metrics.items()}
        if len(self._clock) > 2:
            steps = [1000 * (b - a) for a, b in zip(self._clock, self._clock[1:], strict=False)]
            metrics["ms_per_step"] = torch.tensor(statistics.median(steps)), 1
        return metrics

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        device = next(model.parameters()).device
        figure = new_figure(9.0, 4.5)
        axes = figure.subplots(1, 2)
        for name, dataset in data.test.items():
            if name == "nve":
                continue
            frames = [dataset[i] for i in range(min(len(dataset), 200))]  # type: ignore[arg-type]
            pairs = [_compared(model, frames[i : i + 8], device) for i in range(0, len(frames), 8)]
            for ax, quantity in zip(axes, zip(*pairs, strict=True), strict=True):
                truth, prediction = (torch.cat(part) for part in zip(*quantity, strict=True))
                mean = float(truth.mean()) if ax is axes[0] else 0.0
                ax.plot(truth - mean, prediction - mean, ".", markersize=3, alpha=0.5, label=name)
        for ax, what in zip(
            axes, ("energy, meV an atom, from the test set's mean", "force component, meV/Å"), strict=True
        ):
            low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
            ax.plot((low, high), (low, high), color="black", linewidth=0.8)
            ax.set(title=what, xlabel="truth", ylabel="prediction", aspect="equal")
            ax.locator_params(nbins=6)
            ax.grid(alpha=0.3)
        axes[0].legend(frameon=False)
        figure.suptitle(f"Test frames, {self.config.model.product} products")
        figure.savefig(folder / "parity.png", dpi=130)
        if "nve" not in data.test:
            return
        if self.trace is None:  # evaluated on another rank
            batch = Frames.collate([data.test["nve"][0]]).to(device)
            self.trace = dynamics(model, batch, self.config.dynamics, self.config.data.seed)
        figure = new_figure(7.0, 6.0)
        upper, lower = figure.subplots(2, 1, sharex=True)
        for part, ax in (("potential", upper), ("kinetic", upper), ("total", upper), ("total", lower)):
            values = torch.tensor(self.trace[part], dtype=torch.float64)
            ax.plot(self.trace["time"], values - values[0], label=part, color="black" if part == "total" else None)
        drift = _slope(self.trace["time"], self.trace["total"])
        upper.set_title(f"Dynamics at constant energy, {self.config.model.product} products")
        lower.set_title(f"total energy alone: drift {drift:.3g} meV an atom and ps", fontsize=10)
        lower.set_xlabel("time, ps")
        upper.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for ax in (upper, lower):
            ax.set_ylabel("meV an atom, from the start")
            ax.grid(alpha=0.3)
        figure.savefig(folder / "energy_conservation.png", dpi=130)


def _without(frames: Frames, isolated: Mapping[int, float]) -> Frames:
    """``frames`` with binding energies: total energies of all electrons have too few digits to spare for float32."""
    for frame in frames:
        frame.energy = frame.energy - sum(isolated[int(z)] for z in frame.z)
    return frames


def _compared(
    model: nn.Module, frames: Sequence[Any], device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Energies per atom and force components, each as truth and prediction, in meV and meV/Å."""
    batch = Frames.collate(frames).to(device)
    found, count = model(batch), torch.bincount(batch.batch)
    energy = (1000 * batch.energy / count).cpu(), (1000 * found["energy"] / count).cpu()
    return energy, ((1000 * batch.forces).flatten().cpu(), (1000 * found["forces"]).flatten().cpu())


def dynamics(model: nn.Module, frame: Any, config: Dynamics, seed: int) -> dict[str, list[float]]:
    """Molecular dynamics at constant energy (velocity Verlet by ASE) from ``frame``, with the model's forces.

    Returns:
        ``time`` in ps, and ``total``, ``potential`` and ``kinetic`` energy in meV an atom.
    """
    from ..gaunt.calculator import GauntCalculator

    ase, units = require("ase", extra="atoms"), require("ase.units", extra="atoms")
    random = require("numpy", extra="data").random.default_rng(seed)
    frame = frame.cpu()
    atoms = ase.Atoms(frame.z.numpy(), frame.pos.numpy(), cell=frame.cell[0].numpy(), pbc=frame.pbc[0].numpy())
    momenta = (
        random.standard_normal((len(atoms), 3)) * (config.temperature * units.kB * atoms.get_masses()[:, None]) ** 0.5
    )
    atoms.set_momenta(momenta - momenta.mean(0))
    atoms.calc = GauntCalculator(model)
    verlet = require("ase.md.verlet", extra="atoms").VelocityVerlet(atoms, config.timestep * units.fs)
    trace: dict[str, list[float]] = {"time": [], "total": [], "potential": [], "kinetic": []}
    for step, _ in enumerate(islice(verlet.irun(config.steps), config.steps + 1)):
        energies = {"potential": atoms.get_potential_energy(), "kinetic": atoms.get_kinetic_energy()}
        trace["time"].append(step * config.timestep / 1000)
        for name, value in (energies | {"total": sum(energies.values())}).items():
            trace[name].append(1000 * float(value) / len(atoms))
    return trace


def _slope(time: Sequence[float], value: Sequence[float]) -> float:
    """Of the straight line that fits best."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (time, value))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


register("gaunt_potential", GauntPotentialConfig, task=PotentialTask)
