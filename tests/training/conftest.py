"""The toy experiment, in this process and in others."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

TOY = Path(__file__).parent / "toy.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def toy():
    """The module ``toy``, whose experiments are registered here by importing it."""
    if "toy_experiment" not in sys.modules:
        spec = importlib.util.spec_from_file_location("toy_experiment", TOY)
        module = importlib.util.module_from_spec(spec)
        sys.modules["toy_experiment"] = module
        spec.loader.exec_module(module)
    return sys.modules["toy_experiment"]


@pytest.fixture
def run(toy, capfd):
    """Call ``train.py``'s main with the toy's configs: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with warnings.catch_warnings():
            # tensorboard and matplotlib bring deprecations of their own.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            code = toy.main(list(arguments), config_dir=toy.CONFIGS)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def spawn(tmp_path):
    """Run ``script`` in ``world`` processes, as torchrun would: their exit codes, outputs and errors."""
    return _spawner(tmp_path)


@pytest.fixture(scope="module")
def spawn_once(tmp_path_factory):
    return _spawner(tmp_path_factory.mktemp("world"))


def _spawner(folder):
    def call(world: int, *arguments: str, program: Path = TOY, timeout: float = 120.0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        processes = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            env = base | {k: str(v) for k, v in place.items()} | {"MASTER_PORT": str(port)} if world > 1 else base
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(program), *arguments],
                    env=env,
                    cwd=folder,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            outputs = [p.communicate(timeout=timeout) for p in processes]
        finally:
            for process in processes:
                with process:
                    process.kill()
        return [p.returncode for p in processes], [o for o, _ in outputs], [e for _, e in outputs]

    def script(world: int, commands: list[list[str]], **options):
        out = folder / f"codes{world}-"
        codes, _, errors = call(world, "script", str(out), json.dumps(commands), **options)
        assert codes == [0] * world, "\n".join(errors)
        ranks = [json.loads(Path(f"{out}{rank if world > 1 else ''}").read_text()) for rank in range(world)]
        return ranks, errors

    call.script = script
    call.folder = folder
    return call


@pytest.fixture(scope="session")
def metrics():
    """The lines of a run, without what depends on the clock."""

    def read(folder) -> list[dict]:
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]

    return read
