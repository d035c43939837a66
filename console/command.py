"""Run one command: dataclass in, exit code out."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from clip_adapter.cache.errors import UserError

Config = TypeVar("Config")

EXIT_PARTIAL = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run_command(
    config_type: type[Config],
    command: Callable[[Config], object],
    program: str,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the arguments into `config_type`, call `command` with it and exit.

    A UserError becomes its one sentence on standard error and exit code 2, as do arguments that
    do not parse. An int that `command` returns is the exit code. What a KeyboardInterrupt was given
    to say is said.
    """
    try:
        from clip_adapter.console.arguments import parse  # which takes time to import

        result = command(parse(config_type, program, arguments))
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PARTIAL)
    except KeyboardInterrupt as interruption:
        print("; ".join([f"{program}: interrupted", *interruption.args]), file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)
