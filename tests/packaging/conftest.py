"""A clean copy of the source tree, a wheel of it, and environments that see this one's libraries and nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("torchlayers", "kernels", "configs", "train.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff")

# What stands in for Hugging Face's `kernels`: a regular package of that name in site-packages.
STAND_IN = "def get_kernel(*arguments):\n    return arguments\n"


def run(command, cwd, **environment):
    """Run `command` and return what it printed; on failure, fail with that."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME") and not k.startswith("PYTEST")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} (in {cwd}) ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def execute():
    return run


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """Make copies of the source tree, so that builds neither see old build folders nor leave new ones."""

    def make() -> Path:
        target = tmp_path_factory.mktemp("checkout")
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, target / name)
        return target

    return make


@pytest.fixture(scope="session")
def wheel(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, "."], checkout())
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture
def environment(tmp_path):
    """Make a virtual environment with torch and the rest of this one's libraries, without torchlayers, and with a
    package called `kernels`; return its bin folder."""

    def make() -> Path:
        home = tmp_path / "environment"
        run([sys.executable, "-m", "venv", "--without-pip", home], tmp_path)
        libraries = sysconfig.get_path("purelib")
        (site_packages,) = home.glob("lib/python*/site-packages")
        # Through a .pth file, since .pth files inside that folder (an editable torchlayers) then have no effect.
        (site_packages / "libraries.pth").write_text(f"{libraries}\n")
        (site_packages / "kernels").mkdir()
        (site_packages / "kernels" / "__init__.py").write_text(STAND_IN)
        pytest_command = home / "bin" / "pytest"
        pytest_command.write_text(f"#!{home}/bin/python\nimport sys, pytest\nsys.exit(pytest.console_main())\n")
        pytest_command.chmod(0o755)
        return home / "bin"

    return make


@pytest.fixture
def install(execute):
    def into(bin_folder: Path, *what: object, cwd: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", bin_folder / "python", "install", "--quiet", "--no-deps"]
        execute([*pip, "--no-index", "--ignore-installed", "--no-build-isolation", *what], cwd)

    return into
