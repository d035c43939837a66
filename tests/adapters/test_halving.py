"""Successive halving: who goes on, what it costs, and that survivors really go on."""

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from clip_adapter.adapters.engine.evaluation import Evaluation, Leaves
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import rungs_of, search
from clip_adapter.adapters.engine.successive_halving import (
    Rung,
    rung_epochs,
    successive_halving,
    survivors,
)
from tests.adapters.tasks import (
    CLIP_ADAPTER,
    EACH_EPOCH,
    SHORT,
    Notes,
    separable_task,
    setting_of,
)

NAN = float("nan")


SETTINGS = [{"number": number} for number in range(7)]


@pytest.mark.parametrize(
    ("epochs", "every", "rungs"),
    [
        (200, 5, [20, 60, 200]),
        (100, 5, [10, 30, 100]),
        (100, 7, [7, 28, 100]),
        (10, 5, [5, 10]),
        (10, 1, [1, 3, 10]),
        (3, 5, [3]),
        (1, 1, [1]),
    ],
)
def test_rungs_end_at_evaluations(epochs: int, every: int, rungs: list[int]):
    assert rung_epochs(epochs, every) == rungs


def test_the_best_epoch_is_looked_for_where_rungs_end():
    judged_often = setting_of(epoch="best", epochs=100, evaluate_every=7)
    assert rungs_of(judged_often, halving=True) == [7, 28, 100]
    assert rungs_of(judged_often, halving=False) == [100]
    assert rungs_of(setting_of(epochs=100), halving=True) == [10, 30, 100]


def test_the_cost_of_96_settings_is_a_quarter():
    rungs = rung_epochs(200, 5)
    counts = survivors(96, rungs=len(rungs))
    assert counts == [96, 32, 11]
    lengths = np.diff([0, *rungs])
    assert np.dot(counts, lengths) / (96 * rungs[-1]) == pytest.approx(4740 / 19200)


class Script:
    """Trains nothing: reads (accuracy, NLL) of setting i at an epoch from a table.

    rungs: what was asked for, as (first, stop, indices, the states it went on from).
    """

    def __init__(self, scores: dict[int, Sequence[tuple[float, float]]]) -> None:
        self.scores = scores
        self.rungs: list[tuple[int, int, list[int], list[str]]] = []

    def __call__(
        self, rung: Rung
    ) -> Iterator[tuple[int, list[Evaluation], Callable[[], list[Leaves]]]]:
        states = [rung.state(0, i)[0].item() for i in rung.indices] if rung.first else []
        self.rungs.append((rung.first, rung.stop, list(rung.indices), states))
        for i in rung.indices:
            accuracy, nll = self.scores[rung.stop][i]
            evaluation = Evaluation(rung.runs[i][0], rung.stop, rung.stop, accuracy, nll, 0.0)
            state = np.array(f"{i} at {rung.stop}")
            yield i, [evaluation], lambda state=state: [[state]]


SCORES = {
    # Ranked by accuracy (setting 3), then by NLL (6 before 1 and 5); 0 diverged in spite of its
    # accuracy; 4 has the lowest NLL of all.
    2: [
        (0.9, NAN),
        (0.7, 0.5),
        (0.5, 0.6),
        (0.8, 2.0),
        (0.4, 0.1),
        (0.7, 0.5),
        (0.7, 0.4),
    ],
    6: [(0, 0), (0.9, 0.3), (0, 0), (0.95, NAN), (0, 0), (0, 0), (0.85, 0.2)],
    20: [(0, 0), (0.97, 0.3), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)],
}


def halve(
    rungs: list[int], train: Script, notes: Notes, settings: list[Any] = SETTINGS
) -> Iterator[Evaluation]:
    return successive_halving([[s] for s in settings], rungs, [separable_task()], notes, train)


def test_the_best_third_goes_on_and_nobody_who_diverged():
    train, notes = Script(SCORES), Notes()
    found = [(e.setting["number"], e.epochs_run) for e in halve([2, 6, 20], train, notes)]
    assert train.rungs == [
        (0, 2, [0, 1, 2, 3, 4, 5, 6], []),
        (2, 6, [1, 3, 6], ["1 at 2", "3 at 2", "6 at 2"]),
        (6, 20, [1], ["1 at 6"]),
    ]
    assert found == [(i, 2) for i in range(7)] + [(1, 6), (3, 6), (6, 6), (1, 20)]
    assert notes.states == {}, "states of a search that ended lie about"


def test_no_more_states_are_kept_than_settings_that_can_go_on():
    """One more while the caller has not yet taken note of the setting that displaces another."""
    settings = [{"number": i} for i in range(30)]
    notes, train = Notes(), Script({epoch: [(i / 30, 1.0) for i in range(30)] for epoch in (2, 6)})
    kept = [(e.epochs_run, len(notes.states)) for e in halve([2, 6], train, notes, settings)]
    assert max(states for epochs, states in kept if epochs == 2) == 30 // 3 + 1
    assert train.rungs[1][2] == list(range(20, 30))


class Shelf(UserDict[str, Leaves]):
    """Notes which states are read; on disk that takes time, or finds a damaged file."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Leaves:
        self.read.append(name)
        return super().__getitem__(name)


def test_only_states_that_are_gone_on_from_are_read():
    shelf = Shelf()
    list(halve([2, 6, 20], Script(SCORES), Notes(shelf)))
    going_on = [(0, 1), (0, 3), (0, 6), (1, 1)]
    assert shelf.read == [f"rung-{rung}-fold-0-setting-{index}" for rung, index in going_on]
    assert not shelf.data


def test_what_is_known_is_not_trained_again():
    """As if the search had been killed in its second rung, after setting 1."""
    notes = Notes()
    for evaluation in halve([2, 6, 20], Script(SCORES), notes):
        notes.found.append(evaluation)
        if (evaluation.setting["number"], evaluation.epochs_run) == (1, 6):
            break
    train = Script(SCORES)
    last = list(halve([2, 6, 20], train, notes))[-1]
    assert [rung for rung in train.rungs if rung[2]] == [
        (2, 6, [3, 6], ["3 at 2", "6 at 2"]),
        (6, 20, [1], ["1 at 6"]),
    ]
    assert (last.setting["number"], last.accuracy) == (1, 0.97)


def test_a_search_whose_settings_all_diverge_ends():
    train = Script({2: [(0.5, NAN)] * 3})
    found = list(halve([2, 6], train, Notes(), SETTINGS[:3]))
    assert [evaluation.failed for evaluation in found] == [True] * 3


VALUES = CLIP_ADAPTER.values(
    {"alpha": (0.2, 0.5, 0.8), "learning_rate": (1e-3, 1e-2, 1e-1)}
    | {name: (value,) for name, value in SHORT.items()}
)
BEST = VALUES | {name: (value,) for name, value in EACH_EPOCH.items()}
FOLDS = [separable_task(noise=2.5, data_seed=number) for number in (1, 2)]


def same(one: Evaluation, other: Evaluation) -> bool:
    """To the last bit."""
    arrays = one.arrays and one.arrays()
    expected = other.arrays and other.arrays()
    return (one.accuracy, one.nll, one.epoch) == (other.accuracy, other.nll, other.epoch) and (
        arrays == expected
        if not arrays or not expected
        else all(arrays[name].tobytes() == expected[name].tobytes() for name in expected)
    )


@pytest.mark.parametrize("values", [VALUES, BEST], ids=["last", "best"])
def test_survivors_end_where_a_full_run_ends(engine: Engine, values: Any):
    """To the last bit, over two folds: they go on, they don't start again."""
    full = list(search(CLIP_ADAPTER, values, FOLDS, engine, Notes()))
    halved = list(search(CLIP_ADAPTER, values, FOLDS, engine, Notes(), halving=True))
    assert [e.epochs_run for e in halved] == [1] * 9 + [3] * 3 + [10]
    (twin,) = (e for e in full if e.setting == halved[-1].setting)
    assert halved[-1].arrays is None
    assert same(halved[-1], twin)


class Forgetful(UserDict[str, Leaves]):
    """Loses a state, and gives back another in an odd shape."""

    def __getitem__(self, name: str) -> Leaves:
        leaves = super().__getitem__(name)
        if name.startswith("rung-0"):
            raise KeyError(name)
        return [leaf[None] for leaf in leaves]


def test_a_state_that_was_lost_or_is_odd_is_trained_again(engine: Engine):
    found, expected = (
        list(search(CLIP_ADAPTER, VALUES, FOLDS[:1], engine, notes, halving=True))
        for notes in (Notes(Forgetful()), Notes())
    )
    assert [(e.setting, e.epochs_run) for e in found] == [
        (e.setting, e.epochs_run) for e in expected
    ]
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_a_setting_that_diverges_late_is_not_chosen(engine: Engine):
    """Its earlier rungs were fine; the judgement of a rung is the one at its end."""
    task = separable_task(noise=2.5, data_seed=1)
    values = VALUES | {"alpha": (0.9,), "learning_rate": (1e-3, 1e18)}
    for e in search(CLIP_ADAPTER, values, [task], engine, Notes(), halving=True):
        assert e.failed == (e.setting["learning_rate"] == 1e18)
