"""What only a GPU shows: CUDA graphs, compilations over changing batches, tuned configurations, precision."""

import pytest
import torch

from torchlayers.kernels import _lib, tdft
from torchlayers.testing import assert_close_rel

pytestmark = pytest.mark.gpu


def _data(device, batch=8, channels=32, n=64, k1=16, k2=9):
    x = torch.randn(batch, channels, n, n, device=device)
    return x, torch.randn(2, k1, n, device=device), torch.randn(2, n, k2, device=device)


def _exact(x, f1, f2):
    f1, f2 = torch.complex(*f1.double()), torch.complex(*f2.double())
    return torch.view_as_real(torch.einsum("kh,bchw,wl->klbc", f1, x.to(torch.complex128), f2)).movedim(-1, 0)


def test_forward_and_backward_are_captured_in_a_graph(device):
    x, f1, f2 = _data(device)
    x.requires_grad_()

    def step():
        (gradient,) = torch.autograd.grad(tdft.tdft2_forward(x, f1, f2).square().sum(), x)
        return gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, step())


def test_a_changing_batch_compiles_nothing_new(device, monkeypatch):
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs) or None)
    tdft.tdft2_forward(*_data(device, batch=64))
    compiled.clear()
    for batch in (65, 66, 80, 96):
        x, f1, f2 = _data(device, batch=batch)
        assert_close_rel(tdft.tdft2_forward(x, f1, f2), _exact(x, f1, f2))
    assert not compiled


def test_the_tuned_configuration_is_remembered(device, monkeypatch):
    monkeypatch.setattr(_lib, "AUTOTUNE", True)
    monkeypatch.setattr(_lib, "_PICKED", {})
    x, f1, f2 = _data(device)
    assert_close_rel(tdft.tdft2_forward(x, f1, f2), _exact(x, f1, f2))
    (key,) = _lib._PICKED
    assert key[0] == "tdft2_forward"

    def forbidden(*args):
        raise AssertionError("measured a second time")

    monkeypatch.setattr(_lib, "_measure", forbidden)
    assert_close_rel(tdft.tdft2_forward(x, f1, f2), _exact(x, f1, f2))


@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-6), ("tf32x3", 1e-6), ("tf32", 2e-3)])
def test_precision(precision, bound, device):
    if torch.version.hip and precision == "tf32x3":
        pytest.skip("tf32x3 is for CUDA")
    x, f1, f2 = _data(device)
    assert_close_rel(tdft.tdft2_forward(x, f1, f2, precision), _exact(x, f1, f2), rtol=bound)


def test_offsets_beyond_two_to_the_31(device):
    if torch.cuda.get_device_properties(device).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    storage = torch.empty(2**31 + 2**20, dtype=torch.float32, device=device)
    x = storage.as_strided((2, 1, 32, 32), (2**31, 1024, 32, 1)).copy_(torch.randn(2, 1, 32, 32, device=device))
    _, f1, f2 = _data(device, batch=1, channels=1, n=32)
    assert_close_rel(tdft.tdft2_forward(x, f1, f2), _exact(x, f1, f2))
