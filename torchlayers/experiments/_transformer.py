"""Transformer blocks that differ in their attention alone, for experiments that compare it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._attention import allowed, normalize_window
from ..tensor_attention import TensorTransformerBlock
from ..tensor_attention.modules import normalized

STANDARD = "standard"
FORMS = ("trilinear", "determinant", "strassen")


class StandardAttention(nn.Module):
    """Ordinary multi-head attention with everything else as in ``TensorAttention``: normalised q and k, gains, window.

    Shape: x (B, N, E) -> (output (B, N, E), None).
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, gain: float, window: int | None = None, is_causal: bool = False
    ):
        super().__init__()
        self.heads, self.is_causal, self.window = num_heads, is_causal, window
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
        self.q_gain, self.k_gain = (nn.Parameter(torch.full((num_heads,), gain)) for _ in range(2))
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = normalized(q, self.q_gain).to(v.dtype), normalized(k, self.k_gain).to(v.dtype)
        mask = None
        if self.window is not None:
            position = torch.arange(x.shape[1], device=x.device)
            mask = allowed(position, position, normalize_window("window", self.window, self.is_causal))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.is_causal and mask is None)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def block(
    attention: str,
    width: int,
    heads: int,
    hidden: int,
    *,
    gain: float = 1.5,
    is_causal: bool = False,
    windows: tuple[int | None, int | None] = (None, None),
    **options: Any,
) -> TensorTransformerBlock:
    """A pre-norm block of ``width`` channels with an MLP of ``hidden``.

    ``attention`` is "standard" (with the first of ``windows``) or a form of tensor attention.
    """
    # The determinant form takes channels by threes.
    head_dim = max(3, width // heads // 3 * 3) if attention == "determinant" else None
    made = TensorTransformerBlock(
        width,
        heads,
        hidden,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        form="trilinear" if attention == STANDARD else attention,
        head_dim=head_dim,
        gain=gain,
        is_causal=is_causal,
        window1=windows[0],
        window2=windows[1],
        **options,
    )
    if attention == STANDARD:
        made.self_attn = StandardAttention(  # type: ignore[assignment]
            width, heads, gain=gain, window=windows[0], is_causal=is_causal
        )
    return made


def forward_flops(
    attention: str, width: int, hidden: int, tokens: int, windows: tuple[int | None, int | None] = (None, None)
) -> int:
    """Multiplications and additions of a block's matrix products for one token of a sequence, masks not exploited."""
    seen1, seen2 = (tokens if w is None else min(w, tokens) for w in windows)
    mlp = 4 * width * hidden
    if attention == STANDARD:
        return 8 * width**2 + 4 * seen1 * width + mlp
    return 12 * width**2 + 4 * seen1 * seen2 * width + mlp
