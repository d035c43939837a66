"""Files of format version 1 are read, and damaged ones hang or crash nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from clip_adapter.cache import version_1
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from tests import processes

VERSION_1 = Path(__file__).parent / "data" / "version_1.h5"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.h5"
    path.write_bytes(VERSION_1.read_bytes())
    return path


def numbers(path: Path) -> list[object]:
    """What the features, labels and texts are; not where they came from, which version 1 cannot
    protect."""
    with FeatureCache(path) as cache:
        images = [cache.images(split) for split in cache.splits]
        arrays = [array for i in images for array in (i.features.tobytes(), i.labels.tobytes())]
        return [*arrays, *(i.ids for i in images), cache.text_features().tobytes(),
                cache.class_names, cache.templates, cache.logit_scale, cache.splits]  # fmt: skip


def test_it_reads_what_was_written() -> None:
    rng = np.random.default_rng(1)
    text = rng.normal(size=(3, 2, 4)).astype(np.float32)
    with FeatureCache(VERSION_1) as cache:
        np.testing.assert_array_equal(cache.text_features(), text)
        for split, count, views in (("train", 23, 2), ("val", 6, 1), ("test", 11, 1)):
            features = rng.normal(size=(count, views, 4)).astype(np.float16)
            rng.integers(0, 2**63, count)
            images = cache.images(split)
            np.testing.assert_array_equal(images.features, features.transpose(1, 0, 2))
            assert images.labels.tolist() == [row % 3 for row in range(count)]
            assert images.ids == [f"{split}/{row}.png" for row in range(count)]
        assert cache.class_names == ["cat", "dog", "eel"]
        assert cache.templates == ["a {}", "the {}"]
        assert (cache.logit_scale, cache.logit_bias) == (42.5, -1.25)
        assert cache.backbone["weights_sha256"] == "0123456789abcdef" * 4
        assert cache.dataset["splits"]["val"] == "made up"
        assert cache.arguments == {"dataset": "toys", "views": 1}
        assert cache.metadata.format_version == 1
        assert cache.skipped == 3
        assert not cache.has("tokens")


def damaged(data: bytes) -> list[bytes]:
    sectors = range(0, len(data), 512)
    zeroed = [data[:n] + bytes(len(data[n : n + 512])) + data[n + 512 :] for n in sectors]
    places = np.random.default_rng(0).integers(0, len(data), 12).tolist()
    flipped = [data[:n] + bytes([data[n] ^ 0xFF]) + data[n + 1 :] for n in places]
    return zeroed + flipped


AS_MODULE = "import runpy; runpy.run_module('clip_adapter.cache.version_1', run_name='__main__')"


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that looks at a file first is the same, but finds its imports done."""

    def run(
        command: list[str], *, timeout: float, **_: object
    ) -> subprocess.CompletedProcess[bytes]:
        out = tmp_path / "answer"
        child = processes.start(["python", "-c", AS_MODULE, command[-1]], tmp_path, out=out)
        child.join(timeout)
        ended = child.exitcode
        child.kill()
        child.join()
        if ended is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, ended, out.read_bytes())

    monkeypatch.setattr(version_1.subprocess, "run", run)


@pytest.mark.usefixtures("forked")
def test_damage_is_a_sentence_or_without_effect(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FeatureCache(old).close()  # where nothing is imported yet, this may take some seconds
    monkeypatch.setattr(version_1, "SECONDS", 1)
    whole = numbers(old)
    refusals = 0
    for content in damaged(old.read_bytes()):
        old.write_bytes(content)
        try:
            assert numbers(old) == whole
        except UserError as error:
            refusals += 1
            assert str(error).isprintable()
            assert "old.h5" in str(error)
    assert refusals > 20


def test_the_damage_that_makes_libhdf5_loop_ends_in_time(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zeroed sector of the global heap, without the guard, would never end."""
    content = old.read_bytes()
    start = content.index(b"GCOL") // 512 * 512 + 512
    old.write_bytes(content[:start] + bytes(512) + content[start + 512 :])
    # Seconds of the processor, of which one is far more than the sound file takes.
    read = "import h5py, resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (1, 1)); "
    read += "print(dict(h5py.File(sys.argv[1]).attrs))"
    endings = [
        subprocess.run([sys.executable, "-c", read, path], timeout=60, capture_output=True)
        for path in (VERSION_1, old)
    ]
    assert [ending.returncode for ending in endings] == [0, -signal.SIGKILL]
    monkeypatch.setattr(version_1, "SECONDS", 1)
    begun = time.monotonic()
    with pytest.raises(UserError, match="cannot be used: its structure is damaged"):
        FeatureCache(old)
    assert time.monotonic() - begun < 10


def test_values_that_were_changed_with_their_checksum(old: Path) -> None:
    with h5py.File(old, "r+", libver=("v110", "v110")) as file:
        file["images/test/labels"][3] = 1
    with pytest.raises(UserError, match="values are not those that its content_sha256"):
        FeatureCache(old)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("backbone", "{", "attribute backbone is not a JSON object"),
        ("backbone", '{"name": "x"}', r"incomplete \(backbone.pretrained, "),
        ("dataset", "[" * 60_000, "attribute dataset is not a JSON object"),
        ("logit_scale", -1.0, "logit_scale is -1.0, not a positive"),
        ("logit_scale", [1.0, 2.0], r"incomplete \(logit_scale"),
        ("complete", False, "it is incomplete"),
        ("format", "\x1b[2J", "not a CLIP feature cache"),
        ("format", "clip-feature-cache-part", "is one part of a cache"),
    ],
)
def test_refusals(old: Path, name: str, value: object, words: str) -> None:
    with h5py.File(old, "r+", libver=("v110", "v110")) as file:
        file.attrs[name] = value
    with pytest.raises(UserError, match=words) as caught:
        FeatureCache(old)
    assert str(caught.value).isprintable()


def test_nothing_of_the_current_folder_is_imported(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json.py", "h5py.py", "numpy.py", "resource.py"):
        (old.parent / name).write_text("open('imported', 'w')")
    monkeypatch.chdir(old.parent)
    FeatureCache("old.h5").close()
    assert not Path("imported").exists()


def test_a_file_in_the_older_format_of_hdf5(tmp_path: Path, old: Path) -> None:
    """Version 1 allowed it; it has no checksums over its structure."""
    path = tmp_path / "older.h5"
    with h5py.File(old) as source, h5py.File(path, "w", libver=("earliest", "v110")) as file:
        for name in ("images", "text"):
            source.copy(name, file)
        file.attrs.update(dict(source.attrs))
    assert path.read_bytes()[8] == 0
    assert numbers(path) == numbers(old)
