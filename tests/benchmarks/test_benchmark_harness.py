"""The harness on cases whose answers are known: ratios, exponents, and peers that are missing, broken or wrong."""

import json
import math

import pytest
import torch

from benchmarks import _harness as harness
from benchmarks._harness import BOTH, FORWARD, OURS, Built, Case, Settings
from benchmarks._report import duration, report, size


def squares(x):
    """x² elementwise, differentiable in x, with a cotangent of ones."""
    leaf = x.clone().requires_grad_()
    return Built(lambda: leaf * leaf, [leaf], torch.ones_like(leaf))


def wrong_gradient(x):
    leaf = x.clone().requires_grad_()
    return Built(lambda: leaf.detach() ** 2 + (leaf - leaf.detach()), [leaf], torch.ones_like(leaf))


def missing(x):
    import a_package_that_nobody_has  # noqa: F401


def failing(x):
    def forward():
        raise RuntimeError("out of luck\nsecond line")

    return Built(forward, [x], None)


def make_case(peers=None, ours=squares, n=8, **options):
    return Case(
        labels={"kind": "squares", "n": n},
        inputs=lambda device: torch.arange(1.0, n + 1, device=device),
        reference=lambda x: (x.double() ** 2, 2 * x.double()),
        ours=ours,
        peers=peers or {},
        tolerance=1e-6,
        **options,
    )


QUICK = Settings(budget_s=0.0, memory=False)


def test_a_row_holds_times_ratios_and_errors_of_ours_and_of_a_peer():
    rows = harness.measure_case(make_case({"peer": squares}, work={BOTH: {"bytes": 64, "flops": 8}}), QUICK)
    assert [row["mode"] for row in rows] == [FORWARD, BOTH]
    for row in rows:
        ours, peer = row["implementations"][OURS], row["implementations"]["peer"]
        assert ours["status"] == peer["status"] == "ok"
        assert ours["error"] == 0.0
        assert ours["ms_p20"] <= ours["ms"] <= ours["ms_p80"]
        assert peer["ratio_p20"] <= peer["ratio"] <= peer["ratio_p80"]
        assert "ratio" not in ours
    assert rows[1]["implementations"][OURS]["gbps"] == pytest.approx(64e-6 / rows[1]["implementations"][OURS]["ms"])
    assert "gbps" not in rows[0]["implementations"][OURS]


def test_missing_and_failing_peers_are_named_and_ours_is_still_timed():
    row = harness.measure_case(make_case({"absent": missing, "broken": failing}), QUICK)[0]
    assert row["implementations"]["absent"] == {"status": "not installed", "detail": "a_package_that_nobody_has"}
    assert row["implementations"]["broken"] == {"status": "failed", "detail": "RuntimeError: out of luck"}
    assert row["implementations"][OURS]["ms"] > 0
    text = report("squares", {"rows": [row], "scaling": []})
    assert "not installed" in text
    assert "failed: RuntimeError: out of luck" in text


def test_a_wrong_result_is_not_timed():
    calls = []

    def wrong(x):
        built = squares(x)
        return Built(lambda: calls.append(1) or built.forward() * 1.001, built.leaves, built.cotangent)

    forward, both = harness.measure_case(make_case({"wrong": wrong, "half": wrong_gradient}), QUICK)
    for row in (forward, both):
        entry = row["implementations"]["wrong"]
        assert entry["status"] == "wrong"
        assert "ms" not in entry
        assert entry["error"] == pytest.approx(1e-3, rel=1e-2)
    assert len(calls) == 2  # the two checks
    assert forward["implementations"]["half"]["status"] == "ok"
    assert both["implementations"]["half"]["status"] == "wrong"


def test_ours_wrong_has_no_ratios_and_is_reported_as_failed():
    row = harness.measure_case(make_case({"peer": squares}, ours=wrong_gradient), QUICK)[1]
    assert row["implementations"][OURS]["status"] == "wrong"
    assert "ratio" not in row["implementations"]["peer"]
    assert row["implementations"]["peer"]["ms"] > 0
    assert harness.ours_failed({"rows": [row]}) == [
        "kind=squares n=8 forward+backward: wrong (relative error 9.1e-01, at most 1e-06 allowed)"
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_never_pass(bad):
    built = Built(lambda: torch.tensor([1.0, bad]))
    verdict = harness.check(built, FORWARD, (torch.tensor([1.0, 2.0], dtype=torch.float64),), tolerance=1e3)
    assert verdict["status"] == "wrong"


def test_errors_of_complex_results_kept_as_real_pairs_and_of_wrong_shapes():
    reference = torch.randn(3, 2, dtype=torch.complex128)
    assert harness.relative_errors([torch.view_as_real(reference)], [reference]) == [0.0]
    assert harness.relative_errors([reference[:2]], [reference]) == [math.inf]
    assert harness.relative_errors([2 * reference], [reference]) == [pytest.approx(1.0)]


def test_summarise_pairs_the_samples():
    # A slow second round hits both: the paired ratio is 2 throughout.
    result = harness.summarise({OURS: [1.0, 10.0, 1.0], "peer": [2.0, 20.0, 2.0]})
    assert result["peer"]["ratio"] == result["peer"]["ratio_p20"] == result["peer"]["ratio_p80"] == 2.0
    assert result[OURS]["ms"] == 1.0


def test_interleave_alternates_and_keeps_within_the_budget():
    order, now = [], [0.0]

    def sampler(name, seconds):
        def sample():
            order.append(name)
            now[0] += seconds
            return seconds

        return sample

    samples = harness.interleave({"a": sampler("a", 1), "b": sampler("b", 2)}, 20, clock=lambda: now[0])
    assert samples == {"a": [1] * 6, "b": [2] * 6}
    assert "".join(order) == "ab" + "abba" * 3


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_fit_exponent_recovers_a_power_law(exponent):
    sizes = [16, 32, 128]
    assert harness.fit_exponent(sizes, [3.7 * n**exponent for n in sizes]) == pytest.approx(exponent)


def test_fit_exponent_refuses_what_has_no_slope():
    with pytest.raises(ValueError, match="two distinct sizes"):
        harness.fit_exponent([4, 4], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        harness.fit_exponent([4, 8], [1.0, 0.0])


def test_scaling_groups_by_the_other_labels():
    def row(n, width, factor):
        entry = {"status": "ok", "ms": factor * n**2, "peak_bytes": width * n}
        return {
            "case": {"n": n, "width": width}, "mode": FORWARD, "scale": "n", "implementations": {OURS: entry, "x": {}}
        }  # fmt: skip

    fits = harness.scaling([row(n, w, w) for w in (1, 2) for n in (4, 8, 16)] + [row(4, 3, 1), row(8, 3, 1)])
    assert [fit["case"] for fit in fits] == [{"width": 1}, {"width": 2}]  # two points make no fit
    for fit in fits:
        assert list(fit["implementations"]) == [OURS]
        assert fit["implementations"][OURS]["time"] == pytest.approx(2.0)
        assert fit["implementations"][OURS]["memory"] == pytest.approx(1.0)


def test_peak_memory_counts_what_lives_at_once():
    def run():
        a = torch.empty(250_000)
        b = a + 1  # 2 MB live
        del a
        return torch.cat([b, b, b])  # 1 MB and 3 MB live

    assert harness.peak_bytes(run, torch.device("cpu")) == pytest.approx(4e6, rel=1e-3)


def test_rates_against_a_roofline():
    peaks = harness.device_peaks("NVIDIA H100 80GB HBM3")
    assert harness.device_peaks("some CPU") is None
    ms = 2 * 3.35e9 / 3.35e12 * 1e3  # twice the time that the bytes need
    result = harness.rates({"bytes": 3.35e9, "flops": 1e9, "math": "bf16"}, ms, peaks)
    assert result["roofline"] == pytest.approx(0.5)
    assert result["gbps"] == pytest.approx(3350 / 2)
    assert "roofline" not in harness.rates({"bytes": 1}, 1.0, None)


def test_a_family_survives_a_case_that_cannot_be_made(monkeypatch):
    def broken_inputs(device):
        raise MemoryError("too big")

    good = make_case(n=4)
    bad = make_case(n=8)
    bad.inputs = broken_inputs
    monkeypatch.setattr(
        harness.importlib, "import_module", lambda name: type("m", (), {"cases": lambda d: [bad, good]})
    )
    result = harness.run_family("squares", QUICK)
    assert [r["implementations"][OURS]["status"] for r in result["rows"]] == ["failed", "failed", "ok", "ok"]
    assert len(harness.ours_failed(result)) == 2
    json.dumps(result, allow_nan=False)


def test_units():
    assert [duration(v) for v in (0.0123, 1.234, 250.0, 2500.0)] == ["12.3 µs", "1.23 ms", "250 ms", "2.50 s"]
    assert [size(v) for v in (1500, 2.5e6, 3e9)] == ["1.50 kB", "2.50 MB", "3.00 GB"]
    assert harness.rounded({"a": [1.23456, math.nan, 3]}) == {"a": [1.235, None, 3]}
