"""What ranks send each other: on virtual ranks, and in one world of four gloo processes.

This file is also the program that the four processes run; each writes what it found, and the tests read these.
"""

import copy
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from torchlayers import LoopbackWorld, SequenceLayout
from torchlayers._ring import agree, group_name, place, resolve
from torchlayers.functional import ring_attention
from torchlayers.testing import serve_ranks, spawn_ranks

WORLD = 4


# Virtual ranks


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_patterns(world):
    """All-to-all, all-gather, reduce-scatter and all-reduce of parts of different sizes, some of them empty."""

    def fn(rank, group):
        send = [torch.full((rank + r,), 10.0 * rank + r) for r in range(world)]
        receive = [torch.empty(rank + r) for r in range(world)]
        group.all_to_all(send, receive)
        assert [x.tolist() for x in receive] == [[10.0 * r + rank] * (rank + r) for r in range(world)]
        receive = [torch.empty(r) for r in range(world)]
        group.all_gather(torch.full((rank,), float(rank)), receive)
        assert [x.tolist() for x in receive] == [[float(r)] * r for r in range(world)]
        parts = [torch.full((2 * r,), float(rank + r)) for r in range(world)]
        total = group.reduce_scatter(parts)
        assert total.tolist() == [float(sum(r + rank for r in range(world)))] * (2 * rank)
        assert parts[rank].tolist() == [2.0 * rank] * (2 * rank)  # left as they were
        x = torch.arange(7.0).reshape(1, 7) + rank
        expected = world * torch.arange(7.0)[None] + sum(range(world))
        assert torch.equal(group.all_reduce(x), expected)
        return group.bytes_sent

    sent = LoopbackWorld(world).run(fn)
    for rank in range(world):
        others = [r for r in range(world) if r != rank]
        to_all = sum(rank + r for r in others) + rank * len(others) + sum(2 * r for r in others)
        sizes = [len(x) for x in torch.arange(7).tensor_split(world)]
        to_all += sum(sizes[r] for r in others) + sizes[rank] * len(others)
        assert sent[rank] == 4 * to_all


def test_hops_count_and_tags_keep_streams_apart():
    """Two streams between the same ranks, received in another order than sent."""

    def fn(rank, group):
        a, b = torch.full((3,), rank), torch.full((3,), 100 + rank)
        got_a, got_b = torch.empty_like(a), torch.empty_like(b)
        first = group.hop([a], [got_a], 1, tag=0)
        second = group.hop([b], [got_b], -1, tag=1)
        second.wait()
        first.wait()
        first.wait()  # once more does nothing
        assert got_a.tolist() == [(rank - 1) % 3] * 3
        assert got_b.tolist() == [100 + (rank + 1) % 3] * 3

    world = LoopbackWorld(3)
    world.run(fn)
    assert world.hops == [2] * 3 and world.bytes_sent == [48] * 3
    world.run(fn)
    assert world.hops == [4] * 3


def test_sums_do_not_depend_on_who_is_first():
    x = torch.randn(3, 2, 1000)

    def fn(rank, group):
        time.sleep(0.02 * (rank * 2 % 3))
        return group.all_reduce(x[rank])

    results = LoopbackWorld(3).run(fn)
    assert all(torch.equal(y, (x[0] + x[1]) + x[2]) for y in results)


def test_a_failing_rank_ends_the_others():
    ended = []

    def fn(rank, group):
        if rank == 1:
            raise KeyError("mine")
        try:
            group.hop([torch.zeros(1)], [torch.zeros(1)]).wait()
            group.hop([torch.zeros(1)], [torch.zeros(1)]).wait()
        except RuntimeError as error:
            ended.append(str(error))
            raise

    world = LoopbackWorld(3)
    with pytest.raises(KeyError, match="mine"):
        world.run(fn)
    assert len(ended) == 2 and any("rank 1 has failed" in text for text in ended)
    assert world.run(lambda rank, group: rank) == [0, 1, 2]


def test_waiting_in_vain_is_an_error():
    world = LoopbackWorld(2, timeout=0.1)
    with pytest.raises(RuntimeError, match=r"rank 0 waits for rank 1: nothing came within 0.1 s"):
        world.run(lambda rank, group: None if rank else group.hop([torch.zeros(1)], [torch.zeros(1)]).wait())

    def other_shape(rank, group):
        group.hop([torch.zeros(2 + rank)], [torch.zeros(2 + rank)]).wait()

    with pytest.raises(RuntimeError, match=r"expects \(.,\) torch.float32 of rank ., got \(.,\)"):
        world.run(other_shape)


def test_backward_belongs_inside_run():
    layout = SequenceLayout(8, 2)
    x = torch.randn(1, 1, 8, 4, requires_grad=True)
    world = LoopbackWorld(2)
    out = world.run(lambda r, group: ring_attention(*[layout.shard(x, 2, r)] * 3, layout=layout, group=group))
    with pytest.raises(RuntimeError, match=r"outside of LoopbackWorld\.run: call backward there"):
        out[0].sum().backward()
    with torch.no_grad():
        assert not any(world.run(lambda r, group: torch.is_grad_enabled()))


def test_groups_of_a_mesh():
    world = LoopbackWorld(6)

    def fn(rank, group):
        mesh = world.mesh(rank, (2, 3), ("dp", "sp"))
        sizes = {}
        for name in ("dp", "sp"):
            end = resolve(group_name(None, mesh, mesh.size(mesh.mesh_dim_names.index(name)), name))
            got = [torch.empty(1, dtype=torch.int64) for _ in range(end.size)]
            end.all_gather(torch.tensor([rank]), got)
            sizes[name] = [int(x) for x in got]
            assert place(end.name) == (end.rank, end.size) == (mesh.get_local_rank(name), end.size)
        return sizes

    found = world.run(fn)
    assert [x["dp"] for x in found] == [[r % 3, r % 3 + 3] for r in range(6)]
    assert [x["sp"] for x in found] == [[r // 3 * 3 + i for i in range(3)] for r in range(6)]
    assert place(None) == (0, 1)


def test_finding_a_group():
    world = LoopbackWorld(2)
    group = world.groups[0]
    assert group_name(group, None, 2) == group_name(group.name, None, 2) == group.name
    assert copy.deepcopy(group) is group
    assert group_name(None, None, 1) is None and group_name(LoopbackWorld(1).groups[0], None, 1) is None
    mesh = world.mesh(0, (2, 1), ("a", "b"))
    for arguments, error, message in (
        ((None, None, 2), ValueError, "group or mesh must be given for a layout over 2 ranks, got neither"),
        ((group, mesh, 2), ValueError, "group or mesh must be given, not both"),
        ((group, None, 3), ValueError, "group must have the layout's 3 ranks, got 2"),
        ((None, mesh, 2, "sp"), ValueError, "mesh must have one dimension or one called 'sp'"),
        ((7, None, 2), TypeError, "group must be a process group or a group of a LoopbackWorld, got int"),
        (("nowhere", None, 2), ValueError, "group must be the name of a group of this process, got 'nowhere'"),
        ((None, 7, 2), TypeError, "mesh must be a DeviceMesh or a mesh of a LoopbackWorld, got int"),
    ):
        with pytest.raises(error, match=message):
            group_name(*arguments)
    with pytest.raises(ValueError, match="delay must be a number of seconds, at least 0, got -1"):
        LoopbackWorld(2, delay=-1)
    with pytest.raises(ValueError, match="delay must be a number of seconds, at least 0, got nan"):
        LoopbackWorld(2, delay=float("nan"))
    with pytest.raises(ValueError, match="timeout must be a number of seconds, at least 0, got '3'"):
        LoopbackWorld(2, timeout="3")


# Agreement


def said(world, calls, check="first"):
    """What each rank's error says, None where there was none; ``calls`` are texts or refusals."""

    def fn(rank, group):
        call = calls[rank]
        refused = call if isinstance(call, Exception) else None
        try:
            agree(group, "" if refused else call, refused=refused, check=check)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return world.run(fn)


def test_agreement():
    world = LoopbackWorld(3)
    same = "ValueError: all ranks of the group must make the same call, got rank 0: a; rank 1: b; rank 2: a"
    assert said(world, ["a", "b", "a"]) == [same] * 3
    refused = said(world, ["a", TypeError("bad"), "a"])
    assert refused == ["ValueError: rank 1 refused the call: bad", "TypeError: bad", refused[0]]
    assert said(world, ["a", "b", "a"], check="never") == [None] * 3
    assert not any(group.agreed for group in world.groups)
    assert said(world, ["a"] * 3) == [None] * 3
    assert all(group.agreed for group in world.groups)
    assert said(world, ["a", "b", "a"]) == [None] * 3  # taken to run the same program from here on
    assert said(world, ["a", "b", "a"], check="always") == [same] * 3
    assert world.bytes_sent == world.hops == [0] * 3
    long = "x" * 5000
    assert said(world, [long, long, long + "y"])[0].startswith("ValueError: all ranks of the group must make the same")
    assert said(world, [long + "ä"] * 3) == [None] * 3


# Processes


def results_of(q, k, v, grad, attend):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def attention_cases(mesh, found):
    """Sequence groups of the mesh are strided: {0, 2} and {1, 3}; each attends to a sequence of its own."""
    rank, group = mesh.get_local_rank("sp"), mesh.get_group("sp")
    torch.manual_seed(mesh.get_local_rank("dp"))
    full = [torch.randn(2, h, 37, 8, dtype=torch.float64) for h in (4, 2, 2, 4)]
    expected = results_of(
        *full, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )

    def compare(case, layout, call):
        shards = [layout.shard(x, 2, rank) for x in full]
        ours = results_of(*shards, call)
        found[case] = max(
            (a - layout.shard(b, 2, rank)).abs().max().item() for a, b in zip(ours, expected, strict=True)
        )

    for kind in ("contiguous", "zigzag", "striped"):
        for schedule in ("ring", "allgather"):
            layout = SequenceLayout(37, 2, kind)
            options = {"layout": layout, "is_causal": True, "enable_gqa": True, "schedule": schedule}
            compare(f"{kind} {schedule}", layout, lambda q, k, v, o=options: ring_attention(q, k, v, mesh=mesh, **o))
    channel = resolve(group.group_name)
    n, other = layout.length(rank), layout.length(1 - rank)
    kv = 2 * 2 * 2 * 8 * 8  # bytes a token, of k and v
    channel.bytes_sent = channel.hops = 0
    options["schedule"] = "ring"
    compare("again", layout, lambda q, k, v: ring_attention(q, k, v, group=group, **options))
    # Forward k and v; backward these, and the gradients of the other's.
    found["bytes"] = float(channel.bytes_sent != kv * (2 * n + other)) + float(channel.hops != 3)
    for what, where in (("mesh", {"mesh": mesh}), ("group", {"group": group})):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda q, k, v, where=where: ring_attention(q, k, v, **where, **options),
            fullgraph=True,
            backend="aot_eager",
        )
        compare(f"compiled, {what}", layout, compiled)
    found["lse"] = lse_error(full, layout, rank, group, options)


def lse_error(full, layout, rank, group, options):
    def call(q, k, v):
        return ring_attention(q, k, v, group=group, return_lse=True, **options)[1]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q, k, _, _ = (x.repeat_interleave(4 // x.shape[1], 1) for x in full)
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(37, 37).triu(1).bool(), float("-inf"))
    shards = [layout.shard(x, 2, rank) for x in full[:3]]
    return (compiled(*shards) - layout.shard(scores.logsumexp(-1), 2, rank)).abs().max().item()


def refusals(found):
    """Over all four ranks: one refuses, shapes differ, one refuses while it compiles; each time the group goes on."""
    group = dist.new_group(list(range(WORLD)))
    rank = dist.get_rank()
    layout = SequenceLayout(16, WORLD)
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(3))

    def attempt(case, call):
        try:
            call()
            found[case] = "no error"
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}"

    def attend(x=x, layout=layout, **options):
        return ring_attention(x, x, x, layout=layout, group=group, check="always", **options)

    attempt("dropout", lambda: attend(dropout_p=2.0 if rank == 1 else 0.0))
    attempt("all refuse", lambda: attend(window_size=3))
    attempt("length", lambda: attend(x[:, :, : 4 - (rank == 2)]))
    attempt("layout", lambda: attend(layout=SequenceLayout(20 if rank == 0 else 16, 5 if rank == 0 else WORLD)))
    attempt("dtype", lambda: attend(x.double() if rank == 3 else x))
    attempt("batch", lambda: attend(x.expand(1 + (rank == 3), -1, -1, -1)))
    attempt("mask", lambda: attend(is_causal=rank == 0))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    attempt("compiling", lambda: compiled(dropout_p=2.0 if rank == 1 else 0.0))
    channel = resolve(group.group_name)
    found["sent by refused calls"] = channel.bytes_sent
    out = attend()
    whole = torch.cat([x] * WORLD, 2)
    found["afterwards"] = (out - F.scaled_dot_product_attention(x, whole, whole)).abs().max().item()
    attempt("first", lambda: ring_attention(x, x, x, layout=layout, group=group))


def work(rank):
    # Dynamo itself instantiates the autograd.Function that it traces, and warns of what it cannot.
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    found = {"errors": {}, "refusals": {}}
    attention_cases(init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "dp")), found["errors"])
    refusals(found["refusals"])
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the four ranks found."""
    return spawn_ranks(__file__, WORLD, tmp_path_factory.mktemp("world"))


CASES = [f"{kind} {how}" for kind in ("contiguous", "zigzag", "striped") for how in ("ring", "allgather")]


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*CASES, "again", "bytes", "compiled, mesh", "compiled, group", "lse"])
def test_strided_groups_of_processes_equal_one(processes, case):
    errors = [found["errors"][case] for found in processes]
    assert all(error <= 1e-12 for error in errors), errors


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "alone", "message", "others"),
    [
        ("dropout", 1, "ValueError: dropout_p must be in [0, 1), got 2.0", "rank 1 refused the call: dropout_p must"),
        ("all refuse", None, "", "ValueError: window_size must be a pair"),
        (
            "length",
            2,
            "ValueError: q must have length of rank 2 in the layout = 4 at dimension 2, got 3",
            "rank 2 refus",
        ),
        ("layout", 0, "ValueError: group must have the layout's 5 ranks, got 4", "rank 0 refused the call: group must"),
        (
            "dtype",
            None,
            "",
            "ValueError: all ranks of the group must make the same call, got rank 0: ring_attention of f",
        ),
        (
            "batch",
            None,
            "",
            "ValueError: all ranks of the group must make the same call, got rank 0: ring_attention of f",
        ),
        (
            "mask",
            None,
            "",
            "ValueError: all ranks of the group must make the same call, got rank 0: ring_attention of f",
        ),
        ("compiling", 1, "Unsupported: Observed exception", "ValueError: rank 1 refused the call: see its own error"),
    ],
)
def test_a_refused_call_is_refused_on_every_process(processes, case, alone, message, others):
    for rank, found in enumerate(processes):
        assert (message if rank == alone else others) in found["refusals"][case]


@pytest.mark.distributed
def test_a_refused_call_sends_nothing_and_leaves_the_group_usable(processes):
    for found in processes:
        assert found["refusals"]["sent by refused calls"] == 0
        assert found["refusals"]["afterwards"] <= 1e-6
        assert found["refusals"]["first"] == "no error"


if __name__ == "__main__":
    serve_ranks(work)
