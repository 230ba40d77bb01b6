"""Maestro inside a Hugging Face Transformer: train once in low rank, then cut plain models of any size from it.

    python examples/maestro_transformers.py                     needs transformers: pip install -e '.[transformers]'

A Llama with random weights is factorised: every projection becomes a product of two factors at its full rank, and the
logits stay what they were. Training runs one layer at a lower rank at each step (ordered dropout), which puts the terms
of each product in order. :func:`extract` then cuts plain ``torch.nn`` models to a budget of parameters, without more
training. They lose little, and a model that was trained as usual loses a multiple when it is cut in the same way.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
import transformers

from torchlayers.maestro import RankSampler, extract, factorize, lod_loss

VOCABULARY, LENGTH = 32, 24


def build() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def draw(rows: int) -> torch.Tensor:
    """Sequences (rows, LENGTH) that repeat their first 8 tokens: predictable from the ninth token on, by copying."""
    return torch.randint(0, VOCABULARY, (rows, 8)).repeat(1, LENGTH // 8)


def loss_of(output: transformers.modeling_outputs.CausalLMOutput, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the tokens that can be known."""
    return F.cross_entropy(output.logits[:, 7:-1].flatten(0, 1), tokens[:, 8:].flatten())


def train(model: torch.nn.Module, steps: int, *, ordered: bool) -> None:
    sampler = RankSampler(model) if ordered else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    torch.manual_seed(1)
    for step in range(steps):
        tokens = draw(32)
        if sampler is not None:
            loss = lod_loss(model, {"input_ids": tokens}, tokens, loss_of, sampler, step)
        else:
            loss = loss_of(model(input_ids=tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: torch.nn.Module) -> float:
    torch.manual_seed(2)
    tokens = draw(256)
    return loss_of(model(input_ids=tokens), tokens).item()


def main(steps: int) -> None:
    torch.manual_seed(0)
    dense = build()
    low_rank = factorize(dense, skip=["lm_head"])
    tokens = draw(4)
    with torch.no_grad():
        difference = (low_rank(input_ids=tokens).logits - dense(input_ids=tokens).logits).abs().max().item()
    print(f"factorised at full rank: logits differ by {difference:.1e}")

    start = evaluate(dense)
    usual = copy.deepcopy(dense)
    train(usual, steps, ordered=False)
    train(low_rank, steps, ordered=True)
    print(
        f"loss {start:.3f} before training; after it, as usual {evaluate(usual):.3f}, ordered {evaluate(low_rank):.3f}"
    )

    whole = sum(p.numel() for p in dense.parameters())
    usual = factorize(usual, skip=["lm_head"])
    for share in (0.5, 0.3, 0.2):
        small, other = (extract(model, budget_params=int(share * whole), round_to=1) for model in (low_rank, usual))
        assert not any(type(part).__module__.startswith("torchlayers") for part in small.modules())
        params = sum(p.numel() for p in small.parameters())
        print(
            f"cut to {params / whole:.0%} of {whole} parameters: "
            f"loss {evaluate(small):.3f} trained in order, {evaluate(other):.3f} as usual"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
