"""Damaged, hostile and odd inputs at every door through which foreign things come in.

Each input is made from its door's name and its seed, and tried in a worker process that is killed
where it takes too long. Faults are tracebacks, exit codes other than 0, 1 and 2, hangs, crashes,
memory, words that are no sentence, too long or with control characters, and damage that was used
without a word.

`make fuzz` tries 10,000 inputs: FUZZ says how many times as many each door takes. A fault names its
door and seed; FUZZ_SEED=123 pytest tests/fuzz/test_fuzz.py -k caches tries that one again.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.doors import faulty

ROOT = Path(__file__).parents[2]
FIRST_INPUT = 600.0  # seconds more for a door's first input, which loads and prepares
# What a door prepares takes most of the time; damage to a few bytes is quickly tried. Sources have
# a short run of their own, beside that of kill_extract.
INPUTS = {
    **{"caches": 30, "parts": 20, "staging": 15, "towers": 30, "adapters": 30, "runs": 6},
    **{"images": 30, "checkpoints": 15, "arguments": 25},
}
TIMES = int(os.environ.get("FUZZ", "1"))
if TIMES > 1:
    INPUTS["sources"] = 15


class Worker:
    """A child that is started again when it has died or been killed."""

    def __init__(self, base: Path, limit: float, first: float = FIRST_INPUT) -> None:
        self._base, self._limit, self._first = base, limit, first
        self._child: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()
        self._stderr = base / f"stderr-{id(self)}"

    def ask(self, door: str, seed: int) -> dict[str, Any]:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", str(self._base)],
                **{"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
                stderr=self._stderr.open("wb"),
            )
            self._known = set()
        child = self._child
        assert child.stdin and child.stdout
        child.stdin.write(f"{door} {seed}\n".encode())
        child.stdin.flush()
        limit = self._limit + (0 if door in self._known else self._first)
        ready, _, _ = select.select([child.stdout], [], [], limit)
        line = child.stdout.readline() if ready else b""
        if line:
            self._known.add(door)
            return json.loads(line)
        fault = "crash" if ready else "hang"
        return {"what": "", "faults": [f"{fault}: {self._end()}"]}

    def _end(self) -> str:
        """Kill the child and say how it ended and where it was."""
        child, self._child = self._child, None
        assert child and child.stdin and child.stdout
        for number in (0, signal.SIGABRT, signal.SIGKILL):  # it may be ending; the second is
            with suppress(subprocess.TimeoutExpired):  # for the stack
                if number:
                    child.send_signal(number)
                child.wait(3)
                break
        child.communicate()
        told = self._stderr.read_text(errors="replace")
        _, _, stack = told.rpartition("Current thread")
        places = [line.strip() for line in stack.splitlines() if "File" in line]
        last = told.strip().rpartition("\n")[2]
        return f"exit {child.returncode}; {'; '.join(places[:6]) if 'Current' in told else last}"

    def close(self) -> None:
        if self._child:
            self._child.communicate()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("doors"), limit=60)
    yield worker
    worker.close()


@pytest.mark.parametrize("times", range(TIMES))
@pytest.mark.parametrize("door", INPUTS)
def test_every_input_is_used_or_refused_in_a_sentence(
    door: str, times: int, worker: Worker
) -> None:
    count = INPUTS[door]
    one = os.environ.get("FUZZ_SEED")
    seeds = range(times * count, (times + 1) * count) if one is None else [int(one)]
    faults = {}
    for seed in seeds:
        answer = worker.ask(door, seed)
        assert "broken" not in answer, answer
        if answer["faults"]:
            faults[seed] = answer
    assert not faults


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
