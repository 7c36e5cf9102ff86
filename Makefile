# `make quickstart` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: quickstart test test-full check docs bench gpu clean

# One pip call with the constraints, so that torch comes at its pin.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/lpsim run experiments/grids/quickstart.py --jobs $(JOBS) --report

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

test-full: $(VENV)/installed
	$(BIN)/python -m pytest -m 'full or not full' --numprocesses $(JOBS) --dist loadfile --durations 20

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

# A broken link, a name that is gone and a missing docstring fail. The site needs no network.
docs: $(VENV)/docs
	$(BIN)/python -m pytest tests/docs/test_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/installed
	$(BIN)/lpsim bench

# With the Python whose torch has CUDA, as it is: nothing is installed. Results: runs/gpu.json.
gpu:
	@$(PYTHON) -c 'import torch' || { echo 'name a Python whose torch has CUDA: make gpu PYTHON=/path/to/python3' >&2; exit 2; }
	$(PYTHON) -m experiments.bench.gpu

clean:
	rm -rf $(VENV) build *.egg-info
