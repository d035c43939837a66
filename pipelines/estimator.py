"""CLIP-Adapter as a scikit-learn classifier on arrays of image features."""

from collections.abc import Sequence
from functools import cache
from typing import Literal, Self

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from clip_adapter.adapters.classifier import classifier_weights
from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.method import Grid
from clip_adapter.adapters.methods import METHODS
from clip_adapter.adapters.training import Schedule, Task
from clip_adapter.pipelines.adapter_layout import check_setting

Ratio = float | Literal["learned", "hypernet"]


class ClipAdapterClassifier(ClassifierMixin, BaseEstimator):
    """CLIP-Adapter (arXiv 2110.04544) as a scikit-learn classifier.

    `fit` is the training of the command `fit`, with its defaults, on all rows it is given, to the
    last epoch: choosing hyper-parameters is left to GridSearchCV.

    Parameters
    ----------
    text_features : array (C, D) or (C, P, D), or None
        Text features of the classes, with an axis for several prompt templates or without one, in
        the order of `classes`. They are normalised, averaged over templates and normalised again.
        None takes the mean direction of each class's training rows instead, as a nearest-centroid
        classifier does; without text there is no zero-shot classifier to adapt.
    classes : sequence of C labels, or None
        The labels that the rows of `text_features` belong to; None for the sorted labels that occur
        in y. With them, y need not hold every class.
    branch : {"image", "text", "both"}
        Where the adapter sits. The text branch adapts the classifier weights.
    alpha, beta : float in [0, 1], "learned" or "hypernet"
        Residual ratios of the image and the text adapter.
    alpha_init, beta_init : float in [0, 1]
        Where a learned or predicted ratio starts.
    reduction : int
        The bottleneck's width is D / reduction.
    learning_rate, weight_decay, epochs, batch_size, optimizer, warmup, drop_last :
        How it is trained; see `clip_adapter.adapters.training.Schedule`.
    logit_scale, logit_bias : float
        The backbone's; the scale is the multiplier itself (about 100 for CLIP).
    random_state : int, RandomState or None
        Decides initialisation and batch order.

    Attributes
    ----------
    classes_ : (C,), sorted. n_features_in_ : D.
    weights_ : (C, D) float32, the classifier weights before adaptation.
    setting_ : dict, arrays_ : dict of float32 arrays; what was fitted, in the terms of the
        adapter file.
    logit_scale_, logit_bias_ : float, as they were in fitting.

    Rows are image features as the encoder gives them, un-normalised; they are computed with in
    float32. Bad parameters and data raise ValueError.
    """

    def __init__(
        self,
        text_features: npt.ArrayLike | None = None,
        *,
        classes: Sequence[object] | None = None,
        branch: Literal["image", "text", "both"] = "image",
        alpha: Ratio = 0.2,
        beta: Ratio = Grid.beta[0],
        alpha_init: float = Grid.alpha_init,
        beta_init: float = Grid.beta_init,
        reduction: int = Grid.reduction[0],
        learning_rate: float = Grid.learning_rate[0],
        weight_decay: float = Grid.weight_decay[0],
        epochs: int = Schedule.epochs,
        batch_size: int = Schedule.batch_size,
        optimizer: Literal["adamw", "sgd"] = Schedule.optimizer,
        warmup: Literal["linear", "constant"] = Schedule.warmup,
        drop_last: bool = Schedule.drop_last,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.text_features = text_features
        self.classes = classes
        self.branch = branch
        self.alpha = alpha
        self.beta = beta
        self.alpha_init = alpha_init
        self.beta_init = beta_init
        self.reduction = reduction
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.warmup = warmup
        self.drop_last = drop_last
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fit on image features X (S, D) with labels y (S,) of any type that can be sorted."""
        features, labels = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(labels)
        self.classes_, order = self._known_classes(labels)
        targets = np.searchsorted(self.classes_, labels)
        if self.text_features is None:
            self.weights_ = _class_means(features, targets, len(self.classes_))
        else:
            self.weights_ = self._text_weights(features.shape[1])[order]
        self.setting_ = self._setting()
        self.logit_scale_, self.logit_bias_ = float(self.logit_scale), float(self.logit_bias)
        task = Task(
            features=jnp.asarray(features[None]),
            labels=jnp.asarray(targets, jnp.int32),
            validation_features=jnp.zeros((0, features.shape[1])),
            validation_labels=jnp.zeros(0, jnp.int32),
            weights=jnp.asarray(self.weights_),
            logit_scale=jnp.float32(self.logit_scale_),
            logit_bias=jnp.float32(self.logit_bias_),
            seed=jnp.int32(check_random_state(self.random_state).randint(2**31 - 1)),
        )
        self.arrays_ = METHODS["clip-adapter"].fit(self.setting_, None, task, _engine())
        if not all(np.isfinite(array).all() for array in self.arrays_.values()):
            raise ValueError("The training diverged; try a smaller learning_rate or scale X.")
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.generic]:
        """The most probable label of each row of X (N, D): (N,)."""
        best = self._logits(X).argmax(axis=1)
        return self.classes_[best]

    def predict_proba(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Softmax of the logits, (N, C) in the order of `classes_`."""
        return softmax(self._logits(X).astype(np.float64), axis=1)

    def _logits(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        check_is_fitted(self)
        features = validate_data(self, X, dtype=np.float32, reset=False)
        return METHODS["clip-adapter"].logits(
            self.setting_,
            self.arrays_,
            features,
            self.weights_,
            self.logit_scale_,
            self.logit_bias_,
        )

    def _known_classes(
        self, labels: npt.NDArray[np.generic]
    ) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.intp]]:
        """The classes, sorted, and for each the row of `text_features` it has."""
        present = np.unique(labels)
        if self.classes is None:
            return present, np.arange(len(present))
        if self.text_features is None:
            raise ValueError("classes says what the rows of text_features are: give those too.")
        known, order = np.unique(np.asarray(self.classes), return_index=True)
        if len(known) < len(self.classes):
            raise ValueError("classes names a label twice.")
        unknown = np.setdiff1d(present, known)
        if len(unknown):
            raise ValueError(f"y holds labels that are not among classes: {unknown.tolist()}.")
        return known, order

    def _text_weights(self, dim: int) -> npt.NDArray[np.float32]:
        features = check_array(self.text_features, dtype=np.float32, allow_nd=True)
        given = features.shape
        if features.ndim == 2:
            features = features[:, None]
        count = len(self.classes_)
        if features.ndim != 3 or len(features) != count or features.shape[2] != dim:
            raise ValueError(
                f"text_features has the shape {given}; {count} classes and "
                f"{dim} features in X need ({count}, {dim}) or ({count}, templates, {dim}). "
                "Where y does not hold every class, name all of them with classes."
            )
        return np.asarray(classifier_weights(jnp.asarray(features)))

    def _setting(self) -> dict[str, object]:
        """The hyper-parameters as the engine takes them."""
        schedule = Schedule(
            epochs=self.epochs,
            batch_size=self.batch_size,
            evaluate_every=self.epochs,
            optimizer=self.optimizer,
            warmup=self.warmup,
            drop_last=self.drop_last,
        )
        grid = Grid(
            branch=self.branch,
            alpha=(self.alpha,),
            beta=(self.beta,),
            alpha_init=self.alpha_init,
            beta_init=self.beta_init,
            reduction=(self.reduction,),
            learning_rate=(self.learning_rate,),
            weight_decay=(self.weight_decay,),
            schedule=schedule,
        )
        setting = METHODS["clip-adapter"].single(grid)
        check_setting("clip-adapter", setting)
        return setting


def _class_means(
    features: npt.NDArray[np.float32], targets: npt.NDArray[np.intp], classes: int
) -> npt.NDArray[np.float32]:
    """The direction of the mean of each class's unit rows: (C, D) float32."""
    rows = features.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    means = np.stack([rows[targets == label].mean(axis=0) for label in range(classes)])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return means.astype(np.float32)


@cache
def _engine() -> Engine:
    """One for the process, so that a grid search compiles a program once per shape."""
    return Engine()
