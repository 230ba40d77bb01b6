"""Comparisons: several arms over several seeds, one after the other, with one table and one plot.

A file of ``configs/sweep``::

    # what it compares, in a line
    experiment: tfno_darcy
    overrides: [trainer.max_epochs=20]      # of every run
    arms:
      dense: [model.factorization=dense]
      tucker: [model.factorization=tucker]
    seeds: [0, 1, 2]
    metrics: [test/l2_16, test/l2_32]       # columns of the table; all test metrics by default

A run whose ``summary.json`` is there is complete and is not repeated; one that was stopped is resumed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import replacing, write_json
from .compose import Override, _names, _nearest, _read_yaml, compose, expand, parse, resume_config
from .context import execute
from .errors import ConfigError, TrainingError
from .log import logger
from .plots import comparison
from .runtime import open_runtime

__all__ = ["Sweep", "ad_hoc_sweep", "named_sweep", "run_sweep"]


@dataclass
class Sweep:
    """What a sweep runs and where; ``arms`` are lists of overrides by name."""

    name: str
    folder: str
    experiment: str
    arms: dict[str, list[str]]
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)


def named_sweep(overrides: Sequence[Override], config_dir: Path) -> Sweep:
    """The sweep that ``sweep=NAME`` names; other overrides hold for each of its runs, ``run_dir`` is its folder."""
    name = str(next(o.value for o in overrides if o.key == "sweep"))
    known = _names(config_dir / "sweep")
    if name not in known:
        raise ConfigError(f"unknown sweep {name!r}{_nearest(name, known)}; there are {', '.join(known)}")
    path = config_dir / "sweep" / f"{name}.yaml"
    raw = _read_yaml(path)
    wrong = sorted(raw.keys() - {"experiment", "arms", "seeds", "overrides", "metrics"})
    if wrong or not {"experiment", "arms"} <= raw.keys():
        raise ConfigError(f"{path} must have experiment and arms, may have seeds, overrides and metrics; got {wrong}")
    _refuse(overrides, "experiment", "resume", "seed")
    folder = next((str(o.value) for o in overrides if o.key == "run_dir"), str(Path("runs") / "sweep" / name))
    given = [o.text for o in overrides if o.key not in ("sweep", "run_dir")]
    common = [*raw.pop("overrides", []), *given]
    return Sweep(name=name, folder=folder, overrides=common, **raw)


def ad_hoc_sweep(overrides: Sequence[Override]) -> Sweep:
    """The sweep of ``--multirun``: an arm for each combination of the values named, ``seed=0,1,2`` for the seeds."""
    _refuse(overrides, "resume")
    experiment = next((o.value for o in overrides if o.key == "experiment"), None)
    if experiment is None:
        raise ConfigError("--multirun needs one experiment=NAME")
    given = next((o for o in overrides if o.key == "seed"), None)
    try:
        seeds = [0] if given is None else [int(choice) for choice in given.choices or (given.value,)]
    except (TypeError, ValueError):
        raise ConfigError(f"{given.text!r} must name integers") from None  # type: ignore[union-attr]
    swept = [o for o in overrides if o.choices and o.key != "seed"]
    arms = {",".join(combination) or "run": combination for combination in expand(swept)}
    folder = next((str(o.value) for o in overrides if o.key == "run_dir"), None)
    folder = folder or str(Path("runs") / "multirun" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    common = [o.text for o in overrides if not o.choices and o.key not in ("experiment", "seed", "run_dir")]
    return Sweep(f"{experiment} --multirun", folder, str(experiment), arms, seeds, common)


def run_sweep(sweep: Sweep, config_dir: Path) -> int:
    """Run what is not yet complete, then write ``table.md``, ``results.json`` and ``plot.png``; the exit code.

    A run that fails is reported and does not keep the others from running.

    Raises:
        ConfigError: a run of the sweep is not valid (before the first one starts), or the folder holds another sweep.
        Interrupted: after SIGTERM or Ctrl-C; the same command goes on from there.
    """
    runs = []
    for arm, arm_overrides in sweep.arms.items():
        for seed in sweep.seeds:
            own = [f"experiment={sweep.experiment}", *sweep.overrides, *arm_overrides, f"seed={seed}"]
            runs.append((arm, seed, compose(parse(own), config_dir)))

    def look() -> list[tuple[str, bool, bool]]:
        claim(Path(sweep.folder), sweep)
        places = [Path(sweep.folder) / f"{_file_name(arm)}-seed{seed}" for arm, seed, _ in runs]
        return [(str(p), (p / "config.yaml").exists(), (p / "summary.json").exists()) for p in places]

    with open_runtime(runs[0][2]) as runtime:  # rank 0 looks for all: folders change as soon as the first one writes
        main, found = runtime.main, runtime.on_main(look)
    table: dict[str, dict[str, list[float]]] = {arm: {} for arm in sweep.arms}
    failed = []
    for number, ((arm, seed, config), (place, started, complete)) in enumerate(zip(runs, found, strict=True), start=1):
        if not complete:
            if main:
                logger.info(f"sweep {sweep.name}: run {number} of {len(runs)}, {arm}, seed {seed}")
            config.run_dir = place
            if started:
                config = resume_config([Override("resume", place, f"resume={place}")])
            try:
                execute(config)
            except TrainingError as error:
                if main:
                    logger.info(f"sweep {sweep.name}: {arm}, seed {seed} failed: {error}")
                failed.append(f"{arm}, seed {seed}: {error}")
                continue
        if main:
            for name, value in json.loads((Path(place) / "summary.json").read_text())["metrics"].items():
                table[arm].setdefault(name, []).append(value)
    if main:
        _report(Path(sweep.folder), sweep, table, failed)
    return 1 if failed else 0


def _report(folder: Path, sweep: Sweep, table: dict[str, dict[str, list[float]]], failed: list[str]) -> None:
    found = list(dict.fromkeys(m for arm in table.values() for m in arm))
    metrics = sweep.metrics or [m for m in found if m.startswith("test/")] or found
    columns = [*metrics, *(["parameters"] if "parameters" in found and "parameters" not in metrics else [])]
    rows = [["", *columns]]
    for arm, values in table.items():
        rows.append([arm, *(_cell(values.get(column, [])) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    note = f"Mean ± standard deviation over {len(sweep.seeds)} seed{'s' if len(sweep.seeds) > 1 else ''}."
    text = "\n".join([*lines, "", note, *(f"Failed: {f}" for f in failed)])
    (folder / "table.md").write_text(text + "\n")
    write_json(folder / "results.json", {"sweep": asdict(sweep), "results": table, "failed": failed}, indent=1)
    shown = {arm: {m: v for m, v in values.items() if m in metrics} for arm, values in table.items()}
    if any(shown.values()):
        comparison(shown, folder / "plot.png", title=f"{sweep.name}: each seed, mean and standard deviation")
    logger.info(f"{text}\nsweep folder: {folder}")


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    shown = f"{mean:.0f}" if mean >= 1000 else f"{mean:.4g}"
    return shown if len(values) < 2 or len(set(values)) == 1 else f"{mean:.4g} ± {statistics.stdev(values):.2g}"


def claim(folder: Path, sweep: Sweep) -> None:
    """Note what the folder holds, or check that it holds this."""
    path = folder / "sweep.json"
    definition: dict[str, Any] = {
        k: v for k, v in asdict(sweep).items() if k not in ("folder", "metrics", "seeds", "arms")
    }
    try:
        if not path.exists():
            if folder.is_dir() and any(folder.iterdir()):
                raise ConfigError(f"run_dir {folder} is not empty and holds no sweep")
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                write_json(partial, {**definition, "arms": sweep.arms}, indent=1)
            return
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"run_dir {folder} cannot be used: {error}") from None
    # Arms and seeds may be added to a sweep; what its runs share, and what an arm means, may not change.
    held_arms = held.pop("arms", {})
    changed = [k for k in definition if held.get(k) != definition[k]]
    changed += [f"arm {a}" for a in sweep.arms if a in held_arms and held_arms[a] != sweep.arms[a]]
    if changed:
        raise ConfigError(f"{folder} holds another sweep ({', '.join(changed)} differ): give another run_dir")
    with replacing(path) as partial:
        write_json(partial, {**definition, "arms": {**held_arms, **sweep.arms}}, indent=1)


def _refuse(overrides: Sequence[Override], *keys: str) -> None:
    for override in overrides:
        if override.key in keys:
            raise ConfigError(f"{override.text!r} has no place in a sweep")


def _file_name(arm: str) -> str:
    return "".join(c if c.isalnum() or c in "._-=+" else "_" for c in arm)
