"""What kernel files may import and call, read from their source."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

from torchlayers.kernels import _aot, _lib

FOLDER = Path(_lib.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
# Deprecated in Triton: plain offsets and masks, or tensor descriptors, instead.
FORBIDDEN = {"make_block_ptr", "advance"}


def _id(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def foreign_imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] not in ALLOWED]
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if (node.level == 0 and name.split(".")[0] not in ALLOWED) or node.level > 1:
                found.append("." * node.level + name)
    return found


def forbidden_calls(tree: ast.AST) -> list[str]:
    return [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN]


def kernels(tree: ast.Module) -> list[str]:
    """The names of functions under ``triton.jit`` that return nothing: those that are launched."""
    found = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        decorated = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        returns = any(isinstance(inner, ast.Return) and inner.value is not None for inner in ast.walk(node))
        if decorated and not returns and not node.name.startswith("_"):
            found.append(node.name)
    return found


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_imports_and_calls(path):
    tree = ast.parse(path.read_text())
    assert foreign_imports(tree) == []
    assert forbidden_calls(tree) == []


def test_the_rules_find_what_they_forbid():
    tree = ast.parse(
        "import numpy\nfrom torchlayers import _checks\nfrom .._tables import table\nfrom . import _lib\n"
        "import triton.language as tl\ntl.make_block_ptr()\ntl.advance()\n"
        "@triton.jit\ndef a(x):\n    pass\n@triton.jit\ndef b(x):\n    return x\n"
    )
    assert foreign_imports(tree) == ["numpy", "torchlayers", ".._tables"]
    assert forbidden_calls(tree) == ["make_block_ptr", "advance"]
    assert kernels(tree) == ["a"]


def test_every_kernel_is_compiled_ahead_of_time():
    assert "tdft" in _aot.kernel_modules()
    registered = set()
    for name in _aot.kernel_modules():
        importlib.import_module(f"torchlayers.kernels.{name}")
    for config in _lib.registered_configs():
        registered.add(config.kernel.__name__)
    for path in FILES:
        missing = set(kernels(ast.parse(path.read_text()))) - registered
        assert not missing, f"{_id(path)}: no configuration is registered for {sorted(missing)}"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_launched_kernels_have_public_names(path):
    """``name[grid](...)`` calls a kernel; helpers start with an underscore or return a value."""
    tree = ast.parse(path.read_text())
    jitted = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }
    launched = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in jitted
    }
    assert launched == set(kernels(tree))
