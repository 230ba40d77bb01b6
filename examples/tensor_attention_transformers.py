"""Tensor attention inside a Hugging Face Transformer: one line makes a model attend to pairs of tokens.

    python examples/tensor_attention_transformers.py            needs transformers: pip install -e '.[transformers]'

The task: which of 12 strings of 6 bits is the xor of two others? It asks about triples of tokens. A one-layer BERT with
random weights is trained on it twice, from the same weights: with its own attention, which compares tokens in pairs,
and with ``attn_implementation`` set to the name that :func:`register_ring_tensor_attention` gives, which compares them
in triples. Both have the same parameters; only the second gets clearly better than always giving the commoner answer.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
import transformers

from torchlayers.tensor_attention import register_ring_tensor_attention

TOKENS, BITS, WIDTH = 12, 6, 64


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Strings as ±1 (count, TOKENS, BITS), and whether each is the xor of two others (count, TOKENS)."""
    x = torch.randint(1, 2**BITS, (count, TOKENS))
    present = torch.zeros(count, 2**BITS, dtype=torch.bool).scatter_(1, x, True)
    wanted = (x[:, :, None] ^ x[:, None]).flatten(1)  # x_i ^ x_j, which must be among the strings
    labels = present.gather(1, wanted).view(count, TOKENS, TOKENS).any(-1)
    return 1.0 - 2.0 * (x[..., None] >> torch.arange(BITS) & 1), labels.long()


class Detector(torch.nn.Module):
    """Bits (B, N, BITS) -> logits (B, N, 2), by a model of transformers that knows nothing of what its attention is."""

    def __init__(self, attention: str):
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
            num_labels=2,
            vocab_size=1,
            attn_implementation=attention,
        )
        self.embedding = torch.nn.Linear(BITS, WIDTH)
        self.bert = transformers.BertForTokenClassification(config)

    def forward(self, bits: torch.Tensor) -> torch.Tensor:
        return self.bert(inputs_embeds=self.embedding(bits)).logits


def train(model: torch.nn.Module, steps: int) -> float:
    """Accuracy on fresh strings after ``steps`` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    torch.manual_seed(1)
    for _ in range(steps):
        bits, labels = draw(64)
        loss = F.cross_entropy(model(bits).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    bits, labels = draw(512)
    with torch.no_grad():
        return (model(bits).argmax(-1) == labels).float().mean().item()


def main(steps: int) -> None:
    accuracy, weights = {}, None
    for name, attention in (("pairwise", "sdpa"), ("tensor", register_ring_tensor_attention())):
        torch.manual_seed(0)
        model = Detector(attention)
        weights = copy.deepcopy(model.state_dict()) if weights is None else weights
        model.load_state_dict(weights)  # the same names and shapes, whatever attends
        accuracy[name] = train(model, steps)
    _, labels = draw(4096)
    common = max(labels.float().mean().item(), 1 - labels.float().mean().item())
    print(f"always the commoner answer: accuracy {common:.3f}")
    for name, value in accuracy.items():
        print(f"{name} attention: accuracy {value:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
