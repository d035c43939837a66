"""By what an image is known again: cheap to look at where it lies, or sure, of its content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.extract.datasets.source import Split

UNKNOWN = 0  # no fingerprint; it equals none, not even itself


def stamps(split: Split, provenance: Mapping[str, Any]) -> npt.NDArray[np.uint64]:
    """(N,) hashes of size and time of each image's file, UNKNOWN where it cannot be looked at.

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
    return _hash(f"{status.st_size} {status.st_mtime_ns}".encode())


def content(path: Path) -> int:
    """Hash of a file's bytes. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
    return int.from_bytes(digest.digest(), "little") or 1


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
