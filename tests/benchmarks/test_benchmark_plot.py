"""The plot of the polynomial path against the exact one: what it shows, and that it is current."""

import json

import pytest

from benchmarks import plot
from benchmarks._harness import BOTH, FORWARD, OURS

CPU = {"device": "Some CPU", "device_type": "cpu", "threads": 2}
GPU = {"device": "A GPU", "device_type": "cuda", "threads": 8}


def row(n, ms, exact_ms=None, *, op="crossover", mode=FORWARD, causal=False):
    entries = {OURS: {"status": "ok", "ms": ms}}
    if exact_ms is not None:
        entries["exact"] = {"status": "ok", "ms": exact_ms}
    return {"case": {"op": op, "d": 8, "causal": causal, "N": n}, "mode": mode, "implementations": entries}


def document(environment, *rows):
    return {"environment": environment, "families": {plot.FAMILY: {"rows": list(rows), "scaling": []}}}


ROWS = [
    # exact N³ / 2^21 ms, polynomial N / 2^7 ms: equal at N = 128
    *(row(n, n / 128, n**3 / 2**21) for n in (64, 32, 256)),
    *(row(n, n / 128, op="polynomial") for n in (1024, 4096, 16384)),
    row(64, 3.0, 1.0, mode=BOTH),
    row(64, 9.0, op="polynomial", causal=True),
    {"case": {"op": "exact", "N": 64}, "mode": FORWARD, "implementations": {OURS: {"status": "ok", "ms": 1.0}}},
    {"case": {"op": "crossover", "d": 8, "causal": False, "N": 512}, "mode": FORWARD,
     "implementations": {OURS: {"status": "wrong"}, "exact": {"status": "out of memory"}}},
]  # fmt: skip


def test_a_panel_for_each_device_and_pass_in_which_both_were_timed():
    gpu = document(GPU, row(1024, 0.5, 2.0, op="polynomial"))
    empty = {"environment": CPU, "families": {"conv": {"rows": [], "scaling": []}}}
    found = plot.panels({"a.json": document(CPU, *ROWS), "b.json": gpu, "c.json": empty})
    assert [(p.device, p.case, p.mode) for p in found] == [
        ("A GPU", "d 8, causal False", FORWARD),
        ("Some CPU, 2 threads", "d 8, causal False", FORWARD),
        ("Some CPU, 2 threads", "d 8, causal False", BOTH),
    ]
    assert found[0].lines == {"exact": {1024: 2.0}, "polynomial": {1024: 0.5}}
    assert list(found[1].lines["exact"]) == [32, 64, 256]
    assert list(found[1].lines["polynomial"]) == [32, 64, 256, 1024, 4096, 16384]


def test_crossover_is_where_the_lines_meet():
    lines = plot.panels({"a.json": document(CPU, *ROWS)})[0].lines
    assert plot.crossover(lines["exact"], lines["polynomial"]) == pytest.approx(128)
    assert plot.crossover({32: 1.0, 64: 2.0}, {32: 3.0, 64: 3.0}) is None
    assert plot.crossover({32: 9.0, 64: 9.0}, {32: 3.0, 64: 3.0}) is None
    assert plot.crossover({32: 1.0}, {64: 3.0}) is None


def test_the_figure_says_exponents_and_crossover(tmp_path, monkeypatch):
    labels = []
    from matplotlib.axes import Axes

    legend = Axes.legend
    monkeypatch.setattr(
        Axes, "legend", lambda ax, **options: (labels.append(ax.get_legend_handles_labels()[1]), legend(ax, **options))
    )
    found = plot.panels({"a.json": document(CPU, *ROWS)})
    plot.draw(found, tmp_path / "a.png")
    assert labels[0] == ["exact: N^3.00 for N ≥ 32", "polynomial: N^1.00 for N ≥ 256", "equal at N ≈ 128"]
    assert labels[1] == ["exact", "polynomial"]
    assert plot.drawn(tmp_path / "a.png") == plot.digest(found) != plot.digest(found[:1])


def test_check_says_whether_the_image_is_current(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    assert plot.main(["--check"]) == plot.main([]) == 0  # nothing was measured
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.json").write_text(json.dumps(document(CPU, *ROWS)))
    assert plot.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert plot.main([]) == plot.main(["--check"]) == 0
    (tmp_path / "a.json").write_text(json.dumps(document(CPU, *ROWS[:3])))
    assert plot.main(["--check"]) == 1
    assert plot.main([]) == plot.main(["--check"]) == 0


def test_the_committed_image_is_current():
    assert plot.main(["--check"]) == 0, "run `python -m benchmarks.plot`"
