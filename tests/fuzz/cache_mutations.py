"""Ways to damage a feature cache, or a part of one, each drawn from a seeded generator.

`mutate_cache(rng, path)` changes the file at `path` and says how. The bytes' checksums are left as
they are by some (a disk, a network) and made to agree again by others (somebody who means it).
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.cache.rewriting import put, rewrite, store_metadata

Mutation = Callable[[random.Random, Path], str]
DATASETS = (
    *(f"images/{s}/{n}" for s in ("train", "test") for n in ("features", "labels", "ids")),
    *("images/unlabelled/features", "images/unlabelled/ids", "images/train/skipped"),
    *("text/features", "text/class_names", "text/templates"),
)
ODD_TEXTS = ("", "\0", "\x1b[2J\n", "=1+1", "x" * 100_000, "ü‮🙂", "../..", "-1", "{}", "\ud800")
ODD_NUMBERS = (0, -1, 1, 2, 2**31, 2**63, 10**30, -(10**12), 1e-320, 1e39, 0.5, 10**10)
ODD_VALUES: tuple[Any, ...] = (*ODD_TEXTS, *ODD_NUMBERS, None, True, False, [], {}, [[]], {"a": 1})
ODD_TYPES = (">f4", "<f8", "<i8", "<u1", "S3", "<c8", "?", "<f2", "<i4", "<i2", "V5")


def flip_bytes(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 1, 2, 10, 200)))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits flipped at {places[:5]}"


def zero_sectors(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    size = rng.choice((8, 64, 512, 4096))
    start = rng.randrange(len(data)) // size * size
    length = min(size * rng.choice((1, 1, 2, 8)), len(data) - start)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)
    return f"{length} bytes from {start} zeroed"


def copy_bytes(rng: random.Random, path: Path) -> str:
    """A misdirected write: some bytes of the file in another place of it."""
    data = bytearray(path.read_bytes())
    length = rng.choice((4, 24, 512))
    source, target = (rng.randrange(max(1, len(data) - length)) for _ in range(2))
    data[target : target + length] = data[source : source + length]
    path.write_bytes(data)
    return f"{length} bytes copied from {source} to {target}"


def truncate(rng: random.Random, path: Path) -> str:
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"truncated to {size}"


def append(rng: random.Random, path: Path) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 512, 5000))))
    return "bytes appended"


def replace_file(rng: random.Random, path: Path) -> str:
    kind = rng.choice(("pipe", "folder", "text", "link to itself", "nothing", "HDF5", "device"))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text(rng.choice(ODD_TEXTS).replace("\ud800", ""))
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "HDF5":
        with h5py.File(path, "w", libver=rng.choice(("earliest", "latest"))) as file:
            file["data"] = np.arange(3)
    return f"replaced by: {kind}"


def change_attribute(rng: random.Random, path: Path) -> str:
    name = rng.choice(("format", "format_version", "metadata_sha256"))
    values = (
        1,
        2,
        3,
        0,
        -1,
        2**62,
        np.uint64(2**64 - 1),
        2.0,
        True,
        "clip-feature-cache",
        "2",
        [2],
    )
    value: Any = rng.choice((*values, np.bytes_("x" * 70), np.array([b"clip-feature-cache"] * 2)))
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        if rng.random() < 0.2:
            del file.attrs[name]
        elif rng.random() < 0.1:
            file.attrs.create(name, h5py.Empty("S5"))
        else:
            file.attrs[name] = value
    return f"attribute {name} of {value!r}"


def change_metadata(rng: random.Random, path: Path) -> str:
    """Another value, or none, somewhere in the JSON."""
    told = ""

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        nonlocal told
        room, names = document, []
        while True:
            names.append(rng.choice(sorted(room)))
            found = room[names[-1]]
            if not isinstance(found, dict) or not found or rng.random() < 0.3:
                break
            room = found
        if rng.random() < 0.25:
            del room[names[-1]]
            told = f"{'.'.join(names)} gone"
        else:
            room[names[-1]] = rng.choice(ODD_VALUES)
            told = f"{'.'.join(names)} is {str(room[names[-1]])[:30]!r}"

    rewrite(path, change)
    return told.encode("unicode_escape").decode()


def replace_metadata(rng: random.Random, path: Path) -> str:
    depth = rng.choice((1, 1000, 200_000))
    text = rng.choice(
        (b"", b"[]", b"{}", b"[" * depth, b'{"a":' * depth, b"\xff", b"null", b"9" * 5000, b"NaN")
    )
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        if rng.random() < 0.3:
            text = file["metadata"][...].tobytes()[:-1]
        store_metadata(file, text or b" ")
    return f"metadata {text[:20]!r}, {len(text)} bytes"


def change_values(rng: random.Random, path: Path) -> str:
    name = rng.choice(DATASETS)
    odd: Any = None

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        nonlocal odd
        if name not in file:
            return
        values = file[name][...]
        place = tuple(rng.randrange(n) for n in values.shape)
        if values.dtype.kind == "S":
            odd = rng.choice((b"", b"\xff\xfe", b"\x1b[2J", b"\n", b"=1"))
        elif values.dtype.kind == "i":
            odd = rng.choice((-1, 3, 2**31 - 1, -(2**31), 0))
        else:
            odd = rng.choice((np.nan, np.inf, -np.inf, 0, 1e30))
            place = place[:2] if odd == 0 else place
        with np.errstate(over="ignore"):
            values[place] = odd
        file[name][...] = values

    rewrite(path, change)
    return f"{odd!r} in {name}"


def change_structure(rng: random.Random, path: Path) -> str:
    name = rng.choice((*DATASETS, "metadata"))
    how, apply = rng.choice(tuple(STRUCTURES.items()))

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        if name in file and (name != "metadata" or how in LINKS):
            apply(rng, file, name)

    if name == "metadata" or how == "raw chunk":  # reading a cut chunk crashes libhdf5
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            change(file, {})
    else:
        rewrite(path, change)
    return f"{name}: {how}"


def _gone(rng: random.Random, file: h5py.File, name: str) -> None:
    del file[rng.choice((name, name.rpartition("/")[0] or name))]


def _group(rng: random.Random, file: h5py.File, name: str) -> None:
    del file[name]
    file.create_group(name)


def _soft_link(rng: random.Random, file: h5py.File, name: str) -> None:
    del file[name]
    file[name] = h5py.SoftLink(rng.choice((f"/{name}", "/", "/text/features", "/nowhere")))


def _external_link(rng: random.Random, file: h5py.File, name: str) -> None:
    del file[name]
    target = rng.choice((Path(file.filename).name, "/etc/passwd", "nowhere.h5", "/dev/zero"))
    file[name] = h5py.ExternalLink(target, f"/{name}")


def _hard_link(rng: random.Random, file: h5py.File, name: str) -> None:
    other = rng.choice([one for one in DATASETS if one in file and one != name])
    target = file[rng.choice((other, "/", "images"))]
    del file[name]
    file[name] = target


def _virtual(rng: random.Random, file: h5py.File, name: str) -> None:
    old = file[name]
    layout = h5py.VirtualLayout(old.shape, old.dtype)
    layout[...] = h5py.VirtualSource(rng.choice((".", "nowhere.h5")), name, old.shape, old.dtype)
    del file[name]
    file.create_virtual_dataset(name, layout)


def _external_storage(rng: random.Random, file: h5py.File, name: str) -> None:
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    stored = [(rng.choice(("/etc/passwd", "/dev/zero", "nowhere")), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset(name, shape, kind, external=stored)


def _huge(rng: random.Random, file: h5py.File, name: str) -> None:
    old = file[name]
    shape, kind = list(old.shape), old.dtype
    axis = rng.randrange(len(shape))
    shape[axis] = rng.choice((10**6, 10**9, 10**12))
    chunks = tuple(min(n, rng.choice((1, 7, 1000))) for n in shape)
    del file[name]
    file.create_dataset(name, shape, kind, chunks=chunks, fletcher32=True)


def _unwritten(rng: random.Random, file: h5py.File, name: str) -> None:
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape, kind, chunks=shape, fletcher32=True)


def _other_shape(rng: random.Random, file: h5py.File, name: str) -> None:
    values = file[name][...]
    shape = list(values.shape)
    axis = rng.randrange(len(shape))
    shape[axis] = rng.choice((0, 1, 2, shape[axis] + 1, max(1, shape[axis] - 1)))
    if rng.random() < 0.2:
        shape = [*shape, 1]
    put(file, name, np.resize(values, shape) if 0 not in shape else np.zeros(shape, values.dtype))


def _other_type(rng: random.Random, file: h5py.File, name: str) -> None:
    shape = file[name].shape
    kinds = (*map(np.dtype, ODD_TYPES), h5py.string_dtype("ascii", 4), h5py.enum_dtype({"A": 0}))
    put(file, name, np.ones(shape, np.int8).astype(rng.choice(kinds)))


def _variable_length(rng: random.Random, file: h5py.File, name: str) -> None:
    shape = file[name].shape
    kind = rng.choice((h5py.string_dtype(), h5py.vlen_dtype(np.int32), h5py.ref_dtype))
    del file[name]
    file.create_dataset(name, shape, kind, chunks=tuple(shape))


def _other_filters(rng: random.Random, file: h5py.File, name: str) -> None:
    values = file[name][...]
    choices: tuple[dict[str, Any], ...] = (
        {"compression": "gzip"},
        {"shuffle": True},
        {"fletcher32": False},
        {"chunks": None, "fletcher32": False},
        {"compression": "lzf", "fletcher32": False},
    )
    put(file, name, values.astype(file[name].dtype), **rng.choice(choices))


def _other_chunks(rng: random.Random, file: h5py.File, name: str) -> None:
    """Which no reader may mind."""
    values = file[name][...].astype(file[name].dtype)
    put(file, name, values, chunks=tuple(rng.randint(1, n) for n in values.shape))


def _raw_chunk(rng: random.Random, file: h5py.File, name: str) -> None:
    dataset = file[name]
    _, raw = dataset.id.read_direct_chunk((0,) * dataset.ndim)
    cut = bytes(raw)[: rng.choice((0, 1, len(raw) - 4, len(raw) - 1, len(raw)))] or b"\0"
    dataset.id.write_direct_chunk((0,) * dataset.ndim, cut, filter_mask=rng.choice((0, 1, 2**31)))


LINKS: dict[str, Callable[[random.Random, h5py.File, str], None]] = {
    "gone": _gone,
    "a group": _group,
    "soft link": _soft_link,
    "external link": _external_link,
    "hard link to another": _hard_link,
}
STRUCTURES = LINKS | {
    "virtual": _virtual,
    "external storage": _external_storage,
    "huge": _huge,
    "no chunk written": _unwritten,
    "another shape": _other_shape,
    "another type": _other_type,
    "variable length": _variable_length,
    "other filters": _other_filters,
    "other chunks": _other_chunks,
    "raw chunk": _raw_chunk,
}


def change_part(rng: random.Random, path: Path) -> str:
    """What a part says of its place among the others; nothing of a whole cache."""

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        part = document.get("part")
        if not isinstance(part, dict):
            return
        lies = (0, 1, 2, 3, -1, 10**10, 999_999, 2**63, "2", None, 1.0)
        name = rng.choice(("index", "of", "rows", "split", "bound", "templates"))
        if name in ("index", "of"):
            part[name] = rng.choice(lies)
        elif name == "templates":
            document["templates"] = rng.choice(([], ["a {}"], "a", [1, 2], ["x", "\x1b[2J"]))
        elif name == "rows":
            part["rows"] = rng.choice(({}, [], None, {"train": [0, 1, 2]}, {"evil\n": [0, 0, 0]}))
        elif name == "split":
            part["rows"][rng.choice(("train", "test", "val"))] = rng.choice(
                ([], [0], [0, 0, 0], [3, 2, 1], [0, 10**15, 10**15], ["a", 1, 2], [0, 1, 2, 3])
            )
        else:
            split = rng.choice(sorted(part["rows"]))
            part["rows"][split][rng.randrange(3)] = rng.choice(lies)

    rewrite(path, change)
    return "another place among the parts"


MUTATIONS: tuple[Mutation, ...] = (
    *(flip_bytes, flip_bytes, zero_sectors, zero_sectors, copy_bytes, truncate, append),
    *(replace_file, change_attribute, change_metadata, change_metadata, replace_metadata),
    *(change_values, change_structure, change_structure, change_structure, change_part),
)


def mutate_cache(rng: random.Random, path: Path) -> str:
    """Damage the cache, or the part, at `path` in one way, and say which."""
    mutation = rng.choice(MUTATIONS)
    return f"{mutation.__name__}: {mutation(rng, path)}"


def mutate_staging(rng: random.Random, folder: Path) -> str:
    """Damage one file of a `.partial` folder, or put something else there."""
    name = rng.choice([entry.name for entry in folder.iterdir() if entry.name != "lock"])
    victim = folder / name
    how = rng.choice(("flip", "zero", "truncate", "append", "json", "folder", "pipe", "gone"))
    if how == "flip":
        flip_bytes(rng, victim)
    elif how == "zero":
        zero_sectors(rng, victim)
    elif how == "truncate":
        truncate(rng, victim)
    elif how == "append":
        append(rng, victim)
    else:
        victim.unlink()
        if how == "json":
            odd = json.dumps(rng.choice(ODD_VALUES))
            victim.write_text(rng.choice(("[" * 100_000, odd)))
        elif how == "folder":
            victim.mkdir()
        elif how == "pipe":
            os.mkfifo(victim)
    return f"{name}: {how}"
