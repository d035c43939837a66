"""Throw damaged, hostile and odd inputs at every door through which foreign things come in.

    python -m tests.fuzz.driver                              10,000 inputs
    python -m tests.fuzz.driver --inputs 300 --jobs 1
    python -m tests.fuzz.driver --door caches --seed 123     one of them again

Each input is made from its door's name and its seed, and tried in a worker process that is killed
where it takes too long. Counted are tracebacks, exit codes other than 0, 1 and 2, hangs, crashes,
memory, words that are no sentence, too long or with control characters, and damage that was used
without a word. Ends with 1 where there is any.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Doors and how many of 10,000 inputs each takes: about equal shares of the time.
SHARES = {
    "caches": 2500,
    "parts": 700,
    "staging": 700,
    "towers": 700,
    "adapters": 2000,
    "runs": 500,
    "sources": 500,
    "images": 1500,
    "checkpoints": 400,
    "arguments": 500,
}
FIRST_INPUT = 600.0  # seconds more for a door's first input, which loads and prepares
SHOWN = 40
TOLD_EVERY = 500


@dataclass
class Tally:
    """inputs, faults: how many by door, and by door and kind. seconds: by door."""

    inputs: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    shown: Counter[str] = field(default_factory=Counter)

    def note(self, door: str, seed: int, answer: dict[str, Any]) -> None:
        self.inputs[door] += 1
        self.seconds[door] += answer["seconds"]
        if not self.inputs.total() % TOLD_EVERY:
            print(f"{self.inputs.total()} inputs, at {door} {seed}", flush=True)
        for fault in answer["faults"]:
            self.faults[door, fault.partition(":")[0]] += 1
            if self.shown[fault[:80]] < 3 and self.shown.total() < SHOWN:
                self.shown[fault[:80]] += 1
                print(
                    f"--door {door} --seed {seed}: {fault}\n    {answer['what']:.300}", flush=True
                )


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
        child, begun = self._child, time.monotonic()
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
        return {
            "what": "",
            "faults": [f"{fault}: {self._end()}"],
            "seconds": time.monotonic() - begun,
        }

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


def run(work: Sequence[tuple[str, int]], jobs: int, limit: float, base: Path) -> Tally:
    """Try every (door, seed), some workers at a time."""
    tally, waiting, lock = Tally(), iter(work), threading.Lock()

    def take() -> Iterator[tuple[str, int]]:
        while True:
            with lock:
                one = next(waiting, None)
            if one is None:
                return
            yield one

    def serve() -> None:
        worker = Worker(base, limit)
        for door, seed in take():
            answer = worker.ask(door, seed)
            with lock:
                if "broken" in answer:
                    print(f"{door} {seed}: {answer['broken']}")
                    tally.faults[door, "broken door"] += 1
                    list(waiting)  # nothing is left to do
                    break
                tally.note(door, seed, answer)
        worker.close()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def shares(inputs: int, doors: Sequence[str]) -> dict[str, int]:
    """How many inputs each door takes of so many."""
    total = sum(SHARES[door] for door in doors)
    return {door: max(1, round(inputs * SHARES[door] / total)) for door in doors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--door", action="append", choices=list(SHARES), help="some only")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed of each door")
    parser.add_argument("--seed", type=int, help="this input only")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=60, help="seconds for an input")
    given = parser.parse_args()
    doors = given.door or list(SHARES)
    counts = shares(given.inputs, doors)
    if given.seed is not None:
        counts, given.first = dict.fromkeys(doors, 1), given.seed
    work = [(door, given.first + n) for door, count in counts.items() for n in range(count)]
    print(f"seeds of each door from {given.first}: {counts}", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        tally = run(work, given.jobs, given.limit, Path(folder))
    for door, count in tally.inputs.items():
        each = 1000 * tally.seconds[door] / count
        kinds = {kind: n for (where, kind), n in tally.faults.items() if where == door}
        print(f"{door}: {count} inputs, {each:.0f} ms each, {kinds or 'no fault'}")
    total = tally.faults.total()
    print(f"{tally.inputs.total()} inputs, {total} faults, {time.monotonic() - begun:.0f} s")
    raise SystemExit(1 if total else 0)


if __name__ == "__main__":
    main()
