"""The arrays of a saved adapter, as its JSON vouches for them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from clip_adapter import files
from clip_adapter.errors import UserError
from clip_adapter.pipelines.saved.adapter_check import INFO_FILE


def read_tensors(path: Path, stated_sha256: object) -> dict[str, npt.NDArray[Any]]:
    """Raises UserError where the file cannot be read or has another hash than was stated."""
    files.is_there(path)
    try:
        with path.open("rb") as file:  # not into memory: nobody has said yet how large it may be
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); fit the adapter again."
        ) from error
    if found != stated_sha256:
        raise UserError(
            f"{path} is not the file that {INFO_FILE} was written for: it is damaged or was "
            "changed; fit the adapter again."
        )
    try:
        return load_file(path)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file of numbers that NumPy has.") from error


def with_labels(arrays: dict[str, npt.NDArray[Any]], classes: int) -> dict[str, npt.NDArray[Any]]:
    """The same with `labels` for what stood there before: `values`, their one-hot rows."""
    values = arrays.get("values")
    if values is None or values.ndim != 2 or values.shape[1] != classes:
        return arrays
    labels = values.argmax(axis=1)
    if not np.array_equal(values, np.eye(classes, dtype=np.float32)[labels]):
        return arrays
    kept = {name: array for name, array in arrays.items() if name != "values"}
    return {**kept, "labels": labels.astype(np.float32)}
