"""Tensor attention tile by tile in plain torch: O(n d) memory, forward and backward, any dtype and device.

A tile holds the logits of ``rows`` neighbouring queries, some j and all k that their windows reach; a running maximum
and sum make the joint softmax, as flash attention does over j alone. Where both windows are short, ``blocks``
neighbouring tiles go through torch at once. The backward pass keeps inputs, output and log-sum-exp only and computes
each tile again.

Shapes in comments: batch B, key heads H, tiles T, query heads of a key head G, queries I, keys J and K of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._attention import allowed, no_autocast, philox_keep
from .._backend import is_traced

__all__ = ["chunked_attention", "chunked_backward", "chunked_forward"]

# Logits that are held at once, unless ROWS queries and one j of all heads have more: 1 MiB in float32, where a core's
# cache still serves and torch's time per call hardly counts.
TILE = 2**18
ROWS = 16

# Tiles are exponentiated in base 2: on a CPU exp2 takes a third of exp's time, and no slow path below the normal range.
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class Chunk(NamedTuple):
    """``blocks`` tiles of ``rows`` queries each; the keys of the next tile begin ``rows`` later."""

    start: int
    blocks: int
    rows: int
    start1: int
    span1: int
    start2: int
    span2: int


def _reach(first: int, last: int, window: list[int], n: int) -> tuple[int, int]:
    """(start, length) of the keys that the queries at key coordinates first..last see."""
    left, right = window
    low = 0 if left < 0 else max(0, first - left)
    high = n if right < 0 else min(n, last + right + 1)
    return low, max(high - low, 0)


def _chunks(
    lanes: int, width: int, nq: int, n1: int, n2: int, window1: list[int], window2: list[int], shift1: int, shift2: int
) -> Iterator[Chunk]:
    """Cut the queries; ``lanes``: (batch, query head) pairs, ``width``: channels, ``shift``: query minus key offset."""
    if lanes == 0 or n1 == 0 or n2 == 0:
        return
    width1, width2 = sum(window1) + 1, sum(window2) + 1
    banded = min(*window1, *window2) >= 0
    # A tile's keys are its window's plus rows - 1, so that short windows want few rows.
    rows = min(ROWS, nq, max(1, min(width1, width2) // 4) if banded else ROWS)
    if banded and rows + width1 <= n1 and rows + width2 <= n2:
        span1, span2 = rows + width1 - 1, rows + width2 - 1
        most = max(1, TILE // (lanes * rows * span1 * max(span2, width)))
    else:
        most = 1
    start = 0
    while start < nq:
        blocks = min(most, (nq - start) // rows)
        if blocks > 1:
            first1, first2 = start + shift1 - window1[0], start + shift2 - window2[0]
            yield Chunk(start, blocks, rows, first1, span1, first2, span2)
            start += blocks * rows
            continue
        size = min(rows, nq - start)
        last = start + size - 1
        reach1 = _reach(start + shift1, last + shift1, window1, n1)
        reach2 = _reach(start + shift2, last + shift2, window2, n2)
        if reach1[1] and reach2[1]:
            yield Chunk(start, 1, size, *reach1, *reach2)
        start += size


class _Tiles:
    """One chunk of a call: what is read, masked, dropped and written for it."""

    def __init__(self, chunk: Chunk, group: int, masks, seed, dropout_p, windows, offsets, heads, limits):
        self.chunk, self.group = chunk, group
        self.seed, self.dropout_p, self.heads = seed, dropout_p, heads
        self.masks, self.windows, self.offsets = masks, windows, offsets
        self.limits = limits  # of the call so far, for tiles that see the same

    def queries(self, x: Tensor) -> Tensor:
        """(B, H G, nq, ...) to (B, H, T, G, I, ...)."""
        chunk = self.chunk
        x = x.narrow(2, chunk.start, chunk.blocks * chunk.rows)
        return x.unflatten(2, (chunk.blocks, chunk.rows)).unflatten(1, (-1, self.group)).transpose(2, 3)

    def write(self, target: Tensor, x: Tensor) -> None:
        self.queries(target).copy_(x)

    def _index(self, which: int, n: int, device) -> Tensor:
        """(T, span): the keys of each tile, clamped to those that exist."""
        start, span = self.chunk[3 + 2 * which], self.chunk[4 + 2 * which]
        tiles = torch.arange(self.chunk.blocks, device=device)[:, None] * self.chunk.rows
        return (start + tiles + torch.arange(span, device=device)).clamp(0, n - 1)

    def _inside(self, which: int, n: int) -> bool:
        """Whether there are keys at all places of the chunk."""
        start, span = self.chunk[3 + 2 * which], self.chunk[4 + 2 * which]
        return start >= 0 and start + (self.chunk.blocks - 1) * self.chunk.rows + span <= n

    def keys(self, which: int, x: Tensor, dim: int = 2) -> Tensor:
        """(B, H, n, c) to (B, H, T, span, c)."""
        start, span, rows = self.chunk[3 + 2 * which], self.chunk[4 + 2 * which], self.chunk.rows
        if self.chunk.blocks == 1:
            return x.narrow(dim, start, span).unsqueeze(dim)
        if self._inside(which, x.shape[dim]):
            x = x.narrow(dim, start, (self.chunk.blocks - 1) * rows + span)
            return x.unfold(dim, span, rows).movedim(-1, dim + 1).contiguous()
        index = self._index(which, x.shape[dim], x.device)
        return x.index_select(dim, index.flatten()).unflatten(dim, index.shape)

    def add(self, which: int, target: Tensor, x: Tensor) -> None:
        """The adjoint of :meth:`keys`."""
        if self.chunk.blocks == 1:
            target.narrow(2, self.chunk[3 + 2 * which], self.chunk[4 + 2 * which]).add_(x[:, :, 0])
        else:
            target.index_add_(2, self._index(which, target.shape[2], x.device).flatten(), x.flatten(2, 3))

    def _positions(self, which: int | None, device) -> Tensor:
        """Global positions (T, I) of the queries (None), or (T, span) of keys 1 or 2 (0, 1)."""
        chunk = self.chunk
        if which is None:
            start, span, offset = chunk.start, chunk.rows, self.offsets[0]
        else:
            start, span, offset = chunk[3 + 2 * which], chunk[4 + 2 * which], self.offsets[1 + which]
        tiles = torch.arange(chunk.blocks, device=device)[:, None] * chunk.rows
        return start + offset + tiles + torch.arange(span, device=device)

    def limit(self, which: int, n: int, like: Tensor) -> Tensor | None:
        """(B or 1, T or 1, I, span): inf where a query sees a key and -inf elsewhere; None where all see all."""
        chunk, mask, window = self.chunk, self.masks[which], self.windows[which]
        start, span = chunk[3 + 2 * which], chunk[4 + 2 * which]
        # Keys move on with the queries from tile to tile: what a window hides is the same in all.
        ahead = start - (chunk.start + self.offsets[0] - self.offsets[1 + which])
        left, right = window
        whole = (left < 0 or ahead >= chunk.rows - 1 - left) and (right < 0 or ahead + span - 1 <= right)
        plain = mask is None and self._inside(which, n)
        if whole and plain:
            return None
        key = (which, ahead, chunk.rows, span)
        if plain and key in self.limits:
            return self.limits[key]
        i, j = (torch.arange(size, device=like.device) for size in (chunk.rows, span))
        ok = allowed(i, j + ahead, window)[None, None]
        if not plain and chunk.blocks > 1:
            place = j + start + torch.arange(chunk.blocks, device=like.device)[:, None] * chunk.rows
            ok = ok & ((place >= 0) & (place < n))[:, None]
        if mask is not None:
            ok = ok & self.keys(which, mask, dim=1)[:, :, None]
        limit = torch.where(ok, float("inf"), float("-inf")).to(like.dtype)
        if plain:
            self.limits[key] = limit
        return limit

    def kept(self, low: int, high: int, device) -> Tensor:
        """(B, H, T, G, I, J, K): what dropout keeps of the keys low..high of set 1."""
        c0 = torch.arange(self.heads[0] * self.heads[1] * self.group, device=device)
        c0 = c0.view(self.heads[0], self.heads[1], 1, self.group, 1, 1, 1)
        i = self._positions(None, device)[:, None, :, None, None]
        j = self._positions(0, device)[:, None, None, low:high, None]
        k = self._positions(1, device)[:, None, None, None, :]
        return philox_keep(self.seed, self.dropout_p, c0, i, j, k)


def _combine(form: str, q: Tensor, k1: Tensor) -> tuple[Tensor, Tensor | None]:
    """a, b with S_ijk = a_ij·k2_k + b_ij."""
    if form == "trilinear":
        return q * k1, None
    if form == "determinant":
        return _cross(q, k1), None
    return q + k1, (q * k1).sum(-1)


def _combine_adjoint(form: str, q: Tensor, k1: Tensor, da: Tensor, db: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of q and k1, before the sums over j and over i."""
    if form == "trilinear":
        return da * k1, da * q
    if form == "determinant":
        return _cross(k1, da), _cross(da, q)
    assert db is not None
    return da + db[..., None] * k1, da + db[..., None] * q


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """The cross product of each three neighbouring channels."""
    x, y = torch.broadcast_tensors(x, y)
    return torch.linalg.cross(x.unflatten(-1, (-1, 3)), y.unflatten(-1, (-1, 3))).flatten(-2)


class _Setting:
    """The arguments of a call, widened to the dtype that is computed in, and its chunks."""

    def __init__(
        self, q, k1, k2, v1, v2, mask1, mask2, seed, scale, dropout_p, window1, window2, is_causal, form, offsets
    ):  # fmt: skip
        window1, window2 = ([left, 0 if is_causal else right] for left, right in (window1, window2))
        batch, heads, nq, _ = q.shape
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        # What lies in padding must not count, be it NaN.
        k1, v1 = (x if mask1 is None else x.masked_fill(~mask1[:, None, :, None], 0.0) for x in (k1, v1))
        k2, v2 = (x if mask2 is None else x.masked_fill(~mask2[:, None, :, None], 0.0) for x in (k2, v2))
        self.tensors = tuple(x.to(self.dtype) for x in (q, k1, k2, v1, v2))
        self.n1, self.n2 = k1.shape[2], k2.shape[2]
        self.form, self.scale, self.keep = form, scale, 1.0 - dropout_p
        group = heads // max(k1.shape[1], 1)
        shifts = offsets[0] - offsets[1], offsets[0] - offsets[2]
        self.lanes, self.width = batch * heads, max(q.shape[3], v1.shape[3])
        chunks = _chunks(self.lanes, self.width, nq, self.n1, self.n2, window1, window2, *shifts)
        limits: dict[tuple[int, ...], Tensor] = {}
        settings = ((mask1, mask2), seed, dropout_p, (window1, window2), offsets, (batch, k1.shape[1]), limits)
        self.chunks = (_Tiles(chunk, group, *settings) for chunk in chunks)

    def tiles(self, t: _Tiles) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(j, q, a, x) for the tiles of a chunk: x (B, H, T, G, I, J, K) are the masked logits, times scale and log2 e;
        a is that of _combine, times the same."""
        q, k1, k2 = self.tensors[:3]
        q = t.queries(q)[..., None, :]
        k1, k2 = t.keys(0, k1)[:, :, :, None, None], t.keys(1, k2)
        limit1, limit2 = t.limit(0, self.n1, q), t.limit(1, self.n2, q)
        chunk, scale = t.chunk, self.scale * LOG2_E
        step = max(1, TILE // (self.lanes * chunk.blocks * chunk.rows * max(chunk.span2, self.width)))
        for low in range(0, chunk.span1, step):
            j = slice(low, min(low + step, chunk.span1))
            a, b = _combine(self.form, q, k1[..., j, :])
            a = a * scale
            x = _rows(a, k2.mT)
            if b is not None:
                x += (b * scale)[..., None]
            # Many times as fast as filling by a bool mask.
            if limit1 is not None:
                x.clamp_(max=limit1[:, None, :, None, :, j, None])
            if limit2 is not None:
                x.clamp_(max=limit2[:, None, :, None, :, None])
            yield j, q, a, x


def _rows(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, H, T, G, I, J, c) times (B, H, T, c, e), as one matrix product a tile."""
    return (x.flatten(3, 5) @ matrix).unflatten(3, x.shape[3:6])


def _columns(x: Tensor, y: Tensor) -> Tensor:
    """Σ over G, I, J of x (..., K) and y (..., c): (B, H, T, K, c)."""
    return x.flatten(3, 5).mT @ y.flatten(3, 5)


def _finite(x: Tensor) -> Tensor:
    """0 in place of -inf: rows in which nothing is allowed."""
    return torch.where(x == float("-inf"), 0.0, x)


def _swaps(n1: int, n2: int, window1: list[int], window2: list[int], is_causal: bool, dropout_p: float) -> bool:
    """Whether the two sets should change places, so that the one of which a query sees more is inside, in the matrix
    products. Dropout tells the sets apart."""

    def seen(n: int, window: list[int]) -> int:
        left, right = window[0], 0 if is_causal else window[1]
        return n if left < 0 or right < 0 else min(n, left + 1 + right)

    return dropout_p == 0.0 and seen(n1, window1) > seen(n2, window2)


def chunked_forward(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    window1: list[int],
    window2: list[int],
    is_causal: bool,
    form: str,
    q_offset: int,
    k1_offset: int,
    k2_offset: int,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (B, Hq, nq, dv) in the dtype of q, lse (B, Hq, nq) float32, or float64 for float64.

    q (B, Hq, nq, d); k1, v1 (B, Hkv, n1, d | dv); k2, v2 (B, Hkv, n2, d | dv); masks (B, n1), (B, n2) bool; seed
    int64 (1,); windows [left, right].
    """
    if _swaps(k1.shape[2], k2.shape[2], window1, window2, is_causal, dropout_p):
        mirrored = -scale if form == "determinant" else scale
        return chunked_forward(
            q, k2, k1, v2, v1, mask2, mask1, seed, mirrored, dropout_p, window2, window1, is_causal, form,
            q_offset, k2_offset, k1_offset,
        )  # fmt: skip
    with torch.no_grad(), no_autocast(q):
        call = _Setting(
            q, k1, k2, v1, v2, mask1, mask2, seed, scale, dropout_p, window1, window2, is_causal, form,
            (q_offset, k1_offset, k2_offset),
        )  # fmt: skip
        out = q.new_zeros(*q.shape[:3], v1.shape[3])
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=call.dtype)
        for t in call.chunks:
            values1 = t.keys(0, call.tensors[3])[:, :, :, None, None]
            values2 = t.keys(1, call.tensors[4])
            top = t.queries(lse)
            total = torch.zeros_like(top)
            summed = top.new_zeros(*top.shape, v1.shape[3])
            for j, _, _, x in call.tiles(t):
                new = torch.maximum(top, x.flatten(-2).amax(-1))
                shift = _finite(new)
                x.sub_(shift[..., None, None]).exp2_()
                decay = (top - shift).exp2()
                total = total * decay + x.flatten(-2).sum(-1)
                if dropout_p > 0.0:
                    x *= t.kept(j.start, j.stop, x.device)
                inner = _rows(x, values2).mul_(values1[..., j, :]).sum(-2)
                summed = summed * decay[..., None] + inner
                top = new
            t.write(lse, (top + total.log2()) * LN_2)
            t.write(out, summed / torch.where(total == 0, 1.0, total * call.keep)[..., None])
        return out, lse


def chunked_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    out: Tensor,
    lse: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    window1: list[int],
    window2: list[int],
    is_causal: bool,
    form: str,
    q_offset: int,
    k1_offset: int,
    k2_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k1, k2, v1, v2 in their dtypes, from ``out`` and ``lse`` of :func:`chunked_forward`::

        P = exp(S - lse)    dP_ijk = dO_i·(v1_j ∘ v2_k)    dS = P ∘ (dP - dO_i·O_i + dlse_i)

    Source: arXiv 2405.16411, computed tile by tile.
    """
    if _swaps(k1.shape[2], k2.shape[2], window1, window2, is_causal, dropout_p):
        mirrored = -scale if form == "determinant" else scale
        dq, dk2, dk1, dv2, dv1 = chunked_backward(
            grad_out, grad_lse, q, k2, k1, v2, v1, out, lse, mask2, mask1, seed, mirrored, dropout_p, window2, window1,
            is_causal, form, q_offset, k2_offset, k1_offset,
        )  # fmt: skip
        return dq, dk1, dk2, dv1, dv2
    with torch.no_grad(), no_autocast(q):
        call = _Setting(
            q, k1, k2, v1, v2, mask1, mask2, seed, scale, dropout_p, window1, window2, is_causal, form,
            (q_offset, k1_offset, k2_offset),
        )  # fmt: skip
        key1, key2, value1, value2 = call.tensors[1:]
        grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in call.tensors)
        dq, dk1, dk2, dv1, dv2 = grads
        grad_out = grad_out.to(call.dtype)
        delta = (grad_out * out.to(call.dtype)).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        lse = _finite(lse) * LOG2_E
        for t in call.chunks:
            keys1, keys2 = t.keys(0, key1)[:, :, :, None, None], t.keys(1, key2)
            values1, values2 = t.keys(0, value1)[:, :, :, None, None], t.keys(1, value2)
            row_lse, row_delta = t.queries(lse)[..., None, None], t.queries(delta)[..., None, None]
            g = t.queries(grad_out)[..., None, :]
            chunk_dq = torch.zeros_like(t.queries(dq))
            chunk_dk1, chunk_dv1 = torch.zeros_like(t.keys(0, dk1)), torch.zeros_like(t.keys(0, dv1))
            chunk_dk2, chunk_dv2 = torch.zeros_like(keys2), torch.zeros_like(values2)
            for j, query, a, x in call.tiles(t):
                p = x.sub_(row_lse).exp2_()
                w = g * values1[..., j, :]
                ds = _rows(w, values2.mT)
                dropped = p
                if dropout_p > 0.0:
                    kept = t.kept(j.start, j.stop, x.device).to(call.dtype).div_(call.keep)
                    dropped = p * kept
                    ds *= kept
                chunk_dv2 += _columns(dropped, w)
                chunk_dv1[..., j, :] += (_rows(dropped, values2).mul_(g)).sum((3, 4))
                ds.sub_(row_delta).mul_(p)
                chunk_dk2 += _columns(ds, a)
                da = _rows(ds, keys2).mul_(call.scale)
                db = ds.sum(-1).mul_(call.scale) if form == "strassen" else None
                to_q, to_k1 = _combine_adjoint(form, query, keys1[..., j, :], da, db)
                chunk_dq += to_q.sum(-2)
                chunk_dk1[..., j, :] += to_k1.sum((3, 4))
            t.write(dq, chunk_dq)
            t.add(0, dk1, chunk_dk1)
            t.add(0, dv1, chunk_dv1)
            t.add(1, dk2, chunk_dk2.mul_(LN_2))
            t.add(1, dv2, chunk_dv2)
        dq, dk1, dk2, dv1, dv2 = (g.to(x.dtype) for g, x in zip(grads, (q, k1, k2, v1, v2), strict=True))
        return dq, dk1, dk2, dv1, dv2


# Eager calls go through an autograd.Function; what traces (torch.compile, torch.export) sees one operation, since the
# loops above depend on the sizes.

_forward_op = torch.library.custom_op("torchlayers::tensor_attention_chunked", chunked_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "torchlayers::tensor_attention_chunked_backward", chunked_backward, mutates_args=()
)


@_forward_op.register_fake
def _(q, k1, k2, v1, v2, *rest):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v1.shape[3])), q.new_empty(q.shape[:3], dtype=lse_dtype)


@_backward_op.register_fake
def _(grad_out, grad_lse, q, k1, k2, v1, v2, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k1, k2, v1, v2))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], *output, *inputs[5:8])
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiated(ctx, backward, grad_out, grad_lse):
    saved = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 17
    if grad_out is None:
        grad_out = torch.zeros_like(saved[5])
    return (*backward(grad_out, grad_lse, *saved, *ctx.options), *(None,) * 12)


def _refuse(ctx, *grads):
    raise RuntimeError(
        "tensor_attention is differentiable once; backend='dense' supports double backward, on sizes that it can hold"
    )


def _mapped(apply: Callable, size: int, in_dims: Sequence[int | None], arguments: Sequence) -> tuple:
    """``apply`` under vmap, whose dimension is joined with the batch; dropout would tell batches apart otherwise."""
    joined = []
    for x, dim in zip(arguments, in_dims, strict=True):
        if isinstance(x, Tensor):
            if x.dtype == torch.int64:  # the seed
                raise NotImplementedError("tensor_attention does not run under vmap with dropout: use its batch")
            x = (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        joined.append(x)
    results = tuple(z.unflatten(0, (size, -1)) for z in apply(*joined))
    return results, (0,) * len(results)


class _Backward(torch.autograd.Function):
    forward = staticmethod(chunked_backward)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _mapped(_Backward.apply, info.batch_size, in_dims, arguments)


class _Chunked(torch.autograd.Function):
    forward = staticmethod(chunked_forward)
    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return _differentiated(ctx, _Backward.apply, grad_out, grad_lse)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _mapped(_Chunked.apply, info.batch_size, in_dims, arguments)


_forward_op.register_autograd(
    lambda ctx, grad_out, grad_lse: _differentiated(ctx, _backward_op, grad_out, grad_lse), setup_context=_setup
)
_backward_op.register_autograd(_refuse)


def chunked_attention(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    """:func:`chunked_forward` with gradients, as one operation where the call is traced."""
    if is_traced() or q.device.type == "meta":
        return _forward_op(q, *args)
    return _Chunked.apply(q, *args)
