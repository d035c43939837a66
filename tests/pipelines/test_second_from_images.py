"""An adapter of two encoders on images: predict, evaluate and PyTorch agree with fit."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.backbones.second import load_second
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.predict import PredictConfig, predict
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from clip_adapter.pipelines.saved.pytorch import AdaptedClip

COUNT = 24
METHODS = ("ridge", "tip-adapter", "gda", "proker")
NAME = "timm:test_vit"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits by glyph-clip and a small model of timm with random weights, a run on them, and some
    test images as files."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)
    torch.save(model.state_dict(), folder / "weights.pt")
    cache, weights = folder / "features.h5", str(folder / "weights.pt")
    extract(ExtractConfig(out=cache, also=NAME, also_pretrained=weights))
    hyper = {"second": 1.0}
    how = {"shots": 4, "select": "none", "hyper": hyper}
    fit(FitConfig(cache, folder / "run", METHODS, ("zero-shot",), **how))
    split = open_dataset("digits").splits["test"]
    for row in range(COUNT):
        own = folder / "images" / str(split.labels[row])
        own.mkdir(parents=True, exist_ok=True)
        split.read(row).save(own / f"{row:03}.png")
    return folder


def adapter_of(place: Path, method: str) -> Path:
    return place / "run" / "adapters" / method / "shots-4-seed-1"


@pytest.mark.parametrize("method", METHODS)
def test_images_get_the_classes_that_fit_gave_them(
    place: Path, glyph_clip: Backbone, method: str
) -> None:
    of_fit = read_predictions(place / "run", method, 4, 1)
    adapter = load_adapter(adapter_of(place, method))
    second = load_second(NAME, str(place / "weights.pt"))
    model = AdaptedClip(glyph_clip, adapter, second)
    read = open_dataset("digits").splits["test"].read
    pictures = [read(row) for row in range(COUNT)]
    both = [
        torch.stack([step(p) for p in pictures]) for step in (model.preprocess, model.preprocess2)
    ]
    with torch.inference_mode():
        logits = model(*both).double()
        with pytest.raises(TypeError, match="the adapter takes 2 sets of images"):
            model(both[0])
    assert np.array_equal(logits.argmax(dim=1).numpy(), of_fit.predicted[:COUNT])
    confidence = logits.softmax(dim=1).amax(dim=1).numpy()
    np.testing.assert_allclose(confidence, of_fit.confidence[:COUNT], atol=1e-3)
    exported = torch.export.export(model, (both[0][:2], both[1][:2]))
    found = exported.module()(both[0][:2], both[1][:2])
    torch.testing.assert_close(found.double(), logits[:2], atol=1e-3, rtol=0)

    config = PredictConfig(
        (place / "images",),
        adapter_of(place, method),
        top=1,
        also_pretrained=str(place / "weights.pt"),
    )
    names = {p.path.stem: p.top[0][0] for p in predict(config)}
    labels = of_fit.predicted[:COUNT].tolist()
    wanted = [adapter.info.class_names[label] for label in labels]
    assert [names[f"{row:03}"] for row in range(COUNT)] == wanted


def test_a_folder_is_scored_with_both(place: Path, tmp_path: Path) -> None:
    names = load_adapter(adapter_of(place, "ridge")).info.class_names
    for label, name in enumerate(names):
        if (own := place / "images" / str(label)).exists():
            (tmp_path / name).symlink_to(own)
    weights = str(place / "weights.pt")
    config = EvaluateConfig(tmp_path, adapter_of(place, "ridge"), also_pretrained=weights)
    of_fit = read_predictions(place / "run", "ridge", 4, 1)
    right = of_fit.predicted[:COUNT] == open_dataset("digits").splits["test"].labels[:COUNT]
    assert evaluate(config).accuracy == right.mean()


def test_without_the_second_model_it_is_refused(
    place: Path, glyph_clip: Backbone, tmp_path: Path
) -> None:
    adapter = adapter_of(place, "ridge")
    with pytest.raises(UserError, match=r"takes 'timm:test_vit' with the weights 'weights\.pt' as"):
        predict(PredictConfig((place / "images",), adapter))
    with pytest.raises(UserError, match="features of timm:test_vit as well, which lack; give"):
        AdaptedClip(glyph_clip, load_adapter(adapter))
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), other)
    with pytest.raises(UserError, match="fitted for other weights of timm:test_vit"):
        predict(PredictConfig((place / "images",), adapter, also_pretrained=str(other)))
    alone = adapter_of(place, "ridge").parent.parent / "zero"
    fit(FitConfig(place / "features.h5", alone, "ridge", (), shots=1, select="none"))
    one = alone / "adapters" / "ridge" / "shots-1-seed-1"
    with pytest.raises(UserError, match="The adapter takes one encoder; leave --also"):
        predict(PredictConfig((place / "images",), one, also=NAME))
