"""Whole runs on images without labels: beside others, or alone with the classes of a cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract import local_encoding
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.merge import MergeConfig, merge
from clip_adapter.pipelines.console.terminal import Terminal
from tests.cache.rewriting import datasets, rewrite
from tests.extract.image_folders import make_folder, photograph

CLASSES = ("cat", "dog", "eel")
COUNT = 13
SMALL: dict[str, Any] = {"batch_size": 4, "workers": 2}


def run(dataset: str, out: Path, **options: Any) -> Path:
    return extract(ExtractConfig(dataset=dataset, out=out, **SMALL, **options), Terminal("extract"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with prompts of its own, and its images."""
    root = tmp_path_factory.mktemp("labelled")
    make_folder(root / "data", {"train": 3, "test": 3}, CLASSES)
    sentences = {"cat": ["It purrs.", "It sleeps."], "dog": ["It barks."], "eel": ["It swims."]}
    (root / "sentences.json").write_text(json.dumps(sentences))
    options = {"templates": ("one {}", "a {}"), "descriptions": root / "sentences.json"}
    return run(f"folder:{root}/data", root / "labelled.h5", val=0.0, **options)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """Photographs without labels, one of them damaged and one in a folder of its own."""
    folder = tmp_path / "new"
    (folder / "of May").mkdir(parents=True)
    for number in range(COUNT - 1):
        photograph(100 + number).save(folder / f"{number}.png")
    photograph(99).save(folder / "of May" / "99.png")
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:100])
    return folder


def test_a_folder_of_photographs_with_the_classes_of_a_cache(
    labelled: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read with h5py alone: the prompts are the cache's, the features those of labelled images."""
    options = {"like": labelled, "on_error": "skip"}
    out = run(f"images:{new}", tmp_path / "new.h5", **options)
    said, told = capsys.readouterr()
    assert f"takes classes and prompts of {labelled}, and encodes with glyph-clip" in told
    assert f"{out}: {COUNT - 1} unlabelled images, 3 classes" in said
    assert "1 image skipped (1 unlabelled), the first: 7.png cannot be decoded" in said
    ids = [*(f"{n}.png" for n in range(COUNT - 1) if n != 7), "of May/99.png"]
    for split in ("train", "test"):  # the same pictures as a class
        shutil.copytree(new, tmp_path / "twin" / split / "cat")
        (tmp_path / "twin" / split / "dog").mkdir()
        photograph(1).save(tmp_path / "twin" / split / "dog" / "1.png")
    twin = run(f"folder:{tmp_path}/twin", tmp_path / "twin.h5", val=0.0, on_error="skip")
    with h5py.File(out) as file, h5py.File(labelled) as like, h5py.File(twin) as other:
        assert list(file["images"]) == ["unlabelled"]
        group = file["images/unlabelled"]
        assert not [name for name in group if "label" in name]
        assert group["ids"].asstr()[...].tolist() == ids
        assert group["skipped"].asstr()[...].tolist() == ["7.png"]
        for name in ("features", "digests", "contents"):
            rows = other[f"images/test/{name}"]
            wanted = rows[:, : COUNT - 1] if name == "features" else rows[: COUNT - 1]
            np.testing.assert_array_equal(group[name][...], wanted)
        for name in ("features", "class_names", "templates", "prompts"):
            assert file[f"text/{name}"][...].tobytes() == like[f"text/{name}"][...].tobytes()
        stated = json.loads(file["metadata"][...].tobytes())
        assert stated["dataset"]["splits"] == {"unlabelled": "images without labels"}
    run(f"images:{new}", out, **options)
    assert "nothing to do" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_and_an_update_encodes_what_is_new(
    labelled: Path, new: Path, tmp_path: Path, encoded: list[str]
) -> None:
    spec, out = f"images:{new}", tmp_path / "new.h5"
    with pytest.raises(UserError, match=r"7\.png cannot be decoded"):
        run(spec, out, like=labelled)
    (new / "7.png").unlink()
    encoded.clear()
    run(spec, out, like=labelled)
    assert 0 < len(encoded) < COUNT - 1 and "0.png" not in encoded
    assert datasets(out) == datasets(run(spec, tmp_path / "fresh.h5", like=labelled))
    photograph(300).save(new / "3.png")
    (new / "5.png").unlink()
    photograph(301).save(new / "of May" / "98.png")
    with pytest.raises(UserError, match="1 image new, 1 image gone, 1 image changed; --update"):
        run(spec, out, like=labelled)
    encoded.clear()
    run(spec, out, like=labelled, update=True)
    assert sorted(encoded) == ["3.png", "of May/98.png"]
    fresh = run(spec, tmp_path / "fresh.h5", like=labelled, force=True)
    assert datasets(out) == datasets(fresh)


def test_parts_join_into_the_undivided_cache(labelled: Path, new: Path, tmp_path: Path) -> None:
    options = {"like": labelled, "on_error": "skip"}
    whole = run(f"images:{new}", tmp_path / "whole.h5", **options)
    parts = [
        run(f"images:{new}", tmp_path / f"{part}.h5", shard=f"{part}/3", **options)
        for part in (1, 2, 3)
    ]
    merge(MergeConfig(out=tmp_path / "merged.h5", parts=tuple(parts[::-1])))
    assert datasets(tmp_path / "merged.h5") == datasets(whole)


def test_classes_from_a_list(new: Path, tmp_path: Path, encoded: list[str]) -> None:
    (new / "7.png").unlink()
    spec, out, names = f"images:{new}", tmp_path / "new.h5", tmp_path / "names.txt"
    names.write_text("zebra\n\n ant \n", encoding="utf-8")
    run(spec, out, classes=names, templates=("a {}",))
    with FeatureCache(out) as cache:
        assert cache.class_names == ["zebra", "ant"] and cache.templates == ["a {}"]
    names.write_text("zebra\nant\neel\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"made with other arguments \(classes differ\).*--update"):
        run(spec, out, classes=names, templates=("a {}",))
    encoded.clear()
    run(spec, out, classes=names, templates=("a {}",), update=True)
    assert not encoded
    with FeatureCache(out) as cache:
        assert cache.class_names == ["zebra", "ant", "eel"]
        assert cache.shape("unlabelled") == (1, COUNT - 1, 128)


def test_a_row_gets_its_label_later(
    tmp_path: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And keeps its features: it moves from one split to another."""
    root = tmp_path / "photographs"
    root.mkdir()
    for number in range(24):
        photograph(number).save(root / f"{number}.png")
    photograph(1).save(root / "twin.png")
    lines = [f"{n}.png,{'' if n >= 20 else CLASSES[n % 2]}" for n in range(24)] + ["twin.png,"]
    table = root / "t.csv"
    table.write_text("\n".join(["path,label", *lines]))
    out = run(f"csv:{table}", tmp_path / "t.h5")
    told = capsys.readouterr()
    assert "10 train, 4 val, 6 test, 5 unlabelled images, 2 classes" in told.out
    assert "t.csv has 5 rows without a label, the first of them 20.png: taken as un" in told.err
    assert "found 1 image in more than one split (" in told.err
    table.write_text("\n".join(["path,label", *lines]).replace("21.png,", "21.png,dog"))
    with pytest.raises(UserError, match=r"[12] images? moved to another split; --update"):
        run(f"csv:{table}", out)
    encoded.clear()
    run(f"csv:{table}", out, update=True)
    assert not encoded
    with FeatureCache(out) as cache:
        assert cache.ids("unlabelled") == ["20.png", "22.png", "23.png", "twin.png"]
        assert "21.png" in [name for split in cache.splits for name in cache.ids(split)]
    fresh = run(f"csv:{table}", tmp_path / "fresh.h5")
    assert datasets(out) == datasets(fresh)


def test_what_comes_before_the_projection_where_the_cache_has_it(
    new: Path, tmp_path: Path, digits_cache: Path
) -> None:
    (new / "7.png").unlink()
    like = run("digits", tmp_path / "like.h5", with_projection=True)
    out = run(f"images:{new}", tmp_path / "new.h5", like=like)
    with h5py.File(out) as file, h5py.File(like) as other:
        weights, group = file["projection/weights"][...], file["images/unlabelled"]
        np.testing.assert_array_equal(weights, other["projection/weights"][...])
        found = group["pre_projection"][0] @ weights
        np.testing.assert_allclose(found, group["features"][0], atol=1e-4)
    plain = run(f"images:{new}", tmp_path / "plain.h5", like=digits_cache)
    with FeatureCache(plain) as cache:
        assert not cache.has("pre_projection") and not cache.has("projection")


def test_arguments_that_say_too_little_or_too_much(labelled: Path, new: Path) -> None:
    images, out = f"images:{new}", new.with_name("out.h5")
    names = new.with_name("names.txt")
    names.write_text("a\na\n")
    empty = new.with_name("empty.txt")
    empty.write_text("\n")
    listed = new.with_name("list.json")
    listed.write_text('["cat",\n"dog"]')
    for dataset, options, words in (
        (images, {}, "has to be told the classes once, by a feature cache with --like"),
        (images, {"like": labelled, "classes": names}, "has to be told the classes once"),
        ("digits", {"like": labelled}, "are for --dataset images:FOLDER and wds:TARS, others"),
        ("digits", {"classes": names}, "are for --dataset images:FOLDER and wds:TARS, others"),
        (images, {"like": labelled, "views": 2}, "--views are of training images"),
        (images, {"like": labelled, "templates": ("a {}",)}, "--like takes the prompts of its"),
        (images, {"like": labelled, "with_text_tower": True}, "--like takes the prompts of its"),
        (images, {"like": labelled, "prompt_control": 0}, "--like takes the prompts of its"),
        (images, {"like": labelled, "val": 0.1}, "of images without labels; leave out --val"),
        (images, {"like": labelled, "columns": ("path=a",)}, "--columns is for csv: and hf:"),
        (images, {"like": out}, "--like and --out are both"),
        (images, {"like": new / "none.h5"}, "There is no feature cache at"),
        (images, {"like": new}, "cannot be read as HDF5"),
        (images, {"like": names}, "cannot be read as HDF5"),
        (images, {"classes": names}, "names.txt has the class name 'a' twice"),
        (images, {"classes": empty}, "empty.txt has no class names; write one per line"),
        (images, {"classes": listed}, "list.json holds code or JSON .*, not class names"),
        (images, {"classes": new / "none"}, "Cannot read .*none: No such file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            run(dataset, out, **options)
        assert "\n" not in str(caught.value) and not out.exists()
        assert not out.with_name("out.h5.partial").exists(), options


def of_mine(document: dict[str, Any]) -> None:
    document["backbone"] |= {"name": "hf-hub:somebody/model", "pretrained": "hf-hub:somebody/model"}


def other_weights(document: dict[str, Any]) -> None:
    document["backbone"]["weights_sha256"] = "0" * 64


def other_preprocessing(document: dict[str, Any]) -> None:
    document["preprocess"]["mean"] = [0.4, 0.4, 0.4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_mine, "no model and tag of open_clip's; name the backbone with --backbone"),
        (other_weights, "with other weights, so its prompts do not fit; name the right ones"),
        (other_preprocessing, "with other preprocessing, so its prompts do not fit"),
    ],
)
def test_a_cache_of_another_backbone(
    labelled: Path,
    new: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], None],
    words: str,
) -> None:
    """Nothing of a received file is loaded unasked."""
    like = tmp_path / "like.h5"
    shutil.copyfile(labelled, like)
    rewrite(like, lambda file, document: change(document))
    if change is of_mine:
        monkeypatch.setattr(local_encoding, "load_backbone", None)
    with pytest.raises(UserError, match=words):
        run(f"images:{new}", tmp_path / "new.h5", like=like)
    assert not list(tmp_path.glob("new.h5*"))


def test_a_backbone_that_is_named_is_taken(labelled: Path, new: Path, tmp_path: Path) -> None:
    """Where its weights lie elsewhere now; they are compared with the cache's."""
    from clip_adapter.extract.backbones.names import GLYPH_CLIP_FOLDER

    (new / "7.png").unlink()
    like = tmp_path / "like.h5"
    shutil.copyfile(labelled, like)
    rewrite(like, lambda file, document: of_mine(document))
    backbone = f"local-dir:{GLYPH_CLIP_FOLDER}"
    out = run(f"images:{new}", tmp_path / "new.h5", like=like, backbone=backbone)
    plain = run(f"images:{new}", tmp_path / "plain.h5", like=labelled)
    name = "images/unlabelled/features"
    assert datasets(out)[name] == datasets(plain)[name]
