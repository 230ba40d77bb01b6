"""Ring attention for transformers' models, through their attention registry."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._checks import check_choice
from .._huggingface import register_attention
from .arguments import BLOCKS
from .functional import ring_attention
from .ring import SCHEDULES

__all__ = ["register_ring_attention"]


def register_ring_attention(*, schedule: str = "ring", backend: str | None = None) -> str:
    """Register ring attention with transformers; :func:`sequence_parallel` does so for the models that it is given.

    ::

        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=register_ring_attention())
        shard = shard_batch(batch, layout, mesh)
        logits = model(input_ids=shard["input_ids"], position_ids=shard["position_ids"]).logits
        loss = sequence_parallel_loss(logits, shard["labels"], mesh, shard["num_valid_global"])

    Causal and full attention, sliding windows (on a contiguous layout), grouped queries, and packed documents, which
    are the layout's: :func:`shard_batch` takes them from ``cu_seqlens``, or from position ids that start again. A mask
    of another kind (chunked, soft-capped, sinks, padding other than on the right) raises. Where sequences are whole
    (before the first :func:`shard_batch` on one process, or in ``use_layout(None)``) this is transformers' "sdpa", also
    with a cache, so that a model generates as it is.

    Args:
        schedule, backend: see :func:`torchlayers.functional.ring_attention`.

    Returns:
        the name that it is registered under: "ring_attention", with what is not the default appended.

    Raises:
        ImportError: transformers is not installed.
        ValueError: an unknown schedule or backend.
    """
    check_choice("schedule", schedule, SCHEDULES)
    if backend is not None:
        check_choice("backend", backend, BLOCKS)
    parts = ["ring_attention", *([] if schedule == "ring" else [schedule]), *([] if backend is None else [backend])]

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return ring_attention(q, k, v, enable_gqa=grouped, schedule=schedule, backend=backend, **options)  # type: ignore[return-value]

    return register_attention("_".join(parts), attend, alone="sdpa")
