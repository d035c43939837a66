"""A picture of a grid: validation accuracy over two hyper-parameters."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from clip_adapter.adapters.hyper import Value
from clip_adapter.pipelines.fitting.factors import in_grid
from clip_adapter.pipelines.fitting.plan import Plan, PlannedMethod
from clip_adapter.pipelines.fitting.run_folder import RunFolder

PLOT = "validation.png"
MOST_VALUES = 30  # more make no readable axis
MOST_NUMBERS, MOST_TICKS = 60, 8  # readable on a panel
Cell = tuple[float, float]


def write_plot(folder: RunFolder, plan: Plan) -> None:
    """Write `validation.png` from results.csv: a panel for each number of shots, of the first
    method that was asked for and has two numbers to show.

    A cell is the best validation accuracy over the other hyper-parameters, averaged over seeds; a
    setting that halving stopped counts as far as it ran. It is empty where all settings diverged.
    Nothing is written where there is nothing to compare.
    """
    for planned in plan.fitted:
        axes = plotted(planned)
        if axes:
            panels = _panels(folder.path / "results.csv", planned, axes)
            content = _drawn(panels, axes, planned, halving=plan.search == "halving")
            if content:
                folder.write(PLOT, content)
            return


def plotted(planned: PlannedMethod) -> tuple[str, str] | None:
    """The hyper-parameters to show across and upwards: the first numbers of which several values
    were tried, with the learning rate upwards where there is one, and "" where there is only one
    number; None where there is nothing."""
    several = [name for name, values in planned.values.items() if len(_numbers(values)) > 1]
    readable = [name for name in several if len(_numbers(planned.values[name])) <= MOST_VALUES]
    if not readable:
        return None
    others = [name for name in (*readable, *planned.values) if name != readable[0]]
    rates = [name for name in ("learning_rate",) if name in others]
    numeric = [name for name in others if _numbers(planned.values[name])]
    upwards = (rates or [name for name in readable if name != readable[0]] or numeric or [""])[0]
    return (readable[0], upwards) if readable[0] != "learning_rate" else (upwards, readable[0])


def _numbers(values: Sequence[Value]) -> list[float]:
    return [float(v) for v in values if not isinstance(v, str | bool)]


def _panels(
    results: Path, planned: PlannedMethod, axes: tuple[str, str]
) -> dict[str, dict[Cell, float]]:
    """Shots → (across, upwards) → mean over seeds of the best accuracy, in %."""
    best: dict[tuple[str, Cell], dict[str, float]] = defaultdict(dict)
    with results.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["method"] != planned.method.name:
                continue
            if not in_grid(planned.values, planned.ablation, row):
                continue
            try:
                across, upwards = (float(row.get(name) or "nan") if name else 0.0 for name in axes)
            except ValueError:
                continue  # a word, such as `learned`, has no place on an axis
            if np.isnan(across):
                continue
            seeds = best[row["shots"], (across, upwards)]
            if row["status"] == "ok":
                accuracy = 100 * float(row["val_accuracy"])
                seeds[row["seed"]] = max(accuracy, seeds.get(row["seed"], 0.0))
    panels: dict[str, dict[Cell, float]] = defaultdict(dict)
    for (shots, cell), seeds in best.items():
        panels[shots][cell] = float(np.mean(list(seeds.values()))) if seeds else float("nan")
    return panels


def _drawn(
    panels: dict[str, dict[Cell, float]],
    axes: tuple[str, str],
    planned: PlannedMethod,
    *,
    halving: bool,
) -> bytes | None:
    means = (accuracy for cells in panels.values() for accuracy in cells.values())
    values = [accuracy for accuracy in means if not np.isnan(accuracy)]
    if not values or max(len(cells) for cells in panels.values()) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3 * len(panels), 3.2), layout="constrained")
    low, high = min(values), max(values)
    plots = figure.subplots(1, len(panels), squeeze=False)[0]
    for plot, (shots, cells) in zip(plots, panels.items(), strict=True):
        across = sorted({cell[0] for cell in cells})
        upwards = sorted({cell[1] for cell in cells})
        table = [[cells.get((x, y), np.nan) for x in across] for y in upwards]
        image = plot.imshow(table, origin="lower", aspect="auto", vmin=low, vmax=high)
        numbered = len(across) * len(upwards) <= MOST_NUMBERS
        if not numbered:
            figure.colorbar(image)
        for (row, column), accuracy in np.ndenumerate(table) if numbered else ():
            words = "–" if np.isnan(accuracy) else f"{accuracy:.1f}"
            color = "white" if accuracy <= (low + high) / 2 else "black"
            plot.text(column, row, words, ha="center", va="center", color=color)
        plot.set_xticks(*_ticks(across))
        plot.set_yticks(*_ticks(upwards if axes[1] else []))
        plot.set_title(f"{shots} shot{'s' * (shots != '1')}")
        plot.set_xlabel(axes[0].replace("_", " "))
    plots[0].set_ylabel(axes[1].replace("_", " "))
    stopped = ", settings that halving stopped as far as they ran" if halving else ""
    title = f"{planned.method.name}: validation accuracy (%), best of the other hyper-parameters"
    figure.suptitle(title + stopped, size=9)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _ticks(values: Sequence[float]) -> tuple[list[int], list[str]]:
    """Places and words, as many as are readable."""
    places = range(0, len(values), max(1, -(-len(values) // MOST_TICKS)))
    return list(places), [f"{values[place]:g}" for place in places]
