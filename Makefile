# The README's two commands, `make run PROMPT="..."` and `make test`; both first do what `make install` does.
# A stamp file in .venv marks each finished step, so that nothing is done twice. Installers write to standard error:
# standard output carries the answer alone.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= Why is the sky blue?
QUANT ?= int8
PYTEST_WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
KERNELS := $(shell find csrc -type f) src/octavo/runners/cpu/build.py
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# The prompt reaches the shell as it was typed: neither make nor the shell expands anything in it.
unexport PROMPT
export RUN_PROMPT = $(value PROMPT)

.PHONY: run install test lint

run: $(VENV)/.model
	@$(BIN)/octavo generate --quant '$(QUANT)' -- "$$RUN_PROMPT"

install: $(VENV)/.model
	@$(BIN)/octavo --version
	@$(BIN)/python -c 'import torch; cuda = torch.version.cuda; \
	  print("torch", torch.__version__, f"(built for CUDA {cuda})" if cuda else "(no CUDA)")'

test: $(VENV)/.dev $(VENV)/.model $(VENV)/.reference-data lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'Octavo needs Python 3.11 or later, and "$(PYTHON)" is not: try make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >&2

# Without an NVIDIA GPU, the CPU build (a tenth of the size) if the package index offers it under its own name.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@if nvidia-smi -L >/dev/null 2>&1 || ! $(PIP) install -c constraints.txt 'torch==$(TORCH)+cpu' 2>/dev/null >&2; \
	  then $(PIP) install -c constraints.txt 'torch==$(TORCH)' >&2; fi
	@touch $@

# The install compiles the CPU kernels, so it is done again when they change.
$(VENV)/.package: pyproject.toml constraints.txt hatch_build.py $(KERNELS) $(VENV)/.torch
	@$(PIP) install -c constraints.txt -e . >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@$(PIP) install -c constraints.txt -e '.[dev]' >&2
	@touch $@

$(VENV)/.reference-data: tests/fetch_llama_cpp_models.py | $(BIN)/python
	@$(BIN)/python $< $(VENV)/llama-cpp-models >&2
	@touch $@

$(VENV)/.model: $(VENV)/.package
	@$(BIN)/octavo models pull default
	@touch $@
