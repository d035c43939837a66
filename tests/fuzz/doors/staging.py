"""What an interrupted writer left (`.partial`), damaged, then gone on with."""

import random
import shutil
from pathlib import Path
from typing import Any

from clip_adapter.cache.writer import CacheWriter
from tests.cache.rewriting import datasets
from tests.cache.small_cache import (
    ARGUMENTS,
    BATCH,
    CLASSES,
    DIM,
    FINISH,
    features,
    make_cache,
    write_all,
)
from tests.fuzz.attempt import Attempt
from tests.fuzz.cache_mutations import mutate_staging

STAGES = ("a text", "a batch", "all")


def prepare(folder: Path) -> None:
    make_cache(folder / "whole.h5")
    for stage in STAGES:
        out = folder / stage / "out.h5"
        out.parent.mkdir()
        with CacheWriter(out, ARGUMENTS, views=1) as writer:
            if stage == "all":
                write_all(writer)
                continue
            writer.append_text(features(0, 1, 2, DIM), CLASSES[:1])
            if stage == "a batch":
                labels = [row % len(CLASSES) for row in range(BATCH)]
                ids = [f"train/{row}" for row in range(BATCH)]
                writer.append_images("train", features(5, 23, 1, DIM)[:BATCH], labels, ids)


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    shutil.copytree(prepared / rng.choice(STAGES), folder, dirs_exist_ok=True)
    out = folder / "out.h5"
    found = Attempt(mutate_staging(rng, folder / "out.h5.partial"))

    def go_on() -> Any:
        with CacheWriter(out, ARGUMENTS, views=1) as writer:
            write_all(writer)
            writer.finish(**FINISH)
        return datasets(out)

    found.same(found.read(go_on), datasets(prepared / "whole.h5"))
    return found
