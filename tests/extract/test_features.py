"""The cache holds what open_clip gives by hand, one image at a time."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import load_backbone
from clip_adapter.extract.backbones.names import GLYPH_CLIP_FOLDER
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.extract.text.prompts import prompts, resolve_templates
from tests.extract.image_folders import make_folder

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def by_hand():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{GLYPH_CLIP_FOLDER}")
    merges = str(GLYPH_CLIP_FOLDER / "bpe_merges.txt.gz")
    tokenizer = open_clip.SimpleTokenizer(bpe_path=merges, context_length=24)
    return model.eval(), preprocess, tokenizer


@pytest.mark.parametrize("split", ["train", "val", "test"])
@torch.inference_mode()
def test_image_features(digits_cache: Path, by_hand: tuple, split: str) -> None:
    model, preprocess, _ = by_hand
    digits = load_digits()
    with FeatureCache(digits_cache) as cache:
        images = cache.images(split)
    rows = np.unique(np.r_[:5, 60:70, np.arange(0, len(images.ids), 23), len(images.ids) - 1])
    for row in rows:
        source = int(images.ids[row].removeprefix("digits/"))
        pixels = (digits.images[source] * 255 / 16).round().astype(np.uint8)
        features = model.encode_image(preprocess(Image.fromarray(pixels))[None])[0].numpy()
        np.testing.assert_allclose(images.features[0, row], features, atol=TOLERANCE)
        assert images.labels[row] == digits.target[source]
    assert images.features.shape[0] == 1
    norms = np.linalg.norm(images.features, axis=-1)
    assert np.abs(norms - 1).min() > 0.01  # not normalised


def test_every_digit_is_in_one_split(digits_cache: Path) -> None:
    with FeatureCache(digits_cache) as cache:
        ids = [i for split in cache.splits for i in cache.images(split).ids]
    assert sorted(ids) == [f"digits/{row:04d}" for row in range(1797)]


@torch.inference_mode()
def check_text(path: Path, by_hand: tuple, templates: list[str]) -> None:
    model, _, tokenizer = by_hand
    with FeatureCache(path) as cache:
        text = cache.text_features()
        assert cache.templates == templates
        assert text.shape == (len(cache.class_names), len(templates), 128)
        for c, name in enumerate(cache.class_names):
            for p, template in enumerate(templates):
                features = model.encode_text(tokenizer([template.replace("{}", name)]))[0]
                np.testing.assert_allclose(text[c, p], features.numpy(), atol=TOLERANCE)


def test_text_features(digits_cache: Path, by_hand: tuple) -> None:
    check_text(digits_cache, by_hand, ["a photo of the digit {}."])


def test_text_features_of_own_templates(tmp_path: Path, by_hand: tuple) -> None:
    data = f"folder:{make_folder(tmp_path / 'data', {'train': 1, 'test': 1}, ('cat', 'dog'))}"
    templates = ["a {}", "the {} again.", "a"]
    out = tmp_path / "out" / "features.h5"
    with pytest.raises(UserError, match=r"The template 'a' needs exactly one \{\}"):
        extract(ExtractConfig(dataset=data, out=out, templates=tuple(templates)))
    assert not out.parent.exists()
    extract(ExtractConfig(dataset=data, out=out, val=0.0, templates=tuple(templates[:2])))
    check_text(out, by_hand, templates[:2])


def test_scale_and_identity(digits_cache: Path, by_hand: tuple) -> None:
    model = by_hand[0]
    backbone = load_backbone("glyph-clip")
    with FeatureCache(digits_cache) as cache:
        assert cache.logit_scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
        assert cache.logit_bias == 0
        assert cache.backbone == {**backbone.identity, "image_size": [32, 32]}
        assert cache.preprocess["mean"] == [0.5, 0.5, 0.5]
        assert cache.preprocess["interpolation"] == "bicubic"
        assert cache.dataset["name"] == "digits"
        assert cache.dataset["source"] == "scikit-learn"
        assert set(cache.dataset["splits"]) == {"train", "val", "test"}
        assert cache.arguments["backbone"] == "glyph-clip"


def test_prompts() -> None:
    assert prompts("forest_path", ["a {}", "{}s."]) == ["a forest path", "forest paths."]
    assert prompts("{}", ["a {}"]) == ["a {}"]
    resolve_templates(["{}", "a {}."])
    for bad in ("a", "{} and {}", ""):
        with pytest.raises(UserError, match="needs exactly one"):
            resolve_templates(["a {}", bad])
