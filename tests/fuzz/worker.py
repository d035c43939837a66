"""One process of test_fuzz.py: takes `DOOR SEED` a line on standard input and answers in JSON.

    python -m tests.fuzz.worker FOLDER

FOLDER holds what the doors prepare, once for all workers. Nothing reaches the network, and memory
has a limit.
"""

import faulthandler
import json
import os
import random
import resource
import shutil
import socket
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.fuzz.attempt import Attempt

MEMORY = 8 << 30  # of address space with content, much of it what libraries set aside
GROWTH = 1 << 20  # KiB that one input may add to the largest size so far


def main() -> None:
    base = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable(os.fdopen(os.dup(2), "w"))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kept = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    os.environ |= {"XDG_CACHE_HOME": kept, "HOME": str(base / "home")}  # nothing of the user's
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    socket.socket.connect = _no_network  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = _no_network
    for line in sys.stdin:
        door, seed = line.split()
        try:
            told = answer(base, door, int(seed))
        except Exception:  # of the door itself
            told = {"broken": traceback.format_exc()}
        print(json.dumps(told), file=answers, flush=True)


def answer(base: Path, name: str, seed: int) -> dict[str, Any]:
    door = import_module(f"tests.fuzz.doors.{name}")
    prepared = prepare(base, name)
    around = Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder = around / "in"
    folder.mkdir()
    os.chdir(folder)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        attempt: Attempt = door.attempt(random.Random(f"{name} {seed}"), prepared, folder)
    finally:
        os.chdir(base)
        shutil.rmtree(around, ignore_errors=True)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest
    if growth > GROWTH:
        attempt.faults.append(f"memory: {growth / GROWTH:.1f} GiB more")
    what = attempt.what.encode(errors="backslashreplace").decode()
    return {"what": what, "faults": attempt.faults}


def prepare(base: Path, name: str) -> Path:
    """The folder of what a door damages copies of, made by the first worker that needs it."""
    place = base / name
    if not place.exists():
        own = base / f"{name}-{os.getpid()}"
        own.mkdir()
        import_module(f"tests.fuzz.doors.{name}").prepare(own)
        try:
            own.rename(place)
        except OSError:  # another worker was faster
            shutil.rmtree(own)
    return place


def _no_network(*_: object, **__: object) -> Any:
    raise OSError(101, "Network is unreachable")


if __name__ == "__main__":
    main()
