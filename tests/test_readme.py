"""What README.md shows, runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
FAMILIES = sorted(page.stem for page in (ROOT / "docs" / "families").glob("*.md") if page.stem != "factorized")


def test_each_python_block_runs_alone(capsys):
    runnable = [block for block in BLOCKS if '..."' not in block]  # a path that the reader fills in
    assert len(runnable) >= 8
    for block in runnable:
        exec(compile(block, "README.md", "exec"), {})
    assert "torch: backend is 'torch'" in capsys.readouterr().out


def test_every_family_has_a_row_with_a_picture():
    rows = set(re.findall(r'<img src="docs/images/(\w+)\.png"', README))
    assert set(FAMILIES) <= rows
    for picture in re.findall(r'(?:src="|\]\()([\w/]+\.png)', README):
        assert (ROOT / picture).is_file(), picture


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_commands_that_it_names_exist():
    text = README
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"train", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README names `make {target}`"
    for experiment in re.findall(r"experiment=(\w+)", text):
        assert (ROOT / "configs" / "experiment" / f"{experiment}.yaml").is_file(), experiment
    for sweep in re.findall(r"sweep=(\w+)", text):
        assert (ROOT / "configs" / "sweep" / f"{sweep}.yaml").is_file(), sweep
