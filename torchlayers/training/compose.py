"""From a command line to plain dataclasses, and from a run folder back to them.

Hydra composes the files of ``configs/`` over the experiment's dataclass and reads the grammar of ``a.b=c``; values are
then assigned one by one, so that an error can name its key and the nearest valid one. What leaves here is a
:class:`~torchlayers.training.config.Config`: nothing deeper knows Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from .._checks import require
from .config import Config
from .errors import ConfigError
from .registry import OPTIMIZERS, SCHEDULERS, Experiment, experiment_names, get_experiment

__all__ = ["Override", "compose", "describe", "expand", "load_config", "parse", "resume_config", "to_yaml"]

_GROUPS = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULERS}
# What `resume=FOLDER` may change: limits, where and on how many ranks it runs, and what it shows.
_RESUMABLE = (
    "resume",
    "mesh.",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.device",
    "trainer.timeout",
    "trainer.log_every",
    "trainer.progress",
    "trainer.tensorboard",
)


@dataclasses.dataclass(frozen=True)
class Override:
    """One ``key=value`` of the command line; ``choices`` are its values where it is a sweep such as ``a=1,2``."""

    key: str
    value: Any
    text: str
    choices: tuple[str, ...] = ()


def parse(arguments: Sequence[str]) -> list[Override]:
    """Read ``key=value`` arguments by Hydra's grammar."""
    require("hydra", extra="train")
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    parser = OverridesParser.create()
    parsed = []
    for text in arguments:
        key, _, value = text.partition("=")
        if key in ("run_dir", "resume") and value not in ("", "null") and value[0] not in "'\"":
            parsed.append(Override(key, value, text))  # a path as it is: Hydra would refuse "=" and split at ","
            continue
        try:
            override = parser.parse_overrides([text])[0]
        except OverrideParseException as error:
            raise ConfigError(f"{text!r} must read key=value: {_first_line(error)}") from None
        if override.is_delete() or override.is_add():
            raise ConfigError(f"{text!r} must read key=value; keys can be neither added nor removed")
        if override.is_sweep_override():
            choices = tuple(str(choice) for choice in override.sweep_string_iterator())
            parsed.append(Override(override.key_or_group, None, text, choices))
        else:
            parsed.append(Override(override.key_or_group, override.value(), text))
    return parsed


def expand(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """All combinations of the choices, as lists of ``key=value``."""
    swept = [[f"{o.key}={choice}" for choice in o.choices] for o in overrides if o.choices]
    yield from (list(combination) for combination in itertools.product(*swept))


def compose(overrides: Sequence[Override], config_dir: Path) -> Config:
    """The config of a new run.

    Raises:
        ConfigError: an unknown experiment, key or group choice (the nearest valid one is named), a value of the wrong
            type or out of its range, or an error in a file of ``config_dir``.
    """
    for override in overrides:
        if override.choices:
            raise ConfigError(f"{override.text!r} names several values: that is a sweep, add --multirun")
    name = next((o.value for o in overrides if o.key == "experiment"), None)
    known = _names(config_dir / "experiment")
    if name is None:
        raise ConfigError(f"which experiment? experiment=NAME, with NAME one of {', '.join(known)} (--help says more)")
    if name not in known:
        raise ConfigError(f"unknown experiment {name!r}{_nearest(str(name), known)}; there are {', '.join(known)}")
    experiment = _experiment(_read_yaml(config_dir / "experiment" / f"{name}.yaml").get("task", name))
    groups = {*_GROUPS, "experiment", *(p.name for p in config_dir.iterdir() if p.is_dir())}
    config = _compose_files([o for o in overrides if o.key in groups], experiment, config_dir)
    config.experiment = name
    config.task = experiment.name
    for override in overrides:
        if override.key not in groups:
            _assign(config, override)
    return _to_object(config)


def load_config(folder: str | Path) -> Config:
    """The config that a run folder holds.

    Raises:
        ConfigError: the folder is no run, or its config does not fit the experiment as it is.
    """
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        what = "has no config.yaml" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"{folder} is not a run: it {what}")
    OmegaConf = require("omegaconf", extra="train").OmegaConf
    raw = _read_yaml(path)
    try:
        schema = OmegaConf.structured(_experiment(str(raw["task"])).config)
        for group, registry in _GROUPS.items():
            schema[group] = OmegaConf.structured(registry[raw[group]["name"]])
        merged = OmegaConf.merge(schema, raw)
    except KeyError as error:
        raise ConfigError(f"{path} is not the config of a run: {error} is missing or unknown") from None
    except (require("omegaconf.errors", extra="train").OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{path} does not fit the experiment: {_first_line(error)}") from None
    return _to_object(merged)


def resume_config(overrides: Sequence[Override]) -> Config:
    """The config of the run that ``resume=`` names, with what may change in it changed."""
    OmegaConf = require("omegaconf", extra="train").OmegaConf
    folder = next(o.value for o in overrides if o.key == "resume")
    loaded = load_config(str(folder))
    config = OmegaConf.structured(loaded)
    for override in overrides:
        if override.choices:
            raise ConfigError(f"{override.text!r} names several values; a run is resumed with one")
        if override.key == "experiment" and override.value == loaded.experiment:
            continue
        if not override.key.startswith(_RESUMABLE):
            allowed = ", ".join(k + "*" if k.endswith(".") else k for k in _RESUMABLE[1:])
            raise ConfigError(
                f"{override.text!r} cannot be changed on resume: {folder} goes on with its own config"
                f" (experiment {loaded.experiment}), but for {allowed}"
            )
        _assign(config, override)
    config.run_dir = str(folder)
    return _to_object(config)


def to_yaml(config: Config) -> str:
    """The config as YAML, which :func:`load_config` reads back."""
    OmegaConf = require("omegaconf", extra="train").OmegaConf
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe(config_dir: Path, experiment: str | None = None) -> str:
    """What ``--help`` says of experiments, sweeps and keys (those of ``experiment`` where one is named)."""
    lines = []
    for kind in ("experiment", "sweep"):
        lines.append(f"{kind}s ({kind}=NAME):")
        for name in _names(config_dir / kind):
            lines.append(f"  {name:26} {_about(config_dir / kind / f'{name}.yaml')}")
        lines.append("")
    if experiment is None:
        lines.append("keys that every experiment has (experiment=NAME --help shows that experiment's own):")
        config: Config = Config()
    else:
        lines.append(f"keys of {experiment}:")
        config = compose(parse([f"experiment={experiment}"]), config_dir)
    return "\n".join(lines + list(_describe_keys(config, "")))


def _describe_keys(node: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, name, about = getattr(node, field.name), prefix + field.name, field.metadata.get("help", "")
        if dataclasses.is_dataclass(value):
            if field.name in _GROUPS:
                yield f"  {name:36} {getattr(value, 'name', '')} (one of {', '.join(_GROUPS[field.name])})"
            yield from _describe_keys(value, name + ".")
        elif name not in ("optimizer.name", "scheduler.name", "experiment", "task"):
            hint = hints[field.name]
            kind = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", ()) else str(hint)
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            yield f"  {f'{name}={shown}':36} {about} [{kind.replace('typing.', '')}]"


def _compose_files(groups: Sequence[Override], experiment: Experiment, config_dir: Path) -> Any:
    hydra = require("hydra", extra="train")
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema = OmegaConf.structured(experiment.config)
    store = ConfigStore.instance()
    for group, registry in _GROUPS.items():
        schema[group] = "???"  # a choice of the group fills it: a class cannot be merged over another
        for name, node in registry.items():
            store.store(group=group, name=name, node=node)
    store.store(name="schema", node=schema)
    for override in groups:
        if override.key in _GROUPS and override.value not in _GROUPS[override.key]:
            names = list(_GROUPS[override.key])
            raise ConfigError(f"unknown {override.text!r}{_nearest(str(override.value), names)}; there are {names}")
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            return hydra.compose("config", overrides=[o.text for o in groups])
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error)
        found = re.search(r"Key '(\w+)' not in '\w+'\s+full_key: ([\w.]+)", text)
        hint = _nearest(found.group(2), list(_flatten(schema))) if found else ""
        raise ConfigError(f"{config_dir}: {' '.join(text.split())}{hint}") from None


def _assign(config: Any, override: Override) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if override.key == "task":
        raise ConfigError(f"{override.text!r} belongs in a file of configs/experiment: choose one by experiment=NAME")
    keys = list(_flatten(config))
    if override.key not in keys:
        if any(k.startswith(override.key + ".") for k in keys):
            raise ConfigError(f"{override.key!r} is a group of keys: name one, such as {override.key}.KEY=VALUE")
        raise ConfigError(f"unknown key {override.key!r}{_nearest(override.key, keys)} (--help lists the keys)")
    try:
        OmegaConf.update(config, override.key, override.value, merge=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{override.text!r}: {_first_line(error)}") from None


def _to_object(config: Any) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except (ValueError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from None


def _flatten(config: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import OmegaConf

    for name in config:
        if not OmegaConf.is_missing(config, name) and OmegaConf.is_dict(config[name]):
            yield from _flatten(config[name], f"{prefix}{name}.")
        else:
            yield prefix + name


def _experiment(task: str) -> Experiment:
    if task not in experiment_names():
        raise ConfigError(f"unknown task {task!r}{_nearest(task, experiment_names())}")
    return get_experiment(task)


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _about(path: Path) -> str:
    """The first comment of a file that is not a directive of Hydra's."""
    comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((c for c in comments if not c.startswith("@package")), "")


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = require("yaml", extra="train")
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(raw).__name__}")
    return raw


def _nearest(key: str, known: Sequence[str]) -> str:
    """``; did you mean ...?``: by the whole key, else by its last part."""
    near = difflib.get_close_matches(key, known, n=1)
    if not near:
        last = {k.rpartition(".")[2]: k for k in reversed(known)}
        near = [last[k] for k in difflib.get_close_matches(key.rpartition(".")[2], list(last), n=1)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
