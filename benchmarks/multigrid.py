"""Memory of multi-grid patches over ranks: one training step of a field, its patches shared by P = 1, 2, 4 processes.

What a rank holds is what its patches need, plus the whole input and output fields. Measured in each process: the bytes
of the tensors that autograd saves for the backward pass (each storage once; parameters apart), and how far the resident
memory rises over what the process held before the step, at its peak. Strong scaling keeps the field and adds ranks;
weak scaling gives each rank as many patches as one process has alone.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ._harness import BOTH, OURS, Settings, say

# (what grows, ranks, points along each axis, patches along each axis); a patch has 64 × 64 points and a halo of 8.
STRONG = [("strong", ranks, (256, 256), (4, 4)) for ranks in (1, 2, 4)]
WEAK = [("weak", ranks, (128 * ranks, 256), (2 * ranks, 4)) for ranks in (1, 2, 4)]
QUICK = [("strong", ranks, (64, 64), (2, 2)) for ranks in (1, 2)]
HALO = 8
WIDTH, MODES, LAYERS = 16, 16, 2
TIMEOUT_S = 300


def saved_bytes(step: Callable[[], Any], exclude: set[int]) -> int:
    """Bytes of all storages that autograd saves while ``step`` runs, but those at the addresses ``exclude``."""
    storages: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in exclude:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def _status(key: str) -> int:
    """Bytes that Linux reports for this process under ``key``."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def resident_growth(step: Callable[[], Any]) -> int | None:
    """How far resident memory rises during ``step`` over what it was before; None where the system does not say."""
    try:
        # What earlier calls freed goes back to the system: the step would take it again without a rise.
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _rank(rank: int, ranks: int, size: tuple[int, ...], patches: tuple[int, ...], folder: str) -> None:
    """One process of a world: measures its step and writes what it found."""
    from torchlayers._ring import leave_group
    from torchlayers.tfno import TFNO, LpLoss
    from torchlayers.tfno.parallel import MultiGridParallel
    from torchlayers.tfno.patching import MultiGridPatching

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "mp"))
    torch.manual_seed(0)
    patching = MultiGridPatching(1, padding=HALO, patches=patches)
    network = TFNO((MODES, MODES), patching.channels(1), 1, WIDTH, n_layers=LAYERS)
    model = MultiGridParallel(network, patching, mesh)
    x, y = torch.randn(2, 1, 1, *size)
    loss = LpLoss(d=2)

    def forward() -> torch.Tensor:
        return loss(model(x), y)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward().backward()

    step()  # makes the tables
    result = {"resident": resident_growth(step)}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    result["saved"] = saved_bytes(forward, parameters)
    pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    leave_group()


def world(ranks: int, size: tuple[int, ...], patches: tuple[int, ...]) -> list[dict[str, Any]]:
    """What each of ``ranks`` gloo processes measured."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        members = [context.Process(target=_rank, args=(r, ranks, size, patches, folder)) for r in range(ranks)]
        for member in members:
            member.start()
        deadline = time.monotonic() + TIMEOUT_S
        while any(m.exitcode is None for m in members) and not any(m.exitcode for m in members):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [m.exitcode for m in members]
        for member in members:  # those that wait for one that failed
            member.terminate()
            member.join()
        if any(code != 0 for code in codes):
            raise RuntimeError(f"the {ranks} ranks ended with {codes} (None: not within {TIMEOUT_S} s)")
        return [json.loads(pathlib.Path(folder, f"{r}.json").read_text()) for r in range(ranks)]


def measure(settings: Settings) -> list[dict[str, Any]]:
    """A row per world: of the rank that needs most, the bytes saved for backward and the peak resident growth."""
    if settings.device.type != "cpu" or not settings.memory or sys.platform != "linux":
        return []
    rows = []
    for scaling, ranks, size, patches in QUICK if settings.quick else STRONG + WEAK:
        say(f"multigrid: {scaling} scaling, {ranks} ranks, {size[0]} × {size[1]}", end=" ")
        saved: dict[str, Any] = {"status": "ok"}
        resident: dict[str, Any] = {"status": "ok"}
        try:
            found = world(ranks, size, patches)
        except RuntimeError as error:
            saved = {"status": "failed", "detail": str(error)}
            say("failed")
        else:
            saved["peak_bytes"] = max(f["saved"] for f in found)
            growth = [f["resident"] for f in found if f["resident"] is not None]
            if growth:
                resident["peak_bytes"] = max(growth)
            say(f"saved {saved['peak_bytes'] / 1e6:.1f} MB, resident {max(growth, default=0) / 1e6:.1f} MB a rank")
        entries = {OURS: saved}
        if "peak_bytes" in resident:
            entries["resident memory"] = resident
        labels = {
            "scaling": scaling,
            "P": ranks,
            "field": "×".join(map(str, size)),
            "patches": "×".join(map(str, patches)),
        }
        rows.append({"case": labels, "mode": BOTH, "headline": False, "implementations": entries})
    return rows
