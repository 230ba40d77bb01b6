"""The rules of the house, read from the source: which part may import which, optional dependencies, public names."""

import ast
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import torchlayers

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
NOT_FAMILIES = {"data", "experiments", "training", "kernels"}
FAMILIES = sorted(
    {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name} - NOT_FAMILIES
)
# The name that a distribution imports as, where it is another.
IMPORT_NAMES = {
    "hydra-core": "hydra",
    "neuraloperator": "neuralop",
    "torch-geometric": "torch_geometric",
    "tensorly-torch": "tltorch",
}


def distributions(extra):
    """Import names that `extra` brings."""
    names = set()
    for requirement in EXTRAS[extra]:
        name = requirement.split(";")[0].split("[")[0]
        for separator in "<>=!~ ":
            name = name.split(separator)[0]
        names.add(IMPORT_NAMES.get(name, name.replace("-", "_")))
    return names


# What comes with an extra's distributions and is used beside them.
ALONG = {"train": {"omegaconf", "yaml"}, "tfno": {"tltorch"}, "data": {"sklearn"}, "wave": {"skfem"}}
OPTIONAL = set().union(*(distributions(e) | ALONG.get(e, set()) for e in EXTRAS if e not in ("all", "dev", "docs")))

FILES = {
    "torchlayers." + ".".join(p.relative_to(ROOT / "torchlayers").with_suffix("").parts): p
    for p in sorted((ROOT / "torchlayers").rglob("*.py"))
} | {
    "torchlayers.kernels." + ".".join(p.relative_to(ROOT / "kernels").with_suffix("").parts): p
    for p in sorted((ROOT / "kernels").rglob("*.py"))
}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(name, *, inside_functions):
    """Full names of what the module `name` imports when it runs."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = importlib.util.resolve_name("." * child.level + (child.module or ""), package)
                # `from . import x` may name a module or a value of the package; a longer name that isn't a file is
                # the shorter one's value.
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield full if full in FILES or base == "torchlayers" else base
            elif is_type_checking(child):
                continue
            elif inside_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(child)

    return sorted(set(walk(TREES[name])))


def part(name):
    """ "kernels", "data", "experiments", "training", a family's name, or "shared" for the files of several families."""
    pieces = name.split(".")
    if len(pieces) == 1:
        return "root"
    return pieces[1] if pieces[1] in NOT_FAMILIES | set(FAMILIES) else "shared"


# part -> the parts of ours that it may import from, beside itself
ALLOWED = {
    "kernels": set(),
    "shared": {"root", "kernels"},
    "root": {"shared"},
    "data": {"root", "shared", *FAMILIES},
    "experiments": {"root", "shared", "data", "training", *FAMILIES},
    "training": {"root", "shared"},
} | {family: {"root", "shared", "kernels"} for family in FAMILIES}


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_one_way(name):
    ours = part(name)
    for target in imports(name, inside_functions=True):
        if target.split(".")[0] != "torchlayers":
            continue
        other = part(target)
        if name == "torchlayers.functional":  # which gathers the families' functions
            assert other in {"shared", *FAMILIES}, f"{name} imports {target}"
            continue
        if name == "torchlayers.training.registry" and target == "torchlayers.experiments":
            continue  # which it goes through by name
        assert other == ours or other in ALLOWED[ours], f"{name} imports {target}"
        if ours in FAMILIES and other == ours and name.endswith((".functional", ".reference")):
            assert not target.endswith((".modules", ".convert")), f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in FILES if part(name) == "kernels"])
def test_kernels_know_torch_and_triton_alone(name):
    known = {"torch", "triton", *sys.stdlib_module_names}
    for target in imports(name, inside_functions=True):
        assert target.startswith("torchlayers.kernels") or target.split(".")[0] in known, f"{name} imports {target}"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level or not (node.module or "").startswith("torchlayers"), f"{name} imports itself by name"


@pytest.mark.parametrize("name", [name for name in FILES if part(name) != "kernels"])
def test_only_kernels_import_triton_at_the_top(name):
    for target in imports(name, inside_functions=False):
        assert target.split(".")[0] != "triton", f"{name} imports {target}"
        assert not target.startswith("torchlayers.kernels"), f"{name} imports {target}: it needs triton"


@pytest.mark.parametrize("name", FILES)
def test_optional_dependencies_are_imported_where_they_are_used(name):
    for target in imports(name, inside_functions=False):
        assert target.split(".")[0] not in OPTIONAL, f"{name} imports {target} at module level"


@pytest.mark.parametrize("name", FILES)
def test_require_names_an_extra_that_brings_the_module(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "require":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            module, extra = node.args[0], given["extra"]
            if not (isinstance(module, ast.Constant) and isinstance(extra, ast.Constant)):
                continue
            assert extra.value in EXTRAS, f"{name}: no extra is called {extra.value!r}"
            brought = distributions(extra.value) | ALONG.get(extra.value, set())
            assert module.value.split(".")[0] in brought, f"{name}: {extra.value!r} does not bring {module.value}"


@pytest.mark.parametrize("name", FILES)
def test_library_prints_nothing(name):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


def test_nothing_imports_kernels_as_a_top_level_name():
    scripts = [p for folder in ("tests", "benchmarks", "tools") for p in (ROOT / folder).rglob("*.py")]
    for path in [*FILES.values(), *scripts, ROOT / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert not [n for n in names if n.split(".")[0] == "kernels"], path


# ---- public names


def test_lazy_names_and_editor_imports_agree():
    (block,) = (node for node in TREES["torchlayers"].body if is_type_checking(node))
    names, modules = {}, set()
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: `as` makes it an export for type checkers"
            if node.module:
                names[alias.name] = node.module
            else:
                modules.add(alias.name)
    assert names == torchlayers._LAZY
    assert modules <= set(torchlayers._SUBMODULES)
    public = {n for n in torchlayers.__all__ if n not in torchlayers._LAZY}
    assert public | set(torchlayers._LAZY) == set(torchlayers.__all__)
    assert all(n in vars(torchlayers) for n in public)


def test_every_public_name_loads_from_its_module():
    for name, module in torchlayers._LAZY.items():
        source = importlib.import_module(f"torchlayers.{module}")
        assert name in source.__all__
        assert getattr(torchlayers, name) is getattr(source, name)
    for name in torchlayers._SUBMODULES:
        if name == "kernels":
            continue  # a folder of modules, which need triton
        assert getattr(torchlayers, name) is importlib.import_module(f"torchlayers.{name}")
    assert {*torchlayers.__all__, *torchlayers._SUBMODULES} <= set(dir(torchlayers))
    with pytest.raises(AttributeError, match="no attribute 'SpectralConvv'"):
        torchlayers.SpectralConvv  # noqa: B018


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_exports_what_it_says_and_the_package_has_its_modules(family):
    package = importlib.import_module(f"torchlayers.{family}")
    assert len(package.__all__) == len(set(package.__all__)) > 0
    for name in package.__all__:
        value = getattr(package, name)
        # A table is documented by the string below it, which only the source has.
        assert value.__doc__ or isinstance(value, Mapping), f"{family}.{name} has no docstring"
        if isinstance(value, type) and issubclass(value, torch.nn.Module):
            assert getattr(torchlayers, name, None) is value, f"torchlayers.{name} is missing"
            assert name in torchlayers.__all__


def functions(family):
    """What a family's functional.py holds, and the functions of its distributed.py: name -> function."""
    found = {}
    for part_name in ("functional", "distributed"):
        if f"torchlayers.{family}.{part_name}" in FILES:
            module = importlib.import_module(f"torchlayers.{family}.{part_name}")
            found |= {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if not isinstance(value, type)}


@pytest.mark.parametrize("family", FAMILIES)
def test_functional_gathers_the_family_s_functions(family):
    package = importlib.import_module(f"torchlayers.{family}")
    for name, function in functions(family).items():
        assert name in package.__all__ and name in torchlayers.functional.__all__, name
        assert getattr(torchlayers.functional, name) is getattr(package, name) is function


def test_functional_holds_nothing_else():
    assert set(torchlayers.functional.__all__) == {name for family in FAMILIES for name in functions(family)}
