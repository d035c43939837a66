"""Small caches for tests."""

from pathlib import Path
from typing import Any

import numpy as np

from clip_adapter.cache.writer import CacheWriter

ARGUMENTS = {"dataset": "toys", "backbone": "toy-clip"}
BACKBONE = {
    "name": "toy-clip",
    "pretrained": "made-up",
    "weights_sha256": "0" * 64,
    "embed_dim": 4,
    "image_size": 8,
    "quick_gelu": False,
}
DATASET = {"name": "toys", "source": "made up", "version": "1", "splits": {"test": "made up"}}
FINISH: dict[str, Any] = {
    "templates": ["a {}", "the {}"],
    "backbone": BACKBONE,
    "preprocess": {"size": 8},
    "dataset": DATASET,
    "logit_scale": 42.5,
    "logit_bias": -1.25,
}
CLASSES = ["cat", "dog", "eel"]
DIM = 4
BATCH = 5
SPLITS = {"train": 23, "test": 11}


def features(seed: int, *shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def write_all(writer: CacheWriter) -> None:
    """What is not staged yet, batch by batch, as `extract` goes about it."""
    for c in range(writer.text_rows(), len(CLASSES)):
        writer.append_text(features(c, 1, 2, DIM), [CLASSES[c]])
    for split, rows in SPLITS.items():
        every = features(len(split), rows, 1, DIM)
        for start in range(writer.consumed(split), rows, BATCH):
            stop = min(start + BATCH, rows)
            ids = [f"{split}/{row}" for row in range(start, stop)]
            labels = [row % len(CLASSES) for row in range(start, stop)]
            if start == BATCH:  # in each split one image cannot be read
                writer.append_images(
                    split, every[start : stop - 1], labels[:-1], ids[:-1], skipped=ids[-1:]
                )
            else:
                writer.append_images(split, every[start:stop], labels, ids)


def make_cache(path: Path) -> Path:
    with CacheWriter(path, ARGUMENTS, views=1) as writer:
        write_all(writer)
        writer.finish(**FINISH)
    return path
