"""The experiments on flows: every arm trains, patches over ranks train as one process does, and a run loads again."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchlayers.data import burgers, navier_stokes
from torchlayers.experiments import mg_tfno_navier_stokes as flows
from torchlayers.training import ConfigError, execute, load_run
from torchlayers.training.compose import compose, parse
from torchlayers.training.sweep import named_sweep

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "mg_tfno_navier_stokes": [
        *("data.resolution=16", "data.train_samples=8", "data.test_samples=4", "data.time=0.5", "data.batch_size=4"),
        *("model.n_modes=[6,6]", "model.hidden_channels=6", "model.n_layers=2", "model.padding=2"),
    ],
    "tfno_burgers": [
        *("data.resolution=32", "data.test_resolutions=[32,64]", "data.train_samples=8", "data.test_samples=7"),
        *("data.time=0.1", "data.batch_size=4", "model.n_modes=8", "model.hidden_channels=6", "model.n_layers=2"),
    ],
}
PLOTS = {
    "mg_tfno_navier_stokes": {"vorticity.png", "spectra.png"},
    "tfno_burgers": {"burgers_32.png", "burgers_64.png"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("flows")


def arguments(experiment, folder, cache, *overrides):
    keys = ["trainer.device=cpu", "trainer.tensorboard=false", "trainer.max_epochs=2", "trainer.log_every=1"]
    given = [f"experiment={experiment}", f"run_dir={folder}", f"data.cache={cache}", "trainer.progress=false"]
    return [*given, *keys, *TINY[experiment], *overrides]


def configured(*given):
    return compose(parse([*arguments(*given)]), ROOT / "configs")


def launch(ranks, *given):
    """The same on several ranks: the exit code and what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + arguments(*given), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return torch.tensor([line["loss"] for line in lines(folder)], dtype=torch.float64)


ARMS = {
    "fno": ["model.factorization=dense", "model.levels=0"],
    "tfno": ["model.levels=0"],
    "mg_tfno": [],
    "no_context": ["model.context=false"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_draws_and_loads(arm, tmp_path, cache):
    execute(configured("mg_tfno_navier_stokes", tmp_path / "run", cache, *ARMS[arm]))
    last = lines(tmp_path / "run")[-1]
    assert {"test/l2", "test/h1"} <= last.keys()
    assert PLOTS["mg_tfno_navier_stokes"] <= {p.name for p in (tmp_path / "run" / "plots").iterdir()}
    model = load_run(tmp_path / "run")
    x, y = navier_stokes.generate(4, 16, reynolds=200.0, time=0.5, dt=0.05, seed=1, progress=False)
    errors = (model(x) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
    assert errors.mean().item() == pytest.approx(last["test/l2"], rel=1e-4)


@pytest.mark.distributed
def test_patches_over_ranks_train_as_one_process(tmp_path, cache):
    exact = ["trainer.precision=fp64", "data.train_samples=7"]  # the last batch of an epoch is a partial one
    one, several = tmp_path / "one", tmp_path / "several"
    execute(configured("mg_tfno_navier_stokes", one, cache, *exact))
    code, said = launch(4, "mg_tfno_navier_stokes", several, cache, *exact, "mesh.mp=2", "mesh.dp=2")
    assert code == 0, said
    assert len(losses(one)) == 4
    torch.testing.assert_close(losses(several), losses(one), rtol=1e-10, atol=0)
    for metric in ("test/l2", "test/h1"):
        assert lines(several)[-1][metric] == pytest.approx(lines(one)[-1][metric], rel=1e-9)


@pytest.mark.distributed
def test_patches_that_do_not_divide_over_the_ranks(tmp_path, cache):
    code, said = launch(2, "mg_tfno_navier_stokes", tmp_path / "run", cache, "model.levels=0", "mesh.mp=2")
    assert code != 0
    assert "mesh.mp=2 cannot share the patches" in said
    assert not (tmp_path / "run").exists()


def test_burgers_trains_draws_and_is_resolution_free(tmp_path, cache):
    execute(configured("tfno_burgers", tmp_path / "run", cache, "trainer.max_epochs=10"))
    last = lines(tmp_path / "run")[-1]
    assert last["test/l2_64"] == pytest.approx(last["test/l2_32"], rel=0.05)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert PLOTS["tfno_burgers"] <= {p.name for p in (tmp_path / "run" / "plots").iterdir()}
    model = load_run(tmp_path / "run")
    x, y = burgers.generate(7, 32, time=0.1, dt=2e-3, seed=1, progress=False)
    errors = (model(x) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
    assert errors.mean().item() == pytest.approx(last["test/l2_32"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.factorization=tuker"], "model.factorization must be one of .* did you mean 'tucker'"),
        (["model.levels=0", "model.context=false"], "model.context=false needs patches"),
        (["model.rank=0"], "rank must be"),
        (["model.padding=40"], "padding must not exceed the domain, got 40"),
        (["data.resolution=15"], "size divisible by 2"),
        (["data.dt=1000", "data.time=1000"], "dt must be at most"),
        (["loss=h2"], "loss must be one of"),
    ],
)
def test_bad_keys_are_named_before_training(overrides, message, tmp_path, cache):
    with pytest.raises(ConfigError, match=message):
        execute(configured("mg_tfno_navier_stokes", tmp_path / "run", cache, *overrides))
    assert not (tmp_path / "run").exists()


# ---- the model


def task(**model):
    config = flows.MGTFNONavierStokes()
    for name, value in ({"n_modes": [6, 6], "hidden_channels": 4, "n_layers": 2, "padding": 2} | model).items():
        setattr(config.model, name, value)
    return flows.FlowTask(config)


def test_the_ablation_sees_nothing_outside_its_patch():
    x = torch.randn(1, 1, 16, 16)
    elsewhere = x.clone()
    elsewhere[..., 12:14, 12:14] += 1  # no part of the first patch or its halo of 2, up to periodicity
    for context in (True, False):
        model = task(context=context).build_model()
        changed = (model(elsewhere) - model(x)).abs()[..., :8, :8].max().item()
        assert (changed > 1e-6) == context


def test_joint_weights_at_full_size_are_150_times_fewer():
    config = compose(parse(["experiment=mg_tfno_navier_stokes_full"]), ROOT / "configs")
    with torch.device("meta"):
        joint = flows.FlowTask(config).build_model()
        config.model.factorization = "dense"
        dense = flows.FlowTask(config).build_model()
    spectral = sum(p.numel() for p in joint.network.fno_blocks.joint_weights.parameters())
    full = sum(conv.weight.tensor.numel() for conv in dense.network.fno_blocks.convs)
    assert full == 4 * 64 * 64 * 64 * 33
    assert full / (spectral / 2) > 150


@pytest.mark.parametrize("name", ["mg_tfno_navier_stokes", "mg_tfno_navier_stokes_full", "tfno_burgers"])
def test_sweeps_name_valid_runs(name):
    sweep = named_sweep(parse([f"sweep={name}"]), ROOT / "configs")
    for overrides in sweep.arms.values():
        compose(parse([f"experiment={sweep.experiment}", *sweep.overrides, *overrides]), ROOT / "configs")


def test_scales_are_those_of_the_training_set():
    fields = torch.randn(5, 1, 16, 16)
    one = task()
    model = one.build_model()
    data = flows.Data(flows.TensorSet(3 * fields, 0.5 * fields))
    one.prepare(model, data)
    assert model.input_scale.item() == pytest.approx(3 * fields.std().item(), rel=1e-4)
    assert model.output_scale.item() == pytest.approx(0.5 * fields.std().item(), rel=1e-4)
    assert math.isfinite(model(fields).sum().item())
