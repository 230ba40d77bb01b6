"""Ordered dropout: which layer runs at which rank in a training step, and the loss of such a step.

A step of low-rank ordered decomposition runs one layer at a lower rank and all others as they are. Its gradient reaches
only the first terms of that layer, so that early terms learn more, and what matters most settles there.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_int
from .layers import LowRankLayer

__all__ = ["RankSampler", "lod_loss", "sampled_ranks"]

LAYER_PROBS = ("pair", "uniform", "independent")
MODES = ("sampled", "full+sampled", "split")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The low-rank layers of ``model`` by their names in it, whatever it is wrapped in.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no low-rank layer.
    """
    model = unwrapped(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLayer)}
    if not layers:
        raise ValueError(
            f"model must have low-rank layers (factorize makes them), got a {type(model).__name__} of none"
        )
    return layers


class RankSampler:
    """Draws which layers run at which rank: a function of (seed, step) alone and of the ranks that layers have.

    - ``"pair"``: one layer and one rank, from the list of all pairs (layer, 1..its rank). The list is shuffled and
      walked, and shuffled anew at its end, so that each pair comes once in Σ rank steps; a layer is drawn as often as
      it has ranks. This is the law of the released code.
    - ``"uniform"``: a layer, all alike, and then one of its ranks.
    - ``"independent"``: a rank for every layer.

    Ranks are read at each draw, so that the sampler goes on by itself after ``progressive_shrink``. Layers at rank 0
    are not drawn. No random state is kept or moved: a resumed run repeats its draws.

    Args:
        model: has low-rank layers; may be wrapped for data parallelism or compilation.
        layer_prob: the law.
        seed: of the draws.
        replacement: ``"pair"`` only: draw each step's pair anew, instead of walking the list.
        dp_rank: None for the same draws on all ranks of a data-parallel run; an int, such as
            ``torch.distributed.get_rank()``, for draws of its own on each, which lowers the variance: the reduced
            gradient is the mean over the draws.

    Raises:
        TypeError: ``model`` is no module, an int argument is none.
        ValueError: ``model`` has no low-rank layer, or the law is not known.

    Source: arXiv 2308.14929, section 3.1, and its released code.

    Example:

        >>> from torch import nn
        >>> from torchlayers.maestro import LowRankLinear, RankSampler
        >>> model = nn.Sequential(LowRankLinear(8, 6), nn.ReLU(), LowRankLinear(6, 4))
        >>> sampler = RankSampler(model, seed=0)
        >>> pairs = {tuple(sampler.sample(step).items()) for step in range(10)}
        >>> len(pairs), sampler.sample(3) == RankSampler(model, seed=0).sample(3)
        (10, True)
    """

    def __init__(
        self,
        model: nn.Module,
        layer_prob: str = "pair",
        seed: int = 0,
        *,
        replacement: bool = False,
        dp_rank: int | None = None,
    ):
        self.layers = low_rank_layers(model)
        check_choice("layer_prob", layer_prob, LAYER_PROBS)
        self.layer_prob = layer_prob
        self.seed = check_int("seed", seed, minimum=-(2**63))
        self.replacement = replacement
        self.dp_rank = None if dp_rank is None else check_int("dp_rank", dp_rank, minimum=0)
        self._walk: tuple[tuple[int, int], list[int]] | None = None  # the latest (round, length) and its order

    def sample(self, step: int) -> dict[str, int]:
        """The ranks of step ``step`` (from 0), by layer; layers that are not named run as they are.

        Empty where all layers have rank 0.
        """
        check_int("step", step, minimum=0)
        ranks = {name: layer.rank for name, layer in self.layers.items() if layer.rank > 0}
        if not ranks:
            return {}
        if self.layer_prob == "pair":
            bounds = list(itertools.accumulate(ranks.values()))
            pair = self._pair(step, bounds[-1])
            place = bisect.bisect_right(bounds, pair)
            return {list(ranks)[place]: bounds[place] - pair}
        draw = self._random(step)
        if self.layer_prob == "uniform":
            name = list(ranks)[_below(draw, len(ranks))]
            return {name: 1 + _below(draw, ranks[name])}
        return {name: 1 + _below(draw, rank) for name, rank in ranks.items()}

    def _pair(self, step: int, pairs: int) -> int:
        if self.replacement:
            return _below(self._random(step), pairs)
        number, place = divmod(step, pairs)
        if self._walk is None or self._walk[0] != (number, pairs):
            draw = self._random(number)
            self._walk = (number, pairs), sorted(range(pairs), key=lambda _: draw.random())
        return self._walk[1][place]

    def _random(self, counter: int) -> random.Random:
        # Seeded by a hash of the words, and read by random() alone: both are the same in every version of Python.
        return random.Random(f"{self.layer_prob} {self.seed} {self.dp_rank} {counter}")

    def __repr__(self) -> str:
        total = sum(layer.rank for layer in self.layers.values())
        return f"RankSampler({len(self.layers)} layers, {total} ranks, {self.layer_prob!r}, seed={self.seed})"


def _below(draw: random.Random, n: int) -> int:
    return int(draw.random() * n)


class sampled_ranks(contextlib.AbstractContextManager):
    """Within the block, the named layers of ``model`` run at the given ranks; afterwards as before. Blocks nest.

    ::

        with sampled_ranks(model, {"encoder.0.linear1": 16}):
            loss = loss_fn(model(x), y)

    A rank that a call names itself goes before. Backward may come after the block, except through activation
    checkpoints, which run their part of the model again: there either run backward inside the block, or hand the ranks
    of the forward on to it::

        checkpoint(block, x, use_reentrant=False, context_fn=partial(sampled_ranks.kept, model))

    Args:
        model: has low-rank layers; may be wrapped for data parallelism or compilation.
        ranks: layer -> rank, an int from 0 to the layer's; or a tensor of ints with one rank for each sample, where
            dimension 0 of what the layer gets is the batch.

    Raises:
        TypeError: ``ranks`` is no mapping, or a rank no int.
        ValueError: there is no layer of such a name, or a rank is outside 0..the layer's.
    """

    def __init__(self, model: nn.Module, ranks: Mapping[str, int | Tensor]):
        layers = low_rank_layers(model)
        if not isinstance(ranks, Mapping):
            raise TypeError(f"ranks must be a mapping from layer to rank, got {type(ranks).__name__}")
        for name, rank in ranks.items():
            check_choice("a layer in ranks", name, layers)
            _check_rank(f"ranks[{name!r}]", rank, layers[name].rank)
        # Layers that are not named are pinned to what they run at anyway: which ones are is then no matter to a graph.
        self._ranks: list[tuple[LowRankLayer, Any]] = [(layer, ranks.get(name)) for name, layer in layers.items()]
        self._before: list[list[Any]] = []

    def __enter__(self) -> sampled_ranks:
        before = [layer._sampled for layer, _ in self._ranks]
        self._before.append(before)
        for (layer, rank), current in zip(self._ranks, before, strict=True):
            own = layer.rank if current is None else current
            layer._sampled = own if rank is None else rank
        return self

    def __exit__(self, *exc_info: object) -> None:
        for (layer, _), rank in zip(self._ranks, self._before.pop(), strict=True):
            layer._sampled = rank

    @staticmethod
    def kept(model: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """Contexts for forward and recomputation of ``torch.utils.checkpoint``: the second has the ranks of now."""
        again = sampled_ranks(model, {})
        again._ranks = [(layer, layer._sampled) for layer in low_rank_layers(model).values()]
        return contextlib.nullcontext(), again


def _check_rank(name: str, rank: object, maximum: int) -> None:
    if isinstance(rank, Tensor):
        if rank.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int or a tensor of ints, got a tensor of {rank.dtype}")
        if rank.ndim != 1:
            raise ValueError(f"{name} must have one rank for each sample, (batch,), got shape {tuple(rank.shape)}")
        # A tensor elsewhere than on the CPU would have to be waited for.
        bounds = [int(rank.min()), int(rank.max())] if rank.device.type == "cpu" and rank.numel() else []
    else:
        bounds = [check_int(name, rank, minimum=0)]
    for value in bounds:
        if not 0 <= value <= maximum:
            raise ValueError(f"{name} must be from 0 to {maximum}, the layer's rank, got {value}")


def lod_loss(
    model: nn.Module,
    x: Any,
    y: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    sampler: RankSampler,
    step: int,
    mode: str = "sampled",
    *,
    soft_target: Callable[[Any], Any] | None = None,
    parts: int = 4,
) -> Tensor:
    """The loss of one step of low-rank ordered decomposition, without penalty, f_s the model at the ranks of a draw.

    - ``"sampled"``: loss_fn(f_s(x), y), one pass;
    - ``"full+sampled"``: loss_fn(f(x), y) + loss_fn(f_s(x), t), two passes, where the full model teaches: t is its
      output f(x) as a target, without gradient. Losses are summed, as in the released code;
    - ``"split"``: one pass over the batch in ``parts`` runs of samples, the first at the full ranks and each other at a
      draw of its own, compared with ``y``. Batch norm would mix the runs' statistics; group or layer norm does not.

    Add ``lam * hierarchical_group_lasso(model)``, or take ``hgl_prox_`` after the optimizer's step.

    Under DDP and FSDP2 ranks may draw differently. Activation checkpoints inside ``model`` need
    :meth:`sampled_ranks.kept`.

    Args:
        model: has low-rank layers. All terms of a layer get gradients, zeros beyond the rank of the draw.
        x: input of the model; a tuple is several arguments, a mapping keyword arguments.
        y: target, the second argument of ``loss_fn``.
        loss_fn: ``loss_fn(output, target)``, a scalar.
        sampler: of the draws.
        step: the number of this step, from 0.
        mode: see above.
        soft_target: ``"full+sampled"`` only: makes the target t from the full model's detached output. By default its
            softmax over the classes (dimension 1) for integer ``y`` and cross-entropy, its sigmoid for binary
            cross-entropy with logits, else the output itself, as suits regression.
        parts: ``"split"`` only: how many runs the batch is cut into, 2 or more.

    Raises:
        ValueError: an unknown mode, or ``sampler`` belongs to a model with other layers.
        TypeError: arguments of another kind.

    Source: arXiv 2308.14929, section 3, and its released code.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from torchlayers.maestro import LowRankLinear, RankSampler, lod_loss
        >>> model = nn.Sequential(LowRankLinear(8, 6), nn.ReLU(), LowRankLinear(6, 4))
        >>> x, y = torch.randn(5, 8), torch.randint(4, (5,))
        >>> loss = lod_loss(model, x, y, nn.functional.cross_entropy, RankSampler(model), step=0, mode="full+sampled")
        >>> loss.backward()
    """
    check_choice("mode", mode, MODES)
    if not isinstance(sampler, RankSampler):
        raise TypeError(f"sampler must be a RankSampler, got {type(sampler).__name__}")
    check_int("step", step, minimum=0)
    check_int("parts", parts, minimum=2)
    if mode == "split":
        with sampled_ranks(model, _split_ranks(model, _batch_size(x), sampler, step, parts)):
            return loss_fn(_call(model, x), y)
    context = sampled_ranks(model, sampler.sample(step))
    if mode == "sampled":
        with context:
            return loss_fn(_call(model, x), y)
    output = _call(model, x)
    loss, teacher = loss_fn(output, y), _detached(output)
    target = _default_target(teacher, y, loss_fn) if soft_target is None else soft_target(teacher)
    with context:
        return loss + loss_fn(_call(model, x), target)


def _call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, Mapping) else model(x)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_tensors, x))
    elif isinstance(x, Mapping):
        yield from _tensors(list(x.values()))


def _batch_size(x: Any) -> int:
    first = next(_tensors(x), None)
    if first is None or first.ndim == 0:
        raise TypeError(f"x must hold a tensor with a batch dimension to be split, got {type(x).__name__}")
    return first.shape[0]


def _split_ranks(model: nn.Module, batch: int, sampler: RankSampler, step: int, parts: int) -> dict[str, Tensor]:
    """The rank of each sample in every layer; all layers, so that a compiled model is one graph for all draws."""
    ranks = {name: torch.full((batch,), layer.rank) for name, layer in low_rank_layers(model).items()}
    for part in range(1, parts):
        run = slice(part * batch // parts, (part + 1) * batch // parts)
        for name, rank in sampler.sample(step * (parts - 1) + part - 1).items():
            check_choice("a layer of sampler", name, ranks)
            ranks[name][run] = rank
    layers = sampler.layers
    return {name: rank.to(layers[name].weight_in.device, non_blocking=True) for name, rank in ranks.items()}


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_detached, output))
    if isinstance(output, (tuple, list)):
        return type(output)(map(_detached, output))
    if isinstance(output, dict):
        return type(output)({key: _detached(value) for key, value in output.items()})
    return output


def _default_target(output: Any, y: Any, loss_fn: Any) -> Any:
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    if isinstance(loss_fn, nn.BCEWithLogitsLoss) or loss_fn is F.binary_cross_entropy_with_logits:
        activation: Callable[[Tensor], Tensor] = torch.sigmoid
    elif (
        isinstance(loss_fn, nn.CrossEntropyLoss)
        or loss_fn is F.cross_entropy
        or (isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex())
    ):
        activation = _softmax
    else:
        return output
    if not isinstance(output, Tensor):
        raise TypeError(f"soft_target must be given where the model's output is no tensor, got {type(output).__name__}")
    return activation(output)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1 if logits.ndim > 1 else 0)
