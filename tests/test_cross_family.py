"""One model of four families' layers in the training loop: two processes and one, sharded, compiled, in bf16, resumed.

This file is also the program that the processes run: one command line of ``train.py`` after the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("hydra", reason="needs hydra: pip install -e '.[train]'")

import torchlayers
from torchlayers import LowRankLinear, SeparableConv2d, SpectralConv, TensorAttention
from torchlayers.training import Config, Data, DataConfig, Task, TensorSet, group, key, load_run, register
from torchlayers.training.cli import main
from torchlayers.training.registry import experiment_names

ROOT = Path(__file__).resolve().parents[1]
WORLD = 2
SIDE, WIDTH = 12, 6


# -- the experiment ---------------------------------------------------------------------------------------------------


class Fields(nn.Module):
    """Local and global filters side by side: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self):
        super().__init__()
        self.near = SeparableConv2d(WIDTH, WIDTH, 3, padding=1, rank=0.5)
        self.far = SpectralConv(WIDTH, WIDTH, (6, 6), factorization="tucker", rank=0.5)

    def forward(self, x):
        return x + nn.functional.gelu(self.near(x) + self.far(x))


class Tokens(nn.Module):
    """Triples of patches, then a low-rank MLP: (B, N, C) -> (B, N, C)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = TensorAttention(WIDTH, 2, batch_first=True, window1=4, window2=4)
        self.mlp = nn.Sequential(LowRankLinear(WIDTH, 4 * WIDTH), nn.GELU(), LowRankLinear(4 * WIDTH, WIDTH))

    def forward(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h)[0]
        return x + self.mlp(x)


class Mixed(nn.Module):
    """An image (B, 1, SIDE, SIDE) to a number (B, 1)."""

    def __init__(self):
        super().__init__()
        self.lift = SeparableConv2d(1, WIDTH, 3, padding=1, rank=1)
        self.fields, self.tokens = Fields(), Tokens()
        self.head = LowRankLinear(WIDTH, 1)

    def forward(self, x):
        x = self.fields(self.lift(x))
        x = nn.functional.avg_pool2d(x, 3).flatten(2).mT  # 16 patches as tokens
        return self.head(self.tokens(x).mean(1))


@dataclass
class MixedConfig(Config):
    data: DataConfig = group(DataConfig)
    samples: int = key(32, "training samples")


class MixedTask(Task):
    def build_model(self):
        return Mixed()

    def build_data(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.config.samples + 8, 1, SIDE, SIDE, generator=generator)
        y = (x[:, :, :-1] * x[:, :, 1:]).mean((2, 3)) * 5 + x.mean((2, 3))
        n = self.config.samples
        return Data(train=TensorSet(x[:n], y[:n]), test={"rest": TensorSet(x[n:], y[n:])})

    def blocks(self, model):
        return [model.fields, model.tokens]

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().sum(), len(x)

    def evaluate(self, model, batch, name):
        x, y = batch
        return {"mse": ((model(x) - y).square().sum(), len(x))}


def make_known():
    if "mixed" not in experiment_names():
        register("mixed", MixedConfig, task=MixedTask)


CONFIGS = {
    "config.yaml": "defaults:\n- schema\n- optimizer: adamw\n- scheduler: constant\n- _self_\n- experiment: ???\n",
    "experiment/mixed.yaml": """\
# @package _global_
data: {batch_size: 8}
optimizer: {lr: 1.0e-2}
trainer: {max_epochs: 2, log_every: 1, tensorboard: false, timeout: 60}
""",
}

FP64, BF16 = "trainer.precision=fp64", "trainer.precision=bf16"
FSDP2, COMPILE = "trainer.strategy=fsdp2", "trainer.compile=true"
RECOMPUTE, KEEP = "trainer.activation_checkpointing=true", ["checkpoint.every=3", "checkpoint.keep=2"]
TOGETHER = {
    "ddp": [FP64],
    "ddp_compiled_bf16": [BF16, COMPILE],
    "fsdp2": [FP64, FSDP2, RECOMPUTE, *KEEP],
    "fsdp2_compiled": [FP64, FSDP2, COMPILE],
    "fsdp2_bf16": [BF16, FSDP2],
}
ALONE = {"fp64": [FP64], "fp32": []}
RESUMED = {"ddp": 3, "fsdp2_bf16": 5}  # after that many steps
# Everything at once, by inductor: the slow run.
EVERYTHING = {"everything": [BF16, FSDP2, COMPILE, RECOMPUTE]}


def commands(variants, resumed):
    found = [["experiment=mixed", *extra, f"run_dir={name}"] for name, extra in variants.items()]
    for name, step in resumed.items():
        found.append(["experiment=mixed", *variants[name], f"trainer.max_steps={step}", f"run_dir={name}_resumed"])
        found.append([f"resume={name}_resumed", "trainer.max_steps=8"])
    return found


# -- as a program -----------------------------------------------------------------------------------------------------


def run_all(config_dir: str, out: str, lines: list[list[str]]) -> None:
    """Run the command lines; note exit codes and how many graphs were compiled for each."""
    from torch._dynamo.testing import CompileCounterWithBackend

    make_known()
    torch.set_num_threads(1)
    compile_of = nn.Module.compile
    codes, graphs = [], []
    for line in lines:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("inductor" if "inductor" in out else "aot_eager")
        nn.Module.compile = lambda self, counter=counter: compile_of(self, backend=counter)
        codes.append(main(line, config_dir=config_dir))
        graphs.append(counter.frame_count)
    Path(f"{out}{os.environ.get('RANK', 0)}.json").write_text(json.dumps({"codes": codes, "graphs": graphs}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run_all(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    sys.exit(0)


# -- the tests --------------------------------------------------------------------------------------------------------


def start(folder, world, lines, name="result"):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if world > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            env |= {key: str(value) for key, value in place.items()} | {"MASTER_PORT": str(port)}
        command = [sys.executable, __file__, str(folder / "configs"), str(folder / name), json.dumps(lines)]
        processes.append(
            subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return processes


def finish(folder, processes, name="result"):
    """Exit codes and numbers of graphs, of each rank."""
    printed = [process.communicate(timeout=500)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(printed)
    found = [json.loads((folder / f"{name}{rank}.json").read_text()) for rank in range(len(processes))]
    assert not any(code for rank in found for code in rank["codes"]), "\n".join(printed)
    return found


@contextlib.contextmanager
def ended(processes):
    """No process is left, whatever happens."""
    try:
        yield processes
    finally:
        for process in processes:
            with process:
                process.kill()


def new_folder(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp(name)
    for file, text in CONFIGS.items():
        (folder / "configs" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "configs" / file).write_text(text)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All variants, on two processes and on one: name -> (the run's folder, graphs on each rank)."""
    found = {}
    with contextlib.ExitStack() as stack:
        worlds = {}
        for world, variants, resumed in ((WORLD, TOGETHER, RESUMED), (1, ALONE, {})):
            folder, lines = new_folder(tmp_path_factory, f"world{world}"), commands(variants, resumed)
            worlds[folder] = (lines, stack.enter_context(ended(start(folder, world, lines))))
        for folder, (lines, processes) in worlds.items():
            results = finish(folder, processes)
            for number, line in enumerate(lines):
                name = line[-1].removeprefix("run_dir=") if line[0] == "experiment=mixed" else line[0][len("resume=") :]
                found[name] = (folder / name, [rank["graphs"][number] for rank in results])
    return found


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def of(runs, name):
    found = losses(runs[name][0])
    assert len(found) == 8
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_compiled"])
def test_two_processes_train_as_one(runs, name):
    assert of(runs, name) == pytest.approx(of(runs, "fp64"), rel=1e-9)


@pytest.mark.distributed
def test_what_was_to_be_compiled_was(runs):
    for name, extra in (TOGETHER | ALONE).items():
        assert all((graphs >= 1) == (COMPILE in extra) for graphs in runs[name][1]), name


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp_compiled_bf16", "fsdp2_bf16"])
def test_bf16_trains_near_float32(runs, name):
    half, reference = of(runs, name), of(runs, "fp32")
    assert half != pytest.approx(reference, rel=1e-5), "bf16 was not in force"
    assert half == pytest.approx(reference, rel=0.1)


@pytest.mark.distributed
def test_the_model_learns(runs):
    found = of(runs, "fp64")
    assert sum(found[-4:]) < 0.8 * sum(found[:4])


@pytest.mark.distributed
@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(runs, name):
    assert of(runs, f"{name}_resumed") == of(runs, name)


@pytest.mark.distributed
def test_two_shards_resume_on_one_process(runs, tmp_path):
    """From what two fsdp2 ranks wrote after step 6."""
    folder = tmp_path / "run"
    shutil.copytree(runs["fsdp2"][0], folder)
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_000000006", "step_000000008"]
    shutil.rmtree(folder / "checkpoints" / kept[-1])
    with ended(start(tmp_path, 1, [[f"resume={folder}"]])) as processes:
        finish(tmp_path, processes)
    assert losses(folder) == pytest.approx(of(runs, "fp64"), rel=1e-9)


@pytest.mark.distributed
def test_the_trained_model_comes_back_from_safetensors(runs):
    make_known()
    x = torch.randn(2, 1, SIDE, SIDE, dtype=torch.float64)
    one, two = (load_run(runs[name][0]) for name in ("fp64", "fsdp2"))
    families = {type(part).__module__.split(".")[1] for part in one.modules() if "torchlayers" in type(part).__module__}
    assert families >= {"maestro", "separable_conv", "tensor_attention", "tfno"} and not one.training
    torch.testing.assert_close(two(x), one(x), rtol=1e-7, atol=1e-9)
    assert not torch.equal(one(x), Mixed().double()(x))


@pytest.mark.slow
@pytest.mark.distributed
def test_everything_at_once_by_inductor(tmp_path_factory):
    """Sharded, compiled, recomputed, in bf16, and resumed."""
    folder = new_folder(tmp_path_factory, "inductor")
    lines = [["experiment=mixed", FSDP2, "run_dir=eager"], *commands(EVERYTHING, {"everything": 5})]
    with ended(start(folder, WORLD, lines, "inductor")) as processes:
        results = finish(folder, processes, "inductor")
    assert all(graphs >= 1 for rank in results for graphs in rank["graphs"][1:])
    whole = losses(folder / "everything")
    assert whole == pytest.approx(losses(folder / "eager"), rel=0.1)
    assert losses(folder / "everything_resumed") == whole


# -- modules without an entry in tests/contract, whose item `safetensors` covers the others ----------------------------


def through_safetensors(module, fresh):
    from safetensors.torch import load, save

    fresh.load_state_dict(load(save(module.state_dict())), strict=True)
    return fresh


def test_the_potential_goes_through_safetensors():
    pytest.importorskip("e3nn", reason="needs e3nn: pip install -e '.[gaunt]'")
    geometric = pytest.importorskip("torch_geometric.data", reason="needs PyG: pip install -e '.[graphs]'")
    from torchlayers import GauntPotential

    def build(seed):
        torch.manual_seed(seed)
        return GauntPotential([1, 8], cutoff=4.0, lmax=1, channels=4, num_layers=1, reference_energies=[seed, 2.0])

    pos = torch.tensor([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    water = geometric.Batch.from_data_list([geometric.Data(z=torch.tensor([8, 1, 1]), pos=pos)])
    module, other = build(0), build(1)
    want = module(water)
    assert not torch.equal(other(water)["forces"], want["forces"])
    got = through_safetensors(module, other)(water)
    assert torch.equal(got["energy"], want["energy"]) and torch.equal(got["forces"], want["forces"])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_lazy_convolutions_go_through_safetensors(dims):
    kind = getattr(torchlayers, f"LazySeparableConv{dims}d")
    x = torch.randn(2, 3, *[6] * dims)
    module = kind(4, 3)
    want = module(x)
    assert torch.equal(through_safetensors(module, kind(4, 3))(x), want)
