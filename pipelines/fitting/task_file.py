"""Few-shot tasks that a file states by the images' ids, so that several people can compare on the
very same ones: a run's tasks.json is such a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import Contradiction, UserError
from clip_adapter.files import named_once, parse_json, read_users_text
from clip_adapter.pipelines.fitting.config import shots_words
from clip_adapter.pipelines.fitting.plan import LARGEST_SEED, Plan
from clip_adapter.pipelines.fitting.tasks import RULES, Rows, TaskRows, check_rule
from clip_adapter.records import between, from_document
from clip_adapter.words import some

MOST_SHOTS = 2**31 - 1


@dataclass(frozen=True)
class StatedTask:
    """One task of a file. support, validation: ids of images, in the order of drawing."""

    shots: Annotated[int, between(1, MOST_SHOTS)] | Literal["all"]
    seed: Annotated[int, between(0, LARGEST_SEED)]
    support: tuple[str, ...]
    validation: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{shots_words(self.shots)}, seed {self.seed}"


def read_tasks(path: Path) -> list[StatedTask]:
    """The tasks of a file: a JSON list of them, or one to a line.

    Raises UserError, in a sentence, for anything else, and where they are not every one of some
    numbers of shots with every one of some seeds, once.
    """
    text = read_users_text(path)
    try:
        document = parse_json(text, object_pairs_hook=named_once)
    except Contradiction as error:
        raise UserError(f"{path} states no tasks: {error}.") from None
    except ValueError:
        document = None
    try:
        if not isinstance(document, list):
            lines = [line for line in text.splitlines() if line.strip()]
            document = [parse_json(line, object_pairs_hook=named_once) for line in lines]
        tasks = from_document(list[StatedTask], document, "the list")
    except Contradiction as error:
        raise UserError(f"{path} states no tasks: {error}.") from None
    except ValueError as error:
        raise UserError(f"{path} is neither a JSON list nor JSON lines: {error}.") from error
    _check_complete(path, tasks)
    return tasks


def _check_complete(path: Path, tasks: Sequence[StatedTask]) -> None:
    if not tasks:
        raise UserError(f"{path} states no tasks; a task has shots, seed, support and validation.")
    keys = [(task.shots, task.seed) for task in tasks]
    for task, key in zip(tasks, keys, strict=True):
        if keys.count(key) > 1:
            raise UserError(f"{path} states the task of {task} twice.")
        if not task.support:
            raise UserError(f"{path} names no support image for {task}.")
    for shots in dict.fromkeys(task.shots for task in tasks):
        for seed in dict.fromkeys(task.seed for task in tasks):
            if (shots, seed) not in keys:
                raise UserError(
                    f"{path} has no task of {shots_words(shots)} with seed {seed}; every number of "
                    "shots needs every seed that another one has."
                )


def sha256_of(tasks: Sequence[StatedTask]) -> str:
    """What tells these tasks from others, however their file is written."""
    return hashlib.sha256(json.dumps([asdict(task) for task in tasks]).encode()).hexdigest()


def rows_of(
    tasks: Sequence[StatedTask], cache: FeatureCache, plan: Plan, groups: Rows | None = None
) -> list[TaskRows]:
    """Their rows of the cache; support images may be of val as well, as where those had joined.

    groups: as `draw_tasks` takes them.

    Raises UserError, in a sentence, as `check_rule` does; for images that the cache has not where
    they would have to be; for some that are to be trained on and to judge; and where none would.
    """
    rule, join = RULES[plan.select], plan.validation == "join"
    check_rule(plan.select, "val" in cache.splits, join=join, grouped=groups is not None)
    places = {
        split: {name: row for row, name in enumerate(cache.ids(split))}
        for split in ("train", "val")
        if split in cache.splits
    }
    train, val = places["train"], places.get("val", {})
    of_support = {name: len(train) + row for name, row in val.items()} | train
    labels = np.concatenate([cache.labels(split) for split in places])
    every = np.arange(len(cache.class_names))

    def rows(task: StatedTask, names: Sequence[str], known: dict[str, int], splits: str) -> Rows:
        if missing := [name for name in names if name not in known]:
            raise UserError(
                f"--tasks names images for {task} that are not among the {splits} images of "
                f"{cache.path}: {some(missing)}."
            )
        return np.array([known[name] for name in names], np.int64)

    def small(own: Rows, count: int) -> tuple[int, ...]:
        counts = np.bincount(own, minlength=len(every))
        return tuple(np.flatnonzero((counts > 0) & (counts < count)).tolist())

    found = []
    for task in tasks:
        support = rows(task, task.support, of_support, "train and val" if val else "train")
        validation = rows(task, task.validation, val, "val")
        if both := np.intersect1d(support - len(train), validation).tolist():
            names = [name for name, row in val.items() if row in both]
            raise UserError(
                f"--tasks names images of {task} both as support and as validation: {some(names)}."
            )
        if groups is not None and not join:
            beside = groups[len(train) + validation]
            if (both := np.isin(beside, groups[support])).any():
                names = [task.validation[place] for place in np.flatnonzero(both).tolist()]
                raise UserError(
                    f"--tasks names validation images of {task} that are of one group with support "
                    f"images: {some(names)}; state others, or fit on a cache without groups."
                )
        if join:
            support, validation = np.concatenate([support, len(train) + validation]), validation[:0]
        if rule.validation == "all":
            validation = np.setdiff1d(np.arange(len(val)), support - len(train))
            if groups is not None:
                trained = np.isin(groups[len(train) + validation], groups[support])
                validation = validation[~trained]
            if not len(validation):
                raise UserError(
                    f"Every validation image is trained on for {task}, or of a group that is; use "
                    "--select cv, or none."
                )
        elif rule.validation == "none":
            validation = validation[:0]
        elif not len(validation):
            raise UserError(
                f"--select {plan.select} needs validation images and --tasks names none for "
                f"{task}; use --select cv, or none."
            )
        judged = labels[len(train) + validation]
        shots = 0 if task.shots == "all" else task.shots
        found.append(
            TaskRows(
                task.shots,
                task.seed,
                support,
                validation,
                small(labels[support], shots),
                (),
                tuple(np.setdiff1d(every, labels[support]).tolist()),
                tuple(np.setdiff1d(every, judged).tolist()) if len(judged) else (),
                None if groups is None else groups[support],
            )
        )
    return found
