"""CoOp's folder layout: the published split, row by row, and sentences for what is missing."""

import json
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.errors import UserError
from clip_adapter.extract.datasets import coop_layout
from clip_adapter.extract.datasets.catalogue import load_catalogue
from clip_adapter.extract.datasets.coop_layout import open_coop
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import SourceOptions
from tests.extract.data_set_archives import grey, opened, refused, sizes, write_image

CATALOGUE = load_catalogue()
PETS = CATALOGUE["oxford_pets"]


def pets_split(per_class: int = 5) -> dict[str, list[tuple[str, int, str]]]:
    """Classes in an order of their own, as in the published file."""

    def rows(start: int, count: int) -> list[tuple[str, int, str]]:
        order = reversed(list(enumerate(PETS.class_names)))
        return [
            (f"{name}_{start + number}.jpg", label, name)
            for label, name in order
            for number in (3, 1, 2, 5, 4)[:count]
        ]

    return {"train": rows(100, per_class), "val": rows(200, 1), "test": rows(300, 1)}


def write_pets(folder: Path, split: dict[str, list[tuple[str, int, str]]]) -> Path:
    for rows in split.values():
        for path, label, _ in rows:
            write_image(folder / "images" / path, label)
    (folder / str(PETS.coop_split_file)).write_text(json.dumps(split))
    return folder


def test_the_split_file_is_given_row_by_row_in_its_order(tmp_path: Path) -> None:
    split = pets_split()
    data = open_dataset(f"coop:{write_pets(tmp_path / 'oxford_pets', split)}")

    assert list(data.splits) == ["train", "val", "test"]
    for name, rows in split.items():
        assert list(data.splits[name].ids) == [path for path, _, _ in rows]
        assert data.splits[name].labels.tolist() == [label for _, label, _ in rows]
    assert data.class_names == list(PETS.class_names)
    assert data.templates == PETS.templates
    assert grey(data.splits["train"].read(0)) == 36
    assert data.splits["train"].origin.endswith("which has not the sizes of the published split")


def test_few_shot_draws_from_it_are_coops_own(tmp_path: Path) -> None:
    """What `random.Random(1)` draws from the published file's rows, group by group."""
    import random

    split = pets_split()
    data = open_dataset(f"coop:{write_pets(tmp_path / 'oxford_pets', split)}")
    rng = random.Random(1)
    expected: list[str] = []
    for name in reversed(PETS.class_names):
        rows = [path for path, _, written in split["train"] if written == name]
        expected += rng.sample(rows, 2)
    task = draw_few_shot(data.splits["train"].labels, data.splits["val"].labels, shots=2, seed=1)
    assert [data.splits["train"].ids[row] for row in task.support] == expected


def test_a_folder_of_another_name_is_told_by_its_split_file(tmp_path: Path) -> None:
    write_pets(tmp_path / "my-pets", pets_split(1))
    assert open_coop(str(tmp_path / "my-pets"), SourceOptions()).name == "oxford_pets"


@pytest.mark.parametrize("place", [".", "images", "photos"])
def test_a_split_file_of_ones_own(tmp_path: Path, place: str) -> None:
    own = {
        split: [(f"{split}/{label}_{n}.jpg", label, normalize(form, f"cl\u00e1ss {label}"))
                for label in (1, 0, 2) for n in range(2)]
        for split, form in (("train", "NFC"), ("val", "NFD"), ("test", "NFC"))
    }  # fmt: skip
    for rows in own.values():
        for path, label, _ in rows:
            write_image(tmp_path / "mine" / place / path, label)
    file = tmp_path / "mine" / "split_zhou_Mine.json"
    file.write_text("\ufeff" + json.dumps(own), encoding="utf-8")
    data = open_dataset(f"coop:{tmp_path}/mine")
    assert (data.name, list(data.class_names)) == (
        "mine",
        ["cl\u00e1ss 0", "cl\u00e1ss 1", "cl\u00e1ss 2"],
    )
    assert list(data.splits["train"].ids) == [path for path, _, _ in own["train"]]
    assert grey(data.splits["test"].read(4)) == 2
    assert data.splits["val"].origin == "val: split file split_zhou_Mine.json"
    (tmp_path / "mine" / "my_split.json").write_text("{}")
    refused(r"'my_split.json', 'split_zhou_Mine.json', .* keep one", f"coop:{tmp_path}/mine")
    (tmp_path / "mine" / "my_split.json").unlink()
    own["test"][0] = ("test/1_0.jpg", 7, "class 7")
    file.write_text(json.dumps(own))
    refused(r"has 4 pairs of label .* where mine has labels from 0 on", f"coop:{tmp_path}/mine")
    file.write_text('{"train": [], "train": [], "val": [], "test": []}')
    refused(r"Mine.json is not .* it names 'train' twice in one object", f"coop:{tmp_path}/mine")


def test_a_known_folder_with_a_split_file_of_another_name(tmp_path: Path) -> None:
    folder = write_pets(tmp_path / "oxford_pets", pets_split(1))
    (folder / str(PETS.coop_split_file)).rename(folder / "split_seed2.json")
    data = opened("oxford_pets", data_root=tmp_path)
    assert data.templates == PETS.templates
    assert data.provenance["version"] == "split_seed2.json"


def test_a_root_one_level_off_is_said(tmp_path: Path) -> None:
    folder = write_pets(tmp_path / "data" / "sets" / "oxford_pets", pets_split(1))
    for root, words in (
        (tmp_path / "data", r"holds no oxford_pets, but .*/data/sets does; give that"),
        (folder, r"is oxford_pets itself; give .*/data/sets\."),
        (tmp_path / "none", r"There is no folder .*none; give the one that holds oxford_pets"),
    ):
        refused(words, "oxford_pets", data_root=root)
    (folder / "copy").mkdir()
    (folder / str(PETS.coop_split_file)).rename(folder / "copy" / str(PETS.coop_split_file))
    with pytest.raises(UserError, match=r"no split_zhou_OxfordPets.json, but .*/copy has; give"):
        open_coop(str(folder), SourceOptions())


def test_published_sizes_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train": 2944, "val": 736, "test": 3669}
    split = {
        name: [(f"{name}{n}.jpg", n % 37, PETS.class_names[n % 37]) for n in range(size)]
        for name, size in sizes.items()
    }
    folder = tmp_path / "oxford_pets"
    folder.mkdir()
    (folder / str(PETS.coop_split_file)).write_text(json.dumps(split))
    monkeypatch.setattr(coop_layout, "require_files", lambda *_: None)
    data = open_coop(str(folder), SourceOptions())
    assert data.splits["val"].origin == "val: published split split_zhou_OxfordPets.json"


def test_a_name_prefers_the_published_split_below_data_root(tmp_path: Path) -> None:
    write_pets(tmp_path / "oxford_pets", pets_split(1))
    data = opened("oxford_pets", data_root=tmp_path)
    assert data.provenance["source"] == "CoOp layout"
    refused(r"test split of its own; leave out --test", "oxford_pets", data_root=tmp_path, test=0.5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ucf101", ["ucf101/UCF-101-midframes", "split_zhou_UCF101.json", "--data-root"]),
        ("fgvc_aircraft", ["fgvc_aircraft/images", "images_variant_val.txt", "variants.txt"]),
    ],
)
def test_what_tfds_does_not_have_says_what_to_put_where(
    name: str, parts: list[str], tmp_path: Path
) -> None:
    for options in (SourceOptions(), SourceOptions(data_root=tmp_path)):
        with pytest.raises(UserError) as error:
            open_dataset(name, options)
        assert all(part in str(error.value) for part in parts)
    assert str(tmp_path) in str(error.value)


def remove_an_image(folder: Path) -> None:
    (folder / "images" / "abyssinian_203.jpg").unlink()


def remove_split(folder: Path) -> None:
    (folder / str(PETS.coop_split_file)).unlink()


def rewrite(change: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / str(PETS.coop_split_file)
        stored = json.loads(path.read_text())
        path.write_text(json.dumps(change(stored)))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_an_image, r"lacks 1 of 111 images, the first is abyssinian_203"),
        (remove_split, r"has no split_zhou_OxfordPets.json; download it"),
        (
            rewrite(lambda s: {"train": s["train"]}),
            r"not a split file of CoOp's: it lacks val, test; download",
        ),
        (rewrite(lambda s: [1, 2]), r"not a split file of CoOp's"),
        (rewrite(lambda s: s | {"test": [["a.jpg", 3, "cat"]]}), r"has 38 pairs of label"),
    ],
)
def test_what_is_missing_or_broken_is_one_sentence(
    damage: Any, message: str, tmp_path: Path
) -> None:
    folder = write_pets(tmp_path / "oxford_pets", pets_split(1))
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_coop(str(folder), SourceOptions())


def test_an_unknown_folder_is_sent_to_the_folder_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not recognised .*oxford_pets.* use folder:"):
        open_coop(str(tmp_path), SourceOptions())
    with pytest.raises(UserError, match=r"There is no folder .*nowhere; put CoOp's layout there"):
        open_coop(str(tmp_path / "nowhere"), SourceOptions())


def write_aircraft(folder: Path) -> list[str]:
    variants = [f"Variant {number}-{number}00" for number in range(100)]
    folder.mkdir()
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in variants))
    for offset, split in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(variants):
            image = f"{offset}{label:06d}"
            write_image(folder / "images" / f"{image}.jpg", label)
            lines.append(f"{image} {name}\n")
        (folder / f"images_variant_{split}.txt").write_text("".join(reversed(lines)))
    return variants


def test_aircraft_is_read_from_its_text_lists(tmp_path: Path) -> None:
    variants = write_aircraft(tmp_path / "fgvc_aircraft")
    data = opened("fgvc_aircraft", data_root=tmp_path)
    assert list(data.class_names) == variants
    val = data.splits["val"]
    assert (val.ids[0], val.labels[0], grey(val.read(0))) == ("1000099.jpg", 99, 99)

    lists = tmp_path / "fgvc_aircraft" / "images_variant_val.txt"
    lists.write_text("1000000 Zeppelin\n")
    refused(r"line '1000000 Zeppelin', whose class is not in", "fgvc_aircraft", data_root=tmp_path)


def write_imagenet(images: Path, folders: list[str], per_class: int) -> None:
    for number in range(per_class):
        for label, name in enumerate(folders):
            write_image(images / name / f"{name}_{number}.JPEG", label % 200)


def test_imagenet_is_its_folders_and_has_no_val_unless_asked(tmp_path: Path) -> None:
    wordnet = [f"n{number:08d}" for number in range(1000)]
    write_imagenet(tmp_path / "imagenet" / "images" / "train", wordnet, 2)
    write_imagenet(tmp_path / "imagenet" / "images" / "val", wordnet, 1)
    data = opened("imagenet", data_root=tmp_path)

    assert sizes(data) == {"train": 2000, "test": 1000}
    assert data.splits["test"].ids[7] == "images/val/n00000007/n00000007_0.JPEG"
    assert data.splits["test"].labels[7] == 7
    assert data.class_names[0] == "tench"

    with_val = opened("imagenet", data_root=tmp_path, val=0.5)
    assert sizes(with_val) == {"train": 1000, "val": 1000, "test": 1000}
    (tmp_path / "imagenet" / "images" / "val" / "n00000007").rename(tmp_path / "gone")
    refused(r"val has 999 class folders, where imagenet has 1000", "imagenet", data_root=tmp_path)


def test_imagenet_v2_counts_its_folders_and_r_has_its_own_classes(tmp_path: Path) -> None:
    v2 = tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    write_imagenet(v2, [str(number) for number in range(1000)], 1)
    data = opened("imagenet_v2", data_root=tmp_path)
    assert list(data.splits) == ["test"]
    refused(r"for testing only; leave out --val", "imagenet_v2", data_root=tmp_path, val=0.1)
    tenth = list(data.splits["test"].labels).index(10)
    assert data.splits["test"].ids[tenth].endswith("/10/10_0.JPEG"), "10 does not follow on 1"

    rendition = tmp_path / "imagenet-rendition" / "imagenet-r"
    write_imagenet(rendition, [f"n{number:08d}" for number in range(200)], 1)
    data = opened("imagenet_r", data_root=tmp_path)
    assert len(data.class_names) == 200
    assert data.class_names[0] == "goldfish", "the first of ImageNet-R's synsets is n01443537"
