"""What README.md shows, runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_python_blocks_run_in_order(capsys):
    runnable = [block for block in BLOCKS if '..."' not in block]  # a path that the reader fills in
    assert len(runnable) >= 2
    namespace: dict = {}
    for block in runnable:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "torch: tensors on the CPU" in capsys.readouterr().out


def test_the_commands_that_it_names_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"train", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README names `make {target}`"
    for experiment in re.findall(r"experiment=(\w+)", text):
        assert (ROOT / "configs" / "experiment" / f"{experiment}.yaml").is_file(), experiment
    for sweep in re.findall(r"sweep=(\w+)", text):
        assert (ROOT / "configs" / "sweep" / f"{sweep}.yaml").is_file(), sweep
