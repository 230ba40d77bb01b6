"""What an orthogonal matrix does to signals, by harmonics that are not ours."""

import pytest
import torch

from torchlayers.gaunt.irreps import e3nn_o3


@pytest.fixture(scope="session")
def action():
    """``action(matrix, lmax)``: D with Y(R r) = D Y(r), float64, for a matrix R (3, 3); x @ D.T turns a signal x.

    From e3nn's harmonics at some points: its own matrices have 7 digits where float32 is the default dtype.
    """
    pytest.importorskip("e3nn")

    def find(matrix, lmax):
        points = torch.randn(3 * (lmax + 1) ** 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        before, after = (
            e3nn_o3().spherical_harmonics(list(range(lmax + 1)), p, True, normalization="integral")
            for p in (points, points @ matrix.T)
        )
        return torch.linalg.lstsq(before, after).solution.T

    return find
