"""A plain GPT whose sequences are cut over processes: ring attention by one call, the same losses as on one process.

    torchrun --nproc-per-node 2 examples/ring_gpt.py            two processes, half of each sequence on each
    python examples/ring_gpt.py                                 one process

The model is ordinary ``torch.nn`` code. :func:`sequence_parallel` makes its attention go round a ring of the processes,
:func:`shard_batch` cuts a batch (zigzag, so that causal attention is the same work for all) and works out labels and
positions before the cut, and DDP averages the gradients. Every process trains a second copy of the model on whole
sequences, as a single process would, and the losses agree step by step to rounding.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from torchlayers.ring_attention import (
    SequenceLayout,
    gradient_mesh,
    sequence_parallel,
    sequence_parallel_loss,
    shard_batch,
)

VOCABULARY, LENGTH, WIDTH = 32, 256, 48


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        # The causal mask of what is here; a ring goes by is_causal alone and does not look at it.
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens (B, T) and their positions in the whole sequence (B, T) -> logits (B, T, VOCABULARY)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.positions(positions)))


def draw(step: int) -> torch.Tensor:
    """The step's batch (2, LENGTH), the same on all processes: whoever knows the last 8 tokens knows the next one."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (2, 8), generator=generator).repeat(1, LENGTH // 8)


def train(steps: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("sp",))
    torch.manual_seed(0)
    alone = GPT()
    model = sequence_parallel(copy.deepcopy(alone), mesh)
    model = nn.parallel.DistributedDataParallel(model, process_group=gradient_mesh(mesh).get_group())
    layout = SequenceLayout(LENGTH, world, "zigzag")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3) for m in (model, alone)]

    losses, largest = [], 0.0
    for step in range(steps):
        tokens = draw(step)
        shard = shard_batch({"input_ids": tokens, "labels": tokens}, layout, mesh)
        logits = model(shard["input_ids"], shard["position_ids"])
        loss = sequence_parallel_loss(logits, shard["labels"], mesh, shard["num_valid_global"])
        positions = torch.arange(LENGTH).expand_as(tokens)
        expected = F.cross_entropy(alone(tokens, positions)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
        largest = max(largest, abs(losses[-1] - expected.item()))
    held = torch.tensor(shard["input_ids"].shape[1])
    counts = [torch.zeros_like(held) for _ in range(world)]
    dist.all_gather(counts, held)
    if rank == 0:
        print(
            f"tokens of a sequence on each of {world} processes: {', '.join(str(int(c)) for c in counts)} of {LENGTH}"
        )
        print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
        print(f"largest difference from the losses of one process: {largest:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    if "RANK" not in os.environ:  # without torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo")
    train(options.steps)  # a function of its own, so that what uses the group is gone before the group is
    dist.destroy_process_group()
