"""Every script of examples/ runs as its docstring says, and prints numbers that bear out what it claims."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def _run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def run(name, *arguments, needs):
    for module in needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    return _run(ROOT / "examples" / f"{name}.py", *arguments)


def numbers(pattern, printed):
    """The numbers of the one line that fits: ``#`` in the pattern stands for a number."""
    number = r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
    found = re.findall(re.escape(pattern).replace(r"\#", number), printed)
    assert len(found) == 1, f"{pattern!r} fits {len(found)} times in\n{printed}"
    return [float(value) for value in (found[0] if isinstance(found[0], tuple) else found)]


def test_tensor_attention_finds_triples_in_a_transformer_that_pairs_do_not_show():
    printed = run("tensor_attention_transformers", needs=["transformers"])
    (common,) = numbers("always the commoner answer: accuracy #", printed)
    (pairwise,) = numbers("pairwise attention: accuracy #", printed)
    (tensor,) = numbers("tensor attention: accuracy #", printed)
    assert pairwise < common + 0.1 and tensor > 0.9


def test_maestro_cuts_a_transformer_with_little_loss():
    printed = run("maestro_transformers", needs=["transformers"])
    (difference,) = numbers("factorised at full rank: logits differ by #", printed)
    start, usual, ordered = numbers("loss # before training; after it, as usual #, ordered #", printed)
    assert difference < 1e-5
    assert max(usual, ordered) < 0.1 < 3 < start
    cuts = re.findall(r"cut to (\d+)% of \d+ parameters: loss ([\d.]+) trained in order, ([\d.]+) as usual", printed)
    shares, small, other = zip(*(map(float, cut) for cut in cuts), strict=True)
    assert len(cuts) == 3 and shares[-1] <= 21
    assert small[-1] < 0.5 * other[-1]


def test_spectral_conv_in_neuraloperator_is_the_same_model():
    printed = run("spectral_conv_neuralop", needs=["neuralop"])
    differences = numbers("outputs differ by #, gradients by # (relative)", printed)
    dense, tucker = numbers("spectral parameters: dense #, Tucker #", printed)
    line = "relative test error on grids of 16 and 32: # and # before training, # and # after"
    before16, before32, after16, after32 = numbers(line, printed)
    assert max(differences) < 1e-5
    assert tucker < 0.11 * dense
    assert after16 < 0.4 * before16 and after32 < 0.4 * before32


def test_gaunt_layers_in_a_net_of_mace_kind_learn_and_stay_equivariant():
    printed = run("gaunt_in_mace", needs=["e3nn"])
    before, after = numbers("as a share of the forces: # before training, # after", printed)
    errors = numbers("energy differs by #, turned forces by # (relative)", printed)
    assert after < 0.4 < 0.9 < before
    assert max(errors) < 1e-12


def test_an_e3nn_model_is_taken_over_exactly():
    printed = run("gaunt_from_e3nn", needs=["e3nn"])
    assert numbers("replaced # tensor products", printed) == [3]
    differences = numbers("energy #, forces #, gradients of the weights #", printed)
    (loaded,) = numbers("with the old state dict loaded into new weights: energy #", printed)
    assert max(*differences, loaded) < 1e-12


def test_a_cnn_is_converted_to_separable_convolutions():
    printed = run("separable_cnn", needs=["sklearn"])
    parameters, accuracy = numbers("\ndense: # parameters, test accuracy #", printed)
    fewer, as_good = numbers("separable: # parameters, test accuracy #", printed)
    (fresh,) = numbers("converted, fresh, after one epoch: test accuracy #", printed)
    (decomposed,) = numbers("converted, decomposed, after one epoch: test accuracy #", printed)
    assert fewer < 0.5 * parameters
    assert accuracy > 0.9 and as_good > accuracy - 0.05
    assert decomposed > fresh + 0.2


def test_polynomials_tell_graphs_apart_that_message_passing_does_not():
    printed = run("polynomial_pyg", needs=["torch_geometric", "networkx"])
    (mean,) = numbers("the mean: error #", printed)
    (gin,) = numbers("\nGIN: error #", printed)
    (features,) = numbers("GIN on polynomial features: error #", printed)
    (layer,) = numbers("PolynomialConv: error #", printed)
    assert gin > 0.9 * mean
    assert features < 0.4 * mean and layer < 0.4 * mean


def check_ring(printed, world):
    (start, end) = numbers("loss: # at the first step, # at the last", printed)
    (difference,) = numbers("largest difference from the losses of one process: #", printed)
    assert f"on each of {world} processes" in printed
    assert end < start
    assert difference < 1e-5


@pytest.mark.distributed
def test_a_gpt_over_a_ring_has_the_losses_of_one_process():
    printed = _run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *(ROOT / "examples" / "ring_gpt.py", "--steps", 20),
    )
    check_ring(printed, 2)
    assert "128, 128 of 256" in printed


def test_the_gpt_runs_on_one_process_too():
    check_ring(run("ring_gpt", "--steps", 20, needs=[]), 1)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_says_what_it_shows_and_how_to_run_it_and_has_a_test(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert len(text.splitlines()) > 4 and f"examples/{path.name}" in text
    for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", text):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra
    assert f'"{path.stem}' in Path(__file__).read_text(), f"no test runs {path.name}"
    assert path.read_text().rstrip().splitlines()[-1].startswith("    "), "ends in the block of __main__"
