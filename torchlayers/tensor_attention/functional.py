"""The family's functions: arguments are checked here, once, and the implementation is picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._attention import (
    autocast,
    check_dropout,
    check_padding_mask,
    check_qkv,
    check_scale,
    no_autocast,
    normalize_window,
    seed_tensor,
)
from .._backend import BACKENDS, import_kernels, note_dispatch, use_triton
from .._checks import check_choice, check_int, check_same_device, check_size
from . import reference
from .chunked import chunked_attention, chunked_backward, chunked_forward
from .polynomial import certified, polynomial_nth_order_attention, polynomial_tensor_attention

__all__ = [
    "nth_order_attention",
    "polynomial_nth_order_attention",
    "polynomial_tensor_attention",
    "tensor_attention",
]

FORMS = ("trilinear", "determinant", "strassen")

# Bytes that an array over all pairs may take in the dense backend and in nth_order_attention.
DENSE_LIMIT = 2**30

_kernels = import_kernels("tensor_attention")
if _kernels is not None:
    _lib = import_kernels("_lib")
    assert _lib is not None
    _lib.register_reference(_kernels.tensor_attention_forward_op, chunked_forward)
    _lib.register_reference(_kernels.tensor_attention_backward_op, chunked_backward)


def tensor_attention(
    query: Tensor,
    key1: Tensor,
    key2: Tensor,
    value1: Tensor,
    value2: Tensor,
    *,
    key_padding_mask1: Tensor | None = None,
    key_padding_mask2: Tensor | None = None,
    is_causal: bool = False,
    window1: int | tuple[int, int] | None = None,
    window2: int | tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "trilinear",
    q_offset: int = 0,
    k1_offset: int = 0,
    k2_offset: int = 0,
    approx: str | None = None,
    tolerance: float = 1e-3,
    return_lse: bool = False,
    backend: str | None = None,
    pair_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over pairs of keys, with one softmax over all pairs (j, k)::

        S[i,j,k] = scale · Σ_c q[i,c] k1[j,c] k2[k,c]
        P[i,·,·] = softmax of S[i,·,·] over the pairs that query i sees
        out[i,c] = Σ_jk P[i,j,k] v1[j,c] v2[k,c]            lse[i] = log Σ_jk exp S[i,j,k]

    Time is O(nq n1 n2 d), or what the windows leave of it; memory is O(n d), forward and backward. Query i sees the
    pair (j, k) where it sees j in set 1 and k in set 2; nothing orders j and k. A query that sees no pair has out = 0,
    lse = -inf and zero gradients.

    Args:
        query: (B, Hq, nq, d).
        key1, key2: (B, Hkv, n1, d) and (B, Hkv, n2, d); the two lengths and nq may differ.
        value1, value2: (B, Hkv, n1, dv) and (B, Hkv, n2, dv).
        key_padding_mask1, key_padding_mask2: bool (B, n1) and (B, n2), True = keep, as in
            ``scaled_dot_product_attention`` (and unlike ``nn.MultiheadAttention``).
        is_causal: a query sees positions up to its own. Position of query i is ``q_offset + i``, of key j of set 1
            ``k1_offset + j``.
        window1, window2: what of each set a query sees. An int w counts the query itself: i - w < j <= i where
            causal, ``|i - j| < w`` otherwise. A pair (left, right) is i - left <= j <= i + right, -1 for unlimited;
            with ``is_causal`` right is 0.
        dropout_p: probability with which an entry of P is dropped after the softmax; the others are divided by
            1 - dropout_p. A function has no training mode: pass 0 for inference.
        dropout_seed: an int, or an int64 tensor of one element. What is dropped is a function of the seed, the batch
            entry, the query head and the positions of i, j and k alone. None draws one from torch's generator.
        scale: d^-1/2 by default. The papers on near-linear time use 1/d.
        enable_gqa: Hq may be a multiple of Hkv; query head h reads key head h // (Hq / Hkv), and nothing is repeated.
        form: "trilinear" as above; "determinant": Σ over chunks of three channels of det[q, k1, k2], invariant under
            common rotations of the chunks, d a multiple of 3; "strassen": q·k1 + q·k2 + k1·k2.
        q_offset, k1_offset, k2_offset: positions of the first query and keys: decoding with a key cache of n entries
            passes ``q_offset=n - nq``.
        approx: "polynomial": :func:`polynomial_tensor_attention` with its default degree, in near-linear time.
            "auto": that where its rigorous error bound, computed from the data, is at most ``tolerance``, else the
            exact operation. "auto" reads the bound on the host, which waits for the GPU, and so is refused under
            ``torch.compile``. Dropout, other forms, pair masks, the lse and the other backends are exact only:
            "polynomial" raises for these, "auto" does not approximate.
        tolerance: for ``approx="auto"``, absolute, in units of the output.
        return_lse: also return the log-sum-exp, a natural logarithm. It is differentiable.
        backend: see :func:`torchlayers.backend`; besides, "dense" computes the definition with its
            O(B Hq nq n1 n2) memory, and can be differentiated twice.
        pair_mask: bool, broadcastable to (B, Hq, nq, n1, n2), True = keep; ``backend="dense"`` only.

    Returns:
        out (B, Hq, nq, dv) in the dtype of ``query`` (under autocast, in autocast's), and with ``return_lse`` a pair
        with lse (B, Hq, nq), float32, or float64 for float64.

    Raises:
        TypeError: dtypes that differ or are not floating, masks that are not bool, arguments of another type.
        ValueError: shapes, heads, windows, dropout, form or devices that do not fit; a dense computation that is too
            large; what an approximation does not have.
        BackendError: ``backend="triton"`` with what the kernels do not support.
        RuntimeError: a second derivative of any backend but "dense"; ``approx="auto"`` under ``torch.compile``.
        NotImplementedError: dropout under vmap.

    Source: arXiv 2310.04064 (exact operation), 2405.16411 (gradients), 2507.02754 (windows, determinant).

    Example:

        >>> import torch
        >>> from torchlayers.functional import tensor_attention
        >>> q, k1, k2, v1, v2 = torch.randn(5, 1, 4, 128, 32)
        >>> tensor_attention(q, k1, k2, v1, v2, is_causal=True, window1=32, window2=8).shape
        torch.Size([1, 4, 128, 32])
    """
    keys, values = {"key1": key1, "key2": key2}, {"value1": value1, "value2": value2}
    check_qkv({"query": query}, keys, values, enable_gqa)
    batch, heads, nq, d = query.shape
    n1, n2 = key1.shape[2], key2.shape[2]
    check_size("value1", value1, 2, n1, "the length of key1")
    check_size("value2", value2, 2, n2, "the length of key2")
    check_size("value2", value2, 3, value1.shape[3], "the channels of value1")
    check_padding_mask("key_padding_mask1", key_padding_mask1, batch, n1, "query", query)
    check_padding_mask("key_padding_mask2", key_padding_mask2, batch, n2, "query", query)
    left_right1 = normalize_window("window1", window1, is_causal)
    left_right2 = normalize_window("window2", window2, is_causal)
    dropout_p = check_dropout("dropout_p", dropout_p)
    for name, offset, n in (("q_offset", q_offset, nq), ("k1_offset", k1_offset, n1), ("k2_offset", k2_offset, n2)):
        if check_int(name, offset, minimum=0) + n >= 2**31:
            raise ValueError(f"{name} must leave positions below 2^31, got {offset} for length {n}")
    check_choice("form", form, FORMS)
    if form == "determinant" and d % 3:
        raise ValueError(f"query must have a multiple of 3 channels for form='determinant', got {d}")
    check_choice("backend", backend, (None, *BACKENDS, "dense"))
    check_choice("approx", approx, (None, "polynomial", "auto"))
    if pair_mask is not None:
        _check_pair_mask(pair_mask, (batch, heads, nq, n1, n2), query, backend)
    query, key1, key2, value1, value2 = autocast(query, key1, key2, value1, value2)
    scale = check_scale(scale, d)

    if approx is not None and _approximates(
        approx,
        tolerance,
        lambda: certified(
            query, key1, key2, value1, value2, scale=scale, tolerance=tolerance,
            key_padding_mask1=key_padding_mask1, key_padding_mask2=key_padding_mask2,
        ),
        {
            f"dropout_p={dropout_p}": dropout_p > 0.0,
            f"form={form!r}": form != "trilinear",
            "pair_mask": pair_mask is not None,
            "return_lse": return_lse,
            f"backend={backend!r}": backend in ("dense", "triton"),
        },
    ):  # fmt: skip
        return polynomial_tensor_attention(
            query, key1, key2, value1, value2, key_padding_mask1=key_padding_mask1,
            key_padding_mask2=key_padding_mask2, is_causal=is_causal, window1=window1, window2=window2, scale=scale,
            enable_gqa=enable_gqa, q_offset=q_offset, k1_offset=k1_offset, k2_offset=k2_offset,
        )  # fmt: skip

    seed = seed_tensor("dropout_seed", dropout_seed, query.device) if dropout_p > 0.0 else None
    if backend == "dense":
        _check_memory(query, (n1, n2), "tensor_attention(backend='dense')", "pass windows with backend='torch'")
        note_dispatch("dense: backend is 'dense'")
        with no_autocast(query):
            out, lse = reference.tensor_attention(
                *(_widened(x) for x in (query, key1, key2, value1, value2)),
                key_padding_mask1=key_padding_mask1, key_padding_mask2=key_padding_mask2, pair_mask=pair_mask,
                is_causal=is_causal, window1=left_right1, window2=left_right2,
                dropout_p=dropout_p, dropout_seed=0 if seed is None else seed, scale=scale, form=form,
                q_offset=q_offset, k1_offset=k1_offset, k2_offset=k2_offset,
            )  # fmt: skip
        out = out.to(query.dtype)
    else:
        arguments = (
            query, key1, key2, value1, value2, key_padding_mask1, key_padding_mask2, seed, scale, dropout_p,
            list(left_right1), list(left_right2), is_causal, form, q_offset, k1_offset, k2_offset,
        )  # fmt: skip
        if use_triton("tensor_attention_forward", query, backend, _unsupported(query, value1, n1, n2)):
            assert _kernels is not None
            out, lse = _kernels.tensor_attention_forward(*arguments)
        else:
            out, lse = chunked_attention(*arguments)
    return (out, lse) if return_lse else out


def _approximates(approx: str, tolerance: float, certify: Callable[[], bool], exact_only: dict[str, bool]) -> bool:
    """Whether the polynomial takes the call: ``exact_only`` what it lacks, and whether that is asked."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance must be a float, got {tolerance!r} ({type(tolerance).__name__})")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    found = [name for name, given in exact_only.items() if given]
    if approx == "polynomial":
        if found:
            raise ValueError(f"approx='polynomial' must come without what is exact only, got {', '.join(found)}")
        return True
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "approx='auto' decides from the data and cannot be compiled: choose approx='polynomial' or approx=None"
        )
    return not found and certify()


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_pair_mask(mask: object, shape: tuple[int, ...], query: Tensor, backend: str | None) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"pair_mask must be a bool tensor, True = keep, got {getattr(mask, 'dtype', type(mask))}")
    if mask.ndim > 5 or any(got not in (1, want) for got, want in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"pair_mask must broadcast to {shape}, (B, Hq, nq, n1, n2), got shape {tuple(mask.shape)}")
    check_same_device("pair_mask", mask, "query", query)
    if backend != "dense":
        raise ValueError(
            "pair_mask must come with backend='dense', the only one that takes a mask that is not separable into "
            f"keys of set 1 and of set 2 (key_padding_mask1 and 2, windows, is_causal), got backend={backend!r}"
        )


def _check_memory(query: Tensor, lengths: Sequence[int], what: str, advice: str) -> None:
    batch, heads, nq = query.shape[:3]
    size = reference.elements(batch, heads, nq, lengths) * max(query.element_size(), 4)
    if size > DENSE_LIMIT:
        raise ValueError(
            f"{what} must hold at most {DENSE_LIMIT / 2**30:g} GiB of logits at once, got {size / 2**30:.3g} GiB for "
            f"{batch} × {heads} × {nq} queries and {' × '.join(map(str, lengths))} keys: {advice}"
        )


def _unsupported(query: Tensor, value: Tensor, n1: int, n2: int) -> str | None:
    """What the kernels leave to plain torch."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return str(query.dtype).removeprefix("torch.")
    if max(query.shape[3], value.shape[3]) > 256:
        return f"head dimension {max(query.shape[3], value.shape[3])}"
    if 0 in query.shape or 0 in value.shape or n1 == 0 or n2 == 0:
        return "empty tensors"
    return None


def nth_order_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    key_padding_masks: Sequence[Tensor | None] | None = None,
    is_causal: bool = False,
    windows: Sequence[int | tuple[int, int] | None] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of order m = len(keys) + 1, with one softmax over all tuples (j_2, ..., j_m)::

        S[i,j_2,...,j_m] = scale · Σ_c q[i,c] Π_t k_t[j_t,c]        out[i,c] = Σ P[i,j_2,...,j_m] Π_t v_t[j_t,c]

    Order 2 is ordinary attention, order 3 is :func:`tensor_attention` in its trilinear form. This is the definition,
    for any order, with its O(B Hq nq n_2 ... n_m) memory.

    Args:
        q: (B, Hq, nq, d).
        keys: m - 1 tensors (B, Hkv, n_t, d).
        values: as many (B, Hkv, n_t, dv).
        key_padding_masks: for each set bool (B, n_t), True = keep, or None.
        is_causal, scale, enable_gqa, return_lse: as for :func:`tensor_attention`.
        windows: for each set what ``window1`` is there.

    Returns:
        (B, Hq, nq, dv), with ``return_lse`` a pair with (B, Hq, nq).

    Raises:
        TypeError, ValueError: as :func:`tensor_attention`; numbers of keys, values, masks and windows that differ.

    Source: arXiv 2310.04064, higher-order generalisation.
    """
    if isinstance(keys, Tensor) or isinstance(values, Tensor):
        raise TypeError("keys and values must be sequences of tensors, got a tensor")
    keys, values = list(keys), list(values)
    order = len(keys)
    if order == 0:
        raise ValueError("keys must have at least one tensor, got none")
    masks = [None] * order if key_padding_masks is None else list(key_padding_masks)
    limits = [None] * order if windows is None else list(windows)
    for name, given in (("values", values), ("key_padding_masks", masks), ("windows", limits)):
        if len(given) != order:
            raise ValueError(f"{name} must have one entry for each of the {order} keys, got {len(given)}")
    named_keys = {f"keys[{t}]": x for t, x in enumerate(keys)}
    check_qkv({"q": q}, named_keys, {f"values[{t}]": x for t, x in enumerate(values)}, enable_gqa)
    for t, (key, value, mask) in enumerate(zip(keys, values, masks, strict=True)):
        check_size(f"values[{t}]", value, 2, key.shape[2], f"the length of keys[{t}]")
        check_size(f"values[{t}]", value, 3, values[0].shape[3], "the channels of values[0]")
        check_padding_mask(f"key_padding_masks[{t}]", mask, q.shape[0], key.shape[2], "q", q)
    pairs = [normalize_window(f"windows[{t}]", window, is_causal) for t, window in enumerate(limits)]
    _check_memory(q, [key.shape[2] for key in keys], "nth_order_attention", "use tensor_attention for order 3")
    q, *rest = autocast(q, *keys, *values)
    with no_autocast(q):
        out, lse = reference.nth_order_attention(
            _widened(q),
            [_widened(x) for x in rest[:order]],
            [_widened(x) for x in rest[order:]],
            key_padding_masks=masks, is_causal=is_causal, windows=pairs, scale=check_scale(scale, q.shape[3]),
        )  # fmt: skip
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out
