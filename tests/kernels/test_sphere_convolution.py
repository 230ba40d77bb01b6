"""The fused edge convolution, in Triton's interpreter or on a GPU, against its definition in float64."""

import pytest
import torch

import torchlayers
from torchlayers.gaunt.convolution import edge_order, gaunt_convolution
from torchlayers.kernels import sphere_convolution as kernels
from torchlayers.testing import assert_close_rel, nan_empty

pytestmark = [pytest.mark.gpu, pytest.mark.interpret]

# (nodes, edges, channels), degrees of signal, filter and result, points: one of everything; no channel block, tile or
# width full; two blocks of channels; points in several passes; signals and results wider than filters.
SHAPES = [
    ((1, 1, 1), (0, 0, 0), 1),
    ((3, 4, 5), (2, 1, 3), 19),
    ((2, 3, 17), (1, 1, 1), 8),
    ((3, 3, 4), (3, 3, 2), 101),
    ((2, 2, 3), (4, 1, 5), 35),
]


def definition(x, y, h, tables, source, target, num_targets):
    """Term by term, and differentiable."""
    a, b, p = tables
    degree_of = torch.arange(y.shape[1], device=y.device).double().sqrt().long()
    filters = torch.einsum("ecj,ej,gj->ecg", h[..., degree_of], y, b)
    messages = torch.einsum("eci,gi,ecg,gk->eck", x[source], a, filters, p)
    return messages.new_zeros(num_targets, *messages.shape[1:]).index_add(0, target, messages)


def make(sizes, degrees, points, device):
    """Random harmonics and tables: the kernels know no spheres. Node 0 has neither incoming nor outgoing edges."""
    nodes, edges, channels = sizes
    n, m, k = ((degree + 1) ** 2 for degree in degrees)
    shapes = (nodes, channels, n), (edges, m), (edges, channels, degrees[1] + 1)
    tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    tables = tuple(torch.randn(points, width, device=device) / points**0.5 for width in (n, m, k))
    index = torch.randint(min(1, nodes - 1), max(nodes, 1), (2, edges), device=device)
    return tensors, tables, index


def wide(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize(("sizes", "degrees", "points"), SHAPES)
def test_value_and_both_derivatives(sizes, degrees, points, derivatives, device):
    tensors, tables, index = make(sizes, degrees, points, device)
    edges = edge_order(index, sizes[0])
    with nan_empty():
        found, along = derivatives(lambda *t: kernels.sphere_convolution(*t, tables, edges), tensors)
    exact_tables = [t.double() for t in tables]
    wanted, _ = derivatives(lambda *t: definition(*t, exact_tables, *index, sizes[0]), wide(tensors), along)
    assert found[0].dtype == torch.float32 and found[0].is_contiguous()
    assert sizes[0] == 1 or not found[0][0].any()
    for ours, exact in zip(found, wanted, strict=True):
        assert_close_rel(ours, exact)


def test_filter_gradients_by_themselves(device):
    """The second operation, with a gradient of it along one of its two outputs."""
    tensors, tables, index = make((3, 4, 5), (1, 2, 1), 11, device)
    edges = edge_order(index, 3)
    grad = torch.randn(3, 5, 4, device=device, requires_grad=True)
    exact_tables = [t.double() for t in tables]
    x, y, h = wide(tensors)
    exact_grad = grad.detach().double().requires_grad_()
    value = definition(x, y, h, exact_tables, *index, 3)
    wanted = torch.autograd.grad(value, (y, h), exact_grad, create_graph=True)
    found = kernels.sphere_convolution_filter(tensors[0], grad, *tensors[1:], tables, edges)
    for part in (0, 1):
        assert_close_rel(found[part], wanted[part])
        along = torch.randn_like(found[part])
        others = [tensors[0], grad, tensors[2 - part]]
        exact_others = [x, exact_grad, (y, h)[1 - part]]
        ours = torch.autograd.grad(found[part], others, along, retain_graph=True)
        exact = torch.autograd.grad(wanted[part], exact_others, along.double(), retain_graph=True)
        for a, b in zip(ours, exact, strict=True):
            assert_close_rel(a, b)


def test_third_derivative(device):
    tensors, tables, index = make((2, 2, 2), (1, 1, 1), 4, device)
    edges = edge_order(index, 2)
    exact_tables = [t.double() for t in tables]

    def third(function, x, y, h):
        (first,) = torch.autograd.grad(function(x, y, h).square().sum(), y, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), h, create_graph=True)
        return torch.autograd.grad(second.square().sum(), (x, y, h))

    found = third(lambda *t: kernels.sphere_convolution(*t, tables, edges), *tensors)
    wanted = third(lambda *t: definition(*t, exact_tables, *index, 2), *wide(tensors))
    for ours, exact in zip(found, wanted, strict=True):
        assert_close_rel(ours, exact)


def test_strides(device):
    """A signal whose components lie apart, and an expanded gradient."""
    (x, y, h), tables, index = make((3, 4, 5), (1, 1, 1), 6, device)
    edges = edge_order(index, 3)
    apart = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    strided = [apart, y.detach().T.contiguous().T.requires_grad_(), h.detach().mT.contiguous().mT.requires_grad_()]
    assert not any(t.is_contiguous() for t in strided)
    value, other = (kernels.sphere_convolution(*t, tables, edges) for t in (strided, (x, y, h)))
    assert torch.equal(value, other)
    ours, plain = torch.autograd.grad(value.sum(), strided), torch.autograd.grad(other.sum(), (x, y, h))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(("nodes", "edges", "channels"), [(2, 0, 3), (0, 0, 3), (2, 2, 0)])
def test_empty(nodes, edges, channels, derivatives, device):
    tensors, tables, index = make((nodes, edges, channels), (1, 1, 2), 6, device)
    order = edge_order(index, nodes)
    with nan_empty():
        found, _ = derivatives(lambda *t: kernels.sphere_convolution(*t, tables, order), tensors)
    assert found[0].shape == (nodes, channels, 9) and not found[0].any()
    for gradient, t in zip(found[1:], tensors * 2, strict=True):
        assert gradient.shape == t.shape and not gradient.any()


def test_repeated_runs_agree_bit_for_bit_and_the_order_of_the_list_decides(derivatives, device):
    tensors, tables, index = make((3, 6, 5), (1, 1, 1), 6, device)
    first, along = derivatives(lambda *t: kernels.sphere_convolution(*t, tables, edge_order(index, 3)), tensors)
    again, _ = derivatives(lambda *t: kernels.sphere_convolution(*t, tables, edge_order(index, 3)), tensors, along)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # Sorted by target, stable: each target sums the same numbers in the same order.
    mixed = index[1].argsort(stable=True)
    x, y, h = tensors
    moved = kernels.sphere_convolution(x, y[mixed], h[mixed], tables, edge_order(index[:, mixed], 3))
    assert torch.equal(moved, first[0])
    mixed = torch.randperm(6, device=device)
    moved = kernels.sphere_convolution(x, y[mixed], h[mixed], tables, edge_order(index[:, mixed], 3))
    assert_close_rel(moved, first[0].double())


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("antisymmetric", [False, True])
def test_the_public_function_takes_the_kernels(antisymmetric, indexed, derivatives, device):
    """Directions, harmonics and tables included, with an edge along -y and one of zero length."""
    x, edge_vec = torch.randn(4, 3, 4, device=device), torch.randn(4, 3, device=device)
    edge_vec[0], edge_vec[1] = torch.tensor([0.0, -2.0, 0.0], device=device), 0
    tensors = [t.requires_grad_() for t in (x, edge_vec, torch.randn(4, 3, 3, device=device))]
    index = torch.tensor([[1, 2, 3, 1], [2, 1, 1, 3]], device=device) if indexed else None
    options = {"lmax": 1, "lmax_filter": 2, "lmax_out": 2, "antisymmetric": antisymmetric}
    found, along = derivatives(lambda *t: gaunt_convolution(*t, index, **options, backend="triton"), tensors)
    assert torchlayers.last_dispatch() == "triton: sphere_convolution"
    wanted, _ = derivatives(lambda *t: gaunt_convolution(*t, index, **options, backend="torch"), wide(tensors), along)
    for ours, exact in zip(found, wanted, strict=True):
        assert_close_rel(ours, exact)
    assert not found[2][1].any() and not found[5][1].any()
    if indexed:
        order = edge_order(index, 4)
        assert torch.equal(gaunt_convolution(*tensors, order, **options, backend="triton"), found[0])


def test_the_public_function_names_what_the_kernels_lack(device):
    tensors = [torch.randn(shape, device=device) for shape in ((2, 1, 81), (2, 3), (2, 1, 2))]
    with pytest.raises(torchlayers.BackendError, match="degrees above 7, got 8"):
        gaunt_convolution(*tensors, lmax=8, lmax_filter=1, lmax_out=1, backend="triton")
    exact = [t.double() for t in (tensors[0][..., :4], *tensors[1:])]
    with pytest.raises(torchlayers.BackendError, match="float64"):
        gaunt_convolution(*exact, lmax=1, lmax_filter=1, backend="triton")


def test_launch_configurations():
    """All points are covered, within the tiles that registers hold, whatever the sizes."""
    for target in (*kernels._lib.TARGETS.values(), ("interpreter", "")):
        for degree in range(kernels.MAX_DEGREE + 1):
            for points in (1, 8, 38, 97, 292):
                for channels in (1, 32, 33, 128):
                    candidates = kernels._candidates(channels, points, (degree, 1, 0), target)
                    most = kernels._SHAPES[kernels._wide(degree)][0]
                    assert candidates and all(1 <= c["TILES"] <= most for c in candidates)
                    assert all(c["BC"] <= max(16, 2 * channels) for c in candidates)
    if not kernels.INTERPRET:  # there, a kernel is not compiled and has no parameters to specialise on
        free = {p.name for p in kernels.sphere_convolution_filter_kernel.params if p.do_not_specialize}
        assert free == {"E"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must have shape \(nodes, channels, components\), got \(3, 4\)"),
        ({"x": torch.zeros(3, 5, 4).double()}, TypeError, "x must be float32, got torch.float64"),
        ({"x": torch.zeros(3, 5, 9)}, ValueError, r"x must have shape \(3, 5, 4\), got \(3, 5, 9\)"),
        ({"y": torch.zeros(4)}, ValueError, r"y must have shape \(edges, components\), got \(4,\)"),
        ({"y": torch.zeros(4, 4)}, ValueError, r"y must have shape \(4, 9\), got \(4, 4\)"),
        ({"h": torch.zeros(4, 5, 2)}, ValueError, r"h must have shape \(4, 5, 3\), got \(4, 5, 2\)"),
        ({"h": torch.zeros(4, 5, 3).half()}, TypeError, "h must be float32, got torch.float16"),
        ({"b": torch.zeros(6, 9)}, ValueError, r"b must have shape \(points, components\), as many points as a"),
        ({"p": torch.zeros(7, 3)}, ValueError, r"p must have \(degree \+ 1\)² components, degree at most 7, got 3"),
        ({"p": torch.zeros(7, 81)}, ValueError, r"p must have \(degree \+ 1\)² components, degree at most 7, got 81"),
        ({"by_target": torch.zeros(4, dtype=torch.int64)}, TypeError, "by_target must be int32, got torch.int64"),
        ({"target": torch.zeros(5, dtype=torch.int32)}, ValueError, r"target must have shape \(4,\), got \(5,\)"),
        ({"source_offsets": torch.zeros(4, 1, dtype=torch.int32)}, ValueError, r"source_offsets must have shape"),
    ],
)
def test_refuses(change, error, message, device):
    tensors, tables, index = make((3, 4, 5), (1, 2, 1), 7, device)
    arguments = dict(zip(("x", "y", "h", "a", "b", "p"), (*tensors, *tables), strict=True))
    arguments |= edge_order(index, 3)._asdict()
    arguments |= {name: t.to(device) for name, t in change.items()}
    x, y, h, a, b, p, *edges = arguments.values()
    with pytest.raises(error, match=message):
        kernels.sphere_convolution(x, y, h, (a, b, p), tuple(edges))
