"""From a stored image to RGB pixels, the same way for every command.

What CLIP is given is 8-bit RGB, and every other kind of image is turned into it *before* it is
resized, as CoOp's and CLIP-Adapter's loaders do:

- grey, palette, CMYK and YCbCr images as Pillow converts them;
- transparent pixels over white, which is how most viewers show them (dropping the transparency
  would uncover whatever colour the file holds beneath);
- 12- and 16-bit grey images scaled to 8 bits (Pillow alone would turn nearly all of them white);
- of animated images and multi-page files the first frame;
- EXIF orientation is *not* applied, nor TIFF's: the official CLIP, CoOp and CLIP-Adapter read the
  pixels as they are stored, and numbers are to be compared with theirs. Turn the files to have it
  otherwise. (HEIC comes upright: its decoder turns it and does not say so.)
"""

import errno
import io
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import II, MM, OPEN_INFO, TiffImageFile

from clip_adapter.errors import UserError
from clip_adapter.files import LFS_ADVICE, is_lfs_pointer, other_kind

HEIF = "HEIF"
# What is read. Pillow knows more, and one of them (EPS) runs a program on what the file says.
FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF", "JPEG2000", HEIF)
HEIF_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
# What others call images, for them to be told that these are not read.
OTHER_SUFFIXES = frozenset(
    {".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".ico", ".jxl"}
    | {".nef", ".orf", ".pcx", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga", ".xcf"}
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
WHITE = (255, 255, 255, 255)
SIXTEEN_BITS = 2**16 - 1
# Back from how Pillow turns a TIFF file, by its tag.
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# Errors of the machine rather than of the image: another image would not fare better.
MACHINE_ERRORS = frozenset(
    {errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.ENOMEM}
    | {errno.EPERM, errno.ESTALE}
)


class BadImage(ValueError):
    """An image whose content cannot be used; the message says why, without its name."""


@cache
def readable_suffixes() -> frozenset[str]:
    """How the names of the files end that count as images, in lower case: those of all formats that
    are read.

    HEIC, in which telephones photograph, is read where the package pillow-heif is installed.
    """
    read = {*_formats(), "MPO"}  # MPO, several JPEG in one file, is opened as JPEG
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in read)


@cache
def _formats() -> list[str]:
    Image.init()
    known = Image.SAVE.keys() - {HEIF}  # a format that this Pillow was built without is not saved
    if find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener

        register_heif_opener()
        known |= {HEIF}
    # Grey TIFF of which Pillow knows all but one order of bytes, or all but white as zero.
    for order, zero_is in ((MM, 1), (MM, 0), (II, 0)):
        OPEN_INFO.setdefault((order, zero_is, (1,), 1, (12,), ()), ("I;16", "I;12"))
    OPEN_INFO.setdefault((MM, 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
    return [name for name in FORMATS if name in known]


def open_image(source: Path | bytes) -> Image.Image:
    """An image file, or the bytes of one, opened but not decoded.

    Raises BadImage for what is no regular file, which is never opened, for a link to nothing, and
    for a format that is not read; OSError where the file cannot be read.
    """
    if isinstance(source, bytes):
        return _opened(io.BytesIO(source))
    try:
        kind = other_kind(source)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and source.is_symlink():
            raise BadImage("it is a link that leads nowhere") from error
        raise
    if kind:
        raise BadImage(f"it is {kind}, not a file")
    return _opened(source)


def _opened(source: Path | io.BytesIO) -> Image.Image:
    try:
        return Image.open(_without_texts(source), formats=_formats())
    except Image.UnidentifiedImageError as error:
        if is_lfs_pointer(source if isinstance(source, Path) else source.getvalue()):
            raise BadImage(f"it {LFS_ADVICE}") from error
        known = ", ".join(_formats())
        raise BadImage(
            f"it is not an image of a format that is read ({known}), or of a kind of it that "
            "Pillow does not know"
        ) from error


def _without_texts(source: Path | io.BytesIO) -> Path | io.BytesIO:
    """The source itself, or of a PNG file with texts or a colour profile all but those.

    Nothing of them is used, and Pillow takes a PNG for broken whose texts are large.
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getbuffer()) as file:
        if file.read(8) != PNG_SIGNATURE:
            return source
        chunks = list(_png_chunks(file))
        if not any(kind in PNG_TEXTS for kind, _, _ in chunks):
            return source
        kept = io.BytesIO()
        kept.write(PNG_SIGNATURE)
        for kind, start, size in chunks:
            if kind not in PNG_TEXTS:
                file.seek(start)
                kept.write(file.read(size))
    kept.seek(0)
    return kept


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and size of each chunk; the last one may go beyond the file."""
    start, end = file.tell(), file.seek(0, os.SEEK_END)
    while start < end:
        file.seek(start)
        length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        yield kind, start, length + 12
        start += length + 12


def read_rgb(
    read: Callable[[], Image.Image], drafted: tuple[int, int] | None = None
) -> Image.Image:
    """Call `read` and turn what it gives, fully decoded, into an image of mode RGB.

    drafted: decode a JPEG at that of 1/8, 1/4 and 1/2 of its size which leaves this width and
        height, where one does. The decoder then skips most of its inverse transforms.

    Raises BadImage for content that cannot be decoded, takes more memory than there is, is of more
    pixels than Pillow takes for honest (`Image.MAX_IMAGE_PIXELS`), or has no agreed meaning as RGB
    (floating point), and OSError where the file cannot be read at all.
    """
    try:
        with read() as image:
            _refuse_bombs(image)
            if drafted:
                image.draft(None, drafted)
            return _to_rgb(image)
    except BadImage:
        raise
    # Pillow's decoders raise nearly anything on damaged data (struct.error, SyntaxError …).
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        raise BadImage(_reason(error)) from error


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Within it, a BadImage gets the image's name in front of the reason, and an OSError, which is
    not the image's fault, becomes a UserError."""
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{name} cannot be decoded: {error}") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}.") from error


def _refuse_bombs(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise BadImage(_too_large(f"{image.width} × {image.height}"))


def _too_large(size: str) -> str:
    return (
        f"it has {size} pixels, more than {Image.MAX_IMAGE_PIXELS:,}, which may be a "
        "decompression bomb; make it smaller"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image and turn it into RGB."""
    if isinstance(image, PngImageFile):
        _scale_transparency(image)
    if not isinstance(image, TiffImageFile):
        image.load()
        return _colours(image)
    tags = image.tag_v2  # what loading does not keep is read before
    orientation = tags.get(ExifTags.Base.Orientation)
    white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    depth = tags.get(ExifTags.Base.BitsPerSample, (1,))[0]
    if depth == 16:
        _name_planes(image)
    image.filename = ""  # mapped into memory, a file turned by a quarter comes out scrambled
    image.load()
    if image.mode in WIDE_GREY:
        rgb = _from_wide_grey(image, 2**depth - 1 if depth < 16 else SIXTEEN_BITS, white_is_zero)
    else:
        rgb = _colours(image)
    return rgb.transpose(TURNED[orientation]) if orientation in TURNED else rgb


def _scale_transparency(image: PngImageFile) -> None:
    """Of a PNG, Pillow leaves the transparent colour at the depth of the file and gives pixels of
    8 bits, but for 16-bit grey. What lies above the depth does not count."""
    key, raw = image.info.get("transparency"), image.tile[0].args if image.tile else None
    if image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(v >> 8 if raw == "RGB;16B" else v & 255 for v in key)
    elif image.mode == "L" and isinstance(key, int):
        largest = {"L;2": 3, "L;4": 15}.get(str(raw), 255)
        image.info["transparency"] = (key & largest) * 255 // largest


def _name_planes(image: TiffImageFile) -> None:
    """Pillow reads uncompressed 16-bit colours in separate planes as if they had 8 bits."""
    wide = ";16B" if image.tag_v2.prefix == MM else ";16L"
    image.tile = [
        tile._replace(args=(f"{tile.args[0]}{wide}", *tile.args[1:]))
        if isinstance(tile.args, tuple) and tile.codec_name == "raw" and tile.args[0] in [*"RGBA"]
        else tile
        for tile in image.tile
    ]


def _colours(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in WIDE_GREY:
        return _from_wide_grey(image)
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers, of which nobody says what is white")
    if image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), layer).convert("RGB")
    return image.convert("RGB")


def _from_wide_grey(
    image: Image.Image, largest: int = SIXTEEN_BITS, white_is_zero: bool = False
) -> Image.Image:
    """0…largest to 0…255; Pillow opens some 16-bit formats (PGM among them) as 32-bit integers."""
    values = np.asarray(image).astype(np.int64)
    if not 0 <= values.min() <= values.max() <= largest:
        raise BadImage("its pixels are 32-bit integers, of which nobody says what is white")
    grey = ((values * 255 + largest // 2) // largest).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = WHITE[0]
    return Image.fromarray(grey).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _too_large("too many")
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")
