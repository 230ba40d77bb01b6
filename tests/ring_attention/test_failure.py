"""Ranks that die or hang in the middle of a ring: the run ends with a message and goes on from its checkpoint on fewer.

Run as a program, this file is ``train.py`` with a fault: FAULT="die forward 1 4" kills rank 1 in its fourth step before
its part of the forward ring, "hang backward 2 3" stops rank 2 in its third before its part of the backward ring.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["experiment=ring_lm", "trainer.max_steps=6", "trainer.log_every=1", "trainer.tensorboard=false"]
COMMON += ["data.context=31", "data.batch_size=4", "data.train_bytes=3000", "data.test_windows=2", "model.width=16"]
COMMON += ["mesh.dp=1", "mesh.sp=-1", "checkpoint.every=2", "checkpoint.keep=9"]
HANG_S = 40.0


pytestmark = pytest.mark.distributed


def train(*arguments):
    from torchlayers.training.cli import main

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of matplotlib's own
        return main(arguments, config_dir=ROOT / "configs")


@pytest.fixture
def alone(tmp_path):
    """One process's unbroken run."""

    def call(*arguments):
        assert train(*COMMON, *arguments, f"run_dir={tmp_path / 'alone'}") == 0
        return tmp_path / "alone"

    return call


def losses(lines):
    return [line["loss"] for line in lines]


@pytest.mark.parametrize(("when", "fewer"), [("forward", 2), ("backward", 1)])
def test_a_rank_that_dies_in_the_ring_ends_the_run_and_fewer_go_on(
    when, fewer, spawn, metrics, alone, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    monkeypatch.setenv("FAULT", f"die {when} 1 4")
    program = Path(__file__)
    # By the closed connection: a rank that waited for the time-out would outlive the spawner's.
    codes, _, errors = spawn(3, *COMMON, "trainer.timeout=900", f"run_dir={run}", program=program, timeout=400)
    assert codes == [1, -signal.SIGKILL, 1], errors
    for rank in (0, 2):
        assert f"train.py (rank {rank}): stopped: another rank is gone" in errors[rank]
        assert "Traceback" not in errors[rank]
    assert max((run / "checkpoints").iterdir()).name == "step_000000002"

    monkeypatch.delenv("FAULT")
    if fewer == 1:
        assert train(f"resume={run}") == 0
    else:
        codes, _, errors = spawn(fewer, f"resume={run}", program=program)
        assert codes == [0] * fewer, errors
    assert losses(metrics(run)) == pytest.approx(losses(metrics(alone())), abs=1e-5)


@pytest.mark.slow
def test_a_rank_that_hangs_in_the_ring_ends_the_others_within_the_time_out(spawn, tmp_path, monkeypatch):
    """Two groups of two ranks: the time-out holds for their own process groups too, not just for the whole world's."""
    monkeypatch.setenv("FAULT", "hang backward 2 3")
    monkeypatch.setenv("TOGETHER", str(tmp_path / "started"))
    mesh = ["mesh.dp=2", "mesh.sp=2", "trainer.timeout=10"]
    codes, _, errors = spawn(4, *COMMON, *mesh, f"run_dir={tmp_path / 'run'}", program=Path(__file__))
    assert codes[2] == 9
    assert codes[3] == 1  # waits in the ring for rank 2
    assert "stopped: another rank is gone or did not answer within trainer.timeout" in errors[3]
    assert "Timed out waiting 10000ms" in errors[3]
    assert all(code == 1 for rank, code in enumerate(codes) if rank != 2)
    assert (tmp_path / "run" / "checkpoints" / "step_000000002").is_dir()


def children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def wait_for(condition, what, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {seconds:.0f} s"
        time.sleep(0.05)


def agent(port, run, arguments, log):
    """``torchrun`` with one process, in a rendezvous of one or two agents."""
    rendezvous = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    rendezvous += ["--rdzv-id", "ring", "--rdzv-endpoint", f"127.0.0.1:{port}", "--monitor-interval", "0.2"]
    rendezvous += ["--rdzv-conf", "last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=3"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, __file__, *arguments, f"run_dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": "slow"}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the agent's worker through Linux's /proc")
def test_one_of_two_torchrun_agents_is_killed_and_the_run_goes_on(alone, metrics, tmp_path):
    run = tmp_path / "run"
    longer = ["trainer.max_steps=40", "checkpoint.keep=99", "trainer.timeout=60"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def listening():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(tmp_path / "log", "w+"))
        agents = []
        for _ in range(2):  # the first holds the store, so the second is the one that can be lost
            agents.append(agent(port, run, [*COMMON, *longer], log))
            stack.callback(lambda p=agents[-1]: (p.kill(), p.wait()))
            wait_for(listening, "the rendezvous")
        wait_for(lambda: (run / "checkpoints" / "step_000000004").is_dir(), "a checkpoint")
        for pid in [agents[1].pid, *children(agents[1].pid)]:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: agents[0].poll() is not None, "the end of the run")
        log.seek(0)
        said = log.read()
    assert agents[0].returncode == 0, said
    starts = json.loads((run / "versions.json").read_text())["starts"]
    assert [start["world"] for start in starts] == [2, 1]
    assert int(re.search(r"resuming after step (\d+) of 40", said)[1]) >= 4
    assert losses(metrics(run)) == pytest.approx(losses(metrics(alone(*longer))), abs=1e-5)


def program(arguments):
    """``train.py`` with the fault that FAULT describes."""
    import torch

    from torchlayers.experiments.ring_lm import RingLMTask

    torch.set_num_threads(1)
    kind, when, rank, step = (*os.environ.get("FAULT", "none").split(), "", "0", "0")[:4]
    mine = rank == os.environ.get("RANK")
    original, calls = RingLMTask.loss, 0

    def stop(*_):
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(HANG_S)
        os._exit(9)

    def loss(self, model, batch):
        nonlocal calls
        calls += 1
        if kind == "slow":  # so that a checkpoint is seen before the run is over
            time.sleep(0.2)
        struck = mine and calls == int(step)
        if struck and when == "forward":
            stop()
        nats, count = original(self, model, batch)
        if struck:
            nats.register_hook(stop)
        return nats, count

    RingLMTask.loss = loss
    if together := os.environ.get("TOGETHER"):  # a short time-out is for the ring, not for slow imports
        Path(f"{together}{os.environ['RANK']}").touch()
        wait_for(lambda: all(Path(f"{together}{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))), "ranks")
    return train(*arguments)


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
