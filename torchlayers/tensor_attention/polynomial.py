r"""Near-linear tensor attention for bounded entries: exp is replaced by a polynomial, which factorises over the tuples.

With :math:`S_{ijk} = s \sum_c q_{ic} k^1_{jc} k^2_{kc}` and a polynomial :math:`p(x) = \sum_t c_t x^t` of even degree
g in place of exp, the multinomial theorem over multi-indices :math:`|\alpha| \le g` gives

.. math::
    p(S_{ijk}) = \sum_\alpha \varphi_\alpha(q_i)\, (k^1_j)^\alpha (k^2_k)^\alpha, \qquad
    \varphi_\alpha(q) = c_{|\alpha|} s^{|\alpha|} \frac{|\alpha|!}{\alpha!} q^\alpha, \qquad
    O_i = \frac{\sum_\alpha \varphi_\alpha(q_i)\, [\sum_j (k^1_j)^\alpha v^1_j] \circ [\sum_k (k^2_k)^\alpha v^2_k]}
               {\sum_\alpha \varphi_\alpha(q_i)\, [\sum_j (k^1_j)^\alpha] \, [\sum_k (k^2_k)^\alpha]}

in O(n r dv) for r = C(d + g, g) features, instead of O(n³ d). The allowed set of pairs is a product of one set of keys
each, so causal attention and windows only change which keys the two inner sums run over. With more than two sets of
keys there are more inner sums and nothing else (any order; order 2 is ordinary attention).

**Where it holds.** The error depends on the largest logit M alone (:func:`tensor_attention_error_bound`). With entries
bounded by B, M is up to s d B³: B³ for s = 1/d, but √d B³ for the usual s = d^(-1/2). At head_dim >= 32 only degree 2
has an affordable number of features, and at s = d^(-1/2) normalised queries and keys reach logits of 5 and more, where
it misses half of what attention adds to plain averaging. So use it with head_dim 8 to 16, ``scale=1/head_dim`` and a
capped gain on normalised queries and keys, and train through it:

======== ====== ======== ============================== ==============================
head_dim degree features logits for an error of 1e-3    gain for it, scale 1/head_dim
======== ====== ======== ============================== ==============================
8        4      495      0.62                           0.60
8        6      3003     1.16                           0.74
16       2      153      0.17                           0.35
16       4      4845     0.62                           0.53
======== ====== ======== ============================== ==============================

The error is absolute, for values of at most 1 (:func:`tensor_attention_logit_limit`); the gain g is that of
RMS-normalised queries and keys, whose logits are at most scale g³ head_dim^(3/2) whatever the data.

Sources: arXiv 2310.04064 (the algorithm, and why no near-linear one exists for larger entries), 2405.16411 (gradients).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._attention import Window, no_autocast, normalize_window
from .bounds import (
    BASES,
    Peaks,
    check_polynomial,
    logit_bounds,
    rounding_drift,
    row_error_bound,
    tensor_attention_error_bound,
    tensor_attention_logit_limit,
)
from .decoding import PolynomialState
from .moments import banded_attention, key_moments, read_moments, recomputing
from .monomials import product_of
from .operands import (
    MAX_FEATURES,
    check_features,
    check_keys,
    feature_weights,
    head_groups,
    masked,
    output_dtype,
    with_count,
    working_dtype,
)

__all__ = [
    "BASES",
    "PolynomialState",
    "certified",
    "polynomial_nth_order_attention",
    "polynomial_tensor_attention",
    "tensor_attention_error_bound",
    "tensor_attention_logit_limit",
]

_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # features of queries alive at once, where all queries see the same keys


def _attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    windows: Sequence[Window],
    offsets: Sequence[int],
    degree: int,
    scale: float,
    basis: str,
    groups: int,
    with_bound: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, heads, n, d = query.shape
    dv, kv_heads = values[0].shape[-1], heads // groups
    out_dtype, dtype = output_dtype(query), working_dtype(query)
    if 0 in query.shape or dv == 0 or any(0 in key.shape for key in keys):
        # Nothing to attend to, or nobody to attend: zeros that hang on the graph of every input, by sums of nothing.
        graph = sum(x[:, :, :0].sum().to(out_dtype) for x in (query, *keys, *values))
        empty = query.new_zeros(batch, heads, n, dv, dtype=out_dtype) + graph
        return empty, query.new_zeros(batch, heads, n, dtype=torch.float64) if with_bound else None
    with no_autocast(query):
        q = query.to(dtype).reshape(batch, kv_heads, groups * n, d)
        keys = [masked(x, mask, dtype) for x, mask in zip(keys, masks, strict=True)]
        values = [masked(x, mask, dtype) for x, mask in zip(values, masks, strict=True)]
        with torch.no_grad():
            peaks = [Peaks.of(key, value) for key, value in zip(keys, values, strict=True)]
            drift = sum(
                rounding_drift(k.shape[2], None if w[0] < 0 else k.shape[2]) for k, w in zip(keys, windows, strict=True)
            )
            error = row_error_bound(q, peaks, scale, degree, basis, drift) if with_bound else None
            interval = logit_bounds(q, peaks, scale)[0] if basis == "chebyshev" else None
        q, weights = feature_weights(q * (scale * product_of([p.scales for p in peaks])), degree, basis, interval)
        q = q.mT  # (B, Hk, d, G n)
        keys = [(key / p.scales).mT for key, p in zip(keys, peaks, strict=True)]
        values = [with_count(value, mask) for value, mask in zip(values, masks, strict=True)]
        per_query = weights.ndim == 4
        if all(window == (-1, -1) for window in windows):
            pairs = zip(keys, values, strict=True)
            sums = [key_moments(k, v, degree, wide=False).to(dtype) for k, v in pairs]
            state = product_of(sums)
            elements = _ELEMENTS["cuda" if q.is_cuda else "cpu"]
            step = max(64, elements // max(1, batch * kv_heads * state.shape[-1]))
            read = functools.partial(read_moments, degree=degree)
            outputs = []
            for index, part in enumerate(q.split(step, -1)):
                weight = weights[..., index * step : (index + 1) * step] if per_query else weights
                outputs.append(recomputing(read, part, weight, state))
            out = torch.cat(outputs, -1)
        else:
            grouped = weights.unflatten(-1, (groups, n)) if per_query else weights
            out = banded_attention(
                q.unflatten(-1, (groups, n)), grouped, keys, values, windows, offsets, degree
            ).flatten(-2)
        out = out.mT.reshape(batch, heads, n, dv).to(out_dtype)
    return out, None if error is None else error.reshape(batch, heads, n)


def polynomial_nth_order_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    degree: int = 4,
    scale: float | None = None,
    is_causal: bool = False,
    windows: Sequence[int | tuple[int, int] | None] | None = None,
    key_padding_masks: Sequence[Tensor | None] | None = None,
    enable_gqa: bool = False,
    q_offset: int = 0,
    k_offsets: Sequence[int] | None = None,
    basis: str = "taylor",
    return_error_bound: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Near-linear attention of any order m = len(keys) + 1, see :func:`polynomial_tensor_attention`, which is order 3.

    A softmax over all tuples (j_2, ..., j_m), one entry from each set of keys, of Σ_c q_c Π_t k_t,c, exp replaced by a
    polynomial; the values of a tuple are multiplied. Order 2 is ordinary attention. Costs O(n r dv) for each set.

    Args:
        query: (B, Hq, nq, d).
        keys, values: m - 1 tensors (B, Hk, n_t, d) and (B, Hk, n_t, dv).
        windows, key_padding_masks, k_offsets: m - 1 entries, or None for none.

    Other arguments, results and errors are those of :func:`polynomial_tensor_attention`.
    """
    keys, values, sets = list(keys), list(values), len(keys)
    masks = [None] * sets if key_padding_masks is None else list(key_padding_masks)
    check_keys(query, keys, values, masks, ("keys[{}]", "values[{}]", "key_padding_masks[{}]"))
    for name, given in (("windows", windows), ("k_offsets", k_offsets)):
        if given is not None and len(given) != sets:
            raise ValueError(f"{name} must have {sets} entries, one a set of keys, got {len(given)}")
    spans = [
        normalize_window(f"windows[{t}]", window, is_causal)
        for t, window in enumerate([None] * sets if windows is None else windows)
    ]
    return _checked_attention(
        query,
        keys,
        values,
        masks,
        spans,
        [q_offset, *([0] * sets if k_offsets is None else k_offsets)],
        degree,
        scale,
        basis,
        enable_gqa,
        return_error_bound,
    )


def _checked_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    windows: Sequence[Window],
    offsets: Sequence[int],
    degree: int,
    scale: float | None,
    basis: str,
    enable_gqa: bool,
    return_error_bound: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    check_polynomial(degree, basis)
    check_features(query.shape[-1], degree)
    groups = head_groups(query, keys[0].shape[1], enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, error = _attention(
        query, keys, values, masks, windows, offsets, degree, scale, basis, groups, return_error_bound
    )
    return out if error is None else (out, error)


def polynomial_tensor_attention(
    query: Tensor,
    key1: Tensor,
    key2: Tensor,
    value1: Tensor,
    value2: Tensor,
    *,
    degree: int = 4,
    scale: float | None = None,
    is_causal: bool = False,
    window1: int | tuple[int, int] | None = None,
    window2: int | tuple[int, int] | None = None,
    key_padding_mask1: Tensor | None = None,
    key_padding_mask2: Tensor | None = None,
    enable_gqa: bool = False,
    q_offset: int = 0,
    k1_offset: int = 0,
    k2_offset: int = 0,
    basis: str = "taylor",
    return_error_bound: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Tensor attention (trilinear form) in near-linear time, with a polynomial in place of exp.

    .. math:: O_{ic} = \frac{\sum_{jk} p(S_{ijk})\, v^1_{jc} v^2_{kc}}{\sum_{jk} p(S_{ijk})}, \qquad
        S_{ijk} = s \sum_c q_{ic} k^1_{jc} k^2_{kc}, \qquad p \approx \exp

    over the allowed pairs (j, k), in time O(n r dv) with r = C(d + degree, degree) features, and memory O(n (d + dv))
    plus O(√n r dv) for causal and windowed attention; forward and backward. It is accurate where logits are small, see
    :mod:`torchlayers.tensor_attention.polynomial` and ``return_error_bound``: use ``scale=1 / head_dim``.

    Args:
        query: (B, Hq, nq, d), floating point. float16, bfloat16 and float32 are computed in float32 (autocast is off
            inside), float64 in float64.
        key1, value1: (B, Hk, n1, d) and (B, Hk, n1, dv).
        key2, value2: (B, Hk, n2, d) and (B, Hk, n2, dv).
        degree: of the polynomial, even: one of odd degree turns negative.
        scale: s, by default d^(-1/2) as for :func:`tensor_attention`.
        is_causal: keys at positions after the query's are not seen.
        window1, window2: of the two sets of keys: w for i - w < j <= i where causal and ``|i - j| < w`` otherwise, or
            (left, right), -1 unlimited.
        key_padding_mask1, key_padding_mask2: (B, n1) and (B, n2), bool, True = keep.
        enable_gqa: Hq may be a multiple of Hk.
        q_offset, k1_offset, k2_offset: positions of the first query and key of each set.
        basis: "taylor" (exp's Taylor polynomial: positive, the same for all data), or "chebyshev" (exp's
            Chebyshev series on [-M, M], M each query's bound on its logits rounded up to a power of √2: better for
            high degrees and logits near M, worse for low ones. M sees all keys, later ones too).
        return_error_bound: also return a bound on the error.

    Returns:
        The output (B, Hq, nq, dv) in the dtype of ``query``; with nothing allowed a row is 0. With
        ``return_error_bound`` also a float64 tensor (B, Hq, nq): no entry of that row is further from exact attention
        than this, in absolute terms. It covers the polynomial and the rounding of the arithmetic (that of a half
        precision output's last step excepted), from the logits' bound that the data have, found in O(n d).

    Raises:
        TypeError: no floating-point tensors, dtypes that differ (under autocast they may), a mask that is not bool.
        ValueError: shapes or devices that do not fit, an odd degree, too many features, an unknown basis, a window
            below 1.

    ``torch.compile`` traces it in full; the loops over blocks of keys and queries are unrolled.

    Source: arXiv 2310.04064, section 4; the bound is :func:`tensor_attention_error_bound`'s.

    Example:

        >>> import torch
        >>> from torchlayers.tensor_attention import polynomial_tensor_attention
        >>> q, k1, k2, v1, v2 = torch.rand(5, 1, 2, 100, 8).unbind()
        >>> out, error = polynomial_tensor_attention(q, k1, k2, v1, v2, scale=1 / 8, return_error_bound=True)
        >>> out.shape, error.shape
        (torch.Size([1, 2, 100, 8]), torch.Size([1, 2, 100]))
    """
    masks = [key_padding_mask1, key_padding_mask2]
    check_keys(query, [key1, key2], [value1, value2], masks, ("key{}", "value{}", "key_padding_mask{}"))
    spans = [normalize_window("window1", window1, is_causal), normalize_window("window2", window2, is_causal)]
    return _checked_attention(
        query,
        [key1, key2],
        [value1, value2],
        masks,
        spans,
        [q_offset, k1_offset, k2_offset],
        degree,
        scale,
        basis,
        enable_gqa,
        return_error_bound,
    )


def certified(
    query: Tensor,
    key1: Tensor,
    key2: Tensor,
    value1: Tensor,
    value2: Tensor,
    *,
    degree: int = 4,
    scale: float | None = None,
    tolerance: float = 1e-3,
    basis: str = "taylor",
    key_padding_mask1: Tensor | None = None,
    key_padding_mask2: Tensor | None = None,
) -> bool:
    """Whether :func:`polynomial_tensor_attention` of these tensors is certain to be within ``tolerance`` of exact.

    ``tolerance`` is absolute, for every entry of the output. Costs O(n d), and waits for the device: the answer is
    needed in Python. Too many features count as not certified.

    Args:
        query: (B, Hq, nq, d), Hq a multiple of Hk.
        key1, value1, key2, value2: (B, Hk, n1, d), (B, Hk, n1, dv), (B, Hk, n2, d) and (B, Hk, n2, dv).
        degree, scale, basis, key_padding_mask1, key_padding_mask2: as for :func:`polynomial_tensor_attention`.
        tolerance: accepted absolute error.

    Raises:
        RuntimeError: under ``torch.compile``, where there are no data to decide from.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "approx='auto' decides from the data and cannot be compiled: choose approx='polynomial' or approx=None, "
            "or a module, which decides at construction"
        )
    check_polynomial(degree, basis)
    d = query.shape[-1]
    if math.comb(d + degree, degree) > MAX_FEATURES:
        return False
    if 0 in query.shape or 0 in value1.shape or 0 in value2.shape:
        return True
    dtype, groups = working_dtype(query), head_groups(query, key1.shape[1], True)
    scale = d**-0.5 if scale is None else scale
    with torch.no_grad(), no_autocast(query):
        q = query.to(dtype).reshape(query.shape[0], key1.shape[1], groups * query.shape[2], d)
        peaks = [
            Peaks.of(masked(key, mask, dtype), masked(value, mask, dtype))
            for key, value, mask in ((key1, value1, key_padding_mask1), (key2, value2, key_padding_mask2))
        ]
        drift = sum(rounding_drift(key.shape[2], key.shape[2]) for key in (key1, key2))
        return bool((row_error_bound(q, peaks, scale, degree, basis, drift) <= tolerance).all())
