"""`suggest`: which images without labels to label next."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_adapter import files
from clip_adapter.adapters.decisions import probabilities
from clip_adapter.adapters.formulas import cosine_logits, unit
from clip_adapter.adapters.neighbours import blocks, most_telling, unsure, usual_reach
from clip_adapter.cache.reader import BLOCK_ROWS, FeatureCache
from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.errors import UserError, require_within
from clip_adapter.frames import frame, html_table, rows_of
from clip_adapter.listener import Listener
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter
from clip_adapter.pipelines.scoring.cached import (
    cached_blocks,
    check_same_encoder,
    warn_of_unproven,
)
from clip_adapter.pipelines.scoring.prediction_formats import cell, check_place, rounded
from clip_adapter.pipelines.scoring.zero_shot import zero_shot_head
from clip_adapter.words import counted, some

if TYPE_CHECKING:
    import pandas

MOST = 100_000
SAMPLE = 64  # images by which near-equal ones are told; the distance of a usual neighbour
Features = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SuggestConfig:
    """Say which images without labels to label next: those that the classifier is unsure of and
    that are unlike the labelled ones and each other. Near-equal images count as one.

    The table has columns path, label (empty), split, guess and probability. Fill in the labels, and
    `extract --dataset csv:` reads it.

    Attributes:
        cache: Feature cache with images without labels, such as extract --dataset images: makes.
        adapter: Run folder that `fit` wrote, or one of the adapter's two files; without one the
            cache's own texts classify.
        beside: Caches of images that have labels already, if those are not in `cache`.
        count: How many images to suggest.
        out: CSV file for them, the most telling first; it must not be there yet.
        images: Folder that the images' ids start from, where they no longer lie in the one that was
            extracted.
        method: MODULE:NAME of the adapter's method, where that is one of your own.

    Examples:
        >>> from clip_adapter import SuggestConfig
        >>> SuggestConfig("new.h5", adapter="runs/first").count
        50
    """

    cache: Positional[Path]
    adapter: Path | None = None
    beside: tuple[Path, ...] = ()
    count: int = 50
    out: Path = Path("to_label.csv")
    images: Path | None = None
    method: str | None = None


@dataclass(frozen=True)
class Suggestions:
    """The images to label, the most telling first.

    ids: (n,) of the cache. paths: (n,) as the table has them: from its folder to the image, or the
    id where there is no such file. guesses: (n,) the most probable class, and `probabilities` its
    probability. candidates: how
    many images have no label; of these `known` are near-equal to a labelled one. labelled: how many
    have labels.
    """

    ids: Sequence[str]
    paths: Sequence[str]
    guesses: Sequence[str]
    probabilities: npt.NDArray[np.float64]
    candidates: int
    known: int
    labelled: int

    def columns(self) -> dict[str, Sequence[Any]]:
        """Those of the table."""
        return {
            "path": list(self.paths),
            "label": [""] * len(self.ids),
            "split": ["train"] * len(self.ids),
            "guess": list(self.guesses),
            "probability": self.probabilities.tolist(),
        }

    def to_frame(self) -> pandas.DataFrame:
        """`columns` as a frame of pandas."""
        return frame(self.columns())

    def _repr_html_(self) -> str:
        return html_table(rows_of(self.columns()), f"of {counted(self.candidates, 'image')}")


def suggest(config: SuggestConfig, listener: Listener | None = None) -> Suggestions:
    """Choose the images and write the table.

    Nothing is random. Images without labels are read block by block, some seventy numbers of each
    are kept, and the features of those that have labels.

    Raises UserError for a cache without such images, for another backbone than the adapter's, and
    where the table cannot be written or is there already.

    Examples:
        >>> from clip_adapter import SuggestConfig, suggest
        >>> suggest(SuggestConfig("features.h5"))
        Traceback (most recent call last):
        clip_adapter.errors.UserError: features.h5 has no images without labels; extract them with \
--dataset images:FOLDER --like features.h5.
    """
    out = Path(config.out)
    require_within("--count", config.count, MOST)
    check_place(out, ".csv", force=True)
    if files.is_there(out):
        raise UserError(f"{out} is there, perhaps with labels filled in; choose another --out.")
    if config.images is not None:
        files.check_folder("--images", config.images)
    if config.method is not None and config.adapter is None:
        raise UserError("--method names the method of an adapter; name that with --adapter.")
    adapter = None if config.adapter is None else load_adapter(config.adapter, config.method)
    with ExitStack() as stack:
        cache = stack.enter_context(FeatureCache(config.cache))
        if not cache.has("unlabelled"):
            raise UserError(
                f"{cache.path} has no images without labels; extract them with --dataset "
                f"images:FOLDER --like {cache.path}."
            )
        beside = [stack.enter_context(FeatureCache(path)) for path in config.beside]
        listener = listener or Listener()
        for other in beside:
            check_same_encoder(cache, other, "--beside", listener)
        if adapter:
            warn_of_unproven(cache, adapter, listener)
        found = _suggest(config, cache, beside, adapter, listener)
    _write(out, found)
    return found


def _suggest(
    config: SuggestConfig,
    cache: FeatureCache,
    beside: Sequence[FeatureCache],
    adapter: SavedAdapter | None,
    listener: Listener,
) -> Suggestions:
    names = adapter.info.class_names if adapter else cache.class_names
    if len(names) < 2:
        raise UserError(f"There is one class, {some(names)}: nothing to be unsure of.")
    known = _labelled([cache, *beside])
    count = cache.shape(UNLABELLED)[1]
    sample = _directions(cache, np.unique(np.linspace(0, count - 1, SAMPLE).astype(np.int64)))
    distances, doubts = np.ones(count, np.float32), np.empty(count)
    guesses, best = np.empty(count, np.int32), np.empty(count)
    cosines: list[npt.NDArray[np.float32]] = []
    with listener.progress("suggest", count) as advance:
        for rows, encoded, shares in _classified(cache, adapter):
            directions = unit(np, encoded)
            for part in blocks(len(rows), len(known)) if len(known) else ():
                distances[rows[part]] = 1 - (directions[part] @ known.T).max(axis=1)
            cosines.append(sample @ directions.T)
            doubts[rows], guesses[rows] = unsure(shares), shares.argmax(axis=1)
            best[rows] = shares.max(axis=1)
            advance(len(rows), "")
    reach = usual_reach(np.concatenate(cosines, axis=1))
    chosen = most_telling(
        doubts, distances, lambda rows: _directions(cache, rows), config.count, reach
    )
    if not chosen:
        raise UserError(
            f"Each of the {counted(count, 'image')} without a label in {cache.path} is near-equal "
            "to one that has a label: there is nothing to label."
        )
    ids = cache.ids(UNLABELLED, chosen)
    return Suggestions(
        ids,
        _paths(ids, _root(config, cache), Path(config.out)),
        [names[label] for label in guesses[chosen].tolist()],
        best[chosen],
        candidates=count,
        known=int(np.count_nonzero(distances <= reach)),
        labelled=len(known),
    )


def _classified(
    cache: FeatureCache, adapter: SavedAdapter | None
) -> Iterator[tuple[Rows, Features, npt.NDArray[np.float64]]]:
    """Block by block: rows, image features and probabilities of the images without labels."""
    count = cache.shape(UNLABELLED)[1]
    if adapter:
        for block in cached_blocks(cache, UNLABELLED, adapter)(range(count)):
            shares = adapter.probabilities(adapter.logits(block.features))
            yield block.rows, block.encoded, shares
        return
    head = zero_shot_head(cache)
    for start in range(0, count, BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, count))
        encoded = cache.features(UNLABELLED, rows, views=1)[0]
        yield rows, encoded, probabilities(cosine_logits(np, encoded, head))


def _labelled(caches: Sequence[FeatureCache]) -> Features:
    """(M, D): the directions of all images with labels, whatever their split: what is near-equal to
    a test image must not be trained on."""
    every = [
        unit(np, cache.images(split, views=1).features[0])
        for cache in caches
        for split in cache.splits
    ]
    return np.concatenate(every) if every else np.zeros((0, 1), np.float32)


def _directions(cache: FeatureCache, rows: Rows) -> Features:
    return unit(np, cache.features(UNLABELLED, rows, views=1)[0])


def _root(config: SuggestConfig, cache: FeatureCache) -> Path | None:
    from clip_adapter.pipelines.reporting.sections.images import extracted_from

    return Path(config.images) if config.images else extracted_from(cache)


def _paths(ids: Sequence[str], root: Path | None, out: Path) -> list[str]:
    """From the table's folder to each image; no spreadsheet takes one for a formula."""
    paths = []
    for name in ids:
        place = None if root is None else root / name
        there = place is not None and files.is_file(place)
        path = os.path.relpath(place, out.absolute().parent) if place and there else name
        paths.append(f"./{path}" if path.startswith(("=", "+", "-", "@")) else path)
    return paths


def _write(out: Path, found: Suggestions) -> None:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = found.columns()
    writer.writerow(columns)
    for path, label, split, guess, share in zip(*columns.values(), strict=True):
        writer.writerow([path, label, split, cell(guess), rounded(share)])
    files.write_text(out, text.getvalue())
