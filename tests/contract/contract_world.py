"""The data-parallel items of the contract: one world of two gloo processes for all entries."""

from __future__ import annotations

import copy
import datetime
import importlib
import json
import pathlib
import traceback

import torch
import torch.distributed as dist
from contract_checks import DISTRIBUTED, Entry, tensors
from torch import nn

from torchlayers._ring import leave_group
from torchlayers.testing import assert_close_rel

WORLD = 2


def failures(sources: dict[str, float], folder: pathlib.Path) -> dict[str, str]:
    """``"entry item"`` -> what went wrong, on whichever rank.

    Args:
        sources: module with a list ``ENTRIES`` -> seconds that a collective waits. After a failure on one rank the
            other waits that long.
        folder: an empty folder.
    """
    torch.multiprocessing.spawn(_process, (str(folder), sources), nprocs=WORLD)
    found = {}
    for rank in range(WORLD):
        found |= json.loads((folder / f"rank{rank}.json").read_text())
    return found


def _process(rank: int, folder: str, sources: dict[str, float]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    found: dict[str, str] = {}
    for source, timeout in sources.items():
        for entry in importlib.import_module(source).ENTRIES:
            for name in (n for n in DISTRIBUTED if n not in entry.not_applicable):
                error = _try(name, entry, rank, timeout)
                if error is not None:
                    found[f"{entry.name} {name}"] = error
    pathlib.Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    leave_group()


def _try(name: str, entry: Entry, rank: int, timeout: float) -> str | None:
    """The traceback of an item's failure on this rank, once all ranks are through with it."""
    # A group of its own, since a failure leaves it in no state to go on with.
    group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
    error = None
    try:
        {"ddp": check_ddp, "fsdp2": check_fsdp2}[name](entry, rank, group)
    except Exception:
        error = traceback.format_exc()
    dist.barrier()
    return error


def check_ddp(entry: Entry, rank: int, group: dist.ProcessGroup) -> None:
    _train_and_compare(entry, rank, lambda module: nn.parallel.DistributedDataParallel(module, process_group=group))


def check_fsdp2(entry: Entry, rank: int, group: dist.ProcessGroup) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    _train_and_compare(entry, rank, lambda module: fully_shard(module, mesh=mesh))


def _train_and_compare(entry: Entry, rank: int, wrap) -> None:
    """Two steps on two ranks equal two steps on one; in the second step one rank has no samples."""
    alone = entry.build(torch.float64)
    module = copy.deepcopy(alone)
    wrapped = wrap(module)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    optimizer_alone = torch.optim.SGD(alone.parameters(), lr=0.05)
    splits = [(2, 2)] if "empty_batch" in entry.not_applicable else [(2, 2), (4, 0)]
    for step, sizes in enumerate(splits):
        torch.manual_seed(step)
        args = entry.make_input(sum(sizes), torch.float64)
        mine = tuple(a.split(sizes)[rank] if isinstance(a, torch.Tensor) else a for a in args)
        want = tensors(alone(*args))
        got = tensors(wrapped(*mine))
        for g, w in zip(got, want, strict=True):
            assert_close_rel(g, w.split(sizes)[rank], rtol=1e-12)
        count = sum(w.numel() for w in want)
        for opt, outputs, share in ((optimizer_alone, want, 1), (optimizer, got, WORLD)):
            opt.zero_grad()
            # Gradients are averaged over ranks, hence WORLD: the sum over all samples is what both sides minimise.
            (sum((o.abs() ** 2).sum() for o in outputs) * share / count).backward()
            opt.step()
    stepped = dict(module.named_parameters())
    before = dict(entry.build(torch.float64).named_parameters())
    for name, parameter in alone.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} was not trained: this comparison says nothing"
        value = stepped[name]
        assert_close_rel(value.full_tensor() if hasattr(value, "full_tensor") else value, parameter, rtol=1e-10)
