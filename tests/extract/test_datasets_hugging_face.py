"""Data sets that the package `datasets` can read, from local folders."""

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import SourceOptions
from clip_adapter.extract.encoding.images import BadImage
from tests.extract.data_set_archives import grey, image_bytes, refused, sizes, write_image

CLASSES = ["pug", "boxer"]


def save(folder: Path, features: dict[str, Any], **splits: dict[str, list[Any]]) -> Path:
    tables = {
        name: datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        for name, columns in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(folder)
    return folder


def columns(labels: list[int], first: int = 0) -> dict[str, list[Any]]:
    pictures = [{"bytes": image_bytes(first + n, "PNG"), "path": None} for n in range(len(labels))]
    return {"picture": pictures, "breed": labels}


FEATURES = {"picture": datasets.Image(), "breed": datasets.ClassLabel(names=CLASSES)}


def test_columns_are_found_by_type_and_unlabelled_splits_are_not_used(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "dogs",
        FEATURES,
        train=columns([1, 0] * 5, 10),
        validation=columns([0, 1, 1], 50),
        test=columns([-1, -1], 70),
    )
    data = open_dataset(f"hf:{folder}")
    assert data.class_names == CLASSES
    assert sizes(data) == {"train": 8, "val": 2, "test": 3}
    assert data.remarks == ["left out 2 images of the split 'test' without a label."]
    assert list(data.splits["test"].ids) == ["validation/0", "validation/1", "validation/2"]
    assert data.splits["test"].labels.tolist() == [0, 1, 1]
    assert [grey(data.splits["test"].read(row)) for row in range(3)] == [50, 51, 52]
    val = pickle.loads(pickle.dumps(data.splits["val"]))
    assert [f"train/{grey(val.read(row)) - 10}" for row in range(2)] == list(val.ids)


def test_images_are_given_as_stored(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(buffer, "JPEG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    train = {"picture": [stored] * 19 + [None], "breed": [0, 1] * 10}
    data = open_dataset(f"hf:{save(tmp_path / 'cmyk', FEATURES, train=train)}")
    for split in data.splits.values():
        for row, name in enumerate(split.ids):
            if name == "train/19":
                with pytest.raises(BadImage):
                    split.read(row)
            else:
                assert split.read(row).mode == "CMYK"


def test_a_folder_that_load_dataset_understands(tmp_path: Path) -> None:
    for name, value in (("pug", 3), ("boxer", 5)):
        for number in range(10):
            write_image(tmp_path / "train" / name / f"{number}.jpg", value)
    data = open_dataset(f"hf:{tmp_path}")
    assert data.class_names == ["boxer", "pug"]
    train = data.splits["train"]
    assert [grey(train.read(row)) for row in range(10)] == [(5, 3)[n] for n in train.labels]


def texts(labels: list[Any], first: int = 0) -> dict[str, list[Any]]:
    return columns(labels, first) | {"title": ["a picture"] * len(labels)}  # type: ignore[list-item]


TEXTS = {"picture": datasets.Image(), "breed": datasets.Value("string")}
TITLED = TEXTS | {"title": datasets.Value("string")}


def test_labels_may_be_texts_and_splits_have_other_names(tmp_path: Path) -> None:
    """One Dataset that was saved, without splits; splits called otherwise; labels missing."""
    rows = datasets.Dataset.from_dict(
        columns(["pug", "boxer "] * 10),
        features=datasets.Features(TEXTS),  # type: ignore[arg-type]
    )
    rows.save_to_disk(tmp_path / "one")
    data = open_dataset(f"hf:{tmp_path / 'one'}")
    assert data.class_names == ["boxer", "pug"]
    assert sizes(data) == {"train": 10, "val": 4, "test": 6}
    folder = save(
        tmp_path / "named",
        TITLED,
        training=texts(["pug", None, "boxer", "boxer"], 20),
        dev=texts(["pug", "boxer"], 30),
        testing=texts(["boxer"], 40),
        extra=texts(["pug"] * 3, 50),
    )
    named = SourceOptions(columns={"label": "breed"})
    data = open_dataset(f"hf:{folder}", named)
    assert {name: list(split.ids) for name, split in data.splits.items()} == {
        "train": ["training/0", "training/2", "training/3"],
        "val": ["dev/0", "dev/1"],
        "test": ["testing/0"],
    }
    assert [grey(data.splits["train"].read(row)) for row in range(3)] == [20, 22, 23]
    assert data.splits["train"].labels.tolist() == [1, 0, 0]
    assert data.remarks == [
        "left out 1 image of the split 'training' without a label and 3 images of the split "
        "'extra'."
    ]
    for chosen, words in (
        ({}, r"has 2 columns of text \(breed, title\); exactly one is needed, or --columns label="),
        ({"label": "picture"}, r"has no column 'picture' that could be its label"),
        ({"label": "none"}, r"has no column 'none' that could be its label"),
        ({"path": "title"}, r"has no column 'title' that could be its path"),
        ({"split": "title"}, r"has splits, not a column of them"),
    ):
        refused(words, f"hf:{folder}", columns=chosen)


def test_a_split_that_is_cut_goes_by_the_images_not_by_their_numbers(tmp_path: Path) -> None:
    def where(name: str, first: int) -> dict[int, str]:
        train = columns([n % 2 for n in range(first, 40)], first)
        data = open_dataset(f"hf:{save(tmp_path / name, FEATURES, train=train)}")
        return {
            grey(split.read(row)): place
            for place, split in data.splits.items()
            for row in range(len(split.ids))
        }

    whole, rest = where("whole", 0), where("rest", 1)
    assert sum(whole[colour] != place for colour, place in rest.items()) <= 2


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({**FEATURES, "mask": datasets.Image()}, r"has 2 columns of type Image \(picture, mask\)"),
        ({"picture": datasets.Image()}, r"has 0 columns of type ClassLabel \(none\)"),
    ],
)
def test_other_columns_than_one_of_each_are_refused(
    features: dict[str, Any], message: str, tmp_path: Path
) -> None:
    train = {name: columns([0])["picture" if name != "breed" else name] for name in features}
    refused(message, f"hf:{save(tmp_path / 'odd', features, train=train)}")


def test_what_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"hf:.*empty cannot be loaded: .*; check the name"):
        (tmp_path / "empty").mkdir()
        open_dataset(f"hf:{tmp_path / 'empty'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"pip install 'clip-adapter\[hf\]'", "hf:org/name")
