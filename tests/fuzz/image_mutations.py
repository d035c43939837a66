"""Damaged, odd and hostile image files.

`make(rng, folder)` writes one into `folder` and returns what it is, in words; the same state of the
generator makes the same file.
"""

import os
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from tests.fuzz.damage import BYTES

KINDS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000")
MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "LA", "L", "P", "1", "I;16"),
    "GIF": ("P", "L", "RGB"),
    "TIFF": ("RGB", "RGBA", "CMYK", "LAB", "YCbCr", "I", "F", "I;16", "P", "1"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "1", "P"),
    "PPM": ("RGB", "L", "1", "I"),
    "JPEG2000": ("RGB", "L", "RGBA"),
}
SIDES = (1, 2, 7, 33)
SUFFIXES = (".png", ".jpg", ".tiff", ".gif", ".webp")
CLAIMED = (0, 1, 224, 65_535, 1_000_000, 2**31 - 1, 2**32 - 1)


def make(rng: random.Random, folder: Path) -> str:
    """One file of any kind below; its name is new in `folder`."""
    path = folder / f"{rng.getrandbits(48):012x}{rng.choice(SUFFIXES)}"
    return f"{path.name}: {rng.choice(MUTATIONS)(rng, path)}"


def valid(rng: random.Random, path: Path) -> str:
    kind = rng.choice(KINDS)
    mode = rng.choice(MODES[kind])
    size = rng.choice(SIDES), rng.choice(SIDES)
    if mode in ("LAB", "F", "I", "I;16", "P", "1"):
        image = Image.new(mode, size, rng.randrange(2))
    else:
        bands = len(Image.new(mode, (1, 1)).getbands())
        image = Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * bands))
    options = {}
    if kind in ("GIF", "TIFF", "WEBP", "PNG") and rng.random() < 0.3:
        options = {"save_all": True, "append_images": [image.copy() for _ in range(3)]}
    image.save(path, kind, **options)
    return f"{kind} {mode} {size[0]}x{size[1]}{' of frames' if options else ''}"


def damaged(rng: random.Random, path: Path) -> str:
    return f"{valid(rng, path)}, {rng.choice(BYTES[:-1])(rng, path)}"  # it stays a file


def foreign(rng: random.Random, path: Path) -> str:
    choices = {
        "empty": b"",
        "noise": rng.randbytes(300),
        "zeros": bytes(4096),
        "text": b"not an image",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "ZIP": b"PK\x03\x04" + rng.randbytes(80),
        "HDF5": b"\x89HDF\r\n\x1a\n" + rng.randbytes(80),
        "HEIC": struct.pack(">I", 24) + b"ftypheic" + rng.randbytes(80),
        "AVIF": struct.pack(">I", 24) + b"ftypavif" + rng.randbytes(80),
    }
    what = rng.choice(list(choices))
    path.write_bytes(choices[what])
    return what


Chunks = Sequence[tuple[bytes, bytes]]


def png(
    width: int, height: int, depth: int, colour: int, data: bytes, before: Chunks = (),
    behind: Chunks = (), interlaced: int = 0,
) -> bytes:  # fmt: skip
    """A PNG of these numbers, whatever they are. data: of its pixels; before, behind: chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, (b"IDAT", data), *behind, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def claiming(rng: random.Random, path: Path) -> str:
    """A PNG of a size that its pixels do not bear out, with odd types and chunks."""
    width, height = rng.choice(CLAIMED), rng.choice(CLAIMED)
    depth, colour = rng.choice((1, 8, 16, 77)), rng.choice((0, 2, 3, 4, 6, 9))
    chunks = []
    if rng.random() < 0.3:
        chunks.append((b"zTXt", b"a\0\0" + zlib.compress(bytes(10_000_000))))
    if rng.random() < 0.3:
        chunks.append((b"eXIf", b"Exif\0\0" + rng.randbytes(40)))
    data = zlib.compress(bytes(rng.choice((0, 10, 100_000))))
    path.write_bytes(png(width, height, depth, colour, data, chunks, (), rng.choice((0, 1))))
    return f"PNG that claims {width}x{height}, depth {depth}, colour type {colour}"


def strip(rng: random.Random, path: Path) -> str:
    length = rng.choice((1_000, 100_000, 1_000_000))
    size = (1, length) if rng.random() < 0.5 else (length, 1)
    Image.new("L", size, 3).save(path, "PNG")
    return f"PNG of {size[0]}x{size[1]}"


def exif(rng: random.Random, path: Path) -> str:
    found = Image.Exif()
    for tag in rng.sample((0x0112, 0x8769, 0x8825, 0x9286, 0x010F), 3):
        found[tag] = rng.choice(("x" * 500, 70_000, 6))
    try:
        Image.new("RGB", (9, 9), 7).save(path, "JPEG", exif=found.tobytes())
    except Exception:  # Pillow does not write everything
        path.write_bytes(b"\xff\xd8\xff\xe1\x00\x10Exif\0\0" + rng.randbytes(30))
    return "JPEG with absurd EXIF"


def special(rng: random.Random, path: Path) -> str:
    what = rng.choice(("pipe", "dead link", "link to itself", "folder", "link to a device"))
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        targets = {"dead link": "nowhere", "link to itself": path.name}
        path.symlink_to(targets.get(what, "/dev/zero"))
    return what


MUTATIONS: tuple[Callable[[random.Random, Path], str], ...] = (
    valid, *[damaged] * 6, foreign, claiming, strip, exif, special,
)  # fmt: skip
