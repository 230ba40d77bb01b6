"""How long a sequence fits: what a rank holds and sends, counted, against formulas; what follows for many ranks.

Counted, on virtual ranks of this process: the bytes that autograd saves for backward in one attention call (of the
ring, of the paper's ring self-attention, which keeps whole rows of scores, and of its Linformer) against length and
ranks; and the bytes that the ring sends. Models, checked by these counts where they overlap: the paper's memory tables,
the longest sequence within a budget that follows from them, and the share of time that computes on a network of given
latency and bandwidth (an α–β model).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_int, check_ints
from .._ring import Channel, LoopbackWorld
from ..ring_attention import (
    SequenceLayout,
    linformer_attention,
    ring_attention,
    ring_self_attention,
    sp_comm_model,
    sp_largest,
    sp_memory_model,
)
from ..training import Config, Context, key, register
from ..training.plots import new_figure

# Latency in seconds and usable bytes/s in one direction. What a network is taken to be, not what one was measured at.
NETWORKS = {
    "NVLink": (3e-6, 360e9),
    "InfiniBand 400 Gb/s": (8e-6, 45e9),
    "Ethernet 25 Gb/s": (30e-6, 2.8e9),
}
# The shapes that the models are drawn for: a BERT-base layer for the memory tables, Llama-3-8B's attention in bfloat16
# for the network.
BERT = {"hidden": 768, "heads": 12, "head_dim": 64}
LLAMA: dict[str, Any] = {"heads": 32, "num_kv_heads": 8, "head_dim": 128}


@dataclass
class MaxSequence(Config):
    lengths: list[int] = key([128, 256, 512, 1024], "tokens of the whole sequence")
    worlds: list[int] = key([1, 2, 4, 8], "ranks")
    heads: int = key(4, "query heads (and key heads, of ring self-attention and Linformer)")
    kv_heads: int = key(2, "key heads of the ring")
    head_dim: int = key(16, "channels of a head")
    projected: int = key(32, "rows K of Linformer's projections")
    layout: str = key("zigzag", "of the ring: contiguous, zigzag or striped")
    budget: float = key(16.0, "memory of a rank in GiB, for the longest sequence that fits")
    layers: int = key(12, "layers of the model that is to fit")
    batch: int = key(1, "sequences of the model that is to fit")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lengths", "worlds"):
            values = check_ints(name, getattr(self, name))
            if len(set(values)) < 2:
                raise ValueError(f"{name} must hold two different values at least, got {list(values)}")
        for name in ("heads", "kv_heads", "head_dim", "projected", "layers", "batch"):
            check_int(name, getattr(self, name))
        check_choice("layout", self.layout, ("contiguous", "zigzag", "striped"))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads ({self.heads}), got {self.kv_heads}")
        if not self.budget > 0:
            raise ValueError(f"budget must be over 0 GiB, got {self.budget}")


# ---- counting


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd of this thread saves for backward, each storage once."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:  # type: ignore[override]
        super().__enter__()
        return self

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


Attend = Callable[..., Tensor]


def attend_ring(config: MaxSequence, layout: SequenceLayout, group: Channel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = ring_attention(q, k, v, layout=layout, group=group, is_causal=True, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


def attend_rows(config: MaxSequence, layout: SequenceLayout, group: Channel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ring_self_attention(q, k, v, layout=layout, group=group)


def attend_linformer(
    config: MaxSequence, layout: SequenceLayout, group: Channel, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    e, f = (torch.randn(config.projected, q.shape[2], requires_grad=True) for _ in range(2))
    return linformer_attention(q, k, v, e, f, group=group)


# Name in metrics, title, the call, and whether all heads have keys.
METHODS: dict[str, tuple[str, Attend, bool]] = {
    "ring": ("ring", attend_ring, False),
    "ring_self_attention": ("ring self-attention, rows of scores (P = 1: none)", attend_rows, True),
    "linformer": ("Linformer", attend_linformer, True),
}


def saved_formula(config: MaxSequence, method: str, world: int, length: int, tokens: int) -> int:
    """Bytes of float32 that a rank with ``tokens`` of ``length`` saves.

    The ring, and ring self-attention on one rank, where it is plain attention: q, k, v, out and the log-sum-exp of each
    row. Ring self-attention: q, k, v and the (c, L) weights. Linformer: as plain attention over the K projected keys
    and values, with these, k and v themselves, and the rank's columns of E and F.
    """
    heads, d, rank = config.heads, config.head_dim, config.projected
    kv_heads = config.kv_heads if method == "ring" else heads
    plain = tokens * (2 * heads * d + 2 * kv_heads * d + heads)
    if method == "linformer":
        return 4 * (plain + tokens * 2 * rank + 2 * heads * rank * d)
    if method == "ring_self_attention" and world > 1:
        return 4 * tokens * heads * (3 * d + length)
    return 4 * plain


@dataclass(frozen=True)
class Count:
    """What was counted of one call, forward and backward, over ``world`` ranks; of the rank with most."""

    length: int
    world: int
    tokens: int
    saved: int
    sent_forward: int
    sent_backward: int


def count(config: MaxSequence, method: str, length: int, world: int) -> Count:
    _, attend, all_heads = METHODS[method]
    layout = SequenceLayout(length, world, config.layout if method == "ring" else "contiguous")
    kv_heads = config.heads if all_heads else config.kv_heads
    ranks = LoopbackWorld(world)

    def run(rank: int, group: Channel) -> tuple[int, int]:
        shape = (layout.length(rank), config.head_dim)
        q, k, v = (torch.randn(1, h, *shape, requires_grad=True) for h in (config.heads, kv_heads, kv_heads))
        with SavedBytes() as saved:
            out = attend(config, layout, group, q, k, v)
        sent = group.bytes_sent
        out.sum().backward()
        return saved.total, sent

    found = ranks.run(run)
    most = max(range(world), key=lambda r: found[r][0])
    saved, forward = found[most]
    return Count(length, world, layout.length(most), saved, forward, ranks.bytes_sent[most] - forward)


@register("max_sequence", MaxSequence)
def run(context: Context) -> dict[str, float]:
    config: MaxSequence = context.config
    cells = [(m, length, world) for m in METHODS for length in config.lengths for world in config.worlds]
    counts: dict[str, list[Count]] = {method: [] for method in METHODS}
    metrics: dict[str, float] = {}
    for step, (method, length, world) in enumerate(context.progress(cells, total=len(cells)), 1):
        found = count(config, method, length, world)
        counts[method].append(found)
        formula = saved_formula(config, method, world, length, found.tokens)
        line = {"length": length, "world": world, "tokens": found.tokens, "saved": found.saved, "formula": formula}
        context.report({"method": list(METHODS).index(method), **line, "sent": found.sent_forward}, step=step)
        name = f"saved_over_formula_{method}"
        metrics[name] = max(metrics.get(name, 0.0), abs(found.saved / formula - 1))
    # Bytes saved by the ring per token that a rank holds: one number for all lengths and worlds.
    per_token = [c.saved / c.tokens for c in counts["ring"]]
    metrics["ring_saved_per_token"] = sum(per_token) / len(per_token)
    metrics["ring_saved_per_token_spread"] = max(per_token) / min(per_token) - 1
    metrics["ring_sent_off_model"] = max(sent_off_model(config, c) for c in counts["ring"])
    longest = longest_sequences(config)
    for name, by_world in longest.items():
        metrics[f"longest_{name}"] = max(by_world.values())
    if context.main:
        plot(config, counts, longest, context.folder / "max_sequence.png")
    return metrics


def sent_off_model(config: MaxSequence, found: Count) -> int:
    """Bytes by which the count differs from the communication model, where all ranks hold the same."""
    if found.length % (2 * found.world):
        return 0
    model = sp_comm_model(
        1e-6, 1e9, length=found.tokens, world=found.world, heads=config.heads, num_kv_heads=config.kv_heads,
        head_dim=config.head_dim, element_size=4,
    )  # fmt: skip
    return abs(found.sent_forward - model.bytes_forward) + abs(found.sent_backward - model.bytes_backward)


def longest_sequences(config: MaxSequence) -> dict[str, dict[int, int]]:
    """By parallelism and ranks, the longest sequence that the memory tables fit into the budget, in float32."""
    elements = config.budget * 2**30 / 4
    found: dict[str, dict[int, int]] = {}
    for parallelism in ("tensor_parallel", "sequence_parallel", "linformer", "ring"):
        # Tensor parallelism shares out heads.
        worlds = [n for n in (1, 2, 4, 8, 12, 16, 32, 64) if parallelism != "tensor_parallel" or BERT["heads"] % n == 0]
        found[parallelism] = {
            n: sp_largest("seq_len", elements, parallelism, world=n, layers=config.layers, batch=config.batch, **BERT)
            for n in worlds
        }
    return found


# ---- the plot


def plot(config: MaxSequence, counts: dict[str, list[Count]], longest: dict[str, dict[int, int]], path: Path) -> None:
    figure = new_figure(12.5, 9.5)
    (saved, fits), (tables, network) = figure.subplots(2, 2)
    _plot_saved(config, counts, saved)
    _plot_longest(config, longest, fits)
    _plot_tables(tables)
    _plot_network(network)
    for ax in (saved, fits, tables, network):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _plot_saved(config: MaxSequence, counts: dict[str, list[Count]], ax: Any) -> None:
    styles = {"ring": "-", "ring_self_attention": "--", "linformer": ":"}
    lengths = sorted(config.lengths)
    for method, found in counts.items():
        for place, world in enumerate(config.worlds):
            formula = [
                saved_formula(config, method, world, length, math.ceil(length / world)) / 1e3 for length in lengths
            ]
            ax.plot(lengths, formula, styles[method], color=f"C{place}", linewidth=1.3)
            points = [(c.length, c.saved / 1e3) for c in found if c.world == world]
            ax.plot(*zip(*points, strict=True), "o", color=f"C{place}", markersize=4)
    handles = [ax.plot([], [], styles[m], color="0.3", label=METHODS[m][0])[0] for m in METHODS]
    handles += [ax.plot([], [], color=f"C{i}", linewidth=4, label=f"P = {w}")[0] for i, w in enumerate(config.worlds)]
    handles += ax.plot([], [], "o", color="0.3", markersize=4, label="counted")
    ax.legend(handles=handles, fontsize=8, ncols=2, loc="upper left")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(top=10 * ax.get_ylim()[1])  # room for the legend
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set(xlabel="length L", ylabel="kB saved for backward on a rank")
    ax.set_title("Saved bytes: counted (points) and by formula (lines)")


def _plot_longest(config: MaxSequence, longest: dict[str, dict[int, int]], ax: Any) -> None:
    labels = {
        "tensor_parallel": "tensor parallel",
        "sequence_parallel": "ring self-attention",
        "linformer": "Linformer",
        "ring": "ring",
    }
    for name, by_world in longest.items():
        style = "x--" if name == "tensor_parallel" else "o-"
        ax.plot(list(by_world), list(by_world.values()), style, markersize=5, label=labels[name])
    worlds = sorted({n for by_world in longest.values() for n in by_world})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(worlds, [str(n) for n in worlds])
    ax.set(xlabel="ranks", ylabel="tokens")
    ax.set_title(
        f"By the memory tables: longest sequence, {config.layers} layers of BERT-base,\nbatch {config.batch},"
        f" float32, {config.budget:g} GiB a rank"
    )
    ax.legend(fontsize=8)


def _plot_tables(ax: Any) -> None:
    hidden, world, seq_len = BERT["hidden"], 8, 512
    batches = [round(2 ** (i / 4)) for i in range(33)]
    batches = list(dict.fromkeys(batches))
    models = [sp_memory_model(batch, seq_len, world=world, **BERT) for batch in batches]
    tokens = [batch * seq_len for batch in batches]
    for place, layer in enumerate(("mlp", "attention")):
        for parallelism, style in (("tensor_parallel", "--"), ("sequence_parallel", "-")):
            values = [getattr(m, f"{layer}_{parallelism}") / 1e6 for m in models]
            label = f"{'MLP' if layer == 'mlp' else layer}, {parallelism.replace('_', ' ')}"
            ax.plot(tokens, values, style, color=f"C{place}", label=label)
    for place, crossing in enumerate((32 * hidden, 16 * BERT["heads"] * BERT["head_dim"])):
        ax.axvline(crossing, color=f"C{place}", linewidth=1, alpha=0.4)
        ax.text(crossing, 0.02, f" BL = {'32 H' if place == 0 else '16 AZ'}", color=f"C{place}", fontsize=8,
                transform=ax.get_xaxis_transform(), rotation=90)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel=f"tokens BL (L = {seq_len})", ylabel="million elements a rank")
    ax.set_title(f"The paper's memory tables: a BERT-base layer on {world} ranks")
    ax.legend(fontsize=8)


def _plot_network(ax: Any) -> None:
    lengths = [round(2 ** (8 + i / 4)) for i in range(45)]
    for place, (name, (alpha, beta)) in enumerate(NETWORKS.items()):
        models = [sp_comm_model(alpha, beta, length=c, world=8, **LLAMA) for c in lengths]
        ax.plot(lengths, [m.efficiency_forward for m in models], color=f"C{place}", label=f"{name}, forward")
        ax.plot(lengths, [m.efficiency_backward for m in models], "--", color=f"C{place}", label=f"{name}, backward")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="tokens a rank", ylabel="modelled share of time that computes", ylim=(0, 1.03))
    ax.set_title("α–β model, not measured: causal zigzag ring of 8 ranks,\nLlama-3-8B's attention, bfloat16")
    ax.legend(fontsize=8)
