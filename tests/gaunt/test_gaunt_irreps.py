"""Flat irreps and signals: order, layouts, parities, and what is refused."""

import copy
import math
import pickle
import sys

import pytest
import torch

from torchlayers.gaunt.irreps import (
    FlatIrreps,
    constants,
    e3nn_o3,
    join_degrees,
    split_degrees,
    spread_over_degrees,
)


def test_parts_lie_where_e3nn_has_them():
    flat = FlatIrreps("irreps", "2x0e+3x1o+1x1e+2x2e")
    x = torch.arange(2.0 * flat.dim).view(2, flat.dim)
    parts = flat.split(x)
    # A true signal has parity (-1)^l, so 1e is the pseudo-signal's.
    assert list(parts) == [(1, 0), (1, 1), (-1, 1), (1, 2)]
    for (mul, ir), place, part in zip(flat.irreps, flat.irreps.slices(), parts.values(), strict=True):
        assert torch.equal(part, x[:, place].view(2, mul, ir.dim))
    assert flat.degrees(1) == (0, 1, 2) and flat.degrees(-1) == (1,) and flat.signs == (1, -1)


@pytest.mark.parametrize("layout", ["mul_ir", "ir_mul"])
def test_join_undoes_split(layout):
    flat = FlatIrreps("irreps", "2x0e+3x1o+4x3e", layout)
    x = torch.randn(2, 5, flat.dim)
    assert torch.equal(flat.join(flat.split(x)), x)


def test_ir_mul_has_the_components_first():
    flat = FlatIrreps("irreps", "3x1o", "ir_mul")
    x = torch.randn(4, 9)
    assert torch.equal(flat.split(x)[1, 1], x.view(4, 3, 3).mT)


def test_signals_have_zeros_where_degrees_are_missing():
    vector, cubic = torch.randn(2, 3), torch.randn(2, 7)
    signal = join_degrees({1: vector, 3: cubic}, 3)
    zero, first, second, third = split_degrees(signal)
    assert torch.equal(first, vector) and torch.equal(third, cubic)
    assert signal.shape == (2, 16) and not zero.any() and not second.any()


def test_components_as_mace_keeps_them():
    flat = FlatIrreps("irreps", "2x0e+2x0o+2x2e")
    x = torch.randn(5, 2, 7)
    parts = flat.split_components(x)
    assert torch.equal(parts[-1, 0], x[..., 1:2]) and torch.equal(parts[1, 2], x[..., 2:])


def test_spread_repeats_over_components():
    weight = torch.tensor([[2.0, 3.0, 5.0]])
    assert spread_over_degrees(weight, (0, 1, 2)).tolist() == [[2, 3, 3, 3, 5, 5, 5, 5, 5]]
    zero, _, second = split_degrees(spread_over_degrees(weight[:, :2], (0, 2)))
    assert zero.tolist() == [[2]] and second.tolist() == [[3] * 5]


def test_constants_are_exact():
    values = [math.pi, -1 / 3, 0.0, 1e-300]
    assert constants(values, torch.zeros(1, dtype=torch.float64)).tolist() == values
    assert constants(values, torch.zeros(1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("irreps", "message"),
    [
        ("2x1o+2x0e", "sorted by degree"),
        ("2x0e+2x0e", "each irrep once"),
        ("", "at least one"),
        ("0x0e", "at least one"),
        ("scalars", "must be irreps"),
        (3.5, "must be irreps"),
    ],
)
def test_irreps_that_are_refused(irreps, message):
    with pytest.raises(ValueError, match=f"irreps_in1.*{message}"):
        FlatIrreps("irreps_in1", irreps)


def test_uneven_multiplicities_are_named():
    flat = FlatIrreps("irreps_in2", "2x0e+3x1o")
    with pytest.raises(ValueError, match=r"irreps_in2 must have equal multiplicities.*2x0e\+3x1o"):
        flat.channels()
    with pytest.raises(ValueError, match="irreps_in2 must have multiplicity 4 throughout, as said"):
        flat.channels(4, ", as said")


def test_copies_and_pickles():
    flat = FlatIrreps("irreps", "2x0e+3x1o", "ir_mul")
    for other in (copy.deepcopy(flat), pickle.loads(pickle.dumps(flat))):
        assert (other.irreps, other.muls, other.layout) == (flat.irreps, flat.muls, flat.layout)


def test_without_e3nn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "e3nn", None)
    with pytest.raises(ImportError, match=r"\[gaunt\]"):
        e3nn_o3()
