"""The real builders of TensorFlow Datasets, with small archives in the place of the internet."""

import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets import tfds as tfds_builders
from clip_adapter.extract.datasets.catalogue import LEFT_OUT, load_catalogue, match_classes
from clip_adapter.extract.datasets.source import ImageDataset
from tests.extract.data_set_archives import (
    caltech_archive,
    dtd_archive,
    eurosat_archive,
    grey,
    opened,
    pets_archives,
    refused,
    serve,
    sizes,
)

Patch = pytest.MonkeyPatch
CATALOGUE = load_catalogue()


def builders_names(builder: str) -> list[str]:
    return list(tfds.builder(builder).info.features["label"].names)


def pets_rows(first: int, per_class: int) -> list[tuple[str, int]]:
    names = builders_names("oxford_iiit_pet")
    return [
        (f"{name}_{number}", label)
        for number in range(first, first + per_class)
        for label, name in enumerate(names, 1)
    ]


@pytest.fixture(autouse=True)
def without_tensorflow(monkeypatch: Patch) -> None:
    """As on a machine where TensorFlow is not installed."""
    monkeypatch.setattr(tfds_builders, "find_spec", lambda name: None)


def test_pets_are_prepared_and_read_without_tensorflow(tmp_path: Path, monkeypatch: Patch) -> None:
    lists = {"trainval": pets_rows(200, 5), "test": pets_rows(300, 2)}
    serve(monkeypatch, "oxford_iiit_pet", pets_archives(tmp_path, lists))
    data = opened("oxford_pets", data_dir=tmp_path / "tfds")

    assert data.class_names == CATALOGUE["oxford_pets"].class_names
    assert data.templates == ("a photo of a {}, a type of pet.",)
    for name, count in (("train", 4), ("val", 1), ("test", 2)):
        assert np.bincount(data.splits[name].labels).tolist() == [count] * 37
    published = {f"{image}.jpg" for image, _ in lists["trainval"]}
    assert {*data.splits["train"].ids, *data.splits["val"].ids} == published
    assert "80% of train split of tfds:oxford_iiit_pet/4.0.0" in data.splits["train"].origin
    assert "20% of train split" in data.splits["val"].origin
    assert "seed 0" in data.splits["val"].origin
    for split in data.splits.values():
        assert [grey(split.read(row)) - 1 for row in range(5)] == split.labels[:5].tolist()


def test_a_prepared_copy_is_read_again_without_network_in_the_same_order(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    place, names = tmp_path / "tfds", builders_names("dtd")
    with monkeypatch.context() as patch:
        serve(patch, "dtd", dtd_archive(tmp_path, names))
        first = opened("dtd", data_dir=place)
    again = opened("dtd", data_dir=place)

    for split, colour in (("train", 10), ("val", 20), ("test", 30)):
        assert again.splits[split].ids == first.splits[split].ids
        assert grey(again.splits[split].read(0)) == colour
    assert again.splits["val"].origin == "validation split of tfds:dtd/3.0.1"
    assert again.splits["train"].ids[0].split("/")[0] == names[again.splits["train"].labels[0]]
    refused(r"has a val split of its own; leave out --val", "dtd", data_dir=place, val=0.1)


def test_a_copy_prepared_as_tfrecord_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    serve(monkeypatch, "dtd", dtd_archive(tmp_path, builders_names("dtd")))
    opened("dtd", data_dir=tmp_path / "tfds")
    description = tmp_path / "tfds" / "dtd" / "3.0.1" / "dataset_info.json"
    description.write_text(description.read_text().replace("array_record", "tfrecord"))
    refused("cannot be read without TensorFlow; choose", "dtd", data_dir=tmp_path / "tfds")


@pytest.fixture
def eurosat(tmp_path: Path, monkeypatch: Patch) -> ImageDataset:
    archive = eurosat_archive(tmp_path, builders_names("eurosat/rgb"), 10)
    serve(monkeypatch, "eurosat/rgb", archive)
    return opened("eurosat", data_dir=tmp_path / "tfds", seed=7)


def test_a_builder_with_one_split_is_divided_and_says_so(eurosat: ImageDataset) -> None:
    assert sizes(eurosat) == {"train": 50, "val": 20, "test": 30}
    ids = [identity for split in eurosat.splits.values() for identity in split.ids]
    assert len(set(ids)) == 100
    assert eurosat.splits["test"].origin == (
        "30% of train split of tfds:eurosat/rgb/2.0.0, stratified by class, seed 7"
    )
    assert (
        eurosat.class_names[eurosat.splits["val"].labels[0]].split()[0]
        in (eurosat.splits["val"].ids[0])
    ), "EuroSAT's long class names are matched with the builder's short ones"
    assert eurosat.provenance["class_names_matched"] == "by name"


def test_caltech101_leaves_out_background_and_easy_faces(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    folders = [name.capitalize() for name in builders_names("caltech101")]
    serve(monkeypatch, "caltech101", caltech_archive(tmp_path, folders))
    data = opened("caltech101", data_dir=tmp_path / "tfds")

    assert len(data.class_names) == 100
    assert sizes(data) == {"train": 2400, "val": 600, "test": 100}
    classes_in_ids = {identity.split("/")[0] for identity in data.splits["test"].ids}
    assert not classes_in_ids & {"background_google", "faces_easy"}
    named = dict(zip(data.splits["test"].labels.tolist(), data.splits["test"].ids, strict=True))
    assert named[data.class_names.index("face")].startswith("faces/")
    assert named[data.class_names.index("yin_yang")].startswith("yin_yang/")


def test_a_broken_pet_needs_tensorflow_and_the_message_says_so(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """The builder re-encodes twelve images, by name, with tf.image; beagle_116 is one of them."""
    lists = {"trainval": [*pets_rows(200, 1), ("beagle_116", 5)], "test": pets_rows(300, 1)}
    serve(monkeypatch, "oxford_iiit_pet", pets_archives(tmp_path, lists))
    words = r"needs the package tensorflow to be prepared .* pip install 'clip-adapter\[tfds\]'"
    refused(words, "oxford_pets", data_dir=tmp_path / "tfds")


def test_file_operations_are_taken_away_again() -> None:
    from tensorflow_datasets.core.utils import lazy_imports_utils

    with tfds_builders.file_operations_for_tfds():
        assert lazy_imports_utils.tensorflow.io.gfile.exists("/")
    assert "_module" not in vars(lazy_imports_utils.tensorflow)


def test_splits_of_other_names_are_used_and_others_counted(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    labels = {"training": [0, 1] * 5, "dev": [0, 1, -1], "testing": [1, 0], "extra": [0, 0, 1, 1]}
    info = SimpleNamespace(
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
        ),
        splits={name: SimpleNamespace(num_examples=len(own)) for name, own in labels.items()},
        full_name="toy/1.0.0",
    )
    builder = SimpleNamespace(info=info, data_dir=tmp_path, version="1.0.0")
    monkeypatch.setattr(tfds_builders, "_prepared", lambda *_: builder)
    monkeypatch.setattr(
        tfds_builders, "_undecoded", lambda _, split: [{"label": n} for n in labels[split]]
    )
    data = opened("tfds:toy")
    assert sizes(data) == {"train": 10, "val": 2, "test": 2}
    assert data.remarks == [
        "left out 1 image of the split 'dev' without a label and 4 images of the split 'extra'."
    ]


def test_without_network_it_fails_at_once_and_says_what_else_there_is(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    def unknown(*arguments: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    refused(r"thor.robots.ox.ac.uk, .* --data-dir .*coop:FOLDER", "oxford_pets", data_dir=tmp_path)


def test_a_download_that_breaks_off_is_one_sentence(tmp_path: Path, monkeypatch: Patch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ConnectionError("connection reset\nby peer")

    serve(monkeypatch, "dtd", {})
    monkeypatch.setattr(
        "tensorflow_datasets.core.download.downloader._Downloader._sync_download", broken
    )
    refused(r"could not be downloaded and prepared: connection reset;", "dtd", data_dir=tmp_path)


def test_imagenet_says_which_files_to_download_by_hand(tmp_path: Path) -> None:
    refused(r"ILSVRC2012_img_train.tar .*downloads/manual", "imagenet", data_dir=tmp_path)


def test_unknown_builders_and_builders_without_images() -> None:
    refused(r"no builder 'eurosatt'; near matches: eurosat", "tfds:eurosatt")
    refused(r"tfds:eurosat/blue cannot be opened: ", "tfds:eurosat/blue")


@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if entry.tfds])
def test_every_catalogued_builder_matches_the_literatures_classes(name: str) -> None:
    """Labels by name where the names say the same; ImageNet's and SUN397's by order."""
    entry = CATALOGUE[name]
    theirs = builders_names(str(entry.tfds))
    matched, labels = match_classes(theirs, entry)

    kept = [label for label in labels if label != LEFT_OUT]
    assert sorted(kept) == list(range(entry.classes))
    assert matched == ("by order" if name.startswith(("imagenet", "sun")) else "by name")
    if name == "sun397":
        for written, label in zip(theirs, labels, strict=True):
            assert set(entry.class_names[label].split()) == set(written.split("/")[2:])
    if name.startswith("imagenet"):
        assert theirs == sorted(theirs), "ImageNet's classes are in the order of their WordNet ids"
        position = labels.index(kept[-1])
        assert entry.class_names[kept[-1]] == CATALOGUE["imagenet"].class_names[position]


def test_renamed_classes_of_a_builder_are_not_guessed() -> None:
    entry = CATALOGUE["oxford_pets"]
    with pytest.raises(UserError, match=r"has 36 classes, where oxford_pets has 37"):
        match_classes(builders_names("oxford_iiit_pet")[1:], entry)
    matched, labels = match_classes([f"breed {number}" for number in range(37)], entry)
    assert (matched, labels) == ("by order", list(range(37)))


def test_permuted_labels_are_put_into_the_literatures_order() -> None:
    entry = CATALOGUE["eurosat"]
    shuffled = np.random.default_rng(0).permutation(builders_names("eurosat/rgb")).tolist()
    matched, labels = match_classes(shuffled, entry)
    assert matched == "by name"
    assert entry.class_names[labels[shuffled.index("SeaLake")]] == "Sea or Lake"
    assert entry.class_names[labels[shuffled.index("Forest")]] == "Forest"
