"""Files of format version 1, read where they can do no harm.

Their attributes are variable-length strings in HDF5's global heap, which no checksum covers: one
damaged sector there sends libhdf5 into an endless loop that not even Ctrl-C ends. (And where
another program wrote the file in HDF5's older format, nothing else but the values has one either.)
So a child process reads all of the file first, with limits on time and memory.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clip_adapter.cache import hdf5, schema
from clip_adapter.cache.metadata import parse, parse_object
from clip_adapter.errors import Contradiction

JSON_ATTRIBUTES = ("backbone", "preprocess", "dataset", "arguments")
ATTRIBUTES = (
    *("format", "format_version", "complete", "created_at", "writer", "logit_scale", "logit_bias"),
    *("content_sha256", *JSON_ATTRIBUTES),
)
# Far more than any machine needs: a second to start, and 1 GB in 50 s.
SECONDS = 20
BYTES_PER_SECOND = 20_000_000
MEMORY = 2 << 30
DAMAGED = "its structure is damaged"


def read_metadata(path: Path) -> dict[str, Any]:
    """The attributes of a file of version 1 or of another program, as one JSON object.

    Of a cache of version 1 all values were read and compared with its content hash.
    Raises Contradiction for a damaged one.
    """
    limit = SECONDS + path.stat().st_size / BYTES_PER_SECOND
    # -P: what lies in the current folder is not imported.
    command = [sys.executable, "-P", "-m", "clip_adapter.cache.version_1", str(path)]
    try:
        finished = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit
        )
        answer = json.loads(finished.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise Contradiction(DAMAGED) from error
    if "contradiction" in answer:
        raise Contradiction(answer["contradiction"])
    return answer["attributes"]


def _attributes(file: h5py.File) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ATTRIBUTES:
        value = file.attrs.get(name)
        if isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, str | int | float | bool):
            continue
        if name in JSON_ATTRIBUTES:
            try:
                value = parse_object(str(value))
            except Contradiction as reason:
                raise Contradiction(f"attribute {name} {reason}") from reason
        found[name] = value
    return found


def _examine(path: Path) -> dict[str, Any]:
    from clip_adapter.cache.structure import Structure

    with hdf5.open_file(path) as file:
        version = hdf5.fixed_attribute(file, "format_version")
        if version != 1 or file.attrs.get("format") != schema.FORMAT:
            return {"format": str(file.attrs.get("format")), "format_version": version}
        found = _attributes(file)
        parse(found)
        structure = Structure(file, schema.FORMAT, version=1)
        content = hdf5.content_sha256(structure.datasets.get)
        if found.get("content_sha256", content) != content:
            raise Contradiction("its values are not those that its content_sha256 was made of")
        return found


def _main(path: Path) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])  # what the libraries map already
    size = pages * resource.getpagesize() + MEMORY + path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, Any]
    try:
        answer = {"attributes": _examine(path)}
    except Contradiction as reason:
        answer = {"contradiction": str(reason)}
    except hdf5.DAMAGE:
        answer = {"contradiction": DAMAGED}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
