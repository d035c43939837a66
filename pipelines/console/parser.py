"""The command line that a frozen dataclass describes: argparse in, the dataclass out.

A field is an option, an argument by position where its type says so (see `argument_types`), or
none of both where its metadata has `option` false. Its
help is the entry of the class's docstring under `Attributes:`.
"""

import argparse
import inspect
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar, get_type_hints

from clip_adapter.errors import UserError
from clip_adapter.pipelines.console.argument_types import keywords_for, positional_type
from clip_adapter.words import printable, shortened

Config = TypeVar("Config")

LONGEST_SENTENCE = 400


class Parser(argparse.ArgumentParser):
    """Raises UserError with one sentence where argparse would print its usage and exit, or take
    the last of an option's several values and drop the others, lists too."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.register("action", None, _Once)  # what stores a value where no action is named

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        sentence = printable(message[:1].upper() + message[1:])
        raise UserError(f"{shortened(sentence, LONGEST_SENTENCE)}; see {self.prog} --help.")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse passes over what cannot be written

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """What was given, and nothing else: what was not given is no attribute.

        arguments: by default those of the process.
        Raises UserError for arguments that do not parse, with the near matches of an unknown
        option, and SystemExit after --help and --version.
        """
        given, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            near = [match for name in names for match in get_close_matches(name, known, n=1)]
            hint = f"; perhaps you meant {' or '.join(dict.fromkeys(near))}" if near else ""
            shown = ", ".join(map(shortened, names or unknown))
            self.error(f"unknown {'option' if names else 'argument'} {shown}{hint}")
        return given


def parser_for(config_type: type, program: str) -> Parser:
    """The parser of the options that the fields of `config_type` are, --help and --version.

    Further options may be added to it, with `default=argparse.SUPPRESS` as these have it.
    """
    about, helps = _documentation(config_type)
    parser = Parser(
        prog=program,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="Print the version and exit.",
    )
    hints = get_type_hints(config_type, include_extras=True)
    for field in fields(config_type):
        if not field.metadata.get("option", True):
            continue
        hint, name = hints[field.name], field.name
        by_position = positional_type(hint)
        how = {"default": argparse.SUPPRESS, **keywords_for(by_position or hint)}
        if by_position:
            how["metavar"] = name.upper()
            if "nargs" in how:
                how["default"] = []
        else:
            name = f"--{field.metadata.get('flag', name).replace('_', '-')}"
            how["dest"] = field.name
            how["required"] = field.default is field.default_factory is MISSING
        described = (helps.get(field.name, "") + _default_in_words(field)).replace("%", "%%")
        parser.add_argument(name, help=described.strip(), **how)
    return parser


def config_from(config_type: type[Config], given: argparse.Namespace) -> Config:
    """The dataclass with what was given, and its defaults elsewhere."""
    values = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(config_type)  # type: ignore[arg-type]
        if (value := getattr(given, field.name, MISSING)) is not MISSING
    }
    return config_type(**values)


def parse(config_type: type[Config], program: str, arguments: Sequence[str] | None) -> Config:
    """`config_type` as the arguments say; raises what `Parser.parse` raises."""
    return config_from(config_type, parser_for(config_type, program).parse(arguments))


class _Once(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string and getattr(namespace, self.dest, self.default) is not self.default:
            several = ", with all its values behind it" if self.nargs else ""
            parser.error(f"{option_string} is given twice; give it once{several}")
        setattr(namespace, self.dest, values)


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> None:
        print(version())
        raise SystemExit(0)


def version() -> str:
    """`clip-adapter` and the version that is installed."""
    from importlib import metadata  # takes time to import

    return f"clip-adapter {metadata.version('clip-adapter')}"


def _documentation(config_type: type) -> tuple[str, dict[str, str]]:
    """The docstring above `Attributes:`, and each attribute's own words below it."""
    about, _, below = (inspect.getdoc(config_type) or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", below, re.MULTILINE)
    return about.strip(), {name: " ".join(words.split()) for name, words in entries}


def _default_in_words(field: Field[Any]) -> str:
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    if not values or any(value is absent for value in values for absent in (None, False, MISSING)):
        return ""
    return f" (default: {' '.join(map(str, values))})"
