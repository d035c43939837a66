"""The run behind `fit`: every method on every task, results on disk as they come."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.method import Evaluation, Grid
from clip_adapter.adapters.methods import METHODS
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.console.progress import Advance, progress
from clip_adapter.pipelines import tables
from clip_adapter.pipelines.adapter_file import AdapterInfo, SavedAdapter, save_adapter
from clip_adapter.pipelines.fit import FitConfig, FitResult
from clip_adapter.pipelines.run_folder import SETTING_COLUMNS, RunFolder
from clip_adapter.pipelines.selection import Chosen, choose
from clip_adapter.pipelines.tasks import (
    CachedData,
    Draw,
    Shots,
    base_half,
    draws,
    load_data,
    new_half,
)

Row = dict[str, Any]


def run_experiment(config: FitConfig, grid: Grid) -> FitResult:
    """Fit everything that `config` asks for; see `fit`."""
    with FeatureCache(config.cache) as cache:
        data = load_data(cache)
        description = Description.of(cache, data)
        tasks = list(draws(data, config.shots, config.seeds, config.select))
        _check_possible(config, data)
        methods = [name for name in METHODS if name in {config.method, *config.baselines}]
        folder = RunFolder(config.out)
        folder.write_json("tasks.json", [_task_document(data, drawn) for drawn in tasks])
        engine = Engine()
        selected: list[Row] = []
        with progress("fit", len(tasks) * len(methods)) as advance:
            for drawn in tasks:
                for name in methods:
                    runner = _Runner(name, grid, config, engine, folder, advance)
                    row, adapter = runner.run(data, drawn, description)
                    selected.append(row)
                    if name == config.method:
                        save_adapter(folder.path / _task_folder(drawn), adapter)
                        if drawn is _kept(tasks):
                            save_adapter(folder.path, adapter)
        folder.close()
        summary = _summarise(selected)
        folder.write_table("selected.csv", selected)
        folder.write_table("summary.csv", summary)
    tables.print_run(config, description.lines(), tasks, selected, summary, engine.compilations)
    kept = _kept(tasks)
    print(f"\n{folder.path}: adapter of {config.method} at {kept.shots} shots, seed {kept.seed}")
    return FitResult(folder.path, selected, summary)


@dataclass(frozen=True)
class Description:
    """Where the numbers come from, for tables and adapters."""

    backbone: dict[str, Any]
    preprocess: dict[str, Any]
    dataset: dict[str, Any]
    class_names: list[str]
    templates: list[str]
    cache_sha256: str
    test_images: int

    @classmethod
    def of(cls, cache: FeatureCache, data: CachedData) -> "Description":
        return cls(
            cache.backbone,
            cache.preprocess,
            cache.dataset,
            cache.class_names,
            cache.templates,
            cache.content_sha256,
            len(data.test.labels) if data.test else 0,
        )

    def lines(self) -> list[str]:
        """Backbone, data set and split source in words."""
        backbone = f"{self.backbone['name']} ({self.backbone['pretrained']})"
        name = self.dataset["name"]
        splits = self.dataset.get("splits", {})
        test = splits.get("test", "source not recorded")
        return [
            f"{backbone} on {name}: {len(self.class_names)} classes, {self.test_images} test images",
            f"test split: {test}",
        ]


@dataclass(frozen=True)
class _Runner:
    """One method on one task."""

    method: str
    grid: Grid
    config: FitConfig
    engine: Engine
    folder: RunFolder
    advance: Advance

    def run(
        self, data: CachedData, drawn: Draw, description: Description
    ) -> tuple[Row, SavedAdapter]:
        """Choose, fit and test; returns the row of selected.csv and the adapter."""
        base = self.config.train_classes == "base"
        full = data
        if base:
            data, drawn = base_half(data, drawn)
        chosen = choose(
            METHODS[self.method],
            self.grid,
            data,
            drawn,
            self.config.select,
            self.engine,
            lambda evaluation: self.folder.add_result(self._result_row(drawn, evaluation)),
        )
        row = self._selected_row(data, drawn, chosen)
        if base:
            row |= self._base_to_new(row["test_accuracy"], full, chosen)
        self.advance(1, f"{self.method}, {drawn.shots} shots, seed {drawn.seed}")
        return row, self._adapter(data, drawn, chosen, description)

    def _result_row(self, drawn: Draw, evaluation: Evaluation) -> Row:
        best = evaluation.best
        accuracy, nll = evaluation.history[best].tolist()
        return {
            "method": self.method,
            "shots": drawn.shots,
            "seed": drawn.seed,
            **evaluation.setting,
            "best_epoch": evaluation.epochs[best],
            "val_accuracy": accuracy,
            "val_nll": nll,
            "status": "failed" if evaluation.failed else "ok",
            "seconds": round(evaluation.seconds, 4),
        }

    def _selected_row(self, data: CachedData, drawn: Draw, chosen: Chosen) -> Row:
        evaluation = chosen.evaluation
        accuracy, nll = (
            evaluation.history[evaluation.best].tolist() if evaluation else (None, None)
        )
        row: Row = {"method": self.method, "shots": drawn.shots, "seed": drawn.seed}
        row |= {name: chosen.setting.get(name) for name in SETTING_COLUMNS}
        row |= {
            "select": self.config.select,
            "epoch": chosen.epoch,
            "val_accuracy": accuracy,
            "val_nll": nll,
            "tried": chosen.tried,
            "failed": chosen.failed,
            "within_one_standard_error": chosen.flat,
            "note": chosen.note,
        }
        row |= METHODS[self.method].describe(
            chosen.setting, chosen.arrays, data.train.features[0], data.weights
        )
        return row | {"test_accuracy": self._test_accuracy(data, chosen)}

    def _test_accuracy(self, data: CachedData, chosen: Chosen) -> float | None:
        if data.test is None:
            return None
        logits = METHODS[self.method].logits(
            chosen.setting,
            chosen.arrays,
            data.test.features[0],
            data.weights,
            data.logit_scale,
            data.logit_bias,
        )
        return float(np.mean(logits.argmax(axis=1) == data.test.labels))

    def _base_to_new(self, base: float | None, full: CachedData, chosen: Chosen) -> Row:
        """Accuracy on the classes never seen in fitting, and the harmonic mean with the base."""
        if not METHODS[self.method].unseen_classes:
            return {"new_accuracy": None, "harmonic_mean": None}
        new = self._test_accuracy(new_half(full), chosen)
        if base is None or new is None:
            return {"new_accuracy": new, "harmonic_mean": None}
        harmonic = 2 * base * new / (base + new) if base + new else 0.0
        return {"new_accuracy": new, "harmonic_mean": harmonic}

    def _adapter(
        self, data: CachedData, drawn: Draw, chosen: Chosen, description: Description
    ) -> SavedAdapter:
        info = AdapterInfo(
            method=self.method,
            setting=chosen.setting,
            class_names=description.class_names[: data.classes],
            templates=description.templates,
            logit_scale=data.logit_scale,
            logit_bias=data.logit_bias,
            backbone=description.backbone,
            preprocess=description.preprocess,
            dataset=description.dataset,
            cache_sha256=description.cache_sha256,
            fitted={
                "shots": drawn.shots,
                "seed": drawn.seed,
                "select": self.config.select,
                "epoch": chosen.epoch,
                "train_classes": self.config.train_classes,
            },
        )
        return SavedAdapter(info, chosen.arrays, data.weights)


def _check_possible(config: FitConfig, data: CachedData) -> None:
    if config.select == "none" and len(config.grid().alpha) > 1:
        raise UserError("--select none cannot choose between several settings; give one of each.")
    if config.train_classes == "base":
        if not METHODS[config.method].unseen_classes:
            raise UserError(f"--train-classes base: {config.method} cannot classify new classes.")
        if data.classes < 2:
            raise UserError("--train-classes base needs at least two classes.")


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
    """Mean and standard deviation (n − 1) over seeds for each method and number of shots."""
    groups: dict[tuple[str, Shots], list[Row]] = defaultdict(list)
    for row in selected:
        groups[row["method"], row["shots"]].append(row)
    summary = []
    for (method, shots), rows in groups.items():
        line: Row = {"method": method, "shots": shots, "seeds": len(rows)}
        for name in ("val_accuracy", "test_accuracy", "new_accuracy", "harmonic_mean"):
            if name in rows[0]:
                values = [row[name] for row in rows if row[name] is not None]
                line[f"{name}_mean"] = float(np.mean(values)) if values else None
                line[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary.append(line)
    return summary
