"""Tokens, features before the projection, and the projection: written, joined and read."""

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.metadata import Part
from clip_adapter.cache.parts import merge_parts
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.rows import StoredRows
from clip_adapter.cache.schema import ELEMENTS, Element, Kind
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect
from tests.cache.rewriting import datasets, put, rewrite
from tests.cache.small_cache import DIM, STATED, TEMPLATES, images, make_cache, text

WIDTH, TOKENS = 6, 5
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(WIDTH, DIM)).astype(np.float32)
BIAS = RNG.normal(size=DIM).astype(np.float32)
PRE = {
    "train": RNG.normal(size=(2, 9, WIDTH)).astype(np.float16),
    "test": RNG.normal(size=(1, 5, WIDTH)).astype(np.float16),
}
IDS = RNG.integers(0, 999, (3, 2, TOKENS)).astype(np.int32)


def write(
    path: Path, part: Part | None = None, bias: bool = True, more: dict[str, Any] | None = None
) -> Path:
    rows = part.rows if part else {"train": (0, 9, 9), "test": (0, 5, 5)}
    content: dict[str, Any] = {}
    for split, (start, stop, _) in rows.items():
        if stop > start:
            pre = PRE[split][:, start:stop]
            ids = [f"{split}/{row}" for row in range(start, stop)]
            labels = [row % 3 for row in range(start, stop)]
            values = (pre @ WEIGHTS + BIAS).astype(np.float32)
            content |= images(split, values, labels, ids=ids, pre_projection=pre)
    if part is None or part.index == 1:
        content |= text() | {"text/tokens": IDS, "projection/weights": WEIGHTS}
        content |= {"projection/bias": BIAS} if bias else {}
    write_cache(path, content | (more or {}), **STATED, part=part, templates=TEMPLATES)
    return path


def test_they_are_given_back(tmp_path: Path) -> None:
    with FeatureCache(write(tmp_path / "features.h5")) as cache:
        assert all(map(cache.has, ("tokens", "pre_projection", "projection")))
        assert not cache.has("prompts")
        np.testing.assert_array_equal(cache.tokens(), IDS)
        rows = [3, 0, 3]
        found = cache.pre_projection("train", rows)
        np.testing.assert_array_equal(found, PRE["train"][:, rows])
        assert found.dtype == np.float32
        assert cache.pre_projection("train", rows, views=1).shape == (1, 3, WIDTH)
        projection = cache.projection()
        np.testing.assert_array_equal(projection.weights, WEIGHTS)
        np.testing.assert_allclose(
            found @ projection.weights + projection.bias, cache.features("train", rows), atol=1e-4
        )
    with FeatureCache(write(tmp_path / "plain.h5", bias=False)) as cache:
        assert cache.projection().bias.tolist() == [0] * DIM


def test_a_cache_without_them_says_so(tmp_path: Path) -> None:
    with FeatureCache(make_cache(tmp_path / "features.h5")) as cache:
        for name, ask in (
            ("tokens", cache.tokens),
            ("projection", cache.projection),
            ("pre-projection", lambda: cache.pre_projection("train", [0])),
        ):
            assert not cache.has(name.replace("-", "_"))
            with pytest.raises(UserError, match=f"has no {name}; extract"):
                ask()


def test_parts_carry_them(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.h5")
    parts = [
        write(tmp_path / "1.h5", Part(1, 3, {"train": (0, 4, 9), "test": (0, 0, 5)})),
        write(tmp_path / "2.h5", Part(2, 3, {"train": (4, 5, 9), "test": (0, 3, 5)})),
        write(tmp_path / "3.h5", Part(3, 3, {"train": (5, 9, 9), "test": (3, 5, 5)})),
    ]
    merge_parts(parts[::-1], tmp_path / "merged.h5")
    assert datasets(tmp_path / "merged.h5") == datasets(whole)
    assert "images/test/pre_projection" in datasets(whole)
    with h5py.File(tmp_path / "merged.h5") as file:
        for split, name in (("train", "features"), ("test", "pre_projection")):
            values = file[f"images/{split}/{name}"]
            expected = [[hashlib.sha256(row.tobytes()).digest()[:8] for row in v] for v in values]
            assert file[f"images/{split}/{name}_hashes"].dtype == np.dtype("<u8")
            found = file[f"images/{split}/{name}_hashes"][...]
            assert found.tobytes() == b"".join(digest for view in expected for digest in view)


@pytest.mark.parametrize("name", ["features", "pre_projection"])
def test_chunks_that_changed_places(tmp_path: Path, name: str) -> None:
    """Each has its own checksum, so that HDF5 sees nothing."""
    path = write(tmp_path / "features.h5")
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        views = file[f"images/train/{name}"].id
        chunks = [views.read_direct_chunk((view, 0, 0))[1] for view in (0, 1)]
        for view, chunk in enumerate(reversed(chunks)):
            views.write_direct_chunk((view, 0, 0), chunk)
    words = f"images/train/{name} holds other features than were written there"
    with FeatureCache(path) as cache:
        for views in (1, None):
            with pytest.raises(UserError, match=words):
                getattr(cache, name)("train", [8, 0], views=views)
        getattr(cache, name)("test", [0])
    with pytest.raises(UserError, match=words):
        inspect(InspectConfig(path))

    def without(file: h5py.File, document: dict[str, Any]) -> None:
        del file[f"images/train/{name}_hashes"]

    rewrite(path, without)  # as a file of somebody else
    with FeatureCache(path) as cache:
        getattr(cache, name)("train", [8, 0])
    with pytest.raises(UserError, match="content_sha256 does not match"):
        inspect(InspectConfig(path))


def test_they_count_in_the_content_hash_where_they_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "features.h5")
    digest = hashlib.sha256()
    paths = [f"images/{s}/{n}" for s in ("train", "test") for n in ("features", "labels", "ids")]
    paths += ["text/features", "text/class_names", "text/templates"]
    old_paths = len(paths)
    paths += ["images/train/pre_projection", "images/test/pre_projection", "text/tokens"]
    paths += ["projection/weights", "projection/bias"]
    with h5py.File(path) as file:
        for count, name in enumerate(paths):
            if count == old_paths:
                before = digest.hexdigest()
            digest.update(f"{name} {file[name].shape}\n".encode() + file[name][...].tobytes())
    with FeatureCache(path) as cache:
        assert cache.content_sha256 == digest.hexdigest()

    def without(file: h5py.File, document: dict[str, Any]) -> None:
        del file["images/train/pre_projection"], file["images/test/pre_projection"]
        del file["text/tokens"], file["projection"], document["content_sha256"]

    rewrite(path, without)
    with FeatureCache(path) as cache:
        assert cache.content_sha256 == before


@pytest.mark.parametrize(
    ("path", "values", "words"),
    [
        ("text/tokens", np.zeros((3, 1, 5), np.int32), "text/tokens has the shape"),
        ("text/tokens", np.zeros((3, 2, 5), np.int64), "text/tokens has a type"),
        ("images/test/pre_projection", np.ones((1, 5, 7), np.float32), "test/pre_projection has"),
        ("images/test/pre_projection", np.ones((1, 4, 6), np.float32), "test/pre_projection has"),
        ("images/test/pre_projection", None, "lacks images/test/pre_projection"),
        ("projection/weights", None, "lacks projection/weights"),
        ("projection/weights", np.ones((6, 5), np.float32), "projection/weights has the shape"),
        ("projection/weights", np.ones((6, 4), np.float16), "projection/weights has a type"),
        ("projection/bias", np.ones(5, np.float32), "projection/bias has the shape"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, path: str, values: np.ndarray | None, words: str
) -> None:
    def change(file: h5py.File, document: dict[str, Any]) -> None:
        if values is None:
            del file[path]
        else:
            put(file, path, values)

    cache = write(tmp_path / "features.h5")
    rewrite(cache, change)
    with pytest.raises(UserError, match=words):
        FeatureCache(cache)


def test_a_projection_that_is_not_finite(tmp_path: Path) -> None:
    cache = write(tmp_path / "features.h5")
    rewrite(cache, lambda file, document: file["projection/bias"].__setitem__(0, np.nan))
    with FeatureCache(cache) as opened, pytest.raises(UserError, match="projection holds values"):
        opened.projection()


@pytest.mark.parametrize(
    ("kind", "axes", "values"),
    [
        (Kind.INT32, "N", np.arange(9, dtype=np.int32)),
        (Kind.STRING, "N", [f"ü{row}" for row in range(9)]),
        (Kind.FEATURES, "VND", RNG.normal(size=(2, 9, DIM)).astype(np.float16)),
        (Kind.FLOAT32, "CP", RNG.normal(size=(3, 2)).astype(np.float32)),
    ],
)
def test_an_entry_of_the_table_is_all_that_an_element_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, axes: str, values: Any
) -> None:
    """It is written, read with its checks, joined from parts and picked by image."""
    name = "images/train/more" if "N" in axes else "text/more"
    by_row = kind is Kind.FEATURES
    monkeypatch.setitem(ELEMENTS, name, Element("more", kind, axes, by_row=by_row))  # type: ignore[arg-type]
    if by_row:
        monkeypatch.setitem(ELEMENTS, f"{name}_hashes", Element("more_hashes", Kind.UINT64, "VN"))  # type: ignore[arg-type]
    whole = write(tmp_path / "whole.h5", more={name: values})
    parts = []
    for index, (start, stop) in enumerate(((0, 4), (4, 9)), start=1):
        rows = {"train": (start, stop, 9), "test": (0, 5, 5) if start else (0, 0, 5)}
        piece = values[start:stop] if axes == "N" else values[:, start:stop] if by_row else values
        more = {} if index == 2 and "N" not in axes else {name: piece}
        parts.append(write(tmp_path / f"{index}.h5", Part(index, 2, rows), more=more))
    merge_parts(parts, tmp_path / "merged.h5")
    assert datasets(tmp_path / "merged.h5") == datasets(whole)
    with FeatureCache(whole) as cache:
        np.testing.assert_array_equal(cache.values_of(name), values)
        if "N" in axes:
            rows = StoredRows(cache, "train")
            assert "more" in rows.rows
            np.testing.assert_array_equal(rows.read("more", 2, 3)[0], np.moveaxis(
                np.asarray(values), -2 if by_row else 0, 0)[2])  # fmt: skip
    rewrite(whole, lambda file, document: put(file, name, np.zeros(3, np.uint8)))
    with pytest.raises(UserError, match=f"{name} has a type that the format does not know"):
        FeatureCache(whole)


SECOND = {
    "name": "toy-dino",
    "pretrained": "made-up",
    "weights_sha256": "1" * 64,
    "embed_dim": 3,
    "image_size": [8, 9],
    "preprocess": {"size": [8, 9], "crop_pct": 0.9},
}
FEATURES2 = {
    "train": RNG.normal(size=(2, 9, 3)).astype(np.float32),
    "test": RNG.normal(size=(1, 5, 3)).astype(np.float32),
}


def write_both(path: Path, part: Part | None = None, **changes: Any) -> Path:
    """A cache, or a part of one, with features of a second encoder."""
    rows = part.rows if part else {"train": (0, 9, 9), "test": (0, 5, 5)}
    content = {} if part and part.index > 1 else text()
    for split, (start, stop, _) in rows.items():
        ids = [f"{split}/{row}" for row in range(start, stop)]
        labels = [row % 3 for row in range(start, stop)]
        values = np.ones((len(FEATURES2[split]), stop - start, DIM), np.float32)
        own = FEATURES2[split][:, start:stop]
        content |= images(split, values, labels, ids=ids, features2=own)
    stated = STATED | {"backbone2": SECOND}
    write_cache(path, content, **stated | changes, part=part, templates=TEMPLATES)
    return path


def test_features_of_a_second_encoder_are_given_back_and_joined(tmp_path: Path) -> None:
    whole = write_both(tmp_path / "whole.h5")
    with FeatureCache(whole) as cache:
        assert cache.has("features2") and cache.backbone2 == SECOND
        found = cache.features2("train", [3, 0, 3])
        np.testing.assert_array_equal(found, FEATURES2["train"][:, [3, 0, 3]])
        assert cache.features2("test", [1], views=1).shape == (1, 1, 3)
        digest = hashlib.sha256()
        paths = [f"images/{s}/{n}" for s in cache.splits for n in ("features", "labels", "ids")]
        paths += ["text/features", "text/class_names", "text/templates"]
        with h5py.File(whole) as file:
            for name in (*paths, *(f"images/{split}/features2" for split in cache.splits)):
                digest.update(f"{name} {file[name].shape}\n".encode() + file[name][...].tobytes())
        assert cache.content_sha256 == digest.hexdigest()
    assert dict(inspect(InspectConfig(whole)))["second encoder"].startswith("embed_dim 3, ")
    parts = [
        write_both(tmp_path / "1.h5", Part(1, 2, {"train": (0, 4, 9), "test": (0, 2, 5)})),
        write_both(tmp_path / "2.h5", Part(2, 2, {"train": (4, 9, 9), "test": (2, 5, 5)})),
    ]
    merge_parts(parts, tmp_path / "merged.h5")
    assert datasets(tmp_path / "merged.h5") == datasets(whole)
    with FeatureCache(tmp_path / "merged.h5") as cache:
        assert cache.backbone2 == SECOND
    other = SECOND | {"weights_sha256": "2" * 64}
    parts[1].unlink()
    rows = {"train": (4, 9, 9), "test": (2, 5, 5)}
    write_both(parts[1], Part(2, 2, rows), backbone2=other)
    with pytest.raises(UserError, match="do not belong together: backbone2 differ"):
        merge_parts(parts, tmp_path / "other.h5")


def test_what_a_second_encoder_cannot_be(tmp_path: Path) -> None:
    for changes, words in (
        ({"backbone2": None}, "features of 3 numbers and embed_dim of None"),
        ({"backbone2": SECOND | {"embed_dim": 4}}, "features of 3 numbers and embed_dim of 4"),
        ({"backbone2": {"name": "toy", "embed_dim": 3}}, "its metadata: backbone2 lacks"),
    ):
        with pytest.raises(UserError, match=words):
            write_both(tmp_path / "features.h5", **changes)
    cache = write_both(tmp_path / "features.h5")
    with FeatureCache(make_cache(tmp_path / "plain.h5")) as plain:
        assert plain.backbone2 is None
        with pytest.raises(UserError, match="has no features2; extract"):
            plain.features2("train", [0])

    def without(file: h5py.File, document: dict[str, Any]) -> None:
        del file["images/test/features2"]

    def nameless(file: h5py.File, document: dict[str, Any]) -> None:
        del document["backbone2"]

    for change, words in (
        (nameless, "its features have 3 numbers, not None"),
        (without, "lacks images/test/features2"),
    ):
        rewrite(cache, change)
        with pytest.raises(UserError, match=words):
            FeatureCache(cache)
        cache.unlink()
        write_both(cache)
