"""A low-rank linear map against two ``F.linear`` calls and against the dense map of the same size.

A CPU has no fused kernel: there ours is two matrix products, and what is measured is that its checks and its slices of
the factors cost nothing beside them. On a GPU, in bfloat16, the fused kernel at the ranks and rows where it is meant to
win, and where the dispatcher leaves it. The dense map's weight is the product of the factors in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ._harness import BOTH, FORWARD, Built, Case


class Inputs(NamedTuple):
    """x (M, K), factors V (r, K) and U (N, r) that hold twice the rank in use, bias (N,), cotangent g (M, N)."""

    x: torch.Tensor
    weight_in: torch.Tensor
    weight_out: torch.Tensor
    bias: torch.Tensor
    g: torch.Tensor
    rank: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[:4]


def make_inputs(m: int, k: int, n: int, rank: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
    """Factors of which the first half of the terms is in force, as after training: columns of U lie strided."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    held = min(2 * rank, k, n)
    weight_in, weight_out = normal(held, k, std=k**-0.5), normal(n, held, std=rank**-0.5)
    return Inputs(normal(m, k), weight_in, weight_out, normal(n), normal(m, n), rank)


def reference(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Output and gradients of x, V, U, bias in float64, by the formulas; terms beyond the rank get zeros."""
    x, v, u, bias, g = (t.double() for t in inputs[:5])
    b = inputs.rank
    v_b, u_b = v[:b], u[:, :b]
    h, gh = x @ v_b.T, g @ u_b
    gv, gu = torch.zeros_like(v), torch.zeros_like(u)
    gv[:b], gu[:, :b] = gh.T @ x, g.T @ h
    return h @ u_b.T + bias, gh @ v_b, gv, gu, g.sum(0)


def work(m: int, k: int, n: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Two products forward, four more backward; bytes of inputs, output and gradients once each, terms in use only."""
    product = 2 * m * rank * (k + n)
    numbers = (m + rank) * (k + n) + n
    math_ = {"math": "bf16" if dtype == torch.bfloat16 else "tf32x3"}
    return {
        FORWARD: {"flops": product, "bytes": numbers * dtype.itemsize} | math_,
        BOTH: {"flops": 3 * product, "bytes": 2 * numbers * dtype.itemsize} | math_,
    }


def _built(inputs: Inputs, function: Callable[..., torch.Tensor]) -> Built:
    leaves = [t.detach().requires_grad_() for t in inputs.tensors]
    return Built(lambda: function(*leaves), leaves, inputs.g)


def ours(inputs: Inputs) -> Built:
    from torchlayers.functional import low_rank_linear

    return _built(inputs, lambda x, v, u, bias: low_rank_linear(x, v, u, bias, rank=inputs.rank))


def two_linear(inputs: Inputs) -> Built:
    """Two ``F.linear`` on slices of the factors, as the definition reads."""
    b = inputs.rank
    return _built(inputs, lambda x, v, u, bias: F.linear(F.linear(x, v[:b]), u[:, :b], bias))


class _Dense(torch.autograd.Function):
    """The dense map by a weight that is there beforehand; its gradient is handed on to the factors.

    So it can be held against the same reference. Handing on takes rank / rows of the time.
    """

    @staticmethod
    def forward(ctx, x, v, u, bias, weight, rank):
        ctx.save_for_backward(x, v, u, weight)
        ctx.rank = rank
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        (x, v, u, weight), b = ctx.saved_tensors, ctx.rank
        gw = g.mT @ x
        gv, gu = torch.zeros_like(v), torch.zeros_like(u)
        gv[:b], gu[:, :b] = u[:, :b].mT @ gw, gw @ v[:b].mT
        return g @ weight, gv, gu, g.sum(0), None, None


def dense(inputs: Inputs) -> Built:
    """``F.linear`` by the product of the factors: what they replace."""
    b = inputs.rank
    weight = (inputs.weight_out[:, :b].double() @ inputs.weight_in[:b].double()).to(inputs.x.dtype)
    return _built(inputs, lambda x, v, u, bias: _Dense.apply(x, v, u, bias, weight, b))


PEERS = {"two F.linear": two_linear, "dense F.linear": dense}


def _case(m: int, k: int, n: int, rank: int, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
    return Case(
        labels={"M": m, "K": k, "N": n, "rank": rank},
        inputs=lambda device: make_inputs(m, k, n, rank, device, dtype),
        reference=reference,
        ours=ours,
        peers=PEERS,
        work=work(m, k, n, rank, dtype),
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        **more,
    )


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        bf16 = torch.bfloat16
        for m in (4096, 8192, 16384, 65536):
            for rank in (16, 32, 64, 128, 256):
                headline = m == 16384 and rank in (64, 128)
                yield _case(m, 1024, 1024, rank, bf16, headline=headline, quick=(m, rank) == (8192, 128))
        for rank in (64, 128):
            yield _case(16384, 4096, 4096, rank, bf16)
            yield _case(16384, 1024, 4096, rank, bf16)
        yield _case(256, 4096, 4096, 128, bf16)  # few rows: two products
        return
    for rank in (32, 64, 128):
        yield _case(4096, 512, 512, rank, headline=rank == 64)
    yield _case(256, 128, 96, 24, quick=True)
