"""Classify the test images of a run's data."""

from __future__ import annotations

import numpy as np

from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.method import Arrays, Method, Setting
from clip_adapter.pipelines.fitting.data import Data
from clip_adapter.pipelines.fitting.predictions import Predictions


def predict_test(
    method: Method, setting: Setting, arrays: Arrays, data: Data
) -> Predictions | None:
    """Classify the test images of the data's classes, block by block; None where there are none."""
    if "test" not in data.cache.splits:
        return None
    classify = make_classify(method, setting, arrays, data.head(method))
    labels, predicted, confidence = [], [], []
    for features, own in data.test_blocks(method):
        logits = classify(features).astype(np.float64)
        best = logits.argmax(axis=1)
        top = logits[np.arange(len(best)), best]
        labels.append(own)
        predicted.append(best.astype(np.int32))
        confidence.append((1 / np.exp(logits - top[:, None]).sum(axis=1)).astype(np.float32))
    if not labels:
        return None
    true, taken, sure = map(np.concatenate, (labels, predicted, confidence))
    names = data.cache.class_names[data.classes]
    return Predictions(true, taken, sure, data.test_ids(), names)
