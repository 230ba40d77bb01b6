"""CIFAR-10 by a ResNet-18 in low-rank layers that is trained once and cut to every size, at the paper's full size.

All convolutions but the first are low-rank and ordered by ordered dropout, the hierarchical group lasso empties what is
not needed (arXiv 2308.14929). Data come from a folder with the data set's binary version, which is not downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_int, check_ints
from ..training import Data, DataConfig, TensorSet, group, key, register
from ._maestro import LowRankTask, MaestroConfig

RECORD = 1 + 3 * 32 * 32
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)
# Of the training images' channels, in units of 255.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass
class Model:
    width: int = key(64, "channels of the first stage, twice as many in each that follows")
    blocks: list[int] = key([2, 2, 2, 2], "residual blocks of each stage")

    def __post_init__(self) -> None:
        check_int("model.width", self.width)
        check_ints("model.blocks", self.blocks)


@dataclass
class CifarData(DataConfig):
    batch_size: int = key(128, "images in an optimizer step, over all ranks and micro-batches")
    root: str | None = key(None, "folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin")
    augment: bool = key(True, "train on random shifts by up to 4 pixels and reflections")
    synthetic: int = key(0, "so many images of noise instead of those in root, to see that all runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.synthetic", self.synthetic, minimum=0)


@dataclass
class MaestroCifar(MaestroConfig):
    model: Model = group(Model)
    data: CifarData = group(CifarData)


def read(root: Path, names: tuple[str, ...]) -> TensorSet:
    """Images (N, 3, 32, 32), uint8, and classes (N,) from files of the binary version: a byte of class, 3072 of image.

    Raises:
        ValueError: a file is missing or holds something else.
    """
    parts = []
    for name in names:
        path = root / name
        if not path.is_file():
            raise ValueError(f"data.root must hold the binary version of CIFAR-10, got no file {path}")
        raw = bytearray(path.read_bytes())
        if not raw or len(raw) % RECORD:
            raise ValueError(f"{path} must hold records of {RECORD} bytes, got {len(raw)} bytes")
        parts.append(torch.frombuffer(raw, dtype=torch.uint8).view(-1, RECORD))
    records = torch.cat(parts)
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise ValueError(f"{root} must hold classes from 0 to 9, got {int(labels.max())}")
    return TensorSet(records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), labels)


def noise(count: int, seed: int) -> TensorSet:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return TensorSet(x, torch.randint(10, (count,), generator=generator))


class Block(nn.Module):
    """Two 3 × 3 convolutions with batch norm around a shortcut: (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            conv = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al.'s residual network for small images, its first convolution 3 × 3: (B, 3, H, W) -> logits (B, 10)."""

    def __init__(self, width: int, blocks: list[int]):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        parts, channels = [], width
        for stage, number in enumerate(blocks):
            out_channels = width * 2**stage
            for i in range(number):
                parts.append(Block(channels, out_channels, 2 if stage and i == 0 else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*parts)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class CifarTask(LowRankTask):
    config: MaestroCifar
    skip = ("stem", "head")

    def network(self) -> nn.Module:
        return ResNet(self.config.model.width, self.config.model.blocks)

    def build_data(self) -> Data:
        data = self.config.data
        if data.synthetic:
            return Data(noise(data.synthetic, 0), {"cifar10": noise(data.synthetic, 1)})
        if data.root is None:
            raise ValueError("data.root must name the folder of CIFAR-10's binary version, got null")
        return Data(read(Path(data.root), TRAIN), {"cifar10": read(Path(data.root), TEST)})

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.network.blocks)  # type: ignore[union-attr,arg-type]

    def inputs(self, x: Tensor, *, training: bool) -> Tensor:
        """Bytes to standardised channels, in training shifted and reflected image by image."""
        dtype = torch.float64 if self.config.trainer.precision == "fp64" else torch.float32
        mean, std = (torch.tensor(t, device=x.device, dtype=dtype)[:, None, None] for t in (MEAN, STD))
        x = (x.to(dtype) / 255 - mean) / std
        return augmented(x) if training and self.config.data.augment else x


def augmented(x: Tensor) -> Tensor:
    """Each image of (B, C, H, W) shifted by up to 4 pixels on either axis, with zeros from outside, half of them
    reflected."""
    batch, channels, height, width = x.shape
    rows, columns = torch.randint(9, (2, batch, 1), device=x.device)
    rows, columns = (shift + torch.arange(size, device=x.device) for shift, size in ((rows, height), (columns, width)))
    columns = torch.where(torch.rand(batch, 1, device=x.device) < 0.5, columns, columns.flip(1))
    x = F.pad(x, (4, 4, 4, 4))
    x = x.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width + 8))
    return x.gather(3, columns[:, None, None].expand(-1, channels, height, -1))


register("maestro_cifar", MaestroCifar, task=CifarTask)
