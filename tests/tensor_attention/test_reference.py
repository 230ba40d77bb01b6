"""The definition against what we did not write: SDPA over materialised pairs, determinants, golden numbers, theory."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from torchlayers.tensor_attention import reference, tensor_attention
from torchlayers.testing import assert_close_rel, assert_equivariant

FORMS = ("trilinear", "determinant", "strassen")


def inputs(batch=1, heads=2, nq=4, n1=5, n2=3, d=3, dv=2, kv_heads=None, **options):
    kv_heads = kv_heads or heads
    shapes = [(heads, nq, d), (kv_heads, n1, d), (kv_heads, n2, d), (kv_heads, n1, dv), (kv_heads, n2, dv)]
    return [torch.randn(batch, *shape, dtype=torch.float64, **options) for shape in shapes]


def seen(nq, n1, n2, window1, window2, causal=False, offsets=(0, 0, 0)):
    """(nq, n1, n2) by the words of the definition, entry by entry."""

    def sees(i, j, window):
        left, right = window
        ok = (left < 0 or j >= i - left) and (right < 0 or j <= i + right)
        return ok and not (causal and j > i)

    return torch.tensor(
        [
            [
                [sees(i + offsets[0], j + offsets[1], window1) and sees(i + offsets[0], k + offsets[2], window2)
                 for k in range(n2)]
                for j in range(n1)
            ]
            for i in range(nq)
        ]
    ).reshape(nq, n1, n2)  # fmt: skip


def sdpa_over_pairs(q, k1, k2, v1, v2, mask=None, scale=None):
    """torch's own attention with one key and one value for each pair."""
    k, v = ((x[:, :, :, None] * y[:, :, None]).flatten(2, 3) for x, y in ((k1, k2), (v1, v2)))
    mask = None if mask is None else mask.flatten(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


GOLDEN = {
    "full": [
        [0.1847, 0.0380, 0.0579], [0.0289, -0.0101, 0.1395], [-0.1861, -0.0829, -0.1529], [0.1858, 0.0378, 0.0607],
    ],
    "causal": [
        [0.2892, -0.1175, 0.3057], [0.0124, 0.1258, 0.2477], [-0.1864, -0.1021, -0.1508], [0.1858, 0.0378, 0.0607],
    ],
    "windows": [
        [0.2892, -0.1175, 0.3057], [0.0124, 0.1258, 0.2477], [-0.2592, -0.1326, -0.0628], [0.0966, 0.0450, 0.0435],
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full", {}),
        ("causal", {"is_causal": True}),
        ("windows", {"is_causal": True, "window1": (2, 0), "window2": (1, 0)}),
    ],
)
def test_golden_numbers(name, options):
    steps = 3 * torch.arange(4.0, dtype=torch.float64)[:, None] + torch.arange(3.0, dtype=torch.float64)
    arguments = [torch.sin(0.7 * (steps + s))[None, None] for s in range(5)]
    out, _ = reference.tensor_attention(*arguments, **options)
    torch.testing.assert_close(out[0, 0], torch.tensor(GOLDEN[name], dtype=torch.float64), atol=6e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window1", "window2"), [((-1, -1), (-1, -1)), ((2, 1), (0, -1)), ((1, 0), (3, 2))])
def test_equals_sdpa_over_pairs(causal, window1, window2):
    arguments = inputs(batch=2, heads=4, kv_heads=2, nq=6, n1=7, n2=5)
    keep1, keep2 = torch.rand(2, 7) > 0.2, torch.rand(2, 5) > 0.2
    keep1[:, 0] = keep2[:, 0] = True
    mask = seen(6, 7, 5, window1, window2, causal)[None, None]
    mask = mask & keep1[:, None, None, :, None] & keep2[:, None, None, None]
    out, lse = reference.tensor_attention(
        *arguments, is_causal=causal, window1=window1, window2=window2,
        key_padding_mask1=keep1, key_padding_mask2=keep2,
    )  # fmt: skip
    some = mask.flatten(-2).any(-1, keepdim=True)
    expected = torch.where(some, sdpa_over_pairs(*arguments, mask), 0.0)
    assert_close_rel(out, expected)
    q, k1, k2 = (x.repeat_interleave(4 // x.shape[1], 1) for x in arguments[:3])
    logits = (q[:, :, :, None, None] * k1[:, :, None, :, None] * k2[:, :, None, None]).sum(-1) / math.sqrt(3)
    torch.testing.assert_close(lse, logits.masked_fill(~mask, -torch.inf).flatten(-2).logsumexp(-1))


def test_pair_mask_that_does_not_separate():
    arguments = inputs()
    mask = torch.rand(1, 2, 4, 5, 3) > 0.5
    mask[..., 0, 0] = True
    out, _ = reference.tensor_attention(*arguments, pair_mask=mask)
    assert_close_rel(out, sdpa_over_pairs(*arguments, mask))


def test_logits_of_the_forms():
    q, k1, k2 = inputs(d=6)[:3]
    determinant = reference.logits(q, k1, k2, "determinant")
    strassen = reference.logits(q, k1, k2, "strassen")
    for i, j, k in itertools.product(range(4), range(5), range(3)):
        rows = torch.stack((q[0, 1, i], k1[0, 1, j], k2[0, 1, k]))
        expected = torch.linalg.det(rows[:, :3]) + torch.linalg.det(rows[:, 3:])
        torch.testing.assert_close(determinant[0, 1, i, j, k], expected)
        gram = rows @ rows.T
        torch.testing.assert_close(strassen[0, 1, i, j, k], gram[0, 1] + gram[0, 2] + gram[1, 2])


def test_reduces_to_attention_where_the_second_set_is_ones():
    q, k1, k2, v1, v2 = inputs()
    out, _ = reference.tensor_attention(q, k1, torch.ones_like(k2), v1, torch.ones_like(v2))
    assert_close_rel(out, F.scaled_dot_product_attention(q, k1, v1))


def test_reduces_to_attention_where_the_second_window_is_one():
    q, k1, k2, v1, v2 = inputs(nq=5, n1=5, n2=5, d=3, dv=3)
    out, _ = reference.tensor_attention(q, k1, k2, v1, v2, is_causal=True, window2=(0, 0))
    assert_close_rel(out, F.scaled_dot_product_attention(q * k2, k1, v1, is_causal=True) * v2)


def test_zero_keys_give_the_means_and_the_log_of_the_count():
    q, k1, k2, v1, v2 = inputs()
    out, lse = reference.tensor_attention(q, k1, torch.zeros_like(k2), v1, v2)
    assert_close_rel(out, (v1.mean(2, keepdim=True) * v2.mean(2, keepdim=True)).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(15)))


@pytest.mark.parametrize("form", FORMS)
def test_exchange_symmetry(form):
    q, k1, k2, v1, v2 = inputs(nq=5)
    window1, window2 = (2, 0), (-1, 1)
    out, lse = reference.tensor_attention(q, k1, k2, v1, v2, window1=window1, window2=window2, form=form, scale=0.7)
    sign = -1.0 if form == "determinant" else 1.0
    swapped, lse2 = reference.tensor_attention(
        q, k2, k1, v2, v1, window1=window2, window2=window1, form=form, scale=0.7 * sign
    )
    assert_close_rel(swapped, out)
    torch.testing.assert_close(lse, lse2)


def rotations(count):
    matrices = torch.linalg.qr(torch.randn(count, 3, 3, dtype=torch.float64)).Q
    return matrices * torch.linalg.det(matrices)[:, None, None]


def test_determinant_is_invariant_under_rotations_and_trilinear_is_not():
    arguments = inputs(d=6)
    for rotation in rotations(3):
        turn = torch.block_diag(rotation, rotation)
        turned = [x @ turn.T if t < 3 else x for t, x in enumerate(arguments)]
        for form, invariant in (("determinant", True), ("trilinear", False)):
            plain, _ = reference.tensor_attention(*arguments, form=form)
            moved, _ = reference.tensor_attention(*turned, form=form)
            assert torch.allclose(plain, moved, rtol=1e-12) == invariant


def test_determinant_with_rotary_positions_sees_distances_alone():
    q, k1, k2 = inputs(heads=1, nq=1, n1=1, n2=1, d=6)[:3]

    def rotary(x, position):  # each chunk of three about its last axis
        angles = position * torch.tensor([0.3, 1.1], dtype=torch.float64)
        x, y, z = x.unflatten(-1, (2, 3)).unbind(-1)
        c, s = angles.cos(), angles.sin()
        return torch.stack((c * x - s * y, s * x + c * y, z), -1).flatten(-2)

    def logit(i, j, k):
        return reference.logits(rotary(q, i), rotary(k1, j), rotary(k2, k), "determinant")

    torch.testing.assert_close(logit(7, 5, 1), logit(107, 105, 101))
    assert not torch.allclose(logit(7, 5, 1), logit(7, 4, 1))


def test_permutation_equivariance():
    q, k1, k2, v1, v2 = inputs(nq=5, n1=5, n2=5)
    order = torch.randperm(5)
    assert_equivariant(
        lambda *x: reference.tensor_attention(*x)[0], (q, k1, k2, v1, v2), [lambda x: x[:, :, order]] * 5,
        lambda y: y[:, :, order],
    )  # fmt: skip
    order1, order2 = torch.randperm(5), torch.randperm(5)  # of the pairs, nothing sees the order
    shuffled = [q, k1[:, :, order1], k2[:, :, order2], v1[:, :, order1], v2[:, :, order2]]
    assert_close_rel(reference.tensor_attention(*shuffled)[0], reference.tensor_attention(q, k1, k2, v1, v2)[0])


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    arguments = inputs(heads=2, kv_heads=1, nq=3, n1=3, n2=2, requires_grad=True)
    keep = torch.tensor([[False, True, True]])

    def run(*x):
        return reference.tensor_attention(
            *x, key_padding_mask1=keep, is_causal=True, window1=(1, 0), form=form, dropout_p=0.3, dropout_seed=5
        )[0]

    assert gradcheck(run, arguments)
    assert gradgradcheck(run, arguments)


def test_closed_form_gradients():
    """Section 1 of arXiv 2405.16411: the gradients from P, against autograd of the definition."""
    q, k1, k2, v1, v2 = arguments = inputs(heads=1, requires_grad=True)
    out, lse = reference.tensor_attention(*arguments, scale=0.8)
    g = torch.randn_like(out)
    expected = torch.autograd.grad(out, arguments, g)
    p = (0.8 * torch.einsum("bhic,bhjc,bhkc->bhijk", q, k1, k2) - lse[..., None, None]).exp()
    torch.testing.assert_close(p.sum((-1, -2)), torch.ones_like(lse))
    dp = torch.einsum("bhic,bhjc,bhkc->bhijk", g, v1, v2)
    ds = 0.8 * p * (dp - (g * out).sum(-1)[..., None, None])
    ours = [
        torch.einsum("bhijk,bhjc,bhkc->bhic", ds, k1, k2),
        torch.einsum("bhijk,bhic,bhkc->bhjc", ds, q, k2),
        torch.einsum("bhijk,bhic,bhjc->bhkc", ds, q, k1),
        torch.einsum("bhijk,bhic,bhkc->bhjc", p, g, v2),
        torch.einsum("bhijk,bhic,bhjc->bhkc", p, g, v1),
    ]
    for a, b in zip(ours, expected, strict=True):
        assert_close_rel(a, b)


def test_rows_that_see_nothing():
    arguments = inputs(nq=4, n1=4, n2=4, requires_grad=True)
    out, lse = reference.tensor_attention(*arguments, is_causal=True, k2_offset=2)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all()
    assert lse[:, :, 2:].isfinite().all()
    for gradient in torch.autograd.grad(out.sum() + lse[:, :, 2:].sum(), arguments):
        assert gradient.isfinite().all()
    (dq,) = torch.autograd.grad(
        reference.tensor_attention(*arguments, is_causal=True, k2_offset=2)[0].sum(), arguments[:1]
    )
    assert (dq[:, :, :2] == 0).all()


@pytest.mark.parametrize("attend", [reference.tensor_attention, partial(tensor_attention, return_lse=True)])
def test_match3_has_an_exact_construction(attend):
    """Whether x_i + x_j + x_k = 0 mod M for some j, k: logits cos(2π(x_i + x_j + x_k) / M) and one blank key."""
    modulus, n, beta = 1009, 30, 2e6
    for seed in range(3):
        x = torch.randint(modulus, (n,), generator=torch.Generator().manual_seed(seed))
        if seed == 0:
            x[2] = (-x[0] - x[1]) % modulus
        theta = 2 * math.pi * x.double() / modulus
        c, s, one, zero = theta.cos(), theta.sin(), torch.ones(n).double(), torch.zeros(n).double()
        blank1 = torch.tensor([[0.0, 0, 0, 0, 1]]).double()
        q = torch.stack((c, -c, -s, -s, one), 1)
        k1 = torch.cat((torch.stack((c, s, c, s, zero), 1), blank1))
        k2 = torch.cat((torch.stack((c, s, s, c, zero), 1), blank1 * (1 + math.cos(2 * math.pi / modulus)) / 2))
        v = torch.cat((one, torch.zeros(1).double()))[:, None]
        out, _ = attend(*(t[None, None] for t in (q, k1, k2, v, v)), scale=beta)
        sums = x[:, None, None] + x[:, None] + x
        matched = (sums % modulus == 0).any(-1).any(-1)
        assert 0 < matched.sum() < n
        assert ((out[0, 0, :, 0] > 0.5) == matched).all()


def test_order_2_is_attention_and_order_3_is_tensor_attention():
    q, k1, k2, v1, v2 = inputs(nq=5, n1=5, n2=5)
    assert_close_rel(
        reference.nth_order_attention(q, [k1], [v1], is_causal=True)[0],
        F.scaled_dot_product_attention(q, k1, v1, is_causal=True),
    )
    keep = torch.tensor([[True, False, True, True, False]])
    out, lse = reference.nth_order_attention(
        q, [k1, k2], [v1, v2], key_padding_masks=[None, keep], windows=[(2, 1), (-1, 1)]
    )
    expected, lse3 = reference.tensor_attention(
        q, k1, k2, v1, v2, key_padding_mask2=keep, window1=(2, 1), window2=(-1, 1)
    )
    assert_close_rel(out, expected)
    torch.testing.assert_close(lse, lse3)


def test_order_4_equals_sdpa_over_triples():
    q, k1, k2, v1, v2 = inputs(heads=4, kv_heads=2)
    k3, v3 = torch.randn(1, 2, 2, 3, dtype=torch.float64), torch.randn(1, 2, 2, 2, dtype=torch.float64)
    out, _ = reference.nth_order_attention(q, [k1, k2, k3], [v1, v2, v3])
    k12, v12 = ((x[:, :, :, None] * y[:, :, None]).flatten(2, 3) for x, y in ((k1, k2), (v1, v2)))
    assert_close_rel(out, sdpa_over_pairs(q, k12, k3, v12, v3))
