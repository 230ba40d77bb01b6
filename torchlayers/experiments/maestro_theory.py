"""What ordered dropout converges to: one linear layer against the truncations that it should find.

A low-rank layer W = U Vᵀ learns y = A x by least squares, each step at a rank of the sampler's (arXiv 2308.14929 proves
the first two cases). Its prefixes are compared with the best maps of each rank, from an SVD:

- ``svd``: inputs of unit covariance. The prefixes of W are the truncated SVDs of A.
- ``control``: the same without ordered dropout. The product is A, its prefixes are nothing in particular.
- ``pca``: A = 1, inputs of covariance C. The prefixes project on the leading principal components.
- ``rrr``: both at once. The prefix of rank b is P_b P_bᵀ A, with P the left singular vectors of A C^½ (reduced-rank
  regression), which is not the truncated SVD of A.

All errors are those of outputs, (E|W_b x − W*_b x|² / E|W*_b x|²)^½: factors are determined up to a scale of each term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_int
from ..maestro import LowRankLinear, RankSampler, lod_loss
from ..training import Config, Context, key, register
from ..training.plots import new_figure

CASES = ("svd", "control", "pca", "rrr")


@dataclass
class MaestroTheory(Config):
    steps: int = key(10000, "steps of gradient descent")
    lr: float = key(0.8, "learning rate, in units of 1 over a bound on the loss's largest curvature at the optimum")
    spectrum: list[float] = key([5.0, 3.5, 2.5, 1.5, 0.8, 0.3], "singular values of A, all different")
    outputs: int = key(8, "rows of A, at least as many as singular values; it has as many columns as these")
    variances: list[float] = key([4.0, 2.25, 1.3, 0.75, 0.4, 0.2], "of the inputs' components, in pca and rrr")
    tolerance: float = key(1e-2, "relative error that counts as recovered")
    points: int = key(40, "measurements on the way, at equal ratios of steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("steps", self.steps)
        check_int("points", self.points, minimum=2)
        check_int("outputs", self.outputs, minimum=len(self.spectrum))
        for name in ("spectrum", "variances"):
            values = getattr(self, name)
            if len(values) != len(self.spectrum) or len(values) < 2 or not all(v > 0 for v in values):
                raise ValueError(f"{name} must be {len(self.spectrum)} numbers over 0, at least 2, got {values}")
        if sorted(set(self.spectrum), reverse=True) != list(self.spectrum):
            raise ValueError(f"spectrum must fall strictly, got {self.spectrum}: equal values have no order")
        for name in ("lr", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be over 0, got {getattr(self, name)}")


@dataclass
class Problem:
    """y = A x: ``target`` A (m, n), and ``root`` C^½ (n, n) of the inputs' covariance C, whose rows are the inputs."""

    target: Tensor
    root: Tensor
    ordered: bool
    best: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        # P_b P_bᵀ A, from the left singular vectors of A C^½.
        left = torch.linalg.svd(self.target @ self.root)[0]
        ranks = range(1, min(self.target.shape) + 1)
        self.best = [left[:, :b] @ left[:, :b].T @ self.target for b in ranks]

    def distance(self, found: Tensor, wanted: Tensor) -> float:
        difference = torch.linalg.norm((found - wanted) @ self.root)
        return float(difference / torch.linalg.norm(wanted @ self.root))

    def errors(self, layer: LowRankLinear) -> list[float]:
        """Of each prefix from the best map of its rank."""
        return [self.distance(layer.dense_weight(b + 1).detach().double(), best) for b, best in enumerate(self.best)]


def problems(config: MaestroTheory, device: torch.device) -> dict[str, Problem]:
    """The cases, in float64."""
    generator = torch.Generator().manual_seed(config.seed)
    n = len(config.spectrum)

    def orthogonal(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]

    left, right, axes = orthogonal(config.outputs)[:, :n], orthogonal(n), orthogonal(n)
    a = (left * torch.tensor(config.spectrum, dtype=torch.float64)) @ right.T
    unit = torch.eye(n, dtype=torch.float64)
    root = (axes * torch.tensor(config.variances, dtype=torch.float64).sqrt()) @ axes.T
    made = {
        "svd": Problem(a, unit, True),
        "control": Problem(a, unit, False),
        "pca": Problem(unit, root, True),
        "rrr": Problem(a, root, True),
    }
    for problem in made.values():
        problem.target, problem.root = problem.target.to(device), problem.root.to(device)
        problem.best = [best.to(device) for best in problem.best]
    return made


def train(problem: Problem, config: MaestroTheory, measured: Sequence[int], context: Context) -> dict[str, Any]:
    """Gradient descent by the library's sampler and loss, in float32; errors after each of the ``measured`` steps."""
    (m, n), device = problem.target.shape, context.device
    torch.manual_seed(config.seed)
    model = nn.Sequential(LowRankLinear(n, m, bias=False)).to(device)
    layer: Any = model[0]
    with torch.no_grad():  # factors without the order that a decomposed weight has
        for factor in (layer.weight_in, layer.weight_out):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    # The rows of C^½ have Σ x xᵀ = C: the mean over them is the expectation up to a factor.
    x = problem.root.float()
    y = x @ problem.target.float().T
    # The largest curvature of the mean squared error at the optimum, along both factors of the first term, is no more
    # than 4 σ(A C^½) σ(C^½) / (m n).
    a, root = (float(torch.linalg.matrix_norm(w, 2)) for w in (problem.target @ problem.root, problem.root))
    rate = config.lr * m * n / (4 * a * root)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    sampler = RankSampler(model, seed=config.seed)
    curve, wanted = [], set(measured)
    for step in range(config.steps):
        optimizer.zero_grad()
        loss = lod_loss(model, x, y, F.mse_loss, sampler, step) if problem.ordered else F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if step + 1 in wanted:
            curve.append(problem.errors(layer))
    return {"curve": curve, "errors": problem.errors(layer), "terms": layer.importance(hierarchical=False).tolist()}


@register("maestro_theory", MaestroTheory)
def run(context: Context) -> dict[str, float]:
    config: MaestroTheory = context.config
    made = problems(config, context.device)
    ratio = math.log(config.steps) / (config.points - 1)
    measured = sorted({round(math.exp(ratio * i)) for i in range(config.points)})
    found: dict[str, dict[str, Any]] = {}
    metrics: dict[str, float] = {}
    for number, name in enumerate(context.progress(CASES, total=len(CASES)), 1):
        found[name] = train(made[name], config, measured, context)
        errors = found[name]["errors"]
        context.report({f"{name}_error_rank_{b}": error for b, error in enumerate(errors, 1)}, step=number)
        if name == "control":
            # Its full product is the target: what lacks an order is what comes before.
            metrics["control_least_error"] = min(errors[:-1])
            metrics["control_full_error"] = errors[-1]
        else:
            metrics[f"{name}_largest_error"] = max(errors)
    rrr = made["rrr"]
    plain = Problem(rrr.target, torch.eye(len(rrr.root), dtype=torch.float64).to(rrr.root), True).best
    # Largest over the prefixes: how far the plain truncated SVD of A is from the optimum that was found.
    metrics["rrr_distance_to_plain_svd"] = max(
        rrr.distance(svd, best) for svd, best in zip(plain[:-1], rrr.best[:-1], strict=True)
    )
    recovered = [name for name in ("svd", "pca", "rrr") if metrics[f"{name}_largest_error"] <= config.tolerance]
    metrics["cases_recovered"] = float(len(recovered))
    metrics["control_recovers"] = float(metrics["control_least_error"] <= config.tolerance)
    if context.main:
        plot(config, measured, found, context.folder / "maestro_theory.png")
    return metrics


def plot(config: MaestroTheory, measured: Sequence[int], found: dict[str, dict[str, Any]], path: Path) -> None:
    """Errors of prefixes over training, at its end, and the sizes of the terms."""
    figure = new_figure(15.0, 4.8)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    ranks = range(1, len(config.spectrum) + 1)
    for b in ranks:
        for name, style in (("svd", "-"), ("control", ":")):
            curve = [errors[b - 1] for errors in found[name]["curve"]]
            left.plot(measured, curve, style, color=f"C{b - 1}", label=f"rank {b}" if name == "svd" else None)
    left.plot([], [], ":", color="0.3", label="without ordered dropout")
    left.set(xlabel="step", ylabel="relative error of the prefix", xscale="log", yscale="log")
    left.set(title="Prefixes against the truncated SVD of A", ylim=(2e-8, 5))
    labels = {
        "svd": "truncated SVD",
        "control": "truncated SVD, without ordered dropout",
        "pca": "principal components",
        "rrr": "reduced-rank regression",
    }
    for place, name in enumerate(CASES):
        marks = "x:" if name == "control" else "o-"
        middle.plot(ranks, found[name]["errors"], marks, color=f"C{place}", label=labels[name])
    middle.set(xlabel="rank of the prefix", yscale="log", ylim=(2e-8, 5), title=f"After {config.steps:,} steps")
    middle.set_xticks(list(ranks))
    for ax in (left, middle):
        ax.axhline(config.tolerance, color="0.4", linewidth=1)
        ax.text(ax.get_xlim()[1], config.tolerance * 1.2, f"{config.tolerance:g} ", color="0.3", fontsize=9, ha="right")
    right.plot(ranks, config.spectrum, "k_", markersize=22, label="singular values of A")
    right.plot(ranks, found["svd"]["terms"], "o", color="C0", label="ordered dropout")
    right.plot(ranks, found["control"]["terms"], "x", color="C1", label="without")
    right.set(xlabel="term", ylabel="‖u‖ ‖v‖ of the term", ylim=(0, None), title="Sizes of the terms")
    right.set_xticks(list(ranks))
    left.legend(fontsize=8, loc="lower left")
    middle.legend(fontsize=8, loc=(0.03, 0.5))
    right.legend(fontsize=8)
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
