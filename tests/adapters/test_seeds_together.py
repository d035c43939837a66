"""Tasks of several seeds that begin in one launch."""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_adapter.adapters.engine.program import Program
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.method import Method, Setting, Task
from clip_adapter.adapters.registry import METHODS
from tests.adapters.tasks import CLIP_ADAPTER, EACH_EPOCH, SHORT, separable_task, setting_of

RATES = [setting_of(learning_rate=rate, **SHORT) for rate in (1e-3, 3e-3, 1e-2)]
SEEDS = (3, 4, 5)


def tasks_of(weighed: bool = False, **how: Any) -> list[Task]:
    """Of one cache: they share the head. weighed: in loss and validation, by each its own."""
    several = [separable_task(noise=2.0, seed=seed, data_seed=seed, **how) for seed in SEEDS]
    several = [task._replace(head=several[0].head) for task in several]
    if not weighed:
        return several
    rng = np.random.default_rng(0)

    def weights(labels: jax.Array) -> jax.Array:
        return jnp.asarray(rng.uniform(0.5, 1.5, labels.shape), jnp.float32)

    return [
        task._replace(
            class_weights=weights(task.head.weights[:, 0]),
            validation_weights=weights(task.validation_labels),
        )
        for task in several
    ]


def default(name: str) -> tuple[Method, list[Setting]]:
    """Of a method whose start is a closed form."""
    method = METHODS[name]
    given = {own: (value,) for own, value in SHORT.items() if own in method.hyper}
    return method, [method.default_setting(method.values(given))]


CASES: Mapping[str, tuple[Method, list[Setting], int | None, dict[str, Any]]] = {
    "last epoch": (CLIP_ADAPTER, RATES, None, {}),
    "first rung": (CLIP_ADAPTER, RATES, 4, {}),
    "best epoch": (CLIP_ADAPTER, [setting_of(**EACH_EPOCH)], None, {}),
    "views": (CLIP_ADAPTER, RATES, None, {"views": 3}),
    "no validation": (CLIP_ADAPTER, RATES[:1], None, {"validation": 0}),
    "closed start": (*default("taskres"), None, {"weighed": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_they_end_as_one_by_one(case: str, engine: Engine) -> None:
    """In one call of a program for each call of one seed's, and to float rounding."""
    method, settings, stop, how = CASES[case]
    tasks = tasks_of(**how)
    together = Engine("vectorised")
    together.begin(method, settings, tasks, stop)
    with patch.object(Program, "__call__", side_effect=AssertionError("it trains again")):
        found = [[*together.run(method, settings, task, stop=stop)] for task in tasks]
    for task, (chunk,) in zip(tasks, found, strict=True):
        assert chunk.indices == list(range(len(settings)))
        alone = [*engine.run(method, settings, task, stop=stop)]
        expected = jax.tree.map(lambda *x: np.concatenate(x), *(one.state for one in alone))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), chunk.state, expected
        )
    kernels = [jax.tree.leaves(chunk.state.trained)[0] for (chunk,) in found]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3, "the seeds do not differ"


def test_what_was_begun_serves_one_run() -> None:
    told: list[float] = []
    engine, tasks = Engine("vectorised", told.append), tasks_of()
    engine.begin(CLIP_ADAPTER, RATES, tasks, None)
    assert sum(told) == pytest.approx(len(RATES))
    told.clear()
    for settings, stop in ((RATES, 4), (RATES[:2], None)):  # something else: it is trained
        (own,) = engine.run(CLIP_ADAPTER, settings, tasks[0], stop=stop)
        assert len(own.indices) == len(settings)
    with patch.object(Program, "__call__", side_effect=AssertionError("it trains again")):
        (begun,) = engine.run(CLIP_ADAPTER, RATES, tasks[0])
        with pytest.raises(AssertionError, match="it trains again"):
            next(engine.run(CLIP_ADAPTER, RATES, tasks[0]))
    again = next(engine.run(CLIP_ADAPTER, RATES, tasks[0]))
    np.testing.assert_allclose(begun.state.history, again.state.history, atol=2e-5)


@pytest.mark.parametrize("why", ["one after another", "one task", "other shapes", "a chunk"])
def test_where_nothing_is_begun(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tasks = Engine("vectorised"), tasks_of()
    if why == "one after another":
        engine = Engine("sequential")
    elif why == "one task":
        tasks = tasks[:1]
    elif why == "other shapes":
        tasks[1] = separable_task(shots=4, seed=4)
    else:
        monkeypatch.setattr("clip_adapter.adapters.engine.runner.LARGEST_CHUNK", 8)
    with patch.object(Program, "__call__", side_effect=AssertionError("it trains")):
        engine.begin(CLIP_ADAPTER, RATES, tasks, None)
