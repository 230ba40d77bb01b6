import math

import numpy as np
import pytest
import torch

from torchlayers.tfno import H1Loss, LpLoss


def waves(n=64):
    h, w = torch.meshgrid(torch.arange(n).double() / n, torch.arange(n).double() / n, indexing="ij")
    target = torch.sin(2 * math.pi * h)
    return (target + 0.1 * torch.sin(8 * math.pi * w))[None, None], target[None, None]


def test_closed_form():
    pred, target = waves()
    assert LpLoss(2)(pred, target).item() == pytest.approx(0.1, rel=1e-7)
    # Central differences turn the wavenumber m into N sin(2 pi m / N).
    k1, k4 = (64 * math.sin(2 * math.pi * m / 64) for m in (1, 4))
    expected = 0.1 * math.sqrt((1 + k4**2) / (1 + k1**2))
    assert H1Loss(2)(pred, target).item() == pytest.approx(expected, rel=1e-7)
    assert expected == pytest.approx(0.38587814, rel=1e-7)


@pytest.mark.parametrize("p", [1, 2, 3.5, math.inf])
def test_lp_is_a_mean_of_per_sample_ratios(p):
    pred, target = torch.randn(3, 2, 5, 4, dtype=torch.float64), torch.randn(3, 2, 5, 4, dtype=torch.float64)
    ratios = [
        np.linalg.norm((a - b).numpy().ravel(), p) / np.linalg.norm(b.numpy().ravel(), p)
        for a, b in zip(pred, target, strict=True)
    ]
    torch.testing.assert_close(LpLoss(2, p, reduction="none")(pred, target), torch.tensor(ratios, dtype=torch.float64))
    assert LpLoss(2, p)(pred, target).item() == pytest.approx(np.mean(ratios))
    assert LpLoss(2, p, reduction="sum")(pred, target).item() == pytest.approx(np.sum(ratios))


@pytest.mark.parametrize("periodic", [True, False, (True, False), (False, True)])
def test_h1_equals_numpys_differences(periodic):
    pred, target = torch.randn(2, 1, 6, 5, dtype=torch.float64), torch.randn(2, 1, 6, 5, dtype=torch.float64)
    flags = (periodic,) * 2 if isinstance(periodic, bool) else periodic

    def norm(u):
        total = (u**2).sum()
        for axis, flag in enumerate(flags):
            n = u.shape[axis]
            padded = np.pad(u, [(1, 1) if a == axis else (0, 0) for a in range(2)], mode="wrap") if flag else u
            derivative = np.gradient(padded, 1 / n, axis=axis, edge_order=2)
            if flag:
                derivative = np.take(derivative, range(1, n + 1), axis=axis)
            total += (derivative**2).sum()
        return np.sqrt(total)

    expected = [norm(a - b) / norm(b) for a, b in zip(pred[:, 0].numpy(), target[:, 0].numpy(), strict=True)]
    values = H1Loss(2, periodic, reduction="none")(pred, target)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("loss", [LpLoss(1), LpLoss(1, 1), H1Loss(1), H1Loss(1, False)])
def test_gradients_also_at_the_minimum(loss):
    target = torch.randn(2, 1, 6, dtype=torch.float64)
    pred = torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: loss(u, target), (pred,))
    exact = target.clone().requires_grad_()
    loss(exact, target).backward()
    assert exact.grad.isfinite().all()
    assert not list(loss.parameters())


def test_half_precision_and_empty_batches():
    pred, target = torch.randn(2, 1, 64, 64), torch.randn(2, 1, 64, 64)
    low = LpLoss()(pred.half(), target.half())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(LpLoss()(pred, target).item(), rel=1e-3)
    assert H1Loss()(pred[:0], target[:0]).item() == 0


def test_bad_input():
    u = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"pred must have the shape of target, \(2, 1, 8, 8\), got \(1, 1, 8, 8\)"):
        LpLoss()(u[:1], u)
    with pytest.raises(ValueError, match="target must have a batch and 2 grid dimensions"):
        LpLoss()(u, u[0, 0])
    with pytest.raises(TypeError, match="pred must be a tensor"):
        H1Loss()([1.0], u)
    with pytest.raises(ValueError, match="p must be at least 1"):
        LpLoss(p=0.5)
    with pytest.raises(TypeError, match="p must be a number"):
        LpLoss(p="2")
    with pytest.raises(ValueError, match="d must be at least 1"):
        LpLoss(d=0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        LpLoss(reduction="avg")
    with pytest.raises(ValueError, match="periodic must have d = 2 entries"):
        H1Loss(periodic=(True,))
    with pytest.raises(TypeError, match="periodic must be a bool"):
        H1Loss(periodic=(1, 0))
    with pytest.raises(TypeError, match="periodic must be a bool"):
        H1Loss(periodic=1)
    with pytest.raises(TypeError, match="pred must have a floating dtype"):
        LpLoss()(u.long(), u)
    with pytest.raises(ValueError, match="at least 3 points"):
        H1Loss()(u[..., :2], u[..., :2])
