"""What a registered ``run(context)`` is given, and how a run folder is made and read."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from .._checks import require
from .checkpoint import replacing, write_json
from .compose import to_yaml
from .config import Config
from .errors import ConfigError
from .log import RunLog, versions
from .registry import get_experiment
from .runtime import Runtime, open_runtime, seed_everything
from .task import Task

__all__ = ["Context", "execute"]

T = TypeVar("T")


class Context:
    """One run of an experiment.

    Attributes:
        config: the experiment's config object.
        runtime: this process among the others; ``device``, ``mesh`` and ``main`` (rank 0 or not) are short for its.
        folder: the run folder.
        log: ``log.say(text)`` shows a line.
        resumed: whether the folder holds an earlier part of this run.
    """

    def __init__(self, config: Config, runtime: Runtime, folder: Path):
        self.config: Any = config
        self.runtime = runtime
        self.folder = folder
        self.resumed = config.resume is not None
        self.log = RunLog(folder, config.trainer, runtime)
        self._started = time.monotonic()
        self._step: int | None = None
        self._finished = False

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def mesh(self) -> DeviceMesh:
        return self.runtime.mesh

    @property
    def main(self) -> bool:
        return self.runtime.main

    def fit(self, task: Task) -> dict[str, float]:
        """Train the task's model from start, or from where the folder's last checkpoint is, to end.

        Returns:
            The final metrics.

        Raises:
            ConfigError: before the first step, on all ranks.
            TrainingError: the loss is not finite, or a checkpoint cannot be written.
            Interrupted: after SIGTERM or SIGINT.
        """
        from .loop import Loop

        return Loop(self, task).run()

    def report(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """A study's line in ``metrics.jsonl``."""
        if self._step is None:
            self.log.rewind(-1)
            self.log.start(0, 0)
        self._step = step
        self.log.write({"step": step, **metrics})

    def progress(self, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """``items``, with a progress bar in a terminal: for studies."""
        shown = self.main and self.log.bar_wanted
        yield from require("tqdm", extra="train").tqdm(items, total=total) if shown else items

    def finish(self, metrics: Mapping[str, float] | None, **about: Any) -> None:
        """Write ``summary.json``, by which a run is known to be complete; a study's last line before it."""
        if self._finished:
            return
        if not about:
            self.report(metrics or {}, step=0 if self._step is None else self._step + 1)
        self._finished = True
        if self.main:
            seconds = round(time.monotonic() - self._started, 3)
            with replacing(self.folder / "summary.json") as partial:
                write_json(partial, {"metrics": dict(metrics or {}), "seconds": seconds, **about}, indent=1)


def execute(config: Config) -> tuple[Path, dict[str, float]]:
    """Run the experiment that ``config`` names: its run folder and its final metrics.

    Raises:
        ConfigError, TrainingError, Interrupted: as :meth:`Context.fit`.
    """
    experiment = get_experiment(config.task)
    with open_runtime(config) as runtime:
        folder = Path(runtime.on_main(lambda: str(_open_folder(config, runtime))))
        context = Context(config, runtime, folder)
        try:
            seed_everything(config.seed)
            metrics = dict(experiment.run(context) or {})
            context.finish(metrics)
        except ConfigError:
            # Nothing ran: leave no folder that looks as if.
            if runtime.main and not context.resumed and not context.log.path.exists():
                context.log.close()
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            context.log.close()
            if folder.exists():
                context.log.say(f"run folder: {folder}")
    return folder, metrics


def _open_folder(config: Config, runtime: Runtime) -> Path:
    default = Path("runs") / (config.experiment or config.task) / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(config.resume or config.run_dir or default)
    try:
        if config.resume is None:
            if config.run_dir is None:
                attempt = 1
                while folder.exists():
                    attempt += 1
                    folder = default.with_name(f"{default.name}_{attempt}")
            elif folder.is_dir() and any(folder.iterdir()):
                raise ConfigError(f"run_dir {folder} is not empty; resume={folder} continues the run in it")
            folder.mkdir(parents=True, exist_ok=True)
        saved = to_yaml(dataclasses.replace(config, resume=None))
        with replacing(folder / "config.yaml") as partial:
            partial.write_text(saved)
        _note_start(folder, runtime)
    except OSError as error:
        raise ConfigError(f"run_dir {folder} cannot be written: {error}") from None
    return folder


def restarted(folder: Path) -> bool:
    """Whether torchrun has started this process anew after a failure, and the run in ``folder`` is what it was at."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    if launch is None or not (folder / "config.yaml").is_file():
        return False
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        return True
    try:  # an agent that lost another one starts its processes anew without counting it
        last = json.loads((folder / "versions.json").read_text())["starts"][-1]
    except (OSError, ValueError, KeyError, IndexError):
        return False
    return launch != "none" and last.get("launch") == launch


def _note_start(folder: Path, runtime: Runtime) -> None:
    """Add to ``versions.json`` what this start runs with; there is one entry for each start of the run."""
    path = folder / "versions.json"
    try:
        starts = json.loads(path.read_text())["starts"] if path.exists() else []
    except (ValueError, KeyError):
        starts = []
    now: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": shlex.join(sys.argv)}
    now["launch"] = os.environ.get("TORCHELASTIC_RUN_ID")
    now |= {"world": runtime.world, "device": runtime.device.type, "threads": torch.get_num_threads(), **versions()}
    with replacing(path) as partial:
        write_json(partial, {"starts": [*starts, {**now, "process": os.getpid()}]}, indent=1)
