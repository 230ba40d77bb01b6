"""Names that a config may use: experiments, optimizers and schedulers. A config never holds an import path."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .._checks import check_choice

if TYPE_CHECKING:
    from .config import Config
    from .context import Context
    from .task import Task

__all__ = ["OPTIMIZERS", "SCHEDULERS", "Experiment", "experiment_names", "get_experiment", "register"]

T = TypeVar("T")
Run = Callable[["Context"], "dict[str, float] | None"]

_EXPERIMENTS: dict[str, Experiment] = {}
# Config classes by name; `optimizer=NAME` and `scheduler=NAME` choose among them.
OPTIMIZERS: dict[str, type] = {}
SCHEDULERS: dict[str, type] = {}


@dataclass(frozen=True)
class Experiment:
    """A registered experiment: its config class, what runs it, and the task it trains (None for a study)."""

    name: str
    config: type[Config]
    run: Run
    task: Callable[[Any], Task] | None = None


def register(name: str, config: type[Config], *, task: Callable[[Any], Task] | None = None) -> Callable[[Run], Run]:
    """Register the experiment ``name``.

    An experiment that trains a model names its task and is complete with that, it runs ``context.fit(task(config))``::

        register("tfno_darcy", TFNODarcy, task=DarcyTask)

    A study, which does not train by gradient steps, decorates a function instead; what the function returns are its
    final metrics::

        @register("expressivity", Expressivity)
        def run(context):
            ...
            return {"pairs_separated": 140.0}

    Raises:
        ValueError: another experiment has that name.
    """
    if name in _EXPERIMENTS and _EXPERIMENTS[name].config.__module__ != config.__module__:
        raise ValueError(f"name must be new to the registry of experiments, got {name!r}")

    def decorate(run: Run) -> Run:
        _EXPERIMENTS[name] = Experiment(name, config, run, task)
        return run

    if task is not None:
        decorate(lambda context: context.fit(task(context.config)))
    return decorate


def experiment_names() -> list[str]:
    """All experiments that ``task:`` in a config may name: those registered so far and those not yet imported."""
    from .. import experiments

    modules = {module.name for module in pkgutil.iter_modules(experiments.__path__) if module.name[0] != "_"}
    return sorted(modules | _EXPERIMENTS.keys())


def get_experiment(name: str) -> Experiment:
    """The experiment ``name``, from ``torchlayers/experiments/<name>.py`` unless it is registered already."""
    if name not in _EXPERIMENTS:
        check_choice("task", name, experiment_names())
        importlib.import_module(f"torchlayers.experiments.{name}")
    return _EXPERIMENTS[name]


def named(registry: dict[str, type], name: str) -> Callable[[type[T]], type[T]]:
    """Enter the decorated config class into ``registry`` under ``name``."""

    def enter(cls: type[T]) -> type[T]:
        registry[name] = cls
        return cls

    return enter
