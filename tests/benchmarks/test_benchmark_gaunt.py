"""The Gaunt benchmark's references, peers and counts, against e3nn and numbers worked out by hand."""

import math

import pytest
import torch

from benchmarks import _gaunt_edges as edges
from benchmarks import _gaunt_many_body as many_body
from benchmarks import _gaunt_parts as parts
from benchmarks import _harness as harness
from benchmarks import gaunt as family
from torchlayers.gaunt.irreps import e3nn_o3

pytest.importorskip("e3nn", reason="the oracle")

CPU = torch.device("cpu")
BOTH, DOUBLE, FORWARD = harness.BOTH, parts.DOUBLE, harness.FORWARD


def verdict(build, inputs, mode, reference):
    """The harness's own check; a peer that is not installed or needs a GPU is passed over."""
    try:
        built = build(inputs)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    return harness.check(built, mode, reference, parts.TOLERANCE)


def everyone(ours, peers):
    return [pytest.param(build, id=name) for name, build in {harness.OURS: ours, **peers}.items()]


@pytest.mark.parametrize(("channels", "lmax"), [(1, 1), (3, 2)])
def test_order_is_e3nns(channels, lmax):
    o3 = e3nn_o3()
    irreps = o3.Irreps(parts.irreps_of(lmax, channels))
    features = torch.arange(2.0 * irreps.dim).view(2, -1)
    signal = parts.signal(features, channels)
    for (_, ir), piece in zip(irreps, irreps.slices(), strict=True):
        expected = features[:, piece].view(2, channels, ir.dim)
        assert torch.equal(signal[..., ir.l**2 : (ir.l + 1) ** 2], expected)
    assert torch.equal(parts.flat(signal), features)


def test_paths_are_e3nns_with_scaled_weights():
    lmax, channels = 2, 3
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, channels, 9, generator=generator, dtype=torch.float64)
    paths = parts.even_paths(lmax, lmax, lmax)
    weight = torch.randn(len(paths), channels, generator=generator, dtype=torch.float64)
    with parts.default_dtype(torch.float64):
        product = parts.e3nn_tensor_product(lmax, lmax, lmax, channels, "uuu", shared=True)
    with torch.no_grad():
        product.weight.copy_((weight * parts.e3nn_scales(paths)[:, None]).flatten())
    expected = product(parts.flat(x), parts.flat(y))
    torch.testing.assert_close(parts.flat(parts.couple(x, y, weight)), expected, rtol=1e-12, atol=1e-12)


def test_product_reference_is_the_sum_over_paths():
    inputs = family.make_product_inputs(5, 2, 3, CPU)
    x, y = (t.double().requires_grad_() for t in inputs[:2])
    z = parts.couple(x, y, torch.ones(len(parts.even_paths(3, 3, 3)), 1))
    expected = (z, *torch.autograd.grad(z, (x, y), inputs.g.double()))
    assert max(harness.relative_errors(family.product_reference(inputs), expected)) < 1e-13


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
@pytest.mark.parametrize(
    "build",
    everyone(
        lambda inputs: family._product(inputs, "auto"),
        family.PRODUCT_METHODS
        | family.PRODUCT_PEERS
        | family.PRODUCT_PEERS_GPU
        | {"e3nn FullTensorProductv2, compiled": lambda inputs: family.e3nn_full_product(inputs, compiled=False)},
    ),
)
def test_products_are_right_before_they_are_timed(build, mode):
    inputs = family.make_product_inputs(7, 3, 2, CPU)
    found = verdict(build, inputs, mode, family.product_reference(inputs))
    assert found["status"] == "ok", found


@pytest.mark.parametrize("rank", [1, 2])
def test_layers_are_right_before_they_are_timed(rank):
    (case,) = [family._layer_case(4, 3, 2, rank)]
    inputs = case.inputs(CPU)
    reference = case.reference(inputs)
    for build in (case.ours, *case.peers.values()):
        found = verdict(build, inputs, BOTH, reference)
        assert found["status"] == "ok", found


def test_a_layer_that_is_no_sum_of_paths_is_found_wrong():
    class Squared(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, y):
            return self.layer(x, y) * x

    inputs = family.make_layer_inputs(4, 3, 1, 1, CPU)
    squared = Squared(inputs.layer)
    inputs = inputs._replace(layer=squared, weight=family.path_weights(squared, 3, 1))
    assert verdict(family.ours_layer, inputs, FORWARD, family.layer_reference(inputs))["status"] == "wrong"


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("lmax", [1, 2])
def test_edge_reference_is_e3nns(free, lmax, monkeypatch):
    """With the channels one by one."""
    inputs = edges.make_edge_inputs(4, 3, 3, lmax, free, CPU)
    twice = {name: getattr(inputs, name).double() for name in ("x", "g", "probe_x", "vectors", "probe_vectors")}
    weights = {name: getattr(inputs, name).double() for name in ("weight", "probe_weight")}
    exact = edges.EdgeInputs(**twice, **weights, edge_index=inputs.edge_index, lmax=lmax, channels=3)
    with parts.default_dtype(torch.float64):
        product, harmonics = edges._e3nn_messages(exact), edges._harmonics(exact)
    expected = edges._by_messages(exact, product, harmonics).call(DOUBLE)
    monkeypatch.setattr(edges, "CHUNK", 1)
    found = edges._edge_reference(inputs, DOUBLE)
    assert max(harness.relative_errors(found, expected)) < 1e-12
    assert [t.shape for t in found] == [t.shape for t in expected]


@pytest.mark.parametrize("which", [0, 1], ids=["forces", "training"])
@pytest.mark.parametrize("free", [False, True], ids=["a weight a degree", "free weights"])
@pytest.mark.parametrize("name", [harness.OURS, *edges.CONVOLUTION_PEERS])
def test_convolutions_are_right_before_they_are_timed(name, free, which):
    if name == "OpenEquivariance" and not torch.cuda.is_available():
        pytest.skip("OpenEquivariance needs a GPU")
    case = edges.convolution_cases(4, 3, 2, 2, free)[which]
    inputs = case.inputs(CPU)
    build = case.ours if name == harness.OURS else case.peers[name]
    for mode in case.modes:
        found = verdict(build, inputs, mode, case.reference(inputs))
        assert found["status"] == "ok", (mode, found)


@pytest.mark.parametrize("which", [0, 1], ids=["forces", "training"])
@pytest.mark.parametrize("name", [harness.OURS, *many_body.MANY_BODY_PEERS])
def test_many_body_features_are_right_before_they_are_timed(name, which):
    case = many_body.many_body_cases(12, 2, 1, 1)[which]
    inputs = case.inputs(CPU)
    build = case.ours if name == harness.OURS else case.peers[name]
    for mode in case.modes:
        found = verdict(build, inputs, mode, case.reference(inputs))
        assert found["status"] == "ok", (mode, found)


@pytest.mark.parametrize("connection", ["uuu", "uvu"])
def test_taken_over_products_are_right_before_they_are_timed(connection):
    case = family._taken_case(5, 2, 1, connection)
    inputs = case.inputs(CPU)
    irreps = [getattr(inputs.product, f"irreps_{name}") for name in ("in1", "in2", "out")]
    paths = {tuple(part[i].ir.l for part, i in zip(irreps, p[:3], strict=True)) for p in inputs.product.instructions}
    assert {(0, 1, 1), (1, 1, 0), (1, 1, 1)} <= paths
    reference = case.reference(inputs)
    for build in (case.ours, family.e3nn_taken):
        for mode in case.modes:
            found = verdict(build, inputs, mode, reference)
            assert found["status"] == "ok", (mode, found)


def test_double_backward_by_hand():
    """u = w x³: the gradient 3 g w x², its derivatives against v by x 6 g v w x, and by w not among the results."""
    x, w = torch.tensor([2.0, -1.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    g, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    layer = parts.Layer(lambda: w * x**3, [x], g, weights=[w], probes=[v])
    assert [t.tolist() for t in layer.call(BOTH)] == [[24.0, -3.0], [36.0, 18.0]]
    assert [t.tolist() for t in layer.call(DOUBLE)] == [[24.0, -3.0], [36.0, 18.0], [36.0, 36.0]]


def test_bytes_for_one_shape():
    work = family._product_case(5, 3, 2, on_gpu=False).work
    assert work[FORWARD]["bytes"] == 3 * 4 * 5 * 3 * 9
    assert work[BOTH]["bytes"] == 8 * 4 * 5 * 3 * 9


def test_growth_in_the_degree_is_fitted():
    """The cases of one size are one group, over which the harness fits an exponent of time in L."""
    for op, degrees in (("product", list(range(1, 9))), ("product, separable", [8, 12, 16, 24, 32])):
        cases = [c for c in family.cases("cpu") if c.labels["op"] == op]
        assert [c.labels["L"] for c in cases] == degrees
        rows = [
            {
                "case": dict(case.labels),
                "mode": BOTH,
                "scale": case.scale,
                "implementations": {harness.OURS: {"ms": case.labels["L"] ** 3.0}},
            }
            for case in cases
        ]
        (fit,) = harness.scaling(rows)
        assert fit["against"] == "L"
        assert math.isclose(fit["implementations"][harness.OURS]["time"], 3)


def test_gpu_cases_cover_what_is_promised():
    cases = list(family.cases("cuda"))
    products = [c.labels for c in cases if c.labels["op"] == "product"]
    assert {(p["rows"], p["C"], p["L"]) for p in products} == {(10_000, 128, d) for d in range(1, 9)}
    layers = {(c.labels["L"], c.labels["rank"]) for c in cases if c.labels["op"] == "layer"}
    assert {(d, rank) for d in (2, 3, 4) for rank in (1, d)} <= layers
    measured = {
        (c.labels["L"], c.labels["weights"], mode)
        for c in cases
        for mode in c.modes
        if c.labels["op"] == "edge convolution" and c.labels["edges"] == 500_000 and c.labels["C"] == 128
    }
    kinds = ("weights one per degree", "weights free per path")
    assert measured == {(d, kind, mode) for d in (1, 2, 3) for kind in kinds for mode in (FORWARD, BOTH, DOUBLE)}
    assert any(c.labels["op"] == "many-body" and DOUBLE in c.modes and c.headline for c in cases)
    assert all(name in cases[0].peers for name in ("torchlayers, sparse", "torchlayers, separable"))
    for case in cases:
        assert case.quick in (True, False)
    assert any(case.quick for case in cases)
