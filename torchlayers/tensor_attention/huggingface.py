"""Tensor attention for transformers' models, on one rank or over several, through their attention registry."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._backend import BACKENDS
from .._checks import check_choice
from .._huggingface import register_attention
from .._sequence import SequenceLayout
from .distributed import ring_tensor_attention
from .functional import tensor_attention

__all__ = ["register_ring_tensor_attention"]


def register_ring_tensor_attention(*, backend: str | None = None) -> str:
    """Register tensor attention with transformers: a model's keys and values are both sets of pairs, k1 = k2, v1 = v2.

    ::

        model = AutoModelForCausalLM.from_config(config, attn_implementation=register_ring_tensor_attention())

    Where :func:`torchlayers.ring_attention.shard_batch` has cut the batch, it goes round the ring, symmetric, each pair
    of shards once. Masks are as for :func:`torchlayers.ring_attention.register_ring_attention`: causal or full, sliding
    windows (of both sets), documents by ``shard_batch``; others raise. There is no cache, and over ranks no dropout.

    Args:
        backend: see :func:`torchlayers.backend`.

    Returns:
        the name that it is registered under: "ring_tensor_attention", with a backend appended.

    Raises:
        ImportError: transformers is not installed.
        ValueError: an unknown backend.
    """
    check_choice("backend", backend, (None, *BACKENDS))

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: SequenceLayout | None,
        group: str | None,
        is_causal: bool,
        window_size: int | tuple[int, int] | None,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        options: dict[str, Any] = {
            "is_causal": is_causal,
            "window1": window_size,
            "window2": window_size,
            "scale": scale,
            "enable_gqa": q.shape[1] != k.shape[1],
            "backend": backend,
        }
        if layout is None:
            return tensor_attention(q, k, k, v, v, dropout_p=dropout_p, **options)  # type: ignore[return-value]
        if dropout_p > 0:
            raise ValueError(f"attention dropout must be 0 for tensor attention over ranks, got {dropout_p}")
        return ring_tensor_attention(q, k, k, v, v, layout=layout, group=group, symmetric=True, **options)  # type: ignore[return-value]

    return register_attention("_".join(["ring_tensor_attention", *([] if backend is None else [backend])]), attend)
