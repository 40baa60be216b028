# `make demo` and `make test` do everything on a fresh machine; `make check` is the short test before a commit.
PYTHON ?= python3
# On a CPU this wheel; with a CUDA machine say `make demo TORCH=torch`.
TORCH ?= torch==2.13.0
BIN := .venv/bin

demo: .venv/demo
	$(BIN)/dual-slm backbones
	$(BIN)/dual-slm reply training/assets/librispeech-2764-36616-0000.flac

test: .venv/test
	$(MAKE) -j2 types ready
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

ready: lint
	$(BIN)/python -m dual_slm.training.reference --check
	$(BIN)/dual-slm backbones whisper-base smollm2-135m-instruct whisper-tiny.en

check: .venv/test
	$(MAKE) -j2 lint types fast

fast: .venv/test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -x -m "not slow"

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright does not see through an editable install, so a link gives it the package's name.
types: .venv/test
	mkdir -p build/typing && ln -sfn ../.. build/typing/dual_slm
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$(TORCH)"

.venv/demo: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e .
	touch $@

.venv/test: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

.PHONY: demo test ready check fast lint types
