"""A toy experiment for the tests of the loop, and ``train.py`` with it: ``python toy.py experiment=toy key=value``.

Its model has what the loop must cope with: a parameter that ``state_dict`` shows complex, a buffer, dropout, blocks,
and on request a fault at a given step.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from torchlayers.training import Config, Data, DataConfig, Task, TensorSet, checkpoint, group, key, register
from torchlayers.training.cli import main
from torchlayers.training.config import Mesh, Trainer
from torchlayers.training.parallel import Parallel, full
from torchlayers.training.runtime import open_runtime


@dataclass
class ToyData(DataConfig):
    samples: int = key(45, "training samples")


@dataclass
class ToyModel:
    width: int = key(6, "hidden width")
    dropout: float = key(0.0, "dropout")
    blocks: bool = key(True, "whether the task names blocks")


@dataclass
class Toy(Config):
    data: ToyData = group(ToyData)
    model: ToyModel = group(ToyModel)
    fault: str = key("", "kill, kill_writing, term, interrupt, nan, full or die at step `at` of the first start")
    at: int = key(0, "the step of the fault")
    split: bool = key(False, "the ranks of an sp or mp group cut the samples of a batch among them")


class Complex(nn.Module):
    """A diagonal complex map whose parameter is real, with a trailing 2, and complex in ``state_dict``."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 2) / width**0.5)
        self._register_state_dict_hook(self._show)

    @staticmethod
    def _show(module, state, prefix, metadata):
        state[prefix + "weight"] = torch.view_as_complex(state[prefix + "weight"])

    def _load_from_state_dict(self, state, prefix, *rest):
        name = prefix + "weight"
        if name in state and state[name].is_complex():
            state[name] = torch.view_as_real(state[name])
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x):
        a, b = self.weight.unbind(-1)
        return x * a + x.roll(1, -1) * b


class Block(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.linear, self.complex, self.dropout = nn.Linear(width, width), Complex(width), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(torch.tanh(self.complex(self.linear(x))))


class Line(nn.Module):
    def __init__(self, config: ToyModel):
        super().__init__()
        self.first = nn.Linear(3, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.dropout) for _ in range(2))
        self.last = nn.Linear(config.width, 1)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x) + self.mean


class ToyTask(Task):
    def build_model(self):
        self.step = 0
        return Line(self.config.model)

    def build_data(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.config.data.samples + 11, 3, generator=generator)
        y = (x.sin() @ torch.tensor([[1.0], [-2.0], [0.5]])) + 3.0
        n = self.config.data.samples
        return Data(train=TensorSet(x[:n], y[:n]), test={"rest": TensorSet(x[n:], y[n:])})

    def prepare(self, model, data):
        model.mean.fill_(data.train.tensors[1].mean())

    def blocks(self, model):
        return list(model.blocks) if self.config.model.blocks else []

    def shard_batch(self, batch, mesh):
        if not self.config.split:
            return batch
        x, y = batch
        parts, part = mesh["sp"].size() * mesh["mp"].size(), mesh["sp"].get_local_rank() * mesh["mp"].size()
        part += mesh["mp"].get_local_rank()
        return x[part::parts], y[part::parts]

    def loss(self, model, batch):
        x, y = batch
        self.step += 1
        if self.step == self.config.at and self.config.resume is None:
            x = getattr(self, "fault_" + self.config.fault)(x)
        return (model(x) - y).square().sum(), len(x)

    def evaluate(self, model, batch, name):
        x, y = batch
        return {"mae": ((model(x) - y).abs().sum(), len(x))}

    def fault_kill(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)

    def fault_term(self, x):
        os.kill(os.getpid(), signal.SIGTERM)
        return x

    def fault_interrupt(self, x):
        os.kill(os.getpid(), signal.SIGINT)
        return x

    def fault_nan(self, x):
        return x * float("nan")

    def fault_kill_writing(self, x):
        """In the middle of the next checkpoint. Only in a child."""
        checkpoint.write_json = self.fault_kill
        return x

    def fault_full(self, x):
        """From here on no file may grow over 3 kB, as on a full disk."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        return x

    def fault_die(self, x):
        """Only the second rank."""
        if os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return x


register("toy", Toy, task=ToyTask)


@dataclass
class Study(Config):
    terms: int = key(5, "terms of the sum")
    numbers: list[int] = key([1, 2], "a list")


@register("toy_study", Study)
def study(context):
    total = 0.0
    for n in context.progress(range(1, context.config.terms + 1)):
        total += 1 / n**2
        context.report({"partial": total}, step=n)
    return {"error": abs(total - torch.pi**2 / 6)}


CONFIGS = Path(__file__).parent / "configs"


def check_own_reduction() -> int:
    """A module with ``reduces_gradients`` is left alone over sp and mp and averaged over dp; others over all ranks."""
    for strategy in ("ddp", "fsdp2"):
        for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
            config = Toy(mesh=Mesh(*sizes), trainer=Trainer(strategy=strategy, grad_clip=1e9))
            with open_runtime(config) as runtime:
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
                model[1].reduces_gradients = True
                plain = copy.deepcopy(model)
                parallel = Parallel(model, [], config.trainer, runtime)
                inputs = [torch.randn(3, 4, generator=torch.Generator().manual_seed(r)) for r in range(2)]
                with parallel.micro_batch(last=True):
                    parallel.model(inputs[runtime.rank]).square().sum().backward()
                norm = parallel.finish_gradients(weight=float(runtime.world))
                expected = []
                for x in inputs:
                    plain.zero_grad()
                    plain(x).square().sum().backward()
                    expected.append([p.grad.clone() for p in plain.parameters()])
                mean = [(a + b) / 2 for a, b in zip(*expected, strict=True)]
                want = [*mean[:2], *(mean if sizes[0] == 2 else expected[runtime.rank])[2:]]
                got = [full(p.grad) for p in model.parameters()]
                for ours, reference in zip(got, want, strict=True):
                    torch.testing.assert_close(ours, reference)
                whole = sum(float(g.square().sum()) for g in want) ** 0.5
                assert abs(norm - whole) < 1e-5 * whole
    return 0


def run_script(commands: list[list[str]]) -> list[int]:
    """Several command lines in one process; one that begins with "fork" runs in a child, since it will be killed."""
    for module in ("hydra", "matplotlib.figure", "safetensors.torch", "torch.distributed.fsdp"):
        importlib.import_module(module)  # once, and not in each child
    codes = []
    for command in commands:
        if command == ["check_own_reduction"]:
            codes.append(check_own_reduction())
        elif command[0] != "fork":
            codes.append(main(command, config_dir=CONFIGS))
        elif child := os.fork():
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            os._exit(main(command[1:], config_dir=CONFIGS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return codes


if __name__ == "__main__":
    if sys.argv[1:2] == ["script"]:  # script OUT JSON
        codes = run_script(json.loads(sys.argv[3]))
        Path(sys.argv[2] + os.environ.get("RANK", "")).write_text(json.dumps(codes))
        sys.exit(0)
    sys.exit(main(config_dir=CONFIGS))
