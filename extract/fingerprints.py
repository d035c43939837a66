"""By what an image is known again: cheap to look at where it lies, or sure, of its content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.extract.datasets.source import Split

NANOSECONDS = 10**9
UNKNOWN = 0  # no fingerprint; it equals none, not even itself


def stamps(split: Split, provenance: Mapping[str, Any]) -> npt.NDArray[np.uint64]:
    """(N,) hashes of size, times and number of each image's file, UNKNOWN where it cannot be looked
    at or they do not tell.

    Images may exchange their names with equal sizes and times of content, as archives set them;
    the files' numbers and the times of their last change of any kind tell. File systems that keep
    no such times to the nanosecond (FAT) make up the numbers too: there contents are compared.

    Where images have no files of their own, of the source's provenance and the image's id.
    """
    if split.file is None:
        source = json.dumps(provenance, sort_keys=True)
        found = (_hash(f"{source} {name}".encode(errors="surrogatepass")) for name in split.ids)
    else:
        found = (_of_file(split.file(row)) for row in range(len(split.ids)))
    return np.fromiter(found, np.uint64, len(split.ids))


def _of_file(path: Path) -> int:
    try:
        status = path.stat()
    except OSError:
        return UNKNOWN
    if status.st_ctime_ns % NANOSECONDS == 0:
        return UNKNOWN
    told = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    return _hash(" ".join(map(str, told)).encode())


def content(path: Path) -> int:
    """Hash of a file's bytes. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
    return int.from_bytes(digest.digest(), "little") or 1


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
