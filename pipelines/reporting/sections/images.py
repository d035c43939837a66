"""The test images that adapting helped and hurt most, as small pictures where there are some."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.extract.datasets.catalogue import load_catalogue
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.encoding.images import open_image, read_rgb
from clip_adapter.pipelines.reporting.figures import Gallery, Section, Thumbnail
from clip_adapter.pipelines.reporting.sections.classes import Pair
from clip_adapter.words import printable, shortened

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES = 12
SIDE = 96
QUALITY = 80
LONGEST_ID = 60
ReadImage = Callable[[str], "Image"]
EMBEDDED = "digits"


def image_section(pair: Pair, cache: FeatureCache, root: Path | None) -> Section | None:
    """None where no image changed sides in every seed. root: what `originals` takes."""
    helped, hurt = changed_sides(pair)
    if not len(helped) + len(hurt):
        return None
    read = originals(cache, root)
    # Predictions are of the test images of the pair's classes, in the cache's order.
    stored = np.flatnonzero(cache.labels("test") < len(pair.class_names))

    def thumbnail(row: int) -> Thumbnail:
        return _thumbnail(pair, row, cache.ids("test", [stored[row]])[0], read)

    galleries = [
        Gallery(title, list(map(thumbnail, rows.tolist())))
        for title, rows in (
            (f"Helped: {pair.before_name} wrong, {pair.after_name} right in every seed", helped),
            (f"Hurt: {pair.before_name} right, {pair.after_name} wrong in every seed", hurt),
        )
        if len(rows)
    ]
    text = "Those of which the classifiers were surest first."
    if not any(t.data_uri for g in galleries for t in g.thumbnails):
        text += (
            " The originals were not found in the cache's folder, so that their ids stand here; "
            "--images says where these paths begin."
        )
    return Section("Images helped and hurt most", [text], galleries=galleries)


def changed_sides(pair: Pair) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(helped, hurt): up to 12 rows each of the test split, the surest first.

    Surest: the sum of the probabilities that the two gave to what each predicted, mean over seeds.
    """
    before, after = (np.stack([p.right for p in some]) for some in (pair.before, pair.after))
    sure = np.mean([p.confidence for p in pair.before], axis=0)
    sure = sure + np.mean([p.confidence for p in pair.after], axis=0)

    def surest(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return rows[np.argsort(-sure[rows], kind="stable")][:MOST_IMAGES]

    helped = np.flatnonzero(~before.any(axis=0) & after.all(axis=0))
    hurt = np.flatnonzero(before.all(axis=0) & ~after.any(axis=0))
    return surest(helped), surest(hurt)


def originals(cache: FeatureCache, root: Path | None = None) -> ReadImage | None:
    """id → image as stored, of the embedded data set or of a file below `root`: below the folder
    that the user names or, without one, the folder that the cache was extracted from, where that
    lies in the cache's own. None where there is no such folder.

    A cache may come from elsewhere. So nothing is searched, an id is a relative path that leads
    upwards nowhere, and what a file alone names is followed through no link out of its folder.
    """
    if cache.arguments.get("dataset") == EMBEDDED:
        splits = open_dataset(EMBEDDED).splits.values()
        reads = {name: partial(s.read, row) for s in splits for row, name in enumerate(s.ids)}
        return lambda name: reads[name]()
    allowed = None if root else os.path.realpath(cache.path.parent)
    root = root or extracted_from(cache)
    if root is None or not _lies_in(root, allowed):
        return None

    def read(name: str) -> Image:
        inner = PurePosixPath(name)
        place = root / inner
        if inner.is_absolute() or ".." in inner.parts or not _lies_in(place, allowed):
            raise ValueError("not below the folder of the images")
        return open_image(place)

    return read


def _lies_in(place: Path, folder: str | None) -> bool:
    """Whether it lies in a folder without links in it that is not the whole machine; None for
    whatever the user has named."""
    if folder is None:
        return True
    return Path(folder) != Path("/") and Path(os.path.realpath(place)).is_relative_to(folder)


def extracted_from(cache: FeatureCache) -> Path | None:
    """What the ids are relative to, as the cache has it."""
    arguments = cache.arguments
    spec, data_root, image_root = (
        value if isinstance(value := arguments.get(name), str) else ""
        for name in ("dataset", "data_root", "image_root")
    )
    catalogue = load_catalogue()
    rest = spec.partition(":")[2]
    if rest and spec.startswith(("folder:", "images:")):
        return Path(rest)
    if rest and spec.startswith("csv:"):
        return Path(image_root) if image_root else Path(rest).parent
    if rest and spec.startswith("coop:"):
        entry = catalogue.get(str(cache.dataset.get("name")))
        return Path(rest) / entry.coop_images if entry else None
    if spec in catalogue and data_root:
        return Path(data_root) / catalogue[spec].coop_dir / catalogue[spec].coop_images
    return None


def _thumbnail(pair: Pair, row: int, name: str, read: ReadImage | None) -> Thumbnail:
    true = printable(pair.class_names[int(pair.after[0].labels[row])])
    guesses = [
        f"{who}: {', '.join(_guesses(pair, some, row))}"
        for who, some in ((pair.before_name, pair.before), (pair.after_name, pair.after))
    ]
    shown = small_image(read, name)
    words = [true, *guesses] if shown else [true, *guesses, shortened(printable(name), LONGEST_ID)]
    return Thumbnail(shown, f"{true}; {'; '.join(guesses)}", words)


def small_image(read: ReadImage | None, name: str) -> str:
    """Its `small_jpeg`, "" where it is not to be had."""
    if read:
        with suppress(OSError, ValueError, KeyError):
            return small_jpeg(read_rgb(partial(read, name)))
    return ""


def _guesses(pair: Pair, some: object, row: int) -> list[str]:
    names = (printable(pair.class_names[int(p.predicted[row])]) for p in some)  # type: ignore[attr-defined]
    return list(dict.fromkeys(names))


def small_jpeg(image: Image) -> str:
    """A data URI of the image, at most 96 pixels wide and high."""
    shown = image.convert("RGB")
    # What is smaller than the thumbnail is enlarged pixel by pixel.
    factor = max(1, SIDE // max(shown.size))
    shown = shown.resize((shown.width * factor, shown.height * factor), resample=0)
    shown.thumbnail((SIDE, SIDE))
    content = BytesIO()
    shown.save(content, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{b64encode(content.getvalue()).decode()}"
