"""Every fit of a search, as results.csv has them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

from clip_adapter import files
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.factors import in_grid
from clip_adapter.pipelines.reporting.entries import Entry


@dataclass(frozen=True)
class Fit:
    """A setting on a task. values: as written, for the hyper-parameters that have an effect.
    accuracy: on validation, in [0, 1]; None where it diverged."""

    shots: Shots
    seed: int
    values: Mapping[str, str]
    accuracy: float | None


def read_fits(entry: Entry) -> list[Fit]:
    """The fits of an entry's tasks.

    Raises UserError where results.csv cannot be read.
    """
    found = []
    for run in {id(one.run): one.run for one in entry.found.values()}.values():
        own = {task for task, one in entry.found.items() if one.run is run}
        path = run.path / "results.csv"
        try:
            table = csv.DictReader(StringIO(files.read_text(path), newline=""))
            rows = [row for row in table if row["method"] == entry.method.name]
            values, shown = entry.planned.values, entry.planned.ablation
            fits = [_fit(row, entry) for row in rows if in_grid(values, shown, row)]
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read; fit --resume {run.path}.") from error
        found += [fit for fit in fits if (fit.shots, fit.seed) in own]
    return found


def _fit(row: Mapping[str, str], entry: Entry) -> Fit:
    shots: Shots = "all" if row["shots"] == "all" else int(row["shots"])
    values = {name: row[name] for name in entry.method.hyper if row.get(name)}
    accuracy = float(row["val_accuracy"]) if row["status"] == "ok" else None
    return Fit(shots, int(row["seed"]), values, accuracy)


def best_by(fits: Sequence[Fit], names: Sequence[str]) -> dict[tuple[str, ...], dict[int, float]]:
    """(values of these) → seed → best accuracy over everything else.

    Of settings in which all of them have an effect; {} for values at which all fits diverged.
    """
    best: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for fit in fits:
        if not all(name in fit.values for name in names):
            continue
        seeds = best[tuple(fit.values[name] for name in names)]
        if fit.accuracy is not None:
            seeds[fit.seed] = max(fit.accuracy, seeds.get(fit.seed, 0.0))
    return best


def ordered(values: set[str]) -> list[str]:
    """Numbers by size, then words."""

    def key(value: str) -> tuple[bool, float, str]:
        try:
            return False, float(value), value
        except ValueError:
            return True, 0.0, value

    return sorted(values, key=key)
