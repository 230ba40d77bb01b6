"""Which implementation runs: argument, then torchlayers.backend, then the environment; never a silent fallback."""

import os
import subprocess
import sys

import pytest
import torch

import torchlayers
from torchlayers import _backend
from torchlayers._backend import use_triton

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.setattr(_backend, "_current", "auto")
    monkeypatch.setattr(_backend, "_last", _backend._last)


def python(code: str, **env: str) -> str:
    """What a fresh process prints; its error raises."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch, torchlayers\nfrom torchlayers import _backend\n" + code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


def reason(**options) -> str:
    use_triton("op", CPU, **options)
    return torchlayers.last_dispatch()


def test_auto_takes_plain_torch_on_the_cpu_and_says_so():
    assert use_triton("op", CPU) is False
    assert torchlayers.last_dispatch() == "torch: tensors on the CPU"
    assert use_triton("op", torch.zeros(1, device="meta")) is False
    assert torchlayers.last_dispatch() == "torch: tensors on meta"


def test_as_a_setter_it_stays_as_a_context_manager_it_goes():
    torchlayers.backend("torch")
    assert reason() == "torch: backend is 'torch'"
    with torchlayers.backend("auto"):
        assert reason() == "torch: tensors on the CPU"
        with torchlayers.backend("triton"), pytest.raises(torchlayers.BackendError):
            reason()
        assert reason() == "torch: tensors on the CPU"
    assert reason() == "torch: backend is 'torch'"


def test_the_context_manager_restores_after_an_error_and_can_be_entered_later():
    with pytest.raises(KeyError), torchlayers.backend("torch"):
        raise KeyError
    assert reason() == "torch: tensors on the CPU"
    later = torchlayers.backend("torch")
    torchlayers.backend("auto")
    with later:
        assert reason() == "torch: backend is 'torch'"
    assert reason() == "torch: tensors on the CPU"


def test_the_argument_goes_before_the_program_and_the_program_before_the_environment():
    torchlayers.backend("triton")
    assert reason(backend="torch") == "torch: backend is 'torch'"
    assert reason(backend="auto") == "torch: tensors on the CPU"
    with pytest.raises(torchlayers.BackendError):
        reason(backend=None)
    out = python(
        """
for argument in (None, "auto"):
    _backend.use_triton("op", torch.zeros(1), argument)
    print(torchlayers.last_dispatch())
torchlayers.backend("auto")
_backend.use_triton("op", torch.zeros(1))
print(torchlayers.last_dispatch())
""",
        TORCHLAYERS_BACKEND="torch",
    )
    assert out.splitlines() == [
        "torch: backend is 'torch'",
        "torch: tensors on the CPU",
        "torch: tensors on the CPU",
    ]


def test_triton_insists():
    with pytest.raises(
        torchlayers.BackendError,
        match=r"^backend='triton' was asked for, but tensors on the CPU \(operation op\)$",
    ):
        use_triton("op", CPU, "triton")
    assert issubclass(torchlayers.BackendError, ValueError)


def test_in_the_interpreter_triton_takes_cpu_tensors_when_asked_and_refuses_what_it_cannot_do():
    out = python(
        """
x = torch.zeros(1)
print(_backend.use_triton("op", x), torchlayers.last_dispatch())
with torchlayers.backend("triton"):
    print(_backend.use_triton("op", x), torchlayers.last_dispatch())
    try:
        _backend.use_triton("op", x, unsupported="float64")
    except torchlayers.BackendError as error:
        print(error)
    try:
        _backend.use_triton("op", torch.zeros(1, device="meta"))
    except torchlayers.BackendError as error:
        print(error)
""",
        TRITON_INTERPRET="1",
    )
    assert out.splitlines() == [
        "False torch: tensors on the CPU",
        "True triton: op",
        "backend='triton' was asked for, but op does not support float64 (operation op)",
        "backend='triton' was asked for, but tensors on meta (operation op)",
    ]


def test_without_triton_everything_else_works(tmp_path):
    # A triton that cannot be imported, found before the real one; torch itself does without.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    out = python(
        """
print(_backend.import_kernels("tdft"), _backend.use_triton("op", torch.zeros(1)), torchlayers.last_dispatch())
try:
    _backend.use_triton("op", torch.zeros(1), "triton")
except torchlayers.BackendError as error:
    print(error)
""",
        PYTHONPATH=str(tmp_path),
    )
    assert out.splitlines() == [
        "None False torch: triton is not installed",
        "backend='triton' was asked for, but triton is not installed (operation op)",
    ]


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_bad_names(name):
    for call in (lambda: torchlayers.backend(name), lambda: use_triton("op", CPU, name if name is not None else 1)):
        with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'torch', got"):
            call()
    assert _backend._current == "auto"


def test_a_bad_environment_fails_at_import():
    with pytest.raises(RuntimeError, match=r"ValueError: TORCHLAYERS_BACKEND must be one of .*, got 'gpu'"):
        python("", TORCHLAYERS_BACKEND="gpu")


def test_under_a_full_graph_compile_the_choice_is_noted_and_a_change_is_seen():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return x.sin() if use_triton("op", x) else x.cos()

    @torch.compile(fullgraph=True, backend="eager")
    def inside(x):
        with torchlayers.backend("torch"):
            return x.sin() if use_triton("op", x) else x.cos()

    x = torch.ones(3)
    torch.testing.assert_close(f(x), x.cos())
    assert torchlayers.last_dispatch() == "torch: tensors on the CPU"
    with torchlayers.backend("torch"):
        torch.testing.assert_close(f(x), x.cos())
        assert torchlayers.last_dispatch() == "torch: backend is 'torch'"
    f(x)
    assert torchlayers.last_dispatch() == "torch: tensors on the CPU"
    torch.testing.assert_close(inside(x), x.cos())
    assert torchlayers.last_dispatch() == "torch: backend is 'torch'" and _backend._current == "auto"
    torch._dynamo.reset()
