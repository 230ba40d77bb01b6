"""Which layout the shards at hand have: said once a batch, and asked for by every layer that attends across ranks.

Held by group, and for the process as a whole what was said last. Plain module globals: ``torch.compile`` reads and
guards them, and a recomputation in autograd's threads sees them too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._ring import group_name
from ._sequence import SequenceLayout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ._ring import Group, LoopbackMesh

__all__ = ["placement", "sequence_group", "use_layout"]

_layouts: dict[str, SequenceLayout] = {}
_last: tuple[SequenceLayout | None, str | None] | None = None  # None: nothing was said yet


class use_layout:
    """Say which layout the shards have that modules will get: a layer asks where it was given none of its own.

    Called, it sets; as a context manager it sets and, on leaving, restores::

        use_layout(layout, mesh)            # from here on
        with use_layout(layout, mesh):      # in this block
            loss = step(model, shard)
        with use_layout(None):              # whole sequences, each rank by itself
            evaluate(model)

    :func:`torchlayers.ring_attention.shard_batch` calls it. Where batches with layouts of their own are cut ahead of
    their use, or in another process, enter the context around forward and backward: what counts is the layout in force
    when a layer runs, or is recomputed.

    Args:
        layout: of the shards; None: no sequence is shared out.
        mesh: has the ranks of the sequence as its dimension "sp", or as its only one. May be left out for one rank.
        group: the ranks of the sequence, instead of a mesh.

    Raises:
        TypeError, ValueError: the group does not fit the layout.
    """

    def __init__(
        self,
        layout: SequenceLayout | None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
        *,
        group: Group | None = None,
    ) -> None:
        check_layout("layout", layout)
        self._layout = layout
        self._group = None if layout is None else group_name(group, mesh, layout.world, "sp")
        self._before = (_last, _layouts.get(self._group) if self._group is not None else None)
        self._set()

    def _set(self) -> None:
        global _last
        _last = (self._layout, self._group)
        if self._group is not None and self._layout is not None:
            _layouts[self._group] = self._layout

    def __enter__(self) -> use_layout:
        self._set()
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _last
        _last, layout = self._before
        if self._group is not None:
            if layout is None:
                _layouts.pop(self._group, None)
            else:
                _layouts[self._group] = layout


def check_layout(name: str, layout: object) -> None:
    """``layout`` is a :class:`SequenceLayout` or None."""
    if layout is not None and not isinstance(layout, SequenceLayout):
        raise TypeError(f"{name} must be a SequenceLayout, got {type(layout).__name__}")


def sequence_group(
    group: Group | None, mesh: DeviceMesh | LoopbackMesh | None, layout: SequenceLayout | None = None
) -> str | None:
    """The name of the group over whose ranks sequences are shared out; None for one rank, or where none is given.

    Raises:
        TypeError, ValueError: as :func:`torchlayers._ring.group_name`, which fits it to ``layout`` where there is one.
    """
    if group is None and mesh is None:  # it may be found at the call
        return None
    return group_name(group, mesh, None if layout is None else layout.world, "sp")


def placement(layout: SequenceLayout | None, group: str | None) -> tuple[SequenceLayout | None, str | None]:
    """The layout and the group of a layer that was given these, or else what is in force.

    (None, None): whole sequences, each rank by itself. That is so too where nothing was ever said, which
    :func:`spoken` tells.

    Raises:
        ValueError: a layout without a group, or a group without a layout, and none in force.
    """
    if layout is not None:
        if layout.world > 1 and group is None:
            group = None if _last is None else _last[1]
            if group is None:
                raise ValueError(f"group or mesh must be given for a layout over {layout.world} ranks, got neither")
        return layout, group
    if group is not None:
        if _last is not None and _last[0] is None:  # said so
            return None, None
        layout = _layouts.get(group)
        if layout is None:
            raise ValueError(
                "layout must be given, or be in force (shard_batch and use_layout see to that), for a layer whose "
                "sequences are shared out over a group, got none"
            )
        return layout, group
    return (None, None) if _last is None else _last


def spoken() -> bool:
    """Whether :class:`use_layout` has been called and not been left."""
    return _last is not None
