"""torchlayers and its kernels import in every way of installing and starting, beside another package `kernels`."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

# Run as a script, by -c, and as a test. The layer runs once, so that operations are registered once.
PROBE = """
import os, sys
import torch
import torchlayers
import torchlayers.kernels._lib as lib
import kernels

def test_probe():
    assert lib.__name__ == "torchlayers.kernels._lib" and "kernels._lib" not in sys.modules
    assert kernels.get_kernel(1) == (1,)
    layer = torchlayers.SpectralConv(2, 2, (4, 4))
    assert layer(torch.zeros(1, 2, 8, 8)).shape == (1, 2, 8, 8)
    from torchlayers.data import darcy
    assert darcy.load("test", 16)[0].shape == (50, 1, 16, 16)
    expected = os.environ["EXPECTED"]
    for module in (torchlayers, lib, darcy):
        assert os.path.realpath(module.__file__).startswith(expected), (module.__file__, expected)

test_probe()
"""

EDITABLE = {
    "editable": (),
    "editable strict": ("--config-settings", "editable_mode=strict"),
    "editable compat": ("--config-settings", "editable_mode=compat"),
}


def test_wheel_works_away_from_the_checkout(wheel, environment, install, execute, tmp_path):
    binary = environment()
    install(binary, wheel, cwd=tmp_path)
    execute([binary / "python", "-c", PROBE], tmp_path, EXPECTED=str(binary.parent.resolve()))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["nothing", "wheel", *EDITABLE])
def test_every_way_to_install_and_start(way, request, checkout, environment, install, execute, tmp_path):
    root, elsewhere, binary = checkout(), tmp_path / "elsewhere", environment()
    if way == "wheel":
        install(binary, request.getfixturevalue("wheel"), cwd=tmp_path)
    elif way in EDITABLE:
        install(binary, *EDITABLE[way], "-e", ".", cwd=root)
    for folder in (root / "tests", elsewhere):
        folder.mkdir()
        (folder / "test_probe.py").write_text(PROBE)

    source, home = str(root.resolve()), str(binary.parent.resolve())
    python = binary / "python"
    # From the root the source tree comes first on sys.path; `pytest` there has it by the setting `pythonpath`.
    at_root = [
        [python, "-c", PROBE],
        [python, "-m", "pytest", "-q", "tests/test_probe.py"],
        [binary / "pytest", "-q", "tests/test_probe.py"],
    ]
    for command in at_root:
        execute(command, root, EXPECTED=source)
    assert "tfno_darcy" in execute([python, "train.py", "--help"], root)
    for command in ([python, "-m", "pytest", "-q"], [binary / "pytest", "-q"]):
        execute([*command, root / "tests" / "test_probe.py"], elsewhere, EXPECTED=source)
    execute([python, root / "train.py", "--help"], elsewhere)
    if way != "nothing":
        away = [
            [python, "-c", PROBE],
            [python, "test_probe.py"],
            [python, "-m", "pytest", "-q", "test_probe.py"],
            [binary / "pytest", "-q", "test_probe.py"],
        ]
        for command in away:
            execute(command, elsewhere, EXPECTED=home if way == "wheel" else source)


def test_kernels_refuse_to_be_imported_under_another_name(root, execute):
    program = """
try:
    import kernels._lib
except ImportError as error:
    print(error)
"""
    assert "import the kernels as torchlayers.kernels" in execute([sys.executable, "-c", program], root)


@pytest.mark.slow
def test_source_distribution_builds_the_same_wheel(wheel, checkout, execute, tmp_path):
    root = checkout()
    execute([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, "."], root)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (folder,) = Path(tmp_path / "unpacked").iterdir()
    execute([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, "."], folder)
    (second,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(second) as b:
        assert sorted(a.namelist()) == sorted(b.namelist())
