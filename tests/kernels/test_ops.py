"""Registered operations: opcheck for every one, plain-torch implementations, compilation, bad input."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchlayers import SequenceLayout, _tables
from torchlayers.kernels import _aot, _lib, sparse_product, sphere_product, tdft
from torchlayers.kernels import tensor_attention as attention
from torchlayers.testing import assert_close_rel, opcheck_all

if _lib.INTERPRET:
    pytest.skip("operations have their plain implementations outside the interpreter only", allow_module_level=True)


@_tables.register_table("test_ops", shape=lambda n: (n,))
def _ramp(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float64)


def _bases(n1=6, n2=5, k1=4, k2=3):
    return torch.randn(2, k1, n1), torch.randn(2, n2, k2)


def _forward_samples():
    for dtype, requires_grad in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        yield torch.randn(2, 3, 6, 5, dtype=dtype, requires_grad=requires_grad), *_bases()
    yield torch.randn(3, 2, 5, 6).permute(1, 0, 3, 2).requires_grad_(), *_bases(), "ieee", True
    yield torch.randn(0, 3, 6, 5, requires_grad=True), *_bases()


def _inverse_samples():
    for dtype in (torch.float32, torch.float16):
        f1, f2 = _bases()
        yield torch.randn(2, 4, 3, 2, 3, requires_grad=True), f1.transpose(1, 2), f2.transpose(1, 2), dtype
    f1, f2 = _bases()
    yield torch.randn(2, 4, 3, 0, 3, requires_grad=True), f1.mT, f2.mT, torch.float32, None, True


def _epilogues(y, bases, field):
    """Inverse transforms with a skip, an activation, and both."""
    yield y, *bases, torch.float32, None, False, field, None
    yield y, *bases, torch.float32, "low", False, None, "gelu"
    yield y, *bases, torch.bfloat16, None, False, field, "gelu"


def _line_samples():
    f, x = torch.randn(2, 6, 4), torch.randn(2, 3, 6, requires_grad=True)
    return [(x, f), (x.detach().half(), f, "ieee", True), (torch.randn(0, 3, 6, requires_grad=True), f)]


def _line_inverse_samples():
    g, y = torch.randn(2, 4, 6), torch.randn(2, 4, 2, 3, requires_grad=True)
    return [(y, g), *_epilogues(y, (g,), torch.randn(2, 3, 6, requires_grad=True))]


def _inverse_epilogue_samples():
    f1, f2 = _bases()
    y, field = torch.randn(2, 4, 3, 2, 3, requires_grad=True), torch.randn(2, 3, 6, 5, requires_grad=True)
    return _epilogues(y, (f1.mT, f2.mT), field)


def _inverse_backward_samples(d):
    shape, modes, bases = ((2, 3, 6, 5), (2, 4, 3, 2, 3), tuple(f.mT for f in _bases()))
    if d == 1:
        shape, modes, bases = (2, 3, 6), (2, 4, 2, 3), (torch.randn(2, 4, 6),)
    grad, y = torch.randn(shape), torch.randn(modes)
    return [(grad, y, *bases, None, False, skip, "gelu") for skip in (None, torch.randn(shape))]


def _mix_samples(kind, backward=False):
    def randn(*size):
        return torch.randn(*size, requires_grad=not backward)

    x, g = randn(2, 6, 2, 3), torch.randn(2, 6, 2, 4)
    factors = {
        "dense": (randn(3, 4, 2, 3, 2),),
        "tucker": (randn(3, 4, 2, 2, 2), randn(3, 2, 2)),
        "cp": (randn(3, 5, 2), randn(2, 5, 2), randn(3, 5, 2), randn(4, 5, 2)),
    }[kind]
    if backward:
        return [(g, x, *factors)]
    return [(x, *factors), (x, *factors, True), (x.detach().half(), *factors)]


def _attention_tensors(dtype=torch.float32, requires_grad=True, transposed=False):
    shapes = ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 3, 6), (2, 2, 7, 4), (2, 2, 3, 4))
    for b, h, n, d in shapes:
        x = torch.randn(b, n, h, d, dtype=dtype).transpose(1, 2) if transposed else torch.randn(b, h, n, d, dtype=dtype)
        yield x.requires_grad_(requires_grad)


def _low_rank(*sizes, dtype=torch.float32, requires_grad=True):
    return [torch.randn(size, dtype=dtype, requires_grad=requires_grad) for size in sizes]


def _low_rank_samples():
    sizes = (5, 4), (6, 4), (3, 6), (3,)
    yield *_low_rank(*sizes), 4, None, 1, True
    yield *_low_rank(*sizes[:3]), None, 0, None, 1, True
    transposed = [t.T.requires_grad_() for t in _low_rank((4, 5), (4, 6), (6, 3), requires_grad=False)]
    yield *transposed, *_low_rank((3,)), 5, torch.tensor([5, 0, 2], dtype=torch.int32), 2, True
    yield *_low_rank(*sizes, dtype=torch.bfloat16, requires_grad=False), 6, None, 1, False
    yield *_low_rank((0, 4), *sizes[1:]), 4, None, 1, True


def _low_rank_graph_samples(backward=False):
    """The operations of graphs that serve every rank, which is an int (-1: all) or a tensor of one."""
    for rank, tensor in ((4, None), (0, None), (-1, None), (-1, torch.tensor(2))):
        if backward:
            tensors = _low_rank((2, 5, 3), (2, 5, 4), (6, 4), (3, 6), requires_grad=False)
            yield *tensors, rank, tensor, None, [True, False, rank != 4]
        else:
            yield *_low_rank((2, 5, 4), (6, 4), (3, 6), (3,)), rank, tensor, None


def _low_rank_conv_samples(backward=False):
    for rank, tensor in ((4, None), (0, None), (-1, torch.tensor(2))):
        geometry = rank, tensor, [3], [2], [1], [1], 2
        if backward:
            tensors = _low_rank((2, 4, 4), (2, 2, 7), (6, 6), (4, 6), requires_grad=False)
            yield *tensors, *geometry, [True, True, rank != 4]
        else:
            yield *_low_rank((2, 2, 7), (6, 6), (4, 6), (4,)), *geometry


_PLAIN = (None, None, None, 0.4, 0.0, [-1, -1], [-1, -1], False, "trilinear", 0, 0, 0)


def _attention_samples():
    keep = torch.tensor([[True] * 6 + [False]] * 2)
    options = (keep, None, torch.tensor([7]), 0.4, 0.2, [3, 0], [-1, 0], True, "determinant", 2, 0, 1)
    yield *_attention_tensors(), *_PLAIN
    yield *_attention_tensors(transposed=True), *options
    yield *_attention_tensors(torch.bfloat16, requires_grad=False), *_PLAIN


def _attention_gradient_samples():
    for grad_lse in (None, torch.randn(2, 4, 5)):
        tensors = list(_attention_tensors(requires_grad=False))
        out, lse = attention.tensor_attention_forward(*tensors, *_PLAIN)
        yield torch.randn_like(out), grad_lse, *tensors, out, lse, *_PLAIN


# Collectives, where all ranks are one.


def _ring_samples(backward=False):
    q, k, v, grad = (torch.randn(2, h, 8, c, requires_grad=not backward) for h, c in ((4, 3), (2, 3), (2, 5), (4, 5)))
    key, seed = SequenceLayout(8, 1).key, torch.tensor([3])
    for seen, dropout_p, grad_lse in ((seed, 0.25, torch.randn(2, 4, 8)), (None, 0.0, None)):
        options = (seen, "", key, key, [0, 3, 8], 4, 0, 0.5, dropout_p, 1, 6, "ring", "torch", "first")
        if not backward:
            yield q, k, v, *options
            continue
        yield grad, grad_lse, *torch.ops.torchlayers.ring_attention_forward(q, k, v, *options), q, k, v, *options


def _ring_tensor_samples(backward=False):
    options = (SequenceLayout(6, 1, cu_seqlens=(0, 2, 6)).key, "", 0.4, [2, 0], [-1, 0], "trilinear", False, False)
    shapes = ((4, 3), (2, 3), (2, 3), (2, 2), (2, 2), (4, 2))
    *tensors, grad = (torch.randn(1, h, 6, c, requires_grad=not backward) for h, c in shapes)
    if not backward:
        return [(*tensors, *options)]
    results = torch.ops.torchlayers.ring_tensor_attention_forward(*tensors, *options)
    return [(grad, torch.randn(1, 4, 6), *tensors, *results, *options)]


def _whole_row_samples(backward=False):
    shapes = ((2, 4, 6, 3), (2, 2, 6, 3), (2, 2, 6, 3), (6, 6))
    q, k, v, bias = (torch.randn(size, requires_grad=not backward) for size in shapes)
    options = torch.zeros(1, dtype=torch.int64), SequenceLayout(6, 1, "zigzag").key, "", 0.5, 0.2, True
    if backward:
        return [(torch.randn(2, 4, 6, 3), q, k, v, torch.randn(2, 4, 6, 6).softmax(-1), bias, *options, True)]
    return [(q, k, v, bias, *options, "first")]


def _sequence_samples(*options):
    return [(torch.randn(2, 4, 6, 3, requires_grad=True), SequenceLayout(6, 1, "zigzag").key, 2, "", *options)]


def _exchange_samples(*options):
    x, y = torch.randn(2, 4, 6, 3, requires_grad=True), torch.randn(2, 4, 6, 1, requires_grad=True)
    return [([x, y], *options)]


_ZIGZAG = SequenceLayout(6, 1, "zigzag").key


# Argument tuples for every operation under torchlayers::, those of tables included.
def _sphere_samples():
    def signal(*shape, dtype=torch.float32, requires_grad=True):
        return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)

    def tables(*sizes, dtype=torch.float32):
        return [torch.randn(5, n, dtype=dtype) for n in sizes], torch.rand(5, dtype=dtype)

    product, bracket, power = sphere_product._PRODUCT, sphere_product._BRACKET, sphere_product._power((1, 3))
    yield [signal(2, 3, 4), signal(2, 1, 9)], *tables(4, 9, 16), product, 3, [False]
    yield [signal(2, 3, 4), signal(2, 3, 9, requires_grad=False)], *tables(4, 9, 1), product, 3, [True]
    yield (
        [signal(4, 3, 2).transpose(0, 2).detach().requires_grad_(), signal(2, 3, 1)],
        *tables(4, 1, 4),
        product,
        3,
        [False],
    )
    yield [signal(2, 3, 4), signal(2, 3, 9)], *tables(4, 4, 9, 9, 16), bracket, 3, [False]
    yield [signal(2, 3, 9)], *tables(9, 4), power, 3, [False, False]
    yield [signal(2, 3, 4, dtype=torch.float64)] * 2, *tables(4, 4, 9, dtype=torch.float64), product, 3, [False]
    yield [signal(2, 3, 4, dtype=torch.bfloat16, requires_grad=False)] * 2, *tables(4, 4, 9), product, 3, [False]
    yield [signal(0, 3, 4), signal(0, 1, 9)], *tables(4, 9, 16), product, 3, [False]


def _sphere_convolution_samples(backward=False):
    sizes = ((4, 3, 4), (5, 9), (5, 3, 3), (4, 3, 9), (5, 9), (5, 3, 3))
    x, y, h, grad, y2, h2 = (torch.randn(size, requires_grad=True) for size in sizes)
    tables = torch.randn(7, 4), torch.randn(7, 9), torch.randn(7, 9)
    target, source = torch.tensor([1, 3, 1, 2, 1], dtype=torch.int32), torch.tensor([0, 3, 2, 0, 1], dtype=torch.int32)
    offsets = torch.tensor([0, 0, 3, 4, 5], dtype=torch.int32), torch.tensor([0, 2, 3, 4, 5], dtype=torch.int32)
    orders = (node.argsort(stable=True).int() for node in (target, source))
    edges = source, next(orders), offsets[0], target, next(orders), offsets[1]
    if backward:
        yield x, grad, y, h, *tables, *edges
        return
    yield x, y, h, None, None, *tables, *edges
    yield x, y, h, y2, h2, *tables, *edges
    yield x.detach(), y, h.detach(), None, None, *tables, *edges


def _sparse_samples(order=0):
    spec = sparse_product._pattern_spec(1, (0, 1))
    paths = sparse_product._sizes(spec)[3]

    def draw(*sizes):
        return torch.randn(*sizes, requires_grad=order < 2)

    for y, w in (((2, 3, 4), (3, paths)), ((2, 1, 4), (2, 3, paths)), ((2, 3, 4), None)):
        arguments = [draw(2, 3, 4), draw(*y), None if w is None else draw(*w)]
        if order == 0:
            yield *arguments, spec
        elif order == 1:
            yield draw(2, 3, 4), *arguments, spec, [True, True, w is not None]
        else:
            directions = [torch.randn_like(a) if a is not None else None for a in arguments]
            yield draw(2, 3, 4), *arguments, *directions, spec, [True, True, True, w is not None]


def _separable_samples(kind=""):
    """Both orders and memory formats, with strides and dilation; nothing; what wants no gradient."""
    geometry = [2, 1], [1, 2], [1, 2], [3, 5]
    kinds = (0, torch.float32, 2, True), (1, torch.bfloat16, 2, False), (0, torch.float32, 0, True)
    for across, dtype, batch, grad in kinds:
        x, first, second, bias, g = (
            torch.randn(size, dtype=dtype, requires_grad=grad)
            for size in ((batch, 3, 6, 5), (2, 3, 3), (4, 2, 3), (4,), (batch, 4, 3, 5))
        )
        if kind == "input":
            yield g, first, second, across, *geometry[:3], [6, 5]
        elif kind == "filters":
            yield x, g, first, second, across, *geometry[:3], [True, across == 0]
        else:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_(grad)
            yield x, first, second, bias, across, *geometry, None
            yield x, first, second, None if across else bias, across, *geometry, "gelu"


def _lists():
    """A triangle with a loop and a node that hangs on it, as sorted lists: row, col, offsets, reverse."""
    row, col = [0, 0, 1, 1, 1, 2, 2, 2, 3], [1, 2, 0, 1, 2, 0, 1, 3, 2]
    reverse = [2, 5, 0, 3, 6, 1, 4, 8, 7]
    return [torch.tensor(t, dtype=torch.int32) for t in (row, col, [0, 2, 5, 8, 9], reverse)]


def _masked_product_samples():
    for shape, transpose_a, transpose_b in (((9,), False, False), ((9, 3), True, False), ((9, 3), False, True)):
        tensors = [torch.randn(shape, requires_grad=True) for _ in range(2)]
        yield *tensors, *_lists(), transpose_a, transpose_b
    counts = torch.ones(9, dtype=torch.int64)
    yield counts, counts, *_lists(), False, False
    empty = torch.zeros(0, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int32)
    yield empty, empty, none, none, torch.zeros(4, dtype=torch.int32), none, False, False


def _edge_polynomials_samples():
    index = torch.tensor([[0, 1, 1, 2, 0, 2], [1, 0, 2, 1, 2, 0]])
    patterns = "[(((0, 1), (0, 2), (1, 2)), (0, 1), False, 3), (((0, 1), (1, 2)), (0, 2), False, 3)]"
    yield index, None, 3, patterns
    yield index, torch.ones(6, dtype=torch.float64), 4, patterns
    yield index, None, 3, "[]"


def _pair_pointers(dtype=torch.int64):
    """Graphs of 2, 0, 1 and 3 nodes."""
    return torch.tensor([0, 2, 2, 3, 6], dtype=dtype), torch.tensor([0, 4, 4, 5, 14], dtype=dtype)


def _segment_matmul_samples():
    for dtype, turned in (
        (torch.float32, (False, True)),
        (torch.float32, (True, True)),
        (torch.bfloat16, (True, False)),
    ):
        factors = [torch.randn(14, 5, dtype=dtype, requires_grad=dtype == torch.float32) for _ in range(2)]
        yield *factors, *_pair_pointers(), *turned, 0.5
    yield (
        torch.randn(5, 14).t().requires_grad_(),
        torch.randn(14, 1).expand(14, 5),
        *_pair_pointers(torch.int32),
        False,
        False,
        0.0,
    )
    yield (
        torch.randn(0, 5, requires_grad=True),
        torch.randn(0, 5),
        *(torch.zeros(2, dtype=torch.int64),) * 2,
        False,
        False,
        1.0,
    )


def _pair_mlp_samples(backward=False):
    for plus, rows in ((True, 14), (False, 14), (True, 0)):
        ptr = _pair_pointers() if rows else (torch.zeros(2, dtype=torch.int64),) * 2
        shapes = [(rows, 3)]
        for width in (8, 4) if plus else (3, 3):
            shapes += [(5, width), (5,), (5, 5), (5,)]
        x, *parameters = (torch.randn(shape, requires_grad=not backward) for shape in shapes)
        if not backward:
            yield x, *ptr, *parameters, plus
            continue
        results = torch.ops.torchlayers.pair_mlp(x, *ptr, *parameters, plus)
        for wants_x in (True, False):
            yield *(torch.randn_like(m) for m in results), *results, x, *ptr, *parameters, plus, wants_x


def _pair_linear_samples(backward=False):
    for plus, rows in ((True, 14), (False, 14), (True, 0)):
        ptr = _pair_pointers() if rows else (torch.zeros(2, dtype=torch.int64),) * 2
        shapes = (rows, 3), (rows, 5), (4, 8 + plus), (4,)
        x, y, weight, bias = (torch.randn(shape, requires_grad=not backward) for shape in shapes)
        if not backward:
            yield x, y, *ptr, weight, bias, plus
            continue
        for wants_x in (True, False):
            yield torch.randn(rows, 4), x, y, *ptr, weight, plus, wants_x


SAMPLES = {
    "all_reduce": lambda: [(torch.randn(2, 6, requires_grad=True), "", "", "first")],
    "all_to_all_heads": lambda: _exchange_samples(_ZIGZAG, "", 0, "", None, "first"),
    "all_to_all_sequence": lambda: _exchange_samples([4, 4], _ZIGZAG, "", 0),
    "edge_polynomials": _edge_polynomials_samples,
    "gather_sequence": lambda: _sequence_samples(False),
    "low_rank_conv": _low_rank_conv_samples,
    "low_rank_conv_gradients": lambda: _low_rank_conv_samples(backward=True),
    "low_rank_linear": _low_rank_graph_samples,
    "low_rank_linear_forward": _low_rank_samples,
    "low_rank_linear_gradients": lambda: _low_rank_graph_samples(backward=True),
    "masked_product": _masked_product_samples,
    "pair_linear": _pair_linear_samples,
    "pair_linear_backward": lambda: _pair_linear_samples(backward=True),
    "pair_mlp": _pair_mlp_samples,
    "pair_mlp_backward": lambda: _pair_mlp_samples(backward=True),
    "reduce_scatter_sequence": _sequence_samples,
    "ring_attention_backward": lambda: _ring_samples(backward=True),
    "ring_attention_forward": _ring_samples,
    "ring_self_attention": _whole_row_samples,
    "ring_self_attention_backward": lambda: _whole_row_samples(backward=True),
    "ring_tensor_attention_backward": lambda: _ring_tensor_samples(backward=True),
    "ring_tensor_attention_forward": _ring_tensor_samples,
    "scatter_sequence": _sequence_samples,
    "segment_matmul": _segment_matmul_samples,
    "separable_conv": _separable_samples,
    "separable_conv_filters": lambda: _separable_samples("filters"),
    "separable_conv_input": lambda: _separable_samples("input"),
    "sparse_product": _sparse_samples,
    "sparse_product_gradients": lambda: _sparse_samples(1),
    "sparse_product_second": lambda: _sparse_samples(2),
    "spectral_mix": lambda: _mix_samples("dense"),
    "spectral_mix_cp": lambda: _mix_samples("cp"),
    "spectral_mix_cp_backward": lambda: _mix_samples("cp", backward=True),
    "spectral_mix_outer": lambda: [
        (torch.randn(2, 6, 2, 3, requires_grad=True), torch.randn(2, 6, 2, 4, requires_grad=True), 3, conj)
        for conj in (False, True)
    ],
    "spectral_mix_tucker": lambda: _mix_samples("tucker"),
    "spectral_mix_tucker_backward": lambda: _mix_samples("tucker", backward=True),
    "sphere_convolution": _sphere_convolution_samples,
    "sphere_convolution_filter": lambda: _sphere_convolution_samples(backward=True),
    "sphere_polynomial": _sphere_samples,
    "table": lambda: [("test_ops", [4], torch.float32, torch.device("cpu"))],
    "tdft1_forward": _line_samples,
    "tdft1_inverse": _line_inverse_samples,
    "tdft1_inverse_backward": lambda: _inverse_backward_samples(1),
    "tdft2_forward": _forward_samples,
    "tdft2_inverse": lambda: [*_inverse_samples(), *_inverse_epilogue_samples()],
    "tdft2_inverse_backward": lambda: _inverse_backward_samples(2),
    "tensor_attention_backward": _attention_gradient_samples,
    "tensor_attention_chunked": _attention_samples,
    "tensor_attention_chunked_backward": _attention_gradient_samples,
    "tensor_attention_forward": _attention_samples,
}


def test_opcheck():
    for name in _aot.kernel_modules():
        importlib.import_module(f"torchlayers.kernels.{name}")
    # Register the chunked path, which is the attention kernels' plain implementation, the collectives, what serves
    # every rank in one graph, and the polynomials of edges.
    importlib.import_module("torchlayers.tensor_attention")
    importlib.import_module("torchlayers.ring_attention")
    importlib.import_module("torchlayers.maestro")
    importlib.import_module("torchlayers.polynomial")
    results = opcheck_all(SAMPLES)
    assert {"tdft2_forward", "tdft2_inverse", "spectral_mix", "table"} <= results.keys()


def _complex(planes):
    return torch.complex(*planes.double())


def test_plain_implementations_are_the_definition():
    f1, f2 = _bases()
    x = torch.randn(2, 3, 6, 5)
    modes = tdft.tdft2_forward(x, f1, f2)
    expected = _complex(f1) @ x.to(torch.complex128) @ _complex(f2)
    assert_close_rel(modes, torch.view_as_real(expected).permute(4, 2, 3, 0, 1))
    planes = tdft.tdft2_inverse(modes, f1.mT, f2.mT, torch.bfloat16, conj=True)
    expected = (_complex(f1.mT).conj() @ _complex(modes).permute(2, 3, 0, 1) @ _complex(f2.mT).conj()).real
    assert planes.dtype == torch.bfloat16
    assert_close_rel(planes, expected)


def test_gradient_of_the_plain_implementations():
    f1, f2 = _bases()
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    weight = torch.randn(2, 4, 3, 2, 3)
    (gradient,) = torch.autograd.grad((tdft.tdft2_forward(x, f1, f2).pow(2) * weight).sum(), x)
    exact = x.detach().double().requires_grad_()
    modes = torch.view_as_real(_complex(f1) @ exact.to(torch.complex128) @ _complex(f2)).permute(4, 2, 3, 0, 1)
    (expected,) = torch.autograd.grad((modes.pow(2) * weight).sum(), exact)
    assert_close_rel(gradient, expected, rtol=5e-6)


def test_full_graph_with_a_dynamic_batch():
    f1, f2 = _bases()

    def loss(x):
        return tdft.tdft2_inverse(tdft.tdft2_forward(x, f1, f2), f1.mT, f2.mT).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 6, 5, requires_grad=True)
        (ours,) = torch.autograd.grad(compiled(x), x)
        (plain,) = torch.autograd.grad(loss(x), x)
        assert_close_rel(ours, plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 6, 5)}, ValueError, r"x must have shape \(B, C, N1, N2\), got \(3, 6, 5\)"),
        ({"x": torch.zeros(2, 3, 6, 5, dtype=torch.float64)}, TypeError, "x must be float32.*float64"),
        ({"f1": torch.zeros(2, 4, 7)}, ValueError, r"f1 must have shape \(2, k1, N1\) = \(2, \*, 6\), got \(2, 4, 7\)"),
        ({"f1": torch.zeros(2, 4, 6).double()}, TypeError, "f1 must be float32"),
        ({"f2": torch.zeros(5, 3)}, ValueError, "f2 must have shape"),
        ({"f2": torch.zeros(1, 5, 3)}, ValueError, "f2 must have shape"),
        ({"precision": "exact"}, ValueError, "precision must be None or one of"),
    ],
)
def test_forward_refuses(change, error, message):
    f1, f2 = _bases()
    with pytest.raises(error, match=message):
        tdft.tdft2_forward(**{"x": torch.zeros(2, 3, 6, 5), "f1": f1, "f2": f2} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.zeros(3, 4, 3, 2, 3)}, ValueError, r"y must have shape \(2, k1, k2, B, C\)"),
        ({"y": torch.zeros(2, 4, 3, 2, 3, dtype=torch.bfloat16)}, TypeError, "y must be float32"),
        ({"g1": torch.zeros(2, 6, 5)}, ValueError, r"g1 must have shape \(2, N1, k1\) = \(2, \*, 4\)"),
        ({"g2": torch.zeros(2, 2, 5)}, ValueError, r"g2 must have shape \(2, k2, N2\) = \(2, 3, \*\)"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32"),
    ],
)
def test_inverse_refuses(change, error, message):
    f1, f2 = _bases()
    with pytest.raises(error, match=message):
        tdft.tdft2_inverse(**{"y": torch.zeros(2, 4, 3, 2, 3), "g1": f1.mT, "g2": f2.mT} | change)


def test_kernels_refuse_a_second_name():
    """``import kernels`` from the repository's root would register every operation again."""
    root = Path(_lib.__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import kernels._lib"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 1
    assert "import the kernels as torchlayers.kernels" in result.stderr
