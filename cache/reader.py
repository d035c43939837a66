"""Read a feature cache, refusing with one sentence whatever cannot be trusted."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from clip_adapter.cache import schema
from clip_adapter.cache.content import indistinct
from clip_adapter.cache.metadata import Backbone2
from clip_adapter.cache.stored_file import StoredFile
from clip_adapter.errors import UserError
from clip_adapter.frames import frame_of_rows

if TYPE_CHECKING:
    import pandas

BLOCK_ROWS = 4096
Optional = Literal["prompts", "tokens", "pre_projection", "projection", "features2", "unlabelled"]


@dataclass(frozen=True)
class Images:
    """One split: features (V, N, D) float32, un-normalised; labels (N,) int32; N ids."""

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    ids: list[str]


@dataclass(frozen=True)
class Projection:
    """The encoder's last linear map, (F, D) and (D,) float32: features = pre-projection @ weights
    + bias. bias: zeros where the encoder has none."""

    weights: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]


class FeatureCache(StoredFile):
    """A complete feature cache, opened for reading.

    Opening checks that the file is what FORMAT.md says as far as that can be known without its
    values: identity, metadata, datasets, shapes and sizes. Values are checked when they are read.

    Raises UserError for a file that is missing, not HDF5, foreign, newer, incomplete, damaged, or
    that contradicts the format.

    Examples:
        >>> from clip_adapter import FeatureCache
        >>> with FeatureCache("features.h5") as cache:
        ...     cache.splits, cache.shape("test"), cache.text_features().shape
        (('train', 'val', 'test'), (1, 899, 128), (10, 1, 128))
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, schema.FORMAT)

    @property
    def backbone(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.metadata.backbone)

    @property
    def backbone2(self) -> Backbone2 | None:
        """The second encoder, with its preprocessing; None where the cache has none."""
        return self.metadata.backbone2

    @property
    def preprocess(self) -> dict[str, Any]:
        return self.metadata.preprocess

    @property
    def dataset(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.metadata.dataset)

    @property
    def arguments(self) -> dict[str, Any]:
        """What `extract` was asked for, {} for a cache written by something else."""
        return self.metadata.arguments

    @cached_property
    def content_sha256(self) -> str:
        """Identity of the cached numbers (FORMAT.md), computed where the file does not state it."""
        return self.metadata.content_sha256 or self.hashed_content()

    @property
    def logit_scale(self) -> float:
        """The multiplier itself (about 100 for CLIP), not its logarithm."""
        return self.metadata.logit_scale

    @property
    def logit_bias(self) -> float:
        return self.metadata.logit_bias

    @cached_property
    def class_names(self) -> list[str]:
        """Raises UserError where all are empty or, of several, one: no prompt would tell them."""
        names = self.strings("text/class_names")
        if reason := indistinct(names):
            raise self._broken(reason)
        return names

    @cached_property
    def templates(self) -> list[str]:
        return self.strings("text/templates")

    def has(self, name: Optional) -> bool:
        """Whether the cache has what only some caches have (FORMAT.md)."""
        paths = {
            "prompts": "text/prompts",
            "tokens": "text/tokens",
            "pre_projection": f"images/{self.all_splits[0]}/pre_projection",
            "projection": "projection/weights",
            "features2": f"images/{self.all_splits[0]}/features2",
            "unlabelled": "images/unlabelled/features",
        }
        return self.has_dataset(paths[name])

    def text_features(self, classes: slice = slice(None)) -> npt.NDArray[np.float32]:
        """(C, P, D) float32, un-normalised: of all classes or of some consecutive ones."""
        return self.features_of("text/features", (classes,))

    def tokens(self) -> npt.NDArray[np.int32]:
        """(C, P, L) int32: what the text tower was given for each prompt; zeros for none."""
        self._need("tokens")
        return self.values_of("text/tokens")

    def projection(self) -> Projection:
        self._need("projection")
        weights = self.values_of("projection/weights")
        bias = np.zeros(weights.shape[1], np.float32)
        if self.has_dataset("projection/bias"):
            bias = self.values_of("projection/bias")
        if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
            raise self._broken("projection holds values that are not finite")
        return Projection(weights, bias)

    def _need(self, name: Optional) -> None:
        if not self.has(name):
            raise UserError(f"{self.path} has no {name.replace('_', '-')}; extract it with some.")

    def shape(self, split: str) -> tuple[int, int, int]:
        """(V, N, D) of a split's features."""
        self._need_split(split)
        views, rows, dim = self.shape_of(f"images/{split}/features")
        return views, rows, dim

    def labels(self, split: str) -> npt.NDArray[np.int32]:
        """(N,) int32, checked to lie within the classes."""
        if split == schema.UNLABELLED:
            raise UserError(f"{self.path} has no labels of its unlabelled images; nobody has.")
        self._need_split(split)
        return self.labels_of(f"images/{split}/labels", self.lengths["C"])

    def ids(self, split: str, rows: npt.ArrayLike | None = None) -> list[str]:
        """The ids of these rows in this order; of all where `rows` is None."""
        self._need_split(split)
        path = f"images/{split}/ids"
        if rows is None:
            return self.strings(path)
        wanted = self._rows(split, rows)
        names: dict[int, str] = {}
        # A bounded piece at a time: all names of a large split take more than its labels.
        for start in range(0, self.lengths[f"N {split}"], BLOCK_ROWS):
            here = np.unique(wanted[(wanted >= start) & (wanted < start + BLOCK_ROWS)])
            if len(here):
                first = int(here[0])
                strings = self.values_of(path, slice(first, int(here[-1]) + 1))
                names |= {row: strings[row - first] for row in here.tolist()}
        return [names[row] for row in wanted.tolist()]

    def hashes(self, split: str, name: str) -> npt.NDArray[np.uint64] | None:
        """One of a split's optional lists of hashes, of rows or of skipped images; None where it is
        not there."""
        path = f"images/{split}/{name}"
        return self.values_of(path) if self.has_dataset(path) else None

    def groups(self, split: str) -> list[str] | None:
        """(N,) of which group each image is (a burst, a video, a patient), in every split by the
        same names; None where the cache knows none."""
        path = f"images/{split}/groups"
        if not self.has_dataset(path):
            return None
        names = self.strings(path)
        if "" in names:
            raise self._broken(f"{path} holds an empty name")
        return names

    def skipped_ids(self, split: str) -> list[str]:
        """Those images of a split that could not be read."""
        path = f"images/{split}/skipped"
        return self.strings(path) if self.has_dataset(path) else []

    def skipped_labels(self, split: str) -> list[int]:
        """Their labels."""
        path = f"images/{split}/skipped_labels"
        if not self.has_dataset(path):
            return []
        return self.labels_of(path, self.lengths["C"]).tolist()

    def prompts(self) -> list[list[str]] | None:
        """(C, P) what was encoded for each class, where that is recorded."""
        return self.strings("text/prompts") if self.has("prompts") else None

    def features(
        self, split: str, rows: npt.ArrayLike, views: int | None = None
    ) -> npt.NDArray[np.float32]:
        """(V, R, D) float32, un-normalised: the features of R rows in the order given.

        rows: (R,) integers; a row may come several times. views: at most so many, view 0 being the
            first; None for all.
        Raises IndexError for rows that are no integers or are not there.
        Beside the result about 1 MiB is in memory, or a chunk where the file has larger ones.
        """
        return self._rows_of_views(split, "features", rows, views)

    def pre_projection(
        self, split: str, rows: npt.ArrayLike, views: int | None = None
    ) -> npt.NDArray[np.float32]:
        """(V, R, F) float32: what the projection is applied to, as `features` gives features."""
        self._need("pre_projection")
        return self._rows_of_views(split, "pre_projection", rows, views)

    def features2(
        self, split: str, rows: npt.ArrayLike, views: int | None = None
    ) -> npt.NDArray[np.float32]:
        """(V, R, E) float32: the second encoder's features, as `features` gives the first's."""
        self._need("features2")
        return self._rows_of_views(split, "features2", rows, views)

    def blocks(
        self, split: str, size: int = BLOCK_ROWS
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]]:
        """All rows in order, `size` at a time: features of view 0, (R, D) float32, labels (R,)."""
        labels = self.labels(split)
        for start in range(0, len(labels), size):
            rows = np.arange(start, min(start + size, len(labels)))
            yield self.features(split, rows, views=1)[0], labels[rows]

    def images(self, split: str, views: int | None = None) -> Images:
        """All features, labels and ids of one split in memory.

        views: how many to read, view 0 being the first; None for all.
        """
        rows = np.arange(self.shape(split)[1])
        return Images(self.features(split, rows, views), self.labels(split), self.ids(split))

    def to_frame(self, split: str | None = None) -> "pandas.DataFrame":
        """A row for each image, of one split or of all, as a frame of pandas: id, split, label (the
        class name; None of images without labels) and, where some have one, group. Features are in
        the same order (`features`). Raises UserError without pandas."""
        rows: list[dict[str, Any]] = []
        for name in self.all_splits if split is None else (split,):
            ids, groups, labels = self.ids(name), self.groups(name), [None] * self.shape(name)[1]
            if name != schema.UNLABELLED:
                labels = [self.class_names[label] for label in self.labels(name).tolist()]
            for row, image in enumerate(ids):
                group = {} if groups is None else {"group": groups[row]}
                rows.append({"id": image, "split": name, "label": labels[row]} | group)
        return frame_of_rows(rows)

    def _rows_of_views(
        self, split: str, name: str, rows: npt.ArrayLike, views: int | None
    ) -> npt.NDArray[np.float32]:
        self._need_split(split)
        path = f"images/{split}/{name}"
        wanted = self._rows(split, rows)
        stored, _, dim = self.shape_of(path)
        picked = np.empty((min(views or stored, stored), len(wanted), dim), np.float32)
        order = np.argsort(wanted, kind="stable")
        step = self.row_step(path)
        edges = np.searchsorted(wanted[order], np.arange(0, self.shape_of(path)[1] + step, step))
        for first, last in pairwise(edges.tolist()):
            if first == last:
                continue
            places = order[first:last]
            here = wanted[places]
            low, high = int(here[0]), int(here[-1]) + 1
            for view in range(len(picked)):
                piece = (view, slice(low, high))
                picked[view, places] = self.features_of(path, piece, here - low)
        return picked

    def _rows(self, split: str, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        given = np.asarray(rows)
        if given.size and given.dtype.kind not in "iu":
            raise IndexError(f"rows are {given.dtype}, not integers")
        wanted = given.astype(np.int64)
        count = self.lengths[f"N {split}"]
        if wanted.ndim != 1 or (len(wanted) and not 0 <= wanted.min() <= wanted.max() < count):
            raise IndexError(f"rows outside the {count} of {split}")
        return wanted

    def _need_split(self, split: str) -> None:
        if split not in self.all_splits:
            raise UserError(
                f"{self.path} has no {split} split, only {', '.join(self.all_splits)}; "
                "extract a data set with one."
            )
