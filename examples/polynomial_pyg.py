"""Polynomial features in a PyTorch Geometric pipeline: what message passing cannot see, as a transform or as a layer.

    python examples/polynomial_pyg.py                           needs PyG: pip install -e '.[graphs]'

The task: how many triangles and squares does a random graph have in which each node has three neighbours? To message
passing all these graphs look alike, and a GIN can do no better than the mean. :class:`AddPolynomialFeatures`, a
transform of the data, gives each node the numbers of closed walks that these cycles make at it; or
:class:`PolynomialConv` takes the place of a layer and looks up the polynomials of each edge by itself. All else, data,
loader, model and pooling, is PyG's.
"""

from __future__ import annotations

import argparse

import networkx
import torch
import torch.nn.functional as F
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GINConv, global_add_pool
from torch_geometric.utils import from_networkx

from torchlayers.polynomial import AddPolynomialFeatures, Pattern, PolynomialConv

NODES, WIDTH = 12, 16


def draw(count: int, seed: int) -> list[Data]:
    """Random 3-regular graphs with x = 1 for all nodes and y the number of cycles of lengths 3 and 4."""
    graphs = []
    for number in range(count):
        graph = networkx.random_regular_graph(3, NODES, seed=seed + number)
        data = from_networkx(graph)
        data.x = torch.ones(NODES, 1)
        data.y = torch.tensor([[float(len(list(networkx.simple_cycles(graph, length_bound=4))))]])
        graphs.append(data)
    return graphs


class Net(torch.nn.Module):
    """Two layers, a sum over the nodes, and a linear map."""

    def __init__(self, kind: str, in_channels: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(self.layer(kind, inner) for inner in (in_channels, WIDTH))
        # The eps is large for the GIN's sake: to it all nodes are alike, without variance.
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(WIDTH, eps=0.1) for _ in self.layers)
        self.head = torch.nn.Linear(WIDTH, 1)

    @staticmethod
    def layer(kind: str, inner: int) -> torch.nn.Module:
        if kind == "polynomial":
            cycles = [Pattern.cycle(length, outputs=(0, 1)) for length in (3, 4)]
            return PolynomialConv(inner, WIDTH, cycles, normalize="none")
        return GINConv(
            torch.nn.Sequential(torch.nn.Linear(inner, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH))
        )

    def forward(self, data: Data) -> torch.Tensor:
        x = data.x
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x, data.edge_index)))
        return self.head(global_add_pool(x, data.batch) / NODES)


def train(kind: str, training: list[Data], test: list[Data], epochs: int) -> float:
    """The mean absolute error on ``test`` after ``epochs`` passes over ``training``."""
    torch.manual_seed(0)
    net = Net(kind, training[0].x.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    loader = DataLoader(training, batch_size=32, shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for batch in loader:
            loss = F.mse_loss(net(batch), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        (batch,) = DataLoader(test, batch_size=len(test))
        return (net(batch) - batch.y).abs().mean().item()


def main(epochs: int) -> None:
    training, test = draw(256, seed=0), draw(128, seed=1000)
    cycles = [Pattern.cycle(length, outputs=(0,)) for length in (3, 4)]
    # None: append to x. Patterns with one output make features of nodes and of nothing else.
    transform = AddPolynomialFeatures(cycles, node_attr=None)
    counts = torch.cat([data.y for data in training + test])
    print(f"cycles a graph: {counts.min():.0f} to {counts.max():.0f}")
    middle = torch.cat([data.y for data in training]).mean()
    print(f"the mean: error {(torch.cat([data.y for data in test]) - middle).abs().mean():.3f}")
    print(f"GIN: error {train('gin', training, test, epochs):.3f}")
    rich = [[transform(data.clone()) for data in part] for part in (training, test)]
    print(f"GIN on polynomial features: error {train('gin', *rich, epochs):.3f}")
    print(f"PolynomialConv: error {train('polynomial', training, test, epochs):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    main(parser.parse_args().epochs)
