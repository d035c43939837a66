"""From a cache to the arrays of one task, and to blocks of test images.

What fitting needs of the training images is read once, for the union of all tasks' rows; test
images are scored block by block. No split has to fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.formulas import balanced_weights
from clip_adapter.adapters.method import Head, Method, Task
from clip_adapter.adapters.neighbours import ONE_TEXT, alike
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.text_tower import read_text_tower, tower_path
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.tasks import Fold, Rows, TaskRows, needed_rows
from clip_adapter.pipelines.saved.adapter_file import image_hashes
from clip_adapter.pipelines.scoring.zero_shot import zero_shot_weights

if TYPE_CHECKING:
    from jaxtyping import Float

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]

# Test images are read and scored so many at a time; blocks stay in memory up to so many bytes.
BLOCK_ROWS = 1024
KEPT_BYTES = 1 << 26
TOWER_SHA256 = "text_tower_sha256"
# What methods may need beyond features, and the flag of `extract` that provides it.
PROVIDED_BY = {
    "tower": "--with-text-tower",
    "projection": "--with-projection",
    "second": "--also",
}


def available(cache: FeatureCache) -> set[str]:
    """What of the things that methods may need the cache has."""
    has = {"text"}
    if TOWER_SHA256 in cache.backbone and tower_path(cache.path).exists():
        has.add("tower")
    if cache.has("projection"):
        has.add("projection")
    if cache.has("features2"):
        has.add("second")
    return has


def source_of(method: Method, cache: FeatureCache) -> str:
    """Which features of an image the method works on: `features`, `pre_projection`, or
    `both_features`, those of the second encoder behind the others."""
    if "projection" in method.needs:
        return "pre_projection"
    return "both_features" if method.takes_second and cache.has("features2") else "features"


@dataclass
class Data:
    """A cache as fitting sees it.

    labels: of each split that the cache has. classes: which of the cache's classes take part; all
    labels are counted from the first of them. class_weight: how images count in the loss of trained
    methods, as FitConfig has it.
    """

    cache: FeatureCache
    views: int
    tasks: Sequence[TaskRows]
    labels: Mapping[str, Labels]
    classes: slice
    class_weight: str = "none"
    _rows: dict[tuple[str, str], npt.NDArray[np.floating]] = field(default_factory=dict)
    _taken: dict[str, tuple[str, Rows, jax.Array]] = field(default_factory=dict)
    _blocks: dict[tuple[str, int], Features] = field(default_factory=dict)
    _extra: dict[str, Any] = field(default_factory=dict)

    @property
    def support_labels(self) -> Labels:
        """Of all rows that may be in a support set: of train, and behind them of val."""
        return np.concatenate(
            [self.labels[split] for split in ("train", "val") if split in self.labels]
        )

    def by_split(self, support: Rows) -> dict[str, Rows]:
        """The rows of each split that are in a support set."""
        joined = support >= len(self.labels["train"])
        return {"train": support[~joined], "val": support[joined] - len(self.labels["train"])}

    @property
    def count(self) -> int:
        """C, the number of classes."""
        return self.classes.stop - self.classes.start

    def of_classes(self, classes: slice) -> Data:
        """The same for other classes; what was read already is shared."""
        return replace(self, classes=classes)

    def head(self, method: Method) -> Head:
        """The zero-shot classifier of the classes, NumPy arrays; with text where that is needed."""
        needed = "text" in method.needs
        if needed and "text" not in self._extra:
            self._extra["text"] = self.cache.text_features()
        return Head(
            self._weights()[self.classes],
            np.float32(self.cache.logit_scale),
            np.float32(self.cache.logit_bias),
            self._extra["text"][self.classes] if needed else None,
        )

    def classes_with_one_text(self) -> list[list[str]]:
        """Groups of the cache's classes whose rows of the zero-shot classifier are the same."""
        weights, names = self._weights(), self.cache.class_names
        return [[names[row] for row in group] for group in alike(weights, ONE_TEXT)]

    def _weights(self) -> Features:
        """The zero-shot classifier of all classes of the cache."""
        if "weights" not in self._extra:
            self._extra["weights"] = zero_shot_weights(self.cache)
        return self._extra["weights"]

    def task(self, method: Method, rows: TaskRows, fold: Fold | None = None) -> Task:
        """The arrays of a task for a method, on the device; the whole of it, or one fold."""
        fold = fold or Fold(rows.support, rows.validation)
        task = Task(
            features=self._take(method, "train", fold.support, self.views_of(method)),
            labels=self._labels("train", fold.support),
            validation_features=self._take(method, fold.judged_on, fold.validation, views=1)[0],
            validation_labels=self._labels(fold.judged_on, fold.validation),
            head=self.head(method),
            seed=np.int32(rows.seed),
            extra=self.extra(method),
            class_weights=self._class_weights(method, self._labels("train", fold.support)),
        )
        return jax.tree.map(jnp.asarray, task)

    def everything(self, method: Method, seed: int) -> Task:
        """The task whose support set is every labelled image of the classes, of all splits."""
        features, labels = [], []
        views = self.views_of(method)
        for split, rows in self.labelled_rows().items():
            stored = self._read(split, source_of(method, self.cache), rows, views)
            # Only training images have augmented views; of the others each is taken as often.
            repeated = stored if len(stored) == views else np.repeat(stored, views, axis=0)
            features.append(repeated)
            labels.append(self._labels(split, rows))
        task = Task(
            features=np.concatenate(features, axis=1),
            labels=np.concatenate(labels),
            validation_features=np.zeros((0, features[0].shape[2]), np.float32),
            validation_labels=np.zeros(0, np.int32),
            head=self.head(method),
            seed=np.int32(seed),
            extra=self.extra(method),
            class_weights=self._class_weights(method, np.concatenate(labels)),
        )
        return jax.tree.map(jnp.asarray, task)

    def _class_weights(self, method: Method, labels: Labels) -> Float[Features, " C"] | None:
        if self.class_weight == "none" or not method.is_trained:
            return None
        return balanced_weights(np, labels, self.count).astype(np.float32)

    def is_even(self, rows: TaskRows) -> bool:
        """Whether all classes of a task's support set have equally many images."""
        counts = np.bincount(self._labels("train", rows.support))
        return len(set(counts[counts > 0].tolist())) == 1

    def labelled_rows(self) -> dict[str, Rows]:
        """Every labelled image of the classes, by split."""
        return {split: np.flatnonzero(self._inside(own)) for split, own in self.labels.items()}

    def taking_part(self) -> dict[str, Rows]:
        """The rows that fit, choose or test on some task, by split."""
        support, validation = needed_rows(self.tasks)
        rows = self.by_split(support)
        rows["val"] = np.concatenate([rows["val"], validation])
        return rows | {"test": np.arange(len(self.labels.get("test", ())))}

    def hashes(self, rows: Mapping[str, Rows]) -> npt.NDArray[np.uint64]:
        """By which the images of these rows of the splits are known again, each once."""
        known_by = [np.zeros(0, np.uint64)]
        for split, own in rows.items():
            digests = self.cache.hashes(split, "digests") if len(own) else None
            for start in range(0, len(own), BLOCK_ROWS):
                block = own[start : start + BLOCK_ROWS]
                features = self._read(split, "features", block, views=1)[0]
                known = image_hashes(features, None if digests is None else digests[block])
                known_by.append(known.ravel())
        return np.unique(np.concatenate(known_by))

    def views_of(self, method: Method) -> int:
        """How many views of a training image the method sees."""
        return self.views if method.uses_views else 1

    def extra(self, method: Method) -> dict[str, Any]:
        """What the method needs beyond features and text."""
        if "projection" in method.needs:
            projection = self.cache.projection()
            return {"projection": projection.weights, "bias": projection.bias}
        if "tower" in method.needs:
            assert method.prepare is not None
            key = f"tower of {method.name}"
            if key not in self._extra:
                path, sha256 = tower_path(self.cache.path), self.cache.backbone[TOWER_SHA256]
                self._extra[key] = method.prepare(*read_text_tower(path, sha256))
            own = range(self.classes.start, self.classes.stop)
            return {"tower": self._extra[key].of_classes(own)}
        if source_of(method, self.cache) == "both_features":
            return {"centre": self._second_centre()}
        return {}

    def _second_centre(self) -> Float[Features, " E"]:
        """The mean of the training images' features by the second encoder, whatever their labels:
        without it all have much of their direction in common."""
        if "centre" not in self._extra:
            count = len(self.labels["train"])
            total: Any = 0.0
            for start in range(0, count, BLOCK_ROWS):
                rows = np.arange(start, min(start + BLOCK_ROWS, count))
                block = self.cache.features2("train", rows, views=1)[0]
                total = total + block.sum(axis=0, dtype=np.float64)
            self._extra["centre"] = (total / count).astype(np.float32)
        return self._extra["centre"]

    def test_blocks(self, method: Method) -> Iterator[tuple[Features, Labels]]:
        """The test images of the classes: features (R, D) and labels (R,), block by block."""
        labels, source = self.labels["test"], source_of(method, self.cache)
        for start in range(0, len(labels), BLOCK_ROWS):
            rows = np.arange(start, min(start + BLOCK_ROWS, len(labels)))
            own = labels[rows]
            inside = self._inside(own)
            if inside.any():
                features = self._block("test", source, start, rows)
                yield features[inside], own[inside] - np.int32(self.classes.start)

    def test_ids(self) -> list[str]:
        """Those of the test images of the classes, in the order of `test_blocks`."""
        if "test_ids" not in self._extra:
            self._extra["test_ids"] = self.cache.ids("test")
        inside = self._inside(self.labels["test"]).tolist()
        return list(compress(self._extra["test_ids"], inside))

    def _inside(self, labels: Labels) -> npt.NDArray[np.bool_]:
        """Which are of the classes."""
        return (labels >= self.classes.start) & (labels < self.classes.stop)

    def _block(self, split: str, source: str, start: int, rows: Rows) -> Features:
        key = f"{split}/{source}", start
        if key in self._blocks:
            return self._blocks[key]
        block = self._read(split, source, rows, views=1)[0]
        if sum(kept.nbytes for kept in self._blocks.values()) + block.nbytes <= KEPT_BYTES:
            self._blocks[key] = block
        return block

    def _take(
        self, method: Method, split: str, rows: Rows, views: int
    ) -> Float[jax.Array, "V N D"]:
        """Of rows that some task takes."""
        source = source_of(method, self.cache)
        if not len(rows):
            width = self._read("train", source, np.zeros(1, np.int64), 1).shape[2]
            return jnp.zeros((views, 0, width), jnp.float32)
        last = self._taken.get(split)
        if last and last[0] == source and len(last[2]) == views and np.array_equal(last[1], rows):
            return last[2]  # as of the task before, which was of another method
        if (split, source) not in self._rows:
            read = self._read(split, source, self._needed[split], self.views)
            with np.errstate(over="ignore"):
                half = read.astype(np.float16)  # as many a file has them
            self._rows[split, source] = half if np.array_equal(half, read) else read
        taken = jnp.asarray(self._read(split, source, rows, views))
        self._taken[split] = source, rows, taken
        return taken

    @cached_property
    def _needed(self) -> dict[str, Rows]:
        return dict(zip(("train", "val"), needed_rows(self.tasks), strict=True))

    def _read(self, split: str, source: str, rows: Rows, views: int) -> Features:
        held = self._rows.get((split, source))
        if held is not None and np.isin(rows, union := self._needed[split]).all():
            order = np.argsort(union)
            places = order[np.searchsorted(union, rows, sorter=order)]
            return np.asarray(held[:views, places], np.float32)
        if split == "train" and len(joined := self.by_split(rows)["val"]):
            own = self._read("train", source, self.by_split(rows)["train"], views)
            # Only training images have augmented views; of the others each is taken as often.
            others = np.repeat(self._read("val", source, joined, 1), views, axis=0)
            read = np.empty((views, len(rows), own.shape[2]), own.dtype)
            is_joined = rows >= len(self.labels["train"])
            read[:, ~is_joined], read[:, is_joined] = own, others
            return read
        if source == "pre_projection":
            return self.cache.pre_projection(split, rows, views)
        own = self.cache.features(split, rows, views)
        if source == "features":
            return own
        return np.concatenate([own, self.cache.features2(split, rows, views)], axis=2)

    def _labels(self, split: str, rows: Rows) -> Labels:
        labels = self.support_labels if split == "train" else self.labels.get(split)
        own = np.zeros(0, np.int32) if labels is None else labels[rows]
        return own - np.int32(self.classes.start)


def open_data(
    cache: FeatureCache, tasks: Sequence[TaskRows], *, augment: bool, class_weight: str = "none"
) -> Data:
    """The cache for these tasks; of the training images view 0 alone unless `augment`.

    Raises UserError where the cache has no augmented views to draw from.
    """
    views = cache.shape("train")[0]
    if augment and views == 1:
        raise UserError(
            f"{cache.path} has no augmented views to draw from; make some with `extract --views 10`"
            ", or leave --augment out."
        )
    labels = {split: cache.labels(split) for split in cache.splits}
    classes = slice(0, len(cache.class_names))
    return Data(cache, views if augment else 1, tasks, labels, classes, class_weight)
