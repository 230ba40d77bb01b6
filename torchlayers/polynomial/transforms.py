"""Polynomial features of graphs as a PyG transform: what a network cannot compute, or whatever patterns are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import check_choice, check_int, require
from .computability import Bank
from .enumeration import Kind, enumerate_patterns
from .evaluation import evaluate
from .patterns import Pattern
from .plan import contraction_plan
from .sparse import polynomials_of_edges

__all__ = ["AddPolynomialFeatures"]

_BaseTransform: Any = require("torch_geometric.transforms", extra="graphs", quiet=True).BaseTransform

# Nodes, and products of two numbers, up to which patterns are contracted with a dense matrix: a second or so.
_DENSE_NODES, _DENSE_PRODUCTS = 2000, 2**30
# Numbers that values of all pairs may take at once on the way: 2 GiB.
_PAIR_NUMBERS = 2**28


class AddPolynomialFeatures(_BaseTransform):
    r"""Adds the values of polynomial basis elements of a graph's adjacency matrix to PyG's ``Data``.

    Each pattern H of order 0, 1 or 2 is a channel of the graph, of its nodes, or of ordered pairs of nodes:

    .. math:: P_H(A)_{i_{out}} = \sum_{j: V(H) \to [n],\ j_{out} = i_{out}} \ \prod_{(r, s) \in E(H)} A_{j_r j_s}

    a number of homomorphisms, in which nodes of H may coincide. By default they are the connected patterns that PPGN++
    cannot compute, up to degree 6 (the "PPGN++ (6)" of arXiv 2302.11556); with ``exclude="mpnn"`` those that no message
    passing computes; with ``patterns`` any.

    - ``graph_attr`` (1, F): patterns without outputs;
    - ``node_attr`` (N, F): patterns with one output;
    - ``pair_attr`` (N², F): patterns with two, of the pair (i, j) in row i N + j, as
      :class:`~torchlayers.polynomial.PairBatch` has it;
    - ``edge_attr`` (E, F): the same patterns, of existing edges, in the order of ``edge_index``.

    Channels are in the order of ``patterns``; an attribute that would have none is not set. Batches of PyG concatenate
    all of them along their first dimension. A graph is read as a set of edges: its values depend neither on the order
    of edges nor on copies of them. They are exact integers before the normalisation where the graph has no weights,
    in torch's default dtype after it. Apply it to whole graphs, before batching, and again after a subgraph was cut.

    Args:
        patterns: :class:`Pattern` objects; they take the place of ``degree``, ``exclude`` and ``kind``.
        degree: the largest degree of enumerated patterns, from 1 on.
        exclude: which enumerated patterns to leave out: those that a network computes, named as in :data:`BANKS`
            (``"ppgn++"``, ``"mpnn"``, ...); None for none.
        kind: of the enumerated patterns, ``"simple"``, ``"weighted"`` or ``"directed"`` (see
            :func:`enumerate_patterns`); by default weighted where ``weight_attr`` is given, else simple.
        node_attr: name of the attribute; None appends to ``x``, False leaves node features out.
        edge_attr: likewise; None appends to ``edge_attr``.
        pair_attr: name of the attribute, or False, as it must be for large graphs: it has N² rows, and some patterns
            take N³ numbers on the way to them.
        graph_attr: name of the attribute, or False.
        normalize: ``"none"``; ``"log1p"``, ``sign(v) log(1 + |v|)``; or ``"l2"``: each graph's rows, then its columns
            are divided by their Euclidean norm, as the paper has it (a graph's single row only as a row), which gives
            up the counts.
        weight_attr: attribute with weights of edges, (E,) or (E, 1); or (E, C) for coloured patterns, colour c being
            column c. Without, edges count 1.
        drop_inactive: leave out patterns that are zero on all graphs that :meth:`fit` has seen.

    Raises:
        ValueError: on construction for an option out of its range; on a graph that has loops or one-way edges and
            undirected patterns to which that matters, copies of an edge with weights, too many nodes for
            ``pair_attr``, or was batched already.
        RuntimeError: ``drop_inactive`` and not yet fitted.
        OverflowError: a count does not fit 64 bits.

    Example::

        >>> from torch_geometric.utils import barabasi_albert_graph
        >>> from torch_geometric.data import Data
        >>> from torchlayers.polynomial import AddPolynomialFeatures, Pattern
        >>> cycles = [Pattern.cycle(k, outputs=(0,)) for k in range(3, 9)]
        >>> transform = AddPolynomialFeatures(cycles, normalize="log1p")
        >>> transform(Data(edge_index=barabasi_albert_graph(20, 3), num_nodes=20)).poly_node.shape
        torch.Size([20, 6])
    """

    def __init__(
        self,
        patterns: Iterable[Pattern] | None = None,
        *,
        degree: int = 6,
        exclude: str | int | Bank | None = "ppgn++",
        kind: Kind | None = None,
        node_attr: str | Literal[False] | None = "poly_node",
        edge_attr: str | Literal[False] | None = "poly_edge",
        pair_attr: str | Literal[False] = "poly_pair",
        graph_attr: str | Literal[False] = "poly_graph",
        normalize: Literal["none", "log1p", "l2"] = "none",
        weight_attr: str | None = None,
        drop_inactive: bool = False,
    ):
        check_choice("normalize", normalize, ("none", "log1p", "l2"))
        # By what they belong to: the order of their patterns, and the name.
        self._attributes: dict[str, tuple[int, str | None]] = {
            what: (order, _check_name(f"{what}_attr", name, appends=what in ("node", "edge")))
            for what, order, name in (
                ("graph", 0, graph_attr),
                ("node", 1, node_attr),
                ("edge", 2, edge_attr),
                ("pair", 2, pair_attr),
            )
            if name is not False
        }
        names = [name for _, name in self._attributes.values() if name is not None]
        if not self._attributes or len(set(names)) < len(names):
            raise ValueError(
                "node_attr, edge_attr, pair_attr and graph_attr must be different names, not all False, "
                f"got {node_attr!r}, {edge_attr!r}, {pair_attr!r} and {graph_attr!r}"
            )
        self.normalize = normalize
        self.weight_attr = weight_attr
        self.drop_inactive = drop_inactive
        self.kind: Kind | None = None
        orders = sorted({order for order, _ in self._attributes.values()})
        if patterns is None:
            self.kind = kind or ("simple" if weight_attr is None else "weighted")
            check_int("degree", degree)
            patterns = [
                pattern
                for order in orders
                for each in range(1, degree + 1)
                for pattern in enumerate_patterns(each, order, kind=self.kind, exclude=exclude)
            ]
        given = list(dict.fromkeys(patterns))
        for pattern in given:
            if not isinstance(pattern, Pattern):
                raise TypeError(f"patterns must be Pattern objects, got {pattern!r} ({type(pattern).__name__})")
            if pattern.is_coloured != given[0].is_coloured:
                raise ValueError(f"patterns must all have colours or none, got {given[0]} and {pattern}")
        if given and given[0].is_coloured and weight_attr is None:
            raise ValueError("weight_attr must name an attribute with a column for each colour for coloured patterns")
        self._all = tuple(pattern for pattern in given if pattern.order in orders)
        if not self._all:
            wanted = ", ".join(f"{what}_attr" for what in self._attributes)
            raise ValueError(f"patterns must have at least one for {wanted}, got none")
        self._active: tuple[Pattern, ...] | None = None if drop_inactive else self._all

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns that are channels: with ``drop_inactive`` those that fire, once fitted."""
        if self._active is None:
            raise RuntimeError("drop_inactive needs fit(graphs) on the training graphs first")
        return self._active

    @property
    def num_graph_features(self) -> int:
        """Channels of ``graph_attr``."""
        return len(_of_order(self.patterns, 0))

    @property
    def num_node_features(self) -> int:
        """Channels of ``node_attr``."""
        return len(_of_order(self.patterns, 1))

    @property
    def num_pair_features(self) -> int:
        """Channels of ``pair_attr``, and of ``edge_attr``."""
        return len(_of_order(self.patterns, 2))

    def fit(self, graphs: Iterable[Any]) -> AddPolynomialFeatures:
        """Note which patterns are zero on all of ``graphs``: on the training graphs, so that no others have a say.

        Does nothing without ``drop_inactive``. Returns itself.
        """
        if not self.drop_inactive:
            return self
        silent = self._all
        for graph in graphs:
            if not silent:
                break
            fires: set[Pattern] = set()
            for what, values in self._values(graph, silent).items():
                channels = _of_order(silent, self._attributes[what][0])
                fires.update(p for p, fired in zip(channels, values.ne(0).any(0).tolist(), strict=True) if fired)
            silent = tuple(pattern for pattern in silent if pattern not in fires)
        dropped = set(silent)
        self._active = tuple(pattern for pattern in self._all if pattern not in dropped)
        return self

    def forward(self, data: Any) -> Any:
        for what, values in self._values(data, self.patterns).items():
            channels, name = self._normalized(values), self._attributes[what][1]
            if name is None:
                name = "x" if what == "node" else "edge_attr"
                held = getattr(data, name)
                if held is not None:
                    held = held[:, None] if held.ndim == 1 else held
                    channels = torch.cat([held, channels.to(held.device)], dim=-1)
            data[name] = channels
        return data

    def _normalized(self, values: Tensor) -> Tensor:
        if self.normalize == "log1p":
            values = values.double()
            values = values.sign() * values.abs().log1p()
        elif self.normalize == "l2":
            values = values.double()
            for dim in (1, 0) if len(values) > 1 else (1,):
                norm = values.norm(dim=dim, keepdim=True)
                values = values / torch.where(norm > 0, norm, 1.0)
        return values.to(torch.get_default_dtype())

    def _values(self, data: Any, patterns: Sequence[Pattern]) -> dict[str, Tensor]:
        """(1, F), (n, F), (E, F) or (n², F) by attribute, where it has channels: int64, or float64 for such weights."""
        graph = _Graph(data, self.weight_attr, coloured=any(pattern.is_coloured for pattern in patterns))
        if self.kind == "simple" and graph.loop is not None:
            raise ValueError(
                f"edge_index must have no loops for patterns of kind 'simple', got one at node {graph.loop}: "
                "use RemoveSelfLoops, or kind='weighted'"
            )
        if graph.one_way is not None and not all(p.directed for p in patterns):
            raise ValueError(
                "edge_index must have each edge in both directions (with equal weights) for undirected patterns, "
                f"got {graph.one_way[0]} to {graph.one_way[1]}: use ToUndirected, or directed patterns"
            )
        found = dict(zip(patterns, self._evaluate(graph, patterns), strict=True))
        values: dict[str, Tensor] = {}
        for what, (order, _) in self._attributes.items():
            columns = [found[pattern] for pattern in _of_order(patterns, order)]
            if columns:
                columns = [graph.of_edges(c) if what == "edge" else c.reshape(-1) for c in columns]
                values[what] = torch.stack(columns, dim=-1)
        return values

    def _evaluate(self, graph: _Graph, patterns: Sequence[Pattern]) -> list[Tensor]:
        """Values of patterns; those of order 2 for all pairs (n, n), or for edges alone where that is enough."""
        pairs = _of_order(patterns, 2) if "pair" in self._attributes else []
        numbers = contraction_plan(pairs).peak(graph.n) if pairs else 0
        if numbers > _PAIR_NUMBERS:
            raise ValueError(
                f"pair_attr must be False where all pairs take over {_PAIR_NUMBERS:.1e} numbers at once, got "
                f"{numbers:.1e} for {graph.n} nodes"
            )
        large = graph.n > _DENSE_NODES or contraction_plan(list(patterns)).multiplications(graph.n) > _DENSE_PRODUCTS
        dense = pairs if large else patterns
        sparse = [p for p in patterns if p not in pairs] if large else []
        found: dict[Pattern, Tensor] = {}
        if dense:
            found.update(zip(dense, evaluate(list(dense), graph.dense()), strict=True))
        if sparse:
            found.update(zip(sparse, graph.sparse_values(sparse), strict=True))
        return [found[pattern] for pattern in patterns]

    def __repr__(self) -> str:
        patterns = self._all if self._active is None else self._active
        counts = [len(_of_order(patterns, order)) for order in range(3)]
        fitted = ", not fitted" if self._active is None else ""
        return (
            f"{type(self).__name__}({counts[0]} of graphs, {counts[1]} of nodes, {counts[2]} of pairs"
            f", normalize={self.normalize!r}{fitted})"
        )


def _of_order(patterns: Sequence[Pattern], order: int) -> list[Pattern]:
    return [pattern for pattern in patterns if pattern.order == order]


def _check_name(argument: str, value: Any, *, appends: bool) -> str | None:
    if value is None and appends:
        return value
    if not isinstance(value, str) or not value.isidentifier():
        also = ", None to append," if appends else ""
        raise ValueError(f"{argument} must be the name of an attribute{also} or False, got {value!r}")
    if "index" in value or "batch" in value or value in ("face", "ptr"):
        raise ValueError(f"{argument} must be a name to which PyG gives no meaning when it collates, got {value!r}")
    return value


class _Graph:
    """A PyG graph as a set of edges with weights."""

    def __init__(self, data: Any, weight_attr: str | None, *, coloured: bool):
        graphs = require("torch_geometric.data", extra="graphs", quiet=True)
        if not isinstance(data, graphs.Data):
            raise TypeError(f"data must be a torch_geometric.data.Data, got {type(data).__name__}")
        if isinstance(data, graphs.Batch):
            raise ValueError("data must be one graph, got a Batch: apply the transform before batching")
        if data.edge_index is None or data.num_nodes is None:
            raise ValueError(f"data must have edge_index and a number of nodes, got {data}")
        self.n: int = data.num_nodes
        self.weighted = weight_attr is not None
        row, col = data.edge_index
        if len(row) and not 0 <= int(data.edge_index.min()) <= int(data.edge_index.max()) < self.n:
            raise ValueError(
                f"edge_index must have nodes from 0 to {self.n - 1}, got {int(data.edge_index.min())} to "
                f"{int(data.edge_index.max())}"
            )
        keys, self._slot, copies = torch.unique(row * self.n + col, return_inverse=True, return_counts=True)
        self._row, self._col = row, col
        self._keys = keys
        self.rows, self.cols = (keys // max(1, self.n), keys % max(1, self.n))
        if weight_attr is None:
            self.weights = torch.ones(len(keys), dtype=torch.int64, device=keys.device)
        else:
            weight = self._weights(data, weight_attr, coloured)
            if len(keys) < len(row):
                place = int(copies.argmax())
                raise ValueError(
                    f"edge_index must have each edge once where there are weights, got {int(copies[place])} copies of "
                    f"{int(self.rows[place])} to {int(self.cols[place])}"
                )
            self.weights = torch.empty_like(weight)
            self.weights[self._slot] = weight
        loops = self.rows[self.rows == self.cols]
        self.loop = int(loops[0]) if len(loops) else None
        self.one_way = self._find_one_way()

    def _weights(self, data: Any, name: str, coloured: bool) -> Tensor:
        """(E,), or (E, C) of colours; float64 or int64."""
        weight, edges = getattr(data, name, None), data.edge_index.shape[1]
        if not isinstance(weight, Tensor) or weight.ndim not in (1, 2) or len(weight) != edges:
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else weight
            raise ValueError(f"data.{name} must be a tensor (E,) or (E, C) with E = {edges} edges, got {shape}")
        weight = weight.double() if weight.is_floating_point() else weight.long()
        weight = weight.reshape(edges, -1)
        if not coloured and weight.shape[1] != 1:
            raise ValueError(f"data.{name} must have one column for patterns without colours, got {weight.shape[1]}")
        return weight if coloured else weight[:, 0]

    def _find_one_way(self) -> tuple[int, int] | None:
        back = self.cols * self.n + self.rows
        if len(back) == 0:
            return None
        place = torch.searchsorted(self._keys, back).clamp_(max=len(back) - 1)
        differs = (self._keys[place] != back) | (self.weights[place] != self.weights).reshape(len(back), -1).any(1)
        if not differs.any():
            return None
        first = int(differs.nonzero()[0])
        return int(self.rows[first]), int(self.cols[first])

    def dense(self) -> Tensor:
        """(n, n), or (1, C, n, n) of colours."""
        adjacency = self.weights.new_zeros(self.n, self.n, *self.weights.shape[1:])
        adjacency[self.rows, self.cols] = self.weights
        return adjacency if self.weights.ndim == 1 else adjacency.permute(2, 0, 1)[None]

    def sparse_values(self, patterns: Sequence[Pattern]) -> list[Tensor]:
        """(), (n,), or for two outputs values of the edges in the order of ``rows`` and ``cols``."""
        edges = torch.stack([self.rows, self.cols])
        return polynomials_of_edges(patterns, edges, self.n, self.weights if self.weighted else None)

    def of_edges(self, value: Tensor) -> Tensor:
        """Values at the edges of ``edge_index``, of those of all pairs or of :meth:`sparse_values`."""
        return value[self._slot] if value.ndim == 1 else value.reshape(self.n, self.n)[self._row, self._col]
