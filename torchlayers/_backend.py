"""Which implementation of an operation runs: the Triton kernel or plain torch.

The choice is the argument ``backend=`` if given, else what :func:`torchlayers.backend` set, else the environment
variable ``TORCHLAYERS_BACKEND`` (read once, at import), else ``"auto"``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "torch")

__all__ = ["BACKENDS", "BackendError", "backend", "import_kernels", "is_traced", "last_dispatch", "use_triton"]


class BackendError(ValueError):
    """``backend="triton"`` was asked for and the kernel cannot do what was asked; the message names what."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


# Module globals rather than a ContextVar: torch.compile(fullgraph=True) can read and guard these.
_current = _checked(os.environ.get("TORCHLAYERS_BACKEND", "auto"), "TORCHLAYERS_BACKEND")
_last = "none: no operation has run"


class backend:
    """Set the backend of the program: ``"auto"``, ``"triton"`` or ``"torch"``.

    Called, it sets; as a context manager it sets and, on leaving, restores::

        torchlayers.backend("torch")            # from here on
        with torchlayers.backend("triton"):     # in this block
            y = layer(x)

    ``"auto"`` takes the kernel for tensors on a GPU where shape and dtype are in the kernel's range, and plain torch
    otherwise. ``"triton"`` insists: what the kernel does not support raises :class:`BackendError`; CPU tensors are
    accepted in a process that was started with ``TRITON_INTERPRET=1``. ``"torch"`` forces plain torch.

    Raises:
        ValueError: the name is not one of the three.
    """

    def __init__(self, name: str):
        global _current
        _checked(name, "backend")
        self._name, self._previous = name, _current
        _current = name

    def __enter__(self) -> backend:
        global _current
        _current = self._name
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _current
        _current = self._previous


def last_dispatch() -> str:
    """Which implementation ran last and why: ``"triton: tdft2_forward"``, ``"torch: tensors on the CPU"``, ..."""
    return _last


def note_dispatch(text: str) -> None:
    """Say what :func:`last_dispatch` shall return, where :func:`use_triton` was not asked: a third implementation."""
    global _last
    _last = text


def interpreted() -> bool:
    """Whether this process was started for Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_INTERPRETED = interpreted()
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def import_kernels(name: str) -> ModuleType | None:
    """The module ``torchlayers.kernels.<name>``, or None where triton cannot be imported."""
    global _HAS_TRITON
    try:
        import triton  # noqa: F401
    except ImportError:
        _HAS_TRITON = False
        return None
    return importlib.import_module(f"torchlayers.kernels.{name}")


def use_triton(
    operation: str, tensor: torch.Tensor, backend: str | None = None, unsupported: str | None = None
) -> bool:
    """Decide, and note for :func:`last_dispatch`, whether ``operation`` runs as its Triton kernel.

    Args:
        operation: the registered operation's name, such as ``"tdft2_forward"``.
        tensor: any of the operation's tensors (the caller has checked that they share a device).
        backend: the caller's own ``backend=`` argument; None takes the program's.
        unsupported: what of this call the kernel does not support, in words (``"float64"``), or None.
    """
    global _last
    name = _current if backend is None else _checked(backend, "backend")
    reason = None
    if name == "torch":
        reason = "backend is 'torch'"
    elif not _HAS_TRITON:
        reason = "triton is not installed"
    elif not tensor.is_cuda and not (name == "triton" and _INTERPRETED and tensor.device.type == "cpu"):
        reason = "tensors on the CPU" if tensor.device.type == "cpu" else f"tensors on {tensor.device.type}"
    elif unsupported is not None:
        reason = f"{operation} does not support {unsupported}"
    if reason is not None and name == "triton":
        raise BackendError(f"backend='triton' was asked for, but {reason} (operation {operation})")
    _last = f"triton: {operation}" if reason is None else f"torch: {reason}"
    return reason is None


def is_traced() -> bool:
    """Whether tensors here may stand for others: torch.compile, torch.export, or a dispatch mode of this thread.

    Not ``is_in_torch_dispatch_mode()`` of torch: that is one flag for all threads, which two of them that leave their
    modes in another order than they entered them set for good.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
