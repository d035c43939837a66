"""What a cache holds, to be compared."""

from pathlib import Path
from typing import Any

import h5py


def datasets(path: Path) -> dict[str, tuple[Any, ...]]:
    """Every dataset of a file: its type, its shape and the bytes of its values."""
    found = {}

    def note(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype.str, item.shape, item[...].tobytes())

    with h5py.File(path) as file:
        file.visititems(note)
    return found
