"""Separable convolutions in someone else's CNN: one call converts it, before training or after.

    python examples/separable_cnn.py                            needs scikit-learn: pip install -e '.[data]'

Where timm is installed the CNN is its ResNet-10, otherwise a plain one of ``torch.nn``; the rest of the script does not
know which. Its task are handwritten digits of 8 x 8 pixels. It is trained as it is, and likewise after a conversion
with fresh weights: less than half of the parameters, and about as good. Then the trained one is converted by
decomposition, which keeps what the dense filters know: after an epoch it is far ahead of fresh weights after theirs.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from torchlayers import separable_conv


def build() -> torch.nn.Module:
    try:
        import timm

        return timm.create_model("resnet10t", num_classes=10, in_chans=1, pretrained=False)
    except ImportError:
        pass
    layers: list[torch.nn.Module] = []
    for inner, outer in ((1, 24), (24, 48), (48, 48)):
        layers += [torch.nn.Conv2d(inner, outer, 5, padding=2), torch.nn.BatchNorm2d(outer), torch.nn.ReLU()]
    layers.insert(6, torch.nn.MaxPool2d(2))
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(48, 10))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(images.split(64)))
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for rows in order.split(64):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main(epochs: int) -> None:
    torch.manual_seed(0)
    images, labels = data()
    training, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    dense = build()
    separable = separable_conv.convert(copy.deepcopy(dense), "seq", 0.25, example_input=images[:64])
    print(separable)
    separable = separable.model

    train(dense, *training, epochs, lr=2e-3)
    train(separable, *training, epochs, lr=4e-3)
    for name, model in (("dense", dense), ("separable", separable)):
        print(f"{name}: {parameters(model)} parameters, test accuracy {accuracy(model, *test):.3f}")

    starts = {"fresh": build(), "decomposed": dense}
    for init, model in starts.items():
        converted = separable_conv.convert(model, "seq", 0.25, init=init).model
        train(converted, *training, epochs=1, lr=4e-3)
        print(f"converted, {init}, after one epoch: test accuracy {accuracy(converted, *test):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
