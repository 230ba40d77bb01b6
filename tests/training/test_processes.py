"""The loop on several processes against one, killed processes, and processes that lose each other."""

import contextlib
import gc
import json
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchlayers.training.errors import ConfigError
from torchlayers.training.runtime import Runtime

pytestmark = pytest.mark.distributed

# 45 samples in batches of 8: the last batch of an epoch holds 5, which two or three ranks share unequally.
COMMON = ["experiment=toy", "trainer.grad_clip=1.0", "ema.decay=0.9", "checkpoint.every=4", "trainer.timeout=30"]
COMMON += ["checkpoint.keep=2"]
VARIANTS = {
    "ddp": ["trainer.strategy=ddp"],
    "ddp_parts": ["trainer.strategy=ddp", "trainer.accumulate=3"],
    "fsdp2": ["trainer.strategy=fsdp2"],
    "fsdp2_parts": ["trainer.strategy=fsdp2", "trainer.accumulate=3", "trainer.activation_checkpointing=true"],
    "sequence": ["mesh.sp=2", "split=true"],
    "patches": ["mesh.dp=1", "mesh.mp=-1", "split=true", "trainer.strategy=fsdp2"],
    "single": ["trainer.precision=fp32"],
    "single_fsdp2": ["trainer.precision=fp32", "trainer.strategy=fsdp2", "trainer.accumulate=2"],
}


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory):
    """One process's runs, in float64 and float32."""
    folder = tmp_path_factory.mktemp("alone")
    for precision in ("fp64", "fp32"):
        arguments = [*COMMON, f"trainer.precision={precision}", f"run_dir={folder / precision}"]
        assert toy.main(arguments, config_dir=toy.CONFIGS) == 0
    return folder


@pytest.fixture(scope="module")
def together(spawn_once):
    """Two processes that run all variants, one after the other; then what can go wrong before a start."""
    commands = [[*COMMON, "trainer.precision=fp64", *extra, f"run_dir={name}"] for name, extra in VARIANTS.items()]
    wrong = [
        ["experiment=toy", "mesh.dp=3", "run_dir=no"],
        ["experiment=toy", "checkpoint.monitor=test/no", "run_dir=no"],
        ["experiment=toy", "run_dir=single"],
        ["experiment=toy", "run_dir=single/config.yaml/no"],
        ["resume=nothing"],
    ]
    stopped = [[*COMMON, "fault=term", "at=6", "run_dir=stopped"], [*COMMON, "fault=nan", "at=6", "run_dir=nan"]]
    ranks, errors = spawn_once.script(2, [*commands, *wrong, *stopped, ["check_own_reduction"]])
    return spawn_once.folder, ranks, errors


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_equal_one(alone, together, metrics, name):
    folder, ranks, _ = together
    assert [codes[list(VARIANTS).index(name)] for codes in ranks] == [0, 0]
    single = name.startswith("single")
    ours, reference = metrics(folder / name), metrics(alone / ("fp32" if single else "fp64"))
    tolerance = 1e-5 if single else 1e-10
    assert [line["step"] for line in ours] == [line["step"] for line in reference] == list(range(1, 13))
    for quantity in ("loss", "grad_norm"):
        assert [line[quantity] for line in ours] == pytest.approx([line[quantity] for line in reference], rel=tolerance)
    assert ours[-1]["test/mae"] == pytest.approx(reference[-1]["test/mae"], rel=tolerance)


def test_what_cannot_start_is_named_on_all_ranks(together):
    folder, ranks, errors = together
    first = len(VARIANTS)
    assert [codes[first : first + 5] for codes in ranks] == [[2] * 5] * 2
    for rank, text in enumerate(errors):
        for words in (
            "mesh dp=3 × sp=1 × mp=1 does not fit a world of 2 ranks",
            "checkpoint.monitor=test/no is no metric",
            "run_dir single is not empty",
            "run_dir single/config.yaml/no cannot be written",
            "nothing is not a run",
        ):
            assert sum(words in line for line in text.splitlines() if f"(rank {rank})" in line) == 1, (words, text)
    assert not (folder / "no").exists()


def test_signals_and_nan_stop_all_ranks(together):
    folder, ranks, errors = together
    assert [codes[-3:-1] for codes in ranks] == [[143, 1]] * 2
    assert [p.name for p in (folder / "stopped" / "checkpoints").iterdir()][-1] == "step_000000006"
    assert "stopped by SIGTERM after step 6" in errors[0]
    assert all("the loss is nan in step 6" in text for text in errors)


@pytest.mark.parametrize("world", [1, 3])
def test_two_ranks_checkpoint_resumes_on_others(together, spawn, metrics, tmp_path, toy, alone, world):
    """From the checkpoint of step 8 that two fsdp2 ranks wrote."""
    run = tmp_path / "run"
    shutil.copytree(together[0] / "fsdp2", run)
    shutil.rmtree(run / "checkpoints" / "step_000000012", ignore_errors=True)
    if not (run / "checkpoints" / "step_000000008").exists():
        pytest.fail("the run keeps no checkpoint of step 8")
    if world == 1:
        assert toy.main([f"resume={run}"], config_dir=toy.CONFIGS) == 0
    else:
        codes, _, errors = spawn(world, f"resume={run}")
        assert codes == [0] * world, errors
    ours, reference = metrics(run), metrics(alone / "fp64")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in reference], rel=1e-10)
    assert ours[-1]["test/mae"] == pytest.approx(reference[-1]["test/mae"], rel=1e-10)


def test_killed_at_any_step(spawn, metrics, tmp_path):
    """SIGKILL in five steps, before the first checkpoint and right after one among them."""
    common = ["experiment=toy", "checkpoint.every=2", "model.dropout=0.3", "ema.decay=0.5"]
    steps = [1, 3, 5, 8, 11]
    # The children first: autograd does not survive a fork once it has run.
    commands = [["fork", *common, "fault=kill", f"at={at}", f"run_dir={tmp_path / str(at)}"] for at in steps]
    commands += [[*common, f"run_dir={tmp_path / 'whole'}"], *([f"resume={tmp_path / str(at)}"] for at in steps)]
    steps.append(7)  # while the checkpoint of step 8 is written: its tensors are there, its state is not
    commands.insert(5, ["fork", *common, "fault=kill_writing", "at=7", f"run_dir={tmp_path / '7'}"])
    commands.append([f"resume={tmp_path / '7'}"])
    ranks, _ = spawn.script(1, commands)
    assert ranks[0] == [-9] * len(steps) + [0] * (len(steps) + 1)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for at in steps:
        assert metrics(tmp_path / str(at)) == metrics(tmp_path / "whole")
        assert (tmp_path / str(at) / "model.safetensors").read_bytes() == whole


def test_a_sweep_on_two_ranks(spawn, tmp_path):
    codes, outputs, errors = spawn(2, "experiment=toy", "trainer.max_steps=2", "model.width=2,3", "--multirun")
    assert codes == [0, 0], errors
    (folder,) = (tmp_path / "runs" / "multirun").iterdir()
    assert len(json.loads((folder / "results.json").read_text())["results"]) == 2
    assert "sweep" not in outputs[1]
    codes, _, errors = spawn(2, "sweep=toy_widths", f"run_dir={folder}")
    assert codes == [2, 2] and all("holds another sweep" in text for text in errors), errors


def test_an_error_of_rank_0_keeps_no_process_group_alive(monkeypatch):
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, src: None)
    runtime = Runtime(rank=0, world=2, device=torch.device("cpu"), mesh=None)
    alive = weakref.ref(runtime)

    def fail():
        raise ConfigError("refused")

    gc.disable()
    try:
        with contextlib.suppress(ConfigError):
            runtime.on_main(fail)
        del runtime
        assert alive() is None
    finally:
        gc.enable()


def test_a_dead_rank_ends_the_others(spawn, tmp_path):
    began = time.monotonic()
    codes, _, errors = spawn(
        3, "experiment=toy", "fault=die", "at=4", "trainer.timeout=20", f"run_dir={tmp_path / 'run'}", timeout=100
    )
    assert codes[1] == -9 and codes[0] == codes[2] == 1
    for rank in (0, 2):
        assert f"train.py (rank {rank}): stopped: another rank is gone" in errors[rank]
        assert "Traceback" not in errors[rank]
    assert time.monotonic() - began < 100


def test_modules_that_reduce_by_themselves(together):
    """What ``check_own_reduction`` of toy.py asserts, on both ranks."""
    assert [codes[-1] for codes in together[1]] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_real_experiment_under_torchrun(strategy, tmp_path, metrics):
    root = Path(__file__).parents[2]
    common = ["experiment=tfno_darcy", "trainer.max_steps=7", "data.samples=45", "data.batch_size=16", "seed=1"]
    common += ["data.test_resolutions=[16]", "trainer.log_every=1", "trainer.precision=fp64", "model.hidden_channels=8"]
    runs = {}
    for world in (1, 2):
        runs[world] = tmp_path / f"{world}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if world == 2 else []
        extra = [f"trainer.strategy={strategy}", "trainer.accumulate=2"] if world == 2 else []
        command = [sys.executable, *launcher, str(root / "train.py"), *common, *extra, f"run_dir={runs[world]}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = metrics(runs[1]), metrics(runs[2])
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-10)
    assert json.loads((runs[2] / "versions.json").read_text())["starts"][0]["world"] == 2
