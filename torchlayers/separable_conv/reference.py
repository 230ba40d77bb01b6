"""Separable convolutions by their definition: the dense kernel that a format stands for, and a dense convolution.

The formats, in two dimensions, for one of g groups with C input channels, O output channels and rank R:

=============  ==================================================  =====================
format         W[o, c, i, j]                                       factors
=============  ==================================================  =====================
``seq``        sum_r H[o, r, j] V[r, c, i]                         V, H
``cp``         sum_r P[o, r] A[r, i] B[r, j] Q[r, c]               Q, A, B, P
``kernelwise`` sum_r A[o, c, r, i] B[o, c, r, j]                   A, B
``depthwise``  sum_r P[o, (c, r)] D[(c, r), i, j]                  D, P
=============  ==================================================  =====================

In three dimensions ``seq`` has a third filter and two ranks; in one there is no second axis to separate, and ``seq`` is
a filter from C to R channels followed by a mixing from R to O.

Source: Boukraichi, Akkari, Casenave, Ryckelynck, arXiv 2304.04964; ``seq`` is scheme 2 of Jaderberg, Vedaldi and
Zisserman, arXiv 1405.3866, ``cp`` that of Lebedev et al., arXiv 1412.6553.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["chain_weight", "kernelwise_weight"]


def chain_weight(factors: Sequence[Tensor], in_channels: int, groups: int = 1) -> Tensor:
    """The kernel of a chain of convolutions without bias between them: (O, C / groups, ``*kernel``).

    Args:
        factors: the kernels of the chain in the order of application, each in the shape of ``torch.nn``'s weight,
            (out, in / its groups, ``*kernel``). Each axis is longer than 1 in at most one of them.
        in_channels: C.
        groups: those of the whole; a factor with fewer inputs than the layer before has outputs acts blockwise.
    """
    total = _blocks(factors[0], groups, in_channels // groups)
    for factor in factors[1:]:
        block = _blocks(factor, groups, total.shape[1])
        (_, out, _, *b), (_, _, inside, *a) = block.shape, total.shape
        product = block.movedim(2, -1).flatten(1, -2) @ total.flatten(2)  # (g, out * b, in * a)
        product = product.unflatten(1, (out, *b)).unflatten(-1, (inside, *a)).movedim(2 + len(b), 2)
        # Along each axis one of a and b is 1.
        pairs = [axis for d in range(len(b)) for axis in (3 + d, 3 + len(b) + d)]
        sizes = [m * n for m, n in zip(a, b, strict=True)]
        total = product.permute(0, 1, 2, *pairs).reshape(groups, out, inside, *sizes)
    return total.flatten(0, 1)


def _blocks(factor: Tensor, groups: int, channels: int) -> Tensor:
    """A factor as (groups, out, channels, ``*kernel``), zero where an output does not see an input."""
    out = factor.unflatten(0, (groups, -1))
    blocks = channels // factor.shape[1]
    if blocks == 1:
        return out
    eye = torch.eye(blocks, dtype=factor.dtype, device=factor.device)
    spread = out.unflatten(1, (blocks, -1)).unsqueeze(3) * eye.view(1, blocks, 1, blocks, 1, *(1,) * (out.ndim - 3))
    return spread.flatten(3, 4).flatten(1, 2)


def kernelwise_weight(factors: Sequence[Tensor]) -> Tensor:
    """Every kernel as a sum of outer products: factors (O, C / groups, R, k_axis), one an axis."""
    total = factors[0]
    for factor in factors[1:]:
        total = total.unsqueeze(-1) * factor.reshape(*factor.shape[:3], *(1,) * (total.ndim - 3), factor.shape[3])
    return total.sum(2)
