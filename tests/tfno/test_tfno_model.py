"""The backbone against neuraloperator 2.0.0 (real data, even grids, unchanged size: where that is right)."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from torchlayers.testing import assert_close_rel
from torchlayers.tfno import TFNO, FNOBlocks, SpectralConv, from_neuralop, truncated_irfftn

CONFIGS = {
    "tucker": {},
    "cp": {"factorization": "CP", "rank": 0.2},
    "tt, one layer": {"factorization": "TT", "rank": 0.3, "n_layers": 1},
    "dense": {"factorization": None},
    "instance norm, gated skip": {"norm": "instance_norm", "fno_skip": "soft-gating"},
    "group norm, preactivation": {"norm": "group_norm", "preactivation": True},
    "batch norm, identity skip": {"norm": "batch_norm", "fno_skip": "identity", "channel_mlp_skip": "linear"},
    "no skips": {"fno_skip": None, "channel_mlp_skip": None},
    "preactivation, no skips": {"preactivation": True, "fno_skip": None, "channel_mlp_skip": None},
    "no mlp": {"use_channel_mlp": False},
    "padded": {"domain_padding": 0.25},
    "padded by axis, no grid": {"domain_padding": [0.1, 0.3], "positional_embedding": None},
    "separable": {"separable": True},
    "tanh, linear lifting": {"stabilizer": "tanh", "lifting_channel_ratio": 0, "projection_channel_ratio": 1},
    "incremental": {"max_n_modes": (10, 8)},
    "relu, dropout": {"non_linearity": torch.relu, "channel_mlp_dropout": 0.1, "channel_mlp_expansion": 1.0},
}


def randomised(model):
    """Gates of one and biases of zero would hide what is not applied."""
    for p in model.parameters():
        if p.ndim == 1 or p.shape[0] == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_go_both_ways(name):
    models = pytest.importorskip("neuralop.models")
    shape = {"n_modes": (8, 6), "in_channels": 2, "out_channels": 3, "hidden_channels": 8, "n_layers": 2}
    arguments = {**shape, "implementation": "factorized", **CONFIGS[name]}
    theirs = randomised(models.TFNO(**arguments))
    x = torch.randn(2, 2, 16, 20)
    expected = theirs(x)
    ours = from_neuralop(theirs)
    assert not ours.training
    assert_close_rel(ours(x), expected, rtol=2e-6)

    state = theirs.state_dict()
    assert "_metadata" in state
    assert_close_rel(from_neuralop(state).eval()(x), expected, rtol=2e-6)
    plain = TFNO(**arguments)
    plain.load_state_dict(state)
    assert_close_rel(plain.eval()(x), expected, rtol=2e-6)

    assert {conv.implementation for conv in theirs.fno_blocks.convs} <= {"factorized", "reconstructed"}
    assert {conv.implementation for conv in ours.fno_blocks.convs} == {"auto"}
    chosen = from_neuralop(state, implementation="factorized").eval()
    assert {conv.implementation for conv in chosen.fno_blocks.convs} == {"factorized"}
    assert_close_rel(chosen(x), expected, rtol=2e-6)

    saved = ours.state_dict()
    assert sorted(saved) == sorted(key for key in state if key != "_metadata")
    again = models.TFNO(**arguments).eval()
    again.load_state_dict(saved)
    assert_close_rel(again(x), expected, rtol=1e-7)


@pytest.mark.parametrize(("modes", "grid"), [((8,), (20,)), ((4, 6, 4), (8, 10, 8))])
def test_one_and_three_dimensions(modes, grid):
    models = pytest.importorskip("neuralop.models")
    theirs = models.FNO(modes, 2, 1, hidden_channels=6, n_layers=2)
    x = torch.randn(2, 2, *grid)
    ours = TFNO.from_neuralop(theirs)
    assert ours.fno_blocks.convs[0].factorization is None
    assert_close_rel(ours(x), theirs(x), rtol=1e-6)


def test_coordinates_in_sixteen_bits_are_rounded_once():
    for dtype, n in ((torch.bfloat16, 1000), (torch.float16, 70_000)):
        grid = TFNO((4,), 1, 1, 4).positional_embedding(torch.zeros(1, 1, n, dtype=dtype))
        torch.testing.assert_close(grid[0, 1], (torch.arange(n) / n).to(dtype), rtol=0, atol=0)


def test_ada_in_equals_neuraloperators_blocks():
    layers = pytest.importorskip("neuralop.layers.fno_block")
    arguments = {"n_modes": (4, 4), "n_layers": 2, "norm": "ada_in", "ada_in_features": 3}
    theirs, ours = layers.FNOBlocks(4, 4, **arguments), FNOBlocks(4, 4, **arguments)
    ours.load_state_dict(theirs.state_dict())
    x, embedding = torch.randn(2, 4, 8, 8), torch.randn(3)
    with pytest.raises(ValueError, match="embedding must be set"):
        ours(x)
    theirs.set_ada_in_embeddings(embedding)
    ours.set_ada_in_embeddings(embedding)
    for index in (0, 1):
        assert_close_rel(ours(x, index), theirs(x, index), rtol=2e-6)
    with pytest.raises(ValueError, match="embeddings must be 1 or 4"):
        ours.set_ada_in_embeddings(embedding, embedding)


def test_from_neuralop_of_a_convolution_and_of_strangers():
    neuralop = pytest.importorskip("neuralop.layers.spectral_convolution")
    options = {"factorization": "cp", "max_n_modes": (10, 10), "implementation": "factorized"}
    theirs = neuralop.SpectralConv(3, 5, (8, 7), bias=False, **options)
    ours = from_neuralop(theirs)
    assert isinstance(ours, SpectralConv) and ours.n_modes == theirs.n_modes
    assert ours.implementation == "auto"
    assert from_neuralop(theirs, implementation="factorized").implementation == "factorized"
    x = torch.randn(2, 3, 16, 16)
    assert_close_rel(ours(x), theirs(x), rtol=1e-6)
    with pytest.raises(TypeError, match="source must be a neuraloperator FNO"):
        from_neuralop(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="source must be a neuraloperator model or state dict"):
        from_neuralop("model.pt")
    with pytest.raises(ValueError, match="'_metadata'"):
        from_neuralop({"lifting.fcs.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("factorization", [None, "cp", "tucker", "tt"])
def test_joint_factorization(factorization):
    """The joint model is the model whose layers hold the slices of the joint tensor."""
    options = {"hidden_channels": 6, "n_layers": 3, "norm": "group_norm", "dtype": torch.float64}
    joint = TFNO((4, 6), 1, 2, factorization=factorization, rank=0.3, joint_factorization=True, **options)
    full = joint.fno_blocks.joint_weights.to_tensor()
    assert full.shape == (3, 6, 6, 4, 4)
    dense = TFNO((4, 6), 1, 2, factorization=None, **options)
    state = {k: v for k, v in joint.state_dict().items() if "joint_weights" not in k}
    state |= {f"fno_blocks.convs.{i}.weight.tensor": full[i].detach() for i in range(3)}
    dense.load_state_dict(state)
    x = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    y = joint(x)
    assert_close_rel(y, dense(x), rtol=1e-12)
    y.square().sum().backward()
    dense(x).square().sum().backward()
    grads = [parameter.grad for conv in dense.fno_blocks.convs for parameter in conv.weight.parameters()]
    stacked = torch.view_as_complex(torch.stack(grads))
    wanted = torch.autograd.grad(full, list(joint.fno_blocks.joint_weights.parameters()), stacked)
    for parameter, grad in zip(joint.fno_blocks.joint_weights.parameters(), wanted, strict=True):
        assert_close_rel(parameter.grad, grad, rtol=1e-10)


def test_joint_factorization_compresses():
    joint = TFNO((16, 16), 1, 1, 32, rank=0.01, joint_factorization=True, fixed_rank_modes=[0])
    spectral = sum(p.numel() for p in joint.fno_blocks.joint_weights.parameters())
    dense = sum(p.numel() for p in FNOBlocks(32, 32, (16, 16), n_layers=4).convs.parameters())
    assert dense / spectral > 50
    assert joint.fno_blocks.joint_weights.weight.rank[0] == 4


@pytest.mark.parametrize("grid", [(16, 15), (17, 18)])
def test_a_linear_model_commutes_with_a_change_of_resolution(grid):
    """Without nonlinearity a band-limited field gives the same function on every grid, skips included."""
    options = {"positional_embedding": None, "non_linearity": nn.Identity(), "use_channel_mlp": True}
    model = TFNO((5, 5), 2, 1, 4, n_layers=2, fno_skip="linear", dtype=torch.float64, **options)
    for mlp in model.fno_blocks.channel_mlp:
        mlp.non_linearity = nn.Identity()
    spectrum = torch.randn(1, 2, 5, 3, dtype=torch.complex128)
    fine = tuple(2 * n for n in grid)
    x, x_fine = truncated_irfftn(spectrum, grid), truncated_irfftn(spectrum, fine)
    torch.testing.assert_close(model(x, output_shape=fine), model(x_fine))
    torch.testing.assert_close(model(x, output_shape=[fine, None]), model(x_fine))
    torch.testing.assert_close(model(x_fine)[..., ::2, ::2], model(x))


def test_resolution_scaling_and_padding():
    x = torch.randn(1, 1, 10, 12)
    model = TFNO((4, 4), 1, 1, 4, n_layers=2, resolution_scaling_factor=[2, 1.5], domain_padding=0.2)
    assert model(x).shape == (1, 1, 30, 36)
    assert model(x, output_shape=(21, 25)).shape == (1, 1, 21, 25)
    per_axis = FNOBlocks(2, 2, (4, 4), resolution_scaling_factor=[[2, 1]])
    assert per_axis(torch.randn(1, 2, 6, 6)).shape == (1, 2, 12, 6)


@pytest.mark.parametrize("factors", [[[0.5] * 2] * 2, [[1.5, 0.6], [0.9, 2.0]], [[2.3, 1 / 3], [1.0, 1.7]]])
@pytest.mark.parametrize("padding", [0.05, 0.25, [0.3, 0.11]])
def test_padding_has_no_part_in_the_size(factors, padding):
    model = TFNO((4, 4), 1, 1, 2, n_layers=2, resolution_scaling_factor=factors, domain_padding=padding)
    for grid in [(7, 9), (10, 11), (15, 8), (13, 17)]:
        size = grid
        for layer in factors:
            size = tuple(round(r * n) for r, n in zip(layer, size, strict=True))
        assert model(torch.zeros(1, 1, *grid)).shape[2:] == size


@pytest.mark.parametrize("factor", [0.5, 1.5, 2, 2.3])
def test_what_is_cut_off_is_the_padding(factor):
    """Where the model is the identity, the ones of the domain are ones at any resolution, up to their ringing edge."""
    model = TFNO(
        (4,), 1, 1, 1, n_layers=1, domain_padding=0.5, resolution_scaling_factor=factor, positional_embedding=None,
        use_channel_mlp=False, fno_skip="identity", lifting_channel_ratio=0, non_linearity=nn.Identity(),
        projection_channel_ratio=1, dtype=torch.float64,
    )  # fmt: skip
    for name, p in model.named_parameters():
        nn.init.constant_(p, float(name.endswith("weight")))
    for p in model.fno_blocks.convs.parameters():
        nn.init.zeros_(p)
    y = model(torch.ones(1, 1, 31, dtype=torch.float64))
    assert y.shape == (1, 1, round(factor * 31))
    edge = round(4 * max(factor, 1))
    assert (y[..., edge:-edge] - 1).abs().max() < 0.1
    assert (y - 1).abs().max() < 0.6  # 0.5 at the jump itself; a point of padding would be near 0


@pytest.mark.parametrize("norm", [None, "instance_norm", "group_norm", "batch_norm"])
def test_empty_batch_reaches_every_parameter(norm):
    model = TFNO((4, 4), 1, 2, 4, n_layers=2, norm=norm)
    x = torch.zeros(0, 1, 8, 9, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 2, 8, 9)
    y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_complex_data():
    model = TFNO((4, 4), 2, 1, 4, n_layers=2, complex_data=True, norm="instance_norm", stabilizer="tanh")
    x = torch.randn(2, 2, 9, 8, dtype=torch.complex64)
    y = model(x)
    assert y.shape == (2, 1, 9, 8) and y.is_complex() and y.isfinite().all()
    shifted = TFNO((4, 4), 2, 1, 4, complex_data=True, positional_embedding=None)
    rolled = torch.roll(x, (2, 3), (2, 3))
    assert_close_rel(shifted(rolled), torch.roll(shifted(x), (2, 3), (2, 3)), rtol=1e-5)
    with pytest.raises(TypeError, match="x must have a complex dtype"):
        model(x.real)


def test_gradcheck_of_a_model():
    for joint in (False, True):
        model = TFNO((3, 4), 1, 1, 3, n_layers=2, rank=0.4, joint_factorization=joint, dtype=torch.float64)
        x = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(model, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(model, (x,), fast_mode=True)


@pytest.mark.parametrize("joint", [False, True])
def test_compile_and_export(joint):
    model = TFNO((4, 4), 1, 1, 4, n_layers=2, rank=0.3, joint_factorization=joint, domain_padding=0.2).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 9):
        x = torch.randn(batch, 1, 9, 8, requires_grad=True)
        y = compiled(x)
        assert_close_rel(y, model(x), rtol=2e-6)
        (g,) = torch.autograd.grad(y.square().sum(), x)
        (want,) = torch.autograd.grad(model(x).square().sum(), x)
        assert_close_rel(g, want, rtol=2e-5)
    assert counter.frame_count <= 2  # nn.Linear: one for the first batch size, one for all others
    torch._dynamo.reset()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(3, 1, 9, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 1, 9, 8)
    assert_close_rel(program.module()(x), model(x), rtol=2e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own import
def test_inductor():
    layer = SpectralConv(2, 2, (4, 4), factorization="tucker", rank=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 2, 8, 9)
    y = compiled(x)
    y.square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert_close_rel(y, layer(x), rtol=2e-6)
    for g, p in zip(got, layer.parameters(), strict=True):
        assert_close_rel(g, p.grad, rtol=2e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own import
@pytest.mark.parametrize("joint", [False, True])
def test_inductor_compiles_a_whole_model(joint):
    options = {"domain_padding": 0.2, "norm": "group_norm", "joint_factorization": joint}
    model = TFNO((4, 4), 1, 1, 4, n_layers=2, rank=0.3, **options)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 1, 9, 8, requires_grad=True)
    leaves = [x, *model.parameters()]
    y, want = compiled(x), model(x)
    assert_close_rel(y, want, rtol=2e-6)
    cotangent = torch.randn_like(y)
    got, expected = (torch.autograd.grad(out, leaves, cotangent) for out in (y, want))
    for g, e in zip(got, expected, strict=True):
        assert_close_rel(g, e, rtol=5e-5)
    torch._dynamo.reset()


def test_copies_and_reset(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = TFNO((4, 4), 1, 1, 4, n_layers=2, rank=0.3, joint_factorization=True)
    x = torch.randn(1, 1, 8, 8)
    y = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), y)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = TFNO((4, 4), 1, 1, 4, n_layers=2, rank=0.3, joint_factorization=True)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(other(x), y)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.reset_parameters()
    fixed = ("weights", "channel_mlp_skips.0.weight", "channel_mlp_skips.1.weight")
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n]) and not n.endswith(fixed)] == []
    meta = TFNO((4, 4), 1, 1, 4, n_layers=2, rank=0.3, device="meta")
    assert meta(x.to("meta")).shape == y.shape
    meta.to_empty(device="cpu").reset_parameters()
    assert meta(x).isfinite().all()


def test_checkpointing_and_autocast():
    from torch.utils.checkpoint import checkpoint

    model = TFNO((4, 4), 1, 1, 4, n_layers=2, norm="group_norm")
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close_rel(model(x), model(x), dtype=torch.bfloat16)
        y = model(x)
    assert_close_rel(y, model(x), rtol=5e-2)


def test_incremental_modes_of_a_model():
    model = TFNO((4, 4), 1, 1, 4, n_layers=2, max_n_modes=(8, 5))
    model.n_modes = (8, 8)
    assert model.n_modes == (8, 8) and model.fno_blocks.convs[1].n_modes == [8, 5]
    with pytest.raises(ValueError, match="at most max_n_modes"):
        model.n_modes = (10, 8)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "norm must be one of", {"norm": "layer_norm"}),
        (ValueError, "fno_skip must be one of", {"fno_skip": "lineer"}),
        (ValueError, "stabilizer must be one of", {"stabilizer": "relu"}),
        (ValueError, "positional_embedding must be one of", {"positional_embedding": "sin"}),
        (ValueError, "domain_padding must have 2 entries", {"domain_padding": [0.1]}),
        (ValueError, "domain_padding must not be negative", {"domain_padding": -0.1}),
        (ValueError, "resolution_scaling_factor must have n_layers", {"resolution_scaling_factor": [2, 2, 2]}),
        (ValueError, "n_layers must be at least 1", {"n_layers": 0}),
        (ValueError, "channel_mlp_expansion must be finite and leave at least one", {"channel_mlp_expansion": -1}),
        (ValueError, "channel_mlp_expansion .* for out_channels = 4, got 0", {"channel_mlp_expansion": 0}),
        (ValueError, r"channel_mlp_expansion .* got 0\.1", {"channel_mlp_expansion": 0.1}),
        (ValueError, "channel_mlp_expansion .* got inf", {"channel_mlp_expansion": float("inf")}),
        (ValueError, "rank must not be far above full", {"rank": 100}),
        (TypeError, "n_modes must be a sequence of ints, got 4.0", {"n_modes": 4.0}),
        (ValueError, "factorization must be one of", {"factorization": "svd"}),
        (ValueError, "fno_block_precision must be one of", {"fno_block_precision": "low"}),
        (TypeError, "ada_in_features must be an int", {"norm": "ada_in"}),
        (ValueError, "conv_module must be SpectralConv", {"joint_factorization": True, "conv_module": nn.Conv2d}),
    ],
)
def test_bad_constructor_arguments(error, match, options):
    with pytest.raises(error, match=match):
        TFNO(**{"n_modes": (4, 4), "in_channels": 1, "out_channels": 1, "hidden_channels": 4, "n_layers": 2, **options})


def test_bad_calls():
    model = TFNO((4, 4), 2, 1, 4, n_layers=2)
    with pytest.raises(ValueError, match="x must have in_channels = 2 at dimension 1, got 3"):
        model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        model(torch.zeros(1, 2, 8))
    with pytest.raises(TypeError, match="x must have a real floating-point dtype"):
        model(torch.zeros(1, 2, 8, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must have a real floating-point dtype"):
        model(torch.zeros(1, 2, 8, 8, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"precision of the parameters, torch\.float32, got torch\.float64"):
        model(torch.zeros(1, 2, 8, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"precision of the parameters, torch\.float64, got torch\.float32"):
        FNOBlocks(3, 3, (4, 4), dtype=torch.float64)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="output_shape must have 2 entries, one a layer"):
        model(torch.zeros(1, 2, 8, 8), output_shape=[(8, 8)] * 3)
    padded = TFNO((4, 4), 2, 1, 4, n_layers=2, domain_padding=0.2)
    for shape, name in (((8,), "output_shape"), ([(8,), None], r"output_shape\[0\]")):
        with pytest.raises(ValueError, match=f"{name} must have 2 entries, got 1"):
            padded(torch.zeros(1, 2, 8, 8), output_shape=shape)
    assert padded(torch.zeros(1, 2, 8, 8), output_shape=12).shape == (1, 1, 12, 12)
    with pytest.raises(TypeError, match="x must have a real floating-point dtype"):
        FNOBlocks(3, 3, (4, 4))(torch.zeros(1, 3, 8, 8, dtype=torch.complex64))
    with pytest.raises(TypeError, match="x must have a complex dtype"):
        FNOBlocks(3, 3, (4, 4), complex_data=True)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="x must have in_channels = 3"):
        FNOBlocks(3, 3, (4, 4))(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="index must be in"):
        FNOBlocks(3, 3, (4, 4))(torch.zeros(1, 3, 8, 8), 1)
    with pytest.raises(ValueError, match="out_channels must equal in_channels = 3 for n_layers"):
        FNOBlocks(3, 4, (4, 4), n_layers=2)
    with pytest.raises(ValueError, match="skip connection 'soft-gating'"):
        FNOBlocks(3, 4, (4, 4))
