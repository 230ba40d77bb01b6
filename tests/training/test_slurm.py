"""tools/slurm.py: a sweep as jobs, by Hydra's own launcher, and by submitit on this machine where it is installed."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra", reason="needs hydra: pip install -e '.[train]'")
pytest.importorskip("sklearn", reason="needs scikit-learn: pip install -e '.[data]'")

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """\
experiment: maestro_digits
overrides: [trainer.max_epochs=1, trainer.tensorboard=false]
arms: {dense: [ranks.form=dense], low_rank: [ranks.form=low_rank]}
seeds: [0]
"""


def needs(distribution):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return pytest.mark.skip(reason=f"needs {distribution}")
    return ()


@pytest.mark.parametrize(
    "launcher",
    [
        "basic",
        pytest.param("submitit_local", marks=needs("hydra-submitit-launcher")),
    ],
)
def test_a_sweep_as_jobs(launcher, tmp_path):
    for name in ("configs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("torchlayers", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs" / "sweep" / "small.yaml").write_text(SWEEP)
    command = [sys.executable, "tools/slurm.py", "sweep=small", f"hydra/launcher={launcher}"]
    command.append("overrides=['data.batch_size=200']")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=kept | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    folder = tmp_path / "runs" / "sweep" / "small"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"dense-seed0", "low_rank-seed0"}
    results = json.loads((folder / "results.json").read_text())
    assert set(results["results"]) == {"dense", "low_rank"} and not results["failed"]
    assert "batch_size: 200" in (folder / "dense-seed0" / "config.yaml").read_text()
    assert "| dense " in (folder / "table.md").read_text()
