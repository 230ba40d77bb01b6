"""``python -m benchmarks.plot``: where the polynomial path overtakes exact tensor attention, from the result files.

Time against length, with the exponent over the four longest of each line, into
``benchmarks/results/tensor_attention_crossover.png``; ``--check`` only says whether that is what the result files hold
(exit code 1 if not).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ._harness import BOTH, FORWARD, OURS, RESULTS, fit_exponent
from ._report import duration, shape
from .table import Document, load_documents

FAMILY, EXACT, POLYNOMIAL = "tensor_attention", "exact", "polynomial"
IMAGE = "tensor_attention_crossover.png"
# The lines by their names in the rows.
NAMES = {OURS: POLYNOMIAL, EXACT: EXACT}
DIGEST = "Digest"

Points = dict[int, float]


class Panel(NamedTuple):
    """Milliseconds by length of both paths, in one shape and pass, on one device."""

    device: str
    case: str
    mode: str
    lines: dict[str, Points]


def panels(documents: Mapping[str, Document]) -> list[Panel]:
    """A panel for each device, shape and pass in which both paths were timed."""
    found = []
    for document in documents.values():
        where = document["environment"]
        threads = "" if where["device_type"] == "cuda" else f", {where['threads']} thread{'s'[: where['threads'] > 1]}"
        groups: dict[tuple[str, str], dict[str, Points]] = {}
        for row in document["families"].get(FAMILY, {"rows": ()})["rows"]:
            if row["case"]["op"] not in ("crossover", "polynomial"):
                continue
            case = shape({k: v for k, v in row["case"].items() if k not in ("op", "N")})
            lines = groups.setdefault((case, row["mode"]), {})
            for name, entry in row["implementations"].items():
                if name in NAMES and "ms" in entry:
                    lines.setdefault(NAMES[name], {})[row["case"]["N"]] = entry["ms"]
        for (case, mode), lines in groups.items():
            if lines.keys() == set(NAMES.values()):
                ordered = {name: dict(sorted(lines[name].items())) for name in (EXACT, POLYNOMIAL)}
                found.append(Panel(where["device"] + threads, case, mode, ordered))
    return sorted(found, key=lambda panel: (panel.device, panel.case, (FORWARD, BOTH).index(panel.mode)))


def crossover(exact: Points, polynomial: Points) -> float | None:
    """The length from which the polynomial path is faster, between two at which both were timed; None without one."""
    ratios = [(n, math.log(exact[n] / polynomial[n])) for n in sorted(exact.keys() & polynomial.keys())]
    crossing = None
    for (n, low), (m, high) in itertools.pairwise(ratios):
        if low <= 0 < high:
            crossing = n * (m / n) ** (-low / (high - low))
    return crossing


def draw(found: Sequence[Panel], path: pathlib.Path) -> None:
    """One row a device and shape, one column a pass."""
    from torchlayers.training.plots import new_figure

    rows = list(dict.fromkeys((panel.device, panel.case) for panel in found))
    figure = new_figure(11.0, 4.3 * len(rows))
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for panel in found:
        ax = axes[rows.index((panel.device, panel.case))][(FORWARD, BOTH).index(panel.mode)]
        for name, colour in ((EXACT, "tab:red"), (POLYNOMIAL, "tab:blue")):
            points = panel.lines[name]
            longest = list(points)[-4:]
            label = name
            if len(longest) > 1:
                label += f": N^{fit_exponent(longest, [points[n] for n in longest]):.2f} for N ≥ {longest[0]}"
            ax.plot(list(points), list(points.values()), "o-", color=colour, markersize=4, label=label)
        crossing = crossover(panel.lines[EXACT], panel.lines[POLYNOMIAL])
        if crossing is not None:
            ax.axvline(crossing, color="0.5", linewidth=1, linestyle="--", label=f"equal at N ≈ {crossing:.0f}")
        lengths = sorted({n for points in panel.lines.values() for n in points})
        times = [ms for points in panel.lines.values() for ms in points.values()]
        decades = [10.0**e for e in range(math.floor(math.log10(min(times))), math.ceil(math.log10(max(times))) + 1)]
        ax.set(xscale="log", yscale="log", xlabel="length N", ylabel="time", ylim=(decades[0], decades[-1]))
        ax.set_xticks(lengths, [str(n) for n in lengths], rotation=45 if len(lengths) > 6 else 0)
        ax.set_yticks(decades, [f"{float(duration(t).split()[0]):g} {duration(t).split()[1]}" for t in decades])
        ax.minorticks_off()
        ax.set_title(f"{panel.mode}: {panel.case}\n{panel.device}", fontsize=10)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9, loc="lower right")
    figure.savefig(path, dpi=110, metadata={DIGEST: digest(found)})


def digest(found: Sequence[Panel]) -> str:
    """Of what an image shows."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def drawn(path: pathlib.Path) -> str | None:
    """The digest that :func:`draw` left in an image."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(DIGEST)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the image is current")
    options = parser.parse_args(argv)
    path = RESULTS / IMAGE
    found = panels(load_documents(RESULTS))
    if not found or drawn(path) == digest(found):
        return 0
    if options.check:
        print(f"{path.name} is stale: run `python -m benchmarks.plot`", file=sys.stderr)
        return 1
    draw(found, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
