"""Spectral weights, and how the kept modes are mixed by them: Y[b,o,f] = Σ_i X[b,i,f] W[i,o,f].

Every factorization of W is one form, mode by mode:

    W[:, :, f] = U S[f] V^T        dense: S.   CP: S diagonal.   Tucker: S = core x_2 F_2 ... x_{d+1} F_{d+1}.
                                   TT: U = G_1, S = G_2 ... G_{d+2}.

"factorized" applies U, S[f] and V to X one after the other, "reconstructed" multiplies them out to W first.

Parameters are real with a trailing dimension of 2, and under a compiler, which generates no code for complex numbers,
and for the kernels all of it is real arithmetic: a product of two complex numbers is one of a vector and a 2×2
matrix, [ar ai] [[br, bi], [-bi, br]]. In eager mode the large products are complex, one call with fewer copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_int, check_ints
from ..factorized import FactorizedSlice, FactorizedTensor, as_real
from .transforms import transposed

__all__ = ["IMPLEMENTATIONS", "MEMORY_CAP", "JointSpectralWeights", "SpectralWeight", "choose_implementation", "mix"]

IMPLEMENTATIONS = ("auto", "reconstructed", "factorized")

#: Bytes that the intermediates of one contraction may take before "auto" prefers a way with more FLOPs.
MEMORY_CAP = 512 * 2**20

# The batch size that "auto" reckons with under a compiler, so that one graph serves all.
NOMINAL_BATCH = 16


def _as_matrix(b: Tensor) -> Tensor:
    """(..., 2) -> (..., 2, 2): the complex number b as the matrix that multiplies a row (re, im) from the right."""
    re, im = b.unbind(-1)
    return torch.stack((b, torch.stack((-im, re), -1)), -2)


def complex_einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """``torch.einsum`` of two complex tensors with trailing (re, im); the matrices are made of ``b``, the smaller."""
    operands, out = equation.split("->")
    left, right = operands.split(",")
    return torch.einsum(f"{left}Y,{right}YZ->{out}Z", a, _as_matrix(b))


def complex_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The complex product of planes (..., 2, m, k) and (..., 2, k, n), as one real product; gives (..., 2, m, n)."""
    re, im = a.unbind(-3)
    a = torch.cat((a, torch.stack((-im, re), -3)), -1)
    b = b.flatten(-3, -2)
    if b.ndim == 2:  # matmul would fold likewise, with a test of strides that ties dynamic sizes down
        return (a.reshape(-1, a.shape[-1]) @ b).view(*a.shape[:-1], b.shape[-1])
    return (a.flatten(-3, -2) @ b).unflatten(-2, (2, re.shape[-2]))


class SpectralWeight(NamedTuple):
    """The parts of a weight (in, out, modes...) or, separable, (channels, modes...), as reals with trailing (re, im).

    ``parts``: dense (tensor,); CP (weights, factors...); Tucker (core, factors...); TT (factors...).
    """

    kind: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight: Tensor | FactorizedTensor | FactorizedSlice | SpectralWeight) -> SpectralWeight:
        if isinstance(weight, SpectralWeight):
            return weight
        if isinstance(weight, Tensor):
            if not weight.is_complex():
                raise TypeError(f"weight must have a complex dtype, got {weight.dtype}")
            return cls("dense", tuple(weight.shape), (as_real(weight),))
        if isinstance(weight, FactorizedTensor):
            if not weight.is_complex:
                raise TypeError("weight must be a complex FactorizedTensor, got a real one")
            return cls(weight.factorization, weight.shape, tuple(weight.parameters()))
        if isinstance(weight, FactorizedSlice):
            head = (weight.tensor, weight.weights, weight.core)
            parts = tuple(as_real(p) for p in (*head, *weight.factors) if p is not None)
            return cls(weight.factorization, weight.shape, parts)
        raise TypeError(
            "weight must be a complex tensor, a FactorizedTensor or a layer of JointSpectralWeights, "
            f"got {type(weight).__name__}"
        )

    def to(self, dtype: torch.dtype) -> SpectralWeight:
        return self._replace(parts=tuple(p.to(dtype) for p in self.parts))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.parts if self.kind == "tt" else self.parts[1:]

    def layer(self, index: int) -> SpectralWeight:
        """Entry ``index`` of the first axis: the factors of one layer of a joint tensor."""
        if self.kind == "dense":
            parts: tuple[Tensor, ...] = (self.parts[0][index],)
        elif self.kind == "tt":
            first, second, *rest = self.parts
            parts = (complex_einsum("pr,rsq->psq", first[:, index], second), *rest)
        else:
            head, first, *rest = self.parts
            equation = "r,r->r" if self.kind == "cp" else "r...,r->..."
            parts = (complex_einsum(equation, head, first[index]), *rest)
        return SpectralWeight(self.kind, self.shape[1:], parts)

    def crop(self, starts: Sequence[int], modes: Sequence[int]) -> SpectralWeight:
        """The ``modes`` from ``starts`` on of each mode axis, without multiplying anything out."""
        lead = len(self.shape) - len(modes)
        if tuple(modes) == self.shape[lead:]:
            return self
        parts = list(self.parts)
        for axis, (start, k) in enumerate(zip(starts, modes, strict=True), lead):
            if self.kind == "dense":
                parts[0] = parts[0].narrow(axis, start, k)
            elif self.kind == "tt":
                parts[axis] = parts[axis].narrow(1, start, k)
            else:
                parts[axis + 1] = parts[axis + 1].narrow(0, start, k)
        return SpectralWeight(self.kind, (*self.shape[:lead], *modes), tuple(parts))

    def to_tensor(self) -> Tensor:
        """The full complex tensor."""
        kind, head = self.kind, [torch.view_as_complex(p.contiguous()) for p in self.parts]
        if kind == "dense":
            return head[0]
        factors = head if kind == "tt" else head[1:]
        named = {"weights": head[0]} if kind == "cp" else {"core": head[0]} if kind == "tucker" else {}
        return FactorizedSlice(self.shape, kind, None, factors=factors, **named).to_tensor()


class _Form(NamedTuple):
    """U (i, r), S (r, s, modes...), or (r, modes...) if diagonal, V (o, s), with trailing (re, im); None: identity."""

    u: Tensor | None
    s: Tensor
    v: Tensor | None
    diagonal: bool = False


def _form(w: SpectralWeight, separable: bool) -> _Form:
    """``w`` as U S[f] V^T; a separable weight is the vector U s[f]."""
    if w.kind == "dense":
        return _Form(None, w.parts[0], None)
    lead = 1 if separable else 2
    channel, mode = w.factors[:lead], w.factors[lead:]
    if w.kind == "cp":
        s = w.parts[0]
        for factor in mode:
            s = complex_einsum("r...,xr->r...x", s, factor)
        return _Form(channel[0], s, None if separable else channel[1], diagonal=not separable)
    if w.kind == "tucker":
        s = w.parts[0]
        for axis, factor in enumerate(mode, lead):
            s = complex_einsum("r...,xr->...x", s.movedim(axis, 0), factor).movedim(-2, axis)
        return _Form(channel[0], s, None if separable else channel[1])
    s = mode[-1][:, :, 0]
    for factor in reversed(mode[:-1]):
        s = complex_einsum("r...,axr->ax...", s, factor)
    if not separable:
        s = complex_einsum("r...,aor->ao...", s, channel[1])
    return _Form(channel[0][0], s, None)


def _complex(part: Tensor) -> Tensor:
    return torch.view_as_complex(part.contiguous())


# Modes are planes (K, 2, B, C) or, in eager mode, complex (K, B, C), whose products are one call. What follows does
# the same to either, and gives either from a part of a weight.


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b if a.is_complex() else complex_matmul(a, b)


def _matrix(part: Tensor, like: Tensor) -> Tensor:
    """(i, r, 2) as a matrix of the kind of ``like``."""
    return _complex(part) if like.is_complex() else part.movedim(-1, 0)


def _matrices(s: Tensor, like: Tensor) -> Tensor:
    """(a, b, modes..., 2) as a matrix (a, b) a mode, contiguous."""
    a, b = s.shape[:2]
    if like.is_complex():
        return transposed(_complex(s).reshape(a * b, -1)).view(-1, a, b)
    return transposed(s.reshape(a * b, -1)).view(-1, 2, a, b)


def choose_implementation(w: SpectralWeight, batch: int, *, tiled: bool = False) -> str:
    """What is cheaper for ``batch`` samples, in FLOPs, of the ways whose intermediates stay below :data:`MEMORY_CAP`.

    "factorized" costs B K (Ci r + r s + s Co) complex products for K modes (CP: r = s without the middle term),
    "reconstructed" K (Ci r s + Ci s Co) + B K Ci Co (CP: R Ci Co (K + 1) + ...). Building S is common to both.
    ``tiled``: a kernel applies the factors, without intermediates.
    """
    if w.kind == "dense":
        return "reconstructed"
    ci, co, *modes = w.shape
    k = math.prod(modes)
    if w.kind == "cp":
        r = w.factors[0].shape[1]
        factorized = batch * k * r * (ci + co + 1), k * r * (1 + 2 * batch)
        reconstructed = r * ci * co * (k + 1) + batch * k * ci * co, r * (ci * co + k) + 2 * k * ci * co
    elif w.kind == "tucker":
        r, s = w.factors[0].shape[1], w.factors[1].shape[1]
        factorized = batch * k * (ci * r + r * s + s * co), k * (r * s + batch * (2 * r + s))
        reconstructed = k * (ci * r * s + ci * s * co + batch * ci * co), k * (r * s + ci * s + ci * co)
    else:
        r = w.factors[0].shape[2]
        factorized = batch * k * r * (ci + co), k * r * (co + 2 * batch)
        reconstructed = k * (ci * r * co + batch * ci * co), k * (r * co + ci * co)
    ways = {"factorized": (factorized[0], 0) if tiled else factorized, "reconstructed": reconstructed}
    fitting = {name: flops for name, (flops, entries) in ways.items() if 8 * entries <= MEMORY_CAP}
    if fitting:
        return min(fitting, key=lambda name: fitting[name])
    return min(ways, key=lambda name: ways[name][1])


def mix(x: Tensor, w: SpectralWeight, *, separable: bool, implementation: str) -> Tensor:
    """Mix ``x``, planes (modes, 2, B, Ci) or complex (modes, B, Ci), by the cropped weight; gives the same with Co."""
    u, s, v, diagonal = _form(w, separable)
    if separable:
        return _scale(x, s if u is None else complex_einsum("r...,cr->c...", s, u))
    if implementation == "auto":
        batch = NOMINAL_BATCH if torch.compiler.is_compiling() else x.shape[-2]
        implementation = choose_implementation(w, batch)
    if implementation == "reconstructed" or u is None:
        return _product(x, _reconstruct(u, s, v, diagonal, x))
    x = _product(x, _matrix(u, x))
    x = _scale(x, s) if diagonal else _product(x, _matrices(s, x))
    return x if v is None else _product(x, _matrix(v, x).mT)


def _scale(x: Tensor, s: Tensor) -> Tensor:
    """``x`` (modes, ..., B, C) times ``s`` (C, modes..., 2), entry by entry."""
    s = s.flatten(1, -2)
    if x.is_complex():
        return x * _complex(s).t()[:, None]
    xr, xi = x.unbind(1)
    sr, si = (part.t()[:, None] for part in s.unbind(-1))
    return torch.stack((xr * sr - xi * si, xr * si + xi * sr), 1)


def _reconstruct(u: Tensor | None, s: Tensor, v: Tensor | None, diagonal: bool, like: Tensor) -> Tensor:
    """W as a matrix (Ci, Co) a mode, of the kind of ``like``."""
    if u is None:
        return _matrices(s, like)
    if diagonal:
        assert v is not None
        pairs, s = complex_einsum("ir,or->rio", u, v).flatten(1, 2), s.flatten(1, -2)
        shape = (u.shape[0], v.shape[0])
        if like.is_complex():
            return (_complex(s).t() @ _complex(pairs)).unflatten(-1, shape)
        return torch.einsum("rmY,rpYZ->mZp", s, _as_matrix(pairs)).unflatten(-1, shape)
    w = _product(_matrix(u, like), _matrices(s, like))
    return w if v is None else _product(w, _matrix(v, like).mT)


class JointSpectralWeights(nn.Module):
    """One factorized tensor of shape (layers, in, out, modes...) that holds the spectral weights of all layers.

    The decomposition shares what the layers have in common: layer l is the same factors with the row l of the first
    one contracted in, so a layer is never cut out of the full tensor. This is the global parametrisation of
    arXiv 2310.00120, section 3.2, for CP, Tucker and TT (and dense, where nothing is shared).

    Args:
        n_layers: number of layers.
        in_channels, out_channels: channels of each layer.
        n_modes: entries of the weight's mode axes: totals, the last one halved, m // 2 + 1, for real data.
        rank, factorization, fixed_rank_modes: see :class:`torchlayers.FactorizedTensor`; ``fixed_rank_modes=[0]``
            leaves the layer axis of a Tucker tensor uncompressed.
        separable: channel-by-channel weights, of shape (layers, channels, modes...).
        complex_data: the last axis is not halved.
        init_std: standard deviation of the entries at initialisation; "auto" is √(2 / (in + out)).
        device, dtype: of the parameters; dtype is the real one.

    Shape: nothing is called; ``weights[l]`` is a factorized tensor (in, out, modes...), or (channels, modes...) with
    ``separable``.

    Raises:
        TypeError, ValueError: wrong counts, rank or factorization; ``separable`` with unequal channels.

    Example:

        >>> weights = JointSpectralWeights(4, 8, 8, (12, 12), rank=0.1, factorization="tucker")
        >>> weights.to_tensor().shape
        torch.Size([4, 8, 8, 12, 7])
        >>> weights[2].to_tensor().shape
        torch.Size([8, 8, 12, 7])
    """

    def __init__(
        self,
        n_layers: int,
        in_channels: int,
        out_channels: int,
        n_modes: Sequence[int] | int,
        *,
        rank: float | int | Sequence[int] = 0.5,
        factorization: str | None = None,
        fixed_rank_modes: Sequence[int] | bool | None = None,
        separable: bool = False,
        complex_data: bool = False,
        init_std: float | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.n_layers = check_int("n_layers", n_layers)
        channels = channel_axes(in_channels, out_channels, separable)
        modes = stored_modes(n_modes, complex_data)
        self.weight = FactorizedTensor(
            (n_layers, *channels, *modes),
            factorization,
            rank,
            complex=True,
            init_std=auto_std(init_std, in_channels, out_channels),
            fixed_rank_modes=fixed_rank_modes,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"n_layers={self.n_layers}, shape={self.shape}, factorization={self.weight.factorization!r}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, in, out, modes...)."""
        return self.weight.shape

    def to_tensor(self) -> Tensor:
        """The full complex tensor, (layers, in, out, modes...)."""
        return self.weight.to_tensor()

    def forward(self) -> Tensor:
        """:meth:`to_tensor`."""
        return self.to_tensor()

    def __len__(self) -> int:
        return self.n_layers

    def __getitem__(self, index: int) -> SpectralWeight:
        """The factors of layer ``index``, a weight for :func:`torchlayers.functional.spectral_conv`."""
        if not -self.n_layers <= index < self.n_layers:
            raise IndexError(f"index must be in [{-self.n_layers}, {self.n_layers}), got {index}")
        return SpectralWeight.of(self.weight).layer(index)

    def reset_parameters(self) -> None:
        """Draw the factors anew."""
        self.weight.reset_parameters()


# --- what the layer and the joint weights check alike -----------------------------------------------------------


def channel_axes(in_channels: int, out_channels: int, separable: bool) -> tuple[int, ...]:
    check_int("in_channels", in_channels)
    check_int("out_channels", out_channels)
    if not separable:
        return in_channels, out_channels
    if in_channels != out_channels:
        raise ValueError(
            f"out_channels must equal in_channels = {in_channels} for a separable convolution, got {out_channels}"
        )
    return (in_channels,)


def mode_totals(n_modes: Sequence[int] | int) -> tuple[int, ...]:
    """``n_modes`` an axis; an int is that of one axis."""
    modes = check_ints("n_modes", n_modes)
    if not modes:
        raise ValueError("n_modes must have at least one entry, got ()")
    return modes


def stored_modes(n_modes: Sequence[int] | int, complex_data: bool) -> tuple[int, ...]:
    """Totals to the sizes of a weight's mode axes."""
    modes = mode_totals(n_modes)
    return modes if complex_data else (*modes[:-1], modes[-1] // 2 + 1)


def auto_std(init_std: float | str, in_channels: int, out_channels: int) -> float:
    if init_std == "auto":
        return math.sqrt(2 / (in_channels + out_channels))
    if isinstance(init_std, str):
        check_choice("init_std", init_std, ["auto"])
    return init_std  # type: ignore[return-value]
