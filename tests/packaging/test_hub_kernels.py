"""tools/pack_kernels.py makes a folder from which Hugging Face's ``kernels`` loads ours, without torchlayers."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

USE = """
import torch
x, v, u = (torch.randn(*shape, dtype=torch.float32) for shape in ((5, 4), (3, 4), (6, 3)))
y, _ = torch.ops.torchlayers.low_rank_linear_forward(x, v, u, None, 2, None, 1, False)
torch.testing.assert_close(y, x @ v[:2].T @ u[:, :2].T)
assert hub.tdft.__name__ == "torchlayers.kernels.tdft" and set(hub.__all__) >= {"tdft", "low_rank_linear"}
print(hub.tdft.__file__)
"""

# As kernels.importer does it.
BY_HAND = """
import importlib.util, json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
hub = importlib.util.module_from_spec(spec)
sys.modules[name] = hub
spec.loader.exec_module(hub)
"""

BY_HUGGING_FACE = """
import pathlib, sys
from kernels import get_local_kernel
hub = get_local_kernel(pathlib.Path(sys.argv[1]), backend="cpu")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    import importlib.util

    path = Path(__file__).resolve().parents[2] / "tools" / "pack_kernels.py"
    spec = importlib.util.spec_from_file_location("pack_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("hub")
    module.pack(folder)
    module.pack(folder)  # over an earlier one
    return folder


def test_each_variant_holds_the_kernels_and_says_what_it_is(repository, root):
    sources = {path.name for path in (root / "kernels").glob("*.py")} - {"_aot.py"}
    variants = {path.name for path in (repository / "build").iterdir()}
    assert variants == {"torch-cuda", "torch-rocm", "torch-cpu"}
    for variant in variants:
        folder = repository / "build" / variant
        assert {path.name for path in (folder / "kernels").iterdir()} == sources
        metadata = json.loads((folder / "metadata.json").read_text())
        assert variant == f"torch-{metadata['backend']['type']}" and metadata["license"] == "Apache-2.0"


def test_it_loads_where_torchlayers_is_not_installed(repository, environment, execute, tmp_path):
    python = environment() / "python"
    folder = repository / "build" / "torch-cpu"
    assert str(folder) in execute([python, "-c", BY_HAND + USE, folder], tmp_path)


def test_where_torchlayers_is_installed_its_kernels_are_the_ones(repository, root, execute, tmp_path):
    folder = repository / "build" / "torch-cpu"
    printed = execute([sys.executable, "-c", BY_HAND + USE, folder], tmp_path, PYTHONPATH=str(root))
    assert str(root / "kernels" / "tdft.py") in printed


def test_hugging_face_s_own_loader_takes_it(repository, execute, tmp_path):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's kernels: pip install kernels")
    copy = tmp_path / "hub"
    shutil.copytree(repository, copy)
    execute([sys.executable, "-c", BY_HUGGING_FACE + USE, copy], tmp_path)
