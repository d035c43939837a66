"""Every exception of the package comes back from another process as it was."""

import builtins
import copy
import importlib
import pickle

import pytest

from clip_adapter.extract.encoding.unreadable import Skipped
from tests.test_architecture import MODULES, tree

# What those take that take more than words.
TAKES = {"BrokenImage": (Skipped(3, "cat.jpg", "cat.jpg cannot be decoded: it is cut"),)}


def exceptions() -> dict[str, str]:
    """name → module of every class whose bases lead to a built-in exception."""
    known = {name for name, one in vars(builtins).items() if isinstance(one, type)
             and issubclass(one, BaseException)}  # fmt: skip
    classes = [(module, node) for module in MODULES for node in tree(module).body
               if hasattr(node, "bases")]  # fmt: skip
    found: dict[str, str] = {}
    for _ in range(3):  # of bases that are found later
        for module, node in classes:
            bases = {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
            if bases & {*known, *found}:
                found[node.name] = module
    return found


@pytest.mark.parametrize(("name", "module"), exceptions().items())
def test_an_error_pickles_and_copies(name: str, module: str) -> None:
    kind = getattr(importlib.import_module(module), name)
    error = kind(*TAKES.get(name, ("the reason",)))
    error.add_note("seen in worker 2")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_they_are_found() -> None:
    assert exceptions().keys() >= {"UserError", "BrokenImage", "BadImage", "MethodElsewhere"}
