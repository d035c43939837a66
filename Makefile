# make demo: environment, install, extract, fit and a result table.   make test: all that CI runs.
PYTHON ?= python3
BIN := .venv/bin
ROOMS := adapters cache extract extract/datasets extract/glyph_clip pipelines pipelines/fitting
DEMO := runs/demo
TASKS := --cache $(DEMO)/features.h5 --shots 1 2 4 8 16 --seeds 1 2 3
ALPHAS := 0 0.2 0.4 0.6 0.8

.PHONY: demo test dev clean

# One run for each fixed α, and one that chooses α on validation data, beside the baselines.
demo: .venv/installed
	rm -rf $(DEMO)/alpha-*
	$(BIN)/extract --out $(DEMO)/features.h5
	$(BIN)/fit $(TASKS) --out $(DEMO)/alpha-selected
	for alpha in $(ALPHAS); do \
	  $(BIN)/fit $(TASKS) --alpha $$alpha --baselines --out $(DEMO)/alpha-$$alpha > /dev/null || exit; \
	done
	$(BIN)/clip-adapter report $(DEMO)/alpha-selected $(ALPHAS:%=$(DEMO)/alpha-%)

# The README's commands take longest, so they are begun first.
test: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/test_readme.py tests

dev: .venv/installed

# Strict editable mode links every file, so that type checkers and editors follow the mapped imports;
# a folder's time stamp changes when a file is added or removed, and the links are then made anew.
.venv/installed: pyproject.toml $(ROOMS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=strict --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build runs *.egg-info
