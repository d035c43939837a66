"""What the writer is given, the reader gives back."""

import hashlib
import json
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

from clip_adapter.cache import writer
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from tests.cache.rewriting import datasets
from tests.cache.small_cache import (
    BACKBONE,
    DATASET,
    STATED,
    images,
    make_cache,
    stated,
)
from tests.cache.small_cache import small_content as content

FORMAT_PAGE = Path(writer.__file__).with_name("FORMAT.md")
PAGE = FORMAT_PAGE.read_text()


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
        shape = (views if name == "train" else 1, rows, dim)
        splits[name] = images(name, some(*shape), labels, ids=several(rows))
    names = st.lists(odd_strings, min_size=classes, max_size=classes, unique=True).filter(any)
    return {
        "text/features": some(classes, templates, dim),
        "text/class_names": draw(names),
        "text/templates": several(templates),
        **{path: values for split in splits.values() for path, values in split.items()},
    }


@settings(max_examples=60, deadline=None)
@given(caches(), st.floats(1e-3, 200), st.floats(-20, 20))
def test_round_trip(content: dict, scale: float, bias: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.h5"
        dim = content["text/features"].shape[2]
        write_cache(path, content, **stated(dim, logit_scale=scale, logit_bias=bias))
        with FeatureCache(path) as cache:
            assert {f"images/{split}/ids" for split in cache.splits} <= content.keys()
            assert len(cache.splits) == sum(path.endswith("/ids") for path in content)
            for split in cache.splits:
                features, labels, ids = (
                    content[f"images/{split}/{name}"] for name in ("features", "labels", "ids")
                )
                found = cache.images(split)
                assert cache.shape(split) == found.features.shape
                assert (found.features.dtype, found.labels.dtype) == (np.float32, np.int32)
                np.testing.assert_array_equal(found.features, features)
                assert found.labels.tolist() == labels
                assert found.ids == ids
            np.testing.assert_array_equal(cache.text_features(), content["text/features"])
            assert cache.class_names == content["text/class_names"]
            assert cache.templates == content["text/templates"]
            assert (cache.logit_scale, cache.logit_bias) == (scale, bias)
            assert (cache.backbone["name"], cache.dataset) == ("toy-clip", DATASET)
            assert (cache.preprocess, cache.arguments) == ({"size": 8}, STATED["arguments"])


ONES = np.ones((1, 3, 4), np.float32)
BROKEN = {size: ONES * np.array([[[1], [size], [1]]], np.float32) for size in
          (0, 1e-20, 9e-7, 2e6, 1e18, np.nan, np.inf)}  # fmt: skip
# What a cache may not hold, and what the sentence or the error says.
REFUSALS: list[tuple[dict, str]] = [
    *(
        (
            {path: ["a", bad, "c"][: 2 if path == "text/templates" else 3]},
            "cannot be stored",
        )
        for bad in ("a\0", "\0", "a\0b", "caf\udce9.jpg")
        for path in ("text/class_names", "text/templates", "images/val/ids")
    ),
    ({"images/val/skipped": ["\0"]}, "cannot be stored"),
    *(
        ({"images/val/features": BROKEN[size]}, words)
        for size, words in (
            (0, "features of 'val/1' are zero"),
            *((size, "'val/1' are far smaller or larger") for size in (1e-20, 9e-7, 2e6, 1e18)),
            *((size, "'val/1' are not finite") for size in (np.nan, np.inf)),
        )
    ),
    ({"images/val/features": ONES.astype(float)}, "features are float64"),
    ({"images/val/features": ONES[:, :2]}, "images/val/labels has the shape"),
    ({"images/val/features": np.tile(ONES, (2, 1, 1))}, "has several views"),
    ({"images/val/features": np.ones((1, 3, 5), "f4")}, "images/val/features has the"),
    ({"images/val/labels": [0]}, "images/val/labels has the shape"),
    ({"images/val/labels": [0, 1, 3]}, "images/val/labels are outside the 3 classes"),
    ({"images/val/labels": [0, 1, -1]}, "images/val/labels are outside the 3 classes"),
    ({"text/templates": ["one"]}, "text/templates has the shape"),
    (images("val", ONES[:, :0], skipped=["x"]), "val split has no image that could be"),
    ({"text/class_names": [""] * 3}, "its 3 class names are all ''; name the classes"),
    ({"text/class_names": ["a"] * 3}, "its 3 class names are all 'a'; name the classes"),
    ({"images/val/pre_projection": ONES}, "lacks images/train/pre_projection"),
    ({"images/val/labels": [0.0, 1.5, 0.0]}, "images/val/labels holds something else than whole"),
    ({"images/val/labels": [2**32, 1, 0]}, "images/val/labels holds numbers beyond int32"),
    ({"images/val/labels": [True, False, True]}, "images/val/labels holds something else than"),
    ({"images/val/ids": [1, 2, 3]}, "images/val/ids holds something else than strings"),
    ({"images/test/labels": np.zeros(0, int)}, "test split has no image that could be read"),
    ({"images/val/features_hashes": [1, 2, 3]}, "is no dataset that FORMAT.md has, or is computed"),
]


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_what_no_cache_may_hold_is_refused(tmp_path: Path, number: int) -> None:
    path = make_cache(tmp_path / "features.h5")
    earlier = path.read_bytes()
    others, words = REFUSALS[number]
    with pytest.raises(UserError, match=words):
        write_cache(path, content() | images("val", ONES) | others, **STATED, force=True)
    assert path.read_bytes() == earlier
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.h5"]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"backbone": BACKBONE | {"embed_dim": 5}}, "features of 4 numbers and embed"),
        ({"dataset": {"name": object()}}, "its metadata: Object of type object is not JSON"),
        ({"dataset": {"name": "x"}}, "Cannot write .*: dataset lacks source, splits"),
        ({"logit_scale": -1}, "logit_scale is -1.0, not a number from"),
        ({"logit_scale": float("nan")}, "Cannot write .*: its metadata: .* not JSON compliant"),
    ],
)
def test_metadata_that_no_cache_may_have_is_refused(
    tmp_path: Path, others: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        write_cache(tmp_path / "features.h5", content(), **STATED | others)
    assert not list(tmp_path.iterdir())


def test_a_split_is_whole_or_not_there(tmp_path: Path) -> None:
    lone = content() | {"images/val/ids": ["alone"]}
    with pytest.raises(UserError, match="it lacks images/val/features, images/val/labels"):
        write_cache(tmp_path / "features.h5", lone, **STATED)
    assert not list(tmp_path.iterdir())


def test_a_file_is_overwritten_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "mine.h5").write_text("a thesis")
    with pytest.raises(UserError, match=r"mine\.h5 exists; choose another name, or force"):
        write_cache(tmp_path / "mine.h5", content(), **STATED)
    assert (tmp_path / "mine.h5").read_text() == "a thesis"
    with pytest.raises(UserError, match="there is no such folder"):
        write_cache(tmp_path / "nowhere" / "features.h5", content(), **STATED)


def test_nothing_stands_under_the_final_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "features.h5"
    renamed = []
    real = Path.replace

    def watch(self: Path, target: Path) -> Path:
        renamed.append(datasets(self))
        assert not path.exists()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    make_cache(path)
    assert [len(found) for found in renamed] == [14]
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.h5"]


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
        on_the_page = set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE))
        assert set(metadata) == on_the_page - {"backbone2"}  # of one encoder
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
