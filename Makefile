# Every target works on a fresh clone with Python >= 3.10, make and a C++ compiler, and installs what it needs once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
SEED ?= 0
CHECKED := torch_gradmatch tests examples setup.py

.PHONY: help install demo test test-lowest lint format clean

help:
	@echo "make demo         train ERM and Fish on CdSprites-15; writes out/cdsprites.png and .json (SEED=0)"
	@echo "make test         the whole test suite"
	@echo "make lint         ruff format check, ruff, mypy strict on the package"
	@echo "make format       apply ruff's formatting and safe fixes"
	@echo "make test-lowest  the suite on the lowest supported torch (large download)"
	@echo "make clean        remove environments, caches and outputs"

install: $(INSTALLED)

$(INSTALLED): requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/cdsprites.py --out out --seed $(SEED)

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-lowest: requirements-dev.txt
	$(PYTHON) -m venv $(LOWEST)
	sed 's/^torch==.*/torch==2.10.0/' requirements-dev.txt > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --requirement $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(LOWEST)/bin/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

clean:
	rm -rf $(VENV) $(LOWEST) build dist out *.egg-info .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
