"""Graphs that separate models by what they can tell apart: cycles, circulants, strongly regular graphs, BREC.

Every graph is a PyG ``Data`` without attributes: ``edge_index`` (2, E) int64, both directions of each edge, sorted,
and ``num_nodes``. All are built here, but for those of :func:`load_graph6` and :func:`load_brec`, read from a folder.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from .._checks import check_int, require

__all__ = [
    "BREC_CATEGORIES",
    "CSL_SKIPS",
    "chang_graph",
    "csl_graph",
    "cycle_graph",
    "disjoint_union",
    "graph_from_edges",
    "load_brec",
    "load_graph6",
    "permuted",
    "rook_graph",
    "shrikhande_graph",
    "triangular_graph",
]

CSL_SKIPS = (2, 3, 4, 5, 6, 9, 11, 12, 13, 16)

# The first pair of each category and the one after its last, of 400.
BREC_CATEGORIES = {
    "Basic": (0, 60),
    "Regular": (60, 160),
    "Extension": (160, 260),
    "CFI": (260, 360),
    "4-Vertex_Condition": (360, 380),
    "Distance_Regular": (380, 400),
}


def graph_from_edges(num_nodes: int, edges: Iterable[Sequence[int]]) -> Any:
    """The graph with each of ``edges`` in both directions, once, whatever directions and copies are given.

    Raises:
        ValueError: an edge leaves the nodes 0 to ``num_nodes`` - 1.
    """
    check_int("num_nodes", num_nodes, minimum=0)
    both = sorted({pair for u, v in edges for pair in ((u, v), (v, u))})
    if both and not 0 <= min(map(min, both)) <= max(map(max, both)) < num_nodes:
        raise ValueError(f"edges must join nodes from 0 to {num_nodes - 1}, got {both[0]} to {both[-1]}")
    edge_index = torch.tensor(both, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    return require("torch_geometric.data", extra="graphs", quiet=True).Data(edge_index=edge_index, num_nodes=num_nodes)


def _edges(graph: Any) -> list[list[int]]:
    return graph.edge_index.T.tolist()


def cycle_graph(length: int) -> Any:
    """C_length, of at least 3 nodes."""
    check_int("length", length, minimum=3)
    return graph_from_edges(length, ((i, (i + 1) % length) for i in range(length)))


def disjoint_union(*graphs: Any) -> Any:
    """The graphs beside each other, as one graph of several components."""
    edges: list[list[int]] = []
    nodes = 0
    for graph in graphs:
        edges += [[u + nodes, v + nodes] for u, v in _edges(graph)]
        nodes += graph.num_nodes
    return graph_from_edges(nodes, edges)


def csl_graph(skip: int, num_nodes: int = 41) -> Any:
    """A circular skip link graph: the cycle with a link from each node to the one ``skip`` further on, 4-regular.

    Murphy et al., "Relational Pooling for Graph Representations", ICML 2019; the data set is ``num_nodes`` = 41 with
    the ten classes :data:`CSL_SKIPS`, no two of which are isomorphic.
    """
    check_int("num_nodes", num_nodes, minimum=5)
    check_int("skip", skip, minimum=2)
    if skip >= num_nodes / 2:
        raise ValueError(f"skip must be below num_nodes / 2 = {num_nodes / 2:g}, got {skip}")
    return graph_from_edges(num_nodes, ((i, (i + step) % num_nodes) for i in range(num_nodes) for step in (1, skip)))


def shrikhande_graph() -> Any:
    """The Shrikhande graph: strongly regular (16, 6, 2, 2), a Cayley graph of ℤ4 × ℤ4."""
    steps = ((0, 1), (1, 0), (1, 1))
    return graph_from_edges(
        16, ((4 * i + j, 4 * ((i + a) % 4) + (j + b) % 4) for i in range(4) for j in range(4) for a, b in steps)
    )


def rook_graph(size: int = 4) -> Any:
    """The moves of a rook on a ``size`` × ``size`` board; for 4 strongly regular (16, 6, 2, 2), as Shrikhande's."""
    check_int("size", size)
    squares = [(i, j) for i in range(size) for j in range(size)]
    meets = ((p, q) for p, q in combinations(range(len(squares)), 2) if _rook_moves(squares[p], squares[q]))
    return graph_from_edges(size * size, meets)


def _rook_moves(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return (a[0] == b[0]) != (a[1] == b[1])


def triangular_graph(size: int = 8) -> Any:
    """T(size), the line graph of the complete graph: pairs of ``size`` things that share one.

    For 8 strongly regular (28, 12, 6, 4), as the three Chang graphs.
    """
    check_int("size", size, minimum=2)
    return _triangular(size, set())


def chang_graph(number: int) -> Any:
    """The Chang graph ``number`` (1, 2 or 3): strongly regular (28, 12, 6, 4) and none of them T(8).

    T(8) switched (Seidel) with respect to the edges of K8 that make a perfect matching, an 8-cycle, or a triangle and a
    pentagon: adjacency between those nodes and all others is reversed.
    """
    if number not in (1, 2, 3):
        raise ValueError(f"number must be 1, 2 or 3, got {number!r}")
    cycles: dict[int, list[list[int]]] = {
        1: [[0, 1], [2, 3], [4, 5], [6, 7]],
        2: [list(range(8))],
        3: [[0, 1, 2], [3, 4, 5, 6, 7]],
    }
    switched = {tuple(sorted((c[i - 1], c[i]))) for c in cycles[number] for i in range(len(c))}
    return _triangular(8, switched)


def _triangular(size: int, switched: set[tuple[int, ...]]) -> Any:
    pairs = list(combinations(range(size), 2))

    def joined(p: tuple[int, int], q: tuple[int, int]) -> bool:
        return bool(set(p) & set(q)) != ((p in switched) != (q in switched))

    return graph_from_edges(
        len(pairs), ((i, j) for i, j in combinations(range(len(pairs)), 2) if joined(pairs[i], pairs[j]))
    )


def permuted(graph: Any, seed: int = 0) -> Any:
    """An isomorphic copy: the nodes in another order, drawn from ``seed``."""
    order = torch.randperm(graph.num_nodes, generator=torch.Generator().manual_seed(seed))
    return graph_from_edges(graph.num_nodes, order[graph.edge_index].T.tolist())


# -- files


def load_graph6(path: str | os.PathLike[str]) -> list[Any]:
    """The graphs of a graph6 file, one a line, such as McKay's families of strongly regular graphs (``sr251256.g6``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no graph6.
        ImportError: networkx is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a graph6 file, got none at {path}")
    lines = [line.strip() for line in path.read_bytes().splitlines()]
    return [_graph6(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line]


def _graph6(line: bytes, where: str) -> Any:
    networkx = require("networkx", extra="graphs")
    try:
        graph = networkx.from_graph6_bytes(line)
    except (networkx.NetworkXError, ValueError, IndexError) as error:
        raise ValueError(f"{where} must be a graph in graph6, got {line[:40]!r}: {error}") from error
    return graph_from_edges(graph.number_of_nodes(), graph.edges())


def load_brec(root: str | os.PathLike[str]) -> Iterator[tuple[str, Any, Any]]:
    """The pairs of BREC from a local folder, one after the other: category, and two graphs that are not isomorphic.

    Wang and Zhang, "An Empirical Study of Realized GNN Expressiveness", ICML 2024 (arXiv 2304.07702); ``brec_v3.npy``
    of the repository GraphPKU/BREC. The file holds each pair in 32 orders of nodes, of which the first is taken, and
    then pairs of isomorphic graphs, which are left out; a file of the 400 bare pairs is read too.

    Args:
        root: a folder that has ``brec_v3.npy``, itself or in a folder ``raw`` or ``Data/raw``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or an array of anything but graph6.
    """
    places = [Path(root) / folder / "brec_v3.npy" for folder in ("", "raw", "Data/raw")]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"root must hold brec_v3.npy of BREC, got {root}")
    lines = _read_npy(path)
    pairs = max(last for _, last in BREC_CATEGORIES.values())
    copies = {2 * pairs: 1, 64 * pairs: 32, 128 * pairs: 32}.get(len(lines))
    if copies is None:
        raise ValueError(f"{path} must hold {2 * pairs}, {64 * pairs} or {128 * pairs} graphs, got {len(lines)}")
    for category, (first, last) in BREC_CATEGORIES.items():
        for number in range(2 * copies * first, 2 * copies * last, 2 * copies):
            one, two = (_graph6(lines[number + i], f"graph {number + i} of {path}") for i in range(2))
            yield category, one, two


# What NumPy writes for an array of Python's bytes. Unpickling runs whatever code a file asks for, and this is all that
# such a file has a use for.
_NUMPY = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an array of graphs has no use for")
        return super().find_class(module, name)


def _read_npy(path: Path) -> list[bytes]:
    """An array of bytes or strings, stored as such or as objects."""
    numpy = require("numpy", extra="data")
    form = require("numpy.lib.format", extra="data")
    content = io.BytesIO(path.read_bytes())
    try:
        version = form.read_magic(content)
        read: Callable[..., Any] = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        dtype = read(content)[2]
        if dtype.hasobject:
            array = numpy.asarray(_Unpickler(content).load(), dtype=object)
        else:
            content.seek(0)
            array = numpy.load(content, allow_pickle=False)
        return [line if isinstance(line, bytes) else str(line).encode("ascii") for line in array.ravel().tolist()]
    except Exception as error:  # a damaged or hostile pickle fails in any way
        raise ValueError(
            f"{path} must be an array of graphs in graph6, got one that cannot be read: {error}"
        ) from error
