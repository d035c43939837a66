"""Which class of an adapter a class of labelled images is."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip_adapter.errors import UserError
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo
from clip_adapter.pipelines.scoring.labelled_images import Labelled
from clip_adapter.records import from_file
from clip_adapter.words import counted, some

Classes = npt.NDArray[np.int64]
# Classes of the images that are none of the adapter's.
UNKNOWN, LEFT_OUT = -1, -2


def match_classes(images: Labelled, info: AdapterInfo, mapping: Path | None) -> Classes:
    """(C,) for each class of the images the adapter's, or LEFT_OUT, or UNKNOWN where it has no
    images.

    Raises UserError for images whose class the adapter does not have, and for a mapping that names
    classes that are not there.
    """
    index = {name: number for number, name in enumerate(info.class_names)}
    wanted = "a JSON file {class of the images: class of the adapter}"
    given = {} if mapping is None else from_file(dict[str, str | None], mapping, wanted)
    if strange := [name for name in given if name not in set(images.class_names)]:
        raise UserError(f"{mapping} names {some(strange)}, which {images.name} does not have.")
    values = [name for name in given.values() if name is not None and name not in index]
    if values:
        raise UserError(f"{mapping} names {some(values)}, which the adapter does not have.")
    found = np.empty(len(images.class_names), np.int64)
    for number, name in enumerate(images.class_names):
        own = given.get(name, name)
        found[number] = LEFT_OUT if own is None else index.get(own, UNKNOWN)
    missing = np.flatnonzero(found == UNKNOWN)
    missing = missing[np.isin(missing, images.labels)]
    if len(missing):
        names = [images.class_names[number] for number in missing.tolist()]
        raise UserError(
            f"{images.name} shows {counted(len(names), 'class', 'classes')} that the adapter does "
            f"not have ({some(names)}); say with --classes which of its classes they are, or null."
        )
    if (found[images.labels] == LEFT_OUT).all():
        raise UserError(f"No image of {images.name} is left to score.")
    return found
