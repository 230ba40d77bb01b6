"""PPGN and PPGN++: networks on all pairs of nodes, whose one operation between nodes is the matrix product."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._backend import BACKENDS
from .._checks import check_choice, check_int, check_ints, check_size
from .functional import POOLS, SCALES, check_pairs, pair_linear, pair_mlp, pair_readout, segment_matmul
from .pairs import PairBatch, check_mask

__all__ = ["PPGN", "PPGNBlock", "PPGNConv"]

NORMS = (None, "layer")
READOUTS = ("last", "jk_sum")


class PPGNBlock(nn.Module):
    r"""One block of PPGN++, or of PPGN: a matrix product of pair features, channel by channel, between MLPs::

        m1 = MLP1[x, I, xᵀ, I]      m2 = MLP2[x, I]      y[i, k] = s Σ_j m1[i, j] ∘ m2[j, k]      out = W [x, I, y] + b

    with x[i, j] the C features of the pair of nodes (i, j), I the identity matrix as a channel, xᵀ[i, j] = x[j, i].
    PPGN (``plus=False``) lacks I and xᵀ. Every layer of an MLP is linear, then ReLU. A block computes whatever matrix
    products, transposes, diagonals and entrywise products make of its input: all equivariant polynomials whose pattern
    has treewidth at most 2.

    Args:
        in_channels: C.
        out_channels: of the MLPs and of the output.
        mlp_depth: layers of each MLP.
        plus: PPGN++ instead of PPGN.
        norm: "layer" normalises the output over its channels, pair by pair, with a gain and a bias; None is the paper.
        scale: of the product: "none" (s = 1, the paper), "sqrt_n" (1 / √n) or "n" (1 / n), n the size of the graph.
            Without one, activations grow with size and depth.
        device, dtype: of the parameters.
        backend: see :func:`torchlayers.backend`.

    Shape: x (…, N, N, C) and mask (…, N), or a :class:`PairBatch` with C channels -> the same with ``out_channels``.

    Attributes:
        mlp1, mlp2: :class:`torch.nn.ModuleList` of :class:`torch.nn.Linear`; inputs in the order above.
        skip: :class:`torch.nn.Linear`.
        norm: :class:`torch.nn.LayerNorm` or None.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call.

    Sources: arXiv 2302.11556, section 4 (PPGN++), and its official code; 1905.11136 (PPGN).

    Example:

        >>> block = PPGNBlock(5, 16)
        >>> block(torch.randn(2, 7, 7, 5), mask=torch.ones(2, 7, dtype=torch.bool)).shape
        torch.Size([2, 7, 7, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mlp_depth: int = 2,
        plus: bool = True,
        norm: str | None = None,
        scale: str = "none",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.mlp_depth = check_int("mlp_depth", mlp_depth)
        self.plus = bool(plus)
        check_choice("norm", norm, NORMS)
        check_choice("scale", scale, SCALES)
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        self.scale, self.backend = scale, backend
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        c = in_channels + self.plus
        widths = [out_channels] * mlp_depth

        def mlp(first: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(i, o, **options) for i, o in zip([first, *widths], widths, strict=False))

        self.mlp1, self.mlp2 = mlp(2 * c if plus else c), mlp(c)
        self.skip = nn.Linear(c + out_channels, out_channels, **options)
        self.norm = None if norm is None else nn.LayerNorm(out_channels, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights anew, uniform after Glorot as in the official code; biases are zero."""
        for weight, bias in (*_weights(self.mlp1), *_weights(self.mlp2), (self.skip.weight, self.skip.bias)):
            nn.init.xavier_uniform_(weight)
            nn.init.zeros_(bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor | PairBatch, mask: Tensor | None = None) -> Any:
        """Apply the block.

        Args:
            x: (…, N, N, C), or a PairBatch of (T, C).
            mask: (…, N) bool, True = a node, of dense pairs; all are by default. What other pairs hold, a NaN even, is
                of no effect, and they are zero in the output.

        Returns:
            (…, N, N, out_channels), or a PairBatch.
        """
        x, layout = (x.x, x.layout) if isinstance(x, PairBatch) else (x, None)
        check_pairs("x", x, layout)
        check_size("x", x, -1, self.in_channels, "in_channels")
        if mask is not None:
            if layout is not None:
                raise ValueError("mask must be None for packed pairs, which have no padding")
            check_mask(mask, x)
            x = _masked(x, mask)
        options: dict[str, Any] = {"layout": layout, "backend": self.backend}
        m1, m2 = pair_mlp(x, _weights(self.mlp1), _weights(self.mlp2), plus=self.plus, **options)
        if mask is None:
            y = segment_matmul(m1, m2, scale=self.scale, **options)
        else:
            # The biases have made something of pairs that are not there: none may be a term of the sum over j.
            y = segment_matmul(m1 * self._factor(mask, m1.dtype), m2, **options)
        out = pair_linear(x, y, self.skip.weight, self.skip.bias, plus=self.plus, **options)
        if self.norm is not None:
            out = self.norm(out)
        if layout is not None:
            return PairBatch(out, layout)
        return out if mask is None else _masked(out, mask)

    def _factor(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """(…, N, N, 1): s where both nodes are there, s by the true size, and 0 elsewhere."""
        pairs = mask[..., :, None] & mask[..., None, :]
        factor = pairs.to(dtype)
        if SCALES[self.scale]:
            n = mask.sum(-1)[..., None, None].clamp(min=1)
            factor = factor * n.to(torch.float64).pow(-SCALES[self.scale]).to(dtype)
        return factor[..., None]

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, mlp_depth={self.mlp_depth}, plus={self.plus}"]
        if self.scale != "none":
            parts.append(f"scale={self.scale!r}")
        return ", ".join(parts)


# By PyG's way of naming layers.
PPGNConv = PPGNBlock


class PPGN(nn.Module):
    r"""The PPGN++ network, or PPGN: blocks on pair features, then an MLP on what is invariant of them::

        x_0 = x,  x_l = PPGNBlock(x_{l-1}),       out = MLP[mean over i of x_L[i, i], mean over i ≠ j of x_L[i, j]]

    On simple graphs and with 0/1 adjacency as input, PPGN++ distinguishes what 3-WL does; with
    :class:`AddPolynomialFeatures` as further channels it goes beyond.

    Args:
        in_channels: of the input pairs.
        hidden_channels: of every block.
        out_channels: numbers per graph.
        num_layers: L, the number of blocks.
        plus: PPGN++ instead of PPGN, see :class:`PPGNBlock`.
        mlp_depth: layers of the MLPs in blocks.
        norm, scale: of the blocks, see :class:`PPGNBlock`. With Adam and more than a few blocks take a scale; the paper
            has none and trains by LAMB.
        pool: "mean", "add" or "max" (PPGN's).
        readout: "last": an MLP on the last block; "jk_sum": the sum of one linear layer a block (PPGN's).
        head_channels: widths of the hidden layers of the MLP of readout="last", an int or several; by default one of
            ``hidden_channels``.
        device, dtype: of the parameters.
        backend: see :func:`torchlayers.backend`.

    Shape: x (…, N, N, in_channels) and mask (…, N) -> (…, out_channels); a :class:`PairBatch` of G graphs, or a PyG
    ``Data`` or ``Batch`` -> (G, out_channels).

    Attributes:
        blocks: :class:`torch.nn.ModuleList` of :class:`PPGNBlock`.
        readout_layers: :class:`torch.nn.ModuleList` of :class:`torch.nn.Linear`.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call.

    Sources: arXiv 2302.11556, section 4 and appendix (PPGN++), and its official code; 1905.11136 (PPGN).

    Example:

        >>> model = PPGN(3, 16, 1, num_layers=2, scale="sqrt_n")
        >>> model(torch.randn(4, 9, 9, 3)).shape
        torch.Size([4, 1])
        >>> from torchlayers.polynomial import PairBatch, PairLayout
        >>> batch = PairBatch(torch.randn(2**2 + 3**2, 3), PairLayout.from_sizes([2, 3]))
        >>> model(batch).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        plus: bool = True,
        *,
        mlp_depth: int = 2,
        norm: str | None = None,
        scale: str = "none",
        pool: str = "mean",
        readout: str = "last",
        head_channels: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self.in_channels = check_int("in_channels", in_channels)
        self.hidden_channels = check_int("hidden_channels", hidden_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.num_layers = check_int("num_layers", num_layers)
        check_choice("pool", pool, POOLS)
        check_choice("readout", readout, READOUTS)
        self.plus, self.pool, self.readout = bool(plus), pool, readout
        if readout == "jk_sum" and head_channels is not None:
            raise ValueError(f"head_channels must be None with readout='jk_sum', got {head_channels!r}")
        hidden = check_ints("head_channels", hidden_channels if head_channels is None else head_channels)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.blocks = nn.ModuleList(
            PPGNBlock(
                hidden_channels if number else in_channels,
                hidden_channels,
                mlp_depth,
                plus,
                norm,
                scale,
                backend=backend,
                **options,
            )
            for number in range(num_layers)
        )
        pooled = 2 * hidden_channels
        if readout == "last":
            shapes = list(zip([pooled, *hidden], [*hidden, out_channels], strict=True))
        else:
            shapes = [(pooled, out_channels)] * num_layers
        self.readout_layers = nn.ModuleList(nn.Linear(i, o, **options) for i, o in shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights anew, uniform after Glorot as in the official code; biases are zero."""
        for block in self.blocks:
            block.reset_parameters()  # type: ignore[operator]
        for weight, bias in _weights(self.readout_layers):
            nn.init.xavier_uniform_(weight)
            nn.init.zeros_(bias)

    def forward(self, x: Any, mask: Tensor | None = None) -> Tensor:
        """The network's numbers per graph.

        Args:
            x: (…, N, N, in_channels); or a PairBatch; or a PyG ``Data`` or ``Batch``, of which
                :meth:`PairBatch.from_data` makes one (on the device of the data, for which the host then waits: make
                PairBatches where batches are made, and name the attributes there).
            mask: (…, N) bool, True = a node, of dense pairs; all are by default. What other pairs hold, a NaN even, is
                of no effect.

        Returns:
            (…, out_channels), or (G, out_channels).
        """
        x = _as_pairs(x)
        total: Tensor | None = None
        for number, block in enumerate(self.blocks):
            x = block(x, mask)
            if self.readout == "jk_sum":
                term = self.readout_layers[number](self._pooled(x, mask))
                total = term if total is None else total + term
        if total is not None:
            return total
        out = self._pooled(x, mask)
        for number, layer in enumerate(self.readout_layers):
            out = layer(out if number == 0 else out.relu())
        return out

    def _pooled(self, x: Tensor | PairBatch, mask: Tensor | None) -> Tensor:
        if isinstance(x, PairBatch):
            return pair_readout(x.x, x.layout, pool=self.pool)
        return pair_readout(x, mask=mask, pool=self.pool)

    def embed(self, x: Any, mask: Tensor | None = None) -> Any:
        """The pair features of the last block, for tasks on nodes and pairs; arguments as at the call.

        Returns:
            (…, N, N, hidden_channels), or a PairBatch.
        """
        x = _as_pairs(x)
        for block in self.blocks:
            x = block(x, mask)
        return x

    @classmethod
    def from_reference_state_dict(cls, state_dict: Mapping[str, Tensor], **options: Any) -> PPGN:
        """The network whose weights the official code of PPGN++, or of PPGN in PyTorch, has saved.

        Sizes, depth, ``plus`` and the readout follow from names and shapes; ``pool`` is "mean" for PPGN++ and "max" for
        PPGN, dtype and device are those of the weights. The polynomial and other input channels keep their order.

        Args:
            state_dict: with keys ``reg_blocks.i.mlp1.convs.j.weight``, ``.mlp2.convs.j``, ``.skip.conv`` and
                ``fc_layers.k.fc``, and "module." before them where it comes from DataParallel.
            options: further arguments of the constructor, before what is found. ``readout`` is one where a sum of
                heads has 2 hidden_channels outputs and so looks like an MLP.

        Raises:
            ValueError: keys that are missing or not known, blocks of different widths, shapes that are no PPGN.

        Example::

            >>> from torchlayers.polynomial import PPGN
            >>> PPGN.from_reference_state_dict({"weight": torch.ones(1)})
            Traceback (most recent call last):
                ...
            ValueError: state_dict must have keys like 'reg_blocks.0.mlp1.convs.0.weight', got 'weight'
        """
        found = {key.removeprefix("module."): value for key, value in state_dict.items()}
        first = "reg_blocks.0.mlp1.convs.0.weight"
        if first not in found:
            raise ValueError(f"state_dict must have keys like {first!r}, got {', '.join(map(repr, list(found)[:3]))}")
        renamed = {_our_name(key): value for key, value in found.items()}
        weight1, weight2 = renamed["blocks.0.mlp1.0.weight"], renamed["blocks.0.mlp2.0.weight"]
        plus = weight1.shape[1] == 2 * weight2.shape[1]
        heads = [renamed[f"readout_layers.{k}.weight"] for k in range(_count(renamed, "readout_layers."))]
        if not heads:
            raise ValueError("state_dict must have keys like 'fc_layers.0.fc.weight', got none")
        hidden, blocks = weight1.shape[0], _count(renamed, "blocks.")
        chained = all(h.shape[0] == k.shape[1] for h, k in itertools.pairwise(heads))
        readout = options.get("readout", "last" if chained else "jk_sum")
        arguments: dict[str, Any] = {
            "plus": plus,
            "mlp_depth": _count(renamed, "blocks.0.mlp1."),
            "pool": "mean" if plus else "max",
            "readout": readout,
            "head_channels": [h.shape[0] for h in heads[:-1]] if readout == "last" else None,
            "device": weight1.device,
            "dtype": weight1.dtype,
            **options,
        }
        model = cls(weight2.shape[1] - plus, hidden, heads[-1].shape[0], blocks, **arguments)
        expected = model.state_dict()
        tensors = {}
        for key, value in renamed.items():
            if key not in expected:
                raise ValueError(f"state_dict must have the keys of a PPGN, got {key!r} beside them")
            tensors[key] = value.flatten(1) if value.ndim == 4 else value  # (out, in, 1, 1) of a 1 × 1 convolution
            if tensors[key].shape != expected[key].shape:
                raise ValueError(
                    f"state_dict must have {key} of shape {tuple(expected[key].shape)}, with all blocks as wide as the "
                    f"first, got {tuple(value.shape)}"
                )
        missing = [key for key in expected if key not in tensors and ".norm." not in key]
        if missing:
            raise ValueError(f"state_dict must have all keys of a PPGN, it lacks those of {missing[:3]}")
        model.load_state_dict(tensors, strict=False)
        return model

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.hidden_channels}, {self.out_channels}, num_layers={self.num_layers}, "
            f"plus={self.plus}, pool={self.pool!r}, readout={self.readout!r}"
        )


def _as_pairs(x: Any) -> Tensor | PairBatch:
    if isinstance(x, (Tensor, PairBatch)):
        return x
    if not hasattr(x, "edge_index"):
        raise TypeError(f"x must be a tensor (..., N, N, channels), a PairBatch or PyG's Data, got {type(x).__name__}")
    return PairBatch.from_data(x)


def _weights(mlp: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight, layer.bias) for layer in mlp]  # type: ignore[misc]


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """Zero where a node is none. Selected, not multiplied: a NaN may be there."""
    return x.masked_fill(~(mask[..., :, None] & mask[..., None, :])[..., None], 0)


def _our_name(key: str) -> str:
    for theirs, ours in ((".convs.", "."), (".skip.conv.", ".skip."), (".fc.", ".")):
        key = key.replace(theirs, ours)
    return key.replace("reg_blocks.", "blocks.").replace("fc_layers.", "readout_layers.")


def _count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers 0, 1, … follow the prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)})
