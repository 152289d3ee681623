# The only names that README, CI and the docs use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
BNB    := .venv-bnb
BENCH  := .venv-bench
# Passive waiting keeps two busy processes from starving each other on few cores; it must be set before torch is imported.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: install demo serve test test-slow check bench chaos test-bnb help

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY) ## make .venv and install the pinned versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Gradhelm needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## fine-tune, chat and steer SmolLM2-135M through the HTTP API
	$(BIN)/python -m demo.run

serve: $(READY) ## start the server on http://127.0.0.1:8000, with its data in .gradhelm
	$(BIN)/gradhelm serve --home .gradhelm

test: $(READY) ## the default suite
	$(BIN)/python -m pytest -q

test-slow: $(READY) ## tests that take minutes or need the real model
	$(BIN)/python -m pytest -q -m 'slow or load' --timeout=1200

$(BNB)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BNB)
	$(BNB)/bin/pip install --quiet -c constraints.txt -e '.[dev,bnb]'
	@touch $@

test-bnb: $(BNB)/.installed ## the 4-bit base, with bitsandbytes in an environment of its own
	$(BNB)/bin/python -m pytest -q -m bnb tests/unit

chaos: $(READY) ## kill servers and runs, lose nothing (QUICK=1: four minutes)
	QUICK=$(QUICK) $(BIN)/python -m pytest -q -m chaos tests/chaos --timeout=1200

check: $(READY) ## format, lint, types, import arrows, docstrings, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pydoclint --quiet core trainers steering service
	$(BIN)/python -m pytest -q tests/test_docs.py

$(BENCH)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet -c constraints.txt -e '.[dev,bench]'
	@touch $@

bench: $(BENCH)/.installed ## measure every claim; writes benchmarks/results
	$(BENCH)/bin/python -m benchmarks.all
