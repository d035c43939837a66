"""Every mode × depth × order × orientation × transparency × suffix gives what its twin of 8-bit RGB
gives. The PNG and TIFF files are written here, so that no library agrees with itself."""

import io
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_adapter.extract.encoding.images import open_image, read_rgb, readable_suffixes
from tests.fuzz import image_mutations
from tests.fuzz.image_mutations import Chunks

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 5, 4))
COLOURS[0, :2, 3] = 0, 255
GREYS = COLOURS[..., :1]
HEIGHT, WIDTH = GREYS.shape[:2]


def over_white(pixels: np.ndarray) -> np.ndarray:
    """Colours, or a grey, and alpha → RGB as Pillow composes it; ±0 for alpha 0 and 255."""
    layer = pixels[..., [0, 0, 0, 1]] if pixels.shape[2] == 2 else pixels
    white = Image.new("RGBA", (WIDTH, HEIGHT), (255,) * 4)
    image = Image.alpha_composite(white, Image.fromarray(layer.astype(np.uint8)))
    return np.asarray(image.convert("RGB"))


def grey(values: np.ndarray, depth: int) -> np.ndarray:
    return np.rint(values[..., [0, 0, 0]] * 255 / (2**depth - 1))


def whitened(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where[..., None], 255, pixels)


def packed(values: np.ndarray, depth: int, order: str) -> list[bytes]:
    """The bytes of each row."""
    rows = values.reshape(len(values), -1)
    if depth in (8, 16):
        return [row.astype(f"{order}u{depth // 8}").tobytes() for row in rows]
    bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row.astype(np.uint8)).tobytes() for row in bits.reshape(len(rows), -1)]


def png(
    values: np.ndarray, depth: int, colour: int, *before: tuple[bytes, bytes], behind: Chunks = ()
) -> bytes:
    data = zlib.compress(b"".join(b"\0" + row for row in packed(values, depth, ">")))
    return image_mutations.png(WIDTH, HEIGHT, depth, colour, data, before, behind)


def tiff(
    values: np.ndarray, depth: int, photometric: int, order: str, planes: bool = False, **tags: Any
) -> bytes:
    """tags: t338=[2] for ExtraSamples."""
    samples = values.shape[2]
    parts = np.moveaxis(values, 2, 0)[..., None] if planes else values[None]
    strips = [b"".join(packed(part, depth, order)) for part in parts]
    entries: dict[int, tuple[str, list[int]]] = {
        256: ("H", [WIDTH]), 257: ("H", [HEIGHT]), 258: ("H", [depth] * samples), 259: ("H", [1]),
        262: ("H", [photometric]), 273: ("I", []), 277: ("H", [samples]), 278: ("H", [HEIGHT]),
        279: ("I", [len(strip) for strip in strips]), 284: ("H", [2 if planes else 1]),
    }  # fmt: skip
    entries |= {int(name[1:]): ("H", value) for name, value in tags.items()}
    place = 8 + 2 + 12 * len(entries) + 4 + 4096  # behind all values that need a place
    entries[273] = ("I", [place + i * len(strips[0]) for i in range(len(strips))])
    fields = beside = b""
    for tag, (kind, numbers) in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        where = struct.pack(f"{order}I", place - 4096 + len(beside))
        beside += raw if len(raw) > 4 else b""
        value = raw.ljust(4, b"\0") if len(raw) <= 4 else where
        fields += struct.pack(f"{order}HHI", tag, 3 if kind == "H" else 4, len(numbers)) + value
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return start + fields + bytes(4) + beside.ljust(4096, b"\0") + b"".join(strips)


def of_png() -> Iterator[tuple[str, bytes, np.ndarray]]:
    for depth in (1, 2, 4, 8, 16):
        values = GREYS * 257 if depth == 16 else GREYS >> (8 - depth)
        key = int(values.max())
        twin, where = grey(values, depth), values[..., 0] == key
        yield f"grey {depth}", png(values, depth, 0), twin
        # What lies above the depth of a transparent grey does not count.
        for stray in (0, 0 if depth == 16 else 1 << depth):
            trns = b"tRNS", struct.pack(">H", key | stray)
            yield f"grey {depth} key {stray}", png(values, depth, 0, trns), whitened(twin, where)
        if depth <= 8:
            palette = RNG.integers(0, 256, (2**depth, 3), np.uint8)
            plte, index = (b"PLTE", palette.tobytes()), values[..., 0]
            yield f"palette {depth}", png(values, depth, 3, plte), palette[index]
            clear = png(values, depth, 3, plte, (b"tRNS", bytes(1)))
            yield f"palette {depth} clear", clear, whitened(palette[index], index == 0)
    for depth, unit in ((8, 1), (16, 257)):
        rgb, ga = COLOURS[..., :3], COLOURS[..., [0, 3]]
        yield f"RGB {depth}", png(rgb * unit, depth, 2), rgb
        # In 16 bits the low byte of the key differs from the high one, as that of the pixel.
        low = 0 if depth == 8 else (rgb[0, 0] ^ 0x55) - rgb[0, 0]
        values = rgb * unit
        values[0, 0] += low
        trns = b"tRNS", struct.pack(">HHH", *values[0, 0].tolist())
        clear = whitened(rgb, (rgb == rgb[0, 0]).all(-1))
        yield f"RGB {depth} key", png(values, depth, 2, trns), clear
        yield f"RGBA {depth}", png(COLOURS * unit, depth, 6), over_white(COLOURS)
        yield f"grey alpha {depth}", png(ga * unit, depth, 4), over_white(ga)
    large = zlib.compress(bytes(3 << 20))
    for kind, data in (
        (b"tEXt", b"k\0" + bytes((64 << 20) + 1)),
        (b"zTXt", b"k\0\0" + large),
        (b"iTXt", b"k\0\1\0\0\0" + large),
        (b"iCCP", b"k\0\0" + large),
    ):
        yield f"{kind.decode()} before", png(rgb, 8, 2, (kind, data)), rgb
        if len(data) < 1 << 20:
            yield f"{kind.decode()} behind", png(rgb, 8, 2, behind=[(kind, data)]), rgb


def of_tiff() -> Iterator[tuple[str, bytes, np.ndarray]]:
    for order in "<>":
        for depth in (1, 2, 4, 8, 12, 16):
            values = GREYS * 257 if depth == 16 else (GREYS * 16) >> (12 - depth)
            twin = grey(values, depth)
            yield f"grey {depth}{order}", tiff(values, depth, 1, order), twin
            yield f"white is 0 {depth}{order}", tiff(values, depth, 0, order), 255 - twin
        for depth, unit in ((8, 1), (16, 257)):
            rgb, kind = COLOURS[..., :3] * unit, f"{depth}{order}"
            yield f"RGB {kind}", tiff(rgb, depth, 2, order), COLOURS[..., :3]
            for planes in (False, True):
                alpha = tiff(COLOURS * unit, depth, 2, order, planes, t338=[2])
                yield f"RGBA {kind} {planes}", alpha, over_white(COLOURS)
            spare = tiff(COLOURS * unit, depth, 2, order, t338=[0])
            yield f"RGBX {kind}", spare, COLOURS[..., :3]
            yield f"planes {kind}", tiff(rgb, depth, 2, order, planes=True), COLOURS[..., :3]
            clear = COLOURS * (COLOURS[..., 3:] > 127) | [0, 0, 0, 255] * (COLOURS[..., 3:] > 127)
            before = tiff(clear * unit, depth, 2, order, t338=[1])  # multiplied by alpha, 0 or 1
            yield f"RGBa {kind}", before, over_white(clear)
        ga = clear[..., [0, 3]]
        for extra in (1, 2):
            yield f"grey alpha {extra}{order}", tiff(ga, 8, 1, order, t338=[extra]), over_white(ga)
        palette = RNG.integers(0, 256, (256, 3))
        table = (palette.T * 257).ravel().tolist()
        yield f"palette{order}", tiff(GREYS, 8, 3, order, t320=table), palette[GREYS[..., 0]]
        for turned in range(1, 9):
            for depth, photometric, values in ((8, 2, COLOURS[..., :3]), (16, 0, GREYS * 257)):
                twin = values if depth == 8 else 255 - GREYS[..., [0, 0, 0]]
                name = f"turned {turned} {depth}{order}"
                yield name, tiff(values, depth, photometric, order, t274=[turned]), twin


def of_ppm() -> Iterator[tuple[str, bytes, np.ndarray]]:
    for largest in (1, 7, 100, 255, 256, 1023, 65535):
        for kind, samples in ((b"P5", 1), (b"P6", 3)):
            values = COLOURS[..., :samples] * largest // 255
            header = b"%s %d %d %d\n" % (kind, WIDTH, HEIGHT, largest)
            content = header + values.astype(">u2" if largest > 255 else np.uint8).tobytes()
            twin = np.rint(values * 255 / largest)
            yield f"{kind.decode()} {largest}", content, np.broadcast_to(twin, (*twin.shape[:2], 3))


def by_pillow() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Formats without loss that others write: turned by EXIF, and in the modes that they have."""
    rgb, rgba = (Image.fromarray(COLOURS[..., :n].astype(np.uint8)) for n in (3, 4))
    for kind, options in (("png", {}), ("webp", {"lossless": True, "exact": True})):
        for turned in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = turned
            yield f"{kind} turned {turned}", saved(rgb, kind, exif=exif, **options), np.asarray(rgb)
        yield f"{kind} RGBA", saved(rgba, kind, **options), over_white(COLOURS)
    for kind in ("bmp", "jpeg2000", "tiff"):
        yield f"{kind} RGB", saved(rgb, kind), np.asarray(rgb)
        yield f"{kind} L", saved(rgb.getchannel(0), kind), GREYS[..., [0, 0, 0]]
    yield "jpeg2000 RGBA", saved(rgba, "jpeg2000"), over_white(COLOURS)
    wide = Image.fromarray((GREYS[..., 0] * 257).astype(np.uint16))
    for options in ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}):
        yield f"16 {options}", saved(wide, "tiff", **options), GREYS[..., [0, 0, 0]]
        zero = saved(wide, "tiff", tiffinfo={262: 0}, **options)
        yield f"16 white is 0 {options}", zero, 255 - GREYS[..., [0, 0, 0]]
    yield "jpeg2000 16", saved(wide, "jpeg2000"), GREYS[..., [0, 0, 0]]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_kind_equals_its_twin(tmp_path: Path) -> None:
    seen, wrong = set(), []
    for source in (of_png, of_tiff, of_ppm, by_pillow):
        for name, content, twin in source():
            seen.add(f"{source.__name__} {name}")
            path = tmp_path / "image"
            path.write_bytes(content)
            for opened in (content, path):
                found = np.asarray(read_rgb(partial(open_image, opened)))
                if found.shape != twin.shape or (found != twin).any():
                    wrong.append((source.__name__, name, found.shape))
    assert not wrong
    assert len(seen) > 150


def test_all_suffixes_of_a_format_count() -> None:
    """The sentence that lists the formats, and what is passed over, say the same."""
    assert readable_suffixes() >= {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".tif", ".tiff", ".webp",
        ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k",
    }  # fmt: skip
    assert not {".svg", ".eps", ".tga", ".ico", ".pdf"} & readable_suffixes()


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_a_kind_that_pillow_does_not_know_is_a_sentence(samples: int) -> None:
    content = tiff(COLOURS[..., :samples], 8, 9, "<")
    with pytest.raises(ValueError, match="or of a kind of it that Pillow does not know"):
        read_rgb(partial(open_image, content))
