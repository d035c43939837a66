"""Parts of a cache: one of them, or both, damaged, lying or foreign, then joined by `merge`."""

import random
import shutil
from pathlib import Path

from tests.cache.rewriting import datasets
from tests.cache.small_cache import make_parts
from tests.fuzz.attempt import Attempt
from tests.fuzz.cache_mutations import mutate_cache
from tests.fuzz.command import run_command
from tests.fuzz.damage import BYTES
from tests.fuzz.doors.caches import content

PARTS = ("1.h5", "2.h5")


def prepare(folder: Path) -> None:
    make_parts(folder)
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
