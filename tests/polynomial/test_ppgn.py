"""PPGN and PPGN++ against 1 × 1 convolutions graph by graph, as the official code is built, and what they promise."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchlayers import BackendError, last_dispatch
from torchlayers._backend import interpreted
from torchlayers.polynomial import reference
from torchlayers.polynomial.functional import (
    _padded_matmul,
    pair_linear,
    pair_mlp,
    pair_readout,
    segment_matmul,
)
from torchlayers.polynomial.modules import PPGN, PPGNBlock, PPGNConv
from torchlayers.polynomial.pairs import PairBatch, PairLayout
from torchlayers.testing import assert_close_rel, relative_error

SIZES = (4, 1, 6, 0, 3, 4)


def packed(channels, sizes=SIZES, dtype=torch.float64, requires_grad=False):
    layout = PairLayout.from_sizes(sizes)
    x = torch.randn(layout.num_pairs, channels, dtype=dtype)
    return PairBatch(x.requires_grad_() if requires_grad else x, layout)


# ------------------------------------------------------------------ the networks in the manner of the official code


class _MLP(nn.Module):
    def __init__(self, c, h, depth):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c if k == 0 else h, h, 1) for k in range(depth))

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return x


class _Skip(nn.Module):
    def __init__(self, c, h):
        super().__init__()
        self.conv = nn.Conv2d(c, h, 1)


class _Block(nn.Module):
    """Channels first, (1, C, n, n)."""

    def __init__(self, c, h, plus=True, depth=2):
        super().__init__()
        self.plus, c = plus, c + plus
        self.mlp1, self.mlp2 = _MLP(2 * c if plus else c, h, depth), _MLP(c, h, depth)
        self.skip = _Skip(c + h, h)

    def forward(self, x, scale=1.0):
        u = x
        if self.plus:
            x = torch.cat([x, torch.eye(x.shape[-1], dtype=x.dtype).expand(x.shape[0], 1, -1, -1)], 1)
            u = torch.cat([x, x.transpose(-1, -2)], 1)
        return self.skip.conv(torch.cat([x, scale * torch.matmul(self.mlp1(u), self.mlp2(x))], 1))


class _Full(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.fc = nn.Linear(i, o)


class _Network(nn.Module):
    def __init__(self, c, h, out, layers, plus=True, suffix=None, sums=False):
        super().__init__()
        self.plus, self.sums = plus, sums
        self.reg_blocks = nn.ModuleList(_Block(h if k else c, h, plus) for k in range(layers))
        shapes = [(2 * h, out)] * layers if sums else [(2 * h, suffix or h), (suffix or h, out)]
        self.fc_layers = nn.ModuleList(_Full(*shape) for shape in shapes)

    def pool(self, x):
        n = x.shape[-1]
        diagonal = torch.diagonal(x, dim1=-2, dim2=-1)
        if not self.plus:
            off = x.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
            return torch.cat([diagonal.amax(-1), off.amax((-1, -2))], 1)
        total = diagonal.sum(-1)
        return torch.cat([total / n, (x.sum((-1, -2)) - total) / (n * (n - 1))], 1)

    def forward(self, x):
        out = 0
        for k, block in enumerate(self.reg_blocks):
            x = block(x)
            if self.sums:
                out = out + self.fc_layers[k].fc(self.pool(x))
        if self.sums:
            return out
        return self.fc_layers[1].fc(self.fc_layers[0].fc(self.pool(x)).relu())


def block_pair(c, h, plus, depth, **options):
    torch.manual_seed(1)
    theirs = _Block(c, h, plus, depth).double()
    ours = PPGNBlock(c, h, depth, plus, dtype=torch.float64, **options)
    renamed = {k.replace(".convs", "").replace("skip.conv", "skip"): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict({k: v.flatten(1) if v.ndim == 4 else v for k, v in renamed.items()})
    return ours, theirs


def graph_by_graph(theirs, batch, scale):
    return torch.cat(
        [
            theirs(g.permute(2, 0, 1)[None], scale(g.shape[0]))[0].permute(1, 2, 0).flatten(0, 1)
            for g in batch.unbatch()
            if g.shape[0]
        ]
    )


# ------------------------------------------------------------------------------------------------------------ the block


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_block_against_convolutions(plus, depth):
    ours, theirs = block_pair(3, 5, plus, depth)
    batch = packed(3, requires_grad=True)
    got, want = ours(batch).x, graph_by_graph(theirs, batch, lambda n: 1)
    assert_close_rel(got, want, rtol=1e-13)
    weight = torch.randn_like(want)
    of_ours = torch.autograd.grad((got * weight).sum(), [batch.x, *ours.parameters()])
    of_theirs = torch.autograd.grad((want * weight).sum(), [batch.x, *theirs.parameters()])
    for ours_, theirs_ in zip(of_ours, of_theirs, strict=True):
        assert_close_rel(ours_, theirs_.view(ours_.shape), rtol=1e-12)
    # The definition says the same.
    mlp1, mlp2 = ([(layer.weight, layer.bias) for layer in mlp] for mlp in (ours.mlp1, ours.mlp2))
    defined = reference.ppgn_block(batch.x, mlp1, mlp2, ours.skip.weight, ours.skip.bias, SIZES, plus)
    assert_close_rel(defined, want, rtol=1e-13)


@pytest.mark.parametrize(("scale", "power"), [("none", 0), ("sqrt_n", 0.5), ("n", 1)])
@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan"), float("inf")])
def test_dense_is_packed_whatever_the_padding_holds(scale, power, garbage):
    ours, theirs = block_pair(3, 5, True, 2, scale=scale)
    batch = packed(3)
    want = graph_by_graph(theirs, batch, lambda n: n**-power)
    assert_close_rel(ours(batch).x, want, rtol=1e-13)
    x, mask = batch.to_dense(fill=garbage)
    x.requires_grad_()
    out = ours(x, mask)
    pairs = mask[:, :, None] & mask[:, None, :]
    assert_close_rel(out[pairs], want, rtol=1e-13)
    assert not out[~pairs].any()
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.isfinite().all() and not grad[~pairs].any() and grad[pairs].any()


def test_dense_takes_any_batch_dimensions_and_no_mask():
    block = PPGNBlock(3, 4, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, 3, dtype=torch.float64)
    want = block(x.flatten(0, 1), torch.ones(6, 5, dtype=torch.bool)).unflatten(0, (2, 3))
    assert_close_rel(block(x), want)
    assert_close_rel(block(x[1, 2]), want[1, 2])
    flipped = x.flip(-1).transpose(2, 3).contiguous().transpose(2, 3).flip(-1)
    assert_close_rel(block(flipped), want)


def test_layer_norm_is_torchs_pair_by_pair():
    block = PPGNBlock(3, 8, norm="layer", dtype=torch.float64)
    plain = PPGNBlock(3, 8, dtype=torch.float64)
    plain.load_state_dict(block.state_dict(), strict=False)
    with torch.no_grad():
        block.norm.weight.uniform_(), block.norm.bias.uniform_()
    batch = packed(3)
    want = nn.functional.layer_norm(plain(batch).x, (8,), block.norm.weight, block.norm.bias)
    assert_close_rel(block(batch).x, want)
    x, mask = batch.to_dense(fill=float("nan"))
    assert_close_rel(PairBatch.from_dense(block(x, mask), mask).x, want)
    block.reset_parameters()
    assert (block.norm.weight == 1).all() and PPGNConv is PPGNBlock


# ------------------------------------------------------------------------------------------------------ the operations


@given(sizes=st.lists(st.integers(0, 5), max_size=5), flags=st.tuples(st.booleans(), st.booleans()))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_segment_matmul_is_an_einsum_per_graph(sizes, flags):
    a, b = packed(2, sizes, requires_grad=True), packed(2, sizes, requires_grad=True)
    options = {"transpose_a": flags[0], "transpose_b": flags[1]}
    y = segment_matmul(a.x, b.x, a.layout, scale="n", **options)
    equation = f"{'jic' if flags[0] else 'ijc'},{'kjc' if flags[1] else 'jkc'}->ikc"
    parts = [torch.einsum(equation, p, q) / max(len(p), 1) for p, q in zip(a.unbatch(), b.unbatch(), strict=True)]
    want = torch.cat([part.flatten(0, 1) for part in parts]) if parts else a.x
    assert_close_rel(y, want, rtol=1e-14)
    assert_close_rel(_padded_matmul(a.x, b.x, a.layout, *flags, 1.0), want, rtol=1e-14)
    if not flags[0] and not flags[1]:
        assert_close_rel(reference.segment_matmul(a.x, b.x, sizes, 1.0) if sizes else y, want, rtol=1e-14)


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (2, 2)])
def test_segment_matmul_is_differentiable_twice(flags, sizes):
    a, b = packed(2, sizes, requires_grad=True), packed(2, sizes, requires_grad=True)

    def product(x, y):
        return segment_matmul(x, y, a.layout, transpose_a=flags[0], transpose_b=flags[1], scale="sqrt_n")

    assert torch.autograd.gradcheck(product, (a.x, b.x))
    assert torch.autograd.gradgradcheck(product, (a.x, b.x))
    only_b = torch.autograd.grad(product(a.x.detach(), b.x).sum(), b.x)[0]
    assert_close_rel(only_b, torch.autograd.grad(product(a.x, b.x).sum(), b.x)[0])


def test_dense_products_and_their_transposes():
    a, b = torch.randn(2, 2, 3, 4, 4, 5, dtype=torch.float64)
    for flags in ((False, False), (True, False), (False, True), (True, True)):
        equation = f"bg{'jic' if flags[0] else 'ijc'},bg{'kjc' if flags[1] else 'jkc'}->bgikc"
        got = segment_matmul(a, b, transpose_a=flags[0], transpose_b=flags[1], scale="sqrt_n")
        assert_close_rel(got, torch.einsum(equation, a, b) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_products_are_in_float32(dtype):
    n = 300
    layout = PairLayout.from_sizes([n])
    a = torch.zeros(n * n, 1, dtype=dtype)
    a.view(n, n)[0] = 1
    # 1 + 1 + … stalls at 256 in bfloat16 and is rounded to even numbers above 2048 in float16.
    total = segment_matmul(a, a.view(n, n).T.reshape(-1, 1) * 8, layout)[0]
    assert total.item() == torch.tensor(8 * n).to(dtype).item()
    ones = torch.ones(n * n, 1, dtype=dtype)
    assert pair_readout(ones, layout)[0].tolist() == [1, 1]
    assert pair_readout(ones.view(n, n, 1)).tolist() == [1, 1]


@pytest.mark.parametrize("pool", ["mean", "add", "max"])
def test_readout_in_both_layouts(pool):
    batch = packed(3, requires_grad=True)
    want = reference.pair_readout(batch.x, SIZES, pool)
    assert want.shape == (6, 6)
    assert not want[1, 3:].any() and not want[3].any()
    got = pair_readout(batch.x, batch.layout, pool=pool)
    assert_close_rel(got, want)
    weight = torch.randn_like(want)
    grads = [torch.autograd.grad((y * weight).sum(), batch.x)[0] for y in (got, want)]
    assert_close_rel(*grads)
    x, mask = batch.to_dense(fill=float("nan"))
    x = x.detach().requires_grad_()
    dense = pair_readout(x, mask=mask, pool=pool)
    assert_close_rel(dense, want)
    (grad,) = torch.autograd.grad((dense * weight).sum(), x)
    pairs = mask[:, :, None] & mask[:, None, :]
    assert_close_rel(grad[pairs], grads[1])
    assert not grad[~pairs].any()
    one = batch.unbatch()[2]
    assert_close_rel(pair_readout(one, pool=pool), want[2])


def test_functions_in_both_layouts_are_the_definition():
    batch = packed(3)
    mlp1 = [
        (torch.randn(4, 8).double(), torch.randn(4).double()),
        (torch.randn(5, 4).double(), torch.randn(5).double()),
    ]
    mlp2 = [(torch.randn(5, 4).double(), torch.randn(5).double())]
    want = reference.pair_mlp(batch.x, mlp1, mlp2, SIZES)
    got = pair_mlp(batch.x, mlp1, mlp2, batch.layout)
    for g, w in zip(got, want, strict=True):
        assert_close_rel(g, w)
    one, of_one = batch.unbatch()[2], want[0].split([n * n for n in SIZES])[2]
    assert_close_rel(pair_mlp(one, mlp1, mlp2)[0], of_one.view(6, 6, 5))
    weight, bias = torch.randn(2, 9).double(), torch.randn(2).double()
    got = pair_linear(batch.x, want[0], weight, bias, batch.layout)
    assert_close_rel(got, reference.pair_linear(batch.x, want[0], weight, bias, SIZES))


# ---------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((3, 95, 1, 8), 495_521),  # ZINC
        ((11, 110, 12, 6), 496_222),  # Alchemy
        ((1, 75, 16, 4, True, 55), 147_201),  # strongly regular graphs
        ((16, 32, 1, 3), 22_433),
    ],
)
def test_parameters_of_the_official_configurations(arguments, count):
    *first, head = arguments if len(arguments) == 6 else (*arguments, True, None)
    model = PPGN(*first, head_channels=head, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("plus", "sums"), [(True, False), (False, True), (False, False)])
def test_reference_state_dict(plus, sums):
    torch.manual_seed(3)
    theirs = _Network(3, 6, 2, 3, plus, suffix=7, sums=sums).double()
    prefix = "module." if sums else ""
    ours = PPGN.from_reference_state_dict({prefix + k: v for k, v in theirs.state_dict().items()})
    assert (ours.plus, ours.num_layers, ours.in_channels, ours.readout) == (plus, 3, 3, "jk_sum" if sums else "last")
    batch = packed(3, (4, 2, 5))
    want = torch.cat([theirs(g.permute(2, 0, 1)[None]) for g in batch.unbatch()])
    assert_close_rel(ours(batch), want, rtol=1e-13)
    assert_close_rel(ours(*batch.to_dense(fill=float("nan"))), want, rtol=1e-13)


def test_reference_state_dict_that_is_none():
    good = _Network(3, 6, 2, 2).state_dict()
    for change, name in (
        ({"extra": torch.ones(1)}, "extra"),
        ({"reg_blocks.1.mlp1.convs.0.weight": torch.ones(5, 14, 1, 1)}, "blocks.1.mlp1.0.weight"),
    ):
        with pytest.raises(ValueError, match=name):
            PPGN.from_reference_state_dict({**good, **change})
    lacking = {k: v for k, v in good.items() if k != "reg_blocks.1.skip.conv.bias"}
    with pytest.raises(ValueError, match=r"blocks\.1\.skip\.bias"):
        PPGN.from_reference_state_dict(lacking)
    with pytest.raises(ValueError, match="fc_layers"):
        PPGN.from_reference_state_dict({k: v for k, v in good.items() if k.startswith("reg")})


@pytest.mark.parametrize("pool", ["mean", "add", "max"])
@pytest.mark.parametrize("readout", ["last", "jk_sum"])
def test_packed_is_dense_is_graph_by_graph(pool, readout):
    model = PPGN(3, 6, 2, 3, pool=pool, readout=readout, scale="sqrt_n", dtype=torch.float64)
    batch = packed(3)
    want = torch.cat([model(g[None]) for g in batch.unbatch()])
    assert_close_rel(model(batch), want, rtol=1e-13)
    assert_close_rel(model(*batch.to_dense(fill=float("nan"))), want, rtol=1e-13)
    single = copy.deepcopy(model).float()
    of_single = single(batch.with_x(batch.x.float()))
    assert_close_rel(of_single, want, rtol=1e-5)
    assert_close_rel(single(*batch.with_x(batch.x.float()).to_dense(float("nan"))), want, rtol=1e-5)


@pytest.mark.parametrize("readout", ["last", "jk_sum"])
def test_equivariance_on_directed_input(readout):
    model = PPGN(3, 6, 2, 2, readout=readout, dtype=torch.float64)
    x = torch.randn(7, 7, 3, dtype=torch.float64)
    order = torch.randperm(7)
    moved = x[order][:, order]
    assert_close_rel(model(moved), model(x), rtol=1e-12)
    assert_close_rel(model.embed(moved), model.embed(x)[order][:, order], rtol=1e-12)
    assert relative_error(model(x.transpose(0, 1)), model(x)) > 1e-3
    batch = PairBatch(x.flatten(0, 1), PairLayout.from_sizes([7]))
    assert_close_rel(model.embed(batch).x, model.embed(x).flatten(0, 1))


def test_blocks_multiply_by_the_transpose():
    # Σ_j x[i, j] x[k, j] needs it: with weights set by hand one block of PPGN++ gives exactly that, for x >= 0.
    block = PPGNBlock(1, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.mlp1[0].weight[0, 2] = 1  # [x, I, xᵀ, I]
        block.mlp2[0].weight[0, 0] = 1
        block.skip.weight[0, 2] = 1
    x = torch.rand(5, 5, dtype=torch.float64)
    assert_close_rel(block(x[..., None])[..., 0], x.T @ x)


def circulant(n, steps):
    x = torch.zeros(n, n, dtype=torch.float64)
    for s in steps:
        for i in range(n):
            x[i, (i + s) % n] = x[(i + s) % n, i] = 1
    return x


def torus(steps):
    """The Cayley graph of Z4 × Z4 of these steps and their negatives."""
    x = torch.zeros(16, 16, dtype=torch.float64)
    for i in range(16):
        for a, b in steps:
            for sign in (1, -1):
                x[i, (i // 4 + sign * a) % 4 * 4 + (i + sign * b) % 4] = 1
    return x


def test_what_is_told_apart():
    model = PPGN(1, 16, 4, 3, dtype=torch.float64)
    two_triangles = torch.block_diag(circulant(3, [1]), circulant(3, [1]))
    hexagon = circulant(6, [1])
    assert relative_error(model(hexagon[..., None]), model(two_triangles[..., None])) > 1e-3
    # Strongly regular graphs of equal parameters are not: that takes more than 3-WL.
    shrikhande = torus([(0, 1), (1, 0), (1, 1)])
    rook = torus([(0, 1), (0, 2), (1, 0), (2, 0)])
    for graph in (shrikhande, rook):
        assert torch.equal(graph @ graph, 2 + 4 * torch.eye(16, dtype=torch.float64))
    assert relative_error(model(shrikhande[..., None]), model(rook[..., None])) < 1e-12


def test_pyg_data_and_batches():
    data = pytest.importorskip("torch_geometric.data")
    edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graphs = [
        data.Data(x=torch.randn(3, 2), edge_index=edge_index),
        data.Data(x=torch.randn(5, 2), edge_index=edge_index),
    ]
    model = PPGN(3, 4, 2, 2)
    batch = data.Batch.from_data_list(graphs)
    want = model(PairBatch.from_data_list(graphs))
    assert_close_rel(model(batch), want)
    assert_close_rel(model(graphs[1]), want[1:])


def test_batches_of_nothing():
    model = PPGN(3, 4, 2, 2)
    for batch in (packed(3, [], torch.float32), packed(3, [0, 0], torch.float32)):
        batch.x.requires_grad_()
        out = model(batch)
        assert out.shape == (batch.num_graphs, 2)
        out.sum().backward()
    assert model(torch.randn(2, 0, 0, 3)).shape == (2, 2)
    assert model(torch.randn(0, 4, 4, 3), torch.ones(0, 4, dtype=torch.bool)).shape == (0, 2)
    assert model(torch.randn(2, 4, 4, 3), torch.zeros(2, 4, dtype=torch.bool)).isfinite().all()


# ------------------------------------------------------------------------------------ compilers, dtypes, choice


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"plus": False, "pool": "max", "readout": "jk_sum", "scale": "n"}, marks=pytest.mark.slow)],
)
def test_packed_batches_compile_as_one_graph_for_all_sizes(options):
    model = PPGN(3, 4, 2, 1, dtype=torch.float64, **options)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        # Dynamo's own, at every torch.autograd.Function that it traces.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        for sizes in ((4, 2, 3), (6, 2), (2, 7, 3, 6), (3, 3, 3)):
            batch = packed(3, sizes, requires_grad=True)
            want = model(batch)
            grads = torch.autograd.grad(want.sum(), [batch.x, *model.parameters()])
            got = compiled(PairBatch(batch.x, PairLayout.from_sizes(sizes)))
            assert_close_rel(got, want)
            for g, w in zip(torch.autograd.grad(got.sum(), [batch.x, *model.parameters()]), grads, strict=True):
                assert_close_rel(g, w, rtol=1e-12)
    torch._dynamo.reset()
    assert counter.frame_count <= 2


def test_autocast_on_packed_pairs():
    model = PPGN(3, 16, 2, 2)
    batch = packed(3, dtype=torch.float32, requires_grad=True)
    want = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(batch)
    assert_close_rel(got, want, rtol=0.05)
    grads = [torch.autograd.grad(y.float().square().sum(), list(model.parameters())) for y in (got, want)]
    for g, w in zip(*grads, strict=True):
        assert g.dtype == torch.float32
        assert_close_rel(g, w, rtol=0.1)


def test_trains_under_checkpointing():
    model, batch = PPGN(3, 4, 2, 2, dtype=torch.float64), packed(3, requires_grad=True)
    want = torch.autograd.grad(model(batch).sum(), [batch.x, *model.parameters()])
    out = torch.utils.checkpoint.checkpoint(model, batch, use_reentrant=False)
    for g, w in zip(torch.autograd.grad(out.sum(), [batch.x, *model.parameters()]), want, strict=True):
        assert_close_rel(g, w)


def test_gradients_of_the_network():
    model, batch = PPGN(2, 2, 1, 1, dtype=torch.float64), packed(2, (3, 1, 2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(batch.with_x(x)), (batch.x,))
    assert torch.autograd.gradgradcheck(lambda x: model(batch.with_x(x)), (batch.x,))


@pytest.mark.skipif(interpreted(), reason="the interpreter runs kernels on a CPU")
def test_kernels_are_refused_on_a_cpu():
    block, batch = PPGNBlock(3, 4, backend="triton"), packed(3, dtype=torch.float32)
    with pytest.raises(BackendError, match="pair_mlp"):
        block(batch)
    PPGNBlock(3, 4)(batch)
    assert last_dispatch().startswith("torch: ")


BLOCK_LAYERS = [(torch.ones(4, 8), torch.ones(4))]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("mask", lambda: PPGN(3, 4, 1, 1)(packed(3, dtype=torch.float32), torch.ones(6, 6).bool())),
        ("in_channels = 3", lambda: PPGN(3, 4, 1, 1)(packed(2, dtype=torch.float32))),
        ("x must be a tensor", lambda: PPGN(3, 4, 1, 1)([1])),
        ("head_channels", lambda: PPGN(3, 4, 1, 1, readout="jk_sum", head_channels=3)),
        ("x must have dimensions", lambda: pair_readout(torch.ones(4, 3))),
        ("layout", lambda: pair_readout(torch.ones(4, 3), [2])),
        ("the layout's pairs", lambda: pair_readout(torch.ones(4, 3), PairLayout.from_sizes([3]))),
        ("mask", lambda: pair_readout(torch.ones(4, 3), PairLayout.from_sizes([2]), mask=torch.ones(1, 2).bool())),
        ("pool", lambda: pair_readout(torch.ones(2, 2, 3), pool="sum")),
        ("b must have the shape", lambda: segment_matmul(torch.ones(2, 2, 3), torch.ones(2, 2, 4))),
        ("b must have the dtype", lambda: segment_matmul(torch.ones(2, 2, 3), torch.ones(2, 2, 3).double())),
        ("scale", lambda: segment_matmul(torch.ones(2, 2, 3), torch.ones(2, 2, 3), scale="N")),
        ("mlp2[0] weight", lambda: pair_mlp(torch.ones(2, 2, 3), BLOCK_LAYERS, BLOCK_LAYERS)),
        ("mlp1 must be", lambda: pair_mlp(torch.ones(2, 2, 3), [], BLOCK_LAYERS)),
        ("mlp1[0] weight", lambda: pair_mlp(torch.ones(2, 2, 3).double(), BLOCK_LAYERS, BLOCK_LAYERS)),
        ("weight", lambda: pair_linear(torch.ones(2, 2, 3), torch.ones(2, 2, 4), torch.ones(2, 7), torch.ones(2))),
        ("bias", lambda: pair_linear(torch.ones(2, 2, 3), torch.ones(2, 2, 4), torch.ones(2, 8), torch.ones(3))),
        ("y must have", lambda: pair_linear(torch.ones(2, 2, 3), torch.ones(4, 4), torch.ones(2, 8), torch.ones(2))),
    ],
)
def test_bad_input_is_named(name, call):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert name in str(error.value)


# ----------------------------------------------------------------------------------------- with the kernels inside


@pytest.mark.gpu
@pytest.mark.interpret
@pytest.mark.parametrize("plus", [True, False])
def test_block_of_kernels_in_both_layouts(device, plus):
    block = PPGNBlock(3, 5, plus=plus, scale="sqrt_n")
    exact = copy.deepcopy(block).double()
    block.backend, exact.backend = "triton", "torch"
    block, batch = block.to(device), packed(3, (3, 1, 4, 0))
    want = exact(batch).x
    weight = torch.randn_like(want)
    of_exact = torch.autograd.grad((want * weight).sum(), list(exact.parameters()))
    x, mask = batch.with_x(batch.x.float()).to_dense(fill=float("nan"))
    dense = block(x.to(device), mask.to(device)).cpu()
    assert last_dispatch() == "triton: pair_linear"
    got = block(PairBatch(batch.x.float().to(device), batch.layout.to(device))).x
    assert last_dispatch() == "triton: pair_linear"
    for y in (got.cpu(), PairBatch.from_dense(dense, mask).x):
        assert_close_rel(y, want)
        of_ours = torch.autograd.grad((y * weight).sum(), list(block.parameters()))
        for g, w in zip(of_ours, of_exact, strict=True):
            assert_close_rel(g, w, rtol=1e-5)
