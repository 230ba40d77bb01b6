"""A user's CNN by one-way filters: which convolutions, at what saving, and at what speed."""

from __future__ import annotations

import fnmatch
import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import benchmark

from .. import _surgery
from .._checks import check_choice
from .._surgery import ConversionReport, Skip, lies_under, register_conversion, selection
from .modules import (
    FORMATS,
    Rank,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
    SeparableConvTranspose2d,
    _arguments,
    _SeparableConv,
)

__all__ = ["SeparableConfig", "convert"]

_KINDS: dict[type[nn.Module], type[_SeparableConv]] = {
    nn.Conv1d: SeparableConv1d,
    nn.Conv2d: SeparableConv2d,
    nn.Conv3d: SeparableConv3d,
    nn.ConvTranspose2d: SeparableConvTranspose2d,
}


@dataclass(frozen=True)
class SeparableConfig:
    """For :func:`torchlayers.convert`: separable convolutions in place of dense ones, see :func:`convert`.

    Attributes:
        format, rank: as in :class:`SeparableConv2d`; a rank above a layer's full rank skips that layer.
        init: "fresh" draws new weights, "decomposed" takes the layer's own.

    Raises:
        ValueError: an unknown format or start, a fraction outside (0, 1].
    """

    format: str = "seq"
    rank: Rank = 0.5
    init: str = "fresh"

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)
        check_choice("init", self.init, ("fresh", "decomposed"))
        if isinstance(self.rank, float) and not 0 < self.rank <= 1:
            raise ValueError(f"rank must be a fraction of the full rank in (0, 1] or a whole number, got {self.rank}")


@register_conversion(SeparableConfig)
def _(name: str, module: nn.Module, config: SeparableConfig) -> nn.Module | Skip | None:
    kind = next((k for k in _KINDS if isinstance(module, k)), None)
    if kind is None:
        return None
    conv: Any = module
    if is_lazy(conv.weight):
        return Skip("lazy: call the model once first")
    if all(k == 1 for k in conv.kernel_size):
        return Skip("1×1: there is nothing to separate")
    if conv.groups > 1:
        return Skip(f"grouped (groups={conv.groups})")
    if type(module) is not kind:
        return Skip(f"a class of its own, derived from {kind.__name__}")
    maker: Any = _KINDS[kind]
    rank = config.rank
    if isinstance(rank, tuple) and (config.format != "seq" or kind is not nn.Conv3d):
        return Skip("rank is a pair, which only format='seq' in three dimensions takes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rank that saves nothing is in the report
        trial = maker(**_arguments(conv), device="meta", format=config.format)
        full = trial.full_rank
        top = full if isinstance(full, tuple) else (full,)
        asked = rank if isinstance(rank, tuple) else (rank,)
        if any(type(r) is int and r > max(top) for r in asked):
            return Skip(f"rank {rank} is above its full rank, {full}")
        chosen = trial._resolve(rank)
        if trial._count(chosen) >= trial._dense_count:
            return Skip(f"no saving: rank {chosen} against a break-even of {trial.break_even_rank}")
        return maker.from_conv(conv, chosen, config.format, init=config.init)


def convert(
    model: nn.Module,
    format: str = "seq",
    rank: Rank = 0.5,
    *,
    init: str = "fresh",
    skip: Iterable[str | type[nn.Module]] = (),
    example_input: Any = None,
) -> ConversionReport:
    """Replace the convolutions of ``model`` in place by separable ones: before training, or after it.

    ::

        report = convert(model, "seq", 0.25, skip=["stem.*"], example_input=torch.randn(1, 3, 224, 224))
        print(report)                       # weights, multiplications and time of each layer, before and after
        model = report.model

    Fewer weights are not fewer multiplications ("kernelwise" saves none), and fewer multiplications are not less time:
    the report has a column for each. It is :func:`torchlayers.convert` with a :class:`SeparableConfig`. Make the
    optimizer, and wrap for data parallelism, afterwards; separable layers need a learning rate of their own, often 1.5
    to 2 times the dense one with AdamW.

    Args:
        model: any module.
        format, rank: as in :class:`SeparableConv2d`; a fraction is one of each layer's full rank.
        init: "fresh" draws new weights with the variance of the dense layer, for training from the start; "decomposed"
            takes the layer's own as well as the rank allows.
        skip: what to leave: qualified names (``*`` and ``?`` as in file names) and classes, each with what is below it.
        example_input: what the model is called with (a tensor, or a tuple of arguments) to learn the sizes of the
            layers' inputs; the report then counts multiplications and measures times.

    Returns:
        The report. Skipped, with the reason: 1×1 and grouped layers, layers that the rank saves nothing on, lazy ones.

    Raises:
        ValueError, TypeError: bad options, a name to skip that fits no module, or a model that
            :func:`torchlayers.convert` refuses.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    config = SeparableConfig(format, rank, init)
    named = list(model.named_modules(remove_duplicate=False))
    left, classes = selection("skip", skip, [name for name, _ in named])
    left += tuple(name for name, module in named if isinstance(module, classes))
    # The model itself has the name "", which is above all others.
    whole = any(fnmatch.fnmatchcase("", pattern) for pattern in left)

    def wanted(module: nn.Module, name: str) -> bool:
        return not whole and not lies_under(name, left)

    inputs, dense = {}, {}
    if example_input is not None:
        inputs = _inputs_of_convolutions(model, example_input)
        dense = {name: module for name, module in model.named_modules() if name in inputs}
    report = _surgery.convert(model, config, filter_fn=wanted)
    after = dict(report.model.named_modules())
    for row in report.converted:
        old, new, x = dense.get(row.name), after[row.name], inputs.get(row.name)
        if old is None or x is None or not isinstance(new, _SeparableConv):
            continue
        size = x.shape[2:] if x.ndim == new._dims + 2 else x.shape[1:]
        macs = new._dense_macs(*size)
        row.extra["MACs"] = f"{macs:,} -> {new.macs(*size):,}"
        row.extra["ms"] = f"{_milliseconds(old, x):.3f} -> {_milliseconds(new, x):.3f}"
    return report


def _inputs_of_convolutions(model: nn.Module, example: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles, kinds = [], tuple(_KINDS)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            hook = functools.partial(_note, found, name)
            handles.append(module.register_forward_pre_hook(hook))
    training = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(*example) if isinstance(example, tuple) else model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return found


def _note(found: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    found.setdefault(name, args[0].detach())


def _milliseconds(layer: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        timer = benchmark.Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.05).median * 1e3
