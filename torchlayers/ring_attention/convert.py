"""A user's model over the ranks of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .._huggingface import set_attention, transformers_models
from .._placement import use_layout
from .._sequence import SequenceLayout
from .._surgery import Skip, convert, register_conversion
from .huggingface import register_ring_attention
from .modules import RingMultiheadAttention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .._ring import Group, LoopbackMesh

__all__ = ["RingAttentionConfig", "sequence_parallel"]


@dataclass(frozen=True)
class RingAttentionConfig:
    """For :func:`torchlayers.convert`: which modules attend across ranks, see :func:`sequence_parallel`.

    ``nn.MultiheadAttention`` becomes :class:`RingMultiheadAttention`. A module that has a method
    ``sequence_parallel(config)`` is replaced by what that returns: a module, or None where it stands as it is.
    :class:`torchlayers.TensorAttention` has one.

    Attributes:
        mesh, group: the ranks that share a sequence: dimension "sp" of a mesh, or its only one.
        layout: how sequences are cut; None: as is in force at each call, see :class:`use_layout`.
        is_causal, window_size: of every attention, beside what its calls say.
        schedule, backend: see :func:`torchlayers.functional.ring_attention`.
    """

    mesh: DeviceMesh | LoopbackMesh | None = None
    group: Group | None = None
    layout: SequenceLayout | None = None
    is_causal: bool = False
    window_size: int | tuple[int, int] | None = None
    schedule: str = "ring"
    backend: str | None = None


@register_conversion(RingAttentionConfig)
def _(name: str, module: nn.Module, config: RingAttentionConfig) -> nn.Module | Skip | None:
    if isinstance(module, RingMultiheadAttention):
        return None
    if isinstance(module, nn.MultiheadAttention):
        if type(module) is not nn.MultiheadAttention:
            return Skip("a class of its own, derived from MultiheadAttention")
        return RingMultiheadAttention.from_multihead_attention(module, **vars(config))
    own: Callable[[RingAttentionConfig], nn.Module] | None = getattr(module, "sequence_parallel", None)
    return own(config) if callable(own) else None


def sequence_parallel(
    model: nn.Module,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    *,
    group: Group | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    **options: Any,
) -> nn.Module:
    """Let ``model`` attend over sequences that are shared out over ranks. In place; parameters and names stay.

    ::

        model = sequence_parallel(model, mesh)
        for batch in batches:
            shard = shard_batch(batch, layout, mesh)                # says how sequences are cut
            logits = model(shard["input_ids"])                      # attention across the ranks, all else local
            loss = sequence_parallel_loss(logits, shard["labels"], mesh, shard["num_valid_global"])

    It is ``torchlayers.convert(model, RingAttentionConfig(...))``, and for each transformers model within,
    ``set_attn_implementation(register_ring_attention())``. What knows its place in the sequence other than through
    attention (position embeddings, convolutions, pooling over tokens) must be told: pass it ``position_ids``. Wrap for
    data parallelism afterwards, over :func:`gradient_mesh`.

    Args:
        model: with ``nn.MultiheadAttention``, :class:`torchlayers.TensorAttention` or transformers models in it.
        mesh: its dimension "sp", or its only one, has the ranks that share a sequence. May be left out for one rank.
        group: these ranks, instead of a mesh.
        filter_fn: ``filter_fn(module, name)`` says which modules may be replaced, for attention that is to stay within
            what a rank holds; all by default.
        options: ``layout``, ``is_causal``, ``window_size``, ``schedule``, ``backend``, see
            :class:`RingAttentionConfig`. transformers' models are causal and windowed as they say themselves.

    Returns:
        the model: the one passed in, unless it is itself an attention module.

    Raises:
        TypeError, ValueError: bad arguments; nothing in the model attends in a way that is known here; a module that
            attends could not be replaced, and would see its rank's tokens alone.
    """
    config = RingAttentionConfig(mesh=mesh, group=group, **options)
    report = convert(model, config, filter_fn=filter_fn)
    if report.skipped:
        raise ValueError(f"model must have no attention that stays behind (filter_fn may let it), got\n{report}")
    models = transformers_models(report.model)
    if models:
        name = register_ring_attention(schedule=config.schedule, backend=config.backend)
        for part in models:
            set_attention(part, name)
        if config.layout is not None:
            use_layout(config.layout, mesh, group=group)
    if not (models or report.converted or any(map(_attends, report.model.modules()))):
        raise ValueError(
            "model must have nn.MultiheadAttention, TensorAttention or transformers models in it, got none: call "
            "torchlayers.functional.ring_attention where it attends"
        )
    return report.model


def _attends(module: nn.Module) -> bool:
    """Whether ``module`` is sequence-parallel as it stands."""
    return isinstance(module, RingMultiheadAttention) or callable(getattr(module, "sequence_parallel", None))
