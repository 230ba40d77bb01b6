"""The layer contract: what every public module promises, one check an item.

A check takes an :class:`Entry` and raises where the promise is broken. ``test_contract.py`` runs all of them over all
entries; ``test_contract_checks.py`` proves, with a module broken on purpose for each, that every check can fail.
"""

from __future__ import annotations

import copy
import doctest
import functools
import inspect
import io
import json
import pathlib
import pickle
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from torchlayers.testing import assert_close_rel

NAMES_FILE = pathlib.Path(__file__).with_name("state_dict_keys.json")
BATCH_SIZES = (3, 2, 5, 1)


@dataclass(frozen=True)
class Entry:
    """A public module under contract.

    Args:
        name: unique: the class's name, with a variant in brackets where there are several.
        module: the public class.
        factory: ``factory(device=None, dtype=None)`` builds a tiny one; extra keywords are not passed.
        make_input: ``make_input(batch, dtype)`` gives the tuple of positional arguments; ``batch`` entries along
            dimension 0 of every tensor.
        shows: strings that ``extra_repr()`` must contain.
        bad_calls: argument name -> function of the module that must raise an error that names the argument.
        bad_constructions: argument name -> function that must raise an error that names it.
        not_applicable: item of the contract -> why it does not hold for this module.
        second_order: whether second derivatives are promised too.
        slow: items left to ``make test-all``, for further variants of a module that another entry covers.
        state: names and shapes of the state dict; by default those on record in ``state_dict_keys.json``.
    """

    name: str
    module: type[nn.Module]
    factory: Callable[..., nn.Module]
    make_input: Callable[[int, torch.dtype], tuple]
    shows: tuple[str, ...] = ()
    bad_calls: Mapping[str, Callable[[nn.Module], Any]] = field(default_factory=dict)
    bad_constructions: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    not_applicable: Mapping[str, str] = field(default_factory=dict)
    second_order: bool = False
    slow: tuple[str, ...] = ()
    state: Mapping[str, list[int]] | None = None

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.factory(dtype=dtype)


CHECKS: dict[str, Callable[[Entry], None]] = {}


def item(check: Callable[[Entry], None]) -> Callable[[Entry], None]:
    CHECKS[check.__name__] = check
    return check


# -- small things the checks share ------------------------------------------------------------------------------------


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def run(module: nn.Module, args: tuple) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(module(*args))


def loss_of(outputs: Any) -> torch.Tensor:
    """A real number that depends on every output entry, on each with another weight."""
    total = torch.zeros((), dtype=torch.float64)
    for output in tensors(outputs):
        flat = (torch.view_as_real(output) if output.is_complex() else output).flatten().double()
        total = total + (flat * torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64)).sum() + (flat**2).sum()
    return total


def outputs_and_gradients(
    module: nn.Module, args: tuple, call: Callable[..., Any] | None = None
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What the module returns, and the gradients of :func:`loss_of` for each parameter and floating input."""
    args = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) and _inexact(a) else a for a in args)
    outputs = (module if call is None else call)(*args)
    wanted = {n: p for n, p in module.named_parameters() if p.requires_grad}
    wanted |= {f"input {i}": a for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad}
    gradients = torch.autograd.grad(loss_of(outputs), list(wanted.values()), allow_unused=True)
    found = {n: g for n, g in zip(wanted, gradients, strict=True) if g is not None}
    return [o.detach() for o in tensors(outputs)], found


def assert_same(got: Any, want: Any, what: str, **options: Any) -> None:
    names = list(want) if isinstance(want, dict) else range(len(want))
    assert len(got) == len(want), f"{what}: {len(got)} tensors instead of {len(want)}"
    if isinstance(want, dict):
        assert set(got) == set(want), f"{what}: {sorted(set(got) ^ set(want))} only on one side"
    for name in names:
        try:
            assert_close_rel(got[name], want[name], **options)
        except AssertionError as error:
            raise AssertionError(f"{what}, {name}: {error}") from None


def _inexact(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _assert_raises(what: str, argument: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, TypeError) as error:
        assert argument in str(error), f"{what}: the message does not name {argument!r}: {error}"
        return
    except Exception as error:
        kind = type(error).__name__
        raise AssertionError(f"{what}, bad {argument}: {kind} instead of ValueError: {error}") from error
    raise AssertionError(f"{what}: a bad {argument} was accepted")


# -- the items --------------------------------------------------------------------------------------------------------


@item
def device_and_dtype(entry: Entry) -> None:
    """``device=`` and ``dtype=`` are keywords and reach every parameter and buffer; ``.double()`` works."""
    parameters = inspect.signature(entry.module.__init__).parameters
    for name in ("device", "dtype"):
        assert name in parameters, f"no keyword {name}"
        assert parameters[name].default is None, f"{name} must default to None"
    for dtype in (torch.float64, torch.float32):
        module = entry.factory(device="cpu", dtype=dtype)
        for name, tensor in own_tensors(module).items():
            if _inexact(tensor):
                assert tensor.dtype.to_real() == dtype, f"{name} is {tensor.dtype} for dtype={dtype}"
        for output in run(module, entry.make_input(2, dtype)):
            assert output.dtype.to_real() == dtype, f"output is {output.dtype} for input and parameters of {dtype}"
    single, double = entry.build(), entry.build().double()
    args = entry.make_input(2, torch.float64)
    for output in run(double, args):
        assert output.dtype.to_real() == torch.float64, f"output of .double() is {output.dtype}"
    double.load_state_dict(single.state_dict())
    assert_same(run(single, _cast(args, torch.float32)), run(double, args), "float32 against .double()", rtol=1e-5)


def _cast(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(
        a.to(dtype.to_complex() if a.is_complex() else dtype) if isinstance(a, torch.Tensor) and _inexact(a) else a
        for a in args
    )


@item
def meta(entry: Entry) -> None:
    """Builds on the meta device; ``to_empty`` and ``reset_parameters`` then give what the constructor gives."""
    with torch.device("meta"):
        in_context = entry.factory()
    module = entry.factory(device="meta")
    for made in (module, in_context):
        for name, tensor in own_tensors(made).items():
            assert tensor.is_meta, f"{name} is on {tensor.device}"
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in own_tensors(module).values():
            tensor.fill_(float("nan") if _inexact(tensor) else 1)
    fresh = entry.build()
    assert callable(getattr(module, "reset_parameters", None)), "no reset_parameters()"
    module.reset_parameters()
    built = own_tensors(fresh)
    for name, tensor in own_tensors(module).items():
        assert not tensor.isnan().any(), f"reset_parameters() does not reach all of {name}"
        want = built[name]
        if want.numel() > 1 and (want == want.flatten()[0]).all():
            assert torch.equal(tensor, want), f"reset_parameters() leaves {name} other than the constructor does"
        elif want.numel() >= 16 and _inexact(want):
            ratio = (tensor.std() / want.std()).item()
            assert 1 / 3 < ratio < 3, f"reset_parameters() scales {name} by {ratio:.2g} against the constructor"
    for output in run(module, entry.make_input(2, torch.float32)):
        assert output.isfinite().all(), "output after reset_parameters() is not finite"


@item
def extra_repr(entry: Entry) -> None:
    """``print(module)`` tells how it was configured."""
    shown = entry.build().extra_repr()
    assert shown, "extra_repr() is empty"
    for part in entry.shows:
        assert part in shown, f"extra_repr() lacks {part!r}: {shown}"


@item
def state_dict(entry: Entry) -> None:
    """Parameter names and shapes are those on record; a fresh module loads what another saved, strictly."""
    module = entry.build()
    saved = {n: list(t.shape) for n, t in module.state_dict().items()}
    record = json.loads(NAMES_FILE.read_text()).get(entry.name) if entry.state is None else entry.state
    assert saved == record, (
        f"state_dict of {entry.name} has {saved}, on record is {record}. A changed name breaks users' checkpoints; "
        f"for a new entry run: python tests/contract/contract_entries.py"
    )
    for name, parameter in module.named_parameters():
        assert parameter.ndim > 0, f"{name} is 0-d, which FSDP2 refuses"
        assert not parameter.is_complex(), f"{name} is complex, which FSDP2 and GradScaler refuse"
    torch.manual_seed(1)
    other = entry.factory()
    args = entry.make_input(2, torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other.load_state_dict(module.state_dict(), strict=True)
    assert_same(run(other, args), run(module, args), "loaded", rtol=0)


def _same_after(entry: Entry, what: str, through: Callable[[nn.Module], nn.Module]) -> None:
    module = entry.build()
    args = entry.make_input(2, torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    want = run(module, args)  # before the copy: what a first call keeps must survive too
    other = through(module)
    assert_same(run(other, args), want, what, rtol=0)
    assert_same(
        outputs_and_gradients(other, args)[1], outputs_and_gradients(module, args)[1], f"gradients, {what}", rtol=0
    )
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    shared = [n for n, p in other.named_parameters() if p.untyped_storage().data_ptr() in storages]
    assert not shared, f"{what}: shares the memory of {shared}"
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(run(module, args), want, f"the original, after its {what} was zeroed", rtol=0)


@item
def deepcopy(entry: Entry) -> None:
    """A deep copy computes the same and shares nothing."""
    _same_after(entry, "copy", copy.deepcopy)


@item
def pickled(entry: Entry) -> None:
    """A pickled and unpickled module computes the same."""
    _same_after(entry, "unpickled", lambda module: pickle.loads(pickle.dumps(module)))


@item
def safetensors(entry: Entry) -> None:
    """The state dict goes through safetensors."""
    from safetensors.torch import load, save

    def through(module):
        fresh = entry.factory()
        fresh.load_state_dict(load(save(module.state_dict())), strict=True)
        return fresh

    _same_after(entry, "safetensors", through)


@item
def weights_only(entry: Entry) -> None:
    """The state dict goes through ``torch.save`` and ``torch.load(weights_only=True)``."""

    def through(module):
        file, fresh = io.BytesIO(), entry.factory()
        torch.save(module.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
        return fresh

    _same_after(entry, "torch.load", through)


@item
def noncontiguous(entry: Entry) -> None:
    """Strided, transposed and expanded inputs give what contiguous ones give, and no input is written to."""
    module = entry.build()
    args = entry.make_input(3, torch.float32)

    def strided(x):
        room = x.new_zeros(*x.shape, 2)
        room[..., 1] = 1e6  # what must not be read
        room[..., 0] = x
        return room[..., 0]

    def transposed(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    def expanded(x):
        return x[:1].expand(x.shape)

    for change in (strided, transposed, expanded):
        changed = tuple(change(a) if isinstance(a, torch.Tensor) else a for a in args)
        plain = tuple(a.contiguous().clone() if isinstance(a, torch.Tensor) else a for a in changed)
        before = [t.clone() for t in tensors(changed)]
        got, want = outputs_and_gradients(module, changed), outputs_and_gradients(module, plain)
        # Another memory layout may sum in another order.
        assert_same(got[0], want[0], f"{change.__name__} input", rtol=1e-5)
        assert_same(got[1], want[1], f"gradients, {change.__name__} input", rtol=1e-5)
        assert all(map(torch.equal, tensors(changed), before)), "the input was written to"


@item
def leading_dimensions(entry: Entry) -> None:
    """No batch dimension, or several, give what one gives."""
    module = entry.build()
    args = entry.make_input(6, torch.float32)
    want = run(module, args)
    several = run(module, tuple(a.unflatten(0, (2, 3)) if isinstance(a, torch.Tensor) else a for a in args))
    assert all(s.shape[:2] == (2, 3) for s in several), f"shapes {[tuple(s.shape) for s in several]}"
    assert_same([s.flatten(0, 1) for s in several], want, "two batch dimensions", rtol=1e-5)
    none = run(module, tuple(a[0] if isinstance(a, torch.Tensor) else a for a in args))
    assert_same(none, [w[0] for w in want], "no batch dimension", rtol=1e-5)


@item
def empty_batch(entry: Entry) -> None:
    """A batch of none gives an output of none, and a backward pass gives zeros where a full batch gives gradients."""
    module = entry.build()
    outputs, gradients = outputs_and_gradients(module, entry.make_input(2, torch.float32))
    args = entry.make_input(0, torch.float32)
    plain = tensors(module(*(a.requires_grad_() if isinstance(a, torch.Tensor) and _inexact(a) else a for a in args)))
    for got, like in zip(plain, outputs, strict=True):
        assert got.shape == (0, *like.shape[1:]), f"shape {tuple(got.shape)} instead of {(0, *like.shape[1:])}"
        assert got.dtype == like.dtype, f"{got.dtype} instead of {like.dtype}"
        assert got.requires_grad or not gradients, "the output is not attached to the graph"
    _, empty = outputs_and_gradients(module, args)
    assert set(empty) == set(gradients), f"no gradient for {sorted(set(gradients) - set(empty))}"
    assert all(not g.any() for g in empty.values()), "a gradient of an empty batch is not zero"


@item
def gradcheck(entry: Entry) -> None:
    """First (and, where promised, second) derivatives agree with finite differences in float64."""
    module = entry.build(torch.float64)
    args = entry.make_input(2, torch.float64)
    named = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters() if p.requires_grad}
    inputs = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and _inexact(a) else a for a in args]

    def function(*values):
        split = len(inputs)
        output = torch.func.functional_call(module, dict(zip(named, values[split:], strict=True)), values[:split])
        return tuple(tensors(output))

    assert torch.autograd.gradcheck(function, (*inputs, *named.values()), fast_mode=True)
    if entry.second_order:
        assert torch.autograd.gradgradcheck(function, (*inputs, *named.values()), fast_mode=True)


@item
def autocast(entry: Entry) -> None:
    """Under autocast to bfloat16 the result is near the float32 one, and gradients arrive in the parameters' dtype."""
    module = entry.build()
    args = entry.make_input(3, torch.float32)
    want = outputs_and_gradients(module, args)

    def call(*values):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(*values)

    got = outputs_and_gradients(module, args, call)
    assert_same(got[0], want[0], "autocast", rtol=0.05)
    assert_same(got[1], want[1], "gradients under autocast", rtol=0.1)
    for name, gradient in got[1].items():
        assert gradient.dtype == want[1][name].dtype, f"gradient of {name} is {gradient.dtype}"


@item
def checkpointed(entry: Entry) -> None:
    """``torch.utils.checkpoint`` changes neither outputs nor gradients."""
    module = entry.build()
    args = entry.make_input(2, torch.float32)
    want = outputs_and_gradients(module, args)
    got = outputs_and_gradients(module, args, lambda *values: checkpoint(module, *values, use_reentrant=False))
    assert_same(got[0], want[0], "checkpoint", rtol=0)
    assert_same(got[1], want[1], "gradients under checkpoint", rtol=1e-6)


def _compilations(module: nn.Module, inputs: list[tuple]) -> int:
    """How often ``torch.compile(fullgraph=True)`` compiles over the inputs; results are compared with eager ones."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    try:
        for args in inputs:
            with warnings.catch_warnings():
                # Dynamo's own, at every torch.autograd.Function that it traces.
                warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
                got = outputs_and_gradients(module, args, compiled)
            want = outputs_and_gradients(module, args)
            assert_same(got[0], want[0], "compiled", rtol=1e-5)
            assert_same(got[1], want[1], "gradients, compiled", rtol=1e-4)
        return counter.frame_count
    finally:
        torch._dynamo.reset()


@functools.cache
def _compilations_of_linear() -> int:
    return _compilations(nn.Linear(4, 3), [(torch.randn(b, 4),) for b in BATCH_SIZES])


@item
def compiled(entry: Entry) -> None:
    """Compiles as one graph, no more often than ``nn.Linear`` does over the same batch sizes, with equal results."""
    linear = _compilations_of_linear()
    ours = _compilations(entry.build(), [entry.make_input(b, torch.float32) for b in BATCH_SIZES])
    assert ours <= linear, f"{ours} compilations over batch sizes {BATCH_SIZES}, nn.Linear has {linear}"


@item
def exported(entry: Entry) -> None:
    """``torch.export`` takes it with a dynamic batch, and the exported program runs at another batch size."""
    module = entry.build()
    args = entry.make_input(3, torch.float32)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if isinstance(a, torch.Tensor) else None for a in args)
    program = torch.export.export(module, args, dynamic_shapes=shapes)
    for batch in (3, 5):
        args = entry.make_input(batch, torch.float32)
        assert_same(run(program.module(), args), run(module, args), f"exported, batch {batch}", rtol=1e-5)


@item
def bad_input(entry: Entry) -> None:
    """Bad input raises ``ValueError`` or ``TypeError`` naming the argument."""
    assert entry.bad_calls, "the entry has no bad_calls"
    module = entry.build()
    for argument, call in entry.bad_calls.items():
        _assert_raises("call", argument.split("#")[0], lambda call=call: call(module))


@item
def bad_construction(entry: Entry) -> None:
    """A bad constructor argument raises ``ValueError`` or ``TypeError`` naming it."""
    assert entry.bad_constructions, "the entry has no bad_constructions"
    for argument, call in entry.bad_constructions.items():
        _assert_raises("constructor", argument.split("#")[0], call)


@item
def docstring(entry: Entry) -> None:
    """The docstring gives shapes, formula and errors, and its example runs."""
    text = inspect.cleandoc(entry.module.__doc__ or "")
    assert text and entry.module.__doc__ is not nn.Module.__doc__, "no docstring"
    assert re.search(r"\(([A-Za-z]\w*|\.\.\.|\*), ", text), "no shapes, such as (batch, channels, height, width)"
    assert re.search(r"^Raises:", text, re.MULTILINE), "no Raises: section"
    assert re.search(r"[=·×∑Σ].*|``.*=.*``", text), "no formula"
    _run_examples(entry.module, text)


@item
def source(entry: Entry) -> None:
    """The docstring names the paper and the place in it, or whatever else defines the module."""
    text = entry.module.__doc__ or ""
    assert re.search(r"(arXiv|doi|[Ss]ection|[Ee]quation|[Ee]q\.|et al)[: .,]", text), "no source, such as a section"


def _run_examples(module: type[nn.Module], text: str) -> None:
    name = module.__name__
    examples = doctest.DocTestParser().get_examples(text)
    if examples:
        # As doctest does, in the names of the file that defines the module.
        names = dict(vars(sys.modules[module.__module__]))
        test = doctest.DocTest(examples, names, name, None, 0, text)
        report = io.StringIO()
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.write)
        assert not failed, f"the example fails:\n{report.getvalue()}"
        return
    # A literal block: a line that ends in "::", then lines indented more deeply.
    blocks = re.findall(r"^( *).*::\n\s*\n((?:\1 +.*\n|[ \t]*\n)+)", text + "\n", re.MULTILINE)
    sources = [textwrap.dedent(block) for _, block in blocks if "import" in block]
    assert sources, "no runnable example: neither >>> lines nor a literal block with its imports"
    for source in sources:
        try:
            exec(compile(source, f"example of {name}", "exec"), {})
        except Exception as error:
            raise AssertionError(f"the example fails: {error!r}\n{source}") from error


# -- data parallelism: in two processes, see contract_world.py --------------------------------------------------------

DISTRIBUTED = ("ddp", "fsdp2")
ITEMS = (*CHECKS, *DISTRIBUTED)
