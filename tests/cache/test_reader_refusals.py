"""Every file that cannot be trusted is refused, with a sentence that says what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.reader import FeatureCache
from tests.cache.small_cache import make_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "features.h5")


def read_all(path: Path) -> list[Any]:
    with FeatureCache(path) as cache:
        images = [cache.images(split) for split in cache.splits]
        arrays = [array for i in images for array in (i.features.tobytes(), i.labels.tobytes())]
        return [*arrays, *(i.ids for i in images), cache.text_features().tobytes(),
                cache.class_names, cache.templates, cache.logit_scale, cache.splits]  # fmt: skip


def refused(path: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_all(path)
    sentence = str(caught.value)
    assert path.name in sentence
    assert "\n" not in sentence
    assert any(advice in sentence for advice in ("extract", "has no"))


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.h5", "no feature cache at .*nothing.h5; `extract` makes one")


@pytest.mark.parametrize("content", [b"", b"just text\n", b"\x89HDF\r\n\x1a\n" + b"\0" * 50])
def test_something_else_than_hdf5(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.h5").write_bytes(content)
    refused(tmp_path / "text.h5", "cannot be read as HDF5")


def test_a_folder(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be read as HDF5")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(cache: Path, share: float) -> None:
    data = cache.read_bytes()
    cache.write_bytes(data[: int(len(data) * share)])
    refused(cache, "truncated")


def test_hdf5_of_somebody_else(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.arange(3)
    refused(tmp_path / "other.h5", "is an HDF5 file but not a CLIP feature cache")


Change = Callable[[h5py.File], None]


def attribute(name: str, value: Any) -> Change:
    return lambda file: file.attrs.__setitem__(name, value)


def without_attribute(name: str) -> Change:
    return lambda file: file.attrs.__delitem__(name)


def without(path: str) -> Change:
    return lambda file: file.__delitem__(path)


def replaced(path: str, value: Any, **options: Any) -> Change:
    def change(file: h5py.File) -> None:
        del file[path]
        file.create_dataset(path, data=value, **options)

    return change


def set_value(path: str, place: Any, value: Any) -> Change:
    return lambda file: file[path].__setitem__(place, value)


def train_became_a_dataset(file: h5py.File) -> None:
    del file["images/train/ids"]
    file.create_group("images/train/ids")


FIXED = h5py.string_dtype("utf-8", 8)
REFUSALS: dict[str, tuple[Change, str]] = {
    "other format": (attribute("format", "other"), "not a CLIP feature cache"),
    "format is a list": (attribute("format", ["clip-feature-cache"] * 2), "not a CLIP feature"),
    "newer version": (
        attribute("format_version", 2),
        "format version 2, this program reads version 1; update clip-adapter",
    ),
    "older version": (attribute("format_version", 0), "format version 0"),
    "version is a list": (attribute("format_version", [1, 1]), "format version"),
    "no version": (without_attribute("format_version"), "format version None"),
    "not complete": (attribute("complete", False), "incomplete .marked so"),
    "no complete": (without_attribute("complete"), "incomplete .complete"),
    "no backbone": (without_attribute("backbone"), "incomplete .backbone"),
    "no preprocess": (without_attribute("preprocess"), "incomplete .preprocess"),
    "no dataset": (without_attribute("dataset"), "incomplete .dataset"),
    "no logit scale": (without_attribute("logit_scale"), "incomplete .logit_scale"),
    "no logit bias": (without_attribute("logit_bias"), "incomplete .logit_bias"),
    "backbone not JSON": (attribute("backbone", "{"), "attribute backbone is not a JSON object"),
    "backbone a number": (attribute("backbone", 3), "attribute backbone is not a JSON object"),
    "dataset a JSON list": (attribute("dataset", "[1]"), "attribute dataset is not a JSON object"),
    "preprocess not JSON": (attribute("preprocess", "x"), "attribute preprocess is not a JSON"),
    "arguments not JSON": (attribute("arguments", "x"), "attribute arguments is not a JSON object"),
    "scale NaN": (attribute("logit_scale", np.nan), "logit_scale is not a finite number"),
    "scale a string": (attribute("logit_scale", "100"), "logit_scale is not a finite number"),
    "bias infinite": (attribute("logit_bias", np.inf), "logit_bias is not a finite number"),
    "content hash": (attribute("content_sha256", "abc"), "content_sha256 is not a SHA-256"),
    "no images": (without("images"), "lacks images"),
    "no features": (without("images/train/features"), "lacks images/train/features"),
    "no labels": (without("images/test/labels"), "lacks images/test/labels"),
    "no ids": (without("images/test/ids"), "lacks images/test/ids"),
    "no text": (without("text"), "lacks text/features, text/class_names, text/templates"),
    "no templates": (without("text/templates"), "lacks text/templates"),
    "ids a group": (train_became_a_dataset, "lacks images/train/ids"),
    "labels too few": (
        replaced("images/train/labels", np.zeros(3, np.int32)),
        "features, labels and ids of train disagree",
    ),
    "labels of two dimensions": (
        replaced("images/train/labels", np.zeros((22, 1), np.int32)),
        "images/train/labels has the shape",
    ),
    "features of two dimensions": (
        replaced("images/train/features", np.zeros((22, 4), np.float32)),
        "images/train/features has the shape",
    ),
    "no rows": (
        replaced("images/train/features", np.zeros((1, 0, 4), np.float32)),
        r"images/train/features has the shape \(1, 0, 4\)",
    ),
    "no views": (
        replaced("images/train/features", np.zeros((0, 22, 4), np.float32)),
        "images/train/features has the shape",
    ),
    "features of another width": (
        replaced("images/test/features", np.zeros((1, 10, 5), np.float32)),
        "image and text features of test differ in width",
    ),
    "float64 features": (
        replaced("images/test/features", np.zeros((1, 10, 4))),
        "images/test/features has a type that the format does not know",
    ),
    "int64 labels, one of which int32 would wrap": (
        replaced("images/test/labels", np.full(10, 2**32)),
        "images/test/labels has a type",
    ),
    "float labels": (replaced("images/test/labels", np.zeros(10)), "images/test/labels has a type"),
    "numbers for ids": (replaced("images/test/ids", np.arange(10)), "images/test/ids has a type"),
    "strings without checksum": (
        replaced("images/test/ids", ["a"] * 10),
        "images/test/ids has a type",
    ),
    "too many classes": (
        replaced("text/class_names", np.array([b"a"] * 4).astype(FIXED)),
        r"text features \(3, 2, 4\) disagree",
    ),
    "too few templates": (
        replaced("text/templates", np.array([b"a"]).astype(FIXED)),
        r"text features \(3, 2, 4\) disagree",
    ),
    "class names not UTF-8": (
        replaced("text/class_names", np.array([b"a", b"b", b"\xff"]).astype(FIXED)),
        "text/class_names is not UTF-8",
    ),
    "ids not UTF-8": (
        replaced("images/test/ids", np.array([b"\xff"] * 10).astype(FIXED)),
        "images/test/ids is not UTF-8",
    ),
    "NaN": (
        set_value("images/train/features", (0, 3, 1), np.nan),
        "images/train/features holds values that are not finite",
    ),
    "infinity": (
        set_value("text/features", (0, 1, 1), np.inf),
        "text/features holds values that are not finite",
    ),
    "label too large": (
        set_value("images/train/labels", 5, 3),
        "labels of train lie outside the 3 classes",
    ),
    "label negative": (
        set_value("images/test/labels", 0, -1),
        "labels of test lie outside the 3 classes",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(cache: Path, name: str) -> None:
    change, words = REFUSALS[name]
    read_all(cache)
    with h5py.File(cache, "r+") as file:
        change(file)
    refused(cache, words)


@pytest.mark.parametrize(
    "path", ["images/train/features", "images/train/labels", "images/train/ids", "text/features",
             "text/class_names", "text/templates"]
)  # fmt: skip
def test_a_damaged_chunk(cache: Path, path: str) -> None:
    with h5py.File(cache) as file:
        place = file[path].id.get_chunk_info(0).byte_offset
    data = bytearray(cache.read_bytes())
    data[place] ^= 1
    cache.write_bytes(data)
    refused(cache, f"{path} is damaged .its checksum does not match")


def test_damaged_metadata_never_changes_what_is_read(cache: Path) -> None:
    """One wrong byte in the root group's header or the superblock: refused, or of no effect."""
    data = cache.read_bytes()
    whole = read_all(cache)
    refusals = 0
    for place in range(0, 400, 3):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        cache.write_bytes(damaged)
        try:
            assert read_all(cache) == whole
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 50


def test_a_split_that_is_not_there(cache: Path) -> None:
    with (
        FeatureCache(cache) as opened,
        pytest.raises(UserError, match="has no val split, only train, test"),
    ):
        opened.images("val")


def test_what_the_reader_does_not_know_is_ignored(cache: Path) -> None:
    whole = read_all(cache)
    with h5py.File(cache, "r+") as file:
        file.attrs["more"] = "x"
        file["images/extra/features"] = np.zeros(3)
        file["text/more"] = np.zeros(3)
        del file.attrs["arguments"], file.attrs["content_sha256"]
    assert read_all(cache) == whole
    with FeatureCache(cache) as opened:
        assert opened.arguments == {}
