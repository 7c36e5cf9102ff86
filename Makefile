# `make quickstart` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: quickstart test test-full check bench clean

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

bench: $(VENV)/installed
	$(BIN)/lpsim bench

clean:
	rm -rf $(VENV) build *.egg-info
