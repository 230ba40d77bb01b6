"""Processes, devices, the mesh, signals and seeds: what a run stands on."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .._ring import leave_group
from .config import Config
from .errors import ConfigError, TrainingError

__all__ = ["Runtime", "Signals", "get_random_state", "open_runtime", "seed_everything", "set_random_state"]

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """This process among the others. One process is a world of one, with a mesh like any other."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def main(self) -> bool:
        return self.rank == 0

    def on_main(self, call: Callable[[], T]) -> T:
        """``call()`` on rank 0: its result, or its error, on all ranks."""
        if self.world == 1:
            return call()
        result: T | None = None
        failure: Exception | None = None
        if self.main:
            try:
                result = call()
            except Exception as error:
                failure = error
        # The error's text, not the error: not every exception survives pickling.
        shared = [result, None if failure is None else str(failure), isinstance(failure, ConfigError)]
        dist.broadcast_object_list(shared, src=0)
        if failure is not None:
            try:
                raise failure
            finally:
                # The error's traceback holds this frame; held by it in turn, both would keep the process group alive to
                # the end of the interpreter, where its threads may no longer end in order.
                failure = None
        if shared[1] is not None:
            raise (ConfigError if shared[2] else TrainingError)(f"rank 0: {shared[1]}")
        return shared[0]  # type: ignore[return-value]

    def main_first(self, call: Callable[[], T]) -> T:
        """``call()`` on every rank, on rank 0 before the others (which may find what it left on disk)."""
        result: list[T] = []
        self.on_main(lambda: result.append(call()))
        return result[0] if self.main else call()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of all ranks, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        self.gather(None)


@contextlib.contextmanager
def open_runtime(config: Config) -> Iterator[Runtime]:
    """Join the processes that torchrun started, or be a world of one.

    Raises:
        ConfigError: the device is not there, or the mesh does not fit the world.
    """
    distributed = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    rank, world = (int(os.environ[k]) if distributed else d for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    try:
        shape = config.mesh.shape(world)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    device = _device(config.trainer.device)
    timeout = timedelta(seconds=config.trainer.timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = _store(timeout) if distributed else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield Runtime(rank, world, device, _mesh(device, shape, timeout))
    finally:
        leave_group()


def _mesh(device: torch.device, shape: tuple[int, ...], timeout: timedelta) -> DeviceMesh:
    """The mesh, from groups made here: those that ``init_device_mesh`` makes wait for torch's default time-out."""
    ranks = torch.arange(dist.get_world_size()).view(shape)
    groups = []
    for dim, size in enumerate(shape):
        members = ranks.movedim(dim, -1).reshape(-1, size).tolist()
        groups.append(dist.new_subgroups_by_enumeration(members, timeout=timeout)[0])
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("dp", "sp", "mp"))


_rendezvous: list[dist.Store] = []
_runs = itertools.count()


def _store(timeout: timedelta) -> dist.Store:
    """Where the processes meet for the next run: one store in a process's life, a prefix of its own for each run."""
    if not _rendezvous:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        _rendezvous.append(store)
    _rendezvous[0].set_timeout(timeout)
    return dist.PrefixStore(f"torchlayers/{next(_runs)}", _rendezvous[0])


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda, but torch finds no CUDA device here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ConfigError(f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def is_lost_rank(error: BaseException) -> bool:
    """Whether ``error`` is a collective's that another rank did not take part in."""
    if isinstance(error, (dist.DistError, dist.DistBackendError)):
        return True
    words = (
        "gloo",
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "NCCL",
        "Broken pipe",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class Signals:
    """Notes SIGTERM and SIGINT while it is entered; the loop acts on them at a step boundary.

    A launcher and a terminal may both send the same one, so repeats are ignored for two seconds. After that a further
    SIGINT raises KeyboardInterrupt, for a program that does not reach its next step.
    """

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0
        self._previous: dict[int, Any] = {}

    def _note(self, signum: int, frame: Any) -> None:
        if not self.received:
            self.received, self._when = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._when > 2.0:
            raise KeyboardInterrupt

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed torch, Python's ``random`` and, where it is loaded, NumPy."""
    mixed = (seed * 1_000_003 + rank) % 2**63
    torch.manual_seed(mixed)
    random.seed(mixed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(mixed % 2**32)


def get_random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator of this process, as JSON can hold it."""
    state: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes().hex(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`get_random_state` gave."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8), device)
    if "numpy" in state and "numpy" in sys.modules:
        name, keys, *rest = state["numpy"]
        numpy = sys.modules["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), *rest))
