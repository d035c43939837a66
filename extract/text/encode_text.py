"""Encode the prompts of all classes."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.extract.text.prompts import prompts

if TYPE_CHECKING:
    from clip_adapter.extract.encoding.encoder import Encoder


@dataclass(frozen=True)
class TextPlan:
    """What is encoded for each class: the filled templates, then its own sentences.

    descriptions: C lists of sentences, None where there are only templates.
    """

    class_names: Sequence[str]
    templates: Sequence[str]
    descriptions: Sequence[Sequence[str]] | None = None

    @property
    def stored_templates(self) -> list[str]:
        """A name for each of the P rows that a class has in the cache."""
        longest = max(map(len, self.descriptions)) if self.descriptions else 0
        return [*self.templates, *(f"description {row + 1}" for row in range(longest))]

    def classes_of_a_batch(self, batch_size: int) -> int:
        """How many are encoded at once. Last bits depend on it: batches begin at its multiples."""
        return max(1, batch_size // len(self.stored_templates))

    def sha256(self) -> str:
        """Hash of the classes and their prompts."""
        stated = [list(self.class_names), list(self.templates), self.descriptions]
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()

    def is_in(self, cache: FeatureCache) -> bool:
        """Whether a cache has the text features of just these classes and prompts."""
        if cache.class_names != list(self.class_names) or cache.templates != self.stored_templates:
            return False
        stored = cache.prompts()
        if self.descriptions is None or stored is None:
            return self.descriptions is None and stored is None
        return stored == [self.filled(label) for label in range(len(self.class_names))]

    def prompts(self, label: int) -> list[str]:
        own = self.descriptions[label] if self.descriptions else ()
        return [*prompts(self.class_names[label], self.templates), *own]

    def filled(self, label: int) -> list[str]:
        """The same with "" for the rows that fill up a class with fewer prompts than others."""
        own = self.prompts(label)
        return [*own, *[""] * (len(self.stored_templates) - len(own))]


@dataclass(frozen=True)
class EncodedClasses:
    """Text features (B, P, D) float32 of consecutive classes.

    tokens: (B, P, L) int32, what the text tower was given, zeros for rows that fill up.
    too_long: those of the prompts of which the text tower reads only the beginning.
    """

    features: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    too_long: list[str]


def encode_classes(
    encoder: "Encoder", plan: TextPlan, *, start: int, batch_size: int, stop: int | None = None
) -> Iterator[EncodedClasses]:
    """Encode the classes from `start` on (to `stop`), about `batch_size` prompts at a time.

    A class with fewer prompts than others is filled up with the mean direction of its own, which
    leaves the classifier weights as they are (FORMAT.md).
    """
    rows = len(plan.stored_templates)
    step = plan.classes_of_a_batch(batch_size)
    count = len(plan.class_names) if stop is None else stop
    starts = [start, *range((start // step + 1) * step, count, step)] if start < count else []
    batches = [
        [plan.prompts(label) for label in range(first, min(count, (first // step + 1) * step))]
        for first in starts
    ]
    flat = [[prompt for own in prompts_of for prompt in own] for prompts_of in batches]
    for prompts_of, own_flat, encoded in zip(batches, flat, encoder.texts(flat), strict=True):
        ends = np.cumsum([len(own) for own in prompts_of])[:-1]
        features = [_filled_up(own, rows) for own in np.split(encoded, ends)]
        tokens = np.split(encoder.tokens(own_flat), ends)
        yield EncodedClasses(
            np.stack(features),
            np.stack([np.pad(own, ((0, rows - len(own)), (0, 0))) for own in tokens]),
            encoder.too_long(own_flat),
        )


def classes_with_one_text(encoder: "Encoder", plan: TextPlan) -> list[list[str]]:
    """Groups of classes whose prompts are the same once they are tokens: for most tokenizers names
    that differ in case, in underscores, or only behind what a text tower reads."""
    groups: dict[bytes, list[str]] = {}
    for label, name in enumerate(plan.class_names):
        tokens = encoder.tokens(plan.prompts(label))
        groups.setdefault(b"".join(sorted(row.tobytes() for row in tokens)), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _filled_up(features: npt.NDArray[np.float32], rows: int) -> npt.NDArray[np.float32]:
    """(n, D) → (rows, D)."""
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean = directions.mean(axis=0)
    missing = rows - len(features)
    return np.concatenate([features, np.tile(mean / np.linalg.norm(mean), (missing, 1))])
