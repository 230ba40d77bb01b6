"""The public functions on plain torch: every option against the definition or torch's own attention, and bad input."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchlayers
from torchlayers._attention import normalize_window
from torchlayers.tensor_attention import (
    chunked,
    functional,
    nth_order_attention,
    polynomial_tensor_attention,
    reference,
    tensor_attention,
)
from torchlayers.testing import assert_close_rel, relative_error

FORMS = ("trilinear", "determinant", "strassen")


def inputs(batch=1, heads=2, nq=6, n1=6, n2=6, d=3, dv=2, kv_heads=None, dtype=torch.float64, grad=True):
    kv_heads = kv_heads or heads
    shapes = [(heads, nq, d), (kv_heads, n1, d), (kv_heads, n2, d), (kv_heads, n1, dv), (kv_heads, n2, dv)]
    return [torch.randn(batch, *shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def exact(arguments, *, window1=None, window2=None, is_causal=False, **options):
    windows = {
        "window1": normalize_window("window1", window1, is_causal),
        "window2": normalize_window("window2", window2, is_causal),
    }
    return reference.tensor_attention(*arguments, is_causal=is_causal, **windows, **options)


WINDOWS = st.sampled_from([None, 1, 3, (2, 1), (0, 0), (-1, 2), (4, -1), (1, 3)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    lengths=st.tuples(*[st.sampled_from([1, 5, 8, 14])] * 3),
    channels=st.sampled_from([(3, 1), (6, 4)]),
    window1=WINDOWS,
    window2=WINDOWS,
    is_causal=st.booleans(),
    form=st.sampled_from(FORMS),
    dropout_p=st.sampled_from([0.0, 0.3]),
    offsets=st.tuples(st.sampled_from([0, 4, 30]), st.sampled_from([0, 3]), st.sampled_from([0, 2])),
    padded=st.booleans(),
    tile=st.sampled_from([1, 300, 5000, 2**18]),
)
def test_is_the_definition_whatever_the_tiles(
    batch, kv_heads, group, lengths, channels, window1, window2, is_causal, form, dropout_p, offsets, padded, tile
):  # fmt: skip
    torch.manual_seed(1)
    (nq, n1, n2), (d, dv) = lengths, channels
    arguments = inputs(batch, kv_heads * group, nq, n1, n2, d, dv, kv_heads)
    options = {"window1": window1, "window2": window2, "is_causal": is_causal, "form": form}
    options |= dict(zip(("q_offset", "k1_offset", "k2_offset"), offsets, strict=True))
    options |= {"dropout_p": dropout_p, "dropout_seed": 2**40 + 11}
    if padded:
        options["key_padding_mask1"] = torch.rand(batch, n1) > 0.3
        options["key_padding_mask2"] = torch.rand(batch, n2) > 0.3
    before, chunked.TILE = chunked.TILE, tile
    try:
        out, lse = tensor_attention(*arguments, **options, enable_gqa=True, return_lse=True)
        expected, expected_lse = exact(arguments, **options)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
        g, g_lse = torch.randn_like(out), torch.where(lse.isfinite(), torch.randn_like(lse), 0.0)
        ours = torch.autograd.grad([out, lse], arguments, [g, g_lse])
    finally:
        chunked.TILE = before
    for a, b in zip(ours, torch.autograd.grad([expected, expected_lse], arguments, [g, g_lse]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, monkeypatch):
    monkeypatch.setattr(chunked, "TILE", 40)
    arguments = inputs(heads=2, kv_heads=1, nq=3, n1=3, n2=3)
    keep = torch.tensor([[False, True, True]])
    run = partial(
        tensor_attention, key_padding_mask1=keep, is_causal=True, window1=2, window2=3, form=form, enable_gqa=True,
        dropout_p=0.2, dropout_seed=1,
    )  # fmt: skip
    assert gradcheck(lambda *x: run(*x, return_lse=False), arguments)
    # The first row sees nothing and has an lse of -inf.
    assert gradcheck(lambda *x: run(*x, return_lse=True)[1][:, :, 1:], arguments)


def test_second_derivatives_are_the_dense_backend_s():
    arguments = inputs(heads=1, nq=1, n1=2, n2=2, dv=1)
    assert gradgradcheck(lambda *x: tensor_attention(*x, backend="dense"), arguments)
    (first,) = torch.autograd.grad(tensor_attention(*arguments).square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='dense'"):
        torch.autograd.grad(first.sum(), arguments[0])
    compiled = torch.compile(tensor_attention, backend="eager", fullgraph=True)
    (first,) = torch.autograd.grad(compiled(*arguments).square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='dense'"):
        torch.autograd.grad(first.sum(), arguments[0])


def test_dense_backend_takes_pair_masks():
    q, k1, k2, v1, v2 = arguments = inputs(grad=False)
    mask = torch.rand(6, 6, 6) > 0.5
    mask[:, 0, 0] = True
    out, lse = tensor_attention(*arguments, pair_mask=mask, backend="dense", return_lse=True)
    k, v = ((x[:, :, :, None] * y[:, :, None]).flatten(2, 3) for x, y in ((k1, k2), (v1, v2)))
    assert_close_rel(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(1)))
    assert lse.shape == (1, 2, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(dtype):
    low = inputs(nq=20, n1=20, n2=20, d=16, dv=16, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in low]
    out, lse = tensor_attention(*low, is_causal=True, window2=9, return_lse=True)
    expected, expected_lse = exact(wide, is_causal=True, window2=9)
    assert out.dtype == dtype and lse.dtype == torch.float32
    # Each of the five factors and the output are rounded once.
    assert_close_rel(out, expected)
    assert_close_rel(lse, expected_lse, rtol=2e-6)
    g = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, low, g.to(dtype))
    for a, b in zip(gradients, torch.autograd.grad(expected, wide, g.to(dtype).double()), strict=True):
        assert a.dtype == dtype
        assert_close_rel(a, b, rtol=5e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_large_logits_do_not_overflow():
    arguments = [40 * x for x in inputs(dtype=torch.float32, grad=False, d=6)]
    out, lse = tensor_attention(*arguments, return_lse=True)
    expected, expected_lse = exact([x.double() for x in arguments])
    assert expected_lse.abs().max() > 1e4
    assert_close_rel(lse, expected_lse)
    assert_close_rel(out, expected, rtol=1e-2)  # float32 logits of 10^5 have an error of 10^-2


def test_views_are_read_in_place():
    """Heads behind positions, as after a projection, and keys expanded over the batch."""
    q, k1, k2, v1, v2 = (torch.randn(2, 6, 2, 3, dtype=torch.float64).transpose(1, 2) for _ in range(5))
    k1 = torch.randn(1, 2, 6, 3, dtype=torch.float64).expand(2, -1, -1, -1)
    arguments = [x.requires_grad_() for x in (q, k1, k2, v1, v2)]
    out = tensor_attention(*arguments, is_causal=True)
    plain = [x.detach().contiguous().requires_grad_() for x in arguments]
    assert_close_rel(out, exact(plain, is_causal=True)[0])
    g = torch.randn_like(out)
    expected = torch.autograd.grad(exact(plain, is_causal=True)[0], plain, g)
    for a, b in zip(torch.autograd.grad(out, arguments, g), expected, strict=True):
        assert_close_rel(a, b)


@pytest.mark.parametrize("empty", ["batch", "heads", "nq", "n1", "n2"])
def test_empty_tensors(empty):
    sizes = {"batch": 2, "heads": 2, "nq": 4, "n1": 4, "n2": 4} | {empty: 0}
    arguments = inputs(**sizes)
    out, lse = tensor_attention(*arguments, is_causal=True, window1=2, return_lse=True)
    assert out.shape == (sizes["batch"], sizes["heads"], sizes["nq"], 2) and out.requires_grad
    assert (out == 0).all() and (lse == -torch.inf).all()
    for x, gradient in zip(arguments, torch.autograd.grad(out.sum(), arguments), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


def test_rows_that_see_nothing():
    arguments = inputs(batch=2)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, :3] = False  # padded on the left: with a window of 2 queries 0, 1, 2 see nothing
    out, lse = tensor_attention(
        *arguments, key_padding_mask1=keep, is_causal=True, window1=2, window2=2, return_lse=True
    )
    assert (out[0, :, :3] == 0).all() and (lse[0, :, :3] == -torch.inf).all() and lse[0, :, 3:].isfinite().all()
    gradients = torch.autograd.grad(out.sum(), arguments)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][0, :, :3] == 0).all() and (gradients[1][0, :, :3] == 0).all()
    keep[:] = False
    out = tensor_attention(*arguments, key_padding_mask2=keep)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), arguments))


def test_what_lies_in_padding_does_not_matter():
    arguments = inputs(nq=20, n1=20, n2=20)
    keep = torch.ones(1, 20, dtype=torch.bool)
    keep[:, 12:15] = False
    options = {"key_padding_mask1": keep, "key_padding_mask2": keep, "is_causal": True, "window1": 5, "window2": 7}
    out = tensor_attention(*arguments, **options)
    g = torch.randn_like(out)
    gradients = torch.autograd.grad(out, arguments, g)
    for nothing in (float("nan"), float("inf")):
        filled = [x.detach().clone().requires_grad_() for x in arguments]
        with torch.no_grad():
            for x in filled[1:]:
                x[:, :, 12:15] = nothing
        again = tensor_attention(*filled, **options)
        torch.testing.assert_close(again, out, rtol=0, atol=0)
        for a, b in zip(torch.autograd.grad(again, filled, g), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all((x[:, :, 12:15] == 0).all() for x in gradients[1:])


def test_decoding_with_a_key_cache():
    """One query at a time against the keys so far, and the whole sequence at once; windows, dropout and all."""
    q, k1, k2, v1, v2 = inputs(nq=9, n1=9, n2=9, grad=False)
    options = {"is_causal": True, "window1": 4, "window2": 3, "dropout_p": 0.3, "dropout_seed": 2}
    whole = tensor_attention(q, k1, k2, v1, v2, **options)
    for n in range(1, 10):
        low = max(0, n - 4)  # only what a window reaches is kept
        cache = [x[:, :, low:n] for x in (k1, k2, v1, v2)]
        step = tensor_attention(
            q[:, :, n - 1 : n], *cache, **options, q_offset=n - 1, k1_offset=low, k2_offset=low
        )  # fmt: skip
        torch.testing.assert_close(step[:, :, 0], whole[:, :, n - 1], rtol=1e-12, atol=1e-13)


def test_dropout_is_that_of_each_entry_alone():
    """Not of the tiles, of the other queries and batch entries, or of how keys are cut; and right in the mean."""
    q, k1, k2, v1, v2 = inputs(batch=2, nq=12, n1=12, n2=12, grad=False)
    options = {"dropout_p": 0.4, "dropout_seed": torch.tensor([77])}
    whole, lse = tensor_attention(q, k1, k2, v1, v2, **options, return_lse=True)
    part = tensor_attention(q[:1, :, 5:7], *(x[:1] for x in (k1, k2, v1, v2)), **options, q_offset=5)
    torch.testing.assert_close(part, whole[:1, :, 5:7], rtol=1e-12, atol=1e-13)
    pieces = [
        tensor_attention(
            q, k1[:, :, a:b], k2, v1[:, :, a:b], v2, **options, k1_offset=a, return_lse=True
        )
        for a, b in ((0, 5), (5, 12))
    ]  # fmt: skip
    merged, merged_lse = torchlayers._attention.merge_attention(*pieces[0], *pieces[1])
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-13)
    plain = tensor_attention(q, k1, k2, v1, v2, return_lse=True)
    torch.testing.assert_close(lse, plain[1])
    torch.testing.assert_close(merged_lse, plain[1])
    # Values of 1: the output is the kept share of P, 1 in the mean over 2 · 2 · 12 rows and 200 seeds.
    ones = torch.ones_like(v1)
    means = torch.stack(
        [tensor_attention(q, k1, k2, ones, ones, dropout_p=0.4, dropout_seed=s).mean() for s in range(200)]
    )
    assert abs(means.mean() - 1) < 5 * means.std() / 200**0.5
    assert means.std() > 0


def test_dropout_draws_its_seed_from_torch_s_generator():
    arguments = inputs(grad=False)
    torch.manual_seed(4)
    first, second = (tensor_attention(*arguments, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(first, tensor_attention(*arguments, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_dropout_under_checkpointing():
    arguments = inputs()

    def loss(*x):
        return tensor_attention(*x, dropout_p=0.5).square().sum()

    torch.manual_seed(0)
    plain = torch.autograd.grad(loss(*arguments), arguments)
    torch.manual_seed(0)
    again = torch.autograd.grad(checkpoint(loss, *arguments, use_reentrant=False), arguments)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            # A view that repeats elements costs nothing.
            if isinstance(x, torch.Tensor) and 0 not in x.stride():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("windows", [([-1, -1], [-1, -1]), ([4, 0], [6, 0]), ([-1, 0], [3, 0])])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_memory_is_linear_in_the_length(windows, dropout_p, monkeypatch):
    monkeypatch.setattr(chunked, "TILE", 64)
    monkeypatch.setattr(chunked, "ROWS", 8)
    n, d = 24, 4
    arguments = inputs(heads=2, kv_heads=1, nq=n, n1=n, n2=n, d=d, dv=d, dtype=torch.float32, grad=False)
    rest = (None, None, torch.tensor([1]), 0.5, dropout_p, *windows, False, "trilinear", 0, 0, 0)
    with Largest() as largest:
        out, lse = chunked.chunked_forward(*arguments, *rest)
        chunked.chunked_backward(torch.ones_like(out), None, *arguments, out, lse, *rest)
    assert largest.elements <= 2 * chunked.ROWS * n < n * n
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks:
        tensor_attention(*(x.requires_grad_() for x in arguments), window1=5, enable_gqa=True)
    assert sum(x.numel() for x in saved) == 8 * n * d + 2 * n  # q and out of two heads, keys and values of one, lse


def test_grouped_queries_read_their_own_keys():
    q, k1, k2, v1, v2 = inputs(heads=6, kv_heads=2)
    out = tensor_attention(q, k1, k2, v1, v2, enable_gqa=True)
    repeated = [x.repeat_interleave(3, 1) for x in (k1, k2, v1, v2)]
    assert_close_rel(out, tensor_attention(q, *repeated))
    g = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k1, v2), g),
        torch.autograd.grad(tensor_attention(q, *repeated), (q, k1, v2), g),
        strict=True,
    ):
        assert_close_rel(a, b)


def test_full_graph():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    options = {"is_causal": True, "window1": 4, "window2": (2, 0), "dropout_p": 0.2, "dropout_seed": 5}

    def loss(*x):
        out, lse = tensor_attention(*x, **options, return_lse=True)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (5, 9, 12, 7):
        arguments = inputs(nq=n, n1=n, n2=n)
        ours = torch.autograd.grad(compiled(*arguments), arguments)
        for a, b in zip(ours, torch.autograd.grad(loss(*arguments), arguments), strict=True):
            assert_close_rel(a, b, rtol=1e-12)
    assert counter.frame_count <= 2  # one static, one for all lengths


def test_full_graph_draws_seeds_and_decodes():
    torch.compiler.reset()
    arguments = inputs(nq=1, grad=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(tensor_attention, fullgraph=True, backend=counter)
    for position in range(2, 7):
        out = step(*arguments, is_causal=True, q_offset=position)
        assert_close_rel(out, tensor_attention(*arguments, is_causal=True, q_offset=position))
    assert counter.frame_count <= 2
    one, two = (step(*arguments, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own import
def test_inductor():
    torch.compiler.reset()
    arguments = inputs(dtype=torch.float32)
    compiled = torch.compile(lambda *x: 2 * tensor_attention(*x, window1=3).square(), fullgraph=True)
    ours = torch.autograd.grad(compiled(*arguments).sum(), arguments)
    plain = torch.autograd.grad((2 * tensor_attention(*arguments, window1=3).square()).sum(), arguments)
    for a, b in zip(ours, plain, strict=True):
        assert_close_rel(a, b)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k1, k2, v1, v2):
            return tensor_attention(q, k1, k2, v1, v2, is_causal=True, window1=3)

    arguments = tuple(inputs(batch=2, grad=False))
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(Layer(), arguments, dynamic_shapes=[{0: batch}] * 5)
    more = inputs(batch=5, grad=False)
    assert_close_rel(program.module()(*more), Layer()(*more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    arguments = inputs(heads=2, kv_heads=1, dtype=dtype)
    keep = torch.rand(1, 6) > 0.3
    rest = (keep, None, torch.tensor([3]), 0.6, 0.2, [2, 0], [-1, -1], True, "strassen", 0, 0, 0)
    torch.library.opcheck(torch.ops.torchlayers.tensor_attention_chunked.default, (*arguments, *rest))
    out, lse = chunked.chunked_forward(*arguments, *rest)
    for g_lse in (None, torch.where(lse.isfinite(), 1.0, 0.0)):
        torch.library.opcheck(
            torch.ops.torchlayers.tensor_attention_chunked_backward.default,
            (torch.randn_like(out), g_lse, *(x.detach() for x in arguments), out, lse, *rest),
        )


def test_autocast():
    arguments = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = tensor_attention(*arguments)
        mixed = tensor_attention(arguments[0].bfloat16(), *arguments[1:])
        assert tensor_attention(*(x.double() for x in arguments)).dtype == torch.float64
        assert nth_order_attention(arguments[0], arguments[1:3], arguments[3:]).dtype == torch.bfloat16
    assert out.dtype == mixed.dtype == torch.bfloat16 and torch.equal(out, mixed)
    assert torch.equal(out, tensor_attention(*(x.bfloat16() for x in arguments)))
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in arguments)


def test_dispatch_is_told():
    arguments = inputs(grad=False)
    tensor_attention(*arguments)
    assert torchlayers.last_dispatch().startswith("torch: ")
    tensor_attention(*arguments, backend="dense")
    assert torchlayers.last_dispatch() == "dense: backend is 'dense'"
    with pytest.raises(torchlayers.BackendError, match="backend='triton'"):
        tensor_attention(*arguments, backend="triton")


def test_nth_order_function():
    q, k1, k2, v1, v2 = inputs(heads=4, kv_heads=2)
    out, lse = nth_order_attention(
        q, [k1, k2], [v1, v2], is_causal=True, windows=[3, None], enable_gqa=True, return_lse=True, scale=0.4
    )
    expected, expected_lse = tensor_attention(
        q, k1, k2, v1, v2, is_causal=True, window1=3, enable_gqa=True, return_lse=True, scale=0.4
    )
    assert_close_rel(out, expected)
    assert_close_rel(lse, expected_lse)
    assert_close_rel(nth_order_attention(q[:, :2], [k1], [v1]), F.scaled_dot_product_attention(q[:, :2], k1, v1))


# The approximation


def small(n=12, size=0.3):
    return [size * x for x in inputs(nq=n, n1=n, n2=n, d=4, grad=False)]


def test_approx_polynomial():
    arguments = small()
    options = {"is_causal": True, "window1": 5, "scale": 0.25}
    out = tensor_attention(*arguments, **options, approx="polynomial")
    assert torch.equal(out, polynomial_tensor_attention(*arguments, **options))
    plain = tensor_attention(*arguments, **options)
    assert not torch.equal(out, plain)
    assert relative_error(out, plain) < 1e-6


def test_approx_auto_takes_the_polynomial_where_it_is_certified():
    for size, near in ((0.3, True), (2.0, False)):
        arguments = small(size=size)
        out = tensor_attention(*arguments, scale=0.25, approx="auto", tolerance=1e-3)
        plain, polynomial = (
            tensor_attention(*arguments, scale=0.25),
            polynomial_tensor_attention(*arguments, scale=0.25),
        )
        assert torch.equal(out, polynomial if near else plain)
        assert not torch.equal(plain, polynomial)
    out = tensor_attention(*small(), scale=0.25, approx="auto", dropout_p=0.5, dropout_seed=1)
    assert not torch.equal(out, tensor_attention(*small(), scale=0.25))  # exact, with its dropout
    many = [x.expand(-1, -1, -1, 64) for x in inputs(d=1, dv=1, grad=False)]  # more features than fit
    assert torch.equal(tensor_attention(*many, approx="auto"), tensor_attention(*many))


def test_approx_auto_cannot_be_compiled():
    compiled = torch.compile(partial(tensor_attention, approx="auto"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot be compiled: choose approx='polynomial'"):
        compiled(*small())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"form": "strassen"}, "form='strassen'"),
        ({"return_lse": True}, "return_lse"),
        ({"backend": "dense"}, "backend='dense'"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_approx_refuses_what_is_exact_only(options, what):
    with pytest.raises(ValueError, match=f"approx='polynomial' must come without.*{what}"):
        tensor_attention(*small(), approx="polynomial", **options)


# Bad input

GOOD = {name: torch.zeros(2, 4, n, c) for name, n, c in (
    ("query", 5, 8), ("key1", 6, 8), ("key2", 7, 8), ("value1", 6, 3), ("value2", 7, 3),
)}  # fmt: skip

BAD = [
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"query": torch.zeros(4, 5, 8)}, ValueError, r"query must have 4 dimensions .* got 3: shape \(4, 5, 8\)"),
    ({"key2": [[1.0]]}, TypeError, "key2 must be a tensor"),
    ({"query": torch.zeros(3, 4, 5, 8)}, ValueError, "key1 must have batch = 3 at dimension 0, got 2"),
    ({"key2": torch.zeros(2, 4, 7, 6)}, ValueError, "key2 must have the channels of query = 8"),
    ({"key2": torch.zeros(2, 2, 7, 8)}, ValueError, "key2 must have heads = 4 at dimension 1, got 2"),
    ({"query": torch.zeros(2, 8, 5, 8)}, ValueError, "query must have the heads of the keys, 4, unless enable_gqa"),
    ({"query": torch.zeros(2, 6, 5, 8), "enable_gqa": True}, ValueError, "a multiple of the keys' heads, 4, got 6"),
    ({"query": torch.zeros(2, 4, 5, 0)}, ValueError, "key1 must have the channels of query = 0"),
    ({"value1": torch.zeros(2, 4, 5, 3)}, ValueError, "value1 must have the length of key1 = 6 .* got 5"),
    ({"value2": torch.zeros(2, 4, 6, 3)}, ValueError, "value2 must have the length of key2 = 7 .* got 6"),
    ({"value2": torch.zeros(2, 4, 7, 2)}, ValueError, "value2 must have the channels of value1 = 3 .* got 2"),
    ({"key1": torch.zeros(2, 4, 6, 8).double()}, TypeError, "key1 must have the dtype of query, torch.float32"),
    ({"query": torch.zeros(2, 4, 5, 8).long()}, TypeError, "query must have a real floating-point dtype"),
    ({"value1": torch.zeros(2, 4, 6, 3).cfloat()}, TypeError, "value1 must have a real floating-point dtype"),
    ({"key1": torch.zeros(2, 4, 6, 8, device="meta")}, ValueError, "key1 must be on the device of query"),
    ({"key_padding_mask1": torch.ones(2, 7).bool()}, ValueError, "key_padding_mask1 must have keys = 6"),
    ({"key_padding_mask2": torch.ones(1, 7).bool()}, ValueError, "key_padding_mask2 must have batch = 2"),
    ({"key_padding_mask1": torch.ones(2, 6)}, TypeError, "key_padding_mask1 must be bool, True = keep"),
    ({"key_padding_mask1": torch.ones(2, 4, 5, 6).bool()}, ValueError, "key_padding_mask1 must have 2 dimensions"),
    ({"window1": -1}, ValueError, "window1 must be at least 1, got -1"),
    ({"window2": (3, -2)}, ValueError, r"window2\[1\] must be at least -1"),
    ({"window1": 2.5}, TypeError, "window1 must be"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\)"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float"),
    ({"dropout_p": 0.1, "dropout_seed": 1.5}, TypeError, "dropout_seed must be an int"),
    ({"scale": torch.ones(())}, TypeError, "scale must be a float"),
    ({"form": "det"}, ValueError, "form must be one of 'trilinear', 'determinant', 'strassen', got 'det'"),
    ({"form": "determinant"}, ValueError, "a multiple of 3 channels for form='determinant', got 8"),
    ({"q_offset": -1}, ValueError, "q_offset must be at least 0, got -1"),
    ({"k1_offset": 1.0}, TypeError, "k1_offset must be an int"),
    ({"k2_offset": 2**31}, ValueError, r"k2_offset must leave positions below 2\^31"),
    ({"approx": "polynom"}, ValueError, "approx must be one of .* did you mean 'polynomial'"),
    ({"approx": "auto", "tolerance": 0.0}, ValueError, "tolerance must be positive"),
    ({"approx": "auto", "tolerance": "small"}, TypeError, "tolerance must be a float"),
    ({"backend": "cuda"}, ValueError, "backend must be one of .*'dense', got 'cuda'"),
    ({"pair_mask": torch.ones(5, 6, 7).bool()}, ValueError, "pair_mask must come with backend='dense'.*separable"),
    ({"pair_mask": torch.ones(5, 6, 6).bool(), "backend": "dense"}, ValueError, "pair_mask must broadcast to"),
    ({"pair_mask": torch.ones(5, 6, 7), "backend": "dense"}, TypeError, "pair_mask must be a bool tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        tensor_attention(**(GOOD | change))


def test_refuses_no_channels():
    arguments = GOOD | {name: torch.zeros(2, 4, 5, 0) for name in ("query", "key1", "key2")}
    with pytest.raises(ValueError, match="query must have at least one channel"):
        tensor_attention(**arguments)


def test_refuses_odd_degrees():
    with pytest.raises(ValueError, match="degree must be"):
        polynomial_tensor_attention(*small(), degree=3)


def test_dense_memory_is_limited(monkeypatch):
    big = inputs(batch=4, heads=8, nq=1, n1=1, n2=1, dtype=torch.float32, grad=False)
    q, k1, k2, v1, v2 = (x.expand(-1, -1, 1024, -1) for x in big)  # 2^35 logits
    with pytest.raises(ValueError, match=r"at most 1 GiB of logits at once, got 128 GiB .* pass windows"):
        tensor_attention(q, k1, k2, v1, v2, backend="dense")
    with pytest.raises(ValueError, match="nth_order_attention must hold at most"):
        nth_order_attention(q, [k1, k2], [v1, v2])
    monkeypatch.setattr(functional, "DENSE_LIMIT", 2 * 6 * 6 * 6 * 8)
    arguments = inputs(grad=False)
    tensor_attention(*arguments, backend="dense")
    monkeypatch.setattr(functional, "DENSE_LIMIT", 2 * 6 * 6 * 6 * 8 - 1)
    with pytest.raises(ValueError, match="must hold at most"):
        tensor_attention(*arguments, backend="dense")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": []}, ValueError, "keys must have at least one tensor"),
        ({"keys": GOOD["key1"]}, TypeError, "keys and values must be sequences of tensors"),
        ({"values": [GOOD["value1"]]}, ValueError, "values must have one entry for each of the 2 keys, got 1"),
        (
            {"values": [GOOD["value1"], GOOD["value1"]]},
            ValueError,
            r"values\[1\] must have the length of keys\[1\] = 7",
        ),
        ({"windows": [None, -2]}, ValueError, r"windows\[1\] must be at least 1"),
        ({"windows": [None]}, ValueError, "windows must have one entry for each"),
        ({"key_padding_masks": [None, torch.ones(2, 7)]}, TypeError, r"key_padding_masks\[1\] must be bool"),
        ({"q": torch.zeros(2, 8, 5, 8)}, ValueError, "q must have the heads of the keys"),
        ({"keys": [GOOD["key1"], GOOD["key2"][..., :4]]}, ValueError, r"keys\[1\] must have the channels of q"),
        ({"scale": "1"}, TypeError, "scale must be a float"),
    ],
)
def test_nth_order_refuses(change, error, message):
    arguments = {"q": GOOD["query"], "keys": [GOOD["key1"], GOOD["key2"]], "values": [GOOD["value1"], GOOD["value2"]]}
    with pytest.raises(error, match=message):
        nth_order_attention(**(arguments | change))


@pytest.mark.parametrize("dims", [(0, 0, 0, 0, 0), (1, None, 0, None, 2), (None, 0, None, 0, None)])
def test_vmap_of_values_and_gradients(dims):
    """What vmap maps over is a batch; what it does not is common to all of it."""
    shapes = [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 7, 3), (2, 2, 6, 2), (2, 2, 7, 2)]
    size = 3
    tensors = [torch.randn(*s[: d or 0], *(() if d is None else (size,)), *s[d or 0 :], dtype=torch.float64)
               for s, d in zip(shapes, dims, strict=True)]  # fmt: skip
    keep = torch.arange(6).expand(2, 6) < 5

    def attend(*t):
        return tensor_attention(*t, window1=4, key_padding_mask1=keep, enable_gqa=True, backend="torch")

    def slopes(*t):
        return torch.func.grad(lambda *t: attend(*t).sin().sum(), (0, 1, 2, 3, 4))(*t)

    def loop(function):
        rows = [[t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)] for i in range(size)]
        return [function(*row) for row in rows]

    found = torch.vmap(attend, dims)(*tensors)
    torch.testing.assert_close(found, torch.stack(loop(attend)), rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(torch.vmap(slopes, dims)(*tensors), zip(*loop(slopes), strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs), rtol=1e-12, atol=1e-14)
    # Gradients of what was mapped: those of common tensors are summed over it.
    ours = torch.func.grad(lambda *t: torch.vmap(attend, dims)(*t).sin().sum(), (0, 1))(*tensors)
    for mine, theirs, dim in zip(ours, list(zip(*loop(slopes), strict=True))[:2], dims[:2], strict=True):
        wanted = torch.stack(theirs).sum(0) if dim is None else torch.stack(theirs, dim)
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)


def test_vmap_with_dropout_is_refused():
    x = torch.randn(3, 1, 2, 6, 4)
    with pytest.raises(NotImplementedError, match="does not run under vmap with dropout"):
        torch.vmap(lambda x: tensor_attention(x, x, x, x, x, dropout_p=0.1), randomness="different")(x)
