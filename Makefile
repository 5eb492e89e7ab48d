# make setup      an environment in .venv with pinned versions, the packaged model and the packaged data
# make demo       LoRA, B-LoRA and Me-LoRA on the packaged model and data; ends with a table and the report's path
# make demo-full  the same with all data and more steps
# make test       the tests that take seconds each
# make test-all   every test, then PEFT's own test-suite pointed at the package's methods
# make lint types style and static types
# make docs       the documentation as a site, in build/site
# make clean      removes the environment and caches; runs/ stays

PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= runs/demo
DEMO_ARGS ?= --overwrite
TEST_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ALL_STAMP := $(VENV)/.installed-all
DOCS_STAMP := $(VENV)/.installed-docs

.DEFAULT_GOAL := setup
.PHONY: setup setup-docs demo demo-full test test-all lint types docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-packaged.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11, which the pinned versions need: make setup PYTHON=python3.11"; exit 2; }
	@echo "Installing into $(VENV): about 2 GB, a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install -qq --no-deps --requirement requirements-packaged.txt
	@touch $@

# What some tests are skipped without.
$(ALL_STAMP): $(STAMP)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev,serve,lm-eval,comparison]'
	@touch $@

demo: $(STAMP)
	$(BIN)/bayeslora demo --output-dir $(DEMO_DIR) $(DEMO_ARGS)

demo-full: $(STAMP)
	$(BIN)/bayeslora demo --full --output-dir $(DEMO_DIR) $(DEMO_ARGS)

# One thread a worker: two workers on two cores would only steal from each other otherwise.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(TEST_ARGS)

test-all: $(ALL_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/peft_suite/run.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[docs]'
	@touch $@

setup-docs: $(DOCS_STAMP)

# Every warning is an error. The variable silences an announcement of the theme's authors.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
