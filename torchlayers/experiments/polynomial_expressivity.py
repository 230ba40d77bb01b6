"""Which graphs networks of random weights tell apart: message passing, PPGN and PPGN++, with and without features.

Where a network computes no polynomial that differs between two graphs, its outputs are equal whatever the weights; if
it computes one, random weights show it. The study compares outputs in float64, relative to their size, beside those of
isomorphic copies, which show the rounding. No weights are trained.

- C6 and two C3: 2-regular, told apart by triangles;
- CSL(41): ten 4-regular circulants, told apart by cycles of up to 8;
- Shrikhande's graph and the rook's of 4 × 4; T(8) and the three Chang graphs: strongly regular with equal parameters,
  the same to every network of matrix products, told apart by polynomials of treewidth 3;
- BREC, and families of strongly regular graphs (graph6), from local folders.

Beside it stands what the banks of operations cannot compute: how many patterns of each degree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int, check_ints, require
from ..data import graphs as sets
from ..polynomial import PPGN, AddPolynomialFeatures, PairBatch, enumerate_patterns, is_computable
from ..training import Config, Context, key, register
from ..training.plots import new_figure

# Name: the preset bank of its operations, and the degree of the features for what that bank misses (0: none).
MODELS = {
    "GIN": ("gin", 0),
    "GIN (6)": ("gin", 6),
    "PPGN": ("ppgn", 0),
    "PPGN++": ("ppgn++", 0),
    "PPGN++ (5)": ("ppgn++", 5),
    "PPGN++ (6)": ("ppgn++", 6),
}


@dataclass
class PolynomialExpressivity(Config):
    hidden: int = key(16, "channels")
    num_layers: int = key(4, "blocks, or rounds of messages")
    outputs: int = key(16, "numbers that are compared")
    networks: int = key(5, "draws of random weights; the largest difference counts")
    tolerance: float = key(1e-8, "relative difference from which two graphs count as told apart")
    csl_skips: list[int] = key(list(sets.CSL_SKIPS), "classes of CSL(41)")
    degree: int = key(6, "up to which the patterns that banks miss are counted")
    brec: str | None = key(None, "folder with brec_v3.npy")
    families: str | None = key(None, "folder with families of graphs that are hard to tell apart, NAME.g6 each")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "num_layers", "outputs", "networks", "degree"):
            check_int(name, getattr(self, name))
        check_ints("csl_skips", self.csl_skips, minimum=2)
        if not 1e-12 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 1e-12, some rounding errors, and 1, got {self.tolerance}")


Pairs = dict[str, list[tuple[str, str]]]


def collection(config: PolynomialExpressivity) -> tuple[dict[str, Any], Pairs]:
    """The graphs by name, and the pairs to tell apart, in groups."""
    found = {"C6": sets.cycle_graph(6), "2 C3": sets.disjoint_union(sets.cycle_graph(3), sets.cycle_graph(3))}
    pairs: Pairs = {"C6, 2 C3": [("C6", "2 C3")]}
    families: dict[str, dict[str, Any]] = {
        "CSL(41)": {f"CSL(41, {skip})": sets.csl_graph(skip) for skip in config.csl_skips},
        "Shrikhande, rook": {"Shrikhande": sets.shrikhande_graph(), "rook 4 × 4": sets.rook_graph(4)},
        "T(8), Chang": {"T(8)": sets.triangular_graph(8), **{f"Chang {i}": sets.chang_graph(i) for i in (1, 2, 3)}},
    }
    if config.families is not None:
        paths = sorted(Path(config.families).glob("*.g6"))
        if not paths:
            raise FileNotFoundError(f"families must be a folder with NAME.g6, got none in {config.families}")
        for path in paths:
            families[path.stem] = {f"{path.stem} {i}": graph for i, graph in enumerate(sets.load_graph6(path))}
    for name, family in families.items():
        found.update(family)
        pairs[name] = list(itertools.combinations(family, 2))
    if config.brec is not None:
        for number, (category, one, two) in enumerate(sets.load_brec(config.brec)):
            names = f"BREC {number} a", f"BREC {number} b"
            found.update(zip(names, (one, two), strict=True))
            pairs.setdefault(f"BREC {category}", []).append(names)
    return found, pairs


class GIN(nn.Module):
    """PyG's GIN with a sum over the nodes, float64."""

    def __init__(self, in_channels: int, config: PolynomialExpressivity):
        super().__init__()
        network = require("torch_geometric.nn", extra="graphs", quiet=True).GIN
        self.network = network(in_channels, config.hidden, config.num_layers, config.outputs)

    def forward(self, graph: Any) -> Tensor:
        return self.network(graph.x, graph.edge_index).sum(0)


class Pairwise(nn.Module):
    """PPGN or PPGN++ on adjacency and features."""

    def __init__(self, in_channels: int, config: PolynomialExpressivity, plus: bool):
        super().__init__()
        self.network = PPGN(in_channels, config.hidden, config.outputs, config.num_layers, plus)

    def forward(self, graph: Any) -> Tensor:
        pairs = PairBatch.from_data(graph, x=("x",) if "x" in graph else (), pair_attr=_given(graph, "poly_pair"))
        return self.network(pairs.with_x(pairs.x.double()))[0]


def _given(graph: Any, name: str) -> tuple[str, ...]:
    return (name,) if name in graph else ()


def with_features(name: str) -> Callable[[Any], Any]:
    """Of a graph, what the model ``name`` takes."""
    bank, degree = MODELS[name]
    nodes_only = bank == "gin"
    transform = None
    if degree:
        transform = AddPolynomialFeatures(
            degree=degree,
            exclude=bank,
            node_attr=None,
            edge_attr=False,
            pair_attr=False if nodes_only else "poly_pair",
            graph_attr=False,
            normalize="log1p",
        )

    def prepared(graph: Any) -> Any:
        graph = graph.clone()
        if nodes_only:
            graph.x = torch.ones(graph.num_nodes, 1)
        graph = graph if transform is None else transform(graph)
        for attribute in ("x", "poly_pair"):
            if attribute in graph:
                graph[attribute] = graph[attribute].double()
        return graph

    return prepared


def outputs(name: str, graphs: Mapping[str, Any], config: PolynomialExpressivity, device: torch.device) -> Tensor:
    """(graphs, networks, outputs) of the model ``name`` with random weights, float64."""
    prepare = with_features(name)
    given = [prepare(graph).to(device) for graph in graphs.values()]
    channels = sum(given[0][a].shape[1] for a in ("x", "poly_pair") if a in given[0])
    found = []
    for number in range(config.networks):
        torch.manual_seed(1000 * config.seed + number)
        bank = MODELS[name][0]
        network: nn.Module = (
            GIN(channels, config) if bank == "gin" else Pairwise(1 + channels, config, plus=bank == "ppgn++")
        )
        network = network.to(device, torch.float64).eval()
        with torch.no_grad():
            found.append(torch.stack([network(graph) for graph in given]))
    return torch.stack(found, dim=1).cpu()


def difference(one: Tensor, two: Tensor) -> float:
    """Of outputs (networks, outputs), relative to the larger one; the largest over the networks."""
    scale = torch.maximum(one.norm(dim=-1), two.norm(dim=-1))
    return float(((one - two).norm(dim=-1) / scale.clamp(min=1e-300)).max())


def missing(degree: int) -> dict[str, list[int]]:
    """For each degree from 1 on the number of connected patterns on simple graphs: all, and those that banks miss."""
    counts: dict[str, list[int]] = {"all": [], "GIN": [], "PPGN++": []}
    for each in range(1, degree + 1):
        patterns = [pattern for order in range(3) for pattern in enumerate_patterns(each, order)]
        counts["all"].append(len(patterns))
        for name in ("GIN", "PPGN++"):
            counts[name].append(sum(not is_computable(pattern, MODELS[name][0]) for pattern in patterns))
    return counts


@register("polynomial_expressivity", PolynomialExpressivity)
def run(context: Context) -> dict[str, float]:
    config: PolynomialExpressivity = context.config
    graphs, pairs = collection(config)
    everything = dict(graphs)
    for number, (name, graph) in enumerate(graphs.items()):
        everything[f"{name}, permuted"] = sets.permuted(graph, seed=number)
    differences: dict[str, dict[str, list[float]]] = {}
    metrics: dict[str, float] = {}
    for step, model in enumerate(context.progress(MODELS, total=len(MODELS)), 1):
        found = dict(zip(everything, outputs(model, everything, config, context.device), strict=True))
        rounding = max(difference(found[name], found[f"{name}, permuted"]) for name in graphs)
        differences[model] = {
            group: [difference(found[one], found[two]) for one, two in members] for group, members in pairs.items()
        }
        line = {
            f"{_key(model)}_{_key(group)}": float(sum(d > config.tolerance for d in values))
            for group, values in differences[model].items()
        }
        line[f"{_key(model)}_isomorphic_copies"] = rounding
        if rounding > config.tolerance:
            raise ArithmeticError(
                f"tolerance must be over the rounding of {model}, {rounding:.1e}: it tells copies apart"
            )
        context.report(line, step=step)
        metrics |= line
    counts = missing(config.degree)
    if context.main:
        text = table(differences, pairs, config.tolerance)
        (context.folder / "table.md").write_text(text)
        context.log.say(text)
        plot(config, differences, counts, context.folder / "polynomial_expressivity.png")
    metrics["pairs"] = float(sum(map(len, pairs.values())))
    return metrics


def _key(name: str) -> str:
    """A name as part of a metric's: "PPGN++ (6)" is ppgn++_6."""
    kept = "".join(c if c.isalnum() or c in "+-" else " " for c in name.lower())
    return "_".join(kept.split())


def table(differences: Mapping[str, Mapping[str, list[float]]], pairs: Pairs, tolerance: float) -> str:
    """Pairs told apart, by network and group, in Markdown."""
    rows = [["", *(f"{group} (of {len(members)})" for group, members in pairs.items())]]
    for model, groups in differences.items():
        rows.append([model, *(str(sum(d > tolerance for d in values)) for values in groups.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(["Pairs told apart", "", *lines]) + "\n"


def plot(
    config: PolynomialExpressivity,
    differences: Mapping[str, Mapping[str, list[float]]],
    counts: Mapping[str, list[int]],
    path: Path,
) -> None:
    """Pairs told apart with the smallest difference in each group (left), patterns that banks miss (right)."""
    groups = list(next(iter(differences.values())))
    figure = new_figure(7.0 + 1.5 * len(groups), 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.1 * len(groups), 3.2))
    smallest = torch.tensor([[min(found[g]) for g in groups] for found in differences.values()], dtype=torch.float64)
    image = left.imshow(smallest.clamp(min=1e-16).log10().numpy(), cmap="viridis", vmin=-16, vmax=0, aspect="auto")
    for row, found in enumerate(differences.values()):
        for column, group in enumerate(groups):
            values = found[group]
            apart = sum(d > config.tolerance for d in values)
            colour = "white" if smallest[row, column] < 1e-8 else "black"
            left.text(column, row, f"{apart} of {len(values)}", ha="center", va="center", color=colour, fontsize=10)
    left.set_xticks(range(len(groups)), [g.replace(", ", ",\n") for g in groups])
    left.set_yticks(range(len(differences)), list(differences))
    left.set_title("Pairs told apart by random weights")
    bar = figure.colorbar(image, ax=left)
    bar.set_label("log10 of the smallest relative difference")
    bar.ax.axhline(math.log10(config.tolerance), color="white", linewidth=1.5)
    labels = {"all": "all", "GIN": "not by message passing", "PPGN++": "not by PPGN++"}
    for name, count in counts.items():
        degrees = [d for d, value in enumerate(count, 1) if value]
        right.plot(degrees, [value for value in count if value], "o-", label=labels[name])
        if degrees:
            right.annotate(str(count[-1]), (degrees[-1], count[-1]), (4, 4), textcoords="offset points", fontsize=9)
    right.set(xlabel="degree", yscale="log", title="Connected patterns, simple graphs", xlim=(0.7, config.degree + 0.7))
    right.set_xticks(range(1, config.degree + 1))
    right.legend(fontsize=9)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
