"""What the writer is given, the reader gives back."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import clip_adapter.cache.writer
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import CacheWriter
from clip_adapter.errors import UserError
from tests.cache.small_cache import BACKBONE, DATASET

FORMAT_PAGE = Path(clip_adapter.cache.writer.__file__).with_name("FORMAT.md")
PAGE = FORMAT_PAGE.read_text()
DESCRIPTION = {"preprocess": {}, "dataset": DATASET}


def description(dim: int) -> dict:
    return DESCRIPTION | {"backbone": BACKBONE | {"embed_dim": dim}}


# Everything but what the format excludes: NUL, and surrogates, which are not Unicode text.
strings = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
odd_strings = strings | st.sampled_from(["", " ", " a ", "ä" * 40, "\n", "\x85\u2028", "🙂"])


@st.composite
def caches(draw: st.DrawFn) -> dict:
    dim, classes, templates = (draw(st.integers(1, n)) for n in (6, 5, 3))
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    width = 8 * np.dtype(dtype).itemsize
    values = st.floats(width=width, allow_nan=False, allow_infinity=False)

    def some(*shape: int) -> np.ndarray:
        found = draw(arrays.arrays(dtype, shape, elements=values))
        exact = np.abs(found.astype(np.float64))  # 1e-6 is larger than what it is rounded to
        found[exact > 1e6] = 1e4
        found[exact.max(axis=-1) < 1e-6] = 1  # a feature has a direction, and a usual size
        return found

    def several(count: int) -> list[str]:
        return draw(st.lists(odd_strings, min_size=count, max_size=count))

    views = draw(st.integers(1, 3))
    splits = {}
    for name in draw(st.sets(st.sampled_from(["train", "val", "test"]), min_size=1)):
        rows = draw(st.integers(1, 9))
        labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
        shape = (rows, views if name == "train" else 1, dim)
        splits[name] = (some(*shape), labels, several(rows))
    return {
        "views": views,
        "splits": splits,
        "text": some(classes, templates, dim),
        "class_names": draw(
            st.lists(odd_strings, min_size=classes, max_size=classes, unique=True).filter(any)
        ),
        "templates": several(templates),
        "batch": draw(st.integers(1, 9)),
        "scale": draw(st.floats(1e-3, 200)),
        "bias": draw(st.floats(-20, 20)),
    }


@settings(max_examples=60, deadline=None)
@given(caches())
def test_round_trip(given: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.h5"
        with CacheWriter(path, {"a": 1}, views=given["views"]) as writer:
            for row, name in enumerate(given["class_names"]):
                writer.append_text(given["text"][row : row + 1], [name])
            for split, (features, labels, ids) in given["splits"].items():
                for start in range(0, len(ids), given["batch"]):
                    batch = slice(start, start + given["batch"])
                    writer.append_images(split, features[batch], labels[batch], ids[batch])
            writer.finish(
                **description(given["text"].shape[2]),
                templates=given["templates"],
                logit_scale=given["scale"],
                logit_bias=given["bias"],
            )
        with FeatureCache(path) as cache:
            assert set(cache.splits) == set(given["splits"])
            for split, (features, labels, ids) in given["splits"].items():
                images = cache.images(split)
                assert cache.shape(split) == images.features.shape
                assert images.features.dtype == np.float32
                np.testing.assert_array_equal(images.features, features.transpose(1, 0, 2))
                assert images.labels.tolist() == labels
                assert images.labels.dtype == np.int32
                assert images.ids == ids
            np.testing.assert_array_equal(cache.text_features(), given["text"])
            assert cache.class_names == given["class_names"]
            assert cache.templates == given["templates"]
            assert (cache.logit_scale, cache.logit_bias) == (given["scale"], given["bias"])
            assert (cache.backbone["name"], cache.dataset) == ("toy-clip", DATASET)
            assert (cache.preprocess, cache.arguments) == ({}, {"a": 1})


@pytest.mark.parametrize("bad", ["a\0", "\0", "a\0b", "caf\udce9.jpg"])
def test_strings_that_the_file_would_not_give_back_are_refused(tmp_path: Path, bad: str) -> None:
    one = np.ones((1, 1, 2), np.float32)
    with CacheWriter(tmp_path / "features.h5", {}, views=1) as writer:
        with pytest.raises(UserError, match="cannot be stored"):
            writer.append_images("train", one, [0], [bad])
        with pytest.raises(UserError, match="cannot be stored"):
            writer.append_images("train", one[:0], [], [], skipped=[bad])
        with pytest.raises(UserError, match="cannot be stored"):
            writer.append_text(one, [bad])
        assert (writer.consumed("train"), writer.text_rows()) == (0, 0)
        writer.append_text(one, ["good"])
        with pytest.raises(UserError, match="cannot be stored"):
            writer.finish(**description(2), templates=[bad], logit_scale=1, logit_bias=0)
    assert not (tmp_path / "features.h5").exists()


def test_features_of_zeros_are_refused(tmp_path: Path) -> None:
    values = np.ones((3, 2, 2), np.float16)
    values[1, 1] = 0
    with CacheWriter(tmp_path / "features.h5", {}, views=2) as writer:
        with pytest.raises(UserError, match="features of 'y' are zero"):
            writer.append_images("train", values, [0, 0, 0], ["x", "y", "z"])
        assert writer.consumed("train") == 0


@pytest.mark.parametrize("size", [1e-20, 9e-7, 2e6, 1e18])
def test_features_of_another_size_are_refused(tmp_path: Path, size: float) -> None:
    values = np.ones((3, 1, 2), np.float32)
    values[1] *= size
    with (
        CacheWriter(tmp_path / "features.h5", {}, views=1) as writer,
        pytest.raises(UserError, match="features of 'y' are far smaller or larger"),
    ):
        writer.append_images("train", values, [0, 0, 0], ["x", "y", "z"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    values = np.ones((3, 1, 2), np.float16)
    values[1, 0, 1] = bad
    with CacheWriter(tmp_path / "features.h5", {}, views=1) as writer:
        with pytest.raises(UserError, match="'y' are not finite"):
            writer.append_images("train", values, [0, 0, 0], ["x", "y", "z"])
        assert writer.consumed("train") == 0


@pytest.mark.parametrize(
    ("shape", "labels", "ids"),
    [((2, 1, 4), [0], ["a"]), ((1, 1, 4), [0, 1], ["a"]), ((1, 2, 4), [0], ["a"])],
)
def test_batches_that_contradict_themselves_are_refused(
    tmp_path: Path, shape: tuple[int, int, int], labels: list[int], ids: list[str]
) -> None:
    with (
        CacheWriter(tmp_path / "features.h5", {}, views=1) as writer,
        pytest.raises(ValueError, match="features of"),
    ):
        writer.append_images("test", np.ones(shape, np.float32), labels, ids)


def test_a_split_in_which_every_image_was_skipped_is_refused(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "features.h5", {}, views=1) as writer:
        writer.append_text(np.ones((1, 1, 2), np.float32), ["a"])
        writer.append_images("val", np.ones((0, 1, 2), np.float32), [], [], skipped=["x", "y"])
        assert writer.consumed("val") == 2
        with pytest.raises(UserError, match="val split has no image that could be read"):
            writer.finish(**description(2), templates=["{}"], logit_scale=1, logit_bias=0)
    assert not (tmp_path / "features.h5").exists()


def foreign_cache(path: Path, dtype: type = np.float16) -> dict[str, np.ndarray]:
    """A cache written with h5py alone, as a stranger would after reading FORMAT.md."""
    rng = np.random.default_rng(0)
    values = {
        "images/train/features": rng.normal(size=(2, 7, 3)).astype(dtype),
        "images/train/labels": np.array([0, 1, 1, 0, 1, 0, 0], np.int32),
        "images/train/ids": np.array([f"bild/ü{i}".encode() for i in range(7)]),
        "text/features": rng.normal(size=(2, 2, 3)).astype(np.float32),
        "text/class_names": np.array([b"Katze ", "狗".encode()]),
        "text/templates": np.array([b"a {}", b""]),
    }
    with h5py.File(path, "w", libver="latest") as file:
        for name, value in values.items():
            kind = value.dtype
            if kind.kind == "S":
                kind = h5py.string_dtype("utf-8", kind.itemsize)
            file.create_dataset(name, data=value.astype(kind), chunks=True, fletcher32=True)
        lists = [name for name in values if not name.endswith("train/features")]
        sums = {name: hashlib.sha256(values[name].tobytes()).hexdigest() for name in lists}
        metadata = {
            "format": "clip-feature-cache",
            "format_version": 2,
            "complete": True,
            "created_at": "2024-01-01T00:00:00+00:00",
            "writer": "somebody else",
            "backbone": BACKBONE | {"embed_dim": 3, "image_size": [8, 16]},
            "preprocess": {},
            "dataset": {"name": "y", "source": "z", "splits": {}},
            "logit_scale": 100,
            "logit_bias": 0,
            "datasets_sha256": sums,
        }
        text = json.dumps(metadata, indent=2).encode()
        stored = np.frombuffer(text, np.uint8)
        file.create_dataset("metadata", data=stored, chunks=True, fletcher32=True)
        file.attrs["format"] = np.bytes_("clip-feature-cache")
        file.attrs["format_version"] = 2
        file.attrs["metadata_sha256"] = np.bytes_(hashlib.sha256(text).hexdigest())
    return values


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_file_written_from_the_specification_alone_is_read(tmp_path: Path, dtype: type) -> None:
    values = foreign_cache(tmp_path / "foreign.h5", dtype)
    digest = hashlib.sha256()
    for name, value in values.items():
        digest.update(f"{name} {value.shape}\n".encode() + value.tobytes())
    with FeatureCache(tmp_path / "foreign.h5") as cache:
        images = cache.images("train")
        np.testing.assert_array_equal(images.features, values["images/train/features"])
        assert images.labels.tolist() == [0, 1, 1, 0, 1, 0, 0]
        assert images.ids[3] == "bild/ü3"
        np.testing.assert_array_equal(cache.text_features(), values["text/features"])
        assert cache.class_names == ["Katze ", "狗"]
        assert cache.templates == ["a {}", ""]
        assert cache.splits == ("train",)
        assert cache.arguments == {}
        assert cache.content_sha256 == digest.hexdigest()


def test_the_written_file_is_what_the_specification_says(digits_cache: Path) -> None:
    digest = hashlib.sha256()
    with h5py.File(digits_cache) as file:
        assert set(file.attrs) == {"format", "format_version", "metadata_sha256"}
        text = file["metadata"][...].tobytes()
        assert file.attrs["metadata_sha256"].decode() == hashlib.sha256(text).hexdigest()
        metadata = json.loads(text)
        assert set(metadata) == set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE))
        documented = set(re.findall(r"`/images/SPLIT/(\w+)`", PAGE))
        for split in ("train", "val", "test"):
            assert {"features", "labels", "ids"} <= set(file[f"images/{split}"]) <= documented
            assert file[f"images/{split}/features"].dtype == np.float32
            assert file[f"images/{split}/labels"].dtype == np.int32
        paths = [f"images/{s}/{n}" for s in ("train", "val", "test") for n in
                 ("features", "labels", "ids")]  # fmt: skip
        paths += ["text/features", "text/class_names", "text/templates"]
        for path in paths:
            assert file[path].fletcher32
            if path.rpartition("/")[2] in ("ids", "class_names", "templates"):
                kind = h5py.check_string_dtype(file[path].dtype)
                assert kind.encoding == "utf-8"
                assert kind.length == max(len(value) for value in file[path][:])
            digest.update(f"{path} {file[path].shape}\n".encode() + file[path][:].tobytes())
        assert metadata["content_sha256"] == digest.hexdigest()
        for path, stated in metadata["datasets_sha256"].items():
            assert stated == hashlib.sha256(file[path][...].tobytes()).hexdigest()
        assert metadata["datasets_sha256"].keys() >= {"images/val/ids", "text/features"}
        assert file["images/train/features"].chunks == (1, 719, 128)


def test_the_reader_on_the_page_runs(digits_cache: Path) -> None:
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example
    finished = subprocess.run(
        [sys.executable, "-c", example[1]], cwd=digits_cache.parent, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    name, accuracy = finished.stdout.split()[0], float(finished.stdout.split()[-1])
    assert name == "glyph-clip"
    assert 0.2 < accuracy < 0.95  # zero-shot: well above chance, well below perfect


GROWING = """
import sys
import numpy as np
from pathlib import Path
from clip_adapter.cache.writer import CacheWriter

batch = 500
for rows in map(int, sys.argv[2:]):  # in one process: its peak after few is part of that after many
    with CacheWriter(Path(sys.argv[1]) / f"{rows}.h5", {}, views=1) as writer:
        writer.append_text(np.ones((2, 1, 80), np.float32), ["a", "b"])
        for start in range(0, rows, batch):
            ids = [f"some/folder/of/images/{row:0400d}.jpg" for row in range(start, start + batch)]
            values = np.ones((batch, 1, 80), np.float32)
            writer.append_images("train", values, [0] * batch, ids)
        backbone = {"name": "b", "pretrained": "p", "weights_sha256": "0" * 64, "embed_dim": 80,
                    "image_size": 8, "quick_gelu": False}
        dataset = {"name": "d", "source": "s", "splits": {}}
        writer.finish(templates=["{}"], backbone=backbone, preprocess={}, dataset=dataset,
                      logit_scale=1, logit_bias=0)
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Keeping the ids or the features of all rows would add 10 MB to 74, keeping none 1."""
    command = [sys.executable, "-c", GROWING, str(tmp_path), "30000", "60000"]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    few, many = map(int, subprocess.check_output(command, env=environment).split())
    assert many < 1.05 * few
