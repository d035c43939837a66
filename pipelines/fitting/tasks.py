"""The tasks of a run: which rows of the cache each (shots, seed) takes, and its folds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.engine.evaluation import rounds_of
from clip_adapter.cache.few_shot import VALIDATION_SHOTS, draw_few_shot
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Selection, Shots, shots_words
from clip_adapter.pipelines.fitting.groups import fold_of
from clip_adapter.pipelines.fitting.results import TaskResult

if TYPE_CHECKING:
    from clip_adapter.pipelines.fitting.plan import Plan

MAX_FOLDS = 4
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TaskRows:
    """The rows of one (shots, seed), in drawing order.

    support: rows of train and, behind its last, of val where validation images join. validation:
    rows of val; empty where the selection rule takes none.
    groups: (S,) of which group each support image is; None where each is one of its own.
    small_classes, small_validation_classes: labels with some images, but fewer than were asked for.
    absent_classes, absent_validation_classes: labels without any.
    """

    shots: Shots
    seed: int
    support: Rows
    validation: Rows
    small_classes: tuple[int, ...] = ()
    small_validation_classes: tuple[int, ...] = ()
    absent_classes: tuple[int, ...] = ()
    absent_validation_classes: tuple[int, ...] = ()
    groups: Rows | None = None


@dataclass(frozen=True)
class Fold:
    """What to train on and what to judge on: rows as of `TaskRows.support`, and rows of
    `judged_on`: `val` or, for those of the support set, `train`."""

    support: Rows
    validation: Rows
    judged_on: str = "val"


@dataclass(frozen=True)
class Rule:
    """What chooses among settings (`--select`).

    words: what it is. validation: which rows of the validation split judge, the few that are drawn
    for a task or all. folds: from a task and the labels of all rows that may be in a support set;
    [] where nothing can choose, which `unless` explains. of_trained: the same for methods without a
    closed form, where it differs.
    """

    words: str
    validation: Literal["few", "all", "none"]
    folds: Callable[[TaskRows, npt.NDArray[np.int32]], list[Fold]]
    unless: str = ""
    of_trained: Callable[[TaskRows, npt.NDArray[np.int32]], list[Fold]] | None = None


def draw_tasks(
    train: npt.NDArray[np.int32],
    val: npt.NDArray[np.int32] | None,
    classes: int,
    shots: Sequence[Shots],
    seeds: Sequence[int],
    select: Selection,
    *,
    repeat: bool,
    join: bool = False,
    groups: Rows | None = None,
) -> list[TaskRows]:
    """Draw every task as published (few_shot.py); `all` shots take every training image.

    train, val: labels of the splits. join: the validation images that few-shot-val would draw are
    part of the support set. groups: of all images of train and, behind them, of val: what judges is
    of no group that is trained on.
    Raises UserError as `check_rule` does, for more shots than the largest class has, and where no
    validation image is of a group of its own.
    """
    check_rule(select, val is not None, join=join, grouped=groups is not None)
    rule = RULES[select]
    every = np.arange(classes)
    val_labels = np.zeros(0, np.int32) if val is None else val
    judging = val_labels if rule.validation != "none" else val_labels[:0]
    absent = tuple(np.setdiff1d(every, train).tolist())
    beside = None if groups is None or join else (groups[: len(train)], groups[len(train) :])

    def drawn(number: Shots, seed: int) -> TaskRows:
        support, validation = np.arange(len(train)), np.arange(len(judging))
        small: tuple[int, ...] = ()
        small_validation: tuple[int, ...] = ()
        if number != "all":
            task = draw_few_shot(
                train,
                val_labels,
                shots=number,
                seed=seed,
                repeat=repeat,
                classes=classes,
                groups=beside,
            )
            support, small = task.support, task.small_classes
            if rule.validation == "few":
                validation, small_validation = task.validation, task.small_validation_classes
        if join:
            joining = np.arange(len(val_labels)) if number == "all" else task.validation
            support = np.concatenate([support, len(train) + joining])
        if beside and len(judging):
            validation = validation[~np.isin(beside[1][validation], beside[0][support])]
            if not len(validation):
                raise UserError(
                    "Every validation image is of a group that is trained on; use --select cv, "
                    "which divides the support set by groups, or none."
                )
        unjudged = tuple(np.setdiff1d(every, judging[validation]).tolist()) if len(judging) else ()
        sizes = small, small_validation, absent, unjudged
        own = None if groups is None else groups[support]
        return TaskRows(number, seed, support, validation, *sizes, own)

    return [drawn(number, seed) for number in shots for seed in seeds]


def check_rule(select: Selection, has_val: bool, *, join: bool, grouped: bool = False) -> None:
    """Raises UserError for a rule that needs a validation split where the cache has none, for
    validation images that are to join the support set and judge, or are not there, and for one that
    parts groups."""
    if grouped and select == "loo":
        raise UserError(
            "--select loo leaves out single images, and this cache has groups of images that "
            "belong together; use --select cv, which leaves out whole groups."
        )
    judges = RULES[select].validation != "none"
    if join and (judges or not has_val):
        why = (
            f"--select {select} judges by them" if has_val else "the cache has no validation split"
        )
        raise UserError(f"--validation join adds validation images to the support set, and {why}.")
    if judges and not has_val:
        raise UserError(
            f"--select {select} needs a validation split and the cache has none; "
            "use --select cv, which divides the support set, or none."
        )


def judged_by(plan: Plan, results: Sequence[TaskResult], *, asked: bool) -> str:
    """What chose the settings of these results, in words. asked: not of a baseline."""
    select, grouped = plan.select, bool(plan.groups)
    rule, shots = RULES[select], dict.fromkeys(row.shots for row in results)
    if plan.from_run and asked:
        return f"nothing here: the setting is that of {plan.from_run}"
    words = rule.words
    if rule.validation == "few" and "all" in shots:
        whole = RULES["full-val"].words
        words = f"{words} (at `all` shots: {whole})" if len(shots) > 1 else whole
    if grouped and select == "cv":
        words += ", divided by groups"
    unjudged = dict.fromkeys(
        shots_words(row.shots)
        for row in results
        if row.setting is not None and row.val_accuracy is None
    )
    if rule.unless and unjudged:
        unless = "a class has images of one group alone" if grouped else rule.unless
        words += f" (at {', '.join(unjudged)} {unless}: nothing, the defaults)"
    if plan.score == "balanced-accuracy" and select != "none":
        words += ", where every class counts alike (validation % is balanced accuracy)"
    return words


def cross_validation(rows: TaskRows, labels: npt.NDArray[np.int32]) -> list[Fold]:
    """Stratified k-fold cross-validation on the support set, k = min(shots, 4).

    labels: of all rows that may be in it. Each class's images are dealt to the folds in drawing
    order; a class never lacks in a training part. An image that was drawn repeatedly stays in one
    fold, and so does a group (see `fold_of`); k is then that of the class with fewest groups.

    Returns [] where some class has fewer than two distinct images, or groups, or cannot be divided.
    """
    support = rows.support
    units = support if rows.groups is None else rows.groups
    folds = fold_of(units, labels[support], support, MAX_FOLDS)
    if folds is None:
        return []
    return [
        Fold(support[folds != fold], support[folds == fold], "train")
        for fold in range(folds.max() + 1)
    ]


def rounds(rows: TaskRows, labels: npt.NDArray[np.int32]) -> list[Fold]:
    """Leave-one-out by rounds: round r leaves out the r-th image of every class of two or more.

    To leave out single images makes the class of each one image poorer than its rivals, and trusts
    images too little. An image that was drawn repeatedly is left out as often as it is there.

    Returns [] where no class has two distinct images.
    """
    found = rounds_of(labels[rows.support], rows.support)
    if found is None:
        return []
    left_out = (found.of_image == number for number in range(len(found.members)))
    return [Fold(rows.support[~own], rows.support[own], "train") for own in left_out]


RULES: Mapping[Selection, Rule] = {
    "few-shot-val": Rule(
        f"min(shots, {VALIDATION_SHOTS}) validation images per class",
        "few",
        lambda rows, labels: [Fold(rows.support, rows.validation)],
    ),
    "full-val": Rule(
        "the whole validation split",
        "all",
        lambda rows, labels: [Fold(rows.support, rows.validation)],
    ),
    "cv": Rule(
        "cross-validation on the support set",
        "none",
        cross_validation,
        unless="a class has one image",
    ),
    "loo": Rule(
        "leaving out one support image of every class at a time (trained methods: "
        "cross-validation)",
        "none",
        rounds,
        unless="too few classes have two images",
        of_trained=cross_validation,
    ),
    "none": Rule("nothing (defaults)", "none", lambda rows, labels: []),
}


def base_classes(classes: int) -> int:
    """How many classes are base ones: the first half, the larger one of an odd number (CoOp)."""
    return -(-classes // 2)


def only_classes(
    rows: TaskRows,
    classes: int,
    support: npt.NDArray[np.int32],
    val: npt.NDArray[np.int32] | None,
) -> TaskRows:
    """The rows of the first so many classes: drawn first, filtered then, as in CoOp.

    support, val: labels of all rows that may be in a support set, and of the validation split.
    """

    def within(some: Rows, labels: npt.NDArray[np.int32] | None) -> Rows:
        return some if labels is None else some[labels[some] < classes]

    def small(labels: Sequence[int]) -> tuple[int, ...]:
        return tuple(label for label in labels if label < classes)

    groups = rows.groups
    return TaskRows(
        rows.shots,
        rows.seed,
        within(rows.support, support),
        within(rows.validation, val),
        small(rows.small_classes),
        small(rows.small_validation_classes),
        small(rows.absent_classes),
        small(rows.absent_validation_classes),
        groups if groups is None else groups[support[rows.support] < classes],
    )


def kept_task(tasks: Sequence[TaskRows]) -> TaskRows:
    """The task whose adapter stands at the top of the run folder: most shots, first seed."""

    def number(rows: TaskRows) -> float:
        return math.inf if rows.shots == "all" else rows.shots

    return max(tasks, key=number)


def needed_rows(tasks: Sequence[TaskRows]) -> tuple[Rows, Rows]:
    """The rows of train and of val that any of the tasks takes, each once, as they first come."""
    return _union([t.support for t in tasks]), _union([t.validation for t in tasks])


def _union(several: Sequence[Rows]) -> Rows:
    rows = np.concatenate([*several, np.zeros(0, np.int64)])
    return rows[np.sort(np.unique(rows, return_index=True)[1])]
