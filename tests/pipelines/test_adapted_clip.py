"""AdaptedClip gives in PyTorch what the Flax modules give, and takes no other backbone."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.backbones.names import GLYPH_CLIP_FOLDER
from clip_adapter.pipelines.saved import pytorch as adapted_clip
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, save_adapter
from clip_adapter.pipelines.saved.pytorch import AdaptedClip, FittedHead

LogitsOf = Callable[[SavedAdapter, np.ndarray], np.ndarray]


def spread_out(adapter: SavedAdapter) -> SavedAdapter:
    """The adapter with predicted ratios that differ widely between rows."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(0, 4, array.shape).astype(np.float32) if "direction" in name else array
        for name, array in adapter.arrays.items()
    }
    return dataclasses.replace(adapter, arrays=arrays)


def test_logits_of_images_are_the_flax_ones(
    glyph_clip: Backbone,
    saved_adapters: Mapping[str, SavedAdapter],
    digits: Any,
    flax_logits: LogitsOf,
) -> None:
    distinct = set()
    for name, fitted in saved_adapters.items():
        adapter = spread_out(fitted)
        model = AdaptedClip(glyph_clip, adapter)
        logits = model(digits.images).numpy()
        expected = flax_logits(adapter, digits.features)
        assert np.abs(logits - expected).max() <= 1e-5 * adapter.info.logit_scale, name
        distinct.add(np.round(logits, 2).tobytes())
    # TIMO-S is TIMO until something chooses.
    assert len(distinct) == len(saved_adapters) - 1


def test_a_feature_without_direction_gives_the_same_finite_logits(
    saved_adapters: Mapping[str, SavedAdapter], flax_logits: LogitsOf
) -> None:
    nothing = np.zeros((2, 128), np.float32)
    for name, adapter in saved_adapters.items():
        logits = FittedHead(adapter)(torch.from_numpy(nothing)).numpy()
        np.testing.assert_allclose(logits, flax_logits(adapter, nothing), atol=1e-5, err_msg=name)


def test_from_run_gives_a_frozen_module_in_evaluation_mode(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter], digits: Any, flax_logits: LogitsOf
) -> None:
    adapter = saved_adapters["image-hypernet"]
    save_adapter(tmp_path, adapter)
    model = AdaptedClip.from_run(tmp_path, device="cpu")
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.class_names == tuple(adapter.info.class_names)
    image = model.preprocess(digits.pictures[3])
    expected = flax_logits(adapter, digits.features[3:4])
    np.testing.assert_allclose(model(image[None]).numpy(), expected, atol=1e-3)


def test_the_adapter_is_part_of_the_state(
    glyph_clip: Backbone, saved_adapters: Mapping[str, SavedAdapter], digits: Any
) -> None:
    fitted = saved_adapters["both-hypernet"]
    one, other = (AdaptedClip(glyph_clip, adapter) for adapter in (fitted, spread_out(fitted)))
    assert not torch.equal(one(digits.images), other(digits.images))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(digits.images), other(digits.images))


def test_torch_export_takes_any_number_of_images(
    glyph_clip: Backbone, saved_adapters: Mapping[str, SavedAdapter], digits: Any
) -> None:
    model = AdaptedClip(glyph_clip, saved_adapters["both-hypernet"])
    batch = torch.export.Dim("batch", min=1, max=256)
    exported = torch.export.export(model, (digits.images[:4],), dynamic_shapes=({0: batch},))
    for count in (1, 33):
        images = digits.images[:count]
        torch.testing.assert_close(exported.module()(images), model(images), rtol=0, atol=1e-4)


def with_info(adapter: SavedAdapter, **changes: Any) -> SavedAdapter:
    return dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, **changes))


def test_other_weights_are_refused(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    adapter = saved_adapters["image-fixed"]
    other = {**adapter.info.backbone, "weights_sha256": "0" * 64}
    save_adapter(tmp_path, with_info(adapter, backbone=other))
    with pytest.raises(UserError, match="other weights of glyph-clip"):
        AdaptedClip.from_run(tmp_path)


@pytest.mark.parametrize("change", [{"mean": [0.0, 0.0, 0.0]}, {"interpolation": "bilinear"}])
def test_another_preprocessing_is_refused(
    glyph_clip: Backbone, saved_adapters: Mapping[str, SavedAdapter], change: dict[str, Any]
) -> None:
    adapter = saved_adapters["image-fixed"]
    changed = with_info(adapter, preprocess={**adapter.info.preprocess, **change})
    with pytest.raises(UserError, match=f"preprocessed with {next(iter(change))}"):
        AdaptedClip(glyph_clip, changed)


@pytest.mark.parametrize("backbone", [{}, {"name": 3, "pretrained": None}, {"name": "RN50"}])
def test_an_adapter_that_names_no_backbone_is_refused(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter], backbone: dict[str, Any]
) -> None:
    save_adapter(tmp_path, with_info(saved_adapters["image-fixed"], backbone=backbone))
    with pytest.raises(UserError, match="does not say which backbone"):
        AdaptedClip.from_run(tmp_path)


def naming(adapter: SavedAdapter, name: str, pretrained: str) -> SavedAdapter:
    """The adapter as if it were fitted for another backbone with the same weights."""
    return with_info(
        adapter, backbone={**adapter.info.backbone, "name": name, "pretrained": pretrained}
    )


def test_local_weights_may_have_moved(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    gone = f"local-dir:{tmp_path}/gone"
    save_adapter(tmp_path, naming(saved_adapters["image-fixed"], gone, gone))
    AdaptedClip.from_run(tmp_path, pretrained=str(GLYPH_CLIP_FOLDER))
    AdaptedClip.from_run(tmp_path, backbone=f"local-dir:{GLYPH_CLIP_FOLDER}")
    AdaptedClip.from_run(tmp_path, backbone="glyph-clip")


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        (f"local-dir:{GLYPH_CLIP_FOLDER}", f"local-dir:{GLYPH_CLIP_FOLDER}"),
        ("hf-hub:somebody/something", "hf-hub:somebody/something"),
        ("glyph-clip", str(GLYPH_CLIP_FOLDER)),
        ("ViT-B-32", str(GLYPH_CLIP_FOLDER)),
        ("ViT-B-32", str(GLYPH_CLIP_FOLDER / "open_clip_model.safetensors")),
        ("ViT-B-32", "no tag"),
        ("../evil", "openai"),
    ],
)
def test_an_adapter_cannot_have_a_backbone_loaded_that_is_not_published(
    tmp_path: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    pretrained: str,
) -> None:
    save_adapter(tmp_path, naming(saved_adapters["image-fixed"], name, pretrained))
    monkeypatch.setattr(adapted_clip, "load_backbone", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="no model and tag of open_clip's; name the backbone with"):
        AdaptedClip.from_run(tmp_path)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_a_published_backbone_is_loaded_by_its_name_and_tag(
    tmp_path: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    glyph_clip: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    save_adapter(tmp_path, naming(saved_adapters["image-fixed"], name, "openai"))
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        adapted_clip, "load_backbone", lambda *names: asked.append(names) or glyph_clip
    )
    AdaptedClip.from_run(tmp_path)
    assert asked == [(name, "openai")]
