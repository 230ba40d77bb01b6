"""Gaunt tensor products, float32: products and layers, edge convolutions, many-body features, exact take-over.

Every comparison with e3nn's free path weights is made twice. At rank 1 (the paper's layer, or the product alone) peers
get path weights with which they compute the same function, though they could compute more; at equal expressivity all
have free weights: rank R = L reaches all even paths of a layer with shared weights, and where each edge has weights of
its own e3nn's product is taken over exactly. So results and gradients of all are checked against one float64 reference;
gradients by weights are computed by all and, as they are parameterised differently, not compared.

In a pass with double backward the output is differentiated by all activations, as for forces, and these gradients once
more by activations and weights, as for training on forces.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._harness import BOTH, FORWARD, Built, Case

DOUBLE = "forward+backward+double backward"
TOLERANCE = 1e-5
# What a model is run for, and the passes of it: cases of their own, since their results differ.
PASSES = {"forces": (FORWARD, BOTH), "training on forces": (DOUBLE,)}
METHODS = ("grid", "sparse", "separable", "fourier")
CORRELATION, ELEMENTS = 3, 10
# Numbers in the largest temporary of a reference.
CHUNK = 1 << 27


@dataclass
class Layer(Built):
    """A layer of a network, of which more is differentiated than is compared.

    Results of a call are the output, the leaves' gradients, and after double backward their second gradients.

    Args:
        inner: activations in a parameterisation of the implementation's own, such as weights of edges.
        weights: learned weights, which forces are not derivatives by.
        probes: for double backward, cotangents of the gradients of ``(*leaves, *inner)``.
        view: how a result reads in the reference's shape, without moving data.
    """

    inner: Sequence[Tensor] = ()
    weights: Sequence[Tensor] = ()
    probes: Sequence[Tensor] = ()
    view: Callable[[Tensor], Tensor] = lambda t: t

    def call(self, mode: str) -> tuple[Tensor, ...]:
        if mode == FORWARD:
            return tuple(map(self.view, super().call(mode)))
        activations = [*self.leaves, *self.inner]
        compared = slice(len(self.leaves))
        out = self.forward()
        if mode == BOTH:
            found = (out, *torch.autograd.grad(out, [*activations, *self.weights], self.cotangent)[compared])
        else:
            first = torch.autograd.grad(out, activations, self.cotangent, create_graph=True)
            second = torch.autograd.grad(first, [*activations, *self.weights], self.probes)
            found = (out, *first[compared], *second[compared])
        return tuple(self.view(t.detach()) for t in found)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def _generator(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return functools.partial(torch.randn, generator=generator, device=device)


# ---------------------------------------------------------------- signals and paths


def flat(signal: Tensor) -> Tensor:
    """(..., C, (L + 1)²) -> (..., C (L + 1)²) in e3nn's order: degree by degree, there channel by channel."""
    return torch.cat([signal[..., d * d : (d + 1) ** 2].flatten(-2) for d in range(math.isqrt(signal.shape[-1]))], -1)


def signal(features: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`flat`."""
    lmax = math.isqrt(features.shape[-1] // channels) - 1
    pieces = features.split([channels * (2 * d + 1) for d in range(lmax + 1)], dim=-1)
    return torch.cat([piece.unflatten(-1, (channels, -1)) for piece in pieces], dim=-1)


def even_paths(lmax1: int, lmax2: int, lmax_out: int) -> list[tuple[int, int, int]]:
    """The paths (l1, l2, l3) of the pointwise product."""
    from torchlayers.gaunt import paths

    return paths(lmax1, lmax2, lmax_out)


def couple(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The definition with a weight for each path, z_l3 = Σ_p w_p P_l3(X_l1 Y_l2), all of one degree L.

    x (..., C, n), y (..., C or 1, n), weight (..., paths, C or 1) -> (..., C, n).
    """
    from torchlayers.gaunt import gaunt_coefficients

    lmax = math.isqrt(x.shape[-1]) - 1
    parts: list[Any] = [0] * (lmax + 1)
    for p, (l1, l2, l3) in enumerate(even_paths(lmax, lmax, lmax)):
        block = gaunt_coefficients(l1, l2, l3).to(x)
        first, second = x[..., l1 * l1 : (l1 + 1) ** 2], y[..., l2 * l2 : (l2 + 1) ** 2]
        parts[l3] = parts[l3] + weight[..., p, :, None] * torch.einsum("...i,...j,ijk->...k", first, second, block)
    return torch.cat(parts, dim=-1)


# ---------------------------------------------------------------- peers' parts


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Peers' imports and code generation warn of torch's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """e3nn and MACE make their tables in the default dtype, and would cast them to a higher one only afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _irreps(lmax: int, channels: int) -> str:
    return "+".join(f"{channels}x{d}{'eo'[d % 2]}" for d in range(lmax + 1))


def _e3nn_product(lmax1: int, lmax2: int, lmax_out: int, channels: int, connection: str, shared: bool) -> Any:
    """e3nn's product with free weights for the even paths; of 'uvu' the second factor has one channel."""
    with _quiet():
        from e3nn import o3

        instructions = [(*path, connection, True) for path in even_paths(lmax1, lmax2, lmax_out)]
        return o3.TensorProduct(
            _irreps(lmax1, channels),
            _irreps(lmax2, channels if connection == "uuu" else 1),
            _irreps(lmax_out, channels),
            instructions,
            shared_weights=shared,
            internal_weights=shared,
        )


def e3nn_scales(paths: Sequence[tuple[int, int, int]]) -> Tensor:
    """What makes a weight of :func:`couple` one of e3nn's, float64, for each path.

    e3nn multiplies coefficients of norm 1 by sqrt((2 l3 + 1) / number of paths to l3); Gaunt's have norms of their own.
    """
    from torchlayers.gaunt.coefficients import gaunt_scale

    into = [sum(other[2] == path[2] for other in paths) for path in paths]
    sizes = [gaunt_scale(*path) / math.sqrt((2 * path[2] + 1) / k) for path, k in zip(paths, into, strict=True)]
    return torch.tensor(sizes, dtype=torch.float64)


def _cue_product(lmax: int, channels: int, device: torch.device, edge_scales: Sequence[float] | None = None) -> Any:
    """cuEquivariance's polynomial of the product, all operands (components, channels).

    Without ``edge_scales`` of x and y, each with its channels; with them, one for each path, of the edges' weights
    (paths, channels), x, and a y of one channel.
    """
    import cuequivariance as cue
    import cuequivariance_torch as cuet

    from torchlayers.gaunt import gaunt_coefficients

    per_edge = edge_scales is not None
    descriptor = cue.SegmentedTensorProduct.from_subscripts("uv,iu,jv,kuv+ijk" if per_edge else "iu,ju,ku+ijk")
    for degree in range(lmax + 1):
        descriptor.add_segment(int(per_edge), (2 * degree + 1, channels))
        descriptor.add_segment(1 + per_edge, (2 * degree + 1, 1 if per_edge else channels))
        descriptor.add_segment(2 + per_edge, (2 * degree + 1, channels, 1) if per_edge else (2 * degree + 1, channels))
    for p, path in enumerate(even_paths(lmax, lmax, lmax)):
        block = gaunt_coefficients(*path).numpy()
        if edge_scales is None:
            descriptor.add_path(*path, c=block)
        else:
            descriptor.add_path(None, *path, c=block / edge_scales[p], dims={"u": channels, "v": 1})
    method = "uniform_1d" if device.type == "cuda" else "naive"
    polynomial = cue.SegmentedPolynomial.eval_last_operand(descriptor)
    return cuet.SegmentedPolynomial(polynomial, method=method).to(device)


# ---------------------------------------------------------------- the product


class ProductInputs(NamedTuple):
    """x, y, and the cotangent g, (rows, C, (L + 1)²)."""

    x: Tensor
    y: Tensor
    g: Tensor
    lmax: int


def make_product_inputs(rows: int, channels: int, lmax: int, device: torch.device) -> ProductInputs:
    randn = _generator(device)
    return ProductInputs(*(randn(rows, channels, (lmax + 1) ** 2) for _ in range(3)), lmax)


def _by_rows(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], g: Tensor, numbers_a_row: int
) -> tuple[Tensor, ...]:
    """Output of ``function`` and gradients of ``tensors``, in float64, a block of rows at a time."""
    found = []
    step = max(1, CHUNK // numbers_a_row)
    for block in zip(*(t.split(step) for t in (*tensors, g)), strict=True):
        leaves = _leaves(*(t.double() for t in block[:-1]))
        out = function(*leaves)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, block[-1].double())))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def product_reference(inputs: ProductInputs) -> tuple[Tensor, ...]:
    """Output and gradients by a quadrature of the three factors that is exact for them."""
    from torchlayers.gaunt import sphere_quadrature, spherical_harmonics

    points, weights = sphere_quadrature(3 * inputs.lmax)
    values = spherical_harmonics(inputs.lmax, points).to(inputs.x.device)
    back = weights.to(values)[:, None] * values

    def product(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ values.T) * (y @ values.T)) @ back

    return _by_rows(product, (inputs.x, inputs.y), inputs.g, inputs.x.shape[1] * len(points))


def _product(inputs: ProductInputs, method: str) -> Built:
    from torchlayers.functional import gaunt_tensor_product

    x, y = _leaves(inputs.x, inputs.y)
    degrees = (inputs.lmax,) * 3
    return Built(lambda: gaunt_tensor_product(x, y, *degrees, method=method), [x, y], inputs.g)


def e3nn_product(inputs: ProductInputs) -> Built:
    """e3nn's product with one weight a path for all channels, which takes the signals as they lie."""
    product = _e3nn_product(*(inputs.lmax,) * 3, 1, "uuu", shared=True).to(inputs.x.device).requires_grad_(False)
    product.weight.copy_(e3nn_scales(even_paths(*(inputs.lmax,) * 3)))
    x, y = _leaves(inputs.x, inputs.y)
    return Built(lambda: product(x, y), [x, y], inputs.g)


def e3nn_full_product(inputs: ProductInputs, *, compiled: bool = True) -> Built:
    """e3nn's FullTensorProductv2, and the sum over its paths with weights that make it the product."""
    with _quiet():
        from e3nn import o3

        kept = [o3.Irrep(d, (-1) ** d) for d in range(inputs.lmax + 1)]
        product = o3.FullTensorProductv2(*[o3.Irreps(_irreps(inputs.lmax, 1))] * 2, filter_ir_out=kept)
    from torchlayers.gaunt.coefficients import gaunt_scale

    product = product.to(inputs.x.device)
    paths = even_paths(*(inputs.lmax,) * 3)
    by_degree = [[path for path in paths if path[2] == d] for d in range(inputs.lmax + 1)]
    weights = [
        inputs.x.new_tensor([gaunt_scale(*path) / math.sqrt(2 * path[2] + 1) for path in group]) for group in by_degree
    ]
    widths = [len(group) * (2 * d + 1) for d, group in enumerate(by_degree)]

    def forward(x: Tensor, y: Tensor) -> Tensor:
        pieces = product(x, y).split(widths, dim=-1)
        return torch.cat([w @ p.unflatten(-1, (len(w), -1)) for w, p in zip(weights, pieces, strict=True)], dim=-1)

    run = torch.compile(forward, fullgraph=True) if compiled else forward
    x, y = _leaves(inputs.x, inputs.y)
    return Built(lambda: run(x, y), [x, y], inputs.g)


def cue_product(inputs: ProductInputs) -> Built:
    """cuEquivariance's segmented polynomial; its signals lie (rows, components, channels)."""
    product = _cue_product(inputs.lmax, inputs.x.shape[1], inputs.x.device)
    x, y, g = (t.mT.flatten(1).contiguous() for t in inputs[:3])
    x, y = _leaves(x, y)
    return Layer(
        lambda: product([x, y])[0],
        [x, y],
        g,
        view=lambda t: t.unflatten(1, ((inputs.lmax + 1) ** 2, -1)).mT,
    )


PRODUCT_METHODS = {f"torchlayers, {m}": functools.partial(_product, method=m) for m in METHODS}
PRODUCT_PEERS = {"e3nn TensorProduct": e3nn_product}
PRODUCT_PEERS_GPU = {
    "e3nn FullTensorProductv2, compiled": e3nn_full_product,
    "cuEquivariance": cue_product,
}


def _product_case(rows: int, channels: int, lmax: int, on_gpu: bool, **more: Any) -> Case:
    field = 4 * rows * channels * (lmax + 1) ** 2
    return Case(
        labels={"op": "product", "rows": rows, "C": channels, "L": lmax},
        inputs=lambda device: make_product_inputs(rows, channels, lmax, device),
        reference=product_reference,
        ours=functools.partial(_product, method="auto"),
        peers=PRODUCT_METHODS | PRODUCT_PEERS | (PRODUCT_PEERS_GPU if on_gpu else {}),
        tolerance=TOLERANCE,
        # Two fields in, one out; backward three in, two out.
        work={FORWARD: {"bytes": 3 * field}, BOTH: {"bytes": 8 * field}},
        scale="L",
        **more,
    )


def _growth_case(rows: int, lmax: int) -> Case:
    """The separable method as ours, where its exponent shows."""
    return Case(
        labels={"op": "product, separable", "rows": rows, "C": 1, "L": lmax},
        inputs=lambda device: make_product_inputs(rows, 1, lmax, device),
        reference=product_reference,
        ours=functools.partial(_product, method="separable"),
        peers={name: build for name, build in PRODUCT_METHODS.items() if name.endswith(("grid", "fourier"))},
        tolerance=TOLERANCE,
        scale="L",
    )


# ---------------------------------------------------------------- a layer with weights


class LayerInputs(NamedTuple):
    """x, y, g flat (rows, C (L + 1)²); our layer, and the weights (paths, C), float64, that it gives the paths."""

    x: Tensor
    y: Tensor
    g: Tensor
    layer: torch.nn.Module
    weight: Tensor
    lmax: int

    @property
    def channels(self) -> int:
        return self.weight.shape[1]


def path_weights(layer: torch.nn.Module, channels: int, lmax: int) -> Tensor:
    """What weight of :func:`couple` a layer gives each path and channel, asked of the layer, a pair of degrees a time.

    A layer that is not such a sum of paths will not equal the reference with these weights.
    """
    layer = copy.deepcopy(layer).double()
    generator = torch.Generator().manual_seed(1)
    paths = even_paths(lmax, lmax, lmax)
    weight = torch.zeros(len(paths), channels, dtype=torch.float64)
    for l1 in range(lmax + 1):
        for l2 in range(lmax + 1):
            x, y = torch.zeros(2, channels, (lmax + 1) ** 2, dtype=torch.float64)
            for part, degree in ((x, l1), (y, l2)):
                part[:, degree**2 : (degree + 1) ** 2].normal_(generator=generator)
            with torch.no_grad():
                found = signal(layer(flat(x), flat(y)), channels)
            plain = couple(x, y, torch.ones(len(paths), 1, dtype=torch.float64))
            for p, (_, _, l3) in ((p, path) for p, path in enumerate(paths) if path[:2] == (l1, l2)):
                kept = slice(l3 * l3, (l3 + 1) ** 2)
                weight[p] = (found * plain)[:, kept].sum(1) / plain[:, kept].square().sum(1)
    return weight


def make_layer_inputs(rows: int, channels: int, lmax: int, rank: int, device: torch.device) -> LayerInputs:
    from torchlayers.gaunt import GauntTensorProduct

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = GauntTensorProduct(*(_irreps(lmax, channels),) * 3, rank=rank)
    weight = path_weights(layer, channels, lmax)
    randn = _generator(device)
    x, y, g = (randn(rows, channels * (lmax + 1) ** 2) for _ in range(3))
    return LayerInputs(x, y, g, layer.to(device), weight.to(device), lmax)


def layer_reference(inputs: LayerInputs) -> tuple[Tensor, ...]:
    """Output and gradients of x and y, path by path."""

    def layer(x: Tensor, y: Tensor) -> Tensor:
        return flat(couple(signal(x, inputs.channels), signal(y, inputs.channels), inputs.weight))

    # The autograd graph keeps some numbers for each path.
    numbers = inputs.channels * len(inputs.weight) * (inputs.lmax + 1) ** 2
    return _by_rows(layer, (inputs.x, inputs.y), inputs.g, numbers)


def ours_layer(inputs: LayerInputs) -> Built:
    x, y = _leaves(inputs.x, inputs.y)
    layer = copy.deepcopy(inputs.layer)
    return Layer(lambda: layer(x, y), [x, y], inputs.g, weights=list(layer.parameters()))


def _e3nn_layer(inputs: LayerInputs) -> Any:
    product = _e3nn_product(*(inputs.lmax,) * 3, inputs.channels, "uuu", shared=True).to(inputs.x.device)
    scales = e3nn_scales(even_paths(*(inputs.lmax,) * 3)).to(inputs.weight)
    with torch.no_grad():
        product.weight.copy_((inputs.weight * scales[:, None]).flatten())
    return product


def e3nn_layer(inputs: LayerInputs) -> Built:
    x, y = _leaves(inputs.x, inputs.y)
    product = _e3nn_layer(inputs)
    return Layer(lambda: product(x, y), [x, y], inputs.g, weights=[product.weight])


def exact_layer(inputs: LayerInputs) -> Built:
    """e3nn's layer as we take it over: free path weights through the sparse contraction."""
    from torchlayers.gaunt import GauntTensorProduct

    x, y = _leaves(inputs.x, inputs.y)
    product = GauntTensorProduct.from_e3nn(_e3nn_layer(inputs))
    return Layer(lambda: product(x, y), [x, y], inputs.g, weights=list(product.parameters()))


def _layer_case(rows: int, channels: int, lmax: int, rank: int, **more: Any) -> Case:
    return Case(
        labels={"op": "layer", "rows": rows, "C": channels, "L": lmax, "rank": rank},
        inputs=lambda device: make_layer_inputs(rows, channels, lmax, rank, device),
        reference=layer_reference,
        ours=ours_layer,
        peers={"e3nn TensorProduct": e3nn_layer, "torchlayers, e3nn's taken over": exact_layer},
        tolerance=TOLERANCE,
        **more,
    )


# ---------------------------------------------------------------- edge convolution


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
    randn = _generator(device)
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
        x, vectors, weight = _leaves(x, inputs.vectors.double(), weight)

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
    x, vectors, weight = _leaves(inputs.x, inputs.vectors, weight)
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
    with _quiet():
        from e3nn import o3

        harmonics = o3.SphericalHarmonics(list(range(inputs.lmax + 1)), normalize=True, normalization="integral")
    return harmonics.to(inputs.x.device)


def _by_messages(inputs: EdgeInputs, product: Callable[..., Tensor], harmonics: Callable[[Tensor], Tensor]) -> Built:
    source, target = inputs.edge_index

    def forward(x: Tensor, vectors: Tensor, weight: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, target, product(x[source], harmonics(vectors), weight))

    return _edge_layer(inputs, forward, inputs.e3nn_weights)


def _e3nn_messages(inputs: EdgeInputs) -> Any:
    return _e3nn_product(*(inputs.lmax,) * 3, inputs.channels, "uvu", shared=False).to(inputs.x.device)


def e3nn_convolution(inputs: EdgeInputs) -> Built:
    """e3nn's 'uvu' product of gathered features and harmonics, and ``index_add``."""
    return _by_messages(inputs, _e3nn_messages(inputs), _harmonics(inputs))


def exact_convolution(inputs: EdgeInputs) -> Built:
    """e3nn's layer with its product taken over by ours, all else as it was."""
    from torchlayers.gaunt import GauntTensorProduct

    return _by_messages(inputs, GauntTensorProduct.from_e3nn(_e3nn_messages(inputs)), _harmonics(inputs))


def cue_convolution(inputs: EdgeInputs) -> Built:
    """cuEquivariance's polynomial with its gather and its sum; its features lie (N, components, channels)."""
    product = _cue_product(inputs.lmax, inputs.channels, inputs.x.device, inputs.scales.flatten().tolist())
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
    features, filters = _irreps(inputs.lmax, inputs.channels), _irreps(inputs.lmax, 1)
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


def _convolution_cases(
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


# ---------------------------------------------------------------- many-body features


class ManyBodyInputs(NamedTuple):
    """Features x and probe (N, C, (L + 1)²), each atom's element (N,), g flat (N, C (L_out + 1)²).

    weight (elements, terms, C), float64: of :func:`many_body_terms`.
    """

    x: Tensor
    probe: Tensor
    element: Tensor
    g: Tensor
    weight: Tensor
    lmax: int
    lmax_out: int

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def one_hot(self) -> Tensor:
        return torch.nn.functional.one_hot(self.element, ELEMENTS).to(self.x.dtype)

    @property
    def terms(self) -> list[tuple[int, int]]:
        return many_body_terms(self.lmax, self.lmax_out)


def many_body_terms(lmax: int, lmax_out: int) -> list[tuple[int, int]]:
    """(ν, l): the degree l of the power ν."""
    return [(nu, d) for nu in range(1, CORRELATION + 1) for d in range(min(nu * lmax, lmax_out) + 1)]


def make_many_body_inputs(atoms: int, channels: int, lmax: int, lmax_out: int, device: torch.device) -> ManyBodyInputs:
    randn = _generator(device)
    x, probe = (randn(atoms, channels, (lmax + 1) ** 2) for _ in range(2))
    weight = randn(ELEMENTS, len(many_body_terms(lmax, lmax_out)), channels, dtype=torch.float64)
    element = torch.arange(atoms, device=device) % ELEMENTS
    g = randn(atoms, channels * (lmax_out + 1) ** 2)
    return ManyBodyInputs(x, probe, element, g, weight, lmax, lmax_out)


def powers(x: Tensor, lmax: int, lmax_out: int) -> list[Tensor]:
    """The degrees up to ``lmax_out`` of X, X², X³, by a quadrature that is exact for them."""
    from torchlayers.gaunt import sphere_quadrature, spherical_harmonics

    points, weights = sphere_quadrature(CORRELATION * lmax + lmax_out)
    values = x @ spherical_harmonics(lmax, points).to(x).T
    back = (weights[:, None] * spherical_harmonics(lmax_out, points)).to(x)
    return [values**nu @ back for nu in range(1, CORRELATION + 1)]


def _weighted(inputs: ManyBodyInputs, found: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Σ_ν w_{element,ν,l} (X^ν)_l, flat; ``found`` are the powers (N, C, n), weight (elements, terms, C)."""
    weight = weight[inputs.element]
    parts: list[Any] = [0] * (inputs.lmax_out + 1)
    for t, (nu, d) in enumerate(inputs.terms):
        parts[d] = parts[d] + weight[:, t, :, None] * found[nu - 1][..., d * d : (d + 1) ** 2]
    return flat(torch.cat(parts, dim=-1))


def many_body_reference(inputs: ManyBodyInputs, mode: str) -> tuple[Tensor, ...]:
    (x,) = _leaves(inputs.x.double())

    def forward() -> Tensor:
        return _weighted(inputs, powers(x, inputs.lmax, inputs.lmax_out), inputs.weight)

    return Layer(forward, [x], inputs.g.double(), probes=[inputs.probe.double()]).call(mode)


def _many_body_layer(
    inputs: ManyBodyInputs, forward: Callable[[Tensor], Tensor], weights: Sequence[torch.nn.Parameter]
) -> Built:
    (x,) = _leaves(inputs.x)
    learned = [w for w in weights if w.requires_grad]
    return Layer(lambda: forward(x), [x], inputs.g, weights=learned, probes=[inputs.probe])


def ours_many_body(inputs: ManyBodyInputs) -> Built:
    """Our module; its constants are asked of it, a term at a time, so that its weights can be those of the inputs."""
    from torchlayers.gaunt import GauntSymmetricContraction

    def module(channels: int, elements: int, **options: Any) -> Any:
        irreps = _irreps(inputs.lmax, channels), _irreps(inputs.lmax_out, channels)
        return GauntSymmetricContraction(*irreps, correlation=CORRELATION, num_elements=elements, **options)

    layer, small = module(inputs.channels, ELEMENTS), module(1, 1, dtype=torch.float64)
    x = torch.randn(1, 1, (inputs.lmax + 1) ** 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = powers(x, inputs.lmax, inputs.lmax_out)
    weight = torch.empty_like(layer.weight, dtype=torch.float64)
    with torch.no_grad():
        for t, (nu, _, degree) in enumerate(small.terms):
            small.weight.zero_()[:, t] = 1
            kept = slice(degree**2, (degree + 1) ** 2)
            part = found[nu - 1][0, 0, kept]
            constant = (small(x, torch.zeros(1, dtype=torch.long))[0, kept] @ part) / (part @ part)
            weight[:, t] = inputs.weight[:, inputs.terms.index((nu, degree))].cpu() / constant
        layer.weight.copy_(weight)
    layer, one_hot = layer.to(inputs.x.device), inputs.one_hot
    return _many_body_layer(inputs, lambda x: layer(x, one_hot), [layer.weight])


def e3nn_many_body(inputs: ManyBodyInputs) -> Built:
    """Nested products of e3nn, the intermediate as high as it is needed, and weights for each element."""
    lmax, lmax_out = inputs.lmax, inputs.lmax_out
    between = min(2 * lmax, lmax + lmax_out)
    products = []
    for degrees in ((lmax, lmax, between), (between, lmax, lmax_out)):
        product = _e3nn_product(*degrees, inputs.channels, "uuu", shared=True).requires_grad_(False)
        product.weight.copy_(e3nn_scales(even_paths(*degrees)).repeat_interleave(inputs.channels))
        products.append(product.to(inputs.x.device))
    weight = torch.nn.Parameter(inputs.weight.to(inputs.x.dtype))

    def forward(x: Tensor) -> Tensor:
        features = flat(x)
        square = products[0](features, features)
        cube = products[1](square, features)
        return _weighted(inputs, [x, *(signal(t, inputs.channels) for t in (square, cube))], weight)

    return _many_body_layer(inputs, forward, [weight])


def _fit_weights(
    inputs: ManyBodyInputs, weights: Sequence[torch.nn.Parameter], run: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Set a peer's weights, (elements, k, C) for some of its couplings each, so that it computes what the inputs say.

    Each of its K couplings alone is an element here, which ``run(x, element)`` applies to features; our terms combine
    from what they give by least squares.
    """
    channels, sizes = inputs.channels, [w.shape[1] for w in weights]
    couplings, samples = sum(sizes), 64
    units = torch.eye(couplings, device=inputs.x.device)[..., None].expand(-1, -1, channels)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, (inputs.lmax + 1) ** 2, generator=generator).to(inputs.x.device)
    wanted = x.new_zeros(len(inputs.terms), samples, (inputs.lmax_out + 1) ** 2, dtype=torch.float64)
    found = powers(x.double(), inputs.lmax, inputs.lmax_out)
    for t, (nu, d) in enumerate(inputs.terms):
        kept = slice(d * d, (d + 1) ** 2)
        wanted[t, :, kept] = found[nu - 1][:, 0, kept]
    with torch.no_grad():
        for weight, piece in zip(weights, units.split(sizes, dim=1), strict=True):
            weight.data = piece.contiguous()
        element = torch.arange(couplings, device=x.device).repeat_interleave(samples)
        out = run(x.expand(-1, channels, -1).repeat(couplings, 1, 1), element)
        given = signal(out, channels)[:, 0].double().unflatten(0, (couplings, samples))
        # Couplings may depend on each other, which only the CPU's drivers allow.
        given, wanted = (t.flatten(1).T.cpu() for t in (given, wanted))
        combinations = torch.linalg.lstsq(given, wanted, rcond=1e-5, driver="gelsd").solution.to(x.device)
        free = torch.einsum("etc,kt->ekc", inputs.weight, combinations).float()
        for weight, piece in zip(weights, free.split(sizes, dim=1), strict=True):
            weight.data = piece.contiguous()


def mace_many_body(inputs: ManyBodyInputs) -> Built:
    """MACE's SymmetricContraction, which has a weight for each of its couplings."""
    with _quiet():
        from e3nn import o3
        from mace.modules.symmetric_contraction import SymmetricContraction

        layer = SymmetricContraction(
            o3.Irreps(_irreps(inputs.lmax, inputs.channels)),
            o3.Irreps(_irreps(inputs.lmax_out, inputs.channels)),
            CORRELATION,
            internal_weights=True,
            shared_weights=True,
            num_elements=ELEMENTS,
        ).to(inputs.x.device)
    weights = [w for c in layer.contractions for w in (c.weights_max, *c.weights) if w.requires_grad]

    def run(x: Tensor, element: Tensor) -> Tensor:
        return layer(x, torch.nn.functional.one_hot(element).to(x.dtype))

    _fit_weights(inputs, weights, run)
    one_hot = inputs.one_hot
    return _many_body_layer(inputs, lambda x: layer(x, one_hot), weights)


def cue_many_body(inputs: ManyBodyInputs) -> Built:
    """cuEquivariance's SymmetricContraction."""
    import cuequivariance as cue
    import cuequivariance_torch as cuet

    device = inputs.x.device
    layer = cuet.SymmetricContraction(
        cue.Irreps("O3", _irreps(inputs.lmax, inputs.channels)),
        cue.Irreps("O3", _irreps(inputs.lmax_out, inputs.channels)),
        contraction_degree=CORRELATION,
        num_elements=ELEMENTS,
        layout_in=cue.ir_mul,
        layout_out=cue.mul_ir,
        dtype=torch.float32,
        device=device,
        method="uniform_1d" if device.type == "cuda" else "naive",
    )

    def run(x: Tensor, element: Tensor) -> Tensor:
        return layer(x.mT.flatten(1), element)

    _fit_weights(inputs, [layer.weight], run)
    element = inputs.element.int()
    return _many_body_layer(inputs, lambda x: run(x, element), [layer.weight])


MANY_BODY_PEERS = {
    "MACE SymmetricContraction": mace_many_body,
    "e3nn TensorProduct, nested": e3nn_many_body,
    "cuEquivariance SymmetricContraction": cue_many_body,
}


def _many_body_cases(
    atoms: int, channels: int, lmax: int, lmax_out: int, *, headline: bool = False, quick: bool = False
) -> list[Case]:
    """Not of equal expressivity: MACE and cuEquivariance have a weight for each of their couplings to an output."""
    return [
        Case(
            labels={
                "op": "many-body",
                "atoms": atoms,
                "C": channels,
                "L": lmax,
                "L_out": lmax_out,
                "nu": CORRELATION,
                "weights": "weights one per power",
                "for": purpose,
            },
            inputs=lambda device: make_many_body_inputs(atoms, channels, lmax, lmax_out, device),
            reference=functools.partial(many_body_reference, mode=modes[-1]),
            ours=ours_many_body,
            peers=MANY_BODY_PEERS,
            tolerance=TOLERANCE,
            modes=modes,
            work={mode: {"atoms": atoms} for mode in modes},
            headline=headline and DOUBLE in modes,
            quick=quick,
        )
        for purpose, modes in PASSES.items()
    ]


# ---------------------------------------------------------------- exact take-over


class TakenInputs(NamedTuple):
    """Arguments and cotangent of an e3nn product; its weights are each sample's or common; and itself in float64."""

    x: Tensor
    y: Tensor
    g: Tensor
    weight: Tensor
    product: Any
    exact: Any


def make_taken_inputs(rows: int, channels: int, lmax: int, connection: str, device: torch.device) -> TakenInputs:
    """'uuu' with weights shared by all samples, or 'uvu' as in NequIP: harmonics of edges, weights of each edge.

    Both parities of each degree, and all paths between them.
    """
    with _quiet():
        from e3nn import o3

        both = "+".join(f"{channels}x{d}{p}" for d in range(lmax + 1) for p in "eo")
        features = o3.Irreps(both)
        second = features if connection == "uuu" else o3.Irreps(_irreps(lmax, 1))
        instructions = [
            (i, j, k, connection, True)
            for i, (_, a) in enumerate(features)
            for j, (_, b) in enumerate(second)
            for k, (_, c) in enumerate(features)
            if c in a * b
        ]
        shared = connection == "uuu"
        arguments = (features, second, features, instructions)
        product = o3.TensorProduct(*arguments, shared_weights=shared, internal_weights=False).to(device)
        with _default_dtype(torch.float64):
            exact = o3.TensorProduct(*arguments, shared_weights=shared, internal_weights=False).to(device)
    randn = _generator(device)
    x, y, g = (randn(rows, irreps.dim) for irreps in (features, second, features))
    shape = (product.weight_numel,) if shared else (rows, product.weight_numel)
    return TakenInputs(x, y, g, randn(*shape), product, exact)


def taken_reference(inputs: TakenInputs) -> tuple[Tensor, ...]:
    """e3nn's own, in float64: output and gradients of x, y and the weights."""
    leaves = _leaves(inputs.x.double(), inputs.y.double(), inputs.weight.double())
    out = inputs.exact(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.g.double())


def _taken(inputs: TakenInputs, product: Any) -> Built:
    leaves = _leaves(inputs.x, inputs.y, inputs.weight)
    return Built(lambda: product(*leaves), leaves, inputs.g)


def ours_taken(inputs: TakenInputs) -> Built:
    from torchlayers.gaunt import GauntTensorProduct

    return _taken(inputs, GauntTensorProduct.from_e3nn(inputs.product).to(inputs.x.device))


def e3nn_taken(inputs: TakenInputs) -> Built:
    return _taken(inputs, inputs.product)


def oeq_taken(inputs: TakenInputs) -> Built:
    """OpenEquivariance's product from the same instructions; it has no 'uuu'."""
    import openequivariance as oeq

    product = inputs.product
    instructions = [(i.i_in1, i.i_in2, i.i_out, i.connection_mode, True) for i in product.instructions]
    irreps = (oeq.Irreps(str(i)) for i in (product.irreps_in1, product.irreps_in2, product.irreps_out))
    problem = oeq.TPProblem(*irreps, instructions, shared_weights=False, internal_weights=False)
    fused = oeq.TensorProduct(problem)
    return _taken(inputs, lambda x, y, w: fused(x, y, fused.reorder_weights_from_e3nn(w)))


def _taken_case(rows: int, channels: int, lmax: int, connection: str, **more: Any) -> Case:
    peers = {"e3nn TensorProduct": e3nn_taken}
    if connection == "uvu":
        peers["OpenEquivariance"] = oeq_taken
    return Case(
        labels={"op": f"all paths, {connection}, taken over", "rows": rows, "C": channels, "L": lmax},
        inputs=lambda device: make_taken_inputs(rows, channels, lmax, connection, device),
        reference=taken_reference,
        ours=ours_taken,
        peers=peers,
        tolerance=TOLERANCE,
        **more,
    )


# ---------------------------------------------------------------- all of them


def cases(device: str) -> Iterator[Case]:
    """Those without modules first: they need no e3nn, without which the others are not listed."""
    on_gpu = device == "cuda"
    rows, channels = (10_000, 128) if on_gpu else (128, 32)
    for lmax in range(1, 9):
        yield _product_case(rows, channels, lmax, on_gpu, headline=lmax <= 4, quick=lmax == 2)
    for lmax in (8, 12, 16, 24, 32):
        yield _growth_case(20_000 if on_gpu else 128, lmax)

    sizes = ((1_000, 50, 128), (10_000, 50, 128)) if on_gpu else ((64, 20, 16),)
    for atoms, neighbours, width in sizes:
        for lmax in (1, 2, 3):
            options = {"headline": atoms == sizes[-1][0], "quick": lmax == 1 and atoms == sizes[0][0]}
            yield from _convolution_cases(atoms, neighbours, width, lmax, free=False, **options)
    if importlib.util.find_spec("e3nn") is None:
        return
    for atoms, neighbours, width in sizes:
        for lmax in (1, 2, 3):
            options = {"headline": atoms == sizes[-1][0], "quick": lmax == 1 and atoms == sizes[0][0]}
            yield from _convolution_cases(atoms, neighbours, width, lmax, free=True, **options)
    for lmax in (1, 2, 3, 4, 6, 8) if on_gpu else (1, 2, 3, 4, 6):
        for rank in sorted({1, lmax}):
            yield _layer_case(rows, channels, lmax, rank, headline=lmax in (2, 3, 4), quick=lmax == 2)
    # MACE's settings: harmonics up to degree 3, messages 0e + 1o, 128 channels.
    for atoms, width in ((1_000, 128), (10_000, 128)) if on_gpu else ((32, 32),):
        yield from _many_body_cases(atoms, width, 3, 1, headline=True, quick=not on_gpu or atoms == 1_000)
    for connection in ("uuu", "uvu"):
        for lmax in (1, 2, 3):
            taken = (10_000, 64) if on_gpu else (256, 16)
            yield _taken_case(*taken, lmax, connection, headline=lmax == 2, quick=lmax == 1)
