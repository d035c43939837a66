"""Images that belong together: where groups come from, and that no split parts them."""

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.cache.parts import merge_parts
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.datasets.splitting import grouped_parts
from clip_adapter.extract.outcome import join_parts
from clip_adapter.extract.run import extract
from clip_adapter.listener import Listener
from tests.cache.rewriting import datasets
from tests.extract.data_set_archives import opened, refused, sizes, write_image


class Told(Listener):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def grouped(labels: list[int], groups: list[str]) -> Split:
    def read(row: int) -> Any:
        raise AssertionError

    ids = [f"{row}.jpg" for row in range(len(labels))]
    return Split(ids, np.array(labels, np.int32), read, "made up", groups=groups)


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.3), (0.8, 0.1, 0.1), (0.7, 0.3)])
def test_no_group_is_parted_and_every_class_is_trained_on_and_tested(
    shares: tuple[float, ...],
) -> None:
    """Over random sizes, from two groups a class on; parts are as large as they can be."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels, groups = [], []
        for label in range(4):
            for number in range(rng.integers(2, 12)):
                count = int(rng.integers(1, 9))
                labels += [label] * count
                groups += [f"{label}/{number}"] * count
        order = rng.permutation(len(labels)).tolist()
        labels, groups = [labels[row] for row in order], [groups[row] for row in order]
        parts = grouped_parts(grouped(labels, groups), shares, seed)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
        held = [{groups[row] for row in part.tolist()} for part in parts]
        assert sum(map(len, held)) == len(set(groups))
        for part, share in zip(parts, shares, strict=True):
            own = Counter(labels[row] for row in part.tolist())
            if part is parts[0] or part is parts[-1]:
                assert len(own) == 4
            largest = max(Counter(groups).values())
            for label in range(4):
                # Two groups a class at least, of which each part takes one, whatever its share.
                assert abs(own[label] - share * labels.count(label)) <= 2 * largest + 1


def test_groups_of_two_classes_and_the_seed_decide() -> None:
    """A group that both classes have lies on one side; with other seeds others are tested."""
    labels = [0, 1] * 40
    groups = [f"p{row // 4}" for row in range(80)]
    tested = []
    for seed in (0, 0, 1):
        train, val, test = grouped_parts(grouped(labels, groups), (0.5, 0.2, 0.3), seed)
        assert [len(train), len(val), len(test)] == [40, 16, 24]
        tested.append({groups[row] for row in test.tolist()})
        assert all(Counter(groups[row] for row in test.tolist())[name] == 4 for name in tested[-1])
    assert tested[0] == tested[1] != tested[2]


def folder_of(root: Path, groups: int = 4, images: int = 3, loose: int = 0) -> Path:
    value = 0
    for name in ("cat", "eel"):
        paths = [f"{name}/{g}/{n}.jpg" for g in range(groups) for n in range(images)]
        for path in [*paths, *(f"{name}/{n}.jpg" for n in range(loose))]:
            write_image(root / path, value)
            value += 1
    return root


def test_the_folder_within_the_class_is_the_group(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", loose=2)
    assert opened(f"folder:{root}").splits["train"].groups is None
    data = opened(f"folder:{root}", group="parent")
    assert sizes(data).keys() == {"train", "val", "test"}
    where = defaultdict(set)
    for name, split in data.splits.items():
        for path, group in zip(split.ids, split.groups or (), strict=True):
            where[group].add(name)
            inner = path.split("/")[1:-1]
            assert group == (inner[0] if inner else path)  # of the same name in both classes
    assert set(where) == {"0", "1", "2", "3", "cat/0.jpg", "cat/1.jpg", "eel/0.jpg", "eel/1.jpg"}
    assert all(len(own) == 1 for own in where.values())
    assert data.splits["val"].origin.endswith("stratified by class, groups kept together, seed 0")
    alone = opened(f"images:{root}", group="parent", class_names=("a", "b"))
    groups = alone.splits["unlabelled"].groups or ()
    assert {"cat/0", "eel/0", "cat"} <= set(groups)


def test_splits_that_were_divided_elsewhere_are_told(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder_of(tmp_path / "photos" / split, groups=2)
    write_image(tmp_path / "photos" / "unlabelled" / "0" / "x.jpg")
    told = Told()
    config = ExtractConfig(
        dataset=f"folder:{tmp_path / 'photos'}", val=0.0, group="parent", out=tmp_path / "f.h5"
    )
    extract(config, told)
    (warning,) = [one for one in told.warnings if "group" in one]
    assert "2 groups in more than one split ('0' is in train and test)" in warning
    with FeatureCache(tmp_path / "f.h5") as cache:
        assert cache.groups("test") == ["0"] * 3 + ["1"] * 3 + ["0"] * 3 + ["1"] * 3
        assert cache.groups("unlabelled") == ["0"]


def table(folder: Path, header: str, rows: list[str]) -> Path:
    path = folder / "t.csv"
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    """path, label, patient; two images of each of ten patients, in folders by day."""
    listed = []
    for number in range(20):
        path = f"day{number % 5}/{number}.jpg"
        write_image(tmp_path / path, number)
        listed.append(f"{path},{'ab'[number // 2 % 2]},p{number // 2}")
    return listed


def test_columns_of_a_table(tmp_path: Path, rows: list[str]) -> None:
    plain = table(tmp_path, "path,label,group", rows)
    data = opened(f"csv:{plain}")
    assert data.remarks == []
    where = {g: n for n, s in data.splits.items() for g in s.groups or ()}
    assert sorted(where) == sorted(f"p{n}" for n in range(10))
    assert sum(len(set(s.groups or ())) for s in data.splits.values()) == 10
    named = table(tmp_path, "path,label,Patient", rows)
    other = opened(f"csv:{named}", group="patient")
    assert {n: list(s.ids) for n, s in other.splits.items()} == {
        n: list(s.ids) for n, s in data.splits.items()
    }
    assert opened(f"csv:{named}").splits["train"].groups is None
    days = opened(f"csv:{table(tmp_path, 'path,label,group', rows)}", group="parent")
    assert {g for s in days.splits.values() for g in s.groups or ()} == {
        f"day{n}" for n in range(5)
    }
    assert "1 column that no one reads: 'group'" in days.remarks[0]


def test_what_groups_cannot_be(tmp_path: Path, rows: list[str]) -> None:
    spec = f"csv:{table(tmp_path, 'path,label,group', rows)}"
    refused("has no column site in its first row", spec, group="site")
    refused("folders have no columns; give parent", f"folder:{tmp_path}", group="site")
    refused("--group is for folder:, images: and csv:", "digits", group="parent")
    table(tmp_path, "path,label,group", [*rows[:-1], rows[-1].replace("p9", " ")])
    refused("line 21: group, an image's group, is empty; fill it in", spec)
    table(tmp_path, "path,label,group", [row.rsplit(",", 1)[0] + ",all" for row in rows])
    refused("All images are of one group, 'all', so that nothing can be divided", spec)
    only = [row.rsplit(",", 1)[0] + (",x" if ",a," in row else f",{row[-2:]}") for row in rows]
    table(tmp_path, "path,label,group", only)
    refused("Class 'a' has 10 images in 1 group, too few .* add groups to it", spec)


def test_they_stand_in_the_cache_and_parts_carry_them(tmp_path: Path, rows: list[str]) -> None:
    path = table(tmp_path, "path,label,patient", rows)
    config = ExtractConfig(
        dataset=f"csv:{path}", group="patient", out=tmp_path / "whole.h5", batch_size=4
    )
    extract(config)
    parts = [tmp_path / f"{number}.h5" for number in (1, 2)]
    for number, out in enumerate(parts, 1):
        extract(replace(config, out=out, shard=f"{number}/2"))
    merge_parts(parts, tmp_path / "merged.h5")
    assert datasets(tmp_path / "merged.h5") == datasets(tmp_path / "whole.h5")
    told = Told()
    join_parts(parts, tmp_path / "joined.h5", told)
    assert not told.warnings
    with FeatureCache(tmp_path / "whole.h5") as cache:
        of_image = {row.split(",")[0]: row.split(",")[2] for row in rows}
        for split in cache.splits:
            assert cache.groups(split) == [of_image[name] for name in cache.ids(split)]
        assert cache.arguments["group"] == "patient"
    plain = extract(replace(config, group=None, out=tmp_path / "plain.h5"))
    with FeatureCache(plain) as cache:
        assert "group" not in cache.arguments and cache.groups("train") is None


def test_an_update_follows_the_table(tmp_path: Path, rows: list[str], encoded: list[str]) -> None:
    path = table(tmp_path, "path,label,group,split", [f"{row},train" for row in rows])
    config = ExtractConfig(dataset=f"csv:{path}", out=tmp_path / "f.h5", val=0.0, test=0.5)
    extract(config)
    moved = [f"{row},train" for row in rows]
    moved[0] = moved[0].replace("p0", "p1")
    table(tmp_path, "path,label,group,split", moved)
    with pytest.raises(UserError, match="1 image moved to another group"):
        extract(config)
    encoded.clear()
    extract(replace(config, update=True))
    assert encoded == []
    with FeatureCache(tmp_path / "f.h5") as cache:
        pairs = [zip(cache.ids(s), cache.groups(s) or (), strict=True) for s in cache.splits]
    own = dict(pair for split in pairs for pair in split)
    assert own["day0/0.jpg"] == "p1" and own["day1/1.jpg"] == "p0"
