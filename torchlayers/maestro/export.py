"""From a trained low-rank model to plain ones: at given ranks, within a budget, along the whole frontier."""

from __future__ import annotations

import contextlib
import copy
import difflib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_flop_count

from .._backend import backend
from .._checks import check_choice, check_int, require
from . import reference
from .attention import LowRankMultiheadAttention, SplitMultiheadAttention, capped_rank, packed_attention
from .convert import call_parts, canonicalize_, evaluating
from .layers import LowRankEmbedding, LowRankLayer, LowRankLinear
from .ordered import _call, low_rank_layers, unwrapped
from .regularization import check_finite
from .shrink import recalibrate_bn

__all__ = ["Count", "FrontierPoint", "count", "extract", "frontier"]

MERGES = ("auto", "gar", "never")

Ranks = Mapping[str, int] | int | float


class Count(NamedTuple):
    """What a model costs.

    Attributes:
        params: numbers in its parameters, shared ones once.
        macs: multiplications (each with an addition) of matrix products, convolutions and attention.
    """

    params: int
    macs: int


def count(model: nn.Module, input: Any) -> Count:
    """Parameters of ``model``, and multiply-accumulate operations of a call, low-rank layers at their ranks in force.

    The call is made, in evaluation mode and without gradients, and every matrix product, convolution and attention in
    it is counted, at half the floating-point operations that :mod:`torch.utils.flop_counter` ascribes to it. What
    neither multiplies matrices nor convolves counts nothing, and nor do fused recurrent layers.

    Args:
        model: any module.
        input: its input, a tensor, a tuple of arguments, or a dict of keyword arguments, for the whole batch of which
            is counted.

    Example:

        >>> count(nn.Linear(8, 6), torch.randn(1, 8))
        Count(params=54, macs=48)
    """
    model = unwrapped(model)
    return Count(_params(model), _macs(model, input))


def extract(
    model: nn.Module,
    *,
    ranks: Ranks | None = None,
    budget_params: int | None = None,
    budget_macs: int | None = None,
    budget_latency_ms: float | None = None,
    threshold: float | None = None,
    merge: str = "auto",
    round_to: int = 8,
    canonicalize: bool = True,
    input: Any = None,
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """A plain ``torch.nn`` model for deployment from a low-rank one; one argument says how to choose the ranks.

    ::

        small = extract(model, budget_params=1_000_000)
        recalibrate_bn(small, loader)                       # where it has batch norm

    Without any of the first five arguments, the ranks are those in force. Within a budget, terms are taken in the order
    of the energy (share of the squared Frobenius norm of the layer's weight) that each adds for its cost, over all
    layers, and at least one block of ``round_to`` terms of every layer.

    Args:
        model: has low-rank layers; left as it is.
        ranks: name -> rank, layers that are not named keeping theirs; or an int for all, at most the largest, where
            lower than theirs; or a fraction p of each layer's rank r, ⌈p r⌉.
        budget_params: the most parameters that the result may have.
        budget_macs: the most multiplications that a call on ``input`` may take, as :func:`count` has them.
        budget_latency_ms: the longest that a call on ``input`` may take here, by the median of several, in
            milliseconds.
        threshold: keep terms of this importance, ‖U[:, b:]‖ ‖V[:, b:]‖, as :func:`progressive_shrink` does.
        merge: what a rank of b makes of an (m, n) map. "never": two layers, n -> b -> m, with b (m + n) weights.
            "auto": one dense layer where that has no more weights, and two otherwise. "gar": b of the outputs and the
            other m - b as linear functions of these, with b (m + n - b) weights, fewer than a dense layer's at every
            rank below the full one (gauge-aligned reparametrisation).
        round_to: ranks are rounded up to multiples of it, which hardware likes, where the layer has as many terms.
        canonicalize: take the terms of the SVD of each product instead of those that training has ordered.
        input: for ``budget_macs`` and ``budget_latency_ms``: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Without it, the MACs of a model of linear layers are those of one row through each.
        calibration: batches, for terms that keep the outputs on them best, see :func:`factorize`; needs
            ``canonicalize``.

    Returns:
        a new model with the device, dtype and mode of the old one. What was low-rank is made of ``torch.nn`` modules;
        around them stand two of our own where ``torch.nn`` has none: :class:`SplitMultiheadAttention`, unless all four
        projections are dense, none of them tied, and it is ``nn.MultiheadAttention``, and :class:`GaugeAligned`, which
        only "gar" asks for. A layer of rank 0 keeps one term of zeros. Tied factors stay tied.

    Raises:
        ValueError: several ways to choose at once; no low-rank layer, or a name that is none; ranks out of range; a
            budget below what the smallest ranks cost, which the message states; a threshold that is not finite; sharded
            parameters.
        TypeError: arguments of another kind.

    Source: arXiv 2308.14929, section 3.3 (train once, deploy everywhere).

    Example:

        >>> from torchlayers.maestro import factorize
        >>> model = factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
        >>> extract(model, ranks={"0": 16})[0]
        Sequential(
          (0): Linear(in_features=64, out_features=16, bias=False)
          (1): Linear(in_features=16, out_features=64, bias=True)
        )
    """
    ways = {
        "ranks": ranks,
        "budget_params": budget_params,
        "budget_macs": budget_macs,
        "budget_latency_ms": budget_latency_ms,
        "threshold": threshold,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"ranks, budgets and threshold must not be given together, got {' and '.join(given)}")
    for name in given[:1]:
        if name != "ranks":
            check_finite(name, ways[name])
    if budget_latency_ms is not None and input is None:
        raise ValueError("input must be given with budget_latency_ms: it is what the calls are timed on")
    plan = _Plan(model, merge, round_to, canonicalize, calibration)
    if ranks is not None:
        chosen = plan.asked(ranks)
    elif threshold is not None:
        chosen = {name: int((layer.importance() >= threshold).sum()) for name, layer in plan.layers.items()}
    elif budget_params is not None:
        chosen = plan.within("budget_params", budget_params, plan.params_cost())
    elif budget_macs is not None:
        chosen = plan.within("budget_macs", budget_macs, plan.macs_cost(input))
    elif budget_latency_ms is not None:
        chosen = plan.within_latency(budget_latency_ms, input)
    else:
        chosen = {name: layer.rank for name, layer in plan.layers.items()}
    return plan.build(chosen)


@dataclass(frozen=True)
class FrontierPoint:
    """One model on the frontier of :func:`frontier`.

    Attributes:
        fraction: what was asked for.
        score: what ``evaluate`` said, or the relative error of the outputs.
        params, macs: see :class:`Count`.
        latency_ms: median time of a call, in milliseconds; None where it was not measured.
        ranks: name -> rank; ``extract(model, ranks=..., round_to=1)`` gives the model.
    """

    fraction: float
    score: float
    params: int
    macs: int
    latency_ms: float | None
    ranks: dict[str, int]


def frontier(
    model: nn.Module,
    input: Any,
    fractions: Sequence[float] = (1.0, 0.75, 0.5, 0.35, 0.25, 0.125),
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    loader: Iterable[Any] | None = None,
    merge: str = "auto",
    round_to: int = 8,
    canonicalize: bool = True,
    calibration: Iterable[Any] | None = None,
    latency: bool = True,
    plot: str | Path | None = None,
) -> list[FrontierPoint]:
    """What accuracy costs: models extracted from ``model`` within several budgets, each evaluated.

    ::

        for point in frontier(model, x, (1.0, 0.5, 0.25), evaluate=accuracy, plot="frontier.png"):
            print(point)

    Args:
        model: has low-rank layers; left as it is.
        input: a tensor, a tuple of arguments, or a dict of keyword arguments, on which MACs are counted and time is
            taken.
        fractions: of the MACs that the extraction at all ranks in force takes. Below what the smallest ranks cost, the
            smallest model stands.
        evaluate: ``evaluate(model)`` gives the score of a plain model in evaluation mode. By default it is the distance
            of its outputs on ``input`` from those of ``model``, ‖y − y₀‖ / ‖y₀‖, and these must be tensors.
        loader: training batches on which batch norm is recalibrated, see :func:`recalibrate_bn`.
        merge, round_to, canonicalize, calibration: see :func:`extract`.
        latency: measure time as well.
        plot: an image to write, score against parameters and MACs. Needs matplotlib.

    Returns:
        one :class:`FrontierPoint` a fraction, in their order.

    Raises:
        ValueError, TypeError: as :func:`extract`; a fraction outside (0, 1]; outputs that are no tensors, without
            ``evaluate``.
    """
    if not isinstance(fractions, Iterable):
        raise TypeError(f"fractions must be a sequence of numbers, got {fractions!r} ({type(fractions).__name__})")
    fractions = [float(check_finite("fractions", f)) for f in fractions]
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise ValueError(f"fractions must be in (0, 1], and at least one, got {fractions}")
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be callable as evaluate(model), got {type(evaluate).__name__}")
    plan = _Plan(model, merge, round_to, canonicalize, calibration)
    cost = plan.macs_cost(input)
    lowest, full = cost(plan.lowest()), cost({name: layer.rank for name, layer in plan.layers.items()})
    score = _distance_from(plan.model, input) if evaluate is None else evaluate
    points = []
    for fraction in fractions:
        ranks = plan.within("fractions", max(fraction * full, lowest), cost)
        small = plan.build(ranks)
        if loader is not None:
            recalibrate_bn(small, loader)
        small.eval()
        took = latency_ms(small, input) if latency else None
        points.append(FrontierPoint(fraction, float(score(small)), *count(small, input), took, ranks))
    if plot is not None:
        _plot(points, Path(plot), "score" if evaluate is not None else "relative output error")
    return points


# Choosing ranks


class _Unit(NamedTuple):
    """Layers of one product (tied factors have several), which have one rank."""

    names: list[str]
    layer: LowRankLayer

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Outputs m, inputs n, groups g."""
        return self.layer.weight_out.shape[0], self.layer.weight_in.shape[1], self.layer._groups

    def form(self, rank: int, merge: str) -> str:
        """What ``merge`` makes of ``rank``: "factors", "dense" or "gar"."""
        form = "gar" if merge == "gar" and rank > 0 else "factors"
        m, n, g = self.sizes
        if merge != "never" and self.weights(rank, form) >= m * n // g:
            return "dense"
        return form

    def weights(self, rank: int, form: str) -> int:
        """Entries of the weights in a form; of a linear map or a convolution also MACs a position."""
        m, n, g = self.sizes
        b = max(rank, 1)
        return {"dense": m * n // g, "factors": b * (m + n), "gar": b * (m + n - g * b)}[form]

    def macs(self, rank: int, form: str) -> int:
        """MACs a position."""
        _, n, _ = self.sizes
        lookup = isinstance(self.layer, LowRankEmbedding)  # looking up costs nothing
        if not lookup:
            return self.weights(rank, form)
        return 0 if form == "dense" else self.weights(rank, form) - max(rank, 1) * n


class _Cost(NamedTuple):
    """What a profile of ranks costs, and what a term of a unit adds to that in two layers."""

    of: Callable[[Mapping[str, int]], int]
    price: Callable[[_Unit], int]

    def __call__(self, ranks: Mapping[str, int]) -> int:
        return self.of(ranks)


class _Plan:
    """A model with its terms in order, ready to be cut."""

    def __init__(
        self, model: nn.Module, merge: str, round_to: int, canonicalize: bool, calibration: Iterable[Any] | None
    ):
        check_choice("merge", merge, MERGES)
        self.merge, self.round_to = merge, check_int("round_to", round_to)
        low_rank_layers(model)
        model = unwrapped(model)
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError("model must not be sharded, got DTensor parameters: load its state into a plain model")
        if calibration is not None and not canonicalize:
            raise ValueError("canonicalize must be True with calibration, whose order it takes, got False")
        self.model = copy.deepcopy(model)
        if canonicalize:
            canonicalize_(self.model, calibration=calibration)
        self.layers = low_rank_layers(self.model)
        units: dict[int, _Unit] = {}
        for name, layer in self.layers.items():
            units.setdefault(id(layer.weight_in), _Unit([], layer)).names.append(name)
        self.units = list(units.values())

    def rounded(self, rank: int, layer: LowRankLayer) -> int:
        return min(-(-rank // self.round_to) * self.round_to, layer.rank)

    def asked(self, ranks: Ranks) -> dict[str, int]:
        if isinstance(ranks, Mapping):
            for name, rank in ranks.items():
                if name not in self.layers:
                    near = difflib.get_close_matches(str(name), self.layers, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"ranks must name low-rank layers of the model, got {name!r}{hint}")
                top = self.layers[name].rank
                if check_int(f"ranks[{name!r}]", rank, minimum=0) > top:
                    raise ValueError(f"ranks[{name!r}] must be at most {top}, the layer's, got {rank}")
            return {name: int(ranks.get(name, layer.rank)) for name, layer in self.layers.items()}
        if isinstance(ranks, float) and not 0 < ranks <= 1:
            raise ValueError(f"ranks must be a fraction in (0, 1] where it is a float, got {ranks}")
        if not isinstance(ranks, float):
            top = max(layer.rank for layer in self.layers.values())
            if check_int("ranks", ranks, minimum=0) > top:
                raise ValueError(f"ranks must be at most {top}, the largest of a layer, got {ranks}")
            if ranks == 0:
                return dict.fromkeys(self.layers, 0)
        return {name: capped_rank(ranks, layer.rank) if layer.rank else 0 for name, layer in self.layers.items()}

    # Costs of a profile of ranks

    def params_cost(self) -> _Cost:
        held = sum(u.layer.weight_in.numel() + u.layer.weight_out.numel() for u in self.units)
        rest = _params(self.model) - held

        def params(ranks: Mapping[str, int]) -> int:
            total = rest
            for unit in self.units:
                rank = self._rank_of(unit, ranks)
                total += unit.weights(rank, unit.form(rank, self.merge))
            return total

        return _Cost(params, lambda unit: unit.weights(1, "factors"))

    def macs_cost(self, input: Any) -> _Cost:
        positions, rest = self._one_row() if input is None else self._positions(input)

        def macs(ranks: Mapping[str, int]) -> int:
            total = rest
            for unit in self.units:
                rank = self._rank_of(unit, ranks)
                total += sum(positions[name] for name in unit.names) * unit.macs(rank, unit.form(rank, self.merge))
            return total

        def price(unit: _Unit) -> int:
            return max(1, sum(positions[name] for name in unit.names) * unit.macs(1, "factors"))

        return _Cost(macs, price)

    def _rank_of(self, unit: _Unit, ranks: Mapping[str, int]) -> int:
        return max(self.rounded(ranks[name], self.layers[name]) for name in unit.names)

    def _one_row(self) -> tuple[dict[str, int], int]:
        rest = 0
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                rest += module.weight.numel()
            elif not isinstance(module, LowRankLinear) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
                got = type(module).__name__
                raise ValueError(f"input must be given with budget_macs unless all layers are linear, got {got}")
        return dict.fromkeys(self.layers, 1), rest

    def _positions(self, input: Any) -> tuple[dict[str, int], int]:
        """How many rows or grid points each layer computes, and the MACs of all else."""
        positions = dict.fromkeys(self.layers, 0)

        def record(name: str) -> Callable[[Any, Any, Tensor], None]:
            def hook(layer: LowRankLayer, args: Any, output: Tensor) -> None:
                positions[name] += output.numel() // layer.weight_out.shape[0]

            return hook

        handles = [layer.register_forward_hook(record(name)) for name, layer in self.layers.items()]
        try:
            total = _macs(self.model, input)
        finally:
            for handle in handles:
                handle.remove()
        for unit in self.units:
            for name in unit.names:
                rank = self.layers[name].rank
                total -= positions[name] * unit.macs(rank, "factors") if rank else 0
        return positions, total

    # Ranks within a budget

    def lowest(self) -> dict[str, int]:
        """One block of terms of every layer."""
        return {name: min(self.round_to, layer.rank) for name, layer in self.layers.items()}

    def _steps(self, price: Callable[[_Unit], int]) -> list[tuple[_Unit, int]]:
        """Blocks of terms beyond the first, (unit, rank that it then has), the most energy for its cost first."""
        steps: list[tuple[float, int, int]] = []
        for place, unit in enumerate(self.units):
            left = _errors(unit.layer)
            energy = max(float(left[0]), torch.finfo(left.dtype).tiny)
            r = unit.layer.rank
            levels = [*range(self.round_to, r, self.round_to), r] if r else []
            gains = [float(left[a] - left[b]) / energy / (b - a) for a, b in itertools.pairwise(levels)]
            # A block that is worth more than one before it needs that too: both are wanted as soon as it is.
            for i in reversed(range(len(gains) - 1)):
                gains[i] = max(gains[i], gains[i + 1])
            steps += [(-gain / price(unit), place, b) for gain, b in zip(gains, levels[1:], strict=False)]
        return [(self.units[place], rank) for _, place, rank in sorted(steps)]

    def within(self, name: str, budget: float, cost: _Cost) -> dict[str, int]:
        """Step by step while the budget lasts; a layer whose next step is too dear stays where it is."""
        ranks = self.lowest()
        if cost(ranks) > budget:
            raise ValueError(
                f"{name} must be at least {cost(ranks):,}, what the model costs with {self.round_to} terms a layer "
                f"(its dense parts included), got {budget:,}"
            )
        full: set[int] = set()
        for unit, rank in self._steps(cost.price):
            if id(unit) in full:
                continue
            more = ranks | dict.fromkeys(unit.names, rank)
            if cost(more) <= budget:
                ranks = more
            else:
                full.add(id(unit))
        return ranks

    def within_latency(self, budget: float, input: Any) -> dict[str, int]:
        """The longest run of steps whose model is in time, by bisection over their number."""
        cost = self.macs_cost(input)
        profiles = [self.lowest()]
        for unit, rank in self._steps(cost.price):
            profiles.append(profiles[-1] | dict.fromkeys(unit.names, rank))

        def took(profile: dict[str, int]) -> float:
            return latency_ms(self.build(profile), input)

        least = took(profiles[0])
        if least > budget:
            raise ValueError(
                f"budget_latency_ms must be at least {least:.3g}, what the model takes with {self.round_to} terms a "
                f"layer, got {budget:g}"
            )
        low, high = 0, len(profiles)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if took(profiles[middle]) <= budget else (low, middle)
        return profiles[low]

    # The plain model

    @torch.no_grad()
    def build(self, ranks: Mapping[str, int]) -> nn.Module:
        model = copy.deepcopy(self.model)
        plain: dict[nn.Module, nn.Module] = {}
        first: dict[int, nn.Module] = {}
        tied: set[nn.Module] = set()
        layers = low_rank_layers(model)
        for unit in self.units:
            rank = self._rank_of(unit, ranks)
            for name in unit.names:
                layer = layers[name]
                key = id(layer.weight_in)
                plain[layer] = _plain(layer, min(rank, layer.rank), unit.form(rank, self.merge))
                if key in first:
                    _tie_weights(first[key], plain[layer])
                    tied |= {first[key], plain[layer]}
                first.setdefault(key, plain[layer])
        for attention in [m for m in model.modules() if isinstance(m, LowRankMultiheadAttention)]:
            parts = [
                plain.get(p, p) for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
            ]
            plain[attention] = _plain_attention(attention, parts, packed=tied.isdisjoint(parts))
        if model in plain:
            return plain[model]
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child in plain:
                    parent._modules[name] = plain[child]
        call_parts(model)
        return model


@torch.no_grad()
def _errors(layer: LowRankLayer) -> Tensor:
    """‖W − W_b‖² for b = 0, ..., rank, of the terms in force."""
    b = layer.rank
    v, u = layer.weight_in[:b].double(), layer.weight_out[:, :b].double()
    g = layer._groups
    v, u = v.unflatten(1, (g, -1)).transpose(0, 1), u.unflatten(0, (g, -1))
    products = ((v @ v.transpose(1, 2)) * (u.transpose(1, 2) @ u)).sum(0)
    # The sum over the square of terms b and later.
    squares = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([squares, squares.new_zeros(1)]).clamp(min=0)


# The plain modules


class GaugeAligned(nn.Module):
    """An (m, n) map of rank b whose output holds its b inner values as they are::

        h = reduce(x)        y = [h, expand(h)] in the order of the outputs, + bias

    Among the rows of W of rank b are b of which all others are linear functions: W has b (m + n - b) degrees of
    freedom, and so many weights are here. ``extract(merge="gar")`` makes it.

    Args:
        reduce: to b channels (b of each group), without a bias.
        expand: from these to the other m - b, without a bias.
        order: (m,), ints: which entry of [h, expand(h)] each output is.
        bias: (m,) or None.
        dim: the channel dimension, negative.

    Source: arXiv 2602.02680, by the number of weights.
    """

    def __init__(
        self, reduce: nn.Module, expand: nn.Module, order: Tensor, bias: nn.Parameter | None = None, dim: int = -1
    ):
        super().__init__()
        self.reduce, self.expand, self.bias, self.dim = reduce, expand, bias, dim
        self.register_buffer("order", order)
        self.order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """y, with the channels of ``reduce(x)`` and ``expand`` of it together."""
        h = self.reduce(x)
        y = torch.cat([h, self.expand(h)], self.dim).index_select(self.dim, self.order)
        return y if self.bias is None else y + self.bias.reshape(-1, *(1,) * (-1 - self.dim))


def _plain(layer: LowRankLayer, rank: int, form: str) -> nn.Module:
    """``layer`` at ``rank`` in a form, with parameters of its own."""
    layer.truncate_(rank)
    if form == "dense":
        return layer.to_dense()
    b, g = max(rank, 1), layer._groups
    v, u = layer.weight_in[:b], layer.weight_out[:, :b]  # at rank 0 a term of zeros
    trained = (layer.weight_in.requires_grad, layer.weight_out.requires_grad)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.clone(), layer.bias.requires_grad)
    if form == "factors":
        reduce, expand = _reduce(layer, v, trained[0]), _expand(layer, u, bias, trained[1])
        return nn.Sequential(reduce, expand).train(layer.training)
    m = layer.weight_out.shape[0] // g
    rows, others, order = [], [], torch.empty(g, m, dtype=torch.int64)
    for i, (ui, vi) in enumerate(zip(u.double().split(m), v.double().chunk(g, 1), strict=True)):
        # The choice of rows, and the others as functions of them, depend on the span of u alone.
        q = torch.linalg.qr(ui)[0]
        chosen = _spanning_rows(q)
        rest = [j for j in range(m) if j not in set(chosen)]
        rows.append(ui[chosen] @ vi)
        others.append(torch.linalg.solve(q[chosen].t(), q[rest].t()).t())
        order[i, chosen] = torch.arange(b) + i * b
        order[i, rest] = torch.arange(m - b) + g * b + i * (m - b)
    reduce = _reduce(layer, torch.cat(rows, 1).to(v), trained[0])
    expand = _expand(layer, torch.cat(others).to(u), None, trained[1])
    dim = -1 - getattr(layer, "_n_dim", 0)
    return GaugeAligned(reduce, expand, order.flatten().to(v.device), bias, dim).train(layer.training)


def _reduce(layer: Any, v: Tensor, trained: bool) -> nn.Module:
    """The map of v (b, in), from the layer's input to b channels, b of each group."""
    b = v.shape[0]
    with torch.device("meta"):
        if isinstance(layer, LowRankLinear):
            reduce: Any = nn.Linear(layer.in_features, b, False)
        elif isinstance(layer, LowRankEmbedding):
            reduce = nn.Embedding(layer.num_embeddings, b, layer.padding_idx)
            v = v.t()
        else:
            c = layer
            geometry = (c.kernel_size, c.stride, c.padding, c.dilation, c.groups, False, c.padding_mode)
            reduce = c._dense_class(c.in_channels, c.groups * b, *geometry)
            v = reference.conv_filters(v, c.kernel_size, c.groups)
    reduce.weight = nn.Parameter(v.clone(memory_format=torch.contiguous_format), trained)
    return reduce


def _expand(layer: Any, u: Tensor, bias: nn.Parameter | None, trained: bool) -> nn.Module:
    """The map of u (out, b), pointwise where the layer is a convolution."""
    rows, b = u.shape
    with torch.device("meta"):
        if isinstance(layer, (LowRankLinear, LowRankEmbedding)):
            expand: Any = nn.Linear(b, rows, bias is not None)
        else:
            expand = layer._dense_class(layer.groups * b, rows, 1, groups=layer.groups, bias=bias is not None)
            u = u.reshape(rows, b, *(1,) * layer._n_dim)
    expand.weight = nn.Parameter(u.clone(memory_format=torch.contiguous_format), trained)
    expand.bias = bias
    return expand


def _spanning_rows(q: Tensor) -> list[int]:
    """As many rows of q (m, b) as it has columns, far from dependent: each the longest beside those before it."""
    left, chosen = q.clone(), list[int]()
    for _ in range(q.shape[1]):
        lengths = left.square().sum(1)
        lengths[chosen] = -1
        chosen.append(int(lengths.argmax()))
        row = left[chosen[-1]] / left[chosen[-1]].norm()
        left = left - (left @ row)[:, None] * row
    return chosen


def _tie_weights(first: nn.Module, other: nn.Module) -> None:
    modules = dict(other.named_modules())
    for name, module in first.named_modules():
        if "weight" in module._parameters:
            modules[name].weight = module.weight


def _plain_attention(attention: LowRankMultiheadAttention, parts: list[nn.Module], *, packed: bool) -> nn.Module:
    """``packed``: the projections may become one weight, which a tied one can't be part of."""
    if packed and all(isinstance(part, nn.Linear) for part in parts):
        return packed_attention(attention, *parts)  # type: ignore[arg-type]
    a = attention
    split = SplitMultiheadAttention(
        parts[0],
        parts[1],
        parts[2],
        parts[3],
        a.embed_dim,
        a.num_heads,
        a.dropout,
        a.add_zero_attn,
        a.kdim,
        a.vdim,
        a.batch_first,
        a.bias_k,
        a.bias_v,
    )
    split.training = a.training
    return split


# Measuring


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))


def _mv_flop(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return mm_flop(a, (*b, 1))


def _addmv_flop(bias: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return mm_flop(a, (*b, 1))


def _sdpa_flop(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


_aten = torch.ops.aten
# What FlopCounterMode doesn't know: vectors without a batch, and attention on a CPU.
_MORE = {
    _aten.mv: _mv_flop,
    _aten.addmv: _addmv_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flop,
}


def _macs(model: nn.Module, input: Any) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    with evaluating(model), backend("torch"), counter:
        _call(model, input)
    return counter.get_total_flops() // 2


def latency_ms(model: nn.Module, input: Any, *, calls: int = 20, seconds: float = 0.5) -> float:
    """Median time of a call in evaluation mode, in milliseconds, after two calls that are not counted."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    wait = torch.cuda.synchronize if device.type == "cuda" else contextlib.nullcontext
    times: list[float] = []
    with evaluating(model):
        end = math.inf
        for call in range(calls + 2):
            wait()
            start = time.perf_counter()
            _call(model, input)
            wait()
            now = time.perf_counter()
            if call == 1:
                end = now + seconds
            elif call > 1:
                times.append(now - start)
            if times and now > end:
                break
    return 1000 * statistics.median(times)


def _distance_from(model: nn.Module, input: Any) -> Callable[[nn.Module], float]:
    def output(m: nn.Module) -> Tensor:
        with evaluating(m):
            y = _call(m, input)
        y = y[0] if isinstance(y, tuple) and y else y
        if not isinstance(y, Tensor):
            raise TypeError(f"evaluate must be given for a model whose outputs are no tensors, got {type(y).__name__}")
        return y.double()

    y0 = output(model)
    scale = max(float(y0.norm()), torch.finfo(torch.float64).tiny)
    return lambda m: float((output(m) - y0).norm()) / scale


def _plot(points: Sequence[FrontierPoint], path: Path, score: str) -> None:
    figure = require("matplotlib.figure", extra="train").Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle("One training, many models")
    for ax, name in zip(figure.subplots(1, 2, sharey=True), ("params", "macs"), strict=True):
        line = sorted((getattr(p, name), p.score) for p in points)
        ax.plot(*zip(*line, strict=True), marker="o", color="tab:blue")
        ax.set_xlabel({"params": "parameters", "macs": "multiply-accumulates"}[name])
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel(score)
    figure.savefig(path, dpi=130)
