"""How a launch configuration is chosen, with the GPU's part replaced: it needs none."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from torchlayers.kernels import _lib

if _lib.INTERPRET:
    pytest.skip("the interpreter always takes the default", allow_module_level=True)

CANDIDATES = [{"BH": 16}, {"BH": 32}, {"BH": 64}, {"BH": 128}]
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A pretended GPU on which BH = 32 is fastest and 128 does not fit; gives the list of what was measured."""
    measured = []
    times = {16: 3.0, 32: 1.0, 64: 2.0}

    def do_bench(run, **options):
        measured.append(run())
        if measured[-1] not in times:
            raise OutOfResources(1, 0, "shared memory")
        return times[measured[-1]]

    monkeypatch.setattr(_lib, "AUTOTUNE", True)
    monkeypatch.setattr(_lib, "_PICKED", {})
    monkeypatch.setattr(_lib.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return measured


def pick(key=("fp32", 64), candidates=CANDIDATES):
    return _lib.pick("kernel", key, candidates, lambda candidate: candidate["BH"], DEVICE)


def test_the_fastest_that_fits_is_measured_once_and_kept_on_disk(gpu, monkeypatch):
    assert pick() == pick() == {"BH": 32}
    assert gpu == [16, 32, 64, 128]
    monkeypatch.setattr(_lib, "_PICKED", {})  # as a later process
    assert pick() == {"BH": 32} and len(gpu) == 4
    pick(key=("fp32", 128))
    assert len(gpu) == 8


def test_other_candidates_are_measured_anew(gpu):
    assert pick() == {"BH": 32}
    _lib._PICKED.clear()
    assert pick(candidates=[{"BH": 16}, {"BH": 64}]) == {"BH": 64}


@pytest.mark.parametrize("reason", ["switched off", "deterministic", "capturing", "one candidate"])
def test_the_default_is_taken_unmeasured(reason, gpu, monkeypatch):
    candidates = CANDIDATES
    if reason == "switched off":
        monkeypatch.setattr(_lib, "AUTOTUNE", False)
    elif reason == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif reason == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        candidates = CANDIDATES[:1]
    assert pick(candidates=candidates) == {"BH": 16}
    assert gpu == []
    if reason == "capturing":  # and not remembered: the first call outside the capture measures
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert pick() == {"BH": 32}


def test_bucket():
    assert [_lib.bucket(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
