"""Ring attention on virtual ranks of one device: against one call on the whole sequence, precision, overlap, a model.

All ranks of a ring run on one device, so that their times add up to one call's on the same work. "Blocks" are the hops
of all ranks without a transport; a ring's transport copies keys and values within the device, which costs it time here
that a network's would not. On a CPU with one thread a ring's rank threads are held to one core.

What a network adds is modelled, not measured, and stands beside what others measured and published:
ring-flash-attention's README (8 GPUs, Llama-3-8B's attention, 8192 tokens a GPU) gives the share of ideal flash
attention that it reaches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._harness import BOTH, FORWARD, OURS, Built, Case, Settings, measure_case, one_line, quantile, say

Results = tuple[torch.Tensor, ...]

# ring-flash-attention's README, August 2025: percent of ideal flash attention, (forward, forward + backward).
PUBLISHED = {
    "ring-flash-attention, zigzag, 8 × H800": (85.2, 90.2),
    "ring-flash-attention, striped, 8 × H800": (74.4, 82.9),
    "ring-flash-attention, contiguous, 8 × H800": (52.1, 53.9),
}
NVLINK = (3e-6, 360e9)  # seconds, usable bytes/s in one direction: assumed
BLOCK_RATE = (600e12, 500e12)  # flop/s of the block, forward and backward: assumed


class Inputs(NamedTuple):
    """q, g (B, Hq, L, d); k, v (B, Hkv, L, d): the whole sequence; and how it is cut."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    layout: Any
    is_causal: bool

    @property
    def window(self) -> tuple[int, int]:
        return (-1, 0) if self.is_causal else (-1, -1)


def make_inputs(
    heads: int,
    kv_heads: int,
    length: int,
    d: int,
    world: int,
    device: torch.device,
    dtype: torch.dtype,
    kind: str = "zigzag",
    is_causal: bool = True,
    seed: int = 0,
) -> Inputs:
    from torchlayers.ring_attention import SequenceLayout

    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, g = (
        torch.randn(1, h, length, d, generator=generator, device=device).to(dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return Inputs(q, k, v, g, SequenceLayout(length, world, kind), is_causal)


# Results are compared and handed over in pieces, the runs of all ranks: views of one call's output as of the ranks'
# shards, so that nobody is timed while copying.


def pieces(layout: Any, x: torch.Tensor) -> Results:
    """The runs of every rank, of a whole sequence."""
    runs = [run for rank in range(layout.world) for run in layout.runs(rank)]
    return tuple(x[:, :, run.start : run.stop : run.step] for run in runs)


def pieces_of_shards(layout: Any, shards: Sequence[torch.Tensor]) -> Results:
    """The same, of the ranks' shards."""
    found: list[torch.Tensor] = []
    for rank, shard in enumerate(shards):
        found += shard.split([len(run) for run in layout.runs(rank)], 2)
    return tuple(found)


def reference(inputs: Inputs) -> Results:
    """Output and gradients in float64, by their formulas, some queries at a time."""
    q, k, v, g = (x.double() for x in inputs[:4])
    length, scale = q.shape[2], q.shape[3] ** -0.5
    kv_heads = k.shape[1]
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    rows = max(1, min(length, (2**27 if q.is_cuda else 2**22) // (q.shape[1] * length)))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        seen = stop if inputs.is_causal else length

        def folded(x: torch.Tensor, a: int = start, b: int = stop) -> torch.Tensor:  # (1, Hkv, group · rows, d)
            return x[:, :, a:b].unflatten(1, (kv_heads, -1)).flatten(2, 3)

        def unfolded(x: torch.Tensor, a: int = start, b: int = stop) -> torch.Tensor:
            return x.unflatten(2, (-1, b - a)).flatten(1, 2)

        logits = folded(q) @ k[:, :, :seen].mT * scale
        if inputs.is_causal:
            i, j = torch.arange(start, stop, device=q.device), torch.arange(seen, device=q.device)
            hidden = (j > i[:, None]).repeat(q.shape[1] // kv_heads, 1)
            logits.masked_fill_(hidden, float("-inf"))
        weights = logits.softmax(-1)
        o, grad = weights @ v[:, :, :seen], folded(g)
        dv[:, :, :seen] += weights.mT @ grad
        ds = grad @ v[:, :, :seen].mT
        ds = ds.sub_((grad * o).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        dk[:, :, :seen] += ds.mT @ folded(q)
        out[:, :, start:stop], dq[:, :, start:stop] = unfolded(o), unfolded(ds @ k[:, :, :seen])
    return tuple(piece for x in (out, dq, dk, dv) for piece in pieces(inputs.layout, x))


# ---------------------------------------------------------------- who computes


class Whole(Built):
    """One call on the whole sequence."""

    def __init__(self, inputs: Inputs, function: Callable[..., torch.Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        super().__init__(lambda: function(*leaves), leaves, inputs.g)
        self.layout = inputs.layout

    def call(self, mode: str) -> Results:
        return tuple(piece for x in super().call(mode) for piece in pieces(self.layout, x))


class Ranks(Built):
    """The ranks' shards, and each rank's (out, dq, dk, dv) by ``run``."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(lambda: torch.empty(0))
        self.layout, self.inputs = inputs.layout, inputs
        ranks = range(self.layout.world)
        self.shards = [[self.layout.shard(x, 2, r).contiguous() for x in inputs[:4]] for r in ranks]

    def run(self, both: bool) -> Sequence[Results]:
        raise NotImplementedError

    def call(self, mode: str) -> Results:
        columns = zip(*self.run(mode == BOTH), strict=True)
        return tuple(piece for column in columns for piece in pieces_of_shards(self.layout, column))


class Ring(Ranks):
    """``ring_attention`` on a loopback world, whose messages take ``delay`` seconds."""

    def __init__(self, inputs: Inputs, backend: str | None = None, delay: float = 0.0) -> None:
        from torchlayers._ring import LoopbackWorld
        from torchlayers.functional import ring_attention

        super().__init__(inputs)
        self.world = LoopbackWorld(self.layout.world, delay, timeout=600.0)
        self.attention: Callable[..., Any] = functools.partial(
            ring_attention, layout=self.layout, is_causal=inputs.is_causal, enable_gqa=True, backend=backend
        )

    def run(self, both: bool) -> Sequence[Results]:
        def rank(r: int, group: Any) -> Results:
            *leaves, g = self.shards[r]
            if not both:
                with torch.no_grad():
                    return (self.attention(*leaves, group=group),)
            leaves = [x.detach().requires_grad_() for x in leaves]
            out = self.attention(*leaves, group=group)
            return (out.detach(), *torch.autograd.grad(out, leaves, g))

        return self.world.run(rank)


class Blocks(Ranks):
    """The hops of all ranks, one after the other, without autograd and without a transport.

    ``rounded``: what each hop finds is rounded to the inputs' dtype before it is merged in float32, as it is where
    hops are calls of a fused kernel.
    """

    def __init__(self, inputs: Inputs, name: str, rounded: bool = False) -> None:
        from torchlayers.ring_attention import blocks

        super().__init__(inputs)
        self.rounded = rounded
        q, k, v = self.shards[0][:3]
        reason = blocks.unsupported(name, q, k, v, inputs.window, False, False)
        if reason is not None:
            raise ValueError(f"the {name} block does not do {reason}")
        self.block = blocks.make_block(name, blocks.Options(scale=q.shape[3] ** -0.5))
        key, ranks = self.layout.key, range(self.layout.world)
        self.masks = [[blocks.mask_between(key, r, key, s, inputs.window, ()) for s in ranks] for r in ranks]

    def _sources(self, rank: int) -> list[int]:
        """The shards that the rank's queries see anything of, in the order in which they arrive."""
        order = [(rank - t) % self.layout.world for t in range(self.layout.world)]
        return [s for s in order if not self.masks[rank][s].empty]

    def run(self, both: bool) -> Sequence[Results]:
        forward = [self._forward(rank) for rank in range(self.layout.world)]
        if not both:
            return [(out,) for out, _ in forward]
        # The gradients of keys and values add up, as they do on their way round the ring.
        sums: list[list[torch.Tensor] | None] = [None] * self.layout.world
        dqs = []
        for rank, (out, lse) in enumerate(forward):
            q, _, _, g = self.shards[rank]
            grads = self.block.start_backward(q, out, lse, g, None)
            for source in self._sources(rank):
                k, v = self.shards[source][1:3]
                found: Results = self.block.backward(q, k, v, grads, self.masks[rank][source])
                if self.rounded:
                    found = tuple(x.to(k.dtype).to(x.dtype) for x in found)
                total = sums[source]
                if total is None:
                    sums[source] = list(found)
                else:
                    for whole, part in zip(total, found, strict=True):
                        whole += part
            dqs.append(grads.dq.to(q.dtype))
        kind = self.inputs.k.dtype
        return [
            (out, dq, *(x.to(kind) for x in dkv or ())) for (out, _), dq, dkv in zip(forward, dqs, sums, strict=True)
        ]

    def _forward(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        q, channels, sources = self.shards[rank][0], self.inputs.v.shape[3], self._sources(rank)

        def attend(sources: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            state = self.block.start(q, channels)
            for source in sources:
                k, v = self.shards[source][1:3]
                self.block.forward(q, k, v, state, self.masks[rank][source], last=source == sources[-1])
            return self.block.finish(state)

        if not self.rounded:
            return attend(sources)
        from torchlayers.functional import merge_attention

        hops = [attend([source]) for source in sources]
        out, lse = hops[0][0].float(), hops[0][1]
        for further in hops[1:]:
            out, lse = merge_attention(out, lse, *further)
        return out.to(q.dtype), lse


def sdpa(inputs: Inputs, backend: SDPBackend | None = None) -> Built:
    def forward(q, k, v):
        chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
        with chosen:
            return F.scaled_dot_product_attention(q, k, v, is_causal=inputs.is_causal, enable_gqa=True)

    return Whole(inputs, forward)


def flash_attention_3(inputs: Inputs) -> Built:
    from flash_attn_interface import flash_attn_func

    return _dao(inputs, flash_attn_func)


def flash_attention_4(inputs: Inputs) -> Built:
    from flash_attn.cute import flash_attn_func

    return _dao(inputs, flash_attn_func)


def _dao(inputs: Inputs, function: Callable[..., Any]) -> Built:
    def forward(q, k, v):
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=inputs.is_causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Whole(inputs, forward)


def blocks(name: str) -> Callable[[Inputs], Built]:
    return lambda inputs: Blocks(inputs, name)


def ring(backend: str | None = None) -> Callable[[Inputs], Built]:
    return lambda inputs: Ring(inputs, backend)


ONE_CALL: dict[str, Callable[[Inputs], Built]] = {
    "flash SDPA, one call": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "cuDNN SDPA, one call": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-3, one call": flash_attention_3,
    "FlashAttention-4, one call": flash_attention_4,
}
BLOCKS = {f"{name} blocks": blocks(key) for name, key in (("flash", "flash"), ("cuDNN", "cudnn"))}


def work(inputs_heads: int, length: int, d: int, is_causal: bool, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Two products of all pairs forward, five more backward."""
    pairs = length * (length + 1) // 2 if is_causal else length**2
    product = 2 * inputs_heads * d * pairs
    math = {"math": "bf16" if dtype == torch.bfloat16 else "tf32x3"}
    return {FORWARD: {"flops": 2 * product, **math}, BOTH: {"flops": 7 * product, **math}}


def _case(
    op: str,
    heads: int,
    kv_heads: int,
    d: int,
    c: int,
    world: int,
    ours: Callable[[Inputs], Built],
    peers: dict[str, Callable[[Inputs], Built]],
    *,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Case:
    labels = {"op": op, "Hq": heads, "Hkv": kv_heads, "d": d, "layout": "causal zigzag", "c": c, "P": world}
    return Case(
        labels=labels,
        inputs=lambda device: make_inputs(heads, kv_heads, c * world, d, world, device, dtype),
        reference=reference,
        ours=ours,
        peers=peers,
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        work=work(heads, c * world, d, True, dtype),
        **more,
    )


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        shape, bf16 = (32, 8, 128), torch.bfloat16
        for c, world in ((1024, 4), (2048, 8), (8192, 8)):
            headline = c == 8192
            options: dict[str, Any] = {"dtype": bf16, "headline": headline, "quick": c == 1024}
            yield _case("blocks", *shape, c, world, blocks("triton"), {**BLOCKS, **ONE_CALL}, **options)
            peers = {"triton blocks": blocks("triton"), **BLOCKS, "ring of flash blocks": ring("flash")}
            peers |= {"ring of cuDNN blocks": ring("cudnn"), **ONE_CALL}
            yield _case("ring", *shape, c, world, ring(), peers, **options)
        return
    for world in (1, 2, 4, 8):
        peers = {"SDPA, one call": sdpa, "torch blocks": blocks("torch"), "flash blocks": blocks("flash")}
        peers["ring of flash blocks"] = ring("flash")
        c = 2048 // world
        yield _case("ring", 8, 2, 64, c, world, ring(), peers, headline=world == 4, quick=world == 2)


# ---------------------------------------------------------------- precision


def mean_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().mean())


def largest_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def precision(world: int, device: torch.device, seeds: Sequence[int], length: int = 1024) -> list[dict[str, Any]]:
    """bfloat16 over ``world`` ranks against the same on one, and against the same block where each hop's results are
    rounded before they are merged. Full attention; ratios above 1: ours is nearer."""
    quantities = (("mean error of the output", 0, mean_error), ("largest error of dK", 2, largest_error))
    found: dict[str, dict[str, list[float]]] = {name: {} for name, _, _ in quantities}
    for seed in seeds:
        inputs = make_inputs(4, 4, length, 64, world, device, torch.bfloat16, "contiguous", False, seed)
        one = make_inputs(4, 4, length, 64, 1, device, torch.bfloat16, "contiguous", False, seed)
        built: dict[str, Built] = {OURS: Ring(inputs), "ours on one rank": Blocks(one, _block_of(inputs))}
        built["hops rounded, merged in float32"] = Blocks(inputs, _block_of(inputs), rounded=True)
        exact = _columns(reference(inputs))
        for who, implementation in built.items():
            columns = _columns(implementation.call(BOTH))
            for name, place, error in quantities:
                found[name].setdefault(who, []).append(error(columns[place], exact[place]))
    rows = []
    for name, by_who in found.items():
        entries: dict[str, dict[str, Any]] = {}
        for who, errors in by_who.items():
            entries[who] = {"status": "ok", "error": quantile(errors, 0.5)}
            if who != OURS:
                ratios = [theirs / ours for theirs, ours in zip(errors, by_who[OURS], strict=True)]
                entries[who] |= {
                    f"ratio{suffix}": quantile(ratios, at) for suffix, at in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8))
                }
        labels = {"op": "bfloat16", "H": 4, "d": 64, "L": length, "P": world}
        rows.append(_row(labels, name, entries, headline=world == 16))
    return rows


def _block_of(inputs: Inputs) -> str:
    return "triton" if inputs.q.is_cuda else "torch"


def _columns(results: Results) -> list[torch.Tensor]:
    """out, dq, dk, dv of the contiguous layout, whole."""
    count = len(results) // 4
    return [torch.cat(results[i * count : (i + 1) * count], 2) for i in range(4)]


# ---------------------------------------------------------------- overlap


def overlap(world: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """A ring whose messages are under way as long as a hop of the forward pass computes: its time beside compute's
    alone and communication's alone. The link is simulated, by a delay; the compute is real."""
    inputs = make_inputs(4, 4, length, 64, world, torch.device("cpu"), torch.float32)
    rows = []
    delay = quantile(_seconds(Ring(inputs), FORWARD, rounds), 0.5) / world
    for mode in (FORWARD, BOTH):
        compute = _seconds(Ring(inputs), mode, rounds)
        # Messages in a row: of keys and values world - 1 in each pass; gradients arrive one message after the last.
        messages = world - 1 if mode == FORWARD else 2 * world - 1
        wall = _seconds(Ring(inputs, delay=delay), mode, rounds)
        communication = messages * delay
        larger = [max(c, communication) for c in compute]
        samples = {OURS: wall, "the larger of compute and communication": larger}
        samples["compute, then communication"] = [c + communication for c in compute]
        entries: dict[str, dict[str, Any]] = {}
        for who, seconds in samples.items():
            entries[who] = {"status": "ok"} | {
                f"ms{suffix}": 1e3 * quantile(seconds, at) for suffix, at in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8))
            }
            if who != OURS:
                ratios = [a / b for a, b in zip(seconds, wall, strict=True)]
                entries[who] |= {
                    f"ratio{suffix}": quantile(ratios, at) for suffix, at in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8))
                }
        labels = {"op": "overlap, simulated link", "H": 4, "d": 64, "L": length, "P": world}
        rows.append(_row(labels, mode, entries, headline=True))
    return rows


def _seconds(built: Built, mode: str, rounds: int) -> list[float]:
    built.call(mode)
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        built.call(mode)
        samples.append(time.perf_counter() - start)
    return samples


# ---------------------------------------------------------------- the model


def modelled() -> list[dict[str, Any]]:
    """The α–β model of 8 NVLink ranks beside what ring-flash-attention measured on such machines."""
    from torchlayers.ring_attention import sp_comm_model

    shape: dict[str, Any] = {"heads": 32, "num_kv_heads": 8, "head_dim": 128}
    c, world = 8192, 8
    model = sp_comm_model(
        *NVLINK, length=c, world=world, flops_forward=BLOCK_RATE[0], flops_backward=BLOCK_RATE[1], **shape
    )
    times = {FORWARD: model.time_forward, BOTH: model.time_forward + model.time_backward}
    computes = {FORWARD: model.compute_forward, BOTH: model.compute_forward + model.compute_backward}
    rows = []
    for place, mode in enumerate((FORWARD, BOTH)):
        ideal = world * computes[mode]
        ratio = ideal / times[mode]
        entries: dict[str, dict[str, Any]] = {OURS: {"status": "ok", "ms": 1e3 * times[mode]}}
        entries["the block alone, as assumed"] = {
            "status": "ok", "ms": 1e3 * ideal, "ratio": ratio, "ratio_p20": ratio, "ratio_p80": ratio,
        }  # fmt: skip
        for name, percents in PUBLISHED.items():
            detail = f"{percents[place]:g} % of ideal flash attention"
            entries[name] = {"status": "published", "detail": detail}
        rates = "/".join(f"{rate / 1e12:.0f}" for rate in BLOCK_RATE)
        network = f"{NVLINK[0] * 1e6:g} µs, {NVLINK[1] / 1e9:g} GB/s, block {rates} TFLOP/s"
        labels = {"op": "α–β model", "network": network, "Hq": 32, "Hkv": 8, "d": 128, "c": c, "P": world}
        rows.append(_row(labels, f"{mode}, modelled", entries, headline=True))
    return rows


# ---------------------------------------------------------------- all of it


def _row(labels: dict[str, Any], mode: str, entries: dict[str, dict[str, Any]], headline: bool) -> dict[str, Any]:
    return {"case": labels, "mode": mode, "headline": headline, "scale": None, "work": {}, "implementations": entries}


@contextlib.contextmanager
def one_core(wanted: bool) -> Iterator[None]:
    """Hold this thread, and those that it starts, to one core: the ranks of a ring then take turns."""
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Rows of the cases, of precision, and on a CPU of overlap and of the model."""
    on_cpu = settings.device.type == "cpu"
    rows: list[dict[str, Any]] = []

    def take(title: str, make: Callable[[], list[dict[str, Any]]]) -> None:
        say(f"ring_attention {title}", end=" ")
        start = time.perf_counter()
        try:
            found = make()
        except Exception as error:  # one part that fails does not take the others with it
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found = [_row({"op": title}, FORWARD, {OURS: {"status": "failed", "detail": reason}}, headline=False)]
        rows.extend(found)
        say(f"({time.perf_counter() - start:.0f} s)")
        for row in found:
            say(f"    {row['mode']}: {one_line(row)}")

    # The allocations of a ring's threads are not in the profile from which a CPU's peak is taken.
    seen = dataclasses.replace(settings, memory=settings.memory and not on_cpu)
    for case in cases(settings.device.type):
        if case.quick or not settings.quick:
            with one_core(on_cpu and torch.get_num_threads() == 1):
                take(case.title, functools.partial(measure_case, case, seen))
    seeds = range(2 if settings.quick else 5)
    for world in (2, 4) if settings.quick else (2, 4, 8, 16, 32):
        take(f"bfloat16 P={world}", functools.partial(precision, world, settings.device, seeds))
    if on_cpu:
        if settings.speed:
            length, rounds = (512, 3) if settings.quick else (2048, 11)
            take("overlap", functools.partial(overlap, 4, length, rounds))
        take("model", modelled)
    return rows
