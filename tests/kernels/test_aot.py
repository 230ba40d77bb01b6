"""Every production configuration compiles for every target, within its budgets. Needs no GPU, and no interpreter."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from torchlayers.kernels import _aot, _lib

if _lib.INTERPRET:
    pytest.skip("ahead-of-time compilation needs a process without TRITON_INTERPRET=1", allow_module_level=True)

for _name in _aot.kernel_modules():
    importlib.import_module(f"torchlayers.kernels.{_name}")
CONFIGS = {config.name: config for config in _lib.registered_configs()}
RECORD = Path(__file__).parents[2] / "benchmarks/results/aot.json"
PAIRS = [(name, target) for name, config in CONFIGS.items() for target in config.targets]
# The default run compiles for one target of each maker; compiling for all four takes five minutes on two cores.
DEFAULT = {"sm_90", "gfx942"}


def test_machines_are_the_targets():
    assert list(_aot.MACHINES) == list(_lib.TARGETS)


@pytest.mark.parametrize(
    ("name", "target"), [pytest.param(*pair, marks=() if pair[1] in DEFAULT else pytest.mark.slow) for pair in PAIRS]
)
def test_compiles_within_budget(name, target):
    row = _aot.compile_config(CONFIGS[name], _aot.MACHINES[target])
    assert _aot.offences(row, CONFIGS[name], _aot.MACHINES[target]) == []
    # A kernel that the compiler emptied has fewer; AMD's count leaves out the scalar ones.
    assert row.registers > (4 if _aot.MACHINES[target].gpu.backend == "hip" else 16)
    record = json.loads(RECORD.read_text())
    if record["triton"] == triton.__version__:
        update = f"run: python -m torchlayers.kernels._aot {RECORD.relative_to(RECORD.parents[2])}"
        assert dataclasses.asdict(row) in record["rows"], update


def test_the_record_has_no_other_rows():
    rows = json.loads(RECORD.read_text())["rows"]
    assert {(row["config"], row["target"]) for row in rows} == set(PAIRS)


SIZES = {"C", "N1", "N2", "K1", "K2", "N", "K", "R", "S", "M", "Q", "CI", "CO"}


@pytest.mark.parametrize(
    "name",
    [
        "tdft1_forward_kernel",
        "tdft2_forward_kernel",
        "tdft2_inverse_kernel",
        "spectral_mix_kernel",
        "spectral_mix_cp_kernel",
    ],
)
def test_sizes_of_one_compile(name):
    """Triton makes an argument that is 1 a constant, which not all that a kernel does with a number accepts."""
    config = next(config for config in CONFIGS.values() if config.kernel.__name__ == name)
    ones = {k: 1 for k in config.signature if k in SIZES or k.startswith("stride")}
    signature = {k: kind for k, kind in config.signature.items() if k not in ones}
    small = dataclasses.replace(config, name=f"{name}[ones]", signature=signature, constexprs=config.constexprs | ones)
    assert _aot.compile_config(small, _aot.MACHINES["sm_90"]).registers > 16


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_warpgroup_instructions_for_float32_and_bfloat16(target):
    for dtype in ("fp32", "bf16"):
        configs = [c for c in CONFIGS.values() if f"[{dtype},N128,m32]" in c.name and target in c.targets]
        assert {c.kernel.__name__ for c in configs} == {"tdft2_forward_kernel", "tdft2_inverse_kernel"}
        for config in configs:
            row = _aot.compile_config(config, _aot.MACHINES[target])
            assert set(row.matrix_instructions) == {_aot.MACHINES[target].matrix_instruction}


def test_all_offences_are_listed():
    name = next(name for name, config in CONFIGS.items() if "sm_80" in config.targets and config.tensor_cores)
    config = dataclasses.replace(CONFIGS[name], spill_budget={"sm_80": -1})
    with pytest.raises(_aot.BudgetError) as caught:
        _aot.build([config], ["sm_80"])
    assert "the budget is -1" in str(caught.value) and len(caught.value.rows) == 1
    row = dataclasses.replace(
        caught.value.rows[0], shared_bytes=10**6, tensor_memory=1024, spill_bytes=4, matrix_instructions={}
    )
    found = _aot.offences(row, config, _aot.MACHINES["sm_80"])
    assert len(found) == 4 and all(f"{name} on sm_80" in line for line in found)


def test_a_config_that_misses_an_argument_is_refused():
    config = next(c for c in CONFIGS.values() if "N1" in c.signature)
    signature = {k: v for k, v in config.signature.items() if k != "N1"} | {"M1": "i32"}
    with pytest.raises(ValueError, match=r"missing \['N1'\], unknown \['M1'\]"):
        _aot.compile_config(dataclasses.replace(config, signature=signature), _aot.MACHINES["sm_90"])


def test_two_configs_of_one_name_are_refused():
    with pytest.raises(ValueError, match="unique"):
        _lib.register_config(next(iter(CONFIGS.values())))


def test_command_writes_rows(tmp_path, capsys):
    name = next(name for name, config in CONFIGS.items() if "m16" in name)
    file = tmp_path / "sub" / "aot.json"
    assert _aot.main([str(file), "--match", name]) == 0
    written = json.loads(file.read_text())
    rows = [row for row in written["rows"] if row["config"] == name]
    assert {row["target"] for row in rows} == set(CONFIGS[name].targets)
    assert {"triton", "rows"} <= written.keys()
    assert name in capsys.readouterr().out


def test_interpreter_and_compilation_cannot_share_a_process():
    code = (
        "from torchlayers.kernels import _aot, _lib, tdft\n"
        "_aot.compile_config(_lib.registered_configs()[0], _aot.MACHINES['sm_90'])"
    )
    environment = dict(os.environ, TRITON_INTERPRET="1", TRITON_DEFAULT_FP_FUSION="1")
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "RuntimeError: ahead-of-time compilation needs a process without TRITON_INTERPRET=1" in result.stderr


CUDA, HIP, OTHER_HIP = ("cuda", "90"), ("hip", "gfx942"), ("hip", "gfx1100")


def test_precision_of_float32_products():
    assert _lib.dot_precision(CUDA) == "tf32x3"
    assert _lib.dot_precision(CUDA, low=True) == "tf32"
    assert _lib.dot_precision(HIP) == _lib.dot_precision(HIP, low=True) == "ieee"
    assert _lib.dot_precision(OTHER_HIP) == "bf16x6"
    assert _lib.dot_precision(CUDA, "ieee") == "ieee"
    with pytest.raises(ValueError, match=r"precision must be None or one of .*'tf33'"):
        _lib.dot_precision(CUDA, "tf33")


@pytest.mark.parametrize(("setting", "expected"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")])
def test_precision_follows_torch(setting, expected):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert _lib.dot_precision(CUDA) == expected
    finally:
        torch.set_float32_matmul_precision(before)
