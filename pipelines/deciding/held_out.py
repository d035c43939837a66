"""What `fit` keeps beside the adapter at the top of a run folder: how it classifies labelled images
that it was not fitted on, from which `decisions` follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.decisions import (
    Decisions,
    class_means,
    nearest_cosines,
    prior_temperature,
    spreads,
)
from clip_adapter.adapters.engine.evaluation import rounds_of
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.method import Task
from clip_adapter.adapters.registry import REFERENCE
from clip_adapter.adapters.stata import refine
from clip_adapter.pipelines.fitting.choice import is_finite
from clip_adapter.pipelines.fitting.groups import folds_of_some, numbers_of
from clip_adapter.pipelines.fitting.one_task import TaskRunner
from clip_adapter.pipelines.fitting.results import TaskResult
from clip_adapter.pipelines.fitting.tasks import MAX_FOLDS, TaskRows
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter

AT_ONCE = 4096
Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _HeldOut:
    """Images and what was said of them by fits without them. cosines: to the nearest class mean,
    and to the nearest text. rows: which they are of the support set; none of validation images."""

    logits: Floats
    labels: npt.NDArray[np.int32]
    cosines: Floats
    rows: Rows


def with_decisions(
    runner: TaskRunner,
    rows: TaskRows,
    best: TaskResult,
    adapter: SavedAdapter,
    advance: Callable[[float, str], None],
) -> SavedAdapter:
    """The adapter of a task, or its refit on every labelled image, with its decisions: by the
    support images, left out in 4 folds, and the validation images together. An image that was drawn
    repeatedly counts once; of a class with one image it is never left out. A group of images that
    belong together is left out as a whole.

    advance: is told of each fold. Where no image is left the temperature is the one that spreads
    the support set's logits as the zero-shot ones.
    """
    refit = runner.plan.refit
    task, plain = (
        runner.data.everything(method, rows.seed) if refit else runner.data.task(method, rows)
        for method in (adapter.method, REFERENCE)
    )
    labels, encoded = np.asarray(task.labels), np.asarray(plain.features)[0]
    chosen_by = _firsts(rows.validation)
    validation = chosen_by[:0] if refit else chosen_by
    prototypes = class_means(encoded, labels, adapter.weights)
    chosen_on = np.asarray(plain.validation_features)[validation]
    parts = [
        _HeldOut(
            adapter.logits(np.asarray(task.validation_features)[validation]),
            np.asarray(task.validation_labels)[validation],
            nearest_cosines(chosen_on, prototypes, adapter.weights),
            validation[:0],
        )
    ]
    images = _labelled(runner) if refit else rows.support
    units = _grouped(runner) if refit else rows.groups
    if units is None:
        divided = rounds_of(labels, images)
        rounds = np.full(len(labels), -1) if divided is None else divided.of_image
    else:
        rounds = folds_of_some(units, labels, images, MAX_FOLDS)
    folds = min(MAX_FOLDS, int(rounds.max()) + 1)
    held = np.zeros(len(labels), bool)
    for fold in range(folds):
        out = (rounds >= 0) & (rounds % folds == fold)
        if left_out := _left_out(runner, best, adapter, task, encoded, out, images):
            parts.append(left_out)
            held |= out
        advance(1, "")
    logits, own, cosines, places = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("logits", "labels", "cosines", "rows")
    )
    parts.clear()  # at 1,000 classes of 20 images 160 MB
    shown = spreads(logits)
    if not len(own):
        shown = spreads(adapter.logits(np.asarray(task.features)[0]))
        places = np.arange(len(encoded))
    prior = prior_temperature(shown, _zero_shot(adapter, chosen_on, encoded, places))
    chose = len(validation)
    if not chose and best.val_accuracy is not None:
        val = rows.validation + len(runner.data.labels["train"])
        chosen = val if len(val) else rows.support
        chose = int(np.isin(np.unique(images[held]), chosen).sum())
    found = Decisions.of(
        logits, own, cosines, prior, folds=folds, chose=chose, prototypes=prototypes
    )
    return replace(adapter, decisions=found)


def _left_out(
    runner: TaskRunner,
    best: TaskResult,
    adapter: SavedAdapter,
    task: Task,
    encoded: Floats,
    out: npt.NDArray[np.bool_],
    images: Rows,
) -> _HeldOut | None:
    """The images of one fold; None where the fit without them diverged.

    Others of their class take their places, so that the fit is as long, its logits as large and its
    program the same as with them.
    """
    labels = np.asarray(task.labels)
    taken = np.arange(len(labels))
    for label in np.unique(labels[out]):
        own = labels == label
        taken[own & out] = np.resize(np.flatnonzero(own & ~out), np.sum(own & out))
    features = np.asarray(task.features)
    part = task._replace(features=features[:, taken], labels=labels[taken])
    arrays = fit(adapter.method, adapter.info.setting, best.epoch, part, runner.engine)
    if not is_finite(arrays):
        return None
    without = replace(adapter, arrays=arrays)
    if adapter.refinement:
        assert runner.unlabelled is not None
        known = adapter.method, adapter.info.setting, arrays, adapter.head
        logits = make_classify(*known)(runner.unlabelled.features)
        temperature = float(adapter.refinement.temperature)
        near = runner.unlabelled.near
        refined = refine(runner.unlabelled.features, logits, adapter.weights, temperature, near)[1]
        without = replace(without, refinement=refined)
    means = class_means(encoded[~out], labels[~out], adapter.weights)
    rows = np.flatnonzero(out)[_firsts(images[out])]
    return _HeldOut(
        without.logits(features[0, rows]),
        labels[rows],
        nearest_cosines(encoded[rows], means, adapter.weights),
        rows,
    )


def _zero_shot(
    adapter: SavedAdapter, chosen_on: Floats, encoded: Floats, places: Rows
) -> npt.NDArray[np.float64]:
    """How far the zero-shot logits spread of all rows of `chosen_on`, and behind them of some of
    `encoded`, some thousand at a time."""
    first, count = len(chosen_on), len(chosen_on) + len(places)
    found = []
    for rows in np.array_split(np.arange(count), max(1, -(-count // AT_ONCE))):
        own, others = rows[rows < first], rows[rows >= first] - first
        features = np.concatenate([chosen_on[own], encoded[places[others]]])
        found.append(spreads(cosine_logits(np, features, adapter.head)))
    return np.concatenate(found)


def _labelled(runner: TaskRunner) -> Rows:
    """Which images `Data.everything` has, among those of all splits one behind another."""
    labels, own = runner.data.labels, runner.data.labelled_rows()
    ends = np.cumsum([*map(len, labels.values())])
    starts = dict(zip(labels, [0, *ends[:-1]], strict=True))
    return np.concatenate([starts[split] + own[split] for split in labels])


def _grouped(runner: TaskRunner) -> Rows | None:
    """The groups of every labelled image, as `Data.everything` has them."""
    groups = numbers_of(runner.data.cache, [*runner.data.labels])
    return None if groups is None else groups[_labelled(runner)]


def _firsts(images: Rows) -> Rows:
    """Where each image first stands."""
    return np.sort(np.unique(images, return_index=True)[1])
