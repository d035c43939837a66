"""What a run has to say, on the terminal."""

import sys
from contextlib import AbstractContextManager

from clip_adapter.listener import Advance, Listener
from clip_adapter.pipelines.console.progress import progress
from clip_adapter.words import printable, readable


class Spoken(Listener):
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
