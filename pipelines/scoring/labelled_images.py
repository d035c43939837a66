"""Labelled images to score an adapter on: rows of a cache, or files that are encoded on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import find_method
from clip_adapter.cache.reader import BLOCK_ROWS, FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.files import is_there
from clip_adapter.listener import Listener
from clip_adapter.pipelines.saved.adapter_check import feature_width
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter
from clip_adapter.pipelines.saved.same_backbone import check_same_backbone, check_same_width

if TYPE_CHECKING:
    from clip_adapter.extract.backbones.loading import Backbone
    from clip_adapter.extract.encoding.encoder import Encoder

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """Some images. rows: (R,) which. features: (R, F), what the adapter takes. encoded: (R, D), the
    image features; the same array unless the adapter takes what comes before the projection.
    digests: (R,), see `image_hashes`."""

    rows: npt.NDArray[np.int64]
    features: Features
    encoded: Features
    digests: npt.NDArray[np.uint64] | None


@dataclass(frozen=True)
class Labelled:
    """Labelled images.

    name: for a report. labels: (N,), indices of class_names. blocks: reads or encodes them; images
    that cannot be decoded may be missing. ids: the names of some rows.
    """

    name: str
    class_names: Sequence[str]
    labels: npt.NDArray[np.int32]
    blocks: Callable[[], Iterator[Block]]
    ids: Callable[[npt.NDArray[np.int64]], Sequence[str]]


@dataclass(frozen=True)
class Encoding:
    """How files are encoded; the fields mean what they mean to `predict`."""

    backbone: str | None
    pretrained: str | None
    batch_size: int
    workers: int
    device: str
    skip: bool


def is_folder(path: Path) -> bool:
    """Whether it is a folder of images, not a cache.

    Raises UserError where there is neither.
    """
    if not is_there(path):
        raise UserError(f"{path} does not exist; name a feature cache or a folder of images.")
    return path.is_dir()


def cached_images(cache: FeatureCache, split: str, adapter: SavedAdapter) -> Labelled:
    """The images of one split of a cache.

    Raises UserError where it lacks them, or what the adapter needs, or is of another backbone.
    """
    labels = cache.labels(split)
    info = adapter.info
    remedy = "extract with the adapter's backbone, or fit on features of this one"
    check_same_backbone(cache.backbone, cache.preprocess, info, remedy)
    check_same_width(cache.shape(split)[2], adapter.weights.shape[1], str(cache.path))
    before = _takes_what_is_before_the_projection(adapter)
    if before:
        width = cache.pre_projection(split, np.zeros(1, np.int64), views=1).shape[2]
        check_same_width(width, _width(adapter), str(cache.path))

    digests = cache.hashes(split, "digests")

    def blocks() -> Iterator[Block]:
        for start in range(0, len(labels), BLOCK_ROWS):
            rows = np.arange(start, min(start + BLOCK_ROWS, len(labels)))
            encoded = cache.features(split, rows, views=1)[0]
            features = cache.pre_projection(split, rows, views=1)[0] if before else encoded
            yield Block(rows, features, encoded, None if digests is None else digests[rows])

    name = f"{cache.dataset.get('name', cache.path.name)} {split}"
    return Labelled(name, cache.class_names, labels, blocks, lambda rows: cache.ids(split, rows))


def images_of_folder(
    folder: Path, split: str, adapter: SavedAdapter, how: Encoding, listener: Listener
) -> Labelled:
    """The images of a folder that `extract` would take as `folder:FOLDER`; of its split where it
    has splits, else all of them. What it passes over, the listener is told.

    Raises UserError for a folder without such images, and where the adapter's backbone cannot be
    had.
    """
    from clip_adapter.extract.datasets.checks import checked
    from clip_adapter.extract.datasets.folder import labelled_images
    from clip_adapter.extract.encoding.decode import Plan
    from clip_adapter.extract.encoding.device import find_device
    from clip_adapter.extract.encoding.encoder import Encoder, Stopwatch, encode_images
    from clip_adapter.pipelines.saved.pytorch import find_backbone

    device = find_device(how.device)
    data = checked(labelled_images(folder, split, listener))
    for remark in data.remarks:
        listener.warn(remark)
    images = data.splits["test"]
    backbone = find_backbone(adapter.info, how.backbone, how.pretrained)
    remedy = "give the right ones with --pretrained, or extract and fit again"
    check_same_backbone(backbone.identity, backbone.preprocess_config, adapter.info, remedy)
    before = _takes_what_is_before_the_projection(adapter)
    encoder = Encoder(backbone, device, how.batch_size, with_projection=before)
    _check_widths(backbone, encoder, adapter)
    plan = Plan(
        np.arange(len(images.labels)),
        batch_size=how.batch_size,
        workers=how.workers,
        skip=how.skip,
        pinned=device.type == "cuda",
    )

    def blocks() -> Iterator[Block]:
        for batch in encode_images(encoder, images, plan, Stopwatch()):
            encoded = batch.features[:, 0].astype(np.float32)
            features = encoded
            if batch.pre_projection is not None:
                features = batch.pre_projection[:, 0].astype(np.float32)
            yield Block(batch.rows, features, encoded, batch.digests)

    def ids(rows: npt.NDArray[np.int64]) -> list[str]:
        return [images.ids[row] for row in rows.tolist()]

    return Labelled(data.name, data.class_names, images.labels, blocks, ids)


def _check_widths(backbone: Backbone, encoder: Encoder, adapter: SavedAdapter) -> None:
    name = backbone.identity["name"]
    check_same_width(encoder.dim, adapter.weights.shape[1], name)
    if encoder.projection is not None:
        check_same_width(len(encoder.projection.weights), _width(adapter), name)


def _takes_what_is_before_the_projection(adapter: SavedAdapter) -> bool:
    return "projection" in find_method(adapter.info.method).needs


def _width(adapter: SavedAdapter) -> int:
    method = find_method(adapter.info.method)
    return feature_width(method, adapter.arrays, Head(adapter.weights, 1.0, 0.0))
