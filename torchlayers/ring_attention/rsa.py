"""The paper's own ring self-attention, which holds whole rows of scores, and its Linformer under sequence parallelism.

:func:`ring_attention` needs no rows and one pass; what rows buy is that any bias can be added to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .._attention import (
    allowed,
    autocast,
    check_dropout,
    check_qkv,
    check_scale,
    keep_mask,
    no_autocast,
    seed_tensor,
)
from .._checks import check_choice, check_dtype, check_ndim, check_same_device, check_size
from .._ring import CHECKS, agree, group_name, place, refuse, resolve
from .._ring_ops import all_reduce, ring_pass, ring_sum
from .._sequence import SequenceLayout, document_bounds
from .arguments import check_layouts, check_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .._ring import Group, LoopbackMesh

__all__ = ["linformer_attention", "ring_self_attention"]


class _Rows:
    """Rows of scores over the whole sequence, of one rank's queries.

    Columns are in order of rank, so that a shard of keys owns one slice of them: ``slices[r]``.
    """

    def __init__(
        self, q: Tensor, k: Tensor, seed: Tensor | None, layout: str, group: str, dropout_p: float, causal: bool
    ) -> None:
        self.layout, self.channel = SequenceLayout.from_key(layout), resolve(group)
        self.seed, self.dropout_p, self.causal = seed, dropout_p, causal
        self.batch, self.heads, self.length, _ = q.shape
        self.key_heads, self.device = k.shape[1], q.device
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        ends = [0]
        for r in range(self.layout.world):
            ends.append(ends[-1] + self.layout.length(r))
        self.slices = [slice(ends[r], ends[r + 1]) for r in range(self.layout.world)]
        self.i = self.layout.positions(self.channel.rank, q.device)

    def empty(self) -> Tensor:
        shape = (self.batch, self.heads, self.length, self.layout.seq_len)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _folded(self, x: Tensor) -> Tensor:
        """(B, Hq, n, c) as (B, Hkv, Hq / Hkv · n, c): the queries that share a key head are rows of one matrix."""
        rows = self.heads // self.key_heads * x.shape[2]
        return x.to(self.dtype).reshape(self.batch, self.key_heads, rows, x.shape[3])

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, Hq, n, a) times y (B, Hkv, a, b)."""
        out = self._folded(x) @ y.to(self.dtype)
        return out.view(self.batch, self.heads, x.shape[2], y.shape[3])

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, Hq, n, a) transposed times y (B, Hq, n, b), summed over the queries of a key head: (B, Hkv, a, b)."""
        return self._folded(x).mT @ self._folded(y)

    def hidden(self, source: int) -> Tensor | None:
        """Which of a shard's keys a query does not see."""
        documents = self.layout.cu_seqlens
        if not self.causal and documents is None:
            return None
        j = self.layout.positions(source, self.device)
        seen = allowed(self.i, j, (-1, -1), self.causal)
        if documents is not None:
            first, last = (bound[self.i, None] for bound in document_bounds(documents, self.device))
            seen = seen & (first <= j) & (j <= last)
        return ~seen

    def dropped(self, x: Tensor, source: int) -> Tensor:
        """Columns ``x`` of a shard, those entries kept that dropout keeps. Its bits depend on positions alone."""
        if self.dropout_p == 0.0:
            return x
        assert self.seed is not None
        j = self.layout.positions(source, self.device)
        kept = keep_mask(self.seed, self.dropout_p, self.batch, self.heads, self.i, j)
        return x * (kept.to(self.dtype) / (1.0 - self.dropout_p))

    def bias(self, bias: Tensor, source: int) -> Tensor:
        return self.layout.shard(bias, -1, source) if bias.shape[-1] == self.layout.seq_len else bias


def _text(
    q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, dropout_p: float, is_causal: bool, check: str
) -> str:
    return (
        f"ring_self_attention of {str(q.dtype).removeprefix('torch.')}, batch {q.shape[0]}, heads {q.shape[1]} on "
        f"{k.shape[1]}, channels {q.shape[3]} and {v.shape[3]}, causal {is_causal}, scale {scale}, "
        f"dropout_p {dropout_p}, check {check}, layout {layout}"
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    layout: str,
    group: str,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    check: str,
) -> tuple[Tensor, Tensor]:
    """Output and the weights before dropout, columns in order of rank, both in the dtype of ``q``."""
    agree(resolve(group), lambda: _text(q, k, v, layout, scale, dropout_p, is_causal, check), q.device, check=check)
    with torch.no_grad(), no_autocast(q):
        rows = _Rows(q, k, seed, layout, group, dropout_p, is_causal)
        weights = rows.empty()
        for source, keys in ring_pass(rows.channel, rows.layout, k):
            x = weights[..., rows.slices[source]]
            torch.mul(rows.product(q, keys.mT), scale, out=x)
            if bias is not None:
                part = rows.bias(bias, source)
                x.masked_fill_(~part, float("-inf")) if bias.dtype == torch.bool else x.add_(part)
            hidden = rows.hidden(source)
            if hidden is not None:
                x.masked_fill_(hidden, float("-inf"))
        top = weights.amax(-1, keepdim=True)
        weights.sub_(torch.where(top == float("-inf"), 0.0, top)).exp_()  # where a query sees nothing, zeros
        total = weights.sum(-1, keepdim=True)
        weights.div_(torch.where(total == 0, 1.0, total))
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=rows.dtype, device=q.device)
        for source, values in ring_pass(rows.channel, rows.layout, v):
            out += rows.product(rows.dropped(weights[..., rows.slices[source]], source), values)
        return out.to(q.dtype), weights.to(q.dtype)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    layout: str,
    group: str,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, if asked for, bias. V and K go round once more, and the sums of dV and dK do."""
    with torch.no_grad(), no_autocast(q):
        rows = _Rows(q, k, seed, layout, group, dropout_p, is_causal)
        slices = rows.slices

        def dropped_weights(source: int) -> Tensor:
            return rows.dropped(weights[..., slices[source]].to(rows.dtype), source)

        dv = ring_sum(rows.channel, rows.layout, lambda home: rows.outer(dropped_weights(home), grad_out))
        ds = rows.empty()
        for source, values in ring_pass(rows.channel, rows.layout, v):
            ds[..., slices[source]] = rows.dropped(rows.product(grad_out, values.mT), source)
        ds.sub_((ds * weights).sum(-1, keepdim=True)).mul_(weights)
        dq = torch.zeros(q.shape, dtype=rows.dtype, device=q.device)
        for source, keys in ring_pass(rows.channel, rows.layout, k):
            dq += rows.product(ds[..., slices[source]], keys)
        dk = ring_sum(rows.channel, rows.layout, lambda home: rows.outer(ds[..., slices[home]], q))
        if bias is not None and bias_grad:
            whole = bias.shape[-1] == rows.layout.seq_len
            db = ds.sum_to_size((*bias.shape[:-1], ds.shape[-1]) if whole else bias.shape)
            db = rows.layout.unshard([db[..., part] for part in slices], -1) if whole else db
            db = db.to(bias.dtype, copy=True)
        else:
            db = q.new_empty(0)
        return dq.mul_(scale).to(q.dtype), dk.mul_(scale).to(k.dtype), dv.to(v.dtype), db


_forward_op = torch.library.custom_op("torchlayers::ring_self_attention", _forward, mutates_args=())
_backward_op = torch.library.custom_op("torchlayers::ring_self_attention_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, bias, seed, layout, *options):
    n = SequenceLayout.from_key(layout).seq_len
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty((*q.shape[:3], n))


@_backward_op.register_fake
def _(grad_out, q, k, v, weights, bias, seed, layout, group, scale, dropout_p, is_causal, bias_grad):
    db = bias.new_empty(bias.shape) if bias_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), db


def _setup(ctx, inputs, output) -> None:
    q, k, v, bias, seed, *ctx.options, _ = inputs
    ctx.save_for_backward(q, k, v, output[1], bias, seed)
    ctx.set_materialize_grads(False)


def _differentiated(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 11
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, db = _backward_op(grad_out, *ctx.saved_tensors, *ctx.options, bias_grad)
    return dq, dk, dv, db if bias_grad else None, *(None,) * 7


def _refuse(ctx, *grads):
    raise RuntimeError("ring_self_attention is differentiable once")


_forward_op.register_autograd(_differentiated, setup_context=_setup)
_backward_op.register_autograd(_refuse)


@_forward_op.register_vmap
def _(*_):
    raise NotImplementedError("ring_self_attention does not run under vmap: ranks exchange tensors; use its batch")


def ring_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    group: Group | None = None,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    check: str = "first",
) -> Tensor:
    """Ring self-attention as the paper has it: the keys go round, then the values::

        S_r = scale · Q_r [K_0 … K_N-1]^T + bias_r        out_r = softmax(S_r) [V_0 … V_N-1]

    Every rank holds whole rows of scores, (length, seq_len) a head, so that memory falls as 1 / N and not faster; for
    long sequences take :func:`ring_attention`, which holds none. The rows take any bias. Backward, V and K go round
    again and the sums of dV and dK do: with M elements of K a rank, 2 (N - 1) M are sent forward and 4 (N - 1) M
    backward, dK and dV in float32.

    Args:
        q: this rank's queries (B, Hq, length, d), positions as ``layout`` has them.
        k, v: its keys (B, Hkv, length, d) and values (B, Hkv, length, dv).
        layout: which rank holds which tokens; where it has documents, a query sees those keys of its own.
        group, mesh: the ranks, as a process group or as a mesh with one dimension or dimension ``"sp"``. Neither at
            one rank.
        attn_bias: added to the scores, (length, seq_len) or broadcastable to (B, Hq, length, seq_len): rows are this
            rank's queries, columns the whole sequence in order. Differentiable. A bool tensor is a mask, True = keep.
        dropout_p: probability of dropping a weight; the others are divided by 1 - dropout_p.
        dropout_seed: an int, or an int64 tensor of one element, the same on all ranks. What is dropped is a function of
            it, the batch entry, the head and the two positions alone. None draws one from each rank's generator.
        scale: d^-1/2 by default.
        is_causal: a query sees keys up to its own position.
        enable_gqa: Hq may be a multiple of Hkv.
        check: as for :func:`ring_attention`.

    Returns:
        (B, Hq, length, dv) in the dtype of ``q`` (under autocast, in autocast's); zeros where a query sees nothing.
        Differentiable once.

    Raises:
        TypeError: dtypes that differ or are not floating, arguments of another type.
        ValueError: shapes, heads, dropout or groups that do not fit; on every rank, if the group has not called before.

    Source: arXiv 2105.13120 (ring self-attention); there gradients are divided by N, here they are the function's.

    Example:

        >>> import torch
        >>> from torchlayers import LoopbackWorld, SequenceLayout
        >>> from torchlayers.functional import ring_self_attention
        >>> q, k, v = torch.randn(3, 1, 4, 64, 32)
        >>> bias = torch.randn(64, 64)
        >>> layout = SequenceLayout(64, world=4)
        >>> def attend(rank, group):
        ...     shards = (layout.shard(x, 2, rank) for x in (q, k, v))
        ...     return ring_self_attention(
        ...         *shards, layout=layout, group=group, attn_bias=layout.shard(bias, 0, rank)
        ...     )
        >>> out = layout.unshard(LoopbackWorld(4).run(attend), 2)
        >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        >>> torch.testing.assert_close(out, expected)
    """
    try:
        check_choice("check", check, CHECKS)
        check_layouts(layout, None)
        name = group_name(group, mesh, layout.world, "sp")
        check_tensors(q, k, v, layout, None, place(name)[0], enable_gqa)
        dropout_p = check_dropout("dropout_p", dropout_p)
        seed = seed_tensor("dropout_seed", dropout_seed, q.device) if dropout_p > 0.0 else None
        q, k, v = autocast(q, k, v)
        real_scale = check_scale(scale, q.shape[3])
        if attn_bias is not None:
            _check_bias(attn_bias, (*q.shape[:3], layout.seq_len), q)
    except (TypeError, ValueError) as error:
        refuse(error, group, mesh, "sp", check)
    if name is None and seed is None and layout.cu_seqlens is None and not (is_causal and attn_bias is not None):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=_mask(attn_bias, q), is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    options = layout.key, name or "", real_scale, dropout_p, bool(is_causal), check
    return _forward_op(q, k, v, attn_bias, seed, *options)[0]


def _check_bias(bias: object, shape: tuple[int, ...], q: Tensor) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"attn_bias must be a tensor, got {type(bias).__name__}")
    wide = torch.promote_types(q.dtype, torch.float32)
    if bias.dtype != torch.bool and (not bias.is_floating_point() or torch.promote_types(bias.dtype, wide) != wide):
        raise TypeError(f"attn_bias must be bool (True = keep) or floating, {wide} at most, got {bias.dtype}")
    if (
        bias.ndim < 1
        or bias.ndim > 4
        or any(got not in (1, want) for got, want in zip(bias.shape[::-1], shape[::-1], strict=False))
    ):
        raise ValueError(
            f"attn_bias must be (length, seq_len) = {shape[2:]} or broadcast to {shape}, got shape {tuple(bias.shape)}"
        )
    check_same_device("attn_bias", bias, "q", q)


def _mask(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """``bias`` as SDPA takes it: 2 dimensions or more, bool or the dtype of ``q``."""
    if bias is None:
        return None
    bias = bias[None] if bias.ndim < 2 else bias
    return bias if bias.dtype == torch.bool else bias.to(q.dtype)


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E_shard: Tensor,
    F_shard: Tensor,
    *,
    group: Group | None = None,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    scale: float | None = None,
    check: str = "first",
) -> Tensor:
    """Linformer over a sharded sequence: keys and values are projected along the sequence, to K of each::

        out_r = softmax(scale · Q_r (Σ_s E_s K_s)^T) (Σ_s F_s V_s)

    One all-reduce of B · H · K · (d + dv) elements in float32 (float64 for float64) is all that is sent, however long
    the sequence, and so backward. Not causal: every query sees the whole sequence.

    Args:
        q: this rank's queries (B, H, n, d); n may differ from the keys' length.
        k, v: its keys (B, H, c, d) and values (B, H, c, dv). Ranks may have different c, of any order.
        E_shard, F_shard: the columns of the projections that belong to this rank's tokens, (K, c), or (H, K, c) for
            projections of each head. They are sharded, not replicated: their gradients are not to be summed over ranks.
        group, mesh: the ranks, as a process group or as a mesh with one dimension or dimension ``"sp"``; neither at
            one rank.
        scale: d^-1/2 by default.
        check: as for :func:`ring_attention`.

    Returns:
        (B, H, n, dv) in the dtype of ``q`` (under autocast, in autocast's).

    Raises:
        TypeError: dtypes that differ or are not floating, arguments of another type.
        ValueError: shapes or groups that do not fit; on every rank, if the group has not called before.

    Source: Linformer, arXiv 2006.04768, equation 7; with sequence parallelism arXiv 2105.13120.

    Example:

        >>> import torch
        >>> from torchlayers import LoopbackWorld
        >>> from torchlayers.functional import linformer_attention
        >>> q, k, v = torch.randn(3, 1, 4, 64, 32)
        >>> projection = torch.randn(16, 64) / 8
        >>> def attend(rank, group):
        ...     shards = [x.chunk(4, 2)[rank] for x in (q, k, v)]
        ...     columns = projection.chunk(4, 1)[rank]
        ...     return linformer_attention(*shards, columns, columns, group=group)
        >>> torch.cat(LoopbackWorld(4).run(attend), 2).shape
        torch.Size([1, 4, 64, 32])
    """
    try:
        check_choice("check", check, CHECKS)
        name = group_name(group, mesh, None, "sp")
        check_qkv({"q": q}, {"k": k}, {"v": v}, False)
        check_size("v", v, 2, k.shape[2], "the length of k")
        q, k, v = autocast(q, k, v)
        real_scale = check_scale(scale, q.shape[3])
        E_shard, F_shard = _check_projections(E_shard, F_shard, k)
    except (TypeError, ValueError) as error:
        refuse(error, group, mesh, "sp", check)
    with no_autocast(q):
        own = torch.cat([E_shard @ k, F_shard @ v], -1)
        wide = torch.promote_types(own.dtype, torch.float32)
        call = f"linformer_attention with scale {real_scale}, check {check}"
        whole = all_reduce(own.to(wide), name, call, check).to(own.dtype)
        keys, values = whole.split([k.shape[3], v.shape[3]], -1)
        return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def _check_projections(e: Tensor, f: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    given = {"E_shard": e, "F_shard": f}
    for name, x in given.items():
        check_ndim(name, x, (2, 3), "(K, length) or (heads, K, length)")
        check_dtype(name, x, kind="real")
        check_same_device(name, x, "k", k)
        check_size(name, x, -1, k.shape[2], "the length of k")
        check_size(name, x, -2, e.shape[-2], "the K of E_shard")
        if x.ndim == 3:
            check_size(name, x, 0, k.shape[1], "heads")
    cast = autocast(e, f)
    for name, x in zip(given, cast, strict=True):
        if x.dtype != k.dtype:
            raise TypeError(f"{name} must have the dtype of k, {k.dtype}, got {x.dtype}")
    return cast
