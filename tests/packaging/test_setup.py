"""tools/setup.sh, with stand-ins for Python and pip: what it says, in which order, and how it fails."""

import shutil
import subprocess

import pytest

# Answers `-m pip ...` and `-c ...` as an environment without torch would, and writes down what it was asked.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "{log}"
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *sys.version_info*) exit {too_old} ;;
  *find_spec*) exit {no_torch} ;;
  *"pip "*--version) echo "pip {pip} from somewhere (python 3.11)" ;;
  *--dry-run*) echo '{{"install": [{{"metadata": {{"name": "{requirement}"}}}}]}}'; exit {plan_fails} ;;
  *"pip "*install*) exit {install_fails} ;;
  --version) echo "Python 3.8.0" ;;
esac
"""


@pytest.fixture
def set_up(tmp_path, root):
    def run(python="python", **answers):
        (tmp_path / "tools").mkdir(exist_ok=True)
        shutil.copy(root / "tools" / "setup.sh", tmp_path / "tools")
        log = tmp_path / "log"
        log.write_text("")
        defaults = {
            "too_old": 0,
            "no_torch": 1,
            "pip": "26.3",
            "requirement": "torch",
            "plan_fails": 0,
            "install_fails": 0,
        }
        stand_in = tmp_path / "python"
        stand_in.write_text(PYTHON.format(log=log, **defaults | answers))
        stand_in.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": python}
        command = ["bash", str(tmp_path / "tools" / "setup.sh"), "train"]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", timeout=30
        )
        return done.returncode, done.stdout, log.read_text().splitlines()

    return run


def test_installs_into_the_checkout_with_the_constraints(set_up, tmp_path):
    code, printed, asked = set_up()
    assert code == 0 and "GPU build" not in printed
    assert asked[-1].endswith("install --quiet -c constraints.txt -e .[train]")
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    _, _, again = set_up()
    assert not [line for line in again if "-m venv" in line]


@pytest.mark.parametrize("name", ["nvidia-cudnn-cu13", "cuda-toolkit", "rocm-sdk"])
def test_a_gpu_build_is_announced_before_it_is_fetched(set_up, name):
    code, printed, _ = set_up(requirement=name)
    assert code == 0
    assert printed.index("several GB") < printed.index("installing torchlayers")
    assert "--index-url" in printed


def test_present_torch_is_not_planned_again(set_up):
    _, _, asked = set_up(no_torch=0)
    assert not [line for line in asked if "--dry-run" in line]


@pytest.mark.parametrize(("version", "upgrades"), [("21.2.4", True), ("23.1", True), ("23.2", False), ("26.3", False)])
def test_an_old_pip_is_upgraded_first(set_up, version, upgrades):
    code, _, asked = set_up(pip=version)
    assert code == 0
    assert any("--upgrade pip>=23.2" in line for line in asked) == upgrades


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"python": "nonexistent"}, "nonexistent was not found; name an interpreter: make PYTHON=..."),
        ({"too_old": 1}, "Python 3.10 or newer is needed, got Python 3.8.0"),
        ({"plan_fails": 1}, "pip cannot resolve torch"),
        ({"install_fails": 1}, "pip failed"),
        ({"install_fails": 1, "pip": "21.0"}, "could not upgrade pip"),
    ],
)
def test_failures_are_loud(set_up, answers, message):
    code, printed, _ = set_up(**answers)
    assert code == 1 and f"setup: {message}" in printed
