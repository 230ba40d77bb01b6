"""A convolution by two one-way filters, y = act(second * (first * x) + bias), and its gradients.

``first`` (R, C, k1) runs along one axis, ``second`` (O, R, k2) along the other; the R channels between them are never
in device memory. Tiles in registers cannot be shifted, so the axes are treated differently: a program holds a tile of
points *across* (the first filter's axis, whose taps are loads at shifted addresses) and *marches* along the other. Each
step makes one row of the intermediate, (BW, BR), and keeps the last k2 of them, which are what the second filter needs
for one row of output. Where a program begins, k2 - 1 rows are made that its neighbour makes as well. Which axis of the
image is which is a matter of strides; so are the memory formats.

Along each axis tap t of point p reads position ``(p · MUL + offset + t · STEP) / DIV``, nothing where that is no whole
number or outside. A convolution has MUL = stride and STEP = dilation; its transpose, which is the gradient of x, is the
same kernel with the filters' roles exchanged and their taps reversed, and DIV = stride. With MUL > 1 or STEP > 1, rows
that share the rows they read are STEP / gcd apart: so many phases are marched through separately.

The filters' gradients are sums over all pixels, of the intermediate (or of its gradient, an intermediate of the
transpose) times y's gradient (or x) at shifted positions. The intermediate is computed again. Each program sums a part
of the pixels; the parts are added in a fixed order.

Sums are in float32; the intermediate is rounded to the dtype of x, as two convolutions in that dtype do.

Source: arXiv 2304.04964 (one-way filters); arXiv 1405.3866, scheme 2.
"""

# Triton's tuples know + but not *, and change their length, which is their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.grad import conv2d_weight

from . import _lib
from ._lib import (
    INTERPRET,
    Target,
    bucket,
    cdiv,
    custom_op,
    dot,
    dot_precision,
    register_defaults,
    register_reference,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "relu", "gelu", "silu")
MAX_RANK = 64
_MAX_RING = 384  # k2 · R: the numbers a point that a program keeps in registers


@triton.jit
def _read(position, size, DIV: tl.constexpr):
    """Which entry of an axis is at ``position`` (in units of 1 / DIV), and whether there is one."""
    inside = position >= 0
    if DIV > 1:
        inside = inside & (position % DIV == 0)
        position = position // DIV
    return position, inside & (position < size)


@triton.jit
def _tile(w, rows, n_rows, stride_rows, columns, n_columns, stride_columns):
    """[rows, columns] of a filter's tap, 0 outside."""
    return tl.load(
        w + (rows.to(tl.int64) * stride_rows)[:, None] + (columns.to(tl.int64) * stride_columns)[None, :],
        mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :],
        other=0.0,
    )


@triton.jit
def _inner(
    x, w, held, inside, at, r, size, C, R, stride_xa, stride_xc, stride_wr, stride_wc, stride_wk,
    DIV: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr, HOLD: tl.constexpr,
    PRECISION: tl.constexpr, LOW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """[points, BR]: the first filter w at points whose taps lie along an axis from ``at`` on; x is one pointer each.

    HOLD: the filter's tiles are ``held``, and need not be loaded.
    """
    acc = tl.zeros((at.shape[0], r.shape[0]), tl.float32)
    for j in tl.static_range(K):
        a, ok = _read(at + j * STEP, size, DIV)
        ok = ok & inside
        points = x + a.to(tl.int64) * stride_xa
        for block in range(0, BLOCKS):
            c = block * BC + tl.arange(0, BC)
            xs = tl.load(
                points[:, None] + (c.to(tl.int64) * stride_xc)[None, :],
                mask=ok[:, None] & (c < C)[None, :],
                other=0.0,
            )
            if HOLD:
                acc = dot(xs, held[j], acc, PRECISION, LOW)
            else:
                acc = dot(xs, _tile(w + j * stride_wk, c, C, stride_wc, r, R, stride_wr), acc, PRECISION, LOW)
    return acc.to(x.dtype.element_ty)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)  # NaN stays NaN
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit(do_not_specialize=["tiles", "strips", "steps", "across", "rows", "x_across", "x_rows", "at_a", "at_m"])
def separable_conv_kernel(
    x, first, second, bias, y,
    tiles, strips, steps, across, rows, x_across, x_rows, at_a, at_m, C, R, OUT,
    stride_xn, stride_xm, stride_xa, stride_xc, stride_fr, stride_fc, stride_fk, stride_so, stride_sr, stride_sk,
    stride_yn, stride_ym, stride_ya, stride_yo,
    MUL_A: tl.constexpr, DIV_A: tl.constexpr, STEP_A: tl.constexpr,
    MUL_M: tl.constexpr, DIV_M: tl.constexpr, STEP_M: tl.constexpr,
    K1: tl.constexpr, K2: tl.constexpr, KEEP: tl.constexpr, PHASES: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, LOW: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BO: tl.constexpr, C_BLOCKS: tl.constexpr, O_BLOCKS: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """BW points across and ``steps`` rows of one phase. at_a, at_m: where the first tap of point 0 reads.

    KEEP of the K2 rows that one row of output needs are those of the row before.
    """
    pid = tl.program_id(0)
    a = pid % tiles * BW + tl.arange(0, BW)
    phase = pid // tiles % PHASES
    strip = pid // (tiles * PHASES) % strips
    n = (pid // (tiles * PHASES * strips)).to(tl.int64)
    x += n * stride_xn
    y += n * stride_yn
    begin = strip * steps
    end = tl.minimum(begin + steps, (rows - phase + PHASES - 1) // PHASES)
    r = tl.arange(0, BR)
    inside_a = a < across
    at = a * MUL_A + at_a
    out = (a.to(tl.int64) * stride_ya)[:, None]

    c = tl.arange(0, BC)
    o = tl.arange(0, BO)
    held_first = ()
    held_second = ()
    if HOLD:
        for j in tl.static_range(K1):
            held_first = held_first + (_tile(first + j * stride_fk, c, C, stride_fc, r, R, stride_fr),)
        for i in tl.static_range(K2):
            held_second = held_second + (_tile(second + i * stride_sk, r, R, stride_sr, o, OUT, stride_so),)

    ring = ()
    for _ in tl.static_range(KEEP):
        ring = ring + (tl.zeros((BW, BR), x.dtype.element_ty),)
    if KEEP > 0:
        for halo in range(0, KEEP):
            m, ok = _read((begin * PHASES + phase) * MUL_M + at_m + halo * STEP_M, x_rows, DIV_M)
            row = _inner(
                x + m.to(tl.int64) * stride_xm, first, held_first, inside_a & ok, at, r, x_across, C, R,
                stride_xa, stride_xc, stride_fr, stride_fc, stride_fk,
                DIV_A, STEP_A, K1, C_BLOCKS, HOLD, PRECISION, LOW, BC,
            )  # fmt: skip
            ring = ring[1:] + (row,)
    for t in range(begin, end):
        line = t * PHASES + phase
        window = ring
        for i in tl.static_range(KEEP, K2):
            m, ok = _read(line * MUL_M + at_m + i * STEP_M, x_rows, DIV_M)
            row = _inner(
                x + m.to(tl.int64) * stride_xm, first, held_first, inside_a & ok, at, r, x_across, C, R,
                stride_xa, stride_xc, stride_fr, stride_fc, stride_fk,
                DIV_A, STEP_A, K1, C_BLOCKS, HOLD, PRECISION, LOW, BC,
            )  # fmt: skip
            window = window + (row,)
        for block in range(0, O_BLOCKS):
            o = block * BO + tl.arange(0, BO)
            acc = tl.zeros((BW, BO), tl.float32)
            for i in tl.static_range(K2):
                if HOLD:
                    acc = dot(window[i], held_second[i], acc, PRECISION, LOW)
                else:
                    ws = _tile(second + i * stride_sk, r, R, stride_sr, o, OUT, stride_so)
                    acc = dot(window[i], ws, acc, PRECISION, LOW)
            if bias is not None:
                acc += tl.load(bias + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
            acc = _activate(acc, ACTIVATION)
            pointers = y + line.to(tl.int64) * stride_ym + out + (o.to(tl.int64) * stride_yo)[None, :]
            tl.store(pointers, acc.to(y.dtype.element_ty), mask=inside_a[:, None] & (o < OUT)[None, :])
        # Always true, and gone from the machine code: Triton overlaps no loads where a loop hands on what it was given.
        more = t < end
        ring = ()
        for i in tl.static_range(K2 - KEEP, K2):
            ring = ring + (tl.where(more, window[i], tl.zeros((BW, BR), x.dtype.element_ty)),)


@triton.jit(do_not_specialize=["pixels", "chunk", "U", "V", "x_size", "y_size", "at_x", "at_y"])
def separable_filter_kernel(
    x, w, y, partial,
    pixels, chunk, U, V, x_size, y_size, at_x, at_y, C, R, OUT,
    stride_xn, stride_xu, stride_xv, stride_xc, stride_wr, stride_wc, stride_wk,
    stride_yn, stride_yu, stride_yv, stride_yo,
    MUL_X: tl.constexpr, DIV_X: tl.constexpr, STEP_X: tl.constexpr,
    MUL_Y: tl.constexpr, DIV_Y: tl.constexpr, STEP_Y: tl.constexpr,
    KX: tl.constexpr, KY: tl.constexpr, U_FAST: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, C_BLOCKS: tl.constexpr,
):  # fmt: skip
    """partial[split, t, o, r] = Σ y[at tap t of v, o] h[u, v, r] over a part of the pixels, h the intermediate.

    h is made from x by the filter w along u; y has its taps along v. partial (splits, KY, O, R) is contiguous.
    """
    split = tl.program_id(0)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    columns = (o.to(tl.int64) * stride_yo)[:, None]
    acc = ()
    for _ in tl.static_range(KY):
        acc = acc + (tl.zeros((BO, BR), tl.float32),)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, pixels), BP):
        p = start + tl.arange(0, BP)
        inside = p < pixels
        if U_FAST:
            u = p % U
            v = p // U % V
        else:
            v = p % V
            u = p // V % U
        n = (p // (U * V)).to(tl.int64)
        h = _inner(
            x + n * stride_xn + v.to(tl.int64) * stride_xv, w, (), inside, u * MUL_X + at_x, r, x_size, C, R,
            stride_xu, stride_xc, stride_wr, stride_wc, stride_wk,
            DIV_X, STEP_X, KX, C_BLOCKS, False, PRECISION, LOW, BC,
        )  # fmt: skip
        points = y + n * stride_yn + u.to(tl.int64) * stride_yu
        total = ()
        for i in tl.static_range(KY):
            b, ok = _read(v * MUL_Y + at_y + i * STEP_Y, y_size, DIV_Y)
            ys = tl.load(
                (points + b.to(tl.int64) * stride_yv)[None, :] + columns,
                mask=(ok & inside)[None, :] & (o < OUT)[:, None],
                other=0.0,
            )
            total = total + (dot(ys, h, acc[i], PRECISION, LOW),)
        acc = total
    mask = (o < OUT)[:, None] & (r < R)[None, :]
    for i in tl.static_range(KY):
        rows = (split * KY + i).to(tl.int64) * OUT + o
        tl.store(partial + (rows * R)[:, None] + r[None, :], acc[i], mask=mask)


# Launching


class _Taps(NamedTuple):
    """How taps read along one axis, see the top of the file."""

    mul: int
    div: int
    step: int
    at: int

    @property
    def phases(self) -> int:
        return self.step // math.gcd(self.step, self.mul)

    def keep(self, taps: int) -> int:
        """How many of the rows that one row needs are those of the row before of its phase."""
        return max(0, taps - self.mul // math.gcd(self.step, self.mul))


def _forth(stride: int, padding: int, dilation: int) -> _Taps:
    return _Taps(stride, 1, dilation, -padding)


def _back(stride: int, padding: int, dilation: int, taps: int) -> _Taps:
    """The transpose, for a filter whose taps are reversed."""
    return _Taps(1, stride, dilation, padding - (taps - 1) * dilation)


def _width(n: int, most: int) -> int:
    return min(max(16, bucket(n)), most)


_READS_SHARED = (("cuda", "90"), ("cuda", "100"))


def _candidates(c: int, r: int, o: int, k2: int, low: bool, target: Target) -> list[dict[str, Any]]:
    """Launch configurations of the convolution, the default first."""
    br, ring = _width(r, MAX_RANK), k2 * _width(r, MAX_RANK)
    if target[0] == "interpreter":
        shapes = [(16, 16, 32, 4, 1), (32, 32, 16, 4, 1)]
    elif not low:
        shapes = [(32, 32, 32, 8, 1)] if ring <= 160 else [(16, 16, 32, 4, 1)]
    elif target[0] == "hip":
        shapes = [(64, 64, 64, 4 if ring <= 320 else 8, 1)]
    elif ring <= 192:
        shapes = [(64, 64, 64, 8, 2), (64, 64, 64, 4, 2), (64, 64, 64, 4, 1), (128, 64, 64, 8, 1)]
    else:
        shapes = [(64, 64, 64, 8, 2), (64, 64, 64, 8, 1)]
    found = []
    for bw, most_c, most_o, warps, stages in shapes:
        bc, bo = _width(c, most_c), _width(o, most_o)
        blocks = {"BW": bw, "BC": bc, "BR": br, "BO": bo, "C_BLOCKS": cdiv(c, bc), "O_BLOCKS": cdiv(o, bo)}
        # Filters stay in shared memory where matrix units read it, and all of them fits.
        hold = low and target in _READS_SHARED and c <= bc and o <= bo
        found.append(blocks | {"HOLD": hold, "num_warps": warps, "num_stages": stages})
    return found


def _filter_candidates(c: int, r: int, o: int, ky: int, low: bool, target: Target) -> list[dict[str, Any]]:
    """Launch configurations of the filters' gradients: KY accumulators of BO · BR numbers, the default first."""
    if target[0] == "interpreter":
        shapes = [(16, 16, 16, 32, 4, 1), (32, 32, 32, 16, 4, 1)]
    elif not low:
        shapes = [(32, 16, 16, 32 if ky <= 5 else 16, 4, 1)]
    elif ky <= 5:
        shapes = [(64, 64, 32, 64, 8, 1), (64, 64, 32, 64, 8, 2), (64, 64, 64, 64, 8, 1)]
    elif ky <= 10:
        shapes = [(64, 64, 16, 64, 8, 1)]
    else:
        shapes = [(64, 32, 16, 16, 4, 1)]
    if target[0] == "hip":
        shapes = shapes[:1]
    found = []
    for bp, most_c, most_r, most_o, warps, stages in shapes:
        bc = _width(c, most_c)
        blocks = {"BP": bp, "BC": bc, "BR": _width(r, most_r), "BO": _width(o, most_o), "C_BLOCKS": cdiv(c, bc)}
        found.append(blocks | {"num_warps": warps, "num_stages": stages})
    return found


def unsupported(c: int, r: int, o: int, kernel: tuple[int, int], dtype: torch.dtype) -> str | None:
    """What of such filters the kernels do not support, in words, or None."""
    if dtype not in DTYPES:
        return f"{dtype}".removeprefix("torch.")
    if r > MAX_RANK:
        return f"ranks above {MAX_RANK}, got {r}"
    for k in kernel:  # each filter is the second one, forward or backward
        if k * _width(r, MAX_RANK) > _MAX_RING:
            return f"a rank of {r} with filters of {k} taps: their product must be at most {_MAX_RING}"
    return None


def _precision(dtype: torch.dtype, device: torch.device) -> tuple[str, bool]:
    low = dtype != torch.float32
    # The interpreter's time goes by operations: one product for each instead of three.
    precision = dot_precision(_lib.target_of(device), "ieee" if INTERPRET else None, low=low)
    return precision, low and not INTERPRET


def _march(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None,
    across: int,
    taps: tuple[_Taps, _Taps],
    size: Sequence[int],
    activation: str | None,
    candidates: list[dict[str, Any]] | None = None,
) -> torch.Tensor:
    """The chain, with ``taps`` and ``size`` for both axes of the image; ``candidates`` overrides the configurations."""
    batch, channels, out, (r, _, k1), k2 = *x.shape[:2], second.shape[0], first.shape, second.shape[2]
    y = _like(x, (batch, out, *size))
    if y.numel() == 0:
        return y
    if x.numel() == 0 or r == 0:
        return _activated(y.zero_() if bias is None else y.copy_(bias[:, None, None].expand_as(y)), activation)
    march, along, other = 1 - across, taps[across], taps[1 - across]
    precision, low = _precision(x.dtype, x.device)
    target = _lib.target_of(x.device)
    if candidates is None:
        candidates = _candidates(channels, r, out, k2, x.dtype != torch.float32, target)
    phases, keep = other.phases, other.keep(k2)
    arguments = {
        "x": x, "first": first, "second": second, "bias": None if bias is None else bias.contiguous(), "y": y,
        "across": size[across], "rows": size[march], "x_across": x.shape[2 + across], "x_rows": x.shape[2 + march],
        "at_a": along.at, "at_m": other.at, "C": channels, "R": r, "OUT": out,
        "stride_xn": x.stride(0), "stride_xm": x.stride(2 + march), "stride_xa": x.stride(2 + across),
        "stride_xc": x.stride(1), "stride_fr": first.stride(0), "stride_fc": first.stride(1),
        "stride_fk": first.stride(2), "stride_so": second.stride(0), "stride_sr": second.stride(1),
        "stride_sk": second.stride(2), "stride_yn": y.stride(0), "stride_ym": y.stride(2 + march),
        "stride_ya": y.stride(2 + across), "stride_yo": y.stride(1),
        "MUL_A": along.mul, "DIV_A": along.div, "STEP_A": along.step,
        "MUL_M": other.mul, "DIV_M": other.div, "STEP_M": other.step, "K1": k1, "K2": k2, "KEEP": keep,
        "PHASES": phases, "ACTIVATION": activation, "PRECISION": precision, "LOW": low,
    }  # fmt: skip
    lines = cdiv(size[march], phases)

    def launch(meta: dict[str, Any]) -> None:
        tiles = cdiv(size[across], meta["BW"])
        # Enough programs for every processor, and strips long enough for the rows made twice to weigh little.
        wanted = cdiv(8 * _lib.multiprocessors(x.device), batch * tiles * phases)
        steps = max(cdiv(lines, wanted), min(lines, 8 * max(keep, 1)))
        strips = cdiv(lines, steps)
        grid = (tiles * phases * strips * batch,)
        separable_conv_kernel[grid](**arguments, tiles=tiles, strips=strips, steps=steps, **meta)

    key = (channels, r, out, k1, k2, *along[:3], *other[:3], x.dtype, precision, x.stride(1) == 1, across)
    with _lib.device_guard(x):
        launch(_lib.pick("separable_conv", key, candidates, launch, x.device))
    return y


def _filter_sums(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    along: int,
    x_taps: _Taps,
    y_taps: _Taps,
    domain: tuple[int, int],
    taps: int,
    candidates: list[dict[str, Any]] | None = None,
) -> torch.Tensor:
    """Σ over pixels of y, at each of its ``taps`` along the other axis, times w * x along axis ``along``: (k, O, R)."""
    batch, channels, out, (r, _, k) = *x.shape[:2], y.shape[1], w.shape
    other = 1 - along
    pixels = batch * domain[0] * domain[1]
    if pixels == 0 or 0 in (channels, out, r, x.numel(), y.numel()):
        return x.new_zeros(taps, out, r, dtype=torch.float32)
    if pixels >= 2**31:
        raise ValueError(f"x must have less than 2^31 pixels, got {pixels}")
    precision, low = _precision(x.dtype, x.device)
    if candidates is None:
        target = _lib.target_of(x.device)
        candidates = _filter_candidates(channels, r, out, taps, x.dtype != torch.float32, target)
    arguments = {
        "x": x, "w": w, "y": y, "pixels": pixels, "U": domain[along], "V": domain[other],
        "x_size": x.shape[2 + along], "y_size": y.shape[2 + other], "at_x": x_taps.at, "at_y": y_taps.at,
        "C": channels, "R": r, "OUT": out,
        "stride_xn": x.stride(0), "stride_xu": x.stride(2 + along), "stride_xv": x.stride(2 + other),
        "stride_xc": x.stride(1), "stride_wr": w.stride(0), "stride_wc": w.stride(1), "stride_wk": w.stride(2),
        "stride_yn": y.stride(0), "stride_yu": y.stride(2 + along), "stride_yv": y.stride(2 + other),
        "stride_yo": y.stride(1), "MUL_X": x_taps.mul, "DIV_X": x_taps.div, "STEP_X": x_taps.step,
        "MUL_Y": y_taps.mul, "DIV_Y": y_taps.div, "STEP_Y": y_taps.step, "KX": k, "KY": taps,
        "U_FAST": x.stride(2 + along) < x.stride(2 + other), "PRECISION": precision, "LOW": low,
    }  # fmt: skip
    result: list[torch.Tensor] = []

    def launch(meta: dict[str, Any]) -> None:
        tiles = cdiv(r, meta["BR"]), cdiv(out, meta["BO"])
        wanted = cdiv(4 * _lib.multiprocessors(x.device), tiles[0] * tiles[1])
        chunk = cdiv(cdiv(pixels, wanted), meta["BP"]) * meta["BP"]
        splits = cdiv(pixels, chunk)
        partial = torch.empty(splits, taps, out, r, dtype=torch.float32, device=x.device)
        separable_filter_kernel[(splits, *tiles)](**arguments, partial=partial, chunk=chunk, **meta)
        result[:] = [partial.sum(0)]

    key = (channels, r, out, k, taps, *x_taps[:3], *y_taps[:3], x.dtype, precision, x.stride(1) == 1, along)
    with _lib.device_guard(x):
        launch(_lib.pick("separable_filter", key, candidates, launch, x.device))
    return result[0]


def _like(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """An empty image in the memory format of ``x``."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=form)


def _activated(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    return z if activation is None else F.silu(z)


def _slope(z: torch.Tensor, grad: torch.Tensor, activation: str | None) -> torch.Tensor:
    """act'(z) grad."""
    if activation == "relu":
        return torch.where(z > 0, grad, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    if activation == "silu":
        share = z.sigmoid()
        return grad * share * (1 + z * (1 - share))
    return grad


def _check(name, x, first, second, across, stride, padding, dilation, channels) -> None:
    """``x`` is the image called ``name``, with the channels of ``first`` or ``second``, dimension ``channels``."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    for label, tensor in (("first", first), ("second", second)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{label} must be {x.dtype}, the dtype of {name}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{label} must be on {x.device}, where {name} is, got {tensor.device}")
        if tensor.ndim != 3 or tensor.shape[2] < 1:
            raise ValueError(f"{label} must have shape (out, in, taps), got {tuple(tensor.shape)}")
    if second.shape[1] != first.shape[0]:
        raise ValueError(f"second must have shape (O, {first.shape[0]}, k), got {tuple(second.shape)}")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must have shape (N, {channels}, H, W), got {tuple(x.shape)}")
    if across not in (0, 1):
        raise ValueError(f"across must be 0 or 1, got {across}")
    if len(stride) != 2 or len(padding) != 2 or len(dilation) != 2 or min(*stride, *dilation) < 1:
        raise ValueError(
            f"stride, padding, dilation must be pairs of positive numbers, got {stride}, {padding}, {dilation}"
        )
    lack = unsupported(first.shape[1], first.shape[0], second.shape[0], (first.shape[2], second.shape[2]), x.dtype)
    if lack is not None:
        raise ValueError(f"first and second must be in the kernel's range, which lacks {lack}")


# Operation: the convolution


def _conv(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None,
    across: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    activation: str | None,
) -> torch.Tensor:
    _check_conv(x, first, second, bias, across, stride, padding, dilation, activation)
    geometry = list(zip(stride, padding, dilation, strict=True))
    taps = _forth(*geometry[0]), _forth(*geometry[1])
    return _march(x, first, second, bias, across, taps, size, activation)


def _check_conv(x, first, second, bias, across, stride, padding, dilation, activation) -> None:
    _check("x", x, first, second, across, stride, padding, dilation, first.shape[1])
    if bias is not None and (bias.shape != second.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"bias must have shape ({second.shape[0]},), the dtype and the device of x, "
            f"got {tuple(bias.shape)}, {bias.dtype}, {bias.device}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")


def _padded(x: torch.Tensor, axis: int, taps: int, stride: int, padding: int, dilation: int, size: int) -> torch.Tensor:
    """``x`` with zeros before and behind an axis, so that a convolution over it without padding has ``size`` points."""
    behind = (size - 1) * stride + dilation * (taps - 1) + 1 - padding - x.shape[2 + axis]
    return F.pad(x, (0, 0, padding, behind) if axis == 0 else (padding, behind))


def _filtered(x, weight, axis, stride, padding, dilation, size) -> torch.Tensor:
    """One one-way filter, (out, in, taps) along ``axis``, in plain torch."""
    padded = _padded(x, axis, weight.shape[2], stride[axis], padding[axis], dilation[axis], size[axis])
    options = [(stride[axis], 1), (dilation[axis], 1)] if axis == 0 else [(1, stride[axis]), (1, dilation[axis])]
    return F.conv2d(padded, weight.unsqueeze(3 - axis), None, options[0], 0, options[1])


def _conv_reference(x, first, second, bias, across, stride, padding, dilation, size, activation) -> torch.Tensor:
    _check_conv(x, first, second, bias, across, stride, padding, dilation, activation)
    y = _like(x, (x.shape[0], second.shape[0], *size))
    if y.numel() == 0:
        return y
    for axis, weight in ((across, first), (1 - across, second)):
        x = _filtered(x, weight, axis, stride, padding, dilation, size)
    return y.copy_(_activated(x if bias is None else x + bias[:, None, None], activation))


_conv_op = custom_op("separable_conv", _conv)
register_reference(_conv_op, _conv_reference)


@_conv_op.register_fake
def _(x, first, second, bias, across, stride, padding, dilation, size, activation):
    return _like(x, (x.shape[0], second.shape[0], *size))


# Operation: its transpose


def _input(
    g: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    across: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> torch.Tensor:
    _check("g", g, first, second, across, stride, padding, dilation, second.shape[0])
    lengths = (first.shape[2], second.shape[2]) if across == 0 else (second.shape[2], first.shape[2])
    taps = tuple(_back(*of) for of in zip(stride, padding, dilation, lengths, strict=True))
    forth, back = second.flip(2).transpose(0, 1), first.flip(2).transpose(0, 1)
    return _march(g, forth, back, None, 1 - across, taps, size, None)  # type: ignore[arg-type]


def _filtered_back(g, weight, axis, stride, padding, dilation, size) -> torch.Tensor:
    """The transpose of :func:`_filtered`; ``size`` is that of the filter's input."""
    options = [(stride[axis], 1), (dilation[axis], 1)] if axis == 0 else [(1, stride[axis]), (1, dilation[axis])]
    full = F.conv_transpose2d(g, weight.unsqueeze(3 - axis), None, options[0], 0, 0, 1, options[1])
    behind = size[axis] + padding[axis] - full.shape[2 + axis]
    full = F.pad(full, (0, 0, 0, behind) if axis == 0 else (0, behind))
    return full.narrow(2 + axis, padding[axis], size[axis])


def _input_reference(g, first, second, across, stride, padding, dilation, size) -> torch.Tensor:
    _check("g", g, first, second, across, stride, padding, dilation, second.shape[0])
    x = _like(g, (g.shape[0], first.shape[1], *size))
    if x.numel() == 0 or g.numel() == 0:
        return x.zero_()
    for axis, weight in ((1 - across, second), (across, first)):
        g = _filtered_back(g, weight, axis, stride, padding, dilation, size)
    return x.copy_(g)


_input_op = custom_op("separable_conv_input", _input)
register_reference(_input_op, _input_reference)


@_input_op.register_fake
def _(g, first, second, across, stride, padding, dilation, size):
    return _like(g, (g.shape[0], first.shape[1], *size))


# Operation: the filters' gradients


def _filters(
    x: torch.Tensor,
    g: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    across: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    wants: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    _check("x", x, first, second, across, stride, padding, dilation, first.shape[1])
    _check("g", g, first, second, across, stride, padding, dilation, second.shape[0])
    march, k1, k2 = 1 - across, first.shape[2], second.shape[2]
    # Where the intermediate lives: the image's axis of x along the second filter, that of g along the first.
    domain = (g.shape[2], x.shape[3]) if across == 0 else (x.shape[2], g.shape[3])
    forth = _forth(stride[across], padding[across], dilation[across])
    # Taps in their own order, walking backwards.
    back = _Taps(1, stride[march], -dilation[march], padding[march])
    grads = [x.new_empty(0), x.new_empty(0)]
    if wants[0]:
        sums = _filter_sums(g, second.transpose(0, 1), x, march, back, forth, domain, k1)
        grads[0] = sums.permute(2, 1, 0).to(x.dtype).contiguous()
    if wants[1]:
        sums = _filter_sums(x, first, g, across, forth, back, domain, k2)
        grads[1] = sums.permute(1, 2, 0).to(x.dtype).contiguous()
    return grads[0], grads[1]


def _weight_gradient(x, g, axis, taps, stride, padding, dilation) -> torch.Tensor:
    """Gradient of the filter in :func:`_filtered`, (out, in, taps)."""
    padded = _padded(x, axis, taps, stride[axis], padding[axis], dilation[axis], g.shape[2 + axis])
    shape = (g.shape[1], x.shape[1], taps)
    options = [(stride[axis], 1), (dilation[axis], 1)] if axis == 0 else [(1, stride[axis]), (1, dilation[axis])]
    wide = (*shape, 1) if axis == 0 else (*shape[:2], 1, taps)
    return conv2d_weight(padded, wide, g, options[0], 0, options[1]).reshape(shape)


def _filters_reference(x, g, first, second, across, stride, padding, dilation, wants):
    _check("x", x, first, second, across, stride, padding, dilation, first.shape[1])
    _check("g", g, first, second, across, stride, padding, dilation, second.shape[0])
    if x.numel() == 0 or g.numel() == 0:
        pairs = zip((first, second), wants, strict=True)
        return tuple(torch.zeros_like(w) if want else x.new_empty(0) for w, want in pairs)
    geometry, march = (stride, padding, dilation), 1 - across
    grads = [x.new_empty(0), x.new_empty(0)]
    if wants[0]:
        inner = _filtered_back(g, second, march, *geometry, x.shape[2:])
        grads[0] = _weight_gradient(x, inner, across, first.shape[2], *geometry)
    if wants[1]:
        inner = _filtered(x, first, across, *geometry, g.shape[2:])
        grads[1] = _weight_gradient(inner, g, march, second.shape[2], *geometry)
    return grads[0], grads[1]


_filters_op = custom_op("separable_conv_filters", _filters)
register_reference(_filters_op, _filters_reference)


@_filters_op.register_fake
def _(x, g, first, second, across, stride, padding, dilation, wants):
    shapes = [w.shape if want else (0,) for w, want in zip((first, second), wants, strict=True)]
    return x.new_empty(shapes[0]), x.new_empty(shapes[1])


# Derivatives. All three are multilinear in image, cotangent and filters, and those of each are calls of the others.


def _conv_setup(ctx, inputs, output) -> None:
    x, first, second, bias, *ctx.geometry, ctx.activation = inputs
    ctx.save_for_backward(x, first, second, None if ctx.activation is None else bias)


def _conv_backward(ctx, grad):
    (x, first, second, bias), (*geometry, size) = ctx.saved_tensors, ctx.geometry
    grad_x = grad_first = grad_second = grad_bias = None
    if ctx.activation is not None:
        grad = _slope(_conv_op(x, first, second, bias, *geometry, size, None), grad, ctx.activation)
    wants = list(ctx.needs_input_grad[1:3])
    if ctx.needs_input_grad[0]:
        grad_x = _input_op(grad, first, second, *geometry, x.shape[2:])
    if any(wants):
        found = _filters_op(x, grad, first, second, *geometry, wants)
        grad_first, grad_second = (t if want else None for t, want in zip(found, wants, strict=True))
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_first, grad_second, grad_bias, *(None,) * 6


_conv_op.register_autograd(_conv_backward, setup_context=_conv_setup)


def _input_setup(ctx, inputs, output) -> None:
    g, first, second, *ctx.geometry, _ = inputs
    ctx.save_for_backward(g, first, second)


def _input_backward(ctx, grad):
    g, first, second = ctx.saved_tensors
    grad_g = grad_first = grad_second = None
    wants = list(ctx.needs_input_grad[1:3])
    if ctx.needs_input_grad[0]:
        grad_g = _conv_op(grad, first, second, None, *ctx.geometry, g.shape[2:], None)
    if any(wants):
        found = _filters_op(grad, g, first, second, *ctx.geometry, wants)
        grad_first, grad_second = (t if want else None for t, want in zip(found, wants, strict=True))
    return grad_g, grad_first, grad_second, *(None,) * 5


_input_op.register_autograd(_input_backward, setup_context=_input_setup)


def _filters_setup(ctx, inputs, output) -> None:
    x, g, first, second, *ctx.geometry, ctx.wants = inputs
    ctx.save_for_backward(x, g, first, second)
    ctx.set_materialize_grads(False)


def _filters_backward(ctx, grad_first, grad_second):
    """<grad_first, dfirst> is <g, conv(x, grad_first, second)>, and likewise for the second filter."""
    x, g, first, second = ctx.saved_tensors
    pairs = []  # filters with one of them replaced by its cotangent
    if ctx.wants[0] and grad_first is not None:
        pairs.append((grad_first, second))
    if ctx.wants[1] and grad_second is not None:
        pairs.append((first, grad_second))
    results: list[torch.Tensor | None] = [None] * 4
    for a, b in pairs:
        if ctx.needs_input_grad[0]:
            more = _input_op(g, a, b, *ctx.geometry, x.shape[2:])
            results[0] = more if results[0] is None else results[0] + more
        if ctx.needs_input_grad[1]:
            more = _conv_op(x, a, b, None, *ctx.geometry, g.shape[2:], None)
            results[1] = more if results[1] is None else results[1] + more
        if a is first and ctx.needs_input_grad[2]:
            results[2] = _filters_op(x, g, a, b, *ctx.geometry, [True, False])[0]
        if b is second and ctx.needs_input_grad[3]:
            results[3] = _filters_op(x, g, a, b, *ctx.geometry, [False, True])[1]
    return *results, *(None,) * 5


_filters_op.register_autograd(_filters_backward, setup_context=_filters_setup)


def separable_conv(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None,
    across: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    activation: str | None = None,
) -> torch.Tensor:
    """act(second * (first * x) + bias), the filters along one axis each; x and the filters are all that is kept.

    Differentiable to any order; the same bits each time.

    Args:
        x: (N, C, H, W), float32, float16 or bfloat16, any strides.
        first, second: (R, C, k1) and (O, R, k2) in the dtype of ``x``, any strides; see :func:`unsupported`.
        bias: (O,) in the dtype of ``x``, or None.
        across: the first filter's axis, 0 for H and 1 for W; the second has the other.
        stride, dilation: for (H, W), positive.
        padding: zeros before (H, W); how many follow is said by ``size``.
        size: of the output, (H', W').
        activation: None, "relu", "gelu" (by erf) or "silu". It is differentiated at the argument computed again.

    Returns:
        (N, O, H', W') in the dtype and memory format of ``x``; sums are in float32.

    Raises:
        TypeError: another dtype. ValueError: shapes, options or devices that do not fit.
    """
    return _conv_op(x, first, second, bias, across, stride, padding, dilation, size, activation)


def separable_conv_input(
    g: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    across: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> torch.Tensor:
    """The transpose of :func:`separable_conv`: g (N, O, H', W') to (N, C, ``*size``); the arguments are those there."""
    return _input_op(g, first, second, across, stride, padding, dilation, size)


# Production configurations: 64 channels in and out, rank 32, the default of each target.


def _register(
    label: str, dtype: torch.dtype, taps: int, c: int, r: int, o: int, budget: dict[str, int], *, back: bool = False
) -> None:
    """The convolution, and with ``back`` the sums over pixels, of channels-last images, order "vh"."""
    low, kind = dtype != torch.float32, "*fp32:16" if dtype == torch.float32 else "*bf16:16"
    wide = dict.fromkeys(("stride_xn", "C", "R", "OUT", "stride_yn"), "i32:16")
    shared: dict[str, Any] = {"stride_xc": 1, "stride_yo": 1, "LOW": low}
    shared["PRECISION"] = lambda target: dot_precision(target, low=low)
    if back:
        counts = ("pixels", "chunk", "U", "V", "x_size", "y_size", "at_x", "at_y")
        signature = dict.fromkeys(counts, "i32") | dict.fromkeys(("x", "w", "y"), kind) | {"partial": "*fp32:16"} | wide
        signature |= dict.fromkeys(("stride_xu", "stride_xv", "stride_wr", "stride_yu", "stride_yv"), "i32:16")
        signature |= {"stride_wc": "i32"}
        constants = shared | {"stride_wk": 1, "KX": taps, "KY": taps, "U_FAST": False}
        constants |= {"MUL_X": 1, "DIV_X": 1, "STEP_X": 1, "MUL_Y": 1, "DIV_Y": 1, "STEP_Y": -1}
        kernel, name, found = separable_filter_kernel, "separable_filter", _filter_candidates
    else:
        counts = ("tiles", "strips", "steps", "across", "rows", "x_across", "x_rows", "at_a", "at_m")
        signature = dict.fromkeys(counts, "i32") | dict.fromkeys(("x", "first", "second", "bias", "y"), kind) | wide
        signature |= dict.fromkeys(("stride_xm", "stride_xa", "stride_fr", "stride_so", "stride_ym"), "i32:16")
        signature |= {"stride_ya": "i32:16", "stride_fc": "i32", "stride_sr": "i32"}
        constants = shared | {"stride_fk": 1, "stride_sk": 1, "K1": taps, "K2": taps, "KEEP": taps - 1, "PHASES": 1}
        constants |= {"MUL_A": 1, "DIV_A": 1, "STEP_A": 1, "MUL_M": 1, "DIV_M": 1, "STEP_M": 1, "ACTIVATION": "gelu"}
        kernel, name, found = separable_conv_kernel, "separable_conv", _candidates
    register_defaults(
        kernel,
        f"{name}[{label}]",
        signature,
        constants,
        lambda target: found(c, r, o, taps, low, target)[0],
        tensor_cores=low,
        spill_budget=budget,
        note=_NOTE,
    )


_NOTE = (
    "What spills are the rows that the second filter waits for: on sm_80 at five taps a few of them, in float32, where "
    "each is held as the halves of its numbers, most. Float32 is taken where it is asked for, never by itself. Its "
    "tiles have less than 64 rows, which is mma.sync on every CUDA target."
)
_register("bf16,k3,r32", torch.bfloat16, 3, 64, 32, 64, {})
_register("bf16,k3,r32", torch.bfloat16, 3, 64, 32, 64, {}, back=True)
_register("bf16,k5,r32", torch.bfloat16, 5, 64, 32, 64, {"sm_80": 96})
_register("bf16,k5,r32", torch.bfloat16, 5, 64, 32, 64, {}, back=True)
_register("bf16,k3,r64", torch.bfloat16, 3, 128, 64, 128, {})
_register("fp32,k5,r32", torch.float32, 5, 64, 32, 64, {"sm_80": 504, "sm_90": 424, "sm_100": 456})
_register("fp32,k5,r32", torch.float32, 5, 64, 32, 64, {}, back=True)
