"""How far polynomial tensor attention is from exact attention: the polynomial's part, and that of rounding.

Both depend on the data through the largest logit, which the keys' largest channels and norms bound in O(n d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_choice, check_int
from .._tables import table
from .monomials import product_of

BASES = ("taylor", "chebyshev")
KEYS = 512  # keys in one product of the sums over keys: bounds memory, and the length over which rounding adds up


def _deviation(logit_bound: Tensor, degree: int, basis: str) -> Tensor:
    """2 tanh(ln(ρ) / 4), ρ the largest over the smallest p(x) / exp(x) on |x| <= logit_bound. float64."""
    m = logit_bound.double()
    log_power = (degree + 1) * torch.log(m)
    if basis == "taylor":
        # 1 - p(x) exp(-x) is the regularised incomplete gamma function P(g + 1, x), increasing in x for even g. At M it
        # is below 1; at -M it is -∫_0^M e^t t^g / g! dt, for which (1 - v)^g <= e^(-gv) gives the bound taken here.
        above = torch.exp(m + log_power - math.lgamma(degree + 1)) / (m + degree).clamp(min=degree + 1)
        low = torch.special.gammainc(torch.full_like(m, degree + 1), m)
        high = torch.special.gammaincc(torch.full_like(m, degree + 1), m)
        log_ratio = torch.log1p(above) + torch.where(low < 0.5, -torch.log1p(-low), -torch.log(high))
        return 2 * torch.tanh(log_ratio / 4) * (1 + 1e-12)
    # The remainder 2 Σ_{k>g} I_k(M), over the smallest exp, by I_k(M) <= (M/2)^k / k! exp(M² / (4k + 4)) and the
    # geometric series. Where it reaches 1, the polynomial may be zero or below and nothing bounds the quotient.
    first = log_power - (degree + 1) * math.log(2) - math.lgamma(degree + 2)
    tail = (1 - m / (2 * degree + 4)).clamp(min=1e-300)
    off = 2 * torch.exp(m + first + m * m / (4 * degree + 8)) / tail
    safe = off.clamp(max=1 - 1e-9)
    bound = 2 * torch.tanh((torch.log1p(safe) - torch.log1p(-safe)) / 4) * (1 + 1e-12)
    return torch.where(off < 1 - 1e-9, bound, torch.inf)


def tensor_attention_error_bound(logit_bound: float | Tensor, degree: int, *, basis: str = "taylor") -> float | Tensor:
    r"""How far the polynomial moves an output of attention at most, for values of at most 1, in exact arithmetic.

    .. math:: |\tilde O_{ic} - O_{ic}| \le 2 \tanh\left(\tfrac14 \ln\rho\right) \max_j |v^1_{jc}| \max_k |v^2_{kc}|,
        \qquad \rho = \frac{\max_{|x| \le M} p(x) e^{-x}}{\min_{|x| \le M} p(x) e^{-x}}

    The factor is the largest total variation by which weights within a ratio of ρ can differ after normalisation, so it
    is sharp in ρ, and never over 2. For the Taylor polynomial it is about M^(g+1) / (g+1)! where that is small. It
    holds for every order, mask and window.

    Args:
        logit_bound: M, the largest ``|logit|``, scale included; a number or a tensor.
        degree: g, even.
        basis: "taylor", or "chebyshev" for the Chebyshev series on [-M, M] (infinite where that may reach zero).

    Returns:
        The factor, a float or a float64 tensor, as ``logit_bound`` is.

    Raises:
        ValueError: an odd or negative degree, an unknown basis, a negative bound.

    Example:

        >>> from torchlayers.tensor_attention import tensor_attention_error_bound
        >>> round(tensor_attention_error_bound(1.0, 4), 4)
        0.013
    """
    check_polynomial(degree, basis)
    if isinstance(logit_bound, Tensor):
        return _deviation(logit_bound, degree, basis)
    if not logit_bound >= 0:
        raise ValueError(f"logit_bound must be at least 0, got {logit_bound!r}")
    return _deviation(torch.tensor(float(logit_bound), dtype=torch.float64), degree, basis).item()


def tensor_attention_logit_limit(tolerance: float, degree: int, *, basis: str = "taylor") -> float:
    """The largest logit bound whose :func:`tensor_attention_error_bound` is at most ``tolerance``: its inverse.

    Args:
        tolerance: accepted absolute error of an output for values of at most 1; over 0.
        degree, basis: as there.

    Returns:
        M, at most 64: scale included, as there.

    Raises:
        ValueError: a tolerance that is not over 0, an odd or negative degree, an unknown basis.
    """
    check_polynomial(degree, basis)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be over 0, got {tolerance!r}")
    low, high = 0.0, 64.0
    for _ in range(64):
        middle = (low + high) / 2
        if tensor_attention_error_bound(middle, degree, basis=basis) <= tolerance:
            low = middle
        else:
            high = middle
    return low


@dataclass
class Peaks:
    """What the bounds need to know of one set of keys and values; of two parts of a set it is the larger of each."""

    columns: Tensor  # (B, Hk, 1, d): largest |k| of each channel
    norm: Tensor  # (B, Hk, 1, 1): largest Euclidean norm of a key
    values: Tensor  # (B, Hk, 1, dv): largest |v| of each channel

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> Peaks:
        key, value = key.detach(), value.detach()
        norm = torch.linalg.vector_norm(key, dim=-1, keepdim=True).amax(-2, keepdim=True)
        return cls(key.abs().amax(-2, keepdim=True), norm, value.abs().amax(-2, keepdim=True))

    def joined(self, other: Peaks) -> Peaks:
        pairs = ((self.columns, other.columns), (self.norm, other.norm), (self.values, other.values))
        return Peaks(*(torch.maximum(a, b) for a, b in pairs))

    @property
    def scales(self) -> Tensor:
        """By which the channels of the keys are divided, and the queries' multiplied: powers of 2, so nothing is
        rounded, of the size of the largest key, so that monomials of keys are at most 1."""
        mantissa, _ = torch.frexp(self.columns)
        return torch.where(self.columns > 0, self.columns / mantissa, 1.0)


def logit_bounds(query: Tensor, peaks: Sequence[Peaks], scale: float) -> tuple[Tensor, Tensor]:
    """For each query a bound on its |logits|, and s Σ_c |q_c| Π_t max|k_t,c|. (B, Hk, N, d) to (B, Hk, N), float64.

    The bound is the least of Hölder's inequality with the maxima of keys' channels for all sets but none, one or two,
    for which the Euclidean norms stand.
    """
    q = query.detach().abs()
    d, sets = q.shape[-1], range(len(peaks))

    def weighted(*left_out: int) -> Tensor:
        return product_of([q, *(peaks[t].columns for t in sets if t not in left_out)])

    absolute = weighted().sum(-1)
    bound = absolute
    for t in sets:
        bound = torch.minimum(bound, torch.linalg.vector_norm(weighted(t), dim=-1) * peaks[t].norm[..., 0])
        for u in range(t):
            both = peaks[t].norm[..., 0] * peaks[u].norm[..., 0]
            bound = torch.minimum(bound, weighted(t, u).amax(-1) * both)
    rounded_up = abs(scale) * (1 + (2 * d + 16) * torch.finfo(q.dtype).eps)
    return bound.double() * rounded_up, absolute.double() * rounded_up


def chebyshev_interval(bound: Tensor) -> Tensor:
    """[-M, M] that the Chebyshev polynomial is made for: rounded up to a power of √2, so that it is locally constant in
    the data and gradients that take it for a constant are exact."""
    return torch.exp2(torch.ceil(2 * torch.log2(bound.clamp(min=2.0**-6))) / 2)


def bessel(x: Tensor, degree: int) -> Tensor:
    """The modified Bessel functions I_0 to I_degree, by their power series: (...) to (..., degree + 1)."""
    k = torch.arange(degree + 1, dtype=x.dtype, device=x.device)
    half = x[..., None] / 2
    series = torch.ones_like(half)
    for m in range(48, 0, -1):
        series = 1 + series * half * half / (m * (m + k))
    return series * torch.exp(k * torch.log(half) - torch.lgamma(k + 1))


def _unit_roundoffs(x: Tensor) -> tuple[float, float]:
    """Of arithmetic in the dtype of ``x``, and of the operands of its matrix products."""
    unit = torch.finfo(x.dtype).eps / 2
    if x.dtype == torch.float32:
        return unit, {"highest": unit, "high": 2.0**-11, "medium": 2.0**-8}[torch.get_float32_matmul_precision()]
    return unit, unit


def row_error_bound(
    query: Tensor, peaks: Sequence[Peaks], scale: float, degree: int, basis: str, drift: float
) -> Tensor:
    """The bound on the absolute error of each query's output: (B, Hk, N, d) to (B, Hk, N), float64.

    That of the polynomial, by :func:`tensor_attention_error_bound`, and that of rounding: each product of the formula
    carries a relative error of at most γ, counted from the lengths of the sums, and their magnitudes add up to at most
    ``largest / smallest`` of the denominator. ``drift`` counts the roundings in float64, see :func:`rounding_drift`.
    """
    bound, absolute = logit_bounds(query, peaks, scale)
    if basis == "taylor":
        deviation = _deviation(bound, degree, basis)
        largest = torch.ones_like(absolute)
        for t in range(degree, 0, -1):
            largest = 1 + largest * absolute / t
        smallest = torch.exp(-bound)
    else:
        interval = chebyshev_interval(bound)
        deviation = _deviation(interval, degree, basis)
        rows = table("tensor_attention_chebyshev", degree, device=query.device)
        powers = (absolute / interval)[..., None] ** torch.arange(degree + 1, device=query.device)
        largest = (bessel(interval, degree) @ rows.abs() * powers).sum(-1)
        smallest = torch.exp(-interval) / 2
        deviation = torch.where(deviation < 2 * math.tanh(math.log(3) / 4), deviation, torch.inf)  # off < 1/2
    unit, operand = _unit_roundoffs(query)
    sets, features = len(peaks), math.comb(query.shape[-1] + degree, degree)
    gamma = unit * (sets * (2 * degree + KEYS + 4) + degree * (sets + 6) + features + 128)
    gamma += 2 * (sets + 1) * operand + 2.0**-53 * drift
    spread = gamma * largest / smallest
    rounding = torch.where(spread < 1, 2 * spread / (1 - spread), torch.inf)
    values = product_of([p.values.double() for p in peaks]).amax(-1)
    # Values of 0 give an exact 0, whatever the bound on the weights.
    return torch.where(values > 0, (deviation + rounding) * values, 0.0)


def rounding_drift(keys: int, window: int | None) -> float:
    """Roundings of one set's float64 sums, in units of one key's share: keys that leave a window leave theirs."""
    return 4.0 * keys * (1 if window is None else min(window, keys) + 1)


def check_polynomial(degree: object, basis: object) -> None:
    if check_int("degree", degree, minimum=0) % 2:
        raise ValueError(
            f"degree must be even, got {degree}: a polynomial of odd degree turns negative, and weights with it"
        )
    check_choice("basis", basis, BASES)
