"""What a file from outside holds, as a declaration says: types and ranges are stated at the field.

    @dataclass(frozen=True)
    class Crop:
        side: Annotated[int, between(1, 8192)]
        mode: Literal["shortest", "longest"] = "shortest"

    from_json(Crop, '{"side": 0}')  # Contradiction: side is 0, not an integer from 1 to 8,192

A dataclass takes the names that it has and no others; those with a default may be missing. A
TypedDict keeps what it does not know. Lists become tuples where that is declared, and an integer is
a number. Of a union the first kind that fits counts. What joins several fields is checked in
`__post_init__`.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from clip_adapter.errors import Contradiction, UserError
from clip_adapter.files import named_once, parse_json, read_users_text
from clip_adapter.words import quoted

T = TypeVar("T")
LARGEST_INTEGER = 2**1000  # that is taken for a number; from 2**1024 on it would be none
WORDS: Mapping[Any, str] = {
    **{str: "a string", bool: "true or false", int: "an integer", float: "a number"},
    **{NoneType: "null", list: "a list", tuple: "a list", Path: "a path"},
}


@dataclass(frozen=True)
class Rule:
    """What must hold beside the type. words: they follow the type's, `a string` `of 64 digits`."""

    words: str
    fits: Callable[[Any], bool]


def between(least: float, most: float) -> Rule:
    """From `least` to `most`, both included; NaN is not."""
    ends = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (least, most))
    return Rule(f"from {' to '.join(ends)}", lambda value: least <= value <= most)


def from_json(kind: type[T], text: str | bytes, place: str = "") -> T:
    """The `kind` that a JSON document states.

    Raises ValueError for no JSON, and Contradiction, which is one, for a name that stands twice in
    an object and as `from_document` does.
    """
    return from_document(kind, parse_json(text, object_pairs_hook=named_once), place)


def from_file(kind: type[T], path: Path, wanted: str, advice: str = "") -> T:
    """The `kind` that a JSON file states which a person wrote.

    wanted: what it should be, in words; advice: what to do, behind a semicolon.
    Raises UserError as `read_users_text` does, and for anything else.
    """
    text = read_users_text(path)
    try:
        return from_json(kind, text)
    except Contradiction as error:
        raise UserError(f"{path} is not {wanted}: {error}{advice}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}{advice}.") from error


def from_document(kind: type[T], document: Any, place: str = "") -> T:
    """The `kind` that JSON's objects, lists, strings and numbers make.

    place: what `document` is called in the sentence.
    Raises Contradiction: `layers[2] is 'a', not an integer` or `it lacks layers`.
    """
    return _read(kind, document, place, kind)


def _read(kind: Any, value: Any, place: str, wanted: Any) -> Any:
    """wanted: what is declared there, of which `kind` may be a part."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        content = _read(inner[0], value, place, wanted)
        return content if all(r.fits(content) for r in inner[1:]) else _refuse(value, place, wanted)
    if origin in (Union, UnionType):
        return _one_of(inner, value, place, wanted)
    if origin is float and type(value) is int and abs(value) < LARGEST_INTEGER:
        return float(value)
    if not _fits(origin, inner, value):
        _refuse(value, place, wanted)
    if origin in (list, tuple) and inner:
        return _listed(origin, inner, value, place, wanted)
    if origin in (dict, Mapping) and inner:
        return {n: from_document(inner[1], part, _within(place, n)) for n, part in value.items()}
    return _record(origin, value, place) if _is_record(origin) else value


def _fits(kind: Any, inner: Sequence[Any], value: Any) -> bool:
    """Whether it is one of the words, or what JSON has for such a kind."""
    if kind is Literal:
        return any(value == word and type(value) is type(word) for word in inner)
    in_json = list if kind is tuple else dict if kind is Mapping or _is_record(kind) else kind
    return kind is Any or type(value) is in_json


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind) or typing.is_typeddict(kind)


def _one_of(kinds: Sequence[Any], value: Any, place: str, wanted: Any) -> Any:
    if value is not None and len(kinds) == 2 and kinds[1] is NoneType:
        return _read(kinds[0], value, place, wanted)  # whose sentence may name an inner place
    for kind in kinds:
        try:
            return _read(kind, value, place, wanted)
        except Contradiction:
            continue
    return _refuse(value, place, wanted)


def _listed(
    kind: Any, inner: Sequence[Any], value: Sequence[Any], place: str, wanted: Any
) -> Sequence[Any]:
    one_for_all = kind is list or inner[-1] is ...
    if not one_for_all and len(inner) != len(value):
        _refuse(value, place, wanted)
    kinds = [inner[0]] * len(value) if one_for_all else inner
    places = (f"{place}[{number}]" for number in range(len(value)))
    return kind(map(from_document, kinds, value, places))


def _record(kind: Any, value: Mapping[str, Any], place: str) -> Any:
    kinds, needed = _declared(kind)
    if missing := [name for name in needed if name not in value]:
        raise Contradiction(f"{place or 'it'} lacks {', '.join(missing)}")
    unknown = value.keys() - kinds
    if unknown and not typing.is_typeddict(kind):
        raise Contradiction(f"{place or 'it'} has {quoted(min(unknown))}, which is not known here")
    known = {
        name: from_document(kinds[name], value[name], _within(place, name))
        for name in kinds
        if name in value
    }
    # What is kept keeps its order, too.
    return {**value, **known} if typing.is_typeddict(kind) else kind(**known)


def _within(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


@cache
def _declared(kind: Any) -> tuple[Mapping[str, Any], Sequence[str]]:
    """The kinds of a record's fields, and the names of those that have no default."""
    kinds = typing.get_type_hints(kind, include_extras=True)
    if typing.is_typeddict(kind):
        return kinds, [name for name in kinds if name in kind.__required_keys__]
    bare = [f.name for f in fields(kind) if f.default is MISSING is f.default_factory]
    return {field.name: kinds[field.name] for field in fields(kind)}, bare


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        return " ".join([_words(inner[0]), *(rule.words for rule in inner[1:])])
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if origin is tuple and inner[-1:] != (...,):
        return f"a list of {len(inner)}"
    return WORDS.get(origin, "an object")


def _refuse(value: Any, place: str, wanted: Any) -> NoReturn:
    raise Contradiction(f"{place or 'it'} is {quoted(value)}, not {_words(wanted)}")


def check_fields(record: Any, but: Sequence[str] = ()) -> None:
    """Raises UserError where a field of a dataclass holds something else than it declares, as a
    caller's code may put there. but: fields that somebody else checks, who says more."""
    for name, kind in typing.get_type_hints(type(record), include_extras=True).items():
        if name not in but and not _holds(kind, value := getattr(record, name)):
            raise UserError(f"{name} is {quoted(value)}, not {_words(kind)}.")


def _holds(kind: Any, value: Any) -> bool:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        return _holds(inner[0], value)
    if origin in (Union, UnionType):
        return any(_holds(one, value) for one in inner)
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_holds(inner[0], one) for one in value)
    if origin in (int, float):
        numbers = Integral if origin is int else Real
        return isinstance(value, numbers) and not isinstance(value, bool)
    return origin is Any or isinstance(value, origin)
