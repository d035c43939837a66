"""Small archives in the real layout of the published ones, a downloader that hands them out, and
what is asked of data sets."""

import io
import socket
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import downloader

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset, SourceOptions

PETS = "https://thor.robots.ox.ac.uk/~vgg/data/pets"
DTD = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
EUROSAT = "http://madm.dfki.de/files/sentinel/EuroSAT.zip"
CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip?download=1"


def image_bytes(colour: int, kind: str = "JPEG") -> bytes:
    """An 8 × 8 image of one grey value, which survives JPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour,) * 3).save(buffer, kind)
    return buffer.getvalue()


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT
) -> Path:
    """A tar of files by their names, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_image(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(colour))
    return path


def grey(image: Image.Image) -> int:
    """The grey value that `image_bytes` was given."""
    return int(np.asarray(image.convert("L")).mean().round())


def opened(spec: str, **options: Any) -> ImageDataset:
    return open_dataset(spec, SourceOptions(**options))


def refused(words: str, spec: str, **options: Any) -> None:
    """It is, in one sentence with these words."""
    with pytest.raises(UserError, match=words) as caught:
        opened(spec, **options)
    assert "\n" not in str(caught.value)


def sizes(data: ImageDataset) -> dict[str, int]:
    assert all(len(split.ids) == len(split.labels) for split in data.splits.values())
    return {name: len(split.ids) for name, split in data.splits.items()}


def tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pets_archives(folder: Path, lists: Mapping[str, list[tuple[str, int]]]) -> dict[str, Path]:
    """images.tar.gz and annotations.tar.gz of Oxford-IIIT Pet, both plain tar like the originals.

    lists: trainval and test → (image name, label from 1); the grey value of an image is its label.
    """
    images, annotations = {}, {}
    for name, rows in lists.items():
        annotations[f"annotations/{name}.txt"] = "".join(
            f"{image} {label} 1 1\n" for image, label in rows
        ).encode()
        for image, label in rows:
            images[f"images/{image}.jpg"] = image_bytes(label)
            annotations[f"annotations/trimaps/{image}.png"] = _trimap()
    return {
        f"{PETS}/images.tar.gz": tar(folder / "images.tar.gz", images),
        f"{PETS}/annotations.tar.gz": tar(folder / "annotations.tar.gz", annotations),
    }


def _trimap() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 1).save(buffer, "PNG")
    return buffer.getvalue()


def dtd_archive(folder: Path, classes: list[str]) -> dict[str, Path]:
    """dtd-r1.0.1.tar.gz of the Describable Textures; grey: 10, 20, 30 for train, val, test."""
    members: dict[str, bytes] = {}
    for split, colour in (("train1", 10), ("val1", 20), ("test1", 30)):
        paths = [f"{name}/{name}_{colour:04d}.jpg" for name in classes]
        members[f"dtd/labels/{split}.txt"] = "".join(f"{path}\n" for path in paths).encode()
        members |= {f"dtd/images/{path}": image_bytes(colour) for path in paths}
    return {DTD: tar(folder / "dtd.tar.gz", members)}


def eurosat_archive(
    folder: Path, classes: list[str], per_class: int, others: Mapping[str, bytes] | None = None
) -> dict[str, Path]:
    """EuroSAT.zip; the grey value of an image is the number in its name. others: name → content."""
    path = folder / "EuroSAT.zip"
    images = {f"{name}_{n}": image_bytes(n) for name in classes for n in range(1, per_class + 1)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (images | dict(others or {})).items():
            archive.writestr(f"2750/{name.partition('_')[0]}/{name}.jpg", content)
    return {EUROSAT: path}


def caltech_archive(folder: Path, classes: list[str]) -> dict[str, Path]:
    """caltech-101.zip with the tar.gz of images in it, 31 of each class, of which 30 train."""
    content = image_bytes(50)
    inner = tar(
        folder / "101_ObjectCategories.tar.gz",
        {
            f"101_ObjectCategories/{name}/image_{number:04d}.jpg": content
            for name in classes
            for number in range(1, 32)
        },
        "w:gz",
    )
    path = folder / "caltech-101.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "caltech-101/101_ObjectCategories.tar.gz")
    return {CALTECH: path}


def serve(monkeypatch: pytest.MonkeyPatch, builder: str, archives: Mapping[str, Path]) -> None:
    """Put `archives` in the place of the internet; they count as having the right checksums."""
    known = tfds.builder(builder).url_infos

    def hand_out(self: Any, url: str, destination: Any, verify: bool = True) -> Any:
        copy = Path(destination) / archives[url].name
        copy.write_bytes(archives[url].read_bytes())
        return downloader.DownloadResult(path=destination / copy.name, url_info=known[url])

    monkeypatch.setattr(downloader._Downloader, "_sync_download", hand_out)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: [])
