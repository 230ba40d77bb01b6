"""Equivariant polynomials of graphs (arXiv 2302.11556): the basis, its values, and the networks made of them.

A :class:`Pattern` is one basis element, :func:`enumerate_patterns` and :func:`count_patterns` are the basis, and
:func:`is_computable` and :func:`missing_patterns` say which of it a network can compute (:data:`BANKS`).
:func:`evaluate` gives their values, by a :func:`contraction_plan`, on dense and on large sparse graphs;
:func:`hom_count` and :func:`inj_count` are those of 0/1 graphs. :class:`AddPolynomialFeatures` is the transform of
PyTorch Geometric that appends them. :class:`PPGN` (PPGN++ by default) works on all pairs of nodes, packed in a
:class:`PairBatch` or dense; :class:`PolynomialConv` is a message-passing layer for large sparse graphs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .computability import BANKS, Bank, is_computable
from .edges import EdgeSupport, edge_support
from .enumeration import count_patterns, enumerate_patterns, missing_patterns
from .evaluation import evaluate, hom_count, inj_count
from .functional import masked_product, pair_linear, pair_mlp, pair_readout, segment_matmul
from .modules import PPGN, PPGNBlock, PPGNConv
from .pairs import PairBatch, PairLayout, to_pair_batch
from .patterns import Pattern
from .plan import Plan, contraction_plan
from .sparse import edge_polynomials, evaluate_sparse

if TYPE_CHECKING:
    from .conv import PolynomialConv
    from .transforms import AddPolynomialFeatures

__all__ = [
    "BANKS",
    "PPGN",
    "AddPolynomialFeatures",
    "Bank",
    "EdgeSupport",
    "PPGNBlock",
    "PPGNConv",
    "PairBatch",
    "PairLayout",
    "Pattern",
    "Plan",
    "PolynomialConv",
    "contraction_plan",
    "count_patterns",
    "edge_polynomials",
    "edge_support",
    "enumerate_patterns",
    "evaluate",
    "evaluate_sparse",
    "hom_count",
    "inj_count",
    "is_computable",
    "masked_product",
    "missing_patterns",
    "pair_linear",
    "pair_mlp",
    "pair_readout",
    "segment_matmul",
    "to_pair_batch",
]


# Their base classes are PyTorch Geometric's.
_LAZY = {"AddPolynomialFeatures": "transforms", "PolynomialConv": "conv"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
