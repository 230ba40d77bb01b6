"""Batches, the loss, and the layout in force, on virtual ranks; over processes they are tested in test_compose.py."""

import pytest
import torch
import torch.nn.functional as F

from torchlayers._placement import placement, use_layout
from torchlayers.ring_attention import (
    LoopbackWorld,
    SequenceLayout,
    gradient_mesh,
    sequence_parallel_loss,
    shard_batch,
)

KINDS = ("contiguous", "zigzag", "striped")


@pytest.fixture(autouse=True)
def _nothing_in_force():
    """What a test says of layouts ends with it."""
    with use_layout(None):
        yield


def tokens(rows=2, length=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(50, (rows, length), generator=generator)


def shards(batch, layout, world=None, **options):
    """Of all ranks."""
    world = LoopbackWorld(layout.world) if world is None else world
    return [shard_batch(batch, layout, group=group, **options) for group in world.groups]


def joined(layout, parts, key):
    return layout.unshard([part[key] for part in parts], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_labels_are_shifted_before_the_cut(kind, world):
    ids = tokens()
    labels = ids.clone()
    labels[0, :6] = -100
    layout = SequenceLayout(13, world, kind)
    parts = shards({"input_ids": ids, "labels": labels}, layout)
    expected = torch.full_like(labels, -100)
    for row in range(2):
        for i in range(12):
            expected[row, i] = labels[row, i + 1]
    assert torch.equal(joined(layout, parts, "input_ids"), ids)
    assert torch.equal(joined(layout, parts, "labels"), expected)
    assert torch.equal(joined(layout, parts, "position_ids"), torch.arange(13).expand(2, 13))
    for rank, part in enumerate(parts):
        assert set(part) == {"input_ids", "labels", "position_ids", "num_valid_global"}
        assert torch.equal(part["position_ids"][1], layout.positions(rank))
        assert part["num_valid_global"] == (expected != -100).sum()


def test_labels_that_are_shifted_already():
    ids = tokens()
    layout = SequenceLayout(13, 3)
    parts = shards({"input_ids": ids, "labels": ids}, layout, shift_labels=False, ignore_index=7)
    assert torch.equal(joined(layout, parts, "labels"), ids)
    assert parts[1]["num_valid_global"] == (ids != 7).sum()


def test_what_runs_along_the_sequence_is_cut_and_the_rest_passed_on():
    layout = SequenceLayout(13, 2, "zigzag")
    batch = {
        "input_ids": tokens(),
        "features": torch.randn(2, 13, 4),
        "weights": torch.randn(13),
        "classes": torch.randn(2, 5),
        "name": "x",
    }
    parts = shards(batch, layout)
    assert torch.equal(joined(layout, parts, "features"), batch["features"])
    for part in parts:
        assert part["name"] == "x"
        assert part["weights"] is batch["weights"] and part["classes"] is batch["classes"]
        assert "labels" not in part and "num_valid_global" not in part


def packed(key):
    """A batch of one row with documents of 5, 1 and 7 tokens, said in one of the ways in which users have it."""
    ids = tokens(1)
    if key == "position_ids":
        return {"input_ids": ids, key: torch.cat([torch.arange(n) for n in (5, 1, 7)])[None]}
    return {"input_ids": ids, key: torch.tensor([0, 5, 6, 13], dtype=torch.int32)}


@pytest.mark.parametrize("key", ["cu_seqlens", "cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_the_batch_become_the_layouts(key, kind):
    layout = SequenceLayout(13, 2, kind)
    world = LoopbackWorld(2)
    parts = shards(packed(key), layout, world)
    assert joined(layout, parts, "document_ids").tolist() == [[0] * 5 + [1] + [2] * 7]
    found, name = placement(None, world.groups[1].name)
    assert name == world.groups[1].name
    assert found == SequenceLayout(13, 2, kind, (0, 5, 6, 13))
    assert "cu_seqlens" not in parts[0] and "cu_seq_lens_q" not in parts[0]
    expected = packed(key).get("position_ids", torch.arange(13)[None])
    assert torch.equal(joined(layout, parts, "position_ids"), expected)


def test_documents_of_the_layout():
    layout = SequenceLayout(13, 2, "documents", (0, 5, 5, 6, 13))
    parts = shards({"input_ids": tokens()}, layout)
    assert joined(layout, parts, "document_ids").tolist() == [[0] * 5 + [1] + [2] * 7] * 2
    shards(packed("position_ids"), layout)  # the same documents, but for the empty one


def test_padding_on_the_right_leaves_the_loss():
    mask = torch.ones(2, 13, dtype=torch.int64)
    ids = tokens()
    layout = SequenceLayout(13, 2, "striped")
    assert "attention_mask" not in shards({"input_ids": ids, "attention_mask": mask}, layout)[0]
    mask[1, 9:] = 0
    parts = shards({"input_ids": ids, "labels": ids, "attention_mask": mask}, layout)
    assert torch.equal(joined(layout, parts, "attention_mask"), mask.bool())
    labels = joined(layout, parts, "labels")
    assert torch.equal(labels[1, :8], ids[1, 1:9]) and (labels[1, 8:] == -100).all()
    assert parts[0]["num_valid_global"] == 12 + 8


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("batch", [1]),
        ("batch", {"x": torch.zeros(2, 4)}),
        ("input_ids", {"input_ids": torch.zeros(2, 12)}),
        ("labels", {"input_ids": torch.zeros(2, 13), "labels": torch.zeros(13)}),
        ("labels", {"input_ids": torch.zeros(2, 13), "labels": torch.zeros(1, 13)}),
        ("cu_seqlens", {"input_ids": torch.zeros(2, 13), "cu_seqlens": [0, 12]}),
        ("attention_mask", {"input_ids": torch.zeros(2, 13), "attention_mask": 1 - torch.eye(13)[:2].long()}),
        (
            "position_ids",
            {"input_ids": torch.zeros(2, 13), "position_ids": torch.stack([torch.arange(13), torch.arange(13) % 6])},
        ),
        ("cu_seq_lens_k", {"input_ids": torch.zeros(2, 13), "cu_seq_lens_q": [0, 13], "cu_seq_lens_k": [0, 2, 13]}),
    ],
)
def test_bad_batches(name, batch):
    with pytest.raises((TypeError, ValueError), match=name):
        shard_batch(batch, SequenceLayout(13, 1))


def test_documents_other_than_the_layouts():
    layout = SequenceLayout(13, 1, "striped", (0, 4, 13))
    with pytest.raises(ValueError, match="cu_seqlens must have the layout's documents"):
        shard_batch(packed("cu_seqlens"), layout)
    with pytest.raises(TypeError, match="layout"):
        shard_batch({"input_ids": tokens()}, None)
    with pytest.raises(ValueError, match="group or mesh must be given"):
        shard_batch({"input_ids": tokens()}, SequenceLayout(13, 2))


# The loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_mean_over_ranks_is_the_mean_over_tokens(kind, world):
    """Also where one rank has none: all labels lie in the first tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = tokens()
    labels = ids.clone()
    labels[:, 4:] = -100
    weight = torch.randn(50, 50, dtype=torch.float64, generator=generator, requires_grad=True)
    expected = F.cross_entropy(weight[ids[:, :-1]].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    (gradient,) = torch.autograd.grad(expected, weight)
    layout = SequenceLayout(13, world, kind)
    ranks = LoopbackWorld(world)
    losses = []
    for part, group in zip(shards({"input_ids": ids, "labels": labels}, layout, ranks), ranks.groups, strict=True):
        logits = weight[part["input_ids"]]
        losses.append(sequence_parallel_loss(logits, part["labels"], None, part["num_valid_global"], group=group))
    mean = sum(losses) / world
    (got,) = torch.autograd.grad(mean, weight)
    torch.testing.assert_close(mean, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(got, gradient, rtol=1e-12, atol=1e-15)
    if world == 3 and kind == "contiguous":
        assert losses[2] == 0


def test_the_loss_counts_dp_and_sp_and_no_other_dimension():
    world = LoopbackWorld(12)
    mesh = world.mesh(0, (2, 3, 2), ("dp", "sp", "tp"))
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[1, 2, -100, 0]])
    loss = sequence_parallel_loss(logits, labels, mesh, torch.tensor(10))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * 6 / 10
    torch.testing.assert_close(loss, expected)
    flat = LoopbackWorld(4).mesh(1, (4,), ("ranks",))
    torch.testing.assert_close(sequence_parallel_loss(logits, labels, flat, 10), expected * 4 / 6)


def test_the_loss_without_labels_is_zero_and_of_low_precision_is_summed_in_float32():
    logits = torch.randn(1, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    loss = sequence_parallel_loss(logits, torch.full((1, 4), -100), None, torch.tensor(0))
    loss.backward()
    assert loss == 0 and loss.dtype == torch.float32 and not logits.grad.any()


def test_counts_are_added_over_dp():
    world = LoopbackWorld(4)
    layout = SequenceLayout(13, 2, "zigzag")

    def cut(rank, group):
        mesh = world.mesh(rank, (2, 2), ("dp", "sp"))
        ids = tokens(seed=mesh.get_local_rank("dp"))
        labels = ids.masked_fill(torch.arange(13) < 5 * mesh.get_local_rank("dp"), -100)
        return shard_batch({"input_ids": ids, "labels": labels}, layout, mesh)["num_valid_global"].item()

    assert world.run(cut) == [2 * 12 + 2 * 8] * 4


def test_an_only_dimension_has_the_ranks_of_a_sequence_whatever_its_name():
    world, layout = LoopbackWorld(2), SequenceLayout(13, 2)

    def cut(rank, group):
        batch = {"input_ids": tokens(), "labels": tokens()}
        return shard_batch(batch, layout, world.mesh(rank, (2,), ("dp",)))["num_valid_global"].item()

    assert world.run(cut) == [2 * 12] * 2


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("logits", lambda: sequence_parallel_loss([1.0], torch.zeros(1), None, 1)),
        ("labels", lambda: sequence_parallel_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4).long(), None, 1)),
        ("labels must be int64", lambda: sequence_parallel_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3), None, 1)),
        ("num_valid_global", lambda: sequence_parallel_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3).long())),
        ("mesh must be", lambda: sequence_parallel_loss(torch.zeros(2, 5), torch.zeros(2).long(), 3, 1)),
        ("num_valid_global", lambda: sequence_parallel_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), None, -1)),
        (
            "mesh",
            lambda: sequence_parallel_loss(
                torch.zeros(1, 5), torch.zeros(1).long(), LoopbackWorld(4).mesh(0, (2, 2), ("tp", "pp")), 1
            ),
        ),
        ("mesh", lambda: gradient_mesh(LoopbackWorld(4).mesh(0, (2, 2), ("tp", "pp")))),
    ],
)
def test_bad_arguments(name, call):
    with pytest.raises((TypeError, ValueError), match=name):
        call()


# The layout in force


def test_what_was_said_last_holds_and_a_context_restores():
    world = LoopbackWorld(2)
    first, second = SequenceLayout(8, 2), SequenceLayout(8, 2, "zigzag")
    group = world.groups[0]
    use_layout(first, group=group)
    assert placement(None, None) == placement(None, group.name) == (first, group.name)
    with use_layout(second, group=group):
        assert placement(None, None) == placement(None, group.name) == (second, group.name)
        with use_layout(None):
            assert placement(None, None) == placement(None, group.name) == (None, None)
        assert placement(None, group.name) == (second, group.name)
    assert placement(None, None) == placement(None, group.name) == (first, group.name)
    assert placement(second, None) == (second, group.name)  # a layout of its own, on the ranks in force


def test_a_group_without_a_layout():
    world = LoopbackWorld(2)
    use_layout(SequenceLayout(8, 2), group=world.groups[0])
    with pytest.raises(ValueError, match="layout must be given, or be in force"):
        placement(None, world.groups[1].name)
    with pytest.raises(TypeError, match="layout must be a SequenceLayout"):
        use_layout("zigzag")
    with pytest.raises(ValueError, match="the layout's 3 ranks"):
        use_layout(SequenceLayout(8, 3), group=world.groups[0])
