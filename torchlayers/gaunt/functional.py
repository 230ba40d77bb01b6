"""The family's functions: arguments are checked here, once, and the algorithm and its implementation are picked."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .._attention import no_autocast
from .._backend import import_kernels, use_triton
from .._checks import check_choice, check_dtype, check_int, check_same_device, check_size
from .._tables import table
from . import grid
from .arguments import common_dtype, kept_degree
from .convolution import gaunt_convolution
from .sparse import SparseSpec, gaunt_spec, sparse_product

__all__ = ["gaunt_convolution", "gaunt_many_body", "gaunt_tensor_product"]

METHODS = ("auto", "grid", "separable", "fourier", "sparse", "dense")

# On a GPU, where the kernels run: up to this degree the non-zero coefficients alone need fewer operations than a grid
# (3474 against 6450 a row at L = 4, 8721 against 9288 at L = 5). Counted, not measured.
SPARSE_DEGREE = 4
# On a CPU, in the units of grid.costs: a multiply-add of the dense products that stand for the sparse contraction
# there, fitted like those; and over how many channels a y common to all is taken to spread.
SPARSE_COST, SHARING = 1.5, 32

_kernels = import_kernels("sphere_product")


def gaunt_tensor_product(
    x: Tensor,
    y: Tensor,
    lmax1: int,
    lmax2: int,
    lmax_out: int | None = None,
    *,
    antisymmetric: bool = False,
    method: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """The product of two signals on the sphere, channel by channel, or their Poisson bracket::

        z = P(X Y)                  z_k = Σ_ij x_i y_j ∫ Y_i Y_j Y_k                    l1 + l2 + l3 even
        z = P(r·(∇X × ∇Y))          z_k = Σ_ij x_i y_j ∫ r·(∇Y_i × ∇Y_j) Y_k            l1 + l2 + l3 odd

    for X = Σ_i x_i Y_i, Y_i the real spherical harmonics, integral-normalised (orthonormal), in e3nn's convention:
    polar axis +y, component l² + l + m. P keeps degrees up to ``lmax_out``. All methods are exact.

    Args:
        x: (…, C, (lmax1 + 1)²), real. Batch and channel dimensions of ``x`` and ``y`` broadcast: a ``y`` with one
            channel multiplies every channel of ``x``.
        y: (…, C, (lmax2 + 1)²), dtype and device of ``x``.
        lmax1, lmax2: degrees of the signals.
        lmax_out: highest degree kept, at most and by default lmax1 + lmax2.
        antisymmetric: the bracket, alone, instead of the product. It reaches the Clebsch–Gordan paths that the product
            lacks (1 × 1 → 1, the cross product), and turns a signal and a pseudo-signal into one another.
        method: how, for signals of degree L:

            - "grid": values at the points of a quadrature, one matrix product each way, O(L⁴).
            - "separable": Legendre functions over the polar angle for each order, then Fourier, O(L³).
            - "fourier": Fourier series on the torus and zero-padded FFTs, the paper's way, O(L³).
            - "sparse": the non-zero coefficients, O(L⁵).
            - "dense": all coefficients, the definition, O(L⁶).
            - "auto": the one that a cost model expects to be fastest.
        backend: see :func:`torchlayers.backend`. "grid" and "sparse" have kernels.

    Returns:
        (…, C, (lmax_out + 1)²), differentiable any number of times. The dtype is that of the inputs, where 16-bit
        inputs are computed in float32 and rounded once; under autocast such inputs and float32 may be mixed and the
        result is float32, as of torch's own operations that autocast keeps in float32 (16-bit tables would cost 1 %).

    Raises:
        TypeError: integer or complex tensors, dtypes that differ, degrees that are no ints.
        ValueError: a last dimension that does not fit its degree, ``lmax_out`` above lmax1 + lmax2, shapes that do not
            broadcast, tensors on two devices, an unknown method or backend.
        BackendError: ``backend="triton"`` with what the kernels do not support.

    Source: arXiv 2401.10216, section 3 (product); 2605.15073 (bracket); 2506.13523 (grid).

    Example:

        >>> import torch
        >>> from torchlayers.functional import gaunt_tensor_product
        >>> x, y = torch.randn(10, 32, 9), torch.randn(10, 32, 16)
        >>> gaunt_tensor_product(x, y, 2, 3).shape
        torch.Size([10, 32, 36])
        >>> gaunt_tensor_product(x, y, 2, 3, 2, antisymmetric=True).shape
        torch.Size([10, 32, 9])
    """
    check_int("lmax1", lmax1, minimum=0)
    check_int("lmax2", lmax2, minimum=0)
    lmax_out = kept_degree(lmax_out, lmax1 + lmax2, "lmax1 + lmax2")
    check_choice("method", method, METHODS)
    _check_signal("x", x, lmax1, "lmax1")
    _check_signal("y", y, lmax2, "lmax2")
    check_same_device("y", y, "x", x)
    _check_broadcast(x, y)
    (x, y), dtype = common_dtype(x=x, y=y)
    antisymmetric = bool(antisymmetric)
    with no_autocast(x):
        if method == "auto":
            method = _fastest(x, y, (lmax1, lmax2), lmax_out, backend)
        if method == "sparse":
            return _sparse(x, y, lmax1, lmax2, lmax_out, antisymmetric, backend).to(dtype)
        unsupported = f"method={method!r}" if method != "grid" else _unsupported((lmax1, lmax2), lmax_out, x)
        if use_triton("sphere_product", x, backend, unsupported):
            return _product_kernel(x, y, lmax1, lmax2, lmax_out, antisymmetric).to(dtype)
        x, y = _widened(x), _widened(y)
        if method == "dense":
            return _dense(x, y, lmax1, lmax2, lmax_out, antisymmetric).to(dtype)
        z = grid.contract((x, y), (lmax1, lmax2), (0, 1), lmax_out, method=method, bracket=antisymmetric)
        return z.to(dtype)


def gaunt_many_body(x: Tensor, lmax: int, correlation: int, lmax_out: int, *, backend: str | None = None) -> Tensor:
    """The ``correlation``-fold product of a signal with itself, channel by channel::

        z = P(X^ν),     z_k = ∫ (Σ_i x_i Y_i)^ν Y_k

    with conventions as in :func:`gaunt_tensor_product`; P keeps degrees up to ``lmax_out``. Nothing in between is
    truncated: the power is taken point by point on a grid that resolves ν lmax + lmax_out.

    Args:
        x: (…, C, (lmax + 1)²), real.
        lmax: degree of the signal.
        correlation: ν, at least 1.
        lmax_out: highest degree kept, at most ν lmax.
        backend: see :func:`torchlayers.backend`.

    Returns:
        (…, C, (lmax_out + 1)²); differentiability and dtypes as in :func:`gaunt_tensor_product`.

    Raises:
        TypeError, ValueError, BackendError: as :func:`gaunt_tensor_product`.

    Source: arXiv 2401.10216, section 3.3.

    Example:

        >>> import torch
        >>> from torchlayers.functional import gaunt_many_body
        >>> gaunt_many_body(torch.randn(10, 32, 9), lmax=2, correlation=3, lmax_out=1).shape
        torch.Size([10, 32, 4])
    """
    check_int("lmax", lmax, minimum=0)
    check_int("correlation", correlation)
    check_int("lmax_out", lmax_out, minimum=0)
    lmax_out = kept_degree(lmax_out, correlation * lmax, "correlation * lmax")
    _check_signal("x", x, lmax, "lmax")
    return many_body_powers(x, lmax, {correlation: lmax_out}, backend=backend)[correlation]


def many_body_powers(
    x: Tensor, lmax: int, degrees: Mapping[int, int], *, backend: str | None = None
) -> dict[int, Tensor]:
    """:func:`gaunt_many_body` for several correlations: ν -> P(X^ν) up to degree ``degrees[ν]``, at most ν lmax.

    The kernel makes them in one pass over x. Plain torch takes them one by one, each on the grid that it needs.
    """
    (x,), dtype = common_dtype(x=x)
    found = {nu: x[..., : (degree + 1) ** 2].clone().to(dtype) for nu, degree in degrees.items() if nu == 1}
    higher = {nu: degree for nu, degree in degrees.items() if nu > 1}
    if not higher:
        return found
    lmax_out = max(higher.values())
    with no_autocast(x):
        if use_triton("sphere_power", x, backend, _unsupported((lmax,), lmax_out, x)):
            results = _power_kernel(x, lmax, tuple(higher), lmax_out)
            for (nu, degree), z in zip(higher.items(), results, strict=True):
                found[nu] = z[..., : (degree + 1) ** 2].to(dtype)
            return found
        for nu, degree in higher.items():
            factors = (0,) * nu
            method = _cheapest((lmax,), factors, degree, False)
            found[nu] = grid.contract((_widened(x),), (lmax,), factors, degree, method=method).to(dtype)
    return found


# ------------------------------------------------------------------------------------------------------ arguments


def _check_signal(name: str, x: object, lmax: int, degree: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor (..., channels, ({degree} + 1)²), got {x!r} ({type(x).__name__})")
    check_dtype(name, x, kind="real")
    if x.ndim < 1:
        raise ValueError(f"{name} must have dimensions (..., channels, ({degree} + 1)²), got 0 dimensions")
    check_size(name, x, -1, (lmax + 1) ** 2, f"({degree} + 1)²")


def _check_broadcast(x: Tensor, y: Tensor) -> None:
    for a, b in zip(x.shape[-2::-1], y.shape[-2::-1], strict=False):
        if a != b and a != 1 and b != 1:
            raise ValueError(
                f"y must have batch and channel dimensions that broadcast with those of x, {tuple(x.shape[:-1])}, "
                f"got {tuple(y.shape[:-1])}"
            )


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --------------------------------------------------------------------------------------------------- the choice


def _unsupported(lmaxs: tuple[int, ...], lmax_out: int, x: Tensor) -> str | None:
    """What of a product the grid kernel does not support."""
    return None if _kernels is None else _kernels.unsupported(lmaxs, (lmax_out,), x.dtype)


def _fastest(x: Tensor, y: Tensor, lmaxs: tuple[int, int], lmax_out: int, backend: str | None) -> str:
    if use_triton("sparse_product", x, backend):
        small = max(*lmaxs, lmax_out) <= SPARSE_DEGREE
        return "sparse" if small or _unsupported(lmaxs, lmax_out, x) is not None else "grid"
    if y.ndim > 1 and y.shape[-2] == 1 and x.ndim > 1 and x.shape[-2] != 1:
        return _cheapest(lmaxs, (0, 1), lmax_out, True)
    return _cheapest(lmaxs, (0, 1), lmax_out, False)


@torch.compiler.assume_constant_result  # dynamo does not know min with a key
def _cheapest(lmaxs: tuple[int, ...], factors: tuple[int, ...], lmax_out: int, shared: bool) -> str:
    return _cached_cheapest(lmaxs, factors, lmax_out, shared)


@functools.cache
def _cached_cheapest(lmaxs: tuple[int, ...], factors: tuple[int, ...], lmax_out: int, shared: bool) -> str:
    """The method of least cost on a CPU; ``shared``: the last signal is common to all channels."""
    costs = grid.costs(lmaxs, factors, lmax_out, int(shared))
    if len(lmaxs) == 2:
        n1, n2, n3 = ((ell + 1) ** 2 for ell in (*lmaxs, lmax_out))
        # A signal common to all channels is made into a matrix from the other to the result, once.
        costs["sparse"] = SPARSE_COST * (n1 * n3 + n1 * n2 * n3 / SHARING if shared else n1 * n2 * n3)
    return min(costs, key=costs.__getitem__)


# ------------------------------------------------------------------------------------------------ implementations


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The two as (B, C, n), where one may keep its one channel beside the other's C, and the common dimensions."""
    ndim = max(x.ndim, y.ndim)
    x, y = (t.reshape((1,) * (max(ndim, 3) - t.ndim) + t.shape) if t.ndim < max(ndim, 3) else t for t in (x, y))
    lead = grid.common_shape((x.shape[:-1], y.shape[:-1]))

    def rows(t: Tensor) -> Tensor:
        return t.expand(*lead[:-1], -1, -1).reshape(math.prod(lead[:-1]), t.shape[-2], t.shape[-1])

    return rows(x), rows(y), lead[len(lead) - (ndim - 1) :]


def _dense(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int, antisymmetric: bool) -> Tensor:
    # The definition's sum; torch.einsum over three tensors would tie an exported graph to one batch size.
    coefficients = table("gaunt_dense", lmax1, lmax2, lmax_out, int(antisymmetric), dtype=x.dtype, device=x.device)
    return (x[..., :, None] * y[..., None, :]).flatten(-2) @ coefficients.flatten(0, 1)


_cached_spec = functools.cache(gaunt_spec)


@torch.compiler.assume_constant_result
def _spec(lmax1: int, lmax2: int, lmax_out: int, antisymmetric: bool) -> SparseSpec:
    return _cached_spec(lmax1, lmax2, lmax_out, antisymmetric=antisymmetric)


def _sparse(
    x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int, antisymmetric: bool, backend: str | None
) -> Tensor:
    x, y, lead = _rows(x, y)
    if x.shape[1] == 1:
        x = x.expand(-1, y.shape[1], -1)
    elif x.shape[1] == 0:
        y = y.expand(-1, 0, -1)
    z = sparse_product(x, y, None, _spec(lmax1, lmax2, lmax_out, antisymmetric), backend=backend)
    return z.reshape(*lead, z.shape[-1])


def _sphere_table(x: Tensor, name: str, *arguments: int) -> Tensor:
    """A table for the grid kernel, which takes 16-bit signals beside float32 tables."""
    return table(name, *arguments, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _product_kernel(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int, antisymmetric: bool) -> Tensor:
    assert _kernels is not None
    degree = lmax1 + lmax2 + lmax_out
    operation, basis = (
        (_kernels.sphere_bracket, "gaunt_tangent") if antisymmetric else (_kernels.sphere_product, "gaunt_harmonics")
    )
    x, y, lead = _rows(x, y)
    z = operation(
        x,
        y,
        _sphere_table(x, basis, lmax1, degree),
        _sphere_table(x, basis, lmax2, degree),
        _sphere_table(x, "gaunt_harmonics", lmax_out, degree),
        _sphere_table(x, "gaunt_weights", degree),
    )
    return z.view(*lead, z.shape[-1])


def _power_kernel(x: Tensor, lmax: int, powers: tuple[int, ...], lmax_out: int) -> list[Tensor]:
    assert _kernels is not None
    degree = max(powers) * lmax + lmax_out
    rows, _, lead = _rows(x, x)
    results = _kernels.sphere_power(
        rows,
        _sphere_table(x, "gaunt_harmonics", lmax, degree),
        _sphere_table(x, "gaunt_harmonics", lmax_out, degree),
        _sphere_table(x, "gaunt_weights", degree),
        powers,
    )
    return [z.view(*lead, z.shape[-1]) for z in results]
