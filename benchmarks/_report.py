"""Result rows as text: the cells that the printed report and the README's table share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ._harness import OURS

MISSING = "–"


def duration(ms: float) -> str:
    """Three digits with the unit that suits: ``45.1 µs``, ``1.23 ms``, ``2.50 s``."""
    for limit, factor, unit in ((1.0, 1e3, "µs"), (1e3, 1.0, "ms")):
        if ms < limit:
            return f"{_digits(ms * factor)} {unit}"
    return f"{_digits(ms * 1e-3)} s"


def size(count: float) -> str:
    for limit, factor, unit in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB")):
        if count < limit:
            return f"{_digits(count / factor)} {unit}"
    return f"{_digits(count / 1e9)} GB"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def shape(labels: Mapping[str, Any]) -> str:
    return ", ".join(str(v) if isinstance(v, str) else f"{k} {v}" for k, v in labels.items())


def state(entry: Mapping[str, Any]) -> str:
    """An implementation without a result, in words."""
    detail = entry.get("detail")
    if entry["status"] == "not installed":
        return "not installed"
    return f"{entry['status']}: {detail}" if detail else str(entry["status"])


def time_cell(entry: Mapping[str, Any]) -> str:
    if entry["status"] != "ok":
        return state(entry)
    if "ms" not in entry:
        return MISSING
    text = duration(entry["ms"])
    if "graph_ms" in entry:
        text += f" ({duration(entry['graph_ms'])} in a graph)"
    return text


def ratio_cell(entry: Mapping[str, Any]) -> str:
    """The time over that of ours (above 1: ours is faster), with the spread of the paired ratios."""
    if entry["status"] != "ok":
        return state(entry)
    if "ratio" not in entry:
        return MISSING
    text = f"{_digits(entry['ratio'])}× ({_digits(entry['ratio_p20'])}–{_digits(entry['ratio_p80'])})"
    if "graph_ratio" in entry:
        text += f", {_digits(entry['graph_ratio'])}× in a graph"
    return text


def memory_cell(entry: Mapping[str, Any]) -> str:
    if "peak_bytes" not in entry:
        return MISSING
    kept = f" ({size(entry['kept_bytes'])} kept)" if "kept_bytes" in entry else ""
    return size(entry["peak_bytes"]) + kept


def rate_cell(entry: Mapping[str, Any]) -> str:
    words = []
    if "gbps" in entry:
        words.append(f"{_digits(entry['gbps'])} GB/s")
    if "tflops" in entry:
        words.append(f"{_digits(entry['tflops'])} TFLOP/s")
    if "atoms_per_s" in entry:
        words.append(f"{_digits(entry['atoms_per_s'])} atoms·steps/s")
    if "roofline" in entry:
        words.append(f"{entry['roofline']:.0%} of the roofline")
    return ", ".join(words) or MISSING


def cost_cells(row: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Weights and floating-point operations of an implementation."""
    costs = row.get("work", {}).get("costs", {}).get(name)
    return (f"{costs['weights']:,}", f"{costs['flops']:.3g}") if costs else (MISSING, MISSING)


def error_cell(entry: Mapping[str, Any]) -> str:
    return f"{entry['error']:.0e}" if entry.get("error") is not None else MISSING


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"\s+", " ", c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def report(family: str, result: Mapping[str, Any]) -> str:
    """All that was measured of a family, as one markdown table a line per implementation, and one of exponents.

    A family whose rows say what each implementation costs has a column for its weights and one for its arithmetic.
    """
    lines = []
    costly = any("costs" in row.get("work", {}) for row in result["rows"])
    for row in result["rows"]:
        for name, entry in row["implementations"].items():
            host = f"{entry['host_us']:.0f} µs" if "host_us" in entry else MISSING
            first = name == OURS
            lines.append([
                shape(row["case"]) if first else "",
                row["mode"] if first else "",
                name,
                *(cost_cells(row, name) if costly else ()),
                time_cell(entry),
                "" if first else ratio_cell(entry),
                rate_cell(entry),
                host,
                memory_cell(entry),
                error_cell(entry),
            ])  # fmt: skip
    costs = ["weights", "FLOP"] if costly else []
    header = ["case", "pass", "who", *costs, "time", "theirs / ours", "rate", "host per call", "peak memory", "error"]
    blocks = [f"## {family}", markdown(header, lines)]
    if result["scaling"]:
        fits = [
            [shape(fit["case"]), fit["mode"], name, f"{fit['against']}^{e['time']:.2f}" if "time" in e else MISSING,
             f"{fit['against']}^{e['memory']:.2f}" if "memory" in e else MISSING, ", ".join(map(str, e["points"]))]
            for fit in result["scaling"]
            for name, e in fit["implementations"].items()
        ]  # fmt: skip
        blocks.append(markdown(["case", "pass", "who", "time grows as", "memory grows as", "over"], fits))
    return "\n\n".join(blocks) + "\n"
