"""Precision of the spectral path on the CPU, where it is refused, its schedule, and the epilogue in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from torchlayers.testing import assert_close_rel
from torchlayers.tfno import TFNO, FNOBlocks, PrecisionSchedule, SpectralConv, spectral_conv
from torchlayers.tfno.reference import spectral_conv as definition


@pytest.mark.parametrize("precision", ["half", "mixed"])
def test_a_cpu_has_full_precision_only(precision):
    layer = SpectralConv(2, 2, (4, 4), fno_block_precision=precision)
    with pytest.raises(
        ValueError, match=rf"precision \(fno_block_precision\) must be 'full' on a CPU, got '{precision}'"
    ):
        layer(torch.zeros(1, 2, 8, 8))
    layer.fno_block_precision = "full"
    assert layer(torch.zeros(1, 2, 8, 8)).shape == (1, 2, 8, 8)


def test_bad_precision():
    layer = SpectralConv(2, 2, (4, 4), dtype=torch.float64)
    x = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    layer.fno_block_precision = "low"
    with pytest.raises(ValueError, match="precision must be one of"):
        layer(x)
    layer.fno_block_precision = "half"
    with pytest.raises(ValueError, match=r"precision must be 'full' for torch\.float64, got 'half'"):
        layer(x)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("grid", [(9,), (8, 7), (4, 5, 6)])
def test_skip_and_activation(grid, activation):
    modes = (4,) * len(grid)
    x = torch.randn(2, 2, *grid, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, *modes[:-1], 3, dtype=torch.complex128, requires_grad=True)
    skip = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    y = spectral_conv(x, w, skip=skip, activation=activation)
    expected = definition(x, w, modes) + skip
    expected = expected if activation is None else getattr(F, activation)(expected)
    assert_close_rel(y, expected)
    g = torch.randn_like(y)
    for ours, wanted in zip(*(torch.autograd.grad(z, (x, w, skip), g) for z in (y, expected)), strict=True):
        assert_close_rel(ours, wanted, rtol=1e-13)


def test_skip_of_complex_data():
    x = torch.randn(2, 2, 6, 5, dtype=torch.complex128)
    w = torch.randn(2, 2, 4, 3, dtype=torch.complex128)
    y = spectral_conv(x, w, complex_data=True, skip=x)
    assert_close_rel(y, definition(x, w, (4, 3), complex_data=True) + x)
    with pytest.raises(ValueError, match="activation must be None for complex data, got 'relu'"):
        spectral_conv(x, w, complex_data=True, activation="relu")


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "activation must be one of 'gelu', 'relu', None, got 'tanh'", {"activation": "tanh"}),
        (ValueError, r"skip must have the result's shape \(1, 2, 8, 8\)", {"skip": torch.zeros(1, 2, 8, 7)}),
        (TypeError, "skip must have a real floating-point dtype", {"skip": torch.zeros(1, 2, 8, 8) + 0j}),
        (TypeError, "skip must be a tensor or None", {"skip": 1.0}),
    ],
)  # fmt: skip
def test_refused(error, message, options):
    with pytest.raises(error, match=message):
        spectral_conv(torch.zeros(1, 2, 8, 8), torch.zeros(2, 2, 4, 3, dtype=torch.complex64), **options)


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("norm", [None, "group_norm"])
@pytest.mark.parametrize("fno_skip", ["linear", "identity", None])
def test_blocks_are_their_formula(fno_skip, norm, preactivation):
    """Whoever adds the skip and applies the activation, the layer is what its docstring says."""
    blocks = FNOBlocks(
        3, 3, (4, 4), n_layers=2, fno_skip=fno_skip, norm=norm, preactivation=preactivation, stabilizer="tanh"
    ).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for index in (0, 1):
        last = index == 1
        first, second = (lambda h: h, lambda h: h) if norm is None else blocks.norm[2 * index : 2 * index + 2]
        act = (lambda h: h) if last else F.gelu
        inner = first(F.gelu(x)) if preactivation else x
        s = 0 if fno_skip is None else blocks.fno_skips[index](inner)
        m = blocks.channel_mlp_skips[index](inner)
        h = blocks.convs[index](inner.tanh())
        if preactivation:
            expected = blocks.channel_mlp[index](second(act(h + s))) + m
        else:
            expected = act(second(blocks.channel_mlp[index](act(first(h) + s)) + m))
        assert_close_rel(blocks(x, index), expected)


def _model(**options):
    return TFNO((4, 4), 1, 1, 4, n_layers=2, stabilizer="tanh", **options)


def _precisions(model):
    return {conv.fno_block_precision for conv in model.fno_blocks.convs}


@pytest.mark.parametrize("spectral", ["half", "mixed"])
def test_schedule(spectral):
    model = _model()
    schedule = PrecisionSchedule(model, 8, dtype=torch.float16, spectral=spectral)
    found = []
    for _ in range(10):
        context = schedule.autocast("cuda" if torch.cuda.is_available() else "cpu")
        found.append((schedule.phase, _precisions(model), context._enabled, context.fast_dtype))
        schedule.step()
    rows = [("mixed", {spectral}, True)] * 2 + [("amp", {"full"}, True)] * 4 + [("full", {"full"}, False)] * 4
    assert found == [(*row, torch.float16) for row in rows]


def test_schedule_resumes():
    model = _model()
    schedule = PrecisionSchedule(model, 8)
    for _ in range(3):
        schedule.step()
    other = _model()
    resumed = PrecisionSchedule(other, 8)
    assert _precisions(other) == {"half"}
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.phase == "amp" and _precisions(other) == {"full"}


def test_a_schedule_with_no_first_phase_runs_on_a_cpu():
    model = _model(joint_factorization=True)
    schedule = PrecisionSchedule(model, 4, fractions=(0, 0.5, 0.5))
    with schedule.autocast("cpu"):
        y = model(torch.randn(1, 1, 8, 8))
    assert schedule.phase == "amp" and y.isfinite().all()
    with pytest.raises(ValueError, match="must be 'full' on a CPU, got 'half'"):
        PrecisionSchedule(model, 4)
        model(torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "fractions must be 3 numbers", {"fractions": (0.5, 0.6, -0.1)}),
        (ValueError, "fractions must be 3 numbers", {"fractions": (0.5, 0.5)}),
        (ValueError, "dtype must be bfloat16 or float16, got torch.float32", {"dtype": torch.float32}),
        (ValueError, "spectral must be one of", {"spectral": "full"}),
        (TypeError, "total_steps must be an int", {"total_steps": 2.5}),
        (ValueError, "model must have spectral convolutions, got a Linear", {"model": torch.nn.Linear(1, 1)}),
    ],
)
def test_bad_schedules(error, message, options):
    with pytest.raises(error, match=message):
        PrecisionSchedule(**{"model": _model(), "total_steps": 4} | options)
