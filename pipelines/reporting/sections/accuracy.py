"""Accuracy against the number of shots, and against the factor of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.fitting.plan import METHOD
from clip_adapter.pipelines.reporting.accuracies import (
    Ablation,
    Accuracies,
    Line,
    number_of,
    value_of,
)
from clip_adapter.pipelines.reporting.entries import Entry, in_order
from clip_adapter.pipelines.reporting.figures import (
    Picture,
    Section,
    drawing,
    label,
    series,
)
from clip_adapter.pipelines.reporting.published import Published
from clip_adapter.pipelines.reporting.table import Table

DRAWN = ("test_accuracy", "new_accuracy")
BESIDE = 0.07  # how far the marks of neighbouring series stand apart, in steps of the axis
LONGEST_ROW = 44  # letters that have room below the axis
MARKS: dict[str, Any] = {"capsize": 2, "markersize": 4.5, "elinewidth": 1}
PLACED = "Marks of one {} stand beside each other so that they can be told apart."


def accuracy_section(table: Accuracies, known: Published | None) -> Section:
    """The table of accuracies, drawn, with published figures where there are some."""
    lines = [line for line in table.lines if any(map(line.spread, table.shots))]
    if not lines:
        return Section("Accuracy against shots", ["There is no test accuracy to draw."])
    if known is None or all(line.kind for line in lines):  # published figures are of all classes
        return Section("Accuracy against shots", [], [_drawn(table, lines, {})])
    drawn = _drawn(table, lines, known.accuracies)
    text = (
        "Open marks are published figures. What they were selected on is not what these runs "
        f"were selected on, so that a gap of some tenths says little. Source: {known.source}."
    )
    published = Table(
        ["published", *map(str, next(iter(known.accuracies.values()))), "selected on"],
        [
            [name, *(f"{x:.2f}" for x in own.values()), known.selection[name]]
            for name, own in known.accuracies.items()
        ],
        "published test accuracy (%) by the number of shots",
    )
    return Section("Accuracy against shots", [text], [drawn], [published])


def _drawn(
    table: Accuracies, lines: Sequence[Line], published: Mapping[str, Mapping[int, float]]
) -> Picture:
    first = [line for line in lines if line.measure in DRAWN]
    of = " or ".join(dict.fromkeys(line.kind or "all" for line in first))
    what = "test accuracy (%)" if of == "all" else f"accuracy on {of} classes (%)"
    if len(table.shots) == 1 and not published:
        return _sorted_dots(table, first, what)
    shots = in_order({*table.shots, *(n for own in published.values() for n in own)})
    with drawing((4.2, 3.4)) as (figure, axes):
        looks: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(first):
            look = series(number)
            looks.setdefault(line.entry.method.name, look)
            spreads = {n: spread for n in table.shots if (spread := line.spread(n))}
            axes.errorbar(
                [shots.index(n) + _shift(number, len(first)) for n in spreads],
                [100 * spread.mean for spread in spreads.values()],
                [100 * line.margin(n) for n in spreads],
                label=label(line.heading),
                **MARKS,
                **look,
            )
        for name, own in published.items():
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
        axes.set_ylabel(what)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return Picture(
        "accuracy",
        f"{table.title}, against the number of shots. {PLACED.format('number of shots')}",
        f"Line chart of test accuracy against shots per class: {_ends(first, table.shots)}.",
        figure,
        table.table,
    )


def _sorted_dots(table: Accuracies, lines: Sequence[Line], what: str) -> Picture:
    """At one number of shots: a row for each line, the best on top, with its interval."""
    (shots,) = table.shots
    means = {line: spread.mean for line in lines if (spread := line.spread(shots))}
    ranked = sorted(means, key=means.__getitem__)
    with drawing((4.4, 1.0 + 0.24 * len(ranked))) as (figure, axes):
        for place, line in enumerate(ranked):
            look = series(0 if line.entry.asked else 1)
            margin = 100 * line.margin(shots)
            axes.errorbar(
                100 * means[line],
                place,
                xerr=margin,
                **MARKS,
                **look,
            )
        axes.set_yticks(range(len(ranked)), [label(line.heading) for line in ranked])
        axes.set_xlabel(what)
        axes.grid(axis="y", visible=False)
    return Picture(
        "accuracy",
        f"{table.title}, at {shots_words(shots)}, best on top. Squares are baselines.",
        f"Dot chart of test accuracy at {shots_words(shots)}: {_ends(ranked[::-1], [shots])}.",
        figure,
        table.table,
    )


def _shift(number: int, count: int) -> float:
    """How far from its place on the axis a series of so many stands."""
    return BESIDE * (number - (count - 1) / 2) / max(1, count / 4)


def _ends(lines: Sequence[Line], shots: Sequence[Shots]) -> str:
    words = []
    for line in lines:
        means = [
            f"{100 * s.mean:.1f} % at {shots_words(n)}" for n in shots if (s := line.spread(n))
        ]
        if means:
            words.append(f"{line.heading} {' and '.join(dict.fromkeys((means[0], means[-1])))}")
    return "; ".join(words)


def ablation_section(ablation: Ablation) -> Section:
    """Test accuracy at every value of a factor, which chooses nothing."""
    factor = ablation.factor
    rest = {
        "at its default" if entry.first.plan.select == "none" else "selected on validation"
        for entry in ablation.entries
    }
    of = "with each method" if factor == METHOD else f"at every value of {factor}"
    text = (
        f"An analysis: test accuracy is seen {of}, everything else was "
        f"{' or '.join(sorted(rest))}. It chooses nothing: no setting and no adapter of this page "
        "was taken because of these numbers. Values stand evenly spaced."
    )
    return Section(f"Ablation of {factor}", [text], [_drawn_ablation(ablation)])


def _drawn_ablation(ablation: Ablation) -> Picture:
    values = sorted(
        dict.fromkeys(map(value_of, ablation.entries)),
        key=lambda value: (number_of(value) is None, number_of(value) or 0.0),
    )
    groups: dict[str, list[Entry]] = {}
    for entry in ablation.entries:
        groups.setdefault("" if ablation.factor == METHOD else entry.label, []).append(entry)
    drawn = [(name, shots) for name in groups for shots in ablation.shots]
    with drawing((4.2, 3.4)) as (figure, axes):
        for number, (name, shots) in enumerate(drawn):
            shift, look = _shift(number, len(drawn)), series(number)
            words = shots_words(shots)
            title = label(f"{name}, {words}") if len(groups) > 1 else words
            tested = [entry for entry in groups[name] if shots in entry.tested]
            numbers = [entry for entry in tested if number_of(value_of(entry)) is not None]
            # Between words there is nothing that a line could stand for.
            for own, style in (
                (numbers, look["linestyle"]),
                ([entry for entry in tested if entry not in numbers], "none"),
            ):
                if not own:
                    continue
                rows = [Line(entry, "test_accuracy", "") for entry in own]
                axes.errorbar(
                    [values.index(value_of(entry)) + shift for entry in own],
                    [100 * spread.mean for row in rows if (spread := row.spread(shots))],
                    [100 * row.margin(shots) for row in rows],
                    label=title,
                    **MARKS,
                    **look | {"linestyle": style},
                )
                title = "_"  # one entry of the legend for both
        names = [label(value) for value in values]
        axes.set_xticks(range(len(values)), names)
        if max(map(len, names)) * len(names) > LONGEST_ROW:
            for tick in axes.get_xticklabels():
                tick.set(rotation=35, ha="right", rotation_mode="anchor")
        axes.set_xlabel(ablation.factor.replace("_", " "))
        axes.set_ylabel(ablation.accuracy)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2 if len(groups) > 1 else 3, fontsize=8)
    return Picture(
        f"ablation-{ablation.factor}",
        f"{ablation.table.caption}. {PLACED.format('value')}",
        f"Line chart of {ablation.accuracy} against {ablation.factor}. {_highest(ablation)}.",
        figure,
        ablation.table,
    )


def _highest(ablation: Ablation) -> str:
    words = []
    for shots in ablation.shots:
        means = {
            entry.summary[shots].test_accuracy.mean: entry  # type: ignore[union-attr]
            for entry in reversed(ablation.entries)
            if shots in entry.tested
        }
        if means:
            name = ablation.heading(means[max(means)])
            words.append(f"highest at {shots_words(shots)}: {name}, {100 * max(means):.1f} %")
    return "; ".join(words)
