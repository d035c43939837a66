"""What a run will do: its plan, its tasks, their data and its folder, before anything is fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.console.jax_setup import usable_jax
from clip_adapter.pipelines.fitting.config import DEFAULT_CACHE, FitConfig, Selection
from clip_adapter.pipelines.fitting.data import Data, available, open_data
from clip_adapter.pipelines.fitting.groups import Rows, identity_of, numbers_of, tested_twins
from clip_adapter.pipelines.fitting.make_plan import check_feasible, make_plan, without_effect
from clip_adapter.pipelines.fitting.plan import TASKS, Plan, PlannedMethod
from clip_adapter.pipelines.fitting.provenance import PROVENANCE, Provenance
from clip_adapter.pipelines.fitting.results import Held, TaskKey
from clip_adapter.pipelines.fitting.run_folder import PLAN, RunFolder, new_folder, read_plan
from clip_adapter.pipelines.fitting.taken import Taken, taken_of
from clip_adapter.pipelines.fitting.task_file import StatedTask, read_tasks, rows_of, sha256_of
from clip_adapter.pipelines.fitting.tasks import (
    TaskRows,
    base_classes,
    draw_tasks,
    needed_rows,
    only_classes,
)
from clip_adapter.pipelines.fitting.unlabelled import Unlabelled, unlabelled_of
from clip_adapter.pipelines.saved.adapter_file import know_method
from clip_adapter.words import same_text

Step = tuple[TaskRows, Held, PlannedMethod]


@dataclass(frozen=True)
class OpenedRun:
    """A run that is begun or gone on with: what it will do, and on what. new: data of the classes
    that are not fitted, under base-to-new."""

    plan: Plan
    data: Data
    new: Data | None
    tasks: Sequence[TaskRows]
    unlabelled: Unlabelled | None
    taken: Taken | None
    folder: RunFolder

    @property
    def steps(self) -> list[Step]:
        """Every method on every task, then the ablations."""
        tasks, parts = self.data.tasks, self.plan.parts
        steps = [(rows, held, planned) for rows in tasks for held, planned in parts if not held]
        return [*steps, *((rows, *part) for part in parts if part[0] for rows in tasks)]

    @property
    def waiting(self) -> list[Step]:
        """Those that the folder has no result of yet."""
        known = self.folder.identities
        return [step for step in self.steps if identity_of_step(step) not in known]


def identity_of_step(step: Step) -> tuple[TaskKey, str]:
    """That of its result."""
    rows, held, planned = step
    return (planned.method.name, rows.shots, rows.seed), str(held)


@contextmanager
def opened(
    config: FitConfig, listener: Listener, *, may_go_on: bool = False
) -> Iterator[OpenedRun]:
    """The run, before anything is fitted. Raises UserError as `fit` does."""
    if config.resume and (others := config.beside_resume):
        raise UserError(
            f"--resume takes no --{others[0]}: a run goes on as it was begun. Beside it stand "
            "--cache and --unlabelled, where those lie elsewhere now, and --method MODULE:NAME of "
            "your own."
        )
    begun = config.out if may_go_on and config.out and (config.out / PLAN).exists() else None
    begun = config.resume or begun
    for name in config.method if config.resume else ():
        if ":" in name:
            know_method(name)
    stored = read_plan(begun) if begun else None
    path = config.cache or (Path(stored.cache) if stored else DEFAULT_CACHE)
    with usable_jax(), FeatureCache(path) as cache:
        if stored and stored.cache_sha256 != cache.content_sha256:
            raise UserError(
                f"{cache.path} is not the cache that {begun} was started on; start a new run, or "
                "name with --cache where it lies now."
            )
        check_labelled(cache)
        stated = stated_tasks(config, stored)
        groups = numbers_of(cache)
        if stored and stored.groups != identity_of(groups):
            raise UserError(
                f"{cache.path} has other groups than when {begun} was started; start a new run."
            )
        unlabelled = unlabelled_of(config, stored, cache, listener)
        taken = taken_of(config, stored, cache, listener)
        plan = stored if stored and config.resume else None
        plan = plan or new_plan(config, cache, stated, groups, unlabelled, taken, listener)
        if stored and (differing := stored.differing(plan)):
            raise UserError(
                f"{begun} was started with other arguments ({', '.join(differing)}); give those "
                "again, or another --out."
            )
        plan = stored or plan
        data, new, tasks = drawn_tasks(plan, cache, stated, groups)
        if alike := data.classes_with_one_text():
            listener.note(same_text(alike))
        if plan.class_weight != "none" and all(map(data.is_even, data.tasks)):
            listener.note(
                f"--class-weight {plan.class_weight} has no effect: in every task all classes have "
                "equally many training images."
            )
        if sentence := tested_twins(cache, join=plan.validation == "join"):
            listener.note(sentence)
        check_feasible(plan, data, data.tasks[0])
        place = begun or config.out or new_folder()
        with closing(RunFolder(place, plan, resume=begun is not None)) as folder:
            documents = [asdict(task) for task in stated]
            documents = documents or task_documents(data, tasks)
            folder.write_json(TASKS, documents)
            folder.write_json(PROVENANCE, Provenance.of(data.cache).document())
            yield OpenedRun(plan, data, new, tasks, unlabelled, taken, folder)


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
