"""Groups of images: an optional element that changes nothing else of a cache."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect
from tests.cache.rewriting import datasets, put, rewrite
from tests.cache.small_cache import SPLITS, STATED, small_content

GROUPS = {f"images/{s}/groups": [f"ü{row // 3}" for row in range(n)] for s, n in SPLITS.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_cache(tmp_path / "grouped.h5", small_content() | GROUPS, **STATED)
    return tmp_path / "grouped.h5"


def test_they_are_read_and_are_no_content(path: Path, tmp_path: Path) -> None:
    """content_sha256 stays, as other readers compute it; everything else too."""
    write_cache(tmp_path / "plain.h5", small_content(), **STATED)
    with FeatureCache(path) as cache, FeatureCache(tmp_path / "plain.h5") as plain:
        assert cache.groups("test") == GROUPS["images/test/groups"]
        assert plain.groups("test") is None
        assert cache.content_sha256 == plain.content_sha256
        cache.verify()
    found, expected = datasets(path), datasets(tmp_path / "plain.h5")
    del found["metadata"], expected["metadata"]
    assert found.keys() - expected.keys() == GROUPS.keys()
    assert {name: found[name] for name in expected} == expected


def test_inspect_counts_groups_and_names_classes_without_images(path: Path, tmp_path: Path) -> None:
    facts = dict(inspect(InspectConfig(path)))
    assert facts["images/test"] == "10 images in 4 groups, 3–4 per class, width 4"
    content = small_content() | {"images/test/labels": [0, 2] * 5}
    write_cache(tmp_path / "lacking.h5", content, **STATED)
    facts = dict(inspect(InspectConfig(tmp_path / "lacking.h5")))
    assert facts["images/test"] == "10 images, 0–5 per class (none of 'dog'), width 4"


def test_an_empty_name_is_refused(path: Path, tmp_path: Path) -> None:
    empty = {"images/test/groups": ["a"] * 9 + [""]}
    with pytest.raises(UserError, match="images/test/groups hold an empty name; name the group"):
        write_cache(tmp_path / "x.h5", small_content() | empty, **STATED)
    names = np.array(["ü".encode()] * 9 + [b""], h5py.string_dtype("utf-8", 4))
    rewrite(path, lambda file, _: put(file, "images/test/groups", names))
    with (
        FeatureCache(path) as cache,
        pytest.raises(UserError, match="groups holds an empty name"),
    ):
        cache.groups("test")


def test_a_draw_takes_no_validation_image_of_a_group_that_it_trains_on() -> None:
    """The training images are those that are drawn without groups."""
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 3, 60), rng.integers(0, 3, 40)
    groups = rng.integers(0, 30, 60), rng.integers(0, 30, 40)
    for seed in range(10):
        plain = draw_few_shot(train, val, shots=4, seed=seed)
        drawn = draw_few_shot(train, val, shots=4, seed=seed, groups=groups)
        assert drawn.support.tolist() == plain.support.tolist()
        assert np.intersect1d(groups[1][plain.validation], groups[0][plain.support]).size
        assert not np.intersect1d(groups[1][drawn.validation], groups[0][drawn.support]).size
        free = ~np.isin(groups[1], groups[0][drawn.support])
        counts = np.bincount(val[free], minlength=3)
        own = np.bincount(val[drawn.validation], minlength=3)
        assert own.tolist() == np.minimum(counts, 4).tolist()
    apart = np.arange(60), np.arange(60, 100)
    same = draw_few_shot(train, val, shots=4, seed=3, groups=apart)
    assert (
        same.validation.tolist() == draw_few_shot(train, val, shots=4, seed=3).validation.tolist()
    )
