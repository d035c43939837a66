"""Damaged, odd and hostile data sets: tables, split files, descriptions, templates, folders.

`make(rng, folder)` writes one into `folder` and returns arguments of `extract` that read it.
"""

import csv
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from clip_adapter.cache.writer import write_cache
from tests.cache.small_cache import STATED, small_content
from tests.fuzz import image_mutations
from tests.fuzz.cache_mutations import mutate_cache
from tests.fuzz.damage import damage

ODD_TEXTS = (
    "", " ", "a", "ä", "\0", "a\0b", "x" * 300, "x" * 140_000, "\ud800", "\u202e", "\x1b[31m",
    "a\nb", "../../etc/passwd", "/dev/zero", "~nosuchuser/x", "=1+1", '"', "'", ",", "9" * 5000,
    "NaN", "-1",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    *ODD_TEXTS, None, True, -1, 10**30, 1e300, float("inf"), [], {}, [[]], {"a": [1]},
)  # fmt: skip
PETS_SPLIT = "split_zhou_OxfordPets.json"
SOME_OPTIONS = (
    ("--split-seed", "-1"), ("--split-seed", str(10**30)), ("--views", "1000000000"),
    ("--views", "101"), ("--val", "nan"), ("--val", "1e-9"), ("--test", "-0"),
    ("--test", "0.999999"), ("--augment-seed", str(10**40)), ("--templates", "a photo"),
    ("--templates", "{}{}"), ("--templates", "x" * 5000), ("--templates", "é" * 200),
    ("--templates", "{" * 300 + "}" * 300),
    ("--templates", "\udcff{}"), ("--templates", "/dev/zero"), ("--templates", "~nosuchuser"),
    ("--descriptions", "/dev/zero"), ("--descriptions", "x" * 300), ("--descriptions", "."),
    ("--image-root", "/dev/null"), ("--data-root", "x" * 300),
)  # fmt: skip


def make(rng: random.Random, folder: Path) -> list[str]:
    """One source of any kind below, sometimes with odd options."""
    arguments = rng.choice(MUTATIONS)(rng, folder)
    if rng.random() < 0.3:
        arguments += rng.choice(SOME_OPTIONS)
    return arguments


def _text(rng: random.Random) -> str:
    return rng.choice(ODD_TEXTS) if rng.random() < 0.5 else f"c{rng.randrange(3)}"


def _place(rng: random.Random, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    if rng.random() < 0.45:
        damage(rng, path)


def _images(rng: random.Random, folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if rng.random() < 0.05:
            image_mutations.make(rng, path.parent)
        Image.new("RGB", (8, 8), rng.randrange(256)).save(path)


def table(rng: random.Random, folder: Path) -> list[str]:
    names = [f"i/{n}.png" for n in range(12)]
    _images(rng, folder, names)
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=rng.choice((",", ",", ",", ";", "\t")))
    columns = rng.choice(
        (
            ["path", "label"],
            ["path", "label", "split"],
            ["label", "path", ""],
            ["path", "Label", "x"],
        )
    )
    writer.writerow(columns)
    for number, name in enumerate(names):
        label = f"c{number % 2}"
        row = {"path": name, "label": label, "Label": label, "split": "train", "": "x", "x": label}
        if rng.random() < 0.1:
            row[rng.choice(columns)] = _text(rng)
        if number % 5 == 4:
            row |= dict.fromkeys(("label", "Label", "x"), rng.choice((label, "", " ")))
        writer.writerow([row[column] for column in columns][: rng.choice((9, 9, 9, 9, 1))])
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    _place(rng, folder / "t.csv", buffer.getvalue().encode(encoding, "replace"))
    own = rng.choice(("label=x", "path=path,label=Label", "split=x", "path", _text(rng)))
    return ["--dataset", f"csv:{folder}/t.csv", *(["--columns", own] if rng.random() < 0.3 else [])]


def split_file(rng: random.Random, folder: Path) -> list[str]:
    names = [f"images/{n}.png" for n in range(37 * 3)]
    _images(rng, folder, names[:: rng.choice((1, 1, 2))])
    rows: dict[str, Any] = {
        split: [[f"{part * 37 + n}.png", n, f"class {n}"] for n in range(37)]
        for part, split in enumerate(("train", "val", "test"))
    }
    for _ in range(rng.randrange(4)):
        split = rng.choice(list(rows))
        if rng.random() < 0.2:
            rows[split] = rng.choice(ODD_VALUES)
        elif isinstance(rows[split], list) and rows[split]:
            row = rng.randrange(len(rows[split]))
            if isinstance(rows[split][row], list) and rows[split][row]:
                rows[split][row][rng.randrange(len(rows[split][row]))] = rng.choice(ODD_VALUES)
    content = json.dumps(rng.choice((rows, rows, rows, rng.choice(ODD_VALUES)))).encode()
    if rng.random() < 0.05:
        content = b"[" * 200_000
    _place(rng, folder / PETS_SPLIT, content)
    return ["--dataset", f"coop:{folder}"]


def classes(rng: random.Random, folder: Path) -> list[str]:
    root = folder / "data"
    _images(rng, root, [f"c{n % 3}/{n}.png" for n in range(18)])
    for _ in range(rng.randrange(4)):
        place = root / f"c{rng.randrange(3)}"
        choice = rng.randrange(8)
        if choice == 6:
            _images(
                rng,
                root,
                [f"{rng.choice(('', 'train/', 'c0/d/', '@eaDir/'))}{n}.png" for n in range(3)],
            )
        elif choice == 7:
            split = rng.choice(("train", "dev", "Testing", "eval", "c9"))
            _images(rng, root, [f"{split}/c{n % 2}/{n}.png" for n in range(6)])
        elif choice == 0:
            (root / f"empty{rng.randrange(9)}").mkdir(exist_ok=True)
        elif choice == 1:
            (root / f"loop{rng.randrange(99)}").symlink_to(rng.choice((".", "..", "loop", "/dev")))
        elif choice == 2:
            (place / f"{rng.randrange(99)}x.{rng.choice(('HEIC', 'svg', 'txt'))}").touch()
        elif choice == 3:
            deep = place.joinpath(*["d" * 200] * rng.choice((1, 5, 15)))
            deep.mkdir(parents=True, exist_ok=True)
        elif choice == 4:
            (place / os.fsdecode(b"caf\xe9.png")).touch()
        else:
            image_mutations.make(rng, place)
    return ["--dataset", f"folder:{root}", *rng.choice(([], ["--on-error", "skip"]))]


def descriptions(rng: random.Random, folder: Path) -> list[str]:
    arguments = ["--dataset", "digits"]
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    stored: Any = {name: [f"the digit {name}"] for name in names}
    for _ in range(rng.randrange(3)):
        stored[rng.choice((*names, _text(rng)))] = rng.choice(ODD_VALUES)
    content = json.dumps(rng.choice((stored, stored, rng.choice(ODD_VALUES)))).encode()
    if rng.random() < 0.1:
        content = rng.choice((b"{" * 100_000, b'{"a":' * 100_000, b"9" * 10_000))
    _place(rng, folder / "d.json", content)
    return [*arguments, "--descriptions", f"{folder}/d.json"]


def templates(rng: random.Random, folder: Path) -> list[str]:
    lines = [f"{rng.choice('abc')}{number} {{}}" for number in range(3)]
    if rng.random() < 0.5:
        lines[rng.randrange(3)] = rng.choice(("{} {}", "{}" * 3000, "a0 {}", _text(rng)))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    _place(rng, folder / "t.txt", content)
    return ["--dataset", "digits", "--templates", f"{folder}/t.txt"]


def unlabelled(rng: random.Random, folder: Path) -> list[str]:
    """Images without labels, with a cache or a list that says which classes there are."""
    _images(rng, folder / "new", [f"{'deep/' * (n % 2)}{n}.png" for n in range(9)])
    if rng.random() < 0.3:
        image_mutations.make(rng, folder / "new")
    names = [_text(rng) if rng.random() < 0.1 else f"c{number}" for number in range(5)]
    _place(rng, folder / "names.txt", "\n".join(names).encode("utf-8", "surrogatepass"))
    write_cache(folder / "like.h5", small_content(), **STATED)
    if rng.random() < 0.8:
        mutate_cache(rng, folder / "like.h5")
    told = [["--like", f"{folder}/like.h5"], ["--classes", f"{folder}/names.txt"]]
    told += [["--like", rng.choice(ODD_TEXTS[7:])], told[0] + told[1], []]
    arguments = rng.choice((told[0], told[1], told[1], rng.choice(told)))
    skipping = rng.choice(([], ["--on-error", "skip"]))
    return ["--dataset", f"images:{folder}/new", *arguments, *skipping]


MUTATIONS: tuple[Callable[[random.Random, Path], list[str]], ...] = (
    table, split_file, classes, descriptions, templates, unlabelled,
)  # fmt: skip
