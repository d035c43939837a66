"""Rows and blocks equal what a whole read gives, with a bounded amount in memory."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from tests.cache.rewriting import put, rewrite
from tests.cache.small_cache import features, images, stated, text

ROWS, VIEWS, DIM = 5000, 3, 300  # several chunks of about 1 MiB for each view


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "features.h5"
    rng = np.random.default_rng(0)
    content = text(7, DIM)
    for split, rows, views in (("train", ROWS, VIEWS), ("test", 61, 1)):
        values = features(views, views, rows, DIM, dtype=np.float16)
        content |= images(split, values, rng.integers(0, 7, rows))
    write_cache(path, content, **stated(DIM))
    with h5py.File(path) as file:
        assert file["images/train/features"].id.get_num_chunks() >= 3 * VIEWS
    return path


def whole(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(path) as file:
        group = file[f"images/{split}"]
        return group["features"][...].astype(np.float32), group["ids"].asstr()[...]


@pytest.mark.parametrize("views", [1, 2, None])
def test_rows_in_any_order_and_more_than_once(cache: Path, views: int | None) -> None:
    every, names = whole(cache, "train")
    rng = np.random.default_rng(1)
    with FeatureCache(cache) as opened:
        for rows in (
            rng.integers(0, ROWS, 400),
            np.array([ROWS - 1, 0, 0, ROWS - 1]),
            np.array([], np.int64),
            [7],
            np.arange(ROWS)[::-1],
        ):
            found = opened.features("train", rows, views)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, every[:views, np.asarray(rows, np.int64)])
            assert opened.ids("train", rows) == names[np.asarray(rows, np.int64)].tolist()
        assert opened.ids("train") == names.tolist()
        images = opened.images("train", views)
        np.testing.assert_array_equal(images.features, every[:views])
        assert images.ids == names.tolist()


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_blocks_are_the_split_in_order(cache: Path, size: int) -> None:
    split = "test" if size < 10 else "train"
    every, _ = whole(cache, split)
    with FeatureCache(cache) as opened:
        blocks = list(opened.blocks(split, size))
        labels = opened.labels(split)
    assert [len(found) for found, _ in blocks[:-1]] == [size] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate([found for found, _ in blocks]), every[0])
    np.testing.assert_array_equal(np.concatenate([found for _, found in blocks]), labels)


@pytest.mark.parametrize("chunk", [(1, 1, DIM), (2, 3, 100), (3, 61, 7), (1, 61, DIM)])
def test_whatever_the_chunks(cache: Path, tmp_path: Path, chunk: tuple[int, ...]) -> None:
    path = tmp_path / "features.h5"
    path.write_bytes(cache.read_bytes())
    values = np.random.default_rng(2).normal(size=(3, ROWS // 50, DIM)).astype(np.float32)

    def change(file: h5py.File, document: dict) -> None:
        for name in ("labels", "ids"):
            kept = file[f"images/train/{name}"]
            put(file, f"images/train/{name}", kept[: ROWS // 50].astype(kept.dtype))
        put(file, "images/train/features", values, chunks=chunk)
        del file["images/train/features_hashes"]

    rewrite(path, change)
    rows = np.random.default_rng(3).integers(0, ROWS // 50, 40)
    with FeatureCache(path) as opened:
        np.testing.assert_array_equal(opened.features("train", rows), values[:, rows])


@pytest.mark.parametrize("rows", [[-1], [ROWS], [[1, 2]]])
def test_rows_that_are_not_there(cache: Path, rows: list) -> None:
    with FeatureCache(cache) as opened:
        with pytest.raises(IndexError):
            opened.features("train", rows)
        with pytest.raises(IndexError):
            opened.ids("train", rows)


def test_rows_that_are_no_integers(cache: Path) -> None:
    with FeatureCache(cache) as opened, pytest.raises(IndexError, match="rows are float64"):
        opened.features("train", [0.5])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0])
def test_values_are_checked_where_they_are_read(cache: Path, tmp_path: Path, bad: float) -> None:
    path = tmp_path / "features.h5"
    path.write_bytes(cache.read_bytes())
    rewrite(path, lambda file, document: file["images/train/features"].__setitem__((0, 4000), bad))
    with FeatureCache(path) as opened:
        opened.features("train", [0, 10])
        with pytest.raises(UserError, match=r"images/train/features holds (values|a feature)"):
            opened.features("train", [4000])
        with pytest.raises(UserError, match=r"images/train/features holds (values|a feature)"):
            list(opened.blocks("train"))


READING = """
import sys
import numpy as np
from clip_adapter.cache.reader import FeatureCache

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

with FeatureCache(sys.argv[1]) as cache:
    rows = cache.shape("train")[1]
    labels = cache.labels("train")
    cache.features("train", np.arange(10))
    before = peak()
    total = cache.features("train", np.arange(0, rows, 97), views=1).nbytes
    cache.ids("train", np.arange(0, rows, 97))
    sums = [features.sum() for features, _ in cache.blocks("train", 1000)]
    print(peak() - before, total, rows * 512 * 4)
"""


def test_memory_is_that_of_the_rows_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "large.h5"
    values = features(0, 1, 60_000, 512, dtype=np.float16)
    write_cache(path, text(2, 512) | images("train", values, [0] * 60_000), **stated(512))
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READING, str(path)]
    grown, asked, all_of_it = map(int, subprocess.check_output(command, env=environment).split())
    assert all_of_it > 120_000_000
    assert 1024 * grown < asked + 32_000_000  # a block in two types, HDF5's buffers, the names
