"""What `fit` prints: the answer first, then what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clip_adapter.cache.few_shot import VALIDATION_SHOTS
from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.fitting.kept import what_is_kept
from clip_adapter.pipelines.reporting.accuracies import ablations, accuracies
from clip_adapter.pipelines.reporting.beside_the_mean import (
    beside_guessing,
    beside_the_mean,
    chosen_settings,
)
from clip_adapter.pipelines.reporting.entries import pool
from clip_adapter.pipelines.reporting.runs import Run
from clip_adapter.pipelines.reporting.table import terminal_width
from clip_adapter.words import counted, printable, some

if TYPE_CHECKING:
    from clip_adapter.pipelines.fitting.plan import Plan
    from clip_adapter.pipelines.fitting.run import FitResult
    from clip_adapter.pipelines.fitting.tasks import TaskRows


def print_run(result: FitResult, *, verbose: bool = False) -> None:
    """Print the methods, best first, and what their numbers rest on; with `verbose` what else the
    report has to say."""
    plan, about = result.plan, result.provenance
    run = Run(result.run, plan, about, {}, [*result.results, *result.ablations])
    entries = pool([run])
    counting = [entry for entry in entries if not entry.held]
    table, width = accuracies([run], counting), terminal_width()
    print(table.answer(width), end="")
    whole = not result.problem  # else what was predicted may not have been written
    lines = beside_guessing(counting) if whole else []
    lines += [
        f"{row.method} at {shots_words(row.shots)}, seed {row.seed}: {row.note}"
        for row in result.results
        if row.note
    ]
    if verbose and whole:
        lines += beside_the_mean(counting)
    lines += [*table.about, *_sizes(result.tasks, about.class_names, plan)]
    print(*map(printable, lines), sep="\n")
    settings = [chosen_settings(entry) for entry in counting if entry.asked] if verbose else []
    for shown in [*settings, *(ablation.table for ablation in ablations(entries))]:
        if shown:
            print(f"\n{shown.text(width)}", end="")
    if verbose:
        print(counted(result.compilations, "program"), "compiled or loaded")
    if result.kept or whole:
        print(*map(printable, what_is_kept(result)), sep="\n")
    if not verbose:
        print("--verbose prints the settings that were chosen and the classes that do worst")


def _sizes(tasks: Sequence[TaskRows], class_names: Sequence[str], plan: Plan) -> list[str]:
    """A sentence per number of shots for classes that had too few images, or none."""
    how = "drawn with repetition" if plan.repeat else "each is taken once"
    how = "as --tasks names them" if plan.tasks else how
    counts: dict[tuple[str, Shots], int] = {}
    absent: dict[str, set[int]] = {}
    for rows in tasks:
        for split, labels in (
            ("training", rows.absent_classes),
            ("validation", rows.absent_validation_classes),
        ):
            absent.setdefault(split, set()).update(labels)
        counts["training", rows.shots] = len(rows.small_classes)
        fewest = min(rows.shots, VALIDATION_SHOTS) if isinstance(rows.shots, int) else 0
        counts["validation", fewest] = len(rows.small_validation_classes)
    return [
        *(
            f"{counted(count, 'class has', 'classes have')} fewer than {shots} {split} images: "
            f"{how}"
            for (split, shots), count in counts.items()
            if count
        ),
        *(
            f"{counted(len(labels), 'class', 'classes')} without a {split} image: "
            f"{some([class_names[label] for label in sorted(labels)])}"
            for split, labels in absent.items()
            if labels
        ),
    ]
