"""What the experiments with low-rank ordered decomposition share: one task that trains each of the compared forms.

A dense network, low-rank layers without an order, with fewer terms from the start, and with ordered dropout (with the
hierarchical group lasso or without) differ in keys alone. All are evaluated the same way: as what would be deployed.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_int
from ..maestro import (
    RankSampler,
    extract,
    factorize,
    frontier,
    hierarchical_group_lasso,
    lod_loss,
    progressive_shrink,
    recalibrate_bn,
)
from ..maestro.ordered import LAYER_PROBS, MODES, low_rank_layers, unwrapped
from ..training import Config, Data, Task, group, key
from ..training.plots import new_figure
from ..training.task import Sums

FORMS = ("dense", "low_rank", "ordered")


@dataclass
class Ranks:
    form: str = key("ordered", "dense, low_rank (factors without an order) or ordered (with ordered dropout)")
    max_rank: float = key(1.0, "terms that layers hold from the start, as a fraction of their full rank")
    mode: str = key("full+sampled", "ordered: loss of a step; sampled and split take one pass, full+sampled two")
    layer_prob: str = key("pair", "ordered: law of the draws, pair, uniform or independent")
    lasso: float = key(0.0, "weight of the hierarchical group lasso")
    threshold: float = key(1e-3, "importance below which terms are dropped where there is a lasso")
    shrink_every: int = key(100, "micro-batches between two rounds of that")
    cuts: list[float] = key([0.25, 0.125], "fractions of the full rank at which the trained model is cut")

    def __post_init__(self) -> None:
        check_choice("ranks.form", self.form, FORMS)
        check_choice("ranks.mode", self.mode, MODES)
        check_choice("ranks.layer_prob", self.layer_prob, LAYER_PROBS)
        check_int("ranks.shrink_every", self.shrink_every)
        for name, values in (("ranks.max_rank", [self.max_rank]), ("ranks.cuts", self.cuts)):
            if not all(0 < value <= 1 for value in values):
                raise ValueError(f"{name} must be in (0, 1], got {values}")
        for name in ("lasso", "threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"ranks.{name} must be finite and at least 0, got {value!r}")


@dataclass
class MaestroConfig(Config):
    ranks: Ranks = group(Ranks)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainer.strategy == "fsdp2":
            raise ValueError("trainer.strategy must be ddp, got fsdp2: models are extracted from a whole one")
        if self.trainer.activation_checkpointing and self.ranks.form == "ordered":
            raise ValueError("trainer.activation_checkpointing must be false: it would recompute at other ranks")


class Counting(nn.Module):
    """A network and how many micro-batches it was trained on, which says where the draws of ranks go on."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("micro_batches", torch.zeros(1, dtype=torch.int64))
        self.micro_batches: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class LowRankTask(Task):
    """Classification by a network of which all layers but those in ``skip`` may be low-rank.

    Metrics of a test set, each of a plain model that :func:`extract` makes: ``accuracy``, and ``parameters`` of what
    is deployed for it; ``cut_0.25`` of the prefixes at a quarter of the full ranks, and ``svd_0.25`` of as many terms
    of each product's SVD. A dense network has no prefixes; its SVD is what compresses it after training.
    """

    config: Any
    skip: tuple[str, ...] = ()
    calibration_batches = 20

    def __init__(self, config: Any):
        super().__init__(config)
        self._sampler: tuple[nn.Module, RankSampler] | None = None
        self._step: int | None = None
        self._deployed: tuple[Any, dict[str, nn.Module]] | None = None
        self._training_set: Any = None

    def network(self) -> nn.Module:
        """The dense network."""
        raise NotImplementedError

    def inputs(self, x: Tensor, *, training: bool) -> Tensor:
        """What the network gets of a batch's first entry."""
        return x

    def build_model(self) -> nn.Module:
        network, ranks = self.network(), self.config.ranks
        if ranks.form != "dense":
            max_rank = None if ranks.max_rank == 1 else ranks.max_rank
            network = factorize(network, skip=self.skip, max_rank=max_rank, inplace=True)
        return Counting(network)

    def prepare(self, model: nn.Module, data: Data) -> None:
        self._training_set = data.train

    # Training

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        x, ranks = self.inputs(x, training=True), self.config.ranks
        step = self._next(model)
        cross_entropy = functools.partial(F.cross_entropy, reduction="sum")
        penalised = ranks.lasso > 0 and ranks.form != "dense"
        if penalised and step and step % ranks.shrink_every == 0:
            progressive_shrink(model, ranks.threshold)
        if ranks.form == "ordered":
            if self._sampler is None or self._sampler[0] is not model:
                self._sampler = model, RankSampler(model, ranks.layer_prob, self.config.seed)
            loss = lod_loss(model, x, y, cross_entropy, self._sampler[1], step, ranks.mode)
        else:
            loss = cross_entropy(model(x), y)
        if penalised:
            loss = loss + ranks.lasso * len(y) * hierarchical_group_lasso(model)
        return loss, len(y)

    def _next(self, model: nn.Module) -> int:
        """The number of this micro-batch. The buffer follows the run through checkpoints; it is read once."""
        counter: Any = unwrapped(model)
        if self._step is None:
            self._step = int(counter.micro_batches)
        step, self._step = self._step, self._step + 1
        counter.micro_batches.fill_(self._step)
        return step

    # Evaluation

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> Mapping[str, Sums]:
        x, y = batch
        x, deployed = self.inputs(x, training=False), self.deployed(model)
        found: dict[str, Sums] = {name: ((m(x).argmax(1) == y).sum(), len(y)) for name, m in deployed.items()}
        parameters = sum(p.numel() for p in deployed["accuracy"].parameters())
        return found | {"parameters": (torch.tensor(float(parameters * len(y))), len(y))}

    def deployed(self, model: nn.Module) -> dict[str, nn.Module]:
        """Plain models by the names of their metrics; made once for each state of the weights."""
        state = tuple((p.data_ptr(), p._version) for p in model.parameters())
        if self._deployed is None or self._deployed[0] != state:
            self._deployed = state, self._extracted(model)
        return self._deployed[1]

    def _extracted(self, model: nn.Module) -> dict[str, nn.Module]:
        network, dense = self.factorized(model), self.config.ranks.form == "dense"
        whole = copy.deepcopy(model).network if dense else extract(network, round_to=1)
        models: dict[str, nn.Module] = {"accuracy": self.calibrated(whole)}
        for fraction in self.config.ranks.cuts:
            if not dense:
                models[f"cut_{fraction:g}"] = self.cut(network, fraction, canonicalize=False)
            models[f"svd_{fraction:g}"] = self.cut(network, fraction)
        return models

    def factorized(self, model: Any) -> nn.Module:
        """A copy of the network in low-rank layers, without the terms that the lasso has emptied since the last round.

        Each rank finds it by itself, where :func:`progressive_shrink` would have them agree.
        """
        ranks, network = self.config.ranks, copy.deepcopy(model).network
        if ranks.form == "dense":
            return factorize(network, skip=self.skip, inplace=True)
        if ranks.lasso:
            for layer in low_rank_layers(network).values():
                layer.truncate_(int((layer.importance() >= ranks.threshold).sum()))
        return network

    def cut(self, network: nn.Module, fraction: float, **how: Any) -> nn.Module:
        """The plain model of that fraction of every layer's full rank, or of its rank where that is lower."""
        ranks = {}
        for name, layer in low_rank_layers(network).items():
            full = min(layer.weight_out.shape[0], layer.weight_in.shape[1]) // layer._groups
            ranks[name] = min(math.ceil(fraction * full), layer.rank)
        return self.calibrated(extract(network, ranks=ranks, round_to=1, **how))

    def calibrated(self, plain: Any) -> nn.Module:
        """``plain`` with batch norm's statistics of its own, in evaluation mode."""
        recalibrate_bn(plain, self.batches(plain))
        return plain.eval()

    def batches(self, network: nn.Module) -> list[Tensor]:
        """The first inputs of the training set, as evaluation has them."""
        size, x = self.config.data.batch_size, self._training_set.tensors[0]
        return [self._moved(part, network) for part in x[: self.calibration_batches * size].split(size)]

    def _moved(self, x: Tensor, network: nn.Module) -> Tensor:
        parameter = next(network.parameters())
        x = x.to(parameter.device, parameter.dtype if x.is_floating_point() else None)
        return self.inputs(x, training=False)

    # Figures

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        self._training_set = data.train
        network, form = self.factorized(model), self.config.ranks.form
        x, y = next(iter(data.test.values())).tensors  # type: ignore[attr-defined]
        x, y = self._moved(x, network).split(512), y.split(512)

        def accuracy(plain: nn.Module) -> float:
            right = [plain(part).argmax(1).cpu() == labels for part, labels in zip(x, y, strict=True)]
            return float(torch.cat(right).double().mean())

        fractions = [2.0**-i for i in range(6)]
        figure = new_figure(6.5, 4.0)
        ax = figure.subplots()
        for label, canonicalize in (("prefixes as trained", False), ("SVD of each product", True)):
            if form != "dense" or canonicalize:
                found = [accuracy(self.cut(network, fraction, canonicalize=canonicalize)) for fraction in fractions]
                ax.plot(fractions, found, "o-", color=f"C{int(canonicalize)}", label=label)
        ax.set_xscale("log", base=2)
        ax.set_xticks(fractions, [f"1/{round(1 / fraction)}" if fraction < 1 else "1" for fraction in fractions])
        ax.set(xlabel="terms of every layer, as a fraction of its full rank", ylabel="test accuracy")
        ax.set_title(
            {"dense": "Dense", "low_rank": "Low-rank", "ordered": "Ordered"}[form] + ": one training, all sizes"
        )
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
        figure.savefig(folder / "cuts.png", dpi=130)
        if any(layer.rank for layer in low_rank_layers(network).values()):
            options: dict[str, Any] = {"round_to": 1, "latency": False, "plot": folder / "frontier.png"}
            frontier(network, x[0][:1], evaluate=accuracy, loader=self.batches(network), **options)
