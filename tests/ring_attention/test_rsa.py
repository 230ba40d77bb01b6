"""The paper's ring self-attention and its Linformer, in an in-process world, against torch's attention in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from torchlayers._attention import keep_mask
from torchlayers._ring import LoopbackWorld
from torchlayers._sequence import SequenceLayout, document_bounds
from torchlayers.ring_attention import linformer_attention, ring_attention, ring_self_attention

KINDS = ("contiguous", "zigzag", "striped", "documents")
N, DOCUMENTS = 13, (0, 4, 4, 13)


def make_layout(kind, world, n=N):
    return SequenceLayout(n, world, kind, DOCUMENTS if kind == "documents" else None)


def inputs(*sizes, dtype=torch.float64):
    """Tensors (B, H, n, c) of the given sizes."""
    return [torch.randn(size, dtype=dtype) for size in sizes]


def mask_of(layout, is_causal):
    """What each query sees, (n, n) bool."""
    i = torch.arange(layout.seq_len)
    seen = i[:, None] >= i if is_causal else torch.ones(len(i), len(i), dtype=torch.bool)
    if layout.cu_seqlens is not None:
        first, last = document_bounds(layout.cu_seqlens)
        seen = seen & (i >= first[:, None]) & (i <= last[:, None])
    return seen


def differentiate(function, tensors, grad):
    """Output and gradients of ``function(*tensors)``."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def over_ranks(layout, function, tensors, grad, dims, world=None):
    """The same, from all ranks' shards; ``dims``: of the sequence in each tensor; the output's is 2."""

    def rank_result(rank, group):
        shards = [layout.shard(x, dim, rank) for x, dim in zip(tensors, dims, strict=True)]
        return differentiate(lambda *x: function(*x, group=group), shards, layout.shard(grad, 2, rank))

    results = (LoopbackWorld(layout.world) if world is None else world).run(rank_result)
    return [layout.unshard(x, dim) for x, dim in zip(zip(*results, strict=True), (2, *dims), strict=True)]


def assert_equal(results, expected):
    for name, got, want in zip(("out", "dq", "dk", "dv", "more", "more"), results, expected, strict=False):
        assert (got - want).abs().max() < 1e-12, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_equals_sdpa_and_the_ring(kind, world):
    layout = make_layout(kind, world)
    q, k, v, grad = inputs((2, 4, N, 5), (2, 2, N, 5), (2, 2, N, 3), (2, 4, N, 3))
    bias = torch.randn(4, N, N, dtype=torch.float64)
    for is_causal in (False, True):
        seen = mask_of(layout, is_causal)

        def expected(q, k, v, bias, seen=seen):
            bias = bias.masked_fill(~seen, float("-inf"))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)

        def rows(q, k, v, bias, group, is_causal=is_causal):
            return ring_self_attention(
                q, k, v, layout=layout, group=group, attn_bias=bias, is_causal=is_causal, enable_gqa=True
            )

        got = over_ranks(layout, rows, (q, k, v, bias), grad, (2, 2, 2, 1))
        assert_equal(got, differentiate(expected, (q, k, v, bias), grad))

        def plain(function, layout=layout, is_causal=is_causal):
            return lambda q, k, v, group: function(
                q, k, v, layout=layout, group=group, is_causal=is_causal, enable_gqa=True
            )

        got, ring = (
            over_ranks(layout, plain(function), (q, k, v), grad, (2, 2, 2))
            for function in (ring_self_attention, ring_attention)
        )
        assert_equal(got, ring)


@pytest.mark.parametrize("shape", [(N, N), (1, N), (N, 1), (N,), (3, 1, N, N), (2, 1, 1), (3, 2, 1, N)])
def test_bias_broadcasts_and_its_gradient_sums(shape):
    layout = make_layout("striped", 3)
    q, k, v, grad = inputs(*[(3, 2, N, 4)] * 4)
    bias = torch.randn(shape, dtype=torch.float64)
    sharded = len(shape) > 1 and shape[-2] == N

    def expected(q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(3, 2, N, N))

    def rank_result(rank, group):
        shards = [layout.shard(x, 2, rank) for x in (q, k, v)]
        shards.append(layout.shard(bias, -2, rank) if sharded else bias.clone())
        return differentiate(
            lambda *x: ring_self_attention(*x[:3], layout=layout, group=group, attn_bias=x[3]),
            shards,
            layout.shard(grad, 2, rank),
        )

    results = list(zip(*LoopbackWorld(3).run(rank_result), strict=True))
    got = [layout.unshard(x, 2) for x in results[:4]]
    # A bias that all ranks' queries share has, on each rank, the gradient of that rank's.
    got.append(layout.unshard(results[4], -2) if sharded else sum(results[4]))
    assert_equal(got, differentiate(expected, (q, k, v, bias), grad))


def test_bool_mask_and_queries_that_see_nothing():
    layout = make_layout("zigzag", 3)
    q, k, v, grad = inputs(*[(1, 2, N, 4)] * 4)
    mask = torch.rand(N, N) < 0.4
    mask[5] = False

    def masked(q, k, v, group):
        rank = group.rank
        return ring_self_attention(q, k, v, layout=layout, group=group, attn_bias=layout.shard(mask, 0, rank))

    got = over_ranks(layout, masked, (q, k, v), grad, (2, 2, 2))
    allowed = mask.clone()
    allowed[5] = True  # anything: the row is taken out below
    keep = torch.ones(N, 1, dtype=torch.float64)
    keep[5] = 0
    expected = differentiate(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=allowed) * keep, (q, k, v), grad)
    assert_equal(got, expected)
    assert not got[0][:, :, 5].any() and not got[1][:, :, 5].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_depends_on_positions_alone(is_causal):
    q, k, v, grad = inputs((2, 4, N, 5), (2, 2, N, 5), (2, 2, N, 3), (2, 4, N, 3))
    i = torch.arange(N)
    kept = keep_mask(7, 0.4, 2, 4, i, i).double() / 0.6

    def expected(q, k, v):
        scores = q @ k.repeat_interleave(2, 1).mT * 0.3
        scores = scores.masked_fill(~mask_of(make_layout("striped", 1), is_causal), float("-inf"))
        return (scores.softmax(-1) * kept) @ v.repeat_interleave(2, 1)

    want = differentiate(expected, (q, k, v), grad)
    for kind, world in itertools.product(("contiguous", "zigzag", "striped"), (1, 2, 3)):
        layout = make_layout(kind, world)
        for function in (ring_self_attention, ring_attention):

            def dropped(q, k, v, group, function=function, layout=layout):
                return function(
                    q, k, v, layout=layout, group=group, is_causal=is_causal, dropout_p=0.4, dropout_seed=7,
                    scale=0.3, enable_gqa=True,
                )  # fmt: skip

            assert_equal(over_ranks(layout, dropped, (q, k, v), grad, (2, 2, 2)), want)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_bytes(kind):
    """Forward K and V go round; backward V, K and the sums of dV and dK: 6 (N - 1) B Z c A elements in all."""
    world, batch, heads, n, channels = 4, 2, 4, 48, 8
    layout = make_layout(kind, world, n)
    q, k, v, grad = inputs(*[(batch, heads, n, channels)] * 4)

    def attend(q, k, v, group):
        return ring_self_attention(q, k, v, layout=layout, group=group)

    ranks = LoopbackWorld(world)
    ranks.run(lambda rank, group: attend(*(layout.shard(x, 2, rank) for x in (q, k, v)), group=group))
    per_rank = (world - 1) * batch * heads * (n // world) * channels * 8
    assert ranks.bytes_sent == [2 * per_rank] * world
    assert 2 * per_rank == 4608 * 8
    ranks = LoopbackWorld(world)
    over_ranks(layout, attend, (q, k, v), grad, (2, 2, 2), world=ranks)
    assert ranks.bytes_sent == [6 * per_rank] * world
    assert ranks.hops == [6 * (world - 1)] * world


def test_bytes_of_ragged_shards_grouped_heads_and_half_precision():
    layout, ranks = make_layout("contiguous", 3), LoopbackWorld(3)
    q, k, v, grad = inputs((1, 4, N, 6), (1, 2, N, 6), (1, 2, N, 2), (1, 4, N, 2), dtype=torch.bfloat16)
    over_ranks(
        layout,
        lambda q, k, v, group: ring_self_attention(q, k, v, layout=layout, group=group, enable_gqa=True),
        (q, k, v),
        grad,
        (2, 2, 2),
        world=ranks,
    )
    token = 2 * (6 + 2)  # elements of K and V
    for rank, sent in enumerate(ranks.bytes_sent):
        passed_on = N - layout.length((rank + 1) % 3)
        assert sent == token * (2 * 2 * passed_on + 4 * (N - layout.length(rank)))


def test_half_precision_is_rounded_once():
    layout = make_layout("zigzag", 5)
    wide = inputs(*[(1, 2, N, 16)] * 4)
    half = [x.bfloat16() for x in wide]
    want = differentiate(F.scaled_dot_product_attention, [x.double() for x in half[:3]], half[3].double())
    got = over_ranks(
        layout,
        lambda q, k, v, group: ring_self_attention(q, k, v, layout=layout, group=group),
        half[:3],
        half[3],
        (2, 2, 2),
    )
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 4e-3 * b.norm(), name


def test_gradcheck():
    layout = make_layout("striped", 3, 5)
    whole = inputs(*[(1, 1, 5, 2)] * 3)
    bias = torch.randn(5, 5, dtype=torch.float64)

    def attend(q, k, v, bias):
        """The sharded operation as a function of whole tensors, threads and all."""

        def rank_result(rank, group):
            shards = [layout.shard(x, 2, rank).detach().requires_grad_() for x in (q, k, v)]
            shards.append(layout.shard(bias, 0, rank).detach().requires_grad_())
            out = ring_self_attention(
                *shards[:3], layout=layout, group=group, attn_bias=shards[3], dropout_p=0.3, dropout_seed=3
            )
            return shards, out

        return rank_result

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            ctx.save_for_backward(*x)
            results = LoopbackWorld(3).run(attend(*x))
            return layout.unshard([out.detach() for _, out in results], 2)

        @staticmethod
        def backward(ctx, grad):
            make = attend(*ctx.saved_tensors)

            def rank_result(rank, group):
                with torch.enable_grad():
                    shards, out = make(rank, group)
                return torch.autograd.grad(out, shards, layout.shard(grad, 2, rank))

            grads = zip(*LoopbackWorld(3).run(rank_result), strict=True)
            return tuple(layout.unshard(x, dim) for x, dim in zip(grads, (2, 2, 2, 0), strict=True))

    assert torch.autograd.gradcheck(Whole.apply, [x.requires_grad_() for x in (*whole, bias)])


def test_one_rank_is_sdpa():
    layout = make_layout("zigzag", 1)
    q, k, v, bias = inputs((2, 2, N, 4), (2, 2, N, 4), (2, 2, N, 4), (N, N), dtype=torch.float32)
    assert torch.equal(ring_self_attention(q, k, v, layout=layout), F.scaled_dot_product_attention(q, k, v))
    got = ring_self_attention(q, k, v, layout=layout, attn_bias=bias, scale=0.2)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.2))
    got = ring_self_attention(q, k, v, layout=layout, is_causal=True)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_second_derivative_is_refused():
    layout = make_layout("contiguous", 2)

    def rank_result(rank, group):
        q = torch.randn(1, 1, layout.length(rank), 4, requires_grad=True)
        out = ring_self_attention(q, q, q, layout=layout, group=group)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        dq.sum().backward()

    with pytest.raises(RuntimeError, match="differentiable once"):
        LoopbackWorld(2).run(rank_result)


def test_under_autocast():
    layout = make_layout("contiguous", 2)
    q, k, v = inputs(*[(1, 2, N, 8)] * 3, dtype=torch.float32)

    def rank_result(rank, group):
        with torch.autocast("cpu", torch.bfloat16):
            shards = [layout.shard(x, 2, rank) for x in (q, k, v)]
            return ring_self_attention(*shards, layout=layout, group=group, attn_bias=torch.zeros(1, N))

    out = layout.unshard(LoopbackWorld(2).run(rank_result), 2)
    assert out.dtype == torch.bfloat16
    want = F.scaled_dot_product_attention(*(x.bfloat16().double() for x in (q, k, v)))
    assert (out.double() - want).norm() < 4e-3 * want.norm()


def everywhere(world, function):
    """The message of the error that each rank gets from ``function(rank, group)``."""

    def caught(rank, group):
        try:
            function(rank, group)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    return world.run(caught)


def good(rank, dtype=torch.float32, layout=None, heads=(2, 2)):
    layout = make_layout("contiguous", 2) if layout is None else layout
    n = layout.length(rank)
    return [torch.randn(1, h, n, 4, dtype=dtype) for h in (heads[0], heads[1], heads[1])]


@pytest.mark.parametrize(
    "change, expected",
    {
        "length": (lambda q, k, v: ((q[:, :, 1:], k, v), {}), "q must have length of rank 0 in the layout = 6"),
        "keys": (lambda q, k, v: ((q, k[:, :, 1:], v), {}), "k must have length of rank 0 in the layout = 6"),
        "dtype": (lambda q, k, v: ((q, k.double(), v), {}), "TypeError: k must have the dtype of q"),
        "ints": (lambda q, k, v: ((q.int(), k, v), {}), "TypeError: q must have a real floating-point dtype"),
        "channels": (lambda q, k, v: ((q, k[..., :3], v), {}), "k must have the channels of q = 4"),
        "heads": (lambda q, k, v: ((q, k[:, :1], v[:, :1]), {}), "unless enable_gqa"),
        "dropout": (lambda q, k, v: ((q, k, v), {"dropout_p": 1.0}), "dropout_p must be in [0, 1), got 1.0"),
        "scale": (lambda q, k, v: ((q, k, v), {"scale": float("nan")}), "scale must be finite"),
        "bias": (lambda q, k, v: ((q, k, v), {"attn_bias": torch.zeros(6, 12)}), "attn_bias must be (length, seq_len)"),
        "wide bias": (
            lambda q, k, v: ((q, k, v), {"attn_bias": torch.zeros(6, 13, dtype=torch.float64)}),
            "TypeError: attn_bias must be bool (True = keep) or floating, torch.float32 at most",
        ),
        "no bias": (lambda q, k, v: ((q, k, v), {"attn_bias": 3}), "TypeError: attn_bias must be a tensor, got int"),
    }.values(),
)
def test_bad_input_of_one_rank_is_an_error_on_all(change, expected):
    layout, world = make_layout("contiguous", 2), LoopbackWorld(2)

    def call(rank, group):
        arguments, options = change(*good(rank)) if rank == 0 else (good(rank), {})
        ring_self_attention(*arguments, layout=layout, group=group, **options)

    own, other = everywhere(world, call)
    assert expected in own
    assert other.startswith("ValueError: rank 0 refused the call: ") and expected.split(": ")[-1] in other
    assert world.bytes_sent == [0, 0]
    assert everywhere(world, lambda rank, group: ring_self_attention(*good(rank), layout=layout, group=group)) == [
        "none",
        "none",
    ]


def test_different_calls_are_an_error_on_all():
    layout = make_layout("contiguous", 2)
    for change in ({"scale": 0.1}, {"is_causal": True}, {"dropout_p": 0.5, "dropout_seed": 1}):
        world = LoopbackWorld(2)
        messages = everywhere(
            world,
            lambda rank, group, change=change: ring_self_attention(
                *good(rank), layout=layout, group=group, **(change if rank else {})
            ),
        )
        assert all("all ranks of the group must make the same call" in message for message in messages)
        assert world.bytes_sent == [0, 0]


def test_group_must_fit_the_layout():
    for size in (1, 3):
        with pytest.raises(ValueError, match=f"group must have the layout's {size} ranks, got 2"):
            layout = make_layout("contiguous", size)
            LoopbackWorld(2).run(
                lambda rank, group, layout=layout: ring_self_attention(*good(0), layout=layout, group=group)
            )
    with pytest.raises(ValueError, match="group or mesh must be given"):
        ring_self_attention(*good(0), layout=make_layout("contiguous", 2))


# Linformer


def dense_linformer(q, k, v, e, f, scale=None):
    return F.scaled_dot_product_attention(q, e @ k, f @ v, scale=scale)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("per_head", [False, True])
def test_linformer(world, per_head):
    layout = make_layout("striped", world)
    q, k, v, grad = inputs((2, 3, N, 4), (2, 3, N, 4), (2, 3, N, 5), (2, 3, N, 5))
    e, f = inputs(*[((3,) if per_head else ()) + (6, N)] * 2)
    want = differentiate(lambda *x: dense_linformer(*x, scale=0.4), (q, k, v, e, f), grad)
    ranks = LoopbackWorld(world)
    got = over_ranks(
        layout,
        lambda *x, group: linformer_attention(*x, group=group, scale=0.4),
        (q, k, v, e, f),
        grad,
        (2, 2, 2, -1, -1),
        world=ranks,
    )
    assert_equal(got, want)
    elements = 2 * 3 * 6 * (4 + 5)
    # An all-reduce is a reduce-scatter and an all-gather; forward and backward.
    assert sum(ranks.bytes_sent) == 2 * 2 * (world - 1) * elements * 8


def test_linformer_takes_queries_of_another_length_and_halves():
    q, k, v, e, f = inputs((1, 2, 3, 8), (1, 2, N, 8), (1, 2, N, 8), (4, N), (4, N), dtype=torch.bfloat16)
    layout = make_layout("contiguous", 3)

    def rank_result(rank, group):
        shards = [layout.shard(x, dim, rank) for x, dim in ((k, 2), (v, 2), (e, 1), (f, 1))]
        return linformer_attention(q, *shards, group=group)

    outs = LoopbackWorld(3).run(rank_result)
    want = dense_linformer(*(x.double() for x in (q, k, v, e, f)))
    for out in outs:
        assert torch.equal(out, outs[0]) and out.dtype == torch.bfloat16
        assert (out.double() - want).norm() < 1.5e-2 * want.norm()


def test_linformer_under_autocast():
    q, k, v, e, f = inputs((1, 2, N, 8), (1, 2, N, 8), (1, 2, N, 8), (4, N), (4, N), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linformer_attention(q, k, v, e, f)
    assert out.dtype == torch.bfloat16
    want = dense_linformer(*(x.double() for x in (q, k, v, e, f)))
    assert (out.double() - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda q, k, v, e, f: (q, k, v, e[:, 1:], f), "E_shard must have the length of k = 6"),
        (lambda q, k, v, e, f: (q, k, v, e, f[1:]), "F_shard must have the K of E_shard = 3"),
        (lambda q, k, v, e, f: (q, k, v, e.expand(3, 3, 6), f), "E_shard must have heads = 2"),
        (lambda q, k, v, e, f: (q, k, v, e.double(), f), "TypeError: E_shard must have the dtype of k"),
        (lambda q, k, v, e, f: (q, k, v, e[0], f), "E_shard must have 2 or 3 dimensions"),
        (lambda q, k, v, e, f: (q, k, v[:, :, 1:], e, f), "v must have the length of k = 6"),
        (lambda q, k, v, e, f: (q, k[..., :2], v, e, f), "k must have the channels of q = 4"),
    ],
)
def test_linformer_bad_input(change, expected):
    world = LoopbackWorld(2)

    def call(rank, group):
        arguments = (*good(rank), *torch.randn(2, 3, make_layout("contiguous", 2).length(rank)))
        linformer_attention(*(change(*arguments) if rank == 0 else arguments), group=group)

    own, other = everywhere(world, call)
    assert expected in own
    assert other.startswith("ValueError: rank 0 refused the call: ")
    assert world.bytes_sent == [0, 0]


def test_linformer_ranks_must_agree():
    def call(rank, group):
        n = make_layout("contiguous", 2).length(rank)
        linformer_attention(*good(rank), *torch.randn(2, 3 + rank, n), group=group)

    messages = everywhere(LoopbackWorld(2), call)
    assert all(
        "same call" in message and "(1, 2, 3, 8)" in message and "(1, 2, 4, 8)" in message for message in messages
    )
