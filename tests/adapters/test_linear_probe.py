"""The linear probe against scikit-learn, and CLIP's sweep over C."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.linear_probe import LinearProbe, Sweep
from clip_adapter.adapters.method import Grid, Search
from tests.adapters.tasks import separable_task

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
