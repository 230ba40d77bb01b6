"""Small random transformers models over two gloo processes against one process, and masks that must not get lost.

This file is also the program that the world runs: each rank compares with a model of its own on the whole batch and
writes, per case, the largest error it saw; the tests read these.
"""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[transformers]'")

from torchlayers._placement import use_layout  # noqa: E402
from torchlayers.ring_attention import (  # noqa: E402
    LoopbackWorld,
    SequenceLayout,
    gradient_mesh,
    register_ring_attention,
    sequence_parallel,
    sequence_parallel_loss,
    shard_batch,
)
from torchlayers.tensor_attention.huggingface import register_ring_tensor_attention  # noqa: E402
from torchlayers.testing import serve_ranks, spawn_ranks  # noqa: E402

WORLD = 2
LENGTH = 26
DOCUMENTS = (9, 1, 16)
SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(kind):
    """A random float64 model, of transformers' own attention."""
    torch.manual_seed(0)
    if kind == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    elif kind == "gemma3":  # layers with a window and layers without
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=layers)
        model = transformers.Gemma3ForCausalLM(config)
    else:
        sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim", "pad_token_id")}
        config = transformers.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.BertForMaskedLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().train()


def data(rows=2):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 48, (rows, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, :20] = -100  # so that the ranks differ in how many count
    return {"input_ids": ids, "labels": labels}


def packed():
    batch = data(1)
    batch["labels"] = batch["input_ids"].clone()  # what comes right after a border tells most
    batch["position_ids"] = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    return batch


def padded():
    batch = data()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 18:] = 0
    return batch


def single_loss(model, batch, shift=True):
    labels = batch["labels"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    # With a cache, which is their default, transformers does not see documents in position ids.
    logits = model(**inputs, **({"use_cache": False} if shift else {})).logits
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


# case -> (model, batch, kind of layout)
CASES = {
    "mistral, sliding window": ("mistral", data, "contiguous"),
    "mistral, sliding window, striped": ("mistral", data, "striped"),
    "mistral, sliding window and documents": ("mistral", packed, "contiguous"),
    "llama, zigzag": ("llama", data, "zigzag"),
    "llama, documents": ("llama", packed, "zigzag"),
    "llama, documents, striped": ("llama", packed, "striped"),
    "llama, balanced documents": ("llama", packed, "documents"),
    "llama, padding on the right": ("llama", padded, "zigzag"),
    "gemma3, two kinds of layers": ("gemma3", data, "contiguous"),
    "bert, full attention": ("bert", data, "contiguous"),
}
TENSOR_CASES = {
    "tensor attention, sliding window": ("mistral", data, "contiguous"),
    "tensor attention, documents": ("llama", packed, "striped"),
    "tensor attention, full": ("bert", data, "contiguous"),
}
MORE = (
    "llama, checkpointed",
    "llama, fsdp2",
    "plain again",
    "nothing in force",
    "wrong positions",
    "unknown documents",
)


def attend_to_pairs(module, q, k, v, attention_mask, scaling=None, **others):
    """Tensor attention by its definition, with transformers' own mask for both keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if attention_mask is None:
        attention_mask = torch.ones(q.shape[2], q.shape[2]).bool()
        attention_mask = attention_mask.tril() if module.is_causal else attention_mask
    logits = torch.einsum("bhid,bhjd,bhkd->bhijk", q, k, k) * scaling
    seen = attention_mask[..., :, None] & attention_mask[..., None, :]
    weights = logits.masked_fill(~seen, -torch.inf).flatten(-2).softmax(-1).view(logits.shape)
    return torch.einsum("bhijk,bhjd,bhkd->bihd", weights, v, v), None


class Rank:
    def __init__(self):
        self.mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "sp"))
        self.errors = {}

    def compare(self, name, model, reference, loss, expected):
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        worst = abs((loss / WORLD - expected).item())
        for (n, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), n
            if p.grad is None:
                continue
            if isinstance(p.grad, dist.tensor.DTensor):
                grad = p.grad.full_tensor()
            else:
                grad = p.grad.clone()
                dist.all_reduce(grad)
                grad /= WORLD
            worst = max(worst, (grad - q.grad).abs().max().item())
        self.errors[name] = worst

    def train(self, name, kind, make, layout_kind, wrap=lambda model: model, attention=None):
        batch = make()
        shift = kind != "bert"
        reference = build(kind)
        if attention is not None:
            reference.set_attn_implementation("pairs")
        expected = single_loss(reference, batch, shift)
        expected.backward()
        model = build(kind)
        if attention is None:
            model = sequence_parallel(model, self.mesh)
        else:
            model.set_attn_implementation(attention)
        assert list(model.state_dict()) == list(reference.state_dict())
        model = wrap(model)
        borders = (0, 9, 10, 26) if layout_kind == "documents" else None
        layout = SequenceLayout(LENGTH, WORLD, layout_kind, borders)
        shard = shard_batch(batch, layout, self.mesh, shift_labels=shift)
        inputs = {k: v for k, v in shard.items() if k in ("input_ids", "position_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits if shift else model(**inputs).logits
        loss = sequence_parallel_loss(logits, shard["labels"], self.mesh, shard["num_valid_global"])
        loss.backward()
        self.compare(name, model, reference, loss, expected)
        return model, shard

    def run(self):
        try:
            sequence_parallel(build("llama"), self.mesh)(input_ids=data()["input_ids"])
        except ValueError as error:
            self.errors["nothing in force"] = float("layout must be in force" not in str(error))
        for name, case in CASES.items():
            self.train(name, *case)
        model, shard = self.train("llama, checkpointed", "llama", packed, "zigzag", checkpointed)
        self.misuse(model, shard)
        self.train("llama, fsdp2", "llama", packed, "zigzag", self.sharded)
        transformers.AttentionInterface.register("pairs", attend_to_pairs)
        transformers.AttentionMaskInterface.register("pairs", transformers.masking_utils.sdpa_mask)
        for name, case in TENSOR_CASES.items():
            self.train(name, *case, attention=register_ring_tensor_attention())

    def misuse(self, model, shard):
        ids = shard["input_ids"]
        for name, kind, positions, message in (
            # On rank 0 the positions that transformers makes are right, and so it learns of the others' by the message.
            ("wrong positions", "contiguous", None, "position_ids must be those of shard_batch"),
            ("unknown documents", "zigzag", torch.arange(13)[None] % 4, "position_ids must start again where"),
        ):
            self.errors[name] = float("inf")
            group = dist.new_group()
            try:
                with use_layout(SequenceLayout(LENGTH, WORLD, kind), group=group), torch.no_grad():
                    model(input_ids=ids, position_ids=positions, use_cache=False)
            except ValueError as error:
                self.errors[name] = float(message not in str(error))
        whole = packed()
        with use_layout(None), torch.no_grad():
            got = model.eval()(input_ids=whole["input_ids"], position_ids=whole["position_ids"]).logits
            expected = build("llama").eval()(input_ids=whole["input_ids"], position_ids=whole["position_ids"]).logits
            self.errors["plain again"] = (got - expected).abs().max().item()
            # With a cache, token by token.
            text = model.generate(whole["input_ids"][:, :5], max_new_tokens=4, do_sample=False)
        assert text.shape == (1, 9)

    def sharded(self, model):
        from torch.distributed.fsdp import fully_shard

        model = checkpointed(model)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=gradient_mesh(self.mesh))
        return model


def checkpointed(model):
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def work(rank):
    ranks = Rank()
    ranks.run()
    return ranks.errors


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the ranks found."""
    return spawn_ranks(__file__, WORLD, tmp_path_factory.mktemp("world"))


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*CASES, *MORE, *TENSOR_CASES])
def test_equals_one_process(results, case):
    errors = [result[case] for result in results]
    # Norms and rotary tables are float32 in these models, where a rounding may flip. NaN fails.
    assert all(error <= 1e-7 for error in errors), errors


# Masks that transformers composes, read without a second process


@pytest.fixture
def in_force():
    layout = SequenceLayout(8, 2)
    with use_layout(layout, group=LoopbackWorld(2).groups[0]):
        yield layout


def made(make, config, **options):
    from transformers import masking_utils

    config._attn_implementation = register_ring_attention()
    embeddings = torch.zeros(1, 4, 8)
    options = {"attention_mask": None, **options}
    return getattr(masking_utils, make)(config=config, inputs_embeds=embeddings, **options)


def test_masks_are_read(in_force):
    config = transformers.LlamaConfig(**SIZES)
    config.sliding_window = 3
    nothing = {"cache": None, "position_ids": torch.arange(4)[None]}
    assert made("create_causal_mask", config, **nothing) == (True, None)
    assert made("create_sliding_window_causal_mask", config, **nothing) == (True, 3)
    assert made("create_bidirectional_mask", config) == (False, None)
    assert made("create_bidirectional_sliding_window_mask", config) == (False, (3, 3))
    restarts = {**nothing, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert made("create_sliding_window_causal_mask", config, **restarts) == (True, 3)
    right = torch.tensor([[1, 1, 1, 0]])
    assert made("create_causal_mask", config, **{**nothing, "attention_mask": right}) == (True, None)


def test_masks_that_are_no_interval_are_refused(in_force):
    config = transformers.LlamaConfig(**SIZES)
    config.attention_chunk_size = 2
    nothing = {"cache": None, "position_ids": torch.arange(4)[None]}
    blocks = torch.tensor([[0, 0, -1, -1]])
    left, right = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0]])
    calls = [
        ("chunked_overlay", "create_chunked_causal_mask", nothing),
        ("or_mask", "create_causal_mask", {**nothing, "block_sequence_ids": blocks}),
        ("lambda", "create_causal_mask", {**nothing, "and_mask_function": lambda b, h, q, k: k > 0}),
        ("attention_mask", "create_causal_mask", {**nothing, "attention_mask": left}),
        ("attention_mask", "create_bidirectional_mask", {"attention_mask": right}),
    ]
    for message, make, options in calls:
        with pytest.raises(NotImplementedError, match=message):
            made(make, config, **options)


def test_options_that_are_not_supported_are_refused(in_force):
    from transformers import AttentionInterface

    attention = AttentionInterface()[register_ring_attention()]
    module = nn.Module()
    q = torch.zeros(1, 2, 4, 8)
    for message, options in {
        "softcap": {"softcap": 30.0},
        "s_aux": {"s_aux": torch.zeros(2)},
        "no mask tensors": {"attention_mask": torch.zeros(1, 1, 4, 4)},
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            attention(module, q, q, q, **{"attention_mask": None, **options})
    with pytest.raises(NotImplementedError, match="without a cache: 4 queries and 6 keys"):
        attention(module, q, torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8), None)


def test_names_say_what_is_not_the_default():
    from transformers import AttentionInterface

    assert register_ring_attention() == "ring_attention"
    assert register_ring_attention(schedule="allgather", backend="torch") == "ring_attention_allgather_torch"
    assert "ring_attention_allgather_torch" in AttentionInterface().valid_keys()
    for name, options in {"schedule": {"schedule": "rings"}, "backend": {"backend": "cuda"}}.items():
        with pytest.raises(ValueError, match=name):
            register_ring_attention(**options)


def test_one_process_is_transformers_own_attention():
    model, batch = build("mistral"), padded()
    expected = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    ours = sequence_parallel(copy.deepcopy(model))
    assert ours.config._attn_implementation == "ring_attention"
    assert torch.equal(ours(**{k: v for k, v in batch.items() if k != "labels"}).logits, expected)


def test_documents_on_one_process_are_the_layouts():
    model, batch = build("llama"), packed()
    expected = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    ours = sequence_parallel(copy.deepcopy(model))
    with use_layout(None):
        shard = shard_batch(batch, SequenceLayout(LENGTH, 1))
        got = ours(input_ids=shard["input_ids"], position_ids=shard["position_ids"], use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_tensor_attention_on_one_process():
    transformers.AttentionInterface.register("pairs", attend_to_pairs)
    transformers.AttentionMaskInterface.register("pairs", transformers.masking_utils.sdpa_mask)
    model, batch = build("mistral"), packed()
    model.set_attn_implementation("pairs")
    expected = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    model.set_attn_implementation(register_ring_tensor_attention())
    with use_layout(None), pytest.raises(NotImplementedError, match="position_ids start again"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    with use_layout(None):
        shard = shard_batch(batch, SequenceLayout(LENGTH, 1))
        got = model(input_ids=shard["input_ids"], position_ids=shard["position_ids"], use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    assert register_ring_tensor_attention(backend="torch") == "ring_tensor_attention_torch"
    with pytest.raises(ValueError, match="backend"):
        register_ring_tensor_attention(backend="cuda")


if __name__ == "__main__":
    serve_ranks(work)
