"""Folders of small synthetic photographs."""

from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ((40, 32), (25, 60), (64, 64), (17, 9))


def photograph(seed: int) -> Image.Image:
    """Smooth colours with some noise, of one of several shapes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    height, width = SHAPES[seed % len(SHAPES)]
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-20, 20, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def make_folder(root: Path, counts: dict[str, int], classes: tuple[str, ...]) -> Path:
    """root/SPLIT/CLASS/NN.png with `counts[split]` images per class, no two alike."""
    seed = 0
    for split, count in counts.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for row in range(count):
                photograph(seed).save(folder / f"{row:02}.png")
                seed += 1
    return root
