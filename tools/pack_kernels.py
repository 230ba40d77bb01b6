"""Pack ``kernels/`` as a kernel repository that Hugging Face's ``kernels`` loads from a local folder.

    python tools/pack_kernels.py build/hub

    from pathlib import Path
    from kernels import get_local_kernel
    tdft = get_local_kernel(Path("build/hub")).tdft

The kernels are Triton, compiled where they run, so one copy serves every version of torch and every architecture: the
build variants are ``torch-cuda``, ``torch-rocm`` and ``torch-cpu`` (where calls run the definitions in plain torch).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {"torch-cuda": "cuda", "torch-rocm": "rocm", "torch-cpu": "cpu"}

# Relative imports tie the files together, and _lib insists on one name for the package, under which each operation is
# registered once. Where torchlayers is installed, its kernels are the ones; elsewhere this folder has them.
INIT = '''"""The Triton kernels of torchlayers, a module each; source and tests are in its repository."""

import importlib
import importlib.util
import pathlib
import sys
import types

if importlib.util.find_spec("torchlayers") is None:
    package = types.ModuleType("torchlayers")
    package.__path__ = [str(pathlib.Path(__file__).parent)]
    sys.modules["torchlayers"] = package

__all__ = {names!r}
for name in __all__:
    globals()[name] = importlib.import_module(f"torchlayers.kernels.{{name}}")
'''


def pack(out: Path) -> None:
    """Write the repository into ``out``, a folder that is new, empty, or an earlier repository."""
    sources = sorted(path for path in (ROOT / "kernels").glob("*.py") if path.name != "_aot.py")
    names = [path.stem for path in sources if not path.stem.startswith("_")]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    for variant, backend in VARIANTS.items():
        folder = out / "build" / variant
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "kernels").mkdir(parents=True)
        for path in sources:
            shutil.copy2(path, folder / "kernels")
        (folder / "__init__.py").write_text(INIT.format(names=names))
        metadata = {
            "id": f"_torchlayers_{backend}_{version}",
            "name": "torchlayers",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    sys.stdout.write(f"packed {', '.join(names)} into {out}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder")
    pack(parser.parse_args().out)
