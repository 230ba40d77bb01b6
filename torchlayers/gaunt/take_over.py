"""e3nn's channel-wise tensor products, exactly: the same irreps, weights and numbers, by one sparse contraction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_dtype, check_same_device, check_size
from .irreps import e3nn_o3
from .sparse import SparsePath, SparseSpec, sparse_product

__all__ = ["ExactTensorProduct"]

MODES = ("uuu", "uvu")


class _Run(NamedTuple):
    """The instructions of one mode between blocks of one multiplicity: one sparse product."""

    mode: str
    mul: int
    first: tuple[tuple[int, int], ...]  # (start, degree) of the blocks of x, in the order of the product's components
    second: tuple[tuple[int, int], ...]  # of y; empty for "uvu", where y is taken as it lies
    out: tuple[tuple[int, int], ...]  # (index into irreps_out, degree)
    weights: tuple[tuple[int, int], ...]  # (start, copies) of each instruction's weights; start -1: ones
    spec: SparseSpec


class ExactTensorProduct(nn.Module):
    """An e3nn ``TensorProduct`` whose instructions are channel-wise, ``"uuu"`` or ``"uvu"``::

        out[i_out]_uk += c · w_u  Σ_ij  C_ijk x[i_in1]_ui y[i_in2]_uj            "uuu"
        out[i_out]_uk += c · Σ_v w_uv  Σ_ij  C_ijk x[i_in1]_ui y[i_in2]_vj       "uvu"

    with C = ``o3.wigner_3j`` and c an instruction's coefficient. Takes flat irreps and flat weights as e3nn lays them
    out, and has e3nn's weights in its ``state_dict``, so that a trained model runs on with
    ``ExactTensorProduct.from_e3nn(tp)`` in the place of ``tp``. Irreps may have different multiplicities, and any
    number of instructions may lead to one output.

    Args:
        irreps_in1, irreps_in2, irreps_out: what ``o3.Irreps`` takes.
        instructions: (i_in1, i_in2, i_out, mode, has_weight, c) each, as ``TensorProduct.instructions`` holds them: c
            includes every normalisation. Further fields are ignored.
        internal_weights: whether the module holds the weights (if it has any).
        shared_weights: whether one set of weights serves all samples; else ``forward`` takes a set a sample.
        device, dtype: of the weights.

    Shapes:
        x (..., irreps_in1.dim), y (..., irreps_in2.dim) -> (..., irreps_out.dim); leading dimensions are broadcast.

    Attributes:
        weight_numel: how many weights there are, instruction by instruction: (u,) or (u, v) each.

    Raises:
        ValueError: an instruction of another mode (the message names it), with irreps that do not couple or
            multiplicities that do not fit; internal weights that are not shared.
        ImportError: e3nn is not installed.

    Source: the definition of ``e3nn.o3.TensorProduct`` (0.6), Geiger and Smidt, arXiv 2207.09453, section 4.

    Example:

        >>> import torch
        >>> from torchlayers.gaunt import ExactTensorProduct
        >>> tp = ExactTensorProduct("8x0e+8x1o", "1x0e+1x1o", "8x0e+8x1o",
        ...                         [(0, 0, 0, "uvu", True, 1.0), (1, 1, 0, "uvu", True, 1.0)])
        >>> tp(torch.randn(5, 32), torch.randn(5, 4)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        irreps_in1: Any,
        irreps_in2: Any,
        irreps_out: Any,
        instructions: Iterable[Sequence[Any]],
        *,
        internal_weights: bool = True,
        shared_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if internal_weights and not shared_weights:
            raise ValueError("internal_weights must be False where shared_weights is False: samples bring their own")
        o3 = e3nn_o3()
        self.irreps_in1, self.irreps_in2, self.irreps_out = map(o3.Irreps, (irreps_in1, irreps_in2, irreps_out))
        self.instructions = tuple(instructions)
        self.shared_weights = shared_weights
        self._runs, self.weight_numel = self._planned()
        self.internal_weights = internal_weights and self.weight_numel > 0
        # Plain numbers for the forward pass: a compiled graph cannot hold on to Irreps.
        self._dims = self.irreps_in1.dim, self.irreps_in2.dim, self.irreps_out.dim
        self._out_sizes = tuple(mul_ir.dim for mul_ir in self.irreps_out)
        if self.internal_weights:
            self.weight = nn.Parameter(torch.empty(self.weight_numel, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
        self.reset_parameters()

    @classmethod
    def from_e3nn(cls, tp: nn.Module) -> ExactTensorProduct:
        """The module that computes what ``tp``, an ``e3nn.o3.TensorProduct``, does, with a copy of its weights.

        Raises:
            TypeError: ``tp`` is no ``TensorProduct``.
            ValueError: an instruction whose mode is neither ``"uuu"`` nor ``"uvu"``.
        """
        if not isinstance(tp, e3nn_o3().TensorProduct):
            raise TypeError(f"tp must be an e3nn.o3.TensorProduct, got {type(tp).__name__}")
        own = tp.weight if tp.internal_weights else None
        made = cls(
            tp.irreps_in1,
            tp.irreps_in2,
            tp.irreps_out,
            tp.instructions,
            internal_weights=tp.internal_weights,
            shared_weights=tp.shared_weights,
            device=None if own is None else own.device,
            dtype=None if own is None else own.dtype,
        )
        if own is not None and made.weight is not None:
            with torch.no_grad():
                made.weight.copy_(own)
            made.weight.requires_grad_(own.requires_grad)
        return made.train(tp.training)

    def _planned(self) -> tuple[tuple[_Run, ...], int]:
        """The sparse products, and the number of weights."""
        grouped: dict[tuple[str, int], list[tuple[Any, int]]] = {}
        start = 0
        for number, instruction in enumerate(self.instructions):
            if len(instruction) < 6:
                raise ValueError(
                    f"instructions[{number}] must be (i_in1, i_in2, i_out, mode, has_weight, coefficient), "
                    f"got {tuple(instruction)}"
                )
            i1, i2, i_out, mode, has_weight, _ = instruction[:6]
            self._check_instruction(number, i1, i2, i_out, mode)
            first, second, out = self.irreps_in1[i1], self.irreps_in2[i2], self.irreps_out[i_out]
            count = first.mul * (second.mul if mode == "uvu" else 1)
            if first.mul and second.mul and out.mul:
                grouped.setdefault((mode, first.mul), []).append((instruction, start if has_weight else -1))
            start += count if has_weight else 0
        return tuple(self._run(mode, mul, members) for (mode, mul), members in grouped.items()), start

    def _check_instruction(self, number: int, i1: int, i2: int, i_out: int, mode: str) -> None:
        name = f"instructions[{number}]"
        if mode not in MODES:
            raise ValueError(f"{name} must have the mode 'uuu' or 'uvu', got {mode!r}: {self.instructions[number]}")
        first, second, out = self.irreps_in1[i1], self.irreps_in2[i2], self.irreps_out[i_out]
        if out.ir not in first.ir * second.ir:
            raise ValueError(f"{name} must couple its irreps, got {first.ir} x {second.ir} -> {out.ir}")
        muls = {first.mul, out.mul} if mode == "uvu" else {first.mul, second.mul, out.mul}
        if len(muls) > 1:
            raise ValueError(f"{name} must have one multiplicity u ({mode!r}), got {first} x {second} -> {out}")

    def _run(self, mode: str, mul: int, members: list[tuple[Any, int]]) -> _Run:
        starts1, starts2 = (tuple(s.start for s in irreps.slices()) for irreps in (self.irreps_in1, self.irreps_in2))

        def blocks(irreps: Any, side: int) -> tuple[dict[int, int], int]:
            """Index into ``irreps`` of what is used, in order -> offset of its components; how many there are."""
            offsets, end = {}, 0
            for index in sorted({instruction[side] for instruction, _ in members}):
                offsets[index], end = end, end + irreps[index].ir.dim
            return offsets, end

        (first, n1), (out, n3) = blocks(self.irreps_in1, 0), blocks(self.irreps_out, 2)
        second, n2 = blocks(self.irreps_in2, 1) if mode == "uuu" else ({}, self.irreps_in2.dim)
        paths, weights = [], []
        for instruction, start in members:
            i1, i2, i_out, _, _, coefficient = instruction[:6]
            ell1, ell2, ell3 = self.irreps_in1[i1].ir.l, self.irreps_in2[i2].ir.l, self.irreps_out[i_out].ir.l
            copies = self.irreps_in2[i2].mul if mode == "uvu" else 1
            for v in range(copies):
                offset2 = second[i2] if mode == "uuu" else starts2[i2] + v * (2 * ell2 + 1)
                blocks_of = (first[i1], ell1, offset2, ell2, out[i_out], ell3)
                paths.append(SparsePath(*blocks_of, "cg", float(coefficient)))
            weights.append((start, copies))
        return _Run(
            mode,
            mul,
            tuple((starts1[i], self.irreps_in1[i].ir.l) for i in first),
            tuple((starts2[i], self.irreps_in2[i].ir.l) for i in second),
            tuple((i, self.irreps_out[i].ir.l) for i in out),
            tuple(weights),
            SparseSpec(n1, n2, n3, paths),
        )

    def reset_parameters(self) -> None:
        """Draw the weights from the standard normal distribution, as e3nn does."""
        if self.weight is not None:
            nn.init.normal_(self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # An e3nn product has its mask of outputs and its coefficients there, and an empty weight where it holds none.
        empty = self.weight is None and state_dict.get(f"{prefix}weight", torch.ones(1)).numel() == 0
        theirs = [f"{prefix}output_mask", *[f"{prefix}weight"] * empty]
        theirs += [key for key in state_dict if key.startswith(f"{prefix}_compiled_main_")]
        for key in theirs:
            state_dict.pop(key, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """The product of x (..., irreps_in1.dim) and y (..., irreps_in2.dim).

        Args:
            weight: (weight_numel,) where weights are shared, else (..., weight_numel), broadcast with x and y; None for
                the module's own.

        Raises:
            TypeError, ValueError: tensors that do not fit, weights that are missing.
        """
        check_dtype("x", x, kind="real")
        check_dtype("y", y, kind="real")
        dim1, dim2, dim_out = self._dims
        check_size("x", x, -1, dim1, "irreps_in1.dim")
        check_size("y", y, -1, dim2, "irreps_in2.dim")
        weight = self._weights(weight, x)
        leading = [x.shape[:-1], y.shape[:-1]]
        if weight is not None and not self.shared_weights:
            leading.append(weight.shape[:-1])
        try:
            batch = torch.broadcast_shapes(*leading)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(shape)) for shape in leading)
            raise ValueError(f"x, y and weight must have leading dimensions that broadcast, got {shapes}") from error
        rows = math.prod(batch)
        x = x.expand(*batch, -1).reshape(rows, dim1)
        y = y.expand(*batch, -1).reshape(rows, dim2)
        if weight is not None and not self.shared_weights:
            weight = weight.expand(*batch, -1).reshape(rows, self.weight_numel)
        parts: dict[int, Tensor] = {}
        for run in self._runs:
            z = sparse_product(
                _channels(x, run.first, run.mul),
                _channels(y, run.second, run.mul) if run.mode == "uuu" else y[:, None],
                self._weights_of(run, weight, x),
                run.spec,
            )
            sizes = [2 * degree + 1 for _, degree in run.out]
            for (index, _), size, block in zip(run.out, sizes, z.split(sizes, 2), strict=True):
                flat = block.reshape(rows, run.mul * size)
                parts[index] = flat if index not in parts else parts[index] + flat
        every = enumerate(self._out_sizes)
        columns = [parts[i] if i in parts else x.new_zeros(rows, size) for i, size in every if size]
        out = torch.cat(columns, 1) if columns else x.new_zeros(rows, 0)
        return out.reshape(*batch, dim_out)

    def _weights(self, weight: Tensor | None, x: Tensor) -> Tensor | None:
        if weight is None:
            if self.weight_numel and self.weight is None:
                raise ValueError(f"weight must be given, {self.weight_numel} numbers, where the module holds none")
            return self.weight
        check_dtype("weight", weight, kind="real")
        check_same_device("weight", weight, "x", x)
        if self.shared_weights and weight.ndim != 1:
            raise ValueError(f"weight must have shape ({self.weight_numel},), shared, got {tuple(weight.shape)}")
        if weight.ndim < 1:
            raise ValueError("weight must have at least 1 dimension (..., weight_numel), got 0")
        check_size("weight", weight, -1, self.weight_numel, "weight_numel")
        return weight if self.weight_numel else None

    def _weights_of(self, run: _Run, weight: Tensor | None, x: Tensor) -> Tensor | None:
        """The weights of one product, (C, P) or (B, C, P)."""
        if weight is None or all(start < 0 for start, _ in run.weights):
            return None
        lead = weight.shape[:-1]
        (start, copies), size = run.weights[0], run.mul
        if copies == 1 and run.weights == tuple((start + p * size, 1) for p in range(len(run.weights))):
            whole = weight[..., start : start + len(run.weights) * size]
            return whole.reshape(*lead, len(run.weights), size).transpose(-1, -2)
        columns = []
        for start, copies in run.weights:
            if start < 0:
                columns.append(weight.new_ones(*lead, size, copies))
            else:
                columns.append(weight[..., start : start + size * copies].reshape(*lead, size, copies))
        return torch.cat(columns, -1)

    def extra_repr(self) -> str:
        return (
            f"{self.irreps_in1}, {self.irreps_in2}, {self.irreps_out}, {len(self.instructions)} instructions, "
            f"weight_numel={self.weight_numel}, internal_weights={self.internal_weights}, "
            f"shared_weights={self.shared_weights}"
        )


def _channels(flat: Tensor, blocks: tuple[tuple[int, int], ...], mul: int) -> Tensor:
    """(B, mul, n) of the blocks of a flat tensor, neighbouring channels in neighbouring places."""
    # One split rather than many slices: its gradient is one concatenation.
    sizes, chosen, end = [], [], 0
    for start, degree in blocks:
        if start > end:
            sizes.append(start - end)
        chosen.append(len(sizes))
        sizes.append(mul * (2 * degree + 1))
        end = start + sizes[-1]
    if end < flat.shape[1]:
        sizes.append(flat.shape[1] - end)
    parts = flat.split(sizes, 1)
    views = [parts[i].unflatten(1, (mul, 2 * d + 1)).transpose(1, 2) for i, (_, d) in zip(chosen, blocks, strict=True)]
    return torch.cat(views, 1).transpose(1, 2)
