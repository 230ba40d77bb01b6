"""What runs for a chain of filters, and what it keeps for the backward pass."""

import functools

import pytest
import torch
from torch import nn

import torchlayers
from torchlayers.separable_conv import (
    SeparableConv2d,
    SeparableConv3d,
    SeparableConvTranspose2d,
    separable_conv,
)
from torchlayers.separable_conv.functional import _fastest
from torchlayers.testing import assert_close_rel

AXES = [(0,), (1,)]


def filters(c, r, o, k):
    return [(r, c, k, 1), (o, r, 1, k)]


def fastest(c, r, o, k, *, device="cuda", low=True, stride=(1, 1)):
    return _fastest(filters(c, r, o, k), c, 1, stride, AXES, device, low)


def test_what_is_expected_to_be_fast():
    assert fastest(64, 32, 64, 5) == "fused"
    assert fastest(64, 64, 64, 3) == "dense"  # two thirds of the arithmetic: no win
    assert fastest(64, 64, 64, 3, low=False) == fastest(64, 72, 64, 3, device="cpu") == "dense"
    assert fastest(64, 32, 64, 5, low=False) == fastest(64, 32, 64, 5, device="cpu") == "chain"
    assert fastest(512, 64, 512, 5) == "chain"  # compute bound: the library multiplies faster
    # With strides the first filter meets all points of the other axis.
    assert fastest(16, 12, 16, 3, device="cpu") == "chain"
    assert fastest(16, 12, 16, 3, device="cpu", stride=(1, 3)) == "dense"


def test_once_dense_always_dense():
    """As the rank grows: from some rank on the dense kernel, and nothing else after it."""
    for device, low in (("cpu", False), ("cuda", False), ("cuda", True)):
        found = [fastest(32, r, 48, 5, device=device, low=low) for r in range(1, 160)]
        first = found.index("dense")
        assert first > 10 and set(found[first:]) == {"dense"}
        assert ("fused" in found) == low


@pytest.mark.parametrize("cls", [SeparableConv2d, SeparableConvTranspose2d])
def test_the_dispatch_is_noted(cls):
    x = torch.randn(1, 6, 5, 5)
    for rank, method in ((1, "chain"), (9, "dense")):
        cls(6, 6, 3, rank=rank)(x)
        assert torchlayers.last_dispatch() == f"torch: tensors on the CPU, method={method!r}"
    cls(6, 6, 3, rank=1, backend="torch")(x)
    assert torchlayers.last_dispatch() == "torch: backend is 'torch', method='chain'"
    if not torchlayers._backend.interpreted():
        with pytest.raises(torchlayers.BackendError, match="backend='triton' was asked for, but tensors on the CPU"):
            cls(6, 6, 3, rank=1, backend="triton")(x)
        with torchlayers.backend("triton"), pytest.raises(torchlayers.BackendError, match="CPU"):
            cls(6, 6, 3, rank=1)(x)


@pytest.mark.parametrize(
    ("activation", "definition"),
    [("relu", torch.relu), ("gelu", nn.functional.gelu), ("silu", nn.functional.silu)],
)
def test_activations(activation, definition):
    x, factors, bias = torch.randn(2, 3, 6, 5), [torch.randn(s) for s in filters(3, 2, 4, 3)], torch.randn(4)
    plain = separable_conv(x, factors, bias, axes=AXES)
    assert torch.equal(separable_conv(x, factors, bias, axes=AXES, activation=activation), definition(plain))
    with pytest.raises(ValueError, match=r"activation must be one of 'relu'.*got 'rely'"):
        separable_conv(x, factors, bias, axes=AXES, activation="rely")
    with pytest.raises(ValueError, match=r"method must be one of 'auto'.*got 'fused'"):
        separable_conv(x, factors, bias, axes=AXES, method="fused")


LAYERS = {
    "seq": functools.partial(SeparableConv2d, 6, 8, 5, padding=2, rank=4),
    "circular": functools.partial(SeparableConv2d, 6, 8, 5, rank=2, padding_mode="circular", stride=2),
    "cp": functools.partial(SeparableConv2d, 6, 8, 5, rank=4, format="cp"),
    "3d": functools.partial(SeparableConv3d, 6, 8, 3, rank=4),
    "transpose": functools.partial(SeparableConvTranspose2d, 6, 8, 5, stride=2, rank=4),
}


def kept(layer, x):
    """Bytes that a call keeps for the backward pass beside the layer's parameters."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y
    return sum(found.values())


def test_with_recompute_a_layer_keeps_what_the_dense_one_keeps():
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    plain = SeparableConv2d(6, 8, 5, padding=2, rank=4)
    again = SeparableConv2d(6, 8, 5, padding=2, rank=4, recompute=True)
    dense = nn.Conv2d(6, 8, 5, padding=2)
    between = 2 * 4 * 9 * 9 * 4
    assert kept(dense, x) == x.numel() * 4
    assert kept(plain, x) == kept(dense, x) + between
    # torch's checkpoint hands its own saved tensors past these hooks: count what is alive instead.
    assert alive(again, x) == alive(dense, x) < alive(plain, x)


def alive(layer, x):
    """Bytes of images that a call leaves allocated, its output among them, by torch's own allocation events."""
    layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = layer(x)
    events = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    del y
    return sum(events)


@pytest.mark.parametrize("name", LAYERS)
def test_recompute_changes_no_bit(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    layer._method = "chain"
    x = torch.randn(2, 6, *(7,) * layer._dims, requires_grad=True)
    results = []
    for recompute in (False, True):
        layer.recompute = recompute
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    with pytest.raises(TypeError, match="recompute must be a bool, got 1"):
        LAYERS[name](recompute=1)


def test_recompute_differentiates_twice_compiles_and_exports():
    layer = SeparableConv2d(2, 3, 3, padding=1, rank=1, recompute=True).double()
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(call, (x, *parameters))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert_close_rel(ours, plain)
    with torch.no_grad():
        exported = torch.export.export(layer, (x.detach(),))
        assert_close_rel(exported.module()(x.detach()), layer(x))
