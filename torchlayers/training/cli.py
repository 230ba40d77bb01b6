"""The command line of ``train.py``."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .compose import compose, describe, parse, resume_config, to_yaml
from .context import execute, restarted
from .errors import ConfigError, Interrupted, TrainingError
from .log import logger
from .runtime import is_lost_rank
from .sweep import ad_hoc_sweep, named_sweep, run_sweep

__all__ = ["main"]

_USAGE = """train.py experiment=NAME [key=value ...]      train one model, or run one study
       train.py resume=FOLDER                        continue a run
       train.py sweep=NAME [key=value ...]           a comparison of configs/sweep
       train.py experiment=NAME key=a,b --multirun   all combinations of the values named
       torchrun --nproc-per-node N train.py ...      the same on several processes
       train.py experiment=NAME [key=value ...] --cfg    show the resolved config and stop"""


def main(arguments: Sequence[str] | None = None, *, config_dir: str | Path) -> int:
    """Run what the command line asks for; the exit code.

    Returns:
        0; 2 for an error in what was asked (before anything ran); 1 for a run that failed; 143 or 130 after SIGTERM or
        Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="train.py", usage=_USAGE, add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true", help="list experiments, sweeps and keys")
    parser.add_argument("-m", "--multirun", action="store_true", help="run all combinations of the values named")
    parser.add_argument("--cfg", action="store_true", help="show the resolved config and stop")
    options = parser.parse_intermixed_args(arguments)
    log_to_stdout()
    rank = os.environ.get("RANK")
    who = "train.py" if rank is None else f"train.py (rank {rank})"
    try:
        return _dispatch(parser, options, Path(config_dir))
    except ConfigError as error:
        sys.stderr.write(f"{who}: error: {error}\n")
        return 2
    except TrainingError as error:
        sys.stderr.write(f"{who}: stopped: {error}\n")
        return 1
    except Interrupted as error:
        if rank in (None, "0"):
            sys.stderr.write(f"{who}: {error}\n")
        return error.code
    except KeyboardInterrupt:
        sys.stderr.write(f"{who}: interrupted outside a step; nothing was written since the last checkpoint\n")
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        sys.stderr.write(f"{who}: stopped: {error}; resume= goes on from the last checkpoint\n")
        return 1
    except RuntimeError as error:
        if rank is None or not is_lost_rank(error):
            raise
        reason = " ".join(str(error).split())
        sys.stderr.write(
            f"{who}: stopped: another rank is gone or did not answer within trainer.timeout; resume= goes on from the"
            f" last checkpoint ({reason})\n"
        )
        return 1


def _dispatch(parser: argparse.ArgumentParser, options: argparse.Namespace, config_dir: Path) -> int:
    overrides = parse(options.overrides)
    chosen = {o.key: o.value for o in overrides if not o.choices}
    if options.help:
        sys.stdout.write(parser.format_help().split("positional arguments:")[0])
        sys.stdout.write(describe(config_dir, chosen.get("experiment")) + "\n")
        return 0
    if "sweep" in chosen:
        return run_sweep(named_sweep(overrides, config_dir), config_dir)
    if options.multirun:
        return run_sweep(ad_hoc_sweep(overrides), config_dir)
    if chosen.get("resume") is None and chosen.get("run_dir") is not None and restarted(Path(chosen["run_dir"])):
        overrides = parse([f"resume={chosen['run_dir']}"])
    resumed = any(o.key == "resume" and o.value is not None for o in overrides)
    config = resume_config(overrides) if resumed else compose(overrides, config_dir)
    if options.cfg:
        sys.stdout.write(to_yaml(config))
        return 0
    execute(config)
    return 0


def log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
