"""The masked product of sparse matrices, in Triton's interpreter or on a GPU, against dense matrices in float64."""

import pytest
import torch

import torchlayers
from torchlayers.kernels import masked_product as kernels
from torchlayers.polynomial.edges import edge_support, masked_product
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]


def graph(kind: str, device) -> tuple[torch.Tensor, int]:
    """Symmetric edges: a hub with long lists, a loop, isolated nodes, a clique wider than a tile."""
    if kind == "one loop":
        return torch.zeros(2, 1, dtype=torch.int64, device=device), 1
    if kind == "clique":
        dense = 1 - torch.eye(6)
    else:
        dense = torch.zeros(7, 7)
        dense[0], dense[1, 2], dense[2, 3], dense[3, 3] = 1, 1, 1, 1
        dense[0, 5] = dense[0, 6] = 0
        dense = dense + dense.T
    return dense.nonzero().T.to(device), dense.shape[0]


def lists(edges: torch.Tensor, nodes: int) -> tuple[torch.Tensor, ...]:
    support = edge_support(edges, nodes)
    return support.row, support.col, support.offsets, support.reverse


def definition(a, b, edges, nodes, transpose_a=False, transpose_b=False):
    """Dense matrices, channel by channel; differentiable."""

    def dense(values, transpose):
        index = edges.flip(0) if transpose else edges
        columns = values[:, None] if values.ndim == 1 else values
        return values.new_zeros(nodes, nodes, columns.shape[1]).index_put(tuple(index), columns)

    out = torch.einsum("uwc,wvc->uvc", dense(a, transpose_a), dense(b, transpose_b))[tuple(edges)]
    return out[:, 0] if a.ndim == 1 else out


TURNED = [(False, False), (True, False), (False, True), (True, True)]
CASES = [("hub", 5, *turned) for turned in TURNED] + [("clique", None, False, False), ("one loop", 1, True, False)]


@pytest.mark.parametrize(("kind", "channels", "transpose_a", "transpose_b"), CASES)
def test_value_and_both_derivatives(kind, channels, transpose_a, transpose_b, device):
    edges, nodes = graph(kind, device)
    shape = (edges.shape[1],) if channels is None else (edges.shape[1], channels)
    tensors = [torch.randn(shape, device=device, requires_grad=True) for _ in range(2)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    along = [torch.randn(shape, device=device) for _ in range(3)]

    def derivatives(function, a, b, dtype):
        value = function(a, b)
        first = torch.autograd.grad(value, (a, b), along[0].to(dtype), create_graph=True)
        return value, *first, *torch.autograd.grad(first, (a, b), [t.to(dtype) for t in along[1:]])

    with nan_empty():
        found = derivatives(
            lambda a, b: kernels.masked_product(a, b, *lists(edges, nodes), transpose_a, transpose_b),
            *tensors, torch.float32,
        )  # fmt: skip
    wanted = derivatives(
        lambda a, b: definition(a, b, edges, nodes, transpose_a, transpose_b), *exact, torch.float64
    )  # fmt: skip
    assert found[0].dtype == torch.float32 and found[0].is_contiguous()
    for ours, reference in zip(found, wanted, strict=True):
        assert_close_rel(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_dtypes(dtype, device):
    edges, nodes = graph("hub", device)
    a, b = ((4 * torch.randn(edges.shape[1], 2, device=device)).to(dtype) for _ in range(2))
    found = kernels.masked_product(a, b, *lists(edges, nodes))
    assert found.dtype == dtype
    if dtype == torch.int64:
        assert torch.equal(found, definition(a, b, edges, nodes))
    else:
        assert_close_rel(found, definition(a.double(), b.double(), edges, nodes))


def test_integers_do_not_go_through_floats(device):
    edges, nodes = graph("clique", device)
    ones = torch.ones(edges.shape[1], dtype=torch.int64, device=device)
    large = torch.full_like(ones, 2**53 + 1)
    assert torch.equal(kernels.masked_product(large, ones, *lists(edges, nodes)), 4 * large)


def test_strides_and_repeated_runs(device):
    """Channels that lie apart, and numbers that are expanded; the same sums in the same order, bit for bit."""
    edges, nodes = graph("hub", device)
    size = edges.shape[1]
    a, b = torch.randn(6, size, device=device).T[:, ::2], torch.randn(size, 1, device=device).expand(-1, 3)
    assert not a.is_contiguous() and not b.is_contiguous()
    found = kernels.masked_product(a, b, *lists(edges, nodes))
    assert torch.equal(found, kernels.masked_product(a.contiguous(), b.contiguous(), *lists(edges, nodes)))
    assert_close_rel(found, definition(a.double(), b.double(), edges, nodes))


@pytest.mark.parametrize(("edges", "nodes", "channels"), [(0, 3, 2), (0, 0, 2), (2, 2, 0)])
def test_empty(edges, nodes, channels, device):
    index = torch.tensor([[0, 1], [1, 0]], device=device)[:, :edges]
    a = torch.randn(edges, channels, device=device, requires_grad=True)
    with nan_empty():
        found = kernels.masked_product(a, a, *lists(index, nodes))
    assert found.shape == (edges, channels)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert gradient.shape == a.shape


@pytest.mark.parametrize("two_way", [True, False])
def test_the_public_function_takes_the_kernel(two_way, device):
    edges, nodes = graph("hub", device)
    if not two_way:
        edges = edges[:, ::2]
    edges = edges[:, torch.randperm(edges.shape[1], device=device)]
    a, b = (torch.randn(edges.shape[1], 3, device=device, requires_grad=True) for _ in range(2))
    along = torch.randn_like(a)
    found = masked_product(a, b, edges, nodes, backend="triton")
    assert torchlayers.last_dispatch() == "triton: masked_product"
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    wanted = definition(*exact, edges, nodes)
    assert_close_rel(found, wanted)
    gradients = torch.autograd.grad(found, (a, b), along)
    for ours, reference in zip(gradients, torch.autograd.grad(wanted, exact, along.double()), strict=True):
        assert_close_rel(ours, reference)


def test_launch_configurations():
    for target in (*kernels._lib.TARGETS.values(), ("interpreter", "")):
        for channels in (1, 2, 33, 64, 500):
            candidates = kernels._candidates(channels, target)
            assert candidates and all(c["BC"] <= max(16, 2 * channels) for c in candidates)
            assert channels > 1 or {c["BC"] for c in candidates} == {1}
    if not kernels._lib.INTERPRET:  # there, a kernel is not compiled and has no parameters to specialise on
        assert {p.name for p in kernels.masked_product_kernel.params if p.do_not_specialize} == {"S"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(2, 1, 1)}, ValueError, r"a must have shape \(S,\) or \(S, C\)"),
        ({"a": torch.zeros(3, 2)}, ValueError, r"a must have shape .*, got \(3, 2\) and \(2,\)"),
        ({"a": torch.zeros(2, 2, dtype=torch.int32)}, TypeError, "a must be float64, .* got torch.int32"),
        ({"b": torch.zeros(2, 2).double()}, TypeError, "b must be torch.float32, the dtype of a, got torch.float64"),
        ({"b": torch.zeros(2, 3)}, ValueError, r"b must have the shape of a, \(2, 2\), got \(2, 3\)"),
        ({"col": torch.zeros(2, dtype=torch.int64)}, TypeError, "col must be int32, got torch.int64"),
        ({"reverse": torch.zeros(3, dtype=torch.int32)}, ValueError, r"reverse must have shape \(2,\), got \(3,\)"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, ValueError, r"offsets must have shape \(nodes \+ 1,\)"),
    ],
)
def test_refuses(change, error, message, device):
    row, col, offsets, reverse = lists(torch.tensor([[0, 1], [1, 0]], device=device), 2)
    arguments = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2), "row": row, "col": col, "offsets": offsets}
    arguments |= {"reverse": reverse} | change
    with pytest.raises(error, match=message):
        kernels.masked_product(*(t.to(device) for t in arguments.values()))
