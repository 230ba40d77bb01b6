"""What the generators share: a random stream for each sample, chunks, and a cache that survives a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import require

__all__ = ["cached", "chunks", "standard_normal"]


def standard_normal(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Independent standard normals, float64, that depend on (seed, index) alone."""
    # NumPy's seeding keeps the streams of (seed, index) apart; torch's CPU generator keeps 32 bits of a seed.
    numpy = require("numpy", extra="data")
    return torch.from_numpy(numpy.random.default_rng((seed, index)).standard_normal(tuple(shape)))


def chunks(n_samples: int, size: int, *, what: str, progress: bool) -> Iterator[range]:
    """The numbers of the samples, ``size`` at a time, behind a progress bar (none where stderr is no terminal)."""
    tqdm = require("tqdm", extra="data")
    with tqdm.tqdm(total=n_samples, desc=what, unit="sample", disable=None if progress else True) as bar:
        for start in range(0, n_samples, size):
            part = range(start, min(start + size, n_samples))
            yield part
            bar.update(len(part))


def cached(
    folder: str | os.PathLike[str] | None,
    name: str,
    key: Mapping[str, Any],
    shape: Sequence[int],
    make: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """``make()``, or what it gave when it was last called for the same name and key.

    Args:
        folder: where results are kept; None keeps none.
        name: start of the file's name.
        key: all that the result depends on, as JSON can hold it.
        shape: of x and of y, by which a file that holds something else is noticed.
        make: gives (x, y). A file that is damaged is made again, with a warning.
    """
    if folder is None:
        return make()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}_{digest}.pt"
    if path.is_file():
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            x, y = data["x"], data["y"]
            if not tuple(x.shape) == tuple(y.shape) == tuple(shape):
                raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)} instead of {tuple(shape)}")
            if not (x.isfinite().all() and y.isfinite().all()):
                raise ValueError("NaN or infinity")
            return x, y
        except Exception as error:  # truncated, not a zip file, other contents, ...
            warnings.warn(f"the cached data set {path} cannot be used and is made again: {error}", stacklevel=3)
    x, y = make()
    _save_atomically({"x": x, "y": y}, path)
    return x, y


def _save_atomically(content: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
