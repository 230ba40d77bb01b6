"""``python -m benchmarks [FAMILY ...]``: measure, print the table, write the result file."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ._environment import environment, slug
from ._harness import RESULTS, Settings, families, ours_failed, run_family, say
from ._report import report


def write(path: pathlib.Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    say(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("family", nargs="*", metavar="FAMILY", help=f"of {', '.join(families())}; none means all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mode", choices=("all", "speed", "memory", "scaling"), default="all")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's own choice if not given)")
    parser.add_argument("--quick", action="store_true", help="few cases and short timings: does it run at all")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="one file for all that is measured")
    options = parser.parse_args(argv)
    unknown = [name for name in options.family if name not in families()]
    if unknown:
        parser.error(f"FAMILY must be of {', '.join(families())}, got {', '.join(unknown)}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    device = torch.device(options.device)
    settings = Settings(
        device=device,
        speed=options.mode != "memory",
        memory=options.mode != "speed",
        quick=options.quick,
        budget_s=0.2 if options.quick else 3.0,
    )
    where = environment(device)
    results, failed = {}, []
    for family in options.family or families():
        results[family] = run_family(family, settings, scaling_only=options.mode == "scaling")
        failed += [f"{family} {row}" for row in ours_failed(results[family])]
        print(report(family, results[family]), flush=True)
        if options.out is None and not options.quick and options.mode == "all":
            document = {"environment": where, "families": {family: results[family]}}
            write(RESULTS / f"{family}_{slug(device)}.json", document)
    if options.out is not None:
        write(options.out, {"environment": where, "families": results})
    elif options.quick or options.mode != "all":
        say("not written: part of the cases or modes only (--out FILE writes it)")
    for line in failed:
        say(f"no valid result of ours: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
