"""What `extract` is told to read: tables, split files, folders of images, descriptions, templates;
with odd options."""

import random
import re
from pathlib import Path

from clip_adapter.cache.reader import FeatureCache
from tests.fuzz import source_mutations
from tests.fuzz.attempt import Attempt
from tests.fuzz.command import run_command

NAMES_ALL = re.compile(r"long: extract: [0-9]+ images cannot be used: ")


def prepare(folder: Path) -> None:
    """Sources are made from nothing."""


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    arguments = source_mutations.make(rng, folder)
    found = Attempt(" ".join(arguments))
    said = found.command(run_command("extract", [*arguments, "--out", "features.h5"]))
    # A sentence that names all broken images is long, so that they need not be found one by one.
    found.faults = [fault for fault in found.faults if not NAMES_ALL.match(fault)]
    out = folder / "features.h5"
    if said.code == 0:
        found.read(lambda: FeatureCache(out).close())
    elif out.exists():
        found.faults.append("left behind: a cache that was refused")
    return found
