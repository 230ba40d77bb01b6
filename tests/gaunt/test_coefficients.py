"""Coupling coefficients against e3nn's wigner_3j, sympy's 3j symbols and closed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from torchlayers.gaunt.coefficients import (
    bracket_coefficients,
    bracket_scale,
    clebsch_gordan,
    dense_coefficients,
    gaunt_coefficients,
    gaunt_scale,
    paths,
)
from torchlayers.gaunt.irreps import e3nn_o3
from torchlayers.gaunt.sphere import sphere_quadrature, spherical_harmonics


def slices(*degrees):
    return tuple(slice(ell * ell, (ell + 1) ** 2) for ell in degrees)


def test_every_path_up_to_six_equals_its_scaled_wigner_3j():
    o3 = e3nn_o3()
    for path in paths(6, 6, 6, antisymmetric="both"):
        expected = o3.wigner_3j(*path, dtype=torch.float64)
        odd = sum(path) % 2
        block, scale = (bracket_coefficients, bracket_scale) if odd else (gaunt_coefficients, gaunt_scale)
        torch.testing.assert_close(block(*path), scale(*path) * expected, rtol=1e-12, atol=1e-12 * scale(*path))
        torch.testing.assert_close(clebsch_gordan(*path), expected, rtol=0, atol=1e-12)
        # Entries that selection rules forbid are exact zeros.
        assert torch.equal(clebsch_gordan(*path) != 0, expected.abs() > 1e-9), path


def test_high_degrees_equal_wigner_3j():
    o3 = e3nn_o3()
    for path in [(12, 12, 12), (12, 12, 11), (10, 8, 17), (1, 20, 20), (1, 20, 21)]:
        expected = o3.wigner_3j(*path, dtype=torch.float64)
        torch.testing.assert_close(clebsch_gordan(*path), expected, rtol=0, atol=1e-11)


def test_scales_equal_sympys_3j_symbols():
    wigner = pytest.importorskip("sympy.physics.wigner")
    for path in [(0, 0, 0), (1, 1, 2), (2, 2, 2), (3, 4, 5), (8, 8, 8), (1, 1, 1), (2, 2, 3), (3, 3, 3), (8, 8, 7)]:
        size = math.sqrt(math.prod(2 * ell + 1 for ell in path) / (4 * math.pi))
        if sum(path) % 2:
            size *= math.sqrt(math.prod(ell * (ell + 1) for ell in path[:2]))
            symbol, scale, other = wigner.wigner_3j(*path, 1, -1, 0), bracket_scale, gaunt_scale
        else:
            symbol, scale, other = wigner.wigner_3j(*path, 0, 0, 0), gaunt_scale, bracket_scale
        assert scale(*path) == pytest.approx(size * abs(float(symbol)), rel=1e-14)
        assert other(*path) == 0


def test_closed_numbers():
    # Y_00 = 1 / sqrt(4π), and ∫ Y_10² Y_20 = 1 / sqrt(5π).
    torch.testing.assert_close(
        gaunt_coefficients(2, 2, 0)[..., 0], torch.eye(5, dtype=torch.float64) / math.sqrt(4 * math.pi)
    )
    assert gaunt_coefficients(1, 1, 2)[1, 1, 2].item() == pytest.approx(1 / math.sqrt(5 * math.pi), rel=1e-14)
    # {x, y} = z for coordinate functions: sqrt(3 / 4π) times the Levi-Civita symbol.
    bracket = bracket_coefficients(1, 1, 1)
    assert bracket[0, 1, 2].item() == pytest.approx(math.sqrt(3 / (4 * math.pi)), rel=1e-14)
    assert bracket[1, 0, 2].item() == pytest.approx(-math.sqrt(3 / (4 * math.pi)), rel=1e-14)
    assert (bracket != 0).sum() == 6


def test_blocks_that_vanish_are_zero():
    for block in (
        gaunt_coefficients(1, 1, 1),
        gaunt_coefficients(1, 1, 4),
        gaunt_coefficients(0, 2, 4),
        bracket_coefficients(1, 1, 2),
        bracket_coefficients(1, 1, 5),
        bracket_coefficients(0, 2, 2),
    ):
        assert block.dtype == torch.float64 and not block.any()
    assert gaunt_coefficients(1, 2, 4).shape == (3, 5, 9)
    assert gaunt_scale(1, 1, 4) == bracket_scale(1, 1, 5) == bracket_scale(0, 2, 2) == 0


def test_blocks_are_the_callers_own():
    gaunt_coefficients(1, 1, 2).zero_()
    assert gaunt_coefficients(1, 1, 2).any()


def test_blocks_are_plain_tensors_whatever_mode_they_are_built_in():
    path = (5, 3, 8)  # no other test builds this one
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"), torch.inference_mode():
        gaunt_coefficients(*path)
    block = gaunt_coefficients(*path)
    assert type(block) is torch.Tensor and block.device.type == "cpu" and not block.is_inference()
    assert block.norm().item() == pytest.approx(gaunt_scale(*path))


BLOCKS = [gaunt_coefficients, bracket_coefficients, clebsch_gordan, gaunt_scale, bracket_scale]


@pytest.mark.parametrize("function", BLOCKS)
def test_bad_degrees(function):
    with pytest.raises(ValueError, match="l2 must be at least 0, got -1"):
        function(1, -1, 1)
    with pytest.raises(TypeError, match="l3 must be an int"):
        function(1, 1, 2.0)


def test_degrees_that_do_not_couple_have_no_clebsch_gordan():
    with pytest.raises(ValueError, match=r"l3 must lie within \|l1 - l2\| = 1 and l1 \+ l2 = 3, got 4"):
        clebsch_gordan(1, 2, 4)


def test_paths_are_the_triples_that_couple():
    # The counts of e3nn's even and odd paths for L = 1 … 4.
    for lmax, even, odd in [(1, 4, 1), (2, 11, 4), (3, 23, 11), (4, 42, 23)]:
        assert len(paths(lmax, lmax, lmax)) == even
        assert len(paths(lmax, lmax, lmax, antisymmetric=True)) == odd
        both = paths(lmax, lmax, lmax, antisymmetric="both")
        assert len(both) == even + odd and both == sorted(both)
    o3 = e3nn_o3()
    products = {(2, 1, ir.l) for ir in o3.Irrep("2e") * o3.Irrep("1o")}
    assert {p for p in paths(2, 1, 3, antisymmetric="both") if p[:2] == (2, 1)} == products


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_dense_table_holds_every_block(antisymmetric):
    dense = dense_coefficients(2, 3, 4, antisymmetric=antisymmetric)
    assert dense.shape == (9, 16, 25)
    block = bracket_coefficients if antisymmetric else gaunt_coefficients
    for l1 in range(3):
        for l2 in range(4):
            for l3 in range(5):
                assert torch.equal(dense[slices(l1, l2, l3)], block(l1, l2, l3))


def test_dense_gaunt_table_is_the_integral_of_three_harmonics():
    points, weights = sphere_quadrature(9)
    y1, y2, y3 = (spherical_harmonics(lmax, points) for lmax in (2, 3, 4))
    expected = torch.einsum("g,gi,gj,gk->ijk", weights, y1, y2, y3)
    torch.testing.assert_close(dense_coefficients(2, 3, 4), expected, rtol=0, atol=1e-13)


def test_dense_bracket_table_is_the_integral_of_the_bracket():
    points, weights = sphere_quadrature(9)

    def gradients(lmax):
        return torch.func.vmap(torch.func.jacrev(lambda p: spherical_harmonics(lmax, p)))(points)

    cross = torch.linalg.cross(gradients(2)[:, :, None], gradients(3)[:, None])
    bracket = torch.einsum("ga,gija->gij", points, cross)
    expected = torch.einsum("g,gij,gk->ijk", weights, bracket, spherical_harmonics(4, points))
    torch.testing.assert_close(dense_coefficients(2, 3, 4, antisymmetric=True), expected, rtol=0, atol=1e-12)
