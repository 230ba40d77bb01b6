"""Replacing modules in a user's model: one walk, one set of guarantees, one report for every family.

A family defines a config class and registers a rule for it; :func:`convert` does the rest::

    @dataclass
    class LowRankConfig:
        rank: int

    @register_conversion(LowRankConfig)
    def _(name, module, config):
        if type(module) is not nn.Linear:
            return None
        if config.rank >= min(module.weight.shape):
            return Skip(f"rank {config.rank} saves nothing on {tuple(module.weight.shape)}")
        return LowRankLinear.from_linear(module, config.rank)
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

__all__ = ["ConversionReport", "ConversionRow", "Skip", "convert", "lies_under", "register_conversion", "selection"]


class Skip(NamedTuple):
    """What a rule returns for a module that it is meant for but cannot or should not replace, with the reason."""

    reason: str


Rule = Callable[[str, nn.Module, Any], "nn.Module | Skip | None"]
RuleT = TypeVar("RuleT", bound=Rule)

_RULES: dict[type, Rule] = {}


def register_conversion(config_class: type) -> Callable[[RuleT], RuleT]:
    """Register the decorated rule for ``config_class`` and its subclasses.

    ``rule(name, module, config)`` is called for each module of a model, parents first, and returns

    - a module, the replacement: built from ``module`` without changing it;
    - :class:`Skip` with a reason, where the module is of the right kind but is left alone;
    - None, where the rule has nothing to do with it.

    Below a replaced module nothing else is asked. A replacement stands where code may read the original's attributes
    (``nn.TransformerEncoderLayer`` reads ``linear1.weight`` in eval mode): offer those that make sense.
    """

    def register(rule: RuleT) -> RuleT:
        if config_class in _RULES:
            raise ValueError(f"config_class must have no rule yet, got {config_class.__name__} a second time")
        _RULES[config_class] = rule
        return rule

    return register


@dataclass
class ConversionRow:
    """One module that was replaced, or that was skipped for a reason.

    Attributes:
        name: its qualified name; "" is the model itself.
        old_type, new_type: class names; ``new_type`` is None where it was skipped.
        parameters_before, parameters_after: numbers of parameters.
        reason: why it was skipped, else None.
        also: further names of the same module, where the model uses it in several places.
        extra: further columns of the report (column title -> value), for the family to fill.
    """

    name: str
    old_type: str
    new_type: str | None
    parameters_before: int
    parameters_after: int
    reason: str | None = None
    also: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class ConversionReport:
    """What :func:`convert` did. ``print(report)`` shows a table.

    Attributes:
        model: the converted model. It is the one passed in, changed in place, except where the rule replaced the
            model itself.
        config: the config that was applied.
        rows: one a module that was replaced or skipped, in the model's order.
        parameters_before, parameters_after: numbers of parameters of the whole model, shared ones counted once.
    """

    model: nn.Module
    config: Any
    rows: list[ConversionRow]
    parameters_before: int
    parameters_after: int

    @property
    def converted(self) -> list[ConversionRow]:
        """The rows of the modules that were replaced."""
        return [row for row in self.rows if row.new_type is not None]

    @property
    def skipped(self) -> list[ConversionRow]:
        """The rows of the modules that were left alone for a reason."""
        return [row for row in self.rows if row.new_type is None]

    def __str__(self) -> str:
        titles = list(dict.fromkeys(title for row in self.rows for title in row.extra))
        table = [["module", "from", "to", "parameters", *titles, ""]]
        for row in self.rows:
            name = ", ".join(n or "(the model)" for n in (row.name, *row.also))
            count = f"{row.parameters_before:,}"
            if row.new_type is not None:
                count += f" -> {row.parameters_after:,}"
            note = "" if row.reason is None else f"skipped: {row.reason}"
            cells = [name, row.old_type, row.new_type or "-", count]
            table.append([*cells, *(str(row.extra.get(t, "")) for t in titles), note])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        before, after = self.parameters_before, self.parameters_after
        share = f" ({after / before:.1%})" if before else ""
        kind = type(self.config).__name__
        if not self.rows:
            return f"{kind}: nothing converted, no module matched; {before:,} parameters"
        total = f"{kind}: {len(self.converted)} converted, {len(self.skipped)} skipped"
        return "\n".join([*lines, f"{total}; parameters {before:,} -> {after:,}{share}"])


def lies_under(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern (``*`` and ``?`` as in file names) fits the module ``name`` or a module that it is in."""
    parts = name.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(part, pattern) for part in above for pattern in patterns)


def selection(
    name: str, entries: Iterable[str | type[nn.Module]], names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[type[nn.Module], ...]]:
    """The entries of a user's argument ``name`` as (name patterns, classes), each pattern one that fits a module.

    Args:
        name: the argument, for messages.
        entries: qualified names (``*`` and ``?`` as in file names) and module classes, or one of them.
        names: those of the model's modules.

    Raises:
        ValueError: a name fits no module, nor a module above one; the message has the nearest.
        TypeError: an entry is neither a name nor a module class.
    """
    if isinstance(entries, (str, type)):
        entries = (entries,)
    patterns, kinds = [], []
    for entry in entries:
        if isinstance(entry, str):
            if not any(lies_under(n, (entry,)) for n in names):
                near = difflib.get_close_matches(entry, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name} must name modules of the model, got {entry!r}, which fits none{hint}")
            patterns.append(entry)
        elif isinstance(entry, type) and issubclass(entry, nn.Module):
            kinds.append(entry)
        else:
            raise TypeError(f"{name} must hold names and module classes, got {entry!r} ({type(entry).__name__})")
    return tuple(patterns), tuple(kinds)


def convert(
    model: nn.Module, config: Any, *, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> ConversionReport:
    """Replace modules of ``model`` in place, as ``config`` says, and report what was done.

    ::

        report = torchlayers.convert(model, LowRankConfig(rank=8), filter_fn=lambda module, name: name != "head")
        model = report.model
        print(report)

    Replacements keep the original's train or eval mode, its device, the dtype of its parameters (where it has one) and
    whether they require gradients: a parameter with a namesake in the original takes the namesake's flag, the others
    that of the original's remaining parameters. A module that the model uses in several places is converted once and
    stays shared. All replacements are built before the first is put in place, so that an error leaves the model as it
    was. Make the optimizer, and wrap for data parallelism, afterwards.

    Skipped, with the reason in the report: modules with forward or backward hooks or parametrizations that would be
    lost, and modules with a parameter that is tied to one outside, where the replacement doesn't hold that parameter.

    Args:
        model: any module.
        config: an instance of a family's config class.
        filter_fn: ``filter_fn(module, qualified_name)`` says whether a module may be replaced; modules that it
            rejects are still searched. All are allowed by default.

    Raises:
        TypeError: ``model`` is no module, ``filter_fn`` cannot be called, or no rule is registered for ``config``.
        ValueError: the model is wrapped for data parallelism, or the rule found fault with a module (named in the
            message).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(module, name), got {type(filter_fn).__name__}")
    rule = next((_RULES[c] for c in type(config).__mro__ if c in _RULES), None)
    if rule is None:
        got = f"the class {config.__name__}, not an instance" if isinstance(config, type) else type(config).__name__
        known = ", ".join(sorted(c.__name__ for c in _RULES)) or "none"
        raise TypeError(f"config must be an instance of a class with a conversion rule (imported: {known}), got {got}")
    _check_not_wrapped(model)

    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    occurrences = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    before = _count(model)

    rows: list[ConversionRow] = []
    replacements: dict[nn.Module, nn.Module] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        name, *also = names[module]
        allowed = [filter_fn is None or bool(filter_fn(module, n)) for n in names[module]]
        result = _ask(rule, name, module, config) if any(allowed) else None
        if isinstance(result, nn.Module):
            refused = None
            if not all(allowed):
                refused = f"shared with {names[module][allowed.index(False)]}, which filter_fn rejects"
            refused = refused or _lost(module, result, occurrences, len(names[module]))
            result = result if refused is None else Skip(refused)
        if result is not None:
            replaced = isinstance(result, nn.Module)
            rows.append(
                ConversionRow(
                    name=name,
                    old_type=type(module).__name__,
                    new_type=type(result).__name__ if replaced else None,
                    parameters_before=_count(module),
                    parameters_after=_count(result if isinstance(result, nn.Module) else module),
                    reason=result.reason if isinstance(result, Skip) else None,
                    also=tuple(also),
                )
            )
        if isinstance(result, nn.Module):
            replacements[module] = result
        else:
            for child in module.children():
                visit(child)

    visit(model)
    for module, replacement in replacements.items():
        _take_over(module, replacement)
    for parent in names:
        for key, child in parent._modules.items():
            if child in replacements and parent not in replacements:
                parent._modules[key] = replacements[child]
    converted = replacements.get(model, model)
    return ConversionReport(converted, config, rows, before, _count(converted))


def _ask(rule: Rule, name: str, module: nn.Module, config: Any) -> nn.Module | Skip | None:
    where = f"{name or 'the model'} ({type(module).__name__})"
    try:
        result = rule(name, module, config)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"converting {where}: {error}") from error
    if result is module or not (result is None or isinstance(result, (nn.Module, Skip))):
        got = "the module itself" if result is module else type(result).__name__
        raise TypeError(
            f"the rule of {type(config).__name__} must return a new module, Skip or None, got {got}: {where}"
        )
    return result


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def _check_not_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ValueError(f"model must not be wrapped yet, got {type(module).__name__} at {name or 'the model'}")
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError("model must not be sharded yet, got DTensor parameters: convert, then shard")


def _lost(module: nn.Module, replacement: nn.Module, occurrences: Counter[int], places: int) -> str | None:
    """What of ``module`` the replacement would silently drop, in words, or None."""
    kept = set(replacement.modules())
    for name, part in module.named_modules():
        if part in kept:
            continue
        at = f" of {name}" if name else ""
        if parametrize.is_parametrized(part):
            return f"has a parametrization{at}"
        if any((part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)):
            return f"has hooks{at}"
    kept_parameters = {id(p) for p in replacement.parameters()}
    inside = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for name, parameter in module.named_parameters():
        # A parameter that is the module's own is met only on paths through the module.
        own = occurrences[id(parameter)] == inside[id(parameter)] * places
        if not own and id(parameter) not in kept_parameters:
            return f"its parameter {name} is tied to another module's"
    return None


def _take_over(module: nn.Module, replacement: nn.Module) -> None:
    """Give ``replacement`` the mode, device, dtype and gradient flags of ``module``; what it kept of it stays."""
    old_modules, old = set(module.modules()), dict(module.named_parameters())
    kept = {id(p) for p in old.values()}
    for part in replacement.modules():
        if part not in old_modules:
            part.training = module.training

    devices = {t.device for t in (*old.values(), *module.buffers())}
    dtypes = {p.dtype for p in old.values() if p.is_floating_point()}
    device = next(iter(devices)) if len(devices) == 1 else None
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
    parameters = {id(p) for p in replacement.parameters()}

    def wanted(t: torch.Tensor) -> tuple[torch.device, torch.dtype]:
        cast = dtype is not None and id(t) in parameters and t.is_floating_point()
        return device or t.device, dtype if cast and dtype is not None else t.dtype

    fresh = [t for t in (*replacement.parameters(), *replacement.buffers()) if id(t) not in kept and not is_lazy(t)]
    if any(wanted(t) != (t.device, t.dtype) for t in fresh):
        ids = {id(t) for t in fresh}
        replacement._apply(lambda t: t.to(*wanted(t)) if id(t) in ids else t)

    new = dict(replacement.named_parameters())
    held = {id(p) for p in new.values()}
    rest = [p.requires_grad for name, p in old.items() if name not in new and id(p) not in held]
    for name, parameter in new.items():
        if id(parameter) in kept or not (parameter.is_floating_point() or parameter.is_complex()):
            continue
        if name in old:
            parameter.requires_grad_(old[name].requires_grad)
        elif rest:
            parameter.requires_grad_(any(rest))
