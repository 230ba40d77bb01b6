"""Gaunt products inside a net of MACE's kind: equivariant messages, many-body features, energies and forces.

    python examples/gaunt_in_mace.py                            needs e3nn: pip install -e '.[gaunt]'

Everything around the products is e3nn's: ``o3.Linear``, ``nn.FullyConnectedNet``, irreps. The two expensive parts of
MACE are ours: :class:`GauntConv` in place of the convolution with spherical harmonics, and
:class:`GauntSymmetricContraction` in place of ``SymmetricContraction``, the powers up to the third of each atom's
feature. The net learns the forces of Lennard-Jones clusters of two elements; then a cluster is turned, and the energy
stays and the forces turn with it, to rounding.
"""

from __future__ import annotations

import argparse

import torch
from e3nn import nn as e3nn_nn
from e3nn import o3

from torchlayers.gaunt import GauntConv, GauntSymmetricContraction

CHANNELS, LMAX, ELEMENTS, ATOMS, CUTOFF = 8, 2, 2, 8, 2.5
HIDDEN = o3.Irreps([(CHANNELS, (degree, (-1) ** degree)) for degree in range(LMAX + 1)])
SCALARS = o3.Irreps(f"{CHANNELS}x0e")


class Interaction(torch.nn.Module):
    """Messages along edges, then powers of what arrives: node features of ``irreps_in`` to ``irreps_out``."""

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps):
        super().__init__()
        self.up = o3.Linear(irreps_in, irreps_in)
        self.conv = GauntConv(irreps_in, LMAX, HIDDEN)
        self.radial = e3nn_nn.FullyConnectedNet([8, 32, self.conv.weight_numel], torch.nn.functional.silu)
        self.contraction = GauntSymmetricContraction(HIDDEN, irreps_out, correlation=3, num_elements=ELEMENTS)
        self.down = o3.Linear(irreps_out, irreps_out)

    def forward(self, x, elements, vectors, edges, radial):
        messages = self.conv(self.up(x), vectors, edges, self.radial(radial)) / ATOMS**0.5
        # (N, C (2l + 1), ...) as the contraction wants it: (N, C, Σ (2l + 1))
        parts = [messages[:, s].unflatten(1, (CHANNELS, -1)) for s in HIDDEN.slices()]
        return self.down(self.contraction(torch.cat(parts, 2), elements))


class Net(torch.nn.Module):
    """Positions (B, N, 3) and elements (B, N) -> energies (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(ELEMENTS, CHANNELS)
        self.interactions = torch.nn.ModuleList([Interaction(SCALARS, HIDDEN), Interaction(HIDDEN, SCALARS)])
        self.readout = o3.Linear(SCALARS, "1x0e")

    def forward(self, positions: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
        batch, atoms = elements.shape
        near = torch.cdist(positions.detach(), positions.detach()) < CUTOFF
        sample, target, source = (near & ~torch.eye(atoms, dtype=torch.bool)).nonzero().T
        edges = torch.stack([source, target]) + atoms * sample
        vectors = positions[sample, source] - positions[sample, target]
        length = vectors.norm(dim=1, keepdim=True)
        waves = torch.sin(torch.arange(1, 9) * torch.pi * length / CUTOFF) / length
        radial = waves * (1 - (length / CUTOFF) ** 2) ** 2  # smooth at the cutoff
        x, z = self.embedding(elements).flatten(0, 1), elements.flatten()
        energy = 0
        for interaction in self.interactions:
            x = interaction(x, z, vectors, edges, radial)
            energy = energy + self.readout(x[:, :CHANNELS])
        return energy.view(batch, atoms).sum(1)


def forces_of(energy: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
    return -gradient


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clusters (B, N, 3) around the corners of a cube, their elements (B, N) and their forces."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.15])] * 3)
    positions = (corners + 0.08 * torch.randn(count, ATOMS, 3)).requires_grad_()
    elements = torch.randint(ELEMENTS, (count, ATOMS))
    depth = torch.tensor([[1.0, 0.6], [0.6, 0.4]])[elements[:, :, None], elements[:, None]]
    distance = torch.cdist(positions, positions) + torch.eye(ATOMS) * 1e3
    energy = (2 * depth * (distance**-12 - distance**-6)).sum((1, 2))
    forces = forces_of(energy, positions).detach()
    return positions.detach(), elements, forces


def error(net: Net, positions: torch.Tensor, elements: torch.Tensor, forces: torch.Tensor) -> torch.Tensor:
    """Of the forces, as a share of their root mean square."""
    positions = positions.clone().requires_grad_()
    difference = forces_of(net(positions, elements), positions) - forces
    return (difference.square().mean() / forces.square().mean()).sqrt()


def main(steps: int) -> None:
    torch.manual_seed(0)
    net, test = Net(), draw(64)
    start = error(net, *test).item()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        loss = error(net, *draw(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"force error, as a share of the forces: {start:.2f} before training, {error(net, *test).item():.2f} after")

    net = net.double()
    positions, elements = test[0][:4].double().requires_grad_(), test[1][:4]
    rotation = o3.rand_matrix(dtype=torch.float64)
    turned = (positions.detach() @ rotation.T).requires_grad_()
    energy, moved = net(positions, elements), net(turned, elements)
    forces, turned_forces = forces_of(energy, positions), forces_of(moved, turned)
    of_energy = ((energy - moved).norm() / energy.norm()).item()
    of_forces = ((forces @ rotation.T - turned_forces).norm() / forces.norm()).item()
    print(
        f"a turned cluster in float64: energy differs by {of_energy:.1e}, turned forces by {of_forces:.1e} (relative)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
