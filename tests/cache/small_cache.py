"""Small caches for tests."""

from pathlib import Path
from typing import Any

import numpy as np

from clip_adapter.cache.metadata import Part
from clip_adapter.cache.writer import write_cache

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
STATED: dict[str, Any] = {
    "backbone": BACKBONE,
    "preprocess": {"size": 8},
    "dataset": DATASET,
    "logit_scale": 42.5,
    "logit_bias": -1.25,
    "arguments": ARGUMENTS,
}
CLASSES = ["cat", "dog", "eel"]
TEMPLATES = ["a {}", "the {}"]
DIM = 4
SPLITS = {"train": 22, "test": 10}


def stated(dim: int = DIM, **others: Any) -> dict[str, Any]:
    """STATED with features of another width, and other changes."""
    return STATED | {"backbone": BACKBONE | {"embed_dim": dim}} | others


def features(seed: int, *shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def text(classes: int = 3, dim: int = DIM) -> dict[str, Any]:
    """What belongs to no image."""
    names = (CLASSES + [f"class {n}" for n in range(classes)])[:classes]
    values = features(0, classes, 2, dim)
    return {"text/features": values, "text/class_names": names, "text/templates": TEMPLATES}


def images(split: str, values: np.ndarray, labels: Any = None, **others: Any) -> dict[str, Any]:
    """A split of features (V, N, D)."""
    rows = range(values.shape[1])
    named: dict[str, Any] = {
        "features": values,
        "labels": [row % len(CLASSES) for row in rows] if labels is None else labels,
        "ids": [f"{split}/{row}" for row in rows],
        **others,
    }
    return {f"images/{split}/{name}": value for name, value in named.items()}


def small_content() -> dict[str, Any]:
    """Two splits, in each of which one image could not be read."""
    content = text()
    for split, rows in SPLITS.items():
        content |= images(split, features(len(split), 1, rows, DIM), skipped=[f"{split}/broken"])
    return content


def unlabelled(rows: int) -> dict[str, Any]:
    """Images without labels."""
    content = images("unlabelled", features(rows, 1, rows, DIM))
    del content["images/unlabelled/labels"]
    return content


def make_parts(folder: Path) -> list[Path]:
    """Two of them, in each of which one image could not be read."""
    paths = [folder / "1.h5", folder / "2.h5"]
    for path, (start, stop) in zip(paths, ((0, 5), (5, 9)), strict=True):
        rows = np.arange(start + 1, stop)
        content = {} if start else text()
        content |= images(
            "train",
            features(start, 1, len(rows), DIM),
            rows % 3,
            ids=[f"train/{row}" for row in rows],
            skipped=[f"train/{start}"],
            skipped_labels=[2],
            digests=rows,
        )
        part = Part(1 + bool(start), 2, {"train": (start, stop, 9)})
        write_cache(path, content, **STATED, part=part, templates=TEMPLATES)
    return paths


def make_cache(path: Path) -> Path:
    write_cache(path, small_content(), **STATED)
    return path
