"""What ``train.py`` is made of: configs, the loop, checkpoints, logging, sweeps. It names no family.

An experiment is a config dataclass and a :class:`Task` (or, for a study, a function of a :class:`Context`), entered by
:func:`register` in ``torchlayers/experiments/<name>.py``; :func:`load_run` gives a run's trained model back.
"""

from .config import Config, DataConfig, group, key
from .context import Context, execute
from .errors import ConfigError, Interrupted, TrainingError
from .loop import load_run
from .registry import register
from .task import Data, Task, TensorSet

__all__ = [
    "Config",
    "ConfigError",
    "Context",
    "Data",
    "DataConfig",
    "Interrupted",
    "Task",
    "TensorSet",
    "TrainingError",
    "execute",
    "group",
    "key",
    "load_run",
    "register",
]
