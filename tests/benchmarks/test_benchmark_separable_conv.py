"""The one-way filters' reference, peers and counts, against sums written out and numbers counted by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _harness as harness
from benchmarks import separable_conv as family
from benchmarks._report import report

CPU = torch.device("cpu")
SIZES = (2, 3, 4, 6, 3, 2)  # N, C, O, n, k, rank


def by_hand(inputs):
    """The convolution tap by tap, its kernel term by term."""
    leaves = [t.clone().requires_grad_() for t in inputs.tensors]
    x, *factors, bias = leaves
    n, p = x.shape[-1], inputs.padding
    padded = torch.nn.functional.pad(x, (p,) * 4)
    y = bias[:, None, None].expand(x.shape[0], -1, n, n)
    for i in range(2 * p + 1):
        for j in range(2 * p + 1):
            if inputs.format == "seq":
                tap = factors[1][:, :, 0, j] @ factors[0][:, :, i, 0]
            else:
                out, inside, vertical, horizontal = factors
                tap = (out * vertical[i] * horizontal[j]) @ inside.T
            y = y + torch.einsum("oc,nchw->nohw", tap, padded[..., i : i + n, j : j + n])
    return y, *torch.autograd.grad(y, leaves, inputs.g)


@pytest.mark.parametrize("format", ["seq", "cp"])
def test_reference_is_the_sum_over_taps(format):
    inputs = family.make_inputs(format, *SIZES, CPU, torch.float64)
    assert max(harness.relative_errors(family.reference(inputs), by_hand(inputs))) < 1e-13


@pytest.mark.parametrize("mode", [harness.FORWARD, harness.BOTH])
@pytest.mark.parametrize("format", ["seq", "cp"])
def test_ours_and_peers_are_right_before_they_are_timed(format, mode):
    inputs = family.make_inputs(format, *SIZES, CPU)
    reference = family.reference(inputs)
    for name, who in {harness.OURS: family.ours, **family.peers(format)}.items():
        if name == family.TLTORCH:
            pytest.importorskip("tltorch", reason="tltorch is not installed")
        verdict = harness.check(who(inputs), mode, reference, 2e-6)
        assert verdict["status"] == "ok", (name, verdict)


@pytest.mark.parametrize("format", ["seq", "cp"])
def test_costs_are_what_torch_counts(format):
    inputs = family.make_inputs(format, *SIZES, CPU)
    found = family.work(format, *SIZES)
    for name, who in ((family.CHAIN, family.chained), (family.DENSE, family.dense)):
        built = who(inputs)  # where the dense kernel is made
        with FlopCounterMode(display=False) as counter:
            built.call(harness.FORWARD)
        assert found[harness.FORWARD]["costs"][name]["flops"] == counter.get_total_flops()
    costs = found[harness.BOTH]["costs"]
    assert costs[harness.OURS]["weights"] == sum(f.numel() for f in inputs.factors)
    assert costs[family.DENSE] == {"weights": 4 * 3 * 9, "flops": 6 * 4 * 3 * 9 * 2 * 36}
    # Two images of 36 points with 3 and 4 channels, the filters and the bias, of 4 bytes.
    assert found[harness.FORWARD]["bytes"] == 4 * (2 * 36 * 7 + costs[harness.OURS]["weights"] + 4)


def test_weights_arithmetic_and_time_have_a_column_each():
    case = next(case for case in family.cases("cpu") if case.quick)
    rows = harness.measure_case(case, harness.Settings(memory=False, quick=True, budget_s=0.01))
    text = report("separable_conv", {"rows": harness.rounded(rows), "scaling": []})
    header, _, first, second, *_ = text.splitlines()[2:]
    columns = [cell.strip() for cell in header.split("|")]
    assert {"weights", "FLOP", "time"} <= set(columns)
    cells = [dict(zip(columns, map(str.strip, line.split("|")), strict=True)) for line in (first, second)]
    assert [c["who"] for c in cells] == [harness.OURS, family.DENSE]
    assert [c["weights"] for c in cells] == ["126", "432"]


def test_what_is_kept_is_the_intermediate_or_nothing():
    inputs = family.make_inputs("seq", *SIZES, CPU)
    between = 4 * 2 * 2 * 6 * 6  # N, rank, n, n
    found = {name: family.kept_bytes(who(inputs), CPU) for name, who in family.peers("seq").items()}
    assert found == {family.DENSE: 0, family.CHAIN: between, family.RECOMPUTE: 0}
    rows = family.measure(harness.Settings(speed=False, quick=True))
    kept = [row["implementations"][harness.OURS].get("kept_bytes") for row in rows]
    assert kept == [None, 4 * 2 * 3 * 81, None, 3 * 4 * 2 * 3 * 81]
    assert "1.94 kB kept)" in report("separable_conv", {"rows": rows, "scaling": []})


def test_gpu_cases_cover_what_is_promised():
    cases = list(family.cases("cuda"))
    keys = ("format", "N", "C", "O", "n", "k", "rank")
    headline = [tuple(c.labels[key] for key in keys) for c in cases if c.headline]
    assert ("seq", 16, 64, 64, 256, 5, 32) in headline
    assert any(shape[0] == "cp" for shape in headline)
    assert any(c.labels["k"] == 3 and c.labels["rank"] == 64 for c in cases)
    assert any(c.quick for c in cases)
