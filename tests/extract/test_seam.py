"""What `run_job` asks of what encodes: one that loses, reorders and pickles gives the same file."""

import pickle
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.cache.staging import StagingFolder
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.encoder import EncodedBatch
from clip_adapter.extract.job import run_job
from clip_adapter.extract.local_encoding import LocalEncoding
from clip_adapter.extract.shards import Shard
from clip_adapter.listener import Listener
from tests.cache.rewriting import datasets
from tests.extract.image_folders import make_folder

FIRST = ("features", "train")


class Unreliable(LocalEncoding):
    """Gives batches in any order, and loses some. Nothing that it is told or tells is the same
    object on the other side, as from another machine."""

    def __init__(self, config: ExtractConfig, dataset: ImageDataset) -> None:
        super().__init__(config, dataset)
        self.about = pickle.loads(pickle.dumps(self.about))
        self.rng = random.Random(3)
        self.asked: list[tuple[str, str, list[int]]] = []
        self.given: list[tuple[str, str, int]] = []

    def images(self, encoder: str, split: str, plan: Plan, watch: Any) -> Iterator[EncodedBatch]:
        self.asked.append((encoder, split, plan.rows.tolist()))
        plan = pickle.loads(pickle.dumps(plan))
        batches, failure = [], None
        try:
            for batch in super().images(encoder, split, plan, watch):
                batches.append(pickle.loads(pickle.dumps(batch)))
        except UserError as error:
            failure = pickle.loads(pickle.dumps(error))
        self.rng.shuffle(batches)
        for batch in batches[1:] if len(batches) > 2 else batches:
            rows = [*batch.rows, *(image.row for image in batch.skipped)]
            self.given += [(encoder, split, int(row)) for row in rows]
            yield batch
        if failure is not None:
            raise failure


class Silent(LocalEncoding):
    def images(self, *_: Any) -> Iterator[EncodedBatch]:
        return iter(())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(
        tmp_path_factory.mktemp("data") / "i", {"train": 6, "test": 4}, ("cat", "eel")
    )
    (root / "train/eel/02.png").write_bytes(b"\x89PNG")
    return root


def run(folder: Path, out: Path, encoding_of: Any, **options: Any) -> str:
    values = {"batch_size": 2, "workers": 2, "views": 1, "val": 0.0, "on_error": "skip", **options}
    config = ExtractConfig(dataset=f"folder:{folder}", out=out, **values)
    with StagingFolder(out) as place:
        return run_job(config, Shard(), place, Listener(), encoding_of)


def test_nothing_is_lost_and_nothing_twice(folder: Path, tmp_path: Path) -> None:
    made: list[Unreliable] = []

    def unreliable(*arguments: Any) -> Unreliable:
        made.append(Unreliable(*arguments))
        return made[-1]

    options: dict[str, Any] = {"also": "glyph-clip", "with_projection": True}
    said = run(folder, tmp_path / "whole.h5", LocalEncoding, **options)
    other = run(folder, tmp_path / "whole2.h5", unreliable, **options)
    assert datasets(tmp_path / "whole2.h5") == datasets(tmp_path / "whole.h5")
    assert "19 images in" in said and "19 images in" in other
    (encoding,) = made
    rows = {(name, split, row) for name, split, asked in encoding.asked for row in asked}
    assert sorted(encoding.given) == sorted(rows), "each of them once"
    train = [asked for name, split, asked in encoding.asked if (name, split) == FIRST]
    assert train[0] == [*range(12)] and len(train) > 1, "what was lost is asked for again"
    assert all(set(later) < set(before) for before, later in pairwise(train))
    second = np.concatenate([a for n, s, a in encoding.asked if (n, s) == ("features2", "train")])
    assert 8 not in second, "what the first cannot read"


def test_a_broken_image_ends_the_run_with_what_came_before_kept(
    folder: Path, tmp_path: Path
) -> None:
    sentences = []
    for encoding_of in (LocalEncoding, Unreliable):
        out = tmp_path / f"{encoding_of.__name__}.h5"
        with pytest.raises(UserError) as refused:
            run(folder, out, encoding_of, on_error="fail")
        sentences.append(str(refused.value))
        assert list((out.with_name(f"{out.name}.partial")).glob("*.batch"))
        run(folder, out, encoding_of)
    assert sentences[0] == sentences[1]
    assert datasets(tmp_path / "Unreliable.h5") == datasets(tmp_path / "LocalEncoding.h5")


def test_what_gives_nothing_does_not_go_on_for_ever(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing came back of 12 images"):
        run(folder, tmp_path / "features.h5", Silent)
