"""Sequence parallelism: attention over sequences that are sharded over ranks (arXiv 2105.13120, 2310.01889).

:class:`SequenceLayout` says which rank holds which tokens. :func:`ring_attention` is the ring with a running softmax:
causal masks balanced over ranks, windows, packed documents, grouped queries, dropout, cross-attention, forward and
backward, over gloo, NCCL, or the virtual ranks of a :class:`LoopbackWorld`. :func:`ulysses_attention` exchanges heads
for tokens instead, :func:`usp_attention` does both on a mesh; :func:`ring_self_attention` and
:func:`linformer_attention` are the paper's own two.

:class:`RingMultiheadAttention` stands in for ``nn.MultiheadAttention``, :func:`sequence_parallel` converts a user's
model, :func:`register_ring_attention` a model of transformers; :func:`shard_batch` and :func:`sequence_parallel_loss`
are what a training loop needs, :class:`use_layout` where it cuts its batches itself. :func:`sp_memory_model` and
:func:`sp_comm_model` say what memory and time to expect.
"""

from .._placement import use_layout
from .._ring import LoopbackWorld
from .._sequence import SequenceLayout
from .convert import RingAttentionConfig, sequence_parallel
from .data import gradient_mesh, sequence_parallel_loss, shard_batch
from .functional import (
    linformer_attention,
    merge_attention,
    ring_attention,
    ring_self_attention,
    ulysses_attention,
    usp_attention,
)
from .huggingface import register_ring_attention
from .memory import CommModel, MemoryModel, sp_comm_model, sp_largest, sp_memory_model
from .modules import RingMultiheadAttention

__all__ = [
    "CommModel",
    "LoopbackWorld",
    "MemoryModel",
    "RingAttentionConfig",
    "RingMultiheadAttention",
    "SequenceLayout",
    "gradient_mesh",
    "linformer_attention",
    "merge_attention",
    "register_ring_attention",
    "ring_attention",
    "ring_self_attention",
    "sequence_parallel",
    "sequence_parallel_loss",
    "shard_batch",
    "sp_comm_model",
    "sp_largest",
    "sp_memory_model",
    "ulysses_attention",
    "use_layout",
    "usp_attention",
]
