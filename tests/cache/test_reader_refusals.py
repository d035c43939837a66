"""Every file that cannot be trusted is refused, with a sentence that says what is wrong."""

import os
import socket
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from tests.cache.rewriting import Change, put, rewrite, store_metadata
from tests.cache.small_cache import make_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "features.h5")


def read_all(path: Path) -> list[Any]:
    with FeatureCache(path) as cache:
        images = [cache.images(split) for split in cache.splits]
        arrays = [array for i in images for array in (i.features.tobytes(), i.labels.tobytes())]
        return [*arrays, *(i.ids for i in images), cache.text_features().tobytes(),
                cache.class_names, cache.templates, cache.metadata, cache.splits]  # fmt: skip


def refused(path: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_all(path)
    sentence = str(caught.value)
    assert path.name in sentence
    assert sentence.isprintable()
    assert len(sentence) < 400 + len(str(path))
    assert any(advice in sentence for advice in ("extract", "has no", "name a file"))


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.h5", "no feature cache at .*nothing.h5; `extract` makes one")


@pytest.mark.parametrize("content", [b"", b"just text\n", b"\x89HDF\r\n\x1a\n" + b"\0" * 50])
def test_something_else_than_hdf5(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.h5").write_bytes(content)
    refused(tmp_path / "text.h5", "cannot be read as HDF5|not a CLIP feature cache")


def test_a_folder(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be read as HDF5")


def test_a_pipe_a_socket_and_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to("/dev/zero")
        for name, kind in (("pipe", "named pipe"), ("socket", "socket"), ("link", "device")):
            refused(tmp_path / name, f"is a {kind}; name a file")


def test_a_path_that_cannot_be_looked_up(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, "loop", "a\0b"):
        with pytest.raises(UserError, match="cannot be read: "):
            FeatureCache(tmp_path / name)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(cache: Path, share: float) -> None:
    data = cache.read_bytes()
    cache.write_bytes(data[: int(len(data) * share)])
    refused(cache, "truncated")


def test_hdf5_of_somebody_else(tmp_path: Path) -> None:
    for libver in ("earliest", "latest"):
        with h5py.File(tmp_path / "other.h5", "w", libver=libver) as file:
            file["data"] = np.arange(3)
        refused(tmp_path / "other.h5", "is an HDF5 file but not a CLIP feature cache")


def attribute(name: str, value: Any) -> Change:
    return lambda file, document: file.attrs.__setitem__(name, value)


def without_attribute(name: str) -> Change:
    return lambda file, document: file.attrs.__delitem__(name)


def stated(name: str, value: Any) -> Change:
    """`backbone.name` and the like in the metadata."""

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        *rooms, last = name.split(".")
        for room in rooms:
            document = document[room]
        document[last] = value

    return change


def unstated(name: str) -> Change:
    def change(file: h5py.File, document: dict[str, Any]) -> None:
        *rooms, last = name.split(".")
        for room in rooms:
            document = document[room]
        del document[last]

    return change


def without(path: str) -> Change:
    return lambda file, document: file.__delitem__(path)


def replaced(path: str, value: Any, **options: Any) -> Change:
    return lambda file, document: put(file, path, np.asarray(value), **options)


def set_value(path: str, place: Any, value: Any) -> Change:
    return lambda file, document: file[path].__setitem__(place, value)


def ids_became_a_group(file: h5py.File, document: dict[str, Any]) -> None:
    del file["images/train/ids"]
    file.create_group("images/train/ids")


def linked(path: str, link: object) -> Change:
    def change(file: h5py.File, document: dict[str, Any]) -> None:
        if isinstance(link, h5py.SoftLink):
            file.move(path, link.path)
        else:
            del file[path]
        file[path] = link

    return change


def virtual(path: str) -> Change:
    """A dataset that is made of itself."""

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        old = file[path]
        layout = h5py.VirtualLayout(old.shape, old.dtype)
        layout[...] = h5py.VirtualSource(".", path, old.shape, old.dtype)
        del file[path]
        file.create_virtual_dataset(path, layout)

    return change


def huge(path: str, shape: tuple[int, ...], chunks: tuple[int, ...] | None = None) -> Change:
    def change(file: h5py.File, document: dict[str, Any]) -> None:
        kind = file[path].dtype
        del file[path]
        file.create_dataset(path, shape, kind, chunks=chunks or shape, fletcher32=True)

    return change


def unwritten_chunk(file: h5py.File, document: dict[str, Any]) -> None:
    del file["images/test/labels"]
    labels = file.create_dataset("images/test/labels", (10,), "<i4", chunks=(5,), fletcher32=True)
    labels[:5] = 1


def unchecked_chunk(file: h5py.File, document: dict[str, Any]) -> None:
    labels = file["images/test/labels"]
    labels.id.write_direct_chunk((0,), np.zeros(10, np.int32).tobytes(), filter_mask=1)


def external(file: h5py.File, document: dict[str, Any]) -> None:
    del file["images/test/labels"]
    file.create_dataset("images/test/labels", (10,), "<i4", external=[("/etc/passwd", 0, 40)])


FIXED = h5py.string_dtype("utf-8", 8)
ESCAPES = "\x1b[2J\nevil" + "x" * 10_000
REFUSALS: dict[str, tuple[Change, str]] = {
    "other format": (attribute("format", np.bytes_("other")), "not a CLIP feature cache"),
    "format of variable length": (
        attribute("format", "clip-feature-cache"),
        "not a CLIP feature cache",
    ),
    "newer version": (
        attribute("format_version", 3),
        "format version 3, this program reads version 2; update clip-adapter or extract again",
    ),
    "older version": (attribute("format_version", 1), "format version 1, this program reads"),
    "version is text": (attribute("format_version", np.bytes_(ESCAPES)), "not a CLIP feature"),
    "another version within": (stated("format_version", ESCAPES), "format_version in its metadata"),
    "another format within": (stated("format", "x"), "format in its metadata is 'x'"),
    "not complete": (stated("complete", False), "incomplete .not marked"),
    **{
        f"no {name}": (
            unstated(name),
            f"{name.rpartition('.')[0] or 'it'} lacks {name.split('.')[-1]};",
        )
        for name in (
            *("backbone", "preprocess", "dataset", "logit_scale", "logit_bias", "writer"),
            *("created_at", "datasets_sha256", "backbone.name", "backbone.pretrained"),
            *("backbone.weights_sha256", "backbone.embed_dim", "backbone.image_size"),
            *("backbone.quick_gelu", "dataset.name", "dataset.source", "dataset.splits"),
        )
    },
    "backbone a number": (stated("backbone", 3), "backbone is 3, not an object"),
    "preprocess text": (stated("preprocess", ESCAPES), r"preprocess is '\\x1b\[2J\\nevilx+…,"),
    "width": (stated("backbone.embed_dim", True), "embed_dim is True, not an integer"),
    "other width": (stated("backbone.embed_dim", 5), "its features have 4 numbers, not 5"),
    "size": (stated("backbone.image_size", [1, 0]), "image_size is .1, 0., not an integer"),
    "splits": (stated("dataset.splits", {"a": 1}), "dataset.splits.a is 1, not a string"),
    "scale NaN": (stated("logit_scale", float("nan")), "its metadata is not a JSON object"),
    "scale text": (stated("logit_scale", "100"), "logit_scale is '100', not a number from"),
    "scale negative": (stated("logit_scale", -1.5), "logit_scale is -1.5, not a number from"),
    "scale too large": (stated("logit_scale", 1e39), "logit_scale is 1e.39, not a number from"),
    "scale too small": (stated("logit_scale", 1e-50), "logit_scale is 1e-50, not a number from"),
    "bias too large": (stated("logit_bias", 10**50), "logit_bias is 10+, not a number from"),
    "content hash": (
        stated("content_sha256", "abc"),
        "content_sha256 is 'abc', not a string that",
    ),
    "lone surrogate": (stated("writer", "\ud800"), "its metadata is not a JSON object"),
    "no hash of labels": (
        lambda file, document: document["datasets_sha256"].pop("images/test/labels"),
        "no SHA-256 of images/test/labels",
    ),
    "hashes": (
        stated("datasets_sha256", {"a": 1}),
        "datasets_sha256.a is 1, not a string that",
    ),
    "no images": (without("images"), "lacks images"),
    "no features": (without("images/train/features"), "lacks images/train/features"),
    "no labels": (without("images/test/labels"), "lacks images/test/labels"),
    "no ids": (without("images/test/ids"), "lacks images/test/ids"),
    "no text": (without("text"), "lacks text/features, text/class_names, text/templates"),
    "no templates": (without("text/templates"), "lacks text/templates"),
    "ids a group": (ids_became_a_group, "images/train/ids is not a dataset"),
    "images a dataset": (replaced("images", np.zeros(3, np.int32)), "images is not a group"),
    "labels too few": (
        replaced("images/train/labels", np.zeros(3, np.int32)),
        r"images/train/labels has the shape \(3,\), which disagrees .*N train is 22",
    ),
    "no rows": (
        replaced("images/train/features", np.zeros((1, 0, 4), np.float32)),
        r"images/train/features has the shape \(1, 0, 4\)",
    ),
    "views of test": (
        replaced("images/test/features", np.ones((2, 10, 4), np.float32)),
        "images/test/features has several views",
    ),
    "features of another width": (
        replaced("images/test/features", np.ones((1, 10, 5), np.float32)),
        r"images/test/features has the shape \(1, 10, 5\), which disagrees .*D is 4",
    ),
    "big-endian features": (
        replaced("images/test/features", np.ones((1, 10, 4), ">f4")),
        "images/test/features has a type",
    ),
    "int64 labels, one of which int32 would wrap": (
        replaced("images/test/labels", np.full(10, 2**32)),
        "images/test/labels has a type",
    ),
    "strings without checksum": (
        replaced("images/test/ids", np.array(["a"] * 10, h5py.string_dtype()), fletcher32=False),
        "images/test/ids has other filters",
    ),
    "ASCII strings": (
        replaced("images/test/ids", np.array([b"a"] * 10)),
        "images/test/ids has a type",
    ),
    "too many classes": (
        replaced("text/class_names", np.array([b"a"] * 4).astype(FIXED)),
        r"text/class_names has the shape \(4,\), which disagrees .*C is 3",
    ),
    "class names not UTF-8": (
        replaced("text/class_names", np.array([b"a", b"b", b"\xff"]).astype(FIXED)),
        "text/class_names is not UTF-8",
    ),
    "NaN": (
        set_value("images/train/features", (0, 3, 1), np.nan),
        "images/train/features holds values that are not finite",
    ),
    "zeros": (
        set_value("images/train/features", (0, 3), 0),
        "images/train/features holds a feature of zeros",
    ),
    "tiny": (
        set_value("images/train/features", (0, 3), 1e-7),
        "images/train/features holds a feature far smaller or larger than CLIP's",
    ),
    "huge": (
        set_value("text/features", (0, 1, 1), 2e6),
        "text/features holds a feature far smaller or larger than CLIP's",
    ),
    "label too large": (
        set_value("images/train/labels", 5, 3),
        "images/train/labels holds labels outside the 3 classes",
    ),
    "label negative": (
        set_value("images/test/labels", 0, -1),
        "images/test/labels holds labels outside the 3 classes",
    ),
    "soft link": (linked("images/test/labels", h5py.SoftLink("/elsewhere")), "is a link"),
    "external link": (
        linked("images/test/labels", h5py.ExternalLink("other.h5", "x")),
        "images/test/labels is a link to somewhere else",
    ),
    "virtual": (virtual("images/test/labels"), "images/test/labels is not stored in chunks"),
    "external storage": (external, "images/test/labels is not stored in chunks of this file"),
    "a chunk that is not there": (unwritten_chunk, "images/test/labels lacks some of its chunks"),
    "a chunk without checksum": (unchecked_chunk, "is cut or without a checksum"),
    "10^12 rows": (
        huge("images/test/labels", (10**12,), (10**6,)),
        r"images/test/labels of shape \(1000000000000,\) is larger than the file",
    ),
    "a huge chunk": (
        huge("images/test/labels", (10,), (10**9,)) and huge("images/test/labels", (10**9,)),
        "is larger than the file",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(cache: Path, name: str) -> None:
    change, words = REFUSALS[name]
    read_all(cache)
    rewrite(cache, lambda file, document: None)
    read_all(cache)
    rewrite(cache, change)
    refused(cache, words)


def test_metadata_that_is_elsewhere(cache: Path) -> None:
    with h5py.File(cache, "r+", libver=("v110", "v110")) as file:
        del file["metadata"]
        file["metadata"] = h5py.ExternalLink("other.h5", "x")
    refused(cache, "metadata is a link to somewhere else")
    with h5py.File(cache, "r+", libver=("v110", "v110")) as file:
        del file["metadata"]
    refused(cache, "it lacks its metadata")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "has the shape|its structure|metadata"),
        (b"[]", "its metadata is not a JSON object"),
        (b"[" * 200_000, "its metadata is not a JSON object"),
        (b'{"a":' * 100_000, "its metadata is not a JSON object"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "its metadata is not a JSON object"),
        (b"{}", "format in its metadata is None"),
        (b"\xff{}", "its metadata is not a JSON object"),
    ],
)
def test_metadata_that_is_no_such_json(cache: Path, text: bytes, words: str) -> None:
    with h5py.File(cache, "r+", libver=("v110", "v110")) as file:
        store_metadata(file, text or b" ")
    refused(cache, words)


def test_many_small_chunks_are_refused_before_they_are_counted(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "features.h5")

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        put(file, "images/test/ids", np.array([b"a"] * 5000).astype(FIXED), chunks=(1,))

    rewrite(path, change)
    refused(path, r"images/test/ids has chunks of the shape \(1,\)")


@pytest.mark.parametrize(
    "path", ["images/train/features", "images/train/labels", "images/train/ids", "text/features",
             "text/class_names", "text/templates"]
)  # fmt: skip
def test_a_damaged_chunk(cache: Path, path: str) -> None:
    with h5py.File(cache) as file:
        place = file[path].id.get_chunk_info(0).byte_offset
    data = bytearray(cache.read_bytes())
    data[place] ^= 1
    cache.write_bytes(data)
    refused(cache, f"{path} is damaged .its checksum does not match")


def test_a_damaged_chunk_of_a_cache_that_does_not_state_its_hash(cache: Path) -> None:
    rewrite(cache, unstated("content_sha256"))
    with FeatureCache(cache) as opened:
        computed = opened.content_sha256
    with FeatureCache(make_cache(cache.with_name("same.h5"))) as same:
        assert computed == same.content_sha256
    with h5py.File(cache) as file:
        place = file["images/train/features"].id.get_chunk_info(0).byte_offset
    data = bytearray(cache.read_bytes())
    data[place] ^= 1
    cache.write_bytes(data)
    with FeatureCache(cache) as opened, pytest.raises(UserError, match="checksum does not match"):
        _ = opened.content_sha256


@pytest.mark.parametrize("names", [[""] * 3, ["cat"] * 3])
def test_class_names_that_tell_no_class(cache: Path, names: list[str]) -> None:
    values = np.array([name.encode() for name in names], h5py.string_dtype("utf-8", 3))
    rewrite(cache, lambda file, document: put(file, "text/class_names", values))
    refused(cache, f"its 3 class names are all '{names[0]}'")


def test_a_split_that_is_not_there(cache: Path) -> None:
    with FeatureCache(cache) as opened:
        for ask in (opened.images, opened.labels, opened.ids, opened.shape):
            with pytest.raises(UserError, match="has no val split, only train, test"):
                ask("val")


def test_what_the_reader_does_not_know_is_ignored(cache: Path) -> None:
    whole = read_all(cache)

    def change(file: h5py.File, document: dict[str, Any]) -> None:
        file.attrs["more"] = "x"
        file["images/extra/features"] = np.zeros(3)
        file["text/more"] = h5py.ExternalLink("other.h5", "x")
        file["more"] = h5py.SoftLink("/nowhere")
        document["more"] = {"a": 1}
        del document["arguments"], document["content_sha256"]

    rewrite(cache, change)
    again = read_all(cache)
    del whole[-2], again[-2]
    assert again == whole
    with FeatureCache(cache) as opened:
        assert opened.arguments == {}


def test_a_closed_cache_is_not_called_damaged(tmp_path: Path) -> None:
    with FeatureCache(make_cache(tmp_path / "c.h5")) as cache:
        cache.ids("train")
    for read in (lambda: cache.ids("train"), lambda: cache.features("test", [0]), cache.to_frame):
        with pytest.raises(UserError, match=r"c\.h5 has been closed"):
            read()
