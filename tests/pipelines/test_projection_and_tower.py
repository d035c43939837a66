"""Methods that need more of a backbone than features: from images to predictions."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect
from clip_adapter.pipelines.commands.predict import PredictConfig, predict
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter, save_adapter
from clip_adapter.pipelines.saved.pytorch import AdaptedClip
from tests.pipelines.test_damaged_adapters import damaged

COUNT = 60
SHORT = {"epochs": 3, "batch_size": 16, "context_length": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with all that a cache may hold, and a run of both methods on them."""
    folder = tmp_path_factory.mktemp("more")
    cache = folder / "features.h5"
    extract(ExtractConfig(out=cache, with_text_tower=True, with_projection=True))
    methods = ("prolip", "coop")
    hyper = {name: value for name, value in SHORT.items()}
    fit(
        FitConfig(
            cache, folder / "run", methods, ("zero-shot",), shots=2, select="none", hyper=hyper
        )
    )
    return folder


def adapter_of(place: Path, method: str) -> Path:
    return place / "run" / "adapters" / method / "shots-2-seed-1"


@pytest.fixture(scope="module")
def test_images(place: Path, glyph_clip: Backbone) -> tuple[torch.Tensor, Path]:
    """The first digits of the test split, preprocessed, and as files."""
    split = open_dataset("digits").splits["test"]
    (place / "images").mkdir()
    for row in range(COUNT):
        split.read(row).save(place / "images" / f"{row:03}.png")
    pictures = [split.read(row) for row in range(COUNT)]
    return torch.stack([glyph_clip.preprocess(p) for p in pictures]), place / "images"


@pytest.mark.parametrize("method", ["prolip", "coop"])
def test_images_get_the_classes_that_fit_gave_them(
    place: Path, test_images: tuple[torch.Tensor, Path], glyph_clip: Backbone, method: str
) -> None:
    images, folder = test_images
    adapter = load_adapter(adapter_of(place, method))
    of_fit = read_predictions(place / "run", method, 2, 1)
    model = AdaptedClip(glyph_clip, adapter)
    with torch.inference_mode():
        logits = model(images).double()
    assert np.array_equal(logits.argmax(dim=1).numpy(), of_fit.predicted[:COUNT])
    confidence = logits.softmax(dim=1).amax(dim=1).numpy()
    np.testing.assert_allclose(confidence, of_fit.confidence[:COUNT], atol=1e-4)
    found = list(predict(PredictConfig((folder,), adapter_of(place, method), top=1)))
    names = [adapter.info.class_names[label] for label in of_fit.predicted[:COUNT]]
    assert [prediction.top[0][0] for prediction in found] == names
    zero_shot = read_predictions(place / "run", "zero-shot", 2, 1)
    assert not np.array_equal(zero_shot.confidence, of_fit.confidence)
    scores = evaluate(EvaluateConfig(place / "features.h5", adapter_of(place, method)))
    assert np.array_equal(scores.predicted, of_fit.predicted)
    assert np.array_equal(scores.zero_shot, zero_shot.predicted)
    facts = dict(inspect(InspectConfig(adapter_of(place, method))))
    assert facts["what"].startswith(f"adapter of {method}")


def test_the_projection_of_the_adapter_takes_the_place_of_the_backbones(
    place: Path, test_images: tuple[torch.Tensor, Path], glyph_clip: Backbone
) -> None:
    images, _ = test_images
    adapter = load_adapter(adapter_of(place, "prolip"))
    with torch.inference_mode():
        before = glyph_clip.model.encode_image(images)
        logits = AdaptedClip(glyph_clip, adapter)(images).numpy()
        # The caller's backbone is what it was.
        assert torch.equal(glyph_clip.model.encode_image(images), before)
    with FeatureCache(place / "features.h5") as cache:
        pooled = cache.pre_projection("test", np.arange(COUNT), views=1)[0].astype(np.float64)
        assert not np.array_equal(cache.projection().weights, adapter.arrays["projection"])
    features = pooled @ adapter.arrays["projection"] + adapter.arrays["bias"]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    expected = adapter.info.logit_scale * features @ adapter.weights.T
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_images_of_a_folder_are_scored_with_what_is_before_the_projection(
    place: Path, test_images: tuple[torch.Tensor, Path]
) -> None:
    split = open_dataset("digits").splits["test"]
    of_fit = read_predictions(place / "run", "prolip", 2, 1)
    zero_shot = read_predictions(place / "run", "zero-shot", 2, 1)
    adapter = load_adapter(adapter_of(place, "prolip"))
    for row in range(COUNT):
        own = place / "labelled" / adapter.info.class_names[split.labels[row]]
        own.mkdir(parents=True, exist_ok=True)
        split.read(row).save(own / f"{row:03}.png")
    scores = evaluate(EvaluateConfig(place / "labelled", adapter_of(place, "prolip")))
    right = of_fit.predicted[:COUNT] == split.labels[:COUNT]
    assert scores.accuracy == right.mean()
    before = zero_shot.predicted[:COUNT] == split.labels[:COUNT]
    assert scores.zero_shot_accuracy == before.mean()


def test_a_cache_without_it_names_the_flag(place: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.h5"
    extract(ExtractConfig(out=plain))
    with pytest.raises(UserError, match="has no pre-projection"):
        evaluate(EvaluateConfig(plain, adapter_of(place, "prolip")))
    # CoOp's adapter holds what the tower made of its context.
    scores = evaluate(EvaluateConfig(plain, adapter_of(place, "coop")))
    assert np.array_equal(scores.predicted, read_predictions(place / "run", "coop", 2, 1).predicted)


def test_another_width_before_the_projection_is_refused(
    place: Path, tmp_path: Path, glyph_clip: Backbone
) -> None:
    adapter = load_adapter(adapter_of(place, "prolip"))
    narrow = {**adapter.arrays, "projection": adapter.arrays["projection"][:100]}
    save_adapter(tmp_path, replace(adapter, arrays=narrow))
    with pytest.raises(UserError, match="features 100 wide, those of glyph-clip are 128 wide"):
        AdaptedClip(glyph_clip, load_adapter(tmp_path))
    with pytest.raises(UserError, match=r"features 100 wide, those of .*\.h5 are 128 wide"):
        evaluate(EvaluateConfig(place / "features.h5", tmp_path))


@pytest.mark.parametrize("method", ["prolip", "coop"])
def test_damaged_arrays_are_refused(place: Path, tmp_path: Path, method: str) -> None:
    adapter = load_adapter(adapter_of(place, method))
    accepted = []
    for what, arrays in damaged(adapter.arrays):
        save_adapter(tmp_path, replace(adapter, arrays=arrays))
        try:
            load_adapter(tmp_path)
        except UserError:
            continue
        accepted.append(what)
    # Sizes that nothing else fixes: features and context of another width, which the backbone
    # and the tower tell. The context is of use for other classes alone.
    free = {"projection: one row", "projection: a row less"}
    kinds = ("one row", "one column", "a row less", "a column more", "turned", "empty")
    free |= {"context missing", *(f"context: {kind}" for kind in kinds)}
    assert set(accepted) <= free


def test_the_state_can_be_exported(
    place: Path, test_images: tuple[torch.Tensor, Path], glyph_clip: Backbone
) -> None:
    images, _ = test_images
    model = AdaptedClip(glyph_clip, load_adapter(adapter_of(place, "prolip")))
    exported = torch.export.export(model, (images[:2],))
    torch.testing.assert_close(exported.module()(images[:2]), model(images[:2]), atol=1e-4, rtol=0)


def test_all_adapters_are_loaded_as_they_were_saved(place: Path) -> None:
    adapters: Mapping[str, SavedAdapter] = {
        name: load_adapter(adapter_of(place, name)) for name in ("prolip", "coop")
    }
    shapes: dict[str, Any] = {
        name: {key: array.shape for key, array in adapter.arrays.items()}
        for name, adapter in adapters.items()
    }
    assert shapes["prolip"] == {"projection": (128, 128), "bias": (128,)}
    assert shapes["coop"]["weights"] == (10, 128) and len(shapes["coop"]["context"]) == 2
