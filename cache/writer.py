"""Write a feature cache: staged while it grows, assembled and renamed when it is whole."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from clip_adapter.cache import atomic, layout
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.staging import StagedRows
from clip_adapter.cache.workplace import Workplace

DIGESTS = "digests"
SKIPPED = "skipped"
SKIPPED_LABELS = "skipped_labels"
STAMPS = "stamps"
CONTENTS = "contents"
SKIPPED_STAMPS = "skipped_stamps"
HASHES = (DIGESTS, STAMPS, CONTENTS)  # one per row
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Part:
    """Which part of a cache a file holds.

    index: from 1 to `of`; the first one has the text features. rows: for each split of the data
    set the first row of the part, the row behind its last, and how many rows the split has.
    """

    index: int
    of: int
    rows: Mapping[str, tuple[int, int, int]]


class CacheWriter:
    """Collects features batch by batch beside a path and puts the finished file there.

    Everything is staged in the folder `<path>.partial`. `finish` assembles the HDF5 file in that
    folder and renames it, so that the path either does not exist or is complete. A writer opened
    with the same `arguments` after an interruption goes on behind the last whole batch.

    place: the path, or the workplace taken beside it, which the writer closes.
    arguments: JSON-able description of what is written; two runs with equal arguments write the
        same cache.
    stated: those that an interrupted run must agree on, by default all; may_differ: but not these.
    staging: sub-folder in which the rows are staged, so that others may lie beside them; all go in
        the end.
    Raises UserError where the folder cannot be written, another process is writing the same file,
    or an interrupted run with other arguments lies there (unless `restart`).
    """

    def __init__(
        self,
        place: Path | Workplace,
        arguments: dict[str, Any],
        *,
        views: int,
        restart: bool = False,
        stated: dict[str, Any] | None = None,
        may_differ: Collection[str] = (),
        staging: str = "",
    ) -> None:
        self._place = Workplace(place) if isinstance(place, Path) else place
        self.path = self._place.path
        self.arguments = arguments
        self._views = views
        self._restart = restart
        self._folder = self._place.folder / staging
        self._staged: dict[str, StagedRows] = {}
        try:
            with self._writing():
                if restart:
                    self._place.empty()
                stated = arguments if stated is None else stated
                self._place.refuse_other(stated, may_differ=may_differ)
                self._place.state(stated)
                self._folder.mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    @property
    def staging(self) -> Path:
        """The folder in which the rows are staged."""
        return self._folder

    def consumed(self, split: str) -> int:
        """Source images of a split that are dealt with already, skipped ones included."""
        if not self._has(split):
            return 0
        records = self._reopened(split).records()
        return sum(len(record["ids"]) + len(record[SKIPPED]) for record in records)

    def append_images(
        self,
        split: str,
        features: np.ndarray,
        labels: npt.ArrayLike,
        ids: Sequence[str],
        skipped: Sequence[str] = (),
        digests: npt.NDArray[np.uint64] | None = None,
        skipped_labels: npt.ArrayLike = (),
        stamps: npt.NDArray[np.uint64] | None = None,
        contents: npt.NDArray[np.uint64] | None = None,
        skipped_stamps: npt.NDArray[np.uint64] | None = None,
    ) -> None:
        """Add a batch of images to a split.

        features: (B, V, D) float32 or float16, un-normalised; V is `views` for train, else 1.
        labels: (B,) integers. ids: B strings. skipped: ids of images that could not be read.
        digests: (B,) hashes of the images' pixels, for all batches of a split or for none.
        skipped_labels: those of `skipped`, for all batches of a split or for none.
        stamps, contents: (B,) hashes by which the images are known again (FORMAT.md), and
        skipped_stamps those of `skipped`; for all batches of a split or for none.
        Raises UserError for features that are not finite and ids that the file cannot hold, before
        anything of the batch is staged, and where the disk is full.
        """
        views = self._views if split == "train" else 1
        if features.shape[:2] != (len(ids), views) or np.shape(labels) != (len(ids),):
            raise ValueError(f"{features.shape} features of {len(ids)} images, {views} views")
        _check_strings([*ids, *skipped])
        _check_features(features, ids)
        record = {
            "labels": np.asarray(labels, np.int32).tolist(),
            "ids": list(ids),
            SKIPPED: list(skipped),
            SKIPPED_LABELS: np.asarray(skipped_labels, np.int32).tolist(),
        }
        hashes = {
            DIGESTS: digests,
            STAMPS: stamps,
            CONTENTS: contents,
            SKIPPED_STAMPS: skipped_stamps,
        }
        record |= {name: found.tolist() for name, found in hashes.items() if found is not None}
        with self._writing():
            self._stage(split, features).append(features, record)

    def append_text(
        self,
        features: np.ndarray,
        class_names: Sequence[str],
        prompts: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Add the text features of some classes, (B, P, D), un-normalised.

        prompts: (B, P) what was encoded, "" for rows that fill up a class with fewer prompts than
            others (FORMAT.md says with what); for all classes or for none.
        Raises UserError as `append_images` does.
        """
        if len(features) != len(class_names):
            raise ValueError(f"text features of {len(features)} for {len(class_names)} classes")
        _check_strings(class_names)
        _check_features(features, class_names)
        record: dict[str, Any] = {"class_names": list(class_names)}
        if prompts is not None:
            for row in prompts:
                _check_strings(row)
            record["prompts"] = [list(row) for row in prompts]
        with self._writing():
            self._stage(layout.TEXT, features).append(features, record)

    def text_rows(self) -> int:
        """Classes whose text features are staged already."""
        return self._reopened(layout.TEXT).rows if self._has(layout.TEXT) else 0

    def listed(self, split: str, key: str) -> Iterator[Any]:
        """What is noted of a split's images so far, in order.

        key: labels, ids, digests; skipped, skipped_labels of those that are not there.
        """
        if not self._has(split):
            return iter(())
        return (
            value for record in self._reopened(split).records() for value in record.get(key, ())
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of the disk into a sentence."""
        try:
            yield
        # HDF5 raises RuntimeError where it fails to write on closing.
        except (OSError, RuntimeError) as error:
            number = getattr(error, "errno", None)
            reason = os.strerror(number) if number else " ".join(str(error).split())[:200]
            kept = "what is encoded is kept beside it, and the same command goes on from there"
            advice = "mend that and start again" if self._restart else kept
            raise UserError(f"Cannot write {self.path}: {reason}; {advice}.") from error

    def _has(self, name: str) -> bool:
        return name in self._staged or (self._folder / f"{name}.shape").exists()

    def _stage(self, name: str, features: np.ndarray) -> StagedRows:
        if not self._has(name):
            _, inner, dim = features.shape
            shape = {"inner": inner, "dim": dim, "dtype": features.dtype.name}
            atomic.write_text(self._folder / f"{name}.shape", json.dumps(shape))
        return self._reopened(name)

    def _reopened(self, name: str) -> StagedRows:
        if name not in self._staged:
            folder = self._folder.relative_to(self._place.folder)
            shape = self._place.read(str(folder / f"{name}.shape"))
            try:
                inner, dim, dtype = shape["inner"], shape["dim"], np.dtype(shape["dtype"])
                self._staged[name] = StagedRows(self._folder, name, inner, dim, dtype)
            except (KeyError, TypeError, ValueError) as error:
                raise self._place.damaged(f"{name}.*") from error
        return self._staged[name]

    def finish(
        self,
        *,
        templates: Sequence[str],
        backbone: dict[str, Any],
        preprocess: dict[str, Any],
        dataset: dict[str, Any],
        logit_scale: float,
        logit_bias: float,
        part: Part | None = None,
    ) -> None:
        """Assemble the HDF5 file, give it its final name and remove the staging folder.

        part: make a part of a cache, for `merge_parts`. It may hold no image of a split.
        Raises UserError for a split without a readable image, templates that the file cannot hold,
        and a full disk.
        """
        _check_strings(templates)
        if self._has(layout.TEXT) and self._reopened(layout.TEXT).inner != len(templates):
            raise ValueError(f"{len(templates)} templates, others than those of the text features")
        for split in layout.SPLITS:
            if part is None and self._has(split) and not self._reopened(split).rows:
                raise UserError(f"The {split} split has no image that could be read.")
        attributes = {
            "format": layout.FORMAT if part is None else layout.PART_FORMAT,
            "format_version": layout.FORMAT_VERSION,
            "complete": True,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "writer": f"clip-adapter {version('clip-adapter')}",
            "backbone": json.dumps(backbone),
            "preprocess": json.dumps(preprocess),
            "dataset": json.dumps(dataset),
            "logit_scale": float(logit_scale),
            "logit_bias": float(logit_bias),
            "arguments": json.dumps(self.arguments, sort_keys=True),
        }
        if part is not None:
            attributes |= {"part": json.dumps(asdict(part)), "templates": json.dumps([*templates])}
        with self._writing():
            self._assemble(attributes, templates, part is None)
            # Before the lock goes, so that nobody starts in there.
            shutil.rmtree(self._place.folder)
        self.close()

    def _reserve(self, path: Path) -> None:
        """Have the disk say now whether the file fits: where a write fails, HDF5 may crash."""
        size = layout.CHUNK_BYTES  # for what describes the rest
        for name in (*layout.SPLITS, layout.TEXT):
            if self._has(name):
                staged = self._reopened(name)
                chunk = layout.chunk_rows(staged.rows, staged.dim * staged.dtype.itemsize)
                rows = -(-staged.rows // chunk) * chunk
                size += staged.inner * rows * staged.dim * staged.dtype.itemsize
                size += 2 * (self._folder / f"{name}.journal").stat().st_size
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in NO_ROOM:  # else it is the file system that cannot tell
                    raise

    def _assemble(self, attributes: dict[str, Any], templates: Sequence[str], whole: bool) -> None:
        assembled = self._place.folder / "assembled.h5"
        self._reserve(assembled)
        # HDF5 1.10's file format, unlike the default of h5py, puts checksums on the metadata too:
        # one wrong byte there can turn a chunk into zeros or HDF5 into an endless loop.
        with h5py.File(assembled, "w", libver=("v110", "v110")) as file:
            for split in layout.SPLITS:
                if self._has(split):
                    self._assemble_split(file, split)
            if self._has(layout.TEXT):
                self._assemble_text(file, templates)
            file.attrs.update(attributes)
            if whole:
                file.attrs["content_sha256"] = layout.content_sha256(file)
        with assembled.open("rb") as finished:
            os.fsync(finished.fileno())
        assembled.replace(self.path)

    def _assemble_split(self, file: h5py.File, split: str) -> None:
        staged = self._reopened(split)
        group = file.create_group(f"images/{split}")
        rows = layout.chunk_rows(staged.rows, staged.dim * staged.dtype.itemsize)
        features = group.create_dataset(
            "features",
            (staged.inner, staged.rows, staged.dim),
            staged.dtype,
            maxshape=(staged.inner, staged.rows or None, staged.dim),
            chunks=(1, rows, staged.dim),
            fletcher32=True,
        )
        for start in range(0, staged.rows, rows):
            stop = min(start + rows, staged.rows)
            features[:, start:stop] = staged.read(start, stop).transpose(1, 0, 2)
        labels = self.listed(split, "labels")
        _write_list(group, "labels", labels, staged.rows, np.dtype(np.int32))
        _write_strings(group, "ids", lambda: self.listed(split, "ids"))
        for name in HASHES:
            if any(True for _ in self.listed(split, name)):
                values = self.listed(split, name)
                _write_list(group, name, values, staged.rows, np.dtype(np.uint64))
        if any(True for _ in self.listed(split, SKIPPED)):
            _write_strings(group, SKIPPED, lambda: self.listed(split, SKIPPED))
        if labels_of_skipped := list(self.listed(split, SKIPPED_LABELS)):
            count = len(labels_of_skipped)
            _write_list(group, SKIPPED_LABELS, labels_of_skipped, count, np.dtype(np.int32))
        if stamps_of_skipped := list(self.listed(split, SKIPPED_STAMPS)):
            count = len(stamps_of_skipped)
            _write_list(group, SKIPPED_STAMPS, stamps_of_skipped, count, np.dtype(np.uint64))

    def _assemble_text(self, file: h5py.File, templates: Sequence[str]) -> None:
        staged = self._reopened(layout.TEXT)
        group = file.create_group(layout.TEXT)
        group.create_dataset(
            "features", data=staged.read(0, staged.rows), fletcher32=True, chunks=True
        )
        names = [name for record in staged.records() for name in record["class_names"]]
        _write_strings(group, "class_names", lambda: names)
        _write_strings(group, "templates", lambda: templates)
        prompts = [row for record in staged.records() for row in record.get("prompts", ())]
        if prompts:
            _write_table(group, "prompts", prompts)

    def close(self) -> None:
        """Let go of the files; what is staged stays for the next run."""
        for staged in self._staged.values():
            staged.close()
        self._staged.clear()
        self._place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_strings(strings: Iterable[str]) -> None:
    """Raises UserError for strings that a fixed-length UTF-8 field would not give back."""
    for string in strings:
        if "\0" in string or any("\ud800" <= character <= "\udfff" for character in string):
            raise UserError(
                f"{string!r} cannot be stored: it holds a NUL or is not valid Unicode; rename it."
            )


def _check_features(features: np.ndarray, names: Sequence[str]) -> None:
    if features.dtype not in (np.float32, np.float16):
        raise ValueError(f"features are {features.dtype}, not float32 or float16")
    finite = np.isfinite(features).all(axis=(1, 2))
    if not finite.all():
        raise UserError(
            f"The features of {names[int(finite.argmin())]!r} are not finite numbers; "
            "the weights are damaged or overflow in this precision."
        )


def _write_strings(group: h5py.Group, name: str, strings: Callable[[], Iterable[str]]) -> None:
    """Fixed-length UTF-8, which unlike variable-length strings is covered by the checksum.

    strings: called twice, to find the length and to write, so that they need not be in memory.
    """
    count, length = 0, 1
    for string in strings():
        count, length = count + 1, max(length, len(string.encode()))
    encoded = (string.encode() for string in strings())
    _write_list(group, name, encoded, count, h5py.string_dtype("utf-8", length))


def _write_table(group: h5py.Group, name: str, rows: Sequence[Sequence[str]]) -> None:
    """Strings in two dimensions."""
    encoded = [[string.encode() for string in row] for row in rows]
    length = max(1, max(len(string) for row in encoded for string in row))
    values = np.array(encoded, h5py.string_dtype("utf-8", length))
    group.create_dataset(name, data=values, fletcher32=True, chunks=True)


def _write_list(
    group: h5py.Group, name: str, values: Iterable[Any], count: int, dtype: np.dtype
) -> None:
    """A one-dimensional dataset, written a chunk at a time."""
    rows = layout.chunk_rows(count, dtype.itemsize)
    dataset = group.create_dataset(
        name, (count,), dtype, maxshape=(count or None,), chunks=(rows,), fletcher32=True
    )
    remaining = iter(values)
    for start in range(0, count, rows):
        dataset[start : start + rows] = np.array(list(islice(remaining, rows)), dtype)
