"""One hop of ring attention, and whole rings of hops, in Triton's interpreter or on a GPU, against float64."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from torchlayers._attention import keep_mask
from torchlayers.kernels import _lib
from torchlayers.kernels import ring_block as rb
from torchlayers.kernels._lib import INTERPRET, target_of
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

NAN = float("nan")


def randn(device, *shape, dtype=torch.float32):
    return torch.randn(*shape, device=device).to(dtype)


def make(device, length=1, *, b=1, heads=2, kv_heads=1, keys=None, d=16, dv=16, dtype=torch.float32):
    """q, k, v of the whole sequence."""
    keys = length if keys is None else keys
    shapes = (b, heads, length, d), (b, kv_heads, keys, d), (b, kv_heads, keys, dv)
    return [randn(device, *shape, dtype=dtype) for shape in shapes]


# Layouts: for each rank its positions, in order, and how the kernels are told of them.


def contiguous(length, world):
    starts = [length * r // world for r in range(world + 1)]
    for a, b in itertools.pairwise(starts):
        yield list(range(a, b)), (a, b - a, 0, 1)


def zigzag(length, world):
    starts = [length * r // (2 * world) for r in range(2 * world + 1)]
    for r in range(world):
        head = range(starts[r], starts[r + 1])
        tail = range(starts[2 * world - 1 - r], starts[2 * world - r])
        yield [*head, *tail], (head.start, len(head), tail.start, 1)


def striped(length, world):
    for r in range(world):
        at = list(range(r, length, world))
        yield at, (r, len(at), 0, world)


def tables(length, world):
    """Any token on any rank, in order on each."""
    owner = torch.randint(world, (length,), generator=torch.Generator().manual_seed(length))
    for r in range(world):
        yield (owner == r).nonzero()[:, 0].tolist(), None


LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped, "tables": tables}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: everything but the tensors."""

    window: tuple[int, int] = (-1, -1)
    documents: tuple[int, ...] = ()  # where each begins
    scale: float = 0.25
    dropout_p: float = 0.0
    seed: int = 2**40 + 17
    head_offset: int = 0
    heads: int | None = None
    precision: str | None = None

    def options(self, q_at, k_at, q_runs, k_runs, device):
        def table(x):
            return torch.tensor(x, dtype=torch.int32, device=device)

        found = {
            "window": self.window, "scale": self.scale, "dropout_p": self.dropout_p, "head_offset": self.head_offset,
            "heads": self.heads, "seed": torch.tensor([self.seed], device=device), "precision": self.precision,
        }  # fmt: skip
        for name, at, runs in (("q", q_at, q_runs), ("k", k_at, k_runs)):
            found[f"{name}_runs"] = (7, 0, 3, 5) if runs is None else runs  # not read beside a table
            found[f"{name}_positions"] = table(at) if runs is None else None
        if self.documents:
            borders = torch.tensor([*self.documents, 2**31 - 1])
            n = torch.searchsorted(borders, torch.tensor(q_at, dtype=torch.int64), right=True)
            found["doc_first"], found["doc_last"] = (x.int().to(device) for x in (borders[n - 1], borders[n] - 1))
        return found


CAUSAL = (-1, 0)
MASKS = {
    "full": Case(),
    "causal": Case(window=CAUSAL),
    "window": Case(window=(21, 0)),
    "both_ways": Case(window=(3, 9)),
    "ahead": Case(window=(0, -1)),
    "documents": Case(window=CAUSAL, documents=(0, 13, 14, 40, 55)),
}


def definition(q, k, v, case, q_at=None, k_at=None):
    """out and lse over all pairs at once, from positions."""
    b, heads, nq, _ = q.shape
    group = heads // k.shape[1]
    i = torch.arange(nq) if q_at is None else torch.tensor(q_at, dtype=torch.int64)
    j = torch.arange(k.shape[2]) if k_at is None else torch.tensor(k_at, dtype=torch.int64)
    i, j = i.to(q.device), j.to(q.device)
    left, right = case.window
    ahead = j[None] - i[:, None]
    ok = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        ok &= ahead >= -left
    if right >= 0:
        ok &= ahead <= right
    if case.documents:
        borders = torch.tensor(case.documents, device=q.device)
        ok &= torch.bucketize(i, borders, right=True)[:, None] == torch.bucketize(j, borders, right=True)
    s = case.scale * q @ k.repeat_interleave(group, 1).mT
    some = ok.any(-1)
    s = s.masked_fill(~ok, float("-inf")).masked_fill(~some[:, None], 0.0)
    lse = s.logsumexp(-1).masked_fill(~some, float("-inf"))
    p = s.softmax(-1) * some[:, None]
    if case.dropout_p > 0:
        kept = keep_mask(case.seed, case.dropout_p, b, heads, i, j, head_offset=case.head_offset, heads=case.heads)
        p = p * kept / (1 - case.dropout_p)
    return p @ v.repeat_interleave(group, 1), lse


def exact(q, k, v, case, weights, **at):
    """out, lse and the gradients of Σ out · weights[0] + Σ lse · weights[1] over its finite entries, in float64."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = definition(*wide, case, **at)
    finite = lse.isfinite()
    loss = (out * weights[0].double()).sum() + (lse * weights[1].double())[finite].sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, wide)


def state(q, dv):
    """A state that no hop may read before it has written it."""
    rows = q.shape[:3]
    return [torch.full(size, NAN, device=q.device) for size in ((*rows, dv), rows, rows)]


def ring(q, k, v, case, shards, weights, *, tiles=None, wide_out=False):
    """The same by hops: each rank meets the keys of rank after rank, backward their gradients travel with them."""
    world, dv = len(shards), v.shape[3]
    at = [torch.tensor(positions, dtype=torch.int64, device=q.device) for positions, _ in shards]
    queries = [q[:, :, i] for i in at]
    keys = [(k[:, :, i], v[:, :, i]) for i in at]
    results = [torch.full_like(x, NAN, dtype=torch.float32) for x in (q, k, v)]
    out = torch.full((*q.shape[:3], dv), NAN, device=q.device, dtype=torch.float32 if wide_out else q.dtype)
    lse = torch.full(q.shape[:3], NAN, device=q.device)

    def options(rank, source):
        (q_at, q_runs), (k_at, k_runs) = shards[rank], shards[source]
        return case.options(q_at, k_at, q_runs, k_runs, q.device)

    hops = [(rank, (rank - t) % world, t) for t in range(world) for rank in range(world)]
    states = [state(x, dv) for x in queries]
    for rank, source, t in hops:
        last = None, None
        if t == world - 1:
            last = torch.full_like(out[:, :, at[rank]], NAN), torch.full_like(lse[:, :, at[rank]], NAN)
        hop = rb._hop(queries[rank], *keys[source], **options(rank, source))
        rb._launch_forward(hop, *states[rank], *last, first=t == 0, candidates=tiles)
        if t == world - 1:
            out[:, :, at[rank]], lse[:, :, at[rank]] = last
    grads = [torch.full_like(x, NAN, dtype=torch.float32) for x in queries]
    key_grads = [[torch.full_like(x, NAN, dtype=torch.float32) for x in pair] for pair in keys]
    weight_lse = torch.where(lse.isfinite(), weights[1], 0.0)
    delta = (weights[0].float() * out.float()).sum(-1) - weight_lse
    for rank, source, t in hops:
        i = at[rank]
        hop = rb._hop(queries[rank], *keys[source], **options(rank, source))
        given = weights[0][:, :, i].to(q.dtype), lse[:, :, i], delta[:, :, i]
        rb._launch_backward(
            hop, *given, grads[rank], *key_grads[source], first_q=t == 0, first_kv=t == 0,
            query_candidates=tiles, key_candidates=tiles,
        )  # fmt: skip
    for rank in range(world):
        results[0][:, :, at[rank]] = grads[rank]
        results[1][:, :, at[rank]], results[2][:, :, at[rank]] = key_grads[rank]
    return out, lse, *results


def compare(found, expected, rtol=4e-6):
    out, lse, *grads = found
    assert torch.equal(lse.isfinite(), expected[1].isfinite()) and not lse.isnan().any()
    empty = expected[1].isinf()
    assert not out[empty].any() and not grads[0][empty].any()
    assert_close_rel(out, expected[0], rtol=rtol)
    assert_close_rel(lse[~empty], expected[1][~empty], rtol=rtol)
    for name, gradient, reference in zip("qkv", grads, expected[2:], strict=True):
        assert gradient.shape == reference.shape and not gradient.isnan().any(), name
        # Set against what a float32 sum of this size may lose where a gradient is small by cancellation.
        assert (gradient.double() - reference).norm() <= rtol * (reference.norm() + 4), name


def weights_for(q, v):
    return randn(q.device, *q.shape[:3], v.shape[3], dtype=q.dtype), randn(q.device, *q.shape[:3])


def check(tensors, case, shards, rtol=4e-6, **options):
    weights = weights_for(tensors[0], tensors[2])
    with nan_empty():
        found = ring(*tensors, case, shards, weights, **options)
    compare(found, exact(*tensors, case, weights), rtol)
    return found


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rings(layout, mask, device):
    """Lengths that no block divides, on one to four ranks."""
    world = 1 + (list(LAYOUTS).index(layout) + list(MASKS).index(mask)) % 4
    check(make(device, 59, heads=1), MASKS[mask], list(LAYOUTS[layout](59, world)))


@pytest.mark.parametrize(
    ("layout", "world"), [("contiguous", 1), ("contiguous", 3), ("zigzag", 2), ("zigzag", 4), ("striped", 3)]
)
def test_causal_rings_are_sdpa(layout, world, device):
    q, k, v = make(device, 43)
    weights = weights_for(q, v)
    found = ring(q, k, v, Case(window=CAUSAL), list(LAYOUTS[layout](43, world)), weights)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    repeated = wide[0], *(x.repeat_interleave(2, 1) for x in wide[1:])
    out = F.scaled_dot_product_attention(*repeated, is_causal=True, scale=0.25)
    _, lse = definition(*wide, Case(window=CAUSAL))
    loss = (out * weights[0].double()).sum() + (lse * weights[1].double()).sum()
    compare(found, (out.detach(), lse.detach(), *torch.autograd.grad(loss, wide)))


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_tokens_than_ranks(layout, length, device):
    shards = list(LAYOUTS[layout](length, 3))
    assert any(not positions for positions, _ in shards)
    check(make(device, length, heads=1), Case(window=CAUSAL), shards)


def test_cross_attention_over_two_layouts(device):
    """Striped queries of one length against zigzag keys of another."""
    q, k, v = make(device, 30, keys=47, heads=1)
    weights = weights_for(q, v)
    case = Case(window=(5, 20))
    expected = exact(q, k, v, case, weights)
    keys = list(zigzag(47, 2))
    out, lse = torch.full_like(expected[0], NAN), torch.full_like(expected[1], NAN)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    for at, runs in striped(30, 3):
        results = state(q[:, :, at], 16)
        own = [torch.full_like(q[:, :, at], NAN), torch.full_like(q[:, :, at, 0], NAN)]
        for t, (k_at, k_runs) in enumerate(keys):
            options = case.options(at, k_at, runs, k_runs, device)
            ends = own if t == 1 else (None, None)
            rb.ring_block_forward(q[:, :, at], k[:, :, k_at], v[:, :, k_at], *results, *ends, first=t == 0, **options)
        out[:, :, at], lse[:, :, at] = (x.double() for x in own)
    delta = (out * weights[0]).sum(-1) - torch.where(lse.isfinite(), weights[1], 0.0)
    for r, (at, runs) in enumerate(striped(30, 3)):
        dq = torch.full_like(q[:, :, at], NAN)
        for t, (k_at, k_runs) in enumerate(keys):
            dk, dv = grads[1][:, :, k_at], grads[2][:, :, k_at]
            rb.ring_block_backward(
                weights[0][:, :, at], q[:, :, at], k[:, :, k_at], v[:, :, k_at], lse[:, :, at].float(),
                delta[:, :, at].float(), dq, dk, dv, first_q=t == 0, first_kv=r == 0,
                **case.options(at, k_at, runs, k_runs, device),
            )  # fmt: skip
            grads[1][:, :, k_at], grads[2][:, :, k_at] = dk, dv
        grads[0][:, :, at] = dq
    compare((out, lse, *grads), expected)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1), (2, 2)])
def test_groups_of_heads(heads, kv_heads, device):
    check(make(device, 34, b=2, heads=heads, kv_heads=kv_heads), Case(window=CAUSAL), list(zigzag(34, 1)))


@pytest.mark.parametrize(
    ("d", "dv"), [(1, 1), (32, 32), (40, 24), (64, 96), (80, 80), (96, 64), (128, 48), (192, 128), (256, 256)]
)
def test_channels(d, dv, device):
    check(make(device, 21, heads=1, d=d, dv=dv), Case(window=CAUSAL, scale=d**-0.5), list(striped(21, 2)))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 25.0])
def test_scales(scale, device):
    """Below 0, none, and one with logits of hundreds, for which a state carried inexactly would show."""
    check(
        make(device, 39, heads=1), Case(window=CAUSAL, scale=scale), list(zigzag(39, 3)), rtol=max(4e-6, 1e-6 * scale)
    )


def test_rows_with_nothing_allowed(device):
    """On one hop, on all of them, and for whole tiles: 0, -inf and no gradient."""
    q, k, v = make(device, 45, keys=8)
    weights = weights_for(q, v)
    case = Case(window=(0, 0))
    k_at = [4, 5, 6, 7, 36, 37, 38, 39]
    out, lse = torch.full_like(q, NAN), torch.full_like(q[..., 0], NAN)
    results = state(q, 16)
    for n in range(2):
        options = case.options(range(45), k_at[4 * n : 4 * n + 4], (0, 45, 0, 1), (32 * n + 4, 4, 0, 1), device)
        ends = (None, None) if n == 0 else (out, lse)
        part = (x[:, :, 4 * n : 4 * n + 4] for x in (k, v))
        rb.ring_block_forward(q, *part, *results, *ends, first=n == 0, **options)
    delta = (out * weights[0]).sum(-1) - torch.where(lse.isfinite(), weights[1], 0.0)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    options = case.options(range(45), k_at, None, None, device) | {"q_runs": (0, 45, 0, 1), "q_positions": None}
    rb.ring_block_backward(weights[0], q, k, v, lse, delta, *grads, first_q=True, first_kv=True, **options)
    assert lse.isfinite().sum() == 2 * 8
    compare((out, lse, *grads), exact(q, k, v, case, weights, k_at=k_at))


def test_hops_that_see_nothing(device):
    """As the first, in between, as the last, and backward: zeros where something must be written, else nothing."""
    q, k, v = make(device, 20)
    ahead = {"q_runs": (0, 20, 0, 1), "k_runs": (20, 20, 0, 1), "window": CAUSAL, "scale": 0.25}
    here = ahead | {"k_runs": (0, 20, 0, 1)}
    once, lse_once = torch.full_like(q, NAN), torch.full_like(q[..., 0], NAN)
    rb.ring_block_forward(q, k, v, None, None, None, once, lse_once, first=True, **here)
    out, lse = torch.full_like(q, NAN), torch.full_like(q[..., 0], NAN)
    results = state(q, 16)
    for n, hop in enumerate((ahead, here, ahead, ahead)):
        rb.ring_block_forward(q, k, v, *results, *((out, lse) if n == 3 else (None, None)), first=n == 0, **hop)
    assert torch.equal(out, once) and torch.equal(lse, lse_once)
    rb.ring_block_forward(q, k, v, None, None, None, out, lse, first=True, **ahead)
    assert not out.any() and lse.isneginf().all()
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    given = (torch.randn_like(q), q, k, v, lse_once, torch.randn_like(lse))
    rb.ring_block_backward(*given, *grads, first_q=True, first_kv=True, **ahead)
    assert not any(g.any() for g in grads)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    rb.ring_block_backward(*given, *grads, first_q=False, first_kv=False, **ahead)
    assert all(g.isnan().all() for g in grads)


def test_state_of_tiles_that_a_hop_does_not_touch(device):
    """A zigzag hop in which only the tail sees anything: the head's state is neither read nor written."""
    q, k, v = make(device, 64)
    hop = {"q_runs": (0, 32, 96, 1), "k_runs": (32, 64, 0, 1), "window": CAUSAL, "scale": 0.25}
    acc, m, l = results = state(q, 16)  # noqa: E741
    rb.ring_block_forward(q, k, v, *results, None, None, first=True, **hop | {"k_runs": (128, 64, 0, 1)})
    assert not acc.any() and not l.any() and m.isneginf().all()
    for x in results:
        x[:, :, :32] = NAN
    tiles = None if INTERPRET else [{"ROWS": 32, "COLS": 32, "num_warps": 4, "num_stages": 1}]
    rb._launch_forward(rb._hop(q, k, v, **hop), *results, None, None, False, tiles)
    assert all(x[:, :, :32].isnan().all() for x in results)
    expected, lse = definition(q[:, :, 32:].double(), k.double(), v.double(), Case())
    assert_close_rel((acc / l[..., None])[:, :, 32:], expected, rtol=4e-6)
    assert_close_rel((m + l.log())[:, :, 32:], lse, rtol=4e-6)


@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_a_state_is_carried_without_rounding(scale, device):
    """Where the same tiles come in the same order, several hops give the bits of one."""
    q, k, v = make(device, 40, keys=96)
    tiles = [{"ROWS": 32, "COLS": 16, "num_warps": 4, "num_stages": 1}]

    def run(borders):
        out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
        results = state(q, 16)
        for n, (a, b) in enumerate(itertools.pairwise(borders)):
            hop = rb._hop(q, k[:, :, a:b], v[:, :, a:b], q_runs=(0, 40, 0, 1), k_runs=(a, b - a, 0, 1), scale=scale)
            ends = (out, lse) if b == 96 else (None, None)
            rb._launch_forward(hop, *results, *ends, first=n == 0, candidates=tiles)
        return out, lse

    for found, expected in zip(run([0, 16, 48, 64, 96]), run([0, 96]), strict=True):
        assert torch.equal(found, expected)


def test_dropout_is_the_counters(device):
    """Every bit, seen through values that are the identity; heads are some of more."""
    q, k, _ = make(device, 16, b=2, heads=4, kv_heads=2)
    v = torch.eye(16, device=device).expand(2, 2, 16, 16)
    seed = torch.tensor([2**40 + 17], device=device)
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    at = torch.arange(16, device=device)
    rb.ring_block_forward(
        q, k, v, None, None, None, out, lse, first=True, q_runs=(1000, 6, 5000, 3), k_runs=(3, 16, 0, 2), scale=0.1,
        dropout_p=0.4, seed=seed, head_offset=3, heads=9,
    )  # fmt: skip
    q_at = torch.where(at < 6, 1000 + 3 * at, 5000 + 3 * (at - 6))
    kept = keep_mask(seed, 0.4, 2, 4, q_at, 3 + 2 * at, head_offset=3, heads=9)
    assert torch.equal(out != 0, kept)
    assert 0.5 < kept.float().mean() < 0.7
    p = (0.1 * q.double() @ k.double().repeat_interleave(2, 1).mT).softmax(-1)
    assert_close_rel(out, p * kept / 0.6, rtol=4e-6)


@pytest.mark.parametrize("layout", ["zigzag", "striped", "tables"])
def test_dropout_in_rings(layout, device):
    """The same in forward and backward, and lse without it."""
    case = Case(window=(30, 0), dropout_p=0.3, head_offset=2, heads=7)
    check(make(device, 45), case, list(LAYOUTS[layout](45, 2)))


@pytest.mark.parametrize("kind", ["heads_last", "window", "channels_apart", "expanded"])
def test_strided_input(kind, device):
    def view(x):
        if kind == "heads_last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "channels_apart":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if kind == "expanded":
            return x[:, :1].expand_as(x)
        around = torch.full((4, 4, x.shape[2] + 3, 40), NAN, device=device)
        return around[1:3, 1:3, 2:-1, 5 : 5 + x.shape[3]].copy_(x)

    q, k, v = (view(x) for x in make(device, 35, b=2, kv_heads=2, d=24))
    assert not any(x.is_contiguous() for x in (q, k, v))
    weights = weights_for(q, v)
    grad_out = view(torch.randn_like(v))
    options = {"q_runs": (0, 35, 0, 1), "k_runs": (0, 35, 0, 1), "window": CAUSAL, "scale": 0.25}
    out, lse = torch.full(v.shape, NAN, device=device), torch.full(q.shape[:3], NAN, device=device)
    rb.ring_block_forward(q, k, v, None, None, None, out, lse, first=True, **options)
    delta = (out * grad_out).sum(-1) - weights[1]
    grads = [torch.full(x.shape, NAN, device=device) for x in (q, k, v)]
    lse_apart = torch.stack([lse, lse], -1)[..., 0]
    rb.ring_block_backward(grad_out, q, k, v, lse_apart, delta, *grads, first_q=True, first_kv=True, **options)
    compare((out, lse, *grads), exact(q, k, v, Case(window=CAUSAL), (grad_out, weights[1])))


def test_results_are_written_in_place_and_nowhere_else(device):
    """Into views of a buffer that is full of sevens, on several hops."""
    buffers = []

    def guarded(*shape, inner=True):
        padded = [n + 2 for n in shape] if inner else [shape[0] + 2, *shape[1:]]
        buffer = torch.full(padded, 7.0, device=device)
        view = buffer[tuple(slice(1, -1) for _ in shape) if inner else slice(1, -1)]
        view.fill_(NAN)
        buffers.append((buffer, view))
        return view

    q, k, v = make(device, 37, heads=4, kv_heads=2, d=24, dv=12)
    weights = weights_for(q, v)
    shards = list(zigzag(37, 1))
    halves = [(range(0, 20), (0, 20, 0, 1)), (range(20, 37), (20, 17, 0, 1))]
    acc, out = guarded(1, 4, 37, 12), guarded(1, 4, 37, 12)
    m, l, lse = (guarded(1, 4, 37, inner=False) for _ in range(3))  # noqa: E741
    case = Case(window=CAUSAL)
    for n, (at, runs) in enumerate(halves):
        options = case.options(shards[0][0], at, shards[0][1], runs, device)
        ends = (out, lse) if n == 1 else (None, None)
        rb.ring_block_forward(q, k[:, :, at], v[:, :, at], acc, m, l, *ends, first=n == 0, **options)
    delta = (out * weights[0]).sum(-1) - weights[1]
    dq, dk, dv = guarded(1, 4, 37, 24), guarded(1, 2, 37, 24), guarded(1, 2, 37, 12)
    for n, (at, runs) in enumerate(halves):
        options = case.options(shards[0][0], at, shards[0][1], runs, device)
        part = slice(at.start, at.stop)
        rb.ring_block_backward(
            weights[0], q, k[:, :, at], v[:, :, at], lse, delta, dq, dk[:, :, part], dv[:, :, part],
            first_q=n == 0, first_kv=True, **options,
        )  # fmt: skip
    compare((out, lse, dq, dk, dv), exact(q, k, v, case, weights))
    for buffer, view in buffers:
        assert not view.isnan().any()
        view.fill_(7.0)
        assert (buffer == 7).all()


@pytest.mark.parametrize(
    ("rows", "cols"), [(16, 16), (16, 64), (64, 16), (64, 64)] if INTERPRET else [(64, 32), (32, 64), (128, 64)]
)
def test_other_tiles(rows, cols, device):
    tiles = [{"ROWS": rows, "COLS": cols, "num_warps": 4, "num_stages": 1}]
    for layout, mask in (("zigzag", "causal"), ("tables", "documents")):
        check(make(device, 69, heads=1), MASKS[mask], list(LAYOUTS[layout](69, 2)), tiles=tiles)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_precisions_of_float32(precision, device):
    check(make(device, 23), Case(window=CAUSAL, precision=precision), list(zigzag(23, 2)))


@pytest.mark.parametrize(
    ("dtype", "wide_out"), [(torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
def test_sixteen_bit(dtype, wide_out, device):
    """In the interpreter this says that 16-bit loads and stores are right; its products are in float32 there."""
    tensors = make(device, 39, heads=1, d=24, dtype=dtype)
    weights = weights_for(tensors[0], tensors[2])
    found = ring(*tensors, Case(window=CAUSAL), list(zigzag(39, 2)), weights, wide_out=wide_out)
    expected = exact(*tensors, Case(window=CAUSAL), weights)
    assert found[0].dtype == (torch.float32 if wide_out else dtype)
    assert_close_rel(found[0], expected[0], dtype=dtype)
    assert_close_rel(found[1], expected[1], dtype=dtype)
    for gradient, reference in zip(found[2:], expected[2:], strict=True):
        assert gradient.dtype == torch.float32
        assert_close_rel(gradient, reference, rtol=4e-3 if dtype == torch.float16 else 2.5e-2)


def test_repeated_runs_agree_bit_for_bit(device):
    tensors = make(device, 50)
    weights = weights_for(tensors[0], tensors[2])
    first, second = (ring(*tensors, Case(window=CAUSAL), list(zigzag(50, 2)), weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_measuring_configurations_leaves_the_state_alone(monkeypatch, device):
    """An autotuner runs a hop as often as it likes."""

    def pick(name, key, candidates, launch, device):
        hash(key)
        for _ in range(3):
            launch(candidates[0])
        return candidates[0]

    monkeypatch.setattr(_lib, "pick", pick)
    check(make(device, 20, heads=1), Case(window=CAUSAL), list(zigzag(20, 2)))


@pytest.mark.slow
def test_offsets_beyond_32_bits(device):
    """Rows 2^31 elements apart, in memory of which no more than the rows themselves is touched."""
    far = 2**31
    tensors = []
    for _ in range(3):
        x = torch.empty(far + 16, dtype=torch.float16, device=device).as_strided((1, 1, 2, 16), (0, 0, far, 1))
        tensors.append(x.copy_(torch.randn(2, 16)))
    out, lse = torch.empty(1, 1, 2, 16, dtype=torch.float16, device=device), torch.empty(1, 1, 2, device=device)
    options = {"q_runs": (0, 2, 0, 1), "k_runs": (0, 2, 0, 1), "scale": 0.25}
    rb.ring_block_forward(*tensors, None, None, None, out, lse, first=True, **options)
    q, k, v = (x.double() for x in tensors)
    assert_close_rel(out, definition(q, k, v, Case())[0])


@pytest.mark.skipif(INTERPRET, reason="the tiles of a GPU take long in the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_every_launch_configuration(d, dtype, device):
    """All that the autotuner may take on this GPU."""
    tensors = make(device, 700, heads=4, kv_heads=2, d=d, dv=d, dtype=dtype)
    case = Case(window=CAUSAL, scale=d**-0.5)
    weights = weights_for(tensors[0], tensors[2])
    expected = exact(*tensors, case, weights)
    bound = 2e-2 if dtype == torch.bfloat16 else 2e-5
    seen = []
    for kind in (rb._FORWARD, rb._QUERY, rb._KEY):
        seen += rb._candidates(kind, dtype != torch.float32, rb.padded(d), target_of(device))
    for tile in seen:
        for found, reference in zip(
            ring(*tensors, case, list(zigzag(700, 2)), weights, tiles=[tile]), expected, strict=True
        ):
            assert_close_rel(found, reference, rtol=bound)


@pytest.mark.skipif(INTERPRET, reason="the interpreter rounds to bfloat16 towards zero")
@pytest.mark.parametrize("world", [2, 8, 32])
def test_errors_of_bfloat16_do_not_grow_with_hops(world, device):
    tensors = make(device, 1024, heads=4, kv_heads=4, d=64, dv=64, dtype=torch.bfloat16)
    case = Case(scale=0.125)
    weights = weights_for(tensors[0], tensors[2])
    expected = exact(*tensors, case, weights)
    one, many = (ring(*tensors, case, list(contiguous(1024, n)), weights) for n in (1, world))
    errors = [[(x.double() - y).abs() for x, y in zip(found, expected, strict=True)] for found in (one, many)]
    assert errors[1][0].mean() <= 1.02 * errors[0][0].mean()
    assert errors[1][3].max() <= 1.25 * errors[0][3].max()


@pytest.mark.skipif(INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("documents", [(), (0, 100, 130)], ids=["causal", "documents"])
def test_runs_in_a_cuda_graph(documents, device):
    q, k, v = make(device, 300, d=64, dv=64, dtype=torch.bfloat16)
    at, runs = next(contiguous(300, 1))
    options = Case(window=CAUSAL, documents=documents).options(at, at, runs, runs, device)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=device)
    grads = [torch.empty(x.shape, device=device) for x in (q, k, v)]

    def run():
        rb.ring_block_forward(q, k, v, None, None, None, out, lse, first=True, **options)
        rb.ring_block_backward(out, q, k, v, lse, lse, *grads, first_q=True, first_kv=True, **options)

    run()
    expected = [x.clone() for x in (out, lse, *grads)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for x in (out, lse, *grads):
        x.fill_(NAN)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip((out, lse, *grads), expected, strict=True))


def test_supported(device):
    q, k, v = make(device, 3, dtype=torch.bfloat16)
    assert rb.ring_block_supported(q, k, v) is None
    assert rb.ring_block_supported(q.double(), k, v) == "float64"
    assert rb.ring_block_supported(q, k, v.new_empty(1, 1, 3, 257)) == "head dimension 257"
    assert "tokens" in rb.ring_block_supported(q, k[:, :, :1].expand(1, 1, 2**29, 16), v)


REFUSED = [
    ({"q": torch.zeros(1, 2, 3, 16, dtype=torch.float64)}, TypeError, "q must be float32, float16 or bfloat16"),
    ({"k": torch.zeros(1, 1, 4, 16, dtype=torch.float16)}, TypeError, "k must be float32, float16 or bfloat16 as q is"),
    ({"q": torch.zeros(2, 3, 16)}, ValueError, r"q must have shape \(B, H, n, channels\)"),
    ({"v": torch.zeros(1, 1, 4, 300)}, ValueError, "v must have 1 to 256 channels, got 300"),
    ({"v": torch.zeros(1, 1, 5, 16)}, ValueError, r"v must have shape \(1, 1, 4, 16\)"),
    ({"k": torch.zeros(1, 1, 4, 8)}, ValueError, r"k must have shape \(1, 1, 4, 16\)"),
    ({"q": torch.zeros(1, 3, 3, 16), "k": torch.zeros(1, 2, 4, 16), "v": torch.zeros(1, 2, 4, 16)}, ValueError,
     "multiple of the 2 heads"),
    ({"acc": None}, ValueError, "acc must be given"),
    ({"m": None}, ValueError, "m must be given"),
    ({"m": torch.zeros(1, 2, 4)}, ValueError, r"m must have shape \(1, 2, 3\)"),
    ({"l": torch.zeros(1, 2, 6)[..., ::2]}, ValueError, "l is written in place and must be contiguous"),
    ({"acc": torch.zeros(1, 2, 3, 16).half()}, TypeError, "acc must be float32"),
    ({"acc": torch.zeros(1, 2, 16, 3).mT}, ValueError, "acc is written in place and must have neighbouring channels"),
    ({"out": torch.zeros(1, 2, 3, 16)}, ValueError, "out and lse must both be given or both be None, got out alone"),
    ({"q_runs": (0, 4, 0, 1)}, ValueError, r"q_runs must have split in 0 ... 3"),
    ({"k_runs": (0, 4, 0, 0)}, ValueError, "a stride of at least 1"),
    ({"k_runs": (8, 2, 9, 1)}, ValueError, "k_runs must have ascending positions"),
    ({"k_runs": (2**29, 4, 0, 1)}, ValueError, r"k_runs must have ascending positions from 0 to 2\^29"),
    ({"q_positions": torch.arange(3)}, TypeError, "q_positions must be int32"),
    ({"k_positions": torch.arange(3).int()}, ValueError, r"k_positions must have shape \(4,\)"),
    ({"doc_first": torch.arange(4).int()}, ValueError, r"doc_first must have shape \(3,\)"),
    ({"window": (-2, 0)}, ValueError, r"window must be \(left, right\)"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
    ({"dropout_p": 0.5}, ValueError, "seed must be an int64 tensor"),
    ({"head_offset": 1}, ValueError, "head_offset must be in 0 ... 0 for 2 of 2 heads, got 1"),
    ({"precision": "exact"}, ValueError, "precision must be None or one of"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_refuses(change, error, message, device):
    q, k, v = make(device, 3, keys=4)
    arguments = {"q": q, "k": k, "v": v} | dict(zip(("acc", "m", "l"), state(q, 16), strict=True))
    arguments |= {"out": None, "lse": None, "first": True, "q_runs": (0, 3, 0, 1), "k_runs": (0, 4, 0, 1), "scale": 1.0}
    arguments |= {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match=message):
        rb.ring_block_forward(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("grad_out", torch.zeros(1, 2, 3, 16).half(), TypeError, "grad_out must be float32"),
        ("delta", torch.zeros(1, 2, 4), ValueError, r"delta must have shape \(1, 2, 3\)"),
        ("dq", torch.zeros(1, 2, 3, 16).double(), TypeError, "dq must be float32"),
        ("dk", torch.zeros(1, 2, 4, 16), ValueError, r"dk must have shape \(1, 1, 4, 16\)"),
        ("dv", torch.zeros(1, 1, 16, 4).mT, ValueError, "dv is written in place"),
    ],
)
def test_backward_refuses(name, value, error, message, device):
    q, k, v = make(device, 3, keys=4)
    stats = torch.zeros(1, 2, 3, device=device)
    arguments = {"grad_out": q, "q": q, "k": k, "v": v, "lse": stats, "delta": stats}
    arguments |= {"dq": q.clone(), "dk": k.clone(), "dv": v.clone(), "first_q": True, "first_kv": True}
    arguments |= {"q_runs": (0, 3, 0, 1), "k_runs": (0, 4, 0, 1), "scale": 1.0, name: value.to(device)}
    with pytest.raises(error, match=message):
        rb.ring_block_backward(**arguments)
