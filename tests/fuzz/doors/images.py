"""Image files, as `predict` decodes, prepares and classifies them (`extract` decodes alike)."""

import json
import random
from pathlib import Path

import numpy as np

from clip_adapter.extract.backbones.loading import load_backbone
from clip_adapter.pipelines.commands.predict import PredictConfig, predict
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo, SavedAdapter, save_adapter
from tests.fuzz import image_mutations
from tests.fuzz.attempt import Attempt

CLASSES = ["cat", "dog"]


def prepare(folder: Path) -> None:
    backbone = load_backbone("glyph-clip")
    weights = np.random.default_rng(0).normal(size=(len(CLASSES), backbone.identity["embed_dim"]))
    info = AdapterInfo(
        method="zero-shot",
        setting={},
        class_names=CLASSES,
        templates=["a {}"],
        logit_scale=backbone.logit_scale,
        logit_bias=backbone.logit_bias,
        backbone=json.loads(json.dumps(backbone.identity)),
        preprocess=json.loads(json.dumps(backbone.preprocess_config)),
        dataset={"name": "made up"},
        cache_sha256="0" * 64,
        fitted={},
    )
    save_adapter(folder / "run", SavedAdapter(info, {}, weights.astype(np.float32)))


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    found = Attempt(image_mutations.make(rng, folder))
    (path,) = folder.iterdir()
    config = PredictConfig((path,), prepared / "run", workers=1)
    prediction = found.read(lambda: next(iter(predict(config))))
    if prediction and prediction.unreadable is not None:
        found.sentence(prediction.unreadable)
    elif prediction and not all(0 <= p <= 1 for _, p in prediction.top):
        found.faults.append(f"silent acceptance: {prediction}")
    return found
