"""Tensor attention over a sequence that lies on several ranks: two streams of keys and values go round one ring.

A rank keeps its queries and must see all pairs of shards (a, b): keys of set 1 on a, keys of set 2 on b. All ranks make
the same tour: a visit (o1, o2) is the pair of shards of the ranks o1 and o2 before this one, and between two visits one
stream hops. What each visit gives is merged by its log-sum-exp, in float32 or float64. Backward, the same tour is made
with the log-sum-exp of the whole, and sums of gradients follow the shards that they belong to.

A shard is a few runs of equally spaced positions, and so a visit is cut into calls on one run each of queries, keys 1
and keys 2: there masks by position are masks by index, whatever the layout.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._attention import (
    Window,
    autocast,
    check_qkv,
    check_scale,
    merge_attention,
    mha_inputs,
    mha_output,
    normalize_window,
)
from .._backend import BACKENDS, use_triton
from .._checks import check_choice, check_size
from .._placement import check_layout, placement, sequence_group
from .._ring import CHECKS, group_name, place, refuse
from .._sequence import SequenceLayout
from .functional import FORMS, _unsupported, tensor_attention
from .modules import TensorAttention, TensorAttentionCache
from .streams import Gradients, Ring

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .._ring import Group, LoopbackMesh

__all__ = ["RingTensorAttention", "ring_tensor_attention"]


def ring_tensor_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    layout: SequenceLayout,
    group: Group | None = None,
    mesh: DeviceMesh | LoopbackMesh | None = None,
    is_causal: bool = False,
    window1: int | tuple[int, int] | None = None,
    window2: int | tuple[int, int] | None = None,
    symmetric: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    form: str = "trilinear",
    return_lse: bool = False,
    backend: str | None = None,
    check: str = "first",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`tensor_attention` over a sequence that lies on the ranks of a group, each with its shard of all tensors.

    Queries stay, keys and values travel: beside its own shard of a set a rank holds the one at hand and the one on its
    way, or what its windows reach of its neighbours'. With P ranks, c tokens on each and M = B Hkv c (d + dv) elements:

    - without windows P² visits, and P² - 1 hops of M elements a rank, posted before and awaited after compute;
    - with ``symmetric`` P (P + 1) / 2 visits, and P (P + 1) / 2 - 1 + ⌊(P - 1) / 2⌋ hops;
    - a set with windows of at most c tokens to either side, on the contiguous layout, makes no hops: each rank gets
      the tokens that it needs of its neighbours at once. Longer windows hop as far as any rank needs.

    Backward the shards travel once more, and their gradients with them in float32 (float64 for float64): the own
    shard's stay at home, the others' visit all ranks and end there.

    Causal attention over pairs has work as the square of the position. The striped layout balances that; of four
    ranks the busiest does 2.3 times the mean on the contiguous layout, and 1.3 times on zigzag.

    Args:
        q: this rank's shard, (B, Hq, layout.length(rank), d).
        k1, k2: (B, Hkv, layout.length(rank), d).
        v1, v2: (B, Hkv, layout.length(rank), dv).
        layout: which rank holds which tokens; a layout with documents keeps attention within them.
        group, mesh: the ranks, in the layout's order: a process group, or a mesh of one dimension or with one called
            "sp". May be left out for one rank.
        is_causal: a query sees pairs of tokens up to its own.
        window1, window2: what of each set a query sees, in tokens of the whole sequence: an int w for i - w < j <= i
            where causal and ``|i - j| < w`` otherwise, or a pair (left, right), -1 for unlimited.
        symmetric: k2 is k1 and v2 is v1, as tensors or entry by entry, with equal windows: a pair and the same pair
            exchanged are computed once. Pass the same tensor twice; others are compared, which waits for a GPU and
            cannot be traced. Not for the determinant form, whose logits change sign.
        scale, enable_gqa, form: as for :func:`tensor_attention`.
        return_lse: also return the log-sum-exp, a natural logarithm. It is differentiable.
        backend: see :func:`torchlayers.backend`.
        check: whether ranks compare their arguments before the "first" call of the group, "always" or "never". If
            these differ, or one rank refuses its own, all ranks raise and nothing was sent.

    Returns:
        this rank's shard of the output (B, Hq, layout.length(rank), dv) in the dtype of ``q`` (under autocast, in
        autocast's), and with ``return_lse`` a pair with lse (B, Hq, layout.length(rank)), float32 or float64.

    Raises:
        TypeError, ValueError: bad arguments of this rank, or of another, or calls that differ between ranks, see
            ``check``; the group stays usable.
        BackendError: ``backend="triton"`` with what the kernels do not support.
        RuntimeError: a second derivative.
        NotImplementedError: under vmap.

    Source: the ring of arXiv 2310.01889, for the operation of 2310.04064.

    Example:

        >>> import torch
        >>> from torchlayers import LoopbackWorld, SequenceLayout
        >>> from torchlayers.functional import ring_tensor_attention, tensor_attention
        >>> tensors = torch.randn(5, 1, 2, 12, 4)  # q, k1, k2, v1, v2
        >>> layout = SequenceLayout(12, world=3, kind="striped")
        >>> def attend(rank, group):
        ...     shards = (layout.shard(x, 2, rank) for x in tensors)
        ...     return ring_tensor_attention(*shards, layout=layout, group=group, is_causal=True)
        >>> out = layout.unshard(LoopbackWorld(3).run(attend), 2)
        >>> torch.testing.assert_close(out, tensor_attention(*tensors, is_causal=True))
    """
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    try:
        check_choice("check", check, CHECKS)
        check_layout("layout", layout)
        if layout is None:
            raise TypeError("layout must be a SequenceLayout, got None")
        name = group_name(group, mesh, layout.world, "sp")
        _check_tensors(tensors, layout, name, enable_gqa)
        check_choice("form", form, FORMS)
        if form == "determinant" and q.shape[3] % 3:
            raise ValueError(f"q must have a multiple of 3 channels for form='determinant', got {q.shape[3]}")
        windows = [normalize_window(f"window{t + 1}", w, is_causal) for t, w in enumerate((window1, window2))]
        scale = check_scale(scale, q.shape[3])
        if symmetric:
            _check_symmetric(tensors, windows, form)
        check_choice("backend", backend, (None, *BACKENDS))
        unsupported = _unsupported(q, v1, 1, 1) if q.numel() else None  # an empty shard is no matter for its rank
        triton = use_triton("tensor_attention_forward", q, backend, unsupported)
    except (TypeError, ValueError) as error:
        refuse(error, group, mesh, "sp", check)
    if name is None and layout.cu_seqlens is None:
        return tensor_attention(
            q, k1, k2, v1, v2, is_causal=is_causal, window1=window1, window2=window2, scale=scale,
            enable_gqa=enable_gqa, form=form, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    out, lse = _forward_op(
        *autocast(q, k1, k2, v1, v2), layout.key, name or "", scale, list(windows[0]), list(windows[1]), form,
        symmetric, triton, check,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_tensors(tensors: dict[str, Tensor], layout: SequenceLayout, group: str | None, enable_gqa: bool) -> None:
    q, k1, k2, v1, v2 = tensors.values()
    check_qkv({"q": q}, {"k1": k1, "k2": k2}, {"v1": v1, "v2": v2}, enable_gqa)
    rank, _ = place(group)
    for name, x in tensors.items():
        check_size(name, x, 2, layout.length(rank), f"length of rank {rank} in the layout")
    check_size("v2", v2, 3, v1.shape[3], "the channels of v1")


def _check_symmetric(tensors: dict[str, Tensor], windows: list[Window], form: str) -> None:
    if form == "determinant":
        raise ValueError("symmetric must be False with form='determinant', whose logits change sign, got True")
    if windows[0] != windows[1]:
        raise ValueError(f"symmetric must be False where the windows differ, got True with {windows[0]}, {windows[1]}")
    for first, second in (("k1", "k2"), ("v1", "v2")):
        x, y = tensors[first], tensors[second]
        if x is y:
            continue
        if torch.compiler.is_compiling():
            raise ValueError(f"symmetric must come with {second} the same tensor as {first} under torch.compile")
        if x.shape != y.shape or not torch.equal(x, y):
            raise ValueError(f"symmetric must be False unless {second} equals {first}, got True and another {second}")


# The operation


@torch.library.custom_op("torchlayers::ring_tensor_attention_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    layout: str,
    group: str,
    scale: float,
    window1: list[int],
    window2: list[int],
    form: str,
    symmetric: bool,
    triton: bool,
    check: str = "first",
) -> tuple[Tensor, Tensor]:
    ring = Ring(q, layout, group, scale, window1, window2, form, symmetric, triton)
    ring.agree(q, k1, v1, check)
    out = torch.zeros((*q.shape[:3], v1.shape[3]), dtype=ring.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=ring.dtype, device=q.device)
    streams = ring.streams(k1, k2, v1, v2)
    for _ in ring.tour(streams):
        operands = ring.operands(q, streams)
        for call in ring.calls(streams):
            more, more_lse = ring.forward(operands, call)
            mine, mine_lse = (x.narrow(2, *call.queries) for x in (out, lse))
            merged = merge_attention(mine, mine_lse, more, more_lse + math.log(ring.weight(streams)))
            mine.copy_(merged[0])
            mine_lse.copy_(merged[1])
    return out.to(q.dtype), lse


@torch.library.custom_op("torchlayers::ring_tensor_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: str,
    group: str,
    scale: float,
    window1: list[int],
    window2: list[int],
    form: str,
    symmetric: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ring = Ring(q, layout, group, scale, window1, window2, form, symmetric, triton)
    dq = torch.zeros(q.shape, dtype=ring.dtype, device=q.device)
    streams = ring.streams(k1, k2, v1, v2)
    sums = [Gradients(stream) for stream in streams]
    for following in ring.tour(streams):
        operands, weight = ring.operands(q, streams), ring.weight(streams)
        for call in ring.calls(streams):
            dq_, dk1, dk2, dv1, dv2 = ring.backward((grad_out, grad_lse), operands, (out, lse), call)
            dq.narrow(2, *call.queries).add_(dq_, alpha=weight)
            sums[0].add((dk1, dv1), call.keys1, weight)
            sums[1].add((dk2, dv2), call.keys2, weight)
        for sum_, to in zip(sums, following, strict=True):
            sum_.settle()
            sum_.move(to)
    for sum_ in sums:
        sum_.settle()
    (dk1, dv1), (dk2, dv2) = (sum_.own() for sum_ in sums)
    if symmetric:  # the pairs that were left out have the two roles exchanged
        dk1, dv1 = (dk1 + dk2) / 2, (dv1 + dv2) / 2
        dk2, dv2 = dk1.clone(), dv1.clone()
    dq, dk1, dk2, dv1, dv2 = (x.to(q.dtype).contiguous() for x in (dq, dk1, dk2, dv1, dv2))
    return dq, dk1, dk2, dv1, dv2


@_forward_op.register_fake
def _(q, k1, k2, v1, v2, *options):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v1.shape[3])), q.new_empty(q.shape[:3], dtype=dtype)


@_backward_op.register_fake
def _(grad_out, grad_lse, q, k1, k2, v1, v2, *options):
    return tuple(x.new_empty(x.shape) for x in (q, k1, k2, v1, v2))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:-1]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    # A rank whose output nobody uses takes part all the same: the others wait for its hops.
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return *_backward_op(grad_out, grad_lse, *tensors, out, lse, *ctx.options), *(None,) * (len(ctx.options) + 1)


def _refuse(ctx, *grads):
    raise RuntimeError("ring_tensor_attention is differentiable once; tensor_attention has backend='dense' for twice")


_forward_op.register_autograd(_backward, setup_context=_setup)
_backward_op.register_autograd(_refuse)


@_forward_op.register_vmap
def _(*_):
    raise NotImplementedError("ring_tensor_attention does not run under vmap: ranks exchange tensors; use its batch")


# The module


class RingTensorAttention(TensorAttention):
    """:class:`TensorAttention` whose sequences are shared out over ranks, by :func:`ring_tensor_attention`.

    Parameters, their names and what is computed are those of :class:`TensorAttention`, so that either loads the other's
    checkpoint, whatever the number of ranks. The projections are local, keys and values travel, and ``rotary`` turns
    by positions in the whole sequence.

    How sequences are cut is, in this order, what the call says, what the constructor says, or what is in force
    (:class:`torchlayers.ring_attention.use_layout`). Where nothing was said, and on one rank, sequences are whole and
    this is :class:`TensorAttention`.

    Args:
        args, options: those of :class:`TensorAttention`, but for what would not be the same on any number of ranks:
            ``dropout`` must be 0, ``approx`` None, and ``backend`` another than "dense".
        layout: how sequences are cut.
        group, mesh: the ranks that share a sequence; of a mesh its dimension "sp", or its only one.

    Shape: query (N, c, E), key (N, c, kdim), value (N, c, vdim) with ``batch_first``, else (c, N, E) and so on, or
    without a batch (c, E); c the length of this rank's shards -> (output, None), output in the shape of query.

    Raises:
        TypeError, ValueError: bad arguments, at construction and at the call; see :class:`TensorAttention`. Where
            sequences are cut, a ``key_padding_mask`` (pack them: ``cu_seqlens`` of the layout) and a ``cache`` too.

    Source: arXiv 2310.04064, over the ring of 2310.01889.

    Example:

        >>> layer = RingTensorAttention(64, 4, batch_first=True, is_causal=True)  # one rank: plain tensor attention
        >>> output, _ = layer(torch.randn(2, 20, 64))
        >>> output.shape
        torch.Size([2, 20, 64])
        >>> layer.load_state_dict(TensorAttention(64, 4).state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        *args: Any,
        layout: SequenceLayout | None = None,
        group: Group | None = None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(*args, device=device, dtype=dtype, **options)  # type: ignore[misc]
        self._set_place(layout, group, mesh)

    def _set_place(
        self, layout: SequenceLayout | None, group: Group | None, mesh: DeviceMesh | LoopbackMesh | None
    ) -> None:
        if self.dropout > 0:
            raise ValueError(f"dropout must be 0: what is dropped would depend on the ranks, got {self.dropout}")
        if self.approx is not None:
            raise ValueError(f"approx must be None: over ranks attention is exact, got {self.approx!r}")
        if self.backend == "dense":
            raise ValueError("backend must be 'auto', 'triton' or 'torch' over ranks, got 'dense'")
        check_layout("layout", layout)
        self.layout, self.group = layout, sequence_group(group, mesh, layout)

    @classmethod
    def from_tensor_attention(
        cls,
        layer: TensorAttention,
        *,
        layout: SequenceLayout | None = None,
        group: Group | None = None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
    ) -> RingTensorAttention:
        """``layer`` over ranks: with its parameters themselves, not copies.

        Raises:
            TypeError: ``layer`` is no :class:`TensorAttention`.
            ValueError: it has what the constructor refuses.
        """
        if not isinstance(layer, TensorAttention):
            raise TypeError(f"layer must be a TensorAttention, got {type(layer).__name__}")
        ring = cls.__new__(cls)
        nn.Module.__init__(ring)
        ring.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        ring._set_place(layout, group, mesh)
        return ring

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: TensorAttentionCache | None = None,
        layout: SequenceLayout | None = None,
        group: Group | None = None,
        mesh: DeviceMesh | LoopbackMesh | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query, key, value: this rank's shards, see the class; key is query by default, and value is key.
            key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, cache: as for
                :class:`TensorAttention`; mask and cache only where sequences are whole.
            layout, group, mesh: instead of the constructor's.

        Returns:
            (output, None).
        """
        check_layout("layout", layout)
        name = self.group if group is None and mesh is None else sequence_group(group, mesh)
        own, name = placement(self.layout if layout is None else layout, name)
        if own is None or (own.world == 1 and own.cu_seqlens is None):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
                cache=cache,
            )  # fmt: skip
        ndim = query.ndim if isinstance(query, Tensor) else 0
        try:
            for what, given in (("key_padding_mask", key_padding_mask), ("cache", cache)):
                if given is not None:
                    raise ValueError(f"{what} must be None where sequences are cut over ranks or packed, got one")
            query, key, value, _ = mha_inputs(
                query,
                key,
                value,
                embed_dim=self.embed_dim,
                kdim=self.kdim,
                vdim=self.vdim,
                batch_first=self.batch_first,
                need_weights=need_weights,
                attn_mask=None if is_causal else attn_mask,
            )
        except (TypeError, ValueError) as error:
            refuse(error, name, None)
        start: int | Tensor = 0
        if self.rotary:  # what is added to a token's index to give its position
            positions = own.positions(place(name)[0], query.device)
            start = positions - torch.arange(positions.shape[0], device=query.device)
        out = ring_tensor_attention(
            *self._project(query, key, value, start),
            layout=own,
            group=name,
            is_causal=self.is_causal or bool(is_causal),
            window1=self.window1,
            window2=self.window2,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
            form=self.form,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return mha_output(self.out_proj(out.transpose(1, 2).flatten(-2)), ndim=ndim, batch_first=self.batch_first), None

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("layout", "group"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text
