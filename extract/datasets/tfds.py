"""Data sets of TensorFlow Datasets, prepared as array_record and read without TensorFlow.

The splits are the builder's own, which are not the ones CoOp published.
"""

import contextlib
import glob
import os
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from clip_adapter.errors import UserError, first_line
from clip_adapter.extract.datasets.catalogue import LEFT_OUT, CatalogueEntry, match_classes
from clip_adapter.extract.datasets.source import (
    DEFAULT_TEMPLATES,
    ImageDataset,
    SourceOptions,
    Split,
)
from clip_adapter.extract.datasets.splitting import complete_splits, labelled_splits
from clip_adapter.extract.encoding.images import open_image
from clip_adapter.words import near

ID_FEATURES = ("file_name", "filename", "image/file_name", "image/filename", "id")


def open_tfds(
    builder_name: str, options: SourceOptions, entry: CatalogueEntry | None = None
) -> ImageDataset:
    """The data set of a builder, `BUILDER` or `BUILDER/CONFIG`, downloaded and prepared if need be.

    Class names, templates and label order are those of `entry` where one is given, matched to the
    builder's by name, or, where the names don't match, by their order. ids are the builder's file
    names where it has unique ones, else split/index. A builder without a val or test split gets
    it as `complete_splits` says. Opening reads every record once, since labels stand in them.

    Raises UserError for an unknown builder, one without an image and a class label, a download
    that fails, and a preparation that needs packages which are missing.
    """
    builder = _prepared(builder_name, options.data_dir)
    features = builder.info.features
    if not _fits(features):
        raise UserError(
            f"tfds:{builder_name} has no 'image' with a class 'label'; it cannot be used here."
        )
    names = features["label"].names
    matched, new_labels = match_classes(names, entry)
    source = f"tfds:{builder_name}"
    counts = {published: info.num_examples for published, info in builder.info.splits.items()}
    splits, remarks = labelled_splits(
        source, counts, lambda published: _labelled(builder, published, new_labels)
    )
    if entry is None:
        entry = CatalogueEntry(builder_name, len(names), DEFAULT_TEMPLATES, tuple(names))
    provenance = {"name": entry.name, "source": source, "version": str(builder.version)}
    return ImageDataset(
        entry.name,
        entry.class_names,
        entry.templates,
        complete_splits(splits, entry.class_names, options),
        provenance | {"class_names_matched": matched},
        remarks,
    )


def _fits(features: Any) -> bool:
    return (
        isinstance(features, tfds.features.FeaturesDict)
        and {"image", "label"} <= set(features)
        and isinstance(features["image"], tfds.features.Image)
        and isinstance(features["label"], tfds.features.ClassLabel)
    )


def builder_version(builder_name: str, data_dir: Path | None) -> str:
    """The version that a builder has, or that lies in `data_dir`; nothing is downloaded."""
    return str(_builder(builder_name, data_dir).version)


def _builder(builder_name: str, data_dir: Path | None) -> Any:
    try:
        return tfds.builder(builder_name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        meant = near(builder_name.split("/")[0], known)
        raise UserError(f"TensorFlow Datasets has no builder {builder_name!r}; {meant}.") from None
    except ValueError as error:
        if "File format is already set" in str(error):
            raise UserError(
                f"tfds:{builder_name} was prepared in a format that cannot be read without "
                "TensorFlow; choose another --data-dir, to have it prepared there as array_record."
            ) from error
        raise UserError(f"tfds:{builder_name} cannot be opened: {first_line(error)}") from error


def _prepared(builder_name: str, data_dir: Path | None) -> Any:
    builder = _builder(builder_name, data_dir)
    closed = (
        "on a machine without a network, give --data-dir a prepared copy, or use CoOp's layout "
        "(coop:FOLDER)"
    )
    if not builder.is_prepared() and (host := _unreachable(builder)):
        raise UserError(f"{host}, which serves tfds:{builder_name}, cannot be x; {closed}.")
    try:
        with file_operations_for_tfds():
            builder.download_and_prepare()
    except Exception as error:
        if missing := _missing_package(error):
            raise UserError(
                f"tfds:{builder_name} needs the package {missing} to be prepared (afterwards it "
                "does not): pip install 'clip-adapter[tfds]'."
            ) from error
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            by_hand = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
            raise UserError(
                f"tfds:{builder_name} has to be downloaded by hand (or use CoOp's layout, "
                f"coop:FOLDER); {by_hand} manual_dir is {_downloads(builder) / 'manual'}."
            ) from error
        raise UserError(
            f"tfds:{builder_name} could not be downloaded and prepared: {first_line(error)}; "
            f"{closed}."
        ) from error
    return builder


def _unreachable(builder: Any) -> str | None:
    """The host of the downloads, where its name is not even known.

    TensorFlow Datasets itself would try again for minutes. With a proxy, with files to be placed by
    hand, or with files among its downloads already, only it can tell.
    """
    downloads = _downloads(builder)
    places = (downloads, downloads / "manual", downloads / builder.name)
    there = any(path.is_file() for place in places for path in place.glob("*"))
    if there or builder.MANUAL_DOWNLOAD_INSTRUCTIONS or urllib.request.getproxies():
        return None
    hosts = sorted({host for url in builder.url_infos if (host := urlparse(url).hostname)})
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            continue
        return None
    return " or ".join(hosts) or None


def _downloads(builder: Any) -> Path:
    name_and_version = builder.info.full_name.split("/")
    return Path(builder.data_dir).parents[len(name_and_version) - 1] / "downloads"


def _missing_package(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return error.name
        error = error.__cause__ or error.__context__
    return None


def _labelled(builder: Any, published: str, new_labels: list[int]) -> tuple[Split | None, int]:
    """A published split without the classes that are left out, None where it has no labels; and how
    many of its images have none."""
    key = next((name for name in ID_FEATURES if name in builder.info.features), None)
    names = builder.info.features["label"].names
    records = _undecoded(builder, published)
    rows, labels, keys, paths, unlabelled = [], [], [], [], 0
    for row in range(len(records)):
        record = records[row]
        label, written = int(record["label"]), record[key].decode() if key else ""
        unlabelled += label < 0
        if label >= 0 and new_labels[label] != LEFT_OUT:
            rows.append(row)
            labels.append(new_labels[label])
            keys.append(written)
            paths.append(f"{names[label]}/{written}")
    if not rows:
        return None, unlabelled
    numbered = [f"{published}/{row}" for row in rows]
    unique = (ids for ids in (keys, paths) if key and len(set(ids)) == len(ids))
    split = Split(
        next(unique, numbered),
        np.array(labels, np.int32),
        _TfdsImages(str(builder.data_dir), published, np.array(rows, np.int64)),
        f"{published} split of tfds:{builder.info.full_name}",
    )
    return split, unlabelled


@dataclass(frozen=True)
class _TfdsImages:
    """index → image of a prepared split; the record files are opened once per process.

    array_record shares one reader per file between threads, which it documents as safe.
    """

    folder: str
    split: str
    rows: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        record = _images(self.folder, self.split, os.getpid())[int(self.rows[index])]
        return open_image(record["image"])


@lru_cache(maxsize=8)
def _images(folder: str, split: str, process: int) -> Any:
    return _undecoded(tfds.builder_from_directory(folder), split)


def _undecoded(builder: Any, split: str) -> Any:
    """Records by their row, images in them as the bytes of their files."""
    as_bytes = {
        name: tfds.decode.SkipDecoding()
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split, decoders=as_bytes)


def _walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    for place, folders, files in os.walk(top):
        folders.sort()
        yield place, folders, sorted(files)


class _FileOperations:
    """What stands in for the module `tensorflow`, with its names and meanings.

    TensorFlow Datasets unpacks archives and walks through folders with `tf.io.gfile`. On a local
    disk these are plain file operations, so that most builders of images need nothing else of it.
    Everything else is refused as it is refused when TensorFlow is missing.
    """

    io = SimpleNamespace(
        gfile=SimpleNamespace(
            GFile=open,
            exists=os.path.exists,
            isdir=os.path.isdir,
            listdir=lambda path: sorted(os.listdir(path)),  # noqa: PTH208
            walk=_walk,
            glob=lambda pattern: sorted(glob.glob(os.fspath(pattern))),  # noqa: PTH207
        )
    )
    compat = SimpleNamespace(as_text=os.fsdecode)

    def __getattr__(self, name: str) -> Any:
        raise ModuleNotFoundError(f"tensorflow is needed for tf.{name}", name="tensorflow")


@contextlib.contextmanager
def file_operations_for_tfds() -> Iterator[None]:
    """Within it, TensorFlow Datasets finds file operations where it looks for TensorFlow.

    Where TensorFlow is installed, nothing happens.
    """
    if find_spec("tensorflow"):
        yield
        return
    from tensorflow_datasets.core.utils import lazy_imports_utils

    # All of TensorFlow Datasets shares this one object, which keeps the imported module here.
    lazy_module = vars(lazy_imports_utils.tensorflow)
    lazy_module["_module"] = _FileOperations()
    try:
        yield
    finally:
        del lazy_module["_module"]
