"""Errors that end a run with a message instead of a traceback."""

from __future__ import annotations

import signal

__all__ = ["ConfigError", "Interrupted", "TrainingError"]


class ConfigError(ValueError):
    """The run cannot start as configured."""


class TrainingError(RuntimeError):
    """The run cannot go on."""


class Interrupted(Exception):
    """A signal arrived, all ranks agreed on it, and a checkpoint was written."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; its checkpoint is written")
        self.code = 128 + signum
