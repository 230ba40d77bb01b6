"""One run in this process: what it leaves behind, and how it stops, goes on and fails."""

import errno
import json
import math
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from torchlayers.training import ConfigError, load_run
from torchlayers.training.checkpoint import Checkpoints, RestrictedReader, load_tensors
from torchlayers.training.log import RunLog
from torchlayers.training.parallel import Parallel
from torchlayers.training.runtime import seed_everything
from torchlayers.training.sampling import Sampler, load
from torchlayers.training.task import TensorSet

TRAINED = ["experiment=toy", "checkpoint.every=3", "checkpoint.keep=2", "model.dropout=0.3", "ema.decay=0.5"]


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    arguments = [*TRAINED, "checkpoint.monitor=test/mae", f"run_dir={folder}", "trainer.grad_clip=1.0"]
    assert toy.main(arguments, config_dir=toy.CONFIGS) == 0
    return folder


def test_a_run_folder(unbroken, metrics):
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all({"step", "loss", "lr", "grad_norm", "epoch"} <= line.keys() for line in lines)
    assert lines[-1]["parameters"] == 3 * 6 + 6 + 2 * (36 + 6 + 6) + 7
    assert lines[-1]["parameters_real"] == lines[-1]["parameters"] + 2 * 6
    assert "test/mae" in lines[-1] and "test/mae" not in lines[0]
    assert json.loads((unbroken / "summary.json").read_text())["metrics"]["test/mae"] == lines[-1]["test/mae"]
    start = json.loads((unbroken / "versions.json").read_text())["starts"][0]
    assert start["torch"] == torch.__version__ and start["world"] == 1
    assert (unbroken / "plots" / "loss.png").stat().st_size > 5000
    assert [p.name for p in sorted((unbroken / "checkpoints").iterdir())][-1] == "step_000000012"


def test_load_run_gives_the_model_that_was_tested(unbroken, toy, metrics):
    model = load_run(unbroken)
    assert not model.training
    task = toy.ToyTask(toy.Toy())
    x, y = task.build_data().test["rest"].tensors
    with torch.no_grad():
        mae = (model(x) - y).abs().mean().item()
    assert mae == pytest.approx(metrics(unbroken)[-1]["test/mae"], rel=1e-6)
    assert load_file(unbroken / "model.safetensors")["blocks.0.complex.weight"].is_complex()


def test_load_run_gives_checkpoints(unbroken):
    final, last = load_run(unbroken).state_dict(), load_run(unbroken, checkpoint="last").state_dict()
    assert all(torch.equal(final[k], last[k]) for k in final)
    best = json.loads((unbroken / "checkpoints" / "step_000000012" / "state.json").read_text())["best"]
    assert best["monitor"] == "test/mae"
    load_run(unbroken, checkpoint="best")
    with pytest.raises(ConfigError, match="no checkpoint 5; there are"):
        load_run(unbroken, checkpoint=5)


def test_load_run_says_what_is_wrong(unbroken, tmp_path):
    with pytest.raises(ConfigError, match="is not a run"):
        load_run(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(unbroken, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("width: 6", "width: 7"))
    for kind in ({}, {"checkpoint": "last"}):
        with pytest.raises(ConfigError, match="another architecture"):
            load_run(copy, **kind)
    config.write_text(config.read_text().replace("width: 7", "width: 6"))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:200])
    with pytest.raises(ConfigError, match="damaged"):
        load_run(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="not complete"):
        load_run(copy)


@pytest.mark.parametrize(
    ("fault", "at", "code", "says", "resumes_after"),
    [
        ("term", 7, 143, "stopped by SIGTERM after step 7", 7),
        ("interrupt", 4, 130, "stopped by SIGINT after step 4", 4),
        ("nan", 8, 1, "the loss is nan in step 8, batch 2 of 6 of epoch 1 (samples ", 6),
        ("full", 8, 1, "the checkpoint of step 9 could not be written: [Errno 27] File too large", 6),
    ],
)
def test_a_run_that_stops_goes_on_bit_for_bit(unbroken, run, tmp_path, metrics, fault, at, code, says, resumes_after):
    folder = tmp_path / "run"
    arguments = [*TRAINED, "checkpoint.monitor=test/mae", "trainer.grad_clip=1.0", f"run_dir={folder}"]
    try:
        ended, _, err = run(*arguments, f"fault={fault}", f"at={at}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (ended, says in err) == (code, True), err
    assert not list((folder / "checkpoints").glob(".*"))  # nothing half written
    ended, out, err = run(f"resume={folder}")
    assert ended == 0, err
    assert f"resuming after step {resumes_after} of 12" in out
    assert metrics(folder) == metrics(unbroken)
    assert (folder / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert len(json.loads((folder / "versions.json").read_text())["starts"]) == 2


def test_a_signal_in_the_last_step_is_not_lost(run, tmp_path):
    code, _, err = run("experiment=toy", "trainer.max_steps=2", "fault=term", "at=2", f"run_dir={tmp_path / 'r'}")
    assert code == 143 and "stopped by SIGTERM after step 2" in err
    assert (tmp_path / "r" / "summary.json").exists()  # and the run is complete


def test_a_gradient_that_is_not_finite_is_not_applied(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Parallel, "_norm", lambda self, gradients: math.inf)
    code, _, err = run("experiment=toy", "trainer.grad_clip=1.0", f"run_dir={tmp_path / 'r'}")
    assert code == 1 and "the norm of the gradient is inf in step 1, batch 1 of 6" in err


def test_nan_is_never_the_best(run, tmp_path, monkeypatch, toy):
    monkeypatch.setattr(toy.ToyTask, "evaluate", lambda self, *_: {"mae": (1.0 if self.step > 3 else math.nan, 1)})
    arguments = ["checkpoint.every=3", "checkpoint.monitor=test/mae", f"run_dir={tmp_path / 'r'}"]
    assert run("experiment=toy", *arguments, "trainer.max_steps=6")[0] == 0
    assert Checkpoints(tmp_path / "r", None, 1).read_state(6)["best"]["step"] == 6


def test_a_full_disk_is_told_wherever_it_is_met(run, tmp_path, monkeypatch):
    def full(self, metrics):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunLog, "write", full)
    code, _, err = run("experiment=toy", f"run_dir={tmp_path / 'r'}")
    assert code == 1 and "stopped: [Errno 28] No space left on device" in err


def test_an_error_after_the_start_removes_no_results(run, tmp_path, monkeypatch, toy):
    def plots(self, *_):
        raise ConfigError("late")

    monkeypatch.setattr(toy.ToyTask, "plots", plots, raising=False)
    assert run("experiment=toy", f"run_dir={tmp_path / 'r'}")[0] == 2
    assert (tmp_path / "r" / "model.safetensors").exists() and (tmp_path / "r" / "checkpoints").exists()


def test_resume_may_go_further(run, tmp_path, metrics):
    schedule = ["experiment=toy", "scheduler.steps=9"]
    assert run(*schedule, "trainer.max_steps=9", f"run_dir={tmp_path / 'a'}")[0] == 0
    assert run(*schedule, "trainer.max_steps=5", f"run_dir={tmp_path / 'b'}")[0] == 0
    assert run(f"resume={tmp_path / 'b'}", "trainer.max_steps=9")[0] == 0
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [line["step"] for line in b] == list(range(1, 10))
    assert [line["loss"] for line in a] == [line["loss"] for line in b]
    # A complete run that is resumed trains nothing and ends with the same metrics.
    assert run(f"resume={tmp_path / 'b'}")[0] == 0
    assert metrics(tmp_path / "b") == b


def test_resume_of_another_architecture(unbroken, run, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("width: 6", "width: 7"))
    code, _, err = run(f"resume={tmp_path / 'run'}")
    assert code == 2 and "is of another architecture" in err and "(7," in err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (unbroken / "metrics.jsonl").read_text()


def test_a_damaged_checkpoint_is_named(unbroken, run, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step_000000012"
    tensors = next(last.glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:100])
    code, _, err = run(f"resume={tmp_path / 'run'}")
    assert code == 2 and f"{last} is damaged; remove it to go on from the one before" in err
    (last / "state.json").write_text("{")
    code, _, err = run(f"resume={tmp_path / 'run'}")
    assert code == 2 and "state.json cannot be read" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["checkpoint.monitor=test/mea"], ["test/mea is no metric", "did you mean 'test/mae'", "there are loss, lr"]),
        (["checkpoint.monitor=grad_norm"], ["grad_norm is no metric"]),
        (["mesh.dp=2"], ["mesh dp=2", "world of 1 rank"]),
        (["trainer.activation_checkpointing=true", "model.blocks=false"], ["activation_checkpointing", "no blocks"]),
        (["data.samples=0"], ["empty"]),
        (["optimizer.betas=[2,0.9]"], ["Invalid beta parameter at index 0: 2.0"]),
    ],
)
def test_what_cannot_start_leaves_no_folder(run, tmp_path, arguments, words):
    code, _, err = run("experiment=toy", f"run_dir={tmp_path / 'run'}", *arguments)
    assert code == 2 and [word for word in words if word not in err] == []
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_used(run, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = run("experiment=toy", f"run_dir={tmp_path / 'file' / 'run'}")
    assert code == 2 and "cannot be written" in err
    code, _, err = run("experiment=toy", f"run_dir={tmp_path}")
    assert code == 2 and f"run_dir {tmp_path} is not empty; resume={tmp_path}" in err


def test_default_run_folders(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("experiment=toy", "trainer.max_steps=1")[0] == 0
    assert len(list((tmp_path / "runs" / "toy").iterdir())) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]  # no folder of Hydra's


def test_variants_change_no_mathematics(run, tmp_path, metrics):
    """Accumulation, activation checkpointing and fsdp2 on one process give the plain run's losses."""
    variants = {
        "plain": [],
        "parts": ["trainer.accumulate=3", "trainer.activation_checkpointing=true"],
        "fsdp2": ["trainer.strategy=fsdp2", "trainer.accumulate=2"],
    }
    found = {}
    for name, extra in variants.items():
        common = ["experiment=toy", "trainer.precision=fp64", "trainer.grad_clip=0.5", "ema.decay=0.9"]
        assert run(*common, *extra, f"run_dir={tmp_path / name}")[0] == 0
        found[name] = [line["loss"] for line in metrics(tmp_path / name)]
    for name in ("parts", "fsdp2"):
        assert found[name] == pytest.approx(found["plain"], rel=1e-12)
    weights = load_file(tmp_path / "plain" / "model.safetensors")  # complex128, as pairs of float64
    assert weights["blocks.0.complex.weight"].dtype == torch.float64
    assert load_run(tmp_path / "plain").last.weight.dtype == torch.float64


def test_first_step_against_torch_by_hand(run, tmp_path, metrics, toy):
    """Loss, clipped norm and first losses of the loop against a few lines of plain torch in float64."""
    arguments = ["experiment=toy", "trainer.precision=fp64", "optimizer=sgd", "trainer.grad_clip=1.0", "seed=3"]
    assert run(*arguments, "scheduler=constant", "scheduler.warmup_steps=0", f"run_dir={tmp_path / 'r'}")[0] == 0
    config = toy.Toy(seed=3)
    task = toy.ToyTask(config)
    data = task.build_data()
    seed_everything(3)
    model = task.build_model().double()
    task.prepare(model, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    order = Sampler(45, 8, seed=3).order(0)
    for number, line in enumerate(metrics(tmp_path / "r")[:6]):
        x, y = (t[order[8 * number : 8 * number + 8]].double() for t in data.train.tensors)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-12)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-12)


def test_bf16_autocast_runs_and_differs(run, tmp_path, metrics):
    for precision in ("fp32", "bf16"):
        run(
            "experiment=toy", "trainer.max_steps=3", f"trainer.precision={precision}", f"run_dir={tmp_path / precision}"
        )
    a, b = ([line["loss"] for line in metrics(tmp_path / p)] for p in ("fp32", "bf16"))
    assert a != b and b == pytest.approx(a, rel=0.05)


def test_tensorboard_and_evaluation_on_the_way(run, tmp_path, metrics):
    folder = tmp_path / "run"
    code, out, _ = run("experiment=toy", "trainer.tensorboard=true", "trainer.eval_every=5", f"run_dir={folder}")
    assert code == 0 and list((folder / "tensorboard").iterdir())
    assert [line["step"] for line in metrics(folder) if "test/mae" in line] == [5, 10, 12]
    assert out.strip().endswith(f"run folder: {folder}")


def test_keep_and_best(run, tmp_path, metrics):
    arguments = ["checkpoint.every=2", "checkpoint.keep=2", "checkpoint.monitor=loss", "optimizer.lr=0.0", "seed=1"]
    assert run("experiment=toy", *arguments, f"run_dir={tmp_path / 'r'}")[0] == 0
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "r") if line["step"] % 2 == 0}
    best = min(losses, key=losses.get)
    kept = {int(p.name[5:]) for p in (tmp_path / "r" / "checkpoints").iterdir()}
    assert kept == {10, 12, best} and len(kept) == 3
    assert math.isclose(Checkpoints(tmp_path / "r", None, 1).read_state(12)["best"]["value"], losses[best])


def test_a_study(run, tmp_path, metrics):
    code, out, _ = run("experiment=toy_study", "terms=3", f"run_dir={tmp_path / 's'}")
    assert code == 0 and f"run folder: {tmp_path / 's'}" in out
    lines = metrics(tmp_path / "s")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["error"] == pytest.approx(abs(1 + 1 / 4 + 1 / 9 - math.pi**2 / 6))
    assert {"config.yaml", "versions.json", "summary.json"} <= {p.name for p in (tmp_path / "s").iterdir()}
    with pytest.raises(ConfigError, match="is a study"):
        load_run(tmp_path / "s")
    assert run(f"resume={tmp_path / 's'}")[0] == 0
    assert metrics(tmp_path / "s") == lines


# -- checkpoints of strangers


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def checkpoint_of(unbroken, tmp_path) -> Path:
    folder = tmp_path / "step"
    shutil.copytree(unbroken / "checkpoints" / "step_000000012", folder)
    return folder


def test_metadata_runs_no_code(unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint_of(unbroken, tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match=r"metadata.*pathlib"):
        RestrictedReader(folder).read_metadata()
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="holds no checkpoint metadata"):
        RestrictedReader(folder).read_metadata()
    (folder / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="cannot be read"):
        RestrictedReader(folder).read_metadata()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("attack", ["bytes", "path"])
def test_metadata_cannot_send_the_reader_elsewhere(unbroken, tmp_path, monkeypatch, attack):
    """DCP unpickles what the metadata calls bytes, and opens any path that it names."""
    monkeypatch.chdir(tmp_path)
    folder = checkpoint_of(unbroken, tmp_path)
    metadata = RestrictedReader(folder).read_metadata()
    name = "model.first.weight"
    index = next(i for i in metadata.storage_data if i.fqn == name)
    if attack == "bytes":
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        payload = folder / metadata.storage_data[index].relative_path
        payload.write_bytes(pickle.dumps(Evil()))
    else:
        metadata.storage_data[index].relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        ConfigError, match="BytesStorageMetadata" if attack == "bytes" else r"refers to '\.\./elsewhere'"
    ):
        load_tensors(folder, {name: torch.zeros(6, 3)})
    assert not (tmp_path / "owned").exists()


# -- samplers


@pytest.mark.parametrize("size", [1, 7, 45])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_and_parts_cover_each_sample_once(size, accumulate):
    for parts in (1, 2, 3):
        seen = []
        for part in range(parts):
            sampler = Sampler(size, 8, part, parts, accumulate, seed=4)
            for batch in sampler.batches(2):
                micro = sampler.micro_batches(batch)
                assert len(micro) == accumulate and all(indices for indices, _ in micro)
                seen += [i for indices, counts in micro if counts for i in indices]
        assert sorted(seen) == list(range(size))


def test_order_depends_on_seed_and_epoch_only():
    orders = [Sampler(50, 8, seed=s).order(e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] == Sampler(50, 3, 1, 2, 4, seed=0).order(0)
    assert len({tuple(o) for o in orders}) == 3
    assert Sampler(5, 2).order(7) == [0, 1, 2, 3, 4]


def test_loading_from_the_middle_gives_the_same_batches():
    dataset, sampler = TensorSet(torch.arange(45)), Sampler(45, 8, 0, 2, 2, seed=0)
    whole = [[b[0].tolist() for b, _ in parts] for _, parts in load(dataset, sampler, epoch=1)]
    assert [[b[0].tolist() for b, _ in parts] for _, parts in load(dataset, sampler, epoch=1, start=3)] == whole[3:]
    state = torch.get_rng_state()
    list(load(dataset, sampler))
    assert torch.equal(state, torch.get_rng_state())
