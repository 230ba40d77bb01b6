"""The examples run from a wheel, in an environment that has no source tree."""

import re
import shutil

import pytest

# Few steps: the numbers are the business of tests/test_examples.py.
SHORT = {"steps": 2, "epochs": 1}


@pytest.mark.slow
def test_every_example_runs_from_the_wheel(root, wheel, environment, install, execute, tmp_path):
    pytest.importorskip("e3nn", reason="needs what the examples need: pip install -e '.[all]'")
    binary = environment()
    install(binary, wheel, cwd=tmp_path)
    shutil.copytree(root / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    printed = execute([binary / "python", "-c", "import torchlayers; print(torchlayers.__file__)"], tmp_path)
    assert printed.startswith(str(binary.parent))
    scripts = sorted((tmp_path / "examples").glob("*.py"))
    assert scripts
    for script in scripts:
        options = re.findall(r'add_argument\("--(steps|epochs)"', script.read_text())
        arguments = [part for name in options for part in (f"--{name}", SHORT[name])]
        assert execute([binary / "python", script, *arguments], tmp_path).strip(), script.name
    assert "2310.00120" in execute([binary / "python", "-m", "torchlayers", "list"], tmp_path)
