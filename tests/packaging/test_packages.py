"""pyproject.toml says what the tree holds, and the wheel holds what pyproject.toml says."""

import zipfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def shipped_files():
    """Path in an installed copy -> path in the tree, of every file that ships."""
    found = {f"torchlayers/{p.relative_to(ROOT / 'torchlayers')}": p for p in (ROOT / "torchlayers").rglob("*")}
    found |= {f"torchlayers/kernels/{p.relative_to(ROOT / 'kernels')}": p for p in (ROOT / "kernels").rglob("*")}
    return {name: p for name, p in found.items() if p.is_file() and p.suffix != ".pyc"}


def test_package_list_is_the_tree():
    # A folder of data files counts as a package, for setuptools too.
    folders = {str(Path(name).parent).replace("/", ".") for name in shipped_files()}
    assert sorted(PACKAGES) == sorted(folders)


def test_folders_of_modules_have_an_init_and_kernels_has_none():
    # As a regular package kernels/ would hide Hugging Face's `kernels` from whoever starts Python at the root.
    for path in shipped_files().values():
        if path.suffix == ".py":
            assert (path.parent / "__init__.py").exists() == (path.parent != ROOT / "kernels"), path


def test_wheel_holds_the_tree_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        content = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        licences = [n for n in archive.namelist() if n.endswith("/LICENSE")]
        darcy = archive.read("torchlayers/data/files/darcy.zip")
    assert content == set(shipped_files())
    assert {"torchlayers/py.typed", "torchlayers/data/files/README.md"} <= content
    assert darcy == (ROOT / "torchlayers" / "data" / "files" / "darcy.zip").read_bytes()
    assert "\nName: torchlayers-zoo\n" in metadata and licences


def test_extras_are_those_promised():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"gaunt", "tfno", "graphs", "train", "all", "dev"} <= set(extras)
    inside = set(extras["all"][0].removeprefix("torchlayers-zoo[").removesuffix("]").split(","))
    assert inside == set(extras) - {"all", "dev", "docs"}
