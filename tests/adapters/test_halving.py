"""Successive halving: who goes on, what it costs, and that survivors really go on."""

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from clip_adapter.adapters.clip_adapter_method import ClipAdapterMethod
from clip_adapter.adapters.engine import Engine, Leaves
from clip_adapter.adapters.halving import Leg, climb, halving_rungs, survivors
from clip_adapter.adapters.method import Evaluation, Grid, Search
from clip_adapter.adapters.training import Schedule
from tests.adapters.tasks import SHORT, separable_task

NAN = float("nan")


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
    schedule = Schedule(epochs=epochs, evaluate_every=every)
    assert halving_rungs(schedule) == rungs
    assert set(rungs) <= set(schedule.evaluated_epochs())


def test_the_cost_of_96_settings_is_a_quarter():
    rungs = halving_rungs(Schedule())
    counts = survivors(96, rungs)
    assert counts == [96, 32, 11]
    lengths = np.diff([0, *rungs])
    assert np.dot(counts, lengths) / (96 * rungs[-1]) == pytest.approx(4740 / 19200)


class Script:
    """Trains nothing: reads (accuracy, NLL) of setting i at an epoch from a table.

    legs: what was asked for, as (start, stop, indices, the states it went on from).
    """

    def __init__(self, scores: dict[int, Sequence[tuple[float, float]]]) -> None:
        self.scores = scores
        self.legs: list[tuple[int, int, list[int], list[str]]] = []

    def __call__(self, leg: Leg) -> Iterator[tuple[int, Evaluation, Callable[[], list[Leaves]]]]:
        states = [leg.state(0, i)[0].item() for i in leg.indices] if leg.start else []
        self.legs.append((leg.start, leg.stop, list(leg.indices), states))
        for i in leg.indices:
            accuracy, nll = self.scores[leg.stop][i]
            evaluation = Evaluation(leg.settings[i], leg.stop, leg.stop, accuracy, nll, 0.0)
            state = np.array(f"{i} at {leg.stop}")
            yield i, evaluation, lambda state=state: [[state]]


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


def test_the_best_third_goes_on_and_nobody_who_diverged():
    settings = [{"number": i} for i in range(7)]
    train = Script(SCORES)
    search = Search(Grid(), [separable_task()])
    found = [
        (e.setting["number"], e.epochs_run) for e in climb(settings, [2, 6, 20], search, train)
    ]
    assert train.legs == [
        (0, 2, [0, 1, 2, 3, 4, 5, 6], []),
        (2, 6, [1, 3, 6], ["1 at 2", "3 at 2", "6 at 2"]),
        (6, 20, [1], ["1 at 6"]),
    ]
    assert found == [(i, 2) for i in range(7)] + [(1, 6), (3, 6), (6, 6), (1, 20)]
    assert search.states == {}, "states of a search that ended lie about"


def test_no_more_states_are_kept_than_settings_that_can_go_on():
    """One more while the caller has not yet taken note of the setting that displaces another."""
    settings = [{"number": i} for i in range(30)]
    search = Search(Grid(), [separable_task()])
    train = Script({epoch: [(i / 30, 1.0) for i in range(30)] for epoch in (2, 6)})
    kept = [(e.epochs_run, len(search.states)) for e in climb(settings, [2, 6], search, train)]
    assert max(states for epochs, states in kept if epochs == 2) == 30 // 3 + 1
    assert train.legs[1][2] == list(range(20, 30))


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
    search = Search(Grid(), [separable_task()], states=shelf)
    list(climb([{"number": i} for i in range(7)], [2, 6, 20], search, Script(SCORES)))
    going_on = [(0, 1), (0, 3), (0, 6), (1, 1)]
    assert shelf.read == [f"rung-{rung}-fold-0-setting-{index}" for rung, index in going_on]
    assert not shelf.data


def test_what_is_known_is_not_trained_again():
    """As if the search had been killed in its second rung, after setting 1."""
    settings = [{"number": i} for i in range(7)]
    whole = Script(SCORES)
    killed = Search(Grid(), [separable_task()])
    known: dict[tuple[int, int], Evaluation] = {}
    for evaluation in climb(settings, [2, 6, 20], killed, whole):
        known[evaluation.setting["number"], evaluation.epochs_run] = evaluation
        if (1, 6) in known:
            break
    search = Search(
        Grid(),
        killed.folds,
        lambda setting, epochs: known.get((setting["number"], epochs)),
        killed.states,
    )
    train = Script(SCORES)
    last = list(climb(settings, [2, 6, 20], search, train))[-1]
    assert [leg for leg in train.legs if leg[2]] == [
        (2, 6, [3, 6], ["3 at 2", "6 at 2"]),
        (6, 20, [1], ["1 at 6"]),
    ]
    assert (last.setting["number"], last.accuracy) == (1, 0.97)


def test_a_search_whose_settings_all_diverge_ends():
    settings = [{"number": i} for i in range(3)]
    train = Script({2: [(0.5, NAN)] * 3})
    found = list(climb(settings, [2, 6], Search(Grid(), [separable_task()]), train))
    assert [evaluation.failed for evaluation in found] == [True] * 3


def test_survivors_end_where_a_full_run_ends(engine: Engine):
    """To the last bit, over two folds: they go on, they don't start again."""
    grid = Grid(alpha=(0.2, 0.5, 0.8), learning_rate=(1e-3, 1e-2, 1e-1), schedule=SHORT)
    halved = Grid(**{**vars(grid), "halving": True})
    folds = [separable_task(noise=2.5, data_seed=number) for number in (1, 2)]
    method = ClipAdapterMethod()
    for parts in (folds[:1], folds):
        full = {str(e.setting): e for e in method.search(Search(grid, parts), engine)}
        climbed = list(method.search(Search(halved, parts), engine))
        assert [e.epochs_run for e in climbed] == [1] * 9 + [3] * 3 + [10]
        assert len(climbed) == method.evaluations(halved)
        (last,) = (e for e in climbed if e.epochs_run == 10)
        same = full[str(last.setting)]
        assert (last.accuracy, last.nll, last.epoch) == (same.accuracy, same.nll, same.epoch)
        if len(parts) == 1:
            arrays, expected = last.arrays(), same.arrays()
            assert all(arrays[name].tobytes() == expected[name].tobytes() for name in expected)
