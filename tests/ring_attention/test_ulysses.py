"""Heads for tokens, alone and with the ring, on virtual ranks and in one world of four gloo processes.

This file is also the program that the four processes run; each writes what it found, and the tests read these.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import torchlayers
from torchlayers import LoopbackWorld, SequenceLayout
from torchlayers._ring_ops import (
    all_to_all_heads,
    all_to_all_sequence,
    gather_sequence,
    scatter_sequence,
)
from torchlayers._sequence import document_bounds
from torchlayers.functional import (
    linformer_attention,
    ring_attention,
    ring_self_attention,
    ulysses_attention,
    usp_attention,
)
from torchlayers.testing import serve_ranks, spawn_ranks

N, DOCUMENTS = 13, (0, 4, 4, 13)
KINDS = ("contiguous", "zigzag", "striped", "documents")
MESHES = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (3, 2), (5, 1)]  # ring, ulysses


def make_layout(kind, world, n=N):
    return SequenceLayout(n, world, kind, DOCUMENTS if kind == "documents" else None)


def inputs(heads=4, kv_heads=2, n=N, kv_n=None, dtype=torch.float64):
    """q, k, v and a gradient of the output; channels 5 and, of v, 3."""
    kv_n = n if kv_n is None else kv_n
    sizes = (2, heads, n, 5), (2, kv_heads, kv_n, 5), (2, kv_heads, kv_n, 3), (2, heads, n, 3)
    return [torch.randn(size, dtype=dtype) for size in sizes]


def dense(q, k, v, is_causal=False, window_size=(-1, -1), documents=None, scale=None):
    """What torch's attention says: out and lse."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    left, right = window_size if isinstance(window_size, tuple) else (window_size - 1, 0)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    if is_causal:
        seen &= j <= i
    if documents is not None:
        first, last = document_bounds(documents)
        seen &= (j >= first[:, None]) & (j <= last[:, None])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    return out, scores.masked_fill(~seen, float("-inf")).logsumexp(-1)


def differentiate(function, tensors, grad):
    """Output, lse and gradients of a ``function`` that returns the first two."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*tensors)
    grads = torch.autograd.grad([out, lse], tensors, [grad, grad[..., 0].to(lse.dtype)])
    return out.detach(), lse.detach(), *grads


def over_mesh(mesh, layout, tensors, grad, kv_layout=None, world=None, function=usp_attention, **options):
    """The same over the ranks of a mesh (ring, ulysses), put together."""
    world = LoopbackWorld(layout.world) if world is None else world
    kv_layout = layout if kv_layout is None else kv_layout
    if kv_layout is not layout:
        options["kv_layout"] = kv_layout

    def rank_result(rank, group):
        where = {"mesh": world.mesh(rank, mesh, ("ring", "ulysses"))} if function is usp_attention else {"group": group}
        q, k, v = tensors
        shards = [layout.shard(q, 2, rank), kv_layout.shard(k, 2, rank), kv_layout.shard(v, 2, rank)]

        def call(*x):
            return function(*x, layout=layout, enable_gqa=True, return_lse=True, **where, **options)

        return differentiate(call, shards, layout.shard(grad, 2, rank))

    results = zip(*world.run(rank_result), strict=True)
    layouts = (layout, layout, layout, kv_layout, kv_layout)
    return [where.unshard(x, 2) for x, where in zip(results, layouts, strict=True)]


def assert_equal(results, expected):
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        assert (got - want).abs().max() < 1e-12, name


# Against torch's attention


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_usp_equals_sdpa(mesh, kind):
    layout = make_layout(kind, mesh[0] * mesh[1])
    *tensors, grad = inputs()
    for options in ({}, {"is_causal": True}, {"window_size": (2, 3)}, {"window_size": 4, "is_causal": True}):
        if kind == "zigzag" and mesh[0] > 1 and "window_size" in options:
            continue  # refused, see below
        got = over_mesh(mesh, layout, tensors, grad, **options)
        want = differentiate(lambda *x, o=options: dense(*x, **o, documents=layout.cu_seqlens), tensors, grad)
        assert_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kv_heads", ["all", "one"])
def test_ulysses_equals_sdpa(kind, world, kv_heads):
    """Any number of ranks that divides the heads; as many key heads, or fewer and shared."""
    layout = make_layout(kind, world)
    *tensors, grad = inputs(heads=2 * world, kv_heads=world if kv_heads == "all" else 1)
    for options in ({"is_causal": True, "scale": 0.3}, {"window_size": (2, 3), "cu_seqlens": DOCUMENTS}):
        got = over_mesh(None, layout, tensors, grad, function=ulysses_attention, **options)
        plain = {name: x for name, x in options.items() if name != "cu_seqlens"}
        documents = options.get("cu_seqlens", layout.cu_seqlens)
        assert_equal(got, differentiate(lambda *x, o=plain, d=documents: dense(*x, **o, documents=d), tensors, grad))


def test_ulysses_without_extras_is_sdpa_to_the_bit():
    layout, world = make_layout("zigzag", 2), LoopbackWorld(2)
    q, k, v, _ = inputs(dtype=torch.float32)

    def attend(rank, group):
        shards = (layout.shard(x, 2, rank) for x in (q, k, v))
        out = ulysses_attention(*shards, layout=layout, group=group, is_causal=True, enable_gqa=True)
        assert "torch" in torchlayers.last_dispatch()
        return out

    out = layout.unshard(world.run(attend), 2)
    for heads in (slice(0, 2), slice(2, 4)):
        own = slice(heads.start // 2, heads.stop // 2)
        want = F.scaled_dot_product_attention(q[:, heads], k[:, own], v[:, own], is_causal=True, enable_gqa=True)
        assert torch.equal(out[:, heads], want)
    one = ulysses_attention(q, k, v, layout=make_layout("striped", 1), is_causal=True, enable_gqa=True)
    assert torch.equal(one, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2), (4, 1)])
def test_cross_attention(mesh):
    layout, kv_layout = make_layout("zigzag", 4), make_layout("striped", 4, 18)
    *tensors, grad = inputs(kv_n=18)
    want = differentiate(dense, tensors, grad)
    assert_equal(over_mesh(mesh, layout, tensors, grad, kv_layout=kv_layout), want)
    if mesh == (1, 4):
        assert_equal(over_mesh(None, layout, tensors, grad, kv_layout=kv_layout, function=ulysses_attention), want)


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_the_ring(mesh, kind):
    layout = make_layout(kind, 4)
    one = SequenceLayout(N, 1, cu_seqlens=layout.cu_seqlens)
    *tensors, grad = inputs()
    options = {"dropout_p": 0.3, "dropout_seed": 11, "is_causal": True}
    want = over_mesh(None, one, tensors, grad, function=ring_attention, **options)
    assert_equal(over_mesh(mesh, layout, tensors, grad, **options), want)
    undropped = differentiate(lambda *x: dense(*x, is_causal=True, documents=layout.cu_seqlens), tensors, grad)
    assert (want[0] - undropped[0]).abs().max() > 0.01
    if mesh == (1, 4):
        assert_equal(over_mesh(None, layout, tensors, grad, function=ulysses_attention, **options), want)


@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("schedule", ["ring", "allgather"])
def test_usp_takes_the_rings_options(backend, schedule):
    layout = make_layout("zigzag", 4)
    *tensors, grad = inputs(dtype=torch.float32)
    got = over_mesh((2, 2), layout, tensors, grad, is_causal=True, backend=backend, schedule=schedule)
    want = differentiate(lambda *x: dense(*x, is_causal=True), [x.double() for x in tensors], grad.double())
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_half_precision_and_autocast():
    layout, world = make_layout("zigzag", 4), LoopbackWorld(4)
    q, k, v, _ = inputs(heads=8, kv_heads=8, dtype=torch.float32)
    want = dense(*(x.bfloat16().double() for x in (q, k, v)))[0]

    def attend(rank, group):
        mesh = world.mesh(rank, (2, 2), ("ring", "ulysses"))
        shards = [layout.shard(x, 2, rank) for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16):
            cast = usp_attention(*shards, layout=layout, mesh=mesh)
        return cast, usp_attention(*(x.bfloat16() for x in shards), layout=layout, mesh=mesh)

    cast, half = (layout.unshard(x, 2) for x in zip(*world.run(attend), strict=True))
    assert cast.dtype == torch.bfloat16 and torch.equal(cast, half)
    assert (half.double() - want).norm() < 4e-3 * want.norm()


# What is sent


def test_bytes_of_ulysses():
    """Each rank sends (P-1)/P of q, k, v and out, and of all their gradients; key heads that are shared go to all who
    share them."""
    heads, n, world, b = 8, 48, 4, 8
    for kv_heads in (4, 1):
        layout, ranks = make_layout("zigzag", world, n), LoopbackWorld(world)
        *tensors, grad = inputs(heads, kv_heads, n)
        over_mesh(None, layout, tensors, grad, function=ulysses_attention, world=ranks)
        own = 2 * (n // world) * b
        queries_and_output = own * (world - 1) * (heads // world) * (5 + 3)
        keys_and_values = own * (world - 1) * max(kv_heads // world, 1) * (5 + 3)
        lse = own * (world - 1) * (heads // world)
        assert ranks.bytes_sent == [2 * (queries_and_output + keys_and_values + lse)] * world


def test_bytes_of_usp():
    """All-to-alls over pairs, and a ring of two with half of the heads of twice the tokens."""
    heads, kv_heads, n, b = 4, 2, 48, 8
    layout, ranks = make_layout("zigzag", 4, n), LoopbackWorld(4)
    *tensors, grad = inputs(heads, kv_heads, n)
    over_mesh((2, 2), layout, tensors, grad, is_causal=True, world=ranks)
    own = 2 * (n // 4) * b
    exchanged = own * (heads // 2 * (5 + 3 + 1) + kv_heads // 2 * (5 + 3))
    shard = 2 * own * (kv_heads // 2) * (5 + 3)  # keys and values of a part
    assert ranks.bytes_sent == [2 * exchanged + shard + 2 * shard] * 4


def test_causal_work_of_the_hybrid_is_even():
    """Zigzag over R·U ranks, U neighbours together, is zigzag over R."""
    layout = make_layout("zigzag", 6, 48)
    assert layout.merged(2) == make_layout("zigzag", 3, 48)
    assert len(set(layout.merged(3).work("causal"))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_merged_layouts(kind):
    for n in (1, 5, 13, 64):
        borders = (0, n // 3, n // 3, n) if kind == "documents" else None
        layout = SequenceLayout(n, 6, kind, borders)
        for size in (1, 2, 3, 6):
            merged = layout.merged(size)
            assert merged.world == 6 // size and SequenceLayout.from_key(merged.key) == merged
            for rank in range(merged.world):
                union = torch.cat([layout.positions(rank * size + r) for r in range(size)]).sort().values
                assert torch.equal(merged.positions(rank), union) and merged.length(rank) == len(union)
        assert layout.merged(2).merged(3) == layout.merged(6)
        x = torch.randn(2, n)
        merged = layout.merged(2)
        assert torch.equal(merged.unshard([merged.shard(x, 1, r) for r in range(3)], 1), x)
    with pytest.raises(ValueError, match="size must divide the layout's 6 ranks, got 4"):
        layout.merged(4)


# The exchanges


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_gather_and_scatter(kind, world):
    layout = make_layout(kind, world)
    x, grads = torch.randn(2, N, 3, dtype=torch.float64), torch.randn(world, 2, N, 3, dtype=torch.float64)

    def fn(rank, group):
        shard = layout.shard(x, 1, rank).clone().requires_grad_()
        whole = gather_sequence(shard, layout, -2, group)
        assert torch.equal(whole, x)
        (grad,) = torch.autograd.grad(whole, shard, grads[rank])
        assert (grad - layout.shard(grads.sum(0), 1, rank)).abs().max() < 1e-14
        replicated = x.clone().requires_grad_()
        own = scatter_sequence(replicated, layout, 1, group)
        assert torch.equal(own, shard)
        (grad,) = torch.autograd.grad(own, replicated, layout.shard(grads[0], 1, rank))
        assert torch.equal(grad, grads[0])

    LoopbackWorld(world).run(fn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_heads_for_tokens_and_back(kind, heads):
    world, layout = 4, make_layout(kind, 4)
    x, y = torch.randn(2, heads, N, 3), torch.randn(2, heads, N, 1)

    def fn(rank, group):
        shards = [layout.shard(t, 2, rank).clone().requires_grad_() for t in (x, y)]
        moved = all_to_all_heads(shards, layout, group.name)
        own = slice(rank * heads // world, rank * heads // world + max(1, heads // world))
        assert all(torch.equal(t, whole[:, own]) for t, whole in zip(moved, (x, y), strict=True))
        back = all_to_all_sequence(moved, [heads] * 2, layout, group.name)
        shared = max(1, world // heads)
        assert all(torch.equal(t, shared * shard) for t, shard in zip(back, shards, strict=True))
        (again,) = torch.autograd.grad(back[0], shards[0], shards[0].detach())
        assert torch.equal(again, shared * shards[0])

    LoopbackWorld(world).run(fn)


def test_sums_in_half_precision_round_once():
    layout, grads = make_layout("contiguous", 5), torch.randn(5, 1, N, 64).bfloat16()

    def fn(rank, group):
        shard = torch.zeros(1, layout.length(rank), 64, dtype=torch.bfloat16, requires_grad=True)
        return torch.autograd.grad(gather_sequence(shard, layout, 1, group), shard, grads[rank])[0]

    got = layout.unshard(LoopbackWorld(5).run(fn), 1)
    assert torch.equal(got, grads.double().sum(0).bfloat16())


def test_vmap_is_refused():
    layout = make_layout("contiguous", 2)

    def fn(rank, group):
        x = torch.randn(3, 1, 2, layout.length(rank), 4)
        torch.vmap(lambda y: ulysses_attention(y, y, y, layout=layout, group=group))(x)

    with pytest.raises(NotImplementedError, match="vmap"):
        LoopbackWorld(2).run(fn)


# Bad input


def messages(world, function):
    """What ``function(rank, group)`` raises on each rank."""

    def caught(rank, group):
        try:
            function(rank, group)
        except (TypeError, ValueError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    return world.run(caught)


def good(layout, rank, heads=4, kv_heads=2):
    n = layout.length(rank)
    return [torch.randn(1, h, n, 4) for h in (heads, kv_heads, kv_heads)]


BAD = [
    (lambda q, k, v: (q[:, :, 1:], k, v), {}, "q must have length of rank 0 in the layout = 3"),
    (lambda q, k, v: (q, k.double(), v), {}, "TypeError: k must have the dtype of q"),
    (lambda q, k, v: (q[:, :3], k[:, :1], v[:, :1]), {}, "q must have a multiple of 2 heads"),
    (
        lambda q, k, v: (torch.cat([q, q[:, :2]], 1), k[:, [0, 1, 1]], v[:, [0, 1, 1]]),
        {},
        "k must have a multiple of 2",
    ),
    (lambda q, k, v: (q, k, v), {"dropout_p": 1.0}, "dropout_p must be in [0, 1)"),
    (lambda q, k, v: (q, k, v), {"attn_mask": torch.ones(1)}, "NotImplementedError: attn_mask must be None"),
    (lambda q, k, v: (q, k, v), {"window_size": 3}, "window_size must be a pair"),
    (lambda q, k, v: (q, k, v), {"backend": "flash", "window_size": (2, 0)}, "it does not support windows"),
    (lambda q, k, v: (q, k, v), {"enable_gqa": False}, "unless enable_gqa"),
    (lambda q, k, v: (q, k, v), {"layout": SequenceLayout(N, 2)}, "layout must be over the 2 × 2 ranks of the mesh"),
    (lambda q, k, v: (q, k, v), {"layout": "zigzag"}, "TypeError: layout must be a SequenceLayout, got str"),
    (lambda q, k, v: (q, k, v), {"cu_seqlens": [0, 5]}, "cu_seqlens must go from 0 to the length 13"),
]


@pytest.mark.parametrize("change, options, expected", BAD)
def test_what_one_rank_refuses_all_ranks_of_the_mesh_refuse(change, options, expected):
    layout, world = make_layout("contiguous", 4), LoopbackWorld(4, timeout=10)

    def call(rank, group, bad):
        mesh, x = world.mesh(rank, (2, 2), ("ring", "ulysses")), good(layout, rank)
        given = {"layout": layout, "enable_gqa": True, **(options if bad == rank else {})}
        usp_attention(*(change(*x) if bad == rank else x), mesh=mesh, **given)

    said = messages(world, lambda rank, group: call(rank, group, bad=0))
    assert expected in said[0]
    assert all(said[rank].startswith("ValueError: rank") and "refused the call" in said[rank] for rank in (1, 2, 3))
    assert all(expected.split(": ")[-1] in message for message in said)
    assert world.bytes_sent == [0] * 4
    assert messages(world, lambda rank, group: call(rank, group, bad=None)) == ["none"] * 4


def test_what_one_rank_refuses_all_ranks_of_the_group_refuse():
    layout, world = make_layout("contiguous", 2), LoopbackWorld(2, timeout=10)

    def call(rank, group, **options):
        ulysses_attention(*good(layout, rank), layout=layout, group=group, enable_gqa=True, **options)

    said = messages(world, lambda rank, group: call(rank, group, **({"scale": "big"} if rank else {})))
    assert said[1].startswith("TypeError: scale must be a float") and "rank 1 refused the call" in said[0]
    for change in ({"is_causal": True}, {"scale": 0.1}, {"dropout_p": 0.5}, {"return_lse": True}):
        said = messages(world, lambda rank, group, change=change: call(rank, group, **(change if rank else {})))
        assert all("must make the same call" in message for message in said), change
    assert world.bytes_sent == [0] * 2


def test_check_always_and_never():
    """After a first call nothing is compared, unless asked for; on a mesh, in both dimensions."""
    layout, world = make_layout("contiguous", 4), LoopbackWorld(4, timeout=10)

    def call(rank, bad, check):
        mesh = world.mesh(rank, (2, 2), ("ring", "ulysses"))
        options = {"scale": 0.1} if rank == bad else {}
        usp_attention(*good(layout, rank), layout=layout, mesh=mesh, enable_gqa=True, check=check, **options)

    assert messages(world, lambda rank, group: call(rank, 2, "never")) == ["none"] * 4
    assert all("same call" in message for message in messages(world, lambda rank, group: call(rank, 2, "first")))
    assert messages(world, lambda rank, group: call(rank, None, "first")) == ["none"] * 4
    assert messages(world, lambda rank, group: call(rank, 2, "first")) == ["none"] * 4
    assert all("same call" in message for message in messages(world, lambda rank, group: call(rank, 2, "always")))


def test_mesh_and_window():
    layout, world = make_layout("zigzag", 4), LoopbackWorld(4)

    def call(rank, names, **options):
        usp_attention(
            *good(layout, rank), layout=layout, mesh=world.mesh(rank, (2, 2), names), enable_gqa=True, **options
        )

    said = messages(world, lambda rank, group: call(rank, ("ring", "sp")))
    assert all("mesh must have dimensions 'ring' and 'ulysses'" in message for message in said)
    said = messages(world, lambda rank, group: call(rank, ("ring", "ulysses"), window_size=(2, 2)))
    assert all("zigzag" in message and "window_size" in message for message in said)
    for mesh in ({}, {"mesh": None}):
        with pytest.raises(ValueError, match="got NoneType"):
            usp_attention(*good(layout, 0), layout=layout, enable_gqa=True, **mesh)
    alone = SequenceLayout(layout.seq_len, 1)
    q, k, v = good(alone, 0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(usp_attention(q, k, v, layout=alone, is_causal=True, enable_gqa=True), expected)
    with pytest.raises(ValueError, match="group or mesh must be given"):
        ulysses_attention(*good(layout, 0), layout=layout)


def test_loopback_mesh():
    world = LoopbackWorld(6)

    def fn(rank, group):
        mesh = world.mesh(rank, (3, 2), ("ring", "ulysses"))
        ring, pair = mesh.get_group("ring"), mesh.get_group("ulysses")
        assert (ring.rank, ring.size, pair.rank, pair.size) == (rank // 2, 3, rank % 2, 2)
        assert (mesh.size(), mesh.size(0), mesh.size(1), mesh.ndim) == (6, 3, 2, 2)
        assert mesh.get_local_rank("ring") == rank // 2
        assert mesh.get_group(1) is pair and world.mesh(rank, (3, 2), ("a", "b")).get_group("b") is pair
        one = torch.full((1,), float(rank))
        return ring.all_reduce(one).item(), pair.all_reduce(one).item()

    pairs = world.run(fn)
    assert pairs == [(6.0 if rank % 2 == 0 else 9.0, float(rank // 2 * 4 + 1)) for rank in range(6)]
    with pytest.raises(ValueError, match="shape must have the 6 ranks"):
        world.mesh(0, (2, 2), ("ring", "ulysses"))
    with pytest.raises(ValueError, match="names must be one for each of 2"):
        world.mesh(0, (3, 2), ("ring",))
    with pytest.raises(ValueError, match="rank must be below the world's 6"):
        world.mesh(6, (3, 2), ("ring", "ulysses"))


# Processes


WORLD = 4


def compare(function, tensors, grad, layout, rank, dense_options, **options):
    """The largest error of this rank's output and gradients."""
    want = differentiate(lambda *x: dense(*x, **dense_options), tensors, grad)
    shards = [layout.shard(x, 2, rank) for x in tensors]
    got = differentiate(
        lambda *x: function(*x, layout=layout, enable_gqa=True, return_lse=True, **options),
        shards,
        layout.shard(grad, 2, rank),
    )
    return max((a - layout.shard(b, 2, rank)).abs().max().item() for a, b in zip(got, want, strict=True))


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def cases(rank, mesh):
    torch.manual_seed(0)
    errors, group = {}, dist.group.WORLD
    *tensors, grad = inputs()
    for kind in ("zigzag", "striped"):
        layout = make_layout(kind, WORLD)
        causal = {"is_causal": True}
        errors[f"usp, {kind}"] = compare(usp_attention, tensors, grad, layout, rank, causal, mesh=mesh, **causal)
        errors[f"ulysses, {kind}"] = compare(
            ulysses_attention, tensors, grad, layout, rank, causal, group=group, **causal
        )
    packed = make_layout("documents", WORLD)
    options = {"documents": packed.cu_seqlens}
    errors["usp, documents"] = compare(usp_attention, tensors, grad, packed, rank, options, mesh=mesh)
    layout = make_layout("zigzag", WORLD)

    def usp(q, k, v, **options):
        return usp_attention(q, k, v, mesh=mesh, **options)

    def rows(q, k, v, **options):
        return ring_self_attention(q, k, v, group=group, **options)

    errors["usp, compiled"] = compare(compiled(usp), tensors, grad, layout, rank, {"is_causal": True}, is_causal=True)

    bias = torch.randn(N, N, dtype=torch.float64)
    shards = [layout.shard(x, 2, rank).requires_grad_() for x in tensors]
    own = layout.shard(bias, 0, rank)
    eager = rows(*shards, layout=layout, attn_bias=own, enable_gqa=True)
    want = F.scaled_dot_product_attention(*tensors, attn_mask=bias, enable_gqa=True)
    errors["rows"] = (eager - layout.shard(want, 2, rank)).abs().max().item()
    out = compiled(rows)(*shards, layout=layout, attn_bias=own, enable_gqa=True)
    upstream = layout.shard(grad, 2, rank)
    pairs = zip(torch.autograd.grad(out, shards, upstream), torch.autograd.grad(eager, shards, upstream), strict=True)
    errors["rows, compiled"] = max((a - b).abs().max().item() for a, b in [(out, eager), *pairs])

    q, k, v, _ = inputs(kv_heads=4)
    e = torch.randn(6, N, dtype=torch.float64)
    want = layout.shard(F.scaled_dot_product_attention(q, e @ k, e @ v), 2, rank)
    q, k, v = (layout.shard(x, 2, rank) for x in (q, k, v))
    e = layout.shard(e, 1, rank)
    linformer = lambda *x: linformer_attention(*x, group=group)  # noqa: E731
    errors["linformer"] = (linformer(q, k, v, e, e) - want).abs().max().item()
    errors["linformer, compiled"] = (compiled(linformer)(q, k, v, e, e) - want).abs().max().item()
    return errors


def refused(rank, mesh):
    """One rank's bad argument: what each says, and that the mesh is usable after it."""
    layout = make_layout("contiguous", WORLD)
    x = good(layout, rank)
    try:
        usp_attention(*x, layout=layout, mesh=mesh, enable_gqa=True, dropout_p=2.0 if rank == 3 else 0.0)
    except ValueError as error:
        message = str(error)
    usp_attention(*x, layout=layout, mesh=mesh, enable_gqa=True)
    return message


def work(rank):
    # Dynamo instantiates every torch.autograd.Function that it traces, which warns.
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    results = {"refused": refused(rank, mesh), "errors": cases(rank, mesh)}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the four ranks found."""
    return spawn_ranks(__file__, WORLD, tmp_path_factory.mktemp("world"))


CASES = (
    "usp, zigzag",
    "usp, striped",
    "ulysses, zigzag",
    "ulysses, striped",
    "usp, documents",
    "usp, compiled",
    "rows",
    "rows, compiled",
    "linformer",
    "linformer, compiled",
)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_processes_equal_sdpa(results, case):
    errors = [result["errors"][case] for result in results]
    assert max(errors) <= 1e-12 and all(error == error for error in errors), errors


@pytest.mark.distributed
def test_processes_refuse_together(results):
    said = [result["refused"] for result in results]
    assert all("dropout_p must be in [0, 1), got 2.0" in message for message in said)
    assert all("refused the call" in message for message in said[:3])


if __name__ == "__main__":
    serve_ranks(work)
