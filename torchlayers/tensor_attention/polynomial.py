r"""Near-linear tensor attention for bounded entries: exp is replaced by a polynomial, which factorises over the tuples.

With :math:`S_{ijk} = s \sum_c q_{ic} k^1_{jc} k^2_{kc}` and a polynomial :math:`p(x) = \sum_t c_t x^t` of even degree
g in place of exp, the multinomial theorem over multi-indices :math:`|\alpha| \le g` gives

.. math::
    p(S_{ijk}) = \sum_\alpha \varphi_\alpha(q_i)\, (k^1_j)^\alpha (k^2_k)^\alpha, \qquad
    \varphi_\alpha(q) = c_{|\alpha|} s^{|\alpha|} \frac{|\alpha|!}{\alpha!} q^\alpha, \qquad
    O_i = \frac{\sum_\alpha \varphi_\alpha(q_i)\, [\sum_j (k^1_j)^\alpha v^1_j] \circ [\sum_k (k^2_k)^\alpha v^2_k]}
               {\sum_\alpha \varphi_\alpha(q_i)\, [\sum_j (k^1_j)^\alpha] \, [\sum_k (k^2_k)^\alpha]}

in O(n r dv) for r = C(d + g, g) features, instead of O(n³ d). The allowed set of pairs is a product of one set of keys
each, so causal attention and windows only change which keys the two inner sums run over. With more than two sets of
keys there are more inner sums and nothing else (any order; order 2 is ordinary attention).

**Where it holds.** The error depends on the largest logit M alone (:func:`tensor_attention_error_bound`). With entries
bounded by B, M is up to s d B³: B³ for s = 1/d, but √d B³ for the usual s = d^(-1/2). At head_dim >= 32 only degree 2
has an affordable number of features, and at s = d^(-1/2) normalised queries and keys reach logits of 5 and more, where
it misses half of what attention adds to plain averaging. So use it with head_dim 8 to 16, ``scale=1/head_dim`` and a
capped gain on normalised queries and keys, and train through it:

======== ====== ======== ============================== ==============================
head_dim degree features logits for an error of 1e-3    gain for it, scale 1/head_dim
======== ====== ======== ============================== ==============================
8        4      495      0.62                           0.60
8        6      3003     1.16                           0.74
16       2      153      0.17                           0.35
16       4      4845     0.62                           0.53
======== ====== ======== ============================== ==============================

The error is absolute, for values of at most 1 (:func:`tensor_attention_logit_limit`); the gain g is that of
RMS-normalised queries and keys, whose logits are at most scale g³ head_dim^(3/2) whatever the data.

Sources: arXiv 2310.04064 (the algorithm, and why no near-linear one exists for larger entries), 2405.16411 (gradients).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._attention import Window, allowed, check_padding_mask, no_autocast, normalize_window
from .._checks import check_choice, check_dtype, check_int, check_ndim, check_same_device, check_size
from .._tables import register_table, table

__all__ = [
    "BASES",
    "PolynomialState",
    "certified",
    "polynomial_nth_order_attention",
    "polynomial_tensor_attention",
    "tensor_attention_error_bound",
    "tensor_attention_logit_limit",
]

BASES = ("taylor", "chebyshev")
_MAX_FEATURES = 2**20
_KEYS = 512  # keys in one product of the sums over keys: bounds memory, and the length over which rounding adds up
_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # features of queries alive at once, where all queries see the same keys


def _product(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.mul, tensors)


# Monomials


def _monomials(x: Tensor, degree: int) -> Tensor:
    """All monomials of up to ``degree`` in the d entries of each column: (..., d, n) to (..., C(d + degree, d), n).

    Ordered by degree, and within a degree by the first variable: the monomials of degree t with first variable c are
    x_c times those of degree t - 1 in the variables from c on, which stand together at that block's end. Slices, not
    gathers: their gradient is deterministic.
    """
    d = x.shape[-2]
    block = torch.ones_like(x[..., :1, :])
    blocks = [block]
    for t in range(1, degree + 1):
        size = block.shape[-2]
        block = torch.cat(
            [x[..., c : c + 1, :] * block[..., size - math.comb(d - c + t - 2, t - 1) :, :] for c in range(d)], -2
        )
        blocks.append(block)
    return torch.cat(blocks, -2)


def _exponents(d: int, degree: int) -> list[tuple[int, ...]]:
    """The multi-indices in the order of :func:`_monomials`, each as the sorted tuple of its variables."""
    block: list[tuple[int, ...]] = [()]
    found = list(block)
    for _ in range(degree):
        block = [(c, *rest) for c in range(d) for rest in block if not rest or rest[0] >= c]
        found += block
    return found


@register_table("tensor_attention_monomials", shape=lambda d, degree: (3, math.comb(d + degree, degree)))
def _monomial_table(d: int, degree: int) -> Tensor:
    """For each monomial α: 1/α!, |α|!/α! and |α|."""
    rows = []
    for variables in _exponents(d, degree):
        factorial = math.prod(math.factorial(variables.count(c)) for c in set(variables))
        rows.append((1 / factorial, math.factorial(len(variables)) / factorial, len(variables)))
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


@register_table("tensor_attention_chebyshev", shape=lambda degree: (degree + 1, degree + 1))
def _chebyshev_table(degree: int) -> Tensor:
    """Row k holds the coefficients of T_k, those of k >= 1 doubled as in exp(M y) = I_0(M) + 2 Σ_k I_k(M) T_k(y)."""
    rows = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
    rows[0, 0] = 1.0
    for k in range(1, degree + 1):
        rows[k, 1:] = rows[k - 1, :-1] * (1 if k == 1 else 2)
        if k > 1:
            rows[k] -= rows[k - 2]
    rows[1:] *= 2
    return rows


# How far the polynomial is from exp


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
        logit_bound: M, the largest |logit|, scale included; a number or a tensor.
        degree: g, even.
        basis: "taylor", or "chebyshev" for the Chebyshev series on [-M, M] (infinite where that may reach zero).

    Returns:
        The factor, a float or a float64 tensor, as ``logit_bound`` is.

    Raises:
        ValueError: an odd or negative degree, an unknown basis, a negative bound.

    Example::

        >>> from torchlayers.tensor_attention import tensor_attention_error_bound
        >>> round(tensor_attention_error_bound(1.0, 4), 4)
        0.0101
    """
    _check_polynomial(degree, basis)
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

    Raises:
        ValueError: a tolerance that is not over 0, an odd or negative degree, an unknown basis.
    """
    _check_polynomial(degree, basis)
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
class _Peaks:
    """What the bounds need to know of one set of keys and values; of two parts of a set it is the larger of each."""

    columns: Tensor  # (B, Hk, 1, d): largest |k| of each channel
    norm: Tensor  # (B, Hk, 1, 1): largest Euclidean norm of a key
    values: Tensor  # (B, Hk, 1, dv): largest |v| of each channel

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> _Peaks:
        key, value = key.detach(), value.detach()
        norm = torch.linalg.vector_norm(key, dim=-1, keepdim=True).amax(-2, keepdim=True)
        return cls(key.abs().amax(-2, keepdim=True), norm, value.abs().amax(-2, keepdim=True))

    def joined(self, other: _Peaks) -> _Peaks:
        pairs = ((self.columns, other.columns), (self.norm, other.norm), (self.values, other.values))
        return _Peaks(*(torch.maximum(a, b) for a, b in pairs))

    @property
    def scales(self) -> Tensor:
        """By which the channels of the keys are divided, and the queries' multiplied: powers of 2, so nothing is
        rounded, of the size of the largest key, so that monomials of keys are at most 1."""
        mantissa, _ = torch.frexp(self.columns)
        return torch.where(self.columns > 0, self.columns / mantissa, 1.0)


def _logit_bounds(query: Tensor, peaks: Sequence[_Peaks], scale: float) -> tuple[Tensor, Tensor]:
    """For each query a bound on its |logits|, and s Σ_c |q_c| Π_t max|k_t,c|. (B, Hk, N, d) to (B, Hk, N), float64.

    The bound is the least of Hölder's inequality with the maxima of keys' channels for all sets but none, one or two,
    for which the Euclidean norms stand.
    """
    q = query.detach().abs()
    d, sets = q.shape[-1], range(len(peaks))

    def weighted(*left_out: int) -> Tensor:
        return _product([q, *(peaks[t].columns for t in sets if t not in left_out)])

    absolute = weighted().sum(-1)
    bound = absolute
    for t in sets:
        bound = torch.minimum(bound, torch.linalg.vector_norm(weighted(t), dim=-1) * peaks[t].norm[..., 0])
        for u in range(t):
            both = peaks[t].norm[..., 0] * peaks[u].norm[..., 0]
            bound = torch.minimum(bound, weighted(t, u).amax(-1) * both)
    rounded_up = abs(scale) * (1 + (2 * d + 16) * torch.finfo(q.dtype).eps)
    return bound.double() * rounded_up, absolute.double() * rounded_up


def _interval(bound: Tensor) -> Tensor:
    """[-M, M] that the Chebyshev polynomial is made for: rounded up to a power of √2, so that it is locally constant in
    the data and gradients that take it for a constant are exact."""
    return torch.exp2(torch.ceil(2 * torch.log2(bound.clamp(min=2.0**-6))) / 2)


def _bessel(x: Tensor, degree: int) -> Tensor:
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


def _error_bound(query: Tensor, peaks: Sequence[_Peaks], scale: float, degree: int, basis: str, drift: float) -> Tensor:
    """The bound on the absolute error of each query's output: (B, Hk, N, d) to (B, Hk, N), float64.

    That of the polynomial, by :func:`tensor_attention_error_bound`, and that of rounding: each product of the formula
    carries a relative error of at most γ, counted from the lengths of the sums, and their magnitudes add up to at most
    ``largest / smallest`` of the denominator. ``drift`` counts the roundings in float64, see :func:`_drift`.
    """
    bound, absolute = _logit_bounds(query, peaks, scale)
    if basis == "taylor":
        deviation = _deviation(bound, degree, basis)
        largest = torch.ones_like(absolute)
        for t in range(degree, 0, -1):
            largest = 1 + largest * absolute / t
        smallest = torch.exp(-bound)
    else:
        interval = _interval(bound)
        deviation = _deviation(interval, degree, basis)
        rows = table("tensor_attention_chebyshev", degree, device=query.device)
        powers = (absolute / interval)[..., None] ** torch.arange(degree + 1, device=query.device)
        largest = (_bessel(interval, degree) @ rows.abs() * powers).sum(-1)
        smallest = torch.exp(-interval) / 2
        deviation = torch.where(deviation < 2 * math.tanh(math.log(3) / 4), deviation, torch.inf)  # off < 1/2
    unit, operand = _unit_roundoffs(query)
    sets, features = len(peaks), math.comb(query.shape[-1] + degree, degree)
    gamma = unit * (sets * (2 * degree + _KEYS + 4) + degree * (sets + 6) + features + 128)
    gamma += 2 * (sets + 1) * operand + 2.0**-53 * drift
    spread = gamma * largest / smallest
    rounding = torch.where(spread < 1, 2 * spread / (1 - spread), torch.inf)
    values = _product([p.values.double() for p in peaks]).amax(-1)
    # Values of 0 give an exact 0, whatever the bound on the weights.
    return torch.where(values > 0, (deviation + rounding) * values, 0.0)


def _drift(keys: int, window: int | None) -> float:
    """Roundings of one set's float64 sums, in units of one key's share: keys that leave a window leave theirs."""
    return 4.0 * keys * (1 if window is None else min(window, keys) + 1)


# The sums over keys, and their use by the queries


def _moment(monomials: Tensor, value: Tensor, wide: bool) -> Tensor:
    """Σ_j v_j (k_j)^α for every channel of v and every α: (B, Hk, r, n) and (B, Hk, c, n) to (B, Hk, c, r).

    ``wide`` sums in float64. Without, a key that leaves in other company than it came in would leave rounding behind.
    """
    return value.double() @ monomials.double().mT if wide else value @ monomials.mT


def _recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """``function(*tensors)``, of which the backward pass keeps the tensors alone."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _moments(key: Tensor, value: Tensor, degree: int, *, wide: bool) -> Tensor:
    """:func:`_moment` over all keys, in parts that are summed in float64."""

    def moment(key: Tensor, value: Tensor) -> Tensor:
        return _moment(_monomials(key, degree), value, wide)

    total = key.new_zeros(*value.shape[:-1], math.comb(key.shape[-2] + degree, degree), dtype=torch.float64)
    # A few keys are not worth a second computation.
    apply = moment if key.shape[-1] <= _KEYS // 2 else functools.partial(_recomputed, moment)
    # Split, not sliced: the gradient of each slice is as long as the whole, which adds up to a square.
    for k, v in zip(key.split(_KEYS, -1), value.split(_KEYS, -1), strict=True):
        total = total + apply(k, v)
    return total


def _features(query: Tensor, weights: Tensor, degree: int) -> Tensor:
    """φ(q): (B, Hk, d, N) to (B, Hk, r, N). ``weights`` are (r, 1), or (B, Hk, g + 1, N) coefficients of each query."""
    d = query.shape[-2]
    if weights.ndim == 4:
        numbers = table("tensor_attention_monomials", d, degree, dtype=query.dtype, device=query.device)
        places = table("tensor_attention_monomials", d, degree, dtype=torch.int64, device=query.device)[2]
        weights = weights.index_select(-2, places) * numbers[1][:, None]
    return _monomials(query, degree) * weights


def _quotient(sums: Tensor, count: Tensor) -> Tensor:
    """Numerators over the denominator, the last entry of axis -2; 0 where no tuple is allowed (count 0)."""
    some = count > 0.5
    return torch.where(some, sums[..., :-1, :] / torch.where(some, sums[..., -1:, :], 1.0), 0.0)


def _read(query: Tensor, weights: Tensor, state: Tensor, degree: int) -> Tensor:
    """Outputs (B, Hk, dv, N) of queries (B, Hk, d, N) that all see the same keys, of which ``state`` (B, Hk, dv+1, r)
    holds the product of the moments."""
    return _quotient(state @ _features(query, weights, degree), state[..., -1:, :1])


def _fixed(number: int) -> int:
    """``number`` as a plain int also where a compiler would keep it symbolic: the loops over blocks depend on it."""
    return range(number).stop


@dataclass(frozen=True)
class _Plan:
    """Which keys of one set a block of queries sees: all of them [low, high), and each some of the ranges ``edges``."""

    low: int
    high: int
    edges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, window: Window, first: int, last: int, keys: int) -> _Plan:
        """For queries at positions ``first`` to ``last``, counted from the set's first key."""

        def clipped(x: int) -> int:
            return min(max(x, 0), keys)

        left, right = window
        begin = 0 if left < 0 else clipped(first - left)
        end = keys if right < 0 else clipped(last + right + 1)
        low = 0 if left < 0 else clipped(last - left)
        high = keys if right < 0 else clipped(first + right + 1)
        if low >= high:
            return cls(begin, begin, ((begin, end),) if begin < end else ())
        return cls(low, high, tuple(e for e in ((begin, low), (high, end)) if e[0] < e[1]))


def _changes(old: _Plan, new: _Plan) -> tuple[bool, list[tuple[int, int, int]]]:
    """How moments over [old.low, old.high) become those over [new.low, new.high): whether they are dropped first, and
    which ranges of keys come (+1) and go (-1). The new range is empty, or neither end moves back."""
    if new.low >= old.high or new.low == new.high:
        return True, [(new.low, new.high, 1)] if new.low < new.high else []
    ranges = [(old.high, new.high, 1), (old.low, new.low, -1)]
    return False, [r for r in ranges if r[0] < r[1]]


class _Span:
    """Keys of one set that a segment of queries touches, in stretches of neighbours, with their monomials.

    ``ranges`` are those that will be asked for. ``keys`` and ``values`` are (B, Hk, c, n) in pieces of ``size``, which
    are joined where needed: the gradient of a slice of the whole would be as long as the whole.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        size: int,
        degree: int,
    ):
        merged: list[tuple[int, int]] = []
        for low, high in sorted(ranges, key=operator.itemgetter(0)):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        self.stretches = []
        for low, high in merged:
            first = low // size
            whole = slice(first, (high - 1) // size + 1)
            cut = slice(low - first * size, high - first * size)
            key, value = (torch.cat(list(pieces[whole]), -1)[..., cut] for pieces in (keys, values))
            self.stretches.append((low, high, _monomials(key, degree), value))

    def get(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Monomials and values of the keys ``low`` to ``high``, a part of one of the ranges."""
        for begin, end, monomials, value in self.stretches:
            if begin <= low and high <= end:
                return monomials[..., low - begin : high - begin], value[..., low - begin : high - begin]
        raise IndexError(f"no stretch holds the keys {low} to {high}")


def _banded(
    query: Tensor,
    weights: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    windows: Sequence[Window],
    offsets: Sequence[int],
    degree: int,
) -> Tensor:
    """Outputs (B, Hk, dv, G, n) where each query sees its own keys. ``query`` is (B, Hk, d, G, n).

    Blocks of queries in order: what all queries of a block see comes from moments that are carried along, gaining the
    keys that enter and losing those that leave; the few keys at the edges are added for each query by a product with
    their mask. ``offsets`` are the position of query 0, then that of key 0 of each set.
    """
    sets, per_query = range(len(keys)), weights.ndim == 5
    n, lengths, offsets = _fixed(query.shape[-1]), [_fixed(k.shape[-1]) for k in keys], [_fixed(o) for o in offsets]
    windows = [(_fixed(left), _fixed(right)) for left, right in windows]
    block = 128 if query.is_cuda else 32
    # A segment is recomputed as a whole in the backward pass, from the moments at its start: about √n in length, so
    # that all starts together take no more memory than one segment.
    segment = max(2 * block, 2 ** round(math.log2(n) / 2))
    key_pieces, value_pieces = ([x.split(segment, -1) for x in xs] for xs in (keys, values))

    def plans(a: int) -> list[_Plan]:
        first, last = offsets[0] + a, offsets[0] + min(a + block, n) - 1
        places = zip(windows, offsets[1:], lengths, strict=True)
        return [_Plan.of(w, first - o, last - o, length) for w, o, length in places]

    def segment_of(begin: int, end: int, before: list[_Plan]) -> Callable[..., tuple[Tensor, ...]]:
        """What computes the outputs of the queries ``begin`` to ``end``, and the moments after them."""
        steps = []
        ranges: list[list[tuple[int, int]]] = [[] for _ in sets]
        for a in range(begin, end, block):
            here = plans(a)
            changes = [_changes(before[t], here[t]) for t in sets]
            for t in sets:
                ranges[t] += [*here[t].edges, *((low, high) for low, high, _ in changes[t][1])]
            steps.append((a - begin, min(a + block, end) - begin, here, changes))
            before = here

        def attend(query: Tensor, weights: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            moments, outputs = list(states), []
            spans = [_Span(ranges[t], key_pieces[t], value_pieces[t], segment, degree) for t in sets]
            features = _features(query.flatten(-2), weights.flatten(-2) if per_query else weights, degree)
            features = features.unflatten(-1, query.shape[-2:])
            for a, b, here, changes in steps:
                seen = []
                for t in sets:
                    dropped, moves = changes[t]
                    if dropped:
                        moments[t] = torch.zeros_like(moments[t])
                    for low, high, sign in moves:
                        moments[t] = moments[t] + sign * _moment(*spans[t].get(low, high), wide=True)
                    total = moments[t].to(query.dtype)[:, :, None]  # (B, Hk, queries, dv + 1, r)
                    position = torch.arange(a, b, device=query.device) + (begin + offsets[0] - offsets[1 + t])
                    for low, high in here[t].edges:
                        ok = allowed(position, torch.arange(low, high, device=query.device), windows[t])
                        monomials, value = spans[t].get(low, high)
                        masked = (value.unsqueeze(2) * ok[:, None].to(query.dtype)).flatten(2, 3)
                        total = total + (masked @ monomials.mT).unflatten(2, (b - a, -1))
                    seen.append(total)
                product = _product(seen)
                part = features[..., a:b].permute(0, 1, 4, 2, 3)  # (B, Hk, queries, r, G)
                outputs.append(_quotient(product @ part, product[..., -1:, :1]).permute(0, 1, 3, 4, 2))
            return torch.cat(outputs, -1), *moments

        return attend

    before = plans(0)
    states = [
        _moments(keys[t][..., p.low : p.high], values[t][..., p.low : p.high], degree, wide=True)
        for t, p in enumerate(before)
    ]
    outputs = []
    for index, part in enumerate(query.split(segment, -1)):
        begin = index * segment
        end = min(begin + segment, n)
        weight = weights[..., begin:end] if per_query else weights
        output, *states = _recomputed(segment_of(begin, end, before), part, weight, *states)
        before = plans(begin + (end - begin - 1) // block * block)
        outputs.append(output)
    return torch.cat(outputs, -1)


# The functions


def _check_polynomial(degree: object, basis: object) -> None:
    if check_int("degree", degree, minimum=0) % 2:
        raise ValueError(
            f"degree must be even, got {degree}: a polynomial of odd degree turns negative, and weights with it"
        )
    check_choice("basis", basis, BASES)


def _check_features(head_dim: int, degree: int) -> None:
    features = math.comb(head_dim + degree, degree)
    if features > _MAX_FEATURES:
        raise ValueError(
            f"degree must give at most {_MAX_FEATURES} features, got degree {degree} with head_dim {head_dim}: "
            f"{features}; take a smaller degree or head_dim"
        )


def _check_keys(
    query: object,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    names: tuple[str, str, str],
) -> None:
    """All tensors fit each other; ``names`` are the patterns of the arguments' names, as ``"key{}"``."""
    if not keys or len(keys) != len(values):
        raise ValueError(f"keys and values must be of the same number, at least 1, got {len(keys)} and {len(values)}")
    if len(masks) != len(keys):
        raise ValueError(f"key_padding_masks must have {len(keys)} entries, one a set of keys, got {len(masks)}")
    reference_name, reference = ("query", query) if query is not None else (names[0].format(1), keys[0])
    check_ndim(reference_name, reference, 4, "(batch, heads, n, head_dim)")
    assert isinstance(reference, Tensor)
    check_dtype(reference_name, reference, kind="real")
    mixed = torch.is_autocast_enabled(reference.device.type) if reference.device.type != "meta" else False
    if reference.shape[-1] == 0:
        raise ValueError(f"{reference_name} must have a head_dim of at least 1, got shape {tuple(reference.shape)}")
    for t, (key, value, mask) in enumerate(zip(keys, values, masks, strict=True), 1):
        k_name, v_name, m_name = (name.format(t) for name in names)
        check_ndim(k_name, key, 4, "(batch, kv heads, n, head_dim)")
        check_ndim(v_name, value, 4, "(batch, kv heads, n, value dim)")
        for name, x in ((k_name, key), (v_name, value)):
            check_dtype(name, x, kind="real")
            if x.dtype != reference.dtype and not mixed:
                raise TypeError(f"{name} must have the dtype of {reference_name} ({reference.dtype}), got {x.dtype}")
            check_same_device(name, x, reference_name, reference)
            check_size(name, x, 0, reference.shape[0], "batch")
            check_size(name, x, 1, keys[0].shape[1], "kv heads")
        check_size(k_name, key, 3, reference.shape[-1], "head_dim")
        check_size(v_name, value, 2, key.shape[2], "keys")
        check_size(v_name, value, 3, values[0].shape[-1], "value dim")
        check_padding_mask(m_name, mask, key.shape[0], key.shape[2], k_name, key)


def _groups(query: Tensor, kv_heads: int, enable_gqa: bool) -> int:
    heads = query.shape[1]
    if heads == kv_heads:
        return 1
    if not enable_gqa:
        raise ValueError(f"query must have the heads of the keys, {kv_heads}, got {heads} (enable_gqa groups them)")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query must have a multiple of the keys' {kv_heads} heads, got {heads}")
    return heads // kv_heads


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kept(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x`` (B, Hk, n, c) in ``dtype``, with zeros where padding is, whatever stood there."""
    x = x.to(dtype)
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)


def _augmented(value: Tensor, mask: Tensor | None) -> Tensor:
    """Values (B, Hk, n, dv) as (B, Hk, dv + 1, n), with ones as the last channel: the denominator's."""
    ones = (
        torch.ones_like(value[..., :1]) if mask is None else mask[:, None, :, None].to(value).expand_as(value[..., :1])
    )
    return torch.cat([value, ones], -1).mT


def _weights(query: Tensor, degree: int, basis: str, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """``query`` (B, Hk, N, d), scaled for the basis, and the weights of its features (see :func:`_features`)."""
    if basis == "taylor":
        numbers = table("tensor_attention_monomials", query.shape[-1], degree, dtype=query.dtype, device=query.device)
        return query, numbers[0][:, None]
    assert bound is not None
    interval = _interval(bound)
    coefficients = _bessel(interval, degree) @ table("tensor_attention_chebyshev", degree, device=query.device)
    return query / interval[..., None].to(query.dtype), coefficients.mT.to(query.dtype)


def _output_dtype(query: Tensor) -> torch.dtype:
    device = query.device.type
    if query.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return query.dtype


def _attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    windows: Sequence[Window],
    offsets: Sequence[int],
    degree: int,
    scale: float,
    basis: str,
    groups: int,
    with_bound: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, heads, n, d = query.shape
    dv, kv_heads = values[0].shape[-1], heads // groups
    out_dtype, dtype = _output_dtype(query), _working_dtype(query)
    if 0 in query.shape or dv == 0 or any(0 in key.shape for key in keys):
        # Nothing to attend to, or nobody to attend: zeros that hang on the graph of every input, by sums of nothing.
        graph = sum(x[:, :, :0].sum().to(out_dtype) for x in (query, *keys, *values))
        empty = query.new_zeros(batch, heads, n, dv, dtype=out_dtype) + graph
        return empty, query.new_zeros(batch, heads, n, dtype=torch.float64) if with_bound else None
    with no_autocast(query):
        q = query.to(dtype).reshape(batch, kv_heads, groups * n, d)
        keys = [_kept(x, mask, dtype) for x, mask in zip(keys, masks, strict=True)]
        values = [_kept(x, mask, dtype) for x, mask in zip(values, masks, strict=True)]
        with torch.no_grad():
            peaks = [_Peaks.of(key, value) for key, value in zip(keys, values, strict=True)]
            drift = sum(
                _drift(k.shape[2], None if w[0] < 0 else k.shape[2]) for k, w in zip(keys, windows, strict=True)
            )
            error = _error_bound(q, peaks, scale, degree, basis, drift) if with_bound else None
            interval = _logit_bounds(q, peaks, scale)[0] if basis == "chebyshev" else None
        q, weights = _weights(q * (scale * _product([p.scales for p in peaks])), degree, basis, interval)
        q = q.mT  # (B, Hk, d, G n)
        keys = [(key / p.scales).mT for key, p in zip(keys, peaks, strict=True)]
        values = [_augmented(value, mask) for value, mask in zip(values, masks, strict=True)]
        per_query = weights.ndim == 4
        if all(window == (-1, -1) for window in windows):
            pairs = zip(keys, values, strict=True)
            sums = [_moments(k, v, degree, wide=False).to(dtype) for k, v in pairs]
            state = _product(sums)
            elements = _ELEMENTS["cuda" if q.is_cuda else "cpu"]
            step = max(64, elements // max(1, batch * kv_heads * state.shape[-1]))
            read = functools.partial(_read, degree=degree)
            outputs = []
            for index, part in enumerate(q.split(step, -1)):
                weight = weights[..., index * step : (index + 1) * step] if per_query else weights
                outputs.append(_recomputed(read, part, weight, state))
            out = torch.cat(outputs, -1)
        else:
            grouped = weights.unflatten(-1, (groups, n)) if per_query else weights
            out = _banded(q.unflatten(-1, (groups, n)), grouped, keys, values, windows, offsets, degree).flatten(-2)
        out = out.mT.reshape(batch, heads, n, dv).to(out_dtype)
    return out, None if error is None else error.reshape(batch, heads, n)


def polynomial_nth_order_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    degree: int = 4,
    scale: float | None = None,
    is_causal: bool = False,
    windows: Sequence[int | tuple[int, int] | None] | None = None,
    key_padding_masks: Sequence[Tensor | None] | None = None,
    enable_gqa: bool = False,
    q_offset: int = 0,
    k_offsets: Sequence[int] | None = None,
    basis: str = "taylor",
    return_error_bound: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Near-linear attention of any order m = len(keys) + 1, see :func:`polynomial_tensor_attention`, which is order 3.

    A softmax over all tuples (j_2, ..., j_m), one entry from each set of keys, of Σ_c q_c Π_t k_t,c, exp replaced by a
    polynomial; the values of a tuple are multiplied. Order 2 is ordinary attention. Costs O(n r dv) for each set.

    Args:
        query: (B, Hq, nq, d).
        keys, values: m - 1 tensors (B, Hk, n_t, d) and (B, Hk, n_t, dv).
        windows, key_padding_masks, k_offsets: m - 1 entries, or None for none.

    Other arguments, results and errors are those of :func:`polynomial_tensor_attention`.
    """
    keys, values, sets = list(keys), list(values), len(keys)
    masks = [None] * sets if key_padding_masks is None else list(key_padding_masks)
    _check_keys(query, keys, values, masks, ("keys[{}]", "values[{}]", "key_padding_masks[{}]"))
    for name, given in (("windows", windows), ("k_offsets", k_offsets)):
        if given is not None and len(given) != sets:
            raise ValueError(f"{name} must have {sets} entries, one a set of keys, got {len(given)}")
    spans = [
        normalize_window(f"windows[{t}]", window, is_causal)
        for t, window in enumerate([None] * sets if windows is None else windows)
    ]
    return _checked_attention(
        query,
        keys,
        values,
        masks,
        spans,
        [q_offset, *([0] * sets if k_offsets is None else k_offsets)],
        degree,
        scale,
        basis,
        enable_gqa,
        return_error_bound,
    )


def _checked_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    windows: Sequence[Window],
    offsets: Sequence[int],
    degree: int,
    scale: float | None,
    basis: str,
    enable_gqa: bool,
    return_error_bound: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    _check_polynomial(degree, basis)
    _check_features(query.shape[-1], degree)
    groups = _groups(query, keys[0].shape[1], enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, error = _attention(
        query, keys, values, masks, windows, offsets, degree, scale, basis, groups, return_error_bound
    )
    return out if error is None else (out, error)


def polynomial_tensor_attention(
    query: Tensor,
    key1: Tensor,
    key2: Tensor,
    value1: Tensor,
    value2: Tensor,
    *,
    degree: int = 4,
    scale: float | None = None,
    is_causal: bool = False,
    window1: int | tuple[int, int] | None = None,
    window2: int | tuple[int, int] | None = None,
    key_padding_mask1: Tensor | None = None,
    key_padding_mask2: Tensor | None = None,
    enable_gqa: bool = False,
    q_offset: int = 0,
    k1_offset: int = 0,
    k2_offset: int = 0,
    basis: str = "taylor",
    return_error_bound: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Tensor attention (trilinear form) in near-linear time, with a polynomial in place of exp.

    .. math:: O_{ic} = \frac{\sum_{jk} p(S_{ijk})\, v^1_{jc} v^2_{kc}}{\sum_{jk} p(S_{ijk})}, \qquad
        S_{ijk} = s \sum_c q_{ic} k^1_{jc} k^2_{kc}, \qquad p \approx \exp

    over the allowed pairs (j, k), in time O(n r dv) with r = C(d + degree, degree) features, and memory O(n (d + dv))
    plus O(√n r dv) for causal and windowed attention; forward and backward. It is accurate where logits are small, see
    :mod:`torchlayers.tensor_attention.polynomial` and ``return_error_bound``: use ``scale=1 / head_dim``.

    Args:
        query: (B, Hq, nq, d), floating point. float16, bfloat16 and float32 are computed in float32 (autocast is off
            inside), float64 in float64.
        key1, value1: (B, Hk, n1, d) and (B, Hk, n1, dv).
        key2, value2: (B, Hk, n2, d) and (B, Hk, n2, dv).
        degree: of the polynomial, even: one of odd degree turns negative.
        scale: s, by default d^(-1/2) as for :func:`tensor_attention`.
        is_causal: keys at positions after the query's are not seen.
        window1, window2: of the two sets of keys: w for i - w < j <= i where causal and |i - j| < w otherwise, or
            (left, right), -1 unlimited.
        key_padding_mask1, key_padding_mask2: (B, n1) and (B, n2), bool, True = keep.
        enable_gqa: Hq may be a multiple of Hk.
        q_offset, k1_offset, k2_offset: positions of the first query and key of each set.
        basis: "taylor" (exp's Taylor polynomial: positive, the same for all data), or "chebyshev" (exp's
            Chebyshev series on [-M, M], M each query's bound on its logits rounded up to a power of √2: better for
            high degrees and logits near M, worse for low ones. M sees all keys, later ones too).
        return_error_bound: also return a bound on the error.

    Returns:
        The output (B, Hq, nq, dv) in the dtype of ``query``; with nothing allowed a row is 0. With
        ``return_error_bound`` also a float64 tensor (B, Hq, nq): no entry of that row is further from exact attention
        than this, in absolute terms. It covers the polynomial and the rounding of the arithmetic (that of a half
        precision output's last step excepted), from the logits' bound that the data have, found in O(n d).

    Raises:
        TypeError: no floating-point tensors, dtypes that differ (under autocast they may), a mask that is not bool.
        ValueError: shapes or devices that do not fit, an odd degree, too many features, an unknown basis, a window
            below 1.

    ``torch.compile`` traces it in full; the loops over blocks of keys and queries are unrolled.

    Source: arXiv 2310.04064, section 4; the bound is :func:`tensor_attention_error_bound`'s.

    Example::

        >>> import torch
        >>> from torchlayers.tensor_attention import polynomial_tensor_attention
        >>> q, k1, k2, v1, v2 = torch.rand(5, 1, 2, 100, 8).unbind()
        >>> out, error = polynomial_tensor_attention(q, k1, k2, v1, v2, scale=1 / 8, return_error_bound=True)
        >>> out.shape, error.shape
        (torch.Size([1, 2, 100, 8]), torch.Size([1, 2, 100]))
    """
    masks = [key_padding_mask1, key_padding_mask2]
    _check_keys(query, [key1, key2], [value1, value2], masks, ("key{}", "value{}", "key_padding_mask{}"))
    spans = [normalize_window("window1", window1, is_causal), normalize_window("window2", window2, is_causal)]
    return _checked_attention(
        query,
        [key1, key2],
        [value1, value2],
        masks,
        spans,
        [q_offset, k1_offset, k2_offset],
        degree,
        scale,
        basis,
        enable_gqa,
        return_error_bound,
    )


def certified(
    query: Tensor,
    key1: Tensor,
    key2: Tensor,
    value1: Tensor,
    value2: Tensor,
    *,
    degree: int = 4,
    scale: float | None = None,
    tolerance: float = 1e-3,
    basis: str = "taylor",
    key_padding_mask1: Tensor | None = None,
    key_padding_mask2: Tensor | None = None,
) -> bool:
    """Whether :func:`polynomial_tensor_attention` of these tensors is certain to be within ``tolerance`` of exact.

    ``tolerance`` is absolute, for every entry of the output. Costs O(n d), and waits for the device: the answer is
    needed in Python. ``query`` may have a multiple of the keys' heads. Too many features count as not certified.

    Raises:
        RuntimeError: under ``torch.compile``, where there are no data to decide from.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "approx='auto' decides from the data and cannot be compiled: choose approx='polynomial' or approx=None, "
            "or a module, which decides at construction"
        )
    _check_polynomial(degree, basis)
    d = query.shape[-1]
    if math.comb(d + degree, degree) > _MAX_FEATURES:
        return False
    if 0 in query.shape or 0 in value1.shape or 0 in value2.shape:
        return True
    dtype, groups = _working_dtype(query), _groups(query, key1.shape[1], True)
    scale = d**-0.5 if scale is None else scale
    with torch.no_grad(), no_autocast(query):
        q = query.to(dtype).reshape(query.shape[0], key1.shape[1], groups * query.shape[2], d)
        peaks = [
            _Peaks.of(_kept(key, mask, dtype), _kept(value, mask, dtype))
            for key, value, mask in ((key1, value1, key_padding_mask1), (key2, value2, key_padding_mask2))
        ]
        drift = sum(_drift(key.shape[2], key.shape[2]) for key in (key1, key2))
        return bool((_error_bound(q, peaks, scale, degree, basis, drift) <= tolerance).all())


class PolynomialState:
    """The keys and values of polynomial attention so far, in constant size: what a KV cache is to decoding.

    For each set of keys it holds the (dv + 1) × C(d + degree, degree) sums that the formula needs, in float64, however
    many keys were appended; a set with a window also its last keys and values, which leave again::

        state = PolynomialState(degree=4, scale=1 / 8)
        for token in tokens:
            q, k1, k2, v1, v2 = project(token)                        # (B, H, 1, d)
            out = state.append(k1, v1, k2, v2).attend(q)              # = the causal output's last row

    Args:
        degree, scale, basis: as for :func:`polynomial_tensor_attention`.
        windows: for each set the number of its last keys that are seen (the query's own included), or None for all.

    Keys' channels are divided by a power of 2 of the size of the largest so far; when a larger comes, the sums are
    multiplied by the monomials of the two powers' ratio, which is exact.
    """

    def __init__(
        self,
        *,
        degree: int = 4,
        scale: float | None = None,
        windows: Sequence[int | None] | None = None,
        basis: str = "taylor",
    ):
        _check_polynomial(degree, basis)
        for t, window in enumerate(windows or ()):
            if window is not None:
                check_int(f"windows[{t}]", window)
        self.degree, self.scale, self.basis = degree, scale, basis
        self.windows = None if windows is None else list(windows)
        self._sums: list[Tensor] = []
        self._peaks: list[_Peaks] = []
        self._recent: list[tuple[Tensor, Tensor]] = []  # of windowed sets: (B, Hk, n, d) and (B, Hk, n, dv + 1)
        self._appended: list[int] = []  # keys of each set
        self._dtype: torch.dtype | None = None

    @property
    def elements(self) -> int:
        """How many numbers the state holds."""
        tensors = [*self._sums, *(x for pair in self._recent for x in pair)]
        return sum(x.numel() for x in tensors)

    def append(self, *keys_and_values: Tensor, key_padding_masks: Sequence[Tensor | None] | None = None):
        """Add keys and values: ``append(key1, value1, key2, value2)``, and so on for a higher order.

        Args:
            keys_and_values: key (B, Hk, n_t, d) and value (B, Hk, n_t, dv) of each set in turn; n_t may differ.
            key_padding_masks: (B, n_t) bool each, True = keep, or None.

        Returns:
            This state, changed.

        Raises:
            ValueError, TypeError: as :func:`polynomial_tensor_attention`, and where shapes, the dtype or the number of
                sets differ from what was appended before.
        """
        if len(keys_and_values) % 2 or not keys_and_values:
            raise ValueError(f"append takes a key and a value of each set in turn, got {len(keys_and_values)} tensors")
        keys, values = keys_and_values[::2], keys_and_values[1::2]
        masks = [None] * len(keys) if key_padding_masks is None else list(key_padding_masks)
        _check_keys(None, keys, values, masks, ("key{}", "value{}", "key_padding_masks[{}]"))
        if self.windows is not None and len(self.windows) != len(keys):
            raise ValueError(f"append must get {len(self.windows)} sets, one a window, got {len(keys)}")
        _check_features(keys[0].shape[-1], self.degree)
        dtype = _working_dtype(keys[0])
        if self._sums:
            if len(keys) != len(self._sums):
                raise ValueError(f"append must get {len(self._sums)} sets of keys as before, got {len(keys)}")
            if dtype != self._dtype:
                raise TypeError(f"key1 must be computed in {self._dtype} as before, got {keys[0].dtype}")
            columns, heads = self._peaks[0].columns, self._sums[0].shape[:2]
            for t, (key, value) in enumerate(zip(keys, values, strict=True), 1):
                check_size(f"key{t}", key, 0, heads[0], "batch")
                check_size(f"key{t}", key, 1, heads[1], "kv heads")
                check_size(f"key{t}", key, 3, columns.shape[-1], "head_dim")
                check_size(f"value{t}", value, 3, self._peaks[0].values.shape[-1], "value dim")
                check_same_device(f"key{t}", key, "the state", columns)
        else:
            self._start(keys, values, dtype)
        with no_autocast(keys[0]):
            for t, (key, value, mask) in enumerate(zip(keys, values, masks, strict=True)):
                if key.shape[2]:
                    self._append(t, _kept(key, mask, dtype), _kept(value, mask, dtype), mask)
        return self

    def _start(self, keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._dtype = dtype
        batch, heads, _, d = keys[0].shape
        dv = values[0].shape[-1]
        for key in keys:
            nothing = key.new_zeros(batch, heads, 1, 1, dtype=dtype)
            features = math.comb(d + self.degree, self.degree)
            self._appended.append(0)
            self._sums.append(key.new_zeros(batch, heads, dv + 1, features, dtype=torch.float64))
            self._peaks.append(_Peaks(nothing.expand(-1, -1, 1, d), nothing, nothing.expand(-1, -1, 1, dv)))
            self._recent.append((nothing.new_empty(batch, heads, 0, d), nothing.new_empty(batch, heads, 0, dv + 1)))

    def _append(self, t: int, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        peaks = self._peaks[t].joined(_Peaks.of(key, value))
        before = self._peaks[t]
        # Where a channel was 0 so far, the sums of its monomials are 0, and 1 does as well as any ratio.
        ratio = torch.where(before.columns > 0, before.scales / peaks.scales, 1.0).mT.double()
        sums = self._sums[t] * _monomials(ratio, self.degree).mT
        columns = _augmented(value, mask)
        sums = sums + self._moments(key, columns, peaks)
        self._appended[t] += key.shape[2]
        window = None if self.windows is None else self.windows[t]
        if window is not None:
            recent = [torch.cat(pair, 2) for pair in zip(self._recent[t], (key, columns.mT), strict=True)]
            leaving = max(0, recent[0].shape[2] - window)
            if leaving:
                sums = sums - self._moments(recent[0][:, :, :leaving], recent[1][:, :, :leaving].mT, peaks)
            # A copy: a view would keep what left.
            self._recent[t] = (recent[0][:, :, leaving:].clone(), recent[1][:, :, leaving:].clone())
        self._sums[t], self._peaks[t] = sums, peaks

    def _moments(self, key: Tensor, columns: Tensor, peaks: _Peaks) -> Tensor:
        return _moments((key / peaks.scales).mT, columns, self.degree, wide=True)

    def attend(self, query: Tensor, *, return_error_bound: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of ``query`` (B, Hq, n, d), Hq a multiple of Hk, to all that was appended (its windows' last).

        Returns:
            (B, Hq, n, dv) in the query's dtype, zeros where nothing is there to see; with ``return_error_bound`` also
            the bound of :func:`polynomial_tensor_attention`, (B, Hq, n).

        Raises:
            RuntimeError: nothing was appended yet.
            ValueError, TypeError: a query that does not fit what was appended.
        """
        if not self._sums:
            raise RuntimeError("attend needs keys: nothing was appended to this state yet")
        check_ndim("query", query, 4, "(batch, heads, n, head_dim)")
        check_dtype("query", query, kind="real")
        batch, kv_heads, dv = *self._sums[0].shape[:2], self._sums[0].shape[2] - 1
        check_size("query", query, 0, batch, "batch")
        check_size("query", query, 3, self._peaks[0].columns.shape[-1], "head_dim")
        check_same_device("query", query, "the state", self._sums[0])
        if _working_dtype(query) != self._dtype:
            raise TypeError(f"query must be computed in {self._dtype} as the keys are, got {query.dtype}")
        groups = _groups(query, kv_heads, True)
        _, heads, n, d = query.shape
        scale = d**-0.5 if self.scale is None else self.scale
        with no_autocast(query):
            q = query.to(self._dtype).reshape(batch, kv_heads, groups * n, d)
            with torch.no_grad():
                bound = _logit_bounds(q, self._peaks, scale)[0] if self.basis == "chebyshev" else None
            scaled = q * (scale * _product([p.scales for p in self._peaks]))
            scaled, weights = _weights(scaled, self.degree, self.basis, bound)
            sums = [x.to(q.dtype) for x in self._sums]
            out = _read(scaled.mT, weights, _product(sums), self.degree)
            out = out.mT.reshape(batch, heads, n, dv).to(_output_dtype(query))
            if not return_error_bound:
                return out
            windows = self.windows or [None] * len(sums)
            drift = sum(map(_drift, self._appended, windows))
            with torch.no_grad():
                error = _error_bound(q, self._peaks, scale, self.degree, self.basis, drift)
        return out, error.reshape(batch, heads, n)
