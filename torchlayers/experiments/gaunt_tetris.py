"""Tetris in three dimensions: eight shapes of four blocks, two of which are mirror images of each other.

A network of pointwise products of functions on the sphere makes true tensors of true ones, never a pseudoscalar: the
mirror pair stays one shape to it, and 6 of 8 are right. With the antisymmetric paths (the Poisson bracket) the network
has pseudotensors, and tells the pair apart though one of the two was left out of the training: the sign of its
pseudoscalar follows from equivariance.

The shapes and their labels, one pseudoscalar and six scalars, are those of e3nn's classic example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int, require
from ..data.atoms import Frames
from ..gaunt.convolution import edge_order
from ..gaunt.irreps import FlatIrreps
from ..gaunt.modules import GauntConv, GauntTensorProduct
from ..gaunt.potential import ChannelMix, neighbor_list
from ..training import Config, Data, DataConfig, Task, group, key, register
from ..training.plots import new_figure

_CHIRAL = ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0))
SHAPES = {
    "chiral": _CHIRAL,
    "mirrored": tuple((x, y, -z) for x, y, z in _CHIRAL),
    "square": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)),
    "line": ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)),
    "corner": ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)),
    "L": ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)),
    "T": ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)),
    "zigzag": ((0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0)),
}


@dataclass
class Model:
    antisymmetric: bool = key(True, "also the paths of odd l1 + l2 + l3, by the Poisson bracket")
    channels: int = key(8, "of each irrep")
    lmax: int = key(2, "highest degree")

    def __post_init__(self) -> None:
        check_int("model.channels", self.channels)
        check_int("model.lmax", self.lmax)


@dataclass
class TetrisData(DataConfig):
    batch_size: int = key(8, "shapes in an optimizer step")
    leave_out: bool = key(True, "train on seven shapes, without one of the mirror pair")
    rotations: int = key(4, "random orientations of each shape in the test set")
    seed: int = key(0, "of the orientations, apart from the run's seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.rotations", self.rotations)
        check_int("data.seed", self.seed, minimum=0)


@dataclass
class GauntTetris(Config):
    model: Model = group(Model)
    data: TetrisData = group(TetrisData)


class TetrisNetwork(nn.Module):
    """Two rounds of messages and of products of what arrived, summed over the blocks.

    Shape: PyG ``Batch`` with ``pos`` (N, 3), blocks at distance 1 -> (B, 7): a pseudoscalar, then six scalars.
    """

    def __init__(self, channels: int, lmax: int, antisymmetric: bool):
        super().__init__()
        irreps = [f"{channels}x{degree}{parity}" for degree in range(lmax + 1) for parity in "eo"]
        true = [f"{channels}x{degree}{'eo'[degree % 2]}" for degree in range(lmax + 1)]
        scalars = [f"{channels}x0e"]
        # The bracket of true signals reaches no pseudoscalar: it takes three vectors to make one.
        both = [i for i in irreps if i != f"{channels}x0o"] if antisymmetric else true
        stages = [scalars, true, both, irreps if antisymmetric else true]
        stages.append([f"{channels}x0e", f"{channels}x0o"] if antisymmetric else scalars)
        self._irreps = [FlatIrreps("irreps", "+".join(stage)) for stage in stages]
        first, arrived, made, again, last = (str(flat) for flat in self._irreps)
        self.embedding = nn.Parameter(torch.randn(channels))
        self.convs = nn.ModuleList(
            GauntConv(a, lmax, b, antisymmetric=antisymmetric) for a, b in ((first, arrived), (made, again))
        )
        self.filters = nn.ParameterList(torch.randn(int(conv.weight_numel)) for conv in self.convs)  # type: ignore[arg-type]
        self.products = nn.ModuleList(
            GauntTensorProduct(a, a, b, antisymmetric=antisymmetric) for a, b in ((arrived, made), (again, last))
        )
        self.factors = nn.ModuleList(
            ChannelMix(len(flat.muls), channels) for flat in (self._irreps[1], self._irreps[3]) for _ in range(2)
        )
        self.types = nn.Linear(channels, 6)
        self.chirality = nn.Linear(channels, 1, bias=False) if antisymmetric else None
        for readout in (self.types, self.chirality):
            if readout is not None:
                nn.init.zeros_(readout.weight)

    def forward(self, batch: Any) -> Tensor:
        dtype = self.embedding.dtype
        edge_index, _ = neighbor_list(batch.pos, 1.1, batch=batch.batch, num_graphs=batch.num_graphs)
        edges = edge_order(edge_index, len(batch.pos))
        edge_vec = (batch.pos[edge_index[0]] - batch.pos[edge_index[1]]).to(dtype)
        x = self.embedding.expand(len(batch.pos), -1)
        for t, (conv, weight) in enumerate(zip(self.convs, self.filters, strict=True)):
            x = conv(x, edge_vec, edges, weight.expand(edge_index.shape[1], -1))
            x = self._interact(x, t)
        pooled = x.new_zeros(batch.num_graphs, x.shape[1]).index_add(0, batch.batch, x) / 4
        parts = self._irreps[-1].split(pooled)
        types = self.types(parts[1, 0][..., 0])
        if self.chirality is None:
            return torch.cat((torch.zeros_like(types[:, :1]), types), dim=1)
        return torch.cat((self.chirality(parts[-1, 0][..., 0]), types), dim=1)

    def _interact(self, x: Tensor, t: int) -> Tensor:
        """x + the product of two mixtures of its channels; where the product has an irrep that x lacks, that alone.

        x is brought to mean square 1 in each block, since products square what is small or large in it.
        """
        before, after = self._irreps[2 * t + 1 : 2 * t + 3]
        x = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        parts = before.split(x)
        one, two = (
            before.join(dict(zip(parts, mix(list(parts.values())), strict=True)))
            for mix in self.factors[2 * t : 2 * t + 2]
        )
        product = after.split(self.products[t](one, two))
        return after.join({part: value + parts[part] if part in parts else value for part, value in product.items()})


def _rotation(generator: torch.Generator) -> Tensor:
    """A random rotation (3, 3), from a random unit quaternion."""
    a, b, c, d = torch.nn.functional.normalize(torch.randn(4, generator=generator, dtype=torch.float64), dim=0).tolist()
    return torch.tensor(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a - b * b + c * c - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a - b * b - c * c + d * d],
        ],
        dtype=torch.float64,
    )


class TetrisTask(Task):
    config: GauntTetris

    def build_model(self) -> nn.Module:
        model = self.config.model
        return TetrisNetwork(model.channels, model.lmax, model.antisymmetric)

    def build_data(self) -> Data:
        data = self.config.data
        graph = require("torch_geometric.data", extra="graphs", quiet=True).Data
        labels = torch.zeros(8, 7)
        labels[0, 0], labels[1, 0] = 1, -1
        labels[2:, 1:] = torch.eye(6)

        def frame(number: int, rotation: Tensor) -> Any:
            pos = torch.tensor(list(SHAPES.values())[number], dtype=torch.float64)
            return graph(pos=pos @ rotation.T, label=labels[number][None])

        generator = torch.Generator().manual_seed(data.seed)
        first = 1 if data.leave_out else 0
        train = Frames(frame(i, torch.eye(3, dtype=torch.float64)) for i in range(first, 8))
        test = Frames(frame(i, _rotation(generator)) for _ in range(data.rotations) for i in range(8))
        return Data(train, {"tetris": test})

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return (model(batch) - batch.label).square().sum(), batch.num_graphs

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((model(batch).round() == batch.label).all(1).sum(), batch.num_graphs)}

    def final(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {"accuracy": metrics["test/accuracy"]}

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        frames = [data.test["tetris"][i] for i in range(8)]
        device = next(model.parameters()).device
        found = model(Frames.collate(frames).to(device)).float().cpu()
        figure = new_figure(7.0, 4.5)
        axes = figure.subplots()
        image = axes.imshow(found.T.numpy(), cmap="RdBu", vmin=-1, vmax=1)
        for row in range(7):
            for column in range(8):
                value = round(float(found[column, row]), 2) + 0.0  # no -0.00
                colour = "white" if abs(value) > 0.5 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(8), list(SHAPES), rotation=30)
        axes.set_yticks(range(7), ["pseudoscalar", *(f"scalar {i}" for i in range(1, 7))])
        figure.colorbar(image, ax=axes)
        paths = "with" if self.config.model.antisymmetric else "without"
        left = "\n'chiral' was not trained on" if self.config.data.leave_out else ""
        axes.set_title(f"Tetris {paths} antisymmetric paths: outputs by shape{left}", fontsize=10)
        figure.savefig(folder / "tetris.png", dpi=130)


register("gaunt_tetris", GauntTetris, task=TetrisTask)
