"""The linear probe against scikit-learn, and CLIP's sweep over C."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.linear_probe import LinearProbe, Sweep, fit_linear_probe
from clip_adapter.adapters.method import Grid, Search
from tests.adapters.tasks import separable_task

CLASSES = 4


def labelled(scale: float, offset: float, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes around random centres: separable in as many dimensions as images, not in a few."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), 20)
    centres = rng.normal(size=(CLASSES, dim))
    features = scale * (centres[labels] + 1.5 * rng.normal(size=(len(labels), dim)) + offset)
    return features.astype(np.float32), labels


@pytest.mark.parametrize("c", [1e-3, 0.316, 30.0, 1e3])
@pytest.mark.parametrize(
    ("scale", "offset", "dim", "separable"),
    [(1.0, 0.0, 6, False), (0.01, 0.0, 6, False), (20.0, 0.5, 6, False), (1.0, 0.5, 80, True)],
)
def test_it_is_scikit_learns_logistic_regression(
    scale: float, offset: float, dim: int, separable: bool, c: float
):
    features, labels = labelled(scale, offset, dim)
    # Scaled features with C scaled against it: the same problem, one that scikit-learn solves well.
    c_here = c / scale**2
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=20000)
    reference.fit(features.astype(np.float64) / scale, labels)
    if c > 1:
        assert (reference.score(features / scale, labels) == 1) == separable
    found = fit_linear_probe(features, labels, CLASSES, c_here)
    kernel, bias = reference.coef_.T / scale, reference.intercept_
    np.testing.assert_allclose(found["kernel"], kernel, atol=1e-2 * np.abs(kernel).max())
    np.testing.assert_allclose(
        features @ found["kernel"] + found["bias"], features @ kernel + bias, atol=0.1
    )

    def objective(kernel: np.ndarray, bias: np.ndarray) -> float:
        logits = features.astype(np.float64) @ kernel + bias
        likelihood = logits[np.arange(len(labels)), labels] - np.log(np.exp(logits).sum(axis=1))
        return -c_here * likelihood.sum() + 0.5 * (kernel.astype(np.float64) ** 2).sum()

    assert objective(**found) == pytest.approx(
        objective(kernel, bias), rel=1e-3 if separable else 1e-5
    )


def test_separable_data_at_a_large_c_are_classified():
    task = separable_task(noise=0.3)
    found = fit_linear_probe(task.features[0], task.labels, 4, 1e6)
    assert all(np.isfinite(array).all() for array in found.values())
    logits = np.asarray(task.features[0]) @ found["kernel"] + found["bias"]
    assert (logits.argmax(axis=1) == np.asarray(task.labels)).all()


def test_a_class_without_images_is_never_predicted():
    task = separable_task()
    found = fit_linear_probe(task.features[0], task.labels, 5, 1.0)
    logits = np.asarray(task.validation_features) @ found["kernel"] + found["bias"]
    assert (logits.argmax(axis=1) < 4).all()


COARSE = [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0]


def swept(score: dict | None = None, peak: float = 0.0) -> tuple[list[float], Sweep]:
    sweep = Sweep()
    tried = []
    while (exponent := sweep.next()) is not None:
        tried.append(exponent)
        sweep.scores[exponent] = (-abs(exponent - peak), 0.0) if score is None else (0.5, 0.0)
    return tried, sweep


def test_the_sweep_is_clips_protocol():
    """Seven values over twelve decades, refined around the peak to eight per decade."""
    tried, sweep = swept(peak=1.3)
    assert tried == [*COARSE, 1.0, 3.0, 0.5, 1.5, 1.25, 1.75, 1.125, 1.375]
    assert max(sweep.scores, key=sweep.scores.__getitem__) == 1.25
    assert len(tried) == Sweep.LONGEST
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize(("peak", "best"), [(-9.0, -6.0), (9.0, 6.0)])
def test_the_sweep_stays_in_its_range(peak: float, best: float):
    tried, sweep = swept(peak=peak)
    assert (min(tried), max(tried)) == (-6.0, 6.0)
    assert max(sweep.scores, key=sweep.scores.__getitem__) == best
    assert len(tried) < Sweep.LONGEST


def test_of_equal_scores_the_strongest_regularisation_is_refined():
    tried, _ = swept(score={})
    assert min(tried) == tried[0] == -6.0
    assert tried[7:] == [-5.0, -5.5, -5.75, -5.875]


def test_the_search_judges_each_c_on_validation_as_scikit_learn_does(engine: Engine):
    task = separable_task(noise=3.0, data_seed=3)
    found = list(LinearProbe().search(Search(Grid(), [task]), engine))
    assert [e.setting["C"] for e in found[:7]] == [10.0**exponent for exponent in COARSE]
    assert len({round(e.accuracy, 6) for e in found}) > 2, "all C are alike: nothing is compared"
    features = np.asarray(task.features[0], np.float64)
    validation = np.asarray(task.validation_features, np.float64)
    labels = np.asarray(task.validation_labels)
    for evaluation in found:
        c = evaluation.setting["C"]
        if c > 1e4:  # where the loss vanishes and both stop at their tolerance
            continue
        reference = LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(features, task.labels)
        assert evaluation.accuracy == pytest.approx(reference.score(validation, labels))
        chances = reference.predict_log_proba(validation)[np.arange(len(labels)), labels]
        assert evaluation.nll == pytest.approx(-chances.mean(), rel=5e-3)
        arrays = evaluation.arrays()
        logits = LinearProbe().logits(
            evaluation.setting, arrays, task.validation_features, task.weights, 20.0, 0.25
        )
        assert np.mean(logits.argmax(axis=1) == labels) == pytest.approx(evaluation.accuracy)


def test_only_the_first_view_is_fitted(engine: Engine):
    task = separable_task(views=3)
    one = LinearProbe().fit({"C": 1.0}, None, task, engine)
    other = LinearProbe().fit({"C": 1.0}, None, task._replace(features=task.features[:1]), engine)
    assert all(jnp.array_equal(one[name], other[name]) for name in one)
