"""ring_lm on several processes against one, and max_sequence: counts against formulas that are written down here.

Run as a program, this file is what the processes run: ``train.py`` for several command lines, one after the other.
"""

import json
import math
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
# Nothing divides: 45 bytes over 2 and 3 ranks (twice as many runs in zigzag), batches of 3 over 2.
COMMON = ["experiment=ring_lm", "trainer.max_steps=5", "trainer.log_every=1", "trainer.tensorboard=false"]
COMMON += ["data.context=45", "data.batch_size=3", "data.train_bytes=3000", "data.test_windows=5", "model.width=16"]
FP64 = "trainer.precision=fp64"
SEQUENCE = ["mesh.dp=1", "mesh.sp=-1"]
# What a run is called -> its arguments, and the one process's run that it must equal.
ALONE = {"fp32": [], "fp64": [FP64], "window": [FP64, "model.window=20", "layout=striped"]}
TOGETHER = {
    2: {
        "zigzag": (SEQUENCE, "fp32"),
        "striped": ([*SEQUENCE, FP64, "layout=striped"], "fp64"),
        "allgather": ([*SEQUENCE, FP64, "schedule=allgather"], "fp64"),
    },
    3: {
        "zigzag": (SEQUENCE, "fp32"),
        "window": ([*SEQUENCE, FP64, "layout=contiguous", "model.window=20"], "window"),
        "sharded": (
            [*SEQUENCE, FP64, "trainer.strategy=fsdp2", "trainer.activation_checkpointing=true"],
            "fp64",
        ),
    },
    4: {
        "dp_sp": (["mesh.dp=2", "mesh.sp=2"], "fp32"),
        "parts": (["mesh.dp=2", "mesh.sp=2", FP64, "trainer.accumulate=2", "trainer.strategy=fsdp2"], "fp64"),
    },
}


def train(arguments):
    from torchlayers.training.cli import main

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of matplotlib's own
        return main(arguments, config_dir=ROOT / "configs")


# ---- ring_lm


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name, arguments in ALONE.items():
        assert train([*COMMON, *arguments, f"run_dir={folder / name}"]) == 0
    return folder


@pytest.fixture(scope="module", params=TOGETHER)
def together(request, spawn_once):
    """All runs of one number of processes, which start once."""
    world = request.param
    runs = TOGETHER[world]
    commands = [[*COMMON, *arguments, f"run_dir={world}_{name}"] for name, (arguments, _) in runs.items()]
    ranks, errors = spawn_once.script(world, commands, program=Path(__file__), timeout=240.0)
    assert ranks == [[0] * len(runs)] * world, "\n".join(errors)
    return world, spawn_once.folder


@pytest.mark.distributed
def test_loss_of_every_step_is_one_process_s(alone, together, metrics):
    world, folder = together
    for name, (_, reference) in TOGETHER[world].items():
        ours, want = metrics(folder / f"{world}_{name}"), metrics(alone / reference)
        tolerance = 1e-5 if reference == "fp32" else 1e-11
        assert len(ours) == len(want) == 5
        for quantity in ("loss", "grad_norm"):
            found, expected = ([line[quantity] for line in lines] for lines in (ours, want))
            assert found == pytest.approx(expected, abs=tolerance), (name, quantity)
        assert ours[-1]["test/bits_per_byte"] == pytest.approx(want[-1]["test/bits_per_byte"], abs=tolerance), name
        assert ours[-1]["parameters"] == want[-1]["parameters"]


def test_a_trained_model_takes_whole_sequences_and_is_what_was_evaluated(alone, metrics):
    from torchlayers.experiments.ring_lm import RingLMTask
    from torchlayers.training import load_run
    from torchlayers.training.compose import load_config

    folder = alone / "fp32"
    assert (folder / "plots" / "bits_per_byte.png").stat().st_size > 5000
    tokens = RingLMTask(load_config(folder)).build_data().test["text"].tensors[0]
    assert tokens.shape == (5, 45)
    model = load_run(folder)
    with torch.no_grad():
        nats = F.cross_entropy(model(tokens)[:, :-1].mT, tokens[:, 1:])
        changed = tokens.clone()
        changed[:, 30] = (tokens[:, 30] + 1) % 256
        difference = (model(changed) - model(tokens)).abs().amax((0, 2))
    assert nats.item() / math.log(2) == pytest.approx(metrics(folder)[-1]["test/bits_per_byte"], rel=1e-5)
    assert difference[:30].max() == 0 and difference[30:].min() > 0


def test_windows_of_text_predict_every_byte_once():
    from torchlayers.experiments.ring_lm import RingLM, RingLMTask, TextData

    data = RingLMTask(RingLM(data=TextData(context=50, train_bytes=5000))).build_data()
    windows = data.train.tensors[0]
    assert windows.shape == (102, 50)  # 102 · 49 + 1 = 4999
    assert torch.equal(windows[1:, 0], windows[:-1, -1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=ring_lm", "layout=zigzga"], "layout must be one of 'contiguous', 'zigzag', 'striped'"),
        (
            ["experiment=ring_lm", "model.window=8"],
            "layout must be contiguous or striped with model.window, got zigzag",
        ),
        (["experiment=ring_lm", "schedule=tree"], "schedule must be one of"),
        (["experiment=ring_lm", "model.heads=5"], "num_heads must divide embed_dim"),
        (["experiment=ring_lm", "data.context=1"], "data.context must be at least 2"),
        (["experiment=max_sequence", "kv_heads=3"], "kv_heads must divide heads (4), got 3"),
        (["experiment=max_sequence", "worlds=[2]"], "worlds must hold two different values at least"),
        (["experiment=max_sequence", "budget=0"], "budget must be over 0 GiB"),
        (["experiment=max_sequence", "layout=documents"], "layout must be one of"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, words, tmp_path, capfd):
    assert train([*arguments, f"run_dir={tmp_path / 'run'}"]) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- max_sequence


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    arguments = ["experiment=max_sequence", "lengths=[48,96,192]", "worlds=[1,2,3,4]", "projected=8", "layers=2"]
    assert train([*arguments, f"run_dir={folder}"]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, lines


def test_saved_bytes_are_counted_and_as_the_formulas_say(study):
    folder, lines = study
    assert (folder / "max_sequence.png").stat().st_size > 50_000
    final, counted = lines[-1], lines[:-1]
    assert len(counted) == 3 * 3 * 4
    for name in ("ring", "ring_self_attention", "linformer"):
        assert final[f"saved_over_formula_{name}"] <= 0.05
    ring = [line for line in counted if line["method"] == 0]
    # q, k, v, out and the LSE, of 4 query and 2 key heads of 16 channels, in float32.
    for line in ring:
        assert line["saved"] == pytest.approx(
            line["length"] / line["world"] * (4 * (64 + 32 + 32 + 64) + 4 * 4), rel=0.05
        )
    assert final["ring_saved_per_token_spread"] <= 0.05
    # q, k, v and rows of scores: these grow with the square of the length.
    rows = {(line["length"], line["world"]): line["saved"] for line in counted if line["method"] == 1}
    for length in (48, 96, 192):
        assert rows[length, 4] == pytest.approx(length / 4 * (3 * 64 + 4 * length) * 4, rel=0.05)


def test_bytes_sent_are_those_of_the_communication_model(study):
    _, lines = study
    assert lines[-1]["ring_sent_off_model"] == 0
    for line in lines[:-1]:
        if line["method"] == 0:
            hop = 2 * 2 * (line["length"] // line["world"]) * 16 * 4
            assert line["sent"] == (line["world"] - 1) * hop


def test_longest_sequences_grow_as_the_tables_say(study):
    from torchlayers.experiments.max_sequence import MaxSequence, longest_sequences

    _, lines = study
    found = longest_sequences(MaxSequence(layers=2))
    assert lines[-1]["longest_ring"] == found["ring"][64]
    assert found["ring"][64] / found["ring"][16] == pytest.approx(4, rel=0.05)
    assert found["linformer"][64] / found["linformer"][16] == pytest.approx(4, rel=0.05)
    assert found["sequence_parallel"][64] / found["sequence_parallel"][16] == pytest.approx(2, rel=0.05)
    assert max(found["tensor_parallel"]) == 12


def test_storages_are_counted_once():
    from torchlayers.experiments.max_sequence import SavedBytes

    x = torch.randn(10, 10, requires_grad=True)
    with SavedBytes() as saved:
        (x * x).sum() + (x[0] * x[1]).sum()
    assert saved.total == 400


if __name__ == "__main__":
    torch.set_num_threads(1)
    codes = [train(command) for command in json.loads(sys.argv[3])]
    Path(sys.argv[2] + os.environ.get("RANK", "")).write_text(json.dumps(codes))
