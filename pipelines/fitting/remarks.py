"""What a mean accuracy hides: the classes it does worst on, what always guessing the largest class
would reach, a baseline that did better; and whose adapter is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_adapter.adapters.engine.evaluation import DIVERGED, Score
from clip_adapter.pipelines.fitting.command_line_of import command_that_keeps
from clip_adapter.pipelines.fitting.config import shots_words
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.fitting.predictions import (
    Predictions,
    most_frequent,
    read_predictions,
    recalls,
)
from clip_adapter.pipelines.fitting.results import MethodSummary, TaskResult
from clip_adapter.pipelines.fitting.tasks import TaskRows, kept_task
from clip_adapter.words import quoted

WORST_SHOWN = 3


def remarks(
    run: Path,
    plan: Plan,
    results: Sequence[TaskResult],
    summary: Sequence[MethodSummary],
    class_names: Sequence[str],
) -> list[str]:
    """A sentence each; of the methods that were asked for, at the most shots, over the seeds.

    class_names: of the cache, in label order.
    Raises UserError where the predictions that `run` keeps cannot be read.
    """
    found: list[str] = []
    for planned in plan.fitted:
        name = planned.method.name
        tested = [r for r in results if r.method == name and r.test_accuracy is not None]
        if not tested:
            continue
        shots = tested[-1].shots
        kept = [read_predictions(run, *r.key) for r in tested if r.shots == shots]
        at = f"{name} at {shots_words(shots)}"
        guessed = guessing(kept[0], class_names)
        if not found:
            found.append(guessed.words)
        accuracy = float(np.mean([predictions.accuracy for predictions in kept]))
        if guessed.beats(accuracy):
            found.append(f"{at} is worse than {guessed.short} ({100 * accuracy:.2f} %)")
        if worst := _worst(kept, class_names):
            found.append(f"{at} does worst on {worst}")
    return found + _unshown(plan, results) + _beaten(plan, summary)


@dataclass(frozen=True)
class Guessing:
    """What always saying one class would reach, which no accuracy says of itself.

    share: of the test images, in [0, 1]. short: `always saying 'nominal'`. words: a sentence.
    """

    share: float
    short: str
    words: str

    def beats(self, accuracy: float) -> bool:
        """Whether the accuracy is below it, by more than rounding."""
        return accuracy < self.share and not math.isclose(accuracy, self.share)


def guessing(predictions: Predictions, class_names: Sequence[str]) -> Guessing:
    """Of the test images of these predictions. class_names: in label order."""
    label, share = most_frequent(predictions.labels)
    if np.ptp(np.unique(predictions.labels, return_counts=True)[1]):
        short = f"always saying {quoted(class_names[label])}"
        of = ", the most frequent class of the test"
    else:
        short, of = "always saying the same class", "; all have as many test images"
    return Guessing(share, short, f"{100 * share:.2f} % is reached by {short}{of}")


def _worst(kept: Sequence[Predictions], class_names: Sequence[str]) -> str:
    """The classes of which fewest test images are right, mean over the seeds; none of which all
    are, nor is one said to be 100.0 % right."""
    right = np.mean([predictions.right for predictions in kept], axis=0)
    there, shares = recalls(kept[0].labels, right)
    order = np.argsort(shares, kind="stable")[:WORST_SHOWN]
    worst = [(class_names[there[i]], min(100 * shares[i], 99.9)) for i in order if shares[i] < 1]
    return ", ".join(f"{quoted(name)} ({percent:.1f} %)" for name, percent in worst)


def _unshown(plan: Plan, results: Sequence[TaskResult]) -> list[str]:
    """Where validation does not show a method to be better than zero-shot."""
    found = []
    for name in (planned.method.name for planned in plan.fitted):
        places = []
        for shots in plan.shots:
            own = [r.outdoes_zero_shot for r in results if (r.method, r.shots) == (name, shots)]
            if missing := own.count(False):
                seeds = f" ({missing} of {len(own)} seeds)" if len(own) > 1 else ""
                places.append(shots_words(shots) + seeds)
        if places:
            found.append(f"validation does not show {name} to outdo zero-shot at {_list(places)}")
    return found


def _beaten(plan: Plan, summary: Sequence[MethodSummary]) -> list[str]:
    """Where a baseline's mean is above that of a method that was asked for."""
    means = {
        (row.method, row.shots): row.test_accuracy.mean for row in summary if row.test_accuracy
    }
    found = []
    for baseline in (p.method.name for p in plan.methods if p.baseline):
        for asked in (p.method.name for p in plan.fitted):
            gaps = [
                f"{shots_words(shots)} ({100 * means[baseline, shots]:.2f} % against "
                f"{100 * means[asked, shots]:.2f} %)"
                for shots in plan.shots
                if means.get((baseline, shots), 0.0) > means.get((asked, shots), 1.0)
            ]
            if gaps:
                found.append(f"the baseline {baseline} did better than {asked} at {_list(gaps)}")
    return found


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def candidates(
    plan: Plan, tasks: Sequence[TaskRows], results: Sequence[TaskResult], *, baseline: bool = False
) -> list[TaskResult]:
    """The rows of the methods that were asked for, or of the baselines, on the task whose adapter
    is kept; without those of which every setting diverged."""
    rows = kept_task(tasks)
    by_key = {result.key: result for result in results}
    names = [p.method.name for p in plan.methods if p.baseline == baseline]
    found = [by_key.get((name, rows.shots, rows.seed)) for name in names]
    return [result for result in found if result and result.setting is not None]


def what_is_kept(
    plan: Plan,
    run: Path,
    tasks: Sequence[TaskRows],
    results: Sequence[TaskResult],
    kept: TaskResult | None,
) -> list[str]:
    """Sentences: whose adapter stands at the top of the run folder, and the command that keeps
    another where nothing chose or a baseline did better on validation."""
    if kept is None:
        return _unchosen(plan, run, candidates(plan, tasks, results))
    which = f"{kept.method} at {shots_words(kept.shots)}, seed {kept.seed}"
    if plan.refit:
        which += ", fitted once more on every labelled image (the accuracies are those of before)"
    lines = [f"{run}: adapter of {which}"]
    rivals = [r for r in candidates(plan, tasks, results, baseline=True) if is_judged(r)]
    best = max(rivals, key=rank, default=None)
    if best and is_judged(kept) and (best.val_accuracy or 0) > (kept.val_accuracy or 0):
        ours, theirs = (f"{100 * (row.val_accuracy or 0):.2f} %" for row in (kept, best))
        lines += [
            f"the baseline {best.method} did better on validation ({theirs} against {ours}); the "
            "command that keeps it:",
            f"  {command_that_keeps(plan, *best.key)}",
        ]
    return lines


def _unchosen(plan: Plan, run: Path, sound: Sequence[TaskResult]) -> list[str]:
    if not sound:
        return []
    first = next((row for row in sound if row.setting), sound[0])  # rather than zero-shot
    return [
        f"{run}: no adapter is kept at the top, as nothing chose between "
        f"{', '.join(row.method for row in sound)}; each lies in {run / 'adapters'}",
        f"the command that keeps {first.method}, or another by its name (validation chooses "
        "between several where --select is not none):",
        f"  {command_that_keeps(plan, *first.key)}",
    ]


def is_judged(result: TaskResult) -> bool:
    return result.val_accuracy is not None and result.val_nll is not None


def rank(result: TaskResult) -> Score:
    if result.val_accuracy is None or result.val_nll is None:
        return DIVERGED
    return Score(result.val_accuracy, -result.val_nll)
