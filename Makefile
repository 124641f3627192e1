# make run: set everything up and run the embedded recipe.   make test: set everything up and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GRAINWISE := $(BIN)/grainwise
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: run test lint bench clean
run: $(STAMP)
	$(GRAINWISE) run

test: $(DEV)
	$(BIN)/python -m pytest

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	for file in benchmarks/bench_*.py; do name=$${file##*/bench_}; $(GRAINWISE) bench $${name%.py}; done

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Grainwise needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

# torch first, at its exact version: without it the other packages would pull a larger build
$(STAMP): $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(DEV): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs dist build
