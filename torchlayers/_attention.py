"""What attention layers share: windows, masks, dropout by counter, merging by log-sum-exp, arguments as MHA has them.

Positions are global: query ``i`` of a call sits at ``q_offset + i``, key ``j`` at ``k_offset + j``. Masks, windows and
dropout see positions alone, so that a result does not depend on how queries and keys are cut into tiles or over ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._backend import is_traced
from ._checks import check_dtype, check_int, check_ints, check_ndim, check_same_device, check_size

__all__ = [
    "Window",
    "allowed",
    "autocast",
    "check_dropout",
    "check_padding_mask",
    "check_qkv",
    "check_scale",
    "draw_seed",
    "keep_mask",
    "merge_attention",
    "mha_inputs",
    "mha_output",
    "no_autocast",
    "normalize_window",
    "padding_as_bool",
    "philox",
    "philox_keep",
    "seed_tensor",
]

# (left, right): key j is seen by query i where i - left <= j <= i + right; -1 is unlimited.
Window = tuple[int, int]


def normalize_window(name: str, window: int | tuple[int, int] | None, is_causal: bool = False) -> Window:
    """``window`` as (left, right), the causal limit included.

    An int w counts the query's own position: i - w < j <= i where causal, |i - j| < w otherwise. A pair is
    (left, right), -1 for unlimited; None is unlimited. Causal attention has right = 0 whatever the window says.

    Raises:
        ValueError: an int below 1, a pair with an entry below -1, or not two entries.
        TypeError: neither an int nor a pair of ints.
    """
    if window is None:
        left, right = -1, -1
    elif isinstance(window, int) and not isinstance(window, bool):
        left = right = check_int(name, window) - 1
    else:
        left, right = check_ints(name, window, 2, minimum=-1)
    return left, 0 if is_causal else right


def allowed(i: Tensor, j: Tensor, window: Window, is_causal: bool = False) -> Tensor:
    """Which keys each query sees: positions ``i`` (..., nq) and ``j`` (..., nk) to a bool mask (..., nq, nk)."""
    left, right = window[0], 0 if is_causal else window[1]
    ahead = j[..., None, :] - i[..., :, None]
    ok = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        ok = ok & (ahead >= -left)
    if right >= 0:
        ok = ok & (ahead <= right)
    return ok


def check_padding_mask(
    name: str, mask: object, batch: int, length: int, like_name: str, like: Tensor, true: str = "keep"
) -> None:
    """``mask`` is None or a bool tensor (batch, length), with ``true`` what True means, where ``like`` lies."""
    if mask is None:
        return
    check_ndim(name, mask, 2, f"(batch, keys), True = {true}")
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, True = {true}, got {mask.dtype}")
    check_size(name, mask, 0, batch, "batch")
    check_size(name, mask, 1, length, "keys")
    check_same_device(name, mask, like_name, like)


# Arguments of attention functions


def check_qkv(
    query: dict[str, Tensor],
    keys: dict[str, Tensor],
    values: dict[str, Tensor],
    enable_gqa: bool,
    layout: str = "(batch, heads, length, channels)",
) -> None:
    """Rank, dtype, device, batch, heads and channels of named tensors (B, H, n, c): one query, keys and values.

    Raises:
        TypeError: no tensors, dtypes that are not floating or differ (under autocast, float64 and another).
        ValueError: what does not fit; heads of the query that are no multiple of the keys', or more without
            ``enable_gqa``.
    """
    ((name0, q),) = query.items()
    for name, x in (query | keys | values).items():
        check_ndim(name, x, 4, layout)
        check_dtype(name, x, kind="real")
        check_same_device(name, x, name0, q)
        # Under autocast float32 and half-precision tensors may meet: they become one dtype.
        mixed = x.dtype != q.dtype
        if mixed and (torch.float64 in (x.dtype, q.dtype) or not _autocasts(q)):
            raise TypeError(f"{name} must have the dtype of {name0}, {q.dtype}, got {x.dtype}")
        check_size(name, x, 0, q.shape[0], "batch")
        if name in keys:
            check_size(name, x, 3, q.shape[3], f"the channels of {name0}")
    if q.shape[3] == 0:
        raise ValueError(f"{name0} must have at least one channel, got shape {tuple(q.shape)}")
    heads, key_heads = q.shape[1], next(iter(keys.values())).shape[1]
    for name, x in (keys | values).items():
        check_size(name, x, 1, key_heads, "heads")
    if heads != key_heads:
        if not enable_gqa:
            raise ValueError(f"{name0} must have the heads of the keys, {key_heads}, unless enable_gqa, got {heads}")
        if key_heads == 0 or heads % key_heads:
            raise ValueError(f"{name0} must have a multiple of the keys' heads, {key_heads}, got {heads}")


def check_scale(scale: object, d: int) -> float:
    """``scale`` as a finite float; None is d^-1/2."""
    if scale is None:
        return d**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float (multiply what is learnt into the query), got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def _autocasts(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on; like torch's own, it leaves float64 alone."""
    if tensors[0].dtype == torch.float64 or not _autocasts(tensors[0]):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(x.device.type)) for x in tensors)


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which operations on tensors like ``x`` keep their dtypes."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


# Dropout by counter


def check_dropout(name: str, p: object) -> float:
    """``p`` is a probability in [0, 1)."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be a float, got {p!r} ({type(p).__name__})")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}")
    return float(p)


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A dropout seed, one int64 in a tensor (1,), from torch's default generator of ``device``."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def seed_tensor(name: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as an int64 tensor (1,) on ``device``; None draws one, see :func:`draw_seed`."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(seed.shape)}")
        return seed.reshape(1).to(device)
    check_int(name, seed, minimum=-(2**63))
    if seed >= 2**63:
        raise ValueError(f"{name} must fit an int64, got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


_LOW = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The first output word of Philox-4x32-10 as ``triton.language.philox`` has it, counters broadcast.

    Args:
        seed: int64, one element: the key's low and high word.
        c0, c1, c2, c3: int64 counters below 2^32.

    Returns:
        int64 in [0, 2^32).

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    seed = seed.reshape(())
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The product of two 32-bit words fills the int64 and may turn negative; its bits are right, and the shift is
        # followed by a mask.
        b, a = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0


def philox_keep(seed: Tensor, dropout_p: float, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """What dropout keeps at each counter: uniform >= dropout_p, the uniform as ``triton.language.rand`` makes it."""
    word = philox(seed, c0, c1, c2, c3)
    folded = torch.where(word >= 2**31, _LOW - word, word)  # the int32 x below zero as -x - 1
    return folded.float() * 4.6566127342e-10 >= dropout_p


def keep_mask(
    seed: Tensor | int,
    dropout_p: float,
    batch: int,
    head: int,
    i: Tensor,
    j: Tensor,
    k: Tensor | None = None,
    *,
    head_offset: int = 0,
    heads: int | None = None,
) -> Tensor:
    """What attention dropout keeps, from (seed, batch, head, i, j[, k]) alone.

    Philox-4x32-10 with the counters (b * heads + head_offset + h, i, j, k), k = 0 where there is no third index. The
    Triton kernels compute the same bits. Kept weights are divided by 1 - dropout_p by the caller.

    Args:
        seed: int64, or a tensor with one.
        dropout_p: probability of dropping.
        batch, head: how many batch entries and query heads there are.
        i, j, k: int64 positions (nq,), (n1,), (n2,).
        head_offset, heads: of ``heads`` query heads in all these are those from ``head_offset`` on; None: all.

    Returns:
        bool (batch, head, nq, n1), or (batch, head, nq, n1, n2) with k.
    """
    key = seed_tensor("seed", seed, i.device)
    b, h = torch.arange(batch, device=i.device), torch.arange(head, device=i.device)
    c0 = (b[:, None] * (head if heads is None else heads) + head_offset + h)[..., None, None, None]
    third = torch.zeros(1, dtype=torch.int64, device=i.device) if k is None else k
    kept = philox_keep(key, dropout_p, c0, i[:, None, None], j[:, None], third)
    return kept if k is not None else kept[..., 0]


# Merging


def merge_attention(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each::

        lse' = log(exp lse + exp lse2)        out' = exp(lse - lse') out + exp(lse2 - lse') out2

    Args:
        out, out2: (..., d), any floating dtype.
        lse, lse2: (...), natural logarithms; -inf where nothing was allowed, and there ``out`` counts nothing.

    Returns:
        (out', lse') in the dtypes of ``out`` and ``lse``; 0 and -inf where both were -inf. Differentiable.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that do not fit.
    """
    for name, x, other in (("lse", lse, out), ("out2", out2, out), ("lse2", lse2, out)):
        if not isinstance(x, Tensor) or not isinstance(other, Tensor):
            raise TypeError(f"out and {name} must be tensors, got {type(other).__name__} and {type(x).__name__}")
        shape = other.shape if name == "out2" else other.shape[:-1]
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, as out has it, got {tuple(x.shape)}")
    top = torch.maximum(lse, lse2).detach()
    top = torch.where(top == float("-inf"), 0.0, top)
    a, b = (lse - top).exp(), (lse2 - top).exp()
    total = a + b
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    merged = (out * a[..., None] + out2 * b[..., None]) / total[..., None]
    return merged.to(out.dtype), torch.where(nothing, float("-inf"), top + total.log())


# Arguments as torch.nn.MultiheadAttention has them


def padding_as_bool(mask: Tensor | None) -> Tensor | None:
    """A floating padding mask, as :class:`torch.nn.TransformerEncoderLayer` passes on, as bool with True = ignore."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return mask
    ignored = mask == float("-inf")
    fits = (ignored | (mask == 0)).all()
    message = "key_padding_mask must be bool, True = ignore, or floating with 0 and -inf alone"
    if mask.device.type != "cpu" or is_traced():
        torch._assert_async(fits, message)  # does not wait for a GPU
    elif not fits:
        other = mask[~ignored & (mask != 0)][0].item()
        raise ValueError(f"{message}, got {other:g}")
    return ignored


def mha_inputs(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *,
    embed_dim: int,
    kdim: int | None = None,
    vdim: int | None = None,
    batch_first: bool = False,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = False,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check the arguments of ``nn.MultiheadAttention.forward`` and bring them to one layout.

    Args:
        query: (L, N, E), (N, L, E) if ``batch_first``, or (L, E) without a batch.
        key, value: likewise, with S and ``kdim``, ``vdim``; None: ``query`` and ``key``.
        key_padding_mask: bool (N, S), or (S,) without a batch, True = ignore as there.
        need_weights, attn_mask: refused, since weights over pairs are never formed and masks must be separable.

    Returns:
        query (N, L, E), key (N, S, kdim), value (N, S, vdim), keep mask (N, S) with True = keep, or None.

    Raises:
        TypeError, ValueError: what does not fit, argument by argument.
    """
    if need_weights:
        raise ValueError("need_weights must be False: the weights are never formed, got True")
    if attn_mask is not None:
        raise ValueError("attn_mask must be None (use is_causal, windows and key_padding_mask), got a mask")
    layout = "(batch, length, channels)" if batch_first else "(length, batch, channels)"
    layout = f"{layout} or (length, channels)"
    key = query if key is None else key
    value = key if value is None else value
    check_ndim("query", query, (2, 3), layout)
    sizes = (("query", query, embed_dim), ("key", key, kdim or embed_dim), ("value", value, vdim or embed_dim))
    for name, x, size in sizes:
        check_ndim(name, x, query.ndim, layout)
        check_size(name, x, -1, size, "channels")
    if query.ndim == 2:
        query, key, value = query[None], key[None], value[None]
        if isinstance(key_padding_mask, Tensor) and key_padding_mask.ndim == 1:
            key_padding_mask = key_padding_mask[None]
    elif not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    check_size("key", key, 0, query.shape[0], "batch")
    check_size("value", value, 0, query.shape[0], "batch")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"value must have the length of key, {key.shape[1]}, got {value.shape[1]}")
    if key_padding_mask is None:
        return query, key, value, None
    check_padding_mask("key_padding_mask", key_padding_mask, query.shape[0], key.shape[1], "query", query, "ignore")
    return query, key, value, ~key_padding_mask


def mha_output(output: Tensor, *, ndim: int, batch_first: bool = False) -> Tensor:
    """``output`` (N, L, E) in the layout in which a query of ``ndim`` dimensions came, see :func:`mha_inputs`."""
    if ndim == 2:
        return output[0]
    return output if batch_first else output.transpose(0, 1)
