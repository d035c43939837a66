"""Prompts: templates filled with class names, and sentences of a class's own."""

import os
import random
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated
from unicodedata import normalize

from clip_adapter.errors import UserError
from clip_adapter.files import read_users_text, user_path
from clip_adapter.records import Rule, from_file
from clip_adapter.words import quoted, some

PROMPT_MAX = 5000  # characters; text towers read 77 tokens
ENSEMBLE = "ensemble"
CONTROLS = 15  # of words, and as many of letters
# A line of code or JSON: quoted as a whole, a bracket, a list, an assignment, a function.
CODE = re.compile(
    r"""[\[\](),]+|[\[(]\s*["'].*|\w+ *= *[\[(].*|\w{0,2}(["']).*\1[\s,\])]*(#.*)?|lambda .*"""
)
Sentences = Annotated[
    list[Annotated[str, Rule("that is not empty", str.strip)]], Rule("that is not empty", len)
]


def _check_prompt(text: str, what: str) -> None:
    from clip_adapter.extract.datasets.source import check_storable

    check_storable(text, what)
    if len(text) > PROMPT_MAX:
        raise UserError(
            f"The {what} {reprlib.repr(text)} has {len(text):,} characters, more than "
            f"{PROMPT_MAX:,}, of which no text tower reads a part; shorten it."
        )


def resolve_templates(values: Sequence[str]) -> tuple[str, ...]:
    """What `--templates` asks for.

    values: templates, names of text files with a template per line (empty lines do not count), or
        `ensemble`, the seven that were chosen for ImageNet with CLIP.

    Raises UserError for a template without its place for the class name, one that comes twice, and
    a file that cannot be read or is empty.
    """
    templates: list[str] = []
    for value in values:
        if value == ENSEMBLE:
            from clip_adapter.extract.datasets.catalogue import load_catalogue

            templates += load_catalogue()["imagenet"].templates_ensemble
        elif "{}" in value:
            templates.append(value)
        elif value and os.path.exists(os.path.expanduser(value)):  # noqa: PTH110, PTH111 - raise nothing
            # What is no file has a sentence of its own.
            templates += _lines(user_path(value), "templates")
        else:
            raise UserError(
                f"The template {reprlib.repr(value)} needs exactly one {{}} where the class name "
                "goes, and there is no file of that name either."
            )
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(
                f"The template {reprlib.repr(template)} needs exactly one {{}} where the class "
                "name goes."
            )
        _check_prompt(template, "template")
    repeated = sorted(template for template, times in Counter(templates).items() if times > 1)
    if repeated:
        raise UserError(f"The template {reprlib.repr(repeated[0])} is given twice; name it once.")
    return tuple(templates)


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file with one per line (empty lines do not count), composed (NFC).

    Raises UserError for a file that cannot be read or is empty, and for a name that comes twice.
    """
    names = [normalize("NFC", line) for line in _lines(user_path(str(path)), "class names")]
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path} has the class name {quoted(name)} twice; name each class once.")
    return names


def _lines(path: Path, what: str) -> list[str]:
    lines = [line.strip() for line in read_users_text(path).splitlines()]
    kept = [line for line in lines if line]
    if not kept:
        raise UserError(f"{path} has no {what}; write one per line.")
    for line in kept:
        if CODE.fullmatch(line):
            raise UserError(
                f"{path} holds code or JSON ({reprlib.repr(line)}), not {what}; write one per "
                "line, without quotes, commas and brackets."
            )
    return kept


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """Sentences by class from a JSON file `{class: [sentences]}`, CuPL's format.

    Raises UserError for a file that is not that.
    """
    wanted = "a JSON object with a list of sentences for each class"
    stored = from_file(dict[str, Sentences], path, wanted)
    for sentences in stored.values():
        for sentence in sentences:
            _check_prompt(sentence, "description")
    return stored


def descriptions_in_order(
    descriptions: Mapping[str, Sequence[str]], class_names: Sequence[str]
) -> list[Sequence[str]]:
    """The sentences of each class, C lists.

    Names are compared without regard to case, with underscores as spaces, unless all are there as
    they are written.

    Raises UserError for classes without sentences and sentences of classes that do not exist.
    """
    plain = str if descriptions.keys() == set(class_names) else _plain
    by_name: dict[str, Sequence[str]] = {}
    for name, sentences in descriptions.items():
        if by_name.setdefault(plain(name), sentences) is not sentences:
            raise UserError(f"The descriptions have the class {name!r} twice; join the two.")
    wanted = {plain(name): name for name in class_names}
    missing = [name for key, name in wanted.items() if key not in by_name]
    extra = [name for name in descriptions if plain(name) not in wanted]
    if missing:
        beside = f" (there are some of {some(extra)}, which is no class)" if extra else ""
        raise UserError(f"There are no descriptions of {some(missing)}{beside}; add them.")
    if extra:
        raise UserError(f"There are descriptions of {some(extra)}, which is no class; remove them.")
    return [by_name[plain(name)] for name in class_names]


def random_templates(seed: int, class_names: Sequence[str]) -> tuple[str, ...]:
    """Templates that tell nothing of any class: 15 with random words and 15 with random letters
    (WaffleCLIP, Roth et al., arXiv 2306.07282).

    Each has as many words as one of the class names, its letters are as many as those of that
    name's words. Words are those of CLIP's byte-pair vocabulary, which comes with open_clip.

    Examples:
        >>> from clip_adapter.extract.text.prompts import random_templates
        >>> len(random_templates(7, ["cat", "sea lion"]))
        30
    """
    import open_clip.tokenizer

    # A whole word is a token that ends there; those of up to three letters are mostly endings.
    known = open_clip.tokenizer.SimpleTokenizer().encoder
    ends = [token.removesuffix("</w>") for token in known if token.endswith("</w>")]
    words = [word for word in ends if len(word) > 3 and word.isascii() and word.isalpha()]
    rng = random.Random(seed)
    drawn: dict[str, None] = {}
    for is_word in (True, False):
        wanted = len(drawn) + CONTROLS
        while len(drawn) < wanted:
            name = rng.choice(class_names).replace("_", " ").split()
            parts = [
                rng.choice(words) if is_word else "".join(rng.choices(ascii_lowercase, k=len(part)))
                for part in name
            ]
            drawn[f"a photo of a {{}}, which has {' '.join(parts)}."] = None
    return tuple(drawn)


def _plain(name: str) -> str:
    return " ".join(normalize("NFC", name).replace("_", " ").casefold().split())


def prompts(class_name: str, templates: Sequence[str]) -> list[str]:
    """The prompts of one class; underscores in its name become spaces (as in CoOp)."""
    return [template.replace("{}", class_name.replace("_", " ")) for template in templates]
