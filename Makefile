# Each target makes .venv the first time (this needs the network) and works offline afterwards.
# make test ARGS="-k coupling"    passes arguments on;    make demo PYTHON=python3.12    chooses the interpreter.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

export HF_HUB_OFFLINE := 1

.PHONY: help demo test test-all lint bench quality zoo
.DELETE_ON_ERROR:

help:
	@echo "make demo | test | test-all | lint | bench | quality | zoo"

demo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.installed
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed
	$(PYTEST) $(ARGS)

lint: $(VENV)/.installed
	@status=0; for check in "ruff check ." "ruff format --check ." lint-imports mypy; do \
		echo "$$check"; $(BIN)/$$check || status=1; \
	done; exit $$status

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/speed.py $(ARGS)

quality: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/quality.py $(ARGS)

zoo: $(VENV)/.installed
	$(BIN)/python benchmarks/zoo.py $(ARGS)

# torch first and pinned, so that pip settles on the CPU build where it can find one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "depgraph needs Python 3.11 or later: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON), which takes minutes the first time"; \
		$(PYTHON) -m venv $(VENV); }
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[dev,bench,plot]'
	@touch $@
