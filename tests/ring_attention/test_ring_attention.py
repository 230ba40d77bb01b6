"""Ring attention over virtual ranks against attention in one piece, in float64."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor.experimental._context_parallel._attention import _SDPAMerger
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import torchlayers
from torchlayers import LoopbackWorld, SequenceLayout
from torchlayers._attention import keep_mask, merge_attention
from torchlayers.functional import ring_attention
from torchlayers.ring_attention.blocks import Mask, Options, Tokens, make_block
from torchlayers.ring_attention.ring import passes
from torchlayers.ring_attention.ring import ring as unchecked_ring
from torchlayers.testing import assert_close_rel

L = 37
KINDS = ("contiguous", "zigzag", "striped")
BORDERS = (0, 5, 5, 17, 18, 37)


def make_inputs(heads=4, kv_heads=2, length=L, kv_length=None, d=8, dv=8, batch=2, dtype=torch.float64):
    """q, k, v, the gradient of out and that of lse."""
    kv_length = length if kv_length is None else kv_length
    shapes = ((heads, length, d), (kv_heads, kv_length, d), (kv_heads, kv_length, dv), (heads, length, dv))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes] + [torch.randn(batch, heads, length).to(dtype)]


def dense_mask(length=L, left=-1, right=-1, borders=(0, L)):
    i, j = torch.arange(length)[:, None], torch.arange(length)
    mask = torch.ones(length, length, dtype=torch.bool)
    mask &= (j >= i - left) if left >= 0 else mask
    mask &= (j <= i + right) if right >= 0 else mask
    document = torch.tensor([sum(b <= p for b in borders) for p in range(length)])
    return mask & (document[:, None] == document) if len(borders) > 2 else mask


def plain(q, k, v, mask=None, scale=None, keep=None):
    """(out, lse) from the formula, with the whole matrix."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    return (weights if keep is None else weights * keep) @ v, scores.logsumexp(-1)


def gradients(call, inputs, lse):
    q, k, v, grad_out, grad_lse = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    outputs = call(*leaves)
    if not lse:
        return [outputs.detach(), *torch.autograd.grad(outputs, leaves, grad_out)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, (grad_out, grad_lse))]


def ring(inputs, layout, kv_layout=None, lse=True, world=None, **options):
    """out, (lse,) dq, dk and dv of all ranks, in order of position; keyword arguments as of ring_attention."""
    keys = layout if kv_layout is None else kv_layout
    q, k, v, grad_out, grad_lse = inputs

    def fn(rank, group):
        shards = [lay.shard(x, 2, rank) for lay, x in ((layout, q), (keys, k), (keys, v), (layout, grad_out))]
        shards.append(layout.shard(grad_lse, 2, rank))
        call = {"layout": layout, "kv_layout": kv_layout, "group": group, "enable_gqa": True, "return_lse": lse}
        return gradients(lambda *x: ring_attention(*x, **call, **options), shards, lse)

    world = LoopbackWorld(layout.world) if world is None else world
    layouts = [layout, layout, layout, keys, keys] if lse else [layout, layout, keys, keys]
    return [lay.unshard(x, 2) for lay, x in zip(layouts, zip(*world.run(fn), strict=True), strict=True)]


def check_equal(ours, expected, tolerance=1e-12):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv")[-len(ours) :], ours, expected, strict=True):
        error = (a - b).abs().nan_to_num(math.inf).max().item() if a.numel() else 0.0
        assert error <= tolerance, f"{name}: {error}"


# Equality


@pytest.mark.parametrize("schedule", ["ring", "allgather"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_equals_scaled_dot_product_attention(world, causal, kind, schedule):
    inputs = make_inputs()
    expected = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True), inputs, False
    )
    layout = SequenceLayout(L, world, kind)
    for backend in ("torch", "flash"):
        ours = ring(inputs, layout, lse=False, is_causal=causal, schedule=schedule, backend=backend)
        for a, b in zip(ours, expected, strict=True):
            assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_heads_scale_channels_of_values_and_the_gradient_of_lse(heads, causal, kind, backend):
    inputs = make_inputs(*heads, d=6, dv=11)
    mask = dense_mask(right=0 if causal else -1)
    expected = gradients(lambda q, k, v: plain(q, k, v, mask, scale=0.7), inputs, True)
    ours = ring(inputs, SequenceLayout(L, 3, kind), is_causal=causal, scale=0.7, backend=backend)
    check_equal(ours, expected)


@pytest.mark.parametrize("schedule", ["ring", "allgather"])
@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("kind", ["contiguous", "striped"])
@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        ({"window_size": 1, "is_causal": True}, 0, 0),
        ({"window_size": 6, "is_causal": True}, 5, 0),
        ({"window_size": (12, 9), "is_causal": True}, 12, 0),
        ({"window_size": (3, 10)}, 3, 10),
        ({"window_size": (0, 2)}, 0, 2),
        ({"window_size": (-1, 4)}, -1, 4),
        ({"window_size": (14, -1)}, 14, -1),
    ],
)
def test_windows(options, left, right, kind, world, schedule):
    inputs = make_inputs()
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(left=left, right=right)), inputs, True)
    check_equal(ring(inputs, SequenceLayout(L, world, kind), schedule=schedule, **options), expected)


@pytest.mark.parametrize("schedule", ["ring", "allgather"])
@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("kind", [*KINDS, "documents"])
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (3, 0), (2, 4)])
def test_documents(left, right, kind, world, schedule):
    inputs = make_inputs()
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(L, left, right, BORDERS)), inputs, True)
    options = {"is_causal": right == 0, "window_size": (left, right), "schedule": schedule}
    if kind == "zigzag" and left >= 0 and world > 1:
        with pytest.raises(ValueError, match="window_size must come with a contiguous, striped or documents"):
            ring(inputs, SequenceLayout(L, world, kind, BORDERS), **options)
        return
    check_equal(ring(inputs, SequenceLayout(L, world, kind, BORDERS), **options), expected)
    if kind != "documents":
        borders = torch.tensor(BORDERS) if world == 2 else list(BORDERS)
        check_equal(ring(inputs, SequenceLayout(L, world, kind), cu_seqlens=borders, **options), expected)


@pytest.mark.parametrize("schedule", ["ring", "allgather"])
@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_cross_attention_and_layouts_that_differ(backend, schedule):
    inputs = make_inputs(length=10, kv_length=23)
    expected = gradients(plain, inputs, True)
    for world in (1, 2, 4):
        for kinds in (("contiguous", "striped"), ("striped", "zigzag")):
            layouts = SequenceLayout(10, world, kinds[0]), SequenceLayout(23, world, kinds[1])
            check_equal(ring(inputs, *layouts, schedule=schedule, backend=backend), expected)
    inputs = make_inputs()
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(right=0)), inputs, True)
    layouts = SequenceLayout(L, 3, "zigzag"), SequenceLayout(L, 3, "striped")
    check_equal(ring(inputs, *layouts, is_causal=True, schedule=schedule, backend=backend), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_tokens_than_ranks_and_empty_batches(kind):
    for inputs in (make_inputs(length=3), make_inputs(length=3, batch=0)):
        expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(3, right=0)), inputs, True)
        check_equal(ring(inputs, SequenceLayout(3, 5, kind), is_causal=True), expected)


def test_many_ranks_and_chunks_of_queries(monkeypatch):
    """Accumulators pass many ranks; chunks of 16 queries meet all edges of the mask."""
    monkeypatch.setattr(torchlayers.ring_attention.blocks, "_CHUNK", 1)
    inputs = make_inputs(2, 1, length=150, batch=1)
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(150, 70, 0)), inputs, True)
    for kind, world in (("contiguous", 3), ("striped", 3), ("striped", 16), ("contiguous", 11)):
        check_equal(ring(inputs, SequenceLayout(150, world, kind), is_causal=True, window_size=71), expected)


def test_one_rank_is_scaled_dot_product_attention_to_the_bit():
    q, k, v, *_ = make_inputs(dtype=torch.float32)
    layout = SequenceLayout(L, 1, "zigzag")
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "window_size": (-1, 5)}):
        ours = ring_attention(q, k, v, layout=layout, enable_gqa=True, **options)
        options.pop("window_size", None)
        assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options))
    assert torchlayers.last_dispatch().startswith("torch: ")


def test_views_are_taken_as_they_are():
    inputs = make_inputs()
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(right=0)), inputs, True)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]] + inputs[4:]
    check_equal(ring(strided, SequenceLayout(L, 3, "zigzag"), is_causal=True), expected)
    expanded = [*inputs[:3], torch.ones((), dtype=torch.float64).expand_as(inputs[3]), inputs[4]]
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(right=0)), expanded, True)
    check_equal(ring(expanded, SequenceLayout(L, 3, "zigzag"), is_causal=True), expected)


class Whole(torch.autograd.Function):
    """Whole sequences in and out: ranks run forward, and once more with backward, as gradcheck can't do inside."""

    @staticmethod
    def forward(ctx, q, k, v, layout, options):
        ctx.save_for_backward(q, k, v)
        ctx.rest = layout, options
        grads = q.new_zeros((*q.shape[:3], v.shape[3])), q.new_zeros(q.shape[:3])
        with torch.enable_grad():
            return tuple(ring((q, k, v, *grads), layout, **options)[:2])

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        layout, options = ctx.rest
        with torch.enable_grad():
            return (*ring((*ctx.saved_tensors, grad_out, grad_lse), layout, **options)[2:], None, None)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("zigzag", {"is_causal": True}),
        ("contiguous", {"window_size": (2, 1)}),
        ("striped", {"is_causal": True, "dropout_p": 0.4, "dropout_seed": 5, "cu_seqlens": (0, 3, 7)}),
        ("striped", {"is_causal": True, "schedule": "allgather"}),
    ],
)
def test_gradcheck(kind, options):
    q, k, v = (torch.randn(1, h, 7, 2, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    layout = SequenceLayout(7, 3, kind)
    assert torch.autograd.gradcheck(lambda *x: Whole.apply(*x, layout, options), (q, k, v), fast_mode=True)


# What is sent, and what is kept


def sent_bytes(layout, token, token32):
    """Bytes that each rank sends, forward and backward: of all blocks but the next rank's, and their gradients."""
    world = layout.world
    n = [layout.length(r) for r in range(world)]
    forward = [sum(n[(r - t) % world] for t in range(world - 1)) * token for r in range(world)]
    gradients = [sum(n[(r - t) % world] for t in range(1, world)) * token32 for r in range(world)]
    return forward, [a + b for a, b in zip(forward, gradients, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_hops_are_those_of_theory(kind, dtype):
    for length, world in ((96, 4), (L, 5), (L, 2), (L, 1)):
        layout = SequenceLayout(length, world, kind)
        q, k, v, grad, _ = make_inputs(length=length, d=16, dv=16, dtype=dtype)
        ranks = LoopbackWorld(world)
        forward, backward = sent_bytes(layout, 2 * 2 * 32 * dtype.itemsize, 2 * 2 * 32 * max(4, dtype.itemsize))

        def fn(rank, group, layout=layout, data=(q, k, v, grad)):
            *shards, grad = (layout.shard(x, 2, rank) for x in data)
            leaves = [x.detach().clone().requires_grad_() for x in shards]
            out = ring_attention(*leaves, layout=layout, group=group, is_causal=True, enable_gqa=True)
            before = group.bytes_sent, group.hops
            torch.autograd.grad(out, leaves, grad)
            return before

        before = ranks.run(fn)
        assert [sent for sent, _ in before] == forward
        assert [hops for _, hops in before] == [world - 1] * world
        assert [a - b for a, b in zip(ranks.bytes_sent, forward, strict=True)] == backward
        assert ranks.hops == [3 * (world - 1)] * world
        if (length, dtype) == (96, torch.float64):
            assert forward == [73728] * 4


def test_an_allgather_sends_as_much():
    layout, ranks = SequenceLayout(96, 4, "zigzag"), LoopbackWorld(4)
    ring(make_inputs(length=96, dtype=torch.float32), layout, world=ranks, is_causal=True, schedule="allgather")
    kv = 24 * 2 * 2 * 16 * 4
    assert ranks.bytes_sent == [3 * kv + 3 * (kv + kv)] * 4


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"is_causal": True}, "contiguous", ((1, 7),)),
        ({"is_causal": True, "window_size": 1}, "contiguous", ()),
        ({"is_causal": True, "window_size": 9}, "contiguous", ((1, 1),)),
        ({"is_causal": True, "window_size": 10}, "contiguous", ((1, 2),)),
        ({"is_causal": True, "window_size": 64}, "contiguous", ((1, 7),)),
        ({"window_size": (8, 8)}, "contiguous", ((1, 1), (-1, 1))),
        ({"window_size": (0, 9)}, "contiguous", ((-1, 2),)),
        ({"window_size": (17, 1)}, "contiguous", ((1, 3), (-1, 1))),
        ({"window_size": (40, 40)}, "contiguous", ((1, 7),)),
        ({"is_causal": True, "window_size": 9}, "striped", ((1, 7),)),
        ({"cu_seqlens": (0, 8, 16, 32, 56, 64)}, "contiguous", ((1, 2), (-1, 2))),
        ({"cu_seqlens": (0, 8, 16, 32, 56, 64), "is_causal": True}, "contiguous", ((1, 2),)),
        ({"cu_seqlens": range(0, 65, 8)}, "contiguous", ()),
    ],
)
def test_windows_and_documents_skip_hops(options, kind, expected):
    """Shards of 8 tokens: a window of w keys to the left needs ceil((w - 1) / 8) neighbours."""
    layout, ranks = SequenceLayout(64, 8, kind), LoopbackWorld(8)
    hops = sum(n for _, n in expected)
    kv = 8 * 2 * 2 * 2 * 8 * 8
    q, k, v, grad, _ = make_inputs(length=64)

    def fn(rank, group):
        *shards, grad_shard = (layout.shard(x, 2, rank) for x in (q, k, v, grad))
        leaves = [x.detach().clone().requires_grad_() for x in shards]
        out = ring_attention(*leaves, layout=layout, group=group, enable_gqa=True, **options)
        before = group.bytes_sent
        torch.autograd.grad(out, leaves, grad_shard)
        return before

    assert ranks.run(fn) == [hops * kv] * 8
    # Backward keys and values, then their gradients: each as far, and home in one hop.
    assert ranks.bytes_sent == [3 * hops * kv] * 8 and ranks.hops == [3 * hops] * 8
    left, right = options.get("window_size", (-1, -1)) if not options.get("is_causal") else (-1, 0)
    if isinstance(options.get("window_size"), int):
        left = options["window_size"] - 1
    borders = tuple(options.get("cu_seqlens", ()))
    assert passes(layout.key, layout.key, (left, right), borders) == expected


@pytest.mark.parametrize("schedule", ["ring", "allgather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_own_shard_alone(dtype, schedule):
    layout = SequenceLayout(512, 4, "zigzag")
    inputs = make_inputs(length=512, d=16, dv=16, dtype=dtype)

    def fn(rank, group):
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = [layout.shard(x, 2, rank).clone().requires_grad_() for x in inputs[:3]]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, lse = ring_attention(
                *leaves, layout=layout, group=group, is_causal=True, enable_gqa=True, return_lse=True,
                schedule=schedule, dropout_p=0.1, dropout_seed=1,
            )  # fmt: skip
        return sum(kept.values()), sum(x.nbytes for x in (*leaves, out, lse))

    for kept, expected in LoopbackWorld(4).run(fn):
        assert expected <= kept <= 1.05 * expected


def test_selective_checkpointing_saves_a_round():
    layout, ranks = SequenceLayout(16, 3, "striped"), LoopbackWorld(3)
    x = torch.randn(1, 2, 16, 4, dtype=torch.float64)

    def fn(rank, group):
        def attend(q):
            return ring_attention(q, q, q, layout=layout, group=group, is_causal=True)

        shard = layout.shard(x, 2, rank).requires_grad_()
        saved = [torch.ops.torchlayers.ring_attention_forward.default]
        contexts = functools.partial(create_selective_checkpoint_contexts, saved)
        found = []
        for options in ({}, {"context_fn": contexts}):
            out = checkpoint(attend, shard, use_reentrant=False, **options)
            before = group.hops
            found.append((group.hops, torch.autograd.grad(out.square().sum(), shard)[0], group.hops - before))
        assert torch.equal(found[0][1], found[1][1])
        return [hops for *_, hops in found]

    assert ranks.run(fn) == [[6, 4]] * 3


# Precision


def test_bfloat16_errors_do_not_grow_with_the_number_of_ranks():
    inputs = [x.bfloat16() for x in make_inputs(2, 2, length=1024, d=64, dv=64, batch=1)]
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(1024, right=0)), [x.double() for x in inputs], True)

    def errors(world, lse=True):
        ours = ring(inputs, SequenceLayout(1024, world, "zigzag"), lse=lse, is_causal=True)
        assert ours[0].dtype == ours[-1].dtype == torch.bfloat16
        out, dk = (ours[0] - expected[0]).abs(), (ours[-2] - expected[-2]).abs()
        return out.mean().item(), dk.max().item()

    # One rank, by our own block and by torch's SDPA.
    out1, dk1 = map(min, zip(errors(1), errors(1, lse=False), strict=True))
    for world in (2, 4, 8, 16, 32):
        out, dk = errors(world)
        assert out <= 1.02 * out1 and dk <= 1.25 * dk1, (world, out / out1, dk / dk1)


@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, backend):
    inputs = make_inputs(length=64, dtype=dtype)
    wide = [x.double() for x in inputs]
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(64, right=0)), wide, True)
    ours = ring(inputs, SequenceLayout(64, 3, "striped"), is_causal=True, backend=backend)
    assert [x.dtype for x in ours] == [dtype, torch.float32, dtype, dtype, dtype]
    for a, b in zip(ours, expected, strict=True):
        assert_close_rel(a, b, dtype=dtype)


def test_large_logits_do_not_overflow():
    inputs = make_inputs(dtype=torch.float32)
    inputs[0] = inputs[0] * 300
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(right=0)), [x.double() for x in inputs], True)
    ours = ring(inputs, SequenceLayout(L, 4, "striped"), is_causal=True)
    assert all(x.isfinite().all() for x in ours)
    assert_close_rel(ours[0], expected[0], rtol=1e-4)


def test_autocast():
    layout = SequenceLayout(16, 2, "zigzag")
    q, k, v, *_ = make_inputs(length=16, dtype=torch.float32)

    def fn(rank, group):
        shards = [layout.shard(x, 2, rank).requires_grad_() for x in (q, k.bfloat16(), v)]
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = ring_attention(*shards, layout=layout, group=group, enable_gqa=True, return_lse=True)
            grads = torch.autograd.grad(out.float().sum() + lse.sum(), shards)
        return out, lse, *grads

    expected = LoopbackWorld(2).run(
        lambda rank, group: ring_attention(
            *(layout.shard(x.bfloat16(), 2, rank) for x in (q, k, v)),
            layout=layout, group=group, enable_gqa=True, return_lse=True,
        )
    )  # fmt: skip
    for ours, theirs in zip(LoopbackWorld(2).run(fn), expected, strict=True):
        assert [x.dtype for x in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))


# Dropout


@pytest.mark.parametrize("schedule", ["ring", "allgather"])
def test_dropout_is_the_same_on_any_number_of_ranks_and_layout(schedule):
    inputs = make_inputs()
    i = torch.arange(L)
    keep = keep_mask(11, 0.3, 2, 4, i, i).double() / 0.7
    assert 0.25 < (keep == 0).double().mean() < 0.35
    expected = gradients(lambda q, k, v: plain(q, k, v, dense_mask(right=0), keep=keep), inputs, True)
    for world in (1, 3, 4):
        for kind in (*KINDS, "documents"):
            layout = SequenceLayout(L, world, kind, [0, L] if kind == "documents" else None)
            seed = torch.tensor([11]) if world == 3 else 11
            options = {"dropout_p": 0.3, "dropout_seed": seed, "schedule": schedule}
            check_equal(ring(inputs, layout, is_causal=True, **options), expected)


def test_dropout_of_some_heads_is_that_of_all():
    inputs = make_inputs(4, 4)
    i = torch.arange(L)
    keep = keep_mask(3, 0.5, 2, 4, i, i)
    assert torch.equal(keep_mask(3, 0.5, 2, 2, i, i, head_offset=1, heads=4), keep[:, 1:3])
    options = {"scale": 0.5, "dropout_p": 0.5, "seed": torch.tensor([3]), "window": (-1, 0)}
    options |= {"group": None, "layout": SequenceLayout(L, 1)}
    out, _ = unchecked_ring(*inputs[:3], **options)
    part, _ = unchecked_ring(*(x[:, 1:3] for x in inputs[:3]), head_offset=1, heads=4, **options)
    assert (out[:, 1:3] - part).abs().max() <= 1e-14
    assert (out - plain(*inputs[:3], dense_mask(right=0), 0.5, keep.double() / 0.5)[0]).abs().max() <= 1e-12


def test_without_a_seed_dropout_follows_torch_s_generator():
    q, k, v, *_ = make_inputs()
    layout = SequenceLayout(L, 1)
    options = {"layout": layout, "enable_gqa": True, "dropout_p": 0.5}
    torch.manual_seed(1)
    first, second = (ring_attention(q, k, v, **options) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, ring_attention(q, k, v, **options)) and not torch.equal(first, second)


# Merging, blocks


@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_rows_that_see_nothing(backend):
    """Queries before all keys, and some of them: out 0, lse -inf, gradients 0, and finite everywhere."""
    q, k, v, grad, grad_lse = make_inputs(2, 2, length=6, kv_length=5)
    block = make_block(backend, Options(0.5))
    late, empty = (Mask(Tokens((range(0, 6),)), Tokens((range(start, start + 5),)), (-1, 0), ()) for start in (3, 9))
    assert empty.empty and not late.empty
    for masks in ([late], [empty, late], [late, empty], [empty]):
        state = block.start(q, 8)
        for mask in masks:
            block.forward(q, k, v, state, mask, last=mask is masks[-1])
        out, lse = block.finish(state)
        seen = torch.arange(3, 8) <= torch.arange(6)[:, None] if late in masks else torch.zeros(6, 5, dtype=torch.bool)
        expected, expected_lse = plain(q, k, v, seen, 0.5)
        rows = seen.any(-1)
        check_equal([out[:, :, rows], lse[:, :, rows]], [expected[:, :, rows], expected_lse[:, :, rows]])
        assert (out[:, :, ~rows] == 0).all() and (lse[:, :, ~rows] == -math.inf).all()
        grads = block.start_backward(q, out, lse, grad, grad_lse)
        dk, dv = (sum(x) for x in zip(*(block.backward(q, k, v, grads, mask) for mask in masks), strict=True))
        assert (grads.dq[:, :, ~rows] == 0).all()
        assert all(x.isfinite().all() for x in (grads.dq, dk, dv))
        assert (dk[:, :, 3:] == 0).all() and (dv[:, :, 3:] == 0).all()


def test_masks_say_the_same_in_all_their_forms():
    """spans, rectangles, empty and affine against a dense mask, for shards of every layout."""
    i = torch.arange(L)
    for kind in (*KINDS, "documents"):
        layout = SequenceLayout(L, 4, kind, BORDERS if kind == "documents" else None)
        tokens = [Tokens(layout.runs(r)) for r in range(4)]
        for one in tokens:
            if one.affine is not None:
                base, split, base1, stride = one.affine
                n = torch.arange(one.length)
                expected = torch.where(n < split, base + stride * n, base1 + stride * (n - split))
                assert torch.equal(one.positions, expected)
            assert (one.affine is None) == (kind == "documents" and len(one.runs) > 2)
        for window, borders in (((-1, 0), ()), ((4, 2), ()), ((-1, -1), ()), ((7, 0), BORDERS)):
            dense = dense_mask(L, *window, borders or (0, L))
            for queries in tokens:
                for keys in tokens:
                    mask = Mask(queries, keys, window, borders)
                    expected = dense[queries.positions][:, keys.positions]
                    start, stop = mask.spans
                    j = torch.arange(keys.length)
                    assert torch.equal((j >= start[:, None]) & (j < stop[:, None]), expected)
                    assert not (mask.empty and expected.any())
                    if kind == "contiguous":
                        assert mask.empty == (not expected.any())
                    if window[0] < 0:
                        painted = torch.zeros_like(expected, dtype=torch.int)
                        for rows, columns, causal in mask.rectangles:
                            part = torch.ones_like(painted[rows, columns])
                            assert not causal or part.shape[0] == part.shape[1]
                            painted[rows, columns] += part.tril() if causal else part
                        assert torch.equal(painted, expected.int())
    assert Tokens((range(0, 4), range(6, 8), range(9, 10))).affine is None
    assert i[-1] == L - 1


def test_rectangles_are_few():
    for kind, most in (("contiguous", 1), ("zigzag", 1), ("striped", 1)):
        layout = SequenceLayout(64, 4, kind)
        tokens = [Tokens(layout.runs(r)) for r in range(4)]
        assert max(len(Mask(q, k, (-1, 0), ()).rectangles) for q in tokens for k in tokens) == most


def test_merge_is_that_of_torch_s_context_parallelism():
    parts = [make_inputs(2, 2, length=5, kv_length=n) for n in (4, 7, 3)]
    q = parts[0][0]
    blocks = [plain(q, k, v) for _, k, v, *_ in parts]
    merger = _SDPAMerger(True, 2)
    for out, lse in blocks:
        merger.step(out, lse, False)
    theirs = merger.results()
    ours = blocks[0]
    for block in blocks[1:]:
        ours = merge_attention(*ours, *block)
    # Theirs keeps float32 inside.
    assert (ours[0] - theirs[0]).abs().max() <= 1e-5 and (ours[1] - theirs[1].squeeze(-1)).abs().max() <= 1e-5
    whole = plain(q, torch.cat([p[1] for p in parts], 2), torch.cat([p[2] for p in parts], 2))
    check_equal(ours, whole)


def test_what_does_not_merge():
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for name, arguments in (
        ("lse", (out, lse[:, :1], out, lse)),
        ("out2", (out, lse, out[:1], lse)),
        ("lse2", (out, lse, out, lse[0])),
    ):
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            merge_attention(*arguments)
    with pytest.raises(TypeError, match="out and lse must be tensors"):
        merge_attention(out, 0.0, out, lse)


def test_one_rank_compiles_and_is_differentiable_once():
    layout = SequenceLayout(L, 1)
    inputs = make_inputs()

    def call(q, k, v):
        return ring_attention(
            q, k, v, layout=layout, is_causal=True, window_size=9, enable_gqa=True, return_lse=True, cu_seqlens=BORDERS
        )

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    check_equal(gradients(compiled, inputs, True), gradients(call, inputs, True))
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    out, _ = call(q, k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once|does not require grad|no autograd formula"):
        torch.autograd.grad(grad.sum(), q)


def test_vmap_is_refused_with_a_reason():
    q = torch.randn(3, 1, 2, 8, 4)
    layout = SequenceLayout(8, 1)
    with pytest.raises(NotImplementedError, match="does not run under vmap"):
        torch.vmap(lambda x: ring_attention(x, x, x, layout=layout, return_lse=True))(q)


# Bad input


def refused(alone=None, **options):
    """What each of two ranks raises; nothing is sent, and the group can go on. ``alone`` makes the bad call, or all."""
    ranks = LoopbackWorld(2)

    def fn(rank, group):
        x = torch.randn(1, 4, 8, 4)
        arguments = {"q": x, "k": x, "v": x, "layout": ZIGZAG, "group": group}
        if alone in (None, rank):
            arguments |= options
        try:
            ring_attention(**arguments)
        except (ValueError, TypeError, NotImplementedError) as error:
            return error

    errors = ranks.run(fn)
    assert ranks.bytes_sent == ranks.hops == [0, 0]
    x = torch.randn(1, 4, 16, 4)
    ranks.run(lambda rank, group: ring_attention(*[ZIGZAG.shard(x, 2, rank)] * 3, layout=ZIGZAG, group=group))
    assert ranks.hops == [1, 1]
    return errors


ZIGZAG = SequenceLayout(16, 2, "zigzag")
BAD = {
    "attn_mask": ({"attn_mask": torch.ones(8, 16)}, NotImplementedError, "attn_mask must be None: .*ring_self_att"),
    "int window": ({"window_size": 4}, ValueError, r"window_size must be a pair \(left, right\) unless is_causal"),
    "zigzag window": ({"window_size": 4, "is_causal": True}, ValueError, "window_size must come with a contiguous"),
    "window": ({"window_size": 0, "is_causal": True}, ValueError, "window_size must be at least 1, got 0"),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "seed": ({"dropout_p": 0.1, "dropout_seed": torch.zeros(1)}, TypeError, "dropout_seed must be an int64 tensor"),
    "scale": ({"scale": math.inf}, ValueError, "scale must be finite"),
    "schedule": ({"schedule": "rings"}, ValueError, "schedule must be one of 'ring', 'allgather', got 'rings'"),
    "backend": ({"backend": "eager"}, ValueError, "backend must be one of None, 'auto', 'torch', 'triton', 'flash'"),
    "cudnn": ({"backend": "cudnn"}, ValueError, "backend='cudnn' .* does not support tensors on cpu"),
    "flash dropout": ({"backend": "flash", "dropout_p": 0.1}, ValueError, "not support dropout; backend='triton'"),
    "flash documents": ({"backend": "flash", "cu_seqlens": [0, 4, 16]}, ValueError, "does not support documents"),
    "kv world": ({"kv_layout": SequenceLayout(16, 4)}, ValueError, "kv_layout must have as many ranks as layout"),
    "kv type": ({"kv_layout": 16}, TypeError, "kv_layout must be a SequenceLayout, got int"),
    "layout type": ({"layout": "zigzag"}, TypeError, "layout must be a SequenceLayout, got str"),
    "layout world": ({"layout": SequenceLayout(16, 4)}, ValueError, "group must have the layout's 4 ranks, got 2"),
    "length": ({"q": torch.zeros(1, 4, 7, 4)}, ValueError, "q must have length of rank . in the layout = 8 at dim"),
    "kv length": ({"v": torch.zeros(1, 4, 9, 4)}, ValueError, "v must have length of rank . in the layout = 8"),
    "causal lengths": (
        {
            "is_causal": True, "kv_layout": SequenceLayout(14, 2),
            "k": torch.zeros(1, 4, 7, 4), "v": torch.zeros(1, 4, 7, 4),
        },
        ValueError,
        "is_causal must come with queries and keys of one sequence, got lengths 16 and 14",
    ),
    "document lengths": (
        {
            "cu_seqlens": [0, 4, 16], "kv_layout": SequenceLayout(14, 2),
            "k": torch.zeros(1, 4, 7, 4), "v": torch.zeros(1, 4, 7, 4),
        },
        ValueError,
        "cu_seqlens must come with queries and keys of one sequence",
    ),
    "borders": (
        {"layout": SequenceLayout(16, 2, "documents", [0, 8, 16]), "cu_seqlens": [0, 4, 16]},
        ValueError,
        "layout and kv_layout and cu_seqlens must have the same borders",
    ),
    "borders' end": ({"cu_seqlens": [0, 4, 15]}, ValueError, "cu_seqlens must go from 0 to the length 16"),
    "group and mesh": ({"mesh": object()}, ValueError, "group or mesh must be given, not both"),
    "heads": ({"k": torch.zeros(1, 2, 8, 4), "v": torch.zeros(1, 2, 8, 4)}, ValueError, "unless enable_gqa, got 4"),
    "group of heads": (
        {"k": torch.zeros(1, 3, 8, 4), "v": torch.zeros(1, 3, 8, 4), "enable_gqa": True},
        ValueError,
        "q must have a multiple of the keys' heads, 3, got 4",
    ),
    "mixed dtypes": ({"k": torch.zeros(1, 4, 8, 4).double()}, TypeError, "k must have the dtype of q"),
    "int": ({"q": torch.zeros(1, 4, 8, 4).long()}, TypeError, "q must have a real floating-point dtype"),
    "channels": ({"k": torch.zeros(1, 4, 8, 5)}, ValueError, "k must have the channels of q = 4"),
    "dimensions": ({"q": torch.zeros(4, 8, 4)}, ValueError, r"q must have 4 dimensions \(batch, heads"),
    "no tensor": ({"v": None}, TypeError, "v must be a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_on_all_ranks(case):
    options, error, message = BAD[case]
    for found in refused(**options):
        with pytest.raises(error, match=message):
            raise found


@pytest.mark.parametrize("case", BAD)
def test_what_one_rank_refuses_all_refuse(case):
    options, error, message = BAD[case]
    found = refused(alone=1, **options)
    with pytest.raises(error, match=message):
        raise found[1]
    with pytest.raises(ValueError, match="rank 1 refused the call: .*" + message):
        raise found[0]


@pytest.mark.parametrize(
    "options",
    [
        {"q": torch.zeros(2, 4, 8, 4), "k": torch.zeros(2, 4, 8, 4), "v": torch.zeros(2, 4, 8, 4)},
        {x: torch.zeros(1, 4, 8, 4).double() for x in "qkv"},
        {"layout": SequenceLayout(16, 2, "striped")},
        {"is_causal": True},
        {"cu_seqlens": [0, 3, 16]},
        {"scale": 0.1},
        {"dropout_p": 0.1},
        {"schedule": "allgather"},
        {"backend": "flash"},
    ],
)
def test_ranks_that_differ_are_refused_everywhere(options):
    for found in refused(alone=1, **options):
        with pytest.raises(
            ValueError, match="all ranks of the group must make the same call, got rank 0: ring_attention"
        ):
            raise found


def test_ranks_compare_their_first_call_or_all():
    ranks = LoopbackWorld(2)
    x = torch.randn(1, 1, 16, 4)
    messages = []

    def fn(rank, group, **options):
        return ring_attention(*[ZIGZAG.shard(x, 2, rank)] * 3, layout=ZIGZAG, group=group, **options)

    for _ in range(2):
        for group in ranks.groups:
            group._post = lambda sends, receives, tag, post=group.__class__._post, group=group: (
                messages.append(tag) or post(group, sends, receives, tag)
            )
    ranks.run(fn)
    assert messages.count(99) == 2  # one control message a rank
    ranks.run(fn)
    assert messages.count(99) == 2
    ranks.run(lambda *at: fn(*at, check="always"))
    assert messages.count(99) == 4
    messages.clear()
    LoopbackWorld(2).run(lambda *at: fn(*at, check="never"))
    assert not messages
    with pytest.raises(ValueError, match="check must be one of 'first', 'always', 'never', got 'once'"):
        ranks.run(lambda *at: fn(*at, check="once"))


def test_a_group_is_needed_for_more_than_one_rank():
    x = torch.randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match="group or mesh must be given for a layout over 2 ranks, got neither"):
        ring_attention(x, x, x, layout=SequenceLayout(16, 2))
    with pytest.raises(torchlayers.BackendError, match="backend='triton' was asked for, but"):
        ring_attention(x.double(), x.double(), x.double(), layout=SequenceLayout(8, 1), backend="triton")


# The kernel


def small(device):
    return [x.to(device) for x in make_inputs(2, 1, length=21, d=16, dv=16, batch=1, dtype=torch.float32)]


SHORT = (0, 5, 5, 13, 21)


@pytest.mark.gpu
@pytest.mark.interpret
@pytest.mark.parametrize(
    ("kind", "options", "left", "right", "borders"),
    [
        ("contiguous", {}, -1, -1, (0, 21)),
        ("zigzag", {"is_causal": True}, -1, 0, (0, 21)),
        ("zigzag", {"is_causal": True, "schedule": "allgather"}, -1, 0, (0, 21)),
        ("striped", {"is_causal": True}, -1, 0, (0, 21)),
        ("contiguous", {"is_causal": True, "window_size": 9}, 8, 0, (0, 21)),
        ("contiguous", {"window_size": (3, 5)}, 3, 5, (0, 21)),
        ("documents", {"is_causal": True}, -1, 0, SHORT),
        ("striped", {"cu_seqlens": SHORT, "schedule": "allgather"}, -1, -1, SHORT),
    ],
)
def test_the_triton_block(device, kind, options, left, right, borders):
    inputs = small(device)
    mask = dense_mask(21, left, right, borders).to(device)
    expected = gradients(lambda q, k, v: plain(q, k, v, mask), [x.double() for x in inputs], True)
    layout = SequenceLayout(21, 3, kind, SHORT if kind == "documents" else None)
    ours = ring(inputs, layout, backend="triton", **options)
    assert torchlayers.last_dispatch() == "triton: ring_block_forward"
    for a, b in zip(ours, expected, strict=True):
        assert_close_rel(a, b, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.interpret
@pytest.mark.parametrize(("world", "kind"), [(1, "contiguous"), (3, "zigzag")])
def test_the_triton_block_drops_the_same(device, world, kind):
    inputs = small(device)
    i = torch.arange(21, device=device)
    keep = keep_mask(11, 0.3, 1, 2, i, i).double() / 0.7
    mask = dense_mask(21, right=0).to(device)
    expected = gradients(lambda q, k, v: plain(q, k, v, mask, keep=keep), [x.double() for x in inputs], True)
    options = {"is_causal": True, "dropout_p": 0.3, "dropout_seed": 11, "backend": "triton"}
    for a, b in zip(ring(inputs, SequenceLayout(21, world, kind), **options), expected, strict=True):
        assert_close_rel(a, b, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash", "cudnn"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_on_a_gpu(device, backend, kind, causal):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    inputs = [x.to(device) for x in make_inputs(8, 2, length=500, d=64, dv=64, dtype=torch.bfloat16)]
    mask = dense_mask(500, right=0 if causal else -1).to(device)
    expected = gradients(lambda q, k, v: plain(q, k, v, mask), [x.double() for x in inputs], True)
    for world in (1, 4):
        ours = ring(inputs, SequenceLayout(500, world, kind), is_causal=causal, backend=backend)
        for a, b in zip(ours, expected, strict=True):
            assert_close_rel(a, b, dtype=torch.bfloat16)
