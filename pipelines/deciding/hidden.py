"""`evaluate --unknown`: the adapter is fitted anew without each of its classes in turn, to see how
many images of the class that it then does not know would be called "none of these"."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.deciding.answers import NONE, Answers
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, image_hashes
from clip_adapter.words import counted, printable, quoted

if TYPE_CHECKING:
    from clip_adapter.adapters.method import Arrays, Task
    from clip_adapter.cache.reader import FeatureCache

FEWEST_CLASSES = 3
SHOWN = 3


@dataclass(frozen=True)
class Hidden:
    """names: of the classes that have images. images, shares: how many each has, and which share
    of them is called none of the other classes."""

    names: list[str]
    images: list[int]
    shares: list[float]

    def lines(self) -> Iterator[str]:
        mean = float(np.mean(self.shares))
        yield (
            f"hidden     {100 * mean:6.2f} % called {NONE}: mean over {len(self.names)} classes, "
            f"{counted(sum(self.images), 'image')}, each class hidden in turn and the adapter "
            "fitted without it"
        )
        order = np.argsort(self.shares, kind="stable")[:SHOWN].tolist()
        least = (f"{printable(self.names[k])} {100 * self.shares[k]:.1f} %" for k in order)
        yield f"least of {', '.join(least)}; a class that it never saw may be like any of these"


def hide_each_class(
    answers: Answers, cache: FeatureCache, split: str, listener: Listener
) -> Hidden:
    """Refits with the adapter's method and setting on its support images among the cache's, and
    asks with its own threshold about the images of the split.

    Raises UserError for a cache that it was not fitted on, and for adapters that cannot be fitted
    again without a class.
    """
    from clip_adapter.adapters.engine.runner import Engine
    from clip_adapter.adapters.engine.search import fit
    from clip_adapter.pipelines.console.jax_setup import usable_jax
    from clip_adapter.pipelines.scoring.cached import cached_images

    adapter = answers.adapter
    _check(adapter, cache)
    with usable_jax():
        task = _support(adapter, cache)
        labels = np.asarray(task.labels)
        counts = np.bincount(labels, minlength=len(adapter.weights))
        # As many for each class, so that one program serves them all.
        size = len(labels) - counts.min()
        images = cached_images(cache, split, adapter)
        blocks = list(images.blocks())
        features, encoded = (
            np.concatenate([getattr(block, name) for block in blocks])
            for name in ("features", "encoded")
        )
        classes = np.intersect1d(images.labels, np.arange(len(adapter.weights))).tolist()
        found = Hidden([], [], [])
        engine = Engine()
        with listener.progress("hidden classes", len(classes)) as advance:
            for label in classes:
                part = _without(task, label, size)
                arrays = fit(
                    adapter.method,
                    adapter.info.setting,
                    adapter.info.fitted.get("epoch"),
                    part,
                    engine,
                )
                own = images.labels == label
                known = _known(answers, label, arrays, features[own], encoded[own])
                found.names.append(adapter.info.class_names[label])
                found.images.append(int(own.sum()))
                found.shares.append(float(np.mean(answers.is_none(known))))
                advance(1, adapter.info.class_names[label])
    return found


def _check(adapter: SavedAdapter, cache: FeatureCache) -> None:
    if cache.content_sha256 != adapter.info.cache_sha256:
        raise UserError(
            f"--unknown fits the adapter again without each class, and {cache.path} is not the "
            "cache that it was fitted on; name that one."
        )
    reason = ""
    if "tower" in adapter.method.needs:
        reason = f"{quoted(adapter.info.method)} trains through the text tower"
    elif adapter.refinement:
        reason = "images without labels have refined it"
    elif len(adapter.weights) < FEWEST_CLASSES:
        reason = "it has two classes, and of one there is nothing to choose"
    elif adapter.seen is None:
        reason = "its file does not say which images it was fitted on"
    if reason:
        raise UserError(f"--unknown cannot fit this adapter without a class: {reason}.")


def _support(adapter: SavedAdapter, cache: FeatureCache) -> Task:
    """The images that it was fitted on, or every image of a refit; view 0 of each.

    Raises UserError where those of the validation split cannot be told.
    """
    from clip_adapter.pipelines.fitting.data import open_data
    from clip_adapter.pipelines.fitting.tasks import TaskRows

    fitted, nothing = adapter.info.fitted, np.zeros(0, np.int64)
    own = slice(0, len(adapter.weights))
    seed = int(fitted.get("seed") or 0)
    weight = str(fitted.get("class_weight", "none"))
    data = open_data(cache, [], augment=False, class_weight=weight).of_classes(own)
    if "refitted_on" in fitted:
        return data.everything(adapter.method, seed)
    joined = fitted.get("support_of_val", 0)
    rows = _seen(adapter, cache, "train")
    if joined:
        val = _seen(adapter, cache, "val")
        if len(val) != joined:
            raise UserError(
                "--unknown cannot tell which validation images this adapter was fitted on and "
                "which chose it."
            )
        rows = np.concatenate([rows, cache.shape("train")[1] + val])
    task = TaskRows(fitted.get("shots", "all"), seed, rows, nothing)
    return replace(data, tasks=[task]).task(adapter.method, task)


def _seen(adapter: SavedAdapter, cache: FeatureCache, split: str) -> npt.NDArray[np.int64]:
    from clip_adapter.pipelines.scoring.cached import cached_images

    return np.concatenate(
        [
            block.rows[adapter.has_seen(image_hashes(block.encoded, block.digests))]
            for block in cached_images(cache, split, adapter).blocks()
        ]
    )


def _without(task: Task, label: int, size: int) -> Task:
    """A task without a class, with `size` images; some of all classes stand twice where its class
    was larger."""
    labels = np.asarray(task.labels)
    rows = np.flatnonzero(labels != label)
    again = np.linspace(0, len(rows), size - len(rows), endpoint=False).astype(np.int64)
    rows = np.concatenate([rows, rows[again]])
    text = task.head.text
    head = task.head._replace(
        weights=np.delete(task.head.weights, label, axis=0),
        text=None if text is None else np.delete(text, label, axis=0),
    )
    kept, weights = labels[rows], task.class_weights
    return task._replace(
        features=np.asarray(task.features)[:, rows],
        labels=(kept - (kept > label)).astype(np.int32),
        head=head,
        class_weights=None if weights is None else np.delete(np.asarray(weights), label),
    )


def _known(
    answers: Answers,
    label: int,
    arrays: Arrays,
    features: npt.NDArray[np.float32],
    encoded: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """By the adapter without a class, at its own temperature."""
    whole = answers.adapter
    prototypes = np.delete(answers.decisions.prototypes, label, axis=0)
    names = [name for number, name in enumerate(whole.info.class_names) if number != label]
    decisions = replace(answers.decisions, prototypes=prototypes)
    without = replace(
        whole,
        info=replace(whole.info, class_names=names),
        arrays=arrays,
        weights=np.delete(whole.weights, label, axis=0),
        decisions=decisions,
    )
    shares = without.probabilities(without.logits(features))
    return replace(answers, adapter=without, decisions=decisions).known(shares, encoded)
