"""Whether a run can be done as planned, found out before anything is written."""

from __future__ import annotations

import json

import jax

from clip_adapter.adapters.engine.training import Run
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.data import PROVIDED_BY, Data, available
from clip_adapter.pipelines.fitting.plan import Plan, PlannedMethod
from clip_adapter.pipelines.fitting.tasks import TaskRows, base_classes


def check_feasible(plan: Plan, data: Data, rows: TaskRows) -> None:
    """Raises UserError, in a sentence, where a method lacks something or shapes do not fit.

    data: of the classes that are fitted. rows: of the first task.
    """
    base_to_new = plan.train_classes == "base"
    if base_to_new:
        _check_halves(plan, data)
    for planned in plan.everything:
        method = planned.method
        data.head(method)  # refuses prompts that cancel
        if missing := set(method.needs) - available(data.cache):
            flags = " ".join(sorted(PROVIDED_BY[need] for need in missing))
            raise UserError(f"{method.name} needs what this cache lacks; extract it with {flags}.")
        knows_new = method.unseen_classes or method.for_classes
        if base_to_new and not planned.baseline and not knows_new:
            raise UserError(f"--train-classes base: {method.name} cannot classify new classes.")
        if method.is_trained:
            _check_startable(planned, data, rows)


def _check_startable(planned: PlannedMethod, data: Data, rows: TaskRows) -> None:
    """Try the shapes of every setting, without a number being computed."""
    method = planned.method
    task = data.task(method, rows)
    tried: set[str] = set()
    for setting in method.settings(planned.values):
        static, numbers = method.split(setting)
        program = json.dumps([static, sorted(numbers)])
        if program in tried:
            continue
        tried.add(program)
        try:
            jax.eval_shape(lambda task, chosen=setting: Run(method, chosen, task).start(), task)
        except ValueError as error:
            raise UserError(f"{method.name}: {error}.") from None


def _check_halves(plan: Plan, data: Data) -> None:
    """Base-to-new needs images of the first half of the classes, and to test of both."""
    classes = len(data.cache.class_names)
    if classes < 2:
        raise UserError("--train-classes base needs at least two classes.")
    base = base_classes(classes)
    judged = plan.select in ("few-shot-val", "full-val")
    for split, halves in (("train", 1), ("val", 1 if judged else 0), ("test", 2)):
        labels = data.labels.get(split)
        if labels is None:
            continue
        there = {"first": (labels < base).any(), "second": (labels >= base).any()}
        for half in list(there)[:halves]:
            if not there[half]:
                raise UserError(
                    f"--train-classes base needs {split} images of the {half} half of the classes."
                )
