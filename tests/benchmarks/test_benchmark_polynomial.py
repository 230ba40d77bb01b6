"""The polynomial benchmark's references, peers and counts, against formulas that are written differently."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _harness as harness
from benchmarks import polynomial as family

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _matmul_precision():
    """Making a block's inputs sets the process's precision of float32 products."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = convolutions


def test_feature_reference_is_the_sum_over_all_maps():
    adj = family.make_graphs(2, 4, CPU, "random")
    (found,) = family.features_reference(adj)
    place = 0
    for equation in family.EQUATIONS:
        operands, output = equation.split("->")
        letters = sorted(set(operands) - {","})
        want = torch.zeros(2, *[4] * len(output), dtype=torch.float64)
        for values in itertools.product(range(4), repeat=len(letters)):
            j = dict(zip(letters, values, strict=True))
            term = torch.ones(2, dtype=torch.float64)
            for a, b in operands.split(","):
                term = term * adj[:, j[a], j[b]]
            want[(slice(None), *(j[v] for v in output))] += term
        size = want[0].numel()
        assert torch.equal(found[:, place : place + size], want.reshape(2, -1)), equation
        place += size
    assert place == found.shape[1]


@pytest.mark.parametrize("kind", ["molecule", "random"])
@pytest.mark.parametrize("who", ["ours", *family.FEATURE_PEERS])
def test_features_are_right_before_they_are_timed(who, kind):
    if "opt_einsum, " in who:
        pytest.importorskip("opt_einsum", reason="needs opt_einsum")
    adj = family.make_graphs(2, 9, CPU, kind)
    assert torch.equal(adj, adj.mT) and adj.max() == 1 and not adj.diagonal(dim1=-2, dim2=-1).any()
    built = (family.features_ours if who == "ours" else family.FEATURE_PEERS[who])(adj)
    verdict = harness.check(built, harness.FORWARD, family.features_reference(adj), 0.0)
    assert verdict["status"] == "ok", verdict


def test_the_graphs_have_something_to_count():
    assert (family.features_reference(family.make_graphs(1, 16, CPU, "random"))[0] != 0).double().mean() > 0.5
    molecules = family.make_graphs(4, 38, CPU, "molecule").double()
    assert 1.9 < molecules.sum(-1).mean() < 2.6  # bonds of an atom
    triangles = torch.einsum("zab,zbc,zca->z", molecules, molecules, molecules)
    assert (triangles >= 6).all()


@pytest.mark.parametrize("what", ["triangles per edge", "triangles per node", "K4 per edge"])
def test_sparse_counts_are_right_before_they_are_timed(what):
    pytest.importorskip("networkx", reason="needs networkx")
    pytest.importorskip("scipy", reason="needs scipy")
    inputs = family.make_sparse(60, CPU)
    (reference,) = family.sparse_reference(inputs, what)
    adj = inputs.tensor().to_dense().double()
    dense = (adj @ adj) * adj
    if what == "triangles per node":
        dense = dense.sum(-1)
    elif what == "K4 per edge":
        dense = torch.einsum("ab,ac,ad,bc,bd,cd->ab", *[adj] * 6)
    assert torch.equal(reference, dense if what == "triangles per node" else dense[tuple(inputs.edges)])
    assert reference.any()
    case = family._sparse(60, what)
    for built in (case.ours(inputs), *(peer(inputs) for peer in case.peers.values())):
        verdict = harness.check(built, harness.FORWARD, (reference,), 0.0)
        assert verdict["status"] == "ok", verdict


@pytest.mark.parametrize("mode", [harness.FORWARD, harness.BOTH])
@pytest.mark.parametrize("who", [family.block_ours, family.BLOCK_PEERS["padded"]])
def test_blocks_are_right_before_they_are_timed(who, mode):
    inputs = family.make_block((3, 1, 5), 4, CPU)
    verdict = harness.check(who(inputs), mode, family.block_reference(inputs), 1e-5)
    assert verdict["status"] == "ok", verdict


def test_block_work_is_what_torch_counts():
    channels, n = 6, 5
    inputs = family.make_block((n, n), channels, CPU)
    work = family.block_work((n, n), channels, torch.float32)[harness.FORWARD]
    with FlopCounterMode(display=False) as counter:
        family._padded(inputs, compiled=False).call(harness.FORWARD)
    identity = 2 * 4 * channels * 2 * n * n  # the identity's channels: four times, two operations each
    assert counter.get_total_flops() == work["flops"] + identity
    # Pairs in and out, 7 C² weights.
    assert work["bytes"] == 4 * (2 * channels * 2 * n * n + 7 * channels**2)


def test_cases_cover_what_is_promised():
    cpu, cuda = list(family.cases("cpu")), list(family.cases("cuda"))
    features = [c for c in cpu if c.labels["what"] == "features"]
    assert any(c.labels["n"] == 38 and c.headline for c in features) and any(c.quick for c in features)
    for what in ("triangles per edge", "K4 per edge"):
        sizes = {c.labels["n"] for c in cpu if c.labels["what"] == what and c.scale == "n"}
        assert 20_000 in sizes and len(sizes) >= 3
    blocks = [c for c in cuda if c.labels["what"] == "block" and (c.labels["graphs"], c.labels["C"]) == (128, 95)]
    assert {c.labels["sizes"] for c in blocks} == {"like ZINC", "equal"}
    assert any(c.quick for c in cuda) and any(c.headline for c in blocks)
    sizes = family.molecule_sizes(4096)
    assert min(sizes) >= 9 and max(sizes) <= 38 and abs(sum(sizes) / 4096 - 23.2) < 0.3
