"""Ahead-of-time compilation of every registered configuration for GPUs that need not be there.

``python -m torchlayers.kernels._aot [FILE.json]`` prints a table, a row per configuration and target, with registers,
spills, shared memory and the matrix instructions found, and fails where a budget of its
:class:`~torchlayers.kernels._lib.KernelConfig` or a limit of the target is exceeded. Results are kept beside Triton's
compiled kernels, by the hash of the kernel's source, the configuration and Triton's version.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import triton
from triton.backends.compiler import GPUTarget

from ._lib import INTERPRET, TARGETS, KernelConfig, registered_configs


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a target has: its limit of shared memory for one program, and its matrix instruction."""

    name: str
    warp_size: int
    shared_limit: int
    matrix_instruction: str

    @property
    def gpu(self) -> GPUTarget:
        backend, arch = TARGETS[self.name]
        return GPUTarget(backend, int(arch) if arch.isdigit() else arch, self.warp_size)


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("sm_80", 32, 163 * 1024, "mma.sync"),
        Machine("sm_90", 32, 227 * 1024, "wgmma.mma_async"),
        Machine("sm_100", 32, 227 * 1024, "tcgen05.mma"),
        Machine("gfx942", 64, 64 * 1024, "v_mfma"),
    )
}
TENSOR_MEMORY = 512  # columns; beyond, Triton compiles a kernel that does nothing but trap
_MATRIX_INSTRUCTIONS = "|".join(re.escape(machine.matrix_instruction) for machine in MACHINES.values())


@dataclasses.dataclass(frozen=True)
class Row:
    """What one configuration became on one target.

    Attributes:
        registers: a thread's registers (VGPRs and AGPRs on HIP).
        spill_bytes: a thread's local memory on CUDA; 4 bytes for each spilled VGPR on HIP.
        shared_bytes: shared memory (LDS) of a program.
        tensor_memory: columns of tensor memory, on sm_100.
        matrix_instructions: name -> number of occurrences in the assembly.
    """

    config: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory: int
    matrix_instructions: dict[str, int]


class BudgetError(Exception):
    """Configurations that exceed a limit of their target or a budget of their own: the message lists all of them."""

    def __init__(self, broken: list[str], rows: list[Row]):
        super().__init__("\n".join(broken))
        self.rows = rows


def compile_config(config: KernelConfig, machine: Machine) -> Row:
    """Compile ``config`` for ``machine``, or read the result of an earlier compilation of the same source."""
    if INTERPRET:
        raise RuntimeError(
            "ahead-of-time compilation needs a process without TRITON_INTERPRET=1: "
            "Triton fixes the mode when it is imported"
        )
    from triton.runtime.cache import get_cache_manager

    constexprs = {k: v(TARGETS[machine.name]) if callable(v) else v for k, v in config.constexprs.items()}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    missing = [a for a in config.kernel.arg_names if a not in config.signature and a not in constexprs]
    unknown = [a for a in (*config.signature, *constexprs) if a not in config.kernel.arg_names]
    if missing or unknown:
        raise ValueError(
            f"config {config.name!r} must give every argument of {config.kernel.__name__}: missing {missing}, "
            f"unknown {unknown}"
        )
    what = [triton.__version__, os.environ.get("TRITON_DEFAULT_FP_FUSION"), Path(__file__).read_bytes(), machine]
    what += [config.kernel.cache_key, config.name, config.signature, constexprs, options]
    cache = get_cache_manager(hashlib.sha256(repr(what).encode()).hexdigest())
    path = cache.get_file("row.json")
    if path is not None:
        return Row(**json.loads(Path(path).read_text()))

    signature, attrs = {}, {}
    for index, name in enumerate(config.kernel.arg_names):
        kind, _, divisor = config.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if divisor:
            attrs[(index,)] = [["tt.divisibility", int(divisor)]]
    source = triton.compiler.ASTSource(fn=config.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=machine.gpu, options=options)
    row = Row(config.name, machine.name, *_resources(compiled, machine))
    cache.put(json.dumps(dataclasses.asdict(row)), "row.json", binary=False)
    return row


def _resources(compiled, machine: Machine) -> tuple[int, int, int, int, dict[str, int]]:
    text = compiled.asm["ptx" if machine.gpu.backend == "cuda" else "amdgcn"]
    found = re.findall(rf"\b(?:{_MATRIX_INSTRUCTIONS})", text)
    instructions = {name: found.count(name) for name in sorted(set(found))}
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    if machine.gpu.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file], check=True, capture_output=True, text=True
            ).stdout
        value = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        return value["REG"], value["STACK"] + value["LOCAL"], shared, tensor_memory, instructions
    value = {key: int(number) for key, number in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    registers = value["vgpr_count"] + value.get("agpr_count", 0)
    return registers, 4 * value["vgpr_spill_count"], shared, tensor_memory, instructions


def offences(row: Row, config: KernelConfig, machine: Machine) -> list[str]:
    """What in ``row`` breaks a limit of ``machine`` or a budget of ``config``, in words."""
    where = f"{row.config} on {row.target}"
    found = []
    if row.shared_bytes > machine.shared_limit:
        found.append(f"{where}: {row.shared_bytes} bytes of shared memory, the target has {machine.shared_limit}")
    if row.tensor_memory > TENSOR_MEMORY:
        found.append(f"{where}: {row.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY}")
    budget = config.spill_budget.get(machine.name, 0)
    if row.spill_bytes > budget:
        found.append(f"{where}: {row.spill_bytes} bytes of spills, the budget is {budget}")
    if config.tensor_cores and machine.matrix_instruction not in row.matrix_instructions:
        instructions = ", ".join(row.matrix_instructions) or "no matrix instruction"
        found.append(f"{where}: {instructions} in the assembly, {machine.matrix_instruction} was expected")
    return found


def build(
    configs: Iterable[KernelConfig], targets: Sequence[str] = tuple(MACHINES), progress: TextIO | None = None
) -> list[Row]:
    """Compile every configuration for each of its targets and check the results.

    Args:
        configs: what to compile, such as ``registered_configs()``.
        targets: names in ``MACHINES``, to leave some out.
        progress: a text stream that gets a line for each row, or None.

    Raises:
        BudgetError: any row exceeds a limit or a budget; lists all that do. The rows are its ``rows``.
    """
    rows: list[Row] = []
    broken: list[str] = []
    for config in configs:
        for machine in (MACHINES[name] for name in targets if name in config.targets):
            row = compile_config(config, machine)
            rows.append(row)
            broken += offences(row, config, machine)
            if progress is not None:
                progress.write(format_row(row) + "\n")
                progress.flush()
    if broken:
        raise BudgetError(broken, rows)
    return rows


_HEADER = (
    f"{'configuration':<44} {'target':<7} {'registers':>9} {'spills':>7} {'shared':>7} {'tmem':>5}  matrix instructions"
)


def format_row(row: Row) -> str:
    instructions = ", ".join(f"{count} {name}" for name, count in row.matrix_instructions.items()) or "none"
    return (
        f"{row.config:<44} {row.target:<7} {row.registers:>9} {row.spill_bytes:>7} {row.shared_bytes:>7} "
        f"{row.tensor_memory:>5}  {instructions}"
    )


def kernel_modules() -> list[str]:
    """The names of all kernel files, without those of the harness."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torchlayers.kernels._aot", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="also write the rows to this JSON file")
    parser.add_argument("--match", default="", help="only configurations whose name contains this")
    options = parser.parse_args(arguments)
    for name in kernel_modules():
        importlib.import_module(f"{__package__}.{name}")
    configs = [config for config in registered_configs() if options.match in config.name]
    if not configs:
        parser.error(f"--match must be part of a configuration's name, got {options.match!r}")
    sys.stderr.write(_HEADER + "\n")
    try:
        rows, problem = build(configs, progress=sys.stderr), None
    except BudgetError as error:
        rows, problem = error.rows, str(error)
    sys.stdout.write("\n".join([_HEADER, *map(format_row, rows)]) + "\n")
    if options.file is not None:
        notes = {config.name: config.note for config in configs if config.note}
        content = {"triton": triton.__version__, "rows": [dataclasses.asdict(row) for row in rows], "notes": notes}
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(json.dumps(content, indent=1) + "\n")
    if problem is not None:
        sys.stderr.write(f"\n{problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
