"""What the searches of a method tried, read back, and the best of it along an axis."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence

from clip_adapter import files
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.record import Fit, has_rows, read_grid
from clip_adapter.pipelines.fitting.run_folder import FITS
from clip_adapter.pipelines.reporting.entries import Entry


def read_fits(entry: Entry) -> list[Fit]:
    """Every fit of the searches on an entry's tasks, without those of an ablation's values.

    Raises UserError where they cannot be read.
    """
    if not has_rows(entry.method):
        return [fit for row, run in entry.rows.values() for fit in read_grid(run.path, *row.key)]
    every_fit: list[Fit] = []
    for run in {id(run): run for _, run in entry.rows.values()}.values():
        own = {task for task, (_, its_run) in entry.rows.items() if its_run is run}
        path = run.path / FITS
        try:
            head, *lines = files.read_text(path).splitlines() or [""]
            lines = [line for line in lines if line.startswith(f"{entry.method.name},")]
            rows = list(csv.DictReader([head, *lines]))
            fits = [_fit(row, entry) for row in rows if _counts(row, entry)]
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read; fit --resume {run.path}.") from error
        every_fit += [fit for fit in fits if (fit.shots, fit.seed) in own]
    return every_fit


def _counts(row: Mapping[str, str], entry: Entry) -> bool:
    """Whether a row belongs to the choice: that of a value that only an ablation shows does not."""
    values = entry.planned.values
    return all(
        not row.get(factor) or row[factor] in map(str, values[factor])
        for factor in entry.planned.ablation
    )


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


def of_every_seed(
    best: Mapping[tuple[str, ...], dict[int, float]],
) -> dict[tuple[str, ...], dict[int, float]]:
    """Those values that have an accuracy of every seed that any of them has one of."""
    seeds = {seed for own in best.values() for seed in own}
    return {key: own for key, own in best.items() if own.keys() == seeds}
