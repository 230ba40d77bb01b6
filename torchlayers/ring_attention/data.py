"""Around the model: cutting batches, the loss over all ranks, the ranks whose gradients are averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_int, check_ndim, check_size
from .._placement import check_layout, use_layout
from .._ring import dim_names, group_name, place, resolve
from .._sequence import SequenceLayout, check_cu_seqlens, document_bounds

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .._ring import Group, LoopbackMesh

__all__ = ["gradient_mesh", "sequence_parallel_loss", "shard_batch"]

_AVERAGED = ("dp", "sp")  # over these dimensions of a mesh gradients are averaged
_BORDERS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
# What transformers' packing collator adds for flash attention and shards have no use for.
_DROPPED = (*_BORDERS, "max_length_q", "max_length_k", "seq_idx")


def shard_batch(
    batch: Mapping[str, Any],
    layout: SequenceLayout,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    *,
    group: Group | None = None,
    shift_labels: bool = True,
    ignore_index: int = -100,
) -> dict[str, Any]:
    """This rank's part of a batch, with all that depends on the whole sequence worked out before the cut.

    From here on the layers that attend across ranks take the sequences to be cut by ``layout``, see
    :class:`~torchlayers._placement.use_layout`: call this in the training loop, not in a data loader's process.

    Args:
        batch: tensors by name, (B, L, …) where they run along the sequence; the same on all ranks of a sequence, and
            the ranks' own along "dp". Known names are ``input_ids``, ``labels`` (not shifted), ``position_ids``
            (global ones are made where there are none), ``attention_mask`` and ``cu_seqlens``. Every other tensor with
            L at dimension 1 is cut too; what is left is passed on as it is.
        layout: how sequences are cut. Where it has no documents and the batch has (``cu_seqlens``, or position ids
            that start again, at the same places in all rows), attention stays within these.
        mesh: its dimension "sp" has the ranks of a sequence, "dp" those with other sequences. May be left out for one
            rank.
        group: the ranks of a sequence, instead of a mesh; there is then no "dp".
        shift_labels: each token's label is the next token's in the sequence, and the last has none. What crosses from
            a document to the next counts, unless the first label of a document is ``ignore_index``, as transformers'
            packing collator has it.
        ignore_index: the label of tokens that have none.

    Returns:
        ``input_ids``, ``labels``, … cut, c = ``layout.length(rank)`` tokens in the order of the layout;
        ``position_ids`` (B, c); ``document_ids`` (B, c), the number of each token's document, where there are
        documents; ``num_valid_global``, int64 without dimensions: how many labels count, over all of "dp" and "sp",
        where there are labels.

        An ``attention_mask`` of ones is left out. One that is 0 at the ends of rows alone (padding on the right) stays
        and takes the labels there out of the loss: causal attention does not see them. Other masks are refused.

    Raises:
        TypeError, ValueError: shapes and layout do not fit; documents at other places in other rows, or other than the
            layout's; padding other than on the right.

    Example::

        layout = SequenceLayout(4096, world=mesh["sp"].size(), kind="zigzag")
        shard = shard_batch({"input_ids": tokens, "labels": tokens}, layout, mesh)
        logits = model(shard["input_ids"], position_ids=shard["position_ids"])
        loss = sequence_parallel_loss(logits, shard["labels"], mesh, shard["num_valid_global"])
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of names to tensors, got {type(batch).__name__}")
    if layout is None:
        raise TypeError("layout must be a SequenceLayout, got None")
    check_layout("layout", layout)
    name = group_name(group, mesh, layout.world, "sp")
    rank, _ = place(name)
    length = layout.seq_len
    whole = {key: value for key, value in batch.items() if key not in _DROPPED}
    for key in ("input_ids", "labels", "position_ids", "attention_mask"):
        if key in whole and not (key == "position_ids" and isinstance(whole[key], Tensor) and whole[key].ndim != 2):
            check_ndim(key, whole[key], 2, "(batch, length)")
            check_size(key, whole[key], 1, length, "seq_len of the layout")
    along = [v for v in whole.values() if isinstance(v, Tensor) and v.ndim >= 2 and v.shape[1] == length]
    if not along:
        raise ValueError(f"batch must have a tensor of the layout's length {length} at dimension 1, got none")
    rows, device = along[0].shape[0], along[0].device
    if "labels" in whole:
        check_size("labels", whole["labels"], 0, rows, "rows of the batch")

    layout = _with_documents(layout, batch)
    mask = whole.pop("attention_mask", None)
    if mask is not None:
        mask = mask.bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(
                "attention_mask must be 1 up to padding at the end of each row, got one with a 0 before a 1: pack "
                "sequences instead (cu_seqlens)"
            )
        if not mask.all():
            whole["attention_mask"] = mask
    labels = whole.get("labels")
    if labels is not None:
        if mask is not None:
            labels = labels.masked_fill(~mask, ignore_index)
        whole["labels"] = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels else labels
    if "position_ids" not in whole:
        whole["position_ids"] = torch.arange(length, device=device).expand(rows, length)
    elif whole["position_ids"].ndim == 2:
        whole["position_ids"] = whole["position_ids"].expand(rows, length)
    if layout.cu_seqlens is not None:
        first, _ = document_bounds(layout.cu_seqlens, device)
        starts = torch.arange(length, device=device) == first
        whole["document_ids"] = (starts.cumsum(0) - 1).expand(rows, length)

    shard = {key: layout.shard(value, 1, rank) if _runs_along(value, length) else value for key, value in whole.items()}
    if labels is not None:
        count = (whole["labels"] != ignore_index).sum()
        shard["num_valid_global"] = _sum_over_dp(count, mesh)
    use_layout(layout, mesh, group=group)
    return shard


def _runs_along(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == length


def _with_documents(layout: SequenceLayout, batch: Mapping[str, Any]) -> SequenceLayout:
    """``layout`` with the documents that the batch tells of."""
    told: tuple[int, ...] | None = None
    source = ""
    for key in _BORDERS:
        if batch.get(key) is not None:
            borders = check_cu_seqlens(batch[key], layout.seq_len)
            if told is not None and borders != told:
                raise ValueError(f"{key} must have the borders of {source}, got others")
            told, source = borders, key
    positions = batch.get("position_ids")
    if told is None and isinstance(positions, Tensor) and positions.ndim == 2:
        starts = positions[:, 1:] != positions[:, :-1] + 1
        if starts.any():
            if (starts != starts[:1]).any():
                raise ValueError(
                    "position_ids must start documents at the same places in all rows, got others: pack one row"
                )
            told = (0, *(starts[0].nonzero().flatten() + 1).tolist(), layout.seq_len)
            source = "position_ids"
    if told is None:
        return layout
    if layout.cu_seqlens is None:
        return SequenceLayout(layout.seq_len, layout.world, layout.kind, told)
    if _nonempty(layout.cu_seqlens) != _nonempty(told):
        raise ValueError(f"{source} must have the layout's documents, got others")
    return layout


def _nonempty(borders: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(borders)))


def _sum_over_dp(count: Tensor, mesh: DeviceMesh | LoopbackMesh | None) -> Tensor:
    # The ranks of a sequence have it whole and count the same.
    if mesh is None or mesh.ndim == 1 or "dp" not in dim_names(mesh):  # an only dimension is "sp"
        return count
    name = group_name(None, mesh, None, "dp")
    if name is None:
        return count
    channel = resolve(name)
    return channel.all_reduce(count.reshape(1).to(channel.control_device)).to(count.device).reshape(())


def sequence_parallel_loss(
    logits: Tensor,
    labels: Tensor,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    num_valid_global: Tensor | int | None = None,
    *,
    group: Group | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy whose mean over the ranks is the mean over all tokens that count, wherever they lie::

        loss = N · (sum over this rank's tokens) / (count over all ranks)        N = dp · sp

    DDP and FSDP average gradients over the N ranks, and so arrive at the gradient of the exact mean also where ranks
    have different numbers of labels, or none. For the value itself average the loss over the ranks.

    Args:
        logits: (…, V), any floating dtype; the sum is taken in float32, or float64.
        labels: int64 (…), shifted already, as :func:`shard_batch` gives them; ``ignore_index`` where none counts.
        mesh: dimensions "dp" and "sp", or one dimension; others, such as "tp", are not averaged over.
        num_valid_global: of :func:`shard_batch`.
        group: the N ranks, instead of a mesh.
        ignore_index: see ``labels``.

    Returns:
        the loss without dimensions; 0 where no label counts anywhere.

    Raises:
        TypeError, ValueError: shapes do not fit, or the count is missing.
    """
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise TypeError(f"logits and labels must be tensors, got {type(logits).__name__} and {type(labels).__name__}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of logits but for the last dimension, {tuple(logits.shape[:-1])}, got "
            f"{tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if num_valid_global is None:
        raise ValueError("num_valid_global must be given: shard_batch counts it over all ranks, got None")
    if not isinstance(num_valid_global, Tensor):
        check_int("num_valid_global", num_valid_global, minimum=0)
    ranks = _averaged(mesh) if mesh is not None else place(group_name(group, None, None))[1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=ignore_index)
    count = num_valid_global.to(total.device) if isinstance(num_valid_global, Tensor) else num_valid_global
    return total * ranks / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _averaged(mesh: DeviceMesh | LoopbackMesh) -> int:
    """Over how many ranks gradients are averaged."""
    names = dim_names(mesh)
    sizes = [mesh.size(names.index(dim)) for dim in _AVERAGED if dim in names]
    if not sizes and mesh.ndim != 1:
        raise ValueError(f"mesh must have dimensions 'dp' and 'sp', or one dimension, got {names}")
    return math.prod(sizes) if sizes else mesh.size()


def gradient_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks over which gradients are averaged: "dp" and "sp" of ``mesh`` as one dimension, "dp_sp".

    For ``fully_shard(block, mesh=gradient_mesh(mesh))``, or
    ``DistributedDataParallel(model, process_group=gradient_mesh(mesh).get_group())``. Parameters are replicated over
    the ranks of a sequence as they are over "dp"; "tp" and "pp" stay outside.

    Args:
        mesh: with a dimension "dp", "sp" or both.

    Returns:
        A mesh of one dimension.

    Raises:
        ValueError: the mesh has neither dimension.
    """
    held = tuple(dim for dim in dim_names(mesh) if dim in _AVERAGED)
    if not held:
        raise ValueError(f"mesh must have dimensions 'dp' or 'sp', got {mesh.mesh_dim_names}")
    if len(held) == 1:
        return mesh[held[0]]
    return mesh[held]._flatten("dp_sp")
