"""Accuracy against the number of shots."""

from __future__ import annotations

from collections.abc import Sequence

from clip_adapter.pipelines.fitting.config import shots_words
from clip_adapter.pipelines.fitting.tables import margin
from clip_adapter.pipelines.reporting.accuracies import Accuracies
from clip_adapter.pipelines.reporting.entries import in_order
from clip_adapter.pipelines.reporting.figures import Numbers, drawing, label, picture, series
from clip_adapter.pipelines.reporting.formats import cell
from clip_adapter.pipelines.reporting.published import Published
from clip_adapter.pipelines.reporting.section import Section

DRAWN = ("test_accuracy", "new_accuracy")
BESIDE = 0.07  # how far the marks of neighbouring series stand apart, in steps of the axis


def accuracy_section(table: Accuracies, known: Published | None) -> Section:
    """The table of accuracies, drawn, with published figures where there are some."""
    columns = [c for c in table.columns if any(c.spread(n) for n in table.shots)]
    if not columns:
        return Section("Accuracy against shots", ["There is no test accuracy to draw."])
    if all(column.kind for column in columns):
        known = None  # published figures are of all classes
    shown = {name: own for name, own in (known.accuracies if known else {}).items()}
    shots = in_order({*table.shots, *(n for own in shown.values() for n in own)})
    first = [c for c in columns if c.measure in DRAWN]
    of = " or ".join(dict.fromkeys(c.kind or "all" for c in first))
    with drawing((4.2, 3.4)) as (figure, axes):
        looks: dict[str, dict[str, str]] = {}
        for number, column in enumerate(first):
            there = [n for n in table.shots if column.spread(n)]
            spreads = [spread for n in there if (spread := column.spread(n))]
            look = series(number)
            looks.setdefault(column.label.split(" ")[0], look)
            shift = beside(number, len(first))
            axes.errorbar(
                [shots.index(n) + shift for n in there],
                [100 * spread.mean for spread in spreads],
                [100 * (margin(column.cells[n], column.measure) or 0) for n in there],
                label=label(column.heading),
                capsize=2,
                markersize=4.5,
                elinewidth=1,
                **look,  # type: ignore[arg-type]
            )
        for name, own in shown.items():
            # As the runs' own series of that method; one that was not run looks like none of them.
            look = looks.setdefault(name, series(max(len(looks), len(first))))
            axes.plot(
                [shots.index(n) for n in own],
                list(own.values()),
                label=f"{name}, published",
                linestyle="none",
                marker=look["marker"],
                markerfacecolor="none",
                markersize=8,
                color=look["color"],
            )
        axes.set_xticks(range(len(shots)), [str(n) for n in shots])
        axes.set_xlabel("labelled images per class")
        axes.set_ylabel("test accuracy (%)" if of == "all" else f"accuracy on {of} classes (%)")
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        drawn = picture(
            "accuracy",
            f"{table.title}, against the number of shots. Marks of one number of shots stand "
            "beside each other so that they can be told apart.",
            _alt(first, table.shots),
            figure,
            Numbers(
                ["method", *map(shots_words, table.shots)],
                [[c.heading, *(cell(c, n) for n in table.shots)] for c in columns],
                table.title,
            ),
        )
    text, tables = [], []
    if known:
        text.append(
            "Open marks are published figures. What they were selected on is not what these runs "
            f"were selected on, so that a gap of some tenths says little. Source: {known.source}."
        )
        tables.append(
            Numbers(
                ["published", *(str(n) for n in next(iter(shown.values()))), "selected on"],
                [
                    [name, *(f"{x:.2f}" for x in own.values()), known.selection[name]]
                    for name, own in shown.items()
                ],
                "published test accuracy (%) by the number of shots",
            )
        )
    return Section("Accuracy against shots", text, [drawn], tables)


def beside(number: int, count: int) -> float:
    """How far from its place on the axis a series of so many stands."""
    return BESIDE * (number - (count - 1) / 2) / max(1, count / 4)


def _alt(columns: Sequence, shots: Sequence) -> str:
    told = []
    for column in columns:
        there = [n for n in shots if column.spread(n)]
        if not there:
            continue
        ends = [
            f"{100 * column.spread(n).mean:.1f} % at {shots_words(n)}"
            for n in (there[0], there[-1])
        ]
        told.append(f"{column.heading} {' and '.join(dict.fromkeys(ends))}")
    return f"Line chart of test accuracy against shots per class: {'; '.join(told)}."
