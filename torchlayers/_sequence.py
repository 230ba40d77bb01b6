"""Which rank holds which tokens of a sequence: pure data, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ._checks import check_choice, check_int, check_size

__all__ = ["SequenceLayout", "check_cu_seqlens", "document_bounds"]

KINDS = ("contiguous", "zigzag", "striped", "documents")


class SequenceLayout:
    """How the tokens of a sequence are shared out over the ranks of a group.

    A position is a token's index in the whole sequence. In every layout the positions of a rank ascend, so that causal
    attention between two shards is a triangle, a full block or nothing.

    - ``"contiguous"``: rank r holds the r-th run of the sequence. Right for full attention and sliding windows;
      causal attention leaves the first ranks idle for half of the time.
    - ``"zigzag"``: of 2·world runs, rank r holds the r-th from either end: causal work is the same on all ranks.
    - ``"striped"``: rank r holds positions r, r + world, …: causal work is the same but for O(1/length), for
      packed documents and for three-way (tensor) attention too, which zigzag doesn't balance.
    - ``"documents"``: zigzag within every document of a packed sequence, the larger pieces to the ranks with fewer
      tokens so far.

    Any length goes: shards differ by some tokens, or are empty, where the length does not divide.

    Args:
        seq_len: tokens in the whole sequence.
        world: number of ranks.
        kind: see above.
        cu_seqlens: the borders of packed documents, 0 first and ``seq_len`` last, ascending; ints, or an int tensor.
            ``"documents"`` needs them; another kind may have them too, and attention then stays within documents.

    Raises:
        ValueError: a length or world below 1, an unknown kind, borders that do not fit, ``"documents"`` without.
        TypeError: arguments of another type.

    Source: zigzag and its causal balance as in Llama 3 (arXiv 2407.21783, section 3.3.2); striped in 2311.09431.

    Example:

        >>> import torch
        >>> from torchlayers import SequenceLayout
        >>> layout = SequenceLayout(12, world=2, kind="zigzag")
        >>> x = torch.randn(1, 12, 8)
        >>> shards = [layout.shard(x, dim=1, rank=r) for r in range(2)]
        >>> torch.equal(layout.unshard(shards, dim=1), x)
        True
        >>> layout.work("causal")[0] == layout.work("causal")[1]
        True
    """

    def __init__(
        self, seq_len: int, world: int, kind: str = "contiguous", cu_seqlens: Sequence[int] | Tensor | None = None
    ) -> None:
        self.seq_len = check_int("seq_len", seq_len)
        self.world = check_int("world", world)
        check_choice("kind", kind, KINDS)
        self.kind = kind
        self.cu_seqlens = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens, seq_len)
        if kind == "documents" and self.cu_seqlens is None:
            raise ValueError("cu_seqlens must be given for kind 'documents', got None")
        self._neighbours = 1  # of a layout over as many times the ranks: what one rank of this holds, see merged
        self._runs: tuple[tuple[range, ...], ...] | None = tuple(map(_merged, self._share_out()))

    def _share_out(self, neighbours: int = 1) -> list[list[range]]:
        n, world = self.seq_len, self.world * neighbours
        if self.kind == "contiguous":
            cuts = _cuts(0, n, world)
            return [[range(cuts[r], cuts[r + 1])] for r in range(world)]
        if self.kind == "striped":
            return [[range(r, n, world)] for r in range(world)]
        if self.kind == "zigzag":
            return _zigzag(0, n, world)
        assert self.cu_seqlens is not None
        shares: list[list[range]] = [[] for _ in range(world)]
        tokens = [0] * world
        for start, stop in pairwise(self.cu_seqlens):
            pieces = _zigzag(start, stop, world)
            sizes = [sum(map(len, piece)) for piece in pieces]
            largest_first = sorted(range(world), key=lambda p: -sizes[p])
            for rank, piece in zip(sorted(range(world), key=lambda r: tokens[r]), largest_first, strict=True):
                shares[rank] += pieces[piece]
                tokens[rank] += sizes[piece]
        return shares

    def length(self, rank: int) -> int:
        """How many tokens ``rank`` holds."""
        return sum(len(run) for run in self.runs(rank))

    def runs(self, rank: int) -> tuple[range, ...]:
        """The positions of ``rank`` as ranges, in order."""
        if self._runs is None:
            size = self._neighbours
            shares = self._share_out(size)
            self._runs = tuple(_union(shares[r * size : (r + 1) * size]) for r in range(self.world))
        return self._runs[self._check_rank(rank)]

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """The positions of ``rank``, ascending: int64 (length,)."""
        runs = [torch.arange(run.start, run.stop, run.step, device=device) for run in self.runs(rank)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)

    def merged(self, size: int) -> SequenceLayout:
        """The layout of ``world / size`` ranks that hold what ``size`` neighbours hold here, rank p what p·size … hold.

        Raises:
            ValueError: a size that does not divide the number of ranks.
        """
        if self.world % check_int("size", size):
            raise ValueError(f"size must divide the layout's {self.world} ranks, got {size}")
        if size == 1:
            return self
        merged = SequenceLayout(self.seq_len, self.world // size, self.kind, self.cu_seqlens)
        if self.kind not in ("contiguous", "zigzag"):  # whose neighbours hold runs that touch
            merged._neighbours = size * self._neighbours
            merged._runs = None  # many, and not wanted where only the key is: made when asked for
        return merged

    def shard(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """What ``rank`` holds of ``x`` (…, seq_len at ``dim``, …). Differentiable.

        Raises:
            TypeError: ``x`` is no tensor, or ``dim`` no int.
            ValueError: a size at ``dim`` other than ``seq_len``, no such dimension, or no such rank.
        """
        _check_dim("x", x, dim)
        check_size("x", x, dim, self.seq_len, "seq_len of the layout")
        parts = [_slice(x, dim, run) for run in self.runs(rank)]
        if not parts:
            return x.narrow(dim, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The whole sequence from all ranks' shards, in order of rank. Differentiable.

        Raises:
            TypeError: a shard is no tensor, or ``dim`` no int.
            ValueError: another number of shards than ranks, a shard of another length than its rank's, or no such
                dimension.
        """
        shards = list(shards)
        if len(shards) != self.world:
            raise ValueError(f"shards must be {self.world}, one a rank, got {len(shards)}")
        for rank, shard in enumerate(shards):
            _check_dim(f"shards[{rank}]", shard, dim)
            check_size(f"shards[{rank}]", shard, dim, self.length(rank), "length of the rank")
        joined = torch.cat(shards, dim)
        if self.kind == "contiguous":
            return joined
        order = torch.cat([self.positions(r, joined.device) for r in range(self.world)])
        return joined.index_select(dim, order.argsort())

    def work(self, mask: str = "causal") -> list[int]:
        """How many query–key pairs each rank computes: ``"full"`` or ``"causal"``, within documents where there are."""
        check_choice("mask", mask, ("full", "causal"))
        first, last = document_bounds(self.cu_seqlens or (0, self.seq_len))
        pairs = (torch.arange(self.seq_len) if mask == "causal" else last) - first + 1
        return [int(pairs[self.positions(r)].sum()) for r in range(self.world)]

    @property
    def key(self) -> str:
        """The layout as a string; :meth:`from_key` makes the layout of it."""
        documents = "" if self.cu_seqlens is None else ",".join(map(str, self.cu_seqlens))
        return f"{self.kind}:{self.seq_len}:{self.world * self._neighbours}:{documents}:{self._neighbours}"

    @staticmethod
    @lru_cache(maxsize=64)  # a training run has few layouts; packed batches each have their own
    def from_key(key: str) -> SequenceLayout:
        """The layout that :attr:`key` describes."""
        kind, seq_len, world, documents, neighbours = key.split(":")
        borders = tuple(map(int, documents.split(","))) if documents else None
        return SequenceLayout(int(seq_len), int(world), kind, borders).merged(int(neighbours))

    def _check_rank(self, rank: int) -> int:
        check_int("rank", rank, minimum=0)
        if rank >= self.world:
            raise ValueError(f"rank must be below the layout's world {self.world}, got {rank}")
        return rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SequenceLayout) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        documents = "" if self.cu_seqlens is None else f", {len(self.cu_seqlens) - 1} documents"
        return f"SequenceLayout({self.seq_len}, world={self.world}, kind={self.kind!r}{documents})"


def check_cu_seqlens(cu_seqlens: Sequence[int] | Tensor, seq_len: int) -> tuple[int, ...]:
    """The borders of packed documents as ints: 0 first, ``seq_len`` last, ascending.

    Raises:
        TypeError: not a sequence of ints or a 1-D int tensor.
        ValueError: borders that do not fit.
    """
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool or cu_seqlens.ndim != 1:
            raise TypeError(
                f"cu_seqlens must be 1-D and of ints, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            )
        cu_seqlens = cu_seqlens.tolist()
    if isinstance(cu_seqlens, str) or not isinstance(cu_seqlens, Sequence):
        raise TypeError(f"cu_seqlens must be a sequence of ints, got {type(cu_seqlens).__name__}")
    borders = tuple(check_int(f"cu_seqlens[{i}]", border, minimum=0) for i, border in enumerate(cu_seqlens))
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != seq_len:
        raise ValueError(f"cu_seqlens must go from 0 to the length {seq_len}, got {borders[:1]} … {borders[-1:]}")
    if any(a > b for a, b in pairwise(borders)):
        raise ValueError("cu_seqlens must ascend, got a border below the one before it")
    return borders


def document_bounds(cu_seqlens: Sequence[int], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """For every position the first and the last position of its document: int64 (seq_len,) twice."""
    borders = torch.tensor(cu_seqlens, device=device)
    sizes = borders.diff()
    return borders[:-1].repeat_interleave(sizes), (borders[1:] - 1).repeat_interleave(sizes)


def _cuts(start: int, stop: int, parts: int) -> list[int]:
    return [start + (stop - start) * i // parts for i in range(parts + 1)]


def _zigzag(start: int, stop: int, world: int) -> list[list[range]]:
    cuts = _cuts(start, stop, 2 * world)
    runs = [range(a, b) for a, b in pairwise(cuts)]
    return [[runs[r], runs[2 * world - 1 - r]] for r in range(world)]


def _merged(runs: list[range]) -> tuple[range, ...]:
    """Without the empty ones, and those that touch as one."""
    merged: list[range] = []
    for run in runs:
        if not run:
            continue
        if merged and run.step == merged[-1].step == 1 and merged[-1].stop == run.start:
            run = range(merged.pop().start, run.stop)
        merged.append(run)
    return tuple(merged)


def _union(shares: list[list[range]]) -> tuple[range, ...]:
    """The positions of several ranks, in order."""
    runs = [torch.arange(run.start, run.stop, run.step) for share in shares for run in share if run]
    positions = torch.cat([torch.empty(0, dtype=torch.int64), *runs]).sort().values
    if not len(positions):
        return ()
    cut = positions.diff() > 1
    firsts, lasts = positions[1:][cut].tolist(), positions[:-1][cut].tolist()
    pairs = zip([int(positions[0]), *firsts], [*lasts, int(positions[-1])], strict=True)
    return tuple(range(first, last + 1) for first, last in pairs)


def _check_dim(name: str, x: object, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r} ({type(dim).__name__})")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be a dimension of {name}, which has {x.ndim}, got {dim}")


def _slice(x: Tensor, dim: int, run: range) -> Tensor:
    index = [slice(None)] * x.ndim
    index[dim] = slice(run.start, run.stop, run.step)
    return x[tuple(index)]
