# make demo: environment, install, extract, fit and a result table.   make test: everything that CI runs.
PYTHON ?= python3
BIN := .venv/bin
ROOMS := adapters cache console extract pipelines

.PHONY: demo test dev lint clean

demo: .venv/installed
	BIN=$(BIN) sh pipelines/demo.sh runs/demo

test: dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m pytest

dev: .venv/installed

# Strict editable mode links every file, so that type checkers and editors follow the mapped imports;
# a room's time stamp changes when a file is added or removed, and the links are then made anew.
.venv/installed: pyproject.toml $(ROOMS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=strict --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build runs *.egg-info
