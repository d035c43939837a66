"""The run behind `fit`: every method on every task, results on disk as they come."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from typing import Any

import numpy as np

from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.method import Grid
from clip_adapter.adapters.methods import METHODS
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.pipelines import tables
from clip_adapter.pipelines.adapter_file import save_adapter
from clip_adapter.pipelines.fit import FitConfig, FitResult
from clip_adapter.pipelines.plot import plot_grid
from clip_adapter.pipelines.progress import progress
from clip_adapter.pipelines.provenance import Provenance
from clip_adapter.pipelines.run_folder import RunFolder, new_folder
from clip_adapter.pipelines.runner import Runner
from clip_adapter.pipelines.tasks import (
    CachedData,
    Draw,
    Shots,
    base_classes,
    draws,
    load_data,
)

Row = dict[str, Any]

MEASURES = ("val_accuracy", "test_accuracy", "new_accuracy", "harmonic_mean")


def run_experiment(config: FitConfig, grid: Grid) -> FitResult:
    """Fit everything that `config` asks for; see `fit`."""
    with FeatureCache(config.cache) as cache:
        provenance = Provenance.of(cache)
        data = load_data(cache, config.augment)
    tasks = list(draws(data, config.shots, config.seeds, config.select))
    _check_possible(config, grid, data)
    engine = Engine(config.layout)
    arguments = config.arguments() | {"cache_sha256": provenance.cache_sha256}
    run = config.resume or config.out or new_folder()
    with closing(RunFolder(run, arguments, resume=config.resume is not None)) as folder:
        folder.write_json(
            "provenance.json",
            {"clip_adapter": version("clip-adapter"), "about": provenance.lines()},
        )
        folder.write_json("tasks.json", [_task_document(data, drawn) for drawn in tasks])
        base_to_new = config.train_classes == "base"
        runners = [
            Runner(name, grid, config.select, base_to_new, engine, data, provenance)
            for name in METHODS
            if name in {config.method, *config.baselines}
        ]
        try:
            _run_tasks(config, grid, tasks, runners, folder)
        except KeyboardInterrupt:
            message = f"what is finished is kept; go on with: fit --resume {run}"
            raise KeyboardInterrupt(message) from None
        selected = folder.selected()
        summary = _summarise(selected)
        folder.write_summary(summary)
        plot_grid(folder.path, config.method, grid)
    tables.print_run(config, provenance.lines(), tasks, selected, summary, engine.compilations)
    kept = _kept(tasks)
    which = f"{config.method} at {kept.shots} shots, seed {kept.seed}"
    if not (folder.path / "adapter.json").exists():
        raise UserError(f"Every setting of {which} diverged; try a smaller --lr.")
    print(f"\n{folder.path}: adapter of {which}")
    return FitResult(folder.path, selected, summary)


def _run_tasks(
    config: FitConfig,
    grid: Grid,
    tasks: Sequence[Draw],
    runners: Sequence[Runner],
    folder: RunFolder,
) -> None:
    """Run every method on every task that the folder has no selected setting of yet."""
    finished = {(row["method"], row["shots"], row["seed"]) for row in folder.selected()}
    sizes = {runner.method: METHODS[runner.method].evaluations(grid) for runner in runners}
    done = sum(sizes[name] for name, _, _ in finished)
    with progress("fit", len(tasks) * sum(sizes.values()), done) as advance:
        for drawn in tasks:
            for runner in runners:
                task = {"method": runner.method, "shots": drawn.shots, "seed": drawn.seed}
                if tuple(task.values()) in finished:
                    continue
                record = folder.record(task, advance)
                row, adapter = runner.run(drawn, record)
                if adapter and runner.method == config.method:
                    save_adapter(folder.path / _task_folder(drawn), adapter)
                    if drawn is _kept(tasks):
                        save_adapter(folder.path, adapter)
                folder.add_selected(row)
                # A search may end early (a sweep at an end of its range) or not be needed.
                advance(sizes[runner.method] - record.evaluations, runner.method)


def _check_possible(config: FitConfig, grid: Grid, data: CachedData) -> None:
    axes = (grid.reduction, grid.learning_rate, grid.weight_decay)
    ratios = {"image": (grid.alpha,), "text": (grid.beta,), "both": (grid.alpha, grid.beta)}
    if config.select == "none" and max(map(len, (*axes, *ratios[grid.branch]))) > 1:
        raise UserError("--select none cannot choose between several settings; give one of each.")
    if max(grid.reduction) > (dim := data.weights.shape[1]):
        raise UserError(
            f"--reduction {max(grid.reduction)} leaves no hidden unit: "
            f"the features have {dim} numbers."
        )
    if config.train_classes == "base":
        if not METHODS[config.method].unseen_classes:
            raise UserError(f"--train-classes base: {config.method} cannot classify new classes.")
        _check_halves(config, data)


def _check_halves(config: FitConfig, data: CachedData) -> None:
    if data.classes < 2:
        raise UserError("--train-classes base needs at least two classes.")
    base = base_classes(data)
    judged = data.val if config.select in ("few-shot-val", "full-val") else None
    for name, split, halves in (
        ("train", data.train, ("first",)),
        ("val", judged, ("first",)),
        ("test", data.test, ("first", "second")),
    ):
        there = {"first": split.labels < base, "second": split.labels >= base} if split else {}
        for half in halves:
            if split and not there[half].any():
                raise UserError(
                    f"--train-classes base needs {name} images of the {half} half of the classes."
                )


def _kept(tasks: Sequence[Draw]) -> Draw:
    """The task whose adapter stands at the top of the run folder: most shots, first seed."""
    return max(tasks, key=lambda drawn: len(drawn.support))


def _task_folder(drawn: Draw) -> str:
    return f"adapters/shots-{drawn.shots}-seed-{drawn.seed}"


def _task_document(data: CachedData, drawn: Draw) -> Row:
    return {
        "shots": drawn.shots,
        "seed": drawn.seed,
        "support": [data.train.ids[row] for row in drawn.support],
        "validation": [data.val.ids[row] for row in drawn.validation] if data.val else [],
    }


def _summarise(selected: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation (n − 1) over seeds for each method and number of shots.

    Seeds at which every setting diverged have no accuracy; they are counted in `diverged`.
    """
    groups: dict[tuple[str, Shots], list[Row]] = defaultdict(list)
    for row in selected:
        groups[row["method"], row["shots"]].append(row)
    summary = []
    for (method, shots), rows in groups.items():
        diverged = sum("test_accuracy" not in row for row in rows)
        line: Row = {"method": method, "shots": shots, "seeds": len(rows), "diverged": diverged}
        for name in MEASURES:
            values = [row[name] for row in rows if row.get(name) is not None]
            if any(name in row for row in selected):
                line[f"{name}_mean"] = float(np.mean(values)) if values else None
                line[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary.append(line)
    return summary
