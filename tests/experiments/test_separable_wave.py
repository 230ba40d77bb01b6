"""The experiment separable_wave: its surrogates, metrics, runs and sweeps."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from torchlayers.data import wave
from torchlayers.data.wave import WaveDataset
from torchlayers.experiments import separable_wave
from torchlayers.training import ConfigError, execute, load_run
from torchlayers.training.compose import compose, parse
from torchlayers.training.sweep import named_sweep

np = pytest.importorskip("numpy", reason="numpy is not installed")
pytest.importorskip("skfem", reason="scikit-fem is not installed")

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("data.resolution=11", "data.snapshots=10", "data.trajectories=3", "data.val_trajectories=1"),
    *("data.test_trajectories=2", "data.rollout=4", "data.batch_size=4", "model.channels=6", "model.n_modes=6"),
    *("trainer.max_steps=6", "scheduler.warmup_steps=0", "data.cache=null"),
]
COSTS = {"test/step_ms", "test/predict_ms", "test/saved_mib"}


def configured(folder, *overrides):
    keys = ["trainer.device=cpu", "trainer.tensorboard=false", "trainer.log_every=1", "trainer.progress=false"]
    return compose(
        parse(["experiment=separable_wave", f"run_dir={folder}", *keys, *TINY, *overrides]), ROOT / "configs"
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def windows(split, trajectories, block, horizon):
    return WaveDataset(split, trajectories, resolution=11, snapshots=10, history=block + 1, horizon=horizon)


def model_of(**options):
    return separable_wave.Model(**({"channels": 6, "n_modes": 6} | options))


def surrogate(**options):
    model = model_of(**options)
    return separable_wave.Surrogate(separable_wave.build_network(model), model.block)


# ---- the surrogate


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x[:, :1])


@pytest.mark.parametrize("block", [1, 3])
def test_without_its_network_a_surrogate_mirrors_the_past(block):
    snapshots = torch.randn(2, block + 1, 5, 5)
    x = torch.cat([snapshots, torch.ones(2, 1, 5, 5)], 1)
    found = separable_wave.Surrogate(Nothing(), block)(x)
    assert found.shape == (2, block, 5, 5)
    for s in range(1, block + 1):
        torch.testing.assert_close(found[:, s - 1], 2 * snapshots[:, -1] - snapshots[:, -1 - s])


def test_a_kernel_of_the_scheme_itself_forecasts_without_error():
    # In a uniform medium one 3 x 3 convolution is a step of the solver: the task is within reach of the model.
    u0, _ = wave.random_trajectory("test", 0, 17)
    dt = 0.5 / 16
    u = wave.simulate(u0, 1.25, steps=6, dt=dt)
    ring = torch.full((3, 3), -1 / 3, dtype=torch.float64)
    ring[1, 1] = 8 / 3
    network = nn.Conv2d(3, 1, 3, padding=1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        network.weight.zero_()
        network.weight[0, 1] = -((1.25 * dt * 16) ** 2) * ring
    model = separable_wave.Surrogate(network, 1).double()
    x = torch.stack([*u[1:3], torch.full_like(u0, 1.25)])[None]
    found = model.rollout(x, 4)[0, :, 1:-1, 1:-1]
    # The walls are beyond a convolution with zeros around: their neighbourhood, a point a step, is left out.
    for step, forecast in enumerate(found):
        inside = slice(step, -step or None)
        torch.testing.assert_close(
            forecast[inside, inside], u[3 + step, 1:-1, 1:-1][inside, inside], rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("form", separable_wave.FORMATS)
def test_every_format_forecasts_and_differentiates(form, block):
    model = surrogate(format=form, block=block)
    x = torch.randn(2, block + 2, 11, 11)
    y = model(x)
    assert y.shape == (2, block, 11, 11)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert model.rollout(x, 2 * block + 1).shape == (2, 2 * block + 1, 11, 11)


def test_rollout_feeds_forecasts_back():
    model = surrogate(block=2)
    x = torch.randn(1, 4, 11, 11)
    speed = x[:, -1:]
    first = model(x)
    second = model(torch.cat([x[:, 2:3], first, speed], 1))
    torch.testing.assert_close(model.rollout(x, 4), torch.cat([first, second], 1))
    torch.testing.assert_close(model.rollout(x, 3), torch.cat([first, second], 1)[:, :3])


def test_separable_surrogates_have_the_weights_of_the_formulas():
    def count(**options):
        return sum(p.numel() for p in separable_wave.build_network(separable_wave.Model(**options)).parameters())

    assert count(format="dense") == 25 * (3 * 16 + 16 * 16 + 16) + 33
    # The last layer's rank is 4: at 5, its full rank, it would have more weights than the dense one.
    assert count(format="seq", rank=8) == 5 * (8 * (3 + 16) + 8 * (16 + 16) + 4 * (16 + 1)) + 33
    assert count(format="seq", rank=8) <= count(format="dense") / 3
    assert count(format="kernelwise", rank=1) == 10 * (3 * 16 + 16 * 16 + 16) + 33
    narrow = count(format="dense", channels=8)
    assert count(format="seq", rank=8) <= narrow <= 1.01 * count(format="seq", rank=8)


# ---- runs


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.format=dense", "trainer.precision=fp64"],
        ["model.format=seq", "trainer.accumulate=2"],
        ["model.format=tfno"],
        ["model.format=seq", "model.block=3", "model.kernel_size=3"],
    ],
)
def test_runs_measure_draw_and_load(overrides, tmp_path):
    config = configured(tmp_path / "run", *overrides)
    execute(config)
    last = lines(tmp_path / "run")[-1]
    assert last.keys() >= COSTS
    assert all(math.isfinite(last[name]) and last[name] > 0 for name in COSTS)
    from PIL import Image

    for name in ("waves.png", "rollout.png"):
        assert (tmp_path / "run" / "plots" / name).stat().st_size > 10_000
    block = config.model.block
    with Image.open(tmp_path / "run" / "plots" / "rollout.gif") as animation:
        assert animation.n_frames == 10 - (block + 1)
    model = load_run(tmp_path / "run")
    for split, prefix, trajectories in (("test", "", 2), ("val", "val_", 1)):
        x, y = (torch.stack(part).to(model.scale) for part in zip(*windows(split, trajectories, block, 4), strict=True))
        with torch.no_grad():
            found = model.rollout(x, 4).double().numpy()
        errors = np.linalg.norm(found - y.numpy(), axis=(2, 3)) / np.linalg.norm(y.numpy(), axis=(2, 3))
        assert errors[:, 0].mean() == pytest.approx(last[f"test/{prefix}one_step"], rel=1e-4)
        assert errors[:, 3].mean() == pytest.approx(last[f"test/{prefix}rollout"], rel=1e-4)


def test_units_are_those_of_the_training_set():
    config = separable_wave.SeparableWave()
    task = separable_wave.WaveTask(config)
    train = windows("train", 3, 1, 1)
    model = task.build_model()
    task.prepare(model, separable_wave.Data(train))
    x, y = (torch.stack(part) for part in zip(*train, strict=True))
    for channel, values in enumerate((x[:, 0], x[:, 1], x[:, 2])):
        assert model.mean[channel].item() == pytest.approx(values.double().mean().item(), abs=1e-6)
        assert model.spread[channel].item() == pytest.approx(values.double().std().item(), rel=1e-5)
    assert model.scale.item() == pytest.approx((y[:, 0] - 2 * x[:, 1] + x[:, 0]).double().std().item(), rel=1e-4)


def test_memory_is_what_the_layers_must_keep():
    config = separable_wave.SeparableWave()
    config.model.format = "dense"
    task = separable_wave.WaveTask(config)
    x, y = torch.randn(4, 3, 33, 33), torch.randn(4, 1, 33, 33)
    field = 4 * 33 * 33 * 4 / 2**20
    # The inputs of three convolutions (3, 16, 16 channels) and of two GELUs (16 each); a few single fields more.
    assert 67 * field <= task.costs(x, y)["saved_mib"] <= 75 * field


def test_a_resumed_run_repeats_the_unbroken_one(tmp_path):
    execute(configured(tmp_path / "whole", "checkpoint.every=3"))
    execute(configured(tmp_path / "cut", "checkpoint.every=3", "trainer.max_steps=3", "scheduler.steps=6"))
    config = configured(tmp_path / "whole", "checkpoint.every=3")
    config.resume, config.run_dir = str(tmp_path / "cut"), None
    execute(config)
    whole, resumed = ([line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "cut"))
    assert resumed == whole


def test_training_lowers_the_error_below_that_of_extrapolation(tmp_path):
    found = execute(configured(tmp_path / "run", "trainer.max_steps=200", "optimizer.lr=1e-2"))[1]
    y, x = (torch.stack(part) for part in zip(*((y, x) for x, y in windows("test", 2, 1, 4)), strict=True))
    extrapolated = 2 * x[:, 1] - x[:, 0]
    errors = (extrapolated - y[:, 0]).flatten(1).norm(dim=1) / y[:, 0].flatten(1).norm(dim=1)
    assert found["test/one_step"] < 0.7 * errors.mean().item()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.format=sepq"], "model.format must be one of .* did you mean 'seq'"),
        (["model.rank=0"], "model.rank must be at least 1, got 0"),
        (["model.kernel_size=4"], "model.kernel_size must be odd, got 4"),
        (["data.rollout=9"], "history \\+ horizon must be at most snapshots = 10"),
        (["data.rollout=0"], "data.rollout must be at least 1"),
    ],
)
def test_bad_keys_are_named_before_training(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        execute(configured(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["separable_wave", "separable_wave_data", "separable_wave_rates", "separable_wave_3d"])
def test_sweeps_name_valid_runs(name):
    sweep = named_sweep(parse([f"sweep={name}"]), ROOT / "configs")
    networks = {}
    for arm, overrides in sweep.arms.items():
        config = compose(parse([f"experiment={sweep.experiment}", *sweep.overrides, *overrides]), ROOT / "configs")
        networks[arm] = separable_wave.build_network(config.model)
    assert len(networks) >= 2
    if {"dense", "seq", "narrow"} <= networks.keys():
        dense, seq, narrow = (sum(p.numel() for p in networks[a].parameters()) for a in ("dense", "seq", "narrow"))
        assert seq <= dense / 3 and abs(seq / narrow - 1) < 0.1


@pytest.mark.slow
def test_a_third_of_the_weights_does_as_well(tmp_path):
    sweep = named_sweep(parse(["sweep=separable_wave"]), ROOT / "configs")
    errors, sizes = {}, {}
    for arm in ("dense", "seq", "narrow"):
        found = []
        for seed in sweep.seeds:
            keys = ["trainer.device=cpu", "trainer.tensorboard=false", "trainer.progress=false", f"seed={seed}"]
            given = [f"experiment={sweep.experiment}", *sweep.overrides, *sweep.arms[arm], *keys]
            run = f"run_dir={tmp_path / f'{arm}{seed}'}"
            found.append(execute(compose(parse([*given, run, f"data.cache={tmp_path / 'data'}"]), ROOT / "configs"))[1])
        errors[arm] = sum(m["test/one_step"] for m in found) / len(found)
        sizes[arm] = found[0]["parameters"]
    assert sizes["seq"] <= sizes["dense"] / 3 and sizes["seq"] <= sizes["narrow"]
    assert errors["seq"] <= 1.1 * errors["dense"]
    assert errors["seq"] < errors["narrow"]
