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
# A folder of wheels, or the address of an index, with a torch and a torchvision of another build (CPU, ROCm). Without it the
# lock's pair is installed, which brings 3.5 GB of CUDA libraries. The choice is kept in .venv; TORCH_WHEELS= ends it.
TORCH_NOTE := .venv/.torch-wheels
TORCH_WHEELS ?= $(shell cat $(TORCH_NOTE) 2>/dev/null)

BIN := .venv/bin
PY := $(BIN)/python
# One checksum over the files that determine the environment. If the stamp of this checksum exists, there is nothing to do.
LOCKS := requirements.lock requirements-dev.lock
KEY := $(shell { cat $(LOCKS) pyproject.toml Makefile 2>/dev/null; echo '$(TORCH_WHEELS)'; } | cksum | tr ' ' '-')
STAMP := .venv/.restoray-$(KEY)

UV_ENV := UV_NO_CONFIG=1 VIRTUAL_ENV="$(CURDIR)/.venv"
UV := $(UV_ENV) $(PY) -m uv
COMPILE := $(UV) pip compile --universal --generate-hashes --no-emit-index-url --no-header --quiet
# The lock without torch's pair and the CUDA packages that only torch requires.
WITHOUT_TORCH := awk '/^[a-z0-9]/ { keep = !/^(torch|torchvision|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)(\[.*\])?==/ } keep'
# Two processes share the tests file by file, with one torch thread each: most tests use one core or wait for Ray.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
ONE_THREAD := OMP_NUM_THREADS=1
# Bytecode is kept. Some containers switch that off, and every process of Ray then compiles all its imports again.
QUIET_ENV := RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=

TORCH_PAIR = $(shell sed -nE 's/^(torch|torchvision)(==[0-9.]+).*/\1\2/p' requirements.lock)
TORCH_SOURCE = $(if $(findstring ://,$(TORCH_WHEELS)),--default-index,--no-index --find-links) '$(TORCH_WHEELS)'

.PHONY: help setup demo test test-full check bench mutate lock wheel clean

help:
	@echo "make demo       set up, then curate, train, restore, evaluate, serve and report on real photographs"
	@echo "make test       set up, then run the tests (stopped after $(TEST_MINUTES) minutes)"
	@echo "make test-full  run all tests, also those at full size"
	@echo "make check      run ruff, mypy and the fast tests"
	@echo "make bench      time the hot paths"
	@echo "make mutate     change the mathematics at 200 places and count the changes that no test sees"
	@echo "make lock       compile requirements.lock and requirements-dev.lock from pyproject.toml"
	@echo "make wheel      build the wheel in dist/"
	@echo "make clean      remove .venv and caches (runs are kept)"

setup: $(STAMP)

$(STAMP):
	@if [ -z "$(PYTHON)" ]; then \
		echo "Restoray needs Python 3.11, 3.12 or 3.13, and none was found on PATH: install one or name it with make PYTHON=/path/to/python3.11." >&2; \
		exit 2; fi
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m uv --version 2>/dev/null | grep -q "uv $(UV_VERSION)" \
		|| $(PY) -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	@# Two builds of cv2 share one folder, so the removal of the one breaks the other: remove both, then install the locked one.
	@if ls .venv/lib/python3*/site-packages/ | grep -q '^opencv_python-'; then \
		$(UV) pip uninstall --quiet opencv-python opencv-python-headless; fi
ifeq ($(strip $(TORCH_WHEELS)),)
	$(UV) pip sync --quiet --require-hashes $(LOCKS)
	@rm -f $(TORCH_NOTE)
else
	@$(WITHOUT_TORCH) requirements.lock > .venv/without-torch.lock
	$(UV) pip sync --quiet --require-hashes .venv/without-torch.lock requirements-dev.lock
	$(UV) pip install --quiet --no-deps $(TORCH_SOURCE) $(TORCH_PAIR)
	@echo '$(TORCH_WHEELS)' > $(TORCH_NOTE)
endif
	$(UV) pip install --quiet --no-deps --no-build-isolation --editable .
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
	$(BIN)/mypy components pipelines restoray.py
	@$(QUIET_ENV) $(ONE_THREAD) $(PY) -m pytest -q $(SHARED) -m "not slow and not full" $(ARGS)

bench: setup
	@$(QUIET_ENV) $(PY) tests/benchmarks/bench_nano.py $(ARGS)
	@$(QUIET_ENV) $(PY) tests/benchmarks/bench_instantir.py

mutate: setup
	@$(QUIET_ENV) $(PY) tests/mutation/mutate.py $(ARGS)

lock: setup
	$(COMPILE) pyproject.toml --excludes requirements-excludes.txt -o requirements.lock
	$(COMPILE) --group dev --constraint requirements.lock -o requirements-dev.lock

wheel: setup
	@rm -rf dist
	$(PY) -m hatchling build -t wheel

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
