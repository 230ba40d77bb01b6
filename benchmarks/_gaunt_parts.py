"""What the Gaunt benchmarks share: layers with double backward, the order of features, and parts of peers."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._harness import BOTH, FORWARD, Built

DOUBLE = "forward+backward+double backward"
TOLERANCE = 1e-5
# What a model is run for, and the passes of it: cases of their own, since their results differ.
PASSES = {"forces": (FORWARD, BOTH), "training on forces": (DOUBLE,)}
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


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def normals(device: torch.device) -> Callable[..., Tensor]:
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
def quiet() -> Iterator[None]:
    """Peers' imports and code generation warn of torch's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """e3nn and MACE make their tables in the default dtype, and would cast them to a higher one only afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def irreps_of(lmax: int, channels: int) -> str:
    return "+".join(f"{channels}x{d}{'eo'[d % 2]}" for d in range(lmax + 1))


def e3nn_tensor_product(lmax1: int, lmax2: int, lmax_out: int, channels: int, connection: str, shared: bool) -> Any:
    """e3nn's product with free weights for the even paths; of 'uvu' the second factor has one channel."""
    with quiet():
        from e3nn import o3

        instructions = [(*path, connection, True) for path in even_paths(lmax1, lmax2, lmax_out)]
        return o3.TensorProduct(
            irreps_of(lmax1, channels),
            irreps_of(lmax2, channels if connection == "uuu" else 1),
            irreps_of(lmax_out, channels),
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


def cue_tensor_product(
    lmax: int, channels: int, device: torch.device, edge_scales: Sequence[float] | None = None
) -> Any:
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


def by_rows(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], g: Tensor, numbers_a_row: int
) -> tuple[Tensor, ...]:
    """Output of ``function`` and gradients of ``tensors``, in float64, a block of rows at a time."""
    found = []
    step = max(1, CHUNK // numbers_a_row)
    for block in zip(*(t.split(step) for t in (*tensors, g)), strict=True):
        leaves = leaves_of(*(t.double() for t in block[:-1]))
        out = function(*leaves)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, block[-1].double())))
    return tuple(map(torch.cat, zip(*found, strict=True)))
