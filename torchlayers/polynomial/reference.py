"""The definitions, as they read in the paper: a pattern's polynomial, and the operations of a PPGN++ block.

Puny, Lim, Kiani, Maron and Lipman, "Equivariant Polynomials for Graph Neural Networks", arXiv 2302.11556, sections 3
and 4. The polynomial is a sum over all assignments, in n^m time and memory for m nodes: what
:func:`torchlayers.polynomial.evaluate` is held against. The operations take packed pairs, graph by graph, channel by
channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .patterns import Pattern

__all__ = ["pair_linear", "pair_mlp", "pair_readout", "polynomial", "ppgn_block", "segment_matmul"]

MLP = Sequence[tuple[Tensor, Tensor]]


def polynomial(pattern: Pattern, adj: Tensor, mask: Tensor | None = None) -> Tensor:
    """``P[i_out] = Σ over j: nodes -> [n] with j = i on the outputs of Π over arcs (r, s, c) of X[c, j_r, j_s]``.

    Args:
        pattern: the pattern H.
        adj: (..., N, N), or (..., C, N, N) where the pattern's arcs have colours.
        mask: (..., N) bool, which nodes are there; assignments run over these, other entries are not looked at.

    Returns:
        (...,), (..., N) or (..., N, N) by the number of outputs, in the dtype of ``adj``.
    """
    coloured = pattern.is_coloured
    x = adj if coloured else adj.unsqueeze(-3)
    n, lead = x.shape[-1], x.shape[:-3]
    there = torch.ones(*lead, n, dtype=torch.bool, device=adj.device) if mask is None else mask
    x = torch.where((there[..., :, None] & there[..., None, :]).unsqueeze(-3), x, 0)

    assignments = torch.ones([n] * pattern.num_nodes, device=adj.device).nonzero()  # (n^m, m): each j, one a row
    terms = there[..., assignments].all(-1).to(adj.dtype)
    for source, target, *colour in pattern.edges:
        terms = terms * x[..., colour[0] if colour else 0, assignments[:, source], assignments[:, target]]

    place = assignments.new_zeros(len(assignments))
    for output in pattern.outputs:
        place = place * n + assignments[:, output]
    total = terms.new_zeros(*lead, n**pattern.order)
    return total.index_add(-1, place, terms).reshape((*lead, *[n] * pattern.order))


def _graphs(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [part.unflatten(0, (n, n)) for part, n in zip(x.split([n * n for n in sizes]), sizes, strict=True)]


def _packed(graphs: Sequence[Tensor]) -> Tensor:
    return torch.cat([graph.flatten(0, 1) for graph in graphs])


def _with_identity(x: Tensor, plus: bool) -> Tensor:
    if not plus:
        return x
    return torch.cat([x, torch.eye(x.shape[0], dtype=x.dtype, device=x.device)[..., None]], dim=-1)


def _mlp(x: Tensor, layers: MLP) -> Tensor:
    for weight, bias in layers:
        x = (x @ weight.mT + bias).relu()
    return x


def pair_mlp(x: Tensor, mlp1: MLP, mlp2: MLP, sizes: Sequence[int], plus: bool = True) -> tuple[Tensor, Tensor]:
    """m1 = MLP1[x, I, xᵀ, I] and m2 = MLP2[x, I]; without ``plus`` MLP1[x] and MLP2[x]."""
    m1, m2 = [], []
    for graph in _graphs(x, sizes):
        u = _with_identity(graph, plus)
        m1.append(_mlp(torch.cat([u, u.transpose(0, 1)], dim=-1) if plus else u, mlp1))
        m2.append(_mlp(u, mlp2))
    return _packed(m1), _packed(m2)


def segment_matmul(a: Tensor, b: Tensor, sizes: Sequence[int], power: float = 0.0) -> Tensor:
    """y[g, i, k, c] = n_g^-power Σ_j a[g, i, j, c] b[g, j, k, c]."""
    pairs = zip(_graphs(a, sizes), _graphs(b, sizes), strict=True)
    return _packed([torch.einsum("ijc,jkc->ikc", p, q) * float(max(p.shape[0], 1)) ** -power for p, q in pairs])


def pair_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], plus: bool = True) -> Tensor:
    """W [x, I, y] + b; without ``plus`` W [x, y] + b."""
    pairs = zip(_graphs(x, sizes), _graphs(y, sizes), strict=True)
    return _packed([torch.cat([_with_identity(u, plus), v], dim=-1) @ weight.mT + bias for u, v in pairs])


def ppgn_block(
    x: Tensor,
    mlp1: MLP,
    mlp2: MLP,
    weight: Tensor,
    bias: Tensor,
    sizes: Sequence[int],
    plus: bool = True,
    power: float = 0.0,
) -> Tensor:
    """The block: the MLPs, their matrix product, and the layer that joins it with the input."""
    m1, m2 = pair_mlp(x, mlp1, mlp2, sizes, plus)
    return pair_linear(x, segment_matmul(m1, m2, sizes, power), weight, bias, sizes, plus)


def pair_readout(x: Tensor, sizes: Sequence[int], pool: str = "mean") -> Tensor:
    """(G, 2 C): the diagonal pooled, the rest pooled; 0 where there is nothing to pool."""
    rows = []
    for graph in _graphs(x, sizes):
        on = torch.eye(graph.shape[0], dtype=torch.bool, device=x.device)
        for part in (graph[on], graph[~on]):
            if part.shape[0] == 0:
                rows.append(part.new_zeros(part.shape[1]))
            else:
                rows.append(part.amax(0) if pool == "max" else part.mean(0) if pool == "mean" else part.sum(0))
    return torch.stack(rows).view(len(sizes), -1) if rows else x.new_zeros(0, 2 * x.shape[1])
