"""A byte-level language model on the help texts that come with Python, with tensor attention in every k-th layer.

The arms differ in those layers alone and have equal parameters: tensor attention over windows of both sets,
standard attention, and standard attention over the same window. Much of what tensor attention gains at this size is
locality, which the last arm shows. At a billion active parameters arXiv 2507.02754 saw no gain, from two billion on a
small one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_int
from ..training import Config, Data, DataConfig, Task, TensorSet, group, key, register
from ..training.plots import new_figure
from ._transformer import FORMS, STANDARD, block

BYTES = 256
SLIDING = "sliding"


@dataclass
class Model:
    attention: str = key("trilinear", "of every k-th layer: trilinear, determinant, strassen, standard or sliding")
    every: int = key(2, "k: which layers differ; the others have standard attention")
    window1: int = key(8, "tokens of the first set, or those that sliding attention sees")
    window2: int = key(8, "tokens of the second set")
    n_layers: int = key(3, "blocks")
    width: int = key(64, "channels")
    heads: int = key(4, "attention heads")
    num_kv_heads: int | None = key(None, "key heads of tensor attention (as many as query heads by default)")
    gain: float = key(1.5, "first value of the gains on normalised queries and keys")

    def __post_init__(self) -> None:
        check_choice("model.attention", self.attention, (*FORMS, STANDARD, SLIDING))
        for name in ("every", "window1", "window2", "n_layers"):
            check_int(f"model.{name}", getattr(self, name))


@dataclass
class TextData(DataConfig):
    batch_size: int = key(8, "windows in an optimizer step, over all ranks and micro-batches")
    context: int = key(64, "bytes that a window predicts")
    train_bytes: int | None = key(None, "bytes of the training text to use (all by default)")
    test_windows: int = key(64, "windows of the test text, spread evenly; 0 for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.context", self.context)
        check_int("data.test_windows", self.test_windows, minimum=0)


@dataclass
class TensorLM(Config):
    model: Model = group(Model)
    data: TextData = group(TextData)


def text() -> Tensor:
    """The help texts of Python's topics, in alphabetical order, as bytes: uint8 (about 460 000,)."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(f"{name}\n\n{topics[name]}" for name in sorted(topics))
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8)


def windows(data: Tensor, context: int) -> Tensor:
    """Windows of context + 1 bytes, int64 (count, context + 1), each beginning with the last one's last byte."""
    if len(data) <= context:
        raise ValueError(f"data.context must be below the text's {len(data)} bytes, got {context}")
    return data.long().unfold(0, context + 1, context)


class LanguageModel(nn.Module):
    """Bytes (B, T) to logits of the next ones (B, T, 256); the embedding is the output's weight too."""

    def __init__(self, blocks: list[nn.Module], context: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for part in self.blocks:
            x = part(x)
        return F.linear(self.norm(x), self.embedding.weight)


class TensorLMTask(Task):
    config: TensorLM

    def build_model(self) -> nn.Module:
        model = self.config.model
        blocks: list[nn.Module] = []
        for i in range(model.n_layers):
            differs = (i + 1) % model.every == 0
            kind = model.attention if differs else STANDARD
            tensor = kind in FORMS
            limits: tuple[int | None, int | None] = (None, None)
            if tensor or kind == SLIDING:
                limits = (model.window1, model.window2)
            # Six square matrices in tensor attention and four in standard: the MLP makes up for the two.
            hidden = (4 if tensor or not differs else 5) * model.width
            options = {"kv2_bias": True, "num_kv_heads": model.num_kv_heads} if tensor else {}
            blocks.append(
                block(
                    STANDARD if kind == SLIDING else kind,
                    model.width,
                    model.heads,
                    hidden,
                    gain=model.gain,
                    is_causal=True,
                    windows=limits,
                    **options,
                )
            )
        return LanguageModel(blocks, self.config.data.context, model.width)

    def build_data(self) -> Data:
        data = self.config.data
        whole = text()
        train, test = whole[: len(whole) * 9 // 10][: data.train_bytes], whole[len(whole) * 9 // 10 :]
        held = windows(test, data.context)
        if data.test_windows:
            held = held[torch.linspace(0, len(held) - 1, min(data.test_windows, len(held))).long()]
        return Data(TensorSet(windows(train, data.context)), {"text": TensorSet(held)})

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]

    def _nats(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        (tokens,) = batch
        logits = model(tokens[:, :-1])
        target = tokens[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), target, reduction="sum"), target.numel()

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return self._nats(model, batch)

    def evaluate(self, model: nn.Module, batch: Any, name: str) -> dict[str, tuple[Tensor, int]]:
        nats, count = self._nats(model, batch)
        return {"bits_per_byte": (nats / math.log(2), count)}

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        tokens = data.test["text"].tensors[0].to(next(model.parameters()).device)  # type: ignore[attr-defined]
        losses = []
        for part in tokens.split(32):
            logits = model(part[:, :-1]).float()
            losses.append(F.cross_entropy(logits.mT, part[:, 1:], reduction="none").cpu() / math.log(2))
        by_position = torch.cat(losses).mean(0)
        figure = new_figure(6.5, 4.0)
        ax = figure.subplots()
        ax.plot(range(1, len(by_position) + 1), by_position.tolist())
        config = self.config.model
        ax.set(xlabel="bytes seen", ylabel="bits per byte")
        ax.set_title(f"Test text: {config.attention} attention, one layer of {config.every}")
        ax.grid(alpha=0.3)
        figure.savefig(folder / "bits_per_byte.png", dpi=130)


register("tensor_lm", TensorLM, task=TensorLMTask)
