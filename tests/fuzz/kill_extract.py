"""Kill `extract`, `extract --update` and `merge` at random points: it ends the same.

    python -m tests.fuzz.kill_extract --kills 100

Each story begins with nothing (or with a cache whose source has changed since). Runs follow one
another, each killed a moment after a random number of batches, until one comes to its end; what it
leaves must equal, in every dataset, what an undisturbed run makes. Runs are forked from one process
that has imported everything and started no thread, so that little of their time goes to that.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_adapter.cache.parts import merge_parts
from clip_adapter.errors import UserError
from clip_adapter.extract import job  # noqa: F401 - imported before the forks
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from tests.cache.rewriting import datasets
from tests.extract.image_folders import make_folder, photograph

CLASSES = ("cat", "dog", "eel")
# Batches after which a run is killed, and how many seconds later at most: before the first batch,
# at once or in the midst of one, or so late that the file is being assembled.
NEXT = (0, 1, 1, 2, 5, 20)
DELAYS = (0.0, 0.005, 0.05, 0.5, 2.0)


@dataclass(frozen=True)
class Story:
    """What is run, and what lies at its `out` before."""

    name: str
    out: Path
    run: Callable[[], object]
    begin: Callable[[], None]


def run(
    command: Callable[[], object], out: Path, batches: int | None = None, delay: float = 0.0
) -> int:
    """The exit status of a forked run (negative: the signal).

    batches: kill it `delay` seconds after so many are staged, more than there were before; waiting
        for what it does, rather than for a time, follows the pace of a busy machine.
    """
    wanted = None if batches is None else _staged(out) + batches
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        try:
            command()
        except UserError as error:
            print(f"refused: {error}", file=sys.stderr)
            os._exit(2)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(3)
        os._exit(0)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if wanted is not None and _staged(out) >= wanted:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            wanted = None
        time.sleep(0.001)


def _staged(out: Path) -> int:
    """Batches of images or classes."""
    try:
        names = os.listdir(out.with_name(f"{out.name}.partial"))  # noqa: PTH208
    except OSError:  # whoever is done removes them
        return 0
    return sum(name.endswith(".batch") for name in names)


def tell(story: Story, kills: int, rng: random.Random) -> int:
    """Kill so many runs of a story, over and over; returns how often it came to its end.

    Raises AssertionError where something is lost or refused.
    """
    out = story.out
    story.begin()
    assert run(story.run, out) == 0, f"{story.name} does not run"
    wanted = datasets(out)
    ends = killed = 0
    story.begin()
    before = out.read_bytes() if out.exists() else None
    while True:
        last = killed >= kills
        batches, delay = (None, 0.0) if last else (rng.choice(NEXT), rng.choice(DELAYS))
        status = run(story.run, out, batches, delay * rng.random())
        assert status in (0, -signal.SIGKILL), f"{story.name} ended with {status}"
        killed += status == -signal.SIGKILL
        left = out.read_bytes() if out.exists() else None
        if left != before:
            assert datasets(out) == wanted, f"{story.name} ended with another cache"
            ends += 1
            story.begin()
        else:
            assert status != 0, f"{story.name} came to its end and left nothing"
        if last:
            return ends


def stories(folder: Path, small: bool) -> list[Story]:
    first, base, updated, merged = (folder / f"{n}.h5" for n in ("first", "base", "updated", "all"))
    parts = tuple(folder / f"part-{index}.h5" for index in (1, 2))
    changing = f"folder:{_source(folder / 'data', 4 if small else 40, 2 if small else 15)}"
    spec = f"folder:{_source(folder / 'small', 4, 2)}" if small else "digits"
    options: dict[str, Any] = {"views": 1, "batch_size": 4, "workers": 2}

    def encode(dataset: str, out: Path, **others: Any) -> Callable[[], object]:
        return lambda: extract(ExtractConfig(dataset=dataset, out=out, **options | others))

    assert run(encode(changing, base), base) == 0
    for index, part in enumerate(parts, start=1):
        assert run(encode(changing, part, shard=f"{index}/2"), part) == 0
    _change(folder / "data")

    def nothing(out: Path) -> None:
        out.unlink(missing_ok=True)
        shutil.rmtree(f"{out}.partial", ignore_errors=True)

    def changed_source() -> None:
        nothing(updated)
        shutil.copyfile(base, updated)

    return [
        Story("extract", first, encode(spec, first, batch_size=64), lambda: nothing(first)),
        Story("update", updated, encode(changing, updated, update=True), changed_source),
        Story("merge", merged, lambda: merge_parts(parts, merged), lambda: nothing(merged)),
    ]


def _source(root: Path, train: int, others: int) -> Path:
    return make_folder(root, {"train": train, "val": others, "test": others}, CLASSES)


def _change(root: Path) -> None:
    """Something new, something gone, something changed, and a class that shifts the labels."""
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        if number % 7 == 0:
            photograph(10_000 + number).save(path)
        elif number % 11 == 0:
            path.unlink()
    for split in ("train", "val", "test"):
        place = root / split / "bee"
        place.mkdir()
        for number in range(3):
            photograph(20_000 + number + 10 * len(split) + ord(split[0])).save(
                place / f"{number}.png"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each of the three commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="with few images")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        for story in stories(Path(folder), arguments.small):
            ends = tell(story, arguments.kills, rng)
            print(f"{story.name}: {arguments.kills} runs killed, {ends} stories ended the same")


if __name__ == "__main__":
    main()
