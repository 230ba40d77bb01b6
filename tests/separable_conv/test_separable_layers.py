"""Separable convolutions against torch's dense ones: all options, all formats, decompositions, starts, bad input."""

import copy
import functools
import itertools
import warnings

import pytest
import torch
from torch import nn

from torchlayers.separable_conv import (
    LazySeparableConv2d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
    SeparableConvTranspose2d,
    separable_conv,
    separable_conv_transpose,
)
from torchlayers.separable_conv.decompose import cp_als
from torchlayers.separable_conv.functional import METHODS
from torchlayers.testing import assert_close_rel

LAYERS = {1: SeparableConv1d, 2: SeparableConv2d, 3: SeparableConv3d}
DENSE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FORMATS = ("seq", "cp", "kernelwise", "depthwise")
MODES = ("zeros", "reflect", "replicate", "circular")
ORDERS = {1: ("h",), 2: ("vh", "hv"), 3: ("dvh", "hdv")}
SIZE = (9, 8, 7)


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def quiet(make):
    """At full rank a layer costs more than the dense one, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make()


def by(method, layer):
    """``layer`` that runs its filters, or one dense convolution, whichever costs less."""
    layer._method = method
    return layer


@pytest.mark.parametrize("dims", (1, 2, 3))
@pytest.mark.parametrize("format", FORMATS)
def test_full_rank_equals_the_dense_layer_over_all_options(dims, format):
    kernel, stride, dilation, pad = (3, 5, 2)[:dims], (2, 1, 2)[:dims], (1, 2, 1)[:dims], (1, 3, 1)[:dims]
    x = torch.randn(2, 4, *SIZE[:dims])
    for mode, groups, order in itertools.product(MODES, (1, 2), ORDERS[dims]):
        dense = DENSE[dims](4, 6, kernel, stride, pad, dilation, groups, padding_mode=mode)
        layer = quiet(lambda d=dense, o=order: LAYERS[dims].from_conv(d, 1.0, format, order=o))
        expected = dense(x)
        for method in METHODS:
            assert_close_rel(by(method, layer)(x), expected, rtol=1e-11)
        assert_close_rel(layer.equivalent_weight(), dense.weight, rtol=1e-11)


@pytest.mark.parametrize("dims", (1, 2, 3))
@pytest.mark.parametrize("format", FORMATS)
def test_low_ranks_equal_the_dense_layer_with_their_kernel(dims, format):
    x = torch.randn(2, 4, *SIZE[:dims], requires_grad=True)
    for padding, groups, kernel in (
        ("same", 1, 4),
        ("same", 2, (3, 2, 4)[:dims]),
        ("valid", 1, 3),
        (2, 2, (1, 3, 2)[:dims]),
    ):
        for order in ORDERS[dims]:
            options = {"padding": padding, "groups": groups, "rank": 1, "format": format, "order": order}
            layer = quiet(functools.partial(LAYERS[dims], 4, 6, kernel, **options))
            by("chain", layer)
            dense = layer.to_dense()
            assert type(dense) is DENSE[dims]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # an even kernel with "same": torch pads a copy
                expected = dense(x)
            assert_close_rel(layer(x), expected, rtol=1e-11)
            assert_close_rel(layer(x[0]), expected[0], rtol=1e-11)
            cotangent = torch.randn_like(expected)
            (ours,) = torch.autograd.grad(layer(x), x, cotangent)
            (theirs,) = torch.autograd.grad(expected, x, cotangent)
            assert_close_rel(ours, theirs, rtol=1e-11)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("groups", (1, 2))
def test_the_transpose_equals_torchs(format, groups):
    dense = nn.ConvTranspose2d(
        4, 6, (3, 4), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=groups, dilation=(1, 2)
    )
    x = torch.randn(2, 4, 5, 6)
    for order in ORDERS[2]:
        layer = quiet(lambda o=order: SeparableConvTranspose2d.from_conv(dense, 1.0, format, order=o))
        for method in METHODS:
            assert_close_rel(by(method, layer)(x), dense(x), rtol=1e-11)
        assert_close_rel(layer(x[1]), dense(x)[1], rtol=1e-11)
        assert_close_rel(layer.to_dense()(x), dense(x), rtol=1e-11)
        assert_close_rel(layer(x, output_size=[10, 22]), dense(x, output_size=[10, 22]), rtol=1e-11)
        assert layer._output_size((5, 6)) == list(dense(x).shape[2:])


def test_functions_are_adjoint():
    factors = [torch.randn(3, 4, 3, 1), torch.randn(5, 3, 1, 2)]
    options = {"stride": (2, 1), "padding": (1, 0), "axes": [(0,), (1,)]}
    x = torch.randn(2, 4, 9, 8)
    y = separable_conv(x, factors, **options)
    cotangent = torch.randn_like(y)
    back = separable_conv_transpose(cotangent, factors, out_channels=4, **options)
    assert back.shape == x.shape
    torch.testing.assert_close((y * cotangent).sum(), (x * back).sum())


@pytest.mark.parametrize("order", ORDERS[2])
@pytest.mark.parametrize("groups", (1, 2))
def test_the_truncation_error_is_the_tail_of_the_singular_values(order, groups):
    dense = nn.Conv2d(6, 8, (3, 5), groups=groups)
    layer = SeparableConv2d.from_conv(dense, 5, order=order)
    blocks = dense.weight.detach().unflatten(0, (groups, -1))
    if order == "hv":
        blocks = blocks.transpose(-1, -2)
    matrices = blocks.permute(0, 2, 3, 1, 4).flatten(1, 2).flatten(2)
    tail = torch.linalg.svdvals(matrices)[:, 5:].norm()
    assert tail > 0.1
    torch.testing.assert_close((layer.equivalent_weight() - dense.weight).norm(), tail, rtol=1e-12, atol=0)


def test_kernelwise_is_the_best_of_each_kernel():
    dense = nn.Conv2d(3, 4, (5, 3))
    layer = SeparableConv2d.from_conv(dense, 1, "kernelwise")
    tails = torch.linalg.svdvals(dense.weight.detach())[..., 1:].norm(dim=-1)
    torch.testing.assert_close((layer.equivalent_weight() - dense.weight).flatten(2).norm(dim=-1), tails)


def test_laplacians_have_rank_two():
    """A single outer product cannot hold one; two can, and so can chains that share ranks over channels."""
    for stencil in ([[0, 1, 0], [1, -4, 1], [0, 1, 0]], [[1, 4, 1], [4, -20, 4], [1, 4, 1]]):
        dense = nn.Conv2d(1, 1, 3, bias=False)
        with torch.no_grad():
            dense.weight.copy_(torch.tensor(stencil))
        for rank, exact in ((1, False), (2, True)):
            for format in ("kernelwise", "seq"):
                layer = quiet(lambda r=rank, f=format: SeparableConv2d.from_conv(dense, r, f))  # noqa: B023
                assert torch.allclose(layer.equivalent_weight(), dense.weight) is exact


def test_als_finds_a_kernel_of_low_rank():
    factors = [torch.randn(n, 3) for n in (8, 6, 3, 3)]
    kernel = torch.einsum("ar,br,cr,dr->abcd", *factors)
    found = cp_als(kernel, 3)
    assert_close_rel(torch.einsum("ar,br,cr,dr->abcd", *found), kernel, rtol=1e-6)
    sizes = torch.stack([f.norm(dim=0) for f in found])
    torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes))


def test_als_against_tensorly():
    tensorly = pytest.importorskip("tensorly")
    parafac = pytest.importorskip("tensorly.decomposition").parafac
    kernel = torch.randn(6, 5, 3, 3)
    ours = torch.einsum("ar,br,cr,dr->abcd", *cp_als(kernel, 8))
    theirs = tensorly.cp_to_tensor(parafac(kernel.numpy(), 8, init="random", random_state=0, n_iter_max=300, tol=1e-9))
    error = torch.from_numpy(theirs).sub(kernel).norm()
    assert (ours - kernel).norm() < 1.05 * error


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dims", (1, 2, 3))
def test_the_start_has_the_variance_of_the_dense_layer(format, dims):
    rank = {"seq": 8, "cp": 24, "kernelwise": 1, "depthwise": 1}[format]
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        layer = quiet(lambda: LAYERS[dims](16, 16, 3, rank=rank, format=format))
        ratios.append(layer.equivalent_weight().var() * 3 * 16 * 3**dims)  # torch's own: 1 / (3 fan_in)
    assert 0.8 < torch.stack(ratios).mean() < 1.25
    fan_in = 16 * 3**dims
    assert layer.bias.abs().max() <= fan_in**-0.5


def test_counts_of_the_literature():
    """Weights of 64 -> 64 channels, k = 3 and 5, R = 32; 3-D with k = 3, R = 64."""

    def weights(layer):
        return sum(p.numel() for name, p in layer.named_parameters() if name != "bias")

    for kernel, counts in ((3, (12288, 4288, 24576, 4672)), (5, (20480, 4416, 40960, 5696))):
        for format, rank, count in zip(FORMATS, (32, 32, 1, 1), counts, strict=True):
            layer = SeparableConv2d(64, 64, kernel, rank=rank, format=format)
            assert weights(layer) == count == layer._count(layer.rank)
            wide = 10 + kernel - 1
            expected = {
                "seq": 32 * 64 * kernel * 10 * wide + 32 * 64 * kernel * 100,
                "cp": 32 * (64 * wide**2 + kernel * 10 * wide + kernel * 100 + 64 * 100),
                "kernelwise": 64 * 64 * kernel**2 * 100,
                "depthwise": 64 * kernel**2 * 100 + 64 * 64 * 100,
            }
            assert layer.macs(wide, wide) == expected[format]
    assert weights(SeparableConv3d(64, 64, 3, rank=64)) == 36864


def test_ranks():
    layer = SeparableConv2d(8, 8, 3)
    assert layer.rank == 12 // 2 and layer._count(layer.rank) <= layer._dense_count / 2 < layer._count(layer.rank + 1)
    assert SeparableConv2d(8, 8, 3, rank=0.3).rank == 8  # ceil(0.3 * 24)
    assert SeparableConv3d(8, 8, 3, rank=(5, 7)).rank == (5, 7)
    assert SeparableConv3d(8, 8, 3, rank=0.1).rank == (3, 3)
    assert SeparableConv2d(4, 6, (3, 5), format="kernelwise", rank=1).full_rank == 3
    with pytest.warns(UserWarning, match="breaks even at rank 12"):
        SeparableConv2d(8, 8, 3, rank=13)
    for rank, error in ((0, ValueError), (25, ValueError), (1.5, ValueError), (True, TypeError), ((2, 2), ValueError)):
        with pytest.raises(error, match="rank"):
            SeparableConv2d(8, 8, 3, rank=rank)
    with pytest.raises(ValueError, match="rank must be at most"):
        SeparableConv3d(8, 8, 3, rank=(5, 1000))


def test_errors_are_those_of_the_dense_layer():
    for options in (
        {"groups": 3},
        {"padding_mode": "mirror"},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
    ):
        with pytest.raises(ValueError) as theirs:
            nn.Conv2d(4, 4, 3, **options)
        with pytest.raises(ValueError) as ours:
            SeparableConv2d(4, 4, 3, rank=2, **options)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(RuntimeError, match="channels"):
        SeparableConv2d(4, 4, 3, rank=2)(torch.randn(1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"format must be one of 'seq'.*got 'tucker'"):
        SeparableConv2d(4, 4, 3, format="tucker")
    with pytest.raises(ValueError, match="order must be a permutation of 'vh', got 'vv'"):
        SeparableConv2d(4, 4, 3, order="vv")
    with pytest.raises(TypeError, match=r"conv must be an nn.Conv2d, got Conv1d"):
        SeparableConv2d.from_conv(nn.Conv1d(3, 3, 3), 1)
    with pytest.raises(ValueError, match="weight must be finite"):
        SeparableConv2d(4, 4, 3, rank=2).load_dense_(torch.full((4, 4, 3, 3), float("nan")))


def test_the_state_holds_the_filters_by_name():
    layer = SeparableConv2d(4, 6, 3, rank=2)
    assert set(layer.state_dict()) == {"weight_v", "weight_h", "bias"}
    assert set(SeparableConv3d(4, 6, 3, rank=2, format="cp").state_dict()) == {
        "weight_in", "weight_d", "weight_v", "weight_h", "weight_out", "bias",
    }  # fmt: skip
    other = SeparableConv2d(4, 6, 3, rank=2)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(layer(x), other(x))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(nn.Conv2d(4, 6, 3).state_dict())  # a dense kernel is never decomposed in silence


def test_lazy_layers_become_plain_ones():
    layer = LazySeparableConv2d(6, 3, padding=1, groups=2, rank=2)
    assert "rank=2" in repr(layer)
    y = layer(torch.randn(2, 4, 5, 5))
    assert type(layer) is SeparableConv2d and layer.in_channels == 4 and y.shape == (2, 6, 5, 5)
    assert_close_rel(layer.to_dense()(torch.ones(1, 4, 5, 5)), layer(torch.ones(1, 4, 5, 5)), rtol=1e-11)
    with pytest.raises(ValueError, match="divisible by groups"):
        LazySeparableConv2d(6, 3, groups=2, rank=2)(torch.randn(2, 3, 5, 5))


def test_gradients():
    layer = SeparableConv2d(2, 3, (3, 2), stride=(2, 1), padding=1, rank=2, padding_mode="circular")
    x = torch.randn(1, 2, 5, 4, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]

    def call(x, *values):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))
