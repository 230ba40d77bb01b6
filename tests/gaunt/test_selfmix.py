"""SelfMix: what it computes by e3nn's Clebsch–Gordan coefficients, equivariance, and that it starts as the identity."""

import math

import pytest
import torch

pytest.importorskip("e3nn")

from torchlayers.gaunt import SelfMix
from torchlayers.gaunt.irreps import e3nn_o3, split_degrees


@pytest.fixture
def float64():
    # e3nn makes its matrices in the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def trained(lmax=2, channels=3, **options):
    block = SelfMix(lmax, channels, dtype=torch.float64, **options)
    torch.nn.init.normal_(block.weight_out)
    return block


def test_it_starts_as_the_identity_and_learns():
    block = SelfMix(2, 3)
    x = torch.randn(4, 9, 3)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.weight_out.grad.abs().sum() > 0
    trained_block = trained()
    trained_block(x.double()).square().sum().backward()
    assert all(p.grad.abs().min() > 0 for p in trained_block.parameters())


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_it_is_the_sum_of_paths_of_clebsch_gordan(antisymmetric, float64):
    """Each path has the weight that the sphere gives it: spherical harmonics' products, by e3nn's wigner_3j."""
    o3, lmax, channels = e3nn_o3(), 2, 3
    block = trained(lmax, channels, antisymmetric=antisymmetric, eps=1e-30)
    x = torch.randn(5, 9, channels, dtype=torch.float64)
    norm = sum(x[:, l * l : (l + 1) ** 2].square().mean((1, 2)) for l in range(3)) / 3  # noqa: E741
    n = x / norm.sqrt()[:, None, None]
    rows = [slice(degree**2, (degree + 1) ** 2) for degree in range(3)]
    first, second = (
        torch.cat([n[:, rows[d]] @ w[d] for d in range(3)], dim=1) for w in (block.weight_first, block.weight_second)
    )
    total = torch.zeros(5, 9, channels, dtype=torch.float64)
    for c in range(3):
        kinds = []
        for odd in (0, 1) if antisymmetric else (0,):
            z, variance = 0, 0.0
            for a in range(3):
                for b in range(3):
                    if abs(a - b) <= c <= a + b and (a + b + c) % 2 == odd:
                        size = math.sqrt((2 * a + 1) * (2 * b + 1) * (2 * c + 1) / (4 * math.pi))
                        size *= _three_j_size(a, b, c, odd)
                        coefficients = size * o3.wigner_3j(a, b, c, dtype=torch.float64)
                        z = z + torch.einsum("ijk,nic,njc->nkc", coefficients, first[:, rows[a]], second[:, rows[b]])
                        variance += size**2 / (2 * c + 1)
            if variance:
                kinds.append(z / math.sqrt(variance))
        total[:, rows[c]] = sum(kinds) / math.sqrt(len(kinds))
    expected = x + torch.cat([total[:, rows[d]] @ block.weight_out[d] for d in range(3)], dim=1)
    assert torch.allclose(block(x), expected, rtol=0, atol=1e-11)


def _three_j_size(a, b, c, odd):
    from sympy.physics.wigner import wigner_3j

    value = abs(float(wigner_3j(a, b, c, 1, -1, 0) if odd else wigner_3j(a, b, c, 0, 0, 0)))
    return value * math.sqrt(a * (a + 1) * b * (b + 1)) if odd else value


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_it_is_equivariant(antisymmetric, float64):
    o3 = e3nn_o3()
    block = trained(3, 4, antisymmetric=antisymmetric)
    irreps = o3.Irreps("0e+1o+2e+3o")
    rotation = o3.rand_matrix(dtype=torch.float64)
    if not antisymmetric:
        rotation = -rotation
    turn = irreps.D_from_matrix(rotation)
    x = torch.randn(2, 6, 16, 4, dtype=torch.float64)
    assert torch.allclose(block(turn @ x), turn @ block(x), rtol=0, atol=1e-10)


def test_the_size_of_the_feature_does_not_change_the_block():
    block = trained()
    x = torch.randn(3, 9, 3, dtype=torch.float64)
    assert torch.allclose(block(100 * x) - 100 * x, block(x) - x, atol=1e-6)
    assert block(torch.zeros_like(x)).isfinite().all()


def test_components_of_the_product_have_variance_one():
    block = SelfMix(2, 32, antisymmetric=True)
    x = torch.randn(2000, 9, 32)
    first, second = (block._mix(w, block._normalized(x)).mT for w in (block.weight_first, block.weight_second))
    with torch.no_grad():
        z = block._product(first, second, False) + block._product(first, second, True)
    for part in split_degrees(z):
        assert part.var().item() == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("shape", [(9, 3), (0, 9, 3), (2, 1, 9, 3)])
def test_any_leading_dimensions(shape):
    block = trained()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = block(x)
    assert y.shape == shape
    y.sum().backward()
    if x.numel():
        assert torch.allclose(y.reshape(-1, 9, 3)[-1], block(x.reshape(-1, 9, 3)[-1]), atol=1e-12)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.randn(2, 8, 3), ValueError, r"\(lmax \+ 1\)² = 9"),
        (torch.randn(2, 9, 4), ValueError, "channels = 3"),
        (torch.randn(9), ValueError, "channels"),
        (torch.zeros(2, 9, 3, dtype=torch.int64), TypeError, "floating-point"),
        (torch.zeros(2, 9, 3, dtype=torch.complex64), TypeError, "floating-point"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x, error, words):
    with pytest.raises(error, match=words):
        trained()(x)
