"""Features of a second encoder: from the cache through the choice of their weight to evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.options import command_line, parse
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.saved.adapter_file import load_adapter, save_adapter
from tests.cache.rewriting import rewrite
from tests.pipelines.tiny_cache import SECOND, tiny_data, write_cache

DATA = tiny_data(noise=3.0)
METHODS = ("ridge", "tip-adapter", "gda", "proker")
WIDTH = 6


def informative(seed: int = 0) -> dict[str, np.ndarray]:
    """Features that tell the classes better than the first encoder's, far from 0."""
    rng = np.random.default_rng(seed)
    centres = 4 + rng.normal(size=(DATA.classes, WIDTH))
    return {
        split: (centres[labels] + 0.4 * rng.normal(size=(*features.shape[:2], WIDTH))).astype("f4")
        for split, (features, labels) in DATA.splits.items()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a second encoder, one without, and a run of all that take it on each."""
    folder = tmp_path_factory.mktemp("second")
    write_cache(folder / "both.h5", DATA, second=informative())
    write_cache(folder / "one.h5", DATA)
    hyper = {
        **{
            "tip-adapter.alpha": (0.1, 1.0),
            "tip-adapter.beta": (1.0, 5.0),
            "gda.alpha": (0.1, 1.0),
        },
        **{"proker.beta": (1.0, 5.0), "proker.ridge": (0.05, 0.5), "ridge.prior": (1.0, 3.0)},
    }
    for name in ("both", "one"):
        fit(
            FitConfig(
                *(folder / f"{name}.h5", folder / name, METHODS, ("zero-shot",)),
                shots=(2, 4),
                select="loo",
                hyper=hyper,
            )
        )
    return folder


def adapter_of(place: Path, method: str, shots: int = 4) -> Path:
    return place / "both" / "adapters" / method / f"shots-{shots}-seed-1"


@pytest.mark.parametrize("method", METHODS)
def test_its_weight_is_chosen_from_four_shots_on_and_it_helps(place: Path, method: str) -> None:
    rows = {
        (row["method"], row["shots"]): row
        for row in map(json.loads, (place / "both" / "selected.jsonl").read_text().splitlines())
    }
    assert rows[method, 2]["setting"]["second"] == 0.0
    assert rows[method, 4]["setting"]["second"] > 0.0
    alone = {
        row["method"]: row
        for row in map(json.loads, (place / "one" / "selected.jsonl").read_text().splitlines())
        if row["shots"] == 4
    }
    assert rows[method, 4]["test_accuracy"] > alone[method]["test_accuracy"] + 0.05
    assert "second" not in alone[method]["setting"]
    headers = [(place / run / "results.csv").read_text().split(",") for run in ("one", "both")]
    assert ["second" in header for header in headers] == [False, True]


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_says_which_encoder_it_takes(place: Path, method: str) -> None:
    adapter = load_adapter(adapter_of(place, method))
    assert adapter.info.backbone2 == SECOND | {"embed_dim": WIDTH}
    with FeatureCache(place / "both.h5") as cache:
        train = cache.features2("train", np.arange(cache.shape("train")[1]))[0]
    mean = train.astype(np.float64).mean(axis=0)  # of all of them, not of the support set
    np.testing.assert_allclose(adapter.arrays["centre"], mean, rtol=1e-6)
    facts = dict(inspect(InspectConfig(adapter_of(place, method))))
    assert "name tiny-dino" in facts["second encoder"]
    document = json.loads((adapter_of(place, method, 2) / "adapter.json").read_text())
    assert "backbone2" not in document
    assert not {"centre"} & {*load_adapter(adapter_of(place, method, 2)).arrays}


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_gives_the_predictions_of_fit(place: Path, method: str) -> None:
    scores = evaluate(EvaluateConfig(place / "both.h5", adapter_of(place, method)))
    of_fit = read_predictions(place / "both", method, 4, 1)
    assert np.array_equal(scores.predicted, of_fit.predicted)
    zero_shot = read_predictions(place / "both", "zero-shot", 4, 1)
    assert np.array_equal(scores.zero_shot, zero_shot.predicted)
    # One that was fitted without weight for it needs the first encoder alone.
    scores = evaluate(EvaluateConfig(place / "one.h5", adapter_of(place, method, 2)))
    of_fit = read_predictions(place / "both", method, 2, 1)
    assert np.array_equal(scores.predicted, of_fit.predicted)


def test_an_adapter_of_both_is_refused_without_the_second(place: Path, tmp_path: Path) -> None:
    adapter = adapter_of(place, "ridge")
    with pytest.raises(UserError, match=r"features of tiny-dino as well, which lack; .*--also"):
        evaluate(EvaluateConfig(place / "one.h5", adapter))
    other = write_cache(tmp_path / "other.h5", DATA, second=informative())

    def change(name: str, value: Any) -> None:
        def changed(file: h5py.File, document: dict[str, Any]) -> None:
            document["backbone2"][name] = value

        rewrite(other, changed)

    change("preprocess", {"size": 8, "crop_pct": 1.0})
    with pytest.raises(UserError, match=r"with crop_pct 0\.875, tiny-dino here uses 1"):
        evaluate(EvaluateConfig(other, adapter))
    change("weights_sha256", "2" * 64)
    with pytest.raises(UserError, match="fitted for other weights of tiny-dino"):
        evaluate(EvaluateConfig(other, adapter))
    wide = {split: np.tile(own, 2) for split, own in informative().items()}
    write_cache(tmp_path / "wide.h5", DATA, second=wide)
    with pytest.raises(UserError, match=r"features 22 wide, those of .* are 28 wide"):
        evaluate(EvaluateConfig(tmp_path / "wide.h5", adapter))
    saved = load_adapter(adapter)
    save_adapter(tmp_path, replace(saved, info=replace(saved.info, backbone2=None)))
    with pytest.raises(UserError, match="of another number of encoders"):
        load_adapter(tmp_path)
    odd: Any = {**saved.info.backbone2, "preprocess": 5}
    save_adapter(tmp_path, replace(saved, info=replace(saved.info, backbone2=odd)))
    with pytest.raises(UserError, match=r"backbone2\.preprocess is 5"):
        load_adapter(tmp_path)


def test_options_for_it_are_refused_on_a_cache_without(place: Path, tmp_path: Path) -> None:
    words = "--second of ridge needs what this cache lacks; extract it with --also"
    for given in (["--second", "0.3"], ["--ablate", "second"]):
        command = ["--cache", str(place / "one.h5"), "--out", str(tmp_path / "run")]
        with pytest.raises(UserError, match=words):
            fit(parse([*command, "--method", "ridge", *given]))
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_given_holds_at_any_shots(place: Path, tmp_path: Path) -> None:
    config = FitConfig(
        *(place / "both.h5", tmp_path / "run", "ridge", ()),
        shots=1,
        select="none",
        hyper={"second": 3.0},
    )
    result = fit(config)
    assert result.results[0].setting["second"] == 3.0
    assert "--second 3.0" in command_line(result.plan, tmp_path)
    again = fit(FitConfig(place / "both.h5", tmp_path / "default", "ridge", (), shots=1))
    assert again.results[0].setting["second"] == 0.0 and again.plan.document()
    assert "second" not in command_line(again.plan, tmp_path)
    resumed = fit(FitConfig(resume=tmp_path / "default"))
    assert resumed.results == again.results
