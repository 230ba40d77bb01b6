"""The precision of the spectral path, and a schedule of it over a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_int

__all__ = ["PRECISIONS", "PrecisionSchedule", "low_dtype"]

#: See :func:`torchlayers.functional.spectral_conv`.
PRECISIONS = ("full", "half", "mixed")
PHASES = ("mixed", "amp", "full")


def low_dtype(x: Tensor) -> torch.dtype:
    """The 16-bit type that modes of ``x`` are mixed in: its own, if it has one, else float16."""
    return x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float16


class PrecisionSchedule:
    """The precision of a training run, part by part: "mixed", then "amp", then "full" (arXiv 2307.15034, section 4.4).

    ========  ============================  ======================
    phase     spectral convolutions         the rest of the model
    ========  ============================  ======================
    mixed     ``spectral`` ("half")         autocast to ``dtype``
    amp       "full"                        autocast to ``dtype``
    full      "full"                        float32
    ========  ============================  ======================

    The schedule sets ``fno_block_precision`` of the model's spectral convolutions, at construction and at each
    :meth:`step`. A model that is to run in half precision wants ``stabilizer="tanh"``, and float16 a gradient scaler.

    Args:
        model: any module; its descendants with an attribute ``fno_block_precision`` are set.
        total_steps: length of the run, in calls of :meth:`step`.
        fractions: shares of the three phases, which add up to 1.
        dtype: of autocast, bfloat16 or float16.
        spectral: ``fno_block_precision`` in the first phase, "half" or "mixed".

    Raises:
        TypeError, ValueError: fractions that are negative or do not add up to 1, another dtype, a model without
            spectral convolutions. On a CPU the first phase raises a ValueError at the model's call.

    Example:

        >>> from torchlayers.tfno import TFNO
        >>> model = TFNO((8, 8), 1, 1, 8, n_layers=2, stabilizer="tanh")
        >>> schedule = PrecisionSchedule(model, total_steps=100)
        >>> for _ in range(30):
        ...     with schedule.autocast("cpu"):
        ...         pass  # the model and the loss
        ...     schedule.step()
        >>> schedule.phase
        'amp'
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        fractions: Sequence[float] = (0.25, 0.5, 0.25),
        dtype: torch.dtype = torch.bfloat16,
        spectral: str = "half",
    ):
        self.total_steps = check_int("total_steps", total_steps)
        self.fractions = tuple(float(f) for f in fractions)
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be 3 numbers of at least 0 that add up to 1, got {fractions}")
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be bfloat16 or float16, got {dtype}")
        check_choice("spectral", spectral, PRECISIONS[1:])
        self.dtype, self.spectral = dtype, spectral
        self._convs: list[Any] = [m for m in model.modules() if hasattr(m, "fno_block_precision")]
        if not self._convs:
            raise ValueError(f"model must have spectral convolutions, got a {type(model).__name__} without any")
        self._steps = 0
        self._apply()

    @property
    def phase(self) -> str:
        """ "mixed", "amp" or "full"."""
        first, second = self.fractions[0], self.fractions[0] + self.fractions[1]
        if self._steps < round(first * self.total_steps):
            return "mixed"
        return "amp" if self._steps < round(second * self.total_steps) else "full"

    def step(self) -> None:
        """One training step is done."""
        self._steps += 1
        self._apply()

    def _apply(self) -> None:
        precision = self.spectral if self.phase == "mixed" else "full"
        for conv in self._convs:
            conv.fno_block_precision = precision

    def autocast(self, device_type: str) -> torch.autocast:
        """The context for the model and its loss; it does nothing in the phase "full"."""
        return torch.autocast(device_type, dtype=self.dtype, enabled=self.phase != "full")

    def state_dict(self) -> dict[str, int]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._steps = check_int("steps", state["steps"], minimum=0)
        self._apply()
