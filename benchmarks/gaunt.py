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

import copy
import functools
import importlib.util
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._gaunt_edges import convolution_cases
from ._gaunt_many_body import many_body_cases
from ._gaunt_parts import (
    TOLERANCE,
    Layer,
    by_rows,
    couple,
    cue_tensor_product,
    default_dtype,
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

METHODS = ("grid", "sparse", "separable", "fourier")


# ---------------------------------------------------------------- the product


class ProductInputs(NamedTuple):
    """x, y, and the cotangent g, (rows, C, (L + 1)²)."""

    x: Tensor
    y: Tensor
    g: Tensor
    lmax: int


def make_product_inputs(rows: int, channels: int, lmax: int, device: torch.device) -> ProductInputs:
    randn = normals(device)
    return ProductInputs(*(randn(rows, channels, (lmax + 1) ** 2) for _ in range(3)), lmax)


def product_reference(inputs: ProductInputs) -> tuple[Tensor, ...]:
    """Output and gradients by a quadrature of the three factors that is exact for them."""
    from torchlayers.gaunt import sphere_quadrature, spherical_harmonics

    points, weights = sphere_quadrature(3 * inputs.lmax)
    values = spherical_harmonics(inputs.lmax, points).to(inputs.x.device)
    back = weights.to(values)[:, None] * values

    def product(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ values.T) * (y @ values.T)) @ back

    return by_rows(product, (inputs.x, inputs.y), inputs.g, inputs.x.shape[1] * len(points))


def _product(inputs: ProductInputs, method: str) -> Built:
    from torchlayers.functional import gaunt_tensor_product

    x, y = leaves_of(inputs.x, inputs.y)
    degrees = (inputs.lmax,) * 3
    return Built(lambda: gaunt_tensor_product(x, y, *degrees, method=method), [x, y], inputs.g)


def e3nn_product(inputs: ProductInputs) -> Built:
    """e3nn's product with one weight a path for all channels, which takes the signals as they lie."""
    product = e3nn_tensor_product(*(inputs.lmax,) * 3, 1, "uuu", shared=True).to(inputs.x.device).requires_grad_(False)
    product.weight.copy_(e3nn_scales(even_paths(*(inputs.lmax,) * 3)))
    x, y = leaves_of(inputs.x, inputs.y)
    return Built(lambda: product(x, y), [x, y], inputs.g)


def e3nn_full_product(inputs: ProductInputs, *, compiled: bool = True) -> Built:
    """e3nn's FullTensorProductv2, and the sum over its paths with weights that make it the product."""
    with quiet():
        from e3nn import o3

        kept = [o3.Irrep(d, (-1) ** d) for d in range(inputs.lmax + 1)]
        product = o3.FullTensorProductv2(*[o3.Irreps(irreps_of(inputs.lmax, 1))] * 2, filter_ir_out=kept)
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
    x, y = leaves_of(inputs.x, inputs.y)
    return Built(lambda: run(x, y), [x, y], inputs.g)


def cue_product(inputs: ProductInputs) -> Built:
    """cuEquivariance's segmented polynomial; its signals lie (rows, components, channels)."""
    product = cue_tensor_product(inputs.lmax, inputs.x.shape[1], inputs.x.device)
    x, y, g = (t.mT.flatten(1).contiguous() for t in inputs[:3])
    x, y = leaves_of(x, y)
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
        layer = GauntTensorProduct(*(irreps_of(lmax, channels),) * 3, rank=rank)
    weight = path_weights(layer, channels, lmax)
    randn = normals(device)
    x, y, g = (randn(rows, channels * (lmax + 1) ** 2) for _ in range(3))
    return LayerInputs(x, y, g, layer.to(device), weight.to(device), lmax)


def layer_reference(inputs: LayerInputs) -> tuple[Tensor, ...]:
    """Output and gradients of x and y, path by path."""

    def layer(x: Tensor, y: Tensor) -> Tensor:
        return flat(couple(signal(x, inputs.channels), signal(y, inputs.channels), inputs.weight))

    # The autograd graph keeps some numbers for each path.
    numbers = inputs.channels * len(inputs.weight) * (inputs.lmax + 1) ** 2
    return by_rows(layer, (inputs.x, inputs.y), inputs.g, numbers)


def ours_layer(inputs: LayerInputs) -> Built:
    x, y = leaves_of(inputs.x, inputs.y)
    layer = copy.deepcopy(inputs.layer)
    return Layer(lambda: layer(x, y), [x, y], inputs.g, weights=list(layer.parameters()))


def _e3nn_layer(inputs: LayerInputs) -> Any:
    product = e3nn_tensor_product(*(inputs.lmax,) * 3, inputs.channels, "uuu", shared=True).to(inputs.x.device)
    scales = e3nn_scales(even_paths(*(inputs.lmax,) * 3)).to(inputs.weight)
    with torch.no_grad():
        product.weight.copy_((inputs.weight * scales[:, None]).flatten())
    return product


def e3nn_layer(inputs: LayerInputs) -> Built:
    x, y = leaves_of(inputs.x, inputs.y)
    product = _e3nn_layer(inputs)
    return Layer(lambda: product(x, y), [x, y], inputs.g, weights=[product.weight])


def exact_layer(inputs: LayerInputs) -> Built:
    """e3nn's layer as we take it over: free path weights through the sparse contraction."""
    from torchlayers.gaunt import GauntTensorProduct

    x, y = leaves_of(inputs.x, inputs.y)
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
    with quiet():
        from e3nn import o3

        both = "+".join(f"{channels}x{d}{p}" for d in range(lmax + 1) for p in "eo")
        features = o3.Irreps(both)
        second = features if connection == "uuu" else o3.Irreps(irreps_of(lmax, 1))
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
        with default_dtype(torch.float64):
            exact = o3.TensorProduct(*arguments, shared_weights=shared, internal_weights=False).to(device)
    randn = normals(device)
    x, y, g = (randn(rows, irreps.dim) for irreps in (features, second, features))
    shape = (product.weight_numel,) if shared else (rows, product.weight_numel)
    return TakenInputs(x, y, g, randn(*shape), product, exact)


def taken_reference(inputs: TakenInputs) -> tuple[Tensor, ...]:
    """e3nn's own, in float64: output and gradients of x, y and the weights."""
    leaves = leaves_of(inputs.x.double(), inputs.y.double(), inputs.weight.double())
    out = inputs.exact(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.g.double())


def _taken(inputs: TakenInputs, product: Any) -> Built:
    leaves = leaves_of(inputs.x, inputs.y, inputs.weight)
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
            yield from convolution_cases(atoms, neighbours, width, lmax, free=False, **options)
    if importlib.util.find_spec("e3nn") is None:
        return
    for atoms, neighbours, width in sizes:
        for lmax in (1, 2, 3):
            options = {"headline": atoms == sizes[-1][0], "quick": lmax == 1 and atoms == sizes[0][0]}
            yield from convolution_cases(atoms, neighbours, width, lmax, free=True, **options)
    for lmax in (1, 2, 3, 4, 6, 8) if on_gpu else (1, 2, 3, 4, 6):
        for rank in sorted({1, lmax}):
            yield _layer_case(rows, channels, lmax, rank, headline=lmax in (2, 3, 4), quick=lmax == 2)
    # MACE's settings: harmonics up to degree 3, messages 0e + 1o, 128 channels.
    for atoms, width in ((1_000, 128), (10_000, 128)) if on_gpu else ((32, 32),):
        yield from many_body_cases(atoms, width, 3, 1, headline=True, quick=not on_gpu or atoms == 1_000)
    for connection in ("uuu", "uvu"):
        for lmax in (1, 2, 3):
            taken = (10_000, 64) if on_gpu else (256, 16)
            yield _taken_case(*taken, lmax, connection, headline=lmax == 2, quick=lmax == 1)
