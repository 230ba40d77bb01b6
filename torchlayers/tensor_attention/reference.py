"""Tensor attention as the paper defines it, over all pairs at once: the oracle, differentiable to any order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._attention import Window, allowed, keep_mask

__all__ = ["logits", "nth_order_attention", "tensor_attention"]


def logits(query: Tensor, key1: Tensor, key2: Tensor, form: str) -> Tensor:
    """S[b,h,i,j,k] before scaling, for equal head counts::

        trilinear     Σ_c q_ic k1_jc k2_kc
        determinant   Σ_t det[q_i, k1_j, k2_k] over the d / 3 chunks t of three channels
        strassen      q_i·k1_j + q_i·k2_k + k1_j·k2_k

    Sources: arXiv 2310.04064 (trilinear), 2507.02754 section 5 (determinant), 2501.19215 (strassen).
    """
    if form == "trilinear":
        return torch.einsum("bhic,bhjc,bhkc->bhijk", query, key1, key2)
    if form == "determinant":
        chunks = [x.unflatten(-1, (-1, 3)) for x in (query, key1, key2)]
        levi_civita = query.new_zeros(3, 3, 3)
        for x, y, z in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            levi_civita[x, y, z], levi_civita[x, z, y] = 1.0, -1.0
        return torch.einsum("bhitx,bhjty,bhktz,xyz->bhijk", *chunks, levi_civita)
    q_k1 = torch.einsum("bhic,bhjc->bhij", query, key1)
    q_k2 = torch.einsum("bhic,bhkc->bhik", query, key2)
    k1_k2 = torch.einsum("bhjc,bhkc->bhjk", key1, key2)
    return q_k1[..., None] + q_k2[..., None, :] + k1_k2[:, :, None]


def _softmax(scores: Tensor, ok: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
    """Joint softmax of the last ``n_keys`` axes where ``ok``, and its log-sum-exp; 0 and -inf where nothing is."""
    scores = scores.masked_fill(~ok, float("-inf")).flatten(-n_keys)
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    # A row without any allowed key gets finite logits, so that no NaN enters the gradient, and is blanked afterwards.
    some = ok.flatten(-n_keys).any(-1, keepdim=True)
    scores = scores.masked_fill(~some, 0.0)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(some, (scores - lse).exp(), 0.0)
    return weights, lse.masked_fill(~some, float("-inf"))[..., 0]


def tensor_attention(
    query: Tensor,
    key1: Tensor,
    key2: Tensor,
    value1: Tensor,
    value2: Tensor,
    *,
    key_padding_mask1: Tensor | None = None,
    key_padding_mask2: Tensor | None = None,
    pair_mask: Tensor | None = None,
    is_causal: bool = False,
    window1: Window = (-1, -1),
    window2: Window = (-1, -1),
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int = 0,
    scale: float | None = None,
    form: str = "trilinear",
    q_offset: int = 0,
    k1_offset: int = 0,
    k2_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Tensor attention with its O(B H nq n1 n2) intermediates in full::

        P[i,·,·] = softmax over all pairs (j, k) of scale · S[i,j,k] where (j, k) is allowed
        out[i,c] = Σ_jk P[i,j,k] v1[j,c] v2[k,c]            lse[i] = log Σ_jk exp(scale · S[i,j,k])

    Arguments as of :func:`torchlayers.functional.tensor_attention`, windows as (left, right) pairs.

    Returns:
        out (B, Hq, nq, dv) and lse (B, Hq, nq), in the dtype of ``query``.

    Source: arXiv 2310.04064, definition of tensor attention; gradients by autograd.
    """
    batch, heads, nq, d = query.shape
    group = heads // max(key1.shape[1], 1)
    key1, key2, value1, value2 = (x.repeat_interleave(group, 1) for x in (key1, key2, value1, value2))
    n1, n2 = key1.shape[2], key2.shape[2]
    i, j, k = (
        offset + torch.arange(n, device=query.device)
        for n, offset in ((nq, q_offset), (n1, k1_offset), (n2, k2_offset))
    )
    ok = allowed(i, j, window1, is_causal)[:, :, None] & allowed(i, k, window2, is_causal)[:, None]
    if key_padding_mask1 is not None:
        ok = ok & key_padding_mask1[:, None, None, :, None]
    if key_padding_mask2 is not None:
        ok = ok & key_padding_mask2[:, None, None, None, :]
    if pair_mask is not None:
        ok = ok & pair_mask
    scores = logits(query, key1, key2, form) * (d**-0.5 if scale is None else scale)
    weights, lse = _softmax(scores, ok.expand(batch, heads, nq, n1, n2), 2)
    weights = weights.unflatten(-1, (n1, n2))
    if dropout_p > 0.0:
        kept = keep_mask(dropout_seed, dropout_p, batch, heads, i, j, k)
        weights = weights * kept / (1.0 - dropout_p)
    return torch.einsum("bhijk,bhjc,bhkc->bhic", weights, value1, value2), lse


def nth_order_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    key_padding_masks: Sequence[Tensor | None] | None = None,
    is_causal: bool = False,
    windows: Sequence[Window] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of order m = len(keys) + 1: a softmax over all tuples (j_2, ..., j_m), in full::

        S[i,j_2,...,j_m] = Σ_c q[i,c] Π_t k_t[j_t,c]        out[i,c] = Σ P[i,j_2,...,j_m] Π_t v_t[j_t,c]

    Order 2 is ordinary attention, order 3 is :func:`tensor_attention`. Memory is O(nq n^(m-1)).

    Returns:
        out (B, Hq, nq, dv) and lse (B, Hq, nq).
    """
    batch, heads, nq, d = query.shape
    order = len(keys)
    keys, values = ([x.repeat_interleave(heads // x.shape[1], 1) for x in xs] for xs in (keys, values))
    windows = [(-1, -1)] * order if windows is None else windows
    masks = [None] * order if key_padding_masks is None else key_padding_masks
    lengths = [key.shape[2] for key in keys]

    i = torch.arange(nq, device=query.device)
    ok = torch.ones((), dtype=torch.bool, device=query.device)
    for t, (n, window, mask) in enumerate(zip(lengths, windows, masks, strict=True)):
        axes = [1] * order
        axes[t] = n
        ok = ok & allowed(i, torch.arange(n, device=query.device), window, is_causal).view(nq, *axes)
        if mask is not None:
            ok = ok & mask.view(batch, 1, 1, *axes)

    # Axes: 0 batch, 1 head, 2 query, 3 channel, 4.. the keys.
    operands: list[object] = []
    for t, key in enumerate(keys):
        operands += [key, [0, 1, 4 + t, 3]]
    tuples = list(range(4, 4 + order))
    scores = torch.einsum(query, [0, 1, 2, 3], *operands, [0, 1, 2, *tuples])
    scores = scores * (d**-0.5 if scale is None else scale)
    weights, lse = _softmax(scores, ok.expand(batch, heads, nq, *lengths), order)
    operands = []
    for t, value in enumerate(values):
        operands += [value, [0, 1, 4 + t, 3]]
    weights = weights.view(batch, heads, nq, *lengths)
    return torch.einsum(weights, [0, 1, 2, *tuples], *operands, [0, 1, 2, 3]), lse


def elements(batch: int, heads: int, nq: int, lengths: Sequence[int]) -> int:
    """Entries of the largest intermediate of the functions above."""
    return batch * heads * nq * math.prod(lengths)
