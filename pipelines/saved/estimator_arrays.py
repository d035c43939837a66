"""What the estimator is given, as numbers and arrays that can be computed with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import _check_sample_weight

from clip_adapter.adapters.hyper import LARGEST_COUNT
from clip_adapter.cache.schema import LARGEST_FEATURE, SMALLEST_FEATURE


def number(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> float:
    """Raises ValueError for what is no number or out of range."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = np.nan
    if not fits(number):
        raise ValueError(f"{name} is {value!r:.80}, not {wanted}.")
    return number


def counted(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.generic],
    sample_weight: npt.ArrayLike | None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.generic]]:
    """Each row as often as it counts; where some are there several times all in one order, so that
    a weight is the same as repeating the row, wherever the copies stand.

    Raises ValueError for weights that are no whole numbers, and for too many rows.
    """
    if sample_weight is not None:
        weights = _check_sample_weight(sample_weight, features, dtype=np.float64)
        if (weights < 0).any() or (weights != np.rint(weights)).any():
            raise ValueError("sample_weight holds something else than whole numbers from 0 on.")
        if not 0 < weights.sum() <= LARGEST_COUNT:
            raise ValueError(
                f"sample_weight adds up to {weights.sum():g}, not 1 to {LARGEST_COUNT}."
            )
        counts = weights.astype(np.int64)
        features, labels = features.repeat(counts, axis=0), labels.repeat(counts)
    content = [row.tobytes() for row in features]
    if len(set(content)) < len(content):
        order = sorted(range(len(content)), key=lambda row: (labels[row], content[row]))
        return features[order], labels[order]
    return features, labels


def check_size(features: npt.NDArray[np.float32]) -> None:
    """Raises ValueError where products of (…, D) features would leave float32."""
    largest = np.abs(features).max(axis=-1)
    if largest.max() > LARGEST_FEATURE or (largest[largest < SMALLEST_FEATURE] > 0).any():
        raise ValueError(
            f"A feature's largest number must lie between {SMALLEST_FEATURE:g} and "
            f"{LARGEST_FEATURE:g}; scale them."
        )


def class_means(
    features: npt.NDArray[np.float32], targets: npt.NDArray[np.intp], classes: int
) -> npt.NDArray[np.float32]:
    """The direction of the mean of each class's unit rows: (C, D) float32."""
    rows = features.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    means = np.stack([rows[targets == label].mean(axis=0) for label in range(classes)])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return means.astype(np.float32)
