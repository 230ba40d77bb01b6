"""From neuraloperator's models and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .blocks import NEURALOP_ARGUMENTS, TFNO
from .modules import SpectralConv

__all__ = ["from_neuralop"]


def from_neuralop(source: nn.Module | Mapping[str, Any], **overrides: Any) -> TFNO | SpectralConv:
    """The same model, with the same weights, as ours.

    Args:
        source: a neuraloperator 2.0 ``FNO`` or ``TFNO``, its ``state_dict()`` (which holds the constructor's arguments
            under ``"_metadata"``; in a checkpoint that has lost them, give them as ``overrides``), or a single
            ``SpectralConv``. neuraloperator itself need not be installed for a state dict.
        overrides: constructor arguments to change or add, such as ``backend="torch"`` or ``device="cuda"``.
            ``source``'s ``implementation`` is not taken over: it changes speed only, and "auto" picks the faster.

    Returns:
        A :class:`TFNO` (a dense ``FNO`` is one with ``factorization=None``), or a :class:`SpectralConv`, in
        ``source``'s training mode.

    Raises:
        TypeError: ``source`` is something else.
        ValueError: a state dict without ``"_metadata"`` and without constructor arguments; options that ours lacks.
        RuntimeError: keys or shapes do not fit, as :meth:`torch.nn.Module.load_state_dict` says.

    Example::

        model = from_neuralop(torch.load("model_state_dict.pt", weights_only=False))
    """
    if isinstance(source, Mapping):
        arguments = _constructor_arguments(source.get("_metadata"), overrides)
        model: TFNO | SpectralConv = TFNO(**arguments)
        model.load_state_dict(dict(source))
        return model
    if not isinstance(source, nn.Module):
        raise TypeError(f"source must be a neuraloperator model or state dict, got {type(source).__name__}")
    kind = type(source).__name__
    tensor = next(source.parameters(), None)
    if tensor is not None:
        overrides.setdefault("device", tensor.device)
    if hasattr(source, "fno_blocks") and hasattr(source, "_init_kwargs"):
        model = TFNO(**_constructor_arguments(source._init_kwargs, overrides))
    elif kind == "SpectralConv" and hasattr(source, "max_n_modes"):
        model = SpectralConv(**{**_conv_arguments(source), **overrides})
    else:
        raise TypeError(f"source must be a neuraloperator FNO, TFNO or SpectralConv, got {kind}")
    model.load_state_dict(source.state_dict())
    return model.train(source.training)


def _constructor_arguments(metadata: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if metadata is not None:
        # Positional arguments came as "args"; FNO's own defaults are all spelled out beside them.
        arguments = {name: metadata[name] for name in NEURALOP_ARGUMENTS if name in metadata}
        arguments.update(zip(NEURALOP_ARGUMENTS, metadata.get("args", ()), strict=False))
        if str(metadata.get("_name", "")).lower() == "fno":
            arguments.setdefault("factorization", None)
            arguments.setdefault("rank", 1.0)
    elif not overrides:
        raise ValueError(
            "source must hold neuraloperator's '_metadata', or the constructor's arguments must be given: "
            "from_neuralop(state_dict, n_modes=..., in_channels=..., ...)"
        )
    for name in ("conv_module", "implementation"):
        arguments.pop(name, None)
    return {**arguments, **overrides}


def _conv_arguments(conv: Any) -> dict[str, Any]:
    bias = conv.bias is not None
    modes = list(conv.n_modes)
    if not conv.complex_data:
        modes[-1] = 2 * (modes[-1] - 1) or 1
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "n_modes": modes,
        "max_n_modes": list(conv.max_n_modes),
        "complex_data": conv.complex_data,
        "bias": bias,
        "separable": conv.separable,
        "resolution_scaling_factor": conv.resolution_scaling_factor,
        "fno_block_precision": conv.fno_block_precision,
        "rank": conv.rank,
        "factorization": conv.factorization,
    }
