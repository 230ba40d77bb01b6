"""A CNN by one-way filters: what is replaced, what is left and why, what the report counts."""

import pytest
import torch
from torch import nn

import torchlayers
from torchlayers.separable_conv import SeparableConfig, SeparableConv2d, SeparableConvTranspose2d, convert
from torchlayers.testing import assert_close_rel


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.ConvTranspose2d(16, 8, 4, 2, 1),
    ).double()


def test_what_is_replaced_and_what_is_left_with_the_reason():
    report = convert(cnn(), "seq", 0.25, example_input=torch.randn(1, 3, 12, 12).double())
    kinds = {row.name: row.new_type for row in report.rows}
    assert kinds == {
        "0": "SeparableConv2d",
        "2": "SeparableConv2d",
        "3": None,
        "4": None,
        "5": "SeparableConvTranspose2d",
    }
    reasons = {row.name: row.reason for row in report.skipped}
    assert "1×1" in reasons["3"] and "grouped (groups=4)" in reasons["4"]
    assert report.model(torch.randn(2, 3, 12, 12).double()).shape == (2, 8, 20, 20)
    row = report.rows[1]
    new = report.model[2]
    assert row.extra["MACs"] == f"{16 * 16 * 25 * 144:,} -> {new.macs(12, 12):,}"
    assert {"MACs", "ms"} <= set(row.extra) and "MACs" in str(report)
    assert sum(p.numel() for p in report.model.parameters()) == report.parameters_after < report.parameters_before


def test_decomposed_layers_keep_the_outputs_as_far_as_the_rank_allows():
    torch.manual_seed(0)
    low = SeparableConv2d(8, 8, 5, padding=2, rank=4).double()
    model = nn.Sequential(low.to_dense(), nn.ReLU(), nn.Conv2d(8, 8, 1).double())
    x = torch.randn(2, 8, 9, 9).double()
    expected = model(x)
    report = convert(model, "seq", 4, init="decomposed")
    assert type(model[0]) is SeparableConv2d and report.model is model
    assert_close_rel(model(x), expected, rtol=1e-11)
    fresh = convert(nn.Sequential(low.to_dense()), "seq", 4)
    assert (fresh.model(x) - low(x)).norm() > 0.1 * low(x).norm()


def test_layers_without_a_saving_are_left():
    report = convert(nn.Sequential(nn.Conv2d(4, 4, 3)), "seq", 1.0)
    assert not report.converted and "no saving: rank 12 against a break-even of 6" in report.skipped[0].reason
    report = convert(nn.Sequential(nn.Conv2d(4, 4, 3)), "seq", 50)
    assert "above its full rank, 12" in report.skipped[0].reason


def test_skip_takes_names_patterns_and_classes():
    for skip, left in ((["0"], "0"), (["*2"], "2"), ([nn.ConvTranspose2d], "5")):
        report = convert(cnn(), "seq", 0.25, skip=skip)
        assert left not in {row.name for row in report.converted}
        assert len(report.converted) == 2
    assert not convert(cnn(), skip=[nn.Sequential]).rows


def test_skip_refuses_what_fits_nothing():
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 16, 3))
    with pytest.raises(ValueError, match=r"skip must name modules of the model, got 'stme'.*did you mean 'stem'"):
        convert(model, skip=["stme"])
    with pytest.raises(ValueError, match=r"got 'blocks\.\*', which fits none"):
        convert(model, skip=["stem", "blocks.*"])
    with pytest.raises(TypeError, match="skip must hold names and module classes, got 3"):
        convert(model, skip=[3])
    assert type(model.stem) is nn.Conv2d
    assert not convert(model, skip="stem").converted  # one name need not stand in a list


def test_the_common_convert_does_the_same():
    model = cnn()
    report = torchlayers.convert(model, SeparableConfig("cp", 8, "fresh"))
    assert isinstance(model[2], SeparableConv2d) and model[2].format == "cp" and model[2].rank == 8
    assert isinstance(model[5], SeparableConvTranspose2d) and report.model is model
    assert model[2].weight_in.dtype == torch.float64


def test_bad_options():
    with pytest.raises(ValueError, match="format must be one of"):
        convert(cnn(), "svd")
    with pytest.raises(ValueError, match="init must be one of"):
        convert(cnn(), init="random")
    with pytest.raises(ValueError, match=r"rank must be a fraction .* got 1.5"):
        convert(cnn(), rank=1.5)
    with pytest.raises(TypeError, match="model must be"):
        convert("cnn")
