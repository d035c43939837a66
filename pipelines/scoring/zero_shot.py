"""The zero-shot classifier of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.formulas import classifier_weights, ensemble_length
from clip_adapter.adapters.method import Head
from clip_adapter.errors import UserError
from clip_adapter.words import some

if TYPE_CHECKING:
    from clip_adapter.cache.reader import FeatureCache

# Prompts' features are averaged for so many classes at a time: with 80 prompts a class those of
# ImageNet are five times as large as its 16-shot support set.
BLOCK_CLASSES = 64
# Of the mean of a class's unit prompts. Of 80 that have nothing in common it is 0.1, and rounding
# to float16 leaves 0.001 of two that are opposites.
SHORTEST_MEAN = 0.002


def zero_shot_head(cache: FeatureCache) -> Head:
    """Of all classes, NumPy arrays without the prompts' own features."""
    scale, bias = np.float32(cache.logit_scale), np.float32(cache.logit_bias)
    return Head(zero_shot_weights(cache), scale, bias)


def zero_shot_weights(cache: FeatureCache) -> npt.NDArray[np.float32]:
    """(C, D), unit rows. Raises UserError as `check_directions` does."""
    blocks = []
    for first in range(0, len(cache.class_names), BLOCK_CLASSES):
        text = cache.text_features(slice(first, first + BLOCK_CLASSES))
        check_directions(text, cache.class_names[first : first + BLOCK_CLASSES])
        blocks.append(classifier_weights(np, text))  # with JAX it would be 15 programs
    return np.concatenate(blocks)


def check_directions(text: npt.NDArray[np.float32], names: Sequence[str]) -> None:
    """text: (C, P, D). Raises UserError where the prompts of a class cancel: it would never, or
    always, be right."""
    cancelled = np.flatnonzero(~(ensemble_length(np, text) >= SHORTEST_MEAN))
    if len(cancelled):
        classes = some([names[label] for label in cancelled.tolist()])
        raise UserError(
            f"The text features of {classes} cancel: the prompts of a class point to no direction "
            "in common; change its prompts."
        )
