"""Command lines: what is composed, and which mistakes are named how."""

import itertools

import pytest
import yaml

from torchlayers.training import ConfigError
from torchlayers.training.compose import compose, describe, load_config, parse, resume_config, to_yaml
from torchlayers.training.config import SGD, AdamW, Config, Cosine, Mesh, Scheduler, Step
from torchlayers.training.registry import experiment_names, get_experiment, register


def composed(toy, *arguments):
    return compose(parse(arguments), toy.CONFIGS)


def test_layers_of_a_config_win_in_order(toy):
    plain = composed(toy, "experiment=toy")
    assert isinstance(plain, toy.Toy) and isinstance(plain.data, toy.ToyData)
    assert plain.data.batch_size == 8 and plain.scheduler.warmup_steps == 2  # the file over the schema
    assert isinstance(plain.optimizer, AdamW) and isinstance(plain.scheduler, Cosine)
    changed = composed(
        toy, "experiment=toy", "data.batch_size=4", "optimizer=sgd", "optimizer.lr=2e-3", "trainer.max_steps=7"
    )
    assert changed.data.batch_size == 4 and changed.trainer.max_steps == 7
    assert isinstance(changed.optimizer, SGD) and changed.optimizer.lr == 2e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=toyy"], ["unknown experiment 'toyy'", "did you mean 'toy'"]),
        ([], ["experiment=NAME", "toy"]),
        (["experiment=toy", "optimizer.lrr=1"], ["unknown key 'optimizer.lrr'", "did you mean 'optimizer.lr'"]),
        (["experiment=toy", "model.widht=1"], ["unknown key 'model.widht'", "did you mean 'model.width'"]),
        (["experiment=toy", "batch_size=1"], ["unknown key 'batch_size'", "did you mean 'data.batch_size'"]),
        (["experiment=toy", "optimizer.momentum=1"], ["unknown key 'optimizer.momentum'"]),
        (["experiment=toy", "optimizer.lr=abc"], ["optimizer.lr=abc", "'abc'", "Float"]),
        (["experiment=toy", "trainer.max_steps=1.5"], ["trainer.max_steps=1.5", "Integer"]),
        (["experiment=toy", "trainer.max_steps=0"], ["trainer.max_steps must be at least 1, got 0"]),
        (["experiment=toy", "trainer.strategy=ddpp"], ["trainer.strategy", "'ddpp'", "did you mean 'ddp'"]),
        (["experiment=toy", "trainer=3"], ["'trainer' is a group of keys"]),
        (["experiment=toy", "optimizer=adam"], ["optimizer=adam", "did you mean 'adamw'"]),
        (["experiment=toy", "optimizer.name=sgd"], ["choose another by optimizer=sgd"]),
        (["experiment=toy", "mesh.dp=-1", "mesh.mp=-1"], ["mesh", "at most one"]),
        (["experiment=toy", "ema.decay=1"], ["ema.decay", "below 1", "got 1.0"]),
        (["experiment=toy", "seed=1,2"], ["'seed=1,2'", "--multirun"]),
        (["experiment=toy", "task=toy_study"], ["'task=toy_study'", "experiment=NAME"]),
        (["experiment=toy", "+extra=1"], ["'+extra=1'", "neither added nor removed"]),
        (["experiment=toy", "a=(("], ["'a=(('", "key=value"]),
        (["experiment=toy_wrong"], ["toy_wrong", "max_epoch", "did you mean 'trainer.max_epochs'"]),
    ],
)
def test_mistakes_are_named(toy, run, arguments, words):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("train.py: error: ") and "Traceback" not in err
    assert [word for word in words if word not in err] == []


def test_a_config_names_a_registered_task_and_no_import_path(toy, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntask: os.path\n")
    (tmp_path / "config.yaml").write_text((toy.CONFIGS / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"unknown task 'os\.path'"):
        compose(parse(["experiment=mine"]), tmp_path)


def test_a_name_is_registered_once(toy):
    with pytest.raises(ValueError, match="must be new"):
        register("toy", Config, task=lambda config: None)
    assert {"tfno_darcy", "toy"} <= set(experiment_names())
    assert get_experiment("toy").config is toy.Toy


def test_yaml_brings_the_config_back(toy, tmp_path):
    config = composed(toy, "experiment=toy", "optimizer=sgd", "scheduler=step", "scheduler.milestones=[0.3]")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path) == config


def test_resume_takes_the_runs_own_config(toy, tmp_path):
    config = composed(toy, "experiment=toy", "model.width=5")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = resume_config(parse([f"resume={tmp_path}", "trainer.max_steps=3", "mesh.dp=1", "trainer.device=cpu"]))
    assert (again.model.width, again.trainer.max_steps, again.mesh.dp) == (5, 3, 1)
    for wrong in ("optimizer.lr=3", "experiment=toy_study", "seed=1", "run_dir=x"):
        with pytest.raises(ConfigError, match="cannot be changed on resume"):
            resume_config(parse([f"resume={tmp_path}", wrong]))


def test_folders_are_paths_and_not_hydras_grammar(run, tmp_path):
    folder = tmp_path / "lr=0.1,b-seed0"
    assert run("experiment=toy", "trainer.max_steps=1", f"run_dir={folder}")[0] == 0
    assert run(f"resume={folder}")[0] == 0
    assert load_config(folder).resume is None


def test_resume_needs_a_run(toy, run, tmp_path):
    assert run(f"resume={tmp_path / 'nothing'}")[2].endswith("nothing is not a run: it is not a folder\n")
    assert "is not a run: it has no config.yaml" in run(f"resume={tmp_path}")[2]
    (tmp_path / "config.yaml").write_text("a: [")
    assert "cannot be read" in run(f"resume={tmp_path}")[2]
    (tmp_path / "config.yaml").write_text("a: 1")
    assert "is not the config of a run: 'task'" in run(f"resume={tmp_path}")[2]


def test_help_lists_experiments_and_keys(toy, run):
    code, out, _ = run("--help")
    assert code == 0
    assert "A line fitted to points" in out and "toy_widths" in out
    for key in ("seed", "run_dir", "resume", "data.batch_size", "optimizer.lr", "ema.decay", "trainer.max_steps"):
        assert f"\n  {key}=" in out
    assert "model.width" not in out
    assert "model.width=6" in run("--help", "experiment=toy")[1]
    assert describe(toy.CONFIGS).count("\n") > 40


def test_cfg_shows_the_resolved_config(toy, run):
    shown = yaml.safe_load(run("experiment=toy", "--cfg", "model.width=3")[1])
    assert shown["model"]["width"] == 3 and shown["optimizer"]["name"] == "adamw"


@pytest.mark.parametrize(
    ("sizes", "world", "shape"),
    [((-1, 1, 1), 4, (4, 1, 1)), ((-1, 2, 1), 4, (2, 2, 1)), ((1, -1, 2), 6, (1, 3, 2)), ((2, 1, 3), 6, (2, 1, 3))],
)
def test_mesh_fills_the_world(sizes, world, shape):
    assert Mesh(*sizes).shape(world) == shape


@pytest.mark.parametrize(("sizes", "world"), [((-1, 2, 1), 3), ((2, 1, 1), 1), ((1, 1, 1), 2), ((-1, 4, 1), 2)])
def test_mesh_that_does_not_fit(sizes, world):
    with pytest.raises(ValueError, match=f"does not fit a world of {world}"):
        Mesh(*sizes).shape(world)


def test_schedules():
    cosine = Cosine(warmup_steps=3, minimum=0.1)
    factors = [cosine.factor(step, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b for a, b in itertools.pairwise(factors[3:]))
    assert cosine.factor(20, 20) == pytest.approx(0.1)
    assert Cosine(steps=40).factor(20, 20) == pytest.approx(0.5)  # its own length, not the run's
    assert [Step(gamma=0.1, milestones=[0.5]).factor(s, 10) for s in (4, 5)] == pytest.approx([1.0, 0.1])
    assert Scheduler.factor(Cosine(), 0, 1) == 1.0
