"""Adapters of caches that were made with `extract --decode fast`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.predict import PredictConfig
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, save_adapter
from clip_adapter.pipelines.scoring.images import encoded_files


def test_an_adapter_decodes_as_its_cache(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    """`predict` and `evaluate` encode files as `extract` did, and take no cache of the other."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))
    for name in ("one", "two"):
        path = tmp_path / "data" / "test" / name / "large.jpg"
        path.parent.mkdir(parents=True)
        coarse.resize((300, 250), Image.Resampling.BICUBIC).save(path)
    full = saved_adapters["both-learned"]
    adapters, caches, features = {}, {}, {}
    for how in ("full", "fast"):
        config = ExtractConfig(
            f"folder:{tmp_path}/data", out=tmp_path / f"{how}.h5", batch_size=1, decode=how
        )
        with FeatureCache(extract(config)) as cache:
            caches[how] = cache.features("test", [0])[0, 0]
            info = dataclasses.replace(full.info, preprocess=cache.preprocess)
        adapters[how] = dataclasses.replace(full, info=info)
        save_adapter(tmp_path / how, adapters[how])
        source = encoded_files([path], {}, adapters[how], PredictConfig((), tmp_path))
        features[how] = next(source.blocks(source.rows)).features[0]
    assert np.abs(features["full"] - caches["full"]).max() < 1e-5
    assert np.abs(features["fast"] - caches["fast"]).max() < 1e-5
    assert np.abs(features["fast"] - features["full"]).max() > 1e-3
    for one, other in (("fast", "full"), ("full", "fast")):
        with pytest.raises(UserError, match=f"decode '{one}'.* uses '{other}'"):
            evaluate(EvaluateConfig(tmp_path / f"{other}.h5", tmp_path / one))
