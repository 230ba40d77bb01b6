"""``python -m torchlayers``: what it says is what is there."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchlayers
from torchlayers import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    name
    for name in torchlayers.__all__
    if isinstance(value := getattr(torchlayers, name), type) and issubclass(value, torch.nn.Module)
}


def run(*arguments, before="", **environment):
    """In a process of its own, away from the checkout: exit code, stdout, stderr."""
    program = f"import sys, runpy\n{before}\nsys.argv = ['torchlayers', *{arguments!r}]\n"
    program += "runpy.run_module('torchlayers', run_name='__main__', alter_sys=True)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_list_names_every_layer_once_with_a_line_and_a_paper(capsys):
    assert command_line.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.split()) > 4 for line in lines if line)
    layers = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert set(layers) >= MODULES
    assert all("arXiv" in line for line in layers.values())
    assert "Spectral convolution" in layers["SpectralConv"] and "2310.00120" in layers["SpectralConv"]
    assert not [line for line in lines if "``" in line or ":class:" in line]
    families = {line.split(":")[0] for line in lines if line and not line.startswith(" ")}
    for name in MODULES:
        assert f"torchlayers.{torchlayers._LAZY[name]}" in families


def test_list_of_a_family_has_all_its_public_names(capsys):
    assert command_line.main(["list", "maestro"]) == 0
    printed = capsys.readouterr().out
    package = importlib.import_module("torchlayers.maestro")
    listed = [line.split()[0] for line in printed.splitlines() if line.startswith("  ")]
    assert listed == list(package.__all__)


def test_info_says_versions_devices_and_what_keeps_the_kernels(capsys):
    assert command_line.main(["info"]) == 0
    printed = capsys.readouterr().out
    for line in (f"torchlayers {torchlayers.__version__}", f"torch {torch.__version__}", "cpu: "):
        assert line in printed
    for path in (ROOT / "kernels").glob("[!_]*.py"):
        assert f"\n  {path.stem} " in printed
    if not torch.cuda.is_available():
        assert "no GPU that this torch can use" in printed
        reason = "Triton's interpreter" if command_line._backend.interpreted() else "none usable here, no GPU"
        assert reason in printed


def test_info_names_what_is_missing_and_the_extra_that_brings_it():
    before = """
import importlib.metadata as metadata, importlib.util as util
for name in ("triton", "e3nn"):
    sys.modules[name] = None
known, found = metadata.version, util.find_spec
def version(name):
    if name in ("triton", "e3nn"):
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
util.find_spec = lambda name, package=None: None if name in ("triton", "e3nn") else found(name, package)
"""
    code, printed, errors = run("info", before=before)
    assert code == 0, errors
    assert "e3nn is not installed: pip install -e '.[gaunt]'" in printed
    assert "triton is not installed" in printed
    assert "kernels: none usable on cpu, triton is not installed" in printed


def test_info_in_the_interpreter_says_so():
    pytest.importorskip("triton", reason="needs triton")
    code, printed, errors = run("info", TRITON_INTERPRET="1", TORCHLAYERS_BACKEND="torch", CUDA_VISIBLE_DEVICES="")
    assert code == 0, errors
    assert "backend: torch" in printed
    assert "in Triton's interpreter" in printed


def test_bench_hands_over_to_the_benchmarks_of_the_checkout():
    code, printed, errors = run("bench", "--help")
    assert code == 0 and printed.startswith("usage: python -m benchmarks"), errors
    code, _, errors = run("bench", "no_such_family", "--quick")
    assert code == 2 and "FAMILY must be of" in errors


def test_bench_away_from_a_checkout_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torchlayers, "__file__", str(tmp_path / "torchlayers" / "__init__.py"))
    assert command_line.main(["bench", "tfno"]) == 2
    assert "needs a source checkout" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["lists"], ["list", "no_such_family"], ["info", "--verbose"]])
def test_anything_else_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err
