"""Checkpoints: tensors by ``torch.distributed.checkpoint``, everything else as JSON beside them.

A checkpoint is a folder ``checkpoints/step_<n>``. It is written under another name, flushed to disk and renamed, so
that one with this name is whole; what a kill or a full disk leaves behind is swept away by the next run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from .errors import ConfigError, TrainingError
from .parallel import full
from .runtime import Runtime

__all__ = ["Checkpoints", "RestrictedReader", "check_fits", "load_optimizer", "load_tensors", "optimizer_state"]

_FORMAT = 1
_NAME = re.compile(r"step_(\d{9})")
_METADATA = "torch.distributed.checkpoint.metadata"
# All that the metadata of tensors consists of. Every one is a plain record, an enum or a torch constant.
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which the metadata of tensors has no use for")


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # no path of this machine in the file


class RestrictedReader(dcp.FileSystemReader):
    """Reads a checkpoint of tensors and nothing else: no code of a stranger's file runs.

    DCP unpickles ``.metadata`` freely, and unpickles freely every entry that it calls bytes; here the former is
    restricted to the record types that describe tensors and the latter is refused, as are files outside the folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
                raise pickle.UnpicklingError("it holds no checkpoint metadata")
            for key, entry in metadata.state_dict_metadata.items():
                if not isinstance(entry, TensorStorageMetadata):
                    raise pickle.UnpicklingError(f"its entry {key!r} is not a tensor")
            for info in metadata.storage_data.values():
                if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
                    raise pickle.UnpicklingError(f"it refers to {info.relative_path!r}")
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a checkpoint's metadata: {error}") from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_shapes(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name, shape and dtype of every tensor in a checkpoint."""
    return RestrictedReader(folder).read_metadata().state_dict_metadata  # type: ignore[return-value]


def check_fits(folder: Path, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Raise ConfigError where a checkpoint's tensors under ``prefix`` are not those of ``tensors``."""
    saved = {k: tuple(m.size) for k, m in read_shapes(folder).items() if k.startswith(prefix)}
    ours = {k: tuple(t.shape) for k, t in tensors.items() if k.startswith(prefix)}
    differ = [k for k in sorted(saved.keys() | ours.keys()) if saved.get(k) != ours.get(k)]
    if differ:
        first = differ[0]
        raise ConfigError(
            f"{folder} is of another architecture: {len(differ)} of {len(ours)} tensors differ, the first is"
            f" {first.removeprefix(prefix)} (in the checkpoint {saved.get(first, 'absent')}, in the model"
            f" {ours.get(first, 'absent')})"
        )


def load_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill ``tensors`` in place, each rank its own shards, from however many ranks wrote them."""
    read_shapes(folder)  # raises by itself, where DCP would wrap the error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        try:
            dcp.load(tensors, storage_reader=RestrictedReader(folder))
        except (dcp.api.CheckpointException, RuntimeError, OSError, KeyError) as error:
            raise ConfigError(f"{folder} is damaged; remove it to go on from the one before: {_cause(error)}") from None


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as ``<parameter>/<entry>``; ``names`` gives each parameter's by ``id``."""
    state = {}
    for parameter, entries in optimizer.state.items():
        for entry, value in entries.items():
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{type(optimizer).__name__} keeps {entry!r} as {type(value).__name__}, not a tensor")
            state[f"{names[id(parameter)]}/{entry}"] = value
    return state


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: dict[int, str], prefix: str) -> None:
    """Fill the optimizer's state from a checkpoint's tensors under ``prefix``."""
    saved = {k.removeprefix(prefix): m for k, m in read_shapes(folder).items() if k.startswith(prefix)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    wanted: dict[str, torch.Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        for key, entry in saved.items():
            name, _, kind = key.rpartition("/")
            if name != names[id(parameter)]:
                continue
            dtype = entry.properties.dtype
            if entry.size == parameter.shape:
                value = torch.zeros_like(parameter, dtype=dtype)  # sharded as the parameter is
            else:
                value = torch.zeros(entry.size, dtype=dtype)
            state.setdefault(index, {})[kind] = wanted[prefix + key] = value
    if wanted:
        load_tensors(folder, wanted)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Checkpoints:
    """The checkpoints of one run: the last ``keep``, and the best besides."""

    def __init__(self, folder: Path, runtime: Runtime, keep: int):
        self.folder = folder / "checkpoints"
        self.runtime = runtime
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}"

    def steps(self) -> list[int]:
        """The steps with a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> int | None:
        """The last checkpoint's step, as rank 0 sees it; what an earlier run left half written is removed."""

        def find() -> int | None:
            for path in self.folder.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)
            return next(reversed(self.steps()), None)

        return self.runtime.on_main(find)

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``, then drop those that need not be kept (``state["best"]`` names one).

        Raises:
            TrainingError: on all ranks, where any could not write; the checkpoints before are untouched.
        """
        partial = self.folder / f".step_{step:09d}.partial"
        try:
            self.runtime.on_main(lambda: partial.mkdir(parents=True))
            dcp.save(tensors, storage_writer=_Writer(partial, sync_files=True))
            self.runtime.on_main(lambda: self._finish(step, partial, state))
        except (OSError, dcp.api.CheckpointException, TrainingError, RuntimeError) as error:
            if self.runtime.main:
                shutil.rmtree(partial, ignore_errors=True)
            steps = self.steps()
            raise TrainingError(
                f"the checkpoint of step {step} could not be written: {_cause(error)}"
                f" (the last whole one: {self.path(steps[-1]) if steps else 'none'})"
            ) from None

    def _finish(self, step: int, partial: Path, state: dict[str, Any]) -> None:
        write_json(partial / "state.json", {"format": _FORMAT, "step": step, **state})
        fsync(partial)
        if self.path(step).exists():  # a resumed run reached the step again
            shutil.rmtree(self.path(step))
        os.rename(partial, self.path(step))
        fsync(self.folder)
        best = (state.get("best") or {}).get("step")
        for old in self.steps()[: -self.keep]:
            if old != best:
                doomed = self.folder / f".step_{old:09d}.old"
                os.rename(self.path(old), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def read_state(self, step: int) -> dict[str, Any]:
        """What :meth:`save` was given as ``state``.

        Raises:
            ConfigError: the file is missing, damaged or of another version.
        """
        path = self.path(step) / "state.json"
        try:
            state = json.loads(path.read_text())
            if state["format"] != _FORMAT or state["step"] != step:
                raise ValueError(f"format {state['format']}, step {state['step']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        return state


def gather_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole copies on the CPU (a collective where they are sharded)."""
    return {name: full(tensor).detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write and flush to disk."""
    with open(path, "w") as file:
        json.dump(value, file, indent=indent)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of ``path`` at the end."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    fsync(partial)
    os.replace(partial, path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """The error of the file system where DCP wraps one, in a line."""
    if isinstance(error, dcp.api.CheckpointException):
        failures = error.failures
        rank, (inner, _) = min(failures.items())
        where = f"rank {rank}: " if dist.is_initialized() and dist.get_world_size() > 1 else ""
        return where + _cause(inner)
    return " ".join(str(error).split()) or type(error).__name__
