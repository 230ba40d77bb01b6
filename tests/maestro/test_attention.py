"""Low-rank attention against torch.nn.MultiheadAttention."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from torchlayers.maestro import LowRankMultiheadAttention
from torchlayers.maestro.attention import capped_rank
from torchlayers.testing import assert_close_rel, relative_error

DOUBLE = torch.float64


def peer(embed_dim=12, num_heads=3, **options):
    mha = nn.MultiheadAttention(embed_dim, num_heads, dtype=DOUBLE, **options)
    with torch.no_grad():
        for p in mha.parameters():
            p.add_(0.2 * torch.randn_like(p))  # biases that are not zero
    return mha.eval()


def inputs(mha, n=2, queries=5, keys=7):
    x = [(queries, mha.embed_dim), (keys, mha.kdim), (keys, mha.vdim)]
    shapes = [(n, *s) if mha.batch_first else (s[0], n, s[1]) for s in x]
    return [torch.randn(s, dtype=DOUBLE) for s in shapes]


def agree(layer, mha, *args, **options):
    (y, w), (y0, w0) = layer(*args, **options), mha(*args, **options)
    assert_close_rel(y, y0, rtol=1e-13)
    assert (w is None) == (w0 is None)
    if w0 is not None:
        assert_close_rel(w, w0, rtol=1e-13)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "bias": False},
        {"kdim": 5, "vdim": 20, "batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"add_zero_attn": True, "batch_first": True, "kdim": 5},
    ],
    ids=str,
)
def test_converted_attention_gives_the_peers_output_and_weights(options, need_weights):
    mha = peer(**options)
    layer = LowRankMultiheadAttention.from_multihead_attention(mha)
    q, k, v = inputs(mha)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:], padding[1, :1] = True, True
    some = torch.rand(5, 7) > 0.7
    each = torch.randn(6, 5, 7, dtype=DOUBLE)
    check = partial(agree, layer, mha, need_weights=need_weights)
    check(q, k, v)
    check(q, k, v, average_attn_weights=False)
    check(q, k, v, key_padding_mask=padding)
    check(q, k, v, key_padding_mask=padding, attn_mask=some)
    check(q, k, v, attn_mask=each)
    single = [x[0] if mha.batch_first else x[:, 0] for x in (q, k, v)]
    check(*single, key_padding_mask=padding[0], attn_mask=some)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_hint_is_the_causal_mask(need_weights):
    mha = peer(batch_first=True)
    layer = LowRankMultiheadAttention.from_multihead_attention(mha)
    x = torch.randn(2, 6, 12, dtype=DOUBLE)
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=DOUBLE)
    expected = mha(x, x, x, attn_mask=mask, need_weights=False)[0]
    for given in (mask, None):
        y, _ = layer(x, x, x, attn_mask=given, is_causal=True, need_weights=need_weights)
        assert_close_rel(y, expected, rtol=1e-13)


def test_a_query_that_sees_nothing_gets_the_output_bias_either_way():
    layer = LowRankMultiheadAttention(8, 2, batch_first=True, dtype=DOUBLE)
    nn.init.normal_(layer.out_proj.bias)
    x, all_hidden = torch.randn(1, 3, 8, dtype=DOUBLE), torch.ones(1, 3, dtype=torch.bool)
    for need_weights in (True, False):
        y, _ = layer(x, key_padding_mask=all_hidden, need_weights=need_weights)
        assert_close_rel(y, layer.out_proj.bias.expand(1, 3, 8), rtol=1e-13)


def test_rank_runs_every_projection_at_its_prefix():
    mha = peer(kdim=5, batch_first=True)
    layer = LowRankMultiheadAttention.from_multihead_attention(mha)
    q, k, v = inputs(mha)
    cut = copy.deepcopy(mha)
    with torch.no_grad():
        for weight in (cut.q_proj_weight, cut.k_proj_weight, cut.v_proj_weight, cut.out_proj.weight):
            b = min(6, *weight.shape)
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u[:, :b] * s[:b] @ vh[:b])
    y, _ = layer(q, k, v, rank=6)
    assert_close_rel(y, cut(q, k, v)[0], rtol=1e-12)
    assert relative_error(y, layer(q, k, v)[0]) > 1e-3
    assert_close_rel(layer(q, k, v, rank=0)[0], layer.out_proj.bias.expand_as(y), rtol=1e-13)
    with pytest.raises(ValueError, match="rank must be at most 12"):
        layer(q, k, v, rank=13)


def test_start_has_the_peers_variance_and_gradients_reach_all():
    torch.manual_seed(0)
    layer, mha = LowRankMultiheadAttention(64, 4, dtype=DOUBLE), nn.MultiheadAttention(64, 4, dtype=DOUBLE)
    ours = layer.to_dense()
    packed, packed0 = ours.in_proj_weight.detach(), mha.in_proj_weight.detach()
    assert float(packed.std()) == pytest.approx(float(packed0.std()), rel=0.05)
    assert packed.abs().max() <= packed0.abs().max() * 1.01
    assert not ours.in_proj_bias.any() and not ours.out_proj.bias.any()
    layer(torch.randn(3, 2, 64, dtype=DOUBLE))[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_gradcheck_at_a_rank():
    layer = LowRankMultiheadAttention(4, 2, kdim=3, batch_first=True, dtype=DOUBLE)
    q, k = torch.randn(1, 3, 4, dtype=DOUBLE, requires_grad=True), torch.randn(1, 2, 3, dtype=DOUBLE)
    v = torch.randn(1, 2, 4, dtype=DOUBLE)
    weights = list(layer.parameters())

    def run(q, *_):
        return layer(q, k, v, rank=2)

    assert torch.autograd.gradcheck(run, (q, *weights))


def test_round_trip_through_the_peer_copies_and_pickle():
    layer = LowRankMultiheadAttention(8, 2, add_bias_kv=True, batch_first=True, max_rank=3, dtype=DOUBLE)
    x = torch.randn(2, 4, 8, dtype=DOUBLE)
    expected = layer(x)[0]
    for other in (layer.to_dense(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close_rel(other(x, x, x)[0], expected, rtol=1e-12)
    fresh = LowRankMultiheadAttention(8, 2, add_bias_kv=True, batch_first=True, max_rank=3, dtype=DOUBLE)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], expected)
    assert [p.max_rank for p in (layer.q_proj, layer.out_proj)] == [3, 3]


def test_conversion_keeps_flags_and_bare_weights():
    mha = peer()
    mha.in_proj_weight.requires_grad_(False)
    layer = LowRankMultiheadAttention.from_multihead_attention(mha, 0.5)
    assert not layer.training and not layer.k_proj.weight_in.requires_grad and layer.out_proj.weight_in.requires_grad
    assert layer.q_proj.max_rank == 6
    nn.utils.parametrizations.weight_norm(mha.out_proj)
    with pytest.raises(ValueError, match="parametrised"):
        LowRankMultiheadAttention.from_multihead_attention(mha)
    with pytest.raises(TypeError, match="MultiheadAttention"):
        LowRankMultiheadAttention.from_multihead_attention(nn.Linear(2, 2))


def test_compiles_whole_with_masks():
    layer = LowRankMultiheadAttention(8, 2, batch_first=True).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for need_weights in (True, False):
        ours, theirs = (f(x, key_padding_mask=padding, need_weights=need_weights)[0] for f in (compiled, layer))
        assert_close_rel(ours, theirs.double(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide"),
        ({"dropout": 1.5}, "dropout"),
        ({"max_rank": 0}, "max_rank must be at least 1"),
        ({"max_rank": 1.5}, r"max_rank must be a fraction in \(0, 1\]"),
    ],
)
def test_bad_construction(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankMultiheadAttention(**{"embed_dim": 12, "num_heads": 3, **options})


def test_bad_calls():
    layer = LowRankMultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        layer(x, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn_mask must have shape"):
        layer(x, attn_mask=torch.zeros(4, 3))
    with pytest.raises(TypeError, match="attn_mask must be bool or floating"):
        layer(x, attn_mask=torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="query must have channels = 8"):
        layer(x[..., :7])


def test_capped_rank():
    assert [capped_rank(r, 10) for r in (None, 4, 40, 0.25, 1.0)] == [10, 4, 10, 3, 10]
