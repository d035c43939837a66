"""Images without labels, beside the splits or alone: written, joined, read and refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.metadata import Part
from clip_adapter.cache.parts import merge_parts
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.schema import ELEMENTS
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect
from tests.cache.rewriting import datasets, put, rewrite
from tests.cache.small_cache import (
    DIM,
    STATED,
    TEMPLATES,
    features,
    small_content,
    text,
    unlabelled,
)

ROWS = 7
FEATURES = features(5, 1, ROWS, DIM)
PHOTOGRAPHS: dict[str, Any] = {
    "images/unlabelled/features": FEATURES,
    "images/unlabelled/ids": [f"ü/{row}.jpg" for row in range(ROWS)],
    "images/unlabelled/stamps": np.arange(ROWS),
    "images/unlabelled/skipped": ["broken.jpg", "pipe.jpg"],
    "images/unlabelled/skipped_stamps": [5, 0],
}


def write(path: Path, content: dict[str, Any], **others: Any) -> Path:
    write_cache(path, content, **STATED, **others)
    return path


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    return write(tmp_path / "beside.h5", small_content() | PHOTOGRAPHS)


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    return write(tmp_path / "alone.h5", text() | PHOTOGRAPHS)


def test_what_the_file_has(beside: Path, tmp_path: Path) -> None:
    """Read with h5py alone: every value has a hash, and nothing else of the file is another."""
    with h5py.File(beside) as file:
        group = file["images/unlabelled"]
        assert "labels" not in group and "skipped_labels" not in group
        np.testing.assert_array_equal(group["features"][...], FEATURES)
        assert group["ids"].asstr()[...].tolist() == PHOTOGRAPHS["images/unlabelled/ids"]
        sums = json.loads(file["metadata"][...].tobytes())["datasets_sha256"]
        for name in group.keys() - {"features"}:
            values = group[name][...].tobytes()
            assert sums[f"images/unlabelled/{name}"] == hashlib.sha256(values).hexdigest()
            assert group[name].fletcher32
        expected = b"".join(hashlib.sha256(row.tobytes()).digest()[:8] for row in FEATURES[0])
        assert group["features_hashes"][...].tobytes() == expected
    found, plain = datasets(beside), datasets(write(tmp_path / "plain.h5", small_content()))
    (with_them,), (without,) = found.pop("metadata"), plain.pop("metadata")
    assert with_them["content_sha256"] == without["content_sha256"]
    assert {name: one for name, one in found.items() if "unlabelled" not in name} == plain
    more = {name for name in found if name not in plain and not name.endswith("/features")}
    assert with_them["datasets_sha256"].keys() == without["datasets_sha256"].keys() | more


def test_what_the_reader_gives(beside: Path, alone: Path, tmp_path: Path) -> None:
    for path, splits in ((beside, ("train", "test")), (alone, ())):
        with FeatureCache(path) as cache:
            assert cache.has("unlabelled") and cache.splits == splits
            assert cache.shape("unlabelled") == (1, ROWS, DIM)
            np.testing.assert_array_equal(
                cache.features("unlabelled", [6, 0, 6]), FEATURES[:, [6, 0, 6]]
            )
            assert cache.ids("unlabelled", [6, 0]) == ["ü/6.jpg", "ü/0.jpg"]
            assert cache.ids("unlabelled") == PHOTOGRAPHS["images/unlabelled/ids"]
            assert cache.skipped_ids("unlabelled") == ["broken.jpg", "pipe.jpg"]
            assert cache.skipped == 2 + len(splits)
            assert not cache.has("pre_projection")
            with pytest.raises(UserError, match="no labels of its unlabelled images"):
                cache.labels("unlabelled")
            with pytest.raises(UserError, match=r"no val split, only .*unlabelled; extract"):
                cache.shape("val")
            cache.verify()
        assert ("images/unlabelled", f"{ROWS} images, width {DIM}") in inspect(InspectConfig(path))
    with FeatureCache(write(tmp_path / "plain.h5", small_content())) as cache:
        assert not cache.has("unlabelled")
        with pytest.raises(UserError, match="no unlabelled split, only train, test; extract"):
            cache.features("unlabelled", [0])


def test_parts_carry_them(tmp_path: Path, beside: Path) -> None:
    """Those of a part that has none of a split, too."""
    content = small_content()
    paths = []
    for index, (start, stop) in enumerate(((0, 0), (0, 3), (3, 7)), 1):
        rows = {"train": (0, 23, 23), "test": (0, 11, 11)} if index == 1 else {}
        every = {"train": (23, 23, 23), "test": (11, 11, 11)} | rows
        last = index == 3  # which lists the broken ones
        bounds = {**every, "unlabelled": (start, stop + 2 * last, ROWS + 2)}
        held = dict(content) if index == 1 else {}
        for name, values in PHOTOGRAPHS.items() if stop else ():
            if "skipped" not in name:
                held[name] = values[:, start:stop] if "feat" in name else values[start:stop]
            elif last:
                held[name] = values
        part = Part(index, 3, bounds)
        paths.append(write(tmp_path / f"{index}.h5", held, part=part, templates=TEMPLATES))
    _, tallies, several = merge_parts(paths[::-1], tmp_path / "merged.h5")
    assert datasets(tmp_path / "merged.h5") == datasets(beside)
    assert (tallies["unlabelled"].images, tallies["unlabelled"].lost) == (ROWS, [])
    assert tallies["unlabelled"].skipped == ["broken.jpg", "pipe.jpg"]
    assert several is None


def test_an_image_of_the_test_split_among_them_is_found(tmp_path: Path) -> None:
    content = small_content() | PHOTOGRAPHS
    content["images/test/digests"] = np.arange(1, 11)
    content["images/unlabelled/digests"] = np.array([99, 98, 97, 3, 96, 95, 94])
    part = Part(1, 1, {"train": (0, 23, 23), "test": (0, 11, 11), "unlabelled": (0, 9, 9)})
    path = write(tmp_path / "1.h5", content, part=part, templates=TEMPLATES)
    *_, several = merge_parts([path], tmp_path / "merged.h5")
    assert several == {"images": 1, "examples": [["test/test/2", "unlabelled/ü/3.jpg"]]}


def test_chunks_that_changed_places(tmp_path: Path) -> None:
    """Each has its own checksum, so that HDF5 sees nothing, and no content hash covers them."""
    path = write(tmp_path / "features.h5", text() | unlabelled(2**17))
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        stored = file["images/unlabelled/features"]
        places = [(0, 0, 0), (0, stored.chunks[1], 0)]
        chunks = [stored.id.read_direct_chunk(place)[1] for place in places]
        for place, chunk in zip(places, chunks[::-1], strict=True):
            stored.id.write_direct_chunk(place, chunk)
    with FeatureCache(path) as cache, pytest.raises(UserError, match="holds other features than"):
        cache.features("unlabelled", [0])
    with pytest.raises(UserError, match="images/unlabelled/features holds other features than"):
        inspect(InspectConfig(path))


def write_labels(file: h5py.File) -> None:
    """What a stranger may think of: the format does not know it, and nobody trusts it."""
    put(file, "images/unlabelled/labels", np.full(3, -1, np.int64))


REFUSED: dict[str, tuple[Any, str]] = {
    "two views": (np.ones((2, ROWS, DIM), np.float32), "has several views, which only train"),
    "another width": (np.ones((1, ROWS, DIM + 1), np.float32), "features has the shape"),
    "fewer rows": (np.ones((1, ROWS - 1, DIM), np.float32), "has the shape .* disagrees"),
    "no rows": (np.ones((1, 0, DIM), np.float32), r"has the shape \(1, 0, 4\)"),
    "another type": (np.ones((1, ROWS, DIM), np.float64), "has a type"),
    "none": (None, "lacks images/unlabelled/features"),
    "zeros": (np.zeros((1, ROWS, DIM), np.float32), "holds a feature of zeros"),
    "NaN": (np.full((1, ROWS, DIM), np.nan, np.float32), "values that are not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(beside: Path, name: str) -> None:
    values, words = REFUSED[name]

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        if values is None:
            del file["images/unlabelled/features"], file["images/unlabelled/features_hashes"]
            return
        if values.shape != (1, ROWS, DIM):
            del file["images/unlabelled/features_hashes"]
        put(file, "images/unlabelled/features", values)

    rewrite(beside, change)
    with pytest.raises(UserError, match=words), FeatureCache(beside) as cache:
        cache.features("unlabelled", [0])


def test_labels_of_them_are_not_known(beside: Path) -> None:
    rewrite(beside, lambda file, document: write_labels(file))
    with FeatureCache(beside) as cache:
        cache.verify()
        assert not cache.has_dataset("images/unlabelled/labels")
    assert not [path for path in ELEMENTS if "unlabelled" in path and path.endswith("labels")]


def test_the_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    name = "images/unlabelled/"
    for content, words in (
        (PHOTOGRAPHS | {f"{name}labels": [-1] * ROWS}, "'images/unlabelled/labels' is no dataset"),
        (PHOTOGRAPHS | {f"{name}ids": []}, "unlabelled split has no image that could be read"),
        (PHOTOGRAPHS | {f"{name}ids": ["a"]}, "images/unlabelled/ids has the shape"),
        (PHOTOGRAPHS | {f"{name}features": np.ones((2, ROWS, DIM), np.float32)}, "several views"),
        ({f"{name}features": FEATURES}, "it lacks images/unlabelled/ids"),
        (PHOTOGRAPHS | {f"{name}features": FEATURES * 0}, "features of 'ü/0.jpg' are zero"),
        ({}, "it lacks images"),
        (
            PHOTOGRAPHS | {f"{name}pre_projection": features(1, 1, ROWS, 6)},
            "it lacks projection/weights",
        ),
        (
            small_content()
            | PHOTOGRAPHS
            | {f"images/{s}/pre_projection": features(1, 1, n, 6) for s, n in (("train", 22),)}
            | {"projection/weights": features(2, 6, DIM)},
            "it lacks images/test/pre_projection, images/unlabelled/pre_projection",
        ),
    ):
        with pytest.raises(UserError, match=words):
            write(path, text() | content)
        assert not list(tmp_path.iterdir())
