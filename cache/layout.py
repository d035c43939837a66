"""Names and numbers of the cache file, format version 1 (specified in FORMAT.md)."""

import hashlib
from collections.abc import Iterator

import h5py
import numpy as np

FORMAT = "clip-feature-cache"
PART_FORMAT = "clip-feature-cache-part"
FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
TEXT = "text"
CHUNK_BYTES = 1 << 20


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows per HDF5 chunk, so that a chunk holds about 1 MiB."""
    return max(1, min(rows, CHUNK_BYTES // max(1, row_bytes)))


def dataset_paths(file: h5py.File) -> list[str]:
    """Every dataset of the format, in the order in which the content hash reads them."""
    paths: list[str] = []
    for split in SPLITS:
        if f"images/{split}" in file:
            paths += [f"images/{split}/{name}" for name in ("features", "labels", "ids")]
    return paths + [f"{TEXT}/{name}" for name in ("features", "class_names", "templates")]


def content_sha256(file: h5py.File) -> str:
    """SHA-256 over the datasets: for each its path, its shape and its values in row order."""
    digest = hashlib.sha256()
    for path in dataset_paths(file):
        dataset = file[path]
        digest.update(f"{path} {dataset.shape}\n".encode())
        for block in _blocks(dataset):
            digest.update(np.ascontiguousarray(block).tobytes())
    return digest.hexdigest()


def _blocks(dataset: h5py.Dataset) -> Iterator[np.ndarray]:
    """The values in C order, a bounded piece at a time."""
    if dataset.ndim == 3:
        rows = chunk_rows(dataset.shape[1], dataset.shape[2] * dataset.dtype.itemsize)
        for view in range(dataset.shape[0]):
            for start in range(0, dataset.shape[1], rows):
                yield dataset[view, start : start + rows]
    else:
        rows = chunk_rows(dataset.shape[0], dataset.dtype.itemsize)
        for start in range(0, dataset.shape[0], rows):
            yield dataset[start : start + rows]


def count_skipped(file: h5py.File) -> int:
    """Images that a cache or a part of one lists as skipped."""
    lists = (file.get(f"images/{split}/skipped") for split in SPLITS)
    return sum(len(names) for names in lists if names is not None)
