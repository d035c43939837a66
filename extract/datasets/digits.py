"""The 1,797 handwritten digits inside scikit-learn (UCI Optical Recognition of Digits)."""

from functools import partial

import numpy as np
import sklearn
from PIL import Image
from sklearn.datasets import load_digits

from clip_adapter.extract.datasets.source import ImageDataset, SourceOptions, Split
from clip_adapter.extract.datasets.splitting import refuse_fractions, stratified_parts

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the digit {}.",)
FRACTIONS = {"train": 0.4, "val": 0.1, "test": 0.5}
SPLIT_SEED = 0
INK_MAX = 16.0


def open_digits(_: str, options: SourceOptions) -> ImageDataset:
    """8 × 8 grey images, ink white on black, in a fixed stratified split (40 / 10 / 50 %).

    Raises UserError where `options` ask for another split.
    """
    bunch = load_digits()
    pixels = np.rint(bunch.images / INK_MAX * 255).astype(np.uint8)
    shuffled = np.random.default_rng(SPLIT_SEED).permutation
    parts = stratified_parts(bunch.target, list(FRACTIONS.values()), shuffled)
    splits = {}
    for (name, fraction), rows in zip(FRACTIONS.items(), parts, strict=True):
        splits[name] = Split(
            ids=[f"digits/{row:04d}" for row in rows],
            labels=bunch.target[rows].astype(np.int32),
            read=partial(_read, pixels[rows]),
            origin=f"{fraction:.0%} of scikit-learn's digits, stratified, seed {SPLIT_SEED}",
        )
    provenance = {"name": "digits", "source": "scikit-learn", "version": sklearn.__version__}
    refuse_fractions(options, splits)
    return ImageDataset("digits", CLASS_NAMES, TEMPLATES, splits, provenance)


def _read(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])
