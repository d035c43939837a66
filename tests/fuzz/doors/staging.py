"""What an interrupted run left (`.partial`), damaged, then gone on with."""

import random
import shutil
from pathlib import Path

import numpy as np

from clip_adapter.cache.staging import StagingFolder
from clip_adapter.cache.writer import write_cache
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.known import Known, KnownRows
from tests.cache.rewriting import datasets
from tests.cache.small_cache import ARGUMENTS, DIM, STATED, features, text
from tests.fuzz.attempt import Attempt
from tests.fuzz.cache_mutations import mutate_staging

ROWS, BATCH = 13, 4
STAGES = (1, 2, 3)  # batches after which it stopped
STAMPS = np.arange(ROWS, dtype=np.uint64) + 1
VALUES = {
    "features": features(5, ROWS, 1, DIM),
    "digests": STAMPS * 7,
    "contents": STAMPS * 11,
    "stamps": STAMPS,
}
WANTED = {name: (v.dtype, v.shape[1:]) for name, v in VALUES.items() if name != "stamps"}
IDS = [f"train/{row}" for row in range(ROWS)]
SPLIT = Split(IDS, np.arange(ROWS, dtype=np.int32) % 3, lambda row: None, "made up")  # type: ignore[arg-type, return-value]


def go_on(out: Path, batches: int = ROWS) -> None:
    """Encode what is not known, of so many batches at most; the file, where nothing is missing."""
    with StagingFolder(out) as place:
        place.begin(ARGUMENTS)
        train = KnownRows(SPLIT, STAMPS, WANTED, range(ROWS))
        known = Known({"train": train})
        for batch, ids in place.batches():
            known.look_in(batch, ids)
        for _ in range(batches):
            if not len(rows := train.missing[:BATCH]):
                break
            values = {name: array[rows] for name, array in VALUES.items()}
            train.put(rows, known.add(place.add("images", [IDS[row] for row in rows], values)))
        if not len(train.missing):
            write_cache(place, {**known.content(), **text()}, **STATED)


def prepare(folder: Path) -> None:
    go_on(folder / "whole.h5")
    for stage in STAGES:
        (folder / str(stage)).mkdir()
        go_on(folder / str(stage) / "out.h5", stage)


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    shutil.copytree(prepared / str(rng.choice(STAGES)), folder, dirs_exist_ok=True)
    out = folder / "out.h5"
    found = Attempt(mutate_staging(rng, folder / "out.h5.partial"))
    found.read(lambda: go_on(out))
    if out.exists():
        found.same(datasets(out), datasets(prepared / "whole.h5"))
    return found
