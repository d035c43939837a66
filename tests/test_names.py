"""No module of the house has the name of one of the standard library."""

import sys
from pathlib import Path

import pytest

ROOMS = ("adapters", "cache", "extract", "pipelines")
MODULES = [path for room in ROOMS for path in (Path(__file__).parents[1] / room).rglob("*.py")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_name_is_no_module_of_the_standard_library(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names
