"""One method on one task: choose, fit, test."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.method import Grid
from clip_adapter.adapters.methods import METHODS
from clip_adapter.pipelines.adapter_file import AdapterInfo, SavedAdapter
from clip_adapter.pipelines.provenance import Provenance
from clip_adapter.pipelines.run_folder import SETTING_COLUMNS
from clip_adapter.pipelines.selection import Chosen, Record, choose
from clip_adapter.pipelines.tasks import CachedData, Draw, Selection, base_half, new_half

Row = dict[str, Any]


@dataclass(frozen=True)
class Runner:
    """Runs a method with everything that all tasks share.

    base_to_new: fit on the first half of the classes, test on both halves.
    """

    method: str
    grid: Grid
    rule: Selection
    base_to_new: bool
    engine: Engine
    data: CachedData
    provenance: Provenance

    def run(self, drawn: Draw, record: Record) -> tuple[Row, SavedAdapter | None]:
        """The row of selected.jsonl, and the adapter unless every setting diverged."""
        data = self.data
        if self.base_to_new:
            data, drawn = base_half(data, drawn)
        method = METHODS[self.method]
        chosen = choose(method, self.grid, data, drawn, self.rule, self.engine, record)
        row: Row = {"method": self.method, "shots": drawn.shots, "seed": drawn.seed}
        if chosen is None:
            return row | {"note": "every setting diverged; try a smaller --lr"}, None
        row |= self._choice(chosen)
        row |= method.describe(chosen.setting, chosen.arrays, data.train.features[0], data.weights)
        row["test_accuracy"] = base = self._test_accuracy(data, chosen)
        if self.base_to_new and method.unseen_classes:
            row["new_accuracy"] = new = self._test_accuracy(new_half(self.data), chosen)
            row["harmonic_mean"] = _harmonic_mean(base, new)
        return row, self._adapter(data, drawn, chosen)

    def _choice(self, chosen: Chosen) -> Row:
        row: Row = {
            name: chosen.setting[name] for name in SETTING_COLUMNS if name in chosen.setting
        }
        row |= {"select": self.rule, "tried": chosen.tried, "diverged": chosen.failed}
        if chosen.evaluation:
            row |= {
                "epoch": chosen.epoch or None,
                "val_accuracy": chosen.evaluation.accuracy,
                "val_nll": chosen.evaluation.nll,
                "trained_as_long": chosen.as_far,
                "within_one_standard_error": chosen.flat,
            }
        return row | ({"note": chosen.note} if chosen.note else {})

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

    def _adapter(self, data: CachedData, drawn: Draw, chosen: Chosen) -> SavedAdapter:
        evaluation = chosen.evaluation
        info = AdapterInfo(
            method=self.method,
            setting=chosen.setting,
            class_names=self.provenance.class_names[: data.classes],
            templates=self.provenance.templates,
            logit_scale=data.logit_scale,
            logit_bias=data.logit_bias,
            backbone=self.provenance.backbone,
            preprocess=self.provenance.preprocess,
            dataset=self.provenance.dataset,
            cache_sha256=self.provenance.cache_sha256,
            fitted={
                "shots": drawn.shots,
                "seed": drawn.seed,
                "train_classes": "base" if self.base_to_new else "all",
                "select": self.rule,
                "epoch": chosen.epoch,
                "val_accuracy": evaluation.accuracy if evaluation else None,
            },
        )
        return SavedAdapter(info, chosen.arrays, data.weights)


def _harmonic_mean(base: float | None, new: float | None) -> float | None:
    if base is None or new is None:
        return None
    return 2 * base * new / (base + new) if base + new else 0.0
