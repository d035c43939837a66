"""Data sets of several kinds on which protocol.py measures: two encoded, four drawn as features."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ours import task_of
from PIL import Image

from clip_adapter.adapters.classifier import classifier_weights, unit
from clip_adapter.adapters.method import Task
from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.cache.reader import FeatureCache

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
    """What `fit` reads of a cache. weights: (C, D), unit rows."""

    name: str
    train: Split
    val: Split
    test: Split
    weights: Floats
    logit_scale: float

    def task(self, shots: int, seed: int) -> Task:
        """A support set and min(shots, 4) validation images a class, drawn as `fit` draws them."""
        drawn = draw_few_shot(self.train[1], self.val[1], shots=shots, seed=seed)
        support, validation = (
            (features[rows], labels[rows])
            for (features, labels), rows in (
                (self.train, drawn.support),
                (self.val, drawn.validation),
            )
        )
        return task_of(support, validation, self.weights, self.logit_scale, seed)


def digits(folder: Path) -> DataSet:
    """The embedded digits through the embedded CLIP, which knows digits."""
    return _encoded("digits", folder, [])


def textures(folder: Path) -> DataSet:
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


def _encoded(name: str, folder: Path, options: list[str]) -> DataSet:
    path = folder / f"{name}.h5"
    command = [Path(sys.executable).parent / "extract", "--out", path, *options]
    subprocess.run(command, check=True, capture_output=True)
    with FeatureCache(path) as cache:
        splits = {split: cache.images(split, views=1) for split in ("train", "val", "test")}
        return DataSet(
            name,
            *((images.features[0], images.labels) for images in splits.values()),
            classifier_weights(np, cache.text_features()),
            cache.logit_scale,
        )


def drawn(
    name: str,
    dim: int,
    classes: int,
    *,
    named: float,
    unnamed: float,
    within: float,
    beyond: float,
    mislabelled: float = 0.0,
) -> DataSet:
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
    return DataSet(name, train, val, split(TEST_PER_CLASS, 0.0), weights, 100.0)


SETS: dict[str, Callable[[Path], DataSet]] = {
    "digits": digits,
    "textures": textures,
    "good-names": lambda folder: drawn(
        "good-names", 512, 25, named=0.2, unnamed=0.1, within=0.6, beyond=0.5
    ),
    "poor-names": lambda folder: drawn(
        "poor-names", 256, 20, named=0.1, unnamed=0.25, within=0.45, beyond=0.35
    ),
    "noisy-images": lambda folder: drawn(
        "noisy-images", 128, 10, named=0.2, unnamed=0.2, within=0.8, beyond=0.6
    ),
    "wrong-labels": lambda folder: drawn(
        "wrong-labels", 256, 30, named=0.25, unnamed=0.2, within=0.45, beyond=0.35, mislabelled=0.15
    ),
}
"""What makes each, given a folder for files."""
