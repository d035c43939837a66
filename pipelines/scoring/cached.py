"""Images for a saved adapter, wherever they come from, and those of a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_adapter.errors import UserError
from clip_adapter.files import is_file
from clip_adapter.listener import Listener
from clip_adapter.pipelines.saved.adapter_check import (
    check_same_backbone,
    check_same_second,
    check_same_width,
    feature_width,
    warn_of_unknown,
)
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter

if TYPE_CHECKING:
    from clip_adapter.cache.reader import FeatureCache

HDF5 = b"\x89HDF\r\n\x1a\n"
Features = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Some images. rows: (R,) which. features: (R, F), what the adapter takes. encoded: (R, D), the
    image features; the same array unless the adapter takes what comes before the projection, or
    features of a second encoder behind them.
    digests: (R,), see `image_hashes`. unreadable: rows that are not here, and why."""

    rows: Rows
    features: Features
    encoded: Features
    digests: npt.NDArray[np.uint64] | None
    unreadable: Mapping[int, str]


Blocks = Callable[[range], Iterator[Block]]
"""Reads or encodes these rows, anew at each call, block by block: memory does not grow with
them."""


@dataclass(frozen=True)
class Source:
    """Images in order.

    rows: which of them count. names: of some rows. step: how many a block has; where rows are cut
    at other places than its multiples, last bits may differ. sha256: by which all of its images
    are known again. first: how many images of other sources come before them.
    """

    rows: range
    blocks: Blocks
    names: Callable[[Rows], Sequence[Path | str]]
    step: int
    sha256: str
    first: int = 0

    def cut(self, blocks: range) -> Source:
        """Some of its blocks alone, as far as it has them."""
        start, stop = (max(0, at) * self.step for at in (blocks.start, blocks.stop))
        return replace(self, rows=self.rows[start:stop])


@dataclass(frozen=True)
class Labelled:
    """Labelled images.

    name: for a report. labels: (N,), indices of class_names. ids: the names of some rows. groups:
    (N,) the names of those that belong together, where they are known.
    """

    name: str
    class_names: Sequence[str]
    labels: npt.NDArray[np.int32]
    blocks: Callable[[], Iterator[Block]]
    ids: Callable[[Rows], Sequence[str]]
    groups: Sequence[str] | None = None


def cached_images(cache: FeatureCache, split: str, adapter: SavedAdapter) -> Labelled:
    """The labelled images of one split of a cache; raises UserError as `cached_blocks` does."""
    labels = cache.labels(split)
    blocks = partial(cached_blocks(cache, split, adapter), range(len(labels)))
    name = f"{cache.dataset.get('name', cache.path.name)} {split}"
    ids, groups = (lambda rows: cache.ids(split, rows)), cache.groups(split)
    return Labelled(name, cache.class_names, labels, blocks, ids, groups)


def cached_blocks(cache: FeatureCache, split: str, adapter: SavedAdapter) -> Blocks:
    """The images of one split of a cache, also of those without labels.

    Raises UserError where it lacks them, or what the adapter needs, or is of another backbone.
    """

    from clip_adapter.cache.reader import BLOCK_ROWS  # h5py, which images need not be read by

    info = adapter.info
    remedy = "extract with the adapter's backbone, or fit on features of this one"
    check_same_backbone(cache.backbone, cache.preprocess, info, remedy)
    _, _, dim = cache.shape(split)
    check_same_width(dim, adapter.weights.shape[1], str(cache.path))
    before = "projection" in adapter.method.needs
    if before:
        width = cache.pre_projection(split, np.zeros(1, np.int64), views=1).shape[2]
        check_same_width(width, width_of(adapter), str(cache.path))
    both = info.backbone2 is not None
    check_same_second(cache.backbone2, info, f"extract {cache.path.name} with that too (--also)")
    if both:
        widths = dim + cache.lengths.get("E", 0)
        check_same_width(widths, width_of(adapter), str(cache.path))

    digests = cache.hashes(split, "digests")

    def blocks(wanted: range) -> Iterator[Block]:
        for start in wanted[::BLOCK_ROWS]:
            rows = np.arange(start, min(start + BLOCK_ROWS, wanted.stop))
            encoded = cache.features(split, rows, views=1)[0]
            features = cache.pre_projection(split, rows, views=1)[0] if before else encoded
            if both:
                second = cache.features2(split, rows, views=1)[0]
                features = np.concatenate([encoded, second], axis=1)
            yield Block(rows, features, encoded, None if digests is None else digests[rows], {})

    return blocks


def is_cache(path: Path) -> bool:
    """Whether it is a file of HDF5, told by how it begins."""
    try:
        with path.open("rb") if is_file(path) else BytesIO() as file:
            return file.read(len(HDF5)) == HDF5
    except OSError:  # which reading it as an image will say
        return False


def cached_sources(
    path: Path, split: str | None, adapter: SavedAdapter, listener: Listener
) -> list[tuple[str, Source]]:
    """The images of a cache with the split that they are of: of `split`, else those without labels,
    else of every split that it has. The file stays open as long as they are.

    Raises UserError as `cached_blocks` does.
    """
    from clip_adapter.cache.reader import BLOCK_ROWS, FeatureCache

    cache = FeatureCache(path)
    hashes = cache.metadata.datasets_sha256

    def source(name: str) -> Source:
        own = {of: sha for of, sha in hashes.items() if of.startswith(f"images/{name}/")}
        sha256 = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        rows, blocks = range(cache.shape(name)[1]), cached_blocks(cache, name, adapter)
        return Source(rows, blocks, lambda rows: cache.ids(name, rows), BLOCK_ROWS, sha256)

    usual = cache.all_splits if split is None else (split,)
    if split is None and cache.has("unlabelled"):
        usual = ("unlabelled",)
    sources = [(name, source(name)) for name in usual]
    warn_of_unproven(cache, adapter, listener)
    return sources


def warn_of_unproven(cache: FeatureCache, adapter: SavedAdapter, listener: Listener) -> None:
    """Say where nothing shows that a cache is of the adapter's encoder, unless it is its own."""
    if cache.metadata.content_sha256 != adapter.info.cache_sha256:
        warn_of_unknown(cache.backbone, f"{cache.path} and the adapter", listener)


def width_of(adapter: SavedAdapter) -> int:
    return feature_width(adapter.method, adapter.arrays, adapter.head)


def check_same_encoder(
    cache: FeatureCache, other: FeatureCache, option: str, listener: Listener
) -> None:
    """Raises UserError where `other`, named by an option, has another backbone, preprocessing or
    width; says so where the weights of both are unknown, so that none of this shows."""
    weights = (cache.backbone.get("weights_sha256"), other.backbone.get("weights_sha256"))
    before = (json.dumps(dict(one.preprocess), sort_keys=True) for one in (cache, other))
    own, found = cache.lengths["D"], other.lengths["D"]
    if len(set(weights)) > 1 or len(set(before)) > 1:
        what = "preprocessing" if len(set(weights)) == 1 else "weights of the backbone"
        raise UserError(
            f"{option}: {other.path} was made with other {what} than {cache.path}; extract its "
            "images with the same."
        )
    if found != own:
        raise UserError(
            f"{option}: the features of {other.path} are {found} wide and those of {cache.path} "
            f"{own}; extract its images with the same backbone."
        )
    if other.path != cache.path:
        warn_of_unknown(other.backbone, f"{other.path} and {cache.path}", listener)
