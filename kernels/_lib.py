"""What every kernel file shares: registering operations, choosing configurations, precision, what is built.

Knows torch and triton, nothing else of the project.

To add a kernel file ``kernels/<name>.py``:

1. Write the ``triton.jit`` kernels and one launcher per operation. A launcher takes and returns tensors (complex ones
   as two real planes), checks shapes with ``ValueError`` and dtypes with ``TypeError``, returns empty results before
   any launch, and launches inside :func:`device_guard`. Take strides; make offsets int64 where a count can pass 2^31;
   name arguments that change from call to call (the batch) in ``do_not_specialize``.
2. Give :func:`pick` the list of launch configurations that suit the problem, the default first, and the dot precision
   from :func:`dot_precision`. A bfloat16 ``tl.dot`` is upcast under ``INTERPRET``, where it is silently wrong.
3. Register: ``op = custom_op("name", launcher)``, ``register_reference(op, plain_torch)``, ``op.register_fake``,
   ``op.register_autograd``. One operation per hot path; where double backward is promised, backward calls operations.
4. :func:`register_defaults` the production configurations, taken from the same list that :func:`pick` gets: these are
   compiled ahead of time for every target (``python -m torchlayers.kernels._aot``, tests/kernels/test_aot.py).
5. Add inputs for ``opcheck`` to tests/kernels/test_ops.py and a test of values, gradients and awkward shapes beside
   tests/kernels/test_tdft.py; both fail, or list the kernel as missing, until they are there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

if not __name__.startswith("torchlayers."):
    raise ImportError(
        "import the kernels as torchlayers.kernels: under a second name every operation would be registered twice"
    )

import torch
import triton
import triton.language as tl

# Triton reads the variable when it is imported, so the mode is one of the process.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
AUTOTUNE = os.environ.get("TORCHLAYERS_AUTOTUNE", "1") not in ("", "0")


# Operations


def custom_op(name: str, launcher: Callable) -> Any:
    """Register ``launcher`` as ``torchlayers::name`` for CUDA tensors, and for CPU tensors under the interpreter.

    The CPU implementation outside the interpreter is the definition in plain torch, see :func:`register_reference`.
    """
    devices = ("cuda", "cpu") if INTERPRET else "cuda"
    return torch.library.custom_op(f"torchlayers::{name}", launcher, mutates_args=(), device_types=devices)


def register_reference(op: Any, reference: Callable) -> None:
    """Make ``reference`` (plain torch, same signature) the CPU implementation of ``op``."""
    if not INTERPRET:
        op.register_kernel("cpu")(reference)


# Launching

# The names that Triton's GPUTarget has, as strings: what precision and tiles are chosen by.
Target = tuple[str, str]

# What every production configuration is compiled for.
TARGETS: dict[str, Target] = {
    "sm_80": ("cuda", "80"),
    "sm_90": ("cuda", "90"),
    "sm_100": ("cuda", "100"),
    "gfx942": ("hip", "gfx942"),
}


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make ``tensor``'s GPU the current one: Triton launches on the current device, whatever the pointers say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache
def target_of(device: torch.device) -> Target:
    """The target of a device, such as ``("cuda", "90")``; ``("interpreter", "")`` on the CPU."""
    if device.type != "cuda":
        return ("interpreter", "")
    if torch.version.hip:
        return ("hip", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return ("cuda", str(10 * major + minor))


PRECISIONS = ("ieee", "tf32x3", "bf16x6", "tf32")


def dot_precision(target: Target, requested: str | None = None, *, low: bool = False) -> str:
    """The precision of a product of float32 operands on ``target``: the one place that decides it.

    Float32 stays float32-accurate on matrix units: ``tf32x3`` on CUDA; on HIP ``ieee`` where the chip multiplies
    float32 matrices (CDNA, gfx9), ``bf16x6`` elsewhere. Plain ``tf32`` only where torch's own matmul precision allows
    it, or where the tensors around the dot are 16-bit (``low``) and have lost those digits already.
    """
    if requested is not None:
        if requested not in PRECISIONS:
            raise ValueError(f"precision must be None or one of {', '.join(map(repr, PRECISIONS))}, got {requested!r}")
        return "tf32x3" if target[0] == "interpreter" and requested == "bf16x6" else requested
    if target[0] == "cuda":
        # Not torch.get_float32_matmul_precision(): it raises where a program has used torch's newer setting.
        return "tf32" if low or torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    if target[0] == "hip":
        return "ieee" if target[1].startswith("gfx9") else "bf16x6"
    return "tf32x3"


@triton.jit
def dot_float32(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` of float32 operands in a precision from :func:`dot_precision`.

    The three products of ``tf32x3`` are issued here rather than by ``tl.dot``: Triton's own expansion sums them apart
    and adds ``acc`` afterwards, which holds every accumulator twice (tdft2_forward with 64 modes spills 168 bytes on
    sm_90 that way, and none this way). Here all three go into ``acc``, small terms first. An infinite operand gives
    NaN.
    """
    if PRECISION == "tf32x3":
        # Rounding off the 13 bits that tf32 lacks leaves a difference that is exact in float32.
        a_high = ((a.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        b_high = ((b.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(a - a_high, b_high, acc, input_precision="tf32")
        acc = tl.dot(a_high, b - b_high, acc, input_precision="tf32")
        return tl.dot(a_high, b_high, acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, LOW: tl.constexpr):
    """``acc + a @ b``; LOW: 16-bit operands as they are (the interpreter gets them as float32)."""
    if LOW:
        return tl.dot(a, b, acc)
    elif PRECISION == "ieee":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return dot_float32(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)


@triton.jit
def append_tile(tiles, tile):
    """The tuple ``tiles`` with one more."""
    return tiles + (tile,)  # noqa: RUF005 (Triton compiles no starred expressions)


@triton.jit
def zero_tiles(M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr):
    """A tuple of float32 zeros [M, N], for accumulators in a loop over tiles that is unrolled."""
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = append_tile(tiles, tl.zeros((M, N), tl.float32))
    return tiles


# Choosing a configuration


def bucket(n: int) -> int:
    """The next power of two: what a configuration is keyed on instead of a size that changes from call to call."""
    return triton.next_power_of_2(n)


_PICKED: dict[tuple, dict[str, Any]] = {}


def pick(
    name: str,
    key: tuple[Hashable, ...],
    candidates: Sequence[dict[str, Any]],
    launch: Callable[[dict[str, Any]], None],
    device: torch.device,
) -> dict[str, Any]:
    """The fastest of ``candidates``, measured once per ``key`` and remembered on disk beside Triton's kernel cache.

    The first candidate, unmeasured, is taken in the interpreter, with ``TORCHLAYERS_AUTOTUNE=0``, under
    ``torch.use_deterministic_algorithms(True)`` (another tile sums in another order), and while a CUDA graph is
    captured before the key has been measured.

    Args:
        name: the kernel.
        key: what the choice depends on. Bucket sizes, and leave the batch out: each new key costs a measurement.
        candidates: launch configurations (constexprs, ``num_warps``, ``num_stages``), pruned to the problem by the
            caller, the default first.
        launch: runs the kernel with a candidate, writing where the result belongs; it must be repeatable.
        device: where it runs.
    """
    if len(candidates) == 1 or INTERPRET or not AUTOTUNE or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    full_key = (name, key, device)
    found = _PICKED.get(full_key)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        found = _PICKED[full_key] = _measure(name, key, candidates, launch, device)
    return found


def _measure(name, key, candidates, launch, device) -> dict[str, Any]:
    from triton.runtime.cache import get_cache_manager
    from triton.runtime.errors import OutOfResources

    what = repr((name, key, candidates, torch.cuda.get_device_name(device), triton.__version__))
    cache = get_cache_manager(hashlib.sha256(what.encode()).hexdigest())
    path = cache.get_file("picked.json")
    if path is not None:
        with open(path) as file:
            index = json.load(file)["index"]
        return candidates[index]
    times = []
    for candidate in candidates:
        try:
            times.append(triton.testing.do_bench(lambda c=candidate: launch(c), warmup=5, rep=20, return_mode="median"))
        except OutOfResources:
            times.append(float("inf"))
    index = min(range(len(candidates)), key=times.__getitem__)
    cache.put(json.dumps({"index": index, "ms": times, "what": what}), "picked.json", binary=False)
    return candidates[index]


# What is built ahead of time


@dataclass(frozen=True)
class KernelConfig:
    """One production configuration of a kernel: what is compiled ahead of time and what its budget is.

    Args:
        kernel: the ``triton.jit`` function.
        name: unique, such as ``"tdft2_forward[fp32,N64,k16]"``.
        signature: argument name -> Triton type, constexprs left out: ``"*fp32"``, ``"i32"``, with ``":16"`` behind it
            where the launcher's argument is a multiple of 16 (an aligned pointer, a stride). An argument that is 1
            belongs into ``constexprs`` (Triton specialises on it), unless ``do_not_specialize`` names it.
        constexprs: argument name -> value; a callable is asked with the target (``("cuda", "90")``), which is how
            :func:`dot_precision` enters.
        num_warps, num_stages: launch options.
        targets: the targets (names in :data:`TARGETS`) on which the launcher takes this configuration.
        tensor_cores: whether the target's matrix instruction must appear: ``mma.sync`` on sm_80, ``wgmma`` on sm_90,
            ``tcgen05`` on sm_100, ``v_mfma`` on gfx942; where it cannot (less than 64 rows on sm_90), ``note`` says so.
        spill_budget: target name -> bytes of local memory (4 for each spilled register on HIP) that are accepted;
            0 where a target is not named.
        note: why a budget is as it is.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    targets: tuple[str, ...] = tuple(TARGETS)
    tensor_cores: bool = True
    spill_budget: dict[str, int] = field(default_factory=dict)
    note: str = ""


_CONFIGS: dict[str, KernelConfig] = {}


def register_config(config: KernelConfig) -> KernelConfig:
    """Add ``config`` to the list that the ahead-of-time compilation and the tests go through."""
    if config.name in _CONFIGS:
        raise ValueError(f"config.name must be unique, got {config.name!r} twice")
    _CONFIGS[config.name] = config
    return config


def register_defaults(
    kernel: Any,
    name: str,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    default: Callable[[Target], dict[str, Any]],
    *,
    tensor_cores: bool | Callable[[dict[str, Any]], bool] = True,
    spill_budget: dict[str, int] | None = None,
    note: str = "",
) -> None:
    """Register what ``default`` launches on each target: one entry for the targets that share a configuration.

    Args:
        kernel, name, signature, constexprs, spill_budget, note: see :class:`KernelConfig`; where targets differ, their
            names follow ``name`` behind an ``@``.
        default: the launch configuration that a target gets unmeasured: constexprs, ``num_warps``, ``num_stages``.
        tensor_cores: see :class:`KernelConfig`; a callable is asked with the launch configuration.
    """
    chosen = {target: default(machine) for target, machine in TARGETS.items()}
    while chosen:
        meta = next(iter(chosen.values()))
        targets = tuple(target for target, other in chosen.items() if other == meta)
        chosen = {target: other for target, other in chosen.items() if target not in targets}
        options = {k: meta[k] for k in ("num_warps", "num_stages")}
        register_config(
            KernelConfig(
                kernel=kernel,
                name=name if len(targets) == len(TARGETS) else f"{name}@{'+'.join(targets)}",
                signature=signature,
                constexprs=constexprs | {k: meta[k] for k in meta if k not in options},
                targets=targets,
                tensor_cores=tensor_cores(meta) if callable(tensor_cores) else tensor_cores,
                spill_budget={target: n for target, n in (spill_budget or {}).items() if target in targets},
                note=note,
                **options,
            )
        )


def registered_configs() -> Sequence[KernelConfig]:
    """All production configurations registered by the kernel modules imported so far."""
    return tuple(_CONFIGS.values())


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)
