"""Tensor attention: a query attends to pairs of keys, with one softmax over all pairs (arXiv 2310.04064, 2405.16411).

:func:`tensor_attention` is the exact operation in O(n d) memory, with windows, masks, grouped queries and dropout;
:func:`polynomial_tensor_attention` the near-linear approximation for bounded entries, with its error bound and a
constant-size decoding state; :func:`nth_order_attention` and :func:`polynomial_nth_order_attention` are both for any
number of keys. :class:`TensorAttention` stands in for ``nn.MultiheadAttention``, :class:`TensorTransformerBlock` is a
Transformer block around it, :class:`TensorAttentionCache` what it keeps while decoding. :func:`ring_tensor_attention`
and :class:`RingTensorAttention` are for sequences that lie on several ranks.
"""

from .distributed import RingTensorAttention, ring_tensor_attention
from .functional import (
    nth_order_attention,
    polynomial_nth_order_attention,
    polynomial_tensor_attention,
    tensor_attention,
)
from .huggingface import register_ring_tensor_attention
from .modules import TensorAttention, TensorAttentionCache, TensorTransformerBlock
from .polynomial import PolynomialState, certified, tensor_attention_error_bound, tensor_attention_logit_limit

__all__ = [
    "PolynomialState",
    "RingTensorAttention",
    "TensorAttention",
    "TensorAttentionCache",
    "TensorTransformerBlock",
    "certified",
    "nth_order_attention",
    "polynomial_nth_order_attention",
    "polynomial_tensor_attention",
    "register_ring_tensor_attention",
    "ring_tensor_attention",
    "tensor_attention",
    "tensor_attention_error_bound",
    "tensor_attention_logit_limit",
]
