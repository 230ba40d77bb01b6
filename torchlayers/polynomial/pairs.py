"""Batches of graphs as batches of node pairs: all pairs of all graphs in one tensor, with no padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from .._backend import is_traced
from .._checks import check_int, check_ints, check_ndim, check_same_device

__all__ = ["PairBatch", "PairLayout", "to_pair_batch"]


class PairIndex(NamedTuple):
    """Where things are among T packed pairs of G graphs with Σ n nodes: int64 tensors on the layout's device."""

    graph: Tensor  # (T,): the graph of a pair
    transpose: Tensor  # (T,): the row of (j, i), for the pair (i, j)
    diagonal: Tensor  # (Σ n,): the row of (i, i), node after node
    padded: Tensor  # (T,): the row of a pair where every graph has max_nodes² of them


@dataclass(eq=False)
class PairLayout:
    """How the pairs of G graphs of sizes n_g lie in a tensor (T, C), T = Σ n_g²: pair (i, j) of graph g is row
    ``pair_ptr[g] + i n_g + j``.

    Made by :meth:`from_sizes`. The host knows ``num_nodes``, ``num_pairs`` and ``max_nodes``, so that no layer has to
    wait for the device to learn a shape.

    Args:
        node_ptr: (G + 1,), int64: 0, n_0, n_0 + n_1, …, Σ n_g.
        pair_ptr: (G + 1,), int64: 0, n_0², n_0² + n_1², …, T.
        num_nodes: Σ n_g.
        num_pairs: T.
        max_nodes: the largest n_g, 0 without graphs.
    """

    node_ptr: Tensor
    pair_ptr: Tensor
    num_nodes: int
    num_pairs: int
    max_nodes: int
    _index: PairIndex | None = field(default=None, repr=False)

    @classmethod
    def from_sizes(cls, sizes: Sequence[int] | Tensor, device: torch.device | str | None = None) -> PairLayout:
        """The layout of graphs with these numbers of nodes; 0 is a size like others.

        Args:
            sizes: n_g, ints or a 1-d tensor of them (whose device is waited for).
            device: of the pointers; that of ``sizes``, or the CPU, by default.

        Raises:
            TypeError, ValueError: sizes that are no ints or negative.
        """
        if isinstance(sizes, Tensor):
            check_ndim("sizes", sizes, 1, "(graphs,)")
            device = sizes.device if device is None else device
            sizes = sizes.tolist()
        counts = torch.tensor((0, *check_ints("sizes", list(sizes), minimum=0)), dtype=torch.int64)
        node_ptr, pair_ptr = counts.cumsum(0), counts.square().cumsum(0)
        totals = int(node_ptr[-1]), int(pair_ptr[-1]), int(counts.max())
        return cls(node_ptr.to(device), pair_ptr.to(device), *totals)

    @property
    def num_graphs(self) -> int:
        return self.node_ptr.shape[0] - 1

    @property
    def sizes(self) -> Tensor:
        """(G,), int64: the number of nodes of each graph."""
        return self.node_ptr.diff()

    def index(self) -> PairIndex:
        """The tables that plain torch needs; kept after the first call, except where the call is traced."""
        if self._index is not None:
            return self._index
        sizes, device = self.sizes, self.node_ptr.device
        graph = torch.repeat_interleave(self.pair_ptr.diff(), output_size=self.num_pairs)
        n, start = sizes[graph], self.pair_ptr[graph]
        within = torch.arange(self.num_pairs, device=device) - start
        i = within // n
        j = within - i * n
        owner = torch.repeat_interleave(sizes, output_size=self.num_nodes)
        node = torch.arange(self.num_nodes, device=device) - self.node_ptr[owner]
        index = PairIndex(
            graph=graph,
            transpose=start + j * n + i,
            diagonal=self.pair_ptr[owner] + node * (sizes[owner] + 1),
            padded=(graph * self.max_nodes + i) * self.max_nodes + j,
        )
        if not is_traced():
            self._index = index
        return index

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairLayout:
        if self.node_ptr.device == torch.device(device):
            return self
        return self._moved(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairLayout:
        return self._moved(lambda t: t.pin_memory())

    def _moved(self, move: Any) -> PairLayout:
        index = None if self._index is None else PairIndex(*map(move, self._index))
        pointers = move(self.node_ptr), move(self.pair_ptr)
        return PairLayout(*pointers, self.num_nodes, self.num_pairs, self.max_nodes, index)


@dataclass(eq=False)
class PairBatch:
    """Features of all pairs of nodes of all graphs of a batch, packed.

    Args:
        x: (T, C), T = Σ n_g², pair (i, j) of graph g in row pair_ptr[g] + i n_g + j.
        layout: where each graph lies. Batches of equal layout can share one.

    Raises:
        TypeError, ValueError: ``x`` is no tensor (T, C) of the layout's T pairs.

    Example::

        >>> import torch
        >>> from torchlayers.polynomial import PairBatch, PairLayout
        >>> batch = PairBatch(torch.randn(13, 4), PairLayout.from_sizes([2, 3]))
        >>> x, mask = batch.to_dense()
        >>> x.shape, mask.sum(1).tolist()
        (torch.Size([2, 3, 3, 4]), [2, 3])
    """

    x: Tensor
    layout: PairLayout

    def __post_init__(self) -> None:
        check_ndim("x", self.x, 2, "(pairs, channels)")
        if not isinstance(self.layout, PairLayout):
            raise TypeError(f"layout must be a PairLayout, got {self.layout!r} ({type(self.layout).__name__})")
        if self.x.shape[0] != self.layout.num_pairs:
            raise ValueError(
                f"x must have the layout's {self.layout.num_pairs} pairs along dimension 0, got {self.x.shape[0]}: "
                f"shape {tuple(self.x.shape)}"
            )

    # What a reader of a batch asks first, without a word about layouts.

    @property
    def node_ptr(self) -> Tensor:
        return self.layout.node_ptr

    @property
    def pair_ptr(self) -> Tensor:
        return self.layout.pair_ptr

    @property
    def num_graphs(self) -> int:
        return self.layout.num_graphs

    @property
    def sizes(self) -> Tensor:
        """(G,), int64: the number of nodes of each graph."""
        return self.layout.sizes

    def with_x(self, x: Tensor) -> PairBatch:
        """Other features of the same pairs."""
        return PairBatch(x, self.layout)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        return PairBatch(self.x.to(device, non_blocking=non_blocking), self.layout.to(device, non_blocking))

    def pin_memory(self) -> PairBatch:
        """In page-locked memory; a DataLoader calls this by itself."""
        return PairBatch(self.x.pin_memory(), self.layout.pin_memory())

    def unbatch(self) -> list[Tensor]:
        """Graph by graph (n_g, n_g, C), views of ``x``. Waits for the device."""
        sizes = self.sizes.tolist()
        parts = self.x.split([n * n for n in sizes])
        return [part.unflatten(0, (n, n)) for part, n in zip(parts, sizes, strict=True)]

    def to_dense(self, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """(G, N, N, C) with ``fill`` where a graph has fewer than N = max_nodes nodes, and the mask (G, N) of nodes."""
        g, n = self.num_graphs, self.layout.max_nodes
        rows = self.x.new_full((g * n * n, self.x.shape[1]), fill).index_copy(0, self.layout.index().padded, self.x)
        mask = torch.arange(n, device=self.x.device) < self.sizes[:, None]
        return rows.view(g, n, n, self.x.shape[1]), mask

    @classmethod
    def from_dense(cls, x: Tensor, mask: Tensor | None = None) -> PairBatch:
        """The pairs of true nodes alone; the inverse of :meth:`to_dense`. Waits for the device.

        Args:
            x: (G, N, N, C).
            mask: (G, N) bool, True = a node; all are by default. Nodes keep their order, whatever lies between them.

        Raises:
            TypeError, ValueError: shapes or dtypes that do not fit.
        """
        check_ndim("x", x, 4, "(graphs, N, N, channels)")
        check_square("x", x)
        if mask is None:
            g, n = x.shape[:2]
            return cls(x.reshape(-1, x.shape[-1]), PairLayout.from_sizes([n] * g, x.device))
        check_mask(mask, x)
        layout = PairLayout.from_sizes(mask.sum(1), x.device)
        return cls(x[mask[:, :, None] & mask[:, None, :]], layout)

    @classmethod
    def from_data_list(
        cls,
        data_list: Iterable[Any],
        *,
        x: str | Sequence[str] | None = None,
        edge_attr: str | Sequence[str] | None = None,
        pair_attr: str | Sequence[str] | None = None,
        graph_attr: str | Sequence[str] | None = None,
        adjacency: bool = True,
    ) -> PairBatch:
        """One batch of several graphs, as :class:`torch_geometric.data.Data` has them.

        Args:
            data_list: objects with ``edge_index`` (2, E), ``num_nodes`` and the attributes named below.
            x, edge_attr, pair_attr, graph_attr: names of attributes, one or several each, whose channels come one after
                the other; (n, …), (E, …), (n², …) and (1, …) of each graph. By default those of the names "x",
                "edge_attr" and "pair_attr" that the first graph has, and no graph attributes.
            adjacency: see :func:`to_pair_batch`, which says what the channels are.

        Raises:
            ValueError: a name that a graph lacks, and what :func:`to_pair_batch` raises.
        """
        data_list = list(data_list)
        if not data_list:
            raise ValueError("data_list must have at least one graph, got none")
        for data in data_list:
            _check_edges(data.edge_index)
        names = _attribute_names(data_list[0], x, edge_attr, pair_attr, graph_attr)
        sizes = [_num_nodes(data) for data in data_list]
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
        columns = {kind: [_joined(data_list, sizes, kind, name) for name in group] for kind, group in names.items()}
        edge_index = torch.cat([d.edge_index + start for d, start in zip(data_list, starts, strict=True)], dim=1)
        return _assemble(edge_index, PairLayout.from_sizes(sizes, edge_index.device), columns, adjacency)

    @classmethod
    def from_data(
        cls,
        data: Any,
        *,
        x: str | Sequence[str] | None = None,
        edge_attr: str | Sequence[str] | None = None,
        pair_attr: str | Sequence[str] | None = None,
        graph_attr: str | Sequence[str] | None = None,
        adjacency: bool = True,
    ) -> PairBatch:
        """The pairs of a :class:`torch_geometric.data.Batch`, or of one graph; arguments as in :meth:`from_data_list`.

        Waits for the device, where the batch lies on one: better made where batches are made, in ``collate_fn``.
        """
        _check_edges(data.edge_index)
        names = _attribute_names(data, x, edge_attr, pair_attr, graph_attr)
        ptr = getattr(data, "ptr", None)
        sizes = [_num_nodes(data)] if ptr is None else ptr.diff()
        columns = {kind: [_attribute(data, name) for name in group] for kind, group in names.items()}
        layout = PairLayout.from_sizes(sizes, data.edge_index.device)
        return _assemble(data.edge_index, layout, columns, adjacency)


def to_pair_batch(
    edge_index: Tensor,
    batch: Tensor | None = None,
    edge_attr: Tensor | None = None,
    x: Tensor | None = None,
    pair_attr: Tensor | None = None,
    graph_attr: Tensor | None = None,
    *,
    num_nodes: int | None = None,
    num_graphs: int | None = None,
    adjacency: bool = True,
) -> PairBatch:
    """Pair features of a batch of graphs, with these channels, in this order::

        graph_attr of the graph | pair_attr of (i, j) | 1 if i → j is an edge | edge_attr of i → j | x of i, where i = j

    and zero where there is no edge, or i ≠ j.

    Args:
        edge_index: (2, E), int64, sources and targets, each edge once. An undirected edge is in both directions.
        batch: (Σ n,), int64, not decreasing: the graph of each node; one graph by default.
        edge_attr: (E,) or (E, …).
        x: (Σ n,) or (Σ n, …), node features.
        pair_attr: (Σ n²,) or (Σ n², …), graph after graph, row after row.
        graph_attr: (G,) or (G, …).
        num_nodes: Σ n; by default that of ``batch`` or ``x``, or one more than the largest node with an edge.
        num_graphs: G; by default one more than the last entry of ``batch``.
        adjacency: whether there is the channel of edges.

    Returns:
        PairBatch of the dtype of the first floating tensor among the attributes in the order of the channels, torch's
        default dtype where there is none.

    Raises:
        TypeError: ``edge_index`` or ``batch`` that are no ints.
        ValueError: nodes out of range, an edge between graphs, an edge that is there twice, ``batch`` that decreases,
            attributes of another length than there are nodes, edges, pairs or graphs; no channel at all.

    Example::

        >>> import torch
        >>> from torchlayers.polynomial import to_pair_batch
        >>> edge_index = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
        >>> pairs = to_pair_batch(edge_index, torch.tensor([0, 0, 1, 1, 1]), x=torch.randn(5, 6))
        >>> pairs.x.shape, pairs.sizes
        (torch.Size([13, 7]), tensor([2, 3]))
    """
    _check_edges(edge_index)
    if batch is not None:
        check_ndim("batch", batch, 1, "(nodes,)")
        _check_ints_dtype("batch", batch)
        check_same_device("batch", batch, "edge_index", edge_index)
    if num_nodes is None:
        if batch is not None or x is not None:
            num_nodes = (batch if batch is not None else x).shape[0]  # type: ignore[union-attr]
        else:
            num_nodes = int(edge_index.max()) + 1 if edge_index.numel() else 0
    check_int("num_nodes", num_nodes, minimum=0)
    sizes: list[int] | Tensor = [num_nodes]
    if batch is None:
        if num_graphs not in (None, 1):
            raise ValueError(f"num_graphs must be 1 without batch, got {num_graphs}")
    else:
        if batch.shape[0] != num_nodes:
            raise ValueError(f"batch must have num_nodes = {num_nodes} entries, got {batch.shape[0]}")
        if bool((batch.diff() < 0).any()) or (num_nodes and int(batch[0]) < 0):
            raise ValueError("batch must not decrease and start at 0 or above, got one that does")
        last = int(batch[-1]) + 1 if num_nodes else 0
        count = last if num_graphs is None else check_int("num_graphs", num_graphs, minimum=0)
        if last > count:
            raise ValueError(f"num_graphs must be above the last entry of batch, {last - 1}, got {num_graphs}")
        sizes = torch.bincount(batch, minlength=count)
    columns = {
        name: [] if value is None else [value]
        for name, value in (("graph_attr", graph_attr), ("pair_attr", pair_attr), ("edge_attr", edge_attr), ("x", x))
    }
    return _assemble(edge_index, PairLayout.from_sizes(sizes, edge_index.device), columns, adjacency)


# ------------------------------------------------------------------------------------------------- building a batch


def _assemble(edge_index: Tensor, layout: PairLayout, columns: dict[str, list[Tensor]], adjacency: bool) -> PairBatch:
    _check_edges(edge_index)
    rows = _edge_rows(edge_index, layout)
    lengths = {
        "graph_attr": layout.num_graphs,
        "pair_attr": layout.num_pairs,
        "edge_attr": edge_index.shape[1],
        "x": layout.num_nodes,
    }
    parts = {
        kind: [_as_columns(kind, value, length, _ONE_ROW_PER[kind], edge_index) for value in columns[kind]]
        for kind, length in lengths.items()
    }
    given = [part for group in parts.values() for part in group]
    dtype = next((part.dtype for part in given if part.is_floating_point()), torch.get_default_dtype())
    channels = sum(part.shape[1] for part in given) + bool(adjacency)
    if channels == 0:
        raise ValueError("adjacency must be True where there are no attributes: there is no channel")
    out = torch.zeros(layout.num_pairs, channels, dtype=dtype, device=edge_index.device)
    index = layout.index()
    column = 0
    for kind, where in (("graph_attr", None), ("pair_attr", None), ("", rows), ("edge_attr", rows), ("x", None)):
        if kind == "":
            if adjacency:
                out[where, column] = 1
                column += 1
            continue
        for part in parts[kind]:
            block = out[:, column : column + part.shape[1]]
            column += part.shape[1]
            if kind == "graph_attr":
                block.copy_(part[index.graph])
            elif kind == "pair_attr":
                block.copy_(part)
            else:
                block[rows if kind == "edge_attr" else index.diagonal] = part.to(dtype)
    return PairBatch(out, layout)


def _edge_rows(edge_index: Tensor, layout: PairLayout) -> Tensor:
    """The rows of the edges among the pairs, each edge checked."""
    if edge_index.shape[1] == 0:
        return edge_index[0]
    low, high = int(edge_index.min()), int(edge_index.max())
    if low < 0 or high >= layout.num_nodes:
        raise ValueError(f"edge_index must have nodes from 0 to {layout.num_nodes - 1}, got {low} to {high}")
    source, target = edge_index
    graph = torch.searchsorted(layout.node_ptr, source, right=True) - 1
    start, n = layout.node_ptr[graph], layout.sizes[graph]
    i, j = source - start, target - start
    between = (j < 0) | (j >= n)
    if bool(between.any()):
        edge = edge_index[:, between][:, 0].tolist()
        raise ValueError(f"edge_index must have both nodes of an edge in one graph, got the edge {tuple(edge)}")
    rows = layout.pair_ptr[graph] + i * n + j
    order = rows.sort()
    twice = order.values[1:] == order.values[:-1]
    if bool(twice.any()):
        edge = edge_index[:, order.indices[1:][twice][0]].tolist()
        raise ValueError(f"edge_index must have each edge once, got {tuple(edge)} more often")
    return rows


def _as_columns(name: str, value: object, length: int, what: str, edge_index: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {value!r} ({type(value).__name__})")
    if value.ndim == 0 or value.shape[0] != length:
        raise ValueError(f"{name} must have one row per {what}, {length} in all, got shape {tuple(value.shape)}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    check_same_device(name, value, "edge_index", edge_index)
    columns = 1
    for size in value.shape[1:]:
        columns *= size
    return value.reshape(length, columns)


def _check_edges(edge_index: object) -> None:
    check_ndim("edge_index", edge_index, 2, "(2, edges)")
    assert isinstance(edge_index, Tensor)
    if edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, edges), got {tuple(edge_index.shape)}")
    _check_ints_dtype("edge_index", edge_index)


def _check_ints_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64, got {value.dtype}")


def check_square(name: str, x: Tensor) -> None:
    """``x`` is (…, N, N, C)."""
    if x.shape[-3] != x.shape[-2]:
        raise ValueError(f"{name} must be square, (..., N, N, channels), got shape {tuple(x.shape)}")


def check_mask(mask: object, x: Tensor) -> None:
    """``mask`` is a bool tensor (…, N) for ``x`` of (…, N, N, C)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor (..., N), got {mask!r} ({type(mask).__name__})")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True = a node, got {mask.dtype}")
    if mask.shape != x.shape[:-2]:
        raise ValueError(f"mask must have shape {tuple(x.shape[:-2])}, x without its last two, got {tuple(mask.shape)}")
    check_same_device("mask", mask, "x", x)


_ONE_ROW_PER = {"graph_attr": "graph", "pair_attr": "pair of nodes (Σ n²)", "edge_attr": "edge", "x": "node"}
_BY_DEFAULT = {"x": ("x",), "edge_attr": ("edge_attr",), "pair_attr": ("pair_attr",), "graph_attr": ()}


def _attribute_names(data: Any, x: Any, edge_attr: Any, pair_attr: Any, graph_attr: Any) -> dict[str, tuple[str, ...]]:
    given = {"graph_attr": graph_attr, "pair_attr": pair_attr, "edge_attr": edge_attr, "x": x}
    return {
        kind: tuple(name for name in _BY_DEFAULT[kind] if getattr(data, name, None) is not None)
        if names is None
        else (names,)
        if isinstance(names, str)
        else tuple(names)
        for kind, names in given.items()
    }


def _attribute(data: Any, name: str) -> Tensor:
    value = getattr(data, name, None)
    if not isinstance(value, Tensor):
        raise ValueError(f"data must have a tensor {name!r}, got {value!r}")
    return value


def _joined(data_list: list[Any], sizes: list[int], kind: str, name: str) -> Tensor:
    """An attribute of all graphs, its length checked graph by graph: too many here would else make up for there."""
    parts = []
    for data, n in zip(data_list, sizes, strict=True):
        length = {"graph_attr": 1, "pair_attr": n * n, "edge_attr": data.edge_index.shape[1], "x": n}[kind]
        parts.append(_as_columns(name, _attribute(data, name), length, _ONE_ROW_PER[kind], data.edge_index))
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise ValueError(f"{name} must have the same number of channels in all graphs, got {widths}")
    return torch.cat(parts)


def _num_nodes(data: Any) -> int:
    return check_int("num_nodes", data.num_nodes, minimum=0)


# FSDP2, checkpointing and torch.export look for tensors inside arguments and results.
register_pytree_node(
    PairLayout,
    lambda p: ([p.node_ptr, p.pair_ptr], (p.num_nodes, p.num_pairs, p.max_nodes)),
    lambda pointers, totals: PairLayout(*pointers, *totals),
    serialized_type_name="torchlayers.polynomial.PairLayout",
)


def _unflatten(children: Iterable[Any], _: Any) -> PairBatch:
    # Not by the constructor: what is put back need not be tensors.
    batch = object.__new__(PairBatch)
    batch.x, batch.layout = children
    return batch


register_pytree_node(
    PairBatch, lambda b: ([b.x, b.layout], None), _unflatten, serialized_type_name="torchlayers.polynomial.PairBatch"
)
