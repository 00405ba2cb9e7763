# `make demo` and `make test` are all a new user needs; both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test faults lint format clean

demo: .venv/.installed
	$(BIN)/python pipeline.py configs/demo

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# Every kill, crash, flipped bit and stop of the issue, where the tests take a sample: 10 minutes.
faults: .venv/.installed
	FAULTS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/faults --timeout 1200

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
