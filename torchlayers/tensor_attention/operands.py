"""What polynomial attention makes of its arguments: checks, dtypes, masked keys, weights of the features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._attention import check_padding_mask
from .._checks import check_dtype, check_ndim, check_same_device, check_size
from .._tables import table
from .bounds import bessel, chebyshev_interval

MAX_FEATURES = 2**20


def check_features(head_dim: int, degree: int) -> None:
    features = math.comb(head_dim + degree, degree)
    if features > MAX_FEATURES:
        raise ValueError(
            f"degree must give at most {MAX_FEATURES} features, got degree {degree} with head_dim {head_dim}: "
            f"{features}; take a smaller degree or head_dim"
        )


def check_keys(
    query: object,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    names: tuple[str, str, str],
) -> None:
    """All tensors fit each other; ``names`` are the patterns of the arguments' names, as ``"key{}"``."""
    if not keys or len(keys) != len(values):
        raise ValueError(f"keys and values must be of the same number, at least 1, got {len(keys)} and {len(values)}")
    if len(masks) != len(keys):
        raise ValueError(f"key_padding_masks must have {len(keys)} entries, one a set of keys, got {len(masks)}")
    reference_name, reference = ("query", query) if query is not None else (names[0].format(1), keys[0])
    check_ndim(reference_name, reference, 4, "(batch, heads, n, head_dim)")
    assert isinstance(reference, Tensor)
    check_dtype(reference_name, reference, kind="real")
    mixed = torch.is_autocast_enabled(reference.device.type) if reference.device.type != "meta" else False
    if reference.shape[-1] == 0:
        raise ValueError(f"{reference_name} must have a head_dim of at least 1, got shape {tuple(reference.shape)}")
    for t, (key, value, mask) in enumerate(zip(keys, values, masks, strict=True), 1):
        k_name, v_name, m_name = (name.format(t) for name in names)
        check_ndim(k_name, key, 4, "(batch, kv heads, n, head_dim)")
        check_ndim(v_name, value, 4, "(batch, kv heads, n, value dim)")
        for name, x in ((k_name, key), (v_name, value)):
            check_dtype(name, x, kind="real")
            if x.dtype != reference.dtype and not mixed:
                raise TypeError(f"{name} must have the dtype of {reference_name} ({reference.dtype}), got {x.dtype}")
            check_same_device(name, x, reference_name, reference)
            check_size(name, x, 0, reference.shape[0], "batch")
            check_size(name, x, 1, keys[0].shape[1], "kv heads")
        check_size(k_name, key, 3, reference.shape[-1], "head_dim")
        check_size(v_name, value, 2, key.shape[2], "keys")
        check_size(v_name, value, 3, values[0].shape[-1], "value dim")
        check_padding_mask(m_name, mask, key.shape[0], key.shape[2], k_name, key)


def head_groups(query: Tensor, kv_heads: int, enable_gqa: bool) -> int:
    heads = query.shape[1]
    if heads == kv_heads:
        return 1
    if not enable_gqa:
        raise ValueError(f"query must have the heads of the keys, {kv_heads}, got {heads} (enable_gqa groups them)")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query must have a multiple of the keys' {kv_heads} heads, got {heads}")
    return heads // kv_heads


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def masked(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x`` (B, Hk, n, c) in ``dtype``, with zeros where padding is, whatever stood there."""
    x = x.to(dtype)
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)


def with_count(value: Tensor, mask: Tensor | None) -> Tensor:
    """Values (B, Hk, n, dv) as (B, Hk, dv + 1, n), with ones as the last channel: the denominator's."""
    ones = (
        torch.ones_like(value[..., :1]) if mask is None else mask[:, None, :, None].to(value).expand_as(value[..., :1])
    )
    return torch.cat([value, ones], -1).mT


def feature_weights(query: Tensor, degree: int, basis: str, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """``query`` (B, Hk, N, d), scaled for the basis, and the weights of its features (see :func:`query_features`)."""
    if basis == "taylor":
        numbers = table("tensor_attention_monomials", query.shape[-1], degree, dtype=query.dtype, device=query.device)
        return query, numbers[0][:, None]
    assert bound is not None
    interval = chebyshev_interval(bound)
    coefficients = bessel(interval, degree) @ table("tensor_attention_chebyshev", degree, device=query.device)
    return query / interval[..., None].to(query.dtype), coefficients.mT.to(query.dtype)


def output_dtype(query: Tensor) -> torch.dtype:
    device = query.device.type
    if query.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return query.dtype
