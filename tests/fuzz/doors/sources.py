"""What `extract` is told to read: tables, split files, folders of images, descriptions, templates;
with odd options."""

import random
from pathlib import Path

from clip_adapter.cache.reader import FeatureCache
from tests.fuzz import source_mutations
from tests.fuzz.attempt import Attempt
from tests.fuzz.command import run_command


def prepare(folder: Path) -> None:
    """Sources are made from nothing."""


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    arguments = source_mutations.make(rng, folder)
    found = Attempt(" ".join(arguments))
    said = found.command(run_command("extract", [*arguments, "--out", "features.h5"]))
    out = folder / "features.h5"
    if said.code == 0:
        found.read(lambda: FeatureCache(out).close())
    elif out.exists():
        found.faults.append("left behind: a cache that was refused")
    return found
