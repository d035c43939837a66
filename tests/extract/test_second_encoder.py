"""Features of a second frozen model: as that model gives them, and kept by image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from clip_adapter.cache.parts import merge_parts
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract import encode_job
from clip_adapter.extract.backbones.second import is_published, load_second
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from tests.cache.rewriting import datasets
from tests.extract.image_folders import make_folder

NAME = "resnet10t"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones, with the classifier that published files have."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet10t.pt"
    torch.save(timm.create_model(NAME, pretrained=False).state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images", {"train": 4, "test": 3}, ("cat", "eel"))


def run(images: Path, out: Path, weights: Path | None = None, **options: Any) -> Path:
    also = {} if weights is None else {"also": f"timm:{NAME}", "also_pretrained": str(weights)}
    values = {"dataset": f"folder:{images}", "batch_size": 4, "workers": 2}
    return extract(ExtractConfig(out=out, **values | also | options))


def reference(weights: Path, picture: Image.Image) -> np.ndarray:
    """What timm itself makes of an image."""
    model = timm.create_model(NAME, pretrained=False).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    config = timm.data.resolve_model_data_config(model)
    pixels = timm.data.create_transform(**config, is_training=False)(picture.convert("RGB"))
    with torch.inference_mode():
        return model.forward_head(model.forward_features(pixels[None]), pre_logits=True)[0].numpy()


def test_features_are_those_of_timm_with_its_own_preprocessing(
    images: Path, tmp_path: Path, weights: Path
) -> None:
    plain, both = run(images, tmp_path / "one.h5"), run(images, tmp_path / "two.h5", weights)
    with FeatureCache(both) as cache, FeatureCache(plain) as alone:
        assert cache.backbone2["name"] == f"timm:{NAME}"
        assert cache.backbone2["pretrained"] == "resnet10t.pt"
        assert cache.backbone2["preprocess"]["crop_pct"] == 0.875
        assert alone.backbone2 is None and "also" not in alone.arguments
        for split in cache.splits:
            assert cache.ids(split) == alone.ids(split)
            found = cache.features2(split, np.arange(cache.shape(split)[1]))
            for name, row in zip(cache.ids(split), found[0], strict=True):
                expected = reference(weights, Image.open(images / name))
                np.testing.assert_allclose(row, expected, atol=1e-4 * np.abs(expected).max())
    own = {name: values for name, values in datasets(both).items() if "features2" not in name}
    assert {n: v for n, v in own.items() if n != "metadata"} == {
        n: v for n, v in datasets(plain).items() if n != "metadata"
    }


class Interrupted(Exception):
    pass


def encoded(monkeypatch: pytest.MonkeyPatch, *, stop_after: int = 10**9) -> list[str]:
    """The ids that are encoded from now on, with the encoder's name before them."""
    seen: list[str] = []
    stage = encode_job.stage_images

    def noted(batches: Any, known: Any, *others: Any) -> Any:
        for batch in stage(batches, known, *others):
            seen.extend(f"{batch.name} {known.split.ids[row]}" for row in batch.rows)
            yield batch
            if len(seen) >= stop_after:
                raise Interrupted

    monkeypatch.setattr(encode_job, "stage_images", noted)
    return seen


def test_an_interrupted_run_goes_on_and_an_update_keeps_what_it_can(
    images: Path, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(images, tmp_path / "whole.h5", weights)
    with monkeypatch.context() as patch:
        before = encoded(patch, stop_after=9)
        with pytest.raises(Interrupted):
            run(images, tmp_path / "features.h5", weights)
    with monkeypatch.context() as patch:
        after = encoded(patch)
        run(images, tmp_path / "features.h5", weights)
    assert any(name.startswith("features2") for name in before)
    assert not {*before} & {*after}
    assert {*before, *after} == {
        f"{kind} {name}"
        for kind in ("features", "features2")
        for split in FeatureCache(whole).splits
        for name in FeatureCache(whole).ids(split)
    }
    assert datasets(tmp_path / "features.h5") == datasets(whole)

    plain = run(images, tmp_path / "plain.h5")
    with pytest.raises(UserError, match=r"\(also, also_pretrained differ\).*--update"):
        run(images, plain, weights)
    with monkeypatch.context() as patch:
        added = encoded(patch)
        run(images, plain, weights, update=True)
    assert added and all(name.startswith("features2") for name in added)
    assert datasets(plain) == datasets(whole)
    with monkeypatch.context() as patch:
        nothing = encoded(patch)
        with pytest.raises(UserError, match="also, also_pretrained differ"):
            run(images, plain)
        run(images, plain, weights, views=1, update=True)
    assert {name.split("/")[0] for name in nothing} == {"features train", "features2 train"}
    with FeatureCache(plain) as cache:
        assert cache.features2("train", [0]).shape[0] == 2


def test_other_weights_of_the_second_are_encoded_again(
    images: Path, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = run(images, tmp_path / "features.h5", weights)
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model(NAME, pretrained=False).state_dict(), other)
    again = encoded(monkeypatch)
    run(images, cache, other, update=True)
    assert again and all(name.startswith("features2") for name in again)
    assert datasets(cache) == datasets(run(images, tmp_path / "fresh.h5", other))


def test_what_the_second_cannot_read_is_skipped_by_both(
    images: Path, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strip that only the second one's larger input makes too large."""
    from clip_adapter.extract.encoding import preprocess

    (split, *_) = sorted(path for path in images.iterdir() if path.is_dir())
    folder = sorted(path for path in split.iterdir())[0]
    Image.new("RGB", (600, 20)).save(folder / "strip.png")
    monkeypatch.setattr(preprocess, "RESIZED_PIXELS_MAX", 176 * 176 * 20)
    cache = run(images, tmp_path / "features.h5", weights, on_error="skip")
    with FeatureCache(cache) as opened:
        assert sum(len(opened.skipped_ids(name)) for name in opened.splits) == 1
        for name in opened.splits:
            assert len(opened.features2(name, np.arange(opened.shape(name)[1]))[0])


def test_parts_are_joined(images: Path, tmp_path: Path, weights: Path) -> None:
    whole = run(images, tmp_path / "whole.h5", weights)
    parts = [run(images, tmp_path / f"{i}.h5", weights, shard=f"{i}/2") for i in (1, 2)]
    merge_parts(parts, tmp_path / "merged.h5")
    assert datasets(tmp_path / "merged.h5") == datasets(whole)


def test_a_clip_may_be_the_second(images: Path, tmp_path: Path) -> None:
    with FeatureCache(run(images, tmp_path / "features.h5", also="glyph-clip")) as cache:
        rows = np.arange(cache.shape("test")[1])
        found = cache.features2("test", rows)
        np.testing.assert_array_equal(found, cache.features("test", rows))


def test_what_cannot_be_had_is_one_sentence(tmp_path: Path, weights: Path) -> None:
    noise = tmp_path / "noise.pt"
    noise.write_bytes(b"no weights")
    other = tmp_path / "other.pt"
    torch.save({"stem.weight": torch.zeros(3)}, other)
    for name, path, words in (
        ("timm:resnet10", None, "Unknown model 'timm:resnet10'"),
        ("dinov2_vitz14", None, "Unknown backbone 'dinov2_vitz14'"),
        (f"timm:{NAME}", tmp_path / "none.pt", "is no file"),
        (f"timm:{NAME}", noise, "The weights of timm:resnet10t cannot be had"),
        (f"timm:{NAME}", other, "The weights of timm:resnet10t cannot be had"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_second(name, path and str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--also-pretrained has no effect without --also"):
        ExtractConfig(also_pretrained="x").check()


def test_what_a_received_file_may_name() -> None:
    assert is_published("dinov2_vits14", "lvd142m") and is_published("glyph-clip", "glyph-clip")
    assert is_published("timm:vit_tiny_patch16_224", "augreg_in21k")
    assert not is_published("timm:vit_tiny_patch16_224", "weights.pt")
    assert not is_published("timm:hf-hub:somebody/model", "x")
    assert not is_published("hf-hub:somebody/model", "x")
