"""Progressive shrinking, and the statistics of batch norm."""

import copy
import functools

import pytest
import torch
from torch import nn

from torchlayers.maestro.layers import LowRankConv2d, LowRankLinear
from torchlayers.maestro.ordered import RankSampler, lod_loss
from torchlayers.maestro.regularization import hierarchical_group_lasso
from torchlayers.maestro.shrink import progressive_shrink, recalibrate_bn
from torchlayers.testing import assert_close_rel


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = LowRankConv2d(2, 6, 3, padding=1, dtype=torch.float64)
        self.hidden = LowRankLinear(6, 5, dtype=torch.float64)
        self.head = LowRankLinear(5, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(torch.tanh(self.conv(x)).mean((2, 3)))))


def decaying(model):
    """Terms a hundred times smaller one after another: thresholds between them."""
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "weight_in"):
                scale = 0.1 ** torch.arange(layer.max_rank, dtype=torch.float64)
                layer.weight_in.copy_(nn.functional.normalize(layer.weight_in) * scale[:, None])
                layer.weight_out.copy_(nn.functional.normalize(layer.weight_out, dim=0) * scale)
    return model


def batch():
    return torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(3, (8,))


def train(model, optimizer, steps, *, start=0):
    sampler = RankSampler(model)
    for step in range(start, start + steps):
        x, y = (t.clone() for t in BATCHES[step % len(BATCHES)])
        optimizer.zero_grad()
        loss = lod_loss(model, x, y, nn.functional.cross_entropy, sampler, step, "full+sampled")
        (loss + 1e-3 * hierarchical_group_lasso(model)).backward()
        optimizer.step()


_state = torch.random.get_rng_state()
BATCHES = [batch() for _ in range(4)]
torch.random.set_rng_state(_state)


def test_keeps_the_terms_of_enough_importance():
    model = decaying(Network())
    assert progressive_shrink(model, 0.0) == {"conv": (6, 6), "hidden": (5, 5), "head": (3, 3)}
    before = copy.deepcopy(model)
    # Term b has importance 100^-b, and the tails after it add about a hundredth of that.
    assert progressive_shrink(model, 0.9e-4) == {"conv": (6, 3), "hidden": (5, 3), "head": (3, 3)}
    for name in ("conv", "hidden", "head"):
        layer, old = getattr(model, name), getattr(before, name)
        assert layer.rank == 3
        assert layer.max_rank == old.max_rank
        assert torch.equal(layer.weight_in[:3], old.weight_in[:3])
        assert torch.equal(layer.weight_out[:, :3], old.weight_out[:, :3])
        assert layer.weight_in[3:].count_nonzero() == layer.weight_out[:, 3:].count_nonzero() == 0
        old.truncate_(3)
    x, _ = batch()
    assert torch.equal(model(x), before(x))
    assert progressive_shrink(model, 0.9e-4) == {"conv": (3, 3), "hidden": (3, 3), "head": (3, 3)}
    restored = Network()
    restored.load_state_dict(model.state_dict())
    assert [layer.rank for layer in (restored.conv, restored.hidden, restored.head)] == [3, 3, 3]
    assert torch.equal(restored(x), model(x))


def test_down_to_the_bias():
    model = decaying(Network())
    assert progressive_shrink(model, 10.0, physical=True) == {"conv": (6, 0), "hidden": (5, 0), "head": (3, 0)}
    x, y = batch()
    assert torch.equal(model(x), model.head.bias.expand(8, 3))
    nn.functional.cross_entropy(model(x), y).backward()
    assert model.hidden.weight_in.grad.shape == (0, 6)


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": functools.partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_alike_after_logical_and_physical_shrinking(name):
    models = [Network()]
    models.append(copy.deepcopy(models[0]))
    optimizers = []
    for model in models:
        groups = [{"params": [model.conv.weight_out, *model.head.parameters()], "lr": 5e-3}]
        rest = {id(p) for p in groups[0]["params"]}
        groups.append({"params": [p for p in model.parameters() if id(p) not in rest]})
        optimizers.append(OPTIMIZERS[name](groups))
    for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        train(model, optimizer, 3)
        for layer in (model.conv, model.hidden, model.head):
            layer.truncate_(4 if layer is not model.head else 3)  # logically, before: it is cut as well
        with torch.no_grad():
            model.hidden.weight_in[2:] *= 1e-6
            model.head.weight_out[:, 1:] *= 1e-6
        shrunk = progressive_shrink(model, 1e-4, optimizer=optimizer, physical=k == 1)
        assert shrunk == {"conv": (4, 4), "hidden": (4, 2), "head": (3, 1)}
        if name == "sgd" and k == 0:
            momentum = optimizer.state[model.hidden.weight_in]["momentum_buffer"]
            assert momentum[:2].any()
            assert not momentum[2:].any()
        schedule.step()
        train(model, optimizer, 4, start=3)
        schedule.step()
        train(model, optimizer, 4, start=7)
    logical, physical = models
    for layer, rank in (("conv", 4), ("hidden", 2), ("head", 1)):
        a, b = getattr(logical, layer), getattr(physical, layer)
        assert b.max_rank == b.rank == a.rank == rank
        torch.testing.assert_close(b.weight_in, nn.Parameter(a.weight_in[:rank]), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(b.weight_out, nn.Parameter(a.weight_out[:, :rank]), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(a.bias, b.bias, rtol=1e-11, atol=1e-12)
    x, _ = batch()
    assert_close_rel(physical(x), logical(x), rtol=1e-11)
    # The optimizer holds what the model does, and nothing else.
    held = [id(p) for group in optimizers[1].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in physical.parameters())
    assert {id(p) for p in optimizers[1].state} == set(held)
    assert [len(g["params"]) for g in optimizers[0].param_groups] == [
        len(g["params"]) for g in optimizers[1].param_groups
    ]


def test_gradients_and_flags_are_cut_along():
    model = decaying(Network())
    model.head.requires_grad_(False)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    expected = model.hidden.weight_out.grad[:, :2].clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    progressive_shrink(model, 0.9e-2, optimizer=optimizer, physical=True)
    assert torch.equal(model.hidden.weight_out.grad, expected)
    assert model.hidden.weight_out.requires_grad
    assert not model.head.weight_in.requires_grad
    assert model.head.weight_in.grad is None
    optimizer.step()


@pytest.mark.parametrize("physical", [False, True])
def test_shared_factors_stay_shared(physical):
    first, second = decaying(LowRankLinear(5, 4)), decaying(LowRankLinear(5, 4))
    with torch.no_grad():
        second.weight_out[:, 1:] *= 1e-4
    second.weight_in = first.weight_in
    model = nn.ModuleDict({"a": first, "b": second, "again": first})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert progressive_shrink(model, 0.9e-4, optimizer=optimizer, physical=physical) == {"a": (4, 3), "b": (4, 3)}
    assert second.weight_in is first.weight_in
    assert model["again"] is first
    assert len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)


@pytest.mark.parametrize("value, kind", [(-1e-5, ValueError), (float("inf"), ValueError), (None, TypeError)])
def test_bad_thresholds(value, kind):
    with pytest.raises(kind, match="threshold"):
        progressive_shrink(Network(), value)


class Odd(torch.optim.SGD):
    """Keeps one number a row, which could be either of the factors' dimensions."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = p.detach().flatten(1).sum(1) if p.ndim > 1 else p.detach().clone()


@pytest.mark.parametrize("physical", [False, True])
def test_bad_arguments_leave_the_model_as_it_was(physical):
    model = decaying(Network())
    options = {"physical": physical}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="optimizer"):
        progressive_shrink(model, 1e-3, optimizer=[], **options)
    with pytest.raises(ValueError, match="optimizer must hold the model's factors"):
        progressive_shrink(model, 1e-3, optimizer=torch.optim.SGD([model.conv.bias], lr=1.0), **options)
    odd = Odd(model.parameters(), lr=1.0)
    odd.step()
    with pytest.raises(ValueError, match="'rows' of Odd"):
        progressive_shrink(model, 1e-3, optimizer=odd, **options)
    with pytest.raises(ValueError, match="low-rank layers"):
        progressive_shrink(nn.Linear(2, 2), 1e-3, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        model.hidden.weight_in[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"finite weights.*hidden"):
        progressive_shrink(model, 1e-3, **options)
    assert model.conv.rank == 6


# Batch norm


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.3, dtype=torch.float64)
        self.drop = nn.Dropout(0.5)
        self.last = nn.BatchNorm1d(3, momentum=None, dtype=torch.float64)
        self.free = nn.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64)
        self.calls = []

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        return self.free(self.last(self.drop(self.norm(x)).mean((2, 3))))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()  # frozen, as detectors have it
        return self


def statistics(module):
    return module.running_mean.clone(), module.running_var.clone(), module.num_batches_tracked.clone()


def images(count=5):
    return [torch.randn(4, 3, 2, 2, dtype=torch.float64) * (k + 1) + k for k in range(count)]


def check_statistics(model, batches):
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    var = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches]).mean(0)
    assert_close_rel(model.norm.running_mean, mean)
    assert_close_rel(model.norm.running_var, var)
    assert model.norm.num_batches_tracked == len(batches)
    weight, bias = model.norm.weight.detach(), model.norm.bias.detach()
    hidden = [
        (b - b.mean((0, 2, 3), keepdim=True)) / (b.var((0, 2, 3), False, keepdim=True) + model.norm.eps).sqrt()
        for b in batches
    ]
    means = torch.stack([(h * weight[:, None, None] + bias[:, None, None]).mean((2, 3)).var(0) for h in hidden])
    assert_close_rel(model.last.running_var, means.mean(0), rtol=1e-12)  # without dropout


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_means_over_batches(training):
    model = Normed().train(training)
    model(images(1)[0])
    model.calls.clear()
    modes = [m.training for m in model.modules()]
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = images()
    assert recalibrate_bn(model, batches) is None
    check_statistics(model, batches)
    assert [m.training for m in model.modules()] == modes
    assert (model.norm.momentum, model.last.momentum) == (0.3, None)
    assert model.calls == [False] * 5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    recalibrate_bn(model, ((b, "label") for b in batches), num_batches=3)
    check_statistics(model, batches[:3])
    recalibrate_bn(model, [{"x": b} for b in batches])
    check_statistics(model, batches)
    recalibrate_bn(model, [("label", b) for b in batches[1:]], forward=lambda m, sample: m(sample[1]))
    check_statistics(model, batches[1:])


def test_errors_bring_everything_back():
    model = Normed().train()
    model(images(1)[0])
    before, modes = [statistics(model.norm), statistics(model.last)], [m.training for m in model.modules()]

    def loader():
        yield images(1)[0]
        raise OSError("disk")

    for batches, kind in ((loader(), OSError), ([], ValueError)):
        with pytest.raises(kind, match=r"disk|at least one batch"):
            recalibrate_bn(model, batches)
        for got, expected in zip([statistics(model.norm), statistics(model.last)], before, strict=True):
            assert all(map(torch.equal, got, expected))
        assert [m.training for m in model.modules()] == modes
        assert model.norm.momentum == 0.3
    with pytest.raises(ValueError, match="num_batches"):
        recalibrate_bn(model, images(), 0)


def test_nothing_to_recalibrate():
    def loader():
        raise AssertionError("read")
        yield

    recalibrate_bn(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), loader())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        recalibrate_bn("model", [])
