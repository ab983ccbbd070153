# Everything a person or a pipeline does with this repository. `make` lists the targets.

PYTHON ?= python3
MODEL ?= demo
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
TORCH ?= 2.13.0
SOURCES := src tests examples benchmarks deploy

# Without an NVIDIA GPU the CPU build of torch saves several gigabytes.
TORCH_INDEX := $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check fuzz sanitize bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything in it; runs by itself when needed

demo: $(STAMP)  ## start a server with the built-in model and ask it a dozen things at once
	@$(BIN)/python examples/demo.py

serve: $(STAMP)  ## serve MODEL=demo on http://127.0.0.1:8000
	@$(BIN)/tokenmill serve $(MODEL)

test: $(STAMP)  ## run the tests; ARGS=... goes to pytest
	@$(BIN)/python -m pytest $(ARGS)

check: $(STAMP)  ## format, lint, types, import contracts, tests: what must pass before a change lands
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

fuzz: $(STAMP)  ## send 10,000 broken bodies and 2,000 documented requests and more to a server
	@$(BIN)/python -m pytest -n0 --cases 10000 --timeout 3000 tests/e2e/test_fuzz.py

sanitize: $(STAMP)  ## run the tests of the native kernels under the address and undefined-behaviour sanitizers
	@.ci/sanitize

bench: $(STAMP)  ## measure: beside transformers, and batching modes beside each other; results in benchmarks/results
	@$(BIN)/python benchmarks/against_transformers.py
	@$(BIN)/python benchmarks/batching.py

$(STAMP): pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Set PYTHON=/path/to/python3.11 or newer."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) -V). tokenmill needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "torch==$(TORCH)" > $(VENV)/constraints.txt
	@$(BIN)/python -c 'import torch, sys; sys.exit(torch.__version__.split("+")[0] != "$(TORCH)")' 2>/dev/null || \
		{ echo "Installing torch $(TORCH) (this is the large one) ..."; \
		  $(BIN)/pip install --quiet --no-deps --retries 1 $(TORCH_INDEX) torch==$(TORCH); }
	@echo "Installing tokenmill and its tools ..."
	@$(BIN)/pip install --quiet --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@
	@echo "Ready."
