"""Call a command as a process would, and find fault with what it said."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

from clip_adapter.pipelines.console.entry import COMMANDS

LONGEST = 500
MOST_LINES = 60
# Where standard output may lead, and its encoding.
OUTPUTS = {"a file": "utf-8", "ascii": "ascii", "/dev/full": "utf-8", "a closed pipe": "utf-8"}


@dataclass(frozen=True)
class Said:
    """code: the exit code, None where an exception came out. out, err: all that was written to the
    two descriptors, by libraries in C too."""

    code: int | None
    out: str
    err: str

    def faults(self) -> list[str]:
        """What must not be: an exception, another exit code, many or long words, escapes."""
        last = self.err.strip().rpartition("\n")[2]
        if self.code is None or "Traceback" in self.err:
            return [f"traceback: {_origin(self.err)}"]
        if self.code not in (0, 1, 2):
            return [f"exit code {self.code}: {last:.200}"]
        found = [f"control character: {line!r:.200}" for line in _odd(self.out + self.err)]
        lines = self.err.splitlines()
        found += [f"long: {line:.200}" for line in lines if len(line) > LONGEST]
        if self.code == 2 and (len(lines) > MOST_LINES or ": " not in last):
            found.append(f"no sentence: {self.err!r:.300}")
        if "not enough memory" in last:
            found.append(f"memory: {last:.200}")
        return found


def run_command(name: str, arguments: Sequence[str], output: str = "a file") -> Said:
    """One of `clip-adapter`'s commands, in this process."""

    def call() -> NoReturn:
        import_module(f"clip_adapter.pipelines.commands.{COMMANDS[name][0]}").main(list(arguments))
        raise AssertionError(f"{name} returned")

    return run(call, output)


def run(call: Callable[[], object], output: str = "a file") -> Said:
    """Something that ends by SystemExit, or returns (0)."""
    code: int | None = 0
    with _caught(output) as caught:
        try:
            call()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = None
    return Said(code, *caught)


@contextmanager
def _caught(output: str) -> Iterator[list[str]]:
    """Both streams, by descriptor, as a terminal or a file would get them."""
    texts: list[str] = []
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        if output == "/dev/full":
            _lead(1, os.open(output, os.O_WRONLY))
        elif output == "a closed pipe":
            source, sink = os.pipe()
            os.close(source)
            _lead(1, sink)
        sys.stdout = TextIOWrapper(os.fdopen(os.dup(1), "wb"), encoding=OUTPUTS[output])
        sys.stderr = TextIOWrapper(os.fdopen(os.dup(2), "wb"), encoding="utf-8", write_through=True)
        try:
            yield texts
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):  # nowhere to write to
                    stream.close()
            sys.stdout, sys.stderr = streams
            for number, descriptor in enumerate(kept, start=1):
                _lead(number, descriptor)
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="backslashreplace"))


def _lead(number: int, descriptor: int) -> None:
    os.dup2(descriptor, number)
    os.close(descriptor)


def _odd(text: str) -> list[str]:
    return [line for line in text.split("\n") if not line.isprintable()][:2]


def _origin(err: str) -> str:
    """The exception, and where it was raised."""
    lines = err.strip().splitlines()
    places = [line.strip() for line in lines if line.startswith("  File ")]
    ours = [place for place in places if "clip_adapter" in place] or places
    return f"{lines[-1] if lines else '?':.300} [{'; '.join(ours[-2:]):.400}]"
