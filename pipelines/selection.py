"""Choose a setting and an epoch, on validation data only, and fit it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.method import Arrays, Evaluation, Grid, Method, Setting
from clip_adapter.cache.errors import UserError
from clip_adapter.pipelines.tasks import CachedData, Draw, Selection, folds, whole_task


@dataclass(frozen=True)
class Chosen:
    """The chosen setting, fitted on the whole support set.

    epoch: None where nothing chose one (the last). evaluation: None where there was no choice.
    tried, failed: how many settings. flat: those within one standard error of the best.
    note: what a reader has to know about the choice, or "".
    """

    setting: Setting
    epoch: int | None
    arrays: Arrays
    evaluation: Evaluation | None = None
    tried: int = 1
    failed: int = 0
    flat: int = 1
    note: str = ""


def choose(
    method: Method,
    grid: Grid,
    data: CachedData,
    drawn: Draw,
    rule: Selection,
    engine: Engine,
    on_evaluation: Callable[[Evaluation], None],
) -> Chosen:
    """Search the grid and fit the setting with the best validation accuracy (ties: lowest NLL).

    on_evaluation: called with each evaluation as it is made.
    Raises UserError where every setting diverged.
    """
    task = whole_task(data, drawn)
    parts = folds(data, drawn) if rule == "cv" else [task]
    if rule == "none" or not parts:
        setting = method.single(grid)
        note = "" if rule == "none" else "a class has one image, cv impossible: defaults taken"
        return Chosen(setting, None, method.fit(setting, None, task, engine), note=note)
    best: Evaluation | None = None
    scores: list[float] = []
    for evaluation in method.search(grid, parts, engine):
        on_evaluation(evaluation)
        scores.append(evaluation.score[0])
        if not evaluation.failed and (best is None or evaluation.score > best.score):
            best = evaluation
    if best is None:
        raise UserError(
            f"All {len(scores)} settings diverged at {drawn.shots} shots, seed {drawn.seed}; "
            "try a smaller --lr."
        )
    epoch = best.epochs[best.best]
    arrays = best.arrays() if best.arrays else method.fit(best.setting, epoch, task, engine)
    judged = sum(len(part.validation_labels) for part in parts)
    return Chosen(
        best.setting,
        epoch,
        arrays,
        best,
        tried=len(scores),
        failed=int(np.isneginf(scores).sum()),
        flat=_within_one_standard_error(scores, best.score[0], judged),
    )


def _within_one_standard_error(scores: list[float], best: float, images: int) -> int:
    """Settings whose accuracy is within √(p(1 − p)/n) of the best accuracy p on n images."""
    error = np.sqrt(best * (1 - best) / images)
    return int(np.sum(np.array(scores) >= best - error))
