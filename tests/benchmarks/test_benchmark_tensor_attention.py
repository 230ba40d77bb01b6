"""The tensor attention benchmark's references, peers and counts, against the family's definition and known numbers."""

import math

import pytest
import torch

from benchmarks import _harness as harness
from benchmarks import tensor_attention as family
from torchlayers.tensor_attention import reference as definition

CPU = torch.device("cpu")
WINDOWS = [None, (3, 5)]


def with_gradients(inputs, **options):
    leaves = [x.double().requires_grad_() for x in inputs.tensors]
    out, _ = definition.tensor_attention(*leaves, **options)
    return out, *torch.autograd.grad(out, leaves, inputs.g.double())


@pytest.mark.parametrize("windows", WINDOWS)
def test_reference_is_the_definition(windows):
    inputs = family.make_inputs(2, 4, 2, 11, 6, windows, CPU)
    options = {} if windows is None else {"window1": (windows[0] - 1, 0), "window2": (windows[1] - 1, 0)}
    want = with_gradients(inputs, **options)
    assert max(harness.relative_errors(family.reference(inputs), want)) < 1e-13


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("peer", [family.ours, family.sdpa_on_pairs, family.loop_over_queries])
def test_ours_and_peers_are_right_before_they_are_timed(peer, windows):
    inputs = family.make_inputs(1, 2, 2, 9, 6, windows, CPU)
    for mode in (harness.FORWARD, harness.BOTH):
        verdict = harness.check(peer(inputs), mode, family.reference(inputs), 1e-5)
        assert verdict["status"] == "ok", verdict


@pytest.mark.parametrize("windows", WINDOWS)
def test_the_einsum_without_its_compiler(windows, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    inputs = family.make_inputs(1, 4, 2, 9, 6, windows, CPU)
    verdict = harness.check(family.compiled_einsum(inputs), harness.BOTH, family.reference(inputs), 1e-5)
    assert verdict["status"] == "ok", verdict


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("degree", [2, 4])
def test_polynomial_reference(causal, degree):
    inputs = family.make_bounded(2, 70, 3, degree, causal, CPU)
    leaves = [x.double().requires_grad_() for x in inputs.tensors]
    logits = definition.logits(*leaves[:3], "trilinear") / 3
    weights = sum(logits**t / math.factorial(t) for t in range(degree + 1))
    if causal:
        ok = torch.ones(70, 70, dtype=torch.bool).tril()
        weights = weights * (ok[:, :, None] & ok[:, None])
    weights = weights / weights.sum((-1, -2), keepdim=True)
    out = torch.einsum("bhijk,bhjc,bhkc->bhic", weights, *leaves[3:])
    want = (out, *torch.autograd.grad(out, leaves, inputs.g.double()))
    assert max(harness.relative_errors(family.polynomial_reference(inputs), want)) < 1e-12
    for make in (family.polynomial, family.exact) if degree == 4 else (family.polynomial,):
        verdict = harness.check(make(inputs), harness.BOTH, want, 1e-3)
        assert verdict["status"] == "ok", verdict


def test_pairs_and_operations():
    assert family.pairs(4, (3, 2)) == 17
    assert family.pairs(1024, (32, 512)) == 12_585_648
    assert family.pairs(4096, (32, 512)) == 62_917_296
    found = family.work(4, 64, 1, 4096, 128, (32, 512), torch.bfloat16)
    assert found[harness.FORWARD]["flops"] == pytest.approx(8.247e12, rel=1e-3)
    assert found[harness.BOTH]["flops"] == pytest.approx(6.5 * found[harness.FORWARD]["flops"])
