"""The public function through the Triton kernels: every option crosses, and gives the float64 definition."""

import pytest
import torch

import torchlayers
from torchlayers._attention import normalize_window
from torchlayers.tensor_attention import reference, tensor_attention
from torchlayers.testing import assert_close_rel

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]


def inputs(device, dtype, heads=2, kv_heads=1, nq=5, n1=7, n2=6, d=6, dv=4):
    shapes = [(heads, nq, d), (kv_heads, n1, d), (kv_heads, n2, d), (kv_heads, n1, dv), (kv_heads, n2, dv)]
    return [torch.randn(2, *shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def test_every_option_crosses(device):
    arguments = inputs(device, torch.float32)
    options = {
        "key_padding_mask1": torch.tensor([[True] * 6 + [False], [True] * 7], device=device),
        "key_padding_mask2": torch.tensor([[False] + [True] * 5, [True] * 6], device=device),
        "dropout_p": 0.3, "dropout_seed": 2**35 + 3, "scale": 0.4, "form": "determinant", "q_offset": 3, "k2_offset": 1,
    }  # fmt: skip
    out, lse = tensor_attention(
        *arguments, **options, is_causal=True, window1=4, window2=(3, 1), enable_gqa=True, return_lse=True,
        backend="triton",
    )  # fmt: skip
    assert torchlayers.last_dispatch() == "triton: tensor_attention_forward"
    g = torch.randn_like(out)
    gradients = torch.autograd.grad(out, arguments, g)
    wide = [x.detach().double().requires_grad_() for x in arguments]
    expected, expected_lse = reference.tensor_attention(
        *wide, **options, is_causal=True,
        window1=normalize_window("window1", 4, True), window2=normalize_window("window2", (3, 1), True),
    )  # fmt: skip
    assert_close_rel(out, expected, rtol=5e-6)
    assert torch.equal(lse.isfinite(), expected_lse.isfinite()) and expected_lse.isfinite().any()
    assert_close_rel(lse.nan_to_num(neginf=0.0), expected_lse.nan_to_num(neginf=0.0), rtol=5e-6)
    for a, b in zip(gradients, torch.autograd.grad(expected, wide, g.double()), strict=True):
        assert_close_rel(a, b, rtol=1e-5)


def test_plain_torch_and_kernel_drop_the_same(device):
    arguments = inputs(device, torch.float32)
    options = {"dropout_p": 0.5, "dropout_seed": 9, "enable_gqa": True}
    kernel = tensor_attention(*arguments, **options, backend="triton")
    assert_close_rel(kernel, tensor_attention(*arguments, **options, backend="torch").double(), rtol=5e-6)


def test_what_the_kernels_do_not_take(device):
    with pytest.raises(torchlayers.BackendError, match="does not support float64"):
        tensor_attention(*inputs(device, torch.float64), enable_gqa=True, backend="triton")
    with pytest.raises(torchlayers.BackendError, match="does not support head dimension 260"):
        tensor_attention(*inputs(device, torch.float32, d=260), enable_gqa=True, backend="triton")
    with pytest.raises(torchlayers.BackendError, match="does not support empty tensors"):
        tensor_attention(*inputs(device, torch.float32, n1=0), enable_gqa=True, backend="triton")
