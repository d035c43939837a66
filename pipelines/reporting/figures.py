"""What a page is made of: sections, and figures in one style, as SVG for the page and as SVG and
PNG for a paper.

In the page's SVG ink, ground and the colours of series are variables of its style sheet, so that
one drawing serves the light and the dark theme.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from clip_adapter.pipelines.reporting.table import Table
from clip_adapter.words import printable, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, GROUND = "#1b1d22", "#5b606b", "#dcdfe4", "#fefefd"
# Okabe and Ito's colours, which readers with any colour blindness can tell apart, without the
# yellow that white ground swallows; the order keeps neighbours far apart.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1d23")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    GROUND: "--ground",
    **{color: f"--series-{number}" for number, color in enumerate(SERIES)},
}
PANEL = (3.9, 2.9)
LARGEST = 1.3  # how much of its natural size, at which text is 12 pixels high, a drawing may get
DPI = 200
LONGEST_LABEL = 28
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
STYLE: dict[str, Any] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": INK,
    # A class called `$x$` is no mathematics.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Picture:
    """A figure.

    name: of its files. alt: what it shows, in words. numbers: what is drawn, as a table.
    """

    name: str
    caption: str
    alt: str
    figure: Figure
    numbers: Table

    @cached_property
    def svg(self) -> bytes:
        return self._saved(format="svg", metadata={"Date": None}, transparent=True)

    @cached_property
    def png(self) -> bytes:
        return self._saved(format="png", dpi=DPI, facecolor="white")

    @property
    def inline(self) -> str:
        """SVG for the page."""
        return _inline(self.svg, self.name, self.alt)

    def _saved(self, **options: Any) -> bytes:
        import matplotlib

        style: Any = STYLE | {"svg.hashsalt": self.name}
        with matplotlib.rc_context(style), warnings.catch_warnings():
            # A name in letters that the font has not is shown by the browser's font; in the PNG it
            # is boxes.
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
            content = BytesIO()
            self.figure.savefig(content, **options)
        return content.getvalue()


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
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = ()


@contextmanager
def drawing(size: tuple[float, float] = PANEL) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one panel in the style of the report."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        yield figure, axes


def label(text: str) -> str:
    """A name that fits beside an axis and is one line."""
    return shortened(printable(text), LONGEST_LABEL)


def series(number: int) -> dict[str, Any]:
    """Colour, marker and line of a series: no two of the first 28 look alike, in grey neither, nor
    by their marks alone."""
    turn, place = divmod(number, len(SERIES))
    mark = (place + turn) % len(MARKERS)
    return {
        "color": SERIES[place],
        "marker": MARKERS[mark],
        "linestyle": LINES[(mark + turn) % len(LINES)],
    }


def _inline(content: bytes, name: str, alt: str) -> str:
    """The drawing as a part of a page: ids of its own, and colours that are variables."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(content)
    for child in list(root):
        if child.tag == f"{{{SVG}}}metadata":
            root.remove(child)
    for definitions in root.iter(f"{{{SVG}}}defs"):
        for child in list(definitions):
            if child.tag == f"{{{SVG}}}style":
                definitions.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif key in ("style", "clip-path", "fill", "stroke"):
                element.set(key, _themed(value).replace("url(#", f"url(#{name}-"))
    width = float(root.attrib.pop("width").removesuffix("pt"))
    del root.attrib["height"]
    root.set("style", f"max-width: {LARGEST * width:.0f}pt")
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda found: f"var({VARIABLES[found[0]]})" if found[0] in VARIABLES else found[0],
        style,
    )


def points(difference: float) -> str:
    """A difference of accuracies in percentage points, with its sign: `+21.99`."""
    return f"{100 * difference:+.2f}".replace("-", "−")


def percent(accuracy: float, digits: int = 2) -> str:
    return f"{100 * accuracy:.{digits}f}"
