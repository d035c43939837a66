"""An adapter that images without labels have refined is the same classifier wherever it is used."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from clip_adapter.adapters.stata import Refinement, refine, refined_logits
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.pipelines.commands.predict import main
from clip_adapter.pipelines.console.running import EXIT_PARTIAL
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter, save_adapter
from clip_adapter.pipelines.saved.pytorch import AdaptedClip
from tests.pipelines.test_adapter_file import replace_arrays

KINDS = ("zero-shot", "ridge", "tip-adapter", "both-fixed")


def refined(adapter: SavedAdapter, features: np.ndarray) -> SavedAdapter:
    temperature = 0.1 if adapter.info.method == "ridge" else 1.5
    logits = adapter.logits(features)
    _, refinement = refine(features, logits, adapter.weights, temperature)
    return replace(adapter, refinement=refinement)


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_and_gives_in_pytorch_what_it_gives_in_numpy(
    kind: str,
    tmp_path: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    digits: Any,
    glyph_clip: Backbone,
) -> None:
    plain = saved_adapters[kind]
    adapter = refined(plain, digits.features[40:])
    assert adapter.refinement is not None
    save_adapter(tmp_path / "run", adapter)
    loaded = load_adapter(tmp_path / "run")
    logits = loaded.logits(digits.features)
    exactly = Refinement(*(np.asarray(part, np.float64) for part in adapter.refinement))
    before = plain.logits(digits.features).astype(np.float64)
    wanted = refined_logits(np, exactly, before, digits.features.astype(np.float64))
    atol = 1e-5 * adapter.info.logit_scale
    np.testing.assert_allclose(logits, wanted, atol=atol)
    assert np.abs(logits - before).max() > 1  # it is another classifier
    module = AdaptedClip(glyph_clip, loaded)
    np.testing.assert_allclose(module(digits.images).numpy(), wanted, atol=2 * atol)
    assert {"head.refinement_means", "head.refinement_temperature"} <= module.state_dict().keys()
    exported = torch.export.export(module.head, (torch.zeros(2, 128),)).module()
    found = exported(torch.from_numpy(digits.features[:2])).detach().numpy()
    np.testing.assert_allclose(found, wanted[:2], atol=2 * atol)


def test_an_adapter_that_nothing_refined_is_the_same_bytes(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    save_adapter(tmp_path, saved_adapters["ridge"])
    assert sorted(load_file(tmp_path / "adapter.safetensors")) == ["fitted/weights", "weights"]


Arrays = dict[str, np.ndarray]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.pop("refinement/means"), "cannot be used"),
        (lambda a: a.update({"refinement/steps": np.ones(1, np.float32)}), "cannot be used"),
        (lambda a: a.update({"refinement/means": a["weights"][:3]}), "means are not finite"),
        (lambda a: a["refinement/means"].fill(np.nan), "means are not finite"),
        (lambda a: a["refinement/means"].fill(2), "no unit features have"),
        (lambda a: a["refinement/variances"].fill(0), "no unit features have"),
        (lambda a: a.update({"refinement/temperature": np.float32(-1)}), "no unit features have"),
    ],
)
def test_a_refinement_that_is_none_is_refused(
    change: Callable[[Arrays], object],
    sentence: str,
    tmp_path: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    digits: Any,
) -> None:
    save_adapter(tmp_path, refined(saved_adapters["ridge"], digits.features))
    arrays = {n: np.array(own) for n, own in load_file(tmp_path / "adapter.safetensors").items()}
    change(arrays)
    replace_arrays(tmp_path, save({name: np.asarray(own) for name, own in arrays.items()}))
    with pytest.raises(UserError, match=sentence):
        load_adapter(tmp_path)


@pytest.mark.parametrize("kind", ["ridge", "refined"])
def test_images_are_classified_together(
    kind: str,
    tmp_path: Path,
    image_folder: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    digits: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By their shares; one that cannot be read takes no part. Batches do not matter. The
    temperature of an adapter that was refined is the saved one, else the spread of the zero-shot
    logits decides it."""
    plain = saved_adapters["ridge"]
    adapter = plain if kind == "ridge" else refined(plain, digits.features[40:])
    save_adapter(tmp_path / "run", adapter)
    (image_folder / "05a.png").write_text("no picture")
    command = ["--adapter", tmp_path / "run", image_folder, "--transductive", "--format", "json"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, command), "--top", "10", "--batch-size", "5"])
    assert ended.value.code == EXIT_PARTIAL
    out, err = capsys.readouterr()
    features = digits.features[:12].astype(np.float64)
    logits = plain.logits(digits.features[:12]).astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ plain.weights.T * plain.info.logit_scale
    spreads = [np.sqrt(np.var(own, axis=1).mean()) for own in (logits, cosines)]
    temperature = 0.1 if kind == "refined" else spreads[0] / spreads[1]
    wanted, _ = refine(features, logits, plain.weights.astype(np.float64), temperature)
    alone = np.exp(logits / temperature)
    assert np.abs(wanted - alone / alone.sum(axis=1, keepdims=True)).max() > 0.1
    names = plain.info.class_names
    found = [
        [{own["class"]: own["probability"] for own in image["top"]}[name] for name in names]
        for image in json.loads(out)
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    shown = len(set(wanted.argmax(axis=1)))
    assert f"12 images were classified together (transductive) and show {shown} of 10" in err


def test_one_image_has_no_other(
    tmp_path: Path,
    image_folder: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_adapter(tmp_path / "run", saved_adapters["zero-shot"])
    with pytest.raises(SystemExit) as ended:
        main(["--adapter", str(tmp_path / "run"), str(image_folder / "03.png"), "--transductive"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert "--transductive takes 2 images or more" in err
