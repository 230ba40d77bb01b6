"""Convolutions by one-way filters against the dense layer that they replace: weights, arithmetic and time.

The three are different things, so each has its column. ``seq`` on a GPU, in bfloat16 and channels-last, is one kernel;
``cp`` is its chain of four convolutions, timed beside it, and so is everything on a CPU. Peers are the dense
convolution with the same kernel, the chain of convolutions written out, and for ``cp`` tltorch's. Beside the peak
memory of forward+backward stands what a forward pass keeps for the backward one, its input and output aside: the chain
keeps what lies between its filters, the kernel and ``recompute=True`` do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import _harness as harness
from ._harness import BOTH, FORWARD, OURS, Built, Case, Settings

DENSE, CHAIN, RECOMPUTE, TLTORCH = "dense conv2d", "chain of conv2d", "torchlayers, recompute", "tltorch cp_conv"


class Inputs(NamedTuple):
    """x (N, C, n, n), bias (O,), cotangent g (N, O, n, n), and the factors.

    ``seq``: V (R, C, k, 1) and H (O, R, 1, k). ``cp``: the factor matrices of tltorch, (O, R), (C, R), (k, R), (k, R).
    """

    x: torch.Tensor
    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor
    g: torch.Tensor
    format: str

    @property
    def padding(self) -> int:
        factor = self.factors[0] if self.format == "seq" else self.factors[2]
        return (factor.shape[2] if self.format == "seq" else factor.shape[0]) // 2

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.x, *self.factors, self.bias)


def make_inputs(
    format: str,
    batch: int,
    c: int,
    o: int,
    n: int,
    k: int,
    rank: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """An odd kernel of k × k, padded so that the image keeps its size; channels-last on a GPU."""
    generator = torch.Generator(device).manual_seed(0)
    form = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    if format == "seq":
        factors = normal(rank, c, k, 1, std=(c * k) ** -0.5), normal(o, rank, 1, k, std=(rank * k) ** -0.5)
    else:
        factors = (
            normal(o, rank, std=rank**-0.5),
            normal(c, rank, std=c**-0.5),
            normal(k, rank, std=k**-0.5),
            normal(k, rank, std=k**-0.5),
        )
    x, g = (normal(batch, channels, n, n).contiguous(memory_format=form) for channels in (c, o))
    return Inputs(x, factors, normal(o), g, format)


def dense_weight(factors: Sequence[torch.Tensor], format: str) -> torch.Tensor:
    if format == "seq":
        return torch.einsum("orj,rci->ocij", factors[1][:, :, 0], factors[0][..., 0])
    return torch.einsum("or,cr,ir,jr->ocij", *factors)


def chain(x: torch.Tensor, *rest: torch.Tensor, format: str, padding: int) -> torch.Tensor:
    """The convolutions of the format, written out."""
    *factors, bias = rest
    if format == "seq":
        return F.conv2d(F.conv2d(x, factors[0], padding=(padding, 0)), factors[1], bias, padding=(0, padding))
    weights, rank = cp_filters(factors), factors[0].shape[1]
    x = F.conv2d(F.conv2d(x, weights[0]), weights[1], padding=(padding, 0), groups=rank)
    return F.conv2d(F.conv2d(x, weights[2], padding=(0, padding), groups=rank), weights[3], bias)


def cp_filters(factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The factor matrices as kernels of convolutions, in the order of application."""
    out, inside, vertical, horizontal = factors
    return [
        inside.T[:, :, None, None],
        vertical.T[:, None, :, None],
        horizontal.T[:, None, None, :],
        out[:, :, None, None],
    ]


def reference(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Output and gradients of x, the factors and the bias in float64, by one convolution with the dense kernel."""
    leaves = [t.double().requires_grad_() for t in inputs.tensors]
    x, *factors, bias = leaves
    y = F.conv2d(x, dense_weight(factors, inputs.format), bias, padding=inputs.padding)
    return y.detach(), *torch.autograd.grad(y, leaves, inputs.g.double())


def weights(format: str, c: int, o: int, k: int, rank: int) -> dict[str, int]:
    """Numbers that are trained, the bias not counted."""
    own = rank * k * (c + o) if format == "seq" else rank * (c + o + 2 * k)
    return {DENSE: c * o * k * k, CHAIN: own}


def work(
    format: str, batch: int, c: int, o: int, n: int, k: int, rank: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The filters' arithmetic, every output point counted with all its taps; bytes of each tensor once.

    Weights and floating-point operations of each implementation stand under "costs".
    """
    count, pixels = weights(format, c, o, k, rank), batch * n * n
    math_ = {"math": "bf16" if dtype == torch.bfloat16 else "fp32"}
    moved = (pixels * (c + o) + count[CHAIN] + o) * dtype.itemsize
    found: dict[str, Any] = {}
    for mode, times in ((FORWARD, 1), (BOTH, 3)):
        costs = {name: {"weights": w, "flops": 2 * times * w * pixels} for name, w in count.items()}
        costs[OURS] = costs[TLTORCH] = costs[CHAIN]
        costs[RECOMPUTE] = costs[CHAIN]
        found[mode] = {"flops": costs[CHAIN]["flops"], "bytes": (1 + (times > 1)) * moved, "costs": costs} | math_
    return found


def _built(inputs: Inputs, function: Callable[..., torch.Tensor]) -> Built:
    leaves = [t.detach().requires_grad_() for t in inputs.tensors]
    return Built(lambda: function(*leaves), leaves, inputs.g)


def ours(inputs: Inputs, recompute: bool = False) -> Built:
    from torchlayers.functional import separable_conv

    axes = [(0,), (1,)] if inputs.format == "seq" else [(), (0,), (1,), ()]

    def call(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        *factors, bias = rest
        filters = factors if inputs.format == "seq" else cp_filters(factors)
        return separable_conv(x, filters, bias, padding=inputs.padding, axes=axes, recompute=recompute)

    return _built(inputs, call)


def chained(inputs: Inputs) -> Built:
    return _built(inputs, functools.partial(chain, format=inputs.format, padding=inputs.padding))


class _Dense(torch.autograd.Function):
    """The dense layer by a kernel that is there beforehand; its gradient is handed on to the factors.

    So it can be held against the same reference. Handing on takes about one pixel's time for each term.
    """

    @staticmethod
    def forward(ctx, x, weight, format, padding, bias, *factors):
        ctx.save_for_backward(x, weight, *factors)
        ctx.format, ctx.padding = format, padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx, g):
        x, weight, *factors = ctx.saved_tensors
        pads = [ctx.padding] * 2
        gx, gw, gb = torch.ops.aten.convolution_backward(
            g, x, weight, [weight.shape[0]], [1, 1], pads, [1, 1], False, [0, 0], 1, [True] * 3
        )
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in factors]
            found = torch.autograd.grad(dense_weight(leaves, ctx.format), leaves, gw)
        return gx, None, None, None, gb, *found


def dense(inputs: Inputs) -> Built:
    """``F.conv2d`` with the dense kernel: what the factors replace."""
    weight = dense_weight([t.double() for t in inputs.factors], inputs.format).to(inputs.x.dtype)
    if inputs.x.is_cuda:
        weight = weight.contiguous(memory_format=torch.channels_last)

    def call(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        *factors, bias = rest
        return _Dense.apply(x, weight, inputs.format, inputs.padding, bias, *factors)

    return _built(inputs, call)


class _Factorized(NamedTuple):
    """What tltorch's function reads of its own CP tensor."""

    shape: tuple[int, ...]
    rank: int
    factors: Sequence[torch.Tensor]
    weights: torch.Tensor


def tltorch_cp(inputs: Inputs) -> Built:
    from tltorch.functional.convolution import cp_conv

    ones = torch.ones(inputs.factors[0].shape[1], dtype=inputs.x.dtype, device=inputs.x.device)

    def call(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        *factors, bias = rest
        shape = tuple(f.shape[0] for f in factors)
        return cp_conv(x, _Factorized(shape, ones.numel(), factors, ones), bias, padding=inputs.padding)

    return _built(inputs, call)


def peers(format: str) -> dict[str, Callable[[Inputs], Built]]:
    found = {DENSE: dense, CHAIN: chained, RECOMPUTE: functools.partial(ours, recompute=True)}
    return found | ({TLTORCH: tltorch_cp} if format == "cp" else {})


def kept_bytes(built: Built, device: torch.device) -> int:
    """What a forward pass leaves allocated for the backward pass, without its output."""
    built.forward()  # tables and autotuning are not the call's
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        y = built.forward()
        return torch.cuda.memory_allocated(device) - before - y.untyped_storage().nbytes()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with harness._muted_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        y = built.forward()
    events = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(events) - y.untyped_storage().nbytes()


def measure(settings: Settings) -> list[dict[str, Any]]:
    """The cases as every family measures them, and what each implementation keeps."""
    rows = []
    for case in cases(settings.device.type):
        if settings.quick and not case.quick:
            continue
        harness.say(f"separable_conv {case.title}")
        measured = harness.measure_case(case, settings)
        if settings.memory:
            inputs, entries = case.inputs(settings.device), measured[-1]["implementations"]
            for name, who in {OURS: case.ours, **case.peers}.items():
                if entries[name]["status"] == "ok":
                    entries[name]["kept_bytes"] = kept_bytes(who(inputs), settings.device)
        rows += measured
        for row in measured:
            harness.say(f"    {row['mode']}: {harness.one_line(row)}")
    return rows


def _case(
    format: str,
    batch: int,
    c: int,
    o: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Case:
    sizes = (format, batch, c, o, n, k, rank)
    return Case(
        labels=dict(zip(("format", "N", "C", "O", "n", "k", "rank"), sizes, strict=True))
        | ({} if dtype == torch.float32 else {"dtype": "bf16"}),
        inputs=lambda device: make_inputs(*sizes, device, dtype),
        reference=reference,
        ours=ours,
        peers=peers(format),
        work=work(*sizes, dtype),
        # cp rounds three times on its way, and sums a million pixels.
        tolerance=1e-5 if dtype == torch.float32 else 3e-2,
        **more,
    )


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        bf16 = torch.bfloat16
        for k, rank in ((5, 32), (3, 32), (5, 16), (7, 32)):
            headline = (k, rank) == (5, 32)
            yield _case("seq", 16, 64, 64, 256, k, rank, bf16, headline=headline, quick=headline)
        yield _case("seq", 16, 64, 64, 256, 3, 64, bf16)  # no fewer bytes, two thirds of the arithmetic: dense
        yield _case("seq", 16, 64, 64, 256, 5, 32)  # float32: a chain
        yield _case("cp", 16, 64, 64, 256, 5, 64, bf16, headline=True)
        return
    for format, rank in (("seq", 32), ("cp", 64)):
        yield _case(format, 4, 64, 64, 32, 5, rank, headline=True)
        yield _case(format, 4, 64, 64, 32, 3, math.ceil(rank / 2))
        yield _case(format, 2, 8, 6, 9, 3, 3, quick=True)
    yield _case("seq", 4, 64, 64, 32, 3, 64)
