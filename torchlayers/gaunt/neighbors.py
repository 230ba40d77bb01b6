"""Which atoms are neighbours, with and without periodic boundaries."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .._checks import check_ndim, check_size


class AtomicGraph(Protocol):
    """What :class:`GauntPotential` reads of its input: PyG's ``Data`` and ``Batch`` fit, and any object like them.

    Attributes:
        z: (N,), integers, atomic numbers.
        pos: (N, 3), in Å.

    Optional: ``cell`` (B, 3, 3) or (3 B, 3), rows are the lattice vectors; ``pbc`` (B, 3) or (3 B,) or (B,) bool,
    which of them repeat (all where there is a cell and no pbc); ``batch`` (N,), each atom's structure, ascending,
    with ``num_graphs`` B.
    """

    z: Tensor
    pos: Tensor


def neighbor_list(
    pos: Tensor,
    cutoff: float,
    *,
    batch: Tensor | None = None,
    num_graphs: int | None = None,
    cell: Tensor | None = None,
    pbc: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All pairs of atoms nearer than ``cutoff``, with their periodic images, in time and memory linear in the atoms.

    An edge from source s to target t with shift S has the vector ``pos[s] - pos[t] + S @ cell``. An atom is a neighbour
    of its own images, not of itself; a cell may be smaller than the cutoff, and atoms may lie outside of it.

    Args:
        pos: (N, 3), any float dtype; compared in float64.
        cutoff: a distance, over 0. Pairs at exactly that distance are left out.
        batch: (N,) int64, the structure that each atom belongs to; one structure by default.
        num_graphs: number of structures B; the largest in ``batch`` + 1 by default.
        cell: (B, 3, 3), rows are lattice vectors. Those of directions that do not repeat are not looked at.
        pbc: (B, 3) bool, which directions repeat; none by default.

    Returns:
        ``(edge_index, shifts)``: (2, E) int64, rows (source, target), sorted by target and then by source; and (E, 3)
        int64.

    Raises:
        ValueError: shapes; positions that are not finite; lattice vectors that span no volume.
    """
    check_ndim("pos", pos, 2, "(atoms, 3)")
    check_size("pos", pos, 1, 3, "coordinates")
    if not 0 < cutoff < math.inf:
        raise ValueError(f"cutoff must be positive and finite, got {cutoff!r}")
    with torch.no_grad():
        return _neighbor_list(pos.detach().double(), float(cutoff), batch, num_graphs, cell, pbc)


def _neighbor_list(
    pos: Tensor, cutoff: float, batch: Tensor | None, num_graphs: int | None, cell: Tensor | None, pbc: Tensor | None
) -> tuple[Tensor, Tensor]:
    n, device = len(pos), pos.device
    if n == 0:
        return torch.zeros(2, 0, dtype=torch.int64, device=device), torch.zeros(0, 3, dtype=torch.int64, device=device)
    if not pos.isfinite().all():
        raise ValueError("pos must be finite, got NaN or infinity")
    if batch is None:
        batch = torch.zeros(n, dtype=torch.int64, device=device)
    graphs = int(batch.max()) + 1 if num_graphs is None else num_graphs
    wrap = torch.zeros(n, 3, dtype=torch.int64, device=device)
    atom, image = torch.arange(n, device=device), wrap
    if pbc is not None and bool(pbc.any()):
        if cell is None:
            raise ValueError("cell must be given where pbc has a direction that repeats, got none")
        lattice = _lattice(cell.detach().double(), pbc)
        inverse = torch.linalg.inv(lattice)
        fractional = torch.einsum("nc,nck->nk", pos, inverse[batch])
        wrap = torch.where(pbc[batch], fractional.floor(), 0.0).long()
        fractional = fractional - wrap
        # The distance between planes of lattice points is 1 / |column of the inverse|.
        margin = cutoff * inverse.norm(dim=1) * (1 + 1e-9) + 1e-9
        for k in range(3):
            reach = torch.where(pbc[:, k], margin[:, k].ceil(), 0.0).long()[batch[atom]]
            copy = torch.repeat_interleave(2 * reach + 1)
            first = torch.cumsum(2 * reach + 1, 0) - (2 * reach + 1) + reach
            step = torch.arange(len(copy), device=device) - first[copy]
            atom, image = atom[copy], image[copy].clone()
            image[:, k] = step
            place, bound = fractional[atom, k] + step, margin[batch[atom], k]
            near = ~pbc[batch[atom], k] | ((place >= -bound) & (place <= 1 + bound))
            atom, image = atom[near], image[near]
        inside = pos - torch.einsum("nk,nkc->nc", wrap.double(), lattice[batch])
        points = inside[atom] + torch.einsum("nk,nkc->nc", image.double(), lattice[batch[atom]])
    else:
        inside = points = pos
    # Boxes of the cutoff's size: neighbours lie in the same or the next one. Those next to each other along the last
    # axis have consecutive numbers.
    low = points.amin(0)
    extent = ((points.amax(0) - low) / cutoff).floor() + 4
    if float(extent.prod()) * graphs > 2**62:
        raise ValueError(f"pos must not be spread over more than 2^62 boxes of size cutoff, got extents {extent}")
    nx, ny, nz = extent.long().tolist()

    def box(points: Tensor, graph: Tensor) -> Tensor:
        x, y, z = ((points - low) / (cutoff * (1 + 1e-9))).floor().long().unbind(1)
        return ((graph * nx + x + 1) * ny + y + 1) * nz + z + 1

    number, order = torch.sort(box(points, batch[atom]))
    own = box(inside, batch)
    found = []
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            middle = own + (dx * ny + dy) * nz
            first = torch.searchsorted(number, middle - 1)
            count = torch.searchsorted(number, middle + 1, right=True) - first
            target = torch.repeat_interleave(count)
            place = torch.arange(len(target), device=device) + (first - torch.cumsum(count, 0) + count)[target]
            other = order[place]
            near = (points[other] - inside[target]).square().sum(1) < cutoff**2
            near &= (atom[other] != target) | image[other].any(1)
            found.append(torch.stack((other[near], target[near])))
    other, target = torch.cat(found, dim=1)
    source = atom[other]
    by_target = torch.sort(target * n + source, stable=True).indices
    source, target, other = source[by_target], target[by_target], other[by_target]
    return torch.stack((source, target)), image[other] - wrap[source] + wrap[target]


def _lattice(cell: Tensor, pbc: Tensor) -> Tensor:
    """``cell`` with vectors perpendicular to the others, and to each other, in the directions that do not repeat."""
    kept = cell * pbc[:, :, None]
    _, size, axes = torch.linalg.svd(kept)
    periodic = pbc.sum(1)
    # The axes that the repeating vectors do not span come last.
    unused = (periodic[:, None] + (~pbc).cumsum(1) - 1).clamp(min=0)
    lattice = torch.where(pbc[:, :, None], kept, axes.gather(1, unused[:, :, None].expand(-1, -1, 3)))
    least = size.gather(1, (periodic - 1).clamp(min=0)[:, None])[:, 0]
    flat = (periodic > 0) & ~(least > 1e-8 * size[:, 0])
    if bool(flat.any()):
        which = int(flat.nonzero()[0])
        raise ValueError(
            f"cell must have linearly independent lattice vectors where pbc repeats them, got {cell[which].tolist()} "
            f"with pbc {pbc[which].tolist()} in structure {which}"
        )
    return lattice
