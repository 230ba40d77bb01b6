"""RingMultiheadAttention and sequence_parallel against nn.MultiheadAttention on the whole sequence."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchlayers
from torchlayers._placement import use_layout
from torchlayers.ring_attention import (
    LoopbackWorld,
    RingAttentionConfig,
    RingMultiheadAttention,
    SequenceLayout,
    sequence_parallel,
)
from torchlayers.tensor_attention import RingTensorAttention, TensorTransformerBlock

LENGTH = 11
HEADS = {"embed_dim": 12, "num_heads": 4}


@pytest.fixture(autouse=True)
def _nothing_in_force():
    with use_layout(None):
        yield


def peer(**options):
    mha = nn.MultiheadAttention(**HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mha.parameters():
            if parameter.ndim == 1:  # biases start at zero
                parameter.normal_()
    return mha


def causal(n=LENGTH):
    return nn.Transformer.generate_square_subsequent_mask(n, dtype=torch.float64)


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters()}


def assert_gradients_sum_to(replicas, whole, rtol=1e-11):
    for name, expected in gradients(whole).items():
        got = sum(gradients(replica)[name] for replica in replicas)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def over_ranks(layout, x, make, call, dim=1):
    """Outputs on the whole sequence, and the ranks' modules: each rank has a copy and its shard of ``x``."""
    world = LoopbackWorld(layout.world)

    def run(rank, group):
        module = make(group)
        out = call(module, layout.shard(x, dim, rank), group)
        out.square().sum().backward()
        return out.detach(), module

    outs, modules = zip(*world.run(run), strict=True)
    return layout.unshard(outs, dim), modules


# One rank


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"vdim": 3, "bias": False}])
def test_one_rank_is_the_peer(options, batch_first):
    mha = peer(batch_first=batch_first, **options)
    ring = RingMultiheadAttention(**HEADS, batch_first=batch_first, dtype=torch.float64, **options)
    assert list(ring.state_dict()) == list(mha.state_dict())
    ring.load_state_dict(mha.state_dict())
    shape = (3, LENGTH) if batch_first else (LENGTH, 3)
    query = torch.randn(*shape, 12, dtype=torch.float64)
    key, value = (torch.randn(*shape, options.get(n, 12), dtype=torch.float64) for n in ("kdim", "vdim"))
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4], [1]])
    calls = [
        {},
        {"key_padding_mask": padding},
        {"is_causal": True, "attn_mask": causal()},
        {
            "is_causal": True,
            "attn_mask": causal(),
            "key_padding_mask": padding.double().masked_fill(padding, -torch.inf),
        },
    ]
    for call in calls:
        mha.zero_grad()
        ring.zero_grad()
        expected, _ = mha(query, key, value, need_weights=False, **call)
        got, weights = ring(query, key, value, **call)
        assert weights is None
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        expected.square().sum().backward()
        got.square().sum().backward()
        assert_gradients_sum_to([ring], mha)
    torch.testing.assert_close(ring(query[:, 0], key[:, 0], value[:, 0])[0].shape, query[:, 0].shape)


def test_self_attention_needs_the_query_alone():
    mha, x = peer(), torch.randn(LENGTH, 2, 12, dtype=torch.float64)
    ring = RingMultiheadAttention.from_multihead_attention(mha)
    assert all(a is b for a, b in zip(ring.parameters(), mha.parameters(), strict=True))
    torch.testing.assert_close(ring(x)[0], mha(x, x, x)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("window", [3, (2, 0), (4, -1)])
def test_windows_on_one_rank(window):
    mha, x = peer(), torch.randn(LENGTH, 2, 12, dtype=torch.float64)
    is_causal = window == 3
    ring = RingMultiheadAttention.from_multihead_attention(mha, window_size=window, is_causal=is_causal)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    left, right = (2, 0) if is_causal else (window[0], LENGTH if window[1] < 0 else window[1])
    hidden = (j < i - left) | (j > i + right)
    torch.testing.assert_close(ring(x)[0], mha(x, x, x, attn_mask=hidden)[0], rtol=1e-12, atol=1e-13)


# Ranks


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "is_causal"), [("contiguous", False), ("zigzag", True), ("striped", True)])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_the_peer(world, kind, is_causal, batch_first):
    mha = peer(batch_first=batch_first)
    dim = 1 if batch_first else 0
    x = torch.randn((2, LENGTH, 12) if batch_first else (LENGTH, 2, 12), dtype=torch.float64)
    layout = SequenceLayout(LENGTH, world, kind)

    def make(group):
        return RingMultiheadAttention.from_multihead_attention(copy.deepcopy(mha), layout=layout, group=group)

    out, rings = over_ranks(layout, x, make, lambda ring, x, _: ring(x, is_causal=is_causal)[0], dim)
    expected, _ = mha(x, x, x, attn_mask=causal() if is_causal else None, is_causal=is_causal, need_weights=False)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert_gradients_sum_to(rings, mha)


def test_layout_and_group_come_with_the_call_or_are_in_force():
    mha = peer(batch_first=True)
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    expected, _ = mha(x, x, x, attn_mask=causal(), is_causal=True)
    layout = SequenceLayout(LENGTH, 2, "zigzag")

    def with_the_call(ring, x, group):
        return ring(x, layout=layout, group=group)[0]

    def in_force(ring, x, group):
        ring.group = group.name
        use_layout(layout, group=group)
        return ring(x)[0]

    def make(group):
        return RingMultiheadAttention.from_multihead_attention(copy.deepcopy(mha), is_causal=True)

    for call in (with_the_call, in_force):
        out, _ = over_ranks(layout, x, make, call)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_cross_attention_has_a_layout_of_its_own():
    mha = peer(kdim=5, vdim=7, batch_first=True)
    query = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    key, value = torch.randn(2, 17, 5, dtype=torch.float64), torch.randn(2, 17, 7, dtype=torch.float64)
    layout, kv_layout = SequenceLayout(LENGTH, 3, "striped"), SequenceLayout(17, 3)

    def make(group):
        return RingMultiheadAttention.from_multihead_attention(copy.deepcopy(mha), layout=layout, group=group)

    def call(ring, x, group):
        return ring(x, *(kv_layout.shard(y, 1, group.rank) for y in (key, value)), kv_layout=kv_layout)[0]

    out, rings = over_ranks(layout, query, make, call)
    expected, _ = mha(query, key, value)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert_gradients_sum_to(rings, mha)


def test_windows_and_documents_over_ranks():
    mha = peer(batch_first=True)
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    layout = SequenceLayout(LENGTH, 3, cu_seqlens=(0, 4, 11))
    options = {"is_causal": True, "window_size": 3}

    def make(group):
        return RingMultiheadAttention.from_multihead_attention(
            copy.deepcopy(mha), layout=layout, group=group, **options
        )

    out, rings = over_ranks(layout, x, make, lambda ring, x, _: ring(x)[0])
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    hidden = (j > i) | (j < i - 2) | ((i >= 4) != (j >= 4))
    expected, _ = mha(x, x, x, attn_mask=hidden)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert_gradients_sum_to(rings, mha)


def test_dropout_by_seed_does_not_depend_on_the_number_of_ranks():
    mha = peer(batch_first=True, dropout=0.4)
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    outs = []
    for world in (1, 2, 3):
        layout = SequenceLayout(LENGTH, world, "striped")

        def make(group, layout=layout):
            return RingMultiheadAttention.from_multihead_attention(copy.deepcopy(mha), layout=layout, group=group)

        outs.append(over_ranks(layout, x, make, lambda ring, x, _: ring(x, dropout_seed=5)[0])[0])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outs[2], outs[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outs[0], mha.eval()(x, x, x)[0])


def test_one_ranks_mistake_is_every_ranks_error():
    layout = SequenceLayout(LENGTH, 2)
    found = []

    def attend(rank, group):
        ring = RingMultiheadAttention(**HEADS, batch_first=True, layout=layout, group=group)
        x = layout.shard(torch.zeros(1, LENGTH, 13 if rank else 12), 1, rank)
        try:
            ring(x)
        except ValueError as error:
            found.append(str(error))

    LoopbackWorld(2, timeout=5).run(attend)
    assert len(found) == 2 and all("channels = 12" in message for message in found)


def test_what_is_no_layout_on_one_rank_is_every_ranks_error():
    layout = SequenceLayout(LENGTH, 2)
    found = []

    def attend(rank, group):
        ring = RingMultiheadAttention(**HEADS, batch_first=True, group=group)
        try:
            ring(layout.shard(torch.zeros(1, LENGTH, 12), 1, rank), layout="zigzag" if rank else layout)
        except (TypeError, ValueError) as error:
            found.append(str(error))

    LoopbackWorld(2, timeout=5).run(attend)
    assert len(found) == 2 and all("layout must be a SequenceLayout, got str" in message for message in found)


def test_copies_and_pickles_keep_the_group_by_name():
    world = LoopbackWorld(2)
    layout = SequenceLayout(8, 2)
    ring = RingMultiheadAttention(**HEADS, layout=layout, group=world.groups[1])
    for other in (copy.deepcopy(ring), pickle.loads(pickle.dumps(ring))):
        assert other.group == world.groups[1].name and other.layout == layout
        assert str(other) == str(ring) and "SequenceLayout(8, world=2" in str(ring)


def test_bad_arguments():
    layout, world = SequenceLayout(8, 2), LoopbackWorld(3)
    for name, options in {
        "num_heads": {"num_heads": 5},
        "embed_dim": {"embed_dim": 0},
        "kdim": {"kdim": 0},
        "add_bias_kv": {"add_bias_kv": True},
        "add_zero_attn": {"add_zero_attn": True},
        "dropout": {"dropout": 1.0},
        "layout": {"layout": "zigzag"},
        "kv_layout": {"kv_layout": 8},
        "group": {"layout": layout, "group": world.groups[0]},
        "window_size": {"window_size": 0},
        "schedule": {"schedule": "rings"},
        "backend": {"backend": "cuda"},
    }.items():
        with pytest.raises((TypeError, ValueError), match=name):
            RingMultiheadAttention(**{**HEADS, **options})
    x = torch.randn(2, 4, 12)
    for name, call in {
        "need_weights": {"need_weights": True},
        "attn_mask": {"attn_mask": torch.zeros(2, 2)},
        "key_padding_mask": {"key_padding_mask": torch.full((4, 2), 0.5)},
        "layout": {"layout": 8},
        "group or mesh": {"layout": layout},
    }.items():
        with pytest.raises((TypeError, ValueError), match=name):
            RingMultiheadAttention(**HEADS)(x, **call)
    with pytest.raises(ValueError, match="window_size must be a pair"):
        RingMultiheadAttention(**HEADS, window_size=2)(x)
    with pytest.raises(TypeError, match="mha"):
        RingMultiheadAttention.from_multihead_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="add_bias_kv"):
        RingMultiheadAttention.from_multihead_attention(nn.MultiheadAttention(**HEADS, add_bias_kv=True))


def test_padding_is_refused_over_ranks():
    world, layout = LoopbackWorld(2), SequenceLayout(8, 2)

    def attend(rank, group):
        ring = RingMultiheadAttention(**HEADS, layout=layout, group=group)
        with pytest.raises(ValueError, match="key_padding_mask must be None where sequences are cut"):
            ring(torch.randn(4, 2, 12), key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))

    world.run(attend)


# A user's model


class Model(nn.Module):
    """Two encoder layers, one of them shared, after an embedding of tokens and positions."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        options = {"batch_first": True, "dtype": dtype, "dropout": 0.0}
        self.embedding = nn.Embedding(50, 12, dtype=dtype)
        self.position = nn.Embedding(LENGTH, 12, dtype=dtype)
        self.first = nn.TransformerEncoderLayer(12, 4, 16, **options)
        self.again = self.first
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 16, **options), 2, enable_nested_tensor=False
        )

    def forward(self, ids, position_ids):
        x = self.embedding(ids) + self.position(position_ids)
        x = self.again(self.first(x, is_causal=True, src_mask=causal(x.shape[1]).to(x)))
        return self.encoder(x, mask=causal(x.shape[1]).to(x), is_causal=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_a_converted_model_equals_itself_on_one_process(world, training):
    """Also in eval mode, where nn.TransformerEncoderLayer has a path of its own that sees a rank's tokens alone."""
    torch.manual_seed(1)
    model = Model().train(training)
    ids = torch.randint(50, (2, LENGTH))
    layout = SequenceLayout(LENGTH, world, "zigzag")
    # The second pass through the shared layer is not causal.
    expected = model(ids, torch.arange(LENGTH).expand(2, LENGTH))

    def make(group):
        return sequence_parallel(copy.deepcopy(model), group=group, layout=layout)

    with torch.set_grad_enabled(training):
        ranks = LoopbackWorld(world)

        def run(rank, group):
            with torch.set_grad_enabled(training):  # a thread starts with gradients
                replica = make(group)
                positions = layout.positions(rank).expand(2, -1)
                out = replica(layout.shard(ids, 1, rank), positions)
                if training:
                    out.square().sum().backward()
                return out.detach(), replica

        outs, replicas = zip(*ranks.run(run), strict=True)
    torch.testing.assert_close(layout.unshard(outs, 1), expected.detach(), rtol=1e-11, atol=1e-11)
    for replica in replicas:
        assert list(replica.state_dict()) == list(model.state_dict())
        assert replica.first is replica.again and replica.training == training
    if training:
        expected.square().sum().backward()
        assert_gradients_sum_to(replicas, model, rtol=1e-10)
    model.load_state_dict(replicas[-1].state_dict())  # a checkpoint is the same with and without


def test_the_report_names_what_was_converted():
    model = Model()
    before = [id(p) for p in model.parameters()]
    report = torchlayers.convert(model, RingAttentionConfig(), filter_fn=lambda module, name: "layers.1" not in name)
    assert [row.name for row in report.converted] == ["first.self_attn", "encoder.layers.0.self_attn"]
    assert report.converted[0].also == ("again.self_attn",)
    assert type(model.encoder.layers[1].self_attn) is nn.MultiheadAttention
    assert [id(p) for p in model.parameters()] == before


def test_models_of_which_a_part_would_stay_behind():
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(ValueError, match="derived from MultiheadAttention"):
        sequence_parallel(nn.ModuleDict({"a": Own(8, 2), "b": nn.MultiheadAttention(8, 2)}))
    with pytest.raises(ValueError, match=r"must have nn\.MultiheadAttention"):
        sequence_parallel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"converting a .*add_zero_attn"):
        sequence_parallel(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, add_zero_attn=True)}))
    with pytest.raises(TypeError, match="windows"):
        sequence_parallel(nn.MultiheadAttention(8, 2), windows=3)
    alone = sequence_parallel(nn.MultiheadAttention(8, 2), is_causal=True)
    assert isinstance(alone, RingMultiheadAttention) and alone.is_causal
    assert sequence_parallel(alone) is alone


@pytest.mark.parametrize("world", [1, 3])
def test_tensor_attention_is_converted_too(world):
    torch.manual_seed(1)
    block = TensorTransformerBlock(12, 2, 16, 0.0, batch_first=True, window2=3, dtype=torch.float64)
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    layout = SequenceLayout(LENGTH, world, "striped")

    def make(group):
        return sequence_parallel(copy.deepcopy(block), group=group, layout=layout, is_causal=True)

    out, blocks = over_ranks(layout, x, make, lambda block, x, _: block(x))
    assert type(blocks[0].self_attn) is RingTensorAttention
    assert sequence_parallel(blocks[0]) is blocks[0]
    assert list(blocks[0].state_dict()) == list(block.state_dict())
    expected = block(x, is_causal=True)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert_gradients_sum_to(blocks, block, rtol=1e-10)
    with pytest.raises(ValueError, match="window_size must be None for tensor attention"):
        sequence_parallel(TensorTransformerBlock(12, 2), window_size=(2, 0))


def test_a_group_without_a_layout_is_refused_and_plain_attention_asked_for():
    world = LoopbackWorld(2)
    rings = [sequence_parallel(nn.MultiheadAttention(8, 2), group=group) for group in world.groups]
    with use_layout(None):
        rings[0](torch.randn(3, 1, 8))
    torchlayers._placement._last = None  # nothing was said

    def refused(rank, group):
        with pytest.raises(ValueError, match="layout must be given, or be in force"):
            rings[rank](torch.zeros(3, 1, 8))

    world.run(refused)
