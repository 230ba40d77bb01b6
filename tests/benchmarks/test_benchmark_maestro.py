"""The low-rank benchmark's reference, peers and counts, against autograd in float64 and numbers counted by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _harness as harness
from benchmarks import maestro as family

CPU = torch.device("cpu")


@pytest.mark.parametrize(("m", "k", "n", "rank"), [(7, 5, 6, 2), (3, 8, 4, 4), (5, 4, 9, 1)])
def test_reference_is_autograd_of_the_dense_product(m, k, n, rank):
    inputs = family.make_inputs(m, k, n, rank, CPU, torch.float64)
    leaves = [t.clone().requires_grad_() for t in inputs.tensors]
    x, v, u, bias = leaves
    kept = torch.arange(v.shape[0]) < rank
    y = x @ ((u * kept) @ v).T + bias
    want = (y, *torch.autograd.grad(y, leaves, inputs.g))
    assert max(harness.relative_errors(family.reference(inputs), want)) < 1e-13
    assert v.shape[0] == min(2 * rank, k, n)


@pytest.mark.parametrize("mode", [harness.FORWARD, harness.BOTH])
@pytest.mark.parametrize("who", [family.ours, *family.PEERS.values()])
def test_ours_and_peers_are_right_before_they_are_timed(who, mode):
    inputs = family.make_inputs(9, 6, 7, 3, CPU)
    verdict = harness.check(who(inputs), mode, family.reference(inputs), 1e-6)
    assert verdict["status"] == "ok", verdict


def test_work_is_what_torch_counts():
    inputs = family.make_inputs(9, 6, 7, 3, CPU)
    found = family.work(9, 6, 7, 3, torch.float32)
    for mode in (harness.FORWARD, harness.BOTH):
        with FlopCounterMode(display=False) as counter:
            family.two_linear(inputs).call(mode)
        assert found[mode]["flops"] == counter.get_total_flops()
    # 9 rows in and out, two factors and a bias, of 4 bytes.
    assert found[harness.FORWARD]["bytes"] == 4 * (9 * 6 + 9 * 7 + 3 * 6 + 7 * 3 + 7)


def test_gpu_cases_cover_what_is_promised():
    cases = list(family.cases("cuda"))
    shapes = {(c.labels["M"], c.labels["K"], c.labels["N"], c.labels["rank"]) for c in cases}
    assert {(m, 1024, 1024, 128) for m in (8192, 16384, 65536)} <= shapes
    assert any(rank <= 64 for *_, rank in shapes)
    assert any(case.headline for case in cases)
    assert any(case.quick for case in cases)
