# `make demo` and `make test` are all a new user needs; both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test faults bench lint format clean

demo: .venv/.installed
	$(BIN)/python pipeline.py configs/demo

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# Every kill, crash, flipped bit and stop of the issue, where the tests take a sample: 10 minutes.
faults: .venv/.installed
	FAULTS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/faults --timeout 1200

# Side by side with what is installed, one core each, half an hour: make bench TEXT=input.txt ALPACA=alpaca.json
# PREFERENCES=comparisons.json NANOGPT=path/of/a/clone TRL112=path/of/its/own/bin/python. What lacks its file is left out.
bench: .venv/.installed
	$(BIN)/python -m benchmarks.startup --threads 2
	$(BIN)/python -m benchmarks.sample
	$(BIN)/python -m benchmarks.ppo $(if $(TRL112),--trl $(TRL112))
	$(if $(ALPACA),$(BIN)/python -m benchmarks.sft --data $(ALPACA),@echo "sft is left out: give ALPACA=")
	$(if $(PREFERENCES),$(BIN)/python -m benchmarks.reward --data $(PREFERENCES),@echo "reward is left out: give PREFERENCES=")
	$(if $(TEXT),$(BIN)/python -m benchmarks.prepare --text $(TEXT),@echo "prepare is left out: give TEXT=")
	$(if $(TEXT),$(BIN)/python -m benchmarks.pretrain --text $(TEXT) $(if $(NANOGPT),--nanogpt $(NANOGPT)),@echo "pretrain is left out: give TEXT=")
	$(if $(TEXT),$(BIN)/python -m benchmarks.pretrain --what loss --text $(TEXT) $(if $(NANOGPT),--nanogpt $(NANOGPT)))

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed
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

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
