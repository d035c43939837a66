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
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from clip_adapter.adapters.engine.process import own_jax
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.formulas import classifier_weights
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Arrays, Head, Method, Task
from clip_adapter.adapters.registry import find_method
from clip_adapter.cache.schema import LARGEST_BIAS, LARGEST_SCALE, SMALLEST_SCALE
from clip_adapter.cores import available_cores
from clip_adapter.pipelines.saved.estimator_arrays import (
    check_size,
    checked_text,
    class_means,
    counted,
    known_classes,
    number,
)
from clip_adapter.pipelines.scoring.zero_shot import check_directions

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
        The backbone's; the scale is the multiplier itself (about 100 for CLIP). From 1e-6 to 1e10,
        and from −1e4 to 1e4.
    random_state : int, RandomState or None
        Decides initialisation and batch order.
    **hyper
        The method's hyper-parameters by name (`fit --method NAME --help` lists them); those not
        given have the table's defaults. A `reduction` at its default is at most D.

    Attributes
    ----------
    classes_ : (C,), sorted. n_features_in_ : D.
    weights_ : (C, D) float32, the classifier weights before adaptation.
    setting_ : dict, arrays_ : dict of float32 arrays; what was fitted, in the terms of the
        adapter file.
    logit_scale_, logit_bias_ : float, as they were in fitting.

    Rows are image features as the encoder gives them, un-normalised; they are computed with in
    float32. Bad parameters and data raise ValueError; so does a process that was forked from one
    which uses JAX, where it would wait for ever.

    Examples
    --------
    >>> from clip_adapter import FeatureCache, FewShotClassifier
    >>> with FeatureCache("features.h5") as cache:
    ...     texts, scale = cache.text_features(), cache.logit_scale
    ...     train, test = cache.images("train"), cache.images("test")
    >>> model = FewShotClassifier("tip-adapter", texts, logit_scale=scale)
    >>> model.fit(train.features[0], train.labels).score(test.features[0], test.labels) > 0.8
    True
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
        self._hyper = hyper  # scikit-learn knows what the signature names, and what begins so

    def __getattr__(self, name: str) -> Any:
        """A hyper-parameter that was given."""
        try:
            return vars(self)["_hyper"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Whatever is no parameter of the signature's and nothing fitted is a hyper-parameter."""
        if name.strip("_") != name or name in FewShotClassifier._get_param_names():
            super().__setattr__(name, value)
        else:
            self._hyper[name] = value

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name, the method's hyper-parameters among them."""
        try:
            table = {n: value for n, (value,) in self._method().values({}, one=True).items()}
        except ValueError:  # a method that there is not; `fit` says so
            table = self._hyper
        return super().get_params(deep) | {n: self._hyper.get(n, v) for n, v in table.items()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters; the method first, as it decides which others there are. Another method
        starts from its own defaults: what was set for the one before is forgotten."""
        if "method" in params:
            before, known = self.method, super().get_params(False).keys()
            values = {n: v for n, v in self.get_params(False).items() if n not in known}
            super().set_params(method=params.pop("method"))
            try:
                same = before == self.method or self._method().name == before
                self._hyper = self._hyper if same else {}
            except ValueError:
                self._hyper = values
        return super().set_params(**params)

    def fit(
        self, X: npt.ArrayLike, y: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None
    ) -> Self:
        """Fit on image features X (S, D) with labels y (S,) of any type that can be sorted.

        sample_weight: (S,) whole numbers, how often each row counts; a row that is there twice and
            one of weight 2 are the same.
        """
        method = self._method()
        features, labels = validate_data(self, X, y, dtype=np.float32)
        check_size(features)
        check_classification_targets(labels)
        features, labels = counted(features, labels, sample_weight)
        self.classes_, order = known_classes(labels, self.classes, self.text_features)
        targets = np.searchsorted(self.classes_, labels)
        if self.text_features is None:
            self._text_ = class_means(features, targets, len(self.classes_))[:, None]
        else:
            shape = len(self.classes_), features.shape[1]
            self._text_ = checked_text(self.text_features, *shape)[order]
            check_directions(self._text_, self.classes_.tolist())
        self.setting_ = self._setting(method, features.shape[1])
        self.logit_scale_ = number("logit_scale", self.logit_scale, SMALLEST_SCALE, LARGEST_SCALE)
        self.logit_bias_ = number("logit_bias", self.logit_bias, -LARGEST_BIAS, LARGEST_BIAS)
        with own_jax():
            self.weights_ = np.asarray(classifier_weights(jnp, jnp.asarray(self._text_)))
            self.arrays_ = self._fitted(method, features, targets)
        if not all(np.isfinite(array).all() for array in self.arrays_.values()):
            raise ValueError("Training diverged; try a smaller learning_rate.")
        return self

    def _fitted(
        self, method: Method, features: npt.NDArray[np.float32], targets: npt.NDArray[np.intp]
    ) -> Arrays:
        task = Task(
            features=features[None],
            labels=targets.astype(np.int32),
            validation_features=np.zeros((0, features.shape[1]), np.float32),
            validation_labels=np.zeros(0, np.int32),
            head=self._head(),
            seed=np.int32(check_random_state(self.random_state).randint(2**31 - 1)),
        )
        return fit(method, self.setting_, None, jax.tree.map(jnp.asarray, task), _engine())

    def _method(self) -> Method:
        try:
            if not isinstance(self.method, str):
                raise LookupError(f"method is {self.method!r:.80} and no name")
            return find_method(self.method)
        except LookupError as error:
            raise ValueError(f"{error}.") from None

    def _setting(self, method: Method, dim: int) -> dict[str, Value]:
        """The hyper-parameters as `fit` takes them."""
        if lacking := set(method.needs) - {"text"}:
            raise ValueError(f"{method.name} needs more than features: {', '.join(lacking)}.")
        if unknown := [name for name in self._hyper if name not in method.hyper]:
            raise ValueError(f"{method.name} has no {', '.join(unknown)}.")
        given = {name: (value,) for name, value in self._hyper.items()}
        setting = method.settings(method.values(given, one=True))[0]
        # Of fewer columns than it divides by, a default would leave a bottleneck no unit.
        default = method.defaults().get("reduction", 0)
        if isinstance(default, int) and setting.get("reduction") == default > dim:
            setting["reduction"] = dim
        return setting

    def _head(self) -> Head:
        scale, bias = np.float32(self.logit_scale_), np.float32(self.logit_bias_)
        text = self._text_ if "text" in self._method().needs else None
        return Head(self.weights_, scale, bias, text)

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.generic]:
        """The most probable label of each row of X (N, D): (N,)."""
        best = self._logits(X).argmax(axis=1)
        return self.classes_[best]

    def decision_function(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The logits (N, C) in the order of `classes_`; of two classes (N,), the second one's minus
        the first one's."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Softmax of the logits, (N, C) in the order of `classes_`."""
        return softmax(self._logits(X).astype(np.float64), axis=1)

    def _logits(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        check_is_fitted(self)
        features = validate_data(self, X, dtype=np.float32, reset=False)
        check_size(features)
        return make_classify(self._method(), self.setting_, self.arrays_, self._head())(features)


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
    """CLIP-Adapter (arXiv 2110.04544): FewShotClassifier with that method.

    Examples
    --------
    >>> import numpy as np
    >>> from clip_adapter import ClipAdapterClassifier
    >>> labels = np.repeat(["cat", "eel"], 8)
    >>> features = np.random.default_rng(0).normal(size=(16, 32)) + (labels == "cat")[:, None]
    >>> ClipAdapterClassifier(epochs=50).fit(features, labels).predict(features).shape
    (16,)
    """

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


@cache
def _engine() -> Engine:
    """One for the process, so that a grid search compiles a program once per shape."""
    return Engine(cores=available_cores())
