"""From a cache to the arrays of one task: support, validation and test."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.classifier import classifier_weights
from clip_adapter.adapters.training import Task
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.cache.reader import FeatureCache, Images

Shots = int | Literal["all"]
Selection = Literal["few-shot-val", "full-val", "cv", "none"]
MAX_FOLDS = 4


@dataclass(frozen=True)
class CachedData:
    """All of a cache that fitting needs, in memory.

    train: with one view, or all where training draws from them.
    weights: (C, D), the zero-shot classifier weights. val, test: None where the cache has none.
    """

    train: Images
    val: Images | None
    test: Images | None
    weights: npt.NDArray[np.float32]
    logit_scale: float
    logit_bias: float

    @property
    def classes(self) -> int:
        return len(self.weights)


def load_data(cache: FeatureCache, augment: bool = False) -> CachedData:
    """What fitting needs of a cache; of the training images view 0 alone unless `augment`.

    Raises UserError where the cache has no train split, its content cannot be used, or it has no
    augmented views to draw from.
    """
    if augment and "train" in cache.splits and cache.shape("train")[0] == 1:
        raise UserError(
            f"{cache.path} has no augmented views to draw from; make some with `extract --views 10`"
            ", or leave --augment out."
        )
    optional = {name: cache.images(name) for name in ("val", "test") if name in cache.splits}
    return CachedData(
        train=cache.images("train", views=None if augment else 1),
        val=optional.get("val"),
        test=optional.get("test"),
        weights=np.asarray(classifier_weights(jnp.asarray(cache.text_features()))),
        logit_scale=cache.logit_scale,
        logit_bias=cache.logit_bias,
    )


@dataclass(frozen=True)
class Draw:
    """The rows of one (shots, seed), in drawing order.

    support: rows of train. validation: rows of val; empty where the selection rule takes none.
    small_classes, small_validation_classes: classes with too few images for the draw.
    """

    shots: Shots
    seed: int
    support: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    small_classes: tuple[int, ...] = ()
    small_validation_classes: tuple[int, ...] = ()


def draw(data: CachedData, shots: Shots, seed: int, rule: Selection) -> Draw:
    """Draw a task as published (few_shot.py); `all` takes every training image.

    Raises UserError for more shots than the largest class has, and for a rule that needs a
    validation split where the cache has none.
    """
    val_labels = data.val.labels if data.val else np.zeros(0, np.int32)
    everything = np.arange(len(val_labels))
    if rule in ("few-shot-val", "full-val") and not len(val_labels):
        raise UserError(
            f"--select {rule} needs a validation split and the cache has none; "
            "use --select cv, which divides the support set, or none."
        )
    whole = {"few-shot-val": everything, "full-val": everything}.get(rule, everything[:0])
    if shots == "all":
        return Draw(shots, seed, np.arange(len(data.train.labels)), whole)
    task = draw_few_shot(data.train.labels, val_labels, shots=shots, seed=seed)
    if rule == "few-shot-val":
        whole = task.validation
        small_validation_classes = task.small_validation_classes
    else:
        small_validation_classes = ()
    return Draw(shots, seed, task.support, whole, task.small_classes, small_validation_classes)


def whole_task(data: CachedData, drawn: Draw) -> Task:
    """The task with all of its support set, and the drawn validation set."""
    val = data.val
    rows = drawn.validation
    features = val.features[0, rows] if val else np.zeros((0, data.weights.shape[1]), np.float32)
    labels = val.labels[rows] if val else np.zeros(0, np.int32)
    return _task(data, drawn, drawn.support, features, labels)


def folds(data: CachedData, drawn: Draw) -> list[Task]:
    """Stratified k-fold cross-validation on the support set, k = min(shots, 4).

    Each class's images are dealt to the folds in drawing order; a class never lacks in a training
    part, as every class has at least two images. A repeated image stays in one fold.

    Returns [] where some class has fewer than two distinct images.
    """
    labels = data.train.labels[drawn.support]
    distinct = min(len(np.unique(drawn.support[labels == c])) for c in np.unique(labels))
    count = min(distinct, MAX_FOLDS)
    if count < 2:
        return []
    fold_of = _deal(drawn.support, labels, count)
    return [
        _task(
            data,
            drawn,
            drawn.support[fold_of != fold],
            data.train.features[0, drawn.support[fold_of == fold]],
            labels[fold_of == fold],
        )
        for fold in range(count)
    ]


def _deal(
    support: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], count: int
) -> npt.NDArray[np.int64]:
    fold_of = np.empty(len(support), np.int64)
    for label in np.unique(labels):
        position: dict[int, int] = {}
        for index in np.flatnonzero(labels == label):
            position.setdefault(int(support[index]), len(position))
            fold_of[index] = position[int(support[index])] % count
    return fold_of


def _task(
    data: CachedData,
    drawn: Draw,
    support: npt.NDArray[np.int64],
    validation_features: npt.NDArray[np.float32],
    validation_labels: npt.NDArray[np.int32],
) -> Task:
    return Task(
        features=jnp.asarray(data.train.features[:, support]),
        labels=jnp.asarray(data.train.labels[support]),
        validation_features=jnp.asarray(validation_features),
        validation_labels=jnp.asarray(validation_labels),
        weights=jnp.asarray(data.weights),
        logit_scale=jnp.float32(data.logit_scale),
        logit_bias=jnp.float32(data.logit_bias),
        seed=jnp.int32(drawn.seed),
    )


def draws(
    data: CachedData, shots: tuple[Shots, ...], seeds: tuple[int, ...], rule: Selection
) -> Iterator[Draw]:
    for number in shots:
        for seed in seeds:
            yield draw(data, number, seed, rule)


def base_classes(data: CachedData) -> int:
    """The first half of the classes, the larger one of an odd number (as in CoOp)."""
    return -(-data.classes // 2)


def base_half(data: CachedData, drawn: Draw) -> tuple[CachedData, Draw]:
    """Data and draw reduced to the base classes: drawn first, filtered then, as in CoOp."""
    base = base_classes(data)
    val_rows = drawn.validation
    if data.val:
        val_rows = val_rows[data.val.labels[val_rows] < base]
    reduced = replace(
        drawn, support=drawn.support[data.train.labels[drawn.support] < base], validation=val_rows
    )
    return replace(
        data, test=_test_part(data, slice(0, base)), weights=data.weights[:base]
    ), reduced


def new_half(data: CachedData) -> CachedData:
    """Test images and classifier weights of the classes that base_half leaves out."""
    new = slice(base_classes(data), data.classes)
    return replace(data, test=_test_part(data, new), weights=data.weights[new])


def _test_part(data: CachedData, classes: slice) -> Images | None:
    """The test images of these classes, labels counted from the first of them."""
    if data.test is None:
        return None
    labels = data.test.labels
    rows = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
    return Images(
        data.test.features[:, rows],
        labels[rows] - np.int32(classes.start),
        [data.test.ids[row] for row in rows],
    )
