"""Detecting triples: which of a sequence's bit strings is the xor of two others?

Every token is a nonzero string of ``bits`` bits, drawn at random; token i is labelled 1 where tokens j and k exist with
x_i = x_j ⊕ x_k. In ±1 code Σ_c x_ic x_jc x_kc reaches ``bits`` exactly for such a triple: one layer of trilinear
attention can look it up, while one layer of ordinary attention, which sees pairs, cannot (Sanford et al., 2306.02896,
prove a gap for the like task Match3). No sequence comes twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_int
from ..training import Config, Data, DataConfig, Task, TensorSet, group, key, register
from ..training.log import read_metrics
from ..training.plots import new_figure
from ._transformer import FORMS, STANDARD, block, forward_flops


@dataclass
class Model:
    attention: str = key("trilinear", "trilinear, determinant, strassen or standard")
    n_layers: int = key(1, "blocks")
    width: int = key(64, "channels")
    heads: int = key(4, "attention heads")
    gain: float = key(1.5, "first value of the gains on normalised queries and keys")

    def __post_init__(self) -> None:
        check_choice("model.attention", self.attention, (*FORMS, STANDARD))
        check_int("model.n_layers", self.n_layers)


@dataclass
class XorData(DataConfig):
    batch_size: int = key(64, "sequences in an optimizer step, over all ranks and micro-batches")
    tokens: int = key(12, "tokens of a sequence")
    bits: int = key(6, "bits of a token")
    train_samples: int = key(51200, "training sequences")
    test_samples: int = key(512, "test sequences")
    seed: int = key(0, "of the sequences, apart from the run's seed: runs compare on the same data")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.tokens", self.tokens, minimum=3)
        check_int("data.bits", self.bits, minimum=2)
        if self.bits > 16:
            raise ValueError(f"data.bits must be at most 16, got {self.bits}")
        check_int("data.seed", self.seed, minimum=0)


@dataclass
class Match3Xor(Config):
    model: Model = group(Model)
    data: XorData = group(XorData)


def labels(tokens: Tensor, bits: int) -> Tensor:
    """``tokens`` (S, N), integers in 1 ... 2^bits - 1, to (S, N) bool: whether a token is the xor of two others.

    Distinct by themselves: x_i ⊕ x_j is 0, which is no token, for equal strings, and never x_i or x_j.
    """
    present = torch.zeros(len(tokens), 2**bits, dtype=torch.bool).scatter_(1, tokens, True)
    needed = (tokens[:, :, None] ^ tokens[:, None]).flatten(1)
    return present.gather(1, needed).view(len(tokens), tokens.shape[1], -1).any(-1)


def sequences(count: int, tokens: int, bits: int, seed: int) -> TensorSet:
    """``count`` sequences (count, tokens) and their labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 2**bits, (count, tokens), generator=generator)
    found = torch.cat([labels(part, bits) for part in x.split(4096)])
    return TensorSet(x, found)


class Detector(nn.Module):
    """Tokens (B, N), integers of ``bits`` bits, to logits (B, N)."""

    def __init__(self, blocks: list[nn.Module], bits: int, width: int):
        super().__init__()
        self.bits = bits
        self.embedding = nn.Linear(bits, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        shifts = torch.arange(self.bits, device=tokens.device)
        signs = 1 - 2 * ((tokens[..., None] >> shifts) & 1)
        x = self.embedding(signs.to(self.head.weight.dtype))
        for part in self.blocks:
            x = part(x)
        return self.head(self.norm(x))[..., 0]


class Match3Task(Task):
    config: Match3Xor

    def build_model(self) -> nn.Module:
        model, data = self.config.model, self.config.data
        blocks: list[nn.Module] = [
            block(model.attention, model.width, model.heads, 4 * model.width, gain=model.gain)
            for _ in range(model.n_layers)
        ]
        return Detector(blocks, data.bits, model.width)

    def build_data(self) -> Data:
        data = self.config.data
        train = sequences(data.train_samples, data.tokens, data.bits, 2 * data.seed)
        return Data(train, {"test": sequences(data.test_samples, data.tokens, data.bits, 2 * data.seed + 1)})

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        logits = model(x)
        return F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="sum"), y.numel()

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> dict[str, tuple[Tensor, int]]:
        x, y = batch
        logits = model(x).float()
        nll = F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="sum")
        return {"accuracy": (((logits > 0) == y).sum(), y.numel()), "nll": (nll, y.numel())}

    def flops_per_token(self) -> int:
        """Of the blocks, forward."""
        model, data = self.config.model, self.config.data
        return model.n_layers * forward_flops(model.attention, model.width, 4 * model.width, data.tokens)

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        points = [(m["step"], m["test/accuracy"]) for m in read_metrics(folder.parent) if "test/accuracy" in m]
        positive = float(data.test["test"].tensors[1].double().mean())  # type: ignore[attr-defined]
        majority = max(positive, 1 - positive)
        figure = new_figure(6.5, 4.0)
        ax = figure.subplots()
        ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label="test accuracy")
        ax.axhline(majority, color="0.4", linestyle="--", label=f"the majority's label, {majority:.3f}")
        config = self.config.model
        layers = f"{config.n_layers} layer{'s' if config.n_layers > 1 else ''}"
        ax.set(xlabel="step", ylabel="accuracy", ylim=(0.5, 1.01))
        ax.set_title(f"{config.attention} attention, {layers}, {self.flops_per_token() / 1e3:.0f} kflop a token")
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
        figure.savefig(folder / "accuracy.png", dpi=130)


register("match3_xor", Match3Xor, task=Match3Task)
