"""One method on one task: choose, fit, test, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.engine.closed_form import note
from clip_adapter.adapters.engine.evaluation import Evaluation, rounds_of
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit, judge, work
from clip_adapter.adapters.method import Arrays, Method, Setting
from clip_adapter.adapters.registry import REFERENCE
from clip_adapter.adapters.stata import Refinement, refined_logits
from clip_adapter.pipelines.fitting.choice import (
    Chosen,
    Search,
    choose,
    take_defaults,
)
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.data import Data
from clip_adapter.pipelines.fitting.given import Given
from clip_adapter.pipelines.fitting.plan import Plan, PlannedMethod
from clip_adapter.pipelines.fitting.predictions import Predictions, predictions_path
from clip_adapter.pipelines.fitting.provenance import Provenance
from clip_adapter.pipelines.fitting.record import TaskRecord
from clip_adapter.pipelines.fitting.results import Held, Spread, TaskResult, harmonic_mean
from clip_adapter.pipelines.fitting.run_folder import RunFolder, adapter_folder, writing
from clip_adapter.pipelines.fitting.taken import Taken
from clip_adapter.pipelines.fitting.tasks import Fold, TaskRows, cross_validation
from clip_adapter.pipelines.fitting.unlabelled import Refined, Unlabelled, refine_chosen
from clip_adapter.pipelines.saved.adapter_check import takes_both
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo, SavedAdapter, save_adapter
from clip_adapter.words import dashed


@dataclass(frozen=True)
class TaskRunner:
    """What all tasks of a run share.

    data: of the classes that are fitted. new: of the others, under base-to-new, else None.
    tell: is told sentences that whoever waits has to know. unlabelled: images without labels that
    refine what is chosen; None for none. taken: the adapter whose setting is taken; None for none.
    """

    plan: Plan
    data: Data
    new: Data | None
    provenance: Provenance
    engine: Engine
    tell: Callable[[str], None]
    unlabelled: Unlabelled | None = None
    taken: Taken | None = None
    _references: dict[tuple[Shots, int, int], Evaluation] = field(default_factory=dict)
    _seen: dict[tuple[Shots, int], npt.NDArray[np.uint64]] = field(default_factory=dict)

    @cached_property
    def given(self) -> Given:
        return Given(self.plan, self.data, self.engine)

    def run(
        self,
        planned: PlannedMethod,
        rows: TaskRows,
        folder: RunFolder,
        expect: Callable[[float], None],
        held: Held,
        peers: Sequence[TaskRows] = (),
    ) -> TaskResult:
        """Run a method on a task and leave in the folder what it predicted, and its adapter; of an
        ablation, where a factor is held, the result alone.

        expect: told how much the engine will report as progress, before it does.
        peers: tasks of other seeds that the same will be run on, which may begin with this one.
        """
        method = planned.method
        chosen = self.choose(planned, rows, folder, expect, held, peers)
        if chosen is None:
            return self.diverged(planned, rows, held)
        counts = not (planned.baseline or held)
        refined = self._refined(method, rows, chosen) if self.unlabelled and counts else None
        refinement = refined.refinement if refined else None
        predictions = predict_test(method, chosen.setting, chosen.arrays, self.data, refinement)
        result = self.result(method, rows, chosen, predictions, held)
        if predictions and not held:
            folder.write(predictions_path(*result.key), predictions.content())
        if counts and self.taken:
            result = replace(result, note=self.taken.compared(self.data.cache, predictions))
        if counts:
            fitted, seen = fitted_on(result), self._seen_by(rows)
            if joined := len(self.data.by_split(rows.support)["val"]):
                fitted["support_of_val"] = joined
            saved = self.saved(method, chosen.setting, chosen.arrays, fitted, seen)
            if refined:
                note = "; ".join(filter(None, (result.note, refined.sentence)))
                result, saved = replace(result, note=note), refined.of(saved)
            with writing(folder.path):
                save_adapter(folder.path / adapter_folder(*result.key), saved)
        return result

    def _refined(self, method: Method, rows: TaskRows, chosen: Chosen) -> Refined:
        """What images without labels make of what was chosen, judged by the validation images;
        where there are none by cross-validation on the support set or, where nothing was fitted on
        that, by it."""
        assert self.unlabelled is not None
        folds = [Fold(rows.support, rows.validation)]
        if not len(rows.validation):
            folds = [Fold(rows.support, rows.support, "train")]
            if chosen.arrays or chosen.setting:
                folds = cross_validation(rows, self.data.support_labels)
        judges = []
        for fold, task in zip(folds, self.given.parts(method, rows, folds), strict=True):
            arrays = chosen.arrays
            if fold.support is not rows.support:
                arrays = fit(method, chosen.setting, chosen.epoch, task, self.engine)
            judges.append((arrays, task))
        fitted = (method, chosen.setting, chosen.arrays)
        names = self.data.cache.class_names
        return refine_chosen(self.unlabelled, *fitted, judges, self.data.head(method), names)

    def choose(
        self,
        planned: PlannedMethod,
        rows: TaskRows,
        folder: RunFolder,
        expect: Callable[[float], None],
        held: Held,
        peers: Sequence[TaskRows],
    ) -> Chosen | None:
        """Choose a setting by the run's selection rule; None where every one diverged."""
        method = planned.method
        values = method.tried_at(len(rows.support) / self.data.count, planned.values)
        begun = self.given.begun(method, rows)
        task = begun[0] if begun else self.data.task(method, rows)
        divided = self.given.folds(method, rows)
        rounds = None
        if self.plan.select == "loo" and method.left_out:
            rounds = rounds_of(np.asarray(task.labels), rows.support)
        if rounds is None:
            parts = begun[1] if begun else self.given.parts(method, rows, divided)
        else:  # nothing is fitted on them: their labels are enough
            labels = (task.labels[own[own >= 0]] for own in rounds.members)
            parts = self.given.weighed([task._replace(validation_labels=own) for own in labels])
        judged = [fold.validation for fold in divided]
        asked = Search(
            method,
            values,
            self.plan.preset,
            parts,
            np.unique(np.concatenate(judged or [rows.validation]), return_index=True)[1],
            halving=self.plan.search == "halving",
            rounds=rounds and (task, rounds),
        )
        if sentence := note(method, len(method.settings(values)), task, parts):
            self.tell(sentence)
        expect(work(method, values, len(parts), halving=asked.halving))
        epoch = self.taken.epoch if self.taken and not planned.baseline else None
        record = TaskRecord(folder, method, rows, sum(map(len, judged)))
        if not begun:
            self.given.begin(asked, (task, parts), peers, record, epoch)
        if not parts:
            return take_defaults(asked, task, self.engine, epoch)
        chosen = choose(asked, task, self.engine, record)
        if not held:
            record.finish()
        if chosen and method is not REFERENCE:
            reference = self._reference(rows, divided)
            chosen = replace(chosen, outdoes_zero_shot=chosen.outdoes(asked, reference))
        return chosen

    def _reference(self, rows: TaskRows, divided: Sequence[Fold]) -> Evaluation:
        """How zero-shot does on the images that validate; looked at once for all methods."""
        key = rows.shots, rows.seed, len(divided)  # as many folds are the same ones
        if key not in self._references:
            parts = self.given.parts(REFERENCE, rows, divided)
            self._references[key] = judge(REFERENCE, parts)
        return self._references[key]

    def diverged(self, planned: PlannedMethod, rows: TaskRows, held: Held) -> TaskResult:
        """The row of a method of which every setting diverged."""
        note = f"every setting diverged; {_advice(planned)}"
        name = planned.method.name
        return TaskResult(name, rows.shots, rows.seed, self.plan.select, note=note, held=held)

    def result(
        self,
        method: Method,
        rows: TaskRows,
        chosen: Chosen,
        predictions: Predictions | None,
        held: Held,
    ) -> TaskResult:
        """The row of what was chosen, with what it predicted on the test set."""
        base = predictions.accuracy if predictions else None
        new = self._new_accuracy(method, rows, chosen)
        evaluation = chosen.evaluation
        return TaskResult(
            method=method.name,
            shots=rows.shots,
            seed=rows.seed,
            select=self.plan.select,
            setting=dict(chosen.setting),
            epoch=chosen.epoch or None,
            val_accuracy=evaluation.accuracy if evaluation else None,
            val_nll=evaluation.nll if evaluation else None,
            tried=chosen.tried,
            diverged=chosen.diverged,
            compared=chosen.compared,
            indistinguishable=chosen.indistinguishable,
            outdoes_zero_shot=chosen.outdoes_zero_shot,
            learned=self._learned(method, rows, chosen),
            test_accuracy=base,
            balanced_accuracy=predictions.balanced_accuracy if predictions else None,
            test_images=len(predictions.labels) if predictions else 0,
            uneven=predictions.uneven if predictions else False,
            new_accuracy=new,
            harmonic_mean=harmonic_mean(base, new),
            held=held,
        )

    def _new_accuracy(self, method: Method, rows: TaskRows, chosen: Chosen) -> float | None:
        """Accuracy on the classes that took no part, None where there are none or the method
        cannot tell them."""
        if self.new is None:
            return None
        arrays: Arrays | None = chosen.arrays
        if method.for_classes:
            task = self.data.task(method, rows)._replace(extra=self.new.extra(method))
            head = self.new.head(method)
            arrays = method.for_classes(chosen.arrays, chosen.setting, task, head)
        if arrays is None or not (method.unseen_classes or method.for_classes):
            return None
        predictions = predict_test(method, chosen.setting, arrays, self.new)
        return predictions.accuracy if predictions else None

    def _learned(self, method: Method, rows: TaskRows, chosen: Chosen) -> dict[str, Spread]:
        """Mean and deviation of what the method describes, on the support set."""
        if method.describe is None:
            return {}
        task = self.data.task(method, rows)
        features = np.asarray(task.features)[0]  # JAX would copy them
        described = method.describe(jnp, chosen.arrays, chosen.setting, features, task.head)
        values_of = {name: np.asarray(values) for name, values in described.items()}
        return {name: Spread(float(v.mean()), float(v.std())) for name, v in values_of.items()}

    def _seen_by(self, rows: TaskRows) -> npt.NDArray[np.uint64]:
        """Hashes of the images that fit or choose on a task; looked at once for all methods."""
        key = rows.shots, rows.seed
        if key not in self._seen:
            seen = self.data.by_split(rows.support)
            seen["val"] = np.concatenate([seen["val"], rows.validation])
            self._seen[key] = self.data.hashes(seen)
        return self._seen[key]

    def saved(
        self,
        method: Method,
        setting: Setting,
        arrays: Arrays,
        fitted: Mapping[str, Any],
        seen: npt.NDArray[np.uint64],
    ) -> SavedAdapter:
        """An adapter with all that it was fitted from; one that has nothing to fit or to choose,
        such as zero-shot, has seen no image."""
        about, head = self.provenance, self.data.head(method)
        weight = self.plan.class_weight
        weighed = {"class_weight": weight} if weight != "none" and method.is_trained else {}
        info = AdapterInfo(
            method=method.name,
            setting=dict(setting),
            class_names=about.class_names[self.data.classes],
            templates=about.templates,
            logit_scale=float(head.logit_scale),
            logit_bias=float(head.logit_bias),
            backbone=about.backbone,
            preprocess=about.preprocess,
            dataset=about.dataset,
            cache_sha256=about.cache_sha256,
            fitted={"train_classes": self.plan.train_classes, **weighed, **fitted},
            backbone2=about.backbone2 if takes_both(method, arrays) else None,
        )
        return SavedAdapter(info, arrays, head.weights, seen if arrays or setting else seen[:0])


def predict_test(
    method: Method,
    setting: Setting,
    arrays: Arrays,
    data: Data,
    refinement: Refinement | None = None,
) -> Predictions | None:
    """Classify the test images of the data's classes, block by block; None where there are none."""
    if "test" not in data.cache.splits:
        return None
    classify = make_classify(method, setting, arrays, data.head(method))
    blocks = []
    for features, labels in data.test_blocks(method):
        logits = classify(features).astype(np.float64)
        if refinement:
            logits = refined_logits(np, refinement, logits, features)
        best = logits.argmax(axis=1)
        top = logits[np.arange(len(best)), best]
        sure = 1 / np.exp(logits - top[:, None]).sum(axis=1)
        blocks.append((labels, best.astype(np.int32), sure.astype(np.float32)))
    if not blocks:
        return None
    labels, predicted, confidence = map(np.concatenate, zip(*blocks, strict=True))
    names = data.cache.class_names[data.classes]
    return Predictions(labels, predicted, confidence, data.test_ids(), names)


def fitted_on(result: TaskResult) -> dict[str, Any]:
    """What an adapter file says of the task it was fitted on."""
    names = ("shots", "seed", "select", "epoch", "val_accuracy")
    return {name: getattr(result, name) for name in names}


def _advice(planned: PlannedMethod) -> str:
    """What to try where everything diverged: smaller values of what is far above the usual ones."""
    hypers = planned.method.hyper
    usual = [name for name in ("learning_rate", "weight_decay") if name in hypers]
    large = [
        name
        for name in usual
        if min(map(float, planned.values[name]))
        > 3 * max(map(float, (hypers[name].default, *hypers[name].tried)))
    ]
    flags = [f"--{dashed(planned.method.flag(name))}" for name in large or usual[:1]]
    return f"try a smaller {' or '.join(flags)}" if flags else "try other values"
