"""What was predicted for each test image, and where that is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clip_adapter import files
from clip_adapter.errors import UserError

PREDICTIONS = "predictions"
TEXTS = ("ids", "class_names")


@dataclass(frozen=True)
class Predictions:
    """Of N test images, in the cache's order.

    labels: (N,) int32, the true classes. predicted: (N,) int32. confidence: (N,) float32, the
    softmax probability of the predicted class. ids: of the N images. class_names: of the classes,
    in label order.
    """

    labels: npt.NDArray[np.int32]
    predicted: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    ids: Sequence[str]
    class_names: Sequence[str]

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each is correct."""
        return self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return float(np.mean(self.right))

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that have test images, in [0, 1]."""
        return float(np.mean(recalls(self.labels, self.right)[1]))

    @property
    def uneven(self) -> bool:
        """Whether classes differ so much in size that balanced accuracy is worth a place beside
        accuracy: the largest has a quarter more images than the smallest that has some."""
        counts = np.unique(self.labels, return_counts=True)[1]
        return bool(counts.max() >= 1.25 * counts.min())

    def content(self) -> bytes:
        """As a safetensors file; texts, which none can hold, are the bytes of their JSON."""
        arrays = {name: getattr(self, name) for name in ("labels", "predicted", "confidence")}
        for name in TEXTS:
            text = json.dumps(list(getattr(self, name)))
            arrays[name] = np.frombuffer(text.encode(), np.uint8)
        return save(arrays)


def recalls(
    labels: npt.NDArray[np.int32], right: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The classes that have images, and of each the share of its images that is right.

    right: (N,) whether each image is, or how often.
    """
    counts = np.bincount(labels)
    there = np.flatnonzero(counts)
    return there, np.bincount(labels, weights=right)[there] / counts[there]


def most_frequent(labels: npt.NDArray[np.int32]) -> tuple[int, float]:
    """The class of most images (of several the first), and its share of all of them."""
    counts = np.bincount(labels)
    return int(counts.argmax()), float(counts.max() / counts.sum())


def predictions_path(method: str, shots: Any, seed: int) -> str:
    """Where a run folder keeps those of a method on a task."""
    return f"{PREDICTIONS}/{method}/shots-{shots}-seed-{seed}.safetensors"


def read_predictions(run: Path, method: str, shots: Any, seed: int) -> Predictions:
    """Read those of a method on a task from a run folder.

    Raises UserError where there are none that can be used.
    """
    path = run / predictions_path(method, shots, seed)
    try:
        tensors = load(files.read_bytes(path))
        arrays = tensors["labels"], tensors["predicted"], tensors["confidence"]
        predictions = Predictions(*arrays, *(_texts(tensors[name]) for name in TEXTS))
        if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 1:
            raise ValueError("shapes")
    except (
        *(OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError),
        RecursionError,
    ) as error:
        raise UserError(f"{path} cannot be read; fit it again.") from error
    return predictions


def _texts(stored: npt.NDArray[np.uint8]) -> Sequence[str]:
    texts = json.loads(stored.tobytes())
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("no list of texts")
    return texts
