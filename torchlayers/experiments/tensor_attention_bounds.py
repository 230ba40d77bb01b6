"""What near-linear tensor attention certifies, and how far off it is: order against boundedness.

Entries of queries and keys are uniform in [-B, B]. For attention of order m (m - 1 sets of keys) logits grow like B^m,
and the polynomial that stands in for exp holds only while they are small. Alman and Song (arXiv 2310.04064) show that
this is no weakness of the method: a near-linear algorithm exists for B = o((log n)^(1/m)) and for larger entries none
does (under SETH), so the higher the order, the smaller the entries must be. The study measures where that is: for
each order the certified error and the true one against B, and the largest B that is certified for each degree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int, check_ints
from ..tensor_attention import (
    polynomial_nth_order_attention,
    tensor_attention_error_bound,
    tensor_attention_logit_limit,
)
from ..training import Config, Context, key, register
from ..training.plots import new_figure


@dataclass
class TensorAttentionBounds(Config):
    orders: list[int] = key([3, 4, 5], "orders of attention; 2 is the ordinary one")
    degree: int = key(4, "of the polynomial in the plot against the entry bound, even")
    degrees: list[int] = key([2, 4, 6, 8, 10], "of the plot of largest certified entry bounds, even")
    head_dim: int = key(4, "channels d; logits are scaled by 1/d")
    queries: int = key(16, "queries, over which the largest error counts")
    tuples: int = key(20000, "tuples of keys that a query attends to, at most: there are as many keys as that allows")
    lowest: float = key(0.4, "smallest entry bound")
    highest: float = key(2.5, "largest entry bound")
    points: int = key(22, "entry bounds between the two, at equal ratios")
    tolerance: float = key(1e-3, "absolute error that is to be certified, for values of at most 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ints("orders", self.orders, minimum=2)
        check_ints("degrees", self.degrees, minimum=0)
        for name in ("head_dim", "queries", "tuples"):
            check_int(name, getattr(self, name))
        check_int("points", self.points, minimum=2)
        if not 0 < self.lowest < self.highest:
            raise ValueError(f"lowest must be over 0 and below highest ({self.highest}), got {self.lowest}")
        for degree in (self.degree, *self.degrees):
            tensor_attention_logit_limit(self.tolerance, degree)  # raises where either is out of its range


class Sample:
    """Queries, keys and values of one order: entries of queries and keys in [-1, 1], which are scaled by B, and values
    of which every channel has a largest magnitude of 1."""

    def __init__(self, config: TensorAttentionBounds, order: int, device: torch.device):
        self.order, self.scale = order, 1 / config.head_dim
        n = max(2, int(config.tuples ** (1 / (order - 1)) + 1e-9))
        generator = torch.Generator().manual_seed(config.seed)

        def uniform(rows: int) -> Tensor:
            drawn = torch.rand(1, 1, rows, config.head_dim, dtype=torch.float64, generator=generator) * 2 - 1
            return drawn.to(device)

        self.query, self.keys = uniform(config.queries), [uniform(n) for _ in range(order - 1)]
        values = [uniform(n) for _ in range(order - 1)]
        self.values = [value / value.abs().amax(-2, keepdim=True) for value in values]

    def polynomial(self, bound: float, degree: int) -> tuple[Tensor, float]:
        """The near-linear output, and the largest certified error."""
        out, error = polynomial_nth_order_attention(
            self.query * bound,
            [key * bound for key in self.keys],
            self.values,
            degree=degree,
            scale=self.scale,
            return_error_bound=True,
        )
        return out, float(error.max())

    def tuples(self, sets: Sequence[Tensor]) -> Tensor:
        """Products of one row of each set: (tuples, d)."""
        product = sets[0][0, 0]
        for other in sets[1:]:
            product = (product[:, None] * other[0, 0]).flatten(0, 1)
        return product

    def measure(self, bound: float, degree: int) -> dict[str, float]:
        """Certified and true errors, the largest over queries and channels."""
        logits = self.query[0, 0] @ self.tuples(self.keys).mT * (self.scale * bound**self.order)
        exact = torch.softmax(logits, -1)
        # Horner's rule for Σ x^t / t!.
        weights = torch.ones_like(logits)
        for t in range(degree, 0, -1):
            weights = 1 + weights * logits / t
        weights = weights / weights.sum(-1, keepdim=True)
        out, certified = self.polynomial(bound, degree)
        error = (out[0, 0] - exact @ self.tuples(self.values)).abs().max()
        return {
            "largest_logit": float(logits.abs().max()),
            "certified": certified,
            "certified_from_entries": float(tensor_attention_error_bound(bound**self.order, degree)),
            # Over all values of tuples in [-1, 1], which is what any bound that knows the weights alone can reach.
            "worst_values": float((weights - exact).abs().sum(-1).max()),
            "error": float(error),
        }

    def largest_certified(self, degree: int, tolerance: float, highest: float = 16.0) -> float:
        """The largest entry bound at which these data are certified to ``tolerance``."""
        low, high = 0.0, highest
        for _ in range(24):
            middle = (low + high) / 2
            if self.polynomial(middle, degree)[1] <= tolerance:
                low = middle
            else:
                high = middle
        return low


@register("tensor_attention_bounds", TensorAttentionBounds)
def run(context: Context) -> dict[str, float]:
    config: TensorAttentionBounds = context.config
    ratio = math.log(config.highest / config.lowest) / (config.points - 1)
    bounds = [config.lowest * math.exp(ratio * i) for i in range(config.points)]
    samples = {order: Sample(config, order, context.device) for order in config.orders}

    curves: dict[int, list[dict[str, float]]] = {order: [] for order in config.orders}
    cells = [(order, bound) for order in config.orders for bound in bounds]
    for step, (order, bound) in enumerate(context.progress(cells, total=len(cells)), 1):
        measured = samples[order].measure(bound, config.degree)
        curves[order].append(measured)
        context.report({"order": order, "entry_bound": bound, **measured}, step=step)

    limits: dict[int, list[float]] = {}
    for order, sample in samples.items():
        limits[order] = [sample.largest_certified(degree, config.tolerance) for degree in config.degrees]

    if context.main:
        plot(config, bounds, curves, limits, context.folder / "tensor_attention_bounds.png")

    metrics: dict[str, float] = {}
    for order, sample in samples.items():
        metrics[f"largest_certified_entry_bound_order_{order}"] = sample.largest_certified(
            config.degree, config.tolerance
        )
        over = [bound for bound, c in zip(bounds, curves[order], strict=True) if c["worst_values"] > config.tolerance]
        metrics[f"first_entry_bound_over_tolerance_order_{order}"] = min(over, default=math.inf)
    # The polynomial's weights and the function's output are computed apart; rounding is all that they may differ by.
    metrics["violations"] = sum(
        c["worst_values"] > c["certified"] + 1e-12 or c["error"] > c["certified"]
        for curve in curves.values()
        for c in curve
    )
    return metrics


def plot(
    config: TensorAttentionBounds,
    bounds: Sequence[float],
    curves: dict[int, list[dict[str, float]]],
    limits: dict[int, list[float]],
    path: Path,
) -> None:
    """Errors against the entry bound (left), largest certified entry bound against the degree (right)."""
    figure = new_figure(12.5, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colours = {order: f"C{i}" for i, order in enumerate(curves)}
    styles: list[tuple[str, str, dict[str, Any]]] = [
        ("certified_from_entries", "certified from B alone", {"linestyle": ":", "linewidth": 1.5}),
        ("certified", "certified from the data", {"linestyle": "-", "linewidth": 2}),
        ("worst_values", "true, for the worst values", {"linestyle": "--", "linewidth": 1.5}),
        ("error", "true, for random values", {"linestyle": "none", "marker": "o", "markersize": 3.5, "alpha": 0.7}),
    ]
    for order, curve in curves.items():
        for name, _, style in styles:
            # What is below float64's rounding says nothing.
            points = [(b, c[name]) for b, c in zip(bounds, curve, strict=True) if c[name] > 1e-15]
            left.plot(*zip(*points, strict=True), color=colours[order], **style)
    left.axhline(config.tolerance, color="0.4", linewidth=1)
    left.text(bounds[0] * 1.02, config.tolerance * 1.25, f"tolerance {config.tolerance:g}", color="0.3", fontsize=9)
    left.axvline(1.0, color="0.8", linewidth=1, zorder=0)
    left.set(
        xscale="log",
        yscale="log",
        xlim=(bounds[0], bounds[-1]),
        ylim=(max(1e-12, min(c["error"] for curve in curves.values() for c in curve) / 2), 4.0),
        xlabel="entry bound B (queries and keys uniform in [-B, B])",
        ylabel="absolute error of an output, |values| ≤ 1",
        title=f"Error against the entry bound, degree {config.degree}",
    )
    ticks = [t for t in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0) if bounds[0] <= t <= bounds[-1]]
    left.set_xticks(ticks, [f"{t:g}" for t in ticks])
    left.minorticks_off()
    handles = [left.plot([], [], color="0.3", label=label, **style)[0] for _, label, style in styles]
    handles += [left.plot([], [], color=c, linewidth=4, label=f"order {order}")[0] for order, c in colours.items()]
    left.legend(handles=handles, fontsize=9, loc="lower right")

    for order, found in limits.items():
        right.plot(config.degrees, found, "o-", color=colours[order], label=f"order {order}, from the data")
        static = [tensor_attention_logit_limit(config.tolerance, g) ** (1 / order) for g in config.degrees]
        right.plot(config.degrees, static, ":", color=colours[order], label=f"order {order}, from B alone")
    right.axhline(1.0, color="0.8", linewidth=1, zorder=0)
    features = [math.comb(config.head_dim + g, g) for g in config.degrees]
    right.set_xticks(config.degrees, [f"{g}\n{r}" for g, r in zip(config.degrees, features, strict=True)])
    right.set(
        xlabel=f"degree, and below it the features (head_dim {config.head_dim})",
        ylabel="largest certified entry bound B",
        title=f"What is certified to {config.tolerance:g}",
    )
    right.legend(fontsize=9)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
