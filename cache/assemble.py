"""Make the HDF5 file from staged rows."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clip_adapter.cache import hdf5, schema
from clip_adapter.cache.metadata import Metadata, encode
from clip_adapter.cache.staging import StagedRows

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OPTIONAL_LISTS: dict[str, np.dtype] = {
    "skipped_labels": np.dtype(np.int32),
    **dict.fromkeys(("digests", "stamps", "contents", "skipped_stamps"), np.dtype(np.uint64)),
}

HASH_BYTES = 8

Projection = tuple[np.ndarray, np.ndarray | None]


def assemble(
    path: Path,
    staged: Mapping[str, StagedRows],
    templates: Sequence[str],
    metadata: Metadata,
    projection: Projection | None,
) -> None:
    """Write a cache, or a part of one, of what is staged to `path` and wait for the disk.

    staged: by split, and `text`. metadata: without the hashes, which are added.
    projection: weights (F, D), and bias (D,) or None.
    """
    _reserve(path, staged)
    # HDF5 1.10's file format, unlike the default of h5py, puts checksums on the metadata too:
    # one wrong byte there can turn a chunk into zeros or HDF5 into an endless loop.
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for split in schema.SPLITS:
            if split in staged:
                _write_split(file.create_group(f"images/{split}"), staged[split])
        if schema.TEXT in staged:
            _write_text(file.create_group(schema.TEXT), staged[schema.TEXT], templates)
        if projection is not None:
            _write_projection(file.create_group("projection"), *projection)
        _write_metadata(file, metadata)
    with path.open("rb") as finished:
        os.fsync(finished.fileno())


def _reserve(path: Path, staged: Mapping[str, StagedRows]) -> None:
    """Have the disk say now whether the file fits: where a write fails, HDF5 may crash."""
    size = schema.CHUNK_BYTES  # for what describes the rest
    for rows in staged.values():
        size += rows.bytes
        for kind, (views, dim) in rows.arrays.values():  # each view's last chunk may be half empty
            size += views * schema.chunk_rows(rows.rows, dim * kind.itemsize) * dim * kind.itemsize
            size += views * rows.rows * HASH_BYTES
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in NO_ROOM:  # else it is the file system that cannot tell
                raise


def _write_metadata(file: h5py.File, metadata: Metadata) -> None:
    there = {path: file[path] for path in schema.ELEMENTS if path in file}
    sums = {path: hdf5.sha256(one) for path, one in there.items() if schema.ELEMENTS[path].whole}
    # The parts of a cache are no content of their own.
    content = hdf5.content_sha256(there.get) if metadata.part is None else None
    text, digest = encode(replace(metadata, datasets_sha256=sums, content_sha256=content))
    values = np.frombuffer(text, np.uint8)
    _write_array(file, schema.METADATA, values, values.shape)
    name = schema.FORMAT if metadata.part is None else schema.PART_FORMAT
    # Fixed-length, because HDF5 keeps strings of variable length where it has no checksum.
    file.attrs["format"] = np.bytes_(name)
    file.attrs["format_version"] = np.int64(metadata.format_version)
    file.attrs[schema.METADATA_SHA256] = np.bytes_(digest)


def _write_split(group: h5py.Group, staged: StagedRows) -> None:
    for name, (kind, (views, dim)) in staged.arrays.items():
        rows = schema.chunk_rows(staged.rows, dim * kind.itemsize)
        dataset = group.create_dataset(
            name,
            (views, staged.rows, dim),
            kind,
            maxshape=(views, staged.rows or None, dim),
            chunks=(1, rows, dim),
            fletcher32=True,
        )
        hashes = np.zeros((views, staged.rows), np.uint64)
        for start in range(0, staged.rows, rows):
            stop = min(start + rows, staged.rows)
            values = staged.read(start, stop)[name].transpose(1, 0, 2)
            dataset[:, start:stop] = values
            hashes[:, start:stop] = hdf5.row_hashes(values)
        if staged.rows:
            _write_array(
                group, name + schema.HASHES, hashes, (1, schema.chunk_rows(staged.rows, HASH_BYTES))
            )
    _write_list(group, "labels", staged.listed("labels"), staged.rows, np.dtype(np.int32))
    _write_strings(group, "ids", lambda: staged.listed("ids"))
    if any(True for _ in staged.listed("skipped")):
        _write_strings(group, "skipped", lambda: staged.listed("skipped"))
    for name, dtype in OPTIONAL_LISTS.items():
        if count := sum(1 for _ in staged.listed(name)):
            _write_list(group, name, staged.listed(name), count, dtype)


def _write_text(group: h5py.Group, staged: StagedRows, templates: Sequence[str]) -> None:
    values = staged.read(0, staged.rows)
    for name, (_, shape) in staged.arrays.items():
        chunk = (schema.chunk_rows(staged.rows, values[name][:1].nbytes), *shape)
        _write_array(group, name, values[name], chunk)
    _write_strings(group, "class_names", lambda: staged.listed("class_names"))
    _write_strings(group, "templates", lambda: templates)
    if prompts := list(staged.listed("prompts")):
        encoded = [[string.encode() for string in row] for row in prompts]
        length = max(1, max(len(string) for row in encoded for string in row))
        table = np.array(encoded, h5py.string_dtype("utf-8", length))
        rows = schema.chunk_rows(len(table), length * table.shape[1])
        _write_array(group, "prompts", table, (rows, table.shape[1]))


def _write_projection(group: h5py.Group, weights: np.ndarray, bias: np.ndarray | None) -> None:
    rows = schema.chunk_rows(len(weights), weights[0].nbytes)
    _write_array(group, "weights", weights, (rows, weights.shape[1]))
    if bias is not None:
        _write_array(group, "bias", bias, bias.shape)


def _write_array(group: h5py.Group, name: str, values: np.ndarray, chunk: tuple[int, ...]) -> None:
    group.create_dataset(name, data=values, chunks=chunk, fletcher32=True)


def _write_strings(group: h5py.Group, name: str, strings: Callable[[], Iterable[str]]) -> None:
    """Fixed-length UTF-8, which unlike variable-length strings is covered by the checksum.

    strings: called twice, to find the length and to write, so that they need not be in memory.
    """
    count, length = 0, 1
    for string in strings():
        count, length = count + 1, max(length, len(string.encode()))
    encoded = (string.encode() for string in strings())
    _write_list(group, name, encoded, count, h5py.string_dtype("utf-8", length))


def _write_list(
    group: h5py.Group, name: str, values: Iterable[Any], count: int, dtype: np.dtype
) -> None:
    """A one-dimensional dataset, written a chunk at a time."""
    rows = schema.chunk_rows(count, dtype.itemsize)
    dataset = group.create_dataset(
        name, (count,), dtype, maxshape=(count or None,), chunks=(rows,), fletcher32=True
    )
    remaining: Iterator[Any] = iter(values)
    for start in range(0, count, rows):
        dataset[start : start + rows] = np.array(list(islice(remaining, rows)), dtype)
