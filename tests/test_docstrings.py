"""Every public function and class says what it is, and its example runs."""

import doctest
import importlib
import inspect

import pytest

import torchlayers
from torchlayers.ring_attention import use_layout

PACKAGES = ["", *(name for name in torchlayers._SUBMODULES if name != "kernels")]


def public():
    """Each public function and class once."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(f"torchlayers.{package}".rstrip("."))
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                found.setdefault(id(value), pytest.param(value, id=f"{package}.{name}".lstrip(".")))
    return list(found.values())


PUBLIC = public()


@pytest.mark.parametrize("value", PUBLIC)
def test_docstring(value):
    text = value.__doc__
    # A dataclass without one gets its signature.
    assert text and not text.startswith(f"{value.__name__}("), "no docstring"


# Torch says once a process that sparse tensors are not checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("value", [param for param in PUBLIC if ">>>" in (param.values[0].__doc__ or "")])
def test_example_runs(value):
    text, name = inspect.getdoc(value), value.__name__
    examples = doctest.DocTestParser().get_examples(text)
    test = doctest.DocTest(examples, dict(vars(inspect.getmodule(value))), name, None, 0, text)
    report = []
    # Whatever another test has said of sequences in this process, an example's are whole.
    with use_layout(None):
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not failed, "".join(report)
