"""Products of signals by their values on a grid: to the grid, multiply, and back. Exact, in plain torch.

Three grids serve one contraction. Each is a pair of linear maps, to values and back to coefficients, that makes

    z = P(X₁ ⋯ X_k)    and    z = P{X₁, X₂},    P the projection on degrees up to lmax_out

exact for signals whose degrees and lmax_out add up to ``degree``:

==========  ================================================================  =================================
grid        points and how values come about                                  operations a signal, L = degree/3
==========  ================================================================  =================================
grid        half sphere and its antipodes (Lebedev): one matrix               O(L⁴)
separable   Gauss–Legendre × azimuths: Legendre for each order, then Fourier  O(L³)
fourier     the torus: Fourier coefficients, zero-padded FFT                  O(L³)
==========  ================================================================  =================================

The integral ∫ X₁ ⋯ X_k G is a multilinear form in its factors, and so is ∫ {X, Y} G, which does not change when X, Y
and G are rotated in turn. Hence every derivative is the same contraction over other factors, on the same grid; with
that as the backward pass the contraction can be differentiated any number of times while it keeps nothing but the
coefficients: values are made again, for a few rows at a time that fit the processor's cache.

Sources: arXiv 2401.10216 (the product, Fourier), 2506.13523 (sphere grid), 2605.15073 (bracket, separable grid).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._attention import no_autocast
from .._tables import register_table, table
from .fourier import sh_to_fourier
from .sphere import gauss_legendre, grid_size, half_sphere, spherical_harmonics, tangent_harmonics

__all__ = ["contract", "costs"]

# Bytes of one factor's values that are held at once: a core's cache, and on a GPU what keeps it busy.
CPU_BYTES, GPU_BYTES = 2**20, 2**28


class _Grid(NamedTuple):
    """How one method goes to values and back.

    ``values(x, lmax, degree, band, derivative)`` of ``x`` (*lead, n) has its grid axes behind those of the batch, or,
    where ``leading`` counts them, in front; derivative 1 and 2 are the two parts that make a bracket, 0 the signal.
    ``coefficients(v, lmax, degree, band, bracket)`` goes back to (*lead, n). ``band`` is the highest degree that
    products on the grid have before they are projected.
    """

    values: Callable[[Tensor, int, int, int, int], Tensor]
    coefficients: Callable[[Tensor, int, int, int, bool], Tensor]
    points: Callable[[int, int], int]
    leading: int


def _components(lmax: int) -> int:
    return (lmax + 1) ** 2


def _like(x: Tensor, name: str, *arguments: int) -> Tensor:
    return table(name, *arguments, dtype=x.dtype, device=x.device)


# ------------------------------------------------------------------------------------- grid: one matrix each way


def _sphere(degree: int) -> tuple[Tensor, Tensor]:
    points, weights = half_sphere(degree)
    return torch.cat((points, -points)), torch.cat((weights, weights)) / 2


@register_table("gaunt_to_grid", shape=lambda lmax, degree, derivative: (_components(lmax), 2 * grid_size(degree)))
def _to_grid(lmax: int, degree: int, derivative: int) -> Tensor:
    points, _ = _sphere(degree)
    if derivative == 0:
        return spherical_harmonics(lmax, points).T.contiguous()
    return tangent_harmonics(lmax, points)[derivative - 1].T.contiguous()


def _padded(components: int) -> int:
    # A product with 4, 9 or 25 columns takes 2 to 4 times as long as one with 16 or 32 (MKL, AVX2).
    return -(-components // 16) * 16 if components < 32 else components


@register_table("gaunt_from_grid", shape=lambda lmax, degree: (2 * grid_size(degree), _padded(_components(lmax))))
def _from_grid(lmax: int, degree: int) -> Tensor:
    points, weights = _sphere(degree)
    back = weights[:, None] * spherical_harmonics(lmax, points)
    return torch.nn.functional.pad(back, (0, _padded(_components(lmax)) - _components(lmax)))


_GRID = _Grid(
    values=lambda x, lmax, degree, band, derivative: x @ _like(x, "gaunt_to_grid", lmax, degree, derivative),
    coefficients=lambda v, lmax, degree, band, bracket: (v @ _like(v, "gaunt_from_grid", lmax, degree))[
        ..., : _components(lmax)
    ],
    points=lambda degree, band: 2 * grid_size(degree),
    leading=0,
)


# ------------------------------------------------------------------- separable: Legendre for each order, then Fourier
#
# Rows come last here, so that each of the two steps is a matrix product from the left and nothing is permuted between
# them. The step over the polar angle is a batched product over the orders m = -L … L, each padded to L + 1 degrees.


def _by_order(x: Tensor, chosen: Tensor, lmax: int) -> Tensor:
    """(*lead, n) to (orders, L + 1, rows): entry [m, l] is x_lm, anything where l < |m|."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).T
    return rows.index_select(0, chosen).view(len(chosen) // (lmax + 1), lmax + 1, rows.shape[1])


def _by_degree(z: Tensor, chosen: Tensor, lead: Sequence[int]) -> Tensor:
    """(orders, L + 1, rows) to (*lead, n)."""
    return z.flatten(0, 1).index_select(0, chosen).T.reshape(*lead, len(chosen))


@register_table("gaunt_by_order", shape=lambda lmax: ((2 * lmax + 1) * (lmax + 1),))
def _order_index(lmax: int) -> Tensor:
    orders = range(-lmax, lmax + 1)
    index = [max(ell, abs(m)) ** 2 + max(ell, abs(m)) + m for m in orders for ell in range(lmax + 1)]
    return torch.tensor(index, dtype=torch.float64)


@register_table("gaunt_by_degree", shape=lambda lmax: (_components(lmax),))
def _degree_index(lmax: int) -> Tensor:
    index = [(lmax + m) * (lmax + 1) + ell for ell in range(lmax + 1) for m in range(-ell, ell + 1)]
    return torch.tensor(index, dtype=torch.float64)


def _rings(degree: int) -> int:
    return degree // 2 + 1


def _polar_factors(lmax: int, cosine: Tensor) -> Tensor:
    """Θ_lm, m ≥ 0, at polar angles of that cosine: (L + 1 orders, angles, L + 1 degrees), zero for l < m."""
    sine = (1 - cosine * cosine).sqrt()
    meridian = spherical_harmonics(lmax, torch.stack((torch.zeros_like(cosine), cosine, sine), dim=-1))
    factors = cosine.new_zeros(lmax + 1, len(cosine), lmax + 1)
    for m in range(lmax + 1):
        factors[m, :, m:] = meridian[:, [ell * ell + ell + m for ell in range(m, lmax + 1)]]
    return factors


def _both_signs(by_order: Tensor) -> Tensor:
    """Orders 0 … L to -L … L."""
    return torch.cat((by_order[1:].flip(0), by_order))


@register_table("gaunt_polar", shape=lambda lmax, degree, part: (2 * lmax + 1, _rings(degree), lmax + 1))
def _polar(lmax: int, degree: int, part: int) -> Tensor:
    """Part 0: Θ; 1: ∂Θ/∂θ; 2: Θ / sin θ."""
    cosine, _ = gauss_legendre(_rings(degree))
    factors = _polar_factors(lmax, cosine)
    sine = (1 - cosine * cosine).sqrt()[:, None]
    if part == 1:
        # sin θ ∂Θ_lm/∂θ = l cos θ Θ_lm - sqrt((2l + 1)(l² - m²) / (2l - 1)) Θ_{l-1,m}
        degrees = torch.arange(lmax + 1, dtype=torch.float64)
        lower = torch.nn.functional.pad(factors[..., :-1], (1, 0))
        square = degrees**2 - degrees[:, None] ** 2
        ratio = ((2 * degrees + 1) * square.clamp_min(0) / (2 * degrees - 1).clamp_min(1)).sqrt()
        factors = degrees * cosine[:, None] * factors - ratio[:, None] * lower
    return _both_signs(factors / sine if part else factors)


@register_table("gaunt_polar_back", shape=lambda lmax, degree: (2 * lmax + 1, lmax + 1, _rings(degree)))
def _polar_back(lmax: int, degree: int) -> Tensor:
    cosine, weights = gauss_legendre(_rings(degree))
    return _both_signs(_polar_factors(lmax, cosine).transpose(1, 2) * (weights * (2 * math.pi / (degree + 1))))


@register_table("gaunt_azimuth", shape=lambda lmax, degree, part: (degree + 1, 2 * lmax + 1))
def _azimuth(lmax: int, degree: int, part: int) -> Tensor:
    """Parts 0 and 1: cos mφ for m ≥ 0 and sin |m|φ for m < 0; 2: their derivatives."""
    angle = torch.arange(degree + 1, dtype=torch.float64)[:, None] * (2 * math.pi / (degree + 1))
    m = torch.arange(-lmax, lmax + 1, dtype=torch.float64)
    cosine, sine = (m * angle).cos(), (m.abs() * angle).sin()
    if part == 2:
        return torch.where(m < 0, -m * cosine, -m * sine)
    return torch.where(m < 0, sine, cosine)


def _separable_values(x: Tensor, lmax: int, degree: int, band: int, derivative: int) -> Tensor:
    chosen = table("gaunt_by_order", lmax, dtype=torch.int64, device=x.device)
    rings = _like(x, "gaunt_polar", lmax, degree, derivative) @ _by_order(x, chosen, lmax)
    values = _like(x, "gaunt_azimuth", lmax, degree, derivative) @ rings.flatten(1)
    return values.view(degree + 1, _rings(degree), *x.shape[:-1])


def _separable_coefficients(v: Tensor, lmax: int, degree: int, band: int, bracket: bool) -> Tensor:
    rings = _like(v, "gaunt_azimuth", lmax, degree, 0).T @ v.flatten(1)
    rows = math.prod(v.shape[2:])
    back = _like(v, "gaunt_polar_back", lmax, degree) @ rings.view(2 * lmax + 1, _rings(degree), rows)
    chosen = table("gaunt_by_degree", lmax, dtype=torch.int64, device=v.device)
    return _by_degree(back, chosen, v.shape[2:])


_SEPARABLE = _Grid(
    values=_separable_values,
    coefficients=_separable_coefficients,
    points=lambda degree, band: (degree + 1) * _rings(degree),
    leading=2,
)


# ------------------------------------------------------------------------------- fourier: coefficients on the torus
#
# A signal is Σ_uv f_uv e^{i(uθ + vφ)}, and f_{u,±m} is made of the orders ±m alone: with a and b the polar series of
# the orders m and -m, f_{u,m} = (a_u - i b_u) / 2. That series is real for even m and imaginary for odd m, so that real
# matrices give the real and the imaginary part of f for v ≥ 0, which is all that a real FFT wants. A derivative turns
# by another i. A bracket comes multiplied by sin θ, as ∂_θX ∂_φY - ∂_φX ∂_θY, and so is integrated without the sin θ of
# the surface element.

# Real and imaginary part of i^turns (a - ib): whether a or b (order m or -m) is in it, and its sign.
_PARTS = (((1, 1.0), (-1, -1.0)), ((-1, 1.0), (1, 1.0)), ((1, -1.0), (-1, 1.0)))


def _angles(band: int) -> int:
    """Polar angles on the torus that products of degree up to ``band`` need; an FFT likes multiples of 4."""
    return -(-(2 * band + 1) // 4) * 4


def _azimuths(degree: int) -> int:
    """Azimuths: what aliases is of higher order than what is kept."""
    return -(-(degree + 1) // 4) * 4


def _polar_series(lmax: int) -> Tensor:
    """Coefficients of e^{iuθ} in Θ_lm, m ≥ 0, u = -L … L: (orders, degrees, 2L + 1), complex; zero for l < m."""
    coefficients = sh_to_fourier(lmax)
    series = coefficients.new_zeros(lmax + 1, lmax + 1, 2 * lmax + 1)
    for m in range(lmax + 1):
        of_order = [ell * ell + ell + m for ell in range(m, lmax + 1)]
        series[m, m:] = coefficients[of_order, :, lmax + m] * (2 if m else 1)
    return series


@register_table("gaunt_series_index", shape=lambda lmax, derived: (2 * (lmax + 1) ** 2,))
def _series_index(lmax: int, derived: int) -> Tensor:
    """The component behind [v, part, l], of a signal or of its ``derived`` = 1st derivatives."""
    orders = [side * m for m in range(lmax + 1) for side, _ in _PARTS[m % 2 + derived]]
    degrees = [(max(ell, abs(order)), order) for order in orders for ell in range(lmax + 1)]
    return torch.tensor([ell * ell + ell + order for ell, order in degrees], dtype=torch.float64)


@register_table("gaunt_series", shape=lambda lmax, band, derivative: (2 * (lmax + 1), _angles(band), lmax + 1))
def _series(lmax: int, band: int, derivative: int) -> Tensor:
    """[v, part, l] to [v, part, u], u in an FFT's order: the signal (0), its ∂_θ (1) or ∂_φ (2)."""
    frequency = torch.arange(-lmax, lmax + 1)
    out = torch.zeros(lmax + 1, 2, _angles(band), lmax + 1, dtype=torch.float64)
    for m, polar in enumerate(_polar_series(lmax)):
        series = polar.imag if m % 2 else polar.real
        series = series * (1, frequency, m)[derivative]
        for part, (side, sign) in enumerate(_PARTS[m % 2 + (derivative > 0)]):
            # There is no order -0: of the constant in φ one part vanishes, and the other is not halved.
            share = 0.5 if m else float(side > 0)
            out[m, part, frequency % _angles(band)] = sign * share * series.T
    return out.flatten(0, 1)


@register_table("gaunt_series_back", shape=lambda lmax, band, bracket: (2 * (lmax + 1), lmax + 1, _angles(band)))
def _series_back(lmax: int, band: int, bracket: int) -> Tensor:
    """[v, part, u] to [v, part, l]: ∫ e^{i(uθ + vφ)} Y_lm sin θ dθ dφ, for a bracket without the sin θ."""
    frequency = torch.arange(-band, band + 1)
    k = (frequency[:, None] + torch.arange(-lmax, lmax + 1)).double()
    even = k % 2 == 0
    # ∫ e^{ikθ} (sin θ) dθ over [0, π]
    if bracket:
        real, imag = math.pi * (k == 0), torch.where(even, 0.0, 2 / k)
    else:
        real, imag = torch.where(even, 2 / (1 - k * k), 0.0), math.pi / 2 * k * (k.abs() == 1)
    integral = torch.complex(real.double(), imag)
    out = torch.zeros(lmax + 1, 2, lmax + 1, _angles(band), dtype=torch.float64)
    for m, polar in enumerate(_polar_series(lmax)):
        back = 2 * math.pi * polar @ integral.T
        turned = (m + bracket) % 2
        series = back.imag if turned else back.real
        out[m, 0, :, frequency % _angles(band)] = -series if turned else series
        out[m, 1, :, frequency % _angles(band)] = -series
    return out.flatten(0, 1)


@register_table("gaunt_series_back_index", shape=lambda lmax, bracket: (_components(lmax),))
def _series_back_index(lmax: int, bracket: int) -> Tensor:
    """Where in [v, part, l] each component lies: cos mφ meets the real part, in turned orders the imaginary one."""
    index = []
    for ell in range(lmax + 1):
        for m in range(-ell, ell + 1):
            part = int(m < 0) ^ ((abs(m) + bracket) % 2)
            index.append((2 * abs(m) + part) * (lmax + 1) + ell)
    return torch.tensor(index, dtype=torch.float64)


def _fourier_values(x: Tensor, lmax: int, degree: int, band: int, derivative: int) -> Tensor:
    lead, angles, azimuths = x.shape[:-1], _angles(band), _azimuths(degree)
    chosen = table("gaunt_series_index", lmax, int(derivative > 0), dtype=torch.int64, device=x.device)
    parts = _like(x, "gaunt_series", lmax, band, derivative) @ _by_order(x, chosen, lmax)
    real, imag = parts.view(lmax + 1, 2, angles, math.prod(lead)).unbind(1)
    series = torch.complex(real, imag).permute(2, 1, 0).contiguous()  # an FFT over strides takes twice the time
    values = torch.fft.irfft2(series, s=(angles, azimuths), norm="forward")
    return values.view(*lead, angles, azimuths)


def _fourier_coefficients(v: Tensor, lmax: int, degree: int, band: int, bracket: bool) -> Tensor:
    lead = v.shape[:-2]
    spectrum = torch.fft.rfft2(v.reshape(math.prod(lead), *v.shape[-2:]), norm="forward")[..., : lmax + 1]
    spectrum = spectrum.permute(2, 1, 0)
    parts = torch.stack((spectrum.real, spectrum.imag), dim=1).flatten(0, 1)
    back = _like(v, "gaunt_series_back", lmax, band, int(bracket)) @ parts
    chosen = table("gaunt_series_back_index", lmax, int(bracket), dtype=torch.int64, device=v.device)
    return _by_degree(back, chosen, lead)


_FOURIER = _Grid(
    values=_fourier_values,
    coefficients=_fourier_coefficients,
    points=lambda degree, band: _angles(band) * _azimuths(degree),
    leading=0,
)

_GRIDS = {"grid": _GRID, "separable": _SEPARABLE, "fourier": _FOURIER}


# ----------------------------------------------------------------------------------------------- the contraction


class _Term(NamedTuple):
    """One result: which fields it multiplies (with repetition; a bracket's are two, in order) and where it goes."""

    factors: tuple[int, ...]
    lmax: int
    summed: tuple[int, ...]  # batch dimensions, counted from the front, over which it is summed


class _Form(NamedTuple):
    """What a form and all its derivatives have in common: the grid and what is integrated on it."""

    method: str
    degree: int
    bracket: bool


def common_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What shapes of equal length, known to be broadcastable, broadcast to; ``torch.broadcast_shapes`` takes 50 µs."""
    if all(shape == shapes[0] for shape in shapes):
        return tuple(shapes[0])
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True))


def _evaluate(form: _Form, fields: Sequence[Tensor], lmaxs: Sequence[int], terms: Sequence[_Term]) -> list[Tensor]:
    """The results of ``terms`` over fields (*lead, n) with equally many batch dimensions, which broadcast."""
    used = sorted({i for term in terms for i in term.factors})
    band = max(sum(lmaxs[i] for i in term.factors) for term in terms)
    lead = common_shape([fields[i].shape[:-1] for i in used])
    if 0 in lead:  # which an FFT refuses
        return [_empty(fields, term) for term in terms]
    if all(fields[i].shape[:-1] == lead for i in used) and not any(term.summed for term in terms):
        rows = [f.reshape(math.prod(lead), f.shape[-1]) if i in used else f for i, f in enumerate(fields)]
        results = _by_chunks(form, rows, lmaxs, terms, used, band)
        return [z.view(*lead, z.shape[-1]) for z in results]
    return _by_chunks(form, fields, lmaxs, terms, used, band)


def _empty(fields: Sequence[Tensor], term: _Term) -> Tensor:
    lead = common_shape([fields[i].shape[:-1] for i in term.factors])
    shape = [1 if dim in term.summed else size for dim, size in enumerate(lead)]
    return fields[term.factors[0]].new_zeros(*shape, _components(term.lmax))


def _by_chunks(form, fields, lmaxs, terms, used, band) -> list[Tensor]:
    lead = common_shape([fields[i].shape[:-1] for i in used])
    first = fields[used[0]]
    # A traced program has no number of chunks that holds for every batch.
    if torch.compiler.is_compiling() or not lead:
        return _at_once(form, fields, lmaxs, terms, used, band)
    width = _GRIDS[form.method].points(form.degree, band) * first.element_size()
    budget = CPU_BYTES if first.device.type == "cpu" else GPU_BYTES
    dim = max(range(len(lead)), key=lead.__getitem__)
    length = lead[dim]
    step = max(1, budget * length // max(1, width * math.prod(lead)))
    if step >= length:
        return _at_once(form, fields, lmaxs, terms, used, band)
    pieces = []
    for start in range(0, length, step):
        size = min(step, length - start)
        part = [f.narrow(dim, start, size) if i in used and f.shape[dim] != 1 else f for i, f in enumerate(fields)]
        pieces.append(_at_once(form, part, lmaxs, terms, used, band))
    results = []
    for term, parts in zip(terms, zip(*pieces, strict=True), strict=True):
        if dim in term.summed:
            results.append(torch.stack(parts).sum(0))
        elif all(fields[i].shape[dim] == 1 for i in term.factors):
            results.append(parts[0])
        else:
            results.append(torch.cat(parts, dim))
    return results


def _at_once(form, fields, lmaxs, terms, used, band) -> list[Tensor]:
    grid = _GRIDS[form.method]
    parts = (1, 2) if form.bracket else (0,)
    values = {i: [grid.values(fields[i], lmaxs[i], form.degree, band, part) for part in parts] for i in used}
    results = []
    for factors, lmax, summed in terms:
        if form.bracket:
            (a, b), (c, d) = (values[i] for i in factors)
            product = torch.addcmul(a * d, b, c, value=-1)
        else:
            product = values[factors[0]][0]
            for i in factors[1:]:
                product = product * values[i][0]
        if summed:
            product = product.sum([grid.leading + dim for dim in summed], keepdim=True)
        # Higher degrees than the factors reach are zero, and need not fit on the grid.
        reach = min(lmax, sum(lmaxs[i] for i in factors))
        z = grid.coefficients(product, reach, form.degree, band, form.bracket)
        results.append(z if reach == lmax else torch.nn.functional.pad(z, (0, _components(lmax) - _components(reach))))
    return results


class _Contraction(torch.autograd.Function):
    """One term of a form. Its derivatives are terms of the same form, one factor and the result exchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form: _Form, term: _Term, lmaxs: tuple[int, ...], *fields: Tensor) -> Tensor:
        (z,) = _evaluate(form, fields, lmaxs, (term,))
        return z

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.form, ctx.term, ctx.lmaxs, *fields = inputs
        ctx.save_for_backward(*fields)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        saved = ctx.saved_tensors  # once: a checkpoint unpacks a second time with an error
        fields, lmaxs = (*saved, upstream), (*ctx.lmaxs, ctx.term.lmax)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed and i in ctx.term.factors]
        terms = [_derivative(ctx.form, ctx.term, fields, lmaxs, i) for i in wanted]
        with no_autocast(upstream):
            if torch.is_grad_enabled():
                found = [_Contraction.apply(ctx.form, term, lmaxs, *fields) for term in terms]
            else:  # together, each field's values made once
                found = _evaluate(ctx.form, fields, lmaxs, terms)
        gradients: list[Tensor | None] = [None] * (3 + len(saved))
        for i, g in zip(wanted, found, strict=True):
            times = ctx.term.factors.count(i)
            gradients[3 + i] = (g if times == 1 else times * g).expand(fields[i].shape)
        return tuple(gradients)


def _derivative(form: _Form, term: _Term, fields: Sequence[Tensor], lmaxs: Sequence[int], i: int) -> _Term:
    """The derivative of ``term`` by one of its occurrences of field ``i``, the last field being the upstream one."""
    place = term.factors.index(i)
    # Rotated in turn, which is what a bracket allows: ∫ {X, Y} G = ∫ {Y, G} X = ∫ {G, X} Y.
    factors = (*term.factors[place + 1 :], len(fields) - 1, *term.factors[:place])
    lead = common_shape([fields[j].shape[:-1] for j in factors])
    summed = tuple(dim for dim, size in enumerate(lead) if fields[i].shape[dim] == 1 and size != 1)
    return _Term(factors, lmaxs[i], summed)


def contract(
    fields: Sequence[Tensor],
    lmaxs: Sequence[int],
    factors: Sequence[int],
    lmax_out: int,
    *,
    method: str,
    bracket: bool = False,
) -> Tensor:
    """Coefficients up to ``lmax_out`` of the product of signals, or of the Poisson bracket of two.

    Args:
        fields: coefficients (…, (lmax + 1)²), float32 or float64; batch dimensions broadcast.
        lmaxs: their degrees.
        factors: indices of the fields that are multiplied; (0, 0, 0) is the cube of the first. Two for a bracket.
        lmax_out: highest degree of the result.
        method: "grid", "separable" or "fourier".
        bracket: r·(∇X × ∇Y) instead of the product.

    Returns:
        (…, (lmax_out + 1)²). It can be differentiated any number of times, and keeps its arguments alone for that.
    """
    ndim = max(f.ndim for f in fields)
    fields = [f if f.ndim == ndim else f.reshape((1,) * (ndim - f.ndim) + f.shape) for f in fields]
    form = _Form(method, sum(lmaxs[i] for i in factors) + lmax_out, bracket)
    term = _Term(tuple(factors), lmax_out, ())
    if torch.compiler.is_compiling():  # which decides itself what is kept and what is made again
        return _evaluate(form, fields, lmaxs, (term,))[0]
    return _Contraction.apply(form, term, tuple(lmaxs), *fields)


# ------------------------------------------------------------------------------------------------- the cost model

# In multiply-adds of one large matrix product, a row: what a value of the separable grid costs besides the two products
# that make it (layouts, passes over memory, smaller products), and what a row costs on any grid. Fitted on one core of
# an AMD EPYC (AVX2, MKL, float32, 4096 rows, forward and backward) at L = 1 … 8, where it gives the fastest method but
# for ties.
POINT_COST, ROW_COST = 80, 350


def costs(lmaxs: Sequence[int], factors: Sequence[int], lmax_out: int, shared: int = 0) -> dict[str, float]:
    """What a row (one channel of one sample) costs by "grid" and by "separable", in multiply-adds.

    Fields that are ``shared`` by many channels come last and cost nothing.
    """
    degree = sum(lmaxs[i] for i in factors) + lmax_out
    rings, azimuths = _rings(degree), degree + 1
    degrees = (*lmaxs[: len(lmaxs) - shared], lmax_out)
    return {
        "grid": ROW_COST + 2 * grid_size(degree) * sum(_components(ell) for ell in degrees),
        "separable": ROW_COST
        + sum((2 * ell + 1) * rings * (ell + 1 + azimuths) for ell in degrees)
        + POINT_COST * rings * azimuths,
    }
