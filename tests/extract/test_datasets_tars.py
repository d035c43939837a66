"""Tars are read where they lie: indexed as Python's tarfile does, and nothing else is done."""

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset, SourceOptions
from clip_adapter.extract.datasets.tar_index import tar_index
from clip_adapter.extract.known import stamps
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.console.terminal import Terminal
from tests.extract.data_set_archives import image_bytes, write_image, write_tar

IMAGE = image_bytes(7)
LONG = f"{'deep/' * 60}é{'x' * 120}"
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def sample(key: str, label: object = 0, suffix: str = "cls") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", IMAGE), (f"{key}.{suffix}", f"{label}".encode())]


def samples(count: int, classes: int = 2) -> list[tuple[str, bytes]]:
    return [one for number in range(count) for one in sample(f"{number:03}", number % classes)]


def opened(folder: Path, **options: Any) -> ImageDataset:
    return open_dataset(f"wds:{folder}", SourceOptions(**options))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as tar:
        return [(one.name, one.offset_data, one.size) for one in tar if one.isfile()]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_index_is_that_of_tarfile(tmp_path: Path, kind: int) -> None:
    members = [("./a.jpg", b"x" * 511), ("b/c.txt", b""), ("d" * 100, b"y" * 512), ("é.jpg", b"z")]
    members += [(f"{'p' * 90}/{'q' * 90}.jpg", b"w" * 513)]
    if kind != tarfile.USTAR_FORMAT:
        members += [(LONG, b"v" * 1025), ("last.jpg", b"u")]
    path = write_tar(tmp_path / "a.tar", members, kind)
    index, size, _ = tar_index(path)
    assert index.members == by_tarfile(path)
    assert len(index.members) == len(members)
    assert size == path.stat().st_size
    content = path.read_bytes()
    assert [content[at : at + length] for _, at, length in index.members] == [
        content for _, content in members
    ]


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_what_is_no_plain_file_is_named_and_left_out(tmp_path: Path, form: str) -> None:
    """Sparse files lie in the tar without their holes, so that their bytes are no image."""
    folder, path = tmp_path / "in", tmp_path / "train.tar"
    (folder / "z").mkdir(parents=True)
    for number in range(8):
        write_image(folder / "z" / f"{number}.jpg", number)
        (folder / "z" / f"{number}.cls").write_text(str(number % 2))
    with (folder / "a.jpg").open("wb") as file:
        for place in range(30):  # more pieces than a header holds
            file.seek(place * 2**16)
            file.write(b"x" * 4096)
    (folder / "b.jpg").symlink_to("/etc/passwd")
    (folder / "c.jpg").hardlink_to(folder / "z" / "0.jpg")
    os.mkfifo(folder / "d.jpg")
    subprocess.run(
        ["tar", f"--format={form}", "-S", "--sort=name", "-cf", path, "-C", folder, "."], check=True
    )
    index, _, _ = tar_index(path)
    names = [name for name, _, _ in index.members]
    assert len(names) == 16
    assert index.others.total() == 4
    assert {"link", "pipe", "sparse or split file"} == set(index.others)
    wanted = {one[0].removeprefix("./"): one for one in by_tarfile(path)}
    for name, offset, length in index.members:
        if name.removeprefix("./") in wanted:
            assert wanted[name.removeprefix("./")][1:] == (offset, length)
    data = opened(tmp_path)
    assert sum(f", the first in {path}." in remark for remark in data.remarks) == 3
    assert not any(path.name in ("a.jpg", "passwd") for path in tmp_path.iterdir())


def test_devices_and_names_that_lead_out_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (
            samples(10) + sample("../out") + sample("/etc/x") + sample("a/../../b")
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind in (("e.jpg", tarfile.CHRTYPE), ("f.jpg", tarfile.BLKTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
    data = opened(tmp_path)
    ids = sorted(name for split in data.splits.values() for name in split.ids)
    assert ids == [f"train.tar/{number:03}" for number in range(10)]
    assert "left out 6 files" in data.remarks[0]
    assert "'../out.jpg'" in data.remarks[0]
    assert data.remarks[1] == f"left out 2 devices, the first in {path}."
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.tar"]


@pytest.mark.parametrize("end", [0, 100, 512, 700, 1024, 1536, -10240, -1024 - 8192])
def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path: Path, end: int) -> None:
    path = write_tar(tmp_path / "train.tar", [("a.jpg", b"x" * 2000), ("a.cls", b"0")] * 9)
    whole = path.read_bytes()
    last = len(whole.rstrip(b"\0"))
    cut = end if end >= 0 else -(-last // 512) * 512  # where only the end's mark is missing
    path.write_bytes(whole[:cut])
    refused(tmp_path, r"train\.tar is (cut: it ends before|no tar)")
    refused(path, r"train\.tar is (cut: it ends before|no tar)")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("t.tar", gzip.compress, r"t\.tar is compressed, .* unpack it: gzip -d"),
        ("t.tar.gz", gzip.compress, r"t\.tar\.gz is compressed"),
        ("t.tgz", gzip.compress, r"t\.tgz is compressed"),
        ("t.tar", lambda whole: whole + whole, "has something behind its end"),
        ("t.tar", lambda whole: b"x" * len(whole), "is no tar"),
        ("t.tar", lambda whole: IMAGE, "is no tar"),
        ("t.tar", lambda whole: whole[:1024] + b"x" * 512 + whole[1536:], "damaged: at byte 1,024"),
        ("t.tar", lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("t.txt", lambda whole: whole, "names no tars"),
    ],
)
def test_what_is_no_tar_is_one_sentence(tmp_path: Path, name: str, change: Any, words: str) -> None:
    whole = write_tar(tmp_path / "t.tar", [("a.jpg", b"x" * 512), ("a.cls", b"0")]).read_bytes()
    (tmp_path / "t.tar").unlink()
    (tmp_path / name).write_bytes(change(whole))
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", IMAGE), ("a.jpg", IMAGE)], r"two images of the key 'a'; pack it anew"),
        ([("a.jpg", IMAGE), ("a.png", IMAGE)], r"two images of the key 'a'"),
        ([("a.left.jpg", IMAGE), ("a.right.jpg", IMAGE)], r"two images of the key 'a'"),
        ([*sample("a"), ("a.cls", b"1")], r"two labels \.cls of the key 'a'"),
        ([("a.cls", b"1")], "hold no images"),
        (sample("a", "one"), r"a\.cls is no label; write the number of a class"),
        (sample("a", -1), r"a\.cls says -1, which is no class"),
        (sample("a", 10**7), "which is no class"),
        (sample("a", "[1]", "json"), r"a\.json is no label"),
        (sample("a", '{"label": 1.5}', "json"), "says 1.5, which is no class"),
        (sample("a", '{"label": true}', "json"), "says True, which is no class"),
        (sample("a", "[" * 10**5, "json"), r"a\.json is no label"),
        ([("a.jpg", IMAGE), ("a.txt", b"\xff")], r"a\.txt is no label"),
        (sample("a", "x" * 2**21, "txt"), r"a\.txt is no label"),
        ([*sample("a"), *sample("b", "cat", "txt")], r"numbers \(0\) and names \('cat'\)"),
        (sample("a", "", "txt"), "No image of wds:.* has a label; name the classes with --like"),
        (sample("a", "1_0"), r"a\.cls is no label; .* \(names go into \.txt or \.json\)"),
        (sample("a", "١"), r"a\.cls is no label"),
    ],
)
def test_samples_that_cannot_be_used(
    tmp_path: Path, members: list[tuple[str, bytes]], words: str
) -> None:
    write_tar(tmp_path / "train.tar", members)
    refused(tmp_path, words)


def test_labels_of_every_kind(tmp_path: Path) -> None:
    members = [
        *sample("a", " 1\n"), *sample("b/c", '{"label": 0, "cls": 1}', "json"),
        *sample("d", '{"cls": "eel"}', "JSON"), *sample("e", "cat", "txt"), ("f.jpg", IMAGE),
        *sample("g", "{}", "json"), ("g.txt", b"dog"), ("a.txt", b"no class"), ("._a.jpg", b"x"),
        *sample("h", 2), *sample("i", 1),
    ]  # fmt: skip
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "test-0.tar", sample("a", 2))
    (tmp_path / "classnames.txt").write_text("cat\ndog\neel\n")
    data = opened(tmp_path, val=0)
    assert list(data.class_names) == ["cat", "dog", "eel"]
    found = dict(zip(data.splits["train"].ids, data.splits["train"].labels.tolist(), strict=True))
    keys = {"a": 1, "b/c": 0, "d": 2, "e": 0, "g": 1, "h": 2, "i": 1}
    assert found == {f"train-0.tar/{key}": label for key, label in keys.items()}
    assert data.splits["test"].labels.tolist() == [2]
    assert data.remarks == ["left out 1 image of the split 'train' without a label."]
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    refused(tmp_path, "lacks the class 'eel'|go up to 2, counted from 0")


def test_images_with_captions_are_taken_without_labels(tmp_path: Path) -> None:
    """As img2dataset packs them: a caption, and an object that says nothing of a class."""
    for number in range(2):
        members = [
            *sample("a", f"a photo of {number}", "txt"), ("a.json", b'{"caption": "x"}'),
            *sample("b", "no number"),
        ]  # fmt: skip
        write_tar(tmp_path / f"{number:05}.tar", members)
    data = opened(tmp_path, class_names=("cat", "dog"))
    assert data.class_names == ("cat", "dog")
    (split,) = data.splits.values()
    assert list(data.splits) == ["unlabelled"] and split.labels.tolist() == [-1] * 4
    assert split.ids == ["00000.tar/a", "00000.tar/b", "00001.tar/a", "00001.tar/b"]
    assert np.array_equal(split.read(3), split.read(0))
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    out = extract(ExtractConfig(f"wds:{tmp_path}", classes=names, out=tmp_path / "f.h5"))
    with h5py.File(out) as file:
        assert list(file["images"]) == ["unlabelled"]
        assert file["images/unlabelled/features"].shape[:2] == (1, 4)
    for others, words in (
        ({"like": out}, "has to be told the classes once"),
        ({"views": 2}, "--views are of training images"),
        ({"val": 0.1}, "of images without labels; leave out --val"),
    ):
        other = ExtractConfig(f"wds:{tmp_path}", classes=names, out=tmp_path / "g.h5", **others)
        with pytest.raises(UserError, match=words):
            extract(other)


def test_splits_are_the_first_words_of_the_tars(tmp_path: Path) -> None:
    for name in ("train-0.tar", "train_10.tar", "train-2.tar", "Val-0.tar", "extra-0.tar"):
        write_tar(tmp_path / name, samples(6))
    data = opened(tmp_path)
    tars = {name: list(dict.fromkeys(one.split("/")[0] for one in split.ids))
            for name, split in data.splits.items()}  # fmt: skip
    assert tars["test"] == ["Val-0.tar"]  # as of ImageNet
    assert sorted({*tars["train"], *tars["val"]}) == ["train-0.tar", "train-2.tar", "train_10.tar"]
    assert data.remarks == ["left out 6 images of the split 'extra'."]
    some = opened(tmp_path / "train*.tar")
    assert sum(len(split.ids) for split in some.splits.values()) == 18
    one = opened(tmp_path / "extra-0.tar", val=0)
    assert {name: len(split.ids) for name, split in one.splits.items()} == {"train": 4, "test": 2}


def test_a_tar_that_changed_is_the_only_one_that_is_new(tmp_path: Path) -> None:
    for name in ("train-0.tar", "train-1.tar", "test-0.tar"):
        write_tar(tmp_path / name, samples(6))
    data = opened(tmp_path, val=0)
    before = stamps(data.splits["train"], data.provenance)
    os.utime(tmp_path / "train-1.tar", ns=(1, 1))
    again = opened(tmp_path, val=0)
    same = before == stamps(again.splits["train"], again.provenance)
    assert same.tolist() == [name.startswith("train-0") for name in data.splits["train"].ids]
    split = data.splits["train"]
    rows = [name.startswith("train-1") for name in split.ids]
    split.read(rows.index(False))
    for _ in range(2):  # and the file that was read before is not taken for it
        with pytest.raises(OSError, match="has changed since it was opened"):
            split.read(rows.index(True))
        split.read(rows.index(False)).load()


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_tars_are_sentences_or_other_tars(tmp_path: Path, kind: int) -> None:
    name = "é.jpg" if kind == tarfile.USTAR_FORMAT else f"{LONG}.jpg"
    path = write_tar(tmp_path / "t.tar", [*samples(3), (name, IMAGE)], kind)
    whole, random = path.read_bytes(), np.random.default_rng(kind)
    for _ in range(300):
        changed = bytearray(whole)
        block = int(random.integers(len(whole) // 512)) * 512
        for _ in range(int(random.integers(1, 4))):
            changed[block + int(random.integers(512))] = int(random.integers(256))
        header = changed[block : block + 512]
        if random.integers(2):  # with a checksum that is right
            total = sum(header) - sum(header[148:156]) + 256
            changed[block + 148 : block + 156] = b"%06o\0 " % total
        path.write_bytes(changed)
        try:
            index, size, _ = tar_index(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(0 < at <= at + length <= size for _, at, length in index.members)


@pytest.mark.parametrize(
    "records", [b"0 a=b", b"9999 a=b\n", b"1 =", b"x", b"12 size=-9\n", b"=\n"]
)
def test_damaged_statements_end(tmp_path: Path, records: bytes) -> None:
    path = write_tar(tmp_path / "t.tar", [("pax", records), *samples(2)])
    whole = bytearray(path.read_bytes())
    whole[156:157] = b"x"
    whole[148:156] = b"%06o\0 " % (sum(whole[:512]) - sum(whole[148:156]) + 256)
    path.write_bytes(whole)
    refused(tmp_path, "is damaged: at byte 0 there is no header")


def test_extract_takes_the_same_features_as_from_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 6), ("val", 4), ("test", 4)):
        members = []
        for number in range(count):
            content = image_bytes(20 * number, "PNG") if number != 3 else b"broken"
            members += [(f"{number}.png", content), (f"{number}.txt", b"ab"[number % 2 :][:1])]
            file = tmp_path / "files" / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        write_tar(tmp_path / "tars" / f"{split}-0.tar", members)
    options: dict[str, Any] = {"on_error": "skip", "batch_size": 4, "workers": 2}
    caches = [tmp_path / "tars.h5", tmp_path / "files.h5"]
    for kind, out in zip(("wds", "folder"), caches, strict=True):
        config = ExtractConfig(dataset=f"{kind}:{tmp_path / out.stem}", out=out, **options)
        extract(config, Terminal("extract"))
    with h5py.File(caches[0]) as one, h5py.File(caches[1]) as other:
        for split in ("train", "val", "test"):
            order = np.argsort([name.split(b"/")[-1] for name in other[f"images/{split}/ids"]])
            here, there = one[f"images/{split}"], other[f"images/{split}"]
            assert np.array_equal(here["features"][:], there["features"][:][:, order])
            assert np.array_equal(here["labels"][:], there["labels"][:][order])
            assert here["skipped"][:].tolist() == [f"{split}-0.tar/3".encode()]
    capsys.readouterr()
    config = ExtractConfig(dataset=f"wds:{tmp_path / 'tars'}", out=caches[0], **options)
    extract(config, Terminal("extract"))
    assert "nothing to do" in capsys.readouterr().out
    os.utime(tmp_path / "tars" / "test-0.tar", ns=(1, 1))
    with pytest.raises(UserError, match="--update"):
        extract(config, Terminal("extract"))
