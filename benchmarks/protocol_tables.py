"""The tables of protocol.py, in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TaskKey = tuple[int, int]
"""(shots, seed)."""
Values = Mapping[TaskKey, float]
"""In percent; NaN where a run diverged."""


@dataclass(frozen=True)
class Row:
    """minus: what is subtracted, task by task; None for values as they are."""

    name: str
    values: Values
    minus: Values | None = None

    def at(self, shots: int) -> list[float]:
        """In the order of the seeds."""
        return [
            value - (self.minus[task] if self.minus else 0)
            for task, value in self.values.items()
            if task[0] == shots
        ]


def table(title: str, rows: Sequence[Row]) -> str:
    """A column for each number of shots: mean over seeds ± standard error of the mean."""
    return _markdown(title, rows, lambda row, shots: row.at(shots))


def over_sets(title: str, sets: Sequence[Sequence[Row]]) -> str:
    """The same of the sets' means, ± the standard error over sets; of the rows that all have."""
    by_name = [{row.name: row for row in rows} for rows in sets]
    common = [row for row in sets[0] if all(row.name in rows for rows in by_name)]

    def means(row: Row, shots: int) -> list[float]:
        each = [rows[row.name].at(shots) for rows in by_name]
        return [float(np.mean(values)) for values in each if values]

    shots = sorted({task[0] for rows in sets for row in rows for task in row.values})
    return _markdown(title, common, means, shots)


def _markdown(title: str, rows: Sequence[Row], values: Any, shots: Sequence[int] = ()) -> str:
    columns = shots or sorted({task[0] for row in rows for task in row.values})
    lines = [[title, *(f"{count} shot{'s' * (count != 1)}" for count in columns)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = (spread(values(row, count), signed=row.minus is not None) for count in columns)
        lines.append([row.name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: Sequence[float], *, signed: bool = True) -> str:
    """Mean ± standard error of the mean; without the latter for a single value."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return "–"
    if np.isnan(array).any():
        return f"{int(np.isnan(array).sum())} of {len(array)} diverged"
    mean = f"{array.mean():{'+' if signed else ''}.2f}".replace("-", "−")
    if len(array) < 2:
        return mean
    return f"{mean} ± {array.std(ddof=1) / np.sqrt(len(array)):.2f}"
