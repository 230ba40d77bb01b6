"""Tables are made once in float64, and no mode of torch leaves anything but a plain tensor in the cache."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _python_dispatch
from torch.utils.flop_counter import FlopCounterMode

from torchlayers import _tables
from torchlayers._tables import register_table, table
from torchlayers.testing import assert_close_rel

CALLS = []


@register_table("test_inverse", shape=lambda n, k: (n, k))
def _inverse(n, k):
    """1 / (1 + i + j); made of a matrix product, so that modes which change those would show."""
    CALLS.append((n, k))
    i, j = torch.arange(n, dtype=torch.float64), torch.arange(k, dtype=torch.float64)
    return 1 / (torch.stack((torch.ones(n).double(), i), 1) @ torch.stack((1 + j, torch.ones(k).double())))


@register_table("test_single", shape=lambda n: (n,))
def _single(n):
    return torch.ones(n, dtype=torch.float32)


@register_table("test_misshapen", shape=lambda n: (n + 1,))
def _misshapen(n):
    return torch.ones(n, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch):
    monkeypatch.setattr(_tables, "_CACHE", {})
    CALLS.clear()
    torch._dynamo.reset()


def expected(n, k):
    return torch.tensor([[1 / (1 + i + j) for j in range(k)] for i in range(n)], dtype=torch.float64)


def cached_are_plain():
    cached = list(_tables._CACHE.values())
    for t in cached:
        assert type(t) is torch.Tensor and not isinstance(t, FakeTensor)
        assert not t.is_inference() and not t.requires_grad and t.device.type == "cpu"
    return len(cached)


def test_each_key_is_built_once_and_every_dtype_from_float64():
    double = table("test_inverse", 3, 4)
    assert table("test_inverse", 3, 4) is double and len(CALLS) == 1
    torch.testing.assert_close(double, expected(3, 4), rtol=1e-15, atol=0)
    # A lower precision is asked for first: a higher one is not cast from it.
    low = table("test_inverse", 5, 7, dtype=torch.bfloat16)
    assert torch.equal(low, expected(5, 7).bfloat16())
    assert_close_rel(table("test_inverse", 5, 7), expected(5, 7), rtol=1e-15)
    assert torch.equal(table("test_inverse", 5, 7, dtype=torch.float32), expected(5, 7).float())
    assert table("test_inverse", 5, 7, dtype=torch.complex128).dtype == torch.complex128


def test_the_oldest_table_goes_first(monkeypatch):
    monkeypatch.setattr(_tables, "_LIMIT", 2)
    first = table("test_inverse", 1, 1)
    table("test_inverse", 1, 2)
    table("test_inverse", 1, 3)
    assert len(_tables._CACHE) == 2
    table("test_inverse", 1, 2)
    assert CALLS == [(1, 1), (1, 2), (1, 3)]
    assert table("test_inverse", 1, 1) is not first and len(CALLS) == 4


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_neither_traces_the_builder_nor_leaves_a_fake_tensor(dynamic):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def f(x):
        return x @ table("test_inverse", x.shape[-1], 3, dtype=x.dtype, device=x.device)

    for n in (4, 5):
        x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
        y = f(x)
        torch.testing.assert_close(y, x @ expected(n, 3))
        y.sum().backward()
        torch.testing.assert_close(x.grad, expected(n, 3).sum(1).expand(2, n))
    assert cached_are_plain() == 2


def test_export_leaves_no_fake_tensor():
    class Module(torch.nn.Module):
        def forward(self, x):
            return x @ table("test_inverse", 4, 3, dtype=x.dtype)

    x = torch.randn(2, 4)
    exported = torch.export.export(Module(), (x,))
    cached_are_plain()
    torch.testing.assert_close(exported.module()(x), x @ expected(4, 3).float())
    assert cached_are_plain() == 1


def test_fake_tensors_get_a_fake_table_and_cache_nothing():
    with FakeTensorMode():
        t = table("test_inverse", 2, 3, dtype=torch.float32)
        assert isinstance(t, FakeTensor) and t.shape == (2, 3) and t.dtype == torch.float32
    assert not _tables._CACHE and not CALLS
    assert torch.equal(table("test_inverse", 2, 3), expected(2, 3))


def test_a_table_first_made_in_inference_mode_can_be_saved_for_backward():
    with torch.inference_mode():
        assert torch.equal(table("test_inverse", 2, 3), expected(2, 3))
    assert cached_are_plain() == 1
    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    (x * table("test_inverse", 2, 3).sum(1)).square().sum().backward()
    assert x.grad is not None


def test_modes_and_transforms_do_not_reach_the_builder():
    want = expected(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), FlopCounterMode(display=False):
        assert torch.equal(table("test_inverse", 4, 3), want)
    assert cached_are_plain() == 1
    _tables._CACHE.clear()
    x = torch.randn(5, 4, dtype=torch.float64)
    mapped = torch.vmap(torch.func.grad(lambda v: (v @ table("test_inverse", 4, 3)).sum()))(x)
    torch.testing.assert_close(mapped, want.sum(1).expand(5, 4))
    assert cached_are_plain() == 1
    assert torch.equal(table("test_inverse", 4, 3), want)


def test_the_operation_is_sound():
    sample = ("test_inverse", [3, 4], torch.float32, torch.device("cpu"))
    results = torch.library.opcheck(torch.ops.torchlayers.table.default, sample)
    assert set(results.values()) == {"SUCCESS"}
    # What the operation returns is the caller's own: compilers write into results that they no longer need.
    torch.ops.torchlayers.table(*sample).zero_()
    assert torch.equal(torch.ops.torchlayers.table(*sample), expected(3, 4).float())


def test_wrong_builders_are_refused():
    with pytest.raises(TypeError, match=r"'test_single' must be built in float64, got torch\.float32"):
        table("test_single", 3)
    with pytest.raises(ValueError, match=r"'test_misshapen' must have shape \(4,\), got \(3,\)"):
        table("test_misshapen", 3)
    with pytest.raises(ValueError, match="name must be new to the table registry, got 'test_inverse'"):
        register_table("test_inverse", shape=tuple)(_inverse)
    assert not _tables._CACHE


def test_modes_of_other_threads_do_not_count(monkeypatch):
    """Two threads that leave their modes in the order of entering: torch's own flag stays set from then on."""
    monkeypatch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", False)  # put back at the end
    entered, left = threading.Event(), threading.Event()

    def first():
        with FlopCounterMode(display=False):
            entered.set()
            assert left.wait(10)

    def second():
        assert entered.wait(10)
        with FlopCounterMode(display=False):
            left.set()
            one.join()

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start(), two.start()
    two.join()
    assert _python_dispatch.is_in_torch_dispatch_mode()  # else the test shows nothing
    assert table("test_inverse", 2, 3) is table("test_inverse", 2, 3)
