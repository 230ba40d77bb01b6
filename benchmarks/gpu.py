"""``python -m benchmarks.gpu``: kernels on this machine's GPU, correctness first, then speed, one JSON.

Runs from the bare checkout in any environment that has torch, triton, einops and pytest, and installs nothing. The
file is rewritten after every step, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from typing import Any

MINIMUM_PYTHON = (3, 10)
MINIMUM = {"torch": (2, 11), "triton": (3, 6), "einops": (0, 8), "pytest": (7, 0)}
ROOT = pathlib.Path(__file__).resolve().parents[1]


def installed_version(distribution: str) -> str | None:
    import importlib.metadata

    # Vendors' builds install triton under names of their own; the package itself knows its version.
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        try:
            return str(getattr(__import__(distribution), "__version__", "0"))
        except ImportError:
            return None


def unmet(find: Callable[[str], str | None] = installed_version) -> list[str]:
    """What the environment lacks, a line each; empty if nothing."""
    lacking = []
    if sys.version_info < MINIMUM_PYTHON:
        lacking.append(f"python >= 3.10 is needed, this is {sys.version.split()[0]}")
    for name, minimum in MINIMUM.items():
        wanted = f"{name} >= {'.'.join(map(str, minimum))}"
        found = find(name)
        if found is None:
            lacking.append(f"{wanted} is needed, {name} is not installed")
        elif tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < minimum:
            lacking.append(f"{wanted} is needed, this is {found}")
    return lacking


def gpu_test_files(root: pathlib.Path = ROOT) -> list[str]:
    """Test files that use ``pytest.mark.gpu``: the others are not even imported, so what they need may be missing."""

    def is_mark(node: ast.AST) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "gpu"
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "mark"
        )

    found = sorted((root / "tests").rglob("test_*.py"))
    return [str(p.relative_to(root)) for p in found if any(map(is_mark, ast.walk(ast.parse(p.read_text()))))]


def read_junit(path: pathlib.Path) -> dict[str, Any]:
    """Counts, failures and reasons of skipping from a JUnit file."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[dict[str, str]] = []
    reasons: dict[str, int] = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skip = case.find("skipped")
        if bad:
            counts["failed"] += 1
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            failures.append({"test": name, "message": (bad[0].get("message") or "")[:500]})
        elif skip is not None:
            counts["skipped"] += 1
            reason = (skip.get("message") or "")[:200]
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures, "skip_reasons": reasons}


def run_tests() -> dict[str, Any]:
    """pytest over the kernels' tests on the GPU, in a process of its own."""
    files = gpu_test_files()
    if not files:
        return {"passed": 0, "failed": 0, "skipped": 0, "exit_code": 5, "files": []}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        junit = pathlib.Path(folder) / "junit.xml"
        # Warnings of versions that nobody has seen yet are no failures of a kernel.
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, f"--junitxml={junit}", *files], cwd=ROOT, env=environment, stdout=sys.stderr)
        summary = read_junit(junit) if junit.is_file() else {"passed": 0, "failed": 0, "skipped": 0}
    return {
        **summary,
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "files": files,
    }


def tests_passed(tests: dict[str, Any]) -> bool:
    """Something ran, and nothing failed."""
    return tests["exit_code"] == 0 and tests["passed"] > 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--only", choices=("tests", "benchmarks"), help="one half of the work")
    parser.add_argument("--quick", action="store_true", help="few cases and short timings")
    options = parser.parse_args(argv)

    lacking = unmet()
    if lacking:
        print("\n".join(["gpu: this environment cannot run it:", *(f"  {line}" for line in lacking)]), file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        build = "a CPU build" if torch.version.cuda is None and torch.version.hip is None else "a GPU build"
        print(f"gpu: torch {torch.__version__} ({build}) sees no GPU on this machine: nothing was run", file=sys.stderr)
        return 2

    from ._environment import environment, slug
    from ._harness import RESULTS, Settings, families, ours_failed, run_family, say
    from ._report import report

    device = torch.device("cuda", torch.cuda.current_device())
    out = options.out or RESULTS / f"gpu_{slug(device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"environment": environment(device), "quick": options.quick, "families": {}}
    complaints = []

    def write() -> None:
        out.write_text(json.dumps(document, indent=1) + "\n")

    if options.only != "benchmarks":
        say("gpu: correctness")
        document["tests"] = tests = run_tests()
        write()
        if not tests_passed(tests):
            complaints.append(f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
    if options.only != "tests":
        settings = Settings(device=device, quick=options.quick, budget_s=0.1 if options.quick else 0.5)
        for family in families():
            say(f"gpu: {family}")
            try:
                result = run_family(family, settings)
            except Exception as error:
                complaints.append(f"{family}: {type(error).__name__}: {error}")
                document["families"][family] = {"rows": [], "scaling": [], "failed": complaints[-1]}
            else:
                if not result["rows"]:
                    continue  # nothing of it concerns a GPU
                document["families"][family] = result
                complaints += [f"{family} {row}" for row in ours_failed(result)]
                print(report(family, result), flush=True)
            write()
    write()
    say(f"wrote {out}")
    for complaint in complaints:
        say(f"gpu: FAILED {complaint}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
