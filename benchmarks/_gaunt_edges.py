"""Gaunt convolutions over edges against e3nn, cuEquivariance and OpenEquivariance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._gaunt_parts import (
    CHUNK,
    DOUBLE,
    PASSES,
    TOLERANCE,
    Layer,
    couple,
    cue_tensor_product,
    e3nn_scales,
    e3nn_tensor_product,
    even_paths,
    flat,
    irreps_of,
    leaves_of,
    normals,
    quiet,
    signal,
)
from ._harness import BOTH, FORWARD, Built, Case


@dataclass
class EdgeInputs:
    """Atoms with features, edges with weights, sums over the edges of a target.

    Args:
        x, g, probe_x: (N, C (L + 1)²), flat.
        vectors, probe_vectors: (E, 3).
        edge_index: (2, E), (source, target), sorted by target.
        weight, probe_weight: each edge's, a number a degree of the filter (E, C, L + 1), or for each path as e3nn keeps
            them (E, paths C).
    """

    x: Tensor
    g: Tensor
    probe_x: Tensor
    vectors: Tensor
    probe_vectors: Tensor
    edge_index: Tensor
    weight: Tensor
    probe_weight: Tensor
    lmax: int
    channels: int

    @property
    def paths(self) -> list[tuple[int, int, int]]:
        return even_paths(*(self.lmax,) * 3)

    @functools.cached_property
    def scales(self) -> Tensor:
        """(paths, 1), float64: what makes a weight of :func:`couple` one of e3nn's."""
        return e3nn_scales(self.paths).to(self.x.device)[:, None]

    def by_path(self, weight: Tensor, channels: slice) -> Tensor:
        """Edge weights as weights of :func:`couple`, (E, paths, C), float64, of some channels."""
        if weight.ndim == 3:
            return weight[:, channels, [path[1] for path in self.paths]].mT.double()
        return weight.unflatten(1, (-1, self.channels))[..., channels].double() / self.scales

    @functools.cached_property
    def e3nn_weights(self) -> tuple[Tensor, Tensor]:
        """The edges' weights and their probe as e3nn keeps them, once for all peers."""
        if self.weight.ndim == 2:
            return self.weight, self.probe_weight
        filters, scales = [path[1] for path in self.paths], self.scales.to(self.weight.dtype)
        weight, probe = ((w[..., filters].mT * scales).flatten(1) for w in (self.weight, self.probe_weight))
        return weight, probe


def make_edge_inputs(
    atoms: int, neighbours: int, channels: int, lmax: int, free: bool, device: torch.device
) -> EdgeInputs:
    """Each atom's neighbours are random atoms: a gather finds less in caches than among real neighbours."""
    randn = normals(device)
    edges = atoms * neighbours
    target = torch.arange(atoms, device=device).repeat_interleave(neighbours)
    source = torch.randint(atoms, (edges,), generator=torch.Generator(device).manual_seed(1), device=device)
    x, g, probe_x = (randn(atoms, channels * (lmax + 1) ** 2) for _ in range(3))
    shape = (edges, len(even_paths(lmax, lmax, lmax)) * channels) if free else (edges, channels, lmax + 1)
    return EdgeInputs(
        x,
        g,
        probe_x,
        randn(edges, 3),
        randn(edges, 3),
        torch.stack((source, target)),
        randn(*shape),
        randn(*shape),
        lmax,
        channels,
    )


def _edge_reference(inputs: EdgeInputs, mode: str) -> tuple[Tensor, ...]:
    """Output and gradients of x and the edges' vectors, by paths, in float64, some channels at a time."""
    from torchlayers.gaunt import spherical_harmonics

    (source, target), lmax = inputs.edge_index, inputs.lmax
    step = max(1, CHUNK // (len(source) * (lmax + 1) ** 4))
    nodes = [signal(t, inputs.channels).double() for t in (inputs.x, inputs.g, inputs.probe_x)]
    by_node: list[list[Tensor]] = []  # output, gradient, second gradient
    by_edge: list[Any] = []
    for first in range(0, inputs.channels, step):
        some = slice(first, first + step)
        x, g, probe_x = (t[:, some].contiguous() for t in nodes)
        weight, probe = (inputs.by_path(w, some) for w in (inputs.weight, inputs.probe_weight))
        x, vectors, weight = leaves_of(x, inputs.vectors.double(), weight)

        def forward(x=x, vectors=vectors, weight=weight) -> Tensor:
            harmonics = spherical_harmonics(lmax, vectors / vectors.norm(dim=1, keepdim=True))
            return torch.zeros_like(x).index_add(0, target, couple(x[source], harmonics[:, None], weight))

        layer = Layer(forward, [x, vectors], g, inner=[weight], probes=[probe_x, inputs.probe_vectors.double(), probe])
        out, *gradients = layer.call(mode)
        by_node.append([out, *gradients[::2]])
        by_edge = [a + b for a, b in zip(by_edge or [0] * len(gradients), gradients[1::2], strict=False)]
    out, *of_x = (flat(torch.cat(parts, dim=1)) for parts in zip(*by_node, strict=True))
    pairs = zip(of_x, by_edge, strict=True)
    return out, *(gradient for pair in pairs for gradient in pair)


def _edge_layer(
    inputs: EdgeInputs, forward: Callable[[Tensor, Tensor, Tensor], Tensor], weights: tuple[Tensor, Tensor]
) -> Built:
    weight, probe = weights
    x, vectors, weight = leaves_of(inputs.x, inputs.vectors, weight)
    probes = [inputs.probe_x, inputs.probe_vectors, probe]
    return Layer(lambda: forward(x, vectors, weight), [x, vectors], inputs.g, inner=[weight], probes=probes)


def ours_convolution(inputs: EdgeInputs) -> Built:
    """The fused convolution; the edges' order is found once, as for the layers of a model."""
    from torchlayers.functional import gaunt_convolution
    from torchlayers.gaunt.convolution import edge_order

    order = edge_order(inputs.edge_index, len(inputs.x))
    degrees = {"lmax": inputs.lmax, "lmax_filter": inputs.lmax, "lmax_out": inputs.lmax}

    def forward(x: Tensor, vectors: Tensor, weight: Tensor) -> Tensor:
        return flat(gaunt_convolution(signal(x, inputs.channels), vectors, weight, order, **degrees))

    return _edge_layer(inputs, forward, (inputs.weight, inputs.probe_weight))


def _harmonics(inputs: EdgeInputs) -> Callable[[Tensor], Tensor]:
    """e3nn's harmonics of the edges, integral-normalised."""
    with quiet():
        from e3nn import o3

        harmonics = o3.SphericalHarmonics(list(range(inputs.lmax + 1)), normalize=True, normalization="integral")
    return harmonics.to(inputs.x.device)


def _by_messages(inputs: EdgeInputs, product: Callable[..., Tensor], harmonics: Callable[[Tensor], Tensor]) -> Built:
    source, target = inputs.edge_index

    def forward(x: Tensor, vectors: Tensor, weight: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, target, product(x[source], harmonics(vectors), weight))

    return _edge_layer(inputs, forward, inputs.e3nn_weights)


def _e3nn_messages(inputs: EdgeInputs) -> Any:
    return e3nn_tensor_product(*(inputs.lmax,) * 3, inputs.channels, "uvu", shared=False).to(inputs.x.device)


def e3nn_convolution(inputs: EdgeInputs) -> Built:
    """e3nn's 'uvu' product of gathered features and harmonics, and ``index_add``."""
    return _by_messages(inputs, _e3nn_messages(inputs), _harmonics(inputs))


def exact_convolution(inputs: EdgeInputs) -> Built:
    """e3nn's layer with its product taken over by ours, all else as it was."""
    from torchlayers.gaunt import GauntTensorProduct

    return _by_messages(inputs, GauntTensorProduct.from_e3nn(_e3nn_messages(inputs)), _harmonics(inputs))


def cue_convolution(inputs: EdgeInputs) -> Built:
    """cuEquivariance's polynomial with its gather and its sum; its features lie (N, components, channels)."""
    product = cue_tensor_product(inputs.lmax, inputs.channels, inputs.x.device, inputs.scales.flatten().tolist())
    harmonics = _harmonics(inputs)
    source, target = (t.contiguous() for t in inputs.edge_index)
    atoms = torch.empty(len(inputs.x), 1, device=inputs.x.device)

    def forward(x: Tensor, vectors: Tensor, weight: Tensor) -> Tensor:
        features = signal(x, inputs.channels).mT.flatten(1)
        operands = [weight, features, harmonics(vectors)]
        (out,) = product(operands, input_indices={1: source}, output_shapes={0: atoms}, output_indices={0: target})
        return flat(out.unflatten(1, (-1, inputs.channels)).mT)

    return _edge_layer(inputs, forward, inputs.e3nn_weights)


def oeq_convolution(inputs: EdgeInputs) -> Built:
    """OpenEquivariance's fused convolution (with atomic additions, its default)."""
    import openequivariance as oeq

    instructions = [(*path, "uvu", True) for path in inputs.paths]
    features, filters = irreps_of(inputs.lmax, inputs.channels), irreps_of(inputs.lmax, 1)
    problem = oeq.TPProblem(
        *(oeq.Irreps(i) for i in (features, filters, features)),
        instructions,
        shared_weights=False,
        internal_weights=False,
    )
    convolution = oeq.TensorProductConv(problem)
    harmonics = _harmonics(inputs)
    source, target = (t.contiguous() for t in inputs.edge_index)

    def forward(x: Tensor, vectors: Tensor, weight: Tensor) -> Tensor:
        return convolution(x, harmonics(vectors), weight, target, source)

    weights = tuple(convolution.reorder_weights_from_e3nn(w) for w in inputs.e3nn_weights)
    return _edge_layer(inputs, forward, weights)


CONVOLUTION_PEERS = {
    "e3nn TensorProduct + index_add": e3nn_convolution,
    "cuEquivariance": cue_convolution,
    "OpenEquivariance": oeq_convolution,
}


def convolution_cases(
    atoms: int, neighbours: int, channels: int, lmax: int, free: bool, *, headline: bool = False, quick: bool = False
) -> list[Case]:
    filters = 4 * atoms * neighbours * channels * (lmax + 1)
    nodes = 4 * atoms * channels * (lmax + 1) ** 2
    work: dict[str, dict[str, int]] = {mode: {"atoms": atoms} for mode in (FORWARD, BOTH, DOUBLE)}
    if not free:
        work[FORWARD]["bytes"] = filters + 2 * nodes
        work[BOTH]["bytes"] = 3 * filters + 5 * nodes
    ours, name = (exact_convolution, "free per path") if free else (ours_convolution, "one per degree")
    return [
        Case(
            labels={
                "op": "edge convolution",
                "atoms": atoms,
                "edges": atoms * neighbours,
                "C": channels,
                "L": lmax,
                "weights": f"weights {name}",
                "for": purpose,
            },
            inputs=lambda device: make_edge_inputs(atoms, neighbours, channels, lmax, free, device),
            reference=functools.partial(_edge_reference, mode=modes[-1]),
            ours=ours,
            peers=CONVOLUTION_PEERS,
            tolerance=TOLERANCE,
            modes=modes,
            work=work,
            headline=headline and DOUBLE in modes,
            quick=quick,
        )
        for purpose, modes in PASSES.items()
    ]
