"""Run one command: arguments in, exit code out, and one sentence where it cannot go on."""

import errno
import io
import os
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NoReturn, TypeVar

from clip_adapter.errors import UserError
from clip_adapter.pipelines.console.interruption import EXIT_INTERRUPTED, noticed
from clip_adapter.words import readable, size

Config = TypeVar("Config")

EXIT_PARTIAL = 1
EXIT_BAD_INPUT = 2
# What a system says of itself, in whatever place; the library's own OSErrors have other numbers.
OF_THE_SYSTEM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENOMEM}
NO_TEMPORARY_FOLDER = errno.ENOENT  # without a name: of the module tempfile, when a library asks it


def run_command(
    config_type: type[Config],
    command: Callable[[Config], object],
    program: str,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the arguments into `config_type`, call `command` with it and exit as `run` does."""

    def parse_and_call() -> object:
        from clip_adapter.pipelines.console.parser import parse  # takes time to import

        return command(parse(config_type, program, arguments))

    run(program, parse_and_call)


def run(program: str, work: Callable[[], object]) -> NoReturn:
    """Call `work` and exit; an int that it returns is the exit code.

    A UserError becomes its one sentence on standard error and exit code 2; so do a lack of memory
    and what the system refuses (OSError). What a KeyboardInterrupt was given to say is said. Any
    other exception is a mistake in this program and keeps its traceback.
    """
    for stream in _streams():  # an encoding without ± is no reason to fail
        stream.reconfigure(errors="backslashreplace")
    try:
        with noticed() as interrupted:
            result = _result(work, interrupted)
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        _exit(EXIT_BAD_INPUT, f"{program}: {error}", getattr(error, "__notes__", ()))
    except BrokenPipeError:  # whoever read the output has seen enough
        _exit(EXIT_PARTIAL)
    except KeyboardInterrupt as interruption:
        _exit(EXIT_INTERRUPTED, "; ".join([f"{program}: interrupted", *interruption.args]))
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        _exit(EXIT_BAD_INPUT, f"{program}: There is not enough memory for this{reason}.")
    except ImportError as error:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            raise
        _exit(
            EXIT_BAD_INPUT,
            f"{program}: A library cannot be loaded within the address space of {size(limit)} that "
            f"`ulimit -v` allows ({error}); allow more.",
        )
    except OSError as error:
        if error.filename is None and error.errno == NO_TEMPORARY_FOLDER:
            advice = "let TMPDIR name a folder that can be written"
            _exit(EXIT_BAD_INPUT, f"{program}: {error.strerror or error}; {advice}.")
        if error.filename is None and error.errno not in OF_THE_SYSTEM:
            raise
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        _exit(EXIT_BAD_INPUT, f"{program}: {place}{error.strerror or error}.")
    _exit(result if isinstance(result, int) else 0)


def _result(work: Callable[[], object], interrupted: Sequence[bool]) -> object:
    try:
        return work()
    except SystemExit as ended:  # after --help
        return ended.code
    except ImportError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise


def _exit(code: int, sentence: str | None = None, notes: Iterable[str] = ()) -> NoReturn:
    """Say the sentence, with notes below it, on standard error and exit, also where nothing can be
    written any more."""
    with suppress(OSError):
        if sentence:
            lines = (line for note in notes for line in note.splitlines())
            print("\n".join(map(readable, (sentence, *lines))), file=sys.stderr)
    for stream in _streams():
        try:
            stream.flush()
        except OSError:  # the interpreter would try once more, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _streams() -> list[io.TextIOWrapper]:
    """Standard output and error, without one that is closed or that a caller has replaced."""
    return [each for each in (sys.stdout, sys.stderr) if isinstance(each, io.TextIOWrapper)]
