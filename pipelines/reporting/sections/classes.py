"""Two classifiers on the same images: what adapting gained and lost class by class, and whether a
probability of 0.9 is right nine times in ten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clip_adapter.pipelines.fitting.predictions import Predictions
from clip_adapter.pipelines.reporting.figures import (
    MUTED,
    SERIES,
    Picture,
    Section,
    drawing,
    label,
    percent,
    points,
)
from clip_adapter.pipelines.reporting.significance import BINS, confusion, reliability
from clip_adapter.pipelines.reporting.table import Table
from clip_adapter.words import printable

MOST_CLASSES = 20
MOST_CONFUSIONS = 10


@dataclass(frozen=True)
class Pair:
    """Two classifiers on the same tasks: predictions of a seed each, and their names."""

    before: Sequence[Predictions]
    after: Sequence[Predictions]
    before_name: str
    after_name: str
    class_names: Sequence[str]

    def confusions(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(C, C) each: images of the row's class taken for the column's, mean over seeds."""
        count = len(self.class_names)
        before, after = (
            np.mean([confusion(p.labels, p.predicted, count) for p in some], axis=0)
            for some in (self.before, self.after)
        )
        return before, after

    def recalls(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(C,) each: how many of a class's images are right; NaN where it has none."""
        with np.errstate(invalid="ignore"):
            before, after = (np.diag(m) / m.sum(axis=1) for m in self.confusions())
        return before, after


def changed_most(pair: Pair, most: int = MOST_CLASSES) -> list[int]:
    """The classes whose accuracy changed most, biggest gain first."""
    before, after = pair.recalls()
    there = np.flatnonzero(~np.isnan(before))
    change = (after - before)[there]
    kept = there[np.argsort(-np.abs(change), kind="stable")[:most]]
    return sorted(kept.tolist(), key=lambda label: (-(after - before)[label], label))


def class_section(pair: Pair) -> Section:
    """Accuracy of each class before and after, and the confusions that came and went."""
    before, after = pair.recalls()
    matrices = pair.confusions()
    shown = changed_most(pair)
    names = [printable(name) for name in pair.class_names]
    counts = matrices[0].sum(axis=1)
    classes = sorted(np.flatnonzero(counts).tolist(), key=lambda c: (-(after - before)[c], c))
    with drawing((4.4, 0.9 + 0.22 * len(shown))) as (figure, axes):
        for place, c in enumerate(shown[::-1]):
            gained = after[c] >= before[c]
            color = SERIES[0] if gained else SERIES[1]
            axes.plot([100 * before[c], 100 * after[c]], [place] * 2, color=color, zorder=2)
            marker = "o" if gained else "s"
            axes.plot(100 * after[c], place, marker, color=color, markersize=6, zorder=3)
            axes.plot(100 * before[c], place, marker, mfc="none", mec=MUTED, ms=6, zorder=3)
        axes.set_yticks(range(len(shown)), [label(pair.class_names[c]) for c in shown[::-1]])
        axes.set_xlabel("test accuracy of the class (%)")
        axes.grid(axis="y", visible=False)
        which = "classes that changed most" if len(shown) < len(classes) else "every class"
        drawn = Picture(
            "classes",
            f"Accuracy of {which}: open marks {pair.before_name}, filled marks {pair.after_name}; "
            "blue circles gained, orange squares lost.",
            f"Dot plot of class accuracies before and after. {_extremes(names, before, after)}",
            figure,
            Table(
                ["class", "test images", f"{pair.before_name} %", f"{pair.after_name} %", "change"],
                [
                    [
                        names[c],
                        f"{counts[c]:.0f}",
                        percent(before[c], 1),
                        percent(after[c], 1),
                        points(after[c] - before[c]),
                    ]
                    for c in classes
                ],
                "every class, biggest gain first; mean over seeds",
            ),
        )
    change = after - before
    gained, lost = int(np.sum(change > 0)), int(np.sum(change < 0))
    text = f"Of {len(classes)} classes {gained} gained and {lost} lost."
    tables = [
        _confusions(matrices[1] - matrices[0], *matrices, names, "appeared or grew"),
        _confusions(matrices[0] - matrices[1], *matrices, names, "vanished or shrank"),
    ]
    return Section("Class by class", [text], [drawn], [t for t in tables if t.rows])


def _extremes(names: Sequence[str], before: npt.NDArray, after: npt.NDArray) -> str:
    change = np.nan_to_num(after - before)
    best, worst = int(change.argmax()), int(change.argmin())
    return (
        f"Biggest gain: {names[best]}, {points(change[best])} points; "
        f"biggest loss: {names[worst]}, {points(change[worst])} points."
    )


def _confusions(
    growth: npt.NDArray[np.float64],
    before: npt.NDArray[np.float64],
    after: npt.NDArray[np.float64],
    names: Sequence[str],
    words: str,
) -> Table:
    off = growth - np.diag(np.diag(growth))
    order = np.argsort(-off, axis=None, kind="stable")[:MOST_CONFUSIONS]
    cells = [divmod(int(index), len(names)) for index in order]
    rows = [
        [
            label(names[true]),
            label(names[taken]),
            f"{before[true, taken]:.1f}",
            f"{after[true, taken]:.1f}",
        ]
        for true, taken in cells
        if off[true, taken] > 0
    ]
    caption = f"confusions that {words}: test images, mean over seeds"
    return Table(["class", "taken for", "before", "after"], rows, caption, names=2)


def calibration_section(pair: Pair) -> Section:
    """Reliability diagrams before and after, over the test images of all seeds."""
    pictures, errors = [], []
    sides = (("before", pair.before_name, pair.before), ("after", pair.after_name, pair.after))
    for number, (when, name, some) in enumerate(sides):
        bins = reliability(
            np.concatenate([p.confidence for p in some]), np.concatenate([p.right for p in some])
        )
        errors.append(bins.error)
        with drawing((3.5, 3.2)) as (figure, axes):
            axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
            axes.vlines(
                bins.confidence,
                np.minimum(bins.confidence, bins.accuracy),
                np.maximum(bins.confidence, bins.accuracy),
                color=SERIES[1 - number],
                linewidth=2,
                alpha=0.5,
            )
            sizes = 12 + 130 * bins.images / bins.images.max()
            axes.scatter(bins.confidence, bins.accuracy, sizes, color=SERIES[1 - number])
            axes.set(
                xlim=(-0.03, 1.03),
                ylim=(-0.03, 1.03),
                xlabel="probability of the predicted class",
                ylabel="how often it is right",
            )
            axes.set_title(f"{name}: ECE {100 * bins.error:.1f} %")
            rows = zip(bins.confidence, bins.accuracy, bins.images, strict=True)
            pictures.append(
                Picture(
                    f"reliability-{when}",
                    f"Reliability {when} adapting ({name}): above the dotted line it is right more "
                    f"often than it says, below less often. "
                    "A larger disc stands for more images, but not in proportion.",
                    f"Reliability diagram of {name}: expected calibration error "
                    f"{100 * bins.error:.1f} % in {BINS} bins.",
                    figure,
                    Table(
                        ["mean probability", "right", "images"],
                        [[f"{c:.3f}", f"{a:.3f}", f"{n}"] for c, a, n in rows],
                        "bins of equal width, images of all seeds",
                    ),
                )
            )
    text = (
        f"Expected calibration error, {BINS} bins: {100 * errors[0]:.1f} % before, "
        f"{100 * errors[1]:.1f} % after."
    )
    return Section("Calibration", [text], pictures)
