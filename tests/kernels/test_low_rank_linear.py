"""The fused low-rank map, in Triton's interpreter or on a GPU, against the prefix's formula in float64."""

import pytest
import torch
import torch.nn.functional as F

import torchlayers
from torchlayers.functional import low_rank_linear
from torchlayers.kernels import low_rank_linear as kernels
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

NAMES = ("x", "weight_in", "weight_out", "bias")
# (rows, in, out, r, rank): one element; the whole rank; tiles of everything, none full; widths 16, 32, 64, 128, 256.
SHAPES = [(1, 1, 1, 1, 1), (3, 5, 4, 2, 2), (37, 45, 50, 20, 1), (37, 45, 50, 20, 7), (64, 32, 48, 16, 16)]
SHAPES += [
    (33, 17, 35, 33, 17),
    (70, 19, 18, 48, 48),
    (9, 20, 21, 130, 128),
    (5, 33, 18, 300, 200),
    (2, 9, 8, 256, 256),
]


def make(shape, device, dtype=torch.float32, bias=True):
    rows, k, n, r, _ = shape
    sizes = [(rows, k), (r, k), (n, r)] + [(n,)] * bias
    tensors = [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]
    return tensors if bias else [*tensors, None]


def exact(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def definition(x, weight_in, weight_out, bias, rank):
    """``rank``: an int, or one for each row."""
    if isinstance(rank, int):
        rank = torch.full(x.shape[:1], rank, device=x.device)
    keep = torch.arange(weight_in.shape[0], device=x.device) < rank[:, None]
    y = (x @ weight_in.T * keep) @ weight_out.T
    return y if bias is None else y + bias


def gradients(y, tensors, g):
    return torch.autograd.grad(y, [t for t in tensors if t is not None], g)


def check(y, tensors, rank, g=None):
    """Value and all gradients; those of what lies beyond the rank are exactly zero."""
    wide = exact(tensors)
    wanted = definition(*wide, rank)
    assert y.dtype == tensors[0].dtype and y.is_contiguous()
    assert_close_rel(y, wanted)
    g = torch.randn_like(y)
    with nan_empty():
        found = gradients(y, tensors, g)
    for ours, reference in zip(found, gradients(wanted, wide, g.double()), strict=True):
        assert ours.dtype == y.dtype
        assert_close_rel(ours, reference)
    most = rank if isinstance(rank, int) else int(rank.max())
    assert not found[1][most:].any() and not found[2][:, most:].any()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, bias, device):
    tensors = make(shape, device, bias=bias)
    with nan_empty():
        y = kernels.low_rank_linear_forward(*tensors, shape[-1])
    check(y, tensors, shape[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 21])
def test_sixteen_bits(rank, dtype, device):
    """No worse than two products in that dtype, forward and backward."""
    shape = (37, 45, 50, 24, rank)
    tensors = make(shape, device, dtype)
    y = kernels.low_rank_linear_forward(*tensors, rank)
    x, v, u, bias = tensors
    plain = F.linear(F.linear(x, v[:rank]), u[:, :rank], bias)
    wide = exact(tensors)
    wanted = definition(*wide, rank)
    assert y.dtype == dtype
    assert_close_rel(y, wanted, baseline=plain)
    g = torch.randn_like(y)
    every = (gradients(y, tensors, g), gradients(wanted, wide, g.double()), gradients(plain, tensors, g))
    for ours, reference, baseline in zip(*every, strict=True):
        assert ours.dtype == dtype
        assert_close_rel(ours, reference, baseline=baseline)


@pytest.mark.parametrize("rank", [0, 1, 7, 16, 19])
def test_dead_columns_are_not_read(rank, device):
    """NaN beyond the rank changes no bit of the value or of any gradient."""
    tensors = make((37, 45, 50, 20, rank), device)
    poisoned = [t.detach().clone() for t in tensors]
    poisoned[1][rank:] = float("nan")
    poisoned[2][:, rank:] = float("nan")
    poisoned = [t.requires_grad_() for t in poisoned]
    results = []
    for inputs in (tensors, poisoned):
        y = kernels.low_rank_linear_forward(*inputs, rank)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for clean, other in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, other)


@pytest.mark.parametrize("rank", [0, 3, 16, 29])
def test_prefixes_are_the_sliced_factors(rank, device):
    x, v, u, bias = (t.detach() for t in make((20, 18, 17, 30, rank), device))
    sliced = kernels.low_rank_linear_forward(x, v[:rank].clone(), u[:, :rank].clone(), bias, rank)
    assert torch.equal(kernels.low_rank_linear_forward(x, v, u, bias, rank), sliced)


@pytest.mark.parametrize("run", [1, 5, 16, 32, 100])
def test_a_rank_for_each_run_of_rows(run, device):
    rows, rank = 75, 20
    tensors = make((rows, 19, 21, 24, rank), device)
    count = -(-rows // run)
    ranks = torch.tensor([20, 0, 7, 16, 1] * 15, dtype=torch.int32, device=device)[:count]
    with nan_empty():
        y = kernels.low_rank_linear_forward(*tensors, rank, ranks, run)
    check(y, tensors, ranks.repeat_interleave(run)[:rows])


def test_a_rank_for_each_run_never_reads_beyond_the_largest_of_a_tile(device):
    """Rows 0..31 and 32..63 are a tile each: what only the second uses may be anything for the first."""
    x, v, u, bias = (t.detach() for t in make((64, 19, 21, 24, 24), device))
    ranks = torch.tensor([5, 5], dtype=torch.int32, device=device)
    expected = definition(*(t.double() for t in (x, v, u, bias)), 5)
    v[5:], u[:, 5:] = float("nan"), float("inf")
    assert_close_rel(kernels.low_rank_linear_forward(x, v, u, bias, 24, ranks, 32), expected)


def test_ranks_are_taken_into_the_range(device):
    tensors = [t.detach() for t in make((40, 9, 8, 24, 20), device)]
    ranks = torch.tensor([-3, 99], dtype=torch.int32, device=device)
    y = kernels.low_rank_linear_forward(*tensors, 20, ranks, 20)
    rows = torch.tensor([0, 20], device=device).repeat_interleave(20)
    assert_close_rel(y, definition(*(t.double() for t in tensors), rows))


def test_strided(device):
    tensors = make((37, 18, 19, 20, 13), device)
    strided = [t.detach().T.contiguous().T.requires_grad_() for t in tensors[:3]]
    bias = tensors[3].detach().repeat_interleave(2)[::2].requires_grad_()
    assert not any(t.is_contiguous() for t in (*strided, bias))
    every = []
    for inputs in (tensors, [*strided, bias]):
        y = kernels.low_rank_linear_forward(*inputs, 13)
        every.append((y, *torch.autograd.grad((y * torch.arange(19, device=device)).sum(), inputs)))
    for one, other in zip(*every, strict=True):
        assert_close_rel(other, one.double())
    expanded = torch.randn(1, 18, device=device).expand(37, 18)
    y = kernels.low_rank_linear_forward(expanded, *(t.detach() for t in tensors[1:]), 13)
    assert_close_rel(y, definition(expanded.double(), *(t.detach().double() for t in tensors[1:]), 13))


@pytest.mark.parametrize("rank", [7, 20, 100, 250])
def test_every_launch_configuration(rank, device):
    shape = (140, 70, 75, 256, rank)
    tensors = [t.detach() for t in make(shape, device)]
    expected = definition(*(t.double() for t in tensors), rank)
    for meta in kernels._candidates(rank, False, kernels._lib.target_of(device)):
        with nan_empty():
            y, h = kernels._launch(*tensors, rank, None, 1, True, candidates=[meta])
        assert_close_rel(y, expected)
        assert_close_rel(h[:, :rank], tensors[0].double() @ tensors[1][:rank].double().T)
        assert not h[:, rank:].any()


@pytest.mark.parametrize("per_run", [False, True], ids=["one", "runs"])
def test_second_derivatives(per_run, device):
    tensors = make((5, 4, 3, 6, 4), device)
    ranks = torch.tensor([4, 1, 3], dtype=torch.int32, device=device) if per_run else None
    rows = ranks.repeat_interleave(2)[:5] if per_run else 4

    def second(y, tensors):
        first = torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    wide = exact(tensors)
    wanted = second(definition(*wide, rows), wide)
    for ours, reference in zip(
        second(kernels.low_rank_linear_forward(*tensors, 4, ranks, 2), tensors), wanted, strict=True
    ):
        assert_close_rel(ours, reference, rtol=1e-5)


@pytest.mark.parametrize("wants", range(1, 16))
def test_some_gradients(wants, device):
    """Whatever needs no gradient gets none, and the others are the same."""
    tensors = make((9, 8, 7, 6, 5), device)
    every = torch.autograd.grad(kernels.low_rank_linear_forward(*tensors, 5).square().sum(), tensors)
    some = [t.detach().requires_grad_(bool(wants >> i & 1)) for i, t in enumerate(tensors)]
    kernels.low_rank_linear_forward(*some, 5).square().sum().backward()
    for t, wanted in zip(some, every, strict=True):
        assert (t.grad is None) == (not t.requires_grad)
        if t.requires_grad:
            assert_close_rel(t.grad, wanted.double())


def test_the_inner_product_is_kept_only_for_training(device):
    tensors = make((9, 8, 7, 20, 17), device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.low_rank_linear_forward(*tensors, 17)
    known = {t.data_ptr() for t in tensors}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(9, 32)]
    frozen = [t.detach() for t in tensors]
    _, h = kernels._launch(*frozen, 17, None, 1, False)
    assert h.shape == (0, 32)


@pytest.mark.parametrize("empty", range(5))
def test_empty(empty, device):
    shape = [6, 5, 4, 3, 3]
    shape[empty] = 0
    if empty == 3:
        shape[4] = 0
    tensors = make(shape, device)
    with nan_empty():
        y = kernels.low_rank_linear_forward(*tensors, shape[4])
        found = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == (shape[0], shape[2])
    assert torch.equal(y, tensors[3].expand_as(y)) or shape[1] * shape[4] > 0
    for gradient, t in zip(found, tensors, strict=True):
        assert gradient.shape == t.shape and gradient.isfinite().all()
    assert torch.equal(found[3], torch.full_like(tensors[3], shape[0]))


def test_repeated_runs_agree_bit_for_bit(device):
    tensors = make((40, 18, 19, 20, 13), device)

    def once():
        y = kernels.low_rank_linear_forward(*tensors, 13)
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_no_more_variants_than_widths():
    """The rank is no specialisation: a kernel for each power of two from 16 to 256."""
    for target in (*kernels._lib.TARGETS.values(), ("interpreter", "")):
        for low in (False, True):
            widths = {kernels._candidates(rank, low, target)[0]["BR"] for rank in range(1, kernels.MAX_RANK + 1)}
            assert widths == {16, 32, 64, 128, 256}
    if not kernels.INTERPRET:  # there, a kernel is not compiled and has no parameters to specialise on
        free = {p.name for p in kernels.low_rank_linear_kernel.params if p.do_not_specialize}
        assert free == {"M", "rank", "run"}


def test_where_fusing_pays():
    bf16 = torch.bfloat16
    assert kernels.fuses(8192, 1024, 1024, 128, bf16) and kernels.fuses(8192, 1024, 1024, 1, torch.float16)
    assert not kernels.fuses(8192, 1024, 1024, 128, torch.float32)
    assert not kernels.fuses(8192, 1024, 1024, 256, bf16)
    assert not kernels.fuses(256, 1024, 1024, 64, bf16)
    assert not kernels.fuses(8192, 1024, 1024, 0, bf16)


@pytest.mark.parametrize("rank", [None, 0, 1, 6, "samples", "rows"])
def test_the_public_function_takes_the_kernel(rank, device):
    """Any number of rows, leading dimensions, and every kind of rank, where the backend is forced."""
    x = torch.randn(3, 4, 9, device=device, requires_grad=True)
    _, v, u, bias = make((1, 9, 7, 6, 6), device)
    rows = torch.full((12,), 6 if rank is None else rank, device=device) if not isinstance(rank, str) else None
    if rank == "samples":
        rank = torch.tensor([6, 0, 3], device=device)
        rows = rank.repeat_interleave(4)
    elif rank == "rows":
        rank = rows = torch.arange(12, device=device) % 7
    tensors = [x, v, u, bias]
    y = low_rank_linear(*tensors, rank, backend="triton")
    if not isinstance(rank, int) or rank > 0:
        assert torchlayers.last_dispatch() == "triton: low_rank_linear_forward"
    wide = exact(tensors)
    wanted = definition(wide[0].reshape(12, 9), *wide[1:], rows).reshape(3, 4, 7)
    assert_close_rel(y, wanted)
    g = torch.randn_like(y)
    for ours, reference in zip(gradients(y, tensors, g), gradients(wanted, wide, g.double()), strict=True):
        assert_close_rel(ours, reference)


def test_the_public_function_names_what_the_kernel_lacks(device):
    x, v, u, bias = (t.detach() for t in make((3, 4, 5, 300, 1), device))
    with pytest.raises(torchlayers.BackendError, match="ranks above 256, got 300"):
        low_rank_linear(x, v, u, bias, backend="triton")
    with pytest.raises(torchlayers.BackendError, match="float64"):
        low_rank_linear(x.double(), v.double(), u.double(), bias.double(), 3, backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x must have shape \(rows, in\), got \(2, 3, 4\)"),
        ({"x": torch.zeros(3, 4).double()}, TypeError, "x must be float32, float16 or bfloat16, got torch.float64"),
        (
            {"weight_in": torch.zeros(6, 5)},
            ValueError,
            r"weight_in must have shape \(r, in\) = \(\*, 4\), got \(6, 5\)",
        ),
        ({"weight_in": torch.zeros(6, 4).half()}, TypeError, "weight_in must be torch.float32, the dtype of x"),
        ({"weight_out": torch.zeros(5, 7)}, ValueError, r"weight_out must have shape \(out, r\) = \(\*, 6\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(out,\) = \(5,\), got \(4,\)"),
        ({"rank": 7}, ValueError, "rank must be from 0 to 6, got 7"),
        ({"rank": -1}, ValueError, "rank must be from 0 to 6, got -1"),
        ({"ranks": torch.zeros(2, dtype=torch.int32)}, ValueError, r"ranks must have shape \(3,\)"),
        ({"ranks": torch.zeros(3)}, TypeError, "ranks must be int32, got torch.float32"),
        ({"ranks": torch.zeros(3, dtype=torch.int32), "run": 0}, ValueError, "run must be at least 1, got 0"),
    ],
)
def test_refuses(change, error, message, device):
    inputs = dict(zip(NAMES, make((3, 4, 5, 6, 5), device), strict=True)) | {"rank": 5}
    inputs |= {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        kernels.low_rank_linear_forward(**inputs)
