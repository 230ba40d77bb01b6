"""low_rank_linear and its siblings: prefixes, gradients, ranks a sample, compiled graphs, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import torchlayers
from torchlayers.functional import low_rank_linear
from torchlayers.maestro import functional
from torchlayers.testing import assert_close_rel

R, IN, OUT = 6, 7, 5


def problem(*leading, dtype=torch.float64, bias=True):
    factors = torch.randn(R, IN, dtype=dtype), torch.randn(OUT, R, dtype=dtype)
    return torch.randn(*leading, IN, dtype=dtype), *factors, torch.randn(OUT, dtype=dtype) if bias else None


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (2, 0, 3)])
def test_a_prefix_is_the_product_of_the_first_columns(leading):
    x, weight_in, weight_out, bias = problem(*leading)
    for b in range(R + 1):
        # A sum of b outer products, term by term.
        weight = sum((torch.outer(weight_out[:, j], weight_in[j]) for j in range(b)), torch.zeros(OUT, IN).double())
        assert_close_rel(low_rank_linear(x, weight_in, weight_out, bias, b), x @ weight.T + bias, rtol=1e-13)
        without = low_rank_linear(x, weight_in, weight_out, rank=b)
        assert_close_rel(without, x @ weight.T, rtol=1e-13)
    assert torch.equal(
        low_rank_linear(x, weight_in, weight_out, bias), low_rank_linear(x, weight_in, weight_out, bias, R)
    )


@pytest.mark.parametrize("rank", range(R + 1))
def test_gradients_reach_every_argument_and_stop_at_the_rank(rank):
    x, weight_in, weight_out, bias = inputs = leaves(*problem(3))

    def run(*args):
        return low_rank_linear(*args, rank)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    run(*inputs).square().sum().backward()
    assert all(t.grad is not None for t in inputs)
    assert not weight_in.grad[rank:].any() and not weight_out.grad[:, rank:].any()
    if rank:
        assert weight_in.grad[:rank].all() and weight_out.grad[:, :rank].all()
    else:
        assert not x.grad.any() and bias.grad.all()


@pytest.mark.parametrize("rank", [0, 2, torch.tensor([2])], ids=str)
def test_what_lies_beyond_the_rank_is_not_read(rank):
    x, weight_in, weight_out, bias = inputs = problem(3)
    clean = leaves(*inputs)
    weight_in[2:], weight_out[:, 2:] = float("nan"), float("nan")
    poisoned = leaves(x, weight_in, weight_out, bias)
    want, got = low_rank_linear(*clean, rank), low_rank_linear(*poisoned, rank)
    assert torch.equal(got, want)
    for y in (want, got):
        y.square().sum().backward()
    for p, c in zip(poisoned, clean, strict=True):
        assert torch.equal(p.grad, c.grad)


def test_a_rank_for_each_sample_or_row():
    x, *factors = problem(4, 3)
    for ranks, rows in ((torch.tensor([0, 6, 2, 5]), (4, 1)), (torch.arange(12) % 7, (4, 3))):
        inputs, alone = leaves(x, *factors), leaves(x, *factors)
        y = low_rank_linear(*inputs, ranks)
        of_row = ranks.reshape(rows).expand(4, 3)
        rows = [low_rank_linear(alone[0][i, j], *alone[1:], int(of_row[i, j])) for i in range(4) for j in range(3)]
        want = torch.stack(rows).reshape(y.shape)
        assert_close_rel(y, want, rtol=1e-13)
        for out in (y, want):
            out.square().sum().backward()
        for a, b in zip(inputs, alone, strict=True):
            assert_close_rel(a.grad, b.grad, rtol=1e-12)
    assert torch.equal(low_rank_linear(x, *factors, torch.tensor([3])), low_rank_linear(x, *factors, 3))


def test_strided_factors_and_input():
    x, weight_in, weight_out, bias = problem(4)
    want = low_rank_linear(x, weight_in, weight_out, bias, 3)
    got = low_rank_linear(x.t().contiguous().t(), weight_in.t().contiguous().t(), weight_out.mT.clone().mT, bias, 3)
    assert_close_rel(got, want, rtol=1e-13)


def test_under_autocast_it_rounds_as_two_linear_calls():
    x, weight_in, weight_out, bias = inputs = problem(4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low_rank_linear(*inputs, 3)
        want = F.linear(F.linear(x, weight_in[:3]), weight_out[:, :3], bias)
        assert torch.equal(y, want) and y.dtype == torch.bfloat16
        at_zero = low_rank_linear(*inputs, 0)
    assert at_zero.dtype == torch.bfloat16 and torch.equal(at_zero, bias.bfloat16().expand(4, OUT))


def test_the_backend_is_obeyed(monkeypatch):
    inputs = problem(4, dtype=torch.float32)
    want = low_rank_linear(*inputs, 3)
    assert torchlayers.last_dispatch() == "torch: tensors on the CPU"
    assert torch.equal(low_rank_linear(*inputs, 3, backend="torch"), want)
    assert torchlayers.last_dispatch() == "torch: backend is 'torch'"
    monkeypatch.setattr(torchlayers._backend, "_INTERPRETED", False)
    with pytest.raises(torchlayers.BackendError, match="low_rank_linear_forward"):
        low_rank_linear(*inputs, 3, backend="triton")


# Compiled


def compiled(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("order", [(6, 3, 0, 1, 5, 2, 4), (0, 1, 2, 3, 4, 5, 6)], ids=["down", "up"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_a_few_graphs_serve_all_ranks(order, as_tensor):
    function, counter = compiled(low_rank_linear)
    inputs, alone = leaves(*problem(2, 3)), []
    for b in order:
        alone = leaves(*inputs)
        inputs = leaves(*inputs)
        y, want = function(*inputs, torch.tensor([b]) if as_tensor else b), low_rank_linear(*alone, b)
        assert_close_rel(y, want, rtol=1e-13)
        y.square().sum().backward(), want.square().sum().backward()
        for got, ref in zip(inputs, alone, strict=True):
            assert_close_rel(got.grad, ref.grad, rtol=1e-12)
    assert counter.frame_count <= (1 if as_tensor else 3)


def conv_problem(n_dim, groups):
    kernel, stride, padding, dilation = (3, 2, 1)[:n_dim], (2, 1, 1)[:n_dim], (1, 0, 2)[:n_dim], (1, 2, 1)[:n_dim]
    columns = 4 * torch.tensor(kernel).prod().item()
    factors = torch.randn(3, columns).double(), torch.randn(6, 3).double(), torch.randn(6).double()
    x = torch.randn(2, 4, *(6, 5, 4)[:n_dim]).double()
    return (x, *factors), (kernel, stride, padding, dilation, groups)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n_dim", [1, 2, 3])
def test_a_few_graphs_serve_all_ranks_of_a_convolution(n_dim, groups):
    function, counter = compiled(functional.low_rank_conv)
    tensors, geometry = conv_problem(n_dim, groups)
    for b in (3, 2, 0, 1):
        inputs, alone = leaves(*tensors), leaves(*tensors)
        y, want = function(*inputs, b, *geometry), functional.low_rank_conv(*alone, b, *geometry)
        assert_close_rel(y, want, rtol=1e-13)
        y.square().sum().backward(), want.square().sum().backward()
        for got, ref in zip(inputs, alone, strict=True):
            assert_close_rel(got.grad, ref.grad, rtol=1e-12)
    assert counter.frame_count <= 3


def test_a_compiled_convolution_keeps_channels_last():
    function, _ = compiled(functional.low_rank_conv)
    tensors, geometry = conv_problem(2, 1)
    x = tensors[0].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = function(x, *tensors[1:], 2, *geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_rel(y, functional.low_rank_conv(*tensors, 2, *geometry), rtol=1e-13)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rank", [(3, None), (0, None), (-1, None), (-1, torch.tensor([2]))], ids=str)
def test_operations_pass_opcheck(rank):
    x, *rest = leaves(*problem(2, 3))
    torch.library.opcheck(torch.ops.torchlayers.low_rank_linear, (x, *rest, *rank, None))
    no_bias = (x.detach(), rest[0], rest[1], None)
    torch.library.opcheck(torch.ops.torchlayers.low_rank_linear, (*no_bias, *rank, "torch"))
    grad = torch.randn(2, 3, OUT).double()
    operation = torch.ops.torchlayers.low_rank_linear_gradients
    torch.library.opcheck(operation, (grad, *problem(2, 3)[:3], *rank, None, [True, False, True]))
    tensors, geometry = conv_problem(2, 2)
    lists = [list(g) if isinstance(g, tuple) else g for g in geometry]
    torch.library.opcheck(torch.ops.torchlayers.low_rank_conv, (*leaves(*tensors), *rank, *lists))
    grad = torch.randn_like(functional.low_rank_conv(*tensors, 3, *geometry))
    operation = torch.ops.torchlayers.low_rank_conv_gradients
    torch.library.opcheck(operation, (grad, *tensors[:3], *rank, *lists, [True, True, False]))
    x = tensors[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(operation, (grad, x, *tensors[1:3], *rank, *lists, [True, True, True]))
    torch.library.opcheck(torch.ops.torchlayers.low_rank_conv, (x.requires_grad_(), *tensors[1:], *rank, *lists))


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.randn(2, IN + 1)}, ValueError, "x must have in = 7"),
        ({"x": torch.randn(())}, ValueError, "x must have at least 1 dimension"),
        ({"x": torch.ones(2, IN, dtype=torch.int64)}, TypeError, "x must have a real"),
        ({"x": torch.randn(2, IN).double()}, TypeError, "x must have the dtype of weight_in"),
        ({"weight_in": torch.randn(R, IN, dtype=torch.complex64)}, TypeError, "weight_in must have a real"),
        ({"weight_in": torch.randn(R, 1, IN)}, ValueError, "weight_in must have 2 dimensions"),
        ({"weight_out": torch.randn(OUT, R + 1)}, ValueError, "weight_out must have the rank of weight_in"),
        ({"weight_out": torch.randn(OUT, R).half()}, TypeError, "weight_out must have the dtype"),
        ({"bias": torch.randn(OUT + 1)}, ValueError, "bias must have out = 5"),
        ({"rank": -1}, ValueError, "rank must be at least 0"),
        ({"rank": R + 1}, ValueError, "rank must be at most 6"),
        ({"rank": 2.0}, TypeError, "rank must be an int"),
        ({"rank": True}, TypeError, "rank must be an int"),
        ({"rank": torch.tensor([1.0, 2.0])}, TypeError, "rank must be an int or a tensor of ints"),
        ({"rank": torch.tensor([1, 2, 3])}, ValueError, r"rank must be an int, or have shape \(2,\)"),
        ({"rank": torch.tensor([1, R + 1])}, ValueError, "rank must have entries from 0 to 6"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    x, weight_in, weight_out, bias = problem(2, dtype=torch.float32)
    good = {"x": x, "weight_in": weight_in, "weight_out": weight_out, "bias": bias}
    with pytest.raises(error, match=match):
        low_rank_linear(**(good | change))
