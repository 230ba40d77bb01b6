# `make train` and `make test` are all that a newcomer needs; both set up what they use. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
PY := $(BIN)/python
# One thread a process: the tests run in two processes, on two cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR=.cache/triton
PYTEST := $(PY) -m pytest -q -n 2 --dist worksteal --durations=10
EXPERIMENT ?= tfno_darcy
ARGS ?=
FAMILY ?=
TORCH ?=

.PHONY: help setup setup-dev train test test-all test-versions lint format gpu aot bench docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

# A stamp each for what `make train` needs and for what the tests need besides: training starts sooner without the latter.
.venv/.train: pyproject.toml constraints.txt tools/setup.sh
	@PYTHON=$(PYTHON) bash tools/setup.sh train
	@touch $@

.venv/.dev: .venv/.train
	@PYTHON=$(PYTHON) bash tools/setup.sh dev
	@touch $@

setup: .venv/.train  ## make .venv with what training needs
	@echo "setup: .venv is ready"
setup-dev: .venv/.dev  ## ... and what tests, linters and benchmarks need

train: .venv/.train  ## train a tensorized Fourier neural operator on Darcy flow (EXPERIMENT=..., ARGS="key=value ...")
	@$(PY) train.py experiment=$(EXPERIMENT) $(ARGS)

test: .venv/.dev  ## the tests that CI runs: plain ones first, then the kernels in Triton's interpreter
	@$(TEST_ENV) $(PYTEST) -m "not gpu and not slow"
	@$(TEST_ENV) TRITON_INTERPRET=1 $(PYTEST) tests -m "interpret and not slow"

test-all: .venv/.dev  ## all tests, the slow ones too
	@$(TEST_ENV) $(PYTEST) -m "not gpu"
	@$(TEST_ENV) TRITON_INTERPRET=1 $(PYTEST) tests -m interpret

test-versions:  ## the tests with another Python and torch: make test-versions PYTHON=python3.12 TORCH=2.14.1
	@PYTHON=$(PYTHON) TORCH=$(TORCH) bash tools/test_versions.sh $(ARGS)

lint: .venv/.dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy kernels --explicit-package-bases

format: .venv/.dev  ## let ruff rewrite
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

gpu:  ## kernels on this machine's GPU, in the environment that is active now: correctness, then benchmarks, one JSON
	@python -m benchmarks.gpu $(ARGS)

aot: .venv/.dev  ## compile every kernel ahead of time for all targets and record registers, spills and shared memory
	@TRITON_DEFAULT_FP_FUSION=1 $(PY) -m torchlayers.kernels._aot benchmarks/results/aot.json

bench: .venv/.dev  ## all CPU benchmarks into benchmarks/results, then the plots and the README's table (FAMILY=... for one)
	@$(PY) -m benchmarks $(FAMILY) $(ARGS)
	@$(PY) -m benchmarks.plot
	@$(PY) -m benchmarks.table

docs: .venv/.dev  ## the documentation as HTML in docs/_build, offline; warnings are errors
	@$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "docs: docs/_build/index.html"

clean:  ## remove the environment and the caches
	@rm -rf .venv .cache build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
