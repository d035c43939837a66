"""ClipAdapterClassifier keeps scikit-learn's contract and trains what the engine trains."""

import inspect
import pickle
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from clip_adapter.adapters.registry import METHODS
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter
from clip_adapter.pipelines.saved.sklearn import ClipAdapterClassifier, FewShotClassifier

# What scikit-learn skips by itself where its optional companions are not there.
SKIPPED_BY_SCIKIT_LEARN = {
    "check_array_api_input",  # needs SCIPY_ARRAY_API in the environment
    "check_classifier_data_not_an_array",  # needs pandas
}

CALLS = ("predict", "predict_proba", "decision_function")
NO_SCALES = (0, -1.0, float("nan"), float("inf"), 3e38, 1e-40, "much", None, 10**400)
NO_BIASES = (float("nan"), -float("inf"), 1e39, -1e30, "some", None)
CANCELLING = np.random.default_rng(0).normal(size=(10, 2, 128))
CANCELLING[0, 1] = -CANCELLING[0, 0]


@pytest.mark.parametrize(
    "estimator",
    [
        ClipAdapterClassifier(epochs=20),
        FewShotClassifier(epochs=20),
        FewShotClassifier("zero-shot"),
        FewShotClassifier("linear-probe"),
    ],
    ids=repr,
)
def test_scikit_learns_estimator_checks(estimator: FewShotClassifier) -> None:
    """All of them, none excepted; without text features, as the checks make up their classes."""
    results = check_estimator(estimator, on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert failed == {}
    skipped = {r["check_name"] for r in results if r["status"] == "skipped"}
    assert skipped <= SKIPPED_BY_SCIKIT_LEARN
    assert sum(r["status"] == "passed" for r in results) > 45


@pytest.fixture
def X(digits: Any) -> np.ndarray:
    return digits.features[:40]


@pytest.fixture
def y(digits: Any) -> np.ndarray:
    return digits.labels[:40]


def quick(digits: Any, **changes: Any) -> ClipAdapterClassifier:
    """A classifier with the schedule of the saved adapters, so that programs are shared."""
    parameters = {
        "text_features": digits.text_features,
        "epochs": 10,
        "batch_size": 16,
        "alpha": 0.6,
        "random_state": 1,
    }
    return ClipAdapterClassifier(**(parameters | changes))


def test_alpha_zero_is_zero_shot_exactly(digits: Any, X: np.ndarray, y: np.ndarray) -> None:
    model = quick(digits, alpha=0.0, logit_scale=20.0, logit_bias=3.0).fit(X, y)
    rows = digits.features / np.linalg.norm(digits.features, axis=1, keepdims=True)
    logits = 20.0 * rows.astype(np.float64) @ digits.weights.T + 3.0
    np.testing.assert_allclose(
        model.predict_proba(digits.features), softmax(logits, axis=1), atol=1e-5
    )
    assert np.array_equal(model.predict(digits.features), logits.argmax(axis=1))


def test_fitting_beats_zero_shot_on_images_not_seen(
    digits: Any, X: np.ndarray, y: np.ndarray
) -> None:
    new_X, new_y = digits.features[40:], digits.labels[40:]
    zero_shot = quick(digits, alpha=0.0).fit(X, y).score(new_X, new_y)
    assert quick(digits, learning_rate=0.01).fit(X, y).score(new_X, new_y) > zero_shot + 0.05


def test_without_text_the_class_means_are_adapted(
    digits: Any, X: np.ndarray, y: np.ndarray
) -> None:
    model = quick(digits, text_features=None, alpha=0.0).fit(X, y)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    means = np.stack([unit[y == label].mean(axis=0) for label in range(10)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.array_equal(model.predict(X), (unit @ means.T).argmax(axis=1))


def test_text_rows_follow_the_classes_they_are_named_for(
    digits: Any, X: np.ndarray, y: np.ndarray
) -> None:
    names = np.array(["nought", "one", "two", "three", "four", "five", "six", "7", "8", "9"])
    plain = quick(digits).fit(X, y)
    order = np.random.default_rng(0).permutation(10)
    named = quick(digits, text_features=digits.text_features[order], classes=names[order].tolist())
    named.fit(X, names[y])
    assert named.classes_.tolist() == sorted(names)
    # The order of classes changes only the order of sums.
    assert np.mean(named.predict(X) == names[plain.predict(X)]) > 0.97
    seven = named.weights_[named.classes_.tolist().index("7")]
    np.testing.assert_allclose(seven, digits.weights[7], atol=1e-6)


def test_classes_without_images_can_be_predicted(digits: Any, X: np.ndarray, y: np.ndarray) -> None:
    seen = y < 5
    model = quick(digits, classes=range(10)).fit(X[seen], y[seen])
    assert set(range(5, 10)) & set(model.predict(X[~seen]).tolist())
    assert model.predict_proba(X).shape == (40, 10)


def test_one_template_needs_no_axis(digits: Any, X: np.ndarray, y: np.ndarray) -> None:
    flat = quick(digits, text_features=7 * digits.weights).fit(X, y)
    np.testing.assert_allclose(flat.weights_, digits.weights, atol=1e-6)


@pytest.mark.parametrize("name", ["both-fixed", "both-hypernet"])
def test_it_trains_what_the_engine_trains(
    digits: Any, X: np.ndarray, y: np.ndarray, saved_adapters: Mapping[str, SavedAdapter], name: str
) -> None:
    info, arrays = saved_adapters[name].info, saved_adapters[name].arrays
    setting = {key: value for key, value in info.setting.items() if key != "evaluate_every"}
    scale = {"logit_scale": info.logit_scale, "logit_bias": info.logit_bias}
    model = quick(digits, **setting, **scale).fit(X, y)
    assert model.arrays_.keys() == arrays.keys()
    assert all(np.array_equal(model.arrays_[key], array) for key, array in arrays.items())


def test_pipeline_grid_search_clone_and_pickle(digits: Any, X: np.ndarray, y: np.ndarray) -> None:
    pipeline = make_pipeline(FunctionTransformer(), quick(digits, learning_rate=1e-3))
    name = "clipadapterclassifier__alpha"
    search = GridSearchCV(pipeline, {name: [0.0, 0.6]}, cv=StratifiedKFold(2), error_score="raise")
    search.fit(X, y)
    assert search.best_params_[name] in (0.0, 0.6)
    assert len(set(search.cv_results_["mean_test_score"])) == 2
    model = search.best_estimator_[-1]
    assert clone(model).get_params()["alpha"] == search.best_params_[name]
    with pytest.raises(NotFittedError):
        clone(model).predict(X)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if set(m.needs) <= {"text"}])
def test_every_method_trains_what_its_saved_adapter_holds(
    digits: Any, X: np.ndarray, y: np.ndarray, saved_adapters: Mapping[str, SavedAdapter], name: str
) -> None:
    adapter = saved_adapters[name]
    info = adapter.info
    model = FewShotClassifier(
        name,
        digits.text_features,
        logit_scale=info.logit_scale,
        logit_bias=info.logit_bias,
        random_state=1,
        **info.setting,
    ).fit(X, y)
    assert model.setting_ == info.setting
    assert model.arrays_.keys() == adapter.arrays.keys()
    assert all(np.array_equal(model.arrays_[k], array) for k, array in adapter.arrays.items())
    assert model.score(X, y) > 0.6


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if set(m.needs) - {"text"}])
def test_a_method_that_needs_more_than_features_says_so(
    digits: Any, X: np.ndarray, y: np.ndarray, name: str
) -> None:
    needed = next(iter(METHODS[name].needs))
    with pytest.raises(ValueError, match=f"{name} needs more than features: {needed}"):
        FewShotClassifier(name, digits.text_features).fit(X, y)


def test_the_signature_names_the_hyper_parameters() -> None:
    table = METHODS["clip-adapter"].hyper
    named = inspect.signature(ClipAdapterClassifier).parameters
    assert {n: named[n].default for n in table} == {n: h.default for n, h in table.items()}
    assert list(named)[:2] == ["text_features", "classes"] and "method" not in named


def test_a_grid_search_may_choose_the_method(digits: Any, X: np.ndarray, y: np.ndarray) -> None:
    """Another method starts from its own defaults, also after scikit-learn has cloned them all."""
    model = clone(FewShotClassifier("tip-adapter", digits.text_features, alpha=3.0))
    model.set_params(method="taskres", epochs=5)
    assert model.get_params()["alpha"] == METHODS["taskres"].hyper["alpha"].default
    model.set_params(method="taskres", alpha=1.0)
    assert model.get_params()["alpha"] == 1.0 and model.get_params()["epochs"] == 5
    grid = [{"method": ["zero-shot"]}, {"method": ["tip-adapter"], "alpha": [1.0, 5.0]}]
    start = FewShotClassifier("taskres", digits.text_features, epochs=5)
    search = GridSearchCV(start, grid, cv=StratifiedKFold(2), error_score="raise").fit(X, y)
    assert len(search.cv_results_["params"]) == 3
    with pytest.raises(ValueError, match="no method 'tip'; the methods are"):
        FewShotClassifier("tip").fit(X, y)
    with pytest.raises(ValueError, match="Invalid parameter 'sharpness'"):
        start.set_params(sharpness=1.0)


@pytest.mark.parametrize("name", ["clip-adapter", "tip-adapter", "linear-probe"])
def test_a_weight_is_as_many_copies(digits: Any, X: np.ndarray, y: np.ndarray, name: str) -> None:
    counts = np.random.default_rng(3).integers(0, 3, len(y))
    order = np.random.default_rng(4).permutation(counts.sum())
    model = FewShotClassifier(name, digits.text_features, classes=range(10), random_state=1)
    if name == "clip-adapter":
        model.set_params(epochs=10, batch_size=16)
    weighted = clone(model).fit(X, y, sample_weight=counts)
    copied = clone(model).fit(X.repeat(counts, 0)[order], y.repeat(counts)[order])
    assert all(np.array_equal(array, copied.arrays_[n]) for n, array in weighted.arrays_.items())
    ones = clone(model).fit(X, y, sample_weight=np.ones(len(y)))
    plain = clone(model).fit(X, y)
    assert np.array_equal(ones.decision_function(X), plain.decision_function(X))
    assert not np.array_equal(ones.decision_function(X), weighted.decision_function(X))


@pytest.mark.parametrize("weights", [[0.5], [-1.0], [0.0], [1e9], [np.nan]])
def test_other_weights_are_refused(X: np.ndarray, y: np.ndarray, weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"(?i)sample.weight"):
        FewShotClassifier("zero-shot").fit(X, y, sample_weight=weights * len(y))


def test_the_decision_function_is_the_logits(digits: Any, X: np.ndarray, y: np.ndarray) -> None:
    model = FewShotClassifier("zero-shot", digits.text_features, logit_scale=20, logit_bias=3)
    rows = X.astype(np.float64) / np.linalg.norm(X, axis=1, keepdims=True)
    logits = 20 * rows @ digits.weights.T + 3
    np.testing.assert_allclose(model.fit(X, y).decision_function(X), logits, atol=1e-4)
    two = clone(model).set_params(text_features=digits.text_features[:2]).fit(X[y < 2], y[y < 2])
    found = two.decision_function(X)
    np.testing.assert_allclose(found, logits[:, 1] - logits[:, 0], atol=1e-4)
    assert np.array_equal(two.predict(X), (found > 0).astype(int))


@pytest.mark.parametrize("size", [1e-9, 1e7, 1e21, np.inf, np.nan])
def test_what_fit_refuses_predict_refuses_too(X: np.ndarray, y: np.ndarray, size: float) -> None:
    model = FewShotClassifier("zero-shot").fit(X, y)
    rows = (X / np.abs(X).max(axis=1, keepdims=True) * size).astype(np.float32)
    for call in (lambda: model.fit(rows, y), *(lambda n=n: getattr(model, n)(rows) for n in CALLS)):
        with pytest.raises(ValueError, match=r"largest number must lie|NaN|infinity"):
            call()


FORKED = """
import multiprocessing
import jax, numpy as np
from clip_adapter.pipelines.saved.sklearn import FewShotClassifier
def fit(name): return FewShotClassifier(name).fit(np.eye(4), [0, 0, 1, 1]).predict(np.eye(4))
def call(name):
    try: return fit(name)
    except ValueError as error: return str(error)
jax.devices()
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map_async(call, ["zero-shot"]).get(60)[0])
"""


def test_a_forked_process_says_so_instead_of_waiting_for_ever() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("This process was forked from one that uses JAX"), done.stderr
    assert "loky" in done.stdout


def test_jax_as_its_process_has_it(digits: Any, X: np.ndarray, y: np.ndarray) -> None:
    """Computes the same, and is as it was afterwards."""
    plain = quick(digits).fit(X, y).decision_function(X)
    with ExitStack() as stack:
        for setting in (
            jax.enable_x64(True),
            jax.disable_jit(),
            jax.debug_nans(True),
            jax.debug_infs(True),
            jax.default_matmul_precision("bfloat16"),
            jax.numpy_dtype_promotion("strict"),
            jax.numpy_rank_promotion("raise"),
            jax.default_prng_impl("rbg"),
            jax.threefry_partitionable(False),
            jax.legacy_prng_key("error"),
            jax.transfer_guard("disallow"),
        ):
            stack.enter_context(setting)
        assert np.array_equal(quick(digits).fit(X, y).decision_function(X), plain)
        with pytest.raises(ValueError, match="diverged"):
            quick(digits, learning_rate=1e30).fit(X, y)
        assert jax.eval_shape(lambda: jax.numpy.zeros(1)).dtype == np.float64


def test_random_state_decides(digits: Any, X: np.ndarray, y: np.ndarray) -> None:
    one, same, other = (quick(digits, random_state=s).fit(X, y) for s in (1, 1, 2))
    assert np.array_equal(one.predict_proba(X), same.predict_proba(X))
    assert not np.array_equal(one.predict_proba(X), other.predict_proba(X))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"alpha": 1.5}, r"alpha is 1.5, not a number in \[0, 1\]"),
        ({"alpha": "guessed"}, "alpha is 'guessed'"),
        ({"branch": "audio"}, "branch is 'audio'"),
        ({"branch": "both", "beta": -0.1}, "beta is -0.1"),
        ({"reduction": 0}, "reduction is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"optimizer": "lbfgs"}, "optimizer is 'lbfgs'"),
        ({"rate": 0.1}, "clip-adapter has no rate"),
        ({"text_features": np.ones((10, 64))}, r"text_features has the shape \(10, 64\)"),
        ({"text_features": np.ones((9, 128))}, "10 classes and 128 features"),
        ({"text_features": np.full((10, 128), np.nan)}, "NaN"),
        ({"classes": range(1, 11)}, r"y holds labels that are not among classes: \[0\]"),
        ({"classes": [0, 0, *range(2, 10)]}, "names a label twice"),
        ({"classes": range(10), "text_features": None}, "give those too"),
        ({"learning_rate": 1e30}, "diverged"),
        *(({"logit_scale": s}, "logit_scale is .*, not a number") for s in NO_SCALES),
        *(({"logit_bias": b}, "logit_bias is .*, not a number") for b in NO_BIASES),
        ({"text_features": CANCELLING}, "The text features of 0 cancel"),
    ],
)
def test_bad_parameters_are_named(
    digits: Any, X: np.ndarray, y: np.ndarray, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        quick(digits, **changes).fit(X, y)
