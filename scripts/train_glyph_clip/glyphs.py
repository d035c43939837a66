"""The characters that glyph-clip learns, their names, and the fonts that draw them."""

import string
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# The fonts that have letters and digits. Left out: the display, symbol and size fonts, and cmmi10,
# whose digits are not where Unicode puts them. Three fonts, one of each family and each of
# another style, are never trained on: they tell how well the model reads a face it has not seen.
TRAINING_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
)
HELD_OUT_FONTS = ("DejaVuSans-Oblique", "STIXGeneralBol", "cmtt10")

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Only characters that every font above draws as themselves: the cm fonts have another encoding,
# with other glyphs at $ < > { }.
SYMBOL_NAMES = {
    "!": "exclamation mark",
    "#": "hash sign",
    "%": "percent sign",
    "&": "ampersand",
    "(": "left parenthesis",
    ")": "right parenthesis",
    "*": "asterisk",
    "+": "plus sign",
    ":": "colon",
    ";": "semicolon",
    "=": "equals sign",
    "?": "question mark",
    "@": "at sign",
    "[": "left bracket",
    "]": "right bracket",
}
# In print these letters are the digits 0 and 1, and no picture can tell them apart: they would
# teach that a zero is often no zero. Other look-alikes (S and 5, Z and 2, B and 8) do differ in
# every font, and stay: what tells them apart is worth learning.
SAME_AS_DIGITS = "OoIl"
# Every glyph is drawn at the same size, so these pairs differ in nothing: one name for both.
SAME_IN_BOTH_CASES = "CPSUVWXZcpsuvwxz"

DIGIT_TEMPLATES = (
    "a photo of the digit {}",
    "a photo of the number {}",
    "a photo of a {}",
    "a photo of a handwritten {}",
    "a picture of the digit {}",
    "a drawing of a {}",
    "the digit {}",
    "the number {}",
    "{}",
)
OTHER_TEMPLATES = (
    "a photo of the {}",
    "a photo of a {}",
    "a photo of a handwritten {}",
    "a picture of the {}",
    "a drawing of a {}",
    "the {}",
    "{}",
)

CANVAS = 64  # pixels a side, for rendering and warping: twice what the model sees
INK = 48  # the longer side of a glyph's ink on the canvas


@dataclass(frozen=True)
class Glyph:
    """One character to draw, the name that captions use for it, and whether it is a digit."""

    character: str
    name: str
    is_digit: bool = False

    @property
    def templates(self) -> tuple[str, ...]:
        return DIGIT_TEMPLATES if self.is_digit else OTHER_TEMPLATES


def list_glyphs() -> list[Glyph]:
    """The 73 glyphs: digits first, then letters, then symbols. Some letters share a name."""
    glyphs = [Glyph(c, n, True) for c, n in zip(string.digits, DIGIT_NAMES, strict=True)]
    for character in string.ascii_letters:
        if character in SAME_AS_DIGITS:
            continue
        case = "capital " if character.isupper() else "small "
        prefix = "" if character in SAME_IN_BOTH_CASES else case
        glyphs.append(Glyph(character, f"{prefix}letter {character.lower()}"))
    return glyphs + [Glyph(character, name) for character, name in SYMBOL_NAMES.items()]


def render(font_path: Path, character: str) -> np.ndarray:
    """Draw one character, centred, its ink's longer side `INK` pixels: (CANVAS, CANVAS) uint8."""

    def load(size: float) -> ImageFont.FreeTypeFont:
        # The basic layout is in every Pillow build; the other one depends on a system library.
        return ImageFont.truetype(str(font_path), size, layout_engine=ImageFont.Layout.BASIC)

    left, top, right, bottom = load(256).getbbox(character)
    font = load(256 * INK / max(right - left, bottom - top))
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (CANVAS, CANVAS))
    corner = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character, font=font, fill=255)
    return np.asarray(image)


def render_all(fonts: tuple[str, ...], glyphs: list[Glyph]) -> Tensor:
    """Ink masks of every glyph in every font: (fonts, glyphs, CANVAS, CANVAS) float32, 0 to 1."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = [[render(folder / f"{font}.ttf", g.character) for g in glyphs] for font in fonts]
    return torch.from_numpy(np.stack([np.stack(row) for row in images])).float() / 255
