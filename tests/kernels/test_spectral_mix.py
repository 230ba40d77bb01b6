"""The mixing kernels, in Triton's interpreter or on a GPU, against the complex definition in float64."""

import pytest
import torch

from torchlayers.kernels import spectral_mix as kernels
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

# (B, R, S, M, N, Q): one element; several tiles of everything, none full; one mode axis.
SHAPES = [(1, 1, 1, 1, 1, 1), (17, 18, 19, 2, 9, 17), (3, 5, 4, 1, 5, 3)]
KINDS = ["dense", "tucker", "cp"]


def _c(w):
    return torch.view_as_complex(w.contiguous())


def _w(kind, *factors):
    if kind == "dense":
        return _c(factors[0])
    if kind == "tucker":
        return torch.einsum("rsmq,nq->rsmn", *map(_c, factors))
    return torch.einsum("ir,mr,nr,or->iomn", *map(_c, factors))


def definition(kind, x, *factors):
    y = torch.einsum("kbi,iok->kbo", torch.complex(*x.unbind(0)), _w(kind, *factors).flatten(2))
    return torch.stack((y.real, y.imag))


def make(kind, shape, device):
    b, r, s, m, n, q = shape

    def randn(*size):
        return torch.randn(*size, device=device, requires_grad=True)

    x = randn(2, m * n, b, r)
    if kind == "dense":
        return x, randn(r, s, m, n, 2)
    if kind == "tucker":
        return x, randn(r, s, m, q, 2), randn(n, q, 2)
    return x, randn(r, q, 2), randn(m, q, 2), randn(n, q, 2), randn(s, q, 2)


OPERATIONS = {"dense": kernels.spectral_mix, "tucker": kernels.spectral_mix_tucker, "cp": kernels.spectral_mix_cp}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, shape, device):
    inputs = make(kind, shape, device)
    with nan_empty():
        y = OPERATIONS[kind](*inputs)
        g = torch.randn_like(y)
        gradients = torch.autograd.grad(y, inputs, g)
    assert y.dtype == torch.float32 and y.is_contiguous()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = definition(kind, *exact)
    assert_close_rel(y, expected)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert ours.dtype == torch.float32
        assert_close_rel(ours, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, device):
    inputs = make(kind, (2, 3, 2, 2, 3, 2), device)

    def second(operation, inputs):
        graph = torch.autograd.grad(operation(*inputs).pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in graph), inputs)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = second(lambda *inputs: definition(kind, *inputs), exact)
    for ours, reference in zip(second(OPERATIONS[kind], inputs), wanted, strict=True):
        assert_close_rel(ours, reference, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_single_gradients(kind, device):
    """Whatever needs no gradient gets none, and the others are the same."""
    inputs = make(kind, (2, 3, 2, 2, 3, 2), device)
    every = torch.autograd.grad(OPERATIONS[kind](*inputs).square().sum(), inputs)
    for i, wanted in enumerate(every):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(OPERATIONS[kind](*some).square().sum(), some[i])
        assert torch.equal(gradient, wanted)


def test_a_cropped_weight_is_read_in_place(device):
    around = torch.full((4, 6, 5, 7, 2), float("nan"), device=device)
    x, w = make("dense", (2, 3, 4, 3, 5, 1), device)
    window = around.transpose(0, 1)[1:4, :, 1:4, 2:7]
    window.copy_(w.detach())
    assert not window.is_contiguous() and torch.equal(window, w)
    assert torch.equal(kernels.spectral_mix(x, window), kernels.spectral_mix(x, w))


def test_strided_factors(device):
    for kind in ("tucker", "cp"):
        inputs = make(kind, (2, 3, 2, 2, 3, 2), device)
        strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
        assert not any(t.is_contiguous() for t in strided)
        assert torch.equal(OPERATIONS[kind](*strided), OPERATIONS[kind](*inputs))


@pytest.mark.parametrize("factored", [False, True])
def test_every_launch_configuration(factored, device):
    kind = "tucker" if factored else "dense"
    x, *factors = (t.detach() for t in make(kind, (17, 18, 20, 1, 17, 3), device))
    expected = definition(kind, x.double(), *(f.double() for f in factors))
    for b in (17, 40):  # the tile of the batch is a constant of the configurations
        for meta in kernels._mix_candidates(b, 20, 3 if factored else None):
            with nan_empty():
                assert_close_rel(kernels._launch_mix(x, *factors, candidates=[meta]), expected)


def test_shares_of_the_rows_are_summed(device, monkeypatch):
    monkeypatch.setattr(kernels._lib, "multiprocessors", lambda device: 4)
    inputs = make("cp", (9, 3, 2, 2, 8, 4), device)  # 144 rows, of which a share takes 128
    gradients = torch.autograd.grad(kernels.spectral_mix_cp(*inputs).square().sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(definition("cp", *exact).square().sum(), exact)
    for ours, reference in zip(gradients, wanted, strict=True):
        assert_close_rel(ours, reference, rtol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_planes_of_sixteen_bits(kind, dtype, device):
    """Numbers of 16 bits, sums and weights in float32; only the planes are rounded."""
    x, *factors = make(kind, (3, 5, 4, 2, 3, 2), device)
    inputs = (x.detach().to(dtype).requires_grad_(), *factors)
    y = OPERATIONS[kind](*inputs)
    g = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, g)
    assert [t.dtype for t in (y, *gradients)] == [dtype, dtype] + [torch.float32] * len(factors)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = definition(kind, *exact)
    assert_close_rel(y, expected)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert_close_rel(ours, wanted, dtype=dtype)


@pytest.mark.parametrize("empty", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind, empty, device):
    shape = [2, 3, 2, 2, 3, 2]
    shape[empty] = 0
    b, _, s, m, n, _ = shape
    inputs = make(kind, shape, device)
    with nan_empty():
        y = OPERATIONS[kind](*inputs)
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == (2, m * n, b, s)
    assert (kind == "dense" and empty == 5) or not y.any()
    for gradient, t in zip(gradients, inputs, strict=True):
        assert gradient.shape == t.shape and gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_runs_agree_bit_for_bit(kind, device):
    inputs = make(kind, (5, 3, 4, 2, 9, 3), device)

    def run():
        y = OPERATIONS[kind](*inputs)
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_only_modes_and_weights_are_saved(kind, device):
    inputs = make(kind, (3, 5, 4, 2, 3, 2), device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OPERATIONS[kind](*inputs)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs}


@pytest.mark.parametrize(
    ("kind", "error", "message", "change"),
    [
        ("dense", ValueError, r"x must have shape \(2, modes, B, R\)", {0: torch.zeros(6, 2, 3)}),
        ("dense", TypeError, "x must be float32, float16 or bfloat16", {0: torch.zeros(2, 6, 2, 3).double()}),
        ("dense", TypeError, "w must be float32", {1: torch.zeros(3, 2, 2, 3, 2).half()}),
        ("dense", ValueError, r"w must have shape .* = \(3, \*, \*, \*, 2\)", {1: torch.zeros(4, 2, 2, 3, 2)}),
        (
            "dense",
            ValueError,
            "x must have M N = 8 modes, which the weight has, got 6",
            {1: torch.zeros(3, 2, 2, 4, 2)},
        ),
        ("tucker", ValueError, r"d must have shape \(N, Q, 2\) = \(\*, 2, 2\)", {2: torch.zeros(3, 4, 2)}),
        ("cp", ValueError, r"a must have shape \(M, R, 2\) = \(\*, 2, 2\)", {2: torch.zeros(2, 3, 2)}),
        ("cp", ValueError, "x must have M N = 10 modes, got 6", {3: torch.zeros(5, 2, 2)}),
    ],
)
def test_refuses(kind, error, message, change, device):
    inputs = [t.detach() for t in make(kind, (2, 3, 2, 2, 3, 2), device)]
    for place, tensor in change.items():
        inputs[place] = tensor.to(device)
    with pytest.raises(error, match=message):
        OPERATIONS[kind](*inputs)
