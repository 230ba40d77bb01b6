"""The group lasso penalties and the proximal step."""

import pytest
import torch
from torch import nn

from torchlayers.maestro.layers import LowRankConv2d, LowRankLinear
from torchlayers.maestro.regularization import group_lasso, hgl_prox_, hierarchical_group_lasso
from torchlayers.testing import assert_close_rel


def layer_of(weight_in, weight_out):
    """A layer with these factors, as rows of numbers."""
    v, u = (torch.as_tensor(w, dtype=torch.float64) for w in (weight_in, weight_out))
    layer = LowRankLinear(max(v.shape[1], len(v)), max(u.shape[0], len(v)), False, max_rank=len(v), dtype=torch.float64)
    layer.weight_in, layer.weight_out = nn.Parameter(v), nn.Parameter(u)
    return layer


def random_layer(rank=5, rows=6, columns=7):
    return layer_of(torch.randn(rank, columns), torch.randn(rows, rank))


def tails(layer, rank=None):
    """The norms of all groups, one by one."""
    rank = layer.rank if rank is None else rank
    v, u = layer.weight_in[:rank], layer.weight_out[:, :rank]
    return [torch.linalg.norm(t) for b in range(rank) for t in (v[b:], u[:, b:])]


def test_known_values():
    layer = layer_of([[1, 4, 7], [2, 5, 8], [3, 6, 9]], [[1, 2, 3], [4, 5, 6]])
    assert hierarchical_group_lasso(layer).item() == pytest.approx(67.755484977, abs=1e-9)
    # As the released code has it, in float32.
    layer = layer_of([[1, 2, 3], [4, 5, 6]], [[1, 2], [3, 4]])
    assert hierarchical_group_lasso(layer).item() == pytest.approx(28.263720, abs=1e-5)
    assert layer.importance().tolist() == pytest.approx([52.249405, 39.242832], abs=1e-5)
    expected = 14**0.5 + 77**0.5 + 10**0.5 + 20**0.5
    assert group_lasso(layer).item() == pytest.approx(expected, abs=1e-12)


def test_sums_over_layers_and_terms_in_force():
    first, second = random_layer(), random_layer(4, 8, 5)
    conv = LowRankConv2d(4, 6, 3, groups=2, dtype=torch.float64)
    model = nn.Sequential(first, nn.Linear(3, 3), nn.ModuleList([second, conv]))
    expected = sum(tails(first) + tails(second) + tails(conv))
    assert_close_rel(hierarchical_group_lasso(model), expected)
    second.truncate_(2)
    with torch.no_grad():  # what is not in force does not count, whatever it holds
        second.weight_in[3] = 1e6
    assert_close_rel(hierarchical_group_lasso(model), sum(tails(first) + tails(second, 2) + tails(conv)))
    second.truncate_(0)
    assert_close_rel(hierarchical_group_lasso(model), sum(tails(first) + tails(conv)))


@pytest.mark.parametrize("penalty", [hierarchical_group_lasso, group_lasso])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_gradients(penalty, eps):
    layer = random_layer(3, 4, 5)
    parameters = dict(layer.named_parameters())

    def function(*values):
        for name, value in zip(parameters, values, strict=True):
            delattr(layer, name)
            setattr(layer, name, value)
        return penalty(layer, eps)

    assert torch.autograd.gradcheck(function, [p.detach().requires_grad_() for p in parameters.values()])


def test_a_zero_tail_has_a_gradient_of_zero():
    layer = random_layer()
    with torch.no_grad():
        layer.weight_in[2:], layer.weight_out[:, 3:] = 0, 0
    expected = torch.autograd.grad(sum(tails(layer)), [layer.weight_in, layer.weight_out])
    got = torch.autograd.grad(hierarchical_group_lasso(layer), [layer.weight_in, layer.weight_out])
    for a, b in zip(got, expected, strict=True):
        assert_close_rel(a, b)
    assert got[0][2:].count_nonzero() == 0
    with torch.no_grad():
        layer.weight_in.zero_()
    got = torch.autograd.grad(group_lasso(layer) + hierarchical_group_lasso(layer), layer.weight_in)[0]
    assert got.count_nonzero() == 0
    assert got.isfinite().all()


def test_smoothed_norms():
    layer = random_layer(3)
    expected = sum((t**2 + 0.25).sqrt() for t in tails(layer))
    assert_close_rel(hierarchical_group_lasso(layer, eps=0.5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_weights_are_summed_in_float32(dtype):
    layer = random_layer(5, 60, 70)
    with torch.no_grad():
        layer.weight_in.mul_(100)  # squared, above what float16 holds
    layer = layer.to(dtype)
    exact = sum(tails(layer.to(dtype).double()))
    layer = layer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = hierarchical_group_lasso(layer)
    assert penalty.dtype == torch.float32
    assert_close_rel(penalty, exact, rtol=1e-6)
    penalty.backward()
    assert layer.weight_in.grad.dtype == dtype


def test_a_shared_factor_counts_once():
    first, second = random_layer(), random_layer()
    second.weight_in = first.weight_in
    model = nn.ModuleList([first, second, first])
    expected = sum(tails(first)) + sum(tails(second)[1::2])
    assert_close_rel(hierarchical_group_lasso(model), expected)
    before = first.weight_in.detach().clone()
    alone = layer_of(before, first.weight_out.detach().clone())
    hgl_prox_(model, 0.4)
    assert torch.equal(first.weight_in, hgl_prox_(alone, 0.4).weight_in)


# The proximal step


def step_by_step(weight, tau):
    """Prox of the columns of ``weight``: the groups one after another, from the innermost."""
    weight = weight.clone()
    for b in reversed(range(weight.shape[1])):
        norm = torch.linalg.norm(weight[:, b:])
        weight[:, b:] *= max(0.0, 1 - tau / norm.item()) if norm > 0 else 0.0
    return weight


def test_known_proximal_point():
    layer = layer_of(torch.diag(torch.tensor([3.0, 2.0, 0.5])), torch.zeros(3, 3))
    hgl_prox_(layer, 0.6)
    expected = torch.diag(torch.tensor([2.45629, 1.14627, 0.0], dtype=torch.float64))
    torch.testing.assert_close(layer.weight_in.detach(), expected, rtol=0, atol=5e-6)
    assert layer.weight_in[2].count_nonzero() == 0
    assert layer.weight_out.count_nonzero() == 0


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.7, 2.0, 50.0])
def test_equals_the_groups_one_after_another(tau):
    layer = random_layer()
    v, u = layer.weight_in.detach().clone(), layer.weight_out.detach().clone()
    assert hgl_prox_(layer, tau) is layer
    torch.testing.assert_close(layer.weight_in.detach(), step_by_step(v.T, tau).T, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(layer.weight_out.detach(), step_by_step(u, tau), rtol=1e-13, atol=1e-14)
    if tau == 50:
        assert not layer.weight_in.any()


def test_minimises_its_objective():
    """½‖W − W0‖² + τ HGL(W) is strongly convex: any W lies at least ½‖W − W*‖² above the minimum W*."""
    model = nn.ModuleList([random_layer(3, 4, 4), random_layer(2, 3, 3)])
    start = [p.detach().clone() for p in model.parameters()]
    tau = 0.8

    def objective():
        distance = sum((p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True))
        return (distance / 2 + tau * sum(sum(tails(layer)) for layer in model)).item()

    hgl_prox_(model, tau)
    best, minimum = [p.detach().clone() for p in model.parameters()], objective()
    for scale in (1e-3, 0.1, 1.0, 5.0):
        for _ in range(40):
            directions = [scale * torch.randn_like(p) for p in best]
            with torch.no_grad():
                for p, b, d in zip(model.parameters(), best, directions, strict=True):
                    p.copy_(b + d)
            assert objective() >= minimum + sum(d.square().sum().item() for d in directions) / 2 - 1e-12


def test_proximal_gradient_descent_empties_the_tail():
    """min ½‖W − W0‖² + τ HGL by many small steps is the one big step."""
    layer, once = random_layer(3), random_layer(3)
    once.load_state_dict(layer.state_dict())
    target = [p.detach().clone() for p in layer.parameters()]
    for _ in range(300):
        with torch.no_grad():
            for p, t in zip(layer.parameters(), target, strict=True):
                p -= 0.1 * (p - t)
        hgl_prox_(layer, 0.1 * 1.2)
    hgl_prox_(once, 1.2)
    for p, q in zip(layer.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    assert (layer.weight_in == 0).equal(once.weight_in == 0)


def test_leaves_alone_what_is_not_in_force():
    layer = random_layer()
    layer.truncate_(3)
    before = layer_of(layer.weight_in[:3].detach().clone(), layer.weight_out[:, :3].detach().clone())
    hgl_prox_(layer, 0.3)
    hgl_prox_(before, 0.3)
    torch.testing.assert_close(layer.weight_in[:3], before.weight_in, rtol=1e-14, atol=0)
    assert layer.weight_in[3:].count_nonzero() == 0
    layer.truncate_(0)
    hgl_prox_(layer, 0.3)


@pytest.mark.parametrize("function", [hierarchical_group_lasso, group_lasso, hgl_prox_])
@pytest.mark.parametrize("value, kind", [(-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)])
def test_bad_arguments(function, value, kind):
    with pytest.raises(kind, match=r"eps|tau"):
        function(random_layer(), value)


@pytest.mark.parametrize("function", [hierarchical_group_lasso, group_lasso, lambda model: hgl_prox_(model, 1.0)])
def test_a_model_without_low_rank_layers(function):
    with pytest.raises(ValueError, match="low-rank layers"):
        function(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        function("model")


def test_weights_that_are_not_finite():
    good, bad = random_layer(), random_layer()
    with torch.no_grad():
        bad.weight_out[0, 2] = float("nan")
    before = good.weight_in.detach().clone()
    with pytest.raises(ValueError, match="finite"):
        hgl_prox_(nn.ModuleList([good, bad]), 0.1)
    assert torch.equal(good.weight_in, before)
