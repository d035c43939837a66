"""Adapters of every method and variant, fitted on real digits through the embedded backbone."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.formulas import classifier_weights
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Arrays, Head, Method, Setting, Task
from clip_adapter.adapters.registry import METHODS
from clip_adapter.extract.backbones.loading import Backbone, load_backbone
from clip_adapter.pipelines.console.jax_setup import set_up_jax
from clip_adapter.pipelines.reporting.figures import Picture
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo, SavedAdapter

CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["a photo of the digit {}.", "the digit {}"]
SUPPORT = 40
# What a scikit-learn estimator draws from random_state=1.
SEED = np.random.RandomState(1).randint(2**31 - 1)

KINDS = ("fixed", "learned", "hypernet")


@dataclass(frozen=True)
class Digits:
    """Digit images through glyph-clip. images: (N, 3, 32, 32), preprocessed. features: (N, D)."""

    pictures: list[Image.Image]
    labels: np.ndarray
    images: torch.Tensor
    features: np.ndarray
    text_features: np.ndarray
    weights: np.ndarray


@pytest.fixture(scope="session", autouse=True)
def _kept_programs() -> None:
    """Compiled programs are kept between runs of the tests, as the commands keep them."""
    set_up_jax()


@cache
def _thin_tables() -> dict[str, Method]:
    """Made once: of another record everything would be compiled anew."""
    found = {}
    for name, method in METHODS.items():
        thin = {
            own: replace(hyper, tried=(axis[0], axis[len(axis) // 2], axis[-1]))
            for own, hyper in method.hyper.items()
            if len(axis := hyper.tried) > 3
        }
        found[name] = replace(method, hyper={**method.hyper, **thin})
    return found


@pytest.fixture
def thin_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each long axis of a method's own grid the ends and the middle.

    For tests that run every method: some closed forms try thousands of settings otherwise.
    """
    for name, method in _thin_tables().items():
        monkeypatch.setitem(METHODS, name, method)


_PICTURES: dict[str, bytes] = {}


@pytest.fixture
def pictures_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn of the same numbers is not drawn again.

    For tests that end or go on with a run many times: drawing takes a third of a small run's time.
    """
    drawn = Picture._saved

    def once(picture: Picture, **options: Any) -> bytes:
        shown = repr((picture.name, picture.caption, picture.alt, picture.numbers, options))
        if shown not in _PICTURES:
            _PICTURES[shown] = drawn(picture, **options)
        return _PICTURES[shown]

    monkeypatch.setattr(Picture, "_saved", once)


@pytest.fixture(scope="session")
def glyph_clip() -> Backbone:
    return load_backbone("glyph-clip")


@pytest.fixture(scope="session")
def digits(glyph_clip: Backbone) -> Digits:
    bunch = load_digits()
    pixels = np.rint(bunch.images[:120] / 16 * 255).astype(np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    images = torch.stack([glyph_clip.preprocess(picture) for picture in pictures])
    prompts = [template.format(name) for name in CLASS_NAMES for template in TEMPLATES]
    with torch.inference_mode():
        features = glyph_clip.model.encode_image(images).numpy()
        text = glyph_clip.model.encode_text(glyph_clip.tokenizer(prompts)).numpy()
    text = text.reshape(len(CLASS_NAMES), len(TEMPLATES), -1)
    weights = np.asarray(classifier_weights(jnp, jnp.asarray(text)))
    return Digits(pictures, bunch.target[:120], images, features, text, weights)


def few_epochs(method: Method, **values: Value) -> Setting:
    """The method's defaults and these values, trained shortly where it is trained."""
    short: dict[str, Value] = {"epochs": 10, "batch_size": 16}
    given = {name: (value,) for name, value in (short | values).items() if name in method.hyper}
    return method.default_setting(method.values(given, one=True))


@pytest.fixture(scope="session")
def saved_adapters(glyph_clip: Backbone, digits: Digits) -> Mapping[str, SavedAdapter]:
    """Every method that needs no more than features and text by its name, and every branch and kind
    of ratio of CLIP-Adapter: `zero-shot`, `image-fixed` ….

    An adapter of one branch is that half of the one fitted with both.
    """
    scale = np.float32(glyph_clip.logit_scale)
    engine = Engine()

    def fitted(method: Method, setting: Setting) -> Arrays:
        text = digits.text_features if "text" in method.needs else None
        task = Task(
            features=jnp.asarray(digits.features[None, :SUPPORT]),
            labels=jnp.asarray(digits.labels[:SUPPORT], jnp.int32),
            validation_features=jnp.zeros((0, digits.features.shape[1])),
            validation_labels=jnp.zeros(0, jnp.int32),
            head=jax.tree.map(jnp.asarray, Head(digits.weights, scale, np.float32(0.5), text)),
            seed=jnp.int32(SEED),
        )
        return fit(method, setting, None, task, engine)

    def adapter(method: str, setting: Setting, arrays: Arrays) -> SavedAdapter:
        info = AdapterInfo(
            method=method,
            setting=dict(setting),
            class_names=CLASS_NAMES,
            templates=TEMPLATES,
            logit_scale=glyph_clip.logit_scale,
            logit_bias=0.5,
            backbone=json.loads(json.dumps(glyph_clip.identity)),
            preprocess=json.loads(json.dumps(glyph_clip.preprocess_config)),
            dataset={"name": "digits"},
            cache_sha256=hashlib.sha256(b"a cache").hexdigest(),
            fitted={"shots": 4, "seed": SEED, "select": "none", "epoch": None},
        )
        return SavedAdapter(info, arrays, digits.weights)

    adapters = {}
    for name, method in METHODS.items():
        if set(method.needs) <= {"text"}:
            chosen = few_epochs(method)
            adapters[name] = adapter(name, chosen, fitted(method, chosen))
    method = METHODS["clip-adapter"]
    for kind in KINDS:
        ratios = {"alpha": 0.6, "beta": 0.3} if kind == "fixed" else {"alpha": kind, "beta": kind}
        setting = few_epochs(method, branch="both", **ratios)
        both = fitted(method, setting)
        adapters[f"both-{kind}"] = adapter(method.name, setting, both)
        for branch in ("image", "text"):
            half = {name: array for name, array in both.items() if name.startswith(branch)}
            setting = few_epochs(method, branch=branch, **ratios)
            adapters[f"{branch}-{kind}"] = adapter(method.name, setting, half)
    return adapters


@pytest.fixture(scope="session")
def flax_logits() -> Callable[[SavedAdapter, np.ndarray], np.ndarray]:
    """adapter, features (N, D) → the logits (N, C) of the training side."""

    def logits(adapter: SavedAdapter, features: np.ndarray) -> np.ndarray:
        info = adapter.info
        head = Head(adapter.weights, np.float32(info.logit_scale), np.float32(info.logit_bias))
        return make_classify(METHODS[info.method], info.setting, adapter.arrays, head)(features)

    return logits


@pytest.fixture
def image_folder(tmp_path: Path, digits: Digits) -> Path:
    """Image files of the first digits, some in a sub-folder: <tmp>/images/00.png …, more/10.png."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for index, picture in enumerate(digits.pictures[:12]):
        place = folder / "more" if index >= 10 else folder
        picture.save(place / f"{index:02}.png")
    return folder
