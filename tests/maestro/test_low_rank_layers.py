"""The low-rank layers: equal to torch.nn's, best at every rank, truncated, saved, sampled, sharded."""

import copy
import datetime

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchlayers._ring import leave_group
from torchlayers.maestro import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankEmbedding, LowRankLinear
from torchlayers.testing import assert_close_rel

CONVS = {1: (nn.Conv1d, LowRankConv1d), 2: (nn.Conv2d, LowRankConv2d), 3: (nn.Conv3d, LowRankConv3d)}

# name -> (the torch.nn layer, ours, arguments, keywords, input)
KINDS = {
    "linear": (nn.Linear, LowRankLinear, (9, 5), {}, lambda: torch.randn(4, 9).double()),
    "wide": (nn.Linear, LowRankLinear, (5, 9), {"bias": False}, lambda: torch.randn(4, 5).double()),
    "conv1d": (nn.Conv1d, LowRankConv1d, (3, 8, 3), {"stride": 2}, lambda: torch.randn(2, 3, 9).double()),
    "conv2d": (nn.Conv2d, LowRankConv2d, (4, 6, 3), {"padding": 1}, lambda: torch.randn(2, 4, 5, 6).double()),
    "groups": (nn.Conv2d, LowRankConv2d, (4, 6, 3), {"groups": 2}, lambda: torch.randn(2, 4, 5, 6).double()),
    "conv3d": (nn.Conv3d, LowRankConv3d, (2, 5, 2), {"bias": False}, lambda: torch.randn(2, 2, 4, 3, 3).double()),
    "embedding": (nn.Embedding, LowRankEmbedding, (11, 6), {"padding_idx": 3}, lambda: torch.randint(11, (4, 3))),
}


def build(kind, **more):
    plain, ours, arguments, options, make_input = KINDS[kind]
    dense = plain(*arguments, **options, dtype=torch.float64)
    convert = next(getattr(ours, n) for n in ("from_linear", "from_conv", "from_embedding") if hasattr(ours, n))
    return dense, convert(dense, **more), make_input()


def truncated(dense, rank):
    """The dense layer with the best weight of that rank, by NumPy's SVD; of each group where there are several."""
    dense = copy.deepcopy(dense)
    groups = getattr(dense, "groups", 1)
    with torch.no_grad():
        for block in dense.weight.chunk(groups):
            u, s, vh = np.linalg.svd(block.flatten(1).numpy(), full_matrices=False)
            block.copy_(torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank]).view_as(block))
    return dense


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_changes_nothing_and_every_prefix_is_the_best(kind):
    dense, layer, x = build(kind)
    assert_close_rel(layer(x), dense(x), rtol=1e-12)
    for b in range(layer.max_rank + 1):
        want = truncated(dense, b)
        assert_close_rel(layer(x, rank=b), want(x), rtol=1e-12)
        assert_close_rel(layer.dense_weight(b), want.weight, rtol=1e-12)
    cut = type(layer)(*KINDS[kind][2], **KINDS[kind][3], max_rank=2, dtype=torch.float64)
    cut.load_dense_(dense.weight.detach())
    assert_close_rel(cut.dense_weight(), truncated(dense, 2).weight, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_both_factors_of_a_term_have_one_norm(kind):
    layer = build(kind)[1]
    groups = getattr(layer, "groups", 1)
    for v, u in zip(layer.weight_in.chunk(groups, 1), layer.weight_out.chunk(groups), strict=True):
        assert_close_rel(v.norm(dim=1)[:-1], u.norm(dim=0)[:-1], rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_computes_what_torchs_would(kind):
    plain, ours, arguments, options, make_input = KINDS[kind]
    x = make_input()
    torch.manual_seed(5)
    dense = plain(*arguments, **options, dtype=torch.float64)
    torch.manual_seed(5)
    layer = ours(*arguments, **options, dtype=torch.float64)
    assert_close_rel(layer(x), dense(x), rtol=1e-12)
    layer.truncate_(1)
    layer.reset_parameters()
    assert layer.rank == layer.max_rank


@pytest.mark.parametrize("kind", KINDS)
def test_rank_zero_is_the_bias_in_the_right_shape(kind):
    dense, layer, x = build(kind)
    y = layer(x, rank=0)
    bias = torch.zeros(()) if layer.bias is None else layer.bias
    where = 1 if kind in ("conv1d", "conv2d", "groups") else -1
    assert y.shape == dense(x).shape
    assert torch.equal(y, bias.double().broadcast_to(y.movedim(where, -1).shape).movedim(-1, where))
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()) == (name == "bias")


@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_goes_back(kind):
    dense, layer, x = build(kind)
    assert type(layer.to_dense()) is type(dense) and str(layer.to_dense()) == str(dense)
    layer.weight_in.requires_grad_(False), layer.weight_out.requires_grad_(False)
    back = layer.truncate_(2).eval().to_dense()
    assert_close_rel(back(x), truncated(dense, 2)(x), rtol=1e-12)
    assert not back.training and not back.weight.requires_grad
    if layer.bias is not None:
        assert back.bias.requires_grad and back.bias is not layer.bias


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_for_each_sample(kind):
    _, layer, x = build(kind)
    ranks = torch.arange(len(x)) % (layer.max_rank + 1)
    want = torch.cat([layer(x[i : i + 1], rank=int(b)) for i, b in enumerate(ranks)])
    assert_close_rel(layer(x, rank=ranks), want, rtol=1e-12)
    layer._sampled = ranks
    assert_close_rel(layer(x), want, rtol=1e-12)
    with pytest.raises(ValueError, match="rank must be given"):
        layer.dense_weight()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("n_dim", CONVS)
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 2, "dilation": 2},
        {"padding": "same", "dilation": 3},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": "valid", "padding_mode": "reflect", "groups": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "replicate", "groups": 2, "bias": False},
    ],
    ids=str,
)
def test_convolutions_as_torchs(n_dim, options):
    plain, ours = CONVS[n_dim]
    conv = plain(4, 6, (2, 3, 1)[:n_dim], **options).double()
    layer = ours.from_conv(conv)
    x = torch.randn(2, 4, *(7, 6, 8)[:n_dim]).double()
    assert_close_rel(layer(x), conv(x), rtol=1e-12)
    assert layer(x, rank=0).shape == conv(x).shape
    assert_close_rel(layer(x[0]), conv(x[0]), rtol=1e-12)
    assert_close_rel(layer(x[:0]), conv(x[:0]))
    assert_close_rel(layer.to_dense()(x), conv(x), rtol=1e-12)


# Factorisation for the data at hand


def best_outputs(y, rank):
    """The best approximation of the outputs (samples, out), by rank (Eckart and Young)."""
    u, s, vh = np.linalg.svd(y.detach().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])


@pytest.mark.parametrize(("n_in", "n_out"), [(9, 5), (5, 9)])
def test_a_gram_matrix_gives_the_best_outputs_at_every_rank(n_in, n_out):
    linear = nn.Linear(n_in, n_out, bias=False).double()
    x = torch.randn(40, n_in).double() * torch.logspace(0, -2, n_in).double()
    layer = LowRankLinear.from_linear(linear, gram=x.T @ x / 40)
    plain = LowRankLinear.from_linear(linear)
    y = linear(x)
    assert_close_rel(layer(x), y, rtol=1e-12)
    for b in range(1, layer.max_rank):
        assert_close_rel(layer(x, rank=b), best_outputs(y, b), rtol=1e-6)
        assert (layer(x, rank=b) - y).norm() < (plain(x, rank=b) - y).norm()


@pytest.mark.parametrize(("n_in", "n_out"), [(9, 5), (5, 9)])
def test_directions_without_data_lose_nothing_at_full_rank(n_in, n_out):
    linear = nn.Linear(n_in, n_out).double()
    x = torch.randn(40, 2).double() @ torch.randn(2, n_in).double()
    for gram in (x.T @ x, torch.zeros(n_in, n_in), torch.zeros(n_in)):
        layer = LowRankLinear.from_linear(linear, gram=gram)
        assert_close_rel(layer.dense_weight(), linear.weight, rtol=1e-12)
    # Two terms hold all that the data show.
    layer = LowRankLinear.from_linear(linear, gram=x.T @ x)
    assert_close_rel(layer(x, rank=2), linear(x), rtol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_gram_matrix_of_patches(groups):
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=False).double()
    x = (torch.randn(3, 4, 6, 6) * torch.tensor([1.0, 0.1, 2.0, 0.3]).view(4, 1, 1)).double()
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    gram = patches.T @ patches
    size = 36 // groups
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, 36, size)])
    for given in (gram, blocks):
        layer = LowRankConv2d.from_conv(conv, gram=given)
        for b in range(1, layer.max_rank):
            rows = layer(x, rank=b).movedim(1, -1).flatten(0, 2)
            want = conv(x).movedim(1, -1).flatten(0, 2)
            for got, ref in zip(rows.chunk(groups, 1), want.chunk(groups, 1), strict=True):
                assert_close_rel(got, best_outputs(ref, b), rtol=1e-6)


def test_counts_weight_the_entries_of_a_table():
    table = nn.Embedding(11, 6).double()
    counts = torch.arange(1, 12)
    layer = LowRankEmbedding.from_embedding(table, gram=counts.double())
    index = torch.arange(11).repeat_interleave(counts)
    for b in range(1, 6):
        assert_close_rel(layer(index, rank=b), best_outputs(table(index), b), rtol=1e-8)


# Order, truncation, state


def test_importance_as_the_released_code_has_it():
    layer = LowRankLinear(3, 2)
    with torch.no_grad():
        layer.weight_in.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        layer.weight_out.copy_(torch.tensor([[1.0, 2], [3, 4]]))
    want = torch.tensor([91.0 * 30, 77.0 * 20], dtype=torch.float64).sqrt()
    assert_close_rel(layer.importance(), want, rtol=1e-14)
    want = torch.tensor([14.0 * 10, 77.0 * 20], dtype=torch.float64).sqrt()
    assert_close_rel(layer.importance(hierarchical=False), want, rtol=1e-14)
    layer.truncate_(1)
    assert_close_rel(layer.importance(), want[:1], rtol=1e-14)
    assert layer.truncate_(0).importance().shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_keeps_the_prefix(kind):
    _, layer, x = build(kind)
    want, shapes = layer(x, rank=2), [p.shape for p in layer.parameters()]
    layer.weight_in.requires_grad_(False)
    parameters = list(layer.parameters())
    assert layer.truncate_(2) is layer and layer.rank == 2 and layer.max_rank > 2
    assert torch.equal(layer(x), want)
    assert [p.shape for p in layer.parameters()] == shapes and all(
        map(lambda a, b: a is b, layer.parameters(), parameters)
    )
    assert not layer.weight_in[2:].any() and not layer.weight_out[:, 2:].any()
    assert layer.importance().shape == (2,)
    layer.truncate_(2, physical=True)
    assert layer.rank == layer.max_rank == 2 and torch.equal(layer(x), want)
    assert not layer.weight_in.requires_grad and layer.weight_out.requires_grad
    with pytest.raises(ValueError, match="rank must be at most 2"):
        layer.truncate_(3)
    layer.truncate_(0, physical=True)
    assert layer(x).shape == want.shape and layer.max_rank == 0


def test_nan_in_dead_columns_is_cleared_by_truncation():
    layer = LowRankLinear(5, 4)
    with torch.no_grad():
        layer.weight_in[2:], layer.weight_out[:, 2:] = float("nan"), float("nan")
    layer.truncate_(2)
    assert layer(torch.ones(1, 5), rank=torch.tensor([1])).isfinite().all()
    assert layer.dense_weight().isfinite().all() and layer.weight_in.isfinite().all()


def test_a_checkpoint_brings_its_rank():
    layer = LowRankLinear(5, 4).truncate_(2)
    state = layer.state_dict()
    assert state["rank"].tolist() == [2] and state["rank"].dtype == torch.int64
    for options in ({}, {"assign": True}):
        other = LowRankLinear(5, 4)
        other.load_state_dict(copy.deepcopy(state), **options)
        assert other.rank == 2 and repr(other) == repr(layer)
        assert other.load_state_dict(LowRankLinear(5, 4).state_dict()) and other.rank == 4
    other = nn.Sequential(LowRankLinear(5, 4, device="meta"))
    other.load_state_dict({f"0.{k}": v for k, v in state.items()}, assign=True)
    assert other[0].rank == 2 and torch.equal(other(torch.ones(5)), layer(torch.ones(5)))


def test_a_rank_written_into_the_buffer_is_noticed():
    layer = LowRankLinear(5, 4)
    dict(layer.named_buffers())["rank"].fill_(3)  # as torch.distributed.checkpoint does
    assert layer.rank == 3
    with pytest.raises(ValueError, match="rank must be at most 3"):
        layer(torch.ones(5), rank=4)
    assert layer.to(torch.float64).rank == copy.deepcopy(layer).rank == 3
    dict(layer.named_buffers())["rank"].fill_(2)
    layer.state_written()  # as the trainer does when it resumes
    x = torch.ones(5, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x, rank=2))


def test_a_checkpoint_of_another_shape_is_refused():
    layer = LowRankConv2d(4, 6, 3)
    cut = copy.deepcopy(layer).truncate_(2, physical=True)
    with pytest.raises(RuntimeError, match=r"(?s)weight_in was cut to rank 2: \(2, 36\).*\(6, 36\)"):
        layer.load_state_dict(cut.state_dict())
    assert layer.rank == 6
    with pytest.raises(RuntimeError, match=r"(?s)6, 36.*2, 36"):
        cut.load_state_dict(layer.state_dict())
    assert cut.rank == 2
    state = layer.state_dict() | {"rank": torch.tensor([7])}
    with pytest.raises(RuntimeError, match="rank must be from 0 to 6, got"):
        layer.load_state_dict(state)
    assert layer.rank == 6 and layer.state_dict()["rank"].tolist() == [6]
    state.pop("rank")
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)


def test_the_padding_entry_stays_zero():
    layer = LowRankEmbedding(11, 6, padding_idx=-3)
    assert layer.padding_idx == 8
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    index = torch.arange(11)
    for rank in (6, 3):
        layer(index, rank=rank).square().sum().backward()
        optimizer.step()
    y = layer(index)
    assert not y[8].any() and y[:8].all()


def test_a_sampled_rank_holds_for_calls_that_name_none():
    layer = LowRankLinear(5, 4)
    x = torch.randn(3, 5)
    layer._sampled = 2
    assert torch.equal(layer(x), layer(x, rank=2)) and not torch.equal(layer(x), layer(x, rank=3))
    assert layer.rank == 4 and torch.equal(layer.dense_weight(), layer.dense_weight(2))
    with pytest.raises(ValueError, match="rank must be at most 4"):
        layer._sampled = 5
    layer._sampled = None
    assert torch.equal(layer(x), layer(x, rank=4))


def test_a_converted_transformer_layer_runs_torchs_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    ours = copy.deepcopy(layer)
    ours.linear1, ours.linear2 = LowRankLinear.from_linear(layer.linear1), LowRankLinear.from_linear(layer.linear2)
    x = torch.randn(2, 5, 8).double()
    assert_close_rel(ours(x), layer(x), rtol=1e-12)
    ours.eval(), layer.eval()
    assert_close_rel(ours(x), layer(x), rtol=1e-12)
    with torch.no_grad():
        assert_close_rel(ours(x), layer(x), rtol=1e-12)
        ours.linear1.truncate_(3)
        layer.linear1 = ours.linear1.to_dense()
        assert_close_rel(ours(x), layer(x), rtol=1e-12)


# Compiled


def test_one_graph_of_a_model_serves_every_draw_and_every_truncation():
    model = nn.Sequential(
        LowRankLinear(6, 5), nn.ReLU(), LowRankLinear(5, 7), nn.Unflatten(1, (1, 7)), LowRankConv1d(1, 4, 3)
    )
    model.double()
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(3, 6).double()

    def step(draw):
        outputs = []
        for m, call in ((model, compiled), (other, other)):
            m.zero_grad()
            # A full pass and a sampled one, then one backward pass.
            full = call(x).square().sum()
            for name, rank in draw.items():
                m.get_submodule(name)._sampled = rank
            sampled = call(x)
            for name in draw:
                m.get_submodule(name)._sampled = None
            (full + sampled.square().sum()).backward()
            outputs.append(sampled)
        assert_close_rel(*outputs, rtol=1e-12)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert_close_rel(p.grad, q.grad, rtol=1e-12)

    for draw in ({"0": 3}, {"0": 1}, {"2": 0}, {"2": 4}, {"4": 2}, {"4": 1}, {}, {"0": 0, "2": 2, "4": 3}):
        step(draw)
    for rank in (4, 3, 1, 0):
        model[0].truncate_(rank), other[0].truncate_(rank)
        step({"2": 2})
    assert counter.frame_count == 1
    model.eval(), other.eval()
    for rank in (3, 2, 0):
        model[2].truncate_(rank), other[2].truncate_(rank)
        assert_close_rel(compiled(x), other(x), rtol=1e-12)
    assert counter.frame_count <= 3


def test_a_truncated_layer_is_exported_at_its_rank():
    layer = LowRankLinear(6, 5).truncate_(2).eval()
    x = torch.randn(3, 6)
    program = torch.export.export(layer, (x,))
    assert_close_rel(program.module()(x), layer(x))
    assert not [n for n in program.graph.nodes if "low_rank" in str(n.target)]


# Sharded


def _sharded(process, folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2, timeout=timeout)
    mesh = dist.init_device_mesh("cpu", (2,))
    try:
        torch.manual_seed(0)
        alone = LowRankLinear(7, 5, dtype=torch.float64)
        layer = fully_shard(copy.deepcopy(alone), mesh=mesh)
        x = torch.randn(3, 7).double()
        assert isinstance(layer.weight_in, DTensor) and layer.max_rank == 5
        assert_close_rel(layer.importance(), alone.importance(), rtol=1e-13)
        for rank in (3, 1):
            layer.truncate_(rank), alone.truncate_(rank)
            assert_close_rel(layer(x), alone(x), rtol=1e-13)
            layer.reshard()
            assert_close_rel(layer.weight_in.full_tensor(), alone.weight_in, rtol=0)
            assert_close_rel(layer.weight_out.full_tensor(), alone.weight_out, rtol=0)
            assert_close_rel(layer.dense_weight(), alone.dense_weight(), rtol=1e-13)
            assert_close_rel(layer.to_dense()(x), alone(x), rtol=1e-13)
        try:
            layer.truncate_(0, physical=True)
        except ValueError as error:
            assert "physical must be False" in str(error)
        else:
            raise AssertionError("sharded parameters were cut")
        # From the meta device, as large models are made.
        made = fully_shard(LowRankLinear(7, 5, device="meta", dtype=torch.float64), mesh=mesh)
        made.to_empty(device="cpu")
        torch.manual_seed(process)
        made.reset_parameters()
        weight = made.dense_weight()
        assert weight.isfinite().all() and 0.5 < weight.std() * 21**0.5 < 1.5
        gathered = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(gathered, weight)
        assert torch.equal(*gathered)
    finally:
        leave_group()


@pytest.mark.distributed
def test_sharded_layers(tmp_path):
    torch.multiprocessing.spawn(_sharded, (str(tmp_path),), nprocs=2)


# Bad input


def _parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def _with_nan():
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, float("nan"))
    return linear


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: LowRankLinear.from_linear(nn.Conv1d(4, 4, 1)), TypeError, "linear must be a torch.nn.Linear"),
        (lambda: LowRankConv1d.from_conv(nn.Conv2d(4, 4, 1)), TypeError, "conv must be a torch.nn.Conv1d"),
        (lambda: LowRankConv2d.from_conv(nn.ConvTranspose2d(4, 4, 1)), TypeError, "conv must be a torch.nn.Conv2d"),
        (lambda: LowRankLinear.from_linear(_parametrized()), ValueError, "linear must have a plain weight"),
        (lambda: LowRankLinear.from_linear(nn.LazyLinear(4)), ValueError, "linear must be initialised"),
        (lambda: LowRankLinear.from_linear(_with_nan()), ValueError, "weight must be finite"),
        (
            lambda: LowRankLinear.from_linear(nn.Linear(4, 4, dtype=torch.complex64)),
            TypeError,
            "linear.weight must have a real",
        ),
        (lambda: LowRankLinear.from_linear(nn.Linear(4, 6), max_rank=5), ValueError, "max_rank must be at most 4"),
        (lambda: LowRankLinear.from_linear(nn.Linear(4, 6), max_rank=0), ValueError, "max_rank must be at least 1"),
        (lambda: LowRankLinear.from_linear(nn.Linear(4, 6), gram=torch.eye(6)), ValueError, "gram must have shape"),
        (lambda: LowRankLinear.from_linear(nn.Linear(2, 2), gram=torch.eye(2) / 0), ValueError, "gram must be finite"),
        (
            lambda: LowRankEmbedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0)),
            ValueError,
            "max_norm must be None",
        ),
        (lambda: LowRankEmbedding.from_embedding(nn.Embedding(4, 4, sparse=True)), ValueError, "sparse must be False"),
        (lambda: LowRankConv2d(4, 6, 3, groups=4), ValueError, "groups must divide out_channels = 6"),
        (lambda: LowRankConv2d(4, 6, 3, groups=2, max_rank=4), ValueError, "max_rank must be at most 3"),
        (lambda: LowRankConv2d(4, 6, 3, padding="same", stride=2), ValueError, "padding must not be 'same'"),
        (
            lambda: LowRankConv2d(4, 6, 3)(torch.randn(1, 4, 2, 5)),
            ValueError,
            "x must have a grid that the kernel fits",
        ),
        (
            lambda: LowRankConv1d(4, 6, 3, padding=3, padding_mode="reflect")(torch.randn(1, 4, 3)),
            ValueError,
            "x must have at least 4 points",
        ),
        (lambda: LowRankLinear(4, 4).truncate_(5), ValueError, "rank must be at most 4"),
        (lambda: LowRankLinear(4, 4).truncate_(-1), ValueError, "rank must be at least 0"),
        (lambda: LowRankLinear(4, 4).truncate_(2)(torch.ones(4), rank=3), ValueError, "rank must be at most 2"),
        (lambda: LowRankLinear(4, 4).dense_weight(5), ValueError, "rank must be at most 4"),
        (
            lambda: LowRankLinear(4, 4).load_dense_(torch.ones(4, 5)),
            ValueError,
            "weight must have the dense layer's shape",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
