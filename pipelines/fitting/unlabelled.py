"""`fit --unlabelled`: images without labels refine what was chosen on a task, where labelled images
that took no part say that this is no worse."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.engine.evaluation import Score
from clip_adapter.adapters.engine.scoring import best_sharpness, make_classify, score
from clip_adapter.adapters.method import Arrays, Head, Method, Setting, Task
from clip_adapter.adapters.stata import (
    FEWEST,
    Refinement,
    classes_found,
    neighbours,
    refine,
    refined_logits,
)
from clip_adapter.cache.reader import BLOCK_ROWS, FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.saved.adapter_check import takes_both
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, image_hashes
from clip_adapter.pipelines.scoring.cached import check_same_encoder
from clip_adapter.words import counted, some


@dataclass(frozen=True)
class Unlabelled:
    """Images without labels. features: (M, D) float32. hashes: (M, 1 or 2), `image_hashes`."""

    features: npt.NDArray[np.float32]
    hashes: npt.NDArray[np.uint64]

    @property
    def identity(self) -> str:
        """How many there are, and which, in any order."""
        content = hashlib.sha256(np.sort(self.hashes[:, 0]).tobytes()).hexdigest()
        return f"{counted(len(self.features), 'image')} {content[:16]}"

    @cached_property
    def near(self) -> object:
        return neighbours(self.features)

    def without(self, hashes: npt.NDArray[np.uint64]) -> Unlabelled:
        """Those that are none of these images.

        Raises UserError where too few are left.
        """
        left = np.flatnonzero(~np.isin(self.hashes, hashes).any(axis=1))
        if len(left) < FEWEST:
            raise UserError(
                f"--unlabelled: of {counted(len(self.hashes), 'image')} {len(left)} take no part "
                f"in fitting, choosing and testing; give at least {FEWEST} that do not."
            )
        return Unlabelled(self.features[left], self.hashes[left])


@dataclass(frozen=True)
class Refined:
    """What images without labels made of a classifier. sentence: what was found, in a line.
    refinement: None where that is not kept. hashes: of the images. classes: those they show."""

    sentence: str
    refinement: Refinement | None
    hashes: npt.NDArray[np.uint64]
    classes: npt.NDArray[np.int64]

    def of(self, adapter: SavedAdapter) -> SavedAdapter:
        """The adapter, refined where that is kept; those images are no others to score it on."""
        if self.refinement is None:
            return adapter
        stated = {"unlabelled": {"images": len(self.hashes), "classes": len(self.classes)}}
        return replace(
            adapter,
            info=replace(adapter.info, fitted={**adapter.info.fitted, **stated}),
            seen=np.union1d(np.asarray(adapter.seen, np.uint64), self.hashes),
            refinement=self.refinement,
        )


def unlabelled_of(
    config: FitConfig, stored: Plan | None, cache: FeatureCache, listener: Listener
) -> Unlabelled | None:
    """The images without labels that refine what is chosen.

    Raises UserError where they are not those that a run was started with.
    """
    path = config.unlabelled or (stored and config.resume and stored.unlabelled_cache)
    if not path:
        return None
    unlabelled = read_unlabelled(Path(path), cache, listener)
    if stored and config.resume and stored.unlabelled != unlabelled.identity:
        raise UserError(
            f"--unlabelled: the images without labels of {path} are not those that {config.resume} "
            "was started with."
        )
    return unlabelled


def read_unlabelled(path: Path, cache: FeatureCache, listener: Listener) -> Unlabelled:
    """The images without labels of the cache at `path`, whose classes and prompts do not matter.

    Raises UserError where it has none, or was made with another backbone or preprocessing than
    `cache`.
    """
    with FeatureCache(path) as other:
        if not other.has("unlabelled"):
            raise UserError(f"--unlabelled: {path} holds no images without labels.")
        check_same_encoder(cache, other, "--unlabelled", listener)
        rows = np.arange(other.shape("unlabelled")[1])
        features = other.features("unlabelled", rows, views=1)[0]
        digests = other.hashes("unlabelled", "digests")
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(rows), BLOCK_ROWS)]
    hashes = [image_hashes(features[b], None if digests is None else digests[b]) for b in blocks]
    return Unlabelled(features, np.concatenate(hashes))


def refine_chosen(
    unlabelled: Unlabelled,
    method: Method,
    setting: Setting,
    arrays: Arrays,
    judges: Sequence[tuple[Arrays, Task]],
    head: Head,
    class_names: Sequence[str],
) -> Refined:
    """Refine what was fitted, and keep that where labelled images do not say that it is worse: by
    accuracy, then by likelihood.

    arrays: what was fitted. judges: the same setting fitted without some labelled images, and a
    task that has those as its validation data; [] where there are none.

    The temperature of the probabilities is the likeliest one on the images of the judges.
    """
    images = f"{counted(len(unlabelled.features), 'image')} without labels"
    reason = ""
    if "projection" in method.needs:
        reason = "it takes features of before the backbone's projection"
    elif takes_both(method, arrays):
        reason = "it takes features of a second encoder"
    elif not judges:
        reason = "a class has one labelled image, so that none is left to judge by"
    if reason:
        none = np.zeros(0, np.int64)
        return Refined(f"not refined by {images}: {reason}", None, unlabelled.hashes, none)

    def by(arrays: Arrays, temperature: float) -> tuple[npt.NDArray[np.int64], Refinement]:
        logits = make_classify(method, setting, arrays, head)(unlabelled.features)
        shares, refinement = refine(
            unlabelled.features, logits, head.weights, temperature, unlabelled.near
        )
        return classes_found(shares), refinement

    def joined(name: str) -> Any:
        parts = [getattr(task, name) for _, task in judges]
        return None if parts[0] is None else jnp.concatenate(parts)

    labels, weights = map(joined, ("validation_labels", "validation_weights"))
    before = [
        make_classify(method, setting, own, head)(task.validation_features) for own, task in judges
    ]
    temperature = 1 / float(best_sharpness(jnp.concatenate(before), labels, weights))
    after, found = [], None
    for logits, (own, task) in zip(before, judges, strict=True):
        classes, refinement = by(own, temperature)
        found = (classes, refinement) if own is arrays else found
        rows = np.asarray(task.validation_features)
        after.append(refined_logits(np, refinement, logits, rows))
    classes, refinement = found or by(arrays, temperature)
    plain, ours = (
        Score(float(accuracy), -float(nll))
        for accuracy, nll in (
            score(jnp.concatenate(own), labels, weights).score for own in (before, after)
        )
    )
    kept = ours >= plain
    missing = np.setdiff1d(np.arange(len(class_names)), classes)
    which = f"{len(classes)} of {counted(len(class_names), 'class', 'classes')}"
    which += f" (without {some([class_names[label] for label in missing])})" * bool(len(missing))
    change = f"{100 * plain.accuracy:.2f} → {100 * ours.accuracy:.2f} %"
    change += ", by likelihood," * (plain.accuracy == ours.accuracy)
    sentence = (
        f"{'' if kept else 'not '}refined by {images}, which show {which}: "
        f"{change} on {counted(len(labels), 'labelled image')} that took no part"
    )
    return Refined(sentence, refinement if kept else None, unlabelled.hashes, classes)
