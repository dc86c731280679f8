# `make demo` shows the whole job, `make test` runs the tests, `make peers` measures this package
# beside its peers, `make docs` builds the pages into site/. All need only Python and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Each backend is an extra of its own; macOS needs none. Override: make test BACKEND=cuda12
ifeq ($(shell uname -s),Darwin)
BACKEND ?=
else ifneq ($(wildcard /proc/driver/nvidia/version),)
# CUDA 13 needs a driver of the 580 series or newer.
DRIVER := $(shell sed -n "s|.* \([0-9][0-9]*\)\.[0-9].*|\1|p" /proc/driver/nvidia/version | head -1)
BACKEND ?= $(if $(filter 1,$(shell test "$(DRIVER)" -ge 580 && echo 1)),cuda13,cuda12)
else
BACKEND ?= cpu
endif
comma := ,
backend_and = $(if $(BACKEND),$(BACKEND)$(comma))$(1)

.PHONY: demo test lint docs peers clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Warnings are errors. (The theme would announce its successor each time.)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# make peers ARGS="--only 1,4": some of the contenders; see benchmarks/README.md.
peers: $(VENV)/.test
	$(BIN)/python benchmarks/peers.py $(ARGS)

clean:
	rm -rf $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache

# Stamps: nothing is installed again until pyproject.toml changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "$(PYTHON) is Python %d.%d, expected 3.11 or newer. Name another: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@$(PYTHON) -c 'import platform as p, sys; sys.exit(p.system() == "Darwin" and p.machine() != "arm64" and \
	  "$(PYTHON) is not for arm64. MLX needs Apple silicon and a Python built for it.")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".$(if $(BACKEND),[$(BACKEND)])"
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$(call backend_and,test)]"
	@touch $@ $(VENV)/.demo

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$(call backend_and,dev)]"
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$(call backend_and,docs)]"
	@touch $@ $(VENV)/.demo
