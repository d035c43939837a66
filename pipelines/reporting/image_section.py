"""The test images that adapting helped and hurt most, as small pictures where there are some."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.words import printable, shortened
from clip_adapter.pipelines.reporting.class_section import Pair
from clip_adapter.pipelines.reporting.section import Gallery, Section, Thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES = 12
SIDE = 96
QUALITY = 80
LONGEST_ID = 60
ReadImage = Callable[[str], "Image"]
# Sources whose images lie on this machine; others might be downloaded, which no report should do.
EMBEDDED = "digits"
LOCAL = ("folder:", "coop:", "csv:")


def image_section(pair: Pair, cache: FeatureCache) -> Section | None:
    """None where no image changed sides in every seed."""
    helped, hurt = changed_sides(pair)
    if not len(helped) + len(hurt):
        return None
    read = originals(cache)
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
        text += " The originals were not found, so that their ids stand here."
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


def originals(cache: FeatureCache) -> ReadImage | None:
    """id → image as stored, through the source that the cache was extracted from; None where it
    does not lie on this machine any more, or is not what it was."""
    arguments = cache.arguments
    spec = arguments.get("dataset")
    if not isinstance(spec, str):
        return None
    from clip_adapter.extract.datasets.catalogue import load_catalogue
    from clip_adapter.extract.datasets.registry import open_dataset
    from clip_adapter.extract.datasets.source import SourceOptions

    def folder(name: str) -> Path | None:
        return Path(value) if isinstance(value := arguments.get(name), str) else None

    def share(name: str) -> float | None:
        return value if isinstance(value := arguments.get(name), float) else None

    entry = load_catalogue().get(spec)
    root = folder("data_root")
    in_root = entry is not None and root is not None and (root / entry.coop_dir).is_dir()
    if not (spec == EMBEDDED or spec.startswith(LOCAL) or in_root):
        return None
    seed = arguments.get("split_seed")
    options = SourceOptions(
        data_root=root,
        image_root=folder("image_root"),
        val=share("val"),
        test=share("test"),
        seed=seed if isinstance(seed, int) else 0,
    )
    try:
        split = open_dataset(spec, options).splits["test"]
    except (UserError, OSError, KeyError, ValueError):
        return None
    row_of = {name: row for row, name in enumerate(split.ids)}
    return lambda name: split.read(row_of[name])


def _thumbnail(pair: Pair, row: int, name: str, read: ReadImage | None) -> Thumbnail:
    true = printable(pair.class_names[int(pair.after[0].labels[row])])
    guesses = [
        f"{who}: {', '.join(_guesses(pair, some, row))}"
        for who, some in ((pair.before_name, pair.before), (pair.after_name, pair.after))
    ]
    shown = ""
    if read:
        with suppress(OSError, ValueError, KeyError):
            shown = small_jpeg(read(name))
    words = [true, *guesses] if shown else [true, *guesses, shortened(printable(name), LONGEST_ID)]
    return Thumbnail(shown, f"{true}; {'; '.join(guesses)}", words)


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
