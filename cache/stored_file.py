"""A cache or a part of one, opened: identified, checked, and its values read with their checks."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from clip_adapter.cache import hdf5, schema
from clip_adapter.cache.metadata import parse, parse_object
from clip_adapter.cache.schema import ELEMENTS, Kind
from clip_adapter.errors import Contradiction, UserError
from clip_adapter.files import is_there
from clip_adapter.words import quoted

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# How others begin that people have features in.
OTHERS = {
    b"\x93NUMPY": "a NumPy array",
    b"PK": "a ZIP archive, as .npz and PyTorch's files are",
    b"\x80": "a pickle",
}
CHECKSUMMED_SUPERBLOCKS = (2, 3)


def other_content(path: Path) -> str | None:
    """What a file is that people may take for a cache, by how it begins."""
    if path.is_dir():
        return None
    with path.open("rb") as file:
        head = file.read(8)
    return next((what for start, what in OTHERS.items() if head.startswith(start)), None)


class StoredFile:
    """A file of format `name` (schema.FORMAT or PART_FORMAT), opened for reading.

    What opening and reading refuse is in FORMAT.md. Raises UserError for it.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path = Path(path)
        if not is_there(self.path):
            made_by = "extract" if name == schema.FORMAT else "extract --shard"
            kind = "feature cache" if name == schema.FORMAT else "part"
            raise UserError(f"There is no {kind} at {path}; `{made_by}` makes one.")
        self._file: h5py.File | None = None
        self._verified: set[str] = set()
        self._hashes: dict[str, npt.NDArray[np.uint64]] = {}
        try:
            with self._reading("its structure is damaged"):
                self._open(name)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> None:
        try:
            with self.path.open("rb") as start:
                head = start.read(9)
            if not h5py.is_hdf5(str(self.path)):
                raise OSError
            # Without a checksum over HDF5's own structures it is nothing of ours, and libhdf5 may
            # loop or crash on a damaged one.
            if head[:8] != SIGNATURE or head[8] not in CHECKSUMMED_SUPERBLOCKS:
                raise self._foreign()
            self._file = hdf5.open_file(self.path)
        except OSError as error:
            if other := other_content(self.path):
                raise UserError(
                    f"{self.path} is {other}, not a feature cache; `extract` makes one, and "
                    "cache/FORMAT.md says how to write one yourself."
                ) from error
            raise UserError(
                f"{self.path} cannot be read as HDF5: it is damaged, truncated or something else; "
                "make it again with `extract`."
            ) from error
        names = ("format_version", "format", schema.METADATA_SHA256)
        stated = {key: hdf5.fixed_attribute(self._file, key) for key in names}
        self._check_identity(stated["format"], stated["format_version"], name)
        self.metadata = parse(self._stored_metadata(stated))
        self._find_datasets(part=name == schema.PART_FORMAT)
        self._check_agreement()

    def _check_identity(self, stored: object, version: object, name: str) -> None:
        if type(version) is int and version != schema.FORMAT_VERSION:
            raise UserError(
                f"{self.path} has format version {version}, this program reads version "
                f"{schema.FORMAT_VERSION}; update clip-adapter or extract again."
            )
        if stored == name and version == schema.FORMAT_VERSION:
            return
        if stored == schema.PART_FORMAT and stored != name:
            raise UserError(
                f"{self.path} is one part of a cache; join the parts with `clip-adapter merge`."
            )
        if name == schema.PART_FORMAT:
            raise UserError(
                f"{self.path} is no part of a cache; name a file that `extract --shard` made, or "
                "choose another name for one."
            )
        raise self._foreign()

    def _foreign(self) -> UserError:
        return UserError(
            f"{self.path} is an HDF5 file but not a CLIP feature cache; `extract` makes one."
        )

    def _find_datasets(self, *, part: bool) -> None:
        """Finds and measures the datasets, by their paths, without reading a value."""
        checked = hdf5.CheckedDatasets(self._file)
        images = checked.has_group("images")
        self.all_splits = tuple(
            split for split in schema.ALL_SPLITS if images and checked.has_group(f"images/{split}")
        )
        self.splits = tuple(split for split in self.all_splits if split != schema.UNLABELLED)
        datasets = {
            path: checked.find(path, element.kind, len(element.axes))
            for path, element in ELEMENTS.items()
        }
        self._datasets = {path: one for path, one in datasets.items() if one is not None}
        shapes = {path: dataset.shape for path, dataset in self._datasets.items()}
        self.lengths = schema.measure(shapes, self.all_splits, part=part)

    def _stored_metadata(self, stated: dict[str, Any]) -> dict[str, Any]:
        dataset = hdf5.CheckedDatasets(self._file).find(schema.METADATA, Kind.BYTES, 1)
        if dataset is None:
            raise Contradiction("it lacks its metadata")
        text = dataset[...].tobytes()
        if hashlib.sha256(text).hexdigest() != stated[schema.METADATA_SHA256]:
            raise Contradiction("its metadata is damaged (its SHA-256 does not match)")
        try:
            document = parse_object(text)
        except Contradiction as reason:
            raise Contradiction(f"its metadata {reason}") from reason
        for key in ("format", "format_version"):
            if document.get(key) != stated[key]:
                raise Contradiction(f"{key} in its metadata is {quoted(document.get(key))}")
        return document

    def _check_agreement(self) -> None:
        """What metadata and datasets say of each other."""
        second = self.metadata.backbone2
        dims = {"D": self.metadata.backbone["embed_dim"], "E": second and second["embed_dim"]}
        for letter, dim in dims.items():
            if self.lengths.get(letter, dim) != dim:
                raise Contradiction(f"its features have {self.lengths[letter]} numbers, not {dim}")
        hashed = {path for path in self._datasets if not ELEMENTS[path].by_row}
        if lacking := sorted(hashed - self.metadata.datasets_sha256.keys()):
            raise Contradiction(f"its metadata has no SHA-256 of {', '.join(lacking)}")

    def _broken(self, reason: object) -> UserError:
        return UserError(f"{self.path} cannot be used: {reason}; make it again with `extract`.")

    def _check_open(self) -> None:
        if self._file is not None and not self._file:
            raise UserError(f"{self.path} has been closed; read from it while it is open.")

    @contextmanager
    def _reading(self, otherwise: str) -> Iterator[None]:
        """Turns what contradicts the format, and what h5py says of damage, into a sentence."""
        self._check_open()
        try:
            yield
        except UserError:
            raise
        except Contradiction as reason:
            raise self._broken(reason) from reason
        except hdf5.DAMAGE as error:
            raise self._broken(otherwise) from error

    @property
    def skipped(self) -> int:
        """Images of the data set that could not be read and are not here."""
        return sum(self.lengths.get(f"S {split}", 0) for split in self.all_splits)

    def has_dataset(self, path: str) -> bool:
        return path in self._datasets

    def shape_of(self, path: str) -> tuple[int, ...]:
        self._check_open()
        return self._datasets[path].shape

    def dtype_of(self, path: str) -> np.dtype:
        return self._datasets[path].dtype

    def hashed_content(self) -> str:
        """Computed over all values."""
        with self._reading("a dataset is damaged (its checksum does not match)"):
            return hdf5.content_sha256(self._datasets.get)

    def values_of(self, path: str, rows: slice = slice(None)) -> np.ndarray:
        """Some consecutive rows of an element, or all, as they are stored; strings as objects."""
        element = ELEMENTS[path]
        if element.kind is Kind.FEATURES:
            index = (slice(None),) * element.row_axis + (rows,)
            return self.features_of(path, index).astype(self.dtype_of(path))
        with self._reading(f"{path} is damaged (its checksum does not match)"):
            self._verify(path)
            values = self._datasets[path][rows]
        if element.kind is not Kind.STRING:
            return values
        try:
            decoded = [value.decode() for value in values.ravel()]
        except UnicodeDecodeError as error:
            raise self._broken(f"{path} is not UTF-8") from error
        return np.array(decoded, object).reshape(values.shape)

    def strings(self, path: str) -> list[Any]:
        """All of a list of strings, or of a table of them."""
        return self.values_of(path).tolist()

    def labels_of(self, path: str, classes: int) -> npt.NDArray[np.int32]:
        """(N,) int32. Raises UserError for a label outside 0 … classes − 1."""
        labels = self.values_of(path)
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise self._broken(f"{path} holds labels outside the {classes} classes")
        return labels

    def features_of(
        self,
        path: str,
        index: tuple[slice | int, ...],
        rows: slice | npt.NDArray[np.int64] = slice(None),
    ) -> npt.NDArray[np.float32]:
        """A piece of image or text features, (…, D) float32, and of that the `rows` along the
        first axis, every one a finite direction."""
        with self._reading(f"{path} is damaged (its checksum does not match)"):
            if not ELEMENTS[path].by_row:
                self._verify(path)
            stored = self._datasets[path][index][rows]
            values = stored.astype(np.float32)
            largest = np.abs(values).max(axis=-1)  # NaN where one is NaN
            if not np.isfinite(largest).all():
                raise Contradiction(f"{path} holds values that are not finite")
            if not largest.all():
                raise Contradiction(f"{path} holds a feature of zeros, which has no direction")
            usual = (largest >= schema.SMALLEST_FEATURE) & (largest <= schema.LARGEST_FEATURE)
            if not usual.all():
                raise Contradiction(f"{path} holds a feature far smaller or larger than CLIP's")
            hashes = self._hashes_of(path)
            if hashes is not None and (hdf5.row_hashes(stored) != hashes[index][rows]).any():
                raise Contradiction(f"{path} holds other features than were written there")
            return values

    def _hashes_of(self, path: str) -> npt.NDArray[np.uint64] | None:
        """(V, N) of the rows of features that are not read whole, where the file has them."""
        name = path + schema.HASHES
        if name not in self._datasets:
            return None
        if name not in self._hashes:
            self._hashes[name] = self.values_of(name)
        return self._hashes[name]

    def verify(self) -> None:
        """Read everything, and compare it with every hash that the file states.

        Raises UserError for what differs.
        """
        for path in self._datasets:
            if not ELEMENTS[path].by_row:
                self.values_of(path, slice(0, 1))
                continue
            for start in range(0, self.shape_of(path)[1], self.row_step(path)):
                self.features_of(path, (slice(None), slice(start, start + self.row_step(path))))
        if self.metadata.content_sha256 not in (None, self.hashed_content()):
            raise self._broken("its content is damaged (content_sha256 does not match)")

    def row_step(self, path: str) -> int:
        """How many rows of (V, N, D) to read at a time."""
        return hdf5.block_rows(self._datasets[path], axis=1)

    def _verify(self, path: str) -> None:
        """Compare a dataset with the SHA-256 in the metadata, once.

        Fletcher32 alone does not see where a whole chunk was overwritten with zeros.
        """
        if path not in self._verified:
            if hdf5.sha256(self._datasets[path]) != self.metadata.datasets_sha256[path]:
                raise Contradiction(f"{path} is damaged (its SHA-256 does not match)")
            self._verified.add(path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
