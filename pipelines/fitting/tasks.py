"""The tasks of a run: which rows of the cache each (shots, seed) takes, and its folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Selection, Shots

MAX_FOLDS = 4
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TaskRows:
    """The rows of one (shots, seed), in drawing order.

    support: rows of train. validation: rows of val; empty where the selection rule takes none.
    small_classes, small_validation_classes: labels with fewer images than were asked for.
    absent_classes: labels without any training image.
    """

    shots: Shots
    seed: int
    support: Rows
    validation: Rows
    small_classes: tuple[int, ...] = ()
    small_validation_classes: tuple[int, ...] = ()
    absent_classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fold:
    """What to train on and what to judge on: rows of train, and rows of `judged_on`."""

    support: Rows
    validation: Rows
    judged_on: str = "val"


def draw_tasks(
    train: npt.NDArray[np.int32],
    val: npt.NDArray[np.int32] | None,
    classes: int,
    shots: Sequence[Shots],
    seeds: Sequence[int],
    rule: Selection,
    *,
    repeat: bool,
) -> list[TaskRows]:
    """Draw every task as published (few_shot.py); `all` shots take every training image.

    train, val: labels of the splits.
    Raises UserError for more shots than the largest class has, and for a rule that needs a
    validation split where the cache has none.
    """
    if rule in ("few-shot-val", "full-val") and val is None:
        raise UserError(
            f"--select {rule} needs a validation split and the cache has none; "
            "use --select cv, which divides the support set, or none."
        )
    val_labels = np.zeros(0, np.int32) if val is None else val
    whole = np.arange(len(val_labels)) if rule in ("few-shot-val", "full-val") else np.arange(0)
    absent = tuple(np.setdiff1d(np.arange(classes), train).tolist())

    def drawn(number: Shots, seed: int) -> TaskRows:
        if number == "all":
            return TaskRows(number, seed, np.arange(len(train)), whole, absent_classes=absent)
        task = draw_few_shot(
            train, val_labels, shots=number, seed=seed, repeat=repeat, classes=classes
        )
        few = rule == "few-shot-val"
        return TaskRows(
            number,
            seed,
            task.support,
            task.validation if few else whole,
            task.small_classes,
            task.small_validation_classes if few else (),
            absent,
        )

    return [drawn(number, seed) for number in shots for seed in seeds]


def folds(rows: TaskRows, labels: npt.NDArray[np.int32]) -> list[Fold]:
    """Stratified k-fold cross-validation on the support set, k = min(shots, 4).

    labels: of all training rows. Each class's images are dealt to the folds in drawing order; a
    class never lacks in a training part, as every class has at least two images. An image that was
    drawn repeatedly stays in one fold.

    Returns [] where some class has fewer than two distinct images.
    """
    support = rows.support
    own = labels[support]
    distinct = min(len(np.unique(support[own == label])) for label in np.unique(own))
    count = min(distinct, MAX_FOLDS)
    if count < 2:
        return []
    fold_of = _dealt(support, own, count)
    return [
        Fold(support[fold_of != fold], support[fold_of == fold], "train") for fold in range(count)
    ]


def _dealt(support: Rows, labels: npt.NDArray[np.int32], count: int) -> Rows:
    fold_of = np.empty(len(support), np.int64)
    for label in np.unique(labels):
        position: dict[int, int] = {}
        for index in np.flatnonzero(labels == label):
            position.setdefault(int(support[index]), len(position))
            fold_of[index] = position[int(support[index])] % count
    return fold_of


def base_classes(classes: int) -> int:
    """How many classes are base ones: the first half, the larger one of an odd number (CoOp)."""
    return -(-classes // 2)


def only_classes(
    rows: TaskRows,
    classes: int,
    train: npt.NDArray[np.int32],
    val: npt.NDArray[np.int32] | None,
) -> TaskRows:
    """The rows of the first so many classes: drawn first, filtered then, as in CoOp."""

    def within(some: Rows, labels: npt.NDArray[np.int32] | None) -> Rows:
        return some if labels is None else some[labels[some] < classes]

    def small(labels: Sequence[int]) -> tuple[int, ...]:
        return tuple(label for label in labels if label < classes)

    return TaskRows(
        rows.shots,
        rows.seed,
        within(rows.support, train),
        within(rows.validation, val),
        small(rows.small_classes),
        small(rows.small_validation_classes),
        small(rows.absent_classes),
    )


def kept_task(tasks: Sequence[TaskRows]) -> TaskRows:
    """The task whose adapter stands at the top of the run folder: most shots, first seed."""
    return max(tasks, key=lambda rows: len(rows.support))


def needed_rows(tasks: Sequence[TaskRows]) -> tuple[Rows, Rows]:
    """The rows of train and of val that any of the tasks takes, each once, as they first come."""
    return _union([t.support for t in tasks]), _union([t.validation for t in tasks])


def _union(several: Sequence[Rows]) -> Rows:
    rows = np.concatenate([*several, np.zeros(0, np.int64)])
    return rows[np.sort(np.unique(rows, return_index=True)[1])]
