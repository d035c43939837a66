"""What every source of images gives to the encode loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

DEFAULT_TEMPLATES = ("a photo of a {}.",)
# What sources call their splits, and what we call them.
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class Split:
    """One split in its source's order.

    ids: N strings that find the images again. labels: (N,) int32.
    read: index → image as stored, opened when asked for; raises OSError or ValueError, then or when
        its pixels are loaded, for an image that cannot be decoded. Safe in several threads and
        cheap to pickle.
    origin: where the split came from, in words, for the cache.
    file: index → the file that holds this image and no other, where there is one.
    """

    ids: Sequence[str]
    labels: npt.NDArray[np.int32]
    read: Callable[[int], Image.Image]
    origin: str
    file: Callable[[int], Path] | None = None


@dataclass(frozen=True)
class ImageDataset:
    """A labelled data set.

    provenance: JSON, which goes into the cache as it is. remarks: sentences for whoever uses it.
    """

    name: str
    class_names: Sequence[str]
    templates: Sequence[str]
    splits: Mapping[str, Split]
    provenance: Mapping[str, Any]
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class SourceOptions:
    """Where sources find their files, and how those without splits are divided.

    data_dir: TensorFlow Datasets' own folder; None for its default.
    data_root: the folder in which CoOp-layout folders lie.
    image_root: what relative paths of a CSV file start from; None for the file's own folder.
    val, test: fractions of the training images that make these splits where a source has none;
        None for 0.2 and 0.3 (see `splitting.complete_splits`).
    seed: of that division.
    """

    data_dir: Path | None = None
    data_root: Path | None = None
    image_root: Path | None = None
    val: float | None = None
    test: float | None = None
    seed: int = 0
