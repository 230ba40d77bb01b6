"""The families' own references and hand-written peers, against formulas that are written differently."""

import subprocess
import sys

import pytest
import torch

from benchmarks import _harness as harness
from benchmarks import startup, tfno
from benchmarks.__main__ import main


def signed_definition(inputs):
    """The spectral convolution, one mode at a time, through torch's own FFTs in float64."""
    x = inputs.x.double().requires_grad_()
    weight = inputs.weight.to(torch.complex128).requires_grad_()
    bias = inputs.bias.double().requires_grad_()
    n, modes, k2 = x.shape[-1], *weight.shape[2:]
    spectrum = torch.fft.rfft2(x, norm="forward")
    out = torch.zeros(*x.shape[:3], n // 2 + 1, dtype=torch.complex128)
    for row, f in enumerate(range(-(modes // 2), modes - modes // 2)):
        for column in range(k2):
            mode = torch.zeros_like(out)
            mode[:, :, f % n, column] = 1
            out = out + mode * (spectrum[:, :, f % n, column] @ weight[:, :, row, column])[:, :, None, None]
    y = torch.fft.irfft(torch.fft.ifft(out, dim=-2, norm="forward"), n=n, norm="forward") + bias
    return y, *torch.autograd.grad(y, [x, weight, bias], inputs.g.double())


@pytest.mark.parametrize(("n", "modes"), [(8, 4), (8, 8), (7, 5), (9, 4)])
def test_reference_and_hand_written_peers(n, modes):
    inputs = tfno.make_inputs(2, 3, n, modes, torch.device("cpu"))
    reference = tfno.reference(inputs)
    assert max(harness.relative_errors(reference, signed_definition(inputs))) < 1e-13
    for name in ("FFT by hand", "FFT by hand, columns pruned"):
        for mode in (harness.FORWARD, harness.BOTH):
            verdict = harness.check(tfno.PEERS[name](inputs), mode, reference, 1e-6)
            assert verdict["status"] == "ok", (name, mode, verdict)


@pytest.mark.parametrize(("n", "modes"), [(8, 4), (8, 8)])
def test_ours_is_right_before_it_is_timed(n, modes):
    inputs = tfno.make_inputs(2, 3, n, modes, torch.device("cpu"))
    reference = tfno.reference(inputs)
    for mode in (harness.FORWARD, harness.BOTH):
        verdict = harness.check(tfno.ours(inputs), mode, reference, 1e-6)
        assert verdict["status"] == "ok", verdict


def test_bytes_for_one_shape():
    # 2 fields of 4·2·3·8·8 bytes, 4 spectra of 8·2·3·4·3, one weight of 8·3·3·4·3
    assert tfno.least_bytes(2, 3, 8, 4)[harness.FORWARD] == {"bytes": 2 * 1536 + 4 * 576 + 864}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_family_lists_its_cases_without_running_them(device):
    assert {"startup", "tfno"} <= set(harness.families())
    assert not {"gpu", "table"} & set(harness.families())
    for family in harness.families():
        cases = harness.family_cases(family, device)
        keys = [tuple(sorted(case.labels.items())) for case in cases]
        assert len(set(keys)) == len(keys)
    cases = harness.family_cases("tfno", device)
    assert any(case.quick for case in cases)
    assert any(case.headline for case in cases)


def test_startup_rows(monkeypatch):
    seconds = {"import torchlayers": (2.0, 0.1), startup.PEERS["neuraloperator"][1]: "ImportError: nothing"}
    monkeypatch.setattr(startup, "_seconds", lambda statement: seconds.get(statement, (2.0, 0.5)))
    first, second = startup.measure(harness.Settings(quick=True))
    assert first["implementations"]["torchlayers"]["ms"] == pytest.approx(100)
    assert first["implementations"]["import torch itself"]["ratio"] == pytest.approx(20)
    assert first["implementations"]["neuraloperator"] == {"status": "failed", "detail": "ImportError: nothing"}
    assert second["implementations"]["torchlayers"]["ms"] == pytest.approx(500)


def test_import_probe_measures_after_torch():
    code = startup.PROBE.format(statement="import time; time.sleep(0.05)").replace("import torch\n", "import json\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    assert first >= 0
    assert second >= 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tfnoo"], "FAMILY must be of"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--mode", "x"], "--mode"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tfno", "--device", "cuda"])
    assert stop.value.code == 2
    assert "sees no GPU" in capsys.readouterr().err
