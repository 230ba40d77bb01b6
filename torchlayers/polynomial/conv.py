"""Message passing with polynomials of the graph as edge weights. Importing this module imports PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_int, check_ints, check_ndim, check_same_device, check_size, require
from .patterns import Pattern
from .sparse import check_edge_patterns, edge_polynomials

__all__ = ["PolynomialConv"]

_MessagePassing: Any = require("torch_geometric.nn.conv", extra="graphs", quiet=True).MessagePassing


def default_patterns() -> tuple[Pattern, ...]:
    """Triangle, clique of four, and the outer edge of a diamond in both directions."""
    diamond = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    rim = [Pattern(diamond, outputs) for outputs in ((0, 1), (1, 0))]
    return Pattern.clique(3, (0, 1)), *rim, Pattern.clique(4, (0, 1))


class PolynomialConv(_MessagePassing):
    r"""Message passing along the edges of a graph, each weighted by what polynomials of the graph are there:

        x'_i = W_r x_i + b + Σ_{j → i} g_ji ⊙ W x_j        g_ji = 1 + b_g + W_p φ_ji (+ W_e e_ji)

    φ_ji are the values at the edge (j, i) of F polynomials with two outputs, such as the number of triangles or of
    cliques of four at that edge: what no layer that passes messages can find out itself (Puny et al., arXiv 2302.11556:
    it misses every pattern with a cycle). The layer is linear in x, an operation P ⊙ A of the graph for each channel;
    like ``GraphConv`` and others of PyG it leaves the nonlinearity to the model.

    Args:
        in_channels: of x; or a pair, of source and target nodes.
        out_channels: of the result.
        patterns: the polynomials: patterns with two outputs, the source and the target of an edge. By default triangle,
            clique of four and the outer edge of a diamond, in both directions.
        edge_dim: channels of ``edge_attr``, if there are any.
        normalize: "log1p": counts enter as sign(φ) log(1 + \|φ\|); "none": as they are.
        cached: compute φ in the first call only, for training on one graph.
        bias: whether there is b.
        device, dtype: of the parameters.
        **kwargs: as for ``torch_geometric.nn.MessagePassing``, such as ``aggr`` ("add" by default) and ``flow``.

    Shapes:
        - x: (N, in_channels), or a pair (N_s, in_channels[0]), (N_t, in_channels[1]), where the second may be None.
        - edge_index: (2, E), int64, rows (source, target): edges as a tensor. With patterns that are not directed,
          each edge in both directions.
        - edge_attr: (E, edge_dim).
        - poly: (E, F), φ made beforehand by :func:`edge_polynomials` or ``AddPolynomialFeatures``, not normalised.
          Needed for a pair of different kinds of nodes and for a sample of a larger graph, whose edges have other
          polynomials than the graph's own.
        - size: (N_s, N_t), where that does not follow from a pair x.
        - result: (N, out_channels) or (N_t, out_channels).

    Raises:
        ValueError: shapes that do not fit, a pair x without ``poly``, edges that are one-way with undirected patterns,
            and other edges than those that were cached.
        TypeError: ``edge_index`` is no tensor of integers.

    Example:
        >>> conv = PolynomialConv(3, 8)
        >>> edge_index = torch.tensor([[0, 1, 1, 2, 0, 2], [1, 0, 2, 1, 2, 0]])
        >>> conv(torch.randn(3, 3), edge_index).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        patterns: Iterable[Pattern] | None = None,
        *,
        edge_dim: int | None = None,
        normalize: Literal["log1p", "none"] = "log1p",
        cached: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("aggr", "add")
        super().__init__(**kwargs)
        source, target = check_ints("in_channels", in_channels, 2)
        self.in_channels, self.out_channels = in_channels, check_int("out_channels", out_channels)
        self.patterns = check_edge_patterns(default_patterns() if patterns is None else patterns)
        if not self.patterns:
            raise ValueError("patterns must be at least one, got none")
        if any(pattern.is_coloured for pattern in self.patterns):
            raise ValueError("patterns must have no colours: edges have none here")
        self.edge_dim = None if edge_dim is None else check_int("edge_dim", edge_dim)
        check_choice("normalize", normalize, ("log1p", "none"))
        self.normalize, self.cached = normalize, bool(cached)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lin = nn.Linear(source, out_channels, bias=False, **placed)
        self.lin_root = nn.Linear(target, out_channels, bias=bias, **placed)
        self.gate = nn.Linear(len(self.patterns), out_channels, **placed)
        self.lin_edge = None if edge_dim is None else nn.Linear(edge_dim, out_channels, bias=False, **placed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as ``torch.nn.Linear`` does, with gates around 1; forget what was cached."""
        super().reset_parameters()
        for linear in (self.lin, self.lin_root, self.gate, self.lin_edge):
            if linear is not None:
                linear.reset_parameters()
        nn.init.zeros_(self.gate.bias)
        self._cached_poly: Tensor | None = None

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None],
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        poly: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """See the class."""
        source, target = x if isinstance(x, (tuple, list)) else (x, x)
        widths = check_ints("in_channels", self.in_channels, 2)
        for name, tensor, width in (("x", source, widths[0]), ("x[1]", target, widths[1])):
            if tensor is not None:
                check_ndim(name, tensor, 2, "(nodes, in_channels)")
                check_size(name, tensor, 1, width, "in_channels")
        check_ndim("edge_index", edge_index, 2, "(2, edges)")
        if edge_index.layout != torch.strided or edge_index.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"edge_index must be a dense tensor of integers, got {edge_index.layout}, {edge_index.dtype}"
            )
        check_size("edge_index", edge_index, 0, 2, "(source, target)")
        check_same_device("edge_index", edge_index, "x", source)
        num_edges = edge_index.shape[1]
        if (edge_attr is None) != (self.lin_edge is None):
            raise ValueError(
                f"edge_attr must {'' if self.lin_edge is not None else 'not '}be given, edge_dim is {self.edge_dim}"
            )
        gate = 1 + self.gate(self._features(source, target, edge_index, poly, isinstance(x, (tuple, list))))
        if edge_attr is not None and self.lin_edge is not None:
            check_ndim("edge_attr", edge_attr, 2, "(edges, edge_dim)")
            check_size("edge_attr", edge_attr, 0, num_edges, "the number of edges")
            check_size("edge_attr", edge_attr, 1, self.lin_edge.in_features, "edge_dim")
            gate = gate + self.lin_edge(edge_attr)
        sent: Any = self.lin(source)
        if isinstance(x, (tuple, list)):
            if self.flow != "source_to_target":
                raise ValueError(f"x must be one tensor for flow={self.flow!r}, got a pair")
            sent = (sent, None)
            if size is None and target is not None:
                size = (source.shape[0], target.shape[0])
        out = self.propagate(edge_index, x=sent, gate=gate, size=size)
        if target is not None:
            return out + self.lin_root(target)
        return out if self.lin_root.bias is None else out + self.lin_root.bias

    def _features(
        self, source: Tensor, target: Tensor | None, edge_index: Tensor, poly: Tensor | None, pair: bool
    ) -> Tensor:
        """φ (E, F), normalised, in the dtype of x."""
        num_edges = edge_index.shape[1]
        if poly is None and self._cached_poly is not None:
            check_size("edge_index", edge_index, 1, self._cached_poly.shape[0], "the number of edges in the cache")
            return self._cached_poly.to(source)
        if poly is not None:
            check_ndim("poly", poly, 2, "(edges, patterns)")
            check_size("poly", poly, 0, num_edges, "the number of edges")
            check_size("poly", poly, 1, len(self.patterns), "the number of patterns")
            check_same_device("poly", poly, "x", source)
        elif pair and target is not source:
            raise ValueError(
                "poly must be given where x is a pair: polynomials of a graph between different nodes, or of a sample "
                "of a larger graph, are not those of edge_index alone; make them with edge_polynomials"
            )
        values = edge_polynomials(self.patterns, edge_index, source.shape[0]) if poly is None else poly
        if self.normalize == "log1p":
            values = values.to(torch.promote_types(source.dtype, torch.float32))
            values = values.sign() * values.abs().log1p()
        values = values.to(source.dtype)
        if self.cached and poly is None:
            self._cached_poly = values.detach()
        return values

    def message(self, x_j: Tensor, gate: Tensor) -> Tensor:
        return gate * x_j

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}={value}" for name, value in (("edge_dim", self.edge_dim), ("cached", self.cached)) if value
        )
        return (
            f"{self.in_channels}, {self.out_channels}, patterns={len(self.patterns)}, normalize={self.normalize!r}, "
            f"aggr={self.aggr!r}{options}"
        )

    __repr__ = nn.Module.__repr__
