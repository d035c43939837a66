"""No door: a fault of any kind that test_fuzz.py has to notice."""

import os
import random
import sys
import time
from pathlib import Path

from clip_adapter.errors import UserError
from tests.fuzz.attempt import Attempt
from tests.fuzz.command import run


def prepare(folder: Path) -> None:
    """Nothing is needed."""


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    kind = rng.choice(KINDS)
    found = Attempt(kind)
    found.command(run(lambda: _fault(kind)))
    if kind == "silent acceptance":
        found.same(found.read(lambda: 1), 2)
    elif kind == "no sentence":
        found.read(lambda: _refuse("two\nlines"))
    return found


def _fault(kind: str) -> None:
    if kind == "traceback":
        raise KeyError(kind)
    if kind == "exit code 3":
        sys.exit(3)
    if kind == "control character":
        print("\x1b[2J")
    elif kind == "long":
        print("faulty: " + "x" * 1000, file=sys.stderr)
    elif kind == "hang":
        time.sleep(60)
    elif kind == "crash":
        os.abort()
    elif kind == "memory":
        print("faulty: There is not enough memory for this.", file=sys.stderr)
        sys.exit(2)


def _refuse(words: str) -> None:
    raise UserError(words)


KINDS = (
    *("nothing", "traceback", "exit code 3", "control character", "long", "silent acceptance"),
    *("no sentence", "memory", "crash", "hang"),
)
