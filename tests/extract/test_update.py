"""A cache keeps up with its source: what has changed is said, and an update equals a fresh run."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.text_tower import tower_path
from clip_adapter.errors import UserError
from clip_adapter.extract import job, stage
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.console.terminal import Terminal
from tests.cache.rewriting import datasets
from tests.extract.image_folders import make_folder, photograph

CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the images that were encoded since it was last cleared."""
    found: list[str] = []
    encode = stage.encode_images

    def noting(encoder: Any, split: Any, plan: Plan, watch: Any) -> Any:
        found.extend(split.ids[row] for row in plan.rows)
        return encode(encoder, split, plan, watch)

    monkeypatch.setattr(stage, "encode_images", noting)
    return found


def run(dataset: str, out: Path, **options: Any) -> Path:
    values: dict[str, Any] = {"batch_size": 4, "workers": 2, **options}
    return extract(ExtractConfig(dataset=dataset, out=out, **values), Terminal("extract"))


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph(seed).save(path)


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def refused(dataset: str, out: Path, words: str, **options: Any) -> None:
    made = out.read_bytes()
    with pytest.raises(UserError, match=words) as caught:
        run(dataset, out, **options)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == made


def updated_equals_fresh(dataset: str, out: Path, tmp_path: Path, **options: Any) -> None:
    run(dataset, out, update=True, **options)
    fresh = run(dataset, tmp_path / "fresh.h5", force=True, **options)
    assert datasets(out) == datasets(fresh)
    assert not out.with_name(f"{out.name}.partial").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", {"train": 5, "val": 1, "test": 3}, CLASSES)


def test_changes_are_told_and_only_they_are_encoded(
    folder: Path, tmp_path: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = f"folder:{folder}", tmp_path / "features.h5"
    spoil(folder / "train" / "dog" / "03.png")
    options = {"views": 2, "on_error": "skip"}
    run(spec, out, **options)
    run(spec, out, **options)
    assert "nothing to do" in capsys.readouterr().out

    save(folder / "train" / "dog" / "03.png", 200)  # repaired
    save(folder / "train" / "cat" / "00.png", 201)
    save(folder / "train" / "cat" / "0a.png", 202)
    save(folder / "test" / "eel" / "99.png", 203)
    (folder / "test" / "cat" / "01.png").unlink()
    os.utime(folder / "val" / "cat" / "00.png", (1, 1))  # the same content
    words = r"has now: 2 images new, 1 image gone, 2 images changed; --update encodes what is new"
    refused(spec, out, words, **options)
    encoded.clear()
    run(spec, out, update=True, **options)
    assert sorted(encoded) == [
        "test/eel/99.png", "train/cat/00.png", "train/cat/0a.png", "train/dog/03.png",
    ]  # fmt: skip
    encoded.clear()
    run(spec, out, update=True, **options)
    assert "nothing to do" in capsys.readouterr().out
    assert not encoded
    updated_equals_fresh(spec, out, tmp_path, **options)


def test_images_that_exchange_names_are_noticed(
    tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal sizes and times, as an archive sets them; and where the file system does not keep
    when a file was changed, as FAT."""
    root = tmp_path / "data"
    for seed, name in enumerate(("cat/a", "cat/b", "dog/a", "dog/b")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(seed).save(root / f"{name}.bmp")
    spec, out = f"folder:{root}", tmp_path / "features.h5"

    def exchange() -> None:
        files = root / "cat" / "a.bmp", root / "dog" / "b.bmp"
        first, second = (file.read_bytes() for file in files)
        for file, content in zip(files, (second, first), strict=True):
            file.write_bytes(content)
        for file in root.rglob("*.bmp"):
            os.utime(file, (1e9, 1e9))

    for file in root.rglob("*.bmp"):
        os.utime(file, (1e9, 1e9))
    run(spec, out, val=0.0, test=0.5)
    exchange()
    refused(spec, out, r"has now: 2 images changed; --update", val=0.0, test=0.5)
    encoded.clear()
    updated_equals_fresh(spec, out, tmp_path, val=0.0, test=0.5)
    assert sorted(encoded[:2]) == ["cat/a.bmp", "dog/b.bmp"]

    stat = Path.stat

    def coarse(self: Path, **options: Any) -> Any:
        found = stat(self, **options)
        if self.suffix != ".bmp":
            return found
        return os.stat_result((*found[:10], 1e9, 1e9, 1e9, 10**18, 10**18, 10**18))

    monkeypatch.setattr(Path, "stat", coarse)
    run(spec, out, update=True, val=0.0, test=0.5)
    run(spec, out, val=0.0, test=0.5)
    exchange()
    refused(spec, out, r"has now: 2 images changed; --update", val=0.0, test=0.5)


def test_a_new_class_shifts_the_labels(folder: Path, tmp_path: Path, encoded: list[str]) -> None:
    spec, out = f"folder:{folder}", tmp_path / "features.h5"
    run(spec, out)
    for split in ("train", "val", "test"):
        save(folder / split / "bee" / "1.png", len(split) + 300)
    shutil.rmtree(folder / "val" / "eel")
    refused(spec, out, r"3 images new, 1 image gone, class 'bee' new; --update")
    encoded.clear()
    run(spec, out, update=True)
    assert sorted(encoded) == ["test/bee/1.png", "train/bee/1.png", "val/bee/1.png"]
    updated_equals_fresh(spec, out, tmp_path)


def test_a_cut_split_moves_images(tmp_path: Path, encoded: list[str]) -> None:
    root = make_folder(tmp_path / "data", {"a": 1}, CLASSES) / "a"
    for number in range(11):
        for name in CLASSES:
            save(root / name / f"{number + 1}.png", 400 + number * 3 + CLASSES.index(name))
    spec, out = f"folder:{root}", tmp_path / "features.h5"
    run(spec, out, views=1)
    save(root / "cat" / "0.png", 500)
    save(root / "dog" / "7a.png", 501)
    refused(spec, out, r"2 images new, [1-4] images? moved to another split; --update", views=1)
    encoded.clear()
    run(spec, out, update=True, views=1)
    # What comes to train from elsewhere has no augmented views yet.
    assert {"cat/0.png", "dog/7a.png"} <= set(encoded)
    assert len(encoded) <= 2 + 4
    updated_equals_fresh(spec, out, tmp_path, views=1)
    encoded.clear()
    run(spec, out, update=True, views=1, split_seed=3, val=0.1)
    assert 0 < len(encoded) < 24
    updated_equals_fresh(spec, out, tmp_path, views=1, split_seed=3, val=0.1)
    encoded.clear()
    run(spec, out, update=True, views=0, split_seed=3, val=0.1)
    assert not encoded  # fewer views are there already
    updated_equals_fresh(spec, out, tmp_path, views=0, split_seed=3, val=0.1)


def test_a_table_in_another_order(folder: Path, tmp_path: Path, encoded: list[str]) -> None:
    rows = [
        f"{path.relative_to(folder)},{path.parent.name},{path.parent.parent.name}"
        for path in sorted(folder.rglob("*.png"))
    ]
    table = folder / "table.csv"

    def write() -> None:
        table.write_text("\n".join(["path,label,split", *rows]))

    write()
    spec, out = f"csv:{table}", tmp_path / "features.h5"
    run(spec, out)
    random.Random(0).shuffle(rows)
    write()
    refused(spec, out, r"has now: images in another order; --update")
    encoded.clear()
    updated_equals_fresh(spec, out, tmp_path)
    with h5py.File(out) as file:
        ids = file["images/train/ids"].asstr()[...].tolist()
    assert ids == [row.split(",")[0] for row in rows if row.endswith("train")]
    rows[0] = rows[0].replace(",cat,", ",dog,").replace(",eel,", ",dog,")
    rows[1] = rows[1].replace(",test", ",train").replace(",val", ",train")
    write()
    updated_equals_fresh(spec, out, tmp_path)


def test_prompts_alone(folder: Path, tmp_path: Path, encoded: list[str]) -> None:
    spec, out = f"folder:{folder}", tmp_path / "features.h5"
    run(spec, out)
    words = r"made with other arguments \(templates differ\); choose another --out, --update to"
    refused(spec, out, words, templates=("a {}", "the {}"))
    encoded.clear()
    run(spec, out, update=True, templates=("a {}", "the {}"))
    assert not encoded
    updated_equals_fresh(spec, out, tmp_path, templates=("a {}", "the {}"))
    descriptions = tmp_path / "descriptions.json"
    for sentences in (["one"], ["one", "two"], ["two", "one"]):
        descriptions.write_text(json.dumps({name: sentences for name in CLASSES}))
        encoded.clear()
        run(spec, out, update=True, descriptions=descriptions)
        assert not encoded
        updated_equals_fresh(spec, out, tmp_path, descriptions=descriptions)


def test_text_is_kept_where_only_images_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = f"folder:{folder}", tmp_path / "features.h5"
    run(spec, out)
    save(folder / "train" / "cat" / "00.png", 600)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "encode_classes", lambda *_, **__: pytest.fail("text was encoded"))
        run(spec, out, update=True)
    updated_equals_fresh(spec, out, tmp_path)


def test_projection_and_tower(folder: Path, tmp_path: Path, encoded: list[str]) -> None:
    """What goes with the features is kept with them, and a tower is added without encoding."""
    spec, out, fresh = f"folder:{folder}", tmp_path / "features.h5", tmp_path / "fresh.h5"
    options = {"views": 1, "with_projection": True, "on_error": "skip"}
    run(spec, out, **options)
    words = r"\(with_text_tower differ\); choose another --out, --update to keep"
    refused(spec, out, words, with_text_tower=True, **options)
    options["with_text_tower"] = True
    encoded.clear()
    run(spec, out, update=True, **options)
    assert not encoded
    updated_equals_fresh(spec, out, tmp_path, **options)

    save(folder / "train" / "bee" / "1.png", 650)
    save(folder / "train" / "dog" / "02.png", 651)
    spoil(folder / "test" / "cat" / "01.png")
    encoded.clear()
    run(spec, out, update=True, **options)
    assert sorted(encoded) == ["test/cat/01.png", "train/bee/1.png", "train/dog/02.png"]
    updated_equals_fresh(spec, out, tmp_path, **options)
    with FeatureCache(out) as one, FeatureCache(fresh) as other:
        assert one.content_sha256 == other.content_sha256
        assert one.has("tokens") and one.has("pre_projection") and one.has("projection")
        assert len(one.class_names) == 4
    assert tower_path(out).read_bytes() == tower_path(fresh).read_bytes()

    tower_path(out).unlink()
    refused(spec, out, r"text_tower\.safetensors is missing.*; --update makes it again", **options)
    encoded.clear()
    updated_equals_fresh(spec, out, tmp_path, **options)
    assert tower_path(out).read_bytes() == tower_path(fresh).read_bytes()
    options["with_projection"] = False
    refused(spec, out, r"\(with_projection differ\); .*, or --force", update=True, **options)


def test_many_known_rows_between_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are written some at a time."""
    monkeypatch.setattr("clip_adapter.cache.schema.CHUNK_BYTES", 3 * 4 * 128)
    root = make_folder(tmp_path / "data", {"train": 14, "test": 1}, CLASSES)
    spec, out = f"folder:{root}", tmp_path / "features.h5"
    options = {"val": 0.0, "on_error": "skip"}
    run(spec, out, **options)
    for name in ("cat/02", "cat/03", "cat/13", "dog/12", "eel/13"):
        save(root / "train" / f"{name}.png", 700 + len(name) + ord(name[0]) + int(name[-1]))
    for name in ("dog/05", "eel/06"):
        spoil(root / "train" / f"{name}.png")
    updated_equals_fresh(spec, out, tmp_path, **options)


def test_a_broken_image_that_was_removed_as_advised(
    folder: Path, tmp_path: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = f"folder:{folder}", tmp_path / "features.h5"
    broken = folder / "test" / "dog" / "00.png"
    spoil(broken)
    with pytest.raises(UserError, match=r"^test/dog/00.png cannot be decoded: .*remove it"):
        run(spec, out)
    broken.unlink()
    save(folder / "train" / "eel" / "03.png", 800)
    encoded.clear()
    run(spec, out)
    assert not {"train/cat/00.png", "val/dog/00.png"} & set(encoded)
    assert {"train/eel/03.png", "test/eel/02.png"} <= set(encoded)
    assert "goes on from image 17 of 26, where an earlier run stopped" in capsys.readouterr().err
    fresh = run(spec, tmp_path / "fresh.h5")
    assert datasets(out) == datasets(fresh)


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_update_goes_on(
    folder: Path, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    spec, out = f"folder:{folder}", tmp_path / "features.h5"
    run(spec, out, views=1)
    for number in range(6):
        save(folder / "train" / "bee" / f"{number}.png", 900 + number)
        save(folder / "test" / "bee" / f"{number}.png", 920 + number)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "in_several_splits", interrupt)
        run(spec, out, views=1, update=True)
    if again:  # and meanwhile it changes once more
        save(folder / "train" / "ant" / "1.png", 950)
    encoded.clear()
    run(spec, out, views=1, update=True)
    assert encoded == (["train/ant/1.png"] if again else [])
    updated_equals_fresh(spec, out, tmp_path, views=1)


def other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    load = job.load_backbone

    def changed(*arguments: Any) -> Any:
        backbone = load(*arguments)
        backbone.identity["weights_sha256"] = "0" * 64
        return backbone

    monkeypatch.setattr(job, "load_backbone", changed)


def other_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    load = job.load_backbone

    def changed(*arguments: Any) -> Any:
        backbone = load(*arguments)
        backbone.preprocess_config["mean"] = (0.4, 0.4, 0.4)
        return backbone

    monkeypatch.setattr(job, "load_backbone", changed)


@pytest.mark.parametrize(
    ("change", "words"), [(other_weights, "weights"), (other_preprocessing, "preprocessing")]
)
def test_features_of_another_model_are_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None], words: str,
) -> None:  # fmt: skip
    spec, out = f"folder:{folder}", tmp_path / "features.h5"
    run(spec, out)
    save(folder / "train" / "cat" / "00.png", 1000)
    change(monkeypatch)
    refused(spec, out, rf"was made with other {words}, so --update can keep nothing", update=True)


def test_what_an_update_may_not_change(folder: Path, tmp_path: Path) -> None:
    spec, out = f"folder:{folder}", tmp_path / "features.h5"
    run(spec, out)
    for options, words in (
        ({"augment_seed": 2}, r"\(augment_seed differ\); choose another --out, or --force"),
        ({"precision": "bf16"}, r"\(precision differ\)"),
        ({"force": True}, "--update brings one whole cache up to date"),
        ({"shard": "1/2"}, "--update brings one whole cache up to date"),
    ):
        refused(spec, out, words, update=True, **options)
    refused("digits", out, r"\(dataset differ\)", update=True)


def test_an_update_of_nothing_is_a_first_run(folder: Path, tmp_path: Path) -> None:
    updated_equals_fresh(f"folder:{folder}", tmp_path / "features.h5", tmp_path)


def test_a_part_of_which_the_source_changed(folder: Path, tmp_path: Path) -> None:
    spec, part = f"folder:{folder}", tmp_path / "1.h5"
    run(spec, part, shard="1/2")
    save(folder / "test" / "cat" / "77.png", 1100)
    refused(spec, part, r"was made of other images than .* has now; --force", shard="1/2")


def test_stamps_of_digits_are_of_their_source(digits_cache: Path) -> None:
    with h5py.File(digits_cache) as file:
        stamps = file["images/train/stamps"][...]
        assert len(np.unique(stamps)) == len(stamps)
        assert not file["images/train/contents"][...].any()
