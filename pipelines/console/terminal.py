"""What a run has to say, on the terminal: its results, its remarks and how far it is."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from clip_adapter.listener import Advance, Listener
from clip_adapter.words import printable, readable

LINE_EVERY_SECONDS = 10.0


class Terminal(Listener):
    """Results go to standard output, all else to standard error; names in it command no terminal.

    program: stands before notes.
    """

    def __init__(self, program: str) -> None:
        self._program = program

    def result(self, text: str) -> None:
        print("\n".join(map(printable, text.split("\n"))))

    def note(self, sentence: str) -> None:
        print(readable(f"{self._program}: {sentence}"), file=sys.stderr)

    def warn(self, sentence: str) -> None:
        print(readable(f"warning: {sentence}"), file=sys.stderr)

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        return progress(what, total, done)


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show how much of `total` is done on standard error while the block runs.

    Yields `advance(count, note)`, which adds `count` and shows `note` beside the bar. Away from a
    terminal a line is printed every ten seconds, and none for work that ends sooner.
    """
    if sys.stderr.isatty():
        with _bar(what, total, done) as advance:
            yield advance
    else:
        yield _lines(what, total, done)


@contextmanager
def _bar(what: str, total: int, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(count: float, note: str = "") -> None:
            bar.update(task, advance=count, note=note)

        yield advance


def _lines(what: str, total: int, done: float) -> Advance:
    last = time.monotonic()

    def advance(count: float, note: str = "") -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= LINE_EVERY_SECONDS:
            last = time.monotonic()
            print(f"{what}: {done:.0f}/{total} {note}".rstrip(), file=sys.stderr)

    return advance


def no_advance(count: float, note: str) -> None:
    """Progress that nobody sees."""
