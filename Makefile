# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# On a CPU this wheel; with a CUDA machine say `make demo TORCH=torch`.
TORCH ?= torch==2.13.0
BIN := .venv/bin

demo: .venv/demo
	$(BIN)/dual-slm backbones
	$(BIN)/dual-slm reply training/assets/librispeech-2764-36616-0000.flac

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/dual-slm backbones whisper-base smollm2-135m-instruct whisper-tiny.en
	$(BIN)/python -m pytest -q

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$(TORCH)"

.venv/demo: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e .
	touch $@

.venv/test: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

.PHONY: demo test
