"""What every source of images promises, whatever it reads: one suite over all of them."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets import tfds as tfds_builders
from clip_adapter.extract.datasets.catalogue import load_catalogue
from clip_adapter.extract.datasets.registry import KINDS, NAMED, open_dataset
from clip_adapter.extract.datasets.source import ImageDataset, SourceOptions, Split
from clip_adapter.extract.encoding.images import BadImage, read_rgb
from clip_adapter.extract.known import UNKNOWN, stamps
from tests.extract.data_set_archives import (
    eurosat_archive,
    image_bytes,
    serve,
    write_image,
    write_tar,
)

PETS = load_catalogue()["oxford_pets"]
PER_CLASS = 10
DAMAGED = b"\xff\xd8 this was a JPEG"


@dataclass(frozen=True)
class Source:
    """How one source is opened.

    missing: names data of this kind that do not exist. damaged: the id of an image that is none.
    cut: whether it publishes no splits at all, so that the seed decides them.
    """

    spec: str
    missing: str
    damaged: str | None
    cut: bool
    options: SourceOptions = SourceOptions()  # noqa: RUF009


def digits(folder: Path, _: pytest.MonkeyPatch) -> Source:
    return Source("digits", "digit", None, cut=False)


def folder(folder: Path, _: pytest.MonkeyPatch) -> Source:
    for name in ("class10", "class9", "class1"):
        for number in range(PER_CLASS):
            write_image(folder / name / "deep" / f"{number}.jpg", number)
    (folder / "class9" / "deep" / "3.jpg").write_bytes(DAMAGED)
    return Source(f"folder:{folder}", f"folder:{folder}/none", "class9/deep/3.jpg", cut=True)


def table(folder: Path, _: pytest.MonkeyPatch) -> Source:
    rows = []
    for number in range(3 * PER_CLASS):
        write_image(folder / f"{number}.jpg", number)
        rows.append(f"{number}.jpg,{'zebra' if number % 3 else 'ant'}")
    (folder / "5.jpg").write_bytes(DAMAGED)
    (folder / "t.csv").write_text("\n".join(["path,label", *reversed(rows)]))
    return Source(f"csv:{folder}/t.csv", f"csv:{folder}/none.csv", "5.jpg", cut=True)


def coop(folder: Path, _: pytest.MonkeyPatch) -> Source:
    split = {
        name: [(f"{name}_{label}_{n}.jpg", label, PETS.class_names[label])
               for label in reversed(range(PETS.classes)) for n in range(count)]
        for name, count in (("train", 3), ("val", 1), ("test", 2))
    }  # fmt: skip
    for rows in split.values():
        for path, label, _name in rows:
            write_image(folder / "images" / path, label)
    (folder / "images" / "val_5_0.jpg").write_bytes(DAMAGED)
    (folder / str(PETS.coop_split_file)).write_text(json.dumps(split))
    return Source(f"coop:{folder}", f"coop:{folder}/none", "val_5_0.jpg", cut=False)


def literature(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    made = coop(folder / PETS.coop_dir, monkeypatch)
    options = SourceOptions(data_root=folder)
    return replace(made, spec="oxford_pets", missing="oxford_pet", options=options)


def eurosat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(tfds_builders, "find_spec", lambda name: None)
    names = tfds.builder("eurosat").info.features["label"].names
    archive = eurosat_archive(folder, names, PER_CLASS, {"River_4": DAMAGED})
    serve(monkeypatch, "eurosat", archive)
    options = SourceOptions(data_dir=folder / "tfds")
    return Source("tfds:eurosat", "tfds:eurosatt", "River_4.jpg", cut=True, options=options)


def hugging_face(folder: Path, _: pytest.MonkeyPatch) -> Source:
    features = datasets.Features(
        {"picture": datasets.Image(), "breed": datasets.ClassLabel(names=["pug", "boxer"])}
    )
    pictures = [{"bytes": image_bytes(n), "path": None} for n in range(2 * PER_CLASS)]
    pictures[7] = {"bytes": DAMAGED, "path": None}
    columns = {"picture": pictures, "breed": [n % 2 for n in range(2 * PER_CLASS)]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": rows}).save_to_disk(folder / "dogs")
    return Source(f"hf:{folder}/dogs", f"hf:{folder}/none", "train/7", cut=True)


def tars(folder: Path, _: pytest.MonkeyPatch) -> Source:
    for split, count in (("train", 3 * PER_CLASS), ("val", 4), ("test", 6)):
        for part in range(2):
            members: list[tuple[str, bytes]] = []
            for number in range(count):
                image = DAMAGED if (split, part, number) == ("train", 1, 5) else image_bytes(number)
                members += [(f"{number:03}.jpg", image), (f"{number:03}.cls", b"%d" % (number % 3))]
            write_tar(folder / "wds" / f"{split}-{part:04}.tar", members)
    return Source(f"wds:{folder}/wds", f"wds:{folder}/none", "train-0001.tar/005", cut=False)


def photographs(folder: Path, _: pytest.MonkeyPatch) -> Source:
    for number in range(PER_CLASS):
        write_image(folder / "new" / f"{number}.jpg", number)
    (folder / "new" / "3.jpg").write_bytes(DAMAGED)
    options = SourceOptions(class_names=["ant", "zebra"])
    spec = f"images:{folder}/new"
    return Source(spec, f"images:{folder}/none", "3.jpg", cut=False, options=options)


MAKERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Source]] = {
    **{"digits": digits, "folder": folder, "csv": table, "coop": coop},
    **{"images": photographs, "literature": literature, "tfds": eurosat, "hf": hugging_face},
    "wds": tars,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Made once per source; a builder's archive is needed at the first opening only."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        place = tmp_path_factory.mktemp(request.param)
        made = MAKERS[request.param](place, monkeypatch)
        open_dataset(made.spec, made.options)
    return made


@pytest.fixture(scope="module")
def data(source: Source) -> ImageDataset:
    return open_dataset(source.spec, source.options)


def pixels(split: Split, row: int) -> bytes | None:
    """None for the damaged image."""
    try:
        return np.asarray(read_rgb(partial(split.read, row))).tobytes()
    except BadImage:
        return None


def test_every_source_of_the_registry_is_in_this_suite() -> None:
    assert MAKERS.keys() == {*NAMED, *KINDS, "literature"}


def test_splits_ids_and_labels(data: ImageDataset) -> None:
    order = ("train", "val", "test", "unlabelled")
    assert list(data.splits) == [name for name in order if name in data.splits]
    assert {"train", "test"} <= data.splits.keys() or list(data.splits) == ["unlabelled"]
    assert len(set(data.class_names)) == len(data.class_names) >= 2
    assert all(isinstance(name, str) and name for name in data.class_names)
    assert all(template.count("{}") == 1 for template in data.templates)
    for name, split in data.splits.items():
        assert split.labels.dtype == np.int32
        assert len(split.ids) == len(split.labels) == len(set(split.ids)) > 0
        lowest, highest = (-1, 0) if name == "unlabelled" else (0, len(data.class_names))
        assert lowest <= split.labels.min() <= split.labels.max() < highest
        assert all(isinstance(name, str) and name for name in split.ids)
        assert split.origin
    ids = [name for split in data.splits.values() for name in split.ids]
    assert len(set(ids)) == len(ids)
    for split in (data.splits[name] for name in data.splits if name == "train"):
        assert np.unique(split.labels).tolist() == list(range(len(data.class_names)))


def test_provenance_is_json_with_what_the_format_asks_for(data: ImageDataset) -> None:
    stored = json.loads(json.dumps(data.provenance))
    assert stored == dict(data.provenance)
    assert {"name", "source", "version"} <= stored.keys()


def test_opened_again_it_is_the_same(source: Source, data: ImageDataset) -> None:
    again = open_dataset(source.spec, source.options)
    assert list(again.class_names) == list(data.class_names)
    assert again.provenance == data.provenance
    for name, split in data.splits.items():
        other = again.splits[name]
        assert list(other.ids) == list(split.ids)
        assert other.labels.tolist() == split.labels.tolist()
        np.testing.assert_array_equal(
            stamps(other, again.provenance), stamps(split, data.provenance)
        )
        for row in (0, len(split.ids) - 1):
            assert pixels(other, row) == pixels(split, row)


def test_images_are_read_in_threads_and_by_copies_of_the_split(data: ImageDataset) -> None:
    split = list(data.splits.values())[-1]
    rows = range(min(12, len(split.ids)))
    wanted = [pixels(split, row) for row in rows]
    copy = pickle.loads(pickle.dumps(split))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(partial(pixels, split), rows)) == wanted
        assert list(pool.map(partial(pixels, copy), rows)) == wanted


def test_a_damaged_image_is_a_bad_image_and_the_others_are_read(
    source: Source, data: ImageDataset
) -> None:
    bad = [
        name
        for split in data.splits.values()
        for row, name in enumerate(split.ids if source.damaged else ())
        if pixels(split, row) is None
    ]
    assert bad == ([source.damaged] if source.damaged else [])


def test_a_split_that_is_cut_has_a_seed_and_others_have_none(
    source: Source, data: ImageDataset
) -> None:
    other = open_dataset(source.spec, replace(source.options, seed=1))
    differ = [list(data.splits[name].ids) != list(other.splits[name].ids) for name in data.splits]
    assert all(differ) if source.cut else not any(differ)
    one, two = (sorted(n for s in d.splits.values() for n in s.ids) for d in (data, other))
    assert one == two


def test_every_image_has_a_stamp_and_a_file_or_none(data: ImageDataset) -> None:
    for split in data.splits.values():
        found = stamps(split, data.provenance)
        assert found.dtype == np.uint64
        assert len(found) == len(split.ids)
        assert UNKNOWN not in found
        if split.file is None:
            assert len(np.unique(found)) == len(found)
        else:
            assert split.file(0).name == split.ids[0].rpartition("/")[2]


def test_impossible_options_are_one_sentence(source: Source) -> None:
    with pytest.raises(UserError, match=r"^--split-seed must not be negative\.$"):
        open_dataset(source.spec, replace(source.options, seed=-1))
    for fraction in (1.0, -0.5, float("nan"), float("inf")):
        with pytest.raises(UserError) as caught:
            open_dataset(source.spec, replace(source.options, val=fraction, test=fraction))
        assert "\n" not in str(caught.value)


def test_what_is_not_there_is_one_sentence(source: Source) -> None:
    kind = source.spec.partition(":")[0]
    specs = [source.missing]
    if ":" in source.spec:
        specs += [f"{kind}:", f"{kind}:{'x' * 300}", f"{kind}:/dev/null", f"{kind}:~nosuchuser/x"]
    for spec in specs:
        with pytest.raises(UserError) as caught:
            open_dataset(spec, source.options)
        assert "\n" not in str(caught.value)
