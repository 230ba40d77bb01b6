"""The experiments maestro_digits, maestro_theory and maestro_cifar: data, forms, runs, resumes, oracles."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torchlayers.experiments import maestro_cifar, maestro_digits, maestro_theory
from torchlayers.maestro.ordered import low_rank_layers
from torchlayers.training import ConfigError, execute, load_run
from torchlayers.training.compose import compose, parse
from torchlayers.training.sweep import named_sweep

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "maestro_digits": ["model.hidden=[16,12]", "trainer.max_steps=8", "data.test_samples=150"],
    "maestro_cifar": [
        *("data.synthetic=20", "data.batch_size=8", "model.width=4", "model.blocks=[1,1]", "trainer.max_steps=3"),
        *("trainer.precision=fp32", "ranks.cuts=[0.5]"),
    ],
    "maestro_theory": ["steps=40", "points=3"],
}


def configured(experiment, folder, *overrides):
    keys = ["trainer.device=cpu", "trainer.tensorboard=false", "trainer.log_every=1", "trainer.progress=false"]
    return compose(
        parse([f"experiment={experiment}", f"run_dir={folder}", *keys, *TINY[experiment], *overrides]), ROOT / "configs"
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- data


@pytest.fixture(scope="module")
def _sklearn():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.usefixtures("_sklearn")
def test_digits_are_scikit_learns_standardised_by_the_training_images():
    from sklearn.datasets import load_digits

    train, test = maestro_digits.digits(397, seed=0)
    assert len(train) == 1400
    x, y = train.tensors
    assert x.mean(0).abs().max() < 1e-6
    assert x.square().mean().item() == pytest.approx(1, rel=1e-5)
    # Every image is in one of the two: the pixels that always were 0 are constant, and classes come as often.
    found = load_digits()
    assert torch.equal(
        torch.cat([y, test.tensors[1]]).bincount(), torch.from_numpy(found.target).bincount(minlength=10)
    )
    dead = torch.from_numpy(found.data).amax(0) == 0
    assert dead.any()
    assert torch.cat([x, test.tensors[0]])[:, dead].abs().max() == 0
    assert not torch.equal(maestro_digits.digits(397, seed=1)[0].tensors[1], y)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn.datasets is needed here .*'\.\[data\]'"):
        maestro_digits.digits(397, seed=0)


def test_cifar_reads_the_binary_version(tmp_path):
    images = torch.randint(256, (5, 4, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (5, 4), dtype=torch.uint8)
    for name, x, y in zip(maestro_cifar.TRAIN, images, labels, strict=True):
        (tmp_path / name).write_bytes(bytes(torch.cat([y[:, None], x.flatten(1)], 1).flatten().tolist()))
    found = maestro_cifar.read(tmp_path, maestro_cifar.TRAIN)
    assert torch.equal(found.tensors[0], images.flatten(0, 1))
    assert torch.equal(found.tensors[1], labels.flatten().long())
    with pytest.raises(ValueError, match=r"got no file .*test_batch\.bin"):
        maestro_cifar.read(tmp_path, maestro_cifar.TEST)
    (tmp_path / "test_batch.bin").write_bytes(b"\x00" * 3072)
    with pytest.raises(ValueError, match="records of 3073 bytes, got 3072 bytes"):
        maestro_cifar.read(tmp_path, maestro_cifar.TEST)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" * 3073)
    with pytest.raises(ValueError, match="classes from 0 to 9, got 10"):
        maestro_cifar.read(tmp_path, maestro_cifar.TEST)


def test_augmented_images_are_shifted_and_reflected_windows_of_the_padded_ones():
    x = torch.rand(6, 3, 10, 10)
    found = maestro_cifar.augmented(x)
    for image, padded in zip(found, F.pad(x, (4, 4, 4, 4)), strict=True):
        windows = [padded[:, i : i + 10, j : j + 10] for i in range(9) for j in range(9)]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(2)) for w in windows)
    assert len({round(float(image.sum()), 3) for image in maestro_cifar.augmented(x[:1].expand(50, -1, -1, -1))}) > 20


# ---- models


def test_forms_start_as_the_same_function_with_the_parameters_of_two_factors():
    models = {}
    for form in ("dense", "ordered"):
        config = maestro_digits.MaestroDigits()
        config.ranks.form = form
        torch.manual_seed(0)
        models[form] = maestro_digits.DigitsTask(config).build_model()
    x = torch.randn(7, 64)
    torch.testing.assert_close(models["ordered"](x), models["dense"](x), rtol=1e-4, atol=1e-5)
    counts = {form: sum(p.numel() for p in model.parameters()) for form, model in models.items()}
    head = 128 * 10 + 10
    assert counts["dense"] == 64 * 128 + 128 + 128 * 128 + 128 + head
    assert counts["ordered"] == 64 * (64 + 128) + 128 + 128 * (128 + 128) + 128 + head
    config = maestro_digits.MaestroDigits()
    config.ranks.form, config.ranks.max_rank = "low_rank", 0.25
    fixed = maestro_digits.DigitsTask(config).build_model()
    assert [layer.max_rank for layer in low_rank_layers(fixed).values()] == [16, 32]


def test_resnet_18_has_the_known_size():
    network = maestro_cifar.ResNet(64, [2, 2, 2, 2])
    # He et al.'s ResNet-18 with a 3 × 3 stem and 10 classes.
    assert sum(p.numel() for p in network.parameters()) == 11_173_962
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    model = maestro_cifar.CifarTask(maestro_cifar.MaestroCifar()).build_model()
    assert len(low_rank_layers(model)) == 19
    assert not any("stem" in name or "head" in name for name in low_rank_layers(model))


# ---- runs


@pytest.mark.usefixtures("_sklearn")
@pytest.mark.parametrize(
    "overrides",
    [
        ["ranks.form=dense"],
        ["ranks.form=low_rank", "ranks.max_rank=0.5"],
        ["ranks.mode=full+sampled", "trainer.precision=fp64", "trainer.accumulate=2"],
        ["ranks.mode=split", "ranks.layer_prob=independent", "ranks.lasso=1e-2", "ranks.shrink_every=2"],
    ],
)
def test_digits_train_draw_and_load(overrides, tmp_path):
    config = configured("maestro_digits", tmp_path / "run", *overrides)
    execute(config)
    found = lines(tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]
    dense = "ranks.form=dense" in overrides
    cuts = {f"test/{kind}_{cut}" for kind in ("cut", "svd") for cut in (0.25, 0.125) if not (dense and kind == "cut")}
    assert cuts <= found[-1].keys()
    assert ("test/cut_0.25" in found[-1]) != dense
    for name in ("cuts.png", "frontier.png"):
        assert (tmp_path / "run" / "plots" / name).stat().st_size > 1000
    model = load_run(tmp_path / "run")
    assert model.micro_batches.item() == 8 * config.trainer.accumulate
    x, y = maestro_digits.digits(150, 0)[1].tensors
    accuracy = (model(x.to(next(model.parameters()).dtype)).argmax(1) == y).double().mean().item()
    assert accuracy == pytest.approx(found[-1]["test/accuracy"], abs=1e-6)


@pytest.mark.usefixtures("_sklearn")
def test_cuts_are_the_prefixes_and_the_truncated_products(tmp_path):
    config = configured("maestro_digits", tmp_path / "run", "ranks.cuts=[0.3]")
    execute(config)
    model = load_run(tmp_path / "run")
    x, y = maestro_digits.digits(150, 0)[1].tensors
    first, second, head = model.network[0], model.network[2], model.network[4]
    ranks = (math.ceil(0.3 * 16), math.ceil(0.3 * 12))

    def accuracy(weights):
        h = F.relu(F.linear(x, weights[0], first.bias))
        logits = head(F.relu(F.linear(h, weights[1], second.bias)))
        return (logits.argmax(1) == y).double().mean().item()

    prefixes, truncated = [], []
    for layer, b in zip((first, second), ranks, strict=True):
        prefixes.append(layer.weight_out[:, :b] @ layer.weight_in[:b])
        u, s, vt = torch.linalg.svd(layer.weight_out @ layer.weight_in, full_matrices=False)
        truncated.append(u[:, :b] * s[:b] @ vt[:b])
    last = lines(tmp_path / "run")[-1]
    # Rounding may move an image or two across a border.
    assert accuracy(prefixes) == pytest.approx(last["test/cut_0.3"], abs=2 / 150)
    assert accuracy(truncated) == pytest.approx(last["test/svd_0.3"], abs=2 / 150)


@pytest.mark.usefixtures("_sklearn")
def test_a_resumed_run_repeats_its_draws_and_keeps_its_ranks(tmp_path):
    keys = ["ranks.lasso=0.1", "ranks.threshold=0.3", "ranks.shrink_every=2", "checkpoint.every=4"]
    execute(configured("maestro_digits", tmp_path / "whole", *keys))
    execute(configured("maestro_digits", tmp_path / "cut", *keys, "trainer.max_steps=4", "scheduler.steps=8"))
    config = configured("maestro_digits", tmp_path / "whole", *keys)
    config.resume, config.run_dir = str(tmp_path / "cut"), None
    execute(config)
    whole, resumed = ([line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "cut"))
    assert resumed == whole
    models = [load_run(tmp_path / name) for name in ("whole", "cut")]
    ranks = [[layer.rank for layer in low_rank_layers(model).values()] for model in models]
    assert ranks[0] == ranks[1]
    assert ranks[0] != [16, 12]


@pytest.mark.parametrize("form", ["dense", "ordered"])
def test_cifar_trains_on_noise_and_recalibrates(form, tmp_path):
    execute(configured("maestro_cifar", tmp_path / "run", f"ranks.form={form}"))
    last = lines(tmp_path / "run")[-1]
    assert all(0 <= last[name] <= 1 for name in ("test/accuracy", "test/svd_0.5"))
    assert (tmp_path / "run" / "plots" / "cuts.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.usefixtures("_sklearn")
def test_ordered_dropout_makes_prefixes_that_hold(tmp_path):
    keys = ["experiment=maestro_digits", "trainer.device=cpu", "trainer.tensorboard=false", "trainer.progress=false"]
    found = {}
    for form in ("ordered", "low_rank"):
        folder = tmp_path / form
        execute(compose(parse([*keys, f"run_dir={folder}", f"ranks.form={form}"]), ROOT / "configs"))
        found[form] = lines(folder)[-1]
    assert found["ordered"]["test/cut_0.25"] >= 0.94 > 0.92 > found["low_rank"]["test/cut_0.25"]
    assert found["ordered"]["test/cut_0.125"] >= 0.9 > 0.75 > found["low_rank"]["test/cut_0.125"]


# ---- theory


def test_best_maps_are_truncated_svd_and_principal_components():
    config = maestro_theory.MaestroTheory()
    made = maestro_theory.problems(config, torch.device("cpu"))
    a = made["svd"].target
    u, s, vt = torch.linalg.svd(a)
    assert s.tolist() == pytest.approx(config.spectrum)
    values, vectors = torch.linalg.eigh(made["pca"].root @ made["pca"].root)
    assert values.flip(0).tolist() == pytest.approx(config.variances)
    for b in range(1, 7):
        torch.testing.assert_close(made["svd"].best[b - 1], u[:, :b] * s[:b] @ vt[:b])
        leading = vectors[:, -b:]
        torch.testing.assert_close(made["pca"].best[b - 1], leading @ leading.T)


def test_no_map_of_a_rank_beats_the_reduced_rank_regression():
    rrr = maestro_theory.problems(maestro_theory.MaestroTheory(), torch.device("cpu"))["rrr"]
    x = rrr.root.numpy()
    np = pytest.importorskip("numpy")
    wanted = rrr.target.numpy() @ x
    singular = np.linalg.svd(wanted, compute_uv=False)
    for b, best in enumerate(rrr.best, 1):
        # Eckart and Young: no matrix of rank b is nearer to A C^½ than its own truncation.
        error = np.linalg.norm(best.numpy() @ x - wanted)
        assert error == pytest.approx(np.sqrt((singular[b:] ** 2).sum()), abs=1e-9)
        assert np.linalg.matrix_rank(best.numpy()) == b


def test_theory_runs_and_draws(tmp_path):
    metrics = execute(configured("maestro_theory", tmp_path / "run"))[1]
    assert metrics["svd_largest_error"] > 0
    assert (tmp_path / "run" / "maestro_theory.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ordered_dropout_recovers_and_the_control_does_not(tmp_path):
    config = configured("maestro_theory", tmp_path / "run", "steps=10000", "points=2")
    metrics = execute(config)[1]
    assert metrics["cases_recovered"] == 3
    assert metrics["control_least_error"] > 0.1
    assert metrics["control_full_error"] < 1e-2
    assert metrics["rrr_distance_to_plain_svd"] > 0.1


# ---- configs


def test_the_sweep_names_valid_runs_at_an_equal_number_of_passes():
    sweep = named_sweep(parse(["sweep=maestro_digits"]), ROOT / "configs")
    assert len(sweep.seeds) == 3
    for overrides in sweep.arms.values():
        config = compose(parse([f"experiment={sweep.experiment}", *sweep.overrides, *overrides]), ROOT / "configs")
        two = config.ranks.form == "ordered" and config.ranks.mode == "full+sampled"
        assert config.trainer.max_epochs * (2 if two else 1) == 60


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    [
        ("maestro_digits", ["ranks.form=orderd"], "did you mean 'ordered'"),
        ("maestro_digits", ["ranks.mode=full"], "ranks.mode must be one of"),
        ("maestro_digits", ["ranks.cuts=[0.0]"], r"ranks.cuts must be in \(0, 1\]"),
        ("maestro_digits", ["ranks.max_rank=1.5"], r"ranks.max_rank must be in \(0, 1\]"),
        ("maestro_digits", ["ranks.lasso=-1"], "ranks.lasso must be finite and at least 0"),
        ("maestro_digits", ["data.test_samples=1797"], "data.test_samples must leave an image"),
        ("maestro_digits", ["trainer.strategy=fsdp2"], "trainer.strategy must be ddp"),
        ("maestro_cifar", ["trainer.activation_checkpointing=true"], "it would recompute at other ranks"),
        ("maestro_cifar", ["data.synthetic=0"], "data.root must name the folder"),
        ("maestro_cifar", ["data.synthetic=0", "data.root=/nowhere"], "got no file /nowhere/data_batch_1.bin"),
        ("maestro_theory", ["spectrum=[1.0,1.0]", "variances=[1.0,1.0]"], "spectrum must fall strictly"),
        ("maestro_theory", ["variances=[1.0]"], "variances must be 6 numbers"),
        ("maestro_theory", ["outputs=3"], "outputs must be at least 6"),
    ],
)
def test_bad_keys_are_named_before_training(experiment, overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        execute(configured(experiment, tmp_path / "run", *overrides))
