"""Caches, runs and predictions as frames of pandas."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.predict import PredictConfig, predict
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.pipelines.tiny_cache import tiny_data, write_cache

DATA = tiny_data()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    groups = {s: [f"g{row // 2}" for row in range(len(y))] for s, (_, y) in DATA.splits.items()}
    return write_cache(tmp_path_factory.mktemp("frames") / "f.h5", DATA, groups=groups)


def test_a_cache_and_its_images(cache: Path) -> None:
    with FeatureCache(cache) as opened:
        frame = opened.to_frame()
        test = opened.to_frame("test")
    assert frame.columns.tolist() == ["id", "split", "label", "group"]
    assert frame.split.value_counts().to_dict() == {s: len(y) for s, (_, y) in DATA.splits.items()}
    assert test.label.tolist() == [f"class {n}" for n in DATA.splits["test"][1]]
    assert test.id.tolist()[:3] == ["test/0", "test/1", "test/2"]
    assert frame[frame.split == "test"].group.tolist() == test.group.tolist()


def test_a_run_and_its_predictions(cache: Path, tmp_path: Path) -> None:
    config = FitConfig(cache, tmp_path / "run", ("gda",), ("zero-shot",), (2, 4), select="none")
    result = fit(config)
    frame = result.to_frame()
    assert frame[["method", "shots"]].to_numpy().tolist() == [
        ["zero-shot", 2], ["gda", 2], ["zero-shot", 4], ["gda", 4]
    ]  # fmt: skip
    assert frame.test_accuracy.tolist() == [row.test_accuracy for row in result.results]
    alpha = load_adapter(tmp_path / "run").info.setting["alpha"]
    assert frame.alpha.tolist()[3] == alpha and np.isnan(frame.alpha.tolist()[0])
    predictions = predict(PredictConfig((cache,), tmp_path / "run", split="test", top=1))
    told = predictions.to_frame()
    assert told.columns.tolist() == ["image", "class_1", "probability_1"]
    right = np.mean(told.class_1 == [f"class {n}" for n in DATA.splits["test"][1]])
    assert right == result.results[3].test_accuracy


def test_an_image_that_cannot_be_read(tmp_path: Path, digits_cache: Path) -> None:
    fit(FitConfig(digits_cache, tmp_path / "run", ("gda",), (), (2,), select="none"))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    images = (tmp_path / "a.png", tmp_path / "b.png")
    frame = predict(PredictConfig(images, tmp_path / "run", top=1)).to_frame()
    assert frame.image.tolist() == [*map(str, images)]
    assert frame.unreadable.isna().tolist() == [True, False]
    assert frame.class_1.isna().tolist() == [False, True]
