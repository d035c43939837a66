"""Data sets of several kinds on which protocol.py measures: two encoded, four drawn as features."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_adapter.adapters.classifier import unit
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import CacheWriter
from clip_adapter.pipelines.fitting.config import Selection

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Split = tuple[Floats, Labels]
"""Features (N, D) and labels (N,)."""

# Twice what the largest tasks take, so that seeds differ.
TRAIN_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS = 32, 8, 60
TEXTURE_SIDE = 32
WAVES = ("sine", "square", "checkered", "ringed")
ANGLES = {"horizontal": 0.0, "diagonal": 45.0, "vertical": 90.0}
PERIOD = 8.0  # pixels


@dataclass(frozen=True)
class DataSet:
    """A feature cache."""

    name: str
    path: Path

    @cached_property
    def counts(self) -> dict[str, npt.NDArray[np.int64]]:
        """Images of each class, by split."""
        with FeatureCache(self.path) as cache:
            classes = len(cache.class_names)
            return {s: np.bincount(cache.labels(s), minlength=classes) for s in cache.splits}

    @property
    def select(self) -> Selection:
        """What chooses: the usual few images, or the support set where there is no validation."""
        return "few-shot-val" if "val" in self.counts else "cv"

    @property
    def largest_class(self) -> int:
        return int(self.counts["train"].max())

    def words(self) -> str:
        test, train = self.counts["test"], self.counts["train"]
        return f"{len(train)} classes, {test.sum()} test images, selected by {self.select}"


def caches_in(folder: Path) -> list[DataSet]:
    return [DataSet(path.stem, path) for path in sorted(folder.glob("*.h5"))]


def digits(folder: Path) -> Path:
    """The embedded digits through the embedded CLIP, which knows digits."""
    return _encoded("digits", folder, [])


def textures(folder: Path) -> Path:
    """Twelve gratings and rings through the same CLIP, which knows nothing of the kind."""
    rng = np.random.default_rng(0)
    images = folder / "textures"
    for split, count in (
        ("train", TRAIN_PER_CLASS),
        ("val", VAL_PER_CLASS),
        ("test", TEST_PER_CLASS),
    ):
        for wave in WAVES:
            for direction, angle in ANGLES.items():
                place = images / split / f"{direction} {wave} pattern"
                place.mkdir(parents=True)
                for number in range(count):
                    Image.fromarray(texture(wave, angle, rng)).save(place / f"{number}.png")
    return _encoded("textures", folder, ["--dataset", f"folder:{images}"])


def texture(wave: str, angle: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(32, 32): a pattern of a random phase under noise, its angle and period a little off."""
    turned = np.deg2rad(angle + rng.normal(0, 8))
    period = PERIOD * rng.uniform(0.8, 1.25)
    rows, columns = np.mgrid[:TEXTURE_SIDE, :TEXTURE_SIDE] - rng.uniform(0, TEXTURE_SIDE, (2, 1, 1))
    along = 2 * np.pi / period * (rows * np.cos(turned) + columns * np.sin(turned))
    across = 2 * np.pi / period * (columns * np.cos(turned) - rows * np.sin(turned))
    values = {
        "sine": np.sin(along),
        "square": np.sign(np.sin(along)),
        "checkered": np.sign(np.sin(along) * np.sin(across)),
        # Ellipses that are long in the direction.
        "ringed": np.sin(np.hypot(along, across / 2)),
    }[wave]
    noisy = 0.5 + 0.25 * rng.uniform(0.3, 1) * values + rng.normal(0, 0.15, values.shape)
    return (255 * np.clip(noisy, 0, 1)).astype(np.uint8)


def _encoded(name: str, folder: Path, options: list[str]) -> Path:
    path = folder / f"{name}.h5"
    command = [Path(sys.executable).parent / "extract", "--out", path, *options]
    subprocess.run(command, check=True, capture_output=True)
    return path


def _written(path: Path, splits: Mapping[str, Split], weights: Floats) -> Path:
    """A cache of made-up features. weights: (C, D), the classes' text features."""
    with CacheWriter(path, {"dataset": path.stem}, views=1) as writer:
        writer.append_text(weights[:, None], [f"class {c}" for c in range(len(weights))])
        for split, (features, labels) in splits.items():
            ids = [f"{split}/{row}" for row in range(len(labels))]
            writer.append_images(split, features[:, None], labels, ids)
        writer.finish(
            templates=["a {}"],
            backbone={
                "name": "made-up",
                "pretrained": "made-up",
                "weights_sha256": "0" * 64,
                "embed_dim": weights.shape[1],
                "image_size": 1,
                "quick_gelu": False,
            },
            preprocess={},
            dataset={
                "name": path.stem,
                "source": "drawn as features",
                "version": "1",
                "splits": dict.fromkeys(splits, "drawn"),
            },
            logit_scale=100.0,
            logit_bias=0.0,
        )
    return path


def drawn(
    path: Path,
    dim: int,
    classes: int,
    *,
    named: float,
    unnamed: float,
    within: float,
    beyond: float,
    mislabelled: float = 0.0,
) -> Path:
    """Features as CLIP's lie: images in one narrow cone, texts in another, classes apart in a few
    directions.

    named, unnamed: how far a class lies from the others in a direction that its text shares, and in
    one that it does not. within, beyond: noise in the directions of the classes, and in all.
    mislabelled: the share of training and validation images that carry another class's label.
    """
    rng = np.random.default_rng(0)
    directions = min(60, dim // 2)
    basis = np.linalg.qr(rng.normal(size=(dim, directions)))[0].T
    image_cone, text_cone = unit(np, rng.normal(size=(2, dim)))
    names, others = unit(np, rng.normal(size=(2, classes, directions)) @ basis)

    def split(per_class: int, wrong: float) -> Split:
        labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
        noise = within * unit(np, rng.normal(size=(len(labels), directions)) @ basis)
        noise += beyond * unit(np, rng.normal(size=(len(labels), dim)))
        clean = 0.8 * image_cone + named * names[labels] + unnamed * others[labels]
        features = (10 * unit(np, clean + noise)).astype(np.float32)
        swapped = rng.random(len(labels)) < wrong
        moved = (labels + rng.integers(1, classes, len(labels))) % classes
        return features, np.where(swapped, moved, labels).astype(np.int32)

    train, val = split(TRAIN_PER_CLASS, mislabelled), split(VAL_PER_CLASS, mislabelled)
    weights = unit(np, 0.85 * text_cone + 0.5 * names).astype(np.float32)
    splits = {"train": train, "val": val, "test": split(TEST_PER_CLASS, 0.0)}
    return _written(path, splits, weights)


SETS: dict[str, Callable[[Path], Path]] = {
    "digits": digits,
    "textures": textures,
    "good-names": lambda folder: drawn(
        folder / "good-names.h5", 512, 25, named=0.2, unnamed=0.1, within=0.6, beyond=0.5
    ),
    "poor-names": lambda folder: drawn(
        folder / "poor-names.h5", 256, 20, named=0.1, unnamed=0.25, within=0.45, beyond=0.35
    ),
    "noisy-images": lambda folder: drawn(
        folder / "noisy-images.h5", 128, 10, named=0.2, unnamed=0.2, within=0.8, beyond=0.6
    ),
    "wrong-labels": lambda folder: drawn(
        folder / "wrong-labels.h5",
        256,
        30,
        named=0.25,
        unnamed=0.2,
        within=0.45,
        beyond=0.35,
        mislabelled=0.15,
    ),
}
"""What makes each, given a folder for files."""
