"""What tests share, ours and those of code that builds on these layers. Needs torch only, no pytest.

- :func:`relative_error`, :func:`assert_close_rel`: results against a float64 reference, tolerances from the dtype;
- :func:`equivariance_error`, :func:`assert_equivariant`: ``f(g x) = g f(x)`` for one group element ``g``;
- :func:`opcheck_all`: :func:`torch.library.opcheck` over every registered operation, none forgotten;
- :func:`nan_empty`: memory that nobody wrote shows up as NaN;
- :func:`spawn_ranks`, :func:`serve_ranks`: a test file that is also the program of a few gloo processes.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from ._ring import leave_group

__all__ = [
    "TOLERANCES",
    "assert_close_rel",
    "assert_equivariant",
    "equivariance_error",
    "nan_empty",
    "opcheck_all",
    "relative_error",
    "serve_ranks",
    "spawn_ranks",
    "tolerance",
]

# Relative error in the Euclidean norm that an operation may show against its float64 reference: a few roundings, not
# one per term of its longest sum. "tf32" is float32 data multiplied on tensor cores with 10 mantissa bits.
TOLERANCES: Mapping[torch.dtype | str, float] = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    "tf32": 2e-3,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
_TF32_EPS = 2.0**-10

Dtype = torch.dtype | Literal["tf32"]


def tolerance(dtype: Dtype) -> float:
    """The relative tolerance of ``dtype``; a complex dtype has that of its real part, integers and bools have 0."""
    if isinstance(dtype, torch.dtype):
        if dtype.is_complex:
            dtype = dtype.to_real()
        if not dtype.is_floating_point:
            return 0.0
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {dtype}")
    return TOLERANCES[dtype]


def _eps(dtype: Dtype) -> float:
    if isinstance(dtype, str):
        return _TF32_EPS
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _wide(name: str, x: object) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    x = x.detach().cpu()
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _wide_pair(actual: object, reference: object, name: str = "actual") -> tuple[torch.Tensor, torch.Tensor]:
    a, r = _wide(name, actual), _wide("reference", reference)
    if a.shape != r.shape:
        raise AssertionError(f"{name} must have the shape of reference, {tuple(r.shape)}, got {tuple(a.shape)}")
    return a, r


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """``‖actual − reference‖ / ‖reference‖`` over all entries, computed in float64 or complex128 on the CPU.

    NaN where either tensor holds a NaN (or both hold an infinity at one place): a comparison ``error <= bound`` is then
    False for every bound. Against a reference of zeros it is 0 for zeros and infinite for anything else; of empty
    tensors it is 0.

    Raises:
        AssertionError: the shapes differ. Nothing is broadcast.
        TypeError: an argument is not a tensor.
    """
    a, r = _wide_pair(actual, reference)
    distance, scale = (a - r).norm().item(), r.norm().item()
    if scale == 0:
        return distance if not distance > 0 else float("inf")
    return distance / scale


def assert_close_rel(
    actual: torch.Tensor,
    reference: torch.Tensor,
    *,
    dtype: Dtype | None = None,
    rtol: float | None = None,
    baseline: torch.Tensor | None = None,
    factor: float = 2.0,
    floor: float | None = None,
) -> float:
    """Assert that :func:`relative_error` of ``actual`` is small, and return it.

    The bound is, in this order: ``rtol`` where given; ``factor × relative_error(baseline, reference) + floor`` where a
    baseline is given; else the tolerance of ``dtype`` in :data:`TOLERANCES`.

    Args:
        actual: the result under test, any dtype and device.
        reference: what it should be, in float64 (or complex128) for a bound that means something; same shape.
        dtype: precision of the computation, a torch dtype or ``"tf32"``; that of ``actual`` by default.
        rtol: an explicit bound.
        baseline: a plain torch implementation's result in the precision of ``actual``.
        factor: how many times the baseline's own error is accepted.
        floor: added to the baseline's share, for a baseline that is right to the last bit by luck; by default a
            quarter of the dtype's epsilon, about what rounding the exact result once costs.

    Raises:
        AssertionError: the error is above the bound, a NaN or an infinity is anywhere, or the shapes differ. The
            message has the error, the bound and where it comes from, and the worst entry.
        ValueError: both ``rtol`` and ``baseline`` are given, or the dtype has no tolerance.
    """
    if rtol is not None and baseline is not None:
        raise ValueError("rtol and baseline must not both be given: each sets the bound")
    a, r = _wide_pair(actual, reference)
    dtype = actual.dtype if dtype is None else dtype
    if not r.isfinite().all():
        raise AssertionError(f"reference must be finite, got {int((~r.isfinite()).sum())} NaN or infinite entries")
    if rtol is not None:
        bound, source = rtol, "given"
    elif baseline is not None:
        own = relative_error(baseline, reference)
        floor = _eps(dtype) / 4 if floor is None else floor
        bound = factor * own + floor
        source = f"{factor:g} × the baseline's error {own:.3e} + {floor:.1e}"
    else:
        bound, source = tolerance(dtype), f"tolerance of {dtype}"
    error = relative_error(actual, reference)
    if error <= bound < float("inf"):
        return error
    raise AssertionError(
        f"relative error {error:.3e} exceeds {bound:.3e} ({source}); shape {tuple(a.shape)}, {actual.dtype}\n"
        f"{_worst(a, r)}"
    )


def _worst(a: torch.Tensor, r: torch.Tensor) -> str:
    if a.numel() == 0:
        return "empty tensors"
    distance = (a - r).abs()
    bad = ~a.isfinite()
    index = int((bad.flatten().int() if bad.any() else distance.flatten()).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), a.shape))
    counted = f"{int(bad.sum())} of {a.numel()} entries are NaN or infinite, the first" if bad.any() else "worst entry"
    return f"{counted} at {place}: got {a[place].item():.9g}, expected {r[place].item():.9g}"


Transform = Callable[[torch.Tensor], torch.Tensor]


def _transformed(what: str, transform: Transform | Sequence[Transform | None], values: tuple) -> tuple:
    transforms = (transform,) if callable(transform) else tuple(transform)
    if len(transforms) != len(values):
        raise ValueError(f"{what} must have {len(values)} entries, one a tensor, got {len(transforms)}")
    return tuple(v if t is None else t(v) for t, v in zip(transforms, values, strict=True))


def equivariance_error(
    fn: Callable[..., Any],
    x: torch.Tensor | tuple,
    transform_in: Transform | Sequence[Transform | None],
    transform_out: Transform | Sequence[Transform | None] | None = None,
) -> float:
    """``‖f(g x) − g f(x)‖ / ‖g f(x)‖`` for one group element ``g``, the largest over the outputs of ``f``.

    Args:
        fn: the function ``f``; takes the tensors of ``x``, returns a tensor or a tuple of them.
        x: its input, or a tuple of inputs.
        transform_in: how ``g`` acts on the input; a sequence with one entry an input where there are several. None
            as an entry leaves that input alone (a mask, edge indices).
        transform_out: how ``g`` acts on the output, likewise; None: as ``transform_in`` does on a single input. For
            invariance pass the identity, ``lambda y: y``.

    The caller draws ``g``: a loop over random rotations ``R`` passes ``lambda v: v @ R.T`` (or the representation's
    matrix of ``R``, for irreps) for both transforms.
    """
    args = x if isinstance(x, tuple) else (x,)
    if transform_out is None:
        if not callable(transform_in):
            raise ValueError("transform_out must be given where fn takes several inputs, got None")
        transform_out = transform_in
    plain, moved = fn(*args), fn(*_transformed("transform_in", transform_in, args))
    plain = plain if isinstance(plain, (tuple, list)) else (plain,)
    moved = moved if isinstance(moved, (tuple, list)) else (moved,)
    expected = _transformed("transform_out", transform_out, tuple(plain))
    errors = [relative_error(got, want) for got, want in zip(moved, expected, strict=True)]
    return next((e for e in errors if e != e), max(errors))


def assert_equivariant(
    fn: Callable[..., Any],
    x: torch.Tensor | tuple,
    transform_in: Transform | Sequence[Transform | None],
    transform_out: Transform | Sequence[Transform | None] | None = None,
    *,
    tol: float | None = None,
) -> float:
    """Assert that :func:`equivariance_error` is at most ``tol``, and return it.

    Example:

        >>> import torch
        >>> from torchlayers.testing import assert_equivariant
        >>> conv = torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", dtype=torch.float64)
        >>> x = torch.randn(2, 1, 8, dtype=torch.float64)
        >>> error = assert_equivariant(conv, x, lambda v: v.roll(3, dims=-1))

    Args:
        fn, x, transform_in, transform_out: as for :func:`equivariance_error`.
        tol: the bound; by default four times the tolerance of the first input's dtype, since two results and the
            transforms themselves are rounded.

    Raises:
        AssertionError: the error is larger, or NaN.
    """
    first = x[0] if isinstance(x, tuple) else x
    tol = 4 * tolerance(first.dtype) if tol is None else tol
    error = equivariance_error(fn, x, transform_in, transform_out)
    if not error <= tol:
        raise AssertionError(f"not equivariant: ‖f(g x) − g f(x)‖ / ‖g f(x)‖ = {error:.3e}, expected at most {tol:.3e}")
    return error


def opcheck_all(
    samples: Mapping[str, Callable[[], Iterable[tuple]]],
    *,
    namespace: str = "torchlayers",
    tests: Sequence[str] | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Run :func:`torch.library.opcheck` over every operation registered under ``namespace``.

    Operations are registered when the module that defines them is imported: import it first.

    Args:
        samples: operation (``"tdft2_forward"`` or ``"torchlayers::tdft2_forward"``) -> function that gives the
            argument tuples to check it with, at least one.
        namespace: whose operations.
        tests: which of opcheck's tests; all of them by default.

    Returns:
        operation without its namespace -> opcheck's result for each sample (test -> ``"SUCCESS"``).

    Raises:
        LookupError: a registered operation has no sample, or a sample names no registered operation.
        torch.testing._internal.optests.OpCheckError: an operation failed.
    """
    prefix = f"{namespace}::"
    found = {n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)}
    given = {name.removeprefix(prefix): make for name, make in samples.items()}
    missing, unknown = sorted(found - given.keys()), sorted(given.keys() - found)
    if missing or unknown:
        raise LookupError(
            f"samples must name every operation registered under {prefix} and no other; "
            f"without a sample: {', '.join(missing) or 'none'}; not registered: {', '.join(unknown) or 'none'}"
        )
    options: dict[str, Any] = {} if tests is None else {"test_utils": tuple(tests)}
    results: dict[str, list[dict[str, str]]] = {}
    for name in sorted(found):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        results[name] = [torch.library.opcheck(op, args, **options) for args in given[name]()]
        if not results[name]:
            raise LookupError(f"samples[{name!r}] must give at least one argument tuple, got none")
    return results


def _poison(x: torch.Tensor) -> torch.Tensor:
    if x.layout is not torch.strided:
        return x
    with torch.no_grad():
        if x.dtype.is_complex:
            return x.fill_(complex("nan+nanj"))
        if x.dtype.is_floating_point:
            return x.fill_(float("nan"))
        return x.fill_(True if x.dtype is torch.bool else torch.iinfo(x.dtype).max)


@contextlib.contextmanager
def nan_empty() -> Iterator[None]:
    """Within the block, fresh memory is poisoned: NaN in floating tensors, the largest value in integer ones.

    For kernel tests: an output entry that a kernel did not write, or a padding entry that it read, is NaN in the
    result and fails every comparison, instead of passing on a page that happened to be zero. Covers ``torch.empty``,
    ``empty_like``, ``empty_strided``, ``empty_permuted`` and ``Tensor.new_empty``, ``new_empty_strided``, called from
    Python in any thread (the backward pass on a GPU runs in one of its own); not memory that torch's own C++ code
    allocates, and not names bound earlier by ``from torch import empty``. May be nested.
    """
    owners: list[tuple[Any, str]] = [(torch, n) for n in ("empty", "empty_like", "empty_strided", "empty_permuted")]
    owners += [(torch.Tensor, n) for n in ("new_empty", "new_empty_strided")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in owners]

    def poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(original)
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            return _poison(original(*args, **kwargs))

        return empty

    try:
        for owner, name, original in originals:
            setattr(owner, name, poisoned(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def spawn_ranks(script: str | Path, world: int, folder: Path, timeout: float = 180.0) -> list[Any]:
    """Run ``script`` as ``world`` processes that share a gloo group; what each rank's body returned.

    The processes have none of the caller's state, such as threads of autograd, and one thread each.

    Args:
        script: a file that calls :func:`serve_ranks` where it is ``__main__``; mostly the test file itself.
        world: number of ranks.
        folder: an empty folder.
        timeout: seconds for all of it.

    Raises:
        RuntimeError: a rank failed; with its output.
        subprocess.TimeoutExpired: it took longer.
    """
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(script), str(folder), str(world)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    if done.returncode:
        raise RuntimeError(f"a rank of {script} failed:\n{done.stdout}{done.stderr}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def serve_ranks(body: Callable[[int], Any]) -> None:
    """Be what :func:`spawn_ranks` runs: call ``body(rank)`` on every rank, warnings being errors.

    Args:
        body: returns what JSON can say.
    """
    folder, world = sys.argv[1], int(sys.argv[2])
    # Forked ranks share one import of torch; the parent has run no backward, which forked ranks could not follow.
    torch.multiprocessing.start_processes(_serve, (body, folder, world), nprocs=world, start_method="fork")


def _serve(rank: int, body: Callable[[int], Any], folder: str, world: int) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    found = body(rank)
    dist.barrier()
    leave_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
