"""The paper's memory tables and the communication model, against the paper's figures and against counted bytes."""

import math

import pytest
import torch

from torchlayers._ring import LoopbackWorld
from torchlayers._sequence import SequenceLayout
from torchlayers.ring_attention import ring_attention
from torchlayers.ring_attention.memory import sp_comm_model, sp_largest, sp_memory_model

BERT_BASE = {"hidden": 768, "heads": 12, "head_dim": 64}
P100 = 16 * 2**30 / 4  # elements of float32


@pytest.mark.parametrize("world", [2, 3, 8, 64])
def test_the_mlp_crosses_over_at_32_hidden(world):
    hidden, heads, head_dim = 48, 3, 5
    sizes = {"hidden": hidden, "heads": heads, "head_dim": head_dim, "world": world}
    at = sp_memory_model(batch=8, seq_len=4 * hidden, **sizes)
    assert at.mlp_tensor_parallel == at.mlp_sequence_parallel
    above = sp_memory_model(batch=1, seq_len=32 * hidden + 1, **sizes)
    below = sp_memory_model(batch=1, seq_len=32 * hidden - 1, **sizes)
    assert above.mlp_sequence_parallel < above.mlp_tensor_parallel
    assert below.mlp_sequence_parallel > below.mlp_tensor_parallel


@pytest.mark.parametrize("world", [2, 3, 8, 64])
def test_attention_crosses_over_at_16_heads_times_their_size(world):
    heads, head_dim = 3, 5
    sizes = {"hidden": 48, "heads": heads, "head_dim": head_dim, "world": world}
    at = sp_memory_model(batch=4, seq_len=4 * heads * head_dim, **sizes)
    assert at.attention_tensor_parallel == at.attention_sequence_parallel
    above = sp_memory_model(batch=1, seq_len=16 * heads * head_dim + 1, **sizes)
    below = sp_memory_model(batch=1, seq_len=16 * heads * head_dim - 1, **sizes)
    assert above.attention_sequence_parallel < above.attention_tensor_parallel
    assert below.attention_sequence_parallel > below.attention_tensor_parallel


def test_one_rank_holds_the_same_either_way():
    one = sp_memory_model(batch=2, seq_len=10, hidden=12, heads=2, head_dim=6, world=1)
    # 4 x (weights of H -> 4 H -> H) and the activations of 5 vectors a token; 4 projections, scores, 5 vectors.
    weights = sum(p.numel() for p in (torch.nn.Linear(12, 48).weight, torch.nn.Linear(48, 12).weight))
    assert one.mlp_tensor_parallel == one.mlp_sequence_parallel == 4 * weights + 5 * 20 * 12
    assert one.attention_tensor_parallel == one.attention_sequence_parallel == 4 * 4 * 144 + 5 * 20 * 12 + 2 * 2 * 100


def growth(parallelism, **sizes):
    """The exponent of the largest length against the number of ranks, weights left out of account."""
    weights = 48 * BERT_BASE["hidden"] ** 2
    lengths = [
        sp_largest("seq_len", weights + 2e7, parallelism, layers=1, world=n, **BERT_BASE, **sizes) for n in (256, 4096)
    ]
    return math.log(lengths[1] / lengths[0]) / math.log(16)


def test_how_the_length_grows_with_the_number_of_ranks():
    assert growth("sequence_parallel") == pytest.approx(0.5, abs=0.05)  # the scores' L² / N
    assert growth("linformer") == pytest.approx(1.0, abs=0.01)  # all terms with L are L / N
    assert growth("ring") == pytest.approx(1.0, abs=0.01)
    assert growth("tensor_parallel") < 0.2  # B L H on every rank, whatever N


def test_the_papers_largest_batch_and_length():
    """13.7 times the batch and 3.0 times the length of tensor parallelism, on 64 P100 with 16 GB, BERT Base.

    Assumed: tensor parallelism on 12 ranks, since there are 12 heads; sequence parallelism on 64; float32; length 512
    for the batch, batch 64 for the length; the 12 layers alone, without embeddings, the loss or temporary memory. The
    model then says 11.0 and 3.2: it supports the length's factor, and the batch's in size.
    """
    common = {"elements": P100, "layers": 12, **BERT_BASE}

    def ratio(quantity, **sizes):
        ours = sp_largest(quantity, parallelism="sequence_parallel", world=64, **common, **sizes)
        return ours / sp_largest(quantity, parallelism="tensor_parallel", world=12, **common, **sizes)

    assert ratio("batch", seq_len=512) == pytest.approx(13.7, rel=0.2)
    assert ratio("seq_len", batch=64) == pytest.approx(3.0, rel=0.1)
    # Without the cap at 12, tensor parallelism gains little: what each rank holds whole stays.
    more = sp_largest("batch", parallelism="tensor_parallel", world=64, seq_len=512, **common)
    assert more < 2 * sp_largest("batch", parallelism="tensor_parallel", world=12, seq_len=512, **common)


def test_linformer_reaches_the_papers_114_thousand_tokens():
    """Over 114K tokens, assumed: on 32 ranks, batch 4, K = 256. Dense attention's scores do not fit there."""
    found = sp_largest("seq_len", P100, "linformer", layers=12, world=32, batch=4, projected=256, **BERT_BASE)
    assert found > 114_000
    assert sp_largest("seq_len", P100, "sequence_parallel", layers=12, world=32, batch=4, **BERT_BASE) < 114_000


def test_nothing_fits():
    assert sp_largest("batch", 10.0, "ring", layers=1, world=2, seq_len=8, **BERT_BASE) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("kv_heads", "world"), [(4, 2), (2, 3), (1, 5)])
def test_the_models_bytes_are_those_that_a_ring_sends(dtype, kv_heads, world):
    c, d = 6, 8
    loopback = LoopbackWorld(world)
    layout = SequenceLayout(world * c, world, "striped")

    def attend(rank, group):
        q, k, v = (torch.randn(2, h, c, d, dtype=dtype, requires_grad=True) for h in (4, kv_heads, kv_heads))
        options = {"layout": layout, "group": group, "is_causal": True, "enable_gqa": True}
        out = ring_attention(q, k, v, **options)
        sent = group.bytes_sent
        out.sum().backward()
        return sent, group.bytes_sent - sent

    model = sp_comm_model(
        1e-6,
        1e9,
        length=c,
        world=world,
        heads=4,
        num_kv_heads=kv_heads,
        head_dim=d,
        batch=2,
        element_size=dtype.itemsize,
    )
    assert loopback.run(attend) == [(model.bytes_forward, model.bytes_backward)] * world


# Tables for 32 query heads, d = 128, bfloat16, causal, from 2 B Hkv c d b bytes against 2 B Hq c² d FLOP a hop.
@pytest.mark.parametrize(
    ("alpha", "beta", "kv_heads", "shortest"),
    [(0.0, 360e9, 8, 834), (0.0, 360e9, 32, 3334), (0.0, 45e9, 8, 6667), (0.0, 2.8e9, 8, 107_143)],
)
def test_the_length_from_which_on_messages_are_hidden(alpha, beta, kv_heads, shortest):
    def model(length):
        return sp_comm_model(
            alpha, beta, length=length, world=64, heads=32, num_kv_heads=kv_heads, head_dim=128, flops_backward=1e15
        )

    found = model(8192).shortest
    assert found == pytest.approx(shortest, abs=2)
    assert model(found).efficiency_forward == 1.0
    assert model(found - 1).efficiency_forward < 1.0


def test_efficiency_falls_to_the_share_of_compute_on_a_slow_network():
    slow = sp_comm_model(0.03, 125e6, length=8192, world=64, heads=32, num_kv_heads=8, head_dim=128)
    assert slow.efficiency_forward == pytest.approx(64 * slow.compute_forward / slow.time_forward)
    assert slow.time_forward == pytest.approx(63 * slow.hop_forward, rel=1e-2)
    assert slow.efficiency_forward < 0.01


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("batch", lambda: sp_memory_model(0, 8, 8, 2, 4, 2)),
        ("world", lambda: sp_memory_model(1, 8, 8, 2, 4, 2.0)),
        ("quantity", lambda: sp_largest("hidden", 1e9, "ring", layers=1, world=2, **BERT_BASE)),
        ("parallelism", lambda: sp_largest("batch", 1e9, "rings", layers=1, world=2, **BERT_BASE)),
        ("beta", lambda: sp_comm_model(0.0, 0.0, length=8, world=2, heads=2, head_dim=4)),
        ("alpha", lambda: sp_comm_model(-1.0, 1.0, length=8, world=2, heads=2, head_dim=4)),
    ],
)
def test_bad_arguments(name, call):
    with pytest.raises((TypeError, ValueError), match=name):
        call()
