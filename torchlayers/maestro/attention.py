"""Multi-head attention whose four projections are layers of their own, and so can be low-rank."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._attention import check_dropout, mha_inputs, mha_output
from .._checks import check_int, check_same_device
from .layers import LowRankLinear

__all__ = ["LowRankMultiheadAttention", "SplitMultiheadAttention", "capped_rank"]


def capped_rank(max_rank: int | float | None, full: int) -> int:
    """How many of ``full`` terms a layer holds: all, at most an int, or a fraction p of them, ⌈p · full⌉.

    Raises:
        TypeError, ValueError: an int below 1, a fraction outside (0, 1], or neither.
    """
    if max_rank is None:
        return full
    if isinstance(max_rank, float):
        if not 0 < max_rank <= 1:
            raise ValueError(f"max_rank must be a fraction in (0, 1] where it is a float, got {max_rank}")
        return math.ceil(max_rank * full)
    return min(check_int("max_rank", max_rank), full)


class _PackedWeight:
    """Stands where ``nn.TransformerEncoder`` looks for packed projections before it makes nested tensors.

    Anything that overrides torch's functions lets it pass its sequences on as they are.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


class SplitMultiheadAttention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` with its projections as modules: any that map the channels right.

    ``torch.nn`` has none, so that this is what :func:`extract` makes of low-rank attention; what it holds is then of
    ``torch.nn`` alone. The call is that of :class:`LowRankMultiheadAttention`, without ``rank``.

    Args:
        q_proj, k_proj, v_proj, out_proj: from embed_dim, kdim, vdim and embed_dim channels to embed_dim.
        embed_dim, num_heads, dropout, add_zero_attn, kdim, vdim, batch_first: as of the peer.
        bias_k, bias_v: a key and a value, (1, 1, embed_dim), that are added to every sequence; both or None.
    """

    # What nn.TransformerEncoderLayer and nn.TransformerEncoder ask before they compute around self_attn.
    in_proj_bias = None
    in_proj_weight = _PackedWeight()
    _qkv_same_embed_dim = False

    def __init__(
        self,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        out_proj: nn.Module,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        bias_k: nn.Parameter | None = None,
        bias_v: nn.Parameter | None = None,
    ):
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim)
        self.num_heads = check_int("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}, got {num_heads}")
        self.kdim = check_int("kdim", embed_dim if kdim is None else kdim)
        self.vdim = check_int("vdim", embed_dim if vdim is None else vdim)
        self.head_dim = embed_dim // num_heads
        self.dropout = check_dropout("dropout", dropout)
        self.add_zero_attn, self.batch_first = bool(add_zero_attn), bool(batch_first)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.bias_k, self.bias_v = bias_k, bias_v

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`LowRankMultiheadAttention.forward`."""
        return self._attend(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
        rank: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        ndim = query.ndim if isinstance(query, Tensor) else 0
        query, key, value, _ = mha_inputs(
            query,
            key,
            value,
            embed_dim=self.embed_dim,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
        )
        q = self._heads(_project(self.q_proj, query, rank))
        k, v = _project(self.k_proj, key, rank), _project(self.v_proj, value, rank)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, b.to(x.dtype).expand(x.shape[0], 1, -1)], 1)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        k, v = self._heads(k), self._heads(v)
        extra = k.shape[2] - key.shape[1]
        plainly_causal = bool(is_causal) and extra == 0 and key_padding_mask is None and not need_weights
        mask = None
        if not plainly_causal:
            if is_causal and attn_mask is None:
                # Aligned at the first token, as scaled_dot_product_attention aligns it.
                attn_mask = torch.ones(q.shape[2], key.shape[1], dtype=torch.bool, device=q.device).triu(1)
            mask = self._mask(attn_mask, key_padding_mask, ndim == 2, q, key.shape[1], extra)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = _softmax(scores if mask is None else scores + mask)
            weights = F.dropout(weights, dropout_p) if dropout_p else weights
            out = weights.to(v.dtype) @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if ndim == 2 else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, plainly_causal)
        output = _project(self.out_proj, out.transpose(1, 2).flatten(-2), rank)
        return mha_output(output, ndim=ndim, batch_first=self.batch_first), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        unbatched: bool,
        q: Tensor,
        keys: int,
        extra: int,
    ) -> Tensor | None:
        """Both masks as one to add to the scores, (1 or N, 1 or heads, 1 or L, keys + extra), in the dtype of ``q``."""
        (n, h, length, _), total = q.shape, None
        if key_padding_mask is not None:
            padding = _additive("key_padding_mask", key_padding_mask, q)
            allowed = (keys,) if unbatched else (n, keys)
            if tuple(padding.shape) != allowed:
                raise ValueError(f"key_padding_mask must have shape {allowed}, got {tuple(padding.shape)}")
            total = padding.reshape(n, 1, 1, keys)
        if attn_mask is not None:
            scores = _additive("attn_mask", attn_mask, q)
            if tuple(scores.shape) not in ((length, keys), (n * h, length, keys)):
                raise ValueError(
                    f"attn_mask must have shape {(length, keys)} or {(n * h, length, keys)}, got {tuple(scores.shape)}"
                )
            scores = scores[None, None] if scores.ndim == 2 else scores.unflatten(0, (n, h))
            total = scores if total is None else total + scores
        return total if total is None or extra == 0 else F.pad(total, (0, extra))

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}"
        for name in ("kdim", "vdim"):
            if getattr(self, name) != self.embed_dim:
                text += f", {name}={getattr(self, name)}"
        if self.dropout:
            text += f", dropout={self.dropout:g}"
        if self.bias_k is not None:
            text += ", add_bias_kv=True"
        for name in ("add_zero_attn", "batch_first"):
            if getattr(self, name):
                text += f", {name}=True"
        return text


class LowRankMultiheadAttention(SplitMultiheadAttention):
    r"""Multi-head attention with four low-rank projections, whose prefixes are attention layers of their own::

        q, k, v = x W_q, x W_k, x W_v        y = W_o concat over heads of softmax(q kᵀ / √d + mask) v        W = U Vᵀ

    Constructor, call and return value are those of :class:`torch.nn.MultiheadAttention`, the packed projection split in
    three. It stands also in :class:`torch.nn.TransformerEncoderLayer`, in training and in evaluation.

    Args:
        embed_dim: E, channels of query and output.
        num_heads: heads, a divisor of ``embed_dim``.
        dropout: probability of dropping a weight in training.
        bias: of all four projections.
        add_bias_kv: add a learned key and value to every sequence.
        add_zero_attn: add a key and value of zeros to every sequence.
        kdim, vdim: channels of key and value, E by default.
        batch_first: (N, L, E) instead of (L, N, E).
        device, dtype: of the parameters.
        max_rank: of each projection: an int (the full rank where that is lower), a fraction p of the full rank r,
            ⌈p r⌉, or None for the full rank.
        backend: of the projections, see :func:`torchlayers.backend`.

    Shape: query (N, L, E), key (N, S, kdim), value (N, S, vdim) with ``batch_first``, else (L, N, E) and so on, or
    without a batch (L, E) -> output in the shape of query, and weights (N, L, S) or None.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: :class:`LowRankLinear`.
        bias_k, bias_v: (1, 1, E), or None.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call.

    Source: arXiv 2308.14929, whose released code factorises the four projections one by one.

    Example:

        >>> layer = LowRankMultiheadAttention(64, 4, batch_first=True, max_rank=16)
        >>> x = torch.randn(2, 10, 64)
        >>> output, weights = layer(x, x, x)
        >>> output.shape, weights.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
        >>> output, _ = layer(x, x, x, need_weights=False, rank=8)
    """

    q_proj: LowRankLinear
    k_proj: LowRankLinear
    v_proj: LowRankLinear
    out_proj: LowRankLinear

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
        max_rank: int | float | None = None,
        backend: str | None = None,
    ):
        check_int("embed_dim", embed_dim)
        sizes = [check_int(name, size or embed_dim) for name, size in (("kdim", kdim), ("vdim", vdim))]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        projections = []
        for n in (embed_dim, *sizes, embed_dim):
            r = capped_rank(max_rank, min(n, embed_dim))
            projections.append(LowRankLinear(n, embed_dim, bias, max_rank=r, backend=backend, **factory))
        added = [nn.Parameter(torch.empty(1, 1, embed_dim, **factory)) if add_bias_kv else None for _ in "kv"]
        options: tuple[Any, ...] = (embed_dim, num_heads, dropout, add_zero_attn, kdim, vdim, batch_first)
        super().__init__(*projections, *options, *added)  # type: ignore[arg-type]
        self._reset_all()

    def reset_parameters(self) -> None:
        """Draw all parameters anew as :class:`torch.nn.MultiheadAttention` does, and factorise; all ranks live."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.reset_parameters()
        self._reset_all()

    @torch.no_grad()
    def _reset_all(self) -> None:
        packed = self.kdim == self.vdim == self.embed_dim
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            if not projection.weight_in.is_meta:
                # The peer draws the three of one size as one matrix, (3 E, E), which is a lower bound on each.
                weight = projection.dense_weight()
                fan_out = 3 * self.embed_dim if packed else self.embed_dim
                bound = math.sqrt(6 / (fan_out + projection.in_features))
                projection.load_dense_(nn.init.uniform_(weight, -bound, bound))
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for added in (self.bias_k, self.bias_v):
            if added is not None:
                nn.init.xavier_normal_(added)

    @classmethod
    def from_multihead_attention(
        cls, mha: nn.MultiheadAttention, max_rank: int | float | None = None, *, backend: str | None = None
    ) -> LowRankMultiheadAttention:
        """The layer that computes what ``mha`` does (at the default rank), or a best approximation of its projections.

        Args:
            mha: left as it is.
            max_rank: see the class.
            backend: see the class.

        Raises:
            TypeError: ``mha`` is no :class:`torch.nn.MultiheadAttention`, or complex.
            ValueError: its weights are parametrised or not finite.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
        if any(parametrize.is_parametrized(part) for part in (mha, mha.out_proj)):
            raise ValueError("mha must have plain weights, got parametrised ones: remove the parametrization first")
        bias = mha.in_proj_bias
        with torch.device("meta"):
            layer = cls(
                mha.embed_dim,
                mha.num_heads,
                mha.dropout,
                bias is not None,
                mha.bias_k is not None,
                mha.add_zero_attn,
                mha.kdim,
                mha.vdim,
                mha.batch_first,
                max_rank=max_rank,
                backend=backend,
            )
        if mha.in_proj_weight is not None:
            packed = mha.in_proj_weight
            weights, trained = packed.detach().chunk(3), [packed.requires_grad] * 3
        else:
            separate = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
            weights, trained = tuple(w.detach() for w in separate), [w.requires_grad for w in separate]
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        for name, weight, b, train in zip(("q_proj", "k_proj", "v_proj"), weights, biases, trained, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], b is not None, device="meta")
            linear.weight = nn.Parameter(weight, train)
            if b is not None and bias is not None:
                linear.bias = nn.Parameter(b, bias.requires_grad)
            setattr(layer, name, _converted(linear, max_rank, backend))
        layer.out_proj = _converted(mha.out_proj, max_rank, backend)
        for name in ("bias_k", "bias_v"):
            added = getattr(mha, name)
            if added is not None:
                setattr(layer, name, nn.Parameter(added.detach().clone(), added.requires_grad))
        return layer.train(mha.training)

    def to_dense(self) -> nn.MultiheadAttention:
        """The :class:`torch.nn.MultiheadAttention` that computes the same at the ranks in force."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return packed_attention(self, *(p.to_dense() for p in projections))  # type: ignore[arg-type]

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        rank: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query, key, value: see the class; key is query by default, and value is key.
            key_padding_mask: (N, S), or (S,) without a batch: bool, True = ignore, or floating, added to the scores.
            need_weights: return the weights; without them ``scaled_dot_product_attention`` computes.
            attn_mask: (L, S) or (N · heads, L, S): bool, True = hide, or floating, added to the scores.
            average_attn_weights: over heads, else (N, heads, L, S).
            is_causal: ``attn_mask`` is the causal mask, and need not be read, nor be given.
            rank: of each projection, or its own rank where that is lower.

        Returns:
            (output, weights or None). A query that sees nothing gets zeros where the peer may give NaN.
        """
        if rank is not None:
            check_int("rank", rank, minimum=0)
            top = max(p.rank for p in (self.q_proj, self.k_proj, self.v_proj, self.out_proj))
            if rank > top:
                raise ValueError(f"rank must be at most {top}, the largest of a projection, got {rank}")
        return self._attend(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, rank
        )


def _project(projection: Any, x: Tensor, rank: int | None) -> Tensor:
    return projection(x) if rank is None else projection(x, min(rank, projection.rank))


def _additive(name: str, mask: Tensor, q: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    check_same_device(name, mask, "query", q)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
    return mask.to(q.dtype)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; zeros where all is hidden, as scaled_dot_product_attention has it."""
    hidden = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)


def _converted(linear: nn.Linear, max_rank: int | float | None, backend: str | None) -> LowRankLinear:
    layer = LowRankLinear.from_linear(linear, capped_rank(max_rank, min(linear.weight.shape)))
    layer.backend = backend
    return layer


@torch.no_grad()
def packed_attention(
    like: SplitMultiheadAttention, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear
) -> nn.MultiheadAttention:
    """The ``torch.nn`` layer that computes as ``like`` would with these projections."""
    with torch.device("meta"):
        mha = nn.MultiheadAttention(
            like.embed_dim,
            like.num_heads,
            like.dropout,
            q.bias is not None,
            like.bias_k is not None,
            like.add_zero_attn,
            like.kdim,
            like.vdim,
            like.batch_first,
        )
    weights = {"q_proj_weight": q.weight, "k_proj_weight": k.weight, "v_proj_weight": v.weight}
    trained = any(w.requires_grad for w in weights.values())
    if mha.in_proj_weight is not None:
        mha.in_proj_weight = nn.Parameter(torch.cat(list(weights.values())), trained)
    else:
        for name, weight in weights.items():
            setattr(mha, name, nn.Parameter(weight.clone(), weight.requires_grad))
    if q.bias is not None:
        trained = any(p.bias.requires_grad for p in (q, k, v))
        mha.in_proj_bias = nn.Parameter(torch.cat([q.bias, k.bias, v.bias]), trained)
        mha.out_proj.bias = nn.Parameter(out.bias.detach().clone(), out.bias.requires_grad)
    mha.out_proj.weight = nn.Parameter(out.weight.detach().clone(), out.weight.requires_grad)
    for name in ("bias_k", "bias_v"):
        added = getattr(like, name)
        if added is not None:
            setattr(mha, name, nn.Parameter(added.detach().clone(), added.requires_grad))
    return mha.train(like.training)
