"""What a run will do: its plan, its tasks and their data, before anything is fitted or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting.config import FitConfig, Selection
from clip_adapter.pipelines.fitting.data import Data, available, open_data
from clip_adapter.pipelines.fitting.groups import Rows, identity_of
from clip_adapter.pipelines.fitting.make_plan import make_plan, without_effect
from clip_adapter.pipelines.fitting.plan import TASKS, Plan
from clip_adapter.pipelines.fitting.taken import Taken
from clip_adapter.pipelines.fitting.task_file import StatedTask, read_tasks, rows_of, sha256_of
from clip_adapter.pipelines.fitting.tasks import (
    TaskRows,
    base_classes,
    draw_tasks,
    needed_rows,
    only_classes,
)
from clip_adapter.pipelines.fitting.unlabelled import Unlabelled


def check_labelled(cache: FeatureCache) -> None:
    """Raises UserError where there is nothing to fit on."""
    if "train" not in cache.splits:
        elsewhere = "score an adapter that was fitted elsewhere on it with `clip-adapter evaluate`"
        raise UserError(
            f"{cache.path} has no train split, only {', '.join(cache.all_splits)}; "
            f"{elsewhere if cache.splits else 'give a cache of labelled images'}."
        )


def stated_tasks(config: FitConfig, stored: Plan | None) -> list[StatedTask]:
    """The tasks of --tasks, or of a run that was begun with it and is resumed."""
    if config.resume:
        return read_tasks(config.resume / TASKS) if stored and stored.tasks else []
    if config.tasks is None:
        return []
    plain = FitConfig()
    for name in ("shots", "seeds", "repeat"):
        if name in config.stated or getattr(config, name) != getattr(plain, name):
            raise UserError(f"--tasks says which images are taken, so --{name} is of no use.")
    return read_tasks(config.tasks)


def new_plan(
    config: FitConfig,
    cache: FeatureCache,
    stated: Sequence[StatedTask],
    groups: Rows | None,
    unlabelled: Unlabelled | None,
    taken: Taken | None,
    listener: Listener,
) -> Plan:
    """The plan of what is asked for; what has no effect in it is said.

    Raises UserError as `make_plan` does, and for what contradicts --from.
    """
    if taken:
        config = taken.config(config)
    if config.select is None:
        config = replace(config, select=_usual_rule(cache, listener))
    if stated:
        shots = tuple(dict.fromkeys(task.shots for task in stated))
        seeds = tuple(dict.fromkeys(task.seed for task in stated))
        config = replace(config, shots=shots, seeds=seeds)
    which = unlabelled.identity if unlabelled else ""
    plan = make_plan(config, cache.content_sha256, available(cache), which)
    tasks = sha256_of(stated) if stated else ""
    plan = replace(
        plan,
        tasks=tasks,
        groups=identity_of(groups),
        from_sha256=taken.sha256 if taken else "",
    )
    for sentence in without_effect(config, plan):
        listener.note(sentence)
    return plan


def _usual_rule(cache: FeatureCache, listener: Listener) -> Selection:
    """The rule where none was asked for: few-shot validation, if there is anything to draw from."""
    if "val" in cache.splits:
        return "few-shot-val"
    listener.note(
        f"{cache.path} has no validation split: settings are chosen by cross-validation on the "
        "support set (--select cv), where every class has two images or more."
    )
    return "cv"


def drawn_tasks(
    plan: Plan, cache: FeatureCache, stated: Sequence[StatedTask], groups: Rows | None
) -> tuple[Data, Data | None, list[TaskRows]]:
    """Data of the classes that are fitted, of the others under base-to-new, and the draws."""
    train = cache.labels("train")
    val = cache.labels("val") if "val" in cache.splits else None
    classes = len(cache.class_names)
    if plan.tasks:
        if sha256_of(stated) != plan.tasks:
            raise UserError(f"The {TASKS} of the run is not what it was begun with; begin it anew.")
        drawn = rows_of(stated, cache, plan, groups)
    else:
        drawn = draw_tasks(
            train,
            val,
            classes,
            plan.shots,
            plan.seeds,
            plan.select,
            repeat=plan.repeat,
            join=plan.validation == "join",
            groups=groups,
        )
    how: dict[str, Any] = {"augment": plan.augment, "class_weight": plan.class_weight}
    if plan.train_classes == "all":
        return open_data(cache, drawn, **how), None, drawn
    base = base_classes(classes)
    every = train if val is None else np.concatenate([train, val])
    taken = [only_classes(rows, base, every, val) for rows in drawn]
    data = open_data(cache, taken, **how)
    return data.of_classes(slice(0, base)), data.of_classes(slice(base, classes)), drawn


def task_documents(data: Data, tasks: Sequence[TaskRows]) -> list[dict[str, object]]:
    """The images of each task by their ids, which are read once for all tasks."""
    support, validation = needed_rows(tasks)
    needed = data.by_split(support)
    needed["val"] = np.concatenate([needed["val"], validation])
    names = {
        split: dict(zip(rows.tolist(), data.cache.ids(split, rows), strict=True))
        for split, rows in needed.items()
        if len(rows)
    }
    return [
        {
            "shots": rows.shots,
            "seed": rows.seed,
            "support": [
                names[split][row]
                for split, own in data.by_split(rows.support).items()
                for row in own.tolist()
            ],
            "validation": [names["val"][row] for row in rows.validation.tolist()],
        }
        for rows in tasks
    ]
