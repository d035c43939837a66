"""Which images are encoded already, and where what belongs to them lies.

An image is known again by its id and its stamp, which is cheap to look at where the image lies, or
by the hash of its content, which is sure.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.content import Content
from clip_adapter.cache.rows import Chosen, Places, Rows, Source, picked
from clip_adapter.cache.schema import ELEMENTS, of_images
from clip_adapter.extract.datasets.source import Split

IMAGES = "images"  # a kind of batches
NANOSECONDS = 10**9
UNKNOWN = 0  # no fingerprint; it equals none, not even itself
NOWHERE, SKIPPED = -1, -2  # in place of the number of a source


def stamps(split: Split, provenance: Mapping[str, Any]) -> npt.NDArray[np.uint64]:
    """(N,) hashes of size, times and number of each image's file, UNKNOWN where it cannot be looked
    at or they do not tell.

    Images may exchange their names with equal sizes and times of content, as archives set them;
    the files' numbers and the times of their last change of any kind tell. File systems that keep
    no such times to the nanosecond (FAT) make up the numbers too: there contents are compared.

    Where images have no files of their own, of what the source says of each, or else of its
    provenance and the image's id.
    """
    if split.stamp is not None:
        hashes = (
            _hash(split.stamp(row).encode(errors="surrogatepass")) for row in range(len(split.ids))
        )
    elif split.file is None:
        source = json.dumps(provenance, sort_keys=True)
        hashes = (_hash(f"{source} {name}".encode(errors="surrogatepass")) for name in split.ids)
    else:
        hashes = (_of_file(split.file(row)) for row in range(len(split.ids)))
    return np.fromiter(hashes, np.uint64, len(split.ids))


def _of_file(path: Path) -> int:
    try:
        status = path.stat()
    except OSError:
        return UNKNOWN
    if status.st_ctime_ns % NANOSECONDS == 0:
        return UNKNOWN
    described = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    return _hash(" ".join(map(str, described)).encode())


def content(path: Path) -> int:
    """Hash of a file's bytes. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
    return int.from_bytes(digest.digest(), "little") or 1


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def content_or_unknown(path: Path) -> int:
    """UNKNOWN where it is no readable file."""
    try:
        return content(path)
    except OSError:
        return UNKNOWN


class KnownRows:
    """Where what belongs to each image of a split lies: in which of the sources, in which row.

    wanted: what each image gets; where it lies there may be more, and more views.
    bounds: the rows that count.
    """

    def __init__(
        self, split: Split, stamps: npt.NDArray[np.uint64], wanted: Rows, bounds: range
    ) -> None:
        self.split, self.stamps, self.wanted, self.bounds = split, stamps, wanted, bounds
        self.source = np.full(len(split.ids), NOWHERE, np.int32)
        self.row = np.zeros(len(split.ids), np.int64)

    def where(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """The rows that count of those chosen from all (N,)."""
        return self.bounds.start + np.flatnonzero(chosen[self.bounds.start : self.bounds.stop])

    @property
    def missing(self) -> npt.NDArray[np.int64]:
        """The rows that have to be encoded."""
        return self.where(self.source == NOWHERE)

    @property
    def skipped(self) -> npt.NDArray[np.int64]:
        """The rows that cannot be read."""
        return self.where(self.source == SKIPPED)

    def put(self, rows: npt.NDArray[np.int64], source: int) -> None:
        """These rows of the split are those of a source, in this order."""
        self.source[rows] = source
        self.row[rows] = np.arange(len(rows))

    def skip(self, rows: npt.NDArray[np.int64]) -> None:
        """These rows of the split cannot be read."""
        self.source[rows] = SKIPPED

    def fit(self, rows: Rows) -> bool:
        """Whether rows that have this have what is wanted."""
        for name, (dtype, row) in self.wanted.items():
            other_dtype, other = rows.get(name, (None, ()))
            if other_dtype != dtype or other[1:] != row[1:] or other[:1] < row[:1]:
                return False
        return "stamps" in rows

    def content(self, sources: Sequence[Source]) -> Content:
        """What a cache holds of the split, by the names of elements."""
        kept, skipped = self.where(self.source >= 0), self.skipped
        places = Places(sources, self.source[kept], self.row[kept])
        return {
            **picked(places, self.wanted),
            "labels": self.split.labels[kept],
            "ids": Chosen(self.split.ids, kept),
            "stamps": self.stamps[kept],
            **({"groups": Chosen(self.split.groups, kept)} if self.split.groups else {}),
            "skipped": Chosen(self.split.ids, skipped),
            "skipped_labels": self.split.labels[skipped],
            "skipped_stamps": self.stamps[skipped],
        }


class Known:
    """What is known of the images of a data set, by split. sources: where it lies, by number.
    kind: of the batches that hold it."""

    def __init__(self, splits: Mapping[str, KnownRows], kind: str = IMAGES) -> None:
        self.splits, self.kind = splits, kind
        self.sources: list[Source] = []
        self._doubtful: list[tuple[KnownRows, int, tuple[int, int, int]]] = []

    @cached_property
    def _rows_named(self) -> Mapping[str, list[tuple[KnownRows, int]]]:
        """The rows of an id; a table may name an image several times."""
        named = defaultdict(list)
        for known in self.splits.values():
            for row in known.bounds:
                named[known.split.ids[row]].append((known, row))
        return named

    @property
    def count(self) -> int:
        """Images that need not be encoded, those among them that are skipped included."""
        return sum(len(known.bounds) - len(known.missing) for known in self.splits.values())

    @property
    def skipped(self) -> int:
        return sum(len(known.skipped) for known in self.splits.values())

    def without_skipped_of(self, other: "Known") -> None:
        """Skip what one of the two cannot read in the other as well."""
        for one, same in zip(self.splits.values(), other.splits.values(), strict=True):
            one.skip(same.skipped)
            same.skip(one.skipped)

    def content(self) -> Content:
        """What a cache holds of the images, in the order of the data set, if nothing is missing."""
        content: dict[str, Any] = {}
        for split, known in self.splits.items():
            values = known.content(self.sources) if known.bounds else {}
            of_split = {of_images(split, name): value for name, value in values.items()}
            content |= {path: value for path, value in of_split.items() if path in ELEMENTS}
        return content

    def add(self, source: Source) -> int:
        self.sources.append(source)
        return len(self.sources) - 1

    def look_in(self, source: Source, ids: Sequence[str]) -> None:
        """Find images among the rows of a source, which have these ids; see `settle`."""
        fitting = [known for known in self.splits.values() if known.fit(source.rows)]
        if not fitting:
            return
        number = self.add(source)
        stamps, contents = (source.read(name, 0, len(ids)) for name in ("stamps", "contents"))
        for place, name in enumerate(ids):
            for known, row in self._rows_named.get(name, ()):
                if known not in fitting or known.source[row] != NOWHERE:
                    continue
                if stamps[place] == known.stamps[row] != UNKNOWN:
                    known.source[row], known.row[row] = number, place
                elif known.split.file is not None and contents[place] != UNKNOWN:
                    self._doubtful.append((known, row, (number, place, int(contents[place]))))

    def skip(
        self, ids: Sequence[str], stamps: npt.NDArray[np.uint64], *, even_unknown: bool = False
    ) -> None:
        """These images could not be read, and cannot if their files are the same.

        even_unknown: take it for the same where nothing tells.
        """
        for name, stamp in zip(ids, stamps, strict=True):
            for known, row in self._rows_named.get(name, ()):
                same = stamp == known.stamps[row] and (even_unknown or stamp != UNKNOWN)
                if same and known.source[row] == NOWHERE:
                    known.skip(np.array([row]))

    def settle(self, workers: int) -> None:
        """Compare contents where stamps differ, in so many threads."""
        with ThreadPoolExecutor(workers, thread_name_prefix="compare") as pool:
            files = (known.split.file(row) for known, row, _ in self._doubtful if known.split.file)
            contents = pool.map(content_or_unknown, files)
            for (known, row, place), now in zip(self._doubtful, contents, strict=True):
                if known.source[row] == NOWHERE and now == place[2]:
                    known.source[row], known.row[row] = place[:2]
        self._doubtful.clear()


def rows_sha256(splits: Mapping[str, Split]) -> str:
    """SHA-256 over the ids, labels and groups of every split, in order."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(json.dumps([name, *split.ids]).encode())
        digest.update(np.ascontiguousarray(split.labels, np.int32).tobytes())
        if split.groups:
            digest.update(json.dumps([*split.groups]).encode())
    return digest.hexdigest()
