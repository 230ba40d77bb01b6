"""Low-rank layers whose ranks are ordered: a prefix of the factors is a layer of its own.

:class:`LowRankLayer` is what they share: the factors, the rank in force, its importance, truncation and the way back to
a dense layer. Each kind adds its call, how its dense weight reads as a matrix, and its conversion from ``torch.nn``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._backend import BACKENDS
from .._checks import check_choice, check_int
from .base import Device, LowRankLayer, Rank, check_source, converted, init_bias, zero_where
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .functional import low_rank_embedding, low_rank_linear

__all__ = ["LowRankConv1d", "LowRankConv2d", "LowRankConv3d", "LowRankEmbedding", "LowRankLayer", "LowRankLinear"]


class LowRankLinear(LowRankLayer):
    r"""A linear map through a bottleneck of ordered ranks, whose prefixes are maps of their own::

        y = (x V_bᵀ) U_bᵀ + bias            V_b = weight_in[:b], U_b = weight_out[:, :b]

    Reads as :class:`torch.nn.Linear`, and starts as one: a weight drawn as that layer draws it, decomposed as
    P S Qᵀ into U = P √S and V = √S Qᵀ. It has r (in + out) parameters beside the bias, and costs b (in + out)
    multiplications a row.

    Args:
        in_features, out_features: channels of input and output.
        bias: add a learned bias.
        device, dtype: of the parameters.
        max_rank: r, by default min(in_features, out_features), where every linear map is within reach.
        backend: see :func:`torchlayers.backend`.

    Shape: x (..., in_features) -> (..., out_features). ``layer(x, rank=b)`` runs the prefix b, an int from 0 (the bias
    alone) to ``layer.rank``, or a tensor of ints with one for each sample, (x.shape[0],).

    Attributes:
        weight_in, weight_out, bias: (r, in_features), (out_features, r), (out_features,) or None.
        rank, max_rank: the terms in force and those that the factors hold.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call.

    Source: arXiv 2308.14929, section 3.

    Example:

        >>> layer = LowRankLinear.from_linear(nn.Linear(64, 32))
        >>> x = torch.randn(5, 64)
        >>> layer(x).shape, layer(x, rank=4).shape
        (torch.Size([5, 32]), torch.Size([5, 32]))
        >>> layer.truncate_(8)
        LowRankLinear(in_features=64, out_features=32, bias=True, rank=8, max_rank=32)
        >>> layer.to_dense()
        Linear(in_features=64, out_features=32, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        max_rank: int | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self.in_features = check_int("in_features", in_features)
        self.out_features = check_int("out_features", out_features)
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        self.backend = backend
        self._build(out_features, in_features, max_rank, bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, max_rank: int | None = None, *, gram: Tensor | None = None
    ) -> LowRankLinear:
        """The layer that computes what ``linear`` does, or with a lower ``max_rank`` its best approximation.

        Args:
            linear: left as it is.
            max_rank: min(in, out) by default.
            gram: E[x xᵀ] of the inputs, see :meth:`load_dense_`.

        Raises:
            TypeError: ``linear`` is no :class:`torch.nn.Linear`, or complex.
            ValueError: its weight is parametrised, uninitialised or not finite, or ``max_rank`` does not fit.
        """
        check_source("linear", linear, nn.Linear)
        return converted(
            cls, linear, gram, linear.in_features, linear.out_features, linear.bias is not None, max_rank=max_rank
        )

    def forward(self, x: Tensor, rank: Rank = None) -> Tensor:
        """The map at ``rank``, or at the rank in force."""
        rank = self._rank_of_call(rank)
        return low_rank_linear(x, self.weight_in, self.weight_out, self.bias, rank, backend=self.backend)

    def _matrix_of(self, dense: Tensor) -> Tensor:
        return dense[None]

    def _dense_of(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0)

    def _init_dense(self, dense: Tensor) -> None:
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        init_bias(self.bias, self.in_features)

    def _dense_module(self, **factory: Any) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **factory)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {super().extra_repr()}"


class LowRankEmbedding(LowRankLayer):
    r"""An embedding table of ordered ranks, whose prefixes are tables of their own::

        y = V_b[:, index]ᵀ U_bᵀ            V_b = weight_in[:b], U_b = weight_out[:, :b]

    Reads as :class:`torch.nn.Embedding`, and starts as one: a table drawn as that layer draws it, decomposed as
    P S Qᵀ into U = P √S and V = √S Qᵀ. It has r (num_embeddings + embedding_dim) parameters.

    Args:
        num_embeddings, embedding_dim: entries and channels of the table.
        padding_idx: an entry that starts at zero and whose own part gets no gradient, so that it stays zero.
        max_norm, norm_type, scale_grad_by_freq, sparse: must be left alone: entries share ``weight_out``, so that none
            can be renormalised, scaled or updated by itself; here for the signature's sake.
        device, dtype: of the parameters.
        max_rank: r, by default min(num_embeddings, embedding_dim).

    Shape: index, ints (...) -> (..., embedding_dim). ``layer(index, rank=b)`` runs the prefix b, an int from 0 (zeros)
    to ``layer.rank``, or a tensor of ints with one for each sample, (index.shape[0],).

    Attributes:
        weight_in, weight_out: (r, num_embeddings), (embedding_dim, r).
        rank, max_rank: the terms in force and those that the factors hold.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call. An index outside the table is torch's
            IndexError, and on a GPU its assertion.

    Source: arXiv 2308.14929, section 3, whose ordered factorisation it applies to the table.

    Example:

        >>> layer = LowRankEmbedding(1000, 64, max_rank=16)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    bias: None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        max_rank: int | None = None,
    ):
        super().__init__()
        self.num_embeddings = check_int("num_embeddings", num_embeddings)
        self.embedding_dim = check_int("embedding_dim", embedding_dim)
        if padding_idx is not None:
            check_int("padding_idx", padding_idx, minimum=-num_embeddings)
            if padding_idx >= num_embeddings:
                raise ValueError(f"padding_idx must be below num_embeddings = {num_embeddings}, got {padding_idx}")
            padding_idx %= num_embeddings
        self.padding_idx = padding_idx
        for name, value, left in (
            ("max_norm", max_norm, None),
            ("scale_grad_by_freq", scale_grad_by_freq, False),
            ("sparse", sparse, False),
        ):
            if value:
                raise ValueError(f"{name} must be {left}, since the entries share weight_out, got {value!r}")
        self._build(embedding_dim, num_embeddings, max_rank, False, device=device, dtype=dtype)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, max_rank: int | None = None, *, gram: Tensor | None = None
    ) -> LowRankEmbedding:
        """The layer that computes what ``embedding`` does, or with a lower ``max_rank`` its best approximation.

        Args:
            embedding: left as it is.
            max_rank: min(num_embeddings, embedding_dim) by default.
            gram: how often each entry occurs, (num_embeddings,), so that frequent ones are kept best.

        Raises:
            TypeError: ``embedding`` is no :class:`torch.nn.Embedding`, or complex.
            ValueError: its weight is parametrised or not finite, ``max_rank`` does not fit, or it renormalises, scales
                by frequency or has sparse gradients.
        """
        check_source("embedding", embedding, nn.Embedding)
        e = embedding
        arguments = (e.num_embeddings, e.embedding_dim, e.padding_idx)
        options = (e.max_norm, e.norm_type, e.scale_grad_by_freq, e.sparse)
        return converted(cls, e, gram, *arguments, *options, max_rank=max_rank)

    def forward(self, index: Tensor, rank: Rank = None) -> Tensor:
        """The rows of the table at ``rank``, or at the rank in force."""
        return low_rank_embedding(index, self.weight_in, self.weight_out, self._rank_of_call(rank), self.padding_idx)

    def _matrix_of(self, dense: Tensor) -> Tensor:
        return dense.t()[None]

    def _dense_of(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0).t()

    def _init_dense(self, dense: Tensor) -> None:
        nn.init.normal_(dense)
        if self.padding_idx is not None:
            with torch.no_grad():
                dense[self.padding_idx].zero_()

    @torch.no_grad()
    def load_dense_(self, weight: Tensor, gram: Tensor | None = None) -> LowRankLayer:
        super().load_dense_(weight, gram)
        if self.padding_idx is not None and not bool(weight[self.padding_idx].any()):
            # The decomposition leaves a rounding error where the padding entry must give zeros.
            at_padding = torch.arange(self.num_embeddings, device=self.weight_in.device) == self.padding_idx
            zero_where(self.weight_in, at_padding)
        return self

    def _dense_module(self, **factory: Any) -> nn.Module:
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, **factory)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{super().extra_repr()}"
