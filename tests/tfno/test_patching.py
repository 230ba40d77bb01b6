"""Multi-grid patching against the gather definition (NumPy, explicit indices), neuraloperator and closed forms."""

import contextlib
import copy
import io
import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlayers.tfno.parallel import MultigridPatching2D
from torchlayers.tfno.patching import MultiGridPatching

NUMPY_MODE = {"circular": "wrap", "replicate": "edge", "reflect": "reflect", "zeros": "constant"}


def gather_definition(x, levels, patches, halo, mode):
    """Patches (B · n_1 · … · n_d, C (L + 1), P + 2p per axis) of the array x, one pixel window at a time."""
    d = x.ndim - 2
    out = []
    for sample in x:
        for cell in itertools.product(*map(range, patches)):
            blocks = []
            for level in range(levels + 1):
                s = 2**level
                coarse = sample[(slice(None), *(slice(None, None, s),) * d)]
                window = coarse
                for axis, (a, n, p) in enumerate(zip(cell, patches, halo, strict=True)):
                    side = Fraction(sample.shape[1 + axis], n)
                    start = math.floor(a * side / s) - math.floor((side - side / s) / 2) - p
                    length = int(side) + 2 * p
                    before, after = max(0, -start), max(0, start + length - coarse.shape[1 + axis])
                    widths = [(0, 0)] * coarse.ndim
                    widths[1 + axis] = (before, after)
                    window = np.pad(window, widths, mode=NUMPY_MODE[mode])
                    window = window.take(range(start + before, start + before + length), axis=1 + axis)
                blocks.append(window)
            out.append(np.concatenate(blocks))
    return np.stack(out)


def neuralop_patching(**kwargs):
    from neuralop.training.patching import MultigridPatching2D as Theirs

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its arguments
        return Theirs(torch.nn.Identity(), **kwargs)


@pytest.mark.parametrize("mode", NUMPY_MODE)
@pytest.mark.parametrize(
    ("sizes", "levels", "patches", "halo"),
    [
        ((16, 16), 1, None, (2, 2)),
        ((16, 8), 0, None, (3, 1)),  # no levels, with a halo
        ((16, 8), 0, (4, 2), (0, 0)),  # patches without levels
        ((32, 64), 2, None, (3, 5)),  # rectangular
        ((64, 64), 3, None, (2, 2)),  # three levels: P = s, half a coarse pixel to round
        ((48, 48), 2, None, (0, 0)),  # not divisible by 2 · 4^levels
        ((40, 24), 2, None, (4, 1)),  # P not divisible by s
        ((16, 16), 1, None, (2, 0)),  # one axis only
        ((12, 8), 1, (3, 1), (1, 8)),  # patches apart from levels; a halo as long as the axis
        ((8, 8), 2, (1, 1), (0, 0)),  # coarse views of a whole field
        ((8, 4), 2, None, (8, 4)),  # the coarsest field has one pixel along an axis
        ((24,), 2, None, (3,)),
        ((8, 12, 4), 1, (2, 3, 2), (1, 2, 0)),
        ((8, 8, 8), 2, None, (1, 1, 1)),
    ],
)
def test_patches_are_the_gather_definition(sizes, levels, patches, halo, mode):
    x = torch.randn(2, 3, *sizes, dtype=torch.float64)
    patching = MultiGridPatching(levels, n_dim=len(sizes), padding=halo, padding_mode=mode, patches=patches)
    actual = patching.patch(x)
    expected = gather_definition(x.numpy(), levels, patching.patches, halo, mode)
    np.testing.assert_array_equal(actual.numpy(), expected)
    assert actual.shape[:2] == (2 * patching.num_patches, patching.channels(3))
    assert torch.equal(patching.unpatch(actual[:, :3]), x)
    assert torch.equal(patching(x), actual)
    some = [i for i in range(patching.num_patches) if i % 3 != 1][::-1]
    per_sample = actual.unflatten(0, (2, -1))
    assert torch.equal(patching.patch(x, some), per_sample[:, some].flatten(0, 1))


def test_patch_target_is_cropped_patch():
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    patching = MultiGridPatching(1, padding=(2, 3))
    target = patching.patch_target(x)
    np.testing.assert_array_equal(target.numpy(), gather_definition(x.numpy(), 0, (2, 2), (0, 0), "circular"))
    assert torch.equal(target, patching.crop(patching.patch(x)[:, :3]))
    assert torch.equal(patching.stitch(target), x)
    assert torch.equal(patching.patch_target(x, [2]), target[2::4])


@given(
    n=st.integers(1, 5),
    side=st.integers(1, 40),
    fraction=st.floats(0, 1),
    levels=st.integers(0, 2),
    batch=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_unpatch_finds_the_halo_from_the_patches_alone(n, side, fraction, levels, batch):
    size = n * side * 2**levels
    patching = MultiGridPatching(levels, n_dim=1, padding_fraction=fraction, patches=n)
    x = torch.arange(batch * size, dtype=torch.float64).reshape(batch, 1, size)
    patches = patching.patch(x)
    assert patches.shape[2] == size // n + 2 * round(fraction * size)
    assert torch.equal(patching.unpatch(patches[:, :1]), x)


def test_resolutions_can_take_turns():
    patching = MultiGridPatching(1, padding_fraction=0.125)
    fields = [torch.randn(1, 1, n, n) for n in (16, 32)]
    patches = [patching.patch(x) for x in fields]
    for x, p in zip(fields, patches, strict=True):
        assert torch.equal(patching.unpatch(p[:, :1]), x)


@pytest.mark.parametrize(
    ("sizes", "levels", "fraction"),
    [((32, 32), 1, 0.125), ((32, 64), 2, 0.1), ((64, 32), 2, 0), ((128, 128), 3, 0.05), ((16, 24), 1, [0.25, 0.125])],
)
@pytest.mark.parametrize("stitching", [True, False])
@pytest.mark.parametrize("evaluation", [True, False])
def test_wrapper_equals_neuralop_where_that_is_right(sizes, levels, fraction, stitching, evaluation):
    x, y = torch.randn(2, 2, *sizes), torch.randn(2, 1, *sizes)
    kwargs = {"levels": levels, "padding_fraction": fraction, "stitching": stitching}
    ours, theirs = MultigridPatching2D(torch.nn.Identity(), **kwargs), neuralop_patching(**kwargs)
    patched, expected = ours.patch(x, y), theirs.patch(x, y)
    assert all(map(torch.equal, patched, expected))
    output = patched[0][:, :1]
    back = zip(
        ours.unpatch(output, patched[1], evaluation), theirs.unpatch(output, patched[1], evaluation), strict=True
    )
    assert all(torch.equal(a, b) for a, b in back)


@pytest.mark.parametrize(
    ("sizes", "levels", "fraction"),
    [((8, 8), 0, 0.5), ((32, 32), 1, [0.125, 0]), ((64, 64), 3, 0.1), ((40, 40), 2, 0.1), ((16, 16), 1, 1)],
)
@pytest.mark.parametrize("stitching", [True, False])
def test_wrapper_where_neuralop_fails(sizes, levels, fraction, stitching):
    x, y = torch.randn(2, 2, *sizes), torch.randn(2, 1, *sizes)
    patcher = MultigridPatching2D(torch.nn.Identity(), levels, fraction, stitching=stitching)
    x_patches, y_patches = patcher.patch(x, y)
    halo = [round(f * n) for f, n in zip(patcher.patching.padding_fraction or (0, 0), sizes, strict=True)]
    expected = gather_definition(x.numpy(), levels, (2**levels,) * 2, halo, "circular")
    np.testing.assert_array_equal(x_patches.numpy(), expected)
    out, target = patcher.unpatch(x_patches[:, :1], y_patches)
    assert out.shape == target.shape == (y if stitching else y_patches).shape
    out, target = patcher.unpatch(x_patches[:, :1], y_patches, evaluation=True)
    assert torch.equal(out, x[:, :1]) and torch.equal(target, y)


def test_stitched_operator_commutes_with_shifts_by_a_patch():
    patching = MultiGridPatching(2, padding=2)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5, padding=2), torch.nn.GELU(), torch.nn.Conv2d(4, 1, 3, padding=1)
    )
    model.double()
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)

    def operator(field):
        return patching.unpatch(model(patching.patch(field)))

    shift = {"shifts": (8, -16), "dims": (2, 3)}
    torch.testing.assert_close(operator(x.roll(**shift)), operator(x).roll(**shift), rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", [(24,), (16, 24), (8, 12, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_antialias_truncates_the_spectrum(sizes, dtype):
    d, axes = len(sizes), tuple(range(2, 2 + len(sizes)))
    x = torch.randn(2, 1, *sizes, dtype=dtype)
    blocks = MultiGridPatching(2, n_dim=d, patches=1, antialias=True).patch(x)
    assert torch.equal(blocks[:, :1], x)
    frequencies = np.meshgrid(*(np.fft.fftfreq(n) for n in sizes), indexing="ij")
    for level in (1, 2):
        keep = np.all([np.abs(f) < 0.5 / 2**level for f in frequencies], axis=0)
        smooth = np.fft.ifftn(np.fft.fftn(x.numpy(), axes=axes) * keep, axes=axes)
        plain = gather_definition(smooth, 2, (1,) * d, (0,) * d, "circular")[:, level : level + 1]
        actual = blocks[:, level : level + 1].numpy()
        np.testing.assert_allclose(actual, plain if dtype.is_complex else plain.real, rtol=0, atol=1e-13)


def test_coordinates_are_the_domains_and_the_filter_leaves_them():
    x = torch.randn(2, 1, 16, 8, dtype=torch.float64)
    gx, gy = torch.meshgrid(torch.arange(16) / 16, torch.arange(8) / 8, indexing="ij")
    grid = torch.stack([gx, gy]).double().expand(2, -1, -1, -1)
    kwargs = {"padding": (2, 1), "padding_mode": "replicate"}
    patching = MultiGridPatching(1, append_coords=True, **kwargs)
    assert patching.channels(1) == 6
    plain = MultiGridPatching(1, **kwargs)
    assert torch.equal(patching.patch(x), plain.patch(torch.cat([x, grid], 1)))
    filtered = MultiGridPatching(1, append_coords=True, antialias=True, **kwargs).patch(x)
    assert torch.equal(filtered[:, [0, 1, 2, 4, 5]], patching.patch(x)[:, [0, 1, 2, 4, 5]])
    assert torch.equal(filtered[:, 3:4], MultiGridPatching(1, antialias=True, **kwargs).patch(x)[:, 1:])


@pytest.mark.parametrize("mode", NUMPY_MODE)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients(mode, antialias, dtype):
    patching = MultiGridPatching(1, padding=(1, 3), padding_mode=mode, antialias=antialias, append_coords=antialias)
    x = torch.randn(1, 2, 4, 8, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(patching.patch, (x,), fast_mode=True)
    y = torch.randn(4, 1, 4, 10, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(patching.unpatch, (y,), fast_mode=True)
    assert torch.autograd.gradgradcheck(patching.patch, (x,), fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"antialias": True, "append_coords": True}])
def test_empty_batches_stay_in_the_graph(options):
    patching = MultiGridPatching(1, padding=1, **options)
    x = torch.randn(0, 2, 8, 8, requires_grad=True)
    patches = patching.patch(x)
    assert patches.shape == (0, patching.channels(2), 6, 6)
    field = patching.unpatch(patches)
    assert field.shape == (0, patching.channels(2), 8, 8)
    field.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_layout_and_dtype_do_not_matter():
    patching = MultiGridPatching(1, padding=1, padding_mode="zeros")
    x = torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2)
    assert torch.equal(patching.patch(x), patching.patch(x.contiguous()))
    assert torch.equal(patching.unpatch(patching.patch(x.mT)[:, :3].mT.mT), x.mT)
    z = torch.complex(x, x.mT)
    assert torch.equal(patching.patch(z), torch.complex(patching.patch(x), patching.patch(x.mT.contiguous())))
    coefficient = x > 0  # a two-phase medium, as Darcy's
    assert torch.equal(patching.patch(coefficient), patching.patch(coefficient.float()).bool())


def test_autocast_leaves_the_filter_exact():
    patching = MultiGridPatching(1, antialias=True)
    x = torch.randn(1, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(patching.patch(x), MultiGridPatching(1, antialias=True).patch(x))
    torch.testing.assert_close(patching.patch(x).double(), patching.patch(x.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"antialias": True, "append_coords": True, "padding_mode": "zeros"}])
def test_compiles_and_exports_in_one_graph(options):
    patching = MultiGridPatching(1, padding_fraction=0.25, **options)
    x = torch.randn(2, 1, 8, 8)
    round_trip = torch.compile(lambda x: patching.unpatch(patching.patch(x)), fullgraph=True, backend="aot_eager")
    assert torch.equal(round_trip(x), patching.unpatch(patching.patch(x)))
    exported = torch.export.export(patching, (x,)).module()
    assert torch.equal(exported(x), patching.patch(x))


def test_has_no_state():
    patching = MultiGridPatching(2, padding=3, padding_mode="reflect", append_coords=True)
    assert not patching.state_dict() and not list(patching.parameters())
    assert "levels=2" in repr(patching) and "'reflect'" in repr(patching) and "append_coords" in repr(patching)
    x = torch.randn(1, 1, 16, 16)
    for twin in (copy.deepcopy(patching), pickle.loads(pickle.dumps(patching))):
        assert torch.equal(twin.patch(x), patching.patch(x))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"levels": -1}, ValueError, "levels must be at least 0, got -1"),
        ({"levels": 1.0}, TypeError, "levels must be an int"),
        ({"levels": 1, "n_dim": 4}, ValueError, "n_dim must be one of 1, 2, 3"),
        ({"levels": 1, "padding": -1}, ValueError, "padding"),
        ({"levels": 1, "padding": (1, 2, 3)}, ValueError, "padding must have 2 entries"),
        ({"levels": 1, "padding": 0.5}, TypeError, "padding"),
        ({"levels": 1, "padding_fraction": 1.5}, ValueError, r"padding_fraction must lie in \[0, 1\].*1.5"),
        ({"levels": 1, "padding_fraction": -0.1}, ValueError, "padding_fraction"),
        ({"levels": 1, "padding_fraction": math.nan}, ValueError, "padding_fraction"),
        ({"levels": 1, "padding_fraction": "half"}, TypeError, "padding_fraction"),
        ({"levels": 1, "padding_fraction": (0.1,)}, ValueError, "padding_fraction must have 2 entries"),
        ({"levels": 1, "padding": 2, "padding_fraction": 0.1}, ValueError, "exclude each other"),
        ({"levels": 1, "padding_mode": "reflection"}, ValueError, "did you mean 'reflect'"),
        ({"levels": 1, "patches": 0}, ValueError, "patches"),
        ({"levels": 1, "patches": (2, 2, 2)}, ValueError, "patches must have 2 entries"),
    ],
)
def test_bad_configuration(arguments, error, match):
    with pytest.raises(error, match=match):
        MultiGridPatching(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda m: m.patch(torch.zeros(1, 1, 30, 32)),
            ValueError,
            "divisible by 4 along spatial axis 0.*28 and 32",
        ),
        (lambda m: m.patch(torch.zeros(1, 1, 32, 3)), ValueError, "spatial axis 1.*got 3; nearest valid: 4"),
        (lambda m: m.patch(torch.zeros(1, 1, 0, 4)), ValueError, "got 0; nearest valid: 4"),
        (lambda m: m.patch_target(torch.zeros(1, 1, 30, 32)), ValueError, "y must have a size divisible by 4"),
        (lambda m: m.patch(torch.zeros(1, 1, 4, 8)), ValueError, "padding must not exceed the domain, got 5 pixels.*4"),
        (lambda m: m.patch(torch.zeros(1, 32, 32)), ValueError, "x must have 4 dimensions"),
        (lambda m: m.patch(np.zeros((1, 1, 32, 32))), TypeError, "x must be a tensor"),
        (lambda m: m.patch(torch.zeros(1, 1, 32, 32), [16]), ValueError, r"indices must lie in \[0, 16\), got 16"),
        (lambda m: m.unpatch(torch.zeros(8, 1, 18, 18)), ValueError, "batch divisible by the 16 patches.*got 8"),
        (lambda m: m.unpatch(torch.zeros(16, 1, 10, 18)), ValueError, "spatial axis 0, got 10"),
        (lambda m: m.unpatch(torch.zeros(16, 1, 18)), ValueError, "y must have 4 dimensions"),
    ],
)
def test_bad_fields(call, error, match):
    with pytest.raises(error, match=match):
        call(MultiGridPatching(2, padding=5))


def test_more_bad_fields(monkeypatch):
    with pytest.raises(ValueError, match=r"which no field gives with levels=1.*padding_fraction"):
        MultiGridPatching(1, padding_fraction=0.25).unpatch(torch.zeros(4, 1, 10, 9))
    with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch.int64"):
        MultiGridPatching(1, append_coords=True).patch(torch.zeros(1, 1, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"divisible by 6 .*patches=3, levels=1"):
        MultiGridPatching(1, n_dim=1, patches=3).patch(torch.zeros(1, 1, 9))
    with pytest.raises(ValueError, match="levels must be at least 0"):
        MultigridPatching2D(torch.nn.Identity(), levels=-1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="use_distributed"):
        MultigridPatching2D(torch.nn.Identity(), levels=1, use_distributed=True)
