"""What all tests share: one thread, fixed seeds, and which kernel tests this process can run."""

import os

import pytest
import torch

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
