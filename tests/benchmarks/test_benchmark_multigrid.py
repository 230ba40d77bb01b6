"""What the memory benchmark of patches over ranks measures, against sizes counted by hand."""

import sys

import pytest
import torch

from benchmarks import multigrid
from benchmarks._harness import OURS, Settings


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def step():
        y = x @ w  # saves x and w
        return (y * y + y.exp()).sum()  # saves y, twice, and exp(y)

    everything = 4 * (40 + 12 + 30 + 30)
    assert multigrid.saved_bytes(step, set()) == everything
    assert multigrid.saved_bytes(step, {w.untyped_storage().data_ptr()}) == everything - 4 * 12


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_growth_sees_what_a_step_touches():
    size = 64 * 2**20

    def step():
        torch.ones(size, dtype=torch.uint8)

    growth = multigrid.resident_growth(step)
    assert growth is None or growth == pytest.approx(size, rel=0.1)
    idle = multigrid.resident_growth(lambda: None)
    assert idle is None or idle < 2**22


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_ranks_hold_half_each():
    one, two = (row["implementations"][OURS] for row in multigrid.measure(Settings(quick=True)))
    assert one["status"] == two["status"] == "ok"
    assert two["peak_bytes"] == pytest.approx(one["peak_bytes"] / 2, rel=0.1)


def test_nothing_to_measure_on_a_gpu_or_for_speed():
    assert multigrid.measure(Settings(memory=False)) == []
    assert multigrid.measure(Settings(device=torch.device("cuda"))) == []
