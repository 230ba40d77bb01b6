"""What a rank computes on one hop: its queries against the keys and values that it holds for the moment.

Every mask of this family (causal, window, documents) is an interval of key positions per query, and the positions of
a shard ascend. So a hop is described by :class:`Mask` alone: query i sees the keys start[i] ≤ j < stop[i] of the shard,
and start and stop ascend. A :class:`Block` runs it: plain torch, our Triton kernel, or torch's own flash and cuDNN
kernels.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._attention import Window, keep_mask, merge_attention
from .._backend import import_kernels
from .._sequence import SequenceLayout, document_bounds

__all__ = ["Block", "Mask", "Options", "State", "Tokens", "make_block", "mask_between", "unsupported"]

_kernels = import_kernels("ring_block")
# Virtual ranks are threads: Triton's interpreter is at one place at a time, and a launch that measures its
# configurations wants the device for itself.
_launch = threading.Lock()

# Logits that the plain torch block holds at once.
_CHUNK = 2**21


# Which query sees which key


class Tokens:
    """The positions of a shard's tokens, ascending, given as ranges in order."""

    def __init__(self, runs: tuple[range, ...]) -> None:
        self.runs = runs
        self.length = sum(map(len, runs))
        self._on: dict[torch.device, Tensor] = {}

    @cached_property
    def positions(self) -> Tensor:
        """int64 (length,), on the CPU."""
        parts = [torch.arange(r.start, r.stop, r.step, device="cpu") for r in self.runs]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")

    def on(self, device: torch.device) -> Tensor:
        """The positions as int32, on ``device``."""
        if device not in self._on:
            self._on[device] = self.positions.to(device, torch.int32)
        return self._on[device]

    @property
    def affine(self) -> tuple[int, int, int, int] | None:
        """(base, split, base1, stride): token i is at base + stride·i for i < split, base1 + stride·(i - split) from
        there on; None where positions are not of this form."""
        if not self.runs:
            return 0, 0, 0, 1
        first, *rest = self.runs
        steps = {run.step for run in self.runs if len(run) > 1} or {1}
        if len(rest) > 1 or len(steps) > 1:
            return None
        return first.start, len(first), rest[0].start if rest else 0, steps.pop()


class Mask:
    """Which keys the queries see: those in the window and in the query's own document.

    Args:
        queries, keys: where they are.
        window: (left, right), -1 for unlimited; causal is right = 0.
        documents: the borders of packed documents, () for one document.
    """

    def __init__(self, queries: Tokens, keys: Tokens, window: Window, documents: tuple[int, ...]) -> None:
        self.queries, self.keys, self.window, self.documents = queries, keys, window, documents
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _limits(self, position: int) -> tuple[float, float]:
        """The first and last position that a query at ``position`` sees."""
        left, right = self.window
        first = position - left if left >= 0 else float("-inf")
        last = position + right if right >= 0 else float("inf")
        if self.documents:
            n = bisect_right(self.documents, position)
            first, last = max(first, self.documents[n - 1]), min(last, self.documents[n] - 1)
        return first, last

    @cached_property
    def empty(self) -> bool:
        """Whether no query sees a key. Decided from the ends of the runs: exact between single runs of step 1, and
        never True where one does."""
        for run in self.queries.runs:
            first, last = self._limits(run[0])[0], self._limits(run[-1])[1]
            if any(keys[0] <= last and keys[-1] >= first for keys in self.keys.runs):
                return False
        return True

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor]:
        """start, stop: query i sees the keys start[i] ≤ j < stop[i]; int32 (queries,), ascending, on the CPU."""
        left, right = self.window
        at, keys = self.queries.positions, self.keys.positions
        first = at - left if left >= 0 else torch.zeros_like(at)
        last = at + right if right >= 0 else torch.full_like(at, 2**62)
        if self.documents:
            doc_first, doc_last = self.document_limits(at.device)
            first, last = torch.maximum(first, doc_first), torch.minimum(last, doc_last)
        start, stop = (torch.searchsorted(keys, x, right=r, out_int32=True) for x, r in ((first, False), (last, True)))
        return start, torch.maximum(start, stop)

    def spans_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """:attr:`spans` on ``device``."""
        if device not in self._on:
            self._on[device] = self.spans[0].to(device), self.spans[1].to(device)
        return self._on[device]

    def document_limits(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first and last position of every query's document: int32 (queries,), on ``device``."""
        return _document_limits(self.queries, self.documents, device)

    @cached_property
    def rectangles(self) -> list[tuple[slice, slice, bool]]:
        """The mask as (queries, keys, causal): whole rectangles, and squares of which the lower triangle counts.

        For masks without a window's left end: each query sees the keys 0 ≤ j < stop[i].
        """
        stop = self.spans[1].tolist()
        found, a = [], 0
        while a < len(stop):
            b = a + 1
            while b < len(stop) and stop[b] == stop[a]:
                b += 1
            if b - a > 1 or b == len(stop) or stop[b] != stop[a] + 1:  # rows of one length
                if stop[a] > 0:
                    found.append((slice(a, b), slice(0, stop[a]), False))
            else:  # each one longer than the row above
                while b < len(stop) and stop[b] == stop[b - 1] + 1:
                    b += 1
                before = max(stop[a] - 1, 0)
                if before > 0:
                    found.append((slice(a, b), slice(0, before), False))
                top = a if stop[a] > 0 else a + 1
                found.append((slice(top, b), slice(before, stop[b - 1]), True))
            a = b
        return found


@lru_cache(maxsize=16)  # the same for every hop of a batch
def _document_limits(queries: Tokens, documents: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    first, last = (x[queries.positions] for x in document_bounds(documents, device="cpu"))
    return first.to(device, torch.int32), last.to(device, torch.int32)


@lru_cache(maxsize=256)
def _tokens(layout: str, rank: int | None) -> Tokens:
    whole = SequenceLayout.from_key(layout)
    return Tokens((range(whole.seq_len),) if rank is None else whole.runs(rank))


@lru_cache(maxsize=256)
def mask_between(
    q_layout: str, q_rank: int | None, k_layout: str, k_rank: int | None, window: Window, documents: tuple[int, ...]
) -> Mask:
    """The mask between two ranks' shards of layouts with the given keys; a rank of None is the whole sequence."""
    return Mask(_tokens(q_layout, q_rank), _tokens(k_layout, k_rank), window, documents)


# Blocks


@dataclass(frozen=True)
class Options:
    """What is the same on every hop.

    Attributes:
        scale: of the logits.
        dropout_p, seed: dropout by counter, see :func:`torchlayers._attention.keep_mask`.
        head_offset, heads: of ``heads`` query heads the call's are those from ``head_offset`` on.
    """

    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    head_offset: int = 0
    heads: int | None = None


@dataclass
class State:
    """Softmax over the keys seen so far: m a reference exponent (..., nq), l = Σ exp(s - m) (..., nq),
    acc = Σ exp(s - m) v (..., nq, dv). Dropout is in acc alone."""

    m: Tensor
    l: Tensor  # noqa: E741
    acc: Tensor
    out: Tensor
    lse: Tensor
    begun: bool = False
    done: bool = False


@dataclass
class Gradients:
    """What backward needs of the whole softmax, and the queries' gradient as it grows.

    Attributes:
        delta: Σ_c grad_out · out - grad_lse, (B, Hq, nq).
        dq: accumulates, wide.
    """

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor
    begun: bool = False


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Block(ABC):
    """One hop, forward and backward.

    Shapes: q (B, Hq, nq, d), k (B, Hkv, nk, d), v (B, Hkv, nk, dv); query head h reads key head h // (Hq / Hkv).
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def start(self, q: Tensor, channels: int) -> State:
        """The state before any key was seen; ``channels`` is dv."""
        rows, kind = q.shape[:3], wide(q.dtype)
        return State(
            m=q.new_full(rows, float("-inf"), dtype=kind),
            l=q.new_zeros(rows, dtype=kind),
            acc=q.new_zeros((*rows, channels), dtype=kind),
            out=q.new_empty((*rows, channels)),
            lse=q.new_empty(rows, dtype=kind),
        )

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: State, mask: Mask, last: bool) -> None:
        """Let the queries see these keys; ``last``: no others follow."""

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        """out (B, Hq, nq, dv) in q's dtype, lse (B, Hq, nq); 0 and -inf where nothing was seen."""
        if not state.done:
            nothing = state.l == 0
            state.out.copy_(state.acc / state.l.masked_fill(nothing, 1.0)[..., None])
            state.lse.copy_(torch.where(nothing, float("-inf"), state.m + state.l.log()))
        return state.out, state.lse

    def start_backward(
        self, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        """What :meth:`backward` takes on every hop."""
        kind = wide(q.dtype)
        delta = (grad_out.to(kind) * out.to(kind)).sum(-1).contiguous()
        if grad_lse is not None:
            delta -= grad_lse
        return Gradients(grad_out, grad_lse, out, lse, delta, q.new_zeros(q.shape, dtype=kind))

    @abstractmethod
    def backward(self, q: Tensor, k: Tensor, v: Tensor, grads: Gradients, mask: Mask) -> tuple[Tensor, Tensor]:
        """Add to ``grads.dq`` what comes through these keys; return their gradients dk and dv, new and wide."""


class TorchBlock(Block):
    """Plain torch: any device and dtype; a chunk of queries at a time, so nothing of size nq × nk."""

    def _chunks(self, q: Tensor, mask: Mask) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """(queries, keys that any of them sees, which of these each sees or None for all)."""
        start, stop = mask.spans
        nq = q.shape[2]
        rows = max(16, _CHUNK // max(1, q.shape[0] * q.shape[1] * mask.keys.length))
        for a in range(0, nq, rows):
            b = min(a + rows, nq)
            j0, j1 = int(start[a]), int(stop[b - 1])
            if j0 >= j1:
                continue
            seen = None
            if j0 != start[b - 1] or j1 != stop[a]:
                first, last = (x[a:b, None] for x in mask.spans_on(q.device))
                j = torch.arange(j0, j1, device=q.device, dtype=torch.int32)
                seen = (j >= first) & (j < last)
            yield slice(a, b), slice(j0, j1), seen

    def _keep(self, q: Tensor, mask: Mask, rows: slice, keys: slice) -> Tensor | None:
        """What dropout keeps, already divided by 1 - dropout_p."""
        o = self.options
        if o.dropout_p == 0.0:
            return None
        assert o.seed is not None
        i, j = mask.queries.on(q.device)[rows].long(), mask.keys.on(q.device)[keys].long()
        kept = keep_mask(o.seed, o.dropout_p, q.shape[0], q.shape[1], i, j, head_offset=o.head_offset, heads=o.heads)
        return kept.to(wide(q.dtype)) / (1.0 - o.dropout_p)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: State, mask: Mask, last: bool) -> None:
        kind, kv_heads = wide(q.dtype), k.shape[1]
        k, v = k.to(kind), v.to(kind)
        for rows, keys, seen in self._chunks(q, mask):
            s = _fold(q[:, :, rows].to(kind) * self.options.scale, kv_heads) @ k[:, :, keys].mT
            s = s.view(*q.shape[:2], rows.stop - rows.start, keys.stop - keys.start)
            if seen is not None:
                s.masked_fill_(~seen, float("-inf"))
            m, l, acc = state.m[:, :, rows], state.l[:, :, rows], state.acc[:, :, rows]  # noqa: E741
            top = torch.maximum(m, s.amax(-1))
            base = top.masked_fill(top == float("-inf"), 0.0)
            p = s.sub_(base[..., None]).exp_()
            old = (m - base).exp()
            l.mul_(old).add_(p.sum(-1))
            m.copy_(top)
            keep = self._keep(q, mask, rows, keys)
            if keep is not None:
                p *= keep
            acc.mul_(old[..., None]).add_((_fold(p, kv_heads) @ v[:, :, keys]).view_as(acc))

    def backward(self, q: Tensor, k: Tensor, v: Tensor, grads: Gradients, mask: Mask) -> tuple[Tensor, Tensor]:
        kind, kv_heads, scale = wide(q.dtype), k.shape[1], self.options.scale
        k, v = k.to(kind), v.to(kind)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        # A query that sees nothing at all has P = exp(-inf - inf) = 0.
        lse = torch.where(grads.lse == float("-inf"), float("inf"), grads.lse)
        for rows, keys, seen in self._chunks(q, mask):
            folded = _fold(q[:, :, rows].to(kind) * scale, kv_heads)
            grad_out = _fold(grads.grad_out[:, :, rows].to(kind), kv_heads)
            s = (folded @ k[:, :, keys].mT).view(*q.shape[:2], rows.stop - rows.start, keys.stop - keys.start)
            if seen is not None:
                s.masked_fill_(~seen, float("-inf"))
            p = s.sub_(lse[:, :, rows, None]).exp_()
            dp = (grad_out @ v[:, :, keys].mT).view_as(p)
            dropped, keep = p, self._keep(q, mask, rows, keys)
            if keep is not None:
                dropped = p * keep
                dp *= keep
            dv[:, :, keys] += _fold(dropped, kv_heads).mT @ grad_out
            ds = _fold(dp.sub_(grads.delta[:, :, rows, None]).mul_(p), kv_heads)
            dq = grads.dq[:, :, rows]
            dq += (ds @ k[:, :, keys]).view_as(dq) * scale
            dk[:, :, keys] += ds.mT @ folded
        return dk, dv


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, n, c) to (B, Hkv, Hq / Hkv · n, c): the heads that share keys as rows of one."""
    if x.shape[1] == kv_heads:
        return x
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads * x.shape[2], x.shape[3])


class TritonBlock(Block):
    """``kernels/ring_block.py``: hops merge inside the kernel, which loads and stores the state."""

    def _where(self, mask: Mask, device: torch.device) -> dict[str, Any]:
        o = self.options
        where: dict[str, Any] = {
            "window": mask.window, "scale": o.scale, "dropout_p": o.dropout_p, "seed": o.seed,
            "head_offset": o.head_offset, "heads": o.heads,
        }  # fmt: skip
        for name, tokens in (("q", mask.queries), ("k", mask.keys)):
            where[f"{name}_runs"] = tokens.affine or (0, tokens.length, 0, 1)
            where[f"{name}_positions"] = tokens.on(device) if tokens.affine is None else None
        first, last = mask.document_limits(device) if mask.documents else (None, None)
        return where | {"doc_first": first, "doc_last": last}

    def start(self, q: Tensor, channels: int) -> State:
        rows = q.shape[:3]
        m, l, lse = (q.new_empty(rows, dtype=torch.float32) for _ in range(3))  # noqa: E741
        acc = q.new_empty(0, dtype=torch.float32)  # made where a second hop needs it
        return State(m, l, acc, q.new_empty((*rows, channels)), lse)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: State, mask: Mask, last: bool) -> None:
        assert _kernels is not None
        first = not state.begun
        if first and not last:
            state.acc = torch.empty(state.out.shape, dtype=torch.float32, device=q.device)
        running = (None,) * 3 if first and last else (state.acc, state.m, state.l)
        results = (state.out, state.lse) if last else (None, None)
        with _launch:
            _kernels.ring_block_forward(q, k, v, *running, *results, first=first, **self._where(mask, q.device))
        state.begun, state.done = True, last

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        if not state.begun:  # no hop had anything to see
            return state.out.zero_(), state.lse.fill_(float("-inf"))
        return super().finish(state)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, grads: Gradients, mask: Mask) -> tuple[Tensor, Tensor]:
        dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        assert _kernels is not None
        with _launch:
            _kernels.ring_block_backward(
                grads.grad_out, q, k, v, grads.lse, grads.delta, grads.dq, dk, dv,
                first_q=not grads.begun, first_kv=True, **self._where(mask, q.device),
            )  # fmt: skip
        grads.begun = True
        return dk, dv


class SdpaBlock(Block):
    """One of torch's attention kernels, by its output and LSE: each hop is cut into whole rectangles and causal
    squares, and their results are merged in float32."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: State, mask: Mask, last: bool) -> None:
        for rows, keys, causal in mask.rectangles:
            aligned = _aligned(q[:, :, rows], k[:, :, keys], v[:, :, keys])
            out, lse = self._attend(aligned[0], aligned[1], aligned[2], causal)
            # m and acc serve as the LSE and the output so far.
            acc, m = state.acc[:, :, rows], state.m[:, :, rows]
            merged, merged_lse = merge_attention(acc, m, out[..., : acc.shape[-1]].to(acc.dtype), lse.to(m.dtype))
            acc.copy_(merged)
            m.copy_(merged_lse)

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        return state.out.copy_(state.acc), state.m

    def start_backward(
        self, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        if 0 in grad_out.stride() or grad_out.stride(-1) != 1:  # expanded, as the gradient of a sum is
            grad_out = grad_out.contiguous()
        return super().start_backward(q, out, lse, grad_out, grad_lse)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, grads: Gradients, mask: Mask) -> tuple[Tensor, Tensor]:
        kind = wide(q.dtype)
        dk, dv = torch.zeros_like(k, dtype=kind), torch.zeros_like(v, dtype=kind)
        for rows, keys, causal in mask.rectangles:
            grad_out, out = grads.grad_out[:, :, rows], grads.out[:, :, rows]
            value = v[:, :, keys]
            if grads.grad_lse is not None:
                # One more channel, in which grad_out · out is -grad_lse and grad_out · v is 0.
                grad_out = torch.cat([grad_out, -grads.grad_lse[:, :, rows, None].to(grad_out.dtype)], -1)
                out, value = F.pad(out, (0, 1), value=1.0), F.pad(value, (0, 1))
            q_, k_, v_, out, grad_out = _aligned(q[:, :, rows], k[:, :, keys], value, out, grad_out)
            lse = grads.lse[:, :, rows].contiguous()
            dq, own_dk, own_dv = self._differentiate(grad_out, q_, k_, v_, out, lse, causal)
            grads.dq[:, :, rows] += dq[..., : q.shape[-1]]
            dk[:, :, keys] += own_dk[..., : k.shape[-1]]
            dv[:, :, keys] += own_dv[..., : v.shape[-1]]
        return dk, dv

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _differentiate(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class FlashBlock(SdpaBlock):
    """torch's flash attention, on CUDA (float16, bfloat16) and on the CPU."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        aten, scale = torch.ops.aten, self.options.scale
        if q.device.type == "cpu":
            k, v = (_repeated(x, q.shape[1]) for x in (k, v))
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]

    def _differentiate(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        aten, scale = torch.ops.aten, self.options.scale
        if q.device.type == "cpu":
            heads = k.shape[1]
            k, v = (_repeated(x, q.shape[1]) for x in (k, v))
            dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
            )
            return dq, _summed(dk, heads), _summed(dv, heads)
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the dropout's state
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused, scale=scale
        )


class CudnnBlock(SdpaBlock):
    """cuDNN's attention through torch, on CUDA (float16, bfloat16)."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=self.options.scale
        )
        return found[0], found[1].reshape(q.shape[:3])

    def _differentiate(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse[..., None], unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0,
            causal, scale=self.options.scale,
        )  # fmt: skip


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With zeros for channels up to one common multiple of 8, as these kernels want it."""
    channels = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    return tuple(x if x.shape[-1] == channels else F.pad(x, (0, channels - x.shape[-1])) for x in tensors)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _summed(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).to(wide(x.dtype)).sum(2)


_BLOCKS: dict[str, type[Block]] = {
    "torch": TorchBlock, "triton": TritonBlock, "flash": FlashBlock, "cudnn": CudnnBlock,
}  # fmt: skip


def make_block(name: str, options: Options) -> Block:
    """The block of that name."""
    return _BLOCKS[name](options)


def unsupported(
    name: str, q: Tensor, k: Tensor, v: Tensor, window: Window, documents: bool, dropout: bool
) -> str | None:
    """What of this call the block does not do, in words, or None."""
    if name == "triton":
        if v.shape[3] == 0:
            return "values without channels"
        return None if _kernels is None else _kernels.ring_block_supported(q, k, v)  # what else, use_triton says
    if name in ("flash", "cudnn"):
        if window[0] >= 0 or window[1] > 0:
            return "windows"
        if documents:
            return "documents"
        if dropout:
            return "dropout"
        if q.device.type not in (("cpu", "cuda") if name == "flash" else ("cuda",)):
            return f"tensors on {q.device.type}"
        if q.device.type == "cuda" and q.dtype not in (torch.float16, torch.bfloat16):
            return str(q.dtype).removeprefix("torch.")
    return None
