"""How experiments measure what a step costs."""

from __future__ import annotations

import time

import torch

__all__ = ["seconds"]


def seconds(device: torch.device) -> float:
    """On a CPU the process's own time, so that other work on the machine does not count; else wall-clock time."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()
