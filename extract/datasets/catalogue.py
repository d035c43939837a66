"""The data sets of the literature: class names, prompts, and where their images are found.

Class names, templates and split sizes are those of CoOp's published split files (arXiv 2109.01134;
the same templates serve Tip-Adapter and CLIP-Adapter), ImageNet's names and its ensemble those
published with CLIP. The class names of Food-101 and SUN397 follow from their archives' class lists
by CoOp's rules; FGVC-Aircraft's stand in its own variants.txt. ImageNet-A and -R have images of 200
of ImageNet's 1,000 classes and are evaluated on those 200, as their papers and CoOp do.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from clip_adapter.errors import UserError
from clip_adapter.records import from_document

LEFT_OUT = -1


@dataclass(frozen=True)
class CatalogueEntry:
    """One data set of the literature.

    class_names: C names in label order; empty where the files of the data set hold them.
    templates, templates_ensemble: prompts with {} for the class name.
    coop_dir: its folder in CoOp's layout; `coop_images` lies in it. What else lies there is one of
        coop_split_file: a JSON file of (path, label, class name) per split;
        coop_lists and coop_classes_file: text files with an image and its class per line;
        coop_folders: per split, a folder with one folder of images per class.
    coop_split_sizes: images per published split, where known.
    tfds: builder in TensorFlow Datasets, None where none fits.
    tfds_names: the builder's names of classes that it calls differently.
    tfds_left_out: the builder's classes that the literature leaves out.
    classes_kept: where only some of the builder's classes are evaluated, their labels.
    """

    name: str
    classes: int
    templates: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    templates_ensemble: tuple[str, ...] = ()
    coop_dir: str = ""
    coop_images: str = "."
    coop_split_file: str | None = None
    coop_lists: Mapping[str, str] = field(default_factory=dict)
    coop_classes_file: str | None = None
    coop_folders: Mapping[str, str] = field(default_factory=dict)
    coop_split_sizes: Mapping[str, int] = field(default_factory=dict)
    tfds: str | None = None
    tfds_names: Mapping[str, str] = field(default_factory=dict)
    tfds_left_out: tuple[str, ...] = ()
    classes_kept: tuple[int, ...] = ()


@cache
def load_catalogue() -> Mapping[str, CatalogueEntry]:
    """Every data set of the literature by its name."""
    stored = json.loads(files(__package__).joinpath("catalogue.json").read_text("utf-8"))
    return MappingProxyType({name: _entry(name, stored) for name in stored})


def _entry(name: str, stored: dict[str, dict[str, Any]]) -> CatalogueEntry:
    values = dict(stored[name])
    if parent := values.pop("classes_of", None):
        for key in ("templates", "templates_ensemble", "class_names"):
            values[key] = stored[parent][key]
        if kept := values.get("classes_kept"):
            values["class_names"] = [values["class_names"][label] for label in kept]
    return from_document(CatalogueEntry, {"name": name, **values})


def match_classes(
    builders_names: Sequence[str], entry: CatalogueEntry | None
) -> tuple[str, list[int]]:
    """How the classes of a TFDS builder were matched, and for each of its labels ours or LEFT_OUT.

    Raises UserError where it has another number of classes than the literature.
    """
    if entry is None:
        return "the builder's own", list(range(len(builders_names)))
    if entry.classes_kept:
        kept = {label: index for index, label in enumerate(entry.classes_kept)}
        return "by order", [kept.get(label, LEFT_OUT) for label in range(len(builders_names))]
    ours = {
        _words(entry.tfds_names.get(name, name)): label
        for label, name in enumerate(entry.class_names)
    }
    left_out = {_words(name) for name in entry.tfds_left_out}
    theirs = [_words(name) for name in builders_names]
    expected = set(ours) | left_out
    if len(ours) == entry.classes and set(theirs) == expected and len(theirs) == len(expected):
        return "by name", [ours.get(words, LEFT_OUT) for words in theirs]
    if len(builders_names) != entry.classes:
        raise UserError(
            f"tfds:{entry.tfds} has {len(builders_names)} classes, where {entry.name} has "
            f"{entry.classes}; use CoOp's layout (coop:FOLDER) or another version of "
            "tensorflow-datasets."
        )
    return "by order", list(range(entry.classes))


def _words(name: str) -> tuple[str, ...]:
    """What is left of a class name without case, punctuation and the order of its words."""
    return tuple(sorted(re.findall(r"[a-z0-9]+", name.lower())))
