"""What experiments on molecules share: PPGN and message passing on PyG batches, polynomial features, baselines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_int, require
from ..data.atoms import Frames
from ..polynomial import PPGN, AddPolynomialFeatures, PairBatch, Pattern, enumerate_patterns
from ..training import Config, Data, DataConfig, Task, group, key
from ..training.plots import new_figure
from ..training.task import Sums

__all__ = ["GINE", "Features", "Model", "MoleculesConfig", "MoleculesTask", "ridge", "totals"]


@dataclass
class Model:
    name: str = key("ppgn++", "ppgn++, ppgn, or gine: message passing with features of edges")
    hidden: int = key(32, "channels")
    num_layers: int = key(3, "blocks, or rounds of messages")
    scale: str = key("sqrt_n", "of the matrix product of ppgn: none, sqrt_n or n")
    pool: str = key("mean", "of ppgn's readout: mean, max or add")
    readout: str = key("last", "of ppgn: of the last block, or the sum of all blocks' (jk_sum)")

    def __post_init__(self) -> None:
        check_choice("model.name", self.name, ("ppgn++", "ppgn", "gine"))
        check_int("model.hidden", self.hidden)
        check_int("model.num_layers", self.num_layers)


@dataclass
class Features:
    kind: str = key("none", "none, missing (what the model's bank cannot compute), or cycles through nodes and edges")
    degree: int = key(6, "largest degree: of the missing ones, or longest cycle")

    def __post_init__(self) -> None:
        check_choice("features.kind", self.kind, ("none", "missing", "cycles"))
        check_int("features.degree", self.degree, minimum=3)

    def patterns(self, model: str) -> list[Pattern]:
        """Patterns of nodes and of pairs; those of graphs are sums of these, which any readout makes."""
        if self.kind == "none":
            return []
        if self.kind == "cycles":
            nodes = [Pattern.cycle(k, outputs=(0,)) for k in range(3, self.degree + 1)]
            # The pair along one edge of the cycle: on edges the number of cycles through them.
            return nodes + [Pattern.cycle(k, outputs=(0, 1)) for k in range(3, self.degree + 1)]
        # Message passing has no values on pairs that are no edges, and those on edges are many.
        orders = (1,) if model == "gine" else (1, 2)
        return [
            pattern
            for order in orders
            for degree in range(1, self.degree + 1)
            for pattern in enumerate_patterns(degree, order, exclude=model)
        ]

    def transform(self, model: str) -> AddPolynomialFeatures | None:
        """Logarithms of the counts, appended to what the model takes."""
        patterns = self.patterns(model)
        if not patterns:
            return None
        edges: Any = None if model == "gine" else False
        pairs: Any = False if model == "gine" else "poly_pair"
        return AddPolynomialFeatures(
            patterns, node_attr=None, edge_attr=edges, pair_attr=pairs, graph_attr=False, normalize="log1p"
        )


@dataclass
class MoleculesConfig(Config):
    model: Model = group(Model)
    features: Features = group(Features)
    data: DataConfig = group(DataConfig)


class GINE(nn.Module):
    """Message passing: GINEConv with residual connections and batch normalisation, mean and sum over the nodes.

    The isomorphism network of Xu et al. (ICLR 2019) with features of edges (Hu et al., ICLR 2020).
    """

    def __init__(self, node_channels: int, edge_channels: int, hidden: int, out_channels: int, num_layers: int):
        super().__init__()
        convolution = require("torch_geometric.nn", extra="graphs", quiet=True).GINEConv
        self.embedding = nn.Linear(node_channels, hidden)
        self.convs = nn.ModuleList(
            convolution(
                nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)), edge_dim=edge_channels
            )
            for _ in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(num_layers))
        self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, out_channels))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        x = self.embedding(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.relu(norm(conv(x, edge_index, edge_attr)))
        total = x.new_zeros(num_graphs, x.shape[1]).index_add(0, batch, x)
        nodes = torch.bincount(batch, minlength=num_graphs)[:, None]
        # The size of a molecule tells on the sum alone; a fixed factor brings both to one magnitude.
        return self.head(torch.cat([total / nodes.clamp(min=1), total / 16], dim=1))


def _pairs(batch: Any) -> PairBatch:
    return PairBatch.from_data(batch, pair_attr="poly_pair" if "poly_pair" in batch else ())


class PairFrames(Frames):
    """Graphs that collate to a batch with its ``pairs``, which the device would have to wait for later."""

    @staticmethod
    def collate(frames: Sequence[Any]) -> Any:
        batch = Frames.collate(frames)
        batch.pairs = _pairs(batch)
        return batch


class Predictor(nn.Module):
    """A network on PyG batches: standardised targets (G, T) of it, and by ``predict`` those in their own units."""

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, pairs: bool, targets: int):
        super().__init__()
        self.network, self.pairs = network, pairs
        self.register_buffer("mean", torch.zeros(targets))
        self.register_buffer("scale", torch.ones(targets))

    def forward(self, batch: Any) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        if self.pairs:
            pairs = batch.pairs if "pairs" in batch else _pairs(batch)
            return self.network(pairs.with_x(pairs.x.to(dtype)))
        x, edge_attr = batch.x.to(dtype), batch.edge_attr.to(dtype)
        return self.network(x, batch.edge_index, edge_attr, batch.batch, batch.num_graphs)

    def predict(self, batch: Any) -> Tensor:
        return self(batch) * self.scale + self.mean


class MoleculesTask(Task):
    """Absolute errors of a regression on molecules; a subclass says what the molecules are.

    Attributes:
        channels: of atoms and of bonds.
        targets: numbers to predict for each molecule.
        quantity: what the first of them is, with its unit.
    """

    config: Any
    channels: tuple[int, int]
    targets = 1
    quantity = ""

    def molecules(self) -> tuple[Iterable[Any], dict[str, Iterable[Any]]]:
        """Training set and test sets, without polynomial features; the set named "test" is the one that counts."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        model = self.config.model
        atoms, bonds = self.channels
        transform = self.config.features.transform(model.name)
        if transform is not None:
            atoms += transform.num_node_features
        pairs = 0 if transform is None else transform.num_pair_features
        if model.name == "gine":
            network: nn.Module = GINE(atoms, bonds + pairs, model.hidden, self.targets, model.num_layers)
        else:
            network = PPGN(
                1 + atoms + bonds + pairs,
                model.hidden,
                self.targets,
                model.num_layers,
                plus=model.name == "ppgn++",
                scale=model.scale,
                pool=model.pool,
                readout=model.readout,
            )
        return Predictor(network, model.name != "gine", self.targets)

    def build_data(self) -> Data:
        train, tests = self.molecules()
        transform = self.config.features.transform(self.config.model.name)
        kind = Frames if self.config.model.name == "gine" else PairFrames

        def frames(molecules: Iterable[Any]) -> Frames:
            return kind(m if transform is None else transform(m) for m in molecules)

        return Data(frames(train), {name: frames(test) for name, test in tests.items()})

    def prepare(self, model: Any, data: Data) -> None:
        targets = torch.cat([molecule.y for molecule in data.train])  # type: ignore[attr-defined]
        model.mean.copy_(targets.mean(0))
        model.scale.copy_(targets.std(0, correction=0).clamp(min=1e-6))

    def loss(self, model: nn.Module, batch: Any) -> Sums:
        module = getattr(model, "module", model)
        wanted = (batch.y - module.mean) / module.scale
        return (model(batch) - wanted).abs().mean(1).sum(), batch.num_graphs

    def evaluate(self, model: Any, batch: Any, name: str) -> Mapping[str, Sums]:
        error = model.predict(batch) - batch.y
        count = batch.num_graphs
        suffix = "" if name == "test" else f"_{name}"
        metrics: dict[str, Sums] = {f"mae{suffix}": (error.abs().mean(1).sum(), count)}
        if self.targets > 1:
            metrics[f"mae_standardized{suffix}"] = ((error / model.scale).abs().mean(1).sum(), count)
        else:
            metrics[f"mse{suffix}"] = (error.square().sum(), count)
        return metrics

    def final(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {"rmse": math.sqrt(metrics["test/mse"])} if "test/mse" in metrics else {}

    def plots(self, model: Any, data: Data, folder: Path) -> None:
        """Prediction against truth, of the first target."""
        frames: Any = data.test["test"]
        device = model.mean.device
        figure = new_figure(4.8, 4.8)
        axes = figure.subplots()
        truth, found = [], []
        for first in range(0, len(frames), 64):
            batch = frames.collate([frames[i] for i in range(first, min(first + 64, len(frames)))]).to(device)
            truth.append(batch.y[:, 0].cpu())
            found.append(model.predict(batch)[:, 0].float().cpu())
        x, y = torch.cat(truth), torch.cat(found)
        axes.plot(x, y, ".", markersize=4, alpha=0.6)
        low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
        axes.plot((low, high), (low, high), color="black", linewidth=0.8)
        features = self.config.features
        extra = "" if features.kind == "none" else f" with features: {features.kind}, degree {features.degree}"
        axes.set_title(f"{self.config.model.name}{extra}\n{len(x)} test molecules", fontsize=10)
        axes.set(xlabel=f"{self.quantity}: truth", ylabel="prediction", aspect="equal")
        axes.grid(alpha=0.3)
        figure.savefig(folder / "parity.png", dpi=130)


# -- baselines that know no graph


def totals(molecules: Iterable[Any], transform: AddPolynomialFeatures | None = None) -> Tensor:
    """(G, F), float64: sums over atoms and over bonds, the number of atoms, and graph features of ``transform``."""
    rows = []
    for molecule in molecules:
        row = [molecule.x.sum(0), molecule.edge_attr.sum(0) / 2, torch.tensor([float(molecule.num_nodes)])]
        if transform is not None:
            row.append(transform(molecule).poly_graph[0])
        rows.append(torch.cat(row).double())
    return torch.stack(rows)


def ridge(x: Tensor, y: Tensor, test: Tensor, penalty: float = 1.0) -> Tensor:
    """Predictions (M, T) for ``test`` (M, F) of ridge regression on standardised ``x`` (N, F) and ``y`` (N, T)."""
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    x, test = (x - mean) / scale, (test - mean) / scale
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return test @ torch.linalg.solve(gram, x.T @ (y - y.mean(0))) + y.mean(0)
