"""Truncated Fourier transforms over the last d axes of (B, C, N1, ..., Nd): only the kept frequencies are computed.

:func:`forward` gives, and :func:`inverse` takes, the spectrum as real planes, modes-major: (K, 2, B, C) with
K = k1 ... kd, the layout in which mixing channels is a batched matrix product. Two plain-torch ways:

- ``dft``: a matrix product an axis, in real arithmetic. A complex matrix acts on real planes as the real matrix of
  twice the size whose 2×2 blocks are [[Re, -Im], [Im, Re]]; its rows and columns are ordered so that the result of
  one axis is the operand of the next without a copy.
- ``fft``: :mod:`torch.fft` an axis, dropping frequencies as soon as an axis is done, with no shifts and no buffer of
  the full spectrum. ``mixed`` is the same with the last axis, the one that sees the whole field, as a matrix product.

Nothing is saved for the backward pass: a transform's adjoint is the other transform.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._tables import register_table, table

__all__ = ["METHODS", "choose_method", "forward", "inverse", "spectrum", "synthesis", "transposed"]

METHODS = ("fft", "dft", "mixed")


# --- tables -----------------------------------------------------------------------------------------------------


def _basis(size: int, k: int, one_sided: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π f n / size, (k, size) each; the phase is reduced as an integer before it is rounded."""
    f = torch.arange(k) - (0 if one_sided else k // 2)
    phase = (f[:, None] * torch.arange(size)) % size
    angle = phase.double() * (2 * math.pi / size)
    return torch.cos(angle), torch.sin(angle)


def _doubling(size: int, k: int) -> Tensor:
    """c(f): a one-sided mode stands for ±f, except frequency 0 and the Nyquist frequency."""
    f = torch.arange(k)
    return 2.0 - ((f == 0) | (2 * f == size)).double()


@register_table("spectral_doubling", shape=lambda size, k: (k,))
def _doubling_table(size: int, k: int) -> Tensor:
    return _doubling(size, k)


@register_table("spectral_blocks", shape=lambda size, k: (2 * k, 2 * size))
def _blocks(size: int, k: int) -> Tensor:
    """exp(-2πi f n / size) / size as real 2×2 blocks, rows ordered (plane, f), columns (n, plane)."""
    c, s = _basis(size, k, 0)
    blocks = torch.stack((torch.stack((c, s), -1), torch.stack((-s, c), -1)))
    return blocks.reshape(2 * k, 2 * size) / size


@register_table("spectral_blocks_inverse", shape=lambda size, k: (2 * size, 2 * k))
def _blocks_inverse(size: int, k: int) -> Tensor:
    """exp(2πi f n / size) as real 2×2 blocks, rows ordered (n, plane), columns (plane, f)."""
    return _blocks(size, k).t().contiguous() * size


@register_table("spectral_rows", shape=lambda size, k, interleaved: (size, 2 * k))
def _rows(size: int, k: int, interleaved: int) -> Tensor:
    """exp(-2πi f n / size) / size for f = 0, ..., k - 1; columns (plane, f), or (f, plane) interleaved."""
    c, s = _basis(size, k, 1)
    return torch.stack((c, -s), 1 if interleaved else 0).reshape(2 * k, size).t().contiguous() / size


@register_table("spectral_rows_inverse", shape=lambda size, k, interleaved: (2 * k, size))
def _rows_inverse(size: int, k: int, interleaved: int) -> Tensor:
    """Re c(f) Y exp(2πi f n / size) as a matrix on Y's planes; rows (plane, f), or (f, plane) interleaved."""
    c, s = _basis(size, k, 1)
    weight = _doubling(size, k)[:, None]
    return torch.stack((weight * c, -weight * s), 1 if interleaved else 0).reshape(2 * k, size)


@register_table("spectral_planes", shape=lambda size, k, one_sided, inverse: (2, size, k) if inverse else (2, k, size))
def _planes(size: int, k: int, one_sided: int, inverse: int) -> Tensor:
    """The bases as (re, im) planes, as the Triton kernels take them, scale and doubling included."""
    c, s = _basis(size, k, one_sided)
    if not inverse:
        return torch.stack((c, -s)) / size
    weight = _doubling(size, k)[:, None] if one_sided else 1.0
    return torch.stack((c * weight, s * weight)).transpose(1, 2).contiguous()


@register_table("spectral_resample", shape=lambda n, m: (n, m))
def _resample(n: int, m: int) -> Tensor:
    """The trigonometric interpolation from n to m points, as a matrix to multiply from the right."""
    q = min(n, m)
    f = torch.arange(-(q // 2), q // 2 + 1)
    weight = torch.ones(len(f), dtype=torch.float64)
    if q == n and n % 2 == 0:
        weight[0] = weight[-1] = 0.5
    turns = (torch.arange(m)[None] * n - torch.arange(n)[:, None] * m) % (n * m)
    phase = (turns[..., None] * f) % (n * m)
    return (torch.cos(phase.double() * (2 * math.pi / (n * m))) * weight).sum(-1) / n


# --- by matrix products -----------------------------------------------------------------------------------------


def _forward_dft(x: Tensor, modes: tuple[int, ...]) -> Tensor:
    batch, grid = x.shape[:2], x.shape[2:]
    like: dict[str, Any] = {"dtype": x.real.dtype, "device": x.device}
    if x.is_complex():
        last = table("spectral_blocks", grid[-1], modes[-1], **like).t()
        rows = torch.view_as_real(x).flatten(-2)
    else:
        last, rows = table("spectral_rows", grid[-1], modes[-1], 0, **like), x
    y = rows.reshape(-1, rows.shape[-1]) @ last
    inner = modes[-1]
    for axis in range(len(grid) - 2, -1, -1):
        outer = math.prod(batch) * math.prod(grid[:axis])
        y = table("spectral_blocks", grid[axis], modes[axis], **like) @ y.view(outer, 2 * grid[axis], inner)
        inner = inner * modes[axis]
    return y.view(*batch, 2, *modes)


def _inverse_dft(y: Tensor, size: tuple[int, ...], complex_data: bool) -> Tensor:
    batch, modes = y.shape[:2], y.shape[3:]
    like: dict[str, Any] = {"dtype": y.dtype, "device": y.device}
    outer = math.prod(batch)
    for axis in range(len(size) - 1):
        inner = math.prod(modes[axis + 1 :])
        y = table("spectral_blocks_inverse", size[axis], modes[axis], **like) @ y.reshape(outer, 2 * modes[axis], inner)
        outer = outer * size[axis]
    if complex_data:
        last = table("spectral_blocks_inverse", size[-1], modes[-1], **like).t()
        y = y.reshape(outer, 2 * modes[-1]) @ last
        return torch.view_as_complex(y.view(*batch, *size, 2))
    y = y.reshape(outer, 2 * modes[-1]) @ table("spectral_rows_inverse", size[-1], modes[-1], 0, **like)
    return y.view(*batch, *size)


# --- by FFTs ----------------------------------------------------------------------------------------------------


def _select(x: Tensor, dim: int, k: int) -> Tensor:
    """The ``k`` signed frequencies around zero in ascending order, out of FFT order."""
    n = x.shape[dim]
    if k == 1:
        return x.narrow(dim, 0, 1)
    return torch.cat((x.narrow(dim, n - k // 2, k // 2), x.narrow(dim, 0, k - k // 2)), dim)


def _embed(y: Tensor, dim: int, n: int) -> Tensor:
    """The adjoint of :func:`_select`: ascending frequencies back into FFT order, zeros between."""
    k = y.shape[dim]
    shape = list(y.shape)
    shape[dim] = n
    x = y.new_empty(shape)
    x.narrow(dim, 0, k - k // 2).copy_(y.narrow(dim, k // 2, k - k // 2))
    x.narrow(dim, k - k // 2, n - k).zero_()
    x.narrow(dim, n - k // 2, k // 2).copy_(y.narrow(dim, 0, k // 2))
    return x


# Above it glibc gives memory back at once, and each new buffer is paid for page by page.
_LARGE_BUFFER = 32 * 2**20


def _by_matrix(method: str, rows: int, n: int, k: int, dtype: torch.dtype, *, inverse: bool) -> bool:
    """Whether ``rows`` lines of ``n`` points are transformed from or to ``k`` one-sided frequencies by a matrix.

    Only the last axis sees the whole field. Per point a matrix product costs k, and an FFT log2 n + 1 times 0.8, and
    30 more where the full spectrum, which it writes, is a large buffer; an inverse FFT also has to fill that spectrum
    with zeros. So it was measured on CPUs with AVX-512 (float32, MKL, one and two threads), where a forward matrix
    product has no gain on an FFT but the smaller result.
    """
    if method != "auto":
        return method == "mixed"
    large = rows * (n + 2) * dtype.itemsize > _LARGE_BUFFER
    if inverse:
        return k <= 1.3 * (math.log2(n) + 1) + 30 * large
    return large and k <= 0.8 * (math.log2(n) + 1) + 30


def _fft_forward(x: Tensor, modes: tuple[int, ...], adjoint: bool, method: str, major: bool) -> Tensor:
    """The kept frequencies of ``x``, modes-major if ``major``; ``adjoint``: by the transpose of the inverse instead."""
    norm = "backward" if adjoint else "forward"
    weighted = adjoint and not x.is_complex()
    n = x.shape[-1]
    if x.is_complex():
        y = _select(torch.fft.fft(x, norm=norm), -1, modes[-1])
    elif _by_matrix(method, x.numel() // n, n, modes[-1], x.dtype, inverse=False):
        matrix = _row_matrix(n, modes[-1], adjoint, x)
        y = torch.view_as_complex((x.reshape(-1, n) @ matrix).view(*x.shape[:-1], modes[-1], 2))
        weighted = False  # c(f) is part of the matrix
    else:
        y = torch.fft.rfft(x, norm=norm).narrow(-1, 0, modes[-1])
    for dim in range(x.ndim - 2, 1, -1):
        y = _select(torch.fft.fft(y, dim=dim, norm=norm), dim, modes[dim - 2])
    if weighted:
        y = y * _doubled(n, modes[-1], x)
    if not major:
        return y
    return y.reshape(-1, math.prod(modes)).t().contiguous().view(-1, *x.shape[:2])


def _fft_inverse(
    y: Tensor,
    modes: tuple[int, ...],
    size: tuple[int, ...],
    adjoint: bool,
    method: str,
    major: bool,
    complex_data: bool,
) -> Tensor:
    """The field of the kept frequencies ``y``; ``adjoint``: by the transpose of the forward transform instead."""
    norm = "backward" if adjoint else "forward"
    if major:
        y = y.reshape(y.shape[0], -1).t().contiguous().view(*y.shape[1:], *modes)
    rows = math.prod((*y.shape[:2], *size[:-1]))
    by_matrix = not complex_data and _by_matrix(method, rows, size[-1], modes[-1], y.real.dtype, inverse=True)
    if adjoint and not complex_data and not by_matrix:
        y = y / _doubled(size[-1], modes[-1], y)
    for dim in range(2, y.ndim - 1):
        y = torch.fft.ifft(_embed(y, dim, size[dim - 2]), dim=dim, norm=norm)
    if complex_data:
        return torch.fft.ifft(_embed(y, y.ndim - 1, size[-1]), norm=norm)
    if not by_matrix:
        return torch.fft.irfft(y, n=size[-1], norm=norm)
    real = torch.view_as_real(y)
    matrix = _row_matrix(size[-1], modes[-1], not adjoint, real).t()
    return (real.reshape(rows, 2 * modes[-1]) @ matrix).view(*y.shape[:-1], size[-1])


def _row_matrix(size: int, k: int, adjoint: bool, like: Tensor) -> Tensor:
    """(size, 2 k): the forward transform of the last axis, or the transpose of the inverse one."""
    if adjoint:
        return table("spectral_rows_inverse", size, k, 1, dtype=like.dtype, device=like.device).t()
    return table("spectral_rows", size, k, 1, dtype=like.dtype, device=like.device)


def _doubled(size: int, k: int, like: Tensor) -> Tensor:
    """c(f) of a one-sided axis, in the real dtype of ``like``."""
    return table("spectral_doubling", size, k, dtype=like.real.dtype, device=like.device)


# The two are each other's derivative; torch's own derivative of rfft goes through a full complex transform.
class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(x, modes, adjoint, method, major):
        return _fft_forward(x, modes, adjoint, method, major)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.modes, ctx.adjoint, ctx.method, ctx.major = inputs
        ctx.size, ctx.complex_data = tuple(x.shape[2:]), x.is_complex()

    @staticmethod
    def backward(ctx, grad):
        options = (not ctx.adjoint, ctx.method, ctx.major, ctx.complex_data)
        return _apply(_Inverse, grad, ctx.modes, ctx.size, *options), None, None, None, None


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(y, modes, size, adjoint, method, major, complex_data):
        return _fft_inverse(y, modes, size, adjoint, method, major, complex_data)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.modes, _, ctx.adjoint, ctx.method, ctx.major, _ = inputs

    @staticmethod
    def backward(ctx, grad):
        y = _apply(_Forward, grad, ctx.modes, not ctx.adjoint, ctx.method, ctx.major)
        return y, None, None, None, None, None, None


def _apply(function: Any, x: Tensor, *options: Any) -> Tensor:
    """``function`` with its derivative, or, where none is recorded, without: recording costs some 25 µs a call."""
    recorded = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    return (function.apply if recorded else function.forward)(x, *options)


# --- what is shared by all ways ---------------------------------------------------------------------------------


def choose_method(x: Tensor) -> str:
    """What "auto" means for ``x``: under a compiler "dft", real arithmetic, for which it can generate code; on the CPU
    "auto" again, a choice for each transform by :func:`_by_matrix`; on other devices "fft".
    """
    if torch.compiler.is_compiling():
        return "dft"
    return "auto" if x.device.type == "cpu" else "fft"


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(matrix):
        return matrix.t().contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return _apply(_Transposed, grad)


def transposed(matrix: Tensor) -> Tensor:
    """The transposed matrix, contiguous, and its gradient too.

    torch's own derivative is a view, which whatever comes next, such as the accumulation into a parameter's ``grad``,
    copies element by element; as a matrix it is transposed several times faster on a CPU.
    """
    return _apply(_Transposed, matrix)


def spectrum(x: Tensor, modes: tuple[int, ...], method: str, *, major: bool = False) -> Tensor:
    """The kept frequencies of ``x``, norm "forward", complex (B, C, k1, ..., kd), or (K, B, C) if ``major``."""
    if method == "dft" or x.shape[0] == 0:
        return torch.complex(*_forward_dft(x, modes).unbind(2))
    return _apply(_Forward, x, modes, False, method, major)


def synthesis(y: Tensor, size: tuple[int, ...], method: str, complex_data: bool) -> Tensor:
    """The field (B, C, M1, ..., Md) whose kept frequencies are ``y`` (B, C, k1, ..., kd)."""
    if method == "dft" or y.shape[0] == 0:
        return _inverse_dft(torch.view_as_real(y).movedim(-1, 2), size, complex_data)
    return _synthesis(y, tuple(y.shape[2:]), size, method, complex_data, major=False)


def _synthesis(
    y: Tensor, modes: tuple[int, ...], size: tuple[int, ...], method: str, complex_data: bool, *, major: bool
) -> Tensor:
    return _apply(_Inverse, y, modes, size, False, method, major, complex_data)


def forward(x: Tensor, modes: tuple[int, ...], method: str) -> Tensor:
    """:func:`spectrum`, modes-major: complex (K, B, C), K = k1 ... kd; as planes (K, 2, B, C) where :func:`spectrum`
    would have to put the planes together first, and under a compiler."""
    batch, count = x.shape[:2], math.prod(modes)
    if method == "dft" or x.shape[0] == 0:
        planes = transposed(_forward_dft(x, modes).view(math.prod(batch), 2 * count))
        return planes.view(2, count, *batch).transpose(0, 1)
    if torch.compiler.is_compiling():
        y = torch.view_as_real(spectrum(x, modes, method))
        return transposed(y.reshape(-1, 2 * count)).view(count, 2, *batch)
    return spectrum(x, modes, method, major=True)


def inverse(y: Tensor, modes: tuple[int, ...], size: tuple[int, ...], method: str, complex_data: bool) -> Tensor:
    """:func:`synthesis` of what :func:`forward` gives."""
    if y.is_complex():
        return _synthesis(y, modes, size, method, complex_data, major=True)
    batch, count = y.shape[-2:], y.shape[0]
    if method == "dft" or batch[0] == 0:
        planes = transposed(y.transpose(0, 1).reshape(2 * count, math.prod(batch)))
        return _inverse_dft(planes.view(*batch, 2, *modes), size, complex_data)
    planes = transposed(y.reshape(2 * count, math.prod(batch)))
    return synthesis(torch.view_as_complex(planes.view(*batch, *modes, 2)), size, method, complex_data)
