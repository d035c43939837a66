"""Any method as a scikit-learn classifier on arrays of image features."""

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, Self, TypeVar

import jax
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
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Head, Method, Task
from clip_adapter.adapters.methods import find_method
from clip_adapter.adapters.scoring import make_classify
from clip_adapter.adapters.search import fit
from clip_adapter.cache.cores import available_cores
from clip_adapter.cache.schema import LARGEST_FEATURE, SMALLEST_FEATURE

Estimator = TypeVar("Estimator", bound=type[Any])


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """A method of this package as a scikit-learn classifier.

    `fit` is the training of the command `fit`, with its defaults, on all rows it is given, to the
    last epoch: choosing hyper-parameters is left to GridSearchCV.

    Parameters
    ----------
    method : str
        The method's name, such as "clip-adapter" or "tip-adapter".
    text_features : array (C, D) or (C, P, D), or None
        Text features of the classes, with an axis for several prompt templates or without one, in
        the order of `classes`. They are normalised, averaged over templates and normalised again.
        None takes the mean direction of each class's training rows instead, as a nearest-centroid
        classifier does; without text there is no zero-shot classifier to adapt.
    classes : sequence of C labels, or None
        The labels that the rows of `text_features` belong to; None for the sorted labels that occur
        in y. With them, y need not hold every class.
    logit_scale, logit_bias : float
        The backbone's; the scale is the multiplier itself (about 100 for CLIP).
    random_state : int, RandomState or None
        Decides initialisation and batch order.
    **hyper
        The method's hyper-parameters by name (`fit --method NAME --help` lists them); those not
        given have the table's defaults.

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
        method: str = "clip-adapter",
        text_features: npt.ArrayLike | None = None,
        *,
        classes: Sequence[object] | None = None,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        random_state: int | np.random.RandomState | None = None,
        **hyper: Any,
    ) -> None:
        self.method = method
        self.text_features = text_features
        self.classes = classes
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.random_state = random_state
        self.__dict__ |= hyper

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name, the method's hyper-parameters among them."""
        own = super().get_params(deep)
        return own | {n: getattr(self, n, v) for n, v in self._method().defaults().items()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters; the method first, as it decides which others there are. Another method
        starts from its own defaults: what was set for the one before is forgotten."""
        if "method" in params:
            before = self._method()
            super().set_params(method=params.pop("method"))
            if self._method() is not before:
                for name in before.hyper.keys() & vars(self).keys():
                    delattr(self, name)
        return super().set_params(**params)

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fit on image features X (S, D) with labels y (S,) of any type that can be sorted."""
        method = self._method()
        features, labels = validate_data(self, X, y, dtype=np.float32)
        _check_size(features)
        check_classification_targets(labels)
        self.classes_, order = self._known_classes(labels)
        targets = np.searchsorted(self.classes_, labels)
        if self.text_features is None:
            self._text_ = _class_means(features, targets, len(self.classes_))[:, None]
        else:
            self._text_ = self._text(features.shape[1])[order]
        self.weights_ = np.asarray(classifier_weights(jnp, jnp.asarray(self._text_)))
        self.setting_ = self._setting(method)
        self.logit_scale_, self.logit_bias_ = float(self.logit_scale), float(self.logit_bias)
        task = Task(
            features=features[None],
            labels=targets.astype(np.int32),
            validation_features=np.zeros((0, features.shape[1]), np.float32),
            validation_labels=np.zeros(0, np.int32),
            head=self._head(),
            seed=np.int32(check_random_state(self.random_state).randint(2**31 - 1)),
        )
        self.arrays_ = fit(method, self.setting_, None, jax.tree.map(jnp.asarray, task), _engine())
        if not all(np.isfinite(array).all() for array in self.arrays_.values()):
            raise ValueError("Training diverged; try a smaller learning_rate.")
        return self

    def _method(self) -> Method:
        try:
            return find_method(self.method)
        except LookupError as error:
            raise ValueError(f"{error}.") from None

    def _setting(self, method: Method) -> dict[str, Value]:
        """The hyper-parameters as `fit` takes them."""
        if lacking := set(method.needs) - {"text"}:
            raise ValueError(f"{method.name} needs more than features: {', '.join(lacking)}.")
        own = {*method.hyper, *self._get_param_names(), "method"}
        # scikit-learn's own attributes begin, and what was fitted ends, with an underscore.
        if unknown := [n for n in vars(self) if n not in own and n.strip("_") == n]:
            raise ValueError(f"{method.name} has no {', '.join(unknown)}.")
        given = {name: (getattr(self, name),) for name in method.hyper if hasattr(self, name)}
        return method.settings(method.values(given, one=True))[0]

    def _head(self) -> Head:
        scale, bias = np.float32(self.logit_scale_), np.float32(self.logit_bias_)
        text = self._text_ if "text" in self._method().needs else None
        return Head(self.weights_, scale, bias, text)

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
        return make_classify(self._method(), self.setting_, self.arrays_, self._head())(features)

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

    def _text(self, dim: int) -> npt.NDArray[np.float32]:
        """The text features (C, P, D), in the order in which they were given."""
        features = check_array(self.text_features, dtype=np.float32, allow_nd=True)
        _check_size(features)
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
        return features


def _with_named_parameters(estimator: Estimator) -> Estimator:
    """Name the hyper-parameters of the class's method in its signature, which is what scikit-learn
    and editors read."""
    signature = inspect.signature(estimator.__init__)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=hyper.default)
        for name, hyper in find_method(estimator.method).hyper.items()
    ]
    estimator.__init__.__signature__ = signature.replace(parameters=[*own, *named])
    return estimator


@_with_named_parameters
class ClipAdapterClassifier(FewShotClassifier):
    """CLIP-Adapter (arXiv 2110.04544): FewShotClassifier with that method."""

    method = "clip-adapter"

    def __init__(
        self,
        text_features: npt.ArrayLike | None = None,
        *,
        classes: Sequence[object] | None = None,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        random_state: int | np.random.RandomState | None = None,
        **hyper: Any,
    ) -> None:
        super().__init__(
            self.method,
            text_features,
            classes=classes,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            random_state=random_state,
            **self._method().defaults() | hyper,
        )


def _check_size(features: npt.NDArray[np.float32]) -> None:
    """Raises ValueError where products of (…, D) features would leave float32."""
    largest = np.abs(features).max(axis=-1)
    if largest.max() > LARGEST_FEATURE or (largest[largest < SMALLEST_FEATURE] > 0).any():
        raise ValueError(
            f"A feature's largest number must lie between {SMALLEST_FEATURE:g} and "
            f"{LARGEST_FEATURE:g}; scale them."
        )


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
    return Engine(cores=available_cores())
