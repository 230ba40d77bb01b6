"""Polynomials of signals on a sphere, point by point: to the grid, multiply, and back, in one kernel.

A signal f is (B, C, n) coefficients of functions of degree 0 … L, n = (L + 1)², the 2l + 1 components of a degree side
by side. A table T (H, n) turns it into values at H points, its transpose, weighted, turns values into coefficients:

    z_o = Σ_w T_wᵀ diag(weights) p_w(u_1, u_2, …),     u_v = T_v f_v,     p_w polynomials with integer coefficients.

The pointwise product of two signals is p = u₁u₂; the Poisson bracket, with tables of derivatives along two tangents,
p = u₁u₂ - u₃u₄; the ν-fold product p = u^ν. The derivative of such a map is such a map: the cotangents are further
signals, their variables further factors, and the tables of what is differentiated become the projections. So one
operation is its own backward operation, to any order. Values at the points never reach the device's memory.

Points come in antipodal pairs r, -r of which the tables hold one: components of even degree are the same at both,
those of odd degree change sign. With E and O the even and odd part of a variable, u is E + O at r and E - O at -r, the
polynomial is taken at both, and its even and odd part are projected on even and odd degrees. ``weights`` are those of
pairs. ``odd`` says that the form has a sign of its own at -r, as the bracket has.

What callers use (tables and weights are float32, or float64 beside float64 signals; no gradient flows into them):

    sphere_product(x, y, basis1, basis2, projection, weights) -> z
    sphere_bracket(x, y, tangent1, tangent2, projection, weights) -> z
    sphere_power(x, basis, projection, weights, powers) -> (z, …)
    sphere_polynomial(signals, tables, weights, plan, channels, reduce) -> [z, …]
    unsupported(degrees, outputs, dtype) -> None, or what of a call the kernel leaves to plain torch

x is (B, C, n1), y is (B, C, n2) or (B, 1, n2), any strides; basis1 (H, n1), basis2 (H, n2) and projection (H, n3) are
harmonics at the points of a half sphere, tangent1 and tangent2 (2, H, n) their derivatives, and weights (H,); z is
(B, C, n3). The gradient of a signal with one channel beside others with many is summed over channels in the kernel.

Source: arXiv 2401.10216 (products), 2506.13523 (on a grid), 2605.15073 (the bracket).
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from . import _lib
from ._lib import (
    INTERPRET,
    Target,
    bucket,
    cdiv,
    custom_op,
    dot_float32,
    dot_precision,
    register_defaults,
    register_reference,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SIGNALS, MAX_TABLES, MAX_OUTPUTS = 6, 5, 4  # the kernel's arguments
MAX_COLUMNS = 1024  # of the tiles that hold a row of all signals and results


# Plans: which polynomials. Plain integers: a plan is an operation's argument (as text) and a kernel's constant.


@dataclass(frozen=True)
class Plan:
    """The polynomials of a map, and where their variables come from and their values go.

    Attributes:
        odd: whether the form changes its sign at -r.
        variables: (signal, table) of each variable.
        projections: (output, table, terms); a term is (coefficient, exponent of each variable).
        degrees, outputs: L of each signal and output; known at launch.
    """

    odd: bool
    variables: tuple[tuple[int, int], ...]
    projections: tuple[tuple[int, int, tuple[tuple[int, tuple[int, ...]], ...]], ...]
    degrees: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return repr((self.odd, self.variables, self.projections))

    @property
    def signals(self) -> int:
        return 1 + max(signal for signal, _ in self.variables)

    @property
    def tables(self) -> int:
        return 1 + max(t for t in (*(t for _, t in self.variables), *(t for _, t, _ in self.projections)))

    @property
    def results(self) -> int:
        return 1 + max(output for output, _, _ in self.projections)


@functools.lru_cache
def _parse(text: str) -> Plan:
    return Plan(*ast.literal_eval(text))


@dataclass(frozen=True)
class _Compact:
    """A plan's text, and which signals, tables and results of a larger plan its numbers stand for."""

    text: str
    signals: tuple[int, ...]
    tables: tuple[int, ...]
    results: tuple[int, ...]


def _compact(plan: Plan) -> _Compact:
    """``plan`` without the variables, signals, tables and results that do not occur, numbered anew."""
    terms = [exponents for *_, polynomial in plan.projections for _, exponents in polynomial]
    kept = [v for v in range(len(plan.variables)) if any(exponents[v] for exponents in terms)]
    signals = sorted({plan.variables[v][0] for v in kept})
    tables = sorted({plan.variables[v][1] for v in kept} | {table for _, table, _ in plan.projections})
    results = sorted({output for output, *_ in plan.projections})
    compact = Plan(
        odd=plan.odd,
        variables=tuple((signals.index(plan.variables[v][0]), tables.index(plan.variables[v][1])) for v in kept),
        projections=tuple(
            (results.index(o), tables.index(t), tuple((c, tuple(e[v] for v in kept)) for c, e in polynomial))
            for o, t, polynomial in plan.projections
        ),
    )
    return _Compact(compact.text, tuple(signals), tuple(tables), tuple(results))


@functools.lru_cache
def _part(text: str, output: int) -> _Compact:
    """The plan of one result alone."""
    plan = _parse(text)
    return _compact(replace(plan, projections=tuple(p for p in plan.projections if p[0] == output)))


@functools.lru_cache
def _derivative(text: str, given: tuple[bool, ...], wanted: tuple[bool, ...]) -> _Compact | None:
    """The plan of Σ_o ⟨g_o, ∂z_o⟩ by each of the ``wanted`` signals, which are its results, or None if all are zero.

    Its signals are those of the plan and, behind them, the cotangents g_o, of which those ``given`` are not zero.
    """
    plan = _parse(text)
    fresh: dict[tuple[int, int], int] = {}  # (output, table) -> the variable of its cotangent
    for output, table, _ in plan.projections:
        if given[output]:
            fresh.setdefault((output, table), len(plan.variables) + len(fresh))
    projections = []
    for v, (signal, table) in enumerate(plan.variables):
        terms: dict[tuple[int, ...], int] = {}
        for output, target, polynomial in plan.projections:
            for coefficient, exponents in polynomial if given[output] and wanted[signal] else ():
                if exponents[v]:
                    lowered = [*exponents, *(0 for _ in fresh)]
                    lowered[v] -= 1
                    lowered[fresh[output, target]] += 1
                    key = tuple(lowered)
                    terms[key] = terms.get(key, 0) + coefficient * exponents[v]
        if terms:
            projections.append((signal, table, tuple((c, e) for e, c in terms.items())))
    if not projections:
        return None
    cotangents = tuple((len(wanted) + output, table) for output, table in fresh)
    return _compact(Plan(plan.odd, (*plan.variables, *cotangents), tuple(projections)))


# What the kernel asks its plan when it is compiled. Triton lets these call nothing but builtins.


@triton.constexpr_function
def _variables(plan):
    return len(plan.variables)


@triton.constexpr_function
def _signal(plan, v):
    return plan.variables[v][0]


@triton.constexpr_function
def _variable_table(plan, v):
    return plan.variables[v][1]


@triton.constexpr_function
def _projections(plan):
    return len(plan.projections)


@triton.constexpr_function
def _output(plan, w):
    return plan.projections[w][0]


@triton.constexpr_function
def _projection_table(plan, w):
    return plan.projections[w][1]


@triton.constexpr_function
def _terms(plan, w):
    return len(plan.projections[w][2])


@triton.constexpr_function
def _coefficient(plan, w, t):
    return float(plan.projections[w][2][t][0])


@triton.constexpr_function
def _exponent(plan, w, t, v):
    return plan.projections[w][2][t][1][v]


@triton.constexpr_function
def _odd(plan):
    return plan.odd


@triton.constexpr_function
def _degrees(plan):
    return len(plan.degrees)


@triton.constexpr_function
def _outputs(plan):
    return len(plan.outputs)


@triton.constexpr_function
def _degree(plan, i):
    return plan.degrees[i]


@triton.constexpr_function
def _output_degree(plan, o):
    return plan.outputs[o]


@triton.constexpr_function
def _width(degree, parity):
    """The tile for the components of one parity: a power of two, at least the 16 that ``tl.dot`` wants."""
    q = (degree + 2 - parity) // 2
    n, width = q * (2 * q - 1 + 2 * parity), 16
    while width < n:
        width *= 2
    return width


# Kernel


@triton.jit
def _append(tiles, tile):
    return tiles + (tile,)  # noqa: RUF005 (Triton compiles no starred expressions)


@triton.jit
def _zeros(PLAN: tl.constexpr, BR: tl.constexpr, PARITY: tl.constexpr):
    """A tile for the components of one parity of each result."""
    tiles = ()
    for o in tl.static_range(_outputs(PLAN)):
        tiles = _append(tiles, tl.zeros((BR, _width(_output_degree(PLAN, o), PARITY)), tl.float32))
    return tiles


@triton.jit
def _components(PARITY: tl.constexpr, DEGREE: tl.constexpr):
    """Where the components of one parity are within (DEGREE + 1)², padded to a tile; beyond, (DEGREE + 1)² or more."""
    j = tl.arange(0, _width(DEGREE, PARITY))
    q = tl.zeros_like(j)  # degree 2q + PARITY; those before it have q (2q - 1 + 2 PARITY) components
    for i in tl.static_range(1, DEGREE // 2 + 2):
        q += (j >= i * (2 * i - 1 + 2 * PARITY)).to(tl.int32)
    return j + q * (2 * q + 1) + PARITY * (2 * q + 1)


@triton.jit
def _load_part(x, rows, inside, stride, PARITY: tl.constexpr, DEGREE: tl.constexpr):
    """The components of one parity of a tile of signals."""
    k = _components(PARITY, DEGREE)
    mask = inside[:, None] & (k < (DEGREE + 1) * (DEGREE + 1))[None, :]
    offsets = rows[:, None] + (k.to(tl.int64) * stride)[None, :]
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _values(part, table, h, H, PRECISION: tl.constexpr, PARITY: tl.constexpr, DEGREE: tl.constexpr):
    """One parity's share of a variable at the points h."""
    N: tl.constexpr = (DEGREE + 1) * (DEGREE + 1)
    k = _components(PARITY, DEGREE)
    columns = tl.load(table + (k[:, None] + h[None, :] * N), mask=(k < N)[:, None] & (h < H)[None, :], other=0.0)
    return dot_float32(part, columns, tl.zeros((part.shape[0], h.shape[0]), tl.float32), PRECISION)


@triton.jit
def _project(acc, values, table, h, H, PRECISION: tl.constexpr, PARITY: tl.constexpr, DEGREE: tl.constexpr):
    """acc + values Tᵀ over the points h, on the components of one parity."""
    N: tl.constexpr = (DEGREE + 1) * (DEGREE + 1)
    k = _components(PARITY, DEGREE)
    rows = tl.load(table + (h[:, None] * N + k[None, :]), mask=(h < H)[:, None] & (k < N)[None, :], other=0.0)
    return dot_float32(values, rows, acc, PRECISION)


@triton.jit
def _polynomial(values, PLAN: tl.constexpr, w: tl.constexpr):
    total = tl.zeros_like(values[0])
    for t in tl.static_range(_terms(PLAN, w)):
        monomial = tl.full(total.shape, _coefficient(PLAN, w, t), tl.float32)
        for v in tl.static_range(_variables(PLAN)):
            for _ in tl.static_range(_exponent(PLAN, w, t, v)):
                monomial *= values[v]
        total += monomial
    return total


@triton.jit
def _store_part(z, part, rows, inside, PARITY: tl.constexpr, DEGREE: tl.constexpr):
    N: tl.constexpr = (DEGREE + 1) * (DEGREE + 1)
    k = _components(PARITY, DEGREE)
    pointers = z + (rows[:, None] * N + k[None, :])
    tl.store(pointers, part.to(z.dtype.element_ty), mask=inside[:, None] & (k < N)[None, :])


_STRIDES = [f"stride_{i}{axis}" for i in range(MAX_SIGNALS) for axis in "bcn"]


@triton.jit(do_not_specialize=["B", "C", "H", *_STRIDES])
def sphere_polynomial_kernel(
    x0, x1, x2, x3, x4, x5, t0, t1, t2, t3, t4, weights, z0, z1, z2, z3,
    B, C, H,
    stride_0b, stride_0c, stride_0n, stride_1b, stride_1c, stride_1n, stride_2b, stride_2c, stride_2n,
    stride_3b, stride_3c, stride_3n, stride_4b, stride_4c, stride_4n, stride_5b, stride_5c, stride_5n,
    PLAN: tl.constexpr, PRECISION: tl.constexpr, REDUCED: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """BR rows (b, c), all points. Tables, weights and results are contiguous.

    With BC: the rows are BR / BC batch entries of BC channels, and the results whose bit is set in REDUCED,
    (B, ⌈C / BC⌉, n), are sums over these channels. Without (0): BR successive rows of (B, C).
    """
    signals = (x0, x1, x2, x3, x4, x5)
    tables = (t0, t1, t2, t3, t4)
    results = (z0, z1, z2, z3)
    strides_b = (stride_0b, stride_1b, stride_2b, stride_3b, stride_4b, stride_5b)
    strides_c = (stride_0c, stride_1c, stride_2c, stride_3c, stride_4c, stride_5c)
    strides_n = (stride_0n, stride_1n, stride_2n, stride_3n, stride_4n, stride_5n)
    pid = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    if BC > 0:
        parts = tl.cdiv(C, BC)
        first = pid // parts * (BR // BC)
        b = first + r // BC
        c = pid % parts * BC + r % BC
    else:
        b = (pid * BR + r) // C
        c = (pid * BR + r) % C
    inside = (b < B) & (c < C)

    evens = ()
    odds = ()
    for i in tl.static_range(_degrees(PLAN)):
        rows = b * strides_b[i] + c * strides_c[i]
        evens = _append(evens, _load_part(signals[i], rows, inside, strides_n[i], 0, _degree(PLAN, i)))
        odds = _append(odds, _load_part(signals[i], rows, inside, strides_n[i], 1, _degree(PLAN, i)))
    acc_even = _zeros(PLAN, BR, 0)
    acc_odd = _zeros(PLAN, BR, 1)

    for h_start in range(0, H, BG):
        h = h_start + tl.arange(0, BG)
        half = 0.5 * tl.load(weights + h, mask=h < H, other=0.0)[None, :]
        near = ()
        far = ()
        for v in tl.static_range(_variables(PLAN)):
            table = tables[_variable_table(PLAN, v)]
            even = _values(evens[_signal(PLAN, v)], table, h, H, PRECISION, 0, _degree(PLAN, _signal(PLAN, v)))
            odd = _values(odds[_signal(PLAN, v)], table, h, H, PRECISION, 1, _degree(PLAN, _signal(PLAN, v)))
            near = _append(near, even + odd)
            far = _append(far, even - odd)
        sum_even = ()
        sum_odd = ()
        for o in tl.static_range(_outputs(PLAN)):
            total_even = acc_even[o]
            total_odd = acc_odd[o]
            for w in tl.static_range(_projections(PLAN)):
                if _output(PLAN, w) == o:
                    at_near = _polynomial(near, PLAN, w) * half
                    at_far = _polynomial(far, PLAN, w) * half
                    even = at_near - at_far if _odd(PLAN) else at_near + at_far
                    odd = at_near + at_far if _odd(PLAN) else at_near - at_far
                    table = tables[_projection_table(PLAN, w)]
                    total_even = _project(total_even, even, table, h, H, PRECISION, 0, _output_degree(PLAN, o))
                    total_odd = _project(total_odd, odd, table, h, H, PRECISION, 1, _output_degree(PLAN, o))
            sum_even = _append(sum_even, total_even)
            sum_odd = _append(sum_odd, total_odd)
        acc_even = sum_even
        acc_odd = sum_odd

    for o in tl.static_range(_outputs(PLAN)):
        if (REDUCED >> o) & 1:
            entry = first + tl.arange(0, BR // BC)
            rows = entry * parts + pid % parts
            even = tl.sum(acc_even[o].reshape(BR // BC, BC, acc_even[o].shape[1]), 1)
            odd = tl.sum(acc_odd[o].reshape(BR // BC, BC, acc_odd[o].shape[1]), 1)
            _store_part(results[o], even, rows, entry < B, 0, _output_degree(PLAN, o))
            _store_part(results[o], odd, rows, entry < B, 1, _output_degree(PLAN, o))
        else:
            _store_part(results[o], acc_even[o], b * C + c, inside, 0, _output_degree(PLAN, o))
            _store_part(results[o], acc_odd[o], b * C + c, inside, 1, _output_degree(PLAN, o))


# Launching

_MAX_SHARED_LOAD = 384  # beyond, results share no launch: each alone leaves room for larger tiles


def _columns(degrees: Sequence[int]) -> int:
    """What a row of signals or results of these degrees takes in tiles."""
    return sum(_width(degree, parity) for degree in degrees for parity in (0, 1))


def _load(plan: Plan) -> int:
    """What a row of a tile holds, roughly: signals, results, and each variable at the points."""
    return _columns(plan.degrees) + _columns(plan.outputs) + 32 * len(plan.variables)


def _candidates(plan: Plan, target: Target) -> list[dict[str, Any]]:
    """Launch configurations, the default first: fewer rows to a warp the more a row takes."""
    if target[0] == "interpreter":
        return [{"BR": 32, "BG": 16, "num_warps": 4, "num_stages": 1}]
    load = _load(plan)
    # On sm_100 operands that wait in tensor memory for their turn share its 512 columns: no second stage.
    stages = 1 if target[0] == "cuda" and 100 <= int(target[1]) < 120 else 2
    shapes: tuple[tuple[int, int, int, int], ...]  # BR, BG, num_warps, num_stages
    if load <= 192:
        shapes = ((64, 16, 4, 2), (64, 32, 4, 2), (64, 16, 8, stages), (32, 32, 4, 2))
    elif load <= 384 and target[0] == "cuda":
        shapes = ((64, 16, 8, stages), (32, 16, 4, 2), (64, 32, 8, 1))
    elif load <= 384:
        shapes = ((64, 16, 4, 2), (64, 16, 8, 2))
    elif load <= 512:
        shapes = ((32, 16, 8, 2), (16, 16, 4, 1))
    else:
        shapes = ((16, 16, 8, 1),)
    return [dict(zip(("BR", "BG", "num_warps", "num_stages"), shape, strict=True)) for shape in shapes]


def unsupported(degrees: Sequence[int], outputs: Sequence[int], dtype: torch.dtype) -> str | None:
    """What the kernel cannot do, in words, or None; the operation then takes plain torch.

    Args:
        degrees, outputs: L of each signal and of each result.
        dtype: of the signals.
    """
    if dtype not in DTYPES:
        return str(dtype).removeprefix("torch.")
    if len(degrees) > MAX_SIGNALS or len(outputs) > MAX_OUTPUTS:
        return f"{len(degrees)} signals with {len(outputs)} results (at most {MAX_SIGNALS} and {MAX_OUTPUTS})"
    if _columns(degrees) + _columns(outputs) > MAX_COLUMNS:
        return f"degrees {', '.join(map(str, degrees))} to {', '.join(map(str, outputs))}: too many components"
    return None


def _sizes(plan: Plan, signals: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]) -> Plan:
    """The plan with the degrees of its signals and results."""
    degrees = tuple(math.isqrt(signal.shape[2]) - 1 for signal in signals)
    outputs = {output: math.isqrt(tables[t].shape[1]) - 1 for output, t, _ in plan.projections}
    return replace(plan, degrees=degrees, outputs=tuple(outputs[o] for o in range(plan.results)))


def _check(signals, tables, weights, text, channels, reduce) -> Plan:
    plan = _parse(text)
    if len(signals) != plan.signals or len(tables) != plan.tables or len(reduce) != plan.results:
        raise ValueError(
            f"signals, tables and reduce must be {plan.signals}, {plan.tables} and {plan.results} as the plan says, "
            f"got {len(signals)}, {len(tables)} and {len(reduce)}"
        )
    dtype, device = signals[0].dtype, signals[0].device
    if dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"signals must be float32, float64, float16 or bfloat16, got {dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    points, batch = weights.shape[0] if weights.ndim == 1 else -1, signals[0].shape[0]
    if points < 0:
        raise ValueError(f"weights must have shape (H,), got {tuple(weights.shape)}")
    for i, signal in enumerate(signals):
        if signal.dtype != dtype:
            raise TypeError(f"signals must share a dtype, got {dtype} and {signal.dtype}")
        if signal.ndim != 3 or signal.shape[0] != batch or signal.shape[1] not in (1, channels):
            raise ValueError(
                f"signals must have shape (B, C or 1, n) = ({batch}, {channels} or 1, *), got {tuple(signal.shape)} "
                f"for signal {i}"
            )
        if signal.shape[2] < 1 or math.isqrt(signal.shape[2]) ** 2 != signal.shape[2]:
            raise ValueError(f"signals must have (L + 1)² components, got {signal.shape[2]} for signal {i}")
    for table in tables:
        if table.ndim != 2 or table.shape[0] != points:
            raise ValueError(f"tables must have shape (H, n) = ({points}, *), got {tuple(table.shape)}")
    for tensor in (*tables, weights):
        if tensor.dtype != wide:
            raise TypeError(f"tables and weights must be {wide} beside signals of {dtype}, got {tensor.dtype}")
    for tensor in (*signals, *tables, weights):
        if tensor.device != device:
            raise ValueError(f"signals, tables and weights must share a device, got {device} and {tensor.device}")
    for signal, table in plan.variables:
        if tables[table].shape[1] != signals[signal].shape[2]:
            raise ValueError(
                f"tables must have the components of their signals, got {tables[table].shape[1]} for "
                f"{signals[signal].shape[2]}"
            )
    plan = _sizes(plan, signals, tables)
    for output, table, _ in plan.projections:
        if tables[table].shape[1] != (plan.outputs[output] + 1) ** 2:
            raise ValueError(f"tables must have (L + 1)² components, one L for a result, got {tables[table].shape[1]}")
    return plan


def _launch(
    signals: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    weights: torch.Tensor,
    text: str,
    channels: int,
    reduce: Sequence[bool],
    candidates: list[dict[str, Any]] | None = None,
) -> list[torch.Tensor]:
    """``candidates`` overrides the launch configurations."""
    plan = _check(signals, tables, weights, text, channels, reduce)
    dtype, batch, points = signals[0].dtype, signals[0].shape[0], weights.shape[0]
    if len(reduce) > 1 and _load(plan) > _MAX_SHARED_LOAD:
        parts = [_part(text, output) for output in range(len(reduce))]
        return [
            _launch(
                [signals[i] for i in part.signals],
                [tables[i] for i in part.tables],
                *(weights, part.text, channels, [reduce[output]], candidates),
            )[0]
            for output, part in enumerate(parts)
        ]
    if len(tables) > MAX_TABLES or unsupported(plan.degrees, plan.outputs, dtype) is not None:
        return _reference(list(signals), list(tables), weights, text, channels, list(reduce))
    sizes = [(degree + 1) ** 2 for degree in plan.outputs]
    if batch * channels == 0 or points == 0:
        return [signals[0].new_zeros(batch, 1 if r else channels, n) for n, r in zip(sizes, reduce, strict=True)]
    device, low = signals[0].device, dtype != torch.float32
    target = _lib.target_of(device)
    few = cdiv(batch * channels, 64) < _lib.multiprocessors(device)
    if candidates is None:
        candidates = _candidates(plan, target)
    # The interpreter's time goes by operations: one product for each instead of three.
    precision = dot_precision(target, "ieee" if INTERPRET else None, low=low)
    arguments: dict[str, Any] = {"weights": weights.contiguous(), "B": batch, "C": channels, "H": points}
    for i in range(MAX_SIGNALS):
        signal = signals[i] if i < len(signals) else None
        stride = (0, 0, 0) if signal is None else signal.stride()
        arguments[f"x{i}"] = signal
        arguments |= {f"stride_{i}b": stride[0], f"stride_{i}n": stride[2]}
        arguments[f"stride_{i}c"] = 0 if signal is None or signal.shape[1] == 1 else stride[1]
    for i in range(MAX_TABLES):
        arguments[f"t{i}"] = tables[i].contiguous() if i < len(tables) else None
    arguments |= {"PLAN": plan, "PRECISION": precision, "REDUCED": sum(r << o for o, r in enumerate(reduce))}

    results: list[torch.Tensor] = []

    def launch(meta: dict[str, Any]) -> None:
        rows = meta["BR"]
        # Sums over channels need tiles that do not mix batch entries; a longer sum is shared out and added up below.
        chunk = min(bucket(channels), rows) if any(reduce) else 0
        parts = cdiv(channels, chunk) if chunk else 0
        written = [
            torch.empty(batch, parts, n, dtype=torch.float32 if parts > 1 else dtype, device=device)
            if r
            else torch.empty(batch, channels, n, dtype=dtype, device=device)
            for n, r in zip(sizes, reduce, strict=True)
        ]
        slots = {f"z{o}": written[o] if o < len(written) else None for o in range(MAX_OUTPUTS)}
        programs = cdiv(batch, rows // chunk) * parts if chunk else cdiv(batch * channels, rows)
        sphere_polynomial_kernel[(programs,)](**arguments, **slots, BC=chunk, **meta)
        results[:] = [
            z.sum(1, keepdim=True).to(dtype) if r and parts > 1 else z for z, r in zip(written, reduce, strict=True)
        ]

    key = (plan, tuple(reduce), bucket(channels) if any(reduce) else 0, bucket(points), dtype, precision, few)
    with _lib.device_guard(signals[0]):
        launch(_lib.pick("sphere_polynomial", key, candidates, launch, device))
    return results


# Plain torch


def _signs(n: int, like: torch.Tensor) -> torch.Tensor:
    """(-1)^l of each of n components."""
    return torch.cat([like.new_full((2 * ell + 1,), (-1.0) ** ell) for ell in range(math.isqrt(n))])


def _reference(
    signals: list[torch.Tensor],
    tables: list[torch.Tensor],
    weights: torch.Tensor,
    plan: str,
    channels: int,
    reduce: list[bool],
) -> list[torch.Tensor]:
    """The definition: all values at r and at -r, (B, C or 1, H), then the polynomials, then the projections."""
    sized = _check(signals, tables, weights, plan, channels, reduce)
    batch = signals[0].shape[0]
    sums: dict[int, torch.Tensor] = {}
    values: list[list[torch.Tensor]] = []
    for parity in (False, True):
        values.append([])
        for signal, table in sized.variables:
            f = signals[signal].to(weights.dtype)
            values[-1].append((f * _signs(f.shape[2], f) if parity else f) @ tables[table].T)
    for output, table, terms in sized.projections:
        ends = []
        for end in values:
            total = torch.zeros(batch, 1, weights.shape[0], dtype=weights.dtype, device=weights.device)
            for coefficient, exponents in terms:
                factors = [u for u, exponent in zip(end, exponents, strict=True) for _ in range(exponent)]
                total = total + coefficient * functools.reduce(torch.mul, factors)
            ends.append(0.5 * weights * total @ tables[table])
        near, far = ends
        signs = _signs(near.shape[2], near)
        z = near + (-signs if sized.odd else signs) * far
        sums[output] = sums[output] + z if output in sums else z
    found = []
    for output, is_sum in enumerate(reduce):
        z = sums[output].expand(-1, channels, -1)
        found.append((z.sum(1, keepdim=True) if is_sum else z).to(signals[0].dtype).contiguous())
    return found


# Operation


def _sphere_polynomial(
    signals: list[torch.Tensor],
    tables: list[torch.Tensor],
    weights: torch.Tensor,
    plan: str,
    channels: int,
    reduce: list[bool],
) -> list[torch.Tensor]:
    return _launch(signals, tables, weights, plan, channels, reduce)


_op = custom_op("sphere_polynomial", _sphere_polynomial)
register_reference(_op, _reference)


@_op.register_fake
def _(signals, tables, weights, plan, channels, reduce):
    sizes = {output: tables[table].shape[1] for output, table, _ in _parse(plan).projections}
    return [
        signals[0].new_empty((signals[0].shape[0], 1 if is_sum else channels, sizes[output]))
        for output, is_sum in enumerate(reduce)
    ]


def _setup(ctx, inputs, output) -> None:
    signals, tables, weights, ctx.plan, ctx.channels, _ = inputs
    ctx.count = len(signals)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*signals, *tables, weights)


def _backward(ctx, grads):
    *saved, weights = ctx.saved_tensors
    signals, tables = saved[: ctx.count], saved[ctx.count :]
    if any(ctx.needs_input_grad[1]) or ctx.needs_input_grad[2]:
        raise ValueError("tables and weights must not require gradients: they are constants")
    wanted = tuple(ctx.needs_input_grad[0])
    given = tuple(grad is not None for grad in grads)
    found: list[torch.Tensor | None] = [None] * ctx.count
    derivative = _derivative(ctx.plan, given, wanted)
    if derivative is not None:
        every = [*signals, *grads]
        results = _op(
            [every[i] for i in derivative.signals],
            [tables[i] for i in derivative.tables],
            weights,
            derivative.text,
            ctx.channels,
            [signals[i].shape[1] == 1 and ctx.channels != 1 for i in derivative.results],
        )
        for i, result in zip(derivative.results, results, strict=True):
            found[i] = result
    return found, [None] * len(tables), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


# What callers use

_PRODUCT = Plan(False, ((0, 0), (1, 1)), ((0, 2, ((1, (1, 1)),)),)).text
_BRACKET = Plan(
    True, ((0, 0), (0, 1), (1, 2), (1, 3)), ((0, 4, ((1, (1, 0, 0, 1)), (-1, (0, 1, 1, 0)))),)
).text  # fmt: skip


@functools.lru_cache
def _power(powers: tuple[int, ...]) -> str:
    return Plan(False, ((0, 0),), tuple((o, 1, ((1, (power,)),)) for o, power in enumerate(powers))).text


def sphere_polynomial(
    signals: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    weights: torch.Tensor,
    plan: Plan | str,
    channels: int,
    reduce: Sequence[bool],
) -> list[torch.Tensor]:
    """The results z_o = Σ_w T_wᵀ diag(weights) p_w(u) of a plan, differentiable in the signals to any order.

    Runs as the kernel where :func:`unsupported` says None, else in plain torch, which has all values in memory.

    Args:
        signals: (B, C or 1, n) each, n = (L + 1)² with an L of its own, one dtype, any strides.
        tables: (H, n) each: float64 beside float64 signals, float32 beside others.
        weights: (H,), like the tables: quadrature weights of antipodal pairs of points.
        plan: :class:`Plan` or its ``text``.
        channels: C.
        reduce: for each result, whether it is summed over the channels, (B, 1, n), or not, (B, C, n).

    Returns:
        The results in the dtype of the signals, contiguous; sums are in float32, or in float64 for float64. An infinite
        component makes its row NaN.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes, counts or devices that do not fit the plan.
    """
    text = plan if isinstance(plan, str) else plan.text
    return _op(list(signals), list(tables), weights, text, channels, list(reduce))


def _common_channels(x: torch.Tensor, y: torch.Tensor) -> int:
    for name, signal in (("x", x), ("y", y)):
        if signal.ndim != 3:
            raise ValueError(f"{name} must have shape (B, C, n), got {tuple(signal.shape)}")
    return y.shape[1] if x.shape[1] == 1 else x.shape[1]


def sphere_product(
    x: torch.Tensor,
    y: torch.Tensor,
    basis1: torch.Tensor,
    basis2: torch.Tensor,
    projection: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The coefficients z of the pointwise product of two signals, differentiable in both to any order.

    Exact where the points integrate degree L1 + L2 + L3 exactly.

    Args:
        x, y: (B, C, n1) and (B, C, n2), of which one may have one channel for all of the other; one dtype.
        basis1, basis2, projection: (H, n1), (H, n2), (H, n3), harmonics at H points, one of each antipodal pair.
        weights: (H,), of pairs.

    Returns:
        (B, C, n3). Dtypes and errors as for :func:`sphere_polynomial`.
    """
    return _op([x, y], [basis1, basis2, projection], weights, _PRODUCT, _common_channels(x, y), [False])[0]


def sphere_bracket(
    x: torch.Tensor,
    y: torch.Tensor,
    tangent1: torch.Tensor,
    tangent2: torch.Tensor,
    projection: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The coefficients of the Poisson bracket (D₁x)(D₂y) - (D₂x)(D₁y), differentiable in both to any order.

    Args:
        tangent1, tangent2: (2, H, n1) and (2, H, n2), D₁ and D₂: derivatives along two orthonormal tangents, which at
            -r are those at r.
        x, y, projection, weights: as for :func:`sphere_product`.

    Returns:
        (B, C, n3). Dtypes and errors as for :func:`sphere_polynomial`.
    """
    for name, tangent in (("tangent1", tangent1), ("tangent2", tangent2)):
        if tangent.ndim != 3 or tangent.shape[0] != 2:
            raise ValueError(f"{name} must have shape (2, H, n), got {tuple(tangent.shape)}")
    tables = [*tangent1.unbind(), *tangent2.unbind(), projection]
    return _op([x, y], tables, weights, _BRACKET, _common_channels(x, y), [False])[0]


def sphere_power(
    x: torch.Tensor, basis: torch.Tensor, projection: torch.Tensor, weights: torch.Tensor, powers: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """The coefficients of the powers X^ν of a signal, all in one pass, differentiable to any order.

    Exact where the points integrate degree ν L1 + L3 exactly, for the largest ν.

    Args:
        x: (B, C, n1).
        basis, projection: (H, n1) and (H, n3).
        weights: (H,).
        powers: each ν, at least 1.

    Returns:
        (B, C, n3) for each of ``powers``. Dtypes and errors as for :func:`sphere_polynomial`.
    """
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, C, n), got {tuple(x.shape)}")
    if not powers or any(power < 1 for power in powers):
        raise ValueError(f"powers must be one or more numbers from 1 on, got {tuple(powers)}")
    return tuple(_op([x], [basis, projection], weights, _power(tuple(powers)), x.shape[1], [False] * len(powers)))


# Production configurations: the default of each target.


def _register(label: str, plan: Plan, degrees: Sequence[int], outputs: Sequence[int], **options: Any) -> None:
    """``options``: dtype, reduced (bit mask, of 64 channels and more), spill_budget and note."""
    plan = replace(plan, degrees=tuple(degrees), outputs=tuple(outputs))
    dtype, reduced = options.get("dtype", torch.float32), options.get("reduced", 0)
    low, kind = dtype != torch.float32, "*fp32:16" if dtype == torch.float32 else "*bf16:16"
    signature = dict.fromkeys(("B", "C", "H", *_STRIDES), "i32") | {"weights": "*fp32:16"}
    constants: dict[str, Any] = {"PLAN": plan, "REDUCED": reduced}
    constants["PRECISION"] = lambda target: dot_precision(target, low=low)
    for letter, count, most in (("x", plan.signals, MAX_SIGNALS), ("t", plan.tables, MAX_TABLES)):
        for i in range(most):
            if i < count:
                signature[f"{letter}{i}"] = kind if letter == "x" else "*fp32:16"
            else:
                constants[f"{letter}{i}"] = None
    for o in range(MAX_OUTPUTS):
        if o < plan.results:
            signature[f"z{o}"] = "*fp32:16" if reduced >> o & 1 else kind
        else:
            constants[f"z{o}"] = None

    def default(target: Target) -> dict[str, Any]:
        meta = _candidates(plan, target)[0]
        return meta | {"BC": meta["BR"] if reduced else 0}

    register_defaults(
        sphere_polynomial_kernel,
        f"sphere_polynomial[{label}]",
        signature,
        constants,
        default,
        tensor_cores=lambda meta: meta["BR"] >= 64,
        spill_budget=options.get("spill_budget"),
        note=options.get("note", ""),
    )


def _register_all() -> None:
    product, bracket, power = (_parse(text) for text in (_PRODUCT, _BRACKET, _power((2, 3))))

    def derivative(plan: Plan) -> Plan:
        """By every signal."""
        found = _derivative(plan.text, (True,) * plan.results, (True,) * plan.signals)
        assert found is not None
        return _parse(found.text)

    spilling = "With 32 rows a program a few registers spill; with 16, tables are read twice as often for it."
    for degree in (2, 4, 6):
        _register(f"product,L{degree}", product, (degree, degree), (degree,))
    budget = {"sm_80": 8, "sm_90": 8, "sm_100": 16}
    _register("product,L8", product, (8, 8), (8,), spill_budget=budget, note=spilling)
    _register("product,L8,all", product, (8, 8), (16,))
    _register("product,bf16,L4", product, (4, 4), (4,), dtype=torch.bfloat16)
    _register("product,L4,summed", product, (4, 4), (4,), reduced=1)
    _register("product_backward,L4", derivative(product), (4, 4, 4), (4, 4), spill_budget={"sm_100": 16})
    _register("bracket,L4", bracket, (4, 4), (4,))
    _register("bracket_backward,L4", derivative(bracket), (4, 4, 4), (4, 4))
    _register("power,L3", power, (3,), (3, 3))
    _register("power_backward,L3", derivative(power), (3, 3, 3), (3,))
    _register("power_double_backward,L3", derivative(derivative(power)), (3, 3, 3, 3), (3, 3, 3))


_register_all()
