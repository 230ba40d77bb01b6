"""What all tests share: one thread, fixed seeds, which kernel tests this process can run, programs as of torchrun."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests/training/toy.py"
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where a kernel test runs: the GPU, or the CPU in a process started for Triton's interpreter."""
    if INTERPRET:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("needs a GPU, or a process started with TRITON_INTERPRET=1")


@pytest.fixture
def spawn(tmp_path):
    """Run ``program`` in ``world`` processes, as torchrun would: their exit codes, outputs and errors."""
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
