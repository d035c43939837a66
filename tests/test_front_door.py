"""The public names: what they bring in, and the examples in their docstrings."""

import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clip_adapter

ROOT = Path(__file__).parents[1]
HALL = [name for name in clip_adapter.__all__ if name != "__version__"]
LIBRARIES = "{'numpy', 'jax', 'flax', 'optax', 'torch', 'h5py', 'scipy', 'sklearn'}"


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout


def test_the_package_loads_no_array_library():
    code = (
        f"import sys, clip_adapter; clip_adapter.__version__; print({LIBRARIES} & set(sys.modules))"
    )
    assert python(code) == "set()\n"


@pytest.mark.parametrize("first", ["clip_adapter.extract.run", "clip_adapter.extract", "json"])
def test_extract_is_the_function_whatever_was_imported_first(first: str):
    """The room that it lies in has its name."""
    code = (
        f"import {first}; from clip_adapter import ExtractConfig, extract; print(extract.__name__)"
    )
    assert python(code) == "extract\n"


def test_all_are_named_and_documented():
    assert set(clip_adapter.PUBLIC) == set(HALL) == set(dir(clip_adapter)) - {"__version__"}
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert set(shown) == set(HALL)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = clip_adapter.fitt


def test_the_examples_in_docstrings_run(
    digits_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the order of PUBLIC: later ones use what earlier ones have written."""
    shutil.copyfile(digits_cache, tmp_path / "features.h5")
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(verbose=False)
    without = []
    for name in clip_adapter.PUBLIC:
        public = getattr(clip_adapter, name)
        if isinstance(public, dict):
            continue
        (test,) = finder.find(public, name, globs={})
        without += [] if test.examples else [name]
        runner.run(test)
    assert (without, runner.summarize(verbose=False).failed) == ([], 0)
