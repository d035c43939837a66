"""The catalogue of the literature, the registry of names, and checks common to all sources."""

import numpy as np
import pytest
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.catalogue import load_catalogue
from clip_adapter.extract.datasets.source import ImageDataset, Split, checked
from tests.extract.data_set_archives import opened, refused, sizes

CATALOGUE = load_catalogue()


def test_the_catalogue_says_what_the_split_files_publish() -> None:
    """Figures of CoOp's published split files and of CLIP's list of ImageNet's names."""
    counts = {name: entry.classes for name, entry in CATALOGUE.items()}
    assert counts == {
        **{"imagenet": 1000, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196},
        **{"oxford_flowers": 102, "food101": 101, "fgvc_aircraft": 100, "sun397": 397},
        **{"dtd": 47, "eurosat": 10, "ucf101": 101, "imagenet_v2": 1000},
        **{"imagenet_sketch": 1000, "imagenet_a": 200, "imagenet_r": 200},
    }
    assert CATALOGUE["dtd"].coop_split_sizes == {"train": 2820, "val": 1128, "test": 1692}
    assert CATALOGUE["dtd"].templates == ("{} texture.",)
    assert CATALOGUE["imagenet"].class_names[:2] == ("tench", "goldfish")
    assert "outdoor apartment_building" in CATALOGUE["sun397"].class_names
    assert len(CATALOGUE["imagenet_sketch"].templates_ensemble) == 7


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_every_entry_is_whole(entry: object) -> None:
    assert len(entry.class_names) == (0 if entry.name == "fgvc_aircraft" else entry.classes)
    assert all(template.count("{}") == 1 for template in entry.templates)
    ways = [bool(entry.coop_split_file), bool(entry.coop_lists), bool(entry.coop_folders)]
    assert entry.coop_dir and sum(ways) == 1
    assert set(entry.tfds_names) <= set(entry.class_names)


def test_imagenet_a_is_evaluated_on_its_own_200_of_imagenets_classes() -> None:
    """n01498041, the first of ImageNet-A's synsets, is ImageNet's class 6, the stingray."""
    assert CATALOGUE["imagenet_a"].class_names[0] == "stingray"
    assert set(CATALOGUE["imagenet_a"].class_names) < set(CATALOGUE["imagenet"].class_names)


def test_unknown_names_are_one_sentence() -> None:
    refused(r"Unknown data set 'oxford_petz'; near matches: oxford_pets", "oxford_petz")
    refused(r"Unknown data set 'ftp:somewhere'", "ftp:somewhere")
    refused(r"coop: names nothing", "coop:")


def test_digits_keep_their_fixed_split() -> None:
    assert sizes(opened("digits"))["test"] == 899
    refused(r"val split of its own; leave out --val", "digits", val=0.3)


def data_set(ids: list[str], labels: list[int], class_names: tuple[str, ...]) -> ImageDataset:
    image = Image.new("L", (1, 1))
    split = Split(ids, np.array(labels, np.int32), lambda index: image, "a test")
    return ImageDataset("mine", class_names, ("{}",), {"train": split}, {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            data_set(["x", "y", "x"], [0, 1, 1], ("a", "b")),
            r"'x' occurs 2 times in the train split",
        ),
        (data_set(["x", "y"], [0, 2], ("a", "b", "c")), r"No training images for class 'b'"),
        (data_set(["x"], [0], ("a", *"bcdefgh")), r"class 'b', 'c', 'd' and 4 more"),
        (data_set(["x"], [0], ("a",)), r"mine has 1 class \('a'\)"),
        (data_set([], [], ("a", "b")), r"The train split of mine has no images"),
        (data_set(["x", "\udce9"], [0, 1], ("a", "b")), r"'\\udce9' is not valid UTF-8"),
    ],
)
def test_what_must_hold_for_every_source(data: ImageDataset, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(data)
