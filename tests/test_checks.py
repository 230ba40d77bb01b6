"""Argument checks: what passes, what raises which error, and that the message has argument, expectation and value."""

import pytest
import torch

from torchlayers import _checks
from torchlayers._checks import (
    check_choice,
    check_dtype,
    check_int,
    check_ints,
    check_ndim,
    check_same_device,
    check_size,
    require,
)

X = torch.zeros(2, 3, 4)


def test_what_is_right_passes():
    check_choice("method", "fft", ("fft", "dft"))
    check_choice("norm", None, (None, "ortho"))
    assert check_int("n", 3) == 3 and check_int("n", 0, minimum=0) == 0
    assert check_ints("modes", [4, 5]) == (4, 5) == check_ints("modes", (4, 5), 2)
    assert check_ints("modes", 4, 3) == (4, 4, 4) and check_ints("modes", 4) == (4,)
    assert check_ints("modes", torch.Size((2, 3))) == (2, 3)
    check_ndim("x", X, 3, "(batch, channels, n)")
    check_ndim("x", X, (3, 4), "(..., n)")
    check_size("x", X, 1, 3, "in_channels")
    check_size("x", X, -1, 4, "in_features")
    for kind, dtype in (("real", torch.bfloat16), ("complex", torch.complex64), ("inexact", torch.complex64)):
        check_dtype("x", X.to(dtype), kind=kind)
    check_same_device("x", X, "weight", X)
    assert require("math", extra="tfno").pi > 3


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: check_choice("method", "ftt", ("fft", "matrix")),
            ValueError,
            "method must be one of 'fft', 'matrix', got 'ftt'; did you mean 'fft'?",
        ),
        (lambda: check_choice("method", 3, ("fft",)), ValueError, "method must be one of 'fft', got 3"),
        (lambda: check_int("n", 2.0), TypeError, "n must be an int, got 2.0 (float)"),
        (lambda: check_int("n", True), TypeError, "n must be an int, got True (bool)"),
        (lambda: check_int("n", X), TypeError, "n must be an int, got a tensor of shape (2, 3, 4)"),
        (lambda: check_int("n", 0), ValueError, "n must be at least 1, got 0"),
        (lambda: check_ints("modes", 2.5), TypeError, "modes must be a sequence of ints, got 2.5 (float)"),
        (lambda: check_ints("modes", True), TypeError, "modes must be a sequence of ints, got True (bool)"),
        (lambda: check_ints("modes", "12"), TypeError, "modes must be a sequence of ints, got '12' (str)"),
        (lambda: check_ints("modes", (1, 2), 3), ValueError, "modes must have 3 entries, got 2: (1, 2)"),
        (lambda: check_ints("modes", (1, "2")), TypeError, "modes[1] must be an int, got '2' (str)"),
        (lambda: check_ints("modes", (1, 0)), ValueError, "modes[1] must be at least 1, got 0"),
        (
            lambda: check_ndim("x", [1.0], 3, "(batch, channels, n)"),
            TypeError,
            "x must be a tensor (batch, channels, n), got [1.0] (list)",
        ),
        (
            lambda: check_ndim("x", X, (1, 2), "(batch, n)"),
            ValueError,
            "x must have 1 or 2 dimensions (batch, n), got 3: shape (2, 3, 4)",
        ),
        (
            lambda: check_size("x", X, 1, 5, "in_channels"),
            ValueError,
            "x must have in_channels = 5 at dimension 1, got 3: shape (2, 3, 4)",
        ),
        (
            lambda: check_dtype("x", X.long(), kind="real"),
            TypeError,
            "x must have a real floating-point dtype, got torch.int64",
        ),
        (lambda: check_dtype("x", X, kind="complex"), TypeError, "x must have a complex dtype, got torch.float32"),
        (lambda: check_dtype("x", X.bool(), kind="inexact"), TypeError, "x must have a floating dtype, got torch.bool"),
        (
            lambda: check_same_device("x", X.to("meta"), "weight", X),
            ValueError,
            "x must be on the device of weight (cpu), got meta",
        ),
        (
            lambda: require("no_such_module", extra="tfno"),
            ImportError,
            "no_such_module is needed here and not installed: pip install -e '.[tfno]'",
        ),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message and type(caught.value) is error


def test_checks_trace_into_a_full_graph_with_dynamic_sizes():
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def f(x):
        check_ndim("x", x, 2, "(batch, n)")
        check_size("x", x, 1, 4, "n")
        check_dtype("x", x, kind="real")
        check_int("batch", x.shape[0], minimum=0)
        return x * 2

    x = torch.randn(3, 4)
    assert torch.equal(f(x), x * 2) and torch.equal(f(x[:2]), x[:2] * 2)
    torch._dynamo.reset()


def test_all_checks_are_listed():
    assert set(_checks.__all__) == {n for n in vars(_checks) if n.startswith("check_") or n == "require"}
