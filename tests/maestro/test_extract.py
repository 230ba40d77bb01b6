"""Plain models out of low-rank ones: ranks, forms, budgets, the frontier, and what they cost."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from torchlayers.maestro import count, extract, factorize, frontier, sampled_ranks
from torchlayers.maestro.attention import SplitMultiheadAttention
from torchlayers.maestro.export import GaugeAligned
from torchlayers.maestro.layers import LowRankLayer
from torchlayers.testing import assert_close_rel, relative_error

DOUBLE = torch.float64


def mlp(*sizes):
    layers = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def scrambled(model, seed=0):
    """Low-rank layers whose terms are in no order."""
    torch.manual_seed(seed)
    model = factorize(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LowRankLayer):
                q = torch.linalg.qr(torch.randn(layer.max_rank, layer.max_rank, dtype=DOUBLE))[0]
                layer.weight_in.copy_(q.t() @ layer.weight_in)
                layer.weight_out.copy_(layer.weight_out @ q)
    return model


def plain(model):
    return all(type(m).__module__.startswith("torch.nn") for m in model.modules())


def test_terms_of_the_svd_or_those_that_were_learnt():
    low_rank, x = scrambled(mlp(12, 10, 9)), torch.randn(4, 12, dtype=DOUBLE)
    ranks = {"0": 4, "2": 3}
    learnt = extract(low_rank, ranks=ranks, round_to=1, canonicalize=False, merge="never")
    with sampled_ranks(low_rank, ranks):
        assert_close_rel(learnt(x), low_rank(x), rtol=1e-13)
    best = extract(low_rank, ranks=ranks, round_to=1, merge="never")
    assert plain(learnt) and plain(best)
    for name, b in ranks.items():
        weight = low_rank.get_submodule(name).dense_weight()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        first, second = best.get_submodule(name)
        assert first.bias is None and second.bias is not None
        assert_close_rel(second.weight @ first.weight, u[:, :b] * s[:b] @ vh[:b], rtol=1e-12)
    assert best[0][0].weight.shape == (4, 12)


@pytest.mark.parametrize("merge", ["auto", "gar", "never"])
def test_forms_compute_the_same_and_cost_what_they_should(merge):
    m, n, b = 12, 9, 5
    model = factorize(nn.Linear(n, m, bias=False, dtype=DOUBLE))
    x = torch.randn(1, n, dtype=DOUBLE)
    cut = extract(model, ranks=b, merge=merge, round_to=1)
    expected = {"auto": b * (m + n), "never": b * (m + n), "gar": b * (m + n - b)}[merge]
    assert count(cut, x) == (expected, expected)
    assert_close_rel(cut(x), model(x, rank=b), rtol=1e-12)
    full = extract(model, merge=merge)
    expected = n * (m + n) if merge == "never" else m * n
    assert count(full, x) == (expected, expected)
    assert_close_rel(full(x), model(x), rtol=1e-12)
    assert type(full) is (nn.Sequential if merge == "never" else nn.Linear)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(6, 9, 3, padding=1), torch.randn(2, 6, 5)),
        (nn.Conv2d(6, 9, (3, 2), stride=2, dilation=(1, 2), groups=3, padding_mode="reflect", padding=1), None),
        (nn.Conv2d(4, 6, 3, padding="same", bias=False), torch.randn(4, 5, 6)),
        (nn.Conv3d(2, 7, 2), torch.randn(2, 2, 3, 3, 3)),
        (nn.Embedding(9, 6, padding_idx=2), torch.tensor([[0, 2, 8], [1, 1, 2]])),
    ],
    ids=["1d", "grouped", "unbatched", "3d", "embedding"],
)
def test_convolutions_and_embeddings_in_all_forms(layer, x, rank):
    layer = layer.double()
    x = torch.randn(2, 6, 6, 7) if x is None else x
    x = x.double() if x.is_floating_point() else x
    low_rank = factorize(layer, only=[type(layer)])
    expected = low_rank(x, rank=rank)
    m, n, g = low_rank.weight_out.shape[0], low_rank.weight_in.shape[1], low_rank._groups
    weights = {"never": rank * (m + n), "gar": rank * (m + n - g * rank)}
    weights["auto"] = min(weights["never"], m * n // g)
    bias = 0 if layer.__dict__["_parameters"].get("bias") is None else m
    for merge, number in weights.items():
        cut = extract(low_rank, ranks=rank, merge=merge, round_to=1)
        assert_close_rel(cut(x), expected, rtol=1e-12)
        assert (
            sum(p.numel() for p in cut.parameters()) == min(number, m * n // g if merge != "never" else number) + bias
        )
        if merge != "gar":
            assert plain(cut)
    assert_close_rel(extract(low_rank)(x), layer(x), rtol=1e-12)


def test_rank_0_gives_the_bias():
    model = factorize(mlp(6, 5, 4))
    model[2].truncate_(0)
    x = torch.randn(3, 6, dtype=DOUBLE)
    for merge in ("auto", "gar", "never"):
        cut = extract(model, merge=merge)
        assert_close_rel(cut(x), model[2].bias.expand(3, 4), rtol=1e-13)
        assert plain(cut)


def test_ranks_are_rounded_up_where_there_are_terms():
    model = factorize(mlp(30, 20, 6))
    cut = extract(model, ranks={"0": 3, "2": 3}, merge="never")
    assert [cut[0][0].out_features, cut[2][0].out_features] == [8, 6]
    assert extract(model, ranks=0.5, merge="never", round_to=4)[0][0].out_features == 12
    assert extract(model, ranks={"0": 3}, merge="never", round_to=1)[2][0].out_features == 6


def test_threshold_is_progressive_shrinkings():
    model = scrambled(mlp(12, 10))
    model[0].truncate_(7)
    importance = model[0].importance()
    t = float(importance[3] + importance[4]) / 2
    kept = extract(model, threshold=t, canonicalize=False, round_to=1, merge="never")
    assert kept[0][0].out_features == 4
    s = torch.linalg.svdvals(model[0].dense_weight().detach())[:7]
    t = float(s[2:].sum() + s[3:].sum()) / 2  # balanced: the tails of U √S and √S V are √Σσ each
    assert extract(model, threshold=t, round_to=1, merge="never")[0][0].out_features == 3


def test_frozen_and_evaluated_models_stay_so_and_the_old_one_too():
    model = factorize(mlp(8, 6, 5)).eval()
    model[0].weight_in.requires_grad_(False), model[0].weight_out.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    cut = extract(model.float(), ranks=2, merge="never", round_to=1)
    assert not cut[0][0].weight.requires_grad and cut[2][0].weight.requires_grad
    assert not cut[0].training and not cut[0][1].training and cut[0][0].weight.dtype == torch.float32
    model.double()
    assert model[0].rank == 6 and all(relative_error(v, state[k]) < 1e-6 for k, v in model.state_dict().items())


def test_tied_factors_and_shared_modules_stay_so():
    model = mlp(8, 8, 8)
    model.append(model[0])
    model[2].weight = model[0].weight
    low_rank, x = factorize(model), torch.randn(2, 8, dtype=DOUBLE)
    cut = extract(low_rank, ranks=3, round_to=1, merge="never")
    assert cut[3] is cut[0] and cut[2][0].weight is cut[0][0].weight and cut[2][1].bias is not cut[0][1].bias
    with sampled_ranks(low_rank, {"0": 3, "2": 3}):
        assert_close_rel(cut(x), low_rank(x), rtol=1e-12)
    assert count(cut, x).params == 3 * 16 + 16
    budget = extract(low_rank, budget_params=count(cut, x).params + 1, round_to=1)
    assert count(budget, x).params == count(cut, x).params


def test_tied_projections_are_counted_once_and_stay_tied():
    model, x = factorize(nn.MultiheadAttention(8, 2, batch_first=True).double()), torch.randn(2, 3, 8, dtype=DOUBLE)
    assert isinstance(extract(model), nn.MultiheadAttention)
    model.k_proj.weight_in, model.k_proj.weight_out = model.q_proj.weight_in, model.q_proj.weight_out
    budget = 3 * 8 * 8 + 4 * 8
    cut = extract(model, budget_params=budget)
    assert cut.k_proj.weight is cut.q_proj.weight and count(cut, (x, x, x)).params == budget
    assert_close_rel(cut(x, x, x)[0], model(x, x, x)[0], rtol=1e-12)


# Transformers


@pytest.mark.parametrize("ranks", [None, 0.25])
def test_transformer_encoder_in_both_modes(ranks):
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0, dtype=DOUBLE)
    low_rank = factorize(nn.TransformerEncoder(block, 2))
    x, padding = torch.randn(2, 5, 16, dtype=DOUBLE), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    cut = extract(low_rank, ranks=ranks, round_to=1)
    if ranks is None:
        assert plain(cut) and type(cut.layers[0].self_attn) is nn.MultiheadAttention
    else:
        ours = {type(m) for m in cut.modules() if not type(m).__module__.startswith("torch.nn")}
        assert ours == {SplitMultiheadAttention}
        for layer in low_rank.modules():
            if isinstance(layer, LowRankLayer):
                layer.truncate_(math.ceil(ranks * layer.rank))
    for training in (True, False):
        with torch.set_grad_enabled(training):
            low_rank.train(training), cut.train(training)
            for mask in (None, padding):
                ours, theirs = (m(x, src_key_padding_mask=mask)[~padding] for m in (cut, low_rank))
                assert_close_rel(ours, theirs, rtol=1e-12)


# Budgets


def test_budget_is_kept_and_used():
    torch.manual_seed(0)
    model, x = factorize(mlp(40, 48, 32, 10)), torch.randn(1, 40, dtype=DOUBLE)
    full = count(extract(model), x)
    errors = []
    for fraction in (0.4, 0.6, 0.8, 1.0):
        cut = extract(model, budget_params=int(fraction * full.params), round_to=4)
        assert fraction * full.params * 0.8 < count(cut, x).params <= fraction * full.params
        errors.append(relative_error(cut(x), model(x)))
        for given in (None, x):  # one row, said or not
            cut = extract(model, budget_macs=int(fraction * full.macs), round_to=4, input=given)
            assert fraction * full.macs * 0.8 < count(cut, x).macs <= fraction * full.macs
    assert errors[-1] < 1e-12 and errors[0] > errors[2]


def test_terms_go_to_the_layers_that_need_them():
    model = mlp(16, 16, 16)
    with torch.no_grad():
        for layer, rank in ((model[0], 2), (model[2], 10)):
            q = torch.linalg.qr(torch.randn(16, 16, dtype=DOUBLE))[0]
            layer.weight.copy_(q[:, :rank] @ q[:, :rank].t())
    cut = extract(factorize(model), budget_params=12 * 32 + 32, round_to=1, merge="never")
    assert [cut[0][0].out_features, cut[2][0].out_features] == [2, 10]


def test_budget_below_the_smallest_model():
    model = factorize(nn.Sequential(mlp(16, 16, 16), nn.Linear(16, 4).double()), skip=["1"])
    # Beside two layers of 8 (16 + 16): biases of 16, and the dense head.
    lowest = 2 * (8 * 32 + 16) + 68
    with pytest.raises(ValueError, match=rf"budget_params must be at least {lowest}.*got {lowest - 1}"):
        extract(model, budget_params=lowest - 1, merge="never")
    assert sum(p.numel() for p in extract(model, budget_params=lowest, merge="never").parameters()) == lowest
    with pytest.raises(ValueError, match=f"budget_macs must be at least {2 * 256 + 64}"):
        extract(model, budget_macs=10, merge="never")


def test_latency_budget():
    model, x = factorize(mlp(16, 16, 16)), torch.randn(2, 16, dtype=DOUBLE)
    assert_close_rel(extract(model, budget_latency_ms=1e6, input=x)(x), model(x), rtol=1e-12)
    with pytest.raises(ValueError, match="budget_latency_ms must be at least"):
        extract(model, budget_latency_ms=1e-9, input=x)
    with pytest.raises(ValueError, match="input must be given"):
        extract(model, budget_latency_ms=1.0)


def test_bad_arguments():
    model = factorize(mlp(8, 6))
    for options, message in (
        ({"ranks": 2, "threshold": 0.1}, "ranks and threshold"),
        ({"ranks": {"0": 7}}, r"ranks\['0'\] must be at most 6"),
        ({"ranks": {"00": 2}}, "'00'; did you mean '0'"),
        ({"ranks": -1}, "ranks must be at least 0"),
        ({"ranks": 7}, "ranks must be at most 6, the largest of a layer"),
        ({"ranks": 1.5}, r"ranks must be a fraction in \(0, 1\]"),
        ({"threshold": math.nan}, "threshold must be finite"),
        ({"threshold": math.inf}, "threshold must be finite"),
        ({"merge": "never ever"}, "merge must be one of"),
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"canonicalize": False, "calibration": [1]}, "canonicalize must be True"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(model, **options)
    with pytest.raises(ValueError, match="low-rank layers"):
        extract(nn.Linear(3, 3), ranks=1)
    with pytest.raises(ValueError, match="input must be given with budget_macs"):
        extract(factorize(nn.Conv1d(4, 4, 3)), budget_macs=100)


# Costs


def test_count_by_hand():
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert count(conv, torch.randn(2, 4, 5, 7)) == (6 * 2 * 9 + 6, 2 * 5 * 7 * 6 * 2 * 9)
    low_rank = factorize(conv)
    low_rank.truncate_(2)
    assert count(low_rank, torch.randn(2, 4, 5, 7)).macs == 2 * 5 * 7 * 2 * (36 + 6)
    linear = nn.Linear(5, 3)
    assert count(linear, torch.randn(5)).macs == count(linear, torch.randn(1, 5)).macs == 15
    n, length, e = 2, 7, 8
    attention = n * (4 * length * e * e + 2 * length * length * e)
    block = nn.TransformerEncoderLayer(e, 2, 12, batch_first=True).eval()
    x = torch.randn(n, length, e)
    assert count(block, x).macs == count(factorize(block, skip=["self_attn"]), x).macs - n * length * 2 * (
        8 * (8 + 12) - 8 * 12
    )
    assert count(block, x).macs == attention + n * length * 2 * 8 * 12
    assert count(nn.MultiheadAttention(e, 2), (x, x, x)).macs == attention_time_first(n, length, e)


def attention_time_first(length, n, e):
    return n * (4 * length * e * e + 2 * length * length * e)


def test_frontier(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        mlp(64, 32, 4),
    )
    model, x = factorize(net.double()).eval(), torch.randn(4, 3, 6, 6, dtype=DOUBLE)
    full = count(extract(model), x)
    path = tmp_path / "frontier.png"
    points = frontier(model, x, (1.0, 0.5, 1e-6), round_to=4, plot=path)
    assert path.stat().st_size > 1000
    assert points[0].score < 1e-12 and points[0].macs == full.macs and points[0].params == full.params
    assert points[1].macs <= 0.5 * full.macs and 1e-3 < points[1].score < points[2].score
    assert points[2].ranks == {"0": 4, "5.0": 4, "5.2": 4} and points[2].latency_ms > 0
    again = extract(model, ranks=points[1].ranks, round_to=1)
    assert count(again, x) == (points[1].params, points[1].macs)
    seen = []
    (point,) = frontier(model, x, (0.5,), evaluate=lambda m: seen.append(m) or 7.0, loader=[x], latency=False)
    assert point.score == 7.0 and point.latency_ms is None and not seen[0].training
    assert not torch.equal(seen[0][1].running_mean, model[1].running_mean)
    with pytest.raises(ValueError, match="fractions must be in"):
        frontier(model, x, (1.5,))
    with pytest.raises(TypeError, match="fractions must be a sequence"):
        frontier(model, x, 0.5)


def test_gauge_aligned_holds_inner_values_as_outputs():
    model = factorize(nn.Linear(7, 6, dtype=DOUBLE))
    cut = extract(model, ranks=3, merge="gar", round_to=1)
    assert isinstance(cut, GaugeAligned) and sorted(cut.order.tolist()) == list(range(6))
    x = torch.randn(2, 7, dtype=DOUBLE)
    inner, y = cut.reduce(x), cut(x) - cut.bias
    for j, place in enumerate(cut.order.tolist()):
        if place < 3:
            assert_close_rel(y[:, j], inner[:, place], rtol=1e-12)
    assert cut.expand.weight.abs().max() < 10  # well-conditioned rows were chosen
