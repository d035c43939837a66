"""Methods over several data sets: averages, ranks and pairwise differences, as tables and a figure.

Each data set counts alike, as in the averages of the literature. A method that has no number on one
of them has no average and no rank; two methods are compared where both have one.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from clip_adapter.cache import files
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.results import summarise
from clip_adapter.pipelines.fitting.run_folder import read_selected

AVERAGE = "average"


@dataclass(frozen=True)
class Comparison:
    """accuracy: (data sets, methods, shots), mean over seeds in [0, 1], NaN where there is none;
    std: its standard deviation over seeds."""

    datasets: Sequence[str]
    methods: Sequence[str]
    shots: Sequence[Shots]
    accuracy: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]

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


def read_comparison(runs: Mapping[str, Path]) -> Comparison:
    """The finished runs of a study, by the data set's name."""
    found = {name: summarise(read_selected(run)) for name, run in runs.items()}
    rows = [row for summary in found.values() for row in summary]
    methods = list(dict.fromkeys(row.method for row in rows))
    shots = list(dict.fromkeys(row.shots for row in rows))
    shape = (len(found), len(methods), len(shots))
    accuracy, std = np.full(shape, np.nan), np.full(shape, np.nan)
    for index, summary in enumerate(found.values()):
        for row in summary:
            if row.test_accuracy is not None:
                place = index, methods.index(row.method), shots.index(row.shots)
                accuracy[place] = row.test_accuracy.mean
                std[place] = np.nan if row.test_accuracy.std is None else row.test_accuracy.std
    return Comparison(list(found), methods, shots, accuracy, std)


def write_comparison(folder: Path, runs: Mapping[str, Path]) -> None:
    """Write study.csv (every number), study.md (the tables) and study.png (the figure)."""
    found = read_comparison(runs)
    files.write_text(folder / "study.csv", _csv(found))
    files.write_text(folder / "study.md", _markdown(found))
    files.write_bytes(folder / "study.png", _figure(found))


def _csv(found: Comparison) -> str:
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "method", "shots", "test_accuracy_mean", "test_accuracy_std"])
    for place in np.ndindex(found.accuracy.shape):
        dataset, method, shots = place
        cells = [found.accuracy[place], found.std[place]]
        numbers = ["" if np.isnan(cell) else float(cell) for cell in cells]
        names = [found.datasets[dataset], found.methods[method], found.shots[shots]]
        writer.writerow([*names, *numbers])
    return text.getvalue()


def _markdown(found: Comparison) -> str:
    count = len(found.datasets)
    sets = f"{count} data set{'s' * (count != 1)}"
    blocks = [
        _table(
            f"Test accuracy (%), average over {sets}: {', '.join(found.datasets)}",
            ["method", *(f"{shots} shots" for shots in found.shots)],
            [
                [name, *map(_percent, row)]
                for name, row in zip(found.methods, found.average, strict=True)
            ],
        ),
        _table(
            "Mean rank over data sets (1 is the best)",
            ["method", *(f"{shots} shots" for shots in found.shots)],
            [
                [name, *(f"{rank:.2f}" for rank in row)]
                for name, row in zip(found.methods, found.ranks, strict=True)
            ],
        ),
        _table(
            "Difference in points, row minus column, mean ± standard error over data sets (wins : "
            "losses over data sets and shots)",
            ["", *found.methods],
            [
                [name, *(_difference(found, one, other) for other in range(len(found.methods)))]
                for one, name in enumerate(found.methods)
            ],
        ),
    ]
    for index, dataset in enumerate(found.datasets):
        rows = [
            [name, *(_spread(*cell) for cell in zip(*both, strict=True))]
            for name, *both in zip(
                found.methods, found.accuracy[index], found.std[index], strict=True
            )
        ]
        heads = ["method", *(f"{shots} shots" for shots in found.shots)]
        blocks.append(_table(f"{dataset}, mean ± standard deviation over seeds", heads, rows))
    return "\n".join(blocks)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [title, "", _line(heads), _line(["---"] * len(heads)), *map(_line, rows), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |"


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.2f}"


def _spread(value: float, std: float) -> str:
    return _percent(value) + ("" if np.isnan(std) else f" ± {100 * std:.2f}")


def _difference(found: Comparison, one: int, other: int) -> str:
    if one == other:
        return ""
    mean, error, wins, losses = found.difference(one, other)
    if np.isnan(mean):
        return "–"
    spread = "" if np.isnan(error) else f" ± {100 * error:.2f}"
    return f"{100 * mean:+.2f}{spread} ({wins} : {losses})"


def _figure(found: Comparison) -> bytes:
    """Accuracy against shots: the average first, then a panel for each data set."""
    from matplotlib.figure import Figure

    panels = [found.average, *found.accuracy]
    names = [f"{AVERAGE} of {len(found.datasets)}", *found.datasets]
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.2 * across, 2.8 * down + 0.6), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    places = range(len(found.shots))
    for axis, name, panel in zip(axes, names, panels, strict=False):
        for method, row in zip(found.methods, panel, strict=True):
            axis.plot(places, 100 * row, marker="o", markersize=3, label=method)
        axis.set_title(name, size=9)
        axis.set_xticks(places, [str(shots) for shots in found.shots])
    for axis in axes[len(panels) :]:
        axis.remove()
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].set_xlabel("shots")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8
    )
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
