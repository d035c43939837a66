"""Some inputs for every door, and the driver notices each kind of fault. `make fuzz` tries more."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.doors import faulty
from tests.fuzz.driver import Worker

# What a door prepares takes most of the time; damage to a few bytes is quickly tried. Sources have
# a short run of their own, beside that of kill_extract.
INPUTS = {
    **{"caches": 30, "parts": 20, "staging": 15, "towers": 30, "adapters": 30, "runs": 6},
    **{"images": 30, "checkpoints": 15, "arguments": 25},
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("doors"), limit=60)
    yield worker
    worker.close()


@pytest.mark.parametrize("door", INPUTS)
def test_every_input_is_used_or_refused_in_a_sentence(door: str, worker: Worker) -> None:
    for seed in range(INPUTS[door]):
        answer = worker.ask(door, seed)
        assert "broken" not in answer, answer
        assert not answer["faults"], f"--door {door} --seed {seed}: {answer}"


def test_every_kind_of_fault_is_noticed(tmp_path: Path) -> None:
    worker = Worker(tmp_path, limit=2, first=30)
    seeds = {random.Random(f"faulty {seed}").choice(faulty.KINDS): seed for seed in range(200)}
    assert seeds.keys() == set(faulty.KINDS)
    for kind in faulty.KINDS:
        faults = worker.ask("faulty", seeds[kind])["faults"]
        if kind == "crash":  # the next worker is a new one
            assert worker.ask("faulty", seeds["nothing"])["faults"] == []
        assert [fault.partition(":")[0] for fault in faults] == [kind] * (kind != "nothing")
    worker.close()
