"""What `fit` prints: results by number of shots, what was chosen, and how it was judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clip_adapter.cache.few_shot import VALIDATION_SHOTS
from clip_adapter.pipelines.fitting.config import Selection, Shots, shots_words
from clip_adapter.pipelines.fitting.plan import Plan, PlannedMethod
from clip_adapter.pipelines.fitting.remarks import remarks, what_is_kept
from clip_adapter.pipelines.fitting.results import MethodSummary, TaskResult, summarise
from clip_adapter.words import counted, printable, some

if TYPE_CHECKING:
    from clip_adapter.pipelines.fitting.ablation_rows import AblationRow
    from clip_adapter.pipelines.fitting.run import FitResult
    from clip_adapter.pipelines.fitting.tasks import TaskRows

SELECTION_WORDS: dict[Selection, str] = {
    "few-shot-val": "min(shots, 4) validation images per class",
    "full-val": "the whole validation split",
    "cv": "cross-validation on the support set",
    "none": "nothing (defaults)",
}
# What there is to report of a method, by the classes it was fitted on.
KINDS = {
    "all": {"test_accuracy": ""},
    "base": {"test_accuracy": " base", "new_accuracy": " new", "harmonic_mean": " H"},
}
# What stands beside the accuracy on all classes where it says something else, and what it is.
BESIDE = {
    "balanced_accuracy": (" balanced", "mean recall over the classes"),
    "worst_tenth": (" worst tenth", "mean of the lowest tenth over seeds"),
}


def kinds(train_classes: str, rows: Iterable[MethodSummary]) -> dict[str, str]:
    """Measure → words behind a method's name, of what these rows of one table have to report.

    Balanced accuracy is left out where all classes have as many test images: it is the accuracy.
    """
    rows = list(rows)
    said = {name for name in BESIDE if any(getattr(row, name) for row in rows)}
    if not any(row.uneven for row in rows):
        said.discard("balanced_accuracy")
    beside = {name: words for name, (words, _) in BESIDE.items() if name in said}
    return KINDS[train_classes] | (beside if train_classes == "all" else {})


def meanings(measures: Iterable[str]) -> str:
    """What those beside the accuracy are, for the end of a table's title."""
    found = (BESIDE[name] for name in measures if name in BESIDE)
    return "".join(f";{words}: {meaning}" for words, meaning in found)


def print_run(result: FitResult) -> None:
    """Print the whole report of a run on standard output."""
    plan = result.plan
    console = Console(width=110, highlight=False, soft_wrap=True, markup=False)
    for line in result.about:
        console.print(printable(line))
    judged = judged_by(plan.select, plan.shots, result.results)
    if plan.score == "balanced-accuracy" and plan.select != "none":
        judged += ", where every class counts alike (val % is balanced accuracy)"
    console.print(f"selected on {judged}; test computed for the selected setting only")
    for line in _sizes(result.tasks, result.class_names, repeat=plan.repeat):
        console.print(line)
    console.print(_accuracy_table(plan, result.summary))
    if not result.problem:  # else what was predicted may not have been written
        own = (result.run, plan, result.results, result.summary, result.class_names)
        for line in remarks(*own):
            console.print(line)
    for planned in plan.fitted:
        rows = [row for row in result.results if row.method == planned.method.name]
        if any(row.setting is None or row.setting for row in rows):
            console.print(_choice_table(planned, rows))
    for factor in plan.ablate:
        console.print(_ablation_table(plan, factor, result.ablations))
    programs = result.compilations
    console.print(f"{programs} program{'s' * (programs != 1)} compiled or loaded")
    if result.kept or not result.problem:
        console.print()
        for line in what_is_kept(plan, result.run, result.tasks, result.results, result.kept):
            console.print(printable(line))


def judged_by(select: str, shots: Sequence[Shots], results: Sequence[TaskResult]) -> str:
    """What chose the settings, in words."""
    words = SELECTION_WORDS[select]  # type: ignore[index]
    if select == "few-shot-val" and "all" in shots:
        whole = SELECTION_WORDS["full-val"]
        words = f"{words} (at `all` shots: {whole})" if len(shots) > 1 else whole
    unjudged = dict.fromkeys(
        shots_words(row.shots)
        for row in results
        if row.setting is not None and row.val_accuracy is None
    )
    if select == "cv" and unjudged:
        numbers = ", ".join(unjudged)
        words += f" (at {numbers} a class has one image: nothing, the defaults)"
    return words


def _accuracy_table(plan: Plan, summary: Sequence[MethodSummary]) -> Table:
    """Test accuracy: a row for each number of shots, a column for each method; or, where that
    would be too wide, the other way round."""
    seeds = ", ".join(map(str, plan.seeds))
    over = (
        f"mean ± standard deviation over seeds {seeds}"
        if len(plan.seeds) > 1
        else f"± standard error of the test images, seed {seeds}"
    )
    shown = kinds(plan.train_classes, summary)
    columns = [
        (
            method + words,
            {row.shots: accuracy(row, kind) for row in summary if row.method == method},
        )
        for method in dict.fromkeys(row.method for row in summary)
        for kind, words in shown.items()
    ]
    table = Table(title=f"test accuracy (%), {over}{meanings(shown)}", box=SIMPLE_HEAD)
    if sum(max(len(name), 14) for name, _ in columns) <= 80:
        table.add_column("shots", justify="right")
        for name, _ in columns:
            table.add_column(name, justify="right")
        for shots in plan.shots:
            table.add_row(str(shots), *(cells.get(shots, "–") for _, cells in columns))
        return table
    table.add_column("shots")
    for shots in plan.shots:
        table.add_column(str(shots), justify="right")
    for name, cells in columns:
        table.add_row(name, *(cells.get(shots, "–") for shots in plan.shots))
    return table


def _choice_table(planned: PlannedMethod, rows: Sequence[TaskResult]) -> Table:
    """What validation chose, task by task, and how flat the optimum is.

    Hyper-parameters of which several values were tried, and those that were learned.
    """
    method = planned.method
    tried = [n for n, values in planned.values.items() if len(values) > 1]
    learned = [n for n in method.hyper if any(n in row.learned for row in rows)]
    names = [n for n in method.hyper if n in {*tried, *learned}]
    best_epoch = any(row.setting and row.setting.get("epoch") == "best" for row in rows)
    table = Table(title=f"chosen settings of {method.name}", box=SIMPLE_HEAD)
    for heading in ("shots", "seed", *map(method.flag, names)):
        table.add_column(heading, justify="right")
    for heading in ["epoch"] * best_epoch + ["val %", "not told apart"]:
        table.add_column(heading, justify="right")
    for row in rows:
        values = [value_words(row, name) for name in names]
        epoch = [str(row.epoch or "–")] * best_epoch
        judged = "–" if row.val_accuracy is None else f"{100 * row.val_accuracy:.2f}"
        table.add_row(str(row.shots), str(row.seed), *values, *epoch, judged, _flatness(row))
    return table


def _ablation_table(plan: Plan, factor: str, ablations: Sequence[AblationRow]) -> Table:
    """Test accuracy at every value of a factor: a row for each method and value."""
    rows = [row for row in ablations if row.factor == factor]
    title = (
        f"ablation of {factor}: test accuracy (%), everything else selected on validation; "
        "an analysis, which chooses nothing"
    )
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column(factor)
    for shots in plan.shots:
        table.add_column(shots_words(shots), justify="right")
    several = len({row.result.method for row in rows}) > 1
    for method, value in dict.fromkeys((row.result.method, row.value) for row in rows):
        own = [row.result for row in rows if (row.result.method, row.value) == (method, value)]
        cells = {row.shots: accuracy(row, "test_accuracy") for row in summarise(own)}
        name = f"{method} {value}" if several and value != method else str(value)
        table.add_row(name, *(cells.get(shots, "–") for shots in plan.shots))
    return table


def _flatness(row: TaskResult) -> str:
    """How many of the settings trained as long validation cannot tell from the chosen one."""
    if row.val_accuracy is None:
        return row.note or "nothing to choose"
    diverged = f", {row.diverged} diverged" if row.diverged else ""
    return f"{row.indistinguishable} of {row.compared}{diverged}"


def value_words(row: TaskResult, name: str) -> str:
    """A chosen value; of one that was learned its mean, and its deviation where it varies."""
    value = (row.setting or {}).get(name)
    if value is None:
        return "–"
    if name in row.learned:
        spread = row.learned[name]
        varies = f" ± {spread.std:.3f}" if spread.std else ""
        return f"{value} {spread.mean:.3f}{varies}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def margin(row: MethodSummary, kind: str) -> float | None:
    """The standard deviation over seeds; of a single seed, which has none, the standard error
    √(p (1 − p) / n) of an accuracy p on n test images."""
    spread = getattr(row, kind)
    if spread is None or spread.std is not None or kind != "test_accuracy" or not row.test_images:
        return spread.std if spread else None
    return math.sqrt(spread.mean * (1 - spread.mean) / row.test_images)


def accuracy(row: MethodSummary, kind: str) -> str:
    """Mean and `margin`, in %."""
    spread = getattr(row, kind)
    if spread is None:
        return "–"
    error = margin(row, kind)
    words = "" if error is None else f" ± {100 * error:.2f}"
    lost = f" ({row.diverged} of {row.seeds} seeds diverged)" if row.diverged else ""
    return f"{100 * spread.mean:.2f}{words}{lost}"


def _sizes(tasks: Sequence[TaskRows], class_names: Sequence[str], *, repeat: bool) -> list[str]:
    """A sentence per number of shots for classes that had too few images, or none."""
    how = "drawn with repetition" if repeat else "each is taken once"
    counts: dict[tuple[str, Shots], int] = {}
    absent: tuple[int, ...] = ()
    for rows in tasks:
        absent = rows.absent_classes
        counts["training", rows.shots] = len(rows.small_classes)
        fewest = min(rows.shots, VALIDATION_SHOTS) if isinstance(rows.shots, int) else 0
        counts["validation", fewest] = len(rows.small_validation_classes)
    lines = [
        f"{counted(count, 'class has', 'classes have')} fewer than {shots} {split} images: {how}"
        for (split, shots), count in counts.items()
        if count
    ]
    if absent:
        names = some([class_names[label] for label in absent])
        lines.append(
            f"{counted(len(absent), 'class', 'classes')} without a training image: {names}"
        )
    return lines
