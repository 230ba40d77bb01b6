"""Equivariant polynomials: features of dense graphs, counts on sparse ones, and a PPGN++ block on ragged batches.

- features: the 12 polynomials of degree 5 and 6 that PPGN++ cannot compute, of one molecule-sized graph on a CPU and of
  a batch on a GPU, against one ``torch.einsum`` per pattern and graph, as the official code has it (torch searches a
  path by opt_einsum each time), the same without opt_einsum, and opt_einsum expressions whose paths were searched
  beforehand. Ours gives integers exactly; the peers have float32.
- sparse: triangles and K4 on networkx.barabasi_albert_graph(20000, 5, seed=0), against scipy's and networkx's.
- block: forward and backward at the shape that the paper trains on ZINC with, batches of sizes drawn like ZINC's and of
  equal sizes, against the official block (1 × 1 convolutions on a batch padded to its largest graph), compiled. Only
  the sum over all pairs leaves the block, so that packed and padded outputs can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ._harness import BOTH, FORWARD, Built, Case

# ---------------------------------------------------------------- features

EQUATIONS = (
    "ab,ac,ad,bc,cd->bd",
    "ab,ac,ad,bc,bd,cd->", "ab,ac,ad,bc,bd,cd->a", "ab,ac,ad,bc,bd,cd->ab",
    "ab,bc,bd,be,cd,ce->de",
    "ab,bd,be,cd,ce,de->ac", "ab,bd,be,cd,ce,de->ca", "ab,bd,be,cd,ce,de->bc", "ab,bd,be,cd,ce,de->cb",
    "ab,ad,ae,bc,cd,de->be", "ab,ad,ae,bc,cd,de->eb",
    "ac,ad,ae,bc,bd,be->cd",
)  # fmt: skip


def make_graphs(graphs: int, n: int, device: torch.device, kind: str) -> torch.Tensor:
    """(G, n, n) int64 adjacency: "molecule", a path with chords, n + n / 8 edges; "random", every third pair."""
    generator = torch.Generator().manual_seed(0)
    adj = torch.zeros(graphs, n, n, dtype=torch.int64)
    if kind == "random":
        adj = (torch.rand(graphs, n, n, generator=generator) < 1 / 3).long().triu(1)
    else:
        steps = torch.arange(n - 1)
        adj[:, steps, steps + 1] = 1
        for graph in adj:
            for length in (2, *[4, 5] * (n // 16)):
                start = int(torch.randint(0, max(n - length, 1), (1,), generator=generator))
                graph[start, min(start + length, n - 1)] = 1
    return (adj + adj.mT).clamp(max=1).to(device)


def _joined(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """(G, everything): the values of all patterns side by side."""
    return torch.cat([v.flatten(1) if v.ndim > 1 else v[:, None] for v in values], dim=1)


def _batched(equation: str) -> str:
    operands, output = equation.split("->")
    return ",".join(f"z{pair}" for pair in operands.split(",")) + f"->z{output}"


def features_reference(adj: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pairwise from left to right, in float64: whole numbers below 2^53, so exact."""
    wide = adj.double()
    values = []
    for equation in EQUATIONS:
        operands, output = equation.split("->")
        pairs = operands.split(",")
        value, names = wide, pairs[0]
        for i, pair in enumerate(pairs[1:], 2):
            kept = sorted(set(names + pair) & set("".join(pairs[i:]) + output)) if i < len(pairs) else list(output)
            value = torch.einsum(f"z{names},z{pair}->z{''.join(kept)}", value, wide)
            names = "".join(kept)
        values.append(value)
    return (_joined(values),)


def features_ours(adj: torch.Tensor) -> Built:
    from torchlayers.polynomial import Pattern, evaluate

    patterns = []
    for equation in EQUATIONS:
        operands, output = equation.split("->")
        arcs = [(ord(a) - ord("a"), ord(b) - ord("a")) for a, b in operands.split(",")]
        patterns.append(Pattern(arcs, [ord(v) - ord("a") for v in output]))
    return Built(lambda: _joined(evaluate(patterns, adj)))


def _einsum(adj: torch.Tensor, path_search: bool) -> Built:
    import torch.backends.opt_einsum as settings

    if path_search and not settings.is_available():
        raise ModuleNotFoundError("opt_einsum is not installed", name="opt_einsum")
    x = adj.float()
    graphs = list(x) if x.device.type == "cpu" else None  # on a GPU the batch at once: one launch for all graphs

    def run() -> torch.Tensor:
        before = settings.enabled
        settings.enabled = path_search
        try:
            if graphs is None:
                return _joined([torch.einsum(_batched(e), *[x] * (e.count(",") + 1)) for e in EQUATIONS])
            rows = [[torch.einsum(e, *[g] * (e.count(",") + 1)) for e in EQUATIONS] for g in graphs]
            return _joined([torch.stack(values) for values in zip(*rows, strict=True)])
        finally:
            settings.enabled = before

    return Built(run)


def searched_paths(adj: torch.Tensor) -> Built:
    """opt_einsum expressions: the best path for each pattern, found beforehand."""
    import opt_einsum

    x = adj.float()
    calls = [
        (opt_einsum.contract_expression(_batched(e), *[tuple(x.shape)] * (e.count(",") + 1), optimize="optimal"), e)
        for e in EQUATIONS
    ]
    return Built(lambda: _joined([call(*[x] * (e.count(",") + 1), backend="torch") for call, e in calls]))


FEATURE_PEERS = {
    "torch.einsum": functools.partial(_einsum, path_search=True),
    "torch.einsum without opt_einsum": functools.partial(_einsum, path_search=False),
    "opt_einsum, paths searched before": searched_paths,
}


def _features(graphs: int, n: int, kind: str, **more: Any) -> Case:
    return Case(
        labels={"what": "features", "graphs": graphs, "n": n, "kind": kind},
        inputs=lambda device: make_graphs(graphs, n, device, kind),
        reference=features_reference,
        ours=features_ours,
        peers=FEATURE_PEERS,
        tolerance=1e-6,
        modes=(FORWARD,),
        **more,
    )


# ---------------------------------------------------------------- sparse graphs


class Sparse(NamedTuple):
    """Edges (2, E) in the order of the rows, both directions, and the number of nodes."""

    edges: torch.Tensor
    n: int

    def tensor(self) -> torch.Tensor:
        ones = torch.ones_like(self.edges[0])
        return torch.sparse_coo_tensor(self.edges, ones, (self.n, self.n), is_coalesced=True, check_invariants=False)

    def scipy(self) -> Any:
        import numpy as np
        import scipy.sparse

        row, column = self.edges.cpu().numpy()
        return scipy.sparse.csr_matrix((np.ones(len(row), dtype=np.int64), (row, column)), (self.n, self.n))

    def networkx(self) -> Any:
        import networkx

        graph = networkx.Graph(self.edges.T.tolist())
        graph.add_nodes_from(range(self.n))
        return graph


def make_sparse(n: int, device: torch.device) -> Sparse:
    """networkx.barabasi_albert_graph(n, 5, seed=0)."""
    import networkx

    edges = torch.tensor(list(networkx.barabasi_albert_graph(n, 5, seed=0).edges)).T
    edges = torch.cat([edges, edges.flip(0)], dim=1)
    order = (edges[0] * n + edges[1]).argsort()
    return Sparse(edges[:, order].to(device), n)


def sparse_reference(inputs: Sparse, what: str) -> tuple[torch.Tensor, ...]:
    """By sets: the common neighbours of an edge's ends, and the edges among them."""
    near: list[set[int]] = [set() for _ in range(inputs.n)]
    pairs = inputs.edges.T.tolist()
    for u, v in pairs:
        near[u].add(v)
    common = [near[u] & near[v] for u, v in pairs]
    if what == "K4 per edge":
        counts = [sum(len(near[w] & both) for w in both) for both in common]
    else:
        counts = [len(both) for both in common]
    value = torch.tensor(counts, dtype=torch.float64)
    if what == "triangles per node":
        value = torch.zeros(inputs.n, dtype=torch.float64).index_add(0, inputs.edges[0].cpu(), value)
    return (value.to(inputs.edges.device),)


def sparse_ours(inputs: Sparse, what: str) -> Built:
    from torchlayers.polynomial import Pattern, evaluate

    pattern = {
        "triangles per edge": Pattern.clique(3, (0, 1)),
        "triangles per node": Pattern.clique(3, (0,)),
        "K4 per edge": Pattern.clique(4, (0, 1)),
    }[what]
    adj = inputs.tensor()
    if what == "triangles per node":
        return Built(lambda: evaluate(pattern, adj))
    return Built(lambda: evaluate(pattern, adj).values())


def scipy_triangles(inputs: Sparse, what: str) -> Built:
    """The masked product of sparse matrices, (A @ A) ∘ A."""
    import numpy as np

    adj = inputs.scipy()
    row, column = inputs.edges.cpu().numpy()

    def run() -> torch.Tensor:
        product = (adj @ adj).multiply(adj)
        if what == "triangles per node":
            return torch.from_numpy(np.asarray(product.sum(axis=1)).ravel())
        return torch.from_numpy(np.asarray(product[row, column]).ravel())  # edges on no triangle are not stored

    return Built(run)


def networkx_triangles(inputs: Sparse) -> Built:
    import networkx

    graph = inputs.networkx()

    def run() -> torch.Tensor:
        found = networkx.triangles(graph)
        return 2 * torch.tensor([found[v] for v in range(inputs.n)])

    return Built(run)


def networkx_cliques(inputs: Sparse) -> Built:
    """networkx lists cliques by size; those of four nodes count for each of their edges, twice for the order."""
    import networkx

    graph = inputs.networkx()
    place = {(u, v): i for i, (u, v) in enumerate(inputs.edges.T.tolist())}

    def run() -> torch.Tensor:
        counts = [0] * len(place)
        for clique in networkx.enumerate_all_cliques(graph):
            if len(clique) > 4:
                break
            if len(clique) == 4:
                for u in clique:
                    for v in clique:
                        if u != v:
                            counts[place[u, v]] += 2
        return torch.tensor(counts)

    return Built(run)


def _sparse(n: int, what: str, **more: Any) -> Case:
    peers: dict[str, Callable[[Sparse], Built]]
    if what == "K4 per edge":
        peers = {"networkx.enumerate_all_cliques": networkx_cliques}
    else:
        peers = {"scipy (A @ A).multiply(A)": functools.partial(scipy_triangles, what=what)}
        if what == "triangles per node":
            peers["networkx.triangles"] = networkx_triangles
    return Case(
        labels={"what": what, "n": n},
        inputs=lambda device: make_sparse(n, device),
        reference=functools.partial(sparse_reference, what=what),
        ours=functools.partial(sparse_ours, what=what),
        peers=peers,
        tolerance=0.0,
        modes=(FORWARD,),
        **more,
    )


# ---------------------------------------------------------------- the block

# mlp1 and mlp2 of two layers each, then the layer that joins the input and the product: weight and bias of each.
NAMES = ("mlp1.0", "mlp1.1", "mlp2.0", "mlp2.1", "skip")


class Block(NamedTuple):
    """Packed pairs x (T, C) of graphs of ``sizes``, parameters in the order of NAMES, and the cotangent g (C,).

    ``gain`` (C,) multiplies x before the block: its gradient needs the whole gradient of the block's input.
    """

    x: torch.Tensor
    sizes: tuple[int, ...]
    gain: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    g: torch.Tensor


def make_block(
    sizes: Sequence[int], channels: int, device: torch.device, dtype: torch.dtype = torch.float32, precise: bool = True
) -> Block:
    """A block with weights of the official code's variance. ``precise`` sets, for the whole process, that float32
    products keep float32's digits; otherwise tf32 may be used, by all."""
    torch.set_float32_matmul_precision("highest" if precise else "high")
    torch.backends.cudnn.allow_tf32 = not precise
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    c = channels + 1
    inputs = {"mlp1.0": 2 * c, "mlp1.1": channels, "mlp2.0": c, "mlp2.1": channels, "skip": c + channels}
    weights = []
    for name in NAMES:
        std = (2 / (channels + inputs[name])) ** 0.5
        weights += [normal(channels, inputs[name], std=std), normal(channels, std=0.1)]
    pairs = sum(n * n for n in sizes)
    return Block(normal(pairs, channels), tuple(sizes), normal(channels), tuple(weights), normal(channels))


def block_reference(inputs: Block) -> tuple[torch.Tensor, ...]:
    """The sum over all pairs of the block's output, graph by graph in float64, and gradients of gain and weights."""
    gain, *weights = leaves = [t.double().requires_grad_() for t in (inputs.gain, *inputs.weights)]
    w = dict(zip(NAMES, zip(weights[::2], weights[1::2], strict=True), strict=True))

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        for layer in (f"{name}.0", f"{name}.1"):
            x = F.linear(x, *w[layer]).relu()
        return x

    total = torch.zeros_like(gain)
    for x, n in zip(inputs.x.double().split([n * n for n in inputs.sizes]), inputs.sizes, strict=True):
        eye = torch.eye(n, dtype=torch.float64, device=x.device)[..., None]
        u = torch.cat([(x * gain).view(n, n, -1), eye], dim=-1)
        m1, m2 = mlp(torch.cat([u, u.transpose(0, 1)], dim=-1), "mlp1"), mlp(u, "mlp2")
        y = torch.einsum("ijc,jkc->ikc", m1, m2)
        total = total + F.linear(torch.cat([u, y], dim=-1), *w["skip"]).sum((0, 1))
    return total.detach(), *torch.autograd.grad(total, leaves, inputs.g.double())


def _leaves(inputs: Block) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in (inputs.gain, *inputs.weights)]


def block_ours(inputs: Block) -> Built:
    from torchlayers.polynomial import PairBatch, PairLayout, PPGNBlock

    channels = inputs.x.shape[-1]
    block = PPGNBlock(channels, channels, device=inputs.x.device, dtype=inputs.x.dtype)
    layout = PairLayout.from_sizes(inputs.sizes, device=inputs.x.device)
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        for i, name in enumerate(NAMES):
            parameters[f"{name}.weight"].copy_(inputs.weights[2 * i])
            parameters[f"{name}.bias"].copy_(inputs.weights[2 * i + 1])
    gain = inputs.gain.detach().clone().requires_grad_()
    leaves = [gain, *(parameters[f"{name}.{kind}"] for name in NAMES for kind in ("weight", "bias"))]
    return Built(lambda: block(PairBatch(inputs.x * gain, layout)).x.sum(0), leaves, inputs.g)


def _padded(inputs: Block, compiled: bool) -> Built:
    """The official block: (B, C, N, N) with 1 × 1 convolutions, padded to the largest graph."""
    from torch.nn.utils.rnn import pad_sequence

    n, device, dtype = max(inputs.sizes), inputs.x.device, inputs.x.dtype
    graphs = inputs.x.split([m * m for m in inputs.sizes])
    padded = [F.pad(x.view(m, m, -1), (0, 0, 0, n - m, 0, n - m)) for x, m in zip(graphs, inputs.sizes, strict=True)]
    x = pad_sequence(padded, batch_first=True).permute(0, 3, 1, 2).contiguous()
    there = torch.arange(n, device=device) < torch.tensor(inputs.sizes, device=device)[:, None]
    mask = (there[:, :, None] & there[:, None, :])[:, None].to(dtype)
    eye = torch.eye(n, device=device, dtype=dtype).expand(len(inputs.sizes), 1, n, n)
    leaves = _leaves(inputs)

    def forward(x: torch.Tensor, gain: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        w = dict(zip(NAMES, zip(weights[::2], weights[1::2], strict=True), strict=True))

        def conv(x: torch.Tensor, name: str) -> torch.Tensor:
            weight, bias = w[name]
            return F.conv2d(x, weight[:, :, None, None], bias)

        x = torch.cat([x * gain[:, None, None], eye], dim=1)
        m1 = conv(conv(torch.cat([x, x.mT], dim=1), "mlp1.0").relu(), "mlp1.1").relu() * mask
        m2 = conv(conv(x, "mlp2.0").relu(), "mlp2.1").relu() * mask
        out = conv(torch.cat([x, m1 @ m2], dim=1), "skip") * mask
        return out.sum((0, 2, 3))

    run = torch.compile(forward, fullgraph=True) if compiled else forward
    return Built(lambda: run(x, *leaves), leaves, inputs.g)


BLOCK_PEERS = {
    "padded, compiled": functools.partial(_padded, compiled=True),
    "padded": functools.partial(_padded, compiled=False),
}


def block_work(sizes: Sequence[int], channels: int, dtype: torch.dtype, precise: bool = True) -> dict[str, Any]:
    """14 C² operations a pair in the layers and 2 n³ C in the products, twice that again backward.

    Bytes: the pairs in, once more where they are differentiated by, and out, and the weights.
    """
    pairs, triples = sum(n**2 for n in sizes), sum(n**3 for n in sizes)
    flops = 14 * channels**2 * pairs + 2 * channels * triples
    weights = 7 * channels**2
    math = "bf16" if dtype == torch.bfloat16 else "tf32x3" if precise else "tf32"
    size = dtype.itemsize
    return {
        FORWARD: {"flops": flops, "bytes": (2 * channels * pairs + weights) * size, "math": math},
        BOTH: {"flops": 3 * flops, "bytes": (4 * channels * pairs + 2 * weights) * size, "math": math},
    }


def molecule_sizes(graphs: int) -> tuple[int, ...]:
    """Sizes with the mean, spread and range of ZINC's: normal (23.2, 4.5), from 9 to 38."""
    drawn = 23.2 + 4.5 * torch.randn(graphs, generator=torch.Generator().manual_seed(0))
    return tuple(drawn.round().clamp(9, 38).long().tolist())


def _block(
    sizes: Sequence[int],
    channels: int,
    kind: str,
    dtype: torch.dtype = torch.float32,
    precise: bool = True,
    peers: Sequence[str] = tuple(BLOCK_PEERS),
    **more: Any,
) -> Case:
    words = {torch.bfloat16: "bf16", torch.float32: "fp32" if precise else "fp32, tf32 allowed"}
    return Case(
        labels={"what": "block", "graphs": len(sizes), "C": channels, "sizes": kind, "dtype": words[dtype]},
        inputs=lambda device: make_block(sizes, channels, device, dtype, precise),
        reference=block_reference,
        ours=block_ours,
        peers={name: BLOCK_PEERS[name] for name in peers},
        work=block_work(sizes, channels, dtype, precise),
        tolerance=1e-1 if dtype == torch.bfloat16 else 1e-3 if precise else 1e-2,
        **more,
    )


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        ragged, equal = molecule_sizes(128), (24,) * 128
        yield _block(ragged, 95, "like ZINC", headline=True, quick=True)
        yield _block(ragged, 95, "like ZINC", precise=False, headline=True)
        yield _block(ragged, 95, "like ZINC", torch.bfloat16, headline=True)
        yield _block(equal, 95, "equal")
        yield _block(equal, 95, "equal", precise=False)
        yield _block(equal, 95, "equal", torch.bfloat16)
        yield _block(molecule_sizes(512), 32, "like ZINC", precise=False)
        yield _features(128, 38, "molecule")
        yield _features(128, 38, "random")
        return
    yield _features(1, 13, "molecule", quick=True)
    yield _features(1, 38, "molecule", headline=True)
    yield _features(1, 38, "random", headline=True)
    for n in (5_000, 10_000, 20_000):
        yield _sparse(n, "triangles per edge", scale="n", headline=n == 20_000)
        yield _sparse(n, "K4 per edge", scale="n", headline=n == 20_000)
    yield _sparse(20_000, "triangles per node")
    yield _block(molecule_sizes(32), 95, "like ZINC", peers=["padded"])
