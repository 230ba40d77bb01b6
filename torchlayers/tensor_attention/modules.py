"""Tensor attention as layers: a stand-in for :class:`torch.nn.MultiheadAttention` and a Transformer block around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._attention import Window, check_dropout, mha_inputs, mha_output, normalize_window, padding_as_bool
from .._backend import BACKENDS
from .._checks import check_choice, check_int, check_ndim, check_size
from .functional import FORMS, tensor_attention
from .polynomial import (
    PolynomialState,
    polynomial_tensor_attention,
    tensor_attention_error_bound,
    tensor_attention_logit_limit,
)

__all__ = ["TensorAttention", "TensorAttentionCache", "TensorTransformerBlock"]

APPROX = (None, "polynomial", "auto")
_MAX_FEATURES = 2**13  # up to which approx="auto" takes the polynomial
_EPS = 1e-9  # added to the mean of |x|³: normalisation fades out below entries of 1e-3


class TensorAttention(nn.Module):
    r"""Multi-head tensor attention: each query attends to pairs of tokens, by one softmax over all pairs::

        q, k1, k2 = x W_q, x W_k1, x W_k2, per head: normalised, times a gain        v1, v2 = x W_v1, x W_v2
        P[i,j,k] = softmax over (j, k) of scale · Σ_c q[i,c] k1[j,c] k2[k,c]
        y[i] = W_o concat over heads of Σ_jk P[i,j,k] v1[j] ∘ v2[k]

    Constructor, call and return value read as those of :class:`torch.nn.MultiheadAttention`, whose place it takes also
    in :class:`torch.nn.TransformerEncoderLayer` (``layer.self_attn = TensorAttention(...)``);
    :meth:`from_multihead_attention` starts from trained weights with equal output. Time grows with the number of pairs
    that the windows leave to each query, memory with the length alone.

    Each head's q, k1 and k2 are divided by their cubic mean, (Σ_c \|x_c\|³ / d)^(1/3), and multiplied by a learned
    gain g. By Hölder's inequality no logit is then above scale · d · g_q g_k1 g_k2, whatever the data.

    Args:
        embed_dim: E, channels of query and output.
        num_heads: query heads.
        dropout: probability of dropping a pair's weight in training.
        bias: of all six projections.
        add_bias_kv, add_zero_attn: must be False; here for the signature's sake.
        kdim, vdim: channels of key and value, E by default.
        batch_first: (N, L, E) instead of (L, N, E).
        device, dtype: of the parameters.
        num_kv_heads: heads of keys and values, a divisor of ``num_heads`` (which it is by default).
        head_dim: d, channels of a head, embed_dim // num_heads by default.
        window1, window2: tokens of the first and second set that a query sees: an int w for i - w < j <= i where
            causal and \|i - j\| < w otherwise, a pair (left, right) with -1 for unlimited, or None.
        is_causal: hide later tokens in every call; a call can also ask for it.
        form: of the logits, "trilinear", "determinant" (Σ det[q, k1, k2] over chunks of three channels; d must be a
            multiple of 3) or "strassen" (q·k1 + q·k2 + k1·k2).
        qk_norm: normalise q, k1 and k2. Without it there are no gains.
        gain: the gains' first value.
        kv2_bias: add 1 / d to k2 and 1 to v2: near plain attention at the start.
        rotary: rotate each chunk of three channels by its token's position; needs form="determinant", whose logits then
            depend on j - i and k - i alone.
        rotary_base: the slowest chunk turns by about 1 / rotary_base radian a token.
        scale: d^(-1/2) by default, 1 / d with ``approx``.
        approx: None is exact. "polynomial" takes the near-linear path, :func:`polynomial_tensor_attention`, with gains
            capped so that its error is at most ``tolerance``; train through it. "auto" takes it where it is available,
            the cap certifies the tolerance and C(d + degree, degree) features are at most 8192, and the exact path
            otherwise; that is decided at construction, see ``path``. Made for d of 8 to 16 at the scale 1 / d: at
            d >= 32 and scale d^(-1/2) logits are too large for a degree that has an affordable number of features.
        tolerance: accepted absolute error of a head's output, for values v1, v2 of at most 1.
        degree: of the polynomial, even.
        max_gain: cap c of the gains, g = c tanh(g' / c) of the parameter g'. With ``approx`` the largest that certifies
            the tolerance, otherwise None, no cap. With "polynomial" a larger one is taken and voids the certificate.
        backend: see :func:`torchlayers.backend`.

    Shape: query (N, L, E), key (N, S, kdim), value (N, S, vdim) with ``batch_first``, else (L, N, E) and so on, or
    without a batch (L, E) -> (output, None), output in the shape of query.

    Attributes:
        q_proj, k1_proj, k2_proj, v1_proj, v2_proj, out_proj: :class:`torch.nn.Linear`.
        q_gain, k1_gain, k2_gain: (num_heads,), (num_kv_heads,), (num_kv_heads,), or None.
        path: "exact" or "polynomial".
        logit_bound, error_bound: what the capped gains guarantee (infinite without a cap).

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call. ``need_weights=True`` is refused, since
            the weights are never formed, and so is an ``attn_mask`` (except with is_causal=True, where it is the causal
            mask and not read): masks over pairs must be separable.

    Sources: arXiv 2310.04064 (tensor attention and its near-linear form), 2507.02754, section 5 (windows, grouped
    queries, determinant form, the bias of K2 and V2).

    Example:

        >>> layer = TensorAttention(64, 4, batch_first=True, is_causal=True, window1=32, window2=8)
        >>> output, _ = layer(torch.randn(2, 100, 64))
        >>> output.shape
        torch.Size([2, 100, 64])
        >>> near_linear = TensorAttention(64, 8, batch_first=True, approx="polynomial")
        >>> near_linear.head_dim, near_linear.error_bound <= 1e-3
        (8, True)
    """

    # What nn.TransformerEncoderLayer asks before it takes a path of its own around self_attn.
    in_proj_bias = None
    _qkv_same_embed_dim = False

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
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window1: int | tuple[int, int] | None = None,
        window2: int | tuple[int, int] | None = None,
        is_causal: bool = False,
        form: str = "trilinear",
        qk_norm: bool = True,
        gain: float = 1.5,
        kv2_bias: bool = False,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        scale: float | None = None,
        approx: str | None = None,
        tolerance: float = 1e-3,
        degree: int = 4,
        max_gain: float | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim)
        self.num_heads = check_int("num_heads", num_heads)
        self.num_kv_heads = check_int("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim} (or give head_dim), got {num_heads}")
        self.head_dim = check_int("head_dim", embed_dim // num_heads if head_dim is None else head_dim)
        self.kdim = check_int("kdim", embed_dim if kdim is None else kdim)
        self.vdim = check_int("vdim", embed_dim if vdim is None else vdim)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(f"{name} must be False: a token without a position is not supported, got {value!r}")
        check_choice("form", form, FORMS)
        if form == "determinant" and self.head_dim % 3:
            raise ValueError(f"head_dim must be a multiple of 3 for form='determinant', got {self.head_dim}")
        if rotary and form != "determinant":
            raise ValueError(f"rotary must be False unless form='determinant', got True with form={form!r}")
        check_choice("approx", approx, APPROX)
        if backend is not None:
            check_choice("backend", backend, (*BACKENDS, "dense"))
        for name, number in (("gain", gain), ("rotary_base", rotary_base), ("tolerance", tolerance)):
            _check_positive(name, number)
        for name, optional in (("scale", scale), ("max_gain", max_gain)):
            if optional is not None:
                _check_positive(name, optional)
        if max_gain is not None and not qk_norm:
            raise ValueError(f"max_gain must be None without qk_norm, got {max_gain!r}")
        self.dropout = check_dropout("dropout", dropout)
        self.batch_first, self.is_causal, self.form = bool(batch_first), bool(is_causal), form
        # Checked here; the functions take them as they were given, since a call may be causal where the layer is not.
        self.window1, self.window2 = window1, window2
        normalize_window("window1", window1), normalize_window("window2", window2)
        self.kv2_bias, self.rotary, self.rotary_base = bool(kv2_bias), bool(rotary), float(rotary_base)
        d = self.head_dim
        self.scale = float(scale) if scale is not None else d**-0.5 if approx is None else 1 / d
        self.approx, self.tolerance, self.degree, self.backend = approx, float(tolerance), degree, backend
        self.gain, self.max_gain = float(gain), max_gain

        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        inner, inner_kv = num_heads * d, self.num_kv_heads * d
        self.q_proj = nn.Linear(embed_dim, inner, **options)
        self.k1_proj = nn.Linear(self.kdim, inner_kv, **options)
        self.k2_proj = nn.Linear(self.kdim, inner_kv, **options)
        self.v1_proj = nn.Linear(self.vdim, inner_kv, **options)
        self.v2_proj = nn.Linear(self.vdim, inner_kv, **options)
        self.out_proj = nn.Linear(inner, embed_dim, **options)
        self.q_gain: nn.Parameter | None = None
        self.k1_gain: nn.Parameter | None = None
        self.k2_gain: nn.Parameter | None = None
        if qk_norm:
            for name, heads in (("q", num_heads), ("k1", self.num_kv_heads), ("k2", self.num_kv_heads)):
                setattr(self, f"{name}_gain", nn.Parameter(torch.empty(heads, device=device, dtype=dtype)))
        with torch.device("cpu"):  # for bounds, which are numbers, where the context's device is meta
            self.path = self._choose_path()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the projections anew, as :class:`torch.nn.MultiheadAttention` does, and set the gains to their start."""
        for projection in (self.q_proj, self.k1_proj, self.k2_proj, self.v1_proj, self.v2_proj, self.out_proj):
            if projection is self.out_proj:
                projection.reset_parameters()
            else:
                nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for gain in (self.q_gain, self.k1_gain, self.k2_gain):
            if gain is not None:
                nn.init.constant_(gain, self.gain if self.max_gain is None else min(self.gain, self.max_gain))

    # -- the near-linear path

    def _choose_path(self) -> str:
        tensor_attention_error_bound(0.0, self.degree)  # checks the degree
        if self.approx is None:
            return "exact"
        if self.q_gain is None:
            raise ValueError("qk_norm must be True with approx: the capped gains bound the logits, got False")
        lacking = None
        if self.form != "trilinear":
            lacking = f"form must be 'trilinear' with approx='polynomial', got {self.form!r}"
        elif self.dropout > 0:
            lacking = f"dropout must be 0 with approx='polynomial', which never forms the weights, got {self.dropout}"
        elif self.backend in ("triton", "dense"):
            lacking = f"backend must be 'auto' or 'torch' with approx='polynomial', got {self.backend!r}"
        if lacking is not None:
            if self.approx == "polynomial":
                raise ValueError(lacking)
            return "exact"
        if self.approx == "auto" and math.comb(self.head_dim + self.degree, self.degree) > _MAX_FEATURES:
            return "exact"
        if self.max_gain is None:
            self.max_gain = self._largest_gain(tensor_attention_logit_limit(self.tolerance, self.degree))
        return "polynomial" if self.approx == "polynomial" or self.error_bound <= self.tolerance else "exact"

    def _largest_gain(self, limit: float) -> float:
        """The largest cap under which no logit is above ``limit``, rounded down so that its bound isn't either."""
        room, shift = limit / (self.scale * self.head_dim), 1 / self.head_dim if self.kv2_bias else 0.0
        low, high = 0.0, room ** (1 / 3)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if middle**2 * (middle + shift) <= room else (low, middle)
        return low

    @property
    def logit_bound(self) -> float:
        """What no logit exceeds, by Hölder's inequality: scale · d · c² (c, plus 1 / d with ``kv2_bias``) of cap c."""
        if self.max_gain is None or self.form != "trilinear":
            return math.inf
        c = self.max_gain
        return self.scale * self.head_dim * c * c * (c + (1 / self.head_dim if self.kv2_bias else 0.0))

    @property
    def error_bound(self) -> float:
        """How far the polynomial path is from the exact one at most, for v1, v2 of at most 1 in magnitude."""
        if self.logit_bound == math.inf:
            return math.inf
        return float(tensor_attention_error_bound(self.logit_bound, self.degree))

    # -- the call

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
        cache: TensorAttentionCache | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query, key, value: see the class; key is query by default, and value is key.
            key_padding_mask: (N, S), or (S,) without a batch; bool, True = ignore, as in nn.MultiheadAttention
                (the functions take the opposite, True = keep), or floating with -inf to ignore and 0 otherwise: other
                numbers raise a ValueError on a CPU, and torch's own assertion where the call is traced or on a GPU.
            need_weights: must be False.
            attn_mask: must be None, unless ``is_causal`` says that it is the causal mask.
            average_attn_weights: of no effect.
            is_causal: hide later tokens, also where the layer was not made so.
            cache: attend to the tokens of earlier calls too and add these, see :class:`TensorAttentionCache`.

        Returns:
            (output, None).
        """
        ndim = query.ndim if isinstance(query, Tensor) else 0
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
        causal = self.is_causal or bool(is_causal)
        start = 0 if cache is None else cache.position
        q, k1, k2, v1, v2 = self._project(query, key, value, start)
        if cache is not None:
            if not causal:
                raise ValueError("cache must be None unless attention is causal, got one with is_causal=False")
            if key.shape[1] != query.shape[1]:
                raise ValueError(
                    f"cache must be None unless key has query's length {query.shape[1]}, got {key.shape[1]}"
                )
            out = cache.attend(self, q, k1, k2, v1, v2, keep)
        else:
            out = self._attend(q, k1, k2, v1, v2, keep, keep, is_causal=causal)
        output = self.out_proj(out.transpose(1, 2).flatten(-2))
        return mha_output(output, ndim=ndim, batch_first=self.batch_first), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor, start: int | Tensor) -> tuple[Tensor, ...]:
        """q (N, Hq, L, d), k1, k2, v1, v2 (N, Hkv, S, d), as views: the layout of scaled_dot_product_attention.

        ``start`` is what a token's index lacks to its position: an int, or one a token.
        """
        q = self._heads(self.q_proj(query), self.q_gain, start)
        k1 = self._heads(self.k1_proj(key), self.k1_gain, start)
        k2 = self._heads(self.k2_proj(key), self.k2_gain, start, 1 / self.head_dim if self.kv2_bias else 0.0)
        v1, v2 = (p(value).unflatten(-1, (self.num_kv_heads, self.head_dim)) for p in (self.v1_proj, self.v2_proj))
        if self.kv2_bias:
            v2 = v2 + 1.0
        return tuple(x.transpose(1, 2) for x in (q, k1, k2, v1, v2))

    def _attend(
        self,
        q: Tensor,
        k1: Tensor,
        k2: Tensor,
        v1: Tensor,
        v2: Tensor,
        keep1: Tensor | None,
        keep2: Tensor | None,
        *,
        is_causal: bool,
        offsets: tuple[int, int, int] = (0, 0, 0),
    ) -> Tensor:
        """The function that the layer stands for; q (N, Hq, L, d), keys and values (N, Hkv, S, d)."""
        options: dict[str, Any] = {
            "key_padding_mask1": keep1,
            "key_padding_mask2": keep2,
            "is_causal": is_causal,
            "window1": self.window1,
            "window2": self.window2,
            "scale": self.scale,
            "enable_gqa": self.num_kv_heads != self.num_heads,
            **dict(zip(("q_offset", "k1_offset", "k2_offset"), offsets, strict=True)),
        }
        if self.path == "polynomial":
            return polynomial_tensor_attention(q, k1, k2, v1, v2, degree=self.degree, **options)  # type: ignore[return-value]
        dropout_p = self.dropout if self.training else 0.0
        return tensor_attention(  # type: ignore[return-value]
            q, k1, k2, v1, v2, form=self.form, dropout_p=dropout_p, backend=self.backend, **options
        )

    def _heads(self, x: Tensor, gain: Tensor | None, start: int | Tensor, shift: float = 0.0) -> Tensor:
        """(N, L, H d) to (N, L, H, d): normalised, times the gain, shifted and rotated."""
        x = x.unflatten(-1, (-1, self.head_dim))
        dtype = x.dtype
        if gain is not None:
            if self.max_gain is not None:
                gain = self.max_gain * torch.tanh(gain / self.max_gain)
            x = normalized(x, gain)
        if shift:
            x = x + shift
        if self.rotary:
            x = rotated(x, start, self.rotary_base)
        return x.to(dtype)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}, head_dim={self.head_dim}, form={self.form!r}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        for name in ("kdim", "vdim"):
            if getattr(self, name) != self.embed_dim:
                text += f", {name}={getattr(self, name)}"
        for name in ("window1", "window2"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        for name in ("is_causal", "batch_first", "kv2_bias", "rotary"):
            if getattr(self, name):
                text += f", {name}=True"
        if self.q_gain is None:
            text += ", qk_norm=False"
        if self.dropout:
            text += f", dropout={self.dropout:g}"
        text += f", scale={self.scale:.3g}"
        if self.approx is not None:
            text += f", approx={self.approx!r}, path={self.path!r}, degree={self.degree}"
        if self.max_gain is not None:
            text += f", max_gain={self.max_gain:.3g}, error_bound={self.error_bound:.2g}"
        return text

    # -- over ranks

    def sequence_parallel(self, config: Any) -> TensorAttention | None:
        """What :func:`torchlayers.ring_attention.sequence_parallel` puts in this layer's place: a
        :class:`RingTensorAttention` with its parameters; None where it is one.

        Raises:
            ValueError: the layer, or ``config``, has what tensor attention over ranks does not do.
        """
        from .distributed import RingTensorAttention

        if isinstance(self, RingTensorAttention):
            return None
        for name, default in (("window_size", None), ("schedule", "ring")):
            if getattr(config, name) != default:
                raise ValueError(f"{name} must be {default!r} for tensor attention, got {getattr(config, name)!r}")
        layer = RingTensorAttention.from_tensor_attention(
            self, layout=config.layout, group=config.group, mesh=config.mesh
        )
        layer.is_causal |= config.is_causal
        return layer

    # -- from trained weights

    @classmethod
    def from_multihead_attention(cls, mha: nn.MultiheadAttention, **options: Any) -> TensorAttention:
        """A layer with the output of ``mha``, to fine-tune from: K2 and V2 are 1, their weights 0 and their biases 1.

        Queries, K1 and V1 are the MHA's, unnormalised. Since every second token weighs the same at first, the second
        set may have any window; ``window1`` and ``is_causal`` restrict what the MHA would see.

        Args:
            mha: any :class:`torch.nn.MultiheadAttention` without ``add_bias_kv`` and ``add_zero_attn``.
            options: ``window1``, ``window2``, ``is_causal``, ``backend``.

        Raises:
            TypeError: ``mha`` is not one.
            ValueError: an option that would change the output.

        Example:

            >>> mha = nn.MultiheadAttention(16, 2, batch_first=True)
            >>> x = torch.randn(1, 5, 16)
            >>> layer = TensorAttention.from_multihead_attention(mha, window2=3)
            >>> torch.allclose(layer(x)[0], mha(x, x, x, need_weights=False)[0], atol=1e-6)
            True
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
        for name in options:
            check_choice("options", name, ("window1", "window2", "is_causal", "backend"))
        weight = mha.out_proj.weight
        layer = cls(
            mha.embed_dim,
            mha.num_heads,
            mha.dropout,
            True,
            mha.bias_k is not None,
            mha.add_zero_attn,
            mha.kdim,
            mha.vdim,
            mha.batch_first,
            weight.device,
            weight.dtype,
            qk_norm=False,
            **options,
        )
        if mha._qkv_same_embed_dim:
            assert mha.in_proj_weight is not None
            weights = mha.in_proj_weight.chunk(3)
        else:
            weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
        with torch.no_grad():
            for projection, w, b in zip((layer.q_proj, layer.k1_proj, layer.v1_proj), weights, biases, strict=True):
                projection.weight.copy_(w)
                if b is not None:
                    projection.bias.copy_(b)
            for projection in (layer.k2_proj, layer.v2_proj):
                projection.weight.zero_()
                projection.bias.fill_(1.0)
            layer.out_proj.weight.copy_(weight)
            if mha.out_proj.bias is not None:
                layer.out_proj.bias.copy_(mha.out_proj.bias)
        return layer.train(mha.training)


class TensorAttentionCache:
    """The tokens that a causal :class:`TensorAttention` has seen, for decoding: one a layer and sequence batch.

    Pass it with each call, which may bring one token or many; the outputs are those of one call on all tokens::

        cache = TensorAttentionCache()
        layer(prompt, cache=cache)                   # (N, L, E)
        layer(token, cache=cache)                    # (N, 1, E), attends to the prompt too

    Holds keys and values of each set, only the last ones where its window is limited; where the layer takes the
    polynomial path, sums of constant size (:class:`PolynomialState`).

    Attributes:
        position: how many tokens were seen.
    """

    def __init__(self) -> None:
        self.position = 0
        self._sets: list[tuple[Tensor, Tensor, Tensor | None] | None] = [None, None]
        self._state: PolynomialState | None = None

    def attend(
        self,
        layer: TensorAttention,
        q: Tensor,
        k1: Tensor,
        k2: Tensor,
        v1: Tensor,
        v2: Tensor,
        keep: Tensor | None,
    ) -> Tensor:
        """``layer``'s attention of new tokens, (N, H, L, d) each, to all tokens; they join the cache."""
        n = q.shape[2]
        windows = [normalize_window("window", w, True) for w in (layer.window1, layer.window2)]
        if layer.path == "polynomial":
            out = self._attend_sums(layer, windows, q, k1, k2, v1, v2, keep)
        else:
            first = self._extended(0, k1, v1, keep)
            second = self._extended(1, k2, v2, keep)
            end = self.position + n
            offsets = (self.position, end - first[0].shape[2], end - second[0].shape[2])
            out = layer._attend(
                q, first[0], second[0], first[1], second[1], first[2], second[2], is_causal=True, offsets=offsets
            )
            for which, ((key, value, kept), (left, _)) in enumerate(zip((first, second), windows, strict=True)):
                drop = 0 if left < 0 else max(0, key.shape[2] - left)
                if drop:  # copies: views would keep what left
                    key, value = key[:, :, drop:].clone(), value[:, :, drop:].clone()
                    kept = None if kept is None else kept[:, drop:].clone()
                self._sets[which] = (key, value, kept)
        self.position += n
        return out

    def _extended(
        self, which: int, key: Tensor, value: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One set of keys, values and keep mask, with the new ones at the end."""
        before = self._sets[which]
        if before is None:
            return key, value, keep
        old_key, old_value, old_keep = before
        if keep is not None or old_keep is not None:
            parts = []
            for mask, like in ((old_keep, old_key), (keep, key)):
                shape = (like.shape[0], like.shape[2])
                parts.append(torch.ones(shape, dtype=torch.bool, device=like.device) if mask is None else mask)
            keep = torch.cat(parts, 1)
        return torch.cat([old_key, key], 2), torch.cat([old_value, value], 2), keep

    def _attend_sums(
        self,
        layer: TensorAttention,
        windows: list[Window],
        q: Tensor,
        k1: Tensor,
        k2: Tensor,
        v1: Tensor,
        v2: Tensor,
        keep: Tensor | None,
    ) -> Tensor:
        if self._state is None:
            widths = [None if left < 0 else left + 1 for left, _ in windows]
            self._state = PolynomialState(degree=layer.degree, scale=layer.scale, windows=widths)
            if q.shape[2] != 1:
                # A prompt goes through the near-linear function at once; the sums are for what follows.
                self._state.append(k1, v1, k2, v2, key_padding_masks=(keep, keep))
                return layer._attend(q, k1, k2, v1, v2, keep, keep, is_causal=True)
        rows = []
        for t in range(q.shape[2]):
            now = slice(t, t + 1)
            kept = None if keep is None else keep[:, now]
            self._state.append(
                k1[:, :, now], v1[:, :, now], k2[:, :, now], v2[:, :, now], key_padding_masks=(kept, kept)
            )
            row = self._state.attend(q[:, :, now])
            assert isinstance(row, Tensor)
            rows.append(row)
        return torch.cat(rows, 2)


class TensorTransformerBlock(nn.Module):
    """A Transformer block around :class:`TensorAttention`::

        x = x + dropout(self_attn(norm1(x)))        y = x + dropout(linear2(dropout(activation(linear1(norm2(x))))))

    Constructor, call and names of parts are those of :class:`torch.nn.TransformerEncoderLayer`, so that it goes into
    :class:`torch.nn.TransformerEncoder` (with ``enable_nested_tensor=False``); it is pre-norm by default.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as there. ``activation`` is "relu", "gelu" or a function; ``norm_first=False`` normalises after each
            sum instead.
        attn_dropout: of the attention weights; by default ``dropout``, or 0 with ``approx``.
        attention: options of :class:`TensorAttention`: ``num_kv_heads``, ``window1``, ``form``, ``approx``, ...

    Shape: src (N, L, E) with ``batch_first``, else (L, N, E), or without a batch (L, E) -> the same.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call, see :class:`TensorAttention`.

    Source: arXiv 2507.02754, section 5; the block is the usual pre-norm one.

    Example:

        >>> block = TensorTransformerBlock(64, 4, 256, batch_first=True, is_causal=True, window1=32, window2=8)
        >>> block(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attn_dropout: float | None = None,
        **attention: Any,
    ):
        super().__init__()
        check_int("d_model", d_model)
        check_int("nhead", nhead)
        check_int("dim_feedforward", dim_feedforward)
        check_dropout("dropout", dropout)
        _check_positive("layer_norm_eps", layer_norm_eps)
        if isinstance(activation, str):
            check_choice("activation", activation, ("relu", "gelu"))
            activation = F.relu if activation == "relu" else F.gelu
        elif not callable(activation):
            raise TypeError(f"activation must be 'relu', 'gelu' or a function, got {activation!r}")
        if attn_dropout is None:
            attn_dropout = dropout if attention.get("approx") is None else 0.0
        check_dropout("attn_dropout", attn_dropout)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = TensorAttention(
            d_model, nhead, dropout=attn_dropout, bias=bias, batch_first=batch_first, **factory, **attention
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm_first = bool(norm_first)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.activation = activation

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for part in (self.self_attn, self.linear1, self.linear2, self.norm1, self.norm2):
            part.reset_parameters()

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: TensorAttentionCache | None = None,
    ) -> Tensor:
        """Arguments as of :class:`torch.nn.TransformerEncoderLayer`; ``src_mask`` only with ``is_causal=True``."""

        def attended(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x, key_padding_mask=src_key_padding_mask, attn_mask=src_mask, is_causal=is_causal, cache=cache
            )
            return self.dropout1(out)

        def fed_forward(x: Tensor) -> Tensor:
            return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        check_ndim("src", src, (2, 3), "as of torch.nn.TransformerEncoderLayer")
        check_size("src", src, -1, self.linear1.in_features, "d_model")
        if self.norm_first:
            x = src + attended(self.norm1(src))
            return x + fed_forward(self.norm2(x))
        x = self.norm1(src + attended(src))
        return self.norm2(x + fed_forward(x))

    def extra_repr(self) -> str:
        activation = getattr(self.activation, "__name__", type(self.activation).__name__)
        return f"norm_first={self.norm_first}, activation={activation}"


def normalized(x: Tensor, gain: Tensor) -> Tensor:
    """``x`` (..., H, d) over its cubic mean (Σ_c |x_c|³ / d)^(1/3), times ``gain`` (H,); at least in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = (x.abs() * x.square()).mean(-1, keepdim=True)
    return x * ((mean + _EPS) ** (-1 / 3) * gain[:, None].to(x.dtype))


def rotated(x: Tensor, start: int | Tensor, base: float) -> Tensor:
    """``x`` (N, L, H, 3 T): the first two channels of chunk t turned by the angle (start + l) · base^(-t / T).

    One axis for each chunk and turns about it that add up: det[R^i q, R^j k1, R^k k2] depends on j - i and k - i alone.
    """
    chunks = x.unflatten(-1, (-1, 3))
    count = chunks.shape[-2]
    # float64: at position 10^5 a float32 angle is off by 0.01.
    position = torch.arange(x.shape[1], device=x.device, dtype=torch.float64) + start
    speed = base ** (-torch.arange(count, device=x.device, dtype=torch.float64) / count)
    angle = position[:, None, None] * speed
    work = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(work), angle.sin().to(work)
    a, b, c = chunks.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos, c.to(work)], -1).flatten(-2)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
