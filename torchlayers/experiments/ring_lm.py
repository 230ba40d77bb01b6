"""A byte-level language model whose sequences are cut over ranks: ring attention in an ordinary training run.

``mesh.sp`` ranks hold each sequence together, ``mesh.dp`` groups of them different sequences. The loss of every step is
that of one process, whatever the mesh and the layout: labels are shifted before the sequence is cut, positions are
global, and ranks add sums and counts, never means. A trained model is an ordinary one that takes whole sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .._checks import check_choice, check_int
from ..ring_attention import RingMultiheadAttention, SequenceLayout, shard_batch
from ..training import Config, Data, DataConfig, Task, TensorSet, group, key, register
from ..training.plots import new_figure
from .tensor_lm import BYTES, text, windows

LAYOUTS = ("contiguous", "zigzag", "striped")
SCHEDULES = ("ring", "allgather")
IGNORED = -100


@dataclass
class Model:
    n_layers: int = key(2, "blocks")
    width: int = key(64, "channels")
    heads: int = key(4, "attention heads")
    window: int | None = key(None, "bytes that a query sees, its own included (all before it by default)")

    def __post_init__(self) -> None:
        for name in ("n_layers", "width", "heads"):
            check_int(f"model.{name}", getattr(self, name))
        if self.width % 2:
            raise ValueError(f"model.width must be even, got {self.width}")
        if self.window is not None:
            check_int("model.window", self.window)


@dataclass
class TextData(DataConfig):
    batch_size: int = key(16, "windows in an optimizer step, over all ranks and micro-batches")
    context: int = key(128, "bytes of a window, over all ranks of mesh.sp")
    train_bytes: int | None = key(None, "bytes of the training text to use (all by default)")
    test_windows: int = key(128, "windows of the test text, spread evenly; 0 for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.context", self.context, minimum=2)
        check_int("data.test_windows", self.test_windows, minimum=0)


@dataclass
class RingLM(Config):
    model: Model = group(Model)
    data: TextData = group(TextData)
    layout: str = key("zigzag", "which bytes of a window each rank of mesh.sp holds: contiguous, zigzag or striped")
    schedule: str = key("ring", "how keys and values travel: ring, or allgather")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.model.window is not None and self.layout == "zigzag":
            raise ValueError("layout must be contiguous or striped with model.window, got zigzag")


def waves(position_ids: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions, wave lengths from 2π to 2π · 10⁴ in equal ratios: (..., width), float32.

    Source: arXiv 1706.03762, section 3.5.
    """
    frequency = 1e4 ** -torch.linspace(0.0, 1.0, width // 2, device=position_ids.device)
    angle = position_ids[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class Block(nn.Module):
    """A pre-norm block. All but the attention works on each token by itself and knows nothing of the ranks."""

    def __init__(self, width: int, heads: int, **attention: Any):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = RingMultiheadAttention(width, heads, batch_first=True, is_causal=True, **attention)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, layout: SequenceLayout, mesh: DeviceMesh | None) -> Tensor:
        x = x + self.attention(self.norm1(x), layout=layout, mesh=mesh)[0]
        return x + self.mlp(self.norm2(x))


class RingLanguageModel(nn.Module):
    """Bytes (B, T) to logits of the next ones (B, T, 256); the embedding is the output's weight too.

    T is the whole sequence, or with ``position_ids``, ``layout`` and ``mesh`` what this rank holds of it. Positions
    enter as waves, in which the distance of two tokens is easily read; they have no parameters, so that a longer
    sequence than those in training is no error.
    """

    def __init__(self, width: int, heads: int, n_layers: int, **attention: Any):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(Block(width, heads, **attention) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        layout: SequenceLayout | None = None,
        mesh: DeviceMesh | None = None,
    ) -> Tensor:
        if layout is None:
            layout = SequenceLayout(tokens.shape[1], world=1)
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)
        width = self.embedding.embedding_dim
        x = self.embedding(tokens) * width**0.5
        x = x + waves(position_ids, width).to(x.dtype)
        for block in self.blocks:
            x = block(x, layout, mesh)
        return F.linear(self.norm(x), self.embedding.weight)


class RingLMTask(Task):
    config: RingLM

    def build_model(self) -> nn.Module:
        model = self.config.model
        return RingLanguageModel(
            model.width, model.heads, model.n_layers, window_size=model.window, schedule=self.config.schedule
        )

    def build_data(self) -> Data:
        data = self.config.data
        whole = text()
        train, test = whole[: len(whole) * 9 // 10][: data.train_bytes], whole[len(whole) * 9 // 10 :]
        # The last byte of a window predicts none: the next window begins with it.
        held = windows(test, data.context - 1)
        if data.test_windows:
            held = held[torch.linspace(0, len(held) - 1, min(data.test_windows, len(held))).long()]
        return Data(TensorSet(windows(train, data.context - 1)), {"text": TensorSet(held)})

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]

    def shard_batch(self, batch: Any, mesh: DeviceMesh) -> dict[str, Any]:
        (tokens,) = batch
        layout = SequenceLayout(tokens.shape[1], mesh["sp"].size(), self.config.layout)
        return {**shard_batch({"input_ids": tokens, "labels": tokens}, layout, mesh), "layout": layout, "mesh": mesh}

    def _nats(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        logits = model(batch["input_ids"], batch["position_ids"], batch["layout"], batch["mesh"])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        labels = batch["labels"].flatten()
        nats = F.cross_entropy(wide.flatten(0, 1), labels, reduction="sum", ignore_index=IGNORED)
        return nats, (labels != IGNORED).sum()

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self._nats(model, batch)

    def evaluate(self, model: nn.Module, batch: dict[str, Any], name: str) -> dict[str, tuple[Tensor, Tensor]]:
        nats, count = self._nats(model, batch)
        return {"bits_per_byte": (nats / math.log(2), count)}

    def plots(self, model: nn.Module, data: Data, folder: Path) -> None:
        """Bits per byte against the bytes that the model has seen, and their means over stretches of growing length."""
        tokens = data.test["text"].tensors[0].to(next(model.parameters()).device)  # type: ignore[attr-defined]
        losses = []
        for part in tokens.split(16):
            logits = model(part)[:, :-1].float()
            losses.append(F.cross_entropy(logits.mT, part[:, 1:], reduction="none").cpu() / math.log(2))
        by_position = torch.cat(losses).mean(0)
        seen = torch.arange(1, len(by_position) + 1)
        borders = [1]
        while borders[-1] <= len(by_position):
            borders.append(max(borders[-1] + 1, round(borders[-1] * 2**0.5)))
        figure = new_figure(6.5, 4.0)
        ax = figure.subplots()
        ax.plot(seen, by_position, ".", color="tab:blue", alpha=0.25, markersize=4)
        ends = [slice(a - 1, b - 1) for a, b in pairwise(borders)]
        middles = [float(seen[s].float().log().mean().exp()) for s in ends]
        ax.plot(middles, [float(by_position[s].mean()) for s in ends], color="tab:blue", linewidth=2)
        ax.set(xscale="log", xlabel="bytes seen", ylabel="bits per byte", title="Test text")
        ax.grid(alpha=0.3)
        figure.savefig(folder / "bits_per_byte.png", dpi=130)


register("ring_lm", RingLM, task=RingLMTask)
