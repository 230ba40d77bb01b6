"""Tensor attention over ranks: equal to one process, hops and bytes as in theory, errors on all ranks."""

import copy
import datetime
import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.distributed.device_mesh import DeviceMesh

from torchlayers._placement import use_layout
from torchlayers._ring import LoopbackWorld, leave_group
from torchlayers._sequence import SequenceLayout, document_bounds
from torchlayers.tensor_attention import (
    RingTensorAttention,
    TensorAttention,
    TensorAttentionCache,
    ring_tensor_attention,
    streams,
    tensor_attention,
    tour,
)
from torchlayers.testing import assert_close_rel, relative_error

KINDS = ("contiguous", "striped", "zigzag")


def inputs(n, batch=1, heads=2, kv_heads=2, d=3, dv=2, dtype=torch.float64, symmetric=False):
    """q, k1, k2, v1, v2 and gradients of out and lse."""
    shapes = [(heads, d), (kv_heads, d), (kv_heads, d), (kv_heads, dv), (kv_heads, dv), (heads, dv)]
    *tensors, grad = (torch.randn(batch, h, n, c, dtype=torch.float64).to(dtype) for h, c in shapes)
    if symmetric:
        tensors[2], tensors[4] = tensors[1].clone(), tensors[3].clone()
    return tensors, grad, torch.randn(batch, heads, n, dtype=torch.promote_types(dtype, torch.float32))


def differentiated(attend, tensors, grad, grad_lse):
    """out, lse and five gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    with torch.enable_grad():
        out, lse = attend(*leaves)
    torch.autograd.backward([out, lse], [grad, torch.where(lse.isfinite(), grad_lse, 0.0)])
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def widened(tensors, grad, grad_lse):
    return [x.double() for x in tensors], grad.double(), grad_lse.double()


def over_ranks(layout, tensors, grad, grad_lse, world=None, **options):
    """The same from all ranks' shards."""
    world = world or LoopbackWorld(layout.world, timeout=20)

    def work(rank, group):
        def attend(*leaves):
            return ring_tensor_attention(*leaves, layout=layout, group=group, return_lse=True, **options)

        shards = [layout.shard(x, 2, rank) for x in (*tensors, grad, grad_lse)]
        return differentiated(attend, shards[:5], *shards[5:])

    return [layout.unshard(parts, 2) for parts in zip(*world.run(work), strict=True)]


def assert_all_close(got, expected, tol=1e-12):
    for name, a, b in zip(("out", "lse", "dq", "dk1", "dk2", "dv1", "dv2"), got, expected, strict=True):
        seen = b.isfinite()
        assert torch.equal(a.isfinite(), seen), name
        torch.testing.assert_close(a[seen], b[seen], rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


CASES = {
    "full": {},
    "causal": {"is_causal": True},
    "halos": {"is_causal": True, "window1": 4, "window2": 2},
    "halos on both sides": {"window1": (2, 1), "window2": 3},
    "one halo": {"is_causal": True, "window2": 3},
    "long windows": {"is_causal": True, "window1": 7, "window2": 6},
    "ahead": {"window1": (-1, 2), "window2": (0, 5)},
    "grouped": {"is_causal": True, "enable_gqa": True},
    "determinant": {"form": "determinant", "window1": (3, -1)},
    "strassen": {"form": "strassen", "is_causal": True, "scale": 0.3},
    "symmetric": {"symmetric": True},
    "symmetric, causal": {"symmetric": True, "is_causal": True},
    "symmetric, window": {"symmetric": True, "is_causal": True, "window1": 5, "window2": 5},
}


PLACES = [(1, "striped"), *itertools.product((2, 3), KINDS), (4, "contiguous"), (4, "striped")]


@pytest.mark.parametrize("world, kind", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_is_the_operation_on_one_process(case, world, kind):
    options = dict(CASES[case])
    arguments = inputs(17, heads=4 if case == "grouped" else 2, symmetric="symmetric" in options)
    got = over_ranks(SequenceLayout(17, world, kind), *arguments, **options)
    options.pop("symmetric", None)
    assert_all_close(got, differentiated(lambda *x: tensor_attention(*x, return_lse=True, **options), *arguments))


WINDOWS = st.sampled_from([None, 1, 3, 6, 40, (2, 1), (0, 0), (-1, 2), (4, -1), (1, 9)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    world=st.integers(1, 6),
    n=st.integers(1, 20),
    kind=st.sampled_from(KINDS),
    window1=WINDOWS,
    window2=WINDOWS,
    is_causal=st.booleans(),
    form=st.sampled_from(["trilinear", "determinant", "strassen"]),
)
def test_any_length_over_any_number_of_ranks(world, n, kind, window1, window2, is_causal, form):
    torch.manual_seed(n)
    options = {"window1": window1, "window2": window2, "is_causal": is_causal, "form": form}
    arguments = inputs(n)
    got = over_ranks(SequenceLayout(n, world, kind), *arguments, **options)
    assert_all_close(got, differentiated(lambda *x: tensor_attention(*x, return_lse=True, **options), *arguments))


@pytest.mark.parametrize("kind", [*KINDS, "documents"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_documents_do_not_see_each_other(world, kind):
    borders = (0, 3, 3, 9, 10, 19)
    arguments = inputs(19)
    first, last = document_bounds(borders)
    keys = torch.arange(19)
    same = (first[:, None] <= keys) & (keys <= last[:, None])
    for causal, window in ((False, None), (True, 3)):
        options = {"is_causal": causal, "window1": window}

        def masked(*x, o=options):
            pairs = same[:, :, None] & same[:, None, :]
            return tensor_attention(*x, return_lse=True, backend="dense", pair_mask=pairs, **o)

        got = over_ranks(SequenceLayout(19, world, kind, borders), *arguments, **options)
        assert_all_close(got, differentiated(masked, *arguments))


class _World(torch.autograd.Function):
    """All ranks' outputs from whole tensors, for gradcheck: each pass runs the ranks anew."""

    @staticmethod
    def forward(ctx, layout, options, *tensors):
        ctx.layout, ctx.options = layout, options
        ctx.save_for_backward(*tensors)
        zeros = [torch.zeros(1, 1, layout.seq_len, 2).double(), torch.zeros(1, 1, layout.seq_len).double()]
        return tuple(over_ranks(layout, tensors, *zeros, **options)[:2])

    @staticmethod
    def backward(ctx, grad, grad_lse):
        return None, None, *over_ranks(ctx.layout, ctx.saved_tensors, grad, grad_lse, **ctx.options)[2:]


@pytest.mark.parametrize("kind, options", [("striped", {"is_causal": True}), ("contiguous", {"window1": (1, 1)})])
def test_gradcheck(kind, options):
    tensors = [x.requires_grad_() for x in inputs(5, heads=1, kv_heads=1)[0]]
    assert gradcheck(_World.apply, (SequenceLayout(5, 3, kind), options, *tensors), fast_mode=True)


# What is sent


def measured(layout, backward=False, **options):
    """Hops and bytes of every rank."""
    world = LoopbackWorld(layout.world)
    arguments = inputs(layout.seq_len, symmetric="symmetric" in options)
    if backward:
        over_ranks(layout, *arguments, world=world, **options)
    else:
        world.run(
            lambda rank, group: ring_tensor_attention(
                *(layout.shard(x, 2, rank) for x in arguments[0]), layout=layout, group=group, **options
            )
        )
    return world.hops, world.bytes_sent


TOKEN = 2 * (3 + 2) * 8  # bytes of one token's keys and values: two heads, d = 3, dv = 2


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_hops_and_bytes_of_the_serpentine(world):
    for kind in KINDS:
        layout = SequenceLayout(4 * world, world, kind)
        block = 4 * TOKEN
        hops, sent = measured(layout, is_causal=True)
        assert hops == [world**2 - 1] * world
        assert sent == [(world**2 - 1) * block] * world
        # Gradients follow, but for departures from home, where they stay; from elsewhere they go there at the end.
        inner = world * (world - 1) - (world + 1) // 2 + world % 2
        outer = world - 1
        with_gradients = 2 * (world**2 - 1) + (inner + outer if world > 1 else 0)
        hops, sent = measured(layout, backward=True, is_causal=True)
        assert hops == [with_gradients] * world
        assert sent == [with_gradients * block] * world


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_visits_and_hops_of_a_symmetric_tour(world):
    layout = SequenceLayout(world, world, "striped")
    visits = tour.plan_tour(layout, (-1, -1), (-1, -1), True).visits
    assert sorted(tuple(sorted(v)) for v in visits) == list(itertools.combinations_with_replacement(range(world), 2))
    hops, sent = measured(layout, symmetric=True)
    expected = world * (world + 1) // 2 - 1 + (world - 1) // 2
    assert hops == [expected] * world
    assert sent == [expected * TOKEN] * world


def test_bytes_of_ragged_shards():
    layout = SequenceLayout(11, 4, "striped")
    _, sent = measured(layout)
    assert sum(sent) == 15 * 11 * TOKEN


def test_halos_are_what_windows_reach_of_the_neighbours():
    layout = SequenceLayout(20, 4)
    hops, sent = measured(layout, is_causal=True, window1=4, window2=2)
    assert hops == [2] * 4
    assert sent == [(3 + 1) * TOKEN] * 3 + [0]
    hops, sent = measured(layout, window1=(3, 1), window2=1)
    assert hops == [2] * 4
    assert sent == [3 * TOKEN, 4 * TOKEN, 4 * TOKEN, 1 * TOKEN]
    # One set stays with its halo, the other one goes round.
    hops, sent = measured(layout, is_causal=True, window1=6)
    assert hops == [1 + 3] * 4
    assert sum(sent) == (3 * 5 + 3 * 20) * TOKEN


def test_a_long_window_hops_only_as_far_as_it_reaches():
    layout = SequenceLayout(20, 5)
    hops, _ = measured(layout, is_causal=True, window1=8, window2=2)
    assert hops == [2 + 1] * 5  # two shards back, and a halo of one token
    hops, _ = measured(layout, is_causal=True, window1=8, window2=6)
    assert hops == [3 * 3 - 1] * 5


def test_the_next_block_is_posted_before_a_visit_is_computed(monkeypatch):
    layout, hops = SequenceLayout(6, 3, "striped"), {rank: [] for rank in range(3)}
    world = LoopbackWorld(3)

    def traced(q, *rest):
        rank = int(q[0, 0, 0, 0])
        hops[rank].append(world.hops[rank])
        return forward(q, *rest)

    forward = streams.chunked_forward
    monkeypatch.setattr(streams, "chunked_forward", traced)
    x = torch.arange(6.0).remainder(3).view(1, 1, 6, 1)  # each token has its rank
    world.run(lambda rank, group: ring_tensor_attention(*[layout.shard(x, 2, rank)] * 5, layout=layout, group=group))
    assert hops == {rank: [1, 2, 3, 4, 5, 6, 7, 8, 8] for rank in range(3)}


def test_saves_inputs_and_results_alone():
    layout, world = SequenceLayout(12, 3, "striped"), LoopbackWorld(3)
    tensors, *_ = inputs(12)

    def work(rank, group):
        saved = []
        leaves = [layout.shard(x, 2, rank).clone().requires_grad_() for x in tensors]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
            out, lse = ring_tensor_attention(*leaves, layout=layout, group=group, return_lse=True)
        return sum(saved) == sum(x.nbytes for x in (*leaves, out, lse))

    assert world.run(work) == [True] * 3


def test_the_error_in_half_precision_does_not_grow_with_the_ranks():
    tensors, grad, grad_lse = inputs(48, d=8, dv=8, dtype=torch.bfloat16)
    exact = differentiated(
        lambda *x: tensor_attention(*x, return_lse=True),
        *widened(tensors, grad, grad_lse),
    )
    one, many = (over_ranks(SequenceLayout(48, p, "striped"), tensors, grad, grad_lse) for p in (1, 8))
    for name, a, b, reference in zip(("out", "lse", "dq", "dk1", "dk2", "dv1", "dv2"), one, many, exact, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(b, reference) <= 1.02 * relative_error(a, reference) + 1e-7, name


def test_autocast_and_no_gradients():
    layout, world = SequenceLayout(6, 2), LoopbackWorld(2)
    tensors, *_ = inputs(6, dtype=torch.float32)

    def work(rank, group):
        shards = [layout.shard(x, 2, rank) for x in tensors]
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return ring_tensor_attention(*shards, layout=layout, group=group)

    out = layout.unshard(world.run(work), 2)
    assert out.dtype == torch.bfloat16 and not out.requires_grad
    assert_close_rel(out, tensor_attention(*(x.double() for x in tensors)))


def test_differentiable_once_and_not_under_vmap():
    layout = SequenceLayout(4, 1, cu_seqlens=(0, 2, 4))
    tensors = [x.requires_grad_() for x in inputs(4)[0]]
    out = ring_tensor_attention(*tensors, layout=layout)
    (grad,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda *x: ring_tensor_attention(*x, layout=layout))(*(x.detach()[None] for x in tensors))


# Errors


def refused(world, call):
    """What every rank raises."""

    def work(rank, group):
        try:
            call(rank, group)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return world.run(work)


LAYOUT = SequenceLayout(8, 2, "striped")
QK = ("q", "k1", "k2")
WRONG = {
    "length": ("q must have length", lambda x: x | {"q": x["q"][:, :, :3]}),
    "dtype": ("v2 must have the dtype", lambda x: x | {"v2": x["v2"].float()}),
    "ints": ("k1 must have a real", lambda x: x | {"k1": x["k1"].long()}),
    "no tensor": ("k2 must be a tensor", lambda x: x | {"k2": [1.0]}),
    "heads": ("unless enable_gqa", lambda x: x | {"q": x["q"].repeat(1, 2, 1, 1)}),
    "values": ("v2 must have the channels of v1", lambda x: x | {"v2": x["v2"][..., :1]}),
    "window": ("window1 must be at least 1", lambda x: x | {"window1": 0}),
    "form": ("did you mean 'trilinear'", lambda x: x | {"form": "trilinar"}),
    "channels": (
        "multiple of 3",
        lambda x: x | {"form": "determinant", **{k: x[k][..., :2] for k in QK}},
    ),
    "scale": ("scale must be finite", lambda x: x | {"scale": float("nan")}),
    "backend": ("backend must be one of", lambda x: x | {"backend": "dense"}),
    "layout": ("layout must be a SequenceLayout", lambda x: x | {"layout": 8}),
    "no layout": ("layout must be a SequenceLayout", lambda x: x | {"layout": None}),
    "world": ("group must have the layout's 3 ranks", lambda x: x | {"layout": SequenceLayout(12, 3)}),
    "keys": ("unless k2 equals k1", lambda x: x | {"symmetric": True}),
    "values differ": ("unless v2 equals v1", lambda x: x | {"symmetric": True, "k2": x["k1"]}),
    "windows differ": ("where the windows differ", lambda x: x | {"symmetric": True, "k2": x["k1"], "window1": 2}),
    "sign": ("change sign", lambda x: x | {"symmetric": True, "form": "determinant"}),
}


@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=["all", "one"])
@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_an_error_on_every_rank(case, who):
    message, spoil = WRONG[case]
    world, (tensors, *_) = LoopbackWorld(2, timeout=5), inputs(8)

    def call(rank, group, wrong=True):
        arguments = dict(zip(("q", "k1", "k2", "v1", "v2"), (LAYOUT.shard(x, 2, rank) for x in tensors), strict=True))
        arguments |= {"layout": LAYOUT, "group": group}
        return ring_tensor_attention(**spoil(arguments) if wrong and rank in who else arguments)

    errors = refused(world, call)
    assert all(message in error for error in errors), errors
    if who == (1,):
        assert errors[0].startswith("ValueError: rank 1 refused the call")
    assert world.bytes_sent == [0, 0] and world.hops == [0, 0]
    out = LAYOUT.unshard(world.run(lambda rank, group: call(rank, group, wrong=False)), 2)
    torch.testing.assert_close(out, tensor_attention(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "option",
    [{"is_causal": True}, {"scale": 2.0}, {"form": "strassen"}, {"layout": SequenceLayout(8, 2)}, {"batch": 2}],
)
def test_calls_that_differ_are_an_error_on_every_rank(option):
    world, (tensors, *_) = LoopbackWorld(2, timeout=5), inputs(8, batch=2)

    def call(rank, group):
        options = {"layout": LAYOUT} | (option if rank else {})
        batch = options.pop("batch", 1)
        return ring_tensor_attention(*(LAYOUT.shard(x[:batch], 2, rank) for x in tensors), group=group, **options)

    assert all("all ranks of the group must make the same call" in error for error in refused(world, call))
    assert world.bytes_sent == [0, 0]


@pytest.mark.parametrize("check", ["first", "always", "never"])
def test_when_ranks_compare_their_calls(check):
    """Ranks whose calls differ after the first are found by "always" alone."""
    world, (tensors, *_) = LoopbackWorld(2, timeout=5), inputs(8)

    def call(rank, group, scale=1.0):
        shards = (LAYOUT.shard(x, 2, rank) for x in tensors)
        return ring_tensor_attention(*shards, layout=LAYOUT, group=group, scale=scale, check=check)

    out = LAYOUT.unshard(world.run(call), 2)
    torch.testing.assert_close(out, tensor_attention(*tensors, scale=1.0), rtol=1e-12, atol=1e-12)

    def differing(rank, group):
        return call(rank, group, 1.0 + rank)

    if check == "always":
        assert all("all ranks of the group must make the same call" in error for error in refused(world, differing))
    else:
        world.run(differing)
    with pytest.raises(ValueError, match="check must be one of 'first', 'always', 'never', got 'once'"):
        ring_tensor_attention(*tensors, layout=SequenceLayout(8, 1), check="once")


def test_no_group_for_several_ranks_and_a_kernel_on_the_cpu():
    tensors, *_ = inputs(8)
    with pytest.raises(ValueError, match="group or mesh must be given"):
        ring_tensor_attention(*(LAYOUT.shard(x, 2, 0) for x in tensors), layout=LAYOUT)
    with pytest.raises(ValueError, match="backend='triton'"):
        ring_tensor_attention(*tensors, layout=SequenceLayout(8, 1), backend="triton")


# The module


def module(cls=RingTensorAttention, **options):
    torch.manual_seed(5)
    return cls(12, 4, batch_first=True, dtype=torch.float64, **{"num_kv_heads": 2, **options})


MODULES = {
    "plain": {},
    "causal": {"is_causal": True, "window1": 3, "window2": 2},
    "rotary": {"form": "determinant", "rotary": True, "is_causal": True},
    "biased": {"kv2_bias": True, "qk_norm": False, "scale": 0.2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MODULES)
def test_module_is_tensor_attention_on_every_number_of_ranks(case, kind):
    plain, ring = module(TensorAttention, **MODULES[case]), module(**MODULES[case])
    ring.load_state_dict(plain.state_dict())
    assert ring.state_dict().keys() == plain.state_dict().keys()
    x, g = torch.randn(2, 11, 12, dtype=torch.float64), torch.randn(2, 11, 12, dtype=torch.float64)
    expected = plain(x)[0]
    assert torch.equal(ring(x)[0], expected)
    assert torch.equal(ring(x, layout=SequenceLayout(11, 1, kind))[0], expected)
    (expected * g).sum().backward()
    layout = SequenceLayout(11, 3, kind)

    def work(rank, group):
        own = copy.deepcopy(ring)
        out, weights = own(layout.shard(x, 1, rank), layout=layout, group=group)
        (out * layout.shard(g, 1, rank)).sum().backward()
        assert weights is None
        return out.detach(), {name: p.grad for name, p in own.named_parameters()}

    outs, grads = zip(*LoopbackWorld(3, timeout=20).run(work), strict=True)
    torch.testing.assert_close(layout.unshard(outs, 1), expected.detach(), rtol=1e-11, atol=1e-11)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(sum(of_rank[name] for of_rank in grads), p.grad, rtol=1e-10, atol=1e-10)


def test_module_takes_its_layout_from_constructor_call_or_what_is_in_force():
    plain, layout = module(TensorAttention), SequenceLayout(9, 2)
    x = torch.randn(9, 2, 12, dtype=torch.float64)
    plain.batch_first = False
    expected = plain(x)[0]

    world = LoopbackWorld(2, timeout=20)
    # Made here: ranks are threads, which draw from one generator.
    layers = [(module(layout=layout, group=group), module(group=group)) for group in world.groups]

    def work(rank, group):
        shard = layout.shard(x, 0, rank)
        given, grouped = layers[rank]
        shared = RingTensorAttention.from_tensor_attention(plain, layout=layout, group=group)
        assert shared.q_proj is plain.q_proj and type(plain) is TensorAttention
        assert f"group={group.name!r}" in repr(given)
        for layer in (given, shared, grouped):
            layer.batch_first = False
        return [given(shard)[0], shared(shard)[0], grouped(shard)[0], given(shard[:, 0])[0][:, None].expand(-1, 2, -1)]

    with use_layout(layout, group=world.groups[0]), use_layout(layout, group=world.groups[1]):
        results = world.run(work)
    for n, shards in enumerate(zip(*results, strict=True)):
        reference = expected if n < 3 else expected[:, :1].expand(-1, 2, -1)
        torch.testing.assert_close(layout.unshard(shards, 0), reference, rtol=1e-11, atol=1e-11)


def test_module_refuses_what_depends_on_the_ranks():
    for name, value in (("dropout", 0.1), ("approx", "auto"), ("backend", "dense")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            module(**{name: value})
    with pytest.raises(ValueError, match="dropout must be 0"):
        RingTensorAttention.from_tensor_attention(module(TensorAttention, dropout=0.1))
    with pytest.raises(TypeError, match="layer must be a TensorAttention"):
        RingTensorAttention.from_tensor_attention(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="layout must be a SequenceLayout"):
        module(layout=3)
    layout, layer = SequenceLayout(4, 1, cu_seqlens=(0, 2, 4)), module(is_causal=True)
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="key_padding_mask must be None"):
        layer(x, key_padding_mask=torch.zeros(1, 4, dtype=torch.bool), layout=layout)
    with pytest.raises(ValueError, match="cache must be None"):
        layer(x, cache=TensorAttentionCache(), layout=layout)
    world, halves = LoopbackWorld(2, timeout=5), SequenceLayout(4, 2)

    def call(rank, group):
        padding = torch.zeros(1, 2, dtype=torch.bool) if rank else None
        return layer(halves.shard(x, 1, rank), key_padding_mask=padding, layout=halves, group=group)

    assert all("key_padding_mask must be None" in error for error in refused(world, call))
    apart = torch.cat([layer(x[:, :2])[0], layer(x[:, 2:])[0]], 1)
    torch.testing.assert_close(layer(x, layout=layout)[0], apart, rtol=1e-12, atol=1e-12)


# The kernels


@pytest.mark.gpu
@pytest.mark.interpret
def test_kernel_blocks(device):
    """One rank with documents: the ring's calls, with their windows and offsets, through the kernels."""
    layout = SequenceLayout(7, 1, cu_seqlens=(0, 4, 7))
    tensors, grad, grad_lse = inputs(7, heads=2, kv_heads=1, d=4, dtype=torch.float32)
    options = {"layout": layout, "is_causal": True, "window2": 2, "enable_gqa": True, "return_lse": True}
    exact = differentiated(lambda *x: ring_tensor_attention(*x, **options), *widened(tensors, grad, grad_lse))
    on_device = [[x.to(device) for x in tensors], grad.to(device), grad_lse.to(device)]
    got = differentiated(lambda *x: ring_tensor_attention(*x, **options, backend="triton"), *on_device)
    for a, b in zip(got, exact, strict=True):
        assert_close_rel(a, b, rtol=1e-5)


@pytest.mark.gpu
def test_ranks_on_one_gpu():
    layout = SequenceLayout(301, 4, "striped")
    tensors, grad, grad_lse = (
        [x.cuda() for x in part] if isinstance(part, list) else part.cuda()
        for part in inputs(301, heads=4, d=32, dv=32, dtype=torch.float32)
    )
    options = {"is_causal": True, "enable_gqa": True, "backend": "triton"}
    got = over_ranks(layout, tensors, grad, grad_lse, **options)
    options["backend"] = "torch"
    exact = differentiated(
        lambda *x: tensor_attention(*x, return_lse=True, **options),
        *widened(tensors, grad, grad_lse),
    )  # fmt: skip
    for a, b in zip(got, exact, strict=True):
        assert_close_rel(a, b, rtol=1e-5)


# Over gloo


def _process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    torch.manual_seed(0)
    layout, mesh = SequenceLayout(9, 2, "striped"), DeviceMesh("cpu", [0, 1], mesh_dim_names=("sp",))
    tensors, grad, grad_lse = inputs(9)
    options = {"is_causal": True, "window2": 6}
    expected = differentiated(lambda *x: tensor_attention(*x, return_lse=True, **options), tensors, grad, grad_lse)
    shards = [layout.shard(x, 2, rank) for x in (*tensors, grad, grad_lse)]
    shards = shards[:5], *shards[5:]

    def attend(*x):
        return ring_tensor_attention(*x, layout=layout, mesh=mesh, return_lse=True, **options)

    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        assert_all_close(differentiated(run, *shards), [layout.shard(x, 2, rank) for x in expected])

    layer, plain = module(layout=layout, group=dist.group.WORLD), module(TensorAttention)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (layer, compiled, copy.deepcopy(layer)):
        torch.testing.assert_close(
            run(layout.shard(x, 1, rank))[0], layout.shard(plain(x)[0], 1, rank), rtol=1e-11, atol=1e-11
        )
    leave_group()


@pytest.mark.distributed
def test_over_gloo_and_compiled(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
