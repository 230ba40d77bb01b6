"""Layouts: every token on one rank, in order; balanced work; borders of documents."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlayers import SequenceLayout
from torchlayers._sequence import KINDS, document_bounds

BORDERS = (0, 5, 5, 17, 18, 37)


def make(seq_len, world, kind):
    borders = sorted({0, seq_len // 3, seq_len // 2, seq_len})
    return SequenceLayout(seq_len, world, kind, borders if kind == "documents" else None)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(seq_len=st.integers(1, 70), world=st.integers(1, 9))
def test_every_token_is_on_one_rank_and_positions_ascend(kind, seq_len, world):
    layout = make(seq_len, world, kind)
    positions = [layout.positions(r) for r in range(world)]
    assert torch.cat(positions).sort().values.tolist() == list(range(seq_len))
    for rank, own in enumerate(positions):
        assert (own.diff() > 0).all() and own.dtype == torch.int64
        assert layout.length(rank) == len(own)
        assert [p for run in layout.runs(rank) for p in run] == own.tolist()
    if kind != "documents":
        assert max(map(len, positions)) - min(map(len, positions)) <= (2 if kind == "zigzag" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_undoes_shard_and_both_are_differentiable(kind, dim):
    layout = make(13, 3, kind)
    shape = [2, 3, 4]
    shape[dim] = 13
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    shards = [layout.shard(x, dim, r) for r in range(3)]
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, x.index_select(dim, layout.positions(rank)))
    whole = layout.unshard(shards, dim)
    assert torch.equal(whole, x)
    weight = torch.randn_like(x)
    (whole * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def brute_work(layout, mask):
    borders = layout.cu_seqlens or (0, layout.seq_len)
    document = [sum(b <= i for b in borders) for i in range(layout.seq_len)]
    i = range(layout.seq_len)
    pairs = [sum(document[a] == document[b] and (mask == "full" or b <= a) for b in i) for a in i]
    return [sum(pairs[p] for p in layout.positions(r).tolist()) for r in range(layout.world)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_work_counts_pairs(kind, mask):
    assert make(37, 4, kind).work(mask) == brute_work(make(37, 4, kind), mask)
    packed = SequenceLayout(37, 4, kind, torch.tensor(BORDERS))
    assert packed.work(mask) == brute_work(packed, mask)


def test_causal_work_is_balanced_as_the_papers_say():
    contiguous, zigzag, striped = (SequenceLayout(3072, 4, k).work("causal") for k in KINDS[:3])
    mean = 3072 * 3073 / 2 / 4
    assert zigzag == [mean] * 4
    assert max(striped) / mean <= 1 + 4 / 3072
    assert max(contiguous) / mean == pytest.approx(2 - 1 / 4, rel=1e-3)
    packed = SequenceLayout(3072, 4, "documents", [0, 100, 1000, 1048, 3072]).work("causal")
    assert max(packed) / (sum(packed) / 4) < 1.02


@pytest.mark.parametrize("kind", KINDS)
def test_merged_layout_holds_what_neighbours_hold(kind):
    layout = make(37, 6, kind)
    for size in (1, 2, 3, 6):
        merged = layout.merged(size)
        assert merged.world == 6 // size
        for rank in range(merged.world):
            parts = [layout.positions(r) for r in range(rank * size, (rank + 1) * size)]
            assert torch.equal(merged.positions(rank), torch.cat(parts).sort().values)
        again = SequenceLayout.from_key(merged.key)
        assert again == merged and all(again.runs(r) == merged.runs(r) for r in range(merged.world))
    assert layout.merged(2).merged(3).runs(0) == layout.merged(6).runs(0)
    with pytest.raises(ValueError, match="size must divide the layout's 6 ranks, got 4"):
        layout.merged(4)


def test_keys_copies_and_equality():
    layouts = [SequenceLayout(n, w, k, c) for n in (18, 37) for w in (2, 3) for k in KINDS for c in ([0, 4, n], [0, n])]
    layouts += [SequenceLayout(37, 2), SequenceLayout(37, 2, "zigzag")]
    assert len({x.key for x in layouts}) == len(set(layouts)) == len(layouts)
    for layout in layouts:
        for again in (SequenceLayout.from_key(layout.key), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
            assert again == layout and again.runs(1) == layout.runs(1) and again.cu_seqlens == layout.cu_seqlens
    assert layouts[0] != "contiguous"
    assert "world=2" in repr(layouts[0]) and "documents" in repr(layouts[0])


def test_document_bounds():
    first, last = document_bounds((0, 2, 2, 5))
    assert first.tolist() == [0, 0, 2, 2, 2] and last.tolist() == [1, 1, 4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 2), ValueError, "seq_len must be at least 1, got 0"),
        ((8, 0), ValueError, "world must be at least 1, got 0"),
        ((8.0, 2), TypeError, "seq_len must be an int"),
        ((8, 2, "zigzagg"), ValueError, "did you mean 'zigzag'"),
        ((8, 2, "documents"), ValueError, "cu_seqlens must be given for kind 'documents', got None"),
        ((8, 2, "striped", [0, 4]), ValueError, "cu_seqlens must go from 0 to the length 8"),
        ((8, 2, "striped", [1, 8]), ValueError, "cu_seqlens must go from 0 to the length 8"),
        ((8, 2, "striped", []), ValueError, "cu_seqlens must go from 0"),
        ((8, 2, "striped", [0, 5, 4, 8]), ValueError, "cu_seqlens must ascend"),
        ((8, 2, "striped", [0, -1, 8]), ValueError, r"cu_seqlens\[1\] must be at least 0"),
        ((8, 2, "striped", torch.tensor([0.0, 8.0])), TypeError, "cu_seqlens must be 1-D and of ints"),
        ((8, 2, "striped", torch.tensor([[0, 8]])), TypeError, "cu_seqlens must be 1-D"),
        ((8, 2, "striped", "08"), TypeError, "cu_seqlens must be a sequence of ints"),
    ],
)
def test_bad_layouts(arguments, error, message):
    with pytest.raises(error, match=message):
        SequenceLayout(*arguments)


def test_bad_shards():
    layout = SequenceLayout(8, 3)
    with pytest.raises(ValueError, match="x must have seq_len of the layout = 8 at dimension 1, got 7"):
        layout.shard(torch.zeros(2, 7), 1, 0)
    with pytest.raises(ValueError, match="dim must be a dimension of x, which has 2, got 2"):
        layout.shard(torch.zeros(2, 8), 2, 0)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        layout.shard([0] * 8, 0, 0)
    with pytest.raises(TypeError, match="dim must be an int, got 'length'"):
        layout.unshard([torch.zeros(2), torch.zeros(3), torch.zeros(3)], "length")
    with pytest.raises(ValueError, match="rank must be below the layout's world 3, got 3"):
        layout.positions(3)
    with pytest.raises(ValueError, match="shards must be 3, one a rank, got 2"):
        layout.unshard([torch.zeros(3), torch.zeros(3)], 0)
    with pytest.raises(ValueError, match=r"shards\[2\] must have length of the rank = 3 at dimension 0, got 2"):
        layout.unshard([torch.zeros(2), torch.zeros(3), torch.zeros(2)], 0)
    with pytest.raises(ValueError, match="mask must be one of 'full', 'causal'"):
        layout.work("banded")
