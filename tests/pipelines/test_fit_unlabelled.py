"""`fit --unlabelled`: what is refined, what decides it, and what it leaves alone."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.adapters.stata import refine, refined_logits
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache as write_content
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import main
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.options import command_line, parse
from clip_adapter.pipelines.fitting.run import FitResult, run_fit
from clip_adapter.pipelines.fitting.unlabelled import read_unlabelled
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter
from tests.pipelines.tiny_cache import tiny_data, write_cache

CLASSES, DIM, SEED, NOISE = 6, 64, 3, 3.0
DATA = tiny_data(train=(9,) * CLASSES, val=6, test=30, noise=NOISE, dim=DIM, seed=SEED)
CENTRES = np.random.default_rng(SEED).normal(size=(CLASSES, DIM))


def with_images(path: Path, plain: Path, features: np.ndarray, **changed: Any) -> Path:
    """The cache `plain` and images without labels."""
    with FeatureCache(plain) as cache:
        content = {"text/features": cache.text_features(), "text/class_names": cache.class_names}
        content["text/templates"] = cache.templates
        for split in cache.splits:
            images = cache.images(split)
            content |= {f"images/{split}/features": images.features}
            content |= {f"images/{split}/labels": images.labels, f"images/{split}/ids": images.ids}
        content["images/unlabelled/features"] = features[None].astype(np.float32)
        content["images/unlabelled/ids"] = [f"new/{row}" for row in range(len(features))]
        stated = {"backbone": cache.backbone, "dataset": cache.dataset, "arguments": {}}
        stated |= {"logit_scale": cache.logit_scale, "logit_bias": cache.logit_bias}
        write_content(path, content, **stated | {"preprocess": cache.preprocess} | changed)
    return path


def new_images(classes: int = CLASSES, noise: float = NOISE) -> np.ndarray:
    """40 of each of the first so many classes, none of which the cache has."""
    labels = np.repeat(np.arange(classes), 40)
    rng = np.random.default_rng(8)
    return 2 * (CENTRES[labels] + noise * rng.normal(size=(len(labels), DIM)))


def run(cache: Path, out: Path, unlabelled: Path | None, **given: Any) -> FitResult:
    chosen = {"method": "ridge", "baselines": ("zero-shot",), "shots": (2,)} | given
    return run_fit(FitConfig(cache=cache, out=out, unlabelled=unlabelled, **chosen), Listener())


def saved(result: FitResult, method: str = "ridge", shots: int = 2) -> SavedAdapter:
    return load_adapter(result.run / "adapters" / method / f"shots-{shots}-seed-1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    return with_images(folder / "all.h5", write_cache(folder / "plain.h5", DATA), new_images())


def test_the_saved_classifier_is_the_refined_one_and_tested_as_such(cache: Path, tmp_path: Path):
    plain, found = run(cache, tmp_path / "plain", None), run(cache, tmp_path / "run", cache)
    before, adapter = saved(plain), saved(found)
    (row,) = (row for row in found.results if row.method == "ridge")
    pattern = r"refined by 240 images without labels, which show 6 of 6 classes: (.*) → ([\d.]*) %"
    said = re.match(pattern, row.note)
    assert said and adapter.refinement is not None
    with FeatureCache(cache) as opened:
        images = opened.features("unlabelled", np.arange(240), views=1)[0]
        test, val = (opened.images(split) for split in ("test", "val"))
    # By float64, at the temperature that the file states.
    rows = images.astype(np.float64)
    wide = [part.astype(np.float64) for part in (before.logits(images), before.weights)]
    _, wanted = refine(rows, *wide, float(adapter.refinement.temperature))
    logits = refined_logits(np, wanted, before.logits(test.features[0]), test.features[0])
    np.testing.assert_allclose(adapter.logits(test.features[0]), logits, atol=2e-3)
    accuracy = np.mean(logits.argmax(axis=1) == test.labels)
    assert row.test_accuracy == pytest.approx(accuracy, abs=1e-9)
    assert (before.logits(test.features[0]).argmax(axis=1) != logits.argmax(axis=1)).any()
    (task,) = json.loads((found.run / "tasks.json").read_text())
    judged = np.isin(val.ids, task["validation"])
    for classifier, percent in zip((before, adapter), said.groups(), strict=True):
        right = classifier.logits(val.features[0]).argmax(axis=1) == val.labels
        assert float(percent) == pytest.approx(100 * right[judged].mean(), abs=0.01)
    temperatures = adapter.refinement.temperature * np.geomspace(0.2, 5, 9)
    z, own = before.logits(val.features[0])[judged], val.labels[judged]

    def loss(scaled: np.ndarray) -> float:
        top = scaled.max(axis=1)
        total = np.log(np.exp(scaled - top[:, None]).sum(axis=1)) + top
        return float(np.mean(total - scaled[np.arange(len(own)), own]))

    losses = [loss(z / temperature) for temperature in temperatures]
    assert np.argmin(losses) == 4  # the temperature is the likeliest
    scores = evaluate(EvaluateConfig(cache, found.run / "adapters/ridge/shots-2-seed-1"))
    assert scores.accuracy == pytest.approx(accuracy, abs=1e-9)


def test_most_of_what_the_formula_gains_is_gained_by_the_command(
    digits_cache: Path, tmp_path: Path
):
    """Zero-shot on the embedded default: 71.0 % → 77.9 % by the formula with all training images at
    the model's own scale; here by those that are not drawn, at the likeliest temperature."""
    with FeatureCache(digits_cache) as opened:
        train = opened.images("train", views=1).features[0]
    given = {"method": "zero-shot", "baselines": (), "shots": (4,)}
    cache = with_images(tmp_path / "digits.h5", digits_cache, train)
    (row,) = run(cache, tmp_path / "run", cache, **given).results
    assert row.note.startswith("refined by ") and "10 of 10 classes" in row.note
    assert row.test_accuracy is not None and 0.77 < row.test_accuracy < 0.82


def test_without_the_option_all_is_as_before(cache: Path, tmp_path: Path):
    """The adapter, the plan and the row; baselines are never refined."""
    plain, found = run(cache, tmp_path / "plain", None), run(cache, tmp_path / "run", cache)
    assert not {n for n in json.loads((plain.run / "run.json").read_text()) if "unlabelled" in n}
    assert saved(plain).refinement is None
    assert plain.results[0] == found.results[0]  # of zero-shot, the baseline
    assert not any(row.note for row in plain.results)


def test_few_of_the_classes_are_named_and_a_loss_is_not_kept(cache: Path, tmp_path: Path, capsys):
    """Two clusters far from any text draw what is near them."""
    clusters = new_images(2, noise=0.3) + 1.8 * np.repeat(CENTRES[2:4], 40, axis=0)
    few = with_images(tmp_path / "few.h5", cache, clusters)
    words = ["--cache", cache, "--unlabelled", few, "--method", "zero-shot", "--baselines"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--shots", "2", "--out", str(tmp_path / "run")])
    assert not ended.value.code
    printed = capsys.readouterr().out
    said = re.search(r"not refined by 80 images without labels, which show (\d) of 6", printed)
    assert said and int(said[1]) < 6 and "(without 'class " in printed
    adapter = load_adapter(tmp_path / "run")
    assert adapter.refinement is None and "unlabelled" not in adapter.info.fitted
    with FeatureCache(cache) as opened:
        test = opened.images("test")
    accuracy = np.mean(adapter.logits(test.features[0]).argmax(axis=1) == test.labels)
    assert f"{100 * accuracy:.2f}" in printed  # of what is saved
    assert "none of them is tested" in printed


def test_what_fits_chooses_or_tests_is_none_of_the_images(cache: Path, tmp_path: Path):
    """Test images among them are not looked at; those that are, nobody scores the adapter on."""
    new = new_images()
    among = np.concatenate([new, DATA.splits["test"][0][0], DATA.splits["val"][0][0]])
    more = with_images(tmp_path / "more.h5", cache, among)
    found, mixed = run(cache, tmp_path / "run", cache), run(cache, tmp_path / "mixed", more)
    one, other = saved(found), saved(mixed)
    # Only validation images that no task drew may be among them.
    assert one.info.fitted["unlabelled"]["images"] == 240
    undrawn = 6 * CLASSES - 2 * CLASSES
    assert other.info.fitted["unlabelled"]["images"] == 240 + undrawn
    assert one.seen is not None and len(one.seen) == 240 + 4 * CLASSES


@pytest.mark.parametrize("shots", [1, 4])
def test_without_validation_images_the_support_set_decides(shots: int, tmp_path: Path):
    """By cross-validation; of one image a class nothing can be left out, but where nothing was
    fitted all are."""
    data = DATA.with_split("val", None)
    plain = write_cache(tmp_path / "plain.h5", data)
    cache = with_images(tmp_path / "cache.h5", plain, new_images())
    given = {"shots": (shots,), "select": "cv", "method": ("ridge", "zero-shot"), "baselines": ()}
    found = run(cache, tmp_path / "run", cache, **given)
    notes = {row.method: row.note for row in found.results}
    assert f" on {shots * CLASSES} labelled images that took no part" in notes["zero-shot"]
    if shots == 1:
        assert "a class has one labelled image, so that none is left to judge by" in notes["ridge"]
        assert saved(found, shots=1).refinement is None
    else:
        assert f" on {shots * CLASSES} labelled images that took no part" in notes["ridge"]


def test_a_run_goes_on_with_the_same_images_alone(cache: Path, tmp_path: Path):
    found = run(cache, tmp_path / "run", cache)
    before = (found.run / "selected.jsonl").read_bytes()
    moved = cache.rename(tmp_path / "moved.h5")
    try:
        (found.run / "selected.jsonl").unlink()
        resumed = FitConfig(resume=found.run, cache=moved, unlabelled=moved)
        run_fit(resumed, Listener())
        assert (found.run / "selected.jsonl").read_bytes() == before
        other = with_images(tmp_path / "other.h5", moved, new_images()[1:])
        with pytest.raises(UserError, match="are not those that"):
            run_fit(replace(resumed, unlabelled=other), Listener())
    finally:
        moved.rename(cache)
    line = command_line(found.plan, found.run)
    assert f"--unlabelled {cache}" in line
    assert parse(line.split()[1:]).unlabelled == cache


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"ablate": ("ridge",)}, "--unlabelled takes no --ablate beside it"),
        ({"refit": True}, "--unlabelled takes no --refit beside it"),
        ({"train_classes": "base", "method": "zero-shot"}, "no --train-classes base beside it"),
    ],
)
def test_what_cannot_be_meant_together(cache: Path, tmp_path: Path, given: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        run(cache, tmp_path / "run", cache, **given)
    assert not (tmp_path / "run").exists()


BACKBONE = {"name": "tiny-clip", "pretrained": "x", "weights_sha256": "1" * 64, "embed_dim": DIM}


def test_other_caches_are_refused(cache: Path, tmp_path: Path):
    other = BACKBONE | {"image_size": 8, "quick_gelu": False}
    foreign = with_images(tmp_path / "f.h5", cache, new_images(2), backbone=other)
    blurred = with_images(tmp_path / "b.h5", cache, new_images(2), preprocess={"size": [9, 9]})
    labelled = write_cache(tmp_path / "l.h5", DATA)
    few = with_images(tmp_path / "few.h5", cache, DATA.splits["test"][0][0, :5])
    wide = with_images(tmp_path / "w.h5", write_cache(tmp_path / "8.h5", tiny_data(dim=8)),
                       np.ones((30, 8)))  # fmt: skip
    with FeatureCache(cache) as opened:
        for path, sentence in (
            (foreign, "was made with other weights of the backbone than"),
            (blurred, "was made with other preprocessing than"),
            (wide, f"features of .*w.h5 are 8 wide and those of .* {DIM}; extract"),
            (labelled, "holds no images without labels"),
        ):
            with pytest.raises(UserError, match=sentence):
                read_unlabelled(path, opened, Listener())
    with pytest.raises(UserError, match="of 5 images 0 take no part"):
        run(cache, tmp_path / "run", few)
