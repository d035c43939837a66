"""Parts that lie, are damaged or do not belong together end in a sentence."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.parts import merge_parts
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from tests.cache.rewriting import put, rewrite
from tests.cache.small_cache import CLASSES, make_cache, make_parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return make_parts(tmp_path)


def merged(parts: list[Path]) -> Path:
    return parts[0].with_name("features.h5")


def refused(parts: list[Path], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        merge_parts(parts, merged(parts))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400 + 2 * len(str(parts[0]))
    assert not merged(parts).exists()


def test_they_join(parts: list[Path]) -> None:
    class_names, tallies, several = merge_parts(parts, merged(parts))
    assert (class_names, several) == (CLASSES, None)
    assert (tallies["train"].images, len(tallies["train"].skipped)) == (7, 2)
    with FeatureCache(merged(parts)) as cache:
        assert cache.skipped == 2
        assert cache.ids("train")[-1] == "train/8"


def stated(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda file, document: change(document))


def values(name: str, kept: np.ndarray) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda file, document: put(file, name, kept))


LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "10^10 parts": (
        stated(lambda d: d["part"].update(of=10**10)),
        "part.of is 10+, not an integer",
    ),
    "many parts": (stated(lambda d: d["part"].update(of=10**5)), "number of parts differ"),
    "part 0": (stated(lambda d: d["part"].update(index=0)), "part.index is 0, not an integer"),
    "part 3 of 2": (stated(lambda d: d["part"].update(index=3)), "not a part of a cache"),
    "text": (stated(lambda d: d["part"].update(index="2")), "part.index is '2', not an integer"),
    "no rows": (stated(lambda d: d["part"].pop("rows")), "part lacks rows"),
    "rows of two": (
        stated(lambda d: d["part"]["rows"].update(train=[0, 1])),
        "train is .*, not a list",
    ),
    "no such split": (
        stated(lambda d: d["part"]["rows"].update({"\x1b[2J": [0, 0, 0]})),
        "not a part of a cache",
    ),
    "rows of no split": (stated(lambda d: d["part"].update(rows={})), "train images and states"),
    "more rows": (
        stated(lambda d: d["part"]["rows"].update(train=[5, 10**12, 10**12])),
        "accounts for 4 of its 999999999995 train images",
    ),
    "other rows": (
        stated(lambda d: d["part"]["rows"].update(train=[4, 8, 9])),
        "do not meet in the train split",
    ),
    "another total": (
        stated(lambda d: d["part"]["rows"].update(train=[5, 9, 10])),
        "do not meet in the train split",
    ),
    "templates": (
        stated(lambda d: d.update(templates=[])),
        "templates is .., not a list",
    ),
    "no templates": (stated(lambda d: d.pop("templates")), "it lacks templates"),
    "escapes": (
        stated(lambda d: d["arguments"].update({"\x1b[2J\n": 1})),
        r"\\x1b\[2J\\n differ",
    ),
    "a label outside": (values("images/train/labels", np.full(3, 3, np.int32)), "outside the 3"),
    "a skipped label": (
        values("images/train/skipped_labels", np.full(1, 99, np.int32)),
        "images/train/skipped_labels holds labels outside the 3 classes",
    ),
    "other kinds": (
        values("images/train/features", np.ones((1, 3, 4), np.float16)),
        "hold train images of different kinds",
    ),
    "digests in one": (
        lambda path: rewrite(path, lambda file, _: file.__delitem__("images/train/digests")),
        "digests of train are in some parts only",
    ),
    "text in both": (
        lambda path: rewrite(path, text_of_its_own),
        "text features or a projection, which only part 1 has",
    ),
}


def text_of_its_own(file: h5py.File, document: dict[str, Any]) -> None:
    fixed = h5py.string_dtype("utf-8", 4)
    put(file, "text/features", np.ones((1, 1, 4), np.float32))
    put(file, "text/class_names", np.array([b"a"]).astype(fixed))
    put(file, "text/templates", np.array([b"{}"]).astype(fixed))
    for name in ("features", "class_names", "templates"):
        document["datasets_sha256"][f"text/{name}"] = "0" * 64


@pytest.mark.parametrize("name", LIES)
def test_lies(parts: list[Path], name: str) -> None:
    lie, words = LIES[name]
    lie(parts[1])
    refused(parts, words)


def test_every_part_has_to_be_there_once(parts: list[Path], tmp_path: Path) -> None:
    one, two = parts
    copy = tmp_path / "copy.h5"
    copy.write_bytes(one.read_bytes())
    for named, words in (
        ([one], "Not all 2 parts are there; name part 2 as well"),
        ([two], "Not all 2 parts are there; name part 1 as well"),
        ([one, two, two], r"2\.h5 and .*2\.h5 are both part 2 of 2; name every part once"),
        ([one, copy], r"1\.h5 and .*copy\.h5 are both part 1 of 2"),
    ):
        refused(named, words)


def test_many_missing_parts_are_named_briefly(parts: list[Path]) -> None:
    for path in parts:
        rewrite(path, lambda file, document: document["part"].update(of=999_999))
    refused(parts, r"Not all 999999 parts are there; name part 3, 4, .*, 22 and 999977 more as")


def test_part_1_without_its_text(parts: list[Path]) -> None:
    rewrite(parts[0], lambda file, document: file.__delitem__("text"))
    refused(parts, "lacks the text features that part 1 has")


def test_what_is_no_part(parts: list[Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "is a named pipe"),
        (tmp_path / "nothing", "There is no part at"),
        (make_cache(tmp_path / "cache.h5"), "is no part of a cache"),
        (Path(__file__), "cannot be read as HDF5"),
    ):
        refused([parts[0], path], words)
