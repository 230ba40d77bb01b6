"""torchlayers needs torch alone: optional dependencies and triton are not imported, nor missed until used."""

import subprocess
import sys

import pytest

from torchlayers._checks import require

PROGRAM = """
import importlib, sys
{before}
import torch
for name in {blocked!r}:
    if name not in sys.modules:  # torch imports some where it finds them
        sys.modules[name] = None
import torchlayers
{body}
"""

BLOCKED = (
    "e3nn", "hydra", "matplotlib", "neuralop", "omegaconf", "safetensors", "scipy", "tensorboard", "tensorly",
    "tltorch", "torch_geometric", "tqdm", "triton",
)  # fmt: skip

USE = """
modules = ("data", "data.darcy", "experiments", "factorized", "functional", "testing", "tfno", "training")
for module in modules:
    importlib.import_module(f"torchlayers.{module}")
layer = torchlayers.SpectralConv(2, 3, (4, 4))
layer(torch.randn(2, 2, 8, 8)).sum().backward()
assert all(p.grad is not None for p in layer.parameters())
x, y = torchlayers.data.darcy.load("test", 16)
print(torchlayers.last_dispatch())
try:
    torchlayers.tfno.functional.use_triton("anything", x, "triton")
except torchlayers.BackendError as error:
    print(error)
try:
    torchlayers.data.darcy.generate(1, 4)
except ImportError as error:
    print(error)
"""


def run_program(body, blocked=(), before=""):
    program = PROGRAM.format(body=body, blocked=tuple(blocked), before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_loads_and_a_layer_trains_without_optional_dependencies_and_triton():
    printed = run_program(USE, BLOCKED, before="sys.modules['triton'] = None").splitlines()
    assert printed[0].startswith("torch: ")
    assert "triton" in printed[1] and "not installed" in printed[1]
    assert "pip install -e '.[data]'" in printed[2]


def test_import_brings_no_optional_dependency_and_no_family():
    body = """
new = {m.split(".")[0] for m in set(sys.modules) - before}
print(new)
assert new == {"torchlayers"}, new
loaded = {m for m in sys.modules if m.startswith("torchlayers.")}
assert not loaded - {"torchlayers._backend"}, loaded
assert not torch.cuda.is_initialized()
"""
    program = PROGRAM.replace("import torchlayers\n", "before = set(sys.modules)\nimport torchlayers\n")
    done = subprocess.run(
        [sys.executable, "-c", program.format(body=body, blocked=(), before="")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_dependency_names_its_extra():
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tfno\]'"):
        require("a_module_that_nobody_has", extra="tfno")
    assert require("json", extra="tfno") is __import__("json")
