"""What was predicted for each test image, and where that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clip_adapter.cache import files
from clip_adapter.cache.errors import UserError


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
