"""What a rank holds and sends, by formula: the paper's memory tables, and an α–β model of time.

Models, not measurements: they count elements and bytes of the formulas' terms and nothing else. The bytes are those
that :class:`torchlayers._ring.Channel` counts, exactly; seconds are what the model makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .._checks import check_choice, check_int

__all__ = ["CommModel", "MemoryModel", "sp_comm_model", "sp_largest", "sp_memory_model"]

PARALLELISMS = ("tensor_parallel", "sequence_parallel", "linformer", "ring")


@dataclass(frozen=True)
class MemoryModel:
    """Elements per rank of one Transformer layer in training, see :func:`sp_memory_model`.

    Attributes:
        mlp_tensor_parallel, mlp_sequence_parallel: the MLP H -> 4 H -> H.
        attention_tensor_parallel, attention_sequence_parallel: dense attention, whose scores are kept.
        attention_linformer: Linformer attention under sequence parallelism.
        attention_ring: the online-softmax ring, which keeps no scores.
    """

    mlp_tensor_parallel: float
    mlp_sequence_parallel: float
    attention_tensor_parallel: float
    attention_sequence_parallel: float
    attention_linformer: float
    attention_ring: float

    def layer(self, parallelism: str) -> float:
        """MLP and attention: "tensor_parallel", "sequence_parallel", or the latter with "linformer" or "ring"."""
        check_choice("parallelism", parallelism, PARALLELISMS)
        mlp = self.mlp_tensor_parallel if parallelism == "tensor_parallel" else self.mlp_sequence_parallel
        return mlp + getattr(self, f"attention_{parallelism}")


def sp_memory_model(
    batch: int, seq_len: int, hidden: int, heads: int, head_dim: int, world: int, projected: int = 256
) -> MemoryModel:
    """Elements that each of N ranks holds for a layer: weights with gradient and Adam's two moments, and activations::

                   tensor parallel                          sequence parallel
        MLP        32 H² / N + 4 B L H / N + B L H          32 H² + 5 B L H / N
        attention  (16 A Z H + 4 B L Z A + B Z L²) / N      16 A Z H + (4 B L Z A + B Z L² + B L H) / N
                     + B L H
        Linformer                                           16 A Z H + (8 K L + 4 B L Z A + B Z L K + B L H) / N
                                                              + 2 B Z K A
        ring                                                16 A Z H + (4 B L Z A + B Z L + B L H) / N

    The MLP takes less under sequence parallelism exactly where B L > 32 H, attention where B L > 16 A Z, whatever N > 1
    is. Without scores each term with L is divided by N, so that the length grows with the number of ranks.

    Args:
        batch, seq_len: B and L of the whole group.
        hidden: H.
        heads, head_dim: Z and A.
        world: N.
        projected: K of Linformer, whose projections E and F (K, L) are sharded by columns.

    Raises:
        TypeError, ValueError: an argument that is no int, or below 1.

    Source: arXiv 2105.13120, section 3.2 and its tables of memory; the rows of Linformer and of the ring are derived
    in the same way.

    Example:

        >>> model = sp_memory_model(batch=32, seq_len=512, hidden=512, heads=8, head_dim=64, world=4)
        >>> model.mlp_tensor_parallel == model.mlp_sequence_parallel  # B L = 32 H
        True
    """
    named = {"batch": batch, "seq_len": seq_len, "hidden": hidden, "heads": heads, "head_dim": head_dim}
    for name, value in {**named, "world": world, "projected": projected}.items():
        check_int(name, value)
    n, tokens = world, batch * seq_len
    mlp, attention = 32 * hidden**2, 16 * heads * head_dim * hidden
    qkvo, scores = 4 * tokens * heads * head_dim, tokens * heads * seq_len
    x = tokens * hidden  # the layer's input, whole under tensor parallelism
    # One division of exact ints, so that what is equal by the formulas is equal here.
    return MemoryModel(
        mlp_tensor_parallel=(mlp + 4 * x + n * x) / n,
        mlp_sequence_parallel=(n * mlp + 5 * x) / n,
        attention_tensor_parallel=(attention + qkvo + scores + n * x) / n,
        attention_sequence_parallel=(n * attention + qkvo + scores + x) / n,
        attention_linformer=(
            n * attention
            + 8 * projected * seq_len
            + qkvo
            + tokens * heads * projected
            + x
            + 2 * n * batch * heads * projected * head_dim
        )
        / n,
        attention_ring=(n * attention + qkvo + tokens * heads + x) / n,
    )


def sp_largest(
    quantity: str,
    elements: float,
    parallelism: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    head_dim: int,
    world: int,
    batch: int = 1,
    seq_len: int = 1,
    projected: int = 256,
) -> int:
    """The largest batch or length at which ``layers`` layers of :func:`sp_memory_model` take at most ``elements``.

    Args:
        quantity: "batch" or "seq_len": what to find; the other is as given.
        elements: a rank's memory.
        parallelism: see :meth:`MemoryModel.layer`.
        layers: number of layers.
        hidden, heads, head_dim, world, batch, seq_len, projected: see :func:`sp_memory_model`.

    Returns:
        0 if not even 1 fits.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    check_choice("quantity", quantity, ("batch", "seq_len"))
    check_choice("parallelism", parallelism, PARALLELISMS)
    check_int("layers", layers)

    def fits(value: int) -> bool:
        sizes = {"batch": batch, "seq_len": seq_len, quantity: value}
        model = sp_memory_model(
            hidden=hidden, heads=heads, head_dim=head_dim, world=world, projected=projected, **sizes
        )
        return layers * model.layer(parallelism) <= elements

    return _last_true(fits)


def _last_true(fits: Callable[[int], bool]) -> int:
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class CommModel:
    """What :func:`sp_comm_model` makes of a ring: a model.

    Attributes:
        bytes_forward, bytes_backward: that a rank sends, the backward's gradients of K and V included: exact.
        compute_forward, compute_backward: seconds that a hop computes.
        hop_forward, hop_backward: seconds that a hop's messages are under way, α + bytes / β.
        time_forward, time_backward: seconds, with each hop's messages under the compute of the one before.
        efficiency_forward, efficiency_backward: compute's share of these.
        shortest: tokens of a shard from which on the forward's messages hide under its compute.
    """

    bytes_forward: int
    bytes_backward: int
    compute_forward: float
    compute_backward: float
    hop_forward: float
    hop_backward: float
    time_forward: float
    time_backward: float
    efficiency_forward: float
    efficiency_backward: float
    shortest: int


def sp_comm_model(
    alpha: float,
    beta: float,
    *,
    length: int,
    world: int,
    heads: int,
    head_dim: int,
    num_kv_heads: int | None = None,
    batch: int = 1,
    element_size: int = 2,
    is_causal: bool = True,
    flops_forward: float = 600e12,
    flops_backward: float = 500e12,
) -> CommModel:
    """Time of a balanced ring (zigzag or striped where causal) on a network of latency α and bandwidth β, a model::

        hop          M = 2 B Hkv c d b forward, M + 2 B Hkv c d · 4 backward (dK and dV travel in float32)
        compute      4 B Hq c² d / F a hop forward, 10 B Hq c² d / F backward, half of it where causal
        time         compute + (P - 1) max(compute, α + M / β)

    Args:
        alpha: seconds that a message is under way, whatever its size.
        beta: bytes a second in one direction.
        length: c, tokens a rank.
        world: P.
        heads, num_kv_heads, head_dim: Hq, Hkv (Hq by default) and d.
        batch: B.
        element_size: b, bytes of an element of K and V; gradients travel in 8 bytes where it is 8.
        is_causal: each rank computes half of each hop's pairs.
        flops_forward, flops_backward: F that the block reaches, of an H100 in bfloat16 by default.

    Raises:
        TypeError, ValueError: an int below 1, or a number that is not positive.

    Example:

        >>> model = sp_comm_model(3e-6, 360e9, length=8192, world=8, heads=32, num_kv_heads=8, head_dim=128)
        >>> model.efficiency_forward  # all communication hidden
        1.0
    """
    kv_heads = heads if num_kv_heads is None else num_kv_heads
    named = {"length": length, "world": world, "heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    for name, value in {**named, "batch": batch, "element_size": element_size}.items():
        check_int(name, value)
    for name, number in (
        ("alpha", alpha),
        ("beta", beta),
        ("flops_forward", flops_forward),
        ("flops_backward", flops_backward),
    ):
        if not number >= 0 or (name != "alpha" and number == 0):
            raise ValueError(f"{name} must be positive, got {number}")
    elements = 2 * batch * kv_heads * length * head_dim
    forward, backward = elements * element_size, elements * (element_size + max(4, element_size))
    share = 0.5 if is_causal else 1.0

    def compute(factor: int, flops: float, c: int = length) -> float:
        return share * factor * batch * heads * c * c * head_dim / flops

    def time(factor: int, flops: float, sent: int) -> tuple[float, float, float, float]:
        busy, hop = compute(factor, flops), alpha + sent / beta
        total = busy + (world - 1) * max(busy, hop)
        return busy, hop, total, world * busy / total

    busy_f, hop_f, time_f, efficiency_f = time(4, flops_forward, forward)
    busy_b, hop_b, time_b, efficiency_b = time(10, flops_backward, backward)
    per_token = forward / length
    hidden = _last_true(lambda c: compute(4, flops_forward, c) < alpha + c * per_token / beta) + 1
    return CommModel(
        bytes_forward=(world - 1) * forward,
        bytes_backward=(world - 1) * backward,
        compute_forward=busy_f,
        compute_backward=busy_b,
        hop_forward=hop_f,
        hop_backward=hop_b,
        time_forward=time_f,
        time_backward=time_b,
        efficiency_forward=efficiency_f,
        efficiency_backward=efficiency_b,
        shortest=hidden,
    )
