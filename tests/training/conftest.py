"""The toy experiment, in this process and in others."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest

TOY = Path(__file__).parent / "toy.py"


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
