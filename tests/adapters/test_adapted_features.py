"""The image features that methods adapt, and that their logits are those features' cosines."""

from typing import Any

import numpy as np
import pytest

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import METHODS

RNG = np.random.default_rng(3)
D, H, F, C, N = 8, 4, 6, 3, 5
IMAGES, BEFORE = RNG.normal(size=(N, D)), RNG.normal(size=(N, F))
DOWN, UP, SQUARE = RNG.normal(size=(D, H)), RNG.normal(size=(H, D)), RNG.normal(size=(D, D))
PROJECTION, BIAS = RNG.normal(size=(F, D)), RNG.normal(size=D)
HEAD = Head(RNG.normal(size=(C, D)), 20.0, 0.5)
KERNELS = {"image/bottleneck/down/kernel": DOWN, "image/bottleneck/up/kernel": UP}
BLENDED = 0.3 * np.maximum(np.maximum(IMAGES @ DOWN, 0) @ UP, 0) + 0.7 * IMAGES
CASES: list[tuple[str, dict[str, Any], dict[str, Any], np.ndarray, np.ndarray]] = [
    ("clip-adapter", {"branch": "image", "alpha": 0.3}, KERNELS, IMAGES, BLENDED),
    ("rla", {}, {"matrix": SQUARE}, IMAGES, (SQUARE @ IMAGES.T).T),
    ("prolip", {}, {"projection": PROJECTION, "bias": BIAS}, BEFORE, BEFORE @ PROJECTION + BIAS),
]


@pytest.mark.parametrize(("name", "setting", "arrays", "given", "expected"), CASES)
def test_adapted_features(name, setting, arrays, given, expected):
    method = METHODS[name]
    assert method.adapt is not None
    np.testing.assert_allclose(method.adapt(np, arrays, setting, given, HEAD), expected)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    classes = HEAD.weights / np.linalg.norm(HEAD.weights, axis=1, keepdims=True)
    logits = method.logits(np, arrays, setting, given, HEAD)
    np.testing.assert_allclose(logits, 20 * unit @ classes.T + 0.5)


def test_an_adapter_on_the_text_moves_no_image():
    setting = {"branch": "text", "beta": 0.3}
    np.testing.assert_array_equal(
        METHODS["clip-adapter"].adapt(np, {}, setting, IMAGES, HEAD), IMAGES
    )


def test_methods_that_adapt_are_all_here():
    assert {name for name, own in METHODS.items() if own.adapt} == {case[0] for case in CASES}
