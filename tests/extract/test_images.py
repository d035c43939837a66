"""Every kind of stored image becomes RGB, or a sentence."""

import io
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.names import resolve
from clip_adapter.extract.encoding import images
from clip_adapter.extract.encoding.images import BadImage, naming, open_image, read_rgb
from tests.fuzz.image_mutations import png

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (9, 7, 3), np.uint8)


def stored(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer


def pixels(buffer: io.BytesIO) -> np.ndarray:
    image = read_rgb(partial(open_image, buffer.getvalue()))
    assert image.mode == "RGB"
    return np.asarray(image)


def bad(content: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        read_rgb(partial(open_image, content))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("alpha", "red"), [(0, 255), (255, 200), (51, 244)])
def test_transparency_is_over_white(alpha: int, red: int) -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, alpha))
    found = pixels(stored(image, "png"))[0, 0]
    assert found[0] == red
    assert found[1] == found[2] == 255 - alpha


def test_cmyk_and_other_modes_are_converted() -> None:
    cmyk = stored(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "jpeg")
    assert np.abs(pixels(cmyk).astype(int) - [0, 255, 255]).max() < 8
    assert pixels(stored(Image.new("1", (2, 2), 1), "png")).tolist() == [[[255] * 3] * 2] * 2
    assert pixels(stored(Image.new("L", (1, 1), 77), "png")).tolist() == [[[77] * 3]]
    assert read_rgb(lambda: Image.new("YCbCr", (2, 2))).mode == "RGB"


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    found = pixels(stored(frames[0], "gif", save_all=True, append_images=frames[1:]))
    assert found[2, 2].tolist() == [255, 0, 0]


def test_foreign_files() -> None:
    for content in (b"hello", b""):
        assert "not an image of a format that is read (JPEG, PNG" in bad(content)


def test_floating_point_and_32_bit_pixels_have_no_white() -> None:
    assert "floating-point" in bad(stored(Image.new("F", (2, 2), 0.5), "tiff").getvalue())
    assert "32-bit" in bad(stored(Image.new("I", (2, 2), 1 << 20), "tiff").getvalue())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_decompression_bombs(size: tuple[int, int]) -> None:
    assert "decompression bomb" in bad(png(*size, 8, 2, zlib.compress(b"")))


def named(path: Path) -> None:
    with naming(path.name):
        read_rgb(partial(open_image, path))


def test_a_file_that_cannot_be_read_is_not_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cat\.jpg cannot be read: No such file"):
        named(tmp_path / "cat.jpg")
    (tmp_path / "dog.jpg").write_text("woof")
    with pytest.raises(BadImage, match=r"dog\.jpg cannot be decoded: it is not an image"):
        named(tmp_path / "dog.jpg")


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for without end."""
    pipe, folder, dead, loop = (tmp_path / name for name in ("pipe", "folder", "dead", "loop"))
    os.mkfifo(pipe)
    folder.mkdir()
    dead.symlink_to(tmp_path / "nowhere")
    loop.symlink_to(loop)
    (tmp_path / "to-pipe").symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    for path, words in (
        (pipe, "it is a named pipe, not a file"),
        (tmp_path / "to-pipe", "it is a named pipe, not a file"),
        (tmp_path / "socket", "it is a socket, not a file"),
        (Path("/dev/zero"), "it is a device, not a file"),
        (folder, "it is a folder, not a file"),
        (dead, "it is a link that leads nowhere"),
        (loop, "it is a link that leads nowhere"),
        (tmp_path / ("long" * 100), "File name too long"),
    ):
        with pytest.raises(BadImage, match=words):
            named(path)


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    assert "the pointer that Git LFS left in the file's place" in bad(pointer)
    path = tmp_path / "a.jpg"
    path.write_bytes(pointer)
    with pytest.raises(BadImage, match="pointer that Git LFS left"):
        open_image(path)
    with pytest.raises(UserError, match="pointer that Git LFS left"):
        resolve("ViT-B-32", str(path))


def test_memory_that_is_not_there_is_a_bad_image() -> None:
    def read() -> Image.Image:
        raise MemoryError

    with pytest.raises(BadImage, match="it needs more memory than there is"):
        read_rgb(read)


def test_no_program_is_run_on_what_a_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to Ghostscript."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("it was run"))
    assert "not an image of a format that is read" in bad(
        stored(Image.new("L", (2, 2)), "eps").getvalue()
    )


@pytest.fixture
def heic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Says whether the package that reads HEIC is there."""

    def forget() -> None:
        images.readable_suffixes.cache_clear()
        images._formats.cache_clear()

    def installed(there: bool) -> None:
        if not there:
            monkeypatch.setitem(sys.modules, "pillow_heif", None)
        forget()

    yield installed
    forget()


def test_heic_where_the_package_for_it_is_missing(heic: Callable[[bool], None]) -> None:
    heic(False)
    assert not {".heic", ".heif"} & images.readable_suffixes()
    assert "HEIF" not in bad(b"no image")


@pytest.mark.skipif(not find_spec("pillow_heif"), reason="the extra heic is not installed")
def test_heic_where_the_package_for_it_is_there(heic: Callable[[bool], None]) -> None:
    heic(True)
    assert {".heic", ".heif"} <= images.readable_suffixes()
    assert "HEIF" in bad(b"no image")
    smooth = Image.fromarray(NOISE).resize((64, 48), Image.Resampling.BICUBIC)
    found = pixels(stored(smooth, "heif", quality=90))
    assert found.shape == (48, 64, 3)
    assert np.abs(found.astype(int) - np.asarray(smooth)).mean() < 10
