# One entry point for people and for CI. Everything runs in .venv, installed from the pinned constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
# An environment variable, because pip's -c does not reach the environment in which the wheel is built.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test test-slow check bench docs notebooks build clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       install, then harvest, train, evaluate and build on the embedded model"
	@echo "make test       install, then run the tests (under 10 minutes on two cores)"
	@echo "make test-slow  the long tests: kill -9 loops, the demo end to end, the wheel in a clean environment"
	@echo "make check      lint, format, types, import layers"
	@echo "make bench      the benchmarks behind docs/performance.md (under 20 minutes on two cores)"
	@echo "make docs       the documentation site, in site/, without a warning"
	@echo "make notebooks  run the notebooks, each in an empty folder (under 15 minutes on two cores)"

# torch first and alone: its version decides which of its many builds is taken.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/saelab demo --out runs/demo --force

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	for b in harvest stream "train_step --repeats 5 --no-memory" memory kernels "scaling --repeats 3" \
	  "spgemm --tokens 250000" features; do \
	  set -- $$b; script=$$1; shift; echo "== $$b"; $(BIN)/python benchmarks/$$script.py "$$@" || exit 1; done

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

notebooks: $(VENV)/.installed
	$(BIN)/python notebooks/run.py

build: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf $(VENV) dist build
