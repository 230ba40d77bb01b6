"""The family's functions: arguments are checked here, once, and the implementation is picked.

Eagerly an int rank slices the factors. A compiled graph that holds for every rank must not see their sizes, so there a
rank that changes from call to call goes through one operation, ``torchlayers::low_rank_linear`` (for convolutions
``torchlayers::low_rank_conv``), which slices when it runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _backend
from .._attention import autocast, no_autocast
from .._backend import BACKENDS, import_kernels, use_triton
from .._checks import check_choice, check_dtype, check_int, check_ndim, check_same_device, check_size
from . import reference

__all__ = ["low_rank_linear"]


def low_rank_linear(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias: Tensor | None = None,
    rank: int | Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The prefix of rank b of a factorised linear map::

        y = (x V_bᵀ) U_bᵀ + bias            V_b = weight_in[:b], U_b = weight_out[:, :b]

    It costs b (in + out) multiplications a row where the dense map costs in · out. At rank 0 the output is the bias,
    and every argument gets a gradient of zeros. Rows and columns from b on are not read, and get gradients of exactly
    zero.

    Args:
        x: (..., in), real.
        weight_in, weight_out: V and U, (r, in) and (out, r).
        bias: (out,) or None.
        rank: b, an int from 0 to r; None is r. Or a tensor of ints: with one element on the CPU, it is read as the int
            (a compiled graph takes it as an input, and so holds for every rank); of shape (x.shape[0],) or (rows,),
            rows those of ``x.reshape(-1, in)``, one for each sample or row. These are computed at the full rank
            and masked, and need finite factors; entries outside 0..r raise on the CPU and are clamped on a GPU, where
            looking would wait.
        backend: see :func:`torchlayers.backend`. The kernel keeps x V_bᵀ on the chip; "auto" takes it where that is
            faster than two matrix products.

    Returns:
        (..., out), in the dtype of ``x`` (under autocast, in autocast's).

    Raises:
        TypeError: complex, integer or differing dtypes; a rank that is no int.
        ValueError: shapes or devices that do not fit, a rank outside 0..r.
        BackendError: ``backend="triton"`` with what the kernel does not support.

    Source: arXiv 2308.14929, section 3.

    Example:

        >>> import torch
        >>> from torchlayers.functional import low_rank_linear
        >>> x, v, u = torch.randn(5, 8), torch.randn(4, 8), torch.randn(6, 4)
        >>> torch.allclose(low_rank_linear(x, v, u, rank=2), x @ (u[:, :2] @ v[:2]).T, atol=1e-5)
        True
    """
    check_factors(x, weight_in, weight_out, bias)
    if x.ndim < 1:
        raise ValueError("x must have at least 1 dimension (..., in), got 0")
    check_size("x", x, -1, weight_in.shape[1], "in")
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    rank = _checked_rank(rank, weight_in.shape[0], tuple(x.shape[:-1]), x, rows=True)
    if _per_row(rank):
        return _linear(x, weight_in, weight_out, bias, rank, backend)
    # The operation chooses between kernel and products when it runs: here a changing batch would become two graphs.
    if (_traced() and rank is not None) or (torch.compiler.is_compiling() and _kernels_may_run(x, backend)):
        return _linear_op(*_autocast(x, weight_in, weight_out, bias), *_as_op_rank(rank), backend)
    return _linear(x, weight_in, weight_out, bias, _as_int(rank), backend)


def low_rank_conv(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias: Tensor | None,
    rank: int | Tensor | None,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """:func:`reference.low_rank_conv` with its arguments checked; ``rank`` as for :func:`low_rank_linear`."""
    n_dim = len(kernel_size)
    check_ndim("x", x, n_dim + 2, "(batch, channels, *grid)")
    check_factors(x, weight_in, weight_out, bias)
    check_size("x", x, 1, weight_in.shape[1] // math.prod(kernel_size), "in_channels")
    for axis, n in enumerate(reference.conv_grid(tuple(x.shape[2:]), kernel_size, stride, padding, dilation)):
        if n < 1:
            raise ValueError(
                f"x must have a grid that the kernel fits into ({kernel_size}, padding {padding}, dilation {dilation}),"
                f" got {x.shape[2 + axis]} points at dimension {2 + axis}: shape {tuple(x.shape)}"
            )
    rank = _checked_rank(rank, weight_in.shape[0], (x.shape[0],), x)
    x, weight_in, weight_out, bias = _autocast(x, weight_in, weight_out, bias)
    geometry = (kernel_size, stride, padding, dilation, groups)
    with no_autocast(x):
        if _per_row(rank):
            return reference.low_rank_conv(x, weight_in, weight_out, bias, rank, *geometry)
        if _traced() and rank is not None:
            lists = (list(kernel_size), list(stride), list(padding), list(dilation), groups)
            return _conv_op(x, weight_in, weight_out, bias, *_as_op_rank(rank), *lists)
        return reference.low_rank_conv(x, weight_in, weight_out, bias, _as_int(rank), *geometry)


def low_rank_embedding(
    index: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    rank: int | Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """:func:`reference.low_rank_embedding` with its arguments checked; ``rank`` as for :func:`low_rank_linear`."""
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor of ints, got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must have dtype torch.int64 or torch.int32, got {index.dtype}")
    check_same_device("index", index, "weight_in", weight_in)
    rank = _checked_rank(rank, weight_in.shape[0], tuple(index.shape), index, rows=True)
    if _traced() and rank is not None:
        # Gathered at the full rank and masked: a slice would tie the graph to the rank.
        if not isinstance(rank, Tensor):
            rank = torch.full((), rank, device=index.device)
        elif not _per_row(rank):
            rank = rank.reshape(()).to(index.device, non_blocking=True)
        return reference.low_rank_embedding(index, weight_in, weight_out, rank, padding_idx)
    if _per_row(rank):
        return reference.low_rank_embedding(index, weight_in, weight_out, rank, padding_idx)
    return reference.low_rank_embedding(index, weight_in, weight_out, _as_int(rank), padding_idx)


# Checks


def check_factors(x: Tensor, weight_in: Tensor, weight_out: Tensor, bias: Tensor | None) -> None:
    """Dtypes, devices and shapes of an input and the two factors."""
    named = {"x": x, "weight_in": weight_in, "weight_out": weight_out, "bias": bias}
    for name, tensor in named.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_dtype(name, tensor, kind="real")
        if name != "x":
            check_same_device(name, tensor, "x", x)
            if tensor.dtype != weight_in.dtype:
                raise TypeError(f"{name} must have the dtype of weight_in, {weight_in.dtype}, got {tensor.dtype}")
    if x.dtype != weight_in.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have the dtype of weight_in, {weight_in.dtype}, got {x.dtype}")
    check_ndim("weight_in", weight_in, 2, "(rank, in)")
    check_ndim("weight_out", weight_out, 2, "(out, rank)")
    check_size("weight_out", weight_out, 1, weight_in.shape[0], "the rank of weight_in")
    if bias is not None:
        check_ndim("bias", bias, 1, "(out,)")
        check_size("bias", bias, 0, weight_out.shape[0], "out")


def _checked_rank(
    rank: int | Tensor | None, max_rank: int, leading: tuple[int, ...], like: Tensor, *, rows: bool = False
) -> int | Tensor | None:
    """``rank``, with one entry a row brought to the shape of the rows."""
    if rank is None:
        return None
    if not isinstance(rank, Tensor):
        check_int("rank", rank, minimum=0)
        if rank > max_rank:
            raise ValueError(f"rank must be at most {max_rank}, the factors' rank, got {rank}")
        return rank
    if rank.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rank must be an int or a tensor of ints, got a tensor of {rank.dtype}")
    if rank.device.type == "cpu" and not torch.compiler.is_compiling() and rank.numel():
        low, high = int(rank.min()), int(rank.max())
        if low < 0 or high > max_rank:
            raise ValueError(f"rank must have entries from 0 to {max_rank}, got {low} to {high}")
    if not _per_row(rank):
        return rank
    check_same_device("rank", rank, "x", like)
    if rank.ndim == 1 and leading and rank.shape[0] == leading[0]:
        return rank
    if rows and rank.ndim == 1 and rank.shape[0] == math.prod(leading):
        return rank.reshape(leading)
    shapes = [f"({leading[0] if leading else 1},)"]
    if rows and len(leading) > 1:
        shapes.append(f"({math.prod(leading)},)")
    raise ValueError(f"rank must be an int, or have shape {' or '.join(shapes)}, got {tuple(rank.shape)}")


def _per_row(rank: int | Tensor | None) -> bool:
    """Whether each sample or row has a rank of its own; one element on the CPU is one for all."""
    return isinstance(rank, Tensor) and not (rank.numel() == 1 and rank.device.type == "cpu")


def _autocast(
    x: Tensor, weight_in: Tensor, weight_out: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, weight_in, weight_out = autocast(x, weight_in, weight_out)
    return x, weight_in, weight_out, None if bias is None else autocast(bias)[0]


# Picking


def _traced() -> bool:
    """Whether a graph is made that will be called with other ranks; an exported program has the rank of its making."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _as_int(rank: int | Tensor | None) -> int | None:
    return int(rank) if isinstance(rank, Tensor) else rank


def _as_op_rank(rank: int | Tensor | None) -> tuple[int, Tensor | None]:
    return (-1, rank) if isinstance(rank, Tensor) else (-1 if rank is None else rank, None)


def _from_op_rank(rank: int, rank_tensor: Tensor | None, max_rank: int) -> int:
    if rank_tensor is not None:
        rank = int(rank_tensor)
    return max_rank if rank < 0 else rank


def _asked(backend: str | None) -> str:
    return _backend._current if backend is None else backend


def _kernels_may_run(x: Tensor, backend: str | None) -> bool:
    return _asked(backend) != "torch" and (x.is_cuda or _asked(backend) == "triton")


_kernels = import_kernels("low_rank_linear")


def _linear(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias: Tensor | None,
    rank: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    """The map at a rank that is known, or at one for each sample or row: fused, or two matrix products."""
    b = weight_in.shape[0] if rank is None or isinstance(rank, Tensor) else rank
    may_run, unsupported = _kernels_may_run(x, backend), None
    if may_run:
        if b == 0 or x.numel() == 0:
            return reference.low_rank_linear(x, weight_in, weight_out, bias, rank)
        tensors = _autocast(x, weight_in, weight_out, bias)
        unsupported = _unsupported(tensors[0], weight_in, weight_out, b, _asked(backend))
    if use_triton("low_rank_linear_forward", x, backend, unsupported):
        assert _kernels is not None
        rows = tensors[0].reshape(-1, x.shape[-1])
        own = (rank.flatten().to(torch.int32), rows.shape[0] // rank.numel()) if isinstance(rank, Tensor) else ()
        y = _kernels.low_rank_linear_forward(rows, *tensors[1:], b, *own)
        return y.reshape(*x.shape[:-1], weight_out.shape[0])
    return reference.low_rank_linear(x, weight_in, weight_out, bias, rank)


def _unsupported(x: Tensor, weight_in: Tensor, weight_out: Tensor, rank: int, asked: str) -> str | None:
    if _kernels is None:
        return "anything: triton is not installed"
    if x.dtype not in _kernels.DTYPES:
        return str(x.dtype)
    if rank > _kernels.MAX_RANK:
        return f"ranks above {_kernels.MAX_RANK}, got {rank}"
    sizes = (x.numel() // x.shape[-1], weight_in.shape[1], weight_out.shape[0], rank)
    if asked == "auto" and not _kernels.fuses(*sizes, x.dtype):
        return f"(rows, in, out, rank) = {sizes} any faster than two matrix products"
    return None


# Operations for compiled graphs. A rank is an int (-1: all) or, where given, the one element of a CPU tensor.


@torch.library.custom_op("torchlayers::low_rank_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias: Tensor | None,
    rank: int,
    rank_tensor: Tensor | None,
    backend: str | None,
) -> Tensor:
    b = _from_op_rank(rank, rank_tensor, weight_in.shape[0])
    return _linear(x, weight_in, weight_out, bias, b, backend).contiguous()


@_linear_op.register_fake
def _(x, weight_in, weight_out, bias, rank, rank_tensor, backend):
    return x.new_empty(*x.shape[:-1], weight_out.shape[0])


@torch.library.custom_op("torchlayers::low_rank_linear_gradients", mutates_args=())
def _linear_gradients_op(
    grad: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    rank: int,
    rank_tensor: Tensor | None,
    backend: str | None,
    wanted: list[bool],
) -> list[Tensor]:
    b = _from_op_rank(rank, rank_tensor, weight_in.shape[0])
    v, u = weight_in[:b], weight_out[:, :b]
    grad2, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grads = [
        torch.zeros_like(t) if w else t.new_empty(0) for t, w in zip((x, weight_in, weight_out), wanted, strict=True)
    ]
    if wanted[0]:
        # The map back is the same map with the factors' roles exchanged.
        grads[0] = _linear(grad, weight_out.t(), weight_in.t(), None, b, backend).contiguous()
    if wanted[1]:
        torch.mm((grad2 @ u).t(), x2, out=grads[1][:b])
    if wanted[2]:
        grads[2][:, :b] = grad2.t() @ (x2 @ v.t())
    return grads


@_linear_gradients_op.register_fake
def _(grad, x, weight_in, weight_out, rank, rank_tensor, backend, wanted):
    pairs = zip((x, weight_in, weight_out), wanted, strict=True)
    return [t.new_empty(t.shape) if w else t.new_empty(0) for t, w in pairs]


def _linear_setup(ctx, inputs, output) -> None:
    x, weight_in, weight_out, _, ctx.rank, rank_tensor, ctx.backend = inputs
    ctx.save_for_backward(x, weight_in, weight_out, rank_tensor)


def _linear_backward(ctx, grad):
    x, weight_in, weight_out, rank_tensor = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = [None] * 3
    if any(wanted):
        grads = _linear_gradients_op(grad, x, weight_in, weight_out, ctx.rank, rank_tensor, ctx.backend, wanted)
    grads = [g if w else None for g, w in zip(grads, wanted, strict=True)]
    bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return *grads, bias, None, None, None


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def _memory_format(x: Tensor) -> torch.memory_format:
    """That of a convolution's results for the input ``x``."""
    for ndim, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


def _empty(shape: tuple[int, ...], x: Tensor) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@torch.library.custom_op("torchlayers::low_rank_conv", mutates_args=())
def _conv_op(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias: Tensor | None,
    rank: int,
    rank_tensor: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    b = _from_op_rank(rank, rank_tensor, weight_in.shape[0])
    geometry = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)
    y = reference.low_rank_conv(x, weight_in, weight_out, bias, b, *geometry)
    return y.contiguous(memory_format=_memory_format(x))


@_conv_op.register_fake
def _(x, weight_in, weight_out, bias, rank, rank_tensor, kernel_size, stride, padding, dilation, groups):
    grid = reference.conv_grid(tuple(x.shape[2:]), tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    return _empty((x.shape[0], weight_out.shape[0], *grid), x)


@torch.library.custom_op("torchlayers::low_rank_conv_gradients", mutates_args=())
def _conv_gradients_op(
    grad: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    rank: int,
    rank_tensor: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wanted: list[bool],
) -> list[Tensor]:
    b = _from_op_rank(rank, rank_tensor, weight_in.shape[0])
    pairs = zip((x, weight_in, weight_out), wanted, strict=True)
    grads = [_empty(tuple(t.shape), t).zero_() if w else t.new_empty(0) for t, w in pairs]
    if b == 0 or x.numel() == 0:
        return grads
    filters = reference.conv_filters(weight_in[:b], tuple(kernel_size), groups)
    pointwise = weight_out[:, :b].reshape(-1, b, *[1] * len(kernel_size))
    ones, zeros = [1] * len(kernel_size), [0] * len(kernel_size)
    backward = torch.ops.aten.convolution_backward
    h = torch.convolution(x, filters, None, stride, padding, dilation, False, zeros, groups)
    geometry = (ones, zeros, ones, False, zeros, groups)
    inner = wanted[0] or wanted[1]
    grad_h, grad_pointwise, _ = backward(grad, h, pointwise, None, *geometry, [inner, wanted[2], False])
    if wanted[2]:
        grads[2][:, :b] = grad_pointwise.flatten(1)
    if inner:
        geometry = (stride, padding, dilation, False, zeros, groups)
        grad_x, grad_filters, _ = backward(grad_h, x, filters, None, *geometry, [wanted[0], wanted[1], False])
        if wanted[0]:
            grads[0] = grad_x.contiguous(memory_format=_memory_format(x))
        if wanted[1]:
            grads[1][:b] = grad_filters.unflatten(0, (groups, b)).transpose(0, 1).flatten(1)
    return grads


@_conv_gradients_op.register_fake
def _(grad, x, weight_in, weight_out, *rest):
    pairs = zip((x, weight_in, weight_out), rest[-1], strict=True)
    return [_empty(tuple(t.shape), t) if w else t.new_empty(0) for t, w in pairs]


def _conv_setup(ctx, inputs, output) -> None:
    x, weight_in, weight_out, _, ctx.rank, rank_tensor, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight_in, weight_out, rank_tensor)


def _conv_backward(ctx, grad):
    x, weight_in, weight_out, rank_tensor = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = [None] * 3
    if any(wanted):
        grads = _conv_gradients_op(grad, x, weight_in, weight_out, ctx.rank, rank_tensor, *ctx.geometry, wanted)
    grads = [g if w else None for g, w in zip(grads, wanted, strict=True)]
    bias = grad.transpose(0, 1).flatten(1).sum(1) if ctx.needs_input_grad[3] else None
    return *grads, bias, *[None] * 7


_conv_op.register_autograd(_conv_backward, setup_context=_conv_setup)
