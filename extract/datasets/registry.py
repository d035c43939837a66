"""Data sets by name."""

import difflib
from collections.abc import Callable
from pathlib import Path

from clip_adapter.cache.errors import UserError
from clip_adapter.extract.datasets.catalogue import CatalogueEntry, load_catalogue
from clip_adapter.extract.datasets.checks import checked
from clip_adapter.extract.datasets.source import ImageDataset, SourceOptions

DIGITS = "digits"


def open_dataset(spec: str, options: SourceOptions = SourceOptions()) -> ImageDataset:  # noqa: B008
    """The data set that `spec` names, checked and ready to be read.

    spec: `digits`; a name of the literature such as `oxford_pets`, which means CoOp's layout where
        `options.data_root` holds its folder, and TensorFlow Datasets elsewhere;
        `tfds:BUILDER[/CONFIG]`, `coop:FOLDER`, `folder:FOLDER`, `csv:FILE`, or
        `hf:ORG/NAME` (or `hf:FOLDER`).

    Raises UserError for an unknown name, with the near matches, and for data that cannot be had
    or used.
    """
    return checked(_open(spec, options))


def _open(spec: str, options: SourceOptions) -> ImageDataset:
    if spec == DIGITS:
        return _digits(options)
    kind, colon, rest = spec.partition(":")
    if colon and kind in _KINDS:
        if not rest:
            raise UserError(f"{spec} names nothing; write what to open behind the colon.")
        return _KINDS[kind](rest, options)
    catalogue = load_catalogue()
    if spec in catalogue:
        return _literature(catalogue[spec], options)
    known = [DIGITS, *catalogue]
    near = difflib.get_close_matches(spec, known, n=3, cutoff=0.4)
    raise UserError(
        f"Unknown data set {spec!r}; near matches: {', '.join(near) or 'none'} "
        f"(known: {', '.join(known)}, and {', '.join(f'{kind}:…' for kind in _KINDS)})."
    )


def _literature(entry: CatalogueEntry, options: SourceOptions) -> ImageDataset:
    from clip_adapter.extract.datasets.coop import coop_instructions, open_coop

    if options.data_root and (options.data_root / entry.coop_dir).is_dir():
        return open_coop(options.data_root / entry.coop_dir, options)
    if entry.tfds is None:
        raise UserError(
            f"{entry.name} is not in TensorFlow Datasets; "
            f"{coop_instructions(entry, options.data_root)}."
        )
    from clip_adapter.extract.datasets.tfds_builders import open_tfds

    return open_tfds(entry.tfds, options, entry)


def _digits(options: SourceOptions) -> ImageDataset:
    from clip_adapter.extract.datasets.digits import digits
    from clip_adapter.extract.datasets.splitting import refuse_fractions

    dataset = digits()
    refuse_fractions(options, dataset.splits)
    return dataset


def _tfds(name: str, options: SourceOptions) -> ImageDataset:
    from clip_adapter.extract.datasets.tfds_builders import open_tfds

    return open_tfds(name, options)


def _coop(folder: str, options: SourceOptions) -> ImageDataset:
    from clip_adapter.extract.datasets.coop import open_coop

    return open_coop(Path(folder).expanduser(), options)


def _folder(folder: str, options: SourceOptions) -> ImageDataset:
    from clip_adapter.extract.datasets.folder import open_folder

    return open_folder(Path(folder).expanduser(), options)


def _csv(table: str, options: SourceOptions) -> ImageDataset:
    from clip_adapter.extract.datasets.csv_table import open_csv

    return open_csv(Path(table).expanduser(), options)


def _hf(name: str, options: SourceOptions) -> ImageDataset:
    from clip_adapter.extract.datasets.hugging_face import open_hugging_face

    return open_hugging_face(name, options)


_KINDS: dict[str, Callable[[str, SourceOptions], ImageDataset]] = {
    "tfds": _tfds,
    "coop": _coop,
    "folder": _folder,
    "csv": _csv,
    "hf": _hf,
}
