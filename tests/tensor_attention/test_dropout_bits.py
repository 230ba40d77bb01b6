"""The dropout that plain torch computes is the one that Triton's own philox and rand compute, to the bit."""

import pytest
import torch
import triton
import triton.language as tl

from torchlayers._attention import keep_mask, philox

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]


@triton.jit
def _kernel(seed, p, words, kept, head, i, J: tl.constexpr, K: tl.constexpr):
    j, k = tl.arange(0, J)[:, None], tl.arange(0, K)[None, :] * 3
    zero = j * 0 + k * 0
    word, _, _, _ = tl.philox(tl.load(seed), zero + head, zero + i, zero + j, zero + k)
    offsets = tl.arange(0, J)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(words + offsets, word.to(tl.int32, bitcast=True))
    tl.store(kept + offsets, (tl.uint_to_uniform_float(word) >= p).to(tl.int8))


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345, -(2**40) + 7])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_words_and_choices(device, seed, p):
    key = torch.tensor([seed], device=device)
    j, k = torch.arange(8, device=device), 3 * torch.arange(16, device=device)
    for head, i in ((0, 0), (5, 2**31 - 2)):
        words = torch.empty(8, 16, dtype=torch.int32, device=device)
        kept = torch.empty(8, 16, dtype=torch.int8, device=device)
        _kernel[(1,)](key, p, words, kept, head, i, 8, 16)
        at = torch.tensor(head, device=device), torch.tensor(i, device=device), j[:, None], k
        assert torch.equal(philox(key, *at), words.long() & 0xFFFFFFFF)
        ours = keep_mask(key, p, 1, 6, torch.tensor([i], device=device), j, k)[0, head, 0]
        assert torch.equal(ours, kept.bool())
