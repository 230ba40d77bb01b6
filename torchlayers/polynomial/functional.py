"""The family's functions of tensors: arguments are checked here, once, and the implementation is picked.

Those on pairs take them in two layouts: dense, (…, N, N, C), every graph of N nodes; and packed, (T, C) with a
:class:`PairLayout`, graphs of any sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._attention import autocast, no_autocast
from .._backend import import_kernels, is_traced, use_triton
from .._checks import check_choice, check_dtype, check_ndim, check_same_device, check_size
from .edges import masked_product
from .pairs import PairLayout, check_mask, check_square

__all__ = ["masked_product", "pair_linear", "pair_mlp", "pair_readout", "segment_matmul"]

MLP = Sequence[tuple[Tensor, Tensor]]

# What the sum over n middle nodes is multiplied with, as n^-power.
SCALES = {"none": 0.0, "sqrt_n": 0.5, "n": 1.0}
POOLS = ("mean", "max", "add")

_mlp_kernels, _matmul_kernels = import_kernels("pair_mlp"), import_kernels("segment_matmul")


def pair_mlp(
    x: Tensor,
    mlp1: MLP,
    mlp2: MLP,
    layout: PairLayout | None = None,
    *,
    plus: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The two factors of a PPGN++ block: at each pair of nodes (i, j)::

        m1[i, j] = MLP1[x[i, j], 1[i = j], x[j, i], 1[i = j]]        m2[i, j] = MLP2[x[i, j], 1[i = j]]

    or, without ``plus``, m1 = MLP1[x] and m2 = MLP2[x]. Every layer of an MLP is linear, then ReLU. Neither the
    concatenation nor the transpose is formed.

    Args:
        x: (…, N, N, C), or (T, C) with a layout.
        mlp1: layers (weight, bias) of (H, 2 (C + 1)) and (H,), without ``plus`` (H, C) and (H,); then (H', H), ….
        mlp2: layers of (H, C + 1) and (H,), without ``plus`` (H, C) and (H,); and so on.
        layout: of packed pairs; None for dense ones.
        plus: with the identity as a channel and the transpose.
        backend: see :func:`torchlayers.backend`. The kernel takes two layers each, of equal widths.

    Returns:
        m1, m2: like ``x``, with the channels of the last layers. Strides are not promised.

    Raises:
        TypeError, ValueError: tensors of dtypes or shapes that do not fit, on two devices.
        BackendError: ``backend="triton"`` with what the kernel does not support.

    Source: arXiv 2302.11556, section 4 (PPGN++); 1905.11136 (PPGN); channels in the order of the official code.

    Example::

        >>> import torch
        >>> from torchlayers.functional import pair_mlp
        >>> mlp1, mlp2 = [(torch.randn(8, 10), torch.zeros(8))], [(torch.randn(8, 5), torch.zeros(8))]
        >>> m1, m2 = pair_mlp(torch.randn(2, 6, 6, 4), mlp1, mlp2)
        >>> m1.shape
        torch.Size([2, 6, 6, 8])
    """
    check_pairs("x", x, layout)
    c = x.shape[-1]
    _check_mlp("mlp1", mlp1, 2 * (c + 1) if plus else c, x)
    _check_mlp("mlp2", mlp2, c + 1 if plus else c, x)
    if use_triton("pair_mlp", x, backend, _unsupported_mlp(x, mlp1, mlp2)):
        flat = autocast(x, *(t for layer in (*mlp1, *mlp2) for t in layer))
        place = layout if layout is not None else _uniform(x)
        with no_autocast(x):
            rows = flat[0].reshape(-1, c)
            m1, m2 = _mlp_kernels.pair_mlp(  # type: ignore[union-attr]
                rows, place.node_ptr, place.pair_ptr, flat[1:5], flat[5:9], plus=plus
            )
        return m1.unflatten(0, x.shape[:-1]), m2.unflatten(0, x.shape[:-1])
    where = _where(x, layout)
    rows = x.reshape(-1, c)
    (w1, b1), (w2, b2) = mlp1[0], mlp2[0]
    h1, h2 = F.linear(rows, w1[:, :c], b1), F.linear(rows, w2[:, :c], b2)
    if plus:
        # Transposing what the weights made of x, not x: the rows are as long as the layer is wide, and no tensor of
        # 2 (C + 1) channels is there.
        h1 = where.add_transposed(h1, F.linear(rows, w1[:, c + 1 : -1]))
        h1 = where.add_on_diagonal(h1, w1[:, c] + w1[:, -1])
        h2 = where.add_on_diagonal(h2, w2[:, c])
    m1, m2 = _rest_of_mlp(h1, mlp1[1:]), _rest_of_mlp(h2, mlp2[1:])
    return m1.unflatten(0, x.shape[:-1]), m2.unflatten(0, x.shape[:-1])


def segment_matmul(
    a: Tensor,
    b: Tensor,
    layout: PairLayout | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    scale: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Graph by graph and channel by channel, the product of matrices over the pairs of nodes::

        y[g, i, k, c] = s_g Σ_j a[g, i, j, c] b[g, j, k, c]

    Args:
        a, b: (…, N, N, C), or (T, C) with a layout.
        layout: of packed pairs; None for dense ones.
        transpose_a, transpose_b: read a[g, j, i, c] for a[g, i, j, c], b[g, k, j, c] for b[g, j, k, c].
        scale: "none": s_g = 1; "sqrt_n": 1 / √n_g; "n": 1 / n_g.
        backend: see :func:`torchlayers.backend`.

    Returns:
        like ``a``. Strides are not promised: on a CPU the channels are the outer dimension of what lies in memory, and
        factors that lie so too are not copied. Sums of 16-bit numbers are in float32. Differentiable any number of
        times.

    Raises:
        TypeError, ValueError: tensors of dtypes or shapes that do not fit, on two devices.
        BackendError: ``backend="triton"`` with what the kernel does not support.

    Source: arXiv 2302.11556, section 4.

    Example::

        >>> import torch
        >>> from torchlayers.functional import segment_matmul
        >>> from torchlayers.polynomial import PairLayout
        >>> a, b = torch.randn(13, 4), torch.randn(13, 4)
        >>> segment_matmul(a, b, PairLayout.from_sizes([2, 3])).shape
        torch.Size([13, 4])
    """
    check_pairs("a", a, layout)
    check_dtype("b", b, kind="real")
    if b.shape != a.shape:
        raise ValueError(f"b must have the shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
    check_same_device("b", b, "a", a)
    check_choice("scale", scale, SCALES)
    a, b = autocast(a, b)
    if a.dtype != b.dtype:
        raise TypeError(f"b must have the dtype of a, {a.dtype}, got {b.dtype}")
    power = SCALES[scale]
    with no_autocast(a):
        if use_triton("segment_matmul", a, backend, _unsupported_dtype(a)):
            place, c = layout if layout is not None else _uniform(a), a.shape[-1]
            y = _matmul_kernels.segment_matmul(  # type: ignore[union-attr]
                a.reshape(-1, c),
                b.reshape(-1, c),
                place.node_ptr,
                place.pair_ptr,
                transpose_a=transpose_a,
                transpose_b=transpose_b,
                power=power,
            )
            return y.unflatten(0, a.shape[:-1])
        if layout is None:
            return _dense_matmul(a, b, transpose_a, transpose_b, power)
        if a.device.type == "cpu" and not is_traced():
            return _SegmentMatmul.apply(a, b, layout.sizes.tolist(), transpose_a, transpose_b, power)
        return _padded_matmul(a, b, layout, transpose_a, transpose_b, power)


def pair_linear(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    layout: PairLayout | None = None,
    *,
    plus: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The linear layer that ends a PPGN++ block: out[i, j] = W [x[i, j], 1[i = j], y[i, j]] + b.

    Args:
        x: (…, N, N, C), or (T, C) with a layout.
        y: like ``x``, with H channels.
        weight: (O, C + 1 + H), without ``plus`` (O, C + H).
        bias: (O,).
        layout: of packed pairs; None for dense ones.
        plus: with the identity as a channel.
        backend: see :func:`torchlayers.backend`.

    Returns:
        like ``x``, with O channels.

    Raises:
        TypeError, ValueError: tensors of dtypes or shapes that do not fit, on two devices.
        BackendError: ``backend="triton"`` with what the kernel does not support.

    Source: arXiv 2302.11556, section 4.
    """
    check_pairs("x", x, layout)
    check_dtype("y", y, kind="real")
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must have the pairs of x, {tuple(x.shape[:-1])}, got shape {tuple(y.shape)}")
    c, h = x.shape[-1], y.shape[-1]
    _check_layer("weight", "bias", weight, bias, c + h + bool(plus), x)
    if use_triton("pair_linear", x, backend, _unsupported_dtype(x)):
        x_, y_, weight, bias = autocast(x, y, weight, bias)
        place = layout if layout is not None else _uniform(x)
        with no_autocast(x):
            out = _mlp_kernels.pair_linear(  # type: ignore[union-attr]
                x_.reshape(-1, c), y_.reshape(-1, h), place.node_ptr, place.pair_ptr, weight, bias, plus=plus
            )
        return out.unflatten(0, x.shape[:-1])
    out = F.linear(x.reshape(-1, c), weight[:, :c], bias)
    out = torch.addmm(out, y.reshape(-1, h), weight[:, -h:].t())
    if plus:
        out = _where(x, layout).add_on_diagonal(out, weight[:, c])
    return out.unflatten(0, x.shape[:-1])


def pair_readout(
    x: Tensor, layout: PairLayout | None = None, *, mask: Tensor | None = None, pool: str = "mean"
) -> Tensor:
    """The invariants of each graph's pairs: those (i, i) pooled, then those i ≠ j pooled::

        mean: [Σ_i x[i, i] / n,  Σ_{i ≠ j} x[i, j] / (n (n - 1))]      add: without the divisors      max: the largest

    and 0 where there is nothing to pool, as off the diagonal of a graph of one node.

    Args:
        x: (…, N, N, C), or (T, C) with a layout.
        layout: of packed pairs; None for dense ones.
        mask: (…, N) bool, True = a node, of dense pairs; all are by default. What other pairs hold, a NaN even, is of
            no effect.
        pool: "mean", "max" or "add".

    Returns:
        (…, 2 C), or (G, 2 C) with a layout, in the dtype of ``x``; sums are in float32 at least.

    Raises:
        TypeError, ValueError: arguments of dtypes or shapes that do not fit; a mask with a layout.

    Source: arXiv 2302.11556, official code; 1905.11136, section 6 ("max").
    """
    check_pairs("x", x, layout)
    check_choice("pool", pool, POOLS)
    if layout is not None:
        if mask is not None:
            raise ValueError("mask must be None for packed pairs, which have no padding")
        if x.shape[1] == 0 or x.shape[0] == 0:
            return x.new_zeros(layout.num_graphs, 2 * x.shape[1]) + 0 * x.sum()
        return _packed_readout(x, layout, pool)
    if mask is not None:
        check_mask(mask, x)
    return _dense_readout(x, mask, pool)


# ----------------------------------------------------------------------------------------------------------- checks


def check_pairs(name: str, x: object, layout: PairLayout | None) -> None:
    """``x`` is (T, C) with a layout, (…, N, N, C) without."""
    if layout is None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor (..., N, N, channels), got {x!r} ({type(x).__name__})")
        if x.ndim < 3:
            raise ValueError(
                f"{name} must have dimensions (..., N, N, channels), or a layout, got shape {tuple(x.shape)}"
            )
        check_square(name, x)
    else:
        if not isinstance(layout, PairLayout):
            raise TypeError(f"layout must be None or a PairLayout, got {layout!r} ({type(layout).__name__})")
        check_ndim(name, x, 2, "(pairs, channels)")
        assert isinstance(x, Tensor)
        check_size(name, x, 0, layout.num_pairs, "the layout's pairs")
        check_same_device("layout", layout.node_ptr, name, x)
    check_dtype(name, x, kind="real")


def _check_layer(name: str, bias_name: str, weight: object, bias: object, columns: int, x: Tensor) -> None:
    check_ndim(name, weight, 2, "(out, in)")
    check_ndim(bias_name, bias, 1, "(out,)")
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    check_size(name, weight, 1, columns, "input channels")
    check_size(bias_name, bias, 0, weight.shape[0], "output channels")
    for label, tensor in ((name, weight), (bias_name, bias)):
        check_same_device(label, tensor, "x", x)
        if tensor.dtype != x.dtype and autocast(tensor)[0].dtype != autocast(x)[0].dtype:
            raise TypeError(f"{label} must have the dtype of x, {x.dtype}, got {tensor.dtype}")


def _check_mlp(name: str, layers: MLP, columns: int, x: Tensor) -> None:
    if not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"{name} must be a sequence of at least one (weight, bias), got {layers!r}")
    for number, (weight, bias) in enumerate(layers):
        _check_layer(f"{name}[{number}] weight", f"{name}[{number}] bias", weight, bias, columns, x)
        columns = weight.shape[0]


def _unsupported_dtype(x: Tensor) -> str | None:
    dtype = autocast(x)[0].dtype
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return str(dtype).removeprefix("torch.")


def _unsupported_mlp(x: Tensor, mlp1: MLP, mlp2: MLP) -> str | None:
    if len(mlp1) != 2 or len(mlp2) != 2:
        return f"MLPs of {len(mlp1)} and {len(mlp2)} layers"
    widths = {weight.shape[0] for weight, _ in (*mlp1, *mlp2)}
    if len(widths) > 1:
        return f"layers of different widths {sorted(widths)}"
    return None if _mlp_kernels is None else _mlp_kernels.unsupported(widths.pop(), autocast(x)[0].dtype)


# ------------------------------------------------------------------------- where a pair's transpose and diagonal are


class _Dense:
    """Rows (B N², H) of pairs (B, N, N)."""

    def __init__(self, n: int):
        self.n = n

    def _pairs(self, z: Tensor) -> Tensor:
        return z.view(-1, self.n, self.n, z.shape[1]) if z.shape[0] else z.view(0, self.n, self.n, z.shape[1])

    def add_transposed(self, z: Tensor, other: Tensor) -> Tensor:
        return (self._pairs(z) + self._pairs(other).transpose(1, 2)).reshape(z.shape)

    def add_on_diagonal(self, z: Tensor, row: Tensor) -> Tensor:
        """Adds (H,) to each pair (i, i), in place."""
        self._pairs(z).diagonal(dim1=1, dim2=2).add_(row.to(z.dtype)[:, None])
        return z


class _Packed:
    """Rows (T, H) of the pairs of a layout."""

    def __init__(self, layout: PairLayout):
        self.index = layout.index()

    def add_transposed(self, z: Tensor, other: Tensor) -> Tensor:
        return z + _Transposed.apply(other, self.index.transpose)

    def add_on_diagonal(self, z: Tensor, row: Tensor) -> Tensor:
        rows = self.index.diagonal
        return z.index_add_(0, rows, row.to(z.dtype).expand(rows.shape[0], -1))


def _where(x: Tensor, layout: PairLayout | None) -> _Dense | _Packed:
    return _Dense(x.shape[-2]) if layout is None else _Packed(layout)


def _uniform(x: Tensor) -> PairLayout:
    """The layout that a dense (…, N, N, C) is, on its device, without waiting for it."""
    n = x.shape[-2]
    count = 1
    for size in x.shape[:-3]:
        count *= size
    graphs = torch.arange(count + 1, device=x.device)
    return PairLayout(graphs * n, graphs * (n * n), count * n, count * n * n, n)


class _Transposed(torch.autograd.Function):
    """Rows in the order of an involution. Its gradient is itself, where that of indexing would be a scatter."""

    @staticmethod
    def forward(z: Tensor, order: Tensor) -> Tensor:
        return z.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Transposed.apply(grad, *ctx.saved_tensors), None


def _rest_of_mlp(h: Tensor, layers: MLP) -> Tensor:
    """ReLU, then the layers after the first, ReLU after each. The last one writes (channels, pairs), read as its
    transpose: matrix products over the nodes then find each channel's matrices as they need them."""
    h = h.relu_()
    for number, (weight, bias) in enumerate(layers):
        if number < len(layers) - 1:
            h = F.linear(h, weight, bias).relu_()
        else:
            h = torch.addmm(bias[:, None], weight, h.t()).relu_().t()
    return h


# -------------------------------------------------------------------------------------------------- matrix products


def _dense_matmul(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool, power: float) -> Tensor:
    a, b = a.movedim(-1, 0), b.movedim(-1, 0)
    y = (a.mT if transpose_a else a) @ (b.mT if transpose_b else b)
    return (y if power == 0 else y * max(y.shape[-1], 1) ** -power).movedim(0, -1)


def _padded_matmul(
    a: Tensor, b: Tensor, layout: PairLayout, transpose_a: bool, transpose_b: bool, power: float
) -> Tensor:
    """For graphs of any sizes without reading them: every graph as large as the largest."""
    index, g, n = layout.index(), layout.num_graphs, layout.max_nodes

    def pad(x: Tensor) -> Tensor:
        rows = x.new_zeros(g * n * n, x.shape[1]).index_copy(0, index.padded, x)
        return rows.view(g, n, n, x.shape[1])

    y = _dense_matmul(pad(a), pad(b), transpose_a, transpose_b, 0.0)
    y = y.reshape(g * n * n, a.shape[1]).index_select(0, index.padded)
    if power:
        factor = layout.sizes.clamp(min=1).to(torch.float64).pow(-power).to(y.dtype)
        y = y * factor[index.graph][:, None]
    return y


class _SegmentMatmul(torch.autograd.Function):
    """One batched product a graph, on channels that lie one after the other in memory.

    For molecules faster than one product over padded graphs, and no slower where sizes are equal: then there is one.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, sizes: list[int], transpose_a: bool, transpose_b: bool, power: float) -> Tensor:
        c = a.shape[1]
        a, b = a.t().contiguous(), b.t().contiguous()
        if a.numel() == 0:
            return torch.empty_like(a).t()
        parts, start = [], 0
        groups = [(sizes[0], len(sizes))] if len(set(sizes)) == 1 else [(n, 1) for n in sizes]
        for n, count in groups:
            stop = start + count * n * n
            if n:
                p, q = (x[:, start:stop].view(c * count, n, n) for x in (a, b))
                # Not with out=: into a result with gaps torch multiplies matrix after matrix.
                part = torch.bmm(p.mT if transpose_a else p, q.mT if transpose_b else q)
                parts.append((part.mul_(n**-power) if power else part).view(c, stop - start))
            start = stop
        return torch.cat(parts, dim=1).t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        a, b = ctx.saved_tensors
        sizes, ta, tb, power = ctx.options
        product = _SegmentMatmul.apply
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = product(b, grad, sizes, tb, True, power) if ta else product(grad, b, sizes, False, not tb, power)
        if ctx.needs_input_grad[1]:
            grad_b = product(grad, a, sizes, True, ta, power) if tb else product(a, grad, sizes, not ta, False, power)
        return grad_a, grad_b, None, None, None, None


# --------------------------------------------------------------------------------------------------------- readouts


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _joined(on: Tensor, off: Tensor, n: Tensor, pool: str, dtype: torch.dtype) -> Tensor:
    """Sums (…, C) on and off the diagonal of graphs of sizes n (…,), divided where asked for, as one tensor."""
    if pool == "mean":
        n = n[..., None].to(on.dtype)
        on, off = on / n.clamp(min=1), off / (n * (n - 1)).clamp(min=1)
    return torch.cat([on, off], dim=-1).to(dtype)


def _dense_readout(x: Tensor, mask: Tensor | None, pool: str) -> Tensor:
    n = x.shape[-2]
    if n == 0 or x.numel() == 0:
        return x.new_zeros(*x.shape[:-3], 2 * x.shape[-1]) + 0 * x.sum()
    node = torch.ones(n, dtype=torch.bool, device=x.device) if mask is None else mask
    eye = torch.eye(n, dtype=torch.bool, device=x.device)
    pairs = node[..., :, None] & node[..., None, :]
    off = pairs & ~eye
    diagonal = x.diagonal(dim1=-3, dim2=-2).mT
    if pool == "max":
        on = diagonal.masked_fill(~node[..., None], -torch.inf).amax(-2)
        rest = x.masked_fill(~off[..., None], -torch.inf).amax((-3, -2))
        on = on.masked_fill(~node.any(-1)[..., None], 0)
        return torch.cat([on, rest.masked_fill(~off.any((-2, -1))[..., None], 0)], dim=-1)
    on = _wide(diagonal).masked_fill(~node[..., None], 0).sum(-2)
    rest = _wide(x).masked_fill(~off[..., None], 0).sum((-3, -2))
    return _joined(on, rest, node.sum(-1).expand(x.shape[:-3]), pool, x.dtype)


def _packed_readout(x: Tensor, layout: PairLayout, pool: str) -> Tensor:
    index, sizes = layout.index(), layout.sizes
    wide = _wide(x)
    on = wide.index_select(0, index.diagonal)
    owner = index.graph.index_select(0, index.diagonal)
    if pool == "max":
        off = wide.index_fill(0, index.diagonal, -torch.inf)
        parts = _segment_max(on, layout.node_ptr, owner), _segment_max(off, layout.pair_ptr, index.graph)
        on, off = (part.masked_fill((sizes < least)[:, None], 0) for part, least in zip(parts, (1, 2), strict=True))
    else:
        off = wide.index_fill(0, index.diagonal, 0)
        on = _SegmentSum.apply(on, layout.node_ptr, owner)
        off = _SegmentSum.apply(off, layout.pair_ptr, index.graph)
    return _joined(on, off, sizes, pool, x.dtype)


class _SegmentSum(torch.autograd.Function):
    """Sums of the rows from ptr[g] to ptr[g + 1]; ``owner`` is the g of each row. torch's own is once differentiable.

    Not a scatter: those add in an order that a GPU does not promise.
    """

    @staticmethod
    def forward(x: Tensor, ptr: Tensor, owner: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", offsets=ptr, axis=0, unsafe=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


def _segment_max(x: Tensor, ptr: Tensor, owner: Tensor) -> Tensor:
    """The largest of each segment's rows, equal ones sharing the gradient as in ``torch.amax``."""
    with torch.no_grad():
        top = torch.segment_reduce(x, "max", offsets=ptr, axis=0, unsafe=True)
        hit = x == top.index_select(0, owner)
        share = 1 / torch.segment_reduce(hit.to(x.dtype), "sum", offsets=ptr, axis=0, unsafe=True).clamp(min=1)
        share = share.index_select(0, owner)
    return _SegmentSum.apply(torch.where(hit, x, 0) * share, ptr, owner)
