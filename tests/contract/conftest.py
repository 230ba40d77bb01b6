"""Makes the contract's own modules importable, by names of their own, here and in the processes that tests start."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
pytest.register_assert_rewrite("contract_checks")
