"""Attention over a sequence that lies on several ranks, as a layer: a stand-in for ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._attention import allowed, check_dropout, mha_inputs, mha_output, normalize_window, padding_as_bool
from .._checks import check_choice, check_int
from .._placement import check_layout, placement, sequence_group
from .._ring import refuse
from .._sequence import SequenceLayout
from .arguments import BLOCKS
from .functional import ring_attention
from .ring import SCHEDULES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .._ring import Group, LoopbackMesh

__all__ = ["RingMultiheadAttention"]


class RingMultiheadAttention(nn.MultiheadAttention):
    r"""Multi-head attention whose sequences are shared out over ranks::

        q, k, v = x W_q, x W_k, x W_v        y = W_o concat over heads of ring_attention(q, k, v)

    Constructor, call, parameters and their names are those of :class:`torch.nn.MultiheadAttention`, so that either
    loads the other's checkpoint, whatever the number of ranks; the projections are local, keys and values travel. It
    stands also in :class:`torch.nn.TransformerEncoderLayer` (``layer.self_attn = RingMultiheadAttention(...)``), and
    :func:`sequence_parallel` puts it into a model.

    How sequences are cut is, in this order, what the call says, what the constructor says, or what is in force
    (:func:`shard_batch` and :class:`use_layout` see to that). Where nothing was said, and on one rank, sequences are
    whole and this is plain ``scaled_dot_product_attention``.

    Args:
        embed_dim: E, channels of query and output.
        num_heads: heads, a divisor of ``embed_dim``.
        dropout: probability of dropping a weight in training.
        bias: of all four projections.
        add_bias_kv, add_zero_attn: must be False; here for the signature's sake.
        kdim, vdim: channels of key and value, E by default.
        batch_first: (N, L, E) instead of (L, N, E).
        device, dtype: of the parameters.
        layout: how sequences are cut.
        group, mesh: the ranks that share a sequence; of a mesh its dimension "sp", or its only one.
        kv_layout: how the sequences of key and value are cut, where they are others than the query's.
        is_causal: hide later tokens in every call; a call can also ask for it.
        window_size: tokens that a query sees: an int w for i - w < j <= i, which needs causal attention, or a pair
            (left, right) with -1 for unlimited.
        schedule: "ring", or "allgather", which sends as much, holds all keys, and is one block of attention.
        backend: see :func:`torchlayers.functional.ring_attention`.

    Shape: query (N, c, E), key (N, s, kdim), value (N, s, vdim) with ``batch_first``, else (c, N, E) and so on, or
    without a batch (c, E); c and s the lengths of this rank's shards -> (output, None), output in the shape of query.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call. ``need_weights=True`` is refused, since
            the weights are never formed, and so is an ``attn_mask`` (except with is_causal=True, where it is the causal
            mask and not read). A ``key_padding_mask`` is refused where sequences are cut: pack them (``cu_seqlens``).
        NotImplementedError: what :func:`torchlayers.functional.ring_attention` does not do.

    Source: arXiv 2310.01889 (the ring with online softmax); 2105.13120 (sequence parallelism).

    Example:

        >>> layer = RingMultiheadAttention(64, 4, batch_first=True, is_causal=True)  # one rank: plain attention
        >>> output, _ = layer(torch.randn(2, 100, 64))
        >>> output.shape
        torch.Size([2, 100, 64])
        >>> layer.load_state_dict(nn.MultiheadAttention(64, 4).state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layout: SequenceLayout | None = None,
        group: Group | None = None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
        kv_layout: SequenceLayout | None = None,
        is_causal: bool = False,
        window_size: int | tuple[int, int] | None = None,
        schedule: str = "ring",
        backend: str | None = None,
    ):
        check_int("embed_dim", embed_dim)
        check_int("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}, got {num_heads}")
        for name, size in (("kdim", kdim), ("vdim", vdim)):
            if size is not None:
                check_int(name, size)
        check_dropout("dropout", dropout)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(f"{name} must be False: a token without a position is on no rank, got {value!r}")
        check_layout("layout", layout)
        check_layout("kv_layout", kv_layout)
        normalize_window("window_size", window_size)
        check_choice("schedule", schedule, SCHEDULES)
        if backend is not None:
            check_choice("backend", backend, BLOCKS)
        super().__init__(
            embed_dim, num_heads, dropout, bias, False, False, kdim, vdim, bool(batch_first), device, dtype
        )
        # What nn.TransformerEncoderLayer asks before it takes a path of its own, which would see this rank's tokens
        # alone. Which parameters there are, in_proj_weight itself tells.
        self._qkv_same_embed_dim = False
        self.layout, self.kv_layout = layout, kv_layout
        self.group = sequence_group(group, mesh, layout)
        self.is_causal, self.window_size = bool(is_causal), window_size
        self.schedule, self.backend = schedule, backend

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as :class:`torch.nn.MultiheadAttention` does."""
        self.out_proj.reset_parameters()
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        with torch.no_grad():
            for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
                if weight is not None:
                    nn.init.xavier_uniform_(weight)
            for bias in (self.in_proj_bias, self.out_proj.bias):
                if bias is not None:
                    nn.init.zeros_(bias)

    @classmethod
    def from_multihead_attention(cls, mha: nn.MultiheadAttention, **options: Any) -> RingMultiheadAttention:
        """``mha`` over ranks: with its parameters themselves, not copies.

        Args:
            mha: a :class:`torch.nn.MultiheadAttention` without ``add_bias_kv`` and ``add_zero_attn``.
            options: ``layout``, ``group``, ``mesh``, ``kv_layout``, ``is_causal``, ``window_size``, ``schedule``,
                ``backend``.

        Raises:
            TypeError: ``mha`` is not one.
            ValueError: what the constructor refuses.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
        with torch.device("meta"):
            layer = cls(
                mha.embed_dim,
                mha.num_heads,
                mha.dropout,
                mha.in_proj_bias is not None,
                mha.bias_k is not None,
                mha.add_zero_attn,
                mha.kdim,
                mha.vdim,
                mha.batch_first,
                **options,
            )
        for name in layer._parameters:
            setattr(layer, name, getattr(mha, name))
        layer.out_proj = mha.out_proj
        return layer.train(mha.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        layout: SequenceLayout | None = None,
        group: Group | None = None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
        kv_layout: SequenceLayout | None = None,
        dropout_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query, key, value: this rank's shards, see the class; key is query by default, and value is key.
            key_padding_mask: (N, S), or (S,) without a batch, where sequences are whole; bool, True = ignore, or
                floating with -inf to ignore and 0 otherwise.
            need_weights: must be False.
            attn_mask: must be None, unless ``is_causal`` says that it is the causal mask.
            average_attn_weights: of no effect.
            is_causal: hide later tokens, also where the layer was not made so.
            layout, group, mesh, kv_layout: instead of the constructor's.
            dropout_seed: int or int64 tensor, the same on all ranks: what is dropped then depends on it, batch entry,
                head and positions alone, not on the number of ranks.

        Returns:
            (output, None).
        """
        ndim = query.ndim if isinstance(query, Tensor) else 0
        same = (key is None or key is query) and (value is None or value is key)
        name = self.group
        try:
            check_layout("layout", layout)
            check_layout("kv_layout", kv_layout)
            if group is not None or mesh is not None:
                name = sequence_group(group, mesh, layout)
            here, name = placement(self.layout if layout is None else layout, name)
        except (TypeError, ValueError) as error:
            refuse(error, name, None)
        other = self.kv_layout if kv_layout is None else kv_layout
        alone = here is None and other is None and dropout_seed is None
        try:
            query, key, value, keep = mha_inputs(
                query,
                key,
                value,
                embed_dim=self.embed_dim,
                kdim=self.kdim,
                vdim=self.vdim,
                batch_first=self.batch_first,
                key_padding_mask=padding_as_bool(key_padding_mask),
                need_weights=need_weights,
                attn_mask=None if is_causal else attn_mask,
            )
            if keep is not None and not alone:
                raise ValueError(
                    "key_padding_mask must be None where sequences are cut over ranks (pack them: cu_seqlens of the "
                    "layout), got a mask"
                )
        except (TypeError, ValueError) as error:
            refuse(error, name, None)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._project(query, key, value, same)
        )
        causal = self.is_causal or bool(is_causal)
        dropout_p = self.dropout if self.training else 0.0
        if alone:
            out = self._attend_here(q, k, v, keep, causal, dropout_p)
        else:
            here = SequenceLayout(q.shape[2], 1) if here is None else here
            if other is None and here.world == 1 and k.shape[2] != q.shape[2]:
                other = SequenceLayout(k.shape[2], 1)
            out = ring_attention(  # type: ignore[assignment]
                q,
                k,
                v,
                layout=here,
                kv_layout=other,
                group=name,
                is_causal=causal,
                window_size=self.window_size,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                schedule=self.schedule,
                backend=self.backend,
            )
        output = self.out_proj(out.transpose(1, 2).flatten(-2))
        return mha_output(output, ndim=ndim, batch_first=self.batch_first), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self.in_proj_weight is not None:
            if same:
                return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            weights: tuple[Tensor, ...] = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _attend_here(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool, dropout_p: float
    ) -> Tensor:
        mask = None if keep is None else keep[:, None, None]
        if self.window_size is not None or (causal and mask is not None):
            if isinstance(self.window_size, int) and not causal:
                raise ValueError("window_size must be a pair (left, right) unless attention is causal, got an int")
            i, j = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
            seen = allowed(i, j, normalize_window("window_size", self.window_size, causal))
            mask = seen if mask is None else mask & seen
            causal = False
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}"
        for name in ("kdim", "vdim"):
            if getattr(self, name) != self.embed_dim:
                text += f", {name}={getattr(self, name)}"
        if self.in_proj_bias is None:
            text += ", bias=False"
        for name in ("layout", "kv_layout", "group", "window_size", "backend"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        for name in ("batch_first", "is_causal"):
            if getattr(self, name):
                text += f", {name}=True"
        if self.dropout:
            text += f", dropout={self.dropout:g}"
        if self.schedule != "ring":
            text += f", schedule={self.schedule!r}"
        return text
