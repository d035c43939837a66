"""TensorFlow Datasets prepares data sets without TensorFlow, as far as that goes.

TensorFlow Datasets unpacks archives and walks through folders with `tf.io.gfile`. On a local disk
these are plain file operations, so that most builders of images need nothing else of TensorFlow.
Here they are given to it, with TensorFlow's names and meanings, for the time of a preparation, and
everything else of TensorFlow is refused as it is refused when TensorFlow is missing.
"""

import contextlib
import glob
import os
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any


def _listdir(path: str) -> list[str]:
    return sorted(os.listdir(path))  # noqa: PTH208


def _walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    for place, folders, files in os.walk(top):
        folders.sort()
        yield place, folders, sorted(files)


def _glob(pattern: str) -> list[str]:
    return sorted(glob.glob(os.fspath(pattern)))  # noqa: PTH207


class _FileOperations:
    """What stands in for the module `tensorflow`."""

    io = SimpleNamespace(
        gfile=SimpleNamespace(
            GFile=open,
            exists=os.path.exists,
            isdir=os.path.isdir,
            listdir=_listdir,
            walk=_walk,
            glob=_glob,
        )
    )
    compat = SimpleNamespace(as_text=os.fsdecode)

    def __getattr__(self, name: str) -> Any:
        raise ModuleNotFoundError(f"tensorflow is needed for tf.{name}", name="tensorflow")


@contextlib.contextmanager
def file_operations_for_tfds() -> Iterator[None]:
    """Within it, TensorFlow Datasets finds file operations where it looks for TensorFlow.

    Where TensorFlow is installed, nothing happens.
    """
    if find_spec("tensorflow"):
        yield
        return
    from tensorflow_datasets.core.utils import lazy_imports_utils

    # All of TensorFlow Datasets shares this one object, which keeps the imported module here.
    lazy_module = vars(lazy_imports_utils.tensorflow)
    lazy_module["_module"] = _FileOperations()
    try:
        yield
    finally:
        del lazy_module["_module"]
