"""The tables of a report, as text, Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from textwrap import wrap
from typing import Any

from clip_adapter.pipelines.reporting.accuracies import Ablation, Accuracies, Line
from clip_adapter.pipelines.reporting.sections.pairs import Pairs
from clip_adapter.pipelines.reporting.table import Table, markdown, terminal_width
from clip_adapter.words import printable


def printed(
    form: str, table: Accuracies, ablations: Sequence[Ablation], pairs: Sequence[Pairs]
) -> str:
    """form: `text`, `md`, `tex` or `csv`, which has every number at full length."""
    if form == "csv":
        return _numbers(table, ablations, pairs).csv()
    further = [*(one.table for one in ablations), *(one.table for one in pairs)]
    if form == "md":
        about = "".join(f"{markdown(line)}  \n" for line in table.about)
        return "\n".join([about, *(each.markdown() for each in (table.table, *further))])
    if form == "tex":
        caption = "; ".join([table.title, "columns are shots per class", *table.about])
        first = replace(table.table, caption=caption)
        drawn = (each.latex() for each in (first, *further))
        return "% needs \\usepackage{booktabs}\n" + "\n".join(drawn)
    width = terminal_width()
    about = "".join(
        f"{line}\n"
        for words in table.about
        for line in wrap(printable(words), width, subsequent_indent="  ")
    )
    return table.answer(width) + about + "".join(f"\n{each.text(width)}" for each in further)


def _numbers(table: Accuracies, ablations: Sequence[Ablation], pairs: Sequence[Pairs]) -> Table:
    """A row for each entry, kind and number of shots, with accuracies in [0, 1]; `factor` and
    `value` are those of an ablation, and empty in the rows of the table of accuracies. In rows of
    the factor `against` the value is another entry, and the mean is the difference from it."""
    lines = list(table.lines)
    for ablation in ablations:
        kind = ablation.kind
        lines += [Line(entry, "test_accuracy", kind) for entry in ablation.entries]
    rows: list[list[Any]] = []
    for line in lines:
        entry = line.entry
        held = [cell for factor in entry.held.items() for cell in factor]
        for shots, row in entry.summary.items():
            spread = line.spread(shots)
            means = (spread.mean, spread.std) if spread else (None, None)
            numbers = shots, " ".join(map(str, entry.seeds(shots))), row.diverged, *means
            rows.append([entry.label, line.kind or "all", *numbers, row.test_images, *held])
    for at in pairs:
        for one, p in zip(at.differences, at.corrected, strict=True):
            seeds, mean = " ".join(map(str, one.seeds)), float(one.gained.mean())
            numbers = at.shots, seeds, None, mean, None, one.gained.shape[1]
            start = [one.one.label, one.one.train_classes, *numbers]
            rows.append([*start, "against", one.other.label, one.p, p])
    head = ("entry", "kind", "shots", "seeds", "diverged", "mean", "std", "test_images")
    filled = [row + [None] * (12 - len(row)) for row in rows]
    return Table([*head, "factor", "value", "p", "p_holm"], filled)
