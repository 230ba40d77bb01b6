"""The product, the bracket and the many-body power, by every method: against values at points, and bad input."""

import copy
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import torchlayers
from torchlayers.gaunt import (
    GauntSymmetricContraction,
    functional,
    gaunt_many_body,
    gaunt_tensor_product,
    grid,
    reference,
)
from torchlayers.gaunt.irreps import e3nn_o3
from torchlayers.testing import assert_close_rel, assert_equivariant

METHODS = ("grid", "separable", "fourier", "sparse", "dense")
GRIDS = ("grid", "separable", "fourier")
BOTH = pytest.mark.parametrize("antisymmetric", [False, True], ids=["product", "bracket"])
EVERY = pytest.mark.parametrize("method", METHODS)
DEGREES = [(0, 0), (0, 2), (1, 1), (2, 1), (1, 3), (3, 3), (5, 2)]


@pytest.fixture(scope="module")
def o3():
    pytest.importorskip("e3nn")
    return e3nn_o3()


def signal(*lead, lmax, dtype=torch.float64, grad=False):
    return torch.randn(*lead, (lmax + 1) ** 2, dtype=dtype, requires_grad=grad)


def directions(n=40):
    return torch.nn.functional.normalize(torch.randn(n, 3, dtype=torch.float64), dim=-1)


def at(o3, x, r):
    """Values (…, points) of signals at unit vectors, by e3nn's harmonics."""
    lmax = round(x.shape[-1] ** 0.5) - 1
    return x @ o3.spherical_harmonics(list(range(lmax + 1)), r, normalize=True, normalization="integral").T


def gradients_at(o3, x, r):
    """Surface gradients (…, points, 3), by autograd through e3nn's normalised harmonics."""
    flat = x.reshape(-1, x.shape[-1])
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda p, row=row: at(o3, row, p).sum(), r) for row in flat]
    )
    return jacobian.view(*x.shape[:-1], *r.shape)


# ------------------------------------------------------------------------------------------------------- values


@EVERY
@pytest.mark.parametrize(("lmax1", "lmax2"), DEGREES)
def test_product_has_the_values_of_the_product(o3, method, lmax1, lmax2):
    x, y, r = signal(2, 3, lmax=lmax1), signal(2, 3, lmax=lmax2), directions()
    z = gaunt_tensor_product(x, y, lmax1, lmax2, method=method)
    assert z.shape == (2, 3, (lmax1 + lmax2 + 1) ** 2)
    assert_close_rel(at(o3, z, r), at(o3, x, r) * at(o3, y, r), rtol=1e-13)


@EVERY
@pytest.mark.parametrize(("lmax1", "lmax2"), [d for d in DEGREES if all(d)])
def test_bracket_has_the_values_of_the_bracket(o3, method, lmax1, lmax2):
    x, y, r = signal(2, lmax=lmax1), signal(2, lmax=lmax2), directions(12)
    z = gaunt_tensor_product(x, y, lmax1, lmax2, antisymmetric=True, method=method)
    slopes = torch.linalg.cross(gradients_at(o3, x, r), gradients_at(o3, y, r))
    assert_close_rel(at(o3, z, r), (slopes * r).sum(-1), rtol=1e-12)


@EVERY
@BOTH
def test_a_lower_output_degree_drops_components(method, antisymmetric):
    """On a smaller grid, or by fewer coefficients: one node fewer than needed would show here."""
    for lmax1, lmax2 in DEGREES:
        x, y = signal(3, 2, lmax=lmax1), signal(3, 2, lmax=lmax2)
        whole = reference.gaunt_tensor_product(x, y, lmax1, lmax2, antisymmetric=antisymmetric)
        for lmax_out in range(lmax1 + lmax2 + 1):
            z = gaunt_tensor_product(x, y, lmax1, lmax2, lmax_out, antisymmetric=antisymmetric, method=method)
            torch.testing.assert_close(z, whole[..., : (lmax_out + 1) ** 2], rtol=1e-12, atol=1e-12)


@BOTH
def test_methods_agree_at_high_degree(antisymmetric):
    x, y = signal(3, lmax=14), signal(3, lmax=11)
    run = partial(gaunt_tensor_product, x, y, 14, 11, 13, antisymmetric=antisymmetric)
    expected = run(method="grid")
    assert expected.norm() > 1
    for method in ("separable", "fourier", "auto"):
        assert_close_rel(run(method=method), expected, rtol=1e-12)


@pytest.mark.parametrize("correlation", [1, 2, 3, 4, 5])
def test_many_body_has_the_values_of_the_power(o3, correlation):
    x, r = signal(2, 3, lmax=2), directions()
    z = gaunt_many_body(x, 2, correlation, 2 * correlation)
    assert_close_rel(at(o3, z, r), at(o3, x, r) ** correlation, rtol=1e-12)
    for lmax_out in range(2 * correlation):
        low = gaunt_many_body(x, 2, correlation, lmax_out)
        torch.testing.assert_close(low, z[..., : (lmax_out + 1) ** 2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", GRIDS)
def test_powers_on_every_grid(o3, method):
    x, r = signal(4, lmax=3), directions()
    z = grid.contract((x,), (3,), (0, 0, 0), 9, method=method)
    assert_close_rel(at(o3, z, r), at(o3, x, r) ** 3, rtol=1e-12)
    high = signal(2, lmax=9)
    assert_close_rel(gaunt_many_body(high, 9, 2, 9), gaunt_tensor_product(high, high, 9, 9, 9), rtol=1e-12)


def test_one_is_the_identity_and_a_signal_commutes_with_itself():
    x = signal(4, 5, lmax=3)
    one = torch.tensor([(4 * torch.pi) ** 0.5], dtype=torch.float64).expand(4, 1, 1)
    y = signal(4, 5, lmax=3)
    for method in METHODS:
        torch.testing.assert_close(gaunt_tensor_product(x, one, 3, 0, method=method), x)
        torch.testing.assert_close(gaunt_tensor_product(one, x, 0, 3, method=method), x)
        bracket = partial(gaunt_tensor_product, lmax1=3, lmax2=3, antisymmetric=True, method=method)
        torch.testing.assert_close(bracket(x, x), torch.zeros(4, 5, 49, dtype=torch.float64), rtol=0, atol=1e-11)
        torch.testing.assert_close(bracket(x, y), -bracket(y, x), rtol=1e-11, atol=1e-11)


@EVERY
@BOTH
def test_equivariance(action, method, antisymmetric):
    x, y = signal(2, 3, lmax=3), signal(2, 3, lmax=2)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    for matrix in (turn, -turn):
        d1, d2, d3 = (action(matrix, lmax) for lmax in (3, 2, 4))
        sign = torch.linalg.det(matrix).round() if antisymmetric else 1.0
        assert_equivariant(
            lambda a, b: gaunt_tensor_product(a, b, 3, 2, 4, antisymmetric=antisymmetric, method=method),
            (x, y),
            (lambda a, d=d1: a @ d.T, lambda b, d=d2: b @ d.T),
            lambda z, d=d3, sign=sign: sign * z @ d.T,
            tol=1e-12,
        )


@EVERY
@BOTH
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((5, 4), (5, 1)), ((5, 1), (5, 4)), ((4,), (5, 4)), ((), (5, 4)), ((), ()), ((3, 1, 4), (2, 1)),
        ((1, 6), (5, 1)),
    ],
)  # fmt: skip
def test_batches_and_channels_broadcast(method, antisymmetric, first, second):
    x, y = signal(*first, lmax=2, grad=True), signal(*second, lmax=1, grad=True)
    z = gaunt_tensor_product(x, y, 2, 1, 2, antisymmetric=antisymmetric, method=method)
    expected = reference.gaunt_tensor_product(x, y, 2, 1, 2, antisymmetric=antisymmetric)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(z)
    ours, theirs = (torch.autograd.grad(out, (x, y), g, create_graph=True) for out in (z, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    directions = [torch.randn_like(a) for a in ours]
    ours, theirs = (torch.autograd.grad(out, (x, y), directions) for out in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("budget", [1, 3000, 20000])
@pytest.mark.parametrize("second", [(7, 5), (7, 1), (1, 5), (1, 1)])
def test_chunks_change_nothing(monkeypatch, method, budget, second):
    for antisymmetric in (False, True):
        x, y = signal(7, 5, lmax=2, grad=True), signal(*second, lmax=1, grad=True)

        def run(x=x, y=y, antisymmetric=antisymmetric):
            z = gaunt_tensor_product(x, y, 2, 1, 3, antisymmetric=antisymmetric, method=method)
            first = torch.autograd.grad(z.sin().sum(), (x, y), create_graph=True)
            return z, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))

        whole = run()
        monkeypatch.setattr(grid, "CPU_BYTES", budget)
        for a, b in zip(run(), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        monkeypatch.undo()


# -------------------------------------------------------------------------------------------------- derivatives


@EVERY
@BOTH
def test_gradcheck(method, antisymmetric):
    run = partial(gaunt_tensor_product, lmax1=2, lmax2=1, lmax_out=2, antisymmetric=antisymmetric, method=method)
    arguments = signal(2, 1, lmax=2, grad=True), signal(2, lmax=1, grad=True)
    assert gradcheck(run, arguments)
    assert gradgradcheck(run, arguments)


def test_gradcheck_many_body():
    x = signal(2, lmax=1, grad=True)
    for correlation in (1, 2, 3):
        run = partial(gaunt_many_body, lmax=1, correlation=correlation, lmax_out=1)
        assert gradcheck(run, (x,))
        assert gradgradcheck(run, (x,))


def test_gradients_reach_degrees_above_the_others():
    """A degree of x that no degree of y and z couples to has gradient 0, on grids too small to hold it."""
    for method in METHODS:
        x, y = signal(3, lmax=6, grad=True), signal(3, lmax=1)
        z = gaunt_tensor_product(x, y, 6, 1, 1, method=method)
        (gradient,) = torch.autograd.grad(z.square().sum(), x)
        expected = torch.autograd.grad(reference.gaunt_tensor_product(x, y, 6, 1, 1).square().sum(), x)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", GRIDS)
@BOTH
def test_third_derivatives(method, antisymmetric):
    x, y = signal(3, lmax=2, grad=True), signal(3, lmax=2, grad=True)

    def third(product):
        value = product(x, y, 2, 2, 2, antisymmetric=antisymmetric).pow(4).sum()
        for _ in range(3):
            first, second = torch.autograd.grad(value, (x, y), create_graph=True)
            value = first.sin().sum() + second.square().sum()
        return value

    expected = third(reference.gaunt_tensor_product)
    torch.testing.assert_close(third(partial(gaunt_tensor_product, method=method)), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", GRIDS)
def test_only_the_arguments_are_kept(method):
    kept = []
    x, y = signal(8, 4, lmax=3, grad=True), signal(8, 4, lmax=3, grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()) or t, lambda t: t):
        gaunt_tensor_product(x, y, 3, 3, 3, method=method)
    assert set(kept) <= {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}


@pytest.mark.parametrize("method", (*GRIDS, "dense"))
@BOTH
def test_function_transforms(method, antisymmetric):
    x, y = signal(4, 3, lmax=2), signal(4, 3, lmax=1)
    run = partial(gaunt_tensor_product, lmax1=2, lmax2=1, antisymmetric=antisymmetric, method=method)
    torch.testing.assert_close(torch.func.vmap(run)(x, y), run(x, y))
    gradient = torch.func.vmap(torch.func.grad(lambda a, b: run(a, b).square().sum()))(x, y)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(run(x, y).square().sum(), x)[0])


# -------------------------------------------------------------------------------- dtypes, layouts, compilation


@EVERY
@BOTH
def test_float32_accuracy(method, antisymmetric):
    for lmax in (1, 2, 4, 8):
        x, y = signal(50, lmax=lmax, dtype=torch.float32), signal(50, lmax=lmax, dtype=torch.float32)
        z = gaunt_tensor_product(x, y, lmax, lmax, lmax, antisymmetric=antisymmetric, method=method)
        expected = reference.gaunt_tensor_product(
            x.double(), y.double(), lmax, lmax, lmax, antisymmetric=antisymmetric
        )  # fmt: skip
        assert z.dtype == torch.float32
        assert_close_rel(z, expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(method, dtype):
    x, y = signal(5, 3, lmax=3, dtype=dtype, grad=True), signal(5, 3, lmax=2, dtype=dtype)
    z = gaunt_tensor_product(x, y, 3, 2, 3, method=method)
    exact = gaunt_tensor_product(x.double(), y.double(), 3, 2, 3)
    assert z.dtype == dtype
    assert_close_rel(z, exact, rtol=torch.finfo(dtype).eps / 2)
    (gradient,) = torch.autograd.grad(z.sum(), x)
    assert gradient.dtype == dtype
    power = gaunt_many_body(x, 3, 2, 3)
    assert power.dtype == dtype
    assert_close_rel(power, gaunt_many_body(x.double(), 3, 2, 3), rtol=torch.finfo(dtype).eps / 2)


@EVERY
def test_autocast_computes_in_float32(method):
    x, y = signal(5, 3, lmax=3, dtype=torch.float32, grad=True), signal(5, 3, lmax=2, dtype=torch.float32)
    run = partial(gaunt_tensor_product, lmax1=3, lmax2=2, lmax_out=3, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        z, mixed = run(x, y), run(x, y.bfloat16())
        power = gaunt_many_body(x, 3, 2, 3)
        assert run(x.double(), y.double()).dtype == torch.float64
    assert z.dtype == mixed.dtype == power.dtype == torch.float32
    assert torch.equal(z, run(x, y)) and torch.equal(mixed, run(x, y.bfloat16().float()))
    assert torch.equal(power, gaunt_many_body(x, 3, 2, 3))


@pytest.mark.parametrize("method", GRIDS)
def test_forces_under_autocast_are_float32(method):
    x, y = signal(5, 3, lmax=3, dtype=torch.float32, grad=True), signal(5, 3, lmax=2, dtype=torch.float32)
    run = partial(gaunt_tensor_product, lmax1=3, lmax2=2, lmax_out=3, method=method)
    for create_graph in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            (gradient,) = torch.autograd.grad(run(x, y).square().sum(), x, create_graph=create_graph)
        assert torch.equal(gradient, torch.autograd.grad(run(x, y).square().sum(), x, create_graph=create_graph)[0])


@EVERY
@BOTH
def test_empty_batches_and_views(method, antisymmetric):
    run = partial(gaunt_tensor_product, lmax1=2, lmax2=1, antisymmetric=antisymmetric, method=method)
    for first, second in [((0, 3), (0, 3)), ((0, 3), (1, 3)), ((4, 0), (4, 0)), ((4, 0), (4, 1)), ((0,), (0,))]:
        x, y = signal(*first, lmax=2, grad=True), signal(*second, lmax=1, grad=True)
        z = run(x, y)
        assert z.shape == (*first, 16) and z.requires_grad
        for a, gradient in zip((x, y), torch.autograd.grad(z.sum(), (x, y)), strict=True):
            assert gradient.shape == a.shape and (gradient == 0).all()
    assert gaunt_many_body(signal(0, 3, lmax=2), 2, 3, 1).shape == (0, 3, 4)
    x, y = torch.randn(9, 3, 5, dtype=torch.float64).permute(2, 1, 0), signal(3, lmax=1).expand(5, 3, 4)[..., ::1]
    torch.testing.assert_close(run(x, y), run(x.contiguous(), y.contiguous()))
    torch.testing.assert_close(gaunt_many_body(x, 2, 2, 2), gaunt_many_body(x.contiguous(), 2, 2, 2))


class Product(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, x, y):
        z = gaunt_tensor_product(x, y, 2, 1, 2, method=self.method)
        return gaunt_tensor_product(z, y, 2, 1, 2, antisymmetric=True, method=self.method)


@EVERY
def test_compiles_whole_for_any_batch(method):
    torch._dynamo.reset()
    run = Product("auto" if method == "dense" else method)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for batch in (3, 5, 8):
        x, y = signal(batch, 4, lmax=2, grad=True), signal(batch, 4, lmax=1, grad=True)
        z = compiled(x, y)
        torch.testing.assert_close(z, run(x, y))
    g = torch.randn_like(z)
    for a, b in zip(torch.autograd.grad(z, (x, y), g), torch.autograd.grad(run(x, y), (x, y), g), strict=True):
        torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


@EVERY
def test_exports(method):
    batch = torch.export.Dim("batch")
    example = signal(3, 4, lmax=2), signal(3, 4, lmax=1)
    exported = torch.export.export(Product(method), example, dynamic_shapes=({0: batch}, {0: batch}))
    x, y = signal(7, 4, lmax=2), signal(7, 4, lmax=1)
    torch.testing.assert_close(exported.module()(x, y), Product(method)(x, y))


def test_many_body_compiles_and_exports():
    torch._dynamo.reset()

    class Power(torch.nn.Module):
        def forward(self, x):
            return gaunt_many_body(x, 2, 3, 1)

    batch = torch.export.Dim("batch")
    exported = torch.export.export(Power(), (signal(3, 4, lmax=2),), dynamic_shapes=({0: batch},))
    compiled = torch.compile(Power(), fullgraph=True, backend="aot_eager")
    x = signal(6, 4, lmax=2, grad=True)
    torch.testing.assert_close(exported.module()(x.detach()), Power()(x).detach())
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(Power()(x).square().sum(), x)[0])


# --------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("lmax", "channels", "method"), [(1, 8, "sparse"), (3, 8, "grid"), (12, 8, "separable"), (3, 1, "sparse")]
)
def test_auto_takes_the_cheapest(lmax, channels, method):
    x, y = signal(2, 8, lmax=lmax), signal(2, channels, lmax=lmax)
    run = partial(gaunt_tensor_product, x, y, lmax, lmax, lmax)
    assert torch.equal(run(), run(method=method))
    assert not any(torch.equal(run(), run(method=other)) for other in GRIDS if other != method)


def test_dispatch_is_told():
    x, y = signal(2, lmax=3), signal(2, lmax=3)
    gaunt_tensor_product(x, y, 3, 3, method="grid")
    assert torchlayers.last_dispatch().startswith("torch: ")
    for method in ("grid", "fourier", "sparse", "auto"):
        with pytest.raises(torchlayers.BackendError, match="backend='triton'"):
            gaunt_tensor_product(x.long().double(), y, 3, 3, method=method, backend="triton")
    with pytest.raises(torchlayers.BackendError, match="backend='triton'"):
        gaunt_many_body(x, 3, 2, 1, backend="triton")


@pytest.mark.gpu
@pytest.mark.interpret
@BOTH
@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("auto", (2, 1, 3), (4, 1)),
        ("grid", (3, 2), (3, 1)),
        ("grid", (1,), (2, 3)),
        ("sparse", (3, 1), (3, 2)),
        ("sparse", (), (4,)),
    ],
)
def test_kernels(device, method, antisymmetric, first, second):
    """Which shapes and derivatives a kernel has is its own tests' business: here that it is called rightly."""
    x = signal(*first, lmax=2, dtype=torch.float32).to(device).requires_grad_()
    y = signal(*second, lmax=1, dtype=torch.float32).to(device).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    z = gaunt_tensor_product(x, y, 2, 1, 2, antisymmetric=antisymmetric, method=method, backend="triton")
    assert torchlayers.last_dispatch().startswith("triton: ")
    expected = reference.gaunt_tensor_product(*wide, 2, 1, 2, antisymmetric=antisymmetric)
    assert_close_rel(z, expected)
    ours = torch.autograd.grad(z.square().sum(), (x, y))
    for a, b in zip(ours, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        assert_close_rel(a, b, rtol=4e-6)


@pytest.mark.gpu
@pytest.mark.interpret
def test_power_kernel(device):
    for lead in ((2, 1, 3), (4,), (0, 3)):
        x = signal(*lead, lmax=2, dtype=torch.float32).to(device)
        z = gaunt_many_body(x, 2, 3, 2, backend="triton")
        assert torchlayers.last_dispatch().startswith("triton: ")
        assert_close_rel(z, reference.gaunt_many_body(x.double(), 2, 3, 2))


@pytest.mark.gpu
@pytest.mark.interpret
def test_symmetric_contraction_takes_all_powers_in_one_pass(device, monkeypatch):
    calls, kernel = [], functional._kernels.sphere_power

    def counted(x, basis, projection, weights, powers):
        calls.append(powers)
        return kernel(x, basis, projection, weights, powers)

    monkeypatch.setattr(functional._kernels, "sphere_power", counted)
    for irreps, passes in (("2x0e+2x1o+2x2e", 1), ("2x0e+2x1o+2x1e", 2)):  # a true signal; beside a pseudo-signal
        module = GauntSymmetricContraction(irreps, "2x0e+2x1o", 4, 3, backend="triton").to(device)
        exact = copy.deepcopy(module).double()
        exact.backend = "torch"
        x, y = torch.randn(5, 2, module.num_components, device=device), torch.arange(5, device=device) % 3
        calls.clear()
        assert_close_rel(module(x, y), exact(x.double(), y))
        assert calls == [(2, 3, 4)] * passes


# ---------------------------------------------------------------------------------------------------- bad input

GOOD = {"x": torch.zeros(2, 4, 9), "y": torch.zeros(2, 4, 4), "lmax1": 2, "lmax2": 1}

BAD = [
    ({"x": torch.zeros(2, 4, 8)}, ValueError, r"x must have \(lmax1 \+ 1\)² = 9 at dimension -1, got 8"),
    ({"y": torch.zeros(2, 4, 9)}, ValueError, r"y must have \(lmax2 \+ 1\)² = 4 at dimension -1, got 9"),
    ({"x": torch.zeros(())}, ValueError, "x must have dimensions .* got 0 dimensions"),
    ({"x": torch.zeros(2, 4, 9).long()}, TypeError, "x must have a real floating-point dtype, got torch.int64"),
    ({"y": torch.zeros(2, 4, 4).cfloat()}, TypeError, "y must have a real floating-point dtype, got torch.complex64"),
    ({"y": torch.zeros(2, 4, 4).double()}, TypeError, "y must have the dtype of x, torch.float32, got torch.float64"),
    ({"y": [[1.0]]}, TypeError, "y must be a tensor"),
    ({"y": torch.zeros(2, 4, 4, device="meta")}, ValueError, "y must be on the device of x"),
    ({"y": torch.zeros(3, 4, 4)}, ValueError, r"y must have .* that broadcast with those of x, \(2, 4\), got \(3, 4\)"),
    ({"lmax_out": 4}, ValueError, r"lmax_out must be at most lmax1 \+ lmax2 = 3, got 4"),
    ({"lmax_out": -1}, ValueError, "lmax_out must be at least 0, got -1"),
    ({"lmax1": -1}, ValueError, "lmax1 must be at least 0, got -1"),
    ({"lmax2": 1.0}, TypeError, "lmax2 must be an int, got 1.0"),
    ({"method": "fft"}, ValueError, "method must be one of .*'fourier'.*, got 'fft'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of .*, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        gaunt_tensor_product(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"correlation": 0}, ValueError, "correlation must be at least 1, got 0"),
        ({"correlation": 2.0}, TypeError, "correlation must be an int"),
        ({"lmax_out": 7}, ValueError, r"lmax_out must be at most correlation \* lmax = 6, got 7"),
        ({"x": torch.zeros(4, 8)}, ValueError, r"x must have \(lmax \+ 1\)² = 9"),
        ({"x": torch.zeros(4, 9).cfloat()}, TypeError, "x must have a real floating-point dtype"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_many_body_refuses(change, error, message):
    with pytest.raises(error, match=message):
        gaunt_many_body(**({"x": torch.zeros(4, 9), "lmax": 2, "correlation": 3, "lmax_out": 2} | change))
