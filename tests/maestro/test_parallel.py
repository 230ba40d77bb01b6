"""Training over two processes equals training in one: DDP and FSDP2, draws of their own, shrinking, statistics.

All cases share one spawned world. Each process also trains the one-process model, on the batches of both.
"""

import copy
import datetime
import json
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from torchlayers._ring import leave_group
from torchlayers.maestro.layers import LowRankConv2d, LowRankLinear
from torchlayers.maestro.ordered import RankSampler, lod_loss, sampled_ranks
from torchlayers.maestro.regularization import group_lasso, hgl_prox_, hierarchical_group_lasso
from torchlayers.maestro.shrink import progressive_shrink, recalibrate_bn
from torchlayers.testing import assert_close_rel

WORLD = 2
MODES = ("sampled", "full+sampled", "split")


class Network(nn.Module):
    """A layer whose rank of 5 two processes share unequally, one at rank 0, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = LowRankConv2d(2, 5, 3, padding=1, dtype=torch.float64)
        self.empty = LowRankLinear(5, 5, dtype=torch.float64)
        self.head = LowRankLinear(5, 3, dtype=torch.float64)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).mean((2, 3))
        return self.head(x + self.empty(x))


def network():
    torch.manual_seed(0)
    model = Network()
    model.empty.truncate_(0)
    return model


def batches(step):
    """One of the same size for each rank."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(WORLD, 6, 2, 3, 3, dtype=torch.float64, generator=generator)
    return list(zip(images, torch.randint(3, (WORLD, 6), generator=generator), strict=True))


def shard(model):
    fully_shard(model.conv)
    return fully_shard(model)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def samplers(model, law="pair"):
    return [RankSampler(model, law, dp_rank=rank) for rank in range(WORLD)]


def step_alone(model, optimizer, step, mode, penalty=0.0):
    """The mean over what the ranks ask for: each has its batch, its draw and its weight of the penalty."""
    optimizer.zero_grad()
    for rank, (sampler, (x, y)) in enumerate(zip(samplers(model), batches(step), strict=True)):
        loss = lod_loss(model, x, y, cross_entropy, sampler, step, mode)
        loss = loss + penalty * (rank + 1) * (hierarchical_group_lasso(model) + group_lasso(model))
        (loss / WORLD).backward()
    optimizer.step()


def step_together(model, optimizer, step, mode, rank, penalty=0.0):
    optimizer.zero_grad()
    x, y = batches(step)[rank]
    loss = lod_loss(model, x, y, cross_entropy, samplers(model)[rank], step, mode)
    if penalty:
        loss = loss + penalty * (rank + 1) * (hierarchical_group_lasso(model) + group_lasso(model))
    loss.backward()
    optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_parameters(model, alone, start=None):
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        if q.numel() and q.any():
            assert_close_rel(whole(p), q, rtol=1e-10)
        else:
            assert not whole(p).any(), name
    if start is not None:
        moved = [n for (n, p), q in zip(alone.named_parameters(), start.parameters(), strict=True) if not p.equal(q)]
        assert {n.split(".")[0] for n in moved} == {"conv", "empty", "head"}  # of the empty layer the bias


# Cases: run on every rank


def check_ddp_draws(rank):
    for mode in MODES:
        alone, start = network(), network()
        model = ddp(network())
        optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (alone, model))
        for step in range(4):
            step_alone(alone, optimizer, step, mode, penalty=1e-2)
            step_together(model, other, step, mode, rank, penalty=1e-2)
        assert_same_parameters(model, alone, start)


def check_fsdp2_draws(rank):
    for mode in MODES:
        alone, start, model = network(), network(), shard(network())
        optimizer, other = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (alone, model))
        for step in range(4):
            step_alone(alone, optimizer, step, mode, penalty=1e-2)
            step_together(model, other, step, mode, rank, penalty=1e-2)
        assert_same_parameters(model, alone, start)


def check_fsdp2_penalties(rank):
    alone, model = network(), shard(network())
    for penalty in (hierarchical_group_lasso, group_lasso):
        expected = penalty(alone)
        assert_close_rel(penalty(model), expected)
        (penalty(model) * (1.0 + rank)).backward()  # the mean weight is 1.5
        gradients = torch.autograd.grad(expected, list(alone.parameters()), allow_unused=True)
        for p, g in zip(model.parameters(), gradients, strict=True):
            if g is None or not g.any():
                assert p.grad is None or not whole(p.grad).any()
            else:
                assert_close_rel(whole(p.grad), 1.5 * g)
        model.zero_grad()


def check_fsdp2_prox_and_shrink(rank):
    alone, model = network(), shard(network())
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (alone, model))
    for step in range(3):
        step_alone(alone, optimizer, step, "sampled")
        step_together(model, other, step, "sampled", rank)
        hgl_prox_(alone, 0.02)
        hgl_prox_(model, 0.02)
    assert_same_parameters(model, alone)
    with torch.no_grad():
        model(batches(0)[rank][0])  # leaves the root's parameters gathered: the shards must be changed
    cut = float(alone.conv.importance()[2]) * 0.999
    expected = progressive_shrink(alone, cut, optimizer=optimizer)
    assert expected["conv"][1] >= 3 and expected["empty"] == (0, 0) and expected["head"][1] < 3, expected
    assert progressive_shrink(model, cut, optimizer=other) == expected
    momentum = whole(other.state[model.head.weight_out]["momentum_buffer"])
    assert not momentum[:, expected["head"][1] :].any()
    for step in range(3, 6):
        step_alone(alone, optimizer, step, "full+sampled")
        step_together(model, other, step, "full+sampled", rank)
    assert_same_parameters(model, alone)
    with torch.no_grad():
        model(batches(0)[rank][0])
    hgl_prox_(model, 0.1)
    assert_same_parameters(model, hgl_prox_(alone, 0.1))
    with pytest.raises(ValueError, match="sharded"):
        progressive_shrink(model, 1e9, physical=True)
    assert_same_parameters(model, alone)


def check_first_rank_decides(rank):
    for wrap in (ddp, lambda model: model):
        model = network()
        wrapped = wrap(model)
        with torch.no_grad():
            model.conv.weight_in[2 + rank :] *= 1e-8  # alone, the second rank would keep another term
            model.head.weight_in[1 + rank :] *= 1e-8
        ranks = progressive_shrink(wrapped, 1e-5)
        assert ranks == {"conv": (5, 2), "empty": (0, 0), "head": (3, 1)}
        assert (model.conv.rank, model.head.rank) == (2, 1)
    # Over a group of its own, each decides for itself.
    groups = [dist.new_group([r]) for r in range(WORLD)]
    model = network()
    with torch.no_grad():
        model.conv.weight_in[2 + rank :] *= 1e-8
    assert progressive_shrink(model, 1e-5, group=groups[rank])["conv"] == (5, 2 + rank)


def check_physical_shrink_rebuilds_ddp(rank):
    alone, model = network(), nn.parallel.DistributedDataParallel(network(), gradient_as_bucket_view=True)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.eval().module.train()
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=1e-2) for m in (alone, model))
    for step in range(3):
        step_alone(alone, optimizer, step, "full+sampled")
        step_together(model, other, step, "full+sampled", rank)
    cut = float(alone.conv.importance()[2]) * 0.999
    expected = progressive_shrink(alone, cut, optimizer=optimizer)
    assert progressive_shrink(model, cut, optimizer=other, physical=True) == expected
    assert model.gradient_as_bucket_view and not model.training and model.module.training
    assert model.module.conv.max_rank == expected["conv"][1]
    assert model.module.empty.weight_in.shape == (0, 5)
    for step in range(3, 7):
        step_alone(alone, optimizer, step, "full+sampled")
        step_together(model, other, step, "full+sampled", rank)
    assert len(calls) == 2 * 7
    for layer, (_, r) in expected.items():
        a, b = getattr(alone, layer), getattr(model.module, layer)
        torch.testing.assert_close(b.weight_in.detach(), a.weight_in.detach()[:r], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(b.weight_out.detach(), a.weight_out.detach()[:, :r], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(b.bias, a.bias, rtol=1e-10, atol=1e-12)


def check_batch_norm_of_all_batches(rank):
    generator = torch.Generator().manual_seed(5)
    data = [torch.randn(4, 3, dtype=torch.float64, generator=generator) * k + k for k in range(5)]
    norm = nn.BatchNorm1d(3, dtype=torch.float64)
    alone = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), norm)
    mine = data[:2] if rank == 0 else data[2:]
    grouped, wrapped = copy.deepcopy(alone), ddp(copy.deepcopy(alone))
    for model in (alone, grouped):
        model.load_state_dict(wrapped.module.state_dict())
    recalibrate_bn(alone, data)
    recalibrate_bn(grouped, mine, group=dist.group.WORLD)
    recalibrate_bn(wrapped, mine)
    for model in (grouped, wrapped.module):
        for got, expected in zip(model.buffers(), alone.buffers(), strict=True):
            assert_close_rel(got, expected)
        assert model[1].momentum == 0.1
    local = copy.deepcopy(alone)
    if rank == 0:  # nobody else takes part
        recalibrate_bn(local, mine)
        assert not torch.allclose(local[1].running_mean, norm.running_mean)


def check_resumed_run_repeats_the_draws(rank):
    model = ddp(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        step_together(model, optimizer, step, "sampled", rank)
        if step == 2:
            progressive_shrink(model, float(model.module.conv.importance()[3]) * 0.999)
            saved = copy.deepcopy(model.module.state_dict())
    again = network()
    again.load_state_dict(saved)
    assert again.conv.rank == model.module.conv.rank == 4
    again = ddp(again)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    for step in range(3, 5):
        step_together(again, optimizer, step, "sampled", rank)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def check_a_rank_of_zero_on_one_process(rank):
    """No parameter of a layer at rank 0 is missed by the reduction, in several steps."""
    model, alone = ddp(network()), network()
    for step in range(3):
        data = batches(step)
        for r, (x, y) in enumerate(data):
            with sampled_ranks(alone, {"head": 3 * r, "conv": 0}):
                (cross_entropy(alone(x), y) / WORLD).backward()
        with sampled_ranks(model, {"head": 3 * rank, "conv": 0}):
            cross_entropy(model(data[rank][0]), data[rank][1]).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


CASES = {name.removeprefix("check_"): case for name, case in dict(globals()).items() if name.startswith("check_")}


def _process(rank, folder):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=limit)
    torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    failures = {}
    for name, case in CASES.items():
        try:
            case(rank)
        except Exception:
            failures[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    leave_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    torch.multiprocessing.spawn(_process, (str(folder),), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_over_two_processes(case, failures):
    found = [f"rank {rank}:\n{failed[case]}" for rank, failed in enumerate(failures) if case in failed]
    assert not found, "\n".join(found)
