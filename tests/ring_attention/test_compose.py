"""Sequence parallelism together with data, tensor and pipeline parallelism: four gloo processes against one.

This file is also the program that the world runs: each rank compares with a single process of its own and writes, per
case, the largest error it saw; the tests read these.
"""

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from torchlayers._placement import placement, use_layout
from torchlayers.functional import ring_attention
from torchlayers.ring_attention import (
    RingMultiheadAttention,
    SequenceLayout,
    gradient_mesh,
    sequence_parallel,
    sequence_parallel_loss,
    shard_batch,
)
from torchlayers.testing import serve_ranks, spawn_ranks

WORLD = 4
LENGTH = 14
VOCABULARY = 20


class Language(nn.Module):
    """A language model of torch's own encoder layers, which knows nothing of ranks."""

    def __init__(self, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.position = nn.Embedding(LENGTH, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCABULARY)
        self.double()

    def forward(self, ids, position_ids):
        x = self.embedding(ids) + self.position(position_ids)
        for layer in self.layers:
            x = layer(x, is_causal=True, src_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x))
        return self.head(self.norm(x))


class Attention(nn.Module):
    """Attention as users write it, by a function; of four heads it has as many as its projections give."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, n) for n in (16, 8, 8, 16))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        layout, group = placement(None, None)
        layout = SequenceLayout(x.shape[1], 1) if layout is None else layout
        out = ring_attention(q, k, v, layout=layout, group=group, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = Attention()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.position = nn.Embedding(LENGTH, 16)
        self.block = Block()

    def forward(self, ids, position_ids):
        return self.block(self.embedding(ids) + self.position(position_ids))


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, x):
        return self.head(self.block(x))


def two_stages():
    torch.manual_seed(2)
    return nn.Sequential(First(), Second()).double()


def two_stages_loss(model, batch):
    with use_layout(None):
        ids = batch["input_ids"]
        logits = model[1](model[0](ids, torch.arange(LENGTH).expand(ids.shape)))
        return mean_loss(logits, batch)


def mean_loss(logits, batch):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def batches(dp=1, rows=2):
    """One a dp rank, with different numbers of labels, some of a row's first tokens without."""
    found = []
    for index in range(dp):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
        labels = ids.clone()
        labels[0, : 4 + 3 * index] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def together(found):
    return {key: torch.cat([batch[key] for batch in found]) for key in found[0]}


class Rank:
    """One rank's view of the world, and the cases it runs."""

    def __init__(self):
        self.errors = {}
        self.meshes = {}

    def mesh(self, **sizes):
        """A mesh of all ranks, row by row: the last dimension has groups of neighbours, the others strided ones."""
        key = tuple(sizes.items())
        if key not in self.meshes:
            ranks = torch.arange(WORLD).view(*sizes.values())
            self.meshes[key] = DeviceMesh("cpu", ranks, mesh_dim_names=tuple(sizes))
        return self.meshes[key]

    def compare(self, name, mesh, pairs, loss=None, expected=None, averaged=False):
        """``pairs`` of parameters, ours and one process's; gradients are averaged over ``mesh`` if they aren't yet."""
        worst = 0.0
        group = gradient_mesh(mesh).get_group()
        if loss is not None:
            loss = loss.detach().clone()
            dist.all_reduce(loss, group=group)
            worst = abs((loss / group.size() - expected).item())
        for ours, theirs in pairs:
            assert (ours.grad is None) == (theirs.grad is None)
            grad = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad.clone()
            if not averaged:
                dist.all_reduce(grad, group=group)
                grad /= group.size()
            worst = max(worst, (grad - theirs.grad).abs().max().item())
        self.errors[name] = max(worst, self.errors.get(name, 0.0))

    # -- data parallelism

    def data_parallel(self, name, mesh, kind, wrap):
        dp, sp = (mesh.size(mesh.mesh_dim_names.index(d)) if d in mesh.mesh_dim_names else 1 for d in ("dp", "sp"))
        torch.manual_seed(1)
        reference = Language()
        model = sequence_parallel(copy.deepcopy(reference), mesh)
        assert list(model.state_dict()) == list(reference.state_dict())
        wrapped = wrap(model, gradient_mesh(mesh))
        everything = batches(dp)
        mine = everything[mesh.get_local_rank("dp") if dp > 1 else 0]
        whole = together(everything)
        layout = SequenceLayout(LENGTH, sp, kind)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (reference, model)]
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            logits = reference(whole["input_ids"], torch.arange(LENGTH).expand(whole["input_ids"].shape))
            expected = mean_loss(logits, whole)
            expected.backward()
            shard = shard_batch(mine, layout, mesh)
            assert shard["num_valid_global"] == (whole["labels"][:, 1:] != -100).sum()
            logits = wrapped(shard["input_ids"], shard["position_ids"])
            loss = sequence_parallel_loss(logits, shard["labels"], mesh, shard["num_valid_global"])
            loss.backward()
            pairs = zip(model.parameters(), reference.parameters(), strict=True)
            self.compare(name, mesh, pairs, loss, expected, averaged=True)
            for optimizer in optimizers:
                optimizer.step()
        assert list(get_model_state_dict(model)) == list(reference.state_dict())

    def all_data_parallel(self):
        def ddp(model, ranks):
            return DistributedDataParallel(model, process_group=ranks.get_group())

        def fsdp(model, ranks):
            for layer in model.layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
            for module in (*model.layers, model):
                fully_shard(module, mesh=ranks)
            return model

        self.data_parallel("DDP, dp x sp", self.mesh(dp=2, sp=2), "zigzag", ddp)
        self.data_parallel("DDP, strided groups", self.mesh(sp=2, dp=2), "striped", ddp)
        self.data_parallel("DDP, sp alone", self.mesh(sp=4), "zigzag", ddp)
        self.data_parallel("FSDP2 and checkpointing, dp x sp", self.mesh(dp=2, sp=2), "zigzag", fsdp)
        self.data_parallel("FSDP2 and checkpointing, strided groups", self.mesh(sp=2, dp=2), "contiguous", fsdp)

    # -- tensor parallelism

    def tensor_parallel(self):
        plan = {
            **{f"block.attention.{n}": ColwiseParallel() for n in "qkv"},
            "block.attention.o": RowwiseParallel(),
            "block.up": ColwiseParallel(),
            "block.down": RowwiseParallel(),
        }
        batch = batches()[0]
        for name, mesh in (("sp x tp", self.mesh(sp=2, tp=2)), ("tp x sp", self.mesh(tp=2, sp=2))):
            reference, model = two_stages(), two_stages()
            expected = two_stages_loss(reference, batch)
            expected.backward()
            for stage in model:
                parallelize_module(stage, mesh["tp"], plan)
            shard = shard_batch(batch, SequenceLayout(LENGTH, 2, "zigzag"), mesh)
            logits = model[1](model[0](shard["input_ids"], shard["position_ids"]))
            loss = sequence_parallel_loss(logits, shard["labels"], mesh, shard["num_valid_global"])
            loss.backward()
            assert isinstance(model[0].block.attention.q.weight, DTensor)
            self.compare(name, mesh, zip(model.parameters(), reference.parameters(), strict=True), loss, expected)

    # -- pipelining

    def pipeline(self):
        batch = batches(rows=4)[0]
        reference = two_stages()
        expected = two_stages_loss(reference, batch)
        expected.backward()
        for name, mesh, schedule in (
            ("pp x sp, GPipe", self.mesh(pp=2, sp=2), ScheduleGPipe),
            ("sp x pp, 1F1B", self.mesh(sp=2, pp=2), Schedule1F1B),
        ):
            shard = shard_batch(batch, SequenceLayout(LENGTH, 2, "zigzag"), mesh)
            index = mesh.get_local_rank("pp")
            part = two_stages()[index]
            stage = PipelineStage(part, index, 2, torch.device("cpu"), group=mesh.get_group("pp"))

            def loss_fn(logits, labels, mesh=mesh, count=shard["num_valid_global"]):
                return sequence_parallel_loss(logits, labels, mesh, count)

            # Each micro-batch's loss is a part of the sum, so that nothing is left to divide.
            runner = schedule(stage, 2, loss_fn=loss_fn, scale_grads=False)
            losses: list[torch.Tensor] = []
            if index == 0:
                runner.step(shard["input_ids"], shard["position_ids"])
                loss = None
            else:
                runner.step(target=shard["labels"], losses=losses)
                loss = torch.stack(losses).sum()
            self.compare(name, mesh, zip(part.parameters(), reference[index].parameters(), strict=True), loss, expected)

    # -- compiling

    def compiled(self):
        mesh = self.mesh(dp=2, sp=2)
        torch.manual_seed(1)
        mha = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        ring = RingMultiheadAttention.from_multihead_attention(copy.deepcopy(mha), mesh=mesh, is_causal=True)
        layout = SequenceLayout(LENGTH, 2, "zigzag")
        x = torch.randn(2, LENGTH, 16, dtype=torch.float64)
        call = torch.compile(ring, fullgraph=True, backend="aot_eager")
        with use_layout(layout, mesh):
            out, _ = call(layout.shard(x, 1, mesh.get_local_rank("sp")))
        expected, _ = mha(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(LENGTH).to(x))
        out.square().sum().backward()
        expected.square().sum().backward()
        here = layout.shard(expected, 1, mesh.get_local_rank("sp"))
        self.errors["compiled"] = (out - here).abs().max().item()
        for p in ring.parameters():  # a sum over the tokens, not a mean
            p.grad *= 2
        self.compare("compiled", mesh, zip(ring.parameters(), mha.parameters(), strict=True))


def work(rank):
    # FSDP2's, at any model that ends in a Linear.
    warnings.filterwarnings("ignore", ".*returned a view tensor")
    ranks = Rank()
    ranks.all_data_parallel()
    ranks.tensor_parallel()
    ranks.pipeline()
    ranks.compiled()
    return ranks.errors


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the four ranks found."""
    return spawn_ranks(__file__, WORLD, tmp_path_factory.mktemp("world"))


CASES = (
    "DDP, dp x sp",
    "DDP, strided groups",
    "DDP, sp alone",
    "FSDP2 and checkpointing, dp x sp",
    "FSDP2 and checkpointing, strided groups",
    "sp x tp",
    "tp x sp",
    "pp x sp, GPipe",
    "sp x pp, 1F1B",
    "compiled",
)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(results, case):
    errors = [result[case] for result in results]
    assert all(error <= 1e-12 for error in errors), errors  # NaN fails


if __name__ == "__main__":
    serve_ranks(work)
