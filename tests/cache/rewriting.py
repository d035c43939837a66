"""Change a finished cache and make its checksums agree again, as somebody would who means it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Change = Callable[[h5py.File, dict[str, Any]], object]


def rewrite(path: Path, change: Change) -> None:
    """Apply `change` to the open file and the JSON object of its metadata."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        document = json.loads(file["metadata"][...].tobytes())
        change(file, document)
        for split in file["images"] if isinstance(file.get("images"), h5py.Group) else ():
            rehash(file, f"images/{split}/features")
            rehash(file, f"images/{split}/pre_projection")
            rehash(file, f"images/{split}/features2")
        sums = document.get("datasets_sha256")
        for name in sums if isinstance(sums, dict) else ():
            here = name in file and isinstance(file.get(name, getlink=True), h5py.HardLink)
            found = file[name] if here else None
            if isinstance(found, h5py.Dataset) and found.chunks and found.size < 1e6:
                values = np.ascontiguousarray(found[...])
                sums[name] = hashlib.sha256(values.tobytes()).hexdigest()
        store_metadata(file, json.dumps(document).encode())


def rehash(file: h5py.File, path: str) -> None:
    """Make the hashes of rows agree, where they fit."""
    hashes, found = file.get(f"{path}_hashes"), file.get(path)
    if not isinstance(hashes, h5py.Dataset) or not isinstance(found, h5py.Dataset):
        return
    if found.is_virtual:  # reading one that refers to itself ends the process
        return
    if hashes.shape == found.shape[:-1] and found.size < 1e6:
        for place in np.ndindex(hashes.shape):
            digest = hashlib.sha256(found[place].tobytes()).digest()
            hashes[place] = int.from_bytes(digest[:8], "little")


def store_metadata(file: h5py.File, text: bytes) -> None:
    del file["metadata"]
    values = np.frombuffer(text, np.uint8)
    file.create_dataset("metadata", data=values, chunks=values.shape, fletcher32=True)
    file.attrs["metadata_sha256"] = np.bytes_(hashlib.sha256(text).hexdigest())


def put(file: h5py.File, path: str, values: np.ndarray, **options: Any) -> None:
    """A dataset in place of another one, stored as the format says unless `options` say else."""
    if path in file:
        del file[path]
    chunked = {"chunks": tuple(max(1, n) for n in values.shape), "fletcher32": True}
    limits = {"maxshape": (None,) * values.ndim} if 0 in values.shape else {}
    file.create_dataset(path, data=values, **(chunked | limits | options))


def datasets(path: Path) -> dict[str, tuple[Any, ...]]:
    """Every dataset of a file by its path, of the metadata all but the time."""
    found: dict[str, tuple[Any, ...]] = {}

    def note(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype.str, item.shape, item[...].tobytes())
        if name == "metadata":
            stated = json.loads(item[...].tobytes())
            assert stated.pop("created_at")
            found[name] = (stated,)

    with h5py.File(path) as file:
        file.visititems(note)
    return found
