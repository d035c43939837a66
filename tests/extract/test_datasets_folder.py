"""Folders of images: what counts as a class, a split, an image."""

import os
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets import image_files
from clip_adapter.extract.datasets.source import (
    ImageDataset,
    SourceOptions,
    Split,
    splits_among,
)
from clip_adapter.extract.datasets.splitting import complete_splits
from clip_adapter.extract.encoding import images
from clip_adapter.listener import Listener
from tests.extract.data_set_archives import grey, opened, refused, sizes, write_image


def open_folder(root: Path, **options: float) -> ImageDataset:
    return opened(f"folder:{root}", **options)


def flat(root: Path, **images: int) -> Path:
    """One folder per class; an image's grey value is its number."""
    for name, count in images.items():
        for number in range(count):
            write_image(root / name / f"{number}.jpg", number)
    return root


def test_one_folder_per_class_is_divided_class_by_class(tmp_path: Path) -> None:
    data = open_folder(flat(tmp_path / "mine", class_10=20, class_2=10))
    assert data.name == "mine"
    assert data.class_names == ["class_2", "class_10"], "natural order, underscores kept"
    for name, counts in (("train", [5, 10]), ("val", [2, 4]), ("test", [3, 6])):
        assert np.bincount(data.splits[name].labels).tolist() == counts
    ids = [identity for split in data.splits.values() for identity in split.ids]
    assert len(set(ids)) == 30
    test = data.splits["test"]
    for row, name in enumerate(test.ids):
        assert name.endswith(f"/{grey(test.read(row))}.jpg")
    assert test.ids[0].startswith("class_2/")
    assert test.origin == "30% of one folder per class, stratified by class, seed 0"


def test_fractions_and_seed_are_the_users(tmp_path: Path) -> None:
    root = flat(tmp_path, a=20, b=20)
    first = open_folder(root, val=0.1, test=0.5)
    assert sizes(first) == {"train": 16, "val": 4, "test": 20}
    assert first.splits["train"].ids == open_folder(root, val=0.1, test=0.5).splits["train"].ids
    other = open_folder(root, val=0.1, test=0.5, seed=1)
    assert other.splits["train"].ids != first.splits["train"].ids
    assert list(open_folder(root, val=0.0).splits) == ["train", "test"]


def places(ids: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Image → split, for images of the classes that their ids begin with."""
    names = sorted({name.split("/")[0] for name in ids})
    labels = np.array([names.index(name.split("/")[0]) for name in ids], np.int32)
    whole = Split(list(ids), labels, lambda _: Image.new("L", (1, 1)), "all")
    splits = complete_splits({"train": whole}, names, SourceOptions(seed=seed))
    return {name: split for split, rows in splits.items() for name in rows.ids}


def test_what_stays_does_not_move_when_others_come_and_go() -> None:
    """Each that comes or goes shifts a class by one image at each of its two cuts, at most."""
    ids = [f"{name}/{number}" for name in ("cat", "dog", "eel") for number in range(40)]
    before = places(ids)
    for gone in range(1, 30):
        left = ids[gone:]
        now = places(
            [*random.Random(gone).sample(left, len(left)), *(f"bee/{n}" for n in range(9))]
        )
        moved = [name for name in left if now[name] != before[name]]
        assert all(name.startswith("cat/") for name in moved)
        assert len(moved) <= 2 * gone
        for split, share in (("train", 0.5), ("val", 0.2), ("test", 0.3)):
            counts = Counter(name.split("/")[0] for name, place in now.items() if place == split)
            for name, total in (("cat", 40 - gone), ("dog", 40), ("bee", 9)):
                assert abs(counts[name] - share * total) <= 1
    assert sum(before[name] != places(ids, seed=1)[name] for name in ids) > 40
    composed = [f"{name}/caf\u00e9{number}" for name in "ab" for number in range(20)]
    decomposed = [unicodedata.normalize("NFD", name) for name in composed]
    assert list(places(composed).values()) == list(places(decomposed).values())


def test_split_folders_are_taken_as_they_are_under_any_usual_name(tmp_path: Path) -> None:
    for split, count in (("Train", 3), ("validation", 2), ("test", 1)):
        flat(tmp_path / split, cat=count, dog=count)
    data = open_folder(tmp_path)
    assert list(data.splits["test"].ids) == ["test/cat/0.jpg", "test/dog/0.jpg"]
    assert sizes(data) == {"train": 6, "val": 4, "test": 2}
    assert data.splits["val"].origin == "folder validation"
    refused(r"val split of its own", f"folder:{tmp_path}", val=0.2)
    flat(tmp_path / "valid", cat=1)
    refused(r"valid and validation, which both mean the val split", f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Training", "dev", "TESTING"), ("train", "val", "test")),
        (("train", "valid", "eval"), ("train", "val", "test")),
        (("train", "eval", "test"), ("train", "val", "test")),
        (("training_set", "test_set", "validation-images"), ("train", "test", "val")),
        (("trainset", "Development", "evaluation"), ("train", "val", "test")),
        (("seg_train", "train2017", "steam train", "seg"), (None, "train", None, None)),
    ],
)
def test_what_splits_are_called(names: tuple[str, ...], splits: tuple[str | None, ...]) -> None:
    assert [splits_among(names).get(name) for name in names] == list(splits)


def test_images_outside_the_class_folders_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("train", "test"):
        flat(root / name, cat=4, dog=4)
        write_image(root / name / "loose.jpg")
    flat(root / "notes", deep=3)
    flat(root, val=2)
    write_image(root / "here.jpg")
    data = open_folder(root, val=0.5)
    assert list(data.class_names) == ["cat", "dog"]
    assert sizes(data) == {"train": 4, "val": 4, "test": 8}
    assert data.remarks == [
        f"left out 3 images beside the class folders, the first of them {root}/here.jpg; put each "
        "into the folder of its class.",
        f"left out 3 images in {root}/notes: it is no split with class folders, as 'test', 'train' "
        "beside it.",
        f"left out 2 images in {root}/val: it is no split with class folders, as 'test', 'train' "
        "beside it.",
    ]
    flat(tmp_path / "flat", cat=6, dog=6)
    for number in range(183):
        write_image(tmp_path / "flat" / f"{number}.png")
    (remark,) = open_folder(tmp_path / "flat").remarks
    assert remark.startswith("left out 183 images beside the class folders, the first of them ")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("high", r"folder with images, photos/photos, .* 'cat', 'dog'; .* give .*h/photos/pho"),
        ("splits", r"one class folder with images, photos/train, .* 'cat', 'dog'; if these are"),
        ("high/photos/photos/cat", r"holds 6 images and no folders; give the folder above it, or"),
        ("only", r"holds 'test', 'train' with images but without a folder for each class; put"),
    ],
)
def test_a_level_too_high_or_too_low_is_said(place: str, words: str, tmp_path: Path) -> None:
    flat(tmp_path / "high" / "photos" / "photos", cat=6, dog=6)
    flat(tmp_path / "splits" / "photos" / "train", cat=6, dog=6)
    for split in ("train", "test"):
        flat(tmp_path / "only" / split, **{"": 2})
    refused(words, f"folder:{tmp_path}/{place}")


def test_classes_that_may_be_groups_of_classes_are_doubted(tmp_path: Path) -> None:
    for name in ("autumn", "spring"):
        flat(tmp_path / name, cat=6, dog=6)
    (remark,) = open_folder(flat(tmp_path, to_sort=6)).remarks
    assert remark.startswith("took 'autumn', 'spring' for classes, though all of their images lie")


def test_what_systems_keep_among_images_is_left_out_and_counted(tmp_path: Path) -> None:
    root = flat(tmp_path, cat=6, dog=6)
    for junk in ("@eaDir", "$RECYCLE.BIN", "__MACOSX", "#recycle", ".thumbnails", "cat/Thumbnails"):
        flat(root / junk, cat=2)
    (root / "cat" / "._0.jpg").touch()
    data = open_folder(root)
    assert list(data.class_names) == ["cat", "dog"]
    assert sum(sizes(data).values()) == 12
    (remark,) = data.remarks
    assert remark.startswith("left out 13 images that are hidden or that a system keeps for itself")
    assert "2 in @eaDir" in remark


def test_links_out_of_the_folder_are_followed_and_counted_and_the_search_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = flat(tmp_path / "data", cat=6, dog=6)
    flat(tmp_path / "elsewhere", more=3)
    (root / "cat" / "away").symlink_to(tmp_path / "elsewhere")
    (root / "eel").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "more" / "0.jpg")
    (root / "cat" / "inside.jpg").symlink_to(root / "dog" / "0.jpg")
    monkeypatch.setattr(image_files, "TOLD_EVERY_SECONDS", 0.0)
    heard = Heard()
    data = opened(f"folder:{root}", listener=heard)
    (remark,) = data.remarks
    assert remark.startswith(f"followed 3 links out of {root}, the first of them {root}/")
    assert sum(sizes(data).values()) == 6 + 5 + 6 + 3
    assert heard.notes[-1].startswith("20 images found so far, in ")


class Heard(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def test_a_class_in_two_spellings_of_its_accents_is_one(tmp_path: Path) -> None:
    for split, form in (("train", "NFC"), ("test", "NFD")):
        name = unicodedata.normalize(form, "caf\u00e9")
        flat(tmp_path / split, **{name: 3, "tea": 3})
    data = open_folder(tmp_path, val=0.0)
    assert list(data.class_names) == ["caf\u00e9", "tea"]
    assert list(sizes(data).values()) == [6, 6]
    assert all(split.file is not None and split.file(0).exists() for split in data.splits.values())


def test_without_test_folder_the_val_folder_stays_val(tmp_path: Path) -> None:
    flat(tmp_path / "train", cat=10, dog=10)
    flat(tmp_path / "val", cat=4, dog=4)
    data = open_folder(tmp_path)
    assert sizes(data) == {"train": 14, "val": 8, "test": 6}
    assert data.splits["val"].origin == "folder val"
    assert "folder train" in data.splits["test"].origin


def test_images_beside_the_splits_have_no_label(tmp_path: Path) -> None:
    for split in ("train", "test"):
        flat(tmp_path / split, a=3, b=2)
    flat(tmp_path, **{"unlabelled": 2, "unlabelled/deep": 1})
    data = open_folder(tmp_path, val=0.0)
    assert sizes(data) == {"train": 5, "test": 5, "unlabelled": 3} and not data.remarks
    assert list(data.splits) == ["train", "test", "unlabelled"]
    assert data.class_names == ["a", "b"]
    wanted = ["unlabelled/0.jpg", "unlabelled/1.jpg", "unlabelled/deep/0.jpg"]
    assert list(data.splits["unlabelled"].ids) == wanted
    assert [grey(data.splits["unlabelled"].read(row)) for row in range(3)] == [0, 1, 0]


def test_a_class_may_be_called_unlabelled(tmp_path: Path) -> None:
    data = open_folder(flat(tmp_path, parcel=10, unlabelled=10))
    assert data.class_names == ["parcel", "unlabelled"]
    assert sizes(data) == {"train": 10, "val": 4, "test": 6}
    for split in ("train", "test"):
        flat(tmp_path / "cut" / split, parcel=2, unlabelled=2)
    assert sizes(open_folder(tmp_path / "cut", val=0.0)) == {"train": 4, "test": 4}


def test_a_folder_of_images_without_labels(tmp_path: Path) -> None:
    flat(tmp_path / "new", **{"": 2, "deep/er": 1})
    (tmp_path / "new" / "x.svg").touch()
    options = {"class_names": ["a", "b", "c"]}
    data = opened(f"images:{tmp_path}/new", **options)
    assert (data.name, data.class_names) == ("new", ["a", "b", "c"])
    assert list(data.splits["unlabelled"].ids) == ["0.jpg", "1.jpg", "deep/er/0.jpg"]
    assert len(data.remarks) == len(data.splits) == 1 and "1 .svg" in data.remarks[0]
    refused(r"There is no folder", f"images:{tmp_path}/none", **options)
    refused(r"of images without labels; leave out --val", f"images:{tmp_path}/new", val=0.1)
    (tmp_path / "empty").mkdir()
    refused(r"empty holds no images", f"images:{tmp_path}/empty", **options)
    refused(r"new has 1 class \('a'\); at least two", f"images:{tmp_path}/new", class_names=["a"])


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = open_folder(flat(tmp_path, bus=6, train=6, test=6))
    assert data.class_names == ["bus", "test", "train"]
    assert sum(sizes(data).values()) == 18


def test_images_are_found_at_any_depth_by_extension_and_hidden_ones_are_not(tmp_path: Path) -> None:
    flat(tmp_path, a=6, b=6)
    for name in ("deep/er/x.JPEG", "y.PnG", "z.tiff", "w.webp", "v.ppm", "u.BMP", "t.gif"):
        write_image(tmp_path / "a" / name)
    for name in (".hidden.jpg", ".thumbs/1.jpg", "readme.txt", "jpg"):
        write_image(tmp_path / "b" / name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    data = open_folder(tmp_path)
    assert sum(sizes(data).values()) == 6 + 7 + 6
    assert any("a/deep/er/x.JPEG" in split.ids for split in data.splits.values())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"a": 6}, r"has 1 class \('a'\); at least two are needed"),
        ({"a": 6, "b": 1}, r"Class 'b' has 1 image, too few to give train and val and test"),
        ({"a": 2, "b": 2}, r"the val split would be empty; raise --val, or give --val 0"),
        ({}, r"holds no folders; put the images of every class into a folder"),
    ],
)
def test_too_little_is_one_sentence(images: dict[str, int], message: str, tmp_path: Path) -> None:
    flat(tmp_path, **images)
    refused(message, f"folder:{tmp_path}")


def test_images_that_are_not_read_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path, a=6, b=6)
    for name in ("1.HEIC", "2.heic", "3.heif", "4.svg", ".5.svg", "notes.txt"):
        (tmp_path / "a" / name).touch()
    others = images.readable_suffixes() - images.HEIF_SUFFIXES
    monkeypatch.setattr(image_files, "readable_suffixes", lambda: others)
    assert open_folder(tmp_path).remarks == [
        "passed over 4 images of kinds not read: 2 .heic, 1 .heif, 1 .svg "
        "(pip install 'clip-adapter[heic]' reads .heic and .heif)."
    ]


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    flat(tmp_path / "flat", a=6, b=6)
    (tmp_path / "flat" / "empty").mkdir()
    (tmp_path / "flat" / "alpha" / "deeper").mkdir(parents=True)
    data = open_folder(tmp_path / "flat")
    assert data.class_names == ["a", "b"]
    assert data.remarks == ["left out 'alpha', 'empty': no images there."]
    (tmp_path / "only" / "empty").mkdir(parents=True)
    (tmp_path / "only" / "empty" / "a.HEIF.jxl").touch()
    refused(r"hold no images \(passed over 1 image .* 1 \.jxl\)", f"folder:{tmp_path}/only")
    flat(tmp_path / "split" / "train", a=2, b=2)
    flat(tmp_path / "split" / "test", a=2, zebra=2)
    refused(r"No training images for class 'zebra'", f"folder:{tmp_path}/split", val=0.5)


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (-0.1, 0.5), (0.1, 1.0)])
def test_impossible_fractions(val: float, test: float, tmp_path: Path) -> None:
    spec = f"folder:{flat(tmp_path, a=10, b=10)}"
    refused(r"--val .* and --test .* leave nothing to train on", spec, val=val, test=test)


def test_names_that_are_not_unicode_are_refused_by_name(tmp_path: Path) -> None:
    flat(tmp_path, a=10, b=10)
    write_image(tmp_path / "a" / os.fsdecode(b"caf\xe9.jpg"))
    with pytest.raises(UserError, match=r"'a/caf\\udce9.jpg' is not valid UTF-8") as error:
        open_folder(tmp_path)
    str(error.value).encode()


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions don't hold for root, so the system call itself is made to refuse."""
    root = flat(tmp_path, a=6, b=6)
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(rf"Cannot read {root}/b: Permission denied; check", f"folder:{root}")
