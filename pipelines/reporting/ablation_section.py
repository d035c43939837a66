"""Test accuracy at every value of a factor, which chooses nothing."""

from __future__ import annotations

from collections.abc import Sequence

from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.fitting.plan import METHOD
from clip_adapter.pipelines.fitting.results import Spread
from clip_adapter.pipelines.fitting.tables import margin
from clip_adapter.pipelines.reporting.ablations import MEASURE, Ablation, Series, number_of
from clip_adapter.pipelines.reporting.accuracy_section import beside
from clip_adapter.pipelines.reporting.figures import Picture, drawing, label, picture, series
from clip_adapter.pipelines.reporting.section import Section

LONGEST_ROW = 44  # letters that have room below the axis


def ablation_sections(ablations: Sequence[Ablation]) -> list[Section]:
    """A section for each factor; its pictures are of runs that do not pool."""
    factors = dict.fromkeys(ablation.factor for ablation in ablations)
    return [_section([a for a in ablations if a.factor == factor]) for factor in factors]


def _section(parts: Sequence[Ablation]) -> Section:
    factor = parts[0].factor
    rest = {
        "at its default" if part.first.plan.select == "none" else "selected on validation"
        for part in parts
    }
    of = "with each method" if factor == METHOD else f"at every value of {factor}"
    text = [
        f"An analysis: test accuracy is seen {of}, everything else was "
        f"{' or '.join(sorted(rest))}. It chooses nothing: no setting and no adapter of this page "
        "was taken because of these numbers. Values stand evenly spaced."
    ]
    if len(parts) > 1:
        text.append("Runs that differ in more than seeds and shots have a picture each.")
    pictures = [_drawn(part, f"ablation-{factor}-{n}") for n, part in enumerate(parts)]
    return Section(f"Ablation of {factor}", text, pictures)


def _drawn(ablation: Ablation, name: str) -> Picture:
    values = _in_order(ablation.series)
    methods = dict.fromkeys(one.method for one in ablation.series) if ablation.several else [""]
    lines = [(method, shots) for method in methods for shots in ablation.shots]
    with drawing((4.2, 3.4)) as (figure, axes):
        for number, (method, shots) in enumerate(lines):
            own = [s for s in ablation.series if method in ("", s.method)]
            shift = beside(number, len(lines))
            look = series(number)
            words = shots_words(shots)
            title = label(f"{method}, {words}") if method else words
            numbers = [s for s in own if number_of(s.value) is not None]
            # Between words there is nothing that a line could stand for.
            for points, line in (
                (numbers, look["linestyle"]),
                ([s for s in own if s not in numbers], "none"),
            ):
                found = [(s, spread) for s in points if (spread := _spread(s, shots))]
                if not found:
                    continue
                axes.errorbar(
                    [values.index(s.value) + shift for s, _ in found],
                    [100 * spread.mean for _, spread in found],
                    [100 * (margin(s.cells[shots], MEASURE) or 0) for s, _ in found],
                    label=title,
                    capsize=2,
                    markersize=4.5,
                    elinewidth=1,
                    color=look["color"],
                    marker=look["marker"],
                    linestyle=line,
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
            figure.legend(loc="outside lower center", ncols=3 if methods == [""] else 2, fontsize=8)
        numbers_of = ablation.numbers
        return picture(
            name,
            f"{numbers_of.caption}. Marks of one value stand beside each other so that they can "
            "be told apart.",
            f"Line chart of {ablation.accuracy} against {ablation.name}. {_alt(ablation)}",
            figure,
            numbers_of,
        )


def _spread(one: Series, shots: Shots) -> Spread | None:
    row = one.cells.get(shots)
    return row.test_accuracy if row else None


def _in_order(found: Sequence[Series]) -> list[str]:
    """The values of all methods: numbers by size, then words as they come."""
    values = dict.fromkeys(one.value for one in found)
    return sorted(values, key=lambda v: (number_of(v) is None, number_of(v) or 0.0))


def _alt(ablation: Ablation) -> str:
    told = []
    for shots in ablation.shots:
        means = [(spread.mean, s) for s in ablation.series if (spread := _spread(s, shots))]
        if means:
            best, where = max(means, key=lambda pair: pair[0])
            name = f"{where.method} {where.value}" if ablation.several else where.value
            told.append(f"highest at {shots_words(shots)}: {name}, {100 * best:.1f} %")
    return f"{'; '.join(told)}."
