"""What a page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clip_adapter.pipelines.reporting.figures import Numbers, Picture


@dataclass(frozen=True)
class Thumbnail:
    """data_uri: a small JPEG, "" where the image is not to be had. alt: what it shows."""

    data_uri: str
    alt: str
    words: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    title: str
    thumbnails: Sequence[Thumbnail]


@dataclass(frozen=True)
class Section:
    """text: a paragraph each. tables: those that are no figure's numbers."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Numbers] = ()
    galleries: Sequence[Gallery] = ()


def points(difference: float) -> str:
    """A difference of accuracies in percentage points, with its sign: `+21.99`."""
    return f"{100 * difference:+.2f}".replace("-", "−")


def percent(accuracy: float, digits: int = 2) -> str:
    return f"{100 * accuracy:.{digits}f}"
