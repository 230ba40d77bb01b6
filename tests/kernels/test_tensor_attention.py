"""The attention kernels, in Triton's interpreter or on a GPU, against the dense definition and SDPA in float64."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from torchlayers._attention import keep_mask
from torchlayers.kernels import tensor_attention as ta
from torchlayers.kernels._lib import INTERPRET, TARGETS, target_of
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

NAMES = ("q", "k1", "k2", "v1", "v2")
FREE = (-1, -1)


def make(device, b=1, heads=2, kv_heads=1, nq=9, n1=11, n2=10, d=16, dv=16, dtype=torch.float32):
    """q, k1, k2, v1, v2 that require gradients."""
    shapes = [(heads, nq, d), (kv_heads, n1, d), (kv_heads, n2, d), (kv_heads, n1, dv), (kv_heads, n2, dv)]
    return [torch.randn(b, *shape, device=device).to(dtype).requires_grad_() for shape in shapes]


@dataclasses.dataclass
class Case:
    """One call: everything but the five tensors."""

    mask1: torch.Tensor | None = None
    mask2: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    scale: float = 0.25
    dropout_p: float = 0.0
    window1: tuple[int, int] = FREE
    window2: tuple[int, int] = FREE
    is_causal: bool = False
    form: str = "trilinear"
    q_offset: int = 0
    k1_offset: int = 0
    k2_offset: int = 0

    @property
    def arguments(self):
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def seen(i, j, window, is_causal):
    left, right = window
    ahead = j[None, :] - i[:, None]
    ok = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        ok &= ahead >= -left
    if right >= 0:
        ok &= ahead <= right
    return ok & (ahead <= 0) if is_causal else ok


def permutation_sign(x, y, z):
    return (y - x) * (z - x) * (z - y) // 2


def definition(q, k1, k2, v1, v2, case):
    """out and lse from all pairs at once, entry by entry as the formulas say."""
    b, heads, nq = q.shape[:3]
    group = heads // k1.shape[1]
    k1, k2, v1, v2 = (x.repeat_interleave(group, 1) for x in (k1, k2, v1, v2))
    n1, n2 = k1.shape[2], k2.shape[2]
    if case.form == "trilinear":
        s = torch.einsum("bhic,bhjc,bhkc->bhijk", q, k1, k2)
    elif case.form == "determinant":
        s = 0
        for x, y, z in itertools.permutations(range(3)):
            s = s + permutation_sign(x, y, z) * torch.einsum(
                "bhic,bhjc,bhkc->bhijk", q[..., x::3], k1[..., y::3], k2[..., z::3]
            )
    else:
        s = (q @ k1.mT)[..., None] + (q @ k2.mT)[..., None, :] + (k1 @ k2.mT)[:, :, None]
    at = [o + torch.arange(n, device=q.device) for o, n in
          ((case.q_offset, nq), (case.k1_offset, n1), (case.k2_offset, n2))]  # fmt: skip
    ok1 = seen(at[0], at[1], case.window1, case.is_causal).expand(b, nq, n1)
    ok2 = seen(at[0], at[2], case.window2, case.is_causal).expand(b, nq, n2)
    if case.mask1 is not None:
        ok1 = ok1 & case.mask1[:, None]
    if case.mask2 is not None:
        ok2 = ok2 & case.mask2[:, None]
    ok = (ok1[..., None] & ok2[:, :, None])[:, None].expand_as(s)
    some = ok.flatten(3).any(3)
    s = (s * case.scale).masked_fill(~ok, float("-inf")).flatten(3)
    s = s.masked_fill(~some[..., None], 0.0)
    lse = s.logsumexp(3)
    p = (s.softmax(3) * some[..., None]).unflatten(3, (n1, n2))
    if case.dropout_p > 0:
        p = p * keep_mask(case.seed, case.dropout_p, b, heads, *at) / (1 - case.dropout_p)
    out = torch.einsum("bhijk,bhjc,bhkc->bhic", p, v1, v2)
    return out, lse.masked_fill(~some, float("-inf"))


def both(function, tensors, weights):
    """Values, and gradients through out and the finite entries of lse."""
    out, lse = function(*tensors)
    finite = lse.isfinite()
    loss = (out * weights[0]).sum() + (lse * weights[1])[finite].sum()
    return out, lse, *torch.autograd.grad(loss, tensors, allow_unused=not finite.any())


def check(tensors, case, rtol=4e-6, dtype=None):
    q, v1 = tensors[0], tensors[3]
    weights = torch.randn(*q.shape[:3], v1.shape[3], device=q.device), torch.randn(q.shape[:3], device=q.device)
    with nan_empty():
        ours = both(lambda *x: ta.tensor_attention_forward(*x, *case.arguments), tensors, weights)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = both(lambda *x: definition(*x, case), wide, [w.double() for w in weights])
    out, lse, *grads = ours
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert torch.equal(lse.isfinite(), exact[1].isfinite()) and not lse.isnan().any()
    empty = exact[1].isinf()
    assert not out[empty].any() and not grads[0][empty].any()
    assert_close_rel(lse[~empty], exact[1][~empty], rtol=rtol)
    assert_close_rel(out, exact[0], rtol=rtol, dtype=dtype)
    for name, x, gradient, expected in zip(NAMES, tensors, grads, exact[2:], strict=True):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape, name
        # Set against what a float32 sum of this size may lose where a gradient is small by cancellation.
        assert (gradient.double() - expected).norm() <= rtol * (expected.norm() + 0.1 * sum(weights[0].shape)), name
    return ours


CASES = {
    "one": ({"heads": 1, "nq": 1, "n1": 1, "n2": 1}, {}),
    "cross_lengths": ({"nq": 17, "n1": 23, "n2": 19}, {}),
    "causal": ({"nq": 19, "n1": 19, "n2": 19}, {"is_causal": True}),
    "causal_windows": (
        {"nq": 23, "n1": 23, "n2": 23, "heads": 1},
        {"is_causal": True, "window1": (2, 0), "window2": (8, 0)},
    ),
    "larger_window_first": (
        {"nq": 17, "n1": 17, "n2": 17, "heads": 4, "kv_heads": 2},
        {"is_causal": True, "window1": (7, 0), "window2": (2, 0)},
    ),
    "windows_both_ways": (
        {"nq": 17, "n1": 20, "n2": 17, "heads": 1},
        {"window1": (3, 1), "window2": (1, 4), "q_offset": 1},
    ),
    "one_sided": ({"nq": 17, "n1": 12, "n2": 17, "heads": 1}, {"window1": (-1, 2), "window2": (0, -1), "k1_offset": 3}),
    "group_of_three": ({"b": 2, "heads": 6, "kv_heads": 2, "nq": 5, "n1": 6, "n2": 7, "dv": 24}, {"scale": -0.4}),
    "decoding": ({"heads": 4, "nq": 1, "n1": 18, "n2": 21}, {"is_causal": True, "q_offset": 17}),
    "wide_values": ({"nq": 5, "n1": 6, "n2": 7, "d": 24, "dv": 48}, {}),
    "strassen": ({"nq": 9, "n1": 13, "n2": 18}, {"form": "strassen", "is_causal": True, "q_offset": 9}),
    "determinant": ({"nq": 9, "n1": 18, "n2": 13, "d": 48}, {"form": "determinant", "is_causal": True, "q_offset": 9}),
    "determinant_swapped": (
        {"nq": 17, "n1": 17, "n2": 17, "d": 24, "dv": 8, "heads": 1},
        {"form": "determinant", "window1": (5, 4), "window2": (1, 1), "scale": 0.6},
    ),
    "scale_of_zero": ({"nq": 3, "n1": 4, "n2": 5}, {"scale": 0.0, "window2": (1, 1)}),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, device):
    shapes, options = CASES[name]
    check(make(device, **shapes), Case(**options))


@pytest.mark.parametrize("form", ta.FORMS)
def test_padding_and_empty_rows(form, device):
    """Padded keys, a batch entry with none left, and queries that no window reaches."""
    tensors = make(device, b=3, heads=2, kv_heads=2, nq=6, n1=8, n2=9, d=12, dv=8)
    mask1 = torch.rand(3, 8, device=device) > 0.3
    mask2 = torch.rand(3, 9, device=device) > 0.3
    mask1[1], mask1[2, 0], mask2[2, 1] = False, True, True
    case = Case(mask1, mask2, form=form, is_causal=True, window1=(4, 0), window2=(-1, 0), k2_offset=1)
    _, lse, *grads = check(tensors, case)
    assert lse[1].isinf().all() and lse[2].isfinite().any() and lse[2, :, 0].isinf().all()
    assert all(not gradient[1].any() for gradient in grads)


def test_all_padded(device):
    tensors = make(device, nq=3, n1=4, n2=5)
    case = Case(mask2=torch.zeros(1, 5, dtype=torch.bool, device=device))
    out, lse = ta.tensor_attention_forward(*tensors, *case.arguments)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert not out.any() and lse.isneginf().all() and not any(g.any() for g in grads)


@pytest.mark.parametrize("offsets", [(0, 0, 0), (3, 1, 0), (2**33 + 7, 2**33, 2**33 + 3)])
def test_dropout_is_the_counters(offsets, device):
    """The bits that plain torch draws, in forward and backward, for whichever set is the inner one."""
    seed = torch.tensor([2**40 + 17], device=device)
    options = {"seed": seed, "dropout_p": 0.4, "q_offset": offsets[0], "k1_offset": offsets[1], "k2_offset": offsets[2]}
    tensors = make(device, b=2, heads=2, nq=5, n1=6, n2=9, d=8, dv=8)
    case = Case(**options, window1=(-1, 3))
    if offsets[0] < 2**32:
        check(tensors, case)
    # Positions enter the counters by their low 32 bits.
    low = [o % 2**32 for o in offsets]
    same = dataclasses.replace(case, q_offset=low[0], k1_offset=low[1], k2_offset=low[2])
    for a, b in zip(*(ta.tensor_attention_forward(*tensors, *c.arguments) for c in (case, same)), strict=True):
        assert torch.equal(a, b)


def test_dropout_with_the_sets_exchanged(device):
    seed = torch.tensor([5], device=device)
    check(make(device, heads=1, nq=5, n1=9, n2=6), Case(seed=seed, dropout_p=0.5, window2=(1, 1), form="strassen"))


def test_agrees_with_sdpa_on_pairs(device):
    q, k1, k2, v1, v2 = (x.detach().double() for x in make(device, nq=7, n1=8, n2=9, kv_heads=2))
    pairs, values = ((x[:, :, :, None] * y[:, :, None]).flatten(2, 3) for x, y in ((k1, k2), (v1, v2)))
    expected = F.scaled_dot_product_attention(q, pairs, values, scale=0.25)
    out, lse = ta.tensor_attention_forward(*(x.float() for x in (q, k1, k2, v1, v2)), scale=0.25)
    assert_close_rel(out, expected, rtol=4e-6)
    # The rows of P recomputed from lse sum to one: lse is the natural logarithm.
    total = (0.25 * q @ pairs.mT - lse.double()[..., None]).exp().sum(-1)
    assert_close_rel(total, torch.ones_like(total), rtol=2e-6)


def test_one_key_in_the_second_set_is_plain_attention(device):
    q, k1, _, v1, _ = make(device, nq=17, n1=17, kv_heads=2)
    ones = torch.ones(1, 2, 1, 16, device=device)
    out, lse = ta.tensor_attention_forward(q, k1, ones, v1, ones, scale=0.25)
    plain = F.scaled_dot_product_attention(q.double(), k1.double(), v1.double(), scale=0.25)
    assert_close_rel(out, plain, rtol=4e-6)
    assert_close_rel(lse, (0.25 * q.double() @ k1.double().mT).logsumexp(-1), rtol=4e-6)


@pytest.mark.parametrize("kind", ["heads_last", "window", "channels_apart", "expanded"])
def test_strided_input(kind, device):
    plain = make(device, b=2, heads=2, kv_heads=2, nq=5, n1=6, n2=7, d=24)
    case = Case(is_causal=True, window1=(3, 0), q_offset=2)

    def view(x):
        x = x.detach()
        if kind == "heads_last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "channels_apart":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if kind == "expanded":
            return x[:, :1].expand_as(x)
        around = torch.full((4, 4, x.shape[2] + 3, 40), float("nan"), device=device)
        return around[1:3, 1:3, 2:-1, 5 : 5 + x.shape[3]].copy_(x)

    views = [view(x).requires_grad_() for x in plain]
    assert not any(x.is_contiguous() for x in views)
    check(views, case)


def test_gradient_that_is_expanded(device):
    tensors = make(device, nq=5, n1=6, n2=7)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(ta.tensor_attention_forward(*tensors, scale=0.25)[0].sum(), tensors)
    exact = torch.autograd.grad(definition(*wide, Case())[0].sum(), wide)
    for gradient, expected in zip(grads, exact, strict=True):
        assert_close_rel(gradient, expected, rtol=1e-5)


def test_gradient_of_lse_alone(device):
    tensors = make(device, nq=5, n1=6, n2=7)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    weight = torch.randn(1, 2, 5, device=device)
    grads = torch.autograd.grad((ta.tensor_attention_forward(*tensors, scale=0.25)[1] * weight).sum(), tensors)
    exact = torch.autograd.grad((definition(*wide, Case())[1] * weight).sum(), wide[:3])
    for gradient, expected in zip(grads[:3], exact, strict=True):
        assert_close_rel(gradient, expected, rtol=1e-5)
    assert not grads[3].any() and not grads[4].any()


@pytest.mark.parametrize("empty", ["b", "heads", "nq", "n1", "n2"])
def test_empty(empty, device):
    sizes = {"b": 2, "heads": 2, "kv_heads": 2, "nq": 3, "n1": 4, "n2": 5} | {empty: 0}
    sizes["kv_heads"] = sizes["heads"]
    tensors = make(device, **sizes)
    with nan_empty():
        out, lse = ta.tensor_attention_forward(*tensors)
        grads = torch.autograd.grad(out.sum(), tensors)
    assert out.shape == tensors[0].shape and not out.any() and lse.isneginf().all()
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, tensors, strict=True))


SPLITS = [  # BQ, SLOTS, HEADS, BK
    (1, 1, 16, 16), (1, 4, 4, 32), (2, 8, 2, 16), (16, 1, 1, 16), (4, 2, 4, 16),
]  # fmt: skip
KEY_SPLITS = [(1, 16, True, 16), (16, 1, False, 32), (16, 2, True, 16), (2, 8, False, 16)]  # BJ, SLOTS, RELATIVE, BC


@pytest.mark.parametrize("index", range(len(SPLITS)))
def test_every_tiling(index, device):
    """Rows split over queries, slots and heads in all ways, with a group that fills none of them."""
    q, k1, k2, v1, v2 = (x.detach() for x in make(device, heads=3, nq=11, n1=11, n2=11))
    case = Case(is_causal=True, window1=(2, 0), window2=(6, 0))
    options = {"num_warps": 4, "num_stages": 2}
    problem = ta._problem(q, k1, k2, v1, v2, *case.arguments)
    split = dict(zip(("BQ", "SLOTS", "HEADS", "BK"), SPLITS[index], strict=True)) | options
    key_split = dict(zip(("BJ", "SLOTS", "RELATIVE", "BC"), KEY_SPLITS[index % 4], strict=True)) | options
    with nan_empty():
        out, lse = ta._launch_forward(problem, [split])
        grad_out = torch.randn_like(out)
        grads = ta._launch_backward(problem, grad_out, None, out, lse, [split], [key_split])
    wide = [x.double().requires_grad_() for x in (q, k1, k2, v1, v2)]
    expected, expected_lse = definition(*wide, case)
    assert_close_rel(out, expected, rtol=4e-6)
    assert_close_rel(lse, expected_lse, rtol=4e-6)
    for gradient, exact in zip(grads, torch.autograd.grad(expected, wide, grad_out.double()), strict=True):
        assert_close_rel(gradient, exact, rtol=1e-5)


@pytest.mark.skipif(INTERPRET, reason="the tiles of a GPU take long in the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_every_launch_configuration(d, dtype, device):
    """All that the autotuner may take on this GPU."""
    q, k1, k2, v1, v2 = (x.detach() for x in make(device, heads=8, nq=150, n1=150, n2=150, d=d, dv=d, dtype=dtype))
    case = Case(is_causal=True, window1=(20, 0), window2=(90, 0), scale=d**-0.5)
    problem = ta._problem(q, k1, k2, v1, v2, *case.arguments)
    target = target_of(q.device)
    wide = [x.double().requires_grad_() for x in (q, k1, k2, v1, v2)]
    expected, _ = definition(*wide, case)
    grad_out = torch.randn_like(expected).to(dtype)
    exact = torch.autograd.grad(expected, wide, grad_out.double())
    bound = 4e-2 if dtype == torch.bfloat16 else 2e-5
    for candidate in ta._query_candidates(ta._FORWARD, problem, target):
        out, lse = ta._launch_forward(problem, [candidate])
        assert_close_rel(out, expected, rtol=bound)
    queries = ta._query_candidates(ta._QUERY, problem, target)
    keys = ta._key_candidates(problem, target)
    for query, key in itertools.zip_longest(queries, keys, fillvalue=None):
        grads = ta._launch_backward(
            problem, grad_out, None, out, lse, [query or queries[0]], [key or keys[0]]
        )  # fmt: skip
        for gradient, reference in zip(grads, exact, strict=True):
            assert_close_rel(gradient, reference, rtol=bound)


@pytest.mark.skipif(INTERPRET, reason="the interpreter rounds to bfloat16 towards zero")
@pytest.mark.parametrize(("std", "forward", "backward"), [(0.5, 48, 44), (1.0, 47, 41), (1.5, 43, 38)])
def test_signal_to_noise_of_bfloat16(std, forward, backward, device):
    """In decibels against float64: scale, delta or lse in 16 bits would cost more than the margin."""
    tensors = [
        (std * x.detach()).bfloat16().requires_grad_()
        for x in make(device, heads=4, nq=128, n1=128, n2=128, d=128, dv=128)
    ]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    case = Case(is_causal=True, window1=(31, 0), window2=(63, 0), scale=128**-0.5)
    out, _ = ta.tensor_attention_forward(*tensors, *case.arguments)
    expected, _ = definition(*wide, case)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, grad_out)
    exact = torch.autograd.grad(expected, wide, grad_out.double())
    assert_close_rel(out, expected, rtol=10 ** (-forward / 20))
    for gradient, reference in zip(grads, exact, strict=True):
        assert_close_rel(gradient, reference, rtol=10 ** (-backward / 20))


@pytest.mark.parametrize("target", [*TARGETS.values(), ("interpreter", "")], ids=str)
def test_tilings_waste_little(target, device):
    """What is computed for a query stays near what its windows hold, packed or not; every tile is whole."""
    for heads, kv_heads, n, windows in ((64, 1, 4096, (31, 511)), (8, 8, 2048, (511, 31)), (12, 4, 1000, (-1, -1))):
        x = {h: torch.empty(4, h, n, 128, dtype=torch.bfloat16, device="meta") for h in (heads, kv_heads)}
        k = x[kv_heads]
        problem = ta._problem(x[heads], k, k, k, k, *Case(window1=(windows[0], 0), window2=(windows[1], 0),
                                                          is_causal=True).arguments)  # fmt: skip
        problem = problem.swap() if problem.second.span < problem.first.span else problem
        span1, span2, group = problem.first.span, problem.second.span, problem.group
        for kind in (ta._FORWARD, ta._QUERY):
            for c in ta._query_candidates(kind, problem, target):
                rows = c["BQ"] * c["SLOTS"] * c["HEADS"]
                assert rows in {t[0] for t in ta._tiles(kind, True, 128, target)}
                computed = -(-span1 // c["SLOTS"]) * c["SLOTS"] * -(-(span2 + c["BQ"] - 1) // c["BK"]) * c["BK"]
                packed = -(-group // c["HEADS"]) * c["HEADS"] / group
                assert computed * packed <= 1.35 * span1 * span2, (target, c)
        for side in (problem, problem.swap()):
            for c in ta._key_candidates(side, target):
                assert c["BJ"] * c["SLOTS"] in {t[0] for t in ta._tiles(ta._KEY, True, 128, target)}


def test_writes_stay_inside(monkeypatch, device):
    tensors = [x.detach() for x in make(device, heads=3, nq=7, n1=9, n2=5, d=12, dv=20)]
    problem = ta._problem(*tensors, *Case().arguments)
    buffers = []

    def guarded(size, *, dtype, device):
        count, margin = torch.Size(size).numel(), 4096
        buffer = torch.full((count + 2 * margin,), 7.0, dtype=dtype, device=device)
        buffers.append((buffer, margin))
        return buffer[margin : margin + count].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        out, lse = ta._launch_forward(problem)
        ta._launch_backward(problem, torch.randn_like(out), None, out, lse)
    assert len(buffers) == 8
    for buffer, margin in buffers:
        assert (buffer[:margin] == 7).all() and (buffer[-margin:] == 7).all()


def test_repeated_runs_agree_bit_for_bit(device):
    tensors = make(device, heads=4, kv_heads=2, nq=9, n1=9, n2=9)

    def run():
        out, lse = ta.tensor_attention_forward(*tensors, is_causal=True)
        return out, lse, *torch.autograd.grad((out * out).sum() + lse.sum(), tensors)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit(dtype, device):
    """In the interpreter this says that 16-bit loads and stores are right; its products are in float32 there."""
    tensors = make(device, nq=9, n1=11, n2=10, d=24, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    case = Case(is_causal=True, q_offset=6)
    out, lse = ta.tensor_attention_forward(*tensors, *case.arguments)
    expected, expected_lse = definition(*wide, case)
    weight = torch.randn_like(out)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close_rel(out, expected, dtype=dtype)
    assert_close_rel(lse, expected_lse, dtype=dtype)
    grads = torch.autograd.grad(out, tensors, weight)
    for gradient, exact in zip(grads, torch.autograd.grad(expected, wide, weight.double()), strict=True):
        assert gradient.dtype == dtype
        assert_close_rel(gradient, exact, rtol=4e-3 if dtype == torch.float16 else 2.5e-2)


def test_second_derivatives_are_refused(device):
    tensors = make(device, nq=2, n1=2, n2=2)
    out, _ = ta.tensor_attention_forward(*tensors)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='dense'"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 2, 3, 16, dtype=torch.float64)}, TypeError, "q must be float32, float16 or bfloat16"),
        ({"k2": torch.zeros(1, 1, 5, 16, dtype=torch.float16)}, TypeError, "k2 must have the dtype of q"),
        ({"q": torch.zeros(2, 3, 16)}, ValueError, r"q must have shape \(B, H, N, channels\)"),
        ({"v1": torch.zeros(1, 1, 4, 300)}, ValueError, "v1 must have 1 to 256 channels, got 300"),
        ({"v2": torch.zeros(1, 1, 6, 16)}, ValueError, r"v2 must have shape \(1, 1, 5, 16\)"),
        ({"q": torch.zeros(1, 3, 3, 16), "heads": 2}, ValueError, "multiple of the 2 heads"),
        ({"mask1": torch.zeros(1, 4)}, TypeError, "mask1 must be bool"),
        ({"mask2": torch.zeros(1, 4, dtype=torch.bool)}, ValueError, r"mask2 must have shape \(1, 5\)"),
        ({"form": "cubic"}, ValueError, "form must be one of"),
        ({"form": "determinant"}, ValueError, "multiple of 3 channels"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": 0.5}, ValueError, "seed must be an int64 tensor"),
        ({"window1": (-2, 0)}, ValueError, r"window1 must be \(left, right\)"),
    ],
)
def test_refuses(change, error, message, device):
    kv_heads = change.pop("heads", 1)
    arguments = dict(zip(NAMES, (x.detach() for x in make(device, kv_heads=kv_heads, nq=3, n1=4, n2=5)), strict=True))
    arguments |= {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        ta.tensor_attention_forward(**arguments)
