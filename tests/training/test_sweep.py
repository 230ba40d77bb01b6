"""Sweeps: all their runs, once each, and what they are summed up in."""

import json
import statistics

import pytest

from torchlayers.training.compose import parse
from torchlayers.training.sweep import ad_hoc_sweep


def test_a_sweep_runs_each_once_and_sums_up(run, tmp_path):
    folder = tmp_path / "widths"
    code, out, err = run("sweep=toy_widths", f"run_dir={folder}", "optimizer.lr=1e-2")
    assert code == 0, err
    assert out.count("run folder:") == 4
    results = json.loads((folder / "results.json").read_text())["results"]
    values = results["wide"]["test/mae"]
    assert len(values) == 2 and values[0] != values[1]
    config = (folder / "wide-seed1" / "config.yaml").read_text()
    assert "seed: 1" in config and "width: 8" in config and "max_steps: 3" in config and "lr: 0.01" in config
    table = (folder / "table.md").read_text()
    assert table in out + "\n" and "Mean ± standard deviation over 2 seeds" in table
    assert f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}" in table
    assert (folder / "plot.png").stat().st_size > 5000

    # Again: nothing to do. One run less, and one that was stopped: these two and no others.
    assert run("sweep=toy_widths", f"run_dir={folder}", "optimizer.lr=1e-2")[1].count("run folder:") == 0
    (folder / "narrow-seed0" / "summary.json").unlink()
    out = run("sweep=toy_widths", f"run_dir={folder}", "optimizer.lr=1e-2")[1]
    assert out.count("run folder:") == 1 and "resuming after step 3 of 3" in out
    assert (folder / "table.md").read_text() == table

    code, _, err = run("sweep=toy_widths", f"run_dir={folder}", "optimizer.lr=1e-3")
    assert code == 2 and "holds another sweep (overrides differ)" in err


def test_a_failed_run_is_told_and_stops_no_other(run, tmp_path):
    arguments = ["experiment=toy", "trainer.max_steps=2", "at=1,5", "fault=nan", "seed=0,1", "--multirun"]
    code, out, _ = run(*arguments, f"run_dir={tmp_path / 'm'}")
    assert code == 1
    assert "at=1, seed 0 failed: the loss is nan in step 1" in out
    results = json.loads((tmp_path / "m" / "results.json").read_text())
    assert len(results["failed"]) == 2 and len(results["results"]["at=5"]["test/mae"]) == 2


def test_a_signal_stops_the_sweep(run, tmp_path):
    arguments = ["experiment=toy", "trainer.max_steps=4", "fault=term", "at=2", "model.width=2,3", "--multirun"]
    code, _, err = run(*arguments, f"run_dir={tmp_path / 'm'}")
    assert code == 143 and "stopped by SIGTERM after step 2" in err
    code, out, _ = run(*arguments, f"run_dir={tmp_path / 'm'}")
    assert code == 143 and "resuming after step 2 of 4" in out  # the first goes on, the second meets its fault
    code, out, _ = run(*arguments, f"run_dir={tmp_path / 'm'}")
    assert code == 0 and len(json.loads((tmp_path / "m" / "results.json").read_text())["results"]) == 2


def test_all_combinations():
    sweep = ad_hoc_sweep(parse(["experiment=toy", "optimizer.lr=1e-2,1e-3", "model.width=range(2,4)", "seed=5"]))
    assert list(sweep.arms) == [f"optimizer.lr={lr},model.width={w}" for lr in ("0.01", "0.001") for w in (2, 3)]
    assert sweep.seeds == [5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep=toy_width"], ["unknown sweep 'toy_width'", "did you mean 'toy_widths'"]),
        (["sweep=toy_widths", "seed=3"], ["'seed=3' has no place in a sweep"]),
        (["experiment=toy", "seed=1,a", "--multirun"], ["'seed=1,a' must name integers"]),
        (["sweep=toy_widths", "model.widht=3"], ["unknown key 'model.widht'"]),
        (["experiment=toy", "model.width=1,a", "--multirun"], ["model.width=a", "Integer"]),
    ],
)
def test_mistakes_are_named_before_the_first_run(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and [word for word in words if word not in err] == []
    assert "run folder" not in out and not list(tmp_path.iterdir())
