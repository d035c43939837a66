"""Whole runs with --with-text-tower and --with-projection: what the cache then holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.adapters.methods.networks.coop_context import class_weights, prepare
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.text_tower import read_text_tower, tower_path
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import load_backbone
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.merge import MergeConfig, merge
from tests.adapters.tasks import unit
from tests.extract.image_folders import make_folder

CLASSES = ("cat", "sea_horse", "eel")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    root = make_folder(tmp_path_factory.mktemp("images"), {"train": 4, "test": 2}, CLASSES)
    own = tmp_path_factory.mktemp("descriptions") / "own.json"
    own.write_text(json.dumps({"cat": ["it purrs"], "sea_horse": ["a", "b"], "eel": ["long"]}))
    return ExtractConfig(
        dataset=f"folder:{root}",
        out=tmp_path_factory.mktemp("whole") / "features.h5",
        templates=("a photo of a {}.",),
        descriptions=own,
        views=1,
        batch_size=4,
        workers=1,
        with_text_tower=True,
        with_projection=True,
    )


@pytest.fixture(scope="module")
def whole(config: ExtractConfig) -> Path:
    return extract(config)


def contents(path: Path) -> dict[str, Any]:
    with FeatureCache(path) as cache:
        projection = cache.projection()
        return {
            "text": cache.text_features(),
            "tokens": cache.tokens(),
            "weights": projection.weights,
            "bias": projection.bias,
            **{
                f"{split}/{name}": getattr(cache, name)(split, np.arange(cache.shape(split)[1]))
                for split in cache.splits
                for name in ("features", "pre_projection")
            },
        }


def test_the_projection_of_what_comes_before_it_is_the_features(whole: Path) -> None:
    found = contents(whole)
    for split, views, rows in (("train", 2, 9), ("test", 1, 6)):
        before, features = found[f"{split}/pre_projection"], found[f"{split}/features"]
        assert (before.shape, features.shape) == ((views, rows, 128), (views, rows, 128))
        product = before.astype(np.float64) @ found["weights"]
        np.testing.assert_allclose(product, features, rtol=1e-4, atol=1e-5)
    assert not found["bias"].any()


def test_the_options_change_nothing_else(
    whole: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    plain = replace(config, out=tmp_path / "plain.h5", with_text_tower=False, with_projection=False)
    extract(plain)
    assert not tower_path(plain.out).exists()
    with FeatureCache(plain.out) as one, FeatureCache(whole) as other:
        assert "text_tower_sha256" not in one.backbone
        np.testing.assert_array_equal(one.text_features(), other.text_features())
        np.testing.assert_allclose(
            one.images("train").features, other.images("train").features, rtol=1e-5
        )


def test_the_tokens_are_those_that_the_text_tower_was_given(whole: Path) -> None:
    tokens = contents(whole)["tokens"]
    assert (tokens.shape, tokens.dtype) == ((3, 3, 24), np.int32)
    tokenizer = load_backbone("glyph-clip").tokenizer
    with FeatureCache(whole) as cache:
        names = cache.class_names
    horse = names.index("sea_horse")
    expected = tokenizer(["a photo of a sea horse.", "a", "b"]).numpy()
    np.testing.assert_array_equal(tokens[horse], expected)
    cat = names.index("cat")
    assert tokens[cat, :2].any(axis=1).all() and not tokens[cat, 2].any()  # two prompts only


def test_the_tower_gives_the_text_features_of_the_cache(whole: Path) -> None:
    with FeatureCache(whole) as cache:
        text, names, sha256 = cache.text_features(), cache.class_names, cache.backbone
    tower = read_text_tower(tower_path(whole), sha256["text_tower_sha256"])
    assert tower.config.weights_sha256 == sha256["weights_sha256"]
    prepared = prepare(*tower)
    setting = {"position": "end"}
    weights = class_weights(prepared.phrases["a photo of a"], setting, prepared)
    assert len(names) == len(weights)
    assert np.abs(unit(weights) - unit(text[:, 0])).max() < 1e-6


def test_parts_joined_are_the_whole(whole: Path, config: ExtractConfig, tmp_path: Path) -> None:
    parts = tuple(tmp_path / f"{index}.h5" for index in (1, 2))
    for index, part in enumerate(parts, start=1):
        extract(replace(config, out=part, shard=f"{index}/2"))
    assert [tower_path(part).exists() for part in parts] == [True, False]
    joined = merge(MergeConfig(tmp_path / "joined.h5", parts))
    assert tower_path(joined).read_bytes() == tower_path(whole).read_bytes()
    found, expected = contents(joined), contents(whole)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name
    tower_path(parts[0]).unlink()
    there = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"part, 1\.text_tower\.safetensors, is not there any more"):
        merge(MergeConfig(tmp_path / "again.h5", parts))
    with pytest.raises(UserError, match=r"2\.h5 is one of the parts"):
        merge(MergeConfig(parts[1], parts, force=True))
    assert sorted(tmp_path.iterdir()) == there


def test_a_tower_that_went_away_is_missed(config: ExtractConfig, tmp_path: Path) -> None:
    own = replace(config, out=tmp_path / "features.h5")
    extract(own)
    assert extract(own) == own.out
    tower_path(own.out).unlink()
    with pytest.raises(UserError, match=r"text_tower\.safetensors is missing, which belongs to"):
        extract(own)
    extract(replace(own, force=True))
    assert tower_path(own.out).exists()


def test_other_options_are_other_arguments(whole: Path, config: ExtractConfig) -> None:
    with pytest.raises(UserError, match=r"with_projection, with_text_tower differ"):
        extract(replace(config, with_projection=False, with_text_tower=False))


def test_a_tower_in_lower_precision_is_stored_as_it_was_trained(
    whole: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    out = extract(replace(config, out=tmp_path / "half.h5", precision="bf16"))
    assert tower_path(out).read_bytes() == tower_path(whole).read_bytes()
    found = contents(out)
    assert found["train/pre_projection"].shape == (2, 9, 128)
    product = found["train/pre_projection"] @ found["weights"]
    scale = np.abs(found["train/features"]).max()
    assert np.abs(product - found["train/features"]).max() < 0.02 * scale
