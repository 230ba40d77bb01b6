"""Figures that experiments share, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._checks import require

__all__ = ["comparison", "field_panels", "loss_curve", "new_figure"]


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure that belongs to no window."""
    return require("matplotlib.figure", extra="train").Figure(figsize=(width, height), layout="constrained")


def loss_curve(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss against steps with its running mean, and below it the test metrics where there are several."""
    steps = [line["step"] for line in lines if "loss" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    tests = sorted({k for line in lines for k in line if k.startswith("test/")})
    series = {k: [(line["step"], line[k]) for line in lines if k in line] for k in tests}
    series = {k: points for k, points in series.items() if len(points) > 1}
    figure = new_figure(7.0, 4.0 if not series else 6.5)
    axes = figure.subplots(2 if series else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, marker="." if len(steps) < 20 else "")
    mean, means = None, []
    for loss in losses:
        mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        means.append(mean)
    if len(steps) >= 20:
        axes[0].plot(steps, means, color="tab:blue", linewidth=2, label="running mean")
        axes[0].legend(frameon=False)
    axes[0].set(ylabel="training loss", title="Training loss")
    if losses and min(losses) > 0:
        axes[0].set_yscale("log")
    if series:
        for name, points in series.items():
            axes[1].plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes[1].set(ylabel="test metric", title="Test metrics")
        axes[1].legend(frameon=False)
    axes[-1].set_xlabel("step")
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def field_panels(
    rows: Sequence[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]], path: Path, *, title: str, quantity: str
) -> None:
    """One row a sample: input, truth, prediction and absolute error of fields on a square grid.

    Args:
        rows: ``(label, input, truth, prediction)``, fields of shape (n, n).
        path: the image to write.
        title: above all.
        quantity: what truth and prediction are, for the colour bars.
    """
    figure = new_figure(12.0, 2.9 * len(rows) + 0.5)
    figure.suptitle(title)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for row, (label, given, truth, prediction) in zip(axes, rows, strict=True):
        given, truth, prediction = (f.detach().float().cpu() for f in (given, truth, prediction))
        error = (prediction - truth).abs()
        low, high = float(truth.min()), float(truth.max())
        panels: list[tuple[str, torch.Tensor, dict[str, Any], str]] = [
            ("input", given, {"cmap": "Greys"}, ""),
            ("truth", truth, {"cmap": "viridis", "vmin": low, "vmax": high}, quantity),
            ("prediction", prediction, {"cmap": "viridis", "vmin": low, "vmax": high}, quantity),
            ("|prediction − truth|", error, {"cmap": "magma", "vmin": 0.0}, "absolute error"),
        ]
        for ax, (name, values, style, unit) in zip(row, panels, strict=True):
            image = ax.imshow(values.numpy(), origin="lower", extent=(0, 1, 0, 1), interpolation="nearest", **style)
            ax.set(xticks=(0, 1), yticks=(0, 1))
            if ax in axes[0]:
                ax.set_title(name)
            figure.colorbar(image, ax=ax, shrink=0.85, label=unit)
        row[0].set_ylabel(label)
    figure.savefig(path, dpi=110)


def comparison(table: dict[str, dict[str, list[float]]], path: Path, *, title: str) -> None:
    """One panel a metric, one column an arm: every seed's value, their mean and standard deviation."""
    metrics = list(dict.fromkeys(m for arm in table.values() for m in arm))
    figure = new_figure(max(3.2 * len(metrics), 4.5), 3.8)
    figure.suptitle(title)
    for ax, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for place, values in enumerate(table.values()):
            found = torch.tensor(values.get(metric, []), dtype=torch.float64)
            if len(found) == 0:
                continue
            colour = f"C{place}"
            spread = float(found.std()) if len(found) > 1 else 0.0
            ax.errorbar(place, float(found.mean()), yerr=spread, fmt="_", markersize=22, capsize=6, color=colour)
            ax.plot([place] * len(found), found, "o", alpha=0.5, color=colour, markersize=5)
        slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(range(len(table)), list(table), **(slanted if sum(map(len, table)) > 24 else {}))
        ax.set_xlim(-0.6, len(table) - 0.4)
        ax.set_title(metric)
        ax.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)
