# `make demo` and `make test` are all that a new user needs; both make .venv first. `make help` lists all.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
# Tests run in as many processes as there are cores, at most 8; make JOBS=0 runs them in one.
JOBS ?= logical
PARALLEL := -n $(JOBS) --maxprocesses 8 --dist loadgroup --no-loadscope-reorder
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help demo check test test-all faults mutants bench lint format clean

help:  ## list what can be made
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/.installed  ## the whole road on this machine: text, base, assistant, reward model, PPO, report
	$(BIN)/python pipeline.py configs/demo

check: lint  ## lint, types and the fast tests: about a minute on two cores
	$(PYTEST) $(PARALLEL) -m "not slow and not heavy"

test: lint  ## lint, types and all tests that are not rare: 10 minutes on two cores
	$(PYTEST) $(PARALLEL) -m "not slow"

test-all: lint  ## every test, the slow and rare ones too
	$(PYTEST) $(PARALLEL)

faults: .venv/.installed  ## every kill, crash, flipped bit and stop, of which the tests take a sample: 10 minutes
	FAULTS=1 $(PYTEST) tests/faults --timeout 1200

mutants: .venv/.installed  ## plants every known fault, and tells which of them the tests miss
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.mutants

# One core for each side. make bench TEXT=input.txt ALPACA=alpaca.json PREFERENCES=pairs.json
# NANOGPT=path/of/a/clone TRL112=path/of/its/own/bin/python. What lacks its file is left out.
bench: .venv/.installed  ## side by side with what is installed: half an hour
	$(BIN)/python -m benchmarks.startup --threads 2
	$(BIN)/python -m benchmarks.sample
	$(BIN)/python -m benchmarks.ppo $(if $(TRL112),--trl $(TRL112))
	$(if $(ALPACA),$(BIN)/python -m benchmarks.sft --data $(ALPACA),@echo "sft is left out: give ALPACA=")
	$(if $(PREFERENCES),$(BIN)/python -m benchmarks.reward --data $(PREFERENCES),@echo "reward is left out: give PREFERENCES=")
	$(if $(TEXT),$(BIN)/python -m benchmarks.prepare --text $(TEXT),@echo "prepare is left out: give TEXT=")
	$(if $(TEXT),$(BIN)/python -m benchmarks.pretrain --text $(TEXT) $(if $(NANOGPT),--nanogpt $(NANOGPT)),@echo "pretrain is left out: give TEXT=")
	$(if $(TEXT),$(BIN)/python -m benchmarks.pretrain --what loss --text $(TEXT) $(if $(NANOGPT),--nanogpt $(NANOGPT)))

lint: .venv/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed  ## ruff's format, and what it can mend itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# constraints.txt pins every package. Without an NVIDIA driver torch comes from PyTorch's CPU index, where it can be
# reached: PyPI's own build for Linux brings gigabytes of CUDA.
CPU_INDEX := $(shell command -v nvidia-smi > /dev/null || echo --extra-index-url https://download.pytorch.org/whl/cpu)
PIP := $(BIN)/pip install --disable-pip-version-check --retries 1 -c constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python >= 3.11 is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv --clear .venv
	$(PIP) torch $(CPU_INDEX)
	$(PIP) ".[dev]"
	touch $@

clean:  ## remove .venv, runs and caches
	rm -rf .venv runs .pytest_cache .ruff_cache .mypy_cache
