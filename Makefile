# `make run` and `make test` set up .venv the first time and again when pyproject.toml has changed.
# ARGS goes to the command: make run ARGS="strategy=backprop seed=2", make test ARGS="-k segment"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A start imports 4,000 modules: seconds longer where their byte code is not kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test check docs format

run: $(STAMP)
	$(BIN)/python -m sglight $(ARGS)

# Two test processes with one thread each: more threads than cores make small networks slower, not faster.
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory docs

# Any warning ends it: a link that leads nowhere, a page that no other one leads to. No network is needed.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going --quiet docs docs/_build/html
	@echo "written: docs/_build/html/index.html"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sglight needs Python 3.11 or newer; make PYTHON=/path/to/one")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev,docs]'
	@touch $@
