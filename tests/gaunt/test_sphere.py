"""Harmonics, quadratures and the half-sphere tables against e3nn, closed forms and integrals."""

from __future__ import annotations

import math

import pytest
import torch

from torchlayers._tables import table
from torchlayers.gaunt import sphere
from torchlayers.gaunt.irreps import e3nn_o3
from torchlayers.gaunt.sphere import (
    even_degrees,
    gauss_legendre,
    grid_size,
    half_sphere,
    odd_degrees,
    sphere_quadrature,
    spherical_harmonics,
)

# Points of a half sphere for the product of three signals of degree L, L = 1 … 6 and 8, with scipy and without.
LEBEDEV_SIZES = {3: 3, 6: 13, 9: 19, 12: 43, 15: 43, 18: 73, 24: 151}


@pytest.fixture(params=["lebedev", "gauss_legendre"])
def half_rule(request, monkeypatch):
    """Both rules that a half sphere is made of."""
    if request.param == "lebedev" and not sphere._HAS_LEBEDEV:
        pytest.skip("scipy >= 1.15 is not installed")
    monkeypatch.setattr(sphere, "_HAS_LEBEDEV", request.param == "lebedev")
    return request.param


def directions(count: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    axes = torch.eye(3, dtype=torch.float64)
    return torch.cat((torch.nn.functional.normalize(x, dim=-1), axes, -axes))


def constant_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Error of the integrals of all harmonics: sqrt(4π) for the constant and 0 for the others."""
    integrals = weights @ values
    integrals[0] -= math.sqrt(4 * math.pi)
    return integrals.abs().max()


@pytest.mark.parametrize("lmax", [0, 1, 2, 5, 12])
def test_harmonics_equal_e3nn(lmax):
    points = directions(40)
    expected = e3nn_o3().spherical_harmonics(list(range(lmax + 1)), points, False, normalization="integral")
    torch.testing.assert_close(spherical_harmonics(lmax, points), expected, rtol=0, atol=2e-14)


def test_other_vectors_give_solid_harmonics_as_in_e3nn():
    points = directions(20) * torch.linspace(0.1, 2.0, 26, dtype=torch.float64)[:, None]
    expected = e3nn_o3().spherical_harmonics([0, 1, 2, 3, 4], points, False, normalization="integral")
    torch.testing.assert_close(spherical_harmonics(4, points), expected, rtol=1e-13, atol=1e-13)


def test_harmonics_beyond_e3nn_equal_the_textbook_formula():
    special = pytest.importorskip("scipy.special")
    lmax, points = 30, directions(20)
    x, y, z = points.unbind(-1)
    polar, azimuth = torch.arccos(y.clamp(-1, 1)), torch.atan2(x, z)
    actual = spherical_harmonics(lmax, points)
    for degree, order in [(13, 0), (13, 13), (17, 5), (30, 1), (30, 12), (30, 30)]:
        value = torch.from_numpy(special.sph_harm_y(degree, order, polar.numpy(), azimuth.numpy()))
        sign = (-1) ** order * (math.sqrt(2) if order else 1)  # no Condon–Shortley phase; real combination
        torch.testing.assert_close(actual[:, degree**2 + degree + order], sign * value.real, rtol=0, atol=1e-12)
        if order:
            torch.testing.assert_close(actual[:, degree**2 + degree - order], sign * value.imag, rtol=0, atol=1e-12)


def test_harmonics_of_degree_twenty_are_orthonormal():
    points, weights = sphere_quadrature(40)
    harmonics = spherical_harmonics(20, points)
    gram = harmonics.T @ (weights[:, None] * harmonics)
    torch.testing.assert_close(gram, torch.eye(441, dtype=torch.float64), rtol=0, atol=1e-13)


def test_harmonics_are_differentiable_twice_at_the_poles_and_at_zero():
    points = torch.cat((directions(2), torch.zeros(1, 3, dtype=torch.float64))).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: spherical_harmonics(3, p), points)
    assert torch.autograd.gradgradcheck(lambda p: spherical_harmonics(3, p), points)


def test_harmonics_keep_the_dtype_and_leading_dimensions():
    points = directions(6).view(3, 4, 3).float()
    harmonics = spherical_harmonics(8, points)
    assert harmonics.shape == (3, 4, 81) and harmonics.dtype == torch.float32
    torch.testing.assert_close(harmonics.double(), spherical_harmonics(8, points.double()), rtol=0, atol=3e-6)
    assert spherical_harmonics(2, points[:0]).shape == (0, 4, 9)


def test_harmonics_compile_to_one_graph():
    points = directions(5)
    compiled = torch.compile(lambda p: spherical_harmonics(3, p), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(points), spherical_harmonics(3, points))


@pytest.mark.parametrize(
    ("lmax", "points", "error", "message"),
    [
        (-1, torch.zeros(2, 3), ValueError, "lmax must be at least 0"),
        (1.0, torch.zeros(2, 3), TypeError, "lmax must be an int"),
        (1, torch.zeros(2, 4), ValueError, r"points must have shape \(..., 3\)"),
        (1, torch.tensor(1.0), ValueError, r"points must have shape \(..., 3\)"),
        (1, torch.zeros(2, 3, dtype=torch.long), TypeError, "points must have a real"),
        (1, [0.0, 1.0, 0.0], TypeError, "points must be a tensor"),
    ],
)
def test_bad_input_to_the_harmonics(lmax, points, error, message):
    with pytest.raises(error, match=message):
        spherical_harmonics(lmax, points)


def test_component_indices_split_by_degree():
    assert even_degrees(2) == (0, 4, 5, 6, 7, 8)
    assert odd_degrees(3) == (1, 2, 3, 9, 10, 11, 12, 13, 14, 15)
    assert odd_degrees(0) == ()


@pytest.mark.parametrize("nodes", [1, 2, 7, 40, 100])
def test_gauss_legendre_equals_numpys(nodes):
    numpy = pytest.importorskip("numpy")
    expected = numpy.polynomial.legendre.leggauss(nodes)
    for actual, reference in zip(gauss_legendre(nodes), expected, strict=True):
        torch.testing.assert_close(actual, torch.from_numpy(reference), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["gauss_legendre", "lebedev"])
@pytest.mark.parametrize("degree", [0, 1, 2, 5, 9, 12, 13, 20, 25])
def test_quadratures_are_exact_up_to_their_degree(kind, degree):
    if kind == "lebedev":
        pytest.importorskip("scipy", minversion="1.15")
    points, weights = sphere_quadrature(degree, kind)
    assert points.dtype == weights.dtype == torch.float64 and points.shape == (*weights.shape, 3)
    assert weights.min() > 0
    torch.testing.assert_close(points.norm(dim=-1), torch.ones_like(weights), rtol=0, atol=1e-14)
    assert constant_mean(spherical_harmonics(degree, points), weights) < 1e-13


def test_gauss_legendre_grids_have_the_fewest_rings_and_azimuths():
    points, weights = sphere_quadrature(9)
    assert weights.shape == (5 * 10,)
    # One degree more is wrong by far, not by rounding.
    assert constant_mean(spherical_harmonics(10, points), weights) > 0.1


def test_bad_input_to_the_quadrature():
    with pytest.raises(ValueError, match="degree must be at least 0"):
        sphere_quadrature(-1)
    with pytest.raises(TypeError, match="degree must be an int"):
        sphere_quadrature(2.5)
    with pytest.raises(ValueError, match="did you mean 'lebedev'"):
        sphere_quadrature(3, "lebedef")
    with pytest.raises(ValueError, match="degree must be at most 131"):
        sphere_quadrature(132, "lebedev")


def test_harmonics_on_the_grid_of_e3nn():
    """ToS2Grid samples a signal at e3nn's own angles, FromS2Grid projects it back."""
    o3 = e3nn_o3()
    grid = o3.ToS2Grid(3, (8, 9), normalization="integral")
    back = o3.FromS2Grid((8, 9), 3, normalization="integral")
    signal = torch.randn(16, generator=torch.Generator().manual_seed(1))
    sampled = spherical_harmonics(3, grid.grid) @ signal
    torch.testing.assert_close(sampled, grid(signal), rtol=0, atol=1e-5)
    torch.testing.assert_close(back(sampled), signal, rtol=0, atol=1e-5)


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 6, 9, 12, 13, 18, 24])
def test_half_spheres_integrate_even_parts_and_mirror_into_full_rules(half_rule, degree):
    points, weights = half_sphere(degree)
    assert weights.shape == (grid_size(degree),) and weights.min() > 0
    if half_rule == "lebedev" and degree in LEBEDEV_SIZES:
        assert grid_size(degree) == LEBEDEV_SIZES[degree]
    if degree > 1:
        assert 2 * grid_size(degree) <= len(sphere_quadrature(degree)[1]) + 2
    even = list(even_degrees(degree))
    assert constant_mean(spherical_harmonics(degree, points)[:, even], weights) < 1e-13
    both = torch.cat((points, -points))
    assert torch.pdist(both).min() > 1e-3  # no point, and no antipode, twice
    assert constant_mean(spherical_harmonics(degree, both), torch.cat((weights, weights)) / 2) < 1e-13


def test_half_sphere_of_gauss_legendre_with_one_node_too_few_fails(monkeypatch):
    monkeypatch.setattr(sphere, "_HAS_LEBEDEV", False)
    points, weights = half_sphere(8)
    even = list(even_degrees(10))
    assert constant_mean(spherical_harmonics(10, points)[:, even], weights) > 0.1


def test_large_degrees_fall_back_to_gauss_legendre():
    points, weights = half_sphere(140)
    assert weights.shape == (grid_size(140),)
    # ∫ (a·r)^140 = 4π / 141 for every unit vector a.
    moments = weights @ (points @ directions(20).T) ** 140
    torch.testing.assert_close(moments, torch.full_like(moments, 4 * math.pi / 141), rtol=1e-11, atol=0)


def test_parity_split_on_the_half_sphere_projects_a_product(half_rule):
    lmax1, lmax2, lmax_out = 3, 2, 4
    degree = lmax1 + lmax2 + lmax_out
    x, y = torch.randn(16, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    points, weights = sphere_quadrature(degree)
    full = (spherical_harmonics(lmax1, points) @ x) * (spherical_harmonics(lmax2, points) @ y) * weights
    expected = full @ spherical_harmonics(lmax_out, points)

    points, weights = half_sphere(degree)
    b1, b2, z = (spherical_harmonics(lmax, points) for lmax in (lmax1, lmax2, lmax_out))
    (e1, o1), (e2, o2) = (
        [b[:, list(part(lmax))] @ signal[list(part(lmax))] for part in (even_degrees, odd_degrees)]
        for b, signal, lmax in ((b1, x, lmax1), (b2, y, lmax2))
    )
    z = z * weights[:, None]
    actual = torch.empty(25, dtype=torch.float64)
    even, odd = list(even_degrees(lmax_out)), list(odd_degrees(lmax_out))
    actual[even] = z[:, even].T @ (e1 * e2 + o1 * o2)
    actual[odd] = z[:, odd].T @ (e1 * o2 + o1 * e2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_tangent_tables_are_the_rotation_derivatives_in_the_frame():
    lmax, degree = 4, 7
    points = table("gaunt_points", degree)
    first, second = table("gaunt_frame", degree)
    for e in (first, second):
        torch.testing.assert_close((e * points).sum(-1), torch.zeros(len(points), dtype=torch.float64))
        torch.testing.assert_close(e.norm(dim=-1), torch.ones(len(points), dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.cross(first, second), points)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda p: spherical_harmonics(lmax, p)))(points)
    momentum = torch.linalg.cross(points[:, None].expand_as(jacobian), jacobian)  # r × ∇Y
    expected = torch.stack([torch.einsum("ga,gka->gk", e, momentum) for e in (first, second)])
    torch.testing.assert_close(table("gaunt_tangent", lmax, degree), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gaunt_harmonics", "gaunt_tangent", "gaunt_points", "gaunt_weights", "gaunt_frame"])
def test_tables_are_read_under_a_compiler(name):
    args = (2, 6) if name in ("gaunt_harmonics", "gaunt_tangent") else (6,)
    compiled = torch.compile(lambda x: x * table(name, *args).sum(), fullgraph=True, backend="aot_eager")
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(compiled(one), table(name, *args).sum())
