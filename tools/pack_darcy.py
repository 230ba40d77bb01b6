"""Pack neuraloperator's small Darcy set into torchlayers/data/files/darcy.zip, deterministically.

    pip download --no-deps neuraloperator==0.3.0
    python tools/pack_darcy.py neuraloperator-0.3.0-py3-none-any.whl

Two members a set, ``<split>_<resolution>/x`` and ``/y``, both in row-major order (sample, row, column): x is one bit a
value, least significant bit first; y is float32 as four byte planes, least significant byte first (planes of like
bytes deflate better than whole floats). torchlayers.data.darcy reads it back bit for bit.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import torch

SETS = ("train_16", "test_16", "test_32")
TARGET = Path(__file__).resolve().parent.parent / "torchlayers" / "data" / "files" / "darcy.zip"


def pack_bits(x: torch.Tensor) -> bytes:
    bits = x.reshape(-1, 8).to(torch.uint8)
    return bytes((bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8).tolist())


def byte_planes(y: torch.Tensor) -> bytes:
    word = y.contiguous().view(torch.int32).flatten()
    return b"".join(bytes(((word >> shift) & 255).tolist()) for shift in (0, 8, 16, 24))


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(TARGET, "w") as target:
        for name in SETS:
            content = source.read(f"neuralop/datasets/data/darcy_{name}.pt")
            data = torch.load(io.BytesIO(content), weights_only=True)
            if data["x"].dtype != torch.bool or data["y"].dtype != torch.float32:
                raise ValueError(f"{name} must hold bool x and float32 y, got {data['x'].dtype} and {data['y'].dtype}")
            for key, packed in (("x", pack_bits(data["x"])), ("y", byte_planes(data["y"]))):
                # A fixed date and origin, so that the same wheel gives the same file.
                info = zipfile.ZipInfo(f"{name}/{key}", date_time=(1980, 1, 1, 0, 0, 0))
                info.create_system, info.external_attr = 3, 0o644 << 16
                target.writestr(info, packed, zipfile.ZIP_DEFLATED, compresslevel=9)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
