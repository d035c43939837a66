"""Feature caches: read whole, and by the commands that take them."""

import random
import shutil
from pathlib import Path
from typing import Any

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache
from tests.cache.small_cache import STATED, small_content, unlabelled
from tests.fuzz.attempt import Attempt
from tests.fuzz.cache_mutations import mutate_cache
from tests.fuzz.command import run_command
from tests.fuzz.damage import BYTES

NAME = "features.h5"
FIT = ("--method", "zero-shot", "--baselines", "--shots", "1", "--select", "none")
COMMANDS = (
    ("inspect", NAME),
    ("fit", "--cache", NAME, "--out", "run", *FIT),
    ("extract", "--out", NAME),
    ("merge", "out.h5", NAME),
    ("audit", NAME, "--out", "audit.csv", "--html", "audit.html"),
    ("suggest", NAME, "--out", "to_label.csv"),
)


def prepare(folder: Path) -> None:
    write_cache(folder / NAME, small_content() | unlabelled(7), **STATED)


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    path = folder / NAME
    shutil.copyfile(prepared / NAME, path)
    what = mutate_cache(rng, path)
    found = Attempt(what)
    read = found.read(lambda: content(path))
    if what.partition(":")[0] in {each.__name__ for each in BYTES}:
        found.same(read, content(prepared / NAME))
    name, *arguments = COMMANDS[0] if rng.random() < 0.7 else rng.choice(COMMANDS)
    found.command(run_command(name, arguments))
    return found


def content(path: Path) -> list[Any]:
    """All that a cache says."""
    with FeatureCache(path) as cache:
        images = [cache.images(split) for split in cache.splits]
        arrays: list[Any] = [
            array for i in images for array in (i.features.tobytes(), i.labels.tobytes())
        ]
        if cache.has("unlabelled"):
            rows = range(cache.shape("unlabelled")[1])
            arrays += [cache.features("unlabelled", rows).tobytes(), cache.ids("unlabelled")]
        return [*arrays, *(i.ids for i in images), cache.text_features().tobytes(),
                cache.class_names, cache.templates, cache.metadata, cache.splits,
                cache.skipped, cache.content_sha256]  # fmt: skip
