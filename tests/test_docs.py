"""The documentation: its snippets run, it names every public name, and it builds without a warning."""

import importlib
import pathlib
import re
import subprocess
import sys
import types

import pytest

from torchlayers.training import execute, registry

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SNIPPET = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if SNIPPET.search(p.read_text())], ids=lambda p: p.stem)
def test_the_snippets_of_a_page_run_in_order(page, monkeypatch):
    module = types.ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    monkeypatch.setattr(registry, "_EXPERIMENTS", dict(registry._EXPERIMENTS))
    for snippet in SNIPPET.findall(page.read_text()):
        exec(compile(snippet, page.name, "exec"), module.__dict__)


def test_the_experiment_of_the_guide_trains(tmp_path, monkeypatch):
    """As a user would have it: the file as shown, run by train.py's own machinery."""
    (snippet,) = SNIPPET.findall((DOCS / "guides" / "experiments.md").read_text())
    module = types.ModuleType("docs_experiment")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "_EXPERIMENTS", dict(registry._EXPERIMENTS))
    exec(compile(snippet, "experiments.md", "exec"), module.__dict__)
    config = module.MyDigits(experiment="my_digits", task="my_digits", run_dir=str(tmp_path / "run"))
    config.trainer.max_epochs, config.data.batch_size, config.optimizer.lr = 5, 64, 1e-2
    _, metrics = execute(config)
    assert metrics["test/accuracy"] > 0.5  # of 0.1 by chance


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for kind in ("experiment", "sweep"):
        for name in re.findall(rf"\b{kind}=(\w+)", text):
            known = (ROOT / "configs" / kind / f"{name}.yaml").is_file() or name in ("NAME", "my_digits")
            assert known, f"{page.name} names {kind}={name}"
    for role, name in re.findall(r"\{py:(class|func)\}`~?([\w.]+)`", text):
        parent, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(parent), attribute), f"{page.name} refers to the {role} {name}"


def test_every_family_has_a_page():
    import torchlayers

    families = {module for module in torchlayers._LAZY.values() if not module.startswith("_")}
    assert families <= {page.stem for page in (DOCS / "families").glob("*.md")}


def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "SeparableConv2d" in (tmp_path / "families" / "separable_conv.html").read_text()


def test_every_example_is_listed():
    text = (DOCS / "guides" / "examples.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f"`{path.name}`" in text
