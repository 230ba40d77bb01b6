"""What ``import torchlayers`` adds to ``import torch``, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from ._harness import OURS, ROOT, Settings, quantile, say

# Each statement runs in a process that has imported torch, and says how many seconds it took.
PROBE = """
import sys, time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
start = time.perf_counter()
{statement}
sys.stdout.write(f"{{torch_s}} {{time.perf_counter() - start}}")
"""
STATEMENTS = {
    "import torchlayers": "import torchlayers",
    "import torchlayers, first use of SpectralConv": "import torchlayers; torchlayers.SpectralConv",
}
PEERS = {"neuraloperator": ("neuralop", "from neuralop.layers.spectral_convolution import SpectralConv")}


def _seconds(statement: str) -> tuple[float, float] | str:
    """How long ``import torch`` and then ``statement`` took, or the last line of the error."""
    command = [sys.executable, "-c", PROBE.format(statement=statement)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    first, second = done.stdout.split()[-2:]
    return float(first), float(second)


def _summary(values: list[float]) -> dict[str, Any]:
    ms = [1e3 * v for v in values]
    return {"status": "ok", "ms": quantile(ms, 0.5), "ms_p20": quantile(ms, 0.2), "ms_p80": quantile(ms, 0.8)}


def measure(settings: Settings) -> list[dict[str, Any]]:
    """A row per statement: what it adds after ``import torch``, beside ``import torch`` itself and the peers."""
    if settings.device.type != "cpu" or not settings.speed:
        return []
    rounds = 2 if settings.quick else 11
    statements = STATEMENTS | {name: statement for name, (_, statement) in PEERS.items()}
    added: dict[str, list[float]] = {name: [] for name in statements}
    alone: dict[str, list[float]] = {name: [] for name in statements}
    failed: dict[str, str] = {}
    say(f"startup: {rounds} rounds of {len(statements)} fresh processes")
    for i in range(rounds + 1):
        for name, statement in statements.items():
            if name in failed:
                continue
            outcome = _seconds(statement)
            if isinstance(outcome, str):
                failed[name] = outcome
            elif i > 0:  # the first round fills the file cache
                alone[name].append(outcome[0])
                added[name].append(outcome[1])
    rows = []
    for name in STATEMENTS:
        if name in failed:
            entries: dict[str, dict[str, Any]] = {OURS: {"status": "failed", "detail": failed[name]}}
        else:
            entries = {OURS: _summary(added[name]), "import torch itself": _summary(alone[name])}
        for peer, (module, _) in PEERS.items():
            if peer not in failed:
                entries[peer] = _summary(added[peer])
            elif f"No module named '{module}'" in failed[peer]:
                entries[peer] = {"status": "not installed", "detail": module}
            else:
                entries[peer] = {"status": "failed", "detail": failed[peer]}
        ours = entries[OURS]
        for other, entry in entries.items():
            if other != OURS and ours["status"] == entry["status"] == "ok":
                theirs = alone[name] if other == "import torch itself" else added[other]
                ratios = [a / b for a, b in zip(theirs, added[name], strict=True)]
                entry |= {
                    f"ratio{suffix}": quantile(ratios, q) for suffix, q in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8))
                }
        rows.append(
            {"case": {"statement": name}, "mode": "after import torch", "headline": True, "implementations": entries}
        )
    return rows
