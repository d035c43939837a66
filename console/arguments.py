"""The command line as a dataclass, and one sentence where it is none."""

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import TypeVar

import tyro

from clip_adapter.cache.errors import UserError

Config = TypeVar("Config")

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
RULE = re.compile(r"╮\n|\n[─-]+\n")
HINTS = ("Perhaps you meant", "Arguments similar to")
HINTS_SHOWN = 3


def parse(config_type: type[Config], program: str, arguments: Sequence[str] | None) -> Config:
    """`config_type` as the arguments say, by default those of the process.

    Raises UserError for arguments that do not parse, and SystemExit after --help.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(
                config_type,
                prog=program,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as exited:
        if not exited.code:
            raise
        raise UserError(f"{_sentence(said.getvalue())}; see {program} --help.") from None


def _sentence(box: str) -> str:
    """What tyro says under a title in sections: the first one, and the options that others propose.

    The rules between them depend on the encoding of the terminal.
    """
    lines = "\n".join(line.strip("│ ") for line in COLOUR.sub("", box).splitlines())
    sections = RULE.split(lines)
    message, *others = sections[1:] or sections
    words = " ".join(message.split()).rstrip(".")
    words = re.sub(r"\. ([A-Z])", lambda found: f"; {found[1].lower()}", words)
    proposed = "\n".join(section for section in others if section.startswith(HINTS))
    options = re.findall(r"^--[\w-]+", proposed, re.MULTILINE)[:HINTS_SHOWN]
    return f"{words}; perhaps you meant {' or '.join(options)}" if options else words
