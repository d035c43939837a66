"""Parts of a cache: one of them, or both, damaged, lying or foreign, then joined by `merge`."""

import random
import shutil
from pathlib import Path

import numpy as np

from clip_adapter.cache.metadata import Part
from clip_adapter.cache.writer import CacheWriter
from tests.cache.rewriting import datasets
from tests.cache.small_cache import CLASSES, DIM, FINISH, features
from tests.fuzz.attempt import Attempt
from tests.fuzz.cache_mutations import mutate_cache
from tests.fuzz.command import run_command
from tests.fuzz.damage import BYTES
from tests.fuzz.doors.caches import content

PARTS = ("1.h5", "2.h5")
BOUNDS = ((0, 5), (5, 9))


def prepare(folder: Path) -> None:
    for index, bounds in enumerate(BOUNDS, start=1):
        with CacheWriter(folder / f"{index}.h5", {"a": 1}, views=1) as writer:
            if index == 1:
                writer.append_text(features(0, 3, 2, DIM), CLASSES)
            rows = np.arange(*bounds)
            values, ids = features(index, len(rows), 1, DIM), [f"train/{row}" for row in rows]
            writer.append_images(
                "train", values[1:], rows[1:] % 3, ids[1:], ids[:1], skipped_labels=[2]
            )
            writer.finish(**FINISH, part=Part(index, 2, {"train": (*bounds, 9)}))
    run_command("merge", [f"{folder}/whole.h5", *(f"{folder}/{name}" for name in PARTS)])
    content(folder / "whole.h5")


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    for name in PARTS:
        shutil.copyfile(prepared / name, folder / name)
    victims = PARTS if rng.random() < 0.1 else [rng.choice(PARTS)]
    tricks = [mutate_cache(rng, folder / name) for name in victims]
    found = Attempt("; ".join(tricks))
    named = list(PARTS) if rng.random() < 0.8 else rng.choices(PARTS, k=rng.randrange(4))
    said = found.command(run_command("merge", ["out.h5", *named]))
    out = folder / "out.h5"
    if said.code == 0:
        found.read(lambda: content(out))
        whole = prepared / "whole.h5"
        if all(trick.partition(":")[0] in {each.__name__ for each in BYTES} for trick in tricks):
            found.same(datasets(out), datasets(whole))
    elif out.exists():
        found.faults.append("left behind: a cache that was refused")
    return found
