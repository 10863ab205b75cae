# `make demo` and `make test` work on a fresh machine that has Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One tested version. Set TORCH to a wheel of your choice: for Linux, PyPI's own brings the CUDA libraries along.
TORCH ?= torch==2.13.0

.PHONY: demo test test-gpu test-vllm check setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[clients,dev,eval,train]"
	touch $@

demo: setup
	$(BIN)/midstream demo

# Everything that must hold: lint, format, types, layers, tests.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q

# What needs an NVIDIA GPU, with a torch that sees it; elsewhere these are skipped.
test-gpu: setup
	$(BIN)/pytest -q -rs tests/gpu tests/models/cuda

# The vLLM plugin, with the vLLM versions that it names as tested, each in an environment of its own that is kept in the
# user's cache folder (3.5 GB, made once). Where a wheel cannot be had, its tests are skipped and say so.
test-vllm: setup
	$(BIN)/pytest -q -rs integrations/vllm/tests

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
