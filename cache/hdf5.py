"""HDF5 as the format uses it, and nothing else of what HDF5 can do.

A file that somebody sends may hold links into other files, datasets whose bytes lie in other files,
datasets that refer to themselves, filters from plug-ins, and sizes that nothing backs. So a dataset
is used only after it was found to lie in this file, whole, behind a checksum.
"""

import hashlib
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from clip_adapter.cache import schema
from clip_adapter.cache.schema import Kind
from clip_adapter.errors import Contradiction

CHECKSUM_BYTES = 4
# What h5py raises where the bytes of a file contradict each other.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError)


def open_file(path: Path) -> h5py.File:
    return h5py.File(path, "r")


class CheckedDatasets:
    """Finds the datasets of a file and holds them against the file's size, all together.

    Opening one reads no values.
    """

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._file_bytes = Path(file.filename).stat().st_size
        self._bytes_found = 0

    def find(self, path: str, kind: Kind, axes: int) -> h5py.Dataset | None:
        """The dataset at `path`, None where there is none.

        Raises Contradiction for anything but a dataset of this kind and number of axes that is
        stored as the format says.
        """
        stored = self._object(path)
        if stored is None:
            return None
        if not isinstance(stored, h5py.h5d.DatasetID):
            raise Contradiction(f"{path} is not a dataset")
        created = stored.get_create_plist()
        if created.get_layout() != h5py.h5d.CHUNKED or created.get_external_count():
            raise Contradiction(f"{path} is not stored in chunks of this file")
        filters = [created.get_filter(n)[0] for n in range(created.get_nfilters())]
        if filters != [h5py.h5z.FILTER_FLETCHER32]:
            raise Contradiction(f"{path} has other filters than fletcher32")
        if not _is_of_kind(stored.get_type(), kind):
            raise Contradiction(f"{path} has a type that the format does not know")
        dataset = h5py.Dataset(stored)
        if dataset.ndim != axes:
            raise Contradiction(f"{path} has the shape {dataset.shape}")
        self._check_chunks(path, dataset)
        return dataset

    def has_group(self, path: str) -> bool:
        stored = self._object(path)
        if stored is not None and not isinstance(stored, h5py.h5g.GroupID):
            raise Contradiction(f"{path} is not a group")
        return stored is not None

    def _object(self, path: str) -> Any:
        place = h5py.h5g.open(self._file.id, b"/")
        for name in path.encode().split(b"/"):
            if not isinstance(place, h5py.h5g.GroupID) or not place.links.exists(name):
                return None
            if place.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                raise Contradiction(f"{path} is a link to somewhere else")
            place = h5py.h5o.open(place, name)
        return place

    def _check_chunks(self, path: str, dataset: h5py.Dataset) -> None:
        """Every chunk is there, in the file, behind a checksum; a missing one would read as 0."""
        itemsize = dataset.dtype.itemsize
        declared = prod(dataset.shape) * itemsize
        if self._bytes_found + declared > self._file_bytes:
            raise Contradiction(f"{path} of shape {dataset.shape} is larger than the file")
        chunk_bytes = prod(dataset.chunks) * itemsize + CHECKSUM_BYTES
        count = prod(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        most = schema.CHUNKS_AT_LEAST + declared // schema.BYTES_PER_CHUNK
        if chunk_bytes > schema.LARGEST_CHUNK_BYTES or count > most:
            raise Contradiction(f"{path} has chunks of the shape {dataset.chunks}")
        chunks = 0
        offsets = set()

        def check(chunk: h5py.h5d.StoreInfo) -> None:
            nonlocal chunks
            chunks += 1
            end = (chunk.byte_offset or 0) + chunk.size
            if chunk.filter_mask or chunk.size != chunk_bytes or end > self._file_bytes:
                raise Contradiction(f"{path} has a chunk that is cut or without a checksum")
            offsets.add(chunk.chunk_offset)

        dataset.id.chunk_iter(check)
        if not chunks == len(offsets) == count:
            raise Contradiction(f"{path} lacks some of its chunks")
        self._bytes_found += chunks * chunk_bytes
        if self._bytes_found > self._file_bytes:
            raise Contradiction(f"{path} is larger than the file")


def _is_of_kind(stored: h5py.h5t.TypeID, kind: Kind) -> bool:
    if kind == Kind.STRING:
        return (
            isinstance(stored, h5py.h5t.TypeStringID)
            and not stored.is_variable_str()
            and stored.get_cset() == h5py.h5t.CSET_UTF8
            and stored.get_strpad() == h5py.h5t.STR_NULLPAD
        )
    return any(stored.equal(one) for one in _NUMBERS[kind])


_NUMBERS = {
    Kind.FEATURES: (h5py.h5t.IEEE_F32LE, h5py.h5t.IEEE_F16LE),
    Kind.FLOAT32: (h5py.h5t.IEEE_F32LE,),
    Kind.INT32: (h5py.h5t.STD_I32LE,),
    Kind.UINT64: (h5py.h5t.STD_U64LE,),
    Kind.BYTES: (h5py.h5t.STD_U8LE,),
}


def fixed_attribute(file: h5py.File, name: str) -> str | int | None:
    """A root attribute that is one fixed-length string or one integer, None for anything else.

    Variable-length strings lie where no checksum covers them and libhdf5 may loop for ever.
    """
    if not h5py.h5a.exists(file.id, name.encode()):
        return None
    attribute = h5py.h5a.open(file.id, name.encode())
    stored_type = attribute.get_type()
    if attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
        return None
    if isinstance(stored_type, h5py.h5t.TypeIntegerID) and stored_type.get_size() <= 8:
        value: np.ndarray = np.zeros((), np.int64)
    elif isinstance(stored_type, h5py.h5t.TypeStringID) and not stored_type.is_variable_str():
        value = np.zeros((), f"S{stored_type.get_size()}")
    else:
        return None
    attribute.read(value)
    stored: int | bytes = value.item()
    return stored.decode("utf-8", "replace") if isinstance(stored, bytes) else stored


def blocks(dataset: h5py.Dataset) -> Iterator[bytes]:
    """The values' bytes in C order, a bounded piece at a time."""
    outer: tuple[int, ...] = ()
    if dataset.ndim == 3 and prod(dataset.shape[1:]) * dataset.dtype.itemsize > schema.CHUNK_BYTES:
        outer = dataset.shape[:1]  # view by view
    rows, step = dataset.shape[len(outer)], block_rows(dataset, len(outer))
    for index in np.ndindex(outer):
        for start in range(0, rows, step):
            yield dataset[(*index, slice(start, start + step))].tobytes()


def block_rows(dataset: h5py.Dataset, axis: int) -> int:
    """How many rows along `axis` to read at a time: whole chunks, about 1 MiB."""
    row_bytes = prod(dataset.shape[axis + 1 :]) * dataset.dtype.itemsize
    chunk = dataset.chunks[axis]
    return chunk * max(1, schema.CHUNK_BYTES // max(1, row_bytes * chunk))


def row_hashes(values: np.ndarray) -> npt.NDArray[np.uint64]:
    """(…,) of (…, D): the first eight bytes, little-endian, of the SHA-256 over a row's values."""
    rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    digests = b"".join(hashlib.sha256(row.data).digest()[:8] for row in rows)
    return np.frombuffer(digests, "<u8").reshape(values.shape[:-1])


def sha256(dataset: h5py.Dataset) -> str:
    """SHA-256 over the values in C order, strings with their padding."""
    digest = hashlib.sha256()
    for block in blocks(dataset):
        digest.update(block)
    return digest.hexdigest()


def content_sha256(find: Callable[[str], h5py.Dataset | None]) -> str:
    """SHA-256 over the datasets: for each its path, its shape and its values in C order."""
    digest = hashlib.sha256()
    for path in schema.HASHED:
        if (dataset := find(path)) is not None:
            digest.update(f"{path} {dataset.shape}\n".encode())
            for block in blocks(dataset):
                digest.update(block)
    return digest.hexdigest()
