"""Maestro: low-rank layers whose ranks are ordered by training, so that every prefix is a model (arXiv 2308.14929).

:func:`factorize` turns the layers of a model into low-rank ones (:class:`LowRankLinear` and its like) with equal
outputs. Training orders their terms: :func:`lod_loss` with a :class:`RankSampler` runs one layer at a lower rank at
each step, :func:`hierarchical_group_lasso` or its proximal step :func:`hgl_prox_` drives the last terms to zero,
:func:`progressive_shrink` removes them. :func:`extract` then makes plain ``torch.nn`` models of any size from one
training; :func:`frontier` shows what each costs and is worth.
"""

from .attention import LowRankMultiheadAttention
from .convert import LowRankConfig, canonicalize_, factorize
from .export import count, extract, frontier
from .functional import low_rank_linear
from .layers import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankEmbedding, LowRankLinear
from .ordered import RankSampler, lod_loss, sampled_ranks
from .regularization import group_lasso, hgl_prox_, hierarchical_group_lasso
from .shrink import progressive_shrink, recalibrate_bn

__all__ = [
    "LowRankConfig",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankEmbedding",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "RankSampler",
    "canonicalize_",
    "count",
    "extract",
    "factorize",
    "frontier",
    "group_lasso",
    "hgl_prox_",
    "hierarchical_group_lasso",
    "lod_loss",
    "low_rank_linear",
    "progressive_shrink",
    "recalibrate_bn",
    "sampled_ranks",
]
