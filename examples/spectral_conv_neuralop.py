"""Our SpectralConv inside neuraloperator's FNO: the same model and checkpoint, and then one of a tenth of the weights.

    python examples/spectral_conv_neuralop.py                   needs neuraloperator: pip install -e '.[tfno]'

neuraloperator's models take the class of their spectral layers as ``conv_module``. Given ours, a model loads the state
dict of one with neuraloperator's own layers and gives the same output and gradients. A second model, with
Tucker-factorised weights of a tenth of the parameters, learns Darcy flow (permeability to pressure) on a grid of
16 x 16 and is then asked on one of 32 x 32, which it has never seen.
"""

from __future__ import annotations

import argparse
import warnings

import torch

import torchlayers
from torchlayers.data import darcy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what neuraloperator imports is deprecated here and there
    from neuralop.models import FNO

SIZES = {"n_modes": (8, 8), "hidden_channels": 24, "in_channels": 1, "out_channels": 1, "n_layers": 3}


def gradients(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def spectral_parameters(model: torch.nn.Module) -> int:
    layers = [part for part in model.modules() if isinstance(part, torchlayers.SpectralConv)]
    return sum(p.numel() for layer in layers for p in layer.parameters())


def main(steps: int) -> None:
    torch.manual_seed(0)
    theirs = FNO(**SIZES)
    ours = FNO(**SIZES, conv_module=torchlayers.SpectralConv)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 1, 64, 64)
    pairs = zip(gradients(theirs, x), gradients(ours, x), strict=True)
    output, gradient = (((a - b).norm() / a.norm()).item() for a, b in pairs)
    print(f"one state dict, two layers: outputs differ by {output:.1e}, gradients by {gradient:.1e} (relative)")
    small = FNO(**SIZES, conv_module=torchlayers.SpectralConv, factorization="tucker", rank=0.1)
    print(f"spectral parameters: dense {spectral_parameters(ours)}, Tucker {spectral_parameters(small)}")

    train_x, train_y = darcy.load("train", 16)
    scale = train_y.std()
    loss_fn = torchlayers.LpLoss(d=2)
    optimizer = torch.optim.AdamW(small.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)

    @torch.no_grad()
    def errors() -> str:
        tests = [darcy.load("test", resolution) for resolution in (16, 32)]
        return " and ".join(f"{loss_fn(small(x) * scale, y).item():.3f}" for x, y in tests)

    start = errors()
    for _ in range(steps):
        rows = torch.randint(len(train_x), (16,))
        loss = loss_fn(small(train_x[rows]) * scale, train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"relative test error on grids of 16 and 32: {start} before training, {errors()} after")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
