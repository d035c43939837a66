"""A cache keeps up with its source: what has changed is said, and an update equals a fresh run."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.text_tower import tower_path
from clip_adapter.errors import UserError
from clip_adapter.extract import job, local_encoding
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.console.terminal import Terminal
from tests.cache.rewriting import datasets
from tests.extract.image_folders import make_folder, photograph

CLASSES = ("cat", "dog", "eel")


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph(seed).save(path)


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@dataclass
class Cache:
    """A cache of the images in `root`. encoded: the ids that its last run encoded."""

    root: Path
    out: Path
    encoded: list[str]
    spec: str = ""

    def run(self, out: Path | None = None, **options: Any) -> Path:
        self.encoded.clear()
        spec = self.spec or f"folder:{self.root}"
        values: dict[str, Any] = {"dataset": spec, "out": out or self.out, "workers": 2} | options
        return extract(ExtractConfig(batch_size=4, **values), Terminal("extract"))

    def refused(self, words: str, **options: Any) -> None:
        made = self.out.read_bytes()
        with pytest.raises(UserError, match=words) as caught:
            self.run(**options)
        assert "\n" not in str(caught.value)
        assert self.out.read_bytes() == made

    def update(self, **options: Any) -> list[str]:
        """Which images an update encoded. It equals a fresh run."""
        self.run(update=True, **options)
        encoded = sorted(self.encoded)
        fresh = self.run(self.out.with_name("fresh.h5"), force=True, **options)
        assert datasets(self.out) == datasets(fresh)
        assert not self.out.with_name(f"{self.out.name}.partial").exists()
        return encoded

    def save(self, name: str, seed: int) -> None:
        save(self.root / f"{name}.png", seed)


@pytest.fixture
def cache(tmp_path: Path, encoded: list[str]) -> Cache:
    root = make_folder(tmp_path / "data", {"train": 5, "val": 1, "test": 3}, CLASSES)
    return Cache(root, tmp_path / "features.h5", encoded)


def test_changes_are_told_and_only_they_are_encoded(
    cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(cache.root / "train" / "dog" / "03.png")
    options: dict[str, Any] = {"views": 2, "on_error": "skip"}
    cache.run(**options)
    cache.run(**options)
    assert "nothing to do" in capsys.readouterr().out

    cache.save("train/dog/03", 200)  # repaired
    cache.save("train/cat/00", 201)
    cache.save("train/cat/0a", 202)
    cache.save("test/eel/99", 203)
    (cache.root / "test" / "cat" / "01.png").unlink()
    os.utime(cache.root / "val" / "cat" / "00.png", (1, 1))  # the same content
    words = r"has now: 2 images new, 1 image gone, 2 images changed; --update encodes what is new"
    cache.refused(words, **options)
    assert cache.update(**options) == [
        "test/eel/99.png", "train/cat/00.png", "train/cat/0a.png", "train/dog/03.png",
    ]  # fmt: skip
    capsys.readouterr()
    cache.run(update=True, **options)
    assert "nothing to do" in capsys.readouterr().out
    assert not cache.encoded


def test_images_that_exchange_names_are_noticed(
    tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal sizes and times, as an archive sets them; and where the file system does not keep
    when a file was changed, as FAT."""
    cache = Cache(tmp_path / "data", tmp_path / "features.h5", encoded)
    files = [cache.root / f"{name}.bmp" for name in ("cat/a", "cat/b", "dog/a", "dog/b")]
    options = {"val": 0.0, "test": 0.5}

    def write(*seeds: int) -> None:
        for file, seed in zip(files, seeds, strict=True):
            save(file, seed)
            os.utime(file, (1e9, 1e9))

    write(0, 1, 2, 3)
    cache.run(**options)
    first = [file.read_bytes() for file in files]
    for file, content in ((files[0], first[3]), (files[3], first[0])):
        file.write_bytes(content)
        os.utime(file, (1e9, 1e9))
    cache.refused(r"has now: 2 images changed; --update", **options)
    assert cache.update(**options) == ["cat/a.bmp", "dog/b.bmp"]

    stat = Path.stat

    def coarse(self: Path, **options: Any) -> Any:
        found = stat(self, **options)
        if self.suffix != ".bmp":
            return found
        return os.stat_result((*found[:10], 1e9, 1e9, 1e9, 10**18, 10**18, 10**18))

    monkeypatch.setattr(Path, "stat", coarse)
    cache.run(update=True, **options)
    cache.run(**options)
    write(0, 1, 2, 3)
    cache.refused(r"has now: 2 images changed; --update", **options)


def test_a_new_class_shifts_the_labels(cache: Cache) -> None:
    cache.run()
    for split in ("train", "val", "test"):
        cache.save(f"{split}/bee/1", len(split) + 300)
    shutil.rmtree(cache.root / "val" / "eel")
    cache.refused(r"3 images new, 1 image gone, class 'bee' new; --update")
    assert cache.update() == ["test/bee/1.png", "train/bee/1.png", "val/bee/1.png"]


def test_a_cut_split_moves_images(tmp_path: Path, encoded: list[str]) -> None:
    cache = Cache(tmp_path / "data", tmp_path / "features.h5", encoded)
    for number in range(12):
        for name in CLASSES:
            cache.save(f"{name}/{number}", 400 + number * 3 + CLASSES.index(name))
    (cache.root / "cat" / "0.png").unlink()
    cache.run(views=1)
    cache.save("cat/0", 500)
    cache.save("dog/7a", 501)
    cache.refused(r"2 images new, [1-4] images? moved to another split; --update", views=1)
    updated = cache.update(views=1)
    # What comes to train from elsewhere has no augmented views yet.
    assert {"cat/0.png", "dog/7a.png"} <= set(updated)
    assert len(updated) <= 2 + 4
    options = {"split_seed": 3, "val": 0.1}
    assert 0 < len(cache.update(views=1, **options)) < 24
    assert cache.update(views=0, **options) == []  # fewer views are there already


def test_a_table_in_another_order(cache: Cache) -> None:
    rows = [
        f"{path.relative_to(cache.root)},{path.parent.name},{path.parent.parent.name}"
        for path in sorted(cache.root.rglob("*.png"))
    ]
    table = cache.root / "table.csv"
    cache.spec = f"csv:{table}"

    def write() -> None:
        table.write_text("\n".join(["path,label,split", *rows]))

    write()
    cache.run()
    random.Random(0).shuffle(rows)
    write()
    cache.refused(r"has now: images in another order; --update")
    assert cache.update() == []
    with h5py.File(cache.out) as file:
        ids = file["images/train/ids"].asstr()[...].tolist()
    assert ids == [row.split(",")[0] for row in rows if row.endswith("train")]
    rows[0] = rows[0].replace(",cat,", ",dog,").replace(",eel,", ",dog,")
    rows[1] = rows[1].replace(",test", ",train").replace(",val", ",train")
    write()
    cache.update()


def test_prompts_alone(cache: Cache, tmp_path: Path) -> None:
    cache.run()
    words = r"made with other arguments \(templates differ\); choose another --out, --update to"
    cache.refused(words, templates=("a {}", "the {}"))
    assert cache.update(templates=("a {}", "the {}")) == []
    descriptions = tmp_path / "descriptions.json"
    for sentences in (["one"], ["one", "two"], ["two", "one"]):
        descriptions.write_text(json.dumps({name: sentences for name in CLASSES}))
        assert cache.update(descriptions=descriptions) == []
    assert cache.update(prompt_control=7) == []
    cache.refused(r"made with other arguments \(prompt_control differ\)")
    assert cache.update() == []


def test_text_is_kept_where_only_images_changed(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.run()
    cache.save("train/cat/00", 600)
    with monkeypatch.context() as patch:
        patch.setattr(
            local_encoding, "encode_classes", lambda *_, **__: pytest.fail("text was encoded")
        )
        cache.run(update=True)
    cache.update()


def test_projection_and_tower(cache: Cache) -> None:
    """What goes with the features is kept with them, and a tower is added without encoding."""
    fresh = cache.out.with_name("fresh.h5")
    options: dict[str, Any] = {"views": 1, "with_projection": True, "on_error": "skip"}
    cache.run(**options)
    words = r"\(with_text_tower differ\); choose another --out, --update to keep"
    cache.refused(words, with_text_tower=True, **options)
    options["with_text_tower"] = True
    assert cache.update(**options) == []

    cache.save("train/bee/1", 650)
    cache.save("train/dog/02", 651)
    spoil(cache.root / "test" / "cat" / "01.png")
    assert cache.update(**options) == ["test/cat/01.png", "train/bee/1.png", "train/dog/02.png"]
    with FeatureCache(cache.out) as one, FeatureCache(fresh) as other:
        assert one.content_sha256 == other.content_sha256
        assert one.has("tokens") and one.has("pre_projection") and one.has("projection")
        assert len(one.class_names) == 4
    assert tower_path(cache.out).read_bytes() == tower_path(fresh).read_bytes()

    tower_path(cache.out).unlink()
    cache.refused(r"text_tower\.safetensors is missing.*; --update makes it again", **options)
    cache.update(**options)
    assert tower_path(cache.out).read_bytes() == tower_path(fresh).read_bytes()
    options["with_projection"] = False
    cache.refused(r"\(with_projection differ\); .*, or --force", update=True, **options)


def test_many_known_rows_between_the_new_ones(
    tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are written some at a time."""
    monkeypatch.setattr("clip_adapter.cache.schema.CHUNK_BYTES", 3 * 4 * 128)
    root = make_folder(tmp_path / "data", {"train": 14, "test": 1}, CLASSES)
    cache = Cache(root, tmp_path / "features.h5", encoded)
    options: dict[str, Any] = {"val": 0.0, "on_error": "skip"}
    cache.run(**options)
    for name in ("cat/02", "cat/03", "cat/13", "dog/12", "eel/13"):
        cache.save(f"train/{name}", 700 + len(name) + ord(name[0]) + int(name[-1]))
    for name in ("dog/05", "eel/06"):
        spoil(root / "train" / f"{name}.png")
    assert len(cache.update(**options)) == 7


def test_a_broken_image_that_was_removed_as_advised(
    cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = cache.root / "test" / "dog" / "00.png"
    spoil(broken)
    with pytest.raises(UserError, match=r"^test/dog/00.png cannot be decoded: .*remove it"):
        cache.run()
    broken.unlink()
    cache.save("train/eel/03", 800)
    cache.run()
    assert not {"train/cat/00.png", "val/dog/00.png"} & set(cache.encoded)
    assert {"train/eel/03.png", "test/eel/02.png"} <= set(cache.encoded)
    assert "goes on from image 17 of 26, where an earlier run stopped" in capsys.readouterr().err
    assert datasets(cache.out) == datasets(cache.run(cache.out.with_name("fresh.h5")))


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_update_goes_on(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    cache.run(views=1)
    for number in range(6):
        cache.save(f"train/bee/{number}", 900 + number)
        cache.save(f"test/bee/{number}", 920 + number)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "in_several_splits", interrupt)
        cache.run(views=1, update=True)
    if again:  # and meanwhile it changes once more
        cache.save("train/ant/1", 950)
    assert cache.update(views=1) == (["train/ant/1.png"] if again else [])


def other_weights(backbone: Any) -> None:
    backbone.identity["weights_sha256"] = "0" * 64


def other_preprocessing(backbone: Any) -> None:
    backbone.preprocess_config["mean"] = (0.4, 0.4, 0.4)


@pytest.mark.parametrize(
    ("change", "words"), [(other_weights, "weights"), (other_preprocessing, "preprocessing")]
)
def test_features_of_another_model_are_not_kept(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], words: str
) -> None:
    cache.run()
    cache.save("train/cat/00", 1000)
    load = local_encoding.load_backbone

    def changed(*arguments: Any) -> Any:
        backbone = load(*arguments)
        change(backbone)
        return backbone

    monkeypatch.setattr(local_encoding, "load_backbone", changed)
    cache.refused(rf"was made with other {words}, so --update can keep nothing", update=True)


def test_what_an_update_may_not_change(cache: Cache) -> None:
    cache.run()
    for options, words in (
        ({"augment_seed": 2}, r"\(augment_seed differ\); choose another --out, or --force"),
        ({"precision": "bf16"}, r"\(precision differ\)"),
        ({"force": True}, "--update brings one whole cache up to date"),
        ({"shard": "1/2"}, "--update brings one whole cache up to date"),
        ({"dataset": "digits"}, r"\(dataset differ\)"),
    ):
        cache.refused(words, update=True, **options)


def test_an_update_of_nothing_is_a_first_run(cache: Cache) -> None:
    assert len(cache.update()) == 27


def test_a_part_of_which_the_source_changed(cache: Cache) -> None:
    cache.run(shard="1/2")
    cache.save("test/cat/77", 1100)
    cache.refused(r"was made of other images than .* has now; --force", shard="1/2")


def test_stamps_of_digits_are_of_their_source(digits_cache: Path) -> None:
    with h5py.File(digits_cache) as file:
        stamps = file["images/train/stamps"][...]
        assert len(np.unique(stamps)) == len(stamps)
        assert not file["images/train/contents"][...].any()
