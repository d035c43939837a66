"""A picture of a grid: validation accuracy over residual ratio and learning rate."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from clip_adapter.adapters.method import Grid

PLOT = "validation.png"
Cell = tuple[float, float]


def plot_grid(run: Path, method: str, grid: Grid) -> None:
    """Write `validation.png` from results.csv: a panel for each number of shots.

    A cell is the best validation accuracy over the other hyper-parameters, averaged over seeds; a
    setting that halving stopped counts as far as it ran. It is empty where all settings diverged.
    Nothing is written where neither the ratio nor the learning rate has several values, or
    everything diverged.
    """
    ratio = "beta" if grid.branch == "text" else "alpha"
    panels = _panels(run / "results.csv", method, ratio)
    means = (accuracy for cells in panels.values() for accuracy in cells.values())
    values = [accuracy for accuracy in means if not np.isnan(accuracy)]
    if not values or max(len(cells) for cells in panels.values()) < 2:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    low, high = min(values), max(values)
    for axis, (shots, cells) in zip(axes, panels.items(), strict=True):
        ratios = sorted({cell[0] for cell in cells})
        rates = sorted({cell[1] for cell in cells})
        table = [[cells.get((r, rate), np.nan) for r in ratios] for rate in rates]
        axis.imshow(table, origin="lower", aspect="auto", vmin=low, vmax=high)
        for (row, column), accuracy in np.ndenumerate(table):
            words = "–" if np.isnan(accuracy) else f"{accuracy:.1f}"
            color = "white" if accuracy <= (low + high) / 2 else "black"
            axis.text(column, row, words, ha="center", va="center", color=color)
        axis.set_xticks(range(len(ratios)), [f"{value:g}" for value in ratios])
        axis.set_yticks(range(len(rates)), [f"{value:g}" for value in rates])
        axis.set_title(f"{shots} shot{'s' * (shots != '1')}")
        axis.set_xlabel(ratio)
    axes[0].set_ylabel("learning rate")
    stopped = ", settings that halving stopped as far as they ran" if grid.halving else ""
    figure.suptitle(f"validation accuracy (%), best of the other hyper-parameters{stopped}", size=9)
    figure.savefig(run / PLOT, dpi=120)


def _panels(results: Path, method: str, ratio: str) -> dict[str, dict[Cell, float]]:
    """Shots → (ratio, learning rate) → mean over seeds of the best accuracy, in %."""
    best: dict[tuple[str, Cell], dict[str, float]] = defaultdict(dict)
    with results.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] != method or not _is_number(row[ratio]):
                continue
            seeds = best[row["shots"], (float(row[ratio]), float(row["learning_rate"]))]
            if row["status"] != "ok":
                continue
            accuracy = 100 * float(row["val_accuracy"])
            seeds[row["seed"]] = max(accuracy, seeds.get(row["seed"], 0.0))
    panels: dict[str, dict[Cell, float]] = defaultdict(dict)
    for (shots, cell), seeds in best.items():
        panels[shots][cell] = float(np.mean(list(seeds.values()))) if seeds else float("nan")
    return panels


def _is_number(text: str) -> bool:
    return text not in ("", "learned", "hypernet")
