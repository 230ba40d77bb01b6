"""A user's model in low-rank layers: which modules, at which ranks, in which order of terms."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._surgery import ConversionReport, Skip, _check_not_wrapped, convert, lies_under, register_conversion, selection
from .attention import LowRankMultiheadAttention, capped_rank
from .layers import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankEmbedding, LowRankLayer, LowRankLinear
from .ordered import low_rank_layers
from .shrink import _run as run_batch

__all__ = ["LowRankConfig", "canonicalize_", "factorize"]

_CONVERTERS: dict[type[nn.Module], Callable[[Any, int], nn.Module]] = {
    nn.Linear: LowRankLinear.from_linear,
    nn.Conv1d: LowRankConv1d.from_conv,
    nn.Conv2d: LowRankConv2d.from_conv,
    nn.Conv3d: LowRankConv3d.from_conv,
    nn.Embedding: LowRankEmbedding.from_embedding,
}
_DEFAULT: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_KINDS: tuple[type[nn.Module], ...] = (*_DEFAULT, nn.Embedding)


@dataclass(frozen=True)
class LowRankConfig:
    """For :func:`torchlayers.convert`: low-rank layers in place of dense ones, see :func:`factorize`.

    Attributes:
        max_rank: None, the full rank, with which outputs stay as they are; an int, for layers whose full rank is
            higher; a fraction p in (0, 1] of each layer's full rank r, ⌈p r⌉.
        only: the classes to replace: of ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``,
            ``nn.MultiheadAttention`` (the default) and ``nn.Embedding``.

    Raises:
        TypeError, ValueError: other classes, a rank that is none.
    """

    max_rank: int | float | None = None
    only: tuple[type[nn.Module], ...] = _DEFAULT

    def __post_init__(self):
        capped_rank(self.max_rank, 1)
        for kind in self.only:
            if kind not in _KINDS:
                known = ", ".join(k.__name__ for k in _KINDS)
                raise ValueError(f"only must name classes out of {known}, got {getattr(kind, '__name__', kind)!r}")


@register_conversion(LowRankConfig)
def _(name: str, module: nn.Module, config: LowRankConfig) -> nn.Module | Skip | None:
    kind = next((k for k in config.only if isinstance(module, k)), None)
    # The output projection of nn.MultiheadAttention is a linear map of a class of its own, read by the attention.
    if kind is None or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if any(p.numel() == 0 for p in module.parameters() if not nn.parameter.is_lazy(p)):
        return Skip("has no entries")
    if type(module) is not kind and not parametrize.is_parametrized(module):
        return Skip(f"a class of its own, derived from {kind.__name__}")
    if kind is nn.MultiheadAttention:
        return LowRankMultiheadAttention.from_multihead_attention(module, config.max_rank)  # type: ignore[arg-type]
    full = _full_rank(module)
    if full == 1 and getattr(module, "groups", 1) > 1:
        return Skip("depthwise: one filter a group leaves no ranks to choose from")
    return _CONVERTERS[kind](module, capped_rank(config.max_rank, full))


def _full_rank(module: nn.Module) -> int:
    """Of the module's weight, read as a matrix, or one matrix a group."""
    weight: Any = module.weight
    return min(weight.shape[0] // getattr(module, "groups", 1), weight[0].numel())


def factorize(
    model: nn.Module,
    *,
    skip: Iterable[str | type[nn.Module]] = (),
    only: Iterable[str | type[nn.Module]] | None = None,
    max_rank: int | float | None = None,
    calibration: Iterable[Any] | None = None,
    inplace: bool = False,
    report: Callable[[ConversionReport], object] | None = None,
) -> nn.Module:
    """``model`` in low-rank layers: with the outputs it has, at their full rank, by a balanced SVD of every weight.

    ::

        model = factorize(model, skip=["head"], report=print)           # prints what was replaced, as a table

    ``nn.Linear``, ``nn.Conv1d/2d/3d`` and ``nn.MultiheadAttention`` (its packed projection split in three) become
    :class:`LowRankLinear`, :class:`LowRankConv1d` and so on. A module that is used in several places stays shared, and
    modules that share a weight go on sharing its factors. It is ``torchlayers.convert`` with a :class:`LowRankConfig`;
    besides, encoder layers of ``torch.nn`` no longer take the path around their parts that they have for evaluation.
    Make the optimizer, and wrap for data parallelism, afterwards.

    Args:
        model: any module.
        skip: what to leave: qualified names (``*`` and ``?`` as in file names) and classes, each with
            what is inside.
        only: what to replace, likewise. Classes stand instead of those above, and may include ``nn.Embedding``.
        max_rank: None, an int, or a fraction of each layer's full rank, see :class:`LowRankConfig`.
        calibration: batches of typical inputs, for factors whose prefixes keep the *outputs* on such inputs best
            instead of the weights (reduced-rank regression). A batch is a tensor, a tuple or list whose first entry is
            the input, or a dict of keyword arguments. The model runs in evaluation mode, without gradients.
        inplace: change ``model`` itself instead of a copy.
        report: called with the :class:`~torchlayers._surgery.ConversionReport`. Its columns "rank" and "break-even"
            are the terms that the factors hold and the rank from which they cost more than the dense layer.

    Returns:
        the model; the one passed in if ``inplace``, unless it was itself replaced.

    Raises:
        TypeError: no module, complex weights.
        ValueError: parametrised weights or ones that are not finite (``skip`` may leave them), a name that fits no
            module, a class that is not known here, a rank that is none; nothing to replace.

    Source: arXiv 2308.14929, section 3.

    Example:

        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> low_rank, x = factorize(model), torch.randn(3, 16)
        >>> torch.allclose(low_rank(x), model(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_not_wrapped(model)
    named = list(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in named]
    skip_names, skip_kinds = selection("skip", skip, names)
    skip_names += tuple(name for name, module in named if isinstance(module, skip_kinds))
    only_names, only_kinds = selection("only", () if only is None else only, names)
    config = LowRankConfig(None if calibration is not None else max_rank, only_kinds or _DEFAULT)
    capped_rank(max_rank, 1)

    def wanted(module: nn.Module, name: str) -> bool:
        return not lies_under(name, skip_names) and (not only_names or lies_under(name, only_names))

    if not inplace:
        _check_can_copy(named)
        model = copy.deepcopy(model)
    before = _count(model)
    with _untied(model, config, wanted) as tie_again:
        result = convert(model, config, filter_fn=wanted)
        tie_again(result.model)
    model = result.model
    if not result.converted:
        why = f":\n{result}" if result.rows else ""
        raise ValueError(
            f"model must have layers to factorise ({', '.join(k.__name__ for k in config.only)}), got none{why}"
        )
    call_parts(model)
    if calibration is not None:
        canonicalize_(model, calibration=calibration)
        for layer in low_rank_layers(model).values():
            layer.truncate_(capped_rank(max_rank, layer.max_rank), physical=True)
        tie_again(model)
    for row in result.converted:
        layers = list(low_rank_layers(model.get_submodule(row.name)).values())
        row.parameters_after = _count(model.get_submodule(row.name))
        row.extra["rank"] = "/".join(str(layer.max_rank) for layer in layers)
        row.extra["break-even"] = "/".join(str(break_even(layer)) for layer in layers)
    result.parameters_before, result.parameters_after = before, _count(model)
    if report is not None:
        report(result)
    return model


def canonicalize_(
    model: nn.Module, *, calibration: Iterable[Any] | None = None, optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Put the terms of every low-rank layer in the order of what they are worth, in place; the model's map stays.

    Training with ordered dropout orders terms slowly: after it, the SVD of each product W = U Vᵀ has better prefixes
    than U and V as they stand. Factors become U √S and √S Vᵀ, of the terms in force.

    Args:
        model: a model with low-rank layers, or one of them.
        calibration: batches of typical inputs, see :func:`factorize`: prefixes are then best for the outputs on them.
        optimizer: forgets its state (momentum) of the factors, which are others afterwards.

    Returns:
        ``model``.

    Raises:
        TypeError: no module.
        ValueError: no low-rank layer; weights that are not finite; no batches; a layer that no batch reached.
    """
    layers = low_rank_layers(model)
    grams = {} if calibration is None else _input_grams(model, layers, calibration)
    done: set[int] = set()
    for name, layer in layers.items():
        # Tied factors are one product, and set once.
        if id(layer.weight_in) not in done:
            done.add(id(layer.weight_in))
            layer.load_dense_(layer.dense_weight(layer.rank), grams.get(name))
        if optimizer is not None:
            for parameter in (layer.weight_in, layer.weight_out):
                optimizer.state.pop(parameter, None)
    return model


# What a model has


def break_even(layer: LowRankLayer) -> int:
    """The lowest rank at which the two factors have as many entries as the dense weight, or more."""
    (out, _), (_, inner) = layer.weight_out.shape, layer.weight_in.shape
    return -(-(out * inner) // (layer._groups * (out + inner)))


def call_parts(model: nn.Module) -> None:
    """Let encoder layers of ``torch.nn`` call their parts in evaluation too.

    Otherwise they compute around parts that are not their own kind, from ``weight``: densely, at no other rank.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            own = isinstance(layer.self_attn, nn.MultiheadAttention)
            own = own and all(isinstance(part, nn.Linear) for part in (layer.linear1, layer.linear2))
            if not own:
                layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            not getattr(layer, "activation_relu_or_gelu", 1) for layer in encoder.layers
        ):
            encoder.use_nested_tensor = False


def _check_can_copy(named: Iterable[tuple[str, nn.Module]]) -> None:
    """No weight is computed from others by a hook, as ``torch.nn.utils.weight_norm`` and pruning do."""
    for name, module in named:
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ValueError(
                    f"model must have plain weights to be copied, got a parametrised {key} in {name or 'the model'} "
                    f"({type(module).__name__}): remove the parametrization first, or skip it with inplace=True"
                )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))


# Tied weights


@contextlib.contextmanager
def _untied(
    model: nn.Module, config: LowRankConfig, wanted: Callable[[nn.Module, str], bool]
) -> Iterator[Callable[[nn.Module], None]]:
    """Modules that share a weight, each with its own for a while, so that each can be replaced.

    Yields a function that lets their replacements share the factors. An error puts the old ties back.
    """
    owners: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((name, module, key))
    modules: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(module, []).append(name)

    def replaceable(module: nn.Module) -> bool:
        plain = type(module) in config.only and type(module) in _CONVERTERS
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        return plain and not any(hooks) and all(wanted(module, name) for name in modules[module])

    def kind(module: nn.Module) -> tuple:
        # Factors of one shape, cut alike: a kernel may have one geometry in one place and another elsewhere.
        return type(module), getattr(module, "groups", 1)

    shared = {parameter: places for parameter, places in owners.items() if len(places) > 1}
    ties = {
        parameter: places
        for parameter, places in shared.items()
        if all(replaceable(module) for _, module, _ in places)
        and len({(kind(module), key) for _, module, key in places}) == 1
    }
    # A module with a tie that stays is not replaced, and then neither are those that it shares its other weight with.
    while True:
        bound = {module for parameter, places in shared.items() if parameter not in ties for _, module, _ in places}
        kept = {p: places for p, places in ties.items() if not any(module in bound for _, module, _ in places)}
        if len(kept) == len(ties):
            break
        ties = kept
    for parameter, places in ties.items():
        for _, module, key in places[1:]:
            module._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)

    def tie_again(converted: nn.Module) -> None:
        for places in ties.values():
            first, *others = (converted.get_submodule(name) for name, _, _ in places)
            for key in ("weight_in", "weight_out") if places[0][2] == "weight" else ("bias",):
                for other in others:
                    setattr(other, key, getattr(first, key))

    try:
        yield tie_again
    except BaseException:
        for parameter, places in ties.items():
            for _, module, key in places:
                module._parameters[key] = parameter
        raise


# Statistics of inputs


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, encoder layers through their parts; all is put back."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training.items():
            module.training = mode


def _input_grams(model: nn.Module, layers: Mapping[str, LowRankLayer], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Σ x xᵀ over what each layer gets to see: as :meth:`LowRankLayer.load_dense_` takes it."""
    grams: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            gram = _gram(layer, x)
            grams[name] = grams[name] + gram if name in grams else gram

        return hook

    handles = [layer.register_forward_pre_hook(record(name), with_kwargs=True) for name, layer in layers.items()]
    number = 0
    try:
        with evaluating(model):
            for batch in batches:
                run_batch(model, batch)
                number += 1
    finally:
        for handle in handles:
            handle.remove()
    if number == 0:
        raise ValueError("calibration must have at least one batch, got none")
    missed = [name for name in layers if name not in grams]
    if missed:
        raise ValueError(f"calibration must reach every low-rank layer, got batches that left out {', '.join(missed)}")
    return grams


def _gram(layer: LowRankLayer, x: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(layer, LowRankEmbedding):
        return torch.bincount(x.flatten(), minlength=layer.num_embeddings).double()
    if isinstance(layer, LowRankLinear):
        rows = x.reshape(-1, x.shape[-1]).to(wide)
        return (rows.t() @ rows).double()
    conv: Any = layer
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for sample in x if x.ndim == conv._n_dim + 2 else x[None]:  # patches take Π kernel_size times the sample's memory
        rows = _patches(conv, sample[None].to(wide))
        total = total + (rows.transpose(1, 2) @ rows).double()
    return total


def _patches(conv: Any, x: Tensor) -> Tensor:
    """What the kernel meets: (1, C, *grid) -> (groups, positions, C / groups · Π kernel_size)."""
    if conv._outer is not None:
        x = F.pad(x, conv._outer, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    x = F.pad(x, [p for p in reversed(conv._inner) for _ in range(2)])
    for axis, (k, s, d) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        # The windows of each axis become a last dimension, so that these follow in the kernel's order.
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    n = conv._n_dim
    x = x.squeeze(0).unflatten(0, (conv.groups, -1))  # (g, C / g, *grid, *kernel)
    return x.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)).flatten(1 + n).flatten(1, n)
