"""A sweep of ``configs/sweep`` with a Slurm job for each of its runs, by Hydra's submitit launcher.

    pip install hydra-submitit-launcher
    python tools/slurm.py sweep=tfno_darcy hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1
    python tools/slurm.py sweep=tfno_darcy hydra/launcher=submitit_local        # the jobs on this machine, all at once
    python tools/slurm.py sweep=tfno_darcy hydra/launcher=basic                 # ... one after the other, no plugin

``configs/slurm`` says what a job asks for. A job is what ``python train.py sweep=NAME`` does for one run, in the same
folder: the command, given again, resumes what was cut off and repeats nothing that is complete. It waits for the jobs
and then writes the table and the plot; ``python train.py sweep=NAME`` does so, too.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import hydra

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # for the jobs

from torchlayers.training import cli, compose  # noqa: E402
from torchlayers.training.sweep import Sweep, claim, named_sweep, run_sweep  # noqa: E402


def sweep_of(config: Any) -> Sweep:
    return named_sweep(compose.parse([f"sweep={config.sweep}", *config.overrides]), CONFIGS)


@hydra.main(version_base="1.3", config_path=str(CONFIGS / "slurm"), config_name="config")
def job(config: Any) -> None:
    """One run of the sweep, in a process of the cluster."""
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export()  # what torchrun would set
    cli.log_to_stdout()
    sweep = sweep_of(config)
    arm, seed = [(arm, seed) for arm in sweep.arms for seed in sweep.seeds][config.run]
    run_sweep(dataclasses.replace(sweep, arms={arm: sweep.arms[arm]}, seeds=[seed]), CONFIGS)


def main() -> int:
    own = [argument for argument in sys.argv[1:] if not argument.startswith(("hydra", "-"))]
    with hydra.initialize_config_dir(str(CONFIGS / "slurm"), version_base="1.3"):
        sweep = sweep_of(hydra.compose("config", overrides=[*own, "hydra/launcher=basic"]))
    claim(Path(sweep.folder), sweep)  # the folder, before jobs do it all at once
    runs = range(len(sweep.arms) * len(sweep.seeds))
    sys.argv.append(f"run={','.join(map(str, runs))}")
    job()
    cli.log_to_stdout()
    return run_sweep(sweep, CONFIGS)  # of which all is complete: the table and the plot


if __name__ == "__main__":
    sys.exit(main())
