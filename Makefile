# make demo: environment, install, extract, fit and a report.   make test: all that CI runs.
# make fuzz: 10,000 damaged, hostile and odd inputs.
# make docs: the documentation as a site, in site/.
# make dist: what a release uploads, in dist/.
# make lock: a new environment with the newest versions that pyproject.toml admits, written down.
PYTHON ?= python3
BIN := .venv/bin
ROOMS := $(sort $(dir $(wildcard $(foreach room,adapters cache clip_adapter extract pipelines,$(room)/*.py $(room)/*/*.py $(room)/*/*/*.py))))
DEMO := runs/demo

CONSTRAINTS := --constraint constraints.txt
# Packages beside our own whose new versions have broken ours, or may.
LOCKED := etils huggingface_hub jaxlib ml_dtypes orbax-checkpoint protobuf pyarrow \
  tensorflow-metadata tensorstore tokenizers

.PHONY: demo test fuzz docs dist dev lock clean

# Two methods beside the baselines; the last line names the report.
demo: .venv/installed
	rm -rf $(DEMO)/methods
	$(BIN)/extract --out $(DEMO)/features.h5
	$(BIN)/fit --cache $(DEMO)/features.h5 --method clip-adapter tip-adapter \
	  --shots 1 2 4 8 16 --seeds 1 2 3 --out $(DEMO)/methods
	$(BIN)/clip-adapter report $(DEMO)/methods

# Types are checked while the first tests run.
test: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder && wait $$types

docs: dev
	$(BIN)/mkdocs build --strict --quiet

dist: dev
	rm -rf dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist

fuzz: dev
	FUZZ=46 $(BIN)/python -m pytest -n auto --dist load tests/fuzz/test_fuzz.py

dev: .venv/installed

# Strict editable mode links every file, so that type checkers and editors follow the mapped imports;
# a folder's time stamp changes when a file is added or removed, and the links are then made anew.
.venv/installed: pyproject.toml constraints.txt $(ROOMS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=strict \
	  $(CONSTRAINTS) --editable '.[test]'
	touch $@

# The tests have to pass with what it writes before that is committed.
lock:
	rm -rf .venv
	$(MAKE) .venv/installed CONSTRAINTS=
	$(BIN)/python -c "$$WRITE_CONSTRAINTS" $(LOCKED) > constraints.new
	mv constraints.new constraints.txt
	touch .venv/installed

define WRITE_CONSTRAINTS
import re, sys
from importlib.metadata import requires, version
wanted = [line for line in requires("clip-adapter") if "extra ==" not in line or "test" in line]
names = {"datasets", "transformers", *sys.argv[1:]}
names |= {re.match(r"[\w.-]+", line)[0] for line in wanted} - {"clip-adapter"}
for name in sorted(names, key=str.lower):
    print(f"{name}=={version(name).partition('+')[0]}")
endef
export WRITE_CONSTRAINTS

clean:
	rm -rf .venv build runs *.egg-info
