"""Prompts: templates filled with class names, and sentences of a class's own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.words import some

ENSEMBLE = "ensemble"


def check_templates(templates: Sequence[str]) -> None:
    """Raises UserError for a template without its place for the class name."""
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(
                f"The template {template!r} needs exactly one {{}} where the class name goes."
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
        elif "{}" not in value and Path(value).is_file():
            templates += _lines(Path(value))
        else:
            templates.append(value)
    check_templates(templates)
    repeated = sorted({template for template in templates if templates.count(template) > 1})
    if repeated:
        raise UserError(f"The template {repeated[0]!r} is given twice; name it once.")
    return tuple(templates)


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _read(path).splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{path} has no templates; write one per line.")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; save it as such.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """Sentences by class from a JSON file `{class: [sentences]}`, CuPL's format.

    Raises UserError for a file that is not that.
    """
    try:
        stored = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(stored, dict) or not all(map(_is_sentences, stored.values())):
        raise UserError(
            f"{path} does not hold descriptions; it has to be an object with a list of sentences "
            "for each class."
        )
    return stored


def _is_sentences(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(sentence, str) and sentence.strip() for sentence in value)
    )


def descriptions_in_order(
    descriptions: Mapping[str, Sequence[str]], class_names: Sequence[str]
) -> list[Sequence[str]]:
    """The sentences of each class, C lists.

    Names are compared without regard to case, with underscores as spaces.

    Raises UserError for classes without sentences and sentences of classes that do not exist.
    """
    by_name: dict[str, Sequence[str]] = {}
    for name, sentences in descriptions.items():
        if by_name.setdefault(_plain(name), sentences) is not sentences:
            raise UserError(f"The descriptions have the class {name!r} twice; join the two.")
    wanted = {_plain(name): name for name in class_names}
    missing = [name for plain, name in wanted.items() if plain not in by_name]
    extra = [name for name in descriptions if _plain(name) not in wanted]
    if missing:
        beside = f" (there are some of {some(extra)}, which is no class)" if extra else ""
        raise UserError(f"There are no descriptions of {some(missing)}{beside}; add them.")
    if extra:
        raise UserError(f"There are descriptions of {some(extra)}, which is no class; remove them.")
    return [by_name[_plain(name)] for name in class_names]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def prompts(class_name: str, templates: Sequence[str]) -> list[str]:
    """The prompts of one class; underscores in its name become spaces (as in CoOp)."""
    return [template.replace("{}", class_name.replace("_", " ")) for template in templates]
