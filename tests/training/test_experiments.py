"""The zoo's own configs: each runs for a few steps. Its line ``# smoke: key=value ...`` says what makes it small."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from torchlayers.data import darcy
from torchlayers.tfno import LpLoss
from torchlayers.training import load_run
from torchlayers.training.cli import main
from torchlayers.training.compose import compose, parse

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
SWEEPS = sorted(path.stem for path in (CONFIGS / "sweep").glob("*.yaml"))


def small(name: str) -> list[str]:
    found = re.search(r"^# smoke: (.*)$", (CONFIGS / "experiment" / f"{name}.yaml").read_text(), re.MULTILINE)
    common = ["trainer.max_steps=2", "trainer.tensorboard=false", "trainer.log_every=1"]
    return [*common, *(found.group(1).split() if found else [])]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_runs(name, tmp_path, metrics):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        code = main([f"experiment={name}", *small(name), f"run_dir={tmp_path / 'run'}"], config_dir=CONFIGS)
    assert code == 0
    assert any(key not in ("step", "loss") for key in metrics(tmp_path / "run")[-1])


@pytest.mark.parametrize("name", SWEEPS)
def test_each_sweep_composes(name):
    sweep = yaml.safe_load((CONFIGS / "sweep" / f"{name}.yaml").read_text())
    arms = [
        compose(parse([f"experiment={sweep['experiment']}", *sweep.get("overrides", []), *arm]), CONFIGS)
        for arm in sweep["arms"].values()
    ]
    assert len(arms) >= 2 and all(a != b for i, a in enumerate(arms) for b in arms[:i])


@pytest.mark.parametrize("factorization", ["tucker", "dense"])
def test_tfno_darcy_predicts_in_physical_units(factorization, tmp_path, metrics):
    arguments = [f"model.factorization={factorization}", f"run_dir={tmp_path / 'run'}", "checkpoint.every=1"]
    assert main(["experiment=tfno_darcy", *small("tfno_darcy"), *arguments], config_dir=CONFIGS) == 0
    model, line = load_run(tmp_path / "run"), metrics(tmp_path / "run")[-1]
    for n in (16, 32):
        x, y = darcy.load("test", n)
        with torch.no_grad():
            assert LpLoss(d=2)(model(x), y).item() == pytest.approx(line[f"test/l2_{n}"], rel=1e-5)
    train = darcy.load("train", 16)[1][:12]
    assert model.mean.item() == pytest.approx(train.mean().item(), rel=1e-5)
    assert (tmp_path / "run" / "plots" / "darcy_32.png").stat().st_size > 20_000
    checkpoint = load_run(tmp_path / "run", checkpoint="last")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), checkpoint.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.n_modes=[0,8]"], ["n_modes"]),
        (["data.resolution=17"], ["resolution must be one of those shipped", "got 17"]),
        (["data.root=/nowhere"], ["/nowhere/darcy_train_16.pt"]),
        (["model.factorization=tuker"], ["did you mean 'tucker'"]),
        (["loss=h2"], ["loss must be one of 'h1', 'l2'"]),
    ],
)
def test_tfno_darcy_names_mistakes(arguments, words, tmp_path, capfd):
    code = main(
        ["experiment=tfno_darcy", *small("tfno_darcy"), *arguments, f"run_dir={tmp_path / 'r'}"], config_dir=CONFIGS
    )
    err = capfd.readouterr().err
    assert code == 2 and [word for word in words if word not in err] == [], err
    assert "Traceback" not in err and not (tmp_path / "r").exists()


def test_train_py_is_short_and_runs(tmp_path):
    program = CONFIGS.parent / "train.py"
    assert len(program.read_text().splitlines()) < 20
    done = subprocess.run(
        [sys.executable, str(program), "experiment=tfno_dracy"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "did you mean 'tfno_darcy'" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
