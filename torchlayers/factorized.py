"""Dense, CP, Tucker and tensor-train parameters, real and complex, on which every low-rank family is built.

:class:`FactorizedTensor` holds the factors of a tensor as parameters, :func:`validate_rank` turns a rank into the
integers that it stands for, and :class:`ComplexParameters` is how any module holds complex parameters.

Sources: T. G. Kolda, B. W. Bader, "Tensor decompositions and applications", SIAM Review 51 (2009), sections 3 (CP)
and 4 (Tucker); I. V. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33 (2011); J. Kossaifi et al.,
"Multi-grid tensorized Fourier neural operator for high-resolution PDEs", arXiv 2310.00120.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_dtype, check_int, check_ints, require

__all__ = [
    "FACTORIZATIONS",
    "ComplexParameters",
    "FactorizedSlice",
    "FactorizedTensor",
    "as_complex",
    "as_real",
    "balanced_svd",
    "validate_rank",
]

FACTORIZATIONS = ("dense", "cp", "tucker", "tt")
_ROUNDINGS = {"round": round, "floor": math.floor, "ceil": math.ceil}
# Factors may hold this many times the entries of the tensor that they stand for, and this many in any case.
_OVERSIZE, _SMALL = 10, 2**20


# ---------------------------------------------------------------------------------------------------------------- ranks


def validate_rank(
    shape: Sequence[int],
    factorization: str | None,
    rank: float | int | Sequence[int] | str,
    *,
    fixed_rank_modes: Sequence[int] | bool | None = None,
    rounding: str = "round",
) -> int | tuple[int, ...]:
    r"""The integer rank that ``rank`` stands for, as tensorly's ``validate_{cp,tucker,tt}_rank`` give it.

    A float ρ asks for about ρ times the parameters of the dense tensor (s_0, ..., s_{n-1}), with P = Π s_k:

    - CP: R = ρ P / Σ s_k;
    - Tucker: R_k = a s_k, where a solves P aⁿ + a Σ s_k² = ρ P (n counts the modes that are not fixed);
    - TT: R_k = a d_k for k = 1 ... n-1, d_k = (s_{k-1} + s_k) / 2, where a is the non-negative root of
      a² Σ s_k d_k d_{k+1} + a (s_0 d_1 + s_{n-1} d_{n-1}) = ρ P, and R_0 = R_n = 1 (for n = 2, where the sum is
      empty, tensorly's s_0 d_1² takes its place);

    each rounded, and at least 1. Mind that ``1.0`` is a fraction and ``1`` a rank.

    Args:
        shape: the mode sizes of the full tensor.
        factorization: "dense", "cp", "tucker" or "tt" in any case; None is "dense".
        rank: a float > 0 (or "same", which is 1.0); an int, which is used for every mode; or the ranks: for Tucker one
            a mode, for TT order + 1 of them with 1 at both ends. Ranks above the mode sizes are allowed, as in
            tensorly, up to factors with ten times the entries of the full tensor (or 2^20, if that is more). Not
            looked at for a dense tensor.
        fixed_rank_modes: Tucker only: modes that keep their full size as their rank. True means mode 0, the layer
            axis of a joint tensor.
        rounding: "round" (ties to even), "floor" or "ceil".

    Returns:
        CP: an int; Tucker: a tuple of ``order`` ints; TT: a tuple of ``order + 1`` ints; dense: ``shape``.

    Raises:
        TypeError: an argument has the wrong type (a bool is no rank).
        ValueError: an unknown name, a rank that is not positive, of the wrong length or far above full, as above,
            ``fixed_rank_modes`` where they have no meaning (CP, TT) or where an explicit rank contradicts them.

    >>> validate_rank((64, 64, 64, 33), "tucker", 0.1)
    (36, 36, 36, 19)
    """
    sizes = check_ints("shape", tuple(shape) if isinstance(shape, torch.Size) else shape)
    if not sizes:
        raise ValueError("shape must have at least one mode, got ()")
    name = _factorization_name(factorization)
    check_choice("rounding", rounding, _ROUNDINGS)
    fixed = _fixed_modes(fixed_rank_modes, len(sizes))
    if name == "dense":
        return sizes
    if fixed and name != "tucker":
        raise ValueError(f"fixed_rank_modes must be empty for factorization {name!r} (Tucker has them), got {fixed}")
    if isinstance(rank, str):
        if rank != "same":
            raise ValueError(f"rank must be a float, an int, a sequence of ints or 'same', got {rank!r}")
        rank = 1.0
    if isinstance(rank, bool) or rank is None:
        raise TypeError(f"rank must be a float, an int or a sequence of ints, got {rank!r} ({type(rank).__name__})")
    if isinstance(rank, float):
        if not (math.isfinite(rank) and rank > 0):
            raise ValueError(f"rank must be positive and finite, got {rank}")
        _check_entries(sizes, rank, rank * math.prod(sizes))
        return _rank_of_fraction(sizes, name, rank, fixed, _ROUNDINGS[rounding])
    ranks: Any = _explicit_rank(sizes, name, rank, fixed)
    if name == "cp":
        entries = ranks * (1 + sum(sizes))
    elif name == "tucker":
        entries = math.prod(ranks) + sum(r * s for r, s in zip(ranks, sizes, strict=True))
    else:
        entries = sum(r * s * t for r, s, t in zip(ranks[:-1], sizes, ranks[1:], strict=True))
    _check_entries(sizes, rank, entries)
    return ranks


def _check_entries(sizes: tuple[int, ...], rank: Any, entries: float) -> None:
    full = math.prod(sizes)
    if entries > max(_OVERSIZE * full, _SMALL):
        raise ValueError(
            f"rank must not be far above full, got {rank}: the factors would hold {entries:.3g} entries, the tensor of "
            f"shape {sizes} has {full} (a fraction of those is a float, such as 0.1)"
        )


def _factorization_name(factorization: str | None) -> str:
    name = "dense" if factorization is None else factorization
    if not isinstance(name, str):
        raise TypeError(f"factorization must be a str or None, got {name!r} ({type(name).__name__})")
    check_choice("factorization", name.lower(), FACTORIZATIONS)
    return name.lower()


def _fixed_modes(modes: Sequence[int] | bool | None, order: int) -> tuple[int, ...]:
    if modes is None or isinstance(modes, bool):
        return (0,) if modes else ()
    if isinstance(modes, int):
        raise TypeError(f"fixed_rank_modes must be a sequence of ints, got {modes!r} (int)")
    for mode in check_ints("fixed_rank_modes", modes, minimum=0):
        if mode >= order:
            raise ValueError(f"fixed_rank_modes must be below the order {order}, got {mode}")
    return tuple(sorted(set(modes)))


def _explicit_rank(sizes: tuple[int, ...], name: str, rank: Any, fixed: tuple[int, ...]) -> int | tuple[int, ...]:
    order = len(sizes)
    if name == "cp":
        return check_int("rank", rank)
    if name == "tucker":
        if isinstance(rank, int):
            rank = check_int("rank", rank)
            return tuple(s if k in fixed else rank for k, s in enumerate(sizes))
        ranks = check_ints("rank", rank, order)
        for mode in fixed:
            if ranks[mode] != sizes[mode]:
                raise ValueError(
                    f"rank[{mode}] must be shape[{mode}] = {sizes[mode]}, since fixed_rank_modes has {mode}, "
                    f"got {ranks[mode]}"
                )
        return ranks
    if isinstance(rank, int):
        return (1, *[check_int("rank", rank)] * (order - 1), 1)
    ranks = check_ints("rank", rank, order + 1)
    if ranks[0] != 1 or ranks[-1] != 1:
        raise ValueError(f"rank must begin and end with 1 for factorization 'tt', got {ranks}")
    return ranks


def _rank_of_fraction(sizes: tuple[int, ...], name: str, fraction: float, fixed: tuple[int, ...], rounding: Any) -> Any:
    dense = math.prod(sizes)
    if name == "cp":
        return max(1, rounding(dense * fraction / sum(sizes)))
    if name == "tucker":
        free = len(sizes) - len(fixed)
        squares = sum(s * s for s in sizes)
        # The left side grows with a: halve until no float lies between the bounds.
        low, high = 0.0, max(fraction, 1.0)
        while low < (a := (low + high) / 2) < high:
            if dense * a**free + squares * a < fraction * dense:
                low = a
            else:
                high = a
        return tuple(s if k in fixed else max(1, rounding(high * s)) for k, s in enumerate(sizes))
    means = [(s + t) / 2 for s, t in itertools.pairwise(sizes)]
    if not means:
        return (1, 1)
    if len(means) == 1:
        quadratic = means[0] ** 2 * sizes[0]
    else:
        quadratic = sum(d * s * e for d, s, e in zip(means, sizes[1:], means[1:], strict=False))
    linear = sizes[0] * means[0] + sizes[-1] * means[-1]
    a = (-linear + math.sqrt(linear**2 + 4 * quadratic * dense * fraction)) / (2 * quadratic)
    return (1, *(max(1, rounding(a * d)) for d in means), 1)


# --------------------------------------------------------------------------------------------------- complex parameters


def balanced_svd(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The best factors (…, m, r) and (…, r, n) of matrices (…, m, n); each carries the roots of the singular values.

    Args:
        matrix: real.
        rank: how many terms to keep, min(m, n) by default.

    Source: C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :]


def as_complex(tensor: Tensor) -> Tensor:
    """The complex tensor (...) whose real and imaginary parts ``tensor`` (..., 2) holds.

    A view (float32 gives complex64, float64 complex128), also where ``tensor`` is a DTensor, which must not be sharded
    along its last dimension. The half precisions have no complex dtype to compute in: they give a complex64 copy.
    Differentiable.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if not _is_dtensor(tensor):
        return torch.view_as_complex(tensor)
    strides = tuple(s // 2 for s in tensor.stride()[:-1])
    return _rewrap(tensor, torch.view_as_complex(_local(tensor)), tensor.shape[:-1], strides)


def as_real(tensor: Tensor) -> Tensor:
    """The inverse of :func:`as_complex`: (...) complex to (..., 2) real, a view unless a lazy conjugate is resolved."""
    if not _is_dtensor(tensor):
        return torch.view_as_real(tensor.resolve_conj())
    strides = (*(2 * s for s in tensor.stride()), 1)
    return _rewrap(tensor, torch.view_as_real(_local(tensor)), (*tensor.shape, 2), strides)


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")  # torch.distributed.tensor is not imported for one process


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _rewrap(like: Any, local: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """``local`` as a shard of a DTensor laid out as ``like``; sizes are given, since shards may be uneven or empty."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


class ComplexParameters(nn.Module):
    """A module whose complex parameters are stored as real ones with a trailing dimension of 2.

    FSDP2 refuses modules that mix real and complex parameters, ``GradScaler`` refuses complex gradients, and
    ``Module.double()`` passes complex parameters by. So what optimizers, casts and wrappers see is real, (..., 2),
    while ``state_dict`` shows complex tensors (...), which share memory with the parameters (the half precisions are
    shown as complex64 copies). ``load_state_dict`` takes complex tensors (...) and real ones (..., 2), and refuses a
    complex tensor for a real parameter. ``state_dict(keep_vars=True)`` is for those who want the parameters
    themselves, as ``torch.export`` does, and holds them as they are stored.

    Under FSDP2 the state dict holds complex DTensors on the same shards, which ``torch.distributed.checkpoint`` saves
    and loads in place, and whose keys and dtypes are those of one process. ``set_model_state_dict`` with
    ``broadcast_from_rank0=True`` writes into parameters past ``load_state_dict``, and so needs the stored form.

    A subclass registers with :meth:`register_complex` and computes with :meth:`value`; the attribute stays the
    parameter as it is stored:

    >>> class Scale(ComplexParameters):
    ...     def __init__(self, channels, device=None, dtype=None):
    ...         super().__init__()
    ...         self.register_complex("scale", (channels,), device=device, dtype=dtype)
    ...         nn.init.normal_(self.scale, std=0.5**0.5)
    ...     def forward(self, x):
    ...         return x * self.value("scale")
    >>> layer = Scale(3)
    >>> layer.scale.shape, layer.state_dict()["scale"].dtype
    (torch.Size([3, 2]), torch.complex64)
    """

    def __init__(self) -> None:
        super().__init__()
        self._complex_names: tuple[str, ...] = ()

    def register_complex(
        self,
        name: str,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register the complex parameter ``name`` of ``shape``, uninitialised; ``dtype`` may be real or complex."""
        self._register(name, shape, True, device, dtype)

    def _register(
        self,
        name: str,
        shape: Sequence[int],
        is_complex: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if is_complex:
            self._complex_names = (*self._complex_names, name)
            shape = (*shape, 2)
            dtype = dtype.to_real() if dtype is not None else None
        # Past register_parameter, which refuses a name that the class defines as a property.
        self._parameters[name] = nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype))

    def value(self, name: str) -> Tensor:
        """The parameter ``name`` to compute with: complex where it was registered so."""
        stored = self._parameters[name]
        assert stored is not None
        return as_complex(stored) if name in self._complex_names else stored

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in self._complex_names:
                destination[prefix + name] = as_complex(destination[prefix + name])

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # `state_dict` is load_state_dict's own shallow copy.
        for name, stored in self._parameters.items():
            given = state_dict.get(prefix + name)
            if stored is not None and isinstance(given, Tensor):
                state_dict[prefix + name] = self._to_stored(name, stored, given, prefix + name, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _to_stored(self, name: str, stored: Tensor, given: Tensor, key: str, error_msgs: list[str]) -> Tensor:
        """``given`` in the form of the parameter; where it does not fit, a message, and the parameter itself."""
        if name not in self._complex_names:
            if not given.is_complex():
                return given
            error_msgs.append(f"{key} must be a real tensor, since the parameter is real, got {given.dtype}")
            return stored
        shown = stored.shape[:-1]
        if given.is_complex():
            if given.shape == shown:
                return as_real(given.detach())
        elif given.shape == stored.shape:
            # With assign=True it becomes the parameter, and as_complex needs pairs that lie side by side.
            pairs = given.is_contiguous() and given.storage_offset() % 2 == 0
            return given if pairs else given.detach().clone(memory_format=torch.contiguous_format)
        error_msgs.append(
            f"size mismatch for {key}: copying a param with shape {given.shape} ({given.dtype}) from checkpoint, "
            f"the shape in current model is {shown} (complex), or {stored.shape} as real and imaginary parts."
        )
        return stored


class _FactorList(ComplexParameters):
    """The factors as parameters ``factor_0``, ``factor_1``, ...; read as a sequence, of complex views where complex."""

    def __init__(self, shapes: Sequence[Sequence[int]], is_complex: bool, device: Any, dtype: Any):
        super().__init__()
        for i, shape in enumerate(shapes):
            self._register(f"factor_{i}", shape, is_complex, device, dtype)

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, index: int) -> Tensor:
        i = range(len(self))[index]
        return self.value(f"factor_{i}")

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


# ---------------------------------------------------------------------------------------------------- the factorization


@dataclass(frozen=True)
class FactorizedSlice:
    """The factors of a tensor as plain tensors: a :class:`FactorizedTensor` or, by indexing one, a part of it.

    Fields are those of :class:`FactorizedTensor`: what a factorization lacks is None, or [] for the factors.
    """

    shape: tuple[int, ...]
    factorization: str
    rank: int | tuple[int, ...] | None
    tensor: Any = None
    weights: Any = None
    core: Any = None
    factors: list[Tensor] = field(default_factory=list)

    @property
    def order(self) -> int:
        """How many modes the tensor has."""
        return len(self.shape)

    def to_tensor(self) -> Tensor:
        """The full tensor, of ``shape``; complex where the factors are."""
        if self.factorization == "dense":
            return self.tensor
        if self.factorization == "cp":
            return _cp_to_tensor(self.weights, self.factors, self.shape)
        if self.factorization == "tucker":
            full = self.core
            for factor in self.factors:
                # Mode k leaves at the front and comes back at the end: after all modes the order is the old one.
                full = torch.einsum("r...,sr->...s", full, factor)
            return full
        first, *rest = self.factors
        full = first[0]
        for factor in rest:
            full = torch.einsum("...r,rsq->...sq", full, factor)
        return full[..., 0]

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> FactorizedSlice:
        """The factors of ``to_tensor()[index]``, without building the tensor.

        An int drops its mode (``joint[layer]`` is one layer of a tensor whose first mode counts layers), a slice
        crops it. Differentiable: what comes back is computed from the parameters.

        Raises:
            IndexError: an int out of range, or more entries than modes.
            TypeError: an entry is neither int nor slice.
            ValueError: no mode is left.
        """
        entries = index if isinstance(index, tuple) else (index,)
        for entry in entries:
            if isinstance(entry, bool) or not isinstance(entry, (int, slice)):
                raise TypeError(f"index must be made of ints and slices, got {entry!r} ({type(entry).__name__})")
        if len(entries) > self.order:
            raise IndexError(f"index must have at most {self.order} entries, one a mode, got {len(entries)}")
        entries += (slice(None),) * (self.order - len(entries))
        for entry, size in zip(entries, self.shape, strict=True):
            if isinstance(entry, int) and not -size <= entry < size:
                raise IndexError(f"index must be in [{-size}, {size}), got {entry}")
        if not any(isinstance(entry, slice) for entry in entries):
            raise ValueError(f"index must leave at least one mode, got {index}")
        shape = tuple(len(range(s)[e]) for e, s in zip(entries, self.shape, strict=True) if isinstance(e, slice))
        if self.factorization == "dense":
            return FactorizedSlice(shape, "dense", None, tensor=self.tensor[entries])
        if self.factorization == "tt":
            factors = _slice_train(self.factors, entries)
            return FactorizedSlice(shape, "tt", (1, *(f.shape[-1] for f in factors)), factors=factors)
        weights, core, kept = self.weights, self.core, []
        for entry, factor in zip(entries, self.factors, strict=True):
            if isinstance(entry, slice):
                kept.append(factor[entry])
            elif self.factorization == "cp":
                weights = weights * factor[entry]
            else:
                core = core.movedim(len(kept), -1) @ factor[entry]
        rank = weights.shape[0] if self.factorization == "cp" else tuple(core.shape)
        return FactorizedSlice(shape, self.factorization, rank, weights=weights, core=core, factors=kept)


def _cp_to_tensor(weights: Tensor, factors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Σ_r λ_r Π_k F_k[i_k, r] as one matrix product between the first modes and the last.

    The two Khatri-Rao products are what is held besides the result; the split that makes them smallest is taken.
    """
    split = min(range(len(shape)), key=lambda k: math.prod(shape[:k]) + math.prod(shape[k:]))
    left = weights[None]
    for factor in factors[:split]:
        left = torch.einsum("ir,jr->ijr", left, factor).flatten(0, 1)
    right = factors[split]
    for factor in factors[split + 1 :]:
        right = torch.einsum("ir,jr->ijr", right, factor).flatten(0, 1)
    return torch.einsum("ir,jr->ij", left, right).reshape(shape)


def _slice_train(factors: Sequence[Tensor], entries: Sequence[int | slice]) -> list[Tensor]:
    kept: list[Tensor] = []
    carry: Tensor | None = None  # the product of indexed cores, a matrix, until a core follows that takes it up
    for entry, factor in zip(entries, factors, strict=True):
        core = factor[:, entry]
        if carry is not None:
            core = torch.einsum("pr,r...->p...", carry, core)
        if isinstance(entry, slice):
            kept.append(core)
            carry = None
        else:
            carry = core
    if carry is not None:
        kept[-1] = torch.einsum("psr,rq->psq", kept[-1], carry)
    return kept


class FactorizedTensor(ComplexParameters):
    r"""A tensor W of ``shape`` (s_0, ..., s_{n-1}) whose parameters are the factors of a decomposition.

    - dense: ``tensor`` (s_0, ..., s_{n-1});
    - CP, rank R: W[i_0, ..] = Σ_r λ[r] F_0[i_0, r] F_1[i_1, r] ..., ``weights`` λ (R,), ``factors`` F_k (s_k, R);
    - Tucker, rank (R_0, ..): W[i_0, ..] = Σ G[r_0, r_1, ..] F_0[i_0, r_0] F_1[i_1, r_1] ..., ``core`` G (R_0, ..),
      ``factors`` F_k (s_k, R_k);
    - TT, rank (1, R_1, .., 1): W[i_0, ..] = F_0[:, i_0, :] F_1[:, i_1, :] ..., ``factors`` F_k (R_k, s_k, R_{k+1}).

    Complex tensors follow the same formulas, without conjugates; their parameters are stored as
    :class:`ComplexParameters` says, and ``tensor``, ``weights``, ``core`` and ``factors`` give complex views. Keys of
    the state dict are those of tltorch, and so of neuraloperator: ``tensor``, ``weights``, ``core``,
    ``factors.factor_0`` and so on.

    Calling the module is ``to_tensor()``. Indexing (``W[2]``, ``W[:, 1:3]``) gives the factors of a part of the
    tensor without building it, see :class:`FactorizedSlice`.

    Args:
        shape: the mode sizes.
        factorization: "dense", "cp", "tucker" or "tt", in any case; None is "dense".
        rank: a fraction of the dense parameter count (float), one rank for all modes (int), or the ranks; see
            :func:`validate_rank`. Not looked at for a dense tensor.
        complex: whether the tensor is complex.
        init_std: the standard deviation of the entries of ``to_tensor()`` after :meth:`reset_parameters`; for a
            complex tensor the root of E\|w\|².
        fixed_rank_modes: Tucker only: modes whose rank is their size; True means mode 0.
        dtype: real dtype of the parameters; with ``complex=True``, the complex one names it too.

    Attributes:
        shape, order, factorization (lower case), rank (as :func:`validate_rank` gives it; None if dense), is_complex,
        init_std, and ``tensor``, ``weights``, ``core`` (None where absent), ``factors`` (a sequence, empty if dense).

    Raises:
        TypeError, ValueError: as :func:`validate_rank`; a complex ``dtype`` for a real tensor; ``init_std`` negative.

    Source: Kolda and Bader, SIAM Review 51 (2009), sections 3 and 4; Oseledets, SIAM J. Sci. Comput. 33 (2011); as
    spectral weights arXiv 2310.00120, section 3.

    Example:

        >>> W = FactorizedTensor((16, 16, 8, 5), "Tucker", rank=0.1, complex=True, init_std=0.25)
        >>> W
        FactorizedTensor(
          shape=(16, 16, 8, 5), factorization='tucker', rank=(8, 8, 4, 3), complex=True, init_std=0.25, compression=9.56
          (factors): _FactorList()
        )
        >>> W.to_tensor().shape, W.to_tensor().dtype, W.core.shape
        (torch.Size([16, 16, 8, 5]), torch.complex64, torch.Size([8, 8, 4, 3]))
        >>> W[3].to_tensor().shape
        torch.Size([16, 8, 5])
    """

    def __init__(
        self,
        shape: Sequence[int],
        factorization: str | None = "dense",
        rank: float | int | Sequence[int] | str = 1.0,
        *,
        complex: bool = False,
        init_std: float = 1.0,
        fixed_rank_modes: Sequence[int] | bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        ranks: Any = validate_rank(shape, factorization, rank, fixed_rank_modes=fixed_rank_modes)
        if dtype is not None and not (dtype.is_floating_point or (complex and dtype.is_complex)):
            kind = "a floating-point dtype" if complex else "a real floating-point dtype, or complex=True"
            raise TypeError(f"dtype must be {kind}, got {dtype}")
        if isinstance(init_std, bool) or not isinstance(init_std, (int, float)):
            raise TypeError(f"init_std must be a float, got {init_std!r} ({type(init_std).__name__})")
        if not (math.isfinite(init_std) and init_std >= 0):
            raise ValueError(f"init_std must be finite and not negative, got {init_std}")
        self.shape = tuple(shape)
        self.factorization = _factorization_name(factorization)
        self.rank: int | tuple[int, ...] | None = None if self.factorization == "dense" else ranks
        self.is_complex = complex
        self.init_std = float(init_std)

        def factor_list(shapes: list[tuple[int, ...]]) -> _FactorList:
            return _FactorList(shapes, complex, device, dtype)

        if self.factorization == "dense":
            self._register("tensor", self.shape, complex, device, dtype)
            self.factors: Any = []
        elif self.factorization == "cp":
            self._register("weights", (ranks,), complex, device, dtype)
            self.factors = factor_list([(s, ranks) for s in self.shape])
        elif self.factorization == "tucker":
            self._register("core", ranks, complex, device, dtype)
            self.factors = factor_list(list(zip(self.shape, ranks, strict=True)))
        else:
            self.factors = factor_list(list(zip(ranks[:-1], self.shape, ranks[1:], strict=True)))
        self.reset_parameters()

    # FSDP2 reads a sharded parameter, a DTensor, by getattr and must get that very object.
    def _by_name(self, name: str) -> Tensor | None:
        stored = self._parameters.get(name)
        return stored if stored is None or _is_dtensor(stored) else self.value(name)

    @property
    def tensor(self) -> Tensor | None:
        """Dense: the tensor itself. Sharded (a DTensor): the parameter as it is stored."""
        return self._by_name("tensor")

    @property
    def weights(self) -> Tensor | None:
        """CP: λ, (R,). Sharded (a DTensor): the parameter as it is stored."""
        return self._by_name("weights")

    @property
    def core(self) -> Tensor | None:
        """Tucker: G, (R_0, ..., R_{n-1}). Sharded (a DTensor): the parameter as it is stored."""
        return self._by_name("core")

    def _whole(self) -> FactorizedSlice:
        heads = {name: self.value(name) for name in self._parameters}
        return FactorizedSlice(self.shape, self.factorization, self.rank, factors=list(self.factors), **heads)

    @property
    def order(self) -> int:
        """How many modes the tensor has."""
        return len(self.shape)

    def to_tensor(self) -> Tensor:
        """The full tensor, of ``shape``; complex where the parameters are."""
        return self._whole().to_tensor()

    def forward(self) -> Tensor:
        """The full tensor: :meth:`to_tensor`."""
        return self.to_tensor()

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> FactorizedSlice:
        """The factors of ``to_tensor()[index]``: :meth:`FactorizedSlice.__getitem__`."""
        return self._whole()[index]

    def reset_parameters(self) -> None:
        """Draw the factors so that the entries of ``to_tensor()`` have mean 0 and standard deviation ``init_std``.

        An entry is a sum over all rank indices of products of independent factor entries, so its variance is the
        number of terms times v to the number of drawn factors, where v is the variance of a factor's entries: v is
        (σ² / R)^(1/n) for CP (whose weights are 1), (σ² / Π R_k)^(1/(n+1)) for Tucker with its core, and
        (σ² / Π R_k)^(1/n) for TT. For a complex tensor v = E|f|², half of it in each part.
        """
        terms = 1 if self.rank is None else math.prod((self.rank,) if isinstance(self.rank, int) else self.rank)
        drawn = {"dense": 1, "cp": self.order, "tucker": self.order + 1, "tt": self.order}[self.factorization]
        variance = (self.init_std**2 / terms) ** (1 / drawn)
        std = math.sqrt(variance / 2 if self.is_complex else variance)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "weights":
                    local = _local(parameter)
                    local.zero_()
                    (local[..., 0] if self.is_complex else local).fill_(1)
                else:
                    parameter.normal_(0, std)

    @property
    def num_parameters(self) -> int:
        """How many real numbers are stored; a complex one counts as two."""
        return sum(p.numel() for p in self.parameters())

    @property
    def compression(self) -> float:
        """Entries of the full tensor per stored entry (both complex, or both real)."""
        return math.prod(self.shape) * (2 if self.is_complex else 1) / self.num_parameters

    def extra_repr(self) -> str:
        return (
            f"shape={self.shape}, factorization={self.factorization!r}, rank={self.rank}, complex={self.is_complex}, "
            f"init_std={self.init_std:.4g}, compression={self.compression:.3g}"
        )

    @classmethod
    def from_tensor(
        cls,
        tensor: Tensor,
        factorization: str | None,
        rank: float | int | Sequence[int] | str = 1.0,
        *,
        init_std: float | None = None,
        fixed_rank_modes: Sequence[int] | bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> FactorizedTensor:
        """Decompose ``tensor``, real or complex: ``parafac``, ``tucker`` or ``tensor_train`` of tensorly, in double.

        Args:
            tensor: the tensor to approximate; it is not changed and gets no gradient.
            factorization, rank, fixed_rank_modes: as for the class. Ranks that no tensor of this shape needs come back
                smaller: for Tucker those above the mode sizes, for TT those above the rank of an unfolding.
            init_std: what a later :meth:`reset_parameters` aims at; None: the root mean square of ``tensor``.
            device, dtype: of the parameters; None: those of ``tensor``.
            options: passed to tensorly's function, such as ``n_iter_max``, ``tol`` or ``init``. Its ``random_state``
                is 0 if not given, so that the same tensor gives the same factors. CP runs again with
                ``l2_reg=1e-8``, on the tensor scaled to norm 1, where its normal equations are singular, as they are
                for a rank above the tensor's own.

        Raises:
            TypeError, ValueError: as the class; ``tensor`` is not a floating-point or complex tensor, has values that
                are not finite, or tensorly ends with such.
            ImportError: tensorly is not installed (extra ``tfno``).
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensor must be a tensor, got {tensor!r} ({type(tensor).__name__})")
        check_dtype("tensor", tensor, kind="inexact")
        name = _factorization_name(factorization)
        ranks: Any = validate_rank(tuple(tensor.shape), name, rank, fixed_rank_modes=fixed_rank_modes)
        if name == "dense" and options:
            raise TypeError(f"options must be empty for factorization 'dense', got {sorted(options)}")
        with torch.no_grad():
            full = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).resolve_conj()
            if not full.isfinite().all():
                raise ValueError(f"tensor must be finite, got {int((~full.isfinite()).sum())} values that are not")
            parts = {"tensor": full} if name == "dense" else _decompose(full, name, ranks, options)
            if name == "tucker":
                ranks = tuple(parts["core"].shape)
            elif name == "tt":
                ranks = (1, *(part.shape[-1] for part in parts.values()))
            made = cls(
                tuple(tensor.shape),
                name,
                ranks,
                complex=tensor.is_complex(),
                init_std=float(full.abs().square().mean().sqrt()) if init_std is None else init_std,
                fixed_rank_modes=fixed_rank_modes,
                device=tensor.device if device is None else device,
                dtype=tensor.dtype if dtype is None else dtype,
            )
            made.load_state_dict(parts)
        return made


def _decompose(full: Tensor, name: str, rank: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """tensorly's decomposition of ``full``, in double, as a state dict."""
    tensorly = require("tensorly", extra="tfno")
    decomposition = require("tensorly.decomposition", extra="tfno")
    options = {"random_state": 0, **options}
    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        # A CP rank above a mode's size is meant: that factor's further columns start at random.
        warnings.filterwarnings("ignore", message="Trying to compute SVD", category=UserWarning)
        if name == "tt":
            parts, factors = {}, list(decomposition.tensor_train(full, list(rank), **options))
        elif name == "tucker":
            # Beyond the mode size tensorly's columns are not orthonormal, and its core is then wrong.
            ranks = [min(r, s) for r, s in zip(rank, full.shape, strict=True)]
            core, factors = decomposition.tucker(full, ranks, **options)
            parts = {"core": core}
        else:
            try:
                weights, factors = decomposition.parafac(full, rank, **options)
            except torch.linalg.LinAlgError:
                norm = full.norm().clamp_min(torch.finfo(torch.float64).tiny)
                weights, factors = decomposition.parafac(full / norm, rank, **{"l2_reg": 1e-8, **options})
                weights = weights * norm
            parts = {"weights": weights}
    parts |= {f"factors.factor_{i}": factor for i, factor in enumerate(factors)}
    if not all(part.isfinite().all() for part in parts.values()):
        raise ValueError(f"rank must suit the tensor: tensorly's {name} decomposition at rank {rank} is not finite")
    return parts
