"""What `study` leaves in its folder: the comparison as tables, numbers and a figure."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np

from clip_adapter import files
from clip_adapter.pipelines.fitting.config import shots_words
from clip_adapter.pipelines.fitting.run_folder import writing
from clip_adapter.pipelines.fitting.tables import meanings
from clip_adapter.pipelines.reporting.comparison import Comparison, read_comparisons
from clip_adapter.pipelines.reporting.figures import label, series
from clip_adapter.pipelines.reporting.formats import markdown
from clip_adapter.pipelines.scoring.prediction_formats import cell as csv_cell
from clip_adapter.words import printable

AVERAGE = "average"
PANEL = (3.2, 2.8)  # inches
LEGEND_MARK, LEGEND_LETTER = 0.7, 0.07  # inches that an entry of the legend takes
TITLES = {
    "all": ("test accuracy",),
    "base": ("base accuracy", "new accuracy", "harmonic mean"),
}


def write_comparison(folder: Path, runs: Mapping[str, Sequence[Path]]) -> None:
    """Write study.csv (every number), study.md (the tables) and study.png (the figure, of the last
    table's accuracies).

    runs: of each data set, by its name, as `read_comparisons` takes them.
    """
    found = read_comparisons(runs)
    titles = TITLES["all" if len(found) == 1 else "base"]
    tables = [_markdown(one, title) for one, title in zip(found, titles, strict=True)]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "study.csv", _csv(found))
        files.write_text(folder / "study.md", "\n".join(tables))
        files.write_bytes(folder / "study.png", _figure(found[-1], titles[-1]))


def _csv(found: Sequence[Comparison]) -> str:
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    every = [other for one in found for other in (one, *one.beside.values())]
    columns = [f"{one.measure}_{part}" for one in every for part in ("mean", "std")]
    writer.writerow(["dataset", "method", "shots", *columns])
    first = found[0]
    for place in np.ndindex(first.accuracy.shape):
        dataset, method, shots = place
        names = [
            *map(csv_cell, (first.datasets[dataset], first.methods[method])),
            first.shots[shots],
        ]
        cells = [cell for one in every for cell in (one.accuracy[place], one.std[place])]
        writer.writerow([*names, *("" if np.isnan(cell) else float(cell) for cell in cells)])
    return text.getvalue()


def _markdown(found: Comparison, title: str) -> str:
    count = len(found.datasets)
    of = "" if title == "test accuracy" else f" ({title})"
    sets = f"{count} data set{'s' * (count != 1)}"
    blocks = [
        _table(
            f"{title[:1].upper()}{title[1:]} (%), average over {sets}: {', '.join(found.datasets)}"
            + meanings(one.measure for one in found.beside.values()),
            ["method", *map(shots_words, found.shots)],
            _rows(found, lambda one, method: map(_percent, one.average[method])),
        ),
        _table(
            f"Mean rank{of} over data sets (1 is the best)",
            ["method", *map(shots_words, found.shots)],
            [
                [name, *("–" if np.isnan(rank) else f"{rank:.2f}" for rank in row)]
                for name, row in zip(found.methods, found.ranks, strict=True)
            ],
        ),
        _table(
            f"Difference{of} in points, row minus column, mean ± standard error over data sets "
            "(wins : losses over data sets and shots)",
            ["", *found.methods],
            [
                [name, *(_difference(found, one, other) for other in range(len(found.methods)))]
                for one, name in enumerate(found.methods)
            ],
        ),
    ]
    for index, dataset in enumerate(found.datasets):

        def cells(one: Comparison, method: int, index: int = index) -> Iterator[str]:
            return map(_spread, one.accuracy[index, method], one.std[index, method])

        heads = ["method", *map(shots_words, found.shots)]
        spread = not np.isnan(found.std[index]).all()
        over = "mean ± standard deviation over seeds" if spread else "one seed"
        blocks.append(_table(f"{dataset}{of}, {over}", heads, _rows(found, cells)))
    return "\n".join(blocks)


def _rows(found: Comparison, cells: Callable[[Comparison, int], Iterable[str]]) -> list[list[str]]:
    """Of each method its own row, and one for each measure beside it."""
    return [
        [f"{name}{words}", *cells(one, method)]
        for method, name in enumerate(found.methods)
        for words, one in {"": found, **found.beside}.items()
    ]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [markdown(title), "", _line(heads), f"|{' --- |' * len(heads)}", *map(_line, rows), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown, cells))} |"


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


def _figure(found: Comparison, title: str) -> bytes:
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
        axes[0].set_ylabel(f"{title} (%)")
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
