"""A user's model in low-rank layers: equal outputs, ties, what is left, calibration, canonical order."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torchlayers
from torchlayers.maestro import (
    LowRankConfig,
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
    LowRankMultiheadAttention,
    canonicalize_,
    factorize,
)
from torchlayers.testing import assert_close_rel, relative_error

DOUBLE = torch.float64


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2, dilation=2, padding=2, padding_mode="circular"),
        nn.Flatten(2),
        nn.Conv1d(12, 6, 2, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 8, 10),
    ).double()


def test_outputs_stay_and_the_model_is_left_alone():
    model, x = convnet().eval(), torch.randn(2, 3, 6, 6, dtype=DOUBLE)
    y, state = model(x), copy.deepcopy(model.state_dict())
    seen = []
    low_rank = factorize(model, report=seen.append)
    assert_close_rel(low_rank(x), y, rtol=1e-13)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [type(m).__name__ for m in low_rank] == [
        *("LowRankConv2d", "BatchNorm2d", "ReLU", "LowRankConv2d", "Flatten", "LowRankConv1d", "Flatten"),
        "LowRankLinear",
    ]
    (report,) = seen
    assert [row.extra["rank"] for row in report.converted] == ["8", "6", "6", "10"]
    # 8 x 27: two factors of rank b have 35 b entries, the dense one 216.
    assert report.rows[0].extra["break-even"] == "7"
    assert report.parameters_after == sum(p.numel() for p in low_rank.parameters())
    assert "break-even" in str(report)
    assert factorize(model, inplace=True) is model and type(model[0]) is LowRankConv2d


def test_the_convert_verb_does_the_same():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double(), torch.randn(5, 4, dtype=DOUBLE)
    y = model(x)
    report = torchlayers.convert(model, LowRankConfig())
    assert len(report.converted) == 2
    assert_close_rel(report.model(x), y, rtol=1e-13)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("verb", ["factorize", "convert", "linear layers alone"])
def test_transformer_encoder_in_both_modes(verb, norm_first):
    options = {"batch_first": True, "dropout": 0.0, "norm_first": norm_first, "dtype": DOUBLE}
    block = nn.TransformerEncoderLayer(16, 4, 20, **options)
    # Nested tensors on: what the encoder does in evaluation must be refused by the layers, not by this switch.
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=not norm_first)
    x, padding = torch.randn(3, 6, 16, dtype=DOUBLE), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:], padding[2, 2:] = True, True
    model.train()
    expected = [model(x), model(x, src_key_padding_mask=padding)]
    if verb == "factorize":
        low_rank = factorize(model)
        assert isinstance(low_rank.layers[0].self_attn, LowRankMultiheadAttention)
    elif verb == "convert":
        low_rank = torchlayers.convert(copy.deepcopy(model), LowRankConfig()).model
    else:
        low_rank = factorize(model, only=[nn.Linear])
        assert type(low_rank.layers[0].self_attn) is nn.MultiheadAttention
    assert isinstance(low_rank.layers[1].linear1, LowRankLinear)
    for training in (True, False):
        low_rank.train(training)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                for mask, y in zip((None, padding), expected, strict=True):
                    keep = slice(None) if mask is None else ~padding
                    assert_close_rel(low_rank(x, src_key_padding_mask=mask)[keep], y[keep], rtol=1e-13)


def test_evaluation_runs_encoder_layers_at_the_rank_in_force():
    block = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True, dropout=0.0, dtype=DOUBLE)
    low_rank = factorize(block, only=[nn.Linear]).eval()
    x, ran = torch.randn(2, 5, 16, dtype=DOUBLE), []
    forward = low_rank.linear1.forward
    low_rank.linear1.forward = lambda x: ran.append(1) or forward(x)
    with torch.no_grad():
        low_rank(x)
    assert ran


def test_shared_modules_and_tied_weights_stay_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.shared = nn.Linear(6, 6)
            self.again = self.shared
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.head = nn.Linear(6, 11)
            self.head.weight = self.embedding.weight

        def forward(self, index):
            return self.head(self.b(self.a(self.again(self.shared(self.embedding(index))))))

    model, index = Model().double(), torch.randint(11, (4, 3))
    tied = model.a.weight
    low_rank = factorize(model)
    assert low_rank.shared is low_rank.again and isinstance(low_rank.shared, LowRankLinear)
    assert low_rank.a.weight_in is low_rank.b.weight_in and low_rank.a.weight_out is low_rank.b.weight_out
    assert low_rank.a.bias is not low_rank.b.bias
    assert low_rank.head.weight is low_rank.embedding.weight and type(low_rank.head) is nn.Linear
    assert model.a.weight is tied and model.b.weight is tied
    assert_close_rel(low_rank(index), model(index), rtol=1e-13)
    # 36 weights each: the shared and the tied one, two factors of 36; tied ones are counted once.
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, low_rank))
    assert after - before == 2 * 36
    cut = factorize(model, max_rank=2, calibration=[index])
    assert cut.a.weight_in is cut.b.weight_in and cut.a.weight_in.shape == (2, 6)


def test_ties_are_back_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2 \(Linear\).*finite"):
        factorize(model, inplace=True)
    assert model[1].weight is model[0].weight and all(type(m) is nn.Linear for m in model)


def test_a_tie_to_a_module_that_stays_keeps_all_of_them():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].weight = model[0].weight
    model[1].bias = model[3].bias
    low_rank = factorize(model)
    assert [type(m) for m in low_rank] == [nn.Linear, nn.Linear, LowRankLinear, nn.LayerNorm]
    assert low_rank[1].weight is low_rank[0].weight


def test_skip_and_only():
    def names(**options):
        model = nn.ModuleDict(
            {
                "body": nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3)),
                "head": nn.Linear(4, 3),
                "table": nn.Embedding(5, 4),
            }
        )
        low_rank = factorize(model, **options)
        return [name for name, m in low_rank.named_modules() if hasattr(m, "weight_in")]

    assert names() == ["body.0", "body.1", "head"]
    assert names(skip=["head"]) == ["body.0", "body.1"]
    assert names(skip=["body"]) == ["head"]
    assert names(skip=[nn.Conv2d, "body.?"]) == ["head"]
    assert names(skip=[nn.Sequential]) == ["head"]
    assert names(only=[nn.Linear]) == ["body.0", "head"]
    assert names(only=["body*", nn.Linear]) == ["body.0"]
    assert names(only=[nn.Embedding]) == ["table"]
    with pytest.raises(ValueError, match=r"skip must name modules.*'haed'.*did you mean 'head'"):
        names(skip=["haed"])
    with pytest.raises(ValueError, match="only must name classes"):
        names(only=[nn.LSTM])
    with pytest.raises(TypeError, match="skip must hold names"):
        names(skip=[3])
    with pytest.raises(ValueError, match="model must have layers to factorise"):
        names(only=[nn.Conv1d])


def test_ranks():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 6))
    assert [m.max_rank for m in factorize(model, max_rank=8)] == [8, 6]
    assert [m.max_rank for m in factorize(model, max_rank=0.3)] == [5, 2]
    for bad in (0, 0.0, 1.5):
        with pytest.raises(ValueError, match="max_rank"):
            factorize(model, max_rank=bad)


def test_what_cannot_be_factorised():
    with pytest.raises(ValueError, match=r"0 \(Parametrized\w*\).*parametri"):
        factorize(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))))
    with pytest.raises(TypeError, match=r"0 \(Linear\).*real"):
        factorize(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        factorize("model")
    pruned = nn.Sequential(nn.Linear(4, 4), prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    with pytest.raises(ValueError, match=r"parametrised weight in 1 \(Linear\)"):
        factorize(pruned)
    weight = pruned[1].weight
    factorize(pruned, skip="1", inplace=True)
    assert isinstance(pruned[0], LowRankLinear) and pruned[1].weight is weight
    seen = []
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 4), type("Own", (nn.Linear,), {})(4, 4))
    factorize(model, report=seen.append)
    assert {row.name: row.reason for row in seen[0].skipped} == {
        "0": "depthwise: one filter a group leaves no ranks to choose from",
        "2": "a class of its own, derived from Linear",
    }


# Calibration


def test_calibrated_prefixes_are_reduced_rank_regression():
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, dtype=DOUBLE)
    x = torch.randn(200, 8, dtype=DOUBLE) * torch.tensor([3, 2, 1.2, 1, 0.8, 0.6, 0.5, 0.4], dtype=DOUBLE)
    low_rank = factorize(linear, calibration=[(x[:80], None), {"x": x[80:]}])
    target = x @ linear.weight.t()
    right = torch.linalg.svd(target, full_matrices=False)[2]
    for b in range(1, 7):
        best = target @ right[:b].t() @ right[:b]  # Eckart and Young on the outputs
        assert_close_rel(low_rank(x, rank=b) - linear.bias, best, rtol=1e-6)
    plain = factorize(linear)
    error = [relative_error(m(x, rank=2) - linear.bias, target) for m in (low_rank, plain)]
    assert error[0] < 0.95 * error[1]


@pytest.mark.parametrize(
    ("conv", "grid"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (9,)),
        (nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2, padding=1, padding_mode="reflect"), (6, 7)),
        (nn.Conv2d(4, 6, 3, padding="same"), (6, 7)),
        (nn.Conv3d(2, 5, (1, 2, 2), padding=(0, 1, 0), bias=False), (3, 4, 4)),
    ],
    ids=["1d", "grouped", "same", "3d"],
)
def test_calibrated_convolutions_keep_outputs_best(conv, grid):
    torch.manual_seed(0)
    conv = conv.double()
    x = torch.randn(5, conv.in_channels, *grid, dtype=DOUBLE).cumsum(-1)
    low_rank = factorize(conv, calibration=[x[:2], x[2:]])
    y = conv(x)
    assert_close_rel(low_rank(x), y, rtol=1e-10)
    bias = 0 if conv.bias is None else conv.bias.reshape(-1, *(1,) * len(grid))
    for b in range(1, low_rank.max_rank):
        got = low_rank(x, rank=b) - bias
        for ours, target in zip(got.chunk(conv.groups, 1), (y - bias).chunk(conv.groups, 1), strict=True):
            # The best rank-b approximation of this group's outputs, (channels, everything else).
            rows = target.transpose(0, 1).flatten(1)
            left = torch.linalg.svd(rows, full_matrices=False)[0][:, :b]
            assert_close_rel(ours.transpose(0, 1).flatten(1), left @ left.t() @ rows, rtol=1e-5)


def test_calibration_of_attention_and_embeddings_and_what_it_leaves():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(nn.Embedding(30, 8), block).double().train()
    index = torch.randint(6, (20, 5))
    kinds = [nn.Linear, nn.MultiheadAttention, nn.Embedding]
    low_rank = factorize(model, only=kinds, calibration=[index[:9], index[9:]], max_rank=4)
    plain = factorize(model, only=kinds, max_rank=4)
    assert low_rank.training and all(m.training for m in low_rank.modules())
    assert all(not m._forward_pre_hooks for m in low_rank.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert low_rank[1].self_attn.out_proj.max_rank == 4 and isinstance(low_rank[0], LowRankEmbedding)
    for m in (model, low_rank, plain):
        m.eval()
    errors = [relative_error(m(index), model(index)) for m in (low_rank, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_bad_calibration():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="at least one batch"):
        factorize(model, calibration=[])
    side = nn.ModuleDict({"main": nn.Linear(4, 4), "side": nn.Linear(4, 4)})
    side.forward = lambda x: side["main"](x)
    low_rank = factorize(side)
    low_rank.forward = lambda x: low_rank["main"](x)
    with pytest.raises(ValueError, match="left out side"):
        canonicalize_(low_rank, calibration=[torch.randn(2, 4)])


# The canonical order


def test_canonical_order_is_the_svd_and_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(8, 6, dtype=DOUBLE), LowRankConv2d(3, 4, 2, dtype=DOUBLE))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    model[0].truncate_(4)
    weights = [m.dense_weight() for m in model]
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    weights = [m.dense_weight().detach().clone() for m in model]
    assert canonicalize_(model, optimizer=optimizer) is model
    for layer, weight in zip(model, weights, strict=True):
        assert_close_rel(layer.dense_weight(), weight, rtol=1e-12)
        u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        for b in range(1, layer.rank + 1):
            assert_close_rel(layer.dense_weight(b).flatten(1), u[:, :b] * s[:b] @ vh[:b], rtol=1e-10)
    assert model[0].rank == 4 and not model[0].weight_in[4:].any()
    assert model[0].weight_in not in optimizer.state and model[0].bias in optimizer.state
    with pytest.raises(ValueError, match="low-rank layers"):
        canonicalize_(nn.Linear(2, 2))
