"""The edge convolution against e3nn: its harmonics and its Clebsch–Gordan coefficients, edge by edge, in float64."""

import functools

import pytest
import torch
from torch.utils import _python_dispatch

import torchlayers
from torchlayers.gaunt import convolution, reference
from torchlayers.gaunt.coefficients import bracket_scale, gaunt_scale
from torchlayers.gaunt.convolution import EdgeOrder, edge_order, gaunt_convolution
from torchlayers.gaunt.irreps import e3nn_o3
from torchlayers.testing import assert_close_rel, assert_equivariant, relative_error

DEGREES = [(0, 0, None), (1, 2, None), (2, 1, 0), (2, 0, 2), (0, 2, 1), (3, 3, 3), (4, 1, 3)]


def rows(degree):
    return slice(degree * degree, (degree + 1) ** 2)


def make(lmax, lmax_filter, nodes=5, edges=14, channels=3, dtype=torch.float64):
    """Unsorted edges, parallel ones among them, loops, directions along ±y; node 0 has no incoming edge."""
    x = torch.randn(nodes, channels, (lmax + 1) ** 2, dtype=dtype)
    edge_vec = 2 * torch.randn(edges, 3, dtype=dtype)
    edge_vec[:2] = torch.tensor([[0.0, 3.0, 0.0], [0.0, -0.5, 0.0]])
    edge_index = torch.stack((torch.randint(0, nodes, (edges,)), torch.randint(1, nodes, (edges,))))
    return [t.requires_grad_() for t in (x, edge_vec, torch.randn(edges, channels, lmax_filter + 1, dtype=dtype))] + [
        edge_index
    ]


def oracle(x, edge_vec, h, edge_index, *, lmax, lmax_filter, lmax_out=None, antisymmetric=False):
    """A sum over edges and Clebsch–Gordan paths."""
    o3 = e3nn_o3()
    lmax_out = lmax + lmax_filter if lmax_out is None else lmax_out
    y = o3.spherical_harmonics(list(range(lmax_filter + 1)), edge_vec, True, normalization="integral")
    z = x.new_zeros(x.shape[0], x.shape[1], (lmax_out + 1) ** 2)
    for l1 in range(lmax + 1):
        for l2 in range(lmax_filter + 1):
            for l3 in range(abs(l1 - l2), min(l1 + l2, lmax_out) + 1):
                scale = (bracket_scale if antisymmetric else gaunt_scale)(l1, l2, l3)
                if scale:
                    cg = scale * o3.wigner_3j(l1, l2, l3, dtype=x.dtype)
                    signals = x[edge_index[0]][..., rows(l1)]
                    block = torch.einsum("ijk,eci,ej,ec->eck", cg, signals, y[:, rows(l2)], h[..., l2])
                    whole = torch.nn.functional.pad(block, (l3 * l3, (lmax_out + 1) ** 2 - (l3 + 1) ** 2))
                    z = z.index_add(0, edge_index[1], whole)
    return z


def both_derivatives(function, tensors, seed=1):
    """Value, first derivatives along a random cotangent, and derivatives of those along others."""
    generator = torch.Generator().manual_seed(seed)

    def like(t):
        return torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.dtype)

    value = function(*tensors)
    first = torch.autograd.grad(value, tensors, like(value), create_graph=True)
    second = torch.autograd.grad(first, tensors, [like(t) for t in first])
    return value, *first, *second


@pytest.mark.parametrize("antisymmetric", [False, True])
@pytest.mark.parametrize("degrees", DEGREES)
def test_is_e3nns_sum_over_paths(degrees, antisymmetric):
    lmax, lmax_filter, lmax_out = degrees
    *tensors, edge_index = make(lmax, lmax_filter)
    options = {"lmax": lmax, "lmax_filter": lmax_filter, "lmax_out": lmax_out, "antisymmetric": antisymmetric}
    z = gaunt_convolution(*tensors, edge_index, **options)
    wanted = oracle(*tensors, edge_index, **options)
    assert z.shape == wanted.shape and z.dtype == torch.float64
    torch.testing.assert_close(z, wanted, rtol=0, atol=1e-12)
    assert not z[0].any()
    torch.testing.assert_close(z, reference.gaunt_convolution(*tensors, edge_index, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_derivatives_are_e3nns(antisymmetric):
    """Both derivatives, at ±y too."""
    *tensors, edge_index = make(2, 3)
    options = {"lmax": 2, "lmax_filter": 3, "lmax_out": 2, "antisymmetric": antisymmetric}
    ours = both_derivatives(lambda *t: gaunt_convolution(*t, edge_index, **options), tensors)
    theirs = both_derivatives(lambda *t: oracle(*t, edge_index, **options), tensors)
    for found, wanted in zip(ours, theirs, strict=True):
        assert_close_rel(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("antisymmetric", [False, True])
@pytest.mark.parametrize("indexed", [True, False])
def test_gradcheck(indexed, antisymmetric):
    *tensors, edge_index = make(1, 2, nodes=3, edges=3, channels=2)
    edge_index = edge_index if indexed else None
    options = {"lmax": 1, "lmax_filter": 2, "lmax_out": 2, "antisymmetric": antisymmetric}

    def function(*t):
        return gaunt_convolution(*t, edge_index, **options)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_derivatives_of_some_arguments(wanted):
    """What is not asked for changes nothing: the graph is another one."""
    *tensors, edge_index = make(2, 2)
    options = {"lmax": 2, "lmax_filter": 2, "lmax_out": 1}
    everything = both_derivatives(lambda *t: gaunt_convolution(*t, edge_index, **options).sin(), tensors)

    def of_some(*some):
        arguments = [t.detach() for t in tensors]
        for place, t in zip(wanted, some, strict=True):
            arguments[place] = t
        return gaunt_convolution(*arguments, edge_index, **options).sin()

    value, *derivatives = both_derivatives(of_some, [tensors[i] for i in wanted])
    assert torch.equal(value, everything[0])
    if len(wanted) == 1:  # the first derivative along the same cotangent
        assert_close_rel(derivatives[0], everything[1 + wanted[0]], rtol=1e-13)
    (force,) = torch.autograd.grad(of_some(*(tensors[i] for i in wanted)).sum(), tensors[wanted[0]], create_graph=True)
    found = torch.autograd.grad(force.square().sum(), [tensors[i] for i in wanted])
    whole = gaunt_convolution(*tensors, edge_index, **options).sin().sum()
    (force,) = torch.autograd.grad(whole, tensors[wanted[0]], create_graph=True)
    for ours, all_of_them in zip(
        found, torch.autograd.grad(force.square().sum(), [tensors[i] for i in wanted]), strict=True
    ):
        assert_close_rel(ours, all_of_them, rtol=1e-13)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_an_edge_of_zero_length(antisymmetric):
    """As e3nn, of the filter the constant alone remains; the gradients are finite, that by the vector zero."""
    *tensors, edge_index = make(2, 2)
    options = {"lmax": 2, "lmax_filter": 2, "lmax_out": 3, "antisymmetric": antisymmetric}
    with torch.no_grad():
        tensors[1][3] = 0
    values = both_derivatives(lambda *t: gaunt_convolution(*t, edge_index, **options), tensors)
    assert all(v.isfinite().all() for v in values)
    torch.testing.assert_close(values[0], oracle(*tensors, edge_index, **options), rtol=0, atol=1e-12)
    assert not values[2][3].any() and not values[5][3].any()
    assert values[2][[0, 1, 2, *range(4, 14)]].any(-1).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_are_continuous_at_the_poles(sign):
    *tensors, edge_index = make(2, 3, edges=2)
    options = {"lmax": 2, "lmax_filter": 3, "lmax_out": 2}

    def gradient(offset):
        edge_vec = torch.tensor([[0.0, sign, 0.0], [0.0, sign, 0.0]], dtype=torch.float64) + offset
        edge_vec.requires_grad_()
        z = gaunt_convolution(tensors[0], edge_vec, tensors[2], edge_index, **options)
        return torch.autograd.grad(z.sin().sum(), edge_vec)[0]

    at_the_pole = gradient(torch.zeros(3, dtype=torch.float64))
    assert at_the_pole.isfinite().all() and at_the_pole.norm() > 0.1
    for offset in 1e-9 * torch.randn(4, 3, dtype=torch.float64):
        torch.testing.assert_close(gradient(offset), at_the_pole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_an_edge_does_not_matter(scale):
    *tensors, edge_index = make(2, 2, dtype=torch.float32)
    options = {"lmax": 2, "lmax_filter": 2, "lmax_out": 2}
    z = gaunt_convolution(*tensors, edge_index, **options)
    far = (tensors[1].detach() * scale).requires_grad_()
    scaled = gaunt_convolution(tensors[0], far, tensors[2], edge_index, **options)
    assert_close_rel(scaled, z.double())
    ours, theirs = torch.autograd.grad(scaled.sum(), far)[0], torch.autograd.grad(z.sum(), tensors[1])[0]
    assert_close_rel(ours * scale, theirs.double())


def test_float32_accuracy():
    *tensors, edge_index = make(3, 3, edges=40, channels=8)
    options = {"lmax": 3, "lmax_filter": 3, "lmax_out": 3}
    exact = both_derivatives(lambda *t: gaunt_convolution(*t, edge_index, **options), tensors)
    narrow = [t.detach().float().requires_grad_() for t in tensors]
    ours = both_derivatives(lambda *t: gaunt_convolution(*t, edge_index, **options), narrow)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.dtype == torch.float32
        assert_close_rel(found, wanted)


def test_without_edge_index_each_row_has_its_edge():
    *tensors, _ = make(2, 2, nodes=14)
    options = {"lmax": 2, "lmax_filter": 2, "lmax_out": 3}
    own = torch.arange(14).expand(2, 14)
    ours = both_derivatives(lambda *t: gaunt_convolution(*t, **options), tensors)
    for found, wanted in zip(ours, both_derivatives(lambda *t: oracle(*t, own, **options), tensors), strict=True):
        assert_close_rel(found, wanted, rtol=1e-12)


def test_the_order_of_the_edges_does_not_matter():
    *tensors, edge_index = make(2, 2, edges=60)
    options = {"lmax": 2, "lmax_filter": 2, "lmax_out": 2}
    z = gaunt_convolution(*tensors, edge_index, **options)
    mixed = torch.randperm(60)
    again = gaunt_convolution(tensors[0], tensors[1][mixed], tensors[2][mixed], edge_index[:, mixed], **options)
    assert relative_error(again, z) < 1e-12
    # Sorted by target, each target's edges are added in the order they had.
    ordered = edge_index[1].argsort(stable=True)
    again = gaunt_convolution(tensors[0], tensors[1][ordered], tensors[2][ordered], edge_index[:, ordered], **options)
    assert relative_error(again, z) < 1e-12


def test_repeated_runs_agree_bit_for_bit():
    *tensors, edge_index = make(2, 2, edges=60, dtype=torch.float32)
    function = functools.partial(gaunt_convolution, edge_index=edge_index, lmax=2, lmax_filter=2, lmax_out=2)
    for a, b in zip(both_derivatives(function, tensors), both_derivatives(function, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("indexed", [True, False])
def test_pieces_of_the_edges(indexed, monkeypatch):
    """A call of many chunks, the last one not full, is one of a single chunk."""
    *tensors, edge_index = make(2, 2, nodes=14)
    edge_index = edge_index if indexed else None
    function = functools.partial(gaunt_convolution, edge_index=edge_index, lmax=2, lmax_filter=2, lmax_out=2)
    whole = both_derivatives(function, tensors)
    for per_chunk in (0, 4):
        monkeypatch.setattr(convolution, "CHUNK", per_chunk * 26 * 3)
        for found, wanted in zip(both_derivatives(function, tensors), whole, strict=True):
            assert_close_rel(found, wanted, rtol=1e-13)


def test_an_order_of_edges_made_once():
    *tensors, edge_index = make(2, 2)
    edges = edge_order(edge_index, 5)
    assert isinstance(edges, EdgeOrder) and all(t.dtype == torch.int32 for t in edges)
    for node, order, offsets in (
        (edges.target, edges.by_target, edges.target_offsets),
        (edges.source, edges.by_source, edges.source_offsets),
    ):
        listed = [order[offsets[i] : offsets[i + 1]].tolist() for i in range(5)]
        assert listed == [[e for e in range(14) if node[e] == i] for i in range(5)]
    assert torch.equal(torch.stack((edges.source, edges.target)), edge_index.int())
    options = {"lmax": 2, "lmax_filter": 2}
    z = gaunt_convolution(*tensors, edges, **options)
    assert torch.equal(z, gaunt_convolution(*tensors, edge_index, **options))
    assert torch.equal(z, gaunt_convolution(*tensors, edge_index.int(), **options))
    with pytest.raises(ValueError, match="edge_index must have the nodes of x, and one more, = 5"):
        gaunt_convolution(tensors[0][:4], *tensors[1:], edges, **options)


@pytest.mark.parametrize(("nodes", "edges", "channels"), [(4, 0, 3), (0, 0, 3), (4, 3, 0)])
def test_empty(nodes, edges, channels):
    tensors = [
        torch.randn(size, requires_grad=True) for size in ((nodes, channels, 4), (edges, 3), (edges, channels, 3))
    ]
    edge_index = torch.zeros(2, edges, dtype=torch.int64)
    values = both_derivatives(lambda *t: gaunt_convolution(*t, edge_index, lmax=1, lmax_filter=2), tensors)
    assert values[0].shape == (nodes, channels, 16) and not values[0].any()
    for gradient, tensor in zip(values[1:], tensors * 2, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("antisymmetric", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
def test_equivariance(inverted, antisymmetric, action):
    """Under rotations, and under inversion, where the bracket is a pseudo signal."""
    o3 = e3nn_o3()
    *tensors, edge_index = make(2, 2)
    turn = o3.rand_matrix(dtype=torch.float64) * (-1 if inverted else 1)

    def act(lmax, pseudo=False):
        matrix = action(turn, lmax) * (-1 if pseudo and inverted else 1)
        return lambda t: t @ matrix.T

    assert_equivariant(
        lambda x, v, h: gaunt_convolution(
            x, v, h, edge_index, lmax=2, lmax_filter=2, lmax_out=3, antisymmetric=antisymmetric
        ),
        tuple(tensors),
        (act(2), lambda v: v @ turn.T, None),
        act(3, antisymmetric),
        tol=1e-12,
    )


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_full_graph(antisymmetric):
    """One graph for any number of nodes and edges, forward and backward."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    options = {"lmax": 2, "lmax_filter": 2, "lmax_out": 2, "antisymmetric": antisymmetric}
    torch._dynamo.reset()
    for backend in (counted, "aot_eager"):
        compiled = torch.compile(functools.partial(gaunt_convolution, **options), fullgraph=True, backend=backend)
        for nodes, edges in ((5, 14), (6, 15), (7, 19)):
            *tensors, edge_index = make(2, 2, nodes=nodes, edges=edges)
            z, wanted = compiled(*tensors, edge_index), gaunt_convolution(*tensors, edge_index, **options)
            assert_close_rel(z, wanted, rtol=1e-13)
            for ours, plain in zip(
                torch.autograd.grad(z.sin().sum(), tensors),
                torch.autograd.grad(wanted.sin().sum(), tensors),
                strict=True,
            ):
                assert_close_rel(ours, plain, rtol=1e-13)
    assert len(graphs) == 2  # of fixed sizes, and of any


@pytest.mark.parametrize("indexed", [True, False])
def test_export(indexed):
    class Convolution(torch.nn.Module):
        def forward(self, *tensors):
            return gaunt_convolution(*tensors, lmax=2, lmax_filter=1, lmax_out=2)

    *tensors, edge_index = make(2, 1, nodes=14)
    nodes = torch.export.Dim("nodes") if indexed else torch.export.Dim("edges")
    edges = torch.export.Dim("edges")
    arguments = (*(t.detach() for t in tensors), *([edge_index] if indexed else []))
    shapes = ({0: nodes}, {0: edges}, {0: edges}, *([{1: edges}] if indexed else []))
    program = torch.export.export(Convolution(), arguments, dynamic_shapes={"tensors": shapes})
    *tensors, edge_index = make(2, 1, nodes=9, edges=9)
    arguments = (*(t.detach() for t in tensors), *([edge_index] if indexed else []))
    assert_close_rel(program.module()(*arguments), Convolution()(*arguments), rtol=1e-13)


def test_narrow_dtypes_and_autocast():
    *tensors, edge_index = make(2, 2, dtype=torch.float32)
    options = {"lmax": 2, "lmax_filter": 2, "lmax_out": 2}
    narrow = [t.detach().bfloat16() for t in tensors]
    z = gaunt_convolution(*narrow, edge_index, **options)
    assert z.dtype == torch.bfloat16
    assert_close_rel(z, oracle(*(t.double() for t in narrow), edge_index, **options), rtol=4e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gaunt_convolution(narrow[0], *tensors[1:], edge_index, **options)
    assert mixed.dtype == torch.float32
    exact = oracle(narrow[0].double(), *(t.double() for t in tensors[1:]), edge_index, **options)
    assert_close_rel(mixed, exact)


def test_strides_do_not_matter():
    *tensors, edge_index = make(2, 2)
    options = {"lmax": 2, "lmax_filter": 2, "lmax_out": 2}
    strided = [t.detach().mT.contiguous().mT if t.ndim == 3 else t.detach().T.contiguous().T for t in tensors]
    z = gaunt_convolution(*strided, edge_index.T.contiguous().T, **options)
    assert_close_rel(z, gaunt_convolution(*tensors, edge_index, **options), rtol=1e-13)


def test_what_ran():
    *tensors, edge_index = make(1, 1, dtype=torch.float32)
    gaunt_convolution(*tensors, edge_index, lmax=1, lmax_filter=1, backend="torch")
    assert torchlayers.last_dispatch() == "torch: backend is 'torch'"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lmax_out": 4}, ValueError, r"lmax_out must be at most lmax \+ lmax_filter = 3, got 4"),
        ({"lmax": -1}, ValueError, "lmax must be at least 0, got -1"),
        ({"lmax_filter": 1.0}, TypeError, "lmax_filter must be an int"),
        ({"x": torch.zeros(5, 3, 4, dtype=torch.complex128)}, TypeError, "x must have a real floating-point dtype"),
        ({"x": torch.zeros(5, 3, 4, dtype=torch.int64)}, TypeError, "x must have a real floating-point dtype"),
        ({"x": torch.zeros(5, 3, 9).double()}, ValueError, r"x must have \(lmax \+ 1\)² = 4 at dimension 2, got 9"),
        ({"x": torch.zeros(3, 4).double()}, ValueError, r"x must have 3 dimensions"),
        ({"edge_vec": torch.zeros(14, 2).double()}, ValueError, "edge_vec must have x, y and z = 3"),
        ({"edge_vec": torch.zeros(14, 3)}, TypeError, "edge_vec must have the dtype of x, torch.float64"),
        ({"filter_coeff": torch.zeros(13, 3, 3).double()}, ValueError, "filter_coeff must have the edges of edge_vec"),
        ({"filter_coeff": torch.zeros(14, 2, 3).double()}, ValueError, "filter_coeff must have the channels of x = 3"),
        ({"filter_coeff": torch.zeros(14, 3, 4).double()}, ValueError, r"filter_coeff must have lmax_filter \+ 1 = 3"),
        ({"edge_index": torch.zeros(2, 13, dtype=torch.int64)}, ValueError, "edge_index must have the edges of"),
        ({"edge_index": torch.zeros(14, 2, dtype=torch.int64)}, ValueError, r"edge_index must have \(source, target\)"),
        ({"edge_index": torch.zeros(2, 14)}, TypeError, "edge_index must be int64 or int32, got torch.float32"),
        ({"edge_index": torch.full((2, 14), 5)}, ValueError, "edge_index must have entries from 0 to 4, got 5 to 5"),
        ({"edge_index": torch.full((2, 14), -1)}, ValueError, "edge_index must have entries from 0 to 4, got -1"),
        ({"edge_index": None}, ValueError, "x must have the edges of edge_vec = 14 at dimension 0, got 5"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_refuses(change, error, message):
    *tensors, edge_index = make(1, 2)
    names = ("x", "edge_vec", "filter_coeff", "edge_index")
    arguments = dict(zip(names, (*tensors, edge_index), strict=True)) | {"lmax": 1, "lmax_filter": 2}
    with pytest.raises(error, match=message):
        gaunt_convolution(**arguments | change)


def test_edges_are_checked_whatever_other_threads_have_left_behind(monkeypatch):
    """torch's flag for dispatch modes is one for all threads, and can stay set."""
    monkeypatch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", True)
    with pytest.raises(ValueError, match="edge_index must have entries from 0 to 2, got 0 to 3"):
        edge_order(torch.tensor([[0, 3], [1, 2]]), 3)
