"""`clip-adapter audit`: labels, twins and classes of a cache."""

import csv
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.registry import METHODS
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache as write_content
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.audit import main, print_audit
from clip_adapter.pipelines.commands.extract import main as extract
from clip_adapter.pipelines.deciding.audit import AuditConfig, audit
from clip_adapter.pipelines.deciding.twins import warn_of_near_equal
from tests.cache.small_cache import STATED, features, images, text, unlabelled
from tests.extract.image_folders import make_folder
from tests.pipelines.tiny_cache import TinyData, tiny_data, write_cache

CLEAN = tiny_data(train=(12, 12, 12, 12), noise=0.4, test=10)


def mislabelled() -> tuple[TinyData, list[int]]:
    """Three of the training images have the next class's label."""
    vectors, labels = CLEAN.splits["train"]
    wrong = [3, 17, 40]
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + 1) % 4
    return CLEAN.with_split("train", (vectors, labels)), wrong


def train_alone(counts: tuple[int, ...], **options: Any) -> TinyData:
    made = tiny_data(train=counts, val=0, test=0, **options)
    return TinyData({"train": made.splits["train"]}, made.text)


def with_twins(data: TinyData, copies: int) -> TinyData:
    """Test images at the end that are training images, some of them a little changed."""
    vectors, labels = data.splits["test"]
    train, own = data.splits["train"]
    again = train[:, :copies].copy()
    again[:, 1::2] *= 1 + 0.01 * np.random.default_rng(0).normal(size=again[:, 1::2].shape)
    joined = np.concatenate([vectors, again.astype(np.float32)], axis=1)
    return data.with_split("test", (joined, np.concatenate([labels, own[:copies]])))


def test_labels_that_all_other_images_speak_against(tmp_path: Path) -> None:
    data, wrong = mislabelled()
    found = audit(AuditConfig(write_cache(tmp_path / "c.h5", data)))
    total = sum(len(labels) for _, labels in data.splits.values())
    assert len(found.ids) == len(set(found.ids)) == total
    assert {f"train/{row}" for row in wrong} <= set(found.ids[:6])
    assert set(found.splits) == {"train", "val", "test"}
    of_id = dict(zip(found.ids, range(total), strict=True))
    for row in wrong:
        at = of_id[f"train/{row}"]
        assert found.labels[at] == data.splits["train"][1][row]
        assert found.likelier[at] != found.labels[at]
    suspicion = found.likelier_probabilities - found.probabilities
    assert (np.diff(suspicion) <= 1e-12).all()
    np.testing.assert_array_equal(found.listed, found.probabilities < 0.05)
    chosen = audit(AuditConfig(tmp_path / "c.h5", count=7))
    assert np.flatnonzero(chosen.listed).tolist() == list(range(7))


def test_the_terminal_shows_what_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of many classes those below 5 % are no first rows of the order."""
    cache = write_cache(tmp_path / "c.h5", train_alone((3,) * 60, noise=1.2))
    found = audit(AuditConfig(cache))
    listed = np.flatnonzero(found.listed)
    assert listed[:10].tolist() != list(range(10)), "choose data on which they are not the first"
    print_audit(AuditConfig(cache))
    first, *lines = capsys.readouterr().out.partition("labels: ")[2].splitlines()
    assert first.startswith(f"look at {len(listed)} images")
    assert [line.split()[0] for line in lines[:10]] == [found.ids[row] for row in listed[:10]]


def test_no_label_is_said_to_be_unlikely_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_audit(AuditConfig(write_cache(tmp_path / "c.h5", CLEAN), count=5))
    said = capsys.readouterr().out
    assert "likelier" not in said and "rather" not in said and said.count(" %  next class ") == 5
    print_audit(AuditConfig(write_cache(tmp_path / "alone.h5", train_alone((1,) * 6))))
    said = capsys.readouterr().out
    assert "5 %" not in said and "every image is the only one of its class" in said


def test_twins_on_two_sides_of_a_split_and_the_accuracy_with_and_without(tmp_path: Path) -> None:
    """The accuracy is that of a fit on train, over the test images with twins and those without."""
    data = with_twins(CLEAN, 6)
    found = audit(AuditConfig(write_cache(tmp_path / "c.h5", data)))
    pairs = {(f"train/{row}", f"test/{40 + row}") for row in range(6)}
    groups = {
        tuple(np.array(found.ids)[found.twins.groups == number])
        for number in range(found.twins.count)
    }
    assert {tuple(sorted(group, reverse=True)) for group in groups} == pairs
    equal = {found.ids[row] for row in np.unique(found.twins.equal)}
    assert equal == {name for n in (0, 2, 4) for name in (f"train/{n}", f"test/{40 + n}")}
    (measured,) = found.accuracies
    assert (measured.split, measured.images, measured.twins) == ("test", 46, 6)

    gda, (train, labels) = METHODS["gda"], data.splits["train"]
    scale = np.float32(20.0), np.float32(0.5)
    unit = data.text / np.linalg.norm(data.text, axis=-1, keepdims=True)
    mean = unit.mean(axis=1)
    head = Head(mean / np.linalg.norm(mean, axis=1, keepdims=True), *scale)
    none = np.zeros(0, np.int32)
    task = Task(train, labels.astype(np.int32), train[0, :0], none, head, np.int32(0))
    arrays = gda.fit(np, task, gda.defaults())
    vectors, wanted = data.splits["test"]
    right = gda.logits(np, arrays, gda.defaults(), vectors[0], head).argmax(axis=1) == wanted
    assert measured.with_twins == pytest.approx(right.mean())
    assert measured.without_twins == pytest.approx(right[:40].mean())


def test_the_table_and_the_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = mislabelled()
    data = with_twins(data, 4)
    cache = write_cache(tmp_path / "c.h5", data, ["=1+1", "b", "c", "d"])
    out, page = tmp_path / "audit.csv", tmp_path / "audit.html"
    for old in (out, page):
        old.write_text("of before")
    for refused in (AuditConfig(cache, out=out), AuditConfig(cache, html=page)):
        with pytest.raises(UserError, match="exists; choose another name, or --force to overwrite"):
            audit(refused)
    assert out.read_text() == page.read_text() == "of before"
    print_audit(AuditConfig(cache, out=out, force=True))
    said = capsys.readouterr().out
    assert "labels: look at " in said and "wrong" not in said
    assert "4 of 44 test images have a twin in another split: gda on train gets" in said
    assert "8 images in 4 groups of near-equal ones, 4 of them equal" in said
    found = audit(AuditConfig(cache))
    frame = found.to_frame()
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(frame.columns) == list(found.columns())
    assert [row["image"] for row in rows] == list(frame["image"])
    assert {row["label"] for row in rows} == {"'=1+1", "b", "c", "d"}
    for row, (_, cells) in zip(rows, frame.iterrows(), strict=True):
        assert float(row["probability"]) == pytest.approx(cells["probability"], rel=1e-5)
        assert row["listed"] == ("yes" if cells["listed"] else "no")
        assert row["group"] == ("" if np.isnan(cells["group"]) else str(int(cells["group"])))
    assert sum(row["other_split"] == "yes" for row in rows) == 8


def test_equal_pixels_and_other_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images that are equal by their digests, one of which has another label."""
    content = text(dim=16)
    content |= images("train", features(1, 1, 30, 16), digests=[*range(29), 3])
    content |= images("test", features(2, 1, 12, 16), [0, 1, 2] * 4, digests=[4, *range(50, 61)])
    cache = tmp_path / "c.h5"
    write_content(cache, content, **STATED | {"backbone": STATED["backbone"] | {"embed_dim": 16}})
    found = audit(AuditConfig(cache))
    groups = [
        {found.ids[row] for row in np.flatnonzero(found.twins.groups == number)}
        for number in range(found.twins.count)
    ]
    assert sorted(map(sorted, groups)) == [["test/0", "train/4"], ["train/29", "train/3"]]
    disagreeing = found.twins.disagree(found.labels)  # labels: row % 3
    assert {found.ids[row] for row in np.flatnonzero(disagreeing)} == {
        "train/29", "train/3", "test/0", "train/4",
    }  # fmt: skip
    print_audit(AuditConfig(cache))
    assert "4 images have a twin with another label" in capsys.readouterr().out


def test_classes_with_like_texts_and_few_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_data(train=(9, 9, 9, 1), val=0, test=0)
    vectors = made.text.copy()
    vectors[1] = 3 * vectors[0]
    vectors[2] = vectors[0] + 0.2 * np.linalg.norm(vectors[0]) / 4 * np.ones(16)
    data = TinyData({"train": made.splits["train"]}, vectors)
    names = ["crane", "crane (bird)", "cranes", "eel"]
    found = audit(AuditConfig(write_cache(tmp_path / "c.h5", data, names)))
    assert [list(group) for group in found.one_text] == [["crane", "crane (bird)"]]
    assert [list(group) for group in found.near_text] == [["crane", "crane (bird)", "cranes"]]
    assert found.few == {"eel": 1}
    (alone,) = np.flatnonzero(found.labels == 3)
    assert np.isnan(found.probabilities[alone]) and alone == len(found.ids) - 1
    assert not found.listed[alone] and not found.accuracies
    print_audit(AuditConfig(tmp_path / "c.h5"))
    said = capsys.readouterr().out
    assert "these classes have the same text: 'crane', 'crane (bird)'; by it" in said
    assert "fewer than 4 training images: 'eel (1)'" in said
    assert "twins: no two images are equal or near-equal" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--out", "table.txt"], "table.txt is written as CSV"),
        (["--out", "nowhere/table.csv"], "nowhere/table.csv cannot be written"),
    ],
)
def test_refusals(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_cache(tmp_path / "c.h5", CLEAN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["c.h5", *options])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c.h5"]


def test_caches_of_which_nothing_can_be_said(tmp_path: Path) -> None:
    few: dict[str, Any] = text(classes=2) | images("train", features(0, 1, 2, 4), [0, 1])
    write_content(tmp_path / "few.h5", few, **STATED)
    one = text(classes=1) | images("train", features(0, 1, 5, 4), [0] * 5)
    write_content(tmp_path / "one.h5", one, **STATED)
    with pytest.raises(UserError, match="has 2 labelled images of 2 classes"):
        audit(AuditConfig(tmp_path / "few.h5"))
    with pytest.raises(UserError, match="has 5 labelled images of 1 class;"):
        audit(AuditConfig(tmp_path / "one.h5"))


def test_near_equal_images_across_a_split_that_extract_has_cut(tmp_path: Path) -> None:
    class Hearing(Listener):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def warn(self, sentence: str) -> None:
            self.heard.append(sentence)

    def said(cut: str, copies: int) -> list[str]:
        data, hearing = with_twins(CLEAN, copies), Hearing()
        content: dict[str, Any] = {
            "text/features": data.text,
            "text/class_names": ["a", "b", "c", "d"],
            "text/templates": ["a {}", "the {}"],
        }
        for split, (vectors, labels) in data.splits.items():
            content |= images(split, vectors, labels)
        splits = {"dataset": STATED["dataset"] | {"splits": {"test": cut}}}
        backbone = {"backbone": STATED["backbone"] | {"embed_dim": 16}}
        write_content(tmp_path / "c.h5", content, force=True, **STATED | splits | backbone)
        warn_of_near_equal(tmp_path / "c.h5", hearing)
        return hearing.heard

    cut = "30% of one folder per class, stratified by class, seed 0"
    (sentence,) = said(cut, 5)
    assert sentence.startswith("5 images have a near-equal one in another split (5 of test)")
    assert "--group" in sentence and "clip-adapter audit c.h5" in sentence
    assert said("folder test", 5) == [] and said(cut, 0) == []


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(BytesIO(b64decode(content))) for content in found]


def test_the_page_shows_what_is_listed(digits_cache: Path, tmp_path: Path) -> None:
    """Of the embedded digits: each listed image, of whatever split, and each twin."""
    path = tmp_path / "audit.html"
    found = audit(AuditConfig(digits_cache, count=6, html=path))
    page = path.read_text()
    rows = [*np.flatnonzero(found.listed), *np.flatnonzero(found.twins.groups >= 0)]
    assert len({found.splits[row] for row in rows}) == 3
    shown = pictures(page)
    assert len(shown) == len(rows) > 6 and "The originals were not found" not in page
    for row, picture in zip(rows[:6], shown, strict=False):
        pixels = load_digits().images[int(found.ids[row].removeprefix("digits/"))]
        small = np.asarray(picture.convert("L").resize((8, 8)), float) / 255
        assert np.corrcoef(small.ravel(), pixels.ravel())[0, 1] > 0.9
        assert found.ids[row] in page
    assert "what to look at" in page and "did adapting help" not in page
    assert 'src="http' not in page and "Where these numbers come from" not in page


def test_the_page_takes_names_as_text_and_does_without_pictures(tmp_path: Path) -> None:
    data, _ = mislabelled()
    cache = write_cache(tmp_path / "c.h5", data, ["<script>1</script>", "b", "c", "d"])
    found = audit(AuditConfig(cache, count=48, html=tmp_path / "p.html"))
    page = (tmp_path / "p.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;1&lt;/script&gt;" in page
    assert not pictures(page) and "--images says where the paths" in page
    likelier = found.likelier_probabilities > found.probabilities
    assert page.count("rather ") == (found.listed & likelier).sum() > 0
    assert page.count("next ") == (found.listed & ~likelier).sum() > 0
    assert found.listed.sum() == 48
    with pytest.raises(UserError, match="--images is for the pictures of a page"):
        audit(AuditConfig(cache, images=tmp_path))


def test_extract_says_where_its_own_cut_parts_near_equal_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each photograph twice, the other time a little brighter, in one folder per class."""
    folder = make_folder(tmp_path / "data" / "all", {"one": 12}, ("cat", "dog")) / "one"
    for path in sorted(folder.rglob("*.png")):
        pixels = np.asarray(Image.open(path)).astype(int)
        brighter = Image.fromarray(np.clip(pixels + 1, 0, 255).astype(np.uint8))
        brighter.save(path.with_name(f"again {path.name}"))
    for cut, said in (((), True), (("--group", "parent"), False)):
        with pytest.raises(SystemExit) as ended:
            extract(["--dataset", f"folder:{folder}", "--out", str(tmp_path / "c.h5"), *cut])
        told = capsys.readouterr().err
        assert ended.value.code == (0 if said else 2)  # a class in one group cannot be divided
        assert ("a near-equal one in another split" in told) is said
    with FeatureCache(tmp_path / "c.h5") as cache:
        splits = {name: split for split in cache.splits for name in cache.ids(split)}
        away = {
            name for name in splits
            if splits[name] != splits[name.replace("again ", "") if "again " in name
                                      else name.replace("/", "/again ")]
        }  # fmt: skip
        counts = {split: sum(splits[name] == split for name in away) for split in ("val", "test")}
    found = audit(AuditConfig(str(tmp_path / "c.h5"), out=str(tmp_path / "a.csv")))  # type: ignore[arg-type]
    across = {name for name, own in zip(found.ids, found.twins.across, strict=True) if own}
    assert len(away - across) <= 2 and len(across - away) <= 2 and min(counts.values()) > 2


def test_a_cache_without_labelled_images(tmp_path: Path) -> None:
    write_content(tmp_path / "new.h5", text() | unlabelled(7), **STATED)
    with pytest.raises(UserError, match="has 0 labelled images of 3 classes"):
        audit(AuditConfig(tmp_path / "new.h5"))
