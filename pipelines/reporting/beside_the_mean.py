"""What a mean accuracy hides, in sentences; and what validation chose, task by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.fitting.predictions import Predictions, most_frequent, recalls
from clip_adapter.pipelines.fitting.results import TaskResult
from clip_adapter.pipelines.reporting.accuracies import missing_seeds
from clip_adapter.pipelines.reporting.entries import Entry
from clip_adapter.pipelines.reporting.table import NOTHING, Table
from clip_adapter.words import quoted

WORST_SHOWN = 3


@dataclass(frozen=True)
class Guess:
    """What always saying one class would reach, which no accuracy says of itself.

    share: of the test images, in [0, 1]. short: `always saying 'nominal'`. words: a sentence.
    """

    share: float
    short: str
    words: str

    def beats(self, accuracy: float) -> bool:
        """Whether the accuracy is below it, by more than rounding."""
        return accuracy < self.share and not math.isclose(accuracy, self.share)


def guess(predictions: Predictions, class_names: Sequence[str]) -> Guess:
    """Of the test images of these predictions. class_names: in label order."""
    label, share = most_frequent(predictions.labels)
    if np.ptp(np.unique(predictions.labels, return_counts=True)[1]):
        short = f"always saying {quoted(class_names[label])}"
        of = ", the most frequent class of the test"
    else:
        short, of = "always saying the same class", "; all have as many test images"
    return Guess(share, short, f"{100 * share:.2f} % is reached by {short}{of}")


def beside_guessing(entries: Sequence[Entry]) -> list[str]:
    """What guessing would reach, and which of the entries that were asked for do worse at their
    most shots.

    Raises UserError where predictions cannot be read.
    """
    sentences: list[str] = []
    for entry in entries:
        if not (entry.asked and entry.tested):
            continue
        shots = entry.tested[-1]
        guessed = guess(next(iter(entry.predictions(shots).values())), entry.first.class_names)
        if not sentences:
            sentences.append(guessed.words)
        spread = entry.summary[shots].test_accuracy
        if spread and guessed.beats(spread.mean):
            at = f"{entry.label} at {shots_words(shots)}"
            sentences.append(f"{at} is worse than {guessed.short} ({100 * spread.mean:.2f} %)")
    return sentences


def beside_the_mean(entries: Sequence[Entry]) -> list[str]:
    """Of the entries that were asked for: the classes that each does worst on at its most shots,
    where validation does not show it to be better than zero-shot, and a baseline that did better.

    Raises UserError where predictions cannot be read.
    """
    asked = [entry for entry in entries if entry.asked and entry.tested]
    sentences = []
    for entry in asked:
        shots = entry.tested[-1]
        if worst := _worst([*entry.predictions(shots).values()], entry.first.class_names):
            sentences.append(f"{entry.label} at {shots_words(shots)} does worst on {worst}")
    for entry in asked:
        places = []
        for shots in entry.summary:
            if missing := missing_seeds(entry, shots):
                count = len(entry.results(shots))
                seeds = f" ({missing} of {count} seeds)" if count > 1 else ""
                places.append(shots_words(shots) + seeds)
        if places:
            sentences.append(
                f"validation does not show {entry.label} to outdo zero-shot at {_joined(places)}"
            )
    for baseline in (entry for entry in entries if not entry.asked):
        for entry in asked:
            gaps = [gap for shots in entry.tested if (gap := _gap(baseline, entry, shots))]
            if gaps and baseline.train_classes == entry.train_classes:
                sentences.append(
                    f"the baseline {baseline.label} did better than {entry.label} at "
                    f"{_joined(gaps)}"
                )
    return sentences


def _worst(predictions: Sequence[Predictions], class_names: Sequence[str]) -> str:
    """The classes of which fewest test images are right, mean over the seeds; none of which all
    are, nor is one said to be 100.0 % right."""
    right = np.mean([own.right for own in predictions], axis=0)
    there, shares = recalls(predictions[0].labels, right)
    order = np.argsort(shares, kind="stable")[:WORST_SHOWN]
    worst = [(class_names[there[i]], min(100 * shares[i], 99.9)) for i in order if shares[i] < 1]
    return ", ".join(f"{quoted(name)} ({percent:.1f} %)" for name, percent in worst)


def _gap(baseline: Entry, entry: Entry, shots: Shots) -> str:
    rows = [one.summary.get(shots) for one in (baseline, entry)]
    theirs, ours = (row.test_accuracy.mean if row and row.test_accuracy else -1.0 for row in rows)
    if not theirs > ours > -1:
        return ""
    return f"{shots_words(shots)} ({100 * theirs:.2f} % against {100 * ours:.2f} %)"


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def chosen_settings(entry: Entry, shots: Shots | None = None) -> Table | None:
    """What validation chose, task by task, and how flat the optimum is; None where it chose
    nothing. Hyper-parameters of which several values were tried, and those that were learned.

    shots: of this number alone.
    """
    rows, method = entry.results(shots), entry.method
    learned = {name for row in rows for name in row.learned}
    tried = {name for name, values in entry.planned.values.items() if len(values) > 1}
    names = [name for name in method.hyper if name in tried | learned]
    best_epoch = any(row.setting and row.setting.get("epoch") == "best" for row in rows)
    judged = any(row.val_accuracy is not None for row in rows)
    lost = any(row.setting is None for row in rows)
    if not (lost or learned or (judged and (names or best_epoch))):
        return None
    cells = [
        [
            str(row.shots),
            str(row.seed),
            *(value_words(row, name) for name in names),
            *([str(row.epoch or NOTHING)] * best_epoch),
            _percent(row.val_accuracy),
            _percent(row.test_accuracy),
            _flatness(row),
        ]
        for row in rows
    ]
    return Table(
        [
            *("shots", "seed", *(method.flag(name).replace("_", " ") for name in names)),
            *(["epoch"] * best_epoch + ["validation %", "test %", "not told apart"]),
        ],
        cells,
        f"chosen settings of {entry.label}{f' at {shots_words(shots)}' if shots else ''}",
    )


def _percent(accuracy: float | None) -> str:
    return NOTHING if accuracy is None else f"{100 * accuracy:.2f}"


def _flatness(row: TaskResult) -> str:
    """How many of the settings trained as long validation cannot tell from the chosen one."""
    if row.val_accuracy is None:
        return row.note or NOTHING
    diverged = f", {row.diverged} diverged" if row.diverged else ""
    return f"{row.indistinguishable} of {row.compared}{diverged}"


def value_words(row: TaskResult, name: str) -> str:
    """A chosen value; of one that was learned its mean, and its deviation where it varies."""
    value = (row.setting or {}).get(name)
    if value is None:
        return NOTHING
    if name in row.learned:
        spread = row.learned[name]
        varies = f" ± {spread.std:.3f}" if spread.std else ""
        return f"{value} {spread.mean:.3f}{varies}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
