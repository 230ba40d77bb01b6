"""What a result file says about where its numbers come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from typing import Any

import torch

from ._harness import ROOT

# Distribution names of what ours and the peers are made of.
DISTRIBUTIONS = ("torch", "triton", "einops", "numpy", "neuraloperator", "tensorly", "tensorly-torch", "e3nn")


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def slug(device: torch.device) -> str:
    """The device in a file's name: ``cpu``, or the GPU's model."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).replace("NVIDIA", "").replace("AMD", "")
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, CPU, threads, versions, commit, date."""
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        fields = _output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader")
        driver, clock, max_clock = [f.strip() for f in fields.splitlines()[0].split(",")] if fields else [None] * 3
        gpu = {
            "driver": driver,
            "sm_clock": clock,
            "sm_clock_max": max_clock,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
    # Result files and the table made from them change while measuring; they are not what was measured.
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return {
        "device": device_name(device),
        "device_type": device.type,
        **gpu,
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
