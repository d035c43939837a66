"""Write a feature cache: assembled beside its path and renamed when it is whole."""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from clip_adapter.cache import hdf5, schema
from clip_adapter.cache.content import Content, check_features, check_strings, indistinct
from clip_adapter.cache.metadata import Metadata, Part, encode, parse, parse_object
from clip_adapter.cache.rows import Chosen, Picked
from clip_adapter.cache.schema import ELEMENTS, HASHES, Element, Kind, of_images, split_of
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.errors import Contradiction, UserError
from clip_adapter.files import is_there
from clip_adapter.words import quoted

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STRINGS_AT_ONCE = 1 << 12
HASH_BYTES = 8


def write_cache(
    out: str | Path | StagingFolder,
    content: Content,
    *,
    backbone: Mapping[str, Any],
    dataset: Mapping[str, Any],
    logit_scale: float,
    logit_bias: float = 0.0,
    preprocess: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    part: Part | None = None,
    templates: Iterable[str] = (),
    backbone2: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write a feature cache, which is there when it is whole and else not.

    out: where, in a folder that is there; or the folder taken beside it, which is removed then.
    force: overwrite an existing file.
    content: the datasets of FORMAT.md by their paths, such as `images/train/features` (V, N, D)
        and `text/class_names`; images and text un-normalised, float32 or float16. Hashes of rows
        are computed.
    backbone, dataset, preprocess, arguments, logit_scale, logit_bias: the metadata of FORMAT.md.
    backbone2: the second encoder, where there are `features2`.
    part, templates: make a part of a cache, for `merge_parts`, which may hold no image of a split.

    Raises UserError for what FORMAT.md does not allow, for a file that exists, and where none can
    be written.

    Examples:
        >>> import numpy as np
        >>> from clip_adapter import FeatureCache, write_cache
        >>> draw = np.random.default_rng(0).normal
        >>> content = {
        ...     "text/features": draw(size=(2, 1, 8)).astype(np.float32),
        ...     "text/class_names": ["cat", "eel"],
        ...     "text/templates": ["a photo of a {}."],
        ... }
        >>> for split in ("train", "test"):
        ...     content[f"images/{split}/features"] = draw(size=(1, 6, 8)).astype(np.float32)
        ...     content[f"images/{split}/labels"] = [0, 1] * 3
        ...     content[f"images/{split}/ids"] = [f"{split}/{row}.jpg" for row in range(6)]
        >>> backbone = {"name": "mine", "pretrained": "mine", "weights_sha256": "0" * 64}
        >>> backbone |= {"embed_dim": 8, "image_size": 224, "quick_gelu": False}
        >>> dataset = {"name": "pets", "source": "my photographs", "splits": {"test": "of May"}}
        >>> write_cache("own.h5", content, backbone=backbone, dataset=dataset, logit_scale=100.0)
        >>> with FeatureCache("own.h5") as cache:
        ...     cache.shape("train"), cache.class_names
        ((1, 6, 8), ['cat', 'eel'])
    """
    document = {
        "format": schema.FORMAT if part is None else schema.PART_FORMAT,
        "complete": True,
        "created_at": _now(),
        "writer": f"clip-adapter {version('clip-adapter')}",
        "backbone": backbone,
        "preprocess": preprocess or {},
        "dataset": dataset,
        "logit_scale": float(logit_scale),
        "logit_bias": float(logit_bias),
        "datasets_sha256": {},
        "arguments": arguments or {},
        "part": part and asdict(part),
        "templates": [*templates],
        "backbone2": backbone2,
    }
    with ExitStack() as stack:
        place = out
        if not isinstance(place, StagingFolder):
            path = Path(place)
            if is_there(path) and not force:
                raise UserError(f"{path} exists; choose another name, or force to overwrite it.")
            if not path.absolute().parent.is_dir():
                raise UserError(f"{path} cannot be written: there is no such folder.")
            place = stack.enter_context(StagingFolder(path))
        given = (name for name in content if name not in ELEMENTS or name.endswith(HASHES))
        if (unknown := next(given, None)) is not None:
            raise UserError(f"{quoted(unknown)} is no dataset that FORMAT.md has, or is computed.")
        content = {name: _values(name, values) for name, values in content.items()}
        content = {name: values for name, values in content.items() if _is_written(name, values)}
        dims = {"D": backbone.get("embed_dim"), "E": (backbone2 or {}).get("embed_dim")}
        _check(place.path, content, part is not None, dims)
        try:
            metadata = parse(parse_object(json.dumps(document, allow_nan=False)))
        except (Contradiction, TypeError, ValueError) as error:
            raise UserError(f"Cannot write {place.path}: its metadata: {error}.") from error
        assembled = place.folder / "assembled.h5"
        with place.writing():
            stack.callback(assembled.unlink, missing_ok=True)
            _assemble(assembled, content, metadata)
            assembled.replace(place.path)
            place.remove()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _values(name: str, values: Any) -> Any:
    """Values in memory as an array of what the file has, strings as objects."""
    if isinstance(values, Picked | Chosen):
        return values
    kind = ELEMENTS[name].kind
    if kind is Kind.STRING:
        strings = np.asarray(values, np.object_)
        if not all(isinstance(value, str) for value in strings.ravel()):
            raise UserError(f"{name} holds something else than strings.")
        return strings
    array = np.asarray(values)
    wanted = {Kind.INT32: np.int32, Kind.UINT64: np.uint64, Kind.FLOAT32: np.float32}.get(kind)
    if wanted is None:
        return array
    whole = array.dtype.kind in "iu" or not array.size
    if kind is not Kind.FLOAT32 and not whole:
        raise UserError(f"{name} holds something else than whole numbers.")
    stored = array.astype(wanted)
    if whole and array.size and not np.array_equal(stored.astype(array.dtype), array):
        raise UserError(f"{name} holds numbers beyond {np.dtype(wanted)}.")
    return stored


def _is_written(name: str, values: Any) -> bool:
    """Lists that MAY be there are left out where they are empty."""
    element = ELEMENTS[name]
    return element.required or element.by_row or 0 not in values.shape


def _check(path: Path, content: Content, part: bool, dims: Mapping[str, Any]) -> None:
    """Raises UserError or ValueError for what the file may not hold."""
    shapes = {name: values.shape for name, values in content.items()}
    splits = [split for split in schema.ALL_SPLITS if split in {split_of(name) for name in content}]
    for split in splits:
        counted = of_images(split, "ids" if split == schema.UNLABELLED else "labels")
        if not part and not shapes.get(counted, (1,))[0]:
            raise UserError(f"The {split} split has no image that could be read.")
    try:
        lengths = schema.measure(shapes, splits, part=part)
    except Contradiction as error:
        raise UserError(f"Cannot write {path}: {error}.") from error
    for letter, dim in dims.items():
        if (length := lengths.get(letter, dim)) != dim:
            raise UserError(
                f"Cannot write {path}: features of {length} numbers and embed_dim of {dim!r:.40}."
            )
    names = content.get("text/class_names", [])
    if len(names) and (reason := indistinct(names)):
        raise UserError(f"Cannot write {path}: {reason}; name the classes.")
    for name, values in content.items():
        outside = name.endswith("labels") and len(names) and not _within(values[:], len(names))
        if outside:
            raise UserError(f"Cannot write {path}: {name} are outside the {len(names)} classes.")
        if ELEMENTS[name].kind is Kind.STRING:
            check_strings(_strings(values))
            if name.endswith("/groups") and "" in _strings(values):
                raise UserError(f"Cannot write {path}: {name} hold an empty name; name the group.")
        elif ELEMENTS[name].kind is Kind.FEATURES and isinstance(values, np.ndarray):
            split = split_of(name)
            rows = np.moveaxis(values, ELEMENTS[name].row_axis, 0)
            check_features(rows, content[of_images(split, "ids")] if split else names)


def _within(labels: npt.NDArray[np.int32], classes: int) -> bool:
    return not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < classes


def _strings(values: Any) -> Iterator[str]:
    """All of a list or a table of strings, some of which are in memory at a time."""
    for start in range(0, values.shape[0], STRINGS_AT_ONCE):
        yield from values[start : start + STRINGS_AT_ONCE].ravel()


def _assemble(path: Path, content: Content, metadata: Metadata) -> None:
    """Write the file to `path` and wait for the disk."""
    types = {name: _dtype(ELEMENTS[name], values) for name, values in content.items()}
    _reserve(path, content, types)
    # HDF5 1.10's file format, unlike the default of h5py, puts checksums on the metadata too:
    # one wrong byte there can turn a chunk into zeros or HDF5 into an endless loop.
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        there = [name for name in ELEMENTS if name in content]
        for group, names in groupby(there, lambda name: name.rpartition("/")[0]):
            _write_group(file.require_group(group), {n: (content[n], types[n]) for n in names})
        _write_metadata(file, metadata)
    with path.open("rb") as finished:
        os.fsync(finished.fileno())


def _dtype(element: Element, values: Any) -> np.dtype:
    if element.kind is Kind.STRING:
        longest = max((len(string.encode()) for string in _strings(values)), default=0)
        return h5py.string_dtype("utf-8", max(1, longest))
    return values.dtype


def _reserve(path: Path, content: Content, types: Mapping[str, np.dtype]) -> None:
    """Have the disk say now whether the file fits: where a write fails, HDF5 may crash."""
    size = schema.CHUNK_BYTES  # for what describes the rest
    for name, values in content.items():
        shape = values.shape
        chunks = _chunks(ELEMENTS[name], shape, types[name])
        # The last chunk may be half empty.
        counts = [-(-length // chunk) for length, chunk in zip(shape, chunks, strict=True)]
        size += prod(counts) * prod(chunks) * types[name].itemsize
        size += prod(shape[:-1]) * HASH_BYTES
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in NO_ROOM:  # else it is the file system that cannot tell
                raise


def _chunks(element: Element, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    axis = element.row_axis
    rows = schema.chunk_rows(shape[axis], prod(shape[axis + 1 :]) * dtype.itemsize)
    return (1,) * axis + (rows, *shape[axis + 1 :])


def _write_group(group: h5py.Group, values: Mapping[str, tuple[Any, np.dtype]]) -> None:
    # HDF5 lays the file out by when datasets are closed, and equal content shall be equal bytes:
    # features stay open until the next ones of the group are there.
    last_features: list[h5py.Dataset] = []
    for path, (array, dtype) in values.items():
        element, name = ELEMENTS[path], path.rpartition("/")[2]
        if not element.by_row:
            _fill(_created(group, name, element, array.shape, dtype), element, array)
            continue
        last_features[:] = [_created(group, name, element, array.shape, dtype)]
        hashes = _fill(last_features[0], element, array)
        if hashes.size:
            of_rows = ELEMENTS[path + schema.HASHES]
            dataset = _created(group, name + schema.HASHES, of_rows, hashes.shape, hashes.dtype)
            _fill(dataset, of_rows, hashes)
            del dataset


def _created(
    group: h5py.Group, name: str, element: Element, shape: tuple[int, ...], dtype: np.dtype
) -> h5py.Dataset:
    return group.create_dataset(
        name,
        shape,
        dtype,
        maxshape=tuple(length or None for length in shape),
        chunks=_chunks(element, shape, dtype),
        fletcher32=True,
    )


def _fill(dataset: h5py.Dataset, element: Element, values: Any) -> npt.NDArray[np.uint64]:
    """Write the values, a chunk of rows at a time; returns the hashes of features' rows."""
    axis = element.row_axis
    hashes = np.zeros(dataset.shape[:-1], np.uint64)
    for start in range(0, dataset.shape[axis], step := dataset.chunks[axis]):
        rows = (slice(None),) * axis + (slice(start, start + step),)
        block = values[rows if axis else rows[0]]
        if element.kind is Kind.STRING:
            # Fixed-length UTF-8, which unlike variable-length strings is covered by the checksum.
            encoded = [string.encode() for string in block.ravel()]
            block = np.array(encoded, dataset.dtype).reshape(block.shape)
        dataset[rows] = block
        if element.by_row:
            hashes[rows] = hdf5.row_hashes(block)
    return hashes


def _write_metadata(file: h5py.File, metadata: Metadata) -> None:
    there = {path: file[path] for path in ELEMENTS if path in file}
    sums = {path: hdf5.sha256(one) for path, one in there.items() if not ELEMENTS[path].by_row}
    # The parts of a cache are no content of their own.
    content = hdf5.content_sha256(there.get) if metadata.part is None else None
    text, digest = encode(replace(metadata, datasets_sha256=sums, content_sha256=content))
    values = np.frombuffer(text, np.uint8)
    file.create_dataset(schema.METADATA, data=values, chunks=values.shape, fletcher32=True)
    name = schema.FORMAT if metadata.part is None else schema.PART_FORMAT
    # Fixed-length, because HDF5 keeps strings of variable length where it has no checksum.
    file.attrs["format"] = np.bytes_(name)
    file.attrs["format_version"] = np.int64(metadata.format_version)
    file.attrs[schema.METADATA_SHA256] = np.bytes_(digest)
