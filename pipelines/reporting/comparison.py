"""Methods over several data sets: averages, ranks and pairwise differences; and what `study` leaves
in its folder of them.

Each data set counts alike, as in the averages of the literature. A method that has no number on one
of them has no average and no rank; two methods are compared where both have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from clip_adapter import files
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.fitting.results import MethodSummary
from clip_adapter.pipelines.fitting.run_folder import writing
from clip_adapter.pipelines.reporting.accuracies import KINDS, kinds, meanings
from clip_adapter.pipelines.reporting.entries import in_order, pool
from clip_adapter.pipelines.reporting.figures import label, series
from clip_adapter.pipelines.reporting.runs import load_runs
from clip_adapter.pipelines.reporting.table import NOTHING, Table
from clip_adapter.words import counted, printable

AVERAGE = "average"
PANEL = (3.2, 2.8)  # inches
LEGEND_MARK, LEGEND_LETTER = 0.7, 0.07  # inches that an entry of the legend takes
TITLES = {
    "test_accuracy": "test accuracy",
    "new_accuracy": "new accuracy",
    "harmonic_mean": "harmonic mean",
}


@dataclass(frozen=True)
class Comparison:
    """title: of measure, an accuracy as a row of results names it. accuracy: (data sets, methods,
    shots), mean over seeds in [0, 1], NaN where there is none; std: its deviation over seeds.
    beside: what else there is to say of the same, by the words behind a method's name."""

    title: str
    measure: str
    datasets: Sequence[str]
    methods: Sequence[str]
    shots: Sequence[Shots]
    accuracy: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    beside: Mapping[str, Comparison] = field(default_factory=dict)

    @property
    def average(self) -> npt.NDArray[np.float64]:
        """(methods, shots), over data sets; NaN where one of them has no number."""
        return self.accuracy.mean(axis=0)

    @property
    def ranks(self) -> npt.NDArray[np.float64]:
        """(methods, shots), mean over data sets of the rank among methods, 1 being the best."""
        return rankdata(-self.accuracy, axis=1, nan_policy="omit").mean(axis=0)

    def difference(self, one: int, other: int) -> tuple[float, float, int, int]:
        """Of two methods over the data sets and shots of which both have a number: mean difference
        in accuracy (NaN where there are none), its standard error over data sets (NaN of a single
        one), wins and losses of the first."""
        differences = self.accuracy[:, one] - self.accuracy[:, other]
        differences = differences[~np.isnan(differences).all(axis=1)]
        wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
        count = len(differences)
        if not count:
            return np.nan, np.nan, 0, 0
        by_dataset = np.nanmean(differences, axis=1)
        error = by_dataset.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
        return float(by_dataset.mean()), float(error), wins, losses


def read_comparisons(runs: Mapping[str, Sequence[Path]]) -> list[Comparison]:
    """Of the finished runs on each data set, by its name: the test accuracy; of runs that were
    fitted on the first half of the classes that of both halves, and their harmonic mean.

    Runs on one data set are pooled. A method that runs had with other arguments counts as another,
    named by what differs, also between data sets.
    Raises UserError for a run that is not finished, for several caches of one data set, and for
    runs on all classes beside such on half of them.
    """
    loaded = {name: load_runs(paths) for name, paths in runs.items()}
    every = [run for own in loaded.values() for run in own]
    pooled = {
        name: [entry for entry in pool(own, every) if not entry.held]
        for name, own in loaded.items()
    }
    entries = [entry for own in pooled.values() for entry in own]
    classes = {entry.train_classes for entry in entries}
    if len(classes) > 1:
        raise UserError("Runs fitted on all classes and on half of them are not comparable.")
    fitted = classes.pop()
    rows = [
        (index, entry.label, row)
        for index, own in enumerate(pooled.values())
        for entry in own
        for row in entry.summary.values()
    ]
    words = kinds(fitted, (row for *_, row in rows))
    measured = {name: _comparison(list(pooled), rows, name, fitted) for name in words}
    beside = {words[name]: one for name, one in measured.items() if name not in KINDS[fitted]}
    return [replace(measured[name], beside=beside) for name in KINDS[fitted]]


def _comparison(
    datasets: Sequence[str],
    rows: Sequence[tuple[int, str, MethodSummary]],
    measure: str,
    train_classes: str,
) -> Comparison:
    """rows: (data set, method, its row)."""
    methods = list(dict.fromkeys(label for _, label, _ in rows))
    shots = in_order({row.shots for *_, row in rows})
    shape = (len(datasets), len(methods), len(shots))
    accuracy, std = np.full(shape, np.nan), np.full(shape, np.nan)
    for index, method, row in rows:
        spread = getattr(row, measure)
        if spread is not None:
            place = index, methods.index(method), shots.index(row.shots)
            accuracy[place] = spread.mean
            std[place] = np.nan if spread.std is None else spread.std
    title = TITLES.get(measure, measure)
    if train_classes == "base" and measure == "test_accuracy":
        title = "base accuracy"
    return Comparison(title, measure, datasets, methods, shots, accuracy, std)


def write_comparison(folder: Path, runs: Mapping[str, Sequence[Path]]) -> None:
    """Write study.csv (every number), study.md (the tables) and study.png (the figure, of the last
    table's accuracies).

    runs: of each data set, by its name, as `read_comparisons` takes them.
    """
    comparisons = read_comparisons(runs)
    tables = [table.markdown() for one in comparisons for table in _tables(one)]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "study.csv", _numbers(comparisons).csv())
        files.write_text(folder / "study.md", "\n".join(tables))
        files.write_bytes(folder / "study.png", _figure(comparisons[-1]))


def _numbers(found: Sequence[Comparison]) -> Table:
    """Every number."""
    every = [other for one in found for other in (one, *one.beside.values())]
    columns = [f"{one.measure}_{part}" for one in every for part in ("mean", "std")]
    first = found[0]
    rows = []
    for place in np.ndindex(first.accuracy.shape):
        dataset, method, shots = place
        cells = [float(cell) for one in every for cell in (one.accuracy[place], one.std[place])]
        names = first.datasets[dataset], first.methods[method], first.shots[shots]
        rows.append([*names, *(None if np.isnan(cell) else cell for cell in cells)])
    return Table(["dataset", "method", "shots", *columns], rows)


def _tables(found: Comparison) -> Iterator[Table]:
    title, head = found.title, ["method", *map(shots_words, found.shots)]
    of = "" if title == "test accuracy" else f" ({title})"
    sets = counted(len(found.datasets), "data set")
    yield Table(
        head,
        _rows(found, lambda one, method: map(_percent, one.average[method])),
        f"{title[:1].upper()}{title[1:]} (%), average over {sets}: {', '.join(found.datasets)}"
        + meanings(one.measure for one in found.beside.values()),
    )
    yield Table(
        head,
        [
            [name, *(NOTHING if np.isnan(rank) else f"{rank:.2f}" for rank in row)]
            for name, row in zip(found.methods, found.ranks, strict=True)
        ],
        f"Mean rank{of} over data sets (1 is the best)",
    )
    yield Table(
        ["", *found.methods],
        [
            [name, *(_difference(found, one, other) for other in range(len(found.methods)))]
            for one, name in enumerate(found.methods)
        ],
        f"Difference{of} in points, row minus column, mean ± standard error over data sets "
        "(wins : losses over data sets and shots)",
    )
    for index, dataset in enumerate(found.datasets):

        def cells(one: Comparison, method: int, index: int = index) -> Iterator[str]:
            return map(_spread, one.accuracy[index, method], one.std[index, method])

        spread = not np.isnan(found.std[index]).all()
        over = "mean ± standard deviation over seeds" if spread else "one seed"
        yield Table(head, _rows(found, cells), f"{dataset}{of}, {over}")


def _rows(found: Comparison, cells: Callable[[Comparison, int], Iterable[str]]) -> list[list[str]]:
    """Of each method its own row, and one for each measure beside it."""
    return [
        [f"{name} {words}".rstrip(), *cells(one, method)]
        for method, name in enumerate(found.methods)
        for words, one in {"": found, **found.beside}.items()
    ]


def _percent(value: float) -> str:
    return NOTHING if np.isnan(value) else f"{100 * value:.2f}"


def _spread(value: float, std: float) -> str:
    return _percent(value) + ("" if np.isnan(std) else f" ± {100 * std:.2f}")


def _difference(found: Comparison, one: int, other: int) -> str:
    if one == other:
        return ""
    mean, error, wins, losses = found.difference(one, other)
    if np.isnan(mean):
        return NOTHING
    spread = "" if np.isnan(error) else f" ± {100 * error:.2f}"
    return f"{100 * mean:+.2f}{spread} ({wins} : {losses})"


def _figure(found: Comparison) -> bytes:
    """Accuracy against shots: the average first, then a panel for each data set."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = [found.average, *found.accuracy]
    names = [f"{AVERAGE} of {len(found.datasets)}", *map(label, found.datasets)]
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    width = PANEL[0] * across
    longest = max(map(len, found.methods))
    beside = int(width / (LEGEND_MARK + LEGEND_LETTER * longest))
    places = range(len(found.shots))
    # A data set called `$x$` is no mathematics.
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, PANEL[1] * down + 0.6), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis, name, panel in zip(axes, names, panels, strict=False):
            for number, row in enumerate(panel):
                axis.plot(places, 100 * row, markersize=3, **series(number))
            axis.set_title(name, size=9)
            axis.set_xticks(places, [str(shots) for shots in found.shots])
        for axis in axes[len(panels) :]:
            axis.remove()
        axes[0].set_ylabel(f"{found.title} (%)")
        axes[0].set_xlabel("shots")
        figure.legend(
            axes[0].lines,
            list(map(printable, found.methods)),
            loc="outside lower center",
            ncols=max(1, min(5, beside, len(found.methods))),
            fontsize=8,
        )
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
