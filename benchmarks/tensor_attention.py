"""Tensor attention: exact and windowed against what plain torch offers, and the polynomial path against the exact one.

Peers of the exact operation: ``scaled_dot_product_attention`` (on a GPU FlexAttention) over materialised pairs of keys,
a compiled einsum (over unfolded windows where there are any) and a loop over queries. Floating-point operations are
counted by pairs: two products of head_dim forward, eleven more backward. On a GPU with the shapes of arXiv 2507.02754.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ._harness import BOTH, FORWARD, Built, Case

Windows = tuple[int, int]


class Inputs(NamedTuple):
    """q, g (B, Hq, N, d); k1, k2, v1, v2 (B, Hk, N, d); ``windows`` are causal and count the query, None is no mask."""

    q: torch.Tensor
    k1: torch.Tensor
    k2: torch.Tensor
    v1: torch.Tensor
    v2: torch.Tensor
    g: torch.Tensor
    windows: Windows | None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[:5]


def make_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    n: int,
    d: int,
    windows: Windows | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    std: float = 1.0,
) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(h: int, std: float) -> torch.Tensor:
        return (std * torch.randn(batch, h, n, d, generator=generator, device=device)).to(dtype)

    q, k1, k2, v1, v2 = (normal(h, std) for h in (heads, *(kv_heads,) * 4))
    return Inputs(q, k1, k2, v1, v2, normal(heads, 1.0), windows)


def pairs(n: int, windows: Windows | None) -> int:
    """Pairs of keys that all queries of a head see together."""
    if windows is None:
        return n**3
    return sum(min(i + 1, windows[0]) * min(i + 1, windows[1]) for i in range(n))


def work(batch: int, heads: int, kv_heads: int, n: int, d: int, windows: Windows | None, dtype: torch.dtype) -> dict:
    """Operations by pairs, and the bytes of inputs, output and gradients once each."""
    product = 2 * d * batch * heads * pairs(n, windows)
    field = dtype.itemsize * batch * n * d
    forward = {"flops": 2 * product, "bytes": (2 * heads + 4 * kv_heads) * field}
    both = {"flops": 13 * product, "bytes": (5 * heads + 12 * kv_heads) * field}
    math_ = {"math": "bf16" if dtype == torch.bfloat16 else "tf32x3"}
    return {FORWARD: forward | math_, BOTH: both | math_}


def _visible(i: torch.Tensor, j: torch.Tensor, width: int) -> torch.Tensor:
    return (j <= i[:, None]) & (j > i[:, None] - width)


def reference(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Output and gradients in float64: the definition over all pairs, a few queries at a time."""
    leaves = [x.double().requires_grad_() for x in inputs.tensors]
    q, k1, k2, v1, v2 = leaves
    batch, heads, n, d = q.shape
    kv_heads = k1.shape[1]
    width1, width2 = inputs.windows or (n, n)
    most = 2**26 if q.is_cuda else 2**23
    rows = max(1, min(16, n, most // (batch * heads * width1 * width2)))
    gradients = [torch.zeros_like(x) for x in leaves]
    outputs = []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        low1, low2 = (max(0, start - w + 1) if inputs.windows else 0 for w in (width1, width2))
        high = stop if inputs.windows else n
        i = torch.arange(start, stop, device=q.device)
        query = q[:, :, start:stop].unflatten(1, (kv_heads, -1))
        a, b, x, y = k1[:, :, low1:high], k2[:, :, low2:high], v1[:, :, low1:high], v2[:, :, low2:high]
        logits = torch.einsum("bhgijc,bhkc->bhgijk", query[..., None, :] * a[:, :, None, None], b) * d**-0.5
        if inputs.windows:
            ok1 = _visible(i, torch.arange(low1, high, device=q.device), width1)
            ok2 = _visible(i, torch.arange(low2, high, device=q.device), width2)
            logits = logits.masked_fill(~(ok1[:, :, None] & ok2[:, None]), float("-inf"))
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        out = (torch.einsum("bhgijk,bhkc->bhgijc", weights, y) * x[:, :, None, None]).sum(-2).flatten(1, 2)
        found = torch.autograd.grad(out, leaves, inputs.g[:, :, start:stop].double())
        for total, part in zip(gradients, found, strict=True):
            total += part
        outputs.append(out.detach())
    return torch.cat(outputs, 2), *gradients


def _built(inputs: Inputs, function: Callable[..., torch.Tensor]) -> Built:
    leaves = [x.detach().requires_grad_() for x in inputs.tensors]
    return Built(lambda: function(*leaves), leaves, inputs.g)


def ours(inputs: Inputs) -> Built:
    from torchlayers.functional import tensor_attention

    options: dict[str, Any] = {"enable_gqa": True}
    if inputs.windows is not None:
        options |= {"is_causal": True, "window1": inputs.windows[0], "window2": inputs.windows[1]}
    return _built(inputs, functools.partial(tensor_attention, **options))


def _on_pairs(k1: torch.Tensor, k2: torch.Tensor) -> torch.Tensor:
    """(B, H, n², d): the elementwise products of all pairs of rows."""
    return (k1[:, :, :, None] * k2[:, :, None]).flatten(2, 3)


def sdpa_on_pairs(inputs: Inputs) -> Built:
    mask = None
    if inputs.windows is not None:
        i = torch.arange(inputs.q.shape[2], device=inputs.q.device)
        ok1, ok2 = (_visible(i, i, w) for w in inputs.windows)
        mask = (ok1[:, :, None] & ok2[:, None]).flatten(1)

    def forward(q, k1, k2, v1, v2):
        keys, values = _on_pairs(k1, k2), _on_pairs(v1, v2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    return _built(inputs, forward)


def flex_on_pairs(inputs: Inputs) -> Built:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert inputs.windows is not None
    n, (width1, width2) = inputs.q.shape[2], inputs.windows

    def seen(b, h, i, pair):
        j, k = pair // n, pair % n
        return (j <= i) & (j > i - width1) & (k <= i) & (k > i - width2)

    mask = create_block_mask(seen, None, None, n, n * n, device=inputs.q.device, _compile=True)
    compiled = torch.compile(flex_attention)

    def forward(q, k1, k2, v1, v2):
        return compiled(q, _on_pairs(k1, k2), _on_pairs(v1, v2), block_mask=mask, enable_gqa=True)

    return _built(inputs, forward)


def compiled_einsum(inputs: Inputs) -> Built:
    """All pairs at once, or the windows of all queries unfolded side by side."""
    n, d = inputs.q.shape[2:]

    def everything(q, k1, k2, v1, v2):
        q = q.unflatten(1, (k1.shape[1], -1))
        logits = torch.einsum("bhgijc,bhkc->bhgijk", q[..., None, :] * k1[:, :, None, None], k2) * d**-0.5
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        inner = torch.einsum("bhgijk,bhkc->bhgijc", weights, v2)
        return (inner * v1[:, :, None, None]).sum(-2).flatten(1, 2)

    def unfolded(q, k1, k2, v1, v2):
        assert inputs.windows is not None

        # (B, H, N, width, d). Not by unfold: on a CPU with several threads inductor gets its gradient wrong.
        def shifted(x, width):
            return F.pad(x, (0, 0, width - 1, 0))[:, :, i + torch.arange(width, device=x.device)]

        width1, width2 = inputs.windows
        i = torch.arange(n, device=q.device)[:, None]
        ok1, ok2 = (i + torch.arange(w, device=q.device) >= w - 1 for w in (width1, width2))
        q = q.unflatten(1, (k1.shape[1], -1))
        a = q[..., None, :] * shifted(k1, width1)[:, :, None]
        logits = torch.einsum("bhgijc,bhikc->bhgijk", a, shifted(k2, width2)) * d**-0.5
        logits = logits.masked_fill(~(ok1[:, :, None] & ok2[:, None]), float("-inf"))
        weights = logits.float().flatten(-2).softmax(-1).view_as(logits).to(q.dtype)
        inner = torch.einsum("bhgijk,bhikc->bhgijc", weights, shifted(v2, width2))
        return (inner * shifted(v1, width1)[:, :, None]).sum(-2).flatten(1, 2)

    return _built(inputs, torch.compile(everything if inputs.windows is None else unfolded))


def loop_over_queries(inputs: Inputs) -> Built:
    def forward(q, k1, k2, v1, v2):
        n, d = q.shape[2:]
        rows = []
        for i in range(n):
            low1, low2 = (max(0, i - w + 1) for w in inputs.windows) if inputs.windows else (0, 0)
            high = i + 1 if inputs.windows else n
            a = q[:, :, i, None] * k1[:, :, low1:high]
            logits = a @ k2[:, :, low2:high].mT * d**-0.5
            weights = logits.flatten(-2).softmax(-1).view_as(logits)
            rows.append((weights @ v2[:, :, low2:high] * v1[:, :, low1:high]).sum(-2))
        return torch.stack(rows, 2)

    return _built(inputs, forward)


def _exact(
    label: str,
    batch: int,
    heads: int,
    kv_heads: int,
    n: int,
    d: int,
    windows: Windows | None,
    peers: dict[str, Callable[[Inputs], Built]],
    *,
    dtype: torch.dtype = torch.float32,
    std: float = 1.0,
    **more: Any,
) -> Case:
    mask = "none" if windows is None else f"causal {windows[0]}×{windows[1]}"
    labels = {"op": label, "B": batch, "Hq": heads, "Hk": kv_heads, "d": d, "windows": mask, "N": n}
    if std != 1.0 or "std" in label:
        labels["std"] = std
    return Case(
        labels=labels,
        inputs=lambda device: make_inputs(batch, heads, kv_heads, n, d, windows, device, dtype, std),
        reference=reference,
        ours=ours,
        peers=peers,
        work=work(batch, heads, kv_heads, n, d, windows, dtype),
        **({"tolerance": 1e-5 if dtype == torch.float32 else 2e-2, "scale": "N"} | more),
    )


# ---------------------------------------------------------------- the polynomial path


class Bounded(NamedTuple):
    """Inputs of bounded entries for the polynomial path; the same layout as :class:`Inputs`."""

    q: torch.Tensor
    k1: torch.Tensor
    k2: torch.Tensor
    v1: torch.Tensor
    v2: torch.Tensor
    g: torch.Tensor
    causal: bool
    degree: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[:5]


def make_bounded(heads: int, n: int, d: int, degree: int, causal: bool, device: torch.device) -> Bounded:
    """Queries and keys uniform in [-1, 1], so that no logit is above 1 at scale 1/d; values normal about 1/2."""
    generator = torch.Generator(device).manual_seed(0)
    q, k1, k2 = (2 * torch.rand(1, heads, n, d, generator=generator, device=device) - 1 for _ in range(3))
    v1, v2 = (0.5 + torch.randn(1, heads, n, d, generator=generator, device=device) for _ in range(2))
    return Bounded(q, k1, k2, v1, v2, torch.randn(q.shape, generator=generator, device=device), causal, degree)


def _powers(x: torch.Tensor, degree: int) -> torch.Tensor:
    """1, x, x ⊗ x, ... side by side: (..., n, d) to (..., n, Σ_t d^t). Every monomial as often as its orderings."""
    power = torch.ones_like(x[..., :1])
    found = [power]
    for _ in range(degree):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)
        found.append(power)
    return torch.cat(found, -1)


def polynomial_reference(inputs: Bounded) -> tuple[torch.Tensor, ...]:
    """Output and gradients in float64 of softmax with Taylor's polynomial for exp, over tensor powers, by blocks."""
    leaves = [x.double().requires_grad_() for x in inputs.tensors]
    q, k1, k2, v1, v2 = leaves
    n, d = q.shape[2:]
    degree = inputs.degree
    coefficients = torch.cat([q.new_full((d**t,), d**-t / math.factorial(t)) for t in range(degree + 1)])
    size = 64 if inputs.causal else 1024

    def terms(k, v):  # (1, H, rows, features, d + 1)
        return _powers(k, degree)[..., None] * F.pad(v, (0, 1), value=1.0)[..., None, :]

    def total(carried, k, v):
        return carried + _powers(k, degree).mT @ F.pad(v, (0, 1), value=1.0)

    def read(q, sums):
        weights = _powers(q, degree) * coefficients
        both = torch.einsum("bhif,bhifc->bhic" if sums.ndim == 5 else "bhif,bhfc->bhic", weights, sums)
        return both[..., :-1] / both[..., -1:]

    def causal_block(q, k1, k2, v1, v2, carried1, carried2):
        sums1 = carried1[:, :, None] + terms(k1, v1).cumsum(2)
        sums2 = carried2[:, :, None] + terms(k2, v2).cumsum(2)
        return read(q, sums1 * sums2), sums1[:, :, -1], sums2[:, :, -1]

    sums1 = sums2 = q.new_zeros(1, q.shape[1], len(coefficients), d + 1)
    outputs = []
    blocks = [slice(start, start + size) for start in range(0, n, size)]
    if inputs.causal:
        for block in blocks:
            cut = [x[:, :, block] for x in leaves]
            out, sums1, sums2 = checkpoint(causal_block, *cut, sums1, sums2, use_reentrant=False)
            outputs.append(out)
    else:
        for block in blocks:
            sums1 = checkpoint(total, sums1, k1[:, :, block], v1[:, :, block], use_reentrant=False)
            sums2 = checkpoint(total, sums2, k2[:, :, block], v2[:, :, block], use_reentrant=False)
        outputs = [checkpoint(read, q[:, :, block], sums1 * sums2, use_reentrant=False) for block in blocks]
    out = torch.cat(outputs, 2)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.g.double())


def polynomial(inputs: Bounded) -> Built:
    from torchlayers.functional import polynomial_tensor_attention

    options = {"degree": inputs.degree, "scale": 1 / inputs.q.shape[3], "is_causal": inputs.causal}
    return _built(inputs, functools.partial(polynomial_tensor_attention, **options))  # type: ignore[arg-type]


def exact(inputs: Bounded) -> Built:
    from torchlayers.functional import tensor_attention

    options = {"scale": 1 / inputs.q.shape[3], "is_causal": inputs.causal}
    return _built(inputs, functools.partial(tensor_attention, **options))  # type: ignore[arg-type]


def _polynomial(label: str, heads: int, n: int, d: int, degree: int, *, causal: bool, compare: bool, **more) -> Case:
    return Case(
        labels={"op": label, "H": heads, "d": d, "degree": degree, "causal": causal, "N": n},
        inputs=lambda device: make_bounded(heads, n, d, degree, causal, device),
        reference=polynomial_reference,
        ours=polynomial,
        peers={"exact": exact} if compare else {},
        # The exact operation is held against the polynomial's result too.
        tolerance=1e-3,
        scale="N",
        **more,
    )


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        shape, windows, bf16 = (4, 64, 1), (32, 512), torch.bfloat16
        for n in (4096, 8192, 16384):
            yield _exact("exact", *shape, n, 128, windows, {}, dtype=bf16, headline=True, quick=n == 4096)
        peers = {"FlexAttention on pairs": flex_on_pairs, "compiled einsum": compiled_einsum}
        yield _exact("exact", 1, 64, 1, 2048, 128, windows, peers, dtype=bf16, headline=True, scale=None)
        # Signal to quantisation noise of 48, 47 and 43 dB.
        for std, decibel in ((0.5, 48), (1.0, 47), (1.5, 43)):
            yield _exact(
                "exact, by std", *shape, 4096, 128, windows, {}, dtype=bf16, std=std, modes=(FORWARD,), scale=None,
                tolerance=10 ** (-decibel / 20),
            )  # fmt: skip
        for d, degree in ((8, 4), (16, 2)):
            for n in (1024, 4096, 16384, 65536):
                compare = n <= 16384
                yield _polynomial(
                    "polynomial", 8, n, d, degree, causal=False, compare=compare, headline=n == 4096, quick=n == 1024
                )
        return
    for n in (32, 64, 128, 256):
        peers = {
            "SDPA on pairs": sdpa_on_pairs,
            "compiled einsum": compiled_einsum,
            "loop over queries": loop_over_queries,
        }
        yield _exact("exact", 1, 4, 4, n, 32, None, peers, headline=n == 256, quick=n == 32)
    for n in (256, 1024, 4096):
        peers = {"compiled einsum": compiled_einsum, "loop over queries": loop_over_queries}
        if n == 256:
            peers["SDPA on pairs"] = sdpa_on_pairs
        yield _exact("exact", 1, 4, 4, n, 32, (16, 64), peers, headline=n == 1024, quick=False)
    for n in (32, 64, 128, 256, 512):
        yield _polynomial("crossover", 1, n, 8, 4, causal=False, compare=True, headline=n in (64, 512), quick=n == 32)
    for causal, lengths in (
        (False, (1024, 4096, 16384, 65536)),
        (True, (1024, 4096)),
    ):  # causal: memory of the reference
        for n in lengths:
            headline = n == (4096 if causal else 16384)
            yield _polynomial("polynomial", 1, n, 8, 4, causal=causal, compare=False, headline=headline)
