"""The reference operations against e3nn: its 3j symbols, its products, its S2 grids and its rotations."""

from __future__ import annotations

import math

import pytest
import torch

from torchlayers.gaunt.coefficients import bracket_scale, gaunt_scale, paths
from torchlayers.gaunt.irreps import e3nn_o3
from torchlayers.gaunt.reference import gaunt_convolution, gaunt_many_body, gaunt_tensor_product
from torchlayers.gaunt.sphere import sphere_quadrature, spherical_harmonics


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rotation(action):
    """A rotation matrix R and its action D on the coefficients up to ``lmax``."""
    matrix = torch.linalg.qr(randn(3, 3))[0]
    matrix = matrix * torch.linalg.det(matrix)
    return lambda lmax: (matrix, action(matrix, lmax))


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_product_is_the_sum_of_scaled_wigner_3j(antisymmetric):
    o3 = e3nn_o3()
    x, y = randn(2, 3, 16), randn(2, 3, 9, seed=1)
    expected = torch.zeros(2, 3, 25, dtype=torch.float64)
    scale = bracket_scale if antisymmetric else gaunt_scale
    for l1, l2, l3 in paths(3, 2, 4, antisymmetric=antisymmetric):
        first, second, third = (slice(ell * ell, (ell + 1) ** 2) for ell in (l1, l2, l3))
        block = scale(l1, l2, l3) * o3.wigner_3j(l1, l2, l3, dtype=torch.float64)
        expected[..., third] += torch.einsum("bci,bcj,ijk->bck", x[..., first], y[..., second], block)
    actual = gaunt_tensor_product(x, y, 3, 2, 4, antisymmetric=antisymmetric)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_product_equals_e3nns_s2_grid():
    o3 = e3nn_o3()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # e3nn builds its grids in the default dtype
    try:
        to_grid = o3.ToS2Grid(2, (10, 9), normalization="integral")
        from_grid = o3.FromS2Grid((10, 9), 4, normalization="integral")
    finally:
        torch.set_default_dtype(default)
    x, y = randn(3, 9), randn(3, 9, seed=1)
    expected = from_grid(to_grid(x) * to_grid(y))
    torch.testing.assert_close(gaunt_tensor_product(x, y, 2, 2), expected, rtol=0, atol=1e-12)


def test_product_is_the_product_of_functions():
    x, y = randn(9), randn(16, seed=1)
    points = torch.nn.functional.normalize(randn(20, 3, seed=2), dim=-1)
    z = gaunt_tensor_product(x, y, 2, 3)
    expected = (spherical_harmonics(2, points) @ x) * (spherical_harmonics(3, points) @ y)
    torch.testing.assert_close(spherical_harmonics(5, points) @ z, expected, rtol=0, atol=1e-12)


def test_bracket_of_vectors_is_their_cross_product():
    x, y = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    x[1:], y[1:] = randn(3), randn(3, seed=1)
    z = gaunt_tensor_product(x, y, 1, 1, antisymmetric=True)
    assert z.shape == (9,)
    expected = torch.zeros(9, dtype=torch.float64)
    expected[1:4] = math.sqrt(3 / (4 * math.pi)) * torch.linalg.cross(x[1:], y[1:])
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_product_is_equivariant(antisymmetric, rotation):
    lmax = 3
    x, y = randn(2, 16), randn(2, 16, seed=1)
    _, turn = rotation(2 * lmax)
    inner = turn[:16, :16]
    rotated = gaunt_tensor_product(x @ inner.T, y @ inner.T, lmax, lmax, antisymmetric=antisymmetric)
    expected = gaunt_tensor_product(x, y, lmax, lmax, antisymmetric=antisymmetric) @ turn.T
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-10)
    # Inversion: (-1)^l of every degree, and the bracket's result is a pseudo signal.
    parity = torch.tensor([(-1.0) ** ell for ell in range(7) for _ in range(2 * ell + 1)], dtype=torch.float64)
    inverted = gaunt_tensor_product(x * parity[:16], y * parity[:16], lmax, lmax, antisymmetric=antisymmetric)
    expected = gaunt_tensor_product(x, y, lmax, lmax, antisymmetric=antisymmetric) * parity
    torch.testing.assert_close(inverted, -expected if antisymmetric else expected, rtol=0, atol=1e-10)


def test_leading_dimensions_broadcast():
    x, y = randn(5, 1, 4), randn(3, 9, seed=1)
    z = gaunt_tensor_product(x, y, 1, 2, 2)
    assert z.shape == (5, 3, 9)
    torch.testing.assert_close(z[4, 2], gaunt_tensor_product(x[4, 0], y[2], 1, 2, 2))


@pytest.mark.parametrize("correlation", [1, 2, 3, 4])
def test_many_body_is_the_power_of_the_function(correlation):
    lmax, lmax_out = 2, 1
    x = randn(3, 9)
    points, weights = sphere_quadrature(correlation * lmax + lmax_out)
    power = (x @ spherical_harmonics(lmax, points).T) ** correlation
    expected = (power * weights) @ spherical_harmonics(lmax_out, points)
    torch.testing.assert_close(gaunt_many_body(x, lmax, correlation, lmax_out), expected, rtol=0, atol=1e-12)


def test_many_body_keeps_what_truncated_products_lose():
    x = randn(3, 9)
    truncated = gaunt_tensor_product(gaunt_tensor_product(x, x, 2, 2, 2), x, 2, 2, 2)
    assert (gaunt_many_body(x, 2, 3, 2) - truncated).abs().max() > 1e-2
    nested = gaunt_tensor_product(gaunt_tensor_product(x, x, 2, 2), x, 4, 2)
    torch.testing.assert_close(gaunt_many_body(x, 2, 3, 2), nested[..., :9], rtol=0, atol=1e-12)


def graph(nodes=4, edges=9):
    generator = torch.Generator().manual_seed(7)
    return randn(edges, 3, seed=3), torch.randint(nodes, (2, edges), generator=generator)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_convolution_is_a_product_with_e3nns_harmonics_of_the_edges(antisymmetric):
    o3 = e3nn_o3()
    lmax, lmax_filter, lmax_out = 2, 3, 4
    edge_vec, edge_index = graph()
    x, h = randn(4, 5, 9), randn(9, 5, 4, seed=1)
    harmonics = o3.spherical_harmonics([0, 1, 2, 3], edge_vec, True, normalization="integral")
    expected = torch.zeros(4, 5, 25, dtype=torch.float64)
    for edge, (source, target) in enumerate(edge_index.T.tolist()):
        weights = h[edge].repeat_interleave(torch.tensor([1, 3, 5, 7]), dim=-1)
        expected[target] += gaunt_tensor_product(
            x[source], weights * harmonics[edge], lmax, lmax_filter, lmax_out, antisymmetric=antisymmetric
        )
    degrees = {"lmax": lmax, "lmax_filter": lmax_filter, "lmax_out": lmax_out, "antisymmetric": antisymmetric}
    actual = gaunt_convolution(x, edge_vec, h, edge_index, **degrees)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    per_edge = gaunt_convolution(x[edge_index[0]], edge_vec, h, **degrees)
    assert per_edge.shape == (9, 5, 25)
    torch.testing.assert_close(torch.zeros_like(expected).index_add(0, edge_index[1], per_edge), actual)


def test_convolution_is_equivariant_and_ignores_edge_lengths(rotation):
    edge_vec, edge_index = graph()
    x, h = randn(4, 2, 9), randn(9, 2, 3, seed=1)
    matrix, turn = rotation(4)
    degrees = {"lmax": 2, "lmax_filter": 2}
    expected = gaunt_convolution(x, edge_vec, h, edge_index, **degrees) @ turn.T
    lengths = torch.rand(9, 1, dtype=torch.float64) + 0.5
    rotated = gaunt_convolution(x @ turn[:9, :9].T, lengths * edge_vec @ matrix.T, h, edge_index, **degrees)
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-10)


def test_edges_of_length_zero_are_finite_as_in_e3nn():
    o3 = e3nn_o3()
    edge_vec = torch.tensor(
        [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -2.0, 0.0]], dtype=torch.float64, requires_grad=True
    )
    x, h = randn(3, 2, 9), randn(3, 2, 3, seed=1)
    z = gaunt_convolution(x, edge_vec, h, lmax=2, lmax_filter=2)
    harmonics = o3.spherical_harmonics([0, 1, 2], edge_vec.detach(), True, normalization="integral")
    weighted = h.repeat_interleave(torch.tensor([1, 3, 5]), dim=-1) * harmonics[:, None]
    torch.testing.assert_close(z, gaunt_tensor_product(x, weighted, 2, 2), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(z.square().sum(), edge_vec)
    assert not gradient[0].any() and gradient[1:].isfinite().all() and gradient[1:].any(dim=-1).all()


def test_gradients():
    x, y = randn(2, 4).requires_grad_(), randn(2, 4, seed=1).requires_grad_()
    edge_vec, edge_index = graph(3, 4)
    edge_vec, h = edge_vec.requires_grad_(), randn(4, 1, 2, seed=2).requires_grad_()
    nodes = randn(3, 1, 4, seed=4).requires_grad_()
    for function, inputs in [
        (lambda a, b: gaunt_tensor_product(a, b, 1, 1), (x, y)),
        (lambda a, b: gaunt_tensor_product(a, b, 1, 1, 1, antisymmetric=True), (x, y)),
        (lambda a: gaunt_many_body(a, 1, 3, 1), (x,)),
        (lambda a, r, f: gaunt_convolution(a, r, f, edge_index, lmax=1, lmax_filter=1), (nodes, edge_vec, h)),
    ]:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
