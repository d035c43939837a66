"""Tiny synthetic caches, and `fit` run on them as a process."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from clip_adapter.cache.writer import write_cache as write_content
from clip_adapter.pipelines.fitting.config import FitConfig
from tests import processes

DIM = 16
SECOND = {
    "name": "tiny-dino",
    "pretrained": "nothing",
    "weights_sha256": "1" * 64,
    "image_size": 8,
    "preprocess": {"size": 8, "crop_pct": 0.875},
}
Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class TinyData:
    """splits: features (V, N, DIM) float32 and labels (N,). text: (C, 2, DIM)."""

    splits: Mapping[str, Split]
    text: np.ndarray
    name: str = "tiny"
    attributes: dict[str, object] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        return len(self.text)

    def with_split(self, name: str, split: Split | None) -> "TinyData":
        others = {key: value for key, value in self.splits.items() if key != name}
        return TinyData(others if split is None else others | {name: split}, self.text)

    def shuffled_labels(self, name: str) -> "TinyData":
        """Every label of a split replaced by the next one."""
        features, labels = self.splits[name]
        return self.with_split(name, (features, (labels + 1) % self.classes))

    def noisy_features(self, name: str) -> "TinyData":
        features, labels = self.splits[name]
        noise = np.random.default_rng(99).normal(size=features.shape)
        return self.with_split(name, (noise.astype(np.float32), labels))


def tiny_data(
    *,
    train: tuple[int, ...] = (9, 9, 9, 9),
    val: int = 6,
    test: int | tuple[int, ...] = 15,
    views: int = 1,
    noise: float = 1.6,
    dim: int = DIM,
    seed: int = 0,
) -> TinyData:
    """Classes around random centres, in a shuffled order; text features are the centres, disturbed.

    train: images per class; val: for every class; test: either.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(train), dim))
    splits: dict[str, Split] = {}
    for name, counts in (
        ("train", train),
        ("val", (val,) * len(train)),
        ("test", test if isinstance(test, tuple) else (test,) * len(train)),
    ):
        labels = rng.permutation(np.repeat(np.arange(len(train)), counts))
        shape = (views if name == "train" else 1, len(labels), dim)
        features = 2 * (centres[labels] + noise * rng.normal(size=shape))
        splits[name] = features.astype(np.float32), labels
    text = centres[:, None] + 1.2 * rng.normal(size=(len(train), 2, dim))
    return TinyData(splits, text.astype(np.float32))


def write_cache(
    path: Path,
    data: TinyData,
    class_names: Sequence[str] = (),
    *,
    ids: Sequence[str] = (),
    digests: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
    second: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """class_names: by default `class 0` and so on. ids: of the images of every split, by default
    `<split>/<row>`. digests: with some, which depend on the ids alone. groups: by split, of each
    image. second: features (V, N, E) of a second encoder, by split."""
    content: dict[str, Any] = {
        "text/features": data.text,
        "text/class_names": class_names or [f"class {number}" for number in range(data.classes)],
        "text/templates": ["a {}", "the {}"],
    }
    for split, (features, labels) in data.splits.items():
        own = ids or [f"{split}/{row}" for row in range(len(labels))]
        named = {"features": features, "labels": labels, "ids": own}
        if digests:
            named["digests"] = [crc32(name.encode()) for name in own]
        if groups and split in groups:
            named["groups"] = groups[split]
        if second:
            named["features2"] = second[split]
        content |= {f"images/{split}/{name}": values for name, values in named.items()}
    write_content(
        path,
        content,
        backbone={
            "name": "tiny-clip",
            "pretrained": "nothing",
            "weights_sha256": "0" * 64,
            "embed_dim": data.text.shape[2],
            "image_size": 8,
            "quick_gelu": False,
        },
        dataset={"name": data.name, "source": "made up", "splits": {"test": "made up"}},
        logit_scale=20.0,
        logit_bias=0.5,
        arguments={"data": data.name},
        backbone2=SECOND | {"embed_dim": second["train"].shape[2]} if second else None,
    )
    return path


FIT = Path(sys.executable).with_name("fit")


def run_fit(
    folder: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`fit` with these arguments as a process in `folder`."""
    return processes.run(["fit", *arguments], folder, os.environ | environment)


def short(cache: Path, out: Path, **values: Any) -> FitConfig:
    """A quick run of CLIP-Adapter alone at 4 shots, where `values` say nothing else.

    values: of FitConfig's fields, and of hyper-parameters by their names.
    """
    known = {field.name for field in fields(FitConfig)}
    hyper = {name: value for name, value in values.items() if name not in known}
    stated = {name: value for name, value in values.items() if name in known}
    quick = {"epochs": 10, "learning_rate": 0.01}
    return FitConfig(
        cache=cache,
        out=out,
        hyper=quick | hyper | stated.pop("hyper", {}),
        **{"shots": 4, "baselines": ()} | stated,
    )
