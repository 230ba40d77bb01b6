"""Draws of ranks, the context that applies them, and the losses of a step."""

import copy
import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchlayers.maestro.layers import LowRankLinear
from torchlayers.maestro.ordered import RankSampler, lod_loss, sampled_ranks


def network(dtype=torch.float64):
    return nn.Sequential(LowRankLinear(7, 5, dtype=dtype), nn.Tanh(), LowRankLinear(5, 3, dtype=dtype))


def by_hand(model, x, first=None, second=None):
    """The network above from its parameters, at ranks (of all samples, or of each)."""
    for layer, rank, activation in ((model[0], first, torch.tanh), (model[2], second, lambda v: v)):
        weight = (layer.weight_out[:, None, :] * layer.weight_in.T[None]).cumsum(-1)  # [:, :, b - 1] is the prefix b
        weight = torch.cat([torch.zeros_like(weight[..., :1]), weight], -1)
        ranks = torch.as_tensor(layer.max_rank if rank is None else rank).expand(len(x))
        x = activation(torch.einsum("ni,oin->no", x, weight[:, :, ranks]) + layer.bias)
    return x


def pairs(sampler, steps):
    return [next(iter(sampler.sample(step).items())) for step in steps]


# RankSampler


def test_each_pair_comes_once_in_a_round():
    sampler = RankSampler(network(), seed=3)
    every = {("0", b) for b in range(1, 6)} | {("2", b) for b in range(1, 4)}
    rounds = [pairs(sampler, range(8 * k, 8 * k + 8)) for k in range(30)]
    assert all(set(drawn) == every for drawn in rounds)
    assert len({tuple(drawn) for drawn in rounds}) == 30
    # Over the rounds, each pair stands in each place about equally often: 30 / 8 on average.
    places = Counter((pair, place) for drawn in rounds for place, pair in enumerate(drawn))
    assert len(places) > 55
    assert max(places.values()) < 14


def chi_square(counts, expected):
    return sum((counts[key] - e) ** 2 / e for key, e in expected.items())


@pytest.mark.parametrize(
    "law, options, share",
    [
        ("pair", {"replacement": True}, {"0": 5 / 8, "2": 3 / 8}),
        ("uniform", {}, {"0": 1 / 2, "2": 1 / 2}),
    ],
)
def test_law_of_one_layer_at_a_time(law, options, share):
    n = 4000
    counts = Counter(pairs(RankSampler(network(), law, seed=1, **options), range(n)))
    expected = {(name, b): n * share[name] / size for name, size in (("0", 5), ("2", 3)) for b in range(1, size + 1)}
    assert set(counts) == set(expected)
    assert chi_square(counts, expected) < 24.3  # 7 degrees of freedom: exceeded once in a thousand seeds


def test_independent_draws_a_rank_for_every_layer():
    sampler = RankSampler(network(), "independent", seed=2)
    counts = Counter(tuple(sampler.sample(step).items()) for step in range(3000))
    expected = {(("0", a), ("2", b)): 3000 / 15 for a in range(1, 6) for b in range(1, 4)}
    assert set(counts) == set(expected)
    assert chi_square(counts, expected) < 36.1  # 14 degrees of freedom


@pytest.mark.parametrize("law", ["pair", "uniform", "independent"])
def test_draws_depend_on_seed_and_step_alone(law):
    model = network()
    sampler = RankSampler(model, law, seed=5)
    forwards = [sampler.sample(step) for step in range(40)]
    before = torch.get_rng_state()
    assert [sampler.sample(step) for step in reversed(range(40))] == forwards[::-1]
    assert torch.equal(before, torch.get_rng_state())
    assert [RankSampler(copy.deepcopy(model), law, 5).sample(step) for step in range(20, 40)] == forwards[20:]
    assert [RankSampler(model, law, 6).sample(step) for step in range(40)] != forwards


def test_draws_are_those_of_yesterday():
    """A resumed run repeats them on another machine and in another version of Python."""
    drawn = pairs(RankSampler(network(), seed=0), range(8))
    assert drawn == [("0", 2), ("2", 1), ("0", 1), ("0", 3), ("0", 4), ("2", 2), ("0", 5), ("2", 3)]


def test_ranks_of_a_data_parallel_run():
    model = network()
    streams = [[RankSampler(model, dp_rank=rank).sample(s) for s in range(16)] for rank in (None, 0, 1)]
    assert streams[0] != streams[1] != streams[2] != streams[0]
    assert {tuple(d.items()) for d in streams[1][:8]} == {tuple(d.items()) for d in streams[2][:8]}


@pytest.mark.parametrize("law", ["pair", "uniform", "independent"])
def test_follows_the_ranks_that_layers_have(law):
    model = network()
    sampler = RankSampler(model, law)
    model[0].truncate_(2)
    drawn = [sampler.sample(step) for step in range(5 * 20)]
    assert {d["0"] for d in drawn if "0" in d} == {1, 2}
    if law == "pair":
        assert {tuple(d.items()) for d in drawn[:5]} == {(("0", 1),), (("0", 2),), *((("2", b),) for b in (1, 2, 3))}
    model[0].truncate_(0)
    assert {name for step in range(30) for name in sampler.sample(step)} == {"2"}
    model[2].truncate_(0)
    assert sampler.sample(0) == {}


def test_names_are_those_of_the_model_inside():
    model = network()
    compiled = torch.compile(model, backend="eager")
    assert RankSampler(compiled).sample(4) == RankSampler(model).sample(4)
    with sampled_ranks(compiled, {"0": 2}):
        assert model[0]._sampled == 2
    attention = nn.ModuleDict({"block": nn.ModuleDict({"proj": LowRankLinear(3, 3)})})
    assert set(RankSampler(attention, "independent").sample(0)) == {"block.proj"}


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((nn.Linear(2, 2),), ValueError, "low-rank layers"),
        (("model",), TypeError, "torch.nn.Module"),
        ((network(), "pairs"), ValueError, "did you mean 'pair'"),
        ((network(), "pair", 0.5), TypeError, "seed"),
    ],
)
def test_bad_arguments_of_the_sampler(arguments, kind, message):
    with pytest.raises(kind, match=message):
        RankSampler(*arguments)


def test_bad_steps():
    sampler = RankSampler(network())
    with pytest.raises(ValueError, match="step"):
        sampler.sample(-1)
    with pytest.raises(TypeError, match="step"):
        sampler.sample(1.0)
    with pytest.raises(ValueError, match="dp_rank"):
        RankSampler(network(), dp_rank=-1)


# sampled_ranks


def test_layers_run_at_the_sampled_ranks():
    model, x = network(), torch.randn(4, 7, dtype=torch.float64)
    full = model(x)
    torch.testing.assert_close(full, by_hand(model, x), rtol=1e-13, atol=1e-13)
    for first in range(6):
        with sampled_ranks(model, {"0": first}):
            torch.testing.assert_close(model(x), by_hand(model, x, first), rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(model[0](x, 4), model[0](x, rank=4), rtol=0, atol=0)
            with sampled_ranks(model, {"2": 1}):
                torch.testing.assert_close(model(x), by_hand(model, x, first, 1), rtol=1e-13, atol=1e-13)
            with sampled_ranks(model, {"0": 5}):
                assert torch.equal(model(x), full)
            torch.testing.assert_close(model(x), by_hand(model, x, first), rtol=1e-13, atol=1e-13)
        assert torch.equal(model(x), full)


def test_one_context_serves_many_times_and_ends_after_an_error():
    model, x = network(), torch.randn(4, 7, dtype=torch.float64)
    full, context = model(x), sampled_ranks(model, {"0": 1})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"), context:
            assert not torch.equal(model(x), full)
            raise RuntimeError("boom")
        assert torch.equal(model(x), full)


def test_ranks_of_samples():
    model, x = network(), torch.randn(6, 7, dtype=torch.float64)
    first, second = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([3, 2, 1, 0, 3, 2])
    with sampled_ranks(model, {"0": first, "2": second}):
        torch.testing.assert_close(model(x), by_hand(model, x, first, second), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "ranks, kind, message",
    [
        ({"0": 6}, ValueError, r"ranks\['0'\] must be from 0 to 5"),
        ({"0": -1}, ValueError, r"ranks\['0'\]"),
        ({"0": 1.0}, TypeError, r"ranks\['0'\]"),
        ({"0": True}, TypeError, r"ranks\['0'\]"),
        ({"1": 1}, ValueError, "a layer in ranks must be one of '0', '2'"),
        ([1, 2], TypeError, "mapping"),
        ({"0": torch.tensor([1, 6])}, ValueError, "got 6"),
        ({"0": torch.tensor([1.0])}, TypeError, "float32"),
        ({"0": torch.tensor([[1]])}, ValueError, "batch"),
    ],
)
def test_bad_ranks(ranks, kind, message):
    with pytest.raises(kind, match=message):
        sampled_ranks(network(), ranks)


def test_ranks_above_a_truncated_layer_are_refused():
    model = network()
    model[0].truncate_(3)
    with pytest.raises(ValueError, match="from 0 to 3"):
        sampled_ranks(model, {"0": 4})


def test_checkpoints_recompute_at_the_ranks_of_their_forward():
    model, x = network(), torch.randn(4, 7, dtype=torch.float64)

    def gradients(run):
        with sampled_ranks(model, {"0": 2}):
            sampled = run(x)
        loss = run(x).square().sum() + sampled.square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    kept = functools.partial(sampled_ranks.kept, model)
    got = gradients(lambda v: checkpoint(model, v, use_reentrant=False, context_fn=kept))
    for a, b in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# lod_loss


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same_loss(model, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def classification():
    return torch.randn(9, 7, dtype=torch.float64), torch.randint(3, (9,))


def test_sampled_loss():
    model = network()
    x, y = classification()
    sampler = RankSampler(model)
    for step in range(8):
        ((name, rank),) = sampler.sample(step).items()
        ranks = (rank, None) if name == "0" else (None, rank)
        assert_same_loss(
            model, lod_loss(model, x, y, F.cross_entropy, sampler, step), F.cross_entropy(by_hand(model, x, *ranks), y)
        )


def test_columns_beyond_the_draw_get_gradients_of_zero():
    model = network()
    x, y = classification()
    sampler = RankSampler(model)
    step = next(s for s in range(8) if sampler.sample(s) == {"0": 2})
    lod_loss(model, x, y, F.cross_entropy, sampler, step).backward()
    assert model[0].weight_in.grad[:2].abs().min() > 0
    assert model[0].weight_in.grad[2:].count_nonzero() == 0
    assert model[0].weight_out.grad[:, 2:].count_nonzero() == 0


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)])
def test_full_model_teaches_classes(loss_fn):
    model = network()
    x, y = classification()
    sampler = RankSampler(model, "independent")
    ranks = sampler.sample(2)
    full = by_hand(model, x)
    # Cross-entropy against the full model's distribution, which is held fixed.
    teacher = full.detach().exp() / full.detach().exp().sum(1, keepdim=True)
    log_q = by_hand(model, x, ranks["0"], ranks["2"]).log_softmax(1)
    expected = -full.log_softmax(1)[torch.arange(9), y].mean() - (teacher * log_q).sum(1).mean()
    assert_same_loss(model, lod_loss(model, x, y, loss_fn, sampler, 2, mode="full+sampled"), expected)


def test_full_model_teaches_values_and_probabilities():
    model, x = network(), torch.randn(9, 7, dtype=torch.float64)
    sampler = RankSampler(model, "independent")
    ranks = sampler.sample(1)
    y = torch.rand(9, 3, dtype=torch.float64)

    def check(loss_fn, function, teach, **options):
        full, sub = by_hand(model, x), by_hand(model, x, ranks["0"], ranks["2"])
        expected = function(full, y) + function(sub, teach(full.detach()))
        assert_same_loss(model, lod_loss(model, x, y, loss_fn, sampler, 1, "full+sampled", **options), expected)

    check(F.mse_loss, lambda o, t: (o - t).square().mean(), lambda full: full)
    for loss_fn in (nn.BCEWithLogitsLoss(), functools.partial(F.binary_cross_entropy_with_logits, reduction="mean")):
        check(loss_fn, lambda o, t: F.binary_cross_entropy(o.sigmoid(), t), torch.sigmoid)
    # The true target for both, as when PCA is to be recovered.
    check(F.mse_loss, lambda o, t: (o - t).square().mean(), lambda _: y, soft_target=lambda _: y)


@pytest.mark.parametrize("batch, parts", [(9, 4), (8, 2), (3, 5), (1, 2), (0, 3)])
def test_split_batch(batch, parts):
    model, x = network(), torch.randn(batch, 7, dtype=torch.float64)
    y = torch.randn(batch, 3, dtype=torch.float64)
    sampler = RankSampler(model)
    outputs = []
    for part in range(parts):
        draw = sampler.sample(3 * (parts - 1) + part - 1) if part else {}
        run = x[part * batch // parts : (part + 1) * batch // parts]
        outputs.append(by_hand(model, run, draw.get("0"), draw.get("2")))
    expected = (torch.cat(outputs) - y).square().sum()
    loss = lod_loss(model, x, y, nn.MSELoss(reduction="sum"), sampler, 3, mode="split", parts=parts)
    assert_same_loss(model, loss, expected)


def test_split_changes_with_the_draws():
    model = network()
    x, y = classification()
    losses = {lod_loss(model, x, y, F.cross_entropy, RankSampler(model), s, mode="split").item() for s in range(6)}
    assert len(losses) == 6


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = LowRankLinear(4, 4)

    def forward(self, a, b):
        return self.layer(a) + b


@pytest.mark.parametrize("mode", ["sampled", "full+sampled", "split"])
def test_inputs_of_several_tensors(mode):
    model, a, b, y = TwoInputs(), torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4)
    sampler = RankSampler(model)
    losses = [lod_loss(model, x, y, F.mse_loss, sampler, 0, mode) for x in ((a, b), {"a": a, "b": b}, {"b": b, "a": a})]
    assert losses[0] == losses[1] == losses[2]


def test_bad_arguments_of_the_loss():
    model = network()
    x, y = classification()
    sampler = RankSampler(model)
    with pytest.raises(ValueError, match="did you mean 'full\\+sampled'"):
        lod_loss(model, x, y, F.cross_entropy, sampler, 0, mode="full+sample")
    with pytest.raises(TypeError, match="RankSampler"):
        lod_loss(model, x, y, F.cross_entropy, 0, 0)
    with pytest.raises(ValueError, match="step"):
        lod_loss(model, x, y, F.cross_entropy, sampler, -1)
    with pytest.raises(ValueError, match="parts"):
        lod_loss(model, x, y, F.cross_entropy, sampler, 0, "split", parts=1)
    with pytest.raises(TypeError, match="x must hold a tensor"):
        lod_loss(model, "text", y, F.cross_entropy, sampler, 0, "split")
    other = nn.Sequential(nn.Sequential(LowRankLinear(7, 3, dtype=torch.float64)))
    for mode in ("sampled", "split"):
        with pytest.raises(ValueError, match="a layer "):
            lod_loss(other, x, y, F.cross_entropy, sampler, 0, mode)


# torch.compile


@pytest.mark.parametrize("training", [True, False])
def test_compiled_model_is_three_graphs_over_all_ranks(training):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, x = network().train(training), torch.randn(6, 7, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    torch.testing.assert_close(compiled(x), by_hand(model, x), rtol=1e-12, atol=1e-12)
    for first in (5, 3, 1, 4, 2, 0):
        for second in (3, 1, 2, 0):
            with sampled_ranks(compiled, {"0": first, "2": second}):
                torch.testing.assert_close(compiled(x), by_hand(model, x, first, second), rtol=1e-12, atol=1e-12)
        with sampled_ranks(compiled, {"0": first}):
            torch.testing.assert_close(compiled(x), by_hand(model, x, first), rtol=1e-12, atol=1e-12)
    y, sampler = torch.randn(6, 3, dtype=torch.float64), RankSampler(compiled)
    for step in range(6):
        for mode in ("sampled", "full+sampled", "split"):
            got = lod_loss(compiled, x, y, F.mse_loss, sampler, step, mode)
            assert_same_loss(model, got, lod_loss(model, x, y, F.mse_loss, sampler, step, mode))
    assert len(graphs) <= 3
