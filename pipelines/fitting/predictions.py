"""What was predicted for each test image, and where that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clip_adapter.adapters.method import Arrays, Method, Setting
from clip_adapter.adapters.scoring import make_classify
from clip_adapter.cache import files
from clip_adapter.cache.errors import UserError
from clip_adapter.pipelines.fitting.data import Data


@dataclass(frozen=True)
class Predictions:
    """Of N test images, in the cache's order.

    labels: (N,) int32, the true classes. predicted: (N,) int32. confidence: (N,) float32, the
    softmax probability of the predicted class.
    """

    labels: npt.NDArray[np.int32]
    predicted: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each is correct."""
        return self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return float(np.mean(self.right))

    def content(self) -> bytes:
        """As a safetensors file."""
        return save(
            {
                "labels": self.labels,
                "predicted": self.predicted,
                "confidence": self.confidence,
            }
        )


def predict_test(
    method: Method, setting: Setting, arrays: Arrays, data: Data
) -> Predictions | None:
    """Classify the test images of the data's classes, block by block; None where there are none."""
    if "test" not in data.cache.splits:
        return None
    classify = make_classify(method, setting, arrays, data.head(method))
    labels, predicted, confidence = [], [], []
    for features, own in data.test_blocks(method):
        logits = classify(features).astype(np.float64)
        best = logits.argmax(axis=1)
        top = logits[np.arange(len(best)), best]
        labels.append(own)
        predicted.append(best.astype(np.int32))
        confidence.append((1 / np.exp(logits - top[:, None]).sum(axis=1)).astype(np.float32))
    if not labels:
        return None
    return Predictions(*map(np.concatenate, (labels, predicted, confidence)))


def predictions_path(method: str, shots: Any, seed: int) -> str:
    """Where a run folder keeps those of a method on a task."""
    return f"predictions/{method}/shots-{shots}-seed-{seed}.safetensors"


def read_predictions(run: Path, method: str, shots: Any, seed: int) -> Predictions:
    """Read those of a method on a task from a run folder.

    Raises UserError where there are none that can be used.
    """
    path = run / predictions_path(method, shots, seed)
    try:
        tensors = load(files.read_bytes(path))
        found = Predictions(tensors["labels"], tensors["predicted"], tensors["confidence"])
        if found.labels.ndim != 1 or not (
            found.labels.shape == found.predicted.shape == found.confidence.shape
        ):
            raise ValueError("shapes")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read; fit it again.") from error
    return found
