"""How arguments are read: from the type of a dataclass's field to the keywords of argparse.

These types are known: str, Path, int, float, bool (a flag), Literal[…] of words, X | None,
int | Literal[…], float | Literal[…], and tuple[X, …], which takes any number of values.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from clip_adapter.words import quoted

Value = TypeVar("Value")
Positional = Annotated[Value, "by position"]
"""`Positional[Path]`: a field that is given by its position and not as an option."""


def positional_type(hint: Any) -> Any | None:
    """X of `Positional[X]`, None for any other type."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else None


def keywords_for(hint: Any) -> dict[str, Any]:
    """The keywords of `add_argument` for values of a type."""
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is tuple:
        return {"nargs": "*"} | keywords_for(get_args(hint)[0])
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [word for kind in members if get_origin(kind) is Literal for word in get_args(kind)]
    kinds = [kind for kind in members if kind is not NoneType and get_origin(kind) is not Literal]
    if not kinds:
        return {"choices": words}
    reader, metavar = READERS[kinds[0]]
    if words:
        return {"type": number_or(*words, number=reader), "metavar": "|".join([metavar, *words])}
    return {"type": reader, "metavar": metavar}


def number_or(*words: str, number: Callable[[str], Any] = float) -> Callable[[str], Any]:
    """A reader of numbers that takes some words too, for `type` of `add_argument`."""

    def read(text: str) -> Any:
        if text in words:
            return text
        with suppress(ValueError, argparse.ArgumentTypeError):
            return number(text)
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is no number and not {' or '.join(words)}"
        )

    return read


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no whole number") from None


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no number") from None


def _path(text: str) -> Path:
    if not text:  # as of a variable that is not set; Path would make it the current folder
        raise argparse.ArgumentTypeError("an empty name names no file; write . for this folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} names a home that is unknown") from None


READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    str: (str, "TEXT"),
    int: (_integer, "N"),
    float: (_real, "X"),
    Path: (_path, "PATH"),
}
