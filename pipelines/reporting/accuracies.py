"""Test accuracies as tables: of entries, and of the values of an ablation's factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap

from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.fitting.plan import METHOD
from clip_adapter.pipelines.fitting.results import MethodSummary, Spread
from clip_adapter.pipelines.fitting.tasks import judged_by
from clip_adapter.pipelines.reporting.entries import Entry, in_order
from clip_adapter.pipelines.reporting.runs import Run
from clip_adapter.pipelines.reporting.table import NOTHING, Table

# What there is to report of a method, by the classes it was fitted on; the last one ranks.
KINDS = {
    "all": {"test_accuracy": ""},
    "base": {"test_accuracy": "base", "new_accuracy": "new", "harmonic_mean": "H"},
}
# What stands beside the accuracy on all classes where it says something else, and what it is.
BESIDE = {
    "balanced_accuracy": ("balanced", "mean recall over the classes"),
    "worst_tenth": ("worst tenth", "mean of the lowest tenth over seeds"),
}


def kinds(train_classes: str, rows: Iterable[MethodSummary]) -> dict[str, str]:
    """Measure → its words, of what these rows of one table have to report.

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
    beside = (BESIDE[name] for name in measures if name in BESIDE)
    return "".join(f"; {words}: {meaning}" for words, meaning in beside)


def margin(row: MethodSummary, measure: str) -> float | None:
    """The standard deviation over seeds; of a single seed, which has none, the standard error
    √(p (1 − p) / n) of an accuracy p on n test images."""
    spread = getattr(row, measure)
    if spread is None or spread.std is not None or measure != "test_accuracy":
        return spread.std if spread else None
    return math.sqrt(spread.mean * (1 - spread.mean) / row.test_images) if row.test_images else None


def accuracy(row: MethodSummary | None, measure: str) -> str:
    """Mean and `margin`, in %: `92.96 ± 0.50`, or a dash where there is no number."""
    spread = getattr(row, measure) if row else None
    if row is None or spread is None:
        return NOTHING
    error = margin(row, measure)
    words = "" if error is None else f" ± {100 * error:.2f}"
    lost = f" ({row.diverged} of {row.seeds} seeds diverged)" if row.diverged else ""
    return f"{100 * spread.mean:.2f}{words}{lost}"


def over(entries: Sequence[Entry]) -> str:
    """What the numbers behind ± are."""
    counts = {row.seeds for entry in entries for row in entry.summary.values()}
    if counts <= {1}:
        return "± standard error of the test images, one seed"
    words = "mean ± standard deviation over seeds"
    return (
        words if 1 not in counts else f"{words} (of one seed ± standard error of the test images)"
    )


@dataclass(frozen=True)
class Line:
    """What an entry reached by one measure, a field of MethodSummary. kind: its words, "" for the
    accuracy on all classes."""

    entry: Entry
    measure: str
    kind: str

    @property
    def heading(self) -> str:
        return f"{self.entry.label} {self.kind}".rstrip()

    def spread(self, shots: Shots) -> Spread | None:
        row = self.entry.summary.get(shots)
        return getattr(row, self.measure) if row else None

    def margin(self, shots: Shots) -> float:
        return margin(self.entry.summary[shots], self.measure) or 0.0

    def cell(self, shots: Shots) -> str:
        return accuracy(self.entry.summary.get(shots), self.measure)


@dataclass(frozen=True)
class Accuracies:
    """dataset: its name. title: what the numbers are. about: what they rest on, a sentence each."""

    dataset: str
    title: str
    about: Sequence[str]
    shots: Sequence[Shots]
    lines: Sequence[Line]

    @property
    def table(self) -> Table:
        """A row for each entry and measure, a column for each number of shots."""
        return Table(
            ["method", *map(shots_words, self.shots)],
            [[line.heading, *map(line.cell, self.shots)] for line in self.lines],
            self.title,
            label=f"{self.dataset} accuracy",
            kinds=[line.kind for line in self.lines],
        )

    def answer(self, width: int) -> str:
        """The table as text, best first at the most shots, with what its marks mean."""
        last = self.shots[-1]
        ranks = {line.entry.label: self._rank(line) for line in self.lines if self._ranks(line)}
        best = max(ranks.values())
        unshown = {line.entry.label for line in self.lines if missing_seeds(line.entry, last)}
        rows = []
        for line in sorted(self.lines, key=lambda line: -ranks[line.entry.label]):
            label = line.entry.label
            wins = self._ranks(line) and ranks[label] == best > -math.inf and len(ranks) > 1
            mark = " *" * wins + " †" * (self._ranks(line) and label in unshown)
            rows.append([line.heading + mark, *map(line.cell, self.shots)])
        at = shots_words(last)
        legend = [f"* the best at {at}"] if any(" *" in row[0] for row in rows) else []
        if unshown:
            several = any(len(line.entry.results(last)) > 1 for line in self.lines)
            where = "† at one seed or more" if several else "†"
            legend.append(f"{where} validation does not show it to outdo zero-shot at {at}")
        table = Table(["method", *map(shots_words, self.shots)], rows, self.title)
        marks = wrap("; ".join(legend), width)
        return table.text(width) + "".join(f"{line}\n" for line in marks)

    def _ranks(self, line: Line) -> bool:
        return line.measure == [*KINDS[line.entry.train_classes]][-1]

    def _rank(self, line: Line) -> float:
        spread = line.spread(self.shots[-1])
        return round(spread.mean, 4) if spread else -math.inf


def accuracies(runs: Sequence[Run], entries: Sequence[Entry]) -> Accuracies:
    """The table of these entries, which come from these runs on one cache."""
    rows = [(entry.train_classes, row) for entry in entries for row in entry.summary.values()]
    shown = {
        classes: kinds(classes, (row for own, row in rows if own == classes))
        for classes in dict(rows)
    }
    lines = [
        Line(entry, measure, words)
        for entry in entries
        for measure, words in shown[entry.train_classes].items()
    ]
    about = [*runs[0].provenance.lines(), *_seeds(entries), *_judged(entries)]
    refining = dict.fromkeys(run.plan.unlabelled for run in runs if run.plan.unlabelled)
    about += [
        f"images without labels ({some}) refine what is chosen where labelled ones do not say that "
        "it is worse; none of them is tested"
        for some in refining
    ]
    title = f"test accuracy (%), {over(entries)}{meanings(shown.get('all', ()))}"
    shots = in_order({row.shots for _, row in rows})
    return Accuracies(str(runs[0].provenance.dataset["name"]), title, about, shots, lines)


def _seeds(entries: Sequence[Entry]) -> list[str]:
    """The seeds, once where all numbers have the same ones, else for each entry."""
    stated = {
        entry.label: tuple(dict.fromkeys(entry.seeds(shots) for shots in entry.summary))
        for entry in entries
    }
    if len(set(stated.values())) == 1 and all(len(some) == 1 for some in stated.values()):
        (seeds,) = next(iter(stated.values()))
        return [f"seeds {_listed(seeds)}"]
    lines = []
    for entry in entries:
        if len(stated[entry.label]) == 1:
            lines.append(f"{entry.label}: seeds {_listed(stated[entry.label][0])}")
        else:
            by_shots = (f"{_listed(entry.seeds(n))} at {n}" for n in entry.summary)
            lines.append(f"{entry.label}: seeds {'; '.join(by_shots)} shots")
    return lines


def _judged(entries: Sequence[Entry]) -> list[str]:
    """What settings were selected on, once where that is alike for all that have some."""
    stated = {
        entry.label: judged_by(entry.first.plan, entry.results(), asked=entry.asked)
        for entry in entries
        if entry.method.hyper
    }
    if len(set(stated.values())) == 1:
        only = "test computed for the selected setting only"
        return [f"selected on {next(iter(stated.values()))}; {only}"]
    return [f"{label}: selected on {words}" for label, words in stated.items()]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


@dataclass(frozen=True)
class Ablation:
    """A factor in runs on one cache. entries: method by method, numbers by size, then words."""

    factor: str
    dataset: str
    entries: Sequence[Entry]

    def heading(self, entry: Entry) -> str:
        """The value, behind its entry's label where several have values."""
        if self.factor == METHOD:
            return entry.label
        value = value_of(entry)
        several = len({one.label for one in self.entries}) > 1
        return f"{entry.label} {value}" if several else value

    @property
    def accuracy(self) -> str:
        """What is measured."""
        return f"test accuracy{f' of the {self.kind} classes' if self.kind else ''} (%)"

    @property
    def kind(self) -> str:
        """The classes whose accuracy it is: `base`, or "" for all."""
        kinds = {KINDS[entry.train_classes]["test_accuracy"] for entry in self.entries}
        return " or ".join(kinds - {""})

    @property
    def shots(self) -> list[Shots]:
        return in_order({shots for entry in self.entries for shots in entry.summary})

    @property
    def table(self) -> Table:
        """A row for each value, a column for each number of shots."""
        return Table(
            [self.factor, *map(shots_words, self.shots)],
            [
                [
                    self.heading(entry),
                    *(accuracy(entry.summary.get(n), "test_accuracy") for n in self.shots),
                ]
                for entry in self.entries
            ],
            f"ablation of {self.factor}: {self.accuracy}, {over(self.entries)}; an analysis, which "
            "chooses nothing",
            label=f"{self.dataset} {self.factor}",
            kinds=[""] * len(self.entries),
        )


def missing_seeds(entry: Entry, shots: Shots) -> int:
    """At how many seeds validation does not show it to be better than zero-shot."""
    return [row.outdoes_zero_shot for row in entry.results(shots)].count(False)


def ablations(entries: Sequence[Entry]) -> list[Ablation]:
    """Of the entries that hold a factor, one for each."""
    factors = dict.fromkeys(factor for entry in entries for factor in entry.held)
    labels = list(dict.fromkeys(entry.label for entry in entries))

    def place(entry: Entry) -> tuple[int, bool, float]:
        number = number_of(value_of(entry))
        return labels.index(entry.label), number is None, number or 0.0

    return [
        Ablation(
            factor,
            str(entries[0].first.provenance.dataset["name"]),
            sorted((entry for entry in entries if factor in entry.held), key=place),
        )
        for factor in factors
    ]


def value_of(entry: Entry) -> str:
    """At which the factor of an ablation is held."""
    (value,) = entry.held.values()
    return f"{value:g}" if isinstance(value, float) else str(value)


def number_of(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
