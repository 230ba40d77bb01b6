"""The experiments match3_xor and tensor_lm: data by brute force, equal arms, and runs that train, draw and load."""

import json
import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torchlayers.experiments import match3_xor, tensor_lm
from torchlayers.experiments._transformer import StandardAttention, block, forward_flops
from torchlayers.testing import assert_close_rel
from torchlayers.training import ConfigError, execute, load_run
from torchlayers.training.compose import compose, parse
from torchlayers.training.sweep import named_sweep

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "match3_xor": [
        *("data.tokens=7", "data.bits=4", "data.train_samples=256", "data.test_samples=33", "data.batch_size=32"),
        *("model.width=16", "model.heads=2", "trainer.eval_every=4", "scheduler.warmup_steps=2"),
    ],
    "tensor_lm": [
        *("data.context=16", "data.test_windows=5", "data.batch_size=4", "trainer.max_steps=6"),
        *("model.width=16", "model.heads=2", "model.window1=4", "model.window2=3", "scheduler.warmup_steps=2"),
    ],
}


def configured(experiment, folder, *overrides):
    keys = ["trainer.device=cpu", "trainer.tensorboard=false", "trainer.log_every=1", "trainer.progress=false"]
    return compose(
        parse([f"experiment={experiment}", f"run_dir={folder}", *keys, *TINY[experiment], *overrides]), ROOT / "configs"
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- data


def test_labels_are_what_enumeration_finds():
    data = match3_xor.sequences(40, 7, 4, seed=3)
    tokens, labels = data.tensors
    assert tokens.min() >= 1
    assert tokens.max() <= 15
    for sequence, found in zip(tokens.tolist(), labels.tolist(), strict=True):
        triples = permutations(range(7), 3)
        hits = {i for i, j, k in triples if sequence[i] ^ sequence[j] ^ sequence[k] == 0}
        assert [i in hits for i in range(7)] == found
    assert 0.2 < labels.double().mean() < 0.8


def test_sequences_are_those_of_the_seed_and_test_differs_from_training():
    assert torch.equal(match3_xor.sequences(5, 6, 4, 1).tensors[0], match3_xor.sequences(5, 6, 4, 1).tensors[0])
    data = match3_xor.Match3Task(configured("match3_xor", "none")).build_data()
    assert not torch.equal(data.train.tensors[0][:33], data.test["test"].tensors[0])


def test_windows_cover_the_text_and_overlap_by_what_is_not_predicted():
    text = tensor_lm.text()
    assert len(text) > 100_000
    found = tensor_lm.windows(text, 64)
    assert found.dtype == torch.int64
    assert torch.equal(found[:, 1:].flatten(), text[1 : 1 + 64 * len(found)].long())
    assert torch.equal(found[1:, 0], found[:-1, -1])


def test_training_and_test_text_do_not_overlap():
    config = configured("tensor_lm", "none", "data.test_windows=0")
    data = tensor_lm.TensorLMTask(config).build_data()
    train, test = data.train.tensors[0], data.test["text"].tensors[0]
    total = len(tensor_lm.text())
    assert train[:, 1:].numel() <= 0.9 * total
    assert 0.095 * total < test[:, 1:].numel() <= 0.1 * total + 1


# ---- models


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_standard_attention_is_sdpa_of_normalised_heads(window, causal):
    layer = StandardAttention(12, 3, gain=1.3, window=window, is_causal=causal).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)

    def heads(projection, gain=None):
        y = projection(x).view(2, 7, 3, 4)
        cubic = ((y.abs() ** 3).mean(-1, keepdim=True) + 1e-9) ** (1 / 3)
        return (y if gain is None else 1.3 * y / cubic).transpose(1, 2)

    i = torch.arange(7)
    ok = torch.ones(7, 7, dtype=torch.bool)
    if causal:
        ok &= i <= i[:, None]
    if window:
        ok &= (i - i[:, None]).abs() < window
    out = F.scaled_dot_product_attention(
        heads(layer.q_proj, 1), heads(layer.k_proj, 1), heads(layer.v_proj), attn_mask=ok
    )
    want = layer.out_proj(out.transpose(1, 2).flatten(2))
    assert_close_rel(layer(x)[0], want, rtol=1e-6)  # gains of 1.3 are rounded to float32


def test_arms_of_the_language_model_have_equal_parameters_and_are_causal():
    counts = {}
    for arm in ("trilinear", "determinant", "strassen", "standard", "sliding"):
        config = tensor_lm.TensorLM()
        config.model.attention = arm
        model = tensor_lm.TensorLMTask(config).build_model()
        counts[arm] = sum(p.numel() for p in model.parameters())
        tokens = torch.randint(0, 256, (1, 64))
        changed = tokens.clone()
        changed[0, 40] = (tokens[0, 40] + 1) % 256
        difference = (model(changed) - model(tokens)).abs().amax((0, 2))
        assert difference[:40].max() == 0
        assert difference[40] > 0
    for arm in ("strassen", "standard", "sliding"):
        assert counts[arm] == pytest.approx(counts["trilinear"], rel=1e-3)


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        block("standard", 16, 2, 64)(torch.randn(3, 10, 16))
    # The counter sees no product in a CPU's scaled_dot_product_attention.
    assert counter.get_total_flops() == 3 * 10 * (forward_flops("standard", 16, 64, 10) - 4 * 10 * 16)
    assert forward_flops("trilinear", 64, 256, 12) == 12 * 64**2 + 4 * 144 * 64 + 4 * 64 * 256


# ---- runs


@pytest.mark.parametrize("arm", ["trilinear", "determinant", "strassen", "standard"])
def test_match3_trains_draws_and_loads(arm, tmp_path):
    execute(configured("match3_xor", tmp_path / "run", f"model.attention={arm}"))
    last = lines(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "plots" / "accuracy.png").stat().st_size > 1000
    x, y = match3_xor.sequences(33, 7, 4, 1).tensors
    assert ((load_run(tmp_path / "run")(x) > 0) == y).double().mean().item() == pytest.approx(last["test/accuracy"])


@pytest.mark.parametrize("arm", ["trilinear", "standard", "sliding"])
def test_language_model_trains_draws_and_loads(arm, tmp_path):
    config = configured("tensor_lm", tmp_path / "run", f"model.attention={arm}")
    execute(config)
    found = lines(tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]
    assert (tmp_path / "run" / "plots" / "bits_per_byte.png").stat().st_size > 1000
    tokens = tensor_lm.TensorLMTask(config).build_data().test["text"].tensors[0]
    nats = F.cross_entropy(load_run(tmp_path / "run")(tokens[:, :-1]).mT, tokens[:, 1:])
    assert nats.item() / math.log(2) == pytest.approx(found[-1]["test/bits_per_byte"], rel=1e-5)


@pytest.mark.slow
def test_one_trilinear_layer_learns_triples_and_one_standard_layer_does_not(tmp_path):
    keys = ["experiment=match3_xor", "trainer.device=cpu", "trainer.tensorboard=false", "trainer.progress=false"]
    accuracy = {}
    for arm in ("trilinear", "standard"):
        folder = tmp_path / arm
        execute(compose(parse([*keys, f"run_dir={folder}", f"model.attention={arm}"]), ROOT / "configs"))
        accuracy[arm] = lines(folder)[-1]["test/accuracy"]
    assert accuracy["trilinear"] >= 0.98
    assert accuracy["standard"] <= 0.62


@pytest.mark.parametrize("name", ["match3_xor", "tensor_lm"])
def test_sweeps_name_valid_runs(name):
    sweep = named_sweep(parse([f"sweep={name}"]), ROOT / "configs")
    for overrides in sweep.arms.values():
        compose(parse([f"experiment={sweep.experiment}", *sweep.overrides, *overrides]), ROOT / "configs")


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    [
        ("match3_xor", ["model.attention=trilinaer"], "did you mean 'trilinear'"),
        ("match3_xor", ["data.bits=17"], "data.bits must be at most 16"),
        ("match3_xor", ["model.heads=5"], "num_heads must divide embed_dim"),
        ("tensor_lm", ["model.every=0"], "model.every must be at least 1"),
        ("tensor_lm", ["model.window1=0"], "model.window1 must be at least 1"),
        ("tensor_lm", ["data.context=10000000"], "data.context must be below"),
    ],
)
def test_bad_keys_are_named_before_training(experiment, overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        execute(configured(experiment, tmp_path / "run", *overrides))
