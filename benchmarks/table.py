"""``python -m benchmarks.table``: the performance tables of README.md and docs/performance.md, from the result files.

The region between the two markers is rewritten; ``--check`` only says whether it is current (exit code 1 if not).
Headline cases that no result file holds are listed as not measured: one by one in the documentation, by their number
in README.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._harness import OURS, RESULTS, ROOT, families, family_cases
from ._report import MISSING, error_cell, markdown, memory_cell, rate_cell, ratio_cell, shape, state, time_cell

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HEADER = ("case", "pass", "on", "ours", "their time / ours", "peak memory", "error")
NOT_MEASURED = "not measured"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
# The pages that hold a table, and whether it is the brief one.
PAGES = {"README.md": True, "docs/performance.md": False}

Document = Mapping[str, Any]


def load_documents(folder: pathlib.Path = RESULTS) -> dict[str, Document]:
    """The result files by name; other JSON files of the folder (the ahead-of-time compilation's) are passed over."""
    documents = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and "environment" in document and "families" in document:
            documents[path.name] = document
    return documents


def _peers(entries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, entry) for name, entry in entries.items() if name != OURS]


def _line(row: Mapping[str, Any], device: str) -> list[str]:
    entries = row["implementations"]
    ours = entries[OURS]
    rate = rate_cell(ours) if "roofline" in ours else MISSING
    time = time_cell(ours) + (f"; {rate}" if rate != MISSING else "")
    memory = [memory_cell(ours)] + [f"{name} {memory_cell(e)}" for name, e in _peers(entries) if "peak_bytes" in e]
    against = [f"{name} {ratio_cell(entry)}" for name, entry in _peers(entries)]
    if ours["status"] != "ok":
        against = [f"{name} {state(entry)}" for name, entry in _peers(entries) if entry["status"] != "ok"]
    return [
        shape(row["case"]),
        row["mode"],
        device,
        time,
        "; ".join(against) or MISSING,
        "; ".join(memory),
        error_cell(ours),
    ]


def expected(device_type: str, family: str) -> list[tuple[dict[str, Any], str]]:
    """The headline (labels, mode) pairs that a family has on a kind of device, measured or not."""
    return [(dict(c.labels), mode) for c in family_cases(family, device_type) if c.headline for mode in c.modes]


def _note(file: str, document: Document) -> str:
    where = document["environment"]
    gpu = where["device_type"] == "cuda"
    versions = [f"{name} {v}" for name, v in where["versions"].items() if v]
    words = [
        where["device"] + (f" (driver {where['driver']})" if where.get("driver") else ""),
        *([f"CPU {where['cpu']}"] if gpu else [f"{where['threads']} threads" if where["threads"] != 1 else "1 thread"]),
        f"Python {where['python']}",
        *versions,
        f"commit {where['commit'][:12]}{' with local changes' if where['dirty'] else ''}" if where["commit"] else "",
        where["date"],
    ]
    line = f"`{file}`: " + ", ".join(w for w in words if w) + "."
    if "tests" in document:
        tests = document["tests"]
        line += f" Kernel tests there: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."
    return f"* {line}"


def render(
    documents: Mapping[str, Document],
    families: Sequence[str],
    expected: Mapping[tuple[str, str], Iterable[tuple[dict[str, Any], str]]],
    brief: bool = False,
) -> str:
    """The region's text. ``expected`` maps (device type, family) to the headline pairs (labels, mode)."""
    blocks, used = [], []
    for family in families:
        lines = []
        for kind in KINDS:
            pairs = [(dict(labels), mode) for labels, mode in expected.get((kind, family), ())]
            sources = [
                (name, d) for name, d in documents.items()
                if d["environment"]["device_type"] == kind and family in d["families"]
            ]  # fmt: skip
            for name, document in sources:
                used += [name] if name not in used else []
                device = document["environment"]["device"] if kind == "cuda" else KINDS[kind]
                rows = document["families"][family]["rows"]
                found = {(_key(r["case"]), r["mode"]): r for r in rows}
                keys = [(_key(labels), mode) for labels, mode in pairs]
                lines += [_line(r, device) for k, r in found.items() if r["headline"] or k in keys]
                lines += _unmeasured([p for p, k in zip(pairs, keys, strict=True) if k not in found], device, brief)
            if not sources:
                lines += _unmeasured(pairs, KINDS[kind], brief)
        if lines:
            blocks.append(f"**{family}**\n\n{markdown(HEADER, lines)}")
    if used:
        blocks.append(
            "Times are medians of interleaved runs; ratios (above 1: ours is faster) are medians of paired samples "
            "with their 20 %–80 % spread; errors are relative to float64, of the output and all gradients. On:"
        )
        blocks.append("\n".join(_note(name, documents[name]) for name in used))
    return "\n\n".join(blocks)


def _key(labels: Mapping[str, Any]) -> tuple:
    return tuple(sorted(labels.items()))


def _unmeasured(pairs: Iterable[tuple[dict[str, Any], str]], device: str, brief: bool) -> list[list[str]]:
    """A line per shape, its passes together; or one for all of them."""
    passes: dict[str, list[str]] = {}
    for labels, mode in pairs:
        passes.setdefault(shape(labels), []).append(mode)
    if brief and len(passes) > 1:
        passes = {f"{len(passes)} shapes": list(dict.fromkeys(mode for modes in passes.values() for mode in modes))}
    return [[case, ", ".join(modes), device, NOT_MEASURED, *[MISSING] * 3] for case, modes in passes.items()]


def current_text(brief: bool) -> str:
    """The region as the committed result files have it."""
    names = families()
    return render(load_documents(), names, {(kind, f): expected(kind, f) for kind in KINDS for f in names}, brief)


def replaced(page: str, text: str) -> str:
    """``page`` with the region between the markers replaced."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must hold {BEGIN} and after it {END}, once each")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the tables are current")
    options = parser.parse_args(argv)
    stale = 0
    for name, brief in PAGES.items():
        path = ROOT / name
        old = path.read_text()
        new = replaced(old, current_text(brief))
        if new == old:
            continue
        if options.check:
            print(f"{name}'s performance table is stale: run `python -m benchmarks.table`", file=sys.stderr)
            stale = 1
        else:
            path.write_text(new)
    return stale


if __name__ == "__main__":
    sys.exit(main())
