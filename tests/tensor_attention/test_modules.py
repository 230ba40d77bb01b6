"""The layers against torch's own attention, over single keys and over materialised pairs."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlayers.tensor_attention import (
    TensorAttention,
    TensorAttentionCache,
    TensorTransformerBlock,
    tensor_attention_logit_limit,
)
from torchlayers.tensor_attention.modules import normalized, rotated
from torchlayers.testing import assert_close_rel, relative_error

DOUBLE = torch.float64


def double(shape, *more):
    return torch.randn(shape, *more, dtype=DOUBLE)


def randomized(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer


def on_pairs(layer, query, key=None, value=None, *, ignore=None, causal=False, start=0):
    """``layer`` (batch first) by scaled_dot_product_attention over all pairs of keys: an oracle."""
    key = query if key is None else key
    value = key if value is None else value
    d, group = layer.head_dim, layer.num_heads // layer.num_kv_heads

    def heads(projection, x, gain=None, shift=0.0):
        x = F.linear(x, projection.weight, projection.bias)
        x = x.reshape(*x.shape[:2], -1, d)
        if gain is not None:
            cap = layer.max_gain
            gain = gain if cap is None else cap * torch.tanh(gain / cap)
            x = x / ((x.abs() ** 3).mean(-1, keepdim=True) + 1e-9) ** (1 / 3) * gain[:, None]
        x = (x + shift).transpose(1, 2)
        return x if x.shape[1] == layer.num_heads else x.repeat_interleave(group, 1)

    both = (1 / d, 1.0) if layer.kv2_bias else (0.0, 0.0)
    q = heads(layer.q_proj, query, layer.q_gain)
    k1, k2 = heads(layer.k1_proj, key, layer.k1_gain), heads(layer.k2_proj, key, layer.k2_gain, both[0])
    v1, v2 = heads(layer.v1_proj, value), heads(layer.v2_proj, value, shift=both[1])
    i, j = torch.arange(query.shape[1])[:, None] + start, torch.arange(key.shape[1])
    masks = []
    for window in (layer.window1, layer.window2):
        ok = torch.ones(len(i), len(j), dtype=torch.bool)
        if causal:
            ok &= j <= i
        if isinstance(window, int):
            ok &= (i - j).abs() < window
        elif window is not None:
            ok &= (j >= i - window[0]) & ((j <= i + window[1]) | (window[1] < 0))
        ok = ok[None].expand(len(query), -1, -1)
        masks.append(ok if ignore is None else ok & ~ignore[:, None])
    mask = (masks[0][:, :, :, None] & masks[1][:, :, None]).flatten(2)[:, None]
    keys = (k1[:, :, :, None] * k2[:, :, None]).flatten(2, 3)
    values = (v1[:, :, :, None] * v2[:, :, None]).flatten(2, 3)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=layer.scale)
    return F.linear(out.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)


# ---- the layer computes what it says


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "window1": 4, "window2": (1, 2)},
        {"kv2_bias": True, "scale": 0.7, "gain": 1.1, "bias": False},
        {"qk_norm": False, "head_dim": 5, "window1": (3, -1)},
        {"max_gain": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_against_sdpa_on_pairs(options, causal):
    layer = randomized(TensorAttention(12, 4, batch_first=True, dtype=DOUBLE, is_causal=causal, **options))
    x = double(2, 9, 12).requires_grad_()
    ignore = torch.zeros(2, 9, dtype=torch.bool)
    ignore[1, 6:] = True
    got = layer(x, key_padding_mask=ignore)
    want = on_pairs(layer, x, ignore=ignore, causal=causal)
    assert got[1] is None
    assert_close_rel(got[0], want)
    leaves = [x, *layer.parameters()]
    cotangent = torch.randn_like(want)
    grads = torch.autograd.grad(got[0], leaves, cotangent)
    for grad, oracle in zip(grads, torch.autograd.grad(want, leaves, cotangent), strict=True):
        assert_close_rel(grad, oracle, rtol=1e-11)


def test_cross_attention_with_other_widths():
    layer = randomized(TensorAttention(8, 2, kdim=5, vdim=7, batch_first=True, dtype=DOUBLE))
    query, key, value = double(3, 4, 8), double(3, 6, 5), double(3, 6, 7)
    assert_close_rel(layer(query, key, value)[0], on_pairs(layer, query, key, value))


def test_layouts_are_those_of_multihead_attention():
    layer = TensorAttention(8, 2, dtype=DOUBLE)
    first = copy.deepcopy(layer)
    first.batch_first = True
    x, ignore = double(5, 3, 8), torch.zeros(3, 5, dtype=torch.bool)
    ignore[0, 2] = True
    want = first(x.transpose(0, 1), key_padding_mask=ignore)[0].transpose(0, 1)
    assert_close_rel(layer(x, key_padding_mask=ignore)[0], want)
    alone = layer(x[:, 0], key_padding_mask=ignore[0])[0]
    assert alone.shape == (5, 8)
    assert_close_rel(alone, want[:, 0])


def test_a_call_can_ask_for_causality():
    layer = TensorAttention(8, 2, batch_first=True, window1=3, dtype=DOUBLE)
    x = double(2, 7, 8)
    want = on_pairs(layer, x, causal=True)
    assert_close_rel(layer(x, is_causal=True)[0], want)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)  # a hint, as in nn.MultiheadAttention
    assert_close_rel(layer(x, attn_mask=mask, is_causal=True)[0], want)


def test_padding_is_ignored_where_true_and_rows_with_nothing_left_are_zero():
    layer = TensorAttention(8, 2, batch_first=True, dtype=DOUBLE)
    x, ignore = double(2, 6, 8).requires_grad_(), torch.zeros(2, 6, dtype=torch.bool)
    ignore[0, 4:] = True
    ignore[1] = True
    out = layer(x, key_padding_mask=ignore)[0]
    assert_close_rel(out[0, :4], layer(x[:1, :4])[0][0])
    torch.testing.assert_close(out[1], layer.out_proj.bias.expand(6, 8), rtol=0, atol=0)
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_a_floating_padding_mask_holds_zeros_and_minus_infinities():
    layer = TensorAttention(8, 2, batch_first=True, dtype=DOUBLE)
    x, ignore = double(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    ignore[0, 4:] = True
    floating = torch.zeros(2, 6).masked_fill(ignore, float("-inf"))
    torch.testing.assert_close(
        layer(x, key_padding_mask=floating)[0], layer(x, key_padding_mask=ignore)[0], rtol=0, atol=0
    )
    block = TensorTransformerBlock(8, 2, batch_first=True, dtype=DOUBLE).eval()
    encoder = nn.TransformerEncoder(block, 1, enable_nested_tensor=False).eval()
    for number in (1.0, -1e9, math.nan):
        other = floating.masked_fill(ignore, number)
        for call in (
            partial(layer, key_padding_mask=other),
            partial(block, src_key_padding_mask=other),
            partial(encoder, src_key_padding_mask=other),
        ):
            with pytest.raises(ValueError, match=r"key_padding_mask must be bool.* or floating with 0 and -inf alone"):
                call(x)


def test_dropout_only_in_training_and_unbiased():
    layer = TensorAttention(6, 1, dropout=0.5, batch_first=True, dtype=DOUBLE)
    x = double(1, 5, 6)
    clean = on_pairs(layer, x)
    assert_close_rel(layer.eval()(x)[0], clean)
    layer.train()
    runs = torch.stack([layer(x)[0] for _ in range(150)]).detach()
    assert relative_error(runs[0], clean) > 0.01
    error = (runs.mean(0) - clean).norm() / (runs.std(0).norm() / math.sqrt(len(runs)))
    assert error < 2.0


# ---- normalisation and rotation


def test_the_gain_is_the_cubic_mean():
    x, gain = double(2, 3, 4, 7), torch.tensor([0.5, 1.0, 2.0, -3.0], dtype=DOUBLE)
    cubic = (normalized(x, gain).abs() ** 3).mean(-1) ** (1 / 3)
    torch.testing.assert_close(cubic, gain.abs().expand(2, 3, 4), rtol=1e-7, atol=0)
    assert normalized(torch.full((1, 1, 2), 3e3, dtype=torch.float16), torch.ones(1)).isfinite().all()


@pytest.mark.parametrize("kv2_bias", [False, True])
def test_no_logit_exceeds_the_bound(kv2_bias):
    layer = TensorAttention(8, 1, batch_first=True, max_gain=0.8, kv2_bias=kv2_bias, dtype=DOUBLE)
    with torch.no_grad():
        for gain in (layer.q_gain, layer.k1_gain, layer.k2_gain):
            gain.fill_(50.0)  # as far as training can go
    spike = torch.zeros(1, 1, 1, 8, dtype=DOUBLE)
    spike[..., 3] = 1e3  # all in one channel: Hölder's inequality is an equality here
    for x in (spike, double(1, 1, 1, 8), torch.ones(1, 1, 1, 8, dtype=DOUBLE)):
        q, k1 = (layer._heads(x.flatten(-2), g, 0) for g in (layer.q_gain, layer.k1_gain))
        k2 = layer._heads(x.flatten(-2), layer.k2_gain, 0, 1 / 8 if kv2_bias else 0.0)
        assert (layer.scale * (q * k1 * k2).sum()).abs() <= layer.logit_bound * (1 + 1e-12)
    # Met by equal entries, by which k2's shift adds in full.
    assert layer.scale * (q * k1 * k2).sum().item() == pytest.approx(layer.logit_bound, rel=1e-6)


def test_rotary_logits_depend_on_relative_positions_alone():
    q, k1, k2 = (double(1, 1, 2, 9) for _ in range(3))

    def logit(i, j, k):
        a, b, c = (rotated(x, p, 100.0).unflatten(-1, (-1, 3)) for x, p in zip((q, k1, k2), (i, j, k), strict=True))
        return torch.linalg.det(torch.stack([a, b, c], -1)).sum(-1)

    want = logit(3, 1, 2)
    assert_close_rel(logit(1003, 1001, 1002), want, rtol=1e-11)
    assert relative_error(logit(3, 1, 4), want) > 1e-2
    assert relative_error(logit(4, 1, 2), want) > 1e-2
    # Lengths are kept, and chunk t of 3 turns by 100^(-t / 3) radian a token.
    angle = torch.tensor([100.0 ** (-t / 3) for t in range(3)], dtype=DOUBLE)
    unit = torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE).repeat(3).expand(1, 1, 1, 9)
    assert_close_rel(rotated(unit, 7, 100.0).view(3, 3)[:, 0], (7 * angle).cos())


def test_rotary_layer_is_invariant_under_shifts():
    layer = TensorAttention(12, 2, form="determinant", rotary=True, window1=3, window2=4, is_causal=True,
                            batch_first=True, dtype=DOUBLE)  # fmt: skip
    x = double(1, 8, 12)
    want = layer(x)[0]
    prefix = double(1, 5, 12)  # tokens that the windows of the last queries don't reach
    moved = layer(torch.cat([prefix, x], 1))[0][:, 5:]
    assert_close_rel(moved[:, 3:], want[:, 3:], rtol=1e-11)
    assert relative_error(moved[:, :3], want[:, :3]) > 1e-3


# ---- from nn.MultiheadAttention


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {}),
        ({"batch_first": True, "bias": False}, {"window2": 3}),
        ({"kdim": 5, "vdim": 7, "batch_first": True}, {"window2": (0, 1)}),
    ],
    ids=str,
)
def test_from_multihead_attention(arguments, options):
    mha = randomized(nn.MultiheadAttention(12, 3, dtype=DOUBLE, **arguments))
    layer = TensorAttention.from_multihead_attention(mha, **options)
    inputs = (double(4, 4, 12), double(4, 4, mha.kdim), double(4, 4, mha.vdim))
    ignore = torch.zeros(4, 4, dtype=torch.bool)
    ignore[2, 3] = True
    want = mha(*inputs, key_padding_mask=ignore, need_weights=False)[0]
    if options:  # else the window of set 2 may see masked tokens alone
        ignore[:] = False
        want = mha(*inputs, need_weights=False)[0]
    assert_close_rel(layer(*inputs, key_padding_mask=ignore)[0], want)
    layer(*inputs)[0].sum().backward()
    assert layer.k2_proj.weight.grad.abs().max() > 0  # it can learn to look at pairs


def test_from_multihead_attention_causal_and_trained():
    mha = nn.MultiheadAttention(12, 3, dropout=0.3, dtype=DOUBLE, batch_first=True).eval()
    layer = TensorAttention.from_multihead_attention(mha, is_causal=True)
    assert layer.dropout == 0.3
    assert not layer.training
    x = double(2, 6, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=DOUBLE)
    assert_close_rel(layer(x)[0], mha(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_it_takes_the_place_of_self_attn(training, norm_first):
    peer = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True, norm_first=norm_first, dtype=DOUBLE)
    ours = copy.deepcopy(peer)
    ours.self_attn = TensorAttention.from_multihead_attention(peer.self_attn)
    peer.train(training), ours.train(training)
    x, ignore = double(2, 5, 12).requires_grad_(), torch.zeros(2, 5, dtype=torch.bool)
    ignore[0, 3:] = True
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for options in ({}, {"src_key_padding_mask": ignore}, {"src_mask": mask, "is_causal": True}):
        assert_close_rel(ours(x, **options), peer(x, **options))


def test_from_multihead_attention_refuses_what_it_cannot_keep():
    with pytest.raises(TypeError, match=r"mha must be a torch\.nn\.MultiheadAttention"):
        TensorAttention.from_multihead_attention(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"options must be one of .*'window1'"):
        TensorAttention.from_multihead_attention(nn.MultiheadAttention(4, 2), form="strassen")
    for name in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match=f"{name} must be False"):
            TensorAttention.from_multihead_attention(nn.MultiheadAttention(4, 2, **{name: True}))


# ---- the near-linear path


def test_the_capped_gain_certifies_the_tolerance():
    options = {"head_dim": 4, "batch_first": True, "dtype": DOUBLE}
    layer = randomized(TensorAttention(8, 2, approx="polynomial", tolerance=1e-3, **options))
    exact = TensorAttention(8, 2, scale=layer.scale, max_gain=layer.max_gain, **options)
    exact.load_state_dict(layer.state_dict())
    assert (layer.path, exact.path) == ("polynomial", "exact")
    assert layer.scale == 1 / 4
    assert 0.9e-3 < layer.error_bound <= 1e-3
    assert layer.logit_bound <= tensor_attention_logit_limit(1e-3, 4)
    for m in (layer, exact):  # the heads' outputs, values of at most 1
        m.out_proj = nn.Identity()
        for projection in (m.v1_proj, m.v2_proj):
            nn.init.zeros_(projection.bias)
    x = 10 * double(2, 30, 8)
    biggest = layer.v1_proj(x).abs().max() * layer.v2_proj(x).abs().max()
    error = (layer(x)[0] - exact(x)[0]).abs().max() / biggest
    assert 0 < error <= layer.error_bound


def test_auto_decides_at_construction():
    def path(**options):
        return TensorAttention(16, 2, approx="auto", **options).path

    assert path() == "polynomial"
    assert path(max_gain=0.5) == "polynomial"
    assert path(max_gain=1.0) == "exact"
    assert path(max_gain=1.0, tolerance=0.05) == "polynomial"
    assert path(dropout=0.1) == "exact"
    assert path(head_dim=32) == "exact"  # 58 905 features
    assert path(form="strassen") == "exact"
    assert TensorAttention(16, 2, approx="polynomial", max_gain=1.5).error_bound > 1e-3


def test_auto_compiles_in_either_path():
    for max_gain in (None, 1.5):
        layer = TensorAttention(8, 2, approx="auto", max_gain=max_gain, is_causal=True, batch_first=True)
        x = torch.randn(2, 6, 8)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0]
        assert_close_rel(got, layer(x)[0])


# ---- decoding


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window1": 4, "window2": 2, "num_kv_heads": 1},
        {"window1": 1, "window2": (3, 0)},
        {"form": "determinant", "rotary": True, "head_dim": 6, "window1": 5},
        {"approx": "polynomial"},
        {"approx": "polynomial", "window1": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 1, 1, 3), (9,)])
def test_decoding_with_a_cache_is_one_call(options, cuts):
    layer = randomized(TensorAttention(8, 2, batch_first=True, is_causal=True, dtype=DOUBLE, **options))
    x = double(2, 9, 8)
    cache = TensorAttentionCache()
    with torch.no_grad():
        got = torch.cat([layer(part, cache=cache)[0] for part in x.split(cuts, 1)], 1)
        assert_close_rel(got, layer(x)[0], rtol=1e-11)
    assert cache.position == 9


def test_a_cache_keeps_padding_and_drops_what_windows_passed():
    layer = TensorAttention(8, 2, batch_first=True, is_causal=True, window1=4, window2=3, dtype=DOUBLE)
    x, ignore = double(2, 9, 8), torch.zeros(2, 9, dtype=torch.bool)
    ignore[1, :3] = True  # padding on the left
    cache = TensorAttentionCache()
    with torch.no_grad():
        want = layer(x, key_padding_mask=ignore)[0]
        parts = [layer(x[:, :5], key_padding_mask=ignore[:, :5], cache=cache)[0]]
        parts += [layer(x[:, t : t + 1], cache=cache)[0] for t in range(5, 9)]
    assert_close_rel(torch.cat(parts, 1), want)
    assert [s[0].shape[2] for s in cache._sets] == [3, 2]


def test_a_cache_needs_causal_self_attention():
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="cache must be None unless attention is causal"):
        TensorAttention(8, 2, batch_first=True)(x, cache=TensorAttentionCache())
    with pytest.raises(ValueError, match="cache must be None unless key has query's length 3"):
        TensorAttention(8, 2, batch_first=True, is_causal=True)(x, x[:, :2], cache=TensorAttentionCache())


# ---- the block


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_block_is_an_encoder_layer_around_the_attention(norm_first, bias):
    options = {"dim_feedforward": 20, "dropout": 0.0, "activation": "gelu", "norm_first": norm_first, "bias": bias}
    block = randomized(TensorTransformerBlock(12, 2, batch_first=True, window1=3, dtype=DOUBLE, **options))
    peer = nn.TransformerEncoderLayer(12, 2, batch_first=True, dtype=DOUBLE, **options)
    peer.self_attn = block.self_attn
    missing = peer.load_state_dict(block.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    x, ignore = double(2, 5, 12), torch.zeros(2, 5, dtype=torch.bool)
    ignore[0, 4] = True
    assert_close_rel(block(x, src_key_padding_mask=ignore), peer(x, src_key_padding_mask=ignore))
    assert_close_rel(block(x, is_causal=True), peer(x, torch.ones(5, 5).triu(1).bool(), is_causal=True))


def test_the_block_in_a_transformer_encoder():
    block = TensorTransformerBlock(12, 2, 16, batch_first=True, is_causal=True, window2=4)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()
    x, ignore = torch.randn(2, 5, 12), torch.zeros(2, 5, dtype=torch.bool)
    ignore[1, 3:] = True
    want = x
    for layer in encoder.layers:
        want = layer(want, src_key_padding_mask=ignore)
    assert_close_rel(encoder(x, src_key_padding_mask=ignore), want, rtol=0)
    changed = x.clone()
    changed[:, 4] += 1  # causal in spite of the encoder's own is_causal=False
    torch.testing.assert_close(encoder(changed)[:, :4], encoder(x)[:, :4], rtol=0, atol=0)


def test_the_block_drops_and_decodes():
    block = TensorTransformerBlock(8, 2, 16, dropout=0.4, batch_first=True, is_causal=True, dtype=DOUBLE)
    assert block.self_attn.dropout == 0.4
    assert TensorTransformerBlock(8, 2, dropout=0.4, approx="polynomial").self_attn.dropout == 0.0
    assert TensorTransformerBlock(8, 2, dropout=0.4, attn_dropout=0.1).self_attn.dropout == 0.1
    x = double(2, 6, 8)
    assert relative_error(block(x), block(x)) > 0.01
    block.eval()
    cache = TensorAttentionCache()
    with torch.no_grad():
        got = torch.cat([block(part, cache=cache) for part in x.split((2, 1, 3), 1)], 1)
        assert_close_rel(got, block(x))


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"num_heads": 5}, ValueError, "num_heads must divide embed_dim = 16"),
        ({"form": "determinant"}, ValueError, "head_dim must be a multiple of 3"),
        ({"form": "trilinaer"}, ValueError, "did you mean 'trilinear'"),
        ({"rotary": True}, ValueError, "rotary must be False unless form='determinant'"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"window1": 0}, ValueError, "window1 must be at least 1"),
        ({"window2": (1, -2)}, ValueError, "window2"),
        ({"approx": "polynomial", "dropout": 0.1}, ValueError, "dropout must be 0 with approx"),
        ({"approx": "polynomial", "form": "strassen"}, ValueError, "form must be 'trilinear'"),
        ({"approx": "polynomial", "backend": "triton"}, ValueError, "backend must be 'auto' or 'torch'"),
        ({"approx": "auto", "qk_norm": False}, ValueError, "qk_norm must be True"),
        ({"approx": "taylor"}, ValueError, "approx must be one of"),
        ({"degree": 3}, ValueError, "degree"),
        ({"max_gain": 1.0, "qk_norm": False}, ValueError, "max_gain must be None"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
        ({"tolerance": "x"}, TypeError, "tolerance must be a number"),
        ({"add_bias_kv": True}, ValueError, "add_bias_kv must be False"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_constructions(arguments, error, message):
    with pytest.raises(error, match=message):
        TensorAttention(**{"embed_dim": 16, "num_heads": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"need_weights": True}, ValueError, "need_weights must be False"),
        ({"attn_mask": torch.zeros(3, 3, dtype=torch.bool)}, ValueError, "attn_mask must be None"),
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "key_padding_mask must have keys = 3"),
        ({"key_padding_mask": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "True = ignore"),
        ({"key": torch.randn(2, 3, 5)}, ValueError, "key must have channels = 8"),
        ({"value": torch.randn(2, 4, 8)}, ValueError, "value must have the length of key"),
    ],
)
def test_bad_calls(arguments, error, message):
    with pytest.raises(error, match=message):
        TensorAttention(8, 2, batch_first=True)(torch.randn(2, 3, 8), **arguments)
