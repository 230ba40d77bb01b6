"""e3nn's channel-wise tensor products taken over: values, gradients and second derivatives, weights and files."""

import copy
import pickle
import warnings

import pytest
import torch

pytest.importorskip("e3nn", reason="the oracle is e3nn")

from torchlayers.gaunt.irreps import e3nn_o3
from torchlayers.gaunt.take_over import ExactTensorProduct

o3 = e3nn_o3()

EACH = {"shared_weights": False}
IRREPS = "4x0e+4x1o+4x2e+4x1e"
EDGE = "1x0e+1x1o+1x2e"
MIXED1, MIXED2, MIXED_OUT = "3x0e+2x1o+3x1o+2x2e", "3x0e+2x1o+3x2e+2x0o", "2x1o+3x2e+3x0e+2x2o+3x1o+1x0o"


def coupled(irreps1, irreps2, irreps_out, mode, has_weight=True):
    """Every instruction of a mode that irreps and multiplicities allow."""
    first, second, out = map(o3.Irreps, (irreps1, irreps2, irreps_out))
    found = []
    for i, (u, a) in enumerate(first):
        for j, (v, b) in enumerate(second):
            for k, (w, c) in enumerate(out):
                if c in a * b and u == w and (mode == "uvu" or u == v):
                    found.append((i, j, k, mode, has_weight, 0.5 + len(found) % 3))
    return found


def product(irreps1, irreps2, irreps_out, instructions, **options):
    torch.set_default_dtype(torch.float64)  # else e3nn keeps its coefficients in float32 precision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.script, which e3nn compiles with, is deprecated
            return o3.TensorProduct(irreps1, irreps2, irreps_out, instructions, **options)
    finally:
        torch.set_default_dtype(torch.float32)


def some_weighted(instructions):
    return [(*ins[:4], bool(n % 2), *ins[5:]) for n, ins in enumerate(instructions)]


CASES = {
    "uuu": (IRREPS, IRREPS, IRREPS, coupled(IRREPS, IRREPS, IRREPS, "uuu"), {}),
    "uvu": (IRREPS, EDGE, IRREPS, coupled(IRREPS, EDGE, IRREPS, "uvu"), {}),
    "uuu, a set of weights a sample": (IRREPS, IRREPS, IRREPS, coupled(IRREPS, IRREPS, IRREPS, "uuu"), EACH),
    "uvu, a set of weights a sample": (IRREPS, EDGE, IRREPS, coupled(IRREPS, EDGE, IRREPS, "uvu"), EACH),
    "uuu, mixed multiplicities": (MIXED1, MIXED2, MIXED_OUT, coupled(MIXED1, MIXED2, MIXED_OUT, "uuu"), {}),
    "uvu, several second channels": (MIXED1, MIXED2, MIXED_OUT, coupled(MIXED1, MIXED2, MIXED_OUT, "uvu"), {}),
    "uvu, several second channels, a set a sample": (
        MIXED1, MIXED2, MIXED_OUT, coupled(MIXED1, MIXED2, MIXED_OUT, "uvu"), EACH,
    ),
    "no weights": (IRREPS, IRREPS, IRREPS, coupled(IRREPS, IRREPS, IRREPS, "uuu", False), {}),
    "some weights": (MIXED1, MIXED2, MIXED_OUT, some_weighted(coupled(MIXED1, MIXED2, MIXED_OUT, "uvu")), {}),
    "external weights": (
        IRREPS, IRREPS, IRREPS, coupled(IRREPS, IRREPS, IRREPS, "uuu")[::-1], {"internal_weights": False},
    ),
    "both modes": (
        "2x0e+2x1o", "2x0e+2x1o", "2x0e+2x1o+2x1e",
        coupled("2x0e+2x1o", "2x0e+2x1o", "2x0e+2x1o+2x1e", "uuu")
        + coupled("2x0e+2x1o", "2x0e+2x1o", "2x0e+2x1o+2x1e", "uvu"), {},
    ),
    "norm, path": (
        IRREPS, EDGE, IRREPS, coupled(IRREPS, EDGE, IRREPS, "uvu"),
        {"irrep_normalization": "norm", "path_normalization": "path", "in1_var": [1.0, 2.0, 3.0, 0.5]},
    ),
    "high degree": (
        "2x3o+2x4e", "2x2e+2x4e", "2x3o+2x5o+2x6e", coupled("2x3o+2x4e", "2x2e+2x4e", "2x3o+2x5o+2x6e", "uuu"), {},
    ),
    "one channel": ("1x1o+1x2e", "1x1o", "1x0e+1x1e+1x1o", coupled("1x1o+1x2e", "1x1o", "1x0e+1x1e+1x1o", "uvu"), {}),
}  # fmt: skip


def inputs(tp, batch=(6,)):
    x = torch.randn(*batch, tp.irreps_in1.dim, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*batch, tp.irreps_in2.dim, dtype=torch.float64, requires_grad=True)
    if not tp.weight_numel or tp.internal_weights:
        return x, y
    lead = () if tp.shared_weights else batch
    return x, y, torch.randn(*lead, tp.weight_numel, dtype=torch.float64, requires_grad=True)


def close(ours, reference):
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_values_and_two_derivatives_are_those_of_e3nn(name):
    irreps1, irreps2, irreps_out, instructions, options = CASES[name]
    tp = product(irreps1, irreps2, irreps_out, instructions, **options)
    ours = ExactTensorProduct.from_e3nn(tp)
    assert ours.weight_numel == tp.weight_numel and ours.internal_weights == tp.internal_weights
    args = inputs(tp)
    weights = [[m.weight] if m.internal_weights else [] for m in (tp, ours)]
    results = []
    for module, own in zip((tp, ours), weights, strict=True):
        out = module(*args)
        wanted = [*args, *own]
        g = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        first = torch.autograd.grad((out * g).sum(), wanted, create_graph=True, materialize_grads=True)
        bent = sum((t.sin() * t).sum() for t in first)
        second = torch.autograd.grad(bent, wanted, materialize_grads=True)
        results.append((out, *first, *second))
    for mine, reference in zip(results[1], results[0], strict=True):
        close(mine, reference)


@pytest.mark.parametrize("shared", [True, False])
def test_leading_dimensions_are_broadcast_as_e3nn_does(shared):
    tp = product(IRREPS, EDGE, IRREPS, coupled(IRREPS, EDGE, IRREPS, "uvu"), shared_weights=shared)
    ours = ExactTensorProduct.from_e3nn(tp)
    x, y = torch.randn(2, 1, tp.irreps_in1.dim).double(), torch.randn(3, tp.irreps_in2.dim).double()
    weight = () if shared else (torch.randn(1, 3, tp.weight_numel).double(),)
    out = ours(x, y, *weight)
    assert out.shape == (2, 3, tp.irreps_out.dim)
    close(out, tp(x, y, *weight))
    close(ours(x[0, 0], y[0], *(w[0, 0] for w in weight)), out[0, 0])


def test_an_empty_batch_keeps_its_graph():
    for mode, second in (("uuu", IRREPS), ("uvu", EDGE)):
        tp = product(IRREPS, second, IRREPS, coupled(IRREPS, second, IRREPS, mode))
        ours = ExactTensorProduct.from_e3nn(tp)
        x, y = inputs(tp, (0,))
        out = ours(x, y)
        assert out.shape == (0, tp.irreps_out.dim)
        out.sum().backward()
        assert x.grad.shape == x.shape and not ours.weight.grad.any()


def test_outputs_without_an_instruction_are_zero():
    tp = ExactTensorProduct("2x0e", "2x1o", "2x2e+2x1o+2x0o", [(0, 0, 1, "uuu", False, 1.0)])
    assert tp.weight is None and tp.weight_numel == 0
    out = tp(torch.ones(3, 2), torch.ones(3, 6))
    assert out.shape == (3, 18) and not out[:, :10].any() and not out[:, 16:].any() and out[:, 10:16].all()


def test_weights_travel_both_ways():
    tp = product(IRREPS, IRREPS, IRREPS, coupled(IRREPS, IRREPS, IRREPS, "uuu"))
    ours = ExactTensorProduct.from_e3nn(tp)
    assert list(ours.state_dict()) == ["weight"]
    with torch.no_grad():
        tp.weight.normal_()
    assert not torch.equal(ours.weight, tp.weight)
    ours.load_state_dict(tp.state_dict())
    assert torch.equal(ours.weight, tp.weight)
    missing, unexpected = tp.load_state_dict(ours.state_dict(), strict=False)
    assert "weight" not in missing and not unexpected
    external = product(IRREPS, EDGE, IRREPS, coupled(IRREPS, EDGE, IRREPS, "uvu"), shared_weights=False)
    ExactTensorProduct.from_e3nn(external).load_state_dict(external.state_dict())


def test_copies_and_pickles():
    tp = product(IRREPS, IRREPS, IRREPS, coupled(IRREPS, IRREPS, IRREPS, "uuu"))
    ours = ExactTensorProduct.from_e3nn(tp.requires_grad_(False))
    assert not ours.weight.requires_grad
    x, y = inputs(tp)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x, y), ours(x, y))


def test_one_graph_and_export():
    tp = product(IRREPS, EDGE, IRREPS, coupled(IRREPS, EDGE, IRREPS, "uvu"), shared_weights=False)
    ours = ExactTensorProduct.from_e3nn(tp)
    args = inputs(tp)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*args).square().sum(), args) for f in (ours, compiled)]
    for mine, reference in zip(*results, strict=True):
        close(mine, reference)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(ours, args, dynamic_shapes=({0: batch}, {0: batch}, {0: batch})).module()
    more = inputs(tp, (9,))
    close(exported(*more), tp(*more))


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (
            [(0, 0, 0, "uuu", True, 1.0), (1, 1, 1, "uvw", True, 1.0)],
            r"\[1\] must have the mode 'uuu' or 'uvu', got",
        ),
        ([(0, 0, 1, "uuu", True, 1.0)], r"instructions\[0\] must couple its irreps, got 0e x 0e -> 1o"),
        ([(2, 0, 0, "uuu", True, 1.0)], r"\[0\] must have one multiplicity u \('uuu'\), got 3x0e x 2x0e -> 2x0e"),
    ],
)
def test_refuses_instructions(instructions, message):
    with pytest.raises(ValueError, match=message):
        ExactTensorProduct("2x0e+2x1o+3x0e", "2x0e+2x1o", "2x0e+2x1o", instructions)


def test_refuses_a_module_that_mixes_channels():
    tp = product("2x0e", "2x0e", "2x0e", [(0, 0, 0, "uvw", True)])
    with pytest.raises(ValueError, match="'uvw'"):
        ExactTensorProduct.from_e3nn(tp)
    with pytest.raises(TypeError, match=r"tp must be an e3nn\.o3\.TensorProduct, got Linear"):
        ExactTensorProduct.from_e3nn(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="internal_weights must be False"):
        ExactTensorProduct("2x0e", "2x0e", "2x0e", [], shared_weights=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 9)}, ValueError, r"x must have irreps_in1\.dim = 8 at dimension -1, got 9"),
        ({"y": torch.zeros(3, 8, dtype=torch.complex64)}, TypeError, "y must have a real floating-point dtype"),
        ({"y": torch.zeros(4, 8)}, ValueError, r"leading dimensions that broadcast, got \(3,\), \(4,\)"),
        ({"weight": torch.zeros(3, 4)}, ValueError, r"weight must have shape \(4,\), shared, got \(3, 4\)"),
        ({"weight": torch.zeros(3)}, ValueError, "weight must have weight_numel = 4"),
        ({"weight": None}, ValueError, "weight must be given, 4 numbers"),
    ],
)
def test_refuses_tensors(change, error, message):
    instructions = [(0, 0, 0, "uuu", True, 1.0), (1, 1, 0, "uuu", True, 1.0)]
    tp = ExactTensorProduct("2x0e+2x1o", "2x0e+2x1o", "2x0e", instructions, internal_weights=False)
    args = {"x": torch.zeros(3, 8), "y": torch.zeros(3, 8), "weight": torch.zeros(4)} | change
    with pytest.raises(error, match=message):
        tp(**args)
