# Two commands are enough on a machine with Python 3.11, make and git:
#   make demo    sets up .venv and runs the whole product on real photographs
#   make test    the same set-up, then the test suite (at most 15 minutes on 2 cores)

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first supported Python on PATH: python3.11, else python3, 3.12 or 3.13. Override: make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
UV_VERSION := 0.13.8
OUT ?= runs/demo
ARGS ?=
TEST_MINUTES ?= 60

BIN := .venv/bin
PY := $(BIN)/python
# One checksum over the files that determine the environment. If the stamp of this checksum exists, there is nothing to do.
KEY := $(shell cat requirements.lock pyproject.toml Makefile 2>/dev/null | cksum | tr ' ' '-')
STAMP := .venv/.restoray-$(KEY)

UV_ENV := UV_NO_CONFIG=1 VIRTUAL_ENV="$(CURDIR)/.venv"
# Two processes share the tests file by file, with one torch thread each: most tests use one core or wait for Ray.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
ONE_THREAD := OMP_NUM_THREADS=1
# Bytecode is kept. Some containers switch that off, and every process of Ray then compiles all its imports again.
QUIET_ENV := RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=

.PHONY: help setup demo test test-full check bench mutate lock clean

help:
	@echo "make demo       set up, then curate, train, restore, evaluate, serve and report on real photographs"
	@echo "make test       set up, then run the tests (stopped after $(TEST_MINUTES) minutes)"
	@echo "make test-full  run all tests, also those at full size"
	@echo "make check      run ruff, mypy and the fast tests"
	@echo "make bench      time the hot paths"
	@echo "make mutate     change the mathematics at 200 places and count the changes that no test sees"
	@echo "make lock       compile requirements.lock from pyproject.toml"
	@echo "make clean      remove .venv and caches (runs are kept)"

setup: $(STAMP)

$(STAMP):
	@if [ -z "$(PYTHON)" ]; then \
		echo "Restoray needs Python 3.11, 3.12 or 3.13, and none was found on PATH: install one or name it with make PYTHON=/path/to/python3.11." >&2; \
		exit 2; fi
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m uv --version 2>/dev/null | grep -q "uv $(UV_VERSION)" \
		|| $(PY) -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	$(UV_ENV) $(PY) -m uv pip sync --quiet --require-hashes requirements.lock
	$(UV_ENV) $(PY) -m uv pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f .venv/.restoray-*
	@touch $@

demo: setup
	@$(QUIET_ENV) $(BIN)/restoray demo --out $(OUT) $(ARGS)

test: setup
	@$(QUIET_ENV) $(ONE_THREAD) timeout --kill-after=30 $(TEST_MINUTES)m $(PY) -m pytest $(SHARED) -m "not full" $(ARGS)

test-full: setup
	@$(QUIET_ENV) $(ONE_THREAD) $(PY) -m pytest $(SHARED) $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy components pipelines
	@$(QUIET_ENV) $(ONE_THREAD) $(PY) -m pytest -q $(SHARED) -m "not slow and not full" $(ARGS)

bench: setup
	@$(QUIET_ENV) $(PY) tests/benchmarks/bench_nano.py $(ARGS)
	@$(QUIET_ENV) $(PY) tests/benchmarks/bench_instantir.py

mutate: setup
	@$(QUIET_ENV) $(PY) tests/mutation/mutate.py $(ARGS)

lock: setup
	$(UV_ENV) $(PY) -m uv pip compile pyproject.toml --extra dev --universal --generate-hashes \
		--no-emit-index-url --no-header --quiet -o requirements.lock

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
