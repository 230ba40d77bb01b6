"""What a run writes and shows: metrics as JSON lines and in TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._checks import require
from .checkpoint import replacing
from .config import Trainer
from .runtime import Runtime

__all__ = ["RunLog", "logger", "read_metrics", "versions"]

logger = logging.getLogger("torchlayers.training")
_NOT_SHOWN = {"step", "epoch", "samples_per_second", "peak_memory_gib", "parameters", "parameters_real"}


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; a last one that a kill cut short is left out."""
    path = Path(folder) / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def versions() -> dict[str, Any]:
    """Versions, git commit and machine, for a run's ``versions.json``."""
    found: dict[str, Any] = {
        "torchlayers": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "numpy", "hydra", "neuralop"):
        if name in sys.modules:
            found[name] = getattr(sys.modules[name], "__version__", "unknown")
    root = Path(__file__).resolve().parents[2]
    found["git_commit"] = _git(root, "rev-parse", "HEAD")
    found["git_changed"] = None if found["git_commit"] is None else bool(_git(root, "status", "--porcelain"))
    found["platform"] = platform.platform()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _git(root: Path, *arguments: str) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class RunLog:
    """The metrics of one run. On ranks other than 0 it does nothing."""

    def __init__(self, folder: Path, trainer: Trainer, runtime: Runtime):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.active = runtime.main
        self.tensorboard = trainer.tensorboard
        self.bar_wanted = trainer.progress and sys.stderr.isatty()
        self._bar: Any = None
        self._file: Any = None
        self._writer: Any = None
        self._began = (time.monotonic(), 0)
        self.total = 0

    def rewind(self, step: int) -> dict[str, Any] | None:
        """Drop the lines after ``step``, and give back the line of ``step`` itself where there is one."""
        if not self.active:
            return None
        lines = [line for line in read_metrics(self.folder) if line["step"] <= step]
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return lines[-1] if lines and lines[-1]["step"] == step else None

    def start(self, step: int, total: int) -> None:
        """Open the files; ``step`` of ``total`` steps are done."""
        if not self.active:
            return
        self.total = total
        self._began = (time.monotonic(), step)
        self._file = self.path.open("a")
        if self.tensorboard:
            require("tensorboard", extra="train")
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self._writer = writer(str(self.folder / "tensorboard"), purge_step=step + 1 if step else None)
        if self.bar_wanted:
            self._bar = require("tqdm", extra="train").tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def advance(self, loss: float) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            self._bar.update()

    def write(self, metrics: dict[str, Any]) -> None:
        """Append a line; it has at least ``step``."""
        if not self.active:
            return
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, metrics["step"])
        if self._bar is None:
            self.say(self._line(metrics))

    def _line(self, metrics: dict[str, Any]) -> str:
        step = metrics["step"]
        seconds, first = self._began
        shown = {k: v for k, v in metrics.items() if k not in _NOT_SHOWN}
        words = [f"step {step}/{self.total}" if self.total else f"step {step}"]
        words += [f"{k} {v:.4g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in shown.items()]
        if "samples_per_second" in metrics:
            words.append(f"{metrics['samples_per_second']:.0f} samples/s")
        if first < step < self.total:
            left = (time.monotonic() - seconds) / (step - first) * (self.total - step)
            words.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(words)

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            logger.info(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        self._bar = self._writer = self._file = None
