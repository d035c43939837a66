"""The linear probe against scikit-learn, and CLIP's sweep over C."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clip_adapter.adapters.engine.evaluation import Score
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit, search
from clip_adapter.adapters.methods.linear_probe import coarse_to_fine
from clip_adapter.adapters.registry import METHODS
from tests.adapters.tasks import Notes, separable_task, tempered_nll, validation_accuracy

PROBE = METHODS["linear-probe"]


COARSE = [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0]
LONGEST = len(COARSE) + 2 * 4


def swept(peak: float | None = None) -> tuple[list[float], float]:
    """The exponents that were tried, and the best of them; all score alike without a peak."""
    scores: dict[float, float] = {}
    proposed = coarse_to_fine(PROBE.values({}))
    setting = next(proposed, None)
    while setting is not None:
        exponent = round(float(np.log10(setting["C"])), 6)
        scores[exponent] = 0.5 if peak is None else -abs(exponent - peak)
        try:
            setting = proposed.send(Score(scores[exponent], 0.0))
        except StopIteration:
            break
    return list(scores), max(scores, key=scores.__getitem__)


def test_the_sweep_is_clips_protocol():
    """Seven values over twelve decades, refined around the peak to eight per decade."""
    tried, best = swept(peak=1.3)
    assert tried == [*COARSE, 1.0, 3.0, 0.5, 1.5, 1.25, 1.75, 1.125, 1.375]
    assert best == 1.25
    assert len(tried) == LONGEST


@pytest.mark.parametrize(("peak", "best"), [(-9.0, -6.0), (9.0, 6.0)])
def test_the_sweep_stays_in_its_range(peak: float, best: float):
    tried, found = swept(peak=peak)
    assert (min(tried), max(tried)) == (-6.0, 6.0)
    assert found == best
    assert len(tried) < LONGEST


def test_of_equal_scores_the_strongest_regularisation_is_refined():
    tried, _ = swept()
    assert min(tried) == tried[0] == -6.0
    assert tried[7:] == [-5.0, -5.5, -5.75, -5.875]


def test_values_that_the_user_names_are_tried_as_they_are():
    assert list(coarse_to_fine(PROBE.values({"C": (0.1, 7.0)}))) == [{"C": 0.1}, {"C": 7.0}]


def test_the_search_judges_each_c_on_validation_as_scikit_learn_does(engine: Engine):
    task = separable_task(noise=3.0, data_seed=3)
    found = list(search(PROBE, PROBE.values({}), [task], engine, Notes()))
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
        nll = tempered_nll(reference.predict_log_proba(validation), labels)
        assert evaluation.nll == pytest.approx(nll, rel=5e-3, abs=1e-4)
        arrays = evaluation.arrays()
        classify = make_classify(PROBE, evaluation.setting, arrays, task.head)
        found_accuracy = validation_accuracy(classify(task.validation_features), task)
        assert found_accuracy == pytest.approx(evaluation.accuracy)


def test_only_the_first_view_is_fitted(engine: Engine):
    task = separable_task(views=3)
    first = task._replace(features=task.features[:1])
    one, other = (fit(PROBE, {"C": 1.0}, None, part, engine) for part in (task, first))
    assert all(jnp.array_equal(one[name], other[name]) for name in one)
