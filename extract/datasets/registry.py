"""Data sets by name."""

import reprlib
from importlib import import_module
from pathlib import Path
from typing import Any

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.catalogue import CatalogueEntry, load_catalogue
from clip_adapter.extract.datasets.image_files import Listing
from clip_adapter.extract.datasets.source import ImageDataset, SourceOptions, checked
from clip_adapter.files import is_folder
from clip_adapter.words import near

# Name → module:function, which is called with what stands behind the colon and the options.
NAMED = {"digits": "digits:open_digits"}
KINDS = {
    "tfds": "tfds:open_tfds",
    "coop": "coop_layout:open_coop",
    "folder": "folder:open_folder",
    "images": "folder:open_images",
    "csv": "table:open_csv",
    "hf": "hugging_face:open_hugging_face",
    "wds": "tars:open_tars",
}


def open_dataset(spec: str, options: SourceOptions = SourceOptions()) -> ImageDataset:  # noqa: B008
    """The data set that `spec` names, checked and ready to be read.

    spec: `digits`; a name of the literature such as `oxford_pets`, which means CoOp's layout where
        `options.data_root` holds its folder, and TensorFlow Datasets elsewhere;
        `tfds:BUILDER[/CONFIG]`, `coop:FOLDER`, `folder:FOLDER`, `images:FOLDER` of images without
        labels, for which `options.class_names` are given, `csv:FILE`, `hf:ORG/NAME` (or
        `hf:FOLDER`), or `wds:FOLDER` of tars.

    Raises UserError for an unknown name, with the near matches, and for data that cannot be had
    or used.
    """
    return checked(_open(spec, options))


def provenance_of(spec: str, options: SourceOptions) -> dict[str, Any] | None:
    """What would be the source and version in a data set's provenance, without opening it; None for
    one that lies on this machine and can just as well be opened."""
    kind, _, rest = spec.partition(":")
    entry = load_catalogue().get(spec)
    if entry is not None and entry.tfds and _coop_folder(options.data_root, entry) is None:
        kind, rest = "tfds", entry.tfds
    if kind == "tfds" and rest:
        from clip_adapter.extract.datasets.tfds import builder_version

        return {"source": f"tfds:{rest}", "version": builder_version(rest, options.data_dir)}
    if kind == "hf" and not is_folder(Path(rest)):
        return {"source": f"hf:{rest}"}
    return None


def _coop_folder(root: Path | None, entry: CatalogueEntry) -> Path | None:
    """Where a data set lies in CoOp's layout, None where it does not lie below `root`.

    Raises UserError for a root that is none, or that is a level too high or too low.
    """
    if root is None:
        return None
    if is_folder(root / entry.coop_dir):
        return root / entry.coop_dir
    if not is_folder(root):
        raise UserError(f"There is no folder {root}; give the one that holds {entry.coop_dir}.")
    own = root.resolve()
    if own.name == entry.coop_dir:
        raise UserError(f"--data-root {root} is {entry.coop_dir} itself; give {own.parent}.")
    for name in Listing(root).level(root).folders:
        if is_folder(root / name / entry.coop_dir):
            raise UserError(
                f"--data-root {root} holds no {entry.coop_dir}, but {root / name} does; give that."
            )
    return None


def _open(spec: str, options: SourceOptions) -> ImageDataset:
    kind, colon, rest = spec.partition(":")
    if options.columns and kind not in ("csv", "hf"):
        raise UserError("--columns is for csv: and hf:, which have columns; leave it out.")
    if options.group is not None and kind not in ("csv", "folder", "images"):
        raise UserError(
            "--group is for folder:, images: and csv:, whose images lie in folders; leave it out."
        )
    if spec in NAMED:
        return _open_source(NAMED[spec], "", options)
    if colon and kind in KINDS:
        if not rest:
            raise UserError(f"{spec} names nothing; write what to open behind the colon.")
        return _open_source(KINDS[kind], rest, options)
    catalogue = load_catalogue()
    if spec in catalogue:
        return _literature(catalogue[spec], options)
    known = [*NAMED, *catalogue]
    raise UserError(
        f"Unknown data set {reprlib.repr(spec)}; {near(spec, known)} "
        f"(known: {', '.join(known)}, and {', '.join(f'{kind}:…' for kind in KINDS)})."
    )


def _literature(entry: CatalogueEntry, options: SourceOptions) -> ImageDataset:
    from clip_adapter.extract.datasets.coop_layout import coop_instructions, open_coop

    if (folder := _coop_folder(options.data_root, entry)) is not None:
        return open_coop(str(folder), options)
    if entry.tfds is None:
        raise UserError(
            f"{entry.name} is not in TensorFlow Datasets; "
            f"{coop_instructions(entry, options.data_root)}."
        )
    from clip_adapter.extract.datasets.tfds import open_tfds

    if options.data_root is not None:
        options.listener.warn(
            f"{options.data_root} holds no {entry.coop_dir}: {entry.name} is taken from TensorFlow "
            "Datasets, whose splits are not CoOp's."
        )
    return open_tfds(entry.tfds, options, entry)


def _open_source(where: str, rest: str, options: SourceOptions) -> ImageDataset:
    module, _, function = where.partition(":")
    opened = getattr(import_module(f"clip_adapter.extract.datasets.{module}"), function)
    return opened(rest, options)
