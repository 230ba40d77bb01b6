"""The keys that every experiment has, as plain dataclasses that check themselves.

An experiment derives from :class:`Config` and types its own keys::

    @dataclass
    class TFNODarcy(Config):
        model: Model = group(Model)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .._checks import check_choice, check_int
from .registry import OPTIMIZERS, SCHEDULERS, named

__all__ = [
    "EMA",
    "Checkpoint",
    "Config",
    "DataConfig",
    "Mesh",
    "Optimizer",
    "Scheduler",
    "Trainer",
    "group",
    "key",
]


def key(default: Any, help: str) -> Any:
    """A field with its default and the line that ``--help`` shows for it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def group(cls: type) -> Any:
    """A nested group of keys: an instance of the dataclass ``cls``."""
    return field(default_factory=cls)


def _check_number(name: str, value: float, *, minimum: float = 0.0, below: float = math.inf) -> None:
    if not (minimum <= value < below):
        bound = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be at least {minimum:g}{bound}, got {value!r}")


def _check_name(name: str, config: Any, registry: dict[str, type]) -> None:
    expected = next((k for k, cls in registry.items() if cls is type(config)), config.name)
    if config.name != expected:
        raise ValueError(f"{name}.name is {expected!r} here; choose another by {name}={config.name}")


@dataclass
class Optimizer:
    """Base of the optimizers' configs: what ``build`` returns is stepped by the loop."""

    name: str = ""
    lr: float = key(1e-3, "learning rate before the scheduler's factor")

    def __post_init__(self) -> None:
        _check_name("optimizer", self, OPTIMIZERS)
        _check_number("optimizer.lr", self.lr)

    def build(self, parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError


@named(OPTIMIZERS, "adamw")
@dataclass
class AdamW(Optimizer):
    name: str = "adamw"
    weight_decay: float = key(1e-2, "decoupled weight decay")
    betas: list[float] = key([0.9, 0.999], "decay of the two moments")
    eps: float = key(1e-8, "added to the denominator")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise ValueError(f"optimizer.betas must have 2 entries, got {self.betas}")

    def build(self, parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=self.weight_decay, betas=(self.betas[0], self.betas[1]), eps=self.eps
        )


@named(OPTIMIZERS, "sgd")
@dataclass
class SGD(Optimizer):
    name: str = "sgd"
    momentum: float = key(0.9, "momentum")
    nesterov: bool = key(False, "Nesterov's momentum")
    weight_decay: float = key(0.0, "L2 penalty")

    def build(self, parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
        )


@dataclass
class Scheduler:
    """Base of the schedulers' configs: the learning rate is ``optimizer.lr`` times :meth:`factor`.

    A factor is a function of the step alone, so a resumed run needs no scheduler state.
    """

    name: str = ""
    warmup_steps: int = key(0, "steps over which the factor rises linearly to 1")
    steps: int | None = key(None, "length of the schedule in steps (the whole run's by default)")

    def __post_init__(self) -> None:
        _check_name("scheduler", self, SCHEDULERS)
        check_int("scheduler.warmup_steps", self.warmup_steps, minimum=0)
        if self.steps is not None:
            check_int("scheduler.steps", self.steps)

    def factor(self, step: int, total: int) -> float:
        """The factor for the step numbered ``step`` (from 0) of ``total``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        total = self.steps or total
        progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.decay(min(1.0, progress))

    def decay(self, progress: float) -> float:
        """The factor after warm-up, for ``progress`` from 0 to 1."""
        return 1.0


@named(SCHEDULERS, "constant")
@dataclass
class Constant(Scheduler):
    name: str = "constant"


@named(SCHEDULERS, "cosine")
@dataclass
class Cosine(Scheduler):
    name: str = "cosine"
    minimum: float = key(0.0, "factor at the end")

    def decay(self, progress: float) -> float:
        return self.minimum + (1.0 - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


@named(SCHEDULERS, "linear")
@dataclass
class Linear(Scheduler):
    name: str = "linear"
    minimum: float = key(0.0, "factor at the end")

    def decay(self, progress: float) -> float:
        return 1.0 - (1.0 - self.minimum) * progress


@named(SCHEDULERS, "step")
@dataclass
class Step(Scheduler):
    name: str = "step"
    gamma: float = key(0.5, "factor by which the rate falls at each milestone")
    milestones: list[float] = key([0.5, 0.75], "where it falls, as fractions of the schedule")

    def decay(self, progress: float) -> float:
        return self.gamma ** sum(progress >= m for m in self.milestones)


@dataclass
class DataConfig:
    """How training data are read."""

    batch_size: int = key(32, "samples in an optimizer step, over all ranks and micro-batches")
    workers: int = key(0, "worker processes that load data, on each rank")

    def __post_init__(self) -> None:
        check_int("data.batch_size", self.batch_size)
        check_int("data.workers", self.workers, minimum=0)


@dataclass
class EMA:
    decay: float = key(0.0, "decay of the moving average of the weights that is evaluated and saved; 0 for none")

    def __post_init__(self) -> None:
        _check_number("ema.decay", self.decay, below=1.0)


@dataclass
class Trainer:
    max_steps: int | None = key(None, "optimizer steps; wins over max_epochs")
    max_epochs: int = key(10, "passes over the training set")
    device: str = key("auto", "auto, cpu or cuda")
    strategy: str = key("ddp", "ddp (each rank holds the model) or fsdp2 (ranks hold shards)")
    precision: str = key("fp32", "fp32, bf16 (autocast) or fp64 (model and data in float64)")
    compile: bool = key(False, "torch.compile the model")
    grad_clip: float | None = key(None, "bound on the norm of the whole gradient")
    accumulate: int = key(1, "micro-batches that each rank cuts its part of a batch into")
    activation_checkpointing: bool = key(False, "recompute the model's blocks in the backward pass")
    deterministic: bool = key(False, "torch.use_deterministic_algorithms, for GPUs")
    log_every: int = key(10, "steps between lines of metrics.jsonl")
    eval_every: int | None = key(None, "steps between evaluations (at the end by default)")
    progress: bool = key(True, "show a progress bar in a terminal")
    tensorboard: bool = key(True, "write TensorBoard files")
    timeout: float = key(600.0, "seconds after which a rank gives up on the others")

    def __post_init__(self) -> None:
        check_choice("trainer.device", self.device, ("auto", "cpu", "cuda"))
        check_choice("trainer.strategy", self.strategy, ("ddp", "fsdp2"))
        check_choice("trainer.precision", self.precision, ("fp32", "bf16", "fp64"))
        check_int("trainer.max_epochs", self.max_epochs)
        check_int("trainer.accumulate", self.accumulate)
        check_int("trainer.log_every", self.log_every)
        for name in ("max_steps", "eval_every"):
            if getattr(self, name) is not None:
                check_int(f"trainer.{name}", getattr(self, name))
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"trainer.grad_clip must be over 0 or null, got {self.grad_clip!r}")
        if not self.timeout > 0:
            raise ValueError(f"trainer.timeout must be over 0 seconds, got {self.timeout!r}")


@dataclass
class Checkpoint:
    every: int | None = key(None, "steps between checkpoints (only at the end by default)")
    keep: int = key(1, "how many of the last to keep")
    monitor: str | None = key(None, "metric by which the best is kept besides, such as loss or test/l2_16")
    mode: str = key("min", "whether the best has the least (min) or the greatest (max) of it")

    def __post_init__(self) -> None:
        if self.every is not None:
            check_int("checkpoint.every", self.every)
        check_int("checkpoint.keep", self.keep)
        check_choice("checkpoint.mode", self.mode, ("min", "max"))


@dataclass
class Mesh:
    """Ranks in a grid: data × sequence × patches. The product is the world size."""

    dp: int = key(-1, "ranks that split the batch; -1 for all that remain")
    sp: int = key(1, "ranks that split a sequence")
    mp: int = key(1, "ranks that split patches")

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if size != -1:
                check_int(f"mesh.{name}", size)
        if list(self.sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh may leave at most one size at -1, got {self.sizes}")

    @property
    def sizes(self) -> dict[str, int]:
        return {"dp": self.dp, "sp": self.sp, "mp": self.mp}

    def shape(self, world: int) -> tuple[int, ...]:
        """The three sizes for ``world`` ranks."""
        sizes = list(self.sizes.values())
        if -1 in sizes:
            sizes[sizes.index(-1)] = world // -math.prod(sizes)
        if math.prod(sizes) != world:
            asked = " × ".join(f"{k}={v}" for k, v in self.sizes.items())
            raise ValueError(f"mesh {asked} does not fit a world of {world} rank{'s' if world > 1 else ''}")
        return tuple(sizes)


@dataclass
class Config:
    """The root of every experiment's config."""

    experiment: str = key("", "the file of configs/experiment that this run was composed from")
    task: str = key("", "the registered experiment that runs (the same name by default)")
    seed: int = key(0, "seed of initialisation, data order and everything random")
    run_dir: str | None = key(None, "the run's folder (runs/<experiment>/<time> by default)")
    resume: str | None = key(None, "continue the run in this folder")
    data: DataConfig = group(DataConfig)
    optimizer: Optimizer = group(AdamW)
    scheduler: Scheduler = group(Cosine)
    ema: EMA = group(EMA)
    trainer: Trainer = group(Trainer)
    checkpoint: Checkpoint = group(Checkpoint)
    mesh: Mesh = group(Mesh)

    def __post_init__(self) -> None:
        check_int("seed", self.seed, minimum=0)
