"""A task of real CLIP size whose accuracy depends on the hyper-parameters."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Images and texts of CLIP lie in two narrow cones; classes and their noise share few directions.
DIRECTIONS = 60
FEATURE_NORM = 2.5
LOGIT_SCALE = 100.0

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SyntheticTask:
    """features (S, D), labels (S,); validation (M, D) and (M,); weights (C, D), unit rows."""

    features: Floats
    labels: Labels
    validation_features: Floats
    validation_labels: Labels
    weights: Floats


class Population:
    """Classes whose images and texts can be drawn; alike for equal arguments."""

    def __init__(self, dim: int, classes: int) -> None:
        self.rng = rng = np.random.default_rng(0)
        self._dim = dim
        self._basis = np.linalg.qr(rng.normal(size=(dim, DIRECTIONS)))[0].T
        self._image_cone, text_cone = _unit(rng.normal(size=(2, dim)))
        self._means = _unit(rng.normal(size=(classes, DIRECTIONS)) @ self._basis)
        self._shifts = _unit(rng.normal(size=(classes, DIRECTIONS)) @ self._basis)
        self.weights = _unit(0.85 * text_cone + 0.5 * self._means).astype(np.float32)

    def images(self, labels: Labels, rng: np.random.Generator) -> Floats:
        """(N, D), an image of each label."""
        within = _unit(rng.normal(size=(len(labels), DIRECTIONS)) @ self._basis)
        beyond = _unit(rng.normal(size=(len(labels), self._dim)))
        clean = 0.8 * self._image_cone + 0.22 * self._means[labels] + 0.2 * self._shifts[labels]
        return (FEATURE_NORM * _unit(clean + 0.45 * within + 0.35 * beyond)).astype(np.float32)


def synthetic_task(dim: int, classes: int, shots: int, validation_shots: int) -> SyntheticTask:
    """Zero-shot is right for about 70 % of the images, a fitted adapter for more."""
    drawn = Population(dim, classes)
    labels = np.repeat(np.arange(classes, dtype=np.int32), shots)
    validation = np.repeat(np.arange(classes, dtype=np.int32), validation_shots)
    images, judging = (drawn.images(own, drawn.rng) for own in (labels, validation))
    return SyntheticTask(images, labels, judging, validation, drawn.weights)


def _unit(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
