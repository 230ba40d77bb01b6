"""Windows, masks, dropout by counter, merging by log-sum-exp and MHA's arguments: what attention layers share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlayers import _attention
from torchlayers._attention import allowed, keep_mask, merge_attention, mha_inputs, mha_output, normalize_window, philox
from torchlayers.testing import assert_close_rel


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, (2, 0), (0, 1), (-1, 1), (2, -1), (-1, -1)])
def test_windows_mean_what_they_say(window, causal):
    got = allowed(torch.arange(3, 9), torch.arange(2, 12), normalize_window("window", window, causal))
    for row, i in zip(got, range(3, 9), strict=True):
        for ok, j in zip(row, range(2, 12), strict=True):
            if window is None:
                want = True
            elif isinstance(window, int):
                want = i - window < j <= i if causal else abs(i - j) < window
            else:
                left, right = window
                want = (left == -1 or i - left <= j) and (right == -1 or j <= i + right)
            assert ok == (want and not (causal and j > i)), (i, j)
    assert (got == allowed(torch.arange(3, 9), torch.arange(2, 12), normalize_window("w", window), causal)).all()


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (0, ValueError, "window1 must be at least 1, got 0"),
        (-3, ValueError, "window1 must be at least 1, got -3"),
        ((2, -2), ValueError, r"window1\[1\] must be at least -1, got -2"),
        ((1, 2, 3), ValueError, "window1 must have 2 entries, got 3"),
        (2.0, TypeError, "window1 must be"),
        (True, TypeError, "window1 must be"),
        ((1, 2.0), TypeError, r"window1\[1\] must be an int"),
    ],
)
def test_bad_windows(window, error, message):
    with pytest.raises(error, match=message):
        normalize_window("window1", window)


def test_philox_gives_the_published_words():
    """The known answers of Random123 (kat_vectors, philox4x32 with 10 rounds): counters, key, first word."""
    answers = [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ]
    for counters, (low, high), word in answers:
        seed = (high << 32) + low
        seed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        assert philox(seed, *(torch.tensor(c) for c in counters)) == word


def test_dropout_keeps_the_right_share_without_correlations():
    i, j, k = torch.arange(20), torch.arange(21), torch.arange(22)
    for p in (0.1, 0.5, 0.9):
        kept = keep_mask(7, p, 2, 3, i, j, k).double()
        count = kept.numel()
        assert kept.shape == (2, 3, 20, 21, 22)
        assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
        # Neighbours along any axis are independent: the correlation of n pairs has a deviation of n^-1/2.
        for dim in range(5):
            n = kept.shape[dim] - 1
            a, b = kept.narrow(dim, 0, n) - (1 - p), kept.narrow(dim, 1, n) - (1 - p)
            assert abs((a * b).mean()) / (p * (1 - p)) < 5 / a.numel() ** 0.5
    assert (keep_mask(7, 0.5, 1, 1, i, j, k) != keep_mask(8, 0.5, 1, 1, i, j, k)).any()
    assert keep_mask(7, 0.0, 1, 1, i, j).all()


def test_dropout_depends_on_positions_alone():
    i, j, k = torch.arange(9), torch.arange(8), torch.arange(7)
    full = keep_mask(3, 0.4, 2, 2, i, j, k)
    assert (keep_mask(torch.tensor([3]), 0.4, 2, 2, i[4:6], j[1:5], k[2:]) == full[:, :, 4:6, 1:5, 2:]).all()
    assert (keep_mask(3, 0.4, 1, 2, i, j, k) == full[:1]).all()
    two = keep_mask(3, 0.4, 2, 2, i, j)  # attention over single keys: the third counter is 0
    assert (two == keep_mask(3, 0.4, 2, 2, i, j, torch.zeros(1, dtype=torch.int64))[..., 0]).all()


def test_seed_follows_torch_s_generator_and_is_checked():
    torch.manual_seed(3)
    first = _attention.draw_seed()
    torch.manual_seed(3)
    assert first == _attention.draw_seed() != _attention.draw_seed()
    assert first.dtype == torch.int64 and first.shape == (1,)
    cpu = torch.device("cpu")
    for bad, error in (
        (torch.zeros(1), TypeError),
        (torch.zeros(2, dtype=torch.int64), ValueError),
        (1.5, TypeError),
        (2**63, ValueError),
    ):
        with pytest.raises(error, match="dropout_seed must"):
            _attention.seed_tensor("dropout_seed", bad, cpu)


def test_merging_two_sets_of_keys_is_attention_over_both():
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))

    def part(lo, hi):
        logits = q @ k[:, :, lo:hi].mT / 2
        return logits.softmax(-1) @ v[:, :, lo:hi], logits.logsumexp(-1)

    out, lse = merge_attention(*part(0, 3), *part(3, 7))
    expected = F.scaled_dot_product_attention(q, k, v)
    assert_close_rel(out, expected)
    torch.testing.assert_close(lse, (q @ k.mT / 2).logsumexp(-1))
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g), strict=True):
        assert_close_rel(a, b)


def test_merging_with_rows_that_saw_nothing():
    out, lse = torch.randn(3, 2), torch.tensor([1.0, -torch.inf, -torch.inf])
    out2, lse2 = torch.randn(3, 2), torch.tensor([-torch.inf, 2.0, -torch.inf])
    for x in (out, lse, out2, lse2):
        x.requires_grad_()
    merged, both = merge_attention(out, lse, out2, lse2)
    assert torch.equal(merged, torch.stack((out[0], out2[1], torch.zeros(2))))
    assert torch.equal(both, torch.tensor([1.0, 2.0, -torch.inf]))
    for gradient in torch.autograd.grad(merged.sum() + both[:2].sum(), (out, lse, out2, lse2)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_mha_arguments(batch_first, batched):
    """nn.MultiheadAttention, rebuilt from its own weights on what mha_inputs gives."""
    mha = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=6, vdim=5).double()
    query, key, value = (torch.randn(2, n, c).double() for n, c in ((4, 8), (3, 6), (3, 5)))
    ignore = torch.tensor([[False, False, True], [False, True, False]])
    if not batched:
        query, key, value, ignore = query[0], key[0], value[0], ignore[0]
    elif not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    expected, _ = mha(query, key, value, key_padding_mask=ignore, need_weights=False)
    q, k, v, keep = mha_inputs(
        query, key, value, embed_dim=8, kdim=6, vdim=5, batch_first=batch_first, key_padding_mask=ignore
    )
    assert q.shape[1:] == (4, 8) and keep.shape == k.shape[:2] == v.shape[:2]
    bias = mha.in_proj_bias.chunk(3)
    weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    heads = [
        F.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
        for x, w, b in zip((q, k, v), weights, bias, strict=True)
    ]
    out = F.scaled_dot_product_attention(*heads, attn_mask=keep[:, None, None]).transpose(1, 2).flatten(2)
    out = mha_output(mha.out_proj(out), ndim=query.ndim, batch_first=batch_first)
    assert_close_rel(out, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 8)}, ValueError, "key must have 2 dimensions"),
        ({"query": torch.zeros(2, 3, 7)}, ValueError, "query must have channels = 8"),
        ({"key": torch.zeros(2, 4, 8)}, ValueError, "value must have the length of key, 4, got 3"),
        ({"key": torch.zeros(1, 3, 8)}, ValueError, "key must have batch = 2"),
        ({"need_weights": True}, ValueError, "need_weights must be False"),
        ({"attn_mask": torch.zeros(3, 3)}, ValueError, "attn_mask must be None"),
        ({"key_padding_mask": torch.zeros(2, 3)}, TypeError, "key_padding_mask must be bool, True = ignore"),
        ({"key_padding_mask": torch.zeros(2, 4).bool()}, ValueError, "key_padding_mask must have keys = 3"),
    ],
)
def test_bad_mha_arguments(change, error, message):
    arguments = {name: torch.zeros(2, 3, 8) for name in ("query", "key", "value")} | change
    with pytest.raises(error, match=message):
        mha_inputs(**arguments, embed_dim=8, batch_first=True)
