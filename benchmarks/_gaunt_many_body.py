"""Many-body features against e3nn, MACE and cuEquivariance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._gaunt_parts import (
    DOUBLE,
    PASSES,
    TOLERANCE,
    Layer,
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
from ._harness import Built, Case

CORRELATION, ELEMENTS = 3, 10


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
    randn = normals(device)
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
    (x,) = leaves_of(inputs.x.double())

    def forward() -> Tensor:
        return _weighted(inputs, powers(x, inputs.lmax, inputs.lmax_out), inputs.weight)

    return Layer(forward, [x], inputs.g.double(), probes=[inputs.probe.double()]).call(mode)


def _many_body_layer(
    inputs: ManyBodyInputs, forward: Callable[[Tensor], Tensor], weights: Sequence[torch.nn.Parameter]
) -> Built:
    (x,) = leaves_of(inputs.x)
    learned = [w for w in weights if w.requires_grad]
    return Layer(lambda: forward(x), [x], inputs.g, weights=learned, probes=[inputs.probe])


def ours_many_body(inputs: ManyBodyInputs) -> Built:
    """Our module; its constants are asked of it, a term at a time, so that its weights can be those of the inputs."""
    from torchlayers.gaunt import GauntSymmetricContraction

    def module(channels: int, elements: int, **options: Any) -> Any:
        irreps = irreps_of(inputs.lmax, channels), irreps_of(inputs.lmax_out, channels)
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
        product = e3nn_tensor_product(*degrees, inputs.channels, "uuu", shared=True).requires_grad_(False)
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
    with quiet():
        from e3nn import o3
        from mace.modules.symmetric_contraction import SymmetricContraction

        layer = SymmetricContraction(
            o3.Irreps(irreps_of(inputs.lmax, inputs.channels)),
            o3.Irreps(irreps_of(inputs.lmax_out, inputs.channels)),
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
        cue.Irreps("O3", irreps_of(inputs.lmax, inputs.channels)),
        cue.Irreps("O3", irreps_of(inputs.lmax_out, inputs.channels)),
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


def many_body_cases(
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
