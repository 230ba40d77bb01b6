"""``python -m torchlayers info | list [FAMILY] | bench ...``: what is here, which layers there are, how fast."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

import torchlayers

from . import _backend

_NO_FAMILIES = {"data", "experiments", "functional", "kernels", "testing", "training"}
# Distribution -> the extra that brings it; None for what torchlayers itself needs.
_DISTRIBUTIONS = {
    "torch": None,
    "triton": None,
    "einops": None,
    "neuraloperator": "tfno",
    "tensorly": "tfno",
    "e3nn": "gaunt",
    "torch-geometric": "graphs",
    "transformers": "transformers",
    "hydra-core": "train",
    "safetensors": "train",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; the exit code: 0, 2 for an error in what was asked, or that of ``bench``."""
    parser = argparse.ArgumentParser(prog="python -m torchlayers", description="Layers of recent papers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which kernels are usable here, or why not")
    listing = commands.add_parser("list", help="the layers by family, each with a line and its paper")
    listing.add_argument("family", nargs="?", choices=_families(), help="all public names of this one")
    commands.add_parser("bench", help="the same as `python -m benchmarks ...`, in a source checkout", add_help=False)
    options, rest = parser.parse_known_args(argv)
    if options.command == "bench":
        return _bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    lines = _info() if options.command == "info" else _list(options.family)
    for line in lines:
        sys.stdout.write(f"{line.rstrip()}\n")
    return 0


# info


def _info() -> Iterator[str]:
    yield f"torchlayers {torchlayers.__version__}, {os.path.dirname(os.path.abspath(torchlayers.__file__))}"
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name, extra in _DISTRIBUTIONS.items():
        yield f"{name} {_version(name) or _missing(extra)}"
    yield ""
    yield f"cpu: {torch.get_num_threads()} threads"
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for gpu in gpus:
        found = torch.cuda.get_device_properties(gpu)
        yield f"{gpu}: {found.name}, {found.total_memory / 2**30:.0f} GiB"
    if not gpus:
        yield "no GPU that this torch can use"
    yield ""
    yield f"backend: {_backend._current} (set by TORCHLAYERS_BACKEND or torchlayers.backend)"
    yield f"kernels: {'; '.join(map(_verdict, gpus)) or _verdict(torch.device('cpu'))}"
    names = _kernels()
    width = max(map(len, names), default=0)
    for name in names:
        module = _backend.import_kernels(name)
        yield f"  {name:{width}}  {'' if module is None else _first_sentence(module)}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    # Vendors' builds install triton under names of their own; the package itself knows its version.
    if importlib.util.find_spec(distribution) is None:
        return None
    return str(getattr(importlib.import_module(distribution), "__version__", "of unknown version"))


def _missing(extra: str | None) -> str:
    return "is not installed" + ("" if extra is None else f": pip install -e '.[{extra}]'")


def _kernels() -> list[str]:
    """The names of the kernel files, which cannot be imported where triton is missing."""
    spec = importlib.util.find_spec("torchlayers.kernels")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return sorted(p.stem for folder in folders for p in Path(folder).glob("*.py") if not p.stem.startswith("_"))


def _verdict(place: torch.device) -> str:
    """Whether kernels run on tensors there; whether in their range, each call finds out."""
    if not _backend.use_triton("info", torch.empty(0, device=place), "auto"):
        reason = _backend.last_dispatch().removeprefix("torch: ")
        if reason != "tensors on the CPU":
            return f"none usable on {place}, {reason}"
        if _backend.interpreted():
            return "all usable with backend='triton', slowly, in Triton's interpreter"
        return "none usable here, no GPU (TRITON_INTERPRET=1 runs them, slowly, in Triton's interpreter)"
    lib = importlib.import_module("torchlayers.kernels._lib")
    target = lib.target_of(place)
    known = next((name for name, other in lib.TARGETS.items() if other == target), None)
    unknown = f"{target[1]}, for which they are not compiled ahead of time in the tests"
    return f"all usable on {place} ({known or unknown})"


# list


def _families() -> list[str]:
    return [name for name in torchlayers._SUBMODULES if name not in _NO_FAMILIES]


def _list(family: str | None) -> Iterator[str]:
    for name in _families() if family is None else [family]:
        package = importlib.import_module(f"torchlayers.{name}")
        entries = {n: value for n, value in _public(package) if family is not None or _is_layer(value)}
        if not entries:
            continue
        yield f"torchlayers.{name}: {_first_sentence(package)}"
        width = max(map(len, entries))
        for entry, value in entries.items():
            papers = _papers(value) or _papers(package)
            yield f"  {entry:{width}}  {_first_sentence(value)}{f' [arXiv {papers[0]}]' if papers else ''}"
        yield ""


def _public(package: ModuleType) -> Iterator[tuple[str, object]]:
    for name in package.__all__:
        try:
            yield name, getattr(package, name)
        except ImportError as error:  # its base class is an optional dependency's
            yield name, error


def _is_layer(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.nn.Module)


def _first_sentence(value: object) -> str:
    if isinstance(value, ImportError):
        return str(value)
    if not (inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value)):
        return type(value).__name__
    text = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    text = re.split(r"(?<=[^.])\. |::", text, maxsplit=1)[0].rstrip(".:")
    # What Sphinx reads, for people: :class:`~torch.nn.Linear` and ``x``.
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return text.replace("``", "")


def _papers(value: object) -> list[str]:
    """arXiv numbers in the docstring, in order."""
    return re.findall(r"\b(\d{4}\.\d{5})\b", inspect.getdoc(value) or "")


# bench


def _bench(arguments: Sequence[str]) -> int:
    root = Path(torchlayers.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        sys.stderr.write(
            f"python -m torchlayers bench: error: needs a source checkout, which has benchmarks/; torchlayers here is "
            f"installed without it, in {root}\n"
        )
        return 2
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments], cwd=root)


if __name__ == "__main__":
    sys.exit(main())
