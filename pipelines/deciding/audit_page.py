"""The page of an audit: pictures of the images to look at, in one file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.files import write_text
from clip_adapter.pipelines.reporting.figures import Gallery, Section, Thumbnail
from clip_adapter.pipelines.reporting.page import rendered
from clip_adapter.pipelines.reporting.sections.images import (
    LONGEST_ID,
    ReadImage,
    originals,
    small_image,
)
from clip_adapter.words import counted, printable, shortened

if TYPE_CHECKING:
    from clip_adapter.pipelines.deciding.audit import Audit

TEMPLATE = "audit.html"
MOST_IMAGES, MOST_GROUPS = 60, 20


def write_page(path: Path, found: Audit, cache: FeatureCache, images: Path | None) -> None:
    """images: the folder of the original images, where the user names one; see `originals`."""
    read = originals(cache, images)
    listed = np.flatnonzero(found.listed)
    sections = [_labels(found, listed[:MOST_IMAGES].tolist(), read), _twins(found, read)]
    if not any(t.data_uri for s in sections for g in s.galleries for t in g.thumbnails):
        words = "The originals were not found; --images says where the paths of the images begin."
        sections.append(Section("Pictures", [words]))
    page = rendered(
        TEMPLATE,
        title=printable(str(cache.dataset.get("name", cache.path.name))),
        sentence=f"{counted(len(found.ids), 'labelled image')}, {len(listed):,} of them to look at."
        " Whether a label is wrong, the other images cannot say.",
        sections=sections,
    )
    write_text(path, page)


def _labels(found: Audit, rows: Iterable[int], read: ReadImage | None) -> Section:
    def words(row: int) -> list[str]:
        label, other = found.labels[row], found.likelier[row]
        p, q = found.probabilities[row], found.likelier_probabilities[row]
        names = printable(found.class_names[label]), printable(found.class_names[other])
        word = "rather" if q > p else "next"
        return [f"{names[0]} {100 * p:.1f} %", f"{word} {names[1]} {100 * q:.1f} %"]

    shown = [_thumbnail(found, row, words(row), read) for row in rows]
    galleries = [Gallery("What to look at first", shown)] if shown else []
    text = "Below each picture its label, and the likeliest other class, by all other images."
    return Section("Labels", [text if shown else "None is listed."], galleries=galleries)


def _twins(found: Audit, read: ReadImage | None) -> Section:
    galleries = []
    for number in range(min(found.twins.count, MOST_GROUPS)):
        rows = np.flatnonzero(found.twins.groups == number)[:MOST_IMAGES].tolist()
        labels = [printable(found.class_names[found.labels[row]]) for row in rows]
        shown = [
            _thumbnail(found, row, [label, found.splits[row]], read)
            for row, label in zip(rows, labels, strict=True)
        ]
        galleries.append(Gallery(f"Group {number + 1}", shown))
    text = f"{counted(found.twins.count, 'group')} of equal or near-equal images"
    more = f", of which the first {MOST_GROUPS}" if found.twins.count > MOST_GROUPS else ""
    return Section("Twins", [f"{text}{more}."], galleries=galleries)


def _thumbnail(found: Audit, row: int, words: list[str], read: ReadImage | None) -> Thumbnail:
    name = found.ids[row]
    words = [*words, shortened(printable(name), LONGEST_ID)]
    return Thumbnail(small_image(read, name), "; ".join(words), words)
