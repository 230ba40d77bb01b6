"""The ring attention benchmark's reference, implementations and counts, against SDPA and known numbers."""

import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import _harness as harness
from benchmarks import _report as report
from benchmarks import ring_attention as family

CPU = torch.device("cpu")
# (layout, causal): 37 tokens over 3 ranks, nothing divides.
MASKS = [("zigzag", True), ("striped", True), ("contiguous", False)]


def make(kind, causal, dtype=torch.float32):
    return family.make_inputs(4, 2, 37, 8, 3, CPU, dtype, kind, causal)


@pytest.mark.parametrize(("kind", "causal"), MASKS)
def test_reference_is_sdpa_in_float64(kind, causal):
    inputs = make(kind, causal, torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    want = (out, *torch.autograd.grad(out, leaves, inputs.g))
    runs = [run for rank in range(3) for run in inputs.layout.runs(rank)]
    cut = [x[:, :, list(run)] for x in want for run in runs]
    found = family.reference(inputs)
    assert len(found) == len(cut)
    assert max(harness.relative_errors(found, cut)) < 1e-13


@pytest.mark.parametrize(("kind", "causal"), MASKS)
@pytest.mark.parametrize(
    "who",
    [
        family.ring("torch"),
        family.ring("flash"),
        family.blocks("torch"),
        family.blocks("flash"),
        functools.partial(family.Blocks, name="torch", rounded=True),
        family.sdpa,
        functools.partial(family.Ring, delay=1e-3),
    ],
)
def test_ours_and_peers_are_right_before_they_are_timed(who, kind, causal):
    inputs = make(kind, causal)
    for mode in (harness.FORWARD, harness.BOTH):
        verdict = harness.check(who(inputs), mode, family.reference(inputs), 1e-5)
        assert verdict["status"] == "ok", verdict


def test_a_block_that_cannot_is_refused():
    with pytest.raises(ValueError, match="the cudnn block does not do tensors on cpu"):
        family.Blocks(make("zigzag", True), "cudnn")


def test_every_pair_counts_two_products_forward_and_seven_in_all():
    found = family.work(32, 65536, 128, True, torch.bfloat16)
    assert found[harness.FORWARD]["flops"] == 4 * 32 * 128 * (65536 * 65537 // 2)
    assert found[harness.BOTH]["flops"] * 2 == found[harness.FORWARD]["flops"] * 7
    full = family.work(2, 10, 4, False, torch.float32)[harness.FORWARD]
    assert full == {"flops": 4 * 2 * 4 * 100, "math": "tf32x3"}


def test_gpu_cases_have_the_shape_that_is_compared():
    cases = list(family.cases("cuda"))
    headline = [case for case in cases if case.headline]
    assert [case.labels["op"] for case in headline] == ["blocks", "ring"]
    for case in headline:
        assert case.labels | {"op": ""} == {
            "op": "", "Hq": 32, "Hkv": 8, "d": 128, "layout": "causal zigzag", "c": 8192, "P": 8,
        }  # fmt: skip
        assert {"flash blocks", "cuDNN blocks", *family.ONE_CALL} <= set(case.peers)
        assert case.modes == (harness.FORWARD, harness.BOTH)


def test_precision_is_flat_in_the_number_of_ranks():
    rows = {(r["mode"], r["case"]["P"]): r for p in (2, 8) for r in family.precision(p, CPU, range(2), length=256)}
    for (mode, _), row in rows.items():
        entries = row["implementations"]
        bound = 1.02 if mode.startswith("mean") else 1.25
        assert entries["ours on one rank"]["ratio"] > 1 / bound
        assert entries["ours on one rank"]["error"] == pytest.approx(
            entries[harness.OURS]["error"] * entries["ours on one rank"]["ratio"], rel=0.1
        )
    merged = {p: rows["mean error of the output", p]["implementations"] for p in (2, 8)}
    name = "hops rounded, merged in float32"
    assert merged[8][name]["ratio"] > merged[2][name]["ratio"] > 1


def test_errors_that_precision_reports():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    found = torch.tensor([1.5, -4.0])
    assert family.mean_error(found, exact) == 0.25
    assert family.largest_error(found, exact) == 0.125


def test_overlap_compares_with_the_larger_and_with_the_sum(monkeypatch):
    """With the clock replaced: calls without a delay take 8 s, twice that with gradients, and 10 s with a delay."""

    def seconds(built, mode, rounds):
        delays.append(built.world.delay)
        return [10.0 if built.world.delay else 8.0 if mode == harness.FORWARD else 16.0] * rounds

    delays = []
    monkeypatch.setattr(family, "_seconds", seconds)
    forward, both = family.overlap(4, 64, rounds=2)
    assert delays == [0.0, 0.0, 2.0, 0.0, 2.0]  # a hop of the forward pass is a fourth of 8 s
    # Three messages of 2 s forward, and four more with gradients.
    for row, larger, total in ((forward, 8.0, 14.0), (both, 16.0, 30.0)):
        entries = row["implementations"]
        assert entries[harness.OURS]["ms"] == 10_000
        assert entries["the larger of compute and communication"]["ms"] == pytest.approx(1e3 * larger)
        assert entries["the larger of compute and communication"]["ratio"] == pytest.approx(larger / 10)
        assert entries["compute, then communication"]["ms"] == pytest.approx(1e3 * total)


def test_seconds_are_taken_of_calls_after_the_first():
    calls = []

    class Counted(harness.Built):
        def call(self, mode):
            calls.append(mode)

    found = family._seconds(Counted(lambda: None), harness.BOTH, 3)
    assert len(found) == 3 and min(found) >= 0
    assert calls == [harness.BOTH] * 4


def test_the_model_stands_beside_published_figures_and_says_so():
    forward, both = family.modelled()
    assert forward["mode"] == "forward, modelled"
    # Half of 4 · 32 · 8192² · 128 operations a hop at 600 TFLOP/s, eight hops, all messages hidden.
    ideal = 8 * 0.5 * 4 * 32 * 8192**2 * 128 / 600e12 * 1e3
    assert forward["implementations"]["the block alone, as assumed"]["ms"] == pytest.approx(ideal)
    assert forward["implementations"][harness.OURS]["ms"] == pytest.approx(ideal, rel=1e-3)
    published = both["implementations"]["ring-flash-attention, zigzag, 8 × H800"]
    assert report.state(published) == "published: 90.2 % of ideal flash attention"
    text = report.report("ring_attention", {"rows": [forward, both], "scaling": []})
    assert "published: 85.2 % of ideal flash attention" in text


def test_a_part_that_fails_is_reported_and_the_others_run(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(family, "cases", lambda device: iter(()))
    monkeypatch.setattr(family, "precision", broken)
    rows = family.measure(harness.Settings(quick=True, speed=False))
    assert [row["implementations"][harness.OURS]["status"] for row in rows] == ["failed", "failed", "ok", "ok"]
    failed = harness.ours_failed({"rows": rows})
    assert failed[0].endswith("failed (RuntimeError: no)")


def test_one_core_is_given_back():
    os = family.os
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no sched_setaffinity")
    before = os.sched_getaffinity(0)
    with family.one_core(True):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
