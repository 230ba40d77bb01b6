"""The training loop, and the way back from its run folder to the model."""

from __future__ import annotations

import contextlib
import math
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .._checks import require
from .checkpoint import (
    Checkpoints,
    check_fits,
    gather_tensors,
    load_optimizer,
    load_tensors,
    optimizer_state,
    read_shapes,
    replacing,
)
from .compose import _nearest, load_config
from .config import Config
from .context import Context
from .errors import ConfigError, Interrupted, TrainingError
from .log import read_metrics
from .parallel import MovingAverage, Parallel, state_tensors
from .registry import get_experiment
from .runtime import Signals, get_random_state, seed_everything, set_random_state
from .sampling import Sampler, load
from .task import Task

__all__ = ["Loop", "load_run"]

T = TypeVar("T")
_TRAIN_METRICS = ("loss", "lr", "grad_norm")


class Loop:
    """Trains one task in one context. Steps are counted from 1: step n is done when n updates are."""

    def __init__(self, context: Context, task: Task):
        self.context, self.task = context, task
        self.config: Config = context.config
        self.runtime, self.log = context.runtime, context.log
        trainer = self.config.trainer
        self.data = self.runtime.main_first(lambda: _build(task.build_data))
        seed_everything(self.config.seed)  # the same weights on every rank
        module = _build(lambda: new_model(task, self.config))
        task.prepare(module, self.data)
        seed_everything(self.config.seed, rank=1 + self.runtime.rank)
        module.to(self.runtime.device)
        self.parallel = Parallel(module, task.blocks(module), trainer, self.runtime)
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = _build(lambda: self.config.optimizer.build(iter(trained)))
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.names = {id(p): n for n, p in module.named_parameters()}
        self.average = MovingAverage(module, self.config.ema.decay) if self.config.ema.decay else None
        self.checkpoints = Checkpoints(context.folder, self.runtime, self.config.checkpoint.keep)
        self.sampler = self._sampler(self.data.train, trainer.accumulate, self.config.seed)
        self.total = trainer.max_steps or trainer.max_epochs * self.sampler.steps
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.signals = Signals()

    def run(self) -> dict[str, float]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        try:
            if self.config.trainer.deterministic:
                torch.use_deterministic_algorithms(True)
            with self.signals:
                self._check_monitor()
                self._restore()
                last = self.log.rewind(self.step)
                done = self.step >= self.total
                if done:  # nothing to train: the last line is written anew, with what follows it
                    self.log.rewind(self.step - 1)
                self.log.start(self.step, self.total)
                final = self._finish({**(last or {}), **self._evaluate()} if done else self._train())
                if signum := max(self.runtime.gather(self.signals.received)):  # in or after the last step
                    raise Interrupted(signum, self.step)
                return final
        finally:
            torch.use_deterministic_algorithms(deterministic)

    # -- steps

    def _train(self) -> dict[str, float]:
        """All steps that remain; the last one's metrics."""
        metrics: dict[str, float] = {}
        self._clock = (time.perf_counter(), 0)
        while self.step < self.total:
            epoch, first = divmod(self.step, self.sampler.steps)
            batches = load(
                self.data.train,
                self.sampler,
                epoch=epoch,
                start=first,
                workers=self.config.data.workers,
                pin=self.runtime.device.type == "cuda",
            )
            for indices, parts in batches:
                metrics = self._step(epoch, indices, parts)
                if self.step == self.total:
                    break
        return metrics

    def _step(self, epoch: int, indices: list[int], parts: list[tuple[Any, bool]]) -> dict[str, float]:
        factor = self.config.scheduler.factor(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        # Sum of losses, sum of weights, and which signals have arrived: one exchange for all that ranks agree on.
        sums = torch.zeros(4, dtype=torch.float64, device=self.runtime.device)
        for number, (batch, counts) in enumerate(parts, start=1):
            with self.parallel.micro_batch(last=number == len(parts)):
                with self._autocast():
                    shard = self.task.shard_batch(self._move(batch), self.runtime.mesh)
                    loss, weight = self.task.loss(self.parallel.model, shard)
                if not counts:
                    loss, weight = loss * 0.0, weight * 0
                loss.backward()
            sums[0] += loss.detach()
            sums[1] += weight
        if self.signals.received:
            sums[2 if self.signals.received == signal.SIGINT else 3] = 1.0
        total, weight, interrupts, terminations = self.runtime.sum(sums).tolist()
        value = total / weight if weight > 0 else math.nan
        if not math.isfinite(value):
            what = f"the loss is {total}" if weight > 0 else f"the weights of the loss sum to {weight}"
            raise TrainingError(self._describe_bad(epoch, indices, what))
        norm = self.parallel.finish_gradients(weight)
        if norm is not None and not math.isfinite(norm):
            raise TrainingError(self._describe_bad(epoch, indices, f"the norm of the gradient is {norm}"))
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update()
        self.log.advance(value)
        metrics: dict[str, float] = {"step": self.step, "epoch": epoch, "loss": value}
        metrics["lr"] = self.config.optimizer.lr * factor
        if norm is not None:
            metrics["grad_norm"] = norm
        self._clock = (self._clock[0], self._clock[1] + len(indices))
        self._after(metrics, signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0)
        return metrics

    def _after(self, metrics: dict[str, float], signum: int) -> None:
        """What follows the step that gave ``metrics``: evaluation, a line, a checkpoint, the end."""
        checkpoint, trainer = self.config.checkpoint, self.config.trainer
        last = self.step == self.total
        due = last or (checkpoint.every is not None and self.step % checkpoint.every == 0)
        watched = checkpoint.monitor is not None and checkpoint.monitor not in _TRAIN_METRICS
        logged = last or self.step % trainer.log_every == 0
        if logged:
            began, samples = self._clock
            seconds = time.perf_counter() - began
            metrics["samples_per_second"] = round(samples / seconds, 1)
            if self.runtime.device.type == "cuda":
                metrics["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if last or (trainer.eval_every is not None and self.step % trainer.eval_every == 0) or (due and watched):
            metrics.update(self._evaluate())
            logged = True
        if logged and not last:  # the last line is written by _finish
            self.log.write(metrics)
        if due or signum:
            if due and checkpoint.monitor is not None:
                self._note_best(metrics[checkpoint.monitor])
            self._save()
        if logged or due:
            self._clock = (time.perf_counter(), 0)
        if signum and not last:
            raise Interrupted(signum, self.step)

    def _describe_bad(self, epoch: int, indices: list[int], what: str) -> str:
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        number = self.step % self.sampler.steps + 1
        return (
            f"{what} in step {self.step + 1}, batch {number} of {self.sampler.steps} of epoch {epoch}"
            f" (samples {shown}); the step was not applied"
        )

    # -- evaluation

    def _evaluate(self, batches: int | None = None) -> dict[str, float]:
        """The metrics of all test sets (of their first ``batches``), as sums over weights over all ranks."""
        module = self.parallel.module
        sums: dict[str, list[torch.Tensor]] = {}
        training = module.training
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            if self.average is not None:
                stack.enter_context(self.average.applied())
            stack.enter_context(torch.no_grad())
            module.eval()
            for name, dataset in self.data.test.items():
                sampler = self._sampler(dataset, 1, None)
                for number, (_, parts) in enumerate(load(dataset, sampler)):
                    if number == batches:
                        break
                    for batch, counts in parts:
                        with self._autocast():
                            shard = self.task.shard_batch(self._move(batch), self.runtime.mesh)
                            found = self.task.evaluate(module, shard, name)
                        for metric, pair in found.items():
                            both = torch.stack([torch.as_tensor(v, device=self.runtime.device).double() for v in pair])
                            sums.setdefault(metric, []).append(both if counts else torch.zeros_like(both))
            module.train(training)
        if not sums:
            return {}
        totals = self.runtime.sum(torch.stack([torch.stack(pairs).sum(0) for pairs in sums.values()])).tolist()
        return {f"test/{m}": s / w if w else math.nan for m, (s, w) in zip(sums, totals, strict=True)}

    def _check_monitor(self) -> None:
        monitor = self.config.checkpoint.monitor
        if monitor is None:
            return
        names = [n for n in _TRAIN_METRICS if n != "grad_norm" or self.config.trainer.grad_clip is not None]
        if monitor not in names:
            names += self._evaluate(batches=1)
        if monitor not in names:
            near = _nearest(monitor, names)
            raise ConfigError(f"checkpoint.monitor={monitor} is no metric{near}; there are {', '.join(names)}")

    def _note_best(self, value: float) -> None:
        sign = 1.0 if self.config.checkpoint.mode == "min" else -1.0
        if not math.isnan(value) and (self.best is None or sign * value < sign * self.best["value"]):
            self.best = {"step": self.step, "value": value, "monitor": self.config.checkpoint.monitor}

    # -- checkpoints

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The model's tensors and their moving average, by the names they have in a checkpoint."""
        tensors = {f"model.{n}": t for n, t in state_tensors(self.parallel.module).items()}
        if self.average is not None:
            tensors |= {f"average.{n}": t for n, t in self.average.average.items()}
        return tensors

    def _save(self) -> None:
        tensors = self._tensors()
        tensors |= {f"optimizer.{k}": t for k, t in optimizer_state(self.optimizer, self.names).items()}
        state = {
            "world": self.runtime.world,
            "sampler": dict(zip(("epoch", "batch"), divmod(self.step, self.sampler.steps), strict=True)),
            "best": self.best,
            "random": self.runtime.gather(get_random_state(self.runtime.device)),
        }
        self.checkpoints.save(self.step, tensors, state)

    def _restore(self) -> None:
        step = self.checkpoints.latest() if self.context.resumed else None
        if step is None:
            if self.context.resumed:
                self.log.say(f"{self.context.folder} has no checkpoint yet: starting from its beginning")
            return
        folder = self.checkpoints.path(step)
        state = self.checkpoints.read_state(step)
        tensors = self._tensors()
        for prefix in ("model.", "average."):
            check_fits(folder, tensors, prefix)
        load_tensors(folder, tensors)
        _tell(self.parallel.module)
        load_optimizer(folder, self.optimizer, self.names, "optimizer.")
        self.step, self.best = step, state["best"]
        if state["world"] == self.runtime.world:
            set_random_state(state["random"][self.runtime.rank], self.runtime.device)
        else:  # no rank has a state to go on from: a new one, the same for each start from here
            seed_everything(self.config.seed + step, rank=1 + self.runtime.rank)
        self.log.say(f"resuming after step {step} of {self.total}")

    # -- the end

    def _finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Write the model, the last line, the plots and the summary; the final metrics."""
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            whole = gather_tensors(state_tensors(self.parallel.module))
        folder = self.context.folder
        further: dict[str, float] = {}

        def write() -> dict[str, float]:
            model = new_model(self.task, self.config)
            for name, tensor in state_tensors(model).items():
                tensor.copy_(whole[name])
            save_model(model, folder / "model.safetensors")
            further.update({**self.task.final(metrics), **count_parameters(model)})
            self.log.write({**metrics, **further})
            plots = folder / "plots"
            plots.mkdir(exist_ok=True)
            from .plots import loss_curve

            loss_curve(read_metrics(folder), plots / "loss.png")
            model.to(self.runtime.device).eval()
            with torch.no_grad():
                self.task.plots(model, self.data, plots)
            return {k: v for k, v in metrics.items() if "/" in k or k == "loss"} | further

        final = self.runtime.on_main(write)
        self.context.finish(final, step=self.step)
        return final

    # -- small things

    def _sampler(self, dataset: Any, accumulate: int, seed: int | None) -> Sampler:
        mesh = self.runtime.mesh
        part, parts = mesh.get_local_rank("dp"), mesh.size(0)
        if len(dataset) == 0:
            raise ConfigError("a data set of this experiment is empty")
        return Sampler(len(dataset), self.config.data.batch_size, part, parts, accumulate, seed)

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.config.trainer.precision == "bf16"
        return torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=enabled)

    def _move(self, batch: Any) -> Any:
        if isinstance(batch, torch.Tensor):
            double = self.config.trainer.precision == "fp64" and batch.is_floating_point()
            dtype = torch.float64 if double else None
            return batch.to(self.runtime.device, dtype, non_blocking=True)
        if isinstance(batch, Mapping):
            return {k: self._move(v) for k, v in batch.items()}
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*(self._move(v) for v in batch))
        if isinstance(batch, (list, tuple)):
            return type(batch)(self._move(v) for v in batch)
        return batch.to(self.runtime.device) if hasattr(batch, "to") else batch


def _build(call: Callable[[], T]) -> T:
    """``call()``; what it finds wrong with the config, the files or the environment ends the run with a message."""
    try:
        return call()
    except ConfigError:
        raise
    except (ValueError, OSError, ImportError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(f"{error} ({Path(place.filename).name}, line {place.lineno})") from error


def new_model(task: Task, config: Config) -> nn.Module:
    """The task's model in the run's precision."""
    model = task.build_model()
    return model.double() if config.trainer.precision == "fp64" else model


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``parameters``, a complex one counted once (as papers on neural operators do), and ``parameters_real``, twice."""
    shown, own = model.state_dict(), dict(model.named_parameters())
    return {
        "parameters": sum(shown[n].numel() if n in shown else p.numel() for n, p in own.items()),
        "parameters_real": sum(p.numel() * (2 if p.is_complex() else 1) for p in own.values()),
    }


def save_model(model: nn.Module, path: Path) -> None:
    """The model's ``state_dict`` as safetensors, which knows complex64 but no complex128 (stored as real pairs)."""
    safetensors = require("safetensors.torch", extra="train")
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    state = {k: torch.view_as_real(v) if v.dtype == torch.complex128 else v for k, v in state.items()}
    with replacing(path) as partial:
        safetensors.save_file(state, str(partial))


def load_run(
    folder: str | Path, *, checkpoint: str | int | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """The trained model of a run, in eval mode.

    Reads ``config.yaml`` and ``model.safetensors``; nothing in the folder is unpickled or run.

    Args:
        folder: a run folder, such as ``runs/tfno_darcy/2026-01-31_12-00-00``.
        checkpoint: None for the final model; else that of a checkpoint: ``"last"``, ``"best"`` or a step. Where the
            run keeps a moving average of the weights, the model is the average.
        device: where the model is put.

    Raises:
        ConfigError: the folder is no run, or has no such model, or the model is of another architecture. It is a
            ValueError.

    Example::

        model = torchlayers.training.load_run("runs/tfno_darcy/2026-01-31_12-00-00")
        pressure = model(permeability)
    """
    folder = Path(folder)
    config = load_config(folder)
    experiment = get_experiment(config.task)
    if experiment.task is None:
        raise ConfigError(f"{folder} has no model: {config.task} is a study")
    with torch.random.fork_rng([]):
        model = new_model(experiment.task(config), config)
    if checkpoint is not None:
        _load_checkpoint(model, folder, checkpoint)
        return model.to(device).eval()
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no model.safetensors: the run is not complete, resume={folder} goes on with it"
        )
    safetensors = require("safetensors", extra="train")
    try:
        model.load_state_dict(require("safetensors.torch", extra="train").load_file(str(path)))
    except (RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} is damaged or of another architecture: {error}") from None
    return model.to(device).eval()


def _load_checkpoint(model: nn.Module, folder: Path, checkpoint: str | int) -> None:
    checkpoints = Checkpoints(folder, None, 1)  # type: ignore[arg-type]
    steps = checkpoints.steps()
    if not steps:
        raise ConfigError(f"{folder} has no checkpoint")
    step = steps[-1] if checkpoint == "last" else checkpoint
    if checkpoint == "best":
        best = checkpoints.read_state(steps[-1])["best"]
        if best is None:
            raise ConfigError(f"{folder} has no best checkpoint: checkpoint.monitor was not set")
        step = best["step"]
    if step not in steps:
        raise ConfigError(f"{folder} has no checkpoint {checkpoint!r}; there are {', '.join(map(str, steps))}")
    path = checkpoints.path(int(step))
    averaged = {k for k in read_shapes(path) if k.startswith("average.")}
    tensors = {
        (f"average.{n}" if f"average.{n}" in averaged else f"model.{n}"): t for n, t in state_tensors(model).items()
    }
    check_fits(path, {f"model.{n}": t for n, t in state_tensors(model).items()}, "model.")
    load_tensors(path, tensors)
    _tell(model)


def _tell(model: nn.Module) -> None:
    """Tell the modules that keep something of their state elsewhere too that it was written in place."""
    for module in model.modules():
        written = getattr(module, "state_written", None)
        if callable(written):
            written()
