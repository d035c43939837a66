"""Images for a saved adapter: of a folder of classes, or files named one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from clip_adapter.errors import UserError
from clip_adapter.files import is_there
from clip_adapter.listener import Listener
from clip_adapter.pipelines.saved.adapter_check import (
    check_same_backbone,
    check_same_second,
    check_same_width,
)
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo, SavedAdapter
from clip_adapter.pipelines.scoring.cached import (
    Block,
    Blocks,
    Labelled,
    Rows,
    Source,
    width_of,
)
from clip_adapter.records import from_file
from clip_adapter.words import counted, some

if TYPE_CHECKING:
    from PIL import Image

    from clip_adapter.extract.datasets.source import Split

Classes = npt.NDArray[np.int64]
LEFT_OUT, UNKNOWN = -1, -2


class Encoding(Protocol):
    """How files are encoded, as `PredictConfig` states it."""

    @property
    def backbone(self) -> str | None: ...
    @property
    def pretrained(self) -> str | None: ...
    @property
    def also(self) -> str | None: ...
    @property
    def also_pretrained(self) -> str | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def device(self) -> str: ...


OF_FILES = ("backbone", "pretrained", "also", "also_pretrained", "batch_size", "workers", "device")


def refuse_encoding(config: Any, *others: str) -> None:
    """Raises UserError where something says how files are encoded, or what is to become of them, as
    `others` do, and there are none: all images lie in caches."""
    usual = {field.name: field.default for field in fields(config)}
    given = [name for name in (*OF_FILES, *others) if getattr(config, name) != usual[name]]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} is for image files, and there are only images of "
            "caches; leave it out."
        )


def is_folder(path: Path) -> bool:
    """Whether it is a folder of images, not a cache.

    Raises UserError where there is neither.
    """
    if not is_there(path):
        raise UserError(f"{path} does not exist; name a feature cache or a folder of images.")
    return path.is_dir()


def images_of_folder(
    folder: Path,
    split: str,
    adapter: SavedAdapter,
    how: Encoding,
    listener: Listener,
    *,
    skip: bool = False,
) -> Labelled:
    """The images of a folder that `extract` would take as `folder:FOLDER`; of its split where it
    has splits, else all of them. What it passes over, the listener is told.

    skip: leave out what cannot be decoded, rather than raise for it.
    Raises UserError for a folder without such images, and where the adapter's backbone cannot be
    had.
    """
    from clip_adapter.extract.datasets.folder import labelled_images
    from clip_adapter.extract.datasets.source import checked

    data = checked(labelled_images(folder, split, listener))
    for remark in data.remarks:
        listener.warn(remark)
    images = data.splits["test"]
    blocks = partial(_encoded(images, adapter, how, skip=skip), range(len(images.labels)))

    def ids(rows: Rows) -> list[str]:
        return [images.ids[row] for row in rows.tolist()]

    return Labelled(data.name, data.class_names, images.labels, blocks, ids)


def encoded_files(
    paths: Sequence[str], refused: Mapping[str, str], adapter: SavedAdapter, how: Encoding
) -> Source:
    """The images of these files; of those that cannot be read, why.

    refused: why some of the paths cannot be read, as far as that is known already.
    Raises UserError where the adapter's backbone cannot be had.
    """
    from clip_adapter.extract.datasets.source import Split
    from clip_adapter.extract.encoding.images import BadImage, open_image

    def read(row: int) -> Image.Image:
        path = paths[row]
        if path in refused:
            raise BadImage(refused[path])
        try:
            return open_image(Path(path))
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error

    labels = np.zeros(len(paths), np.int32)
    split = Split(paths, labels, read, "files")
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path) + b"\0")
    return Source(
        range(len(paths)),
        _encoded(split, adapter, how, skip=True),
        lambda rows: [Path(paths[row]) for row in rows.tolist()],
        _batch_size(split, how),
        digest.hexdigest(),
    )


def _batch_size(images: Split, how: Encoding) -> int:
    """A batch is filled up to its size, and a few images need not be."""
    return min(how.batch_size, len(images.labels))


def _encoded(images: Split, adapter: SavedAdapter, how: Encoding, *, skip: bool) -> Blocks:
    from clip_adapter.extract.encoding.decode import Plan
    from clip_adapter.extract.encoding.device import find_device
    from clip_adapter.extract.encoding.encoder import Encoder, Stopwatch, encode_images
    from clip_adapter.pipelines.saved import pytorch

    device = find_device(how.device)
    info = adapter.info
    backbone = pytorch.find_backbone(info, how.backbone, how.pretrained)
    remedy = pytorch.OTHER_WEIGHTS
    check_same_backbone(backbone.identity, backbone.preprocess_config, info, remedy)
    also = pytorch.find_second(info, how.also, how.also_pretrained)
    check_same_second(pytorch.stated(also), info, pytorch.OTHER_SECOND)
    size = _batch_size(images, how)
    before = "projection" in adapter.method.needs
    encoder = Encoder(backbone, device, size, with_projection=before)
    name = backbone.identity["name"]
    check_same_width(encoder.dim, adapter.weights.shape[1], name)
    if encoder.projection is not None:
        check_same_width(len(encoder.projection.weights), width_of(adapter), name)
    second = also and Encoder(also, device, size)
    if also and second:
        width = encoder.dim + second.dim
        check_same_width(width, width_of(adapter), also.identity["name"])

    def blocks(wanted: range) -> Iterator[Block]:
        plan = Plan(
            np.array(wanted, np.int64),
            batch_size=size,
            workers=how.workers,
            skip=skip,
            pinned=device.type == "cuda",
        )
        others = second and encode_images(second, images, plan, Stopwatch())
        for batch in encode_images(encoder, images, plan, Stopwatch()):
            unreadable = {each.row: each.reason for each in batch.skipped}
            rows, encoded = batch.rows, batch.features[:, 0].astype(np.float32)
            features, digests = encoded, batch.digests
            if batch.pre_projection is not None:
                features = batch.pre_projection[:, 0].astype(np.float32)
            if others:  # of the same rows, but for what one of the two cannot take
                other = next(others)
                unreadable |= {each.row: each.reason for each in other.skipped}
                rows, own, its = np.intersect1d(batch.rows, other.rows, return_indices=True)
                encoded, digests = encoded[own], digests[own]
                behind = other.features[its, 0].astype(np.float32)
                features = np.concatenate([encoded, behind], axis=1)
            yield Block(rows, features, encoded, digests, unreadable)

    return blocks


def match_classes(images: Labelled, info: AdapterInfo, mapping: Path | None) -> Classes:
    """(C,) for each class of the images the adapter's, or LEFT_OUT, or UNKNOWN where it has no
    images.

    mapping: JSON file {class of the images: class of the adapter, or null}, for names that differ.
    Raises UserError for images whose class the adapter does not have, and for a mapping that names
    classes that are not there.
    """
    index = {name: number for number, name in enumerate(info.class_names)}
    wanted = "a JSON file {class of the images: class of the adapter}"
    renamed = {} if mapping is None else from_file(dict[str, str | None], mapping, wanted)
    if strange := [name for name in renamed if name not in set(images.class_names)]:
        raise UserError(f"{mapping} names {some(strange)}, which {images.name} does not have.")
    values = [name for name in renamed.values() if name is not None and name not in index]
    if values:
        raise UserError(f"{mapping} names {some(values)}, which the adapter does not have.")
    classes = np.empty(len(images.class_names), np.int64)
    for number, name in enumerate(images.class_names):
        own = renamed.get(name, name)
        classes[number] = LEFT_OUT if own is None else index.get(own, UNKNOWN)
    missing = np.flatnonzero(classes == UNKNOWN)
    missing = missing[np.isin(missing, images.labels)]
    if len(missing):
        names = [images.class_names[number] for number in missing.tolist()]
        raise UserError(
            f"{images.name} shows {counted(len(names), 'class', 'classes')} that the adapter does "
            f"not have ({some(names)}); say with --classes which of its classes they are, or null."
        )
    if (classes[images.labels] == LEFT_OUT).all():
        raise UserError(f"No image of {images.name} is left to score.")
    return classes
