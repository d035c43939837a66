"""From a stored image to RGB pixels, the same way for every command.

What CLIP is given is 8-bit RGB, and every other kind of image is turned into it *before* it is
resized, as CoOp's and CLIP-Adapter's loaders do:

- grey, palette, CMYK and YCbCr images as Pillow converts them;
- transparent pixels over white, which is how most viewers show them (dropping the transparency
  would uncover whatever colour the file holds beneath);
- 16-bit grey images scaled to 8 bits (Pillow alone would turn nearly all of them white);
- of animated images and multi-page files the first frame;
- EXIF orientation is *not* applied: the official CLIP, CoOp and CLIP-Adapter read the pixels as
  they are stored, and numbers are to be compared with theirs. Turn the files to have it otherwise.
"""

import errno
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.files import other_kind
from clip_adapter.extract.files import LFS_ADVICE, is_lfs_pointer

HEIF = "HEIF"
# What is read. Pillow knows more, and one of them (EPS) runs a program on what the file says.
FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF", "JPEG2000", HEIF)
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
HEIF_SUFFIXES = frozenset({".heic", ".heif"})
# What others call images, for them to be told that these are not read.
OTHER_SUFFIXES = frozenset(
    {".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".ico", ".j2k"}
    | {".jfif", ".jp2", ".jpe", ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pnm", ".psd", ".raf"}
    | {".raw", ".rw2", ".svg", ".tga", ".xcf"}
)

WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
WHITE = (255, 255, 255, 255)
SIXTEEN_BIT_MAX = 65535
# Errors of the machine rather than of the image: another image would not fare better.
MACHINE_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOENT,
        errno.ENOMEM,
        errno.EPERM,
        errno.ESTALE,
    }
)


class BadImage(ValueError):
    """An image whose content cannot be used; the message says why, without its name."""


@cache
def readable_suffixes() -> frozenset[str]:
    """How the names of the files end that count as images, in lower case.

    HEIC, in which telephones photograph, is read where the package pillow-heif is installed.
    """
    return SUFFIXES | HEIF_SUFFIXES if find_spec("pillow_heif") else SUFFIXES


@cache
def _formats() -> list[str]:
    Image.init()
    known = Image.OPEN.keys() - {HEIF}
    if readable_suffixes() >= HEIF_SUFFIXES:
        from pillow_heif import register_heif_opener

        register_heif_opener()
        known |= {HEIF}
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
        return Image.open(source, formats=_formats())
    except Image.UnidentifiedImageError as error:
        if is_lfs_pointer(source if isinstance(source, Path) else source.getvalue()):
            raise BadImage(f"it {LFS_ADVICE}") from error
        known = ", ".join(_formats())
        raise BadImage(f"it is not an image of a format that is read ({known})") from error


def read_rgb(read: Callable[[], Image.Image]) -> Image.Image:
    """Call `read` and turn what it gives, fully decoded, into an image of mode RGB.

    Raises BadImage for content that cannot be decoded, takes more memory than there is, is of more
    pixels than Pillow takes for honest (`Image.MAX_IMAGE_PIXELS`), or has no agreed meaning as RGB
    (floating point), and OSError where the file cannot be read at all.
    """
    try:
        with read() as image:
            _refuse_bombs(image)
            image.load()
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
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in WIDE_GREY:
        return _from_wide_grey(image)
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers, of which nobody says what is white")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), layer).convert("RGB")
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """0…65535 to 0…255; Pillow opens some 16-bit formats (PGM among them) as 32-bit integers."""
    values = np.asarray(image)
    if not 0 <= values.min() <= values.max() <= SIXTEEN_BIT_MAX:
        raise BadImage("its pixels are 32-bit integers, of which nobody says what is white")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(
        "RGB"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _too_large("too many")
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")
