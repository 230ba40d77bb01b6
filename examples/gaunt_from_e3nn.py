"""An e3nn model taken over: every tensor product of a trained model replaced, with its weights, outputs unchanged.

    python examples/gaunt_from_e3nn.py                          needs e3nn: pip install -e '.[gaunt]'

The model is one that e3nn users write: node features, spherical harmonics of edges, ``o3.TensorProduct`` with a network
of the edge's length for its weights, a scatter, and a product of a feature with itself. A loop replaces each
``o3.TensorProduct`` by ``GauntTensorProduct.from_e3nn``. Energies, forces and gradients of the weights agree to
rounding, and the state dict of the old model still loads.
"""

from __future__ import annotations

import copy

import torch
from e3nn import nn as e3nn_nn
from e3nn import o3

from torchlayers.gaunt import GauntTensorProduct

CHANNELS, LMAX = 8, 2


def channelwise(irreps1: o3.Irreps, irreps2: o3.Irreps, lmax: int, mode: str, **options: bool) -> o3.TensorProduct:
    """All paths up to degree ``lmax``, channel by channel, as NequIP and MACE build them."""
    instructions, out = [], []
    for i, (mul, ir1) in enumerate(irreps1):
        for j, (_, ir2) in enumerate(irreps2):
            for ir in ir1 * ir2:
                if ir.l <= lmax and ir.p == (-1) ** ir.l:
                    instructions.append((i, j, len(out), mode, True))
                    out.append((mul, ir))
    return o3.TensorProduct(irreps1, irreps2, o3.Irreps(out), instructions, **options)


class Potential(torch.nn.Module):
    """Positions (N, 3) and edges (2, E) -> the energy."""

    def __init__(self) -> None:
        super().__init__()
        scalars = o3.Irreps(f"{CHANNELS}x0e")
        self.harmonics = o3.Irreps.spherical_harmonics(LMAX)
        self.embedding = torch.nn.Parameter(torch.randn(CHANNELS))
        self.first = channelwise(scalars, self.harmonics, LMAX, "uvu", shared_weights=False)
        hidden = self.first.irreps_out
        self.second = channelwise(hidden, self.harmonics, LMAX, "uvu", shared_weights=False)
        self.mix = o3.Linear(self.second.irreps_out, hidden)
        self.square = channelwise(hidden, hidden, LMAX, "uuu")
        self.readout = o3.Linear(self.square.irreps_out, "1x0e")
        numels = [self.first.weight_numel, self.second.weight_numel]
        self.radial = torch.nn.ModuleList(
            e3nn_nn.FullyConnectedNet([6, 16, n], torch.nn.functional.silu) for n in numels
        )

    def forward(self, positions: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        vectors = positions[source] - positions[target]
        harmonics = o3.spherical_harmonics(self.harmonics, vectors, True, "component")
        lengths = vectors.norm(dim=1)
        radial = torch.exp(-((lengths[:, None] - torch.linspace(0, 3, 6, dtype=lengths.dtype)) ** 2))
        x = self.embedding.expand(len(positions), -1)
        for product, network in zip((self.first, self.second), self.radial, strict=True):
            messages = product(x[source], harmonics, network(radial))
            x = messages.new_zeros(len(positions), messages.shape[1]).index_add(0, target, messages)
        x = self.mix(x)
        return self.readout(self.square(x, x)).sum()


def take_over(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in which each ``o3.TensorProduct`` is ours."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is o3.TensorProduct:
                setattr(parent, name, GauntTensorProduct.from_e3nn(child))
    return model


def results(model: torch.nn.Module, positions: torch.Tensor, edges: torch.Tensor) -> list[torch.Tensor]:
    """The energy, the forces, and the gradients of the weights of a loss on the forces."""
    positions = positions.clone().requires_grad_()
    energy = model(positions, edges)
    (forces,) = torch.autograd.grad(-energy, positions, create_graph=True)
    weights = torch.autograd.grad(forces.square().sum(), [p for p in model.parameters() if p.requires_grad])
    return [energy.detach(), forces.detach(), torch.cat([w.flatten() for w in weights])]


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    theirs = Potential()
    ours = take_over(theirs)
    replaced = [name for name, part in ours.named_modules() if type(part).__name__ == "ExactTensorProduct"]
    print(f"replaced {len(replaced)} tensor products: {', '.join(replaced)}")

    positions = torch.randn(12, 3)
    edges = (torch.cdist(positions, positions) + 9 * torch.eye(12) < 3).nonzero().T
    found = zip(results(theirs, positions, edges), results(ours, positions, edges), strict=True)
    energy, forces, weights = (((a - b).norm() / a.norm()).item() for a, b in found)
    print(f"relative differences: energy {energy:.1e}, forces {forces:.1e}, gradients of the weights {weights:.1e}")

    for parameter in ours.parameters():
        parameter.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    energy = ((ours(positions, edges) - theirs(positions, edges)) / theirs(positions, edges)).abs().item()
    print(f"with the old state dict loaded into new weights: energy {energy:.1e}")


if __name__ == "__main__":
    main()
